package quorate

// Turns: the Updates of one key that one member carries out come one after the other, in the order in which they were called. Without
// them an Update whose function takes 20 ms beside fast ones never gets its write in. This file owns who waits for which key.
// Control comes from Update.
//
// A turn is no lock: Update is right without one, and writes of other members, and other calls, come in between. So a turn that
// somebody waits for ends after a second, whatever its holder does, who goes on without it. The function of an Update may call Update,
// and two of them may wait for each other's keys: with a lock they would wait for ever.

import (
	"container/list"
	"context"
	"fmt"
	"sync"
	"time"
)

const turnLimit = time.Second // that others wait for one turn

type keyTurns struct {
	mu    sync.Mutex            // guards the fields below and those of all turns
	byKey map[string]*list.List // of *keyTurn: the first one is on. No key has an empty list
}

type keyTurn struct {
	key  string
	on   chan struct{} // closed when it is on
	at   *list.Element // nil: it is over
	late *time.Timer   // ends it; nil while nobody waits behind it
}

// begin waits until it is this caller's turn, or until ctx or the Service ends. Whoever gets a turn ends it.
func (q *keyTurns) begin(ctx context.Context, closing <-chan struct{}, key string) (*keyTurn, error) {
	left := ctx.Done() // code of the caller's, perhaps: before the lock
	t := q.add(key)
	select {
	case <-t.on:
		return t, nil
	default:
	}
	select {
	case <-t.on:
		return t, nil
	case <-left:
		q.end(t)
		return nil, fmt.Errorf("waiting for other updates of key %q on this member: %w", key, ended(ctx))
	case <-closing:
		q.end(t)
		return nil, ErrClosed
	}
}

func (q *keyTurns) add(key string) *keyTurn {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.byKey == nil {
		q.byKey = make(map[string]*list.List)
	}
	l := q.byKey[key]
	if l == nil {
		l = list.New()
		q.byKey[key] = l
	}
	t := &keyTurn{key: key, on: make(chan struct{})}
	t.at = l.PushBack(t)
	switch l.Len() {
	case 1:
		close(t.on)
	case 2:
		q.limitLocked(l)
	}
	return t
}

// limitLocked is for when somebody waits behind the turn that is on.
func (q *keyTurns) limitLocked(l *list.List) {
	t := l.Front().Value.(*keyTurn)
	t.late = time.AfterFunc(turnLimit, func() { q.end(t) })
}

// end ends a turn, or the wait for one; again does nothing.
func (q *keyTurns) end(t *keyTurn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.at == nil {
		return
	}
	l := q.byKey[t.key]
	was := l.Front()
	l.Remove(t.at)
	t.at = nil
	if t.late != nil {
		t.late.Stop()
	}
	now := l.Front()
	if now == nil {
		delete(q.byKey, t.key)
		return
	}
	if now != was {
		close(now.Value.(*keyTurn).on)
		if l.Len() > 1 {
			q.limitLocked(l)
		}
	}
}

// over tells whether a turn has ended, as it does when it has taken too long.
func (q *keyTurns) over(t *keyTurn) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return t.at == nil
}
