package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A specimen is the directory of a member that was killed, and what it had acknowledged.
type specimen struct {
	name    string
	dir     string
	older   string // the same directory some writes earlier
	want    map[string]string
	had     map[string]bool // "KEY VALUE" of all that was ever acknowledged
	changes []string        // rows of the history
}

const historyQuery = "SELECT revision || ' ' || key || ' ' || coalesce(value, '') || ' ' || deleted || ' ' || previous FROM history ORDER BY revision"

// newSpecimens are a member whose log still has everything, one whose log was cut behind its state, and one that was closed.
func newSpecimens(t *testing.T) []specimen {
	t.Helper()
	var all []specimen
	for _, name := range []string{"whole log", "cut log", "closed"} {
		sp := specimen{name: name, dir: t.TempDir(), older: t.TempDir(), want: make(map[string]string), had: make(map[string]bool)}
		conf := Config{Dir: filepath.Join(t.TempDir(), "data"), Logger: testLogger(t), History: 64, segment: 32 << 10}
		s, err := Open(t.Context(), conf)
		must(t, err)
		rnd := rand.New(rand.NewPCG(1, 1))
		write := func(n int) {
			t.Helper()
			for range n {
				key, value := fmt.Sprintf("key/%03d", rnd.IntN(150)), someValue(rnd)
				switch rnd.IntN(5) {
				case 0:
					must(t, s.Delete(t.Context(), key))
					delete(sp.want, key)
				case 1:
					other := fmt.Sprintf("other/%03d", rnd.IntN(50))
					_, err := s.Exec(t.Context(), Set(key, []byte(value)), Set(other, []byte(key)))
					must(t, err)
					sp.want[key], sp.want[other] = value, key
					sp.had[other+" "+key] = true
				default:
					must(t, s.Set(t.Context(), key, []byte(value)))
					sp.want[key] = value
				}
				sp.had[key+" "+value] = true
			}
		}
		write(250)
		if name == "cut log" {
			past := s.Status().LastIndex - 40
			eventually(t, patience, "a short log", func() error { return cutLog(s, past) })
		}
		copyQuiet(t, s, sp.older)
		write(40)
		if name == "closed" {
			sp.changes = changesOf(t, s)
			must(t, s.Close())
			must(t, os.CopyFS(sp.dir, os.DirFS(conf.Dir)))
		} else {
			copyQuiet(t, s, sp.dir)
			sp.changes = changesOf(t, s)
			must(t, s.Close())
		}
		all = append(all, sp)
	}
	return all
}

func someValue(rnd *rand.Rand) string {
	return strconv.FormatUint(rnd.Uint64(), 36) + strings.Repeat("v", rnd.IntN(900))
}

// copyQuiet copies the directory of a member to which nobody writes, as a kill would leave it.
func copyQuiet(t *testing.T, s *Service, to string) {
	t.Helper()
	must(t, s.store.sync(t.Context()))
	s.wal.removal.Wait() // of segments, in the background
	s.store.lockFile()
	defer s.store.fileMu.Unlock()
	s.store.checkpointMu.Lock()
	defer s.store.checkpointMu.Unlock()
	must(t, os.CopyFS(to, os.DirFS(s.conf.Dir)))
	must(t, os.RemoveAll(filepath.Join(to, "snap-shm"))) // a start that finds no other process makes it anew
}

func changesOf(t *testing.T, s *Service) []string {
	t.Helper()
	rows, err := changesIn(t.Context(), s)
	must(t, err)
	return rows
}

func changesIn(ctx context.Context, s *Service) (rows []string, err error) {
	r, err := s.Query(ctx, historyQuery)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	for r.Next() {
		var text string
		if err := r.Scan(&text); err != nil {
			return nil, err
		}
		rows = append(rows, text)
	}
	return rows, r.Err()
}

// fileClasses are what a directory holds: for each the files of a member, of which one is damaged, and by what an error names it.
var fileClasses = []struct {
	name, named string
	files       func(dir string) []string
}{
	{"oldest segment", "wal", func(dir string) []string { return segmentsIn(dir)[:1] }},
	{"any segment", "wal", segmentsIn},
	{"newest segment", "wal", func(dir string) []string { l := segmentsIn(dir); return l[len(l)-1:] }},
	{"meta file", "wal", oneFile("wal/wal-meta.db")},
	{"snap", "snap", oneFile("snap")},
	{"snap-wal", "snap", oneFile("snap-wal")},
	{"id", "id", oneFile("id")},
}

func oneFile(name string) func(string) []string {
	return func(dir string) []string { return []string{filepath.Join(dir, name)} }
}

func segmentsIn(dir string) []string {
	list, _ := filepath.Glob(filepath.Join(dir, "wal", "*.wal"))
	slices.Sort(list)
	return list
}

