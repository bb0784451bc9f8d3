package quorate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// A prepared directory is that of a member without a network, with some writes, closed.
func preparedDir(t *testing.T) (dir string, st Status) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "data")
	s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
	must(t, err)
	for i := range 12 {
		must(t, s.Set(t.Context(), fmt.Sprint("key", i), []byte(fmt.Sprint("value", i))))
	}
	st = s.Status()
	must(t, s.Close())
	return dir, st
}

// appendTermStarts appends n entries that change no row.
func appendTermStarts(t *testing.T, l *logStore, index, term, n uint64) {
	t.Helper()
	for i := range n {
		must(t, l.StoreLog(&raft.Log{Index: index + i, Term: term, Type: raft.LogCommand, Data: encodeTermStart(firstFormat)}))
	}
}

// editLog changes the log of a closed directory.
func editLog(t *testing.T, dir string, f func(l *logStore)) {
	t.Helper()
	l, err := openLog(logOptions{dir: filepath.Join(dir, "wal"), log: slog.New(slog.DiscardHandler)})
	must(t, err)
	f(l)
	must(t, l.close())
}

// editMeta changes where the state of a closed directory says that it stands.
func editMeta(t *testing.T, dir string, f func(m *meta)) {
	t.Helper()
	st, err := openStore(storeOptions{path: filepath.Join(dir, "snap"), memory: -1, log: slog.New(slog.DiscardHandler)})
	must(t, err)
	tx, err := st.begin()
	must(t, err)
	f(&tx.meta)
	tx.commit()
	must(t, st.close())
}

// editIdentity changes the id of a closed directory.
func editIdentity(t *testing.T, dir string, f func(id *identity)) {
	t.Helper()
	id, ok, err := readIdentity(dir)
	if must(t, err); !ok {
		t.Fatal("no id")
	}
	f(&id)
	must(t, writeIdentity(dir, id))
}

