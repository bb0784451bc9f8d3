package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	walfs "github.com/hashicorp/raft-wal/fs"
)

// snap is the path of the file, which has by then what was committed.
func (m *testMember) snap() string {
	if m.s != nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		m.s.store.sync(ctx) // or it can't be written, or is closed
	}
	return filepath.Join(m.conf.Dir, "snap")
}

// A faultRecord is a logger that remembers the faults of one member: some are mended too fast to be seen in Err.
type faultRecord struct {
	mu     sync.Mutex
	faults []error
}

func (r *faultRecord) Enabled(context.Context, slog.Level) bool { return true }
func (r *faultRecord) WithAttrs([]slog.Attr) slog.Handler       { return r }
func (r *faultRecord) WithGroup(string) slog.Handler            { return r }

func (r *faultRecord) Handle(_ context.Context, rec slog.Record) error {
	if rec.Level < slog.LevelError {
		return nil
	}
	rec.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok && a.Key == "fault" {
			r.mu.Lock()
			r.faults = append(r.faults, err)
			r.mu.Unlock()
		}
		return true
	})
	return nil
}

// take returns the newest fault and forgets all of them.
func (r *faultRecord) take() (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.faults); n > 0 {
		err = r.faults[n-1]
	}
	r.faults = nil
	return err
}

func recordedCluster(t testing.TB) testCluster {
	return newCluster(t, 3, func(c *Config) { c.Logger = slog.New(&faultRecord{}) })
}

// awaitRecovery waits until the member has had a fault of this kind and is well again. No Get meanwhile returns anything
// but want.
func (m *testMember) awaitRecovery(t testing.TB, key, want string, words ...string) {
	t.Helper()
	record := m.conf.Logger.Handler().(*faultRecord)
	var fault error
	eventually(t, 30*time.Second, "a fault and its end at "+m.conf.Addr, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if v, err := m.s.Get(ctx, key); err == nil && string(v) != want {
			t.Fatalf("Get returns %q, want %q", v, want)
		}
		if err := record.take(); err != nil {
			fault = err
		}
		switch {
		case fault == nil:
			return errors.New("no fault yet")
		case m.s.Err() != nil:
			return fmt.Errorf("still %w", m.s.Err())
		}
		return nil
	})
	is(t, fault, ErrCorrupt, words...)
}

func awaitFault(t testing.TB, s *Service) (fault error) {
	t.Helper()
	eventually(t, 30*time.Second, "a fault", func() error {
		if fault = s.Err(); fault == nil {
			return errors.New("Err is nil")
		}
		return nil
	})
	return fault
}

// Whoever writes to snap beside a running member is found out, and the member goes back to what the cluster holds.
func TestForeignWrite(t *testing.T) {
	t.Parallel()
	c := recordedCluster(t)
	must(t, c[0].s.Set(t.Context(), "k", []byte("good")))
	c.awaitEqual(t)
	mended := func(t *testing.T, m *testMember) {
		t.Helper()
		must(t, c[0].s.Set(ctxFor(t, 20*time.Second), "after", []byte(t.Name())))
		c.awaitEqual(t)
		if got := sqlite3(t, "-readonly", m.snap(), "select value from kv where key = 'k'"); got != "good" {
			t.Errorf("the file holds %q", got)
		}
		must(t, m.s.Ready(ctxFor(t, 20*time.Second)))
	}
	t.Run("on a follower", func(t *testing.T) {
		m := c.follower(t)
		sqlite3(t, m.snap(), "update kv set value = 'evil' where key = 'k'")
		m.awaitRecovery(t, "k", "good", "another program wrote to", m.snap(), "sqlite3 -readonly")
		mended(t, m)
	})
	t.Run("on the leader", func(t *testing.T) {
		m := c.leader(t)
		sqlite3(t, m.snap(), "delete from kv; insert into kv values('x', 'y', 1, 1, 1)")
		m.awaitRecovery(t, "k", "good", "another program wrote to")
		mended(t, m)
		if c.leader(t) == m {
			t.Log("it leads again")
		}
	})
	t.Run("while writes go on", func(t *testing.T) {
		m := c.follower(t)
		w := startWriters(t, 4, func() *Service { return c.leader(t).s })
		sqlite3(t, m.snap(), "update kv set value = 'evil' where key = 'k'")
		m.awaitRecovery(t, "k", "good", "another program wrote to")
		if w.stop() == 0 {
			t.Error("no write went on")
		}
		mended(t, m)
	})
	t.Run("reading is no write", func(t *testing.T) {
		m := c.follower(t)
		sqlite3(t, "-readonly", m.snap(), "select count(*) from kv; pragma integrity_check")
		m.s.checkFile()
		must(t, m.s.Err())
	})
	for _, m := range c {
		m.stop()
		if _, err := checkFile(m.snap()); err != nil {
			t.Error(err)
		}
	}
}

