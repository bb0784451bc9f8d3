package quorate

// Raft's transport over the caller's http.Client, one POST per message, and the raft half of the door. It owns the way of a
// message: sending, holding, timeouts, the hand-over to raft's main loop and back. It never touches the log, SQL or the
// meaning of an entry. Raft calls the methods of transport; ServeHTTP of peer.go calls the serve functions. The bytes are
// frame.go's. No stream and no long-lived handler: an Upgrade fails on HTTP/2, a full-duplex POST hangs behind an HTTP/1.1
// proxy, and both keep the caller's server from shutting down.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	voteTimeout   = 500 * time.Millisecond // votes, pre-votes, timeoutnow and probes
	appendTimeout = 5 * time.Second        // and a second for each MiB
	holdSoon      = 5 * time.Millisecond   // after a first failure, and then twice as long each time, up to
	holdInterval  = 100 * time.Millisecond
	receiveRate   = 256 << 10 // bytes a second that a snapshot must come in with
	slowestLine   = 4 << 10   // bytes a second, for one entry that is larger than what a line carries in the usual time
	installRate   = 4 << 20   // bytes a second that a receiver is given to install what it has received
)

// errTransportClosed ends what waits in a transport that is closed, or that a newer one of the same peer has replaced.
var errTransportClosed = raft.ErrTransportShutdown

var errStalled = fmt.Errorf("no progress in %v", stallTimeout)

// A transport serves one instance of raft.
type transport struct {
	p        *peer
	consumer chan raft.RPC // unbuffered: what raft has not taken can be withdrawn
	ctx      context.Context
	cancel   context.CancelFunc
	ahead    aheadTable
	pulses   pulses
	outages  outages
	work     chan func() // to a goroutine of carry that has nothing to do
	gap      gapGate

	mu        sync.Mutex
	heartbeat func(raft.RPC) // set by raft
}

var (
	_ raft.WithPreVote = (*transport)(nil)
	_ raft.WithClose   = (*transport)(nil)
)

// transport makes the one that receives from now on, and closes the one before.
func (p *peer) transport() *transport {
	t := &transport{p: p, consumer: make(chan raft.RPC), outages: outages{log: p.log}, work: make(chan func()), gap: gapGate{limit: gapWait}}
	t.ctx, t.cancel = context.WithCancel(p.ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if old := p.current.Swap(t); old != nil {
		old.cancel()
	}
	return t
}

func (t *transport) Close() error {
	t.cancel()
	return nil
}

func (t *transport) Consumer() <-chan raft.RPC { return t.consumer }

// LocalAddr: raft does not take an empty address, and no two members may have the same.
func (t *transport) LocalAddr() raft.ServerAddress {
	id, _, addr := t.p.host.self()
	if addr == "" {
		addr = placeholderAddr(id)
	}
	return raft.ServerAddress(addr)
}

// EncodePeer puts the id before the address: raft remembers whom it has voted for by these bytes, and with the address alone
// two members that had one address in turn could both get its vote in one term.
func (t *transport) EncodePeer(id raft.ServerID, addr raft.ServerAddress) []byte {
	return []byte(string(id) + "@" + string(addr))
}

func (t *transport) DecodePeer(b []byte) raft.ServerAddress {
	if _, addr, ok := strings.Cut(string(b), "@"); ok {
		return raft.ServerAddress(addr)
	}
	return raft.ServerAddress(b)
}

func (t *transport) SetHeartbeatHandler(f func(raft.RPC)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heartbeat = f
}

// AppendEntriesPipeline: raft's pipeline stops for good after one rejected append (hashicorp/raft#612).
func (t *transport) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// AppendEntries cuts args.Entries, which raft reads again to learn what was sent. An append is held until the peer's raft has
// answered, because raft backs off for up to 10 s after an error and nothing can wake it. A heartbeat is not: its error is
// how the leader learns that it has lost its followers.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if isHeartbeat(args) {
		return t.beat(id, target, args, resp)
	}
	t.rest(id, args)
	var err error
	if !t.sentAhead(id, args, resp) {
		err = t.appendNow(id, target, args, resp)
	}
	if err == nil {
		t.p.host.answers(id, args.Term)
	}
	if addr, known, _ := t.p.host.server(string(id)); err == nil && known && addr != string(target) {
		// Raft reads its record of the peer without the lock now, and may be writing the new address into it: let it ask again.
		return fmt.Errorf("append to %s: its address is now %s", peerName(id, target), addr)
	}
	return err
}

