package quorate

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// fullDir is the directory of a running member with so little state that all of it is in the write-ahead log.
func fullDir(t *testing.T, dir string) *Service {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
	must(t, err)
	t.Cleanup(func() { s.Close() })
	for i := range 20 {
		must(t, s.Set(t.Context(), fmt.Sprint("key", i), []byte("value")))
	}
	must(t, s.store.sync(t.Context()))
	return s
}

// killed is a copy of a running member's directory, as a kill leaves it. Nobody writes meanwhile.
func killed(t *testing.T, s *Service) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "killed")
	must(t, s.store.sync(t.Context()))
	tool(t, "cp", "-r", s.conf.Dir, dir)
	return dir
}

// wantRestored opens what a Restore has made and finds the 20 keys there.
func wantRestored(t *testing.T, dir string) (revision uint64) {
	t.Helper()
	wantOnly(t, dir, "id", "snap", "wal")
	s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
	must(t, err)
	defer s.Close()
	must(t, s.Ready(ctxFor(t, patience)))
	n := 0
	for e, err := range s.List(ctxFor(t, patience), "key") {
		if must(t, err); string(e.Value) == "value" {
			n++
		}
	}
	if n != 20 {
		t.Errorf("%d of 20 keys are restored", n)
	}
	return s.Status().Revision
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func linkTo(t *testing.T, to, name string) string {
	t.Helper()
	must(t, os.Symlink(to, name))
	return name
}

// A file that is in use is refused under every name, and nothing of it is touched: closing it would take SQLite's locks away, and
// then the next shell that closes it removes its log.
func TestRestoreOfALiveFile(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	s := fullDir(t, in("d"))
	snap := in("d/snap")
	tool(t, "cp", snap, in("alone"))
	must(t, os.Link(snap, in("hard")))
	must(t, os.Link(snap, in("d/hard")))
	relative := linkTo(t, "d/snap", in("relative"))
	for name, from := range map[string]string{
		"its name":                 snap,
		"a link":                   linkTo(t, snap, in("latest")),
		"a relative link":          relative,
		"a link to a link":         linkTo(t, relative, in("twice")),
		"a link to its directory":  filepath.Join(linkTo(t, in("d"), in("current")), "snap"),
		"another name of the file": in("hard"),
		"another name beside its":  in("d/hard"),
		"a link to another name":   linkTo(t, in("hard"), in("to-hard")),
		"a copy of the file alone": in("alone"),
		"a link to that":           linkTo(t, in("alone"), in("to-alone")),
		"a way round":              in("d/wal/../snap"),
	} {
		to := filepath.Join(t.TempDir(), "new")
		err := Restore(to, from)
		want, words := ErrLocked, "Backup"
		if strings.Contains(from, "alone") {
			want, words = ErrInvalid, "vacuum into"
		}
		if !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), words) {
			t.Errorf("by %s: %v", name, err)
		}
		if _, err := os.Lstat(to); err == nil {
			t.Errorf("by %s: a refused Restore has made its directory", name)
		}
	}
	tool(t, "sqlite3", snap, "select count(*) from kv") // not read-only: as the last one to close the file it would remove the log
	if _, err := os.Stat(snap + "-wal"); err != nil {
		t.Error("the locks on the file are lost: ", err)
	}
	must(t, s.Set(t.Context(), "still", []byte("works")))
	must(t, s.Close())
	must(t, Restore(in("closed"), in("twice")))
	wantRestored(t, in("closed"))
}

