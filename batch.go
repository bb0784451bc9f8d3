package quorate

// The batcher: all transactions that wait at this member travel together in one raft entry, and each of them takes effect
// at most once however often its batch is sent. It owns this member's session, the numbers of its batches and the verdict
// on each caller's write: done, not applied, or uncertain. Calls come from db.go; entries go out through the propose
// function, to raft when this member leads and to the leader otherwise; answers come back from this member's own apply or
// from the leader. It knows nothing of SQL, HTTP, or what a transaction means.

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"
)

const (
	slots        = 2                      // batches in flight
	slotAfter    = 5 * time.Millisecond   // the second goes out beside the first if that takes longer
	gatherFrom   = 4                      // answers at once
	gatherTime   = 500 * time.Microsecond // at most
	gatherPause  = 50 * time.Microsecond  // without another one
	gatherYields = 1000                   // a bubble's clock stands still meanwhile
	queueLimit   = 16384                  // transactions that wait; then callers wait, until their context ends
	queueBytes   = 32 << 20               // the same in bytes
	resendMin    = 20 * time.Millisecond
	resendMax    = time.Second
	callerWaits  = 5 * time.Millisecond // for raft's main loop, in a caller's goroutine; then a slot does
	window       = 64                   // batches beyond the oldest that is not settled: their answers are kept by every member until it is
)

type batcher struct {
	// propose sends an entry towards the log. sent tells, with an error, whether the entry may be in the log all the same.
	propose func(ctx context.Context, data []byte) (o outcome, sent bool, err error)
	// begin hands an entry to raft at once and returns the function that waits for its outcome, or nil if this member does
	// not lead. It saves a lone writer one switch of goroutines.
	begin   func(data []byte, patience time.Duration) func(ctx context.Context) (outcome, bool, error)
	changed func() <-chan struct{} // closed when the leader, as this member knows it, changes
	noLead  func() bool            // no leader is known
	format  func() uint64          // in which this member writes
	// applied waits until this member has applied the entry of this index and term, which is committed.
	applied func(ctx context.Context, index, term uint64) error

	ctx  context.Context // ends at Close
	work chan *flight    // to the goroutines that run carry, one per slot
	used sync.Pool       // of pendings that have their answer: a write would leave half a KiB to the garbage collector

	mu        sync.Mutex // guards the fields below; never held across I/O
	queue     []*pending
	bytes     int                // of queue
	left      int                // in queue, those whose callers have left
	room      []chan struct{}    // callers that wait for room in the queue
	idle      int                // slots that carry nothing
	formed    time.Time          // when the newest batch was formed
	gathering bool               // a slot is about to form the next one
	looking   bool               // lookAgain is due
	session   uint64             // 0 = not open
	reopen    chan struct{}      // closed when the session is lost; made anew with each session
	seq       uint64             // the newest that was given
	active    map[*flight]bool   // formed and not settled
	flights   map[uint64]*flight // those of active that have a seq
	closed    error              // why nothing is accepted any more
}

// pending is one caller's transaction.
type pending struct {
	data   []byte        // encoded
	flight *flight       // nil while it waits in the queue
	gone   bool          // its caller has left with ErrNotApplied: never send it
	done   chan struct{} // gets a token, once, when res and err are final and nobody but the caller knows the pending any more
	res    result
	err    error
}

const keepData = 4 << 10 // bytes; larger transactions are rare, and their memory is given back

// flight is one batch on its way. The batcher's mu guards it.
type flight struct {
	txs       []*pending
	size      int // of txs, when it was formed
	session   uint64
	seq       uint64 // given at the first send and never dropped after it; 0 = not sent yet
	onWire    bool
	uncertain bool                                         // a send ended without a clear answer: the entry may be in the log
	settled   chan struct{}                                // closed when every transaction has its answer
	wait      func(context.Context) (outcome, bool, error) // of a send that the caller has begun
	cancel    context.CancelCauseFunc                      // ends the send under way
}

