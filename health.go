package quorate

// What is wrong with this member now: the faults that Err shows, how they are found, and how a state that has left the
// path of the others is rebuilt. It owns the faults, the check that runs every second, and the rebuild. It never decides on
// membership. The rooms report to it; it restarts what can be restarted.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

const (
	stallLimit    = 5 * time.Second // of one store or apply call; after it this member lets another lead
	checkInterval = time.Second
)

// The kinds of fault, the gravest first: Err shows the first that it shows at all. Each has a row in faultTable.
type faultKind int

const (
	faultClosed faultKind = iota
	faultRemoved
	faultLog
	faultApply
	faultGone
	faultRaft
	faultState
	faultForeign
	faultDiverged
	faultDispute
	faultLogDamage
	faultSchema
	faultUnseated
	faultStall
	faultStallOfAll
	faultLogWaits
	faultStateWaits
	faultSpace
	faultUnreached
	faultSlow
	faultStranger
	faultExpired
	faultFounding
	faultKinds
)

// effects are what a fault does to this member.
type effects uint

const (
	isSilent       effects = 1 << iota // it neither sends nor answers what others would take for a sign of life, so they elect another leader
	unfit                              // it hands over if it leads and a fit voter can, and it is the last to stand for election
	notReady                           // Ready fails
	inErr                              // Err shows it
	refusesWrites                      // every write that is begun here is refused at once
	refusesLeading                     // writes are refused at once where this member leads and no voter is fit to
	refusesReads                       // linearizable reads are refused at once, and the state is served to nobody
	effectsEnd
)

// faultTable is all that the kinds of fault differ in: silent, unfitToLead and the other questions about this member's faults are
// answered from it. A new kind is a constant above, a row here, and whoever finds it calls faults.set with it, and with nil when
// it has passed. README has the same table for operators.
var faultTable = [faultKinds]struct {
	cause string
	does  effects
	ends  string
}{
	faultClosed:     {"closed", notReady | inErr | refusesWrites | refusesReads, "another Open"},
	faultRemoved:    {"removed from the cluster", notReady | inErr | refusesWrites | refusesReads, "nothing: an empty directory joins anew"},
	faultLog:        {"the disk of the log has failed", isSilent | unfit | notReady | inErr | refusesWrites | refusesReads, "a restart, which reads the disk again"},
	faultApply:      {"the disk of the state has failed", isSilent | unfit | notReady | inErr | refusesWrites | refusesReads, "a restart, which reads the disk again"},
	faultGone:       {"files of the directory were removed or replaced", isSilent | unfit | notReady | inErr | refusesWrites | refusesReads, "a restart, with the files put back"},
	faultRaft:       {"raft does not start again", unfit | notReady | inErr, "the next try, seconds later"},
	faultState:      {"`snap` is damaged", unfit | notReady | inErr | refusesWrites | refusesReads, "the rebuild from the leader; alone, a backup"},
	faultForeign:    {"another program wrote to `snap`", unfit | notReady | inErr | refusesReads, "the rebuild from the leader; alone, its contents are taken"},
	faultDiverged:   {"the state differs from a majority's", unfit | notReady | inErr | refusesReads, "the rebuild from the leader"},
	faultDispute:    {"the states differ and there is no majority", inErr, "a backup, or the removal of the wrong members"},
	faultLogDamage:  {"an old entry of the log is damaged", inErr, "an empty directory that joins anew"},
	faultSchema:     {"a lone member's `snap` has tables or indexes of another program", inErr, "`DROP` of what Err names"},
	faultUnseated:   {"a shell has removed `snap-wal`, because the program itself opened `snap`", notReady | inErr, "the file put in place anew, at once"},
	faultStall:      {"a call to the disk hangs for 5 s", isSilent | unfit | notReady | inErr, "its return"},
	faultStallOfAll: {"the same, and no majority of the voters has a disk that works", unfit | notReady | inErr, "its return"},
	faultLogWaits:   {"no space or descriptor for the log", unfit | notReady | inErr | refusesLeading, "space, or descriptors"},
	faultStateWaits: {"no space or descriptor for the state, or a shell locks it", unfit | notReady | inErr | refusesLeading, "space, descriptors, or the end of the lock"},
	faultUnreached:  {"voters do not reach the leader, and more of them another one", unfit, "the next leader is heard"},
	faultSlow:       {"the log of the leader is slow, and a majority of the others is faster", unfit, "a minute, doubled each time up to ten, and appends of under 1 s"},
	faultSpace:      {"less than 64 MiB of space left, or a sixteenth of the file system, but at least 16 MiB or a quarter", unfit | inErr | refusesLeading, "space"},
	faultStranger:   {"another cluster has this address", notReady | inErr | refusesWrites | refusesReads, "`RemoveMember` there; 15 s without proof"},
	faultExpired:    {"this member's certificate has ended", inErr, "one that is valid: seen within a minute, on its server within an hour"},
	faultFounding:   {"founders disagree, or may not join", notReady | inErr, "one list, one cluster, or `AddAllowedMember`"},
}

