package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("QUORATE_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func wantGet(t testing.TB, s *Service, key string, want []byte) {
	t.Helper()
	got, err := s.Get(ctxFor(t, patience), key)
	if err != nil || !bytes.Equal(got, want) || (got == nil) != (want == nil) {
		t.Fatalf("Get(%q) = %q (nil: %v), %v; want %q (nil: %v)", key, got, got == nil, err, want, want == nil)
	}
}

func wantStale(t testing.TB, s *Service, key string, want []byte) {
	t.Helper()
	if got := s.Stale().Get(key); !bytes.Equal(got, want) || (got == nil) != (want == nil) {
		t.Fatalf("Stale().Get(%q) = %q (nil: %v); want %q (nil: %v)", key, got, got == nil, want, want == nil)
	}
}

// wantIs checks that err is each of these.
func wantIs(t testing.TB, what string, err error, targets ...error) {
	t.Helper()
	for _, target := range targets {
		if !errors.Is(err, target) {
			t.Errorf("%s: error %v is not %q", what, err, target)
		}
	}
}

// checkVerdict: the error of a write is ErrUnsatisfied and nothing else, or exactly one of ErrNotApplied and ErrUncertain.
func checkVerdict(t testing.TB, what string, err error) {
	t.Helper()
	unsatisfied, not, uncertain := errors.Is(err, ErrUnsatisfied), errors.Is(err, ErrNotApplied), errors.Is(err, ErrUncertain)
	n := 0
	for _, is := range []bool{unsatisfied, not, uncertain} {
		if is {
			n++
		}
	}
	if err != nil && n != 1 || unsatisfied && err != ErrUnsatisfied {
		t.Errorf("%s: error %v is unsatisfied: %v, not applied: %v, uncertain: %v", what, err, unsatisfied, not, uncertain)
	}
}

// writes is every call that changes something.
func writes(s *Service) map[string]func(ctx context.Context) error {
	return map[string]func(ctx context.Context) error{
		"Set":    func(ctx context.Context) error { return s.Set(ctx, "k", []byte("v")) },
		"Insert": func(ctx context.Context) error { return s.Insert(ctx, "k", []byte("v")) },
		"Delete": func(ctx context.Context) error { return s.Delete(ctx, "k") },
		"Exec":   func(ctx context.Context) error { _, err := s.Exec(ctx, Set("k", nil), Delete("l")); return err },
		"Update": func(ctx context.Context) error {
			_, err := s.Update(ctx, "k", func(Entry) ([]byte, error) { return nil, nil })
			return err
		},
		"AddAllowedMember": func(ctx context.Context) error { return s.AddAllowedMember(ctx, "127.0.0.1:9") },
		"RemoveMember":     func(ctx context.Context) error { return s.RemoveMember(ctx, "127.0.0.1:9") },
	}
}

func TestContract(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 3, 5} {
		t.Run(fmt.Sprintf("%d members", n), func(t *testing.T) {
			c := newCluster(t, n)
			for i, m := range c {
				t.Run(fmt.Sprintf("called on member %d", i), func(t *testing.T) { testContract(t, m.s, n, fmt.Sprint("member", i, "/")) })
			}
			t.Run("an insert that races has one winner", func(t *testing.T) { testInsertRace(t, c) })
			c.awaitEqual(t)
		})
	}
}

func testContract(t *testing.T, s *Service, n int, prefix string) {
	ctx := ctxFor(t, 2*patience)
	a, b := prefix+"a", prefix+"b"
	must(t, s.Ready(ctx))
	must(t, s.Err())

	wantGet(t, s, a, nil)
	wantStale(t, s, a, nil)
	value := []byte("one")
	must(t, s.Set(ctx, a, value))
	wantStale(t, s, a, []byte("one"))
	copy(value, "XXX")
	wantGet(t, s, a, []byte("one"))
	got, err := s.Get(ctx, a)
	must(t, err)
	copy(got, "YYY")
	copy(s.Stale().Get(a), "ZZZ")
	wantGet(t, s, a, []byte("one"))
	wantStale(t, s, a, []byte("one"))

	for _, empty := range [][]byte{nil, {}} {
		must(t, s.Set(ctx, a, empty))
		wantStale(t, s, a, []byte{})
		wantGet(t, s, a, []byte{})
	}
	if err := s.Insert(ctx, a, []byte("two")); err != ErrUnsatisfied {
		t.Errorf("Insert of an existing key: %v, want ErrUnsatisfied itself", err)
	}
	checkVerdict(t, "Insert of an existing key", ErrUnsatisfied)
	wantGet(t, s, a, []byte{})
	must(t, s.Insert(ctx, b, nil))
	wantGet(t, s, b, []byte{})

	must(t, s.Delete(ctx, b))
	wantStale(t, s, b, nil)
	wantGet(t, s, b, nil)
	before := s.Status().Revision
	must(t, s.Delete(ctx, b))
	if after := s.Status().Revision; after != before {
		t.Errorf("deleting a missing key took revision %d to %d", before, after)
	}
	must(t, s.Insert(ctx, b, []byte("again")))
	if after := s.Status().Revision; after != before+1 {
		t.Errorf("inserting a key took revision %d to %d", before, after)
	}
	must(t, s.Set(ctx, b, []byte("again")))
	if after := s.Status().Revision; after != before+2 {
		t.Errorf("setting an equal value is a change; the revision went from %d to %d", before, after)
	}

	addr := "member.example:7001"
	for range 2 {
		must(t, s.AddAllowedMember(ctx, addr))
	}
	for range 2 { // the second time nobody is allowed there any more, and nobody was ever there
		must(t, s.RemoveMember(ctx, addr))
	}

	st := s.Status()
	if len(st.Members) != n || st.ID == "" || st.Cluster == "" || st.Addr == "" || st.LeaderID == "" || st.LeaderAddr == "" ||
		st.Term == 0 || st.AppliedIndex == 0 || st.LastIndex < st.AppliedIndex || st.CommitIndex < st.AppliedIndex || st.Hash == "" {
		t.Errorf("Status has gaps: %+v", st)
	}
	if role := st.Role; role != Leader && role != Follower || (role == Leader) != (st.LeaderID == st.ID) {
		t.Errorf("role %v of %s, the leader is %s", role, st.ID, st.LeaderID)
	}
	for _, m := range st.Members {
		if !m.Voter || m.ID == "" || m.Addr == "" || (m.ID == st.ID) != (m.Heard == 0) {
			t.Errorf("member %+v, as seen by %s", m, st.ID)
		}
	}

	var backup bytes.Buffer
	revision, err := s.Backup(ctx, &backup)
	must(t, err)
	if revision != st.Revision || !bytes.HasPrefix(backup.Bytes(), []byte("SQLite format 3\x00")) {
		t.Errorf("a backup of %d bytes, revision %d; want a database, revision %d", backup.Len(), revision, st.Revision)
	}
}

