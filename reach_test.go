package quorate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// member of a Status, by the name of a script's member.
func (c *script) seenBy(who, whom string) Member {
	c.t.Helper()
	for _, m := range c.member(who).s.Status().Members {
		if m.Addr == c.member(whom).conf.Addr {
			return m
		}
	}
	c.t.Fatalf("%s does not know %s", who, whom)
	return Member{}
}

// Status says of each of the others how far it is behind and what the calls to it meet, since when.
func TestStatusOfOthers(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		for range 3 {
			c.obey("set L k v")
		}
		time.Sleep(time.Second)
		st := l.s.Status()
		if st.LeaderSince.IsZero() || time.Since(st.LeaderSince) < time.Second || st.Fsync == 0 || st.Format != entryFormat || st.FormatHeldBy != "" {
			t.Errorf("the leader's status is %+v", st)
		}
		for _, name := range []string{"L", "F", "G"} {
			m := c.seenBy("L", name)
			if m.Lag != 0 || m.LastError != "" || !m.FailingSince.IsZero() || (m.Heard == 0) != (name == "L") {
				t.Errorf("the leader says of %s: %+v", name, m)
			}
			if m := c.seenBy("F", name); m.Lag >= 0 {
				t.Errorf("a follower says of %s: %+v", name, m)
			}
		}
		cut := time.Now()
		c.obey("cut L to F")
		for range 3 {
			c.obey("set L k v")
			time.Sleep(2 * time.Second)
		}
		m := c.seenBy("L", "F")
		if m.Lag != 3 || !strings.Contains(m.LastError, f.conf.Addr+" did not answer in time") || m.FailingSince.Before(cut.Add(-time.Second)) || m.FailingSince.After(cut.Add(time.Second)) {
			t.Errorf("the leader says of the one that does not hear it since %v: %+v", cut, m)
		}
		if m := c.seenBy("L", "G"); m.Lag != 0 || m.LastError != "" {
			t.Errorf("it says of the other: %+v", m)
		}
		since := l.s.Status().LeaderSince
		c.obey("heal")
		c.obey("await equal")
		time.Sleep(time.Second)
		if m := c.seenBy("L", "F"); m.Lag != 0 || m.LastError != "" || !m.FailingSince.IsZero() {
			t.Errorf("when all is well again: %+v", m)
		}
		if now := l.s.Status(); now.Role == Leader && !now.LeaderSince.Equal(since) {
			t.Errorf("it leads since %v, and led since %v", now.LeaderSince, since)
		}
		killed := time.Now()
		c.obey("kill L")
		c.obey("elect N among F G")
		time.Sleep(time.Second) // the other one has heard of it
		for _, m := range c.running(nil) {
			if st := m.s.Status(); !st.LeaderSince.After(killed) {
				t.Errorf("%s follows the new leader since %v, before the old one was killed at %v", m.name, st.LeaderSince, killed)
			}
		}
		if m := c.seenBy("N", "L"); m.Lag >= 0 || !strings.Contains(m.LastError, "refused the connection") {
			t.Errorf("the new leader says of the dead one: %+v", m)
		}
	})
}

// What counts as an answer, and which of two calls is the newer.
func TestReachTable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var table reachTable
		began := time.Now()
		time.Sleep(time.Second)
		for i, x := range []struct {
			err      error
			began    time.Time
			answered bool
			fails    bool
		}{
			{nil, time.Now(), true, false},
			{syscall.ECONNREFUSED, began, true, false}, // a later call was answered
			{context.Canceled, time.Now(), true, false},
			{fmt.Errorf("call: %w", context.DeadlineExceeded), time.Now(), true, false}, // its caller did not wait
			{refuse(http.StatusServiceUnavailable, codeNotReady, ""), time.Now(), true, false},
			{refuse(http.StatusMisdirectedRequest, codeNotLeader, ""), time.Now(), true, false},
			{refuse(http.StatusForbidden, codeTLS, "no"), time.Now(), false, true},
			{nil, time.Now(), true, false},
			{&foreignAnswer{status: 404, body: "not found"}, time.Now(), false, true},
			{nil, time.Now(), true, false},
		} {
			table.called("x", "http://x:1", x.began, x.err)
			r := table.of("x")
			if (r.err == nil) != x.answered || r.failing.IsZero() == x.fails || (r.reason() == "") != x.answered || r.answered.IsZero() && x.answered {
				t.Errorf("%d: after %v: %+v", i, x.err, r)
			}
		}
		first := time.Now()
		time.Sleep(time.Second)
		table.called("x", "http://x:1", time.Now(), errors.New("second"))
		table.called("x", "http://x:1", first, fmt.Errorf("first: %w", context.DeadlineExceeded))
		if r := table.of("x"); !r.failing.Equal(first) || !strings.Contains(r.reason(), "in time") {
			t.Errorf("%+v", r)
		}
		table.called("x", "http://x:1", time.Now(), errors.New(strings.Repeat("ä", 1000)))
		if n := len(table.of("x").reason()); n > maxReason+len("…") {
			t.Errorf("a reason of %d bytes", n)
		}
	})
}