func (t *transport) appendNow(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	args.Entries = cutToPass(cutEntries(args.Entries), t.room(id, target))
	t.ahead.ordinary(id, args)
	var body []byte
	patience := time.Duration(0) // beyond the usual, for an entry that a slow line does not carry in the usual time
	err := t.hold("append", id, target, args.Term, func() error {
		if room := t.room(id, target); body == nil || int64(len(body)) > room && len(args.Entries) > 1 {
			args.Entries = cutToPass(args.Entries, room)
			body = encodeAppend(args)
		}
		timeout := appendTimeout + timeFor(int64(len(body))) + patience
		began := time.Now()
		err := t.append(id, target, body, resp, timeout)
		if err != nil {
			t.ahead.forget(id, args.Term, 0)
			t.noteFull(id, args.Term, err)
		}
		patience = t.learnRoom(id, target, int64(len(body)), time.Since(began), patience, err)
		if tooLarge(err) && len(args.Entries) == 1 {
			err = fmt.Errorf("entry %d makes a request of %d bytes, which can't be divided: %w", args.Entries[0].Index, len(body), err)
		}
		return err
	})
	switch {
	case err == nil && resp.Success:
		t.ahead.holds(id, args)
	case err == nil:
		t.ahead.forget(id, args.Term, 0)
		if resp.Term == args.Term {
			t.ahead.ends(id, args.Term, min(resp.LastLog, lastSent(args)))
		}
	}
	return err
}

// noteFull: what an append has met may be a log without space.
func (t *transport) noteFull(id raft.ServerID, term uint64, err error) {
	var r *refusal
	if errors.As(err, &r) && r.LogWaits {
		t.p.host.refuses(id, term)
	}
}

func (t *transport) room(id raft.ServerID, target raft.ServerAddress) int64 {
	return t.p.sizes.room(t.p.base(t.address(id, target)))
}

// learnRoom takes from what became of an append how large the next one may be, and how much longer than usual its answer may take.
func (t *transport) learnRoom(id raft.ServerID, target raft.ServerAddress, n int64, took, patience time.Duration, err error) time.Duration {
	base := t.p.base(t.address(id, target))
	switch {
	case err == nil:
		t.p.sizes.passed(base, n, took)
	case errors.Is(err, context.DeadlineExceeded):
		t.p.sizes.late(base, n)
		return min(2*patience+appendTimeout, time.Duration(n/slowestLine)*time.Second)
	case tooLarge(err):
		t.p.sizes.refused(base, n)
	}
	return patience
}

func isHeartbeat(a *raft.AppendEntriesRequest) bool {
	return len(a.Entries) == 0 && a.PrevLogEntry == 0 && a.PrevLogTerm == 0 && a.LeaderCommitIndex == 0
}

func (t *transport) append(id raft.ServerID, target raft.ServerAddress, body []byte, resp *raft.AppendEntriesResponse, timeout time.Duration) error {
	data, err := t.post("append", id, target, body, timeout)
	if err != nil {
		return err
	}
	t.pulses.hears(id)
	return decodeAppendAnswer(data, resp)
}

// hold tries until it works, or until nobody wants it any more. The conditions are looked at after a try: raft sends a last
// append to a member that it has just removed.
func (t *transport) hold(what string, id raft.ServerID, target raft.ServerAddress, term uint64, try func() error) error {
	outage := t.outages.of(id, term)
	for pause := holdSoon; ; pause = min(2*pause, holdInterval) {
		began := time.Now()
		told := t.p.host.announced(string(id))
		silent := t.p.host.silent()
		err := silent
		if silent == nil {
			err = try()
		}
		peer := t.name(id, target)
		if err == nil {
			outage.over(peer)
			return nil
		}
		_, known, _ := t.p.host.server(string(id))
		switch {
		case t.ctx.Err() != nil:
			return errTransportClosed
		case !t.p.host.leading(term):
			outage.leftAlone(term)
			return fmt.Errorf("%s to %s: not leader of term %d any more: %w", what, peer, term, err)
		case !known:
			outage.leftAlone(term)
			return fmt.Errorf("%s to %s: not a member any more: %w", what, peer, err)
		}
		// An address that somebody announced for this member must lead to it, or anybody could cut it off by announcing one.
		if told != "" && silent == nil && strays(err) {
			t.p.host.unannounce(string(id), told)
		}
		if silent == nil { // else this member is the one that is silent, which is a fault of its own
			outage.goesOn(peer, began, explain(err, t.p.base(t.address(id, target))))
		}
		select {
		case <-time.After(pause):
		case <-t.ctx.Done():
			return errTransportClosed
		}
	}
}

