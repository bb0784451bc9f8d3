package quorate

// The history: the newest changes, one row each, written in the transaction that makes them. This file owns the public table
// history, how it is trimmed and read, and what must be true of it: revisions without a gap, from meta.oldest to
// meta.revision. It never decides what a change is (fsm.go does) or who wants to know (watch.go). Control comes from the
// store's commit, and from readers a page at a time.

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
)

const (
	defaultHistory = 10_000  // changes
	maxHistory     = 1 << 30 // changes
	trimStep       = 256     // changes that are taken off together
	changesAtOnce  = 16      // changes that one statement writes
	pageRows       = 256     // changes after which a read of the history ends with the transaction
	pageBytes      = 1 << 20 // of values, after which it does
)

// CompactedError says that changes which were asked for are gone from the history. It is ErrCompacted.
type CompactedError struct {
	Oldest uint64 // the smallest since that works
}

func (e *CompactedError) Error() string {
	return fmt.Sprintf("%v: the oldest revision to resume from is %d", ErrCompacted, e.Oldest)
}

func (e *CompactedError) Is(target error) bool { return target == ErrCompacted }

// A past is one change.
type past struct {
	revision uint64
	last     uint64 // last revision of the same transaction
	previous uint64 // version of the key before; 0 = absent
	key      string
	now      *item // nil = deleted; its version is revision otherwise
}

// oldest is the smallest revision that a reader of the history can go on from. It moves in steps, so that rows are taken out
// many at a time: the history holds keep changes, or up to an eighth more.
func (m *meta) oldest() uint64 {
	if m.keep == 0 {
		return m.revision
	}
	if m.revision-m.base <= m.keep {
		return m.base
	}
	over := m.revision - m.base - m.keep
	return m.base + over - over%max(1, min(trimStep, m.keep/8))
}

// raise takes the state to a format, and the history to a length (0 = as it is). The file follows with its next flush.
func (t *storeTx) raise(format, keep uint64) {
	if t.meta.format < historyFormat && format >= historyFormat {
		t.meta.keep, t.meta.base = defaultHistory, t.meta.revision
	}
	t.meta.format = format
	if t.meta.keep == 0 {
		return
	}
	t.meta.base = t.meta.oldest() // a longer history does not bring back what is gone
	if keep > 0 {
		t.meta.keep = min(keep, maxHistory)
	}
}

// endChanges ends the changes of one transaction: only now is it known which is the last.
func (t *storeTx) endChanges() {
	for ; t.sealed < len(t.past); t.sealed++ {
		t.past[t.sealed].last = t.meta.revision
	}
}

// putPast adds changes to the history and takes off what is over its length, so that after every transaction the rows are a
// function of revision, keep and base alone. was is where the file stood before.
func (c *conn) putPast(list []past, was, m *meta, own map[ownKey]uint64, step func(rows int) error) error {
	if m.keep == 0 {
		return nil
	}
	if m.keep != was.keep || m.base != was.base {
		if err := c.putOwn(boundsKey, m.bounds, m, own); err != nil {
			return err
		}
	}
	oldest := m.oldest()
	for len(list) > 0 && list[0].revision <= oldest {
		list = list[1:]
	}
	for len(list) > 0 {
		q, n := qPutChange, 1
		if len(list) >= changesAtOnce {
			q, n = qPutChanges, changesAtOnce
		}
		if err := c.putChanges(q, list[:n]); err != nil {
			return err
		}
		list = list[n:]
		if err := step(n); err != nil {
			return err
		}
	}
	if was.keep == 0 || oldest == was.oldest() {
		return nil
	}
	return c.exec(qTrim, int64(oldest))
}

// announce tells what has been committed. mu is held.
func (t *storeTx) announce() {
	t.s.past = t.past[:0]
	if len(t.past) > 0 && t.s.published != nil {
		t.s.published(t.meta.revision, t.past)
	}
	clear(t.past)
	if cap(t.past) > 1<<14 {
		t.s.past = nil
	}
}

// changes reads a page of the history: what came after a revision, in order and without a gap, up to the end of a transaction.
// It is empty if that one is the newest. If some of it is gone the error is a *CompactedError.
func (s *store) changes(ctx context.Context, after uint64) (list []past, err error) {
	if m := s.meta(); after < m.oldest() { // the file may still have it, until the next flush
		return nil, &CompactedError{Oldest: m.oldest()}
	}
	read := func(c *conn) error {
		list, _, err = c.changesAfter(after)
		return err
	}
	if err = s.read(read); err != nil || len(list) > 0 || after >= s.meta().revision {
		return list, err
	}
	if err = s.sync(ctx); err == nil { // the file does not have it yet
		err = s.read(read)
	}
	return list, err
}

