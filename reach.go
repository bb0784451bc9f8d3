package quorate

// Whom this member's calls reach. It owns what became of the newest calls to each of the others, by id: notes of this member, never a
// proof. It never decides who takes part. Control comes from the peer, after every call to a known member, and goes to Status and to
// what this member answers when another one asks for its status.

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"
)

const maxReason = 256 // bytes of an error that is kept for people: the other side may have written it

// A reach is what became of this member's calls to another one.
type reach struct {
	answered time.Time // when the newest call that was answered ended; zero = none was
	failing  time.Time // when the first of those that failed since then began; zero = the newest was answered
	tried    time.Time // when the newest call ended
	base     string    // where the newest that failed was sent
	err      error     // and what it met; nil = the newest was answered
}

// A reachTable is what became of this member's calls. The zero value is ready.
type reachTable struct {
	mu   sync.Mutex // guards list
	list map[string]reach
}

// called notes how a call that went to base and began then has ended. One that failed says nothing if a later one was answered, or
// if its caller gave it less time than an answer may take.
func (t *reachTable) called(id, base string, began time.Time, err error) {
	now := time.Now()
	answered := reaches(err)
	if !answered && (errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed)) {
		return
	}
	if !answered && errors.Is(err, context.DeadlineExceeded) && now.Sub(began) < voteTimeout {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.list[id]
	switch {
	case answered:
		r = reach{answered: now}
	case began.Before(r.answered):
		return
	case r.failing.IsZero() || began.Before(r.failing):
		r.failing = began
		fallthrough
	default:
		r.base, r.err = base, err
	}
	r.tried = now
	if t.list == nil {
		t.list = make(map[string]reach)
	}
	t.list[id] = r
}

// reaches: the member took the call. That it can't do now what it was asked for is an answer too; that it takes no call of this
// member is none.
func reaches(err error) bool {
	var r *refusal
	if !errors.As(err, &r) {
		return err == nil
	}
	switch r.Code {
	case codeNotAllowed, codeRemoved, codeWrongCluster, codeWrongTarget, codeProtocol, codeTLS:
		return false
	}
	return true
}

func (t *reachTable) of(id string) reach {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.list[id]
}

// reason is what the calls meet, for people; empty if the newest was answered.
func (r reach) reason() string {
	if r.err == nil {
		return ""
	}
	return shortText(explain(r.err, r.base).Error())
}

func shortText(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason] + "…"
	}
	return strings.ToValidUTF8(s, "")
}
