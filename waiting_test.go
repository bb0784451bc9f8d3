package quorate

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func noVoteOf(s *Service, id string) string {
	for _, m := range s.Status().Members {
		if m.ID == id {
			return m.NoVote
		}
	}
	return "not a member"
}

func says(words string, want ...string) error {
	for _, w := range want {
		if !strings.Contains(words, w) {
			return fmt.Errorf("%q does not say %q", words, w)
		}
	}
	return nil
}

// The leader and the member itself know why it has no vote, and what to call.
func TestWhyNoVote(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	down := c.follower(t)
	m := newMember(t, c.leader(t).conf.Addr)
	granted := newLogged("this member has a vote now")
	m.conf.Logger = slog.New(granted)
	must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	down.stop()
	m.start()
	must(t, m.s.Ready(ctxFor(t, patience))) // which is not about the vote
	id := m.s.Status().ID
	for _, s := range []*Service{c.leader(t).s, m.s} {
		eventually(t, patience, "the reason", func() error {
			return says(noVoteOf(s, id), "nobody gets a vote while a voter does not keep up", fmt.Sprintf("RemoveMember(ctx, %q)", down.conf.Addr))
		})
	}
	if words := noVoteOf(testCluster{c[0], c[1], c[2]}.follower(t).s, id); words != "" {
		t.Errorf("a follower, which does not know, says %q", words)
	}
	down.start()
	c.awaitMember(t, m)
	for _, s := range []*Service{c.leader(t).s, m.s} {
		eventually(t, patience, "no reason", func() error {
			if words := noVoteOf(s, id); words != "" {
				return errors.New(words)
			}
			return nil
		})
	}
	eventually(t, patience, "the log of the new voter", func() error {
		if len(granted.all()) != 1 {
			return fmt.Errorf("%q", granted.all())
		}
		return nil
	})
}

// One that the leader does not reach is told so through its own calls.
func TestWhyNoVoteUnreached(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	m := newMember(t, c[0].conf.Addr)
	m.wrap = func(http.Handler) http.Handler { return http.NotFoundHandler() }
	must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	m.start()
	eventually(t, patience, "the reason", func() error {
		return says(noVoteOf(c[0].s, m.s.Status().ID), "the leader waits for it: nothing answers at http://"+m.conf.Addr+"/raft/")
	})
}

func TestWhenTheLogHearsOfIt(t *testing.T) {
	t.Parallel()
	var l waitingList
	if l.note("a", errors.New("at 1 of 5"), time.Hour) {
		t.Error("at once")
	}
	if !l.note("b", errors.New("at 1 of 5"), 0) || l.note("b", errors.New("at 22 of 5"), 0) {
		t.Error("not once for the same reason")
	}
	if !l.note("b", errors.New("gone"), 0) || l.of("b") != "gone" {
		t.Error("not again for another reason")
	}
	w := l.list["b"]
	w.said = time.Now().Add(-sayAgain)
	l.list["b"] = w
	if !l.note("b", errors.New("gone"), 0) {
		t.Error("not again after a minute")
	}
	if !l.keep(func(who string) bool { return who == "a" }) || l.of("b") != "" || l.of("a") == "" || l.keep(func(string) bool { return true }) {
		t.Errorf("left: %v", l.list)
	}
	for i := range 2 * waitingMost {
		l.note(fmt.Sprint(i), errors.New("x"), 0)
	}
	if len(l.list) != waitingMost || l.of(fmt.Sprint(2*waitingMost-1)) == "" {
		t.Errorf("%d are kept", len(l.list))
	}
}

func TestLeaderSaysWhomItRefuses(t *testing.T) {
	t.Parallel()
	words := newLogged("refused a member whose address is not allowed")
	c := newCluster(t, 1, func(c *Config) { c.Logger = slog.New(words) })
	m := newMember(t, c[0].conf.Addr)
	_, err := m.openWithin(ctxFor(t, 2*time.Second)) // asks several times
	is(t, err, ErrNotAllowed)
	if list := words.all(); len(list) != 1 || says(list[0], "AddAllowedMember", m.conf.Addr) != nil {
		t.Errorf("%q", list)
	}
}

