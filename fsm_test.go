package quorate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// openFSM is the state machine alone, on a real file, without raft.
func openFSM(t testing.TB, path string, memory int64) *fsm {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	st, err := openStore(storeOptions{path: path, memory: memory, log: quiet})
	must(t, err)
	f, err := newFSM(st, quiet)
	must(t, err)
	return f
}

func newFSMWith(t testing.TB, memory int64) *fsm {
	f := openFSM(t, filepath.Join(t.TempDir(), "snap"), memory)
	t.Cleanup(func() { f.store.close() })
	return f
}

func command(index uint64, data []byte) *raft.Log {
	return &raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: data}
}

func batchBytes(session, seq, acked uint64, txs ...transaction) []byte {
	return encodeEntry(batchOf(session, seq, acked, txs...))
}

func setOp(key, value string) op { return op{kind: opSet, key: key, value: []byte(value)} }

// applyOne applies one entry and returns its answer.
func applyOne(t testing.TB, f *fsm, l *raft.Log) outcome {
	t.Helper()
	o, ok := f.ApplyBatch([]*raft.Log{l})[0].(outcome)
	if !ok {
		t.Fatalf("entry %d has no answer", l.Index)
	}
	return o
}

// openTestSession opens a session by an entry at index.
func openTestSession(t testing.TB, f *fsm, index uint64, nonce string) uint64 {
	t.Helper()
	var n [16]byte
	copy(n[:], nonce)
	o := applyOne(t, f, command(index, encodeOpen(firstFormat, n)))
	if o.kind != outcomeDone || o.session == 0 {
		t.Fatalf("open a session: %+v", o)
	}
	return o.session
}

// dump is all that a state holds, read from the file.
type dump struct {
	Rows     map[string]string
	Sessions []sessionRow
	Allowed  []string
	Removed  map[string]uint64
	Marks    []mark
	History  []string
	Meta     meta
}

func dumpState(t testing.TB, f *fsm) dump {
	t.Helper()
	must(t, f.store.flush())
	d := dump{Rows: make(map[string]string), Meta: *f.store.inFile.Load()}
	d.Meta.barrier = 0 // the only thing in the file that is not the entries' doing
	must(t, f.store.read(func(c *conn) error {
		rows, _, err := c.chunk("")
		for _, r := range rows {
			d.Rows[r.key] = fmt.Sprintf("%q version %d created %d", r.value, r.version, r.created)
		}
		return err
	}))
	var err error
	d.Sessions, err = f.store.sessions()
	must(t, err)
	d.Allowed, err = f.store.allowed()
	must(t, err)
	d.Removed, err = f.store.removed()
	must(t, err)
	d.Marks, err = f.store.marks()
	must(t, err)
	if d.Meta.format >= historyFormat {
		list, err := f.store.changes(t.Context(), d.Meta.oldest())
		must(t, err)
		for _, p := range list {
			d.History = append(d.History, p.String())
		}
	}
	return d
}

func (p past) String() string {
	text := fmt.Sprintf("%d/%d %s was %d", p.revision, p.last, p.key, p.previous)
	if p.now == nil {
		return text + " deleted"
	}
	return fmt.Sprintf("%s now %q version %d created %d", text, p.now.value, p.now.version, p.now.created)
}

// A model is what the entries mean, said in the simplest way.
type model struct {
	rows     map[string]modelRow
	revision uint64
	sessions map[uint64]*modelSession
	allowed  map[string]bool
	removed  map[string]uint64
	servers  []raft.Server
	history  []string // of every change since revision base
	base     uint64
	keep     uint64
	format   uint64
}

type modelRow struct {
	value            string
	version, created uint64
}

type modelSession struct {
	nonce   [16]byte
	acked   uint64
	results map[uint64][]result
}

func newModel() *model {
	return &model{rows: map[string]modelRow{}, sessions: map[uint64]*modelSession{}, allowed: map[string]bool{}, removed: map[string]uint64{}, format: 1}
}

func (m *model) apply(l *raft.Log) outcome {
	o := outcome{kind: outcomeDone, index: l.Index, term: l.Term}
	if l.Type == raft.LogConfiguration {
		m.configure(l)
		return o
	}
	e, err := decodeEntry(l.Data)
	switch {
	case err != nil:
		o.kind = outcomeInvalid
	case e.kind == entryOpen:
		o.session = l.Index
		for id, s := range m.sessions {
			if s.nonce == e.nonce {
				o.session = id
				return o
			}
		}
		m.sessions[l.Index] = &modelSession{nonce: e.nonce, results: map[uint64][]result{}}
	case e.kind == entryBatch:
		o.session = e.batch.session
		o.kind, o.results = m.batch(e.batch)
	case e.kind == entryRaise && e.raise >= m.format && e.raise <= 2:
		if m.format == 1 && e.raise == 2 {
			m.keep, m.base = 10_000, m.revision
		}
		m.format = e.raise
		if m.format == 2 {
			m.trim()
			m.keep = cmp.Or(e.history, m.keep)
		}
	}
	return o
}

// trim forgets the changes before the newest that are kept.
func (m *model) trim() {
	for uint64(len(m.history)) > m.keep {
		m.history = m.history[1:]
		m.base++
	}
}

func (m *model) configure(l *raft.Log) {
	now := raft.DecodeConfiguration(l.Data).Servers
	for _, n := range now {
		if !slices.ContainsFunc(m.servers, func(o raft.Server) bool { return o.Address == n.Address }) {
			m.allowed[string(n.Address)] = true
		}
	}
	for _, o := range m.servers {
		_, before := m.removed[string(o.ID)]
		if !slices.ContainsFunc(now, func(n raft.Server) bool { return o.ID == n.ID }) && !before {
			m.removed[string(o.ID)] = l.Index
		}
	}
	m.servers = now
}

func (m *model) batch(b batch) (outcomeKind, []result) {
	s := m.sessions[b.session]
	if s == nil {
		return outcomeGone, nil
	}
	s.acked = max(s.acked, b.acked)
	if b.seq <= s.acked {
		return outcomeStale, nil
	}
	if rs, ok := s.results[b.seq]; ok {
		return outcomeDone, rs
	}
	rs := []result{}
	for _, tx := range b.txs {
		rs = append(rs, m.transaction(tx))
	}
	s.results[b.seq] = rs
	return outcomeDone, rs
}

