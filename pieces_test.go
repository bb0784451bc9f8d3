package quorate

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// full is a lone member whose log no longer begins at its beginning, with so many bytes of state.
func full(t *testing.T, size int) testCluster {
	t.Helper()
	c := newCluster(t, 1)
	value := make([]byte, 64<<10)
	for i := range size >> 16 {
		rand.Read(value)
		must(t, c[0].s.Set(ctxFor(t, patience), fmt.Sprint("k", i), value))
	}
	c.cutLogs(t, 10)
	return c
}

// joins admits a member and waits until it holds the same state.
func (c testCluster) joins(t *testing.T, m *testMember) {
	t.Helper()
	must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	m.start()
	must(t, m.s.Ready(ctxFor(t, patience)))
	testCluster{c[0], m}.awaitEqual(t)
	// The state may serve before raft has answered the install, and only that ends the arrival.
	eventually(t, patience, "nothing left of the snapshot", func() error {
		if list, _ := filepath.Glob(filepath.Join(m.conf.Dir, "snap.incoming*")); len(list) > 0 {
			return fmt.Errorf("left: %v", list)
		}
		return nil
	})
}

// pieceLog is a way on which every piece is seen.
type pieceLog struct {
	mu    sync.Mutex // guards the fields below
	ids   map[string]bool
	most  int
	count int
	paths map[string]int
}

func (l *pieceLog) see(h http.Handler, after func(count int, w http.ResponseWriter, req *http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		l.mu.Lock()
		if l.paths == nil {
			l.paths = make(map[string]int)
		}
		l.paths[req.URL.Path]++
		l.mu.Unlock()
		if req.URL.Path != "/raft/piece" {
			h.ServeHTTP(w, req)
			return
		}
		body, err := io.ReadAll(req.Body)
		if err != nil {
			http.Error(w, "too large", http.StatusRequestEntityTooLarge)
			return
		}
		req.Body = io.NopCloser(bytes.NewReader(body))
		piece, data, err := decodePiece(body)
		l.mu.Lock()
		if l.ids == nil {
			l.ids = make(map[string]bool)
		}
		if err == nil {
			l.ids[piece.ID] = true
		}
		l.count++
		l.most = max(l.most, len(data))
		count := l.count
		l.mu.Unlock()
		if after == nil || after(count, w, req) {
			h.ServeHTTP(w, req)
		}
	})
}

// A state gets through a limit on the size of a request, and to a member whose connections break all the time, as one install.
func TestSnapshotInPieces(t *testing.T) {
	t.Parallel()
	for what, way := range map[string]func(*pieceLog) func(http.Handler) http.Handler{
		"through a limit of 100 KiB": func(l *pieceLog) func(http.Handler) http.Handler {
			return func(h http.Handler) http.Handler { return http.MaxBytesHandler(l.see(h, nil), 100<<10) }
		},
		"over a line that breaks": func(l *pieceLog) func(http.Handler) http.Handler {
			return func(h http.Handler) http.Handler {
				return l.see(h, func(n int, w http.ResponseWriter, req *http.Request) bool {
					switch n % 5 {
					case 2: // before it is taken
						panic(http.ErrAbortHandler)
					case 4: // after
						h.ServeHTTP(discard{}, req)
						panic(http.ErrAbortHandler)
					}
					return true
				})
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			c := full(t, 3<<20)
			m := newMember(t, c[0].conf.Addr)
			var seen pieceLog
			m.wrap = way(&seen)
			c.joins(t, m)
			seen.mu.Lock()
			defer seen.mu.Unlock()
			if len(seen.ids) != 1 || seen.count < 5 || seen.paths["/raft/snapshot"] != 0 {
				t.Errorf("%d sendings, %d pieces, %v", len(seen.ids), seen.count, seen.paths)
			}
			if strings.Contains(what, "limit") && seen.most > 100<<10 {
				t.Errorf("a piece of %d bytes", seen.most)
			}
		})
	}
}

type discard struct{}

func (discard) Header() http.Header         { return make(http.Header) }
func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) WriteHeader(int)             {}

