package quorate

// The flush: how what is committed gets into the file. Commits change the state in memory and are answered; this file owns the
// tail, which is what the file does not have yet, and writes it in one transaction, many commits at a time: a key that was set
// a hundred times meanwhile is one row, and a change that the history has dropped again is none. It also owns the file's one
// writer, its foreign writes, the barrier and the checkpoints. It never asks what a commit means. Commits come from sqlstore.go
// (append), readers of the file call sync first, raft's snapshot calls barrier; a goroutine of maintain does the rest.
//
// Nothing is lost by being late: every commit is an entry of the raft log, which is on a quorum's disks before it is applied,
// and a start applies again what the file does not have. The file itself is a prefix of the commits at every instant, because a
// flush takes all that there is. A flush that fails is tried again with what has come since; apply waits for it.

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// A flush rests fifteen times as long as it works, so that it takes a sixteenth of a CPU and delays nobody, and the more there is
// to write the more of it falls together. The more has come meanwhile the less it rests, and whoever waits for the file makes it
// hurry.
const (
	flushRest   = 15
	flushShift  = time.Millisecond       // of work, then it rests
	flushNap    = 100 * time.Millisecond // at most: a step that the disk has held up is no reason to rest for a minute
	flushLate   = 2 * time.Second        // after its begin a flush rests no more, so that the file is not far behind
	flushPause  = 100 * time.Millisecond // at least, between two
	flushLonger = 3 * time.Second        // at most, while many commits come: a key that changes again meanwhile is written once
	flushMany   = 200                    // commits a second
	flushAgain  = time.Second            // after one that failed
	quietRounds = 20                     // of the checkpointer, then the writer's cache is let go
	tailRipe    = 16 << 20               // bytes of a tail that end a pause
	tailEnough  = 32 << 20               // bytes of a tail that leave no time to rest
	tailLimit   = 64 << 20               // bytes that may wait; then commits do
	flushLast   = 3 * time.Second        // of work on the file once the member is closed: a full tail is written in less, but not everywhere
	keptRoom    = 1 << 15                // rows, and changes; the room for so many is used again by the next tail
	rowsAtOnce  = 16                     // new rows that one statement writes
)

// A tail is what some commits have changed, the newest state of each row only.
type tail struct {
	rows []tailRow // of kv, each key once
	gone places    // of the keys that were deleted here, also of those that are back
	all  places    // nil = nobody has asked for it
	own  map[ownKey]ownPut
	past []past
	size int64 // bytes, about
	meta *meta // as of its last commit; nil = there was none
}

type tailRow struct {
	keyed      // nil = deleted
	fresh bool // there was no such row before the tail: the file has none
}

// places are indexes of a tail's rows.
type places map[string]int

// append adds a transaction that is being committed.
func (s *store) append(t *storeTx) {
	s.tailMu.Lock()
	defer s.tailMu.Unlock()
	w := &s.tail
	if w.own == nil {
		w.rows, w.own, s.used.rows = s.used.rows, make(map[ownKey]ownPut), nil
	}
	for _, c := range t.changes {
		w.put(c.key, c.was, c.now)
	}
	maps.Copy(w.own, t.own)
	if t.meta.keep > 0 {
		if w.past == nil {
			w.past, s.used.past = s.used.past, nil
		}
		w.remember(t.past, t.meta)
	}
	m := t.meta
	w.meta = &m
	s.commits++
	s.pace.behind.Store(w.size)
	give(s.dirty)
	if w.size > tailEnough {
		give(s.press)
	}
	if w.size > tailRipe {
		give(s.ripe)
	}
}

