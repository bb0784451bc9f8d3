package quorate

// Whom this member's calls reach, and who reaches the leader. It owns what became of the newest calls to each of the others, the calls
// that are made to learn it, and the decision that a leader which can send but not be reached hands over: to its followers it looks
// alive, so that no election ends it, and whatever they forward fails. All of it is notes, never a proof: a wrong one costs a change
// of the leader. Control comes from the peer, after every call to a known member, and from startBackground; it goes to Status, to what
// this member answers when another one asks for its status, and to handover.go.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const maxReason = 256 // bytes of an error that is kept for people: the other side may have written it

// A reach is what became of this member's calls to another one.
type reach struct {
	answered time.Time // when the newest call that was answered ended; zero = none was
	failing  time.Time // when the first of those that failed since then began; zero = the newest was answered
	tried    time.Time // when the newest call ended
	base     string    // where the newest that failed was sent
	err      error     // and what it met; nil = the newest was answered
}

// A reachTable is what became of this member's calls. The zero value is ready.
type reachTable struct {
	mu   sync.Mutex // guards list
	list map[string]reach
}

// called notes how a call that went to base and began then has ended. One that failed says nothing if a later one was answered, or
// if its caller gave it less time than an answer may take.
func (t *reachTable) called(id, base string, began time.Time, err error) {
	now := time.Now()
	answered := reaches(err)
	if !answered && (errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed)) {
		return
	}
	if !answered && errors.Is(err, context.DeadlineExceeded) && now.Sub(began) < voteTimeout {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.list[id]
	switch {
	case answered:
		r = reach{answered: now}
	case began.Before(r.answered):
		return
	case r.failing.IsZero() || began.Before(r.failing):
		r.failing = began
		fallthrough
	default:
		r.base, r.err = base, err
	}
	r.tried = now
	if t.list == nil {
		t.list = make(map[string]reach)
	}
	t.list[id] = r
}

// reaches: the member took the call. That it can't do now what it was asked for is an answer too; that it takes no call of this
// member is none.
func reaches(err error) bool {
	var r *refusal
	if !errors.As(err, &r) {
		return err == nil
	}
	switch r.Code {
	case codeNotAllowed, codeRemoved, codeWrongCluster, codeWrongTarget, codeProtocol, codeTLS:
		return false
	}
	return true
}

func (t *reachTable) of(id string) reach {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.list[id]
}

// lately: the newest call was answered, and not long ago.
func (t *reachTable) lately(id string) bool {
	r := t.of(id)
	return r.err == nil && !r.answered.IsZero() && time.Since(r.answered) < 2*probeVoters
}

// reason is what the calls meet, for people; empty if the newest was answered.
func (r reach) reason() string {
	if r.err == nil {
		return ""
	}
	return shortText(explain(r.err, r.base).Error())
}

func shortText(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason] + "…"
	}
	return strings.ToValidUTF8(s, "")
}

// answer is what this member tells others of it.
func (r reach) answer(id string) reachAnswer {
	a := reachAnswer{ID: id, Tried: time.Since(r.tried).Milliseconds(), Error: r.reason()}
	if !r.failing.IsZero() {
		a.Failing = max(time.Since(r.failing).Milliseconds(), 1)
	}
	return a
}

const (
	probeVoters = 5 * time.Second // between two calls of a voter to another one; to the leader every checkInterval
	muteAfter   = stallLimit / 2  // then a follower says that its leader can't be reached, and the leader acts on it later
	reachOld    = 3 * probeVoters // what a member says of calls before that is not counted
)

// watchReach calls whom this member has not called lately, so that it notices when it reaches them no more; and looks at what the
// others say of their calls to this member, if it leads.
func (s *Service) watchReach() {
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	mute := ""
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		s.probeReach()
		mute = s.noteMute(mute)
		s.checkReached()
	}
}

// probeReach asks for a term, the cheapest of questions, to be answered: the leader, which hears nothing else of a member without
// callers, and on a voter the other voters, so that a leader can find out whom more of them reach. Older releases answer it too.
func (s *Service) probeReach() {
	leader := s.follows()
	_, _, voter := s.server(s.ident().id)
	var wg sync.WaitGroup
	for _, m := range s.others() {
		pause := probeVoters
		switch {
		case string(m.ID) == leader:
			pause = checkInterval
		case !voter || m.Suffrage != raft.Voter:
			continue
		}
		if time.Since(s.reach.of(string(m.ID)).tried) < pause-checkInterval/2 {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(s.ctx, probeTimeout)
			defer cancel()
			s.peer.askTerm(ctx, string(m.ID), s.addressOf(m)) // the outcome is in the table
		})
	}
	wg.Wait()
}

// mute is the leader's id, address and why, if this member hears it and has not reached it for a while.
func (s *Service) mute() (id, addr string, err error) {
	id, addr = s.leader()
	if id == "" || id == s.ident().id || s.leaderSilence() > heartbeatTimeout {
		return "", "", nil
	}
	r := s.reach.of(id)
	if r.failing.IsZero() || min(time.Since(r.failing), time.Since(s.reign.since(id))) < muteAfter {
		return "", "", nil
	}
	return id, addr, explain(r.err, r.base)
}

