package quorate

// A snapshot in pieces: how a state gets to a member through a proxy that limits the size of a request, over a line that breaks, and
// over a slow one. It owns both ends of the route /raft/piece: the sender's, who has the bytes once and gives each piece until it is
// taken, and the receiver's file, which grows until it is whole and is then given to raft as if it had come in one request. It never
// looks into the state: raft, fsm.go and copy.go judge it, as they do one that comes whole. Control comes from the transport's
// InstallSnapshot on the one side and from the peer's door on the other.
//
//	piece     length json { byte }              the json is a pieceHeader, the bytes are the state's from its At on
//	answer    json                              a pieceAnswer
//
// Raft's main loop reads a snapshot and does nothing else meanwhile. In pieces it reads it from a file, however slow the line is.

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	pieceFirst  = 256 << 10
	pieceLeast  = 4 << 10
	pieceMost   = 4 << 20
	pieceQuick  = 500 * time.Millisecond // a piece that is taken sooner is followed by a larger one
	pieceSlow   = 4 * time.Second        // and one that takes longer by a smaller one
	piecePause  = 500 * time.Millisecond // after a try that failed
	pieceGiveUp = 2 * time.Minute        // without progress; raft begins with a new snapshot when the member answers again
	pieceIdle   = 5 * time.Minute        // the receiver drops what nobody goes on with
	pieceWait   = 5 * time.Second        // for the install in one answer: it may take longer than a proxy waits
)

// A pieceHeader says whose bytes follow. ID names one sending of one snapshot: what was received of another one is of no use to it.
type pieceHeader struct {
	ID      string                      `json:"id"`
	At      int64                       `json:"at"`
	Install raft.InstallSnapshotRequest `json:"install"`
}

// A pieceAnswer says where the next piece begins, or what became of the whole.
type pieceAnswer struct {
	Have int64                         `json:"have"`
	Done *raft.InstallSnapshotResponse `json:"done,omitempty"`
}

func encodePiece(h *pieceHeader, data []byte) ([]byte, error) {
	header, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(header) > maxSmallBody {
		return nil, &LimitError{What: "header of a piece of a snapshot", Limit: maxSmallBody, Got: int64(len(header))}
	}
	b := make([]byte, 0, binary.MaxVarintLen64+len(header)+len(data))
	return append(append(binary.AppendUvarint(b, uint64(len(header))), header...), data...), nil
}

// decodePiece aliases body.
func decodePiece(body []byte) (h pieceHeader, data []byte, err error) {
	r := reader{b: body}
	header := r.bytes(maxSmallBody)
	if r.bad {
		return h, nil, fmt.Errorf("%w: piece of a snapshot", errFrame)
	}
	if err := json.Unmarshal(header, &h); err != nil {
		return h, nil, fmt.Errorf("%w: piece of a snapshot: %v", errFrame, err)
	}
	if err := checkSnapshot(&h.Install); err != nil {
		return h, nil, err
	}
	if !validID(h.ID) || h.At < 0 || int64(len(r.b)) > h.Install.Size-h.At {
		return h, nil, fmt.Errorf("%w: %d bytes at %d of a snapshot of %d", errFrame, len(r.b), h.At, h.Install.Size)
	}
	return h, r.b, nil
}

// --- the sender

var errNoPieces = errors.New("the member takes no snapshot in pieces")

// A pieceSender is one sending of one snapshot.
type pieceSender struct {
	t      *transport
	id     raft.ServerID
	target raft.ServerAddress
	header pieceHeader // its At is where buf begins
	data   io.Reader   // what follows buf
	buf    []byte      // read, and not taken by the receiver
	size   int64       // of the next piece
	begun  bool        // the member takes pieces
	moved  time.Time   // when the receiver last took something
}

