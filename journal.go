package quorate

// What this member logs of the others while it runs: a member that does not answer, and who leads. It owns when such a line is
// written: at the start of an outage, after one and after ten minutes of it, when its reason is another one, and at its end. It
// decides nothing. Control comes from transport.hold, which meets the outages, and from startBackground. raft's own lines on the same
// subjects are Debug: see slog.go.

import (
	"context"
	"log/slog"
	"regexp"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	outageAfter  = time.Second      // a peer that answers again sooner is not spoken of
	outageCalm   = 10 * time.Minute // after an outage; one that begins sooner is spoken of later, so that a bad line fills no log
	reasonsMost  = 5                // that are logged in one outage
	leaderAfter  = 5 * time.Second  // without a leader; an election takes less
	diagnoseTime = 2 * time.Second
)

// reminders are the ages of an outage at which it is logged once more.
var reminders = []time.Duration{time.Minute, 10 * time.Minute}

// peerName is how a member appears in logs and errors: its address and the first digits of its id.
func peerName[I, A ~string](id I, addr A) string {
	if addr == "" || placeholder(string(addr)) {
		return shortID(string(id))
	}
	return string(addr) + " (" + shortID(string(id)) + ")"
}

var wholeID = regexp.MustCompile(`\b[0-9a-f]{32}\b`)

// shortIDs leaves of each id in a text its first digits.
func shortIDs(text string) string { return wholeID.ReplaceAllStringFunc(text, shortID) }

// name is the peerName of a member by what is known of it here.
func (s *Service) name(id string) string {
	addr, _, _ := s.server(id)
	if other := s.members.announcedAddr(id, addr); other != "" {
		addr = other
	}
	return peerName(id, addr)
}

// A vigil counts the lines of one outage. The zero value is no outage.
type vigil struct {
	since  time.Time
	after  time.Duration // the age at which the first line is due
	logged int
}

// next is the age at which the next line is due; false: none is.
func (v *vigil) next() (age time.Duration, ok bool) {
	switch {
	case v.since.IsZero() || v.logged > len(reminders):
		return 0, false
	case v.logged == 0:
		return v.after, true
	}
	return reminders[v.logged-1], true
}

// due takes the next line, if its time has come. A line whose time has passed with an earlier one is left out.
func (v *vigil) due() (age time.Duration, ok bool) {
	for age = time.Since(v.since); ; ok = true {
		if next, more := v.next(); !more || age < next {
			return age, ok
		}
		v.logged++
	}
}

// outages are the peers that do not answer what the leader keeps trying to tell them.
type outages struct {
	log *slog.Logger

	mu   sync.Mutex // guards list
	list map[raft.ServerID]*outage
}

// An outage is what is known of one peer. When this member leads again, raft's goroutine of a term before may still be at a call to
// the peer, beside the one of the new term: raft does not wait for it.
type outage struct {
	log *slog.Logger

	mu        sync.Mutex      // guards the fields below; the log is written under it, so that its lines keep their order
	term      uint64          // the newest in which the peer was called
	silent    vigil           // it does not answer
	reason    string          // the gist of the newest error
	lasts     time.Time       // since when it is that
	reasons   map[string]bool // those that were logged in this outage
	ended     time.Time
	after     time.Duration
	stateless vigil // it answers, and has not taken the state that it needs
}

// of is called before each call to a peer in a term.
func (o *outages) of(id raft.ServerID, term uint64) *outage {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.list == nil {
		o.list = make(map[raft.ServerID]*outage)
	}
	of := o.list[id]
	if of == nil {
		of = &outage{log: o.log}
		o.list[id] = of
	}
	of.mu.Lock()
	defer of.mu.Unlock()
	of.term = max(of.term, term)
	return of
}

// goesOn is called after every try that failed; the first one began then.
func (o *outage) goesOn(peer string, began time.Time, why error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.silent.since.IsZero() {
		if o.after = min(2*o.after, reminders[0]); o.ended.IsZero() || time.Since(o.ended) > outageCalm {
			o.after = outageAfter
		}
		o.silent = vigil{since: began, after: o.after}
	}
	o.silent.warn(o.log, "a member does not answer", "a member still does not answer", peer, why)
	o.anotherLocked(peer, why)
}

