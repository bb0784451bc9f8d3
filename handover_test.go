package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// newVoters begins a script of so many voters, a the first of the configuration.
func newVoters(t *testing.T, n int) *script {
	t.Helper()
	c := newScript(t)
	c.obey("start a")
	for _, name := range simulatedNames[1:n] {
		c.obey("join " + name + " via a")
	}
	c.obey(fmt.Sprint("await voters ", n))
	return c
}

// leads waits until one of the running members leads, and takes at most so long.
func (c *script) leads(want *scriptMember, within time.Duration) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), within)
	defer cancel()
	if got := c.poll(ctx, func() error {
		l, err := leaderOf(c.running(nil))
		if err == nil && want != nil && l != want {
			err = fmt.Errorf("%s leads", l.name)
		}
		if err == nil {
			c.cast["L"] = l
		}
		return err
	}); got != "ok" {
		c.t.Fatalf("the new leader: %s", got)
	}
}

// A dead voter that stands first in the configuration of an idle cluster takes no hand-over, whoever asks for it and why.
func TestHandOverPastADeadVoter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newVoters(t, 5)
		defer c.end()
		c.leads(nil, scriptLimit)
		b := c.member("b")
		must(t, c.member("c").s.TransferLeader(t.Context(), b.conf.Addr))
		c.leads(b, scriptLimit)
		c.obey("kill a")
		c.obey("advance 2s")
		for _, step := range []struct {
			what string
			do   func(l *scriptMember) error
		}{
			{"TransferLeader on the leader", func(l *scriptMember) error { return l.s.TransferLeader(t.Context(), "") }},
			{"TransferLeader on a follower", func(l *scriptMember) error {
				for _, m := range c.running(nil) {
					if m != l {
						return m.s.TransferLeader(t.Context(), "")
					}
				}
				return nil
			}},
			{"RemoveMember of the leader", func(l *scriptMember) error { return l.s.RemoveMember(t.Context(), l.conf.Addr) }},
			{"Close", func(l *scriptMember) error {
				s := l.s
				l.s = nil
				return s.Close()
			}},
		} {
			l, began := c.cast["L"], time.Now()
			if err := step.do(l); err != nil {
				t.Fatalf("%s: %v", step.what, err)
			}
			if strings.HasPrefix(step.what, "Remove") {
				c.obey("stop " + l.name)
			}
			c.leads(nil, scriptLimit)
			if took := time.Since(began); c.cast["L"] == l || took > 450*time.Millisecond {
				t.Errorf("%s: %s leads after %v, %s did", step.what, c.cast["L"].name, took, l.name)
			}
			c.obey("advance 1s")
		}
	})
}

func TestTransferLeaderRefusals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newVoters(t, 3)
		defer c.end()
		c.leads(nil, scriptLimit)
		c.obey("cast leader L followers F G")
		l, f, g := c.cast["L"].s, c.cast["F"], c.cast["G"]
		term := l.Status().Term
		for _, s := range []*Service{l, f.s} {
			is(t, s.TransferLeader(t.Context(), "nowhere"), ErrInvalid)
			is(t, s.TransferLeader(t.Context(), "x.test:7001"), ErrNotApplied, "no member is at x.test:7001")
			must(t, s.TransferLeader(t.Context(), c.cast["L"].conf.Addr)) // it leads
			f.s.faults.set(faultRaft, errors.New("raft is broken"))
			is(t, s.TransferLeader(t.Context(), f.conf.Addr), ErrNotApplied, "unfit to lead: raft is broken", c.cast["L"].conf.Addr+" stays the leader")
			f.s.faults.set(faultRaft, nil)
		}
		gone := g.s
		c.obey("kill G")
		is(t, l.TransferLeader(t.Context(), g.conf.Addr), ErrNotApplied, "no other voter can lead now", g.conf.Addr)
		is(t, gone.TransferLeader(t.Context(), ""), ErrNotApplied)
		if st := l.Status(); st.Role != Leader || st.Term != term {
			t.Errorf("%v of term %d, was %d", st.Role, st.Term, term)
		}
		c.obey("kill F")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := l.TransferLeader(ctx, ""); !errors.Is(err, ErrNotApplied) {
			t.Errorf("without a majority: %v", err)
		}
	})
	lone := newMember(t, "").startAlone(t)
	is(t, lone.TransferLeader(t.Context(), ""), ErrNotApplied, "there is none")
	lone.Close()
	is(t, lone.TransferLeader(t.Context(), ""), ErrClosed)
}

// A non-voter is not handed over to.
func TestTransferLeaderToNonVoter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newVoters(t, 3)
		defer c.end()
		c.leads(nil, scriptLimit)
		c.obey("cast leader L followers F G")
		c.obey("kill G") // nobody is promoted meanwhile
		c.obey("join d via L")
		is(t, c.cast["F"].s.TransferLeader(t.Context(), c.member("d").conf.Addr), ErrInvalid, "has no vote")
	})
}

