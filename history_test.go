package quorate

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// newHistoryStore is a store at the format that keeps a history.
func newHistoryStore(t testing.TB, keep uint64) *store {
	t.Helper()
	s := newTestStore(t, testBudget)
	tx, err := s.begin()
	must(t, err)
	tx.raise(historyFormat, keep)
	tx.commit()
	return s
}

// setTimes commits n transactions that set k to their revision.
func setTimes(t testing.TB, s *store, n int) {
	t.Helper()
	for range n {
		tx, err := s.begin()
		must(t, err)
		tx.meta.revision++
		must(t, tx.set("k", row{value: fmt.Sprint(tx.meta.revision), version: tx.meta.revision, created: 1}))
		tx.endChanges()
		tx.commit()
	}
}

func TestHistoryIsReadInPages(t *testing.T) {
	t.Parallel()
	s := newHistoryStore(t, 1000)
	setTimes(t, s, 3*pageRows)
	for after, n := uint64(0), 0; ; n++ {
		list, err := s.changes(t.Context(), after)
		must(t, err)
		for _, p := range list {
			if p.revision != after+1 || p.now.value != fmt.Sprint(p.revision) || p.previous != after || p.last != p.revision {
				t.Fatalf("after %d comes %+v", after, p)
			}
			after++
		}
		if len(list) == 0 {
			if after != 3*pageRows || n != 3 {
				t.Errorf("%d changes in %d pages", after, n)
			}
			break
		}
	}
}

func TestHistoryKeepsTheNewest(t *testing.T) {
	s := newHistoryStore(t, 10)
	setTimes(t, s, 25)
	var gone *CompactedError
	if _, err := s.changes(t.Context(), 14); !errors.As(err, &gone) || gone.Oldest != 15 || !errors.Is(err, ErrCompacted) {
		t.Errorf("changes after 14: %v", err)
	}
	list, err := s.changes(t.Context(), 15)
	must(t, err)
	if len(list) != 10 || list[0].revision != 16 {
		t.Errorf("%d changes after 15, the first %+v", len(list), list[0])
	}
	for _, want := range []struct{ keep, oldest uint64 }{{100, 15}, {5, 20}} { // a longer one brings nothing back
		tx, err := s.begin()
		must(t, err)
		tx.raise(historyFormat, want.keep)
		tx.commit()
		if m := s.meta(); m.oldest() != want.oldest {
			t.Errorf("with %d kept, the oldest is %d", want.keep, m.oldest())
		}
	}
	must(t, s.close())
	_, err = checkFile(s.path)
	must(t, err)
}

// Whoever reads the history must not take a row that the disk has changed or lost for what happened.
func TestHistoryDamage(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"changed value":   `UPDATE history SET value = 'x' WHERE revision = 7`,
		"changed key":     `UPDATE history SET key = 'l' WHERE revision = 7`,
		"made a deletion": `UPDATE history SET deleted = 1 WHERE revision = 7`,
		"another order":   `UPDATE history SET last = 8 WHERE revision = 7`,
		"lost row":        `DELETE FROM history WHERE revision = 7`,
		"lost first":      `DELETE FROM history WHERE revision = 1`,
		"lost last":       `DELETE FROM history WHERE revision = 9`,
		"other bounds":    `UPDATE quorate_history SET base = 8`,
		"no bounds":       `DELETE FROM quorate_history`,
	} {
		t.Run(name, func(t *testing.T) {
			s := newHistoryStore(t, 10)
			setTimes(t, s, 9)
			must(t, s.close())
			must(t, changeFile(s.path, func(c *conn) error { return c.execText(sql) }))
			if _, err := checkFile(s.path); !errors.Is(err, ErrCorrupt) {
				t.Errorf("checkFile says %v", err)
			}
			s, err := openStore(storeOptions{path: s.path, memory: testBudget, log: s.log})
			if errors.Is(err, ErrCorrupt) { // the private rows are checked at once
				return
			}
			must(t, err)
			defer s.close()
			if err := s.scan(t.Context()); !errors.Is(err, ErrCorrupt) {
				t.Errorf("the scan says %v", err)
			}
			if _, err := s.changes(t.Context(), 0); !errors.Is(err, ErrCorrupt) {
				t.Errorf("changes says %v", err)
			}
		})
	}
}

