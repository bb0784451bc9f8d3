package quorate

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// What a power cut leaves is found without one. A member in a process of its own does all that changes its directory, and strace
// writes down every call that does. From that the directory can be made anew as a disk may have it at any moment: what was synced
// is there, and of what was not any part, a sector at a time. The idea is that of ALICE (Pillai and others, OSDI 2014).

// powerScript is what the member does: words on standard output, which are in the trace, say what was tried and acknowledged.
func powerScript(t *testing.T, dir string) {
	say := sayer()
	conf := Config{Dir: memberIn(dir) + "/", History: 32, segment: 16 << 10}
	must(t, os.MkdirAll(memberIn(dir), 0o700)) // as the operator makes it, or a start that was killed: nothing is synced
	for life := range 3 {
		s, err := Open(t.Context(), conf)
		must(t, err)
		say("open", strconv.Itoa(life), "")
		for part := range 4 {
			var writers sync.WaitGroup
			for w := range 3 {
				writers.Go(func() {
					for i := range 12 {
						key, n := fmt.Sprintf("%d/%d", w, i%5), (life*4+part)*12+i+1
						value := fmt.Sprint(n, " ", strings.Repeat("v", (n*97)%1500))
						say("try", key, strconv.Itoa(n))
						var err error
						if n%7 == 0 {
							err = s.Delete(context.Background(), key)
						} else {
							err = s.Set(context.Background(), key, []byte(value))
						}
						if err != nil {
							t.Error(err)
							return
						}
						say("ack", key, strconv.Itoa(n))
					}
				})
			}
			writers.Wait()
			if part%2 == 0 {
				cutLog(s, 0) // a barrier, and raft truncates its log
			}
		}
		must(t, s.Close())
	}
}

func memberIn(dir string) string { return filepath.Join(dir, "member") }

// sayer is for the words of a script, which are in its trace.
func sayer() func(word, key, value string) {
	var mu sync.Mutex // of standard output
	return func(word, key, value string) {
		mu.Lock()
		defer mu.Unlock()
		os.Stdout.WriteString(word + " " + key + " " + value + "\n")
	}
}

// A cutFile is what was done to a file, whatever its name.
type cutFile struct {
	changes []cutChange
	synced  int // of them are on the disk
}

type cutChange struct {
	at   int64
	data []byte // nil: it becomes at bytes long
}

// A cutEntry is a change of a directory.
type cutEntry struct {
	dir, name string
	file      *cutFile // nil: the name is gone, unless dir says that it is a directory
	isDir     bool
	to        string // the name it gets; "" = none
}

// A powerTrace is the directory as the calls up to now have made it.
type powerTrace struct {
	root    string
	now     map[string]*cutFile // by path
	dirs    map[string]bool
	entries []cutEntry
	synced  map[string]int // by directory: so many of its entries are on the disk
	fds     map[string]int64
	tried   map[string]int
	acked   map[string]int
	said    map[string][]string // the last words after a first one
	pending map[string]string   // by thread: a call that has begun
}

var (
	powerLine = regexp.MustCompile(`^(\d+) +(.*)$`)
	powerCall = regexp.MustCompile(`^(\w+)\((.*)\) += (-?\d+)(.*)$`)
	powerPath = regexp.MustCompile(`^(\d+|AT_FDCWD)<([^>]*)>`)
)

// step takes a line of the trace.
func (p *powerTrace) step(t *testing.T, line string) {
	m := powerLine.FindStringSubmatch(line)
	if m == nil {
		return
	}
	thread, text := m[1], m[2]
	if begun, ok := strings.CutSuffix(text, " <unfinished ...>"); ok {
		p.pending[thread] = begun
		return
	}
	if strings.HasPrefix(text, "<... ") {
		_, rest, _ := strings.Cut(text, " resumed>")
		text = p.pending[thread] + rest
	}
	call := powerCall.FindStringSubmatch(text)
	if call == nil {
		return
	}
	result, err := strconv.ParseInt(call[3], 10, 64)
	if err != nil || result < 0 {
		return
	}
	p.call(t, call[1], splitArgs(call[2]), result, call[4])
}

