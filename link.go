package quorate

// Kept connections to the other members, for the calls that a write and a linearizable read wait for. It owns the connection of
// such a call, from taking it to giving it back. It never looks into a message. Control comes from peer.do, where the request may
// be sent twice and the choice of a client was left to us; everything else goes through net/http's client.
//
// The messages are HTTP/1.1 as net/http writes and reads it. What is left out is net/http's two goroutines for each connection,
// through which every request and every answer has to pass: four changes of the running goroutine on the way of a write, each of
// which can wait for a processor. Here the caller itself writes the request and reads the answer.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	linkBuffer  = 64 << 10
	linksKept   = 64               // for one address
	linkIdle    = 90 * time.Second // then a connection is closed; net/http's default
	lastWords   = 50 * time.Millisecond
	maxLinkHead = 64 << 10
)

// links are the kept connections. The zero value is not ready: dial and proxy must be set.
type links struct {
	dial  func(ctx context.Context, network, addr string) (net.Conn, error)
	proxy func(*http.Request) (*url.URL, error)

	mu     sync.Mutex         // guards the fields below
	idle   map[string][]*link // by host and port; the last one was used last
	sweep  *time.Timer
	closed bool
}

// newLinks opens connections as the transport would.
func newLinks(base *http.Transport) *links {
	l := &links{dial: base.DialContext, proxy: base.Proxy, idle: make(map[string][]*link)}
	if l.dial == nil {
		l.dial = new(net.Dialer).DialContext
	}
	return l
}

// A link is one connection. One call at a time has it.
type link struct {
	conn  net.Conn
	limit io.LimitedReader // of conn, for one answer
	r     *bufio.Reader
	w     *bufio.Writer
	since time.Time // when it was given back
}

// takes reports whether a request can go this way: it has no proxy to go through, and no TLS.
func (l *links) takes(req *http.Request) bool {
	if l == nil || req.URL.Scheme != "http" || req.GetBody == nil {
		return false
	}
	if l.proxy == nil {
		return true
	}
	via, err := careful("the choice of a proxy", func() (*url.URL, error) { return l.proxy(req) })
	return via == nil && err == nil
}

// do sends a request that may be sent twice, and returns the answer with its body still to be read. Its errors are those of
// http.Client.
func (l *links) do(req *http.Request) (*http.Response, error) {
	resp, err := l.send(req)
	if err != nil {
		err = &url.Error{Op: "Post", URL: req.URL.String(), Err: err}
	}
	return resp, err
}

// errNoAnswer: the connection ended before the first byte of an answer.
var errNoAnswer = errors.New("the connection was closed")

// send tries a kept connection and, if the other side has closed that one meanwhile, a new one.
func (l *links) send(req *http.Request) (*http.Response, error) {
	ctx, addr := req.Context(), req.URL.Host // a member's address has its port
	if c := l.take(addr); c != nil {
		resp, err := l.call(c, addr, req)
		if ctx.Err() != nil || !errors.Is(err, errNoAnswer) {
			return resp, err
		}
		l.drop(addr) // what closed this one has closed them all, or will
		if req.Body, err = req.GetBody(); err != nil {
			return nil, err
		}
	}
	conn, err := l.dial(ctx, "tcp", addr)
	if err != nil {
		return nil, cmpErr(ctx.Err(), err)
	}
	c := &link{conn: conn, limit: io.LimitedReader{R: conn}, w: bufio.NewWriterSize(conn, linkBuffer)}
	c.r = bufio.NewReader(&c.limit)
	return l.call(c, addr, req)
}

// call has the connection until the answer's body has been read or closed.
func (l *links) call(c *link, addr string, req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	release := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	resp, err := c.exchange(req)
	if err != nil {
		release()
		_ = c.conn.Close()
		return nil, cmpErr(ctx.Err(), err)
	}
	// A proxy may say on its own that nobody has asked for long. Such words would be taken for the next answer, and from then on each
	// answer for that of the next question. A member gives one to each, so what no member has said ends the connection.
	ours := header(resp.Header, headerProtocol) != ""
	resp.Body = &linkBody{ReadCloser: resp.Body, ctx: ctx, end: func(whole bool) {
		if release() && whole && ours && !resp.Close && c.r.Buffered() == 0 {
			l.give(addr, c)
			return
		}
		_ = c.conn.Close()
	}}
	return resp, nil
}

