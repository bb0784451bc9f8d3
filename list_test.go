package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// model is what a span should give: of a plain map, sorted.
func (sp span) model(rows map[string]string) []string {
	keys := slices.SortedFunc(maps.Keys(rows), strings.Compare)
	keys = slices.DeleteFunc(keys, func(k string) bool {
		return !strings.HasPrefix(k, sp.prefix) || sp.hasFrom && !sp.reverse && k < sp.from || sp.hasFrom && sp.reverse && k > sp.from
	})
	if sp.reverse {
		slices.Reverse(keys)
	}
	if sp.limit >= 0 {
		keys = keys[:min(sp.limit, len(keys))]
	}
	return keys
}

// rest takes what is left of a listing, and returns "key=value" of each row.
func rest(t testing.TB, l *listing) (rows []string) {
	t.Helper()
	for {
		k, more, err := l.next()
		must(t, err)
		if !more {
			return rows
		}
		rows = append(rows, k.key+"="+k.value)
	}
}

func beginListing(t testing.TB, s *store, sp span) *listing {
	t.Helper()
	l, err := s.list(t.Context(), sp)
	must(t, err)
	t.Cleanup(l.close)
	return l
}

// Keys are of few bytes, among them those at the ends of UTF-8's ranges, so that prefixes meet them.
func TestListingIsTheSortedMap(t *testing.T) {
	t.Parallel()
	stores := []*store{newTestStore(t, testBudget), newTestStore(t, -1)}
	alphabet := []rune("\x01ab\x7f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff")
	key := rapid.StringOfN(rapid.SampledFrom(alphabet), 1, 4, -1)
	bound := rapid.OneOf(rapid.Just(""), key, rapid.Map(key, func(k string) string { return k + "\x00" }), rapid.Just("\xff"))
	rows := make(map[string]string)
	rapid.Check(t, func(t *rapid.T) {
		changed := rapid.MapOfN(key, rapid.StringN(0, 3, -1), 0, 60).Draw(t, "set")
		gone := rapid.SliceOfN(key, 0, 20).Draw(t, "deleted")
		var opened []*listing
		sp := span{limit: rapid.SampledFrom([]int{-1, -1, 0, 1, 3, listPageRows, 1000}).Draw(t, "limit"),
			reverse: rapid.Bool().Draw(t, "reverse"), hasFrom: rapid.Bool().Draw(t, "hasFrom"), from: bound.Draw(t, "from"),
			prefix: rapid.OneOf(rapid.Just(""), rapid.StringOfN(rapid.SampledFrom(alphabet), 1, 2, -1)).Draw(t, "prefix")}
		want := []string{}
		for _, k := range sp.model(rows) {
			want = append(want, k+"="+rows[k])
		}
		for _, s := range stores {
			l, err := s.list(context.Background(), sp)
			if err != nil {
				t.Fatal(err)
			}
			opened = append(opened, l)
			tx, err := s.begin()
			if err != nil {
				t.Fatal(err)
			}
			revision := int(tx.meta.revision)
			for _, k := range slices.Sorted(maps.Keys(changed)) {
				tx.meta.revision++
				if err := tx.set(k, row{changed[k], tx.meta.revision, tx.meta.revision}); err != nil {
					t.Fatal(err)
				}
			}
			for _, k := range gone {
				if err := tx.delete(k, tx.meta.revision+1); err != nil {
					t.Fatal(err)
				}
				tx.meta.revision = uint64(revision + len(tx.past))
			}
			tx.commit()
		}
		maps.Copy(rows, changed)
		maps.DeleteFunc(rows, func(k, _ string) bool { return slices.Contains(gone, k) })
		for i, l := range opened { // the changes came after them
			var got []string
			for {
				k, more, err := l.next()
				if err != nil {
					t.Fatal(err)
				}
				if !more {
					break
				}
				got = append(got, k.key+"="+k.value)
			}
			l.close()
			if !slices.Equal(got, want) {
				t.Fatalf("store %d: %+v gives %q, want %q", i, sp, got, want)
			}
		}
	})
	for i, s := range stores {
		if n := len(s.openHolds()); n != 0 {
			t.Errorf("store %d: %d listings are still open", i, n)
		}
	}
}

