package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A loose is a system that can be told to break each promise that the driver checks. Nothing but its faults is in question here. Each
// call takes a millisecond, which passes at once in a test's bubble.
type loose struct {
	mu     sync.Mutex // guards values
	values map[string][]byte

	loses   int64 // every so-manieth set is acknowledged and dropped; 0 = none
	damages bool  // reads flip a bit
	fails   bool  // writes are refused
	sets    atomic.Int64
}

func (l *loose) set(_ context.Context, key string, val []byte) error {
	time.Sleep(time.Millisecond)
	if l.fails {
		return errors.New("refused")
	}
	if n := l.sets.Add(1); l.loses > 0 && n%l.loses == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.values[key] = val
	return nil
}

func (l *loose) insert(ctx context.Context, key string, val []byte) error {
	l.mu.Lock()
	_, ok := l.values[key]
	l.mu.Unlock()
	if ok {
		return errTaken
	}
	return l.set(ctx, key, val)
}

func (l *loose) get(_ context.Context, key string) ([]byte, error) {
	time.Sleep(time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	val := bytes.Clone(l.values[key])
	if l.damages && len(val) > 0 {
		val[len(val)-1] ^= 1
	}
	return val, nil
}

func (l *loose) stale(ctx context.Context, key string) ([]byte, error) { return l.get(ctx, key) }
func (l *loose) leads() bool                                           { return true }
func (l *loose) ready(context.Context) error                           { return nil }
func (l *loose) snapshot(context.Context) error                        { return nil }
func (l *loose) replace(context.Context, int) error                    { return nil }
func (l *loose) close() error                                          { return nil }
func (l *loose) caughtUp(ctx context.Context, key string, val []byte) error {
	return awaitGet(ctx, l.get, key, val)
}

const tested = 4 * 500 // operations: four workers for half a second

// runOn is to be called in a bubble.
func runOn(t *testing.T, s *loose, verb string) result {
	t.Helper()
	s.values = map[string][]byte{}
	for i := range 100 {
		s.values[keyAt(i)] = makeValue(keyAt(i), uint64(i))
	}
	o := order{Cell: cell{Verb: verb, Workers: 4}, Number: 7, Keys: 100, Warmup: 100 * time.Millisecond, For: 500 * time.Millisecond}
	return carryOut(t.Context(), s, o, &atomic.Bool{})
}

func TestDriverCountsWhatASoundSystemDoes(t *testing.T) {
	for _, verb := range []string{"set", "insert", "get", "stale", "mix"} {
		synctest.Test(t, func(t *testing.T) {
			s := &loose{}
			r := runOn(t, s, verb)
			acked := r.Acked
			if r.Acked = nil; r.Ops < tested-8 || r.Ops > tested+8 || r.Total != tested*12/10 || r.Errors != 0 || r.Wrong != 0 || r.Seconds != 0.5 {
				t.Errorf("%s: %+v", verb, r)
			}
			for _, d := range []time.Duration{r.P50, r.P99, r.Max} {
				if d < 990*time.Microsecond || d > 1010*time.Microsecond {
					t.Errorf("%s: a latency of %v, want 1 ms", verb, d)
				}
			}
			if writes := verb != "get" && verb != "stale"; writes != (len(acked) >= 50) {
				t.Errorf("%s: %d acknowledged writes to be looked for", verb, len(acked))
			}
			if wrong, first, err := verify(t.Context(), s, acked); wrong != 0 || err != nil {
				t.Errorf("%s: %d wrong, %s, %v", verb, wrong, first, err)
			}
		})
	}
}

func TestDriverSeesLostWrites(t *testing.T) {
	for _, verb := range []string{"set", "insert"} {
		synctest.Test(t, func(t *testing.T) {
			s := &loose{loses: 7}
			r := runOn(t, s, verb)
			if wrong, _, err := verify(t.Context(), s, r.Acked); wrong == 0 || err != nil {
				t.Errorf("%s: of %d writes, a seventh of which was dropped, none is missing (%v)", verb, len(r.Acked), err)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		if r := runOn(t, &loose{loses: 3}, "mix"); r.Wrong == 0 {
			t.Error("reads after a dropped set of the same worker are taken for right")
		}
	})
}

func TestDriverSeesDamagedValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if r := runOn(t, &loose{damages: true}, "get"); r.Wrong != r.Total || !strings.Contains(r.FirstBad, "damaged") {
			t.Errorf("%+v", r)
		}
	})
}

func TestDriverCountsErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if r := runOn(t, &loose{fails: true}, "set"); r.Errors != 4*100 || r.Ops != 0 || r.FirstError != "refused" || len(r.Acked) != 0 {
			t.Errorf("%+v", r) // one every 6 ms, with the pause after it
		}
	})
}

func TestHaltEndsARun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, halted := &loose{values: map[string][]byte{}}, &atomic.Bool{}
		time.AfterFunc(10*time.Second, func() { halted.Store(true) })
		r := carryOut(t.Context(), s, order{Cell: cell{Verb: "set", Workers: 2}, Keys: 10, For: time.Hour}, halted)
		if r.Seconds < 10 || r.Seconds > 10.01 || r.Ops < 19_990 || r.Ops > 20_010 {
			t.Errorf("%v s, %d operations", r.Seconds, r.Ops)
		}
	})
}

