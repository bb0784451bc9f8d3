package quorate

// The state under its names again. A program that opens and closes snap itself drops SQLite's locks on it, for POSIX locks are a
// process's and not a descriptor's. The next shell that closes the file takes itself for its last user and removes snap-wal and snap-shm,
// which this member goes on writing to, and every new connection reads nonsense. On Linux a second kind of lock prevents that (a
// lockGuard); a person who removes snap-wal does the same. This file owns how it is noticed in the store and mended: a verified copy of all pages through the writer, which still sees everything, takes the place of snap. Control comes from
// health.go's rebuild; the names are names.go's.
//
// It is the one exception to the rule that the file of a live member is never replaced by a rename. A crash at any step leaves what
// Open takes: until the copy has its second name, snap as it is (nothing is removed, and the log has everything after it, because no
// barrier succeeds without the names); from then on the copy, which Open puts in place.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"modernc.org/sqlite"
)

// errUnseated: snap-wal or snap-shm is not what this member has open.
var errUnseated = errors.New("snap-wal was removed under the running member, by a program that opened and closed snap beside it")

// sides are what SQLite keeps beside an open database.
var sides = []string{"-wal", "-shm"}

// mended is the second name of the copy: whole, verified, on the disk, and about to take the place of snap.
func mended(path string) string { return path + ".mended" }