// Alone there is no other copy: the member says so loudly, and takes the file as it is.
func TestForeignWriteAlone(t *testing.T) {
	t.Parallel()
	t.Run("found by the check", func(t *testing.T) { testForeignWriteAlone(t, 0) })
	t.Run("met by a reader first", func(t *testing.T) { testForeignWriteAlone(t, -1) }) // who takes it for damage
}

func testForeignWriteAlone(t *testing.T, memory int64) {
	m := newMember(t, "")
	m.conf.Memory = memory
	s := m.start()
	must(t, s.Set(t.Context(), "k", []byte("good")))
	sqlite3(t, m.snap(), "update kv set value = 'operator' where key = 'k'")
	if v := s.Stale().Get("k"); memory < 0 && v != nil && string(v) != "operator" {
		t.Errorf("the reader got %q", v)
	}
	eventually(t, 20*time.Second, "the operator's value", func() error {
		v, err := s.Get(ctxFor(t, time.Second), "k")
		if err != nil || string(v) != "operator" || s.Err() != nil {
			return fmt.Errorf("%q, %v, Err %v", v, err, s.Err())
		}
		return nil
	})
	must(t, s.Set(t.Context(), "after", []byte("x")))
	m.stop()
	if _, err := checkFile(m.snap()); err != nil {
		t.Error(err)
	}
}

// What another program puts beside the tables of a lone member: Err names it with its repair as long as it is there, running and after
// a restart, and the member works. With another voter it is gone.
func TestForeignSchemaAlone(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	s := m.start()
	must(t, s.Set(t.Context(), "k", []byte("good")))
	sqlite3(t, m.snap(), `create table "a ""b" (id integer primary key autoincrement); insert into "a ""b" default values;
		create index by_value on kv(value); create view v as select 1; create table own(key text primary key) without rowid;
		create trigger evil after update on kv begin update kv set value = 'evil', version = 9; end;
		pragma user_version = 77; pragma application_id = 78`)
	works := func(key string) {
		t.Helper()
		eventually(t, patience, "Err names what is there", func() error {
			err := s.Err()
			for _, word := range []string{"by_value", `DROP TABLE IF EXISTS "a ""b"`, "DROP VIEW", `"own"`, m.snap()} {
				if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), word) {
					return fmt.Errorf("%q is not in %v", word, err)
				}
			}
			return nil
		})
		must(t, s.Set(ctxFor(t, patience), key, []byte("x")))
		must(t, s.Set(ctxFor(t, patience), "k", []byte("better")))
		must(t, s.store.sync(t.Context()))
		wantGet(t, s, "k", []byte("better"))
		must(t, s.Ready(ctxFor(t, patience)))
	}
	works("running")
	m.stop()
	s = m.start()
	works("again")
	if strings.Contains(s.Err().Error(), "evil") || strings.Contains(s.Err().Error(), "autoindex") {
		t.Error(s.Err())
	}
	t.Run("dropped", func(t *testing.T) {
		m := m.fork(t)
		s := m.start()
		sqlite3(t, m.snap(), `drop table "a ""b"; drop index by_value; drop view v; drop table own`)
		eventually(t, patience, "well", s.Err)
		must(t, s.Set(ctxFor(t, patience), "k", []byte("well")))
		m.stop()
		if _, err := checkFile(m.snap()); err != nil {
			t.Error(err)
		}
	})
	s = m.s
	o := newMember(t, m.conf.Addr)
	must(t, s.AddAllowedMember(t.Context(), o.conf.Addr))
	o.start()
	eventually(t, patience, "the other voter's state, without it", func() error {
		if n, _ := m.counts(); n != 2 || s.Err() != nil {
			return fmt.Errorf("%d voters, Err %v", n, s.Err())
		}
		return nil
	})
	must(t, s.Set(ctxFor(t, patience), "k", []byte("two")))
	m.stop()
	o.stop()
	for _, m := range []*testMember{m, o} {
		if _, err := checkFile(m.snap()); err != nil {
			t.Error(err)
		}
	}
}