// A member that comes back at an address that nobody has allowed says so, in the log and in Ready's error, until it is allowed.
func TestMovedWithoutPermission(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	l, m := c.leader(t), c.follower(t)
	m.stop()
	before := m.conf.Addr
	m.conf.Addr = freeAddr(t)
	words := newLogged("address")
	m.conf.Logger = slog.New(words)
	m.start()
	call := fmt.Sprintf("AddAllowedMember(ctx, %q)", m.conf.Addr)
	eventually(t, patience, "a warning", func() error { return says(strings.Join(words.all(), "\n"), "is not allowed", call, before) })
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	is(t, m.s.Ready(ctx), context.DeadlineExceeded, call)
	must(t, l.s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	must(t, m.s.Ready(ctxFor(t, patience)))
	eventually(t, patience, "the end of it", func() error { return says(strings.Join(words.all(), "\n"), "is known to the others") })
	if n := strings.Count(strings.Join(words.all(), "\n"), "is not allowed"); n > 2 {
		t.Errorf("said %d times", n)
	}
}

func TestIgnoredJoinIsSaid(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	m.start()
	m.stop()
	words := newLogged("Join is ignored")
	m.conf.Join, m.conf.Logger = freeAddr(t), slog.New(words)
	m.start()
	if list := words.all(); len(list) != 1 || !strings.Contains(list[0], m.conf.Join) {
		t.Errorf("%q", list)
	}
}

// Whatever is wrong with the way to a member, both sides' Ready says what it is and what to do.
func TestWrongMounts(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, func(c *Config) { // where compression is not left out, a member reads what is compressed
		c.Client.Transport.(*http.Transport).DisableCompression = true
	})
	l, m := c.leader(t), c.follower(t)
	only := func(method string) func(http.Handler) http.Handler {
		return func(h http.Handler) http.Handler {
			mux := http.NewServeMux()
			mux.Handle(method+" /raft/", h)
			return mux
		}
	}
	answers := func(status int) func(http.Handler) http.Handler {
		return func(http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", status) })
		}
	}
	for what, mount := range map[string]struct {
		wrap func(http.Handler) http.Handler
		want string
	}{
		"StripPrefix": {func(http.Handler) http.Handler { return http.StripPrefix("/raft", m.s) },
			`the path arrives here as "/status": register the Service for the pattern "/raft/", and not behind http.StripPrefix`},
		"another path": {func(http.Handler) http.Handler {
			mux := http.NewServeMux()
			mux.Handle("/api/raft/", http.StripPrefix("/api", m.s))
			return mux
		}, "nothing answers at {base}/raft/: register the Service there"},
		"POST only": {only("POST"), `{base}/raft/ takes only some methods (POST): register the Service for the pattern "/raft/" without a method`},
		"GET only":  {only("GET"), `{base}/raft/ takes only some methods (GET, HEAD): register the Service for the pattern "/raft/" without a method`},
		"MaxBytesHandler": {func(h http.Handler) http.Handler { return http.MaxBytesHandler(h, 100) },
			"a handler before the Service takes 100 bytes of a request: raise the limit of http.MaxBytesHandler"},
		"gzip": {func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				rec := httptest.NewRecorder()
				h.ServeHTTP(rec, req)
				for name, values := range rec.Header() {
					w.Header()[name] = values
				}
				w.Header().Set("Content-Encoding", "gzip")
				w.Header().Del("Content-Length")
				w.WriteHeader(rec.Code)
				z := gzip.NewWriter(w)
				rec.Body.WriteTo(z)
				z.Close()
			})
		}, "what stands before {base}/raft/ compresses its answers: leave /raft/ out of that"},
		"a login":     {answers(401), "{base}/raft/ asks for a login, and a member has none: leave /raft/ out of it"},
		"a rule":      {answers(403), "what stands before {base}/raft/ lets this member not pass"},
		"a dead end":  {answers(502), "a proxy answers at {base}/raft/, and the member behind it does not"},
		"a limit":     {answers(413), "what stands before {base}/raft/ limits the size of a request: raise that, client_max_body_size in nginx"},
		"another one": {answers(200), "what answers at {base}/raft/ is no member"},
	} {
		m.behind(mount.wrap)
		want := strings.ReplaceAll(mount.want, "{base}", "http://"+m.conf.Addr)
		for i, s := range []*Service{l.s, m.s} {
			if words := s.diagnose(ctxFor(t, patience)); !strings.Contains(words, want) {
				t.Errorf("%s: member %d says %q, want %q", what, i, words, want)
			}
		}
		if what == "StripPrefix" { // and so does Ready on the one that needs the other: this one can still call, and lead
			eventually(t, patience, "Ready's error", func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
				defer cancel()
				return says(fmt.Sprint(l.s.Ready(ctx)), "not ready: ", want)
			})
		}
	}
	m.behind(nil)
	for _, m := range c {
		must(t, m.s.Ready(ctxFor(t, patience)))
		if words := m.s.diagnose(ctxFor(t, patience)); strings.Contains(words, m.conf.Addr+"/raft/") {
			t.Error(words)
		}
	}
}