type faults struct {
	log   *slog.Logger
	moved func() // called when a kind that makes unfit has come or gone; must not block; may be nil

	mu   sync.Mutex // guards list and the store of top
	list [faultKinds]error
	top  atomic.Pointer[error]
	some atomic.Int32 // how many there are: apply clears its own after every commit, and that must cost nothing
}

// set reports a fault, or with nil that it is over.
func (f *faults) set(k faultKind, err error) {
	if err == nil && f.some.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.list[k]
	f.list[k] = err
	if (err == nil) != (was == nil) {
		f.turnedLocked(k, err, was)
	}
	var top *error // stored once: whoever polls Err must not see nothing in between
	if err := f.withLocked(inErr); err != nil {
		top = &err
	}
	f.top.Store(top)
}

// turnedLocked: a fault has come, or the one that was there has gone.
func (f *faults) turnedLocked(k faultKind, err, was error) {
	does := faultTable[k].does
	switch {
	case err == nil:
		f.some.Add(-1)
		f.log.Info("this member has recovered", "fault", was)
	default:
		f.some.Add(1)
		if k == faultClosed {
			break
		}
		if does&inErr != 0 {
			f.log.Error("this member can't work", "fault", err)
		} else {
			f.log.Warn("this member does not work as it should", "fault", err)
		}
	}
	if does&unfit != 0 && f.moved != nil {
		f.moved()
	}
}

func (f *faults) err() error {
	if top := f.top.Load(); top != nil {
		return *top
	}
	return nil
}

// first is the first of these kinds that is there.
func (f *faults) first(kinds ...faultKind) error {
	if f.some.Load() == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range kinds {
		if f.list[k] != nil {
			return f.list[k]
		}
	}
	return nil
}

// with is the gravest fault that has this effect.
func (f *faults) with(e effects) error {
	if f.some.Load() == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.withLocked(e)
}

func (f *faults) withLocked(e effects) error {
	for k, err := range f.list {
		if err != nil && faultTable[k].does&e != 0 {
			return err
		}
	}
	return nil
}

// ofLog takes the word of the log: a fault for good, one that passes, as a full disk does, or nil that all is well.
func (f *faults) ofLog(err error) {
	var waits error
	if passing(err) {
		waits, err = err, nil
	}
	f.set(faultLog, err)
	f.set(faultLogWaits, waits)
}

// ofApply takes the word of apply: a fault for good, that it waits, or nil that it goes on.
func (f *faults) ofApply(err error) {
	if err == nil || isIO(err) {
		f.set(faultApply, err)
	}
	if !isIO(err) {
		f.set(faultStateWaits, err)
	}
}

// suffers is the gravest fault of this member that has this effect. A call that hangs is asked for itself: what watchHealth has
// found may be a second old.
func (s *Service) suffers(e effects) error {
	if err := s.faults.with(e); err != nil {
		return err
	}
	if kind, err := s.hangs(); err != nil && faultTable[kind].does&e != 0 {
		return err
	}
	return nil
}

// silent says why this member must not act as a member. It then neither sends nor answers what others would take for a sign of
// life, so that they elect one whose disk works.
func (s *Service) silent() error { return s.suffers(isSilent) }

