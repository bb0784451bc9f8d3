package quorate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const testBudget = 64 << 20

func openTestStore(t testing.TB, path string, budget int64) *store {
	t.Helper()
	s, err := openStore(storeOptions{path: path, memory: budget, log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func newTestStore(t testing.TB, budget int64) *store {
	t.Helper()
	return openTestStore(t, filepath.Join(t.TempDir(), "snap"), budget)
}

// keepUp runs maintain until the test ends.
func keepUp(t testing.TB, s *store) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.maintain(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func soon(t testing.TB, what string, f func() bool) {
	t.Helper()
	eventually(t, 10*time.Second, what, func() error {
		if !f() {
			return errors.New("still not so")
		}
		return nil
	})
}

// apply does what fsm.go does, one transaction that also moves meta on, and then has the file follow.
func apply(t testing.TB, s *store, f func(tx *storeTx)) {
	t.Helper()
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.rollback()
	f(tx)
	tx.meta.applied++
	tx.meta.term = 1
	tx.commit()
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, s *store, key, value string) {
	t.Helper()
	apply(t, s, func(tx *storeTx) { setTx(t, tx, key, []byte(value)) })
}

func putSession(tx *storeTx, r sessionRow) {
	tx.putSession(r.id, func() sessionRow { return r })
}

func setTx(t testing.TB, tx *storeTx, key string, value []byte) {
	t.Helper()
	tx.meta.revision++
	if err := tx.set(key, row{string(value), tx.meta.revision, tx.meta.revision}); err != nil {
		t.Fatal(err)
	}
}

func wantValue(t testing.TB, s *store, key, want string) {
	t.Helper()
	r, ok, err := s.get(key)
	if err != nil || !ok || r.value != want {
		t.Fatalf("get %q = %q, %v, %v; want %q", key, r.value, ok, err, want)
	}
}

// shell runs one statement on a connection of its own, as sqlite3 would.
func shell(t testing.TB, path, sql string) {
	t.Helper()
	c, err := openConn(path, "mode=rw")
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.execText(sql); err != nil {
		t.Fatal(err)
	}
}

func wantOnly(t testing.TB, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, names) {
		t.Fatalf("directory holds %v, want %v", got, names)
	}
}

func waitVerified(t testing.TB, s *store) {
	t.Helper()
	soon(t, "verified", func() bool {
		ok, err := s.verified()
		if err != nil {
			t.Fatal(err)
		}
		return ok
	})
}

func fill(t testing.TB, s *store, n, size int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	for at := 0; at < n; {
		apply(t, s, func(tx *storeTx) {
			for range min(512, n-at) {
				value := make([]byte, size)
				for i := range value {
					value[i] = 'a' + byte(rng.IntN(26))
				}
				setTx(t, tx, fmt.Sprintf("key/%07d", at), value)
				at++
			}
		})
	}
}

func FuzzValueRoundTrip(f *testing.F) {
	for _, v := range []string{"", "text", "a\x00b", "\x00", "\xff", "ü€𝄞", "\xed\xa0\x80", "1", "1.5", "2020-01-01", "\ufeffbom"} {
		f.Add([]byte(v))
	}
	slow := newTestStore(f, -1)
	quick := newTestStore(f, testBudget)
	f.Fuzz(func(t *testing.T, value []byte) {
		for _, s := range []*store{slow, quick} {
			put(t, s, "k", string(value))
			wantValue(t, s, "k", string(value))
			var class string
			var onDisk string
			err := s.read(func(c *conn) error {
				it, err := c.get("k")
				if err != nil {
					return err
				}
				onDisk = it.value
				class, err = c.text("SELECT typeof(value) FROM kv WHERE key = 'k'")
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if onDisk != string(value) {
				t.Fatalf("SQLite holds %q, want %q", onDisk, value)
			}
			want := "text"
			if strings.ToValidUTF8(string(value), "") != string(value) || bytes.Contains(value, []byte{0}) {
				want = "blob"
			}
			if class != want {
				t.Fatalf("%q is %s in SQLite, want %s", value, class, want)
			}
		}
	})
}

func TestTransactionSeesItselfAndRollsBack(t *testing.T) {
	for name, budget := range map[string]int64{"memory": testBudget, "sqlite": -1} {
		t.Run(name, func(t *testing.T) {
			s := newTestStore(t, budget)
			put(t, s, "a", "1")
			before := s.meta()
			tx, err := s.begin()
			if err != nil {
				t.Fatal(err)
			}
			setTx(t, tx, "a", []byte("2"))
			setTx(t, tx, "b", []byte("3"))
			for range 2 {
				if err := tx.delete("a", 3); err != nil {
					t.Fatalf("delete a: %v", err)
				}
			}
			if r, ok, err := tx.row("b"); err != nil || !ok || r.value != "3" {
				t.Fatalf("row b = %q, %v, %v", r.value, ok, err)
			}
			if _, ok, err := tx.row("a"); err != nil || ok {
				t.Fatalf("row a = %v, %v after its deletion", ok, err)
			}
			tx.allow("n1")
			wantValue(t, s, "a", "1") // readers see nothing before commit
			tx.rollback()
			tx.rollback()
			if got := s.meta(); fmt.Sprint(got) != fmt.Sprint(before) {
				t.Fatalf("meta %v after rollback, was %v", got, before)
			}
			wantValue(t, s, "a", "1")
			if _, ok, _ := s.get("b"); ok {
				t.Fatal("b exists after rollback")
			}
			if err := s.flush(); err != nil {
				t.Fatal(err)
			}
			if got, err := s.allowed(); err != nil || len(got) > 0 {
				t.Fatalf("allowed = %v, %v after rollback", got, err)
			}
			apply(t, s, func(tx *storeTx) { tx.allow("n1") })
			if got, err := s.allowed(); err != nil || !slices.Equal(got, []string{"n1"}) {
				t.Fatalf("allowed = %v, %v", got, err)
			}
		})
	}
}

func TestCommittedStateReopens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snap")
	s := openTestStore(t, path, testBudget)
	session := sessionRow{id: 9, nonce: [16]byte{1, 2}, acked: 3, last: 4, results: []byte("r")}
	apply(t, s, func(tx *storeTx) {
		setTx(t, tx, "a", []byte("1"))
		setTx(t, tx, "gone", []byte("1"))
		tx.delete("gone", 1)
		putSession(tx, sessionRow{id: 8})
		putSession(tx, sessionRow{id: 9, last: 1})
		putSession(tx, session)
		tx.deleteSession(8)
		tx.allow("n1")
		tx.allow("n1")
		tx.allow("n2")
		tx.disallow("n2")
		tx.disallow("n3")
		tx.remove("id1", 5)
		for i := range uint64(keptMarks + 6) {
			tx.mark(mark{boundary: i * 1024, applied: i, kvSum: 1 << 63, chain: [32]byte{byte(i)}})
		}
		tx.meta.config, tx.meta.configIndex, tx.meta.chain = []byte("conf"), 7, [32]byte{31: 1}
	})
	want := *s.inFile.Load()
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	s = openTestStore(t, path, testBudget)
	if got := s.meta(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("meta %v, want %v", got, want)
	}
	if want.keys != 1 || want.bytes != 2 {
		t.Fatalf("%d keys, %d bytes", want.keys, want.bytes)
	}
	wantValue(t, s, "a", "1")
	if got, err := s.sessions(); err != nil || fmt.Sprint(got) != fmt.Sprint([]sessionRow{session}) {
		t.Fatalf("sessions = %v, %v", got, err)
	}
	if got, err := s.allowed(); err != nil || !slices.Equal(got, []string{"n1"}) {
		t.Fatalf("allowed = %v, %v", got, err)
	}
	if got, err := s.removed(); err != nil || !maps.Equal(got, map[string]uint64{"id1": 5}) {
		t.Fatalf("removed = %v, %v", got, err)
	}
	marks, err := s.marks()
	if err != nil || len(marks) != keptMarks || marks[0].boundary != 6*1024 || marks[0].chain != [32]byte{6} || marks[0].kvSum != 1<<63 {
		t.Fatalf("marks = %v, %v", marks, err)
	}
	keepUp(t, s)
	waitVerified(t, s)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
}

func TestCloseLeavesOneFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "odd ?#% name")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := openTestStore(t, filepath.Join(dir, "snap"), -1)
	keepUp(t, s)
	put(t, s, "a", "1")
	wantValue(t, s, "a", "1")
	c, err := s.copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	tx.rollback()
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	wantOnly(t, dir, "snap")
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("a copy goes on after close")
	}
	h, err := os.ReadFile(filepath.Join(dir, "snap"))
	if err != nil || h[18] != 1 || h[19] != 1 {
		t.Fatalf("versions %d %d, not those of a rollback journal; %v", h[18], h[19], err)
	}
	if _, err := s.begin(); !errors.Is(err, ErrClosed) {
		t.Fatalf("begin after close: %v", err)
	}
	if _, _, err := s.get("a"); !errors.Is(err, ErrClosed) {
		t.Fatalf("get after close: %v", err)
	}
}

// A shell that reads keeps us from ending WAL mode, and from nothing else.
func TestCloseBesideAReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snap")
	s := openTestStore(t, path, -1)
	put(t, s, "a", "1")
	reader, err := openReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.close()
	if err := reader.exec(qBeginRead); err != nil {
		t.Fatal(err)
	}
	if it, err := reader.get("a"); it == nil || err != nil {
		t.Fatal(it, err)
	}
	put(t, s, "a", "2")
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if err := reader.close(); err != nil {
		t.Fatal(err)
	}
	s = openTestStore(t, path, -1)
	wantValue(t, s, "a", "2")
}

func TestStrayWALIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snap")
	s := openTestStore(t, path, -1)
	put(t, s, "a", "1")
	shellCopy(t, path+"-wal", path+"-stray")
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+"-stray", path+"-wal"); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(storeOptions{path: path, memory: -1, log: slog.Default()}); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("open: %v", err)
	}
}

// A crash leaves the files as they are: copies of them must open, in the state of the last commit.
func TestOpenAfterCrash(t *testing.T) {
	t.Parallel()
	dir, after := t.TempDir(), t.TempDir()
	s := openTestStore(t, filepath.Join(dir, "snap"), testBudget)
	fill(t, s, 1000, 100)
	want := s.meta()
	for _, name := range []string{"snap", "snap-wal"} {
		shellCopy(t, filepath.Join(dir, name), filepath.Join(after, name))
	}
	s = openTestStore(t, filepath.Join(after, "snap"), testBudget)
	if got := s.meta(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("meta %v, want %v", got, want)
	}
	keepUp(t, s)
	waitVerified(t, s)
}

// shellCopy copies in another process: closing a live database in this one would take away SQLite's locks.
func shellCopy(t testing.TB, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
		t.Skipf("cp: %v %s", err, out)
	}
}

func TestDamageIsFound(t *testing.T) {
	t.Parallel()
	damages := map[string]struct {
		sql    string
		atOpen bool
	}{
		"value":      {"UPDATE kv SET value = 'x' WHERE key = 'key/0000042'", false},
		"version":    {"UPDATE kv SET version = version + 1 WHERE key = 'key/0000042'", false},
		"key":        {"UPDATE kv SET key = 'other' WHERE key = 'key/0000042'", false},
		"lost row":   {"DELETE FROM kv WHERE key = 'key/0000042'", false},
		"empty key":  {"INSERT INTO kv SELECT x'', value, version, created, sum FROM kv WHERE key = 'key/0000042'", false},
		"meta":       {"UPDATE quorate_meta SET applied = applied - 1", true},
		"no meta":    {"DELETE FROM quorate_meta", true},
		"session":    {"UPDATE quorate_session SET acked = acked + 1", true},
		"no session": {"DELETE FROM quorate_session", true},
		"allowed":    {"INSERT INTO quorate_allowed VALUES('n9', 0)", true},
		"trigger":    {"CREATE TRIGGER t AFTER UPDATE ON kv BEGIN DELETE FROM kv; END", true},
		"index":      {"CREATE INDEX i ON kv(value)", true},
	}
	for name, d := range damages {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "snap")
			s := openTestStore(t, path, testBudget)
			fill(t, s, 100, 10)
			apply(t, s, func(tx *storeTx) { putSession(tx, sessionRow{id: 1}) })
			if err := s.close(); err != nil {
				t.Fatal(err)
			}
			if _, err := checkFile(path); err != nil {
				t.Fatal(err)
			}
			shell(t, path, d.sql)
			if _, err := checkFile(path); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("checkFile: %v", err)
			}
			s, err := openStore(storeOptions{path: path, memory: testBudget, log: slog.New(slog.DiscardHandler)})
			if d.atOpen {
				if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), path) {
					t.Fatalf("open: %v", err)
				}
				wantOnly(t, filepath.Dir(path), "snap")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			keepUp(t, s)
			soon(t, "a verdict", func() bool {
				ok, err := s.verified()
				if ok {
					t.Fatal("verified")
				}
				return errors.Is(err, ErrCorrupt) && strings.Contains(err.Error(), path)
			})
			if whole, _ := s.memoryState(); whole {
				t.Fatal("memory answers from a damaged file")
			}
			if name == "value" {
				if _, _, err := s.get("key/0000042"); !errors.Is(err, ErrCorrupt) {
					t.Fatalf("get: %v", err)
				}
			}
		})
	}
}

