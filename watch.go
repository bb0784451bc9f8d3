package quorate

// Watching: every change under a prefix, in order, each once. This file owns the hub, which keeps the newest changes in memory
// and knows which prefixes are watched, and the loop that each watcher runs in its caller's goroutine: it takes changes from
// the hub, from the history on disk when it is behind that, and the entries from a list when it begins anew. The commits of
// sqlstore.go publish to the hub; nothing here writes, and nobody who watches can make a commit wait for him.

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidwall/btree"
)

const (
	recentChanges = 4096        // kept in memory while somebody watches
	recentBytes   = 4 << 20     // of them; the newest is kept whatever its size
	recentScan    = 256         // changes that a watcher looks at before it lets a commit in
	heldBytes     = 64 << 20    // of changes read from disk that slow consumers keep, all watchers together, before they take one at a time
	directRings   = 64          // watchers that a commit itself wakes; more are left to the ringer
	troubleCheck  = time.Second // how often a watcher looks whether the trouble is over, if nothing tells it
)

// An EventKind says what an Event reports.
type EventKind int

const (
	EventReset  EventKind = iota + 1 // forget what is known of the prefix: its entries follow as EventSet, up to EventSynced
	EventSet                         // Entry was set
	EventDelete                      // Entry.Key was deleted
	EventSynced                      // the entries have been delivered, as they were at Revision; changes follow
)

func (k EventKind) String() string {
	switch k {
	case EventReset:
		return "reset"
	case EventSet:
		return "set"
	case EventDelete:
		return "delete"
	case EventSynced:
		return "synced"
	}
	return fmt.Sprintf("EventKind(%d)", int(k))
}

// An Event is a change, or a step of a watch that begins anew.
type Event struct {
	Kind EventKind
	// Revision is where to resume: Watch(ctx, prefix, Revision) delivers what comes after this event. It is 0, and resuming
	// begins anew, from EventReset until EventSynced.
	Revision uint64
	Last     uint64 // last revision under the prefix of the same transaction: buffer until Revision == Last to see it whole
	Entry    Entry  // a copy; of a deletion the Key only
	Previous uint64 // Version of the entry that was replaced or deleted; 0 = absent, or not known between EventReset and EventSynced
}

// A WatchOption changes how Watch works.
type WatchOption func(*watchOptions)

type watchOptions struct{ resync bool }

// Resync: where the history does not reach back to since, or to the place of a consumer that was too slow, the watch goes on
// with EventReset and the entries as they are now, instead of ending with a *CompactedError. The same goes for a since that the
// cluster has not reached.
func Resync() WatchOption { return func(o *watchOptions) { o.resync = true } }

// Watch delivers the changes of all keys that begin with prefix ("" = all keys), in order, each once, and waits for the next;
// it never ends without an error unless the loop is left.
//
// since is the Revision of the last event that was handled: every change after it follows, on whichever member, across
// restarts and changes of the leader. 0 begins anew: EventReset, the current entries in the order of their keys as EventSet,
// EventSynced, then every change after that. The entries are those of one point in time; what has changed meanwhile follows.
// The watch begins with a read round, so that it includes every write that returned before; it waits for that round as long as
// ctx allows, and Config.Timeout does not limit it.
//
// The error comes last, once, with a zero Event, and a loop of the form "for e := range" drops it: ctx's cause (and ErrNoLeader, if no majority had answered by then); a
// *CompactedError if the history (Config.History) does not reach back to since, also later on when the consumer is that far
// behind; ErrSlow if the consumer takes no entry between EventReset and EventSynced for a minute; ErrInvalid and a LimitError
// for the prefix (valid UTF-8 without NUL, at most 4 KiB), and ErrInvalid for a since that the cluster has not reached; ErrClosed, ErrRemoved, the error of
// a failed disk or of files that were removed; ErrCorrupt if the rows are damaged and there is no other member to mend them. Watching again from the last Revision is safe after any error, and loses nothing if the
// history reaches back to it.
//
// A watch costs its caller's goroutine and a few hundred bytes. A slow consumer holds up neither writes nor other watchers:
// what it has not taken yet is read from disk. Ranging over the result again starts again at since.
func (s *Service) Watch(ctx context.Context, prefix string, since uint64, opts ...WatchOption) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		var o watchOptions
		for _, f := range opts {
			f(&o)
		}
		w := &watcher{s: s, ctx: ctx, yield: yield, prefix: prefix, cursor: since, anew: since == 0, resync: o.resync}
		if err := w.run(); err != nil {
			yield(Event{}, fmt.Errorf("watch: %w", err))
		}
	}
}