// unfitToLead says why another member should lead. This one votes, acknowledges what its log takes, and serves reads.
func (s *Service) unfitToLead() error { return s.suffers(unfit) }

// unready is a fault that fails Ready.
func (s *Service) unready() error { return s.suffers(notReady) }

// refusesWrites says why a write that is begun here is refused at once: waiting does not mend it.
func (s *Service) refusesWrites() error { return s.suffers(refusesWrites) }

// refusesReads says why this member answers no linearizable read and gives its state to nobody.
func (s *Service) refusesReads() error { return s.suffers(refusesReads) }

// watchHealth looks once a second at what nothing else reports.
func (s *Service) watchHealth() {
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	behind, cut := 0, s.wal.bytes()
	var settling trouble
	for n := 0; ; n++ {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		s.checkStall()
		s.checkNames()
		s.checkFile()
		s.checkRemoved()
		s.learnVote()
		if s.refusesReads() != nil {
			s.hub.wake()
		}
		if s.store.meta().applied > 0 {
			if err := s.settleIn(); err != nil {
				settling.goesOn(s.log, "mark the id as a member's", err)
			}
		}
		s.tuneLog()
		if size := s.wal.bytes(); size > cut+s.snapshotAfter() || size < cut {
			if size > cut {
				s.running.Go(func() { await(s.ctx, s.raft.Load().Snapshot()) })
			}
			cut = size
		}
		if n%5 == 4 {
			s.compareStates()
		}
		// An install that passed this member's uncommitted entries leaves raft with a last index that is in no store: every
		// append is refused and the snapshot comes again and again.
		if behind++; !s.raftLost() {
			behind = 0
		} else if behind >= 3 {
			behind = 0
			s.restartRaft("it has stopped, or its last log index is beyond the log")
		}
	}
}

func (s *Service) checkStall() {
	s.checkHang()
	s.faults.ofLog(s.wal.failed())
}

func (s *Service) checkHang() {
	kind, err := s.hangs()
	other := faultStall
	if kind == faultStall {
		other = faultStallOfAll
	}
	s.faults.set(kind, err)
	s.faults.set(other, nil)
}

// checkNames finds files that were removed or replaced. That is for good: what has been written to them since is in no file that has a
// name. Only what SQLite keeps beside snap can be mended.
func (s *Service) checkNames() {
	for _, n := range []*nameWatch{s.names, s.wal.names, s.store.names} {
		for path, err := range n.look() {
			if s.store.beside(path) && s.store.names.holdAt(s.store.path) == nil {
				s.distrust(fmt.Errorf("%w: %w", errUnseated, err))
			} else if s.faults.first(faultGone) == nil {
				s.faults.set(faultGone, fmt.Errorf("%w: this member answers nothing any more: stop it, put its directory back as it was, or empty it and "+
					"start with a bootURL", err))
			}
		}
	}
}

// watchNames enters the names that neither the log nor the state has.
func (s *Service) watchNames() error {
	s.names = newNameWatch(s.log)
	ours := func() bool {
		ident, found, err := readIdentity(s.conf.Dir)
		if err != nil { // without a descriptor nobody can tell; what is damaged is not ours
			return !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat)
		}
		return found && ident == *s.ident()
	}
	return errors.Join(s.names.add(s.path("id"), ours), s.names.add(s.path(filepath.Join("wal", "lock")), nil))
}

// checkFile finds what another program, or the disk, did to snap.
func (s *Service) checkFile() {
	if changed, err := s.store.foreign(); err == nil && changed {
		s.distrust(errForeign)
	}
	if _, err := s.store.verified(); err != nil {
		s.distrust(err)
	}
	s.checkSchema()
}

// checkSchema: what an Open would refuse in snap is in Err while this member is alone. As soon as another voter has the state, it is
// rebuilt from there without it.
func (s *Service) checkSchema() {
	var strange error
	if p := s.store.strange.Load(); p != nil {
		strange = *p
	}
	s.faults.set(faultSchema, strange)
	if strange != nil && !s.onlyVoter() {
		s.distrust(errForeign)
	}
}