// SQLite takes many flipped bits for data. Whatever bit flips: an error, or the same rows as before.
func TestFlippedBitsNeverGiveWrongData(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "snap")
	s := openTestStore(t, path, -1)
	fill(t, s, 60, 40)
	apply(t, s, func(tx *storeTx) {
		putSession(tx, sessionRow{id: 1, results: []byte("results")})
		tx.allow("address")
		tx.remove("id", 1)
		tx.mark(mark{boundary: 1})
	})
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dump := func(path string) (string, error) {
		c, err := openConn(path, "mode=ro&immutable=1")
		if err != nil {
			return "", err
		}
		defer c.close()
		var b strings.Builder
		for _, q := range []query{qScan, qMeta, qSessions, qAllowed, qRemoved, qMarks} {
			err = errors.Join(err, c.each(q, nil, func(v []driver.Value) error {
				for _, v := range v {
					text, _ := columnBytes(v)
					fmt.Fprintf(&b, "%s|%d|", text, columnUint(v))
				}
				return nil
			}))
		}
		return b.String(), err
	}
	want, err := dump(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	found, silent := 0, 0
	for range 400 {
		at := rng.IntN(len(whole) * 8)
		b := bytes.Clone(whole)
		b[at/8] ^= 1 << (at % 8)
		bad := filepath.Join(t.TempDir(), "snap")
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := checkFile(bad); err != nil {
			found++
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) {
				t.Errorf("bit %d of byte %d: %v", at%8, at/8, err)
			}
			continue
		}
		silent++
		if got, err := dump(bad); err != nil || got != want {
			t.Errorf("bit %d of byte %d gives other rows, %v", at%8, at/8, err)
		}
	}
	t.Logf("%d flips found, %d without effect", found, silent)
	if found == 0 || silent == 0 {
		t.Fatal("all flips are alike")
	}
}

func TestForeignFilesAreRefusedUntouched(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql  string
		want error
	}{
		"other application": {"PRAGMA application_id = 7; CREATE TABLE t(a)", ErrFormat},
		"newer version":     {fmt.Sprintf("PRAGMA application_id = %d; PRAGMA user_version = %d; CREATE TABLE kv(a)", applicationID, entryFormat+1), ErrFormat},
		"no database":       {"", ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "snap")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.sql != "" {
				shell(t, path, c.sql)
			} else if err := os.WriteFile(path, bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = openStore(storeOptions{path: path, memory: -1, log: slog.Default()}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), path) {
				t.Fatalf("open: %v, want %v", err, c.want)
			}
			if _, err := checkFile(path); !errors.Is(err, c.want) {
				t.Fatalf("checkFile: %v, want %v", err, c.want)
			}
			if name == "other application" && !strings.Contains(err.Error(), "put snap back") { // a damaged header looks like this too
				t.Errorf("%v: no word about what to do", err)
			}
			after, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(before, after) {
				t.Fatalf("the file has changed, %v", err)
			}
			wantOnly(t, filepath.Dir(path), "snap")
		})
	}
}

