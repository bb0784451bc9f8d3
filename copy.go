package quorate

// A copy: the whole state as of one commit, as a stream of database pages. This file owns how one is taken while writes go on,
// how it is received, checked and installed, and how a backup becomes a new member's file. It never touches the network or
// raft; fsm.go, recover.go and db.go call it, and it goes on to the store's connections.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
)

// copy begins a consistent copy of the file as of some commit, no older than the last one now.
func (s *store) copy(ctx context.Context) (*storeCopy, error) {
	err := s.sync(ctx)
	if err != nil {
		return nil, err
	}
	c, err := s.beginCopy()
	if err != nil {
		return nil, s.explain("copy", err)
	}
	return c, nil
}

func (s *store) beginCopy() (_ *storeCopy, err error) {
	c, err := s.openReader()
	if err != nil {
		return nil, err
	}
	cp := &storeCopy{s: s, c: c, hash: sha256.New(), before: s.walSize()}
	defer func() {
		if err != nil {
			cp.release()
		}
	}()
	if err := c.exec(qBeginRead); err != nil {
		return nil, err
	}
	if cp.meta, err = c.readMeta(); err != nil {
		return nil, err
	}
	if cp.pages, err = c.one(qPageCount); err != nil {
		return nil, err
	}
	cp.size = cp.pages*pageSize + sha256.Size
	if cp.rows, err = c.query(qPages); err != nil {
		return nil, err
	}
	cp.pins.Store(true)
	return cp, s.hold(cp)
}

// A hold keeps a moment of the file for a reader that takes its time: a copy, a listing. While it has a read transaction the
// WAL cannot restart, so the store looks after it every 100 ms, and ends it when it closes.
type hold interface {
	pinned() bool              // it has a read transaction; never blocks
	tend(passed time.Duration) // the time since the last one; moves into a file what has kept the WAL for too long
	close()
}

// hold has the store look after h until letGo.
func (s *store) hold(h hold) error {
	s.holdsMu.Lock()
	defer s.holdsMu.Unlock()
	if isClosed(s.ending) { // close may have ended all of them already
		return ErrClosed
	}
	s.holds[h] = true
	return nil
}

func (s *store) letGo(h hold) {
	s.holdsMu.Lock()
	defer s.holdsMu.Unlock()
	delete(s.holds, h)
}

func (s *store) openHolds() []hold {
	s.holdsMu.Lock()
	defer s.holdsMu.Unlock()
	return slices.Collect(maps.Keys(s.holds))
}

// pinned tells whether a reader keeps the WAL from restarting and will do so for longer than a moment.
func (s *store) pinned() bool { return slices.ContainsFunc(s.openHolds(), hold.pinned) }

// spoolFile is a file without a name beside path, for what a slow reader has not taken yet.
func spoolFile(path string) (*os.File, error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".copy-")
	if err == nil {
		os.Remove(f.Name()) // where the system lets us; dropSpool does it otherwise
	}
	return f, err
}

func dropSpool(f *os.File) {
	f.Close()
	os.Remove(f.Name())
}

// A storeCopy streams the pages of one snapshot, and the SHA-256 of them. While it holds its read transaction the WAL cannot
// restart; a slow reader's copy moves into a file for that reason.
type storeCopy struct {
	meta meta
	size int64 // of the whole stream

	s      *store
	before int64 // WAL's size when it began
	pins   atomic.Bool

	mu      sync.Mutex // guards the fields below; held across reads of the connection, which is used by one at a time
	c       *conn      // nil when closed or spooled
	rows    driver.Rows
	pages   int64 // still to come
	hash    hash.Hash
	buf     []byte   // what Read has not returned yet
	head    bool     // the first page has been read
	tail    bool     // the checksum has been put into buf
	spooled *os.File // what was still to come when the transaction was ended
	failed  error    // of spooling
}

func (c *storeCopy) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.spooled != nil:
		return c.spooled.Read(p)
	case c.failed != nil:
		return 0, c.s.explain("copy", c.failed)
	case c.c == nil:
		select {
		case <-c.s.ending: // the store's close has ended it, not its reader
			return 0, ErrClosed
		default:
			return 0, os.ErrClosed
		}
	}
	if len(c.buf) == 0 {
		if err := c.fill(); err != nil {
			if err == io.EOF {
				return 0, io.EOF
			}
			return 0, c.s.explain("copy", err)
		}
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	return n, nil
}

// spool ends the read transaction: what is still to come goes into a file, or the copy ends with an error.
func (c *storeCopy) spool() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c == nil {
		return
	}
	f, err := spoolFile(c.s.path)
	if err == nil {
		if err = c.spoolTo(f); err != nil {
			dropSpool(f)
		} else {
			c.spooled = f
		}
	}
	if err != nil {
		c.failed = fmt.Errorf("its reader is slow, and the rest does not go into a file: %w", err)
	}
	c.endTransaction()
}

