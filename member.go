package quorate

// Who takes part: joining, promotion, removal and new addresses, as the leader decides them and as a member asks for them,
// and what is known of the others beside raft's configuration. It owns every change of the configuration, and the functions
// that the peer protocol calls on this member. When the state's format is raised depends on who takes part, so that is here too.
// It never touches SQL or the bytes of a message.
//
// One rule stands above the others: a change that adds or removes a voter is proposed only while every voter that counts
// answers in this term and has the whole log, the last such change included. Otherwise two of three voters can end without
// a leader for ever, each refusing what the other one has (seen: a member promoted while another was cut off).

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	promoteSoon     = 5 * time.Millisecond // when a member has joined or become a voter, and then twice as long each time, up to
	promoteInterval = 100 * time.Millisecond
	promoteLag      = 64              // entries that a voter, or who is to become one, may be behind: one append
	raftPatience    = 2 * time.Second // for raft's main loop to take an entry: it may be waiting for the disk
	replayPatience  = 5 * time.Second // for Open to apply the end of a sole member's log
	probeTimeout    = time.Second
	keepAfterSend   = time.Minute // the log since a snapshot that was sent is kept, for the receiver needs it next
	goneAfter       = time.Second // of silence, and another member may take its address
	raiseInterval   = time.Second // between two looks at what the members read
)

// peerTable is what this member knows of the others beside the configuration. It is a hint and never a proof.
type peerTable struct {
	mu        sync.Mutex // guards the fields below
	heard     map[string]time.Time
	announced map[string]announced // by id
	sends     int                  // snapshots being sent
	sent      time.Time            // when the last one ended
	asks      map[string]int       // by id: read rounds' calls in progress
}

// An announced address stands as long as the configuration says what it said then, or nothing: after that the configuration
// is the newer one.
type announced struct{ addr, instead string }

func (t *peerTable) contact(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.heard == nil {
		t.heard = make(map[string]time.Time)
	}
	t.heard[id] = time.Now()
}

// sinceHeard is negative if nothing was heard.
func (t *peerTable) sinceHeard(id string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if at, ok := t.heard[id]; ok {
		return max(time.Since(at), 1)
	}
	return -1
}

func (t *peerTable) announce(id, addr, instead string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.announced == nil {
		t.announced = make(map[string]announced)
	}
	t.announced[id] = announced{addr, instead}
}

// unannounce forgets an address that did not prove itself.
func (t *peerTable) unannounce(id, addr string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.announced[id].addr == addr {
		delete(t.announced, id)
	}
}

func (t *peerTable) anyAnnounced() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.announced) > 0
}

// announcedAddr is empty if nothing newer than the configured address is known.
func (t *peerTable) announcedAddr(id, configured string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a := t.announced[id]; a.instead == configured || placeholder(configured) {
		return a.addr
	}
	return ""
}

const maxAsks = 16

// ask takes a place for a call to a member, if it has not left too many unanswered.
func (t *peerTable) ask(id string) (leave func(), ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.asks[id] >= maxAsks {
		return nil, false
	}
	if t.asks == nil {
		t.asks = make(map[string]int)
	}
	t.asks[id]++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.asks[id]--
	}, true
}

func (t *peerTable) snapshots(delta int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sends += delta; delta < 0 {
		t.sent = time.Now()
	}
}

func (t *peerTable) sending() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sends > 0 || !t.sent.IsZero() && time.Since(t.sent) < keepAfterSend
}

// startPeer makes the protocol's side of this member; its functions answer 503 until raft runs.
func (s *Service) startPeer() {
	raftNow := func() *raft.Raft { return s.raft.Load() }
	s.peer = newPeer(peerHost{
		self: func() (string, string, string) {
			ident := s.ident()
			return ident.id, ident.cluster, s.conf.Addr
		},
		ready:      func() bool { return raftNow() != nil },
		server:     s.server,
		announced:  s.announcedAddr,
		unannounce: s.members.unannounce,
		allowed:    func(addr string) bool { return s.fsm.members.Load().allowed[addr] },
		removed:    func(id string) bool { return s.fsm.members.Load().removed[id] != 0 },
		silent:     s.silent,
		leading:    s.leading,
		leader:     s.leader,
		term:       func() uint64 { return raftNow().CurrentTerm() },
		states:     s.stateTerm,
		hasLeader:  func() bool { id, _ := s.leader(); return id != "" },
		lastEntry:  s.lastEntry,
		applied:    func() uint64 { return s.store.meta().applied },
		raftEnd:    func() uint64 { return raftNow().LastIndex() },
		termAt:     func(index uint64) (uint64, bool) { return s.wal.termAt(index) },
		checkEntry: checkEntry,
		formats:    s.formats,
		stranger:   s.noteStranger,
		contact:    s.members.contact,
		called:     s.reach.called,
		propose:    s.servePropose,
		roundWith:  s.roundWith,
		readIndex:  s.serveReadIndex,
		join:       s.serveJoin,
		remove:     s.serveRemove,
		transfer:   s.serveTransfer,
		standsLast: s.standsLast,
		logWaits:   func() error { return s.faults.first(faultLogWaits) },
		tryLog:     s.tryLog,
		tryDisk:    s.tryDisk,
		answers: func(id raft.ServerID, term uint64) {
			if s.turns.answers(id, term) {
				give(s.fitness)
			}
		},
		refuses: func(id raft.ServerID, term uint64) {
			if s.turns.refuses(id, term) {
				give(s.fitness)
			}
		},
		status:    s.statusAnswer,
		confirm:   s.confirmLeader,
		state:     s.copyState,
		snapshots: s.members.snapshots,
		incoming:  func() string { return s.path("snap.incoming.part") },
		roomFor:   s.roomFor,
		noRoom:    func(err error) { s.fsm.noRoom(err) },
		others:    s.others,
		committed: func() uint64 { return raftNow().CommitIndex() },
	}, s.conf.Client, s.conf.TLS, s.log)
	if s.conf.lookup != nil {
		s.peer.lookup = s.conf.lookup
	}
}

