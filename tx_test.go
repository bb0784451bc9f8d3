package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Every condition on a key that is absent, one that has the value and version in question, and one that has others.
func TestConditions(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	must(t, s.Set(ctx, "equal", []byte("secret")))  // version 1
	must(t, s.Set(ctx, "other", []byte("another"))) // version 2
	const absent, equal, other = "absent", "equal", "other"
	versions := map[string]uint64{equal: 1, other: 2}
	for _, c := range []struct {
		words string
		op    func(key string) Op
		want  string
		have  map[string]string // by the keys of which it does not hold
	}{
		{"IfExists", IfExists, "present", map[string]string{absent: "absent"}},
		{"IfNotExists", IfNotExists, "absent", map[string]string{equal: "present", other: "present"}},
		{"IfValue", func(key string) Op { return IfValue(key, []byte("secret")) }, "the given value",
			map[string]string{absent: "absent", other: "another value"}},
		{"IfValue of nothing", func(key string) Op { return IfValue(key, nil) }, "the given value",
			map[string]string{absent: "absent", equal: "another value", other: "another value"}},
		{"IfNotValue", func(key string) Op { return IfNotValue(key, []byte("secret")) }, "anything but the given value",
			map[string]string{equal: "the given value"}},
		{"IfVersion 1", func(key string) Op { return IfVersion(key, 1) }, "version 1",
			map[string]string{absent: "absent", other: "version 2"}},
		{"IfVersion 0", func(key string) Op { return IfVersion(key, 0) }, "absent",
			map[string]string{equal: "version 1", other: "version 2"}},
		{"IfNotVersion 1", func(key string) Op { return IfNotVersion(key, 1) }, "anything but version 1",
			map[string]string{equal: "version 1"}},
		{"IfNotVersion 0", func(key string) Op { return IfNotVersion(key, 0) }, "present",
			map[string]string{absent: "absent"}},
	} {
		for _, key := range []string{absent, equal, other} {
			before := s.Local().Freshness().Revision
			mark := c.words + "/" + key
			revision, err := s.Exec(ctx, Set(mark, nil), c.op(key))
			have, fails := c.have[key]
			if !fails {
				if err != nil || revision != before+1 || s.Stale().Get(mark) == nil {
					t.Errorf("%s of the key %s: revision %d after %d, %v", c.words, key, revision, before, err)
				}
				continue
			}
			want := ConditionError{Key: key, Want: c.want, Have: have, Version: versions[key]}
			var got *ConditionError
			if !errors.As(err, &got) || *got != want || !errors.Is(err, ErrUnsatisfied) || errors.Is(err, ErrNotApplied) || errors.Is(err, ErrUncertain) {
				t.Errorf("%s of the key %s: %+v, want %+v", c.words, key, err, want)
			}
			if after := s.Local().Freshness().Revision; revision != 0 || after != before || s.Stale().Get(mark) != nil {
				t.Errorf("%s of the key %s: returns revision %d, and the current one went from %d to %d", c.words, key, revision, before, after)
			}
			if text := fmt.Sprint(err); !strings.Contains(text, strconv.Quote(key)) || !strings.Contains(text, c.want) || !strings.Contains(text, have) || strings.Contains(text, "secret") {
				t.Errorf("%s of the key %s: %s", c.words, key, text)
			}
		}
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	exec := func(revision uint64, ops ...Op) {
		t.Helper()
		if got, err := s.Exec(ctx, ops...); err != nil || got != revision {
			t.Fatalf("revision %d, %v; want %d", got, err, revision)
		}
	}
	fails := func(at string, ops ...Op) {
		t.Helper()
		var e *ConditionError
		if got, err := s.Exec(ctx, ops...); !errors.As(err, &e) || e.Key != at || got != 0 {
			t.Fatalf("revision %d, %v; want a condition of %s", got, err, at)
		}
	}
	exec(0) // of nothing
	exec(0, Op{}, All(), All(Op{}))
	exec(2, Set("a", []byte("1")), Set("b", nil))
	exec(2, Delete("missing"), IfExists("a"))
	exec(4, Delete("a"), Delete("missing"), Set("c", []byte("3")))
	wantLookup(t, s, Entry{Key: "a"})
	wantLookup(t, s, Entry{Key: "b", Value: []byte{}, Version: 2, Created: 2})
	wantLookup(t, s, Entry{Key: "c", Value: []byte("3"), Version: 4, Created: 4})
	exec(5, Set("c", []byte("4")), IfVersion("c", 4), IfValue("c", []byte("3"))) // of the state before
	wantLookup(t, s, Entry{Key: "c", Value: []byte("4"), Version: 5, Created: 4})
	fails("a", Set("x", nil), IfExists("b"), All(All(IfExists("a"), IfExists("y")), IfNotExists("b")))
	fails("b", IfNotExists("b"), IfExists("a"))
	exec(5)

	// An Op is a value.
	value := []byte("one")
	set, conditions := Set("k", value), IfValue("b", value[:0])
	copy(value, "XXX")
	all := All(set, conditions)
	All(set, Set("l", nil))
	All(all, Set("m", nil))
	exec(6, all)
	wantLookup(t, s, Entry{Key: "k", Value: []byte("one"), Version: 6, Created: 6})
	exec(7, all)
	wantLookup(t, s, Entry{Key: "k", Value: []byte("one"), Version: 7, Created: 6})
}

func TestTransactionLimits(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	many := func(n int, size int) (o Op) {
		for i := range n {
			key := fmt.Sprintf("%d", i)
			o = All(o, IfNotExists(key+strings.Repeat("k", size-len(key))))
		}
		return o
	}
	half, whole := make([]byte, 256<<10), make([]byte, s.conf.MaxValue)
	const count, kind, keySize, valueSize = 1, 1, 1, 3 // bytes of an encoding: of the number of ops, and of an op beside key and value
	rest := half[:256<<10-count-2*(kind+keySize+1+valueSize)]
	for _, c := range []struct {
		words string
		ops   []Op
		limit LimitError // zero: it is fine
	}{
		{"as many operations as there may be", []Op{many(127, 3), Set("x", nil)}, LimitError{}},
		{"one more", []Op{many(128, 3), Set("x", nil)}, LimitError{"operations", 128, 129}},
		{"as many bytes as there may be", []Op{Set("a", half), Set("b", rest)}, LimitError{}},
		{"one more byte", []Op{Set("a", half), IfNotValue("b", half[:len(rest)+1])}, LimitError{"transaction bytes", 512 << 10, 512<<10 + 1}},
		{"more bytes of keys", []Op{many(128, maxKey)}, LimitError{"transaction bytes", 512 << 10, 2 + 128*(kind+2+maxKey)}},
		{"the largest value", []Op{Set("a", whole)}, LimitError{}},
		{"the largest value of a condition", []Op{IfNotValue("a1", whole)}, LimitError{}},
		{"a larger one", []Op{Set("a", append(whole, 0))}, LimitError{"value bytes", 1 << 20, 1<<20 + 1}},
		{"a larger one of a condition", []Op{IfValue("a", append(whole, 0))}, LimitError{"value bytes", 1 << 20, 1<<20 + 1}},
		{"a large value and an empty one", []Op{Set("a", whole), Set("b", nil)},
			LimitError{"transaction bytes", 512 << 10, count + 2*(kind+keySize+1) + valueSize + 1 + 1<<20}},
		{"a large value and 32 KiB", []Op{Set("a", whole), many(7, maxKey), IfNotExists(strings.Repeat("l", 32<<10-7*4099-10))}, LimitError{}},
		{"a large value and one byte more", []Op{Set("a", whole), many(7, maxKey), IfNotExists(strings.Repeat("l", 32<<10-7*4099-9))},
			LimitError{"transaction bytes beside the one value", 32 << 10, 32<<10 + 1}},
		{"the longest key", []Op{Delete(strings.Repeat("k", maxKey))}, LimitError{}},
		{"a longer one", []Op{Delete(strings.Repeat("k", maxKey+1))}, LimitError{"key bytes", maxKey, maxKey + 1}},
		{"a longer one of a condition", []Op{IfVersion(strings.Repeat("k", maxKey+1), 1)}, LimitError{"key bytes", maxKey, maxKey + 1}},
	} {
		_, err := s.Exec(ctx, c.ops...)
		if c.limit == (LimitError{}) {
			if err != nil {
				t.Errorf("%s: %v", c.words, err)
			}
			continue
		}
		var got *LimitError
		if !errors.As(err, &got) || *got != c.limit {
			t.Errorf("%s: %v, want %v", c.words, err, &c.limit)
		}
		wantIs(t, c.words, err, ErrTooLarge, ErrNotApplied)
		checkVerdict(t, c.words, err)
	}
}

func TestTransactionThatIsInvalid(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	for words, ops := range map[string][]Op{
		"a key that is set twice":           {Set("a", nil), Set("a", nil)},
		"a key that is set and deleted":     {Set("a", nil), IfExists("b"), Set("b", nil), All(Delete("a"))},
		"a missing key that is deleted":     {Delete("a"), Delete("a")},
		"the first of many is the last too": {Set("a", nil), Set("b", nil), Set("c", nil), Set("d", nil), Set("a", nil)},
		"the third is the last too":         {Set("b", nil), Set("c", nil), Set("a", nil), Set("d", nil), Set("a", nil)},
	} {
		revision, err := s.Exec(t.Context(), ops...)
		wantIs(t, words, err, ErrInvalid, ErrNotApplied)
		checkVerdict(t, words, err)
		if revision != 0 || !strings.Contains(fmt.Sprint(err), `"a" twice`) {
			t.Errorf("%s: revision %d, %v", words, revision, err)
		}
	}
	for _, o := range []Op{Set("", nil), Delete("a\x00"), IfExists("\xff"), IfVersion("", 0), All(Set("a", nil), IfValue("", nil))} {
		_, err := s.Exec(t.Context(), o)
		wantIs(t, "no key", err, ErrInvalid, ErrNotApplied)
	}
	if revision, err := s.Exec(t.Context(), IfNotExists("a"), IfNotVersion("a", 9), Set("a", nil)); err != nil || revision != 1 {
		t.Errorf("conditions on a key that is written: revision %d, %v", revision, err)
	}
}

func TestUpdate(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	var seen []Entry
	update := func(f func(old Entry) ([]byte, error)) (Entry, error) {
		seen = nil
		return s.Update(ctx, "k", func(old Entry) ([]byte, error) {
			seen = append(seen, Entry{old.Key, bytes.Clone(old.Value), old.Version, old.Created})
			return f(old)
		})
	}
	wantSeen := func(want ...Entry) {
		t.Helper()
		if !slices.EqualFunc(seen, want, equalEntry) {
			t.Errorf("f was given %+v, want %+v", seen, want)
		}
	}

	mine := []byte("one")
	got, err := update(func(Entry) ([]byte, error) { return mine, nil })
	must(t, err)
	wantSeen(Entry{Key: "k"})
	one := Entry{Key: "k", Value: []byte("one"), Version: 1, Created: 1}
	copy(mine, "XXX")
	if !equalEntry(got, one) {
		t.Errorf("%+v, want %+v", got, one)
	}
	copy(got.Value, "YYY")
	wantLookup(t, s, one)

	// Someone else is quicker, twice; what f does to its copy is its own affair.
	times := 0
	got, err = update(func(old Entry) ([]byte, error) {
		if times++; times < 3 {
			must(t, s.Set(ctx, "k", fmt.Append(nil, times)))
		}
		return append(old.Value[:0], "!"...), nil
	})
	must(t, err)
	wantSeen(one, Entry{"k", []byte("1"), 2, 1}, Entry{"k", []byte("2"), 3, 1})
	if want := (Entry{"k", []byte("!"), 4, 1}); !equalEntry(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}

	// A key that was deleted and made anew in between is another one, be its value the same.
	times = 0
	got, err = update(func(old Entry) ([]byte, error) {
		if times++; times == 1 {
			must(t, s.Delete(ctx, "k"))
			must(t, s.Set(ctx, "k", []byte("!")))
		}
		return nil, nil
	})
	must(t, err)
	wantSeen(Entry{"k", []byte("!"), 4, 1}, Entry{"k", []byte("!"), 6, 6})
	want := Entry{"k", []byte{}, 7, 6}
	if !equalEntry(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}

	refusal := errors.New("f refuses")
	_, err = update(func(old Entry) ([]byte, error) { return []byte("x"), refusal })
	wantIs(t, "an error of f", err, refusal, ErrNotApplied)
	wantSeen(want)
	wantLookup(t, s, want)
	_, err = update(func(old Entry) ([]byte, error) { return make([]byte, s.conf.MaxValue+1), nil })
	wantIs(t, "a value that is too large", err, ErrTooLarge, ErrNotApplied)
	_, err = s.Update(ctx, "", func(Entry) ([]byte, error) { panic("there is no such key") })
	wantIs(t, "no key", err, ErrInvalid, ErrNotApplied)

	// Someone else is always quicker.
	ctx, cancel := context.WithCancel(ctx)
	_, err = update(func(old Entry) ([]byte, error) {
		must(t, s.Set(t.Context(), "k", nil))
		if len(seen) == 5 {
			cancel()
		}
		return []byte("mine"), nil
	})
	wantIs(t, "a context that has ended", err, context.Canceled, ErrNotApplied)
	checkVerdict(t, "a context that has ended", err)
	if len(seen) != 5 {
		t.Errorf("f was called %d times", len(seen))
	}
}

// On every member alike: conditions on what another one wrote, and counters that all members count up at once.
func TestTransactionsOnThreeMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ctx := ctxFor(t, 4*patience)
	var version uint64
	for i, m := range c {
		// The condition is judged where all agree, so it knows the newest write though this member may not.
		revision, err := m.s.Exec(ctx, IfVersion("k", version), Set("k", fmt.Append(nil, i)), Set("l", fmt.Append(nil, i)))
		must(t, err)
		if revision <= version+1 {
			t.Errorf("member %d: revision %d after %d", i, revision, version)
		}
		_, err = m.s.Exec(ctx, IfVersion("k", version), Set("k", []byte("again")))
		var e *ConditionError
		if version = revision - 1; !errors.As(err, &e) || e.Version != version {
			t.Errorf("member %d: %v, want a condition of version %d", i, err, version)
		}
		for _, reader := range c {
			e, err := reader.s.Lookup(ctx, "l")
			if want := (Entry{"l", fmt.Append(nil, i), revision, 2}); err != nil || !equalEntry(e, want) {
				t.Errorf("%+v, %v; want %+v", e, err, want)
			}
		}
	}

	const writers, times = 4, 10
	var counting sync.WaitGroup
	for _, m := range c {
		for range writers {
			counting.Go(func() {
				for range times {
					_, err := m.s.Update(ctx, "count", func(old Entry) ([]byte, error) {
						n := 0
						if old.Version != 0 {
							var err error
							if n, err = strconv.Atoi(string(old.Value)); err != nil {
								return nil, err
							}
						}
						return fmt.Append(nil, n+1), nil
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	counting.Wait()
	wantGet(t, c[0].s, "count", fmt.Append(nil, 3*writers*times))
	c.awaitEqual(t)
}

// txModel is a plain map with what Exec must do to it.
type txModel struct {
	rows     map[string]Entry
	revision uint64
}

type modelOp struct {
	kind    opKind
	key     string
	value   []byte
	version uint64
}

func (o modelOp) op() Op {
	switch o.kind {
	case opSet:
		return Set(o.key, o.value)
	case opDelete:
		return Delete(o.key)
	case opIfExists:
		return IfExists(o.key)
	case opIfNotExists:
		return IfNotExists(o.key)
	case opIfValue:
		return IfValue(o.key, o.value)
	case opIfNotValue:
		return IfNotValue(o.key, o.value)
	case opIfVersion:
		return IfVersion(o.key, o.version)
	default:
		return IfNotVersion(o.key, o.version)
	}
}

func (m *txModel) holds(o modelOp) bool {
	e, there := m.rows[o.key]
	same := there && string(e.Value) == string(o.value)
	switch o.kind {
	case opIfExists:
		return there
	case opIfNotExists:
		return !there
	case opIfValue:
		return same
	case opIfNotValue:
		return !same
	case opIfVersion:
		return e.Version == o.version
	case opIfNotVersion:
		return e.Version != o.version
	}
	return true
}

// exec says what became of the ops: twice is a key that they write twice, failed the key of a condition.
func (m *txModel) exec(ops []modelOp) (twice bool, failed *modelOp) {
	written := map[string]bool{}
	for _, o := range ops {
		if o.kind == opSet || o.kind == opDelete {
			if written[o.key] {
				return true, nil
			}
			written[o.key] = true
		}
	}
	for _, o := range ops {
		if !m.holds(o) {
			return false, &o
		}
	}
	for _, o := range ops {
		e, there := m.rows[o.key]
		switch {
		case o.kind == opSet:
			m.revision++
			e = Entry{Key: o.key, Value: append([]byte{}, o.value...), Version: m.revision, Created: e.Created}
			if !there {
				e.Created = m.revision
			}
			m.rows[o.key] = e
		case o.kind == opDelete && there:
			m.revision++
			delete(m.rows, o.key)
		}
	}
	return false, nil
}

// Random transactions do to a member what they do to a plain map. All checks share the member and each has keys of its own.
func TestExecAgainstModel(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, time.Minute)
	kinds := []opKind{opSet, opSet, opSet, opDelete, opIfExists, opIfNotExists, opIfValue, opIfNotValue, opIfVersion, opIfNotVersion}
	checks := 0
	rapid.Check(t, func(rt *rapid.T) {
		checks++
		base := s.Local().Freshness().Revision
		m := &txModel{rows: map[string]Entry{}, revision: base}
		keys := []string{fmt.Sprint(checks, "/a"), fmt.Sprint(checks, "/b"), fmt.Sprint(checks, "/c")}
		for range rapid.IntRange(1, 12).Draw(rt, "transactions") {
			var ops []modelOp
			var given []Op
			for range rapid.SampledFrom([]int{0, 1, 1, 2, 2, 3, 4}).Draw(rt, "ops") {
				o := modelOp{kind: rapid.SampledFrom(kinds).Draw(rt, "kind"), key: keys[rapid.IntRange(0, len(keys)-1).Draw(rt, "key")]}
				switch {
				case o.kind.hasValue():
					o.value = rapid.SampledFrom([][]byte{nil, {}, []byte("v"), []byte("w")}).Draw(rt, "value")
				case rapid.Bool().Draw(rt, "the version that is there"):
					o.version = m.rows[o.key].Version
				default:
					o.version = rapid.SampledFrom([]uint64{0, m.revision, m.revision + 1}).Draw(rt, "version")
				}
				ops = append(ops, o)
				given = append(given, o.op())
			}
			if len(given) > 1 && rapid.Bool().Draw(rt, "nested") {
				given = []Op{All(given[0], All(given[1:]...))}
			}
			before := maps.Clone(m.rows)
			twice, failed := m.exec(ops)
			revision, err := s.Exec(ctx, given...)
			var unsatisfied *ConditionError
			switch {
			case twice:
				if !errors.Is(err, ErrInvalid) || revision != 0 {
					rt.Fatalf("%+v: %d, %v; want ErrInvalid", ops, revision, err)
				}
			case failed != nil:
				if !errors.As(err, &unsatisfied) || unsatisfied.Key != failed.key || unsatisfied.Version != before[failed.key].Version || revision != 0 {
					rt.Fatalf("%+v: %d, %v; want a condition that failed, %+v of %+v", ops, revision, err, *failed, before)
				}
			case err != nil || revision != m.revision:
				rt.Fatalf("%+v: revision %d, %v; want %d", ops, revision, err, m.revision)
			}
			if at := s.Local().Freshness().Revision; at != m.revision {
				rt.Fatalf("after %+v the revision is %d, want %d", ops, at, m.revision)
			}
			for _, key := range keys {
				want, there := m.rows[key]
				if !there {
					want = Entry{Key: key}
				}
				got, err := s.Lookup(ctx, key)
				if !equalEntry(got, want) || errors.Is(err, ErrNotFound) == there {
					rt.Fatalf("after %+v: %+v, %v; want %+v", ops, got, err, want)
				}
			}
		}
	})
}

// Whatever ops are made of bytes, what passes the limits is encoded in as many bytes as was counted, and decoded as the same
// ops: apply never meets what it has to refuse.
func FuzzOps(f *testing.F) {
	f.Add([]byte("\x00\x01k\x01v"))
	f.Add([]byte("\x01\x01k\x02\x01k\x06\x01k\xff\x01\x07\x02kk\x00"))
	f.Add([]byte("\x04\x01k\x03abc\x08\x00\x01k\x00\x01\x01l"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &Service{conf: Config{MaxValue: 300}}
		r := reader{b: data}
		var ops []Op
		for len(r.b) > 0 && !r.bad {
			kind := r.byte() % 9
			key := string(r.bytes(len(data)))
			switch kind {
			case 0:
				ops = append(ops, Set(key, r.bytes(len(data))))
			case 1:
				ops = append(ops, Delete(key))
			case 2:
				ops = append(ops, IfExists(key))
			case 3:
				ops = append(ops, IfNotExists(key))
			case 4:
				ops = append(ops, IfValue(key, r.bytes(len(data))))
			case 5:
				ops = append(ops, IfNotValue(key, r.bytes(len(data))))
			case 6:
				ops = append(ops, IfVersion(key, r.uint()))
			case 7:
				ops = append(ops, IfNotVersion(key, r.uint()))
			case 8:
				ops = []Op{All(ops...)}
			}
		}
		tx := flatten(ops)
		if s.check(tx) != nil {
			return
		}
		encoded := appendTransaction(nil, tx)
		if size := transactionSize(tx); size != len(encoded) {
			t.Errorf("%+v takes %d bytes, counted as %d", tx, len(encoded), size)
		}
		e, err := decodeEntry(encodeBatch(entryFormat, 1, 1, 0, [][]byte{encoded}))
		if err != nil || !equalEntries(e, entry{format: entryFormat, kind: entryBatch, batch: batch{session: 1, seq: 1, txs: []transaction{tx}}}) {
			t.Errorf("%+v comes back as %+v, %v", tx, e, err)
		}
	})
}

// One writer: what a call costs beside the disk is in the allocations.
func BenchmarkWrite(b *testing.B) {
	s := openSole(b)
	value := make([]byte, 256)
	ctx := b.Context()
	for _, c := range []struct {
		name  string
		write func() error
	}{
		{"Set", func() error { return s.Set(ctx, "k", value) }},
		{"Exec", func() error { _, err := s.Exec(ctx, Set("k", value)); return err }},
		{"Exec of 16", func() error {
			ops := make([]Op, 16)
			for i := range ops {
				ops[i] = Set(fmt.Sprint(i), value)
			}
			_, err := s.Exec(ctx, ops...)
			return err
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				must(b, c.write())
			}
		})
	}
}

// The size of the state is right at every moment, with the rows in memory and without, and a write is refused exactly if it would
// make it larger than the limit.
func TestMaxState(t *testing.T) {
	t.Parallel()
	for name, memory := range map[string]int64{"rows in memory": 0, "rows in the file": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conf := Config{Dir: filepath.Join(t.TempDir(), "data"), Memory: memory, MaxState: 100}
			s, err := Open(t.Context(), conf)
			must(t, err)
			defer func() { s.Close() }()
			must(t, s.Ready(ctxFor(t, patience)))
			ctx := ctxFor(t, patience)
			refused := func(words string, err error, got int64) {
				t.Helper()
				var limit *LimitError
				if !errors.Is(err, ErrTooLarge) || !errors.Is(err, ErrNotApplied) || !errors.As(err, &limit) || *limit != (LimitError{"state bytes", 100, got}) {
					t.Errorf("%s: %v", words, err)
				}
			}
			size := func(want int64) {
				t.Helper()
				got, err := ask(t, s, "SELECT coalesce(sum(octet_length(key) + octet_length(value)), 0) FROM kv")
				must(t, err)
				if st := s.Status(); st.Size != want || got[0] != fmt.Sprint(want) {
					t.Errorf("size %d, want %d, and the rows have %s", st.Size, want, got)
				}
			}
			size(0)
			must(t, s.Set(ctx, "é", make([]byte, 58)))
			must(t, s.Set(ctx, "b", make([]byte, 39)))
			size(100)
			refused("one byte more", s.Set(ctx, "c", nil), 101)
			refused("a larger value", s.Set(ctx, "b", make([]byte, 40)), 101)
			_, err = s.Exec(ctx, Delete("b"), Set("c", make([]byte, 40)))
			refused("more than is deleted", err, 101)
			_, err = s.Update(ctx, "b", func(old Entry) ([]byte, error) { return append(old.Value, 1), nil })
			refused("Update", err, 101)
			must(t, s.AddAllowedMember(ctx, "127.0.0.1:9"))
			if err := s.Insert(ctx, "b", make([]byte, 40)); err != ErrUnsatisfied {
				t.Errorf("an Insert that makes nothing larger: %v", err)
			}
			must(t, s.Set(ctx, "b", make([]byte, 39)))
			_, err = s.Exec(ctx, Delete("b"), Set("c", make([]byte, 39)))
			must(t, err)
			size(100)
			must(t, s.Close())
			s, err = Open(t.Context(), conf)
			must(t, err)
			must(t, s.Ready(ctxFor(t, patience)))
			size(100)
			refused("after a restart", s.Set(ctx, "d", nil), 101)
			must(t, s.Close())
			conf.MaxState = 50 // it is larger than that now
			s, err = Open(t.Context(), conf)
			must(t, err)
			must(t, s.Ready(ctxFor(t, patience)))
			must(t, s.Set(ctx, "é", make([]byte, 58)))
			must(t, s.Set(ctx, "é", make([]byte, 50)))
			must(t, s.Delete(ctx, "c"))
			size(52)
			must(t, s.Delete(ctx, "none"))
			if err := s.Set(ctx, "c", nil); !errors.Is(err, ErrTooLarge) {
				t.Errorf("error %v", err)
			}
			must(t, s.Delete(ctx, "é"))
			must(t, s.Set(ctx, "c", nil))
			size(1)
		})
	}
	_, err := Open(t.Context(), Config{Dir: t.TempDir(), MaxState: -1})
	is(t, err, ErrInvalid)
}

// A member that applied the log of others, and one that was sent a state, know its size.
func TestSizeAfterARebuild(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(c *Config) { c.segment = 16 << 10 })
	for i := range 40 {
		must(t, c[0].s.Set(ctxFor(t, patience), fmt.Sprint("k", i%7), make([]byte, 100*i)))
	}
	m := newMember(t, c[0].conf.Addr)
	m.conf.Memory = -1
	must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	m.start()
	c = append(c, m)
	c.awaitVoters(t, 2)
	c.awaitEqual(t)
	want := int64(7 * 2)
	for i := 33; i < 40; i++ {
		want += int64(100 * i)
	}
	for _, m := range c {
		if got := m.s.Status().Size; got != want {
			t.Errorf("%s says %d, want %d", m.conf.Addr, got, want)
		}
	}
	f := c.follower(t)
	f.s.distrust(errForeign)
	eventually(t, patience, "a rebuilt state", f.s.Err)
	if got := f.s.Status().Size; got != want {
		t.Errorf("after a rebuild %d, want %d", got, want)
	}
}