// holdAppends stands before a member: it holds the appends but lets heartbeats through while on is set.
func holdAppends(on *atomic.Bool, release chan struct{}, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if filepath.Base(req.URL.Path) == "append" && on.Load() {
			body, _ := io.ReadAll(req.Body)
			req.Body = io.NopCloser(bytes.NewReader(body))
			if a, err := decodeAppend(body); err == nil && !isHeartbeat(a) {
				select {
				case <-release:
				case <-req.Context().Done():
				}
			}
		}
		next.ServeHTTP(w, req)
	})
}

// Two hand-overs to a voter whose append is held, and the cluster writes on: raft alone would refuse every write until it answers.
func TestHandOverToHeldVoter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		var on atomic.Bool
		release := make(chan struct{})
		c.obey("start a")
		c.obey("join b via a")
		c.front = func(h http.Handler) http.Handler { return holdAppends(&on, release, h) }
		c.obey("join c via a")
		c.obey("await voters 3")
		held := c.member("c")
		c.leads(nil, scriptLimit)
		if c.cast["L"] == held {
			must(t, held.s.TransferLeader(t.Context(), c.member("a").conf.Addr))
			c.leads(c.member("a"), scriptLimit)
		}
		l := c.cast["L"].s
		c.obey("await equal")
		on.Store(true)
		c.obey("set L k 1") // the held one does not have it
		for i, words := range []string{"hand over to", "no append since the last hand-over", "no append"} {
			is(t, l.TransferLeader(t.Context(), held.conf.Addr), ErrNotApplied, words)
			began := time.Now()
			c.obey(fmt.Sprint("set L k ", i))
			c.obey("set b k x")
			if took := time.Since(began); took > 1500*time.Millisecond {
				t.Errorf("after %d hand-overs a write took %v", i+1, took)
			}
		}
		close(release)
		on.Store(false)
		eventually(t, scriptLimit, "the held one takes over", func() error { return l.TransferLeader(t.Context(), held.conf.Addr) })
		c.leads(held, scriptLimit)
	})
}

// A leader that is unfit is relieved by a fit voter, stays where there is none, and does not come back at once.
func TestUnfitLeaderIsRelieved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newVoters(t, 3)
		defer c.end()
		c.leads(nil, scriptLimit)
		c.obey("cast leader L followers F G")
		l, f, g := c.cast["L"], c.cast["F"], c.cast["G"]
		unfit := func(m *scriptMember) { m.s.faults.set(faultRaft, errors.New("raft is broken")) }
		fit := func(m *scriptMember) { m.s.faults.set(faultRaft, nil) }
		unfit(g)
		unfit(l)
		c.leads(f, 1500*time.Millisecond)
		unfit(f)
		term := f.s.Status().Term
		c.obey("advance 5s")
		if st := f.s.Status(); st.Term != term || st.Role != Leader {
			t.Errorf("nobody is fit, and it is %v of term %d after %d", st.Role, st.Term, term)
		}
		c.obey("set G k v")
		fit(l)
		c.leads(l, 2500*time.Millisecond)
		fit(f)
		unfit(l) // it was relieved a moment ago
		c.obey("advance 20s")
		if st := l.s.Status(); st.Role != Leader {
			t.Errorf("relieved twice within a minute: %v", st.Role)
		}
		c.obey("advance 40s")
		c.leads(f, scriptLimit)
	})
}

func TestReliefPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var r relief
		wait := func() time.Duration {
			began := time.Now()
			for !r.due(false) {
				time.Sleep(time.Second)
			}
			return time.Since(began)
		}
		for i, want := range []time.Duration{0, time.Minute, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute, 10 * time.Minute, 10 * time.Minute} {
			if got := wait(); got != want {
				t.Errorf("relief %d after %v, want %v", i, got, want)
			}
			r.tried(nil)
		}
		time.Sleep(21 * time.Minute)
		r.tried(nil) // as good as the first
		if got := wait(); got != time.Minute {
			t.Errorf("after a quiet time: %v", got)
		}
		r.tried(fmt.Errorf("x: %w", errNobody))
		if got := wait(); got != 0 {
			t.Errorf("with nobody to hand over to: %v", got)
		}
		r.tried(errors.New("raft did not"))
		if got := wait(); got != reliefAgain {
			t.Errorf("after a failure: %v", got)
		}
	})
}

