package quorate

// A first start that can be repeated: members that all have the same list of addresses, Config.Bootstrap, begin one cluster among
// them, and find it again when one of them has lost its directory. It owns what a member does from an empty directory to a cluster
// that it belongs to: what it says of itself meanwhile, whom it asks, and the decision, which is a function of what was heard in one
// pass (decide; founding_test.go plays it against wipes, cuts and lists that differ). After that it owns the hold: nothing is
// acknowledged before a majority of the founders vote. Control comes from recover.go's enter and goes on behind Open, because
// nobody listens at this member's address yet.
//
// Why two clusters of one list never come to life of which one has acknowledged a write:
//
//	(1) Only the smallest address begins one, and only when in one pass each other founder has said, at its own address, that it has
//	    the same list, that its directory is empty and that it is asking nobody to be admitted.
//	(2) A cluster acknowledges nothing before a majority of the founders vote in it. From then on a directory of each of these holds it.
//	(3) So while a cluster that has acknowledged is in the directory of any founder, that founder does not say that it is empty, and
//	    if it is silent nobody begins. Who has said that it is empty enters a cluster only by the answer to a call that it makes
//	    later, and the smallest address, whose directory was empty during the pass, leads none that could answer.
//
// All founders' directories emptied at once are a first start, for there is nobody who could know better.

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

const (
	maxFounders    = 64
	foundingSoon   = 20 * time.Millisecond // after a first pass, and then twice as long each time, up to
	foundingPace   = 200 * time.Millisecond
	foundingIdle   = time.Second      // while somebody is silent
	refusedPace    = 10 * time.Second // to an answer that only a person can change
	foundingWait   = time.Second      // for an answer
	foundingLength = 3                // entries of a founded log: see firstEntries
)

// A founder is what a member without a cluster knows of itself.
type founder struct {
	addr, id string
	list     []string // Config.Bootstrap, in order
	admitted string   // the cluster that has admitted this member, which has none of its state yet; "" = none
	asking   bool     // to be admitted: the answer may make it a member at any time
}

// empty: nothing but a call that this member makes later can make it a member of anything.
func (f founder) empty() bool { return f.admitted == "" && !f.asking }

// A heard is what one address has answered in a pass.
type heard struct {
	addr   string
	status statusAnswer
	err    error // no status, and why
}

var errNotAsked = errors.New("nobody has asked it")

type stepKind int

const (
	stepWait stepKind = iota
	stepFound
	stepJoin
)

// A step is what to do after a pass.
type step struct {
	kind  stepKind
	to    string   // stepJoin: the cluster
	at    []string // stepJoin: where it answers
	held  bool     // stepJoin: whoever answers says that nothing is acknowledged in it yet
	fault error    // stepWait: what no waiting mends
	words string   // stepWait: what is missing
}

// decide is the whole decision. A cluster that answers at a founder's address is joined, whatever else is heard: it may have
// acknowledged writes. One that answers elsewhere has only shown that it calls this member, which can be forged (see stranger.go):
// no cluster is begun or joined beside it, and it is not joined either.
func (f founder) decide(pass []heard) step {
	clusters := make(map[string][]string) // → where it answers
	if f.admitted != "" {
		clusters[f.admitted] = nil
	}
	for _, h := range pass {
		if c := h.status.Cluster; h.err == nil && validID(c) {
			clusters[c] = append(clusters[c], h.addr)
		}
	}
	switch len(clusters) {
	case 0:
		return f.decideAlone(pass)
	case 1:
		for c, at := range clusters {
			if len(at) == 0 {
				return step{words: fmt.Sprintf("cluster %s has admitted this member, and no founder answers for it: %s", shortID(c), troubles(pass))}
			}
			at = slices.DeleteFunc(slices.Clone(at), func(addr string) bool { return !slices.Contains(f.list, addr) })
			switch {
			case len(at) == 0 && c == f.admitted:
				return step{words: fmt.Sprintf("cluster %s has admitted this member, and its leader has not called yet", shortID(c))}
			case len(at) == 0:
				return step{fault: f.notOfTheList(c, clusters[c][0])}
			}
			held := !slices.ContainsFunc(pass, func(h heard) bool { return h.err == nil && h.status.Cluster == c && !h.status.Held })
			return step{kind: stepJoin, to: c, at: at, held: held}
		}
	}
	return step{fault: f.twoClusters(clusters)}
}

