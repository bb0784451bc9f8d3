package quorate

// A state that another member fetches: GET /raft/state, for a rebuild and for a snap that is missing. It owns both ends of the route: the
// leader's, which keeps one copy for each member that takes it in pieces, and the reader's, which goes on where a connection broke. It
// never looks into the state: copy.go makes it and checks it, as a whole, by the sum at its end. Control comes from the peer's door on the
// one side and from recover.go on the other.
//
//	state                       the whole state in one answer, as release 0.1.0 asks for it and gives it
//	state?piece=ID&at=N         what follows its first N bytes, fetchPiece at most; Quorate-Size says how long the whole is
//
// ID names one fetch, and with it one copy: what comes later is of the same moment, however much is written meanwhile. The answer that may
// have been lost is kept in memory until the next piece is asked for. A leader that was started again, or has dropped the copy, refuses
// every piece after the first. Then the reader begins a new fetch.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	fetchPiece  = 1 << 20
	fetchIdle   = time.Minute // then the leader drops a copy that nobody goes on with, and the reader gives up without progress
	fetchesMost = 2
)

// A stateCopy is a consistent copy of the state, to be read once.
type stateCopy struct {
	io.ReadCloser
	size int64 // bytes
}

// --- the leader

// fetches are the copies that others take, by the member that does.
type fetches struct {
	mu   sync.Mutex // guards list
	list map[string]*fetch
}

// A fetch is a copy that another member takes in pieces.
type fetch struct {
	id   string
	size int64

	mu     sync.Mutex // guards the fields below; held while the copy is read
	copy   io.ReadCloser
	at     int64  // where piece begins
	piece  []byte // the newest one, which is replaced and never changed
	idle   *time.Timer
	unbind func() bool // from the end of the peer
}

// serveState: once bytes have gone out an error can only cut the answer short, which its reader can tell.
func (p *peer) serveState(ctx context.Context, x *exchange) error {
	if x.req.URL.RawQuery != "" {
		return p.servePieceOfState(ctx, x)
	}
	c, err := p.copyState(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	w := &stateWriter{x: x}
	switch _, err = io.Copy(w, c); {
	case err == nil:
	case !w.begun:
		return err
	default:
		p.log.Warn("state cut short", "to", peerName(x.from, x.fromAddr), "error", err)
	}
	return nil
}

func (p *peer) copyState(ctx context.Context) (stateCopy, error) {
	if !p.host.leading(p.host.term()) {
		return stateCopy{}, p.notLeader()
	}
	ctx, cancel := p.bind(ctx)
	defer cancel()
	return p.host.state(ctx)
}

type stateWriter struct {
	x     *exchange
	begun bool
}

func (w *stateWriter) Write(b []byte) (int, error) {
	if !w.begun {
		w.begun = true
		w.x.w.Header().Set("Content-Type", "application/octet-stream")
	}
	_ = w.x.rc.SetWriteDeadline(time.Now().Add(stallTimeout)) // a server that cannot has its own timeouts
	return w.x.w.Write(b)
}

func (p *peer) servePieceOfState(ctx context.Context, x *exchange) error {
	id, at, err := parsePieceQuery(x.req.URL.RawQuery)
	if err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "%v", err)
	}
	f := p.fetches.of(x.from, id)
	if f == nil {
		if at > 0 {
			return refuse(http.StatusConflict, codeConflict, "no copy of this state is here, as this member was started again, or nobody went on "+
				"with it for a while")
		}
		if f, err = p.beginFetch(ctx, x.from, id); err != nil {
			return err
		}
	}
	data, err := f.from(at)
	if err != nil {
		return refuse(http.StatusConflict, codeConflict, "%v", err)
	}
	setHeaders(x.w.Header(), headerSize, strconv.FormatInt(f.size, 10), "Content-Length", strconv.Itoa(len(data)))
	for w := (&stateWriter{x: x}); len(data) > 0; {
		n, err := w.Write(data[:min(len(data), copyPages*pageSize)])
		if err != nil {
			return nil // the reader asks again
		}
		data = data[n:]
	}
	return nil
}

func pieceQuery(id string, at int64) string {
	return queryPiece + id + "&at=" + strconv.FormatInt(at, 10)
}

func parsePieceQuery(query string) (id string, at int64, err error) {
	rest, ok := strings.CutPrefix(query, queryPiece)
	id, number, and := strings.Cut(rest, "&at=")
	at, err = strconv.ParseInt(number, 10, 64)
	if !ok || !and || err != nil || !validID(id) || at < 0 || at > maxSnapshot {
		return "", 0, errors.New("state: a query that asks for no piece")
	}
	return id, at, nil
}

func (t *fetches) of(from, id string) *fetch {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.list[from]; f != nil && f.id == id {
		return f
	}
	return nil
}

func (t *fetches) full(from string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.list[from] == nil && len(t.list) >= fetchesMost
}

// beginFetch takes the place of what the same member has begun before.
func (p *peer) beginFetch(ctx context.Context, from, id string) (*fetch, error) {
	if p.fetches.full(from) {
		return nil, refuse(http.StatusServiceUnavailable, codeBusy, "%d members fetch the state already", fetchesMost)
	}
	c, err := p.copyState(ctx)
	if err != nil {
		return nil, err
	}
	f := &fetch{id: id, size: c.size, copy: c}
	drop := func() { p.fetches.drop(from, f) }
	f.mu.Lock()
	f.idle = time.AfterFunc(fetchIdle, drop)
	f.unbind = context.AfterFunc(p.ctx, drop)
	f.mu.Unlock()
	if was := p.fetches.put(from, f); was != nil {
		was.end()
	}
	return f, nil
}

