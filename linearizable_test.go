//go:build unix

package quorate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// A history is what clients of real processes asked and were told. After it three things are asked: is there an order of
// the calls that explains all answers (porcupine), did anything that was refused happen, and do the members agree.
type history struct {
	start time.Time
	clock atomic.Int64 // orders calls and returns, also where time stands still

	mu      sync.Mutex // guards the fields below
	ops     []porcupine.Operation
	refused map[string]string // by the unique value of a write that did nothing: what was answered
	keys    map[string]bool
	acks    []time.Duration // when writes were acknowledged
}

type asked struct{ op, key, value string }

// told is what a call returned; an unknown one may have taken effect at any time after the call, or never.
type told struct {
	verdict, value string
	unknown        bool
}

// registers: each key is on its own. "" is a missing key.
var registers = porcupine.Model{
	Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
		byKey := make(map[string][]porcupine.Operation)
		for _, o := range ops {
			byKey[o.Input.(asked).key] = append(byKey[o.Input.(asked).key], o)
		}
		var parts [][]porcupine.Operation
		for _, p := range byKey {
			parts = append(parts, p)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		now, c, a := state.(string), input.(asked), output.(told)
		switch {
		case c.op == "get":
			return a.value == now, now
		case c.op == "set":
			return true, c.value
		case c.op == "delete":
			return true, ""
		case a.verdict == "unsatisfied":
			return now != "", now
		case now == "":
			return true, c.value
		}
		return a.unknown, now // an insert that met a value
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprint(input, " → ", output) },
}

func newHistory() *history {
	return &history{start: time.Now(), refused: make(map[string]string), keys: make(map[string]bool)}
}

// errDown: nobody was there to be asked.
var errDown = errors.New("down")

