package quorate

// Whether another cluster counts this member's address as one of its own. That is so where a directory was emptied and its member
// was started as the first one of a new cluster: the old cluster still calls the address. It owns the hints, the asking back, the
// proof and the fault that follows from it, and never decides on membership. Hints come from the door (checkCluster of peer.go);
// one goroutine asks.
//
// A call that names another cluster is a hint, for anybody can send it and invent what it names. So this member asks back, at the
// address that the call names. The proof is an answer there which says that a leader of that cluster was confirmed by a quorum
// within the last second, and that the cluster's configuration holds this member's address. Without client certificates somebody
// who reaches this member can forge that answer too, as he could speak as a member of this cluster: hence nothing else follows
// from it but that this member refuses its callers while the proof is fresh, or, if it has no cluster yet, begins and joins none.

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	strangerAge     = 15 * time.Second       // of the last proof; after that the fault is over
	strangerPause   = time.Second            // between two questions, whatever arrives
	strangerWait    = 2 * time.Second        // for an answer
	strangerHints   = 16                     // addresses that wait to be asked
	confirmedWithin = time.Second            // before the answer, by a quorum
	confirmPatience = 500 * time.Millisecond // for a round on behalf of somebody who asks back
)

// strangers is what is known of other clusters that call this address.
type strangers struct {
	mu     sync.Mutex // guards the fields below
	noted  chan struct{}
	hints  []string // addresses that calls named and that are to be asked
	proof  strangerProof
	turn   int
	warned bool // of a restored directory
	doubt  bool // that a hint could not be proved was logged
}

// A strangerProof is the newest one. The zero value is none.
type strangerProof struct {
	cluster, addr string // who gave it
	at            time.Time
}

// hint takes an address to ask. Of too many, one is forgotten, so that no flood of invented addresses keeps a true one out for long.
func (t *strangers) hint(addr string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case slices.Contains(t.hints, addr):
		return
	case len(t.hints) == strangerHints:
		t.hints[rand.IntN(len(t.hints))] = addr
	default:
		t.hints = append(t.hints, addr)
	}
	if t.noted != nil {
		give(t.noted)
	}
}

// wait is closed or gets a token when there is somebody to ask.
func (t *strangers) wait() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.noted == nil {
		t.noted = make(chan struct{}, 1)
	}
	if len(t.hints) > 0 {
		give(t.noted)
	}
	return t.noted
}

// next is whom to ask: who gave the proof, to learn when it ends, in turn with those who have called since.
func (t *strangers) next() (addr string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn++
	if t.proof.cluster != "" && (t.turn%2 == 0 || len(t.hints) == 0) {
		return t.proof.addr, true
	}
	if len(t.hints) == 0 {
		return "", false
	}
	i := rand.IntN(len(t.hints))
	addr = t.hints[i]
	t.hints = slices.Delete(t.hints, i, i+1)
	return addr, true
}

// heard takes a confirmed answer of another cluster.
func (t *strangers) heard(cluster, addr string, holds bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case holds:
		t.proof = strangerProof{cluster, addr, time.Now()}
	case t.proof.cluster == cluster:
		t.proof = strangerProof{} // it has removed this address
	}
}

// proved is the proof, if it is not too old.
func (t *strangers) proved() (p strangerProof, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(t.proof.at) >= strangerAge {
		t.proof = strangerProof{}
	}
	return t.proof, t.proof.cluster != ""
}

// once is true for the first caller of each of the two words.
func (t *strangers) once(said *bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	first := !*said
	*said = true
	return first
}

// noteStranger is told of each call that names another cluster. A configuration of several has proved that the address is its own.
func (s *Service) noteStranger(fromAddr string) {
	if n := len(s.fsm.members.Load().config.Servers); n != 1 && !(n == 0 && s.founding != nil) {
		return
	}
	if addr, err := canonicalAddr(fromAddr); err == nil {
		s.strangers.hint(addr)
	}
}

// askStrangers asks one at a time, and one a second.
func (s *Service) askStrangers() {
	for stands := false; ; stands = s.judgeStranger() {
		if !stands {
			select {
			case <-s.strangers.wait():
			case <-s.ctx.Done():
				return
			}
		}
		if addr, ok := s.strangers.next(); ok {
			s.askStranger(addr)
			s.judgeStranger() // at once, not after the pause
		}
		select {
		case <-time.After(strangerPause):
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *Service) askStranger(addr string) {
	cluster, holds, err := s.askBack(addr)
	switch {
	case err == nil && cluster != s.ident().cluster:
		s.strangers.heard(cluster, addr, holds)
	case s.strangers.once(&s.strangers.doubt):
		s.log.Warn("a call named another cluster, and what answers at its address gives no proof of one that knows this member's address",
			"address", addr, "error", err)
	default:
		s.log.Debug("no proof of another cluster", "address", addr, "error", err)
	}
}

// askBack asks whether a cluster whose leader is confirmed answers at an address, and whether it holds this member's.
func (s *Service) askBack(addr string) (cluster string, holds bool, err error) {
	ctx, cancel := context.WithTimeout(s.ctx, strangerWait)
	defer cancel()
	base := baseURL(addr, s.conf.TLS)
	a, err := s.peer.status(ctx, base)
	if err != nil {
		return "", false, explain(err, base)
	}
	if !a.confirmed() {
		return "", false, fmt.Errorf("member %s of cluster %s knows of no quorum that has just confirmed a leader", shortID(a.ID), shortID(a.Cluster))
	}
	return a.Cluster, slices.ContainsFunc(a.Members, func(m memberAddr) bool { return m.Addr == s.conf.Addr }), nil
}

// confirmed: a quorum of a cluster has confirmed its leader. A release that does not say is not believed.
func (a statusAnswer) confirmed() bool {
	return validID(a.Cluster) && a.Confirmed > 0 && a.Confirmed <= confirmedWithin.Milliseconds()
}

// judgeStranger sets the fault, or ends it. It tells whether there is a proof.
func (s *Service) judgeStranger() (stands bool) {
	var err error
	own := s.ident().cluster
	p, stands := s.strangers.proved()
	if stands && len(s.fsm.members.Load().config.Servers) == 1 {
		err = fmt.Errorf("members of cluster %s (%s) know this address as one of theirs, and this directory belongs to cluster %s: "+
			"if its contents were lost, empty the directory and start with a bootURL; if that cluster is not to have this address, "+
			"call RemoveMember(ctx, %q) there", shortID(p.cluster), p.addr, shortID(own), s.conf.Addr)
	}
	if err != nil && s.store.meta().installed > 0 { // a state that came from elsewhere: Restore made it, or it was of several once
		if s.strangers.once(&s.strangers.warned) {
			s.log.Warn("this member goes on, because its state was restored", "but", err)
		}
		err = nil
	}
	s.faults.set(faultStranger, err)
	return stands
}

// confirmLeader has a quorum confirm this cluster's leader for somebody who asks from outside: a round is shared, and one at a time
// waits for it, so that those who ask cost the members little.
func (s *Service) confirmLeader(ctx context.Context) {
	if s.reads.confirmedFor() < confirmedWithin/2 || !s.confirming.TryLock() {
		return
	}
	defer s.confirming.Unlock()
	ctx, cancel := context.WithTimeout(ctx, confirmPatience)
	defer cancel()
	if _, err := s.reads.join(ctx); err != nil {
		s.log.Debug("no quorum confirms the leader for somebody who asks", "error", err)
	}
}