func TestForeignCommitStopsFlushes(t *testing.T) {
	s := newTestStore(t, testBudget)
	foreign := func() bool {
		t.Helper()
		f, err := s.foreign()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	fill(t, s, 3000, 1000) // with a checkpoint of the writer's own
	c, err := openConn(s.path, "mode=rw")
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.exec(qPassive); err != nil {
		t.Fatal(err)
	}
	if err := s.barrier(); err != nil {
		t.Fatal(err)
	}
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	setTx(t, tx, "never", []byte("1"))
	tx.rollback()
	if foreign() {
		t.Fatal("our own work, and a checkpoint, are taken for someone else's")
	}
	shell(t, s.path, "UPDATE kv SET value = 'x' WHERE key = 'key/0000001'")
	if !foreign() {
		t.Fatal("a commit of someone else was missed")
	}
	before := *s.inFile.Load()
	tx, err = s.begin()
	if err != nil {
		t.Fatalf("begin before anything was to be written: %v", err)
	}
	setTx(t, tx, "a", []byte("1"))
	tx.commit()
	for range 2 {
		if err := s.flush(); !errors.Is(err, errForeign) {
			t.Fatalf("flush: %v", err)
		}
		if _, err := s.begin(); !errors.Is(err, errForeign) {
			t.Fatalf("begin: %v", err)
		}
		if err := s.barrier(); !errors.Is(err, errForeign) {
			t.Fatalf("barrier: %v", err)
		}
		if !foreign() {
			t.Fatal("forgotten")
		}
	}
	if got := *s.inFile.Load(); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Fatalf("something was written: %v, was %v", got, before)
	}
	if err := s.forgive(); err != nil {
		t.Fatal(err)
	}
	if foreign() {
		t.Fatal("not forgiven")
	}
	for key, want := range map[string]string{"a": "1", "key/0000001": "x"} {
		wantValue(t, s, key, want)
		if it, err := s.writer.get(key); err != nil || it == nil || it.value != want {
			t.Fatalf("the file has %v, %v under %s", it, err, key)
		}
	}
}

func TestForgiveTakesTheFileAsItIs(t *testing.T) {
	s := newTestStore(t, testBudget)
	keepUp(t, s)
	fill(t, s, 100, 10)
	apply(t, s, func(tx *storeTx) { tx.allow("n1"); putSession(tx, sessionRow{id: 1}) })
	shell(t, s.path, `UPDATE kv SET value = 'changed' WHERE key = 'key/0000001'; DELETE FROM kv WHERE key = 'key/0000002';
		UPDATE kv SET value = 12 WHERE key = 'key/0000003'; INSERT INTO kv VALUES('new', 'row', 5000, 1, 0);
		UPDATE quorate_allowed SET addr = 'n2'; DELETE FROM quorate_session`)
	if err := s.forgive(); err != nil {
		t.Fatal(err)
	}
	if f, err := s.foreign(); f || err != nil {
		t.Fatalf("foreign = %v, %v", f, err)
	}
	waitVerified(t, s)
	wantValue(t, s, "key/0000001", "changed")
	wantValue(t, s, "key/0000003", "12")
	wantValue(t, s, "new", "row")
	if m := s.meta(); m.keys != 100 || m.revision != 5000 {
		t.Fatalf("meta %+v", m)
	}
	put(t, s, "a", "1")
	if _, err := receiveCopy(t, s); err != nil {
		t.Fatal(err)
	}
	if got, err := s.allowed(); err != nil || !slices.Equal(got, []string{"n2"}) {
		t.Fatalf("allowed = %v, %v", got, err)
	}
}

// A file that can't be taken over stays somebody else's: nothing is written on top of it.
func TestForgiveThatFails(t *testing.T) {
	s := newTestStore(t, testBudget)
	fill(t, s, 10, 10)
	must(t, s.flush())
	shell(t, s.path, `INSERT INTO kv VALUES('', 'of no key', 1, 1, 0)`)
	if err := s.forgive(); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	if err := s.barrier(); !errors.Is(err, errForeign) {
		t.Errorf("a barrier: %v", err)
	}
	if f, err := s.foreign(); !f || err != nil {
		t.Errorf("foreign = %v, %v", f, err)
	}
}

func TestBarrierChangesAByte(t *testing.T) {
	s := newTestStore(t, testBudget)
	for want := range uint64(3) {
		if got := s.inFile.Load().barrier; got != want {
			t.Fatalf("barrier %d, want %d", got, want)
		}
		if err := s.barrier(); err != nil {
			t.Fatal(err)
		}
	}
	shellMode := int64(-1)
	rows, err := s.writer.raw.(driver.QueryerContext).QueryContext(context.Background(), "PRAGMA synchronous", nil)
	if err != nil {
		t.Fatal(err)
	}
	var v [1]driver.Value
	if err := rows.Next(v[:]); err == nil {
		shellMode, _ = v[0].(int64)
	}
	rows.Close()
	if shellMode != 1 {
		t.Fatalf("synchronous is %d after a barrier, not NORMAL", shellMode)
	}
}