// Which file and which log go on together, with A applied, I the last install, and a log of F to L.
func TestStartRule(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string, applied uint64)
		words  []string // of ErrCorrupt; none: it opens, with everything in it
	}{
		{"as it was closed", func(*testing.T, string, uint64) {}, nil},
		{"the log is longer", func(t *testing.T, dir string, a uint64) {
			// Nothing but the file decides what is applied, so the entries above are applied now.
			editLog(t, dir, func(l *logStore) { appendTermStarts(t, l, a+1, 9, 3) })
		}, nil},
		{"the log begins right after the file", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { appendTermStarts(t, l, a+1, 9, 3); must(t, l.DeleteRange(1, a)) })
		}, nil},
		{"installed and the log not yet emptied", func(t *testing.T, dir string, a uint64) {
			editMeta(t, dir, func(m *meta) { m.installed = m.applied })
			editLog(t, dir, func(l *logStore) { must(t, l.DeleteRange(a-3, a)) })
		}, nil},
		{"installed and the log emptied", func(t *testing.T, dir string, a uint64) {
			editMeta(t, dir, func(m *meta) { m.installed = m.applied })
			editLog(t, dir, func(l *logStore) { must(t, l.reset()) })
		}, nil},
		{"installed over a log that had gone another way", func(t *testing.T, dir string, a uint64) {
			editMeta(t, dir, func(m *meta) { m.installed = m.applied })
			editLog(t, dir, func(l *logStore) { must(t, l.DeleteRange(a, a)); appendLog(t, l, a, 77, 3) })
		}, nil},
		{"the log has lost its end", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { must(t, l.DeleteRange(a-1, a)) })
		}, []string{"wal ends at", "move the directory away", "bootURL", "Restore"}},
		{"the log has lost its last entry", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { must(t, l.DeleteRange(a, a)) })
		}, []string{"wal ends at", "move the directory away"}},
		{"an empty file beside an empty log", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
			editMeta(t, dir, func(*meta) {})
			editLog(t, dir, func(l *logStore) { must(t, l.reset()) })
		}, []string{"neither snap nor wal holds anything", "empty the directory"}},
		{"the log is empty", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { must(t, l.reset()) })
		}, []string{"wal ends at 0", "move the directory away"}},
		{"a hole between file and log", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { must(t, l.reset()); appendLog(t, l, a+2, 9, 3) })
		}, []string{"wal begins at", "are lost", "bootURL"}},
		{"the log of another member", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { must(t, l.DeleteRange(a, a)); appendLog(t, l, a, 77, 1) })
		}, []string{"term 77", "not of one member"}},
		{"no file beside a whole log", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
		}, nil},
		{"no file beside a log that was cut, and nobody to ask", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
			editLog(t, dir, func(l *logStore) { must(t, l.DeleteRange(1, 4)) })
		}, []string{"snap is missing", "wal begins at entry 5", "put snap back"}},
		{"no file beside an empty log, after votes", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
			editLog(t, dir, func(l *logStore) { must(t, l.reset()); must(t, l.SetUint64([]byte("CurrentTerm"), 8)) })
		}, []string{"snap is missing", "put snap back"}},
		{"no file beside an empty log, before any vote", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
			editLog(t, dir, func(l *logStore) { must(t, l.reset()); must(t, l.SetUint64([]byte("CurrentTerm"), 1)) })
		}, []string{"snap is missing", "put snap back"}},
		{"no file beside an empty log, after votes, and an id of before", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
			editIdentity(t, dir, func(id *identity) { id.intent = intentBootstrap })
			editLog(t, dir, func(l *logStore) { must(t, l.reset()); must(t, l.SetUint64([]byte("CurrentTerm"), 8)) })
		}, []string{"snap is missing", "put snap back"}},
		{"an empty file beside an empty log, after votes, and an id of before", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "snap")))
			editMeta(t, dir, func(*meta) {})
			editIdentity(t, dir, func(id *identity) { id.intent = intentBootstrap })
			editLog(t, dir, func(l *logStore) { must(t, l.reset()); must(t, l.SetUint64([]byte("CurrentTerm"), 8)) })
		}, []string{"has voted in term 8", "empty the directory"}},
		{"files of a transfer that was cut off", func(t *testing.T, dir string, a uint64) {
			for _, name := range []string{"snap.incoming", "snap.rebuild", "snap.incoming-journal", "snap.rebuild-wal", "snap.restore"} {
				must(t, os.WriteFile(filepath.Join(dir, name), []byte("half"), 0o600))
			}
		}, nil},
		{"no id", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "id")))
		}, []string{"snap is there", "id is missing", "put id back"}},
		{"the log's meta file is gone before id says that there is state", func(t *testing.T, dir string, a uint64) {
			editIdentity(t, dir, func(id *identity) { id.intent = intentBootstrap })
			must(t, os.Remove(filepath.Join(dir, "wal", "wal-meta.db")))
		}, []string{"its log in wal is gone", "put wal back"}},
		{"a flipped bit in id", func(t *testing.T, dir string, a uint64) {
			flipBit(t, filepath.Join(dir, "id"), -12)
		}, []string{"id"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, st := preparedDir(t)
			c.damage(t, dir, st.AppliedIndex)
			before, _ := os.ReadFile(filepath.Join(dir, "id"))
			s, err := Open(ctxFor(t, 2*time.Second), Config{Dir: dir, Logger: testLogger(t)})
			if c.words != nil {
				is(t, err, ErrCorrupt, c.words...)
				if id, _ := os.ReadFile(filepath.Join(dir, "id")); string(id) != string(before) {
					t.Error("id was changed by an Open that was refused")
				}
				return
			}
			must(t, err)
			defer s.Close()
			must(t, s.Ready(ctxFor(t, 20*time.Second)))
			for i := range 12 {
				if v, err := s.Get(t.Context(), fmt.Sprint("key", i)); err != nil || string(v) != fmt.Sprint("value", i) {
					t.Errorf("key%d is %q, %v", i, v, err)
				}
			}
			must(t, s.Set(t.Context(), "after", []byte("x")))
			if r := s.Status().Revision; r != st.Revision+1 {
				t.Errorf("revision %d after one write, want %d", r, st.Revision+1)
			}
			must(t, s.Close())
			wantOnly(t, dir, "id", "snap", "wal")
			again, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
			must(t, err)
			defer again.Close()
			if v, err := again.Get(ctxFor(t, 20*time.Second), "after"); err != nil || string(v) != "x" {
				t.Errorf("after another start: %q, %v", v, err)
			}
		})
	}
}

// flipBit flips one bit of a file, at an offset from its beginning, or from its end if that is negative.
func flipBit(t testing.TB, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	if at < 0 {
		info, err := f.Stat()
		must(t, err)
		at += info.Size()
	}
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], at)
	must(t, err)
}