// give leaves a token for whoever waits for one.
func give(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// put replaces the state of a row. was is the one before, as it was committed.
func (w *tail) put(key string, was, now *item) {
	place, here := w.gone[key]
	if was != nil && int(was.at) < len(w.rows) && w.rows[was.at].item == was {
		place, here = int(was.at), true
	}
	if !here {
		place = len(w.rows)
		w.rows = append(w.rows, tailRow{keyed{key: key}, was == nil})
		if w.all != nil {
			w.all[key] = place
		}
	} else {
		w.size -= tailSize(key, w.rows[place].item)
	}
	w.rows[place].item = now
	w.size += tailSize(key, now)
	if now != nil {
		now.at = int32(place)
		return
	}
	if w.gone == nil {
		w.gone = make(places)
	}
	w.gone[key] = place
}

// find returns the row under key, if it is here; nil if it was deleted. Commits need no such look, only where memory is not whole.
func (w *tail) find(key string) (it *item, ok bool) {
	if w.all == nil {
		w.all = make(places, len(w.rows))
		for i, r := range w.rows {
			w.all[r.key] = i
		}
	}
	place, ok := w.all[key]
	if !ok {
		return nil, false
	}
	return w.rows[place].item, true
}

func tailSize(key string, it *item) int64 {
	if it == nil {
		return int64(len(key)) + itemOverhead
	}
	return itemSize(key, it)
}

// remember adds changes, and forgets now and then those that the history drops before they are written.
func (w *tail) remember(list []past, m meta) {
	w.past = append(w.past, list...)
	for _, p := range list {
		w.size += pastSize(p)
	}
	if uint64(len(w.past)) < m.keep+m.keep/4+1024 {
		return
	}
	n, oldest := 0, m.oldest()
	for n < len(w.past) && w.past[n].revision <= oldest {
		w.size -= pastSize(w.past[n])
		n++
	}
	w.past = slices.Delete(w.past, 0, n)
}

// before puts what a flush could not write in front of what has come since.
func (w *tail) before(newer tail) tail {
	if newer.meta == nil {
		return *w
	}
	for _, r := range newer.rows {
		was, here := w.find(r.key)
		w.put(r.key, was, r.item)
		if !here {
			w.rows[len(w.rows)-1].fresh = r.fresh
		}
	}
	maps.Copy(w.own, newer.own)
	w.remember(newer.past, *newer.meta)
	w.meta = newer.meta
	return *w
}

// unwritten returns the row under key as of the last commit, if the file may not have it yet; nil if it was deleted.
func (s *store) unwritten(key string) (it *item, ok bool) {
	s.tailMu.Lock()
	defer s.tailMu.Unlock()
	if it, ok = s.tail.find(key); !ok {
		it, ok = s.flushing.find(key)
	}
	return it, ok
}

// keepUp returns when commits may go on: at once, unless the last flush has failed or too much waits for one. Then it flushes.
func (s *store) keepUp() error {
	if failed := s.failed.Load(); failed != nil {
		return *failed
	}
	s.tailMu.RLock()
	late := s.stuck != nil && !passing(s.stuck) || s.tail.size+s.flushing.size > s.tailLimit
	s.tailMu.RUnlock()
	if late {
		return s.flush()
	}
	return nil
}

// isStuck: the last flush has failed.
func (s *store) isStuck() bool {
	s.tailMu.RLock()
	defer s.tailMu.RUnlock()
	return s.stuck != nil
}

// sync returns when the file has all that is committed now. Whoever begins to read the file calls it first. It is ErrCorrupt if
// somebody else has written to the file: what was committed since is not in it, and comes only with forgive or install.
func (s *store) sync(ctx context.Context) error {
	if err := s.awaitSeated(ctx); err != nil && ctx.Done() != nil {
		return s.explain("read", err)
	}
	s.tailMu.RLock()
	want := s.commits
	s.tailMu.RUnlock()
	for {
		s.tailMu.RLock()
		done, err, turned, flusher := s.filed >= want, s.stuck, s.turned, s.flusher
		s.tailMu.RUnlock()
		switch {
		case done:
			return nil
		case errors.Is(err, errForeign):
			return fmt.Errorf("%s is behind: %w: %w", s.path, ErrCorrupt, err)
		case err != nil:
			return s.explain("write to", err)
		case !flusher:
			err := s.flush()
			if errors.Is(err, errForeign) {
				continue
			}
			return s.explain("write to", err)
		}
		give(s.press)
		select {
		case <-turned:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the file: %w", context.Cause(ctx))
		case <-s.ending:
			return ErrClosed
		}
	}
}

// flush writes the tail as it is now.
func (s *store) flush() error {
	s.lockFile()
	defer s.fileMu.Unlock()
	if s.closed { // and with it the connection
		return ErrClosed
	}
	return s.flushLocked()
}

// lockFile locks fileMu. A flush that is resting goes on at once.
func (s *store) lockFile() {
	s.pace.waiting.Add(1)
	defer s.pace.waiting.Add(-1)
	give(s.press)
	s.fileMu.Lock()
}

// lockState keeps file and state from changing: it locks fileMu and mu, of a store that is open.
func (s *store) lockState() (unlock func(), err error) {
	s.lockFile()
	s.mu.Lock()
	unlock = func() {
		s.mu.Unlock()
		s.fileMu.Unlock()
	}
	if s.closed {
		unlock()
		return nil, ErrClosed
	}
	if s.writer == nil { // it was lost with what failed
		unlock()
		return nil, *s.failed.Load()
	}
	return unlock, nil
}

// A pacer is how a flush rests. fileMu guards what is not atomic.
type pacer struct {
	waiting atomic.Int32    // they want fileMu, and no rest
	behind  atomic.Int64    // bytes that have come since the flush began
	end     atomic.Int64    // by monotonic; a flush that goes on after it fails with errLate; 0 = none
	press   <-chan struct{} // ends a rest
	ending  <-chan struct{} // closed when maintain is to end: no more rests
	rests   bool            // the flush is nobody's who waits for it
	began   time.Time       // of this shift
	until   time.Time       // no rest after this
	steps   int             // since the last look at the clock
}

// rested begins a flush that may rest.
func (p *pacer) rested() {
	now := time.Now()
	p.rests, p.began, p.until, p.steps = true, now, now.Add(flushLate), 0
}

func (p *pacer) hurry() { p.rests = false }

// errLate: the member is closed, and a flush has taken too long since. What it has not written is in the log.
var errLate = errors.New("this member closes, and writing them takes too long: they are in the log, and the next Open writes them; until then a " +
	"copy of snap alone lacks them")

// endSoon gives flushes this long to end. The member is closed.
func (s *store) endSoon(limit time.Duration) { s.pace.end.Store(monotonic() + int64(limit)) }

// step comes after each bit of work, of so many rows. After an error the flush is to end.
func (p *pacer) step(rows int) error {
	if p.steps += rows; p.steps < 8 {
		return nil
	}
	p.steps = 0
	if end := p.end.Load(); end != 0 && monotonic() > end {
		return errLate
	}
	if p.rests {
		p.rest()
	}
	return nil
}

// rest is for a flush that has worked for a while.
func (p *pacer) rest() {
	worked := time.Since(p.began)
	if worked < flushShift {
		return
	}
	if p.waiting.Load() > 0 || time.Now().After(p.until) {
		p.hurry()
		return
	}
	left := 1 - float64(p.behind.Load())/tailEnough // of the tail's room
	select {
	case <-time.After(min(time.Duration(flushRest*left*float64(worked)), flushNap)):
		p.began = time.Now()
	case <-p.press:
		p.hurry()
	case <-p.ending:
		p.hurry()
	}
}

// flushLocked needs fileMu.
func (s *store) flushLocked() error {
	return s.writeTail(func(t *tail) error {
		if t.meta == nil {
			return nil
		}
		return s.transact(func(m *meta, own map[ownKey]uint64) error { return s.putTail(t, m, own) })
	})
}

// writeTail takes the tail for f to write, and puts it back if f fails.
func (s *store) writeTail(f func(t *tail) error) error {
	s.tailMu.Lock()
	t, upTo := s.tail, s.commits
	s.tail, s.flushing = tail{}, t
	s.tailMu.Unlock()
	err := s.note(f(&t))
	s.tailMu.Lock()
	switch {
	case err != nil && t.meta != nil:
		s.tail = t.before(s.tail)
	case err == nil:
		s.filed = upTo
	}
	s.flushing = tail{}
	was := s.stuck
	s.stuck = err
	if isBusy(err) || errors.Is(err, errLate) {
		s.stuck = nil // a shell has the file for now; commits go on as long as the tail is not full
	}
	close(s.turned)
	s.turned = make(chan struct{})
	eased := was != nil && err == nil
	s.tailMu.Unlock()
	if err == nil && t.meta != nil {
		s.keepRoom(t)
	}
	if eased {
		s.eased()
	}
	return err
}

// keepRoom empties a tail that is in the file, for the next one: its slices would grow again while commits wait for it.
func (s *store) keepRoom(t tail) {
	used := tail{rows: roomOf(t.rows), past: roomOf(t.past)}
	s.tailMu.Lock()
	s.used = used
	s.tailMu.Unlock()
}

// roomOf is the room of a list that is needed no more; nil if it is too large to be kept.
func roomOf[T any](list []T) []T {
	if cap(list) > keptRoom {
		return nil
	}
	clear(list)
	return list[:0]
}

// dropTail forgets what the file does not have: another state has taken its place. A barrier comes next.
func (s *store) dropTail() {
	s.tailMu.Lock()
	defer s.tailMu.Unlock()
	s.tail, s.stuck = tail{}, nil
}

// transact has f change the file, and m and own to what it holds then, in one transaction. After an error it has changed nothing.
func (s *store) transact(f func(m *meta, own map[ownKey]uint64) error) error {
	// A transaction that finds all of the WAL in the database begins it anew with its first page, and the witness sees a change
	// from then until the commit. So a small one goes first where apply asks the witness.
	if !s.memory.whole() {
		if err := s.transactOnce(func(m *meta, _ map[ownKey]uint64) error { m.barrier++; return nil }); err != nil {
			return err
		}
	}
	if err := s.transactOnce(f); err != nil {
		return err
	}
	if err := s.note(s.checkWAL()); err != nil {
		// The transaction is done; what a checkpoint could not write is still in the WAL.
		s.unchecked.goesOn(s.log, "checkpoint", err, "path", s.path)
	} else {
		s.unchecked.over()
	}
	return nil
}

func (s *store) transactOnce(f func(m *meta, own map[ownKey]uint64) error) error {
	if failed := s.failed.Load(); failed != nil {
		return *failed
	}
	if s.foreignly != nil {
		return s.foreignly
	}
	if err := s.writer.exec(qBegin); err != nil {
		return err
	}
	m, own := *s.inFile.Load(), maps.Clone(s.own)
	err := s.checkForeign()
	if err == nil {
		err = f(&m, own)
	}
	if err == nil {
		err = s.writer.writeMeta(&m)
	}
	if err == nil {
		err = s.writer.exec(qCommit)
	}
	if err != nil {
		s.writer.exec(qRollback) // SQLite may have rolled back by itself; the next BEGIN tells if it has not
		if s.foreignly != nil {
			return err
		}
		// SQLite may count a failed transaction as a change of what it had cached, and the witness one that has begun the WAL anew.
		return errors.Join(err, s.rebase())
	}
	s.note(s.showWitness())
	s.own = own
	s.inFile.Store(&m)
	return nil
}

// putTail writes a tail, if there is one. m is as of the file's last commit and becomes the tail's.
func (s *store) putTail(t *tail, m *meta, own map[ownKey]uint64) error {
	if t.meta == nil {
		return nil
	}
	c, was := s.writer, *m
	*m = *t.meta
	m.barrier, m.ownSum = was.barrier, was.ownSum
	if was.format < historyFormat && m.format >= historyFormat {
		if err := c.createTables(historyFormat); err != nil {
			return err
		}
	}
	// In the order of the tree, so that each of its pages is found and changed once.
	for list := t.sorted(); len(list) > 0; {
		n := together(list)
		if err := c.putRows(list[:n]); err != nil {
			return err
		}
		list = list[n:]
		if err := s.pace.step(n); err != nil {
			return err
		}
	}
	if err := c.putPast(t.past, &was, m, own, s.pace.step); err != nil {
		return err
	}
	for k, put := range t.own {
		if err := c.putOwn(k, put, m, own); err != nil {
			return err
		}
	}
	return c.dropMarks(m, own)
}

// sorted is its rows by key.
func (w *tail) sorted() []tailRow {
	list := slices.Clone(w.rows)
	slices.SortFunc(list, func(a, b tailRow) int { return strings.Compare(a.key, b.key) })
	return list
}

// together is how many of the first rows go in one statement: one, or rowsAtOnce that the file does not have, which take two thirds of
// the time of as many statements.
func together(list []tailRow) int {
	if len(list) < rowsAtOnce {
		return 1
	}
	for _, r := range list[:rowsAtOnce] {
		if r.item == nil || !r.fresh {
			return 1
		}
	}
	return rowsAtOnce
}

// putRow is the statement for a row, present or absent.
const putRow = `INSERT INTO kv(key, value, version, created, sum) VALUES(?, ?, ?, ?, ?) ON CONFLICT(key) ` +
	`DO UPDATE SET value = excluded.value, version = excluded.version, created = excluded.created, sum = excluded.sum`

// newRows is the statement for so many rows that are absent. To take back such a statement alone SQLite would copy each page before it
// changes it. OR FAIL spares that: after any error the whole transaction is rolled back.
func newRows(rows int) string {
	return `INSERT OR FAIL INTO kv(key, value, version, created, sum) VALUES` + valueRows(`(?, ?, ?, ?, ?)`, rows)
}

// putRows writes one row, which may be nil, or rowsAtOnce that are absent.
func (c *conn) putRows(list []tailRow) error {
	q, args := qPut, make([]driver.Value, 0, 5*len(list))
	for _, r := range list {
		if r.item == nil {
			return c.exec(qDelete, r.key)
		}
		args = append(args, r.key, sqlValue(r.value), int64(r.version), int64(r.created), int64(r.hash))
	}
	if len(list) > 1 {
		q = qPutMany
	}
	return c.exec(q, args...)
}

// putOwn writes a private row, and keeps own and its sum.
func (c *conn) putOwn(k ownKey, put ownPut, m *meta, own map[ownKey]uint64) error {
	m.ownSum -= own[k]
	delete(own, k)
	if put != nil {
		h, q, args := put()
		own[k] = h
		m.ownSum += h
		return c.exec(q, args...)
	}
	switch k.table {
	case 's':
		return c.exec(qDeleteSession, int64(k.id))
	case 'a':
		return c.exec(qDisallow, k.name)
	default:
		return c.exec(qDeleteMark, int64(k.id))
	}
}

// dropMarks keeps the newest boundaries only.
func (c *conn) dropMarks(m *meta, own map[ownKey]uint64) error {
	var all []uint64
	for k := range own {
		if k.table == 'm' {
			all = append(all, k.id)
		}
	}
	slices.Sort(all)
	for ; len(all) > keptMarks; all = all[1:] {
		if err := c.putOwn(ownKey{table: 'm', id: all[0]}, nil, m, own); err != nil {
			return err
		}
	}
	return nil
}

// pauseAfter is the pause after a flush of so many commits, most of which came in the pause before it.
func pauseAfter(pause time.Duration, commits uint64) time.Duration {
	if float64(commits) < flushMany*pause.Seconds() {
		return flushPause
	}
	return min(2*pause, flushLonger)
}

// filedUpTo is how many commits the file has.
func (s *store) filedUpTo() uint64 {
	s.tailMu.RLock()
	defer s.tailMu.RUnlock()
	return s.filed
}

// flushWhenDue flushes at once what comes after a pause. Under load the pauses grow, up to where the tail is worth a flush.
func (s *store) flushWhenDue(ctx context.Context) {
	s.fileMu.Lock()
	s.pace.ending = ctx.Done()
	s.fileMu.Unlock()
	s.tailMu.Lock()
	s.flusher = true
	s.tailMu.Unlock()
	defer func() {
		s.tailMu.Lock()
		s.flusher = false // whoever waits for the file flushes by himself
		close(s.turned)
		s.turned = make(chan struct{})
		s.tailMu.Unlock()
	}()
	pause := flushPause
	var trouble trouble
	for {
		select {
		case <-s.dirty:
		case <-s.press:
		case <-ctx.Done():
			return
		case <-s.ending:
			return
		}
		s.fileMu.Lock()
		s.pace.rested()
		select {
		case <-s.ripe: // it is written now
		default:
		}
		before := s.filedUpTo()
		err := s.explain("write to", s.flushLocked())
		s.pace.hurry()
		pause = pauseAfter(pause, s.filedUpTo()-before)
		rest, ripe := pause, s.ripe
		if err != nil && !errors.Is(err, errLate) {
			ripe = nil
			trouble.goesOn(s.log, "the file falls behind the log", err, "path", s.path)
			s.uneasy(err) // before anyone can mend it
			give(s.dirty)
			rest = flushAgain
		} else {
			trouble.over()
		}
		s.fileMu.Unlock()
		select {
		case <-time.After(rest):
		case <-ripe:
		case <-s.press:
			give(s.press)
		case <-ctx.Done():
			return
		case <-s.ending:
			return
		}
	}
}

// barrier returns when everything that is committed is in the file and on the disk. One commit under synchronous=FULL is the
// only thing that surely syncs: a checkpoint with nothing to do does not, and neither does a transaction that changes no byte.
func (s *store) barrier() error {
	s.lockFile()
	defer s.fileMu.Unlock()
	return s.explain("sync", s.namedBarrierLocked())
}

// calmBarrier is barrier for whoever does not mind that it rests.
func (s *store) calmBarrier() error {
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	s.pace.rested()
	defer s.pace.hurry()
	return s.explain("sync", s.namedBarrierLocked())
}

// namedBarrierLocked is for whoever gives up what the file has: it is durable only under its names.
func (s *store) namedBarrierLocked() error { return cmpErr(s.barrierLocked(), s.seated()) }

// barrierLocked needs fileMu.
func (s *store) barrierLocked() error {
	if s.closed || s.writer == nil {
		return ErrClosed
	}
	return s.writeTail(func(t *tail) (err error) {
		if err := s.writer.pragma("synchronous=FULL"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.writer.pragma("synchronous=NORMAL")) }()
		return s.transact(func(m *meta, own map[ownKey]uint64) error {
			m.barrier++ // putTail keeps it
			return s.putTail(t, m, own)
		})
	})
}