// listStores runs f with the rows in memory and in SQLite. Rows are long enough, and many enough, for a list of several pages.
func listStores(t *testing.T, f func(t *testing.T, s *store)) {
	for name, budget := range map[string]int64{"memory": testBudget, "sqlite": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, newTestStore(t, budget))
		})
	}
}

func wantHeld(t testing.TB, s *store, listings, slots int) {
	t.Helper()
	if held, taken := len(s.openHolds()), len(s.lists); held != listings || taken != slots {
		t.Fatalf("%d listings hold something and %d slots are taken, want %d and %d", held, taken, listings, slots)
	}
	for _, h := range s.openHolds() {
		if l := h.(*listing); l.pinned() != (slots > 0) {
			t.Fatalf("pinned is %v", l.pinned())
		}
	}
	if got, want := len(s.readers), cap(s.readers); got != want {
		t.Fatalf("%d of %d readers are in the pool", got, want)
	}
}

// Only what is longer than a page holds anything, and only until its last page is read, or until it is closed.
func TestListingHoldsNoLongerThanItMust(t *testing.T) {
	t.Parallel()
	listStores(t, func(t *testing.T, s *store) {
		fill(t, s, 3*listPageRows, 10)
		slots := 0
		if !s.memory.whole() {
			slots = 1
		}
		short := beginListing(t, s, span{limit: listPageRows - 1})
		wantHeld(t, s, 0, 0)
		if got := len(rest(t, short)); got != listPageRows-1 {
			t.Fatalf("%d rows", got)
		}
		long := beginListing(t, s, span{limit: -1})
		wantHeld(t, s, 1, slots)
		if got := len(rest(t, long)); got != 3*listPageRows {
			t.Fatalf("%d rows", got)
		}
		wantHeld(t, s, 0, 0)
		if _, more, err := long.next(); more || err != nil {
			t.Fatalf("behind the end: %v, %v", more, err)
		}
		left := beginListing(t, s, span{limit: -1})
		for range listPageRows + 1 {
			left.next()
		}
		wantHeld(t, s, 1, slots)
		left.close()
		wantHeld(t, s, 0, 0)

		for range 2 { // few rows are a long list too, if their values are large
			apply(t, s, func(tx *storeTx) {
				setTx(t, tx, "large/1", make([]byte, listPageBytes))
				setTx(t, tx, "large/2", nil)
			})
			large := beginListing(t, s, span{prefix: "large/", limit: -1})
			wantHeld(t, s, 1, slots)
			large.close()
		}
	})
}

// Every commit sets a and z, and rows between them, to its revision; a list of all shows one commit.
func TestListingIsOfOneMoment(t *testing.T) {
	t.Parallel()
	listStores(t, func(t *testing.T, s *store) {
		write := func() {
			apply(t, s, func(tx *storeTx) {
				value := []byte(fmt.Sprint(tx.meta.revision + 12))
				setTx(t, tx, "a", value)
				for i := range 10 {
					setTx(t, tx, fmt.Sprintf("k%03d", (int(tx.meta.revision)+i*41)%400), value)
				}
				setTx(t, tx, "z", value)
			})
		}
		for range 100 {
			write()
		}
		stop := make(chan struct{})
		var writing sync.WaitGroup
		defer writing.Wait()
		defer close(stop)
		writing.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					write()
				}
			}
		})
		for i := range 150 {
			l := beginListing(t, s, span{limit: -1, reverse: i%2 == 1})
			newest, rows := uint64(0), 0
			want := fmt.Sprint(l.revision)
			for {
				k, more, err := l.next()
				must(t, err)
				if !more {
					break
				}
				rows++
				newest = max(newest, k.version)
				if (k.key == "a" || k.key == "z") && k.value != want {
					t.Fatalf("%s is %s, and the list of revision %s", k.key, k.value, want)
				}
			}
			if newest != l.revision || rows < listPageRows {
				t.Fatalf("%d rows up to version %d at revision %d", rows, newest, l.revision)
			}
		}
	})
}