// finishMending completes at Open what a crash has cut short.
func finishMending(path string) error {
	path, err := realPath(path)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(mended(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return placeMended(path)
}

// placeMended may be begun again at any step.
func placeMended(path string) error {
	for _, side := range sides {
		if err := os.Remove(path + side); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Rename(mended(path), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// watchNames enters the names of what is open now.
func (s *store) watchNames() error {
	for _, side := range append([]string{""}, sides...) {
		if err := s.names.add(s.path+side, nil); err != nil {
			return err
		}
	}
	return nil
}

func (s *store) unwatchNames() {
	for _, side := range append([]string{""}, sides...) {
		s.names.drop(s.path + side)
	}
}

// guardLocks needs fileMu, or nobody else is there yet.
func (s *store) guardLocks() {
	var err error
	if s.guard, err = guardLocks(s.path); err != nil {
		s.log.Debug("the locks of snap are SQLite's alone: a program that opens snap itself drops them", "path", s.path, "err", err)
	}
}

// beside tells whether a path is of what SQLite keeps beside the file.
func (s *store) beside(path string) bool { return path == s.path+sides[0] || path == s.path+sides[1] }

// seated is an error unless the file and what is beside it have their names. If only the latter is wrong, it has the mending begin.
func (s *store) seated() error {
	if err := s.names.holdAt(s.path); err != nil {
		return err
	}
	for _, side := range sides {
		if err := s.names.holdAt(s.path + side); err != nil {
			err = fmt.Errorf("%w: %w", errUnseated, err)
			s.uneasy(err)
			return err
		}
	}
	return nil
}

// awaitSeated waits until a mending has ended, where ctx limits it.
func (s *store) awaitSeated(ctx context.Context) error {
	for {
		err := s.seated()
		if !errors.Is(err, errUnseated) || ctx.Done() == nil {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-s.ending:
			return ErrClosed
		}
	}
}

// reseat gives the file its names again. An error that is not ErrClosed means that nothing has changed; it is ErrCorrupt if what the
// writer sees is not what was written. The fsm's mu is held, so that nobody commits meanwhile.
func (s *store) reseat() error {
	s.lockFile()
	defer s.fileMu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if err := s.names.holdAt(s.path); err != nil {
		return err
	}
	return s.reseatLocked()
}

// reseatLocked needs fileMu.
func (s *store) reseatLocked() error {
	temp := s.path + ".rebuild"
	defer os.Remove(temp)
	if err := s.writer.copyTo(temp); passing(err) || isBusy(err) {
		return aboutFile("copy", s.path, err)
	} else if err != nil { // somebody has written to what the writer has open, or the disk has
		return aboutFile("copy", s.path, fmt.Errorf("%w: %w", ErrCorrupt, err))
	}
	s.step("copied")
	m, err := checkFileOf(temp, s.lone)
	if err != nil {
		return err
	}
	if is := s.inFile.Load(); m.applied != is.applied || m.chain != is.chain || m.kvSum != is.kvSum {
		return aboutFile("copy", s.path, corrupt("it holds index %d, and %d was written", m.applied, is.applied))
	}
	if err := syncFile(temp); err != nil {
		return err
	}
	if err := os.Rename(temp, mended(s.path)); err != nil {
		return err
	}
	s.step("named")
	s.unwatchNames()
	if err = syncDir(filepath.Dir(s.path)); err == nil {
		err = placeMended(s.path)
	}
	if err != nil {
		return errors.Join(err, s.watchNames(), os.Remove(mended(s.path)))
	}
	s.step("placed")
	s.log.Warn("snap was put in place anew, from what this member has open", "path", s.path, "index", m.applied)
	return s.reconnect()
}

// copyTo writes all pages, as of the last commit, to a file of its own.
func (c *conn) copyTo(path string) (err error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := c.raw.(interface {
		NewBackup(string) (*sqlite.Backup, error)
	}).NewBackup(fileURI(path, "mode=rwc"))
	if err != nil {
		return err
	}
	more, err := b.Step(-1)
	if err == nil && more {
		err = errors.New("not all pages were copied")
	}
	if err = errors.Join(err, b.Finish()); err != nil {
		return err
	}
	return leaveWAL(path)
}

// leaveWAL sets a copy's header back to the rollback journal, so that it is complete without a WAL.
func leaveWAL(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{1, 1}, 18)
	return errors.Join(err, f.Close(), os.Chmod(path, 0o600))
}

// reconnect opens the file that has just been put in place. Until that works nobody can use it, so it is tried until it does. The
// connections that others still have see the old file as it was, and are closed when they are given back.
func (s *store) reconnect() error {
	s.seat.Add(1)
	s.disconnect()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		m, err := s.connect()
		if err == nil {
			s.inFile.Store(&m)
			s.walChecked = 0
			break
		}
		if isForGood := !passing(err) && !isBusy(err); isForGood {
			s.failed.CompareAndSwap(nil, &err)
		}
		s.log.Warn("open the file that was put in place", "path", s.path, "err", err)
		select {
		case <-time.After(wait):
		case <-s.ending:
			closed := error(ErrClosed)
			s.failed.CompareAndSwap(nil, &closed) // there is no writer
			return ErrClosed
		}
	}
	if ok, verdict := s.verified(); !ok && verdict == nil {
		s.startLoad(s.meta()) // the scan was reading the old file
	}
	return nil
}

// disconnect closes the witness and the writer.
func (s *store) disconnect() (err error) {
	s.witnessMu.Lock()
	if s.witness != nil {
		err = s.witness.close()
		s.witness = nil
	}
	s.witnessMu.Unlock()
	if s.writer != nil {
		err = errors.Join(err, s.writer.close())
		s.writer = nil
	}
	s.guard.close()
	s.guard = nil
	return err
}

// openReader opens a reader of the file as it is placed now.
func (s *store) openReader() (*conn, error) {
	seat := s.seat.Load()
	if err := s.seated(); err != nil {
		return nil, err
	}
	c, err := openReader(s.path)
	if err == nil {
		c.seat = seat
	}
	return c, err
}

// keepWAL has SQLite leave snap-wal and snap-shm alone when this connection is closed: by their names they may be another file's.
func (c *conn) keepWAL(keep bool) error {
	mode := 0
	if keep {
		mode = 1
	}
	_, err := c.raw.(sqlite.FileControl).FileControlPersistWAL("main", mode)
	return err
}
