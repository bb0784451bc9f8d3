package quorate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

const patience = 30 * time.Second

// voterCount is how many voters this member knows, and members in all.
func (m *testMember) counts() (voters, members int) {
	for _, v := range m.s.Status().Members {
		if members++; v.Voter {
			voters++
		}
	}
	return voters, members
}

// leave takes a member that only one subtest wanted out of the cluster.
func (c testCluster) leave(t testing.TB, m *testMember) {
	t.Helper()
	must(t, c[0].s.RemoveMember(ctxFor(t, patience), m.conf.Addr))
	m.stop()
}

// is says whether err is all of these, with all of these words.
func is(t testing.TB, err error, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

// inTime gives f more time until its error says all of the words: what f finds out takes a loaded machine longer.
func inTime(t testing.TB, f func(limit time.Duration) error, want error, words ...string) {
	t.Helper()
	limit := 150 * time.Millisecond
	for ; limit < patience; limit *= 2 {
		err := f(limit)
		if err == nil || errors.Is(err, want) && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(err.Error(), w) }) {
			break
		}
	}
	is(t, f(min(limit, patience)), want, words...)
}

// opening is for inTime: Open with so much time for joining.
func (m *testMember) opening(limit time.Duration) error {
	m.conf.Timeout = limit
	_, err := m.open()
	return err
}

// ready is for inTime.
func (m *testMember) ready(limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return m.s.Ready(ctx)
}

// behind puts something before a running member, or nothing.
func (m *testMember) behind(wrap func(http.Handler) http.Handler) {
	m.cut()
	m.wrap = wrap
	m.heal()
}

// loses serves requests of this path and cuts the connection in place of the answer.
func loses(path string) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == path {
				h.ServeHTTP(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			}
			h.ServeHTTP(w, r)
		})
	}
}

// rejectsAppends answers, while it is due, that the entry before is not in the log.
func rejectsAppends(due func() bool) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/raft/append" || !due() {
				h.ServeHTTP(w, r)
				return
			}
			body, err := io.ReadAll(r.Body)
			a, decodeErr := decodeAppend(body)
			if err != nil || decodeErr != nil {
				panic(http.ErrAbortHandler)
			}
			if isHeartbeat(a) {
				r.Body = io.NopCloser(bytes.NewReader(body))
				h.ServeHTTP(w, r)
				return
			}
			setHeaders(w.Header(), headerProtocol, strconv.Itoa(protocolVersion), headerCluster, header(r.Header, headerCluster),
				headerFrom, header(r.Header, headerTo))
			answer := raft.AppendEntriesResponse{Term: a.Term, LastLog: max(a.PrevLogEntry, 1) - 1, NoRetryBackoff: true}
			w.Write(encodeAppendAnswer(&answer))
		})
	}
}

func storedID(t testing.TB, m *testMember) identity {
	t.Helper()
	ident, found, err := readIdentity(m.conf.Dir)
	if err != nil || !found {
		t.Fatalf("id of %s: %v, %v", m.conf.Dir, found, err)
	}
	return ident
}

// balancer is a reverse proxy that spreads requests over these base URLs, as HTTP/1.1.
func balancer(t testing.TB, client *http.Client, bases ...string) *httptest.Server {
	t.Helper()
	var next atomic.Uint64
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			u, err := url.Parse(bases[next.Add(1)%uint64(len(bases))])
			if err != nil {
				panic(err)
			}
			r.SetURL(u)
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	if client != nil {
		proxy.Transport = client.Transport
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(server.Close)
	return server
}

func (c testCluster) awaitMember(t testing.TB, m *testMember) {
	t.Helper()
	must(t, m.s.Ready(ctxFor(t, patience)))
	eventually(t, patience, "promotion of "+m.conf.Addr, func() error {
		for _, v := range m.s.Status().Members {
			if v.ID == m.s.Status().ID && v.Voter {
				return nil
			}
		}
		return fmt.Errorf("%+v", m.s.Status())
	})
}

func TestJoin(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	ctx := ctxFor(t, 2*time.Minute)
	must(t, c[0].s.Set(ctx, "k", []byte("v")))
	joins := func(t *testing.T, m *testMember) {
		t.Helper()
		m.start()
		c.awaitMember(t, m)
		if v, err := m.s.Get(ctx, "k"); err != nil || string(v) != "v" {
			t.Errorf("read after joining: %q, %v", v, err)
		}
		if got, want := m.s.Status().Cluster, c[0].s.Status().Cluster; got != want {
			t.Errorf("cluster %s, want %s", got, want)
		}
		c.leave(t, m)
	}

	t.Run("who is not allowed is refused", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		_, err := m.openUntil(notAllowedYet)
		is(t, err, ErrNotAllowed, "AddAllowedMember", m.conf.Addr)
		first := storedID(t, m)
		if _, members := c[0].counts(); members != 2 {
			t.Errorf("%d members after a refusal", members)
		}

		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		if again := storedID(t, m); again.id != first.id {
			t.Errorf("id was %s and is %s", first.id, again.id)
		}
		c.awaitMember(t, m)
		if _, members := c[0].counts(); members != 3 {
			t.Errorf("%d members, want 3", members)
		}
		c.leave(t, m)
	})
	t.Run("an answer that got lost", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		s, err := Open(ctx, m.conf) // admitted, and never reached
		must(t, err)
		must(t, s.Close())
		// As if it had been killed before it heard so.
		ident := storedID(t, m)
		ident.cluster, ident.intent = "", intentJoin
		must(t, os.RemoveAll(m.conf.Dir))
		lock, err := lockDir(m.conf.Dir, "")
		must(t, err)
		must(t, errors.Join(writeIdentity(m.conf.Dir, ident), lock.unlock()))
		m.start()
		c.awaitMember(t, m)
		if _, members := c[0].counts(); members != 3 || m.s.Status().ID != ident.id {
			t.Errorf("%d members, want 3; id %s, want %s", members, m.s.Status().ID, ident.id)
		}
		c.leave(t, m)
	})
	t.Run("a voter that has lost its state", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		c.awaitMember(t, m)
		eventually(t, 10*time.Second, "the id is a member's", func() error {
			if intent := storedID(t, m).intent; intent != intentMember {
				return fmt.Errorf("intent %q", intent)
			}
			return nil
		})
		m.stop()
		ident := storedID(t, m)
		must(t, os.Remove(filepath.Join(m.conf.Dir, "snap")))
		must(t, os.RemoveAll(filepath.Join(m.conf.Dir, "wal")))
		_, err := m.open()
		is(t, err, ErrCorrupt, "wal is gone", "bootURL")
		// And if it had been killed before its id said so, the leader knows.
		ident.intent = intentJoin
		must(t, os.RemoveAll(m.conf.Dir))
		lock, err := lockDir(m.conf.Dir, "")
		must(t, err)
		must(t, errors.Join(writeIdentity(m.conf.Dir, ident), lock.unlock()))
		_, err = m.open()
		is(t, err, ErrInvalid, "lost its state", "empty the directory")
		must(t, os.RemoveAll(m.conf.Dir))
		m.start()
		c.awaitMember(t, m)
		c.leave(t, m)
	})
	for _, form := range []string{"%s", "http://%s", "http://%s/", "%s/raft", "HTTP://%s/raft/"} {
		t.Run("bootURL "+fmt.Sprintf(form, "host:port"), func(t *testing.T) {
			m := newMember(t, fmt.Sprintf(form, c.follower(t).conf.Addr))
			must(t, c[1].s.AddAllowedMember(ctx, m.conf.Addr))
			joins(t, m)
		})
	}
	t.Run("through a balancer that also knows a dead member", func(t *testing.T) {
		lb := balancer(t, nil, "http://"+c[0].conf.Addr, "http://"+freeAddr(t), "http://"+c[1].conf.Addr)
		for range 3 { // so that each of the three is asked first once
			m := newMember(t, lb.URL)
			must(t, c[1].s.AddAllowedMember(ctx, m.conf.Addr))
			joins(t, m)
		}
	})
}