// onlyVoter, as far as this member has applied: nobody else is bound to have its state.
func (s *Service) onlyVoter() bool {
	v := voters(s.fsm.members.Load().config)
	return len(v) == 1 && string(v[0].ID) == s.ident().id
}

func (s *Service) raftLost() bool {
	r := s.raft.Load()
	if s.wal.busy() > 0 || s.wal.failed() != nil || s.faults.first(faultRemoved) != nil {
		return false
	}
	if r.State() == raft.Shutdown { // a restart that failed
		return true
	}
	if r.State() != raft.Follower {
		return false
	}
	last, _ := s.wal.last()
	return r.LastIndex() > max(last, s.fsm.applied.at())
}

// checkRemoved: a removed member is not told; raft just goes quiet. So when nobody leads, the others are asked, and only the
// applied list of a member of this cluster counts, never this member's own log, which may be older than itself.
func (s *Service) checkRemoved() {
	if id, _ := s.leader(); id != "" || s.faults.first(faultRemoved) != nil {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, checkInterval)
	defer cancel()
	var bases []string
	for _, m := range s.others() {
		bases = append(bases, baseURL(s.addressOf(m), s.conf.TLS))
	}
	if len(bases) == 0 && s.ident().cluster != "" { // admitted, and removed before anybody reached it
		for _, base := range s.bootBases() {
			bases = append(bases, base)
			if a, err := s.askBoot(ctx, base); err == nil && a.LeaderAddr != "" {
				bases = append(bases, baseURL(a.LeaderAddr, s.conf.TLS))
			}
		}
	}
	for _, base := range bases {
		_, err := s.peer.status(ctx, base)
		var r *refusal
		if errors.As(err, &r) && r.Code == codeRemoved {
			s.faults.set(faultRemoved, ErrRemoved)
			s.batch.stop(ErrRemoved)
			s.raftMu.Lock()
			s.endRaftLocked()
			s.raftMu.Unlock()
			s.changes.notify()
			return
		}
	}
}

// tuneLog keeps the tail of the log within the size of the state, whatever the size of its entries. While a snapshot is being sent it
// keeps more, for the receiver needs what comes after: as many bytes as the snapshot has and trailingMost, so that a way on which
// the snapshot goes faster than the writes come brings the receiver to the end, and a slower one does not fill the disk. Where space is
// tight it keeps the least, as a member that lags can be sent the state.
func (s *Service) tuneLog() {
	r := s.raft.Load()
	first, last := s.wal.bounds()
	if last == 0 || r == nil {
		return
	}
	state := int64(0)
	if info, err := os.Stat(s.path("snap")); err == nil {
		state = info.Size()
	}
	entry := s.wal.bytes()/int64(last-first+1) + 1
	keep := max(trailingMin, min(trailingLogs, uint64(min(max(trailingBytes, state), trailingMost)/entry)))
	switch {
	case s.members.sending():
		keep = max(keep, uint64((trailingMost+state)/entry))
	case s.conf.space(s.conf.Dir).tight():
		keep = trailingMin
	}
	c := r.ReloadableConfig()
	if c.TrailingLogs != keep {
		c.TrailingLogs = keep
		if err := r.ReloadConfig(c); err != nil {
			s.log.Error("set how much of the log is kept", "error", err)
		}
	}
}

// snapshotAfter is how many bytes the log grows by until there is a snapshot, behind which it can be cut.
func (s *Service) snapshotAfter() int64 {
	if s.conf.space(s.conf.Dir).tight() {
		return logSegment
	}
	return snapshotBytes
}

// compareStates fetches the others' (sum, chain) marks. The members hardly ever stand at one index, so each keeps the values at
// every markInterval entries. This member has diverged if a quorum of voters agrees on another value than its own.
func (s *Service) compareStates() {
	own, err := s.store.marks()
	if err != nil || len(own) == 0 || s.store.meta().applied == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, checkInterval)
	defer cancel()
	votes := make(map[uint64]map[string]int) // boundary → value → voters
	all := voters(s.fsm.members.Load().config)
	s.askOthers(ctx, all, func(_ int, a statusAnswer, err error) {
		if err != nil {
			return
		}
		for _, k := range a.Marks {
			if votes[k.Boundary] == nil {
				votes[k.Boundary] = make(map[string]int)
			}
			votes[k.Boundary][k.value()]++
		}
	})
	_, _, voter := s.server(s.ident().id)
	s.judge(own, votes, len(all), voter)
}

