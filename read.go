package quorate

// The read round: how a Get proves that what it is about to read is not stale, on any member and without a clock. It owns
// rounds and how they are shared. Get asks for one; the leader's round asks a quorum of voters for their term; the answer
// is a log index that this member must have applied before it reads its own state. It never touches SQL or the log.
//
// The proof: a leader of a later term needed the vote of some member of every quorum, and a member that has voted answers
// the later term. So if a quorum answers our term after the commit index was taken, no later leader had acknowledged
// anything before it was taken. Counting answers to requests that were sent earlier (as raft's VerifyLeader does) proves
// nothing: they may have waited in a socket while this process was stopped.
//
// A follower that asks for a round states its own term in the request, having read it after its round had begun. That statement
// is an answer to the leader, if not a late one: say a write had returned before a Get came, acknowledged by a leader of a later
// term. Then some member of every quorum was in that term before the Get came. The follower was not, for it read its term after
// that; nor was the leader, for it took its commit index later still. So where these two are a quorum, nobody else is asked. But
// the statement is older than a Get that has come to the leader meanwhile, so it counts in no round that others share.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// rounds shares read rounds: one is in flight, one is forming. Whoever comes joins the forming one, never the one in
// flight, whose index may be older than a write that has returned meanwhile. Where several had one round they can have the next one
// together too: it waits for them a moment. Else the first to come back would fly alone, and the others wait for that flight and for
// their own.
type rounds struct {
	run func(ctx context.Context) (readPoint, error)
	ctx context.Context // ends at Close

	kick chan struct{} // a round has formed while another was in flight

	confirmed atomic.Int64 // when the newest round began in which a quorum has confirmed the leader, by monotonic; 0 = never

	mu      sync.Mutex // guards the fields below
	flying  bool       // or about to
	forming *round
	landed  int // callers of the last one
}

