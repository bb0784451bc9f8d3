package quorate

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

func TestPulse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ps pulses
		p := ps.of("x", 3)
		if ps.of("x", 3) != p || ps.of("x", 2) != nil || ps.of("y", 3) == p {
			t.Error("each peer has one in a term, and none in an older one")
		}
		due := func(want bool, when string) {
			t.Helper()
			if got := p.begin(); got != want {
				t.Errorf("%s: a heartbeat is due: %v", when, got)
			}
		}
		due(true, "at first")
		due(false, "at once")
		time.Sleep(beatPause)
		due(true, "a pause later")
		time.Sleep(beatRarely)
		due(true, "at the end of a term's first answers")
		time.Sleep(beatRarely - time.Nanosecond)
		due(false, "the peer does not answer")
		time.Sleep(time.Nanosecond)
		due(true, "the peer does not answer, much later")
		for range 4 {
			p.ends(&beat{err: errors.New("lost"), at: time.Now()})
		}
		due(true, "none is on its way")
		ps.hears("x")
		for i := 1; i < beatsMost; i++ {
			time.Sleep(beatPause)
			ps.hears("x")
			due(true, fmt.Sprint(i, " are on their way"))
		}
		time.Sleep(beatPause)
		due(false, "the most are on their way")
		if next := ps.of("x", 4); next == p || next == nil {
			t.Error("the next term goes on with the last one's")
		}
	})
}

// Raft takes an answer for a sign of life of this moment, and a failure for one of the heartbeat that it has sent.
func TestAnswerOfAHeartbeat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ps pulses
		p := ps.of("x", 3)
		failed := errors.New("lost")
		ends := func(err error) {
			p.begin()
			p.ends(&beat{resp: raft.AppendEntriesResponse{Term: 3}, err: err, at: time.Now()})
		}
		began := time.Now()
		expect := func(what string, want string) {
			t.Helper()
			got := "nothing"
			if b := p.take(began); b != nil {
				got = fmt.Sprint(b.err, b.resp.Term)
			}
			if got != want {
				t.Errorf("%s: %s, want %s", what, got, want)
			}
		}
		expect("at first", "nothing")
		ends(nil)
		began = time.Now().Add(1)
		time.Sleep(aheadFresh)
		expect("a fresh answer", "<nil> 3")
		expect("once", "nothing")
		ends(nil)
		began = time.Now().Add(1)
		time.Sleep(aheadFresh + time.Nanosecond)
		expect("an old answer, to a heartbeat of before", "nothing")
		began = time.Now()
		ends(nil)
		time.Sleep(time.Second) // without a processor
		expect("one that came since", "<nil> 3")
		ends(failed)
		expect("a failure", "lost 3")
		ends(nil)
		ends(failed)
		expect("both", "<nil> 3")
		expect("both, again", "nothing")
		ends(failed)
		began = time.Now().Add(1)
		expect("a failure of before", "nothing")
	})
}

// longWays is a bubble in which every message takes so long, and every fsync.
func longWays(t *testing.T, way, fsync time.Duration, f func(t *testing.T, c *script, l, f, g *scriptMember)) {
	t.Helper()
	slowBubble(t, func(c *script, l, f1, f2 *scriptMember, slow func(*scriptMember, time.Duration)) {
		for _, from := range c.members {
			slow(from, fsync)
			for _, to := range c.members {
				if from != to {
					c.net.delay(from.conf.Addr, to.conf.Addr, way)
				}
			}
		}
		f(c.t, c, l, f1, f2)
		c.net.heal()
	})
}

// Answers take 400 ms: the leader stays, its followers hear it as often as over a short way, and all write. When it is gone another one
// leads, and stays.
func TestHeartbeatsOverLongWays(t *testing.T) {
	t.Parallel()
	for _, way := range []time.Duration{200 * time.Millisecond, 235 * time.Millisecond} {
		t.Run(way.String(), func(t *testing.T) {
			t.Parallel()
			longWays(t, way, 300*time.Millisecond, func(t *testing.T, c *script, l, f, g *scriptMember) {
				term := l.s.raft.Load().CurrentTerm()
				stays := func(l *scriptMember, term uint64, followers ...*scriptMember) {
					t.Helper()
					for range 200 {
						time.Sleep(50 * time.Millisecond)
						for _, m := range followers {
							if d := m.s.leaderSilence(); d > 3*beatPause {
								t.Fatalf("%s has not heard its leader for %v", m.name, d)
							}
						}
					}
					if now := l.s.raft.Load().CurrentTerm(); now != term || l.s.role() != Leader {
						t.Fatalf("%s is a %v in term %d, led in %d", l.name, l.s.role(), now, term)
					}
				}
				time.Sleep(time.Second)
				stays(l, term, f, g)
				c.obey("set " + f.name + " k 1")
				c.obey("kill " + l.name)
				c.leads(nil, 5*time.Minute) // of two candidates that hear of each other so late each may have its own vote
				next := c.cast["L"]
				other := f
				if next == f {
					other = g
				}
				c.obey("set " + other.name + " k 2")
				term = next.s.raft.Load().CurrentTerm()
				stays(next, term, other)
			})
		})
	}
}