// A state begins in the first format and is taken to the next in one transaction, file and all.
func TestRaiseMigratesTheFile(t *testing.T) {
	s := newTestStore(t, testBudget)
	put(t, s, "a", "1")
	version := func() int64 {
		t.Helper()
		var v int64
		must(t, s.read(func(c *conn) (err error) {
			v, err = c.one(qUserVersion)
			return errors.Join(err, c.checkSchema())
		}))
		return v
	}
	if version() != firstFormat || s.meta().format != firstFormat {
		t.Fatal("a new file is not in the first format")
	}
	tx, err := s.begin()
	must(t, err)
	tx.raise(historyFormat, 0)
	tx.rollback()
	if version() != firstFormat || s.meta().format != firstFormat {
		t.Fatal("a raise that was rolled back has left something")
	}
	tx, err = s.begin()
	must(t, err)
	tx.raise(historyFormat, 0)
	tx.commit()
	must(t, s.flush())
	if m := s.meta(); version() != historyFormat || m.format != historyFormat || m.keep != defaultHistory || m.oldest() != m.revision {
		t.Fatalf("after the raise: %+v", m)
	}
	must(t, s.close())
	s = openTestStore(t, s.path, testBudget)
	if m := s.meta(); m.keep != defaultHistory || m.format != historyFormat {
		t.Errorf("reopened: %+v", m)
	}
	setTimes(t, s, 1)
}

// What a foreign program did is in no history: it begins anew, and nobody goes on over the gap.
func TestForgivenHistoryBeginsAnew(t *testing.T) {
	s := newHistoryStore(t, 10)
	setTimes(t, s, 5)
	var told uint64
	s.replaced = func(revision uint64) { told = revision }
	c, err := openConn(s.path, "mode=rw")
	must(t, err)
	must(t, c.execText(`UPDATE kv SET value = 'mine'`))
	must(t, c.close())
	must(t, s.forgive())
	m := s.meta()
	if m.revision != 6 || m.oldest() != 6 || told != 6 {
		t.Errorf("revision %d, oldest %d, told %d", m.revision, m.oldest(), told)
	}
	if _, err := s.changes(t.Context(), 5); !errors.Is(err, ErrCompacted) {
		t.Errorf("changes after 5: %v", err)
	}
	setTimes(t, s, 1)
	list, err := s.changes(t.Context(), 6)
	must(t, err)
	if len(list) != 1 || list[0].revision != 7 {
		t.Errorf("changes after 6: %v", list)
	}
	must(t, s.scan(t.Context()))
}

func TestPublishedChanges(t *testing.T) {
	s := newHistoryStore(t, 10)
	var got []string
	s.published = func(revision uint64, changes []past) {
		if s.meta().revision != revision {
			t.Errorf("told of %d before it is there", revision)
		}
		for _, p := range changes {
			got = append(got, p.String())
		}
	}
	tx, err := s.begin()
	must(t, err)
	tx.meta.revision = 2
	must(t, tx.set("a", row{value: "1", version: 1, created: 1}))
	must(t, tx.delete("a", 2))
	tx.endChanges()
	tx.commit()
	want := []string{`1/2 a was 0 now "1" version 1 created 1`, `2/2 a was 1 deleted`}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

// A row that nobody wrote must not keep apply waiting for ever: it is damage, which a rebuild mends.
func TestHistoryRowFromNowhere(t *testing.T) {
	s := newHistoryStore(t, 10)
	setTimes(t, s, 3)
	must(t, s.close())
	must(t, changeFile(s.path, func(c *conn) error {
		return c.execText(`INSERT INTO history VALUES(4, 'k', 'v', 0, 1, 3, 4, 0)`)
	}))
	s = openTestStore(t, s.path, testBudget)
	tx, err := s.begin()
	must(t, err)
	tx.meta.revision++
	must(t, tx.set("k", row{value: "v", version: 4, created: 1}))
	tx.endChanges()
	tx.commit()
	if err := s.explain("flush", s.flush()); !errors.Is(err, ErrCorrupt) {
		t.Errorf("flush says %v", err)
	}
	if _, err := s.begin(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("begin says %v", err)
	}
	if err := s.close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close says %v", err)
	}
}

// BenchmarkSetHistory is what a history costs a write: three members, with the format that has none and the one that has.
func BenchmarkSetHistory(b *testing.B) {
	for _, writers := range []int{1, 64} {
		for _, format := range []uint64{firstFormat, historyFormat} {
			b.Run(fmt.Sprintf("writers=%d/format=%d", writers, format), func(b *testing.B) {
				c := newCluster(b, 3, func(c *Config) { c.format = format })
				eventually(b, patience, "the format", func() error {
					if now := c[0].s.store.meta().format; now != format {
						return fmt.Errorf("it is %d", now)
					}
					return nil
				})
				s, ctx := c.leader(b).s, ctxFor(b, time.Hour)
				value := bytes.Repeat([]byte("v"), 256)
				var n atomic.Int64
				var wg sync.WaitGroup
				b.ResetTimer()
				for range writers {
					wg.Go(func() {
						for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
							if err := s.Set(ctx, fmt.Sprintf("key/%020d", i%10_000), value); err != nil {
								b.Error(err)
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}