// A member whose snap is a link to another disk keeps its log there, and its locks here.
func TestRestoreOfALinkedSnap(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	must(t, fullDir(t, in("d")).Close())
	must(t, os.Mkdir(in("disk"), 0o700))
	must(t, os.Rename(in("d/snap"), in("disk/state.db")))
	linkTo(t, in("disk/state.db"), in("d/snap"))
	s := fullDir(t, in("d"))
	if size := s.store.walSize(); size == 0 {
		t.Error("the size of the write-ahead log is not seen")
	}
	for _, from := range []string{in("d/snap"), in("disk/state.db"), linkTo(t, in("d/snap"), in("latest"))} {
		is(t, Restore(in("new"), from), ErrLocked, "Backup")
	}
	dir := killed(t, s) // its snap leads to the live file, which no other process could know
	must(t, os.Remove(filepath.Join(dir, "snap")))
	must(t, os.Mkdir(in("disk2"), 0o700))
	tool(t, "cp", in("disk/state.db"), in("disk/state.db-wal"), in("disk2"))
	linkTo(t, in("disk2/state.db"), filepath.Join(dir, "snap"))
	lock := mustLock(t, dir)
	is(t, Restore(in("new"), linkTo(t, filepath.Join(dir, "snap"), in("other"))), ErrLocked, "Backup", "a.example:1")
	mustUnlock(t, lock)
	must(t, Restore(in("new"), in("other")))
	wantRestored(t, in("new"))
	must(t, s.Close())
	wantOnly(t, in("disk"), "state.db")
}

// What a killed member has left is whole with its log, by whatever name, also where that is empty because a checkpoint has just cut it.
func TestRestoreOfAKilledMember(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	s := fullDir(t, filepath.Join(base, "d"))
	dir := killed(t, s)
	s.store.fileMu.Lock()
	_, err := s.store.writer.one(qTruncate)
	s.store.fileMu.Unlock()
	must(t, err)
	cut := killed(t, s)
	if info, err := os.Stat(filepath.Join(cut, "snap-wal")); err != nil || info.Size() != 0 {
		t.Fatalf("the log is not empty: %v, %v", info, err)
	}
	must(t, os.Remove(filepath.Join(cut, "snap-shm")))
	for i, from := range []string{
		filepath.Join(dir, "snap"), linkTo(t, filepath.Join(dir, "snap"), filepath.Join(base, "latest")), filepath.Join(cut, "snap"),
		filepath.Join(killed(t, s), "snap"), // with an empty log and what SQLite shares in memory
	} {
		real, err := filepath.EvalSymlinks(from)
		must(t, err)
		before := tree(t, filepath.Dir(real))
		to := filepath.Join(base, fmt.Sprint("new", i))
		must(t, Restore(to, from))
		if now := tree(t, filepath.Dir(real)); now != before {
			t.Errorf("the source was\n%sand is\n%s", before, now)
		}
		wantRestored(t, to)
	}
}

// What the refusal of a file in WAL mode without its log advises, helps.
func TestRestoreSaysTheWaysOut(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	s := fullDir(t, in("d"))
	refused := func(from, to string) {
		t.Helper()
		is(t, Restore(in(to), in(from)), ErrInvalid, `sqlite3 -readonly snap "vacuum into 'copy'"`, "with Backup", `sqlite3 copy "pragma journal_mode=delete"`)
	}
	restored := func(from, to string) {
		t.Helper()
		must(t, Restore(in(to), in(from)))
		wantRestored(t, in(to))
	}
	sqlite3(t, "-readonly", in("d/snap"), "vacuum into '"+in("vacuum")+"'")
	restored("vacuum", "from vacuum")
	sqlite3(t, "-readonly", in("d/snap"), ".backup "+in("copy"))
	refused("copy", "from copy")
	sqlite3(t, in("copy"), "pragma journal_mode=delete")
	restored("copy", "from copy")

	reader, err := openReader(in("d/snap"))
	must(t, err)
	must(t, reader.exec(qBeginRead))
	_, err = reader.one(qUserVersion)
	must(t, err)
	must(t, s.Close()) // it can't leave WAL mode
	must(t, errors.Join(reader.pragma("query_only=OFF"), reader.keepWAL(false)))
	must(t, reader.close())
	if _, err := os.Stat(in("d/snap-wal")); err == nil {
		t.Fatal("the last reader has left the log")
	}
	refused("d/snap", "from closed")
	sqlite3(t, "-readonly", in("d/snap"), "vacuum into '"+in("vacuum2")+"'")
	restored("vacuum2", "from vacuum2")
	tool(t, "cp", in("d/snap"), in("copy2"))
	sqlite3(t, in("copy2"), "pragma journal_mode=delete")
	restored("copy2", "from closed")
}

