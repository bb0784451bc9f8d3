package quorate

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"modernc.org/sqlite"
)

// anotherDriver reads snap once as a SQLite of its own in this process does, another driver or another copy of this one. It knows nothing of
// this one's locks, and the system shows it no lock of its own process but those of an open file: it takes itself for the first user of
// snap-shm and cuts that, and for the last one of snap-wal and removes it. Closing its files drops the locks of the whole process.
func anotherDriver(path string) (first, last bool, err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
	}()
	for _, name := range []string{path, path + "-shm", path + "-wal"} {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return false, false, err
		}
		files = append(files, f)
	}
	lock := func(f *os.File, command int, kind int16, start, length int64) (free bool, err error) {
		l := syscall.Flock_t{Type: kind, Whence: io.SeekStart, Start: start, Len: length}
		err = syscall.FcntlFlock(f.Fd(), command, &l)
		if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) {
			return false, nil
		}
		return l.Type == syscall.F_UNLCK || command != syscall.F_GETLK, err
	}
	db, shm := files[0], files[1]
	if _, err := lock(db, syscall.F_SETLK, syscall.F_RDLCK, sharedFirst, sharedSize); err != nil {
		return false, false, err
	}
	if first, err = lock(shm, syscall.F_GETLK, syscall.F_WRLCK, deadSwitch, 1); err != nil {
		return false, false, err
	}
	if first {
		if err := shm.Truncate(3); err != nil {
			return first, false, err
		}
	}
	if _, err := db.ReadAt(make([]byte, pageSize), 0); err != nil {
		return first, false, err
	}
	if last, err = lock(db, syscall.F_SETLK, syscall.F_WRLCK, sharedFirst, sharedSize); err != nil || !last {
		return first, last, err
	}
	return first, last, errors.Join(os.Remove(path+"-wal"), os.Remove(path+"-shm"))
}

// Another SQLite in the program takes itself for neither the first nor the last user, and after it no shell does.
func TestAnotherDriverOpensSnap(t *testing.T) {
	t.Parallel()
	m := newMember(t, "")
	s := m.start()
	if g, err := guardLocks(m.snap()); err != nil {
		g.close()
		t.Skip("this file system has no locks of an open file:", err)
	} else {
		g.close() // which drops the locks of this process, too
	}
	for i := range 60 {
		must(t, s.Set(ctxFor(t, patience), fmt.Sprint("k", i), make([]byte, 3000)))
		if i%20 != 0 {
			continue
		}
		first, last, err := anotherDriver(m.snap())
		if must(t, err); first || last {
			t.Fatalf("it takes itself for the first user: %v, and for the last: %v", first, last)
		}
		sqlite3(t, m.snap(), "select count(*) from kv")
		if must(t, s.store.seated()); s.store.seat.Load() != 0 {
			t.Error("there was something to mend")
		}
	}
	must(t, s.Err())
	m.stop()
	if meta, err := checkFile(m.snap()); err != nil || meta.keys != 60 {
		t.Errorf("%d keys, %v", meta.keys, err)
	}
}

// Where there are no locks of an open file, as on other systems than Linux, a connection may be opened beside a snap-wal that was made anew:
// it reads less there than the index says. That is no failure of the disk, and counts for nothing once the file is in place again.
func TestShortReadOfALostWAL(t *testing.T) {
	s := newTestStore(t, testBudget)
	fill(t, s, 100, 100)
	must(t, s.flush())
	s.unguard()
	must(t, os.Remove(s.path+"-wal"))
	must(t, os.WriteFile(s.path+"-wal", nil, 0o600))
	c, err := openConn(s.path, "mode=rw", "wal_autocheckpoint=0")
	if err == nil {
		_, err = c.one(qUserVersion)
	}
	if c != nil {
		defer c.close()
	}
	const shortRead = sqliteIOErr | 2<<8
	if e := new(sqlite.Error); !errors.As(err, &e) || e.Code() != shortRead || !isIO(err) {
		t.Fatalf("it reads %v, want a short read", err)
	}
	s.note(err)
	if failed := s.failed.Load(); failed != nil {
		t.Fatalf("the disk has failed: %v", *failed)
	}
	must(t, s.reseat())
	must(t, s.barrier())
	if it, err := s.writer.get("key/0000001"); err != nil || it == nil {
		t.Errorf("%v, %v", it, err)
	}
	s.note(err) // with all names in place it is one
	if s.failed.Load() == nil {
		t.Error("a read that is short for no known reason is passed over")
	}
}

// What a file takes the place of snap by is durable step by step: its bytes before it has its second name, and each name before what
// that name replaces is gone. The calls of the kernel are read in a run of TestKilledWhilePlacing.
func TestPlacingIsDurable(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("no strace")
	}
	dir := quickDir(t)
	out, data := filepath.Join(dir, "trace"), filepath.Join(dir, "data")
	cmd := exec.Command(strace, "-f", "-qq", "-y", "-o", out, "-e", "trace=pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat", os.Args[0],
		"-test.run=^TestKilledWhilePlacing$")
	cmd.Env = append(os.Environ(), placeEnv+"=installed "+data)
	said, _ := cmd.CombinedOutput()
	if !strings.Contains(string(said), "killed at installed") {
		t.Skipf("strace does not work here: %s", said)
	}
	trace, err := os.ReadFile(out)
	must(t, err)
	steps := [][]string{
		{"sync(", "<" + data + "/snap.incoming>"},
		{"rename", data + `/snap.incoming"`, data + `/snap.mended"`},
		{"sync(", "<" + data + ">"},
		{"unlink", data + `/snap-wal"`},
		{"rename", data + `/snap.mended"`, data + `/snap"`},
		{"sync(", "<" + data + ">"},
	}
	done := 0
	for line := range strings.Lines(string(trace)) {
		if done == 1 && holdsAll(line, []string{"pwrite64(", "<" + data + "/snap.incoming>"}) {
			done = 0 // what was synced is not all
		}
		if done < len(steps) && holdsAll(line, steps[done]) {
			done++
			continue
		}
		for _, later := range steps[min(done, len(steps)):] {
			if later[0] != "sync(" && holdsAll(line, later) {
				t.Fatalf("before %q: %s", steps[done], line)
			}
		}
	}
	if done < len(steps) {
		t.Errorf("%q did not happen", steps[done])
	}
}

func holdsAll(line string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(line, part) {
			return false
		}
	}
	return true
}