func (m *model) transaction(tx transaction) result {
	for i, o := range tx {
		r, ok := m.rows[o.key]
		if o.kind.condition() && !map[opKind]bool{
			opIfExists: ok, opIfNotExists: !ok,
			opIfValue: ok && r.value == string(o.value), opIfNotValue: !ok || r.value != string(o.value),
			opIfVersion: r.version == o.version, opIfNotVersion: r.version != o.version,
		}[o.kind] {
			return result{status: txUnsatisfied, revision: m.revision, at: uint64(i), have: r.version}
		}
	}
	var changed []past
	for _, o := range tx {
		r, ok := m.rows[o.key]
		switch o.kind {
		case opSet:
			m.revision++
			changed = append(changed, past{revision: m.revision, key: o.key, previous: r.version})
			if !ok {
				r.created = m.revision
			}
			m.rows[o.key] = modelRow{string(o.value), m.revision, r.created}
			changed[len(changed)-1].now = &item{row: row{string(o.value), m.revision, m.rows[o.key].created}}
		case opDelete:
			if ok {
				m.revision++
				changed = append(changed, past{revision: m.revision, key: o.key, previous: r.version})
				delete(m.rows, o.key)
			}
		case opAllow:
			m.allowed[o.key] = true
		case opDisallow:
			delete(m.allowed, o.key)
		}
	}
	for _, p := range changed {
		if p.last = m.revision; m.format == 2 {
			m.history = append(m.history, p.String())
		}
	}
	m.trim()
	return result{revision: m.revision}
}

// drawEntries makes a log: what is in it is legal, forged or garbage, but two batches never have one number and different
// contents, for that no member can survive.
func drawEntries(t *rapid.T) []*raft.Log {
	key := rapid.SampledFrom([]string{"a", "b", "c", "key with space", "ключ", strings.Repeat("k", 300)})
	value := rapid.SampledFrom([]string{"", "1", "2", "text", "\x00\xff", strings.Repeat("long ", 40)})
	addr := rapid.SampledFrom([]string{"h1:1", "h2:2", "h3:3"})
	var opens []uint64
	bodies := make(map[[2]uint64][]transaction)
	drawOp := func() op {
		kind := rapid.SampledFrom([]opKind{opSet, opSet, opSet, opDelete, opAllow, opDisallow, opIfExists, opIfNotExists, opIfValue,
			opIfNotValue, opIfVersion, opIfNotVersion}).Draw(t, "op")
		o := op{kind: kind, key: key.Draw(t, "key")}
		switch {
		case kind == opAllow || kind == opDisallow:
			o.key = addr.Draw(t, "addr")
		case kind.hasValue():
			o.value = []byte(value.Draw(t, "value"))
		case kind.hasVersion():
			o.version = rapid.Uint64Range(0, 20).Draw(t, "version")
		}
		return o
	}
	drawBatch := func() []byte {
		session := rapid.SampledFrom(append([]uint64{0, 7}, opens...)).Draw(t, "session")
		seq := rapid.Uint64Range(0, 8).Draw(t, "seq")
		at := [2]uint64{session, seq}
		if bodies[at] == nil {
			bodies[at] = []transaction{}
			for range rapid.IntRange(0, 4).Draw(t, "transactions") {
				var tx transaction
				for range rapid.IntRange(0, 5).Draw(t, "ops") {
					tx = append(tx, drawOp())
				}
				bodies[at] = append(bodies[at], tx)
			}
		}
		return batchBytes(session, seq, rapid.Uint64Range(0, 8).Draw(t, "acked")*rapid.Uint64Range(0, 1).Draw(t, "acks"), bodies[at]...)
	}
	var logs []*raft.Log
	index := uint64(0)
	for range rapid.IntRange(1, 60).Draw(t, "entries") {
		index += rapid.SampledFrom([]uint64{1, 1, 1, 2, 700, 1024, 3000}).Draw(t, "gap") // raft's own entries lie between
		l := command(index, nil)
		l.Term = uint64(len(logs)/7 + 1)
		switch rapid.SampledFrom([]string{"batch", "batch", "batch", "batch", "open", "start", "raise", "configuration", "garbage"}).Draw(t, "kind") {
		case "batch":
			l.Data = drawBatch()
		case "open":
			l.Data = encodeOpen(firstFormat, [16]byte{rapid.Byte().Draw(t, "nonce") % 4})
			opens = append(opens, index)
		case "start":
			l.Data = encodeTermStart(firstFormat)
		case "raise":
			l.Data = encodeRaise(rapid.Uint64Range(1, entryFormat).Draw(t, "format"), rapid.Uint64Range(0, 6).Draw(t, "history"))
		case "configuration":
			var c raft.Configuration
			for i := range rapid.IntRange(1, 3).Draw(t, "servers") {
				id := rapid.IntRange(0, 1).Draw(t, "id")*3 + i
				c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(fmt.Sprint("id", id)), Address: raft.ServerAddress(addr.Draw(t, "at"))})
			}
			l.Type, l.Data = raft.LogConfiguration, raft.EncodeConfiguration(c)
		case "garbage":
			l.Data = rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "garbage")
			if len(l.Data) > 0 { // what a newer member wrote has no meaning here that could be compared
				l.Data[0] %= entryFormat + 1
			}
			if b := drawBatch(); rapid.Bool().Draw(t, "flipped") { // almost a batch
				b[rapid.IntRange(0, len(b)-1).Draw(t, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
				if e, err := decodeEntry(b); errors.Is(err, ErrFormat) {
					break
				} else if err != nil || e.kind != entryBatch || bodies[[2]uint64{e.batch.session, e.batch.seq}] == nil {
					l.Data = b[:len(b):len(b)]
					if err == nil && e.kind == entryBatch {
						bodies[[2]uint64{e.batch.session, e.batch.seq}] = e.batch.txs
					}
				}
			}
		}
		logs = append(logs, l)
	}
	return logs
}