// A member of a release without pieces gets the state in one request.
func TestSnapshotToAnOlderMember(t *testing.T) {
	t.Parallel()
	c := full(t, 1<<20)
	m := newMember(t, c[0].conf.Addr)
	var seen pieceLog
	m.wrap = func(h http.Handler) http.Handler {
		return seen.see(h, func(_ int, w http.ResponseWriter, req *http.Request) bool {
			req.URL.Path = "/raft/unknown"
			return true
		})
	}
	c.joins(t, m)
	seen.mu.Lock()
	defer seen.mu.Unlock()
	if seen.paths["/raft/snapshot"] != 1 || seen.count != 1 {
		t.Errorf("%d pieces, %v", seen.count, seen.paths)
	}
}

// lineRate lets requests pass with so many bytes a second, one after the other, each to be answered by a peer of this process.
type lineRate struct {
	rate int64
	to   *peer
	busy sync.Mutex
	sent atomic.Int64
}

func (l *lineRate) RoundTrip(req *http.Request) (*http.Response, error) {
	l.busy.Lock()
	defer l.busy.Unlock()
	var body []byte
	if req.Body != nil {
		body, _ = io.ReadAll(req.Body)
	}
	select {
	case <-time.After(time.Duration(len(body)) * time.Second / time.Duration(l.rate)):
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
	l.sent.Add(int64(len(body)))
	there := req.Clone(req.Context())
	there.Body = io.NopCloser(bytes.NewReader(body))
	w := httptest.NewRecorder()
	l.to.ServeHTTP(w, there)
	return w.Result(), nil
}

// Over a slow line a state arrives once, in the time that its bytes take.
func TestSnapshotOverASlowLine(t *testing.T) {
	for _, rate := range []int64{64 << 10, 8 << 10} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const size = 8 << 20
				state := make([]byte, size)
				rand.Read(state)
				var got []byte
				to := doorHost()
				part := filepath.Join(t.TempDir(), "part")
				to.incoming = func() string { return part }
				receiver, reached := to.peer(t, false, func(rpc raft.RPC) {
					got, _ = io.ReadAll(rpc.Reader)
					rpc.Respond(&raft.InstallSnapshotResponse{Term: 7, Success: true}, nil)
				})
				line := &lineRate{rate: rate, to: receiver}
				sender, args := senderTo(t, line, size)
				began := time.Now()
				var resp raft.InstallSnapshotResponse
				err := sender.InstallSnapshot("a", "127.0.0.1:1", args, &resp, bytes.NewReader(state))
				took := time.Since(began)
				if err != nil || !resp.Success || !bytes.Equal(got, state) || reached.Load() != 1 {
					t.Errorf("%+v, %v, %d bytes, raft was asked %d times", resp, err, len(got), reached.Load())
				}
				if ideal := time.Duration(size/rate) * time.Second; took > ideal+ideal/4 || line.sent.Load() > size+size/4 {
					t.Errorf("it took %v and %d bytes, want about %v and %d", took, line.sent.Load(), ideal, size)
				}
				if _, err := os.Stat(part); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("left: %v", err)
				}
				receiver.close()
				sender.p.close()
				synctest.Wait()
			})
		})
	}
}

// A member joins over a line of 64 KiB a second, while there are writes of a quarter of that, in little more than the time that the bytes
// take; then it votes, and the writes go on with it.
func TestJoinOverASlowLine(t *testing.T) {
	t.Parallel()
	const size, rate, every, value = 2 << 20, 64 << 10, time.Second / 2, 8 << 10
	for _, line := range []string{"whole", "breaks"} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newScript(t)
				defer c.end()
				c.change = func(conf *Config) { conf.History = 8 } // or the state holds every value twice
				c.obey("start a")
				a := c.member("a").s
				random := make([]byte, 64<<10)
				for i := range size / len(random) {
					rand.Read(random)
					must(t, a.Set(t.Context(), fmt.Sprint("k", i), random))
				}
				must(t, cutLog(a, 10))
				var beside sync.WaitGroup
				stop := make(chan struct{})
				writes, worst := 0, time.Duration(0)
				beside.Go(func() {
					for !isClosed(stop) {
						began := time.Now()
						if err := a.Set(t.Context(), fmt.Sprint("w", writes%8), random[:value]); err != nil {
							t.Errorf("write %d: %v", writes, err)
						}
						writes, worst = writes+1, max(worst, time.Since(began))
						time.Sleep(every)
					}
				})
				began := time.Now()
				c.net.narrow("a.test:7001", "b.test:7001", rate)
				c.obey("join b via a")
				if line == "breaks" {
					beside.Go(func() {
						for !isClosed(stop) {
							time.Sleep(10 * time.Second)
							c.net.reset("b.test:7001")
						}
					})
				}
				for countVoters(a.Status()) < 2 && time.Since(began) < 10*time.Minute {
					time.Sleep(time.Second / 2)
				}
				took := time.Since(began)
				time.Sleep(10 * time.Second) // of writes that both acknowledge
				ctx, cancel := context.WithTimeout(t.Context(), scriptLimit)
				defer cancel()
				must(t, c.member("b").s.Ready(ctx))
				close(stop)
				beside.Wait()
				if ideal := time.Duration(size/(rate-value*int64(time.Second/every))) * time.Second; took > 2*ideal || worst > 10*time.Second || writes < 50 {
					t.Errorf("it took %v, want about %v; %d writes of %v at most", took, ideal, writes, worst)
				}
				if n := c.net.arrivals()["b.test:7001 snapshot"]; n > 0 {
					t.Errorf("%d states in one request", n)
				}
				c.obey("await equal")
			})
		})
	}
}

