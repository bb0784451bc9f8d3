package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"
)

// How a cluster comes to a newer format, played by members of this version that say that they are older.

// older makes the script's next members ones that read the first format only, as far as they say.
func older(c *Config) { c.format = firstFormat }

// wantFormat waits until all running members are at a format and hold one state.
func (c *script) wantFormat(want uint64) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), scriptLimit)
	defer cancel()
	if got := c.poll(ctx, func() error {
		for _, m := range c.running(nil) {
			if at := m.s.store.meta().format; at != want {
				return fmt.Errorf("%s is at format %d, want %d", m.name, at, want)
			}
		}
		return nil
	}); got != "ok" {
		c.t.Fatal(got)
	}
	c.obey("await equal")
}

// renew stops a member and starts it as one of this version.
func (c *script) renew(m *scriptMember) {
	c.t.Helper()
	c.obey("stop " + m.name)
	m.conf.format = 0
	c.obey("restart " + m.name)
	c.obey("await ready " + m.name)
}

// logged counts the records of a Service's log that hold some words.
type logged struct {
	slog.Handler
	words string
	mu    sync.Mutex // guards texts
	texts []string
}

func newLogged(words string) *logged {
	return &logged{Handler: slog.NewTextHandler(io.Discard, nil), words: words}
}

func (l *logged) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *logged) WithGroup(string) slog.Handler      { return l }

func (l *logged) Handle(_ context.Context, r slog.Record) error {
	if !strings.Contains(r.Message, l.words) {
		return nil
	}
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.texts = append(l.texts, text)
	return nil
}

// with are the records that hold these words too.
func (l *logged) with(words string) []string {
	return slices.DeleteFunc(l.all(), func(text string) bool { return !strings.Contains(text, words) })
}

func (l *logged) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.texts...)
}

// The format is raised once every member reads the next one, and not while one does not, is down, or has no vote. Until then
// every member writes, whichever leads.
func TestFormatWaitsForAllMembers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.change = older
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "cast leader L followers F G", "set L k 1"} {
			c.obey(line)
		}
		c.wantFormat(firstFormat)
		last, f, g := c.cast["L"], c.cast["F"], c.cast["G"]
		log := newLogged("keeps the cluster")
		f.conf.Logger, g.conf.Logger = slog.New(log), slog.New(log)
		c.renew(f)
		c.renew(g)
		c.obey("stop " + last.name)
		c.obey("elect L among " + f.name + " " + g.name) // one that reads the next format
		for _, when := range []string{"down", "up and older"} {
			for i := range 5 {
				c.obey("advance 1s")
				c.obey(fmt.Sprintf("set %s k %d", []string{"F", "G"}[i%2], i))
			}
			if got := c.cast["L"].s.store.meta().format; got != firstFormat {
				t.Errorf("format %d with one member %s", got, when)
			}
			if st := c.cast["L"].s.Status(); st.Format != firstFormat || !strings.HasPrefix(st.FormatHeldBy, last.conf.Addr) {
				t.Errorf("format %d, held by %q with %s %s", st.Format, st.FormatHeldBy, last.conf.Addr, when)
			}
			if when == "down" {
				c.obey("restart " + last.name)
				c.obey("await ready " + last.name)
			}
		}
		// Two of this version may have led for a while each; each of them says it once, however often it looks.
		texts := log.all()
		if len(texts) == 0 || len(texts) > 2 || !strings.Contains(texts[0], last.conf.Addr) {
			t.Errorf("the log says %q, and should name %s once a term", texts, last.conf.Addr)
		}
		c.wantFormat(firstFormat)
		c.renew(last)
		c.wantFormat(historyFormat)
		for _, m := range c.members {
			if st := m.s.Status(); st.Format != historyFormat || st.FormatHeldBy != "" {
				t.Errorf("%s is at format %d, held by %q", m.name, st.Format, st.FormatHeldBy)
			}
			if keep := m.s.store.meta().keep; keep != defaultHistory {
				t.Errorf("%s keeps %d changes", m.name, keep)
			}
		}
		c.obey("set F k last")
		c.obey("await equal")
	})
}

// outsider is the configuration of a member d that may join and is served by nobody, so that it gets no vote.
func (c *script) outsider(via *scriptMember) Config {
	c.t.Helper()
	conf := Config{Dir: c.t.TempDir(), Addr: "d.test:7001", Join: via.conf.Addr, Client: c.net.client("d.test:7001")}
	must(c.t, via.s.AddAllowedMember(c.t.Context(), conf.Addr))
	c.net.serve(conf.Addr, http.NotFoundHandler())
	return conf
}

