package quorate

// The state under its names again. A program that opens and closes snap itself drops SQLite's locks on it, for POSIX locks are a
// process's and not a descriptor's. The next shell that closes the file takes itself for its last user and removes snap-wal and snap-shm,
// which this member goes on writing to, and every new connection reads nonsense. On Linux a second kind of lock prevents that (a
// lockGuard); a person who removes snap-wal does the same. This file owns how it is noticed in the store and mended: a verified copy of
// all pages through the writer, which still sees everything, takes the place of snap. Control comes from health.go's rebuild; the names
// are names.go's. copy.go's install takes the same way with a received state where the disk has no room for a copy of it.
//
// These two are the exceptions to the rule that the file of a live member is never replaced by a rename: whoever has the old one open goes
// on reading it, and does not notice. A crash at any step leaves what Open takes: until the new file has its second name, snap as it is
// (nothing is removed, and the log has everything after it, because no barrier succeeds without the names); from then on the new file,
// which Open puts in place. A received state may be ahead of the log: then the start rule empties the log, as after any install that a
// crash has cut short.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"modernc.org/sqlite"
)

// errUnseated: snap-wal or snap-shm is not what this member has open.
var errUnseated = errors.New("snap-wal was removed under the running member, by a program that opened and closed snap beside it")

// A misplaced error is errUnseated without a program that has caused it.
type misplaced struct{ err error }

func (m misplaced) Error() string        { return m.err.Error() }
func (m misplaced) Unwrap() error        { return m.err }
func (m misplaced) Is(target error) bool { return target == errUnseated }

// sides are what SQLite keeps beside an open database.
var sides = []string{"-wal", "-shm"}

// mended is the second name of a new file: whole, verified, on the disk, and about to take the place of snap.
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

