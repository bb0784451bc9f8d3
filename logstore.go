package quorate

// Raft's log and its votes on disk: raft-wal with what it leaves out. It owns dir/wal, puts a checksum into every entry
// and verifies it whenever the entry is read, keeps the newest entries in memory, and decides what a failing disk means.
// It never touches SQLite or the network and never asks what an entry says. Control comes from raft's goroutines, through
// raft.LogStore and raft.StableStore, and from db.go, which opens and closes it; it goes on to raft-wal.
//
// Raft answers many errors of its log with a panic and misjudges others. So the methods that raft calls return an error
// only where raft survives it; elsewhere they wait until an error passes (disk.go says which do: no space, no descriptor), or after an
// I/O error or corruption they park: they block
// until close and then end their goroutine with runtime.Goexit. No lock is held meanwhile.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
)

const (
	logSegment      = 8 << 20 // raft-wal's own 64 MiB are allocated at once, in every new directory
	logRetry        = 200 * time.Millisecond
	logCacheBytes   = 2 << 20
	logCacheEntries = 512
	logMaxEntry     = segment.MaxEntrySize - 4096 // raft-wal stores larger ones and can't read them back
)

// logRepair ends every message about a damaged log.
const logRepair = "repair: stop this member, move its directory away, start it empty with a bootURL"

type logOptions struct {
	dir         string          // the log's own directory; created 0700
	segmentSize int             // 0 = 8 MiB
	vfs         types.VFS       // segment files; nil = raft-wal's own
	meta        types.MetaStore // votes, terms and the list of segments; nil = raft-wal's own
	log         *slog.Logger    // never nil
	leader      func() bool     // whether this member is leader just now; nil = never
	// ahead is called with a leader's new entries, and the term of the one before them, just before they are written. It must
	// not wait. True: other members may hold them from now on. nil = never.
	ahead func(entries []*raft.Log, prevTerm uint64) bool
	// fault is called once with the sticky fault, with a passing one when it begins or becomes one of another kind, and with nil when it
	// has passed; nil = nobody is told.
	fault func(error)

	// What a full disk, or another passing error, means for an append. A follower's is answered if resent is set: its leader sends it
	// again, and meanwhile raft can vote. A leader's waits as long as stays says that no other voter could lead, for an error makes
	// raft step down; nil = never. room gives back space that is held in reserve; true = the append is tried again at once.
	resent bool
	stays  func() bool
	room   func() bool
}

// A logStore is raft's LogStore, StableStore and MonotonicLogStore.
// Lock order: write, files, probing, mu.
type logStore struct {
	logOptions
	sink   *walSink
	closed chan struct{} // closed by close; ends every wait

	write sync.Mutex // held by the one call that changes the log, for one try of it, over its I/O: raft-wal has one writer too

	// files guards wal. Reads share it over their I/O; whatever lets raft-wal close a file (truncating, reopening, closing)
	// takes it alone, because raft-wal v0.4.1 can close a file between a reader's look-up of it and the read.
	files sync.RWMutex
	wal   *wal.WAL // nil while it is away: a reopening failed and is tried again, or after close

	probing sync.Mutex     // held while the file of a probe is there, over its I/O
	removal sync.WaitGroup // of segment files that nothing refers to any more
	reserve *reserve       // write guards its spare descriptor
	names   *nameWatch     // of the files that are open
	staying atomic.Int32   // appends of a leader that wait for space, the tries between the waits included

	mu       sync.Mutex // guards the fields below; never held across I/O
	firstIdx uint64     // what the log should hold: truncations are entered here first, appends last. Reopening makes the
	lastIdx  uint64     // disk agree, so that a batch whose fsync failed is gone and a truncation cut short is complete
	lastTerm uint64
	size     int64
	cache    logCache
	cut      bool                    // the end of the log was deleted, and nothing has been appended since
	pace     pace                    // of the appends, each with its fsync
	writing  time.Time               // when the one began that goes on; zero = none
	trying   time.Time               // when the probe began that goes on; zero = none
	newest   time.Duration           // that the last append or probe which has ended took, with its fsync
	calls    map[*time.Time]struct{} // when the store calls in progress began
	sticky   error                   // the first fault that does not pass; only a restart clears it
	waiting  error                   // a passing error, such as a full disk, until a store call works again
	isClosed bool
	closeErr error
}

var (
	_ raft.LogStore          = (*logStore)(nil)
	_ raft.StableStore       = (*logStore)(nil)
	_ raft.MonotonicLogStore = (*logStore)(nil)
)

// openLog opens the log in o.dir or makes a new one. An error wraps ErrCorrupt and names the repair if what lies there can't
// be read as a log; any other error, such as a read-only directory or a full disk, is the system's.
func openLog(o logOptions) (*logStore, error) {
	if o.segmentSize == 0 {
		o.segmentSize = logSegment
	}
	if o.vfs == nil {
		o.vfs = walfs.New()
	}
	if o.meta == nil {
		o.meta = &metadb.BoltMetaDB{}
	}
	if o.leader == nil {
		o.leader = func() bool { return false }
	}
	if o.fault == nil {
		o.fault = func(error) {}
	}
	l := &logStore{
		logOptions: o,
		sink:       &walSink{log: o.log},
		names:      newNameWatch(o.log),
		closed:     make(chan struct{}),
		calls:      map[*time.Time]struct{}{},
	}
	if err := makeLogDir(o.dir); err != nil {
		return nil, err
	}
	os.Remove(filepath.Join(o.dir, probeName)) // of a life that was killed
	var err error
	if l.reserve, err = newReserve(o.dir); err != nil {
		return nil, err
	}
	w, err := l.openWAL()
	if err != nil {
		l.reserve.close()
		return nil, err
	}
	l.wal = w
	if err := l.load(w); err != nil {
		w.Close()
		l.reserve.close()
		return nil, err
	}
	return l, nil
}

