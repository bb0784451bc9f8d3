package quorate

// Reading: what a key holds and since when, from this member's own copy (View) or, after a read round, linearizably (Get and
// Lookup). It owns Entry, View, Freshness and the time that Freshness tells. It asks read.go for the round and the store for the
// rows, and never touches the log.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// An Entry is a key with its value and the revisions that wrote it.
type Entry struct {
	Key     string
	Value   []byte // a copy, never nil if the key is there
	Version uint64 // revision of its last set; 0 = there is no such key
	Created uint64 // revision of the set that made it
}

// entry is a copy of a row.
func (k keyed) entry() Entry {
	return Entry{Key: k.key, Value: []byte(k.value), Version: k.version, Created: k.created}
}

// missingKey is the error of a Lookup that finds nothing. It is ErrNotFound. The text is made only when somebody asks for it: a
// key that is not there is an everyday answer.
type missingKey string

func (k missingKey) Error() string        { return fmt.Sprintf("%v: %q", ErrNotFound, string(k)) }
func (k missingKey) Is(target error) bool { return target == ErrNotFound }

// Get reads key, linearizably: it sees every write that returned anywhere before Get was called. A missing key is
// (nil, nil); the value is a copy. It takes one round among the members, shared by all Gets that wait, and no write to the
// log. Errors: ErrNoLeader while no majority answers, the context's error, ErrClosed, ErrRemoved, ErrCorrupt; ErrInvalid and
// ErrTooLarge for what is no key. A retry is safe.
func (s *Service) Get(ctx context.Context, key string) ([]byte, error) {
	it, err := s.lookup(ctx, key)
	switch {
	case err != nil:
		return nil, fmt.Errorf("get: %w", err)
	case it == nil:
		return nil, nil
	}
	return []byte(it.value), nil
}

// Lookup is Get with the key's revisions. The versions of one key only grow, so an Entry that has the same Version is the same
// entry, and IfVersion makes a write depend on what was looked up here. A missing key is ErrNotFound with Entry{Key: key}, whose
// Version, 0, is what IfVersion takes for an absent key. The other errors are those of Get; a retry is safe.
func (s *Service) Lookup(ctx context.Context, key string) (Entry, error) {
	it, err := s.lookup(ctx, key)
	switch {
	case err != nil:
		return Entry{Key: key}, fmt.Errorf("lookup: %w", err)
	case it == nil:
		return Entry{Key: key}, missingKey(key)
	}
	return Entry{key, []byte(it.value), it.version, it.created}, nil
}

// lookup is a read round and then the item.
func (s *Service) lookup(ctx context.Context, key string) (*item, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	if err := s.catchUp(ctx); err != nil {
		return nil, err
	}
	return s.item(key)
}

// item is what this member has under key, nil if nothing; it is shared. A row that is damaged is no answer, and wakes the rebuild.
func (s *Service) item(key string) (*item, error) {
	it, err := s.store.item(key)
	if err != nil {
		if errors.Is(err, ErrCorrupt) {
			s.distrust(err)
		}
		return nil, err
	}
	return it, nil
}

// A View reads this member's own copy: no network, no waiting for others. It may be behind, without bound while this member is
// cut off; a write that returned on this same member is in it. Freshness tells how far behind it can be.
type View struct{ s *Service }

// Local returns the view of this member's copy. It works without a majority and after removal, until Close.
func (s *Service) Local() View { return View{s} }

// Stale returns Local as a Getter: memory speed, and after Close Get returns nil.
func (s *Service) Stale() Getter { return View{s} }

// Get is Lookup's Value alone: a copy, and nil if the key is missing, or can't be read here, or after Close.
func (v View) Get(key string) []byte {
	if v.closed() {
		return nil
	}
	it, err := v.s.item(key)
	if err != nil || it == nil {
		return nil
	}
	return []byte(it.value)
}

// Lookup reads key from this member's copy. A missing key is ErrNotFound with Entry{Key: key}. Errors: ErrClosed, ErrCorrupt if
// the row is damaged (it is being mended), ErrInvalid and ErrTooLarge for what is no key. A retry is safe.
func (v View) Lookup(key string) (Entry, error) {
	if v.closed() {
		return Entry{Key: key}, ErrClosed
	}
	it, err := v.s.item(key)
	switch {
	case it != nil:
		return Entry{key, []byte(it.value), it.version, it.created}, nil
	case err == nil:
		err = checkKey(key) // only now, for a key that is found is one
	}
	if err != nil {
		return Entry{Key: key}, fmt.Errorf("lookup: %w", err)
	}
	return Entry{Key: key}, missingKey(key)
}

// Backup is [Service.Backup] of this member's copy as it is: it asks nobody, works without a majority and after removal, and holds
// every write that returned on this member. What the others have beyond that is not in it: Freshness tells how old the copy can be. It
// waits, for as long as ctx and Config.Timeout allow, until the check of the file that a start begins has ended. Errors: ErrClosed,
// ErrCorrupt if this copy is damaged, io.ErrShortWrite, the writer's and the disk's. A retry must start with an empty w.
func (v View) Backup(ctx context.Context, w io.Writer) (revision uint64, err error) {
	wait, cancel := v.s.limited(ctx)
	if err = v.open(wait); err == nil {
		err = v.s.verified(wait) // a backup of damaged rows is one that Restore refuses
	}
	cancel()
	if err != nil {
		return 0, fmt.Errorf("backup: %w", err)
	}
	return v.s.backup(ctx, w)
}

// closed costs one atomic load; nothing hides this fault.
func (v View) closed() bool { return v.s.faults.err() == ErrClosed }

// Freshness says how old a member's copy can be.
type Freshness struct {
	Revision uint64 // of the newest change in the copy
	// AsOf: every write that returned before this time, on whichever member, is in the copy. It is when the newest read round or
	// write of this member began whose result is applied here, and never when some leader was last heard: contact makes no data
	// fresh. It stands still while this member neither reads (Get, Lookup, List…) nor writes; a Get brings it up to now. Zero
	// before the first such call after Open.
	//
	// time.Since(AsOf) is the most by which the copy is behind. Steps of the wall clock do not change it. On systems where Go's
	// monotonic clock stops while the machine is suspended (Linux), it does not count that time.
	AsOf time.Time
}

// Freshness tells how old this copy can be. It never blocks, and works without a majority and after removal; after Close it is
// what it was then.
func (v View) Freshness() Freshness {
	asOf := v.s.asOf.time() // first: what is applied by then is in the revision
	return Freshness{Revision: v.s.store.meta().revision, AsOf: asOf}
}

// A latest is the newest of the times that it was told, all of them after begin. It is told by every read and write, so it is an
// atomic and no lock. It keeps distances from begin, which are monotonic.
type latest struct {
	begin time.Time
	after atomic.Int64 // nanoseconds from begin, and one more; 0 = none
}

func (l *latest) advance(t time.Time) {
	d := int64(t.Sub(l.begin)) + 1
	for {
		was := l.after.Load()
		if d <= was || l.after.CompareAndSwap(was, d) {
			return
		}
	}
}

func (l *latest) time() time.Time {
	d := l.after.Load()
	if d == 0 {
		return time.Time{}
	}
	return l.begin.Add(time.Duration(d - 1))
}
