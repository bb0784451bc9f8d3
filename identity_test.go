package quorate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	bootIdentity  = identity{id: "00112233445566778899aabbccddeeff", cluster: "ffeeddccbbaa99887766554433221100", intent: intentBootstrap}
	joinIdentity  = identity{id: "0123456789abcdef0123456789abcdef", intent: intentJoin}
	foundIdentity = identity{id: bootIdentity.id, cluster: bootIdentity.cluster, intent: intentMember, founders: "a.test:1,b.test:1,c.test:1"}

	writtenIdentities = []identity{bootIdentity, joinIdentity, foundIdentity} // by the child that is killed
)

func TestNewID(t *testing.T) {
	a, b := newID(), newID()
	if !validID(a) || !validID(b) || a == b {
		t.Errorf("ids %q and %q", a, b)
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	dir := t.TempDir()
	if id, ok, err := readIdentity(dir); id != (identity{}) || ok || err != nil {
		t.Fatalf("empty directory: %v, %v, %v", id, ok, err)
	}
	for _, want := range []identity{joinIdentity, bootIdentity, foundIdentity} {
		if err := writeIdentity(dir, want); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := readIdentity(dir); got != want || !ok || err != nil {
			t.Fatalf("got %v, %v, %v; want %v", got, ok, err, want)
		}
	}
	if got := names(t, dir); got != "id" {
		t.Errorf("directory holds %s, want id alone", got)
	}
	wantMode(t, filepath.Join(dir, "id"), 0o600)
}

// The bytes of format 1, which later builds must read.
func TestIdentityGolden(t *testing.T) {
	const golden = `quorate member 1
id 0123456789abcdef0123456789abcdef
cluster -
intent join
sum 1638910c365d5299
`
	if got := string(encodeIdentity(joinIdentity)); got != golden {
		t.Errorf("encoded\n%swant\n%s", got, golden)
	}
	if got, err := decodeIdentity([]byte(golden)); err != nil || got != joinIdentity {
		t.Errorf("decoded %v, %v", got, err)
	}
}

func TestIdentityEveryBitFlipIsNoticed(t *testing.T) {
	for _, id := range []identity{bootIdentity, joinIdentity, foundIdentity} {
		good := encodeIdentity(id)
		for bit := range len(good) * 8 {
			bad := bytes.Clone(good)
			bad[bit/8] ^= 1 << (bit % 8)
			if got, err := decodeIdentity(bad); !errors.Is(err, ErrCorrupt) {
				t.Errorf("bit %d: %v, %v from\n%s", bit, got, err, bad)
			}
		}
	}
}

func TestIdentityDamaged(t *testing.T) {
	good := string(encodeIdentity(bootIdentity))
	tests := map[string]string{
		"empty":         "",
		"cut":           good[:len(good)-1],
		"only the sum":  summed(""),
		"longer":        good + "\n",
		"twice":         good + good,
		"foreign":       summed("hello\n"),
		"no id":         summed("quorate member 1\ncluster -\nintent join\n"),
		"short id":      summed("quorate member 1\nid 0123\ncluster -\nintent join\n"),
		"other intent":  summed("quorate member 1\nid " + joinIdentity.id + "\ncluster -\nintent lead\n"),
		"format 0":      summed("quorate member 0\nid " + joinIdentity.id + "\ncluster -\nintent join\n"),
		"other spacing": summed("quorate member 1\nid  " + joinIdentity.id + "\ncluster -\nintent join\n"),
		"CR LF":         strings.ReplaceAll(good, "\n", "\r\n"),
	}
	for name, text := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "id")
			putFile(t, path, text)
			id, ok, err := readIdentity(dir)
			if !errors.Is(err, ErrCorrupt) || ok || id != (identity{}) {
				t.Fatalf("got %v, %v, %v", id, ok, err)
			}
			if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "join anew") {
				t.Errorf("error names neither file nor repair: %v", err)
			}
			if after, _ := os.ReadFile(path); string(after) != text {
				t.Errorf("reading changed the file to %q", after)
			}
		})
	}
}

func TestIdentityOfNewerFormat(t *testing.T) {
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "id"), summed("quorate member 3\nsomething new\n"))
	_, ok, err := readIdentity(dir)
	if !errors.Is(err, ErrFormat) || errors.Is(err, ErrCorrupt) || ok {
		t.Errorf("got %v, %v", ok, err)
	}
}

func TestIdentityUnreadableIsNotMissing(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "id"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := readIdentity(dir); err == nil || ok {
		t.Errorf("a directory in place of the id file: %v, %v", ok, err)
	}
}

func TestWriteIdentityRefusesWhatItCouldNotRead(t *testing.T) {
	for _, id := range []identity{
		{},
		{id: "x", intent: intentJoin},
		{id: strings.ToUpper(joinIdentity.id), intent: intentJoin},
		{id: joinIdentity.id, intent: "lead"},
		{id: joinIdentity.id, cluster: "-", intent: intentJoin},
	} {
		dir := t.TempDir()
		if err := writeIdentity(dir, id); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v: %v", id, err)
		}
		if got := names(t, dir); got != "" {
			t.Errorf("%v: left %s", id, got)
		}
	}
}