// A Restore that is refused leaves its target as it was.
func TestRefusedRestoreLeavesTheTarget(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	s := fullDir(t, in("d"))
	f, err := os.Create(in("good"))
	must(t, err)
	_, err = s.Backup(t.Context(), f)
	must(t, errors.Join(err, f.Close()))
	s.store.fileMu.Lock()
	_, err = s.store.writer.one(qTruncate)
	s.store.fileMu.Unlock()
	must(t, err)
	tool(t, "cp", in("d/snap"), in("flipped too"))
	flipIn(t, in("flipped too"), "key7")
	must(t, os.WriteFile(in("flipped too-wal"), nil, 0o600))
	tool(t, "cp", in("good"), in("flipped"))
	flipIn(t, in("flipped"), "key7")
	must(t, os.WriteFile(in("other"), []byte("no database"), 0o600))
	must(t, os.Mkdir(in("folder"), 0o700))
	targets := map[string]func(t *testing.T, dir string){
		"missing": func(t *testing.T, dir string) {},
		"empty":   func(t *testing.T, dir string) { must(t, os.Mkdir(dir, 0o750)) },
		"begun":   func(t *testing.T, dir string) { mustUnlock(t, mustLock(t, dir)); seed(t, dir, 7) },
		"with something else": func(t *testing.T, dir string) {
			putFile(t, filepath.Join(dir, "notes"), "mine")
			putFile(t, filepath.Join(dir, "wal", "notes"), "mine")
		},
	}
	for name, prepare := range targets {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new")
			if name == "missing" {
				dir = filepath.Join(t.TempDir(), "a", "b", "new")
			}
			prepare(t, dir)
			before := ""
			if name != "missing" {
				before = tree(t, dir)
			}
			for from, want := range map[string]error{"flipped": ErrCorrupt, "flipped too": ErrCorrupt, "other": ErrCorrupt, "folder": ErrInvalid, "none": os.ErrNotExist, "d/snap": ErrLocked} {
				err := Restore(dir, in(from))
				if !errors.Is(err, want) {
					t.Errorf("from %s: %v, want %v", from, err, want)
				}
				after := ""
				if _, err := os.Lstat(dir); err == nil {
					after = tree(t, dir)
				}
				if after != before {
					t.Errorf("from %s: the target was\n%sand is\n%s", from, before, after)
				}
				if _, err := os.Lstat(filepath.Dir(filepath.Dir(dir))); name == "missing" && err == nil {
					t.Errorf("from %s: directories above the target are left", from)
				}
			}
			must(t, Restore(dir, in("good")))
		})
	}
}

func seed(t *testing.T, dir string, term uint64) (was uint64) {
	t.Helper()
	was, err := seedTerm(filepath.Join(dir, "wal"), term)
	must(t, err)
	return was
}

// A Restore that fails at its last step puts back who was about to join, or to begin, and its term.
func TestFailedRestorePutsTheIdentityBack(t *testing.T) {
	t.Parallel()
	from := filepath.Join(t.TempDir(), "copy")
	s := fullDir(t, filepath.Join(t.TempDir(), "d"))
	f, err := os.Create(from)
	must(t, err)
	_, err = s.Backup(t.Context(), f)
	must(t, errors.Join(err, f.Close()))
	for _, want := range writtenIdentities[:2] {
		dir := filepath.Join(t.TempDir(), "new")
		mustUnlock(t, mustLock(t, dir))
		must(t, writeIdentity(dir, want))
		seed(t, dir, 1)
		snap := filepath.Join(dir, "snap")
		if err := restore(dir, from, func() time.Time {
			must(t, os.Mkdir(snap, 0o700)) // it is in the way of the rename
			return time.Now()
		}); err == nil {
			t.Fatal("no error")
		}
		if got, ok, err := readIdentity(dir); got != want || !ok || err != nil {
			t.Errorf("id was %+v and is %+v, %v", want, got, err)
		}
		if was := seed(t, dir, 1); was != 1 {
			t.Errorf("the term is %d", was)
		}
		if got := names(t, dir); got != "id wal" {
			t.Errorf("directory holds %s", got)
		}
		must(t, restore(dir, from, time.Now))
		wantRestored(t, dir)
	}
}