func (t *transport) name(id raft.ServerID, target raft.ServerAddress) string {
	return peerName(id, t.address(id, target))
}

// strays: what a call met is not the member that it was meant for, or nobody.
func strays(err error) bool {
	var r *refusal
	return !errors.As(err, &r) || r.Code == codeWrongTarget || r.Code == codeWrongCluster
}

// address is looked up for every try: a member that moved tells its new address before raft's configuration has it.
func (t *transport) address(id raft.ServerID, target raft.ServerAddress) string {
	if addr := t.p.host.announced(string(id)); addr != "" {
		return addr
	}
	if addr, known, _ := t.p.host.server(string(id)); known && addr != "" {
		return addr
	}
	return string(target)
}

func (t *transport) post(route string, id raft.ServerID, target raft.ServerAddress, body []byte, timeout time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	base := t.p.base(t.address(id, target))
	data, err := t.p.call(ctx, request{route: route, base: base, to: string(id), body: body, again: true, bound: true})
	if err != nil && t.ctx.Err() != nil {
		return nil, errTransportClosed
	}
	return data, err
}

func (t *transport) postJSON(route string, id raft.ServerID, target raft.ServerAddress, args, resp any) error {
	body, err := json.Marshal(args)
	if err != nil {
		return err
	}
	data, err := t.post(route, id, target, body, voteTimeout)
	if err != nil {
		return explain(err, t.p.base(t.address(id, target)))
	}
	return json.Unmarshal(data, resp)
}

func (t *transport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if err := t.p.host.silent(); err != nil {
		return err // it could not keep what it promises as a leader
	}
	return checkAnswer(t.postJSON("vote", id, target, args, resp), &resp.Term)
}

// checkAnswer: raft takes a newer term from any answer and writes it down. One that nobody can have come to would end the cluster.
func checkAnswer(err error, term *uint64) error {
	if err == nil && *term > maxIndex {
		return fmt.Errorf("%w: answer of term %d", errFrame, *term)
	}
	return err
}

// RequestPreVote returns an error of ours without its words: raft takes the text "unexpected command" inside any error for an
// old member that does not know pre-votes, and counts it as granted. Anyone who answers at the address could write that.
func (t *transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if t.p.host.silent() != nil {
		return fmt.Errorf("prevote: this member is silent")
	}
	if t.p.host.standsLast() {
		return fmt.Errorf("prevote: this member is unfit to lead, and the others stand first")
	}
	err := checkAnswer(t.postJSON("prevote", id, target, args, resp), &resp.Term)
	if err != nil && strings.Contains(err.Error(), "unexpected command") {
		return fmt.Errorf("prevote: %s answers with an error", peerName(id, target))
	}
	return err
}

// TimeoutNow to ourselves makes a sole voter the leader at once. It goes straight to raft: nobody serves our handler yet.
func (t *transport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	if self, _, _ := t.p.host.self(); string(id) != self {
		return t.postJSON("timeoutnow", id, target, args, resp)
	}
	ctx, cancel := context.WithTimeout(t.ctx, voteTimeout)
	defer cancel()
	_, err := t.deliver(ctx, args)
	return err
}

// InstallSnapshot waits for the peer before its first byte, as an append does. After that the state goes in pieces, or in one request
// to a member whose release does not know them; an error is raft's to handle.
func (t *transport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	err := t.hold("snapshot", id, target, args.Term, func() error { return t.probe(id, target) })
	if err != nil {
		return err
	}
	began := time.Now()
	t.p.host.snapshots(1)
	defer t.p.host.snapshots(-1)
	answer, err := t.sendPieces(id, target, args, data)
	if errors.Is(err, errNoPieces) {
		answer, err = t.sendWhole(id, target, args, data)
	}
	if t.ctx.Err() != nil {
		return errTransportClosed
	}
	if err == nil {
		err = checkAnswer(nil, &answer.Term)
	}
	if err == nil {
		*resp = *answer
	} else {
		err = fmt.Errorf("snapshot to %s: %w", t.name(id, target), err)
	}
	if told := err; t.p.host.leading(args.Term) {
		if err == nil && !resp.Success {
			told = errors.New("its raft has rejected the state")
		}
		t.outages.of(id, args.Term).sent(t.name(id, target), began, args.Size, told)
	}
	return err
}

