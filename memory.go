package quorate

// The copy of all committed rows that answers reads without SQLite. It holds every key or is not used at all, so
// that a key it does not have is a key that does not exist. It owns the copy and the scan's place in the key space, and
// knows no SQL: sqlstore.go hands it the rows that the scan reads and the changes of every commit, in commit order.
//
// Who asks for one key is answered by a map; who asks for keys in order, by a tree, which is several times dearer to change. So there
// is none before somebody lists, and then the tree follows the map: when a list is begun, and else when it is some thousand keys
// behind, so that a key that is set a hundred times meanwhile is set there once. The first list of many keys does not wait for the
// tree to grow: it reads the file.

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/tidwall/btree"
)

// itemOverhead is what an entry costs beside its bytes: the item, two headers and its share of a tree node and of the map.
const itemOverhead = 128

const (
	lateMany  = 1 << 13 // keys that the tree is behind by when it begins to follow, or is grown from at once: a list waits some ms
	lateLimit = 1 << 17 // if nothing makes it follow, then a commit does
	lateChunk = 64      // keys that it takes over in one go, while readers and commits wait
	seedChunk = 1 << 12 // keys that are gathered in one go for a new tree, while commits wait
)

// An item is a row as it was committed. It never changes: a new version of the row is a new item.
type item struct {
	row
	hash uint64 // of the row, so that replacing it needs no read
	at   int32  // its place in a tail, which is the tail's business alone
}

func (i *item) hashOrZero() uint64 {
	if i == nil {
		return 0
	}
	return i.hash
}

func (i *item) rowOrZero() row {
	if i == nil {
		return row{}
	}
	return i.row
}

// A change is what one commit did to a key; nil means that there is no such row.
type change struct {
	key      string
	was, now *item
}

type memoryState int32

const (
	memoryLoading memoryState = iota // not used for reads
	memoryWhole
	memoryDropped // over the budget, until the next load
)

// The scan reads the rows in key order, a chunk at a time, each chunk in a snapshot of its own, taken while nothing was
// between commit and publish. Rows up to cursor are covered: a change to one is followed at once; a change above it
// will be read by the scan; one that comes while its chunk is being read waits in pending. So no snapshot is held for
// longer than a chunk, and at the end the covered sum is that of all rows as of the last publish.
type memory struct {
	budget int64 // bytes; negative: no rows are kept, only the sum is followed
	log    *slog.Logger
	due    chan struct{} // gets a token when order should run

	state atomic.Int32 // a memoryState; changes only under mu

	mu      sync.RWMutex              // guards the fields below; never held across I/O
	byKey   map[string]*item          // every row
	tree    *btree.Map[string, *item] // the same, but for what has changed under the keys in late and coming; nil before somebody lists
	late    map[string]struct{}       // nil: no tree, and nobody wants one
	coming  map[string]struct{}       // what was late when order began
	spare   map[string]struct{}       // an empty one, for late
	size    int64                     // of both, with overhead
	load    int                       // number of the current load: a chunk of an earlier one is thrown away
	cursor  string
	ended   bool // everything is covered
	sum     uint64
	keys    uint64
	rev     uint64   // revision of what the map holds; means nothing unless whole
	reading bool     // a chunk is being read
	pending []change // changes above cursor since the chunk's snapshot
}

func newMemory(budget int64, log *slog.Logger) *memory {
	m := &memory{budget: budget, log: log, due: make(chan struct{}, 1)}
	m.reset(0)
	return m
}

// reset forgets everything and starts a new load of rows that take about the given bytes.
func (m *memory) reset(estimate int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.load++
	m.cursor, m.ended, m.sum, m.keys, m.size = "", false, 0, 0, 0
	m.reading, m.pending = false, nil
	m.forgetLocked()
	m.state.Store(int32(memoryLoading))
	if m.budget >= 0 {
		m.byKey = make(map[string]*item)
	}
	if m.budget >= 0 && estimate > m.budget {
		m.dropLocked(estimate)
	}
}

func (m *memory) forgetLocked() {
	m.byKey, m.tree, m.late, m.coming = nil, nil, nil, nil
}

// empty makes the copy whole without a scan: there are no rows.
func (m *memory) empty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = true
	if m.byKey != nil {
		m.state.Store(int32(memoryWhole))
	}
}

func (m *memory) whole() bool   { return memoryState(m.state.Load()) == memoryWhole }
func (m *memory) dropped() bool { return memoryState(m.state.Load()) == memoryDropped }

