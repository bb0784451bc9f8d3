package quorate

import (
	"context"
	"crypto/tls"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Code of the caller's runs in the middle of many calls: a Valuer, the body of a loop, the function of an Update, a Writer, a context,
// a log handler, an HTTP transport. When it panics and the caller recovers, as net/http does for a handler, or when it ends the
// goroutine, as a test's Fatal does, nothing may stay taken.

// valuer is an argument that runs code.
type valuer func() (driver.Value, error)

func (f valuer) Value() (driver.Value, error) { return f() }

// scanner is a destination that runs code.
type scanner func(any) error

func (f scanner) Scan(v any) error { return f(v) }

type writer func([]byte) (int, error)

func (f writer) Write(p []byte) (int, error) { return f(p) }

// survive runs f in a goroutine of its own, that f may end by any means.
func survive(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = recover() }()
		f()
	}()
	<-done
}

func TestCallersCodeLeavesNothingTaken(t *testing.T) {
	t.Parallel()
	for _, m := range []struct {
		name   string
		memory int64
	}{{"rows in memory", 0}, {"rows in the file", -1}} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			s, err := Open(ctxFor(t, 20*time.Second), Config{Dir: filepath.Join(t.TempDir(), "data"), Memory: m.memory, Timeout: 10 * time.Second})
			must(t, err)
			defer s.Close()
			value := make([]byte, 2<<10)
			for i := range 300 { // more than a page of a list
				if i%100 == 0 {
					var ops []Op
					for j := range 100 {
						ops = append(ops, Set(fmt.Sprintf("k%03d", i+j), value))
					}
					_, err := s.Exec(t.Context(), ops...)
					must(t, err)
				}
			}
			for _, end := range []struct {
				how string
				f   func()
			}{{"panic", func() { panic("the caller's") }}, {"end of the goroutine", runtime.Goexit}} {
				for name, calls := range callersCode(t.Context(), s, end.f) {
					for _, call := range calls {
						survive(call)
					}
					if err := allWorks(t, s); err != nil {
						t.Fatalf("%s ended by %s: %v", name, end.how, err)
					}
				}
			}
			began := time.Now()
			must(t, s.Close())
			if d := time.Since(began); d > 4*time.Second {
				t.Errorf("Close took %v", d)
			}
		})
	}
}

// callersCode are calls in which code of the caller's ends.
func callersCode(ctx context.Context, s *Service, end func()) map[string][]func() {
	after := func(n int) func() { // ends at the nth time
		return func() {
			if n--; n <= 0 {
				end()
			}
		}
	}
	calls := map[string][]func(){
		"a Valuer": {func() {
			s.Query(ctx, "SELECT ?", valuer(func() (driver.Value, error) { end(); return nil, nil }))
		}, func() {
			s.Local().Query(ctx, "SELECT :a", sql.Named("a", valuer(func() (driver.Value, error) { end(); return nil, nil })))
		}},
		"the function of an Update": {func() {
			s.Update(ctx, "k000", func(old Entry) ([]byte, error) { end(); return old.Value, nil })
		}},
		"the Writer of a Backup": {func() {
			s.Backup(ctx, writer(func(p []byte) (int, error) { end(); return len(p), nil }))
		}},
	}
	for _, n := range []int{1, 2, 250} {
		calls["the body of a List"] = append(calls["the body of a List"], func() {
			step := after(n)
			for range s.List(ctx, "") {
				step()
			}
		})
		for _, since := range []uint64{0, 1} {
			calls["the body of a Watch"] = append(calls["the body of a Watch"], func() {
				step := after(n)
				for range s.Watch(ctx, "", since) {
					step()
				}
			})
		}
	}
	for _, method := range []string{"Deadline", "Err", "Value", "Done"} {
		for verb, call := range verbs(s) {
			name := fmt.Sprintf("the %s of the context of %s", method, verb)
			for n := 1; n <= 8; n++ {
				calls[name] = append(calls[name], func() { call(&oddContext{Context: ctx, method: method, step: after(n)}) })
			}
		}
	}
	return calls
}