// makeLogDir syncs the parent: a power cut must not take away a directory whose content was synced.
func makeLogDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// load reads the bounds and the last entry.
func (l *logStore) load(w *wal.WAL) error {
	first, last, err := walBounds(w)
	if err != nil {
		return err
	}
	l.firstIdx, l.lastIdx = first, last
	l.size = l.sealedBytes()
	if last == 0 {
		return nil
	}
	var e raft.Log
	if err := l.readWAL(w, last, &e); err == raft.ErrLogNotFound {
		return l.unopened(fmt.Errorf("it says that it holds entries %d to %d, and %d is not there", first, last, last))
	} else if err != nil {
		return err
	}
	l.lastTerm = e.Term
	return nil
}

// sealedBytes is the size of the segment files without the newest, which is allocated ahead.
func (l *logStore) sealedBytes() int64 {
	files, _ := filepath.Glob(filepath.Join(l.dir, "*.wal"))
	slices.Sort(files)
	var n int64
	for _, name := range files[:max(len(files)-1, 0)] {
		if info, err := os.Stat(name); err == nil {
			n += info.Size()
		}
	}
	return n
}

// close wakes the parked and waiting calls and closes the files. A call that hangs in the disk holds it up.
func (l *logStore) close() error {
	l.mu.Lock()
	if !l.isClosed {
		l.isClosed = true
		close(l.closed)
	}
	l.mu.Unlock()
	l.write.Lock()
	defer l.write.Unlock()
	l.files.Lock()
	defer l.files.Unlock()
	if l.wal != nil {
		l.names.drop(l.metaPath())
		l.closeErr = l.wal.Close()
		l.wal = nil
	}
	l.removal.Wait()
	l.probing.Lock() // none begins after this
	defer l.probing.Unlock()
	l.reserve.close()
	return l.closeErr
}

// FirstIndex implements raft.LogStore.
func (l *logStore) FirstIndex() (uint64, error) { first, _ := l.bounds(); return first, nil }

// LastIndex implements raft.LogStore.
func (l *logStore) LastIndex() (uint64, error) { _, last := l.bounds(); return last, nil }

// IsMonotonic implements raft.MonotonicLogStore: raft empties the log after an install instead of leaving a gap.
func (l *logStore) IsMonotonic() bool { return true }

// GetLog implements raft.LogStore. Its only error is raft.ErrLogNotFound, for an index that the log does not hold; raft
// panics on others. It waits while an error may pass.
func (l *logStore) GetLog(index uint64, e *raft.Log) error {
	err := l.read(index, e)
	for passing(err) {
		if !l.pause() {
			return l.park()
		}
		err = l.read(index, e)
	}
	if err == nil || err == raft.ErrLogNotFound {
		return err
	}
	l.stick(err)
	return l.park()
}

// StoreLog implements raft.LogStore, as StoreLogs does.
func (l *logStore) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// StoreLogs implements raft.LogStore. An entry without a checksum gets one in place, because these same structs go to the
// followers. It returns an error for entries that don't follow the log or whose checksum is wrong, and nothing is stored. A
// leader also gets the disk's errors: one that is passing means that nothing is stored here, after any other, or with errUnsettled
// in it, the entries may be there after a restart. With errSentAhead in it, others may hold them.
func (l *logStore) StoreLogs(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	for _, e := range entries {
		if len(e.Extensions) == 0 {
			sealEntry(e)
		} else if err := checkEntry(e); err != nil {
			return err
		}
	}
	how, ahead := waits, false
	switch {
	case l.leader():
		how, ahead = stays, l.sendAhead(entries)
	case l.resent && !l.isCut():
		how = answers
	}
	err := l.change(fmt.Sprintf("append %d entries at index %d", len(entries), entries[0].Index), how, func() error {
		if err := l.follows(entries); err != nil {
			return err
		}
		began := time.Now()
		l.writes(began)
		defer l.writes(time.Time{})
		if err := l.wal.StoreLogs(entries); err != nil {
			return err
		}
		l.appended(entries, time.Since(began))
		return nil
	})
	if err != nil && ahead {
		err = fmt.Errorf("%w; %w", err, errSentAhead)
	}
	return err
}

// sendAhead: a disk that is full already would make every failed write an uncertain one.
func (l *logStore) sendAhead(entries []*raft.Log) bool {
	last, term := l.last()
	return l.ahead != nil && last != 0 && entries[0].Index == last+1 && l.failed() == nil && l.ahead(entries, term)
}

// A usageError is the caller's mistake and says nothing about the disk.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func (l *logStore) follows(entries []*raft.Log) error {
	_, last := l.bounds()
	for i, e := range entries {
		if e.Index == 0 || last != 0 && e.Index != last+1 {
			return usageError{fmt.Errorf("append index %d after index %d", e.Index, last)}
		}
		if len(e.Data) > logMaxEntry {
			return usageError{&LimitError{What: fmt.Sprintf("log entry %d of %d", i+1, len(entries)), Limit: logMaxEntry, Got: int64(len(e.Data))}}
		}
		last = e.Index
	}
	return nil
}

func (l *logStore) appended(entries []*raft.Log, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = false
	l.pace.add(took)
	l.newest = took
	if l.lastIdx == 0 {
		l.firstIdx = entries[0].Index
	}
	for _, e := range entries {
		l.lastIdx, l.lastTerm = e.Index, e.Term
		l.size += int64(len(e.Data))
		l.cache.add(e)
	}
}

