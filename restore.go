package quorate

// Restore: a backup, or the file of a member that no longer runs, becomes the directory of a new member. This file owns what may be
// taken (never a file that is in use, nor half of a database), what of the old cluster goes with it (rows, and nothing that names its
// members), where the revisions go on, and that a refusal leaves the target as it was. Control comes from db.go's Restore and returns
// there; no member runs yet.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/hashicorp/raft"
)

// restore builds the new member in the order that a crash at any step allows. now is read once.
func restore(dir, from string, now func() time.Time) error {
	dir, err := memberDir(dir)
	if err != nil {
		return err
	}
	src, err := openSource(from)
	if err != nil {
		return err
	}
	defer src.close()
	if in, name := filepath.Split(src.path); filepath.Clean(in) == dir && (name == "snap" || leftover(name)) {
		return errHeld
	}
	t, err := claim(dir)
	if err != nil {
		return err
	}
	err = t.fill(src, now)
	if err != nil {
		err = errors.Join(err, t.undo())
	}
	return errors.Join(err, t.lock.unlock())
}

// errHeld: also where the source has a name of ours in the target, which the next Open removes.
var errHeld = fmt.Errorf("%w: the directory holds a member already: give an empty one", ErrInvalid)

// A source is the file that a Restore reads. It is never changed.
type source struct {
	path string       // of the file itself, not of a link to it
	logs bool         // the newest writes are in its write-ahead log
	lock *flock.Flock // keeps its member from starting; nil = it lies in no member's directory
}

func (s source) close() {
	if s.lock != nil {
		s.lock.Unlock()
	}
}

// openSource refuses a file that is in use, or that is not the whole of a database. It opens the file last: closing a file that a
// member of this process has open would take away SQLite's locks on it.
func openSource(from string) (s source, err error) {
	names, err := linkNames(from)
	if err != nil {
		return s, err
	}
	s.path = names[len(names)-1]
	info, err := os.Stat(s.path)
	if err != nil {
		return s, err
	}
	if len(s.path) > maxSQLitePath {
		return s, fmt.Errorf("%w: the file's path has %d bytes, and SQLite takes %d: %s", ErrInvalid, len(s.path), maxSQLitePath, s.path)
	}
	if !info.Mode().IsRegular() {
		return s, fmt.Errorf("%w: %s is not a file", ErrInvalid, from)
	}
	if openHere(info) {
		return s, fmt.Errorf("%w: a member of this process has %s open: close it, or use its Backup", ErrLocked, from)
	}
	if s.lock, err = lockOwner(names, info); err != nil {
		return s, err
	}
	if s.logs, err = s.check(); err != nil {
		s.close()
	}
	return s, err
}

// linkNames are the names of a file along the symbolic links that lead to it, each of them absolute; the last one is no link.
// What belongs to the file, its log and its member's lock, lies beside one of them and not beside the others.
func linkNames(path string) (names []string, err error) {
	for range 40 { // as many as Linux follows
		if path, err = filepath.Abs(path); err != nil {
			return nil, err
		}
		parent, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return nil, err
		}
		path = filepath.Join(parent, filepath.Base(path))
		names = append(names, path)
		info, err := os.Lstat(path)
		if err != nil {
			return nil, err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			return names, nil
		}
		to, err := os.Readlink(path)
		if err != nil {
			return nil, err
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(parent, to)
		}
		path = to
	}
	return nil, fmt.Errorf("%w: too many links from %s", ErrInvalid, names[0])
}

// lockOwner locks the directory whose snap the file is, if there is one. The lock is a shared one, which a directory that can't be
// written gives too, and it changes nothing there.
func lockOwner(names []string, file fs.FileInfo) (*flock.Flock, error) {
	for _, name := range names {
		dir := filepath.Dir(name)
		lock := filepath.Join(dir, "wal", "lock")
		if info, err := os.Stat(filepath.Join(dir, "snap")); err != nil || !os.SameFile(info, file) {
			continue
		}
		if _, err := os.Stat(lock); err != nil {
			continue
		}
		l := flock.New(lock, flock.SetFlag(os.O_RDONLY))
		free, err := l.TryRLock()
		if err != nil {
			return nil, fmt.Errorf("lock the member's directory %s: %w", dir, err)
		}
		if !free {
			return nil, fmt.Errorf("%w: close the member that has %s open, or use its Backup: %s is held by %s", ErrLocked, name, dir,
				readHolder(filepath.Join(dir, "wal", "holder")))
		}
		return l, nil
	}
	return nil, nil
}