func TestWriteIdentityThatFailsLeavesTheOldOne(t *testing.T) {
	dir := t.TempDir()
	if err := writeIdentity(dir, bootIdentity); err != nil {
		t.Fatal(err)
	}
	putFile(t, filepath.Join(dir, "id.tmp", "in", "the", "way"), "")
	if err := writeIdentity(dir, joinIdentity); err == nil {
		t.Fatal("no error")
	}
	if got, _, err := readIdentity(dir); got != bootIdentity || err != nil {
		t.Errorf("got %v, %v", got, err)
	}

	dir = t.TempDir()
	putFile(t, filepath.Join(dir, "id", "in", "the", "way"), "") // makes the rename fail
	if err := writeIdentity(dir, joinIdentity); err == nil {
		t.Fatal("no error")
	}
	if got := names(t, dir); got != "id" {
		t.Errorf("directory holds %s", got)
	}
}

func TestLeftoverOfAKilledWriteIsRemoved(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, "id.tmp")
	putFile(t, left, "half an identi")
	if err := writeIdentity(dir, joinIdentity); err != nil {
		t.Fatal(err)
	}
	if got, _, err := readIdentity(dir); got != joinIdentity || err != nil {
		t.Fatalf("got %v, %v", got, err)
	}
	putFile(t, left, "half an identi")
	mustUnlock(t, mustLock(t, dir))
	if got := names(t, dir); got != "id wal" {
		t.Errorf("directory holds %s", got)
	}
	if got, _, err := readIdentity(dir); got != joinIdentity || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}

// A process that is killed while it writes identities leaves a whole one, old or new.
func TestWriteIdentityKilled(t *testing.T) {
	for range 5 {
		dir := t.TempDir()
		c := startChild(t, "write", dir)
		c.line(t) // written at least once
		c.kill(t)
		got, ok, err := readIdentity(dir)
		if err != nil || !ok || !slices.Contains(writtenIdentities, got) {
			t.Fatalf("got %v, %v, %v", got, ok, err)
		}
		mustUnlock(t, mustLock(t, dir))
		if got := names(t, dir); got != "id wal" {
			t.Errorf("directory holds %s", got)
		}
	}
}

func FuzzIdentity(f *testing.F) {
	for _, id := range []identity{bootIdentity, joinIdentity, foundIdentity} {
		f.Add(encodeIdentity(id), uint(0))
		f.Add(encodeIdentity(id)[:40], uint(100))
	}
	f.Add([]byte(summed("quorate member 18446744073709551616\n")), uint(3))
	f.Add([]byte("sum "), uint(1))
	f.Fuzz(func(t *testing.T, data []byte, bit uint) {
		id, err := decodeIdentity(data)
		if err != nil {
			// The sum keeps random input out, so let it in.
			id, err = decodeIdentity([]byte(summed(string(data))))
		}
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) {
				t.Fatalf("neither corrupt nor newer: %v", err)
			}
			return
		}
		good := encodeIdentity(id)
		if again, err := decodeIdentity(good); err != nil || again != id {
			t.Fatalf("%v became %v, %v", id, again, err)
		}
		bit %= uint(len(good)) * 8
		good[bit/8] ^= 1 << (bit % 8)
		if flipped, err := decodeIdentity(good); err == nil && flipped != id {
			t.Fatalf("bit %d turned %v into %v", bit, id, flipped)
		}
	})
}

func TestLockDirMakesPrivateDirectories(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	l := mustLock(t, dir)
	wantMode(t, dir, fs.ModeDir|0o700)
	wantMode(t, filepath.Join(dir, "wal"), fs.ModeDir|0o700)
	wantMode(t, filepath.Join(dir, "wal", "lock"), 0o600)
	wantMode(t, filepath.Join(dir, "wal", "holder"), 0o600)
	mustUnlock(t, l)
	if got := names(t, dir) + ", " + names(t, filepath.Join(dir, "wal")); got != "wal, lock" {
		t.Errorf("left %s", got)
	}
}

func TestLockDirKeepsTheModeOfAnExistingDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	mustUnlock(t, mustLock(t, dir))
	wantMode(t, dir, fs.ModeDir|0o750)
}