// senderTo is member b, the leader of term 7, which sends a snapshot to member a by this way.
func senderTo(t *testing.T, way http.RoundTripper, size int64) (*transport, *raft.InstallSnapshotRequest) {
	b := doorHost()
	b.self = func() (string, string, string) { return "b", "c", "127.0.0.1:2" }
	b.server = func(id string) (string, bool, bool) { return "127.0.0.1:1", true, true }
	p := newPeer(b.peerHost, &http.Client{Transport: way}, false, slog.New(slog.DiscardHandler))
	t.Cleanup(p.close)
	args := someSnapshot()
	args.RPCHeader, args.Term, args.LastLogIndex, args.LastLogTerm, args.Size = from("b"), 7, 60, 7, size
	return p.transport(), args
}

// What the receiver refuses of pieces, and what it makes of them in whatever order they come.
func TestDoorPiece(t *testing.T) {
	t.Parallel()
	type step struct {
		what   string
		change func(*pieceHeader)
		at     int64
		bytes  int
		status int
		code   string
		have   int64
		done   bool
	}
	const size = 100
	first, second := newID(), newID()
	id := func(id string) func(*pieceHeader) { return func(h *pieceHeader) { h.ID = id } }
	for name, steps := range map[string][]step{
		"one by one": {{"the first", nil, 0, 0, 200, "", 0, false}, {"half", nil, 0, 50, 200, "", 50, false}, {"again", nil, 0, 50, 200, "", 50, false},
			{"too far on", nil, 60, 40, 200, "", 50, false}, {"the rest", nil, 50, 50, 200, "", 100, true}, {"asked again", nil, 100, 0, 200, "", 100, true}},
		"more than announced": {{"the first", nil, 0, 50, 200, "", 50, false}, {"too much", nil, 50, 51, 400, codeBadRequest, 0, false},
			{"another size", func(h *pieceHeader) { h.Install.Size = 200 }, 50, 51, 400, codeBadRequest, 0, false}, {"the rest", nil, 50, 50, 200, "", 100, true}},
		"not from its beginning":      {{"the middle", nil, 50, 50, 409, codeConflict, 0, false}},
		"at a negative place":         {{"before", nil, -1, 50, 400, codeBadRequest, 0, false}},
		"under an id of no sense":     {{"it", id("../x"), 0, 50, 400, codeBadRequest, 0, false}},
		"of a size of no sense":       {{"it", func(h *pieceHeader) { h.Install.Size = maxSnapshot + 1 }, 0, 50, 400, codeBadRequest, 0, false}},
		"by another than its sender":  {{"it", func(h *pieceHeader) { h.Install.ID = []byte("x") }, 0, 50, 400, codeBadRequest, 0, false}},
		"of an old leader":            {{"it", func(h *pieceHeader) { h.Install.Term, h.Install.LastLogTerm = 6, 6 }, 0, 50, 200, "", 0, true}},
		"of what is there already":    {{"it", func(h *pieceHeader) { h.Install.LastLogIndex = 40 }, 0, 0, 200, "", size, true}},
		"of a second one":             {{"the first", id(first), 0, 50, 200, "", 50, false}, {"the second", id(second), 0, 10, 200, "", 10, false}, {"the first", id(first), 50, 50, 409, codeConflict, 0, false}},
		"past the end of it":          {{"it", nil, 101, 0, 400, codeBadRequest, 0, false}},
		"with nothing but the header": {{"none", nil, 0, 0, 200, "", 0, false}, {"again", nil, 0, 0, 200, "", 0, false}},
	} {
		d := doorHost()
		part := filepath.Join(t.TempDir(), "part")
		d.incoming = func() string { return part }
		var got []byte
		p, reached := d.peer(t, false, func(rpc raft.RPC) {
			got, _ = io.ReadAll(rpc.Reader)
			rpc.Respond(&raft.InstallSnapshotResponse{Term: 7, Success: true}, nil)
		})
		state := make([]byte, size+100)
		rand.Read(state)
		own := newID()
		installed := false
		for _, s := range steps {
			h := pieceHeader{ID: own, At: s.at, Install: *someSnapshot()}
			h.Install.RPCHeader, h.Install.Term, h.Install.LastLogIndex, h.Install.LastLogTerm, h.Install.Size = from("b"), 7, 60, 7, size
			if s.change != nil {
				s.change(&h)
			}
			body, err := encodePiece(&h, state[max(s.at, 0):][:s.bytes])
			must(t, err)
			resp, r := send(p, "POST", "/raft/piece", body, nil)
			if resp.StatusCode != s.status || r != nil && r.Code != s.code {
				t.Errorf("%s: %s: %d, %v", name, s.what, resp.StatusCode, r)
			}
			if r != nil {
				continue
			}
			var a pieceAnswer
			must(t, json.NewDecoder(resp.Body).Decode(&a))
			if a.Have != s.have || (a.Done != nil) != s.done {
				t.Errorf("%s: %s: %+v, want %d, %v", name, s.what, a, s.have, s.done)
			}
			installed = installed || s.bytes > 0 && a.Have == size
		}
		if installed != (reached.Load() == 1) || installed && !bytes.Equal(got, state[:size]) {
			t.Errorf("%s: raft was asked %d times and read %d bytes", name, reached.Load(), len(got))
		}
		p.close()
		eventually(t, patience, "no file", func() error {
			if _, err := os.Stat(part); !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s: %v", name, err)
			}
			return nil
		})
	}
}