// watchNames enters the names of what is open now. While the copy is being placed, another snap is its own.
func (s *store) watchNames() error {
	if err := s.names.add(s.path, s.placing.Load); err != nil {
		return err
	}
	for _, side := range sides {
		if err := s.names.addStrictly(s.path + side); isMissing(err) {
			return fmt.Errorf("%w: %w", errUnseated, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// guardLocks needs fileMu, or nobody else is there yet.
func (s *store) guardLocks() {
	var err error
	if s.guard, err = guardLocks(s.path); err != nil {
		s.log.Debug("the locks of snap are SQLite's alone: a program that opens snap itself drops them", "path", s.path, "error", err)
	}
}

// beside tells whether a path is of what SQLite keeps beside the file.
func (s *store) beside(path string) bool { return path == s.path+sides[0] || path == s.path+sides[1] }

// seated is an error unless the file and what is beside it have their names. If only the latter is wrong, it has the mending begin.
func (s *store) seated() error {
	if err := s.names.holdAt(s.path); err != nil {
		return err
	}
	if s.placing.Load() {
		if failed := s.failed.Load(); failed != nil { // no waiting helps
			return fmt.Errorf("%s was put in place and can't be opened, restart this member: %w", s.path, *failed)
		}
		return misplaced{fmt.Errorf("%s is being put in place", s.path)}
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

// reseat gives the file its names again. After an error nothing that was written is lost, and the file is not seated: no barrier
// succeeds and no reader is opened until another call succeeds, or until Open completes what this one began. The error is ErrCorrupt
// if what the writer sees is not what was written; without a writer it is the one that took it. The fsm's mu is held, so that nobody
// commits meanwhile.
func (s *store) reseat() error {
	s.lockFile()
	defer s.fileMu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if s.writer == nil {
		return *s.failed.Load()
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
	if err := s.place(temp); err != nil {
		return err
	}
	s.log.Warn("snap was put in place anew, from what this member has open", "path", s.path, "index", m.applied)
	return nil
}

// placeReceived puts a verified file with a newer state in the place of snap. errUnseated: it may have its second name, and what was open
// before is so still, with all that was committed to it. The next call goes on from there, or the mending, which goes back to the old
// state: nobody was told of the new one. fileMu and mu are held.
func (s *store) placeReceived(path string) error {
	if failed := s.failed.Load(); failed != nil {
		return *failed
	}
	if is, err := os.Stat(s.path); err == nil {
		if err := os.Chmod(path, is.Mode().Perm()); err != nil {
			return err
		}
	}
	err := s.place(path)
	if err != nil && s.writer != nil && s.placing.Load() {
		return misplaced{fmt.Errorf("put the received state in the place of snap: %w", err)}
	} else if err != nil {
		return err
	}
	s.log.Info("the received state was put in the place of snap, as a copy of it does not fit: a program that has snap open sees the old state "+
		"until it opens it again", "path", s.path)
	s.foreignly = nil
	s.strange.Store(nil)
	return nil
}

// place gives the name of snap to a whole and verified file in its directory, and opens it. fileMu is held.
func (s *store) place(path string) error {
	if err := syncFile(path); err != nil {
		return err
	}
	s.step("synced")
	// From here on Open takes the file, so that nothing may become durable elsewhere, whatever happens to the names meanwhile. The file
	// stays after an error: snap may be without its WAL by then.
	was := s.placing.Swap(true)
	if err := os.Rename(path, mended(s.path)); err != nil {
		s.placing.Store(was)
		return err
	}
	s.step("named")
	if err := syncDir(filepath.Dir(s.path)); err != nil {
		return err
	}
	for _, side := range sides { // this member removes them itself
		s.names.drop(s.path + side)
	}
	if err := placeMended(s.path); err != nil {
		return err
	}
	s.step("placed")
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
		return explainWrite(path, err)
	}
	return leaveWAL(path)
}

// explainWrite asks the system for what it has said to a connection that is closed: the file is a copy, and another page does no harm.
func explainWrite(path string, err error) error {
	if e := new(sqlite.Error); !errors.As(err, &e) || e.Code() != sqliteWrite {
		return err
	}
	f, again := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if again == nil {
		_, again = f.Write(make([]byte, pageSize))
		again = errors.Join(again, f.Close())
	}
	if errors.Is(again, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", syscall.EDQUOT, err)
	}
	return err
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

// reconnect opens the file that has just been put in place. Nobody can use it before, so it is tried until it works, until it can't any
// more, or until the member is closed; after an error there is no writer. The connections that others still have see the old file as it
// was, and are closed when they are given back.
//
// The shell that has removed snap-shm may not have removed snap-wal yet. It removes a name, and no lock keeps it from what has that
// name by now. Then this try fails, and the next one finds what it makes itself.
func (s *store) reconnect() error {
	s.seat.Add(1)
	s.disconnect()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := s.connectAnew()
		if err == nil {
			s.walChecked = 0
			s.placing.Store(false)
			break
		}
		s.log.Warn("open the file that was put in place", "path", s.path, "error", err)
		if _, missing := os.Stat(s.path); isMissing(missing) {
			err = fmt.Errorf("%s: %w", s.path, errGone)
		} else if passing(err) || isBusy(err) || errors.Is(err, errUnseated) {
			if err = s.pauseOrEnd(wait); err == nil {
				continue
			}
		}
		s.failed.CompareAndSwap(nil, &err)
		return err
	}
	if ok, verdict := s.verified(); !ok && verdict == nil {
		s.startLoad(s.meta()) // the scan was reading the old file
	}
	return nil
}

// connectAnew is connect, and a proof that what the writer commits is under the file's names: the witness, which was opened by them
// later, reads it.
func (s *store) connectAnew() error {
	foreignly := s.foreignly // is not mended by this, and nothing else is written before it is
	s.foreignly = nil
	defer func() { s.foreignly = cmpErr(s.foreignly, foreignly) }()
	m, err := s.connect()
	if err != nil {
		return err
	}
	s.inFile.Store(&m)
	err = s.transactOnce(func(m *meta, _ map[ownKey]uint64) error { m.barrier++; return nil })
	if err == nil {
		err = s.seesBarrier(m.barrier + 1)
	}
	if err != nil {
		s.disconnect()
	}
	return err
}

func (s *store) seesBarrier(barrier uint64) error {
	m, err := s.witness.readMeta()
	if err == nil && m.barrier != barrier {
		err = fmt.Errorf("barrier %d is not %d", m.barrier, barrier)
	}
	if err != nil {
		return fmt.Errorf("%w: what is written is not read again: %w", errUnseated, err)
	}
	return nil
}

// pauseOrEnd is ErrClosed if the member is closed meanwhile.
func (s *store) pauseOrEnd(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-s.stop:
	case <-s.ending:
	}
	return ErrClosed
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

// closeOld closes the idle connections to what was snap before: they would keep its space. Those in use are closed when they are given
// back and come by here again.
func (s *store) closeOld() {
	seat := s.seat.Load()
	if seat == 0 {
		return
	}
	for range cap(s.readers) {
		select {
		case c := <-s.readers:
			if c != nil && c.seat != seat {
				c.close()
				c = nil
			}
			s.readers <- c
		default: // all are in use
		}
	}
	s.queries.closeOld()
}

// openReader opens a reader of the file as it is placed now.
func (s *store) openReader() (*conn, error) {
	return s.openSeated(func() (*conn, error) { return openReader(s.path) })
}

// openSeated keeps a connection only if the names were right before it was opened and after its first read, which opens the WAL by its
// name.
func (s *store) openSeated(open func() (*conn, error)) (*conn, error) {
	seat := s.seat.Load()
	if err := s.seatedOrEnding(); err != nil {
		return nil, err
	}
	c, err := open()
	if c == nil {
		return nil, err
	}
	c.seat = seat
	if err == nil {
		_, err = c.one(qUserVersion)
	}
	if unseated := s.seatedOrEnding(); unseated != nil {
		err = unseated
	} else if s.seat.Load() != seat {
		err = fmt.Errorf("%w: %s was put in place meanwhile", errUnseated, s.path)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// seatedOrEnding is seated, but that the last connection which close ends takes snap-wal away is nobody's fault.
func (s *store) seatedOrEnding() error {
	err := s.seated()
	if err != nil && isClosed(s.ending) {
		return ErrClosed
	}
	return err
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
