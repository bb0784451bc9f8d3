package quorate

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
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
	must(t, tx.commit())
	must(t, st.close())
}

// Which file and which log go on together, with A applied, I the last install, and a log of F to L.
func TestStartRule(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string, applied uint64)
		words  []string // of ErrCorrupt; none: it opens, with everything in it
	}{
		{"as it was closed", func(*testing.T, string, uint64) {}, nil},
		{"the log is longer", func(t *testing.T, dir string, a uint64) {
			// Nothing but the file decides what is applied, so the entries above are applied now.
			editLog(t, dir, func(l *logStore) { appendLog(t, l, a+1, 9, 3) })
		}, nil},
		{"the log begins right after the file", func(t *testing.T, dir string, a uint64) {
			editLog(t, dir, func(l *logStore) { appendLog(t, l, a+1, 9, 3); must(t, l.DeleteRange(1, a)) })
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
		{"files of a transfer that was cut off", func(t *testing.T, dir string, a uint64) {
			for _, name := range []string{"snap.incoming", "snap.rebuild", "snap.incoming-journal", "snap.rebuild-wal", "snap.restore"} {
				must(t, os.WriteFile(filepath.Join(dir, name), []byte("half"), 0o600))
			}
		}, nil},
		{"no id", func(t *testing.T, dir string, a uint64) {
			must(t, os.Remove(filepath.Join(dir, "id")))
		}, []string{"snap is there", "id is missing", "put id back"}},
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