func verbs(s *Service) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Set": func(ctx context.Context) error { return s.Set(ctx, "odd", nil) },
		"Get": func(ctx context.Context) error { _, err := s.Get(ctx, "odd"); return err },
		"Update": func(ctx context.Context) error {
			_, err := s.Update(ctx, "odd", func(Entry) ([]byte, error) { return nil, nil })
			return err
		},
		"List": func(ctx context.Context) error {
			for _, err := range s.List(ctx, "") {
				if err != nil {
					return err
				}
			}
			return nil
		},
		"Query": func(ctx context.Context) error {
			rows, err := s.Query(ctx, "SELECT key FROM kv")
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
			}
			return rows.Err()
		},
		"Backup": func(ctx context.Context) error { _, err := s.Backup(ctx, io.Discard); return err },
		"Ready":  func(ctx context.Context) error { return s.Ready(ctx) },
		"Watch": func(ctx context.Context) error {
			for e, err := range s.Watch(ctx, "k00", 0) {
				if err != nil || e.Kind == EventSynced {
					return err
				}
			}
			return nil
		},
	}
}

// An oddContext runs code when one of its methods is called, but not in goroutines of package context's own: there it would end the
// process, whoever had made them.
type oddContext struct {
	context.Context
	method string
	step   func()
}

func (c *oddContext) called(method string) {
	if method != c.method {
		return
	}
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	for {
		f, more := frames.Next()
		if strings.Contains(f.Function, "quorate.survive") {
			c.step()
			return
		}
		if !more {
			return
		}
	}
}

func (c *oddContext) Deadline() (time.Time, bool) { c.called("Deadline"); return c.Context.Deadline() }
func (c *oddContext) Err() error                  { c.called("Err"); return c.Context.Err() }
func (c *oddContext) Value(key any) any           { c.called("Value"); return c.Context.Value(key) }
func (c *oddContext) Done() <-chan struct{}       { c.called("Done"); return c.Context.Done() }

// allWorks makes every kind of call once.
func allWorks(t *testing.T, s *Service) error {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for verb, call := range verbs(s) {
		if err := call(ctx); err != nil {
			return fmt.Errorf("%s: %w", verb, err)
		}
	}
	if n := len(s.store.openHolds()); n > 0 {
		return fmt.Errorf("the store looks after %d readers", n)
	}
	if n := len(s.store.queries.slots); n > 0 {
		return fmt.Errorf("%d queries run", n)
	}
	if n := len(s.store.lists); n > 0 {
		return fmt.Errorf("%d long lists are open", n)
	}
	if n := s.hub.watchers.Load() + s.hub.held.Load() + int64(len(s.hub.reading)); n > 0 {
		return fmt.Errorf("somebody still watches: %d", n)
	}
	return nil
}