// viewsOf makes views of lines "CALLER CALLED CALLED!": it reaches the first and has not reached the second for the stall limit; with ?
// it has failed to reach it for less.
func viewsOf(lines ...string) views {
	v := make(views)
	for _, line := range lines {
		words := strings.Fields(line)
		var list []reachAnswer
		for _, w := range words[1:] {
			r := reachAnswer{ID: strings.TrimRight(w, "!?")}
			switch w[len(w)-1] {
			case '!':
				r.Failing = stallLimit.Milliseconds()
			case '?':
				r.Failing = stallLimit.Milliseconds() - 1
			}
			list = append(list, r)
		}
		v.add(words[0], list)
	}
	return v
}

// To whom a leader hands over that some voters have lost: to those that more of them reach, and that reach a majority.
func TestReachedByMore(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		what   string
		said   []string
		voters int
		lost   string
		better string // with how many more
	}{
		{"all is well", []string{"l a b", "a l b", "b l a"}, 3, "", ""},
		{"nobody reaches it", []string{"l a b", "a l! b", "b l! a"}, 3, "a b", "a2 b2"},
		{"not for long", []string{"l a b", "a l? b", "b l? a"}, 3, "", "a1 b1"},
		{"one has lost it, and the other does not", []string{"l a b", "a l! b", "b l a"}, 3, "a", "a1 b1"},
		{"one has lost all", []string{"l a b", "a l! b!", "b l a"}, 3, "a", ""},
		{"one has lost it, the other is down", []string{"l a b!", "a l! b!"}, 3, "a", ""},
		{"older releases say nothing", []string{"l a b", "a", "b"}, 3, "", ""},
		{"one of an older release", []string{"l a b", "a l! b", "b"}, 3, "a", "a1"},
		{"one of an older release that forwards", []string{"l a b", "a l! b", "b l"}, 3, "a", "b1"},
		{"two of five of an older release", []string{"l a b c d", "a l! b c d", "b l a c d", "c", "d"}, 5, "a", "a1 b1"},
		{"nobody of five reaches it", []string{"l a b c d", "a l! b c d", "b l! a c d", "c l! a b d", "d l! a b c"}, 5, "a b c d", "a4 b4 c4 d4"},
		{"one side of five calls nobody of the other", []string{"l a b c d", "a l b c d", "b l a c d", "c l! a! b! d", "d l! a! b! c"}, 5, "c d", ""},
		{"the other side leads", []string{"l a b! c! d!", "a l b! c! d!", "b l a c d", "c l a b d", "d l a b c"}, 5, "", ""},
		{"one way of five is cut", []string{"l a b c d", "a l! b c d", "b l a c d", "c l a b d", "d l a b c"}, 5, "a", "a1 b1 c1 d1"},
		{"as is one to each", []string{"l a! b c d", "a l! b c d", "b l a c! d", "c l a b! d", "d l! a b c"}, 5, "a d", "a1 b1 c1 d2"},
	} {
		v := viewsOf(x.said...)
		rank, lost := v.rank("l", x.voters)
		var better []string
		for _, id := range []string{"l", "a", "b", "c", "d"} {
			if n := rank(id); n > 0 {
				better = append(better, fmt.Sprint(id, n))
			}
		}
		if got := strings.Join(lost, " "); got != x.lost || x.lost != "" && strings.Join(better, " ") != x.better {
			t.Errorf("%s: lost %q, better %q, want %q and %q", x.what, got, better, x.lost, x.better)
		}
	}
	v := make(views)
	v.add("a", []reachAnswer{{ID: "l", Failing: 60_000, Tried: reachOld.Milliseconds() + 1}})
	if v.lost("a", "l") || v.reaches("a", "l") {
		t.Error("what is old counts")
	}
}

