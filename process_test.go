//go:build unix

package quorate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Members in processes of their own, which can be killed and stopped as a machine would do it: the test binary runs itself
// with processEnv set, and the parent drives it by POST /do beside /raft/.

// An order is one call that the parent has a member make.
type order struct {
	Op      string // set, insert, delete, exec, get, lookup, list, stale, local, allow, ready, err, status, load, cut, installed, remove, ways, descriptors
	Key     string // list, local: the prefix
	Value   []byte
	Parts   []part // exec
	Timeout time.Duration
	Writers int    // load: that many writers write until Timeout
	Index   uint64 // cut: of the log, until it does not hold this entry any more
}

// A part is an Op as it is sent to a process.
type part struct {
	Do, Key string
	Value   []byte
	Version uint64
}

func (p part) op() Op {
	switch p.Do {
	case "set":
		return Set(p.Key, p.Value)
	case "delete":
		return Delete(p.Key)
	case "if exists":
		return IfExists(p.Key)
	case "if not exists":
		return IfNotExists(p.Key)
	case "if value":
		return IfValue(p.Key, p.Value)
	case "if not value":
		return IfNotValue(p.Key, p.Value)
	case "if version":
		return IfVersion(p.Key, p.Version)
	case "if not version":
		return IfNotVersion(p.Key, p.Version)
	}
	panic("unknown part " + p.Do)
}

func opsOf(parts []part) []Op {
	var ops []Op
	for _, p := range parts {
		ops = append(ops, p.op())
	}
	return ops
}

type report struct {
	Verdict  string // see verdict
	Value    []byte // nil is missing
	Entries  []Entry
	Revision uint64          // exec
	Failed   *ConditionError // exec: with the verdict unsatisfied
	Status   Status
	Count    int64 // load: writes that returned nil; installed: index of the last snapshot that was installed
	Error    string
}

// TestMemberProcess is no test: it is the member in a process of its own. It ends when its standard input does.
func TestMemberProcess(t *testing.T) {
	text := os.Getenv(processEnv)
	if text == "" {
		t.Skip("run by other tests")
	}
	c := Config{Logger: testLogger(t)}
	var given memberConfig
	must(t, json.Unmarshal([]byte(text), &given))
	c.Dir, c.Addr, c.Join, c.Bootstrap, c.History, c.segment = given.Dir, given.Addr, given.Join, given.Bootstrap, given.History, given.Segment
	var ways ways
	c.Client = newClient(t, &ways.out)
	s, err := Open(context.Background(), c)
	must(t, err)
	mux := http.NewServeMux()
	mux.Handle("/raft/", ways.in(s))
	mux.HandleFunc("POST /do", func(w http.ResponseWriter, req *http.Request) {
		var o order
		if err := json.NewDecoder(req.Body).Decode(&o); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if o.Op == "ways" {
			ways.set(o.Key)
			json.NewEncoder(w).Encode(report{Verdict: "ok"})
			return
		}
		json.NewEncoder(w).Encode(obey(s, o))
	})
	mux.HandleFunc("GET /watch", serveWatch(s))
	l, err := net.Listen("tcp", c.Addr)
	must(t, err)
	go (&http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0)}).Serve(l)
	io.Copy(io.Discard, os.Stdin)
	if err := s.Close(); err != nil && !errors.Is(err, errLate) { // on a busy machine the file lacks what the log has
		t.Fatal(err)
	}
}

// ways are those of a member to the others and back. They can be cut, each alone, and be slow.
type ways struct {
	out        line
	deaf, slow atomic.Bool
}

// set does what the words say, of "deaf", "mute" and "slow".
func (w *ways) set(words string) {
	w.deaf.Store(strings.Contains(words, "deaf"))
	w.slow.Store(strings.Contains(words, "slow"))
	w.out.set(strings.Contains(words, "mute"))
}

func (w *ways) in(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		if w.slow.Load() {
			<-time.After(time.Duration(rand.IntN(200)) * time.Millisecond)
		}
		if w.deaf.Load() {
			panic(http.ErrAbortHandler) // the connection is reset
		}
		next.ServeHTTP(rw, req)
	})
}

