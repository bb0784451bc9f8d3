//go:build unix

package quorate

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A spectator watches for as long as a test goes on. Wherever its watch ends, it resumes from the Revision of the last event, on
// the same member or another one, as an application would. In the end what it has seen is compared with the table history.
type spectator struct {
	name, prefix string
	resync       bool
	leaves       int           // it leaves the loop by itself within that many changes; 0 = never
	slow         time.Duration // it rests up to that long after an event

	mu    sync.Mutex // guards the fields below
	since uint64
	seen  []Event
	lost  int // watches that ended with a CompactedError
}

// A watching is Watch on some member.
type watching func(ctx context.Context, prefix string, since uint64, resync bool) iter.Seq2[Event, error]

func watchOn(s *Service) watching {
	return func(ctx context.Context, prefix string, since uint64, resync bool) iter.Seq2[Event, error] {
		if resync {
			return s.Watch(ctx, prefix, since, Resync())
		}
		return s.Watch(ctx, prefix, since)
	}
}

// follow watches until ctx ends, and rests only until busy does. on gives the member for the next watch, nil if it is down.
func (w *spectator) follow(ctx, busy context.Context, t *testing.T, rnd *rand.Rand, on func() watching) {
	for ctx.Err() == nil {
		if watch := on(); watch != nil {
			w.watch(ctx, busy, t, rnd, watch)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (w *spectator) watch(ctx, busy context.Context, t *testing.T, rnd *rand.Rand, on watching) {
	left := -1
	if w.leaves > 0 {
		left = 1 + rnd.IntN(w.leaves)
	}
	since, first := w.at(), true
	for e, err := range on(ctx, w.prefix, since, w.resync) {
		var gone *CompactedError
		switch {
		case errors.As(err, &gone) && !w.resync:
			if gone.Oldest <= w.at() {
				t.Errorf("%s: at %d: %v", w.name, w.at(), err)
			}
			w.restart()
			return
		case errors.Is(err, ErrCompacted), errors.Is(err, ErrInvalid), errors.Is(err, ErrCorrupt), errors.Is(err, ErrSlow):
			t.Errorf("%s: at %d: %v", w.name, w.at(), err)
			return
		case err != nil:
			return
		case (e.Kind == EventReset) != (since == 0) && (first || e.Kind == EventReset) && !w.resync:
			t.Errorf("%s: since %d the watch has %v", w.name, since, e)
		}
		first = false
		w.take(e)
		if e.Revision != 0 { // in the first part it would perhaps never come to the end
			left--
		}
		if left == 0 {
			return
		}
		if w.slow > 0 {
			select {
			case <-time.After(time.Duration(rnd.Int64N(int64(w.slow)))):
			case <-busy.Done():
			}
		}
	}
}

func (w *spectator) at() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.since
}

func (w *spectator) take(e Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = e.Revision
	w.seen = append(w.seen, e)
}

func (w *spectator) restart() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = 0
	w.lost++
}

func (w *spectator) resets() (n int) {
	for _, e := range w.seen {
		if e.Kind == EventReset {
			n++
		}
	}
	return n
}

// changeOf is the row that an event tells of.
func changeOf(e Event) written {
	r := written{Revision: e.Revision, Created: e.Entry.Created, Previous: e.Previous, Last: e.Last, Key: e.Entry.Key, Deleted: 1}
	if e.Kind == EventSet {
		value := string(e.Entry.Value)
		r.Value, r.Deleted = &value, 0
	}
	return r
}

func (r written) event() Event {
	e := Event{Kind: EventDelete, Revision: r.Revision, Last: r.Last, Entry: Entry{Key: r.Key}, Previous: r.Previous}
	if r.Deleted == 0 {
		e.Kind, e.Entry = EventSet, r.entry()
	}
	return e
}

func (r written) entry() Entry {
	return Entry{Key: r.Key, Value: []byte(*r.Value), Version: r.Revision, Created: r.Created}
}

// verify: the events are the changes, each once and in order, from where the watch began or began anew; what came before that
// are the entries as they were then; and the last change was seen.
func (w *spectator) verify(t *testing.T, rows []written) {
	t.Helper()
	rows = slices.DeleteFunc(slices.Clone(rows), func(r written) bool { return !strings.HasPrefix(r.Key, w.prefix) })
	state := make(map[string]Entry)
	next := 0
	change := func() {
		if r := rows[next]; r.Deleted == 1 {
			delete(state, r.Key)
		} else {
			state[r.Key] = r.entry()
		}
		next++
	}
	var entries []Entry
	anew, at := false, uint64(0)
	for i, e := range w.seen {
		switch {
		case e.Kind == EventReset && e.Revision == 0 && e.Last == 0:
			entries, anew = nil, true
			continue
		case anew && e.Kind == EventSet && e.Revision == 0 && e.Last == 0 && e.Previous == 0:
			entries = append(entries, e.Entry)
			continue
		case anew && e.Kind == EventSynced && e.Revision >= at && e.Last == e.Revision:
			for next < len(rows) && rows[next].Revision <= e.Revision {
				change()
			}
			want := slices.SortedFunc(maps.Values(state), func(x, y Entry) int { return strings.Compare(x.Key, y.Key) })
			if !slices.EqualFunc(entries, want, equalEntry) {
				t.Errorf("%s: event %d: at revision %d it was given %v and there was %v", w.name, i, e.Revision, entries, want)
				return
			}
			anew = false
		case !anew && next < len(rows) && reflect.DeepEqual(e, rows[next].event()):
			change()
		default:
			text := "nothing more"
			if next < len(rows) {
				text = fmt.Sprintf("%+v", rows[next])
			}
			t.Errorf("%s: event %d is %+v, want %s", w.name, i, e, text)
			return
		}
		at = e.Revision
	}
	if anew || next != len(rows) {
		t.Errorf("%s: saw %d of %d changes", w.name, next, len(rows))
	}
}

// allSeen is every change that some spectator saw; two must not have seen different ones.
func allSeen(t *testing.T, list []*spectator) (rows []written) {
	t.Helper()
	known := make(map[uint64]written)
	for _, w := range list {
		for _, e := range w.seen {
			if e.Revision == 0 || e.Kind == EventSynced {
				continue
			}
			r := changeOf(e)
			if other, ok := known[r.Revision]; ok && !reflect.DeepEqual(r, other) {
				t.Fatalf("%s has seen %+v and another one %+v", w.name, r, other)
			}
			known[r.Revision] = r
		}
	}
	return slices.SortedFunc(maps.Values(known), func(x, y written) int { return cmp.Compare(x.Revision, y.Revision) })
}

// changeForAll is a change of which all spectators see the last revision, whatever their prefix.
func changeForAll(name string) []part {
	return []part{{Do: "set", Key: name, Value: []byte(name)}, {Do: "set", Key: "1-" + name, Value: []byte(name)}}
}

// serveWatch streams a watch as lines of JSON.
func serveWatch(s *Service) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		since, err := strconv.ParseUint(req.FormValue("since"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		out, flush := json.NewEncoder(w), http.NewResponseController(w)
		for e, err := range watchOn(s)(req.Context(), req.FormValue("prefix"), since, req.FormValue("resync") != "") {
			if out.Encode(newWatchLine(e, err)) != nil || flush.Flush() != nil {
				return
			}
		}
	}
}

// A watchLine is an event, or the error that ended the watch.
type watchLine struct {
	Event     Event
	Error     string
	Compacted *CompactedError
	Is        string // which of our errors
}

func newWatchLine(e Event, err error) watchLine {
	l := watchLine{Event: e}
	if err == nil {
		return l
	}
	errors.As(err, &l.Compacted)
	l.Error = err.Error()
	for _, bad := range []error{ErrInvalid, ErrCorrupt, ErrSlow} {
		if errors.Is(err, bad) {
			l.Is = bad.Error()
		}
	}
	return l
}

func (l watchLine) err() error {
	if l.Error == "" {
		return nil
	}
	for _, bad := range []error{ErrInvalid, ErrCorrupt, ErrSlow} {
		if l.Is == bad.Error() {
			return fmt.Errorf("%w: %s", bad, l.Error)
		}
	}
	if l.Compacted != nil {
		return l.Compacted
	}
	return errors.New(l.Error)
}

// watch watches in the process; a stream that breaks ends it with an error.
func (p *process) watch(ctx context.Context, prefix string, since uint64, resync bool) iter.Seq2[Event, error] {
	q := url.Values{"prefix": {prefix}, "since": {fmt.Sprint(since)}}
	if resync {
		q.Set("resync", "yes")
	}
	return func(yield func(Event, error) bool) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.addr+"/watch?"+q.Encode(), nil)
		if err != nil {
			yield(Event{}, err)
			return
		}
		resp, err := p.client.Do(req)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer resp.Body.Close()
		for in := json.NewDecoder(resp.Body); ; {
			var l watchLine
			if err := in.Decode(&l); err != nil {
				yield(Event{}, err)
				return
			}
			if !yield(l.Event, l.err()) || l.Error != "" {
				return
			}
		}
	}
}

