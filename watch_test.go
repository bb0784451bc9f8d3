package quorate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A watched is a loop over a Watch that a test takes events from when it likes.
type watched struct {
	t    testing.TB
	next func() (Event, error, bool)
	stop func()
}

func startWatch(t testing.TB, s *Service, prefix string, since uint64, opts ...WatchOption) *watched {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	next, stop := iter.Pull2(s.Watch(ctx, prefix, since, opts...))
	w := &watched{t, next, func() { cancel(); stop() }}
	t.Cleanup(w.stop)
	return w
}

// event takes the next event, which must not be an error.
func (w *watched) event() Event {
	w.t.Helper()
	e, err, ok := w.next()
	if err != nil || !ok {
		w.t.Fatalf("the watch has ended: %v", err)
	}
	return e
}

// want takes the next events and compares what they say.
func (w *watched) want(list ...string) {
	w.t.Helper()
	for _, want := range list {
		if got := eventText(w.event()); got != want {
			w.t.Fatalf("got %s, want %s", got, want)
		}
	}
}

// end takes what must be the error that ends the watch.
func (w *watched) end() error {
	w.t.Helper()
	e, err, ok := w.next()
	if !ok || err == nil || !equalEvent(e, Event{}) {
		w.t.Fatalf("want a last error with a zero event, got %s, %v, %v", eventText(e), err, ok)
	}
	if _, _, ok := w.next(); ok {
		w.t.Fatalf("something follows the last error %v", err)
	}
	return err
}

// eventText: revision/last kind key=value (version created) was previous.
func eventText(e Event) string {
	switch e.Kind {
	case EventReset:
		return "reset"
	case EventSynced:
		return fmt.Sprint("synced ", e.Revision)
	case EventDelete:
		return fmt.Sprintf("%d/%d delete %s was %d", e.Revision, e.Last, e.Entry.Key, e.Previous)
	}
	return fmt.Sprintf("%d/%d %v %s=%s (%d %d) was %d", e.Revision, e.Last, e.Kind, e.Entry.Key, e.Entry.Value, e.Entry.Version, e.Entry.Created, e.Previous)
}

func equalEvent(a, b Event) bool {
	return a.Kind == b.Kind && a.Revision == b.Revision && a.Last == b.Last && a.Previous == b.Previous && equalEntry(a.Entry, b.Entry)
}

// shortMemory makes the hub keep few changes, so that a watcher that is a little behind reads from disk. Before any watch.
func shortMemory(s *Service, n int) { s.hub.recent.most = n }

func set(key, value string) Op { return Set(key, []byte(value)) }

// transact carries out a transaction and returns its revision.
func transact(t testing.TB, s *Service, ops ...Op) uint64 {
	t.Helper()
	revision, err := s.Exec(ctxFor(t, patience), ops...)
	must(t, err)
	return revision
}

// pasts is the history as the table holds it, after a revision.
func pasts(t testing.TB, s *Service, after uint64) (all []past) {
	t.Helper()
	for {
		list, err := s.store.changes(t.Context(), after)
		must(t, err)
		if len(list) == 0 {
			return all
		}
		all, after = append(all, list...), list[len(list)-1].revision
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	for name, memory := range map[string]int64{"in memory": 0, "in SQLite": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openSole(t, func(c *Config) { c.Memory = memory })
			ctx := ctxFor(t, patience)
			must(t, s.Set(ctx, "b/1", []byte("one")))
			must(t, s.Set(ctx, "a/1", []byte("other")))
			must(t, s.Set(ctx, "b/2", nil))
			must(t, s.Set(ctx, "b/1", []byte("two")))
			w := startWatch(t, s, "b/", 0)
			w.want("reset", "0/0 set b/1=two (4 1) was 0", "0/0 set b/2= (3 3) was 0", "synced 4")
			must(t, s.Delete(ctx, "b/2"))
			must(t, s.Delete(ctx, "b/2")) // changes nothing
			must(t, s.Set(ctx, "c", nil))
			transact(t, s, set("b/2", "again"), set("c", "x"), set("b/3", "three"))
			w.want("5/5 delete b/2 was 3", "7/9 set b/2=again (7 7) was 0", "9/9 set b/3=three (9 9) was 0")
			must(t, s.Set(ctx, "b/1", []byte("live")))
			w.want("10/10 set b/1=live (10 1) was 4")
			all := startWatch(t, s, "", 3)
			all.want("4/4 set b/1=two (4 1) was 1", "5/5 delete b/2 was 3", "6/6 set c= (6 6) was 0", "7/9 set b/2=again (7 7) was 0")
			startWatch(t, s, "nothing/", 0).want("reset", "synced 10")
		})
	}
}

// Resuming at any event misses nothing, also in the middle of a transaction, and delivers nothing twice.
func TestWatchIsResumedAnywhere(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	must(t, s.Set(ctx, "k/b", nil))
	for i := range 3 {
		transact(t, s, set("k/a", fmt.Sprint(i)), Delete("k/b"), set("k/c", ""))
		transact(t, s, set("k/b", ""))
	}
	whole := []string{
		"2/4 set k/a=0 (2 2) was 0", "3/4 delete k/b was 1", "4/4 set k/c= (4 4) was 0", "5/5 set k/b= (5 5) was 0",
		"6/8 set k/a=1 (6 2) was 2", "7/8 delete k/b was 5", "8/8 set k/c= (8 4) was 4", "9/9 set k/b= (9 9) was 0",
		"10/12 set k/a=2 (10 2) was 6", "11/12 delete k/b was 9", "12/12 set k/c= (12 4) was 8", "13/13 set k/b= (13 13) was 0",
	}
	for cut := range whole {
		w := startWatch(t, s, "k/", 1)
		w.want(whole[:cut]...)
		since := w.event().Revision
		w.stop()
		startWatch(t, s, "k/", since).want(whole[cut+1:]...)
	}
}