// A watcher is one loop over a Watch.
type watcher struct {
	s      *Service
	ctx    context.Context
	yield  func(Event, error) bool
	prefix string
	resync bool

	crowd  *crowd
	cursor uint64 // every change up to here was delivered, or is none of this prefix
	anew   bool   // the entries come first
}

var errLeft = errors.New("the loop was left")

// run returns why the watch ends, or nil if the loop was left.
func (w *watcher) run() error {
	if err := checkPrefix(w.prefix); err != nil {
		return err
	}
	if err := w.enter(); err != nil {
		return err
	}
	w.crowd = w.s.hub.join(w.prefix)
	defer w.s.hub.leave(w.crowd)
	if err := w.place(); err != nil {
		return err
	}
	for {
		err := w.fit()
		if err == nil && w.anew {
			err = w.entries()
		} else if err == nil {
			err = w.changes()
		}
		switch {
		case err == errLeft:
			return nil
		case errors.Is(err, ErrCompacted) && w.resync:
			w.anew = true
		case err != nil:
			return err
		}
	}
}

// enter is the read round. A member that is being rebuilt, or must be, answers none, and is waited for.
func (w *watcher) enter() error {
	for {
		if err := w.fit(); err != nil {
			return err
		}
		err := w.s.catchUp(w.ctx)
		if _, damage := w.s.store.verified(); damage != nil {
			w.s.distrust(damage) // nobody may have been told of it yet
		}
		if err == nil || w.ctx.Err() != nil || w.s.refusesReads() == nil && !errors.Is(err, ErrCorrupt) {
			return err
		}
	}
}

// place checks that the watch can go on from its cursor.
func (w *watcher) place() error {
	m := w.s.store.meta()
	oldest := m.oldest()
	switch {
	case w.anew, oldest <= w.cursor && w.cursor <= m.revision:
	case w.resync:
		w.anew = true
	case w.cursor < oldest:
		return &CompactedError{Oldest: oldest}
	default:
		return fmt.Errorf("%w: since is %d and the newest revision is %d: is it of this cluster?", ErrInvalid, w.cursor, m.revision)
	}
	return nil
}

// fit returns at once while all is well, and waits while something is wrong that will be mended.
func (w *watcher) fit() error {
	for {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		if w.s.refusesReads() == nil {
			return nil
		}
		changed := w.s.changes.wait()
		err := w.s.refusesReads()
		if err == nil || !w.s.mends() {
			return err
		}
		select {
		case <-changed:
		case <-time.After(troubleCheck):
		case <-w.ctx.Done():
		}
	}
}

// mends tells whether what makes this member refuse reads may pass without a restart.
func (s *Service) mends() bool {
	if s.faults.first(faultClosed, faultRemoved, faultLog, faultApply, faultGone) != nil {
		return false
	}
	if s.faults.first(faultState) == nil {
		return true
	}
	return !s.onlyVoter() // alone there is nobody to rebuild it from
}

// deliver is the only way to the loop's body.
func (w *watcher) deliver(e Event) error {
	if !w.yield(e, nil) {
		return errLeft
	}
	return nil
}

// entries is the first part of a watch that begins anew. If the member can't serve reads meanwhile, it begins once more.
func (w *watcher) entries() error {
	if err := w.deliver(Event{Kind: EventReset}); err != nil {
		return err
	}
	l, err := w.s.store.list(w.ctx, span{prefix: w.prefix, limit: -1})
	if err != nil {
		return w.damage(err)
	}
	defer l.close()
	for w.s.refusesReads() == nil {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		r, ok, err := l.next()
		if err != nil {
			return w.damage(err)
		}
		if !ok {
			l.close()
			w.cursor, w.anew = l.revision, false
			return w.deliver(Event{Kind: EventSynced, Revision: l.revision, Last: l.revision})
		}
		if err := w.deliver(Event{Kind: EventSet, Entry: r.entry()}); err != nil {
			return err
		}
	}
	return nil
}

