package quorate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"
)

// What passes by itself, and what is for good.
func TestPassing(t *testing.T) {
	path := func(op string, err error) error {
		return fmt.Errorf("log: %w", &fs.PathError{Op: op, Path: "x", Err: err})
	}
	l := reopenLog(t, nil, logOptionsIn(t))
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{path("write", syscall.ENOSPC), true},
		{l.explain("set", path("write", syscall.EDQUOT)), true},
		{l.explain("set", errors.New("file resize error: truncate x: no space left on device")), true},
		{path("open", syscall.EMFILE), true},
		{path("open", syscall.ENFILE), true},
		{path("open", syscall.ENOMEM), true},
		{path("read", syscall.EINTR), true},
		{l.explain("set", errors.New("mmap allocate error: cannot allocate memory")), true},
		{untouched{path("write", syscall.EAGAIN)}, true},
		{untouched{path("write", syscall.EIO)}, false},
		{path("write", syscall.EAGAIN), false},
		{path("sync", syscall.ENOMEM), false},
		{path("sync", syscall.EINTR), false},
		{syscall.ENOMEM, false}, // as bbolt returns that of a sync
		{path("open", syscall.EACCES), false},
		{path("open", syscall.EPERM), false},
		{path("open", syscall.EROFS), false},
		{path("sync", syscall.EIO), false},
		{path("open", fs.ErrNotExist), false},
		{ErrCorrupt, false},
	} {
		if got := passing(c.err); got != c.want {
			t.Errorf("passing(%v) is %v", c.err, got)
		}
	}
}

// A file system of faultFS that has no descriptor for a new segment, once or for longer.
func TestLogNoDescriptors(t *testing.T) {
	lack := &fs.PathError{Op: "open", Path: "segment", Err: syscall.EMFILE}
	t.Run("one reopening mends it", func(t *testing.T) {
		o, disk := faultyOptions(t)
		o.leader = func() bool { return true }
		short := &shortFS{faultFS: disk, refuse: map[int]error{2: lack}}
		o.vfs = short
		l := reopenLog(t, nil, o)
		appendLog(t, l, 1, 1, 90) // no error for the leader, which would step down
		if short.created < 3 || l.failed() != nil {
			t.Fatal(short.created, l.failed())
		}
		l = reopenLog(t, l, o)
		wantLog(t, l, 1, 90)
	})
	t.Run("reads wait while it lasts", func(t *testing.T) {
		o, disk := faultyOptions(t)
		l := reopenLog(t, nil, o)
		appendLog(t, l, 1, 1, 30)
		disk.fail(func(f *faultFS, err error) { f.createErr, f.openErr = err, err }, lack)
		ended := inRaft(func() { appendEntries(t, l, 31, 1, 600) })
		comesTrue(t, func() error { return wantFault(l, syscall.EMFILE) })
		var e raft.Log
		l.mu.Lock()
		l.cache.keep(0, 0)
		l.mu.Unlock()
		read := inRaft(func() { must(t, l.GetLog(3, &e)) })
		wantParked(t, ended)
		wantParked(t, read)
		disk.fail(func(f *faultFS, err error) { f.createErr, f.openErr = err, err }, nil)
		if !<-ended || !<-read || e.Index != 3 {
			t.Fatal("ended with Goexit, or read", e.Index)
		}
		wantLog(t, l, 1, 630)
		if l.failed() != nil {
			t.Fatal(l.failed())
		}
	})
	t.Run("what it waits for changes", func(t *testing.T) {
		o, disk := faultyOptions(t)
		var told atomic.Value
		o.fault = func(err error) {
			if err != nil {
				told.Store(err)
			}
		}
		says := func(want syscall.Errno) {
			t.Helper()
			comesTrue(t, func() error {
				if err, _ := told.Load().(error); !errors.Is(err, want) {
					return fmt.Errorf("the fault is %v, want %v", err, want)
				}
				return nil
			})
		}
		l := reopenLog(t, nil, o)
		disk.fail(setWrite, syscall.ENOSPC)
		ended := inRaft(func() { appendEntries(t, l, 1, 1, 3) })
		says(syscall.ENOSPC)
		disk.fail(setOpen, syscall.EMFILE)
		says(syscall.EMFILE)
		disk.fail(setOpen, nil)
		says(syscall.ENOSPC)
		disk.fail(setWrite, nil)
		if !<-ended {
			t.Fatal("ended with Goexit")
		}
		if err := l.failed(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("not the right to open is for good", func(t *testing.T) {
		for _, err := range []error{syscall.EACCES, syscall.EPERM, syscall.EROFS} {
			o, disk := faultyOptions(t)
			l := reopenLog(t, nil, o)
			disk.fail(func(f *faultFS, err error) { f.createErr = err }, &fs.PathError{Op: "open", Path: "segment", Err: err})
			ended := inRaft(func() { appendEntries(t, l, 1, 1, 90) })
			comesTrue(t, func() error { return wantFault(l, err) })
			disk.fail(func(f *faultFS, err error) { f.createErr = err }, nil)
			closeLog(t, l)
			if <-ended {
				t.Fatal(err, "was tried again")
			}
		}
	})
	t.Run("for the directory, after the data", func(t *testing.T) {
		o, disk := faultyOptions(t)
		l := reopenLog(t, nil, o)
		disk.fail(func(f *faultFS, err error) { f.syncErr = err }, lack)
		appendLog(t, l, 1, 1, 3)
		disk.fail(func(f *faultFS, err error) { f.syncErr = err }, &fs.PathError{Op: "sync", Path: "segment", Err: syscall.EINTR})
		ended := inRaft(func() { l.StoreLog(testEntry(4, 1)) })
		comesTrue(t, func() error { return wantFault(l, syscall.EINTR) })
		disk.fail(func(f *faultFS, err error) { f.syncErr = err }, nil)
		closeLog(t, l)
		if <-ended {
			t.Fatal("a sync that had failed was tried again")
		}
	})
}

// A shortFS refuses to make some of the files, by their number.
type shortFS struct {
	*faultFS
	created int
	refuse  map[int]error
}

func (f *shortFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	f.created++
	if err := f.refuse[f.created]; err != nil {
		return nil, err
	}
	return f.faultFS.Create(dir, name, size)
}

// A log whose process has no descriptor left at the change to a new segment gives up its spare one, and takes another later.
func TestReserve(t *testing.T) {
	r, err := newReserve(t.TempDir())
	must(t, err)
	defer r.close()
	if r.dir == nil {
		t.Skip("this system has none")
	}
	r.give()
	r.give()
	if r.spare != nil {
		t.Fatal("not given up")
	}
	must(t, r.sync())
	r.take()
	was := r.spare
	r.take()
	if was == nil || r.spare != was {
		t.Fatal("not taken once")
	}
	_, err = newReserve(t.TempDir() + "/none")
	if !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}