// restoreAt is Restore at a time.
func restoreAt(t *testing.T, dir, from string, at time.Time) uint64 {
	t.Helper()
	must(t, restore(dir, from, func() time.Time { return at }))
	m, err := checkFile(filepath.Join(dir, "snap"))
	must(t, err)
	if m.base != m.revision || m.oldest() != m.revision {
		t.Errorf("revision %d, and the history begins at %d (%d)", m.revision, m.base, m.oldest())
	}
	return m.revision
}

func TestRevisionAfterRestore(t *testing.T) {
	t.Parallel()
	at := func(text string) time.Time {
		at, err := time.Parse(time.RFC3339Nano, text)
		must(t, err)
		return at
	}
	for _, c := range []struct {
		old  uint64
		now  time.Time
		want uint64
	}{
		{20, at("2020-01-01T00:00:01Z"), 1 << 21},
		{20, at("2020-01-01T00:00:01.5Z"), 3 << 20},
		{20, at("2020-01-01T00:00:00.0001Z"), 209},
		{20, at("2020-01-01T02:00:01+02:00"), 1 << 21},
		{20, at("2026-11-29T01:00:00.25Z"), 218077200<<21 + 1<<19},
		{1 << 21, at("2020-01-01T00:00:01Z"), 1<<21 + 1<<32}, // not greater
		{1<<21 - 1, at("2020-01-01T00:00:01Z"), 1 << 21},
		{20, at("2019-12-31T23:59:59Z"), 20 + 1<<32},
		{20, at("1970-01-01T00:00:00Z"), 20 + 1<<32},
		{1 << 52, at("2026-11-29T01:00:00Z"), 1<<52 + 1<<32},
	} {
		if got := revisionAfter(c.old, c.now); got != c.want {
			t.Errorf("after %d at %v: %d, want %d", c.old, c.now, got, c.want)
		}
	}
	if end := revisionAfter(0, at("2156-01-01T00:00:00Z")); end >= 1<<53 || end < 1<<52 {
		t.Errorf("in 2156 it is %d", end)
	}
}