// writers writes on a member until stopped, and counts what was acknowledged.
type writers struct {
	stop func() int64
}

func startWriters(t testing.TB, n int, on func() *Service) writers {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var acked atomic.Int64
	var all sync.WaitGroup
	for w := range n {
		all.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if on().Set(ctx, fmt.Sprintf("w%d/%d", w, i%50), fmt.Append(nil, i)) == nil {
					acked.Add(1)
				}
			}
		})
	}
	end := sync.OnceValue(func() int64 { cancel(); all.Wait(); return acked.Load() })
	t.Cleanup(func() { end() })
	return writers{end}
}

// cutLogs makes every running member keep no more than a few entries of its log, and none up to past.
func (c testCluster) cutLogs(t testing.TB, past uint64) {
	t.Helper()
	for _, m := range c {
		if m.s == nil {
			continue
		}
		eventually(t, 20*time.Second, "a short log", func() error {
			err := cutLog(m.s, past)
			if first, last := m.s.wal.bounds(); err == nil && last-first > 40 {
				err = fmt.Errorf("log of %d to %d", first, last)
			}
			if err != nil {
				m.s.Set(ctxFor(t, time.Second), "cut", nil) // raft's own newest entry makes no snapshot
			}
			return err
		})
	}
}

// cutLog is one attempt to take the entries up to past, and nearly all others, off a member's log.
func cutLog(s *Service, past uint64) error {
	r := s.raft.Load()
	conf := r.ReloadableConfig()
	conf.TrailingLogs = 4 // until tuneLog looks again
	if err := r.ReloadConfig(conf); err != nil {
		return err
	}
	s.store.pace.waiting.Add(1) // or the file takes its time for the snapshot, and the log grows meanwhile
	defer s.store.pace.waiting.Add(-1)
	give(s.store.press)
	err := r.Snapshot().Error()
	if first, last := s.wal.bounds(); first <= past {
		return fmt.Errorf("log of %d to %d: %v", first, last, err)
	}
	return nil
}

// The log is kept as long as it is shorter than the state, and no longer.
func TestLogIsKeptWithinTheState(t *testing.T) {
	t.Parallel()
	conf := Config{Dir: filepath.Join(t.TempDir(), "data"), Logger: testLogger(t), History: 16}
	var free atomic.Int64
	free.Store(1 << 39)
	conf.space = func(string) diskSpace { return diskSpace{free.Load(), 1 << 40} }
	s, err := Open(t.Context(), conf)
	must(t, err)
	defer s.Close()
	keep := func() uint64 {
		s.tuneLog()
		return s.raft.Load().ReloadableConfig().TrailingLogs
	}
	write := func(first, keys int) {
		t.Helper()
		value := make([]byte, 64<<10)
		for i := range 1800 {
			must(t, s.Set(t.Context(), fmt.Sprint(first+i%keys), value))
		}
		must(t, s.store.sync(t.Context()))
	}
	if n := keep(); n != trailingLogs {
		t.Errorf("%d entries of an empty log are kept", n)
	}
	write(0, 1) // 112 MiB
	small := keep()
	if small < 900 || small > 1200 {
		t.Errorf("%d entries of 64 KiB are kept beside a small state, want 64 MiB", small)
	}
	write(0, 1800)                                         // as many bytes of state
	eventually(t, patience, "a longer log", func() error { // the checkpointer brings the state into the file
		if n := keep(); n < 1500 || n > 2100 {
			return fmt.Errorf("%d entries of 64 KiB are kept beside a state of 112 MiB", n)
		}
		return nil
	})
	s.members.snapshots(1) // is being sent, and whoever receives it needs what comes after
	if n := keep(); n < s.Status().LastIndex {
		t.Errorf("%d entries are kept while a snapshot is on its way", n)
	} else if n > 7000 {
		t.Errorf("%d entries of 64 KiB are kept while a snapshot of 112 MiB is on its way, want 368 MiB", n)
	}
	s.members.mu.Lock()
	s.members.sends, s.members.sent = 0, time.Time{} // and was, long ago
	s.members.mu.Unlock()
	free.Store(spaceLow + spaceTight - 1)
	if n := keep(); n != trailingMin {
		t.Errorf("%d entries are kept while space is tight", n)
	}
	before := s.Status().LastIndex
	eventually(t, patience, "a shorter log", func() error {
		must(t, s.Set(t.Context(), "0", make([]byte, 1<<20)))
		if first, last := s.wal.bounds(); last-first > trailingMin+logSegment/(64<<10)+(last-before) {
			return fmt.Errorf("the log has %d entries while space is tight", last-first)
		}
		return nil
	})
}