// sendWhole sends a snapshot in one request.
func (t *transport) sendWhole(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
	header, err := encodeSnapshotHeader(args)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	alive := time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer alive.Stop()
	body := io.MultiReader(bytes.NewReader(header), &sentReader{
		r: io.LimitReader(data, args.Size), left: args.Size, alive: alive,
		patience: installTime(args.Size),
	})
	base := t.p.base(t.address(id, target))
	answer, err := t.p.call(ctx, request{
		route: "snapshot", base: base, to: string(id), stream: body, size: int64(len(header)) + args.Size,
	})
	switch {
	case err != nil && context.Cause(ctx) == errStalled:
		return nil, errStalled
	case err != nil:
		return nil, explain(err, base)
	}
	resp := new(raft.InstallSnapshotResponse)
	return resp, json.Unmarshal(answer, resp)
}

// installTime divides first: in nanoseconds, more than 8 GiB would be a negative time.
func installTime(size int64) time.Duration {
	return stallTimeout + time.Duration(size/installRate)*time.Second
}

func (t *transport) probe(id raft.ServerID, target raft.ServerAddress) error {
	ctx, cancel := context.WithTimeout(t.ctx, voteTimeout)
	defer cancel()
	base := t.p.base(t.address(id, target))
	_, err := t.p.call(ctx, request{method: http.MethodGet, route: "status", base: base, to: string(id)})
	return err
}

// A sentReader postpones the end of a transfer as long as bytes leave, and then leaves the receiver the time to install them.
type sentReader struct {
	r        io.Reader
	left     int64
	alive    *time.Timer
	patience time.Duration
}

func (s *sentReader) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	s.left -= int64(n)
	if s.left <= 0 {
		s.alive.Reset(s.patience)
	} else if n > 0 {
		s.alive.Reset(stallTimeout)
	}
	return n, err
}

// --- the raft half of the door

// deliver hands a message to raft's main loop and waits for its answer.
func (t *transport) deliver(ctx context.Context, command any) (any, error) {
	answer := make(chan raft.RPCResponse, 1)
	if err := t.hand(ctx, raft.RPC{Command: command, RespChan: answer}); err != nil {
		return nil, err
	}
	return t.await(ctx, answer)
}

func (t *transport) hand(ctx context.Context, rpc raft.RPC) error {
	select {
	case t.consumer <- rpc:
		return nil
	case <-ctx.Done():
	case <-t.ctx.Done():
	}
	return refuse(http.StatusServiceUnavailable, codeNotReady, "raft did not take the message")
}

func (t *transport) await(ctx context.Context, answer <-chan raft.RPCResponse) (any, error) {
	select {
	case a := <-answer:
		if a.Error != nil {
			return nil, refuse(http.StatusServiceUnavailable, codeNotReady, "raft: %v", a.Error)
		}
		return a.Response, nil
	case <-ctx.Done():
	case <-t.ctx.Done():
	}
	return nil, refuse(http.StatusServiceUnavailable, codeNotReady, "raft did not answer")
}

// raftNow is the transport of the raft that runs. A member whose disk is stalled or has failed acknowledges nothing.
func (p *peer) raftNow() (*transport, error) {
	if err := p.host.silent(); err != nil {
		return nil, refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
	}
	t := p.current.Load()
	if t == nil || t.ctx.Err() != nil {
		return nil, refuse(http.StatusServiceUnavailable, codeNotReady, "raft is not running")
	}
	return t, nil
}

// checkSender: raft believes the id in the message, the door has checked the one in the header.
func (x *exchange) checkSender(h raft.RPCHeader) error {
	if string(h.ID) != x.from {
		return refuse(http.StatusBadRequest, codeBadRequest, "message of %q, sent by %q", shortID(string(h.ID)), shortID(x.from))
	}
	return nil
}

// checkLeader: a term has one leader, and raft takes whoever speaks as one for it: a leader steps down for a message of its own
// term. Raft forgets the leader before it takes a new term, so the term is read first.
func (p *peer) checkLeader(x *exchange, term uint64) error {
	if p.host.term() != term || !p.host.hasLeader() {
		return nil
	}
	if id, _ := p.host.leader(); id != "" && id != x.from {
		return refuse(http.StatusConflict, codeConflict, "the leader of term %d is member %s", term, shortID(id))
	}
	return nil
}