// damage hides an error that a rebuild mends: fit waits for it, or returns the error if there is nobody to rebuild from.
func (w *watcher) damage(err error) error {
	if errors.Is(err, ErrCorrupt) {
		w.s.distrust(err)
		return nil
	}
	return err
}

// changes delivers what comes after the cursor and waits for more.
func (w *watcher) changes() error {
	for {
		if err := w.fit(); err != nil {
			return err
		}
		n := w.s.hub.next(w.crowd, w.cursor)
		w.cursor = n.cursor
		var err error
		switch {
		case n.behind:
			err = w.reread()
		case n.bell != nil:
			w.wait(n.bell)
		case n.change.revision != 0:
			err = w.deliver(n.change.event())
		}
		if err != nil {
			return err
		}
	}
}

// wait returns when the bell rings, ctx ends or the member serves no reads: what makes it so rings later than that, or not at all.
func (w *watcher) wait(b *bell) {
	if w.s.refusesReads() != nil {
		return
	}
	select {
	case <-b.rung:
		w.cursor = max(w.cursor, b.first-1)
	case <-w.ctx.Done():
	}
}

// reread delivers a stretch of the history on disk.
func (w *watcher) reread() error {
	p, err := w.stretch()
	if err != nil {
		return w.damage(err)
	}
	defer w.s.hub.held.Add(-p.size)
	for _, c := range p.changes {
		switch {
		case w.ctx.Err() != nil:
			return context.Cause(w.ctx)
		case w.s.refusesReads() != nil:
			return nil
		}
		w.cursor = c.revision
		if err := w.deliver(c.event()); err != nil {
			return err
		}
	}
	w.cursor = p.upTo
	return nil
}

// A stretch of the history is what was read from disk for one watcher: the changes under its prefix, up to a revision.
type stretch struct {
	changes []past
	upTo    uint64
	size    int64
}

// stretch reads on from the cursor. Its consumer may keep it for long: when all of them keep much, it is cut to one change.
func (w *watcher) stretch() (stretch, error) {
	h := w.s.hub
	select {
	case h.reading <- struct{}{}:
		defer func() { <-h.reading }()
	case <-w.ctx.Done():
		return stretch{}, context.Cause(w.ctx)
	}
	list, err := w.s.store.changes(w.ctx, w.cursor)
	if err != nil {
		return stretch{}, err
	}
	if len(list) == 0 {
		return stretch{}, corrupt("the history ends at revision %d", w.cursor)
	}
	p := stretch{upTo: list[len(list)-1].revision, changes: under(w.prefix, list)}
	for _, c := range p.changes {
		p.size += pastSize(c)
	}
	if h.held.Add(p.size) > heldBytes && len(p.changes) > 1 {
		first := p.changes[0]
		h.held.Add(pastSize(first) - p.size)
		p = stretch{changes: []past{first}, upTo: first.revision, size: pastSize(first)}
	}
	return p, nil
}

// under picks the changes under a prefix out of a page that holds whole transactions, and gives them its last one for theirs.
func under(prefix string, list []past) []past {
	kept := list[:0]
	for _, c := range list {
		if strings.HasPrefix(c.key, prefix) {
			kept = append(kept, c)
		}
	}
	end, last := uint64(0), uint64(0) // of the transaction at hand: by all changes, and by those that are kept
	for i := len(kept) - 1; i >= 0; i-- {
		if c := &kept[i]; c.last != end {
			end, last = c.last, c.revision
		}
		kept[i].last = last
	}
	return kept
}

func pastSize(p past) int64 {
	n := int64(len(p.key)) + itemOverhead
	if p.now != nil {
		n += int64(len(p.now.value))
	}
	return n
}

func (p past) event() Event {
	e := Event{Kind: EventDelete, Revision: p.revision, Last: p.last, Entry: Entry{Key: p.key}, Previous: p.previous}
	if p.now != nil {
		e.Kind, e.Entry = EventSet, keyed{p.key, p.now}.entry()
	}
	return e
}