// judge compares this member's marks with the values that the other voters gave.
func (s *Service) judge(own []mark, votes map[uint64]map[string]int, all int, voter bool) {
	var dispute error
	for _, k := range own {
		mine := k.answer().value()
		values := votes[k.boundary]
		if voter && values != nil {
			values[mine]++
		}
		if len(values) == 0 || len(values) == 1 && values[mine] > 0 || values[mine] > all/2 {
			continue // who differs from a quorum says so itself
		}
		for value, n := range values {
			if value != mine && n > all/2 {
				s.faults.set(faultDiverged, fmt.Errorf("%w: the state at index %d differs from the one that %d of %d voters hold: it is "+
					"being rebuilt from the leader", ErrCorrupt, k.applied, n, all))
				s.wantRebuild()
				return
			}
		}
		if !voter {
			continue
		}
		dispute = fmt.Errorf("%w: the members' states differ at index %d, and no majority holds any of them: restore a backup, or remove "+
			"the members that are wrong", ErrCorrupt, k.applied)
	}
	s.faults.set(faultDispute, dispute)
}

func (k mark) answer() markAnswer {
	return markAnswer{Boundary: k.boundary, Applied: k.applied, Sum: k.kvSum, Chain: fmt.Sprintf("%x", k.chain)}
}

func (k markAnswer) value() string { return fmt.Sprintf("%d %x %s", k.Applied, k.Sum, k.Chain) }

// distrust stops this member's answers, because its state is not what it applied, and wakes the rebuild. It is called from
// apply and must not block.
func (s *Service) distrust(err error) {
	switch {
	case errors.As(err, new(misplaced)):
		s.faults.set(faultUnseated, err)
	case errors.Is(err, errUnseated):
		s.faults.set(faultUnseated, fmt.Errorf("%w; the file is being put in place anew; a program must not open the files of its own member: use "+
			"Backup", err))
	case errors.Is(err, errForeign): // also if a reader has met what it wrote, and taken it for damage
		s.faults.set(faultForeign, fmt.Errorf("%w: another program wrote to %s: this member serves nothing until its state is "+
			"rebuilt from the leader; use sqlite3 -readonly", ErrCorrupt, s.path("snap")))
	case s.faults.first(faultForeign, faultDiverged, faultState) == nil:
		s.faults.set(faultState, err)
	}
	s.wantRebuild()
}

func (s *Service) wantRebuild() {
	select {
	case s.rebuildCh <- struct{}{}:
	default:
	}
}

// rebuildLoop replaces a state that can't be trusted by the leader's, while raft keeps running: id, log and votes stay, so this
// member's promises hold and the quorum does not shrink.
func (s *Service) rebuildLoop() {
	for {
		select {
		case <-s.rebuildCh:
		case <-s.ctx.Done():
			return
		}
		s.fsm.paused.Store(true)
		var trouble trouble
		for backoff := 100 * time.Millisecond; ; backoff = min(2*backoff, 5*time.Second) {
			err := s.rebuild()
			if err == nil {
				break
			}
			trouble.goesOn(s.log, "the state is not rebuilt yet", err)
			select {
			case <-time.After(backoff):
			case <-s.ctx.Done():
				return
			}
		}
	}
}

// trust ends what was held against the state that has just been replaced. What is found from now on is about the new one. fsm.mu
// is held, so that apply finds nothing in between.
func (s *Service) trust() {
	select {
	case <-s.rebuildCh:
	default:
	}
	for _, k := range []faultKind{faultForeign, faultDiverged, faultState, faultUnseated} {
		s.faults.set(k, nil)
	}
	s.fsm.paused.Store(false)
	s.changes.notify() // watchers wait for it
}

