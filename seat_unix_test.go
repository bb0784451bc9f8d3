//go:build unix

package quorate

import (
	"bytes"
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// unguard takes away the second kind of lock, so that there is something to mend.
func (s *store) unguard() {
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	s.guard.unlock()
}

// loseLocks does what a program does that reads snap once and serves it once, and then a shell that reads and closes it.
func (m *testMember) loseLocks(t *testing.T) {
	t.Helper()
	_, err := os.ReadFile(m.snap())
	must(t, err)
	served := httptest.NewRecorder()
	http.ServeFile(served, httptest.NewRequest(http.MethodGet, "/snap", nil), m.snap())
	if served.Code != http.StatusOK || served.Body.Len() == 0 {
		t.Fatalf("status %d, %d bytes", served.Code, served.Body.Len())
	}
	sqlite3(t, m.snap(), "select count(*) from kv")
}

// The program opens and closes snap; on Linux that costs nothing, and elsewhere, as without the second lock, it is mended.
func TestProgramOpensItsSnap(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	s := m.start()
	n := 0
	write := func() {
		t.Helper()
		for range 20 {
			must(t, s.Set(ctxFor(t, patience), fmt.Sprintf("k%03d", n), make([]byte, 3000)))
			n++
		}
	}
	count := func(got, want string) {
		t.Helper()
		if strings.TrimSpace(got) != want {
			t.Errorf("%s rows, want %s", got, want)
		}
	}
	whole := func() {
		t.Helper()
		rows, err := s.Query(ctxFor(t, patience), "SELECT count(*) FROM kv")
		must(t, err)
		defer rows.Close()
		var got int
		rows.Next()
		must(t, rows.Scan(&got))
		count(fmt.Sprint(got), fmt.Sprint(n))
		count(sqlite3(t, "-readonly", m.snap(), "select count(*) from kv"), fmt.Sprint(n))
		backup := filepath.Join(t.TempDir(), "backup")
		f, err := os.Create(backup)
		must(t, err)
		_, err = s.Backup(ctxFor(t, patience), f)
		must(t, errors.Join(err, f.Close()))
		count(sqlite3(t, backup, "select count(*) from kv"), fmt.Sprint(n))
	}
	write()
	whole()
	g, err := guardLocks(m.snap())
	g.close() // at once: while it held its locks no shell would take itself for the last user
	if err == nil && s.store.guard != nil {
		m.loseLocks(t)
		must(t, s.store.names.hold())
		write()
		whole()
		if s.store.seat.Load() != 0 {
			t.Error("there was something to mend")
		}
	}
	for _, lose := range []func(){
		func() { s.store.unguard(); m.loseLocks(t) },
		func() { must(t, os.Remove(m.snap()+"-wal")) },
		func() { must(t, os.Remove(m.snap()+"-shm")) },
		func() { s.store.unguard(); m.loseLocks(t); sqlite3(t, "-readonly", m.snap(), "select 1") },
	} {
		before := s.store.seat.Load()
		begun, err := s.store.copy(t.Context()) // sees its moment to the end
		must(t, err)
		at := n
		lose()
		write()
		whole()
		eventually(t, patience, "mended", func() error {
			if s.store.seat.Load() == before {
				return errors.New("no")
			}
			return s.Err()
		})
		must(t, s.Ready(ctxFor(t, patience)))
		whole()
		old := filepath.Join(t.TempDir(), "old")
		_, err = receive(old, begun)
		must(t, errors.Join(err, begun.Close()))
		count(sqlite3(t, old, "select count(*) from kv"), fmt.Sprint(at))
		must(t, s.store.names.hold())
	}
	s.store.unguard()
	m.loseLocks(t)
	write()
	m.stop() // at once
	if _, err := checkFile(m.snap()); err != nil {
		t.Error(err)
	}
	s = m.start()
	whole()
}

// Nothing is cut from the log while the file has lost a name, and a foreign write in between is no part of the state.
func TestNoBarrierWithoutNames(t *testing.T) {
	s := newTestStore(t, testBudget)
	keepUp(t, s)
	fill(t, s, 100, 100)
	must(t, s.barrier())
	must(t, os.Remove(s.path+"-wal"))
	for _, f := range []func() error{s.barrier, s.calmBarrier} {
		if err := f(); !errors.Is(err, errUnseated) {
			t.Error(err)
		}
	}
	if err := s.sync(ctxFor(t, 50*time.Millisecond)); !errors.Is(err, errUnseated) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	var c *conn
	if err := s.checkpointOnce(&c); err != nil || c != nil {
		t.Error("a checkpoint", err)
	}
	must(t, os.Remove(s.path+"-shm"))
	sqlite3(t, s.path, "UPDATE kv SET value = 'x' WHERE key = 'key/0000001'; PRAGMA wal_checkpoint(TRUNCATE)")
	before, err := os.Stat(s.path)
	must(t, err)
	if err := s.reseat(); !errors.Is(err, ErrCorrupt) && err != nil {
		t.Fatal(err)
	} else if err != nil { // it has met the foreign page
		now, err := os.Stat(s.path)
		must(t, err)
		if !os.SameFile(before, now) {
			t.Error("a copy that is wrong was put in place")
		}
	} else {
		if it, err := s.writer.get("key/0000001"); err != nil || it == nil || it.value == "x" {
			t.Error("it is part of the state:", it, err)
		}
	}
	must(t, os.Remove(s.path))
	if err := s.reseat(); !errors.Is(err, errGone) {
		t.Error(err)
	}
}

// A member of several is mended as a lone one is.
func TestMendedFollower(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	for i := range 20 {
		must(t, c[0].s.Set(ctxFor(t, patience), fmt.Sprint("k", i), make([]byte, 3000)))
	}
	c.awaitEqual(t)
	m := c.follower(t)
	before := m.s.store.seat.Load()
	m.s.store.unguard()
	m.loseLocks(t)
	eventually(t, patience, "mended", func() error {
		if m.s.store.seat.Load() == before {
			return errors.New("no")
		}
		return m.s.Err()
	})
	must(t, c[0].s.Set(ctxFor(t, patience), "after", nil))
	c.awaitEqual(t)
	m.stop()
	if _, err := checkFile(m.snap()); err != nil {
		t.Error(err)
	}
}

const seatEnv = "QUORATE_TEST_SEAT"

// A process that is killed between any two steps of the mending leaves a directory that opens with all that was acknowledged.
func TestKilledWhileMending(t *testing.T) {
	if env := os.Getenv(seatEnv); env != "" {
		killedWhileMending(t, env)
		return
	}
	t.Parallel()
	for _, step := range []string{"copied", "named", "placed", "sides"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(quickDir(t), "data")
			cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWhileMending$", "-test.v")
			cmd.Env = append(os.Environ(), seatEnv+"="+step+" "+dir)
			said, err := cmd.CombinedOutput()
			if err == nil || !bytes.Contains(said, []byte("killed at")) {
				t.Fatalf("%v: %s", err, said)
			}
			s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
			must(t, err)
			defer s.Close()
			must(t, s.verified(t.Context()))
			for i := range 60 {
				if v, err := s.Get(ctxFor(t, patience), fmt.Sprint("k", i)); len(v) != 3000 || err != nil {
					t.Fatal(i, len(v), err)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "snap.*")); len(left) > 0 {
				t.Error("left behind:", left)
			}
			must(t, s.store.names.hold())
		})
	}
}