func TestLockDirTwiceInOneProcess(t *testing.T) {
	dir := t.TempDir()
	first := mustLock(t, dir)
	var second *dirLock
	var err error
	eventually(t, patience, "refused at once", func() error { // one of many tries is not held up by something else
		begin := time.Now()
		second, err = lockDir(dir, "b.example:2")
		if took := time.Since(begin); took > 100*time.Millisecond {
			return fmt.Errorf("refused after %v", took)
		}
		return nil
	})
	if second != nil || !errors.Is(err, ErrLocked) {
		t.Fatalf("second lock: %v, %v", second, err)
	}
	for _, want := range []string{dir, fmt.Sprintf("this process (%d)", os.Getpid()), "a.example:1"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
	mustUnlock(t, first)
	mustUnlock(t, mustLock(t, dir))
}

func TestLockDirHolderWithoutAddress(t *testing.T) {
	dir := t.TempDir()
	l, err := lockDir(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer mustUnlock(t, l)
	if _, err := lockDir(dir, ""); !errors.Is(err, ErrLocked) || !strings.HasSuffix(err.Error(), fmt.Sprintf("(%d)", os.Getpid())) {
		t.Errorf("got %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "wal", "holder")); err != nil {
		t.Fatal(err)
	}
	if _, err := lockDir(dir, ""); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "another member") {
		t.Errorf("without a holder file: %v", err)
	}
}

func TestLockDirHasOneWinner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	var wg sync.WaitGroup
	winners := make(chan *dirLock, 16)
	for range cap(winners) {
		wg.Go(func() {
			l, err := lockDir(dir, "")
			if err == nil {
				winners <- l
			} else if !errors.Is(err, ErrLocked) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	close(winners)
	if len(winners) != 1 {
		t.Errorf("%d winners", len(winners))
	}
	for l := range winners {
		mustUnlock(t, l)
	}
}

func TestUnlockAgainLeavesTheNewHolderAlone(t *testing.T) {
	dir := t.TempDir()
	old := mustLock(t, dir)
	mustUnlock(t, old)
	now := mustLock(t, dir)
	mustUnlock(t, old)
	if _, err := lockDir(dir, ""); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "a.example:1") {
		t.Errorf("got %v", err)
	}
	mustUnlock(t, now)
}

func TestLockDirAgainstAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	l := mustLock(t, dir)
	c := startChild(t, "lock", dir)
	if got := c.line(t); !strings.Contains(got, "locked out") || !strings.Contains(got, fmt.Sprintf("process %d, member a.example:1", os.Getpid())) {
		t.Errorf("other process says: %s", got)
	}
	c.kill(t)
	mustUnlock(t, l)

	c = startChild(t, "lock", dir)
	if got := c.line(t); got != "has it" {
		t.Fatalf("other process says: %s", got)
	}
	want := fmt.Sprintf("process %d, member child.example:7", c.cmd.Process.Pid)
	if _, err := lockDir(dir, ""); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %s", err, want)
	}
	c.kill(t)
	mustUnlock(t, mustLock(t, dir)) // killed, not closed: free all the same
}

func TestLockDirUnusable(t *testing.T) {
	tmp := t.TempDir()
	file := filepath.Join(tmp, "file")
	putFile(t, file, "mine")
	walFile := filepath.Join(tmp, "walfile")
	putFile(t, filepath.Join(walFile, "wal"), "mine")
	tests := []struct {
		name, dir string
		want      error
	}{
		{"no name", "", ErrInvalid},
		{"a file", file, ErrInvalid},
		{"below a file", filepath.Join(file, "a", "b"), ErrInvalid},
		{"wal is a file", walFile, ErrInvalid},
		{"name too long", filepath.Join(tmp, "new", strings.Repeat("x", 300)), nil},
	}
	before := tree(t, tmp)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := lockDir(tt.dir, "")
			if err == nil || l != nil {
				t.Fatalf("no error")
			}
			if tt.want != nil && !errors.Is(err, tt.want) || errors.Is(err, ErrLocked) || errors.Is(err, ErrCorrupt) {
				t.Errorf("got %v", err)
			}
			if after := tree(t, tmp); after != before {
				t.Errorf("files were\n%snow\n%s", before, after)
			}
		})
	}
}

func TestLockDirReadOnly(t *testing.T) {
	tmp := t.TempDir()
	dir := filepath.Join(tmp, "dir")
	mustUnlock(t, mustLock(t, dir))
	empty := filepath.Join(tmp, "empty")
	if err := os.Mkdir(empty, 0o500); err != nil {
		t.Fatal(err)
	}
	dirs := []string{dir, empty}
	switch {
	case os.Geteuid() != 0 && runtime.GOOS != "windows":
		for _, d := range []string{filepath.Join(dir, "wal"), dir} {
			if err := os.Chmod(d, 0o500); err != nil {
				t.Fatal(err)
			}
			defer os.Chmod(d, 0o700)
		}
	case runtime.GOOS == "linux":
		dirs = []string{"/sys/kernel", "/sys/kernel/quorate"} // where not even root makes a directory
	default:
		t.Skip("nothing is read-only to this user")
	}
	before := tree(t, tmp)
	for _, d := range dirs {
		l, err := lockDir(d, "")
		if l != nil || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), d) {
			t.Errorf("%s: %v, %v", d, l, err)
		}
	}
	if after := tree(t, tmp); after != before {
		t.Errorf("files were\n%snow\n%s", before, after)
	}
}

func TestCanonicalAddr(t *testing.T) {
	long := strings.Repeat("a.", 126) + "a"
	good := map[string]string{
		"127.0.0.1:7000":            "127.0.0.1:7000",
		"localhost:1":               "localhost:1",
		"DB1.Example.:65535":        "db1.example:65535",
		"db_1-x.example:080":        "db_1-x.example:80",
		"[2001:DB8:0:0::1]:7000":    "[2001:db8::1]:7000",
		"[::1]:7000":                "[::1]:7000",
		"[::ffff:10.0.0.1]:7000":    "10.0.0.1:7000",
		"[localhost]:7000":          "localhost:7000",
		"xn--bcher-kva.example:443": "xn--bcher-kva.example:443",
		"3com.example:1":            "3com.example:1",
		"a1:1":                      "a1:1",
		long + ":1":                 long + ":1",
	}
	for addr, want := range good {
		if got, err := canonicalAddr(addr); got != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", addr, got, err, want)
		}
	}
	bad := map[string]string{ // what the error teaches
		"":                             "host and port",
		"7000":                         "host and port",
		"db1.example":                  "host and port",
		"http://db1.example:7000":      "without a scheme",
		"2001:db8::1:7000":             "brackets",
		"[::1]":                        "host and port",
		":7000":                        "no host",
		"[]:7000":                      "no host",
		"0.0.0.0:7000":                 "a peer cannot reach 0.0.0.0",
		"[::]:7000":                    "a peer cannot reach ::",
		"[::ffff:0.0.0.0]:7000":        "a peer cannot reach 0.0.0.0",
		"[::%eth0]:7000":               "a peer cannot reach ::",
		"[fe80::1%eth0]:7000":          "zone",
		"224.0.0.1:7000":               "not the address of one member",
		"255.255.255.255:7000":         "not the address of one member",
		"db1.example:0":                "port 0",
		"db1.example:00":               "port 0",
		"db1.example:":                 "from 1 to 65535",
		"db1.example:http":             "from 1 to 65535",
		"db1.example:65536":            "from 1 to 65535",
		"db1.example:-1":               "from 1 to 65535",
		"db1.example:+1":               "from 1 to 65535",
		"db1.example:7000\n":           "from 1 to 65535",
		"db1.example:7000/raft":        "from 1 to 65535",
		" db1.example:7000":            "neither",
		"db1..example:7000":            "neither",
		".:7000":                       "neither",
		"..:7000":                      "neither",
		"bücher.example:7000":          "neither",
		"user@db1.example:7000":        "neither",
		"127.1:7000":                   "neither",
		"010.0.0.1:7000":               "neither",
		"0:7000":                       "neither",
		"0x0:7000":                     "neither",
		"1.2.3.4.5:7000":               "neither",
		"a." + long + ":1":             "neither",
		strings.Repeat("a", 64) + ":1": "neither",
	}
	for addr, want := range bad {
		got, err := canonicalAddr(addr)
		if got != "" || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v; want an error with %q", addr, got, err, want)
		}
	}
}

