package main

// A member's process: it opens one member of one system, and carries out what the parent asks for in lines of JSON on standard input,
// each answered by one line on standard output, in any order. It measures nothing that spans several members, and ends when standard
// input does.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A system is one member of a store under test, in this process. Its calls are made concurrently. Their contexts have deadlines.
type system interface {
	set(ctx context.Context, key string, val []byte) error    // nil: on the disks of a majority
	insert(ctx context.Context, key string, val []byte) error // errTaken: the key has a value
	get(ctx context.Context, key string) ([]byte, error)      // the strongest read there is; a missing key is no value
	stale(ctx context.Context, key string) ([]byte, error)    // this member's own copy

	leads() bool
	ready(ctx context.Context) error                            // returns once all three are members and take writes
	caughtUp(ctx context.Context, key string, val []byte) error // returns once the own copy holds this, which was written last
	snapshot(ctx context.Context) error                         // returns once a snapshot has been taken, of those that raft logs are cut at
	replace(ctx context.Context, lost int) error                // lets a member, whose disk is lost, come back empty; asked of the leader
	close() error
}

var errTaken = errors.New("the key is taken")

// A conf says which member of what this process is.
type conf struct {
	System string
	Index  int      // 0 to 2
	Peers  []string // host:port of all three, for the system's own traffic
	Extra  []string // the same, for whatever else a system has to listen on
	Dir    string
	First  bool // the first start of a new cluster: the directory is empty
	Lost   bool // the directory was lost, and the others have been told
}

func (c conf) addr() string { return c.Peers[c.Index] }

// A request asks a member for something; an answer is what it said.
type request struct {
	ID      uint64
	Do      string
	Order   order             `json:",omitzero"`
	Acked   map[string]uint64 `json:",omitempty"`
	From    int               `json:",omitempty"`
	To      int               `json:",omitempty"`
	Workers int               `json:",omitempty"`
	Key     string            `json:",omitempty"`
	Number  uint64            `json:",omitempty"`
	Member  int               `json:",omitempty"`
	Profile string            `json:",omitempty"` // where a CPU profile of the next For goes
	For     time.Duration     `json:",omitempty"`
	Limit   time.Duration     // for all of it
}

type answer struct {
	ID     uint64
	Error  string `json:",omitempty"`
	Yes    bool   `json:",omitempty"`
	Result result `json:",omitzero"`
	Usage  usage  `json:",omitzero"`
	Wrong  uint64 `json:",omitempty"`
	Bad    string `json:",omitempty"`
}

// A usage is what a process has used up to now.
type usage struct {
	CPU     time.Duration // user and system
	Written int64         // bytes that it caused to be written to the disk
	RSS     int64
	Disk    int64 // bytes allocated in its directory
}

type member struct {
	conf   conf
	opened chan struct{} // closed when system and err are final
	system system
	err    error
	halted atomic.Pointer[atomic.Bool] // of the order under way

	mu  sync.Mutex // held for one line of output
	out io.Writer
}

// serveMember is the whole life of a member's process.
func serveMember(in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	if !lines.Scan() {
		return errors.New("no conf on standard input: this is for the parent process to use")
	}
	m := &member{opened: make(chan struct{}), out: out}
	if err := json.Unmarshal(lines.Bytes(), &m.conf); err != nil {
		return fmt.Errorf("conf: %w", err)
	}
	go func() {
		defer close(m.opened)
		m.system, m.err = open(m.conf)
	}()
	for lines.Scan() {
		var req request
		if err := json.Unmarshal(lines.Bytes(), &req); err != nil {
			return fmt.Errorf("request: %w", err)
		}
		go m.serve(req)
	}
	<-m.opened
	if m.err != nil {
		return m.err
	}
	return m.system.close()
}

func open(c conf) (system, error) {
	for _, k := range kinds {
		if k.name == c.System {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			return k.open(ctx, c)
		}
	}
	return nil, fmt.Errorf("no system %q", c.System)
}