// Invariant (2): apply is a function of (rows, entry). Three members with other batching, other memory and a restart in
// between give the answers of a plain map, and end with equal files.
func TestApplyIsAFunctionOfRowsAndEntry(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		logs := drawEntries(rt)
		n++
		path := func(name string) string { return filepath.Join(dir, fmt.Sprint(n, name)) }
		m := newModel()
		var want []outcome
		for _, l := range logs {
			want = append(want, m.apply(l))
		}
		var first dump
		for i, memory := range []int64{1 << 20, -1, 700} {
			p := path(fmt.Sprint(i))
			open := func() *fsm {
				f := openFSM(t, p, memory)
				f.fault = func(err error) {
					if err != nil {
						rt.Fatalf("apply stops: %v", err)
					}
				}
				return f
			}
			f := open()
			var got []outcome
			for rest := logs; len(rest) > 0; {
				k := len(rest)
				if i == 0 {
					k = 1
				} else if i == 2 {
					k = rapid.IntRange(1, len(rest)).Draw(rt, "batch")
					if rapid.IntRange(0, 9).Draw(rt, "restart") == 0 {
						must(t, f.store.close())
						f = open()
						f.ApplyBatch(logs[:len(got)]) // raft replays: what the file holds changes nothing
					}
				}
				for _, a := range f.ApplyBatch(rest[:k]) {
					got = append(got, a.(outcome))
				}
				rest = rest[k:]
			}
			for j := range got {
				if string(encodeOutcome(got[j])) != string(encodeOutcome(want[j])) {
					rt.Fatalf("state machine %d answers entry %d with %+v, want %+v", i, logs[j].Index, got[j], want[j])
				}
			}
			d := dumpState(t, f)
			compareModel(rt, m, d)
			if i == 0 {
				first = d
			} else if !reflect.DeepEqual(d, first) {
				rt.Fatalf("state machine %d holds\n%+v\nand the first one\n%+v", i, d, first)
			}
			must(t, f.store.close())
			if _, err := checkFile(p); err != nil {
				rt.Fatalf("the sums of the closed file: %v", err)
			}
		}
	})
}

func compareModel(t *rapid.T, m *model, d dump) {
	rows, size := map[string]string{}, 0
	for k, r := range m.rows {
		rows[k] = fmt.Sprintf("%q version %d created %d", r.value, r.version, r.created)
		size += len(k) + len(r.value)
	}
	if !maps.Equal(rows, d.Rows) {
		t.Fatalf("rows %v, want %v", d.Rows, rows)
	}
	if d.Meta.revision != m.revision || d.Meta.keys != uint64(len(rows)) || d.Meta.bytes != uint64(size) {
		t.Fatalf("revision %d, %d keys, %d bytes, want %d, %d, %d", d.Meta.revision, d.Meta.keys, d.Meta.bytes, m.revision, len(rows), size)
	}
	if allowed := slices.Sorted(maps.Keys(m.allowed)); !slices.Equal(allowed, d.Allowed) || !maps.Equal(m.removed, d.Removed) {
		t.Fatalf("allowed %v and removed %v, want %v and %v", d.Allowed, d.Removed, allowed, m.removed)
	}
	if m.trim(); !slices.Equal(d.History, m.history) {
		t.Fatalf("history %v, want %v", d.History, m.history)
	}
	if len(d.Sessions) != len(m.sessions) {
		t.Fatalf("%d sessions, want %d", len(d.Sessions), len(m.sessions))
	}
}

// Invariant (1): a row and the index of its entry get into the file in one transaction, seen by a reader beside the writer.
func TestRowAndIndexCommitTogether(t *testing.T) {
	f := newFSMWith(t, -1)
	session := openTestSession(t, f, 1, "one")
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- f.store.read(func(c *conn) error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				err := c.exec(qBeginRead)
				if err != nil {
					return err
				}
				m, err := c.readMeta()
				it, err2 := c.get("n")
				if err := errors.Join(err, err2, c.exec(qRollback)); err != nil {
					return err
				}
				if m.applied > 1 && (it == nil || it.value != fmt.Sprint(m.applied)) {
					return fmt.Errorf("at index %d the row is %+v", m.applied, it)
				}
			}
		})
	}()
	for i := uint64(2); i < 600; i++ {
		applyOne(t, f, command(i, batchBytes(session, i, i-1, transaction{setOp("n", fmt.Sprint(i))})))
		if i%3 == 0 {
			must(t, f.store.flush())
		}
	}
	close(stop)
	must(t, <-done)
}

// A full disk under the file alone stops no apply as long as the tail has room: what is committed is answered and read, the fault is
// told, and it ends when the file has been written.
func TestApplyGoesOnInMemory(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	var told atomic.Pointer[error]
	f.fault = func(err error) { told.Store(&err) }
	session := openTestSession(t, f, 1, "one")
	must(t, f.store.flush())
	must(t, f.store.writer.pragma("max_page_count=16"))
	set := func(index uint64, value string) {
		t.Helper()
		if o := applyOne(t, f, command(index, batchBytes(session, index, 0, transaction{setOp("k", value)}))); o.kind != outcomeDone {
			t.Fatalf("answered %+v", o)
		}
		if r, ok, err := f.store.get("k"); !ok || err != nil || r.value != value {
			t.Fatalf("read %d bytes, %v, %v", len(r.value), ok, err)
		}
	}
	set(2, strings.Repeat("x", 100<<10))
	ctx, stop := context.WithCancel(t.Context())
	var flusher sync.WaitGroup
	flusher.Go(func() { f.store.flushWhenDue(ctx) })
	wants := func(full bool) {
		t.Helper()
		eventually(t, 20*time.Second, "the fault", func() error {
			if p := told.Load(); p == nil || isFull(*p) != full {
				return fmt.Errorf("told %v", p)
			}
			return nil
		})
	}
	wants(true)
	told.Store(nil)
	set(3, strings.Repeat("y", 100<<10))
	if p := told.Load(); p != nil && *p == nil {
		t.Error("the fault has ended with an apply, and the file is not written")
	}
	f.store.fileMu.Lock()
	must(t, f.store.writer.pragma("max_page_count=1000000"))
	f.store.fileMu.Unlock()
	wants(false)
	must(t, f.store.sync(t.Context()))
	stop()
	flusher.Wait()
	if at := f.store.inFile.Load().applied; at != 3 {
		t.Errorf("the file is at %d", at)
	}
}