func TestWatchEnds(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	ctx := ctxFor(t, patience)
	must(t, s.Set(ctx, "k", []byte("v")))
	const waiting = 3
	t.Run("invalid arguments", func(t *testing.T) {
		wantIs(t, "a prefix with NUL", startWatch(t, s, "a\x00", 0).end(), ErrInvalid)
		wantIs(t, "half a rune", startWatch(t, s, "\xc3", 0).end(), ErrInvalid)
		wantIs(t, "a long prefix", startWatch(t, s, strings.Repeat("p", maxKey+1), 0).end(), ErrTooLarge)
		wantIs(t, "since in the future", startWatch(t, s, "", 2).end(), ErrInvalid)
		wantIs(t, "since far in the future", startWatch(t, s, "", 1<<63).end(), ErrInvalid)
		startWatch(t, s, "", 1<<63, Resync()).want("reset", "0/0 set k=v (1 1) was 0", "synced 1")
	})
	t.Run("with the cause of its context", func(t *testing.T) {
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(context.Background())
		next, stop := iter.Pull2(s.Watch(ctx, "", 1))
		defer stop()
		time.AfterFunc(time.Millisecond, func() { cancel(cause) })
		if e, err, ok := next(); !ok || !errors.Is(err, cause) || !equalEvent(e, Event{}) {
			t.Errorf("got %s, %v", eventText(e), err)
		}
		if _, err, _ := startPulled(ctx, s, 0); !errors.Is(err, cause) {
			t.Errorf("begun after the end of its context: %v", err)
		}
		unchecked := func(yes bool) {
			s.store.stateMu.Lock()
			defer s.store.stateMu.Unlock()
			s.store.scanned = !yes
		}
		unchecked(true)
		defer unchecked(false)
		ctx, cancel = context.WithCancelCause(context.Background())
		time.AfterFunc(time.Millisecond, func() { cancel(cause) })
		if _, err, _ := startPulled(ctx, s, 1); !errors.Is(err, cause) {
			t.Errorf("waiting for the check of the file: %v", err)
		}
	})
	t.Run("when the loop is left", func(t *testing.T) {
		for name, leave := range map[string]func(){"by break": func() {}, "by a panic": func() { panic("body") }} {
			for range 3 {
				func() {
					defer func() { recover() }()
					for range s.Watch(ctx, "k", 0) {
						if n := s.hub.watchers.Load(); n != 1 {
							t.Errorf("%d watchers in the loop", n)
						}
						leave()
						break
					}
				}()
			}
			eventually(t, patience, "no watcher left "+name, func() error { return hubEmpty(s) })
		}
	})
	t.Run("when the member is closed", func(t *testing.T) {
		ends := make(chan error, waiting)
		for i := range waiting {
			go func() {
				for _, err := range s.Watch(context.Background(), fmt.Sprint(i), 1) {
					ends <- err
				}
			}()
		}
		eventually(t, patience, "watchers", func() error {
			if n := s.hub.watchers.Load(); n != waiting {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		listing := startWatch(t, s, "", 0)
		listing.event()
		must(t, s.Close())
		for range waiting {
			wantIs(t, "waiting", <-ends, ErrClosed)
		}
		wantIs(t, "listing", listing.end(), ErrClosed)
		wantIs(t, "after Close", startWatch(t, s, "", 0).end(), ErrClosed)
		must(t, hubEmpty(s))
	})
}

func startPulled(ctx context.Context, s *Service, since uint64) (Event, error, bool) {
	next, stop := iter.Pull2(s.Watch(ctx, "", since))
	defer stop()
	return next()
}

// hubEmpty: nobody is there, and nothing is kept for anybody.
func hubEmpty(s *Service) error {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := h.watchers.Load(); n != 0 || h.crowds.Len() != 0 || h.recent.n != 0 || h.recent.list != nil || h.held.Load() != 0 {
		return fmt.Errorf("%d watchers, %d crowds, %d changes, %d bytes held", n, h.crowds.Len(), h.recent.n, h.held.Load())
	}
	return nil
}

// A consumer that is slow is served from the hub, then from disk, and then told that it has lost its place.
func TestSlowWatcher(t *testing.T) {
	t.Parallel()
	const history, first = 600, 1
	s := openSole(t, func(c *Config) { c.History = history })
	shortMemory(s, 8)
	ctx := ctxFor(t, patience)
	must(t, s.Set(ctx, "k", nil))
	slow, resync, quick := startWatch(t, s, "k", first), startWatch(t, s, "k", first, Resync()), startWatch(t, s, "k", first)
	rare := make(chan string, 8)
	go func() {
		for e := range s.Watch(ctx, "rare", 0) {
			rare <- eventText(e)
		}
	}()
	s.awaitIdle(t, "rare")
	revision := uint64(first)
	write := func(n int) {
		for range n / 100 {
			var tx []Op
			for range 100 {
				revision++
				tx = append(tx, set("k"+fmt.Sprint(revision), "v"))
			}
			transact(t, s, tx...)
			for range 100 {
				quick.event()
			}
		}
	}
	wantTo := func(w *watched, from, to uint64) {
		t.Helper()
		for ; from <= to; from++ {
			if e := w.event(); e.Revision != from || e.Entry.Version != from {
				t.Fatalf("got %s, want revision %d", eventText(e), from)
			}
		}
	}
	write(100)
	wantTo(slow, 2, 2)
	wantTo(resync, 2, 2)
	write(500) // two pages and more
	wantTo(slow, 3, revision)
	wantTo(resync, 3, 5)
	oldest := func() uint64 { m := s.store.meta(); return m.oldest() }
	write(1000)
	if oldest() <= first {
		t.Fatalf("the history reaches back to %d", oldest())
	}
	var gone *CompactedError
	if err := slow.end(); !errors.As(err, &gone) || !errors.Is(err, ErrCompacted) || gone.Oldest != oldest() {
		t.Errorf("overtaken: %v, want a CompactedError with %d", err, oldest())
	}
	wantIs(t, "resumed too late", startWatch(t, s, "", oldest()-1).end(), ErrCompacted)
	wantTo(startWatch(t, s, "k", oldest()), oldest()+1, revision)
	for e := resync.event(); e.Kind != EventReset; e = resync.event() {
		if e.Revision > 600 {
			t.Fatalf("%s, want the rest of a page and a reset", eventText(e))
		}
	}
	n := 0
	e := resync.event()
	for ; e.Kind == EventSet && e.Revision == 0; e = resync.event() {
		n++
	}
	if e.Kind != EventSynced || e.Revision != revision || uint64(n) != revision {
		t.Errorf("%d entries and then %s, want %d and synced", n, eventText(e), revision)
	}
	startWatch(t, s, "none", first, Resync()).want("reset", fmt.Sprint("synced ", revision))
	must(t, s.Set(ctx, "rare", nil))
	revision++
	for _, want := range []string{"reset", "synced 1", fmt.Sprintf("%d/%d set rare= (%d %d) was 0", revision, revision, revision, revision)} {
		if got := <-rare; got != want {
			t.Errorf("a prefix with no change for longer than the history: got %s, want %s", got, want)
		}
	}
}

// awaitIdle waits until somebody waits at the prefix's bell.
func (s *Service) awaitIdle(t testing.TB, prefix string) {
	t.Helper()
	eventually(t, patience, "a watcher of "+prefix+" that waits", func() error {
		s.hub.mu.Lock()
		defer s.hub.mu.Unlock()
		if c, ok := s.hub.crowds.Get(prefix); !ok || c.bell.Load() == nil {
			return errors.New("it does not")
		}
		return nil
	})
}

// A modelled watch is what the model expects of one: what is to come, in order, without a gap and once.
type modelledWatch struct {
	*watched
	prefix string
	cursor uint64 // of the last event
	resync bool
	anew   bool    // a reset comes next
	listed bool    // the reset has come: the entries are those of the moment at which the next event is taken
	queue  []Event // the rest of the entries, and synced
}

// A watchModel is every change there was, and what is there now.
type watchModel struct {
	s       *Service
	changes []Event
	now     map[string]Entry
}

func (m *watchModel) revision() uint64 { return uint64(len(m.changes)) }

// write carries out a transaction on the store and in the model.
func (m *watchModel) write(t *rapid.T, tx []Op) {
	revision, err := m.s.Exec(t.Context(), tx...)
	defer func() {
		if err != nil || revision != m.revision() {
			t.Fatalf("revision %d, %v, want %d", revision, err, m.revision())
		}
	}()
	first := len(m.changes)
	for _, op := range tx {
		o := op.ops[0]
		old := m.now[o.key]
		e := Event{Kind: EventDelete, Revision: m.revision() + 1, Entry: Entry{Key: o.key}, Previous: old.Version}
		switch {
		case o.kind == opSet:
			e.Kind, e.Entry = EventSet, Entry{Key: o.key, Value: append([]byte{}, o.value...), Version: e.Revision, Created: cmp.Or(old.Created, e.Revision)}
			m.now[o.key] = e.Entry
		case old.Version == 0:
			continue
		default:
			delete(m.now, o.key)
		}
		m.changes = append(m.changes, e)
	}
	for i := range m.changes[first:] {
		m.changes[first+i].Last = m.revision()
	}
}

// next is the event that a watch must deliver now; false: it waits.
func (m *watchModel) next(w *modelledWatch) (Event, bool) {
	if w.anew {
		return Event{Kind: EventReset}, true
	}
	if w.listed {
		w.listed = false
		for _, key := range slices.Sorted(maps.Keys(m.now)) {
			if strings.HasPrefix(key, w.prefix) {
				w.queue = append(w.queue, Event{Kind: EventSet, Entry: m.now[key]})
			}
		}
		w.queue = append(w.queue, Event{Kind: EventSynced, Revision: m.revision(), Last: m.revision()})
	}
	if len(w.queue) > 0 {
		return w.queue[0], true
	}
	rest := slices.DeleteFunc(slices.Clone(m.changes[w.cursor:]), func(e Event) bool { return !strings.HasPrefix(e.Entry.Key, w.prefix) })
	if len(rest) == 0 {
		return Event{}, false
	}
	e := rest[0]
	for _, o := range rest {
		if o.Last == rest[0].Last {
			e.Last = o.Revision
		}
	}
	return e, true
}

// take compares the next event of a watch with the model; false: the watch has ended, as it may when its place is trimmed.
func (m *watchModel) take(t *rapid.T, w *modelledWatch) bool {
	meta := m.s.store.meta()
	want, _ := m.next(w)
	got, err, _ := w.watched.next()
	lost := len(w.queue) == 0 && !w.anew && w.cursor < meta.oldest()
	var gone *CompactedError
	switch {
	case errors.As(err, &gone) && lost && !w.resync && gone.Oldest == meta.oldest():
		return false
	case err != nil:
		t.Fatalf("watch of %q at %d of %d, oldest %d, wants %s: %v", w.prefix, w.cursor, m.revision(), meta.oldest(), eventText(want), err)
	case lost && w.resync && got.Kind == EventReset:
		want, w.anew = got, true
	}
	if !equalEvent(got, want) {
		t.Fatalf("watch of %q at %d: got %s, want %s", w.prefix, w.cursor, eventText(got), eventText(want))
	}
	switch {
	case got.Kind == EventReset:
		w.anew, w.listed = false, true
	case len(w.queue) > 0:
		w.queue = w.queue[1:]
	}
	w.cursor = max(w.cursor, got.Revision)
	return true
}

// Random transactions and watchers that begin, go on, dawdle, leave and resume, against a list of all changes. Every one of them
// sees what the list says, and the history table holds its end.
func TestWatchModel(t *testing.T) {
	t.Parallel()
	m := &watchModel{s: openSole(t, func(c *Config) { c.History = 24 }), now: make(map[string]Entry)}
	table := func(after uint64) []past { return pasts(t, m.s, after) }
	shortMemory(m.s, 8)
	keys := []string{"a", "a/1", "a/2", "a/2/x", "ab", "b", "b/", "é", "éa", "\U0010ffff"}
	prefixes := append([]string{"", "a/2/", "z"}, keys...)
	rapid.Check(t, func(t *rapid.T) {
		var watches []*modelledWatch
		defer func() {
			for _, w := range watches {
				w.stop()
			}
			if err := hubEmpty(m.s); err != nil {
				t.Error(err)
			}
		}()
		begin := func(prefix string, since uint64, resync bool) {
			var opts []WatchOption
			if resync {
				opts = append(opts, Resync())
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			next, stop := iter.Pull2(m.s.Watch(ctx, prefix, since, opts...))
			w := &modelledWatch{watched: &watched{t: nil, next: next, stop: func() { cancel(); stop() }}, prefix: prefix, cursor: since, resync: resync, anew: since == 0}
			watches = append(watches, w)
			meta := m.s.store.meta()
			var gone *CompactedError
			switch {
			case since > 0 && since < meta.oldest() || since > m.revision():
				if resync {
					w.cursor, w.anew = 0, true
					m.take(t, w) // now: since may lie in the past when it is looked at later
					break
				}
				_, err, _ := next()
				if since > m.revision() && !errors.Is(err, ErrInvalid) || since < meta.oldest() && (!errors.As(err, &gone) || gone.Oldest != meta.oldest()) {
					t.Fatalf("since %d of %d to %d: %v", since, meta.oldest(), m.revision(), err)
				}
				watches = watches[:len(watches)-1]
				w.stop()
			}
		}
		leave := func(i int) {
			watches[i].stop()
			watches = slices.Delete(watches, i, i+1)
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				meta := m.s.store.meta()
				if meta.revision != m.revision() {
					t.Fatalf("revision %d, want %d", meta.revision, m.revision())
				}
			},
			"write": func(t *rapid.T) {
				var tx []Op
				for _, key := range rapid.SliceOfNDistinct(rapid.SampledFrom(keys), 1, 5, rapid.ID).Draw(t, "keys") {
					if rapid.Bool().Draw(t, "set") {
						tx = append(tx, set(key, fmt.Sprint("value ", m.revision())))
					} else {
						tx = append(tx, Delete(key))
					}
				}
				m.write(t, tx)
			},
			"begin": func(t *rapid.T) {
				least := uint64(0)
				if meta := m.s.store.meta(); meta.oldest() > 4 {
					least = meta.oldest() - 4
				}
				since := rapid.Uint64Range(least, m.revision()+1).Draw(t, "since")
				if rapid.IntRange(0, 3).Draw(t, "anew") == 0 {
					since = 0
				}
				begin(rapid.SampledFrom(prefixes).Draw(t, "prefix"), since, rapid.Bool().Draw(t, "resync"))
			},
			"take": func(t *rapid.T) {
				if len(watches) == 0 {
					t.Skip()
				}
				i := rapid.IntRange(0, len(watches)-1).Draw(t, "watch")
				for range rapid.IntRange(1, 12).Draw(t, "events") {
					if _, ok := m.next(watches[i]); !ok {
						break
					}
					if !m.take(t, watches[i]) {
						leave(i)
						break
					}
				}
			},
			"leave, and resume": func(t *rapid.T) {
				if len(watches) == 0 {
					t.Skip()
				}
				i := rapid.IntRange(0, len(watches)-1).Draw(t, "watch")
				w := watches[i]
				leave(i)
				if w.anew || w.listed || len(w.queue) > 0 {
					w.cursor = 0
				}
				begin(w.prefix, w.cursor, w.resync)
			},
		})
		after := uint64(0)
		if meta := m.s.store.meta(); meta.oldest() > 0 {
			after = meta.oldest()
		}
		list := table(after)
		for i, e := range m.changes[after:] {
			if got := list[i].event(); !equalEvent(got, e) {
				t.Fatalf("the table has %s, want %s", eventText(got), eventText(e))
			}
		}
	})
}

// Every crowd whose prefix begins the key is called, and no other.
func TestCrowdsOfAKey(t *testing.T) {
	t.Parallel()
	text := rapid.StringMatching(`[abc]{0,6}`)
	rapid.Check(t, func(t *rapid.T) {
		h := newHub(func() uint64 { return 0 })
		prefixes := rapid.SliceOfDistinct(text, rapid.ID).Draw(t, "prefixes")
		for _, p := range prefixes {
			h.join(p)
		}
		key := rapid.StringMatching(`[abc]{1,8}`).Draw(t, "key")
		h.publish(1, []past{{revision: 1, last: 1, key: key}})
		for _, p := range prefixes {
			c, _ := h.crowds.Get(p)
			if called := c.last == 1; called != strings.HasPrefix(key, p) {
				t.Errorf("%q called by %q: %v", p, key, called)
			}
		}
	})
}

// What the hub keeps has no gap, also when the last watcher leaves while a change is being published.
func TestRecentHasNoGap(t *testing.T) {
	t.Parallel()
	var revision atomic.Uint64
	h := newHub(revision.Load)
	var leaving sync.WaitGroup
	var done atomic.Bool
	for range 2 {
		leaving.Go(func() {
			for !done.Load() {
				c := h.join("k")
				h.mu.RLock()
				if r := &h.recent; r.n > 0 && (r.at(r.n-1).revision != h.newest || h.newest-r.at(0).revision != uint64(r.n-1)) {
					t.Errorf("%d changes from %d to %d, and the newest is %d", r.n, r.at(0).revision, r.at(r.n-1).revision, h.newest)
				}
				h.mu.RUnlock()
				h.leave(c)
			}
		})
	}
	for i := uint64(1); i <= 300_000 && !t.Failed(); i++ {
		revision.Store(i)
		h.publish(i, []past{{revision: i, last: i, key: fmt.Sprint("k", i)}})
	}
	done.Store(true)
	leaving.Wait()
}

// The hub holds no more than it may, whatever comes, and what it holds has no gap.
func TestRecentIsBounded(t *testing.T) {
	t.Parallel()
	r := recent{most: 8}
	big := &item{row: row{value: strings.Repeat("x", recentBytes/2)}}
	for i := uint64(1); i <= 100; i++ {
		p := past{revision: i, key: "k"}
		if i%30 > 25 {
			p.now = big
		}
		r.add(p)
		size := int64(0)
		for n := range r.n {
			if p := r.at(n); p.revision != i-uint64(r.n-1-n) {
				t.Fatalf("at %d: %d is in place %d of %d", i, p.revision, n, r.n)
			}
			size += pastSize(*r.at(n))
		}
		if r.n > 8 || r.n < 1 || len(r.list) > 8 || size != r.size || size > recentBytes && r.n > 1 {
			t.Fatalf("at %d: %d changes in %d places, %d bytes, counted %d", i, r.n, len(r.list), size, r.size)
		}
		if at, ok := r.find(i); !ok || at != r.n-1 {
			t.Fatalf("the newest, %d, is found at %d, %v", i, at, ok)
		}
		if _, ok := r.find(i + 1); ok {
			t.Fatalf("%d is found before it was added", i+1)
		}
		if _, ok := r.find(i - uint64(r.n)); ok {
			t.Fatalf("%d is found after it was dropped", i-uint64(r.n))
		}
	}
	for i := range r.list { // what was dropped is not kept
		if r.list[i].now == big && r.size < recentBytes/2 {
			t.Error("a dropped value is held")
		}
	}
}

// Quick and slow watchers of overlapping prefixes while others write: each sees exactly what the history says of its prefix.
func TestWatchersAmongWriters(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	shortMemory(s, 64)
	const writers, each = 4, 60
	written := make(chan struct{})
	var watching, writing sync.WaitGroup
	ends := map[string]string{"": "x", "w": "w3/k7", "w1": "w1/", "w1/": "w1/", "w2/k": "w2/k", "w3/k7": "w3/k7"} // by prefix: the last key
	prefixes := slices.Sorted(maps.Keys(ends))
	for i := range 24 {
		prefix := prefixes[i%len(prefixes)]
		watching.Go(func() {
			var got []Event
			for e, err := range s.Watch(ctxFor(t, 2*patience), prefix, 0) {
				if err != nil {
					t.Error(err)
					return
				}
				if e.Kind == EventReset || e.Kind == EventSynced {
					continue
				}
				got = append(got, e)
				if i%4 == 3 && len(got) == 3 { // slow
					<-written
				}
				if e.Entry.Key == ends[prefix] && bytes.Equal(e.Entry.Value, []byte("last")) {
					break
				}
			}
			var want []Event
			for _, p := range under(prefix, pasts(t, s, 0)) {
				want = append(want, p.event())
			}
			if !slices.EqualFunc(got, want[:min(len(want), len(got))], equalEvent) || len(got) != len(want) {
				t.Errorf("a watcher of %q saw %d changes, which are not the %d of the history", prefix, len(got), len(want))
			}
		})
	}
	eventually(t, patience, "watchers", func() error {
		if n := s.hub.watchers.Load(); n != 24 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	for _, p := range prefixes {
		s.awaitIdle(t, p)
	}
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				key := fmt.Sprintf("w%d/k%d", w, i%9)
				tx := []Op{set(key, fmt.Sprint(i)), set(fmt.Sprintf("x%d", i%3), ""), Delete(fmt.Sprintf("w%d/k%d", (w+1)%4, i%7)), set(fmt.Sprintf("w%d/k77", w), "")}
				if _, err := s.Exec(ctxFor(t, patience), tx...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writing.Wait()
	transact(t, s, set("w1/", "last"), set("w2/k", "last"), set("w3/k7", "last"), set("x", "last"))
	close(written)
	watching.Wait()
	must(t, hubEmpty(s))
}

// spoilHistory damages a row as a disk would: no sum knows of it.
func spoilHistory(t testing.TB, s *Service, revision uint64) {
	t.Helper()
	must(t, s.store.flush())
	s.store.fileMu.Lock()
	defer s.store.fileMu.Unlock()
	must(t, s.store.writer.execText(fmt.Sprint("UPDATE history SET value = 'evil' WHERE revision = ", revision)))
}

// Alone there is nobody to take the row from.
func TestWatchOfDamagedHistory(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	for i := range 4 {
		transact(t, s, set("k", fmt.Sprint(i)))
	}
	spoilHistory(t, s, 3)
	wantIs(t, "a damaged row", startWatch(t, s, "", 1).end(), ErrCorrupt)
	wantIs(t, "a damaged state", startWatch(t, s, "", 0).end(), ErrCorrupt)
}

// Damage that the check of the file has just found is mended before a watch begins: it is no more its end than what is found later.
func TestWatchBeginsBesideDamage(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		c.obey("set L k 1")
		c.obey("await equal")
		f.s.store.setVerdict(corrupt("kv has 0 rows and should have 1"))
		startWatch(t, f.s, "k", 0).want("reset", "0/0 set k=1 (1 1) was 0", "synced 1")
	})
}

// What is held for the first part of a watch is given back when its consumer takes nothing, and the watch says so.
func TestWatchOfAStoppedConsumer(t *testing.T) {
	t.Parallel()
	for name, memory := range map[string]int64{"in memory": 0, "in SQLite": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openSole(t, func(c *Config) { c.Memory = memory })
			for i := range 3 {
				var tx []Op
				for k := range 100 {
					tx = append(tx, set(fmt.Sprint("k", i, k), ""))
				}
				transact(t, s, tx...)
			}
			w := startWatch(t, s, "", 0)
			w.event()
			w.event()
			holds := s.store.openHolds()
			if len(holds) != 1 {
				t.Fatalf("%d holds", len(holds))
			}
			holds[0].tend(0)
			holds[0].tend(slowLimit)
			for {
				if _, err, ok := w.next(); err != nil || !ok {
					wantIs(t, "a minute without a step", err, ErrSlow)
					break
				}
			}
			if n := len(s.store.openHolds()); n != 0 {
				t.Errorf("%d holds are left", n)
			}
			must(t, hubEmpty(s))
		})
	}
}

// Ten thousand watchers that wait cost little: each its goroutine, and beside that no more than 2 KiB.
func TestIdleWatchersAreSmall(t *testing.T) {
	const n, limit = 10_000, 2 << 10
	s := openSole(t)
	for name, prefix := range map[string]func(int) string{
		"of one prefix":       func(int) string { return "watched/" },
		"of a prefix of each": func(i int) string { return fmt.Sprint("watched/", i, "/") },
	} {
		t.Run(name, func(t *testing.T) {
			measure := func() (m runtime.MemStats) {
				for range 4 { // stacks shrink by half each time
					runtime.GC()
				}
				runtime.ReadMemStats(&m)
				return m
			}
			before := measure()
			stop := idleWatchers(t, s, n, prefix, func(Event) {})
			transact(t, s, set("other", ""))
			after := measure()
			stop()
			heap := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / n
			stack := (int64(after.StackInuse) - int64(before.StackInuse)) / n
			if t.Logf("%d bytes each, and %d of stack", heap, stack); heap > limit {
				t.Errorf("%d bytes each, the limit is %d", heap, limit)
			}
			must(t, hubEmpty(s))
		})
	}
}

// idleWatchers starts n loops over Watch and waits until each of them has nothing to do. They end with the test.
func idleWatchers(t testing.TB, s *Service, n int, prefix func(i int) string, got func(Event)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var synced atomic.Int64
	for i := range n {
		running.Go(func() {
			for e, err := range s.Watch(ctx, prefix(i), 0) {
				switch {
				case err != nil:
					if ctx.Err() == nil {
						t.Error(err)
					}
				case e.Kind == EventSynced:
					synced.Add(1)
				default:
					got(e)
				}
			}
		})
	}
	eventually(t, 60*time.Second, "watchers that wait", func() error {
		if got := synced.Load(); got != int64(n) {
			return fmt.Errorf("%d of %d", got, n)
		}
		return nil
	})
	return func() { cancel(); running.Wait() }
}

func BenchmarkWriteWithWatchers(b *testing.B) {
	for _, n := range []int{0, 10_000} {
		b.Run(fmt.Sprint(n, "-not-matching"), func(b *testing.B) {
			s := openSole(b)
			must(b, s.Ready(ctxFor(b, patience)))
			defer idleWatchers(b, s, n, func(i int) string { return fmt.Sprint("watched/", i, "/") }, func(Event) {})()
			ctx := context.Background()
			runtime.GC()
			b.ResetTimer()
			for i := range b.N {
				if err := s.Set(ctx, fmt.Sprint("written/", i%1000), []byte("value")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWatchFanOut(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := openSole(b)
			must(b, s.Ready(ctxFor(b, patience)))
			var all sync.WaitGroup
			defer idleWatchers(b, s, n, func(i int) string { return "watched/" }, func(e Event) {
				if e.Kind == EventSet {
					all.Done()
				}
			})()
			ctx := context.Background()
			var writing time.Duration
			b.ResetTimer()
			for range b.N {
				all.Add(n)
				began := time.Now()
				if err := s.Set(ctx, "watched/key", []byte("value")); err != nil {
					b.Fatal(err)
				}
				writing += time.Since(began)
				all.Wait()
			}
			b.ReportMetric(float64(writing.Nanoseconds())/float64(b.N), "ns/write")
		})
	}
}

// A traveller follows one prefix on one member, and resumes there whenever the watch has ended.
type traveller struct {
	mu     sync.Mutex // guards the fields below
	events []Event
	errs   []error // what ended a watch
}

func (v *traveller) follow(ctx context.Context, on func() *Service, prefix string) {
	for since := uint64(0); ctx.Err() == nil; {
		if s := on(); s != nil {
			for e, err := range s.Watch(ctx, prefix, since) {
				v.mu.Lock()
				if err != nil {
					v.errs = append(v.errs, err)
				} else {
					v.events, since = append(v.events, e), e.Revision
				}
				v.mu.Unlock()
			}
		}
		<-time.After(5 * time.Millisecond)
	}
}

// await waits until a change has been seen, and returns what ended watches since the last call.
func (v *traveller) await(t testing.TB, revision uint64) (errs []error) {
	t.Helper()
	eventually(t, patience, "the change to be seen", func() error {
		v.mu.Lock()
		defer v.mu.Unlock()
		if n := len(v.events); n == 0 || v.events[n-1].Revision < revision {
			return fmt.Errorf("%d events, without revision %d", n, revision)
		}
		errs, v.errs = v.errs, nil
		return nil
	})
	return errs
}

// A watch on a follower goes on through changes of the leader, an installed snapshot and a rebuild of its member, and is resumed
// after a restart and on another member: in the end it has seen each change that the history holds once, in order.
func TestWatchTravels(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	m := c.follower(t)
	var here atomic.Pointer[testMember]
	here.Store(m)
	var v traveller
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	following.Go(func() {
		v.follow(ctx, func() *Service {
			m := here.Load()
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.s
		}, "w/")
	})
	defer following.Wait()
	defer cancel()
	n := 0
	write := func(t *testing.T, on *testMember) uint64 {
		t.Helper()
		n++
		b := Delete("w/b")
		if n%2 == 0 {
			b = set("w/b", "")
		}
		return transact(t, on.s, set("w/a", fmt.Sprint(n)), set("other", ""), set(fmt.Sprint("w/", n%7), ""), b, set("w/end", ""))
	}
	wantErrs := func(t *testing.T, errs []error, want ...error) {
		t.Helper()
		if len(errs) != len(want) {
			t.Fatalf("watches ended with %v, want %v", errs, want)
		}
		for i := range want {
			wantIs(t, "the end of a watch", errs[i], want[i])
		}
	}
	v.await(t, 0)
	t.Run("changes of the leader", func(t *testing.T) {
		for range 2 {
			l := c.leader(t)
			write(t, l)
			if l == m {
				must(t, l.s.raft.Load().LeadershipTransfer().Error())
				continue
			}
			l.stop()
			wantErrs(t, v.await(t, write(t, m)))
			l.start()
		}
	})
	t.Run("a restart", func(t *testing.T) {
		wantErrs(t, v.await(t, write(t, m)))
		m.stop()
		for range 3 {
			write(t, c.leader(t))
		}
		m.start()
		wantErrs(t, v.await(t, write(t, m)), ErrClosed)
	})
	t.Run("an installed snapshot", func(t *testing.T) {
		c.awaitVoters(t, 3)
		m.isolate()
		past := m.s.store.meta().applied
		others := slices.DeleteFunc(slices.Clone(c), func(o *testMember) bool { return o == m })
		eventually(t, patience, "a leader without the watching member", func() error {
			if id := others[0].s.Status().LeaderID; id == "" || id == m.s.Status().ID {
				return errors.New("none")
			}
			return nil
		})
		l := testCluster(others).leader(t)
		for range 20 {
			write(t, l)
		}
		testCluster(others).cutLogs(t, past)
		m.rejoin()
		eventually(t, patience, "an install", func() error {
			if m.s.store.meta().installed == 0 {
				return errors.New("none")
			}
			return nil
		})
		wantErrs(t, v.await(t, write(t, testCluster(others).leader(t))))
	})
	t.Run("a rebuild", func(t *testing.T) {
		was := m.s.store.meta().installed
		sqlite3(t, m.snap(), "update kv set value = 'evil' where key = 'w/a'; update history set value = 'evil'")
		eventually(t, patience, "a rebuild", func() error {
			if m.s.store.meta().installed == was || m.s.refusesReads() != nil {
				return fmt.Errorf("fault %v", m.s.refusesReads())
			}
			return nil
		})
		wantErrs(t, v.await(t, write(t, c.leader(t))))
	})
	t.Run("a damaged row of the history", func(t *testing.T) {
		revision := write(t, c.leader(t))
		wantErrs(t, v.await(t, revision))
		want := eventText(pasts(t, m.s, revision-1)[0].event())
		spoilHistory(t, m.s, revision)
		m.s.hub.mu.Lock()
		m.s.hub.recent.forget()
		m.s.hub.mu.Unlock()
		was := m.s.store.meta().installed
		startWatch(t, m.s, "w/", revision-1).want(want)
		if m.s.store.meta().installed == was {
			t.Error("it was not rebuilt")
		}
	})
	t.Run("another member, and a removal", func(t *testing.T) {
		c.awaitVoters(t, 3)
		to := c[0]
		if to == m {
			to = c[1]
		}
		here.Store(to)
		if c.leader(t) == m {
			must(t, m.s.raft.Load().LeadershipTransfer().Error())
		}
		must(t, to.s.RemoveMember(ctxFor(t, patience), m.conf.Addr))
		eventually(t, patience, "the end of the removed member's watch", func() error {
			v.mu.Lock()
			defer v.mu.Unlock()
			if len(v.errs) == 0 {
				return errors.New("none")
			}
			return nil
		})
		wantErrs(t, v.await(t, write(t, to)), ErrRemoved)
	})
	cancel()
	following.Wait()
	if v.events[0].Kind != EventReset || v.events[1].Kind != EventSynced {
		t.Fatalf("it began with %s, %s", eventText(v.events[0]), eventText(v.events[1]))
	}
	var want []string
	for _, p := range pasts(t, here.Load().s, v.events[1].Revision) {
		if strings.HasPrefix(p.key, "w/") {
			want = append(want, eventText(p.event()))
		}
	}
	for i, e := range v.events[2:] {
		if i >= len(want) || eventText(e) != want[i] {
			t.Fatalf("event %d of %d is %s, want %v", i, len(v.events)-2, eventText(e), want[i:min(i+1, len(want))])
		}
	}
	if len(v.events)-2 != len(want) {
		t.Errorf("%d changes were seen, want %d", len(v.events)-2, len(want))
	}
}

// Last is that of the whole transaction, however large its values are and wherever a page of the history ends.
func TestLastOfALargeTransaction(t *testing.T) {
	t.Parallel()
	for _, size := range []int{pageBytes, pageBytes + 1, recentBytes + 1} {
		for _, live := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, live %v", size, live), func(t *testing.T) {
				t.Parallel()
				s, err := Open(t.Context(), Config{Dir: t.TempDir(), MaxValue: 16 << 20})
				must(t, err)
				defer s.Close()
				_, err = s.Exec(t.Context(), Set("y", nil), Set("z", nil))
				must(t, err)
				exec := func() {
					if _, err := s.Exec(t.Context(), Set("b", make([]byte, size)), Delete("y"), Delete("z")); err != nil {
						t.Error(err)
					}
				}
				if live {
					go func() {
						eventually(t, patience, "a watcher", func() error {
							if s.hub.watchers.Load() == 0 {
								return errors.New("none")
							}
							return nil
						})
						exec()
					}()
				} else {
					exec()
				}
				want := uint64(3)
				for e, err := range s.Watch(ctxFor(t, patience), "", 2) {
					must(t, err)
					if e.Revision != want || e.Last != 5 {
						t.Errorf("%v of %s at %d has Last %d; want revision %d, Last 5", e.Kind, e.Entry.Key, e.Revision, e.Last, want)
					}
					if want++; want > 5 {
						break
					}
				}
			})
		}
	}
}

// Pages end with transactions, which are not all of one length.
func TestLastAcrossPages(t *testing.T) {
	t.Parallel()
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	must(t, err)
	defer s.Close()
	lasts := []uint64{0}
	for i := range 20 {
		var ops []Op
		for j := range 1 + i*61%maxOps {
			ops = append(ops, Set(fmt.Sprintf("%d/%d", j%2, j), nil))
		}
		r, err := s.Exec(t.Context(), ops...)
		must(t, err)
		for range ops {
			lasts = append(lasts, r)
		}
	}
	if len(lasts) < 4*pageRows {
		t.Fatalf("%d changes are not enough", len(lasts))
	}
	for _, prefix := range []string{"", "0/"} {
		at := uint64(1)
		for e, err := range s.Watch(ctxFor(t, patience), prefix, 1) {
			must(t, err)
			want := lasts[e.Revision]
			if prefix == "" && e.Revision != at+1 || e.Last != want && (prefix == "" || e.Last != want-1) {
				t.Fatalf("%d comes after %d, and its Last is %d; want %d", e.Revision, at, e.Last, want)
			}
			if at = e.Revision; at >= uint64(len(lasts)-2) {
				break
			}
		}
	}
}

// A watch from 0 is synced at the revision at which its entries were, also where the copy in memory was read from the file.
func TestWatchAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir})
	must(t, err)
	for _, k := range []string{"a", "b", "c"} {
		must(t, s.Set(t.Context(), k, nil))
	}
	must(t, s.Close())
	s, err = Open(t.Context(), Config{Dir: dir})
	must(t, err)
	defer s.Close()
	soon(t, "the copy in memory", s.store.memory.whole)
	var got []EventKind
	for e, err := range s.Watch(ctxFor(t, patience), "", 0) {
		must(t, err)
		if got = append(got, e.Kind); e.Kind != EventSynced {
			continue
		}
		if len(got) != 5 || e.Revision != 3 || e.Last != 3 {
			t.Errorf("%v, the last at revision %d (%d)", got, e.Revision, e.Last)
		}
		break
	}
}

