package main

// A cluster as the parent sees it: three processes of this program, each one member of the same system. It starts and kills them and
// asks them for things; what they do is in member.go.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A kind is a system that can be asked for by name.
type kind struct {
	name, title string
	open        func(context.Context, conf) (system, error)
	module      string // whose version is reported
}

var kinds = []kind{
	{"quorate", "quorate", openQuorate, "github.com/quorate/quorate"},
	{"etcd", "etcd", openEtcd, "go.etcd.io/etcd/server/v3"},
	{"nats", "NATS KV", openNATS, "github.com/nats-io/nats-server/v2"},
	{"raft-boltdb", "raft + BoltDB", openRaftBolt, "github.com/hashicorp/raft-boltdb/v2"},
	{"raft-wal", "raft + WAL", openRaftWAL, "github.com/hashicorp/raft-wal"},
}

type cluster struct {
	kind    kind
	members [3]*process
	runs    uint64 // orders given
	marks   uint64 // of what mark has written
}

// A process is one member.
type process struct {
	conf  conf
	cmd   *exec.Cmd
	stdin io.WriteCloser

	mu      sync.Mutex // guards the fields below, and writes to stdin
	asked   uint64
	waiting map[uint64]chan answer
	ended   chan struct{} // closed when the process has ended
}

var errEnded = errors.New("the member's process has ended")

// newCluster chooses the addresses and empties dir; no process runs yet.
func newCluster(k kind, dir string) (*cluster, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	ports, err := freePorts(6)
	if err != nil {
		return nil, err
	}
	c := &cluster{kind: k}
	for i := range c.members {
		c.members[i] = &process{conf: conf{System: k.name, Index: i, Peers: ports[:3], Extra: ports[3:],
			Dir: filepath.Join(dir, fmt.Sprint("member-", i)), First: true}}
	}
	return c, nil
}

// freePorts finds loopback addresses below those that systems give to outgoing connections.
func freePorts(n int) (addrs []string, err error) {
	for tries := 0; len(addrs) < n; tries++ {
		addr := fmt.Sprint("127.0.0.1:", 10_000+rand.IntN(20_000))
		l, listenErr := net.Listen("tcp", addr)
		if listenErr != nil && tries > 100 {
			return nil, listenErr
		}
		if listenErr == nil {
			defer l.Close() // not before all are chosen, so that they differ
			addrs = append(addrs, addr)
		}
	}
	return addrs, nil
}

// start starts all three and returns once they are members of one cluster.
func (c *cluster) start() error {
	for _, p := range c.members {
		if err := p.start(); err != nil {
			return err
		}
	}
	return c.ready()
}

func (c *cluster) ready() error {
	for _, p := range c.members {
		if _, err := p.ask(request{Do: "ready", Limit: 90 * time.Second}); err != nil {
			return err
		}
	}
	return nil
}

// leader waits until there is one and returns the others too.
func (c *cluster) leader() (leader *process, followers []*process, err error) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		leader, followers = nil, nil
		for _, p := range c.members {
			a, err := p.ask(request{Do: "leads", Limit: 10 * time.Second})
			if err == nil && a.Yes && leader == nil {
				leader = p
			} else {
				followers = append(followers, p)
			}
		}
		if leader != nil {
			return leader, followers, nil
		}
	}
	return nil, nil, fmt.Errorf("%s: no leader", c.kind.name)
}

// load loads the keys from..to through the leader.
func (c *cluster) load(from, to, workers int) error {
	leader, _, err := c.leader()
	if err != nil {
		return err
	}
	_, err = leader.ask(request{Do: "load", From: from, To: to, Workers: workers, Limit: 30 * time.Minute})
	return err
}

// order gives an order its number.
func (c *cluster) order(o order) order {
	c.runs++
	o.Number = c.runs
	return o
}

// mark writes something new through p, and returns what.
func (c *cluster) mark(p *process) (key string, number uint64, err error) {
	c.marks++
	key, number = "bench/mark/0000000000000", c.marks
	_, err = p.ask(request{Do: "mark", Key: key, Number: number, Limit: 30 * time.Second})
	return key, number, err
}

// stop ends the processes, with force if they take too long. It is silent about those that are gone.
func (c *cluster) stop() {
	var all sync.WaitGroup
	for _, p := range c.members {
		if p.cmd == nil {
			continue
		}
		all.Go(func() {
			p.stdin.Close()
			select {
			case <-p.ended:
			case <-time.After(20 * time.Second):
				p.kill()
			}
		})
	}
	all.Wait()
}

func (p *process) start() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(p.conf.Dir+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd = exec.Command(self, "member")
	p.cmd.Stderr = log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the parent; members end when their standard input does
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.waiting, p.ended = map[uint64]chan answer{}, make(chan struct{})
	go p.listen(out)
	line, err := json.Marshal(p.conf)
	if err != nil {
		return err
	}
	p.conf.First, p.conf.Lost = false, false // of the next start
	_, err = p.stdin.Write(append(line, '\n'))
	return err
}

func (p *process) listen(out io.Reader) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var a answer
		if json.Unmarshal(lines.Bytes(), &a) != nil {
			continue // something that a dependency prints
		}
		p.mu.Lock()
		answered := p.waiting[a.ID]
		delete(p.waiting, a.ID)
		p.mu.Unlock()
		if answered != nil {
			answered <- a
		}
	}
	p.cmd.Wait()
	close(p.ended)
}

func (p *process) ask(req request) (answer, error) {
	answered := make(chan answer, 1)
	select {
	case <-p.ended:
		return answer{}, p.gone(req)
	default:
	}
	p.mu.Lock()
	p.asked++
	req.ID = p.asked
	p.waiting[req.ID] = answered
	line, err := json.Marshal(req)
	if err == nil {
		_, err = p.stdin.Write(append(line, '\n'))
	}
	p.mu.Unlock()
	if err != nil {
		return answer{}, fmt.Errorf("%s: %s: %w", p.name(), req.Do, err)
	}
	select {
	case a := <-answered:
		if a.Error != "" {
			return a, fmt.Errorf("%s: %s", p.name(), a.Error)
		}
		return a, nil
	case <-p.ended:
		return answer{}, p.gone(req)
	case <-time.After(req.Limit + grace):
		return answer{}, fmt.Errorf("%s: %s: no answer", p.name(), req.Do)
	}
}

func (p *process) gone(req request) error {
	return fmt.Errorf("%s: %s: %w, see %s.log", p.name(), req.Do, errEnded, p.conf.Dir)
}

func (p *process) name() string { return fmt.Sprintf("%s member %d", p.conf.System, p.conf.Index) }

// kill is SIGKILL: no handler runs, nothing is flushed.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

func (p *process) usage() (usage, error) {
	a, err := p.ask(request{Do: "usage", Limit: time.Minute})
	return a.Usage, err
}

// machineCPU is the processor time that the whole machine has used, by anything, in /proc/stat's unit of 10 ms; stolen time too.
func machineCPU() (time.Duration, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal …
	sum := int64(0)
	for i, f := range fields {
		n, err := strconv.ParseInt(f, 10, 64)
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return time.Duration(sum) * 10 * time.Millisecond, nil
}