func (c *storeCopy) spoolTo(f *os.File) error {
	w := bufio.NewWriterSize(f, copyPages*pageSize)
	for {
		select {
		case <-c.s.ending:
			return ErrClosed
		default:
		}
		if _, err := w.Write(c.buf); err != nil {
			return err
		}
		if err := c.fill(); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := f.Seek(0, io.SeekStart)
	return err
}

func (c *storeCopy) fill() error {
	if c.pages > 0 {
		page, err := c.page()
		if err != nil {
			return err
		}
		c.hash.Write(page)
		c.buf = page
		return nil
	}
	if c.tail {
		return io.EOF
	}
	c.tail = true
	c.buf = c.hash.Sum(nil)
	return nil
}

// page returns the next page. In the first one the mode is set back from WAL to rollback journal, so that the copy is
// complete without a WAL, and opening it leaves nothing beside it.
func (c *storeCopy) page() ([]byte, error) {
	var v [1]driver.Value
	if err := c.rows.Next(v[:]); err != nil {
		if err == io.EOF {
			return nil, corrupt("%d pages are missing", c.pages)
		}
		return nil, err
	}
	page, _ := v[0].([]byte)
	if len(page) != pageSize {
		return nil, corrupt("a page of %d bytes", len(page))
	}
	if !c.head {
		c.head = true
		page[18], page[19] = 1, 1
	}
	c.pages--
	return page, nil
}

func (c *storeCopy) pinned() bool { return c.pins.Load() }

func (c *storeCopy) tend(time.Duration) {
	if c.kept() > pinLimit {
		c.spool()
	}
}

func (c *storeCopy) close() { c.Close() }

// kept is about how many bytes the WAL has grown by since the copy began and cannot give back before its transaction ends.
func (c *storeCopy) kept() int64 { return max(0, c.s.walSize()-c.before) }

func (c *storeCopy) Close() error {
	c.s.letGo(c)
	return c.release()
}

func (c *storeCopy) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.spooled; f != nil {
		c.spooled = nil
		dropSpool(f)
	}
	return c.endTransaction()
}

func (c *storeCopy) endTransaction() error {
	if c.c == nil {
		return nil
	}
	if c.rows != nil {
		c.rows.Close()
	}
	err := c.c.close()
	c.c, c.rows, c.buf = nil, nil, nil
	c.pins.Store(false)
	return err
}

// backup writes a database that opens by itself, without the checksum that a copy ends with. ctx may end it early.
func (s *store) backup(ctx context.Context, w io.Writer) (meta, error) {
	c, err := s.copy(ctx)
	if err != nil {
		return meta{}, err
	}
	defer c.Close()
	buf := make([]byte, copyPages*pageSize)
	for left := c.size - sha256.Size; left > 0; {
		if ctx.Err() != nil {
			return meta{}, context.Cause(ctx)
		}
		n, err := io.ReadFull(c, buf[:min(left, int64(len(buf)))])
		if err != nil {
			return meta{}, err
		}
		if err := writeAll(w, buf[:n]); err != nil {
			return meta{}, err
		}
		left -= int64(n)
	}
	return c.meta, nil
}

// writeAll is for somebody else's writer: one that takes less than it is given must say so, and not all of them do.
func writeAll(w io.Writer, p []byte) error {
	n, err := w.Write(p)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	return err
}

// receive stores the stream of a copy at path, once everything about it is right and it is on the disk.
func receive(path string, src io.Reader) (m meta, err error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	hash := sha256.New()
	pages := tailReader{bufio.NewReaderSize(src, 16*pageSize)}
	if err := writeFile(path, io.TeeReader(pages, hash)); err != nil {
		return m, fmt.Errorf("receive %s: %w", path, err)
	}
	var sum [sha256.Size]byte
	if _, err := io.ReadFull(pages.src, sum[:]); err != nil {
		return m, fmt.Errorf("receive %s: the stream ends early: %w", path, err)
	}
	if !bytes.Equal(sum[:], hash.Sum(nil)) {
		return m, fmt.Errorf("receive %s: %w: wrong checksum, or the stream ended early", path, ErrCorrupt)
	}
	if m, err = checkFile(path); err != nil {
		return m, err
	}
	if err := checkLength(path); err != nil {
		return m, aboutFile("check", path, err)
	}
	return m, errors.Join(syncFile(path), syncDir(filepath.Dir(path)))
}

// checkLength: a stream holds the pages that its first one counts, and no others, which SQLite would pass over.
func checkLength(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var head [32]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		return err
	}
	info, err := f.Stat()
	if pages := int64(binary.BigEndian.Uint32(head[28:])); err == nil && info.Size() != pages*pageSize {
		err = corrupt("%d bytes for %d pages", info.Size(), pages)
	}
	return err
}

// A tailReader reads a stream up to the checksum that ends it, and leaves that to be read from src.
type tailReader struct{ src *bufio.Reader }

func (t tailReader) Read(p []byte) (int, error) {
	if _, err := t.src.Peek(sha256.Size + 1); err != nil {
		return 0, err // io.EOF: what is left is the checksum
	}
	return t.src.Read(p[:min(len(p), t.src.Buffered()-sha256.Size)])
}