func FuzzAddr(f *testing.F) {
	for _, addr := range []string{"db1.example:7000", "[2001:db8::1]:7000", "[::ffff:1.2.3.4]:1", "A.:08", "[x%25]:1", "0.0.0.0:1"} {
		f.Add(addr)
	}
	f.Fuzz(func(t *testing.T, addr string) {
		once, err := canonicalAddr(addr)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v is not ErrInvalid", err)
			}
			return
		}
		if again, err := canonicalAddr(once); err != nil || again != once {
			t.Fatalf("%q became %q, then %q (%v)", addr, once, again, err)
		}
		if u, err := url.Parse(baseURL(once, true)); err != nil || u.Host != once {
			t.Fatalf("%q is no host of a URL: %v, %v", once, u, err)
		}
		if boot, err := bootAddr(once, false); err != nil || boot != baseURL(once, false) {
			t.Fatalf("as a boot URL %q is %q, %v", once, boot, err)
		}
	})
}

func TestBootAddr(t *testing.T) {
	good := []struct {
		in   string
		tls  bool
		want string
	}{
		{"db1.example:7000", false, "http://db1.example:7000"},
		{"db1.example:7000", true, "https://db1.example:7000"},
		{"DB1.example.:07000/", true, "https://db1.example:7000"},
		{"[::1]:7000", false, "http://[::1]:7000"},
		{"db1.example:7000/raft", false, "http://db1.example:7000"},
		{"http://db1.example:7000", false, "http://db1.example:7000"},
		{"http://db1.example:7000", true, "http://db1.example:7000"},
		{"https://LB.example", false, "https://lb.example"},
		{"HTTPS://lb.example/", true, "https://lb.example"},
		{"https://lb.example/raft", true, "https://lb.example"},
		{"https://lb.example:8443/raft/", true, "https://lb.example:8443"},
		{"https://[2001:DB8::0:1]", true, "https://[2001:db8::1]"},
		{"https://[2001:db8::1]:443", true, "https://[2001:db8::1]:443"},
		{"http://[::ffff:10.0.0.1]/", true, "http://10.0.0.1"},
		{"http://lb.example:", false, "http://lb.example"},
	}
	for _, tt := range good {
		if got, err := bootAddr(tt.in, tt.tls); got != tt.want || err != nil {
			t.Errorf("%q, %v: %q, %v; want %q", tt.in, tt.tls, got, err, tt.want)
		}
	}
	bad := map[string]string{
		"":                             "no port",
		"db1.example":                  "no port",
		"/var/lib":                     "no other path",
		":7000":                        "no host",
		"http://":                      "no host",
		"http:///raft":                 "no host",
		"::1:7000":                     "boot URL",
		"http://0.0.0.0:7000":          "a peer cannot reach",
		"http://db1.example:0":         "port 0",
		"http://db1.example:70000":     "from 1 to 65535",
		"http://db1.example:x":         "boot URL",
		"http:db1.example:7000":        "boot URL",
		"ftp://db1.example":            "http or https",
		"unix:///run/x":                "http or https",
		"http://db1.example/store":     "/raft/",
		"http://db1.example/raft/join": "/raft/",
		"http://db1.example/?a=b":      "query",
		"http://db1.example?":          "query",
		"http://db1.example#x":         "fragment",
		"http://a b.example":           "boot URL",
		"http://db1.example:7000\n":    "boot URL",
		"http://root:hunter2@db1:70":   "no place",
		"root:hunter2@db1:70":          "no place",
		"http://root:hunter2@db1:%zz":  "boot URL",
	}
	for in, want := range bad {
		got, err := bootAddr(in, false)
		if got != "" || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v; want an error with %q", in, got, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error shows the password: %v", err)
		}
	}
}