// DeleteRange implements raft.LogStore for a prefix, a suffix or the whole log; the error is for any other range.
func (l *logStore) DeleteRange(low, high uint64) error {
	return l.change(fmt.Sprintf("delete entries %d to %d", low, high), waits, func() error { return l.delete(low, high) })
}

// reset deletes every entry and keeps the votes and the term. Unlike raft's methods it returns the disk's errors.
func (l *logStore) reset() error {
	return l.change("delete every entry", answers, func() error { return l.delete(l.bounds()) })
}

func (l *logStore) delete(low, high uint64) error {
	first, last := l.bounds()
	if last == 0 || low > high || high < first || low > last {
		return nil
	}
	if low > first && high < last {
		return usageError{fmt.Errorf("delete entries %d to %d in the middle of %d to %d", low, high, first, last)}
	}
	var term uint64
	if low > first {
		var e raft.Log
		if err := l.read(low-1, &e); err != nil {
			return err
		}
		term = e.Term
	}
	l.files.Lock()
	defer l.files.Unlock()
	l.deleted(low, high, term)
	return l.wal.DeleteRange(max(low, first), min(high, last))
}

// deleted enters a truncation. term is that of the entry before low, if there is one.
func (l *logStore) deleted(low, high, term uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.lastIdx - l.firstIdx + 1
	switch {
	case low > l.firstIdx:
		l.lastIdx, l.lastTerm, l.cut = low-1, term, true
	case high < l.lastIdx:
		l.firstIdx = high + 1
	default:
		l.firstIdx, l.lastIdx, l.lastTerm, l.size = 0, 0, 0, 0
	}
	l.cache.keep(l.firstIdx, l.lastIdx)
	l.size = int64(float64(l.size) * float64(l.lastIdx-l.firstIdx+1) / float64(before))
}

// Set implements raft.StableStore.
func (l *logStore) Set(key, value []byte) error {
	return l.change("set "+string(key), waits, func() error { return cmpErr(l.wal.Set(key, value), l.names.hold()) })
}

// SetUint64 implements raft.StableStore.
func (l *logStore) SetUint64(key []byte, value uint64) error {
	return l.change("set "+string(key), waits, func() error { return cmpErr(l.wal.SetUint64(key, value), l.names.hold()) })
}

// Get implements raft.StableStore. A key that was never set has no value and gives no error.
func (l *logStore) Get(key []byte) (value []byte, err error) {
	err = l.reading(func(w *wal.WAL) error {
		value, err = w.Get(key)
		return err
	})
	return value, err
}

// GetUint64 implements raft.StableStore: 0 if never set.
func (l *logStore) GetUint64(key []byte) (value uint64, err error) {
	err = l.reading(func(w *wal.WAL) error {
		value, err = w.GetUint64(key)
		return err
	})
	return value, err
}

// last is the newest entry's index and term; 0, 0 if the log is empty.
func (l *logStore) last() (index, term uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastIdx, l.lastTerm
}

// bounds are the indexes of the oldest and the newest entry; 0, 0 if the log is empty.
func (l *logStore) bounds() (first, last uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.firstIdx, l.lastIdx
}

// termAt is the term of the entry at index, if the log holds it and it is whole. It never parks.
func (l *logStore) termAt(index uint64) (uint64, bool) {
	if last, term := l.last(); index == last && last != 0 {
		return term, true
	}
	var e raft.Log
	if err := l.read(index, &e); err != nil {
		return 0, false
	}
	return e.Term, true
}

// bytes is about how much data the entries hold: exact for what was stored since openLog, else from the sizes of the files,
// and a truncation takes its share by the number of entries.
func (l *logStore) bytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size
}

// busy is how long the oldest store call in progress has been running, parked ones included; 0 if there is none.
func (l *logStore) busy() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var longest time.Duration
	for began := range l.calls {
		longest = max(longest, time.Since(*began), 1)
	}
	return longest
}

// fsync is how long an append takes, with its fsync; 0 if there was none.
func (l *logStore) fsync() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pace.median()
}

// appends are the newest times that an append took with its fsync, of those after the first so many, and how many there were in all.
// One that is still going on is among them if it is slow already.
func (l *logStore) appends(after int) (took []time.Duration, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	took = l.pace.after(after)
	if d := time.Since(l.writing); !l.writing.IsZero() && d > slowAppend {
		took = append(took, d)
	}
	return took[max(len(took)-paceKept, 0):], l.pace.n
}

// writes notes when the append began that raft-wal does now; zero = none.
func (l *logStore) writes(began time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writing = began
}

// tries notes that a probe begins, tried that it has ended, with or without an error.
func (l *logStore) tries() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trying = time.Now()
}

func (l *logStore) tried() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.newest, l.trying = time.Since(l.trying), time.Time{}
}

// disk is how long the oldest call to the disk has been running, probes included, and how long the newest took that has ended.
func (l *logStore) disk() (running, newest time.Duration) {
	running = l.busy()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.trying.IsZero() {
		running = max(running, time.Since(l.trying))
	}
	return running, l.newest
}

// failed is the sticky fault, else the passing error that store calls wait for, else nil.
func (l *logStore) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return cmpErr(l.sticky, l.waiting)
}