func (m *member) serve(req request) {
	ctx, cancel := context.WithTimeout(context.Background(), req.Limit)
	defer cancel()
	a := answer{ID: req.ID}
	select {
	case <-m.opened:
		err := m.err
		if err == nil {
			err = m.do(ctx, req, &a)
		}
		if err != nil {
			a.Error = fmt.Sprintf("%s: %v", req.Do, err)
		}
	case <-ctx.Done():
		a.Error = req.Do + ": the member has not opened"
	}
	line, err := json.Marshal(a)
	if err != nil {
		line = fmt.Appendf(nil, `{"ID":%d,"Error":"answer: %v"}`, req.ID, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.out.Write(append(line, '\n')) // a parent that is gone reads no answers, and its end ends us
}

func (m *member) do(ctx context.Context, req request, a *answer) (err error) {
	s, val := m.system, makeValue(req.Key, req.Number)
	switch req.Do {
	case "ready":
		return s.ready(ctx)
	case "leads":
		a.Yes = s.leads()
	case "load":
		return load(ctx, s, req.From, req.To, req.Workers)
	case "run":
		halted := &atomic.Bool{}
		m.halted.Store(halted)
		a.Result = carryOut(ctx, s, req.Order, halted)
	case "profile":
		return profile(req.Profile, req.For)
	case "halt":
		m.halted.Load().Store(true)
	case "verify":
		a.Wrong, a.Bad, err = verify(ctx, s, req.Acked)
	case "refuse": // an insert of a key that is there must be refused
		if err := s.insert(ctx, req.Key, val); !errors.Is(err, errTaken) {
			return fmt.Errorf("an insert of the key %s, which is there, returned %v", req.Key, err)
		}
	case "mark":
		return s.set(ctx, req.Key, val)
	case "probe":
		return probe(ctx, s, req.Key, val)
	case "caught up":
		return s.caughtUp(ctx, req.Key, val)
	case "answers":
		return awaitGet(ctx, s.get, req.Key, val)
	case "snapshot":
		return s.snapshot(ctx)
	case "replace":
		return s.replace(ctx, req.Member)
	case "usage":
		a.Usage, err = measure(m.conf.Dir)
	default:
		return errors.New("unknown request")
	}
	return err
}

// profile writes a CPU profile of the next d to path. It returns when it has begun.
func profile(path string, d time.Duration) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(out); err != nil {
		return errors.Join(err, out.Close())
	}
	time.AfterFunc(d, func() {
		pprof.StopCPUProfile()
		if err := out.Close(); err != nil {
			fmt.Fprintf(os.Stderr, "profile %s: %v\n", path, err)
		}
	})
	return nil
}

// probe begins a write every 10 ms, without waiting for those before it, until the first is acknowledged: a client that waits out
// the timeout of a lost request would measure its timeout.
func probe(ctx context.Context, s system, key string, val []byte) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	acked := make(chan struct{}, 1)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		go func() {
			if s.set(ctx, key, val) == nil {
				select {
				case acked <- struct{}{}:
				default:
				}
			}
		}()
		select {
		case <-acked:
			return nil
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitGet asks until the answer is val.
func awaitGet(ctx context.Context, read func(context.Context, string) ([]byte, error), key string, val []byte) error {
	for {
		got, err := read(ctx, key)
		if err == nil && bytes.Equal(got, val) {
			return nil
		}
		if wait(ctx, 2*time.Millisecond) != nil {
			return fmt.Errorf("%s is not what was written (%d bytes, error %v): %w", key, len(got), err, ctx.Err())
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func measure(dir string) (u usage, err error) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return u, err
	}
	u.CPU = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	if u.Written, err = procField("/proc/self/io", "write_bytes:"); err != nil {
		return u, err
	}
	if u.RSS, err = procField("/proc/self/status", "VmRSS:"); err != nil {
		return u, err
	}
	u.RSS *= 1024
	u.Disk, err = allocated(dir)
	return u, err
}

// procField returns the number that follows name.
func procField(path, name string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

// allocated is the disk space under dir. Files come and go while it looks.
func allocated(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return ignoreMissing(err)
		}
		info, err := d.Info()
		if err != nil {
			return ignoreMissing(err)
		}
		sum += info.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	return sum, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
