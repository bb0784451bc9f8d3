package quorate

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// until polls, and fails with the last state.
func until(t *testing.T, limit time.Duration, what string, ok func() bool, state ...func() any) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) {
			for _, s := range state {
				t.Log(s())
			}
			t.Fatalf("not within %v: %s", limit, what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

// A logFSM keeps all commands; a snapshot is all of them as JSON.
type logFSM struct {
	mu       sync.Mutex // guards the fields below
	commands []string
	index    uint64
	restored int
}

func (f *logFSM) Apply(l *raft.Log) any {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.commands, f.index = append(f.commands, string(l.Data)), l.Index
	return nil
}

func (f *logFSM) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.commands)
}

func (f *logFSM) applied() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.index
}

func (f *logFSM) Snapshot() (raft.FSMSnapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, err := json.Marshal(f.commands)
	return toySnapshot(data), err
}

func (f *logFSM) Restore(r io.ReadCloser) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.restored++
	return json.NewDecoder(r).Decode(&f.commands)
}

type toySnapshot []byte

func (s toySnapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(s); err != nil {
		return err
	}
	return sink.Close()
}
func (s toySnapshot) Release() {}

// A node is a real raft behind a real server.
type node struct {
	id     string
	addr   string // as its configuration says
	handle http.Handler
	srv    *httptest.Server
	peer   *peer
	fsm    *logFSM
	logs   *raft.InmemStore
	raft   atomic.Pointer[raft.Raft]

	announced sync.Map     // id → address
	lookups   atomic.Int64 // of an address, that is tries to reach someone
	snapshots atomic.Int64
	proto     atomic.Int64 // of the last request that came
	twice     atomic.Int64 // of the first node: entries that may be in the log twice
}

func (n *node) server(id string) (string, bool, bool) {
	r := n.raft.Load()
	if r == nil {
		return "", false, false
	}
	for _, s := range r.GetConfiguration().Configuration().Servers {
		if string(s.ID) == id {
			return string(s.Address), true, s.Suffrage == raft.Voter
		}
	}
	return "", false, false
}

func (n *node) host() peerHost {
	return peerHost{
		self:       func() (string, string, string) { return n.id, "cluster", n.addr },
		ready:      func() bool { return n.raft.Load() != nil },
		server:     n.server,
		unannounce: func(string, string) {},
		raftEnd:    func() uint64 { return n.raft.Load().LastIndex() },
		allowed:    func(string) bool { return true },
		announced: func(id string) string {
			n.lookups.Add(1)
			addr, _ := n.announced.Load(id)
			s, _ := addr.(string)
			return s
		},
		formats:    func() (uint64, uint64) { return firstFormat, entryFormat },
		removed:    func(string) bool { return false },
		silent:     func() error { return nil },
		standsLast: func() bool { return false }, logWaits: func() error { return nil }, answers: func(raft.ServerID, uint64) {}, refuses: func(raft.ServerID, uint64) {},
		leading: func(term uint64) bool {
			r := n.raft.Load()
			return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
		},
		leader: func() (string, string) {
			addr, id := n.raft.Load().LeaderWithID()
			return string(id), string(addr)
		},
		term:   func() uint64 { return n.raft.Load().CurrentTerm() },
		states: func() (uint64, error) { return n.raft.Load().CurrentTerm(), nil },
		hasLeader: func() bool {
			_, id := n.raft.Load().LeaderWithID()
			return id != ""
		},
		lastEntry: func() (uint64, uint64) {
			last, _ := n.logs.LastIndex()
			term, _ := n.termAt(last)
			return last, term
		},
		applied:    n.fsm.applied,
		termAt:     n.termAt,
		checkEntry: func(*raft.Log) error { return nil },
		stranger:   func(string) {},
		contact:    func(string) {},
		called:     func(string, string, time.Time, error) {},
		snapshots:  func(d int) { n.snapshots.Add(int64(d) << 32); n.snapshots.Add(1) },
		status:     func() statusAnswer { return statusAnswer{ID: n.id} },
		propose: func(_ context.Context, data []byte) ([]byte, error) {
			f := n.raft.Load().Apply(data, 0)
			if err := f.Error(); err != nil {
				return nil, err
			}
			return []byte("done"), nil
		},
	}
}

