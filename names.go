package quorate

// Whether the names in a directory still lead to the files that are open: what somebody has removed or replaced under a running member
// takes writes as before, and nothing of it is there after a restart. It owns the list of names and how they are compared, with stat
// alone: closing a descriptor of snap would drop SQLite's locks on it. It decides nothing. logstore.go and sqlstore.go enter what they
// open and take out what they remove themselves; health.go asks every second.

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"sync"
	"syscall"
)

// errGone: a file of this member was removed or replaced.
var errGone = errors.New("removed or replaced under the running member")

// A nameWatch is of files that are open here, by their paths. All methods may be called at any time, and on nil, where nothing is watched.
type nameWatch struct {
	log *slog.Logger

	mu   sync.Mutex // guards list and what its values point to; never held across I/O
	list map[string]*watchedName
}

type watchedName struct {
	is     fs.FileInfo // the file that is open, as of the last time that its name led to it
	ours   func() bool // tells whether this member has replaced it itself; nil = it never does
	strict bool        // another file of the same size is another file
	odd    int         // so many looks in a row have found another file of another size
	warned bool
}

func newNameWatch(log *slog.Logger) *nameWatch {
	if !namesWatched {
		return nil
	}
	return &nameWatch{log: log, list: make(map[string]*watchedName)}
}

// add enters a path as the name of what it leads to now.
func (n *nameWatch) add(path string, ours func() bool) error {
	if n == nil {
		return nil
	}
	info, err := os.Stat(path)
	if err == nil {
		n.enter(path, info, ours)
	}
	return err
}

// addStrictly is add for what nobody but SQLite makes: a shell that makes it anew makes it empty, or as long as it always is.
func (n *nameWatch) addStrictly(path string) error {
	if n == nil {
		return nil
	}
	info, err := os.Stat(path)
	if err == nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.list[path] = &watchedName{is: info, strict: true}
	}
	return err
}

func (n *nameWatch) enter(path string, is fs.FileInfo, ours func() bool) *watchedName {
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	f := &watchedName{is: is, ours: ours}
	n.list[path] = f
	return f
}

// drop comes before this member closes, removes or renames the file.
func (n *nameWatch) drop(paths ...string) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, path := range paths {
		delete(n.list, path)
	}
}

// dropEntry takes out an entry, unless the name is another file's by now.
func (n *nameWatch) dropEntry(path string, f *watchedName) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.list[path] == f {
		delete(n.list, path)
	}
}

// look compares every name with its file. lost are those that are missing, or that lead to another file of another size for the second
// time in a row, each with an error that wraps errGone. Another file of the same size may be the same one (of a network file system, or
// put back by a tool that keeps everything but the inode), and is one warning.
func (n *nameWatch) look() (lost map[string]error) {
	for path, f := range n.all() {
		if err := n.lookAt(path, f); err != nil {
			if lost == nil {
				lost = make(map[string]error)
			}
			lost[path] = err
		}
	}
	return lost
}

func (n *nameWatch) all() map[string]*watchedName {
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.list)
}

func (n *nameWatch) lookAt(path string, f *watchedName) error {
	info, err := os.Stat(path)
	n.mu.Lock()
	is := f.is
	n.mu.Unlock()
	same := err == nil && (os.SameFile(info, is) || f.ours != nil && f.ours())
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.list[path] != f: // this member has let go of it meanwhile
		return nil
	case isMissing(err):
		return fmt.Errorf("%s: %w: the name is gone", path, errGone)
	case err != nil:
		return nil // the disk will tell
	case same:
		f.is, f.odd = info, 0
		return nil
	case f.strict || info.Size() != f.is.Size():
		if f.odd++; f.odd > 1 || f.strict {
			return fmt.Errorf("%s: %w: another file has its name", path, errGone)
		}
		return nil
	}
	if f.odd = 0; !f.warned {
		f.warned = true
		n.log.Warn("a file of this member has another inode and the same size: if somebody has replaced it, what is written now is lost",
			"path", path)
	}
	return nil
}

// hold is look without patience, for what is to become durable now: an error if a name is missing or may be another file's.
func (n *nameWatch) hold() error {
	for path := range n.all() {
		if err := n.holdAt(path); err != nil {
			return err
		}
	}
	return nil
}

// holdAt is hold for one path, and nil where that is not entered.
func (n *nameWatch) holdAt(path string) error {
	f := n.all()[path]
	if f == nil {
		return nil
	}
	info, err := os.Stat(path)
	n.mu.Lock()
	is, here := f.is, n.list[path] == f
	n.mu.Unlock()
	if here && (isMissing(err) || err == nil && !os.SameFile(info, is) && (f.strict || info.Size() != is.Size()) && (f.ours == nil || !f.ours())) {
		return fmt.Errorf("%s: %w", path, errGone)
	}
	return nil
}

func isMissing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// hasName tells whether an open file has a name still, any name.
func hasName(file any) error {
	f, ok := file.(interface{ Stat() (fs.FileInfo, error) })
	if !ok || !namesWatched {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if linkCount(info) == 0 {
		return fmt.Errorf("%s: %w: what is written to it has no name any more", info.Name(), errGone)
	}
	return nil
}
