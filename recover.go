package quorate

// What a directory holds when a member is opened, and how it comes back to life: new, to be joined, or with state. It owns
// the start rules (which pairs of file and log may go on together), bootstrap, and the start of raft. It decides before raft sees
// anything, because raft panics on a log with a hole. Control comes from db.go's open, goes to join.go for a directory that is to
// join a cluster, and does not return here, except that member.go or health.go may restart raft.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

const (
	heartbeatTimeout = 500 * time.Millisecond // also of elections; a follower that hears nothing for so long stands
	// Without an answer of a majority for so long a leader stops leading. A new leader's first answer must come in it, which at half of it
	// failed with ways of 200 ms each way. Another leader comes after 1.05 s in the mean of 30 cut-offs, and after 1.08 at half of it.
	leaseTimeout  = heartbeatTimeout
	commitTimeout = 10 * time.Millisecond // how late an idle follower learns of the last commit
	trailingLogs  = 10240                 // entries kept behind the snapshot for a member that comes back
	trailingMin   = 512
	trailingBytes = 64 << 20  // at most; or the size of the state, for a snapshot of it would be no less to send
	trailingMost  = 256 << 20 // whatever the size of the state
	snapshotEvery = 8192      // entries
	snapshotBytes = 64 << 20
)

// identify reads who this member is, or makes it up before anything else exists.
func (s *Service) identify() error {
	ident, found, err := readIdentity(s.conf.Dir)
	if err != nil {
		return err
	}
	if !found {
		for _, name := range []string{"snap", filepath.Join("wal", "wal-meta.db")} {
			if _, err := os.Lstat(filepath.Join(s.conf.Dir, name)); err == nil {
				return fmt.Errorf("%w: %s is there and the file id is missing: put id back, or move the directory away and "+
					"start empty with a bootURL (or with Restore, if no other member is left)", ErrCorrupt, name)
			}
		}
		ident = identity{id: newID(), intent: intentJoin}
		if s.conf.Join == "" && len(s.conf.Bootstrap) == 0 {
			ident.intent, ident.cluster = intentBootstrap, newID()
		}
		if err := writeIdentity(s.conf.Dir, ident); err != nil {
			return err
		}
	}
	s.identity.Store(&ident)
	list, _ := os.ReadDir(s.path("wal"))
	segments := slices.ContainsFunc(list, func(e os.DirEntry) bool { return filepath.Ext(e.Name()) == ".wal" }) // made after the meta file
	if _, err := os.Lstat(s.path(filepath.Join("wal", "wal-meta.db"))); err != nil && (ident.intent == intentMember || segments) {
		return fmt.Errorf("%w: this directory belongs to a member, and its log in wal is gone, and with it the member's votes and "+
			"promises: put wal back, or empty the directory and start with a bootURL (or with Restore from its snap, if no other "+
			"member is left)", ErrCorrupt)
	}
	return nil
}

// settleIn marks the id as that of a member with state. Without its state such an id is refused: it would begin anew what it
// has promised to the others, or to its callers.
func (s *Service) settleIn() error {
	if s.ident().intent == intentMember {
		return nil
	}
	return s.changeIdentity(func(ident *identity) { ident.intent = intentMember })
}

// ident is who this member is. What it points to is replaced, never changed.
func (s *Service) ident() *identity { return s.identity.Load() }

// changeIdentity writes the id file anew, and then this member is who it says.
func (s *Service) changeIdentity(change func(*identity)) error {
	s.identMu.Lock()
	defer s.identMu.Unlock()
	ident := *s.ident()
	change(&ident)
	if err := writeIdentity(s.conf.Dir, ident); err != nil {
		return err
	}
	s.identity.Store(&ident)
	return nil
}

func (s *Service) path(name string) string { return filepath.Join(s.conf.Dir, name) }