// changesAfter reads a page and where the state stands in one snapshot. A page ends where a transaction does, or Event.Last could not
// be told; it is longer than a page by one transaction at most.
func (c *conn) changesAfter(after uint64) (list []past, m meta, err error) {
	if err := c.exec(qBeginRead); err != nil {
		return nil, m, err
	}
	defer func() { err = errors.Join(err, c.exec(qRollback)) }()
	if m, err = c.readMeta(); err != nil {
		return nil, m, err
	}
	switch {
	case after >= m.revision:
		return nil, m, nil
	case after < m.oldest():
		return nil, m, &CompactedError{Oldest: m.oldest()}
	}
	size := 0
	err = c.each(qChanges, []driver.Value{int64(after)}, func(v []driver.Value) error {
		if n := len(list); (n >= pageRows || size > pageBytes) && list[n-1].revision == list[n-1].last {
			return io.EOF
		}
		p, err := c.past(v)
		if err != nil {
			return err
		}
		if p.revision != after+1 {
			return corrupt("history has no row %d", after+1)
		}
		after++
		if p.now != nil {
			size += len(p.now.value)
		}
		list = append(list, p)
		return nil
	})
	if err == io.EOF {
		err = nil
	} else if err == nil && after != m.revision {
		err = corrupt("history ends at %d and should end at %d", after, m.revision)
	}
	return list, m, err
}

// scanHistory reads all of it once, a page and a snapshot at a time; what is trimmed meanwhile needs no check.
func (s *store) scanHistory(ctx context.Context, c *conn) error {
	after := s.meta().base
	for {
		if err := s.going(ctx); err != nil {
			return err
		}
		list, m, err := c.changesAfter(after)
		var gone *CompactedError
		switch {
		case errors.As(err, &gone):
			after = gone.Oldest
			continue
		case err != nil:
			return s.explain("read", err)
		case len(list) == 0 || m.format < historyFormat:
			return nil
		}
		after = list[len(list)-1].revision
	}
}

// checkHistory reads all of the history of a file that no one writes to.
func (c *conn) checkHistory(m meta) error {
	if m.format < historyFormat {
		return nil
	}
	want := m.oldest()
	err := c.each(qChanges, []driver.Value{int64(0)}, func(v []driver.Value) error {
		p, err := c.past(v)
		if want++; err == nil && p.revision != want {
			err = corrupt("history has no row %d", want)
		}
		return err
	})
	if err == nil && want != m.revision {
		err = corrupt("history ends at %d and should end at %d", want, m.revision)
	}
	return err
}

// putChanges is the statement for so many rows: 16 at once take 60 % of the time of 16 statements. OR FAIL is for the same as in newRows.
func putChanges(rows int) string {
	return `INSERT OR FAIL INTO history(revision, key, value, deleted, created, previous, last, sum) VALUES` + valueRows(`(?, ?, ?, ?, ?, ?, ?, ?)`, rows)
}

func (c *conn) putChanges(q query, list []past) error {
	args := make([]driver.Value, 0, 8*len(list))
	for _, p := range list {
		var value driver.Value
		deleted, created := int64(1), int64(0)
		if p.now != nil {
			value, deleted, created = sqlValue(p.now.value), 0, int64(p.now.created)
		}
		args = append(args, int64(p.revision), p.key, value, deleted, created, int64(p.previous), int64(p.last), int64(pastHash(p)))
	}
	return c.exec(q, args...)
}

// past makes a change of a row of the history, and checks it.
func (c *conn) past(v []driver.Value) (p past, err error) {
	key, text := v[1].(string)
	p = past{revision: columnUint(v[0]), key: key, previous: columnUint(v[5]), last: columnUint(v[6])}
	if value, ok := columnText(v[2]); columnUint(v[3]) == 0 {
		it := &item{row: row{value, p.revision, columnUint(v[4])}}
		c.buf, it.hash = rowHash(c.buf, key, value, it.version, it.created)
		p.now, text = it, text && ok
	}
	if !text || pastHash(p) != columnUint(v[7]) {
		return p, corrupt("history row %d is not what was written", p.revision)
	}
	return p, nil
}

// pastHash builds on the row's, which covers the value.
func pastHash(p past) uint64 {
	b := appendUints(make([]byte, 0, 128), p.revision, p.last, p.previous, p.now.hashOrZero())
	return hash64(append(b, p.key...))
}

// boundsKey names the row that holds the history's length and beginning.
var boundsKey = ownKey{table: 'h', id: 1}

func boundsHash(keep, base uint64) uint64 { return hash64(appendUints([]byte{'h'}, keep, base)) }

// bounds is the row of quorate_history.
func (m *meta) bounds() (hash uint64, q query, args []driver.Value) {
	hash = boundsHash(m.keep, m.base)
	return hash, qPutHistory, []driver.Value{int64(m.keep), int64(m.base), int64(hash)}
}

func (c *conn) eachBounds(f func(keep, base, h uint64) error) error {
	return c.each(qHistory, nil, func(v []driver.Value) error { return f(columnUint(v[0]), columnUint(v[1]), columnUint(v[2])) })
}

func (c *conn) bounds() (keep, base uint64, err error) {
	err = c.eachBounds(func(k, b, h uint64) error {
		keep, base = k, b
		return nil
	})
	if err == nil && keep == 0 {
		err = corrupt("the history's bounds are missing")
	}
	return keep, base, err
}