func (c testCluster) fill(t testing.TB, prefix string, n int) {
	t.Helper()
	l := c.leader(t)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := w; i < n; i += 16 {
				if err := l.s.Set(ctxFor(t, 20*time.Second), fmt.Sprint(prefix, i), []byte("v")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A member that was away comes back to the others' state, whatever became of their logs and of its own meanwhile.
func TestMemberComesBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	away := c.follower(t)
	others := func() *Service {
		for _, m := range c {
			if m != away {
				return m.s
			}
		}
		return nil
	}
	back := func(t *testing.T) {
		t.Helper()
		away.start()
		c.awaitVoters(t, 3)
		must(t, away.s.Set(ctxFor(t, 20*time.Second), "back", []byte(t.Name())))
		c.awaitEqual(t)
	}
	t.Run("its log goes another way, and it starts once more", func(t *testing.T) {
		away.stop()
		c.strayLog(t, away, 7)
		c.fill(t, "conflict", 20)
		back(t)
		away.stop()
		back(t)
	})
	t.Run("by a snapshot, while writes go on", func(t *testing.T) {
		past := away.s.Status().LastIndex
		away.stop()
		w := startWriters(t, 4, others)
		c.fill(t, "missed", 300)
		c.cutLogs(t, past)
		away.start()
		c.awaitVoters(t, 3)
		eventually(t, 20*time.Second, "an install", func() error {
			if m := away.s.store.meta(); m.installed == 0 {
				return fmt.Errorf("at %d without an install", m.applied)
			}
			return nil
		})
		if n := w.stop(); n == 0 {
			t.Error("no write went on")
		}
		c.awaitEqual(t)
		if v, err := away.s.Get(ctxFor(t, 20*time.Second), "missed299"); err != nil || string(v) != "v" {
			t.Errorf("a key of the snapshot is %q, %v", v, err)
		}
		if first, _ := away.s.wal.bounds(); first < 2 {
			t.Errorf("its log begins at %d", first)
		}
	})
	t.Run("from what it has, after the snapshot", func(t *testing.T) {
		away.stop()
		c.fill(t, "more", 20)
		back(t)
	})
	t.Run("without its file, which the others have", func(t *testing.T) {
		away.stop()
		must(t, os.Remove(filepath.Join(away.conf.Dir, "snap")))
		c.fill(t, "again", 20)
		away.conf.Join = ""
		_, err := away.open() // no change of the members is in what is left of its log
		if wantIs(t, "without the address of another member", err, ErrCorrupt); !strings.Contains(fmt.Sprint(err), "give the address of one as bootURL") {
			t.Errorf("it says %v", err)
		}
		away.conf.Join = others().conf.Addr
		back(t)
	})
	t.Run("without its file, and its log is ahead of the others", func(t *testing.T) {
		away.stop()
		copied := &testMember{t: t, conf: away.conf}
		copied.conf.Dir = filepath.Join(t.TempDir(), "data")
		must(t, os.CopyFS(copied.conf.Dir, os.DirFS(away.conf.Dir)))
		must(t, os.Remove(filepath.Join(copied.conf.Dir, "snap")))
		editLog(t, copied.conf.Dir, func(l *logStore) { must(t, l.reset()); appendLog(t, l, 1<<20, 9, 3) })
		_, err := copied.open()
		if is(t, err, ErrCorrupt, "the state of", "ends at"); err != nil && strings.Contains(err.Error(), "wal begins at 1048576: the entries") {
			t.Errorf("the state of another member was taken: %v", err)
		}
		if _, err := os.Lstat(filepath.Join(copied.conf.Dir, "snap")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a file is left that leads to nothing: %v", err)
		}
		back(t)
	})
	t.Run("without its file, while the others have no leader", func(t *testing.T) {
		away.stop()
		must(t, os.Remove(filepath.Join(away.conf.Dir, "snap")))
		var first, second *testMember
		for _, m := range c {
			if m != away && first == nil {
				first = m
			} else if m != away {
				second = m
			}
		}
		second.stop()
		eventually(t, patience, "no leader", func() error {
			if id, _ := first.s.leader(); id != "" {
				return fmt.Errorf("%s leads", shortID(id))
			}
			return nil
		})
		away.conf.Join = first.conf.Addr
		kept := away.conf.Logger
		defer func() { away.conf.Logger = kept }()
		started := make(chan struct{})
		once := sync.OnceFunc(func() {
			go func() { defer close(started); second.start() }()
		})
		to := slog.DiscardHandler
		if kept != nil {
			to = kept.Handler()
		}
		away.conf.Logger = slog.New(listener{to, "no state from a member", once})
		back(t)
		<-started
	})
	t.Run("with a tail that the snapshot does not reach", func(t *testing.T) {
		// hashicorp/raft#697: raft's memory of the tail outlives the install, and every append is refused after it.
		past := away.s.Status().LastIndex
		away.stop()
		c.fill(t, "first", 100) // or the next leader begins where the tail does, and sees the conflict
		c.strayLog(t, away, 3000)
		c.fill(t, "short", 200)
		c.cutLogs(t, past)
		away.start()
		before := away.s.raft.Load()
		c.awaitVoters(t, 3)
		c.fill(t, "after", 20)
		eventually(t, 30*time.Second, "it takes appends", func() error {
			must(t, others().Set(ctxFor(t, 20*time.Second), "to append", nil))
			_, last := away.s.wal.bounds()
			if at := c.leader(t).s.Status().LastIndex; last < at || last > at+1000 { // the tail is longer
				return fmt.Errorf("its log ends at %d (raft says %d) and the leader's at %d", last, away.s.raft.Load().LastIndex(), at)
			}
			return nil
		})
		if away.s.raft.Load() == before {
			t.Error("raft was not started anew, and the tail was to need it")
		}
		must(t, away.s.Set(ctxFor(t, 20*time.Second), "back", []byte(t.Name())))
		c.awaitEqual(t)
		away.stop()
		back(t)
	})
	t.Run("a snapshot that was held up does nothing", func(t *testing.T) {
		leader := c.leader(t)
		old, body, err := leader.s.snaps.Open(snapshotState)
		must(t, err)
		data := make([]byte, 0, old.Size)
		b := bytes.NewBuffer(data)
		_, err = b.ReadFrom(body)
		must(t, errors.Join(err, body.Close()))
		c.fill(t, "later", 100)
		c.awaitEqual(t)
		first, last := away.s.wal.bounds()
		install := away.s.store.meta().installed
		req := &raft.InstallSnapshotRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(leader.s.ident().id), Addr: []byte(leader.conf.Addr)}, SnapshotVersion: 1, Term: leader.s.Status().Term, Leader: []byte(leader.conf.Addr),
			LastLogIndex: old.Index, LastLogTerm: old.Term, Configuration: raft.EncodeConfiguration(old.Configuration),
			ConfigurationIndex: old.ConfigurationIndex, Size: old.Size}
		var resp raft.InstallSnapshotResponse
		tr := leader.s.peer.current.Load()
		must(t, tr.InstallSnapshot(raft.ServerID(away.s.ident().id), raft.ServerAddress(away.conf.Addr), req, &resp, b))
		if !resp.Success {
			t.Errorf("answered %+v", resp)
		}
		if f, l := away.s.wal.bounds(); f > first || l < last || away.s.store.meta().installed != install {
			t.Errorf("log of %d to %d, was %d to %d; last install %d", f, l, first, last, away.s.store.meta().installed)
		}
		c.awaitEqual(t)
	})
}