func TestCheckCertificate(t *testing.T) {
	client := func(cert tls.Certificate) *http.Client {
		return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}}
	}
	dynamic := func(cert *tls.Certificate, err error) *http.Client {
		return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, err },
		}}}
	}
	var (
		exact    = certificate(t, "", []string{"db1.example"})
		wildcard = certificate(t, "", []string{"*.example", "example"})
		ip       = certificate(t, "", nil, "10.0.0.1", "2001:db8::1")
		oldStyle = certificate(t, "db1.example", nil)
		noLeaf   = tls.Certificate{Certificate: exact.Certificate, PrivateKey: exact.PrivateKey}
		garbage  = tls.Certificate{Certificate: [][]byte{[]byte("not DER")}}
	)
	tests := []struct {
		name   string
		client *http.Client
		addr   string
		want   string // "" = valid; else all of these words in the error, by |
	}{
		{"no client", nil, "db1.example:1", ""},
		{"no transport", &http.Client{}, "db1.example:1", ""},
		{"no TLS config", &http.Client{Transport: &http.Transport{}}, "db1.example:1", ""},
		{"no certificate", &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{}}}, "db1.example:1", ""},
		{"exact name", client(exact), "db1.example:1", ""},
		{"leaf not parsed", client(noLeaf), "db1.example:1", ""},
		{"wrong name", client(exact), "db2.example:1", "db1.example|db2.example"},
		{"wrong name, leaf not parsed", client(noLeaf), "db2.example:1", "db1.example|db2.example"},
		{"wildcard", client(wildcard), "db2.example:1", ""},
		{"wildcard is one label", client(wildcard), "a.db2.example:1", "*.example, example|a.db2.example"},
		{"IP address", client(ip), "10.0.0.1:1", ""},
		{"IPv6 address", client(ip), "[2001:db8::1]:1", ""},
		{"wrong IP address", client(ip), "10.0.0.2:1", "10.0.0.1, 2001:db8::1|10.0.0.2"},
		{"name of an IP certificate", client(ip), "db1.example:1", "10.0.0.1"},
		{"common name only", client(oldStyle), "db1.example:1", `no host (its common name "db1.example" does not count)`},
		{"garbage", client(garbage), "db1.example:1", "the client's certificate"},
		{"no address", client(exact), "", ""},
		{"from a function", dynamic(&exact, nil), "db1.example:1", ""},
		{"wrong name from a function", dynamic(&exact, nil), "db2.example:1", "db1.example|db2.example"},
		{"none from a function", dynamic(&tls.Certificate{}, nil), "db1.example:1", ""},
		{"nil from a function", dynamic(nil, nil), "db1.example:1", ""},
		{"function fails", dynamic(nil, errors.New("the card is out")), "db1.example:1", "the card is out"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := checkCertificate(tt.client, tt.addr, nil)
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("got %v", err)
			}
			for want := range strings.SplitSeq(tt.want, "|") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %s", err, want)
				}
			}
		})
	}
}

type wrapped struct{ http.RoundTripper }

func TestCheckCertificateOfAnUnknownTransportWarns(t *testing.T) {
	c := &http.Client{Transport: wrapped{http.DefaultTransport}}
	l, buf := logTo(slog.LevelInfo, false)
	if err := checkCertificate(c, "db1.example:1", l); err != nil {
		t.Error(err)
	}
	if got := buf.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "level=WARN") || !strings.Contains(got, "quorate.wrapped") {
		t.Errorf("logged %q", got)
	}
	if err := checkCertificate(c, "db1.example:1", nil); err != nil {
		t.Errorf("without a log: %v", err)
	}
}

// certificate makes a self-signed one, valid for these names and IP addresses.
func certificate(t *testing.T, common string, dns []string, ips ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: common},
		NotAfter:     time.Now().Add(time.Hour),
		DNSNames:     dns,
	}
	for _, ip := range ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// A child is this test binary, running TestIdentityChild in a process of its own.
type child struct {
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Reader
}

const childEnv = "QUORATE_IDENTITY_CHILD" // what to do
const childDir = "QUORATE_IDENTITY_DIR"

func startChild(t *testing.T, what, dir string) *child {
	t.Helper()
	c := &child{cmd: exec.Command(os.Args[0], "-test.run=^TestIdentityChild$")}
	c.cmd.Env = append(os.Environ(), childEnv+"="+what, childDir+"="+dir)
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewReader(out)
	t.Cleanup(func() { c.kill(t) })
	return c
}

func (c *child) line(t *testing.T) string {
	t.Helper()
	s, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("other process said %q, then %v", s, err)
	}
	return strings.TrimSuffix(s, "\n")
}

