package quorate

// A leader's heartbeats over ways of any length. It owns when heartbeats are sent, and which answer raft gets for one. It never
// touches a term, a log or the lease: raft decides what an answer means. Control comes from the transport's AppendEntries.
//
// Raft sends a heartbeat, waits for its answer, pauses for a tenth to a fifth of heartbeatTimeout, and sends the next. Over a way whose
// answers take 400 ms, a leader would hear of each follower twice a second and each follower of its leader as rarely: both near their
// timeouts, so that no leader lasts. So while raft waits for an answer, further heartbeats are sent at the rate of a short way, and
// the first answer to any of them is the answer to the one that raft has sent. Each is a heartbeat of this term, and each answer is a
// sign of life that was given after this leader began the term, which is all that raft takes from it. No read trusts it: see read.go.

import (
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	beatPause  = heartbeatTimeout / 10 // between two heartbeats to a peer that answers
	beatRarely = heartbeatTimeout      // and to one that has not for as long
	beatsMost  = 16                    // on their way to one peer
	beatLimit  = 3 * voteTimeout       // for one answer: on a long way a new connection takes two or three times as long
)

// pulses are the heartbeats of the leader of one term. The zero value is ready.
type pulses struct {
	mu sync.Mutex // guards the fields below
	termPeers[pulse]
}

// A pulse is the heartbeats to one peer.
type pulse struct {
	changed broadcast // when one was answered or has failed

	mu     sync.Mutex // guards the fields below
	onWay  int
	sent   time.Time // when the newest one was
	heard  time.Time // when the newest answer came, to an append too; at first the beginning of the term
	good   *beat     // the newest answer that raft has not got; nil = none
	failed *beat     // the newest failure, likewise
}

// A beat is what became of a heartbeat.
type beat struct {
	resp raft.AppendEntriesResponse
	err  error
	at   time.Time
}

// of is nil in a term that is over.
func (ps *pulses) of(id raft.ServerID, term uint64) *pulse {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.peerLocked(id, term)
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.heard.IsZero() {
		p.heard = time.Now()
	}
	return p
}

// hears notes that the peer has answered an append.
func (ps *pulses) hears(id raft.ServerID) {
	ps.mu.Lock()
	p := ps.peers[id]
	ps.mu.Unlock()
	if p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.heard = time.Now()
	}
}

// begin reports whether a heartbeat is due now, and counts it as sent.
func (p *pulse) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	pause := beatPause
	if time.Since(p.heard) > beatRarely {
		pause = beatRarely
	}
	if p.onWay > 0 && (p.onWay >= beatsMost || time.Since(p.sent) < pause) {
		return false
	}
	p.onWay++
	p.sent = time.Now()
	return true
}

func (p *pulse) ends(b *beat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.onWay--
	if b.err == nil {
		p.good = b
	} else {
		p.failed = b
	}
	p.changed.notify()
}

// take is the answer for a heartbeat of raft's that began then, if there is one: one that came since, or just before, for raft takes it for
// a sign of life of this moment; or a failure since.
func (p *pulse) take(began time.Time) *beat {
	p.mu.Lock()
	defer p.mu.Unlock()
	good, failed := p.good, p.failed
	p.good, p.failed = nil, nil
	switch {
	case good != nil && (!good.at.Before(began) || time.Since(good.at) <= aheadFresh):
		return good
	case failed != nil && !failed.at.Before(began):
		return failed
	}
	return nil
}

// beat sends heartbeats to the peer until one of them is answered or fails.
func (t *transport) beat(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	p := t.pulses.of(id, args.Term)
	for began := time.Now(); ; {
		if err := t.mayBeat(p, id, target, args.Term); err != nil {
			return err
		}
		changed := p.changed.wait()
		t.sendBeat(p, id, target, args) // also where an answer is there: else the next one would be late
		if b := p.take(began); b != nil {
			*resp = b.resp
			return b.err
		}
		select {
		case <-changed:
		case <-time.After(beatPause):
		case <-t.ctx.Done():
			return errTransportClosed
		}
	}
}

// mayBeat: raft ends its heartbeats only when the append beside them has returned. With a peer that hears us and that we don't hear, that
// takes until the append's timeout, and all the while a leader that has stepped down would keep the others from electing one.
func (t *transport) mayBeat(p *pulse, id raft.ServerID, target raft.ServerAddress, term uint64) error {
	if err := t.p.host.silent(); err != nil {
		return err
	}
	if p == nil || !t.p.host.leading(term) {
		return fmt.Errorf("heartbeat to %s: not leader of term %d any more", peerName(id, target), term)
	}
	return nil
}

// sendBeat sends a heartbeat if one is due. It waits for nothing.
func (t *transport) sendBeat(p *pulse, id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest) {
	if !p.begin() {
		return
	}
	body := encodeAppend(args)
	t.carry(func() { // ends with the answer, its timeout, or the transport
		b := new(beat)
		b.err = t.append(id, target, body, &b.resp, beatLimit)
		b.at = time.Now()
		p.ends(b)
	})
}
