package quorate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
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

	t.Run("who is not allowed is refused at once", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		_, err := m.open()
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
		m.start()
		c.awaitMember(t, m)
		m.stop()
		// As if it had been killed after the leader admitted it and before it heard so.
		ident := storedID(t, m)
		ident.cluster = ""
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
	c := newCluster(t, 1)
	t.Run("nobody listens", func(t *testing.T) {
		m := newMember(t, freeAddr(t))
		m.conf.Timeout = 150 * time.Millisecond
		_, err := m.open()
		is(t, err, context.DeadlineExceeded, "http://"+m.conf.Join, "refused the connection")
	})
	t.Run("nobody listens until the caller has enough", func(t *testing.T) {
		m := newMember(t, freeAddr(t))
		ctx, cancel := context.WithCancelCause(t.Context())
		enough := errors.New("enough")
		time.AfterFunc(100*time.Millisecond, func() { cancel(enough) })
		_, err := Open(ctx, m.conf)
		is(t, err, enough, m.conf.Join, "refused the connection")
	})
	t.Run("something else answers", func(t *testing.T) {
		other := httptest.NewServer(http.NotFoundHandler())
		defer other.Close()
		m := newMember(t, other.URL)
		m.conf.Timeout = 150 * time.Millisecond
		_, err := m.open()
		is(t, err, context.DeadlineExceeded, "nothing answers at "+other.URL+"/raft/: register the Service there")
	})
	t.Run("a redirect", func(t *testing.T) {
		other := httptest.NewServer(http.RedirectHandler("http://"+c[0].conf.Addr+"/raft/join", http.StatusTemporaryRedirect))
		defer other.Close()
		m := newMember(t, other.URL)
		m.conf.Timeout = 150 * time.Millisecond
		_, err := m.open()
		is(t, err, context.DeadlineExceeded, other.URL, "redirect")
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
		if _, err := m.open(); err == nil { // its own log may not tell it
			removed(t, m)
			m.stop()
		} else {
			is(t, err, ErrRemoved, "empty the directory")
		}
		must(t, os.RemoveAll(m.conf.Dir))
		_, err := m.open()
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
		_, err := m.open()
		is(t, err, ErrNotAllowed, m.conf.Addr)
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
		short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		defer cancel()
		err := c.leader(t).s.RemoveMember(short, target.conf.Addr)
		is(t, err, ErrNotApplied, "without "+target.conf.Addr+" 1 of 2 voters would answer, need 2", f.conf.Addr, "refused the connection")
		is(t, err, context.DeadlineExceeded)
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