func splitArgs(text string) (args []string) {
	depth, quoted, from := 0, false, 0
	for i, c := range []byte(text) {
		switch {
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '<' || c == '[' || c == '{':
			depth++
		case c == '>' || c == ']' || c == '}':
			depth--
		case c == ',' && depth == 0:
			args = append(args, strings.TrimSpace(text[from:i]))
			from = i + 1
		}
	}
	return append(args, strings.TrimSpace(text[from:]))
}

// unquoted is a string of strace -xx.
func unquoted(t *testing.T, text string) []byte {
	if strings.HasSuffix(text, "...") {
		t.Fatal("strace has cut a string")
	}
	b, err := hex.DecodeString(strings.ReplaceAll(strings.Trim(text, `"`), `\x`, ""))
	must(t, err)
	return b
}

func (p *powerTrace) call(t *testing.T, name string, args []string, result int64, rest string) {
	var fd, path string
	if m := powerPath.FindStringSubmatch(args[0]); m != nil {
		fd, path = m[1], string(unquotedPath(m[2]))
	}
	at := func(dir, name string) string { // of an "at" call
		file := string(unquoted(t, name))
		if filepath.IsAbs(file) {
			return file
		}
		return filepath.Join(string(unquotedPath(powerPath.FindStringSubmatch(dir)[2])), file)
	}
	switch name {
	case "write":
		data := unquoted(t, args[1])[:result]
		if fd == "1" {
			p.word(string(data))
			return
		}
		p.change(path, cutChange{p.fds[fd], data})
		p.fds[fd] += result
	case "pwrite64":
		off, err := strconv.ParseInt(args[3], 10, 64)
		must(t, err)
		p.change(path, cutChange{off, unquoted(t, args[1])[:result]})
	case "ftruncate":
		size, err := strconv.ParseInt(args[1], 10, 64)
		must(t, err)
		p.change(path, cutChange{size, nil})
	case "fallocate":
		from, err := strconv.ParseInt(args[2], 10, 64)
		must(t, err)
		size, err := strconv.ParseInt(args[3], 10, 64)
		must(t, err)
		p.change(path, cutChange{from, make([]byte, size)})
	case "fsync", "fdatasync":
		if f := p.now[path]; f != nil {
			f.synced = len(f.changes)
		} else if p.dirs[path] {
			p.synced[path] = p.count(path)
		}
	case "open", "openat":
		if name == "open" {
			args = append([]string{"AT_FDCWD<>"}, args...)
		}
		path := at(args[0], args[1])
		opened, _, _ := strings.Cut(strconv.FormatInt(result, 10), "<")
		p.fds[opened] = 0
		if !p.inside(path) || p.dirs[path] {
			return
		}
		if p.now[path] == nil {
			if !strings.Contains(args[2], "O_CREAT") {
				return
			}
			p.now[path] = new(cutFile)
			p.enter(cutEntry{dir: filepath.Dir(path), name: path, file: p.now[path]})
		} else if strings.Contains(args[2], "O_TRUNC") {
			p.change(path, cutChange{0, nil})
		}
	case "mkdirat", "mkdir":
		path := ""
		if name == "mkdir" {
			path = string(unquoted(t, args[0]))
		} else {
			path = at(args[0], args[1])
		}
		if p.inside(path) {
			p.dirs[path] = true
			p.enter(cutEntry{dir: filepath.Dir(path), name: path, isDir: true})
		}
	case "unlinkat", "unlink":
		path := ""
		if name == "unlink" {
			path = string(unquoted(t, args[0]))
		} else {
			path = at(args[0], args[1])
		}
		if p.inside(path) {
			delete(p.now, path)
			p.enter(cutEntry{dir: filepath.Dir(path), name: path})
		}
	case "rename", "renameat", "renameat2":
		from, to := "", ""
		if name == "rename" {
			from, to = string(unquoted(t, args[0])), string(unquoted(t, args[1]))
		} else {
			from, to = at(args[0], args[1]), at(args[2], args[3])
		}
		if p.inside(from) {
			p.now[to] = p.now[from]
			delete(p.now, from)
			p.enter(cutEntry{dir: filepath.Dir(from), name: from, to: to})
		}
	default:
		t.Fatalf("%s is not understood", name)
	}
}