// run makes calls on one member until ctx ends, and rests between two of them. Every value that is written is unique.
func (h *history) run(ctx context.Context, t *testing.T, client int, do func(order) (report, error), rest time.Duration) {
	rnd := rand.New(rand.NewPCG(uint64(client), 1))
	for i := 0; ctx.Err() == nil; i++ {
		// The keys change with time, so that each has a short history that is quick to check.
		c := asked{op: "get", key: fmt.Sprintf("%d/%d", time.Since(h.start)/(250*time.Millisecond), rnd.IntN(4))}
		if n := rnd.IntN(20); n < 12 {
			c.op = [...]string{"set", "insert", "delete"}[n/4]
			c.value = fmt.Sprintf("%d-%d", client, i)
		}
		pause := rest
		if !h.make(t, client, do, c) {
			pause = 10 * time.Millisecond
		}
		if pause == 0 {
			continue
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// make makes one call and records it. False: nobody was there.
func (h *history) make(t *testing.T, client int, do func(order) (report, error), c asked) bool {
	began := h.clock.Add(1)
	r, err := do(order{Op: c.op, Key: c.key, Value: []byte(c.value), Timeout: 5 * time.Second})
	ended := h.clock.Add(1)
	if errors.Is(err, errDown) || errors.Is(err, syscall.ECONNREFUSED) {
		return false
	}
	a := told{verdict: r.Verdict, value: string(r.Value)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys[c.key] = true
	switch {
	case c.op == "get" && (err != nil || r.Verdict != "ok"):
		return true
	case err != nil, strings.HasPrefix(r.Verdict, "uncertain"):
		a.unknown = true
	case strings.HasPrefix(r.Verdict, "not applied"):
		h.refused[c.value] = r.Error
		return true
	case r.Verdict == "unsatisfied" && c.op == "insert":
		h.refused[c.value] = r.Error
	case r.Verdict != "ok":
		t.Errorf("%v: an answer that is not one: %s", c, r.Error)
	}
	if c.op != "get" && !a.unknown {
		h.acks = append(h.acks, time.Since(h.start))
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: c, Call: began, Output: a, Return: ended})
	return true
}

// pause is the longest time without an acknowledged write after that moment.
func (h *history) pause(since time.Duration) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	longest := time.Duration(0)
	for i := 1; i < len(h.acks); i++ {
		if h.acks[i] > since {
			longest = max(longest, h.acks[i]-h.acks[i-1])
		}
	}
	return longest
}

func (h *history) check(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	last, unknown := h.clock.Load(), 0
	for i, o := range h.ops {
		c, a := o.Input.(asked), o.Output.(told)
		if a.unknown {
			unknown++
			h.ops[i].Return = last + 1
		}
		if why, ok := h.refused[a.value]; ok && c.op == "get" {
			t.Errorf("%s holds %s, whose write did nothing, as its caller was told: %s", c.key, a.value, why)
		}
	}
	t.Logf("%d calls, %d of them with an unknown outcome, %d writes without effect, %d keys", len(h.ops), unknown, len(h.refused), len(h.keys))
	result, info := porcupine.CheckOperationsVerbose(registers, h.ops, time.Minute)
	if result == porcupine.Ok {
		return
	}
	t.Errorf("no order of the calls explains the answers: %v", result)
	path := filepath.Join(t.ArtifactDir(), "history.html") // kept with go test -artifacts
	if err := porcupine.VisualizePath(registers, info, path); err == nil {
		t.Logf("see %s", path)
	}
}

// campaign is how long QUORATE_CAMPAIGN wants the tests here to go on; without it they end as soon as they can.
func campaign(t *testing.T) time.Duration {
	text := os.Getenv("QUORATE_CAMPAIGN")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	must(t, err)
	return d
}

// TestHistory lets clients on three real processes write and read while members are killed and stopped. QUORATE_CAMPAIGN
// makes it longer.
func TestHistory(t *testing.T) {
	list := newProcesses(t)
	h := newHistory()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients sync.WaitGroup
	for i := range 12 {
		clients.Go(func() { h.run(ctx, t, i, list[i%3].do, 0) })
	}
	after := func(d time.Duration) { <-time.After(d) }
	faults := []struct {
		name   string
		strike func()
	}{
		{"kill -9 of the leader", func() {
			l := leaderProcess(t, list)
			l.kill()
			after(1500 * time.Millisecond)
			l.start()
		}},
		{"the leader stops for 1.5 s", func() {
			l := leaderProcess(t, list)
			l.freeze()
			after(1500 * time.Millisecond)
			l.thaw()
		}},
		{"kill -9 of all", func() {
			for _, p := range list {
				p.kill()
			}
			for _, p := range list {
				p.start()
			}
		}},
		{"kill -9 of a follower", func() {
			f := without(list, leaderProcess(t, list))[0]
			f.kill()
			f.start()
		}},
	}
	end := time.Now().Add(campaign(t))
	for again := true; again; again = time.Now().Before(end) {
		for _, f := range faults {
			after(300 * time.Millisecond)
			at := time.Since(h.start)
			f.strike()
			for _, p := range list {
				p.awaitReady()
			}
			after(200 * time.Millisecond)
			t.Logf("%s: the longest time without an acknowledged write was %v", f.name, h.pause(at).Round(time.Millisecond))
		}
	}
	cancel()
	clients.Wait()
	awaitEqualProcesses(t, list)
	for key := range h.keys {
		h.make(t, 99, list[0].do, asked{op: "get", key: key})
		want := list[0].must(order{Op: "stale", Key: key}).Value
		for _, p := range list[1:] {
			if v := p.must(order{Op: "stale", Key: key}).Value; string(v) != string(want) {
				t.Errorf("%s is %q on one member and %q on another", key, want, v)
			}
		}
	}
	h.check(t)
}

// TestHistoryInBubble is the same with faults that a machine does not make on request: partitions, messages that go one way
// only, come late or break, in an order that the seed gives. QUORATE_SEED plays one again, as far as the scheduler lets it.
func TestHistoryInBubble(t *testing.T) {
	seed := rand.Uint64()
	if text := os.Getenv("QUORATE_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	end := time.Now().Add(campaign(t))
	for again := true; again; again = time.Now().Before(end) && !t.Failed() {
		t.Logf("QUORATE_SEED=%d", seed)
		bubble(t, func(t *testing.T, c *script, _, _, _ *scriptMember) { disturb(t, c, rand.New(rand.NewPCG(seed, 2))) })
		seed++
	}
}

func disturb(t *testing.T, c *script, rnd *rand.Rand) {
	h := newHistory()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var up [3]atomic.Pointer[Service] // what the clients see; the script's own view is not for many goroutines
	for i, m := range c.members {
		up[i].Store(m.s)
	}
	do := func(i int) func(order) (report, error) {
		return func(o order) (report, error) {
			s := up[i].Load()
			if s == nil {
				return report{}, errDown
			}
			return obey(s, o), nil
		}
	}
	var clients sync.WaitGroup
	for i := range 9 {
		clients.Go(func() { h.run(ctx, t, i, do(i%3), time.Duration(10+5*i)*time.Millisecond) })
	}
	names := []string{"a", "b", "c"}
	for range 5 {
		rnd.Shuffle(3, func(i, j int) { names[i], names[j] = names[j], names[i] })
		x, y, z := names[0], names[1], names[2]
		var fault []string
		switch rnd.IntN(7) {
		case 0:
			fault = []string{fmt.Sprintf("partition {%s} {%s %s}", x, y, z)}
		case 1:
			fault = []string{fmt.Sprintf("partition {%s} {%s} {%s}", x, y, z)}
		case 2:
			fault = []string{fmt.Sprintf("cut %s to %s", x, y)}
		case 3:
			fault = []string{fmt.Sprintf("cut %s to %s", x, y), fmt.Sprintf("cut %s to %s", x, z)}
		case 4:
			fault = []string{fmt.Sprintf("cut %s to %s", x, z), fmt.Sprintf("cut %s to %s", y, z)}
		case 5:
			fault = []string{fmt.Sprintf("delay %s to %s %dms", x, y, rnd.IntN(400)), fmt.Sprintf("delay %s to %s %dms", y, x, rnd.IntN(400))}
		}
		for _, line := range fault {
			c.obey(line)
		}
		time.Sleep(time.Duration(rnd.IntN(1500)) * time.Millisecond)
		dead := rnd.IntN(6) // one to three members die at some of these moments, with the network as it is
		for i, m := range c.members {
			if dead == 0 || dead == i+1 {
				c.obey("kill " + m.name)
				up[i].Store(nil)
			}
		}
		if rnd.IntN(2) == 0 {
			c.obey("reset " + x)
		}
		time.Sleep(time.Duration(rnd.IntN(1000)) * time.Millisecond)
		c.obey("heal")
		for i, m := range c.members {
			if m.s == nil {
				c.obey("restart " + m.name)
				up[i].Store(m.s)
			}
		}
		time.Sleep(time.Duration(rnd.IntN(700)) * time.Millisecond)
	}
	cancel()
	clients.Wait()
	c.obey("await ready a b c")
	c.obey("await equal")
	for key := range h.keys {
		h.make(t, 99, do(0), asked{op: "get", key: key})
	}
	h.check(t)
}

func awaitEqualProcesses(t *testing.T, list []*process) {
	t.Helper()
	eventually(t, 30*time.Second, "equal states", func() error {
		first := list[0].must(order{Op: "status"}).Status
		for _, p := range list[1:] {
			if st := p.must(order{Op: "status"}).Status; st.AppliedIndex != first.AppliedIndex || st.Hash != first.Hash {
				return fmt.Errorf("%s at %d and %s at %d", st.Hash, st.AppliedIndex, first.Hash, first.AppliedIndex)
			}
		}
		return nil
	})
}

// TestStoppedLeaderReads: a leader that was stopped and goes on does not know that it has been deposed. Reads that waited
// in its sockets, and came after a write elsewhere was acknowledged, must see that write or fail.
func TestStoppedLeaderReads(t *testing.T) {
	list := newProcesses(t)
	for round := range 3 {
		l := leaderProcess(t, list)
		l.must(order{Op: "set", Key: "k", Value: []byte("old")})
		ctx, cancel := context.WithCancel(t.Context())
		var busy, late sync.WaitGroup
		for range 4 { // rounds are in flight when it stops
			busy.Go(func() {
				for ctx.Err() == nil {
					l.do(order{Op: "get", Key: "k", Timeout: 10 * time.Second})
				}
			})
		}
		l.freeze()
		n := leaderProcess(t, without(list, l))
		want := fmt.Sprint("new ", round)
		n.must(order{Op: "set", Key: "k", Value: []byte(want), Timeout: 20 * time.Second})
		var mu sync.Mutex
		fresh := 0
		for range 16 {
			late.Go(func() {
				r, err := l.do(order{Op: "get", Key: "k", Timeout: 10 * time.Second})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil && r.Verdict == "ok" && string(r.Value) != want:
					t.Errorf("round %d: a read after the write of %q was acknowledged answers %q", round, want, r.Value)
				case err == nil && r.Verdict == "ok":
					fresh++
				}
			})
		}
		// They reach the stopped process's sockets before it goes on; nothing tells when.
		<-time.After(50 * time.Millisecond)
		l.thaw()
		late.Wait()
		cancel()
		busy.Wait()
		t.Logf("round %d: %d of 16 reads answered, all fresh", round, fresh)
	}
}

// TestMemoryWithMemberDown: what a member that does not answer would need is not kept in memory for it.
func TestMemoryWithMemberDown(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	list := newProcesses(t)
	l := leaderProcess(t, list)
	rest := without(list, l)
	down, other := rest[0], rest[1]
	limit := max(5*time.Second, campaign(t))
	down.freeze()
	defer down.thaw()
	ended := make(chan int64, 1)
	go func() {
		r, _ := l.do(order{Op: "load", Writers: 64, Timeout: limit})
		ended <- r.Count
	}()
	<-time.After(2 * time.Second)
	before := [2]int64{residentBytes(t, l), residentBytes(t, other)}
	writes := <-ended
	if writes == 0 {
		t.Fatal("nothing was written")
	}
	for i, p := range []*process{l, other} {
		after := residentBytes(t, p)
		t.Logf("%d writes in %v, resident: %d MiB after 2 s, %d MiB at the end", writes, limit, before[i]>>20, after>>20)
		if after-before[i] > 64<<20 {
			t.Errorf("grew by %d MiB", (after-before[i])>>20)
		}
	}
}

func residentBytes(t *testing.T, p *process) int64 {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	must(t, err)
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	must(t, err)
	return pages * int64(os.Getpagesize())
}
