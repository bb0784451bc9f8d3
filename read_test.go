package quorate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// bubble runs f with a cluster of three in a synctest bubble: a, b and c, of which l leads.
func bubble(t *testing.T, f func(t *testing.T, c *script, l, f1, f2 *scriptMember)) {
	t.Helper()
	bubbleOf(t, nil, f)
}

// bubbleOf is bubble with members whose Config is changed.
func bubbleOf(t *testing.T, change func(*Config), f func(t *testing.T, c *script, l, f1, f2 *scriptMember)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		c.change = change
		defer c.end()
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "cast leader L followers F G"} {
			c.obey(line)
		}
		f(t, c, c.cast["L"], c.cast["F"], c.cast["G"])
	})
}

// A Get that comes while a round is in flight waits for the next one: the index of the one in flight may have been taken
// before a write that has returned meanwhile.
func TestRoundInFlightIsNotJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		runs := uint64(0)
		land := make(chan struct{})
		r := newRounds(ctx, func(ctx context.Context) (readPoint, error) {
			runs++
			at := readPoint{index: runs}
			select {
			case <-land:
				return at, nil
			case <-ctx.Done():
				return at, ctx.Err()
			}
		})
		var carry sync.WaitGroup
		carry.Go(r.carry)
		type landed struct {
			index uint64
			err   error
		}
		join := func(ctx context.Context) chan landed {
			c := make(chan landed, 1)
			go func() {
				at, err := r.join(ctx)
				c <- landed{at.index, err}
			}()
			synctest.Wait()
			return c
		}
		want := func(c chan landed, index uint64, err error) {
			t.Helper()
			if got := <-c; got.index != index || !errors.Is(got.err, err) {
				t.Errorf("a round ends with %d, %v, want %d, %v", got.index, got.err, index, err)
			}
		}

		first := join(ctx)
		impatient, leave := context.WithCancel(ctx)
		second, third, gone := join(ctx), join(ctx), join(impatient)
		leave()
		want(gone, 0, context.Canceled)
		land <- struct{}{}
		want(first, 1, nil)
		synctest.Wait() // the second round is in flight
		fourth := join(ctx)
		land <- struct{}{}
		want(second, 2, nil)
		want(third, 2, nil)
		land <- struct{}{}
		want(fourth, 3, nil)

		// Who flies a round alone takes it down with its own context, and nobody else's.
		impatient, leave = context.WithCancel(ctx)
		fifth := join(impatient)
		sixth := join(ctx)
		leave()
		want(fifth, 4, context.Canceled)
		land <- struct{}{}
		want(sixth, 5, nil)

		// A round that nobody answers ends by itself.
		seventh := join(ctx)
		want(seventh, 6, context.DeadlineExceeded)

		eighth := join(context.WithoutCancel(ctx))
		ninth := join(context.WithoutCancel(ctx))
		cancel()
		want(ninth, 0, ErrClosed)
		want(eighth, 7, context.DeadlineExceeded)
		carry.Wait()
	})
}

// Those who had a round together have the next one together, too.
func TestRoundsGather(t *testing.T) {
	// The wait for the others is counted in turns of the scheduler: on one processor each of them has its turn, whatever else runs.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		runs := uint64(0)
		land := make(chan struct{})
		r := newRounds(ctx, func(context.Context) (readPoint, error) {
			runs++
			at := readPoint{index: runs}
			<-land
			return at, nil
		})
		var all sync.WaitGroup
		all.Go(r.carry)
		join := func() uint64 {
			at, err := r.join(ctx)
			must(t, err)
			return at.index
		}
		all.Go(func() { join() })
		synctest.Wait() // the first round is in flight, and the second one forms
		next := make(chan uint64, gatherFrom)
		for range gatherFrom {
			all.Go(func() { join(); next <- join() })
		}
		synctest.Wait()
		land <- struct{}{}
		land <- struct{}{}
		synctest.Wait()
		land <- struct{}{}
		for range gatherFrom {
			if got := <-next; got != 3 {
				t.Errorf("round %d, want 3", got)
			}
		}
		synctest.Wait() // nobody else has come, and the place is free again
		again := make(chan uint64, 1)
		all.Go(func() { again <- join() })
		land <- struct{}{}
		if got := <-again; got != 4 {
			t.Errorf("round %d, want 4", got)
		}
		cancel()
		all.Wait()
	})
}