func newBatcher(ctx context.Context) *batcher {
	return &batcher{ctx: ctx, work: make(chan *flight, slots), idle: slots, active: make(map[*flight]bool),
		flights: make(map[uint64]*flight), reopen: make(chan struct{})}
}

// submit carries one transaction to the log and returns its result. Its errors are ErrNotApplied or ErrUncertain, with the
// cause wrapped beside.
func (b *batcher) submit(ctx context.Context, tx transaction) (result, error) {
	p, _ := b.used.Get().(*pending)
	if p == nil {
		p = &pending{done: make(chan struct{}, 1)}
	}
	p.data = appendTransaction(slices.Grow(p.data[:0], transactionSize(tx)), tx)
	f, err := b.enqueue(ctx, p)
	if err != nil {
		return result{}, err
	}
	if f != nil {
		b.launch(f)
	}
	select {
	case <-p.done:
		res, err := p.res, p.err
		if cap(p.data) <= keepData {
			*p = pending{data: p.data, done: p.done}
			b.used.Put(p)
		}
		return res, err
	case <-ctx.Done():
		return b.abandon(ctx, p)
	}
}

// enqueue returns a flight that the caller must launch, if a slot was idle.
func (b *batcher) enqueue(ctx context.Context, p *pending) (*flight, error) {
	b.mu.Lock()
	for b.closed == nil && b.fullLocked(len(p.data)) {
		c := make(chan struct{})
		b.room = append(b.room, c)
		b.mu.Unlock()
		select {
		case <-c:
		case <-ctx.Done():
			return nil, notApplied(fmt.Errorf("the queue of writes is full: %w", b.leaderless(context.Cause(ctx))))
		}
		b.mu.Lock()
	}
	defer b.mu.Unlock()
	if b.closed != nil {
		return nil, notApplied(b.closed)
	}
	if err := ctx.Err(); err != nil {
		return nil, notApplied(err)
	}
	b.queue = append(b.queue, p)
	b.bytes += len(p.data)
	return b.takeLocked(), nil
}

// fullLocked makes room by forgetting those who have left, but not for each newcomer: it goes through the whole queue.
func (b *batcher) fullLocked(size int) bool {
	full := func() bool {
		return len(b.queue) > 0 && (len(b.queue) >= queueLimit || b.bytes+size > queueBytes)
	}
	if !full() || b.left == 0 {
		return full()
	}
	b.queue = slices.DeleteFunc(b.queue, func(p *pending) bool {
		if p.gone {
			b.bytes -= len(p.data)
		}
		return p.gone
	})
	b.left = 0
	return full()
}

// takeLocked forms the next flight out of what waits, if there is a slot and a session.
func (b *batcher) takeLocked() *flight {
	if b.gathering || b.idle == 0 || b.session == 0 || len(b.queue) == 0 || b.seq-b.ackedLocked() >= window {
		return nil
	}
	if b.idle < slots && time.Since(b.formed) < slotAfter {
		b.lookLaterLocked()
		return nil
	}
	b.formed = time.Now()
	f := &flight{session: b.session, settled: make(chan struct{})}
	size := 0
	n := 0
	for _, p := range b.queue {
		if !p.gone && (len(f.txs) == maxTransactions || len(f.txs) > 0 && size+len(p.data) > maxBatch) {
			break
		}
		n++
		b.bytes -= len(p.data)
		if p.gone {
			b.left--
			continue
		}
		size += len(p.data)
		p.flight = f
		f.txs = append(f.txs, p)
	}
	clear(b.queue[:n])
	b.queue = b.queue[n:]
	if len(b.queue) == 0 {
		b.queue = nil
	}
	for _, c := range b.room {
		close(c)
	}
	b.room = nil
	if len(f.txs) == 0 {
		return nil
	}
	f.size = len(f.txs)
	b.idle--
	b.active[f] = true
	if len(b.queue) > 0 && b.idle > 0 { // those who wait for the rest may be all that there are: no newcomer would look
		b.lookLaterLocked()
	}
	return f
}