// No revision that anybody may have from the old cluster, or from another restore of the same file, is given out again.
func TestRestoreGivesNoRevisionTwice(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	s := fullDir(t, in("d"))
	backup := func(s *Service, name string) uint64 {
		t.Helper()
		f, err := os.Create(in(name))
		must(t, err)
		r, err := s.Backup(t.Context(), f)
		must(t, errors.Join(err, f.Close()))
		return r
	}
	first := backup(s, "first")
	for range 10 { // tokens that nobody remembers after the restore
		must(t, s.Set(t.Context(), "token", nil))
	}
	given := s.Status().Revision
	begin := time.Now()
	if r := restoreAt(t, in("r1"), in("first"), begin); r <= given || r != revisionAfter(first, begin) {
		t.Errorf("after %d it begins at %d", given, r)
	}
	r1, err := Open(t.Context(), Config{Dir: in("r1")})
	must(t, err)
	defer r1.Close()
	start := r1.Status().Revision
	must(t, r1.Set(ctxFor(t, patience), "token", nil))
	e, err := r1.Lookup(ctxFor(t, patience), "token")
	must(t, err)
	if e.Version != start+1 || e.Created != start+1 {
		t.Errorf("the first write after %d has version %d", start, e.Version)
	}
	if e, err := r1.Lookup(ctxFor(t, patience), "key3"); err != nil || e.Version != 4 || e.Created != 4 {
		t.Errorf("an entry of the backup is %+v, %v", e, err)
	}

	second := backup(r1, "second") // soon after: 2^32 is more than what has passed since
	a := restoreAt(t, in("r2"), in("second"), begin.Add(time.Second))
	b := restoreAt(t, in("r3"), in("second"), begin.Add(time.Second+time.Millisecond))
	c := restoreAt(t, in("r4"), in("first"), begin.Add(time.Second+2*time.Millisecond))
	if list := []uint64{given, start, second, a, b, c}; !slices.IsSorted(list) || len(slices.Compact(list)) != 6 {
		t.Errorf("the restores begin at %v", list)
	}
	if r := restoreAt(t, in("r5"), in("second"), begin.Add(-time.Hour)); r != second+1<<32 {
		t.Errorf("with a clock set back it begins at %d, want %d", r, second+1<<32)
	}

	for since, want := range map[uint64]error{1: ErrCompacted, first: ErrCompacted, given: ErrCompacted, start - 1: ErrCompacted, start: nil} {
		for e, err := range r1.Watch(ctxFor(t, patience), "", since) {
			if !errors.Is(err, want) || err == nil && e.Revision != start+1 {
				t.Errorf("a watch since %d: %+v, %v", since, e, err)
			}
			break
		}
		var gone *CompactedError
		for _, err := range r1.Watch(ctxFor(t, patience), "", since) {
			if errors.As(err, &gone) && gone.Oldest != start {
				t.Errorf("the oldest to resume from is %d, want %d", gone.Oldest, start)
			}
			break
		}
		for e, err := range r1.Watch(ctxFor(t, patience), "", since, Resync()) {
			if must(t, err); (e.Kind == EventReset) != (want != nil) {
				t.Errorf("a watch since %d with Resync begins with %v", since, e)
			}
			break
		}
	}
	if got := sqlite3(t, "-readonly", filepath.Join(in("r4"), "snap"), "select count(*) from history"); got != "0" {
		t.Errorf("%s changes are in the history of a restored state", got)
	}
}

// A state in which nothing ever was begins nowhere else.
func TestRestoreOfAStateThatNeverBegan(t *testing.T) {
	t.Parallel()
	dir, to := t.TempDir(), filepath.Join(t.TempDir(), "new")
	must(t, createFile(filepath.Join(dir, "snap")))
	must(t, Restore(to, filepath.Join(dir, "snap")))
	s, err := Open(t.Context(), Config{Dir: to})
	must(t, err)
	defer s.Close()
	must(t, s.Set(t.Context(), "k", nil))
	if r := s.Status().Revision; r != 1 {
		t.Errorf("its first write has revision %d", r)
	}
}

// The files of every release and of every format that there was are taken.
func TestRestoreOfAnOldFile(t *testing.T) {
	t.Parallel()
	for version, g := range goldens {
		t.Run(version, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "new")
			before := time.Now()
			must(t, Restore(to, filepath.Join(goldenDir(version), "snap")))
			s, err := Open(t.Context(), Config{Dir: to})
			must(t, err)
			defer s.Close()
			must(t, s.Ready(ctxFor(t, patience)))
			start := s.Status().Revision
			if low, high := revisionAfter(g.revision, before), revisionAfter(g.revision, time.Now()); start < low || start > high {
				t.Errorf("it begins at %d, want %d to %d", start, low, high)
			}
			for _, want := range g.rows {
				e, err := s.Lookup(ctxFor(t, patience), want.key)
				if want.value == nil && errors.Is(err, ErrNotFound) {
					continue
				}
				if err != nil || e.Version != want.version || e.Created != want.created || !bytes.Equal(e.Value, want.value) {
					t.Errorf("%s is %+v, %v; want version %d, created %d", want.key, e, err, want.version, want.created)
				}
			}
			eventually(t, patience, "the newest format", func() error {
				if m := s.store.meta(); m.format != entryFormat || m.keep != defaultHistory || m.base != start {
					return fmt.Errorf("format %d, %d changes from %d, it began at %d", m.format, m.keep, m.base, start)
				}
				return nil
			})
			for e, err := range s.Watch(ctxFor(t, patience), "", g.revision) {
				if is(t, err, ErrCompacted); e.Kind != 0 {
					t.Errorf("a watch from the old state begins with %v", e)
				}
			}
			must(t, s.Set(ctxFor(t, patience), "new", nil))
			for e, err := range s.Watch(ctxFor(t, patience), "new", start) {
				if must(t, err); e.Revision != start+1 {
					t.Errorf("the first event is %+v", e)
				}
				break
			}
		})
	}
}