// check tells from the header and from what lies beside the file whether it is whole, and whether its log belongs to it.
func (s source) check() (logs bool, err error) {
	closed, err := checkHeader(s.path)
	if err != nil {
		return false, err
	}
	size := func(side string) int64 {
		info, err := os.Stat(s.path + side)
		if err != nil {
			return -1
		}
		return info.Size()
	}
	switch {
	case size("-journal") > 0, closed && max(size("-wal"), size("-shm")) > 0:
		return false, fmt.Errorf("%w: %s is in use, or was not closed, or what lies beside it under its name belongs to another file: "+
			"close it first, or use Backup", ErrInvalid, s.path)
	case closed:
		return false, nil
	case size("-wal") < 0:
		// A state of a few megabytes can be in the log as a whole. An empty log is another thing: whoever is killed after a checkpoint
		// that cuts the log leaves one.
		return false, fmt.Errorf("%w: %s is a file in WAL mode without its log, %s-wal, which may hold the newest writes or all of them. "+
			`Take another copy with Backup, or from the member's own snap with: sqlite3 -readonly snap "vacuum into 'copy'". `+
			"Only a file that sqlite3's .backup has made, or that its member has closed while another program read it, is whole like this; "+
			`restore that after: sqlite3 copy "pragma journal_mode=delete"`, ErrInvalid, s.path, s.path)
	}
	return true, nil
}

// The stores that this process has open, so that nothing else opens and closes their files. The locks that SQLite has on a file are
// the process's: they go when any descriptor of the file is closed, under whatever name it was opened.
var openStores struct {
	mu   sync.Mutex // guards list
	list map[*store]bool
}

func (s *store) enlist() {
	openStores.mu.Lock()
	defer openStores.mu.Unlock()
	if openStores.list == nil {
		openStores.list = make(map[*store]bool)
	}
	openStores.list[s] = true
}

func (s *store) delist() {
	openStores.mu.Lock()
	defer openStores.mu.Unlock()
	delete(openStores.list, s)
}

func openHere(file fs.FileInfo) bool {
	openStores.mu.Lock()
	defer openStores.mu.Unlock()
	for s := range openStores.list {
		if info, err := os.Stat(s.path); err == nil && os.SameFile(info, file) {
			return true
		}
	}
	return false
}

// A target is the directory that a Restore fills, locked.
type target struct {
	dir  string
	lock *dirLock
	had  map[string]bool // paths of what was in it and in wal before
	id   []byte          // what the file id held, that of a member without state; nil = there was none
	meta []byte          // what the log's meta file held, that of one without entries; nil = there was none
	made bool            // all that follows in fill may have been changed
}

// claim locks dir, which is then as it was but for the lock, and makes sure that no member's state is there. What a Restore that did
// not end has left may be.
func claim(dir string) (t target, err error) {
	t = target{dir: dir, had: make(map[string]bool)}
	if t.lock, err = lockDir(dir, ""); err != nil {
		return t, err
	}
	err = errors.Join(t.each(func(path string) { t.had[path] = true }), vacant(dir))
	if err == nil && t.had[t.path("id")] {
		t.id, err = os.ReadFile(t.path("id"))
	}
	if err == nil && t.had[t.metaPath()] {
		t.meta, err = os.ReadFile(t.metaPath())
	}
	if err != nil {
		t.lock.takeBack()
	}
	return t, err
}

func (t target) path(name string) string { return filepath.Join(t.dir, name) }
func (t target) metaPath() string        { return t.path(filepath.Join("wal", "wal-meta.db")) }

func (t target) each(f func(path string)) error {
	for _, dir := range []string{t.dir, t.path("wal")} {
		list, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range list {
			f(filepath.Join(dir, e.Name()))
		}
	}
	return nil
}

// undo takes out what a Restore has made: snap first, for a directory with a snap and without an id is one that has lost its id. It
// puts back what it has replaced: who was about to join goes on with that.
func (t target) undo() error {
	remove := func(path string) {
		if !t.had[path] && !t.lock.owns(path) {
			os.Remove(path)
		}
	}
	remove(t.path("snap"))
	t.each(remove)
	err := t.putBack()
	t.lock.takeBack()
	return err
}