// fork is a member alone with a copy of this one's directory, which is closed meanwhile.
func (m *testMember) fork(t *testing.T) *testMember {
	t.Helper()
	m.stop()
	defer m.start()
	o := newMember(t, "")
	must(t, os.CopyFS(o.conf.Dir, os.DirFS(m.conf.Dir)))
	return o
}

// A member whose state has left the others' path is found by the marks, though its own sums are right.
func TestDivergedMemberRebuilds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	must(t, c[0].s.Set(t.Context(), "k", []byte("good")))
	c.awaitEqual(t)
	diverge := func(t *testing.T, m *testMember) {
		t.Helper()
		tx, err := m.s.store.begin()
		must(t, err)
		tx.meta.revision++
		must(t, tx.set("k", row{value: "evil", version: tx.meta.revision, created: 1}))
		tx.commit()
		eventually(t, 30*time.Second, "entries up to the next mark", func() error { // a leader that finds it out meanwhile hands over
			r := c.leader(t).s.raft.Load()
			var last raft.ApplyFuture
			for range markInterval + 100 {
				last = r.Apply(encodeTermStart(firstFormat), 0)
			}
			return last.Error()
		})
		eventually(t, 30*time.Second, "found", func() error {
			m.s.compareStates()
			if err := m.s.faults.first(faultDiverged); err == nil && string(m.s.Stale().Get("k")) != "good" {
				return errors.New("no fault")
			}
			return nil
		})
		eventually(t, 30*time.Second, "healed", m.s.Err)
		must(t, c[0].s.Set(ctxFor(t, 20*time.Second), "after", []byte(t.Name())))
		c.awaitEqual(t)
		if v := m.s.Stale().Get("k"); string(v) != "good" {
			t.Errorf("it reads %q", v)
		}
	}
	t.Run("a follower", func(t *testing.T) { diverge(t, c.follower(t)) })
	t.Run("the leader", func(t *testing.T) { diverge(t, c.leader(t)) })
	for _, m := range c {
		m.s.compareStates() // its last one may have met a third member that had not come so far
		if err := m.s.Err(); err != nil {
			t.Errorf("%s: %v", m.conf.Addr, err)
		}
	}
}

// flipIn flips a bit inside some text in a file, at the first place: in a state that is the row, and the history comes after it.
func flipIn(t testing.TB, path, text string) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	at := bytes.Index(data, []byte(text))
	if at < 0 {
		t.Fatalf("%s does not hold %q", path, text)
	}
	flipBit(t, path, int64(at+len(text)/2))
}

// What the disk flips while a member is closed is found after the next start, and never read as data.
func TestFlippedBit(t *testing.T) {
	flipLog := func(t *testing.T, m *testMember) {
		t.Helper()
		files, _ := filepath.Glob(filepath.Join(m.conf.Dir, "wal", "*.wal"))
		flipIn(t, files[0], "the good value")
	}
	t.Run("in the state of one of three", func(t *testing.T) {
		c := recordedCluster(t)
		must(t, c[0].s.Set(t.Context(), "k", []byte("the good value")))
		c.awaitEqual(t)
		m := c.follower(t)
		m.stop()
		flipIn(t, m.snap(), "the good value")
		m.start()
		m.awaitRecovery(t, "k", "the good value", "snap")
		c.awaitEqual(t)
		t.Run("and in its log", func(t *testing.T) {
			m.stop()
			flipLog(t, m)
			s := m.start()
			is(t, awaitFault(t, s), ErrCorrupt, "wal", "index", "move its directory away")
			// The entry is part of the state already, so the member goes on while somebody finds the time.
			must(t, s.Set(ctxFor(t, 20*time.Second), "y", nil))
			c.awaitEqual(t)
		})
	})
	t.Run("in the state, alone", func(t *testing.T) {
		m := newMember(t, "")
		must(t, m.start().Set(t.Context(), "k", []byte("the good value")))
		m.stop()
		flipIn(t, m.snap(), "the good value")
		s := m.start()
		is(t, awaitFault(t, s), ErrCorrupt, m.snap(), "replaced")
		began := time.Now()
		err := s.Set(ctxFor(t, 20*time.Second), "x", nil)
		is(t, err, ErrNotApplied)
		is(t, err, ErrCorrupt)
		if d := time.Since(began); d > 3*time.Second {
			t.Errorf("refused after %v", d)
		}
		if v, err := s.Get(ctxFor(t, 5*time.Second), "k"); err == nil {
			t.Errorf("Get returns %q", v)
		}
		if v := s.Stale().Get("k"); v != nil {
			t.Errorf("Stale returns %q", v)
		}
	})
	t.Run("in the log, alone", func(t *testing.T) {
		m := newMember(t, "")
		must(t, m.start().Set(t.Context(), "k", []byte("the good value")))
		must(t, m.s.Set(t.Context(), "l", []byte("another")))
		m.stop()
		flipLog(t, m)
		s := m.start()
		is(t, awaitFault(t, s), ErrCorrupt, "wal", "index", "move its directory away")
	})
}

