package quorate

// What an error of the disk means, for the log and for the state alike: whether it passes by itself or is for good. It owns this
// judgement and the descriptors that are held in reserve. It never opens a file of the state or decides what a member does about a
// fault. logstore.go, conn.go and health.go ask it.

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"syscall"

	"modernc.org/sqlite"
)

// passing tells whether an error of the system passes without a restart: the disk is full, the process has no descriptor or no memory
// left. Whoever meets it tries again. Any other error is for good, above all one after which nobody knows what has been written:
// a failed sync, whatever its number.
func passing(err error) bool {
	return err != nil && (isFull(err) || noDescriptor(err) || notBegun(err))
}

// isFull: the disk has no space left, or this user's quota has none. With space back the same work succeeds.
func isFull(err error) bool {
	return sqliteCode(err) == sqliteFull || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// noDescriptor: a file could not be opened, because the process or the system has too many open. A call that returns this has touched
// no file. SQLite does not say why it could not open one.
func noDescriptor(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || sqliteCode(err) == sqliteCantOpen
}

// notBegun: the system had no memory for a call, or was interrupted, before any byte was written. The same numbers from a write
// or a sync tell nothing of the kind, except where untouched marks them.
func notBegun(err error) bool {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code()&0xff == sqliteNoMem || slices.Contains(sqliteMemory, e.Code())
	}
	if !errors.Is(err, syscall.ENOMEM) && !errors.Is(err, syscall.EINTR) && !errors.Is(err, syscall.EAGAIN) {
		return false
	}
	var at *fs.PathError
	return errors.As(err, new(untouched)) || errors.As(err, &at) && slices.Contains([]string{"open", "openat", "stat", "lstat", "read"}, at.Op)
}

// untouched is the error of a write that has written nothing.
type untouched struct{ err error }

func (e untouched) Error() string { return e.err.Error() }
func (e untouched) Unwrap() error { return e.err }

// A reserve is what the log needs to be reopened in a process that has no descriptor left: a handle of its directory, so that syncing
// the names in it opens nothing, and one descriptor more, which is given up for the new segment. Without a reserve (Windows, where a
// handle would keep the directory from being renamed, and descriptors do not run out) both methods do what they can.
type reserve struct {
	path  string
	dir   *os.File
	spare *os.File // nil = given up
}

func newReserve(dir string) (*reserve, error) {
	r := &reserve{path: dir}
	if runtime.GOOS == "windows" {
		return r, nil
	}
	var err error
	if r.dir, err = os.Open(dir); err != nil {
		return nil, err
	}
	r.take()
	return r, nil
}

// give gives up the spare descriptor; take takes one again, if there is one.
func (r *reserve) give() {
	if r.spare != nil {
		r.spare.Close()
		r.spare = nil
	}
}

func (r *reserve) take() {
	if r.spare == nil && r.dir != nil {
		r.spare, _ = os.Open(r.path)
	}
}

// sync makes the names in the directory durable.
func (r *reserve) sync() error {
	if r.dir == nil {
		return syncDir(r.path)
	}
	return r.dir.Sync()
}

func (r *reserve) close() {
	r.give()
	if r.dir != nil {
		r.dir.Close()
	}
}