// The rest of a listing moves into a file page by page, while its consumer goes on, and more is written.
func TestListingGoesOnFromAFile(t *testing.T) {
	t.Parallel()
	for _, reverse := range []bool{false, true} {
		s := newTestStore(t, -1)
		fill(t, s, 20*listPageRows, 30)
		put(t, s, "key/0000300", strings.Repeat("\x00x", listPageBytes))
		put(t, s, "key/0000301", "")
		want := rest(t, beginListing(t, s, span{limit: -1, reverse: reverse}))
		l := beginListing(t, s, span{limit: -1, reverse: reverse})
		var got []string
		take := func(n int) {
			for range n {
				k, more, err := l.next()
				if !more || err != nil {
					t.Fatalf("after %d rows: %v, %v", len(got), more, err)
				}
				got = append(got, k.key+"="+k.value)
			}
		}
		spool := func(pages int) (more bool) {
			for range pages {
				more = l.spool()
			}
			return more
		}
		take(3)
		spool(3)
		take(2 * listPageRows)
		spool(1)
		take(5 * listPageRows) // past the end of the file
		spool(1)
		fill(t, s, 20*listPageRows, 31) // all of them anew
		take(1)
		if left, err := filepath.Glob(s.path + ".copy-*"); len(left) > 0 || err != nil {
			t.Errorf("the file has a name: %v", left)
		}
		for l.spool() {
		}
		file := l.file
		if l.pinned() || l.c != nil || file == nil || len(s.lists) != 1 {
			t.Fatalf("the transaction lives on, or the file does not, or the slot is free: %v, %v, %d", l.c, l.file, len(s.lists))
		}
		got = append(got, rest(t, l)...)
		if !slices.Equal(got, want) {
			t.Fatalf("%d rows, want %d, or others", len(got), len(want))
		}
		wantHeld(t, s, 0, 0)
		if err := file.Close(); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("the file is still open: %v", err)
		}
	}
}

func TestListingNoticesADamagedFile(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	fill(t, s, 3*listPageRows, 30)
	for at := int64(2); at < 200; at += 37 {
		l := beginListing(t, s, span{limit: -1})
		for l.spool() {
		}
		var b [1]byte
		_, err := l.file.ReadAt(b[:], at)
		must(t, err)
		_, err = l.file.WriteAt([]byte{b[0] ^ 0x40}, at)
		must(t, err)
		n := 0
		for err == nil {
			var more bool
			if _, more, err = l.next(); err == nil && !more {
				t.Fatalf("byte %d of the file was changed, and nobody noticed", at)
			}
			n++
		}
		if errors.Is(err, ErrCorrupt) || n != listPageRows+1 {
			t.Fatalf("after %d rows: %v", n, err)
		}
		wantHeld(t, s, 0, 0)
	}
}

// A consumer that has stopped keeps neither the WAL nor the writer, and finds what it was promised.
func TestSlowListingLetsGoOfTheWAL(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	keepUp(t, s)
	write := func(i int) {
		value := bytes.Repeat([]byte{byte(i)}, 64<<10) // SQLite writes no page that stays the same
		apply(t, s, func(tx *storeTx) {
			for k := range 16 {
				setTx(t, tx, fmt.Sprintf("key%03d", (i*16+k)%64), value)
			}
		})
	}
	for i := range 4 {
		write(i)
	}
	l := beginListing(t, s, span{limit: -1})
	if _, more, err := l.next(); !more || err != nil {
		t.Fatal(more, err)
	}
	largest := int64(0)
	steadily := func(until func(i int) bool) {
		for i := 4; !until(i); i++ {
			write(i)
			largest = max(largest, s.walSize())
		}
	}
	steadily(func(i int) bool { return i > 200 || s.walSize()-l.before > pinLimit })
	soon(t, "the listing lets go", func() bool { return !l.pinned() })
	steadily(func(i int) bool { return i > 64 })
	if largest < pinLimit || largest > 64<<20 {
		t.Errorf("the WAL grew to %d bytes", largest)
	}
	n := 1
	for {
		k, more, err := l.next()
		must(t, err)
		if !more {
			break
		}
		n++
		if k.version > l.revision {
			t.Fatalf("%s of revision %d in a list of revision %d", k.key, k.version, l.revision)
		}
	}
	if n != 64 {
		t.Errorf("%d rows", n)
	}
}

