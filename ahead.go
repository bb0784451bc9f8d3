package quorate

// Entries go to the followers while the leader still writes them. It owns the early sends: to whom, how many, what became of
// them. It never touches the log, and raft doesn't know of it. Control comes from logstore.go just before the leader's own write,
// and from the transport's AppendEntries, where raft wants to send the same entries and gets the early send's answer instead.
//
// Why a leader may send what it does not have on disk (Ongaro's thesis, section 10.2.1): it must only not count itself before it
// has. Raft counts itself when StoreLogs has returned, and asks for the followers' answers, that is counts them, after that.
// Never do an index and a term name two entries: a leader gives each index of its term once. If its write fails or it is killed,
// raft stops leading (dispatchLogs sets Follower on any error of StoreLogs, and its loop ends before it takes another entry), and
// it leads again only in a term of its own that electSelf has raised and written to disk before. So an entry that was sent and not
// stored is for the others what it would be had its leader died just after sending: the next leader keeps it or replaces it. What
// changes is what may be said to the caller: after such a write failed it may still happen (errSentAhead).
//
// A majority is enough for a commit, so that a leader of three asks one of the two first: the one that answers faster. The other is
// spared: raft's own append to it rests for a moment, and what has come meanwhile goes with the next, one call and one fsync for
// several batches. Its rest is short enough that a first one which hangs costs a write no more than that. Nobody is spared who
// forwards writes or reads, as callers there wait until it has applied them. The idea is the thrifty mode of Moraru, Andersen,
// Kaminsky, "There Is More Consensus in Egalitarian Parliaments", SOSP 2013.
//
// An early send is one try. Whatever goes wrong with it, raft's ordinary append sends the same entries again: a follower's raft
// skips what it has, refuses what would leave a gap, and refuses an older term.

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	aheadSends = 3       // to one peer, that raft has not asked for
	aheadLimit = 1 << 20 // of one batch: beyond that the network takes longer than the disk
	aheadFresh = 100 * time.Millisecond
	aheadPause = time.Second
	gapWait    = 10 * time.Millisecond

	spareRest   = 4 * time.Millisecond
	spareBehind = 32                    // entries in one append; so many are no rest but a backlog
	askedLately = time.Second           // a member that has callers
	answerLate  = 10 * time.Millisecond // from then on a peer is not counted on
)

// errSentAhead is part of the error of a write that failed here when other members may hold the entries.
var errSentAhead = errors.New("the entries were sent to others before")

// An aheadTable is what the leader of one term knows of its peers' logs.
type aheadTable struct {
	mu sync.Mutex // guards the fields below and those of the peers; never held across I/O
	termPeers[aheadPeer]
}

// termPeers are a leader's peers in the newest of its terms. A later one begins with none. The lock is that of the type which holds it.
type termPeers[P any] struct {
	term  uint64
	peers map[raft.ServerID]*P
}

// peerLocked is nil in a term that is over.
func (t *termPeers[P]) peerLocked(id raft.ServerID, term uint64) *P {
	if term < t.term {
		return nil
	}
	if term > t.term || t.peers == nil {
		t.term, t.peers = term, make(map[raft.ServerID]*P)
	}
	p := t.peers[id]
	if p == nil {
		p = new(P)
		t.peers[id] = p
	}
	return p
}

type aheadPeer struct {
	next  uint64        // follows what the peer holds or is being sent; 0 = not known
	pause time.Time     // nothing is sent early before
	spare bool          // others are enough for a majority, and answer faster
	took  time.Duration // its append answers, an exponential average
	pace  pace          // the newest of them
	held  uint64        // the newest entry that it is known to hold, as far as its answers say; 0 = not known
	since time.Time     // when raft's own append that waits for its answer began; zero = none
	sends []*early      // those that raft has not asked for, each the next one's predecessor
}

// An early send covers the entries after prev up to last.
type early struct {
	prev, last uint64
	began      time.Time
	done       chan struct{} // closed when the fields below are final
	resp       raft.AppendEntriesResponse
	err        error
	at         time.Time // when the answer came
}