// A live file under a name beside which nothing says so is seen to change while it is copied.
func TestRestoreOfAFileThatChanges(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	var dir string
	live := fullDir(t, filepath.Join(base, "d"))
	eventually(t, patience, "a log beside the file", func() error {
		dir = killed(t, live)
		if info, err := os.Stat(filepath.Join(dir, "snap-wal")); err != nil || info.Size() > 0 {
			return err
		}
		must(t, live.Set(t.Context(), "again", nil))
		return errors.New("it was just emptied")
	})
	must(t, os.RemoveAll(filepath.Join(dir, "wal")))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				os.Chtimes(filepath.Join(dir, "snap-wal"), time.Time{}, time.Unix(int64(i), 0))
			}
		}
	}()
	n := 0
	eventually(t, patience, "a refusal", func() error {
		n++
		err := Restore(filepath.Join(base, fmt.Sprint("new", n)), filepath.Join(dir, "snap"))
		if err == nil {
			return errors.New("it was restored")
		}
		is(t, err, ErrLocked, "has changed", "Backup")
		return nil
	})
	close(stop)
	<-stopped
	must(t, Restore(filepath.Join(base, "quiet"), filepath.Join(dir, "snap")))
}

// A lone member goes on beside what another program has put into snap. So its backup, and its file, are taken without that.
func TestRestoreLeavesOutWhatIsNotOurs(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	s := fullDir(t, filepath.Join(base, "d"))
	sqlite3(t, s.store.path, `CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER); INSERT INTO _litestream_seq VALUES (1, 1);
		CREATE TABLE _litestream_lock (id INTEGER UNIQUE); CREATE INDEX "their ""own" ON _litestream_seq (seq); CREATE INDEX values_of ON kv (value);
		CREATE VIEW look AS SELECT * FROM _litestream_seq; CREATE VIRTUAL TABLE words USING fts5(a); INSERT INTO words VALUES ('x'); ANALYZE`)
	eventually(t, patience, "Err names it", func() error {
		if err := s.Err(); err == nil || !strings.Contains(err.Error(), `DROP TABLE IF EXISTS "_litestream_seq"`) {
			return fmt.Errorf("Err is %v", err)
		}
		return nil
	})
	must(t, s.Set(t.Context(), "after", nil))
	backup := func(name string) string {
		f, err := os.Create(filepath.Join(base, name))
		must(t, err)
		_, err = s.Backup(t.Context(), f)
		must(t, errors.Join(err, f.Close()))
		return f.Name()
	}
	of := map[string]string{"a backup": backup("backup"), "a killed member's": filepath.Join(killed(t, s), "snap")}
	must(t, s.Close())
	of["a closed member's"] = s.store.path
	was, err := os.ReadFile(s.store.path)
	must(t, err)
	for name, from := range of {
		to := filepath.Join(t.TempDir(), "new")
		if err := Restore(to, from); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := checkFile(filepath.Join(to, "snap")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantRestored(t, to)
	}
	if is, err := os.ReadFile(s.store.path); err != nil || !bytes.Equal(is, was) {
		t.Error("the file that was restored has changed", err)
	}
	sqlite3(t, s.store.path, "CREATE TRIGGER t AFTER DELETE ON quorate_allowed BEGIN DELETE FROM kv; END") // would run at what Restore removes
	wantRestored(t, func() string { to := filepath.Join(t.TempDir(), "new"); must(t, Restore(to, s.store.path)); return to }())
	sqlite3(t, s.store.path, "CREATE TABLE quorate_next (a)")
	if err := Restore(filepath.Join(base, "none"), s.store.path); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), `DROP TABLE IF EXISTS "quorate_next"`) {
		t.Errorf("a name of ours: %v", err)
	}
	sqlite3(t, s.store.path, "DROP TABLE quorate_next; CREATE TRIGGER u AFTER UPDATE ON kv BEGIN DELETE FROM kv; END; UPDATE kv SET version = version WHERE key = 'key1'")
	if err := Restore(filepath.Join(base, "none"), s.store.path); !errors.Is(err, ErrCorrupt) {
		t.Errorf("after a trigger: %v", err)
	}
}