// Whoever has lost its file asks the members that its log names, be it in the first entry that is left.
func TestMembersThatTheLogNames(t *testing.T) {
	s := &Service{wal: nil}
	s.identity.Store(&identity{id: "self"})
	l, err := openLog(logOptions{dir: filepath.Join(t.TempDir(), "wal"), log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer l.close()
	s.wal = l
	of := func(ids ...string) []byte {
		var c raft.Configuration
		for _, id := range append(ids, "self") {
			c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id + ".test:1")})
		}
		return raft.EncodeConfiguration(c)
	}
	must(t, l.StoreLog(&raft.Log{Index: 5, Term: 1, Type: raft.LogConfiguration, Data: of("old", "both")}))
	appendTermStarts(t, l, 6, 1, 3)
	must(t, l.StoreLog(&raft.Log{Index: 9, Term: 1, Type: raft.LogConfiguration, Data: of("both", "new")}))
	list, err := s.loggedBases()
	must(t, err)
	if got := strings.Join(list, " "); got != "http://both.test:1 http://new.test:1 http://old.test:1" {
		t.Errorf("asks %s", got)
	}
}

// Raft that is started anew again and again is ended each time: two of them on one log would undo each other's entries.
func TestRaftIsRestartedTwice(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	for i := range 3 {
		old := s.raft.Load()
		s.restartRaft("a test")
		if state := old.State(); state != raft.Shutdown {
			t.Errorf("restart %d: the raft before it is a %v", i, state)
		}
		must(t, s.Ready(ctxFor(t, patience)))
		must(t, s.Set(ctxFor(t, patience), "k", nil))
	}
	who := s.ident()
	none := *who
	none.id = "" // raft refuses it
	s.identity.Store(&none)
	s.restartRaft("a test")
	s.identity.Store(who)
	if s.faults.first(faultRaft) == nil || s.Ready(ctxFor(t, 10*time.Millisecond)) == nil {
		t.Error("a raft that does not start is no fault")
	}
	s.restartRaft("a test")
	must(t, s.faults.first(faultRaft))
	must(t, s.Ready(ctxFor(t, patience)))
	must(t, s.Close())
	for range 30 { // of two channels that are ready a select takes any
		if s.restartRaft("a test"); s.starts.Load()%2 != 0 || s.faults.first(faultRaft) != nil {
			t.Fatal("raft is started on the files of a closed member")
		}
	}
}