func testInsertRace(t *testing.T, c testCluster) {
	const keys = 20
	ctx := ctxFor(t, patience)
	var wg sync.WaitGroup
	won := make([][keys]bool, len(c))
	for i, m := range c {
		for k := range keys {
			wg.Go(func() {
				switch err := m.s.Insert(ctx, fmt.Sprint("race", k), fmt.Append(nil, i)); err {
				case nil:
					won[i][k] = true
				case ErrUnsatisfied:
				default:
					t.Errorf("member %d, key %d: %v", i, k, err)
				}
			})
		}
	}
	wg.Wait()
	for k := range keys {
		winners := 0
		for i := range c {
			if won[i][k] {
				winners++
				for _, m := range c {
					wantGet(t, m.s, fmt.Sprint("race", k), fmt.Append(nil, i))
				}
			}
		}
		if winners != 1 {
			t.Errorf("key %d: %d inserts returned nil", k, winners)
		}
	}
}

// A write that has returned anywhere is seen by a Get that is called afterwards on any other member.
func TestGetSeesWritesOfOthers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	for i := range 60 {
		must(t, c[i%3].s.Set(ctxFor(t, patience), "k", fmt.Append(nil, i)))
		wantGet(t, c[(i+1)%3].s, "k", fmt.Append(nil, i))
		wantGet(t, c[(i+2)%3].s, "k", fmt.Append(nil, i))
	}
}