func (n *node) termAt(index uint64) (uint64, bool) {
	var l raft.Log
	err := n.logs.GetLog(index, &l)
	return l.Term, err == nil
}

func (n *node) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	n.proto.Store(int64(req.ProtoMajor))
	n.handle.ServeHTTP(w, req)
}

// listen serves the node at addr, or at a free port if addr is "".
func (n *node) listen(t *testing.T, addr string, secure bool) string {
	t.Helper()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	n.srv = httptest.NewUnstartedServer(n)
	n.srv.Listener.Close()
	n.srv.Listener = l
	n.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	if secure {
		n.srv.EnableHTTP2 = true
		n.srv.StartTLS()
	} else {
		n.srv.Start()
	}
	return l.Addr().String()
}

func (n *node) hangUp() {
	n.srv.CloseClientConnections()
	n.srv.Close()
}

func (n *node) start(t *testing.T) {
	t.Helper()
	const calm = 600 * time.Millisecond // the race detector on a busy machine loses leaders at 300
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(n.id)
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = calm, calm, calm
	c.CommitTimeout = 5 * time.Millisecond
	c.TrailingLogs = 1
	c.Logger = hclog.NewNullLogger()
	r, err := raft.NewRaft(c, n.fsm, n.logs, n.logs, raft.NewInmemSnapshotStore(), n.peer.transport())
	if err != nil {
		t.Fatal(err)
	}
	n.raft.Store(r)
}

func (n *node) stop(t *testing.T) {
	down := n.raft.Load().Shutdown()
	n.peer.close()
	if err := down.Error(); err != nil {
		t.Error(err)
	}
	n.hangUp()
}

type clusterOptions struct {
	secure bool
	client *http.Client
	front  func(addr string) string // where the others reach it
	wrap   func(http.Handler) http.Handler
}

// startCluster makes members until size and waits for all to be voters.
func startCluster(t *testing.T, size int, o clusterOptions) []*node {
	t.Helper()
	var nodes []*node
	client := o.client
	if client == nil {
		client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	}
	for i := range size {
		n := &node{id: fmt.Sprintf("m%d", i+1), fsm: &logFSM{}, logs: raft.NewInmemStore()}
		n.peer = newPeer(n.host(), client, o.secure, slog.New(slog.DiscardHandler))
		n.handle = n.peer
		if o.wrap != nil {
			n.handle = o.wrap(n.peer)
		}
		n.addr = n.listen(t, "", o.secure)
		if o.front != nil {
			n.addr = o.front(n.addr)
		}
		n.start(t)
		nodes = append(nodes, n)
	}
	t.Cleanup(func() {
		for _, n := range nodes {
			n.stop(t)
		}
		client.CloseIdleConnections()
	})
	var servers []raft.Server
	for _, n := range nodes {
		servers = append(servers, raft.Server{ID: raft.ServerID(n.id), Address: raft.ServerAddress(n.addr)})
	}
	if err := nodes[0].raft.Load().BootstrapCluster(raft.Configuration{Servers: servers}).Error(); err != nil {
		t.Fatal(err)
	}
	leader(t, nodes)
	return nodes
}

// leader waits for one that has committed the first entry of its term.
func leader(t *testing.T, nodes []*node) *node {
	t.Helper()
	var found *node
	until(t, patience, "a leader", func() bool {
		for _, n := range nodes {
			if n.raft.Load().State() == raft.Leader && n.raft.Load().VerifyLeader().Error() == nil {
				found = n
				return true
			}
		}
		return false
	})
	return found
}

func follower(t *testing.T, nodes []*node) *node {
	t.Helper()
	l := leader(t, nodes)
	for _, n := range nodes {
		if n != l {
			return n
		}
	}
	t.Fatal("no follower")
	return nil
}

func write(t *testing.T, nodes []*node, count int) {
	t.Helper()
	for range count {
		commit(t, nodes, []byte("a command of some length"))
	}
}

// commit writes an entry. If its leader was lost meanwhile, as on a machine that has no processor for it, it is written again, and may be
// there twice.
func commit(t *testing.T, nodes []*node, data []byte) {
	t.Helper()
	eventually(t, patience, "a committed entry", func() error {
		err := leader(t, nodes).raft.Load().Apply(data, time.Second).Error()
		if errors.Is(err, raft.ErrLeadershipLost) {
			nodes[0].twice.Add(1)
		}
		return err
	})
}