func killedWhileMending(t *testing.T, env string) {
	at, dir, _ := strings.Cut(env, " ")
	m := newMember(t, "")
	m.conf.Dir = dir
	s, err := Open(t.Context(), m.conf)
	must(t, err)
	set := func(from, to int) {
		for i := from; i < to; i++ {
			must(t, s.Set(t.Context(), fmt.Sprint("k", i), make([]byte, 3000)))
		}
	}
	set(0, 30)
	must(t, cutLog(s, 0))
	set(30, 60)
	s.store.fileMu.Lock()
	s.store.step = func(step string) {
		if step != at && !(at == "sides" && step == "named") {
			return
		}
		if at == "sides" { // placeMended ends after its first step
			os.Remove(s.store.path + "-shm")
			os.Remove(s.store.path + "-wal")
		}
		fmt.Println("killed at", step)
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	s.store.fileMu.Unlock()
	must(t, os.Remove(filepath.Join(dir, "snap-shm"))) // its WAL is there, and older than the copy
	<-t.Context().Done()
}

// While the copy is being placed nobody opens what is there by name: who reads waits, and sees everything.
func TestReadersWaitForThePlacing(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	s := m.start()
	for i := range 40 {
		must(t, s.Set(ctxFor(t, patience), fmt.Sprint("k", i), make([]byte, 3000)))
	}
	backup := filepath.Join(t.TempDir(), "backup")
	read := map[string]func() error{
		"query": func() error {
			rows, err := s.Query(ctxFor(t, patience), "SELECT count(*) FROM kv")
			if err != nil {
				return err
			}
			defer rows.Close()
			var n int
			if rows.Next(); rows.Scan(&n) != nil || n != 40 {
				return fmt.Errorf("%d rows, %v", n, rows.Err())
			}
			return nil
		},
		"backup": func() error {
			f, err := os.Create(backup)
			must(t, err)
			_, err = s.Backup(ctxFor(t, patience), f)
			return errors.Join(err, f.Close())
		},
	}
	ended := make(chan string, 2*len(read))
	s.store.fileMu.Lock()
	s.store.step = func(step string) {
		if step == "copied" {
			return
		}
		if c, err := s.store.openReader(); !errors.Is(err, errUnseated) {
			t.Error(step, "a reader was opened:", c, err)
		}
		if step != "named" {
			return
		}
		for what, f := range read {
			go func() { ended <- fmt.Sprint(what, ": ", f()) }()
		}
		select {
		case what := <-ended:
			t.Error("it did not wait:", what)
		case <-time.After(100 * time.Millisecond):
		}
	}
	s.store.fileMu.Unlock()
	must(t, os.Remove(m.snap()+"-wal"))
	for range read {
		if what := <-ended; !strings.HasSuffix(what, ": <nil>") {
			t.Error(what)
		}
	}
	if got := strings.TrimSpace(sqlite3(t, backup, "select count(*) from kv")); got != "40" {
		t.Errorf("the backup has %s rows", got)
	}
}

// A placing that fails half-way leaves the copy, to Open or to the next attempt, and nothing counts as durable until then.
func TestPlacingFails(t *testing.T) {
	s := newTestStore(t, testBudget)
	fill(t, s, 100, 100)
	must(t, s.barrier())
	var c *conn // of the checkpoints
	must(t, s.checkpointOnce(&c))
	old := c
	defer func() { c.close() }()
	must(t, os.Remove(s.path+"-shm"))
	must(t, os.Mkdir(s.path+"-shm", 0o700))
	must(t, os.Mkdir(filepath.Join(s.path+"-shm", "full"), 0o700))
	if err := s.reseat(); err == nil {
		t.Fatal("it was placed over a directory that is not empty")
	}
	if _, err := checkFile(mended(s.path)); err != nil {
		t.Error("the copy:", err)
	}
	if err := s.barrier(); !errors.Is(err, errUnseated) {
		t.Error(err)
	}
	must(t, os.RemoveAll(s.path+"-shm"))
	must(t, s.reseat())
	must(t, s.barrier())
	must(t, s.names.hold())
	if must(t, s.checkpointOnce(&c)); c == old || c.seat != s.seat.Load() {
		t.Error("the checkpoints are those of the old file")
	}
	must(t, os.Remove(s.path+"-shm"))
	s.step = func(step string) {
		if step == "placed" {
			must(t, os.WriteFile(s.path, make([]byte, 2*pageSize), 0o600))
		}
	}
	if err := s.reseat(); sqliteCode(err) != sqliteNotADB {
		t.Error(err)
	}
	if err := s.sync(ctxFor(t, time.Second)); err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "restart") {
		t.Error("a reader waits for what never comes:", err)
	}
}