func (s *Service) rebuild() error {
	if s.faults.first(faultUnseated) != nil {
		err := s.reseat()
		if !errors.Is(err, ErrCorrupt) {
			return err
		}
		if s.faults.first(faultForeign, faultDiverged, faultState) == nil { // a leader that is only unseated would not hand over
			s.faults.set(faultState, fmt.Errorf("%w: %w", errNotMended, err))
		}
		if s.onlyVoter() && s.faults.first(faultForeign) == nil {
			return fmt.Errorf("no other member has the state: restore a backup: %w", err)
		}
	}
	r := s.raft.Load()
	c := r.GetConfiguration().Configuration()
	if v := voters(c); len(v) == 1 && string(v[0].ID) == s.ident().id {
		return s.forgive()
	}
	if r.State() == raft.Leader {
		give(s.fitness)
		return errors.New("this member leads; another one must")
	}
	id, addr := s.leader()
	if id == "" || id == s.ident().id {
		return ErrNoLeader
	}
	in, err := s.receiveState(s.ctx, id, addr, s.path("snap.rebuild"))
	if err != nil {
		return err
	}
	defer os.Remove(in.path)
	s.fsm.mu.Lock()
	defer s.fsm.mu.Unlock()
	if at := s.store.meta().applied; in.meta.applied < at {
		return fmt.Errorf("the leader's state ends at %d and this member had applied %d", in.meta.applied, at)
	}
	if err := s.fsm.installLocked(in); err != nil {
		return err
	}
	if err := s.reseatIfDue(); err != nil {
		return err
	}
	s.trust()
	return nil
}

// reseat puts snap in place anew. What else is held against the state is the rebuild's, after it.
func (s *Service) reseat() error {
	s.fsm.mu.Lock()
	defer s.fsm.mu.Unlock()
	if err := s.reseatIfDue(); err != nil {
		return err
	}
	if errors.Is(s.faults.first(faultState), errNotMended) { // the copy is verified now
		s.faults.set(faultState, nil)
	}
	if s.faults.first(faultForeign, faultDiverged, faultState) != nil {
		s.wantRebuild()
		return nil
	}
	s.trust()
	return nil
}

// errNotMended: what this member has open is not what it has written, as far as the last try has shown.
var errNotMended = errors.New("snap can't be put in place anew")

// reseatIfDue: fsm.mu is held.
func (s *Service) reseatIfDue() error {
	if s.faults.first(faultUnseated) == nil {
		return nil
	}
	if err := s.store.reseat(); err != nil {
		return err
	}
	s.faults.set(faultUnseated, nil)
	return nil
}

// forgive: alone there is nobody to rebuild from. A foreign write is taken for what the operator wanted, with a loud word; a
// damaged row is not, for nobody knows what it was.
func (s *Service) forgive() error {
	if err := s.faults.first(faultState); err != nil && s.faults.first(faultForeign) == nil {
		return fmt.Errorf("no other member has the state: restore a backup: %w", err)
	}
	s.fsm.mu.Lock()
	defer s.fsm.mu.Unlock()
	s.log.Error("another program wrote to snap; this is the only member, so its contents are taken as they are", "file", s.path("snap"))
	if err := s.store.forgive(); err != nil {
		return err
	}
	if err := s.reseatIfDue(); err != nil {
		return err
	}
	if err := s.fsm.reload(); err != nil {
		return err
	}
	s.checkSchema()
	s.trust()
	return nil
}

