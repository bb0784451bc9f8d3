package quorate

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// A simulation is a short life of a cluster in a bubble: real members on real files, a network in memory, time that passes when
// all wait. Ways are cut, members die and come back, messages are late; then all is mended, and it is asked whether raft has kept
// its promises: one leader in a term, logs that agree, every acknowledged write in every state, and a cluster that goes on.

// TestCampaignSimulation lives through many of them. QUORATE_SEED plays one again, as far as the scheduler lets it.
func TestCampaignSimulation(t *testing.T) {
	if os.Getenv("QUORATE_SEED") != "" {
		simulate(t, newCradle(t), seedOf(t))
		return
	}
	total, first := dose(24, 10_000), rand.Uint64()
	cradle := newCradle(t)
	var next atomic.Int64
	var all sync.WaitGroup
	workers := 3 * runtime.GOMAXPROCS(0) // a bubble often waits for a file
	for w := range workers {
		all.Go(func() {
			t.Run(fmt.Sprint("worker ", w), func(t *testing.T) {
				for i := next.Add(1); i <= int64(total) && !t.Failed(); i = next.Add(1) {
					simulate(t, cradle, first+uint64(i))
				}
			})
		})
	}
	all.Wait()
}

// A cradle holds clusters of three and five that were closed after their first write, so that a simulation need not form one.
type cradle struct {
	root string
	dirs map[int]string
}

func newCradle(t *testing.T) *cradle {
	t.Helper()
	c := &cradle{root: quickDir(t), dirs: make(map[int]string)}
	for _, n := range []int{3, 5} {
		c.dirs[n] = filepath.Join(c.root, fmt.Sprint("of ", n))
		synctest.Test(t, func(t *testing.T) {
			s := newScript(t)
			s.change = simulated(c.dirs[n])
			defer s.end()
			s.obey("start a")
			for _, name := range simulatedNames[1:n] {
				s.obey("join " + name + " via a")
			}
			s.obey(fmt.Sprint("await voters ", n))
			s.obey("set a k v")
			s.obey("await equal")
		})
	}
	return c
}

var simulatedNames = []string{"a", "b", "c", "d", "e"}

// simulated is the Config of a member whose directory lies in dir. What it does not need is small.
func simulated(dir string) func(*Config) {
	return func(c *Config) {
		c.Dir, c.segment = filepath.Join(dir, c.Addr[:1]), 16<<10
	}
}

// quickDir is a directory in memory, if the system has one: for what is not about syncs.
func quickDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "quorate")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// reigns are who led in which term, as every append says that reaches a member.
type reigns struct {
	mu   sync.Mutex
	t    *testing.T
	seed uint64
	led  map[uint64]string

	began func(term uint64, leader string) // told of each term in which somebody leads, once; may be nil
}

func (r *reigns) seen(term uint64, leader string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if was, ok := r.led[term]; ok && was != leader {
		violated(r.t, "%s and %s lead in term %d (QUORATE_SEED=%d)", was, leader, term, r.seed)
	}
	if r.led[term] == "" && r.began != nil {
		r.began(term, leader)
	}
	r.led[term] = leader
}

// watch stands before a member and reads what appends say of their leader.
func (r *reigns) watch(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if filepath.Base(req.URL.Path) == "append" {
			var head bytes.Buffer
			body := bufio.NewReader(io.TeeReader(req.Body, &head))
			if term, err := appendTerm(body); err == nil {
				r.seen(term, req.Header.Get(headerFrom))
			}
			seen := *req
			seen.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(&head, req.Body), req.Body}
			req = &seen
		}
		next.ServeHTTP(w, req)
	})
}

// appendTerm reads an append up to its term: see frame.go.
func appendTerm(r *bufio.Reader) (uint64, error) {
	if _, err := r.Discard(1); err != nil { // version
		return 0, err
	}
	if _, err := binary.ReadUvarint(r); err != nil { // protocol
		return 0, err
	}
	for range 2 { // id, address
		n, err := binary.ReadUvarint(r)
		if err != nil {
			return 0, err
		}
		if _, err := r.Discard(int(n)); err != nil {
			return 0, err
		}
	}
	return binary.ReadUvarint(r)
}

// simulate is one life, in which the seed makes the choices.
func simulate(t *testing.T, cradle *cradle, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 9))
	n := 3 + 2*(rnd.IntN(4)/3)
	dir, err := os.MkdirTemp(cradle.root, "life")
	must(t, err)
	defer os.RemoveAll(dir)
	must(t, os.CopyFS(dir, os.DirFS(cradle.dirs[n])))
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		r := &reigns{t: t, seed: seed, led: make(map[uint64]string)}
		c.front = r.watch
		j := newJournal(t) // whatever happens, its lines are well formed
		defer c.end()
		for _, name := range simulatedNames[:n] {
			m := &scriptMember{name: name, conf: Config{Addr: name + ".test:7001", Client: c.net.client(name + ".test:7001"), Logger: cmp.Or(testLogger(t), j.logger(name))}}
			simulated(dir)(&m.conf)
			c.members = append(c.members, m)
			c.obey("restart " + name)
		}
		l := &life{t: t, script: c, rnd: rnd, seed: seed, acked: make(map[string]string), other: make(map[string][]string), up: make(map[*scriptMember]*Service)}
		l.live()
		l.judge()
	})
	counted.simulations.add(1)
}

