package quorate

// Raft's state machine: committed entries become transactions on the store, whose file follows and is raft's snapshot. It
// owns what an operation means. Control comes from raft (ApplyBatch, Snapshot, Restore on its one goroutine) and goes on
// to sqlstore.go; answers go to the batcher through the delivered function. It knows nothing of the network and reads no
// clock and no randomness: apply is a function of the rows and the entry.
//
// Invariants, cited by number where the code relies on them:
//
//	(1) A row and the index of the entry that caused it get into the file in one transaction: it is the state at its index.
//	(2) Apply is a function of (rows, entry) and of nothing else, so all members that applied an index hold equal rows.
//	(3) A storage error is never an answer to a caller: what could not be written is tried again, and apply waits, or stops.
//	(4) Raft truncates its log only up to an index that a synced commit of the file covers.
//	(5) The directory holds the old state or the new one at every instant; an install is one transaction, or one rename (seat.go).
//	(6) A batch takes effect at most once, however often it is in the log.
//	(7) Publish order: tail, memory, applied index, answers. Whoever has its answer reads its effect, in the file after a sync.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

const (
	maxSessions  = 256     // kept by the state; the one least recently used by log index goes first
	markInterval = 1 << 10 // entries between two (sum, chain) marks that members compare
	decodeFrom   = 4 << 10 // bytes of an entry that is decoded before it is committed: a dozen of small transactions
)

type fsm struct {
	store *store
	log   *slog.Logger

	delivered func(session, seq uint64, o outcome) // an entry of some session was applied here
	fault     func(error)                          // apply can't go on for now; nil: it does again
	distrust  func(error)                          // the rows are not what was applied: rebuild
	closing   chan struct{}                        // closed by Close: apply answers nothing any more

	mu       sync.Mutex // guards the fields below; held over a whole ApplyBatch, Restore or rebuild: one of them changes the state at a time
	sessions map[uint64]*session
	stale    bool      // an install changed the rows, and the fields here are not read anew yet
	incoming *incoming // a received and verified snapshot that Restore will install; set by the sink

	ahead   decoder // of what this member has proposed
	members atomic.Pointer[membership]
	applied watermark
	began   atomic.Int64 // unix nanoseconds on the monotonic clock when the apply in progress began; 0 = none
	paused  atomic.Bool  // a rebuild is coming: apply waits for it, and that is no stall
}

// incoming is a snapshot file that was received whole and found right.
type incoming struct {
	path string
	meta meta
}

// A session is the memory of one member incarnation's batches, so that a batch that is sent twice applies once.
// Source: Ongaro, "Consensus: Bridging Theory and Practice", section 6.3, with gaps and any order allowed.
type session struct {
	nonce   [16]byte
	acked   uint64 // the sender has the answers of every seq up to here
	last    uint64 // index of the last entry that used it
	results map[uint64]stored
}

// stored is the answer to one batch that its sender may still ask for.
type stored struct {
	sum     [8]byte
	results []result
}

// membership is what apply has learned of who may take part. It is replaced, never changed.
type membership struct {
	config  raft.Configuration
	index   uint64 // of the entry that set config
	allowed map[string]bool
	removed map[string]uint64
}

func newFSM(st *store, log *slog.Logger) (*fsm, error) {
	f := &fsm{
		store: st, log: log, closing: make(chan struct{}),
		delivered: func(uint64, uint64, outcome) {}, fault: func(error) {}, distrust: func(error) {},
	}
	st.uneasy, st.eased = f.blame, f.calm
	return f, f.reload()
}

