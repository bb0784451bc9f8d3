package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// openSole opens one member without a network.
func openSole(t testing.TB, change ...func(*Config)) *Service {
	t.Helper()
	conf := Config{Dir: filepath.Join(t.TempDir(), "data"), Logger: testLogger(t)}
	for _, f := range change {
		f(&conf)
	}
	s, err := Open(t.Context(), conf)
	must(t, err)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// wantLookup compares what Lookup says, of the member and of its view, with an entry; Version 0 = absent.
func wantLookup(t testing.TB, s *Service, want Entry) {
	t.Helper()
	for name, lookup := range map[string]func() (Entry, error){
		"Lookup":       func() (Entry, error) { return s.Lookup(ctxFor(t, patience), want.Key) },
		"Local.Lookup": func() (Entry, error) { return s.Local().Lookup(want.Key) },
	} {
		got, err := lookup()
		if !equalEntry(got, want) || (want.Version == 0) != errors.Is(err, ErrNotFound) || want.Version != 0 && err != nil {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
		}
		if want.Version == 0 && !strings.Contains(err.Error(), want.Key) {
			t.Errorf("%s: %v does not name the key", name, err)
		}
	}
}

func equalEntry(a, b Entry) bool {
	return a.Key == b.Key && a.Version == b.Version && a.Created == b.Created && bytes.Equal(a.Value, b.Value) && (a.Value == nil) == (b.Value == nil)
}

func TestLookup(t *testing.T) {
	t.Parallel()
	for name, memory := range map[string]int64{"in memory": 0, "in SQLite": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openSole(t, func(c *Config) { c.Memory = memory })
			ctx := ctxFor(t, patience)
			wantLookup(t, s, Entry{Key: "k"})
			must(t, s.Set(ctx, "k", nil))
			wantLookup(t, s, Entry{Key: "k", Value: []byte{}, Version: 1, Created: 1})
			must(t, s.Set(ctx, "other", []byte("x")))
			must(t, s.Set(ctx, "k", []byte("v")))
			wantLookup(t, s, Entry{Key: "k", Value: []byte("v"), Version: 3, Created: 1})
			must(t, s.Delete(ctx, "k"))
			wantLookup(t, s, Entry{Key: "k"})
			must(t, s.Insert(ctx, "k", []byte("again")))
			want := Entry{Key: "k", Value: []byte("again"), Version: 5, Created: 5}
			wantLookup(t, s, want)
			e, err := s.Lookup(ctx, "k")
			must(t, err)
			copy(e.Value, "XXXXX")
			if e, err = s.Local().Lookup("k"); err != nil {
				t.Fatal(err)
			}
			copy(e.Value, "YYYYY")
			wantLookup(t, s, want)
		})
	}
}

func TestLookupOfWhatIsNoKey(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	for key, want := range map[string]error{"": ErrInvalid, "a\x00b": ErrInvalid, "\xff": ErrInvalid, strings.Repeat("k", maxKey+1): ErrTooLarge} {
		for name, read := range map[string]func() error{
			"Get":          func() error { _, err := s.Get(t.Context(), key); return err },
			"Lookup":       func() error { _, err := s.Lookup(t.Context(), key); return err },
			"Local.Lookup": func() error { _, err := s.Local().Lookup(key); return err },
		} {
			if err := read(); !errors.Is(err, want) || errors.Is(err, ErrNotFound) {
				t.Errorf("%s of %.10q: %v, want %v", name, key, err, want)
			}
		}
	}
}

func TestViewAfterClose(t *testing.T) {
	t.Parallel()
	s := openSole(t)
	must(t, s.Set(t.Context(), "k", []byte("v")))
	view := s.Local()
	before := view.Freshness()
	must(t, s.Close())
	if e, err := view.Lookup("k"); !errors.Is(err, ErrClosed) || !equalEntry(e, Entry{Key: "k"}) {
		t.Errorf("Lookup: %+v, %v", e, err)
	}
	if v := view.Get("k"); v != nil {
		t.Errorf("Get: %q", v)
	}
	if after := view.Freshness(); after != before || after.Revision != 1 {
		t.Errorf("Freshness was %+v and is %+v", before, after)
	}
}