// Raft that has run is in a later term than a directory in which it never did, and the only voter waits for nobody's vote.
func TestFirstTerms(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		s := openSole(t)
		must(t, s.Set(t.Context(), "k", nil))
		if d := time.Since(began); d >= heartbeatTimeout {
			t.Errorf("the first write took %v", d)
		}
		if term := s.raft.Load().CurrentTerm(); term != 2 {
			t.Errorf("raft is in term %d", term)
		}
	})
}

// Whoever opens an embedded store again after a crash finds in it what was acknowledged, though the file does not have it.
func TestOpenWaitsForItsOwnLog(t *testing.T) {
	t.Parallel()
	dir, _ := preparedDir(t)
	snap := filepath.Join(dir, "snap")
	old, err := os.ReadFile(snap)
	must(t, err)
	s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
	must(t, err)
	for range 50 {
		must(t, s.Set(t.Context(), "key1", make([]byte, 10<<10)))
	}
	must(t, s.Close())
	must(t, os.WriteFile(snap, old, 0o600))
	s, err = Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
	must(t, err)
	if v := s.Stale().Get("key1"); len(v) != 10<<10 {
		t.Errorf("%q", v)
	}
	must(t, s.Close())
}

// What is not ours in the snap of one of several members is refused: a clean copy is with the others.
func TestForeignSchemaOfOneOfSeveral(t *testing.T) {
	t.Parallel()
	dir, _ := preparedDir(t)
	snap := filepath.Join(dir, "snap")
	st := openTestStore(t, snap, -1)
	tx, err := st.begin()
	must(t, err)
	c := raft.DecodeConfiguration(tx.meta.config)
	c.Servers = append(c.Servers, raft.Server{ID: "b", Address: "127.0.0.1:1"})
	tx.meta.config = raft.EncodeConfiguration(c)
	tx.commit()
	must(t, st.close())
	shell(t, snap, "CREATE TABLE theirs(x)")
	s, err := Open(t.Context(), Config{Dir: dir, Addr: "127.0.0.1:1", Logger: testLogger(t)})
	if err == nil {
		s.Close()
	}
	is(t, err, ErrCorrupt, "theirs")
	shell(t, snap, "DROP TABLE theirs")
	s, err = Open(t.Context(), Config{Dir: dir, Addr: "127.0.0.1:1", Logger: testLogger(t)})
	must(t, err)
	must(t, s.Close())
}