// reload takes sessions and membership from the store, after an open or an install. mu is held, or nobody else is there yet.
func (f *fsm) reload() error {
	rows, err := f.store.sessions()
	if err != nil {
		return err
	}
	f.sessions = make(map[uint64]*session, len(rows))
	for _, r := range rows {
		s, err := decodeSession(r)
		if err != nil {
			return err
		}
		f.sessions[r.id] = s
	}
	m := &membership{allowed: make(map[string]bool)}
	list, err := f.store.allowed()
	if err != nil {
		return err
	}
	for _, addr := range list {
		m.allowed[addr] = true
	}
	if m.removed, err = f.store.removed(); err != nil {
		return err
	}
	meta := f.store.meta()
	m.index = meta.configIndex
	if len(meta.config) > 0 {
		m.config = raft.DecodeConfiguration(meta.config)
	}
	f.members.Store(m)
	f.applied.advance(meta.applied)
	f.stale = false
	return nil
}

// openedAfter tells whether a session was opened by an entry behind this index.
func (f *fsm) openedAfter(index uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range f.sessions {
		if id > index {
			return true
		}
	}
	return false
}

// Apply exists for the interface; raft calls ApplyBatch.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch applies committed entries in one transaction. Each answer is an outcome, or nil when the member is
// closing or the entry was part of the state already: then nothing is known here, and the sender asks again.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		f.began.Store(monotonic())
		answers, err := f.tryApply(logs)
		f.began.Store(0)
		if err == nil {
			return answers
		}
		if !f.recovers(err, wait) {
			return make([]any, len(logs))
		}
	}
}

// recovers waits until an apply that failed may be tried again; false when the member closes first.
func (f *fsm) recovers(err error, wait time.Duration) bool {
	switch {
	case errors.Is(err, errAgain):
		wait = time.Millisecond
	case errors.Is(err, errPaused), errors.Is(err, errUnseated):
		wait = min(wait, 50*time.Millisecond)
	case errors.Is(err, errLate): // this member closes
	case isIO(err): // the store remembers it, and no try after it can succeed
		f.fault(fmt.Errorf("apply has stopped, restart this member once the disk is whole: %w", err))
		<-f.closing
		return false
	case errors.Is(err, errForeign), errors.Is(err, ErrCorrupt):
		f.paused.Store(true)
		f.distrust(err)
	default: // no space, or another program holds the file's lock
		f.fault(fmt.Errorf("apply waits and tries again: %w", err))
	}
	select {
	case <-f.closing:
		return false
	case <-time.After(wait):
		return true
	}
}

// errPaused: the rows can't be trusted until they are rebuilt, so nothing is applied to them and nobody is answered from them.
var errPaused = errors.New("apply waits for the state to be rebuilt")

func (f *fsm) tryApply(logs []*raft.Log) ([]any, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.closing:
		return make([]any, len(logs)), nil
	default:
	}
	if f.paused.Load() {
		return nil, errPaused
	}
	if f.stale {
		if err := f.reload(); err != nil {
			return nil, err
		}
	}
	tx, err := f.store.begin()
	if err != nil {
		return nil, err
	}
	a := applying{fsm: f, tx: tx, touched: make(map[uint64]*session)}
	answers := make([]any, len(logs))
	for i, l := range logs {
		if l.Index <= tx.meta.applied {
			continue // raft replays what the file holds already
		}
		o, err := a.entry(l)
		if err != nil {
			tx.rollback()
			return nil, fmt.Errorf("apply entry %d: %w", l.Index, err)
		}
		answers[i] = o
	}
	if err := tx.sound(); err != nil {
		tx.rollback()
		return nil, err
	}
	a.keepSessions()
	tx.commit()
	f.calm()
	a.publish()
	for _, d := range a.deliveries {
		f.delivered(d.session, d.seq, d.outcome)
	}
	return answers, nil
}

// applying is one ApplyBatch under way: what it changed beside the rows, published after the commit.
type applying struct {
	fsm        *fsm
	tx         *storeTx
	touched    map[uint64]*session // by id; nil = deleted
	members    *membership         // nil = unchanged
	deliveries []delivery
}

type delivery struct {
	session, seq uint64
	outcome      outcome
}