// While raft is at one snapshot no other one begins, in whatever way it comes, and who asks for long is answered in between.
func TestOneInstallAtATime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := doorHost()
		part := filepath.Join(t.TempDir(), "part")
		d.incoming = func() string { return part }
		release := make(chan struct{})
		p, reached := d.peer(t, false, func(rpc raft.RPC) {
			<-release
			rpc.Respond(nil, errors.New("it is not whole"))
		})
		piece := func(id string, at int64, n int) (pieceAnswer, *refusal) {
			h := pieceHeader{ID: id, At: at, Install: *someSnapshot()}
			h.Install.RPCHeader, h.Install.Term, h.Install.LastLogIndex, h.Install.LastLogTerm, h.Install.Size = from("b"), 7, 60, 7, 100
			body, err := encodePiece(&h, make([]byte, n))
			must(t, err)
			resp, r := send(p, "POST", "/raft/piece", body, nil)
			var a pieceAnswer
			if r == nil {
				must(t, json.NewDecoder(resp.Body).Decode(&a))
			}
			return a, r
		}
		id := newID()
		began := time.Now()
		if a, r := piece(id, 0, 100); r != nil || a.Have != 100 || a.Done != nil || time.Since(began) != pieceWait {
			t.Errorf("all of it: %+v, %v after %v", a, r, time.Since(began))
		}
		if _, r := piece(newID(), 0, 10); r == nil || r.Code != codeBusy {
			t.Errorf("another one: %v", r)
		}
		s := someSnapshot()
		s.RPCHeader, s.Term, s.LastLogIndex = from("b"), 7, 60
		if _, r := send(p, "POST", "/raft/snapshot", headed(t, s, nil), nil); r == nil || r.Code != codeBusy {
			t.Errorf("another one in one request: %v", r)
		}
		time.Sleep(pieceIdle + time.Second)
		if _, err := os.Stat(part); err != nil {
			t.Errorf("raft still reads it: %v", err)
		}
		close(release)
		if _, r := piece(id, 100, 0); r == nil || r.Code != codeConflict || !strings.Contains(r.Message, "it is not whole") {
			t.Errorf("what became of it: %v", r)
		}
		if a, r := piece(newID(), 0, 10); r != nil || a.Have != 10 {
			t.Errorf("another one after it: %+v, %v", a, r)
		}
		time.Sleep(pieceIdle + time.Second)
		if _, err := os.Stat(part); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("nobody goes on with it, and it is kept: %v", err)
		}
		p.arrivals.mu.Lock()
		if p.arrivals.cur != nil {
			t.Error("what was dropped is still the one at hand")
		}
		p.arrivals.mu.Unlock()
		if _, r := piece(newID(), 0, 100); r == nil || r.Code != codeConflict { // raft is asked again
			t.Errorf("the whole of another one: %v", r)
		}
		if n := reached.Load(); n != 2 {
			t.Errorf("raft was asked %d times", n)
		}
		p.close()
		synctest.Wait()
	})
}

