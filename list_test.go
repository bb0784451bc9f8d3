package quorate

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

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
		rows = append(rows, k.key+"="+string(k.value))
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
				if err := tx.set(k, row{[]byte(changed[k]), tx.meta.revision, tx.meta.revision}); err != nil {
					t.Fatal(err)
				}
			}
			for _, k := range gone {
				if err := tx.delete(k, tx.meta.revision+1); err != nil {
					t.Fatal(err)
				}
				tx.meta.revision = uint64(revision + len(tx.past))
			}
			if err := tx.commit(); err != nil {
				t.Fatal(err)
			}
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
				got = append(got, k.key+"="+string(k.value))
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
