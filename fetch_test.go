package quorate

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A cutAnswer is cut off after so many bytes, which get through.
type cutAnswer struct {
	http.ResponseWriter
	left int
}

func (w *cutAnswer) Write(b []byte) (int, error) {
	if len(b) <= w.left {
		w.left -= len(b)
		return w.ResponseWriter.Write(b)
	}
	w.ResponseWriter.Write(b[:w.left])
	http.NewResponseController(w.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

func (w *cutAnswer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// A member fetches the state of its leader over a line that breaks again and again, while there are writes, and takes nothing of it twice.
func TestStateOverALineThatBreaks(t *testing.T) {
	t.Parallel()
	c := full(t, 3<<20)
	m := newMember(t, c[0].conf.Addr)
	c.joins(t, m)
	c = append(c, m)
	c.awaitVoters(t, 2)
	l, f := c.leader(t), c.follower(t)
	var mu sync.Mutex // guards queries
	var queries []string
	l.behind(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path != "/raft/state" {
				h.ServeHTTP(w, req)
				return
			}
			mu.Lock()
			queries = append(queries, req.URL.RawQuery)
			n := len(queries)
			mu.Unlock()
			if err := l.s.Set(req.Context(), "k1", fmt.Append(nil, n)); err != nil {
				t.Error(err)
			}
			if n <= 4 {
				w = &cutAnswer{w, 300 << 10}
			}
			h.ServeHTTP(w, req)
		})
	})
	must(t, f.s.Ready(ctxFor(t, patience)))
	term := f.s.Status().Term
	f.s.distrust(corrupt("a row"))
	eventually(t, patience, "rebuilt", func() error {
		mu.Lock()
		defer mu.Unlock()
		if len(queries) == 0 {
			return errors.New("nothing was fetched")
		}
		return f.s.Err()
	})
	must(t, f.s.Ready(ctxFor(t, patience)))
	c.awaitEqual(t)
	if f.s.Status().Term != term { // then it has begun anew
		t.Skip("another leader was elected meanwhile")
	}
	mu.Lock()
	defer mu.Unlock()
	id, _, err := parsePieceQuery(queries[0])
	must(t, err)
	at := int64(-1)
	for i, q := range queries {
		same, next, err := parsePieceQuery(q)
		if must(t, err); same != id || next <= at {
			t.Errorf("the fetch %q goes on with %q", queries[:i], q)
		}
		at = next
	}
	if len(queries) < 6 {
		t.Errorf("%q", queries)
	}
}

// A slowAnswers lets so many bytes of answers pass in a second, and breaks every connection after a while.
type slowAnswers struct {
	rate  int64
	every time.Duration
	to    *peer
	next  time.Time // when the line breaks
	sent  int64
	asked int
}

func (l *slowAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	l.asked++
	w := httptest.NewRecorder()
	l.to.ServeHTTP(w, req)
	resp := w.Result()
	resp.Body = &pacedAnswer{l, resp.Body, req.Context()}
	return resp, nil
}

type pacedAnswer struct {
	l *slowAnswers
	io.ReadCloser
	ctx context.Context
}

func (b *pacedAnswer) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), 16<<10)])
	select {
	case <-time.After(time.Duration(n) * time.Second / time.Duration(b.l.rate)):
	case <-b.ctx.Done():
		return 0, b.ctx.Err()
	}
	if now := time.Now(); b.l.every > 0 && now.After(b.l.next) {
		b.l.next = now.Add(b.l.every)
		return 0, errors.New("the line broke")
	}
	b.l.sent += int64(n)
	return n, err
}

// fetching is a source of a state, and a member that fetches it over a line.
func fetching(t *testing.T, line *slowAnswers, state []byte) (source *door, reader *peer, closed *atomic.Int32) {
	t.Helper()
	closed = new(atomic.Int32)
	source = doorHost()
	source.state = func(context.Context) (stateCopy, error) {
		return stateCopy{countClose{bytes.NewReader(state), sync.OnceFunc(func() { closed.Add(1) })}, int64(len(state))}, nil
	}
	source.lead.Store(7)
	source.server = func(id string) (string, bool, bool) { return "127.0.0.1:2", true, true }
	line.to, _ = source.peer(t, false, nil)
	b := doorHost()
	b.self = func() (string, string, string) { return "b", "c", "127.0.0.1:2" }
	b.server = func(id string) (string, bool, bool) { return "127.0.0.1:1", true, true }
	reader = newPeer(b.peerHost, &http.Client{Transport: line}, false, slog.New(slog.DiscardHandler))
	t.Cleanup(reader.close)
	return source, reader, closed
}