// ServeHTTP answers the other members at /raft/. Register the Service for the pattern "/raft/" on a server that listens on
// Addr. Without client certificates it belongs on a trusted network.
//
// The server must go on serving until Close has returned: call http.Server.Shutdown after it. A leader that nobody reaches looks alive
// to the others, which can forward neither writes nor reads to it until it has noticed; and Shutdown waits for handlers that wait for
// this Service, such as a page that ranges over Watch.
func (s *Service) ServeHTTP(w http.ResponseWriter, req *http.Request) { s.peer.ServeHTTP(w, req) }

// formats is asked before there is a state, by what fetches one.
func (s *Service) formats() (state, reads uint64) {
	if s.store == nil {
		return firstFormat, s.conf.format
	}
	return s.store.meta().format, s.conf.format
}

func (s *Service) server(id string) (addr string, known, voter bool) {
	for _, m := range s.raft.Load().GetConfiguration().Configuration().Servers {
		if string(m.ID) == id {
			return string(m.Address), true, m.Suffrage == raft.Voter
		}
	}
	return "", false, false
}

func (s *Service) addressOf(m raft.Server) string {
	if addr := s.members.announcedAddr(string(m.ID), string(m.Address)); addr != "" {
		return addr
	}
	return string(m.Address)
}

func (s *Service) announcedAddr(id string) string {
	if !s.members.anyAnnounced() {
		return ""
	}
	configured, _, _ := s.server(id)
	return s.members.announcedAddr(id, configured)
}

// others are the members of the configuration that raft uses now, without this one.
func (s *Service) others() []raft.Server {
	var list []raft.Server
	for _, m := range s.raft.Load().GetConfiguration().Configuration().Servers {
		if string(m.ID) != s.ident().id && !placeholder(string(m.Address)) {
			list = append(list, m)
		}
	}
	return list
}

func (s *Service) leading(term uint64) bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
}

// leader is whom this member takes for the leader; both are empty if it knows none.
func (s *Service) leader() (id, addr string) {
	r := s.raft.Load()
	if r == nil || s.faults.first(faultRemoved) != nil {
		return "", ""
	}
	a, i := r.LeaderWithID()
	if other := s.announcedAddr(string(i)); other != "" {
		return string(i), other
	}
	return string(i), string(a)
}

func (s *Service) lastEntry() (index, term uint64) {
	index, term = s.wal.last()
	if m := s.store.meta(); m.applied > index {
		return m.applied, m.term
	}
	return index, term
}

// begin hands an entry to raft if this member leads; the function that it returns waits for the outcome, and never on raft
// alone, which may shut down without an answer.
func (s *Service) begin(data []byte, patience time.Duration) func(ctx context.Context) (outcome, bool, error) {
	r := s.raft.Load()
	if r.State() != raft.Leader {
		return nil
	}
	if err := s.takesNoWrite(data); err != nil {
		return func(context.Context) (outcome, bool, error) { return outcome{}, false, err }
	}
	if s.transfers(r) {
		return func(context.Context) (outcome, bool, error) {
			return outcome{}, false, raft.ErrLeadershipTransferInProgress
		}
	}
	early := s.fsm.ahead.expect(data)
	future := r.Apply(data, patience)
	if early {
		runtime.Gosched() // raft goes first
		s.fsm.ahead.decode(data)
	}
	return func(ctx context.Context) (outcome, bool, error) {
		if err := s.awaitEntry(ctx, future, data); err != nil {
			sent, why := fate(err)
			return outcome{}, sent, why
		}
		o, ok := future.Response().(outcome)
		if !ok { // this member is closing, or had the entry's effect already
			return outcome{}, true, errors.New("no answer from apply")
		}
		return o, true, nil
	}
}

// fate tells of an entry that was answered with an error whether it may be in the log all the same.
func fate(err error) (sent bool, why error) {
	switch {
	case errors.Is(err, errRefused): // it is in the log here, or raft is about to append it
		return true, err
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return false, errRaftBusy
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress), notStored(err):
		return false, err
	}
	return true, err
}

// awaitEntry is await, and ends when this leader finds that it takes no such entry for now: nobody knows how long this one would be waited for.
func (s *Service) awaitEntry(ctx context.Context, f raft.Future, data []byte) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	for {
		refusing := s.refusing.wait()
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-refusing:
			if err := s.takesNoWrite(data); err != nil {
				return err
			}
		}
	}
}

// propose sends an entry towards the log, here or on the leader.
func (s *Service) propose(ctx context.Context, data []byte) (outcome, bool, error) {
	if wait := s.begin(data, raftPatience); wait != nil {
		return wait(ctx)
	}
	id, addr := s.leader()
	if id == "" || id == s.ident().id {
		return outcome{}, false, ErrNoLeader
	}
	ctx, cancel := s.whileLed(ctx, id)
	defer cancel()
	// A connection may die without a word while the leader lives: then the batch is sent again on another one.
	ctx, stop := context.WithTimeout(ctx, appendTimeout+timeFor(int64(len(data))))
	defer stop()
	answer, sent, err := s.peer.propose(ctx, id, addr, data)
	var r *refusal
	switch {
	case errors.As(err, &r) && r.Final && !sent:
		return outcome{}, false, fmt.Errorf("%w: %w", errRefused, err)
	case err != nil:
		return outcome{}, sent, err
	}
	o, err := decodeOutcome(answer)
	return o, true, err
}