func allApplied(t *testing.T, limit time.Duration, nodes []*node, count int) {
	t.Helper()
	most := count + int(nodes[0].twice.Load())
	for _, n := range nodes {
		until(t, limit, n.id+" applies everything", func() bool { return count <= n.fsm.count() && n.fsm.count() <= most }, func() any { return n.fsm.count() })
	}
}

func TestThreeMembersReplicate(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 3, clusterOptions{})
	write(t, nodes, 20)
	allApplied(t, patience, nodes, 20)
	l, f := leader(t, nodes), follower(t, nodes)
	if err := l.raft.Load().LeadershipTransferToServer(raft.ServerID(f.id), raft.ServerAddress(f.addr)).Error(); err != nil {
		t.Errorf("transfer: %v", err)
	}
	write(t, nodes, 1)
	allApplied(t, patience, nodes, 21)

	// One append per request, cut by size: 9 MiB go in three.
	big := bytes.Repeat([]byte("x"), 3<<20)
	var running sync.WaitGroup
	for range 3 {
		running.Go(func() { commit(t, nodes, big) })
	}
	running.Wait()
	allApplied(t, patience, nodes, 24)
}

// Appends that are rejected under load hold nobody up: with a pipeline, raft waits for ever for room in it, and its heartbeats hide
// that (hashicorp/raft#612).
func TestAppendsRejectedUnderLoad(t *testing.T) {
	t.Parallel()
	var appends atomic.Int64
	nodes := startCluster(t, 3, clusterOptions{wrap: rejectsAppends(func() bool { return appends.Add(1)%64 > 56 })})
	const writers, each = 32, 100
	var running sync.WaitGroup
	for range writers {
		running.Go(func() { write(t, nodes, each) })
	}
	running.Wait()
	allApplied(t, patience, nodes, writers*each)
}

func TestAppendResumesAtOnceAfterAnOutage(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 3, clusterOptions{})
	write(t, nodes, 1)
	allApplied(t, patience, nodes, 1)
	l, f := leader(t, nodes), follower(t, nodes)
	entries := 1
	eventually(t, 2*patience, "at once", func() error { // after one of many outages the machine has no other work
		f.hangUp()
		before := l.lookups.Load()
		write(t, nodes, 10)
		// With raft's own backoff its next try after this long would come a second later or more.
		until(t, patience, "many tries", func() bool { return l.lookups.Load()-before > 60 })
		f.listen(t, f.addr, false)
		began := time.Now()
		entries += 10
		until(t, patience, "the member catches up", func() bool { return f.fsm.count() >= entries })
		if took := time.Since(began); took > 500*time.Millisecond {
			return fmt.Errorf("took %v", took)
		}
		return nil
	})
}

func TestAppendGoesToTheAnnouncedAddress(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 3, clusterOptions{})
	write(t, nodes, 1)
	allApplied(t, patience, nodes, 1)
	f := follower(t, nodes)
	f.hangUp()
	write(t, nodes, 5)
	moved := f.listen(t, "", false)
	for _, n := range nodes {
		n.announced.Store(f.id, moved)
	}
	until(t, patience, "the moved member catches up", func() bool { return f.fsm.count() >= 6 })
}

func TestSnapshotIsSentToANewMember(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 1, clusterOptions{})
	write(t, nodes, 50)
	if err := nodes[0].raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	n := &node{id: "new", fsm: &logFSM{}, logs: raft.NewInmemStore()}
	n.peer = newPeer(n.host(), nil, false, slog.New(slog.DiscardHandler))
	n.handle = n.peer
	n.addr = n.listen(t, "", false)
	n.hangUp() // it does not listen yet when it is added, as a joiner
	n.start(t)
	defer n.stop(t)
	added := nodes[0].raft.Load().AddNonvoter("new", raft.ServerAddress(n.addr), 0, time.Second)
	if err := added.Error(); err != nil {
		t.Fatal(err)
	}
	tries := nodes[0].lookups.Load()
	until(t, 5*time.Second, "tries to reach the new member", func() bool { return nodes[0].lookups.Load() > tries+10 })
	if got := nodes[0].snapshots.Load(); got != 0 {
		t.Errorf("a snapshot was begun for a member that is not there: %d", got)
	}
	n.listen(t, n.addr, false)
	allApplied(t, patience, []*node{n}, 50)
	n.fsm.mu.Lock()
	defer n.fsm.mu.Unlock()
	if n.fsm.restored != 1 {
		t.Errorf("restored %d times", n.fsm.restored)
	}
	until(t, patience, "snapshots(+1) and snapshots(-1)", func() bool { return nodes[0].snapshots.Load() == 2 })
}

