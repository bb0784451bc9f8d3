package quorate

import (
	"bytes"
	"context"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A memNet is a network in memory for members that run in one process: their real handlers and clients, without sockets,
// so that a cluster lives in a synctest bubble. A cut direction holds what goes that way until it is healed, as TCP would:
// so old messages arrive late. Whoever is not on the network is refused at once, and so is whatever it says.
type memNet struct {
	changed broadcast

	mu      sync.Mutex // guards the fields below
	on      map[string]http.Handler
	cuts    map[memPath]bool
	delays  map[memPath]time.Duration
	thin    map[memPath]*thinLine
	broken  map[memPath]error // nobody is reached this way, and this is said at once
	resets  map[string]int    // by address: how often its connections were reset
	arrived map[string]int    // requests that reached "ADDRESS ROUTE"
}

type memPath struct{ from, to string }

// A thinLine carries so many bytes a second of what is sent on it, a little of each message in turn.
type thinLine struct {
	rate int64
	free time.Time // when it carries what comes next; guarded by the network's mu
}

func newMemNet() *memNet {
	return &memNet{on: make(map[string]http.Handler), cuts: make(map[memPath]bool), delays: make(map[memPath]time.Duration), thin: make(map[memPath]*thinLine),
		broken: make(map[memPath]error), resets: make(map[string]int), arrived: make(map[string]int)}
}

// serve puts a handler on the network; nil takes it off.
func (n *memNet) serve(addr string, h http.Handler) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.on[addr] = h; h == nil {
		delete(n.on, addr)
	}
	n.changed.notify()
}

// cut holds everything that goes from one address to the other, this way only.
func (n *memNet) cut(from, to string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cuts[memPath{from, to}] = true
}

func (n *memNet) delay(from, to string, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delays[memPath{from, to}] = d
}

// narrow has so many bytes of requests a second go from one address to the other.
func (n *memNet) narrow(from, to string, rate int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.thin[memPath{from, to}] = &thinLine{rate: rate}
}

// thinReader is what goes from one address to the other at the speed of the line.
type thinReader struct {
	io.Reader
	n    *memNet
	path memPath
	was  int // how often the line was reset
	ctx  context.Context
}

func (r thinReader) Read(b []byte) (int, error) {
	r.n.mu.Lock()
	line, reset := r.n.thin[r.path], r.n.resets[r.path.to] != r.was
	r.n.mu.Unlock()
	switch {
	case line == nil:
		return r.Reader.Read(b)
	case reset:
		return 0, syscall.ECONNRESET
	}
	n, err := r.Reader.Read(b[:min(len(b), 4<<10)])
	r.n.mu.Lock()
	if now := time.Now(); line.free.Before(now) {
		line.free = now
	}
	line.free = line.free.Add(time.Duration(n) * time.Second / time.Duration(line.rate))
	wait := time.Until(line.free)
	r.n.mu.Unlock()
	select {
	case <-time.After(wait):
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	}
	return n, err
}

// fail has everything that goes from one address to the other fail at once.
func (n *memNet) fail(from, to string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.broken[memPath{from, to}] = err
}

func (n *memNet) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cuts)
	clear(n.delays)
	clear(n.thin)
	clear(n.broken)
	n.changed.notify()
}

// reset breaks what is held on its way to the address.
func (n *memNet) reset(addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resets[addr]++
	n.changed.notify()
}

func (n *memNet) arrivals() map[string]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.arrived)
}

// cross takes one message over the network, or waits for the way to be healed.
func (n *memNet) cross(ctx context.Context, from, to string) error {
	n.mu.Lock()
	wait, resets := n.delays[memPath{from, to}], n.resets[to]
	n.mu.Unlock()
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		changed := n.changed.wait()
		n.mu.Lock()
		broken := n.broken[memPath{from, to}]
		there, cut, reset := n.on[from] != nil && n.on[to] != nil, n.cuts[memPath{from, to}], n.resets[to] != resets
		n.mu.Unlock()
		switch {
		case reset:
			return syscall.ECONNRESET
		case !there:
			return syscall.ECONNREFUSED
		case broken != nil:
			return broken
		case !cut:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (n *memNet) client(from string) *http.Client { return &http.Client{Transport: memClient{n, from}} }

type memClient struct {
	net  *memNet
	from string
}

func (c memClient) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(req.Context())
	to := req.URL.Host
	if err := c.net.cross(ctx, c.from, to); err != nil {
		cancel()
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, &net.OpError{Op: "dial", Net: "mem", Err: err}
	}
	c.net.mu.Lock()
	h, resets := c.net.on[to], c.net.resets[to]
	c.net.arrived[to+" "+strings.TrimPrefix(req.URL.Path, "/raft/")]++
	c.net.mu.Unlock()
	if h == nil {
		h = http.NotFoundHandler() // left between the two looks
	}
	there := req.Clone(ctx)
	there.RequestURI, there.RemoteAddr = req.URL.RequestURI(), c.from
	there.Body = http.NoBody
	sent := make(chan struct{})
	close(sent)
	if req.Body != nil {
		var w *io.PipeWriter
		sent = make(chan struct{})
		there.Body, w = io.Pipe()
		go func() {
			_, err := io.Copy(w, thinReader{req.Body, c.net, memPath{c.from, to}, resets, ctx})
			w.CloseWithError(err)
			req.Body.Close()
			close(sent)
		}()
	}
	r, w := io.Pipe()
	answer := &memAnswer{header: make(http.Header), begun: make(chan int, 1), body: w}
	stop := context.AfterFunc(ctx, func() {
		there.Body.Close()
		r.CloseWithError(context.Cause(ctx))
	})
	go func() {
		h.ServeHTTP(answer, there)
		answer.WriteHeader(http.StatusOK)
		w.Close()
		there.Body.Close()
	}()
	end := func() {
		cancel()
		stop()
		there.Body.Close()
		r.Close()
		<-sent // the caller's body is not touched after this
	}
	select {
	case status := <-answer.begun:
		if err := c.net.cross(ctx, to, c.from); err != nil {
			end()
			return nil, &net.OpError{Op: "read", Net: "mem", Err: err}
		}
		return &http.Response{Status: http.StatusText(status), StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
			Header: answer.sent, ContentLength: -1, Body: &memBody{r, end}, Request: req}, nil
	case <-ctx.Done():
		end()
		return nil, ctx.Err()
	}
}

// memAnswer is the http.ResponseWriter. It has no deadlines; the handler must live with that.
type memAnswer struct {
	header, sent http.Header // sent is what header was when the answer began
	once         sync.Once
	begun        chan int
	body         *io.PipeWriter
}

func (a *memAnswer) Header() http.Header { return a.header }

func (a *memAnswer) WriteHeader(status int) {
	a.once.Do(func() {
		a.sent = a.header.Clone()
		a.begun <- status
	})
}

func (a *memAnswer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return a.body.Write(bytes.Clone(b)) // the reader may still look at it when this has returned
}

type memBody struct {
	io.Reader
	end func()
}

func (b *memBody) Close() error {
	b.end()
	return nil
}