// damage changes a file in one of the ways in which disks, and people, lose data. It says what it did; "" if that changed nothing.
func damage(t *testing.T, rnd *rand.Rand, path, older string) (what string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return ""
	}
	must(t, err)
	was := bytes.Clone(data)
	if len(data) == 0 {
		return ""
	}
	at := rnd.IntN(len(data))
	switch kind := rnd.IntN(9); kind {
	case 0, 1, 2:
		bit := rnd.IntN(8)
		data[at] ^= 1 << bit
		what = fmt.Sprintf("bit %d of byte %d flipped", bit, at)
	case 3:
		for range 8 {
			data[rnd.IntN(len(data))] ^= 1 << rnd.IntN(8)
		}
		what = "eight bits flipped"
	case 4:
		at -= at % sector
		clear(data[at:min(at+sector, len(data))])
		what = fmt.Sprintf("sector at %d zeroed", at)
	case 5:
		n := min(1+rnd.IntN(2*pageSize), len(data)-at)
		data = slices.Delete(data, at, at+n)
		what = fmt.Sprintf("%d bytes at %d dropped", n, at)
	case 6:
		data = data[:at]
		what = fmt.Sprintf("cut off at %d", at)
	case 7:
		must(t, os.Remove(path))
		return "removed"
	case 8:
		old, err := os.ReadFile(older)
		if err != nil {
			return ""
		}
		data, what = old, "an older copy of it"
	}
	if bytes.Equal(data, was) {
		return ""
	}
	must(t, os.WriteFile(path, data, 0o600))
	return what
}

// TestCampaignCorruption damages one file of a member that was killed or closed, and starts it: it answers rightly, or says which
// file is damaged and what to do. It never answers wrongly.
func TestCampaignCorruption(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	rnd := rand.New(rand.NewPCG(seed, 6))
	specimens := newSpecimens(t)
	dir := quickDir(t) // nothing here is about what a sync does
	silent, found := 0, 0
	for n := dose(40, 1000); n > 0; {
		sp := specimens[rnd.IntN(len(specimens))]
		class := fileClasses[rnd.IntN(len(fileClasses))]
		at := filepath.Join(dir, "data")
		must(t, os.CopyFS(at, os.DirFS(sp.dir)))
		files := class.files(at)
		file := files[rnd.IntN(len(files))]
		rel, err := filepath.Rel(at, file)
		must(t, err)
		if what := damage(t, rnd, file, filepath.Join(sp.older, rel)); what != "" {
			n--
			counted.corruptions.add(1)
			c := &corrupted{t: t, specimen: sp, named: class.named, dir: at, what: fmt.Sprintf("%s, %s: %s (QUORATE_SEED=%d)", sp.name, rel, what, seed)}
			if c.ask() {
				found++
			} else {
				silent++
			}
		}
		must(t, os.RemoveAll(at))
	}
	t.Logf("%d cases were found and said, %d had damaged nothing that was needed", found, silent)
}

// seedOf is where the random choices of a test begin; QUORATE_SEED repeats them.
func seedOf(t *testing.T) uint64 {
	text := os.Getenv("QUORATE_SEED")
	if text == "" {
		return rand.Uint64()
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	must(t, err)
	return seed
}

// corrupted is one case.
type corrupted struct {
	t *testing.T
	specimen
	named, dir, what string
}

// ask starts the member and asks it for everything. It tells whether the damage was found.
func (c *corrupted) ask() (found bool) {
	t := c.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := Open(ctx, Config{Dir: c.dir, Logger: testLogger(t), History: 64, segment: 32 << 10})
	if err != nil {
		c.clear("Open", err)
		return true
	}
	defer func() {
		if err := s.Close(); err != nil && s.Err() == nil {
			c.clear("Close", err)
		}
	}()
	for key := range c.want { // it may be behind until the log has been applied, and no other value was ever there
		if got := s.Stale().Get(key); got != nil && !c.had[key+" "+string(got)] {
			violated(t, "%s: Stale says that %s is %.20q, which it never was", c.what, key, got)
		}
	}
	sick := func(call string, err error) {
		t.Helper()
		if err == nil {
			return
		}
		found = true
		c.clear(call, err)
	}
	sick("Ready", s.Ready(ctx))
	for key, want := range c.want {
		checked := s.Status().Verified
		got := s.Stale().Get(key)
		switch {
		case string(got) == want, found:
		case !checked && (got == nil || c.had[key+" "+string(got)]):
			counted.staleMisses.add(1)
		default:
			violated(t, "%s: Stale says that %s is %.20q, want %.20q", c.what, key, got, want)
		}
	}
	for key, want := range c.want {
		got, err := s.Get(ctx, key)
		if err != nil {
			sick("Get", err)
			break
		}
		if string(got) != want {
			violated(t, "%s: Get says that %s is %.20q, want %.20q", c.what, key, got, want)
		}
	}
	entries := make(map[string]string)
	err = nil
	for e, wrong := range s.List(ctx, "") {
		if err = wrong; err == nil {
			entries[e.Key] = string(e.Value)
		}
	}
	sick("List", err)
	if err == nil && !maps.Equal(entries, c.want) {
		violated(t, "%s: List has %d entries, want %d", c.what, len(entries), len(c.want))
	}
	rows, err := changesIn(ctx, s)
	sick("Query", err)
	if err == nil && !reflect.DeepEqual(rows, c.changes) {
		violated(t, "%s: the history has %d rows, want %d", c.what, len(rows), len(c.changes))
	}
	if err := s.Set(ctx, "new", []byte("value")); err != nil {
		sick("Set", err)
	} else if got, err := s.Get(ctx, "new"); err != nil {
		sick("Get", err)
	} else if string(got) != "value" {
		violated(t, "%s: Get says that what was set is %.20q", c.what, got)
	}
	eventually(t, patience, c.what+": the check of the file", func() error {
		if s.Err() == nil && !s.Status().Verified {
			return errors.New("neither verified nor at fault")
		}
		return nil
	})
	sick("Err", s.Err())
	return found
}

// clear: the error says which file it is, and what to do.
func (c *corrupted) clear(call string, err error) {
	c.t.Helper()
	text := err.Error()
	helps := slices.ContainsFunc([]string{"move", "remove", "replaced", "put ", "bootURL", "upgrade", "newer"}, func(word string) bool { return strings.Contains(text, word) })
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) || !strings.Contains(text, c.named) || !helps {
		violated(c.t, "%s: %s says %q, which does not name the file and the repair", c.what, call, text)
	}
}