// While the pieces come this member may get further than the snapshot by itself. Raft would empty the log for it, and entries that
// were acknowledged behind it would be gone.
func TestPiecesOvertakenByTheLog(t *testing.T) {
	t.Parallel()
	d := doorHost()
	part := filepath.Join(t.TempDir(), "part")
	d.incoming = func() string { return part }
	var applied atomic.Uint64
	d.applied = applied.Load
	p, reached := d.peer(t, false, func(rpc raft.RPC) { rpc.Respond(&raft.InstallSnapshotResponse{Term: 7, Success: true}, nil) })
	h := pieceHeader{ID: newID(), Install: *someSnapshot()}
	h.Install.RPCHeader, h.Install.Term, h.Install.LastLogIndex, h.Install.LastLogTerm, h.Install.Size = from("b"), 7, 60, 7, 100
	give := func(at int64, n int, headers map[string]string) (a pieceAnswer, _ *refusal) {
		h.At = at
		body, err := encodePiece(&h, make([]byte, n))
		must(t, err)
		resp, r := send(p, "POST", "/raft/piece", body, headers)
		if r == nil {
			must(t, json.NewDecoder(resp.Body).Decode(&a))
		}
		return a, r
	}
	d.led.Store(true)
	if a, r := give(0, 50, nil); r == nil || r.Code != codeConflict {
		t.Errorf("from another than the leader of its term: %+v, %v", a, r)
	}
	d.led.Store(false)
	if a, r := give(0, 50, nil); r != nil || a.Have != 50 {
		t.Fatalf("%+v, %v", a, r)
	}
	h.Install.ID = []byte("n")
	if a, r := give(50, 10, map[string]string{headerFrom: "n"}); r == nil || r.Code != codeConflict {
		t.Errorf("a piece of another member's under the same id: %+v, %v", a, r)
	}
	h.Install.RPCHeader = from("b")
	applied.Store(60)
	if a, r := give(50, 50, nil); r != nil || a.Done == nil || !a.Done.Success {
		t.Errorf("the rest: %+v, %v", a, r)
	}
	if n := reached.Load(); n != 0 {
		t.Errorf("raft was asked %d times to go back", n)
	}
}