// unquotedPath: strace -xx writes paths of descriptors in the same way.
func unquotedPath(text string) []byte {
	if b, err := hex.DecodeString(strings.ReplaceAll(text, `\x`, "")); err == nil && strings.HasPrefix(text, `\x`) {
		return b
	}
	return []byte(text)
}

func (p *powerTrace) inside(path string) bool {
	return path == p.root || strings.HasPrefix(path, p.root+"/")
}

func (p *powerTrace) change(path string, c cutChange) {
	if f := p.now[path]; f != nil {
		f.changes = append(f.changes, c)
	}
}

func (p *powerTrace) enter(e cutEntry) { p.entries = append(p.entries, e) }

func (p *powerTrace) count(dir string) (n int) {
	for _, e := range p.entries {
		if e.dir == dir {
			n++
		}
	}
	return n
}

func (p *powerTrace) word(text string) {
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		if len(w) != 3 {
			continue
		}
		n, _ := strconv.Atoi(w[2])
		p.said[w[0]] = w[1:]
		switch w[0] {
		case "try":
			p.tried[w[1]] = n
		case "ack":
			p.acked[w[1]] = n
		}
	}
}

// leave makes the directory as a disk may have it if the power fails now.
func (p *powerTrace) leave(t *testing.T, rnd *rand.Rand, dir string) {
	mode := rnd.IntN(4) // of what is not synced: nothing, everything, some of it twice
	survives := func() bool { return mode == 1 || mode > 1 && rnd.IntN(2) == 0 }
	limits := make(map[string]int) // by directory: entries that survive, in their order
	for d := range p.dirs {
		n, synced := p.count(d), p.synced[d]
		switch mode {
		case 0:
			limits[d] = synced
		case 1:
			limits[d] = n
		default:
			limits[d] = synced + rnd.IntN(n-synced+1)
		}
	}
	limits[filepath.Dir(p.root)] = len(p.entries)
	names, dirs, seen := make(map[string]*cutFile), make(map[string]bool), make(map[string]int)
	for _, e := range p.entries {
		if seen[e.dir]++; seen[e.dir] > limits[e.dir] || e.dir != filepath.Dir(p.root) && !dirs[e.dir] {
			continue
		}
		switch {
		case e.isDir:
			dirs[e.name] = true
		case e.to != "":
			names[e.to] = names[e.name]
			delete(names, e.name)
		case e.file != nil:
			names[e.name] = e.file
		default:
			delete(names, e.name)
		}
	}
	must(t, os.MkdirAll(dir, 0o700))
	moved := func(path string) string { return filepath.Join(dir, strings.TrimPrefix(path, p.root)) }
	for d := range dirs {
		must(t, os.MkdirAll(moved(d), 0o700))
	}
	for path, f := range names {
		if f == nil || strings.HasSuffix(path, "-shm") { // mapped into memory, and made anew by every start
			continue
		}
		var content []byte
		for i, c := range f.changes {
			switch {
			case c.data == nil:
				if i < f.synced || survives() {
					content = resized(content, c.at)
				}
			default:
				for off := int64(0); off < int64(len(c.data)); {
					end := min(int64(len(c.data)), off+sector-(c.at+off)%sector)
					if i < f.synced || survives() {
						if need := c.at + end; int64(len(content)) < need {
							content = resized(content, need)
						}
						copy(content[c.at+off:], c.data[off:end])
					}
					off = end
				}
			}
		}
		must(t, os.WriteFile(moved(path), content, 0o600))
	}
}