// TestCampaignCorruptSnapshot damages snapshots in flight: none is taken for one.
func TestCampaignCorruptSnapshot(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	rnd := rand.New(rand.NewPCG(seed, 7))
	s := newTestStore(t, testBudget)
	fill(t, s, 200, 50)
	c, err := s.copy(t.Context())
	must(t, err)
	defer c.Close()
	stream, err := io.ReadAll(c)
	must(t, err)
	dir := t.TempDir()
	sent, older := filepath.Join(dir, "stream"), filepath.Join(dir, "none")
	for n := dose(20, 300); n > 0; {
		must(t, os.WriteFile(sent, stream, 0o600))
		what := damage(t, rnd, sent, older)
		if what == "" || what == "removed" {
			continue
		}
		n--
		counted.corruptions.add(1)
		bad, err := os.ReadFile(sent)
		must(t, err)
		if _, err := receive(filepath.Join(dir, "snap.incoming"), bytes.NewReader(bad)); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
			violated(t, "a snapshot with %s (QUORATE_SEED=%d): %v", what, seed, err)
		}
		wantOnly(t, dir, "stream")
	}
}

// TestCampaignCorruptMember damages one of three and starts it again: it mends itself, or somebody does what its error says. What the
// cluster has acknowledged is there all the time.
func TestCampaignCorruptMember(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	rnd := rand.New(rand.NewPCG(seed, 8))
	c := newCluster(t, 3, func(conf *Config) { conf.segment = 32 << 10 })
	want := make(map[string]string)
	mended, replaced := 0, 0
	for n := dose(2, 60); n > 0; n-- {
		for range 20 {
			key, value := fmt.Sprint("key/", rnd.IntN(50)), someValue(rnd)
			must(t, c.leader(t).s.Set(ctxFor(t, patience), key, []byte(value)))
			want[key] = value
		}
		m := c[rnd.IntN(3)]
		if m.conf.Join == "" {
			m.conf.Join = "http://" + c[1].conf.Addr + "/raft/"
		}
		m.stop()
		what, named := "", ""
		for what == "" { // snap-wal is not there
			class := fileClasses[rnd.IntN(len(fileClasses))]
			files := class.files(m.conf.Dir)
			file := files[rnd.IntN(len(files))]
			if what = damage(t, rnd, file, filepath.Join(m.conf.Dir, "none")); what != "" {
				what, named = fmt.Sprintf("%s: %s (QUORATE_SEED=%d)", filepath.Base(file), what, seed), class.named
			}
		}
		counted.corruptions.add(1)
		say := &corrupted{t: t, named: named, what: what}
		_, err := m.open()
		if err == nil {
			eventually(t, patience, what+": well, or a fault that somebody must mend", func() error {
				if err = m.s.Err(); err != nil && strings.Contains(err.Error(), "move its directory away") {
					return nil
				}
				if err == nil && !m.s.Status().Verified {
					return errors.New("not verified")
				}
				return err
			})
		}
		if err == nil { // a background check has found what it will, or will
			err = m.s.wal.verify(ctxFor(t, patience))
		}
		if err == nil {
			mended++
		} else {
			say.clear("the member", err)
			m.stop()
			must(t, os.RemoveAll(m.conf.Dir))
			m.start()
			replaced++
		}
		must(t, m.s.Ready(ctxFor(t, patience)))
		for key, value := range want {
			if got, err := m.s.Get(ctxFor(t, patience), key); err != nil || string(got) != value {
				violated(t, "%s: Get says that %s is %.20q, %v, want %.20q", what, key, got, err, value)
				t.FailNow()
			}
		}
		eventually(t, patience, "three voters", func() error {
			if n := countVoters(c.leader(t).s.Status()); n != 3 {
				return fmt.Errorf("%d voters", n)
			}
			return nil
		})
		c.awaitEqual(t)
	}
	t.Logf("%d members mended themselves or had lost nothing, %d were replaced", mended, replaced)
}