// What a follower says of calls to the leader counts while it hears that leader.
func TestReachedAs(t *testing.T) {
	t.Parallel()
	const limit = int64(stallLimit / time.Millisecond)
	for _, x := range []struct {
		leader         string
		follows, quiet int64
		want           string
	}{
		{"l", limit, 0, "l b"}, {"l", limit - 1, 0, "b"}, {"l", limit, heartbeatTimeout.Milliseconds(), "b"}, {"b", limit, 0, "b"}, {"", limit, 0, "b"},
	} {
		a := statusAnswer{LeaderID: x.leader, Follows: x.follows, LeaderSilence: x.quiet, Reached: []reachAnswer{{ID: "l"}, {ID: "b"}}}
		var got []string
		for _, r := range a.reachedAs("l") {
			got = append(got, r.ID)
		}
		if strings.Join(got, " ") != x.want {
			t.Errorf("%+v: %q", x, got)
		}
	}
}

// A voter that says that it has lost half of the others is handed the lead by nobody.
func TestReachesMajority(t *testing.T) {
	t.Parallel()
	all := []raft.Server{{ID: "a"}, {ID: "b"}, {ID: "c"}}
	for lost, want := range map[string]bool{"": true, "b": true, "c": true, "b c": false} {
		a := statusAnswer{ID: "a", Reached: []reachAnswer{{ID: "l"}}}
		for _, id := range strings.Fields(lost) {
			a.Reached = append(a.Reached, reachAnswer{ID: id, Failing: stallLimit.Milliseconds()})
		}
		if reachesMajority(a, all) != want {
			t.Errorf("a, which has lost %q: %v", lost, !want)
		}
	}
}

func TestNoHandOverToOneThatReachesNobody(t *testing.T) {
	t.Parallel()
	for i := range 2 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			clusterOf(t, 3, func(c *script, log *logged, l *scriptMember, others []*scriptMember) {
				mute, other, term := others[i], others[1-i], l.s.Status().Term
				c.deafen(l, mute)
				c.deafen(other, mute)
				time.Sleep(2*probeVoters + stallLimit)
				must(c.t, l.s.TransferLeader(c.t.Context(), ""))
				time.Sleep(time.Second)
				if st := other.s.Status(); st.Role != Leader || st.Term != term+1 {
					c.t.Errorf("%s leads in term %d after %d, and %s is the one that reaches others", st.LeaderAddr, st.Term, term, other.conf.Addr)
				}
			})
		})
	}
}

// A follower that was cut off does not move the leader when it is back.
func TestCutOffFollowerMovesNobody(t *testing.T) {
	t.Parallel()
	clusterOf(t, 3, func(c *script, log *logged, l *scriptMember, others []*scriptMember) {
		term := l.s.Status().Term
		for range 3 {
			for _, way := range []string{others[0].name + " to " + l.name, l.name + " to " + others[0].name} {
				c.obey("cut " + way)
			}
			time.Sleep(7 * time.Second)
			c.obey("heal")
			time.Sleep(3 * time.Second)
		}
		if st := l.s.Status(); st.Role != Leader || st.Term != term {
			c.t.Errorf("the leader of term %d is %v in term %d", term, st.Role, st.Term)
		}
	})
}

// deafen has nothing of what these members ask reach a member, as behind a firewall, while it goes on asking them. None is all.
func (c *script) deafen(m *scriptMember, to ...*scriptMember) {
	c.net.serve(m.conf.Addr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if len(to) == 0 || slices.ContainsFunc(to, func(other *scriptMember) bool { return other.conf.Addr == req.RemoteAddr }) {
			<-req.Context().Done()
			return
		}
		m.s.ServeHTTP(w, req)
	}))
}

func (c *script) undeafen(m *scriptMember) { c.net.serve(m.conf.Addr, m.s) }

// clusterOf is a bubble of so many members, with a log of each.
func clusterOf(t *testing.T, n int, f func(c *script, log *logged, l *scriptMember, others []*scriptMember)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		log := newLogged("")
		c.change = func(conf *Config) { conf.Logger = slog.New(log) }
		c.obey("start a")
		for _, name := range simulatedNames[1:n] {
			c.obey("join " + name + " via a")
		}
		c.obey(fmt.Sprint("await voters ", n))
		l, err := leaderOf(c.members)
		must(t, err)
		time.Sleep(2 * time.Second)
		f(c, log, l, slices.DeleteFunc(slices.Clone(c.members), func(m *scriptMember) bool { return m == l }))
	})
}