func TestJoinThatCannot(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	t.Run("nobody listens", func(t *testing.T) {
		m := newMember(t, freeAddr(t))
		inTime(t, m.opening, context.DeadlineExceeded, "http://"+m.conf.Join, "refused the connection")
	})
	t.Run("nobody listens until the caller has enough", func(t *testing.T) {
		m := newMember(t, freeAddr(t))
		enough := errors.New("enough")
		inTime(t, func(limit time.Duration) error {
			ctx, cancel := context.WithCancelCause(context.Background())
			defer time.AfterFunc(limit, func() { cancel(enough) }).Stop()
			_, err := Open(ctx, m.conf)
			return err
		}, enough, m.conf.Join, "refused the connection")
	})
	t.Run("something else answers", func(t *testing.T) {
		other := httptest.NewServer(http.NotFoundHandler())
		defer other.Close()
		m := newMember(t, other.URL)
		inTime(t, m.opening, context.DeadlineExceeded, "nothing answers at "+other.URL+"/raft/: register the Service there")
	})
	t.Run("a redirect", func(t *testing.T) {
		other := httptest.NewServer(http.RedirectHandler("http://"+c[0].conf.Addr+"/raft/join", http.StatusTemporaryRedirect))
		defer other.Close()
		m := newMember(t, other.URL)
		inTime(t, m.opening, context.DeadlineExceeded, other.URL, "redirect")
	})
	t.Run("the leader that is named is not reached", func(t *testing.T) {
		m := newMember(t, "")
		must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
		lb := balancer(t, nil, "http://"+c[0].conf.Addr)
		m.conf.Join, m.conf.Timeout = lb.URL, 150*time.Millisecond
		c[0].cut()
		defer c[0].heal()
		_, err := m.open()
		is(t, err, context.DeadlineExceeded, lb.URL, "502")
	})
	t.Run("it comes later", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
		c[0].cut()
		time.AfterFunc(150*time.Millisecond, c[0].heal)
		m.start()
		c.awaitMember(t, m)
		c.leave(t, m)
	})
	t.Run("to itself", func(t *testing.T) {
		m := newMember(t, "")
		m.conf.Join, m.conf.Timeout = m.conf.Addr, 150*time.Millisecond
		_, err := m.open()
		is(t, err, context.DeadlineExceeded, "refused the connection")
	})
	t.Run("without a bootURL after a failed try", func(t *testing.T) {
		m := newMember(t, freeAddr(t))
		m.conf.Timeout = 100 * time.Millisecond
		if _, err := m.open(); err == nil {
			t.Fatal("joined nobody")
		}
		m.conf.Join = ""
		_, err := m.open()
		is(t, err, ErrInvalid, "began by joining", "bootURL")
		if _, err := os.Stat(filepath.Join(m.conf.Dir, "id")); err != nil {
			t.Error(err)
		}
	})
}

func TestRemoveMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ctx := ctxFor(t, 3*time.Minute)
	must(t, c[0].s.Set(ctx, "k", []byte("v")))
	newOne := func(t *testing.T) *testMember {
		t.Helper()
		m := newMember(t, c[0].conf.Addr)
		must(t, c[1].s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		c.awaitMember(t, m)
		return m
	}
	// removed waits until the member knows, and looks at what is left of it.
	removed := func(t *testing.T, m *testMember) {
		t.Helper()
		eventually(t, patience, "the removed member's Err", func() error {
			if err := m.s.Err(); !errors.Is(err, ErrRemoved) {
				return fmt.Errorf("Err is %v", err)
			}
			return nil
		})
		if r := m.s.Status().Role; r != Removed {
			t.Errorf("role %v", r)
		}
		if v := m.s.Stale().Get("k"); string(v) != "v" {
			t.Errorf("Stale has %q", v)
		}
		for what, err := range map[string]error{
			"Set": m.s.Set(ctx, "k", nil), "Insert": m.s.Insert(ctx, "x", nil), "Delete": m.s.Delete(ctx, "k"),
			"AddAllowedMember": m.s.AddAllowedMember(ctx, "a.example:1"), "RemoveMember": m.s.RemoveMember(ctx, c[0].conf.Addr),
		} {
			if !errors.Is(err, ErrRemoved) || !errors.Is(err, ErrNotApplied) || errors.Is(err, ErrUncertain) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if _, err := m.s.Get(ctx, "k"); !errors.Is(err, ErrRemoved) {
			t.Errorf("Get: %v", err)
		}
		if err := m.s.Ready(ctx); !errors.Is(err, ErrRemoved) {
			t.Errorf("Ready: %v", err)
		}
		if st := m.s.Status(); st.LeaderID != "" {
			t.Errorf("it still names a leader: %+v", st)
		}
	}
	members := func(t *testing.T, want int) {
		t.Helper()
		for _, m := range c {
			eventually(t, patience, "members at "+m.conf.Addr, func() error {
				if _, n := m.counts(); n != want {
					return fmt.Errorf("%d, want %d", n, want)
				}
				return nil
			})
		}
	}
	rejoins := func(t *testing.T, m *testMember) {
		t.Helper()
		m.stop()
		must(t, os.RemoveAll(m.conf.Dir))
		_, err := m.openUntil(notAllowedYet)
		is(t, err, ErrNotAllowed, "AddAllowedMember")
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		c.awaitMember(t, m)
	}

	t.Run("a live member, which comes back and removes itself", func(t *testing.T) {
		m := newOne(t)
		must(t, c.follower(t).s.RemoveMember(ctx, m.conf.Addr))
		removed(t, m)
		members(t, 3)
		rejoins(t, m)
		must(t, m.s.RemoveMember(ctx, m.conf.Addr)) // by itself
		removed(t, m)
		members(t, 3)
		m.stop()
	})
	t.Run("a dead member", func(t *testing.T) {
		m := newOne(t)
		m.stop()
		must(t, c[0].s.RemoveMember(ctx, m.conf.Addr))
		members(t, 3)
		m.start() // its log says nothing of it
		removed(t, m)
		m.stop()
	})
	t.Run("the leader", func(t *testing.T) {
		m := newOne(t)
		all := append(testCluster{m}, c...)
		eventually(t, patience, "the fourth member leads", func() error {
			l := all.leader(t)
			if l == m {
				return nil
			}
			await(ctx, l.s.raft.Load().LeadershipTransferToServer(raft.ServerID(m.s.Status().ID), raft.ServerAddress(m.conf.Addr)))
			return errors.New("another one leads")
		})
		must(t, m.s.RemoveMember(ctx, m.conf.Addr))
		removed(t, m)
		members(t, 3)
		must(t, c[0].s.Set(ctx, "k", []byte("v")))
		m.stop()
	})
	t.Run("while it is cut off", func(t *testing.T) {
		m := newOne(t)
		m.isolate()
		must(t, c[2].s.RemoveMember(ctx, m.conf.Addr))
		members(t, 3)
		must(t, c[0].s.Ready(ctx))
		before := c.leader(t).s.Status().Term
		m.rejoin()
		removed(t, m)
		if after := c.leader(t).s.Status().Term; after != before {
			t.Errorf("the term was %d and is %d: the removed member disturbed the others", before, after)
		}
		m.stop()
	})
	t.Run("a permission that nobody has used", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		must(t, c[1].s.RemoveMember(ctx, m.conf.Addr))
		_, err := m.openUntil(notAllowedYet)
		is(t, err, ErrNotAllowed, m.conf.Addr)
	})
	t.Run("one that was admitted and never came", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		ident := identity{id: newID(), intent: intentJoin}
		admit(t, c.leader(t), ident.id, m.conf.Addr)
		must(t, c[1].s.RemoveMember(ctx, m.conf.Addr))
		members(t, 3)
		must(t, c[1].s.AddAllowedMember(ctx, m.conf.Addr))
		halfMade{ident: ident}.build(t, m)
		_, err := m.open()
		is(t, err, ErrRemoved, "empty the directory to join as a new member")
	})
	t.Run("itself, and the answer gets lost", func(t *testing.T) {
		m := newOne(t)
		l := c.leader(t)
		l.behind(loses("/raft/remove"))
		defer l.behind(nil)
		must(t, m.s.RemoveMember(ctx, m.conf.Addr))
		members(t, 3)
		m.stop()
	})
	t.Run("an answer that leaves it open", func(t *testing.T) {
		l := c.leader(t)
		var tries atomic.Int64
		l.behind(refusesAll("/raft/remove", func() refusal {
			if tries.Add(1) == 1 {
				return refusal{Status: http.StatusInternalServerError, Code: codeUncertain}
			}
			return refusal{Status: http.StatusConflict, Code: codeConflict} // the first one may have taken it out
		}))
		defer l.behind(nil)
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		err := c.follower(t).s.RemoveMember(short, "nobody.example:1")
		is(t, err, ErrUncertain)
		is(t, err, context.DeadlineExceeded)
		if errors.Is(err, ErrNotApplied) {
			t.Errorf("both: %v", err)
		}
	})
	t.Run("an address that nobody knows", func(t *testing.T) {
		for _, m := range c {
			must(t, m.s.RemoveMember(ctx, "nobody.example:1"))
		}
		is(t, c[0].s.RemoveMember(ctx, "nobody"), ErrInvalid)
	})
	t.Run("the rest would have no majority", func(t *testing.T) {
		f := c.follower(t)
		f.stop()
		var target *testMember
		for _, m := range c {
			if m != f && m != c.leader(t) {
				target = m
			}
		}
		// The refusal that counts is the last one before the deadline. On a busy machine it can be that the leader found nobody.
		eventually(t, patience, "the refusal says why", func() error {
			short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
			defer cancel()
			err := c.leader(t).s.RemoveMember(short, target.conf.Addr)
			is(t, err, ErrNotApplied)
			is(t, err, context.DeadlineExceeded)
			for _, word := range []string{"without " + target.conf.Addr + " 1 of 2 voters would answer, need 2", f.conf.Addr, "refused the connection"} {
				if !strings.Contains(err.Error(), word) {
					return fmt.Errorf("%w does not say %q", err, word)
				}
			}
			return nil
		})
		f.start()
		c.awaitVoters(t, 3)
		must(t, c.leader(t).s.RemoveMember(ctx, target.conf.Addr))
		removed(t, target)
	})
	t.Run("the only voter", func(t *testing.T) {
		alone := newCluster(t, 1)
		is(t, alone[0].s.RemoveMember(ctx, alone[0].conf.Addr), ErrNotApplied, "only voter")
		must(t, alone[0].s.Set(ctx, "k", nil))
	})
}

// refusesAll answers every request to a path with a refusal.
func refusesAll(path string, with func() refusal) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != path {
				h.ServeHTTP(w, r)
				return
			}
			io.Copy(io.Discard, r.Body)
			answer := with()
			w.Header().Set(headerProtocol, "1")
			w.Header().Set(headerFrom, r.Header.Get(headerTo))
			w.WriteHeader(answer.Status)
			json.NewEncoder(w).Encode(answer)
		})
	}
}

// A refusal that holds for further tries too ends a write as not applied, unless this try may be in the log.
func TestFinalRefusalOfAWrite(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	l, f := c.leader(t), c.follower(t)
	var code atomic.Value
	code.Store(codeUncertain)
	l.behind(refusesAll("/raft/propose", func() refusal {
		return refusal{Status: http.StatusServiceUnavailable, Code: code.Load().(string), Final: true}
	}))
	must(t, f.s.Ready(ctxFor(t, patience)))
	eventually(t, patience, "a try that may be in the log", func() error {
		if err := f.s.Set(ctxFor(t, 500*time.Millisecond), "k", nil); !errors.Is(err, ErrUncertain) {
			return fmt.Errorf("%v is not uncertain", err)
		}
		return nil
	})
	code.Store(codeNotApplied)
	eventually(t, patience, "the refusal ends the write", func() error {
		if err := f.s.Set(ctxFor(t, patience), "k", nil); !errors.Is(err, ErrNotApplied) || errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("%v is not the refusal", err)
		}
		return nil
	})
}

