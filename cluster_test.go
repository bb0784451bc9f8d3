package quorate

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// update rewrites what lies in testdata from what the code does now; the difference is read in review.
var update = flag.Bool("update", false, "rewrite the files in testdata")

// The tests' cluster: real members of this process on loopback, each with its own directory, listener and client.

type testMember struct {
	t      testing.TB
	conf   Config
	listen string                          // where it listens, if not at conf.Addr: behind a proxy
	tls    *tls.Config                     // of its server, if it has TLS
	wrap   func(http.Handler) http.Handler // what stands before it, if anything
	line   *line                           // its client's connections
	mu     sync.Mutex                      // guards the fields below
	s      *Service                        // nil while stopped
	server *http.Server
}

var addrsGiven sync.Map // by freeAddr: it reserves nothing, so no address is given twice

const portBlock = 2000

var portsHeld net.Listener // of firstPort, or it would be closed when it is collected

// firstPort begins this process's own block of ports: beside another run of these tests a member that is down for a while would
// not get its port back. Whoever listens on the block's first port has it.
var firstPort = sync.OnceValue(func() int {
	for _, i := range rand.Perm(10) {
		port := 10_000 + i*portBlock
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			portsHeld = l
			return port
		}
	}
	return 10_000
})

// freeAddr is an address on which nobody listens, for a listener that follows soon. The port is below
// those that connections get for themselves: of the many calls to a member that is down one would get that member's own port
// some day, talk to itself, and keep the member from coming back.
func freeAddr(t testing.TB) string {
	t.Helper()
	var err error
	for range 100 {
		addr := fmt.Sprint("127.0.0.1:", firstPort()+1+rand.IntN(portBlock-1))
		if _, given := addrsGiven.LoadOrStore(addr, true); given { // and may be listened on again just now
			continue
		}
		var l net.Listener
		if l, err = net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
	t.Fatal(err)
	return ""
}

func ctxFor(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls a condition and fails with its last state.
func eventually(t testing.TB, limit time.Duration, what string, f func() error) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// must fails the test at the caller's line.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newMember is a member that is not started.
func newMember(t testing.TB, join string) *testMember {
	l := &line{}
	m := &testMember{t: t, line: l, conf: Config{Dir: filepath.Join(t.TempDir(), "data"), Addr: freeAddr(t), Join: join, Client: newClient(t, l), Logger: testLogger(t)}}
	t.Cleanup(m.stop)
	return m
}

func newClient(t testing.TB, l *line) *http.Client {
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.MaxIdleConnsPerHost = 64
	tr.DialContext = l.dial
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// A line is a member's way to the others: it can be cut, and mended.
type line struct {
	mu    sync.Mutex // guards the fields below
	down  bool
	conns map[*lineConn]bool
}

type lineConn struct {
	net.Conn
	l *line
}

func (l *line) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		conn.Close()
		return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("the line is cut")}
	}
	if l.conns == nil {
		l.conns = make(map[*lineConn]bool)
	}
	c := &lineConn{conn, l}
	l.conns[c] = true
	return c, nil
}