type life struct {
	t *testing.T
	*script
	rnd  *rand.Rand
	seed uint64

	mu    sync.Mutex                 // guards the fields below
	acked map[string]string          // by key: the newest
	other map[string][]string        // by key: values that may have been written, or may be yet
	up    map[*scriptMember]*Service // what the writers see
}

// live has writers on all members write while two faults strike.
func (l *life) live() {
	ctx, stop := context.WithCancel(l.t.Context())
	var writers sync.WaitGroup
	for _, m := range l.members {
		l.up[m] = m.s
	}
	for i, m := range l.members {
		writers.Go(func() { l.write(ctx, i, m) })
	}
	names := simulatedNames[:len(l.members)]
	for range 2 {
		x, y := names[l.rnd.IntN(len(names))], names[l.rnd.IntN(len(names))]
		rest := 0
		switch l.rnd.IntN(7) {
		case 0: // a random split
			for _, from := range l.members {
				for _, to := range l.members {
					if from != to && l.rnd.IntN(2) == 0 {
						l.net.cut(from.conf.Addr, to.conf.Addr)
					}
				}
			}
		case 1: // one alone
			for _, m := range l.members {
				l.net.cut(l.member(x).conf.Addr, m.conf.Addr)
				l.net.cut(m.conf.Addr, l.member(x).conf.Addr)
			}
		case 2:
			l.obey("cut " + x + " to " + y)
		case 3:
			for _, m := range l.members {
				l.net.delay(l.member(x).conf.Addr, m.conf.Addr, time.Duration(l.rnd.IntN(400))*time.Millisecond)
			}
		case 4:
			rest = 1
		case 5:
			rest = len(names)
		case 6: // one, the leader if it is one, reaches the others and is not reached, for longer than it may lead so
			m := l.member(x)
			if leader, err := leaderOf(l.members); err == nil {
				m = leader
			}
			l.deafen(m)
			time.Sleep(2 * stallLimit)
			l.net.serve(m.conf.Addr, l.front(m.s))
		}
		time.Sleep(time.Duration(l.rnd.IntN(1200)) * time.Millisecond)
		var dead []*scriptMember
		for _, i := range l.rnd.Perm(len(names))[:rest] {
			m := l.members[i]
			l.mu.Lock()
			l.up[m] = nil
			l.mu.Unlock()
			l.obey("kill " + m.name)
			dead = append(dead, m)
		}
		if rest > 0 {
			time.Sleep(time.Duration(l.rnd.IntN(1200)) * time.Millisecond)
		}
		if l.rnd.IntN(2) == 0 {
			l.obey("reset " + x)
		}
		for _, m := range dead {
			l.obey("restart " + m.name)
			l.mu.Lock()
			l.up[m] = m.s
			l.mu.Unlock()
		}
		if l.rnd.IntN(3) > 0 {
			l.obey("heal")
		}
	}
	l.obey("heal")
	stop()
	writers.Wait()
}

// write writes values of its own to keys of its own.
func (l *life) write(ctx context.Context, writer int, m *scriptMember) {
	for i := 0; ctx.Err() == nil; i++ {
		l.mu.Lock()
		s := l.up[m]
		l.mu.Unlock()
		if s != nil {
			key, value := fmt.Sprintf("%d/%d", writer, i%5), fmt.Sprint(i)
			one, cancel := context.WithTimeout(ctx, 2*time.Second)
			err := s.Set(one, key, []byte(value))
			cancel()
			l.mu.Lock()
			switch {
			case err == nil:
				l.acked[key] = value
			case !errors.Is(err, ErrNotApplied):
				l.other[key] = append(l.other[key], value)
			}
			l.mu.Unlock()
		}
		select {
		case <-time.After(80 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// judge asks for the promises when everything is mended.
func (l *life) judge() {
	t := l.t
	for _, m := range l.members {
		ctx, cancel := context.WithTimeout(t.Context(), scriptLimit)
		if err := m.s.Set(ctx, "end", []byte(m.name)); err != nil {
			violated(t, "%s is stuck: %v (QUORATE_SEED=%d)", m.name, err, l.seed)
		}
		cancel()
	}
	if got := l.run([]string{"await", "equal"}); got != "ok" {
		violated(t, "%s (QUORATE_SEED=%d)", got, l.seed)
	}
	for key, value := range l.acked {
		for _, m := range l.members {
			if got := string(m.s.Stale().Get(key)); got != value && !slices.Contains(l.other[key], got) {
				violated(t, "%s holds %q under %s, want %q (QUORATE_SEED=%d)", m.name, got, key, value, l.seed)
			}
		}
	}
	for _, m := range l.members[1:] {
		l.compareLogs(l.members[0], m)
	}
}

// compareLogs: two entries with one index and one term are the same, and so is all that comes before them.
func (l *life) compareLogs(a, b *scriptMember) {
	firstA, lastA := a.s.wal.bounds()
	firstB, lastB := b.s.wal.bounds()
	same := false
	for i := min(lastA, lastB); i >= max(firstA, firstB) && i > 0; i-- {
		var x, y raft.Log
		must(l.t, a.s.wal.GetLog(i, &x))
		must(l.t, b.s.wal.GetLog(i, &y))
		same = same || x.Term == y.Term
		if same && (x.Term != y.Term || x.Type != y.Type || !bytes.Equal(x.Data, y.Data)) {
			violated(l.t, "entry %d of %s and %s differs, and one at or behind it has the same term (QUORATE_SEED=%d)", i, a.name, b.name, l.seed)
			return
		}
	}
}