// All three are unfit whenever they lead. What they say of their reliefs keeps the lead where it is for longer and longer.
func TestReliefsOfAllMembers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		members := []*Service{{wal: &logStore{}, fsm: &fsm{}}, {wal: &logStore{}, fsm: &fsm{}}, {wal: &logStore{}, fsm: &fsm{}}}
		var minutes [40]int
		leader, relief := 0, choice{relief: true}
		var last time.Time
		for began := time.Now(); time.Since(began) < time.Duration(len(minutes))*time.Minute; time.Sleep(time.Second) {
			l := members[leader]
			if !l.relief.due(true) {
				continue
			}
			found := survey{voters: 3, ready: 3, relieved: l.relief.lately()}
			for i, m := range members {
				if m == l {
					continue
				}
				a := statusAnswer{LastIndex: uint64(i)}
				a.Relieved, a.Rests = m.relief.answer()
				found.hears(a)
				found.add(&candidate{Server: raft.Server{ID: raft.ServerID(fmt.Sprint(i))}, answer: a}, l.rests(a, relief))
			}
			to, err := found.choose(relief)
			l.relief.tried(err)
			if err == nil {
				minutes[int(time.Since(began).Minutes())]++
				if time.Since(last) < reliefSoon {
					t.Error("one was relieved just after another")
				}
				last = time.Now()
				leader = int(to.ID[0] - '0')
			} else if !errors.Is(err, errTooSoon) {
				t.Fatal(err)
			}
		}
		early, late := 0, 0
		for i, n := range minutes {
			if n > reliefsMost {
				t.Errorf("%d changes in minute %d", n, i)
			}
			if i < 10 {
				early += n
			} else if i >= 30 {
				late += n
			}
		}
		if minutes[0] == 0 || late == 0 || late > 4 || late >= early {
			t.Errorf("changes by minutes: %v", minutes)
		}
	})
}

// A member that is unfit stands last in an election, and not never.
func TestUnfitMemberStandsLast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newVoters(t, 3)
		defer c.end()
		broken := errors.New("raft is broken")
		for range 4 {
			c.leads(nil, scriptLimit)
			c.obey("cast leader L followers F G")
			f, g := c.cast["F"], c.cast["G"]
			f.s.faults.set(faultRaft, broken)
			c.obey("partition {L} {F G}")
			c.obey("elect N among F G")
			if c.cast["N"] != g {
				t.Fatal("the unfit one leads")
			}
			c.obey("heal")
			f.s.faults.set(faultRaft, nil)
			c.leads(g, scriptLimit)
		}
		c.obey("cast leader L followers F G")
		c.cast["F"].s.faults.set(faultRaft, broken)
		c.cast["G"].s.faults.set(faultRaft, broken)
		c.obey("kill L")
		began := time.Now()
		c.leads(nil, scriptLimit)
		if took := time.Since(began); took < lastTurn || took > 4*lastTurn {
			t.Errorf("two unfit ones elected one of them after %v", took)
		}
	})
}

// The best of several is fit, has a quick disk, ranks highest, has the longest log.
func TestBetterCandidate(t *testing.T) {
	t.Parallel()
	with := func(id, unfit string, rank int, last uint64) *candidate {
		return &candidate{Server: raft.Server{ID: raft.ServerID(id)}, answer: statusAnswer{Unfit: unfit, LastIndex: last}, rank: rank}
	}
	slow := with("s", "", 9, 99)
	slow.answer.Fsync = slowAppend.Microseconds() + 1
	list := []*candidate{with("e", "full", 9, 99), slow, with("d", "", 1, 99), with("c", "", 2, 5), with("b", "", 2, 7), with("a", "", 2, 7)}
	for i, worse := range list {
		if !worse.better(nil) {
			t.Errorf("%s is not better than nobody", worse.ID)
		}
		for _, better := range list[i+1:] {
			if !better.better(worse) || worse.better(better) {
				t.Errorf("%s and %s", better.ID, worse.ID)
			}
		}
	}
}

