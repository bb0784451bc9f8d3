package main

// The driver: closed-loop workers inside a member's process, the same for every system. It owns keys, values, the choice of
// operations, the clock and the checks; it knows no system and no network. member.go hands it a cell and returns its result.

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	keyBytes   = 24
	valueBytes = 256
	cellKeys   = 10_000           // that the cells work on; loaded before the first one
	grace      = 15 * time.Second // that an operation may take when its cell has ended
	errorPause = 5 * time.Millisecond
	sampleSize = 200 // acknowledged writes that are read back after a cell
	loaders    = 256 // workers that load keys
)

// A cell is one operation with so many workers on the leader or on a follower.
type cell struct {
	Verb     string // set, insert, get, stale, mix
	Workers  int
	Follower bool
}

// parseCell reads what String writes: "set/64", "get/1@follower".
func parseCell(text string) (cell, error) {
	verb, rest, _ := strings.Cut(text, "/")
	workers, at, placed := strings.Cut(rest, "@")
	n, err := strconv.Atoi(workers)
	known := verb == "set" || verb == "insert" || verb == "get" || verb == "stale" || verb == "mix"
	if err != nil || !known || n < 1 || n > maxWorkers || placed && at != "follower" {
		return cell{}, fmt.Errorf("cell %q: want set, insert, get, stale or mix, a slash, 1 to %d workers, and perhaps @follower", text, maxWorkers)
	}
	return cell{Verb: verb, Workers: n, Follower: placed}, nil
}

func (c cell) String() string {
	text := fmt.Sprintf("%s/%d", c.Verb, c.Workers)
	if c.Follower {
		text += "@follower"
	}
	return text
}

// writes tells whether all operations of the cell are writes, so that costs per write can be had from it.
func (c cell) writes() bool { return c.Verb == "set" || c.Verb == "insert" }

// An order is a cell to be run now.
type order struct {
	Cell   cell
	Number uint64 // unique in a cluster's life; 0 is the load. It makes every value that is ever written unique.
	Keys   int    // that are there
	Warmup time.Duration
	For    time.Duration
}

// A result is what became of an order. Ops were completed while the clock ran; Total counts warm-up and tail as well.
type result struct {
	Ops, Total           uint64
	Seconds              float64
	P50, P99, Max        time.Duration // of the operations that began after the warm-up
	Errors, Wrong        uint64        // Wrong: a read that returned something that cannot be
	FirstError, FirstBad string
	Acked                map[string]uint64 // a sample of what was acknowledged: key to the number in its value
}

func (r result) rate() float64 {
	if r.Seconds == 0 {
		return 0
	}
	return float64(r.Ops) / r.Seconds
}

func keyAt(i int) string { return fmt.Sprintf("bench/key/%014d", i) }

const maxWorkers = 1 << 12

// number is unique for every value that a cluster ever holds.
func number(run uint64, worker int, n uint64) uint64 {
	return run<<44 | uint64(worker)<<32 | n&(1<<32-1)
}

// makeValue is printable text, as most values are, and differs for every key and number: the key, the number in hexadecimal, and a
// filling that only this number has.
func makeValue(key string, number uint64) []byte {
	val := make([]byte, 0, valueBytes)
	val = append(val, key...)
	for shift := 60; shift >= 0; shift -= 4 {
		val = append(val, "0123456789abcdef"[number>>shift&15])
	}
	for i := uint64(0); len(val) < valueBytes; i++ {
		val = binary.LittleEndian.AppendUint64(val, filling(number, i))
	}
	return val
}

// filling is the i-th word of the filling: splitmix64, brought into the printable characters.
func filling(number, i uint64) uint64 {
	x := number + (i+1)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return (x^x>>31)&0x1f1f1f1f1f1f1f1f | 0x4040404040404040
}

// readValue returns the number in a value, if it is whole and belongs to key.
func readValue(key string, val []byte) (uint64, error) {
	if len(val) != valueBytes {
		return 0, fmt.Errorf("%s: %d bytes", key, len(val))
	}
	if string(val[:keyBytes]) != key {
		return 0, fmt.Errorf("%s: the value of %q", key, val[:keyBytes])
	}
	var number uint64
	for _, c := range val[keyBytes : keyBytes+16] {
		digit := uint64(c - '0')
		if c >= 'a' {
			digit = uint64(c-'a') + 10
		}
		number = number<<4 | digit&15
	}
	for i, rest := uint64(0), val[keyBytes+16:]; len(rest) > 0; i, rest = i+1, rest[8:] {
		if binary.LittleEndian.Uint64(rest) != filling(number, i) {
			return 0, fmt.Errorf("%s: damaged at byte %d", key, len(val)-len(rest))
		}
	}
	return number, nil
}

// A histogram counts durations with an error below one percent.
type histogram [36 * 64]uint32