// checkForeign is asked in a transaction, or while there is none.
func (s *store) checkForeign() error {
	if s.writer == nil {
		return ErrClosed
	}
	v, err := s.writer.one(qDataVersion)
	if err != nil {
		return err
	}
	if v != s.dataVersion {
		s.foreignly = errForeign
	}
	return s.foreignly
}

// rebase takes the file as it is now for ours.
func (s *store) rebase() (err error) {
	if s.dataVersion, err = s.writer.one(qDataVersion); err != nil {
		return err
	}
	return s.showWitness()
}

// showWitness lets the witness see what this store has just done to the file. It asks the witness first: what somebody else does
// before checkForeign is met by that, and what comes after is met by the witness.
func (s *store) showWitness() error {
	s.witnessMu.Lock()
	defer s.witnessMu.Unlock()
	v, err := s.witness.one(qDataVersion)
	if err == nil {
		err = s.checkForeign()
	}
	if err == nil {
		s.left = v
	}
	return err
}

// asWeLeftIt asks the witness whether nobody has committed to the file since showWitness. False may also mean that it has not
// been shown a commit of ours yet.
func (s *store) asWeLeftIt() (bool, error) {
	s.witnessMu.Lock()
	defer s.witnessMu.Unlock()
	if s.witness == nil {
		return false, ErrClosed
	}
	v, err := s.witness.one(qDataVersion)
	return v == s.left, err
}