// publish makes the committed state visible (7); the store has published rows and meta.
func (a *applying) publish() {
	for id, s := range a.touched {
		if s == nil {
			delete(a.fsm.sessions, id)
		} else {
			a.fsm.sessions[id] = s
		}
	}
	if a.members != nil {
		a.fsm.members.Store(a.members)
	}
	a.fsm.applied.advance(a.fsm.store.meta().applied)
}

func (a *applying) entry(l *raft.Log) (outcome, error) {
	a.mark(l.Index)
	o := outcome{kind: outcomeDone, index: l.Index, term: l.Term}
	var sum [sha256.Size]byte
	var err error
	switch l.Type {
	case raft.LogCommand:
		d := a.fsm.ahead.take(l.Data)
		sum = d.sum
		o, err = a.command(l, d)
	case raft.LogConfiguration:
		a.configuration(l)
		fallthrough
	default:
		sum = sha256.Sum256(l.Data)
	}
	if err != nil {
		return outcome{}, err
	}
	m := &a.tx.meta
	m.applied, m.term = l.Index, l.Term
	m.chain = nextChain(m.chain, l, sum, o)
	return o, nil
}

// nextChain covers everything that the entries have ever done, the answers included, so that two members whose history
// differs anywhere differ here. data is the sum of the entry's bytes.
func nextChain(chain [32]byte, l *raft.Log, data [sha256.Size]byte, o outcome) [32]byte {
	b := make([]byte, 0, 256+4*len(o.results))
	b = append(b, chain[:]...)
	b = binary.AppendUvarint(b, l.Index)
	b = append(b, byte(l.Type))
	b = append(b, data[:]...)
	b = appendOutcome(b, o)
	return sha256.Sum256(b)
}

// mark records sum and chain of the last entry at or below each multiple of markInterval, before the next one changes them.
func (a *applying) mark(next uint64) {
	m := &a.tx.meta
	boundary := (next - 1) / markInterval * markInterval
	if m.applied != 0 && boundary >= m.applied && boundary != 0 {
		a.tx.mark(mark{boundary: boundary, applied: m.applied, kvSum: m.kvSum, chain: m.chain})
	}
}

func (a *applying) command(l *raft.Log, d decoded) (outcome, error) {
	o := outcome{kind: outcomeInvalid, index: l.Index, term: l.Term}
	switch {
	case errors.Is(d.err, ErrFormat): // a newer member knows what it means, so no answer of this one is right
		return o, d.err
	case d.err != nil:
		return o, nil // the same on every member (2)
	}
	e := d.entry
	switch e.kind {
	case entryBatch:
		return a.batch(o, e.batch)
	case entryOpen:
		return a.open(o, e.nonce)
	case entryTermStart:
		o.kind = outcomeDone
	case entryRaise:
		o.kind = outcomeDone
		if e.raise >= a.tx.meta.format && e.raise <= entryFormat {
			a.tx.raise(e.raise, e.history)
		}
	}
	return o, nil
}

// open begins a session; its number is the index of this entry. The same nonce again is a resent request.
func (a *applying) open(o outcome, nonce [16]byte) (outcome, error) {
	o.kind = outcomeDone
	var oldest uint64
	live := 0
	for id, s := range a.allSessions() {
		if s.nonce == nonce {
			o.session = id
			return o, nil
		}
		live++
		if oldest == 0 || s.last < a.session(oldest).last {
			oldest = id
		}
	}
	if live >= maxSessions {
		a.touched[oldest] = nil
	}
	a.touched[o.index] = &session{nonce: nonce, last: o.index, results: make(map[uint64]stored)}
	o.session = o.index
	return o, nil
}

// allSessions is the view of this transaction.
func (a *applying) allSessions() map[uint64]*session {
	all := make(map[uint64]*session, len(a.fsm.sessions)+1)
	for id := range a.fsm.sessions {
		if s := a.session(id); s != nil {
			all[id] = s
		}
	}
	for id, s := range a.touched {
		if s != nil {
			all[id] = s
		}
	}
	return all
}