// Invariant (3): an error of the storage is no answer. When the file can't be written and the tail is full apply waits, and with space
// back everything is in it, with no trace of the failed attempts.
func TestApplyWaitsForTheFile(t *testing.T) {
	f, other := newFSMWith(t, 1<<20), newFSMWith(t, 1<<20)
	var told atomic.Pointer[error]
	f.fault = func(err error) { told.Store(&err) }
	session := openTestSession(t, f, 1, "one")
	openTestSession(t, other, 1, "one")
	big := strings.Repeat("x", 100<<10)
	logs := []*raft.Log{
		command(2, batchBytes(session, 1, 0, transaction{setOp("big", big), {kind: opAllow, key: "h:1"}})),
		command(1500, batchBytes(session, 2, 0, transaction{setOp("small", "1")}, transaction{setOp("big", big+big)})),
	}
	limit := func(pages int) {
		f.store.fileMu.Lock()
		defer f.store.fileMu.Unlock()
		must(t, f.store.writer.pragma(fmt.Sprintf("max_page_count=%d", pages)))
	}
	must(t, f.store.flush())
	limit(16)
	first := f.ApplyBatch(logs[:1]) // it is in the log, and the file has time
	file := *f.store.inFile.Load()
	if err := f.store.flush(); !isFull(err) {
		t.Fatalf("flush: %v", err)
	}
	f.store.tailLimit = 1
	before := f.store.meta().stateHash()
	answers := make(chan []any, 1)
	go func() { answers <- f.ApplyBatch(logs[1:]) }()
	eventually(t, 20*time.Second, "the fault is told", func() error {
		if p := told.Load(); p == nil || *p == nil || !isFull(*p) {
			return fmt.Errorf("told %v", p)
		}
		return nil
	})
	if got := f.store.meta().stateHash(); got != before || f.applied.at() != 2 {
		t.Fatalf("state %s at %d while apply waits, want %s at 2", got, f.applied.at(), before)
	}
	if _, ok, err := f.store.get("small"); ok || err != nil {
		t.Fatalf("an effect of the waiting entry is seen: %v, %v", ok, err)
	}
	if got := *f.store.inFile.Load(); !reflect.DeepEqual(got, file) {
		t.Fatalf("the file is at %+v, want %+v", got, file)
	}
	select {
	case a := <-answers:
		t.Fatalf("a storage error was answered with %+v", a)
	default:
	}
	limit(1 << 20)
	var got []any
	select {
	case got = <-answers:
	case <-time.After(20 * time.Second):
		t.Fatal("apply does not go on with space back")
	}
	if want := other.ApplyBatch(logs); !reflect.DeepEqual(append(first, got...), want) {
		t.Fatalf("answers %+v and %+v, want %+v", first, got, want)
	}
	if a, b := dumpState(t, f), dumpState(t, other); !reflect.DeepEqual(a, b) {
		t.Fatalf("after the wait\n%+v\nand without a fault\n%+v", a, b)
	}
	if p := told.Load(); p == nil || *p != nil {
		t.Fatalf("the end of the fault was not told: %v", p)
	}
}

// Invariant (4): raft is told that a snapshot exists only after a barrier that covers it.
func TestSnapshotOnlyAfterBarrier(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	snaps := &snapshotStore{fsm: f, path: f.store.path + ".incoming"}
	openTestSession(t, f, 5, "one")
	sink := func(index uint64) raft.SnapshotSink {
		s, err := snaps.Create(1, index, 1, raft.Configuration{}, 0, nil)
		must(t, err)
		return s
	}
	t.Run("persist syncs", func(t *testing.T) {
		before := f.store.inFile.Load().barrier
		snap, _ := f.Snapshot()
		s := sink(5)
		must(t, snap.Persist(s))
		must(t, s.Close())
		if m := f.store.inFile.Load(); m.barrier != before+1 || m.applied != 5 {
			t.Fatalf("barrier %d at %d, want %d at 5", m.barrier, m.applied, before+1)
		}
	})
	t.Run("not for an index that the file has not reached", func(t *testing.T) {
		snap, _ := f.Snapshot()
		if err := snap.Persist(sink(6)); err == nil {
			t.Fatal("a snapshot of entry 6 when 5 was applied")
		}
	})
	t.Run("a sink without a snapshot does not close well", func(t *testing.T) {
		if err := sink(5).Close(); err == nil {
			t.Fatal("closed")
		}
	})
	t.Run("another program's lock is no fault of the disk", func(t *testing.T) {
		f.fault = func(err error) { t.Errorf("told %v", err) }
		defer func() { f.fault = func(error) {} }()
		must(t, f.store.writer.pragma("busy_timeout=20"))
		c, err := openConn(f.store.path, "mode=rw")
		must(t, err)
		defer c.close()
		must(t, c.exec(qBegin))
		snap, _ := f.Snapshot()
		if err := snap.Persist(sink(5)); !isBusy(err) {
			t.Errorf("persist beside a lock: %v", err)
		}
		must(t, c.exec(qRollback))
		must(t, snap.Persist(sink(5)))
	})
	t.Run("none of an empty state", func(t *testing.T) {
		empty := &snapshotStore{fsm: newFSMWith(t, -1)}
		if list, err := empty.List(); err != nil || len(list) != 0 {
			t.Fatalf("%v, %v", list, err)
		}
	})
}

// sendSnapshot carries a snapshot as raft does: out of one store, through a stream, into another one's sink.
func sendSnapshot(from, to *snapshotStore, change func([]byte) []byte) error {
	m, stream, err := from.Open(snapshotState)
	if err != nil {
		return err
	}
	data, err := io.ReadAll(stream)
	stream.Close()
	if err != nil {
		return err
	}
	if int64(len(data)) != m.Size {
		return fmt.Errorf("%d bytes, Size says %d", len(data), m.Size)
	}
	sink, err := to.Create(1, m.Index, m.Term, m.Configuration, m.ConfigurationIndex, nil)
	if err != nil {
		return err
	}
	if change != nil {
		data = change(data)
	}
	if _, err := io.Copy(sink, bytes.NewReader(data)); err != nil {
		sink.Cancel()
		return err
	}
	if err := sink.Close(); err != nil {
		return err
	}
	_, body, err := to.Open(sink.ID())
	if err != nil {
		return err
	}
	return to.fsm.Restore(body)
}