// What a member has applied gets fresh by its own reads and writes and by nothing else.
func TestFreshness(t *testing.T) {
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		view := f.s.Local()
		if at := view.Freshness().AsOf; !at.IsZero() {
			t.Errorf("before the first read or write: %v", at)
		}
		// advances: the call takes time, and AsOf is when it began.
		advances := func(what string, call func(ctx context.Context) error) {
			t.Helper()
			time.Sleep(time.Second)
			before := time.Now()
			err := call(t.Context())
			if at := view.Freshness().AsOf; at.Before(before) || at.After(before.Add(time.Millisecond)) {
				t.Errorf("%s (%v) began at %v and AsOf is %v", what, err, before, at)
			}
		}
		stays := func(what string, call func(ctx context.Context)) {
			t.Helper()
			before := view.Freshness()
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			call(ctx)
			time.Sleep(time.Second)
			if after := view.Freshness(); after.AsOf != before.AsOf {
				t.Errorf("%s took AsOf from %v to %v", what, before.AsOf, after.AsOf)
			}
		}
		get := func(ctx context.Context) error { _, err := f.s.Get(ctx, "k"); return err }
		insert := func(ctx context.Context) error { return f.s.Insert(ctx, "k", []byte("v")) }
		for _, way := range []string{"L to F", "F to L"} {
			c.obey("delay " + way + " 20ms")
		}
		advances("a read", get)
		advances("a write", insert)
		advances("a write that was refused", insert)
		advances("a lookup", func(ctx context.Context) error { _, err := f.s.Lookup(ctx, "k"); return err })
		stays("a write elsewhere", func(ctx context.Context) { must(t, l.s.Set(ctx, "k", []byte("w"))) })
		if at := view.Freshness().Revision; at != 2 || string(view.Get("k")) != "w" {
			t.Errorf("revision %d, want 2", at)
		}
		stays("what needs no other member", func(ctx context.Context) { view.Get("k"); view.Lookup("k"); f.s.Status() })
		stays("a call that is none", func(ctx context.Context) { f.s.Get(ctx, ""); f.s.Set(ctx, "", nil) })

		c.obey("heal")
		c.obey("partition {L G} {F}")
		stays("being cut off", func(ctx context.Context) {
			must(t, l.s.Set(ctx, "k", []byte("unseen")))
			if err := get(ctx); err == nil {
				t.Error("a read succeeds")
			}
			if v := view.Get("k"); string(v) != "w" {
				t.Errorf("a stale read is %q", v)
			}
		})
		stays("a write that nobody takes", func(ctx context.Context) {
			if err := f.s.Delete(ctx, "k"); err == nil {
				t.Error("a write succeeds")
			}
		})
		c.obey("heal")
		c.obey("await equal")
		advances("a read afterwards", get)
	})
}

// Whatever returned before AsOf is in the copy: here under reads that share rounds, and writes on every member.
func TestFreshnessBoundsTheAge(t *testing.T) {
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		for _, way := range []string{"L to F 7ms", "F to L 7ms", "L to G 1ms", "G to L 1ms"} {
			c.obey("delay " + way)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		var mu sync.Mutex // guards returned
		returned := map[uint64]time.Time{}
		var calls sync.WaitGroup
		for i, m := range []*scriptMember{l, f, g} {
			calls.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					key := fmt.Sprint(i, "/", n)
					if m.s.Set(ctx, key, nil) != nil {
						return
					}
					e, err := m.s.Local().Lookup(key)
					must(t, err)
					mu.Lock()
					returned[e.Version] = time.Now()
					mu.Unlock()
				}
			})
		}
		for range 8 {
			calls.Go(func() {
				for ctx.Err() == nil {
					time.Sleep(rand.N(10 * time.Millisecond))
					f.s.Get(ctx, "k")
				}
			})
		}
		looks, newest := 0, time.Time{}
		for ctx.Err() == nil {
			fresh := f.s.Local().Freshness()
			mu.Lock()
			for version, at := range returned {
				if at.Before(fresh.AsOf) && version > fresh.Revision {
					t.Errorf("revision %d returned %v before AsOf, and the copy has %d", version, fresh.AsOf.Sub(at), fresh.Revision)
				}
			}
			mu.Unlock()
			if fresh.AsOf.After(newest) {
				looks, newest = looks+1, fresh.AsOf
			}
			time.Sleep(100 * time.Microsecond)
		}
		calls.Wait()
		if looks < 20 || len(returned) < 50 {
			t.Errorf("AsOf moved %d times over %d writes", looks, len(returned))
		}
	})
}

// benchSole is a member without a network with 1,024 keys of 256 bytes.
func benchSole(b *testing.B) (s *Service, keys []string) {
	s = openSole(b)
	value := make([]byte, 256)
	var writers sync.WaitGroup
	for i := range 1024 {
		keys = append(keys, fmt.Sprintf("key/%07d", i))
		writers.Go(func() {
			if err := s.Set(context.Background(), keys[i], value); err != nil {
				b.Error(err)
			}
		})
	}
	writers.Wait()
	eventually(b, patience, "the check of the file", func() error { return s.verified(b.Context()) })
	return s, keys
}