func (h *histogram) add(d time.Duration) { h[bucket(d)]++ }

func bucket(d time.Duration) int {
	n := uint64(max(d, 0))
	if n < 64 {
		return int(n)
	}
	shift := bits.Len64(n) - 7 // keeps seven bits, the first of which is always set
	return min(shift*64+int(n>>shift), len(histogram{})-1)
}

// middle is the duration in the middle of a bucket.
func middle(i int) time.Duration {
	if i < 128 {
		return time.Duration(i)
	}
	shift := i/64 - 1
	return time.Duration(uint64(i-shift*64)<<shift + 1<<shift/2)
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o {
		h[i] += n
	}
}

func (h *histogram) quantile(q float64) time.Duration {
	all := uint64(0)
	for _, n := range h {
		all += uint64(n)
	}
	left := uint64(q * float64(all))
	for i, n := range h {
		if left < uint64(n) {
			return middle(i)
		}
		left -= uint64(n)
	}
	return 0
}

// A run is one order while it is carried out. All of it is fixed before the workers start.
type run struct {
	order
	system    system
	halted    *atomic.Bool // ends it early
	from, end time.Time    // the clock's
	keys      []string     // made once, as far as a cell needs them; more of them would be a part of the memory that is measured
}

func (r *run) key(i int) string {
	if i < len(r.keys) {
		return r.keys[i]
	}
	return keyAt(i)
}

// A worker issues one operation after the other. In a cell with sets it is the only one to set its keys, every Workers-th of all, so
// that it knows what a linearizable read must find in them.
type worker struct {
	*run
	id     int
	rand   *rand.Rand
	acked  []uint64     // by the key's place among its own: the number of the last acknowledged set, 0 = none
	doubt  map[int]bool // a set of this key has failed and may still happen
	fresh  []insertion  // some of those that were acknowledged, early and late ones alike
	hist   histogram
	result result
}

type insertion struct {
	key    string
	number uint64
}

func carryOut(ctx context.Context, s system, o order, halted *atomic.Bool) result {
	r := &run{order: o, system: s, halted: halted, keys: make([]string, min(o.Keys, cellKeys))}
	for i := range r.keys {
		r.keys[i] = keyAt(i)
	}
	workers := make([]*worker, o.Cell.Workers)
	for i := range workers {
		workers[i] = &worker{run: r, id: i, rand: rand.New(rand.NewPCG(o.Number, uint64(i))), doubt: map[int]bool{}}
	}
	r.from = time.Now().Add(o.Warmup)
	r.end = r.from.Add(o.For)
	var all sync.WaitGroup
	for _, w := range workers {
		all.Go(func() { w.work(ctx) })
	}
	all.Wait()
	end := r.end
	if halted.Load() {
		end = time.Now()
	}
	return gather(workers, end.Sub(r.from))
}

func gather(workers []*worker, clock time.Duration) result {
	sum := result{Seconds: clock.Seconds(), Acked: map[string]uint64{}}
	hist := &histogram{}
	for _, w := range workers {
		r := &w.result
		sum.Ops, sum.Total, sum.Errors, sum.Wrong = sum.Ops+r.Ops, sum.Total+r.Total, sum.Errors+r.Errors, sum.Wrong+r.Wrong
		sum.Max = max(sum.Max, r.Max)
		if sum.FirstError == "" {
			sum.FirstError = r.FirstError
		}
		if sum.FirstBad == "" {
			sum.FirstBad = r.FirstBad
		}
		hist.merge(&w.hist)
	}
	sum.P50, sum.P99 = hist.quantile(0.5), hist.quantile(0.99)
	for taken := true; taken && len(sum.Acked) < sampleSize; { // in turn, so that many workers are in the sample
		taken = false
		for _, w := range workers {
			if key, number, ok := w.take(); ok && len(sum.Acked) < sampleSize {
				sum.Acked[key], taken = number, true
			}
		}
	}
	return sum
}

// take takes one acknowledged write, about which there is no doubt, out of what the worker knows.
func (w *worker) take() (key string, number uint64, ok bool) {
	start := w.rand.IntN(len(w.acked) + 1)
	for n := range w.acked {
		mine := (start + n) % len(w.acked)
		number = w.acked[mine]
		w.acked[mine] = 0
		if i := w.own(mine); number != 0 && !w.doubt[i] {
			return w.key(i), number, true
		}
	}
	if last := len(w.fresh) - 1; last >= 0 {
		i := w.fresh[last]
		w.fresh = w.fresh[:last]
		return i.key, i.number, true
	}
	return "", 0, false
}