func (b *batcher) lookLaterLocked() {
	if !b.looking {
		b.looking = true
		time.AfterFunc(slotAfter, b.lookAgain)
	}
}

// lookAgain: what waits for a batch that turns out to be slow goes out beside it.
func (b *batcher) lookAgain() {
	b.mu.Lock()
	b.looking = false
	f := b.takeLocked()
	b.mu.Unlock()
	if f != nil {
		b.work <- f
	}
}

// launch starts a flight in the caller's goroutine where this member leads, and hands it to a slot.
func (b *batcher) launch(f *flight) {
	if data := b.prepare(f); data != nil {
		if f.wait = b.begin(data, callerWaits); f.wait == nil {
			b.refused(f)
		}
	}
	b.work <- f
}

// carry is the life of one slot.
func (b *batcher) carry() {
	for {
		select {
		case f := <-b.work:
			for f != nil {
				b.settle(f)
				b.gather(f.size)
				b.mu.Lock()
				b.idle++
				f = b.takeLocked()
				b.mu.Unlock()
			}
		case <-b.ctx.Done():
			return
		}
	}
}

// gather lets those whose answers have just come say what they want next, so that they travel together. Else the first of them
// would go alone and the others wait for it, and each batch costs the members a millisecond of CPU between them.
func (b *batcher) gather(answered int) {
	if answered < gatherFrom {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gathering = true
	gather(&b.mu, answered, func() int { return len(b.queue) })
	b.gathering = false
}

// gather waits until enough have come, or for a while nobody has. mu guards what come counts, and is held before and after.
func gather(mu *sync.Mutex, enough int, come func() int) {
	began := time.Now()
	grew, n := began, come()
	for yields := 0; come() < enough && yields < gatherYields; yields++ {
		mu.Unlock()
		runtime.Gosched()
		mu.Lock()
		now := time.Now()
		if come() > n {
			grew, n = now, come()
		}
		if now.Sub(grew) > gatherPause || now.Sub(began) > gatherTime {
			return
		}
	}
}

// settle sends a flight, on any leader and as often as it takes, until each of its transactions has its answer.
func (b *batcher) settle(f *flight) {
	for backoff := resendMin; ; backoff = min(2*backoff, resendMax) {
		changed := b.changed()
		o, sent, err := b.send(f)
		switch {
		case b.isSettled(f):
			return
		case err != nil && sent:
			b.doubt(f)
		case errors.Is(err, errRaftBusy): // the next attempt waits longer for it
			b.refused(f)
			continue
		case err != nil:
			b.refused(f)
		case b.answered(f, o):
			return
		}
		select {
		case <-f.settled:
			return
		case <-changed:
		case <-time.After(backoff):
		case <-b.ctx.Done():
			return // stop has answered everybody, or will
		}
	}
}

// errRaftBusy: raft's main loop did not take an entry in time; it may be waiting for the disk.
var errRaftBusy = errors.New("raft is busy")

var errSettled = errors.New("settled by this member's own apply")

// send makes one attempt. A flight without transactions left is settled.
func (b *batcher) send(f *flight) (outcome, bool, error) {
	wait := f.wait
	f.wait = nil
	var data []byte
	if wait == nil {
		if data = b.prepare(f); data == nil {
			return outcome{}, false, errSettled
		}
	}
	ctx, cancel := context.WithCancelCause(b.ctx)
	defer cancel(nil)
	b.mu.Lock()
	f.cancel = cancel
	settled := f.isSettledLocked()
	b.mu.Unlock()
	switch {
	case settled: // from here on deliver cancels
		return outcome{}, false, errSettled
	case wait != nil:
		return wait(ctx)
	}
	return b.propose(ctx, data)
}

// prepare takes out the transactions whose callers have left and encodes the rest; from here until refused the flight
// counts as sent. It returns nil when the flight is settled or nothing is left of it.
func (b *batcher) prepare(f *flight) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.isSettledLocked() {
		return nil
	}
	kept := f.txs[:0:0]
	for _, p := range f.txs {
		if !p.gone {
			kept = append(kept, p)
		}
	}
	f.txs = kept
	if len(kept) == 0 {
		b.finishLocked(f)
		return nil
	}
	if f.seq == 0 {
		b.seq++
		f.seq = b.seq
		b.flights[f.seq] = f
	}
	f.onWire = true
	txs := make([][]byte, len(kept))
	for i, p := range kept {
		txs[i] = p.data
	}
	return encodeBatch(b.format(), f.session, f.seq, b.ackedLocked(), txs)
}