func TestMemberWithoutNetwork(t *testing.T) {
	m := newMember(t, "")
	addr := m.conf.Addr
	m.conf.Addr = ""
	s, err := Open(t.Context(), m.conf)
	must(t, err)
	must(t, s.Set(ctxFor(t, patience), "k", []byte("alone")))
	wantGet(t, s, "k", []byte("alone"))
	st := s.Status()
	if st.Addr != "" || len(st.Members) != 1 || st.Role != Leader {
		t.Errorf("status %+v", st)
	}
	must(t, s.Close())

	m.conf.Addr = addr
	c := testCluster{m}
	m.start()
	wantGet(t, m.s, "k", []byte("alone"))
	eventually(t, patience, "the address in the configuration", func() error {
		if got := m.s.Status().Members[0].Addr; got != addr {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	for range 2 {
		o := newMember(t, addr)
		must(t, m.s.AddAllowedMember(ctxFor(t, patience), o.conf.Addr))
		o.start()
		c = append(c, o)
	}
	c.awaitVoters(t, 3)
	for _, o := range c {
		wantGet(t, o.s, "k", []byte("alone"))
	}

	for _, o := range c {
		o.stop()
	}
	t.Run("a directory of three needs an address", func(t *testing.T) {
		conf := c[1].conf
		conf.Addr, conf.Join = "", ""
		s, err := Open(t.Context(), conf)
		wantIs(t, "Open", err, ErrInvalid)
		if s != nil || !strings.Contains(fmt.Sprint(err), "Addr") {
			t.Errorf("Open = %v, %v", s, err)
		}
	})
	for _, o := range c {
		o.start()
	}
	c.awaitVoters(t, 3)
	wantGet(t, c[2].s, "k", []byte("alone"))
}

func TestOpenRefusesBadConfig(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	file := filepath.Join(base, "file")
	must(t, os.WriteFile(file, []byte("not a directory"), 0o600))
	unwritable := filepath.Join(base, "unwritable")
	must(t, os.Mkdir(unwritable, 0o500))
	if os.Geteuid() == 0 { // whom a mode does not stop
		unwritable = "/proc/1/task"
	}
	for _, c := range []struct {
		words  string
		change func(*Config)
		target error  // nil: one of the system's
		says   string // part of what a person reads
	}{
		{"no directory", func(c *Config) { c.Dir = "" }, ErrInvalid, "Dir"},
		{"an address without a port", func(c *Config) { c.Addr = "127.0.0.1" }, ErrInvalid, "port"},
		{"an address without a host", func(c *Config) { c.Addr = ":7001" }, ErrInvalid, "host"},
		{"0.0.0.0", func(c *Config) { c.Addr = "0.0.0.0:7001" }, ErrInvalid, "0.0.0.0"},
		{"[::]", func(c *Config) { c.Addr = "[::]:7001" }, ErrInvalid, "::"},
		{"port 0", func(c *Config) { c.Addr = "127.0.0.1:0" }, ErrInvalid, "port"},
		{"a port by name", func(c *Config) { c.Addr = "127.0.0.1:http" }, ErrInvalid, "port"},
		{"Join without Addr", func(c *Config) { c.Addr, c.Join = "", "127.0.0.1:7002" }, ErrInvalid, "address"},
		{"a Join that is no address", func(c *Config) { c.Join = "ftp://x" }, ErrInvalid, "http"},
		{"a MaxValue below 0", func(c *Config) { c.MaxValue = -1 }, ErrInvalid, "MaxValue"},
		{"a MaxValue above 16 MiB", func(c *Config) { c.MaxValue = 16<<20 + 1 }, ErrInvalid, "MaxValue"},
		{"a Timeout below 0", func(c *Config) { c.Timeout = -1 }, ErrInvalid, "Timeout"},
		{"a directory that is a file", func(c *Config) { c.Dir = file }, ErrInvalid, file},
		{"a directory below a file", func(c *Config) { c.Dir = filepath.Join(file, "data") }, ErrInvalid, file},
		{"a directory that can't be written", func(c *Config) { c.Dir = filepath.Join(unwritable, "data") }, nil, unwritable},
	} {
		t.Run(c.words, func(t *testing.T) {
			conf := Config{Dir: filepath.Join(base, "made", "data"), Addr: "127.0.0.1:7001"}
			c.change(&conf)
			s, err := Open(t.Context(), conf)
			if s != nil || err == nil {
				t.Fatalf("Open = %v, %v", s, err)
			}
			if c.target != nil {
				wantIs(t, "Open", err, c.target)
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %q does not speak of %q", err, c.says)
			}
			wantOnly(t, base, "file", "unwritable")
		})
	}
	if s, err := Start("127.0.0.1", filepath.Join(base, "made"), "", nil, false); s != nil || !errors.Is(err, ErrInvalid) {
		t.Errorf("Start without a port = %v, %v", s, err)
	}
}

func TestBadInputChangesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(c *Config) { c.MaxValue = 1000 })
	s := c[0].s
	must(t, s.Set(ctxFor(t, patience), "k", []byte("v")))
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	expired, cancel := context.WithTimeout(context.Background(), -time.Second)
	defer cancel()
	before := s.Status()
	live := ctxFor(t, patience)
	long := strings.Repeat("k", maxKey+1)
	for _, c := range []struct {
		words  string
		key    string
		value  []byte
		ctx    context.Context
		target error
	}{
		{"empty key", "", nil, live, ErrInvalid},
		{"key that is not UTF-8", "a\xffb", nil, live, ErrInvalid},
		{"key with a NUL", "a\x00b", nil, live, ErrInvalid},
		{"key too long", long, nil, live, ErrTooLarge},
		{"value too large", "k", make([]byte, 1001), live, ErrTooLarge},
		{"context that was cancelled", "k", nil, cancelled, context.Canceled},
		{"context that has expired", "k", nil, expired, context.DeadlineExceeded},
	} {
		t.Run(c.words, func(t *testing.T) {
			for what, err := range map[string]error{
				"Set":    s.Set(c.ctx, c.key, c.value),
				"Insert": s.Insert(c.ctx, c.key, c.value),
			} {
				wantIs(t, what, err, ErrNotApplied, c.target)
				checkVerdict(t, what, err)
			}
			if c.value != nil {
				return
			}
			err := s.Delete(c.ctx, c.key)
			wantIs(t, "Delete", err, ErrNotApplied, c.target)
			v, err := s.Get(c.ctx, c.key)
			wantIs(t, "Get", err, c.target)
			if v != nil {
				t.Errorf("Get has a value beside its error: %q", v)
			}
			if c.target == ErrInvalid || c.target == ErrTooLarge {
				wantStale(t, s, c.key, nil)
			}
		})
	}
	t.Run("the limit is in the error", func(t *testing.T) {
		var limit *LimitError
		if err := s.Set(live, long, nil); !errors.As(err, &limit) || limit.Limit != maxKey || limit.Got != maxKey+1 ||
			!strings.HasSuffix(err.Error(), "4097 key bytes, the limit is 4096") {
			t.Errorf("error %v", err)
		}
		if err := s.Set(live, "k", make([]byte, 1001)); !errors.As(err, &limit) || limit.Limit != 1000 || limit.Got != 1001 {
			t.Errorf("error %v", err)
		}
	})
	t.Run("addresses", func(t *testing.T) {
		for _, addr := range []string{"", "127.0.0.1", ":7001", "0.0.0.0:7001", "[::]:7001", "127.0.0.1:0", "::1:7001", "a b:1"} {
			for what, err := range map[string]error{"AddAllowedMember": s.AddAllowedMember(live, addr), "RemoveMember": s.RemoveMember(live, addr)} {
				wantIs(t, what+" "+addr, err, ErrInvalid, ErrNotApplied)
				checkVerdict(t, what, err)
			}
		}
		for what, err := range map[string]error{"AddAllowedMember": s.AddAllowedMember(cancelled, "a:1"), "RemoveMember": s.RemoveMember(cancelled, "a:1")} {
			wantIs(t, what, err, context.Canceled, ErrNotApplied)
		}
	})
	t.Run("Backup", func(t *testing.T) {
		_, err := s.Backup(expired, &bytes.Buffer{})
		wantIs(t, "Backup", err, context.DeadlineExceeded)
	})
	after := s.Status()
	if before.Revision != after.Revision || before.Hash != after.Hash || before.LastIndex != after.LastIndex {
		t.Errorf("revision %d, hash %s, log up to %d; before it was %d, %s, %d",
			after.Revision, after.Hash, after.LastIndex, before.Revision, before.Hash, before.LastIndex)
	}
}

// Whoever leads without being able to reach a majority can't know what becomes of a write; whoever has no leader does.
func TestVerdictsWithoutMajority(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.Timeout = 2 * time.Second })
	l := c.leader(t)
	for _, m := range c {
		if m != l {
			m.isolate()
		}
	}
	ctx := ctxFor(t, time.Second)
	err := l.s.Set(ctx, "sent", []byte("v"))
	wantIs(t, "Set that was in the leader's log", err, ErrUncertain, context.DeadlineExceeded)
	checkVerdict(t, "Set", err)
	eventually(t, patience, "nobody leads", func() error {
		for i, m := range c {
			if st := m.s.Status(); st.LeaderID != "" {
				return fmt.Errorf("member %d is %v and follows %s", i, st.Role, st.LeaderID)
			}
		}
		return nil
	})
	var wg sync.WaitGroup
	brief := func() context.Context { return ctxFor(t, 300*time.Millisecond) }
	for i, m := range c {
		for what, f := range writes(m.s) {
			wg.Go(func() {
				err := f(brief())
				what := fmt.Sprintf("%s on member %d, which has no leader", what, i)
				checkVerdict(t, what, err)
				wantIs(t, what, err, ErrNotApplied, ErrNoLeader, context.DeadlineExceeded)
			})
		}
		wg.Go(func() {
			_, err := m.s.Get(brief(), "k")
			wantIs(t, "Get", err, ErrNoLeader, context.DeadlineExceeded)
			wantStale(t, m.s, "k", nil)
		})
		wg.Go(func() {
			err := m.s.Ready(brief())
			wantIs(t, "Ready", err, context.DeadlineExceeded)
			if !strings.Contains(fmt.Sprint(err), "1 of 3 voters reachable, need 2") {
				t.Errorf("Ready says %v", err)
			}
		})
		wg.Go(func() {
			_, err := m.s.Backup(brief(), &bytes.Buffer{})
			wantIs(t, "Backup", err, ErrNoLeader)
		})
	}
	wg.Wait()
	patient := writes(l.s)
	patient["Get"] = func(ctx context.Context) error { _, err := l.s.Get(ctx, "k"); return err }
	patient["Ready"] = l.s.Ready
	patient["Backup"] = func(ctx context.Context) error { _, err := l.s.Backup(ctx, &bytes.Buffer{}); return err }
	for what, f := range patient {
		wg.Go(func() {
			began := time.Now()
			wantIs(t, what+" with no deadline", f(context.Background()), context.DeadlineExceeded)
			if d := time.Since(began); d < time.Second || d > patience {
				t.Errorf("%s returned after %v, Config.Timeout is 2 s", what, d)
			}
		})
	}
	wg.Wait()
	for _, m := range c {
		if m != l {
			m.rejoin()
		}
	}
	c.awaitVoters(t, 3)
	wantGet(t, l.s, "k", nil) // none of the writes that were not applied is
	for _, m := range c {
		must(t, m.s.Set(ctxFor(t, patience), "after", []byte("v")))
	}
	c.awaitEqual(t)
}