func TestReadValue(t *testing.T) {
	key, other := keyAt(5), keyAt(6)
	val := makeValue(key, 0xfedcba9876543210)
	if len(key) != keyBytes || len(val) != valueBytes {
		t.Fatalf("%d bytes of key, %d of value", len(key), len(val))
	}
	if n, err := readValue(key, val); err != nil || n != 0xfedcba9876543210 {
		t.Errorf("%x, %v", n, err)
	}
	for i := range val {
		bad := bytes.Clone(val)
		bad[i] ^= 1
		if _, err := readValue(key, bad); err == nil {
			t.Errorf("a flip at byte %d is not seen", i)
		}
	}
	for what, bad := range map[string][]byte{"nothing": nil, "too short": val[:valueBytes-1], "too long": append(bytes.Clone(val), 0), "other key": makeValue(other, 1)} {
		if _, err := readValue(key, bad); err == nil {
			t.Errorf("%s is taken for a value", what)
		}
	}
}

func TestHistogram(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	h, half := &histogram{}, &histogram{}
	var all []time.Duration
	for i := range 20_000 {
		d := time.Duration(math.Exp(random.Float64() * math.Log(float64(100*time.Second))))
		all = append(all, d)
		if i%2 == 0 {
			h.add(d)
		} else {
			half.add(d)
		}
	}
	h.merge(half)
	slices.Sort(all)
	for _, q := range []float64{0, 0.01, 0.5, 0.99, 0.9999} {
		got, want := h.quantile(q), all[int(q*float64(len(all)))]
		if math.Abs(float64(got-want)) > 0.01*float64(want)+1 {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
}

func TestCellNames(t *testing.T) {
	for name := range strings.SplitSeq(allCells, ",") {
		c, err := parseCell(name)
		if err != nil || c.String() != name {
			t.Errorf("%s: %s, %v", name, c, err)
		}
	}
	for _, name := range []string{"", "set", "set/0", "set/x", "push/1", "get/1@leader", "set/100000"} {
		if c, err := parseCell(name); err == nil {
			t.Errorf("%q is taken for %s", name, c)
		}
	}
}

// TestReport: medians, ratios, what is not counted as a peer, and what went wrong.
func TestReport(t *testing.T) {
	var all []record
	for i, v := range []float64{100, 900, 300} {
		all = append(all, record{Round: i + 1, System: "quorate", Cell: "get/64", Rate: v, P99: time.Duration(v) * time.Microsecond})
		all = append(all, record{Round: i + 1, System: "etcd", Cell: "get/64", Rate: v / 2, P99: time.Duration(v) * time.Millisecond})
		all = append(all, record{Round: i + 1, System: "nats", Cell: "get/64", Rate: v * 10})
	}
	all = append(all, record{System: "etcd", Figure: "restart/100000", Error: "it did not come back"},
		record{System: "quorate", Figure: "restart/100000", Value: 120, Unit: "ms"},
		record{System: "quorate", Cell: "cost/1000", Rate: 5}, record{System: "etcd", Cell: "set/1", Wrong: 3, FirstBad: "a lost write", Round: 2})
	text := markdown(all)
	for _, want := range []string{
		"| linearizable get, 64 on the leader | 300 | 150 | 3,000 * | 2.00× |",
		"| linearizable get, 64 on the leader | 0.300 | 300 | 0 * | 0.00100× |",
		"| restarted member holds all that was written, 100,000 keys, ms | 120 | failed | – | |",
		"- etcd, restart/100000, round 0: it did not come back",
		"**etcd, set/1, round 2: 3 wrong answers, the first: a lost write**",
		"| 1,000 | 5.00 |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "Nothing: no operation failed") {
		t.Error("it says that nothing went wrong")
	}
	if svg := string(plot(all)); strings.Count(svg, "<polyline") != 5 || strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
		t.Errorf("the plot: %s", svg)
	}
}

func TestNumbers(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.000123: "0.000123", 0.5: "0.500", 9.999: "10.00", 45.64: "45.6", 99.97: "100", 1234: "1,230",
		12345: "12,300", 1e6: "1,000,000", math.NaN(): "0"} {
		if got := number3(v); got != want {
			t.Errorf("%v is %s, want %s", v, got, want)
		}
	}
}

// TestMemberProtocol speaks to a member's process as the parent does, with a system that is not one of the real ones.
func TestMemberProtocol(t *testing.T) {
	kinds = append(kinds, kind{name: "loose", open: func(context.Context, conf) (system, error) { return &loose{values: map[string][]byte{}}, nil }})
	t.Cleanup(func() { kinds = kinds[:len(kinds)-1] })
	in, requests := io.Pipe()
	answers, out := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- serveMember(in, out) }()
	decoder, n := json.NewDecoder(answers), uint64(0)
	ask := func(req request) answer {
		t.Helper()
		n++
		req.ID, req.Limit = n, 10*time.Second
		line, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		go fmt.Fprintf(requests, "%s\n", line)
		var a answer
		if err := decoder.Decode(&a); err != nil || a.ID != n {
			t.Fatalf("%+v, %v", a, err)
		}
		return a
	}
	fmt.Fprintf(requests, `{"System":"loose","Dir":%q}`+"\n", t.TempDir())
	if a := ask(request{Do: "load", To: 50, Workers: 4}); a.Error != "" {
		t.Error(a.Error)
	}
	if a := ask(request{Do: "verify", Acked: map[string]uint64{keyAt(0): 0, keyAt(49): 49, keyAt(50): 50}}); a.Wrong != 1 || a.Error != "" {
		t.Errorf("%+v", a)
	}
	if a := ask(request{Do: "refuse", Key: keyAt(3)}); a.Error != "" {
		t.Error(a.Error)
	}
	if a := ask(request{Do: "refuse", Key: keyAt(60)}); a.Error == "" {
		t.Error("an insert of a fresh key passes for one of a key that is there")
	}
	if a := ask(request{Do: "usage"}); a.Usage.CPU == 0 || a.Usage.RSS == 0 || a.Error != "" {
		t.Errorf("%+v", a)
	}
	if a := ask(request{Do: "dance"}); a.Error == "" {
		t.Error("an unknown request is carried out")
	}
	requests.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