// kill is SIGKILL where there are signals; it may be called again.
func (c *child) kill(t *testing.T) {
	t.Helper()
	if c.cmd.ProcessState != nil {
		return
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = c.cmd.Wait() // says that it was killed
	_ = c.in.Close()
}

// TestIdentityChild does nothing, except in a process that startChild started: there it works until it is killed, or until
// its standard input ends with the parent.
func TestIdentityChild(t *testing.T) {
	dir := os.Getenv(childDir)
	switch os.Getenv(childEnv) {
	case "":
		return
	case "lock":
		if _, err := lockDir(dir, "child.example:7"); errors.Is(err, ErrLocked) {
			fmt.Println("locked out:", err)
		} else if err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("has it")
		}
	case "write":
		go func() {
			for i := 0; ; i++ {
				for _, id := range writtenIdentities {
					if err := writeIdentity(dir, id); err != nil {
						fmt.Println(err)
						return
					}
				}
				if i == 0 {
					fmt.Println("written")
				}
			}
		}()
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func mustLock(t *testing.T, dir string) *dirLock {
	t.Helper()
	l, err := lockDir(dir, "a.example:1")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustUnlock(t *testing.T, l *dirLock) {
	t.Helper()
	if err := l.unlock(); err != nil {
		t.Error(err)
	}
}

// summed closes a body with the sum line of an id file.
func summed(body string) string { return body + "sum " + identitySum(body) + "\n" }

func putFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// names lists dir, sorted, between spaces.
func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

// tree lists everything below dir with mode and size.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, fi fs.FileInfo, err error) error {
		if err == nil {
			fmt.Fprintln(&b, path, fi.Mode(), fi.Size())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func wantMode(t *testing.T, path string, want fs.FileMode) {
	t.Helper()
	if runtime.GOOS == "windows" {
		return
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode() != want {
		t.Errorf("%s: mode is %v, want %v", path, fi.Mode(), want)
	}
}

// secure gives a member that is not started TLS, with a certificate for these hosts as client and as server.
func (m *testMember) secure(pool *x509.CertPool, auth tls.ClientAuthType, cert ...tls.Certificate) {
	m.conf.TLS = true
	m.tls = &tls.Config{Certificates: cert, ClientCAs: pool, ClientAuth: auth}
	m.conf.Client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: pool, Certificates: cert}
}

func TestClusterOverTLS(t *testing.T) {
	t.Parallel()
	pool, issue := authority(t)
	cert := issue("127.0.0.1")
	ctx := ctxFor(t, 2*time.Minute)
	var protocols sync.Map
	secured := func(join string) *testMember {
		m := newMember(t, join)
		m.secure(pool, tls.RequireAndVerifyClientCert, cert)
		m.wrap = func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				protocols.Store(r.Proto, true)
				h.ServeHTTP(w, r)
			})
		}
		return m
	}
	c := testCluster{secured("")}
	c[0].start()
	for range 2 {
		m := secured(c[0].conf.Addr)
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		m.start()
		c = append(c, m)
	}
	c.awaitVoters(t, 3)
	for _, m := range c {
		must(t, m.s.Set(ctx, m.conf.Addr, []byte("v")))
		for _, o := range c {
			if v, err := o.s.Get(ctx, m.conf.Addr); err != nil || string(v) != "v" {
				t.Errorf("%q, %v", v, err)
			}
		}
	}
	protocols.Range(func(p, _ any) bool {
		if p != "HTTP/2.0" {
			t.Errorf("members speak %v", p)
		}
		return true
	})
	refuses := func(t *testing.T, m *testMember, words ...string) {
		t.Helper()
		_, err := m.openUntil("not admitted yet")
		is(t, err, context.DeadlineExceeded, words...)
	}
	allowed := func(t *testing.T, m *testMember) *testMember {
		t.Helper()
		must(t, c[0].s.AddAllowedMember(ctx, m.conf.Addr))
		return m
	}

	t.Run("through a proxy that ends TLS", func(t *testing.T) {
		proxy := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{issue("proxy.test")}}}}
		lb := balancer(t, proxy, "https://"+c[0].conf.Addr, "https://"+c[1].conf.Addr)
		m := allowed(t, secured(lb.URL))
		m.start()
		c.awaitMember(t, m)
		c.leave(t, m)
	})
	t.Run("plain http to TLS", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		refuses(t, allowed(t, m), "http://"+c[0].conf.Addr+" speaks TLS, this member plain http")
	})
	t.Run("TLS to plain http", func(t *testing.T) {
		plain := newCluster(t, 1)
		m := secured(plain[0].conf.Addr)
		refuses(t, m, "https://"+plain[0].conf.Addr+" speaks plain http, this member expects TLS")
	})
	t.Run("an authority that nobody knows", func(t *testing.T) {
		otherPool, otherIssue := authority(t)
		m := newMember(t, c[0].conf.Addr)
		m.secure(otherPool, tls.RequireAndVerifyClientCert, otherIssue("127.0.0.1"))
		refuses(t, allowed(t, m), "the certificate of https://"+c[0].conf.Addr+" is not trusted")
	})
	t.Run("no certificate where one is wanted", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		m.secure(pool, tls.RequireAndVerifyClientCert)
		refuses(t, allowed(t, m), "not take this member's", "certificate")
	})
	t.Run("the right authority and another name, unchecked by the client", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		m.secure(pool, tls.RequireAndVerifyClientCert, issue("other.test"))
		m.conf.Client = &http.Client{Transport: wrapped{m.conf.Client.Transport}}
		refuses(t, allowed(t, m), "the sender's certificate", "127.0.0.1")
		if _, members := c[0].counts(); members != 3 {
			t.Errorf("%d members, want 3", members)
		}
	})
	t.Run("a wrapped transport with the right name warns once", func(t *testing.T) {
		m := allowed(t, secured(c[0].conf.Addr))
		m.conf.Client = &http.Client{Transport: wrapped{m.conf.Client.Transport}}
		log, buf := logTo(slog.LevelWarn, false)
		m.conf.Logger = log
		m.start()
		c.awaitMember(t, m)
		c.leave(t, m)
		if n := strings.Count(buf.String(), "certificate not checked"); n != 1 {
			t.Errorf("%d warnings:\n%s", n, buf)
		}
	})
	t.Run("no client certificates at all", func(t *testing.T) {
		bare := testCluster{newMember(t, "")}
		for i := range 2 {
			if i == 1 {
				bare = append(bare, newMember(t, bare[0].conf.Addr))
				must(t, bare[0].s.AddAllowedMember(ctx, bare[1].conf.Addr))
			}
			bare[i].secure(pool, tls.NoClientCert, cert)
			bare[i].conf.Client.Transport.(*http.Transport).TLSClientConfig.Certificates = nil
			bare[i].start()
		}
		bare.awaitVoters(t, 2)
		must(t, bare[1].s.Set(ctx, "k", nil))
	})
	t.Run("a name that is not the address is refused before anything exists", func(t *testing.T) {
		m := newMember(t, c[0].conf.Addr)
		m.secure(pool, tls.RequireAndVerifyClientCert, issue("other.test"))
		_, err := m.open()
		is(t, err, ErrInvalid, "other.test", "127.0.0.1")
		if _, err := os.Lstat(m.conf.Dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the directory: %v", err)
		}
		used := secured("")
		used.start()
		used.stop()
		before := tree(t, used.conf.Dir)
		used.secure(pool, tls.RequireAndVerifyClientCert, issue("other.test"))
		_, err = used.open()
		is(t, err, ErrInvalid, "other.test")
		if after := tree(t, used.conf.Dir); after != before {
			t.Errorf("it changed the directory:\n%s\n%s", before, after)
		}
	})
	t.Run("the name may be a wildcard's", func(t *testing.T) {
		m := newMember(t, "")
		m.conf.Addr = "db1.cluster.test:7000"
		m.secure(pool, tls.RequireAndVerifyClientCert, issue("*.cluster.test"))
		s, err := Open(ctx, m.conf)
		must(t, err)
		must(t, s.Set(ctx, "k", nil))
		must(t, s.Close())
	})
}