// Invariant (5): a reader beside an install sees the old state or the new one, and what is not a whole snapshot changes
// nothing.
func TestInstallIsOneTransaction(t *testing.T) {
	from, to := newFSMWith(t, 1<<20), newFSMWith(t, 1<<20)
	source, target := &snapshotStore{fsm: from, path: from.store.path + ".incoming"}, &snapshotStore{fsm: to, path: to.store.path + ".incoming"}
	session := openTestSession(t, from, 1, "one")
	openTestSession(t, to, 1, "one")
	fill := func(f *fsm, index uint64, value string) {
		var txs []transaction
		for i := range 500 {
			txs = append(txs, transaction{setOp(fmt.Sprint("key", i), value+strings.Repeat(".", 500))})
		}
		applyOne(t, f, command(index, batchBytes(session, index, 0, txs...)))
	}
	fill(to, 2, "old")
	fill(from, 3, "new")
	must(t, to.store.flush()) // the reader below reads the file
	old, unwanted := to.store.meta().stateHash(), []struct {
		name   string
		change func([]byte) []byte
	}{
		{"cut short", func(b []byte) []byte { return b[:len(b)/2] }},
		{"without its end", func(b []byte) []byte { return b[:len(b)-1] }},
		{"a bit flipped", func(b []byte) []byte { b[len(b)/3] ^= 4; return b }},
		{"longer than it says", func(b []byte) []byte { return append(b, 0) }},
	}
	for _, c := range unwanted {
		t.Run(c.name, func(t *testing.T) {
			if err := sendSnapshot(source, target, c.change); err == nil {
				t.Fatal("installed")
			}
			if got := to.store.meta().stateHash(); got != old {
				t.Fatalf("state %s, want %s", got, old)
			}
			if left, _ := filepath.Glob(target.path + "*"); len(left) > 0 {
				t.Fatalf("%v is left", left)
			}
		})
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- to.store.read(func(c *conn) error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				must := func(e error) error { return errors.Join(e, c.exec(qRollback)) }
				if err := c.exec(qBeginRead); err != nil {
					return err
				}
				a, err := c.get("key0")
				if err != nil {
					return must(err)
				}
				b, err := c.get("key499")
				if err := must(err); err != nil {
					return err
				}
				if a.value != b.value {
					return fmt.Errorf("half of an install: %.3s and %.3s", a.value, b.value)
				}
			}
		})
	}()
	must(t, sendSnapshot(source, target, nil))
	close(stop)
	must(t, <-done)
	m, n := from.store.meta(), to.store.meta()
	if n.stateHash() != m.stateHash() || n.applied != 3 || n.installed != 3 || to.applied.at() != 3 {
		t.Fatalf("after the install: %s at %d, installed %d, want %s at 3", n.stateHash(), n.applied, n.installed, m.stateHash())
	}
	// An older one, delayed on its way, does nothing: raft must not go back behind what was applied.
	fill(to, 4, "newer")
	newer := to.store.meta().stateHash()
	must(t, sendSnapshot(source, target, nil))
	if got := to.store.meta(); got.stateHash() != newer || got.applied != 4 {
		t.Fatalf("a delayed snapshot took the state back to %d", got.applied)
	}
}

// An install meets a full disk, and the next one does not: the fault ends with that, for no entry may come after it.
func TestInstallEndsTheFaultOfAFullDisk(t *testing.T) {
	t.Parallel()
	from, to := newFSMWith(t, 1<<20), newFSMWith(t, 1<<20)
	// The received file lies elsewhere, so that it can't take the place of snap.
	source, target := &snapshotStore{fsm: from, path: from.store.path + ".incoming"}, &snapshotStore{fsm: to, path: filepath.Join(t.TempDir(), "incoming")}
	var told error
	to.fault = func(err error) { told = err }
	session := openTestSession(t, from, 1, "one")
	openTestSession(t, to, 1, "one")
	applyOne(t, from, command(2, batchBytes(session, 2, 0, transaction{setOp("k", strings.Repeat("x", 200<<10))})))
	must(t, to.store.flush())
	must(t, to.store.writer.pragma("max_page_count=16"))
	if err := sendSnapshot(source, target, nil); !isFull(err) || !isFull(told) {
		t.Fatalf("the install: %v, and the fault is %v", err, told)
	}
	must(t, to.store.writer.pragma("max_page_count=1000000"))
	must(t, sendSnapshot(source, target, nil))
	if told != nil {
		t.Errorf("after an install the fault is %v", told)
	}
	to.blame(syscall.ENOSPC) // of an install that was complete but for its barrier
	must(t, sendSnapshot(source, target, nil))
	if told != nil {
		t.Errorf("after a snapshot that is there already the fault is %v", told)
	}
}