// sendPieces sends a snapshot in pieces, each until it is taken. errNoPieces: nothing of data was read, as the member's release does
// not know them.
func (t *transport) sendPieces(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error) {
	s := &pieceSender{t: t, id: id, target: target, header: pieceHeader{ID: newID(), Install: *args},
		data: io.LimitReader(data, args.Size), size: pieceFirst, moved: time.Now()}
	for {
		n, err := s.next()
		if err != nil {
			return nil, err
		}
		began := time.Now()
		a, err := s.send(n)
		switch {
		case err == nil && a.Done != nil:
			return a.Done, nil
		case err == nil:
			err = s.advance(a.Have, n, time.Since(began))
		default:
			err = s.failed(n, err)
		}
		if err != nil {
			return nil, err
		}
	}
}

func (s *pieceSender) base() string { return s.t.p.base(s.t.address(s.id, s.target)) }

// send gives one piece, the first n bytes of buf.
func (s *pieceSender) send(n int) (a pieceAnswer, err error) {
	if err := s.t.p.host.silent(); err != nil {
		return a, err
	}
	body, err := encodePiece(&s.header, s.buf[:n])
	if err != nil {
		return a, err
	}
	ctx, cancel := context.WithTimeout(s.t.ctx, stallTimeout)
	defer cancel()
	data, err := s.t.p.call(ctx, request{route: "piece", base: s.base(), to: string(s.id), body: body, bound: true})
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(data, &a)
}

// next reads more if all was taken, and says how long the next piece is. The first one is empty and asks whether pieces are taken, and
// one after the last asks what became of the whole.
func (s *pieceSender) next() (int, error) {
	if !s.begun {
		return 0, nil
	}
	room := s.t.p.sizes.hard(s.base()) - s.headerBytes()
	size := min(s.size, max(room, 1))
	if left := s.header.Install.Size - s.header.At; len(s.buf) == 0 && left > 0 {
		s.buf = make([]byte, min(left, size))
		if _, err := io.ReadFull(s.data, s.buf); err != nil {
			return 0, fmt.Errorf("read the state: %w", err)
		}
	}
	return int(min(size, int64(len(s.buf)))), nil
}

// headerBytes is more than the header of any piece takes.
func (s *pieceSender) headerBytes() int64 {
	h, err := encodePiece(&s.header, nil)
	if err != nil {
		return maxSmallBody
	}
	return int64(len(h)) + 32 // At grows
}

// advance: the receiver has everything up to have.
func (s *pieceSender) advance(have int64, n int, took time.Duration) error {
	s.begun = true
	got := have - s.header.At // perhaps with an earlier, longer piece whose answer was lost
	if got < 0 || got > int64(len(s.buf)) {
		return fmt.Errorf("%w: a piece of %d bytes at %d leaves the member with %d", errFrame, n, s.header.At, have)
	}
	s.buf, s.header.At = s.buf[got:], have
	switch {
	case have == s.header.Install.Size:
		if time.Since(s.moved) > installTime(s.header.Install.Size) {
			return fmt.Errorf("the member has all of the snapshot and has not installed it in %v", time.Since(s.moved).Round(time.Second))
		}
	case n > 0 && got == 0:
		return fmt.Errorf("%w: the member takes no bytes at %d", errFrame, have)
	}
	if got > 0 {
		s.moved = time.Now()
	}
	switch {
	case n == 0:
	case took > pieceSlow:
		s.size = max(s.size/2, pieceLeast)
	case took < pieceQuick && int64(n) >= s.size:
		s.size = min(2*s.size, pieceMost)
	}
	return nil
}

// failed waits before the next try; an error ends the sending.
func (s *pieceSender) failed(n int, err error) error {
	t := s.t
	_, known, _ := t.p.host.server(string(s.id))
	switch {
	case t.ctx.Err() != nil:
		return errTransportClosed
	case !s.begun && unknownRoute(err):
		return errNoPieces
	case !t.p.host.leading(s.header.Install.Term):
		return fmt.Errorf("not leader of term %d any more: %w", s.header.Install.Term, err)
	case !known:
		return fmt.Errorf("not a member any more: %w", err)
	case tooLarge(err):
		if !t.p.sizes.refused(s.base(), int64(n)+s.headerBytes()) {
			return fmt.Errorf("a piece of %d bytes does not pass: %w", n, explain(err, s.base()))
		}
		return nil // a smaller one, now
	case !mayTakeLater(err) || time.Since(s.moved) > pieceGiveUp:
		return explain(err, s.base())
	}
	if errors.Is(err, context.DeadlineExceeded) {
		s.size = max(s.size/2, pieceLeast)
	}
	select {
	case <-time.After(piecePause):
		return nil
	case <-t.ctx.Done():
		return errTransportClosed
	}
}