func (f founder) notOfTheList(cluster, addr string) error {
	return fmt.Errorf("%w: cluster %s, which answers at %s, says that this member's address is one of its own, and Bootstrap does not name "+
		"%[3]s: if it is the right cluster, give it as Join in the place of Bootstrap; if it is not to have this address, call "+
		"RemoveMember(ctx, %[4]q) there", ErrInvalid, shortID(cluster), addr, f.addr)
}

func (f founder) twoClusters(clusters map[string][]string) error {
	var list []string
	for _, c := range slices.Sorted(maps.Keys(clusters)) {
		where := "at " + strings.Join(clusters[c], ", ")
		if c == f.admitted {
			where = strings.TrimSuffix(where, "at ") + " (it has admitted this member)"
		}
		list = append(list, fmt.Sprintf("%s %s", shortID(c), strings.TrimSpace(where)))
	}
	return fmt.Errorf("%w: members of several clusters answer, and this one joins neither: %s: empty the directories of the members of the one that "+
		"is not to stay", ErrInvalid, strings.Join(list, "; "))
}

// decideAlone: nobody has a cluster, as far as is heard.
func (f founder) decideAlone(pass []heard) step {
	for _, h := range pass {
		if theirs := h.status.Founders; h.err == nil && h.status.ID != f.id && len(theirs) > 0 && !slices.Equal(theirs, f.list) {
			return step{fault: fmt.Errorf("%w: the founders' lists differ: Config.Bootstrap is %v here and %v at %s: give all of them the same one",
				ErrInvalid, f.list, theirs, h.addr)}
		}
	}
	by := make(map[string]heard)
	for _, h := range pass {
		by[h.addr] = h
	}
	var missing []string
	for _, addr := range f.list {
		h, asked := by[addr]
		if !asked {
			h = heard{addr: addr, err: errNotAsked}
		}
		if why := f.notWaiting(h); why != "" {
			missing = append(missing, addr+" "+why)
		}
	}
	switch {
	case len(missing) > 0:
		return step{words: "the founders wait for each other: " + strings.Join(missing, "; ")}
	case !slices.Contains(f.list, f.addr):
		return step{words: "this member is no founder, and joins when they have begun: " + strings.Join(f.list, ", ")}
	case f.addr != f.list[0]:
		return step{words: fmt.Sprintf("the founders are there, and %s is about to begin the cluster", f.list[0])}
	case !f.empty():
		return step{words: "this member asks to be admitted"}
	}
	return step{kind: stepFound}
}

// notWaiting says why what was heard is no word of a founder with an empty directory at its own address; "" if it is.
func (f founder) notWaiting(h heard) string {
	a := h.status
	switch {
	case h.addr == f.addr && (h.err != nil || a.ID == f.id):
		return "" // whether this member reaches itself matters to nobody here
	case h.addr == f.addr:
		return fmt.Sprintf("is this member's own address, and member %s answers there", shortID(a.ID))
	case h.err != nil:
		return fmt.Sprintf("is silent (%v)", h.err)
	case len(a.Founders) == 0:
		return "does not wait for founders: its release does not know Bootstrap, or it was started without"
	case a.Addr != h.addr || a.ID == f.id || !validID(a.ID):
		return fmt.Sprintf("is not its own address: member %s, of %s, answers there", shortID(a.ID), a.Addr)
	case !a.Empty:
		return "asks to be admitted to a cluster"
	}
	return ""
}

// troubles are the errors of a pass, for people.
func troubles(pass []heard) string {
	var list []string
	for _, h := range pass {
		if h.err != nil {
			list = append(list, fmt.Sprintf("%s is silent (%v)", h.addr, h.err))
		}
	}
	return strings.Join(list, "; ")
}

// votes counts the founders that vote in a configuration, and says how many must before anything is acknowledged.
func votes(founders []string, c raft.Configuration) (have, need int) {
	for _, v := range voters(c) {
		if slices.Contains(founders, string(v.Address)) {
			have++
		}
	}
	return have, len(founders)/2 + 1
}