func resized(b []byte, n int64) []byte {
	if int64(len(b)) >= n {
		return b[:n]
	}
	return append(b, make([]byte, n-int64(len(b)))...)
}

// TestCampaignPowerCuts cuts the power of a member at random moments of its life: its next start works, with everything that was
// acknowledged, and nothing that had been replaced or deleted.
func TestCampaignPowerCuts(t *testing.T) {
	if dir := os.Getenv(powerEnv); dir != "" {
		powerScript(t, dir)
		return
	}
	t.Parallel()
	t.Run("alone", func(t *testing.T) {
		cutPower(t, "TestCampaignPowerCuts", powerEnv, dose(40, 1000), (*powerTrace).judge)
	})
	t.Run("one of three, which is sent snapshots", func(t *testing.T) {
		cutPower(t, "TestFollowerScript", followerEnv, dose(20, 500), func(p *powerTrace, t *testing.T, dir, what string) {
			if at := p.said["addr"]; at != nil {
				judgeFollower(t, dir, at[0], at[1], what, p.said["has"] != nil, uint64(p.acked["log"]), p.tried["n"])
			}
		})
	})
}

// TestLogPowerCutAfterRestart cuts the power of a log that was closed when its tail had just been made: what is then acknowledged is in
// a file that this process has not made.
func TestLogPowerCutAfterRestart(t *testing.T) {
	if dir := os.Getenv(logEnv); dir != "" {
		logScript(t, dir)
		return
	}
	t.Parallel()
	cutPower(t, "TestLogPowerCutAfterRestart", logEnv, dose(100, 1000), func(p *powerTrace, t *testing.T, dir, what string) {
		l, err := openLog(logOptions{dir: filepath.Join(dir, "wal"), segmentSize: tinySegment, log: testLogger(t)})
		if err != nil {
			violated(t, "%s: %v", what, err)
			return
		}
		defer l.close()
		first, last := l.bounds()
		if acked, tried := uint64(p.acked["log"]), uint64(p.tried["log"]); last < acked || last > tried {
			violated(t, "%s: it ends at %d; entry %d was acknowledged and %d tried", what, last, acked, tried)
			return
		}
		if last > 0 {
			wantLog(t, l, first, last)
		}
	})
}

// logScript ends each life of a log when a new segment is there and nothing is in it.
func logScript(t *testing.T, dir string) {
	say := sayer()
	must(t, os.Mkdir(dir, 0o700))
	o := logOptions{dir: filepath.Join(dir, "wal"), segmentSize: tinySegment, log: testLogger(t)}
	for range 6 {
		l, err := openLog(o)
		must(t, err)
		_, index := l.bounds()
		segments := func() int {
			names, err := filepath.Glob(filepath.Join(o.dir, "*.wal"))
			must(t, err)
			return len(names)
		}
		for full, before := false, segments(); !full; {
			index++
			say("try", "log", strconv.FormatUint(index, 10))
			must(t, l.StoreLog(testEntry(index, 1)))
			say("ack", "log", strconv.FormatUint(index, 10))
			must(t, l.wal.DeleteRange(index+1, index+1)) // of nothing: it waits for a segment that is being made
			full = segments() > before
		}
		closeLog(t, l)
	}
}