// With a state that is large, or many lists of it, there is no time to put everything aside: who takes nothing gives way.
func TestIdleListingGivesWay(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	fill(t, s, 1000, 1000)
	idle, lively := beginListing(t, s, span{limit: -1}), beginListing(t, s, span{limit: -1})
	for _, l := range []*listing{idle, lively} {
		l.next()
		l.tend(0)
	}
	for i := 0; idle.grown() <= pinMost; i++ {
		value := bytes.Repeat([]byte{byte(i)}, 1<<20)
		apply(t, s, func(tx *storeTx) { setTx(t, tx, "large", value) })
	}
	lively.next()
	for _, l := range []*listing{idle, lively} {
		l.tend(0)
		if l.pinned() {
			t.Error("the WAL is still kept")
		}
	}
	if _, _, err := idle.next(); !errors.Is(err, ErrSlow) {
		t.Errorf("who took nothing gets %v", err)
	}
	n := 2
	for {
		_, more, err := lively.next()
		must(t, err)
		if !more {
			break
		}
		n++
	}
	if n != 1000 {
		t.Errorf("who took something gets %d rows", n)
	}
}

func TestIdleListingEnds(t *testing.T) {
	t.Parallel()
	listStores(t, func(t *testing.T, s *store) {
		fill(t, s, 3*listPageRows, 10)
		short := beginListing(t, s, span{limit: 10})
		for _, spooled := range []bool{false, true} {
			l, lively := beginListing(t, s, span{limit: -1}), beginListing(t, s, span{limit: -1})
			l.next()
			if spooled && l.c != nil {
				for l.spool() {
				}
			}
			for range slowLimit / time.Second {
				lively.next()
				l.tend(time.Second)
				lively.tend(time.Second)
			}
			if _, more, err := l.next(); !more || err != nil {
				t.Fatalf("after a minute, less a moment: %v, %v", more, err)
			}
			for range slowLimit/time.Second + 1 {
				l.tend(time.Second)
				lively.tend(time.Second)
				lively.next()
			}
			for range 2 {
				if k, more, err := l.next(); !errors.Is(err, ErrSlow) || more || k.key != "" {
					t.Fatalf("after a minute: %v, %v", more, err)
				}
			}
			if got := len(rest(t, lively)); got < listPageRows {
				t.Fatalf("%d rows left for a consumer that takes one each second", got)
			}
			wantHeld(t, s, 0, 0)
		}
		if got := len(rest(t, short)); got != 10 {
			t.Fatalf("a short list holds nothing, and has %d rows", got)
		}
	})
}

// However many lists are begun at once, so many have a connection; the next one waits for its context, and short ones pass.
func TestListingsAtOnceAreBounded(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	fill(t, s, 2*listPageRows, 10)
	var open []*listing
	for range maxLists {
		open = append(open, beginListing(t, s, span{limit: -1}))
	}
	wantHeld(t, s, maxLists, maxLists)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("no more patience"))
	if _, err := s.list(ctx, span{limit: -1}); err == nil || !strings.Contains(err.Error(), "no more patience") {
		t.Fatalf("one too many: %v", err)
	}
	if got := len(rest(t, beginListing(t, s, span{limit: 10}))); got != 10 {
		t.Fatalf("%d rows of a short list", got)
	}
	waited := make(chan int)
	go func() {
		l, err := s.list(t.Context(), span{limit: -1})
		if err != nil {
			t.Error(err)
			waited <- 0
			return
		}
		put(t, s, "later", "")
		waited <- len(rest(t, l))
	}()
	put(t, s, "first", "")
	open[7].close()
	if got := <-waited; got < 2*listPageRows {
		t.Fatalf("%d rows of the list that waited", got)
	}
	for _, l := range open {
		l.close()
	}
	wantHeld(t, s, 0, 0)
}