// A round that has failed confirms nobody, and says so to others.
func TestFailedRoundConfirmsNobody(t *testing.T) {
	fails := errLost
	r := newRounds(t.Context(), func(context.Context) (readPoint, error) { return readPoint{}, fails })
	if _, err := r.join(t.Context()); err != errLost {
		t.Error(err)
	}
	if ms, d := r.confirmedMillis(), r.confirmedFor(); ms != 0 || d < time.Minute {
		t.Errorf("confirmed %d ms ago, %v", ms, d)
	}
	fails = nil
	_, err := r.join(t.Context())
	must(t, err)
	if ms, d := r.confirmedMillis(), r.confirmedFor(); ms == 0 || d > patience {
		t.Errorf("confirmed %d ms ago, %v", ms, d)
	}
}

// A read whose context ends before what it must see is applied is no read.
func TestReadThatDoesNotGetThere(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	st := s.Status()
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(errLost) })
	if err := s.awaitApplied(ctx, st.LastIndex+100, st.Term); err != errLost {
		t.Errorf("error %v, want the cause", err)
	}
}

func TestLeaderRoundNeedsQuorumOfItsTerm(t *testing.T) {
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		term := l.s.Status().Term
		config := l.s.raft.Load().GetConfiguration().Configuration()
		confirm := func(term uint64) error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			return l.s.confirmTerm(ctx, term, config)
		}
		must(t, confirm(term))
		if err := confirm(term - 1); !errors.Is(err, errNotLeading) {
			t.Errorf("a quorum in a later term: %v, want %v", err, errNotLeading)
		}
		if err := confirm(term + 1); !errors.Is(err, ErrNoLeader) {
			t.Errorf("a quorum in an earlier term: %v, want %v", err, ErrNoLeader)
		}
		if _, err := f.s.leaderRound(t.Context()); !errors.Is(err, errNotLeading) {
			t.Errorf("a round on a follower: %v, want %v", err, errNotLeading)
		}
		c.obey("cut L to F")
		must(t, confirm(term))
		c.obey("cut G to L")
		if err := confirm(term); !errors.Is(err, ErrNoLeader) {
			t.Errorf("no other voter answers: %v, want %v", err, ErrNoLeader)
		}
	})
}

func TestHalfOfTheVotersIsNoQuorum(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		r := l.s.raft.Load()
		must(t, r.AddVoter("fourth", "fourth:1", 0, time.Second).Error())
		must(t, l.s.Set(t.Context(), "k", nil))
		term, config := l.s.Status().Term, r.GetConfiguration().Configuration()
		confirm := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			return l.s.confirmTerm(ctx, term, config)
		}
		must(t, confirm())
		if _, ok := l.s.roundWith(f.s.ident().id, term); ok {
			t.Error("the leader and the member that asks are a quorum of four")
		}
		c.obey("cut G to L")
		if err := confirm(); !errors.Is(err, ErrNoLeader) {
			t.Errorf("two of four voters confirm: %v", err)
		}
	})
}

// A new leader does not know how far the old one had got, until it has applied an entry of its own term.
func TestNoReadBeforeTheLeadersOwnTerm(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		must(t, l.s.Set(t.Context(), "k", []byte("new")))
		must(t, f.s.catchUp(t.Context()))
		if err := l.s.awaitTerm(t.Context(), l.s.Status().Term+1); !errors.Is(err, errNotLeading) {
			t.Errorf("a state of term %d is ready for the next one: %v", l.s.Status().Term, err)
		}
		release := make(chan struct{})
		for _, m := range []*scriptMember{f, g} {
			c.net.serve(m.conf.Addr, withoutEntries(m.s, release))
		}
		c.obey("kill L")
		c.obey("elect N among F G")
		n := c.cast["N"]
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if v, err := n.s.Get(ctx, "k"); err == nil {
			t.Errorf("a leader that has nothing of its term in its state reads %q", v)
		}
		for _, m := range []*scriptMember{f, g} {
			if _, ok := n.s.roundWith(m.s.ident().id, n.s.Status().Term); ok && m != n {
				t.Error("it holds a round with a follower")
			}
		}
		close(release)
		if v, err := n.s.Get(ctxFor(t, patience), "k"); err != nil || string(v) != "new" {
			t.Errorf("%q, %v", v, err)
		}
	})
}