// A shell that was about to remove snap-shm and snap-wal of the old file is slow, and removes those of the new one while it is opened.
func TestShellThatRemovesTheNewWAL(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"writer", "witness"} {
		for _, sides := range [][]string{{"-wal"}, {"-shm"}, {"-shm", "-wal"}} {
			t.Run(fmt.Sprint(at, sides), func(t *testing.T) {
				t.Parallel()
				s := newTestStore(t, testBudget)
				fill(t, s, 10, 100)
				must(t, os.Remove(s.path+"-wal"))
				removed := false
				s.step = func(step string) {
					if step != at || removed {
						return
					}
					removed = true
					for _, side := range sides {
						must(t, os.Remove(s.path+side))
					}
				}
				must(t, s.reseat())
				for range 2 { // what this store writes is seen by who opens it by its names
					apply(t, s, func(tx *storeTx) { setTx(t, tx, "after", nil) })
					must(t, s.barrier())
					if n := strings.TrimSpace(sqlite3(t, "-readonly", s.path, "SELECT count(*) FROM kv")); n != "11" {
						t.Errorf("%s rows", n)
					}
				}
				must(t, s.names.hold())
			})
		}
	}
}

// A foreign write beside the lost names is still there after the mending, for the rebuild to find.
func TestMendedBesideAForeignWrite(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, testBudget)
	fill(t, s, 100, 100)
	must(t, s.barrier())
	sqlite3(t, s.path, "CREATE TABLE x(a); DROP TABLE x")
	if changed, err := s.foreign(); !changed || err != nil {
		t.Fatal(changed, err)
	}
	must(t, os.Remove(s.path+"-shm"))
	must(t, s.reseat())
	must(t, s.names.hold())
	if err := s.failed.Load(); err != nil {
		t.Errorf("nothing is written any more: %v", *err)
	}
	is(t, s.barrier(), errForeign)
}