func TestClusterOverHTTP2(t *testing.T) {
	t.Parallel()
	client := &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	nodes := startCluster(t, 3, clusterOptions{secure: true, client: client})
	write(t, nodes, 20)
	allApplied(t, patience, nodes, 20)
	if got := follower(t, nodes).proto.Load(); got != 2 {
		t.Errorf("HTTP/%d", got)
	}
}

func TestClusterBehindProxies(t *testing.T) {
	t.Parallel()
	var passed atomic.Int64
	front := func(addr string) string {
		to := &url.URL{Scheme: "http", Host: addr}
		proxy := &httputil.ReverseProxy{
			Rewrite:  func(r *httputil.ProxyRequest) { passed.Add(1); r.SetURL(to) },
			ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
		}
		srv := httptest.NewServer(proxy)
		t.Cleanup(srv.Close)
		return srv.Listener.Addr().String()
	}
	nodes := startCluster(t, 3, clusterOptions{front: front, client: &http.Client{Timeout: time.Second, Transport: &http.Transport{}}})
	write(t, nodes, 20)
	allApplied(t, patience, nodes, 20)
	if passed.Load() == 0 {
		t.Error("nothing went through a proxy")
	}
}

// A new raft in the same process gets a transport of its own; the one before is closed.
func TestRaftRestartsOnANewTransport(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 3, clusterOptions{})
	write(t, nodes, 1)
	allApplied(t, patience, nodes, 1)
	f := follower(t, nodes)
	old := f.peer.current.Load()
	if err := f.raft.Load().Shutdown().Error(); err != nil {
		t.Fatal(err)
	}
	f.fsm.mu.Lock()
	f.fsm.commands = nil // raft applies its log anew
	f.fsm.mu.Unlock()
	f.start(t)
	write(t, nodes, 5)
	until(t, patience, "the restarted member applies", func() bool { return f.fsm.count() >= 6 })
	if old.ctx.Err() == nil {
		t.Error("the old transport is open")
	}
}

// heldAppend is a leader's append to an address where nothing listens.
func heldAppend(t *testing.T, host *peerHost) (p *peer, tr *transport, done chan error, tried *atomic.Int64) {
	t.Helper()
	tried = new(atomic.Int64)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	host.announced = func(string) string { tried.Add(1); return l.Addr().String() }
	p = newPeer(*host, nil, false, slog.New(slog.DiscardHandler))
	tr = p.transport()
	done = make(chan error, 1)
	go func() {
		args := someAppend()
		done <- tr.AppendEntries("b", "nowhere:1", args, new(raft.AppendEntriesResponse))
	}()
	until(t, patience, "three tries", func() bool { return tried.Load() >= 3 })
	return p, tr, done, tried
}

func within(t *testing.T, limit time.Duration, done chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		t.Fatalf("still held after %v", limit)
		return nil
	}
}

func TestHeldAppendEnds(t *testing.T) {
	t.Parallel()
	t.Run("when the peer is closed", func(t *testing.T) {
		host := doorHost()
		p, _, done, _ := heldAppend(t, &host.peerHost)
		p.close()
		p.close()
		if err := within(t, time.Second, done); !errors.Is(err, raft.ErrTransportShutdown) {
			t.Error(err)
		}
	})
	t.Run("when a newer transport takes over", func(t *testing.T) {
		host := doorHost()
		p, _, done, _ := heldAppend(t, &host.peerHost)
		defer p.close()
		p.transport()
		if err := within(t, time.Second, done); !errors.Is(err, raft.ErrTransportShutdown) {
			t.Error(err)
		}
	})
	t.Run("when another leads", func(t *testing.T) {
		host := doorHost()
		p, _, done, _ := heldAppend(t, &host.peerHost)
		defer p.close()
		host.lead.Store(0)
		if err := within(t, time.Second, done); err == nil {
			t.Error("no error")
		}
	})
	t.Run("when the member is gone", func(t *testing.T) {
		host := doorHost()
		p, _, done, _ := heldAppend(t, &host.peerHost)
		defer p.close()
		host.members.Delete("b")
		if err := within(t, time.Second, done); err == nil {
			t.Error("no error")
		}
	})
}