// verify reads every entry from the disk and checks it. The error wraps ErrCorrupt for the first one that is damaged; it is
// returned only, and does not fail the log. Entries deleted meanwhile are passed over, newer ones are not waited for.
func (l *logStore) verify(ctx context.Context) error {
	first, last := l.bounds()
	for index := first; index != 0 && index <= last; index++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		var e raft.Log
		err := l.reading(func(w *wal.WAL) error { return l.readWAL(w, index, &e) })
		if err == raft.ErrLogNotFound {
			first, _ = l.bounds()
			index = max(index, first-min(first, 1))
			continue
		}
		if passing(err) && l.pause() {
			index--
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// A conduct is what a store call does about a fault.
type conduct int

const (
	waits   conduct = iota // retries while the error is passing, parks for good on anything worse
	answers                // returns the error; a passing one once it is certain that nothing was stored
	stays                  // a leader's append: answers as soon as another voter could lead
)

// errUnsettled is part of a passing error after which nobody has made sure yet that nothing is stored: raft-wal could not be opened anew.
// It will be before anything else is read or written, and then what was not acknowledged is taken out.
var errUnsettled = errors.New("and the log is not opened anew yet")

// notStored reports whether a failed append is certain to have no effect: neither this log has its entries nor anybody else.
func notStored(err error) bool {
	return passing(err) && !errors.Is(err, errSentAhead) && !errors.Is(err, errUnsettled)
}

// change runs op, which changes the log or the stable store, under the rules for faults. op runs with write held.
func (l *logStore) change(what string, how conduct, op func() error) error {
	call := l.begin()
	defer l.end(call)
	err := l.try(what, op)
	if how == stays && passing(err) {
		l.staying.Add(1)
		defer l.staying.Add(-1)
	}
	for first := err; how != waits && passing(err); {
		err = l.settle()
		leads := how == stays && l.stays != nil && (err == nil || passing(err))
		stay := leads && l.stays()
		switch {
		case err == nil && !stay:
			return first
		case leads && !stay: // what keeps the log from being opened anew, such as no descriptor, may last: another one must lead meanwhile
			return fmt.Errorf("%w; %w", first, errUnsettled)
		case (stay || passing(err)) && !l.pause():
			err = ErrClosed
		case stay:
			l.again(call)
			if err = l.try(what, op); passing(err) {
				first = err
			}
		default:
			l.again(call)
		}
	}
	for passing(err) {
		if !l.pause() {
			return l.park()
		}
		l.again(call)
		err = l.try(what, op)
	}
	var usage usageError
	switch {
	case err == nil:
		l.passed()
		return nil
	case errors.As(err, &usage):
		return usage.err
	case how != waits:
		return err
	default:
		return l.park()
	}
}

// begin notes that a store call is in progress, again that it has come back with a passing error and is tried anew: it does not hang.
func (l *logStore) begin() (call *time.Time) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls[&now] = struct{}{}
	return &now
}

func (l *logStore) again(call *time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*call = time.Now()
}

func (l *logStore) end(call *time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.calls, call)
}

// probe looks whether a log that met a full disk takes entries again, where no append is there to find out: it opens what has to be
// opened, and writes a file of its own.
func (l *logStore) probe() {
	if l.settle() != nil {
		return
	}
	l.write.Lock()
	err := l.tryFile(l.segmentSize)
	l.write.Unlock()
	if err == nil {
		l.passed()
	}
}

const probeName = "probe"

// trySmall looks whether there is space for a few entries. An append does not wait for it.
func (l *logStore) trySmall() error { return l.tryFile(len(zeros)) }

// tryFile takes so much space; that of a segment is as much as an append may need. A file of that name may be left of a probe that was
// cut short, and Create makes no file twice.
func (l *logStore) tryFile(size int) error {
	l.probing.Lock()
	defer l.probing.Unlock()
	if isClosed(l.closed) {
		return ErrClosed
	}
	l.tries()
	defer l.tried()
	l.vfs.Delete(l.dir, probeName)
	f, err := l.vfs.Create(l.dir, probeName, uint64(size))
	if err != nil {
		l.vfs.Delete(l.dir, probeName)
		return err
	}
	_, err = f.WriteAt(zeros[:], 0)
	return errors.Join(err, f.Sync(), f.Close(), l.vfs.Delete(l.dir, probeName))
}

func (l *logStore) isCut() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cut
}

// try runs op once, and once more if the spare descriptor or the space in reserve was what it needed.
func (l *logStore) try(what string, op func() error) (err error) {
	defer func() {
		if !errors.As(err, new(usageError)) {
			l.tell(err) // after the lock is free: the caller may ask things
		}
	}()
	l.write.Lock()
	defer l.write.Unlock()
	if err := l.usableLocked(); err != nil {
		return err
	}
	if err = l.attemptLocked(what, op); noDescriptor(err) && l.wal != nil {
		l.log.Warn("the log met the limit of open files and has used its spare descriptor", "dir", l.dir, "error", err)
		err = l.attemptLocked(what, op)
	}
	if isFull(err) && l.room != nil && l.room() {
		if again := l.usableLocked(); again != nil {
			return again
		}
		err = l.attemptLocked(what, op)
	}
	return err
}

// attemptLocked runs op. After a passing error it reopens raft-wal: a batch whose fsync failed may be on the disk, and after an error
// at the change to a new segment raft-wal accepts nothing more.
func (l *logStore) attemptLocked(what string, op func() error) error {
	err := guard(op)
	if errors.As(err, new(usageError)) || err == nil {
		l.reserve.take()
		return err
	}
	if cause := l.sink.cause(); errors.Is(err, types.ErrSealed) && cause != nil {
		err = cause
	}
	err = l.explain(what, err)
	if passing(err) {
		if again := l.reopenLocked(); again != nil && !passing(again) {
			return again
		}
	}
	return err
}

// settle makes sure that nothing is on the disk but what was acknowledged.
func (l *logStore) settle() error {
	var err error
	defer func() { l.tell(err) }()
	l.write.Lock()
	defer l.write.Unlock()
	err = l.usableLocked()
	return err
}