// When an install has put other rows in the place of those that were there, every watcher reads what led to them, whatever it watches.
func TestReplacedStateIsRead(t *testing.T) {
	h := newHub(func() uint64 { return 5 })
	c := h.join("prefix")
	n := h.next(c, 5)
	if n.bell == nil {
		t.Fatalf("nothing has changed, and next is %+v", n)
	}
	h.replaced(9)
	select {
	case <-n.bell.rung:
	default:
		t.Error("the bell does not ring")
	}
	if n.bell.first > 6 {
		t.Errorf("who waited goes on at %d, and has seen 5", n.bell.first)
	}
	if n := h.next(c, 5); !n.behind || n.cursor != 5 {
		t.Errorf("next is %+v", n)
	}
	if n := h.next(c, 9); n.behind || n.bell == nil {
		t.Errorf("who has read it gets %+v", n)
	}
}

// While slow consumers keep much, each reads one change at a time, and misses none for that.
func TestNoChangeIsMissedOneAtATime(t *testing.T) {
	t.Parallel()
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	must(t, err)
	defer s.Close()
	for i := range 10 {
		must(t, s.Set(t.Context(), fmt.Sprint("k", i%3), nil))
	}
	s.hub.held.Add(heldBytes)
	want := uint64(2)
	for e, err := range s.Watch(ctxFor(t, patience), "k", 1) {
		if must(t, err); e.Revision != want {
			t.Fatalf("revision %d, want %d", e.Revision, want)
		}
		if want++; want > 10 {
			break
		}
	}
	if n := s.hub.held.Load(); n != heldBytes {
		t.Errorf("%d bytes are held", n-heldBytes)
	}
}