// A member without a vote counts, for it applies what is in the log as the others do; and one that was removed does not.
func TestFormatWaitsForNonVoter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.change = older
		c.obey("start a")
		a := c.member("a")
		conf := c.outsider(a)
		older(&conf)
		d, err := Open(t.Context(), conf)
		must(t, err)
		must(t, d.Close())
		c.renew(a)
		c.obey("set a k 1")
		c.obey("advance 5s")
		st := a.s.Status()
		if len(st.Members) != 2 || countVoters(st) != 1 {
			t.Fatalf("%+v", st.Members)
		}
		if got := a.s.store.meta().format; got != firstFormat {
			t.Errorf("format %d beside a non-voter that reads less", got)
		}
		must(t, a.s.RemoveMember(t.Context(), conf.Addr))
		c.wantFormat(historyFormat)
	})
}

// While the members change, nobody raises the format; and while the format is being raised, nobody older is admitted.
func TestRaiseAndMembersExcludeEachOther(t *testing.T) {
	t.Parallel()
	twoOfThree := func(t *testing.T, f func(t *testing.T, c *script, l, last *scriptMember)) {
		synctest.Test(t, func(t *testing.T) {
			c := newScript(t)
			defer c.end()
			c.change = older
			for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "cast leader L followers F G"} {
				c.obey(line)
			}
			last := c.cast["L"]
			c.renew(c.cast["F"])
			c.renew(c.cast["G"])
			c.obey("stop " + last.name)
			c.obey("elect L among F G")
			last.conf.format = 0
			f(t, c, c.cast["L"], last)
		})
	}
	t.Run("a change of the members is under way", func(t *testing.T) {
		twoOfThree(t, func(t *testing.T, c *script, l, last *scriptMember) {
			end, err := l.s.changeMembers(t.Context())
			must(t, err)
			c.obey("restart " + last.name)
			c.obey("await ready " + last.name)
			c.obey("advance 4s")
			if got := l.s.store.meta().format; got != firstFormat {
				t.Errorf("format %d while the members change", got)
			}
			end()
			c.wantFormat(historyFormat)
		})
	})
	t.Run("the raise is not yet committed", func(t *testing.T) {
		twoOfThree(t, func(t *testing.T, c *script, l, last *scriptMember) {
			conf := c.outsider(l)
			older(&conf)
			c.obey("await equal")
			release := make(chan struct{})
			letGo := sync.OnceFunc(func() { close(release) })
			defer letGo()
			hold := func(m *scriptMember) { c.net.serve(m.conf.Addr, withoutEntries(m.s, release)) }
			for _, m := range c.running(nil) {
				if m != l {
					hold(m)
				}
			}
			c.net.serve(last.conf.Addr, http.NotFoundHandler())
			s, err := Open(t.Context(), last.conf)
			must(t, err)
			last.s = s
			hold(last)
			ctx, cancel := context.WithTimeout(t.Context(), scriptLimit)
			defer cancel()
			if got := c.poll(ctx, func() error {
				if raises(t, l.s) == 0 {
					return errors.New("no raise in the log")
				}
				return nil
			}); got != "ok" {
				t.Fatal(got)
			}
			joined := make(chan error, 1)
			go func() {
				s, err := Open(ctx, conf)
				if err == nil {
					s.Close()
				}
				joined <- err
			}()
			c.obey("advance 3s")
			select {
			case err := <-joined:
				t.Fatalf("joining ended while the raise was not committed: %v", err)
			default:
			}
			letGo()
			if err := <-joined; !errors.Is(err, ErrFormat) {
				t.Errorf("the older member's error is %v", err)
			}
			c.wantFormat(historyFormat)
			if n := len(l.s.Status().Members); n != 3 {
				t.Errorf("%d members", n)
			}
		})
	})
}

// withoutEntries answers everything but appends with entries, which wait.
func withoutEntries(s *Service, release chan struct{}) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/raft/append" {
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			if a, err := decodeAppend(body); err == nil && len(a.Entries) > 0 {
				select {
				case <-release:
				case <-req.Context().Done():
					return
				}
			}
			req.Body = io.NopCloser(bytes.NewReader(body))
		}
		s.ServeHTTP(w, req)
	})
}