func (p *peer) serveAppend(ctx context.Context, x *exchange) error {
	t, err := p.raftNow()
	if err != nil {
		return err
	}
	data, err := x.body(maxAppendBody)
	if err != nil {
		return err
	}
	args, err := decodeAppend(data)
	if err == nil {
		err = checkAppend(args)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "%v", err)
	}
	if err := x.checkSender(args.RPCHeader); err != nil {
		return err
	}
	if err := p.checkLeader(x, args.Term); err != nil {
		return err
	}
	for _, e := range args.Entries {
		// Stopping for a bad entry in our log is right; for one bad message it would let a flaw on the way stop a member.
		if err := p.host.checkEntry(e); err != nil {
			return refuse(http.StatusBadRequest, codeBadRequest, "entry %d: %v", e.Index, err)
		}
	}
	answer, err := t.takeAppend(ctx, args)
	if err != nil {
		return err
	}
	resp, ok := answer.(*raft.AppendEntriesResponse)
	if !ok {
		return refuse(http.StatusServiceUnavailable, codeNotReady, "raft answered %T", answer)
	}
	if err := p.host.logWaits(); err != nil && !resp.Success && len(args.Entries) > 0 {
		// A leader's raft would take this for a log that differs, and pause for up to 10 s before it sends anything again.
		r := refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
		r.LogWaits = true
		return r
	}
	x.answer(encodeAppendAnswer(resp))
	return nil
}

// takeAppend keeps a heartbeat off raft's main loop, which may be waiting for the disk: but only one that changes nothing.
// A new term or a first sign of the leader would be written to disk beside the main loop, which may be writing a newer
// term for a vote at that moment: the older one would win, and the member could help two leaders.
func (t *transport) takeAppend(ctx context.Context, args *raft.AppendEntriesRequest) (any, error) {
	if !isHeartbeat(args) {
		t.gap.wait(ctx, func() bool { return args.PrevLogEntry <= t.p.host.raftEnd() || args.Term != t.p.host.term() })
		defer t.gap.answered()
		return t.deliver(ctx, args)
	}
	ctx, cancel := context.WithTimeout(ctx, voteTimeout)
	defer cancel()
	t.mu.Lock()
	fast := t.heartbeat
	t.mu.Unlock()
	term := t.p.host.term()
	if fast == nil || args.Term > term || args.Term == term && !t.p.host.hasLeader() {
		return t.deliver(ctx, args)
	}
	answer := make(chan raft.RPCResponse, 1)
	go fast(raft.RPC{Command: args, RespChan: answer}) // ends with raft's answer, which nobody may be waiting for any more
	return t.await(ctx, answer)
}

// committed repeats to our own raft, as an append without entries, what its leader has just said: that it has committed this
// entry of its term. Raft's leader sends that only with the next append, 10 to 20 ms later if nobody writes. Nothing is said
// unless the log holds that very entry and the term is still the leader's, and raft checks both again.
func (p *peer) committed(ctx context.Context, index, term uint64) {
	t, err := p.raftNow()
	if err != nil || p.host.term() != term || p.host.leading(term) {
		return
	}
	id, addr := p.host.leader()
	if have, ok := p.host.termAt(index); id == "" || !ok || have != term {
		return
	}
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: t.EncodePeer(raft.ServerID(id), raft.ServerAddress(addr))}
	t.deliver(ctx, &raft.AppendEntriesRequest{RPCHeader: header, Term: term, PrevLogEntry: index, PrevLogTerm: term, LeaderCommitIndex: index})
}

// unknownCandidate is one that is no voter here, and was not removed. Our configuration may be the older one: when a cluster of two had grown to
// three, a member that had missed it could refuse the third for ever while the third refused its older log.
func (p *peer) unknownCandidate(id string) bool {
	_, _, voter := p.host.server(id)
	return !voter && !p.host.removed(id)
}

// checkTerm: raft writes down any term that it is asked to vote in, and takes no older one ever after.
func checkTerm(term uint64) error {
	if term > maxIndex {
		return refuse(http.StatusBadRequest, codeBadRequest, "term %d", term)
	}
	return nil
}