// benchReads measures one caller, and one on each processor.
func benchReads(b *testing.B, read func(s *Service, key string) error) {
	s, keys := benchSole(b)
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if err := read(s, keys[i&1023]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for i := 0; pb.Next(); i++ {
				if err := read(s, keys[i&1023]); err != nil {
					b.Error(err)
				}
			}
		})
	})
}

func BenchmarkGet(b *testing.B) {
	ctx := b.Context()
	benchReads(b, func(s *Service, key string) error { _, err := s.Get(ctx, key); return err })
}

func BenchmarkLookup(b *testing.B) {
	ctx := b.Context()
	benchReads(b, func(s *Service, key string) error { _, err := s.Lookup(ctx, key); return err })
}

func BenchmarkStale(b *testing.B) {
	benchReads(b, func(s *Service, key string) error {
		if s.Stale().Get(key) == nil {
			return ErrNotFound
		}
		return nil
	})
}

func BenchmarkLocalLookup(b *testing.B) {
	benchReads(b, func(s *Service, key string) error { _, err := s.Local().Lookup(key); return err })
}

func BenchmarkFreshness(b *testing.B) {
	s, _ := benchSole(b)
	for b.Loop() {
		s.Local().Freshness()
	}
}

// A copy without a majority, which is when a local one is needed; and what it holds is restored.
func TestLocalBackup(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *script, l, f, g *scriptMember) {
		c.obey("set F before 1")
		c.obey("stop " + l.name)
		c.obey("stop " + g.name)
		file := filepath.Join(t.TempDir(), "backup")
		local := func() (uint64, error) {
			w, err := os.Create(file)
			must(t, err)
			defer w.Close()
			return f.s.Local().Backup(t.Context(), w)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.s.Backup(ctx, io.Discard); !errors.Is(err, ErrNoLeader) {
			t.Errorf("Backup without a majority: %v", err)
		}
		revision, err := local()
		must(t, err)
		m, err := checkFile(file)
		must(t, err)
		if want := f.s.Status().Revision; revision != want || m.revision != want {
			t.Errorf("revision %d, the file is at %d, the member at %d", revision, m.revision, want)
		}
		dir := filepath.Join(t.TempDir(), "new")
		must(t, Restore(dir, file))
		s, err := Open(t.Context(), Config{Dir: dir})
		must(t, err)
		must(t, s.Ready(t.Context()))
		if v := s.Stale().Get("before"); string(v) != "1" {
			t.Errorf("restored: %q", v)
		}
		must(t, s.Close())

		ended, end := context.WithCancelCause(t.Context())
		boom := errors.New("boom")
		end(boom)
		_, err = f.s.Local().Backup(ended, io.Discard)
		wantIs(t, "an ended context", err, boom)
		f.s.store.setVerdict(corrupt("a test"))
		_, err = local()
		wantIs(t, "damage", err, ErrCorrupt)
		must(t, f.s.Close())
		_, err = local()
		wantIs(t, "after Close", err, ErrClosed)
	})
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A backup goes to whatever its caller has for a writer.
func TestBackupToAnOddWriter(t *testing.T) {
	t.Parallel()
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	must(t, err)
	defer s.Close()
	must(t, s.Set(t.Context(), "k", make([]byte, 500_000)))
	boom := errors.New("boom")
	ctx, cancel := context.WithCancelCause(t.Context())
	for name, c := range map[string]struct {
		w    writerFunc
		want error
	}{
		"takes less":       {func(p []byte) (int, error) { return min(len(p), 10_000), nil }, io.ErrShortWrite},
		"takes nothing":    {func(p []byte) (int, error) { return 0, nil }, io.ErrShortWrite},
		"claims more":      {func(p []byte) (int, error) { return len(p) + 1, nil }, io.ErrShortWrite},
		"less than none":   {func(p []byte) (int, error) { return -1, nil }, io.ErrShortWrite},
		"fails":            {func(p []byte) (int, error) { return 0, boom }, boom},
		"ends its context": {func(p []byte) (int, error) { cancel(boom); return len(p), nil }, boom},
		"calls the store":  {func(p []byte) (int, error) { return len(p), s.Set(t.Context(), "x", nil) }, nil},
	} {
		for way, backup := range map[string]func(context.Context, io.Writer) (uint64, error){"Service": s.Backup, "View": s.Local().Backup} {
			use := t.Context()
			if name == "ends its context" {
				if use = ctx; ctx.Err() != nil {
					continue
				}
			}
			if _, err := backup(use, c.w); !errors.Is(err, c.want) {
				t.Errorf("%s, a writer that %s: %v, want %v", way, name, err, c.want)
			}
		}
	}
}
