package quorate

import (
	"strings"
	"testing"
	"time"
)

// Every call to every disk takes longer than the stall limit: nobody is silent, the leader stays, and what is written is acknowledged.
// Then all disks but the leader's are well, and its own hangs: it is silent as soon as the others say so.
func TestDisksOfAllHang(t *testing.T) {
	t.Parallel()
	slowBubble(t, func(c *script, l, f, g *scriptMember, slow func(*scriptMember, time.Duration)) {
		t := c.t
		time.Sleep(time.Second)
		term, committed := l.s.raft.Load().CurrentTerm(), l.s.raft.Load().CommitIndex()
		for _, m := range c.members {
			slow(m, stallLimit+2*time.Second)
		}
		end := c.write(g, 100*time.Millisecond)
		said := false
		for i := range 900 { // no t.Fatal: a Close that waits for a disk keeps the bubble's time
			time.Sleep(100 * time.Millisecond)
			if err := l.s.Err(); err != nil && strings.Contains(err.Error(), "no majority of the voters has a disk that works") {
				said = true
			}
			healthy := l.s.statusAnswer().Healthy
			if d := l.s.hanging(); d > stallLimit+time.Second/2 && healthy { // it hung before that answer too
				t.Errorf("a member is healthy whose disk hangs for %v", d)
			}
			if i > 600 && l.s.transferring.Load() != nil {
				t.Errorf("after %v the leader hands over to one whose disk is as slow", time.Duration(i)*100*time.Millisecond)
			}
			for _, m := range c.members {
				if err := m.s.silent(); err != nil {
					t.Errorf("%s is silent: %v", m.name, err)
				}
			}
		}
		if now := l.s.raft.Load().CommitIndex(); now < committed+2 {
			t.Errorf("committed in 90 s: %d entries", now-committed)
		}
		if now := l.s.raft.Load().CurrentTerm(); now != term || l.s.role() != Leader || !said {
			t.Errorf("the leader is a %v in term %d, led in %d; its Err named the disks: %v", l.s.role(), now, term, said)
		}
		slow(f, 0)
		slow(g, 0)
		slow(l, time.Minute)
		end()
		end = c.write(f, 100*time.Millisecond)
		time.Sleep(3 * stallLimit) // a call of before may still be one that ends
		if l.s.silent() == nil || f.s.role() != Leader && g.s.role() != Leader {
			t.Errorf("%s: %v, %s and %s are a %v and a %v", l.name, l.s.silent(), f.name, g.name, f.s.role(), g.s.role())
		}
		end()
		for _, m := range c.members {
			slow(m, 0)
		}
		time.Sleep(time.Minute)
	})
}

// Who counts as a voter whose disk works.
func TestOthersWork(t *testing.T) {
	t.Parallel()
	slowBubble(t, func(c *script, l, f, g *scriptMember, slow func(*scriptMember, time.Duration)) {
		expect := func(what string, want bool) {
			c.t.Helper()
			if got := l.s.othersWork(); got != want {
				c.t.Errorf("%s: a majority without the leader works: %v", what, got)
			}
		}
		expect("all", true)
		time.Sleep(time.Second)
		slow(f, 2*stallLimit)
		expect("one hangs, and nobody has found out", true)
		time.Sleep(hangShort)
		expect("one has hung for a moment", true)
		time.Sleep(time.Millisecond)
		expect("one hangs", false)
		judged := func(d time.Duration, audible bool) {
			c.t.Helper()
			if l.s.judgeHang(d); l.s.audible.Load() != audible {
				c.t.Errorf("after %v the member is audible: %v", d, !audible)
			}
		}
		judged(hangAsked-1, false)
		judged(stallLimit+1, false) // silent until the call returns
		judged(stallLimit, true)
		judged(stallLimit+1, true)
		c.net.cut(l.conf.Addr, f.conf.Addr)
		expect("one hangs and does not answer", true)
		c.net.heal()
		time.Sleep(2 * stallLimit)
		slow(f, 0)
		l.s.othersWork() // it may not have ended the next one yet
		time.Sleep(time.Second)
		judged(hangAsked-1, true)
		judged(stallLimit+1, false)
		expect("its disk works again", true)
	})
}