// The store's close does not wait for consumers, and leaves nothing but the database.
func TestCloseEndsListings(t *testing.T) {
	t.Parallel()
	listStores(t, func(t *testing.T, s *store) {
		fill(t, s, 3*listPageRows, 10)
		short, long, inFile := beginListing(t, s, span{limit: 10}), beginListing(t, s, span{limit: -1}), beginListing(t, s, span{limit: -1})
		for _, l := range []*listing{short, long, inFile} {
			if _, more, err := l.next(); !more || err != nil {
				t.Fatal(more, err)
			}
		}
		inFile.spool()
		must(t, s.close())
		for i, l := range []*listing{short, long, inFile} {
			if _, more, err := l.next(); more || !errors.Is(err, ErrClosed) {
				t.Errorf("listing %d: %v, %v", i, more, err)
			}
		}
		if _, err := s.list(t.Context(), span{limit: 1}); !errors.Is(err, ErrClosed) {
			t.Errorf("a new one: %v", err)
		}
		wantOnly(t, filepath.Dir(s.path), "snap")
	})
}

// An install replaces the rows under a listing that is open, in memory or in a transaction; it keeps its own.
func TestListingOutlivesAnInstall(t *testing.T) {
	t.Parallel()
	other := newTestStore(t, testBudget)
	put(t, other, "other", "1")
	listStores(t, func(t *testing.T, s *store) {
		fill(t, s, 5*listPageRows, 30)
		want := rest(t, beginListing(t, s, span{limit: -1}))
		l := beginListing(t, s, span{limit: -1})
		path := filepath.Join(t.TempDir(), "snap.incoming")
		c, err := other.copy(t.Context())
		must(t, err)
		defer c.Close()
		m, err := receive(path, c)
		must(t, err)
		must(t, s.install(path, m.applied, m.term, nil, 0))
		if got := rest(t, l); !slices.Equal(got, want) {
			t.Fatalf("%d rows, want %d, or others", len(got), len(want))
		}
		if got := rest(t, beginListing(t, s, span{limit: -1})); !slices.Equal(got, []string{"other=1"}) {
			t.Fatalf("afterwards: %v", got)
		}
	})
}

func TestListingDoesNotGrowWithTheResult(t *testing.T) {
	const rows, size = 8000, 1000
	s := newTestStore(t, -1)
	value := bytes.Repeat([]byte("v"), size)
	apply(t, s, func(tx *storeTx) {
		for i := range rows {
			setTx(t, tx, fmt.Sprintf("key/%07d", i), value)
		}
	})
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	l := beginListing(t, s, span{limit: -1})
	for i := range rows {
		if _, more, err := l.next(); !more || err != nil {
			t.Fatal(i, more, err)
		}
		if i%(rows/4) == rows/8 {
			if grown := heap() - before; grown > rows*size/10 {
				t.Errorf("after %d rows the heap has grown by %d bytes", i, grown)
			}
		}
	}
}

// A damaged row is no answer, on the first page or behind it, and leaves nothing open.
func TestListingOfADamagedRow(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	fill(t, s, 3*listPageRows, 10)
	for _, i := range []int{2 * listPageRows, 1} {
		shell(t, s.path, fmt.Sprintf("UPDATE kv SET value = 'damaged' WHERE key = 'key/%07d'", i))
		l, err := s.list(t.Context(), span{limit: -1})
		for more := true; err == nil; {
			if _, more, err = l.next(); err == nil && !more {
				t.Fatalf("row %d is damaged, and the list is complete", i)
			}
		}
		if !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		wantHeld(t, s, 0, 0)
	}
}