// foreign reports whether someone else has committed to the file since the state was last taken from it.
func (s *store) foreign() (bool, error) {
	if !s.fileMu.TryLock() {
		return false, nil // a transaction is under way, and it asks the same; it may be hanging in the disk
	}
	defer s.fileMu.Unlock()
	if s.closed {
		return false, ErrClosed
	}
	err := s.checkForeign()
	if errors.Is(err, errForeign) {
		return true, nil
	}
	return false, s.explain("read", err)
}

// forgive takes the file as someone else has left it, and what was committed since on top: every sum is computed anew. Only where
// there is no other copy.
func (s *store) forgive() error {
	unlock, err := s.lockState()
	if err != nil {
		return err
	}
	defer unlock()
	s.checkForeign() // nobody may have asked yet; after rebase nobody could tell
	was := s.foreignly
	err = s.writeTail(func(t *tail) error {
		s.foreignly = nil
		if err := s.rebase(); err != nil {
			return err
		}
		return s.transact(func(m *meta, own map[ownKey]uint64) error {
			if err := s.reclaim(m.format); err != nil {
				return err
			}
			kept := *t
			kept.past, kept.rows = nil, slices.Clone(t.rows) // the history begins anew
			for i := range kept.rows {
				kept.rows[i].fresh = false // somebody else may have made it
			}
			if err := s.putTail(&kept, m, own); err != nil {
				return err
			}
			return s.forgiveRows(m, own)
		})
	})
	if err != nil {
		s.foreignly = cmpErr(s.foreignly, was)
		return s.explain("take over", err)
	}
	if err := s.checkSchema(); err != nil {
		s.log.Error("the next Open would refuse this file if this were not the only member", "error", err)
	}
	s.isReplaced()
	return nil
}

