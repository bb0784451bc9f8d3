package quorate

// Transactions: what one call submits as a whole. It owns Op, Exec, Update, the limits of a transaction and the one way into the
// log, which every verb that changes something takes. Control comes from the caller and goes on to batch.go; op.go has the bytes,
// and what an op means is fsm.go's.

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// An Op is a part of a transaction: a condition, an effect, or several of them (All). Exec carries it out. It is a value: it
// holds copies of what it was made of, may be used again and by several goroutines. The zero Op is nothing:
// where it stands for a condition that was forgotten, the write is unconditional.
type Op struct{ ops transaction }

// Set sets key to val; nil is the empty value. It is a change also if key has this value already.
func Set(key string, val []byte) Op {
	return Op{transaction{{kind: opSet, key: key, value: append([]byte{}, val...)}}}
}

// Delete deletes key. If it is missing, that is no error and no change.
func Delete(key string) Op { return Op{transaction{{kind: opDelete, key: key}}} }

// IfExists: key has a value, be it empty.
func IfExists(key string) Op { return Op{transaction{{kind: opIfExists, key: key}}} }

// IfNotExists: key has no value.
func IfNotExists(key string) Op { return Op{transaction{{kind: opIfNotExists, key: key}}} }

// IfValue: key has exactly this value; nil is the empty one. A missing key has none. It can't tell a value that was changed and
// changed back: IfVersion can.
func IfValue(key string, val []byte) Op {
	return Op{transaction{{kind: opIfValue, key: key, value: append([]byte{}, val...)}}}
}

// IfNotValue: key has another value, or is missing.
func IfNotValue(key string, val []byte) Op {
	return Op{transaction{{kind: opIfNotValue, key: key, value: append([]byte{}, val...)}}}
}

// IfVersion: key was last set at this revision, and not deleted since; 0 = it is missing. It takes what Lookup, List and Watch
// call an entry's Version.
func IfVersion(key string, version uint64) Op {
	return Op{transaction{{kind: opIfVersion, key: key, version: version}}}
}

// IfNotVersion: key was set at another revision, or is missing; 0 = it is there.
func IfNotVersion(key string, version uint64) Op {
	return Op{transaction{{kind: opIfNotVersion, key: key, version: version}}}
}

// All is these ops as one, in this order.
func All(ops ...Op) Op { return Op{flatten(ops)} }

func flatten(ops []Op) transaction {
	n := 0
	for _, o := range ops {
		n += len(o.ops)
	}
	tx := make(transaction, 0, n)
	for _, o := range ops {
		tx = append(tx, o.ops...)
	}
	return tx
}

// ConditionError says which condition of a transaction did not hold: the first one, in the order that they were given. It is
// ErrUnsatisfied. It never holds a value.
type ConditionError struct {
	Key        string
	Want, Have string // in words: "absent", "version 7", "the given value"
	Version    uint64 // of Key when the transaction's turn came; 0 = there was no such key
}

func (e *ConditionError) Error() string {
	return fmt.Sprintf("%v: key %q: want %s, have %s", ErrUnsatisfied, e.Key, e.Want, e.Have)
}

func (e *ConditionError) Is(target error) bool { return target == ErrUnsatisfied }

// newConditionError is about a condition that did not hold of a key at this version. What is there follows from that.
func newConditionError(o op, version uint64) *ConditionError {
	e := &ConditionError{Key: o.key, Version: version}
	state := "absent"
	if version != 0 {
		state = "present"
	}
	switch o.kind {
	case opIfExists:
		e.Want, e.Have = "present", state
	case opIfNotExists:
		e.Want, e.Have = "absent", state
	case opIfValue:
		e.Want, e.Have = "the given value", state
		if version != 0 {
			e.Have = "another value"
		}
	case opIfNotValue:
		e.Want, e.Have = "anything but the given value", "the given value"
	case opIfVersion:
		e.Want, e.Have = versionWords(o.version), versionWords(version)
	case opIfNotVersion:
		e.Want, e.Have = "anything but "+versionWords(o.version), versionWords(version)
		if o.version == 0 {
			e.Want = "present"
		}
	}
	return e
}