// sendAhead sends the entries, which follow one of term prevTerm in this leader's log, to the voters that can take them next. It
// waits for nothing. False: to nobody.
func (t *transport) sendAhead(entries []*raft.Log, prevTerm uint64) bool {
	term := entries[0].Term
	if !maySendAhead(entries) || !t.p.host.leading(term) || t.p.host.silent() != nil {
		return false
	}
	args := &raft.AppendEntriesRequest{
		Term: term, PrevLogEntry: entries[0].Index - 1, PrevLogTerm: prevTerm, Entries: entries, LeaderCommitIndex: t.p.host.committed(),
	}
	self, _, _ := t.p.host.self()
	args.ID, args.ProtocolVersion = []byte(self), raft.ProtocolVersionMax
	args.Addr = t.EncodePeer(raft.ServerID(self), t.LocalAddr())
	body := sync.OnceValue(func() []byte { return encodeAppend(args) })
	sent := false
	voters := slices.DeleteFunc(t.p.host.others(), func(m raft.Server) bool { return m.Suffrage != raft.Voter }) // nobody waits for the others
	t.ahead.spare(voters, term, t.p.hasCallers)
	size := int64(appendOverhead)
	for _, e := range entries {
		size += entryBytes(e)
	}
	for _, m := range voters {
		if size > t.room(m.ID, m.Address) {
			continue // raft's own append is cut to what passes
		}
		if e := t.ahead.begin(m.ID, args); e != nil {
			sent = true
			t.carry(func() { t.carryAhead(e, m, term, body) }) // ends with the answer, its timeout, or the transport
		}
	}
	if sent {
		// What follows is a system call that holds this processor: a goroutine that is ready to run here would begin only when
		// another thread has noticed. Measured on two cores: 0.21 ms later, of a write that takes 0.7.
		runtime.Gosched()
	}
	return sent
}

// maySendAhead: the beginning of a term and changes of the configuration go raft's way, which knows what they change.
func maySendAhead(entries []*raft.Log) bool {
	size := 0
	for _, e := range entries {
		size += len(e.Data) + len(e.Extensions)
		if e.Type != raft.LogCommand || size > aheadLimit {
			return false
		}
	}
	return true
}

// carry runs f in a goroutine that has carried before, if one has nothing to do: a new one would first grow its stack, step by step,
// while the entries wait. There are as many as were ever needed at once, and they end with the transport.
func (t *transport) carry(f func()) {
	select {
	case t.work <- f:
		return
	default:
	}
	go func() {
		for {
			f()
			select {
			case f = <-t.work:
			case <-t.ctx.Done():
				return
			}
		}
	}()
}

func (t *transport) carryAhead(e *early, m raft.Server, term uint64, body func() []byte) {
	data := body()
	e.err = t.append(m.ID, m.Address, data, &e.resp, appendTimeout+timeFor(int64(len(data))))
	e.at = time.Now()
	t.learnRoom(m.ID, m.Address, int64(len(data)), e.at.Sub(e.began), 0, e.err)
	if e.worked() {
		t.ahead.answered(m.ID, term, e.last, e.at.Sub(e.began))
	} else {
		t.ahead.forget(m.ID, term, aheadPause)
		t.noteFull(m.ID, term, e.err)
	}
	close(e.done)
}

func (e *early) worked() bool { return e.err == nil && e.resp.Success }

// sentAhead gives raft the answer of the early send with which args begins, if that was a success. It cuts args.Entries to what
// was sent. An answer is given once and while it is fresh, because raft takes it for a sign of life of this moment.
func (t *transport) sentAhead(id raft.ServerID, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) bool {
	e := t.ahead.take(id, args)
	if e == nil {
		return false
	}
	select {
	case <-e.done:
	case <-t.ctx.Done():
		return false
	}
	if !e.worked() || time.Since(e.at) > aheadFresh {
		return false
	}
	args.Entries = args.Entries[:e.last-e.prev]
	*resp = e.resp
	return true
}

// begin is nil if the peer is not known to take these entries next, or if it is slow.
func (a *aheadTable) begin(id raft.ServerID, args *raft.AppendEntriesRequest) *early {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peerLocked(id, args.Term)
	if p == nil || p.spare || p.next != args.PrevLogEntry+1 || len(p.sends) >= aheadSends || !p.pause.IsZero() && time.Now().Before(p.pause) {
		return nil
	}
	e := &early{prev: args.PrevLogEntry, last: lastSent(args), began: time.Now(), done: make(chan struct{})}
	p.sends = append(p.sends, e)
	p.next = e.last + 1
	return e
}

// take is the early send with which args begins, if there is one. What raft has passed by is dropped.
func (a *aheadTable) take(id raft.ServerID, args *raft.AppendEntriesRequest) *early {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peerLocked(id, args.Term)
	if p == nil {
		return nil
	}
	p.dropLocked(args.PrevLogEntry)
	if len(p.sends) == 0 || p.sends[0].prev != args.PrevLogEntry || p.sends[0].last > lastSent(args) {
		return nil
	}
	e := p.sends[0]
	p.sends = p.sends[1:]
	return e
}

func (p *aheadPeer) dropLocked(before uint64) {
	for len(p.sends) > 0 && p.sends[0].prev < before {
		p.sends = p.sends[1:]
	}
}

// ordinary notes that raft's own append begins. A peer that has kept up will hold its entries too, so that the next ones may
// follow while it is on its way: otherwise, with a batch always under way, no send would ever be early.
func (a *aheadTable) ordinary(id raft.ServerID, args *raft.AppendEntriesRequest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peerLocked(id, args.Term)
	if p == nil {
		return
	}
	p.since = time.Now()
	if p.next == args.PrevLogEntry+1 {
		p.next = lastSent(args) + 1
	}
}