// admit makes a non-voter of a member that is not opened.
func admit(t testing.TB, by *testMember, id, addr string) {
	t.Helper()
	ctx := ctxFor(t, patience)
	must(t, by.s.AddAllowedMember(ctx, addr))
	_, err := by.s.peer.join(ctx, "http://"+by.conf.Addr, by.s.Status().ID, "", joinRequest{ID: id, Addr: addr, Format: entryFormat, Announce: true})
	var r *refusal
	if !errors.As(err, &r) || r.Code != codeBadRequest {
		t.Fatalf("asked for another member: %v", err)
	}
	_, err = by.s.serveJoin(ctx, joinRequest{ID: id, Addr: addr, Format: entryFormat})
	must(t, err)
}

func TestPromotion(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	ctx := ctxFor(t, 2*time.Minute)
	l := c.leader(t)
	// One that will never listen comes first, and one at whose address another member answers.
	admit(t, l, newID(), freeAddr(t))
	imposter := &testMember{t: t, conf: Config{Addr: freeAddr(t)}}
	server, err := imposter.serve(c.follower(t).s)
	must(t, err)
	defer server.Close()
	admit(t, l, newID(), imposter.conf.Addr)

	// The third is admitted and does not listen yet.
	m := newMember(t, l.conf.Addr)
	must(t, l.s.AddAllowedMember(ctx, m.conf.Addr))
	m.wrap = func(http.Handler) http.Handler { return http.NotFoundHandler() }
	m.start()
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	is(t, m.s.Ready(short), context.DeadlineExceeded, "the leader has not sent this member anything yet",
		"this member does not reach itself: nothing answers at http://"+m.conf.Addr+"/raft/: register the Service there")
	for i := range 50 {
		must(t, c[i%2].s.Set(ctx, fmt.Sprint(i), nil))
	}
	if voters, members := l.counts(); voters != 2 || members != 5 {
		t.Errorf("%d voters of %d members, want 2 of 5", voters, members)
	}
	m.behind(nil)
	c.awaitMember(t, m)
	if voters, members := l.counts(); voters != 3 || members != 5 {
		t.Errorf("%d voters of %d members, want 3 of 5", voters, members)
	}
	for _, v := range l.s.Status().Members {
		if v.Addr == imposter.conf.Addr && v.Voter {
			t.Error("a member at whose address another one answers is a voter")
		}
	}
}

// Each case: a cluster of two grows, and its second voter is cut off when the promotion of the third comes or has just been
// taken. Then the leader is lost and the second one returns: it and the third must agree on a leader, though the second one
// does not know that the third has a vote.
func TestGrowingFromTwoToThree(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"at the promotion", "just after the promotion"} {
		t.Run(when, func(t *testing.T) {
			var armed atomic.Bool
			var hit = make(chan struct{}, 1)
			c := testCluster{newMember(t, "")}
			c[0].start()
			second := newMember(t, c[0].conf.Addr)
			second.wrap = func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if !armed.Load() || r.URL.Path != "/raft/append" {
						h.ServeHTTP(w, r)
						return
					}
					body, err := io.ReadAll(r.Body)
					r.Body = io.NopCloser(bytes.NewReader(body))
					promotes := false
					if a, decodeErr := decodeAppend(body); err == nil && decodeErr == nil {
						for _, e := range a.Entries {
							promotes = promotes || e.Type == raft.LogConfiguration && len(voters(raft.DecodeConfiguration(e.Data))) == 3
						}
					}
					if promotes {
						armed.Store(false)
						if when == "just after the promotion" {
							h.ServeHTTP(httptest.NewRecorder(), r)
						}
						hit <- struct{}{}
						panic(http.ErrAbortHandler)
					}
					h.ServeHTTP(w, r)
				})
			}
			third := newMember(t, c[0].conf.Addr)
			for _, m := range []*testMember{second, third} {
				must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
			}
			second.start()
			c = append(c, second)
			c.awaitVoters(t, 2)
			must(t, c[0].s.Set(ctxFor(t, patience), "before", []byte("v")))
			first := c.leader(t)
			if first != c[0] {
				t.Fatal("the second member leads")
			}
			armed.Store(true)
			go func() {
				<-hit
				second.isolate()
			}()
			third.start()
			c = append(c, third)
			c.awaitMember(t, third) // by itself and the first one alone
			must(t, third.s.Set(ctxFor(t, patience), "during", []byte("v")))

			first.isolate()
			second.rejoin()
			rest := testCluster{second, third}
			rest.leader(t)
			for _, m := range rest {
				must(t, m.s.Set(ctxFor(t, 20*time.Second), "after "+m.conf.Addr, []byte("v")))
				for _, key := range []string{"before", "during"} {
					if v, err := m.s.Get(ctxFor(t, patience), key); err != nil || string(v) != "v" {
						t.Errorf("%s at %s: %q, %v", key, m.conf.Addr, v, err)
					}
				}
			}
			first.rejoin()
			c.awaitVoters(t, 3)
			c.awaitEqual(t)
		})
	}
}

// A change of the members says what it changes, and none is made before every voter, and who is to become one, has the last one.
func TestChangesOfMembersWaitForTheLast(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	l := c.leader(t)
	ctx := ctxFor(t, patience)
	before, err := l.s.awaitSettled(ctx)
	must(t, err)
	third := newMember(t, l.conf.Addr)
	var empty atomic.Bool
	empty.Store(true)
	third.wrap = rejectsAppends(empty.Load)
	must(t, l.s.AddAllowedMember(ctx, third.conf.Addr))
	third.start()
	c = append(c, third)
	now, err := l.s.awaitSettled(ctx)
	must(t, err)
	if now.index <= before.index || now.index > l.s.Status().AppliedIndex || len(now.Servers) != 3 {
		t.Errorf("the configuration is %+v, and was %+v", now, before)
	}
	err = await(ctx, l.s.raft.Load().RemoveServer(now.Servers[2].ID, before.index, 0))
	if err == nil {
		t.Error("a change of what is not the newest configuration is made")
	}
	eventually(t, patience, "the log is what is missing", func() error {
		if _, err := l.s.promote(); err == nil || !strings.Contains(err.Error(), "the log of http://"+third.conf.Addr+" ends at 0") {
			return fmt.Errorf("promotion says %v", err)
		}
		return nil
	})
	if voters, members := l.counts(); voters != 2 || members != 3 {
		t.Errorf("%d voters of %d members", voters, members)
	}
	empty.Store(false)
	c.awaitVoters(t, 3)
	c.awaitEqual(t)
}

// move restarts a stopped member at another address.
func (m *testMember) move(t testing.TB) {
	t.Helper()
	m.stop()
	m.conf.Addr = freeAddr(t)
}