func (t *fetches) put(from string, f *fetch) (was *fetch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	was = t.list[from]
	if t.list == nil {
		t.list = make(map[string]*fetch)
	}
	t.list[from] = f
	return was
}

func (t *fetches) drop(from string, f *fetch) {
	t.mu.Lock()
	if t.list[from] == f {
		delete(t.list, from)
	}
	t.mu.Unlock()
	f.end()
}

func (f *fetch) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.idle.Stop()
	f.unbind()
	f.piece = nil
	f.copy.Close()
}

// from returns the state from byte at on. Within the newest piece that is the rest of it, which the reader asks for again; at its end it is
// the next piece, for the reader has all of the newest one.
func (f *fetch) from(at int64) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.idle.Reset(fetchIdle)
	if next := f.at + int64(len(f.piece)); at == next && at < f.size {
		piece := make([]byte, min(fetchPiece, f.size-at))
		if _, err := io.ReadFull(f.copy, piece); err != nil {
			return nil, fmt.Errorf("read the state: %w", err)
		}
		f.at, f.piece = at, piece
	}
	if at < f.at || at > f.at+int64(len(f.piece)) {
		return nil, fmt.Errorf("the newest piece of this state begins at %d and has %d bytes: nothing is at %d", f.at, len(f.piece), at)
	}
	if f.at+int64(len(f.piece)) == f.size {
		f.copy.Close() // all of it is in memory
	}
	return f.piece[at-f.at:], nil
}

// --- the reader

// state begins to fetch the state of the leader to. What is read from it goes on by itself when a connection breaks, until ctx ends, the
// leader refuses, or nothing has come for fetchIdle.
func (p *peer) state(ctx context.Context, to, addr string) (io.ReadCloser, error) {
	r := &stateReader{p: p, ctx: ctx, to: to, addr: addr, id: newID(), moved: time.Now()}
	if err := r.open(); err != nil { // nobody waits for a member that is not there
		return nil, err
	}
	return r, nil
}

type stateReader struct {
	p        *peer
	ctx      context.Context
	to, addr string
	id       string

	at    int64     // that have come
	size  int64     // of the whole; 0: the release of the leader gives it in one answer
	moved time.Time // when something came last

	body   io.ReadCloser // of the answer that is being read; nil: the next one is to be asked for
	got    int64         // of it
	alive  *time.Timer
	cancel context.CancelFunc
}

// open asks for what follows.
func (r *stateReader) open() error {
	ctx, cancel := r.p.bind(r.ctx)
	alive := time.AfterFunc(stallTimeout, cancel)
	resp, err := r.p.do(ctx, request{method: http.MethodGet, route: "state", base: r.p.base(r.addr), to: r.to, query: pieceQuery(r.id, r.at)})
	if err != nil {
		alive.Stop()
		cancel()
		return err
	}
	r.body, r.got, r.alive, r.cancel = resp.Body, 0, alive, cancel
	size, err := strconv.ParseInt(header(resp.Header, headerSize), 10, 64)
	switch {
	case err != nil && r.at == 0: // release 0.1.0
		size = 0
	case err != nil || size < r.at || size > maxSnapshot || r.size > 0 && r.size != size:
		r.hangUp()
		return &stateError{fmt.Errorf("%w: a piece of a state of %q bytes, of which %d of %d are here", errFrame, header(resp.Header, headerSize), r.at, r.size)}
	}
	r.size = size
	return nil
}

// A stateError is an answer with which no fetch goes on.
type stateError struct{ err error }

func (e *stateError) Error() string { return e.err.Error() }
func (e *stateError) Unwrap() error { return e.err }

func (r *stateReader) hangUp() {
	if r.body == nil {
		return
	}
	r.alive.Stop()
	r.cancel()
	r.body.Close()
	r.body = nil
}

func (r *stateReader) Read(b []byte) (int, error) {
	for {
		if r.size > 0 && r.at == r.size {
			return 0, io.EOF
		}
		n, err := r.read(b)
		if n > 0 {
			r.moved = time.Now()
			r.at += int64(n)
			if r.at > maxSnapshot {
				return n, fmt.Errorf("%w: a state of more than %d bytes", errFrame, int64(maxSnapshot))
			}
			return n, nil
		}
		switch {
		case err == nil: // an empty read
		case r.size == 0:
			return 0, err
		default:
			if err := r.failed(err); err != nil {
				return 0, err
			}
		}
	}
}

// read is one read of the answer that is being read. The end of a piece is no error if something has come of it.
func (r *stateReader) read(b []byte) (int, error) {
	if r.body == nil {
		if err := r.open(); err != nil {
			return 0, err
		}
	}
	if r.size > 0 {
		b = b[:min(int64(len(b)), r.size-r.at)]
	}
	n, err := r.body.Read(b)
	if r.got += int64(n); n > 0 {
		r.alive.Reset(stallTimeout)
	}
	if err == nil || r.size == 0 {
		return n, err
	}
	if r.hangUp(); err == io.EOF && r.got > 0 {
		return n, nil
	}
	return n, err
}

// failed waits before the next try; an error ends the fetch.
func (r *stateReader) failed(err error) error {
	switch {
	case r.ctx.Err() != nil:
		return context.Cause(r.ctx)
	case r.p.ctx.Err() != nil:
		return ErrClosed
	case errors.As(err, new(*stateError)) || !mayTakeLater(err):
		return err
	case time.Since(r.moved) > fetchIdle:
		return explain(err, r.p.base(r.addr))
	}
	select {
	case <-time.After(piecePause):
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	case <-r.p.ctx.Done():
		return ErrClosed
	}
}

func (r *stateReader) Close() error {
	r.hangUp()
	return nil
}