// openState opens the log and the file, and decides whether they may go on together.
func (s *Service) openState(ctx context.Context) error {
	entries, err := os.ReadDir(s.conf.Dir)
	if err != nil {
		return err
	}
	if err := finishMending(s.path("snap")); err != nil {
		return err
	}
	for _, e := range entries { // what an install or a restore left that did not end was never acknowledged
		if leftover(e.Name()) {
			if err := os.Remove(s.path(e.Name())); err != nil {
				return err
			}
		}
	}
	s.ballast = newBallast(s.path("wal"), s.log)
	s.wal, err = openLog(logOptions{
		dir: s.path("wal"), vfs: s.conf.vfs, segmentSize: s.conf.segment, log: s.log,
		leader: func() bool { r := s.raft.Load(); return r != nil && r.State() == raft.Leader },
		fault:  s.faults.ofLog,
		resent: true,
		stays:  func() bool { return !s.replaced.Load() },
		room:   s.spaceNeeded,
		ahead:  s.peer.sendAhead,
	})
	if err != nil {
		return err
	}
	if err := s.recoverFile(ctx); err != nil {
		return err
	}
	s.store, err = openStore(storeOptions{path: s.path("snap"), memory: s.conf.Memory, log: s.log, lone: true, space: s.conf.space})
	if err != nil {
		return err
	}
	s.store.damaged, s.store.stop = s.distrust, s.ctx.Done()
	s.hub = newHub(func() uint64 { return s.store.meta().revision })
	s.store.published, s.store.replaced = s.hub.publish, s.hub.replaced
	if s.fsm, err = newFSM(s.store, s.log); err != nil {
		return err
	}
	if strange := s.store.strange.Load(); strange != nil && !s.onlyVoter() {
		return *strange
	}
	s.checkSchema()
	if err := s.watchNames(); err != nil {
		return err
	}
	s.fsm.fault = func(err error) {
		if isFull(err) {
			s.spaceNeeded()
		}
		s.faults.ofApply(err)
	}
	s.fsm.distrust = s.distrust
	s.snaps = &snapshotStore{fsm: s.fsm, path: s.path("snap.incoming")}
	return s.startRule()
}