func (c testCluster) awaitAddresses(t testing.TB) {
	t.Helper()
	for _, m := range c {
		eventually(t, patience, "addresses at "+m.conf.Addr, func() error {
			want := map[string]bool{}
			for _, o := range c {
				want[o.s.Status().ID+" "+o.conf.Addr] = true
			}
			got := m.s.Status().Members
			for _, v := range got {
				if !want[v.ID+" "+v.Addr] {
					return fmt.Errorf("%v, want %v", got, want)
				}
			}
			return nil
		})
	}
}

func TestNewAddress(t *testing.T) {
	t.Parallel()
	first := newMember(t, "")
	addr := first.conf.Addr
	first.conf.Addr = ""
	s, err := Open(t.Context(), first.conf)
	must(t, err)
	must(t, s.Set(t.Context(), "k", []byte("v")))
	must(t, s.Close())
	first.conf.Addr = addr
	first.start()
	must(t, first.s.Ready(ctxFor(t, patience)))
	testCluster{first}.awaitAddresses(t) // from none to one
	first.move(t)
	first.start()
	testCluster{first}.awaitAddresses(t) // alone, it asks nobody

	c := testCluster{first}
	ctx := ctxFor(t, 3*time.Minute)
	for range 2 {
		m := newMember(t, first.conf.Addr)
		must(t, first.s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		c = append(c, m)
	}
	c.awaitVoters(t, 3)
	awaitWrites := func(t *testing.T) {
		t.Helper()
		c.awaitVoters(t, 3)
		for _, m := range c {
			must(t, m.s.Set(ctx, "k", []byte(m.conf.Addr)))
		}
		c.awaitEqual(t)
	}

	t.Run("one that is not allowed", func(t *testing.T) {
		for led := true; led; {
			f := c.follower(t)
			old := f.conf.Addr
			f.move(t)
			f.start()
			short, cancel := context.WithTimeout(ctx, 1500*time.Millisecond)
			err := f.s.Ready(short)
			cancel()
			st := f.s.Status()
			f.stop()
			f.conf.Addr = old
			f.start()
			awaitWrites(t)
			// Where the others lose their leader meanwhile they may elect it: it calls them. That shows nothing.
			if led = err == nil && st.LeaderID == st.ID; led {
				continue
			}
			is(t, err, context.DeadlineExceeded)
			if st.LeaderID != "" {
				t.Errorf("the others call it at an address that is not allowed: %+v", st)
			}
		}
	})
	t.Run("one that is allowed", func(t *testing.T) {
		f := c.follower(t)
		f.move(t)
		must(t, c.leader(t).s.AddAllowedMember(ctx, f.conf.Addr))
		f.start()
		awaitWrites(t)
		c.awaitAddresses(t)
	})
	t.Run("two of three at once", func(t *testing.T) {
		f := c.follower(t)
		var moving []*testMember
		for _, m := range c {
			if m != f {
				moving = append(moving, m)
			}
		}
		next := []string{freeAddr(t), freeAddr(t)}
		for _, a := range next {
			must(t, f.s.AddAllowedMember(ctx, a))
		}
		c.awaitEqual(t)
		// The one that stays misses a write, so that one of those that moved must lead: the other one can't know where.
		f.isolate()
		must(t, moving[0].s.Set(ctx, "k", []byte("missed")))
		for i, m := range moving {
			m.stop()
			m.conf.Addr = next[i]
		}
		f.rejoin()
		for _, m := range moving {
			m.start()
		}
		awaitWrites(t)
		c.awaitAddresses(t)
	})
	t.Run("two change places", func(t *testing.T) {
		c[1].stop()
		c[2].stop()
		c[1].conf.Addr, c[2].conf.Addr = c[2].conf.Addr, c[1].conf.Addr
		c[1].start()
		c[2].start()
		awaitWrites(t)
		c.awaitAddresses(t)
		if voters, members := c[0].counts(); voters != 3 || members != 3 {
			t.Errorf("%d voters of %d members, want 3 of 3", voters, members)
		}
		for _, m := range c {
			if err := m.s.Err(); err != nil {
				t.Errorf("%s: %v", m.conf.Addr, err)
			}
		}
	})
}

func TestReplacement(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ctx := ctxFor(t, 2*time.Minute)
	must(t, c[0].s.Set(ctx, "k", []byte("v")))
	lost := c[2]
	oldDir, oldID := lost.conf.Dir, lost.s.Status().ID

	t.Run("refused while the old one answers", func(t *testing.T) {
		other := newMember(t, c[0].conf.Addr)
		other.conf.Addr = lost.conf.Addr
		_, err := other.open()
		is(t, err, ErrInvalid, peerName(oldID, lost.conf.Addr)+" answers: stop it, or remove it first")
		if voters, members := c[0].counts(); voters != 3 || members != 3 {
			t.Errorf("%d voters of %d members, want 3 of 3", voters, members)
		}
	})
	newDir := filepath.Join(t.TempDir(), "data")
	t.Run("works when it is down", func(t *testing.T) {
		lost.stop()
		lost.conf.Dir, lost.conf.Join = newDir, c[1].conf.Addr
		lost.start()
		c.awaitMember(t, lost)
		c.awaitVoters(t, 3)
		for _, m := range c {
			for _, v := range m.s.Status().Members {
				if v.ID == oldID {
					t.Errorf("the old one is still there: %+v", v)
				}
			}
		}
		if v, err := lost.s.Get(ctx, "k"); err != nil || string(v) != "v" {
			t.Errorf("%q, %v", v, err)
		}
	})
	t.Run("the old directory is of a removed member", func(t *testing.T) {
		lost.stop()
		lost.conf.Dir = oldDir
		lost.start()
		eventually(t, patience, "ErrRemoved", func() error {
			if err := lost.s.Err(); !errors.Is(err, ErrRemoved) {
				return fmt.Errorf("Err is %v", err)
			}
			return nil
		})
		must(t, c[0].s.Set(ctx, "k", []byte("v")))
	})
}

func TestReadySaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c[1].stop()
	c[2].behind(func(http.Handler) http.Handler { return http.NotFoundHandler() })
	inTime(t, c[0].ready, context.DeadlineExceeded, "not ready: 1 of 3 voters reachable, need 2: ",
		"http://"+c[1].conf.Addr+" refused the connection", "nothing answers at http://"+c[2].conf.Addr+"/raft/: register the Service there")
	c[2].behind(nil)
	must(t, c[0].s.Ready(ctxFor(t, patience)))
	must(t, c[2].s.Ready(ctxFor(t, patience)))

	c[1].wrap = func(http.Handler) http.Handler { return http.NotFoundHandler() }
	c[1].start()
	inTime(t, c[1].ready, context.DeadlineExceeded, "3 of 3 voters reachable",
		"the leader, "+testCluster{c[0], c[2]}.leader(t).conf.Addr+", has not reached this member",
		"this member does not reach itself: nothing answers at http://"+c[1].conf.Addr+"/raft/: register the Service there")
}