type countClose struct {
	io.Reader
	once func()
}

func (c countClose) Close() error { c.once(); return nil }

// Over a slow line that breaks every 30 s a state arrives in the time that its bytes take.
func TestStateOverASlowLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := make([]byte, 16<<20)
		rand.Read(state)
		line := &slowAnswers{rate: 64 << 10, every: 30 * time.Second, next: time.Now().Add(10 * time.Second)}
		_, reader, closed := fetching(t, line, state)
		ideal, began := time.Duration(len(state)/(64<<10))*time.Second, time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 2*ideal)
		defer cancel()
		body, err := reader.state(ctx, "a", "127.0.0.1:1")
		must(t, err)
		if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, state) {
			t.Errorf("%d bytes, want %d; %v", len(got), len(state), err)
		}
		if took := time.Since(began); took > ideal+ideal/4 || line.sent != int64(len(state)) {
			t.Errorf("it took %v and %d bytes, want about %v and %d", took, line.sent, ideal, len(state))
		}
		if closed.Load() == 0 {
			t.Error("the copy is open after its last byte was given")
		}
		line.to.close()
		reader.close()
		synctest.Wait()
	})
}

// What ends a fetch: a source that was started again, one that refuses, a line that is down for long, the reader's own end.
func TestFetchEnds(t *testing.T) {
	state := make([]byte, 3<<20)
	for what, c := range map[string]struct {
		spoil func(source *door, reader *peer, line *slowAnswers, cancel context.CancelCauseFunc)
		takes time.Duration
		words string
	}{
		"the source is started again": {func(source *door, _ *peer, line *slowAnswers, _ context.CancelCauseFunc) {
			line.to.close()
			line.to = newPeer(source.peerHost, nil, false, slog.New(slog.DiscardHandler))
			line.to.transport()
		}, time.Minute, "no copy of this state is here"},
		"the line is down": {func(_ *door, _ *peer, line *slowAnswers, _ context.CancelCauseFunc) {
			line.rate, line.every = 1<<40, time.Nanosecond
		}, 2 * time.Minute, "the line broke"},
		"its caller has had enough": {func(_ *door, _ *peer, _ *slowAnswers, cancel context.CancelCauseFunc) {
			cancel(errors.New("enough"))
		}, time.Second, "enough"},
		"its member is closed": {func(_ *door, reader *peer, _ *slowAnswers, _ context.CancelCauseFunc) { reader.close() }, time.Second, ErrClosed.Error()},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				line := &slowAnswers{rate: 1 << 20}
				source, reader, closed := fetching(t, line, state)
				ctx, cancel := context.WithCancelCause(t.Context())
				body, err := reader.state(ctx, "a", "127.0.0.1:1")
				must(t, err)
				_, err = io.ReadFull(body, make([]byte, 3<<19))
				must(t, err)
				first := line.to
				c.spoil(source, reader, line, cancel)
				began := time.Now()
				_, err = io.ReadAll(body)
				if took := time.Since(began); took > c.takes || !strings.Contains(fmt.Sprint(err), c.words) {
					t.Errorf("after %v: %v", took, err)
				}
				body.Close()
				time.Sleep(fetchIdle + time.Second)
				first.fetches.mu.Lock()
				kept := len(first.fetches.list)
				first.fetches.mu.Unlock()
				if closed.Load() == 0 || kept > 0 {
					t.Errorf("the copy stays: closed %d times, %d are kept", closed.Load(), kept)
				}
				first.close()
				line.to.close()
				reader.close()
				cancel(nil)
				synctest.Wait()
			})
		})
	}
}