// holds notes that the peer has answered raft's own append with a success.
func (a *aheadTable) holds(id raft.ServerID, args *raft.AppendEntriesRequest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.peerLocked(id, args.Term); p != nil {
		if !p.since.IsZero() && len(args.Entries) > 0 { // an early send that failed meanwhile has made it forget
			p.average(time.Since(p.since))
		}
		p.since = time.Time{}
		p.next, p.held = max(p.next, lastSent(args)+1), max(p.held, lastSent(args))
		p.dropLocked(lastSent(args))
	}
}

// forget: the next early send to this peer waits for an ordinary success, and for the pause.
func (a *aheadTable) forget(id raft.ServerID, term uint64, pause time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.peerLocked(id, term); p != nil {
		p.next, p.sends, p.since = 0, nil, time.Time{}
		if pause > 0 {
			p.pause = time.Now().Add(pause)
		}
		for _, other := range a.peers { // they may be needed now
			other.spare = false
		}
	}
}

// spare chooses whom the next entries can do without, so that a majority is still asked at once.
func (a *aheadTable) spare(voters []raft.Server, term uint64, hasCallers func(raft.ServerID) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	var idle []*aheadPeer
	needed := (len(voters) + 1) / 2 // beside the leader
	for _, m := range voters {
		p := a.peerLocked(m.ID, term)
		switch {
		case p == nil:
			return
		case !p.reliableLocked(now):
			p.spare = false
		case hasCallers(m.ID):
			p.spare = false
			needed--
		default:
			idle = append(idle, p)
		}
	}
	// Who is asked stays so until another is clearly faster.
	cost := func(p *aheadPeer) time.Duration {
		if p.spare {
			return p.took + p.took/2
		}
		return p.took
	}
	slices.SortStableFunc(idle, func(p, q *aheadPeer) int { return cmp.Compare(cost(p), cost(q)) })
	for i, p := range idle {
		p.spare = i >= needed
	}
}

// reliableLocked: the peer keeps up, as far as is known.
func (p *aheadPeer) reliableLocked(now time.Time) bool {
	late := len(p.sends) > 0 && now.Sub(p.sends[0].began) > answerLate || !p.since.IsZero() && now.Sub(p.since) > answerLate
	return p.next != 0 && now.After(p.pause) && !late
}

// rest lets an ordinary append to a spare peer wait for more.
func (t *transport) rest(id raft.ServerID, args *raft.AppendEntriesRequest) {
	if len(args.Entries) == 0 || len(args.Entries) >= spareBehind || !maySendAhead(args.Entries) || !t.ahead.spares(id, args.Term) {
		return
	}
	select {
	case <-time.After(spareRest):
	case <-t.ctx.Done():
	}
}

func (a *aheadTable) spares(id raft.ServerID, term uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peerLocked(id, term)
	return p != nil && p.spare
}

// answered notes that the peer holds an early send up to last, and how long it took.
func (a *aheadTable) answered(id raft.ServerID, term, last uint64, took time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.peerLocked(id, term); p != nil {
		p.average(took)
		p.held = max(p.held, last)
	}
}

// ends notes where the log of a peer ends that has refused an append.
func (a *aheadTable) ends(id raft.ServerID, term, last uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.peerLocked(id, term); p != nil && p.held == 0 {
		p.held = last
	}
}

// acknowledged is the newest entry that the peer is known to hold, by its answers to the leader of that term.
func (a *aheadTable) acknowledged(id raft.ServerID, term uint64) (index uint64, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.term != term || a.peers[id] == nil {
		return 0, false
	}
	return a.peers[id].held, a.peers[id].held != 0
}

func (p *aheadPeer) average(took time.Duration) {
	p.took += (took - p.took) / 8
	p.pace.add(took)
}

func lastSent(args *raft.AppendEntriesRequest) uint64 {
	return args.PrevLogEntry + uint64(len(args.Entries))
}

// A gapGate is the receiver's side. Two appends on two connections may overtake each other, and raft refuses the one that came
// too early. The one before it is a moment away, if it comes at all.
type gapGate struct {
	limit time.Duration // 10 ms; a test waits longer

	mu    sync.Mutex    // guards moved
	moved chan struct{} // closed when the next append has been answered; nil = nobody waits
}

func (g *gapGate) wait(ctx context.Context, closed func() bool) {
	if closed() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, g.limit)
	defer cancel()
	for ctx.Err() == nil {
		g.mu.Lock()
		if g.moved == nil {
			g.moved = make(chan struct{})
		}
		moved := g.moved
		g.mu.Unlock()
		if closed() {
			return
		}
		select {
		case <-moved:
		case <-ctx.Done():
		}
	}
}

func (g *gapGate) answered() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.moved != nil {
		close(g.moved)
		g.moved = nil
	}
}