// Once the ringer has ended, a large crowd is rung for by whoever has something for it.
func TestLargeCrowdAfterTheRinger(t *testing.T) {
	h := newHub(func() uint64 { return 5 })
	var c *crowd
	for range directRings + 1 {
		c = h.join("")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h.ring(ctx)
	b := h.next(c, 5).bell
	h.publish(6, []past{{revision: 6, last: 6, key: "k"}})
	select {
	case <-b.rung:
	default:
		t.Error("nobody rings")
	}
}

// A stretch of the history without a change under the prefix is behind a watcher once it was read, and a watcher that would wait looks
// first whether its member serves reads.
func TestWatcherPastOthersChanges(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	for range 5 {
		transact(t, s, set("other", ""))
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range s.Watch(ctx, "k", 1) {
		}
	}()
	s.awaitIdle(t, "k")
	s.faults.set(faultState, corrupt("a row"))
	if (&watcher{s: s, ctx: ctx}).wait(&bell{rung: make(chan struct{})}); ctx.Err() != nil {
		t.Error("a watcher waits for a bell that rang before")
	}
	cancel()
	<-ended
}

// What the first watcher has found is no news to it, and what the hub has is without a gap.
func TestHubTakesWhatIsNext(t *testing.T) {
	h := newHub(func() uint64 { return 5 })
	c := h.join("k")
	for _, is := range []struct {
		revision uint64
		kept     int
	}{{5, 0}, {6, 1}, {7, 2}, {6, 2}, {9, 1}} {
		h.publish(0, []past{{revision: is.revision, last: is.revision, key: "k"}})
		if h.recent.n != is.kept || h.newest != max(c.last, h.newest) || is.revision > 5 && c.last < is.revision {
			t.Errorf("after %d: %d changes, newest %d, the crowd's last %d", is.revision, h.recent.n, h.newest, c.last)
		}
	}
	h.leave(c)
}

// A member that may not serve reads any more ends a list of entries where it is. It begins anew once that has passed, and ends the watch
// where only a restart helps.
func TestEntriesOfAMemberThatRefusesReads(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1", "b", "2", "c", "3")
	stranger := errors.New("a stranger")
	var kinds []EventKind
	for e, err := range s.Watch(ctxFor(t, patience), "", 0) {
		if err != nil {
			is(t, err, errGone)
			break
		}
		switch kinds = append(kinds, e.Kind); len(kinds) {
		case 2:
			s.faults.set(faultStranger, stranger)
			time.AfterFunc(20*time.Millisecond, func() { s.faults.set(faultStranger, nil) })
		case 4:
			s.faults.set(faultGone, errGone)
		}
	}
	if want := []EventKind{EventReset, EventSet, EventReset, EventSet}; !slices.Equal(kinds, want) {
		t.Errorf("the events are %v, want %v", kinds, want)
	}
}

// The same for a stretch of the history that is read from the disk.
func TestHistoryOfAMemberThatRefusesReads(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	var first uint64
	for i := range 5 {
		revision, err := c[0].s.Exec(ctxFor(t, patience), Set(fmt.Sprint("k", i), nil))
		must(t, err)
		first = cmp.Or(first, revision)
	}
	c[0].stop()
	s := c[0].start()
	var seen []uint64
	for e, err := range s.Watch(ctxFor(t, patience), "", first) {
		if err != nil {
			is(t, err, errGone)
			break
		}
		seen = append(seen, e.Revision)
		s.faults.set(faultGone, errGone)
	}
	if len(seen) != 1 || seen[0] != first+1 {
		t.Errorf("after the fault came revisions %v, the first is %d", seen, first+1)
	}
}