func obey(s *Service, o order) report {
	ctx, cancel := context.WithTimeout(context.Background(), o.Timeout)
	defer cancel()
	var r report
	var err error
	switch o.Op {
	case "set":
		err = s.Set(ctx, o.Key, o.Value)
	case "insert":
		err = s.Insert(ctx, o.Key, o.Value)
	case "delete":
		err = s.Delete(ctx, o.Key)
	case "exec":
		r.Revision, err = s.Exec(ctx, opsOf(o.Parts)...)
		errors.As(err, &r.Failed)
	case "get":
		r.Value, err = s.Get(ctx, o.Key)
	case "lookup":
		var e Entry
		if e, err = s.Lookup(ctx, o.Key); err == nil {
			r.Entries = []Entry{e}
		} else if errors.Is(err, ErrNotFound) {
			err = nil
		}
	case "list":
		r.Entries, err = entriesOf(s.List(ctx, o.Key))
	case "stale":
		r.Value = s.Stale().Get(o.Key)
	case "local":
		r.Entries, err = entriesOf(s.Local().List(ctx, o.Key))
	case "allow":
		err = s.AddAllowedMember(ctx, o.Key)
	case "remove":
		err = s.RemoveMember(ctx, o.Key)
	case "ready":
		err = s.Ready(ctx)
	case "err":
		err = s.Err()
	case "status":
		r.Status = s.Status()
	case "load":
		r.Count = load(ctx, s, o.Writers)
	case "cut":
		err = cutLog(s, o.Index)
	case "descriptors":
		err = withoutDescriptors(o.Timeout)
	case "installed":
		r.Count = int64(s.store.meta().installed)
	default:
		err = errors.New("unknown order")
	}
	r.Verdict = verdict(err)
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

func entriesOf(list iter.Seq2[Entry, error]) (all []Entry, err error) {
	for e, err := range list {
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// load writes 256 bytes at a time to a thousand keys.
func load(ctx context.Context, s *Service, writers int) int64 {
	var done atomic.Int64
	var wg sync.WaitGroup
	value := bytes.Repeat([]byte("x"), 256)
	for w := range writers {
		wg.Go(func() {
			for i := w; ctx.Err() == nil; i += writers {
				if s.Set(ctx, fmt.Sprint("load/", i%1000), value) == nil {
					done.Add(1)
				}
			}
		})
	}
	wg.Wait()
	return done.Load()
}

// A memberConfig is what a process is told of its Config.
type memberConfig struct {
	Dir, Addr, Join string
	Bootstrap       []string
	History         int
	Segment         int // bytes of a segment of the log, 0 = as usual
}

type process struct {
	t               *testing.T
	dir, addr, join string
	bootstrap       []string
	program         string // of an earlier release; "" is this test binary
	history         int    // Config.History
	segment         int
	client          *http.Client

	mu    sync.Mutex // guards the fields below
	cmd   *exec.Cmd  // nil while it is down
	stdin io.Closer
}

// newProcesses starts a cluster of three, all of them voters when it returns.
func newProcesses(t *testing.T, change ...func(*process)) []*process {
	t.Helper()
	var list []*process
	for i := range 3 {
		p := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), client: newClient(t, new(line))}
		t.Cleanup(p.stop)
		for _, f := range change {
			f(p)
		}
		if i > 0 {
			p.join = list[0].addr
			list[0].must(order{Op: "allow", Key: p.addr})
		}
		p.start()
		list = append(list, p)
	}
	for _, p := range list {
		p.awaitReady()
	}
	awaitVoters(t, list)
	return list
}

func (p *process) start() {
	p.t.Helper()
	p.launch()
	eventually(p.t, 30*time.Second, "a process that answers", func() error {
		_, err := p.do(order{Op: "status"})
		return err
	})
}

// launch starts it and waits for nothing.
func (p *process) launch() {
	p.t.Helper()
	text, err := json.Marshal(memberConfig{p.dir, p.addr, p.join, p.bootstrap, p.history, p.segment})
	must(p.t, err)
	cmd := exec.Command(os.Args[0], "-test.run=^TestMemberProcess$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), processEnv+"="+string(text))
	if p.program != "" {
		cmd = exec.Command(p.program, "-dir", p.dir, "-addr", p.addr, "-join", p.join)
	}
	cmd.Stderr = os.Stderr
	var out bytes.Buffer
	cmd.Stdout = &out
	stdin, err := cmd.StdinPipe()
	must(p.t, err)
	must(p.t, cmd.Start())
	p.mu.Lock()
	p.cmd, p.stdin = cmd, stdin
	p.mu.Unlock()
}

// awaitReady waits until it would accept a write.
func (p *process) awaitReady() {
	p.t.Helper()
	p.must(order{Op: "ready", Timeout: 30 * time.Second})
}

// kill is kill -9.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.cmd = nil
	counted.kills.add(1)
}

func (p *process) stop() {
	p.mu.Lock()
	cmd, stdin := p.cmd, p.stdin
	p.cmd = nil
	p.mu.Unlock()
	if cmd == nil {
		return
	}
	cmd.Process.Signal(syscall.SIGCONT)
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		p.t.Errorf("member at %s ended with %v:\n%s", p.addr, err, cmd.Stdout)
	}
}

// freeze stops the process where it is, as a suspended machine is.
func (p *process) freeze() { p.signal(syscall.SIGSTOP) }
func (p *process) thaw()   { p.signal(syscall.SIGCONT) }

func (p *process) signal(sig os.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	must(p.t, p.cmd.Process.Signal(sig))
}

// do has the member make a call. An error means that no answer came, and leaves open whether the call was made.
func (p *process) do(o order) (report, error) {
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Second
	}
	var r report
	body, err := json.Marshal(o)
	if err != nil {
		return r, err
	}
	resp, err := p.client.Post("http://"+p.addr+"/do", "application/json", bytes.NewReader(body))
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(firstRelease.ReplaceAllFunc(answer, func(role []byte) []byte {
		return fmt.Appendf(nil, `"Role":%q`, Role(role[len(role)-1]-'0'))
	}), &r)
}

// firstRelease finds a role as release 0.1.0 writes it.
var firstRelease = regexp.MustCompile(`"Role":[0-5]`)

func (p *process) must(o order) report {
	p.t.Helper()
	r, err := p.do(o)
	if err != nil || r.Verdict != "ok" {
		p.t.Fatalf("%s %s at %s: %v %s %s", o.Op, o.Key, p.addr, err, r.Verdict, r.Error)
	}
	return r
}

// leaderProcess is the one that leads, when all that answer agree on it.
func leaderProcess(t *testing.T, list []*process) *process {
	t.Helper()
	var leader *process
	eventually(t, 30*time.Second, "a leader", func() error {
		leader = nil
		for _, p := range list {
			r, err := p.do(order{Op: "status"})
			if err != nil {
				return err
			}
			if r.Status.LeaderAddr == "" {
				return fmt.Errorf("%s knows no leader", p.addr)
			}
			if r.Status.Role == Leader {
				leader = p
			}
		}
		if leader == nil {
			return errors.New("none of them leads")
		}
		return nil
	})
	return leader
}

func without(list []*process, p *process) []*process {
	var rest []*process
	for _, q := range list {
		if q != p {
			rest = append(rest, q)
		}
	}
	return rest
}