// exchange writes the request and reads the head of the answer.
func (c *link) exchange(req *http.Request) (*http.Response, error) {
	c.limit.N = maxLinkHead + maxAnswerBody
	sent := writeRequest(c.w, req)
	if sent != nil {
		// Who refuses a long message may answer and close before it has read all of it.
		_ = c.conn.SetReadDeadline(time.Now().Add(lastWords))
	}
	if _, err := c.r.Peek(1); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAnswer, cmpErr(sent, err))
	}
	for {
		resp, err := http.ReadResponse(c.r, req)
		if err != nil {
			return nil, err
		}
		resp.Close = resp.Close || sent != nil
		if resp.StatusCode >= 200 {
			return resp, nil
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			return nil, errors.New("the answer changes the protocol")
		}
	}
}

// writeRequest does what Request.Write does, for a message of ours: in a third of the time, which a write's entry spends here on
// its way.
func writeRequest(w *bufio.Writer, req *http.Request) error {
	write := func(list ...string) {
		for _, s := range list {
			_, _ = w.WriteString(s) // Flush returns the first error
		}
	}
	write(req.Method, " ", req.URL.RequestURI(), " HTTP/1.1\r\nHost: ", req.Host, "\r\nContent-Length: ", strconv.FormatInt(req.ContentLength, 10), "\r\n")
	for name, values := range req.Header {
		for _, v := range values {
			if strings.ContainsAny(v, "\r\n\x00") {
				return fmt.Errorf("value of header %s: %q", name, v)
			}
			write(name, ": ", v, "\r\n")
		}
	}
	write("\r\n")
	if _, err := io.Copy(w, req.Body); err != nil {
		return err
	}
	return w.Flush()
}

// A linkBody gives its connection back at its end.
type linkBody struct {
	io.ReadCloser
	ctx context.Context
	end func(whole bool) // nil: it has
}

func (b *linkBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.finish(err == io.EOF)
		if err != io.EOF {
			err = cmpErr(b.ctx.Err(), err)
		}
	}
	return n, err
}

func (b *linkBody) Close() error {
	b.finish(false) // and not the inner Close, which would read the rest
	return nil
}

func (b *linkBody) finish(whole bool) {
	if b.end != nil {
		b.end(whole)
		b.end = nil
	}
}

// take is nil if no connection to this address is kept.
func (l *links) take(addr string) *link {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := l.idle[addr]
	if len(list) == 0 {
		return nil
	}
	c := list[len(list)-1]
	list[len(list)-1] = nil
	l.idle[addr] = list[:len(list)-1]
	return c
}

func (l *links) give(addr string, c *link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.idle[addr]) >= linksKept {
		_ = c.conn.Close()
		return
	}
	c.since = time.Now()
	l.idle[addr] = append(l.idle[addr], c)
	l.sweepLaterLocked()
}

func (l *links) sweepLaterLocked() {
	if l.sweep == nil {
		l.sweep = time.AfterFunc(linkIdle, l.closeOld)
	}
}

// closeOld closes what has been idle for long.
func (l *links) closeOld() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweep = nil
	for addr, list := range l.idle {
		young := slices.IndexFunc(list, func(c *link) bool { return time.Since(c.since) < linkIdle })
		if young < 0 {
			l.dropLocked(addr)
			continue
		}
		for _, c := range list[:young] {
			_ = c.conn.Close()
		}
		l.idle[addr] = slices.Delete(list, 0, young)
		l.sweepLaterLocked()
	}
}

// drop closes the kept connections to an address.
func (l *links) drop(addr string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropLocked(addr)
}

func (l *links) dropLocked(addr string) {
	for _, c := range l.idle[addr] {
		_ = c.conn.Close()
	}
	delete(l.idle, addr)
}

// close is idempotent. A connection in use is closed when its call ends.
func (l *links) close() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.sweep != nil {
		l.sweep.Stop()
	}
	for addr := range l.idle {
		l.dropLocked(addr)
	}
}