// Invariant (6): a batch takes effect at most once, however often and in whatever order it is in the log.
func TestSessionKeepsAnswers(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	session := openTestSession(t, f, 1, "one")
	insert := batchBytes(session, 1, 0, transaction{{kind: opIfNotExists, key: "k"}, setOp("k", "mine")})
	index := uint64(1)
	apply := func(data []byte) outcome {
		index++
		return applyOne(t, f, command(index, data))
	}
	first := apply(insert)
	if first.results[0].status != txDone {
		t.Fatalf("%+v", first)
	}
	t.Run("again gives the stored answer", func(t *testing.T) {
		again := apply(insert)
		if !reflect.DeepEqual(again.results, first.results) || f.store.meta().revision != 1 {
			t.Fatalf("%+v at revision %d, want %+v at 1", again, f.store.meta().revision, first)
		}
	})
	t.Run("gaps and any order", func(t *testing.T) {
		for _, seq := range []uint64{9, 5, 7, 9, 5} {
			if o := apply(batchBytes(session, seq, 0, transaction{setOp("s", fmt.Sprint(seq))})); o.kind != outcomeDone {
				t.Fatalf("seq %d: %+v", seq, o)
			}
		}
		if r := f.store.meta().revision; r != 4 {
			t.Fatalf("revision %d, want 4", r)
		}
	})
	t.Run("the answer is kept until it is acknowledged", func(t *testing.T) {
		if o := apply(batchBytes(session, 10, 1, transaction{})); o.kind != outcomeDone {
			t.Fatalf("%+v", o)
		}
		if o := apply(insert); o.kind != outcomeStale {
			t.Fatalf("after acked 1: %+v", o)
		}
		if o := apply(batchBytes(session, 5, 0, transaction{setOp("s", "5")})); o.kind != outcomeDone || f.store.meta().revision != 4 {
			t.Fatalf("after acked 1, seq 5: %+v", o)
		}
		if kept := slices.Sorted(maps.Keys(f.sessions[session].results)); !slices.Equal(kept, []uint64{5, 7, 9, 10}) {
			t.Fatalf("the answers to %v are kept", kept)
		}
	})
	t.Run("an unknown session", func(t *testing.T) {
		if o := apply(batchBytes(session+100, 1, 0, transaction{setOp("k", "other")})); o.kind != outcomeGone || f.store.meta().revision != 4 {
			t.Fatalf("%+v", o)
		}
	})
	t.Run("the same nonce opens the same session", func(t *testing.T) {
		index++
		if id := openTestSession(t, f, index, "one"); id != session {
			t.Fatalf("session %d, want %d", id, session)
		}
	})
	t.Run("answers survive a restart", func(t *testing.T) {
		must(t, f.store.close())
		f = openFSM(t, f.store.path, 1<<20)
		defer f.store.close()
		if o := apply(batchBytes(session, 7, 0, transaction{setOp("s", "7")})); o.kind != outcomeDone || f.store.meta().revision != 4 {
			t.Fatalf("%+v at revision %d", o, f.store.meta().revision)
		}
	})
}

// Two batches with one number and different contents: stopping would stop every member, and again at every start, so the
// second has no effect, on all of them alike.
func TestReplayWithOtherContentsHasNoEffect(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	session := openTestSession(t, f, 1, "one")
	applyOne(t, f, command(2, batchBytes(session, 1, 0, transaction{setOp("k", "a")})))
	o := applyOne(t, f, command(3, batchBytes(session, 1, 0, transaction{setOp("k", "b")})))
	if o.kind != outcomeInvalid {
		t.Fatalf("answered %+v, want invalid", o)
	}
	if r, _, _ := f.store.get("k"); r.value != "a" {
		t.Fatalf("value %q", r.value)
	}
}

func TestSessionLimitEvictsTheLeastRecentlyUsed(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	var logs []*raft.Log
	for i := range uint64(maxSessions) {
		logs = append(logs, command(i+1, encodeOpen(firstFormat, [16]byte{byte(i), byte(i >> 8), 1})))
	}
	f.ApplyBatch(logs)
	use := func(index, session uint64) outcomeKind {
		return applyOne(t, f, command(index, batchBytes(session, index, 0, transaction{setOp("k", fmt.Sprint(index))}))).kind
	}
	if k := use(300, 1); k != outcomeDone {
		t.Fatalf("the first session: %v", k)
	}
	// Two more push out the two least recently used, 2 and 3, both in the transaction that opens and in the next one.
	f.ApplyBatch([]*raft.Log{command(301, encodeOpen(firstFormat, [16]byte{2})), command(302, encodeOpen(firstFormat, [16]byte{3}))})
	want := map[uint64]outcomeKind{1: outcomeDone, 2: outcomeGone, 3: outcomeGone, 4: outcomeDone, 301: outcomeDone, 302: outcomeDone}
	for _, session := range slices.Sorted(maps.Keys(want)) {
		if k := use(400+session, session); k != want[session] {
			t.Errorf("session %d: %v, want %v", session, k, want[session])
		}
	}
	rows, err := f.store.sessions()
	must(t, err)
	if len(rows) != maxSessions {
		t.Fatalf("%d sessions are stored, want %d", len(rows), maxSessions)
	}
}

// Invariant (7): COMMIT, memory, applied index, answers. Whoever is told sees the effect in all of them.
func TestPublishOrder(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	session := openTestSession(t, f, 1, "one")
	var bad atomic.Pointer[string]
	complain := func(format string, args ...any) {
		s := fmt.Sprintf(format, args...)
		bad.CompareAndSwap(nil, &s)
	}
	seen := func(who string, index uint64) {
		if r, ok, err := f.store.get("n"); err != nil || !ok || r.value < fmt.Sprintf("%06d", index) {
			complain("%s at %d reads %q, %v", who, index, r.value, err)
		}
	}
	f.delivered = func(_, seq uint64, o outcome) {
		if at := f.applied.at(); at < o.index {
			complain("answer of %d before its index is applied: %d", o.index, at)
		}
		seen("the answered", o.index)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for i := uint64(2); f.applied.wait(ctx, i) == nil; i++ {
				seen("who waits for the index", i)
				if on := f.store.meta().applied; on < i {
					complain("index %d applied before it is committed: %d", i, on)
				}
			}
		})
	}
	for i := uint64(2); i < 800; i++ {
		applyOne(t, f, command(i, batchBytes(session, i, i-1, transaction{setOp("n", fmt.Sprintf("%06d", i))})))
	}
	cancel()
	wg.Wait()
	if s := bad.Load(); s != nil {
		t.Fatal(*s)
	}
}

// The marks are of the last entry at or below each boundary, and the same whatever the batching.
func TestMarksOfBoundaries(t *testing.T) {
	f := newFSMWith(t, -1)
	for _, i := range []uint64{3, 1023, 1025, 1026, 2048, 2049, 9000} {
		f.ApplyBatch([]*raft.Log{command(i, encodeTermStart(firstFormat))})
	}
	must(t, f.store.flush())
	marks, err := f.store.marks()
	must(t, err)
	got := ""
	for _, m := range marks {
		got += fmt.Sprintf("%d:%d ", m.boundary, m.applied)
	}
	if want := "1024:1023 2048:2048 8192:2049 "; got != want {
		t.Fatalf("marks %s, want %s", got, want)
	}
}