// session is the session as this transaction sees it, nil if there is none.
func (a *applying) session(id uint64) *session {
	if s, ok := a.touched[id]; ok {
		return s
	}
	return a.fsm.sessions[id]
}

// touch is session, for writing.
func (a *applying) touch(id uint64) *session {
	if s, ok := a.touched[id]; ok {
		return s
	}
	s := a.fsm.sessions[id]
	if s == nil {
		return nil
	}
	c := &session{nonce: s.nonce, acked: s.acked, last: s.last, results: make(map[uint64]stored, len(s.results)+1)}
	for seq, r := range s.results {
		c.results[seq] = r
	}
	a.touched[id] = c
	return c
}

// batch applies the transactions of one batch once (6).
func (a *applying) batch(o outcome, b batch) (outcome, error) {
	o.kind, o.session = outcomeGone, b.session
	defer func() { a.deliveries = append(a.deliveries, delivery{b.session, b.seq, o}) }()
	s := a.touch(b.session)
	if s == nil {
		return o, nil
	}
	s.last = o.index
	if b.acked > s.acked {
		s.acked = b.acked
		for seq := range s.results {
			if seq <= s.acked {
				delete(s.results, seq)
			}
		}
	}
	if b.seq <= s.acked {
		o.kind = outcomeStale
		return o, nil
	}
	o.kind = outcomeDone
	if was, ok := s.results[b.seq]; ok {
		if was.sum != b.sum {
			// A sender of ours never does this. Like any bytes that mean nothing it has no effect, on every member alike:
			// stopping would stop all of them, and again at every start.
			a.fsm.log.Error("two different batches have one number; the second has no effect", "session", b.session, "seq", b.seq)
			o.kind = outcomeInvalid
			return o, nil
		}
		o.results = was.results
		return o, nil
	}
	o.results = make([]result, len(b.txs))
	for i, tx := range b.txs {
		r, err := a.transaction(tx)
		if err != nil {
			return o, err
		}
		o.results[i] = r
	}
	s.results[b.seq] = stored{sum: b.sum, results: o.results}
	return o, nil
}

// transaction checks every condition against the state before it, and then carries out every effect.
func (a *applying) transaction(tx transaction) (result, error) {
	for i, o := range tx {
		if !o.kind.condition() {
			continue
		}
		old, ok, err := a.tx.row(o.key)
		if err != nil {
			return result{}, err
		}
		if !holds(o, old, ok) {
			return result{status: txUnsatisfied, revision: a.tx.meta.revision, at: uint64(i), have: old.version}, nil
		}
	}
	for _, o := range tx {
		if err := a.effect(o); err != nil {
			return result{}, err
		}
	}
	a.tx.endChanges()
	return result{revision: a.tx.meta.revision}, nil
}

// holds tells whether a condition is true of the row, which is zero if it is absent (!ok).
func holds(o op, r row, ok bool) bool {
	switch o.kind {
	case opIfExists:
		return ok
	case opIfNotExists:
		return !ok
	case opIfValue:
		return ok && r.value == string(o.value)
	case opIfNotValue:
		return !ok || r.value != string(o.value)
	case opIfVersion:
		return r.version == o.version
	default: // opIfNotVersion; decodeEntry lets no other through
		return r.version != o.version
	}
}

func (a *applying) effect(o op) error {
	switch o.kind {
	case opSet:
		a.tx.meta.revision++
		return a.tx.set(o.key, row{value: string(o.value), version: a.tx.meta.revision})
	case opDelete:
		_, ok, err := a.tx.row(o.key)
		if err != nil || !ok {
			return err
		}
		a.tx.meta.revision++
		return a.tx.delete(o.key, a.tx.meta.revision)
	case opAllow:
		m := a.changeMembers()
		m.allowed[o.key] = true
		a.tx.allow(o.key)
	case opDisallow:
		m := a.changeMembers()
		delete(m.allowed, o.key)
		a.tx.disallow(o.key)
	}
	return nil
}

