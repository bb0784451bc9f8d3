package quorate

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
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
		rows[r.key] = r.value
	}
	must(t, errors.Join(c.checkRows(m), c.checkHistory(m)))
	return m, rows
}

// Whatever is committed, rolled back and flushed, in whatever order, and when flushes fail: readers have the newest commit, and the
// file the state of some commit, the newest one after a flush that worked.
func TestFileFollowsTheCommits(t *testing.T) {
	t.Parallel()
	dir, n := t.TempDir(), 0
	var keys []string // some more than go in one statement
	for i := range rowsAtOnce + 4 {
		keys = append(keys, string(rune('a'+i)))
	}
	rapid.Check(t, func(rt *rapid.T) {
		n++
		budget := rapid.SampledFrom([]int64{1 << 20, -1, 300}).Draw(rt, "budget")
		s, err := openStore(storeOptions{path: filepath.Join(dir, fmt.Sprint(n)), memory: budget, log: slog.New(slog.DiscardHandler)})
		must(t, err)
		defer s.close()
		states := []map[string]string{{}} // by applied index
		newest := func() map[string]string { return states[len(states)-1] }
		flushed := 0
		commit := func(rt *rapid.T) {
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
			changed := rapid.SliceOfN(rapid.SampledFrom(keys), 0, 4).Draw(rt, "keys")
			if rapid.Bool().Draw(rt, "all") {
				changed = append(changed, keys...)
			}
			deletes := rapid.SampledFrom([]int{0, 4, 8}).Draw(rt, "deletes, of 8")
			for _, key := range changed {
				if rapid.IntRange(1, 8).Draw(rt, "delete") <= deletes {
					if _, ok := now[key]; ok {
						tx.meta.revision++
						must(t, tx.delete(key, tx.meta.revision))
						delete(now, key)
					}
					continue
				}
				tx.meta.revision++
				now[key] = fmt.Sprint(tx.meta.revision)
				must(t, tx.set(key, row{value: now[key], version: tx.meta.revision}))
			}
			tx.endChanges()
			tx.meta.applied++
			if rapid.IntRange(0, 3).Draw(rt, "end") == 0 {
				return
			}
			tx.commit()
			states = append(states, now)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"commit": commit,
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
			"flush that fails after some commits": func(rt *rapid.T) {
				if s.stuck != nil {
					return
				}
				_ = s.writeTail(func(*tail) error {
					for range rapid.IntRange(1, 3).Draw(rt, "commits") {
						commit(rt)
					}
					return errors.New("fails")
				})
			},
			"": func(rt *rapid.T) {
				m, rows := fileState(t, s)
				if m.applied != uint64(flushed) || !maps.Equal(rows, states[m.applied]) {
					rt.Fatalf("the file holds %v at %d, want %v at %d", rows, m.applied, states[flushed], flushed)
				}
				for _, key := range keys {
					want, has := newest()[key]
					if r, ok, err := s.get(key); err != nil || ok != has || r.value != want {
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
	list, err := s.changes(t.Context(), m.oldest())
	must(t, err)
	if len(list) < 10 || len(list) > 11 {
		t.Errorf("%d changes in the history", len(list))
	}
}

// New rows go to the file several in one statement. Not among them are some that only look new: the file has them from before they
// were deleted and set again.
func TestNewRowsTogether(t *testing.T) {
	s := newHistoryStore(t, 1000)
	want := make(map[string]string)
	change := func(from, to int, value string) {
		t.Helper()
		tx, err := s.begin()
		must(t, err)
		for i := from; i < to; i++ {
			key := fmt.Sprintf("key %03d", i)
			if value == "" {
				delete(want, key)
				tx.meta.revision++
				must(t, tx.delete(key, tx.meta.revision))
				continue
			}
			want[key] = value + key
			setTx(t, tx, key, []byte(want[key]))
		}
		tx.endChanges()
		tx.commit()
	}
	for _, step := range []func(){
		func() {
			change(0, 3*rowsAtOnce+1, "first")
			if n := together(s.tail.sorted()); n != rowsAtOnce {
				t.Errorf("%d new rows in a statement", n)
			}
		},
		func() { change(rowsAtOnce, 2*rowsAtOnce+2, ""); change(rowsAtOnce, 4*rowsAtOnce, "again") },
		func() { change(0, 5*rowsAtOnce, "changed"); change(2, 3, "") },
		func() { change(100, 100+2*rowsAtOnce, "new"); change(100+rowsAtOnce, 101+rowsAtOnce, "") },
		func() { // in one commit
			tx, err := s.begin()
			must(t, err)
			for i := range rowsAtOnce {
				key := fmt.Sprintf("key %03d", 100+i)
				tx.meta.revision++
				must(t, tx.delete(key, tx.meta.revision))
				want[key] = "back"
				setTx(t, tx, key, []byte(want[key]))
			}
			tx.endChanges()
			tx.commit()
		},
		func() { // while a flush fails
			change(50, 51, "another")
			_ = s.writeTail(func(*tail) error {
				change(100, 100+rowsAtOnce, "")
				change(100, 100+rowsAtOnce, "once more")
				return errors.New("fails")
			})
		},
	} {
		step()
		must(t, s.flush())
		if _, rows := fileState(t, s); !maps.Equal(rows, want) {
			t.Fatalf("the file holds %v, want %v", rows, want)
		}
	}
}

// A shell that keeps the file delays it and no write; and when the tail is full, writes too.
func TestShellHoldsTheFile(t *testing.T) {
	s := newTestStore(t, testBudget)
	put(t, s, "k", "0")
	must(t, s.writer.pragma("busy_timeout=10"))
	keepUp(t, s)
	soon(t, "maintain runs", func() bool {
		s.tailMu.RLock()
		defer s.tailMu.RUnlock()
		return s.flusher
	})
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
	if it, err := s.writer.get("k"); err != nil || it.value != "99" {
		t.Errorf("the file holds %v, %v", it, err)
	}
	must(t, commit("k", "100"))
}

// What a shell has deleted looks like what was never there, and no answer may be made of it. Nor does apply wait for a large flush, not
// even for one that begins the WAL anew.
func TestRowsOfSomebodyElse(t *testing.T) {
	s := newTestStore(t, -1)
	put(t, s, "k", "1")
	look := func() error {
		tx, err := s.begin()
		must(t, err)
		defer tx.rollback()
		_, _, err = tx.row("k")
		must(t, err)
		return tx.sound()
	}
	must(t, look())
	func() {
		s.fileMu.Lock()
		defer s.fileMu.Unlock()
		must(t, look())
		for range 3 {
			must(t, s.transact(func(*meta, map[ownKey]uint64) error {
				must(t, s.writer.pragma("cache_size=1"))
				for i := range 1000 { // more than the cache holds: pages are in the WAL before the commit
					must(t, s.writer.exec(qPutSession, int64(i+1), make([]byte, 16), int64(0), int64(0), make([]byte, 1000), int64(0)))
				}
				return look()
			}))
			must(t, look())
			_, err := s.writer.one(qPassive)
			must(t, err)
		}
		shell(t, s.path, "DELETE FROM kv WHERE key = 'k'")
		wantIs(t, "after a shell's deletion, while somebody has the file", look(), errAgain)
	}()
	wantIs(t, "after a shell's deletion", look(), errForeign)
	must(t, s.forgive())
	must(t, look())
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

// The more commits come the longer the pauses between two flushes, up to a bound; when few come, and when much waits, the file
// follows at once.
func TestPausesGrowUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHistoryStore(t, 10)
		must(t, s.flush())
		ctx, cancel := context.WithCancel(t.Context())
		var flusher sync.WaitGroup
		flusher.Go(func() { s.flushWhenDue(ctx) })
		defer flusher.Wait()
		defer cancel()
		synctest.Wait()
		// lag is how long the file takes to have what is committed now.
		lag := func() time.Duration {
			s.tailMu.RLock()
			want := s.commits
			s.tailMu.RUnlock()
			began := time.Now()
			for s.filedUpTo() < want {
				if time.Since(began) > time.Minute {
					t.Fatal("the file does not follow")
				}
				time.Sleep(time.Millisecond)
			}
			return time.Since(began)
		}
		load := func() {
			for range 8 {
				setTimes(t, s, flushMany*int(flushLonger/time.Second))
				lag()
			}
		}
		grown := func() {
			t.Helper()
			load()
			commitOnly(t, s, "k", "v")
			if d := lag(); d < flushLonger-10*time.Millisecond || d > flushLonger+10*time.Millisecond {
				t.Errorf("under load the file is %v late, want %v", d, flushLonger)
			}
		}
		time.Sleep(time.Second)
		commitOnly(t, s, "k", "v")
		if d := lag(); d > 10*time.Millisecond {
			t.Errorf("the first commit is %v late", d)
		}
		grown()
		for range 2 { // the flush before them had only one commit
			commitOnly(t, s, "k", "v")
			if d := lag(); d > flushPause+10*time.Millisecond {
				t.Errorf("when little happens the file is %v late", d)
			}
		}
		load()
		for i := range tailRipe >> 21 { // each is a row and in the history: the last one makes it ripe
			commitOnly(t, s, fmt.Sprint("large", i), strings.Repeat("v", 1<<20))
		}
		if d := lag(); d > 10*time.Millisecond {
			t.Errorf("a ripe tail waited %v", d)
		}
		commitOnly(t, s, "k", "v")
		if d := lag(); d < flushPause/2 {
			t.Errorf("no pause after them: %v", d)
		}
	})
}

// commitOnly leaves the file behind.
func commitOnly(t testing.TB, s *store, key, value string) {
	t.Helper()
	tx, err := s.begin()
	must(t, err)
	setTx(t, tx, key, []byte(value))
	tx.commit()
}

// Whoever reads the file never gets one that lacks what was committed, also where it will not come: a shell has written to the file.
func TestForeignFileIsNoAnswer(t *testing.T) {
	s := newTestStore(t, -1)
	put(t, s, "k", "1")
	must(t, s.flush())
	shell(t, s.path, "UPDATE kv SET value = 2")
	commitOnly(t, s, "new", "2")
	_, err := s.list(t.Context(), span{limit: -1})
	wantIs(t, "list", err, ErrCorrupt)
	_, err = s.copy(t.Context())
	wantIs(t, "copy", err, errForeign)
	_, err = s.queries.query(t.Context(), t.Context(), "SELECT * FROM kv", nil)
	wantIs(t, "query", err, errForeign)
	must(t, s.forgive())
	l, err := s.list(t.Context(), span{limit: -1})
	must(t, err)
	if len(l.page.rows) != 2 {
		t.Errorf("%d rows after forgive", len(l.page.rows))
	}
	l.close()
}

// A shell has made one of the rows that are new to us: what was committed takes its place.
func TestForgiveAndNewRows(t *testing.T) {
	s := newTestStore(t, testBudget)
	put(t, s, "a", "1")
	shell(t, s.path, "INSERT INTO kv VALUES('key/0000003', 'evil', 2, 2, 0)")
	tx, err := s.begin()
	must(t, err)
	for i := range 2 * rowsAtOnce {
		setTx(t, tx, fmt.Sprintf("key/%07d", i), []byte("ours"))
	}
	tx.commit()
	wantIs(t, "flush", s.flush(), errForeign)
	must(t, s.forgive())
	must(t, s.flush())
	if _, rows := fileState(t, s); len(rows) != 1+2*rowsAtOnce || rows["key/0000003"] != "ours" {
		t.Errorf("the file holds %v", rows)
	}
}

// A shell that keeps the file delays neither the marks, which the watch over health asks for, nor a close; and what the file did
// not get leads nobody to the connection that is closed, nor does who wants the file keep the close from ending.
func TestCloseWhileAShellHoldsTheFile(t *testing.T) {
	s := newTestStore(t, -1)
	fill(t, s, 300, 10)
	must(t, s.flush())
	must(t, s.writer.pragma("busy_timeout=50"))
	c, err := openConn(s.path, "mode=rw")
	must(t, err)
	defer c.close()
	must(t, c.exec(qBegin))
	commitOnly(t, s, "k", "1")
	if _, err := s.marks(); err != nil {
		t.Errorf("marks: %v", err)
	}
	for range maxLists {
		s.lists <- struct{}{}
	}
	waits := make(chan error, 1)
	go func() { // a listing that has its turn, and waits for the file
		<-s.ending
		eventually(t, patience, "the close is waiting", func() error {
			if s.mu.TryLock() {
				defer s.mu.Unlock()
				if !s.closed {
					return errors.New("not yet")
				}
			}
			return nil
		})
		waits <- s.sync(context.Background())
		for range maxLists {
			<-s.lists
		}
	}()
	ended := make(chan error, 1)
	go func() { ended <- s.close() }()
	select {
	case err := <-ended:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("the close does not end")
	}
	wantIs(t, "sync beside the close", <-waits, ErrClosed)
	wantIs(t, "sync after it", s.sync(t.Context()), ErrClosed)
	_, err = s.begin()
	wantIs(t, "begin after it", err, ErrClosed)
}

// A close does not wait for a flush that takes too long: what the file lacks is in the log, the error says so, and the file is as it was.
func TestCloseBeforeTheFlushIsDone(t *testing.T) {
	for _, rows := range []int{1, 100} { // so many keys by 100 changes: the time ends among the changes, or among the rows, without a history
		s := newTestStore(t, testBudget)
		if rows == 1 {
			s = newHistoryStore(t, 1000)
		}
		fill(t, s, 10, 10)
		tx, err := s.begin()
		must(t, err)
		for n := range 100 {
			setTx(t, tx, fmt.Sprint("new", n%rows), nil)
		}
		tx.endChanges()
		tx.commit()
		s.endSoon(-time.Second)
		wantIs(t, "close", s.close(), errLate)
		must(t, s.close())
		if _, err := checkFile(s.path); err != nil {
			t.Error(err)
		}
		if n := strings.TrimSpace(sqlite3(t, s.path, "SELECT count(*) FROM kv")); n != "10" {
			t.Errorf("%s rows", n)
		}
	}
	m := newMember(t, "")
	s := m.start()
	m.stop()
	if s.store.pace.end.Load() == 0 {
		t.Error("Close lets a flush take as long as it takes")
	}
}

// A flush that has failed is tried again, though nothing more is committed.
func TestFlushIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t, testBudget)
		put(t, s, "k", "v")
		limit := func(pages int) {
			s.fileMu.Lock()
			defer s.fileMu.Unlock()
			must(t, s.writer.pragma(fmt.Sprint("max_page_count=", pages)))
		}
		limit(12)
		keepUp(t, s)
		commitOnly(t, s, "large", strings.Repeat("v", 1<<20))
		time.Sleep(2 * flushAgain)
		if !s.isStuck() {
			t.Fatal("it is written")
		}
		limit(1 << 30)
		time.Sleep(2 * flushAgain)
		if s.isStuck() || s.filedUpTo() != s.commits {
			t.Error("it is not written")
		}
	})
}