// BenchmarkEntry is one entry of a batch of single sets, with and without a history, on a state of some size.
func BenchmarkEntry(b *testing.B) {
	for _, keys := range []int{1000, 100_000} {
		for _, size := range []int{1, 16, 64, 256} {
			for _, format := range []uint64{firstFormat, historyFormat} {
				b.Run(fmt.Sprintf("keys=%d/batch=%d/format=%d", keys, size, format), func(b *testing.B) {
					benchmarkEntry(b, keys, size, format)
				})
			}
		}
	}
}

func benchmarkEntry(b *testing.B, keys, size int, format uint64) {
	f := newFSMWith(b, 256<<20)
	session := openTestSession(b, f, 1, "bench")
	index, seq := uint64(1), uint64(0)
	next := func(txs ...transaction) *raft.Log {
		index, seq = index+1, seq+1
		return command(index, batchBytes(session, seq, seq-1, txs...))
	}
	if format >= historyFormat {
		index++
		applyOne(b, f, command(index, encodeRaise(format, 0)))
	}
	value := bytes.Repeat([]byte("v"), 256)
	set := func(i int) transaction {
		return transaction{{kind: opSet, key: fmt.Sprintf("bench/%018d", i), value: value}}
	}
	for i := 0; i < keys; {
		var txs []transaction
		for range 1000 {
			txs, i = append(txs, set(i)), i+1
		}
		applyOne(b, f, next(txs...))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f.store.maintain(ctx) }()
	defer func() { cancel(); <-done }()
	rnd := rand.New(rand.NewPCG(1, 2))
	b.ResetTimer()
	for b.Loop() {
		txs := make([]transaction, size)
		for i := range txs {
			txs[i] = set(rnd.IntN(keys))
		}
		f.ApplyBatch([]*raft.Log{next(txs...)})
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*size), "ns/write")
}

// What is decoded before it is committed is what apply takes, once; what is not is decoded then.
func TestDecoder(t *testing.T) {
	entryOf := func(key string) []byte {
		return encodeEntry(batchOf(1, 1, 0, transaction{{kind: opSet, key: key, value: []byte("v")}}))
	}
	key := func(d decoded) string {
		must(t, d.err)
		return d.entry.batch.txs[0][0].key
	}
	var c decoder
	data := entryOf("k")
	want := decode(data)
	c.add(data, nil)
	c.decode(data)
	data[len(data)-1]++ // what is decoded now would be an error
	if d := c.take(data); key(d) != "k" || d.sum != want.sum {
		t.Errorf("took %+v", d)
	}
	if d := c.take(data); d.err == nil {
		t.Error("taken twice")
	}

	data = entryOf("applied first")
	c.add(data, nil)
	if got := key(c.take(data)); got != "applied first" {
		t.Error(got)
	}
	c.decode(data)
	if known, _ := c.knows(data); known {
		t.Error("decoded for nobody")
	}

	large := entryOf(strings.Repeat("k", decodeFrom))
	if c.expect(entryOf("k")) || !c.expect(large) || !c.expect(large) {
		t.Error("a small one is expected, or a large one is not")
	}
	if c.decode(large); c.expect(large) {
		t.Error("decoded, and to be decoded again")
	}

	var all [][]byte
	for i := range len(c.list) + 1 {
		data := entryOf(fmt.Sprint(i))
		d := decode(data)
		c.add(data, &d)
		all = append(all, data)
	}
	for i, data := range all {
		if known, done := c.knows(data); known != (i > 0) || done != known {
			t.Errorf("entry %d: known %v, decoded %v", i, known, done)
		}
		if got := key(c.take(data)); got != fmt.Sprint(i) {
			t.Error(got)
		}
	}
}

// A row lives longer than the log entry that wrote it, whose bytes may be used again.
func TestApplyKeepsNoBytesOfTheEntry(t *testing.T) {
	f := newFSMWith(t, testBudget)
	session := openTestSession(t, f, 1, "n")
	data := batchBytes(session, 1, 0, transaction{setOp("a", "value")})
	applyOne(t, f, command(2, data))
	for i := range data {
		data[i] = 'x'
	}
	wantValue(t, f.store, "a", "value")
}

// An apply that waits for a rebuild has not stalled: its member acknowledges appends, or the rebuild could cost the quorum.
// An apply that fails half-way has had no effect, on rows or sessions: what it had of a batch is applied by the next try, once.
func TestApplyThatFailsHalfWay(t *testing.T) {
	t.Parallel()
	f := newFSMWith(t, 1<<20)
	session := openTestSession(t, f, 1, "one")
	batch := command(2, batchBytes(session, 1, 0, transaction{setOp("k", "v")}))
	newer := command(3, []byte{entryFormat + 1, 0, 0})
	if _, err := f.tryApply([]*raft.Log{batch, newer}); !errors.Is(err, ErrFormat) {
		t.Fatalf("an entry of a newer format: %v", err)
	}
	if m := f.store.meta(); m.applied != 1 || m.revision != 0 {
		t.Errorf("at %d with revision %d", m.applied, m.revision)
	}
	answers, err := f.tryApply([]*raft.Log{batch})
	if must(t, err); answers[0].(outcome).kind != outcomeDone {
		t.Fatalf("%+v", answers[0])
	}
	if r, ok, err := f.store.get("k"); !ok || err != nil || r.value != "v" || f.store.meta().revision != 1 {
		t.Errorf("answered as done, and k is %+v (%t, %v) at revision %d", r, ok, err, f.store.meta().revision)
	}
}