func (l *logStore) usableLocked() error {
	l.mu.Lock()
	sticky, closed := l.sticky, l.isClosed
	l.mu.Unlock()
	switch {
	case sticky != nil:
		return sticky
	case closed:
		return ErrClosed
	case l.wal == nil:
		return l.reopenLocked()
	}
	return nil
}

// reopenLocked opens raft-wal anew and makes the disk hold what the log should hold. On an error raft-wal stays away, and the
// next store call tries again.
func (l *logStore) reopenLocked() error {
	l.files.Lock()
	defer l.files.Unlock()
	if l.wal != nil {
		l.names.drop(l.metaPath())
		l.wal.Close()
		l.wal = nil
	}
	if _, err := os.Lstat(l.metaPath()); isMissing(err) { // raft-wal would make a new one, without a vote
		return l.explain("reopen", fmt.Errorf("%s: %w: the name is gone", l.metaPath(), errGone))
	}
	l.reserve.give() // the process may take every descriptor that was just closed but this one
	defer l.reserve.take()
	w, err := l.openWAL()
	if err != nil {
		return err
	}
	if err := guard(func() error { return l.agree(w) }); err != nil {
		w.Close()
		return l.explain("reopen", err)
	}
	l.wal = w
	return nil
}

func (l *logStore) agree(w *wal.WAL) error {
	first, last := l.bounds()
	onFirst, onLast, err := walBounds(w)
	switch {
	case err != nil:
		return err
	case last == 0 && onLast == 0:
		return nil
	case last == 0:
		return w.DeleteRange(onFirst, onLast)
	case onLast < last || onFirst > first:
		return fmt.Errorf("%w: entries %d to %d were stored, and %d to %d are left; %s", ErrCorrupt, first, last, onFirst, onLast, logRepair)
	}
	if onLast > last {
		if err := w.DeleteRange(last+1, onLast); err != nil {
			return err
		}
	}
	if onFirst < first {
		return w.DeleteRange(onFirst, first-1)
	}
	return nil
}

func walBounds(w *wal.WAL) (first, last uint64, err error) {
	if first, err = w.FirstIndex(); err != nil {
		return 0, 0, err
	}
	last, err = w.LastIndex()
	return first, last, err
}

// tell notes a fault, once, and passes a sticky one on.
func (l *logStore) tell(err error) {
	switch {
	case err == nil || err == ErrClosed:
	case passing(err):
		l.mu.Lock()
		another := l.waiting == nil || isFull(l.waiting) != isFull(err) // its repair is another one
		l.waiting = err
		l.mu.Unlock()
		if another {
			l.log.Warn("the log takes no entries for now, and tries again", "dir", l.dir, "error", err)
			l.fault(err)
		}
	default:
		l.stick(err)
	}
}

func (l *logStore) stick(err error) {
	if err == ErrClosed {
		return
	}
	l.mu.Lock()
	first := l.sticky == nil
	if first {
		l.sticky = err
	}
	l.mu.Unlock()
	if first {
		l.log.Error("log failed; only a restart clears this", "dir", l.dir, "error", err)
		l.fault(err)
	}
}

// passed ends what passes.
func (l *logStore) passed() {
	l.mu.Lock()
	ends := l.waiting != nil && l.sticky == nil
	l.waiting = nil
	l.mu.Unlock()
	if ends {
		l.log.Info("the log takes entries again", "dir", l.dir)
		l.fault(nil)
	}
}

// park blocks until close and then ends the goroutine, which is raft's.
func (l *logStore) park() error {
	<-l.closed
	runtime.Goexit()
	return nil
}

// pause waits between two tries; false when the log is closed.
func (l *logStore) pause() bool {
	t := time.NewTimer(logRetry)
	defer t.Stop()
	select {
	case <-l.closed:
		return false
	case <-t.C:
		return true
	}
}

// read fetches and checks an entry, from memory if it is there. raft.ErrLogNotFound: the log does not hold that index.
// Otherwise ErrCorrupt, ErrClosed, or the fault that keeps raft-wal from being reopened. It never parks.
func (l *logStore) read(index uint64, e *raft.Log) error {
	l.mu.Lock()
	cached, ok := l.cache.get(index)
	l.mu.Unlock()
	if ok && checkEntry(&cached) == nil {
		*e = cached
		return nil
	}
	if first, last := l.bounds(); last == 0 || index < first || index > last {
		return raft.ErrLogNotFound // without waiting for a raft-wal that is away
	}
	return l.reading(func(w *wal.WAL) error { return l.readWAL(w, index, e) })
}

// reading runs a read of raft-wal's, and waits while it is away.
func (l *logStore) reading(read func(w *wal.WAL) error) error {
	for {
		l.files.RLock()
		if w := l.wal; w != nil {
			defer l.files.RUnlock()
			return guard(func() error { return read(w) })
		}
		l.files.RUnlock()
		l.mu.Lock()
		sticky := l.sticky
		l.mu.Unlock()
		if sticky != nil {
			return sticky
		}
		if !l.pause() {
			return ErrClosed
		}
	}
}

// readWAL reads an entry from the disk; files is held.
func (l *logStore) readWAL(w *wal.WAL, index uint64, e *raft.Log) error {
	if first, last := l.bounds(); last == 0 || index < first || index > last {
		return raft.ErrLogNotFound
	}
	var got raft.Log
	err := guard(func() error { return w.GetLog(index, &got) })
	if err == nil && got.Index != index { // a damaged index block leads to another entry, which is whole
		err = fmt.Errorf("found entry %d there", got.Index)
	}
	if err == nil {
		err = checkEntry(&got)
	}
	if err != nil {
		return fmt.Errorf("%w: log %s, index %d: %w; %s", ErrCorrupt, l.dir, index, err, logRepair)
	}
	*e = got
	return nil
}