func (a *applying) changeMembers() *membership {
	if a.members == nil {
		old := a.fsm.members.Load()
		m := &membership{config: old.config, index: old.index,
			allowed: make(map[string]bool, len(old.allowed)+1), removed: make(map[string]uint64, len(old.removed)+1)}
		for addr := range old.allowed {
			m.allowed[addr] = true
		}
		for id, at := range old.removed {
			m.removed[id] = at
		}
		a.members = m
	}
	return a.members
}

// configuration applies a change of membership: whoever left is recorded, so that the door can tell it, and an address
// that came in is allowed, so that its machine can be replaced.
func (a *applying) configuration(l *raft.Log) {
	m := a.changeMembers()
	was, is := make(map[raft.ServerID]bool), make(map[raft.ServerID]bool)
	wasAddr := make(map[raft.ServerAddress]bool)
	for _, s := range m.config.Servers {
		was[s.ID], wasAddr[s.Address] = true, true
	}
	m.config, m.index = raft.DecodeConfiguration(l.Data), l.Index
	for _, s := range m.config.Servers {
		is[s.ID] = true
		if addr := string(s.Address); !wasAddr[s.Address] && !placeholder(addr) && !m.allowed[addr] {
			m.allowed[addr] = true
			a.tx.allow(addr)
		}
	}
	for id := range was {
		if _, again := m.removed[string(id)]; !is[id] && !again {
			m.removed[string(id)] = l.Index
			a.tx.remove(string(id), l.Index)
		}
	}
	a.tx.meta.config, a.tx.meta.configIndex = bytes.Clone(l.Data), l.Index
}

// keepSessions: a session that was touched is changed no more, so that it can be encoded when it is written.
func (a *applying) keepSessions() {
	for id, s := range a.touched {
		if s == nil {
			a.tx.deleteSession(id)
		} else {
			a.tx.putSession(id, func() sessionRow { return encodeSession(id, s) })
		}
	}
}

// The results column of a session: { seq sum[8] results } in ascending order of seq, so that equal sessions are equal bytes.
func encodeSession(id uint64, s *session) sessionRow {
	r := sessionRow{id: id, nonce: s.nonce, acked: s.acked, last: s.last}
	for _, seq := range slices.Sorted(maps.Keys(s.results)) {
		v := s.results[seq]
		r.results = binary.AppendUvarint(r.results, seq)
		r.results = append(r.results, v.sum[:]...)
		r.results = appendResults(r.results, v.results)
	}
	return r
}

func decodeSession(row sessionRow) (*session, error) {
	s := &session{nonce: row.nonce, acked: row.acked, last: row.last, results: make(map[uint64]stored)}
	r := reader{b: row.results}
	for len(r.b) > 0 {
		seq := r.uint()
		var v stored
		copy(v.sum[:], r.raw(8, 8))
		v.results = r.results()
		if r.bad {
			return nil, fmt.Errorf("%w: session %d in snap can't be read", ErrCorrupt, row.id)
		}
		s.results[seq] = v
	}
	return s, nil
}

// Snapshot costs nothing: the file is the snapshot. What makes it one is Persist's barrier.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) { return fsmSnapshot{f}, nil }

type fsmSnapshot struct{ fsm *fsm }

// Persist makes the file durable up to at least the index that raft asked for, after which raft truncates its log (4).
func (s fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	local, ok := sink.(*snapshotSink)
	if !ok {
		return fmt.Errorf("snapshot sink %T is not ours", sink)
	}
	// Behind it when this member closes, or its state is being rebuilt. Cutting the log there would leave a gap, and the next
	// start would rightly refuse it.
	if at := s.fsm.store.meta().applied; at < local.says.Index {
		return fmt.Errorf("raft has handed out index %d and the state ends at %d", local.says.Index, at)
	}
	if err := s.fsm.store.calmBarrier(); err != nil { // nobody waits for it
		s.fsm.blame(err)
		return fmt.Errorf("sync the state before the log is truncated: %w", err)
	}
	local.persisted = true
	return sink.Close()
}