const syncsEnv = "QUORATE_TEST_SYNCS" // where the second run keeps its store

// Commits sync nothing and each barrier syncs at least once, also when nothing was written since the last one. The calls
// of the kernel are counted in a second run of this test.
func TestBarrierSyncs(t *testing.T) {
	const begin, middle, end = "/nonexistent-begin", "/nonexistent-middle", "/nonexistent-end"
	if dir := os.Getenv(syncsEnv); dir != "" {
		s := openTestStore(t, filepath.Join(dir, "snap"), testBudget)
		put(t, s, "a", "0") // the first commit to a new WAL syncs its header
		os.Stat(begin)
		for range 3 {
			put(t, s, "a", "1")
		}
		os.Stat(middle)
		for range 4 {
			if err := s.barrier(); err != nil {
				t.Fatal(err)
			}
		}
		os.Stat(end)
		return
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("no strace")
	}
	dir := t.TempDir()
	out := filepath.Join(dir, "trace")
	cmd := exec.Command(strace, "-f", "-qq", "-o", out, "-e", "trace=fsync,fdatasync,newfstatat", os.Args[0], "-test.run=^TestBarrierSyncs$")
	cmd.Env = append(os.Environ(), syncsEnv+"="+dir)
	if said, err := cmd.CombinedOutput(); err != nil {
		if _, err := os.Stat(filepath.Join(dir, "snap")); err == nil {
			t.Fatalf("%v: %s", err, said)
		}
		t.Skipf("strace does not work here: %v: %s", err, said)
	}
	trace, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	count, place := map[string]int{}, ""
	for line := range strings.Lines(string(trace)) {
		for _, at := range []string{begin, middle, end} {
			if strings.Contains(line, at) {
				place = at
			}
		}
		if strings.Contains(line, "sync(") {
			count[place]++
		}
	}
	if place != end || count[begin] != 0 || count[middle] < 4 {
		t.Fatalf("3 commits: %d syncs, 4 barriers: %d (last place %q)", count[begin], count[middle], place)
	}
}

func receiveCopy(t testing.TB, s *store) (meta, error) {
	t.Helper()
	c, err := s.copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	path := filepath.Join(t.TempDir(), "snap.incoming")
	m, err := receive(path, c)
	if err == nil && fmt.Sprint(m) != fmt.Sprint(c.meta) {
		t.Fatalf("received %v of a copy of %v", m, c.meta)
	}
	return m, err
}

// Every transaction puts its index into all of some rows, so that a copy of a moment in between would show.
func TestCopyUnderWritesIsOfOneMoment(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, testBudget)
	keepUp(t, s)
	write := func() {
		apply(t, s, func(tx *storeTx) {
			for i := range 20 {
				setTx(t, tx, fmt.Sprintf("key/%d", i), fmt.Appendf(nil, "%d/%0500d", tx.meta.applied+1, 0))
			}
			putSession(tx, sessionRow{id: tx.meta.applied % 7, last: tx.meta.applied})
		})
	}
	write()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				write()
			}
		}
	}()
	defer func() { close(stop); <-done }()
	for range 5 {
		c, err := s.copy(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		soon(t, "commits while the copy is open", func() bool { return s.meta().applied > c.meta.applied+20 })
		path := filepath.Join(t.TempDir(), "snap.incoming")
		m, err := receive(path, c)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Size()+sha256.Size != c.size || info.Mode().Perm() != 0o600 {
			t.Fatalf("file %v, %v, size of the copy %d", info, err, c.size)
		}
		got := openTestStore(t, path, -1)
		for i := range 20 {
			wantValue(t, got, fmt.Sprintf("key/%d", i), fmt.Sprintf("%d/%0500d", m.applied, 0))
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("read after the end: %d, %v", n, err)
		}
		c.Close()
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Fatalf("read after close: %v", err)
		}
	}
}

func TestReceiveRefusesBadStreams(t *testing.T) {
	t.Parallel()
	s := newTestStore(t, testBudget)
	fill(t, s, 200, 50)
	c, err := s.copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stream, err := io.ReadAll(c)
	if err != nil || int64(len(stream)) != c.size {
		t.Fatalf("%d bytes of %d, %v", len(stream), c.size, err)
	}
	flip := func(at int) []byte {
		b := bytes.Clone(stream)
		b[at] ^= 4
		return b
	}
	resum := func(b []byte) []byte {
		sum := sha256.Sum256(b[:len(b)-sha256.Size])
		copy(b[len(b)-sha256.Size:], sum[:])
		return b
	}
	for name, bad := range map[string][]byte{
		"flip":              flip(5000),
		"flip, summed":      resum(flip(bytes.LastIndex(stream, []byte("key/0000100")) + 20)),
		"flip in a header":  resum(flip(17)),
		"wrong application": resum(flip(69)),
		"newer version":     resum(flip(63)),
		"flipped sum":       flip(len(stream) - 1),
	} {
		path := filepath.Join(t.TempDir(), "snap.incoming")
		if _, err := receive(path, bytes.NewReader(bad)); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
		wantOnly(t, filepath.Dir(path))
	}
	path := filepath.Join(t.TempDir(), "snap.incoming")
	for _, n := range []int{0, 1, 32, 33, 9000, len(stream) - 1} {
		if _, err := receive(path, bytes.NewReader(stream[:n])); err == nil {
			t.Errorf("cut after %d bytes: no error", n)
		}
	}
	if _, err := receive(path, io.MultiReader(bytes.NewReader(stream), strings.NewReader("x"))); err == nil {
		t.Error("a byte too many: no error")
	}
	wantOnly(t, filepath.Dir(path))
}