// serveVote: without an id raft asks only what makes a vote safe, the term and the log. That a member which has a leader takes
// over no newer term is raft's rule too, but it knows the leader by its address, which anyone can claim.
func (p *peer) serveVote(ctx context.Context, x *exchange) error {
	var args raft.RequestVoteRequest
	t, err := p.takeJSON(x, &args)
	if err != nil {
		return err
	}
	if err := x.checkSender(args.RPCHeader); err != nil {
		return err
	}
	if err := checkTerm(args.Term); err != nil {
		return err
	}
	if p.unknownCandidate(x.from) {
		if p.host.hasLeader() {
			return x.answerJSON(raft.RequestVoteResponse{RPCHeader: p.header(t), Term: p.host.term()})
		}
		args.ID = nil
	}
	return t.relay(ctx, x, &args)
}

func (p *peer) servePreVote(ctx context.Context, x *exchange) error {
	var args raft.RequestPreVoteRequest
	t, err := p.takeJSON(x, &args)
	if err != nil {
		return err
	}
	if err := x.checkSender(args.RPCHeader); err != nil {
		return err
	}
	if err := checkTerm(args.Term); err != nil {
		return err
	}
	if p.unknownCandidate(x.from) {
		return x.answerJSON(p.preVote(t, &args))
	}
	return t.relay(ctx, x, &args)
}

// preVote is raft's own rule but for the question whether the candidate is a voter, which raft asks even without an id.
func (p *peer) preVote(t *transport, args *raft.RequestPreVoteRequest) raft.RequestPreVoteResponse {
	term := p.host.term()
	index, logTerm := p.host.lastEntry()
	newer := args.LastLogTerm > logTerm || args.LastLogTerm == logTerm && args.LastLogIndex >= index
	granted := !p.host.hasLeader() && args.Term >= term && newer
	if granted {
		term = args.Term
	}
	return raft.RequestPreVoteResponse{RPCHeader: p.header(t), Term: term, Granted: granted}
}

// header is that of raft's own messages.
func (p *peer) header(t *transport) raft.RPCHeader {
	id, _, _ := p.host.self()
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: t.EncodePeer(raft.ServerID(id), t.LocalAddr())}
}

// serveTimeoutNow: raft makes itself a candidate at this message, whatever it is, and disturbs the others if it has no vote.
func (p *peer) serveTimeoutNow(ctx context.Context, x *exchange) error {
	var args raft.TimeoutNowRequest
	t, err := p.takeJSON(x, &args)
	if err != nil {
		return err
	}
	if err := x.checkSender(args.RPCHeader); err != nil {
		return err
	}
	if _, _, voter := p.host.server(x.id); !voter {
		return refuse(http.StatusForbidden, codeNotAllowed, "this member has no vote")
	}
	return t.relay(ctx, x, &args)
}

func (p *peer) takeJSON(x *exchange, args any) (*transport, error) {
	t, err := p.raftNow()
	if err != nil {
		return nil, err
	}
	return t, x.bodyJSON(args)
}

func (t *transport) relay(ctx context.Context, x *exchange, args any) error {
	answer, err := t.deliver(ctx, args)
	if err != nil {
		return err
	}
	return x.answerJSON(answer)
}

// serveSnapshot keeps its place, the only one, until raft has answered: a sender that goes away ends raft's reading, but
// raft may be installing by then.
func (p *peer) serveSnapshot(ctx context.Context, x *exchange) error {
	t, err := p.raftNow()
	if err != nil {
		return err
	}
	x.readWithin(stallTimeout)
	args, err := readSnapshotHeader(x.req.Body)
	if err == nil {
		err = checkSnapshot(args)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "%v", err)
	}
	if err := x.checkSender(args.RPCHeader); err != nil {
		return err
	}
	if err := p.checkLeader(x, args.Term); err != nil {
		return err
	}
	body := &receivedReader{x: x, r: io.LimitReader(x.req.Body, args.Size), until: time.Now().Add(stallTimeout)}
	defer body.end()
	if p.holds(args) {
		if _, err := io.Copy(io.Discard, body); err != nil { // a sender still writing would not see the answer
			return refuse(http.StatusBadRequest, codeBadRequest, "snapshot: %v", err)
		}
		return x.answerJSON(raft.InstallSnapshotResponse{Term: p.host.term(), Success: true})
	}
	if err := p.checkRoom(args.Size); err != nil {
		return err
	}
	answer := make(chan raft.RPCResponse, 1)
	if err := t.hand(ctx, raft.RPC{Command: args, Reader: body, RespChan: answer}); err != nil {
		return err
	}
	resp, err := t.await(t.ctx, answer)
	if err != nil {
		return err
	}
	return x.answerJSON(resp)
}