// database/sql itself never ends the Scan of a Scanner that panics, so that Close of these Rows waits for ever. What the Query holds
// comes back all the same, when its time is over.
func TestScannerThatPanics(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1", "b", "2")
	s.store.queries.time = 100 * time.Millisecond
	for range 2 * cap(s.store.queries.slots) {
		survive(func() {
			rows, err := s.Local().Query(t.Context(), "SELECT key FROM kv")
			if err == nil && rows.Next() {
				rows.Scan(scanner(func(any) error { panic("the caller's") }))
			}
		})
	}
	eventually(t, 10*time.Second, "all queries ended", func() error {
		if n := len(s.store.queries.slots); n > 0 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	s.store.queries.time = queryTime
	wantRows(t, s, []string{"a", "b"}, "SELECT key FROM kv")
	began := time.Now()
	must(t, s.Close())
	if d := time.Since(began); d > 4*time.Second {
		t.Errorf("Close took %v", d)
	}
}

// A Valuer may call Query itself: it is asked before a turn is taken.
func TestValuerThatQueries(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1")
	var callers sync.WaitGroup
	for range 2 * cap(s.store.queries.slots) {
		callers.Go(func() {
			asked := false
			got, err := ask(t, s, "SELECT ?", valuer(func() (driver.Value, error) {
				if asked {
					return nil, errors.New("it is asked a second time")
				}
				asked = true
				got, err := ask(t, s, "SELECT value FROM kv")
				return fmt.Sprint(got), err
			}))
			if err != nil || fmt.Sprint(got) != "[[1]]" {
				t.Error(got, err)
			}
		})
	}
	callers.Wait()
}

// A context that lasts says itself why it has ended.
func TestWritesSayWhyTheirContextEnded(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	reason := errors.New("the request was called off")
	ended, end := context.WithCancelCause(t.Context())
	end(reason)
	for verb, call := range verbs(s) {
		if err := call(ended); !errors.Is(err, reason) {
			t.Errorf("%s: %v", verb, err)
		}
	}
	for name, call := range map[string]func() error{
		"Set":              func() error { return s.Set(ended, "k", nil) },
		"Insert":           func() error { return s.Insert(ended, "k", nil) },
		"Delete":           func() error { return s.Delete(ended, "k") },
		"Exec":             func() error { _, err := s.Exec(ended, Set("k", nil)); return err },
		"AddAllowedMember": func() error { return s.AddAllowedMember(ended, "127.0.0.1:9") },
	} {
		if err := call(); !errors.Is(err, reason) || !errors.Is(err, ErrNotApplied) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	inBubble(t, func(t *testing.T, l *wire) {
		for _, sent := range []bool{true, false} {
			ctx, end := context.WithCancelCause(t.Context())
			ch := make(chan error, 1)
			go func() { _, err := l.submit(ctx, transaction{{kind: opDelete, key: "k"}}); ch <- err }()
			send := l.next()
			if !sent {
				send.refuse()
				synctest.Wait()
			}
			end(reason)
			if err := <-ch; !errors.Is(err, reason) || errors.Is(err, ErrUncertain) != sent {
				t.Errorf("sent %t: %v", sent, err)
			}
			if sent {
				l.fence(1).settle()
				synctest.Wait()
			}
		}
	})
}

// hidden is a context that is to outlive its parent, as many programs have made one: the deadline shows through.
type hidden struct{ context.Context }

func (hidden) Done() <-chan struct{} { return nil }
func (hidden) Err() error            { return nil }

// Nothing blocks for ever, whatever the context says.
func TestContextThatNeverEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		c.change = func(conf *Config) { conf.Timeout, conf.segment = 5*time.Second, 16<<10 }
		defer c.end()
		for _, line := range []string{"start a", "join b via a", "await voters 2", "kill b"} {
			c.obey(line)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		began := time.Now()
		err := c.member("a").s.Set(hidden{ctx}, "k", nil)
		if d := time.Since(began); err == nil || d > 6*time.Second {
			t.Errorf("%v after %v", err, d)
		}
		_, err = c.member("a").s.Get(hidden{ctx}, "k")
		if d := time.Since(began); err == nil || d > 12*time.Second {
			t.Errorf("%v after %v", err, d)
		}
	})
}

// An oddLog panics, waits, ends the goroutine and calls the Service, at lines from everywhere.
type oddLog struct {
	s     atomic.Pointer[Service]
	lines *atomic.Int64
}

func (h *oddLog) Enabled(context.Context, slog.Level) bool { return true }
func (h *oddLog) WithGroup(string) slog.Handler            { panic("no groups here") }
func (h *oddLog) WithAttrs([]slog.Attr) slog.Handler       { return h }

func (h *oddLog) Handle(context.Context, slog.Record) error {
	if s := h.s.Load(); s != nil {
		s.Status()
		s.Err()
		s.Local().Get("k")
		s.Local().Freshness()
	}
	switch h.lines.Add(1) % 4 {
	case 0:
		panic("a line that it does not like")
	case 1:
		runtime.Goexit()
	case 2:
		time.Sleep(10 * time.Millisecond) // longer than a heartbeat's way
	}
	return nil
}

// An oddTransport panics now and then, and so do its answers.
type oddTransport struct {
	http.RoundTripper
	calls *atomic.Int64
}

type oddBody struct{ io.ReadCloser }

func (oddBody) Read([]byte) (int, error) { panic("no answer today") }

func (o oddTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	n := o.calls.Add(1)
	if n%11 == 10 {
		panic("no request today")
	}
	resp, err := o.RoundTripper.RoundTrip(req)
	if err == nil && n%13 == 12 {
		resp.Body = oddBody{resp.Body}
	}
	return resp, err
}

// oddBodies is a handler before ours: now and then the body that it hands on panics.
func oddBodies(next http.Handler) http.Handler {
	var calls atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		defer func() {
			if recover() != nil {
				w.WriteHeader(http.StatusInternalServerError)
			}
		}()
		if calls.Add(1)%17 == 16 {
			there := *req
			there.Body = oddBody{req.Body}
			req = &there
		}
		next.ServeHTTP(w, req)
	})
}