// collect ranges over a list: "key=value" of each entry, and the error that it ended with.
func collect(t testing.TB, list iter.Seq2[Entry, error]) (got []string, err error) {
	t.Helper()
	for e, failed := range list {
		if err != nil {
			t.Fatalf("after the error %v: %+v, %v", err, e, failed)
		}
		if err = failed; err != nil {
			if !equalEntry(e, Entry{}) {
				t.Fatalf("an error with %+v: %v", e, err)
			}
			continue
		}
		got = append(got, e.Key+"="+string(e.Value))
	}
	return got, err
}

func TestList(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	for _, key := range []string{"a/2", "a", "a/1", "b", "a/3", "a/10", "a/1"} {
		must(t, s.Set(ctx, key, []byte("x")))
	}
	must(t, s.Set(ctx, "a/2", nil))
	lists := map[string]func(context.Context, string, ...ListOption) iter.Seq2[Entry, error]{"List": s.List, "Local.List": s.Local().List}
	for name, list := range lists {
		for _, c := range []struct {
			prefix string
			opts   []ListOption
			want   string
		}{
			{"a/", nil, "a/1=x a/10=x a/2= a/3=x"},
			{"", nil, "a=x a/1=x a/10=x a/2= a/3=x b=x"},
			{"c", nil, ""},
			{"a/", []ListOption{From("a/2")}, "a/2= a/3=x"},
			{"a/", []ListOption{From("a/1\x00"), Limit(2)}, "a/10=x a/2="},
			{"a/", []ListOption{From("0")}, "a/1=x a/10=x a/2= a/3=x"},
			{"a/", []ListOption{From("b")}, ""},
			{"a/", []ListOption{Reverse(), Limit(2)}, "a/3=x a/2="},
			{"a/", []ListOption{Reverse(), From("a/2")}, "a/2= a/10=x a/1=x"},
			{"a/", []ListOption{Reverse(), From("a/19"), Limit(1)}, "a/10=x"},
			{"a/", []ListOption{Reverse(), From("b")}, "a/3=x a/2= a/10=x a/1=x"},
			{"", []ListOption{Reverse(), From("")}, ""},
			{"", []ListOption{Limit(0)}, ""},
			{"", []ListOption{Limit(-1), Limit(1), From("b"), From("a/3")}, "a/3=x"},
		} {
			got, err := collect(t, list(ctx, c.prefix, c.opts...))
			if err != nil || strings.Join(got, " ") != c.want {
				t.Errorf("%s %q %v: %q, %v; want %q", name, c.prefix, c.opts, got, err, c.want)
			}
		}
		for prefix, want := range map[string]error{"a\x00": ErrInvalid, "\xff": ErrInvalid, strings.Repeat("a", maxKey+1): ErrTooLarge} {
			if got, err := collect(t, list(ctx, prefix)); len(got) > 0 || !errors.Is(err, want) {
				t.Errorf("%s %.9q: %q, %v; want %v", name, prefix, got, err, want)
			}
		}
		if got, err := collect(t, list(ctx, "", Limit(-1))); len(got) > 0 || !errors.Is(err, ErrInvalid) {
			t.Errorf("%s of -1: %q, %v", name, got, err)
		}
		for e, err := range list(ctx, "a/", Limit(1)) {
			if want := (Entry{Key: "a/1", Value: []byte("x"), Version: 7, Created: 3}); err != nil || !equalEntry(e, want) {
				t.Errorf("%s: %+v, %v; want %+v", name, e, err, want)
			}
			e.Value[0] = 'y' // a copy
		}
		for e, err := range list(ctx, "a/2", Limit(1)) {
			if err != nil || e.Value == nil {
				t.Errorf("%s: %+v, %v; want a value that is not nil", name, e, err)
			}
		}
		again := list(ctx, "new/")
		before, _ := collect(t, again)
		must(t, s.Set(ctx, "new/"+name, nil))
		if after, err := collect(t, again); err != nil || len(after) != len(before)+1 {
			t.Errorf("%s, ranging again: %q, %v", name, after, err)
		}
		must(t, s.Delete(ctx, "new/"+name))
	}
}