// leftover: of an install, a rebuild, a restore or a copy. Nothing else is ours to remove, whatever it is called.
func leftover(name string) bool {
	for _, prefix := range []string{"snap.incoming", "snap.rebuild", "snap.restore", "snap.source", "snap.copy-"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// startRule compares the file (applied index A, index of the last install I) with the log (first F, last L).
func (s *Service) startRule() error {
	m := s.store.meta()
	first, last := s.wal.bounds()
	term, ok := s.wal.termAt(m.applied)
	otherWay := ok && m.applied > 0 && term != m.term
	switch {
	case otherWay && m.applied == m.installed:
		// An install passed entries that were never committed: no quorum can hold what follows an entry that another one has
		// replaced. It had ended and the log was not yet emptied.
		return s.wal.reset()
	case otherWay:
		return fmt.Errorf("%w: snap has applied entry %d of term %d, and in wal that entry is of term %d: the two are not of one member; "+
			"move the directory away and start empty with a bootURL", ErrCorrupt, m.applied, m.term, term)
	case m.applied == 0 && last == 0:
		return nil
	case last >= m.applied && first <= m.applied+1:
		return nil
	case m.applied == m.installed && last < m.applied:
		// An install had ended and the log was not yet emptied: every entry in it is part of the state.
		return s.wal.reset()
	case last < m.applied:
		return fmt.Errorf("%w: snap has applied entry %d and wal ends at %d: the end of the log was lost, and with it this member's "+
			"promises; move the directory away and start empty with a bootURL (or with Restore from its snap, if no other member is left)",
			ErrCorrupt, m.applied, last)
	default:
		return fmt.Errorf("%w: snap has applied entry %d and wal begins at %d: the entries between are lost; move the directory away "+
			"and start empty with a bootURL", ErrCorrupt, m.applied, first)
	}
}

// recoverFile brings back a file that is missing beside a log that is not new. A log that goes back to its beginning makes it
// anew by itself; otherwise it comes from another member, and alone the directory is refused: an empty state under this
// member's id would break the promises that the id has made.
func (s *Service) recoverFile(ctx context.Context) error {
	if _, err := os.Stat(s.path("snap")); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	first, last := s.wal.bounds()
	term, err := s.currentTerm(ctx)
	if err != nil {
		return err
	}
	if last == 0 && s.ident().intent != intentMember && term <= 1 || last > 0 && first == 1 {
		return nil
	}
	s.log.Warn("snap is missing: fetching the state from another member", "first log index", first, "last log index", last)
	return s.fetchFile(ctx, first)
}

func (s *Service) currentTerm(ctx context.Context) (uint64, error) {
	return besideRaft(ctx, s.wal, func() (uint64, error) { return s.wal.GetUint64([]byte("CurrentTerm")) })
}

// fetchFile asks every address that the log or the caller knows for the state, again while the others have no leader.
func (s *Service) fetchFile(ctx context.Context, first uint64) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	bases, err := besideRaft(ctx, s.wal, s.loggedBases)
	if err != nil {
		return err
	}
	for _, base := range s.bootBases() {
		if !slices.Contains(bases, base) {
			bases = append(bases, base)
		}
	}
	err = errors.New("nothing in wal or in the bootURL names one: give the address of one as bootURL")
	var missing trouble
	for backoff := resendMin; ; backoff = min(2*backoff, resendMax) {
		electing := false
		for _, base := range bases {
			if err = s.fetchFrom(ctx, base, first); err == nil {
				return nil
			}
			electing = electing || errors.Is(err, ErrNoLeader)
			missing.goesOn(s.log, "no state from a member", err, "address", base)
		}
		if electing {
			select {
			case <-time.After(backoff):
				continue
			case <-ctx.Done():
			}
		}
		return fmt.Errorf("%w: snap is missing, wal begins at entry %d, and no other member gave the state: put snap back, or start when "+
			"the others are up, or move the directory away and start empty with a bootURL (%v)", ErrCorrupt, first, err)
	}
}

// loggedBases are the base URLs of the others in the configurations of the log, the newest first.
func (s *Service) loggedBases() (list []string, err error) {
	seen := map[string]bool{s.ident().id: true}
	first, last := s.wal.bounds()
	for i := last; i >= first && i > 0; i-- {
		var l raft.Log
		if err := s.wal.GetLog(i, &l); err != nil {
			return nil, err
		}
		if l.Type != raft.LogConfiguration {
			continue
		}
		for _, m := range raft.DecodeConfiguration(l.Data).Servers {
			if !seen[string(m.ID)] {
				seen[string(m.ID)] = true
				list = append(list, baseURL(string(m.Address), s.conf.TLS))
			}
		}
	}
	return list, nil
}

// fetchFrom takes the state from the leader that a member names. It must reach at least to where the log begins.
func (s *Service) fetchFrom(ctx context.Context, base string, first uint64) error {
	a, err := s.peer.status(ctx, base)
	if err != nil {
		return explain(err, base)
	}
	if a.LeaderID == "" || a.LeaderID == s.ident().id {
		return ErrNoLeader
	}
	in, err := s.receiveState(ctx, a.LeaderID, a.LeaderAddr, s.path("snap.rebuild"))
	if err != nil {
		return err
	}
	if in.meta.applied+1 < first {
		os.Remove(in.path)
		return fmt.Errorf("the state of %s ends at %d", a.LeaderAddr, in.meta.applied)
	}
	return s.placeFile(in.path)
}

// placeFile makes a received state this member's file: marked as an install, so that a log that ends before it is no hole.
func (s *Service) placeFile(path string) error {
	st, err := openStore(storeOptions{path: path, memory: -1, log: s.log})
	if err != nil {
		return err
	}
	tx, err := st.begin()
	if err == nil {
		tx.meta.installed = tx.meta.applied
		tx.commit()
		err = st.barrier()
	}
	if err := errors.Join(err, st.close()); err != nil {
		return err
	}
	if err := os.Rename(path, s.path("snap")); err != nil {
		return err
	}
	return syncDir(s.conf.Dir)
}

// receiveState fetches the leader's state into a verified file.
func (s *Service) receiveState(ctx context.Context, id, addr, path string) (*incoming, error) {
	body, err := s.peer.state(ctx, id, addr)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	m, err := receive(path, body)
	if err != nil {
		return nil, err
	}
	return &incoming{path: path, meta: m}, nil
}

// enter makes a directory without state into a member: it begins a cluster or joins one, as its id says.
func (s *Service) enter(ctx context.Context) error {
	_, last := s.wal.bounds()
	m := s.store.meta()
	if m.applied > 0 || last > 0 {
		return s.returning()
	}
	if s.ident().intent == intentMember {
		return fmt.Errorf("%w: this directory belongs to a member, and neither snap nor wal holds anything: put them back, or empty "+
			"the directory and start with a bootURL", ErrCorrupt)
	}
	term, err := s.currentTerm(ctx)
	if err != nil {
		return err
	}
	switch {
	case s.ident().intent == intentBootstrap && term > 1: // raft has run here, and there were entries then
		return fmt.Errorf("%w: this member has voted in term %d, and neither snap nor wal holds anything: put them back, or empty the directory and "+
			"start with a bootURL", ErrCorrupt, term)
	case len(s.conf.Bootstrap) > 0:
		return s.beginFounding()
	case s.ident().intent == intentJoin && s.conf.Join == "":
		return fmt.Errorf("%w: this directory began by joining a cluster and holds no state yet: give the bootURL of that cluster, or the "+
			"founders' addresses as Bootstrap (or empty the directory to begin a new cluster)", ErrInvalid)
	case s.ident().intent == intentJoin:
		return s.join(ctx)
	case s.conf.Join != "":
		// It was about to begin a cluster and never did. An id is never used for two things, so it becomes another member.
		if err := s.changeIdentity(func(ident *identity) { *ident = identity{id: newID(), intent: intentJoin} }); err != nil {
			return err
		}
		return s.join(ctx)
	}
	return s.bootstrap(ctx)
}

// returning checks a directory with state against how it is opened now.
func (s *Service) returning() error {
	if s.ident().cluster == "" {
		return fmt.Errorf("%w: the directory holds state and id names no cluster", ErrCorrupt)
	}
	if s.conf.Join != "" {
		s.log.Info("Join is ignored, for the directory holds the state of a member already", "join", s.conf.Join)
	}
	if n := len(s.fsm.members.Load().config.Servers); s.conf.Addr == "" && n > 1 {
		return fmt.Errorf("%w: this directory is one of %d members and can't be opened without Addr: give the address at which the "+
			"others reach it", ErrInvalid, n)
	}
	return s.settleIn()
}

// bootstrap writes the first entries: this member is the only voter. It is what raft.BootstrapCluster does, made so that it can
// be done again after a crash between its two steps.
func (s *Service) bootstrap(ctx context.Context) error {
	addr := s.conf.Addr
	if addr == "" {
		addr = placeholderAddr(s.ident().id)
	}
	entries := firstEntries(*s.ident(), addr)
	_, err := besideRaft(ctx, s.wal, func() (any, error) {
		if err := s.wal.SetUint64([]byte("CurrentTerm"), 1); err != nil {
			return nil, err
		}
		return nil, s.wal.StoreLogs(entries)
	})
	if err != nil {
		return err
	}
	return s.settleIn()
}

// A member without a network stands in the configuration with an address that nobody can call.
func placeholderAddr(id string) string { return "local:" + id }

func placeholder(addr string) bool { return len(addr) > 6 && addr[:6] == "local:" }

// raftConfig is what we ask of raft, with what was measured for it.
func (s *Service) raftConfig() *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(s.ident().id)
	c.Logger = hclogger(s.log.With("in", "raft"))
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = heartbeatTimeout, heartbeatTimeout, leaseTimeout
	c.CommitTimeout = commitTimeout
	c.MaxAppendEntries = 64
	c.TrailingLogs = trailingLogs
	c.SnapshotThreshold, c.SnapshotInterval = snapshotEvery, 5*time.Second // a snapshot costs one sync, whatever the size
	c.BatchApplyCh = false                                                 // with it, futures are never answered at shutdown (hashicorp/raft#498)
	c.ShutdownOnRemove = false
	c.NoSnapshotRestoreOnStart = true // the file is the state: there is nothing to restore
	c.NoLegacyTelemetry = true
	return c
}