// ackedLocked: every seq up to this one is settled.
func (b *batcher) ackedLocked() uint64 {
	acked := b.seq
	for seq := range b.flights {
		acked = min(acked, seq-1)
	}
	return acked
}

func (f *flight) isSettledLocked() bool {
	select {
	case <-f.settled:
		return true
	default:
		return false
	}
}

func (b *batcher) isSettled(f *flight) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return f.isSettledLocked()
}

// refused: this send provably did not reach the log.
func (b *batcher) refused(f *flight) {
	b.mu.Lock()
	f.onWire = false
	b.mu.Unlock()
}

func (b *batcher) doubt(f *flight) {
	b.mu.Lock()
	f.onWire, f.uncertain = false, true
	b.mu.Unlock()
}

// answered takes the leader's answer. It waits until this member has applied it too: a write that has returned is seen by
// this member's Stale. False: try again.
func (b *batcher) answered(f *flight, o outcome) bool {
	switch o.kind {
	case outcomeDone:
		if err := b.applied(b.ctx, o.index, o.term); err != nil {
			b.doubt(f) // it is in the log, whatever another attempt says
			return false
		}
		b.mu.Lock()
		b.finishWithLocked(f, o)
		b.mu.Unlock()
	case outcomeGone:
		return b.lost(f)
	default: // a bug of ours: a settled number was sent, or bytes that don't decode
		b.mu.Lock()
		f.failLocked(fmt.Errorf("%w: the state machine answered %d to batch %d/%d", ErrUncertain, o.kind, f.session, f.seq))
		b.finishLocked(f)
		b.mu.Unlock()
	}
	return true
}

// lost: the session is not known any more, so this send had no effect. An earlier one may have had, before the session
// was evicted; if there was none, the transactions go back to the head of the queue and into the next session.
func (b *batcher) lost(f *flight) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.isSettledLocked() {
		return true
	}
	if b.session == f.session {
		b.session = 0
		close(b.reopen)
	}
	if f.uncertain {
		f.failLocked(fmt.Errorf("%w: this member's session was evicted", ErrUncertain))
	} else {
		for _, p := range f.txs {
			p.flight = nil
			b.bytes += len(p.data)
		}
		b.queue = append(append([]*pending(nil), f.txs...), b.queue...)
		f.txs = nil
	}
	b.finishLocked(f)
	return true
}

// deliver is told of every batch that this member applies; called from apply, it must not block.
func (b *batcher) deliver(session, seq uint64, o outcome) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.flights[seq]
	if f == nil || f.session != session || o.kind != outcomeDone {
		return
	}
	b.finishWithLocked(f, o)
	if cancel := f.cancel; cancel != nil {
		// The leader's answer is on its way; breaking the connection under it would cost a new one for every write.
		time.AfterFunc(100*time.Millisecond, func() { cancel(errSettled) })
	}
}

func (b *batcher) finishWithLocked(f *flight, o outcome) {
	if f.isSettledLocked() {
		return
	}
	if len(o.results) != len(f.txs) {
		f.failLocked(fmt.Errorf("%w: %d answers to the %d transactions of batch %d/%d", ErrUncertain, len(o.results), len(f.txs), f.session, f.seq))
		b.finishLocked(f)
		return
	}
	for i, p := range f.txs {
		p.res = o.results[i]
		p.done <- struct{}{}
	}
	f.txs = nil
	b.finishLocked(f)
}