// leaderOtherThan is the leader that the others see.
func (c testCluster) leaderOtherThan(t testing.TB, m *testMember) *testMember {
	t.Helper()
	var others testCluster
	for _, o := range c {
		if o != m {
			others = append(others, o)
		}
	}
	var found *testMember
	eventually(t, 30*time.Second, "another leader", func() error {
		for _, o := range others {
			if o.s.Status().Role == Leader && o.s.Ready(ctxFor(t, time.Second)) == nil {
				found = o
				return nil
			}
		}
		text := "none leads"
		for _, o := range c {
			st := o.s.Status()
			text += fmt.Sprintf("; %s is %v of term %d, unfit: %v", st.Addr, st.Role, st.Term, o.s.unfitToLead())
		}
		return errors.New(text)
	})
	return found
}

// A brokenDisk is the log's file system of one member.
func newFaultFS() *faultFS {
	return &faultFS{VFS: walfs.New(), unsynced: map[string]map[int64][]byte{}, created: map[string]bool{}}
}

func brokenCluster(t *testing.T) (c testCluster, disk func(m *testMember) *faultFS) {
	c = newCluster(t, 3, func(conf *Config) { conf.vfs = newFaultFS() })
	return c, func(m *testMember) *faultFS { return m.conf.vfs.(*faultFS) }
}

func TestStalledDiskOfTheLeader(t *testing.T) {
	t.Parallel() // with the other one that waits for limits
	c, disk := brokenCluster(t)
	old := c.leader(t)
	must(t, old.s.Set(ctxFor(t, 20*time.Second), "k", nil))
	hang := make(chan struct{})
	fs := disk(old)
	fs.mu.Lock()
	fs.hang = hang
	fs.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stuck := make(chan error, 1)
	go func() { stuck <- old.s.Insert(ctx, "stuck", nil) }()
	now := c.leaderOtherThan(t, old)
	must(t, now.s.Set(ctxFor(t, 20*time.Second), "k", []byte("v")))
	ahead, err := now.s.Lookup(ctxFor(t, 20*time.Second), "stuck") // the others had it before the disk that hangs
	must(t, err)
	if err := old.s.Ready(ctxFor(t, 200*time.Millisecond)); err == nil {
		t.Error("the stalled member is ready")
	}
	if err := awaitFault(t, old.s); !strings.Contains(err.Error(), "disk") {
		t.Errorf("Err is %v", err)
	}
	fs.mu.Lock()
	fs.hang = nil
	fs.mu.Unlock()
	close(hang)
	eventually(t, 20*time.Second, "it has recovered", old.s.Err)
	must(t, old.s.Ready(ctxFor(t, 20*time.Second)))
	must(t, <-stuck)
	if e, err := old.s.Lookup(ctxFor(t, 20*time.Second), "stuck"); err != nil || e.Version != ahead.Version {
		t.Errorf("%+v, %v, and it was %+v", e, err, ahead)
	}
	must(t, old.s.Set(ctxFor(t, 20*time.Second), "again", nil))
	c.awaitEqual(t)
}