func TestOlderMemberCannotJoin(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		c.wantFormat(entryFormat)
		conf := c.outsider(f)
		older(&conf)
		s, err := Open(t.Context(), conf)
		if err == nil {
			s.Close()
		}
		is(t, err, ErrFormat, "format 2", "reads up to 1", "upgrade it")
		if n := len(l.s.Status().Members); n != 3 {
			t.Errorf("%d members", n)
		}
		conf.format = 0 // with the upgrade it joins
		s, err = Open(t.Context(), conf)
		must(t, err)
		must(t, s.Close())
	})
}

// A batch of a newer format is refused by name. That settles nothing: its sender may send it to the next leader.
func TestProposeOfNewerFormat(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		before := l.s.Status().LastIndex
		data := encodeBatch(entryFormat+1, f.s.batch.session, 1<<20, 0, [][]byte{appendTransaction(nil, transaction{{kind: opSet, key: "k"}})})
		_, sent, err := f.s.propose(t.Context(), data)
		var r *refusal
		if !errors.As(err, &r) || r.Code != codeProtocol || !strings.Contains(r.Message, fmt.Sprintf("reads up to %d", entryFormat)) || sent {
			t.Errorf("sent %v, error %v", sent, err)
		}
		if now := l.s.Status().LastIndex; now != before {
			t.Errorf("the log went from %d to %d", before, now)
		}
	})
}

// entries reads a member's log.
func entries(t *testing.T, s *Service) []entry {
	t.Helper()
	var list []entry
	first, last := s.wal.bounds()
	for i := first; i <= last; i++ {
		var l raft.Log
		must(t, s.wal.GetLog(i, &l))
		if l.Type == raft.LogCommand {
			e, err := decodeEntry(l.Data)
			must(t, err)
			list = append(list, e)
		}
	}
	return list
}

func raises(t *testing.T, s *Service) int {
	t.Helper()
	n := 0
	for _, e := range entries(t, s) {
		if e.kind == entryRaise {
			n++
		}
	}
	return n
}

// A new cluster is at the newest format before its first write, and before it has a session.
func TestNewClusterIsAtNewestFormat(t *testing.T) {
	t.Parallel()
	s, err := Open(t.Context(), Config{Dir: t.TempDir(), History: 7})
	must(t, err)
	defer s.Close()
	must(t, s.Set(ctxFor(t, patience), "k", nil))
	raised := false
	for _, e := range entries(t, s) {
		switch e.kind {
		case entryRaise:
			raised = true
			if e.raise != entryFormat || e.history != 7 {
				t.Errorf("raised to format %d with %d changes", e.raise, e.history)
			}
		case entryOpen, entryBatch:
			if !raised || e.format != entryFormat {
				t.Errorf("an entry of kind %d is in format %d; the raise came before it: %v", e.kind, e.format, raised)
			}
		}
	}
	if m := s.store.meta(); m.format != entryFormat || m.keep != 7 || m.base != 0 {
		t.Errorf("format %d, %d changes from %d", m.format, m.keep, m.base)
	}
}

// While a cluster has one member, that one's Config says how long the history is; with more it stays.
func TestHistoryOfSoleMember(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		reopen := func(m *scriptMember, history int) {
			t.Helper()
			c.obey("stop " + m.name)
			m.conf.History = history
			c.obey("restart " + m.name)
			c.obey("await ready " + m.name)
		}
		want := func(m *scriptMember, history uint64) {
			t.Helper()
			c.obey("advance 3s")
			if keep := m.s.store.meta().keep; keep != history {
				t.Errorf("%s keeps %d changes, want %d", m.name, keep, history)
			}
		}
		c.change = func(c *Config) { c.History = 5 }
		c.obey("start a")
		c.obey("await ready a")
		a := c.member("a")
		want(a, 5)
		for i := range 9 {
			c.obey(fmt.Sprintf("set a k %d", i))
		}
		reopen(a, 3)
		want(a, 3)
		c.obey("set a k 9")
		if m := a.s.store.meta(); m.oldest() != 7 {
			t.Errorf("with 3 of 10 changes the oldest to resume from is %d", m.oldest())
		}
		reopen(a, 0)
		want(a, defaultHistory)
		c.change = func(c *Config) { c.History = 4 }
		c.obey("join b via a")
		c.obey("await voters 2")
		reopen(a, 6)
		want(a, defaultHistory)
		want(c.member("b"), defaultHistory)
		c.obey("await equal")
		if n := raises(t, a.s); n != 3 {
			t.Errorf("%d entries changed the length, want one for each of the three that were asked for", n)
		}
	})
}