func (t target) putBack() error {
	if !t.made {
		return nil
	}
	if t.id != nil {
		if err := replaceIdentity(t.dir, t.id); err != nil {
			return err
		}
	}
	if t.meta == nil {
		return nil
	}
	return replaceFile(t.metaPath(), t.metaPath()+".tmp", t.meta)
}

// vacant: no member's state is there. A log tells only when it is opened, which may change it: so a copy is, of its first segment, and
// one of more segments has entries.
func vacant(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, "snap")); err == nil {
		return errHeld
	}
	meta := filepath.Join(dir, "wal", "wal-meta.db")
	if _, err := os.Lstat(meta); err != nil {
		return nil
	}
	list, err := os.ReadDir(filepath.Dir(meta))
	if err != nil {
		return err
	}
	files := []string{meta}
	for _, e := range list {
		if filepath.Ext(e.Name()) == ".wal" {
			files = append(files, filepath.Join(filepath.Dir(meta), e.Name()))
		}
	}
	if len(files) > 2 {
		return errHeld
	}
	temp, err := os.MkdirTemp("", "quorate")
	if err != nil { // a container's image may have no directory for temporary files
		temp, err = os.MkdirTemp(dir, ".quorate-")
	}
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	for _, file := range files {
		if err := copyFile(filepath.Join(temp, filepath.Base(file)), file); err != nil {
			return err
		}
	}
	l, err := openLog(logOptions{dir: temp, log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return fmt.Errorf("the log in %s (in a copy): %w", filepath.Dir(meta), err)
	}
	_, last := l.bounds()
	if err := l.close(); err != nil {
		return err
	}
	if last > 0 {
		return errHeld
	}
	return nil
}

// fill makes the member. snap comes last: until it is there, Open refuses the directory and Restore takes it again.
func (t *target) fill(src source, now func() time.Time) error {
	ident := identity{id: newID(), cluster: newID(), intent: intentMember}
	file, temp := t.path("snap.source"), t.path("snap.restore")
	defer os.Remove(file)
	defer os.Remove(temp)
	if !src.logs {
		file = src.path
	} else if err := src.takeIn(file); err != nil {
		return err
	}
	m, err := restoreInto(temp, file, func(m *meta) { begin(m, ident.id, now()) })
	if err != nil {
		return err
	}
	if m.applied == 0 {
		ident.intent = intentBootstrap // the state of a member that had not begun yet
	}
	t.made = true
	if _, err := seedTerm(t.path("wal"), m.term); err != nil {
		return err
	}
	if err := writeIdentity(t.dir, ident); err != nil {
		return err
	}
	if err := os.Rename(temp, t.path("snap")); err != nil {
		return err
	}
	for path := range t.had {
		if filepath.Dir(path) == t.dir && leftover(filepath.Base(path)) {
			os.Remove(path)
		}
	}
	return syncDir(t.dir)
}

// takeIn copies the file to path and lets it take in its log.
func (s source) takeIn(path string) error {
	before, err := s.state()
	if err != nil {
		return err
	}
	for _, side := range []string{"-wal", ""} { // a crash in between leaves no database
		if err := copyFile(path+side, s.path+side); err != nil {
			return err
		}
	}
	after, err := s.state()
	if err != nil {
		return err
	}
	if before != after { // the lock is not where this name leads
		return fmt.Errorf("%w: %s has changed while it was copied: close the member that has it open, or use its Backup", ErrLocked, s.path)
	}
	st, err := openStore(storeOptions{path: path, memory: -1, log: slog.New(slog.DiscardHandler), lone: true})
	if err != nil {
		return err
	}
	return st.close()
}

// state changes when somebody writes to the file.
func (s source) state() (state [2]struct {
	size int64
	at   time.Time
}, err error) {
	for i, side := range []string{"", "-wal"} {
		info, err := os.Stat(s.path + side)
		if err != nil {
			return state, err
		}
		state[i].size, state[i].at = info.Size(), info.ModTime()
	}
	return state, nil
}

func copyFile(to, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return writeFile(to, f)
}

