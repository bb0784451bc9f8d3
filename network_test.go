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
	broken  map[memPath]error // nobody is reached this way, and this is said at once
	resets  map[string]int    // by address: how often its connections were reset
	arrived map[string]int    // requests that reached "ADDRESS ROUTE"
}

type memPath struct{ from, to string }

func newMemNet() *memNet {
	return &memNet{on: make(map[string]http.Handler), cuts: make(map[memPath]bool), delays: make(map[memPath]time.Duration),
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
	h := c.net.on[to]
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
			_, err := io.Copy(w, req.Body)
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