// holds: this member has all of the snapshot already. Raft would install it all the same and then empty its log: entries
// above the snapshot that this member has acknowledged would be gone.
func (p *peer) holds(args *raft.InstallSnapshotRequest) bool {
	if args.Term < p.host.term() {
		return false // raft's answer is what tells an old leader that it is one
	}
	if args.LastLogIndex <= min(p.host.applied(), p.host.raftEnd()) {
		return true
	}
	term, ok := p.host.termAt(args.LastLogIndex)
	return ok && term == args.LastLogTerm
}

// A receivedReader is a snapshot coming in: it may take as long as its bytes do, but not stand still. The size that was declared
// buys no time: only what has come does. Raft may still be reading
// when the handler has returned, and net/http does not allow it to touch the connection then.
type receivedReader struct {
	x     *exchange
	r     io.Reader
	until time.Time // raft's main loop reads it and does nothing else meanwhile, so it must end

	mu    sync.Mutex // held across setting a deadline, never across a read
	ended bool
}

func (r *receivedReader) Read(b []byte) (int, error) {
	r.mu.Lock()
	if r.ended {
		r.mu.Unlock()
		return 0, errTransportClosed
	}
	left := time.Until(r.until)
	if left <= 0 {
		r.mu.Unlock()
		return 0, fmt.Errorf("snapshot: slower than %d bytes a second", receiveRate)
	}
	r.x.readWithin(min(stallTimeout, left))
	r.mu.Unlock()
	n, err := guardedBody{io.NopCloser(r.r)}.Read(b) // a handler before ours may have put its own reader there
	r.until = r.until.Add(time.Duration(n) * time.Second / receiveRate)
	if err == io.EOF {
		r.mu.Lock()
		if !r.ended {
			r.x.forgetRead() // installing may take longer
		}
		r.mu.Unlock()
	}
	return n, err
}

func (r *receivedReader) end() {
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
}

// --- sending

// A request is one call. Its stream, if any, is size bytes; else body is sent.
type request struct {
	method string // "" is POST
	route  string
	base   string // http(s)://host:port
	query  string
	to     string // the member that must answer, "" if it is not known
	body   []byte
	stream io.Reader
	size   int64
	fresh  bool   // on a connection of its own
	way    string // with fresh: the address to connect to instead of base's; "" is base's
	limit  int    // bytes of the answer; 0 = maxAnswerBody
	bound  bool   // its context ends with the peer
	again  bool   // it may be sent twice, as is done when a kept connection turns out to be closed
}

func (p *peer) base(addr string) string { return baseURL(addr, p.useTLS) }

func (p *peer) callJSON(ctx context.Context, r request, body, answer any) error {
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		r.body = data
	}
	data, err := p.call(ctx, r)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("answer to %s: %w", r.route, err)
	}
	return nil
}

// call reads the answer to its end, so that the connection is used again.
func (p *peer) call(ctx context.Context, r request) ([]byte, error) {
	if !r.bound {
		bound, cancel := p.bind(ctx)
		defer cancel()
		ctx = bound
	}
	resp, err := p.do(ctx, r)
	if err != nil {
		if p.ctx.Err() != nil {
			return nil, fmt.Errorf("%s: %w", r.route, ErrClosed)
		}
		return nil, err
	}
	defer resp.Body.Close()
	return readAnswer(resp, cmp.Or(r.limit, maxAnswerBody))
}

// readAnswer is ReadAll with a limit, and begins with a buffer of the size that the answer says it has: most are tiny.
func readAnswer(resp *http.Response, limit int) ([]byte, error) {
	size := resp.ContentLength
	if size < 0 || size > 64<<10 {
		size = 512
	}
	data := make([]byte, 0, size+1)
	for len(data) <= limit {
		n, err := resp.Body.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		switch {
		case err == io.EOF && len(data) <= limit:
			return data, nil
		case err != nil && err != io.EOF:
			return nil, err
		case len(data) == cap(data):
			data = slices.Grow(data, len(data))
		}
	}
	return nil, fmt.Errorf("%w: answer of more than %d bytes", errFrame, limit)
}

// careful calls code of the caller's. A panic there is an error here: most of it runs in goroutines of ours, and would take the process
// along.
func careful[T any](what string, f func() (T, error)) (v T, err error) {
	defer func() {
		if p := recover(); p != nil {
			var none T
			v, err = none, fmt.Errorf("%s panicked: %v", what, p)
		}
	}()
	return f()
}

