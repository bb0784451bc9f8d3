package quorate

// Handing over: how a leader that should not lead has another voter lead. It owns the choice of that voter, and how often a member
// that is unfit to lead is relieved. The transfer and the election are raft's. Control comes from Close, a rebuild, the removal of
// the leader, TransferLeader, and watchFitness, which acts on the column "unfit" of faultTable.
//
// Two ways in which raft v1.8.0 turns a hand-over into an outage, both reproduced, and what is done about them:
//
//  1. LeadershipTransfer picks the voter with the highest nextIndex. In an idle cluster all are equal, and the first in the
//     configuration may be dead: half a second without writes, and no new leader. So the voters are asked for their status first,
//     and LeadershipTransferToServer names the best of those that answer, are fit to lead and have the log but for one append.
//  2. A transfer leaves a token in a channel with room for one, which the replication to that voter takes after its append, or after
//     one of the next: its select has other channels that are ready too, and chooses at random. While that append is held, a
//     second transfer to the same voter blocks in the send, and raft refuses every write until the voter answers. So nobody is
//     handed over to who has not just answered an append, and never a second time before turnsAgain more answers: that the token
//     is still there then has a chance of one in a million.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	handOverLimit = 2 * time.Second        // of one hand-over, where the caller has no limit of its own
	handOverGrace = 100 * time.Millisecond // for the other voters' answers after the first one that can lead
	turnFresh     = time.Second            // a voter whose last answer to an append is older is not handed over to
	turnsAgain    = 20                     // appends that a voter answers between two hand-overs to it; an idle one does in half a second
	reliefPause   = time.Minute            // between two times that a member is relieved because it is unfit, and then twice as long, up to
	reliefMost    = 10 * time.Minute
	reliefSoon    = 2 * time.Second      // after a relief of another member
	reliefsMost   = 2                    // members that are relieved within reliefPause
	reliefAgain   = 5 * time.Second      // after a hand-over that raft did not carry out, or for a fault that stops writes or reads
	lastTurn      = 6 * heartbeatTimeout // of silence of the leader, before a member that is unfit stands: the others have tried by then
)

// A choice says to whom a leader hands over.
type choice struct {
	addr    string                 // the voter at this address; "" = any
	leaving bool                   // this member is about to stop: it takes one that is unfit if none is fit
	relief  bool                   // this member is unfit: see relief
	rank    func(statusAnswer) int // the greater the better, negative = not this one; nil = all alike
}

// errNobody: no voter can take over, and this member stays the leader.
var errNobody = errors.New("no other voter can lead now")

// errOvertaken: this leader's log waits for space, and a voter is in a later term: it is the leader of nobody, and raft can't find out.
var errOvertaken = errors.New("the voters are in a later term")