// seedTerm lets raft go on in the term of the restored state: a smaller one would be older than the entries it holds. It returns the
// one that was there.
func seedTerm(dir string, term uint64) (was uint64, err error) {
	l, err := openLog(logOptions{dir: dir, log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return 0, err
	}
	key := []byte("CurrentTerm")
	was, err = besideRaft(context.Background(), l, func() (uint64, error) {
		was, err := l.GetUint64(key)
		if err != nil {
			return 0, err
		}
		return was, l.SetUint64(key, term)
	})
	return was, errors.Join(err, l.close())
}

// begin makes the state that of a cluster whose only member is id.
func begin(m *meta, id string, now time.Time) {
	m.config = raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{
		{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: raft.ServerAddress(placeholderAddr(id))}}})
	m.configIndex, m.installed = m.applied, m.applied
	if m.applied == 0 {
		return // it never began
	}
	m.revision = revisionAfter(m.revision, now)
	if m.keep > 0 {
		m.base = m.revision
	}
}

// revisionAfter is where a restored state goes on. The old cluster may have given out revisions after the backup that nobody knows
// here, to watchers and as tokens, and so may a cluster that was made of the same backup before. So the revision is the time since
// 2020 in units of 2^-21 s: more than any cluster writes, and more at each further restore. It reaches 2^53 in 2156.
//
// Only where the clock is behind that is a distance added, which no cluster writes between a backup and its restore; two restores of
// one file with such a clock begin at the same revision. The greater of the two would not do: for half an hour after a restore it is
// the sum, and both restores of a backup from that time would begin there.
func revisionAfter(old uint64, now time.Time) uint64 {
	if d := now.Sub(revisionEpoch); d > 0 {
		if at := uint64(d/time.Second)<<21 + uint64(d%time.Second)<<21/uint64(time.Second); at > old {
			return at
		}
	}
	return old + 1<<32
}

var revisionEpoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// restoreInto makes dst out of src, which is whole and not in use: the same rows under a changed meta, and nothing of the cluster
// that src belonged to, nor of another program that has put tables beside ours: a lone member runs beside them and backs them up, and
// no member that is to join would take them. What it has made it reads back as a whole.
func restoreInto(dst, src string, change func(*meta)) (meta, error) {
	m, err := restoreFile(dst, src, change)
	if err != nil {
		return meta{}, fmt.Errorf("restore %s from %s: %w", dst, src, err)
	}
	return m, nil
}

func restoreFile(dst, src string, change func(*meta)) (m meta, err error) {
	was, err := checkFileOf(src, true)
	if err != nil {
		return m, err
	}
	if _, err := os.Stat(dst); !errors.Is(err, fs.ErrNotExist) {
		return m, cmpErr(err, fs.ErrExist)
	}
	from, err := os.Open(src)
	if err != nil {
		return m, err
	}
	defer from.Close()
	err = buildFile(dst, dst+".new", func(c *conn) error {
		if err := c.dropStrange(); err != nil {
			return err
		}
		m, err = c.detach(change)
		return err
	}, from)
	if err != nil {
		return m, err
	}
	now, err := checkFile(dst)
	if err == nil && (now.hash() != m.hash() || now.kvSum != was.kvSum || now.chain != was.chain || now.keys != was.keys || now.bytes != was.bytes) {
		err = corrupt("what was restored is not what %s holds", src)
	}
	return now, err
}

// detach removes what belongs to a cluster, in one transaction.
func (c *conn) detach(change func(*meta)) (m meta, err error) {
	if m, err = c.readMeta(); err != nil {
		return m, err
	}
	change(&m)
	m.ownSum = 0
	if err := c.exec(qBegin); err != nil {
		return m, err
	}
	for _, table := range []string{"quorate_session", "quorate_allowed", "quorate_removed", "quorate_mark"} {
		if err := c.execText("DELETE FROM " + table); err != nil {
			return m, err
		}
	}
	if m.keep > 0 {
		if err := c.rebound(&m); err != nil {
			return m, err
		}
	}
	if err := c.writeMeta(&m); err != nil {
		return m, err
	}
	return m, c.exec(qCommit)
}

// rebound takes out of the history what is older than its beginning, and puts down where that is.
func (c *conn) rebound(m *meta) error {
	hash, put, args := m.bounds()
	m.ownSum = hash
	return errors.Join(c.exec(qTrim, int64(m.oldest())), c.exec(put, args...))
}