// Whoever waits for the file when nobody flushes it any more does that himself, or is told that it is closed.
func TestWaitersAtTheEndOfTheFlusher(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []chan struct{}{s.dirty, s.press} {
		select {
		case <-c:
		default:
		}
	}
	turned := s.turned
	s.flushWhenDue(ctx)
	if s.flusher || !isClosed(turned) {
		t.Error("whoever has seen the flusher waits for it")
	}
	s.flusher = true // it is about to look whether there is something to do
	must(t, s.writer.pragma("busy_timeout=50"))
	c, err := openConn(s.path, "mode=rw")
	must(t, err)
	defer c.close()
	must(t, c.exec(qBegin)) // so that nothing of what follows gets into the file
	commitOnly(t, s, "k", "1")
	waits := make(chan error, 1)
	go func() { waits <- s.sync(context.Background()) }()
	must(t, s.close())
	select {
	case err := <-waits:
		wantIs(t, "sync", err, ErrClosed)
	case <-time.After(patience):
		t.Error("it waits still")
	}
}

// What somebody else commits after the flush has asked for it, and before the witness is shown the flush, is no part of that.
func TestForeignCommitBesideTheWitness(t *testing.T) {
	s := newTestStore(t, -1)
	put(t, s, "k", "1")
	shell(t, s.path, "UPDATE kv SET value = 2")
	wantIs(t, "showWitness", s.showWitness(), errForeign)
	if same, err := s.asWeLeftIt(); same || err != nil {
		t.Error("the foreign row is taken for ours:", err)
	}
}