// startRaft starts raft on what is open, at first or again, and watches whom it takes for the leader.
func (s *Service) startRaft(ctx context.Context) error {
	s.raftMu.Lock()
	defer s.raftMu.Unlock()
	return s.startRaftLocked(ctx)
}

func (s *Service) startRaftLocked(ctx context.Context) error {
	s.starts.Store(s.starts.Load() | 1)
	trans := s.peer.transport()
	r, err := besideRaft(ctx, s.wal, func() (*raft.Raft, error) {
		return raft.NewRaft(s.raftConfig(), s.fsm, s.wal, s.wal, s.snaps, trans)
	})
	if err != nil {
		return fmt.Errorf("start raft: %w", err)
	}
	seen := make(chan raft.Observation, 64)
	r.RegisterObserver(raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			return true
		}
		return false
	}))
	s.running.Go(func() {
		for {
			select {
			case <-seen:
				id, _ := s.leader()
				s.reign.since(id)
				s.changes.notify()
			case <-trans.ctx.Done():
				return
			}
		}
	})
	s.begun.Store(monotonic())
	s.raft.Store(r)
	s.starts.Add(1)
	s.ended = nil
	if v := voters(r.GetConfiguration().Configuration()); len(v) == 1 && string(v[0].ID) == s.ident().id {
		// The only voter needs no election timeout: it would wait for nobody.
		if err := trans.stand(); err != nil {
			s.log.Warn("this only voter stands for election a little later", "error", err)
		}
	}
	return nil
}