// large sets four keys that make a list of several pages.
func large(t testing.TB, s *Service) {
	t.Helper()
	for i := range 4 {
		must(t, s.Set(ctxFor(t, patience), fmt.Sprintf("large/%d", i), make([]byte, listPageBytes)))
	}
}

// Every list shows all of a transaction, wherever its keys are, or nothing.
func TestListShowsTransactionsWhole(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	large(t, s) // between a and z
	stop := make(chan struct{})
	var writing sync.WaitGroup
	defer writing.Wait()
	defer close(stop)
	for w := range 4 {
		writing.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				value := fmt.Append(nil, w, i)
				if _, err := s.Exec(ctxFor(t, patience), Set("a", value), Set("large/2", value), Set("z", value)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	versions := make(map[uint64]bool)
	for len(versions) < 20 {
		var seen []string
		for e, err := range s.List(ctxFor(t, patience), "") {
			must(t, err)
			if len(e.Value) < listPageBytes {
				seen = append(seen, string(e.Value))
				versions[e.Version] = true
			}
		}
		if n := len(slices.Compact(slices.Clone(seen))); n > 1 {
			t.Fatalf("one list has %q", seen)
		}
	}
}

// Whatever ends the loop gives everything back.
func TestLeavingAList(t *testing.T) {
	t.Parallel()
	for _, memory := range []int64{0, -1} {
		s := openSole(t, func(c *Config) { c.Memory = memory })
		large(t, s)
		held := func() {
			t.Helper()
			if len(s.store.openHolds()) != 1 {
				t.Error("nothing is held: not a long list")
			}
		}
		for range s.List(t.Context(), "large/") {
			held()
			break
		}
		func() {
			defer func() { recover() }()
			for range s.Local().List(t.Context(), "large/") {
				held()
				panic("in the body")
			}
		}()
		var left sync.WaitGroup
		left.Go(func() {
			for range s.List(t.Context(), "large/") {
				held()
				runtime.Goexit()
			}
		})
		left.Wait()
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		n := 0
		var ended error
		for _, err := range s.List(ctx, "large/") {
			held()
			n++
			if cancel(errors.New("enough")); err != nil {
				ended = err
			}
		}
		if n != 2 || ended == nil || !strings.Contains(ended.Error(), "enough") {
			t.Errorf("a context that ended in the body: %d steps, %v", n, ended)
		}
		if got, err := collect(t, s.Local().List(ctx, "large/")); len(got) > 0 || err == nil {
			t.Errorf("a context that has ended: %q, %v", got, err)
		}
		wantHeld(t, s.store, 0, 0)

		closed := make(chan error, 1)
		var errs []error
		for _, err := range s.List(t.Context(), "large/") {
			if errs = append(errs, err); len(errs) == 1 {
				held()
				closed <- s.Close()
			}
		}
		if err := <-closed; err != nil || len(errs) != 2 || !errors.Is(errs[1], ErrClosed) {
			t.Errorf("Close in the body: %v, and %v", err, errs)
		}
		wantOnly(t, s.conf.Dir, "id", "snap", "wal")
		for _, list := range []iter.Seq2[Entry, error]{s.List(t.Context(), ""), s.Local().List(t.Context(), "")} {
			if got, err := collect(t, list); len(got) > 0 || !errors.Is(err, ErrClosed) {
				t.Errorf("after Close: %q, %v", got, err)
			}
		}
	}
}

// A body may take longer than Config.Timeout for an entry, but not a minute.
func TestSlowBodyOfAList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, memory := range []int64{0, -1} {
			s, err := Open(t.Context(), Config{Dir: t.TempDir(), Memory: memory, Timeout: time.Second})
			must(t, err)
			large(t, s)
			for wait, want := range map[time.Duration]error{50 * time.Second: nil, 62 * time.Second: ErrSlow} {
				n := 0
				var ended error
				for _, err := range s.List(t.Context(), "large/") {
					if ended = err; err == nil {
						n++
						time.Sleep(wait)
					}
				}
				if !errors.Is(ended, want) || want == nil && n != 4 || want != nil && n != 1 {
					t.Errorf("memory %d, %v for an entry: %d entries, %v", memory, wait, n, ended)
				}
			}
			wantHeld(t, s.store, 0, 0)
			must(t, s.Close())
		}
	})
}