// What a start that was cut short has left is taken, and after a Restore that fails at its last step every byte of it is there again.
func TestFailedRestoreLeavesEveryByte(t *testing.T) {
	t.Parallel()
	s := fullDir(t, filepath.Join(t.TempDir(), "d"))
	must(t, s.Close())
	segments := func(dir string) []string {
		list, err := filepath.Glob(filepath.Join(dir, "wal", "*.wal"))
		must(t, err)
		return list
	}
	for name, prepare := range map[string]func(dir string){
		"a log without entries":         func(dir string) { seed(t, dir, 1) },
		"a log without a segment":       func(dir string) { seed(t, dir, 3); must(t, os.Remove(segments(dir)[0])) },
		"an empty segment":              func(dir string) { seed(t, dir, 2); must(t, os.Truncate(segments(dir)[0], 0)) },
		"who is about to join":          func(dir string) { must(t, writeIdentity(dir, writtenIdentities[0])); seed(t, dir, 1) },
		"who has an id and no log":      func(dir string) { must(t, writeIdentity(dir, writtenIdentities[0])) },
		"what an install has left":      func(dir string) { seed(t, dir, 1); putFile(t, filepath.Join(dir, "snap.incoming"), "half") },
		"what another Restore has left": func(dir string) { putFile(t, filepath.Join(dir, "snap.source-wal"), "half") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new")
			mustUnlock(t, mustLock(t, dir))
			prepare(dir)
			before := bytesIn(t, dir)
			snap := filepath.Join(dir, "snap")
			if err := restore(dir, s.store.path, func() time.Time {
				must(t, os.Mkdir(snap, 0o700)) // it is in the way of the rename
				return time.Now()
			}); err == nil {
				t.Fatal("no error")
			}
			for path, was := range before {
				if is := bytesIn(t, dir)[path]; is != was {
					t.Errorf("%s: it was %s and is %s", path, was, is)
				}
			}
			if after := bytesIn(t, dir); len(after) != len(before) {
				t.Errorf("there were %d files and are %v", len(before), after)
			}
			must(t, restore(dir, s.store.path, time.Now))
			wantRestored(t, dir)
		})
	}
}

// An image with nothing but a program has no directory for temporary files.
func TestRestoreWithoutTemporaryFiles(t *testing.T) {
	from, dir := filepath.Join(t.TempDir(), "d"), filepath.Join(t.TempDir(), "new")
	must(t, fullDir(t, from).Close())
	mustUnlock(t, mustLock(t, dir))
	seed(t, dir, 1)
	t.Setenv("TMPDIR", filepath.Join(from, "missing"))
	must(t, restore(dir, filepath.Join(from, "snap"), time.Now))
	t.Setenv("TMPDIR", "")
	wantRestored(t, dir)
}

func bytesIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	must(t, filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil || fi.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		all[strings.TrimPrefix(path, dir)] = fmt.Sprintf("%d bytes %.8x", len(data), sha256.Sum256(data))
		return err
	}))
	return all
}