// Who joins learns the past first: where its leader lived then is not where it lives now, and its certificate is for now.
func TestJoinOverTLSALeaderThatMoved(t *testing.T) {
	t.Parallel()
	pool, issue := authority(t)
	cert := issue("127.0.0.1")
	ctx := ctxFor(t, time.Minute)
	a := newMember(t, "")
	alone, err := Open(ctx, Config{Dir: a.conf.Dir})
	must(t, err)
	for i := range 3 * promoteLag { // more than one append
		must(t, alone.Set(ctx, fmt.Sprint(i), nil))
	}
	must(t, alone.Close())
	a.secure(pool, tls.RequireAndVerifyClientCert, cert)
	a.start()
	must(t, a.s.Ready(ctx))
	b := newMember(t, a.conf.Addr)
	b.secure(pool, tls.RequireAndVerifyClientCert, cert)
	must(t, a.s.AddAllowedMember(ctx, b.conf.Addr))
	b.start()
	c := testCluster{a, b}
	c.awaitVoters(t, 2)
	c.awaitEqual(t)
}

// Where a directory is does not change with the working directory, nor with a link on the way.
func TestDirIsResolvedOnce(t *testing.T) { // not parallel: the working directory is the process's
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	elsewhere := filepath.Join(base, "elsewhere")
	must(t, os.Mkdir(elsewhere, 0o700))
	t.Chdir(base)
	linkTo(t, "real", "current")
	must(t, os.Mkdir("real", 0o700))
	s, err := Open(t.Context(), Config{Dir: "current/new/data", segment: 64 << 10})
	must(t, err)
	defer func() { s.Close() }()
	f, err := os.Create("backup")
	must(t, err)
	_, err = s.Backup(t.Context(), f)
	must(t, errors.Join(err, f.Close()))
	must(t, Restore("restored", "backup"))

	t.Chdir(elsewhere)
	must(t, os.Remove(filepath.Join(base, "current")))
	linkTo(t, elsewhere, filepath.Join(base, "current"))
	segments := func() string { return names(t, filepath.Join(base, "real", "new", "data", "wal")) }
	before := segments()
	for i := range 40 { // into new segments
		must(t, s.Set(t.Context(), fmt.Sprint(i%4), make([]byte, 16<<10)))
	}
	if now := segments(); now == before {
		t.Errorf("the log is still %s", now)
	}
	c, err := s.store.copy(t.Context()) // a spool file, too
	must(t, err)
	c.spool()
	if c.spooled == nil || c.failed != nil {
		t.Errorf("the copy is not in a file: %v", c.failed)
	}
	must(t, c.Close())
	must(t, s.Err())
	must(t, s.Close())
	if left := names(t, elsewhere); left != "" {
		t.Errorf("in the new working directory: %s", left)
	}
	wantOnly(t, filepath.Join(base, "real", "new", "data"), "id", "snap", "wal")
	if s, err = Open(t.Context(), Config{Dir: filepath.Join(base, "real/new/data")}); err != nil {
		t.Fatal(err)
	}
	wantGet(t, s, "3", make([]byte, 16<<10))
	wantOnly(t, filepath.Join(base, "restored"), "id", "snap", "wal")
}

func TestDirWithAnOddName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"a?mode=ro#b", "50%41 &b=c", "file:x", ":memory:", "-readonly", `a'b"c;*`, "a\nb", "a\xffb", `a\b`, "~", "...", " ", "a//snap/wal",
	} {
		dir := filepath.Join(t.TempDir(), "d") + "/" + name
		file := dir + ".backup"
		s, err := Open(t.Context(), Config{Dir: dir})
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		must(t, s.Set(t.Context(), "k", []byte(name)))
		f, err := os.Create(file)
		must(t, err)
		_, err = s.Backup(t.Context(), f)
		must(t, errors.Join(err, f.Close(), s.Close()))
		wantOnly(t, dir, "id", "snap", "wal")
		must(t, Restore(dir+"2", file))
		if m, err := checkFile(filepath.Join(dir+"2", "snap")); err != nil || m.keys != 1 {
			t.Errorf("%q: %d keys are restored, %v", name, m.keys, err)
		}
	}
}

