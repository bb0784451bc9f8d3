package quorate

// A disk that hangs, and which member falls silent for it. It owns the question whether an election could help, and what this member
// answers when another one asks for its disk. It never ends a call that hangs. Control comes from startBackground, and from the door,
// when a GET status asks for a try; it goes to health.go, where a member is silent or not.
//
// A leader whose disk hangs sends heartbeats all the same, and no write ends. So after the stall limit a member whose disk hangs is
// silent, and the others elect a leader. That helps only if they can: an election and an entry take the disks of a majority. Where the
// disks of so many hang that none is left, as where all lie on one storage, silence makes each leader lose its followers with every
// call that takes longer than the stall limit, and each election is one more call. So a member is not silent as long as no majority
// of the voters can have disks that work:
//
//  1. A voter has a disk that works unless it says the opposite. One that does not answer, or whose release does not say, counts as one
//     that works: then the member whose disk hangs is silent, as it would be without the question.
//  2. A voter that says so must be right now: who asks has it write and sync a small file, and a call that has taken more than
//     the stall limit counts until a later one has ended.
//  3. A member that has become silent stays so until its call returns. While it is not, it asks again every half second.
//  4. Safety is raft's. A member that is not silent does what every member does in the first five seconds of a hang.

import (
	"context"
	"fmt"
	"time"
)

const (
	hangAsked = 2 * time.Second         // for which a call must have run before the others are asked about their disks
	hangOften = stallLimit / 10         // how often
	hangShort = 1500 * time.Millisecond // a disk is not known to work while a call to it has run for so long: less than from hangAsked to stallLimit
)

// hanging is how long the oldest call to the disk has been running.
func (s *Service) hanging() time.Duration { return max(s.wal.busy(), s.fsm.stalled()) }

// hangs is the fault of a call to the disk that does not return.
func (s *Service) hangs() (faultKind, error) {
	d := s.hanging()
	if d <= stallLimit {
		return faultStall, nil
	}
	if d = d.Round(time.Second); s.audible.Load() {
		return faultStallOfAll, fmt.Errorf("a call to the disk has not returned for %v, and no majority of the voters has a disk that works", d)
	}
	return faultStall, fmt.Errorf("a call to the disk has not returned for %v: this member answers nothing until it does", d)
}

// watchHangs finds out, before this member would be silent, whether that helps.
func (s *Service) watchHangs() {
	tick := time.NewTicker(hangOften)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		s.judgeHang(s.hanging())
	}
}

// judgeHang decides for a call that has been running for d. Once silent, a member is so until the call returns: the others elect.
func (s *Service) judgeHang(d time.Duration) {
	silent := d > stallLimit && !s.audible.Load()
	if d >= hangAsked && !silent {
		s.audible.Store(!s.othersWork())
	}
}

// othersWork reports whether a majority of the voters, without this member, may have disks that work.
func (s *Service) othersWork() bool {
	all := voters(s.raft.Load().GetConfiguration().Configuration())
	works := 0
	for _, m := range all {
		if string(m.ID) != s.ident().id {
			works++
		}
	}
	if works <= len(all)/2 {
		return false
	}
	ctx, cancel := context.WithTimeout(s.ctx, hangOften)
	defer cancel()
	s.askEach(ctx, all, s.peer.statusOfDisk, func(_ int, a statusAnswer, err error) {
		if err == nil && a.Stuck {
			works--
		}
	})
	return works > len(all)/2
}

// tryDisk begins a try of this member's disk, and reports whether it is not known to work. It waits for nothing.
func (s *Service) tryDisk() (stuck bool) {
	s.trial.begin(s.wal.trySmall)
	running, newest := s.wal.disk()
	return s.silent() != nil || max(running, s.fsm.stalled()) > hangShort || newest > stallLimit
}
