package quorate

// Who leads after a leader whose process is gone. Raft's followers wait for an election timeout, because a leader that is silent may
// only be slow. But where a process has ended and its machine has not, the machine says so: it refuses the connection. Then one of
// the followers stands at once. It owns the looking and the choice; the election itself is raft's, with its rules for a vote, so
// that nothing here can lose an entry: what a wrong choice costs is a change of the leader. Control comes from startBackground.
//
// Three things must hold. The leader has been silent for longer than it rests between two heartbeats. It is not there: nobody
// listens at its address, or who answers there as this member does not lead. And a majority of the voters, this one with them, does
// not hear it either, as with a pre-vote: a member that is cut off raises no term. Of those that could stand the one with the longest
// log does, and of several the one with the smallest id, so that the votes are not split. Whoever is not the one looks again a moment
// later, and raft's own election timeout stays what it was.

import (
	"cmp"
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

const (
	leaderSilent = heartbeatTimeout * 3 / 10 // raft's heartbeats come every tenth to fifth
	leaderLate   = heartbeatTimeout / 5      // what another one must have waited
	lookAgain    = heartbeatTimeout / 10
	lookPatience = 200 * time.Millisecond // for the answers of the others
)

// watchLeader stands for election when the leader that this member follows is gone.
func (s *Service) watchLeader() {
	for s.ctx.Err() == nil {
		changed := s.changes.wait()
		var due <-chan time.Time
		leader := s.follows()
		if leader != "" {
			due = time.After(max(leaderSilent-s.leaderSilence(), lookAgain))
		}
		select {
		case <-due:
			if s.leaderSilence() >= leaderSilent {
				s.succeed(leader)
			}
		case <-changed:
		case <-s.ctx.Done():
		}
	}
}

// follows is the leader's id on a member that follows one; else "".
func (s *Service) follows() string {
	if id, _ := s.leader(); id != s.ident().id {
		return id
	}
	return ""
}

func (s *Service) leaderSilence() time.Duration { return time.Since(s.raft.Load().LastContact()) }

// succeed stands for election if the leader is gone and this member is its heir.
func (s *Service) succeed(leader string) {
	ctx, cancel := context.WithTimeout(s.ctx, lookPatience)
	defer cancel()
	if s.role() != Follower || s.silent() != nil || s.unfitToLead() != nil || !s.leaderGone(ctx, leader) {
		return
	}
	own := s.statusAnswer()
	all := voters(s.fsm.members.Load().config)
	var answers []statusAnswer
	s.askOthers(ctx, all, func(_ int, a statusAnswer, err error) {
		if err == nil {
			answers = append(answers, a)
		}
	})
	// Meanwhile it may have spoken, or another one may have been elected.
	if !isHeir(own, answers, len(all)) || s.follows() != leader || s.leaderSilence() < leaderSilent || s.raft.Load().CurrentTerm() != own.Term {
		return
	}
	s.log.Info("the leader is gone, this member stands for election", "leader", s.name(leader))
	if err := s.peer.stand(); err != nil {
		s.log.Warn("stand for election", "error", err)
	}
}

// leaderGone: nobody listens at the leader's address, or what is there is this member and does not lead.
func (s *Service) leaderGone(ctx context.Context, id string) bool {
	_, addr := s.leader()
	a, err := s.peer.status(ctx, baseURL(addr, s.conf.TLS))
	var r *refusal
	switch {
	case errors.As(err, &r):
		return r.Code == codeNotReady // its raft does not run
	case err != nil:
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	return a.ID == id && a.Cluster == s.ident().cluster && a.Role != Leader.String()
}

// isHeir reports whether the member whose status is own should stand, by the answers of other voters. The voters are all in number.
func isHeir(own statusAnswer, answers []statusAnswer, all int) bool {
	willing := 1
	for _, a := range answers {
		log := cmp.Or(cmp.Compare(a.LastTerm, own.LastTerm), cmp.Compare(a.LastIndex, own.LastIndex))
		follows := a.LeaderID == own.LeaderID
		back := a.ID == own.LeaderID && a.LeaderID == "" // the leader, started again: it votes, and raft's timeout is its own way
		switch {
		case a.Term > own.Term, a.Role == Leader.String(), a.Role == Candidate.String(), !follows && !back:
			return false // somebody has been faster
		case !a.Healthy, a.Role != Follower.String(), follows && a.LeaderSilence < leaderLate.Milliseconds():
			// It does not vote, or it hears the leader.
		case follows && a.Unfit == "" && cmp.Or(log, cmp.Compare(own.ID, a.ID)) > 0:
			return false // it stands itself
		case log <= 0:
			willing++
		}
	}
	return willing > all/2
}

// stand makes this member's raft a candidate, without a pre-vote, and lets the others vote although they have not given up their
// leader yet: what a leader does that hands over.
func (p *peer) stand() error {
	t, err := p.raftNow()
	if err != nil {
		return err
	}
	return t.stand()
}

func (t *transport) stand() error {
	id, _, _ := t.p.host.self()
	return t.TimeoutNow(raft.ServerID(id), t.LocalAddr(), &raft.TimeoutNowRequest{RPCHeader: t.p.header(t)}, new(raft.TimeoutNowResponse))
}