// Whatever comes to whatever route, with headers that let it in, the member answers and works on.
func TestGarbage(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	l := c.leader(t)
	st := l.s.Status()
	from := c.follower(t)
	client := from.conf.Client
	ctx := ctxFor(t, time.Minute)
	bodies := [][]byte{nil, {0}, []byte("{}"), []byte("[]"), []byte("null"), []byte(`{"ID":"x","Addr":"y"}`), []byte(`{"Term":18446744073709551615}`),
		bytes.Repeat([]byte{0xff}, 4096), bytes.Repeat([]byte{1}, 70<<10)}
	for _, route := range []string{"append", "vote", "prevote", "timeoutnow", "snapshot", "propose", "readindex", "term", "join", "remove",
		"status", "state", "", "nothing", "../raft/term"} {
		for _, method := range []string{"POST", "GET", "DELETE"} {
			for _, body := range bodies {
				for _, cluster := range []string{st.Cluster, newID(), ""} {
					req, err := http.NewRequestWithContext(ctx, method, "http://"+l.conf.Addr+"/raft/"+route, bytes.NewReader(body))
					must(t, err)
					if route == "remove" && method == "POST" && cluster == st.Cluster {
						req.Header.Set(headerProtocol, "7") // its {} is no garbage but a question
					} else {
						req.Header.Set(headerProtocol, "1")
					}
					req.Header.Set(headerCluster, cluster)
					req.Header.Set(headerFrom, from.s.Status().ID)
					req.Header.Set(headerFromAddr, from.conf.Addr)
					req.Header.Set(headerTo, st.ID)
					resp, err := client.Do(req)
					if err != nil {
						t.Fatalf("%s %s %.20q: %v", method, route, body, err)
					}
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					if resp.StatusCode == http.StatusInternalServerError {
						t.Errorf("%s %s %.20q: %s", method, route, body, resp.Status)
					}
				}
			}
		}
	}
	for _, m := range c {
		must(t, m.s.Err())
		must(t, m.s.Ready(ctx))
		must(t, m.s.Set(ctx, "k", []byte("v")))
	}
	if voters, members := l.counts(); voters != 2 || members != 2 {
		t.Errorf("%d voters of %d members, want 2 of 2", voters, members)
	}
	c.awaitEqual(t)
}

func TestJoinWithAnIDOfAnotherCluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	m := newMember(t, c[0].conf.Addr)
	must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
	lock, err := lockDir(m.conf.Dir, "")
	must(t, err)
	other := newID()
	must(t, errors.Join(writeIdentity(m.conf.Dir, identity{id: newID(), cluster: other, intent: intentJoin}), lock.unlock()))
	_, err = m.open()
	is(t, err, ErrInvalid, "cluster "+shortID(other)+", and this is "+shortID(c[0].s.Status().Cluster))
}

func TestRollingRestartOfFive(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var stop atomic.Bool
	var wg sync.WaitGroup
	acked := make([]map[string]bool, 8)
	for w := range acked {
		acked[w] = map[string]bool{}
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				m := c[(w+i)%len(c)]
				m.mu.Lock()
				s := m.s
				m.mu.Unlock()
				if s == nil {
					continue
				}
				key := fmt.Sprintf("%d/%d", w, i)
				switch err := s.Insert(ctx, key, []byte(key)); {
				case err == nil:
					acked[w][key] = true
				case errors.Is(err, ErrUnsatisfied):
					t.Errorf("%s met its own write", key)
				case !errors.Is(err, ErrClosed):
					t.Errorf("%s: %v", key, err)
				}
			}
		})
	}
	for _, m := range c {
		m.stop()
		m.start()
		must(t, m.s.Ready(ctxFor(t, patience)))
	}
	stop.Store(true)
	wg.Wait()
	c.awaitVoters(t, 5)
	c.awaitEqual(t)
	n := 0
	for w := range acked {
		for key := range acked[w] {
			n++
			for _, m := range c {
				if v := m.s.Stale().Get(key); string(v) != key {
					t.Fatalf("%s at %s is %q, and it was acknowledged", key, m.conf.Addr, v)
				}
			}
		}
	}
	t.Logf("%d acknowledged writes", n)
}

func TestBehindAProxyPerMember(t *testing.T) {
	t.Parallel()
	var passed atomic.Int64
	behind := func(m *testMember) *testMember {
		m.listen = freeAddr(t)
		lb := balancer(t, nil, "http://"+m.listen)
		l, err := net.Listen("tcp", m.conf.Addr)
		must(t, err)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			passed.Add(1)
			lb.Config.Handler.ServeHTTP(w, r)
		})}
		go server.Serve(l)
		t.Cleanup(func() { server.Close() })
		return m
	}
	ctx := ctxFor(t, time.Minute)
	c := testCluster{behind(newMember(t, ""))}
	c[0].start()
	for range 2 {
		m := behind(newMember(t, c[0].conf.Addr))
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		c = append(c, m)
	}
	c.awaitVoters(t, 3)
	c.leader(t).stop() // its proxy answers 502 now
	for _, m := range c {
		if m.s != nil {
			must(t, m.s.Set(ctx, "k", []byte(m.conf.Addr)))
		}
	}
	for _, m := range c {
		if m.s == nil {
			m.start()
		}
	}
	c.awaitVoters(t, 3)
	c.awaitEqual(t)
	if passed.Load() == 0 {
		t.Error("nothing went through a proxy")
	}
}