// A list on a follower shows what was acknowledged elsewhere before it began, or ends with an error.
func TestListIsLinearizable(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		for i := range 5 {
			must(t, l.s.Set(t.Context(), fmt.Sprintf("k%d", i), nil))
			if got, err := collect(t, f.s.List(t.Context(), "k")); len(got) != i+1 || err != nil {
				t.Fatalf("after %d writes: %q, %v", i+1, got, err)
			}
		}
		c.obey("partition {L} {F} {G}")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if got, err := collect(t, f.s.List(ctx, "k")); len(got) > 0 || !errors.Is(err, ErrNoLeader) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without a majority: %q, %v", got, err)
		}
		began := time.Now()
		got, err := collect(t, f.s.List(context.Background(), "k"))
		if took := time.Since(began); len(got) > 0 || !errors.Is(err, ErrNoLeader) || took > f.s.conf.Timeout+time.Second {
			t.Errorf("without a deadline: %q, %v after %v", got, err, took)
		}
		if got, err := collect(t, f.s.Local().List(t.Context(), "k")); len(got) != 5 || err != nil {
			t.Errorf("its own copy: %q, %v", got, err)
		}
		c.obey("heal")
	})
}

func BenchmarkList(b *testing.B) {
	for name, budget := range map[string]int64{"memory": testBudget, "sqlite": -1} {
		s := newTestStore(b, budget)
		fill(b, s, 100_000, 256)
		l, err := s.list(b.Context(), span{limit: 1})
		must(b, err)
		l.close()
		s.memory.grow() // as this first list has asked for
		for _, n := range []int{10, 1000} {
			b.Run(fmt.Sprintf("%s/entries=%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					l, err := s.list(b.Context(), span{from: fmt.Sprintf("key/%07d", i*7919%90_000), hasFrom: true, limit: n})
					if err != nil {
						b.Fatal(err)
					}
					for range n {
						if _, more, err := l.next(); !more || err != nil {
							b.Fatal(more, err)
						}
					}
					l.close()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/entry")
			})
		}
	}
}

// A listing that ends before it has begun keeps neither its slot nor a reader.
func TestListingThatDoesNotBegin(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, -1)
	fill(t, s, 2*listPageRows, 10)
	for range cap(s.readers) { // the listing's will be the first
		if c := <-s.readers; c != nil {
			c.close()
		}
		s.readers <- nil
	}
	for range maxLists {
		s.lists <- struct{}{}
	}
	defer func() {
		for len(s.lists) > 0 {
			<-s.lists
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := s.list(ctx, span{limit: -1})
		ended <- err
	}()
	soon(t, "the first page is read", func() bool { c := <-s.readers; s.readers <- c; return c != nil })
	s.placing.Store(true) // from here on it waits for the file
	<-s.lists
	soon(t, "it has the slot", func() bool { return len(s.lists) == maxLists })
	cancel()
	wantIs(t, "list", <-ended, context.Canceled)
	s.placing.Store(false)
	if len(s.lists) != maxLists-1 || len(s.readers) != cap(s.readers) || len(s.openHolds()) != 0 {
		t.Errorf("%d slots, %d of %d readers, %d holds", len(s.lists), len(s.readers), cap(s.readers), len(s.openHolds()))
	}
}
