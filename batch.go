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
	refusedLimit = 5 * time.Second        // for a batch that may be in the log of a leader that takes no writes
	callerWaits  = 5 * time.Millisecond   // for raft's main loop, in a caller's goroutine; then a slot does
	sendAfter    = 100 * time.Millisecond // how long a send whose batch is settled meanwhile goes on
	window       = 64                     // batches beyond the oldest that is not settled: their answers are kept by every member until it is
)

type batcher struct {
	// propose sends an entry towards the log. sent tells, with an error, whether the entry may be in the log all the same.
	propose func(ctx context.Context, data []byte) (o outcome, sent bool, err error)
	// begin hands an entry to raft at once and returns the function that waits for its outcome, or nil if this member does
	// not lead. It saves a lone writer one switch of goroutines.
	begin   func(data []byte, patience time.Duration) func(ctx context.Context) (outcome, bool, error)
	changed func() <-chan struct{} // closed when the leader, as this member knows it, changes
	noLead  func() bool            // no leader is known
	most    func() int             // bytes that get to the others, as far as known; nil: all do
	format  func() uint64          // in which this member writes
	// applied waits until this member has applied the entry of this index and term, which is committed.
	applied func(ctx context.Context, index, term uint64) error

	ctx  context.Context // ends at Close
	work chan *flight    // to the goroutines that run carry, one per slot
	used sync.Pool       // of pendings that have their answer: a write would leave half a KiB to the garbage collector
	room broadcast       // there may be room in the queue again, or nothing is accepted any more

	mu        sync.Mutex // guards the fields below; never held across I/O
	queue     []*pending
	bytes     int                // of queue
	left      int                // in queue, those whose callers have left
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
	refusal   error              // why the leader took no write when it was asked last, if that was so
	refusedAt time.Time

	// About the batches of this session that callers have left; see leaveLocked.
	barrier uint64  // no batch is formed before every seq up to this one is settled: the newest that a caller has left with ErrUncertain
	dropped uint64  // the newest seq that was given up
	passed  uint64  // apply has met an entry that says that every seq up to this one is settled
	fence   *flight // active, and its entry passes what was dropped when it was formed; nothing else is formed meanwhile
	bare    bool    // a fence was given up: the next one carries nothing, and so has no caller who could leave it
}

// pending is one caller's transaction.
type pending struct {
	data   []byte        // encoded
	flight *flight       // nil while it waits in the queue
	gone   bool          // its caller has left
	done   chan struct{} // gets a token, once, when res and err are final and nobody but the caller knows the pending any more
	res    result
	err    error
}

const keepData = 4 << 10 // bytes; larger transactions are rare, and their memory is given back

// flight is one batch on its way. The batcher's mu guards it.
type flight struct {
	txs       []*pending
	size      int // of txs, when it was formed
	left      int // of txs, those whose callers have left
	fence     bool
	session   uint64
	seq       uint64 // given at the first send and never dropped after it; 0 = not sent yet
	acked     uint64 // what its first send says: every seq up to this one is settled
	onWire    bool
	why       error                                        // the newest send was refused for its size: what its callers are told
	refused   time.Time                                    // when the leader took no writes first, while it was uncertain
	uncertain bool                                         // a send ended without a clear answer: the entry may be in the log
	settled   chan struct{}                                // closed when every transaction has its answer
	wait      func(context.Context) (outcome, bool, error) // of a send that the caller has begun
	cancel    context.CancelCauseFunc                      // ends the send under way; nil before the first one
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
	left := ctx.Done() // a context may be code of the caller's: it is asked while nothing waits for this goroutine
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
	case <-left:
		return b.abandon(ctx, p)
	}
}