func TestSentinels(t *testing.T) {
	c := newCluster(t, 3)
	l := c.leader(t)
	ctx := ctxFor(t, 2*patience)
	t.Run("ErrLocked", func(t *testing.T) {
		began := time.Now()
		s, err := Open(ctx, l.conf)
		wantIs(t, "Open of a directory in use", err, ErrLocked)
		if s != nil || time.Since(began) > 2*time.Second {
			t.Errorf("Open = %v after %v", s, time.Since(began))
		}
		wantGet(t, l.s, "k", nil)
	})
	t.Run("ErrNotAllowed", func(t *testing.T) {
		m := newMember(t, l.conf.Addr)
		s, err := m.openUntil(notAllowedYet)
		wantIs(t, "Open of a member that is not allowed", err, ErrNotAllowed)
		if s != nil || !strings.Contains(fmt.Sprint(err), "AddAllowedMember") || !strings.Contains(fmt.Sprint(err), m.conf.Addr) {
			t.Errorf("Open = %v, %v", s, err)
		}
	})
	t.Run("ErrRemoved", func(t *testing.T) {
		m := c.follower(t)
		must(t, l.s.RemoveMember(ctx, m.conf.Addr))
		eventually(t, patience, "it learns that", func() error {
			if err := m.s.Err(); !errors.Is(err, ErrRemoved) {
				return fmt.Errorf("Err() is %v", err)
			}
			return nil
		})
		for what, f := range writes(m.s) {
			err := f(ctx)
			wantIs(t, what, err, ErrRemoved, ErrNotApplied)
			checkVerdict(t, what, err)
		}
		_, err := m.s.Get(ctx, "k")
		wantIs(t, "Get", err, ErrRemoved)
		wantIs(t, "Ready", m.s.Ready(ctx), ErrRemoved)
		if role := m.s.Status().Role; role != Removed {
			t.Errorf("role %v", role)
		}
	})
	t.Run("ErrInvalid", func(t *testing.T) {
		alone := newCluster(t, 1)[0]
		err := alone.s.RemoveMember(ctx, alone.conf.Addr)
		wantIs(t, "RemoveMember of the only voter", err, ErrInvalid, ErrNotApplied)
		checkVerdict(t, "RemoveMember", err)
	})
	closed := func() *testMember { m := newCluster(t, 1)[0]; m.stop(); return m }
	t.Run("ErrFormat", func(t *testing.T) {
		m := closed()
		sqlite3(t, filepath.Join(m.conf.Dir, "snap"), "pragma user_version = 99")
		_, err := m.open()
		wantIs(t, "Open of a newer snap", err, ErrFormat)
	})
	t.Run("ErrCorrupt", func(t *testing.T) {
		m := closed()
		path := filepath.Join(m.conf.Dir, "id")
		data, err := os.ReadFile(path)
		must(t, err)
		data[len(data)/2] ^= 1
		must(t, os.WriteFile(path, data, 0o600))
		_, err = m.open()
		wantIs(t, "Open with a flipped bit in id", err, ErrCorrupt)
		if !strings.Contains(fmt.Sprint(err), path) {
			t.Errorf("error %v does not name %s", err, path)
		}
	})
}

