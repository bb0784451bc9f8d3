//go:build unix

package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
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