// guard turns a panic into an error, for raft-wal v0.4.1 and the bbolt below it panic on some damaged bytes, and bbolt reads
// through a memory map that faults where its file was cut short.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, p)
		}
	}()
	return f()
}

// explain adds where and what to an error of the disk, and makes every kind of passing error one that passing knows.
func (l *logStore) explain(what string, err error) error {
	if errors.Is(err, ErrCorrupt) && !strings.Contains(err.Error(), logRepair) {
		return fmt.Errorf("log %s: %s: %w; %s", l.dir, what, err, logRepair)
	}
	if diskFull(err) && !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("log %s: %s: %w: %w", l.dir, what, syscall.ENOSPC, err)
	}
	if strings.Contains(err.Error(), "mmap allocate error: "+syscall.ENOMEM.Error()) { // bbolt v1.3.6, as text alone, before it writes
		return fmt.Errorf("log %s: %s: %w", l.dir, what, untouched{fmt.Errorf("%w: %w", syscall.ENOMEM, err)})
	}
	return fmt.Errorf("log %s: %s: %w", l.dir, what, err)
}

// diskFull also looks at the text: bbolt v1.3.6 hands on what the system said while its file grew as text alone.
func diskFull(err error) bool {
	if err == nil {
		return false
	}
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		strings.Contains(err.Error(), syscall.ENOSPC.Error()) || strings.Contains(err.Error(), syscall.EDQUOT.Error())
}

// openWAL opens raft-wal in the directory and completes what a crash left undone.
func (l *logStore) openWAL() (*wal.WAL, error) {
	l.sink.forget()
	l.removal.Wait() // raft-wal would find these files and remove them as well
	f := &filer{Filer: segment.NewFiler(l.dir, zeroedFS{l.vfs, int64(l.segmentSize), l.reserve, l.names}), dir: l.dir, vfs: l.vfs, removal: &l.removal, log: l.log}
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Level: hclog.Off, Output: io.Discard})
	logger.RegisterSink(l.sink)
	var w *wal.WAL
	err := guard(func() (err error) {
		w, err = wal.Open(l.dir, wal.WithSegmentFiler(f), wal.WithMetaStore(l.meta), wal.WithSegmentSize(l.segmentSize), wal.WithLogger(logger))
		return err
	})
	if err != nil {
		// raft-wal leaves open what it had opened, and the lock on the meta file would block the next try for ever.
		f.closeAll()
		guard(l.meta.Close)
		return nil, l.unopened(err)
	}
	if f.sealed != nil {
		if err := f.sealed.rotate(w, l.sink); err != nil {
			w.Close()
			return nil, l.explain("change to a new segment", err)
		}
	}
	// raft-wal v0.4.1 syncs the directory with the first sync of a segment that it has made itself, and never for one that it finds.
	// A tail that was made just before the end of the last process would lose its name in a power cut, with all that is synced in it.
	if err := l.reserve.sync(); err != nil {
		w.Close()
		return nil, l.explain("open", err)
	}
	if err := l.names.add(l.metaPath(), nil); err != nil && !isMissing(err) { // a meta store of its own has no such file
		w.Close()
		return nil, l.explain("open", err)
	}
	f.relaxed.Store(true)
	return w, nil
}

func (l *logStore) metaPath() string { return filepath.Join(l.dir, metadb.FileName) }

// unopened tells corruption from the system's errors. A file that is missing is lost: raft-wal makes the last segment itself.
func (l *logStore) unopened(err error) error {
	var errno syscall.Errno
	if diskFull(err) || errors.As(err, &errno) && !errors.Is(err, fs.ErrNotExist) {
		return l.explain("open", err)
	}
	return fmt.Errorf("%w: log %s: %w; %s", ErrCorrupt, l.dir, err, logRepair)
}

// A filer is raft-wal's own, with one repair and one relief.
//
// The repair: raft-wal ends a segment in the write of its last batch, and opens the next one later, in the background. If the
// process ends or is closed in between, or a power cut tears that write, v0.4.1 reopens the segment as its tail and knows that it
// has ended, but never opens the next: every append is ErrSealed, for ever.
//
// The relief: raft-wal removes what a truncation leaves over while appends wait, and syncs the directory after each file.
type filer struct {
	*segment.Filer
	dir    string
	vfs    types.VFS
	log    *slog.Logger
	opened []io.Closer
	sealed *sealedTail // the recovered tail, if it has ended

	removal *sync.WaitGroup
	relaxed atomic.Bool // raft-wal is open
	turn    sync.Mutex  // of one removal after the other
}

// Delete removes a segment: at once while raft-wal is being opened, later in the background. The meta file has let go of it, and
// one that stays, because the process ends or the disk fails, is removed by the next open.
func (f *filer) Delete(baseIndex, id uint64) error {
	if !f.relaxed.Load() { // what is about to be made may have the same name, if the meta file was damaged
		return f.Filer.Delete(baseIndex, id)
	}
	f.removal.Go(func() {
		f.turn.Lock()
		defer f.turn.Unlock()
		if err := f.Filer.Delete(baseIndex, id); err != nil && !noDescriptor(err) { // for syncing the directory: the file is gone
			f.log.Warn("a part of the log that is no longer needed stays until the next start", "dir", f.dir, "segment", id, "error", err)
		}
	})
	return nil
}

func (f *filer) Create(info types.SegmentInfo) (types.SegmentWriter, error) {
	w, err := f.Filer.Create(info)
	if err == nil {
		f.opened = append(f.opened, w)
	}
	return w, err
}

