package quorate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
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
		for _, m := range c.running(nil) {
			if st := m.s.Status(); !st.LeaderSince.After(killed) {
				t.Errorf("%s follows the new leader since %v, before the old one was killed at %v", m.name, st.LeaderSince, killed)
			}
		}
		time.Sleep(time.Second)
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
			{&foreignAnswer{404, "not found"}, time.Now(), false, true},
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