// An entry that has read what somebody else has done to the rows has no effect and no answer: the state is rebuilt first.
func TestApplyOnForeignRows(t *testing.T) {
	t.Parallel()
	f := newFSMWith(t, -1)
	session := openTestSession(t, f, 1, "one")
	applyOne(t, f, command(2, batchBytes(session, 1, 0, transaction{setOp("k", "ours")})))
	must(t, f.store.flush())
	told := make(chan error, 1)
	f.distrust = func(err error) { told <- err }
	shell(t, f.store.path, "DELETE FROM kv") // which leaves no wrong sum of a row
	answered := make(chan []any, 1)
	go func() {
		answered <- f.ApplyBatch([]*raft.Log{command(3, batchBytes(session, 2, 1, transaction{{kind: opIfValue, key: "k", value: []byte("ours")}, setOp("k", "2")}))})
	}()
	select {
	case err := <-told:
		wantIs(t, "distrust", err, errForeign)
	case a := <-answered:
		t.Fatalf("answered %+v", a)
	}
	if at := f.applied.at(); at != 2 {
		t.Errorf("applied %d", at)
	}
	close(f.closing)
	if a := <-answered; a[0] != nil {
		t.Errorf("answered %+v", a)
	}
}

// While the state is to be rebuilt nothing is applied to it, and nobody gets a copy.
func TestPausedStateIsLeftAlone(t *testing.T) {
	t.Parallel()
	f := newFSMWith(t, 1<<20)
	distrusted := 0
	f.distrust = func(error) { distrusted++ }
	openTestSession(t, f, 1, "one")
	f.blame(corrupt("a row"))
	if distrusted != 1 {
		t.Errorf("distrusted %d times", distrusted)
	}
	if _, err := f.tryApply([]*raft.Log{command(2, encodeTermStart(firstFormat))}); !errors.Is(err, errPaused) || f.store.meta().applied != 1 {
		t.Errorf("apply: %v, at %d", err, f.store.meta().applied)
	}
	if _, body, err := (&snapshotStore{fsm: f}).Open(snapshotState); err == nil {
		body.Close()
		t.Error("a copy is sent")
	}
	f.blame(errUnseated) // rows that lost their names only: that is mended in place
	if distrusted != 2 {
		t.Errorf("distrusted %d times", distrusted)
	}
}

// After an install that has failed the rows may be the new ones: the sessions beside them are read anew before anything is applied.
func TestInstallThatFails(t *testing.T) {
	t.Parallel()
	f := newFSMWith(t, 1<<20)
	session := openTestSession(t, f, 1, "one")
	f.incoming = &incoming{path: filepath.Join(t.TempDir(), "none"), meta: meta{applied: 9, term: 1}}
	if err := f.Restore(io.NopCloser(strings.NewReader(""))); err == nil || !f.stale {
		t.Fatalf("%v; read anew: %t", err, f.stale)
	}
	must(t, f.store.flush())
	f.sessions = nil
	if o := applyOne(t, f, command(2, batchBytes(session, 1, 0, transaction{setOp("k", "v")}))); o.kind != outcomeDone {
		t.Errorf("%+v", o)
	}
}

// A snapshot that is not ahead of the state installs nothing, and what raft cuts from its log next is on the disk.
func TestRestoreOfWhatIsThere(t *testing.T) {
	t.Parallel()
	f := newFSMWith(t, 1<<20)
	session := openTestSession(t, f, 1, "one")
	applyOne(t, f, command(2, batchBytes(session, 1, 0, transaction{setOp("k", "v")})))
	for _, at := range []uint64{1, 2} {
		was := f.store.inFile.Load().barrier
		f.incoming = &incoming{path: filepath.Join(t.TempDir(), "none"), meta: meta{applied: at, term: 1}}
		must(t, f.Restore(io.NopCloser(strings.NewReader(""))))
		if m := f.store.inFile.Load(); m.barrier != was+1 || m.applied != 2 || m.installed != 0 {
			t.Errorf("a snapshot at %d: the file is at %d, after %d barriers more, installed %d", at, m.applied, m.barrier-was, m.installed)
		}
	}
}

// Raft goes on with what an install says, and the state with what the file holds: they are the same.
func TestSnapshotThatSaysOtherThanItHolds(t *testing.T) {
	servers := []raft.Server{{Suffrage: raft.Voter, ID: "a", Address: "a:1"}}
	holds := meta{applied: 9, term: 3, configIndex: 5, config: raft.EncodeConfiguration(raft.Configuration{Servers: servers})}
	for what, change := range map[string]func(*raft.SnapshotMeta){
		"all of it":     nil,
		"index":         func(m *raft.SnapshotMeta) { m.Index++ },
		"term":          func(m *raft.SnapshotMeta) { m.Term++ },
		"index of it":   func(m *raft.SnapshotMeta) { m.ConfigurationIndex++ },
		"configuration": func(m *raft.SnapshotMeta) { m.Configuration.Servers = nil },
	} {
		says := raft.SnapshotMeta{Index: 9, Term: 3, ConfigurationIndex: 5, Configuration: raft.Configuration{Servers: servers}}
		if change != nil {
			change(&says)
		}
		if err := (&snapshotSink{meta: holds, says: says}).honest(); (err == nil) != (change == nil) || err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestWatermarkWakesWhoWaitsForIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var w watermark
		for _, c := range []struct {
			at   uint64
			want error
		}{{5, nil}, {4, nil}, {6, context.DeadlineExceeded}} {
			go func() {
				synctest.Wait()
				w.advance(5)
			}()
			if err := w.wait(ctxFor(t, time.Minute), c.at); !errors.Is(err, c.want) {
				t.Errorf("wait for %d: %v", c.at, err)
			}
			synctest.Wait()
			if len(w.waiters) != 0 {
				t.Errorf("%d lists of waiters are left", len(w.waiters))
			}
			w.index = 0
		}
	})
}

func TestSessionsBehindAnIndex(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	id := openTestSession(t, f, 3, "one")
	if f.openedAfter(id) || !f.openedAfter(id-1) {
		t.Errorf("behind %d: %t, behind %d: %t", id, f.openedAfter(id), id-1, f.openedAfter(id-1))
	}
}

func TestApplyThatWaitsForARebuildHasNotStalled(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	f.began.Store(monotonic() - int64(time.Minute))
	if d := f.stalled(); d < time.Minute {
		t.Errorf("it has taken %v", d)
	}
	f.paused.Store(true)
	if d := f.stalled(); d != 0 {
		t.Errorf("while it is paused it has taken %v", d)
	}
	f.paused.Store(false)
	f.began.Store(0)
	if d := f.stalled(); d != 0 {
		t.Errorf("without an entry it has taken %v", d)
	}
}
