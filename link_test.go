package quorate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// linked is a member's server, links to it, and a count of the connections that were opened.
func linked(t *testing.T, h http.HandlerFunc) (l *links, srv *httptest.Server, opened *atomic.Int64) {
	t.Helper()
	opened = new(atomic.Int64)
	srv = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set(headerProtocol, "1") // as a member does
		h(w, req)
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	l = newLinks(&http.Transport{})
	t.Cleanup(l.close)
	return l, srv, opened
}

func linkRequest(t *testing.T, ctx context.Context, base, body string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/raft/append?a=b", strings.NewReader(body))
	must(t, err)
	return req
}

// post returns the answer's body.
func (l *links) post(t *testing.T, ctx context.Context, base, body string) (string, error) {
	t.Helper()
	resp, err := l.do(linkRequest(t, ctx, base, body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return string(data), err
}

func (l *links) kept() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, list := range l.idle {
		n += len(list)
	}
	return n
}

func TestLinkCarriesWhatTheClientWould(t *testing.T) {
	t.Parallel()
	echo := func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		w.Header().Set("Got", fmt.Sprint(req.Method, " ", req.RequestURI, " ", req.Host, " ", req.ContentLength, " ", req.Header["Two"], req.Header["Idempotency-Key"]))
		if len(body)%2 == 1 {
			w.(http.Flusher).Flush() // in chunks
		}
		_, _ = w.Write(body)
	}
	l, srv, opened := linked(t, echo)
	for _, size := range []int{0, 1, 2, 4095, linkBuffer - 1, linkBuffer, linkBuffer + 1, 900_001} {
		body := strings.Repeat("x", size)
		ask := func(send func(*http.Request) (*http.Response, error)) (head, got string) {
			req := linkRequest(t, t.Context(), srv.URL, body)
			req.Header["Two"] = []string{"1", "2"}
			req.Header["Idempotency-Key"] = nil
			resp, err := send(req)
			must(t, err)
			defer resp.Body.Close()
			data, err := io.ReadAll(resp.Body)
			must(t, err)
			return resp.Header.Get("Got"), string(data)
		}
		wantHead, want := ask(srv.Client().Do)
		head, got := ask(l.do)
		if head != wantHead || got != want {
			t.Errorf("%d bytes: %q and %d bytes, the client has %q and %d", size, head, len(got), wantHead, len(want))
		}
	}
	if n := opened.Load(); n != 2 { // one is the client's
		t.Errorf("%d connections", n)
	}
	req := linkRequest(t, t.Context(), srv.URL, "")
	req.Header["Two"] = []string{"1\r\nThree: 3"}
	if resp, err := l.do(req); err == nil {
		t.Errorf("a header was smuggled: %v", resp.Header)
	}
}

func TestLinksAreKept(t *testing.T) {
	t.Parallel()
	var together sync.WaitGroup
	together.Add(5)
	goOn := make(chan struct{})
	l, srv, opened := linked(t, func(w http.ResponseWriter, req *http.Request) {
		switch body, _ := io.ReadAll(req.Body); string(body) {
		case "together":
			together.Done()
			together.Wait()
		case "last":
			w.Header().Set("Connection", "close")
		case "refuse":
			w.WriteHeader(http.StatusServiceUnavailable)
		case "late":
			w.Header().Set("Content-Length", "2")
			w.(http.Flusher).Flush()
			<-goOn
		}
		_, _ = io.WriteString(w, "ok")
	})
	post := func(body string) {
		t.Helper()
		if got, err := l.post(t, t.Context(), srv.URL, body); err != nil || got != "ok" {
			t.Errorf("%s: %q, %v", body, got, err)
		}
	}
	var calls sync.WaitGroup
	for range 5 {
		calls.Go(func() { post("together") })
	}
	calls.Wait()
	for range 20 {
		post("one after the other")
		post("refuse")
	}
	if n := opened.Load(); n != 5 || l.kept() != 5 {
		t.Errorf("%d connections, %d kept", n, l.kept())
	}
	post("last")
	if n := l.kept(); n != 4 {
		t.Errorf("%d kept, and one was said to be the last time", n)
	}
	resp, err := l.do(linkRequest(t, t.Context(), srv.URL, "late"))
	must(t, err)
	must(t, resp.Body.Close())
	close(goOn)
	if n := l.kept(); n != 3 {
		t.Errorf("%d kept, one with an answer that nobody has read", n)
	}
	l.mu.Lock()
	for _, list := range l.idle {
		list[0].since = time.Now().Add(-2 * linkIdle)
	}
	l.mu.Unlock()
	l.closeOld()
	if n := l.kept(); n != 2 {
		t.Errorf("%d kept, and one was old", n)
	}
	srv.CloseClientConnections()
	post("on a new one")
	if n := l.kept(); n != 1 {
		t.Errorf("%d kept, of which the server has closed all but one", n)
	}
	l.close()
	post("after the close")
	if n := l.kept(); n != 0 {
		t.Errorf("%d kept after the close", n)
	}
}