// The sender's own judgement, without a network: what it makes of an answer, and of none.
func TestPieceSender(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := doorHost()
		p, _ := d.peer(t, false, nil)
		tr := p.current.Load()
		sender := func(change func(*pieceSender)) *pieceSender {
			s := &pieceSender{t: tr, id: "b", target: "127.0.0.1:2", begun: true, size: 10, buf: make([]byte, 10), moved: time.Now()}
			s.header = pieceHeader{ID: newID(), At: 50, Install: raft.InstallSnapshotRequest{Term: 7, Size: 100}}
			if change != nil {
				change(s)
			}
			return s
		}
		for _, c := range []struct {
			what string
			have int64
			n    int
			says string // "" = it goes on
			end  func(*pieceSender)
		}{
			{"all of it", 60, 10, "", nil},
			{"some of it", 53, 10, "", nil},
			{"less than before", 49, 10, "leaves the member with 49", nil},
			{"more than was sent", 61, 10, "leaves the member with 61", nil},
			{"nothing", 50, 10, "takes no bytes at 50", nil},
			{"nothing, of nothing", 50, 0, "", nil},
			{"the last", 100, 10, "", func(s *pieceSender) { s.header.At = 90 }},
			{"the last, and no install", 100, 0, "has not installed it", func(s *pieceSender) {
				s.header.At, s.buf, s.moved = 100, nil, time.Now().Add(-installTime(100)-time.Second)
			}},
		} {
			s := sender(c.end)
			at, left := s.header.At, int64(len(s.buf))
			err := s.advance(c.have, c.n, time.Second)
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.what, err)
			}
			if err == nil && (s.header.At != c.have || int64(len(s.buf)) != left-(c.have-at)) {
				t.Errorf("%s: goes on at %d with %d bytes", c.what, s.header.At, len(s.buf))
			}
		}
		for _, c := range []struct {
			what   string
			err    error
			says   string // "" = it is tried again
			change func(*pieceSender)
		}{
			{"no answer", errLost, "", nil},
			{"it is busy", &refusal{Status: 503, Code: codeBusy}, "", nil},
			{"no answer for long", errLost, "broke", func(s *pieceSender) { s.moved = time.Now().Add(-pieceGiveUp - time.Second) }},
			{"it has lost what it had", &refusal{Status: 409, Code: codeConflict, Message: "nothing of it"}, "nothing of it", nil},
			{"another term has begun", errLost, "not leader of term 6", func(s *pieceSender) { s.header.Install.Term = 6 }},
			{"it was removed", errLost, "not a member any more", func(s *pieceSender) { s.id = "gone" }},
			{"it knows no pieces", &refusal{Status: 404}, errNoPieces.Error(), func(s *pieceSender) { s.begun = false }},
		} {
			if err := sender(c.change).failed(10, c.err); (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.what, err)
			}
		}
		d.quiet.Store(true)
		if _, err := sender(nil).send(0); !errors.Is(err, errStalledDisk) {
			t.Errorf("a silent leader: %v", err)
		}
	})
}

// What a kill has left of a snapshot in pieces is gone when the member is opened.
func TestLeftPiecesAreRemoved(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	m.start()
	m.stop()
	left := filepath.Join(m.conf.Dir, "snap.incoming.part")
	must(t, os.WriteFile(left, []byte("x"), 0o600))
	m.start()
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestSizesThatPass(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var z sizes
		if n := z.room("a"); n != maxAppendBody {
			t.Errorf("%d at first", n)
		}
		if !z.refused("a", 4<<20) || z.room("a") != 2<<20 || z.room("b") != maxAppendBody || z.least() != 2<<20 {
			t.Errorf("%d, %d after one refusal", z.room("a"), z.least())
		}
		if z.refused("a", 3<<20); z.room("a") != 3<<19 {
			t.Errorf("%d after one of a larger one that was under way", z.room("a"))
		}
		if z.refused("a", 16<<20); z.room("a") != 3<<19 {
			t.Errorf("%d after one of a much larger one", z.room("a"))
		}
		n := z.room("a")
		for z.refused("a", n) {
			n = z.room("a")
		}
		if n < sizeLeast || n >= 2*sizeLeast {
			t.Errorf("the smallest is %d", n)
		}
		time.Sleep(sizeAge)
		if z.room("a") != maxAppendBody || z.least() != maxAppendBody {
			t.Errorf("%d after a while", z.room("a"))
		}
	})
}

// limits answers 413 to a body of more than most bytes, and notes the largest that passed.
func limits(most int64, passed *atomic.Int64) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.ContentLength > most {
				http.Error(w, "too large", http.StatusRequestEntityTooLarge)
				return
			}
			passed.Store(max(passed.Load(), req.ContentLength))
			h.ServeHTTP(w, req)
		})
	}
}