// reclaim makes the file ours again before anything is written: it takes away what would run at our writes, and says which format
// it is of.
func (s *store) reclaim(format uint64) error {
	if err := s.dropTriggers(); err != nil {
		return err
	}
	return errors.Join(s.writer.pragma(fmt.Sprintf("application_id=%d", applicationID)), s.writer.pragma(fmt.Sprintf("user_version=%d", format)))
}

// dropTriggers takes away what would run at our writes, loudly.
func (s *store) dropTriggers() error {
	dropped, err := s.writer.dropTriggers()
	for _, sql := range dropped {
		s.log.Error("a trigger in snap would change what this member writes: it is dropped", "path", s.path, "trigger", sql)
	}
	return err
}

// isReplaced has the state begin anew with what the file holds. fileMu and mu are held.
func (s *store) isReplaced() {
	m := *s.inFile.Load()
	s.startLoad(m)
	s.last.Store(&m)
	if s.replaced != nil {
		s.replaced(m.revision)
	}
}

func (s *store) forgiveRows(m *meta, own map[ownKey]uint64) error {
	c := s.writer
	m.kvSum, m.keys, m.bytes = 0, 0, 0
	var wrong []keyed
	err := c.each(qScan, nil, func(v []driver.Value) error {
		key, ok := v[0].(string)
		if !ok || !validKey(key) {
			return corrupt("kv has a row whose key is not text, or empty, or too long")
		}
		value, plain := columnText(v[1])
		if !plain {
			value = fmt.Sprint(v[1]) // a number, as a shell writes it; the key's owner sees its digits
		}
		r := row{value, columnUint(v[2]), columnUint(v[3])}
		if r.version > math.MaxInt64 || r.created > math.MaxInt64 {
			return corrupt("kv row %q has a negative version", key)
		}
		var h uint64
		c.buf, h = rowHash(c.buf, key, r.value, r.version, r.created)
		if !plain || h != columnUint(v[4]) {
			wrong = append(wrong, keyed{key, &item{row: r, hash: h}})
		}
		m.kvSum, m.keys, m.bytes = m.kvSum+h, m.keys+1, m.bytes+uint64(len(key)+len(value))
		m.revision = max(m.revision, r.version) // no later write may get a version that someone has made up
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range wrong {
		if err := c.exec(qFixSum, r.key, sqlValue(r.value), int64(r.hash)); err != nil {
			return err
		}
	}
	if m.keep > 0 {
		// Nobody knows what has changed, so whoever watches begins anew.
		m.revision++
		m.base = m.revision
		if err := errors.Join(c.exec(qClearHistory), c.putOwn(boundsKey, m.bounds, m, own)); err != nil {
			return err
		}
	}
	fixed, sum, err := c.fixOwn(*m)
	if err != nil {
		return err
	}
	clear(own)
	maps.Copy(own, fixed)
	m.ownSum = sum
	return nil
}

// checkWAL: a checkpoint by another connection can never restart the WAL under a steady writer, which then grows without
// end. When this connection has moved all of it, its next commit begins at the start of the file.
func (s *store) checkWAL() error {
	size := s.walSize()
	if size <= walLimit {
		s.walChecked = 0
		return nil
	}
	if size >= s.walChecked && size < s.walChecked+walAgain {
		return nil
	}
	s.walChecked = size
	s.checkpointMu.Lock()
	defer s.checkpointMu.Unlock()
	if size > 2*walLimit && !s.pinned() {
		return s.restartWAL()
	}
	_, err := s.writer.one(qPassive)
	return err
}

// restartWAL is for when short readers, each with its bit of the WAL, have come between again and again: it waits a moment
// for them. In vain, if a shell has a long transaction; then the next attempt comes with the WAL's next growth.
func (s *store) restartWAL() error {
	if err := s.writer.pragma("busy_timeout=50"); err != nil {
		return err
	}
	_, err := s.writer.one(qRestart)
	if isBusy(err) {
		err = nil
	}
	return errors.Join(err, s.writer.pragma("busy_timeout=5000"), s.showWitness())
}

func (s *store) walSize() int64 {
	info, err := os.Stat(s.path + "-wal")
	if err != nil {
		return 0
	}
	return info.Size()
}

func (s *store) openCheckpointer() (*conn, error) {
	c, err := openConn(s.path, "mode=rw", "wal_autocheckpoint=0", "trusted_schema=OFF")
	if err != nil {
		return nil, err
	}
	return c, c.keepWAL(true)
}

// checkpointOnce opens the connection if there is none, or one to a file that had the name before. A checkpoint without the names could be
// cut short by a crash, and leave half of it in the database and nothing beside it.
func (s *store) checkpointOnce(c **conn) (err error) {
	if s.seated() != nil {
		return nil
	}
	if *c != nil && (*c).seat != s.seat.Load() {
		(*c).close()
		*c = nil
	}
	if *c == nil {
		if *c, err = s.openSeated(s.openCheckpointer); errors.Is(err, errUnseated) {
			return nil
		} else if err != nil {
			return err
		}
	}
	s.checkpointMu.Lock()
	defer s.checkpointMu.Unlock()
	return s.note((*c).passive())
}

// warnOfReader says, once each time, that a reader in another program keeps the WAL from beginning anew: without its end the WAL grows
// by all that is written. What this program's own readers keep is bounded.
func (s *store) warnOfReader(long *bool) {
	size := s.walSize()
	switch {
	case size <= s.walLong:
		*long = false
	case !*long && !s.pinned():
		*long = true
		s.log.Warn("another program has snap open in a transaction that does not end, a shell in BEGIN or a reader that stopped half-way: snap-wal "+
			"grows by everything that is written until that transaction ends", "path", s.path, "snap-wal bytes", size, "limit", s.walLong)
	}
}

// shrink gives back the memory of the writer's cache, of a store that nobody writes to. The system still has the pages.
func (s *store) shrink() {
	s.tailMu.Lock()
	s.used = tail{}
	s.tailMu.Unlock()
	if !s.fileMu.TryLock() {
		return
	}
	defer s.fileMu.Unlock()
	if s.closed || s.writer == nil {
		return
	}
	if err := s.writer.pragma("shrink_memory"); err != nil {
		s.log.Warn("shrink", "path", s.path, "error", err)
	}
}

// checkpoint runs PASSIVE checkpoints, which make no one wait, on a connection of its own.
func (s *store) checkpoint(ctx context.Context) {
	var c *conn
	defer func() {
		if c != nil {
			c.close()
		}
	}()
	var seen *meta
	tended, quiet, warned, long := time.Now(), 0, false, false
	for s.pause(ctx, 100*time.Millisecond) {
		s.tendHolds(&tended)
		s.closeOld()
		s.warnOfReader(&long)
		if m := s.inFile.Load(); m == seen {
			if quiet++; quiet == quietRounds {
				s.shrink()
			}
			continue
		} else {
			seen, quiet = m, 0
		}
		err := s.checkpointOnce(&c)
		if err == nil || isBusy(err) {
			warned = false
			continue
		}
		if !warned {
			s.log.Warn("checkpoint", "path", s.path, "error", err)
		}
		if warned = true; c != nil { // where descriptors were short, SQLite may have opened it for reading only
			c.close()
			c = nil
		}
	}
}