// diagnose says in words why no write would be accepted now.
func (s *Service) diagnose(ctx context.Context) string {
	if err := s.faults.err(); err != nil {
		return err.Error()
	}
	if words := s.awaitsFounders(); words != "" {
		return words
	}
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	all := voters(s.raft.Load().GetConfiguration().Configuration())
	trouble, leaders := make([]string, len(all)), make([]string, len(all))
	failed := make([]error, len(all)) // what the calls of now have met
	own, leader := "", ""
	var wg sync.WaitGroup
	wg.Go(func() { own = s.askOwnAddress(ctx) })
	for i, m := range all {
		if string(m.ID) == s.ident().id {
			continue
		}
		wg.Go(func() {
			base := baseURL(s.addressOf(m), s.conf.TLS)
			a, err := s.peer.status(ctx, base)
			leaders[i] = a.LeaderAddr
			switch {
			case err != nil && caller.Err() != nil && s.reach.lately(string(m.ID)):
				// The caller's time has ended, and says nothing of this voter.
			case err != nil:
				failed[i] = explain(err, base)
				trouble[i] = fmt.Sprintf("%s: %v", peerName(m.ID, s.addressOf(m)), failed[i])
			case a.ID != string(m.ID):
				trouble[i] = fmt.Sprintf("at the address of %s there is now %s", peerName(m.ID, s.addressOf(m)), shortID(a.ID))
			case !a.Healthy:
				trouble[i] = fmt.Sprintf("%s has a fault of its own", peerName(m.ID, s.addressOf(m)))
			default:
				if err := s.peer.tryPost(ctx, string(m.ID), s.addressOf(m)); err != nil && (strays(err) || tooLarge(err)) {
					failed[i] = explain(err, base)
					trouble[i] = fmt.Sprintf("%s: %v", peerName(m.ID, s.addressOf(m)), failed[i])
				}
			}
		})
	}
	wg.Wait()
	id, addr := s.leader()
	var now error
	if i := slices.IndexFunc(all, func(m raft.Server) bool { return string(m.ID) == id }); i >= 0 {
		now = failed[i]
	}
	reach, mute := len(all), s.muteLeader(id, addr, now)
	var words []string
	for i, t := range trouble {
		if t != "" {
			reach--
		}
		if t != "" && (mute == "" || string(all[i].ID) != id) {
			words = append(words, t)
		}
		leader = cmp.Or(leader, leaders[i])
	}
	switch {
	case len(all) == 0:
		words = append(words, "the leader has not sent this member anything yet")
	case id == "" && leader == "":
		words = append(words, "no leader is elected")
	case id == "":
		words = append(words, fmt.Sprintf("the leader, %s, has not reached this member", leader))
	case len(words) == 0 && mute == "":
		words = append(words, "waiting for the leader at "+addr)
	}
	if own != "" && caller.Err() == nil {
		words = append(words, own)
	}
	if moved := s.refused.of(s.conf.Addr); moved != "" {
		words = append(words, moved)
	}
	if mute != "" {
		words = slices.Insert(words, 0, mute)
	}
	what := strings.Join(words, "; ")
	if len(all) == 0 || mute != "" && reach > len(all)/2 {
		return what
	}
	return fmt.Sprintf("%d of %d voters reachable, need %d: %s", reach, len(all), len(all)/2+1, what)
}

// muteLeader says that the leader is there and that this member can't call it; empty if it can, or the leader is this member. now is
// what a call of this moment has met, nil = nothing: it is said instead of what an earlier call met, unless its time has ended.
func (s *Service) muteLeader(id, addr string, now error) string {
	r := s.reach.of(id)
	if id == "" || id == s.ident().id || r.err == nil {
		return ""
	}
	why := r.reason()
	if now != nil && !errors.Is(now, context.DeadlineExceeded) && !errors.Is(now, context.Canceled) {
		why = shortText(now.Error())
	}
	return fmt.Sprintf("the leader at %s does not answer calls of this member: %s", peerName(id, addr), why)
}

// askOwnAddress calls this member as the others do: a handler that is not registered, or not for all that is sent, or a server that
// does not listen, shows here and nowhere else on this member.
func (s *Service) askOwnAddress(ctx context.Context) string {
	if s.conf.Addr == "" {
		return ""
	}
	base := baseURL(s.conf.Addr, s.conf.TLS)
	a, err := s.peer.status(ctx, base)
	if err == nil && a.ID != s.ident().id {
		return fmt.Sprintf("at this member's own address, %s, %s answers", s.conf.Addr, shortID(a.ID))
	}
	if err == nil {
		err = s.peer.tryPost(ctx, s.ident().id, s.conf.Addr)
	}
	if err != nil {
		return fmt.Sprintf("this member does not reach itself: %v", explain(err, base))
	}
	return ""
}

// shortID is enough of an id for a person to tell members apart.
func shortID(id string) string { return id[:min(8, len(id))] }