// unknownRoute: the member's release does not know the route, or what stands before it lets only those pass that it knows.
func unknownRoute(err error) bool {
	var r *refusal
	var f *foreignAnswer
	return errors.As(err, &r) && r.Status == http.StatusNotFound || errors.As(err, &f) && (f.status == http.StatusNotFound || f.status == http.StatusMethodNotAllowed)
}

// mayTakeLater: the member may take the same piece later.
func mayTakeLater(err error) bool {
	var r *refusal
	return !errors.As(err, &r) || r.Code == codeNotReady || r.Code == codeBusy
}

// --- the receiver

// arrivals is the one snapshot that is being received in pieces.
type arrivals struct {
	mu  sync.Mutex // guards the fields below and those of cur; held across a write of one piece
	cur *arrival   // nil = none
}

// An arrival is what has come of a snapshot. Its file is removed when it ends.
type arrival struct {
	id, from string
	install  raft.InstallSnapshotRequest
	file     *os.File
	have     int64
	idle     *time.Timer
	unbind   func() bool // from the end of the peer

	done chan struct{} // closed when raft has answered; nil until raft was asked
	resp *raft.InstallSnapshotResponse
	err  error
}

// servePiece takes a piece under the checks of the install that it belongs to, and answers where the next one begins. The answer to
// the last one, and to an empty one after it, is that of raft if that comes soon.
func (p *peer) servePiece(ctx context.Context, x *exchange) error {
	if p.host.incoming == nil {
		return refuse(http.StatusNotFound, codeBadRequest, "no such route")
	}
	t, err := p.raftNow()
	if err != nil {
		return err
	}
	body, err := x.body(pieceMost + 2*maxSmallBody)
	if err != nil {
		return err
	}
	h, data, err := decodePiece(body)
	if err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "%v", err)
	}
	if err := x.checkSender(h.Install.RPCHeader); err != nil {
		return err
	}
	if err := p.checkLeader(x, h.Install.Term); err != nil {
		return err
	}
	if term := p.host.term(); h.Install.Term < term { // which is what tells an old leader that it is one
		return x.answerJSON(pieceAnswer{Done: &raft.InstallSnapshotResponse{RPCHeader: p.header(t), Term: term}})
	}
	c, have, err := p.takePiece(t, x.from, h, data)
	if err != nil {
		return err
	}
	if c == nil {
		return x.answerJSON(pieceAnswer{Have: have, Done: &raft.InstallSnapshotResponse{RPCHeader: p.header(t), Term: p.host.term(), Success: true}})
	}
	return p.answerPiece(ctx, x, c, have)
}

// takePiece adds a piece to what has come before it. No arrival is returned if the member has what the snapshot holds.
func (p *peer) takePiece(t *transport, from string, h pieceHeader, data []byte) (c *arrival, have int64, err error) {
	p.arrivals.mu.Lock()
	defer p.arrivals.mu.Unlock()
	c = p.arrivals.cur
	if c == nil || c.id != h.ID || c.from != from {
		if p.holds(&h.Install) {
			return nil, h.Install.Size, nil
		}
		if c, err = p.beginArrivalLocked(from, h); err != nil {
			return nil, 0, err
		}
	}
	c.idle.Reset(pieceIdle)
	if c.done != nil || h.At != c.have {
		return c, c.have, nil // a piece that has come before, or its sender did not hear that it had
	}
	if h.Install.Size != c.install.Size || h.Install.LastLogIndex != c.install.LastLogIndex || h.Install.Term != c.install.Term {
		return nil, 0, refuse(http.StatusBadRequest, codeBadRequest, "a piece of another snapshot under the same id")
	}
	if _, err := c.file.WriteAt(data, c.have); err != nil {
		p.dropArrivalLocked(c)
		if p.host.noRoom != nil {
			p.host.noRoom(err)
		}
		return nil, 0, refuse(http.StatusConflict, codeConflict, "keep a piece of a snapshot: %v", err)
	}
	if c.have += int64(len(data)); c.have == c.install.Size {
		err = p.installArrivalLocked(t, c)
	}
	return c, c.have, err
}