// Close does not wait for a disk that hangs. The directory stays locked, for what hangs may still write to it.
func TestCloseWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	fs := newFaultFS()
	conf := Config{Dir: filepath.Join(t.TempDir(), "data"), Logger: testLogger(t), vfs: fs}
	s, err := Open(t.Context(), conf)
	must(t, err)
	must(t, s.Set(t.Context(), "k", []byte("v")))
	hang := make(chan struct{})
	fs.mu.Lock()
	fs.hang = hang
	fs.mu.Unlock()
	result := make(chan error, 1)
	go func() { result <- s.Set(context.Background(), "stuck", nil) }()
	eventually(t, 20*time.Second, "it hangs", func() error {
		if s.wal.busy() == 0 {
			return errors.New("no call in progress")
		}
		return nil
	})
	began := time.Now()
	err = s.Close()
	if d := time.Since(began); err == nil || !strings.Contains(err.Error(), "stays locked") || d > 30*time.Second {
		t.Errorf("closed with %v after %v", err, d)
	}
	is(t, <-result, ErrUncertain)
	_, err = Open(t.Context(), conf)
	is(t, err, ErrLocked)
	fs.mu.Lock()
	fs.hang = nil
	fs.mu.Unlock()
	close(hang)
	eventually(t, 20*time.Second, "it opens again", func() error {
		s, err = Open(t.Context(), conf)
		return err
	})
	if v, err := s.Get(ctxFor(t, 20*time.Second), "k"); err != nil || string(v) != "v" {
		t.Errorf("%q, %v", v, err)
	}
	must(t, s.Close())
}

func setSync(f *faultFS, err error)  { f.syncErr = err }
func setWrite(f *faultFS, err error) { f.writeErr = err }

// An error of the disk is for good until a restart: what the disk holds after it nobody knows.
func TestFailedDisk(t *testing.T) {
	c, disk := brokenCluster(t)
	for _, who := range []struct {
		name string
		pick func(testing.TB) *testMember
	}{{"a follower's", c.follower}, {"the leader's", c.leader}} {
		t.Run(who.name, func(t *testing.T) {
			m := who.pick(t)
			disk(m).fail(setSync, syscall.EIO)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go m.s.Set(ctx, "broken", nil)
			fault := awaitFault(t, m.s)
			is(t, fault, syscall.EIO, "wal")
			disk(m).fail(setSync, nil)
			began := time.Now()
			is(t, m.s.Set(ctxFor(t, 20*time.Second), "x", nil), ErrNotApplied, "input/output error")
			if v, err := m.s.Get(ctxFor(t, 20*time.Second), "broken"); err == nil {
				t.Errorf("Get returns %q", v)
			}
			if d := time.Since(began); d > 3*time.Second {
				t.Errorf("refused after %v", d)
			}
			other := c.leaderOtherThan(t, m)
			must(t, other.s.Set(ctxFor(t, 20*time.Second), "k", []byte(t.Name())))
			if m.s.Err() == nil {
				t.Error("the fault is gone without a restart")
			}
			began = time.Now()
			m.stop()
			if d := time.Since(began); d > 30*time.Second {
				t.Errorf("Close took %v", d)
			}
			t.Logf("Close took %v", time.Since(began).Round(time.Millisecond))
			m.start()
			c.awaitVoters(t, 3)
			must(t, m.s.Set(ctxFor(t, 20*time.Second), "healed", []byte(t.Name())))
			c.awaitEqual(t)
		})
	}
}