func (w *worker) work(ctx context.Context) {
	ctx, cancel := context.WithDeadline(ctx, w.end.Add(grace)) // one for each worker: a shared one would be a lock between them
	defer cancel()
	began := time.Now()
	for n := uint64(1); !w.halted.Load(); n++ {
		err := w.step(ctx, n)
		now := time.Now()
		w.count(began, now, err)
		if err != nil {
			time.Sleep(errorPause)
			now = time.Now()
		}
		if began = now; !now.Before(w.end) {
			return
		}
	}
}

func (w *worker) count(began, ended time.Time, err error) {
	r := &w.result
	if err != nil {
		if r.Errors++; r.FirstError == "" {
			r.FirstError = err.Error()
		}
		return
	}
	r.Total++
	if ended.Before(w.from) {
		return
	}
	if ended.Before(w.end) {
		r.Ops++
	}
	if !began.Before(w.from) { // also what ended too late to be counted: a stall at the end is one
		took := ended.Sub(began)
		w.hist.add(took)
		r.Max = max(r.Max, took)
	}
}

func (w *worker) step(ctx context.Context, n uint64) error {
	switch w.Cell.Verb {
	case "set":
		return w.set(ctx, n)
	case "insert":
		return w.insert(ctx, n)
	case "get":
		return w.get(ctx, w.system.get)
	case "stale":
		return w.get(ctx, w.system.stale)
	}
	if w.rand.IntN(100) < 5 {
		return w.set(ctx, n)
	}
	return w.get(ctx, w.system.get)
}

// own is the place of its n-th key among all.
func (w *worker) own(n int) int { return n*w.Cell.Workers + w.id }

func (w *worker) set(ctx context.Context, n uint64) error {
	keys := (w.Keys - w.id + w.Cell.Workers - 1) / w.Cell.Workers
	if w.acked == nil {
		w.acked = make([]uint64, keys)
	}
	mine := w.rand.IntN(keys)
	i := w.own(mine)
	num := number(w.Number, w.id, n)
	key := w.key(i)
	if err := w.system.set(ctx, key, makeValue(key, num)); err != nil {
		w.doubt[i] = true
		return err
	}
	w.acked[mine] = num
	return nil
}

func (w *worker) insert(ctx context.Context, n uint64) error {
	key := fmt.Sprintf("bench/new/%04d%04d%06d", w.Number%10_000, w.id, n%1_000_000)
	num := number(w.Number, w.id, n)
	if err := w.system.insert(ctx, key, makeValue(key, num)); err != nil {
		return err
	}
	if made := (insertion{key, num}); len(w.fresh) < sampleSize {
		w.fresh = append(w.fresh, made)
	} else if i := w.rand.IntN(int(n)); i < sampleSize {
		w.fresh[i] = made
	}
	return nil
}

func (w *worker) get(ctx context.Context, read func(context.Context, string) ([]byte, error)) error {
	i := w.rand.IntN(w.Keys)
	key := w.key(i)
	val, err := read(ctx, key)
	if err != nil {
		return err
	}
	num, bad := readValue(key, val)
	want := uint64(0)
	if mine := i / w.Cell.Workers; i == w.own(mine) && mine < len(w.acked) && !w.doubt[i] {
		want = w.acked[mine]
	}
	if bad == nil && want != 0 && num != want {
		bad = fmt.Errorf("%s: read %x after %x was acknowledged", key, num, want)
	}
	if bad != nil {
		if w.result.Wrong++; w.result.FirstBad == "" {
			w.result.FirstBad = bad.Error()
		}
	}
	return nil
}

// load sets the keys from one place up to another, with as many workers, and fails at the first error.
func load(ctx context.Context, s system, from, to, workers int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	next.Store(int64(from))
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < to && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := loadOne(ctx, s, keyAt(i), uint64(i)); err != nil {
					cancel(fmt.Errorf("load %s: %w", keyAt(i), err))
				}
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// loadOne tries again for a while: a member may be busy with an election, and setting a key twice is the same as once.
func loadOne(ctx context.Context, s system, key string, number uint64) error {
	val := makeValue(key, number)
	for tries := 1; ; tries++ {
		err := within(ctx, grace, func(ctx context.Context) error { return s.set(ctx, key, val) })
		if err == nil || tries == 5 || ctx.Err() != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func within(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx)
}

// verify reads acknowledged writes back, and returns how many are not there and the first of those.
func verify(ctx context.Context, s system, acked map[string]uint64) (wrong uint64, first string, err error) {
	for key, want := range acked {
		val, err := s.get(ctx, key)
		if err != nil {
			return wrong, first, fmt.Errorf("read %s back: %w", key, err)
		}
		got, bad := readValue(key, val)
		if bad == nil && got != want {
			bad = fmt.Errorf("%s: holds %x, and %x was acknowledged", key, got, want)
		}
		if bad != nil {
			if wrong++; first == "" {
				first = bad.Error()
			}
		}
	}
	return wrong, first, nil
}