// want asks whether everything up to a revision has been seen.
func (w *spectator) want(revision uint64) error {
	if at := w.at(); at != revision {
		return fmt.Errorf("it is at %d, want %d", at, revision)
	}
	return nil
}

func lostBy(list []*spectator) (n int) {
	for _, w := range list {
		n += w.lost
	}
	return n
}

// synced asks whether the entries have been seen.
func (w *spectator) synced() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.seen); n == 0 || w.seen[n-1].Kind == EventReset {
		return fmt.Errorf("it has seen %d events", n)
	}
	return nil
}

// TestWatchThroughASnapshot: watchers stay where they are while their member is away and gets the state as a snapshot. What the
// history in it reaches back to they get, each change once; whose place is gone is told so, or begins anew if he wants that.
func TestWatchThroughASnapshot(t *testing.T) {
	t.Parallel()
	const history, size = 128, 20
	bubbleOf(t, func(c *Config) { c.History = history }, func(t *testing.T, c *script, l, f, g *scriptMember) {
		shortMemory(f.s, 16)
		revision := uint64(0)
		write := func(transactions int) {
			for range transactions {
				var tx []Op
				for i := range size {
					tx = append(tx, set(fmt.Sprint("k", i), fmt.Sprint(revision)))
				}
				revision = transact(t, l.s, tx...)
			}
		}
		// absent is what happens while the follower is away; the others then can't send it their log.
		absent := func(what func()) {
			t.Helper()
			past, before := f.s.Status().LastIndex, f.s.store.meta().installed
			c.obey("partition {F} {L G}")
			what()
			for _, m := range []*scriptMember{l, g} {
				eventually(t, patience, "a short log", func() error { return cutLog(m.s, past+1) })
			}
			c.obey("heal")
			eventually(t, patience, "an install", func() error {
				if m := f.s.store.meta(); m.installed == before || m.revision < revision {
					return fmt.Errorf("installed %d, revision %d", m.installed, m.revision)
				}
				return nil
			})
		}
		take := func(w *watched, from, to uint64) {
			t.Helper()
			for r := from; r <= to; r++ {
				if e := w.event(); e.Revision != r || e.Last != (r+size-1)/size*size {
					t.Fatalf("got %s, want revision %d", eventText(e), r)
				}
			}
		}
		write(1)
		quick, slow, resync := startWatch(t, f.s, "", 1), startWatch(t, f.s, "", 1), startWatch(t, f.s, "", 1, Resync())
		for _, w := range []*watched{quick, slow, resync} {
			take(w, 2, size)
		}

		absent(func() { write(history / size) })
		take(quick, size+1, revision)
		take(slow, size+1, size+3) // in the middle of a transaction

		at := revision
		absent(func() { write(history/size + 1) })
		m := f.s.store.meta()
		oldest := m.oldest()
		if oldest <= at {
			t.Fatalf("the history still reaches back to %d", oldest)
		}
		for name, w := range map[string]*watched{"the quick one": quick, "the slow one": slow} {
			e, err, _ := w.next()
			for ; w == slow && err == nil && e.Revision <= at; e, err, _ = w.next() { // what it had read before
			}
			var gone *CompactedError
			if !errors.As(err, &gone) || gone.Oldest != oldest {
				t.Errorf("%s: %s, %v, want a CompactedError with %d", name, eventText(e), err, oldest)
			}
		}
		take(startWatch(t, g.s, "", oldest), oldest+1, revision)

		resync.want("reset")
		want, err := entriesOf(f.s.List(t.Context(), ""))
		must(t, err)
		for _, entry := range want {
			if e := resync.event(); !equalEvent(e, Event{Kind: EventSet, Entry: entry}) {
				t.Errorf("got %s, want the entry %v", eventText(e), entry)
			}
		}
		resync.want(fmt.Sprint("synced ", revision))
		write(1)
		take(resync, revision-size+1, revision)
	})
}
