package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// ioLimitEnv is the size beyond which a file of that process can't grow: what goes beyond is cut off, and then an error.
const ioLimitEnv = "QUORATE_TEST_IO_LIMIT"

const ioWrites = 30

// ioScript is the life of a member one of whose calls fails. It says what became of each write. The process must live, whatever
// happens, and every call must return.
func ioScript(t *testing.T, dir string) {
	if text := os.Getenv(ioLimitEnv); text != "" {
		limit, err := strconv.ParseUint(text, 10, 64)
		must(t, err)
		must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: limit, Max: limit}))
	}
	s, err := Open(t.Context(), Config{Dir: dir, History: 16, segment: 16 << 10})
	if err != nil {
		fmt.Println("open", err)
		return
	}
	for i := range ioWrites {
		if i%12 == 10 {
			cut := make(chan error, 1)
			go func() { cut <- cutLog(s, 0) }() // a barrier, and raft truncates its log
			select {
			case <-cut:
			case <-time.After(time.Second): // raft's own future may never end
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := s.Set(ctx, fmt.Sprint("k", i%4), []byte(fmt.Sprint(i, " ", strings.Repeat("v", 700))))
		cancel()
		switch {
		case err == nil:
			fmt.Println("ack", i)
		case errors.Is(err, ErrNotApplied):
			fmt.Println("refused", i)
		case errors.Is(err, ErrUncertain):
			fmt.Println("uncertain", i)
		default:
			t.Errorf("write %d: %v", i, err)
		}
		if err := s.Err(); errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EFBIG) {
			break // for good
		}
	}
	for i := range 4 {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if got, err := s.Get(ctx, fmt.Sprint("k", i)); err == nil {
			word, _, _ := bytes.Cut(got, []byte(" "))
			fmt.Println("get", i, string(word)+"!")
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	if err := s.Err(); err != nil && !isFull(err) {
		fmt.Println("fault", err)
	} else if err := setPatiently(ctx, s, "end"); err == nil {
		fmt.Println("well")
	} else if now := s.Err(); now != nil && !isFull(now) {
		fmt.Println("fault", now)
	} else {
		fmt.Println("ill", err, now)
	}
	cancel()
	began := time.Now()
	err = s.Close()
	if time.Since(began) > 20*time.Second {
		t.Errorf("close took %v", time.Since(began))
	}
	fmt.Println("closed", err)
}

// setPatiently tries again what was refused at once, as by a leader whose disk is full and that nobody can relieve.
func setPatiently(ctx context.Context, s *Service, key string) error {
	for {
		err := s.Set(ctx, key, nil)
		if err == nil || !errors.Is(err, errRefused) || !isFull(s.Err()) && s.Err() != nil {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// TestCampaignIO has every call that changes the directory of a member fail once, with the errors of a broken disk, a full one and a
// full quota, and files that can't grow, so that writes are cut short. Whatever it was, what is acknowledged is there after the next start.
//
// strace counts calls by thread, and which thread makes one is chance: so a case is the n-th call of a kind on a file by any one
// thread, and only those in which a call did fail are counted.
func TestCampaignIO(t *testing.T) {
	if dir := os.Getenv(ioEnv); dir != "" {
		ioScript(t, dir)
		return
	}
	t.Parallel()
	t.Run("alone", func(t *testing.T) { failCalls(t, ioAlone, dose(12, 1<<20)) })
	t.Run("one of three, which is sent snapshots", func(t *testing.T) { failCalls(t, ioFollower, dose(4, 150)) })
}

// An ioTrial is what a process does while a call of it fails, and how its words are judged.
type ioTrial struct {
	test, env string
	limits    bool // files that can't grow are a case too
	judge     func(c ioCase, t *testing.T, dir string, said []byte)
}

var (
	ioAlone    = ioTrial{"TestCampaignIO", ioEnv, true, ioCase.judgeAlone}
	ioFollower = ioTrial{"TestFollowerScript", followerEnv, false, ioCase.judgeFollower}
)

func failCalls(t *testing.T, trial ioTrial, most int) {
	home := quickDir(t)
	const kinds = "write,pwrite64,ftruncate,fallocate,fsync,fdatasync,open,openat,mkdir,mkdirat,unlink,unlinkat,rename,renameat,renameat2"
	said, trace, err := trial.run(t, filepath.Join(home, "data"), 0, "-e", "trace="+kinds)
	if err != nil {
		if os.Getenv("CI") == "true" || bytes.Contains(said, []byte("--- FAIL")) {
			t.Fatalf("%v: %s", err, said)
		}
		t.Skipf("strace does not work here: %v: %s", err, said)
	}
	cases := ioCases(filepath.Join(home, "data"), trace)
	if len(cases) < 50 {
		t.Fatalf("%d kinds of calls: the trace was not understood", len(cases))
	}
	must(t, os.RemoveAll(filepath.Join(home, "data")))
	seed := seedOf(t)
	rnd := rand.New(rand.NewPCG(seed, 11))
	var all []ioCase
	for _, c := range cases {
		for _, name := range []string{"EIO", "ENOSPC", "EDQUOT"} {
			c.err = name
			all = append(all, c)
		}
	}
	for i := 0; trial.limits && i < len(cases)/4; i++ {
		all = append(all, ioCase{limit: 1 + rnd.Uint64N(120<<10)})
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:min(most, len(all))]
	todo := make(chan int, len(all))
	for i := range all {
		todo <- i
	}
	close(todo)
	var failed atomic.Int64
	var workers sync.WaitGroup
	for range 3 * runtime.GOMAXPROCS(0) { // they mostly wait
		workers.Go(func() {
			for i := range todo {
				dir := filepath.Join(home, fmt.Sprint("case", i), "data")
				if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
					t.Error(err)
					return
				}
				all[i].play(t, trial, dir, &failed)
				os.RemoveAll(filepath.Dir(dir))
			}
		})
	}
	workers.Wait()
	t.Logf("%d kinds of calls, %d cases, a call failed in %d of them", len(cases), len(all), failed.Load())
	if failed.Load() == 0 {
		t.Error("no call failed")
	}
}

// run has the script run under strace.
func (trial ioTrial) run(t *testing.T, dir string, limit uint64, args ...string) (said, trace []byte, err error) {
	out := filepath.Join(t.TempDir(), filepath.Base(filepath.Dir(dir))+".trace")
	args = append([]string{"-f", "-qq", "-y", "-o", out}, args...)
	cmd := exec.Command("strace", append(args, os.Args[0], "-test.run=^"+trial.test+"$", "-test.v")...)
	cmd.Env = append(os.Environ(), trial.env+"="+dir)
	if limit > 0 {
		cmd = exec.Command(os.Args[0], "-test.run=^"+trial.test+"$", "-test.v")
		cmd.Env = append(os.Environ(), trial.env+"="+dir, fmt.Sprint(ioLimitEnv, "=", limit))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	hung := time.AfterFunc(2*patience, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // strace and what it traces
	defer hung.Stop()
	said, err = cmd.CombinedOutput()
	trace, _ = os.ReadFile(out)
	os.Remove(out)
	return said, trace, err
}

// An ioCase is one call to fail: the n-th of a kind on a path by one thread; or a limit.
type ioCase struct {
	call, path string // path within the directory
	n          int
	err        string
	limit      uint64
}

// ioCases are the calls of a run on files of the directory.
func ioCases(dir string, trace []byte) (list []ioCase) {
	type key struct{ thread, call, path string }
	counts, most := make(map[key]int), make(map[key]int)
	for line := range strings.Lines(string(trace)) {
		m := powerLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil || strings.HasPrefix(m[2], "<...") {
			continue
		}
		call, rest, _ := strings.Cut(m[2], "(")
		at := strings.Index(rest, dir)
		if at < 0 {
			continue
		}
		path := rest[at+len(dir):]
		if end := strings.IndexAny(path, `>"`); end >= 0 {
			path = path[:end]
		}
		k := key{m[1], call, path}
		counts[k]++
		k.thread = ""
		most[k] = max(most[k], counts[key{m[1], call, path}])
	}
	for k, n := range most {
		for i := range n {
			list = append(list, ioCase{call: k.call, path: k.path, n: i + 1})
		}
	}
	slices.SortFunc(list, func(a, b ioCase) int {
		return strings.Compare(fmt.Sprint(a.path, a.call, 1000+a.n), fmt.Sprint(b.path, b.call, 1000+b.n))
	})
	return list
}

func (c ioCase) String() string {
	if c.limit > 0 {
		return fmt.Sprintf("no file beyond %d bytes", c.limit)
	}
	return fmt.Sprintf("%s number %d of %s fails with %s", c.call, c.n, c.path, c.err)
}

func (c ioCase) play(t *testing.T, trial ioTrial, dir string, failed *atomic.Int64) {
	when := strconv.Itoa(c.n)
	said, trace, err := trial.run(t, dir, c.limit, "-P", dir+c.path, "-e", "trace="+c.call, "-e", fmt.Sprintf("inject=%s:error=%s:when=%s", c.call, c.err, when))
	if c.limit == 0 && !bytes.Contains(trace, []byte("(INJECTED)")) {
		return
	}
	if c.limit > 0 && err == nil && !bytes.Contains(said, []byte("\nfault ")) && !bytes.Contains(said, []byte("\nopen ")) {
		return // no file became so large
	}
	failed.Add(1)
	counted.ioPoints.add(1)
	if err != nil {
		violated(t, "%v: the process did not live: %v\n%s", c, err, said)
		return
	}
	trial.judge(c, t, dir, said)
}

// heals: a member recovers from a full disk and from a full quota, and not from a file that can't grow. What a sync that failed has left nobody knows, so that is for good whatever its error.
func (c ioCase) heals() bool {
	return c.limit == 0 && c.err != "EIO" && !strings.HasSuffix(c.call, "sync") && !strings.HasPrefix(c.call, "unlink")
}

// judgeFollower takes the words of followerScript.
func (c ioCase) judgeFollower(t *testing.T, dir string, said []byte) {
	p := &powerTrace{tried: make(map[string]int), acked: make(map[string]int), said: make(map[string][]string)}
	p.word(string(said))
	opened := p.said["open"]
	switch {
	case opened == nil:
		violated(t, "%v: it says nothing\n%s", c, said)
	case opened[0] == "failed" && !strings.Contains(opened[1], dir):
		violated(t, "%v: Open does not say where\n%s", c, said)
	case opened[0] == "well" && p.said["fault"] != nil && c.heals():
		violated(t, "%v: it does not recover from a full disk\n%s", c, said)
	}
	at := p.said["addr"]
	judgeFollower(t, dir, at[0], at[1], c.String(), p.said["has"] != nil, uint64(p.acked["log"]), p.tried["n"])
}

func (c ioCase) judgeAlone(t *testing.T, dir string, said []byte) {
	results := make(map[int]string) // by write
	wrong, closed, well := "", false, !c.heals()
	for line := range strings.Lines(string(said)) {
		w := strings.Fields(line)
		switch {
		case len(w) == 2 && (w[0] == "ack" || w[0] == "refused" || w[0] == "uncertain"):
			n, _ := strconv.Atoi(w[1])
			results[n] = w[0]
		case len(w) == 3 && w[0] == "get":
			key, _ := strconv.Atoi(w[1])
			if got := strings.TrimSuffix(w[2], "!"); !possible(results, key, got) {
				wrong = fmt.Sprintf("Get of k%d was %q", key, got)
			}
		case len(w) > 0 && (w[0] == "closed" || w[0] == "open"):
			closed = true
			well = well || w[0] == "open"
			if w[0] == "open" && !strings.Contains(line, dir) {
				wrong = "Open does not say where: " + line
			}
		case len(w) > 0 && w[0] == "well":
			well = true
		case len(w) > 0 && w[0] == "ill":
			wrong = "it does not recover: " + line
		}
	}
	if !well && wrong == "" {
		wrong = "it does not recover from a full disk"
	}
	if wrong != "" || !closed {
		violated(t, "%v: %s\n%s", c, wrong, said)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := Open(ctx, Config{Dir: dir, History: 16, segment: 16 << 10, Logger: testLogger(t)})
	if err != nil {
		violated(t, "%v: the next start: %v\n%s", c, err, said)
		return
	}
	defer s.Close()
	if err := s.Ready(ctx); err != nil {
		violated(t, "%v: after the next start: %v\n%s", c, err, said)
		return
	}
	for key := range 4 {
		got, err := s.Get(ctx, fmt.Sprint("k", key))
		word, _, _ := bytes.Cut(got, []byte(" "))
		if err != nil || !possible(results, key, string(word)) {
			violated(t, "%v: after the next start k%d is %q, %v; the writes were %v", c, key, word, err, results)
		}
	}
	if err := s.Set(ctx, "after", nil); err != nil {
		violated(t, "%v: after the next start: %v", c, err)
	}
}

// possible: a key may hold the last write that was acknowledged, or one that is uncertain, which may have come after it.
func possible(results map[int]string, key int, got string) bool {
	last := ""
	for _, n := range slices.Sorted(maps.Keys(results)) {
		if n%4 != key {
			continue
		}
		switch results[n] {
		case "ack":
			last = strconv.Itoa(n)
		case "uncertain":
			if got == strconv.Itoa(n) {
				return true
			}
		}
	}
	return got == last
}

// SQLite takes a full quota for a failed disk. To a member it is a full disk: nothing is lost, and the next try may succeed. The
// same number from a sync is for good.
func TestQuotaOfTheState(t *testing.T) {
	if dir := os.Getenv(quotaEnv); dir != "" {
		fillQuota(t, dir)
		return
	}
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("no strace")
	}
	dir := quickDir(t)
	cmd := exec.Command(strace, "-f", "-qq", "-o", filepath.Join(dir, "trace"), "-P", filepath.Join(dir, "snap-wal"), "-P", filepath.Join(dir, "copy"),
		"-e", "trace=pwrite64,write,fsync,fdatasync", "-e", "inject=pwrite64:error=EDQUOT:when=20..39", "-e", "inject=write:error=EDQUOT", "-e", "inject=fsync,fdatasync:error=EDQUOT:when=6+",
		os.Args[0], "-test.run=^TestQuotaOfTheState$", "-test.v")
	cmd.Env = append(os.Environ(), quotaEnv+"="+dir)
	said, err := cmd.CombinedOutput()
	trace, _ := os.ReadFile(filepath.Join(dir, "trace"))
	if !bytes.Contains(trace, []byte("(INJECTED)")) {
		t.Skipf("strace does not work here: %v: %s", err, said)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
}

// fillQuota stays on one thread, as strace counts calls by thread.
func fillQuota(t *testing.T, dir string) {
	runtime.LockOSThread()
	s := openTestStore(t, filepath.Join(dir, "snap"), testBudget)
	var full []error
	keys := 0
	for ; keys < 100 && len(full) < 5; keys++ {
		tx, err := s.begin()
		must(t, err)
		setTx(t, tx, fmt.Sprint("k", keys), bytes.Repeat([]byte("v"), 900))
		tx.meta.applied++
		tx.meta.term = 1
		tx.commit()
		if err := s.flush(); err != nil {
			full = append(full, err)
		}
	}
	if len(full) < 5 {
		t.Fatal("the quota was not met")
	}
	if err := s.writer.copyTo(filepath.Join(dir, "copy")); err != nil {
		full = append(full, err)
	}
	for _, err := range full {
		if !isFull(err) || isIO(err) || !passing(err) || !errors.Is(err, syscall.EDQUOT) {
			t.Errorf("isFull %v, isIO %v: %v", isFull(err), isIO(err), err)
		}
	}
	for range 100 {
		if err := s.flush(); err == nil {
			break
		}
	}
	must(t, s.sync(t.Context()))
	must(t, s.barrier())
	if m, err := receiveCopy(t, s); err != nil || m.keys != uint64(keys) {
		t.Fatal(m.keys, keys, err)
	}
	for range 100 {
		if err := s.barrier(); err != nil {
			if !isIO(err) || passing(err) {
				t.Errorf("a sync that has failed passes: %v", err)
			}
			return
		}
	}
	t.Error("no sync failed")
}