// guarded is for the caller's client, whose transport and cookie jar may be the caller's code.
func (p *peer) guarded(send func(*http.Request) (*http.Response, error)) func(*http.Request) (*http.Response, error) {
	return func(req *http.Request) (*http.Response, error) {
		resp, err := careful("the HTTP client", func() (*http.Response, error) { return send(req) })
		if err == nil && !p.traced {
			resp.Body = guardedBody{resp.Body}
		}
		return resp, err
	}
}

// guardedBody is a body that code of the caller's has made: that of an answer of its transport's, or of a request that its middleware
// hands on.
type guardedBody struct{ io.ReadCloser }

func (b guardedBody) Read(p []byte) (int, error) {
	return careful("the body", func() (int, error) { return b.ReadCloser.Read(p) })
}

func (b guardedBody) Close() error {
	_, err := careful("the body", func() (struct{}, error) { return struct{}{}, b.ReadCloser.Close() })
	return err
}

// do returns an answer of the member that was asked, with its body still to be read. Anything else is an error.
func (p *peer) do(ctx context.Context, r request) (*http.Response, error) {
	if r.method == "" {
		r.method = http.MethodPost
	}
	body, size := r.stream, r.size
	if body == nil && r.method == http.MethodPost {
		body, size = bytes.NewReader(r.body), int64(len(r.body))
	}
	req, err := http.NewRequestWithContext(ctx, r.method, "", body)
	if err != nil {
		return nil, err
	}
	scheme, host, _ := strings.Cut(strings.TrimSuffix(r.base, "/"), "://")
	req.URL.Scheme, req.URL.Host, req.URL.Path = scheme, host, "/raft/"+r.route
	req.URL.RawQuery = r.query
	req.Host = host
	req.ContentLength = size
	id, cluster, addr := p.host.self()
	protocol := protocolVersion
	state, reads := p.host.formats()
	if state > firstFormat {
		protocol = laterProtocol
	}
	setHeaders(req.Header, headerProtocol, strconv.Itoa(protocol), headerReads, strconv.FormatUint(reads, 10),
		headerCluster, cluster, headerFrom, id, headerFromAddr, addr, headerTo, r.to)
	if r.again {
		req.Header["Idempotency-Key"] = nil // means that to net/http, and is not sent
	}
	send := p.guarded(p.client.Do)
	switch {
	case r.fresh:
		send = p.guarded(p.onNewConnection(r.way))
	case r.again && p.links.takes(req):
		send = p.links.do
	}
	began := time.Now()
	resp, err := send(req)
	if err == nil {
		if err = p.accept(resp, r, cluster); err != nil {
			resp.Body.Close()
		}
	}
	if r.to != "" {
		p.host.called(r.to, r.base, began, err)
	}
	if err != nil {
		return nil, err
	}
	if r.to != "" {
		p.host.contact(r.to)
	}
	return resp, nil
}

func (p *peer) accept(resp *http.Response, r request, cluster string) error {
	h := resp.Header
	if header(h, headerProtocol) == "" {
		return foreign(resp)
	}
	if coding := header(h, "Content-Encoding"); coding != "" {
		return &encodedAnswer{coding}
	}
	if resp.StatusCode != http.StatusOK {
		return readRefusal(resp)
	}
	if v := header(h, headerProtocol); v != strconv.Itoa(protocolVersion) {
		return fmt.Errorf("%s: answer in protocol %q, and this member speaks %d", r.route, v, protocolVersion)
	}
	if from := header(h, headerFrom); r.to != "" && from != r.to {
		return fmt.Errorf("%s: member %q answers at %s instead of %s", r.route, shortID(from), r.base, shortID(r.to))
	}
	if theirs := header(h, headerCluster); r.to != "" && cluster != "" && theirs != cluster {
		return fmt.Errorf("%s: %s answers for cluster %q", r.route, r.base, shortID(theirs))
	}
	return nil
}

func readRefusal(resp *http.Response) error {
	data, err := readAnswer(resp, maxSmallBody)
	if err != nil {
		return err
	}
	refused := refusal{Status: resp.StatusCode}
	if err := json.Unmarshal(data, &refused); err != nil || refused.Code == "" {
		return &foreignAnswer{status: resp.StatusCode, body: string(data[:min(len(data), 512)])}
	}
	refused.Message = shortIDs(refused.Message) // release 0.1.0 writes them whole
	return &refused
}
