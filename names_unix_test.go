//go:build unix

package quorate

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
)

// A member whose files are removed or replaced acknowledges nothing more that it can't keep, says so in Err and in one line, and ends
// well.
func TestFilesRemovedUnderMember(t *testing.T) {
	move := func(t *testing.T, dir, name string) {
		must(t, os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".moved")))
	}
	for what, remove := range map[string]func(t *testing.T, dir string){
		"the directory":    func(t *testing.T, dir string) { must(t, os.RemoveAll(dir)) },
		"moved away":       func(t *testing.T, dir string) { must(t, os.Rename(dir, dir+".moved")) },
		"snap and its log": func(t *testing.T, dir string) { removeAll(t, dir, "snap*") },
		"the log":          func(t *testing.T, dir string) { removeAll(t, dir, "wal/*.wal") },
		"id":               func(t *testing.T, dir string) { move(t, dir, "id") },
		"the votes":        func(t *testing.T, dir string) { move(t, dir, "wal/wal-meta.db") },
		"the lock":         func(t *testing.T, dir string) { removeAll(t, dir, "wal/lock") },
		"snap by an older copy": func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "other"), []byte("an older copy"), 0o600))
			must(t, os.Rename(filepath.Join(dir, "other"), filepath.Join(dir, "snap")))
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			m := newMember(t, "")
			var said logText
			m.conf.Logger = slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelWarn}))
			m.conf.Dir = filepath.Join(t.TempDir(), "d")
			s := m.start()
			must(t, s.Set(ctxFor(t, patience), "k", []byte("v")))
			remove(t, m.conf.Dir)
			eventually(t, patience, "Err", func() error {
				if err := s.Err(); !errors.Is(err, errGone) {
					return fmt.Errorf("it is %v", err)
				}
				return nil
			})
			is(t, s.Set(ctxFor(t, patience), "k", []byte("lost")), ErrNotApplied)
			if err := s.refusesReads(); err == nil || s.silent() == nil {
				t.Error(err, s.silent())
			}
			s.checkNames()
			m.stop()
			if n := strings.Count(said.String(), "answers nothing any more"); n != 1 {
				t.Errorf("%d lines: %s", n, said.String())
			}
			if what == "snap by an older copy" {
				if got, _ := os.ReadFile(m.snap()); string(got) != "an older copy" {
					t.Error("Close has changed a file that is not its own")
				}
			}
		})
	}
}

func removeAll(t *testing.T, dir, pattern string) {
	list, err := filepath.Glob(filepath.Join(dir, pattern))
	must(t, err)
	if len(list) == 0 {
		t.Fatal("nothing to remove")
	}
	for _, path := range list {
		must(t, os.Remove(path))
	}
}

// An append into a segment that was removed is not acknowledged: not one, however soon after.
func TestLogRemovedBetweenAppends(t *testing.T) {
	l := reopenLog(t, nil, logOptionsIn(t))
	appendLog(t, l, 1, 1, 5)
	must(t, l.SetUint64([]byte("term"), 1))
	removeAll(t, l.dir, "*.wal")
	ended := inRaft(func() { l.StoreLog(testEntry(6, 1)) })
	comesTrue(t, func() error { return wantFault(l, errGone) })
	wantParked(t, ended)
	l2 := reopenLog(t, nil, logOptionsIn(t))
	must(t, l2.SetUint64([]byte("term"), 1))
	removeAll(t, l2.dir, "wal-meta.db")
	voted := inRaft(func() { l2.SetUint64([]byte("term"), 2) })
	comesTrue(t, func() error { return wantFault(l2, errGone) })
	wantParked(t, voted)
}