// A snapshot's first byte is read when its member is there, and not before: it pins the leader's state.
func TestSnapshotWaitsForItsMember(t *testing.T) {
	t.Parallel()
	var tried, sending atomic.Int64
	nobody := closedPort(t)
	host := doorHost()
	host.announced = func(string) string { tried.Add(1); return nobody }
	host.snapshots = func(d int) { sending.Add(1) }
	p := newPeer(host.peerHost, nil, false, slog.New(slog.DiscardHandler))
	tr := p.transport()
	data := bytes.NewReader(make([]byte, 40))
	done := make(chan error, 1)
	args := someSnapshot()
	args.Term = 7
	go func() { done <- tr.InstallSnapshot("b", "", args, new(raft.InstallSnapshotResponse), data) }()
	until(t, patience, "three tries", func() bool { return tried.Load() >= 6 }) // two look-ups in the first
	p.close()
	if err := within(t, time.Second, done); !errors.Is(err, raft.ErrTransportShutdown) {
		t.Error(err)
	}
	if data.Len() != 40 || sending.Load() != 0 {
		t.Errorf("%d bytes left, %d calls of snapshots", data.Len(), sending.Load())
	}
}

func TestSilentMemberSendsNothing(t *testing.T) {
	t.Parallel()
	var came atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { came.Add(1) }))
	defer srv.Close()
	host := doorHost()
	host.quiet.Store(true)
	host.announced = func(string) string { return srv.Listener.Addr().String() }
	p := newPeer(host.peerHost, nil, false, slog.New(slog.DiscardHandler))
	defer p.close()
	tr := p.transport()
	beat := &raft.AppendEntriesRequest{Term: 7}
	if err := tr.AppendEntries("b", "", beat, new(raft.AppendEntriesResponse)); !errors.Is(err, errStalledDisk) {
		t.Errorf("heartbeat: %v", err)
	}
	if err := tr.RequestVote("b", "", &raft.RequestVoteRequest{}, new(raft.RequestVoteResponse)); !errors.Is(err, errStalledDisk) {
		t.Errorf("vote: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- tr.AppendEntries("b", "", someAppend(), new(raft.AppendEntriesResponse)) }()
	select {
	case err := <-done:
		t.Errorf("an append of a silent member is not held: %v", err)
	case <-time.After(3 * holdInterval):
	}
	if came.Load() != 0 {
		t.Errorf("%d requests were sent", came.Load())
	}
}

// Raft would count these words, in any error, as a granted pre-vote.
func TestForeignWordsAreNoPreVote(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set(headerProtocol, "1")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, `{"code":"x","message":"unexpected command"}`)
	}))
	defer srv.Close()
	host := doorHost()
	host.announced = func(string) string { return srv.Listener.Addr().String() }
	p := newPeer(host.peerHost, nil, false, slog.New(slog.DiscardHandler))
	defer p.close()
	err := p.transport().RequestPreVote("b", "", &raft.RequestPreVoteRequest{}, new(raft.RequestPreVoteResponse))
	if err == nil || bytes.Contains([]byte(err.Error()), []byte("unexpected command")) {
		t.Error(err)
	}
}

func TestPlaceholderAddress(t *testing.T) {
	host := doorHost()
	host.self = func() (string, string, string) { return "me", "c", "" }
	p := newPeer(host.peerHost, nil, false, slog.New(slog.DiscardHandler))
	defer p.close()
	if got := p.transport().LocalAddr(); got != "local:me" {
		t.Errorf("%q", got)
	}
}

// TimeoutNow to oneself does not need the handler.
func TestTimeoutNowToOneself(t *testing.T) {
	t.Parallel()
	host := doorHost()
	p := newPeer(host.peerHost, nil, false, slog.New(slog.DiscardHandler))
	defer p.close()
	tr := p.transport()
	go func() {
		rpc := <-tr.Consumer()
		rpc.Respond(&raft.TimeoutNowResponse{}, nil)
	}()
	if err := tr.TimeoutNow("a", "nowhere:1", &raft.TimeoutNowRequest{}, new(raft.TimeoutNowResponse)); err != nil {
		t.Error(err)
	}
}