// handOver has another voter lead, and returns nil once this member does not. An error leaves it the leader; one that wraps errNobody
// says of each voter why it can't.
func (s *Service) handOver(ctx context.Context, c choice) error {
	select {
	case s.handing <- struct{}{}:
		defer func() { <-s.handing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	r := s.raft.Load()
	term := r.CurrentTerm()
	if !s.leading(term) {
		return nil
	}
	to, err := s.successor(ctx, term, c)
	switch {
	case s.wal.staying.Load() > 0 && (err == nil || errors.Is(err, errOvertaken)):
		return s.stepDown(ctx, term)
	case err != nil:
		return err
	}
	s.log.Info("handing over", "to", peerName(to.ID, to.Address))
	s.turns.transfers(to.ID, term)
	select {
	case err = <-s.transfer(r, term, to):
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	s.turns.transfers(to.ID, term) // raft may have begun it only now
	if s.leading(term) {
		return fmt.Errorf("hand over to %s: %w", peerName(to.ID, to.Address), cmp.Or(err, errors.New("it did not win the election")))
	}
	return nil
}

// A transfer is one that raft has not answered yet, in this term of this raft.
type transfer struct {
	r    *raft.Raft
	term uint64
}

// transfer hands raft the transfer, and no entry until that has an answer. Raft's main loop waits for a slow log, and takes what has
// come meanwhile at random: behind entries, each of which is one more wait, the transfer may be the last.
func (s *Service) transfer(r *raft.Raft, term uint64, to raft.Server) <-chan error {
	t, done := &transfer{r, term}, make(chan error, 1)
	s.transferring.Store(t)
	future := r.LeadershipTransferToServer(to.ID, to.Address)
	go func() { // a caller's TransferLeader may come here while Close waits for what runs
		done <- await(s.ctx, future)
		s.transferring.CompareAndSwap(t, nil)
	}()
	return done
}

// transfers: a transfer of this term is on its way. A raft that has ended may have left one without an answer.
func (s *Service) transfers(r *raft.Raft) bool {
	t := s.transferring.Load()
	return t != nil && t.r == r && t.term == r.CurrentTerm()
}

// stepDown ends the lead of a member whose log waits for space. Raft waits for the log meanwhile: a transfer would stay in its queue, and
// be carried out whenever there is space. So the log answers with its error, raft steps down, and a voter that is fit stands first.
func (s *Service) stepDown(ctx context.Context, term uint64) error {
	s.replaced.Store(true)
	for s.leading(term) {
		changed := s.changes.wait()
		var err error
		select {
		case <-changed:
		case <-time.After(logRetry):
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		if err == nil && s.wal.staying.Load() == 0 && s.faults.first(faultLogWaits) == nil {
			err = errors.New("its log has space again")
		}
		if err != nil && s.leading(term) {
			s.replaced.Store(false)
			return fmt.Errorf("step down: %w", err)
		}
	}
	return nil
}

// A candidate is a voter that this leader could hand over to.
type candidate struct {
	raft.Server
	answer statusAnswer
	rank   int
}

func (c *candidate) better(than *candidate) bool {
	if than == nil {
		return true
	}
	fit := func(c *candidate) int {
		switch {
		case c.answer.Unfit != "":
			return 0
		case c.answer.Fsync > slowAppend.Microseconds():
			return 1
		case c.answer.Fsync == 0: // it is not known, as of a release that would not hand over for it
			return 2
		}
		return 3
	}
	return cmp.Or(fit(c)-fit(than), c.rank-than.rank, cmp.Compare(c.answer.LastIndex, than.answer.LastIndex), cmp.Compare(than.ID, c.ID)) > 0
}

// successor is the best of the voters that can lead. It asks all of them, and waits for none much longer than for what it needs.
func (s *Service) successor(ctx context.Context, term uint64, c choice) (raft.Server, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	type reply struct {
		m   raft.Server
		a   statusAnswer
		err error
	}
	all := voters(s.raft.Load().GetConfiguration().Configuration())
	replies := make(chan reply, len(all))
	ask, ready := s.askOthers, s.faults.first(faultLogWaits)
	full := !c.leaving && s.suffers(refusesLeading) != nil
	if full { // then others may be, and not know it
		ask = s.tryOthers
	}
	go ask(ctx, all, func(i int, a statusAnswer, err error) { replies <- reply{all[i], a, err} })
	if full && ready == nil {
		ready = s.tryLog(ctx)
	}
	found := survey{voters: len(all), relieved: s.relief.lately()}
	if ready == nil {
		found.ready++
	}
	var enough <-chan time.Time
	for range len(all) - 1 {
		select {
		case r := <-replies:
			if r.err == nil && r.a.Term > term && s.wal.staying.Load() > 0 {
				return raft.Server{}, errOvertaken
			}
			rank, err := s.mayLead(r.m, r.a, r.err, term, c)
			if err == nil && !reachesMajority(r.a, all) {
				err = errors.New("it does not reach a majority of the voters")
			}
			found.hears(r.a)
			if c.addr == "" || string(r.m.Address) == c.addr {
				found.add(&candidate{r.m, r.a, rank}, err)
			}
			if r.err == nil && r.a.Healthy && !r.a.LogWaits {
				found.ready++
			}
			if found.best != nil && found.quorate() && enough == nil {
				enough = time.After(handOverGrace)
			}
			continue
		case <-enough:
		case <-ctx.Done():
		}
		break
	}
	return found.choose(c)
}

// A survey is what the voters have answered.
type survey struct {
	best    *candidate
	reasons []string // why the others can't lead
	ready   int      // whose logs take the first entry of the next term, as far as is known
	voters  int

	relieved int  // how many were relieved in the last minute, this member included
	soon     bool // one of the others was so a moment ago: what it suffered from may be about to be noticed on the others
	rests    bool // one of the others could lead, and was relieved itself not long ago
}

func (v *survey) add(c *candidate, err error) {
	v.rests = v.rests || errors.Is(err, errTooSoon)
	if err != nil {
		v.reasons = append(v.reasons, fmt.Sprintf("%s: %v", peerName(c.ID, c.Address), err))
	} else if c.better(v.best) {
		v.best = c
	}
}

// hears takes what a voter says of its relief; 0 = nothing.
func (v *survey) hears(a statusAnswer) {
	if a.Relieved > 0 && a.Relieved < reliefPause.Milliseconds() {
		v.relieved++
		v.soon = v.soon || a.Relieved < reliefSoon.Milliseconds()
	}
}

func (v *survey) quorate() bool { return v.ready > v.voters/2 }

func (v *survey) choose(c choice) (raft.Server, error) {
	switch {
	case v.best != nil && v.quorate() && c.relief && (v.relieved >= reliefsMost || v.soon):
		return raft.Server{}, fmt.Errorf("%w: %d in the last minute", errTooSoon, v.relieved)
	case v.best == nil && v.rests:
		return raft.Server{}, fmt.Errorf("%w: %s", errTooSoon, strings.Join(v.reasons, "; "))
	case v.best != nil && (v.quorate() || c.leaving):
		return v.best.Server, nil
	case v.best != nil: // reads go on here, and a new leader answers none before a majority has its first entry
		return raft.Server{}, fmt.Errorf("%w: the logs of %d of %d voters take an entry now, need %d", errNobody, v.ready, v.voters, v.voters/2+1)
	case v.voters < 2:
		return raft.Server{}, fmt.Errorf("%w: there is none", errNobody)
	case v.reasons == nil:
		return raft.Server{}, fmt.Errorf("%w: none has answered in time", errNobody)
	}
	return raft.Server{}, fmt.Errorf("%w: %s", errNobody, strings.Join(v.reasons, "; "))
}

// mayLead says why a voter that has answered so can't take over, or how good it would be.
func (s *Service) mayLead(m raft.Server, a statusAnswer, err error, term uint64, c choice) (rank int, _ error) {
	if c.rank != nil && err == nil {
		rank = c.rank(a)
	}
	last, _ := s.wal.last()
	switch {
	case err != nil:
		return 0, err
	case !a.Healthy:
		return 0, errors.New("it has a fault of its own")
	case a.Unfit != "" && !c.leaving:
		return 0, fmt.Errorf("it is unfit to lead: %s", a.Unfit)
	case a.LogWaits && !c.leaving:
		return 0, errors.New("its log takes no entry now")
	case a.Role != Follower.String():
		return 0, fmt.Errorf("it takes itself for a %s", a.Role)
	case a.Term != term:
		return 0, fmt.Errorf("it is in term %d, the leader in %d", a.Term, term)
	case a.LastIndex+promoteLag < last:
		return 0, fmt.Errorf("its log ends at %d, the leader's at %d", a.LastIndex, last)
	case rank < 0:
		return 0, errors.New("it would be no better")
	}
	if err := s.turns.mayTake(m.ID, term); err != nil {
		return 0, err
	}
	return rank, s.rests(a, c)
}

// rests: a member that was relieved again and again does not relieve others. One that takes no writes or answers no reads is relieved by who
// has rested for a minute.
func (s *Service) rests(a statusAnswer, c choice) error {
	urgent := s.wal.staying.Load() > 0 || s.suffers(refusesReads) != nil
	if !c.relief || a.Rests == 0 || urgent && a.Relieved >= reliefPause.Milliseconds() {
		return nil
	}
	return fmt.Errorf("%w: it was unfit to lead %v ago", errTooSoon, (time.Duration(a.Relieved) * time.Millisecond).Round(time.Second))
}

// turns are the answers of this leader's peers to raft's replication, in one term.
type turns struct {
	mu    sync.Mutex // guards the fields below
	term  uint64
	peers map[raft.ServerID]turn
}

type turn struct {
	answered    time.Time // an append, last
	transferred bool      // the lead, ever
	since       int       // answers since the last such transfer
	full        bool      // its log took no entries when it was sent some last
}

func (t *turns) peerLocked(id raft.ServerID, term uint64) turn {
	if term > t.term || t.peers == nil {
		t.term, t.peers = term, make(map[raft.ServerID]turn)
	}
	return t.peers[id]
}

// answers and refuses report whether it is news that the log takes entries, or that it does not.
func (t *turns) answers(id raft.ServerID, term uint64) (news bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peerLocked(id, term); term == t.term {
		p.answered = time.Now()
		p.since++
		news, p.full = p.full, false
		t.peers[id] = p
	}
	return news
}

func (t *turns) refuses(id raft.ServerID, term uint64) (news bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peerLocked(id, term); term == t.term {
		news, p.full = !p.full, true
		t.peers[id] = p
	}
	return news
}

func (t *turns) full(id raft.ServerID, term uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return term == t.term && t.peers[id].full
}

func (t *turns) transfers(id raft.ServerID, term uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peerLocked(id, term); term == t.term {
		p.transferred, p.since = true, 0
		t.peers[id] = p
	}
}

// mayTake: see the second way above.
func (t *turns) mayTake(id raft.ServerID, term uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch p := t.peerLocked(id, term); {
	case p.answered.IsZero():
		return errors.New("it has answered no append yet")
	case p.transferred && p.since == 0:
		return errors.New("it has answered no append since the last hand-over to it")
	case p.transferred && p.since < turnsAgain:
		return fmt.Errorf("it has answered %d appends since the last hand-over to it, of %d", p.since, turnsAgain)
	case time.Since(p.answered) > turnFresh:
		return fmt.Errorf("it has answered no append for %v", time.Since(p.answered).Round(time.Millisecond))
	}
	return nil
}

// A relief is how often this member was relieved because it was unfit to lead. A fault that comes and goes on all members must not
// send the lead around: so each says in its status when it was relieved, and for how long it relieves no others, and no more than
// reliefsMost of the voters are relieved in a minute.
type relief struct {
	mu    sync.Mutex // guards the fields below
	last  time.Time
	next  time.Time // not before, unless it is urgent
	again time.Time // not before, in any case
	pause time.Duration
}

// due: urgent is a fault with which this leader takes no writes or answers no reads. Then the long pauses would be an outage.
func (r *relief) due(urgent bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	return !now.Before(r.again) && (urgent || !now.Before(r.next))
}

// tried takes the outcome of a hand-over.
func (r *relief) tried(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if errors.Is(err, errNobody) || errors.Is(err, errTooSoon) { // the lead has not moved, and nothing was disturbed
		return
	}
	now := time.Now()
	r.again = now.Add(reliefAgain)
	switch {
	case err != nil:
		return
	case r.last.IsZero(), now.Sub(r.last) > 2*r.pause:
		r.pause = reliefPause
	default:
		r.pause = min(2*r.pause, reliefMost)
	}
	r.last, r.next = now, now.Add(r.pause)
}

// lately is 1 if this member was relieved in the last minute, else 0.
func (r *relief) lately() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last.IsZero() || time.Since(r.last) >= reliefPause {
		return 0
	}
	return 1
}

// answer is what this member's status says of it.
func (r *relief) answer() (relieved, rests int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last.IsZero() {
		return 0, 0
	}
	if r.pause > reliefPause { // it was so more than once
		rests = max(0, time.Until(r.next).Milliseconds())
	}
	return time.Since(r.last).Milliseconds() + 1, rests
}

var errTooSoon = errors.New("members were relieved not long ago")

// relieve hands over because this leader is unfit to lead: to a voter that is fit, at most once a minute and then twice as long, up to
// ten; if the fault stops writes or reads, at most every five seconds, as long as there is one that was not relieved itself. rank is that
// of a choice. With an error this member stays the leader: errNobody, errTooSoon, or what raft says.
func (s *Service) relieve(why error, rank func(statusAnswer) int) error {
	urgent := s.urgent()
	if !s.relief.due(urgent) {
		return errTooSoon
	}
	ctx, cancel := context.WithTimeout(s.ctx, handOverLimit)
	defer cancel()
	err := s.handOver(ctx, choice{relief: true, rank: rank})
	s.relief.tried(err)
	if err == nil {
		s.log.Warn("this member led and was unfit to, so it has handed over", "why", why)
	}
	return err
}

// urgent: see relief.due.
func (s *Service) urgent() bool { return s.suffers(refusesLeading|refusesReads) != nil }

// watchFitness relieves this member as long as it leads and is unfit to. One that is silent is replaced by the others.
func (s *Service) watchFitness() {
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	for {
		changed := s.changes.wait()
		s.giveWay()
		select {
		case <-tick.C:
		case <-changed:
		case <-s.fitness:
		case <-s.ctx.Done():
			return
		}
	}
}

// giveWay relieves this member if it leads, is unfit to and can be. If nobody can lead in its place, and it can't write either, it
// refuses writes from here on.
func (s *Service) giveWay() {
	s.checkHang() // one that has ended is no reason any more
	why := s.unfitToLead()
	if _, hangs := s.hangs(); s.role() != Leader || s.silent() != nil || hangs != nil { // raft would carry out a transfer when the call returns
		s.replaced.Store(false)
		s.refusal.Store(nil)
		return
	}
	if why == nil {
		s.replaced.Store(false)
		s.refuseFor(s.lacksLogs())
		return
	}
	err := s.tryToGiveWay(why)
	if err == nil {
		return
	}
	s.log.Debug("this member is unfit to lead and stays the leader", "why", why, "error", err)
	full := s.suffers(refusesLeading)
	if full != nil && (errors.Is(err, errNobody) || s.wal.staying.Load() > 0 && errors.Is(err, errTooSoon)) {
		s.refuseFor(fmt.Errorf("%w; %w", full, err))
	} else {
		s.refuseFor(s.lacksLogs())
	}
}

// refuseFor has this leader refuse writes, or with nil take them.
func (s *Service) refuseFor(why error) {
	if why == nil {
		s.refusal.Store(nil)
		return
	}
	refusal := fmt.Errorf("%w: %w", errRefused, why)
	s.refusal.Store(&refusal)
	s.batch.refuseQueue(refusal)
	s.refusing.notify()
}

// lacksLogs says why nothing that this leader takes is committed: too many logs are full. What has met them is sent again until one takes it.
func (s *Service) lacksLogs() error {
	r := s.raft.Load()
	term, all := r.CurrentTerm(), voters(r.GetConfiguration().Configuration())
	takes := 0
	for _, m := range all {
		full := s.turns.full(m.ID, term)
		if string(m.ID) == s.ident().id {
			full = s.faults.first(faultLogWaits) != nil
		}
		if !full {
			takes++
		}
	}
	if takes > len(all)/2 {
		return nil
	}
	return fmt.Errorf("the logs of %d of %d voters have space or a descriptor for an entry, need %d", takes, len(all), len(all)/2+1)
}

// tryToGiveWay: where the log waits for space, raft waits for the log and can't hand over. Then it is told of the error as soon as
// another voter is there: it steps down, and that voter is the first to stand. Where the others are in a later term, raft would have
// stepped down already, so it does at once.
func (s *Service) tryToGiveWay(why error) error {
	if s.wal.staying.Load() == 0 {
		s.replaced.Store(false)
		return s.relieve(why, s.preference(why))
	}
	switch _, err := s.successor(s.ctx, s.raft.Load().CurrentTerm(), choice{relief: true}); {
	case errors.Is(err, errOvertaken):
	case err != nil:
		return err
	case !s.relief.due(true):
		return errTooSoon
	default:
		s.relief.tried(nil)
	}
	s.replaced.Store(true)
	return nil
}

// takesNoWrite says why this leader does not take an entry. What mends a full cluster is taken: the list of those who may join, which is
// as good as no space.
func (s *Service) takesNoWrite(data []byte) error {
	p := s.refusal.Load()
	if p == nil {
		return nil
	}
	e, err := decodeEntry(data)
	if err != nil || e.kind != entryBatch {
		return nil
	}
	if len(e.batch.txs) == 0 {
		return *p
	}
	for _, tx := range e.batch.txs {
		for _, o := range tx {
			if o.kind != opAllow && o.kind != opDisallow {
				return *p
			}
		}
	}
	return nil
}

// preference ranks the voters for a leader that is unfit for this reason; nil = all alike.
func (s *Service) preference(why error) func(statusAnswer) int {
	var lost *unreachedError
	if errors.As(why, &lost) {
		return func(a statusAnswer) int { return lost.rank(a.ID) }
	}
	if why == s.faults.first(faultSlow) { // an append that times out says nothing of the peer's disk here, and the peer knows
		own := s.wal.fsync().Microseconds()
		return func(a statusAnswer) int { return cmp.Compare(own, slowTimes*a.Fsync) }
	}
	return nil
}

// standsLast reports whether this member does not stand for election yet: it is unfit to lead, and the others have not had their turn.
func (s *Service) standsLast() bool {
	return s.unfitToLead() != nil && min(s.leaderSilence(), time.Duration(monotonic()-s.begun.Load())) < lastTurn
}

// TransferLeader has another voter lead: the one that peers reach at addr (host:port), or with "" the best of them, which is one
// that answers, is fit to lead and keeps up. It works on every member, leading or not, and returns nil once this member follows that
// one, also if it led before. Writes wait for the new leader meanwhile, some ten milliseconds.
//
// It is ErrNotApplied if the lead has not moved, with the reason: nobody can take over, or (ErrInvalid) no voter is at addr. It is
// ErrUncertain if ctx ended before the outcome was known. Either way a retry is safe. Close and RemoveMember hand over by themselves.
func (s *Service) TransferLeader(ctx context.Context, addr string) error {
	if addr != "" {
		var err error
		if addr, err = canonicalAddr(addr); err != nil {
			return notApplied(err)
		}
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	ctx, release := s.untilClose(ctx)
	defer release()
	was, sent := "", false
	for backoff := resendMin; ; backoff = min(2*backoff, resendMax) {
		changed := s.changes.wait()
		if err := s.faults.first(faultClosed, faultRemoved); err != nil {
			return notApplied(err)
		}
		id, leaderAddr := s.leader()
		switch {
		case id == "":
		case addr != "" && leaderAddr == addr, addr == "" && was != "" && id != was:
			return nil
		default:
			was = cmp.Or(was, id)
		}
		err := s.askToTransfer(ctx, id, leaderAddr, addr)
		var r *refusal
		refused := errors.As(err, &r)
		switch {
		case refused && r.Code == codeConflict:
			return notApplied(fmt.Errorf("%w: %s", ErrInvalid, r.Message))
		case refused && r.Code == codeNotApplied:
			return notApplied(errors.New(r.Message))
		case refused && r.Status == http.StatusNotFound:
			return notApplied(fmt.Errorf("the leader at %s is of a release without TransferLeader: upgrade it, or close it and another one leads", leaderAddr))
		case err == nil, !refused && !errors.Is(err, ErrNoLeader), refused && !r.definite():
			sent = true
		}
		if err == nil {
			backoff = resendMin // it is about to lead
		}
		select {
		case <-changed:
		case <-time.After(backoff):
		case <-ctx.Done():
			if err == nil {
				err = errors.New("the new leader has not made itself known here")
			}
			if sent {
				return fmt.Errorf("%w: %w: %v", ErrUncertain, context.Cause(ctx), err)
			}
			return notApplied(fmt.Errorf("%w: %w", err, context.Cause(ctx)))
		}
	}
}

func (s *Service) askToTransfer(ctx context.Context, id, leaderAddr, addr string) error {
	switch id {
	case "":
		return ErrNoLeader
	case s.ident().id:
		return s.serveTransfer(ctx, addr)
	}
	ctx, cancel := s.whileLed(ctx, id)
	defer cancel()
	return s.peer.transfer(ctx, id, leaderAddr, addr)
}

// serveTransfer hands over on the leader.
func (s *Service) serveTransfer(ctx context.Context, addr string) error {
	if s.raft.Load().State() != raft.Leader {
		return s.notLeader()
	}
	if addr != "" {
		m, found := s.memberAt(addr)
		switch {
		case !found:
			return refuse(http.StatusConflict, codeConflict, "no member is at %s", addr)
		case string(m.ID) == s.ident().id:
			return nil
		case m.Suffrage != raft.Voter:
			return refuse(http.StatusConflict, codeConflict, "the member at %s has no vote", addr)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, handOverLimit)
	defer cancel()
	if err := s.handOver(ctx, choice{addr: addr}); err != nil {
		return refuse(http.StatusServiceUnavailable, codeNotApplied, "%s stays the leader: %v", s.conf.Addr, err)
	}
	return nil
}

func (s *Service) memberAt(addr string) (raft.Server, bool) {
	for _, m := range s.raft.Load().GetConfiguration().Configuration().Servers {
		if string(m.Address) == addr {
			return m, true
		}
	}
	return raft.Server{}, false
}
