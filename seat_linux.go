package quorate

import (
	"io"
	"os"
	"syscall"
)

// A lockGuard holds what SQLite holds on an open database, a read lock on snap and on the WAL's index, once more, in a kind of lock that
// belongs to an open file and not to the process. A program that opens and closes these files itself drops SQLite's locks, and not these:
// no shell takes itself for the last user, or for the first.
type lockGuard struct{ files []*os.File }

const (
	ofdSetLock  = 37             // F_OFD_SETLK
	sharedFirst = 0x40000000 + 2 // SQLite's SHARED_FIRST and SHARED_SIZE, in the database
	sharedSize  = 510
	deadSwitch  = (22+8)*4 + 8 // UNIX_SHM_DMS, in the WAL's index
)

// guardLocks comes after SQLite has opened the file. A file system that knows no such locks goes without.
func guardLocks(path string) (*lockGuard, error) {
	g := &lockGuard{}
	for _, l := range []struct {
		path       string
		start, len int64
	}{{path, sharedFirst, sharedSize}, {path + "-shm", deadSwitch, 1}} {
		f, err := os.OpenFile(l.path, os.O_RDWR, 0)
		if err != nil {
			return g, err
		}
		g.files = append(g.files, f) // closing it now would do what this is against
		if err := setLock(f, syscall.F_RDLCK, l.start, l.len); err != nil {
			return g, err
		}
	}
	return g, nil
}

func setLock(f *os.File, kind int16, start, length int64) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	lock := syscall.Flock_t{Type: kind, Whence: io.SeekStart, Start: start, Len: length}
	if failed := raw.Control(func(fd uintptr) { err = syscall.FcntlFlock(fd, ofdSetLock, &lock) }); failed != nil {
		return failed
	}
	return err
}

// unlock comes before SQLite needs the file alone.
func (g *lockGuard) unlock() {
	if g == nil {
		return
	}
	for _, f := range g.files {
		setLock(f, syscall.F_UNLCK, 0, 0)
	}
}

// close comes after every connection to the file is closed.
func (g *lockGuard) close() {
	if g == nil {
		return
	}
	for _, f := range g.files {
		f.Close()
	}
}