func (fsmSnapshot) Release() {}

// Restore installs the snapshot that the sink has received and verified. A snapshot that is not ahead of the state
// installs nothing: raft must not go back behind what was applied.
func (f *fsm) Restore(source io.ReadCloser) error {
	defer source.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	in := f.incoming
	f.incoming = nil
	if in == nil {
		return errors.New("restore: no snapshot was received")
	}
	defer os.Remove(in.path)
	if in.meta.applied <= f.store.meta().applied {
		// Perhaps because an install ended in its barrier: what raft is about to cut from the log must be on the disk.
		err := f.store.barrier()
		if err == nil {
			f.calm()
		}
		return err
	}
	return cmpErr(f.installLocked(in), f.store.seated()) // raft empties its log next
}

// installLocked replaces the state by that of a verified file (5). f.mu is held.
func (f *fsm) installLocked(in *incoming) error {
	m := in.meta
	f.stale = true // even if it fails: the rows may be the new ones and only the barrier has failed
	err := f.store.install(in.path, m.applied, m.term, m.config, m.configIndex)
	if err != nil {
		f.blame(err)
		return fmt.Errorf("install snapshot at index %d: %w", m.applied, err)
	}
	f.log.Info("installed a snapshot", "index", m.applied, "revision", m.revision)
	if err := f.reload(); err != nil {
		return err
	}
	f.calm() // an install before this one may have failed, and no entry may come after it
	return nil
}

// blame reports an error of the file that apply would meet too, or would not be told of any more.
func (f *fsm) blame(err error) {
	switch {
	case isIO(err):
		f.fault(fmt.Errorf("the state can't be synced, restart this member once the disk is whole: %w", err))
	case errors.Is(err, errForeign), errors.Is(err, ErrCorrupt):
		f.paused.Store(true)
		f.distrust(err)
	case errors.Is(err, errUnseated):
		f.distrust(err)
	case passing(err):
		f.fault(fmt.Errorf("the state is kept in memory, as its file can't be written for now: %w", err))
	}
}

// noRoom reports that a state which is ahead of this one could not be received. It ends with an install, or when apply goes on.
func (f *fsm) noRoom(err error) {
	if passing(err) {
		f.fault(unreceived(err))
	}
}

func unreceived(err error) error { return fmt.Errorf("the leader's state can't be received: %w", err) }

// calm ends the fault of apply, unless the file can't be written.
func (f *fsm) calm() {
	if f.store.failed.Load() == nil && !f.store.isStuck() {
		f.fault(nil)
	}
}

// stalled is how long the apply in progress has been running; a rebuild that it waits for does not count.
func (f *fsm) stalled() time.Duration {
	began := f.began.Load()
	if began == 0 || f.paused.Load() {
		return 0
	}
	return time.Duration(monotonic() - began)
}

// A decoded entry is what its bytes mean, and their sum.
type decoded struct {
	entry entry
	err   error
	sum   [sha256.Size]byte
}

func decode(data []byte) decoded {
	e, err := decodeEntry(data)
	return decoded{e, err, sha256.Sum256(data)}
}

// A decoder decodes what this member has proposed while its disk and the others write it, so that apply, for which the callers wait,
// has less to do. It knows the entries by their bytes' place in memory, the last few only.
type decoder struct {
	mu   sync.Mutex // guards the fields below
	list [8]struct {
		data *byte    // nil = none
		d    *decoded // nil = not yet
	}
	next int
}

