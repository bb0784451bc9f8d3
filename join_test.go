package quorate

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// turning is a DNS server's answer for one name, in another order each time.
func turning(name string, ips ...string) func(context.Context, string) ([]string, error) {
	var asked atomic.Int64
	return func(_ context.Context, host string) ([]string, error) {
		if host != name {
			return nil, &net.DNSError{Name: host, IsNotFound: true}
		}
		k := int(asked.Add(1)) % len(ips)
		return append(append([]string(nil), ips[k:]...), ips[:k]...), nil
	}
}

// notYet listens where nothing of ours answers, and keeps its connections.
func notYet(t testing.TB, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("this system has no other loopback addresses: %v", err)
	}
	server := &http.Server{Handler: http.NotFoundHandler(), ErrorLog: log.New(io.Discard, "", 0)}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
}

// The boot address is a name for all members: of the joiner itself, which serves something else until Open returns, of one that is
// not up, of one that is joining too, and of the only one that can answer.
func TestJoinByName(t *testing.T) {
	t.Parallel()
	for _, transport := range []string{"our own", "the caller's"} {
		t.Run("with "+transport+" connections", func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 1)
			_, port, _ := net.SplitHostPort(c[0].conf.Addr)
			m := newMember(t, "http://app.test:"+port)
			m.conf.Addr = "127.0.0.2:" + port
			m.conf.lookup = turning("app.test", "127.0.0.4", "127.0.0.2", "127.0.0.1", "127.0.0.3")
			if transport == "our own" {
				m.conf.Client = nil
			}
			words := newLogged("not admitted yet")
			m.conf.Logger = slog.New(words)
			notYet(t, m.conf.Addr)
			m.listen = freeAddr(t) // nobody needs to reach it here
			notYet(t, "127.0.0.3:"+port)
			_, err := m.openUntil(notAllowedYet)
			is(t, err, ErrNotAllowed)
			must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
			_, err = m.openWithin(ctxFor(t, 5*time.Second))
			must(t, err)

			m.stop()
			must(t, os.RemoveAll(m.conf.Dir))
			c[0].stop()
			_, err = m.openWithin(ctxFor(t, 2*time.Second))
			name := "http://app.test:" + port
			is(t, err, context.DeadlineExceeded, "at 127.0.0.2:"+port+": "+name+": that is this member itself",
				"at 127.0.0.1:"+port+": "+name+" refused the connection",
				"at 127.0.0.3:"+port+": nothing answers at "+name+"/raft/")
			if list := strings.Join(words.all(), "\n"); !strings.Contains(list, "this member itself") || len(words.all()) > 20 {
				t.Errorf("the log says %d times:\n%s", len(words.all()), list)
			}
		})
	}
}

// perConnection is a balancer that chooses for each connection, in turn, and never again.
func perConnection(t testing.TB, backends ...string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for i := 0; ; i++ {
			front, err := l.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial("tcp", backends[i%len(backends)])
			if err != nil {
				front.Close()
				continue
			}
			go func() { io.Copy(back, front); back.Close() }()
			go func() { io.Copy(front, back); front.Close() }()
		}
	}()
	return l.Addr().String()
}

// A caller's own kind of client, whose other connections are not ours to close.
type ownTripper struct {
	*http.Transport
	closed atomic.Int64
}

func (o *ownTripper) CloseIdleConnections() { o.closed.Add(1) }

func TestJoinOnANewConnectionEachTime(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	empty := freeAddr(t)
	notYet(t, empty)
	own := &ownTripper{Transport: &http.Transport{}}
	defer own.Transport.CloseIdleConnections()
	for what, client := range map[string]*http.Client{"our own": nil, "a plain one": newClient(t, &line{}), "another kind": {Transport: own}} {
		t.Run(what, func(t *testing.T) {
			m := newMember(t, perConnection(t, empty, empty, empty, c[0].conf.Addr))
			m.conf.Client = client
			must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
			_, err := m.openWithin(ctxFor(t, 5*time.Second))
			must(t, err)
			m.stop()
		})
	}
	if n := own.closed.Load(); n > 0 {
		t.Errorf("the caller's idle connections were closed %d times", n)
	}
}

func TestJoinAtOwnAddress(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	words := newLogged("Join is this member's own address")
	m.conf.Logger = slog.New(words)
	m.conf.Join = "http://" + m.conf.Addr + "/raft/"
	_, err := m.openUntil("not admitted yet")
	is(t, err, context.DeadlineExceeded, "refused the connection", "that is this member itself: give the address of another one")
	if list := words.all(); len(list) != 1 {
		t.Errorf("%q", list)
	}
}

// A permission may come just after the member that it is for has started.
func TestPermissionUnderWay(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	m := newMember(t, c[0].conf.Addr)
	words := newLogged("this member is not allowed to join yet")
	m.conf.Logger = slog.New(words)
	opened := make(chan error, 1)
	go func() {
		_, err := m.openWithin(ctxFor(t, patience))
		opened <- err
	}()
	eventually(t, patience, "a warning", func() error {
		if list := words.all(); len(list) == 0 || !strings.Contains(list[0], m.conf.Addr) {
			return fmt.Errorf("%q", list)
		}
		return nil
	})
	must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	must(t, <-opened)
	if list := words.all(); len(list) != 1 {
		t.Errorf("%q", list)
	}
}