// checkFile reads all of a database that no one has open, and changes nothing.
func checkFile(path string) (meta, error) { return checkFileOf(path, false) }

// checkFileOf is checkFile, of a lone member's file if lone says so: see strange.
func checkFileOf(path string, lone bool) (meta, error) {
	m, err := checkClosed(path, lone)
	if err != nil {
		return meta{}, aboutFile("check", path, err)
	}
	return m, nil
}

func checkClosed(path string, lone bool) (m meta, err error) {
	if _, err := checkHeader(path); err != nil {
		return m, err
	}
	c, err := openConn(path, "mode=ro&immutable=1", "trusted_schema=OFF", "query_only=ON", "cell_size_check=ON")
	if err != nil {
		return m, err
	}
	defer c.close()
	if err := c.checkSchema(); err != nil && !(lone && errors.As(err, new(*strangeSchema))) {
		return m, err
	}
	return c.checkState()
}

// checkState reads all of the state and compares it with its sums.
func (c *conn) checkState() (m meta, err error) {
	if said, err := c.text(queryText[qQuickCheck]); err != nil || said != "ok" {
		return m, cmpErr(err, corrupt("quick_check says %q", said))
	}
	if m, err = c.readMeta(); err != nil {
		return m, err
	}
	if _, err := c.readOwn(m); err != nil {
		return m, err
	}
	return m, errors.Join(c.checkRows(m), c.checkHistory(m))
}

func cmpErr(first, second error) error {
	if first != nil {
		return first
	}
	return second
}

// install puts the database at path, which receive has made, in place of ours, at once for every reader. It is durable
// when install returns. An error means that nothing has changed, unless it is the barrier's or errUnseated: then calling again is right.
func (s *store) install(path string, index, term uint64, config []byte, configIndex uint64) error {
	var m meta
	var own map[ownKey]uint64
	// The new state and the note that it was installed appear in the same instant: a crash between the two would leave
	// rows above the log's end that nothing accounts for.
	err := changeFile(path, func(c *conn) (err error) {
		if m, err = c.readMeta(); err != nil {
			return err
		}
		if m.applied != index {
			return fmt.Errorf("it holds index %d, not %d", m.applied, index)
		}
		if own, err = c.readOwn(m); err != nil {
			return err
		}
		m.term, m.installed, m.config, m.configIndex = term, index, bytes.Clone(config), configIndex
		return c.writeMeta(&m)
	})
	if err != nil {
		return aboutFile("install", path, err)
	}
	unlock, err := s.lockState()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.take(path, &m, own); err != nil {
		return aboutFile("install", path, err)
	}
	s.dropTail()
	s.isReplaced()
	return s.explain("sync", s.barrierLocked())
}

// take replaces the contents of snap by those of a file, which are m and own. Copied into snap they go through snap-wal, so that they are
// on the disk twice until the file is removed. Where that does not fit, the file itself takes the place of snap: then other programs that
// have snap open see the old state for as long as they do. fileMu and mu are held.
func (s *store) take(path string, m *meta, own map[ownKey]uint64) error {
	placeable := s.placeable(path)
	if placeable && !s.roomToCopy(path) {
		return s.placeReceived(path)
	}
	err := s.copyIn(path, m, own)
	if placeable && isFull(err) { // a quota, or somebody else was faster
		return s.placeReceived(path)
	}
	return err
}

// roomToCopy tells whether a copy of a file through snap-wal leaves this member fit to lead, as far as the file system tells.
func (s *store) roomToCopy(path string) bool {
	d := s.space(filepath.Dir(s.path))
	info, err := os.Stat(path)
	if d.total == 0 || err != nil {
		return true
	}
	const frame = pageSize + 24 // a page in the WAL
	return d.free-info.Size()/pageSize*frame >= d.low()
}

// placeable tells whether a file can be renamed to snap while this member has snap open.
func (s *store) placeable(path string) bool {
	from, err := os.Stat(filepath.Dir(path))
	to, again := os.Stat(filepath.Dir(s.path)) // where snap is a link, another file system
	return runtime.GOOS != "windows" && err == nil && again == nil && os.SameFile(from, to)
}

// copyIn copies all pages of a file into snap, in one transaction.
func (s *store) copyIn(path string, m *meta, own map[ownKey]uint64) error {
	err := s.writer.replace(path)
	if err == nil {
		s.foreignly = nil
		s.strange.Store(nil)
	}
	if s.foreignly == nil {
		err = errors.Join(err, s.rebase())
	}
	if s.note(err) == nil {
		s.own = own
		s.inFile.Store(m)
	}
	return err
}

// replace copies all pages of a file that is not in use, in one transaction.
func (c *conn) replace(path string) error {
	b, err := c.raw.(interface {
		NewRestore(string) (*sqlite.Backup, error)
	}).NewRestore(fileURI(path, "mode=ro&immutable=1"))
	if err != nil {
		return err
	}
	more, err := b.Step(-1)
	if err == nil && more {
		err = errors.New("not all pages were copied")
	}
	return c.explain(errors.Join(err, b.Finish()))
}
