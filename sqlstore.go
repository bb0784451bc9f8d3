package quorate

// The state: rows and meta, changed by one transaction at a time, and dir/snap, the SQLite file that follows and that sqlite3
// can read beside us. This file owns the schema, every SQL string, the transactions and the scan. It knows nothing of raft, of
// the network, or of what an entry means: fsm.go calls begin, changes rows and meta, and commits, which costs no I/O. How what
// is committed gets into the file is flush.go's, copies of the whole are copy.go's, connections and rows conn.go's.
//
// Durability is the raft log's. The file holds a prefix of the commits at any time, after a power cut too; barrier makes all
// of them durable, and raft may cut its log only after one.
//
// Corruption is ours to notice, SQLite does not: every row carries a hash, and the meta row carries the sum of all of them
// and its own hash, so that a flipped or a lost row anywhere is found by the scan that maintain runs in the background.

import (
	"bytes"
	"context"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	applicationID = 0x51524154 // "QRAT", for file(1)
	pageSize      = 4096
	keptMarks     = 64

	walLimit      = 24 << 20 // the writer itself checkpoints above this
	walBackground = 16 << 20 // another connection checkpoints when this much of the WAL waits
	walKept       = 16 << 20 // SQLite cuts the file to this when it begins anew
	walLong       = 80 << 20 // nothing of ours lets it become so long
	walAgain      = 4 << 20  // while a reader keeps the WAL from restarting, the writer checkpoints once per this growth

	pinLimit = 32 << 20 // WAL that a copy or a listing may keep from restarting; then what is left of it moves into a file

	chunkRows  = 4096 // of the scan: one snapshot each
	scanFirst  = 2048 // rows that transactions read from the file during a scan; those after wait for it
	scanWait   = 2 * time.Second
	chunkBytes = 4 << 20 // values read before a chunk is cut short
	copyPages  = 64      // a backup is written in pieces of this many pages
)

// The schema, by the format (user_version, and meta.format) that brought each table. kv and history are public: columns may be
// added, none is renamed. value has no type: it is TEXT when it is valid UTF-8 without NUL, for people, and BLOB otherwise.
// Everything quorate_ is private. uint64 are stored as int64. The text is compared when a file is opened, so that no trigger,
// index or table of someone else's comes with it.
var schema = map[uint64][]table{firstFormat: {
	{"kv", `CREATE TABLE kv(
	key TEXT PRIMARY KEY NOT NULL,
	value NOT NULL,
	version INTEGER NOT NULL,
	created INTEGER NOT NULL,
	sum INTEGER NOT NULL
) WITHOUT ROWID`},
	{"quorate_meta", `CREATE TABLE quorate_meta(
	id INTEGER PRIMARY KEY CHECK(id = 1),
	format INTEGER NOT NULL,
	applied INTEGER NOT NULL,
	term INTEGER NOT NULL,
	installed INTEGER NOT NULL,
	revision INTEGER NOT NULL,
	config BLOB,
	config_index INTEGER NOT NULL,
	kv_sum INTEGER NOT NULL,
	own_sum INTEGER NOT NULL,
	chain BLOB NOT NULL,
	barrier INTEGER NOT NULL,
	keys INTEGER NOT NULL,
	bytes INTEGER NOT NULL,
	sum INTEGER NOT NULL
)`},
	{"quorate_session", `CREATE TABLE quorate_session(
	id INTEGER PRIMARY KEY,
	nonce BLOB NOT NULL,
	acked INTEGER NOT NULL,
	last INTEGER NOT NULL,
	results BLOB,
	sum INTEGER NOT NULL
)`},
	{"quorate_allowed", `CREATE TABLE quorate_allowed(addr TEXT PRIMARY KEY NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID`},
	{"quorate_removed", `CREATE TABLE quorate_removed(id TEXT PRIMARY KEY NOT NULL, at INTEGER NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID`},
	{"quorate_mark", `CREATE TABLE quorate_mark(
	boundary INTEGER PRIMARY KEY,
	applied INTEGER NOT NULL,
	kv_sum INTEGER NOT NULL,
	chain BLOB NOT NULL,
	sum INTEGER NOT NULL
)`},
}, historyFormat: {
	{"history", `CREATE TABLE history(
	revision INTEGER PRIMARY KEY,
	key TEXT NOT NULL,
	value,
	deleted INTEGER NOT NULL,
	created INTEGER NOT NULL,
	previous INTEGER NOT NULL,
	last INTEGER NOT NULL,
	sum INTEGER NOT NULL
)`},
	{"quorate_history", `CREATE TABLE quorate_history(
	id INTEGER PRIMARY KEY CHECK(id = 1),
	keep INTEGER NOT NULL,
	base INTEGER NOT NULL,
	sum INTEGER NOT NULL
)`},
}}

type table struct{ name, sql string }

// A query is a statement that connections keep prepared.
type query int

const (
	qBegin query = iota
	qBeginRead
	qCommit
	qRollback
	qDataVersion
	qApplicationID
	qUserVersion
	qPageSize
	qPageCount
	qPages
	qSchema
	qQuickCheck
	qPassive
	qBacklog
	qRestart
	qTruncate
	qGet
	qPut
	qPutMany
	qDelete
	qScan
	qScanAfter
	qList
	qListReverse
	qFixSum
	qMeta
	qSetMeta
	qSessions
	qPutSession
	qDeleteSession
	qFixSession
	qAllowed
	qAllow
	qDisallow
	qFixAllowed
	qRemoved
	qRemove
	qFixRemoved
	qMarks
	qPutMark
	qDeleteMark
	qFixMark
	qChanges
	qPutChange
	qPutChanges
	qTrim
	qClearHistory
	qHistory
	qPutHistory
	qFixHistory
	queries
)