// The follower that asks is the quorum's other half: it is believed if it has a vote here and states the leader's term.
func TestStatementCompletesRound(t *testing.T) {
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		must(t, l.s.Set(t.Context(), "k", []byte("v")))
		term := l.s.Status().Term
		r := l.s.raft.Load()
		must(t, r.AddNonvoter("n", "n:1", 0, time.Second).Error())
		c.obey("cut L to F") // nobody else can answer the leader
		c.obey("cut L to G")
		for _, x := range []struct {
			from   string
			states uint64
			ok     bool
		}{
			{f.s.ident().id, term, true},
			{f.s.ident().id, 0, false},
			{f.s.ident().id, term - 1, false},
			{f.s.ident().id, term + 1, false},
			{"n", term, false}, // has no vote
			{"x", term, false},
			{l.s.ident().id, term, false},
		} {
			at, ok := l.s.roundWith(x.from, x.states)
			if ok != x.ok || ok && (at.term != term || at.index != r.CommitIndex()) {
				t.Errorf("a round with %s, which states term %d of %d: %v, %v", x.from, x.states, term, at, ok)
			}
		}
		if _, ok := f.s.roundWith(g.s.ident().id, term); ok {
			t.Error("a follower holds a round")
		}

		before := c.net.arrivals()
		c.obey("heal")
		if v, err := f.s.Get(t.Context(), "k"); err != nil || string(v) != "v" {
			t.Fatalf("%q, %v", v, err)
		}
		after := c.net.arrivals()
		for where, want := range map[string]int{l.conf.Addr + " readindex": 1, f.conf.Addr + " term": 0, g.conf.Addr + " term": 0} {
			if n := after[where] - before[where]; n != want {
				t.Errorf("a follower's Get: %d calls to %s, want %d", n, where, want)
			}
		}
	})
}

// While raft is started, the one that is asked for its term may not be the one that votes.
func TestNoTermIsStatedWhileRaftStarts(t *testing.T) {
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		f.s.starts.Add(1)
		var r *refusal
		if _, err := l.s.peer.askTerm(t.Context(), f.s.ident().id, f.conf.Addr); !errors.As(err, &r) || r.Code != codeNotReady {
			t.Errorf("a member that starts raft is asked for its term: %v", err)
		}
		if _, err := f.s.readIndex(t.Context()); err == nil {
			t.Error("a member that starts raft states its term")
		}
		f.s.starts.Add(1)
		if _, err := f.s.readIndex(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// A round asks no more voters than it needs, each in turn, and one that does not answer costs one round's patience.
func TestLeaderRoundAsksInTurn(t *testing.T) {
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		asked := func(rounds int) (ofF, ofG int, took time.Duration) {
			t.Helper()
			before, began := c.net.arrivals(), time.Now()
			for range rounds {
				if _, err := l.s.Get(t.Context(), "k"); err != nil {
					t.Fatal(err)
				}
			}
			after := c.net.arrivals()
			return after[f.conf.Addr+" term"] - before[f.conf.Addr+" term"], after[g.conf.Addr+" term"] - before[g.conf.Addr+" term"], time.Since(began)
		}
		time.Sleep(tryAfter) // nothing is left of the start
		asked(2)
		if ofF, ofG, took := asked(40); ofF != 20 || ofG != 20 || took != 0 {
			t.Errorf("40 rounds in %v asked one voter %d times and the other %d times", took, ofF, ofG)
		}
		c.obey("cut L to F")
		if _, ofG, took := asked(40); ofG != 40 || took != hedgeAfter {
			t.Errorf("40 rounds while one voter is cut off took %v and asked the other %d times", took, ofG)
		}
		time.Sleep(tryAfter)
		if _, ofG, took := asked(40); ofG != 40 || took != 0 {
			t.Errorf("40 more took %v and asked the other %d times", took, ofG)
		}
		c.obey("heal")
		time.Sleep(roundTimeout)
		asked(1)
		time.Sleep(tryAfter)
		if ofF, ofG, took := asked(40); ofF != 20 || ofG < 20 || took != 0 {
			t.Errorf("40 rounds after that took %v and asked one voter %d times and the other %d times", took, ofF, ofG)
		}
	})
}