func TestCloseWithCallsInFlight(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"while all is well", "without a majority", "on a follower that hears of nothing"} {
		t.Run(way, func(t *testing.T) {
			c := newCluster(t, 3)
			l := c.leader(t)
			s := l.s
			must(t, s.Set(ctxFor(t, patience), "k", []byte("v")))
			switch way {
			case "without a majority":
				for _, m := range c {
					if m != l {
						m.isolate()
					}
				}
			case "on a follower that hears of nothing":
				l = c.follower(t)
				s = l.s
				l.cut()
			}
			closing := make(chan struct{})
			var start time.Time
			stopped := make(chan struct{})
			var wg sync.WaitGroup
			var late sync.Map
			for i := range 64 {
				wg.Go(func() {
					ctx := context.Background()
					for n := 0; ; n++ {
						var err error
						switch i % 8 {
						case 0, 1, 2:
							err = s.Set(ctx, fmt.Sprint("k", i), fmt.Append(nil, n))
							checkVerdict(t, "Set", err)
						case 3:
							err = s.Insert(ctx, fmt.Sprint("n", i, "/", n), nil)
							checkVerdict(t, "Insert", err)
						case 4:
							_, err = s.Get(ctx, "k")
						case 5:
							err = s.AddAllowedMember(ctx, fmt.Sprintf("127.0.0.1:%d", 1+n%1000))
							checkVerdict(t, "AddAllowedMember", err)
						case 6:
							err = s.RemoveMember(ctx, "127.0.0.1:9")
							checkVerdict(t, "RemoveMember", err)
						case 7:
							if i%16 == 7 {
								err = s.Ready(ctx)
							} else {
								_, err = s.Backup(ctx, &bytes.Buffer{})
							}
						}
						if err != nil {
							if way == "while all is well" && i%8 != 6 && errors.Is(err, ErrUncertain) {
								t.Errorf("call %d: %v, and Close waits for what it has accepted", i, err)
							}
							if !errors.Is(err, ErrClosed) {
								t.Errorf("call %d: error %v, want ErrClosed", i, err)
							}
							select {
							case <-closing:
								late.Store(i, time.Now())
							default:
								t.Errorf("call %d ended before Close: %v", i, err)
							}
							return
						}
					}
				})
			}
			go func() { // all of the calls are somewhere inside by then
				<-time.After(300 * time.Millisecond)
				start = time.Now()
				close(closing)
				l.stop()
				close(stopped)
			}()
			wg.Wait()
			<-stopped
			late.Range(func(i, at any) bool {
				if d := at.(time.Time).Sub(start); d > 30*time.Second {
					t.Errorf("call %v returned %v after Close began", i, d)
				}
				return true
			})
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("Close took %v", took)
			} else {
				t.Logf("Close took %v", took)
			}
		})
	}
}

// Raft ends when its calls to the others have ended, and these must not wait for members that take a call and never answer.
func TestCloseWhileOthersHang(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	l := c.leader(t)
	must(t, l.s.Set(ctxFor(t, patience), "k", nil))
	hangs := make(chan struct{}, 1)
	for _, m := range c {
		if m != l {
			m.behind(func(http.Handler) http.Handler {
				return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/raft/append" && r.Header.Get(headerFrom) == l.s.ident().id {
						give(hangs)
					}
					io.Copy(io.Discard, r.Body) // or nothing notices that the caller has gone
					<-r.Context().Done()
				})
			})
		}
	}
	set := make(chan error, 1)
	go func() { set <- l.s.Set(context.Background(), "k", nil) }()
	<-hangs
	must(t, l.s.Close())
	if err := <-set; !errors.Is(err, ErrClosed) {
		t.Errorf("the write ended with %v", err)
	}
}

// A member alone hands over to nobody: what it has accepted ends with an answer all the same.
func TestCloseWaitsForAcceptedWrites(t *testing.T) {
	m := newCluster(t, 1)[0]
	var wg sync.WaitGroup
	var mu sync.Mutex
	wrote := make(map[string]bool)
	s := m.s
	under := make(chan struct{}, 1<<20)
	for w := range 64 {
		wg.Go(func() {
			for n := 0; ; n++ {
				key := fmt.Sprint(w, "/", n)
				if err := s.Set(context.Background(), key, nil); err != nil {
					wantIs(t, key, err, ErrClosed, ErrNotApplied)
					checkVerdict(t, key, err)
					return
				}
				mu.Lock()
				wrote[key] = true
				mu.Unlock()
				under <- struct{}{}
			}
		})
	}
	for range 1000 {
		<-under
	}
	m.stop()
	wg.Wait()
	s = m.start()
	must(t, s.Ready(ctxFor(t, patience)))
	if keys := s.store.meta().keys; keys != uint64(len(wrote)) {
		t.Errorf("%d writes were acknowledged and there are %d keys", len(wrote), keys)
	}
	for key := range wrote {
		wantStale(t, s, key, []byte{})
	}
}

// A member that has an index to wait for, which nobody will send it, gives it up when it closes.
func TestCloseEndsGetThatWaits(t *testing.T) {
	c := newCluster(t, 3)
	f := c.follower(t)
	f.cut() // nobody reaches it; it reaches the leader
	l := c.leader(t)
	must(t, l.s.Set(ctxFor(t, patience), "k", []byte("v")))
	ended := make(chan error, 1)
	go func() {
		_, err := f.s.Get(context.Background(), "k")
		ended <- err
	}()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatalf("Get before Close: %v", err)
		}
		t.Skip("the member had the entry already")
	case <-time.After(200 * time.Millisecond):
	}
	began := time.Now()
	f.stop()
	select {
	case err := <-ended:
		wantIs(t, "Get", err, ErrClosed)
	case <-time.After(patience):
		t.Fatal("Get has not returned")
	}
	t.Logf("Close took %v", time.Since(began))
}