// Close ends within its limits while the file that was put in place can't be opened.
func TestCloseWhileReconnecting(t *testing.T) {
	t.Parallel()
	for what, spoil := range map[string]func(m *testMember){
		"the directory is gone": func(m *testMember) { os.RemoveAll(m.conf.Dir) },
		"it can't be opened": func(m *testMember) {
			os.Mkdir(m.snap()+"-wal", 0o700)
			os.Mkdir(filepath.Join(m.snap()+"-wal", "full"), 0o700)
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			m := newMember(t, "")
			m.conf.Dir = filepath.Join(t.TempDir(), "data")
			s, err := Open(t.Context(), m.conf)
			must(t, err)
			must(t, s.Set(ctxFor(t, patience), "k", make([]byte, 3000)))
			placed := make(chan struct{})
			s.store.fileMu.Lock()
			s.store.step = func(step string) {
				if step == "placed" {
					spoil(m)
					close(placed)
				}
			}
			s.store.fileMu.Unlock()
			must(t, os.Remove(m.snap()+"-wal"))
			<-placed
			began := time.Now()
			s.Close()
			if d := time.Since(began); d > 4*time.Second {
				t.Errorf("Close took %v", d)
			}
			must(t, s.lock.unlock()) // or it would be held still
			if !s.store.closed {
				t.Error("the store is not closed")
			}
		})
	}
}

// What somebody has put into the snap of a member that is down never runs at our writes.
func TestTriggerInAClosedSnap(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	n := 0
	restart := func() *Service {
		t.Helper()
		s := m.start()
		for i := range n {
			if v, err := s.Get(ctxFor(t, patience), fmt.Sprint("k", i)); len(v) != 100 || err != nil {
				t.Fatal(i, len(v), err)
			}
		}
		for range 20 {
			must(t, s.Set(ctxFor(t, patience), fmt.Sprint("k", n), make([]byte, 100)))
			n++
		}
		must(t, s.Set(ctxFor(t, patience), "k0", make([]byte, 100)))
		must(t, s.store.sync(ctxFor(t, patience)))
		must(t, s.verified(t.Context()))
		return s
	}
	restart()
	m.stop()
	sqlite3(t, m.snap(), `CREATE TRIGGER "a""b" AFTER INSERT ON kv BEGIN DELETE FROM kv WHERE key <> new.key; END;
		CREATE TRIGGER meta AFTER UPDATE ON quorate_meta BEGIN DELETE FROM kv; END; CREATE TABLE theirs(x); CREATE VIEW look AS SELECT 1`)
	for range 3 {
		restart()
		if got := strings.TrimSpace(sqlite3(t, "-readonly", m.snap(), "SELECT count(*) FROM sqlite_schema WHERE type = 'trigger'")); got != "0" {
			t.Errorf("%s triggers are left", got)
		}
		m.stop()
		if _, err := checkFileOf(m.snap(), true); err != nil {
			t.Error(err)
		}
	}
	for _, c := range [][2]string{
		{"CREATE VIEW quorate_next AS SELECT 1", "DROP VIEW quorate_next"},
		{"CREATE TRIGGER t AFTER UPDATE ON kv BEGIN DELETE FROM kv; END; UPDATE kv SET version = version WHERE key = 'k1'", ""},
	} {
		sqlite3(t, m.snap(), c[0])
		before, err := os.ReadFile(m.snap())
		must(t, err)
		s, err := Open(t.Context(), m.conf)
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "DROP ") {
			t.Fatalf("%s: %v", c[0], err)
		}
		if after, _ := os.ReadFile(m.snap()); !bytes.Equal(before, after) {
			t.Error("it was changed")
		}
		if c[1] != "" {
			sqlite3(t, m.snap(), c[1])
		}
	}
}