// Members that come at the same time are promoted one after the other, whoever is ready first.
func TestFourJoinAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	var wg sync.WaitGroup
	for range 4 {
		m := newMember(t, c[0].conf.Addr)
		must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
		c = append(c, m)
	}
	for _, m := range c[1:] {
		wg.Go(func() {
			if _, err := m.open(); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range 100 {
		must(t, c[0].s.Set(ctxFor(t, patience), fmt.Sprint(i), nil))
	}
	wg.Wait()
	c.awaitVoters(t, 5)
	c.awaitEqual(t)
}

func TestAnnouncedAddressEndsWithTheConfiguredOne(t *testing.T) {
	t.Parallel()
	var p peerTable
	p.announce("m", "new:1", "old:1")
	for _, step := range []struct{ configured, want string }{
		{"old:1", "new:1"}, {placeholderAddr("m"), "new:1"}, {"newer:1", ""},
	} {
		if got := p.announcedAddr("m", step.configured); got != step.want {
			t.Errorf("configured %s: %q, want %q", step.configured, got, step.want)
		}
	}
	if got := p.announcedAddr("other", placeholderAddr("other")); got != "" {
		t.Errorf("of another member: %q", got)
	}
}

var discarded = slog.New(slog.DiscardHandler)

// halfMade is a directory after the steps of Open up to the one that a kill came in.
type halfMade struct {
	ident     identity
	wal, term bool // the log exists; a term is stored in it
	snap      bool // the file exists
}

func (h halfMade) build(t *testing.T, m *testMember) {
	t.Helper()
	dir := m.conf.Dir
	lock, err := lockDir(dir, m.conf.Addr)
	must(t, err)
	must(t, writeIdentity(dir, h.ident))
	if h.wal {
		l, err := openLog(logOptions{dir: filepath.Join(dir, "wal"), log: discarded})
		must(t, err)
		if h.term {
			must(t, l.SetUint64([]byte("CurrentTerm"), 1))
		}
		must(t, l.close())
	}
	if h.snap {
		st, err := openStore(storeOptions{path: filepath.Join(dir, "snap"), memory: -1, log: discarded})
		must(t, err)
		must(t, st.close())
	}
	putFile(t, filepath.Join(dir, "id.tmp"), "half an id")
	putFile(t, filepath.Join(dir, "snap.incoming"), "half a snapshot")
	must(t, lock.unlock())
}

// Whoever reaches the door can announce another address for a member. It must not cut that member off.
func TestForgedAnnouncement(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader, victim := c.leader(t), c.follower(t)
	var wrong *testMember
	for _, m := range c {
		if m != leader && m != victim {
			wrong = m
		}
	}
	st := leader.s.Status()
	body, err := json.Marshal(joinRequest{ID: victim.s.Status().ID, Addr: wrong.conf.Addr, Format: entryFormat, Announce: true})
	must(t, err)
	req, err := http.NewRequest("POST", "http://"+leader.conf.Addr+"/raft/join", bytes.NewReader(body))
	must(t, err)
	for name, value := range map[string]string{headerProtocol: strconv.Itoa(protocolVersion), headerCluster: st.Cluster,
		headerFrom: victim.s.Status().ID, headerFromAddr: wrong.conf.Addr, headerTo: st.ID} {
		req.Header.Set(name, value)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		t.Fatal("the leader took it for a move")
	}
	must(t, leader.s.Set(ctxFor(t, 20*time.Second), "k", []byte("v")))
	c.awaitEqual(t)
	if v, err := victim.s.Get(ctxFor(t, 20*time.Second), "k"); err != nil || string(v) != "v" {
		t.Errorf("the victim reads %q, %v", v, err)
	}
}

// A member that has come back and not caught up is not Ready, for a read would wait and the next restart would stop the writes.
func TestReadyWaitsForTheIndex(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	m := c.follower(t)
	m.stop()
	l := c.leader(t)
	for i := range 20 {
		must(t, l.s.Set(ctxFor(t, patience), fmt.Sprint(i), nil))
	}
	release := make(chan struct{})
	m.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			m.mu.Lock()
			s := m.s
			m.mu.Unlock()
			if s == nil {
				http.NotFound(w, req)
				return
			}
			withoutEntries(s, release).ServeHTTP(w, req)
		})
	}
	m.start()
	last := l.s.Status().CommitIndex
	is(t, m.s.Ready(ctxFor(t, 3*time.Second)), context.DeadlineExceeded, "not ready: this member has applied ", " entries; ")
	close(release)
	must(t, m.s.Ready(ctxFor(t, patience)))
	if at := m.s.Status().AppliedIndex; at < last {
		t.Errorf("Ready at %d of %d entries", at, last)
	}
}

func TestReadyOfAContextThatHasEnded(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	is(t, c[0].s.Ready(ctx), cause, "not ready")
	c[0].stop()
}

// answersStatus has a member say of itself what change makes of the truth.
func (c *script) answersStatus(m *scriptMember, change func(a *statusAnswer)) {
	c.net.serve(m.conf.Addr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		rec := httptest.NewRecorder()
		m.s.ServeHTTP(rec, req)
		body := rec.Body.Bytes()
		if req.URL.Path == "/raft/status" {
			var a statusAnswer
			must(c.t, json.Unmarshal(body, &a))
			change(&a)
			body, _ = json.Marshal(a)
		}
		rec.Header().Del("Content-Length")
		maps.Copy(w.Header(), rec.Header())
		w.WriteHeader(rec.Code)
		w.Write(body)
	}))
}

// A member that is in another term than the leader does not keep up, whatever its log has: it follows somebody else, or nobody.
func TestProbeAsksForTheTerm(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		list := l.s.raft.Load().GetConfiguration().Configuration().Servers
		c.obey("await equal")
		for _, err := range l.s.probe(t.Context(), list, 0) {
			must(t, err)
		}
		c.answersStatus(f, func(a *statusAnswer) { a.Term++ })
		for i, err := range l.s.probe(t.Context(), list, 0) {
			if is := err != nil; is != (string(list[i].ID) == f.s.ident().id) || is && !strings.Contains(err.Error(), "is in term") {
				t.Errorf("%s: %v", list[i].Address, err)
			}
		}
	})
}

// Who answers under another cluster's id, has a fault, or lacks more than an append of the log does not keep up.
func TestProbeOfWhoDoesNotKeepUp(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		list := l.s.raft.Load().GetConfiguration().Configuration().Servers
		c.obey("await equal")
		wrong := func(a *statusAnswer) {}
		c.answersStatus(f, func(a *statusAnswer) { wrong(a) })
		last, _ := l.s.wal.last()
		for _, is := range []struct {
			change func(a *statusAnswer)
			words  string
		}{
			{func(a *statusAnswer) {}, ""},
			{func(a *statusAnswer) { a.Healthy = false }, "reports a fault"},
			{func(a *statusAnswer) { a.Cluster = "other" }, "answers at"},
			{func(a *statusAnswer) { a.LastIndex = last - 1 }, ""},
			{func(a *statusAnswer) { a.LastIndex = last - promoteLag - 1 }, "ends at"},
		} {
			for last <= promoteLag+10 {
				c.obey("set L k 1")
				last, _ = l.s.wal.last()
			}
			wrong = is.change
			for i, err := range l.s.probe(t.Context(), list, 0) {
				if f := string(list[i].ID) == f.s.ident().id && is.words != ""; f != (err != nil) || f && !strings.Contains(err.Error(), is.words) {
					t.Errorf("%q: %s: %v", is.words, list[i].Address, err)
				}
			}
		}
	})
}