func (f *filer) Open(info types.SegmentInfo) (types.SegmentReader, error) {
	r, err := f.Filer.Open(info)
	if err == nil {
		f.opened = append(f.opened, r)
	}
	return r, err
}

func (f *filer) RecoverTail(info types.SegmentInfo) (types.SegmentWriter, error) {
	w, err := f.Filer.RecoverTail(info)
	if err != nil {
		return nil, err
	}
	f.opened = append(f.opened, w)
	ended, indexStart, err := w.Sealed()
	if err != nil || !ended {
		return w, err
	}
	if w.LastIndex() == 0 {
		// Its only batch was torn, so nothing in it was acknowledged. raft-wal makes a missing tail anew.
		w.Close()
		if err := f.vfs.Delete(f.dir, segment.FileName(info)); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("segment %d: %w", info.ID, fs.ErrNotExist)
	}
	if err := f.writeIndex(info, w, indexStart); err != nil {
		return nil, err
	}
	f.sealed = &sealedTail{SegmentWriter: w}
	return f.sealed, nil
}

// writeIndex writes the segment's index block where raft-wal will look for it. If the last batch is whole, these bytes are
// there already; if it was torn, they go behind the last whole batch, over what was never acknowledged.
func (f *filer) writeIndex(info types.SegmentInfo, w types.SegmentWriter, indexStart uint64) error {
	offsets := w.(interface{ OffsetForFrame(uint64) (uint32, error) })
	from := max(info.BaseIndex, info.MinIndex) // nobody asks for those before MinIndex
	var block []byte
	for index := from; index <= w.LastIndex(); index++ {
		offset, err := offsets.OffsetForFrame(index)
		if err != nil {
			return err
		}
		block = binary.LittleEndian.AppendUint32(block, offset)
	}
	file, err := f.vfs.OpenWriter(f.dir, segment.FileName(info))
	if err != nil {
		return err
	}
	defer file.Close()
	at := int64(indexStart + 4*(from-info.BaseIndex))
	there := make([]byte, len(block))
	if n, _ := file.ReadAt(there, at); n == len(block) && string(there) == string(block) {
		return nil
	}
	if _, err := file.WriteAt(block, at); err != nil {
		return err
	}
	return file.Sync()
}

// A zeroedFS writes zeros where the log will be, a part at a time, together with what is written before them. The blocks of a new
// segment are only promised to it: the first write of each would change the file system's own records, which a sync then has to
// wait for as well. Of 8 KiB that took 0.39 ms in the mean of three files on one ext4, and 0.21 ms where zeros had been written. Large
// writes go without, for zeros double what is written: of 20 to 32 KiB it was 1.1 ms with zeros ahead and 1.2 without, of 52 KiB 1.6 and
// 1.3. A file system that never overwrites, as Btrfs, gains nothing, and gives up the space that was promised to the segment: an append
// can meet a full disk there.
type zeroedFS struct {
	types.VFS
	size    int64 // of a segment; beyond it no zeros are written
	reserve *reserve
	names   *nameWatch
}

const (
	zeroAhead = 256 << 10
	zeroPage  = 4 << 10
	zeroSmall = 32 << 10 // the largest write that they are worth their while for
)

var zeros [zeroSmall]byte

func (z zeroedFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	return z.zeroed(dir, name)(z.VFS.Create(dir, name, size))
}

func (z zeroedFS) OpenWriter(dir, name string) (types.WritableFile, error) {
	return z.zeroed(dir, name)(z.VFS.OpenWriter(dir, name))
}

func (z zeroedFS) zeroed(dir, name string) func(types.WritableFile, error) (types.WritableFile, error) {
	return func(file types.WritableFile, err error) (types.WritableFile, error) {
		if err != nil {
			return nil, err
		}
		return &zeroedFile{WritableFile: file, size: z.size, reserve: z.reserve, place: z.place(dir, name, file)}, nil
	}
}

// OpenReader opens a segment that has ended.
func (z zeroedFS) OpenReader(dir, name string) (types.ReadableFile, error) {
	file, err := z.VFS.OpenReader(dir, name)
	if err != nil {
		return nil, err
	}
	return &placedReader{file, z.place(dir, name, file)}, nil
}

// place enters the name of a file that was just opened.
func (z zeroedFS) place(dir, name string, file any) place {
	p := place{names: z.names, path: filepath.Join(dir, name)}
	if f, ok := file.(interface{ Stat() (fs.FileInfo, error) }); ok {
		if info, err := f.Stat(); err == nil {
			p.name = z.names.enter(p.path, info, nil)
		}
	}
	return p
}

// A place is the entry of an open file among the names.
type place struct {
	names *nameWatch
	path  string
	name  *watchedName
}

// leave comes before the file is closed, and so before raft-wal removes it.
func (p place) leave() { p.names.dropEntry(p.path, p.name) }

type placedReader struct {
	types.ReadableFile
	place place
}

func (r *placedReader) Close() error {
	r.place.leave()
	return r.ReadableFile.Close()
}

// A zeroedFile has one writer, which only appends: nothing after its last write is wanted.
type zeroedFile struct {
	types.WritableFile
	size, until int64 // zeros were written until here
	reserve     *reserve
	place       place
}

func (f *zeroedFile) Close() error {
	f.place.leave()
	return f.WritableFile.Close()
}

// Sync is that of raft-wal's file, which opens the directory after the first sync of a new file, once, to sync its name as well. Where
// no descriptor is left for that, the data is on the disk already.
func (f *zeroedFile) Sync() error {
	err := f.WritableFile.Sync()
	var at *fs.PathError
	if noDescriptor(err) && errors.As(err, &at) && at.Op == "open" {
		err = f.reserve.sync()
	}
	if err == nil { // what is acknowledged has a name
		err = hasName(f.WritableFile)
	}
	return err
}