// The room of a tail that is written holds none of its values.
func TestRoomIsEmpty(t *testing.T) {
	list := []tailRow{{keyed: keyed{key: "k", item: &item{}}}, {fresh: true}}
	if room := roomOf(list); len(room) != 0 || cap(room) != 2 || room[:2][0] != (tailRow{}) || room[:2][1] != (tailRow{}) {
		t.Errorf("%v", room[:cap(room)])
	}
	if roomOf(make([]tailRow, keptRoom+1)) != nil {
		t.Error("it is kept, whatever it takes")
	}
}

// BenchmarkFlush is what a changed row costs when it gets into the file, with the change in the history, by how many of how many
// keys fall together.
func BenchmarkFlush(b *testing.B) {
	key := func(i int) string { return fmt.Sprintf("bench/key/%014d", i) }
	change := func(b *testing.B, s *store, rows int, value string, next func(i int) string) {
		tx, err := s.begin()
		must(b, err)
		for i := range rows {
			setTx(b, tx, next(i), []byte(strings.Repeat(value, 256)))
		}
		tx.endChanges()
		tx.commit()
	}
	measure := func(b *testing.B, s *store, rows int, next func(i int) string) {
		b.ResetTimer()
		for range b.N {
			b.StopTimer()
			change(b, s, rows, "w", next)
			b.StartTimer()
			must(b, s.flush())
		}
		b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*rows), "µs/row")
	}
	for _, keys := range []int{1_000, 10_000, 100_000} {
		for _, rows := range []int{1, 64, 1_000, 10_000} {
			if rows > keys {
				continue
			}
			b.Run(fmt.Sprintf("keys=%d/rows=%d", keys, rows), func(b *testing.B) {
				s := newHistoryStore(b, 10_000)
				change(b, s, keys, "v", key)
				must(b, s.flush())
				measure(b, s, rows, func(int) string { return key(rand.IntN(keys)) })
			})
		}
	}
	b.Run("new/rows=10000", func(b *testing.B) {
		n := 0
		measure(b, newHistoryStore(b, 10_000), 10_000, func(int) string { n++; return key(n) })
	})
}