// A voter that never answers has no more than so many calls waiting for it, however many rounds there are.
func TestCallsToASilentVoterAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		var silent raft.Server
		for _, m := range l.s.others() {
			if string(m.ID) == f.s.ident().id {
				silent = m
			}
		}
		c.obey("cut L to F")
		answers := make(chan answer, 3*maxAsks)
		for range 3 * maxAsks {
			go l.s.askTerm(silent, answers)
		}
		synctest.Wait()
		if n := len(answers); n < 2*maxAsks {
			t.Errorf("%d of %d calls are refused", n, 3*maxAsks)
		}
		if a := <-answers; a.err == nil || !strings.Contains(a.err.Error(), "has not answered") {
			t.Errorf("%+v", a)
		}
	})
}

// A cut off member answers a Get with an error that tells both, that nobody leads and that the time is over.
func TestGetOnMemberCutOff(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		must(t, l.s.Set(t.Context(), "k", []byte("old")))
		c.obey("partition {L} {F} {G}")
		for _, limit := range []time.Duration{time.Millisecond, time.Second, 5 * time.Second} {
			for _, m := range []*scriptMember{l, f} {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				began := time.Now()
				v, err := m.s.Get(ctx, "k")
				cancel()
				if v != nil || !errors.Is(err, ErrNoLeader) || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("after %v %s answers %q, %v", limit, m.name, v, err)
				}
				if late := time.Since(began) - limit; late > time.Millisecond {
					t.Errorf("Get returns %v after its context ended", late)
				}
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.s.Get(ctx, "k"); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoLeader) {
			t.Errorf("with a context that has ended Get says %v", err)
		}
	})
}

// TestGetSeesWriteElsewhere writes on one member and reads on each, while others write.
func TestGetSeesWriteElsewhere(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ctx := ctxFor(t, time.Minute)
	noise, stop := context.WithCancel(ctx)
	var writers sync.WaitGroup
	for i, m := range c {
		writers.Go(func() {
			for n := 0; noise.Err() == nil; n++ {
				m.s.Set(noise, fmt.Sprint("noise", i), []byte(fmt.Sprint(n)))
			}
		})
	}
	var rounds sync.WaitGroup
	for i, writer := range c {
		rounds.Go(func() {
			key := fmt.Sprint("k", i)
			for n := range 60 {
				want := fmt.Sprint(n)
				if err := writer.s.Set(ctx, key, []byte(want)); err != nil {
					t.Error(err)
					return
				}
				if v := writer.s.Stale().Get(key); string(v) != want {
					t.Errorf("Set returned and Stale on the same member is %q, want %q", v, want)
				}
				for j, reader := range c {
					if v, err := reader.s.Get(ctx, key); err != nil || string(v) != want {
						t.Errorf("member %d reads %q, %v after member %d has written %q", j, v, err, i, want)
					}
				}
			}
		})
	}
	rounds.Wait()
	stop()
	writers.Wait()
}