// The wait for a permission ends after ten seconds, whatever ctx allows.
func TestPermissionThatDoesNotCome(t *testing.T) {
	t.Parallel()
	s := &Service{log: slog.New(slog.DiscardHandler)}
	j := joining{s: s}
	no := refuse(http.StatusForbidden, codeNotAllowed, "no")
	if pause, final := j.judge(no, time.Second); pause != notAllowedPace || !errors.Is(final, ErrNotAllowed) {
		t.Errorf("at first: %v, %v", pause, final)
	}
	j.refused = time.Now().Add(-notAllowedWait + 100*time.Millisecond)
	if pause, final := j.judge(no, time.Second); pause <= 0 || pause > 100*time.Millisecond || !errors.Is(final, ErrNotAllowed) {
		t.Errorf("just before the end: %v, %v", pause, final)
	}
	j.refused = time.Now().Add(-notAllowedWait)
	if pause, final := j.judge(no, time.Second); pause != 0 || !errors.Is(final, ErrNotAllowed) {
		t.Errorf("after ten seconds: %v, %v", pause, final)
	}
	if pause, final := j.judge(io.EOF, time.Second); pause != time.Second || final != nil {
		t.Errorf("another answer: %v, %v, %v", pause, final, j.refused)
	}
}

func TestWays(t *testing.T) {
	t.Parallel()
	proxied := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: "127.0.0.1:1"})}
	tlsDialer := &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return nil, io.EOF }}
	for _, c := range []struct {
		base      string
		transport http.RoundTripper
		want      string
	}{
		{"http://app.test:7", nil, "127.0.0.1:7 127.0.0.2:7 [::1]:7"},
		{"https://app.test", &http.Transport{}, "127.0.0.1:443 127.0.0.2:443 [::1]:443"},
		{"http://other.test:7", nil, ""},
		{"http://10.0.0.1:7", nil, "10.0.0.1:7"},
		{"http://[::1]:7", nil, "[::1]:7"},
		{"http://app.test:7", proxied, ""},
		{"http://app.test:7", tlsDialer, "127.0.0.1:7 127.0.0.2:7 [::1]:7"},
		{"https://app.test:7", tlsDialer, ""},
		{"http://app.test:7", &ownTripper{}, ""},
	} {
		var client *http.Client
		if c.transport != nil {
			client = &http.Client{Transport: c.transport}
		}
		p := callerOf(t, client, false)
		p.lookup = turning("app.test", "::1", "127.0.0.2", "::ffff:127.0.0.1", "127.0.0.1")
		for range 3 {
			if got := strings.Join(p.ways(t.Context(), c.base), " "); got != c.want {
				t.Errorf("%s by %T: %q, want %q", c.base, c.transport, got, c.want)
			}
		}
	}
}

// By way of an address the name stays what TLS and the server see, over HTTP/1.1 and HTTP/2, and the caller's connections stay his.
func TestWayKeepsTheName(t *testing.T) {
	t.Parallel()
	pool, issue := authority(t)
	p, _ := doorHost().peer(t, true, nil)
	var mu sync.Mutex
	seen := make(map[string]bool)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		seen[req.TLS.ServerName+" "+req.Host] = true
		mu.Unlock()
		p.ServeHTTP(w, req)
	}))
	var conns atomic.Int64
	srv.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{issue("app.test")}}
	srv.StartTLS()
	defer srv.Close()
	addr := srv.Listener.Addr().String()
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	for what, tr := range map[string]*http.Transport{
		"HTTP/1.1":           {DialContext: dial},
		"HTTP/2":             {DialContext: dial, ForceAttemptHTTP2: true},
		"HTTP/2, by default": {},
	} {
		defer tr.CloseIdleConnections()
		if tr.DialContext != nil {
			tr.TLSClientConfig = &tls.Config{RootCAs: pool}
		} else if tr.TLSClientConfig = (&http.Transport{}).Clone().TLSClientConfig; tr.TLSClientConfig != nil {
			tr.TLSClientConfig.RootCAs = pool
		} else {
			tr.TLSClientConfig = &tls.Config{RootCAs: pool, NextProtos: []string{"h2", "http/1.1"}}
		}
		b := callerOf(t, &http.Client{Transport: tr}, true)
		if tr.DialContext != nil {
			if _, err := b.status(t.Context(), "https://app.test:7"); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
		before := conns.Load()
		for range 3 {
			if a, err := b.statusBy(t.Context(), "https://app.test:7", addr); err != nil || a.ID != "a" {
				t.Fatalf("%s: %+v, %v", what, a, err)
			}
		}
		if n := conns.Load() - before; n != 3 {
			t.Errorf("%s: %d connections for 3 calls", what, n)
		}
		if tr.DialContext != nil {
			before = conns.Load()
			if _, err := b.status(t.Context(), "https://app.test:7"); err != nil || conns.Load() != before {
				t.Errorf("%s: the caller's own connection is gone: %v", what, err)
			}
		}
	}
	if len(seen) != 1 || !seen["app.test app.test:7"] {
		t.Errorf("the server saw %v", seen)
	}
}