// What the leader answers, in whatever order it is asked.
func TestDoorState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := make([]byte, fetchPiece+1000)
		rand.Read(state)
		line := &slowAnswers{rate: 1 << 30}
		source, reader, closed := fetching(t, line, state)
		p := line.to
		const x, y, z = "0123456789abcdef0123456789abcdef", "1123456789abcdef0123456789abcdef", "2123456789abcdef0123456789abcdef"
		for i, c := range []struct {
			from, query string
			status      int
			first, last int // of the bytes
		}{
			{"b", "", 200, 0, len(state)},
			{"b", "piece=", 400, 0, 0},
			{"b", "piece=" + x, 400, 0, 0},
			{"b", "piece=x&at=0", 400, 0, 0},
			{"b", pieceQuery(x, -1), 400, 0, 0},
			{"b", "other=1", 400, 0, 0},
			{"b", pieceQuery(x, 1), 409, 0, 0}, // nothing was begun
			{"b", pieceQuery(x, 0), 200, 0, fetchPiece},
			{"b", pieceQuery(x, 0), 200, 0, fetchPiece}, // its answer was lost
			{"b", pieceQuery(x, 10), 200, 10, fetchPiece},
			{"d", pieceQuery(x, 10), 409, 0, 0}, // another member's
			{"d", pieceQuery(y, 0), 200, 0, fetchPiece},
			{"e", pieceQuery(z, 0), 503, 0, 0},
			{"b", pieceQuery(x, fetchPiece+1), 409, 0, 0}, // it has not had so much
			{"b", pieceQuery(x, fetchPiece), 200, fetchPiece, len(state)},
			{"b", pieceQuery(x, 10), 409, 0, 0}, // it has said that it has that
			{"b", pieceQuery(x, fetchPiece+1), 200, fetchPiece + 1, len(state)},
			{"b", pieceQuery(x, int64(len(state))), 200, 0, 0},
			{"b", pieceQuery(x, int64(len(state))+1), 409, 0, 0},
			{"b", pieceQuery(z, 0), 200, 0, fetchPiece}, // it begins anew
			{"b", pieceQuery(x, fetchPiece), 409, 0, 0},
		} {
			req := httptest.NewRequest("GET", "/raft/state?"+c.query, nil)
			req.URL.RawQuery = c.query
			setHeaders(req.Header, headerProtocol, "1", headerCluster, "c", headerFrom, c.from, headerTo, "a")
			w := httptest.NewRecorder()
			p.ServeHTTP(w, req)
			if w.Code != c.status || w.Code == 200 && !bytes.Equal(w.Body.Bytes(), state[c.first:c.last]) {
				t.Errorf("%d: %s asks for %q: %d, %d bytes", i, c.from, c.query, w.Code, w.Body.Len())
			}
			if size := w.Header().Get(headerSize); c.status == 200 && (size == fmt.Sprint(len(state))) != (c.query != "") {
				t.Errorf("%d: a size of %q", i, size)
			}
		}
		source.lead.Store(0)
		if _, err := reader.state(t.Context(), "a", "127.0.0.1:1"); !strings.Contains(fmt.Sprint(err), "127.0.0.1:9") {
			t.Errorf("a follower gives the state: %v", err)
		}
		if closed.Load() != 2 { // the whole one, and that of b's first fetch
			t.Errorf("%d copies are closed", closed.Load())
		}
		p.close()
		synctest.Wait()
		if closed.Load() != 4 {
			t.Errorf("%d copies are closed at the end", closed.Load())
		}
		reader.close()
		synctest.Wait()
	})
}

// A release that gives the whole in one answer does so, and what breaks there is an error.
func TestStateInOneAnswer(t *testing.T) {
	state := make([]byte, 3<<20)
	rand.Read(state)
	for _, breaks := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			line := &slowAnswers{rate: 1 << 20}
			_, reader, _ := fetching(t, line, state)
			reader.client.Transport = withoutQuery{line}
			if breaks {
				line.every, line.next = time.Minute, time.Now().Add(time.Second)
			}
			body, err := reader.state(t.Context(), "a", "127.0.0.1:1")
			must(t, err)
			got, err := io.ReadAll(body)
			if (err != nil) != breaks || !breaks && !bytes.Equal(got, state) || line.asked != 1 {
				t.Errorf("breaks %v: %d bytes, %v, asked %d times", breaks, len(got), err, line.asked)
			}
			body.Close()
			line.to.close()
			reader.close()
			synctest.Wait()
		})
	}
}

type withoutQuery struct{ http.RoundTripper }

func (w withoutQuery) RoundTrip(req *http.Request) (*http.Response, error) {
	req.URL.RawQuery = ""
	return w.RoundTripper.RoundTrip(req)
}