// What is committed while a flush writes is not in the file after it.
func TestCommitDuringAFlush(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, testBudget)
	commit := func(key string) {
		tx, err := s.begin()
		must(t, err)
		tx.meta.applied++
		must(t, tx.set(key, row{value: key, version: 1}))
		tx.commit()
	}
	commit("before")
	s.lockFile()
	err := s.writeTail(func(tail *tail) error {
		commit("meanwhile")
		return s.transact(func(m *meta, own map[ownKey]uint64) error { return s.putTail(tail, m, own) })
	})
	s.fileMu.Unlock()
	must(t, err)
	in := func(key string) (it *item) {
		must(t, s.read(func(c *conn) (err error) {
			it, err = c.get(key)
			return err
		}))
		return it
	}
	if in("before") == nil || in("meanwhile") != nil {
		t.Fatalf("the file has %v and %v", in("before"), in("meanwhile"))
	}
	must(t, s.sync(t.Context())) // as Query, List and Backup do
	if in("meanwhile") == nil {
		t.Error("a reader who waits for the file does not see what was committed before")
	}
}

// What a flush could not write and what has come since are written together: the private rows too.
func TestTailsTogether(t *testing.T) {
	key := func(id uint64) ownKey { return ownKey{table: 's', id: id} }
	old := tail{own: map[ownKey]ownPut{key(1): nil, key(2): nil}, meta: &meta{applied: 1}}
	both := func() (uint64, query, []driver.Value) { return 7, qPut, nil }
	newer := tail{own: map[ownKey]ownPut{key(2): both, key(3): both}, meta: &meta{applied: 2}}
	w := old.before(newer)
	if len(w.own) != 3 || w.own[key(1)] != nil || w.own[key(2)] == nil || w.own[key(3)] == nil || w.meta.applied != 2 {
		t.Errorf("%d private rows at %d", len(w.own), w.meta.applied)
	}
}