// incomingFor is a received state, ahead of that of s by rows of 1,000 bytes, as it lies beside snap before it is installed.
func incomingFor(t *testing.T, s *store, rows int) (path string, m meta) {
	t.Helper()
	leader := newTestStore(t, testBudget)
	apply(t, leader, func(tx *storeTx) {
		for i := range rows {
			setTx(t, tx, fmt.Sprintf("new/%d", i), make([]byte, 1000))
		}
		tx.meta.applied, tx.meta.term = s.meta().applied+100, 3
	})
	c, err := leader.copy(t.Context())
	must(t, err)
	defer c.Close()
	path = s.path + ".incoming"
	m, err = receive(path, c)
	must(t, err)
	return path, m
}

// keepsOpen are the files without a name that this process has open, of those that were called path.
func keepsOpen(path string) (list []string) {
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		if name, _ := os.Readlink(fd); strings.HasPrefix(name, path) && strings.HasSuffix(name, " (deleted)") {
			list = append(list, name)
		}
	}
	return list
}

// Where the disk has no room for a copy through snap-wal, a received state takes the place of snap: who reads the old one reads it to its
// end, who comes later sees the new one, nothing is taken for a loss of names, and the space of the old one is given back.
func TestReceivedStateTakesThePlace(t *testing.T) {
	t.Parallel()
	for what, tight := range map[string]func(s *store){
		"the file system says so": func(s *store) {
			disk := new(fakeDisk)
			disk.free.Store(65 << 20)
			s.space = disk.space
		},
		"a quota, which nothing tells of": func(s *store) {
			pages, err := s.writer.one(qPageCount)
			must(t, err)
			must(t, s.writer.pragma(fmt.Sprint("max_page_count=", pages+50)))
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newTestStore(t, testBudget)
			s.uneasy = func(err error) { t.Error("a fault:", err) }
			keepUp(t, s)
			for i := range 50 {
				put(t, s, fmt.Sprintf("old/%d", i), "old")
			}
			must(t, s.sync(t.Context()))
			path, m := incomingFor(t, s, 2000)
			must(t, os.Chmod(s.path, 0o640))
			tight(s)
			s.queries.time = 10 * patience
			running, err := s.queries.query(t.Context(), t.Context(), "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT x, (SELECT count(*) FROM kv) FROM n", nil)
			must(t, err)
			defer running.Close()
			begun, err := s.copy(t.Context())
			must(t, err)
			defer begun.Close()
			outside, err := openConn(s.path, "mode=ro")
			must(t, err)
			defer outside.close()
			must(t, outside.exec(qBeginRead))
			count := func(c *conn) (n int) {
				t.Helper()
				must(t, c.each(qScan, nil, func([]driver.Value) error { n++; return nil }))
				return n
			}
			count(outside)
			must(t, s.read(func(c *conn) error { count(c); return nil })) // and is idle then
			var watching sync.WaitGroup
			placed := make(chan struct{})
			watching.Go(func() { // as health.go does
				for !isClosed(placed) {
					for path, err := range s.names.look() {
						t.Error(path, err)
					}
				}
			})
			before := s.walSize()
			err = s.install(path, m.applied, 9, []byte("ours"), 5)
			close(placed)
			watching.Wait()
			must(t, err)
			if grown := s.walSize() - before; s.seat.Load() != 1 || grown > 1<<20 {
				t.Fatalf("snap was put in place %d times, and snap-wal has grown by %d bytes", s.seat.Load(), grown)
			}
			if m := s.meta(); m.applied < 100 || m.installed != m.applied || m.term != 9 || string(m.config) != "ours" || m.configIndex != 5 {
				t.Errorf("meta %+v", m)
			}
			must(t, s.names.hold())
			must(t, s.seated())
			// One proves that the file is open under its names, and two are of the barrier, which must change a byte.
			if is := s.inFile.Load().barrier; is < m.barrier+3 {
				t.Errorf("barrier %d after %d", is, m.barrier)
			}
			if f, err := s.foreign(); f || err != nil {
				t.Error("foreign:", f, err)
			}
			info, err := os.Stat(s.path)
			must(t, err)
			if info.Mode().Perm() != 0o640 {
				t.Errorf("its mode is %v", info.Mode())
			}
			waitVerified(t, s)
			put(t, s, "after", "x")
			must(t, s.sync(t.Context()))
			for range 2 * cap(s.readers) {
				must(t, s.read(func(c *conn) error {
					if n := count(c); n != 2001 {
						t.Errorf("a reader sees %d rows", n)
					}
					return nil
				}))
			}
			if n := strings.TrimSpace(sqlite3(t, "-readonly", s.path, "SELECT count(*) FROM kv")); n != "2001" {
				t.Errorf("a shell sees %s rows", n)
			}
			// What began before sees its moment to the end.
			if n := count(outside); n != 50 {
				t.Errorf("a transaction from before sees %d rows", n)
			}
			for range 3000 {
				var x, n int
				if !running.Next() || running.Scan(&x, &n) != nil || n != 50 {
					t.Fatal("a query from before:", x, n, running.Err())
				}
			}
			old := filepath.Join(t.TempDir(), "old")
			_, err = receive(old, begun)
			must(t, err)
			if n := strings.TrimSpace(sqlite3(t, old, "SELECT count(*) FROM kv")); n != "50" {
				t.Errorf("a copy from before has %s rows", n)
			}
			must(t, errors.Join(running.Close(), begun.Close(), outside.close()))
			eventually(t, patience, "the old file is closed", func() error {
				if list := keepsOpen(s.path); len(list) > 0 {
					return fmt.Errorf("%q", list)
				}
				return nil
			})
			must(t, s.barrier())
			must(t, s.close())
			if m, err := checkFile(s.path); err != nil || m.installed == 0 {
				t.Error(m, err)
			}
			if left, _ := filepath.Glob(s.path + "*"); len(left) != 1 {
				t.Error("left:", left)
			}
		})
	}
}