func (c *lineConn) Close() error {
	c.l.mu.Lock()
	delete(c.l.conns, c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

func (l *line) set(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
	for c := range l.conns {
		c.Conn.Close()
	}
}

// start opens the member, and serves it as an application would.
func (m *testMember) start() *Service {
	m.t.Helper()
	s, err := m.open()
	if err != nil {
		m.t.Fatalf("open %s: %v", m.conf.Addr, err)
	}
	return s
}

func (m *testMember) open() (*Service, error) { return m.openWithin(context.Background()) }

func (m *testMember) openWithin(ctx context.Context) (*Service, error) {
	s, err := Open(ctx, m.conf)
	if err != nil {
		return nil, err
	}
	server, err := m.serve(s)
	if err != nil {
		s.Close()
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.s, m.server = s, server
	return s, nil
}

// openUntil is openWithin with a context that ends once the log has said these words: what they tell of has happened then, however
// slow the machine is.
func (m *testMember) openUntil(words string) (*Service, error) {
	ctx, end := context.WithCancelCause(m.t.Context())
	defer end(nil)
	defer time.AfterFunc(patience, func() { end(errors.New("the log does not say " + words)) }).Stop()
	kept := m.conf.Logger
	defer func() { m.conf.Logger = kept }()
	to := slog.DiscardHandler
	if kept != nil {
		to = kept.Handler()
	}
	m.conf.Logger = slog.New(listener{to, words, func() { end(context.DeadlineExceeded) }})
	return m.openWithin(ctx)
}

const notAllowedYet = "this member is not allowed to join yet"

// A listener is called when a line of the log holds its words.
type listener struct {
	slog.Handler
	words string
	heard func()
}

func (l listener) Enabled(context.Context, slog.Level) bool { return true }

func (l listener) Handle(ctx context.Context, r slog.Record) error {
	if strings.Contains(r.Message, l.words) {
		defer l.heard()
	}
	return l.Handler.Handle(ctx, r)
}

func (l listener) WithAttrs(attrs []slog.Attr) slog.Handler {
	return listener{l.Handler.WithAttrs(attrs), l.words, l.heard}
}

func (l listener) WithGroup(name string) slog.Handler {
	return listener{l.Handler.WithGroup(name), l.words, l.heard}
}

func (m *testMember) serve(s *Service) (*http.Server, error) {
	mux := http.NewServeMux()
	mux.Handle("/raft/", s)
	addr := m.conf.Addr
	if m.listen != "" {
		addr = m.listen
	}
	l, err := net.Listen("tcp", addr)
	for range 5 {
		if !errors.Is(err, syscall.EADDRINUSE) { // an outgoing connection may have this port for a moment
			break
		}
		<-time.After(200 * time.Millisecond)
		l, err = net.Listen("tcp", addr)
	}
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: mux, TLSConfig: m.tls, ErrorLog: log.New(io.Discard, "", 0)}
	if m.wrap != nil {
		server.Handler = m.wrap(mux)
	}
	if m.tls != nil {
		go server.ServeTLS(l, "", "")
	} else {
		go server.Serve(l)
	}
	return server, nil
}

// stop closes the member and its server.
func (m *testMember) stop() {
	m.mu.Lock()
	s, server := m.s, m.server
	m.s, m.server = nil, nil
	m.mu.Unlock()
	if s == nil {
		return
	}
	if err := s.Close(); err != nil && !(underRace() && errors.Is(err, errLate)) { // a row costs ten times as much under the race detector
		m.t.Errorf("close %s: %v", m.conf.Addr, err)
	}
	server.Close()
}

// cut closes the member's listener and connections: it can call others and nobody reaches it.
func (m *testMember) cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.server.Close()
}

// heal serves a cut member again.
func (m *testMember) heal() {
	m.mu.Lock()
	defer m.mu.Unlock()
	server, err := m.serve(m.s)
	if err != nil {
		m.t.Fatal(err)
	}
	m.server = server
}

// isolate cuts the member both ways.
func (m *testMember) isolate() {
	m.line.set(true)
	m.cut()
}

// rejoin mends both ways of an isolated member.
func (m *testMember) rejoin() {
	m.line.set(false)
	m.heal()
}

type testCluster []*testMember

// newCluster starts n members, all of them voters when it returns.
func newCluster(t testing.TB, n int, change ...func(*Config)) testCluster {
	t.Helper()
	var c testCluster
	for i := range n {
		join := ""
		if i > 0 {
			join = c[0].conf.Addr
		}
		m := newMember(t, join)
		for _, f := range change {
			f(&m.conf)
		}
		if i > 0 {
			must(t, c[0].s.AddAllowedMember(ctxFor(t, 10*time.Second), m.conf.Addr))
		}
		m.start()
		c = append(c, m)
	}
	c.awaitVoters(t, n)
	return c
}

// awaitVoters waits until every running member knows n voters and would accept a write.
func (c testCluster) awaitVoters(t testing.TB, n int) {
	t.Helper()
	for _, m := range c {
		if m.s == nil {
			continue
		}
		must(t, m.s.Ready(ctxFor(t, 20*time.Second)))
		eventually(t, 20*time.Second, "voters at "+m.conf.Addr, func() error {
			st := m.s.Status()
			voters := 0
			for _, v := range st.Members {
				if v.Voter {
					voters++
				}
			}
			if voters != n {
				return fmt.Errorf("%d voters, want %d: %+v", voters, n, st.Members)
			}
			return nil
		})
	}
}

// leader is the member that leads, when all running members agree on it.
func (c testCluster) leader(t testing.TB) *testMember {
	t.Helper()
	var found *testMember
	eventually(t, 20*time.Second, "a leader", func() error {
		found = nil
		id := ""
		for _, m := range c {
			if m.s == nil {
				continue
			}
			st := m.s.Status()
			if st.LeaderID == "" || id != "" && st.LeaderID != id {
				return fmt.Errorf("%s takes %q for the leader, another one %q", m.conf.Addr, st.LeaderID, id)
			}
			if id = st.LeaderID; st.ID == id {
				found = m
			}
		}
		if found == nil {
			return errors.New("the leader is not running")
		}
		return nil
	})
	return found
}

func (c testCluster) follower(t testing.TB) *testMember {
	t.Helper()
	l := c.leader(t)
	for _, m := range c {
		if m != l && m.s != nil {
			return m
		}
	}
	t.Fatal("no follower")
	return nil
}

// awaitEqual waits until all running members hold the same state.
func (c testCluster) awaitEqual(t testing.TB) {
	t.Helper()
	eventually(t, 20*time.Second, "equal states", func() error {
		var first Status
		for i, m := range c {
			if m.s == nil {
				continue
			}
			st := m.s.Status()
			if first.ID == "" {
				first = st
			} else if st.AppliedIndex != first.AppliedIndex || st.Hash != first.Hash {
				return fmt.Errorf("member %d has %s at %d, the first has %s at %d", i, st.Hash, st.AppliedIndex, first.Hash, first.AppliedIndex)
			}
		}
		return nil
	})
}