type round struct {
	n    int // callers; guarded by the mu of rounds
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
	refusal     string // why the leader took no write then; "" = it did
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
		rd = &round{n: 1, done: make(chan struct{})}
		if !r.flying {
			r.flying = true
			r.mu.Unlock()
			r.fly(ctx, rd)
			return rd.at, rd.err
		}
		r.forming = rd
	} else {
		rd.n++
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

// errUnended is the error of a round whose goroutine ended within it: a lone caller's, in a method of the context or of the HTTP client
// that the caller has brought along.
var errUnended = errors.New("the read round was not ended")

// fly runs a round and lands it, whatever happens in the round: nobody else would ever fly.
func (r *rounds) fly(ctx context.Context, rd *round) {
	began := monotonic()
	rd.at.began, rd.err = time.Now(), errUnended
	defer r.land(rd)
	ctx, cancel := context.WithDeadline(ctx, rd.at.began.Add(roundTimeout))
	defer cancel()
	rd.at.readPoint, rd.err = r.run(ctx)
	if rd.err == nil {
		r.confirmed.Store(began)
	}
}

// land answers the callers of a round, and starts the next one if one has formed, or is likely to.
func (r *rounds) land(rd *round) {
	close(rd.done)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flying = false
	if r.forming != nil || rd.n >= gatherFrom {
		r.flying, r.landed = true, rd.n
		r.kick <- struct{}{}
	}
}

// confirmedFor is the time since a quorum has confirmed the leader, from before the question; long if it has not.
func (r *rounds) confirmedFor() time.Duration {
	at := r.confirmed.Load()
	if at == 0 {
		return time.Hour
	}
	return time.Duration(monotonic() - at)
}

// confirmedMillis is confirmedFor as a status says it.
func (r *rounds) confirmedMillis() int64 {
	if r.confirmed.Load() == 0 {
		return 0
	}
	return r.confirmedFor().Milliseconds() + 1
}

// carry flies the rounds that formed while another was in flight, or just after. It runs until Close.
func (r *rounds) carry() {
	for {
		select {
		case <-r.kick:
			if rd := r.gather(); rd != nil {
				r.fly(r.ctx, rd)
			}
		case <-r.ctx.Done():
			return
		}
	}
}

// gather returns the next round when those of the last one have had the time to join it, or nil if nobody has.
func (r *rounds) gather() *round {
	r.mu.Lock()
	defer r.mu.Unlock()
	joined := func() int {
		if r.forming == nil {
			return 0
		}
		return r.forming.n
	}
	if r.landed >= gatherFrom {
		gather(&r.mu, joined()+r.landed, joined)
	}
	rd := r.forming
	r.forming, r.flying = nil, rd != nil
	return rd
}

var errNotLeading = errors.New("this member does not lead")

// readIndex is one round on behalf of this member: its own if it leads, the leader's otherwise.
func (s *Service) readIndex(ctx context.Context) (readPoint, error) {
	id, addr := s.leader()
	switch id {
	case "":
		return readPoint{}, ErrNoLeader
	case s.ident().id:
		return s.leaderRound(ctx)
	}
	term, err := s.stateTerm() // in the round: it began after every Get that waits for it
	if err != nil {
		return readPoint{}, err
	}
	return s.peer.readIndex(ctx, id, addr, term)
}

// stateTerm is this member's term for others to rely on: at some time during the call it was in that one. It is an error while raft
// is started, for then the raft that votes may be a newer one than the one that is asked here.
func (s *Service) stateTerm() (uint64, error) {
	starts := s.starts.Load()
	term := s.raft.Load().CurrentTerm()
	if starts%2 != 0 || s.starts.Load() != starts {
		return 0, errors.New("raft is being started")
	}
	return term, nil
}

// roundWith is a round that the statement of the member who asks for it completes; !ok means that others must be asked, or that
// nothing is known yet. It never waits.
func (s *Service) roundWith(from string, states uint64) (at readPoint, ok bool) {
	r := s.raft.Load()
	term := r.CurrentTerm()
	if s.held() || states != term || !s.leading(term) || s.store.meta().term != term { // see awaitTerm
		return readPoint{}, false
	}
	index := r.CommitIndex()
	voters, yes, others := s.electorate(r.GetConfiguration().Configuration())
	if slices.ContainsFunc(others, func(m raft.Server) bool { return string(m.ID) == from }) {
		yes++
	}
	if yes <= voters/2 || !s.leading(term) {
		return readPoint{}, false
	}
	return s.readPoint(index, term), true
}

func (s *Service) readPoint(index, term uint64) readPoint {
	at := readPoint{index: index, term: term}
	if p := s.refusal.Load(); p != nil {
		at.refusal = (*p).Error()
	}
	return at
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
	return s.readPoint(index, term), nil // an entry of this term is applied, so the newest committed one is of it too
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
		s.tellCommitted(wait, index, term)
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

// tellCommitted: one says it for all that wait.
func (s *Service) tellCommitted(ctx context.Context, index, term uint64) {
	if s.telling.TryLock() {
		defer s.telling.Unlock()
		s.peer.committed(ctx, index, term)
	}
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

// confirmTerm asks voters for their current term; a quorum, this member included, must answer exactly term. It asks as many as
// it needs, and the rest when one of these is late or answers something else.
func (s *Service) confirmTerm(ctx context.Context, term uint64, c raft.Configuration) error {
	voters, yes, others := s.electorate(c)
	need := voters/2 + 1
	if yes >= need {
		return nil
	}
	others, first := s.panel.order(others, need-yes)
	answers := make(chan answer, len(others))
	asked := 0
	ask := func(n int) {
		for ; asked < n; asked++ {
			go s.askTerm(others[asked], answers)
		}
	}
	ask(first)
	hedge := time.NewTimer(hedgeAfter)
	defer hedge.Stop()
	var last error
	for heard := 0; heard < len(others); {
		var a answer
		select {
		case a = <-answers:
		case <-hedge.C:
			ask(len(others))
			continue
		case <-ctx.Done():
			return fmt.Errorf("%d of %d voters confirmed term %d, need %d: %w", yes, voters, term, need, errors.Join(ErrNoLeader, last, ctx.Err()))
		}
		heard++
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
		if yes+asked-heard < need { // those that are still to answer are not enough
			ask(len(others))
		}
	}
	return fmt.Errorf("%d of %d voters confirmed term %d, need %d: %w", yes, voters, term, need, errors.Join(ErrNoLeader, last))
}

// electorate counts the voters of c, and says how many of them this member is.
func (s *Service) electorate(c raft.Configuration) (voters, self int, others []raft.Server) {
	for _, m := range c.Servers {
		switch {
		case m.Suffrage != raft.Voter:
		case string(m.ID) == s.ident().id:
			voters, self = voters+1, 1
		default:
			voters++
			others = append(others, m)
		}
	}
	return voters, self, others
}

type answer struct {
	term uint64
	err  error
}

// askTerm asks one voter. Calls to one that does not answer end after roundTimeout, not with the round: a call that is cancelled
// takes its connection with it. Until then a few of them are enough.
func (s *Service) askTerm(m raft.Server, answers chan<- answer) {
	id := string(m.ID)
	leave, ok := s.members.ask(id)
	if !ok {
		answers <- answer{err: fmt.Errorf("%s has not answered the last %d calls", m.Address, maxAsks)}
		return
	}
	defer leave()
	ctx, cancel := context.WithTimeout(s.ctx, roundTimeout)
	defer cancel()
	asked := s.panel.asks(id)
	term, err := s.peer.askTerm(ctx, id, s.addressOf(m))
	s.panel.heard(id, asked, err)
	answers <- answer{term, err}
}

const (
	hedgeAfter = 5 * time.Millisecond // more than an answer takes on a busy machine; what a voter that has just died costs, once
	tryAfter   = time.Second          // between two questions to a voter that is late, beside those to the others
)

// A panel chooses whom a round asks: as many as it needs, in turn, among the voters that have answered promptly. Only the cost
// depends on it; any choice is right.
type panel struct {
	mu   sync.Mutex // guards the fields below
	turn int
	byID map[string]*panelist
}

type panelist struct {
	waiting int       // questions that are not answered yet
	since   time.Time // none of them was asked before
	late    bool      // the last answer was late, or none
	tried   time.Time // when it was asked although it was late
}

// order returns the voters in the order in which to ask them, and how many at once: need of the prompt ones, or all where these are
// too few. One that is late is asked once in a while beside them, to learn that it is prompt again.
func (p *panel) order(voters []raft.Server, need int) (ordered []raft.Server, first int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turn++
	now := time.Now()
	var prompt, due, late []raft.Server
	for i := range voters {
		m := voters[(i+p.turn)%len(voters)]
		l := p.byID[string(m.ID)]
		switch {
		case l == nil, !l.late && (l.waiting == 0 || now.Sub(l.since) < hedgeAfter):
			prompt = append(prompt, m)
		case now.Sub(l.tried) < tryAfter:
			late = append(late, m)
		default:
			l.tried = now
			due = append(due, m)
		}
	}
	if len(prompt) < need {
		return voters, len(voters)
	}
	return slices.Concat(prompt[:need], due, prompt[need:], late), need + len(due)
}

// asks is called before a question, and heard after its end.
func (p *panel) asks(id string) (at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at = time.Now()
	l := p.byID[id]
	if l == nil {
		if p.byID == nil {
			p.byID = make(map[string]*panelist)
		}
		l = &panelist{}
		p.byID[id] = l
	}
	if l.waiting++; l.waiting == 1 {
		l.since = at
	}
	return at
}

func (p *panel) heard(id string, asked time.Time, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	l := p.byID[id]
	l.waiting--
	l.since = now
	l.late = err != nil || now.Sub(asked) > hedgeAfter
}