const placeEnv = "QUORATE_TEST_PLACE"

// A process that is killed between any two steps of the placing of a received state leaves a directory with the old state or the new one,
// each whole and with a log that goes on from it.
func TestKilledWhilePlacing(t *testing.T) {
	if env := os.Getenv(placeEnv); env != "" {
		killedWhilePlacing(t, env)
		return
	}
	t.Parallel()
	for step, want := range map[string]int{"synced": 30, "named": 60, "sides": 60, "placed": 60, "installed": 60} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(quickDir(t), "data")
			cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWhilePlacing$", "-test.v")
			cmd.Env = append(os.Environ(), placeEnv+"="+step+" "+dir)
			said, err := cmd.CombinedOutput()
			if err == nil || !bytes.Contains(said, []byte("killed at "+step)) {
				t.Fatalf("%v: %s", err, said)
			}
			for range 2 {
				s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
				must(t, err)
				must(t, s.verified(t.Context()))
				n, err := s.Get(ctxFor(t, patience), "n")
				for i := range want {
					if v, err := s.Get(ctxFor(t, patience), fmt.Sprint("k", i)); len(v) != 3000 || err != nil {
						t.Fatal(i, len(v), err)
					}
				}
				if err != nil || string(n) != fmt.Sprint(want) {
					t.Errorf("%q rows, want %d: %v", n, want, err)
				}
				must(t, s.Set(ctxFor(t, patience), "after", nil))
				if left, _ := filepath.Glob(filepath.Join(dir, "snap.*")); len(left) > 0 {
					t.Error("left behind:", left)
				}
				must(t, s.store.names.hold())
				must(t, s.Close())
			}
		})
	}
}