// Who can take over: what a voter says of itself, and how it answers appends.
func TestMayLead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &Service{wal: &logStore{lastIdx: 200}, fsm: &fsm{}}
		m := raft.Server{ID: "f"}
		good := statusAnswer{Healthy: true, Role: "follower", Term: 3, LastIndex: 200 - promoteLag}
		s.turns.answers("f", 3)
		for _, v := range []struct {
			what   string
			c      choice
			change func(a *statusAnswer)
			says   string // "" = it can
		}{
			{"all is well", choice{}, nil, ""},
			{"a fault", choice{leaving: true}, func(a *statusAnswer) { a.Healthy = false }, "fault"},
			{"unfit", choice{}, func(a *statusAnswer) { a.Unfit = "full" }, "unfit to lead: full"},
			{"unfit, and the leader goes anyway", choice{leaving: true}, func(a *statusAnswer) { a.Unfit = "full" }, ""},
			{"a log without space", choice{}, func(a *statusAnswer) { a.LogWaits = true }, "takes no entry"},
			{"a log without space, and the leader goes anyway", choice{leaving: true}, func(a *statusAnswer) { a.LogWaits = true }, ""},
			{"relieved again and again", choice{relief: true}, func(a *statusAnswer) { a.Relieved, a.Rests = 100_000, 1 }, "1m40s ago"},
			{"the same, and the leader has another reason", choice{}, func(a *statusAnswer) { a.Relieved, a.Rests = 100_000, 1 }, ""},
			{"not a voter yet, for itself", choice{}, func(a *statusAnswer) { a.Role = "non-voter" }, "non-voter"},
			{"in another term", choice{}, func(a *statusAnswer) { a.Term = 4 }, "term 4"},
			{"more than an append behind", choice{}, func(a *statusAnswer) { a.LastIndex-- }, "its log ends at 135"},
			{"no better", choice{rank: func(statusAnswer) int { return -1 }}, nil, "no better"},
			{"better", choice{rank: func(statusAnswer) int { return 7 }}, nil, ""},
		} {
			a := good
			if v.change != nil {
				v.change(&a)
			}
			rank, err := s.mayLead(m, a, nil, 3, v.c)
			if (err == nil) != (v.says == "") || err != nil && !strings.Contains(err.Error(), v.says) || err == nil && v.c.rank != nil && rank != 7 {
				t.Errorf("%s: rank %d, %v", v.what, rank, err)
			}
		}
		if _, err := s.mayLead(m, statusAnswer{}, errTransportClosed, 3, choice{rank: func(statusAnswer) int { panic("no answer") }}); err != errTransportClosed {
			t.Errorf("no answer: %v", err)
		}
		time.Sleep(turnFresh + 1)
		wants := func(what, says string, term uint64) {
			t.Helper()
			if _, err := s.mayLead(m, good, nil, term, choice{}); (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", what, err)
			}
		}
		wants("its append is held", "no append for 1s", 3)
		s.turns.answers("f", 3)
		wants("it answers again", "", 3)
		s.turns.transfers("f", 3)
		wants("the lead was handed to it", "since the last", 3)
		for range turnsAgain - 1 {
			s.turns.answers("f", 3)
		}
		wants("raft may not have taken the transfer yet", "19 appends since the last", 3)
		s.turns.answers("f", 3)
		wants("it must have by now", "", 3)
		s.turns.transfers("f", 3)
		wants("the lead was handed to it once more", "no append since the last", 3)
		good.Term = 4
		wants("in the next term", "no append yet", 4)
		s.turns.answers("f", 3) // late
		wants("an answer of the term before", "no append yet", 4)
	})
}

// While raft has not answered a transfer, its leader takes no entry that could go before: in that term of that raft, and no longer.
func TestNoEntryGoesBeforeATransfer(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	s := m.start()
	must(t, s.Set(ctxFor(t, patience), "k", nil))
	r := s.raft.Load()
	s.transferring.Store(&transfer{r, r.CurrentTerm()})
	before, _ := s.wal.last()
	eventually(t, patience, "an end that does not fall into a try", func() error {
		if err := s.Set(ctxFor(t, 100*time.Millisecond), "k", nil); !errors.Is(err, ErrNotApplied) {
			return fmt.Errorf("%v is not the verdict", err)
		}
		return nil
	})
	if last, _ := s.wal.last(); last != before {
		t.Errorf("the log went on from %d to %d", before, last)
	}
	for what, old := range map[string]*transfer{"an earlier term": {r, r.CurrentTerm() - 1}, "an earlier raft": {nil, r.CurrentTerm()}} {
		s.transferring.Store(old)
		if err := s.Set(ctxFor(t, patience), "k", nil); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A leader that was asked to hand over, and has not answered, may do it yet.
func TestTransferThatIsNotAnswered(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	l, f := c.leader(t), c.follower(t)
	l.behind(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/transfer") {
				io.Copy(io.Discard, r.Body)
				<-r.Context().Done()
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	must(t, f.s.Ready(ctxFor(t, patience)))
	eventually(t, patience, "the leader is asked", func() error {
		err := f.s.TransferLeader(ctxFor(t, 300*time.Millisecond), "")
		checkVerdict(t, "a transfer", err)
		if !errors.Is(err, ErrUncertain) {
			return fmt.Errorf("%v is not uncertain", err)
		}
		return nil
	})
}

// A leader whose log has space again before it has stepped down stays, and its log waits for space as before.
func TestStepDownWithSpaceAgain(t *testing.T) {
	t.Parallel()
	s := newMember(t, "").start()
	must(t, s.Set(ctxFor(t, patience), "k", nil))
	wantWords(t, s.stepDown(ctxFor(t, patience), s.raft.Load().CurrentTerm()), "its log has space again")
	if s.replaced.Load() {
		t.Error("its log would answer with an error, as if another voter could lead")
	}
	if err := s.stepDown(t.Context(), 0); err != nil {
		t.Errorf("in a term that is over: %v", err)
	}
}