// beginArrivalLocked drops what came before, unless raft is at it.
func (p *peer) beginArrivalLocked(from string, h pieceHeader) (*arrival, error) {
	if h.At != 0 {
		return nil, refuse(http.StatusConflict, codeConflict, "nothing of this snapshot is here, as this member was started again or has "+
			"received another one meanwhile")
	}
	if c := p.arrivals.cur; c != nil {
		if c.installing() {
			return nil, refuse(http.StatusServiceUnavailable, codeBusy, "another snapshot is being installed")
		}
		p.dropArrivalLocked(c)
	}
	if err := p.checkRoom(h.Install.Size); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(p.host.incoming(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, refuse(http.StatusConflict, codeConflict, "keep a snapshot: %v", err)
	}
	c := &arrival{id: h.ID, from: from, install: h.Install, file: file}
	drop := func() {
		p.arrivals.mu.Lock()
		defer p.arrivals.mu.Unlock()
		if !c.installing() {
			p.dropArrivalLocked(c)
		}
	}
	c.idle = time.AfterFunc(pieceIdle, drop)
	c.unbind = context.AfterFunc(p.ctx, drop)
	p.arrivals.cur = c
	return c, nil
}

// checkRoom refuses a snapshot that does not fit, before it has taken the space that is left from everything else.
func (p *peer) checkRoom(size int64) error {
	if p.host.roomFor == nil {
		return nil
	}
	if err := p.host.roomFor(size); err != nil {
		return refuse(http.StatusConflict, codeConflict, "keep a snapshot: %v", err)
	}
	return nil
}

// installing: raft was asked and has not answered.
func (c *arrival) installing() bool {
	return c.done != nil && !isClosed(c.done)
}

func (p *peer) dropArrivalLocked(c *arrival) {
	c.idle.Stop()
	c.unbind()
	c.discard()
	if p.arrivals.cur == c {
		p.arrivals.cur = nil
	}
}

// discard may be called again.
func (c *arrival) discard() {
	if c.file != nil {
		c.file.Close()
		os.Remove(c.file.Name())
		c.file = nil
	}
}

// installArrivalLocked gives the whole to raft, which takes one snapshot at a time, in whatever way it came.
func (p *peer) installArrivalLocked(t *transport, c *arrival) error {
	gate := p.routes["snapshot"].gate
	select {
	case gate <- struct{}{}:
	default:
		return refuse(http.StatusServiceUnavailable, codeBusy, "another snapshot is being installed")
	}
	c.done = make(chan struct{})
	go func() { // ends with raft's answer, or with the transport
		resp, err := p.installArrival(t, c)
		p.arrivals.mu.Lock()
		defer p.arrivals.mu.Unlock()
		c.resp, c.err = resp, err
		c.discard()
		close(c.done)
		<-gate
	}()
	return nil
}

func (p *peer) installArrival(t *transport, c *arrival) (*raft.InstallSnapshotResponse, error) {
	args := c.install
	if p.holds(&args) {
		return &raft.InstallSnapshotResponse{RPCHeader: p.header(t), Term: p.host.term(), Success: true}, nil
	}
	answer := make(chan raft.RPCResponse, 1)
	whole := &lastReader{file: c.file, r: io.NewSectionReader(c.file, 0, args.Size)}
	if err := t.hand(t.ctx, raft.RPC{Command: &args, Reader: whole, RespChan: answer}); err != nil {
		return nil, err
	}
	a, err := t.await(t.ctx, answer)
	if err != nil {
		return nil, err
	}
	resp, ok := a.(*raft.InstallSnapshotResponse)
	if !ok {
		return nil, fmt.Errorf("raft answered %T", a)
	}
	return resp, nil
}

// A lastReader frees the space of what it has read, for the same bytes are being written to another file.
type lastReader struct {
	file     *os.File
	r        io.Reader
	at, free int64 // read, and given back
}

func (l *lastReader) Read(b []byte) (int, error) {
	n, err := l.r.Read(b)
	if l.at += int64(n); l.at-l.free >= pieceMost {
		giveBack(l.file, l.free, l.at-l.free) // where that fails the space stays in use until the end
		l.free = l.at
	}
	return n, err
}

// answerPiece waits for raft's answer if it was asked, for a while.
func (p *peer) answerPiece(ctx context.Context, x *exchange, c *arrival, have int64) error {
	p.arrivals.mu.Lock()
	done := c.done
	p.arrivals.mu.Unlock()
	if done == nil {
		return x.answerJSON(pieceAnswer{Have: have})
	}
	ctx, cancel := context.WithTimeout(ctx, pieceWait)
	defer cancel()
	select {
	case <-done:
	case <-ctx.Done():
		return x.answerJSON(pieceAnswer{Have: have})
	}
	if c.err != nil {
		return refuse(http.StatusConflict, codeConflict, "install the snapshot: %v", c.err)
	}
	return x.answerJSON(pieceAnswer{Have: have, Done: c.resp})
}

// --- the sizes that pass

const (
	sizeLeast = pieceLeast + 2<<10 // with its header
	sizeAge   = 10 * time.Minute   // then a larger one is tried again: the limit may have been raised
)

// sizes are the bodies that get through to each address: as far as one was refused for its size, or an append was not answered in
// time. The zero value is ready.
type sizes struct {
	mu   sync.Mutex // guards list
	list map[string]sizeLimit
}

// A sizeLimit of zero is none.
type sizeLimit struct {
	most int64     // of any body; a larger one was refused
	at   time.Time // when
	soon int64     // of an append; a larger one took too long
}

func (l sizeLimit) hard() int64 {
	if l.most > 0 && time.Since(l.at) < sizeAge {
		return l.most
	}
	return maxAppendBody
}

// refused notes that a body of n bytes did not pass: half of it is tried next. False: no smaller one is.
func (z *sizes) refused(base string, n int64) bool {
	most := n / 2
	z.change(base, func(l *sizeLimit) {
		l.most, l.at = max(min(most, l.hard()), sizeLeast), time.Now()
	})
	return most >= sizeLeast
}

// late notes that an append of n bytes was not answered in time.
func (z *sizes) late(base string, n int64) {
	if n >= 2*sizeLeast { // a small one does not fail for its size
		z.change(base, func(l *sizeLimit) { l.soon = n / 2 })
	}
}

// passed notes that an append of n bytes was answered: a larger one is tried again after one that was quick.
func (z *sizes) passed(base string, n int64, took time.Duration) {
	if took > pieceQuick {
		return
	}
	z.mu.Lock()
	soon := z.list[base].soon
	z.mu.Unlock()
	if soon == 0 || n < soon/2 {
		return
	}
	z.change(base, func(l *sizeLimit) {
		if l.soon = 2 * soon; l.soon >= maxAppend {
			l.soon = 0
		}
	})
}

func (z *sizes) change(base string, f func(*sizeLimit)) {
	z.mu.Lock()
	defer z.mu.Unlock()
	l := z.list[base]
	f(&l)
	if z.list == nil {
		z.list = make(map[string]sizeLimit)
	}
	z.list[base] = l
}

// room is the largest body that is worth a try, of an append.
func (z *sizes) room(base string) int64 {
	z.mu.Lock()
	defer z.mu.Unlock()
	l, ok := z.list[base]
	switch {
	case !ok:
		return maxAppendBody
	case l.soon > 0:
		return min(l.soon, l.hard())
	}
	return l.hard()
}

// hard is the largest body of any kind that is not known to be refused.
func (z *sizes) hard(base string) int64 {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.list[base].hard()
}

// least is that on the narrowest way: an entry that is larger gets to somebody only in a snapshot.
func (z *sizes) least() int64 {
	z.mu.Lock()
	defer z.mu.Unlock()
	least := int64(maxAppendBody)
	for _, l := range z.list {
		least = min(least, l.hard())
	}
	return least
}