// Behind a limit a lagging member is sent as many entries at a time as pass, and what many callers write goes to the leader in batches
// that pass.
func TestAppendsAndBatchesPassALimit(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	var passed atomic.Int64
	for _, m := range c {
		m.behind(limits(64<<10, &passed))
		must(t, m.s.Ready(ctxFor(t, patience)))
	}
	away := c.follower(t)
	away.isolate()
	var from *testMember // a follower that is not away
	eventually(t, patience, "a leader and a follower", func() error {
		for _, m := range c {
			if st := m.s.Status(); m != away && st.LeaderID != "" && st.LeaderID != st.ID && st.LeaderID != away.s.Status().ID {
				from = m
				return nil
			}
		}
		return errors.New("none yet")
	})
	var all sync.WaitGroup
	for i := range 60 {
		all.Go(func() {
			value := make([]byte, 20_000)
			rand.Read(value)
			if err := from.s.Set(ctxFor(t, patience), fmt.Sprint("k", i), value); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	away.rejoin()
	must(t, away.s.Ready(ctxFor(t, patience)))
	c.awaitEqual(t)
	if n := passed.Load(); n < 20_000 || n > 64<<10 {
		t.Errorf("the largest body that passed has %d bytes", n)
	}
}

// What can't be divided is refused to its caller with the limit that is in the way, and the writes beside it go on.
func TestWriteThatDoesNotPass(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	var passed atomic.Int64
	l, f := c.leader(t), c.follower(t)
	l.behind(limits(64<<10, &passed))
	must(t, f.s.Ready(ctxFor(t, patience)))
	if c.leader(t) != l {
		t.Skip("another one leads now")
	}
	eventually(t, patience, "a verdict that does not fall while a send is out", func() error {
		err := f.s.Set(ctxFor(t, time.Second), "k", make([]byte, 100<<10))
		checkVerdict(t, "a large value", err)
		if !errors.Is(err, ErrNotApplied) || !strings.Contains(err.Error(), "413") {
			return err
		}
		is(t, err, context.DeadlineExceeded, "does not get to the leader", "http://"+l.conf.Addr+"/raft/ limits the size of a request", "client_max_body_size")
		return nil
	})
	must(t, f.s.Set(ctxFor(t, patience), "k", make([]byte, 30<<10)))
}

// Over a slow line a lagging member is sent what the line carries in the time of one append, and a large entry in the time it takes.
func TestAppendsOverASlowLine(t *testing.T) {
	for what, sizes := range map[string][]int{"many entries": slices.Repeat([]int{30_000}, 100), "a large one": {1 << 20}} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				to := doorHost()
				receiver, _ := to.peer(t, false, func(rpc raft.RPC) {
					a := rpc.Command.(*raft.AppendEntriesRequest)
					rpc.Respond(&raft.AppendEntriesResponse{Term: 7, Success: true, LastLog: lastSent(a)}, nil)
				})
				line := &lineRate{rate: 64 << 10, to: receiver}
				sender, _ := senderTo(t, line, 0)
				var entries []*raft.Log
				total := 0
				for i, n := range sizes {
					entries = append(entries, &raft.Log{Index: uint64(60 + i), Term: 7, Data: make([]byte, n)})
					total += n
				}
				began := time.Now()
				for len(entries) > 0 { // as raft does
					args := &raft.AppendEntriesRequest{RPCHeader: from("b"), Term: 7, PrevLogEntry: entries[0].Index - 1, PrevLogTerm: 7, Entries: entries}
					var resp raft.AppendEntriesResponse
					if err := sender.AppendEntries("a", "127.0.0.1:1", args, &resp); err != nil || !resp.Success {
						t.Fatalf("%+v, %v", resp, err)
					}
					entries = entries[len(args.Entries):]
				}
				ideal := time.Duration(total) * time.Second / (64 << 10)
				if took := time.Since(began); took > 2*ideal+time.Minute {
					t.Errorf("it took %v, and the bytes take %v", took, ideal)
				}
				receiver.close()
				sender.p.close()
				synctest.Wait()
			})
		})
	}
}

// A large body may come as slowly as a slow line brings it, and no slower.
func TestTricklingBodyEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, reached := doorHost().peer(t, false, nil)
		req := httptest.NewRequest("POST", "/raft/append", io.LimitReader(trickle{}, 1<<20))
		req.ContentLength = 1 << 20
		setHeaders(req.Header, headerProtocol, "1", headerCluster, "c", headerFrom, "b", headerTo, "a")
		began := time.Now()
		w := httptest.NewRecorder()
		p.ServeHTTP(w, req)
		if took := time.Since(began); w.Code != 400 || took > time.Minute || reached.Load() != 0 {
			t.Errorf("status %d after %v", w.Code, took)
		}
		p.close()
		synctest.Wait()
	})
}
