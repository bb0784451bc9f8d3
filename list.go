package quorate

// Lists: the entries under a prefix, in key order, as of one moment, however long the loop over them takes. This file owns the
// options, the loop, and the listing below it, which holds the moment and reads on in it a page at a time: from a snapshot of the
// copy in memory, from a read transaction, or, when that has kept too much of the WAL from restarting, from a file. Service and
// View begin here; the store looks after open listings every 100 ms. It never touches the log or the network.

import (
	"context"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/tidwall/btree"
)

const (
	listPageRows  = 128      // read at once; a list that is no longer than a page holds nothing between two steps
	listPageBytes = 64 << 10 // of keys and values, after which a page ends; its last value may be larger
	maxLists      = 32       // that have a transaction or a file at one time on one member; more wait

	pinMost   = 48 << 20    // of the WAL that a listing with an idle consumer may keep, at the very most
	slowLimit = time.Minute // in which a consumer must take an entry, or what is held for it is given back
)

// A ListOption narrows or turns around a List: From, Limit, Reverse. Of two of one kind the last holds.
type ListOption func(*listOptions)

type listOptions struct {
	span
	limited bool
}

// From begins at key, which need not exist: the first entry is the one at key or the next. With Reverse it is the one at key or
// the one before. Any string will do, as it is only compared: after an entry, From(entry.Key + "\x00") goes on behind it. Where
// the prefix ends the list ends, whatever key says.
func From(key string) ListOption {
	return func(o *listOptions) { o.from, o.hasFrom = key, true }
}

// Limit ends the list after n entries. 0 is an empty list, a negative n is ErrInvalid.
func Limit(n int) ListOption {
	return func(o *listOptions) { o.limit, o.limited = n, true }
}

// Reverse goes from the last key to the first.
func Reverse() ListOption {
	return func(o *listOptions) { o.reverse = true }
}

// List ranges over the entries whose key begins with prefix ("" is all of them), ordered by the bytes of the key, as they all
// were at one moment: transactions are in it whole or not at all. The moment is linearizable: every write that returned anywhere
// before the loop began is in it. Entries are copies. Ranging again begins anew, with a new moment.
//
// Memory does not grow with the length of the list, and writes go on meanwhile: what a long loop has not taken yet is kept as a
// snapshot of the copy in memory, or in SQLite, or in a temporary file in Config.Dir when the loop is slow. Leaving the loop
// gives all of it back.
//
// An error comes last, once, with a zero Entry; a list that is complete ends without one. What came before an error was right. Take
// both values: a loop of the form "for e := range" drops the error, and a list that was cut short looks complete.
// Errors: ErrInvalid (the prefix is no valid UTF-8 without NUL, or a Limit is negative), ErrTooLarge (a prefix of more than 4096
// bytes), ErrNoLeader while no majority answers, ErrSlow (the list was longer than about a hundred entries or 64 KiB, and the loop
// took nothing for a minute, or for a moment in which so much was written that the rest could not be put aside in time),
// ErrClosed, ErrRemoved, ErrCorrupt, and the error of ctx, also in the middle. ctx limits the whole loop; without a deadline,
// Config.Timeout limits what happens before the first entry only. A retry is safe.
//
// At most 32 long lists that do not come from the copy in memory are open at once on one member; the next one waits for ctx.
func (s *Service) List(ctx context.Context, prefix string, opts ...ListOption) iter.Seq2[Entry, error] {
	return s.list(ctx, s.catchUp, prefix, opts)
}

// List is Service.List on this member's own copy: no read round, so the moment may be an old one, and no network. Errors are the
// same but for ErrNoLeader and ErrRemoved.
func (v View) List(ctx context.Context, prefix string, opts ...ListOption) iter.Seq2[Entry, error] {
	return v.s.list(ctx, v.open, prefix, opts)
}