// A member that has been started again has closed every connection. Nobody notices.
func TestLinkThatTheOtherSideHasClosed(t *testing.T) {
	t.Parallel()
	l, srv, _ := linked(t, func(w http.ResponseWriter, req *http.Request) { _, _ = io.Copy(w, req.Body) })
	for i := range 50 {
		want := fmt.Sprint(i)
		if got, err := l.post(t, t.Context(), srv.URL, want); err != nil || got != want {
			t.Fatalf("%d: %q, %v", i, got, err)
		}
		srv.CloseClientConnections()
	}
	srv.Close()
	_, err := l.post(t, t.Context(), srv.URL, "x")
	var outer *url.Error
	var op *net.OpError
	if !errors.As(err, &outer) || outer.Op != "Post" || !errors.As(err, &op) || op.Op != "dial" {
		t.Errorf("nobody listens: %v", err)
	}
}

// The second try is for connections that were kept: a server that closes each one gets a message once for each call.
func TestLinkTriesNoNewConnectionTwice(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	l, srv, _ := linked(t, func(http.ResponseWriter, *http.Request) {
		calls.Add(1)
		panic(http.ErrAbortHandler)
	})
	srv.Config.ErrorLog = nil
	if _, err := l.post(t, t.Context(), srv.URL, "x"); !errors.Is(err, errNoAnswer) || calls.Load() != 1 {
		t.Errorf("%v after %d calls", err, calls.Load())
	}
}

func TestLinkEndsWithItsContext(t *testing.T) {
	t.Parallel()
	inside := make(chan struct{})
	end := make(chan struct{})
	defer close(end)
	l, srv, _ := linked(t, func(w http.ResponseWriter, req *http.Request) {
		if body, _ := io.ReadAll(req.Body); string(body) == "half" {
			w.Header().Set("Content-Length", "2")
			_, _ = io.WriteString(w, "1")
			w.(http.Flusher).Flush()
		}
		inside <- struct{}{}
		<-end
	})
	for _, body := range []string{"none", "half"} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-inside; cancel() }()
		if _, err := l.post(t, ctx, srv.URL, body); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", body, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	go func() { <-inside }()
	if _, err := l.post(t, ctx, srv.URL, "late"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("late: %v", err)
	}
	if _, err := l.post(t, ctx, srv.URL, "after"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after: %v", err)
	}
	if n := l.kept(); n != 0 {
		t.Errorf("%d connections with an answer on its way are kept", n)
	}
}

// Who refuses a long message at once may close before it was read. The refusal is what counts.
func TestLinkHearsTheRefusalOfALongMessage(t *testing.T) {
	t.Parallel()
	l, srv, _ := linked(t, func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, "busy")
	})
	for range 5 {
		got, err := l.post(t, t.Context(), srv.URL, strings.Repeat("x", 32<<20))
		if err != nil || got != "busy" {
			t.Errorf("%q, %v", got, err)
		}
	}
	if n := l.kept(); n != 0 {
		t.Errorf("%d kept, in the middle of a message", n)
	}
}