func versionWords(version uint64) string {
	if version == 0 {
		return "absent"
	}
	return fmt.Sprint("version ", version)
}

// Exec carries out one transaction, atomically: if all conditions hold, all effects happen, in the order given and with nothing
// in between; otherwise none does. Conditions are about the state before the transaction, wherever they stand. Nobody ever reads
// a part of it. revision is that of its last change, or the current one if it changed nothing; the changes of one transaction
// have consecutive revisions. Without any op it is a transaction of nothing, and its revision counts every write that returned
// before.
//
// A condition that does not hold: a *ConditionError, which is ErrUnsatisfied. Otherwise errors are ErrNotApplied (retry as you
// like) or ErrUncertain. A retry inside the library never meets its own write. A retry by the caller after ErrUncertain can: then
// ErrUnsatisfied may mean that the first attempt won, and without conditions every effect happens once more. With an error
// revision is 0.
//
// Limits: 128 operations, conditions among them; 512 KiB in all, keys and values of conditions included and some bytes for each
// operation, or one single value as large as Config.MaxValue with 32 KiB beside it; ErrTooLarge otherwise, and for a key or a value
// that Set would refuse. Two effects on one key are ErrInvalid: which one was meant? All these are ErrNotApplied too.
func (s *Service) Exec(ctx context.Context, ops ...Op) (revision uint64, err error) {
	tx := flatten(ops)
	r, err := s.write(ctx, tx...)
	switch {
	case err == ErrUnsatisfied && r.at < uint64(len(tx)):
		return 0, newConditionError(tx[r.at], r.have)
	case err != nil:
		return 0, err
	}
	return r.revision, nil
}

// Update sets key to what f makes of its entry, unless it was changed in between; then it begins anew, until ctx ends
// (Config.Timeout if it has no deadline). It is Lookup, f, and Exec(ctx, IfVersion(key, old.Version), Set(key, val)). f gets
// Entry{Key: key} if there is no such key, and a copy of its own otherwise; it may be called several times, and a result of nil
// is the empty value. It returns the entry that it has set.
//
// The Updates of one key that are called on one member take turns, in the order of the calls, so that a slow f gets its write in
// beside fast ones; what other members and other calls write may still come in between. A turn for which others wait ends after a
// second, and its Update goes on without one. f may call Update, also of the same key, which then waits for that second.
//
// An error of f ends it: nothing was written, and the error is f's and ErrNotApplied. Other errors are ErrNotApplied (also
// when ctx has ended between two attempts) or ErrUncertain, never ErrUnsatisfied unless it is f's. A retry inside the library never
// meets its own write. A retry by the caller after ErrUncertain can, and f then gets what it made before: what counts must tell
// by the value whether it was counted.
func (s *Service) Update(ctx context.Context, key string, f func(old Entry) ([]byte, error)) (Entry, error) {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	var t *keyTurn
	defer func() {
		if t != nil {
			s.updates.end(t)
		}
	}()
	for {
		if t == nil || s.updates.over(t) {
			var err error
			if t, err = s.updates.begin(ctx, s.ctx.Done(), key); err != nil {
				return Entry{}, notApplied(err)
			}
		}
		old, err := s.Lookup(ctx, key)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return Entry{}, notApplied(err)
		}
		created, version := old.Created, old.Version // f may write into its copy
		val, err := f(old)
		if err != nil {
			return Entry{}, notApplied(fmt.Errorf("update key %q: %w", key, err))
		}
		set := Set(key, val)
		revision, err := s.Exec(ctx, IfVersion(key, version), set)
		switch {
		case errors.Is(err, ErrUnsatisfied):
			continue
		case err != nil:
			return Entry{}, err
		case version == 0:
			created = revision
		}
		return Entry{Key: key, Value: set.ops[0].value, Version: revision, Created: created}, nil
	}
}