// Nobody passes a forwarded write on: two members that take each other for the leader would do it for ever.
func TestForwardedWriteIsNotForwarded(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		before := c.net.arrivals()
		_, sent, err := f.s.peer.propose(t.Context(), g.s.ident().id, g.conf.Addr, encodeOpen(firstFormat, [16]byte{1}))
		var r *refusal
		if sent || !errors.As(err, &r) {
			t.Fatalf("a write sent to a follower: sent %v, %v", sent, err)
		}
		if r.Status != http.StatusMisdirectedRequest || r.LeaderID != l.s.ident().id || r.LeaderAddr != l.conf.Addr {
			t.Errorf("a follower answers %+v, want status 421 and the leader at %s", r, l.conf.Addr)
		}
		after := c.net.arrivals()
		if n := after[g.conf.Addr+" propose"] - before[g.conf.Addr+" propose"]; n != 1 {
			t.Errorf("%d writes came to the follower, want 1", n)
		}
		if n := after[l.conf.Addr+" propose"] - before[l.conf.Addr+" propose"]; n != 0 {
			t.Errorf("the follower passed on %d", n)
		}
	})
}

// TestForwardedWritesThroughLeaderDeaths kills leader after leader under the followers' writes. Each insert is of a key of
// its own, so each must succeed, and as every effect takes one revision, the revision counts how often they had any: also
// a set twice, which nothing else would show.
func TestForwardedWritesThroughLeaderDeaths(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, _, _, _ *scriptMember) {
		for round := range 4 {
			c.obey("cast leader L followers F G")
			before := c.cast["L"].s.Status().Revision
			var done atomic.Uint64
			var writers sync.WaitGroup
			var stop atomic.Bool
			for _, name := range []string{"F", "G"} {
				m := c.cast[name]
				for w := range 4 {
					writers.Go(func() {
						for n := 0; !stop.Load(); n++ {
							key := fmt.Sprintf("%d/%s/%d/%d", round, name, w, n)
							ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
							write := m.s.Insert
							if n%2 == 1 {
								write = m.s.Set
							}
							err := write(ctx, key, []byte(key))
							cancel()
							if err != nil {
								t.Errorf("write %s: %v", key, err)
								return
							}
							done.Add(1)
							time.Sleep(time.Millisecond) // time passes only while everybody waits
						}
					})
				}
			}
			// Messages take time, so that some of every kind are on their way when the leader dies.
			for _, way := range []string{"L to F", "F to L", "L to G", "G to L"} {
				c.obey(fmt.Sprintf("delay %s %dms", way, 2*round))
			}
			time.Sleep(100*time.Millisecond + time.Duration(round)*time.Millisecond)
			c.obey("kill L")
			c.obey("heal")
			c.obey("elect N among F G")
			time.Sleep(100 * time.Millisecond)
			stop.Store(true)
			writers.Wait()
			c.obey("restart L")
			c.obey("await equal")
			if got := c.cast["N"].s.Status().Revision - before; got != done.Load() {
				t.Errorf("%d writes returned nil, and %d took effect", done.Load(), got)
			}
		}
	})
}

// swallowed is a client whose connections die without a word, once it is told so: one call that forwards a write is never
// answered, though the leader lives.
type swallowed struct {
	http.RoundTripper
	next atomic.Bool
}

func (c *swallowed) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Path == "/raft/propose" && c.next.CompareAndSwap(true, false) {
		<-req.Context().Done()
		return nil, context.Cause(req.Context())
	}
	return c.RoundTripper.RoundTrip(req)
}

func TestForwardedWriteOnADeadConnection(t *testing.T) {
	t.Parallel()
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	line := &swallowed{RoundTripper: transport}
	c := newCluster(t, 3, func(conf *Config) { conf.Client = &http.Client{Transport: line} })
	f := c.follower(t)
	must(t, f.s.Set(ctxFor(t, 20*time.Second), "before", nil))
	line.next.Store(true)
	must(t, f.s.Set(ctxFor(t, 30*time.Second), "k", []byte("v")))
	if line.next.Load() {
		t.Error("nothing was swallowed: the follower has become the leader")
	}
	if v, err := c.leader(t).s.Get(ctxFor(t, 20*time.Second), "k"); err != nil || string(v) != "v" {
		t.Errorf("%q, %v", v, err)
	}
}