// A removal needs a majority that keeps up, of the voters with the target and of those without it.
func TestMayRemove(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		c.obey("await equal")
		of := func(m *scriptMember) raft.Server {
			return raft.Server{ID: raft.ServerID(m.s.ident().id), Address: raft.ServerAddress(m.conf.Addr)}
		}
		dead := []raft.Server{{ID: "x", Address: "x.test:1"}, {ID: "y", Address: "y.test:1"}, {ID: "z", Address: "z.test:1"}}
		for _, is := range []struct {
			target raft.Server
			rest   []raft.Server
			may    bool
		}{
			{dead[0], []raft.Server{of(l), of(f)}, true},
			{dead[0], []raft.Server{of(l), of(f), of(g), dead[1]}, true},
			{dead[0], []raft.Server{of(l), of(f), dead[1]}, false}, // two of four
			{of(g), []raft.Server{of(l), dead[1]}, false},          // one of two
			{of(g), []raft.Server{of(l), of(f), dead[1]}, true},
		} {
			config := configuration{Configuration: raft.Configuration{Servers: append([]raft.Server{is.target}, is.rest...)}}
			if err := l.s.mayRemove(t.Context(), is.target, config); (err == nil) != is.may {
				t.Errorf("%s beside %v: %v", is.target.Address, is.rest, err)
			}
		}
	})
}

// Whoever was heard from a moment ago is not replaced, though nobody answers at its address: it may have moved.
func TestReplacementOfWhoWasHeard(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		id, addr := g.s.ident().id, g.conf.Addr
		c.obey("kill G")
		time.Sleep(2 * goneAfter)
		l.s.members.contact(id)
		var r *refusal
		if err := l.s.replaceAt(t.Context(), addr, newID()); !errors.As(err, &r) || r.Code != codeNotReady || !strings.Contains(r.Message, "lives") {
			t.Errorf("%v", err)
		}
		time.Sleep(2 * goneAfter)
		must(t, l.s.replaceAt(t.Context(), addr, newID()))
	})
}

// A call to a leader ends when another one is known, or none.
func TestCallsEndWithTheLead(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	must(t, s.Ready(ctxFor(t, patience)))
	here, cancel := s.whileLed(t.Context(), s.ident().id)
	defer cancel()
	gone, cancel := s.whileLed(t.Context(), newID())
	defer cancel()
	select {
	case <-gone.Done():
	case <-time.After(patience):
		t.Error("a call to who does not lead goes on")
	}
	must(t, here.Err())
}

// The log is kept for a while behind a snapshot that was sent: its receiver needs it next.
func TestLogIsKeptBehindASnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p peerTable
		want := func(what string, is bool) {
			t.Helper()
			if p.sending() != is {
				t.Errorf("%s: %v", what, !is)
			}
		}
		want("nothing was sent", false)
		p.snapshots(1)
		time.Sleep(2 * keepAfterSend)
		want("one is being sent", true)
		p.snapshots(-1)
		time.Sleep(keepAfterSend - time.Second)
		want("it was just sent", true)
		time.Sleep(2 * time.Second)
		want("it was sent a while ago", false)
	})
}

// A permission that was acknowledged on a member counts for a join that begins after that, though the leader has not applied it yet.
func TestJoinAfterAPermissionElsewhere(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	l, f := c.leader(t).s, c.follower(t).s
	m := newMember(t, "")
	l.store.mu.Lock()
	unlock := sync.OnceFunc(l.store.mu.Unlock)
	defer unlock()
	must(t, f.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	answer := make(chan error, 1)
	go func() {
		_, err := l.serveJoin(ctxFor(t, patience), joinRequest{ID: newID(), Addr: m.conf.Addr, Format: entryFormat})
		answer <- err
	}()
	eventually(t, patience, "that the join waits for the leader's apply", func() error {
		l.fsm.applied.mu.Lock()
		defer l.fsm.applied.mu.Unlock()
		if len(l.fsm.applied.waiters) == 0 && len(answer) == 0 {
			return errors.New("it does not")
		}
		return nil
	})
	unlock()
	if err := <-answer; err != nil {
		t.Errorf("it is refused: %v", err)
	}
}

// What raft says of an entry decides what its caller is told: only what is surely in no log was not applied.
func TestFateOfAnEntry(t *testing.T) {
	for _, c := range []struct {
		err, why error
		sent     bool
	}{
		{raft.ErrEnqueueTimeout, errRaftBusy, false},
		{raft.ErrNotLeader, raft.ErrNotLeader, false},
		{raft.ErrLeadershipTransferInProgress, raft.ErrLeadershipTransferInProgress, false},
		{fmt.Errorf("append: %w", syscall.ENOSPC), syscall.ENOSPC, false},
		{fmt.Errorf("%w: append: %w", errSentAhead, syscall.ENOSPC), syscall.ENOSPC, true},
		{fmt.Errorf("%w: append: %w", errRefused, syscall.ENOSPC), errRefused, true},
		{raft.ErrLeadershipLost, raft.ErrLeadershipLost, true},
		{raft.ErrRaftShutdown, raft.ErrRaftShutdown, true},
		{context.DeadlineExceeded, context.DeadlineExceeded, true},
	} {
		if sent, why := fate(c.err); sent != c.sent || !errors.Is(why, c.why) {
			t.Errorf("%v: sent %t, %v", c.err, sent, why)
		}
	}
}

// A forwarded entry whose answer is lost may be in the log.
func TestForwardedEntryWithoutAnswer(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		c.obey("cut F to L")
		c.obey("cut L to F")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, sent, err := f.s.propose(ctx, encodeOpen(firstFormat, [16]byte{1})); err == nil || !sent {
			t.Errorf("sent %t, %v", sent, err)
		}
	})
}

// A state that its own member does not serve is given to no other one.
func TestDamagedStateIsNotGiven(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	c, err := s.copyState(t.Context())
	must(t, err)
	must(t, c.Close())
	s.faults.set(faultState, corrupt("a row"))
	var r *refusal
	if _, err := s.copyState(t.Context()); !errors.As(err, &r) || r.Code != codeNotReady {
		t.Error(err)
	}
}

// Whoever was removed does not come back under its id, wherever it asks.
func TestRemovedIDDoesNotJoin(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		id, addr := g.s.ident().id, g.s.conf.Addr
		must(t, l.s.RemoveMember(t.Context(), addr))
		must(t, l.s.AddAllowedMember(t.Context(), addr))
		var r *refusal
		if _, err := l.s.serveJoin(t.Context(), joinRequest{ID: id, Addr: addr, Format: entryFormat}); !errors.As(err, &r) || r.Code != codeRemoved {
			t.Errorf("%v", err)
		}
	})
}

// Where nobody leads, each tells the others its address again: they may have been told another one, and a majority that has moved must find
// each other.
func TestAnnouncesWhereNobodyLeads(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	l, f := c.leader(t), c.follower(t)
	says := func(want bool) {
		t.Helper()
		eventually(t, patience, fmt.Sprint("announced: ", want), func() error {
			if got := f.s.announced(); got != want {
				return fmt.Errorf("it is %v", got)
			}
			return nil
		})
	}
	says(true)
	l.stop()
	f.isolate() // so that the one that handed over to it is not needed for a lead of its own
	says(false)
}