func (f *zeroedFile) WriteAt(b []byte, at int64) (int, error) {
	n, err := f.WritableFile.WriteAt(b, at)
	if end := at + int64(n); err == nil && n <= zeroSmall && end > f.until && end < f.size {
		f.until = min(end+zeroAhead, f.size)
		f.writeZeros(end, (int64(n)+zeroPage-1)/zeroPage*zeroPage)
	}
	if err != nil && n == 0 {
		err = untouched{err}
	}
	return n, err
}

// writeZeros writes them in pieces of about the size of the write before. Linux keeps in one piece what was written in one, and where
// a byte of it changes, /proc/PID/io counts the whole piece. Zeros are there for speed alone: without them a write takes longer.
func (f *zeroedFile) writeZeros(from, piece int64) {
	piece = max(piece, zeroPage)
	for ; from < f.until; from += piece {
		if _, err := f.WritableFile.WriteAt(zeros[:min(piece, f.until-from)], from); err != nil {
			return
		}
	}
}

func (f *filer) closeAll() {
	for _, c := range f.opened {
		c.Close()
	}
}

// A sealedTail is a tail that has ended.
type sealedTail struct {
	types.SegmentWriter
	swallow bool // used by rotate alone, under raft-wal's own lock
}

func (t *sealedTail) Append(entries []types.LogEntry) error {
	if t.swallow {
		return nil
	}
	return t.SegmentWriter.Append(entries)
}

// rotate makes raft-wal open the next segment, which it does after an append alone: this one stores nothing.
func (t *sealedTail) rotate(w *wal.WAL, sink *walSink) error {
	next := t.LastIndex() + 1
	sink.forget()
	t.swallow = true
	if err := w.StoreLog(&raft.Log{Index: next}); err != nil {
		return err
	}
	if err := w.DeleteRange(next, next); err != nil { // deletes nothing, and waits for the new segment
		return err
	}
	t.swallow = false
	return sink.cause()
}

// A walSink takes raft-wal's log lines. The error of a change to a new segment is seen nowhere else.
type walSink struct {
	log *slog.Logger
	mu  sync.Mutex // guards err
	err error
}

// Accept implements hclog.SinkAdapter.
func (s *walSink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	if i := slices.Index(args, any("err")); level >= hclog.Error && i >= 0 && i+1 < len(args) {
		if err, ok := args[i+1].(error); ok {
			s.mu.Lock()
			s.err = err
			s.mu.Unlock()
		}
	}
	s.log.Debug("raft-wal: "+msg, args...)
}

func (s *walSink) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *walSink) forget() {
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
}

// A logCache is the newest entries: those that followers and apply ask for next.
type logCache struct {
	ring  [logCacheEntries]raft.Log // by index modulo the length
	low   uint64                    // indexes low to high are here; none if low > high or high is 0
	high  uint64
	bytes int
}

func (c *logCache) get(index uint64) (raft.Log, bool) {
	if index == 0 || index < c.low || index > c.high {
		return raft.Log{}, false
	}
	return c.ring[index%logCacheEntries], true
}

// add keeps a copy of the struct; the data is shared, for nobody changes it.
func (c *logCache) add(e *raft.Log) {
	if e.Index != c.high+1 || c.high == 0 {
		c.keep(0, 0)
		c.low = e.Index
	}
	if e.Index-c.low == logCacheEntries {
		c.drop()
	}
	c.high = e.Index
	c.ring[e.Index%logCacheEntries] = *e
	c.bytes += len(e.Data)
	for c.bytes > logCacheBytes {
		c.drop()
	}
}

func (c *logCache) drop() {
	e := &c.ring[c.low%logCacheEntries]
	c.bytes -= len(e.Data)
	*e = raft.Log{}
	c.low++
}

// keep forgets the entries outside low to high.
func (c *logCache) keep(low, high uint64) {
	for c.low <= c.high && c.high > 0 && c.high > high {
		e := &c.ring[c.high%logCacheEntries]
		c.bytes -= len(e.Data)
		*e = raft.Log{}
		c.high--
	}
	for c.low <= c.high && c.high > 0 && c.low < low {
		c.drop()
	}
	if c.low > c.high {
		c.low, c.high, c.bytes = 0, 0, 0
	}
}

// The checksum in raft.Log.Extensions: a version byte and two CRCs of 32 bits, which processors compute by themselves and
// which together are as strong as one of 64.
const (
	sumVersion = 1
	sumLen     = 1 + 4 + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func entrySum(e *raft.Log) [sumLen]byte {
	var head [17]byte
	binary.LittleEndian.PutUint64(head[0:], e.Index)
	binary.LittleEndian.PutUint64(head[8:], e.Term)
	head[16] = byte(e.Type)
	sum := [sumLen]byte{sumVersion}
	binary.LittleEndian.PutUint32(sum[1:], crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, e.Data))
	binary.LittleEndian.PutUint32(sum[5:], crc32.Update(crc32.ChecksumIEEE(head[:]), crc32.IEEETable, e.Data))
	return sum
}

// sealEntry puts the checksum into an entry that has none.
func sealEntry(e *raft.Log) {
	if len(e.Extensions) == 0 {
		sum := entrySum(e)
		e.Extensions = sum[:]
	}
}

// checkEntry returns ErrCorrupt unless the entry carries the right checksum.
func checkEntry(e *raft.Log) error {
	if sum := entrySum(e); string(e.Extensions) != string(sum[:]) {
		return fmt.Errorf("%w: entry %d of term %d: wrong checksum", ErrCorrupt, e.Index, e.Term)
	}
	return nil
}
