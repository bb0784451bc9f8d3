package quorate

// The read round: how a Get proves that what it is about to read is not stale, on any member and without a clock. It owns
// rounds and how they are shared. Get asks for one; the leader's round asks a quorum of voters for their term; the answer
// is a log index that this member must have applied before it reads its own state. It never touches SQL or the log.
//
// The proof: a leader of a later term needed the vote of some member of every quorum, and a member that has voted answers
// the later term. So if a quorum answers our term after the commit index was taken, no later leader had acknowledged
// anything before it was taken. Counting answers to requests that were sent earlier (as raft's VerifyLeader does) proves
// nothing: they may have waited in a socket while this process was stopped.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// rounds shares read rounds: one is in flight, one is forming. Whoever comes joins the forming one, never the one in
// flight, whose index may be older than a write that has returned meanwhile.
type rounds struct {
	run func(ctx context.Context) (readPoint, error)
	ctx context.Context // ends at Close

	kick chan struct{} // a round has formed while another was in flight

	mu      sync.Mutex // guards the fields below
	flying  bool
	forming *round
}

type round struct {
	done chan struct{}
	at   landing
	err  error
}

// A landing is what a round has found. It holds everything that was acknowledged before the round began, whenever its callers
// came.
type landing struct {
	readPoint
	began time.Time
}

// A readPoint is the entry that a member must have applied before it reads. It is committed.
type readPoint struct {
	index, term uint64
}

const roundTimeout = 2 * time.Second // of one round; Get goes on with the next until its context ends

func newRounds(ctx context.Context, run func(context.Context) (readPoint, error)) *rounds {
	return &rounds{run: run, ctx: ctx, kick: make(chan struct{}, 1)}
}

// join returns the result of a round that began after the call. A lone caller runs it in its own goroutine.
func (r *rounds) join(ctx context.Context) (landing, error) {
	r.mu.Lock()
	rd := r.forming
	if rd == nil {
		rd = &round{done: make(chan struct{})}
		if !r.flying {
			r.flying = true
			r.mu.Unlock()
			r.fly(ctx, rd)
			return rd.at, rd.err
		}
		r.forming = rd
	}
	r.mu.Unlock()
	select {
	case <-rd.done:
		return rd.at, rd.err
	case <-ctx.Done():
		return landing{}, ctx.Err()
	case <-r.ctx.Done():
		return landing{}, ErrClosed
	}
}

// fly runs a round and starts the next one if one has formed.
func (r *rounds) fly(ctx context.Context, rd *round) {
	rd.at.began = time.Now()
	ctx, cancel := context.WithDeadline(ctx, rd.at.began.Add(roundTimeout))
	rd.at.readPoint, rd.err = r.run(ctx)
	cancel()
	close(rd.done)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flying = false
	if r.forming != nil {
		r.flying = true
		r.kick <- struct{}{}
	}
}

// carry flies the rounds that formed while another was in flight. It runs until Close.
func (r *rounds) carry() {
	for {
		select {
		case <-r.kick:
			r.mu.Lock()
			rd := r.forming
			r.forming = nil
			r.mu.Unlock()
			r.fly(r.ctx, rd)
		case <-r.ctx.Done():
			return
		}
	}
}

var errNotLeading = errors.New("this member does not lead")

// readIndex is one round on behalf of this member: its own if it leads, the leader's otherwise.
func (s *Service) readIndex(ctx context.Context) (readPoint, error) {
	id, addr := s.leader()
	switch id {
	case "":
		return readPoint{}, ErrNoLeader
	case s.ident.id:
		return s.leaderRound(ctx)
	}
	return s.peer.readIndex(ctx, id, addr)
}

// leaderRound takes the commit index and then has a quorum confirm that no later term existed when it was taken.
func (s *Service) leaderRound(ctx context.Context) (readPoint, error) {
	r := s.raft.Load()
	term := r.CurrentTerm()
	if !s.leading(term) {
		return readPoint{}, errNotLeading
	}
	if err := s.awaitTerm(ctx, term); err != nil {
		return readPoint{}, err
	}
	index := r.CommitIndex()
	if err := s.confirmTerm(ctx, term, r.GetConfiguration().Configuration()); err != nil {
		return readPoint{}, err
	}
	if !s.leading(term) {
		return readPoint{}, errNotLeading
	}
	return readPoint{index, term}, nil // an entry of this term is applied, so the newest committed one is of it too
}