// anotherLocked logs a reason that has not been logged in this outage, once it has lasted: a server that does not listen may be one that
// refuses later.
func (o *outage) anotherLocked(peer string, why error) {
	is := gist(why)
	if is != o.reason {
		o.reason, o.lasts = is, time.Now()
	}
	switch {
	case o.silent.logged == 0 || o.reasons[is] || len(o.reasons) >= reasonsMost:
		return
	case o.reasons == nil: // the line that has just been written gave it
		o.reasons = make(map[string]bool)
	case time.Since(o.lasts) < outageAfter:
		return
	default:
		o.log.Warn("a member does not answer, for another reason now", "peer", peer, "for", time.Since(o.silent.since).Round(time.Second), "why", why)
	}
	o.reasons[is] = true
}

// over is called when the peer has answered.
func (o *outage) over(peer string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.silent.logged > 0 {
		o.log.Info("a member answers again", "peer", peer, "after", time.Since(o.silent.since).Round(time.Second))
		o.ended = time.Now()
	}
	o.silent, o.reasons = vigil{}, nil
}

// leftAlone is called when nobody calls the peer in this term any more: another member leads, or the peer was removed. In a later term
// it may be called already.
func (o *outage) leftAlone(term uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if term == o.term {
		o.silent, o.stateless, o.reasons = vigil{}, vigil{}, nil
	}
}

// sent is called when a peer has taken the state that it was sent since then, or has not.
func (o *outage) sent(peer string, began time.Time, bytes int64, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil {
		o.log.Info("a member has taken the state", "peer", peer, "bytes", bytes, "took", time.Since(began).Round(time.Millisecond))
		o.stateless = vigil{}
		return
	}
	if o.stateless.since.IsZero() {
		o.stateless.since = began
	}
	o.stateless.warn(o.log, "a member has not taken the state", "a member has still not taken the state", peer, err)
}

// warn writes the line that is due.
func (v *vigil) warn(log *slog.Logger, words, again, peer string, why error) {
	first := v.logged == 0
	age, due := v.due()
	if !due {
		return
	}
	if !first {
		words = again
	}
	log.Warn(words, "peer", peer, "for", age.Round(time.Second), "why", why)
}

// A trouble is something of this member that is tried and fails again and again. It is logged when it begins, at the reminders, and
// when it has another reason. The zero value is none.
type trouble struct {
	vigil   vigil
	reasons map[string]bool
}

// goesOn is called after every try that failed.
func (t *trouble) goesOn(log *slog.Logger, words string, err error, attrs ...any) {
	if t.vigil.since.IsZero() {
		t.vigil.since, t.reasons = time.Now(), make(map[string]bool)
	}
	is := gist(err)
	another := !t.reasons[is] && len(t.reasons) < reasonsMost
	age, due := t.vigil.due()
	if !due && !another {
		return
	}
	t.reasons[is] = true
	if age >= outageAfter {
		attrs = append(attrs, "for", age.Round(time.Second))
	}
	log.Warn(words, append(attrs, "error", err)...)
}

// over is called after a try that did not fail.
func (t *trouble) over() { *t = trouble{} }

// A leadership is who leads in which term; the id is empty while nobody does.
type leadership struct {
	id, addr string
	term     uint64
}

// whoLeads looks until the leader is of the term: raft changes them one after the other.
func (s *Service) whoLeads() leadership {
	r := s.raft.Load()
	for {
		term := r.CurrentTerm()
		id, addr := s.leader()
		if r.CurrentTerm() == term {
			return leadership{id, addr, term}
		}
	}
}

// tellLeader logs each change of the leader, and that there is none if that lasts.
func (s *Service) tellLeader() {
	var told leadership
	without := vigil{since: time.Now(), after: leaderAfter}
	for s.ctx.Err() == nil {
		changed := s.changes.wait()
		switch now := s.whoLeads(); {
		case now.id == "":
			if without.since.IsZero() {
				without = vigil{since: time.Now(), after: leaderAfter}
			}
			s.tellNoLeader(&without)
		case now != told:
			words := "another member leads now"
			if now.id == s.ident().id {
				words = "this member leads now"
			}
			s.log.Info(words, "leader", peerName(now.id, now.addr), "term", now.term)
			told, without = now, vigil{}
		default:
			without = vigil{}
		}
		var due <-chan time.Time
		if next, ok := without.next(); ok {
			due = time.After(max(time.Until(without.since.Add(next)), 0))
		}
		select {
		case <-changed:
		case <-due:
		case <-s.ctx.Done():
		}
	}
}

func (s *Service) tellNoLeader(without *vigil) {
	age, due := without.due()
	if !due || s.faults.first(faultRemoved) != nil {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, diagnoseTime)
	defer cancel()
	why := s.diagnose(ctx)
	if s.ctx.Err() == nil {
		s.log.Warn("this member knows no leader", "for", age.Round(time.Second), "why", why)
	}
}