func killedWhilePlacing(t *testing.T, env string) {
	at, dir, _ := strings.Cut(env, " ")
	m := newMember(t, "")
	set := func(s *Service, from, to int) {
		for i := from; i < to; i++ {
			must(t, s.Set(t.Context(), fmt.Sprint("k", i), make([]byte, 3000)))
		}
		must(t, s.Set(t.Context(), "n", []byte(fmt.Sprint(to))))
	}
	set(m.start(), 0, 30)
	m.stop()
	must(t, os.CopyFS(dir, os.DirFS(m.conf.Dir)))
	ahead := m.start()
	set(ahead, 30, 60)
	c, err := ahead.store.copy(t.Context())
	must(t, err)
	disk := new(fakeDisk)
	disk.free.Store(1 << 20)
	behind := m.conf
	behind.Dir, behind.space = dir, disk.space
	s, err := Open(t.Context(), behind)
	must(t, err)
	path := filepath.Join(dir, "snap.incoming")
	in, err := receive(path, c)
	must(t, err)
	kill := func() {
		fmt.Println("killed at", at)
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	s.store.fileMu.Lock()
	s.store.step = func(step string) {
		if step == at {
			kill()
		}
		if at == "sides" && step == "named" { // placeMended ends after its first step
			must(t, errors.Join(os.Remove(s.store.path+"-shm"), os.Remove(s.store.path+"-wal")))
			kill()
		}
	}
	s.store.fileMu.Unlock()
	s.fsm.mu.Lock()
	must(t, s.store.install(path, in.applied, in.term, in.config, in.configIndex))
	if at == "installed" {
		kill()
	}
}

// A placing that fails half-way leaves the member with the state that it had, which is mended as any other that has lost its names.
func TestReceivedStateIsNotPlaced(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	disk := new(fakeDisk)
	disk.free.Store(1 << 39)
	m.conf.space = disk.space
	s := m.start()
	for i := range 20 {
		must(t, s.Set(ctxFor(t, patience), fmt.Sprint("k", i), make([]byte, 3000)))
	}
	must(t, s.store.sync(t.Context()))
	path, in := incomingFor(t, s.store, 10)
	shm := s.store.path + "-shm"
	disk.free.Store(1 << 20)
	s.store.fileMu.Lock()
	s.store.step = func(step string) {
		if step == "named" { // the WAL's index can't be removed
			os.Remove(shm)
			must(t, os.MkdirAll(filepath.Join(shm, "full"), 0o700))
		}
	}
	s.store.fileMu.Unlock()
	s.fsm.mu.Lock()
	err := s.fsm.installLocked(&incoming{path: path, meta: in})
	s.fsm.mu.Unlock()
	disk.free.Store(1 << 39)
	is(t, err, errUnseated)
	eventually(t, patience, "a fault", func() error {
		if s.Err() == nil {
			return errors.New("none")
		}
		return nil
	})
	if err := s.Err(); strings.Contains(fmt.Sprint(err), "program") {
		t.Errorf("Err blames a program: %v", err)
	}
	if err := s.store.barrier(); !errors.Is(err, errUnseated) {
		t.Error(err)
	}
	s.store.fileMu.Lock()
	s.store.step = func(string) {}
	s.store.fileMu.Unlock()
	must(t, os.RemoveAll(shm))
	eventually(t, patience, "mended", s.Err)
	must(t, s.Set(ctxFor(t, patience), "after", nil))
	m.stop()
	s = m.start()
	for i := range 20 {
		if v, err := s.Get(ctxFor(t, patience), fmt.Sprint("k", i)); len(v) != 3000 || err != nil {
			t.Fatal(i, len(v), err)
		}
	}
}

// A placing that can't begin changes nothing: the second name can't be given, or the disk has failed before.
func TestPlacingThatDoesNotBegin(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, testBudget)
	fill(t, s, 100, 100)
	disk := new(fakeDisk)
	disk.free.Store(1 << 20)
	s.space = disk.space
	before := s.meta()
	taken := filepath.Join(mended(s.path), "by somebody")
	must(t, os.MkdirAll(taken, 0o700))
	path, m := incomingFor(t, s, 10)
	if err := s.install(path, m.applied, 9, nil, 0); err == nil || errors.Is(err, errUnseated) {
		t.Error(err)
	}
	must(t, s.seated())
	must(t, s.barrier())
	must(t, os.RemoveAll(mended(s.path)))
	failed := error(syscall.EIO)
	s.failed.Store(&failed)
	is(t, s.install(path, m.applied, 9, nil, 0), syscall.EIO)
	s.failed.Store(nil)
	if now := s.meta(); s.seat.Load() != 0 || now.applied != before.applied || now.installed != before.installed {
		t.Errorf("the state was replaced by %+v", now)
	}
	must(t, s.barrier())
}