// A member without its state that the others still take for the leader asks again, and not itself.
func TestFetchFromWhoTakesItForTheLeader(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()[headerProtocol] = []string{"1"}
		json.NewEncoder(w).Encode(statusAnswer{LeaderID: s.ident().id, LeaderAddr: "127.0.0.1:1"})
	}))
	defer other.Close()
	is(t, s.fetchFrom(t.Context(), other.URL, 1), ErrNoLeader)
}

// What uses the log beside raft does not wait for a disk that has failed, nor for a log that is closed: the store has parked its call.
func TestBesideRaft(t *testing.T) {
	t.Parallel()
	parked := func() (int, error) { select {} }
	broken := errors.New("the disk is broken")
	l := &logStore{sticky: broken, closed: make(chan struct{})}
	if _, err := besideRaft(ctxFor(t, patience), l, parked); !errors.Is(err, broken) {
		t.Errorf("a failed disk: %v", err)
	}
	l = &logStore{closed: make(chan struct{})}
	close(l.closed)
	if _, err := besideRaft(ctxFor(t, patience), l, parked); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed log: %v", err)
	}
}

// skipTerms makes the leader give up its office to a term far ahead, so that the terms between are nobody's.
func (c testCluster) skipTerms(t testing.TB) {
	t.Helper()
	l := c.leader(t)
	term := l.s.Status().Term + 10
	_, err := l.s.peer.current.Load().deliver(ctxFor(t, 10*time.Second), &raft.RequestVoteRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}, Term: term, LeadershipTransfer: true})
	must(t, err)
	eventually(t, 20*time.Second, "a leader of a later term", func() error {
		if now := c.leader(t).s.Status().Term; now < term {
			return fmt.Errorf("term %d", now)
		}
		return nil
	})
}

// strayLog gives a stopped member entries that it has from a leader of a term that nobody else knows.
func (c testCluster) strayLog(t *testing.T, m *testMember, n uint64) {
	t.Helper()
	term := c.leader(t).s.Status().Term + 5
	c.skipTerms(t)
	state, err := checkFile(filepath.Join(m.conf.Dir, "snap"))
	must(t, err)
	editLog(t, m.conf.Dir, func(l *logStore) {
		last, _ := l.last()
		appendLog(t, l, max(last, state.applied)+1, term, n) // a log is empty after an install
		must(t, l.SetUint64([]byte("CurrentTerm"), term))
	})
}

// kvSum is the hash of all rows, the part of a state's hash that a backup keeps.
func kvSum(hash string) string { return hash[:16] }