// The hub is where commits and watchers meet. A watcher that has nothing to do waits at its crowd's bell; the commit of a
// change under the crowd's prefix rings it, and then every watcher takes the changes itself, at its own pace.
type hub struct {
	revision func() uint64 // the newest that is committed

	watchers atomic.Int64  // that are here; a commit asks it first. Changes only under mu
	reading  chan struct{} // holds a token per watcher that reads from disk: Gets need the store's readers too
	held     atomic.Int64  // bytes of all pages that consumers have not finished

	ringing chan struct{} // bells wait for the ringer

	// mu is taken by commits, which hold the store's mu, so nothing waits and no file is touched under it. Watchers hold it
	// for reading.
	mu     sync.RWMutex // guards the fields below
	newest uint64       // revision up to which changes were published, or were there when the first watcher came
	recent recent
	crowds btree.Map[string, *crowd] // by prefix
	bells  []*bell                   // for the ringer
	direct bool                      // there is no ringer any more
}

// A crowd is everybody who watches one prefix.
type crowd struct {
	prefix   string
	watchers int
	last     uint64               // every change under prefix that is not newer than hub.newest has a revision up to this
	bell     atomic.Pointer[bell] // for those who wait; nil = nobody does. Set under mu held for reading, taken under mu
}

// A bell rings once.
type bell struct {
	rung  chan struct{}
	first uint64 // revision of the change that rang it: none before it concerns those who wait
}

func newHub(revision func() uint64) *hub {
	return &hub{
		revision: revision,
		reading:  make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		ringing:  make(chan struct{}, 1),
		recent:   recent{most: recentChanges},
	}
}

// join: what the first watcher does not find in the hub, it reads from disk. The order matters: a commit is visible before it
// asks for watchers, so it either finds this one, or is part of the revision that this one takes for the newest.
func (h *hub) join(prefix string) *crowd {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watchers.Add(1) == 1 {
		h.newest = h.revision()
	}
	c, ok := h.crowds.Get(prefix)
	if !ok {
		c = &crowd{prefix: strings.Clone(prefix), last: h.newest}
		h.crowds.Set(c.prefix, c)
	}
	c.watchers++
	return c
}

func (h *hub) leave(c *crowd) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.watchers--; c.watchers == 0 {
		h.crowds.Delete(c.prefix)
	}
	if h.watchers.Add(-1) == 0 {
		h.recent.forget()
	}
}

// next is what a watcher does next: deliver change, if it has a revision; or wait for bell, if there is one; or read from disk,
// if it is behind; or ask again. In any case it has the changes up to cursor behind it.
type next struct {
	change past
	cursor uint64
	bell   *bell
	behind bool
}

func (h *hub) next(c *crowd, cursor uint64) next {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if c.last <= cursor {
		return next{cursor: max(cursor, h.newest), bell: c.await()}
	}
	i, ok := h.recent.find(cursor + 1)
	if !ok {
		return next{cursor: cursor, behind: true}
	}
	for end := min(i+recentScan, h.recent.n); i < end; i++ {
		p := *h.recent.at(i)
		cursor = p.revision
		if strings.HasPrefix(p.key, c.prefix) {
			p.last = h.recent.lastUnder(c.prefix, i)
			return next{cursor: cursor, change: p}
		}
	}
	return next{cursor: cursor}
}

func (c *crowd) await() *bell {
	for {
		if b := c.bell.Load(); b != nil {
			return b
		}
		c.bell.CompareAndSwap(nil, &bell{rung: make(chan struct{})})
	}
}

// publish is called by every commit, in order.
func (h *hub) publish(_ uint64, changes []past) {
	if h.watchers.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watchers.Load() == 0 { // the last one has just left: what is kept for nobody would not go on without a gap when one comes
		return
	}
	for _, p := range changes {
		if p.revision <= h.newest { // committed when the first watcher came
			continue
		}
		if p.revision != h.newest+1 {
			h.recent.forget()
		}
		h.recent.add(p)
		h.newest = p.revision
		h.callLocked(p)
	}
	h.wakeRingerLocked()
}

