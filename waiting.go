package quorate

// Who waits to take part, and why: members without a vote, and addresses that nobody has allowed. It owns these reasons and when the
// log hears of them, and decides nothing: member.go admits and promotes. Control comes from there, and once a second from health.go
// on a member that has no vote itself.

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	voteLate    = 10 * time.Second // without a vote, and the log says why
	sayAgain    = time.Minute      // the same about the same one
	waitingMost = 256              // reasons that are kept: anybody may ask to join
)

// A waitingList holds a reason for each member or address that waits. The zero value is ready.
type waitingList struct {
	mu   sync.Mutex // guards list
	list map[string]waiting
}

type waiting struct {
	why   string
	since time.Time
	said  time.Time // when the log heard of it; zero = never
	gist  string    // of what it heard
}

// note keeps the reason of who, and says whether the log should hear of it: after patience, and again when it has changed or a
// minute has passed.
func (l *waitingList) note(who string, err error, patience time.Duration) (say bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	w, known := l.list[who]
	if !known {
		l.makeRoomLocked()
		w.since = now
	}
	w.why = shortText(err.Error())
	if is := gist(err); now.Sub(w.since) >= patience && (w.said.IsZero() || is != w.gist || now.Sub(w.said) >= sayAgain) {
		say, w.said, w.gist = true, now, is
	}
	if l.list == nil {
		l.list = make(map[string]waiting)
	}
	l.list[who] = w
	return say
}

// makeRoomLocked drops the one that has waited longest, if there are too many: it will come again.
func (l *waitingList) makeRoomLocked() {
	oldest := ""
	for who, w := range l.list {
		if oldest == "" || w.since.Before(l.list[oldest].since) {
			oldest = who
		}
	}
	if len(l.list) >= waitingMost {
		delete(l.list, oldest)
	}
}

// of is empty if nothing is known.
func (l *waitingList) of(who string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.list[who].why
}

// keep forgets all but those that still wait, and reports whether there were others.
func (l *waitingList) keep(still func(who string) bool) (forgotten bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for who := range l.list {
		if !still(who) {
			delete(l.list, who)
			forgotten = true
		}
	}
	return forgotten
}

// noVote notes on the leader why a member has none.
func (s *Service) noVote(id, addr string, err error) {
	if s.voteless.note(id, err, voteLate) {
		s.log.Info("a member has no vote yet", "peer", peerName(id, addr), "reason", err)
	}
}

// learnVote asks the leader why this member has no vote: only the leader knows.
func (s *Service) learnVote() {
	id, addr := s.leader()
	own := s.ident().id
	if s.role() != NonVoter || id == own {
		if s.voteless.keep(func(who string) bool { return who != own }) && id != "" {
			s.log.Info("this member has a vote now")
		}
		return
	}
	if id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, checkInterval)
	defer cancel()
	a, err := s.peer.status(ctx, baseURL(addr, s.conf.TLS))
	if err != nil || a.ID != id {
		return
	}
	for _, m := range a.Members {
		if m.ID == own && m.NoVote != "" && s.voteless.note(own, reasonOf(m.NoVote), voteLate) {
			s.log.Info("this member has no vote yet", "reason", m.NoVote)
		}
	}
}

// A reasonOf is an error by the words of another member.
type reasonOf string

func (r reasonOf) Error() string { return string(r) }

// notMoved: this member has come back at an address that nobody has allowed, so that the others go on calling the one before.
func (s *Service) notMoved(before string) {
	own := s.conf.Addr
	err := fmt.Errorf("the others call this member at %s: call AddAllowedMember(ctx, %q) on one of them, or open it at its address of before",
		before, own)
	if s.refused.note(own, err, 0) {
		s.log.Warn("this member's new address is not allowed", "address", own, "reason", err)
	}
}

// moved ends that.
func (s *Service) moved() {
	if s.refused.keep(func(who string) bool { return who != s.conf.Addr }) {
		s.log.Info("this member's new address is known to the others", "address", s.conf.Addr)
	}
}