// add comes before the entry can be applied. d is nil if it is not decoded yet.
func (c *decoder) add(data []byte, d *decoded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list[c.next].data, c.list[c.next].d = &data[0], d
	c.next = (c.next + 1) % len(c.list)
}

// expect adds an entry that is worth it, unless somebody has. It tells whether to decode it.
func (c *decoder) expect(data []byte) bool {
	if len(data) < decodeFrom {
		return false
	}
	if known, done := c.knows(data); known {
		return !done
	}
	c.add(data, nil)
	return true
}

// decode does it now, unless apply was faster.
func (c *decoder) decode(data []byte) {
	if known, _ := c.knows(data); !known {
		return
	}
	d := decode(data)
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := c.findLocked(data); i >= 0 {
		c.list[i].d = &d
	}
}

func (c *decoder) knows(data []byte) (known, done bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := c.findLocked(data)
	return i >= 0, i >= 0 && c.list[i].d != nil
}

// findLocked is the place of an entry in list, or negative.
func (c *decoder) findLocked(data []byte) int {
	if len(data) == 0 {
		return -1
	}
	for i, e := range c.list {
		if e.data == &data[0] {
			return i
		}
	}
	return -1
}

// take decodes what nobody has decoded before.
func (c *decoder) take(data []byte) decoded {
	if d := c.taken(data); d != nil {
		return *d
	}
	return decode(data)
}

func (c *decoder) taken(data []byte) *decoded {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := c.findLocked(data)
	if i < 0 {
		return nil
	}
	d := c.list[i].d
	c.list[i].data, c.list[i].d = nil, nil
	return d
}

var epoch = time.Now()

// monotonic is a reading of the monotonic clock, for ages only: no decision here reads the wall clock.
func monotonic() int64 { return int64(time.Since(epoch)) + 1 }

// snapshotStore is raft's view of the file: there is one snapshot and it is the state as it is now.
type snapshotStore struct {
	fsm  *fsm
	path string // where a snapshot that is being received lies
}

const (
	snapshotState    = "state"
	snapshotIncoming = "incoming"
)

func snapshotMeta(id string, m meta, size int64) *raft.SnapshotMeta {
	sm := &raft.SnapshotMeta{Version: 1, ID: id, Index: m.applied, Term: m.term, ConfigurationIndex: m.configIndex, Size: size}
	if len(m.config) > 0 {
		sm.Configuration = raft.DecodeConfiguration(m.config)
	}
	return sm
}

func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	m := s.fsm.store.meta()
	if m.applied == 0 {
		return nil, nil
	}
	return []*raft.SnapshotMeta{snapshotMeta(snapshotState, m, 0)}, nil
}

// Open returns the state as a consistent stream; index, term and configuration are read inside the same read transaction.
// For a snapshot that was just received there is no stream: Restore takes the file.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if id == snapshotIncoming {
		s.fsm.mu.Lock()
		defer s.fsm.mu.Unlock()
		if s.fsm.incoming == nil {
			return nil, nil, errors.New("no snapshot was received")
		}
		return snapshotMeta(id, s.fsm.incoming.meta, 0), io.NopCloser(bytes.NewReader(nil)), nil
	}
	if s.fsm.paused.Load() {
		return nil, nil, errors.New("this member's state is being rebuilt and is not sent to others")
	}
	c, err := s.fsm.store.copy(context.Background())
	if err != nil {
		return nil, nil, err
	}
	return snapshotMeta(id, c.meta, c.size), c, nil
}

func (s *snapshotStore) Create(_ raft.SnapshotVersion, index, term uint64, config raft.Configuration, configIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	return &snapshotSink{store: s, says: raft.SnapshotMeta{Index: index, Term: term, Configuration: config, ConfigurationIndex: configIndex}}, nil
}

// A snapshotSink either is persisted (a local snapshot, no bytes) or receives a stream into a file beside the state.
type snapshotSink struct {
	store     *snapshotStore
	says      raft.SnapshotMeta // what raft takes for its own once the snapshot is installed
	persisted bool
	pipe      *io.PipeWriter
	received  chan error // of the receiving goroutine
	meta      meta
	closed    bool
}