func TestBackupOpensWithSqlite3(t *testing.T) {
	s := newTestStore(t, testBudget)
	fill(t, s, 300, 100)
	dir := t.TempDir()
	path := filepath.Join(dir, "backup")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.backup(t.Context(), f)
	if err != nil || m.keys != 300 {
		t.Fatalf("backup = %+v, %v", m, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := checkFile(path); err != nil {
		t.Fatal(err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := s.backup(ended, io.Discard); err != context.Canceled {
		t.Fatalf("backup that is to stop: %v", err)
	}
	tool, err := exec.LookPath("sqlite3")
	if err != nil {
		t.Skip("no sqlite3")
	}
	out, err := exec.Command(tool, path, "SELECT count(*), typeof(value) FROM kv; PRAGMA integrity_check; PRAGMA journal_mode").CombinedOutput()
	if err != nil || string(out) != "300|text\nok\ndelete\n" {
		t.Fatalf("sqlite3 says %q, %v", out, err)
	}
	wantOnly(t, dir, "backup")
}

func TestSqlite3ReadsBesideUs(t *testing.T) {
	t.Parallel()
	tool, err := exec.LookPath("sqlite3")
	if err != nil {
		t.Skip("no sqlite3")
	}
	s := newTestStore(t, testBudget)
	put(t, s, "a", "text")
	out, err := exec.Command(tool, "-readonly", s.path, "SELECT key, value FROM kv").CombinedOutput()
	if err != nil || string(out) != "a|text\n" {
		t.Fatalf("sqlite3 says %q, %v", out, err)
	}
	if f, err := s.foreign(); f || err != nil {
		t.Fatalf("foreign = %v, %v", f, err)
	}
	put(t, s, "a", "more")
}

func TestInstallReplacesEverythingAtOnce(t *testing.T) {
	t.Parallel()
	leader := newTestStore(t, testBudget)
	fill(t, leader, 2000, 100)
	apply(t, leader, func(tx *storeTx) {
		putSession(tx, sessionRow{id: 3})
		tx.meta.config, tx.meta.configIndex = []byte("leader's"), 4
	})
	s := newTestStore(t, testBudget)
	keepUp(t, s)
	for i := range 50 {
		put(t, s, fmt.Sprintf("old/%d", i), "old")
	}
	apply(t, s, func(tx *storeTx) { tx.allow("old") })
	c, err := leader.copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	path := filepath.Join(t.TempDir(), "snap.incoming")
	m, err := receive(path, c)
	if err != nil {
		t.Fatal(err)
	}
	before := s.meta()
	if err := s.install(path, m.applied+1, 9, nil, 0); err == nil {
		t.Fatal("installed another index than asked for")
	}
	if got := s.meta(); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Fatalf("meta changed to %v", got)
	}
	wantValue(t, s, "old/1", "old")

	// One reader keeps the old state, and others never see a mixture.
	reader, err := openReader(s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.close()
	count := func(c *conn) (old, fresh int) {
		err := c.each(qScan, nil, func(v []driver.Value) error {
			if strings.HasPrefix(v[0].(string), "old/") {
				old++
			} else {
				fresh++
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		return old, fresh
	}
	if err := reader.exec(qBeginRead); err != nil {
		t.Fatal(err)
	}
	count(reader)
	var watching sync.WaitGroup
	installed := make(chan struct{})
	watching.Go(func() {
		watcher, err := openReader(s.path)
		if err != nil {
			t.Error(err)
			return
		}
		defer watcher.close()
		for {
			if old, fresh := count(watcher); (old != 50 || fresh != 0) && (old != 0 || fresh != 2000) {
				t.Errorf("a reader sees %d old and %d new rows", old, fresh)
				return
			}
			select {
			case <-installed:
				return
			default:
			}
		}
	})
	err = s.install(path, m.applied, 9, []byte("ours"), 5)
	close(installed)
	watching.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if old, fresh := count(reader); old != 50 || fresh != 0 {
		t.Fatalf("the reader that was open sees %d old and %d new rows", old, fresh)
	}
	if err := reader.exec(qRollback); err != nil {
		t.Fatal(err)
	}
	if old, fresh := count(reader); old != 0 || fresh != 2000 {
		t.Fatalf("later it sees %d old and %d new rows", old, fresh)
	}
	got := s.meta()
	if got.applied != m.applied || got.installed != m.applied || got.term != 9 || string(got.config) != "ours" || got.configIndex != 5 {
		t.Fatalf("meta %+v", got)
	}
	if _, ok, err := s.get("old/1"); ok || err != nil {
		t.Fatalf("an old row is still there, %v", err)
	}
	if f, err := s.foreign(); f || err != nil {
		t.Fatalf("foreign = %v, %v", f, err)
	}
	waitVerified(t, s)
	if whole, _ := s.memoryState(); !whole {
		t.Fatal("memory is not whole")
	}
	apply(t, s, func(tx *storeTx) { setTx(t, tx, "after", []byte("1")); tx.allow("old") })
	if _, err := receiveCopy(t, s); err != nil {
		t.Fatal(err)
	}
	if sessions, err := s.sessions(); err != nil || len(sessions) != 1 {
		t.Fatalf("sessions = %v, %v", sessions, err)
	}
}

func TestWALStaysSmall(t *testing.T) {
	s := newTestStore(t, 1) // dropped: also reads through SQLite
	keepUp(t, s)
	rng := rand.New(rand.NewPCG(1, 2))
	value := make([]byte, 16<<10) // mostly pages of its own: many bytes of WAL for little work
	put(t, s, "read", "1")
	stop := make(chan struct{})
	var reading sync.WaitGroup
	defer reading.Wait()
	defer close(stop)
	reading.Go(func() { // a reader that is nearly always in a transaction of its own
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, _, err := s.get("read"); err != nil {
				t.Error(err)
				return
			}
		}
	})
	largest, total := int64(0), int64(0)
	for total < 60<<20 {
		apply(t, s, func(tx *storeTx) {
			for range 16 {
				setTx(t, tx, fmt.Sprintf("key/%04d", rng.IntN(500)), value)
				total += int64(len(value))
			}
		})
		largest = max(largest, s.walSize())
	}
	t.Logf("largest WAL %d KiB", largest>>10)
	if largest > 64<<20 {
		t.Fatalf("the WAL grew to %d bytes", largest)
	}
}

func TestPinnedCountsWhatACopyHolds(t *testing.T) {
	s := newTestStore(t, testBudget)
	put(t, s, "a", "1")
	c, err := s.copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.kept(); got != 0 {
		t.Fatalf("%d bytes pinned at once", got)
	}
	fill(t, s, 4000, 1000)
	if got := c.kept(); got < 4<<20 {
		t.Fatalf("%d bytes pinned after 4 MB of writes", got)
	}
}

func TestRestoreInto(t *testing.T) {
	s := newTestStore(t, testBudget)
	fill(t, s, 100, 100)
	apply(t, s, func(tx *storeTx) {
		putSession(tx, sessionRow{id: 3})
		tx.allow("n1")
		tx.remove("id", 1)
		tx.mark(mark{boundary: 1024})
	})
	dir := t.TempDir()
	dst := filepath.Join(dir, "snap")
	change := func(m *meta) { m.applied, m.term, m.config = 1, 1, []byte("new") }
	put(t, s, "still", "there")
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	m, err := restoreInto(dst, s.path, change)
	if err != nil {
		t.Fatal(err)
	}
	if m.applied != 1 || m.keys != 101 || m.ownSum != 0 || string(m.config) != "new" {
		t.Fatalf("meta %+v", m)
	}
	wantOnly(t, dir, "snap")
	if _, err := restoreInto(dst, s.path, change); !errors.Is(err, os.ErrExist) {
		t.Fatalf("restore over a file: %v", err)
	}
	got := openTestStore(t, dst, testBudget)
	keepUp(t, got)
	waitVerified(t, got)
	wantValue(t, got, "still", "there")
	for name, n := range map[string]func() (int, error){
		"sessions": func() (int, error) { r, err := got.sessions(); return len(r), err },
		"allowed":  func() (int, error) { r, err := got.allowed(); return len(r), err },
		"removed":  func() (int, error) { r, err := got.removed(); return len(r), err },
		"marks":    func() (int, error) { r, err := got.marks(); return len(r), err },
	} {
		if n, err := n(); n != 0 || err != nil {
			t.Errorf("%d %s, %v", n, name, err)
		}
	}
}

// With no space left the file stays as it is and nothing more is committed; with space back it has everything.
func TestFullDisk(t *testing.T) {
	s := newTestStore(t, testBudget)
	put(t, s, "a", "1")
	before := *s.inFile.Load()
	if err := s.writer.pragma("max_page_count=12"); err != nil {
		t.Fatal(err)
	}
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	setTx(t, tx, "large", make([]byte, 1<<20))
	tx.allow("n1")
	tx.commit()
	s.tailLimit = 1
	for range 2 {
		if err := s.flush(); !isFull(err) || isIO(err) {
			t.Fatalf("flush: %v", err)
		}
		if _, err := s.begin(); !isFull(err) || isIO(err) {
			t.Fatalf("begin: %v", err)
		}
		if err := s.sync(t.Context()); !isFull(err) {
			t.Fatalf("sync: %v", err)
		}
		if got := *s.inFile.Load(); fmt.Sprint(got) != fmt.Sprint(before) {
			t.Fatalf("meta %v, was %v", got, before)
		}
		if _, ok, err := s.get("large"); !ok || err != nil {
			t.Fatalf("get = %v, %v", ok, err)
		}
	}
	if err := s.writer.pragma("max_page_count=1000000"); err != nil {
		t.Fatal(err)
	}
	put(t, s, "b", "2")
	m, err := receiveCopy(t, s)
	if err != nil {
		t.Fatal(err)
	}
	if m.keys != 3 {
		t.Fatalf("%d keys in a copy, want 3", m.keys)
	}
	for _, err := range []error{&os.PathError{Err: syscall.ENOSPC}, fmt.Errorf("x: %w", syscall.ENOSPC)} {
		if !isFull(err) || isIO(err) {
			t.Errorf("%v", err)
		}
	}
	if err := error(&os.PathError{Err: syscall.EIO}); !isIO(err) || isFull(err) {
		t.Errorf("%v", err)
	}
}

// The format's hashes: a change here breaks every file that exists.
func TestHashesAreTheFormats(t *testing.T) {
	_, row := rowHash(nil, "k", "v", 1, 2)
	sum := sha256.Sum256([]byte("\x01k\x01v\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02"))
	if want := binary.BigEndian.Uint64(sum[:8]); row != want {
		t.Errorf("row hash %x, want %x", row, want)
	}
}

func BenchmarkApply(b *testing.B) {
	for _, keys := range []int{1000, 100_000} {
		for _, batch := range []int{1, 64, 512} {
			b.Run(fmt.Sprintf("keys=%d/batch=%d", keys, batch), func(b *testing.B) {
				s := newTestStore(b, testBudget)
				keepUp(b, s)
				fill(b, s, keys, 256)
				value := make([]byte, 256)
				rng := rand.New(rand.NewPCG(1, 2))
				b.ReportAllocs()
				for n := 0; b.Loop(); n++ {
					apply(b, s, func(tx *storeTx) {
						for range batch {
							value[0] = byte(n)
							setTx(b, tx, fmt.Sprintf("key/%07d", rng.IntN(keys)), value)
						}
					})
				}
				b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*batch), "µs/effect")
			})
		}
	}
}

// get is item in the words of the tests.
func (s *store) get(key string) (row, bool, error) {
	it, err := s.item(key)
	if it == nil {
		return row{}, false, err
	}
	return it.row, true, err
}

func BenchmarkStoreGet(b *testing.B) {
	for name, budget := range map[string]int64{"memory": testBudget, "sqlite": -1} {
		b.Run(name, func(b *testing.B) {
			s := newTestStore(b, budget)
			fill(b, s, 10_000, 256)
			keys := make([]string, 1024)
			for i := range keys {
				keys[i] = fmt.Sprintf("key/%07d", i*9)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, ok, err := s.get(keys[i&1023]); !ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}

// A logText is what a handler of slog writes, to be read meanwhile.
type logText struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A reader in another program keeps the WAL from restarting, for as long as it likes: the log says so once, with the size.
func TestLongReaderIsWarnedOf(t *testing.T) {
	var said logText
	s, err := openStore(storeOptions{path: filepath.Join(t.TempDir(), "snap"), memory: testBudget, log: slog.New(slog.NewTextHandler(&said, nil))})
	must(t, err)
	t.Cleanup(func() { s.close() })
	s.walLong = 1 << 20
	keepUp(t, s)
	write := func(n int) {
		for range n {
			apply(t, s, func(tx *storeTx) {
				must(t, tx.set("k", row{value: strings.Repeat(fmt.Sprint(tx.meta.applied%10), 64<<10), version: tx.meta.applied, created: 1}))
			})
		}
	}
	warnings := func() int { return strings.Count(said.String(), "snap-wal bytes") }
	write(10)
	c, err := openReader(s.path)
	must(t, err)
	defer c.close()
	must(t, c.exec(qBeginRead))
	_, err = c.one(qUserVersion)
	must(t, err)
	write(20)
	soon(t, "a warning", func() bool { return warnings() == 1 })
	write(10)
	var long bool
	s.warnOfReader(&long)
	s.warnOfReader(&long)
	if n := warnings(); n != 2 { // once for this caller too
		t.Errorf("%d warnings", n)
	}
	must(t, c.exec(qRollback))
	s.fileMu.Lock()
	_, err = s.writer.one(qTruncate)
	s.fileMu.Unlock()
	must(t, err)
	s.warnOfReader(&long)
	if long {
		t.Error("the episode has no end")
	}
}

// A copy that nobody reads from keeps the WAL from restarting. It must not keep it for ever, and stay right all the same.
func TestSlowCopyLetsGoOfTheWAL(t *testing.T) {
	s := newTestStore(t, testBudget)
	keepUp(t, s)
	write := func(i int) {
		value := bytes.Repeat([]byte{byte(i)}, 64<<10) // SQLite writes no page that stays the same
		apply(t, s, func(tx *storeTx) {
			for k := range 16 {
				must(t, tx.set(fmt.Sprintf("key%03d", (i*16+k)%64), row{value: string(value), version: uint64(i + 1), created: 1}))
			}
		})
	}
	for i := range 4 {
		write(i)
	}
	c, err := s.copy(t.Context())
	must(t, err)
	defer c.Close()
	want := s.meta()
	first := make([]byte, 5000)
	_, err = io.ReadFull(c, first)
	must(t, err)
	for i := 4; c.kept() <= pinLimit; i++ {
		write(i)
	}
	spooled := func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.spooled != nil }
	soon(t, "the copy is in a file", spooled)
	for i := range 64 {
		write(i)
	}
	if size := s.walSize(); size > 64<<20 {
		t.Errorf("the WAL has %d bytes", size)
	}
	m, err := receive(filepath.Join(t.TempDir(), "copy"), io.MultiReader(bytes.NewReader(first), c))
	must(t, err)
	if m.applied != want.applied || m.kvSum != want.kvSum {
		t.Errorf("the copy holds %+v, want %+v", m, want)
	}
	must(t, c.Close())
	if left, _ := filepath.Glob(s.path + ".copy-*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