// checkFounders gives a list its one form: canonical, in order, without duplicates.
func checkFounders(given []string) ([]string, error) {
	if len(given) > maxFounders {
		return nil, fmt.Errorf("%w: Bootstrap names %d founders, and can name %d", ErrInvalid, len(given), maxFounders)
	}
	var list []string
	for _, addr := range given {
		addr, err := canonicalAddr(addr)
		if err != nil {
			return nil, fmt.Errorf("the list of Bootstrap: %w", err)
		}
		if slices.Contains(list, addr) {
			return nil, fmt.Errorf("%w: Bootstrap names %s twice", ErrInvalid, addr)
		}
		list = append(list, addr)
	}
	slices.Sort(list)
	return list, nil
}

// founders is Config.Bootstrap in its one form, if it may be given beside the rest.
func (c Config) founders() ([]string, error) {
	switch {
	case len(c.Bootstrap) == 0:
		return nil, nil
	case c.Join != "":
		return nil, fmt.Errorf("%w: Bootstrap and Join are two ways to a first start: give one of them", ErrInvalid)
	case c.Addr == "":
		return nil, fmt.Errorf("%w: a member without Addr has no network and can't begin a cluster with %s: give the address at which peers reach it",
			ErrInvalid, strings.Join(c.Bootstrap, ", "))
	}
	return checkFounders(c.Bootstrap)
}

// founding is the way of this member to its cluster.
type founding struct {
	asking atomic.Bool   // see founder
	over   chan struct{} // closed when this member has a cluster

	mu    sync.Mutex // guards words
	words string     // what is missing

	patience time.Time // the founding goroutine's: whoever has refused this member is not asked before
	refusal  error     // its, too: what they said
}

// say keeps what is missing, and tells the log when it is another thing than before.
func (s *Service) say(words string) {
	f := s.founding
	f.mu.Lock()
	was := f.words
	f.words = words
	f.mu.Unlock()
	if words != "" && gist(errors.New(was)) != gist(errors.New(words)) {
		s.log.Info("not a member of a cluster yet", "waiting for", words)
	}
}