func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	w := startWriters(t, 4, func() *Service { return c[0].s })
	c.fill(t, "key", 200)
	file := filepath.Join(t.TempDir(), "backup")
	var saved meta
	t.Run("a backup under load is one moment", func(t *testing.T) {
		for i, m := range c {
			must(t, m.s.Set(ctxFor(t, 20*time.Second), "newest", fmt.Append(nil, i)))
			f, err := os.Create(file)
			must(t, err)
			revision, err := c[(i+1)%3].s.Backup(ctxFor(t, 20*time.Second), f)
			must(t, errors.Join(err, f.Close()))
			saved, err = checkFile(file)
			must(t, err)
			if saved.revision != revision {
				t.Errorf("revision %d, the file is at %d", revision, saved.revision)
			}
			if got := sqlite3(t, file, "select value from kv where key = 'newest'"); got != fmt.Sprint(i) {
				t.Errorf("a write that returned before is %q in the backup, want %d", got, i)
			}
			if got := sqlite3(t, file, "pragma integrity_check"); got != "ok" {
				t.Errorf("integrity_check: %s", got)
			}
		}
	})
	w.stop()
	t.Run("a file in use is refused", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "new")
		err := Restore(dir, c[0].snap())
		is(t, err, ErrLocked, "Backup")
		must(t, c[0].s.Set(ctxFor(t, 20*time.Second), "still", []byte("works")))
	})
	t.Run("a directory that holds a member is refused", func(t *testing.T) {
		dir, st := preparedDir(t)
		is(t, Restore(dir, file), ErrInvalid, "holds a member", "empty")
		s, err := Open(t.Context(), Config{Dir: dir})
		must(t, err)
		defer s.Close()
		if got := s.Status(); kvSum(got.Hash) != kvSum(st.Hash) {
			t.Error("it was changed")
		}
		is(t, Restore(dir, file), ErrLocked)
	})
	t.Run("something else is refused, and nothing half-made is left", func(t *testing.T) {
		flipped := filepath.Join(t.TempDir(), "flipped")
		data, err := os.ReadFile(file)
		must(t, err)
		must(t, os.WriteFile(flipped, data, 0o600))
		flipIn(t, flipped, "newest")
		other := filepath.Join(t.TempDir(), "other")
		sqlite3(t, other, "create table t(x)")
		for from, want := range map[string]error{flipped: ErrCorrupt, other: ErrFormat, filepath.Join(t.TempDir(), "none"): os.ErrNotExist} {
			dir := filepath.Join(t.TempDir(), "new")
			is(t, Restore(dir, from), want)
			for _, name := range []string{"id", "snap", "snap.restore"} {
				if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
					t.Errorf("%s is left", name)
				}
			}
			must(t, Restore(dir, file))
		}
	})
	t.Run("a new cluster, which the old one never takes for its own", func(t *testing.T) {
		m := newMember(t, "")
		must(t, Restore(m.conf.Dir, file))
		s := m.start()
		must(t, s.Ready(ctxFor(t, 20*time.Second)))
		st, old := s.Status(), c[0].s.Status()
		if fmt.Sprintf("%016x", saved.kvSum) != kvSum(st.Hash) || st.Revision <= saved.revision+1<<32 {
			t.Errorf("restored %s at %d, want %016x at more than %d", st.Hash, st.Revision, saved.kvSum, saved.revision+1<<32)
		}
		if st.ID == old.ID || st.Cluster == old.Cluster || len(st.Members) != 1 {
			t.Errorf("%+v after a restore from %+v", st, old)
		}
		must(t, s.Set(ctxFor(t, 20*time.Second), "restored only", nil))
		if r := s.Status().Revision; r != st.Revision+1 {
			t.Errorf("the next revision is %d, want %d", r, st.Revision+1)
		}
		// At the address of a member of the old cluster, which keeps calling it: see TestStrangerOfRestored.
		gone := c.follower(t)
		gone.stop()
		m.stop()
		m.conf.Addr = gone.conf.Addr
		log := newLogged("was restored")
		m.conf.Logger = slog.New(log)
		s = m.start()
		must(t, s.Ready(ctxFor(t, 20*time.Second)))
		eventually(t, 20*time.Second, "the old cluster calls", func() error {
			if len(log.all()) == 0 {
				return errors.New("no warning")
			}
			return nil
		})
		must(t, s.Err())
		for range 5 {
			must(t, c.leader(t).s.Set(ctxFor(t, 20*time.Second), "old only", nil))
			must(t, s.Set(ctxFor(t, 20*time.Second), "restored only", nil))
		}
		if v := s.Stale().Get("old only"); v != nil {
			t.Error("the old cluster's write is in the new one")
		}
		if v, err := c.leader(t).s.Get(ctxFor(t, 20*time.Second), "restored only"); v != nil || err != nil {
			t.Errorf("the new cluster's write is in the old one: %q, %v", v, err)
		}
		m.stop()
		gone.start()
		c.awaitVoters(t, 3)
	})
	t.Run("two of three directories are lost", func(t *testing.T) {
		c.fill(t, "last", 20)
		c.awaitEqual(t)
		want := c[0].s.Status()
		for _, m := range c {
			m.stop()
		}
		first := newMember(t, "")
		must(t, Restore(first.conf.Dir, c[2].snap()))
		first.start()
		revision := first.s.Status().Revision
		grown := testCluster{first}
		for range 2 {
			m := newMember(t, first.conf.Addr)
			must(t, first.s.AddAllowedMember(ctxFor(t, 20*time.Second), m.conf.Addr))
			m.start()
			grown = append(grown, m)
		}
		grown.awaitVoters(t, 3)
		grown.awaitEqual(t)
		if got := grown[2].s.Status(); kvSum(got.Hash) != kvSum(want.Hash) || got.Revision != revision || revision <= want.Revision {
			t.Errorf("%s at %d, want %s at %d, which was at %d", got.Hash, got.Revision, want.Hash, revision, want.Revision)
		}
		must(t, grown[1].s.Set(ctxFor(t, 20*time.Second), "on", nil))
		grown.leader(t).stop()
		must(t, grown.follower(t).s.Set(ctxFor(t, 20*time.Second), "and on", nil))
	})
}