// A full disk is not for good: with space back the member goes on by itself.
func TestFullDiskOfOneMember(t *testing.T) {
	t.Parallel()
	c, disk := brokenCluster(t)
	for _, who := range []struct {
		name string
		pick func(testing.TB) *testMember
	}{{"a follower's", c.follower}, {"the leader's", c.leader}} {
		t.Run(who.name, func(t *testing.T) {
			m := who.pick(t)
			disk(m).fail(setWrite, syscall.ENOSPC)
			if wait := m.s.begin(encodeOpen(m.s.batch.format(), [16]byte{1}), time.Second); wait != nil {
				_, sent, err := wait(ctxFor(t, 20*time.Second))
				if is(t, err, syscall.ENOSPC); sent != errors.Is(err, errSentAhead) {
					t.Errorf("sent %v: %v", sent, err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := m.s.Set(ctx, "full", nil); err != nil && errors.Is(err, ErrNotApplied) == errors.Is(err, ErrUncertain) {
				t.Errorf("no verdict: %v", err)
			}
			cancel()
			other := c.leaderOtherThan(t, m)
			for i := range 20 {
				must(t, other.s.Set(ctxFor(t, 20*time.Second), fmt.Sprint("meanwhile", i), nil))
			}
			if m.s.Stale() == nil {
				t.Error("no reads")
			}
			disk(m).fail(setWrite, nil)
			must(t, m.s.Ready(ctxFor(t, 30*time.Second)))
			must(t, m.s.Set(ctxFor(t, 30*time.Second), "healed", []byte(t.Name())))
			c.awaitEqual(t)
			eventually(t, 10*time.Second, "no fault is left", m.s.Err)
		})
	}
}

func TestStatusTellsMemoryAndVerification(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	m.conf.Addr, m.conf.Memory = "", 20<<10
	s := m.startAlone(t)
	if st := s.Status(); !st.Verified || st.MemoryDropped {
		t.Errorf("a new state: %+v", st)
	}
	for i := range 8 {
		must(t, s.Set(t.Context(), fmt.Sprint("k", i), bytes.Repeat([]byte("v"), 4<<10)))
	}
	if st := s.Status(); !st.MemoryDropped {
		t.Errorf("32 KiB in a budget of 20: %+v", st)
	}
	must(t, s.Close())
	s = m.startAlone(t)
	eventually(t, 20*time.Second, "verified", func() error {
		if st := s.Status(); !st.Verified || !st.MemoryDropped {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if v, err := s.Get(t.Context(), "k7"); err != nil || len(v) != 4<<10 {
		t.Errorf("%d bytes, %v", len(v), err)
	}
	if st := s.Status(); st.Role != Leader || st.AppliedIndex == 0 || st.Revision != 8 || len(st.Members) != 1 || st.Members[0].Heard != 0 {
		t.Errorf("%+v", st)
	}
	must(t, s.Close())
}

func (m *testMember) startAlone(t testing.TB) *Service {
	t.Helper()
	s, err := Open(context.Background(), m.conf)
	must(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// Members that differ all say so; only one that a majority contradicts rebuilds.
func TestMembersThatDiffer(t *testing.T) {
	t.Parallel()
	s := &Service{rebuildCh: make(chan struct{}, 1)}
	s.faults.log = slog.New(slog.DiscardHandler)
	own := []mark{{boundary: 1024, applied: 1023, kvSum: 1}}
	same, other := own[0].answer().value(), mark{boundary: 1024, applied: 1023, kvSum: 2}.answer().value()
	rebuilds := func() bool { return len(s.rebuildCh) > 0 }
	for _, step := range []struct {
		what  string
		votes map[string]int // of the two others
		says  string
		wants bool
	}{
		{"nobody else has the mark", nil, "", false},
		{"one of the others agrees", map[string]int{same: 1, other: 1}, "", false},
		{"one differs and one is silent", map[string]int{other: 1}, "no majority", false},
		{"both agree", map[string]int{same: 2}, "", false},
		{"both differ", map[string]int{other: 2}, "being rebuilt", true},
	} {
		s.judge(own, map[uint64]map[string]int{1024: step.votes}, 3, true)
		if err := s.Err(); fmt.Sprint(err) == "<nil>" != (step.says == "") || err != nil && !strings.Contains(err.Error(), step.says) {
			t.Errorf("%s: Err is %v, want %q", step.what, err, step.says)
		}
		if rebuilds() != step.wants {
			t.Errorf("%s: rebuilds %v", step.what, rebuilds())
		}
	}
}

// README shows the table of faults as the code has it, and each question about a member's faults is answered from the table.
func TestFaultTable(t *testing.T) {
	t.Parallel()
	const begin, end = "TestFaultTable -update -->\n", "<!-- faults end -->"
	var b strings.Builder
	b.WriteString("| fault | silent | unfit | Ready | Err | writes | reads | ends with |\n|---|---|---|---|---|---|---|---|\n")
	for _, row := range faultTable {
		b.WriteString("| " + row.cause)
		for _, column := range []struct {
			of   effects
			word string
		}{{isSilent, "yes"}, {unfit, "yes"}, {notReady, "fails"}, {inErr, "says so"}, {refusesWrites, "refused"}, {refusesReads, "refused"}} {
			word := column.word
			switch {
			case column.of == refusesWrites && row.does&refusesLeading != 0:
				word = "leading"
			case row.does&column.of == 0:
				word = ""
			}
			b.WriteString(" | " + word)
		}
		b.WriteString(" | " + row.ends + " |\n")
	}
	data, err := os.ReadFile("README.md")
	must(t, err)
	head, rest, _ := strings.Cut(string(data), begin)
	_, tail, found := strings.Cut(rest, end)
	if !found {
		t.Fatal("README has no place for the table")
	}
	want := head + begin + b.String() + end + tail
	if *update {
		must(t, os.WriteFile("README.md", []byte(want), 0o644))
	} else if string(data) != want {
		t.Errorf("README does not show the table of faults; -update rewrites it\n%s", firstDifference(want, string(data)))
	}
}

// Whoever polls Err sees a fault as long as there is one, also while another one comes and goes, or it is found again and again.
func TestErrOfAFaultThatStays(t *testing.T) {
	t.Parallel()
	f := faults{log: slog.New(slog.DiscardHandler)}
	f.set(faultFounding, ErrInvalid)
	stop, polled := make(chan struct{}), make(chan int)
	go func() {
		nothing := 0
		for {
			select {
			case <-stop:
				polled <- nothing
				return
			default:
				if f.err() == nil {
					nothing++
				}
			}
		}
	}()
	for i := range 50_000 {
		f.set(faultFounding, ErrInvalid)
		if i%2 == 0 {
			f.set(faultUnreached, errLost)
		} else {
			f.set(faultUnreached, nil)
		}
	}
	close(stop)
	if n := <-polled; n != 0 {
		t.Errorf("Err was nil %d times", n)
	}
}

func TestFaultEffects(t *testing.T) {
	t.Parallel()
	for k, row := range faultTable {
		if row.cause == "" || row.ends == "" || row.does == 0 || row.does >= effectsEnd {
			t.Errorf("fault %d has no row: %+v", k, row)
		}
		for _, graver := range []bool{false, true} { // one that does other things hides none of them
			s := &Service{wal: &logStore{}, fsm: &fsm{}}
			s.faults.log = slog.New(slog.DiscardHandler)
			s.conf.Timeout, s.conf.MaxValue = time.Minute, 1
			moved := 0
			s.faults.moved = func() { moved++ }
			fault, other := errors.New(row.cause), errors.New("the graver one")
			all := row.does
			if graver && k > 0 {
				s.faults.set(faultKind(k-1), other)
				all |= faultTable[k-1].does
			}
			moved = 0
			s.faults.set(faultKind(k), fault)
			for what, is := range map[string]struct {
				of  effects
				err error
			}{
				"silent": {isSilent, s.silent()}, "unfit to lead": {unfit, s.unfitToLead()}, "unready": {notReady, s.unready()},
				"refuses writes": {refusesWrites, s.refusesWrites()}, "refuses reads": {refusesReads, s.refusesReads()}, "Err": {inErr, s.Err()},
				"refuses writes leading": {refusesLeading, s.suffers(refusesLeading)},
			} {
				if (is.err != nil) != (all&is.of != 0) {
					t.Errorf("%s: %s: %v", row.cause, what, is.err)
				}
				if is.err != nil && is.err != fault && is.err != other {
					t.Errorf("%s: %s is another fault: %v", row.cause, what, is.err)
				}
			}
			if (moved == 1) != (row.does&unfit != 0) {
				t.Errorf("%s: moved %d times", row.cause, moved)
			}
			if row.does&refusesWrites != 0 {
				if err := s.Set(t.Context(), "k", nil); !errors.Is(err, ErrNotApplied) || !errors.Is(err, fault) && !errors.Is(err, other) {
					t.Errorf("%s: Set: %v", row.cause, err)
				}
			}
			if row.does&refusesReads != 0 {
				if _, err := s.Get(t.Context(), "k"); !errors.Is(err, fault) && !errors.Is(err, other) {
					t.Errorf("%s: Get: %v", row.cause, err)
				}
			}
			s.faults.set(faultKind(k), nil)
			s.faults.set(faultKind(max(k-1, 0)), nil)
			if err := s.suffers(effectsEnd - 1); err != nil || s.Err() != nil {
				t.Errorf("%s is over: %v, %v", row.cause, err, s.Err())
			}
		}
	}
}