func (f *founding) missing() string {
	select {
	case <-f.over:
		return ""
	default:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return cmp.Or(f.words, "this member looks for the other founders")
}

// bootBases are the base URLs at which this member's Config says that a cluster may answer.
func (s *Service) bootBases() []string {
	if s.conf.Join != "" {
		return []string{s.conf.Join}
	}
	var list []string
	for _, addr := range s.conf.Bootstrap {
		if addr != s.conf.Addr {
			list = append(list, baseURL(addr, s.conf.TLS))
		}
	}
	return list
}

// beginFounding is Open's part: it leaves an id that is to join. An id that was to begin a cluster and never did is not used for
// anything else, as in enter: what it was to begin with may have another list by now.
func (s *Service) beginFounding() error {
	s.founding = &founding{over: make(chan struct{})}
	if s.ident().intent == intentJoin {
		return nil
	}
	return s.changeIdentity(func(ident *identity) { *ident = identity{id: newID(), intent: intentJoin} })
}

// founder is what this member knows of itself. The order of the two looks matters: a call that has admitted this member has put the
// cluster into its identity before it ends.
func (s *Service) founder() founder {
	f := founder{addr: s.conf.Addr, list: s.conf.Bootstrap, asking: s.founding != nil && s.founding.asking.Load()}
	ident := s.ident()
	f.id, f.admitted = ident.id, ident.cluster
	return f
}

// found goes on until this member has a cluster.
func (s *Service) found() {
	for pause := foundingSoon; ; pause *= 2 {
		pass := s.askFounders()
		most := foundingPace
		if slices.ContainsFunc(pass, func(h heard) bool { return h.err != nil }) {
			most = foundingIdle
		}
		if s.takeStep(s.founder().decide(pass)) {
			s.faults.set(faultFounding, nil)
			close(s.founding.over)
			s.changes.notify()
			return
		}
		pause = min(pause, most)
		select {
		case <-time.After(pause):
		case <-s.ctx.Done():
			return
		}
	}
}

// takeStep tells whether this member has its cluster now.
func (s *Service) takeStep(next step) bool {
	f := s.founding
	switch {
	case s.hasState():
		return true // the leader that had admitted it has come first
	case next.kind == stepFound:
		return s.beginCluster()
	case next.kind == stepJoin && time.Now().After(f.patience):
		f.asking.Store(true)
		err := s.askToEnter(next)
		f.asking.Store(false)
		if err == nil || s.hasState() {
			return true
		}
		next.words = fmt.Sprintf("cluster %s answers at %s, and has not admitted this member: %v", shortID(next.to), strings.Join(next.at, ", "), err)
		if next.held {
			next.words += " (nothing is acknowledged in it yet: if the member that began it is lost, empty the directories of all founders)"
		}
		f.refusal, f.patience = s.refusedForGood(err), time.Time{}
		if f.refusal != nil {
			f.patience = time.Now().Add(refusedPace)
		}
		next.fault = f.refusal
	case next.kind == stepJoin:
		next.fault = f.refusal
	}
	if s.ctx.Err() != nil {
		return false
	}
	if next.fault != nil && next.words == "" {
		next.words = next.fault.Error()
	}
	s.say(next.words)
	s.faults.set(faultFounding, next.fault)
	return false
}

// hasState: the cluster's leader has reached this member.
func (s *Service) hasState() bool { return s.ident().cluster != "" && s.store.meta().applied > 0 }

// askFounders is one pass: each of the others is asked once, at the same time. A cluster that has shown that it knows this member's
// address is heard too, wherever it answers: see decide.
func (s *Service) askFounders() []heard {
	ctx, cancel := context.WithTimeout(s.ctx, foundingWait)
	defer cancel()
	pass := make([]heard, len(s.conf.Bootstrap))
	var all sync.WaitGroup
	for i, addr := range s.conf.Bootstrap {
		all.Go(func() {
			base := baseURL(addr, s.conf.TLS)
			a, err := s.peer.status(ctx, base)
			pass[i] = heard{addr: addr, status: a, err: explain(err, base)}
		})
	}
	all.Wait()
	pass = slices.DeleteFunc(pass, func(h heard) bool { // what this member says of itself is known
		return h.addr == s.conf.Addr && (h.err != nil || h.status.ID == s.ident().id)
	})
	p, ok := s.strangers.proved()
	if ok && !slices.ContainsFunc(pass, func(h heard) bool { return h.addr == p.addr && h.err == nil }) {
		pass = append(pass, heard{addr: p.addr, status: statusAnswer{Cluster: p.cluster}})
	}
	return pass
}

// askToEnter asks to be admitted by way of each address at which the cluster answers.
func (s *Service) askToEnter(next step) (err error) {
	for _, addr := range next.at {
		j := joining{s: s, base: baseURL(addr, s.conf.TLS), answers: make(map[string]error)}
		var a joinAnswer
		a, err = j.ask(s.ctx, "", false)
		if err == nil && a.Cluster != next.to {
			err = fmt.Errorf("%w: admitted to cluster %s instead of %s", errFrame, shortID(a.Cluster), shortID(next.to))
		}
		if err == nil {
			return s.admitted(a)
		}
		if s.refusedForGood(err) != nil || s.ctx.Err() != nil {
			return err
		}
	}
	return err
}

// admitted makes this member one of the cluster that has let it in.
func (s *Service) admitted(a joinAnswer) error {
	return s.changeIdentity(func(ident *identity) { ident.cluster, ident.founders = a.Cluster, strings.Join(a.Founders, ",") })
}

// beginCluster makes this member the first of a new cluster, under a new id: the old one was to join, and an id is used for one
// thing. Nobody has seen the new one before the cluster lives. It can be done again after an error at any step.
func (s *Service) beginCluster() bool {
	for {
		err := s.tryBegin()
		if err == nil {
			s.log.Info("this member has begun the founders' cluster", "cluster", shortID(s.ident().cluster), "founders", s.conf.Bootstrap)
			return true
		}
		if s.ctx.Err() != nil {
			return false
		}
		s.say(err.Error())
		s.faults.set(faultFounding, err)
		select {
		case <-time.After(foundingIdle):
		case <-s.ctx.Done():
			return false
		}
	}
}

func (s *Service) tryBegin() error {
	s.raftMu.Lock()
	defer s.raftMu.Unlock()
	if s.ctx.Err() != nil {
		return ErrClosed
	}
	select {
	case <-s.endRaftLocked(): // it runs under the old id, on an empty log
	case <-s.ctx.Done():
		return ErrClosed
	}
	err := s.makeFirst()
	if err == nil {
		err = s.startRaftLocked(s.ctx)
	}
	if err != nil {
		return fmt.Errorf("begin the founders' cluster: %w", err)
	}
	return nil
}

// makeFirst writes what the first member of a cluster has on disk. What an earlier try has written stays: the entries name the id.
func (s *Service) makeFirst() error {
	if s.ident().intent == intentJoin {
		err := s.changeIdentity(func(ident *identity) {
			*ident = identity{id: newID(), cluster: newID(), intent: intentBootstrap, founders: strings.Join(s.conf.Bootstrap, ",")}
		})
		if err != nil {
			return err
		}
	}
	if _, last := s.wal.bounds(); last == 0 {
		return s.bootstrap(s.ctx)
	}
	return s.settleIn()
}

// firstEntries are the log of a new cluster: its only member, and where founders have begun it, that the others may join, once: an
// address that is removed later is not let in again by any start.
func firstEntries(ident identity, addr string) []*raft.Log {
	c := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(ident.id), Address: raft.ServerAddress(addr)}}}
	list := []*raft.Log{{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c)}}
	var allow [][]byte
	for _, other := range ident.foundersList() {
		if other != addr {
			allow = append(allow, appendTransaction(nil, transaction{{kind: opAllow, key: other}}))
		}
	}
	if allow == nil {
		return list
	}
	var nonce [16]byte
	rand.Read(nonce[:])
	return append(list,
		&raft.Log{Index: 2, Term: 1, Type: raft.LogCommand, Data: encodeOpen(firstFormat, nonce)},
		&raft.Log{Index: foundingLength, Term: 1, Type: raft.LogCommand, Data: encodeBatch(firstFormat, 2, 1, 0, allow)})
}