// Whatever a stranger at the address sends, the call ends with an error or an answer, takes bounded memory, and nothing of it
// reaches the next call.
func TestLinkToAStranger(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer string
		hangUp bool
		want   string // the answer's body, if it is not an error
	}{
		"garbage":              {answer: "garbage\r\n\r\n"},
		"nothing":              {hangUp: true},
		"half a head":          {answer: "HTTP/1.1 200 OK\r\nContent-Le", hangUp: true},
		"half a body":          {answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", hangUp: true},
		"a head without end":   {answer: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 3<<20)},
		"many lines":           {answer: "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 1<<19)},
		"a body without end":   {answer: "HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + strings.Repeat("x", 3<<20)},
		"two lengths":          {answer: "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nabc"},
		"until it closes":      {answer: "HTTP/1.0 200 OK\r\n\r\nold", hangUp: true, want: "old"},
		"another protocol":     {answer: "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", hangUp: true},
		"early hints":          {answer: "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", want: "ok"},
		"no member":            {answer: "HTTP/1.1 408 Request Timeout\r\nContent-Length: 2\r\n\r\nok", want: "ok"},
		"more than was asked":  {answer: "HTTP/1.1 200 OK\r\n" + headerProtocol + ": 1\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", want: "ok"},
		"an answer beforehand": {answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly", want: "early"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			defer listener.Close()
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					go func() {
						defer conn.Close()
						buf := make([]byte, 4096)
						if name == "an answer beforehand" {
							_, _ = io.WriteString(conn, c.answer)
							_, _ = io.Copy(io.Discard, conn)
						}
						for err := error(nil); err == nil; {
							if _, err = conn.Read(buf); err == nil {
								_, err = io.WriteString(conn, c.answer)
							}
							if c.hangUp {
								return
							}
						}
					}()
				}
			}()
			l := newLinks(&http.Transport{})
			defer l.close()
			for call := range 2 {
				if call > 0 && name == "an answer beforehand" {
					break // it has only one
				}
				got, err := l.post(t, ctxFor(t, patience), "http://"+listener.Addr().String(), "hello")
				if (err != nil) != (c.want == "") || err == nil && got != c.want {
					t.Errorf("%d bytes: %.40q, %v", len(got), got, err)
				}
				if errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("it hangs: %v", err)
				}
			}
			if n := l.kept(); n > 0 {
				t.Errorf("%d connections are kept", n)
			}
		})
	}
}

// What has another way to go goes there: through a proxy, with TLS, or when the client is the caller's.
func TestWhatLinksTake(t *testing.T) {
	t.Parallel()
	proxy, err := url.Parse("http://proxy.example:1")
	must(t, err)
	direct := newLinks(&http.Transport{})
	for _, c := range []struct {
		name string
		l    *links
		url  string
		want bool
	}{
		{"plain", direct, "http://127.0.0.1:1", true},
		{"TLS", direct, "https://127.0.0.1:1", false},
		{"a proxy", newLinks(&http.Transport{Proxy: http.ProxyURL(proxy)}), "http://127.0.0.1:1", false},
		{"a proxy for others", newLinks(&http.Transport{Proxy: func(*http.Request) (*url.URL, error) { return nil, nil }}), "http://127.0.0.1:1", true},
		{"no links", nil, "http://127.0.0.1:1", false},
	} {
		if got := c.l.takes(linkRequest(t, t.Context(), c.url, "x")); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	stream := linkRequest(t, t.Context(), "http://127.0.0.1:1", "x")
	stream.GetBody = nil
	if direct.takes(stream) {
		t.Error("a stream cannot be sent twice")
	}
	if p := callerOf(t, &http.Client{Transport: &http.Transport{}}, false); p.links != nil {
		t.Error("links beside a client of the caller's")
	}
	jar, err := cookiejar.New(nil)
	must(t, err)
	if p := callerOf(t, &http.Client{Jar: jar}, false); p.links != nil {
		t.Error("links know no cookies")
	}
	if p := callerOf(t, nil, false); p.links == nil {
		t.Error("no links where the choice is ours")
	}
}