// Members that can call nobody of the other side do not lead, and move nobody who does.
func TestOneSideCallsNobodyOfTheOther(t *testing.T) {
	t.Parallel()
	for n, deaf := range map[int]int{3: 1, 5: 2} {
		t.Run(fmt.Sprintf("%d of %d", deaf, n), func(t *testing.T) {
			t.Parallel()
			clusterOf(t, n, func(c *script, log *logged, l *scriptMember, others []*scriptMember) {
				term := l.s.Status().Term
				side := others[:deaf]
				for _, m := range append(slices.Clone(others[deaf:]), l) {
					c.deafen(m, side...)
				}
				for range dose(1, 5) {
					time.Sleep(time.Minute)
				}
				if st := l.s.Status(); st.Role != Leader || st.Term != term {
					c.t.Errorf("the leader of term %d is %v in term %d", term, st.Role, st.Term)
				}
				c.obey("set " + others[deaf].name + " k v")
			})
		})
	}
	t.Run("the leader", func(t *testing.T) {
		t.Parallel()
		clusterOf(t, 3, func(c *script, log *logged, l *scriptMember, others []*scriptMember) {
			for _, m := range others {
				c.deafen(m, l)
			}
			time.Sleep(10 * time.Second)
			term := others[0].s.Status().Term
			for range dose(1, 5) {
				time.Sleep(time.Minute)
			}
			for _, m := range others {
				if st := m.s.Status(); st.Term != term || st.LeaderID == "" || st.LeaderID == l.s.ident().id {
					c.t.Errorf("%s: in term %d the leader is %s, in term %d it was another one than %s", m.name, st.Term, st.LeaderAddr, term, l.conf.Addr)
				}
			}
		})
	})
}

// A leader that nobody reaches hands over within ten seconds, once, and the others write again. Its followers say what is wrong.
func TestLeaderThatNobodyReaches(t *testing.T) {
	t.Parallel()
	for _, n := range []int{3, 5} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			clusterOf(t, n, func(c *script, log *logged, l *scriptMember, others []*scriptMember) {
				term := l.s.Status().Term
				c.deafen(l)
				time.Sleep(3 * time.Second)
				ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Second)
				err := others[0].s.Ready(ctx)
				cancel()
				if want := "the leader at " + l.conf.Addr; !strings.Contains(fmt.Sprint(err), want) || strings.Contains(fmt.Sprint(err), "need") {
					c.t.Errorf("Ready says %v, and should say %q", err, want)
				}
				time.Sleep(5 * time.Second)
				for _, m := range others {
					ctx, cancel := context.WithTimeout(c.t.Context(), time.Second)
					if err := m.s.Set(ctx, "k", nil); err != nil {
						c.t.Errorf("%s does not write after ten seconds: %v", m.name, err)
					}
					cancel()
				}
				time.Sleep(30 * time.Second)
				for _, m := range others {
					if st := m.s.Status(); st.Term != term+1 || st.LeaderID == l.s.ident().id {
						c.t.Errorf("%s: the leader of term %d is %s; it was %s in term %d", m.name, st.Term, st.LeaderAddr, l.conf.Addr, term)
					}
				}
				for words, want := range map[string]int{"the leader is heard and does not answer": n - 1, "handed over": 1} {
					if texts := log.with(words); len(texts) != want || !strings.Contains(fmt.Sprint(texts), l.conf.Addr) {
						c.t.Errorf("the logs say %q", texts)
					}
				}
				if err := l.s.unfitToLead(); err == nil {
					c.t.Error("the member that nobody reaches is fit to lead")
				}
				c.undeafen(l)
				c.obey("await equal")
				time.Sleep(2 * time.Second)
				if err := l.s.unfitToLead(); err != nil {
					c.t.Errorf("reached again, it is unfit to lead: %v", err)
				}
			})
		})
	}
}

// The same on sockets: the listener is closed, which is what Shutdown of a server before Close does.
func TestLeaderWithoutListener(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	l := c.leader(t)
	term := l.s.Status().Term
	l.cut()
	next := c.leaderOtherThan(t, l)
	for _, m := range c {
		if m != l {
			must(t, m.s.Set(ctxFor(t, 5*time.Second), "k", nil))
		}
	}
	if st := next.s.Status(); st.Term != term+1 {
		t.Errorf("term %d, it was %d", st.Term, term)
	}
	l.heal()
	must(t, l.s.Ready(ctxFor(t, 10*time.Second)))
}