func (f *flight) failLocked(err error) {
	for _, p := range f.txs {
		p.err = err
		p.done <- struct{}{}
	}
	f.txs = nil
}

func (b *batcher) finishLocked(f *flight) {
	if f.isSettledLocked() {
		return
	}
	delete(b.flights, f.seq)
	delete(b.active, f)
	close(f.settled)
}

// abandon gives the verdict on a transaction whose caller stops waiting.
func (b *batcher) abandon(ctx context.Context, p *pending) (result, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-p.done:
		return p.res, p.err
	default:
	}
	if p.flight != nil && (p.flight.onWire || p.flight.uncertain) {
		return result{}, fmt.Errorf("%w: %w", ErrUncertain, context.Cause(ctx))
	}
	p.gone = true
	if p.flight == nil {
		b.left++
	}
	return result{}, notApplied(b.leaderless(context.Cause(ctx)))
}

// leaderless adds to the reason why a caller gave up that there was no leader, if so.
func (b *batcher) leaderless(err error) error {
	if b.noLead() {
		return fmt.Errorf("%w: %w", ErrNoLeader, err)
	}
	return err
}

func notApplied(err error) error { return fmt.Errorf("%w: %w", ErrNotApplied, err) }

// empty tells whether every transaction that was submitted has its answer.
func (b *batcher) empty() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.queue) == 0 && b.idle == slots
}

// refuse ends the intake: from now on submit answers ErrNotApplied with this cause. What was accepted goes on.
func (b *batcher) refuse(cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed == nil {
		b.closed = cause
	}
	for _, c := range b.room {
		close(c)
	}
	b.room = nil
}

// stop answers everything that still waits, with the cause.
func (b *batcher) stop(cause error) {
	b.refuse(cause)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.queue {
		if !p.gone {
			p.err = notApplied(cause)
			p.done <- struct{}{}
		}
	}
	b.queue, b.bytes, b.left = nil, 0, 0
	for f := range b.active {
		err := notApplied(cause)
		if f.onWire || f.uncertain {
			err = fmt.Errorf("%w: %w", ErrUncertain, cause)
		}
		f.failLocked(err)
		b.finishLocked(f)
	}
}

// keepSession opens this member's session, and a new one whenever it was evicted. It runs until the batcher ends. Nothing
// is sent before a session is open, for nothing could be sent twice safely.
func (b *batcher) keepSession() {
	for b.ctx.Err() == nil {
		id, ok := b.openSession()
		if !ok {
			return
		}
		b.mu.Lock()
		b.session = id
		b.reopen = make(chan struct{})
		reopen := b.reopen
		var fs []*flight
		for f := b.takeLocked(); f != nil; f = b.takeLocked() {
			fs = append(fs, f)
		}
		b.mu.Unlock()
		for _, f := range fs {
			b.work <- f
		}
		select {
		case <-reopen:
		case <-b.ctx.Done():
		}
	}
}

// openSession proposes until the answer is there. The nonce makes every attempt open the same session.
func (b *batcher) openSession() (uint64, bool) {
	var nonce [16]byte
	rand.Read(nonce[:])
	for backoff := resendMin; ; backoff = min(2*backoff, resendMax) {
		changed := b.changed()
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		o, _, err := b.propose(ctx, encodeOpen(b.format(), nonce))
		cancel()
		if err == nil && o.kind == outcomeDone && o.session != 0 {
			return o.session, true
		}
		select {
		case <-changed:
		case <-time.After(backoff):
		case <-b.ctx.Done():
			return 0, false
		}
	}
}

// open tells whether writes can be sent.
func (b *batcher) open() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.session != 0
}