// A cluster whose log handlers, HTTP transports and middlewares misbehave forms, writes, reads, changes its leader and closes.
func TestClusterAmongOddCode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		var lines, calls atomic.Int64
		logs := make(map[string]*oddLog)
		c.change = func(conf *Config) {
			h := &oddLog{lines: &lines}
			logs[conf.Addr] = h
			conf.Logger, conf.segment = slog.New(h), 16<<10
			client := *conf.Client
			client.Transport = oddTransport{client.Transport, &calls}
			conf.Client = &client
		}
		c.front = oddBodies
		defer c.end()
		obey := func(line string) {
			c.obey(line)
			for _, m := range c.members {
				logs[m.conf.Addr].s.Store(m.s)
			}
		}
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3"} {
			obey(line)
		}
		for i := range 30 {
			m := c.members[i%3]
			must(t, m.s.Set(t.Context(), "k", fmt.Append(nil, i)))
			if got, err := c.members[(i+1)%3].s.Get(t.Context(), "k"); err != nil || string(got) != fmt.Sprint(i) {
				t.Fatalf("%q, %v, want %d", got, err, i)
			}
		}
		obey("cast leader L followers F G")
		obey("kill L")
		obey("set F k later")
		obey("restart L")
		obey("await equal")
		if lines.Load() < 50 || calls.Load() < 200 {
			t.Errorf("%d lines and %d calls prove little", lines.Load(), calls.Load())
		}
	})
}

// What a transport asks its maker for, this member asks in goroutines of its own.
func TestFunctionsOfATransportThatPanic(t *testing.T) {
	t.Parallel()
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.Proxy = func(*http.Request) (*url.URL, error) { panic("no proxy today") }
	base.TLSClientConfig = &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		panic("no certificate today")
	}}
	req, err := http.NewRequest(http.MethodPost, "http://127.0.0.1:1/raft/term", strings.NewReader("x"))
	must(t, err)
	if newLinks(base).takes(req) {
		t.Error("a kept connection, though nobody knows whether there is a proxy")
	}
	p := callerOf(t, &http.Client{Transport: base}, false)
	if p.mayChoose(req.URL) {
		t.Error("an address of our choice, though nobody knows whether there is a proxy")
	}
	if _, err := p.status(t.Context(), "http://127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "panicked") {
		t.Error(err)
	}
	_, err = Open(t.Context(), Config{Dir: t.TempDir(), Addr: "127.0.0.1:1", TLS: true, Client: &http.Client{Transport: base}})
	is(t, err, ErrInvalid)
}

// Raft reads a snapshot in its own goroutine, out of a body that a handler before ours may have made.
func TestSnapshotBodyThatPanics(t *testing.T) {
	x := &exchange{rc: http.NewResponseController(httptest.NewRecorder())}
	r := &receivedReader{x: x, r: oddBody{}, until: time.Now().Add(time.Minute)}
	if _, err := r.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "panicked") {
		t.Error(err)
	}
}
