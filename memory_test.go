package quorate

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestFreshStoreIsWhole(t *testing.T) {
	s := newTestStore(t, testBudget)
	if whole, dropped := s.memoryState(); !whole || dropped {
		t.Fatalf("whole %v, dropped %v", whole, dropped)
	}
	if ok, err := s.verified(); !ok || err != nil {
		t.Fatalf("verified = %v, %v", ok, err)
	}
}

func TestReadsBeforeTheLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snap")
	s := openTestStore(t, path, testBudget)
	put(t, s, "a", "1")
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	s = openTestStore(t, path, testBudget)
	if whole, _ := s.memoryState(); whole {
		t.Fatal("whole without a load")
	}
	wantValue(t, s, "a", "1")
	put(t, s, "b", "2")
	wantValue(t, s, "b", "2")
	keepUp(t, s)
	waitVerified(t, s)
	if whole, _ := s.memoryState(); !whole {
		t.Fatal("not whole after the load")
	}
	wantValue(t, s, "b", "2")
}

func TestMemoryOverBudgetIsDropped(t *testing.T) {
	var said safeBuffer
	path := filepath.Join(t.TempDir(), "snap")
	open := func(budget int64) *store {
		s, err := openStore(storeOptions{path: path, memory: budget, log: slog.New(slog.NewTextHandler(&said, nil))})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.close() })
		return s
	}
	s := open(20_000)
	fill(t, s, 50, 100)
	if whole, dropped := s.memoryState(); !whole || dropped {
		t.Fatalf("below the budget: whole %v, dropped %v", whole, dropped)
	}
	fill(t, s, 200, 100)
	put(t, s, "a", "1")
	if whole, dropped := s.memoryState(); whole || !dropped {
		t.Fatalf("over the budget: whole %v, dropped %v", whole, dropped)
	}
	wantValue(t, s, "a", "1")
	apply(t, s, func(tx *storeTx) {
		for i := range 200 {
			tx.delete(fmt.Sprintf("key/%07d", i), 1)
		}
	})
	if _, dropped := s.memoryState(); !dropped {
		t.Fatal("not dropped any more")
	}
	if got := strings.Count(said.String(), "do not fit"); got != 1 {
		t.Fatalf("said %d times: %s", got, said.String())
	}
	fill(t, s, 200, 100)
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	s = open(20_000) // too large from the start: verified all the same
	keepUp(t, s)
	waitVerified(t, s)
	if whole, dropped := s.memoryState(); whole || !dropped {
		t.Fatalf("opened: whole %v, dropped %v", whole, dropped)
	}
}

func TestMemoryGetAllocatesNothing(t *testing.T) {
	s := newTestStore(t, testBudget)
	fill(t, s, 100, 100)
	if n := testing.AllocsPerRun(100, func() { s.memory.item("key/0000042") }); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

// Scan chunks and commits in every order end in the same rows and sums as a plain map.
func TestLoadMergesCommits(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		budget := rapid.SampledFrom([]int64{-1, 600, testBudget}).Draw(rt, "budget")
		key := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g", "h"})
		m := newMemory(budget, slog.New(slog.DiscardHandler))
		rows := map[string]*item{} // the committed state
		next := uint64(0)
		commit := func() {
			changed := map[string]change{}
			for range rapid.IntRange(1, 4).Draw(rt, "effects") {
				k := key.Draw(rt, "key")
				c, ok := changed[k]
				if !ok {
					c = change{key: k, was: rows[k]}
				}
				c.now = nil
				if rapid.Bool().Draw(rt, "set") {
					next++
					c.now = &item{row: row{value: "v", version: next}, hash: next * 0x9E3779B97F4A7C15}
				}
				changed[k] = c
			}
			var changes []change
			for k, c := range changed {
				changes = append(changes, c)
				if c.now == nil {
					delete(rows, k)
				} else {
					rows[k] = c.now
				}
			}
			m.publish(changes, 0)
		}
		for range rapid.IntRange(0, 5).Draw(rt, "before") {
			commit()
		}
		for {
			load, cursor := m.beginChunk()
			var chunk []keyed
			last := true
			size := rapid.IntRange(1, 3).Draw(rt, "chunk")
			for _, k := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
				if it := rows[k]; it != nil && k > cursor {
					if len(chunk) == size {
						last = false
						break
					}
					chunk = append(chunk, keyed{k, it})
				}
			}
			for range rapid.IntRange(0, 3).Draw(rt, "meanwhile") {
				commit()
			}
			if rapid.IntRange(0, 9).Draw(rt, "failure") == 0 {
				m.cancelChunk(load)
				continue
			}
			m.endChunk(load, chunk, last)
			if last {
				break
			}
			for range rapid.IntRange(0, 2).Draw(rt, "between") {
				commit()
			}
		}
		m.trust(0)
		commit()
		var sum uint64
		for _, it := range rows {
			sum += it.hash
		}
		if got, keys, ended := m.covered(); got != sum || keys != uint64(len(rows)) || !ended {
			rt.Fatalf("covered sum %x of %d rows, %v; want %x of %d", got, keys, ended, sum, len(rows))
		}
		if m.whole() != (budget == testBudget) && !(budget == 600 && !m.dropped()) {
			rt.Fatalf("budget %d: whole %v, dropped %v", budget, m.whole(), m.dropped())
		}
		if !m.whole() {
			return
		}
		size := int64(0)
		for _, k := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
			it, _ := m.item(k)
			if it != rows[k] {
				rt.Fatalf("%s is %v, want %v", k, it, rows[k])
			}
			if it != nil {
				size += itemSize(k, it)
			}
		}
		if size != m.size {
			rt.Fatalf("size %d, want %d", m.size, size)
		}
	})
}

