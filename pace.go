package quorate

// How long disks take, and when a leader's takes so long that another member should lead. It owns the newest times of something that
// is done again and again, the figures that stand for them, and the judgement about this member's own appends. It never measures:
// logstore.go times the appends of this member, ahead.go the answers of the others, which hold their fsync. Control comes from both,
// and from startBackground.
//
// A leader's own append is on the way of every write: raft counts no voter's answer before it has ended. So a leader whose disk takes
// seconds makes all writes as slow, and nothing ends its lead as long as it sends heartbeats. Another leader helps only where a
// majority of the voters without this one is fast; where they share a disk, or one of two others is dead, the writes would be as slow
// as before.

import (
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

const (
	paceKept = 5
	paceFew  = 3 // answers that say how long a voter takes

	slowAppend = time.Second // an append that takes longer is slow,
	slowTimes  = 5           // if it takes as many times longer than the others' answers
	slowMany   = 3           // of the last paceKept appends, and the disk is slow
	slowPause  = time.Minute // for which it is unfit to lead, and then twice as long, up to
	slowMost   = 10 * time.Minute
)

// A pace is the newest times that something took, paceKept at most. The zero value is ready.
type pace struct {
	took [paceKept]time.Duration
	n    int // how many there were in all
}

func (p *pace) add(took time.Duration) {
	p.took[p.n%paceKept] = took
	p.n++
}

// median is the middle one: above a limit if most of them are. 0 if there is none.
func (p *pace) median() time.Duration {
	list := p.after(0)
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return max(list[len(list)/2], 1)
}

// after are those that are kept of the ones after the first n, the newest last.
func (p *pace) after(n int) []time.Duration {
	var list []time.Duration
	for i := max(p.n-paceKept, n); i < p.n; i++ {
		list = append(list, p.took[i%paceKept])
	}
	return list
}

// quorumPace is the time in which a majority of all voters answers, counted without the one that asks: the slowest of its fastest
// majority. Not ok: fewer of them have answered.
func quorumPace(answers []time.Duration, voters int) (slowest time.Duration, ok bool) {
	need := voters/2 + 1
	if len(answers) < need {
		return 0, false
	}
	slices.Sort(answers)
	return answers[need-1], true
}

// slow reports whether most of these appends are, beside a time in which others do the same.
func slow(appends []time.Duration, others time.Duration) bool {
	n := 0
	for _, took := range appends {
		if took > slowAppend && took > slowTimes*others {
			n++
		}
	}
	return n >= slowMany
}

// A slowness is the judgement about this member's own disk.
type slowness struct {
	fault  error         // nil = it is fast enough
	judged int           // how many appends there were then: they are not judged again
	until  time.Time     // of the fault, or when it ended
	pause  time.Duration // that the last one stood
}

// judge looks at the newest of the appends after the judged ones, n in all, and at the time in which a majority of the others
// answers; ok: it is known, as this member leads. Without news a fault ends with its pause; one whose appends go on being slow
// stands again.
func (j *slowness) judge(appends []time.Duration, n int, others time.Duration, ok bool) error {
	now := time.Now()
	if j.fault != nil {
		if now.Before(j.until) {
			return j.fault
		}
		if slow(appends, 0) {
			j.stand(now, n, j.fault)
			return j.fault
		}
		j.fault = nil
	}
	if ok && slow(appends, others) {
		p := pace{}
		for _, took := range appends {
			p.add(took)
		}
		j.stand(now, n, fmt.Errorf("the disk of the log is slow: an append takes %v with its fsync, and a majority of the other voters "+
			"has answered in %v", p.median().Round(time.Millisecond), others.Round(time.Millisecond)))
	}
	return j.fault
}

func (j *slowness) stand(now time.Time, n int, fault error) {
	switch {
	case j.until.IsZero(), now.Sub(j.until) > slowMost:
		j.pause = slowPause
	default:
		j.pause = min(2*j.pause, slowMost)
	}
	j.fault, j.judged, j.until = fault, n, now.Add(j.pause)
}

// watchPace looks once a second whether this member's disk is too slow for a leader.
func (s *Service) watchPace() {
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	var j slowness
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		appends, n := s.wal.appends(j.judged)
		others, ok := s.othersPace()
		s.faults.set(faultSlow, j.judge(appends, n, others, ok))
	}
}

// othersPace is the time in which a majority of the other voters answers this leader's appends, as far as they have in its term.
func (s *Service) othersPace() (slowest time.Duration, ok bool) {
	r := s.raft.Load()
	term := r.CurrentTerm()
	if !s.leading(term) {
		return 0, false
	}
	var answers []time.Duration
	all := voters(r.GetConfiguration().Configuration())
	for _, m := range all {
		if took, ok := s.peer.pace(m.ID, term); ok {
			answers = append(answers, took)
		}
	}
	return quorumPace(answers, len(all))
}

// pace is how long the peer takes for an append: the longest of its newest answers in that term, and of what it is still to answer. A
// disk that all share turns slow for all at once, and the leader may have seen its own appends first. Not ok: it does not keep up.
func (a *aheadTable) pace(id raft.ServerID, term uint64) (took time.Duration, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.term != term || a.peers[id] == nil || a.peers[id].pace.n < paceFew || a.peers[id].next == 0 {
		return 0, false
	}
	p := a.peers[id]
	took = slices.Max(p.pace.after(p.pace.n - paceFew))
	for _, e := range p.sends {
		if !e.ended() {
			took = max(took, time.Since(e.began))
		}
	}
	if !p.since.IsZero() {
		took = max(took, time.Since(p.since))
	}
	return took, true
}

func (e *early) ended() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}