// callLocked rings for everybody who watches a prefix of the key. From the greatest prefix that is not greater than the key it
// goes down: what begins the key below one that does not is no longer than what the two share.
func (h *hub) callLocked(p past) {
	for pivot, more := p.key, true; more; {
		more = false
		h.crowds.Descend(pivot, func(prefix string, c *crowd) bool {
			n := shared(prefix, p.key)
			if n == len(prefix) {
				c.last = p.revision
				h.ringLocked(c, p.revision)
				return true // the next one down may be a prefix of this one
			}
			pivot, more = p.key[:n], true
			return false
		})
	}
}

// shared is the length of the longest common prefix.
func shared(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// replaced is called when other rows have taken the place of those that were there: what led to them is in their history.
func (h *hub) replaced(revision uint64) {
	if h.watchers.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	first := h.newest + 1
	h.newest = revision
	h.recent.forget()
	h.crowds.Scan(func(_ string, c *crowd) bool {
		c.last = revision
		h.ringLocked(c, first)
		return true
	})
	h.wakeRingerLocked()
}

// wake has every watcher look at how its member is.
func (h *hub) wake() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.crowds.Scan(func(_ string, c *crowd) bool {
		h.ringLocked(c, h.newest+1)
		return true
	})
	h.wakeRingerLocked()
}

func (h *hub) ringLocked(c *crowd, first uint64) {
	b := c.bell.Swap(nil)
	if b == nil {
		return
	}
	b.first = first
	if c.watchers <= directRings || h.direct {
		close(b.rung)
		return
	}
	h.bells = append(h.bells, b)
}

func (h *hub) wakeRingerLocked() {
	if len(h.bells) == 0 {
		return
	}
	select {
	case h.ringing <- struct{}{}:
	default:
	}
}

// ring wakes the large crowds, so that a commit need not: making ten thousand goroutines ready takes milliseconds. It runs
// until Close; from then on every bell is rung at once.
func (h *hub) ring(ctx context.Context) {
	for {
		ending := false
		select {
		case <-h.ringing:
		case <-ctx.Done():
			ending = true
		}
		h.mu.Lock()
		bells := h.bells
		h.bells, h.direct = nil, ending
		h.mu.Unlock()
		for _, b := range bells {
			close(b.rung)
		}
		if ending {
			return
		}
	}
}

// recent holds the newest changes, without a gap between them, in a circle that grows with them.
type recent struct {
	most     int    // changes; a power of two
	list     []past // as long as a power of two, or empty
	first, n int    // of the oldest, and how many
	size     int64
}

func (r *recent) at(i int) *past { return &r.list[(r.first+i)&(len(r.list)-1)] }

// find is the place of a revision; false: it is older than what is held, or newer.
func (r *recent) find(revision uint64) (int, bool) {
	if r.n == 0 || revision < r.at(0).revision || revision-r.at(0).revision >= uint64(r.n) {
		return 0, false
	}
	return int(revision - r.at(0).revision), true
}

// lastUnder is the last revision under the prefix of the transaction that the change at i belongs to. A commit publishes whole
// transactions, so the rest of this one is here.
func (r *recent) lastUnder(prefix string, i int) (revision uint64) {
	for end := r.at(i).last; i < r.n && r.at(i).revision <= end; i++ {
		if p := r.at(i); strings.HasPrefix(p.key, prefix) {
			revision = p.revision
		}
	}
	return revision
}

func (r *recent) add(p past) {
	if r.n == len(r.list) && r.n < r.most {
		list := make([]past, min(max(16, 2*r.n), r.most))
		for i := range r.n {
			list[i] = *r.at(i)
		}
		r.list, r.first = list, 0
	}
	if r.n == r.most {
		r.drop()
	}
	r.n++
	*r.at(r.n - 1) = p
	r.size += pastSize(p)
	for r.size > recentBytes && r.n > 1 {
		r.drop()
	}
}

func (r *recent) forget() { *r = recent{most: r.most} }

func (r *recent) drop() {
	p := r.at(0)
	r.size -= pastSize(*p)
	*p = past{}
	r.first, r.n = (r.first+1)&(len(r.list)-1), r.n-1
}