const metaColumns = `format, applied, term, installed, revision, config, config_index, kv_sum, own_sum, chain, barrier, keys, bytes, sum`

// A parameter with a number has a name, which the driver looks up at each call; only those out of order have one here.
var queryText = [queries]string{
	qBegin:         `BEGIN IMMEDIATE`,
	qBeginRead:     `BEGIN`,
	qCommit:        `COMMIT`,
	qRollback:      `ROLLBACK`,
	qDataVersion:   `PRAGMA data_version`,
	qApplicationID: `PRAGMA application_id`,
	qUserVersion:   `PRAGMA user_version`,
	qPageSize:      `PRAGMA page_size`,
	qPageCount:     `PRAGMA page_count`,
	qPages:         `SELECT data FROM sqlite_dbpage ORDER BY pgno`,
	qSchema:        `SELECT type, name, tbl_name, sql FROM sqlite_schema`,
	qQuickCheck:    `PRAGMA quick_check(1)`,
	qPassive:       `PRAGMA wal_checkpoint(PASSIVE)`,
	qBacklog:       `PRAGMA wal_checkpoint(NOOP)`, // only counts: busy, frames in the WAL, frames that are in the database
	qRestart:       `PRAGMA wal_checkpoint(RESTART)`,
	qTruncate:      `PRAGMA wal_checkpoint(TRUNCATE)`,

	qGet:         `SELECT value, version, created, sum FROM kv WHERE key = ?`,
	qPut:         putRow,
	qPutMany:     newRows(rowsAtOnce),
	qDelete:      `DELETE FROM kv WHERE key = ?`,
	qScan:        `SELECT key, value, version, created, sum FROM kv ORDER BY key`,
	qScanAfter:   `SELECT key, value, version, created, sum FROM kv WHERE key > ? ORDER BY key`,
	qList:        `SELECT key, value, version, created, sum FROM kv WHERE key >= ? AND key < ? ORDER BY key LIMIT ?`,
	qListReverse: `SELECT key, value, version, created, sum FROM kv WHERE key >= ? AND key < ? ORDER BY key DESC LIMIT ?`,
	qFixSum:      `UPDATE kv SET value = ?2, sum = ?3 WHERE key = ?1`,

	qMeta: `SELECT ` + metaColumns + ` FROM quorate_meta WHERE id = 1`,
	qSetMeta: `INSERT OR REPLACE INTO quorate_meta(id, ` + metaColumns + `) ` +
		`VALUES(1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,

	qSessions:      `SELECT id, nonce, acked, last, results, sum FROM quorate_session ORDER BY id`,
	qPutSession:    `INSERT OR REPLACE INTO quorate_session(id, nonce, acked, last, results, sum) VALUES(?, ?, ?, ?, ?, ?)`,
	qDeleteSession: `DELETE FROM quorate_session WHERE id = ?`,
	qFixSession:    `UPDATE quorate_session SET sum = ?2 WHERE id = ?1`,
	qAllowed:       `SELECT addr, sum FROM quorate_allowed ORDER BY addr`,
	qAllow:         `INSERT OR REPLACE INTO quorate_allowed(addr, sum) VALUES(?, ?)`,
	qDisallow:      `DELETE FROM quorate_allowed WHERE addr = ?`,
	qFixAllowed:    `UPDATE quorate_allowed SET sum = ?2 WHERE addr = ?1`,
	qRemoved:       `SELECT id, at, sum FROM quorate_removed ORDER BY id`,
	qRemove:        `INSERT OR REPLACE INTO quorate_removed(id, at, sum) VALUES(?, ?, ?)`,
	qFixRemoved:    `UPDATE quorate_removed SET sum = ?2 WHERE id = ?1`,
	qMarks:         `SELECT boundary, applied, kv_sum, chain, sum FROM quorate_mark ORDER BY boundary`,
	qPutMark:       `INSERT OR REPLACE INTO quorate_mark(boundary, applied, kv_sum, chain, sum) VALUES(?, ?, ?, ?, ?)`,
	qDeleteMark:    `DELETE FROM quorate_mark WHERE boundary = ?`,
	qFixMark:       `UPDATE quorate_mark SET sum = ?2 WHERE boundary = ?1`,

	qChanges:      `SELECT revision, key, value, deleted, created, previous, last, sum FROM history WHERE revision > ? ORDER BY revision`,
	qPutChange:    putChanges(1),
	qPutChanges:   putChanges(changesAtOnce),
	qTrim:         `DELETE FROM history WHERE revision <= ?`,
	qClearHistory: `DELETE FROM history`,
	qHistory:      `SELECT keep, base, sum FROM quorate_history`,
	qPutHistory:   `INSERT OR REPLACE INTO quorate_history(id, keep, base, sum) VALUES(1, ?, ?, ?)`,
	qFixHistory:   `UPDATE quorate_history SET sum = ?2 WHERE id = ?1`,
}

var errAgain = errors.New("the file is in use for a moment")

// errForeign: another connection, most likely a sqlite3 shell, has committed to our file. From then on nothing is written to it
// until forgive or install mends it.
var errForeign = errors.New("another program has written to the database")

// Where the state stands; one row of the file.
type meta struct {
	format      uint64
	applied     uint64 // log index of the last entry that is in the rows
	term        uint64 // of that entry
	installed   uint64 // applied at the end of the last install, 0 = never
	revision    uint64
	configIndex uint64
	barrier     uint64 // counts barriers, so that each of them changes a byte
	kvSum       uint64 // of the hashes of all kv rows
	ownSum      uint64 // of the hashes of all private rows but this one
	keys        uint64 // number of kv rows
	bytes       uint64 // of keys and values
	config      []byte
	chain       [32]byte

	keep uint64 // changes that the history holds; 0 = the format has none
	base uint64 // the history begins after this revision, however many it may hold
}

// A row of kv.
type row struct {
	value            string
	version, created uint64
}

type sessionRow struct {
	id          uint64
	nonce       [16]byte
	acked, last uint64
	results     []byte
}

type mark struct {
	boundary, applied, kvSum uint64
	chain                    [32]byte
}

// ownKey names a private row: its table's first letter and its key.
type ownKey struct {
	table byte // 's'ession, 'a'llowed, 'r'emoved, 'm'ark, 'h'istory's bounds
	id    uint64
	name  string
}

type storeOptions struct {
	path   string                     // dir/snap
	memory int64                      // budget in bytes of the in-memory copy; negative = none; never 0
	lone   bool                       // it may be a lone member's, and hold what is not ours beside our tables: see strange
	log    *slog.Logger               // never nil
	space  func(dir string) diskSpace // of the file system; nil = not known
}

type store struct {
	path   string
	log    *slog.Logger
	memory *memory

	// Set before the first transaction, called under mu after a commit is visible; neither may block or call the store.
	published func(revision uint64, changes []past) // the changes of one commit, in order; valid during the call
	replaced  func(revision uint64)                 // the rows are others than the changes have told

	last   atomic.Pointer[meta]  // of the last commit that memory has too
	inFile atomic.Pointer[meta]  // of the last one that the file has
	failed atomic.Pointer[error] // the disk's first error: nothing is written any more

	names *nameWatch // of the file, its WAL and the WAL's index
	// placing: the copy has its second name, and what is open is not what Open would take, until connect has succeeded.
	placing atomic.Bool
	seat    atomic.Int64    // counts how often the file was put in place anew: connections of before see an old one
	stop    <-chan struct{} // closed when the member is closed, before close waits for anybody; set before maintain, nil = never
	step    func(string)    // for tests: called between the steps of a placing
	space   func(dir string) diskSpace

	// strange is what an Open would refuse in the schema: a lone member has nobody to get a clean copy from, and goes on beside it.
	strange atomic.Pointer[error]
	uneasy  func(error) // told why the file could not be written; set before maintain, must not block
	eased   func()      // told that it could be written again; the same

	ending  chan struct{} // closed when close begins: maintain ends, nothing new starts
	reload  chan struct{} // holds one token when a scan is due
	readers chan *conn    // the idle readers; nil stands for one that is not open yet
	lists   chan struct{} // holds one token for each listing that has a transaction or a file

	// fileMu is held across SQLite calls because it guards the one connection that commits. Lock order: fileMu, mu, then
	// checkpointMu, witnessMu, tailMu, stateMu, memory.mu or holdsMu.
	fileMu      sync.Mutex
	unchecked   trouble // the writer's checkpoints that failed; fileMu
	writer      *conn
	guard       *lockGuard
	dataVersion int64             // PRAGMA data_version of the writer as of its last transaction
	own         map[ownKey]uint64 // hashes of the private rows, as the file has them
	walLong     int64             // the WAL's size that is worth a warning
	walChecked  int64             // the WAL's size after the writer's last checkpoint
	foreignly   error             // errForeign, once met: nothing is written to the file as it is
	lone        bool              // of the options
	pace        pacer

	// The witness tells apply whether the file is as we left it, whatever the writer is doing. Its data_version changes with every
	// commit, so that whoever has fileMu shows it each of ours.
	witnessMu sync.Mutex // guards the fields below; held across the read of a number
	witness   *conn
	left      int64 // its data_version, as of when nobody else had committed

	// mu serializes transactions, and is held from begin to commit or rollback. It is held across a read of a row that memory
	// does not have, and never across a write to the file.
	mu      sync.Mutex
	view    map[string]view // of the transaction, reused
	buf     []byte          // for hashing, reused
	past    []past          // of the transaction, reused
	changed []change        // of the transaction, reused
	missed  int             // rows that transactions have read from the file since the scan began
	closed  bool            // changes under fileMu too

	tailMu    sync.RWMutex  // guards the fields below; never held across I/O
	tail      tail          // what was committed since the last flush began
	flushing  tail          // what the flush under way is writing
	used      tail          // empty, with the room that the last flush's rows and changes took, for the next one's
	commits   uint64        // number of commits, so that a reader of the file can wait for what it must see
	filed     uint64        // as many of them are in the file
	stuck     error         // of the last flush, if it failed: apply goes on only if that passes, and as long as the tail has room
	turned    chan struct{} // closed when a flush has ended, well or not
	flusher   bool          // maintain runs
	tailLimit int64         // the constant of that name; a test waits for less
	dirty     chan struct{} // holds one token when there is something to flush
	press     chan struct{} // holds one token when that is not to wait
	ripe      chan struct{} // holds one when it is worth a flush

	stateMu sync.Mutex // guards the fields below
	verdict error      // what the scan found
	scanned bool
	ended   chan struct{}  // closed when there is one; nil = there is
	working sync.WaitGroup // maintain; Add only while ending is open

	// checkpointMu lets the writer wait for the checkpoint in the background to end: while one runs, SQLite lets no other
	// do anything, and the writer would go on filling the WAL. It guards nothing else, and is held across the fsyncs.
	checkpointMu sync.Mutex

	holdsMu sync.Mutex // guards holds
	holds   map[hold]bool

	queries *querier
	damaged func(error) // told of damage that a query has met; set before the first one
}

// openStore creates the file if it is missing or empty, and otherwise checks what can be checked without reading kv.
func openStore(o storeOptions) (*store, error) {
	path, err := realPath(o.path) // a link's log lies beside what it names
	if err != nil {
		return nil, err
	}
	fresh, err := prepareFile(path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s := &store{
		path:      path,
		lone:      o.lone,
		walLong:   walLong,
		log:       o.log,
		memory:    newMemory(o.memory, o.log),
		ending:    make(chan struct{}),
		reload:    make(chan struct{}, 1),
		readers:   make(chan *conn, runtime.GOMAXPROCS(0)),
		lists:     make(chan struct{}, maxLists),
		holds:     make(map[hold]bool),
		turned:    make(chan struct{}),
		dirty:     make(chan struct{}, 1),
		press:     make(chan struct{}, 1),
		ripe:      make(chan struct{}, 1),
		uneasy:    func(error) {},
		names:     newNameWatch(o.log),
		step:      func(string) {},
		space:     o.space,
		eased:     func() {},
		tailLimit: tailLimit,
	}
	if s.space == nil {
		s.space = func(string) diskSpace { return diskSpace{} }
	}
	s.queries, s.damaged = newQuerier(s), func(error) {}
	s.pace.press, s.pace.ending = s.press, s.ending // until maintain runs
	for range cap(s.readers) {
		s.readers <- nil
	}
	m, err := s.connect()
	if err != nil {
		return nil, s.explain("open", err)
	}
	s.last.Store(&m)
	s.inFile.Store(&m)
	s.enlist()
	if fresh {
		s.memory.empty()
		s.scanned = true
	} else {
		s.startLoad(s.meta())
	}
	return s, nil
}

// prepareFile makes sure that there is a file of ours at path. It reads the header itself, before SQLite is let near a
// file that may be someone else's: opening the file ourselves is safe only because no connection of ours has it yet.
func prepareFile(path string) (fresh bool, err error) {
	info, err := os.Stat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err == nil && info.Size() > 0 {
		return false, checkWhole(path)
	}
	// A WAL without its database means nothing, and must not be replayed into the new one.
	for _, side := range []string{"-wal", "-shm", "-journal"} {
		if err := os.Remove(path + side); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return true, createFile(path)
}

// checkWhole also refuses a WAL beside a database that has left WAL mode. Closing syncs the WAL's end before the header's
// change, so this one belongs to a file that was here before, and SQLite would replay it into a backup that was put here.
func checkWhole(path string) error {
	closed, err := checkHeader(path)
	if err != nil || !closed {
		return err
	}
	if info, err := os.Stat(path + "-wal"); err == nil && info.Size() > 0 {
		return fmt.Errorf("%w: the write-ahead log %s-wal belongs to another database; remove it", ErrCorrupt, path)
	}
	return nil
}

// createFile builds the database aside and renames it into place, so that path never names half of one.
func createFile(path string) error {
	return buildFile(path, path+".incoming.new", func(c *conn) error {
		for _, pragma := range []string{
			fmt.Sprintf("page_size=%d", pageSize), "encoding='UTF-8'",
			fmt.Sprintf("application_id=%d", applicationID), fmt.Sprintf("user_version=%d", firstFormat),
		} {
			if err := c.pragma(pragma); err != nil {
				return err
			}
		}
		if err := c.createTables(firstFormat); err != nil {
			return err
		}
		return c.writeMeta(&meta{format: firstFormat})
	}, nil)
}

// buildFile makes a database at path, which is first called aside, out of a copy of from, or of nothing, and a change. A crash leaves
// nothing at path.
func buildFile(path, aside string, change func(c *conn) error, from io.Reader) (err error) {
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(aside)
		}
	}()
	if err := writeFile(aside, from); err != nil {
		return err
	}
	if err := changeFile(aside, change); err != nil {
		return err
	}
	if err := syncFile(aside); err != nil {
		return err
	}
	if err := os.Rename(aside, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func writeFile(path string, from io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if from != nil {
		_, err = io.Copy(f, from)
	}
	return errors.Join(err, f.Close())
}

// changeFile changes a file that is not in use yet; a crash throws the file away, so there is neither journal nor sync.
func changeFile(path string, change func(c *conn) error) (err error) {
	c, err := openConn(path, "mode=rw", "journal_mode=MEMORY", "synchronous=OFF", "trusted_schema=OFF")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	return change(c)
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// checkHeader reads the first page's header: whose file it is, of which version, and whether it was closed, that is, is not
// in WAL mode. Not for a file that is open.
func checkHeader(path string) (closed bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var h [100]byte
	if _, err := io.ReadFull(f, h[:]); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false, err
	}
	if !bytes.HasPrefix(h[:], []byte("SQLite format 3\x00")) {
		return false, fmt.Errorf("%w: not a SQLite database; put back a copy of the file, or remove it if this member can fetch the "+
			"state from the others", ErrCorrupt)
	}
	return h[18] == 1, checkIdentity(int64(binary.BigEndian.Uint32(h[68:])), int64(binary.BigEndian.Uint32(h[60:])),
		int64(binary.BigEndian.Uint16(h[16:])))
}

func checkIdentity(application, version, page int64) error {
	switch {
	case application != applicationID:
		return fmt.Errorf("%w: a database of another application, or a damaged one (application_id %#x): put snap back, or move the directory "+
			"away and start empty with a bootURL", ErrFormat, application)
	case version < firstFormat || version > entryFormat:
		return fmt.Errorf("%w: version %d, and this build reads %d to %d", ErrFormat, version, firstFormat, entryFormat)
	case page != pageSize:
		return fmt.Errorf("%w: page size %d, not %d", ErrFormat, page, pageSize)
	}
	return nil
}

// connect opens the writer and the witness, and returns what the file holds. After an error there is neither.
func (s *store) connect() (m meta, err error) {
	defer func() {
		if err != nil {
			s.disconnect()
		}
	}()
	if err := s.openWriter(); err != nil {
		return m, err
	}
	if m, err = s.writer.readMeta(); err != nil {
		return m, err
	}
	if s.own, err = s.writer.readOwn(m); err != nil {
		return m, err
	}
	s.step("writer")
	if s.witness, err = openReader(s.path); err != nil {
		return m, err
	}
	if err := s.rebase(); err != nil {
		return m, err
	}
	s.step("witness")
	if err := s.watchNames(); err != nil {
		return m, err
	}
	if err := s.writer.keepWAL(true); err != nil { // not before: an open that fails leaves nothing beside the file
		return m, err
	}
	s.guardLocks()
	return m, nil
}

func (s *store) openWriter() error {
	// Without temp_store SQLite journals a statement that changes many pages in a temporary file: a transaction that is larger than its
	// cache would then depend on the space in /var/tmp, on the right to write there, and on a descriptor.
	c, err := openConn(s.path, "mode=rw", "trusted_schema=OFF", "cache_size=-16000", "temp_store=MEMORY")
	if err != nil {
		return err
	}
	s.writer = c
	if err := s.admitSchema(); err != nil {
		return err
	}
	mode, err := c.text("PRAGMA journal_mode=WAL")
	if err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("journal mode is %s, not wal", mode)
	}
	for _, pragma := range []string{"synchronous=NORMAL", "wal_autocheckpoint=0", fmt.Sprintf("journal_size_limit=%d", walKept)} {
		if err := c.pragma(pragma); err != nil {
			return err
		}
	}
	return nil
}

// admitSchema refuses what is not ours, before anything is written: all of it where another member may have the state, and else what
// would get in the way of our statements. A lone member's triggers are dropped if they have changed nothing yet.
func (s *store) admitSchema() error {
	err := s.checkSchema()
	strange := new(strangeSchema)
	if err == nil || !s.lone || !errors.As(err, &strange) {
		return err
	}
	if strange.inTheWay() {
		return err
	}
	if !strange.hasTrigger() {
		return nil
	}
	if _, damage := s.writer.checkState(); damage != nil {
		return fmt.Errorf("%w (and the rows are not what was written: %w)", err, damage)
	}
	if err := s.dropTriggers(); err != nil {
		return err
	}
	if err := s.checkSchema(); !errors.As(err, &strange) {
		return err
	}
	return nil
}

// checkSchema keeps what it finds. fileMu is held, or nobody else is there yet.
func (s *store) checkSchema() error {
	err := s.writer.checkSchema()
	if err == nil {
		s.strange.Store(nil)
	} else {
		told := fmt.Errorf("%s: %w", s.path, err)
		s.strange.Store(&told)
	}
	return err
}

// close is idempotent. Afterwards only the database is left, in the rollback journal mode in which it may be copied.
func (s *store) close() error {
	s.stateMu.Lock()
	select {
	case <-s.ending:
	default:
		close(s.ending)
	}
	s.stateMu.Unlock()
	s.working.Wait()

	ended, behind := s.endWrites()
	if ended {
		return nil
	}
	// Without fileMu, for which whoever is waited for here may be waiting.
	for _, h := range s.openHolds() {
		h.close()
	}
	s.queries.close()
	for range cap(s.lists) { // one that was about to begin ends by itself: ending is closed
		s.lists <- struct{}{}
	}
	for range cap(s.readers) {
		if r := <-s.readers; r != nil {
			r.close()
		}
	}
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	defer s.delist()
	return s.explain("close", errors.Join(behind, s.closeWriter()))
}

// endWrites flushes for the last time. What the file does not get is in the log, and whoever keeps the file's lock delays no close.
func (s *store) endWrites() (ended bool, err error) {
	s.lockFile()
	defer s.fileMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return true, nil
	}
	s.closed = true
	if s.failed.Load() == nil {
		err = s.writer.pragma("busy_timeout=500")
	}
	if err == nil {
		err = s.flushLocked()
	}
	switch {
	case isBusy(err), errors.Is(err, errForeign):
		s.log.Warn("the last changes are in the log only", "path", s.path, "error", err)
		return false, nil
	case err != nil:
		return false, fmt.Errorf("the last changes are in the log only: %w", err)
	}
	return false, nil
}

// closeWriter ends WAL mode. A shell that reads the file just now can prevent that: then the WAL stays, which is as safe,
// and the next open goes on from it.
func (s *store) closeWriter() error {
	if s.failed.Load() != nil {
		// What the failed sync has lost may be missing from the WAL. Its checksums end it there at the next open, if nothing
		// has moved it into the database before; closing the last connection would. So it stays open, as after a kill.
		return nil
	}
	if s.names.holdAt(s.path) != nil { // Err has said so; by their names it would change another's files
		return s.disconnect()
	}
	if s.seated() != nil {
		if err := s.reseatLocked(); err != nil {
			return errors.Join(err, s.disconnect())
		}
	}
	s.witnessMu.Lock()
	err := s.witness.close()
	s.witness = nil
	s.witnessMu.Unlock()
	s.guard.unlock()
	defer s.guard.close()
	if err == nil {
		err = errors.Join(s.writer.keepWAL(false), s.writer.pragma("synchronous=FULL"))
	}
	if err == nil {
		_, err = s.writer.one(qTruncate)
	}
	if err == nil {
		_, err = s.writer.text("PRAGMA journal_mode=DELETE")
	}
	if isBusy(err) {
		s.log.Warn("another program is reading the database: its write-ahead log stays", "path", s.path)
		err = nil
	}
	return errors.Join(err, s.writer.close())
}

// meta never blocks. The caller must not change config.
func (s *store) meta() meta { return *s.last.Load() }

// explain says which file an error is about, and turns SQLite's corruption codes into ErrCorrupt.
func (s *store) explain(doing string, err error) error {
	if strange := s.strange.Load(); strange != nil && sqliteCode(err) == sqliteConstraint { // of an index that is not ours
		return fmt.Errorf("%s %s: %w (%v)", doing, s.path, err, *strange)
	}
	return aboutFile(doing, s.path, err)
}

// damages are SQLite's codes for a file that is not what we have written. Our own statements break no constraint of the tables
// unless there are rows that we did not put there.
var damages = []int{sqliteCorrupt, sqliteNotADB, sqliteConstraint}

func aboutFile(doing, path string, err error) error {
	if err == nil {
		return nil
	}
	if code := sqliteCode(err); slices.Contains(damages, code) && !errors.Is(err, ErrCorrupt) {
		return fmt.Errorf("%s %s: %w; this copy of the state must be replaced: %w", doing, path, ErrCorrupt, err)
	}
	return fmt.Errorf("%s %s: %w", doing, path, err)
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s; this copy of the state must be replaced", ErrCorrupt, fmt.Sprintf(format, args...))
}

// One transaction. What it does waits in view until commit, so that a transaction that is rolled back leaves nothing.
type storeTx struct {
	s       *store
	meta    meta // the caller changes it; kvSum, keys and bytes are kept by the methods
	view    map[string]view
	changes []change // one for each key, in the order of their first
	past    []past   // every change, in order
	sealed  int      // of past, those whose transaction has ended
	own     map[ownKey]ownPut
	read    bool // rows of the file, which somebody else may have changed
	done    bool // committed or rolled back: mu is not held any more
}

type view struct {
	was, now *item // as committed, and as this transaction sees it; nil = absent
	at       int   // place in changes, from 1; 0 = unchanged
}

// An ownPut says how a private row is written, when it is: its hash, and the statement. nil takes the row out.
type ownPut func() (hash uint64, q query, args []driver.Value)

// begin waits if the file is too far behind. It begins nothing, and returns why, while the file can't be written: errForeign if
// someone else has committed to it, or the disk's error.
func (s *store) begin() (*storeTx, error) {
	if err := s.keepUp(); err != nil {
		return nil, s.explain("write to", err)
	}
	s.mu.Lock()
	if s.missed > scanFirst {
		s.missed = 0
		s.mu.Unlock()
		s.awaitScan()
		s.mu.Lock()
	}
	if s.closed {
		s.mu.Unlock()
		return nil, s.explain("write to", ErrClosed)
	}
	if s.view == nil || len(s.view) > 1<<14 { // clearing a map costs what it once held
		s.view = make(map[string]view)
	}
	clear(s.view)
	return &storeTx{s: s, meta: s.meta(), view: s.view, changes: s.changed[:0], past: s.past[:0]}, nil
}

// row sees the transaction's own changes.
func (t *storeTx) row(key string) (row, bool, error) {
	v, err := t.look(key)
	if err != nil || v.now == nil {
		return row{}, false, err
	}
	return v.now.row, true, nil
}

// look asks the copy in memory if it is whole: in a transaction it is exactly what was committed last.
func (t *storeTx) look(key string) (view, error) {
	if v, ok := t.view[key]; ok {
		return v, nil
	}
	it, whole := t.s.memory.item(key)
	if whole {
		return view{was: it, now: it}, nil
	}
	it, err := t.s.item(key)
	if err != nil {
		return view{}, t.s.note(err)
	}
	t.read = true
	t.s.missed++
	v := view{was: it, now: it}
	t.view[key] = v
	return v, nil
}

// set makes or replaces a row. Where created is 0 it is that of the row before, or the version.
func (t *storeTx) set(key string, r row) error {
	v, err := t.look(key)
	if err != nil {
		return err
	}
	if r.created == 0 {
		r.created = r.version
		if v.now != nil {
			r.created = v.now.created
		}
	}
	t.put(key, v, &item{row: r, hash: t.hashRow(key, r)}, r.version)
	return nil
}

// delete takes out a row at a revision; a missing one is no change.
func (t *storeTx) delete(key string, revision uint64) error {
	v, err := t.look(key)
	if err != nil || v.now == nil {
		return err
	}
	t.put(key, v, nil, revision)
	return nil
}

func (t *storeTx) put(key string, v view, now *item, revision uint64) {
	t.meta.kvSum += now.hashOrZero() - v.now.hashOrZero()
	p := past{revision: revision, key: key, now: now}
	if v.now != nil {
		p.previous = v.now.version
		t.meta.keys--
		t.meta.bytes -= uint64(len(key) + len(v.now.value))
	}
	if now != nil {
		t.meta.keys++
		t.meta.bytes += uint64(len(key) + len(now.value))
	}
	if v.at == 0 {
		t.changes = append(t.changes, change{key, v.was, now})
		v.at = len(t.changes)
	} else {
		t.changes[v.at-1].now = now
	}
	t.past = append(t.past, p)
	t.view[key] = view{was: v.was, now: now, at: v.at}
}

func (t *storeTx) hashRow(key string, r row) (h uint64) {
	t.s.buf, h = rowHash(t.s.buf, key, r.value, r.version, r.created)
	return h
}

// putSession calls row when the session is written to the file, which many entries may share.
func (t *storeTx) putSession(id uint64, row func() sessionRow) {
	t.private(ownKey{table: 's', id: id}, func() (uint64, query, []driver.Value) {
		r := row()
		h := sessionHash(r)
		return h, qPutSession, []driver.Value{int64(r.id), r.nonce[:], int64(r.acked), int64(r.last), blob(r.results), int64(h)}
	})
}

func (t *storeTx) deleteSession(id uint64) { t.private(ownKey{table: 's', id: id}, nil) }

// allow is idempotent, and so is disallow.
func (t *storeTx) allow(addr string) {
	t.private(ownKey{table: 'a', name: addr}, func() (uint64, query, []driver.Value) {
		h := allowedHash(addr)
		return h, qAllow, []driver.Value{addr, int64(h)}
	})
}

func (t *storeTx) disallow(addr string) { t.private(ownKey{table: 'a', name: addr}, nil) }

// remove records a member that is gone for good, once.
func (t *storeTx) remove(id string, at uint64) {
	t.private(ownKey{table: 'r', name: id}, func() (uint64, query, []driver.Value) {
		h := removedHash(id, at)
		return h, qRemove, []driver.Value{id, int64(at), int64(h)}
	})
}

// mark records a boundary; the file keeps the newest only.
func (t *storeTx) mark(m mark) {
	t.private(ownKey{table: 'm', id: m.boundary}, func() (uint64, query, []driver.Value) {
		h := markHash(m)
		return h, qPutMark, []driver.Value{int64(m.boundary), int64(m.applied), int64(m.kvSum), m.chain[:], int64(h)}
	})
}

func (t *storeTx) private(k ownKey, put ownPut) {
	if t.own == nil {
		t.own = make(map[ownKey]ownPut)
	}
	t.own[k] = put
}

// sound tells, before commit, whether the rows that were read from the file are ours: a shell's deletion leaves no wrong hash.
// errAgain: roll back and begin again; somebody has the file for long.
func (t *storeTx) sound() error {
	if !t.read {
		return nil
	}
	for end := time.Now().Add(20 * time.Millisecond); time.Now().Before(end); time.Sleep(100 * time.Microsecond) {
		if same, err := t.s.asWeLeftIt(); same || err != nil {
			return t.s.explain("read", t.s.note(err))
		}
		if t.s.fileMu.TryLock() { // else it may be a commit of ours that ends just now
			defer t.s.fileMu.Unlock()
			return t.s.explain("read", t.s.note(t.s.checkForeign()))
		}
	}
	return errAgain
}

// commit publishes in the order that readers rely on: what is on its way to the file, memory, meta.
func (t *storeTx) commit() {
	s := t.s
	t.done = true
	s.append(t)
	s.memory.publish(t.changes, t.meta.revision)
	clear(t.changes)
	if s.changed = t.changes[:0]; cap(s.changed) > 1<<14 {
		s.changed = nil
	}
	m := t.meta
	s.last.Store(&m)
	t.announce()
	s.mu.Unlock()
}

// rollback does nothing after commit, or a second time.
func (t *storeTx) rollback() {
	if !t.done {
		t.done = true
		t.s.mu.Unlock()
	}
}

// item returns what is committed under key, nil if nothing is.
func (s *store) item(key string) (it *item, err error) {
	if it, whole := s.memory.item(key); whole {
		return it, nil
	}
	if it, ok := s.unwritten(key); ok {
		return it, nil
	}
	err = s.read(func(c *conn) (err error) {
		it, err = c.get(key)
		return err
	})
	return it, err
}

func (s *store) sessions() (rows []sessionRow, err error) {
	err = s.readNow(func(c *conn) error {
		rows = nil
		return c.eachSession(func(r sessionRow, h uint64) error {
			rows = append(rows, r)
			return nil
		})
	})
	return rows, err
}

func (s *store) allowed() (addrs []string, err error) {
	err = s.readNow(func(c *conn) error {
		return c.eachAllowed(func(addr string, h uint64) error {
			addrs = append(addrs, addr)
			return nil
		})
	})
	return addrs, err
}

func (s *store) removed() (map[string]uint64, error) {
	ids := make(map[string]uint64)
	err := s.readNow(func(c *conn) error {
		return c.eachRemoved(func(id string, at, h uint64) error {
			ids[id] = at
			return nil
		})
	})
	return ids, err
}

// marks is for comparing with others, who have not all of them either: it never waits for the file.
func (s *store) marks() (marks []mark, err error) {
	err = s.read(func(c *conn) error {
		return c.eachMark(func(m mark, h uint64) error {
			marks = append(marks, m)
			return nil
		})
	})
	return marks, err
}

// readNow is read of a file that has all that is committed.
func (s *store) readNow(f func(c *conn) error) error {
	if err := s.sync(context.Background()); err != nil {
		return err
	}
	return s.read(f)
}

// read lends f a reader connection of the pool. The file may be behind.
func (s *store) read(f func(c *conn) error) error {
	c, err := s.borrow()
	if err != nil {
		return err
	}
	defer func() { s.readers <- c }()
	return s.explain("read", f(c))
}

// borrow takes a reader out of the pool. The caller puts it back, or nil in its place.
func (s *store) borrow() (c *conn, err error) {
	select {
	case <-s.ending:
		return nil, ErrClosed
	default:
	}
	select {
	case c = <-s.readers:
	case <-s.ending:
		return nil, ErrClosed
	}
	if c != nil && c.seat != s.seat.Load() {
		c.close()
		c = nil
	}
	if c == nil {
		if c, err = s.openReader(); err != nil {
			s.readers <- nil
			return nil, s.explain("open", err)
		}
	}
	return c, nil
}

func openReader(path string) (*conn, error) {
	c, err := openConn(path, "mode=rw", "query_only=ON", "cache_size=-2000", "trusted_schema=OFF")
	if err != nil {
		return nil, err
	}
	return c, c.keepWAL(true)
}

// note remembers the first error of the disk. The system reports a failed write once and then takes the pages for written:
// the next sync would succeed, and raft would cut its log behind rows that are not on the disk. So there is no next one.
func (s *store) note(err error) error {
	if isIO(err) && s.seated() == nil { // else a new connection has met the old index of the WAL beside an empty one
		s.failed.CompareAndSwap(nil, &err)
	}
	return err
}

// startLoad has maintain scan kv from the start.
func (s *store) startLoad(m meta) {
	s.memory.reset(int64(m.bytes) + int64(m.keys)*itemOverhead)
	s.stateMu.Lock()
	s.scanned, s.verdict = false, nil
	if s.ended == nil {
		s.ended = make(chan struct{})
	}
	s.stateMu.Unlock()
	select {
	case s.reload <- struct{}{}:
	default:
	}
}

// verified reports how the scan since open, or since the last install, has ended; false and nil: it has not yet.
func (s *store) verified() (bool, error) {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	return s.scanned, s.verdict
}

func (s *store) memoryState() (whole, dropped bool) { return s.memory.whole(), s.memory.dropped() }

// maintain scans when a scan is due and moves the WAL into the database. It runs until ctx ends or the store is closed.
func (s *store) maintain(ctx context.Context) {
	s.stateMu.Lock()
	select {
	case <-s.ending:
		s.stateMu.Unlock()
		return
	default:
	}
	s.working.Add(1)
	s.stateMu.Unlock()
	defer s.working.Done()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var others sync.WaitGroup // the WAL must not wait for a scan, nor either for the other
	others.Go(func() { s.scanWhenDue(ctx) })
	others.Go(func() { s.flushWhenDue(ctx) })
	others.Go(func() { s.memory.orderWhenDue(ctx) })
	defer others.Wait()
	defer cancel()
	s.checkpoint(ctx)
}

func (s *store) scanWhenDue(ctx context.Context) {
	var trouble trouble
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.ending:
			return
		case <-s.reload:
		}
		for {
			err := s.scan(ctx)
			if err == nil || ctx.Err() != nil || errors.Is(err, ErrClosed) {
				trouble.over()
				break
			}
			if errors.Is(err, ErrCorrupt) {
				s.setVerdict(err)
				break
			}
			trouble.goesOn(s.log, "the check of the rows is tried again", err, "path", s.path)
			if !s.pause(ctx, time.Second) {
				return
			}
		}
	}
}

func (s *store) setVerdict(err error) {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	s.scanned, s.verdict = err == nil, err
	if s.ended != nil {
		close(s.ended)
		s.ended = nil
	}
}

// awaitScan waits for the scan, for a moment. A member that comes back has much to apply, and while it is read row by row from the
// file, each costs five times as much, and the scan gets nowhere.
func (s *store) awaitScan() {
	s.stateMu.Lock()
	ended := s.ended
	s.stateMu.Unlock()
	if ended == nil || s.memory.dropped() {
		return
	}
	t := time.NewTimer(scanWait)
	defer t.Stop()
	select {
	case <-ended:
	case <-s.ending:
	case <-t.C:
	}
}

func (s *store) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-s.ending:
		return false
	case <-t.C:
		return true
	}
}

// scan reads the rows that the copy in memory does not cover yet, and compares the sums at the end.
func (s *store) scan(ctx context.Context) error {
	for {
		done, err := s.scanSeat(ctx)
		if done || err != nil {
			return err
		}
	}
}

// scanSeat scans until the file is put in place anew.
func (s *store) scanSeat(ctx context.Context) (done bool, err error) {
	c, err := s.openReader()
	if err != nil {
		return false, s.explain("open", err)
	}
	defer c.close()
	if err := s.scanHistory(ctx, c); err != nil {
		return false, err
	}
	for c.seat == s.seat.Load() {
		if err := s.going(ctx); err != nil {
			return false, err
		}
		if done, err := s.scanChunk(c); done || err != nil {
			return done, err
		}
	}
	return false, nil
}

// going is nil as long as what runs in the background may go on.
func (s *store) going(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ending:
		return ErrClosed
	default:
		return nil
	}
}

// scanChunk takes its snapshot under fileMu and mu, when what is in the file and what is published are the same, and merges under
// mu, so that at the end the sums are of one moment. It reads without them.
func (s *store) scanChunk(c *conn) (done bool, err error) {
	load, cursor, err := s.beginChunk(c)
	if err != nil {
		return false, s.explain("read", err)
	}
	rows, last, err := c.chunk(cursor)
	err = errors.Join(err, c.exec(qRollback))
	if err != nil {
		if !s.memory.cancelChunk(load) {
			return false, nil // the file has been replaced meanwhile
		}
		return false, s.explain("read", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.memory.endChunk(load, rows, last)
	sum, keys, ended := s.memory.covered()
	if !ended { // or a new load has begun meanwhile
		return false, nil
	}
	if m := s.meta(); sum != m.kvSum || keys != m.keys {
		return false, s.explain("read", corrupt("kv has %d rows and should have %d, or some are not what was written", keys, m.keys))
	}
	s.memory.trust(s.meta().revision)
	s.setVerdict(nil)
	return true, nil
}

func (s *store) beginChunk(c *conn) (load int, cursor string, err error) {
	unlock, err := s.lockState()
	if err != nil {
		return 0, "", err
	}
	defer unlock()
	if err := s.flushLocked(); err != nil {
		return 0, "", err
	}
	load, cursor = s.memory.beginChunk()
	if err = c.exec(qBeginRead); err == nil {
		// BEGIN alone takes no snapshot; the first read does.
		if _, err = c.one(qUserVersion); err != nil {
			c.exec(qRollback)
		}
	}
	if err != nil {
		s.memory.cancelChunk(load)
	}
	return load, cursor, err
}

// tendHolds counts a pause of the whole process, which no reader could use, as a second.
func (s *store) tendHolds(last *time.Time) {
	now := time.Now()
	passed := min(now.Sub(*last), time.Second)
	*last = now
	for _, h := range s.openHolds() {
		h.tend(passed)
	}
}