// enqueue returns a flight that the caller must launch, if a slot was idle.
func (b *batcher) enqueue(ctx context.Context, p *pending) (*flight, error) {
	if ctx.Err() != nil {
		return nil, notApplied(ended(ctx))
	}
	b.mu.Lock()
	for b.closed == nil && b.fullLocked(len(p.data)) {
		room := b.room.wait()
		b.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return nil, notApplied(fmt.Errorf("the queue of writes is full: %w", b.leaderless(ended(ctx))))
		}
		b.mu.Lock()
	}
	defer b.mu.Unlock()
	if b.closed != nil {
		return nil, notApplied(b.closed)
	}
	if b.stuckLocked() && b.refusal != nil && time.Since(b.refusedAt) < 2*resendMax { // the next try of what it would wait for will tell
		return nil, notApplied(b.refusal)
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

// takeLocked forms the next flight out of what waits, if there is a slot and a session. Where a batch was given up, this is the
// fence that passes it, with or without transactions.
func (b *batcher) takeLocked() *flight {
	due := b.dropped > b.passed
	if b.gathering || b.idle == 0 || b.session == 0 || b.fence != nil || len(b.queue) == 0 && !due {
		return nil
	}
	if acked := b.ackedLocked(); acked < b.barrier || b.seq-acked >= window {
		return nil
	}
	if b.idle < slots && time.Since(b.formed) < slotAfter {
		b.lookLaterLocked()
		return nil
	}
	b.formed = time.Now()
	f := &flight{session: b.session, settled: make(chan struct{}), fence: due}
	if !due || !b.bare {
		b.fillLocked(f)
	}
	if len(f.txs) == 0 && !due {
		return nil
	}
	if due {
		b.fence = f
	}
	f.size = len(f.txs)
	b.idle--
	b.active[f] = true
	if len(b.queue) > 0 && b.idle > 0 { // those who wait for the rest may be all that there are: no newcomer would look
		b.lookLaterLocked()
	}
	return f
}

// fillLocked moves the head of the queue into a flight.
func (b *batcher) fillLocked(f *flight) {
	size := 0
	n := 0
	most := b.mostLocked()
	for _, p := range b.queue {
		if !p.gone && (len(f.txs) == maxTransactions || len(f.txs) > 0 && size+len(p.data) > most) {
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
	b.room.notify()
}

// mostLocked is how many bytes of transactions a batch holds, unless one alone is larger.
func (b *batcher) mostLocked() int {
	if b.most == nil {
		return maxBatch
	}
	return min(maxBatch, b.most())
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
		case errors.Is(err, errRefused) && b.refuseAll(f, err):
			return
		case err != nil:
			b.refused(f)
			if tooLarge(err) && b.split(f, err) {
				return
			}
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

// prepare takes out the transactions whose callers have left, unless an earlier send may have reached the log: what has one number
// is one batch. It encodes the rest; from here until refused the flight counts as sent. It returns nil when the flight is settled or
// nothing is left of it that is worth an entry.
func (b *batcher) prepare(f *flight) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.isSettledLocked() {
		return nil
	}
	if !f.uncertain {
		f.txs = slices.DeleteFunc(f.txs, func(p *pending) bool { return p.gone })
		f.left = 0
	}
	if len(f.txs) == 0 && !f.fence {
		b.finishLocked(f)
		return nil
	}
	if f.seq == 0 {
		b.seq++
		f.seq = b.seq
		b.flights[f.seq] = f
		f.acked = b.ackedLocked()
	}
	f.onWire = true
	txs := make([][]byte, len(f.txs))
	for i, p := range f.txs {
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

// errRefused: the leader takes no writes, and no other voter can lead. No send will do better before somebody has mended something.
var errRefused = errors.New("the leader takes no writes")

// refuseAll answers everybody in a flight. Where an earlier send of it may be in the log, it is sent until that is known, and keeps its
// slot, but nobody waits for it longer than refusedLimit. False: it is sent again.
func (b *batcher) refuseAll(f *flight, cause error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.uncertain || f.fence {
		b.refuseQueueLocked(cause)
	}
	switch {
	case f.isSettledLocked():
		return true
	case !f.uncertain:
		f.onWire = false
		f.failLocked(notApplied(cause))
		if f.fence { // goes on without them
			return false
		}
		b.finishLocked(f)
		return true
	case f.refused.IsZero():
		f.refused = time.Now()
	}
	if len(f.txs) == 0 || time.Since(f.refused) < refusedLimit {
		return false
	}
	f.failLocked(fmt.Errorf("%w: %w", ErrUncertain, cause))
	if next := b.leaveLocked(f); next != nil { // its slot takes another one
		b.work <- next
	}
	return true
}

// refuseQueue: the leader, which may be this member, takes no writes. Nobody shall wait behind those that are in the slots: they may be
// in the log, or may get there, and wait until that is known.
func (b *batcher) refuseQueue(cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stuckLocked() {
		b.refuseQueueLocked(cause)
	}
}

// stuckLocked: no batch is formed before one that was sent has its answer.
func (b *batcher) stuckLocked() bool {
	return b.idle == 0 || b.fence != nil || b.ackedLocked() < b.barrier
}

func (b *batcher) refuseQueueLocked(cause error) {
	b.refusal, b.refusedAt = cause, time.Now()
	for _, p := range b.queue {
		if !p.gone {
			p.err = notApplied(cause)
			p.done <- struct{}{}
		}
	}
	b.queue, b.bytes, b.left = nil, 0, 0
	b.room.notify()
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
		b.requeueLocked(f)
	}
	b.finishLocked(f)
	return true
}

// requeueLocked puts the transactions of a batch that had no effect, and can have none, back to the head of the queue.
func (b *batcher) requeueLocked(f *flight) {
	again := slices.DeleteFunc(f.txs, func(p *pending) bool { return p.gone })
	for _, p := range again {
		p.flight = nil
		b.bytes += len(p.data)
	}
	b.queue = append(again, b.queue...)
	f.txs = nil
}

// split: a batch that is too large for the way to the leader travels as several. False: it is one transaction, or a send may have
// reached the log.
func (b *batcher) split(f *flight, err error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	f.why = err
	if f.isSettledLocked() {
		return true
	}
	size := 0
	for _, p := range f.txs {
		size += len(p.data)
	}
	if f.uncertain || len(f.txs) < 2 || size <= b.mostLocked() { // it would be the same one again
		return false
	}
	b.requeueLocked(f)
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
	f.breakOffLocked()
}

// breakOffLocked ends the send under way of a settled flight, but not at once: the leader's answer may be on its way, and breaking
// the connection under it would cost a new one for every write.
func (f *flight) breakOffLocked() {
	if cancel := f.cancel; cancel != nil {
		time.AfterFunc(sendAfter, func() { cancel(errSettled) })
	}
}

func (b *batcher) finishWithLocked(f *flight, o outcome) {
	if f.isSettledLocked() {
		return
	}
	b.refusal = nil // the leader takes writes
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
	if f.session == b.session {
		b.passed = max(b.passed, f.acked)
		b.bare = b.bare && b.passed < b.dropped
	}
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
	if b.fence == f {
		b.fence = nil
	}
	close(f.settled)
}

// abandon gives the verdict on a transaction whose caller stops waiting.
func (b *batcher) abandon(ctx context.Context, p *pending) (result, error) {
	cause := ended(ctx)
	b.mu.Lock()
	select {
	case <-p.done:
		defer b.mu.Unlock()
		return p.res, p.err
	default:
	}
	p.gone = true
	f := p.flight
	if f == nil {
		b.left++
	} else {
		f.left++
	}
	uncertain := f != nil && (f.onWire || f.uncertain)
	if f != nil && f.why != nil {
		cause = fmt.Errorf("%w: %w", cause, f.why)
	}
	var next *flight
	if uncertain {
		next = b.leaveLocked(f)
	}
	b.mu.Unlock()
	if next != nil {
		b.work <- next
	}
	if uncertain {
		return result{}, fmt.Errorf("%w: %w", ErrUncertain, cause)
	}
	return result{}, notApplied(b.leaderless(cause))
}

// leaveLocked is for a flight that may be in the log and that a caller has just left with ErrUncertain. When the last one has, the
// flight is given up: it is not sent any more, its seq counts as settled, and a fence goes out, which says so. To go on sending it
// would let an old value land over what others have written long since and were told is done. It returns the fence, if there is a
// slot for it.
//
// What holds then: a write W that begins on this member after a caller has left a write L with ErrUncertain, and is acknowledged,
// is never undone by L.
//
// It is assumed that (a) mu orders the calls on this batcher; that apply (b) gives a batch whose seq is not above the highest acked
// of its session no effect, and (c) a batch whose seq it has an answer stored for no second effect; that (d) a session that apply
// does not know is unknown for ever after, as its number is the index of the entry that opened it; and that (e) an entry that is
// proposed after the outcome of another one is known has a higher index, by the Leader Completeness of raft.
//
//  1. Let L be in flight f, with seq n of session S, and its caller leave at time t. From t on barrier >= n, as long as S is the
//     batcher's session.
//  2. W is in a flight h that is formed after t: it begins after t, and no flight takes a transaction once it is formed.
//  3. If h is of S: takeLocked forms it only while ackedLocked() >= barrier >= n, so no flight with a seq up to n is active then.
//     Seqs are given in ascending order, so none is active later either, and every send of h says acked >= n.
//  4. So f is settled when h is formed. If it was answered, L has had its effect, or never will have one, at an index below that of
//     h (e), and any copy of f behind that has none (b, c).
//  5. If f was given up, copies of it may still arrive. Let j be the index at which h takes effect. The entry at j says acked >= n,
//     so a copy behind j has no effect (b). A copy before j may have one, and W comes after it.
//  6. If h is of another session: that one was opened after apply had answered, at an index i, that S is not known. The entry that
//     opens it lies behind i (e), and h behind that, and behind i no copy of f has an effect (d). The same holds for the transactions
//     of h that lost puts into the next session: it does so only if no send of h can have an effect.
//
// Nothing of the kind holds for the writes of other members: a copy of f that was on its way when f was given up may take effect until
// an entry of this member that passes n is applied. That is the window which ErrUncertain speaks of. The send under way is broken off
// and the fence goes out at once to keep it short.
//
// A leader whose log does not commit gets a bounded number of entries in spite of what is given up, or raft's uncommitted tail would
// grow for as long as callers come and leave: those of the slots, one fence with transactions, and, if all of its callers leave too,
// one without, which nobody can leave. Until one of them is answered the other callers wait in the queue.
func (b *batcher) leaveLocked(f *flight) (next *flight) {
	current := f.session == b.session
	if current {
		b.barrier = max(b.barrier, f.seq)
	}
	if f.left < len(f.txs) {
		return nil // still sent, for those who wait
	}
	if current {
		b.dropped = max(b.dropped, f.seq)
		b.bare = b.bare || f.fence
	}
	f.txs = nil
	b.finishLocked(f)
	f.breakOffLocked()
	return b.takeLocked()
}

// ended says why a context has ended, for the error of a write: its cause, and what its Err says where the cause does not.
func ended(ctx context.Context) error {
	cause, err := context.Cause(ctx), ctx.Err()
	switch {
	case cause == nil && err == nil: // of a type that is no proper context
		return context.Canceled
	case err == nil || errors.Is(cause, err):
		return cause
	}
	return fmt.Errorf("%w: %w", err, cause)
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
	b.room.notify()
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
	b.dropped = 0 // no fence
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
		b.barrier, b.dropped, b.passed, b.bare = 0, 0, 0, false
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