// open is what a local list waits for: nothing.
func (v View) open(ctx context.Context) error {
	if v.closed() {
		return ErrClosed
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (s *Service) list(ctx context.Context, ready func(context.Context) error, prefix string, opts []ListOption) iter.Seq2[Entry, error] {
	o := listOptions{span: span{prefix: prefix, limit: -1}}
	for _, f := range opts {
		f(&o)
	}
	return func(yield func(Entry, error) bool) {
		l, err := s.beginList(ctx, ready, o)
		if err != nil {
			yield(Entry{}, s.listError(err))
			return
		}
		defer l.close() // the body may panic
		for {
			k, more, err := l.next()
			if more && ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			switch {
			case err != nil:
				yield(Entry{}, s.listError(err))
				return
			case !more:
				return
			case !yield(k.entry(), nil):
				return
			}
		}
	}
}

// beginList is limited by Config.Timeout, unlike the loop that follows.
func (s *Service) beginList(ctx context.Context, ready func(context.Context) error, o listOptions) (l *listing, err error) {
	if o.limited && o.limit < 0 {
		return nil, fmt.Errorf("%w: Limit(%d)", ErrInvalid, o.limit)
	}
	if err := checkPrefix(o.prefix); err != nil {
		return nil, err
	}
	returned := false
	defer func() {
		if !returned && l != nil {
			l.close()
		}
	}()
	func() {
		ctx, cancel := s.limited(ctx)
		defer cancel() // which asks the caller's context, and that may panic
		if err = ready(ctx); err == nil {
			l, err = s.store.list(ctx, o.span)
		}
	}()
	returned = true
	return l, err
}

// listError wakes the rebuild if a row was damaged.
func (s *Service) listError(err error) error {
	if errors.Is(err, ErrCorrupt) {
		s.distrust(err)
	}
	return fmt.Errorf("list: %w", err)
}

func checkPrefix(prefix string) error {
	switch {
	case len(prefix) > maxKey:
		return &LimitError{What: "prefix bytes", Limit: maxKey, Got: int64(len(prefix))}
	case !utf8.ValidString(prefix) || strings.Contains(prefix, "\x00"):
		return fmt.Errorf("%w: prefix %q: a prefix is valid UTF-8 and holds no NUL", ErrInvalid, prefix)
	}
	return nil
}

// A span is what a list is asked for.
type span struct {
	prefix, from     string // from is where it begins, if hasFrom
	hasFrom, reverse bool
	limit            int // entries; negative = no limit
}

// A keyRange is what is left of a span: low <= key < high, and at most so many entries. Neither bound need be valid UTF-8.
type keyRange struct {
	low, high string
	reverse   bool
	left      int // entries; negative = no limit
}

func (sp span) keys() keyRange {
	r := keyRange{low: sp.prefix, high: "\xff", reverse: sp.reverse, left: sp.limit} // no key begins with this byte
	if n := len(sp.prefix); n > 0 {
		r.high = sp.prefix[:n-1] + string([]byte{sp.prefix[n-1] + 1}) // no byte of UTF-8 is 0xff
	}
	switch {
	case !sp.hasFrom:
	case sp.reverse:
		r.high = min(r.high, after(sp.from))
	default:
		r.low = max(r.low, fromKey(sp.from))
	}
	return r
}

// after is the least string above key that a key can be, as none holds a NUL.
func after(key string) string {
	key, _, _ = strings.Cut(key, "\x00")
	return key + "\x01"
}

// fromKey is the least string from s on that a key can be: SQLite is never given a NUL.
func fromKey(s string) string {
	if strings.Contains(s, "\x00") {
		return after(s)
	}
	return s
}

// behind is what is left behind a page.
func (r keyRange) behind(p page) keyRange {
	if r.left >= 0 {
		r.left -= len(p.rows)
	}
	if n := len(p.rows); n > 0 && r.reverse {
		r.high = p.rows[n-1].key
	} else if n > 0 {
		r.low = after(p.rows[n-1].key)
	}
	return r
}

// A page is rows of a range in the order of the list.
type page struct {
	rows []keyed
	last bool // nothing comes behind them
}

// treePage is the first page of a range, in the memory of rows. It shares the items.
func treePage(t *btree.Map[string, *item], r keyRange, rows []keyed) page {
	p, size := page{rows: rows[:0], last: true}, 0
	take := func(key string, it *item) bool {
		switch {
		case len(p.rows) == r.left || key < r.low:
			return false
		case key >= r.high:
			return r.reverse // Descend begins at the bound itself
		case len(p.rows) == listPageRows || size >= listPageBytes:
			p.last = false
			return false
		}
		p.rows, size = append(p.rows, keyed{key, it}), size+len(key)+len(it.value)
		return true
	}
	if r.reverse {
		t.Descend(r.high, take)
	} else {
		t.Ascend(r.low, take)
	}
	return p
}

// A listing is one consumer's place among the rows of one moment. next and close are for one goroutine at a time; the store may
// end it, or move what it holds into a file, in between.
type listing struct {
	revision uint64 // of the state at its moment

	s      *store
	before int64       // the WAL's size when its transaction began
	pins   atomic.Bool // it has a transaction

	mu   sync.Mutex // guards the fields below; held across I/O, a page at a time: next and the store read from the same rows
	page page       // what next returns; behind the last one nothing is held any more
	at   int        // how many of its rows were returned
	err  error      // what next returns from now on

	// What holds the moment, for the pages to come: a snapshot, or a transaction, or a file and what the transaction still has.
	tree    *btree.Map[string, *item]
	left    keyRange // of tree
	c       *conn
	rows    driver.Rows
	file    *os.File
	taken   int64  // bytes of file that were read
	spooled int64  // bytes of file
	buf     []byte // for writing to it, reused
	slot    bool   // one of the store's lists is taken

	steps, seen uint64        // calls of next; as of the last tend
	idle        time.Duration // for so long there was none
}

// list begins a listing of this moment. The wait for others that are read from SQLite ends with ctx. An error that is ErrCorrupt,
// here or of next, says that this copy of the state must be replaced.
func (s *store) list(ctx context.Context, sp span) (*listing, error) {
	select {
	case <-s.ending: // the copy in memory is still there
		return nil, ErrClosed
	default:
	}
	l, r := &listing{s: s}, sp.keys()
	begun := false
	defer func() { // also if ctx, which is the caller's, panics
		if !begun {
			l.close()
		}
	}()
	var whole bool
	var err error
	if l.page, l.tree, l.revision, whole = s.memory.list(r); !whole {
		err = l.open(ctx, r)
	} else if l.tree != nil {
		l.left = r.behind(l.page)
		err = s.hold(l)
	}
	if err != nil {
		return nil, err
	}
	begun = true
	return l, nil
}

// open begins a transaction on one of the readers. If the first page is not all, the listing needs a slot; if there is none, it
// gives the reader back, and begins anew when there is.
func (l *listing) open(ctx context.Context, r keyRange) error {
	for {
		if err := l.s.sync(ctx); err != nil {
			return err
		}
		done, err := l.tryOpen(r)
		if done || err != nil {
			return err
		}
		select {
		case l.s.lists <- struct{}{}:
			l.slot = true
		case <-ctx.Done():
			return fmt.Errorf("%d long lists are open: %w", maxLists, context.Cause(ctx))
		case <-l.s.ending:
			return ErrClosed
		}
	}
}

func (l *listing) tryOpen(r keyRange) (done bool, err error) {
	if l.c, err = l.s.borrow(); err != nil {
		return false, err
	}
	err = l.begin(r)
	if err == nil && !l.page.last && l.takeSlot() {
		l.s.readers <- nil // another one will be opened in its place
		l.pins.Store(true)
		return true, l.s.hold(l)
	}
	l.giveBack()
	if l.page.last { // it had waited for a slot, and the rows have become few
		l.dropSlot()
	}
	return l.page.last, l.s.explain("list", err)
}

func (l *listing) begin(r keyRange) error {
	l.before = l.s.walSize()
	if err := l.c.exec(qBeginRead); err != nil {
		return err
	}
	m, err := l.c.readMeta() // and with it the snapshot, which BEGIN alone does not take
	if err != nil {
		return err
	}
	l.revision = m.revision
	q := qList
	if r.reverse {
		q = qListReverse
	}
	if l.rows, err = l.c.query(q, r.low, r.high, int64(r.left)); err != nil {
		return err
	}
	l.page, err = l.readRows(nil)
	return err
}

// takeSlot does not wait.
func (l *listing) takeSlot() bool {
	if !l.slot {
		select {
		case l.s.lists <- struct{}{}:
			l.slot = true
		default:
		}
	}
	return l.slot
}

func (l *listing) dropSlot() {
	if l.slot {
		<-l.s.lists
		l.slot = false
	}
}

// giveBack ends the transaction and returns the reader to the pool.
func (l *listing) giveBack() {
	if l.rows != nil {
		l.rows.Close()
	}
	c := l.c
	if err := c.exec(qRollback); err != nil { // it had not begun, or something worse
		c.close()
		c = nil
	}
	l.s.readers <- c
	l.c, l.rows = nil, nil
}

// next returns the next row. After an error, or when there is no more, nothing is held any more. Errors: ErrSlow, ErrClosed,
// ErrCorrupt, the disk's.
func (l *listing) next() (k keyed, more bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steps++
	if l.err == nil && l.at == len(l.page.rows) && l.page.last {
		return keyed{}, false, nil
	}
	select {
	case <-l.s.ending:
		l.endLocked(ErrClosed)
	default:
	}
	if l.err == nil && l.at == len(l.page.rows) {
		l.turnLocked()
	}
	if l.err != nil || len(l.page.rows) == 0 {
		return keyed{}, false, l.err
	}
	l.at++
	return l.page.rows[l.at-1], true, nil
}

// turnLocked reads the next page. Only the last one may be empty.
func (l *listing) turnLocked() {
	p, err := l.fillLocked(l.page.rows[:0])
	if err != nil {
		l.endLocked(l.s.explain("list", err))
		return
	}
	l.page, l.at = p, 0
	if p.last {
		l.releaseLocked()
	}
}

func (l *listing) fillLocked(rows []keyed) (page, error) {
	switch {
	case l.tree != nil:
		p := treePage(l.tree, l.left, rows)
		l.left = l.left.behind(p)
		return p, nil
	case l.taken < l.spooled:
		p, err := l.unspool(rows)
		p.last = l.taken == l.spooled && l.c == nil
		return p, err
	case l.c != nil:
		return l.readRows(rows)
	}
	return page{last: true}, nil // the file was the last one's, and it was empty
}

// readRows reads a page, in the memory of rows.
func (l *listing) readRows(rows []keyed) (page, error) {
	var v [5]driver.Value
	for size := 0; len(rows) < listPageRows && size < listPageBytes; {
		if err := l.rows.Next(v[:]); err == io.EOF {
			return page{rows, true}, nil
		} else if err != nil {
			return page{}, err
		}
		k, err := l.c.keyed(v[:])
		if err != nil {
			return page{}, err
		}
		rows, size = append(rows, k), size+len(k.key)+len(k.value)
	}
	return page{rows, false}, nil
}

func (l *listing) pinned() bool { return l.pins.Load() }

// tend lets go of the WAL if the listing has kept too much of it, and of everything if its consumer has taken nothing for too long.
func (l *listing) tend(passed time.Duration) {
	if l.pinned() && l.grown() > pinLimit {
		for l.spool() {
			l.cede()
		}
	}
	if !l.mu.TryLock() {
		return // something is being taken
	}
	defer l.mu.Unlock()
	switch {
	case l.steps != l.seen:
		l.seen, l.idle = l.steps, 0
	case l.err == nil && !l.page.last:
		if l.idle += passed; l.idle >= slowLimit {
			l.endLocked(ErrSlow)
		}
	}
}

// grown is by how much the WAL is longer than when the transaction began, which keeps it from restarting.
func (l *listing) grown() int64 { return l.s.walSize() - l.before }

// cede: moving a large state into a file, or many states one after the other, may take so long that the WAL grows past all bounds
// meanwhile. Then a consumer that has taken nothing of late gives way.
func (l *listing) cede() {
	if l.grown() <= pinMost {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.c != nil && l.steps == l.seen {
		l.endLocked(fmt.Errorf("%w: it keeps the write-ahead log, to which %d MiB were added meanwhile", ErrSlow, pinMost>>20))
	}
}

// spool moves one page from the transaction into the file. It does not wait for the consumer, nor the consumer for the whole: next
// reads the file's pages, and when it has caught up, the transaction's.
func (l *listing) spool() (more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.s.ending:
		return false
	default:
	}
	if l.c == nil {
		return false
	}
	p, err := l.readRows(make([]keyed, 0, listPageRows))
	if err == nil {
		err = l.writePage(p)
	}
	if err != nil {
		l.endLocked(l.s.explain("list", err))
		return false
	}
	if p.last {
		l.endTransaction()
		l.buf = nil
	}
	return !p.last
}

// writePage appends a page to the file: its length, and of each row the key, the value, version, created and hash.
func (l *listing) writePage(p page) (err error) {
	if l.file == nil {
		if l.file, err = spoolFile(l.s.path); err != nil {
			return slowly(err)
		}
	}
	b := append(l.buf[:0], 0, 0, 0, 0)
	for _, k := range p.rows {
		b = binary.AppendUvarint(b, uint64(len(k.key)))
		b = append(b, k.key...)
		b = binary.AppendUvarint(b, uint64(len(k.value)))
		b = append(b, k.value...)
		for _, n := range []uint64{k.version, k.created, k.hash} {
			b = binary.AppendUvarint(b, n)
		}
	}
	l.buf = b
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	if _, err := l.file.WriteAt(b, l.spooled); err != nil {
		return slowly(err)
	}
	l.spooled += int64(len(b))
	return nil
}

func slowly(err error) error {
	return fmt.Errorf("%w: what it has not taken yet does not go into a file: %w", ErrSlow, err)
}

// unspool reads the next page of the file. Nothing but the hashes tells whether the disk has kept it.
func (l *listing) unspool(rows []keyed) (p page, err error) {
	var head [4]byte
	if _, err := l.file.ReadAt(head[:], l.taken); err != nil {
		return p, fmt.Errorf("read back: %w", err)
	}
	data := make([]byte, min(int64(binary.BigEndian.Uint32(head[:])), l.spooled-l.taken-4))
	if _, err := l.file.ReadAt(data, l.taken+4); err != nil {
		return p, fmt.Errorf("read back: %w", err)
	}
	l.taken += int64(len(head) + len(data))
	for r := (reader{b: data}); len(r.b) > 0; {
		k := keyed{string(r.bytes(maxKey)), &item{row: row{value: string(r.bytes(maxValueEver)), version: r.uint(), created: r.uint()}, hash: r.uint()}}
		var h uint64
		if l.buf, h = rowHash(l.buf, k.key, k.value, k.version, k.created); r.bad || h != k.hash {
			return p, errors.New("read back: the file does not hold what was written to it")
		}
		rows = append(rows, k)
	}
	return page{rows: rows}, nil
}

// close gives back what is still held. It may be called at any time, more than once.
func (l *listing) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endLocked(ErrClosed)
}

func (l *listing) endLocked(err error) {
	if l.err == nil {
		l.err, l.page, l.at = err, page{last: true}, 0
		l.releaseLocked()
	}
}

func (l *listing) releaseLocked() {
	l.tree = nil
	l.endTransaction()
	if l.file != nil {
		dropSpool(l.file)
		l.file, l.buf = nil, nil
	}
	l.dropSlot()
	l.s.letGo(l)
}

func (l *listing) endTransaction() {
	if l.c == nil {
		return
	}
	l.rows.Close()
	l.c.close()
	l.c, l.rows = nil, nil
	l.pins.Store(false)
}