// whileLed ends ctx as soon as this member takes another one for the leader, or nobody. A leader whose machine is gone does not
// even refuse: a call to it would hang for as long as TCP does, and the batches that wait behind it too.
func (s *Service) whileLed(ctx context.Context, id string) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		for {
			changed := s.changes.wait()
			if now, _ := s.leader(); now != id {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, cancel
}

// servePropose takes a batch that another member has forwarded. It is never forwarded again.
func (s *Service) servePropose(ctx context.Context, data []byte) ([]byte, error) {
	if len(data) > 0 && uint64(data[0]) > entryFormat {
		return nil, refuse(http.StatusPreconditionFailed, codeProtocol, "an entry of format %d, and this member reads up to %d: upgrade it",
			data[0], entryFormat)
	}
	if err := s.refuseHeld(); err != nil {
		return nil, err
	}
	d := decode(data)
	if d.err != nil || d.entry.kind != entryBatch && d.entry.kind != entryOpen {
		return nil, refuse(http.StatusBadRequest, codeBadRequest, "not a batch")
	}
	s.fsm.ahead.add(data, &d)
	wait := s.begin(data, raftPatience)
	if wait == nil {
		return nil, s.notLeader()
	}
	ctx, cancel := s.untilClose(ctx)
	defer cancel()
	switch o, sent, err := wait(ctx); {
	case err == nil:
		return encodeOutcome(o), nil
	case sent:
		return nil, err
	case errors.Is(err, errRefused):
		r := refuse(http.StatusServiceUnavailable, codeNotApplied, "%v", err)
		r.Final = true
		return nil, r
	case errors.Is(err, errRaftBusy), passing(err):
		return nil, refuse(http.StatusServiceUnavailable, codeNotApplied, "%v", err)
	}
	return nil, s.notLeader()
}

// notLeader names the leader, unless that is this member itself: then there is none yet.
func (s *Service) notLeader() error {
	r := refuse(http.StatusMisdirectedRequest, codeNotLeader, "this member does not lead")
	if id, addr := s.leader(); id != s.ident().id {
		r.LeaderID, r.LeaderAddr = id, addr
	}
	return r
}

// serveReadIndex is a round for another member; it shares this leader's own rounds.
func (s *Service) serveReadIndex(ctx context.Context) (readPoint, error) {
	if err := s.refuseHeld(); err != nil {
		return readPoint{}, err
	}
	if s.raft.Load().State() != raft.Leader {
		return readPoint{}, s.notLeader()
	}
	at, err := s.reads.join(ctx)
	if err != nil {
		return readPoint{}, refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
	}
	return at.readPoint, nil
}

// copyState is a copy of the whole state for a member that must rebuild its own: from a leader that a quorum has just confirmed.
func (s *Service) copyState(ctx context.Context) (stateCopy, error) {
	if err := s.refusesReads(); err != nil {
		return stateCopy{}, refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
	}
	at, err := s.serveReadIndex(ctx)
	if err != nil {
		return stateCopy{}, err
	}
	if err := s.fsm.applied.wait(ctx, at.index); err != nil {
		return stateCopy{}, err
	}
	c, err := s.store.copy(ctx)
	if err != nil {
		return stateCopy{}, err
	}
	return stateCopy{c, c.size}, nil
}

// lead does a leader's duties as long as this member is one.
func (s *Service) lead() {
	for s.ctx.Err() == nil {
		changed := s.changes.wait()
		if r := s.raft.Load(); r.State() == raft.Leader {
			s.leadTerm(r.CurrentTerm())
		}
		select {
		case <-changed:
		case <-s.ctx.Done():
		}
	}
}

func (s *Service) leadTerm(term uint64) {
	s.beginTerm(term)
	defer s.heldBack.Store(nil)
	up := raising{told: make(map[raft.ServerID]bool)}
	for pause := promoteSoon; s.leading(term); pause = min(2*pause, promoteInterval) {
		s.raise(&up)
		promoted, err := s.promote()
		if err != nil {
			s.log.Debug("no promotion yet", "error", err)
		}
		if promoted {
			pause = promoteSoon
		}
		s.ownAddress()
		select {
		case <-time.After(pause):
		case <-s.joined:
			pause = promoteSoon
		case <-s.ctx.Done():
			return
		}
	}
}

// beginTerm makes the term's first entry that apply sees; reads wait for it.
func (s *Service) beginTerm(term uint64) {
	for s.leading(term) && s.store.meta().term != term && s.ctx.Err() == nil {
		if wait := s.begin(encodeTermStart(s.store.meta().format), raftPatience); wait != nil {
			ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second) // raft may shut down without an answer
			_, _, err := wait(ctx)
			cancel()
			if err == nil {
				return
			}
		}
		select {
		case <-time.After(resendMin):
		case <-s.ctx.Done():
		}
	}
}

// A raising is what one term's leader does to bring the state to the format that it writes.
type raising struct {
	next time.Time              // not before
	told map[raft.ServerID]bool // who was said to keep it back
}