// spoilCopies damages every copy that a mending makes as long as damaged says so: it is what it would be if somebody had written to what the
// writer has open.
func (m *testMember) spoilCopies(t *testing.T, damaged func() bool) {
	m.s.store.fileMu.Lock()
	defer m.s.store.fileMu.Unlock()
	path := m.s.store.path + ".rebuild"
	m.s.store.step = func(step string) {
		if step != "copied" || !damaged() {
			return
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(make([]byte, 2*pageSize), 2*pageSize)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// unseatedLeader is a cluster of three whose leader has lost a name of its snap, and can't make a whole copy of what it has open as long as
// damaged says so.
func unseatedLeader(t *testing.T, damaged func(l *Service) bool, before func(c testCluster, l *testMember), change ...func(*Config)) (c testCluster, l *testMember) {
	t.Helper()
	c = newCluster(t, 3, change...)
	for i := range 20 {
		must(t, c[0].s.Set(ctxFor(t, patience), fmt.Sprint("k", i), make([]byte, 3000)))
	}
	c.awaitEqual(t)
	l = c.leader(t)
	before(c, l)
	s := l.s
	l.spoilCopies(t, func() bool { return damaged(s) })
	s.store.unguard()
	l.loseLocks(t)
	return c, l
}

// seatedAgain waits until the member is well, and all is as if nothing had been.
func (c testCluster) seatedAgain(t *testing.T, l *testMember) {
	t.Helper()
	eventually(t, patience, "well", func() error {
		if l.s.store.seat.Load() == 0 {
			return errors.New("it is not in place")
		}
		return l.s.Err()
	})
	must(t, l.s.Ready(ctxFor(t, patience)))
	must(t, l.s.store.names.hold())
	for _, m := range c {
		must(t, m.s.Set(ctxFor(t, patience), "after", []byte(m.conf.Addr)))
	}
	c.awaitEqual(t)
	l.stop()
	if _, err := checkFile(l.snap()); err != nil {
		t.Error(err)
	}
}

// A leader is mended as it leads; where the copy is not what was written it hands over, and gets the state from the next leader.
func TestUnseatedLeader(t *testing.T) {
	t.Parallel()
	nothing := func(testCluster, *testMember) {}
	t.Run("mended", func(t *testing.T) {
		t.Parallel()
		c, l := unseatedLeader(t, func(*Service) bool { return false }, nothing)
		c.seatedAgain(t, l)
	})
	t.Run("the copy is wrong", func(t *testing.T) {
		t.Parallel()
		c, l := unseatedLeader(t, func(s *Service) bool { return s.raft.Load().State() == raft.Leader }, nothing)
		next := c.leaderOtherThan(t, l)
		must(t, next.s.Set(ctxFor(t, patience), "meanwhile", nil))
		c.seatedAgain(t, l)
	})
	t.Run("and nobody is fit to lead", func(t *testing.T) { // then a copy that is right later is enough
		t.Parallel()
		var damaged atomic.Bool
		damaged.Store(true)
		disks := make(map[string]*fakeDisk)
		c, l := unseatedLeader(t, func(*Service) bool { return damaged.Load() }, func(c testCluster, l *testMember) {
			for _, m := range c {
				if m == l {
					continue
				}
				disks[m.conf.Addr].free.Store(1 << 20)
				eventually(t, patience, "a voter that is not fit", func() error {
					if m.s.unfitToLead() == nil {
						return errors.New("it is")
					}
					return nil
				})
			}
		}, func(conf *Config) {
			disks[conf.Addr] = new(fakeDisk)
			disks[conf.Addr].free.Store(1 << 39)
			conf.space = disks[conf.Addr].space
		})
		eventually(t, patience, "a copy that is wrong", func() error {
			if err := l.s.faults.first(faultState); !errors.Is(err, errNotMended) || !errors.Is(err, ErrCorrupt) {
				return fmt.Errorf("%v", err)
			}
			return nil
		})
		if l.s.Status().Role == Leader { // else a voter has stood that was not fit, which is as good
			is(t, l.s.handOver(ctxFor(t, patience), choice{}), errNobody, "unfit")
		}
		damaged.Store(false)
		c.seatedAgain(t, l)
	})
}