// awaitOwnLog: whoever opens an embedded store again after a crash finds in it what was acknowledged, which may be in the log only.
// A cluster of several has to elect a leader first, and that is not waited for.
func (s *Service) awaitOwnLog(ctx context.Context) {
	r := s.raft.Load()
	last, _ := s.wal.last()
	if v := voters(r.GetConfiguration().Configuration()); len(v) != 1 || string(v[0].ID) != s.ident().id || last <= s.store.meta().applied {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, replayPatience)
	defer cancel()
	for s.store.meta().term != r.CurrentTerm() && ctx.Err() == nil {
		wait, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		s.fsm.applied.wait(wait, s.fsm.applied.at()+1)
		cancel()
	}
}

// besideRaft calls what uses the log as raft does in a goroutine of its own: a store call that meets a disk fault parks its
// goroutine and ends it at close, and that must not be the caller's.
func besideRaft[T any](ctx context.Context, l *logStore, f func() (T, error)) (T, error) {
	type ended struct {
		v   T
		err error
	}
	done := make(chan ended, 1)
	go func() {
		v, err := f()
		done <- ended{v, err}
	}()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var none T
	for {
		select {
		case e := <-done:
			return e.v, e.err
		case <-tick.C:
			// A full disk may have space again, so that is waited for, as long as ctx lasts.
			if err := l.failed(); err != nil && (!passing(err) || ctx.Err() != nil) {
				return none, err
			}
		case <-l.closed:
			return none, ErrClosed
		}
	}
}

// restartRaft gives raft a new start on the same files, in this process: its memory of the log has left the log (hashicorp/raft#697).
func (s *Service) restartRaft(why string) {
	s.raftMu.Lock()
	defer s.raftMu.Unlock()
	if s.ctx.Err() != nil {
		return
	}
	s.log.Warn("restarting raft in this process", "why", why)
	select {
	case <-s.endRaftLocked():
	case <-s.ctx.Done():
		return
	}
	err := s.startRaftLocked(s.ctx)
	if err != nil {
		err = fmt.Errorf("raft does not start again: %w", err)
	}
	s.faults.set(faultRaft, err) // and then it is tried again
	s.changes.notify()
}

// endRaftLocked begins the end of raft, once: a second Shutdown would not wait. The channel is closed when raft's goroutines
// have ended. raftMu is held.
func (s *Service) endRaftLocked() <-chan struct{} {
	if s.ended == nil {
		ended := make(chan struct{})
		s.ended = ended
		future := s.raft.Load().Shutdown()
		go func() {
			future.Error()
			close(ended)
		}()
	}
	return s.ended
}

func voters(c raft.Configuration) []raft.Server {
	var list []raft.Server
	for _, m := range c.Servers {
		if m.Suffrage == raft.Voter {
			list = append(list, m)
		}
	}
	return list
}