func cutPower(t *testing.T, script, env string, n int, judge func(p *powerTrace, t *testing.T, dir, what string)) {
	root := filepath.Join(quickDir(t), "data")
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command("strace", "-f", "-qq", "-y", "-xx", "-s", "4000000", "-o", trace, "-e",
		"trace=write,pwrite64,ftruncate,fallocate,fsync,fdatasync,open,openat,mkdir,mkdirat,unlink,unlinkat,rename,renameat,renameat2",
		os.Args[0], "-test.run=^"+script+"$")
	cmd.Env = append(os.Environ(), env+"="+root)
	switch said, err := cmd.CombinedOutput(); {
	case bytes.Contains(said, []byte("fault is")) || err != nil && (os.Getenv("CI") == "true" || bytes.Contains(said, []byte("--- FAIL"))):
		t.Fatalf("%v: %s", err, said)
	case err != nil:
		t.Skipf("strace does not work here: %v: %s", err, said)
	}
	text, err := os.ReadFile(trace)
	must(t, err)
	lines := slices.Collect(strings.Lines(string(text)))
	seed := seedOf(t)
	rnd := rand.New(rand.NewPCG(seed, 10))
	p := &powerTrace{root: root, now: make(map[string]*cutFile), dirs: make(map[string]bool), synced: make(map[string]int), fds: make(map[string]int64),
		tried: make(map[string]int), acked: make(map[string]int), said: make(map[string][]string), pending: make(map[string]string)}
	var concern []int // the lines that are about the directory, or that say something
	for i, line := range lines {
		if strings.Contains(line, hexPath(root)) || strings.Contains(line, "write(1<") {
			concern = append(concern, i)
		}
	}
	if len(concern) == 0 {
		t.Fatalf("none of %d lines is about the directory", len(lines))
	}
	cuts := make([]int, n)
	for i := range cuts {
		cuts[i] = concern[rnd.IntN(len(concern))]
	}
	slices.Sort(cuts)
	dir := quickDir(t)
	next := 0
	for i, line := range lines {
		for ; next < len(cuts) && cuts[next] == i; next++ {
			left := filepath.Join(dir, "left")
			p.leave(t, rnd, left)
			counted.powerCuts.add(1)
			judge(p, t, left, fmt.Sprintf("cut before line %d of %d (QUORATE_SEED=%d)", i, len(lines), seed))
			if t.Failed() {
				t.FailNow()
			}
			must(t, os.RemoveAll(left))
		}
		p.step(t, strings.TrimSuffix(line, "\n"))
	}
	if len(p.acked) == 0 || len(p.entries) < 10 {
		t.Fatalf("the trace has %d lines, %d keys and %d entries: it was not understood", len(lines), len(p.acked), len(p.entries))
	}
	t.Logf("%d cuts among %d calls", len(cuts), len(concern))
}

// hexPath is a path as strace -xx writes it.
func hexPath(path string) string {
	var b strings.Builder
	for _, c := range []byte(path) {
		fmt.Fprintf(&b, `\x%02x`, c)
	}
	return b.String()
}

// judge starts the member on what the power cut has left.
func (p *powerTrace) judge(t *testing.T, dir, what string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := Open(ctx, Config{Dir: memberIn(dir), History: 32, segment: 16 << 10, Logger: testLogger(t)})
	if err != nil {
		violated(t, "%s: %v", what, err)
		return
	}
	defer s.Close()
	if err := s.Ready(ctx); err != nil {
		violated(t, "%s: %v", what, err)
		return
	}
	for key, tried := range p.tried {
		got, err := s.Get(ctx, key)
		if err != nil {
			violated(t, "%s: Get: %v", what, err)
			return
		}
		allowed := false
		for n := p.acked[key]; n <= tried; n++ {
			if n%7 == 0 { // deleted, or not yet written
				allowed = allowed || got == nil
			} else if word, _, _ := bytes.Cut(got, []byte(" ")); got != nil {
				allowed = allowed || string(word) == strconv.Itoa(n)
			}
		}
		if !allowed {
			violated(t, "%s: %s is %.20q; write %d was acknowledged and %d tried", what, key, got, p.acked[key], tried)
		}
	}
	eventually(t, patience, what+": the check of the file", func() error {
		if !s.Status().Verified {
			return fmt.Errorf("not verified: %v", s.Err())
		}
		return nil
	})
	if err := s.Set(ctx, "after", nil); err != nil {
		violated(t, "%s: %v", what, err)
	}
}