// raise brings the state to the newest format once every member reads it, and while there is only one member, the history to
// the length that this one's Config wants. No change of the members comes between the members' word and the entry.
func (s *Service) raise(up *raising) {
	format, _, due := s.raiseDue()
	if !due || time.Now().Before(up.next) {
		return
	}
	up.next = time.Now().Add(raiseInterval)
	if !s.allRead(format, up) { // asked again below: no change of the members waits for one that does not answer
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
	defer cancel()
	end, err := s.changeMembers(ctx)
	if err != nil {
		return
	}
	defer end()
	if format, history, due := s.raiseDue(); due && s.allRead(format, up) {
		s.proposeRaise(format, history)
	}
}

// raiseDue: the format that the state should have and the length of its history, and whether it has others.
func (s *Service) raiseDue() (format, history uint64, due bool) {
	m := s.store.meta()
	format, history = max(s.conf.format, m.format), m.keep
	if m.keep == 0 || s.alone() {
		history = uint64(s.conf.History)
	}
	return format, history, format > m.format || format >= historyFormat && history != m.keep
}

// alone: this is the only member of the configuration, of any kind.
func (s *Service) alone() bool {
	list := s.raft.Load().GetConfiguration().Configuration().Servers
	return len(list) == 1 && string(list[0].ID) == s.ident().id
}

// allRead asks every member, voter or not, whether it reads a format. The first that does not, or does not answer, is named in the
// log, once a term.
func (s *Service) allRead(format uint64, up *raising) bool {
	ctx, cancel := context.WithTimeout(s.ctx, probeTimeout)
	defer cancel()
	list := s.raft.Load().GetConfiguration().Configuration().Servers
	errs := make([]error, len(list))
	s.askOthers(ctx, list, func(i int, a statusAnswer, err error) {
		if err == nil && a.Format < format {
			err = fmt.Errorf("it reads up to format %d", a.Format)
		}
		errs[i] = err
	})
	for i, err := range errs {
		if err == nil {
			continue
		}
		held := shortText(fmt.Sprintf("%s: %v", peerName(list[i].ID, list[i].Address), err))
		s.heldBack.Store(&held)
		if m := list[i]; !up.told[m.ID] && s.ctx.Err() == nil {
			up.told[m.ID] = true
			s.log.Info("a member keeps the cluster at its old format", "peer", peerName(m.ID, m.Address),
				"format", s.store.meta().format, "next", format, "reason", err)
		}
		return false
	}
	return true
}

// proposeRaise returns when the entry's fate is known here, or this member leads no more: until then it may still be committed,
// and whoever joined meanwhile might not read what follows. The next leader admits nobody before it has applied what is in its log.
func (s *Service) proposeRaise(format, history uint64) {
	wait := s.begin(encodeRaise(format, history), raftPatience)
	if wait == nil {
		return
	}
	was := s.store.meta()
	ctx, cancel := s.whileLed(s.ctx, s.ident().id)
	defer cancel()
	_, _, err := wait(ctx)
	switch m := s.store.meta(); {
	case err != nil:
		s.log.Debug("the format was not raised", "error", err)
	case m.format != was.format:
		s.log.Info("the cluster writes a newer format from now on", "format", m.format, "before", was.format, "history", m.keep)
	default:
		s.log.Info("the history has another length from now on", "changes", m.keep, "before", was.keep)
	}
}

// awaitRaise waits while this is the only member and has yet to raise the state's format, or to set its history's length: its
// session is opened after that, so that no write of a new cluster is in an older format. With others it may be long until they all
// read it, and their writes go on.
func (s *Service) awaitRaise() {
	for s.ctx.Err() == nil {
		at := s.fsm.applied.at()
		if _, _, due := s.raiseDue(); !due || !s.alone() {
			return
		}
		ctx, cancel := context.WithTimeout(s.ctx, 50*time.Millisecond)
		s.fsm.applied.wait(ctx, at+1)
		cancel()
	}
}

// ownAddress puts this leader's address into the configuration if it came back at another one, or has one at last.
func (s *Service) ownAddress() {
	addr, _, _ := s.server(s.ident().id)
	if s.conf.Addr == "" || addr == s.conf.Addr {
		return
	}
	if !placeholder(addr) && len(s.others()) > 0 && !s.fsm.members.Load().allowed[s.conf.Addr] {
		s.notMoved(addr)
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
	defer cancel()
	end, err := s.changeMembers(ctx)
	if err != nil {
		return
	}
	defer end()
	err = s.awaitRoom(ctx, s.conf.Addr, s.ident().id)
	if err == nil {
		err = s.setServer(ctx, s.ident().id, s.conf.Addr)
	}
	if err != nil {
		s.log.Debug("this leader's address is not in the configuration yet", "error", err)
		return
	}
	s.moved()
}

// changeMembers is this caller's turn to change the configuration; a turn may take as long as a majority does not answer, so
// that waiting for it ends with ctx.
func (s *Service) changeMembers(ctx context.Context) (end func(), err error) {
	select {
	case s.changing <- struct{}{}:
		return func() { <-s.changing }, nil
	case <-ctx.Done():
		return nil, refuse(http.StatusServiceUnavailable, codeNotReady, "another change of the members is under way: %v", context.Cause(ctx))
	}
}

// A configuration is raft's newest one with its index in the log, so that a change can say what it changes.
type configuration struct {
	raft.Configuration
	index uint64
}

// settled is the newest configuration, if it is applied here. Its index comes from apply: raft's own future says 0 (v1.8.0,
// Raft.GetConfiguration), with which raft changes whatever there is.
func (s *Service) settled() (configuration, error) {
	newest := s.raft.Load().GetConfiguration().Configuration()
	m := s.fsm.members.Load()
	if !slices.Equal(newest.Servers, m.config.Servers) {
		return configuration{}, refuse(http.StatusServiceUnavailable, codeNotReady, "the last change of the members is not applied here yet")
	}
	return configuration{newest, m.index}, nil
}

// awaitSettled waits for the change under way.
func (s *Service) awaitSettled(ctx context.Context) (configuration, error) {
	for {
		c, err := s.settled()
		if err == nil {
			return c, nil
		}
		select {
		case <-time.After(resendMin):
		case <-ctx.Done():
			return c, err
		}
	}
}

// setServer adds a non-voter, or changes the address of a member of any kind.
func (s *Service) setServer(ctx context.Context, id, addr string) error {
	c, err := s.awaitSettled(ctx)
	if err != nil {
		return err
	}
	return await(ctx, s.raft.Load().AddNonvoter(raft.ServerID(id), raft.ServerAddress(addr), c.index, raftPatience))
}

// promote makes the first non-voter that is ready a voter. One that is not holds up no other.
func (s *Service) promote() (promoted bool, err error) {
	r := s.raft.Load()
	c, err := s.settled()
	if err != nil {
		return false, err
	}
	var waiting []error
	for _, m := range c.Servers {
		if m.Suffrage == raft.Voter {
			continue
		}
		ctx, cancel := context.WithTimeout(s.ctx, probeTimeout)
		err := s.mayPromote(ctx, m, c)
		cancel()
		if err != nil {
			s.noVote(string(m.ID), string(m.Address), err)
			waiting = append(waiting, err)
			continue
		}
		ctx, cancel = context.WithTimeout(s.ctx, 5*time.Second)
		defer cancel()
		end, err := s.changeMembers(ctx)
		if err != nil {
			return false, err
		}
		defer end()
		if err := await(ctx, r.AddVoter(m.ID, m.Address, c.index, raftPatience)); err != nil {
			return false, err
		}
		s.voteless.keep(func(who string) bool { return who != string(m.ID) })
		s.log.Info("a member is a voter now", "peer", peerName(m.ID, m.Address))
		return true, nil
	}
	return false, errors.Join(waiting...)
}

// mayPromote: the candidate and every voter answer, at their addresses, in this term, with the whole log.
func (s *Service) mayPromote(ctx context.Context, m raft.Server, c configuration) error {
	all := append(voters(c.Configuration), m)
	for i, err := range s.probe(ctx, all, c.index) {
		switch {
		case err == nil:
		case all[i].ID == m.ID:
			return fmt.Errorf("the leader waits for it: %w", err)
		default:
			return fmt.Errorf("nobody gets a vote while a voter does not keep up: start member %s, or call RemoveMember(ctx, %q): %w",
				peerName(all[i].ID, s.addressOf(all[i])), all[i].Address, err)
		}
	}
	return nil
}

// probe asks each member whether it keeps up with this leader: the same id at that address, this term, and the log up to
// promoteLag entries, at least up to the last change of the configuration.
func (s *Service) probe(ctx context.Context, list []raft.Server, configIndex uint64) []error {
	r := s.raft.Load()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, m := range list {
		if string(m.ID) == s.ident().id {
			continue
		}
		wg.Go(func() {
			base := baseURL(string(m.Address), s.conf.TLS)
			a, err := s.askStatus(ctx, m.ID, base)
			last, _ := s.wal.last()
			switch {
			case err != nil:
				errs[i] = err
			case a.Term != r.CurrentTerm():
				errs[i] = fmt.Errorf("%s is in term %d, the leader in %d", base, a.Term, r.CurrentTerm())
			case a.LastIndex < configIndex || a.LastIndex+promoteLag < last:
				errs[i] = fmt.Errorf("the log of %s ends at %d, the leader's at %d", base, a.LastIndex, last)
			case !a.Healthy:
				errs[i] = fmt.Errorf("%s reports a fault", base)
			}
		})
	}
	wg.Wait()
	return errs
}

// askOthers asks all of the list but this member for their status, at once, and calls f with each answer, one at a time.
func (s *Service) askOthers(ctx context.Context, list []raft.Server, f func(i int, a statusAnswer, err error)) {
	s.askEach(ctx, list, s.peer.status, f)
}

// tryOthers is askOthers of members that try out their logs first.
func (s *Service) tryOthers(ctx context.Context, list []raft.Server, f func(i int, a statusAnswer, err error)) {
	s.askEach(ctx, list, s.peer.statusTried, f)
}

func (s *Service) askEach(ctx context.Context, list []raft.Server, ask func(context.Context, string) (statusAnswer, error), f func(int, statusAnswer, error)) {
	var mu sync.Mutex // held by f
	var wg sync.WaitGroup
	for i, m := range list {
		if string(m.ID) == s.ident().id {
			continue
		}
		wg.Go(func() {
			base, began := baseURL(s.addressOf(m), s.conf.TLS), time.Now()
			a, err := ask(ctx, base)
			err = s.checkStatus(m.ID, base, a, err)
			s.reach.called(string(m.ID), base, began, err)
			mu.Lock()
			defer mu.Unlock()
			f(i, a, err)
		})
	}
	wg.Wait()
}

// askStatus is what this member of this cluster says of itself, if it is the one that answers there.
func (s *Service) askStatus(ctx context.Context, id raft.ServerID, base string) (statusAnswer, error) {
	a, err := s.peer.status(ctx, base)
	return a, s.checkStatus(id, base, a, err)
}

func (s *Service) checkStatus(id raft.ServerID, base string, a statusAnswer, err error) error {
	switch {
	case err != nil:
		return explain(err, base)
	case a.ID != string(id) || a.Cluster != s.ident().cluster:
		return fmt.Errorf("member %s answers at %s", shortID(a.ID), base)
	}
	return nil
}

// serveJoin admits a new member, or takes the new address of an old one. Only the leader decides; any member notes an
// announced address, so that a majority that moved can find each other and elect one.
func (s *Service) serveJoin(ctx context.Context, req joinRequest) (joinAnswer, error) {
	addr, err := canonicalAddr(req.Addr)
	if err != nil {
		return joinAnswer{}, refuse(http.StatusBadRequest, codeBadRequest, "%v", err)
	}
	if !validID(req.ID) {
		return joinAnswer{}, refuse(http.StatusBadRequest, codeBadRequest, "malformed id")
	}
	if current, known, _ := s.server(req.ID); req.Announce && known && s.fsm.members.Load().allowed[addr] {
		s.members.announce(req.ID, addr, current)
	}
	if s.raft.Load().State() != raft.Leader {
		return joinAnswer{}, s.notLeader()
	}
	end, err := s.changeMembers(ctx)
	if err != nil {
		return joinAnswer{}, err
	}
	defer end()
	// A permission that was acknowledged anywhere before this request came is applied here after this.
	at, err := s.reads.join(ctx)
	if err == nil {
		err = s.fsm.applied.wait(ctx, at.index)
	}
	if err != nil {
		return joinAnswer{}, refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
	}
	m := s.fsm.members.Load()
	current, known, voter := s.server(req.ID)
	switch format := s.store.meta().format; {
	case m.removed[req.ID] != 0:
		return joinAnswer{}, refuse(http.StatusGone, codeRemoved, "this id was removed from the cluster")
	case voter && !req.Announce: // who joins has no state, and a voter has promised to keep it
		return joinAnswer{}, refuse(http.StatusConflict, codeConflict, "member %s is a voter here, and whoever joins under its id has lost "+
			"its state: empty the directory and join as a new member", shortID(req.ID))
	case req.Format < format:
		return joinAnswer{}, refuse(http.StatusPreconditionFailed, codeProtocol, "the cluster writes entries of format %d and the joining "+
			"member reads up to %d: upgrade it", format, req.Format)
	case current != addr && !m.allowed[addr]:
		err := refuse(http.StatusForbidden, codeNotAllowed, "%s is not on the list", addr)
		if s.refused.note(addr, err, 0) {
			s.log.Warn("refused a member whose address is not allowed: call AddAllowedMember with that address, if it is one of yours",
				"peer", peerName(req.ID, addr))
		}
		return joinAnswer{}, err
	}
	s.refused.keep(func(who string) bool { return who != addr })
	if current != addr {
		makeRoom := s.replaceAt
		if known {
			makeRoom = s.awaitRoom
		}
		if err := makeRoom(ctx, addr, req.ID); err != nil {
			return joinAnswer{}, err
		}
		if err := s.setServer(ctx, req.ID, addr); err != nil {
			return joinAnswer{}, refuse(http.StatusServiceUnavailable, codeNotReady, "change of the configuration: %v", err)
		}
		if known {
			s.log.Info("a member has moved", "peer", peerName(req.ID, addr), "before", current)
		} else {
			s.log.Info("a member has joined, and gets a vote when it keeps up", "peer", peerName(req.ID, addr))
		}
		give(s.joined)
	}
	a := joinAnswer{Cluster: s.ident().cluster, LeaderID: s.ident().id, LeaderAddr: s.conf.Addr, Founders: s.ident().foundersList()}
	for _, m := range s.raft.Load().GetConfiguration().Configuration().Servers {
		a.Members = append(a.Members, memberAddr{ID: string(m.ID), Addr: string(m.Address), Voter: m.Suffrage == raft.Voter})
	}
	return a, nil
}

// awaitRoom: a member may come back at the address of another one that has moved too, and nobody is taken out for that. If
// each waits for the other's address, this one gives up its own: meanwhile it is called where it announced itself.
func (s *Service) awaitRoom(ctx context.Context, addr, id string) error {
	for _, m := range s.raft.Load().GetConfiguration().Configuration().Servers {
		if string(m.Address) != addr || string(m.ID) == id {
			continue
		}
		if current, _, _ := s.server(id); !placeholder(current) && s.addressOf(m) != addr {
			if err := s.setServer(ctx, id, placeholderAddr(id)); err != nil {
				s.log.Warn("no room for a member that moved", "peer", peerName(id, addr), "error", err)
			}
		}
		return refuse(http.StatusServiceUnavailable, codeNotReady, "%s is the address of member %s until that one moves or is removed", addr, shortID(string(m.ID)))
	}
	return nil
}

// replaceAt takes out the member that had this address before, whose directory was lost. It stays if it still answers, there
// or elsewhere.
func (s *Service) replaceAt(ctx context.Context, addr, id string) error {
	c, err := s.awaitSettled(ctx)
	if err != nil {
		return err
	}
	for _, m := range c.Servers {
		if string(m.Address) != addr || string(m.ID) == id {
			continue
		}
		probe, cancel := context.WithTimeout(ctx, probeTimeout)
		a, err := s.peer.status(probe, baseURL(addr, s.conf.TLS))
		cancel()
		if err == nil && a.ID == string(m.ID) {
			return refuse(http.StatusConflict, codeConflict, "member %s answers: stop it, or remove it first", peerName(m.ID, addr))
		}
		// It may have moved, and its new address is not in the configuration yet.
		if heard := s.members.sinceHeard(string(m.ID)); heard >= 0 && heard < goneAfter {
			return refuse(http.StatusServiceUnavailable, codeNotReady, "member %s, whose address %s was, lives: it was heard from %v ago",
				shortID(string(m.ID)), addr, heard.Round(time.Millisecond))
		}
		if err := s.removeServer(ctx, m, c); err != nil {
			return refuse(http.StatusServiceUnavailable, codeNotReady, "the member that was at %s before can't be taken out now: %v", addr, err)
		}
		s.log.Info("a member was replaced", "peer", peerName(m.ID, m.Address), "by", peerName(id, addr))
	}
	return nil
}

// RemoveMember takes the member at addr (host:port) out of the cluster, dead or alive, and its address off the list of those
// that may join; or only the latter, if nobody has joined from there. The removed member's Err is then ErrRemoved, and its
// data stays readable through Stale. It is refused while the voters that would remain and answer are no majority. Errors are
// ErrNotApplied or ErrUncertain; a retry is safe. It works on every member, also to remove itself.
func (s *Service) RemoveMember(ctx context.Context, addr string) error {
	addr, err := canonicalAddr(addr)
	if err != nil {
		return notApplied(err)
	}
	if err := s.refusesWrites(); err != nil {
		return notApplied(err)
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	ctx, release := s.untilClose(ctx)
	defer release()
	sent := false
	for backoff := resendMin; ; backoff = min(2*backoff, resendMax) {
		changed := s.changes.wait()
		err := s.askToRemove(ctx, addr)
		var r *refusal
		switch refused := errors.As(err, &r); {
		case err == nil:
			return nil
		case refused && r.Code == codeConflict && !sent:
			return notApplied(fmt.Errorf("%w: %s", ErrInvalid, r.Message))
		case refused && r.Code == codeRemoved && addr == s.conf.Addr:
			return nil // this member was removed, and the answer that said so got lost
		case refused && !r.definite(), !refused && !errors.Is(err, ErrNoLeader) && !errors.Is(err, ErrNotApplied):
			sent = true
		}
		switch fault := s.refusesWrites(); {
		case errors.Is(fault, ErrRemoved) && addr == s.conf.Addr:
			return nil
		case fault != nil && sent:
			return fmt.Errorf("%w: %w", ErrUncertain, fault)
		case fault != nil:
			return notApplied(fault)
		}
		select {
		case <-changed:
			continue
		case <-time.After(backoff):
			continue
		case <-ctx.Done():
		}
		if sent { // the last attempt's error, which may well say that this attempt was not applied, is no verdict
			return fmt.Errorf("%w: %w: %v", ErrUncertain, context.Cause(ctx), err)
		}
		return notApplied(fmt.Errorf("%w: %w", err, context.Cause(ctx)))
	}
}

func (s *Service) askToRemove(ctx context.Context, addr string) error {
	switch id, leaderAddr := s.leader(); id {
	case "":
		return ErrNoLeader
	case s.ident().id:
		return s.serveRemove(ctx, addr)
	default:
		ctx, cancel := s.whileLed(ctx, id)
		defer cancel()
		return s.peer.remove(ctx, id, leaderAddr, addr)
	}
}

// serveRemove removes on the leader: first the permission, so that the member can't come back in between, then the member.
func (s *Service) serveRemove(ctx context.Context, addr string) error {
	addr, err := canonicalAddr(addr)
	if err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "%v", err)
	}
	r := s.raft.Load()
	if r.State() != raft.Leader {
		return s.notLeader()
	}
	end, err := s.changeMembers(ctx)
	if err != nil {
		return err
	}
	defer end()
	if _, err := s.reads.join(ctx); err != nil {
		return refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
	}
	c, err := s.awaitSettled(ctx)
	if err != nil {
		return err
	}
	var target *raft.Server
	for _, m := range c.Servers {
		if string(m.Address) == addr {
			target = &m
		}
	}
	if target != nil {
		if err := s.mayRemove(ctx, *target, c); err != nil {
			return err
		}
		if string(target.ID) == s.ident().id {
			if err := s.handOver(ctx, choice{leaving: true}); err != nil { // whoever leads then removes this member
				return refuse(http.StatusServiceUnavailable, codeNotReady, "the leader can't hand over before it is removed: %v", err)
			}
			return refuse(http.StatusMisdirectedRequest, codeNotLeader, "the leader hands over before it is removed")
		}
	}
	if _, err := s.write(ctx, op{kind: opDisallow, key: addr}); err != nil {
		return err
	}
	if target == nil {
		return nil
	}
	err = await(ctx, r.RemoveServer(target.ID, c.index, raftPatience))
	if err == nil {
		s.log.Info("a member was removed", "peer", peerName(target.ID, target.Address))
	}
	return err
}

// mayRemove: those that answer and keep up, the target apart, are a majority of the voters with it and of those without it.
func (s *Service) mayRemove(ctx context.Context, target raft.Server, c configuration) error {
	all := voters(c.Configuration)
	if len(all) == 1 && all[0].ID == target.ID {
		return refuse(http.StatusConflict, codeConflict, "%s is the only voter", target.Address)
	}
	if target.Suffrage != raft.Voter {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	live, rest := 0, 0
	var dead []string
	for i, err := range s.probe(ctx, all, c.index) {
		if all[i].ID == target.ID {
			if err == nil {
				live++
			}
			continue
		}
		if rest++; err == nil {
			live++
		} else {
			dead = append(dead, err.Error())
		}
	}
	liveRest := rest - len(dead)
	if liveRest < rest/2+1 || live < len(all)/2+1 {
		return refuse(http.StatusServiceUnavailable, codeNotReady, "without %s %d of %d voters would answer, need %d (%s)",
			target.Address, liveRest, rest, rest/2+1, strings.Join(dead, "; "))
	}
	return nil
}

func (s *Service) removeServer(ctx context.Context, m raft.Server, c configuration) error {
	if err := s.mayRemove(ctx, m, c); err != nil {
		return err
	}
	return await(ctx, s.raft.Load().RemoveServer(m.ID, c.index, raftPatience))
}

// announce tells the others this member's address until the applied configuration has it, and again whenever nobody leads: the
// others may have been told another one.
func (s *Service) announce() {
	if s.conf.Addr == "" {
		return
	}
	for backoff := 100 * time.Millisecond; ; backoff = min(2*backoff, 5*time.Second) {
		if s.faults.first(faultRemoved) != nil {
			return
		}
		if s.announced() {
			s.moved()
			backoff = 500 * time.Millisecond
		} else {
			s.announceToAll()
		}
		select {
		case <-time.After(backoff):
		case <-s.ctx.Done():
			return
		}
	}
}

// announced: the applied configuration has this member's address, which raft's newest one may lose again, and somebody leads.
// A joiner that has heard nothing yet has nobody to tell.
func (s *Service) announced() bool {
	if leader, _ := s.leader(); leader == "" {
		return false
	}
	for _, m := range s.fsm.members.Load().config.Servers {
		if string(m.ID) == s.ident().id {
			return string(m.Address) == s.conf.Addr
		}
	}
	return true
}

func (s *Service) announceToAll() {
	if _, known, _ := s.server(s.ident().id); !known {
		return
	}
	for _, m := range s.others() {
		err := s.announceTo(string(m.ID), s.addressOf(m))
		var r *refusal
		if errors.As(err, &r) && r.Code == codeNotLeader && r.LeaderAddr != "" { // who may have moved too
			err = s.announceTo(r.LeaderID, r.LeaderAddr)
		}
		if errors.As(err, &r) && r.Code == codeNotAllowed {
			configured, _, _ := s.server(s.ident().id)
			s.notMoved(configured)
		}
		if err != nil {
			s.log.Debug("announce this member's address", "to", peerName(m.ID, m.Address), "answer", err)
		}
	}
}

func (s *Service) announceTo(id, addr string) error {
	ctx, cancel := context.WithTimeout(s.ctx, probeTimeout)
	defer cancel()
	_, err := s.peer.join(ctx, baseURL(addr, s.conf.TLS), id, "", joinRequest{ID: s.ident().id, Addr: s.conf.Addr, Format: s.conf.format, Announce: true})
	return err
}

// Role is what a member is at the moment.
type Role int

const (
	Follower Role = iota
	Candidate
	Leader
	NonVoter // admitted, not yet promoted
	Removed
	Closed
)

var roleNames = [...]string{"follower", "candidate", "leader", "non-voter", "removed", "closed"}

func (r Role) String() string {
	if r >= 0 && int(r) < len(roleNames) {
		return roleNames[r]
	}
	return fmt.Sprintf("Role(%d)", int(r))
}

// Status is what this member knows, without asking anybody. Its JSON has the names of the fields as they are here, roles as words
// ("leader"), durations as seconds (0.25), and times as RFC 3339 has them, in UTC; a time that is zero is left out.
type Status struct {
	ID, Addr, Cluster    string
	Role                 Role
	LeaderID, LeaderAddr string    // empty: no leader is known
	LeaderSince          time.Time `json:",omitzero"` // when this member learned of this leader, by its clock; zero: no leader is known

	Term, LastIndex, CommitIndex uint64
	AppliedIndex, Revision       uint64

	// Hash is of the state at AppliedIndex, read together with it: members with the same AppliedIndex have the same Hash.
	Hash string

	Size          int64 // bytes of all keys and values at AppliedIndex, which Config.MaxState limits
	Verified      bool  // the check of snap that began at Open has ended well
	MemoryDropped bool  // the state has outgrown Config.Memory, and reads go to SQLite

	// Fsync is how long this member's writes to its log take, with their fsync: the median of the last five. 0 = none yet.
	Fsync time.Duration

	Format       uint64 // in which the cluster writes
	FormatHeldBy string // who keeps it from the next one, and why: only the leader asks, elsewhere it is empty

	Members []Member
}

// Member is one member of the configuration. Its JSON is as that of Status.
type Member struct {
	ID, Addr string
	Voter    bool
	NoVote   string        // why it has no vote yet; empty: it has one, or that is not known here. The leader knows it, and the member itself
	Heard    time.Duration // since it was last heard from; 0 = this member itself, negative = not known here. Only the leader hears all

	// Lag is how many entries of the leader's log it has not acknowledged. Only the leader knows it, of those that have answered since
	// it leads; negative = not known here.
	Lag int64

	// LastError is what the newest call of this member to that one has met, and FailingSince when the first of those began that were
	// not answered since. Empty and zero: the newest was answered, or there was none.
	LastError    string
	FailingSince time.Time `json:",omitzero"`
}

// Status never blocks and uses no network.
func (s *Service) Status() Status {
	m := s.store.meta()
	r := s.raft.Load()
	ident := s.ident()
	st := Status{ID: ident.id, Addr: s.conf.Addr, Cluster: ident.cluster, Role: s.role(),
		Term: r.CurrentTerm(), LastIndex: r.LastIndex(), CommitIndex: r.CommitIndex(),
		AppliedIndex: m.applied, Revision: m.revision, Size: int64(m.bytes), Hash: m.stateHash()}
	if ident.cluster == "" {
		st.ID = "" // it may become another one
	}
	st.LeaderID, st.LeaderAddr = s.leader()
	st.LeaderSince = instant(s.reign.since(st.LeaderID))
	st.Fsync, st.Format = s.wal.fsync(), m.format
	if held := s.heldBack.Load(); held != nil && m.format < s.conf.format {
		st.FormatHeldBy = *held
	}
	st.Verified, _ = s.store.verified()
	_, st.MemoryDropped = s.store.memoryState()
	for _, v := range r.GetConfiguration().Configuration().Servers {
		st.Members = append(st.Members, s.memberStatus(v, st))
	}
	return st
}

func (s *Service) memberStatus(v raft.Server, st Status) Member {
	m := Member{ID: string(v.ID), Addr: string(v.Address), Voter: v.Suffrage == raft.Voter, Lag: -1}
	if !m.Voter && (st.Role == Leader || m.ID == s.ident().id) {
		m.NoVote = s.voteless.of(m.ID)
	}
	if m.ID == s.ident().id {
		if st.Role == Leader {
			m.Lag = 0
		}
		return m
	}
	if m.Heard = s.members.sinceHeard(m.ID); m.Heard < 0 {
		m.Heard = -time.Second
	}
	if held, ok := s.peer.acknowledged(v.ID, st.Term); ok && st.Role == Leader {
		m.Lag = int64(st.LastIndex - min(held, st.LastIndex))
	}
	r := s.reach.of(m.ID)
	m.LastError, m.FailingSince = r.reason(), instant(r.failing)
	return m
}

// instant is a time as it is after a way through JSON.
func instant(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.Round(0).UTC()
}

// A reign is since when this member takes one and the same member for the leader.
type reign struct {
	mu    sync.Mutex // guards the fields below
	id    string
	began time.Time
}

// since notes whom this member takes for the leader now, and says since when. Zero if it knows none.
func (g *reign) since(id string) time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	if id != g.id {
		g.id, g.began = id, time.Time{}
		if id != "" {
			g.began = time.Now()
		}
	}
	return g.began
}

func (s *Service) role() Role {
	switch {
	case s.faults.first(faultClosed) != nil:
		return Closed
	case s.faults.first(faultRemoved) != nil:
		return Removed
	}
	switch s.raft.Load().State() {
	case raft.Leader:
		return Leader
	case raft.Candidate:
		return Candidate
	}
	if _, known, voter := s.server(s.ident().id); known && voter {
		return Follower
	}
	return NonVoter
}

// stateHash is the state's: the sum over the rows and the chain over all that was ever applied.
func (m meta) stateHash() string { return fmt.Sprintf("%016x%x", m.kvSum, m.chain[:8]) }

// statusAnswer is what GET /raft/status tells: no keys and no values.
func (s *Service) statusAnswer() statusAnswer {
	st := s.Status()
	last, lastTerm := s.lastEntry()
	a := statusAnswer{ID: st.ID, Cluster: st.Cluster, Addr: st.Addr, Role: st.Role.String(), Term: st.Term, LastIndex: last, LastTerm: lastTerm,
		CommitIndex: st.CommitIndex, Applied: st.AppliedIndex, Format: s.conf.format, LeaderID: st.LeaderID, LeaderAddr: st.LeaderAddr,
		LeaderSilence: s.leaderSilence().Milliseconds(), Confirmed: s.reads.confirmedMillis(), Healthy: s.refusesReads() == nil && s.silent() == nil}
	if _, err := s.hangs(); err != nil {
		a.Healthy = false
	}
	a.Held = s.held()
	if st.Cluster == "" {
		a.ID = s.ident().id
		a.Founders, a.Empty = s.conf.Bootstrap, s.founder().empty()
	}
	if since := s.reign.since(st.LeaderID); !since.IsZero() {
		a.Follows = time.Since(since).Milliseconds()
	}
	a.Fsync, a.Reached = st.Fsync.Microseconds(), s.reached()
	if err := s.unfitToLead(); err != nil {
		a.Unfit = err.Error()
	}
	a.Relieved, a.Rests = s.relief.answer()
	a.LogWaits = s.faults.first(faultLogWaits) != nil
	for _, m := range st.Members {
		a.Members = append(a.Members, memberAddr{ID: m.ID, Addr: m.Addr, Voter: m.Voter, NoVote: m.NoVote})
	}
	if marks, err := s.store.marks(); err == nil && s.refusesReads() == nil {
		for _, k := range marks {
			a.Marks = append(a.Marks, k.answer())
		}
	}
	return a
}

// broadcast wakes everybody who waits, once a turn.
type broadcast struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) notify() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
