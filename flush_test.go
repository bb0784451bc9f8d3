package quorate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// fileState reads what the file says, by itself.
func fileState(t testing.TB, s *store) (m meta, rows map[string]string) {
	t.Helper()
	rows = make(map[string]string)
	c, err := openReader(s.path)
	must(t, err)
	defer c.close()
	must(t, c.exec(qBeginRead))
	m, err = c.readMeta()
	must(t, err)
	list, _, err := c.chunk("")
	must(t, err)
	for _, r := range list {
		rows[r.key] = string(r.value)
	}
	must(t, errors.Join(c.checkRows(m), c.checkHistory(m)))
	return m, rows
}

// Whatever is committed, rolled back and flushed, in whatever order, and when flushes fail: readers have the newest commit, and the
// file the state of some commit, the newest one after a flush that worked.
func TestFileFollowsTheCommits(t *testing.T) {
	dir, n := t.TempDir(), 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		budget := rapid.SampledFrom([]int64{1 << 20, -1, 300}).Draw(rt, "budget")
		s, err := openStore(storeOptions{path: filepath.Join(dir, fmt.Sprint(n)), memory: budget, log: slog.New(slog.DiscardHandler)})
		must(t, err)
		defer s.close()
		states := []map[string]string{{}} // by applied index
		newest := func() map[string]string { return states[len(states)-1] }
		flushed := 0
		rt.Repeat(map[string]func(*rapid.T){
			"commit": func(rt *rapid.T) {
				if s.stuck != nil { // begin tries again
					flushed = len(states) - 1
				}
				tx, err := s.begin()
				must(t, err)
				defer tx.rollback()
				now := maps.Clone(newest())
				if len(states) == 3 {
					tx.raise(historyFormat, 5)
				}
				for range rapid.IntRange(0, 4).Draw(rt, "changes") {
					key := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(rt, "key")
					if rapid.Bool().Draw(rt, "delete") {
						if _, ok := now[key]; ok {
							tx.meta.revision++
							must(t, tx.delete(key, tx.meta.revision))
							delete(now, key)
						}
						continue
					}
					tx.meta.revision++
					now[key] = fmt.Sprint(tx.meta.revision)
					must(t, tx.set(key, row{[]byte(now[key]), tx.meta.revision, 1}))
				}
				tx.endChanges()
				tx.meta.applied++
				if rapid.IntRange(0, 3).Draw(rt, "end") == 0 {
					return
				}
				tx.commit()
				states = append(states, now)
			},
			"flush": func(rt *rapid.T) {
				must(t, s.flush())
				flushed = len(states) - 1
			},
			"barrier": func(rt *rapid.T) {
				must(t, s.barrier())
				flushed = len(states) - 1
			},
			"flush that fails": func(rt *rapid.T) {
				must(t, s.writer.exec(qBegin)) // a transaction in a transaction
				if err := s.flush(); err == nil && flushed != len(states)-1 {
					rt.Fatal("flushed")
				}
				must(t, s.writer.exec(qRollback))
			},
			"": func(rt *rapid.T) {
				m, rows := fileState(t, s)
				if m.applied != uint64(flushed) || !maps.Equal(rows, states[m.applied]) {
					rt.Fatalf("the file holds %v at %d, want %v at %d", rows, m.applied, states[flushed], flushed)
				}
				for _, key := range []string{"a", "b", "c", "d"} {
					want, has := newest()[key]
					if r, ok, err := s.get(key); err != nil || ok != has || string(r.value) != want {
						rt.Fatalf("%s = %q, %v, %v; want %q, %v", key, r.value, ok, err, want, has)
					}
				}
			},
		})
		must(t, s.close())
		m, err := checkFile(s.path)
		must(t, err)
		if m.applied != uint64(len(states)-1) {
			rt.Fatalf("closed at %d of %d", m.applied, len(states)-1)
		}
	})
}

// What is written a hundred times between two flushes is one row, and what the history has dropped by then is none.
func TestTailKeepsTheNewestOnly(t *testing.T) {
	s := newHistoryStore(t, 10)
	must(t, s.flush())
	setTimes(t, s, 20_000)
	if rows, changes := len(s.tail.rows), len(s.tail.past); rows != 1 || changes > 2*10+1024 {
		t.Errorf("%d rows and %d changes wait", rows, changes)
	}
	if s.tail.size > 1<<20 {
		t.Errorf("the tail is taken for %d bytes", s.tail.size)
	}
	must(t, s.flush())
	if m, rows := fileState(t, s); m.revision != 20_000 || rows["k"] != "20000" {
		t.Errorf("the file holds %v at revision %d", rows, m.revision)
	}
	m := s.meta()
	list, err := s.changes(m.oldest())
	must(t, err)
	if len(list) < 10 || len(list) > 11 {
		t.Errorf("%d changes in the history", len(list))
	}
}

// A shell that keeps the file delays it and no write; and when the tail is full, writes too.
func TestShellHoldsTheFile(t *testing.T) {
	s := newTestStore(t, testBudget)
	put(t, s, "k", "0")
	must(t, s.writer.pragma("busy_timeout=10"))
	keepUp(t, s)
	c, err := openConn(s.path, "mode=rw")
	must(t, err)
	defer c.close()
	must(t, c.exec(qBegin))
	commit := func(key, value string) error {
		tx, err := s.begin()
		if err != nil {
			return err
		}
		setTx(t, tx, key, []byte(value))
		tx.commit()
		return nil
	}
	for i := range 100 {
		must(t, commit("k", fmt.Sprint(i)))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantIs(t, "sync", s.sync(ctx), context.DeadlineExceeded)
	if _, rows := fileState(t, s); rows["k"] != "0" {
		t.Errorf("the file holds %v beside somebody's transaction", rows)
	}
	wantValue(t, s, "k", "99")
	large := strings.Repeat("x", 8<<20)
	for i := 0; err == nil && i < 20; i++ {
		err = commit(fmt.Sprint("large", i), large)
	}
	if !isBusy(err) {
		t.Errorf("a full tail: %v", err)
	}
	must(t, c.exec(qRollback))
	must(t, s.sync(t.Context()))
	if it, err := s.writer.get("k"); err != nil || string(it.value) != "99" {
		t.Errorf("the file holds %v, %v", it, err)
	}
	must(t, commit("k", "100"))
}

// A flush rests while nobody waits for it, and whoever comes makes it hurry.
func TestWaitersHurryTheFlush(t *testing.T) {
	s := newHistoryStore(t, 10_000)
	must(t, s.flush())
	keepUp(t, s)
	for name, wait := range map[string]func() error{
		"sync":    func() error { return s.sync(t.Context()) },
		"flush":   s.flush,
		"barrier": s.barrier,
	} {
		tx, err := s.begin()
		must(t, err)
		for i := range 5000 {
			setTx(t, tx, fmt.Sprint("key", rand.IntN(1e9), i), []byte("v"))
		}
		tx.endChanges()
		tx.commit()
		must(t, wait())
		if m, want := s.inFile.Load(), s.meta(); m.revision != want.revision {
			t.Errorf("%s: the file is at %d of %d", name, m.revision, want.revision)
		}
	}
}