func (s *snapshotSink) ID() string {
	if s.pipe != nil {
		return snapshotIncoming
	}
	return snapshotState
}

func (s *snapshotSink) Write(p []byte) (int, error) {
	if s.pipe == nil {
		r, w := io.Pipe()
		s.pipe, s.received = w, make(chan error, 1)
		go func() {
			m, err := receive(s.store.path, r)
			s.meta = m
			s.store.fsm.noRoom(err)
			r.CloseWithError(errors.Join(err, io.ErrClosedPipe))
			s.received <- err
		}()
	}
	return s.pipe.Write(p)
}

// Close of a sink that got neither Persist nor a whole stream is an error, for raft would go on as if it had the data.
func (s *snapshotSink) Close() error {
	if s.closed {
		return nil
	}
	s.closed = true
	if s.persisted {
		return nil
	}
	if s.pipe == nil {
		return errors.New("snapshot sink closed without a snapshot")
	}
	s.pipe.Close()
	if err := <-s.received; err != nil {
		return err
	}
	if err := s.honest(); err != nil {
		os.Remove(s.store.path)
		return err
	}
	s.store.fsm.mu.Lock()
	s.store.fsm.incoming = &incoming{path: s.store.path, meta: s.meta}
	s.store.fsm.mu.Unlock()
	return nil
}

// honest: raft goes on with what the message said, and this member's state with what the file holds.
func (s *snapshotSink) honest() error {
	holds := snapshotMeta("", s.meta, 0)
	switch says := s.says; {
	case holds.Index != says.Index || holds.Term != says.Term:
		return fmt.Errorf("%w: snapshot says index %d of term %d and holds %d of %d", ErrCorrupt, says.Index, says.Term, holds.Index, holds.Term)
	case holds.ConfigurationIndex != says.ConfigurationIndex || !slices.Equal(holds.Configuration.Servers, says.Configuration.Servers):
		return fmt.Errorf("%w: snapshot says members %v of index %d and holds %v of %d", ErrCorrupt, says.Configuration.Servers,
			says.ConfigurationIndex, holds.Configuration.Servers, holds.ConfigurationIndex)
	}
	return nil
}

func (s *snapshotSink) Cancel() error {
	if s.closed {
		return nil
	}
	s.closed = true
	if s.pipe != nil {
		s.pipe.CloseWithError(errors.New("snapshot cancelled"))
		if err := <-s.received; err == nil {
			os.Remove(s.store.path)
		}
	}
	return nil
}

// A watermark is an index that only grows, and can be waited for.
type watermark struct {
	mu      sync.Mutex // guards the fields below
	index   uint64
	waiters map[uint64][]chan struct{} // by the index that they wait for
}

func (w *watermark) at() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.index
}

func (w *watermark) advance(index uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if index <= w.index {
		return
	}
	w.index = index
	for at, chans := range w.waiters {
		if at <= index {
			delete(w.waiters, at)
			for _, c := range chans {
				close(c)
			}
		}
	}
}

func (w *watermark) wait(ctx context.Context, index uint64) error {
	w.mu.Lock()
	if index <= w.index {
		w.mu.Unlock()
		return nil
	}
	c := make(chan struct{})
	if w.waiters == nil {
		w.waiters = make(map[uint64][]chan struct{})
	}
	w.waiters[index] = append(w.waiters[index], c)
	w.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		w.mu.Lock()
		defer w.mu.Unlock()
		list := w.waiters[index]
		for i := range list {
			if list[i] == c {
				list = append(list[:i], list[i+1:]...)
				break
			}
		}
		if len(list) == 0 {
			delete(w.waiters, index)
		} else {
			w.waiters[index] = list
		}
		return ctx.Err()
	}
}