// noteMute writes to the log once that the leader can't be reached, and once that it can. was and now are its id, empty if it can.
func (s *Service) noteMute(was string) (now string) {
	id, addr, err := s.mute()
	switch leader, _ := s.leader(); {
	case id != "" && id != was:
		s.log.Warn("the leader is heard and does not answer calls of this member: its address, its listener or a firewall",
			"leader", peerName(id, addr), "why", err)
	case id == "" && was != "" && leader == was && s.reach.of(was).err == nil:
		s.log.Info("the leader answers calls of this member again", "leader", s.name(was))
	case id == "" && was != "" && (leader == was || leader == ""):
		return was // not decided yet
	}
	return id
}

// views are what voters say of their calls to others: by caller and called, with this member's own.
type views map[string]map[string]reachAnswer

func (v views) add(id string, reached []reachAnswer) {
	v[id] = make(map[string]reachAnswer)
	for _, r := range reached {
		if r.Tried <= reachOld.Milliseconds() {
			v[id][r.ID] = r
		}
	}
}

// lost: from says that it has not reached to for the stall limit. A release that does not say has not lost anybody.
func (v views) lost(from, to string) bool {
	return v[from][to].Failing >= stallLimit.Milliseconds()
}

// reaches: from says that its newest call to to was answered.
func (v views) reaches(from, to string) bool {
	r, said := v[from][to]
	return said && r.Failing == 0
}

// standing is by how many of those that say anything a member is reached, and how many it reaches.
func (v views) standing(id string) (by, of int) {
	for other := range v {
		if v.reaches(other, id) {
			by++
		}
		if v.reaches(id, other) {
			of++
		}
	}
	return by, of
}

// rank says how much better off the cluster would be with each voter as its leader than with the one of that id, if some of them have
// lost it: by how many more it is reached. Negative: not at all, or it does not reach a majority itself. voters are all there are.
func (v views) rank(leader string, voters int) (rank func(id string) int, lost []string) {
	keep := 0
	for id := range v {
		switch {
		case id == leader, len(v[id]) == 0: // this leader itself, and a release that does not say
		case v.lost(id, leader):
			lost = append(lost, id)
		default:
			keep++
		}
	}
	slices.Sort(lost)
	return func(id string) int {
		by, of := v.standing(id)
		if of+1 <= voters/2 || by <= keep {
			return -1
		}
		return by - keep
	}, lost
}

// reached is what this member tells of its calls to the others.
func (s *Service) reached() []reachAnswer {
	var list []reachAnswer
	for _, m := range s.others() {
		if r := s.reach.of(string(m.ID)); !r.tried.IsZero() {
			list = append(list, r.answer(string(m.ID)))
		}
	}
	return list
}

// checkReached looks whether voters have lost this leader, and another one would be reached by more. A member that led keeps the fault
// until it hears a leader: it may be reached by nobody.
func (s *Service) checkReached() {
	switch {
	case s.role() == Leader:
		s.faults.set(faultUnreached, s.unreached())
	case s.follows() != "" && s.leaderSilence() < heartbeatTimeout:
		s.faults.set(faultUnreached, nil)
	}
}

// unreached asks the voters. With two of them the other one could not reach this member as its leader either. One that says nothing has
// neither lost this leader nor keeps it, unless it forwards to it.
func (s *Service) unreached() error {
	all := voters(s.raft.Load().GetConfiguration().Configuration())
	if len(all) < 3 {
		return nil
	}
	ctx, cancel := context.WithTimeout(s.ctx, probeTimeout)
	defer cancel()
	id, v := s.ident().id, make(views)
	v.add(id, s.reached())
	s.askOthers(ctx, all, func(i int, a statusAnswer, err error) {
		switch {
		case err != nil:
		case len(a.Reached) == 0 && s.peer.askedWithin(all[i].ID, stallLimit): // it does not say, and what it forwards gets here
			v.add(a.ID, []reachAnswer{{ID: id}})
		default:
			v.add(a.ID, a.reachedAs(id))
		}
	})
	rank, lost := v.rank(id, len(all))
	if len(lost) == 0 || !slices.ContainsFunc(all, func(m raft.Server) bool { return rank(string(m.ID)) > 0 }) {
		return nil
	}
	return &unreachedError{rank, fmt.Sprintf("%d of %d voters do not reach this leader at %s, and would reach another one: %s: %s", len(lost),
		len(all), s.conf.Addr, s.name(lost[0]), v[lost[0]][id].Error)}
}

// reachedAs is what a voter says of its calls, without those to this leader unless it has heard this leader for the stall limit: after
// a partition what it says of them is old.
func (a statusAnswer) reachedAs(leader string) []reachAnswer {
	hears := a.LeaderID == leader && a.Follows >= stallLimit.Milliseconds() && a.LeaderSilence < heartbeatTimeout.Milliseconds()
	return slices.DeleteFunc(a.Reached, func(r reachAnswer) bool { return r.ID == leader && !hears })
}

// An unreachedError is why a leader that voters have lost should not lead, and who would be better.
type unreachedError struct {
	rank func(id string) int // see views.rank
	text string
}

func (e *unreachedError) Error() string { return e.text }

// reachesMajority: a voter has not lost so many others that it could not lead, as it says itself. What it does not say is taken for
// well.
func reachesMajority(a statusAnswer, all []raft.Server) bool {
	v := make(views)
	v.add(a.ID, a.Reached)
	n := 0
	for _, m := range all {
		if !v.lost(a.ID, string(m.ID)) {
			n++
		}
	}
	return n > len(all)/2
}