// The same through SQLite: a real scan of a file under real commits, against a plain map.
func TestLoadUnderWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snap")
	s := openTestStore(t, path, testBudget)
	fill(t, s, 20_000, 20)
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	s = openTestStore(t, path, testBudget)
	want := map[string]string{}
	var loading sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	loading.Go(func() { s.maintain(ctx) })
	defer loading.Wait()
	defer cancel()
	for n, after := 0, 0; after < 20; n++ {
		apply(t, s, func(tx *storeTx) {
			for i := range 20 {
				key := fmt.Sprintf("key/%07d", (n*7919+i*1009)%25_000)
				if i%3 == 0 {
					if err := tx.delete(key, 1); err != nil {
						t.Fatal(err)
					}
					want[key] = ""
				} else {
					want[key] = fmt.Sprint(n)
					setTx(t, tx, key, []byte(want[key]))
				}
			}
		})
		if ok, err := s.verified(); err != nil {
			t.Fatal(err)
		} else if ok {
			after++
		}
	}
	if whole, _ := s.memoryState(); !whole {
		t.Fatal("not whole")
	}
	for key, value := range want {
		r, ok, err := s.get(key)
		if err != nil || ok != (value != "") || r.value != value {
			t.Fatalf("%s = %q, %v, %v; want %q", key, r.value, ok, err, value)
		}
	}
	if _, err := receiveCopy(t, s); err != nil {
		t.Fatal(err)
	}
}

// The tree follows the map behind the writers' backs, and lists that begin at any moment of it show their revision. A large one is
// grown while changes go on.
func TestOrderFollows(t *testing.T) {
	for _, keys := range []int{500, lateMany + 500} {
		t.Run(fmt.Sprint(keys), func(t *testing.T) { testOrderFollows(t, keys) })
	}
}

func testOrderFollows(t *testing.T, keys int) {
	m := newMemory(testBudget, slog.New(slog.DiscardHandler))
	m.empty()
	at := func(i int) string { return fmt.Sprintf("key/%04d", i) }
	state := make([]*item, keys) // what the writer has published
	revision := uint64(0)
	set := func(i int) {
		revision++
		c := change{key: at(i), was: state[i]}
		if revision%3 != 0 || c.was == nil {
			c.now = &item{row: row{value: "v", version: revision}}
		}
		state[i] = c.now
		m.publish([]change{c}, revision)
	}
	for i := range keys {
		set(i)
	}
	var wg sync.WaitGroup
	ended := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-ended:
				return
			default:
				m.grow()
				m.order()
			}
		}
	})
	defer wg.Wait()
	defer close(ended)
	asked := false
	for lists := 0; lists < 100_000/keys; {
		set(int(revision*revision) % keys)
		if revision%50 != 0 {
			continue
		}
		p, snapshot, got, ok := m.list(keyRange{high: "\xff", left: -1})
		if first := !asked; keys > lateMany && lists == 0 {
			if asked = true; ok && first {
				t.Fatal("the first list has waited for a tree of many keys")
			}
			if !ok {
				continue
			}
		}
		lists++
		if !ok || got != revision {
			t.Fatalf("a list at revision %d says %d, %v", revision, got, ok)
		}
		rows := p.rows
		if snapshot != nil {
			rows = nil
			snapshot.Scan(func(key string, it *item) bool { rows = append(rows, keyed{key, it}); return true })
		}
		n := 0
		for j, it := range state {
			if it == nil {
				continue
			}
			if n >= len(rows) || rows[n].key != at(j) || rows[n].item != it {
				t.Fatalf("at revision %d the list lacks version %d of %s", revision, it.version, at(j))
			}
			n++
		}
		if n != len(rows) {
			t.Fatalf("at revision %d the list has %d rows, want %d", revision, len(rows), n)
		}
	}
}

// Who does not list pays for no tree; who does finds one before long, whatever the number of keys.
func TestTreeOnDemand(t *testing.T) {
	s := newTestStore(t, 1<<30)
	const keys = 2 * lateMany
	set := func(from, to int) {
		apply(t, s, func(tx *storeTx) {
			for i := from; i < to; i++ {
				setTx(t, tx, fmt.Sprintf("%06d", i), []byte("v"))
			}
		})
	}
	set(0, keys)
	tree := func() bool {
		s.memory.mu.RLock()
		defer s.memory.mu.RUnlock()
		return s.memory.tree != nil
	}
	if tree() {
		t.Error("a tree, and nobody has listed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { s.memory.orderWhenDue(ctx) })
	for i := 0; !tree(); i++ {
		if i == 1000 {
			t.Fatal("no tree")
		}
		set(keys+i, keys+i+1)
		if n := len(rest(t, beginListing(t, s, span{limit: -1}))); n != keys+i+1 {
			t.Fatalf("%d entries of %d", n, keys+i+1)
		}
	}
}

// Without a list nobody waits for long: the tree follows when it is some thousand keys behind.
func TestOrderIsDue(t *testing.T) {
	m := newMemory(1<<30, slog.New(slog.DiscardHandler))
	m.empty()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { m.orderWhenDue(ctx) })
	if _, _, _, ok := m.list(keyRange{high: "\xff", left: -1}); !ok {
		t.Error("no tree of nothing")
	}
	for i := range uint64(lateMany) {
		m.publish([]change{{key: fmt.Sprint(i), now: &item{row: row{version: i + 1}}}}, i+1)
	}
	eventually(t, 10*time.Second, "the tree holds all", func() error {
		m.mu.RLock()
		defer m.mu.RUnlock()
		if n := m.tree.Len(); n != lateMany {
			return fmt.Errorf("%d keys of %d", n, lateMany)
		}
		return nil
	})
	cancel()
	wg.Wait()
}