// A log that was removed while it was away is not made anew.
func TestLogRemovedBeforeItIsOpenedAnew(t *testing.T) {
	t.Parallel()
	for _, pattern := range []string{"wal-meta.db", "*"} {
		o, disk := faultyOptions(t)
		l := reopenLog(t, nil, o)
		appendLog(t, l, 1, 1, 3)
		disk.fail(setWrite, syscall.ENOSPC)
		disk.fail(setOpen, syscall.EMFILE)
		inRaft(func() { l.StoreLogs([]*raft.Log{testEntry(4, 1)}) })
		comesTrue(t, func() error { return wantFault(l, syscall.EMFILE) })
		removeAll(t, l.dir, pattern)
		disk.fail(setOpen, nil)
		disk.fail(setWrite, nil)
		comesTrue(t, func() error { return wantFault(l, errGone) })
		if list, err := filepath.Glob(filepath.Join(l.dir, "wal-meta*")); err != nil || list != nil {
			t.Errorf("there is %v, %v", list, err)
		}
	}
}

// What a member renames and removes itself is no fault: rotation, truncation, reopening, its id, an install.
func TestOwnRenamesAreKnown(t *testing.T) {
	m := newMember(t, "")
	m.conf.segment = 16 << 10
	s := m.start()
	look := func() {
		t.Helper()
		for _, n := range []*nameWatch{s.names, s.wal.names, s.store.names} {
			if len(n.all()) == 0 {
				t.Error("nothing is watched")
			}
			for range 2 {
				if lost := n.look(); len(lost) > 0 {
					t.Errorf("lost: %v", lost)
				}
			}
			must(t, n.hold())
		}
	}
	for i := range 60 {
		must(t, s.Set(ctxFor(t, patience), fmt.Sprint("k", i%5), make([]byte, 1000)))
		if i%20 == 10 {
			must(t, cutLog(s, 0))
		}
		if i%20 == 11 {
			look()
		}
	}
	s.wal.write.Lock()
	err := s.wal.reopenLocked()
	s.wal.write.Unlock()
	must(t, err)
	look()
	must(t, writeIdentity(m.conf.Dir, *s.ident()))
	look()
	must(t, writeIdentity(m.conf.Dir, identity{id: s.ident().id, cluster: s.ident().cluster, intent: intentJoin})) // of another size
	if s.names.look(); s.names.look() == nil {
		t.Error("the id of another member is taken for its own")
	}
	must(t, writeIdentity(m.conf.Dir, *s.ident()))
	must(t, os.Chmod(s.path("id"), 0)) // as root can read it all the same, this tells elsewhere
	look()
	must(t, s.Set(ctxFor(t, patience), "end", nil))
}

// Another file of the same size is a warning, once; of another size it is a fault, at the second look in a row.
func TestNameOfAnotherFile(t *testing.T) {
	var said logText
	n := newNameWatch(slog.New(slog.NewTextHandler(&said, nil)))
	path := filepath.Join(t.TempDir(), "file")
	put := func(text string) {
		must(t, os.WriteFile(path+".new", []byte(text), 0o600))
		must(t, os.Rename(path+".new", path))
	}
	put("one")
	must(t, n.add(path, nil))
	keep, err := os.Open(path) // so that its inode is not used again
	must(t, err)
	defer keep.Close()
	put("two")
	for range 3 {
		if lost := n.look(); lost != nil {
			t.Fatal(lost)
		}
	}
	if c := strings.Count(said.String(), path); c != 1 {
		t.Errorf("%d warnings", c)
	}
	put("three")
	if lost := n.look(); lost != nil {
		t.Fatal("at the first look", lost)
	}
	if err := n.hold(); !errors.Is(err, errGone) {
		t.Error(err)
	}
	if lost := n.look(); !errors.Is(lost[path], errGone) {
		t.Error(lost)
	}
	n.drop(path)
	if lost := n.look(); lost != nil {
		t.Error("dropped, and still", lost)
	}
	must(t, n.add(path, nil))
	must(t, os.Remove(path))
	if lost := n.look(); !errors.Is(lost[path], errGone) {
		t.Error(lost)
	}
}

// BenchmarkLinked is what an append pays to know that its segment has a name.
func BenchmarkLinked(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "segment"))
	must(b, err)
	defer f.Close()
	for b.Loop() {
		must(b, hasName(f))
	}
}