// write is the one way into the log: it checks a transaction, submits it, and gives its verdict. With ErrUnsatisfied the result
// says which op it was.
func (s *Service) write(ctx context.Context, tx ...op) (result, error) {
	if err := s.check(tx); err != nil {
		return result{}, notApplied(err)
	}
	if err := s.refusesWrites(); err != nil {
		return result{}, notApplied(err)
	}
	if err := s.checkState(tx); err != nil {
		return result{}, notApplied(err)
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	began := time.Now()
	r, err := s.batch.submit(ctx, tx)
	if words := s.awaitsFounders(); err != nil && words != "" {
		err = fmt.Errorf("%w: %s", err, words)
	}
	if err != nil {
		return result{}, err
	}
	s.asOf.advance(began) // submit returns when this member has applied it
	if r.status == txUnsatisfied {
		return r, ErrUnsatisfied
	}
	return r, nil
}

// check applies the limits before the log, so that apply never meets what it would have to refuse.
func (s *Service) check(tx transaction) error {
	if len(tx) > maxOps {
		return &LimitError{What: "operations", Limit: maxOps, Got: int64(len(tx))}
	}
	values, valueBytes := 0, 0
	for _, o := range tx {
		if err := checkKey(o.key); err != nil {
			return err
		}
		if len(o.value) > s.conf.MaxValue {
			return &LimitError{What: "value bytes", Limit: int64(s.conf.MaxValue), Got: int64(len(o.value))}
		}
		if o.kind.hasValue() {
			values++
			valueBytes += len(o.value)
		}
	}
	switch size := transactionSize(tx); {
	case size <= maxTransaction:
	case values != 1:
		return &LimitError{What: "transaction bytes", Limit: maxTransaction, Got: int64(size)}
	case size-valueBytes > maxBeside:
		return &LimitError{What: "transaction bytes beside the one value", Limit: maxBeside, Got: int64(size - valueBytes)}
	}
	return checkOnce(tx)
}

// checkState refuses a transaction that would make the state larger than Config.MaxState, as far as the state is known here. One
// whose conditions do not hold here makes nothing larger. Apply asks for no size: all members must do the same, and this limit is each
// one's own.
func (s *Service) checkState(tx transaction) error {
	limit, size, more := s.conf.MaxState, int64(s.store.meta().bytes), int64(0)
	if limit == 0 {
		return nil
	}
	for _, o := range tx {
		if o.kind == opSet {
			more += int64(len(o.key) + len(o.value))
		}
	}
	if more == 0 || size+more <= limit { // the usual case, in which no row is read
		return nil
	}
	for _, o := range tx {
		if o.kind == opAllow || o.kind == opDisallow {
			continue
		}
		it, err := s.item(o.key)
		switch {
		case err != nil:
			return err
		case o.kind.condition() && !holds(o, it.rowOrZero(), it != nil):
			return nil
		case o.kind.effect() && it != nil:
			more -= int64(len(o.key) + len(it.value))
		}
	}
	if more <= 0 || size+more <= limit {
		return nil
	}
	return &LimitError{What: "state bytes", Limit: limit, Got: size + more}
}

// checkOnce: no two effects on one key.
func checkOnce(tx transaction) error {
	if len(tx) < 2 {
		return nil
	}
	var seen map[string]bool // made with the second effect
	first := ""
	for _, o := range tx {
		if o.kind != opSet && o.kind != opDelete {
			continue
		}
		switch {
		case first == "":
			first = o.key
			continue
		case seen == nil:
			seen = map[string]bool{first: true}
		}
		if seen[o.key] {
			return fmt.Errorf("%w: a transaction writes key %q twice", ErrInvalid, o.key)
		}
		seen[o.key] = true
	}
	return nil
}

func checkKey(key string) error {
	switch {
	case len(key) > maxKey:
		return &LimitError{What: "key bytes", Limit: maxKey, Got: int64(len(key))}
	case !validKey(key):
		return fmt.Errorf("%w: key %q: a key is valid UTF-8, not empty, and holds no NUL", ErrInvalid, key)
	}
	return nil
}