// --- the hold

// held: a majority of the founders do not vote yet, as far as this member knows.
func (s *Service) held() bool { return s.ident().founders != "" }

// awaitFounders waits until this member has a cluster, and a majority of its founders have voted. After that it writes for its callers.
func (s *Service) awaitFounders() {
	if f := s.founding; f != nil {
		select {
		case <-f.over:
		case <-s.ctx.Done():
		}
	}
	for s.held() && s.ctx.Err() == nil {
		at := s.fsm.applied.at()
		if !s.foundersVote() {
			s.fsm.applied.wait(s.ctx, at+1)
			continue
		}
		if err := s.changeIdentity(func(ident *identity) { ident.founders = "" }); err != nil {
			s.log.Error("note in id that a majority of the founders vote", "error", err)
			select {
			case <-time.After(time.Second):
			case <-s.ctx.Done():
			}
		}
	}
	s.changes.notify()
}

// foundersVote: a majority of the founders vote by now, or did: a member that was away meanwhile may find that they have all moved.
// Then somebody has opened a session, which nobody does, and no leader lets happen, before.
func (s *Service) foundersVote() bool {
	have, need := votes(s.ident().foundersList(), s.fsm.members.Load().config)
	return have >= need || s.fsm.openedAfter(foundingLength)
}

// awaitsFounders says what keeps this member from acknowledging anything, "" if founders have nothing to do with it.
func (s *Service) awaitsFounders() string {
	if f := s.founding; f != nil {
		if words := f.missing(); words != "" {
			return words
		}
	}
	founders := s.ident().foundersList()
	if len(founders) == 0 {
		return ""
	}
	c := s.fsm.members.Load().config
	have, need := votes(founders, c)
	var missing []string
	for _, addr := range founders {
		if !slices.ContainsFunc(voters(c), func(v raft.Server) bool { return string(v.Address) == addr }) {
			missing = append(missing, addr)
		}
	}
	return fmt.Sprintf("%d of %d founders vote, and %d must before anything is acknowledged: %s not yet (to begin anew with others, empty "+
		"all of these directories)", have, len(founders), need, strings.Join(missing, ", "))
}

// refuseHeld is the leader's answer to a write or a read that another member forwards too early.
func (s *Service) refuseHeld() error {
	if !s.held() {
		return nil
	}
	return refuse(http.StatusServiceUnavailable, codeNotReady, "%s", s.awaitsFounders())
}

// acknowledgedRound is a read round for a caller of this member.
func (s *Service) acknowledgedRound(ctx context.Context) (landing, error) {
	if words := s.awaitsFounders(); words != "" {
		return landing{}, fmt.Errorf("%w: %s", ErrNoLeader, words)
	}
	return s.reads.join(ctx)
}