// awaitApplied waits until this member has applied an entry that its leader has just said is committed. Raft's leader says so
// to a follower only with the next append, 10 to 20 ms later if nobody writes. So this member says it to its own raft, in the
// words of an append without entries: the leader of this term holds this entry and has committed it. Raft refuses that, as it
// would from the leader, if the entry in its log is another one.
func (s *Service) awaitApplied(ctx context.Context, index, term uint64) error {
	if s.fsm.applied.at() >= index {
		return nil
	}
	ctx, cancel := s.untilClose(ctx)
	defer cancel()
	for try := 0; try < 10 && ctx.Err() == nil; try++ {
		wait, cancel := context.WithTimeout(ctx, time.Millisecond<<try)
		if s.telling.TryLock() { // one says it for all that wait
			s.peer.committed(wait, index, term)
			s.telling.Unlock()
		}
		err := s.fsm.applied.wait(wait, index)
		cancel()
		if err == nil {
			return nil
		}
	}
	if s.fsm.applied.wait(ctx, index) != nil {
		return context.Cause(ctx)
	}
	return nil
}

// awaitTerm waits until this member has applied an entry of its own term. From that entry on every index is one that apply
// sees, on every member, so that waiting for the commit index ends; and everything committed before is included.
func (s *Service) awaitTerm(ctx context.Context, term uint64) error {
	for {
		at := s.fsm.applied.at()
		switch ready := s.store.meta().term; {
		case ready == term:
			return nil
		case !s.leading(term):
			return errNotLeading
		}
		wait, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		s.fsm.applied.wait(wait, at+1)
		cancel()
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("waiting for the first entry of term %d: %w", term, err)
		}
	}
}

// confirmTerm asks the voters for their current term; a quorum, this member included, must answer exactly term.
func (s *Service) confirmTerm(ctx context.Context, term uint64, c raft.Configuration) error {
	var others []raft.Server
	voters, yes := 0, 0
	for _, m := range c.Servers {
		switch {
		case m.Suffrage != raft.Voter:
		case string(m.ID) == s.ident.id:
			voters, yes = voters+1, yes+1
		default:
			voters++
			others = append(others, m)
		}
	}
	need := voters/2 + 1
	if yes >= need {
		return nil
	}
	type answer struct {
		term uint64
		err  error
	}
	answers := make(chan answer, len(others))
	for _, m := range others {
		go func() {
			// Not ended with the round: a call that is cancelled takes its connection with it.
			ctx, cancel := context.WithTimeout(s.ctx, roundTimeout)
			defer cancel()
			t, err := s.askTerm(ctx, m)
			answers <- answer{t, err}
		}()
	}
	var last error
	for range others {
		var a answer
		select {
		case a = <-answers:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d voters confirmed term %d, need %d: %w", yes, voters, term, need, errors.Join(ErrNoLeader, last, ctx.Err()))
		}
		switch {
		case a.err != nil:
			last = a.err
		case a.term > term:
			return fmt.Errorf("%w: term %d has begun", errNotLeading, a.term)
		case a.term == term:
			yes++
		}
		if yes >= need {
			return nil
		}
	}
	return fmt.Errorf("%d of %d voters confirmed term %d, need %d: %w", yes, voters, term, need, errors.Join(ErrNoLeader, last))
}

// askTerm asks one voter. Calls to one that does not answer end after roundTimeout; until then a few of them are enough.
func (s *Service) askTerm(ctx context.Context, m raft.Server) (uint64, error) {
	leave, ok := s.members.ask(string(m.ID))
	if !ok {
		return 0, fmt.Errorf("%s has not answered the last %d calls", m.Address, maxAsks)
	}
	defer leave()
	return s.peer.askTerm(ctx, string(m.ID), s.addressOf(m))
}