func TestDirWithALongName(t *testing.T) {
	t.Parallel()
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	long := func(n int) string {
		dir := base
		for n-len(dir) > 102 {
			dir += "/" + strings.Repeat("x", 100)
		}
		return dir + "/" + strings.Repeat("y", n-len(dir)-1)
	}
	s, err := Open(t.Context(), Config{Dir: long(maxDir)})
	must(t, err)
	f, err := os.Create(filepath.Join(base, "backup"))
	must(t, err)
	_, err = s.Backup(t.Context(), f)
	must(t, errors.Join(err, f.Close(), s.Close()))
	must(t, os.RemoveAll(long(maxDir)))
	must(t, Restore(long(maxDir), f.Name()))
	s, err = Open(t.Context(), Config{Dir: long(maxDir)})
	must(t, err)
	must(t, s.Close())
	must(t, os.RemoveAll(filepath.Join(base, strings.Repeat("x", 100))))

	real := filepath.Join(base, strings.Repeat("z", 100), strings.Repeat("z", 100), strings.Repeat("z", 100), strings.Repeat("z", 100))
	must(t, os.MkdirAll(real, 0o700))
	linkTo(t, real, filepath.Join(base, "short"))
	before := tree(t, base)
	_, err = Open(t.Context(), Config{Dir: long(maxDir + 1)})
	is(t, err, ErrInvalid, "SQLite", fmt.Sprint(maxDir))
	is(t, Restore(long(maxDir+1), f.Name()), ErrInvalid, "SQLite")
	_, err = Open(t.Context(), Config{Dir: filepath.Join(base, "short", strings.Repeat("z", 100))})
	is(t, err, ErrInvalid, "SQLite")
	_, err = Open(t.Context(), Config{Dir: long(5000)})
	is(t, err, ErrInvalid, "SQLite")
	far := filepath.Join(real, strings.Repeat("z", 100))
	must(t, os.WriteFile(far, nil, 0o600))
	is(t, Restore(filepath.Join(base, "new"), far), ErrInvalid, "SQLite")
	must(t, os.Remove(far))
	if now := tree(t, base); now != before {
		t.Errorf("there was\n%sand is\n%s", before, now)
	}
}

// A refused Restore removes the lock that it has made; whoever had opened that file by then has locked nothing.
func TestLockOfARemovedFile(t *testing.T) {
	dir := t.TempDir()
	l := mustLock(t, dir)
	must(t, os.Remove(l.flock.Path()))
	must(t, os.WriteFile(l.flock.Path(), nil, 0o600))
	if free, err := l.tryLock(); !free || err != nil {
		t.Fatal(free, err)
	}
	if _, err := lockDir(dir, ""); !errors.Is(err, ErrLocked) {
		t.Errorf("the file that has the name is not locked: %v", err)
	}
	mustUnlock(t, l)
}

// A name of a member that is a link to nothing is a disk that is not mounted: neither Open nor Restore makes anything beside it.
func TestLinkToNothing(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	s := fullDir(t, in("source"))
	must(t, s.Close())
	must(t, os.Mkdir(in("disk"), 0o700))
	for _, c := range []struct {
		name, link string // link is the name that is moved to the disk
		member     bool   // there was one
	}{
		{"snap", "d/snap", true}, {"log", "d/wal", true}, {"id", "d/id", true}, {"directory", "d", true}, {"meta", "d/wal/wal-meta.db", true},
		{"the one above", "above", true}, {"snap of nobody", "d/snap", false}, {"id of nobody", "d/id", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			home := filepath.Join(base, c.name)
			dir, link, disk := filepath.Join(home, "d"), filepath.Join(home, c.link), filepath.Join(base, "disk", c.name)
			if c.link == "above" {
				dir = filepath.Join(link, "d")
			}
			must(t, os.MkdirAll(filepath.Dir(dir), 0o700))
			if c.member {
				tool(t, "cp", "-r", in("source"), dir)
				must(t, os.Rename(link, disk))
			} else {
				must(t, os.MkdirAll(filepath.Dir(link), 0o700))
			}
			must(t, os.Symlink(disk, link))
			must(t, os.Rename(in("disk"), in("unmounted")))
			before := tree(t, home)
			s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
			if err == nil {
				s.Close()
			}
			for _, err := range []error{err, Restore(dir, filepath.Join(in("source"), "snap"))} {
				if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "mount") || !strings.Contains(err.Error(), link) {
					t.Errorf("%v", err)
				}
			}
			if after := tree(t, home); after != before {
				t.Errorf("it was\n%sand is\n%s", before, after)
			}
			must(t, os.Rename(in("unmounted"), in("disk")))
			if c.member {
				wantKey7(t, dir)
			}
		})
	}
}

func wantKey7(t *testing.T, dir string) {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir, Logger: testLogger(t)})
	must(t, err)
	defer s.Close()
	if v, err := s.Get(ctxFor(t, patience), "key7"); string(v) != "value" || err != nil {
		t.Errorf("Get = %q, %v", v, err)
	}
}