func TestClose(t *testing.T) {
	before := runtime.NumGoroutine()
	calls := &callCounter{counts: make(map[string]int)}
	c := newCluster(t, 3, func(c *Config) {
		c.Client = &http.Client{Transport: counting{c.Client.Transport.(*http.Transport), calls}}
	})
	ctx := ctxFor(t, 2*patience)
	l := c.leader(t)
	for i := range 100 {
		must(t, l.s.Set(ctx, fmt.Sprint("k", i), []byte("v")))
	}
	s, dir := l.s, l.conf.Dir
	var wg sync.WaitGroup
	began := time.Now()
	for range 8 {
		wg.Go(func() {
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	if n := calls.of("/raft/timeoutnow"); n != 1 {
		t.Errorf("the leader has handed over %d times, want once", n)
	}
	if took > 5*time.Second {
		t.Errorf("Close took %v with a healthy majority", took)
	}
	began = time.Now()
	for _, m := range c {
		if m != l {
			must(t, m.s.Set(ctx, "after", []byte("v")))
			wantGet(t, m.s, "after", []byte("v"))
		}
	}
	t.Logf("Close took %v, the others had written %v later", took, time.Since(began))
	must(t, s.Close())

	t.Run("every call is ErrClosed", func(t *testing.T) {
		for what, f := range writes(s) {
			err := f(ctx)
			wantIs(t, what, err, ErrClosed, ErrNotApplied)
			checkVerdict(t, what, err)
		}
		_, err := s.Get(ctx, "k1")
		wantIs(t, "Get", err, ErrClosed)
		_, err = s.Backup(ctx, &bytes.Buffer{})
		wantIs(t, "Backup", err, ErrClosed)
		wantIs(t, "Ready", s.Ready(ctx), ErrClosed)
		wantIs(t, "Err", s.Err(), ErrClosed)
		wantStale(t, s, "k1", nil)
		if role := s.Status().Role; role != Closed {
			t.Errorf("role %v", role)
		}
	})
	t.Run("the directory holds id, snap and wal", func(t *testing.T) { wantOnly(t, dir, "id", "snap", "wal") })
	t.Run("snap is a database that can be copied", func(t *testing.T) {
		data, err := os.ReadFile(filepath.Join(dir, "snap"))
		must(t, err)
		if data[18] != 1 || data[19] != 1 {
			t.Errorf("journal mode bytes %d and %d, want 1 and 1", data[18], data[19])
		}
		apart := t.TempDir()
		path := filepath.Join(apart, "copy")
		must(t, os.WriteFile(path, data, 0o600))
		if got := sqlite3(t, "-readonly", path, "pragma integrity_check; select count(*) from kv"); got != "ok\n100" {
			t.Errorf("sqlite3 says %q", got)
		}
		wantOnly(t, apart, "copy")
		if got := sqlite3(t, "-readonly", filepath.Join(dir, "snap"), "select value from kv where key = 'k7'"); got != "v" {
			t.Errorf("sqlite3 says %q", got)
		}
		wantOnly(t, dir, "id", "snap", "wal")
	})
	t.Run("nothing is left of it", func(t *testing.T) {
		for _, m := range c {
			m.stop()
			m.conf.Client.CloseIdleConnections()
		}
		eventually(t, patience, "goroutines", func() error {
			if n := runtime.NumGoroutine(); n > before+2 { // of the subtest and of the test runner
				stacks := make([]byte, 1<<20)
				return fmt.Errorf("%d, %d before the test\n%s", n, before, stacks[:runtime.Stack(stacks, true)])
			}
			return nil
		})
		wantNoFiles(t, filepath.Dir(dir))
	})
	t.Run("it opens again", func(t *testing.T) {
		for _, m := range c {
			m.start()
		}
		wantGet(t, l.s, "after", []byte("v"))
	})
}

// callCounter counts what members ask of each other, by path.
type callCounter struct {
	mu     sync.Mutex // guards counts
	counts map[string]int
}

func (c *callCounter) of(path string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[path]
}

type counting struct {
	*http.Transport
	calls *callCounter
}

func (c counting) RoundTrip(r *http.Request) (*http.Response, error) {
	c.calls.mu.Lock()
	c.calls.counts[r.URL.Path]++
	c.calls.mu.Unlock()
	return c.Transport.RoundTrip(r)
}

// underRace: the race detector makes SQLite, which is Go here, about ten times slower.
func underRace() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// wantNoFiles fails if this process has a file open below dir.
func wantNoFiles(t *testing.T, dir string) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil || len(links) == 0 {
		t.Log("this system does not tell which files are open")
		return
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, dir) {
			t.Errorf("%s is still open", to)
		}
	}
}

// sqlite3 runs the real tool, which people will use beside us.
func sqlite3(t testing.TB, args ...string) string {
	t.Helper()
	tool, err := exec.LookPath("sqlite3")
	if err != nil {
		t.Fatal("this test needs the sqlite3 command: apt-get install sqlite3, brew install sqlite, or https://sqlite.org/download.html")
	}
	if args[0] != "-readonly" { // a writer waits for its turn; a reader never has to
		args = append([]string{"-cmd", ".timeout 10000"}, args...)
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("sqlite3 %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestSQLiteToolReadsUnderLoad(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	s, path := c[0].s, filepath.Join(c[0].conf.Dir, "snap")
	ctx := ctxFor(t, 2*patience)
	for key, value := range map[string]string{"flag": "on", "other": "off", "blob": "\xff\x00", "nul": "a\x00b", "empty": "", "word": "größer"} {
		must(t, s.Set(ctx, key, []byte(value)))
	}
	must(t, s.store.sync(ctx))
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if err := s.Set(ctx, fmt.Sprint("load", i), fmt.Append(nil, n)); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	for range 5 {
		for query, want := range map[string]string{
			"select key from kv where value = 'on'":                                          "flag",
			"select value from kv where key = 'word'":                                        "größer",
			"select group_concat(key || ' ' || typeof(value), ', ') from kv where key < 'l'": "blob blob, empty text, flag text",
			"select typeof(value), hex(value) from kv where key = 'nul'":                     "blob|610062",
			"select count(*) from kv where version < 1 or created < 1":                       "0",
		} {
			if got := sqlite3(t, "-readonly", path, query); got != want {
				t.Errorf("%s\n%s, want %s", query, got, want)
			}
		}
		if rows := strings.Split(sqlite3(t, "-readonly", path, "select key, value, version from kv"), "\n"); len(rows) < 6 {
			t.Errorf("%d rows: %v", len(rows), rows)
		}
	}
	stop()
	wg.Wait()
	must(t, s.Err())
	c[0].stop()
	wantOnly(t, c[0].conf.Dir, "id", "snap", "wal")
}

func TestSizes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(c *Config) { c.MaxValue = maxValueEver })
	ctx := ctxFor(t, 2*patience)
	f := c.follower(t)
	largest := maxValueEver
	if underRace() {
		largest /= 8
	}
	for _, size := range []int{1 << 20, largest} {
		value := bytes.Repeat([]byte("0123456789abcdef"), size/16)
		must(t, f.s.Set(ctx, "large", value))
		for _, m := range c {
			wantGet(t, m.s, "large", value)
		}
	}
	key := strings.Repeat("ж", maxKey/2)
	must(t, f.s.Insert(ctx, key, []byte("v")))
	for _, m := range c {
		wantGet(t, m.s, key, []byte("v"))
	}
	must(t, f.s.Delete(ctx, "large"))
	c.awaitEqual(t)
	for _, m := range c { // Close has five seconds for what is left, and a loaded machine takes longer for 32 MiB
		must(t, m.s.store.sync(ctx))
		m.s.store.lockFile()
		err := m.s.store.restartWAL()
		m.s.store.fileMu.Unlock()
		must(t, err)
	}
}

// 64 writers on each of three members at once: every write returns, is seen at once where it was made, and is on all.
func TestManyWriters(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ctx := ctxFor(t, 3*patience)
	const writers, each = 64, 15
	var wg sync.WaitGroup
	for i, m := range c {
		for w := range writers {
			wg.Go(func() {
				for n := range each {
					key, value := fmt.Sprintf("%d/%d/%d", i, w, n), fmt.Append(nil, n)
					if err := m.s.Set(ctx, key, value); err != nil {
						t.Errorf("%s: %v", key, err)
						return
					}
					if got := m.s.Stale().Get(key); !bytes.Equal(got, value) {
						t.Errorf("%s: Stale has %q after Set of %q returned", key, got, value)
					}
				}
			})
		}
	}
	wg.Wait()
	c.awaitEqual(t)
	for _, m := range c {
		if st := m.s.store.meta(); st.keys != 3*writers*each || m.s.Status().Revision != 3*writers*each {
			t.Errorf("%d keys, revision %d; want %d of both", st.keys, m.s.Status().Revision, 3*writers*each)
		}
	}
}

// A state that has outgrown Config.Memory is read from SQLite, and nothing else changes; so it is after a restart.
func TestManyKeysInLittleMemory(t *testing.T) {
	t.Parallel()
	keys, writers := 100_000, 2000
	if underRace() {
		keys /= 5
	}
	c := newCluster(t, 1, func(c *Config) { c.Memory = 1 << 20 })
	s := c[0].s
	ctx := ctxFor(t, 4*patience)
	if s.Status().MemoryDropped {
		t.Error("memory is dropped and there is nothing yet")
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for k := w; k < keys; k += writers {
				if err := s.Set(ctx, fmt.Sprint("k", k), fmt.Append(nil, "value of ", k)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	check := func() {
		t.Helper()
		if !s.Status().MemoryDropped {
			t.Errorf("%d keys are in 1 MiB of memory", keys)
		}
		for k := 0; k < keys; k += 997 {
			wantGet(t, s, fmt.Sprint("k", k), fmt.Append(nil, "value of ", k))
			wantStale(t, s, fmt.Sprint("k", k), fmt.Append(nil, "value of ", k))
		}
		wantGet(t, s, "missing", nil)
		if s.Insert(ctx, "k1", nil) != ErrUnsatisfied {
			t.Error("Insert of an existing key")
		}
	}
	check()
	c[0].stop()
	s = c[0].start()
	must(t, s.Ready(ctx))
	check()
	if !s.Status().Verified {
		t.Error("a Get has returned before the file was verified")
	}
}

func TestRestartKeepsEverything(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ctx := ctxFor(t, 4*patience)
	for i := range 50 {
		must(t, c[i%3].s.Set(ctx, fmt.Sprint("k", i%20), fmt.Append(nil, i)))
	}
	must(t, c[0].s.Delete(ctx, "k3"))
	c.awaitEqual(t)
	rows := func(m *testMember) (all []string) {
		for i := range 20 {
			r, ok, err := m.s.store.get(fmt.Sprint("k", i))
			must(t, err)
			all = append(all, fmt.Sprintf("%v %s %d %d", ok, r.value, r.version, r.created))
		}
		return all
	}
	want, before := rows(c[0]), c[0].s.Status()
	check := func(when string) {
		t.Helper()
		c.awaitVoters(t, 3)
		wantGet(t, c[1].s, "k3", nil)
		wantGet(t, c[2].s, "k4", []byte("44"))
		c.awaitEqual(t)
		for i, m := range c {
			if got := rows(m); strings.Join(got, ",") != strings.Join(want, ",") {
				t.Errorf("%s member %d has %v, want %v", when, i, got, want)
			}
			// The hash begins with the sum over the rows; the rest covers the log, which elections make longer.
			if st := m.s.Status(); st.Revision != before.Revision || st.Hash[:16] != before.Hash[:16] || st.Cluster != before.Cluster {
				t.Errorf("%s member %d is at revision %d with %s; before it was %d with %s", when, i, st.Revision, st.Hash, before.Revision, before.Hash)
			}
		}
	}
	for i, m := range c {
		id := m.s.Status().ID
		m.stop()
		m.start()
		if m.s.Status().ID != id {
			t.Errorf("member %d has another id", i)
		}
		check("after a restart of one,")
	}
	for _, m := range c {
		m.stop()
	}
	for _, m := range c {
		m.start()
	}
	check("after a restart of all,")
	if err := c[0].s.Insert(ctx, "k4", nil); err != ErrUnsatisfied {
		t.Errorf("Insert of an old key: %v", err)
	}
	must(t, c[1].s.Insert(ctx, "k3", nil))
	if r, _, _ := c[1].s.store.get("k3"); r.version != before.Revision+1 || r.created != r.version {
		t.Errorf("the next change got version %d, created %d; want %d", r.version, r.created, before.Revision+1)
	}
}

// A golden is a directory of some format, and what must be in it whoever opens it.
type golden struct {
	conf     Config // what was given beside Dir
	fill     func(t *testing.T, s *Service)
	rows     []goldenRow
	revision uint64
	history  []string // of the directory as it was closed; see describe
}

type goldenRow struct {
	key              string
	value            []byte // nil = missing
	version, created uint64
}

var goldens = map[string]golden{
	"v1": {
		conf: Config{format: firstFormat},
		fill: func(t *testing.T, s *Service) {
			ctx := ctxFor(t, patience)
			must(t, s.Set(ctx, "flags/new-checkout", []byte("off")))
			must(t, s.Set(ctx, "flags/new-checkout", []byte("on")))
			must(t, s.Insert(ctx, "leader", []byte("größer")))
			must(t, s.Set(ctx, "blob", []byte{0xff, 0x00, 0xfe}))
			must(t, s.Set(ctx, "empty", nil))
			must(t, s.Set(ctx, "gone", []byte("soon")))
			must(t, s.Delete(ctx, "gone"))
			must(t, s.AddAllowedMember(ctx, "db2.example:7001"))
		},
		rows: []goldenRow{
			{"flags/new-checkout", []byte("on"), 2, 1},
			{"leader", []byte("größer"), 3, 3},
			{"blob", []byte{0xff, 0x00, 0xfe}, 4, 4},
			{"empty", []byte{}, 5, 5},
			{"gone", nil, 0, 0},
		},
		revision: 7,
	},
	"v2": {
		conf: Config{History: 5},
		fill: func(t *testing.T, s *Service) {
			ctx := ctxFor(t, patience)
			must(t, s.Set(ctx, "flags/new-checkout", []byte("off")))
			must(t, s.Set(ctx, "flags/new-checkout", []byte("on")))
			must(t, s.Insert(ctx, "leader", []byte("größer")))
			for _, tx := range [][]Op{
				{IfVersion("leader", 3), Set("blob", []byte{0xff, 0x00, 0xfe}), Set("empty", nil), Set("gone", []byte("soon"))},
				{IfExists("gone"), IfValue("empty", nil), Delete("gone"), Set("leader", []byte("kleiner"))},
				{Delete("missing")},
			} {
				_, err := s.Exec(ctx, tx...)
				must(t, err)
			}
			if err := s.Insert(ctx, "leader", nil); err != ErrUnsatisfied {
				t.Fatal(err)
			}
			must(t, s.AddAllowedMember(ctx, "db2.example:7001"))
		},
		rows: []goldenRow{
			{"flags/new-checkout", []byte("on"), 2, 1},
			{"leader", []byte("kleiner"), 8, 3},
			{"blob", []byte{0xff, 0x00, 0xfe}, 4, 4},
			{"empty", []byte{}, 5, 5},
			{"gone", nil, 0, 0},
		},
		revision: 8,
		history: []string{
			`4 of 4-6: blob = "\xff\x00\xfe", made at 4, was 0`,
			`5 of 5-6: empty = "", made at 5, was 0`,
			`6 of 6-6: gone = "soon", made at 6, was 0`,
			`7 of 7-8: gone deleted, was 6`,
			`8 of 8-8: leader = "kleiner", made at 3, was 3`,
		},
	},
}

// describe puts changes into words.
func describe(list []past) []string {
	var lines []string
	for _, p := range list {
		what := " deleted"
		if p.now != nil {
			what = fmt.Sprintf(" = %q, made at %d", p.now.value, p.now.created)
		}
		lines = append(lines, fmt.Sprintf("%d of %[1]d-%d: %s%s, was %d", p.revision, p.last, p.key, what, p.previous))
	}
	return lines
}

func goldenDir(version string) string { return filepath.Join("testdata", "format", version, "dir") }

// write makes the directory, as the release that brought the format left it. Its log has small segments, so that it can be kept
// here. What is there stays: it was written by the code of its time, and is of no use otherwise.
func (g golden) write(t *testing.T, version string) {
	dir := goldenDir(version)
	if _, err := os.Stat(dir); err == nil {
		return
	}
	must(t, os.MkdirAll(filepath.Join(dir, "wal"), 0o700))
	must(t, writeIdentity(dir, identity{id: newID(), cluster: newID(), intent: intentBootstrap}))
	l, err := openLog(logOptions{dir: filepath.Join(dir, "wal"), segmentSize: 64 << 10, log: slog.New(slog.DiscardHandler)})
	must(t, err)
	must(t, l.close())
	g.conf.Dir = dir
	s, err := Open(t.Context(), g.conf)
	must(t, err)
	g.fill(t, s)
	must(t, s.Close())
	must(t, os.Remove(filepath.Join(dir, "wal", "lock")))
}

// A directory that an earlier version left is opened, with all that it holds, and is then of the newest format; and its log alone
// gives the same.
func TestOldDirectory(t *testing.T) {
	t.Parallel()
	for version, g := range goldens {
		if *update {
			g.write(t, version)
		}
		for _, way := range []string{"as it is", "from its log alone"} {
			t.Run(version+" "+way, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "data")
				must(t, os.CopyFS(dir, os.DirFS(goldenDir(version))))
				if way != "as it is" {
					must(t, os.Remove(filepath.Join(dir, "snap")))
				}
				s, err := Open(t.Context(), Config{Dir: dir})
				must(t, err)
				defer s.Close()
				must(t, s.Ready(ctxFor(t, patience)))
				g.check(t, s)
				must(t, s.Err())
			})
		}
	}
}

func (g golden) check(t *testing.T, s *Service) {
	t.Helper()
	for _, want := range g.rows {
		wantGet(t, s, want.key, want.value)
		r, _, err := s.store.get(want.key)
		must(t, err)
		if r.version != want.version || r.created != want.created {
			t.Errorf("%s has version %d, created %d; want %d, %d", want.key, r.version, r.created, want.version, want.created)
		}
	}
	if !s.fsm.members.Load().allowed["db2.example:7001"] {
		t.Error("the permission is lost")
	}
	// A directory without a history begins one where it stands; a longer one does not bring back what is gone.
	m, oldest := s.store.meta(), g.revision-uint64(len(g.history))
	if m.revision != g.revision || m.format != entryFormat || m.keep != defaultHistory || m.oldest() != oldest {
		t.Errorf("revision %d, format %d, %d changes kept, the oldest to resume from is %d", m.revision, m.format, m.keep, m.oldest())
	}
	var gone *CompactedError
	if _, err := s.store.changes(t.Context(), oldest-1); !errors.As(err, &gone) || gone.Oldest != oldest {
		t.Errorf("what is before the history: %v", err)
	}
	must(t, s.Insert(ctxFor(t, patience), "new", nil))
	must(t, s.store.sync(t.Context()))
	list, err := s.store.changes(t.Context(), oldest)
	must(t, err)
	next := g.revision + 1
	want := append(slices.Clone(g.history), fmt.Sprintf(`%d of %[1]d-%[1]d: new = "", made at %[1]d, was 0`, next))
	if got := describe(list); !slices.Equal(got, want) {
		t.Errorf("the history is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