// item allocates nothing. It is nil if there is none, and means little unless whole. It asks for the state first, so that a reader
// of a copy that is not whole never waits for the scan's merge.
func (m *memory) item(key string) (it *item, whole bool) {
	if !m.whole() {
		return nil, false
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if !m.whole() {
		return nil, false
	}
	return m.byKey[key], true
}

// list takes the first page of a range as of one moment, and its revision, if there is a tree (ok). If there is more, snapshot is
// where it is read from. A page is a few pointers, taken beside other readers; a snapshot needs the write lock for an instant, and
// from then on every commit copies the nodes that it changes, so it is not taken for a short list.
func (m *memory) list(r keyRange) (p page, snapshot *btree.Map[string, *item], revision uint64, ok bool) {
	if !m.whole() {
		return page{}, nil, 0, false
	}
	if p, revision, ok = m.firstPage(r); !ok || p.last {
		return p, nil, revision, ok
	}
	m.mu.Lock()
	if ok = m.orderedLocked(); ok {
		snapshot, revision = m.tree.Copy(), m.rev
	}
	m.mu.Unlock()
	if !ok {
		return page{}, nil, 0, false
	}
	return treePage(snapshot, r, p.rows), snapshot, revision, true
}

func (m *memory) firstPage(r keyRange) (p page, revision uint64, ok bool) {
	m.mu.RLock()
	if m.whole() && (m.tree == nil || len(m.late) > 0 || m.coming != nil) {
		m.mu.RUnlock()
		m.mu.Lock()
		defer m.mu.Unlock()
		if !m.orderedLocked() {
			return page{}, 0, false
		}
	} else {
		defer m.mu.RUnlock()
	}
	if !m.whole() {
		return page{}, 0, false
	}
	return treePage(m.tree, r, nil), m.rev, true
}

// orderedLocked makes the tree the same as the map, if there is one or it is small enough to be grown at once; else it begins to grow.
func (m *memory) orderedLocked() bool {
	switch {
	case !m.whole():
		return false
	case m.tree != nil:
		m.orderLocked()
	case len(m.byKey) <= lateMany:
		m.tree, m.late = btree.NewMap[string, *item](0), make(map[string]struct{})
		loadTree(m.tree, m.byKey, slices.Sorted(maps.Keys(m.byKey)))
	default:
		if m.late == nil {
			m.late = make(map[string]struct{}) // what changes from now on the tree will have to follow
		}
		give(m.due)
		return false
	}
	return true
}

// loadTree puts rows behind those that the tree has. The keys are in order.
func loadTree(tree *btree.Map[string, *item], rows map[string]*item, keys []string) {
	for _, key := range keys {
		if it := rows[key]; it != nil {
			tree.Load(key, it)
		}
	}
}

// grow makes the tree that is wanted, a few keys at a time.
func (m *memory) grow() {
	m.mu.Lock()
	wanted := m.late != nil && m.tree == nil
	load, byKey := m.load, m.byKey
	m.mu.Unlock()
	if !wanted {
		return
	}

	// The map may change between two chunks, and only there.
	m.mu.RLock()
	keys := make([]string, 0, len(byKey))
	for key := range byKey {
		if keys = append(keys, key); len(keys)%seedChunk == 0 {
			m.mu.RUnlock()
			m.mu.RLock()
		}
	}
	m.mu.RUnlock()
	slices.Sort(keys)
	tree := btree.NewMap[string, *item](0)
	for chunk := range slices.Chunk(keys, seedChunk) {
		m.mu.RLock()
		loadTree(tree, byKey, chunk)
		m.mu.RUnlock()
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.load == load && m.byKey != nil && m.tree == nil { // else there is another state, none, or a tree that was small enough
		m.tree = tree
	}
}

// orderLocked has the tree follow at once: all that it is behind by, which is what has changed since the last flush or list.
func (m *memory) orderLocked() {
	for key := range m.coming {
		m.followLocked(key)
	}
	for key := range m.late {
		m.followLocked(key)
	}
	m.coming, m.late = nil, emptied(m.late)
}

// emptied makes a new one of a map that has grown large: clearing it would cost what it once held, at each list.
func emptied(keys map[string]struct{}) map[string]struct{} {
	if len(keys) > 2*lateMany {
		return make(map[string]struct{})
	}
	clear(keys)
	return keys
}

func (m *memory) followLocked(key string) {
	if it := m.byKey[key]; it != nil {
		m.tree.Set(key, it)
	} else {
		m.tree.Delete(key)
	}
}

// orderWhenDue runs until ctx ends.
func (m *memory) orderWhenDue(ctx context.Context) {
	for {
		select {
		case <-m.due:
			m.grow()
			m.order()
		case <-ctx.Done():
			return
		}
	}
}

// order has the tree follow, a few keys at a time and in their order, so that each node is found and changed once. One call at a time.
func (m *memory) order() {
	m.mu.Lock()
	late := m.late
	if len(late) == 0 || m.tree == nil {
		m.mu.Unlock()
		return
	}
	if m.spare == nil {
		m.spare = make(map[string]struct{})
	}
	m.coming, m.late, m.spare = late, m.spare, nil
	m.mu.Unlock()

	// Nobody changes what is coming, and a list that begins meanwhile takes all of it over.
	keys := slices.Sorted(maps.Keys(late))
	for done := false; !done; {
		m.mu.Lock()
		done = m.coming == nil
		for n := 0; !done && n < lateChunk && len(keys) > 0; n++ {
			m.followLocked(keys[0])
			keys = keys[1:]
		}
		if !done && len(keys) == 0 {
			m.coming, done = nil, true
		}
		m.mu.Unlock()
	}

	late = emptied(late)
	m.mu.Lock()
	m.spare = late
	m.mu.Unlock()
}

// publish takes over the changes of one commit, which made the revision, all or none to any reader.
func (m *memory) publish(changes []change, revision uint64) {
	if len(changes) == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range changes {
		switch {
		case m.ended || c.key <= m.cursor:
			m.applyLocked(c)
			if m.late != nil {
				m.late[c.key] = struct{}{}
			}
		case m.reading:
			m.pending = append(m.pending, c)
		}
	}
	if len(m.late) >= lateLimit && m.tree != nil {
		m.orderLocked()
	} else if len(m.late) >= lateMany {
		give(m.due)
	}
	m.rev = revision
	m.checkBudgetLocked()
}

func (m *memory) applyLocked(c change) {
	m.sum += c.now.hashOrZero() - c.was.hashOrZero()
	if c.was == nil {
		m.keys++
	}
	if c.now == nil {
		m.keys--
	}
	if c.was == nil && c.now == nil { // set and deleted by one transaction
		return
	}
	if m.byKey == nil {
		return
	}
	if c.was != nil {
		m.size -= itemSize(c.key, c.was)
	}
	if c.now != nil {
		m.byKey[c.key] = c.now
		m.size += itemSize(c.key, c.now)
	} else {
		delete(m.byKey, c.key)
	}
}

func itemSize(key string, it *item) int64 {
	return int64(len(key)) + int64(len(it.value)) + itemOverhead
}

func (m *memory) checkBudgetLocked() {
	if m.byKey != nil && m.size > m.budget {
		m.dropLocked(m.size)
	}
}

// dropLocked goes on following the sum: the scan verifies the file with or without a copy.
func (m *memory) dropLocked(size int64) {
	m.state.Store(int32(memoryDropped))
	m.forgetLocked()
	m.log.Info("rows are read from SQLite: they do not fit in memory", "bytes", size, "budget", m.budget)
}

// beginChunk is called while nothing is between commit and publish, just before the chunk's snapshot is taken.
func (m *memory) beginChunk() (load int, cursor string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reading, m.pending = true, nil
	return m.load, m.cursor
}

// A keyed is an item under its key, as the scan reads it.
type keyed struct {
	key string
	*item
}

// endChunk merges what was read with what was committed meanwhile; a chunk of an earlier load is thrown away. After the
// last one everything is covered.
func (m *memory) endChunk(load int, rows []keyed, last bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if load != m.load {
		return
	}
	if m.ended { // a second scan of what is covered: each row would count twice
		m.reading, m.pending = false, nil
		return
	}
	for _, r := range rows {
		m.applyLocked(change{key: r.key, now: r.item})
	}
	if len(rows) > 0 {
		m.cursor = rows[len(rows)-1].key
	}
	m.ended = last
	for _, c := range m.pending {
		if m.ended || c.key <= m.cursor {
			m.applyLocked(c)
		}
	}
	m.reading, m.pending = false, nil
	m.checkBudgetLocked()
}

// cancelChunk: the chunk could not be read. It tells whether that matters, for the chunk is one of the current load.
func (m *memory) cancelChunk(load int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if load != m.load {
		return false
	}
	m.reading, m.pending = false, nil
	return true
}

// covered returns the sum and the number of all rows, once a scan has ended.
func (m *memory) covered() (sum, keys uint64, ended bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sum, m.keys, m.ended
}

// trust makes the copy answer reads: the scan has ended and its sum is right. It is called while nothing is between commit
// and publish, with the revision of the last commit.
func (m *memory) trust(revision uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rev = revision
	if m.ended && m.byKey != nil {
		m.state.Store(int32(memoryWhole))
	}
}
