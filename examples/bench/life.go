package main

// The life of a cluster: what its start, its failures and its size cost. Each system lives alone here, from empty directories to the
// largest state, and every figure is one record. The members' side of it is in member.go.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// lifeFigures, in the order in which they are taken; all but the first two for each state of -keys.
var lifeFigures = []string{"start", "failover", "size", "restart", "stall", "replace", "cost"}

const (
	failovers = 3
	settle    = 5 * time.Second // after a load, for what a system does later
)

var costSizes = []int{1_000, 10_000, 100_000, 1_000_000} // at which quorate's cost per write is taken

// A life is that of one cluster.
type life struct {
	*bench
	*cluster
	round   int
	figures []string
}

// liveOnce takes the cost of a write in a life of its own: the others have no such load behind them.
func (b *bench) liveOnce(k kind, round int) {
	others := slices.DeleteFunc(slices.Clone(b.life), func(figure string) bool { return figure == "cost" })
	if len(others) > 0 {
		b.liveFor(k, round, others)
	}
	if k.name == "quorate" && len(others) < len(b.life) {
		b.liveFor(k, round, []string{"cost"})
	}
}

func (b *bench) liveFor(k kind, round int, figures []string) {
	c, err := newCluster(k, filepath.Join(b.dir, k.name))
	if err == nil {
		l := &life{b, c, round, figures}
		err = l.live()
		c.stop()
	}
	if err != nil { // the others still have theirs
		r := record{Round: round, System: k.name, Figure: "life", Error: err.Error()}
		b.add(r)
		b.say(round, k.name, "life", r.summary())
	}
}

func (l *life) wants(figure string) bool { return slices.Contains(l.figures, figure) }

func (l *life) note(figure string, value float64, unit string) {
	r := record{Round: l.round, System: l.kind.name, Figure: figure, Value: value, Unit: unit}
	l.add(r)
	l.say(l.round, l.kind.name, figure, r.summary())
}

// failed is for a figure that could not be had while the life goes on.
func (l *life) failed(figure string, err error) {
	r := record{Round: l.round, System: l.kind.name, Figure: figure, Error: err.Error()}
	l.add(r)
	l.say(l.round, l.kind.name, figure, r.summary())
}

func inMillis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (l *life) live() error {
	if err := l.firstWrite(); err != nil {
		return err
	}
	for range failovers {
		if err := l.failover(); err != nil {
			return err
		}
	}
	have := 0
	for _, size := range l.states() {
		began := time.Now()
		if err := l.load(have, size, loaders); err != nil {
			return err
		}
		if took := time.Since(began); slices.Contains(l.sizes, size) {
			l.note(fmt.Sprint("load/", size), float64(took.Microseconds())/float64(size-have), "µs")
		}
		if err := l.checkLoaded(l.cluster, have, size); err != nil {
			return err
		}
		have = size
		if err := l.at(size); err != nil {
			return err
		}
	}
	return nil
}

// states are those of -keys, and those at which the cost of a write is taken, as far as they are not larger.
func (l *life) states() []int {
	var all []int
	if slices.ContainsFunc([]string{"size", "restart", "stall", "replace"}, l.wants) {
		all = slices.Clone(l.sizes)
	}
	for _, size := range costSizes {
		if l.wants("cost") && size <= slices.Max(l.sizes) {
			all = append(all, size)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// at takes the figures at one size.
func (l *life) at(size int) error {
	for _, f := range []struct {
		name  string
		sizes []int
		take  func(int) error
	}{
		{"size", l.sizes, l.size},
		{"restart", l.sizes, l.restart},
		{"stall", l.sizes, l.stall},
		{"replace", l.sizes, l.replaceOne},
		{"cost", costSizes, l.cost},
	} {
		wanted := l.wants(f.name) || f.name == "stall" && l.wants("replace")
		if !wanted || !slices.Contains(f.sizes, size) {
			continue
		}
		if err := f.take(size); err != nil {
			return err
		}
	}
	return nil
}

// firstWrite starts three empty members and writes as soon as the three are one cluster.
func (l *life) firstWrite() error {
	began := time.Now()
	for _, p := range l.members {
		if err := p.start(); err != nil {
			return err
		}
	}
	first := l.members[0]
	if _, err := first.ask(request{Do: "ready", Limit: 90 * time.Second}); err != nil {
		return err
	}
	if _, err := first.ask(request{Do: "probe", Key: keyAt(0), Limit: time.Minute}); err != nil {
		return err
	}
	if l.wants("start") {
		l.note("start", inMillis(time.Since(began)), "ms")
	}
	return l.ready()
}

// failover kills the leader and writes on both others until one of them has an acknowledgement.
func (l *life) failover() error {
	if !l.wants("failover") {
		return nil
	}
	time.Sleep(time.Second) // the members have only just met
	leader, followers, err := l.leader()
	if err != nil {
		return err
	}
	l.marks++
	began := time.Now()
	leader.kill()
	type end struct {
		took time.Duration
		err  error
	}
	ends := make(chan end, len(followers))
	for _, p := range followers {
		go func() {
			_, err := p.ask(request{Do: "probe", Key: keyAt(1), Number: l.marks, Limit: time.Minute})
			ends <- end{time.Since(began), err}
		}()
	}
	first, second := <-ends, <-ends
	if err := errors.Join(first.err, second.err); err != nil {
		return err
	}
	l.note("failover", inMillis(first.took), "ms")
	if err := leader.start(); err != nil {
		return err
	}
	return l.ready()
}

// size waits until the load has been digested, and looks at members that do nothing.
func (l *life) size(size int) error {
	time.Sleep(settle)
	before, _, err := l.usages()
	if err != nil {
		return err
	}
	time.Sleep(settle)
	after, _, err := l.usages()
	if err != nil {
		return err
	}
	var rss, disk, idle []float64
	for i, u := range after {
		rss, disk = append(rss, float64(u.RSS)/(1<<20)), append(disk, float64(u.Disk)/(1<<20))
		idle = append(idle, inMillis(u.CPU-before[i].CPU)/settle.Seconds())
	}
	l.note(fmt.Sprint("rss/", size), median(rss), "MiB")
	l.note(fmt.Sprint("disk/", size), median(disk), "MiB")
	l.note(fmt.Sprint("idle/", size), median(idle), "ms")
	return nil
}

// cost measures sets of any of all keys.
func (l *life) cost(size int) error {
	r := record{Round: l.round, System: l.kind.name, Cell: "cost/" + strconv.Itoa(size)}
	err := l.runCell(l.cluster, cell{Verb: "set", Workers: 64}, size, &r)
	if err == nil {
		l.add(r)
		l.say(l.round, l.kind.name, r.Cell, r.summary())
	}
	return err
}

// restart kills a follower, writes a little, and starts it again.
func (l *life) restart(size int) error {
	leader, followers, err := l.leader()
	if err != nil {
		return err
	}
	p := followers[0]
	p.kill()
	if _, err := leader.ask(request{Do: "load", From: 0, To: 1000, Workers: 64, Limit: time.Minute}); err != nil {
		return err
	}
	key, number, err := l.mark(leader)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := p.start(); err != nil {
		return err
	}
	for _, f := range []struct{ do, figure string }{{"caught up", "restart/"}, {"answers", "answers/"}} {
		if _, err := p.ask(request{Do: f.do, Key: key, Number: number, Limit: 10 * time.Minute}); err != nil {
			return err
		}
		l.note(f.figure+strconv.Itoa(size), inMillis(time.Since(began)), "ms")
	}
	return l.ready()
}

// stall looks for the longest write while nothing happens, and while a snapshot is taken.
func (l *life) stall(size int) error {
	time.Sleep(settle)
	leader, _, err := l.leader()
	if err != nil {
		return err
	}
	plain := func() error { time.Sleep(5 * time.Second); return nil }
	if err := l.stalled(leader, fmt.Sprintf("stall/%d/plain", size), plain); err != nil {
		return err
	}
	return l.stalled(leader, fmt.Sprintf("stall/%d/snapshot", size), func() error {
		_, err := leader.ask(request{Do: "snapshot", Limit: 2 * time.Minute})
		return err
	})
}

// stalled notes the longest of all writes that 16 writers on p make while f runs, and for a second before and after.
func (l *life) stalled(p *process, figure string, f func() error) error {
	type end struct {
		a   answer
		err error
	}
	ended := make(chan end, 1)
	o := l.order(order{Cell: cell{Verb: "set", Workers: 16}, Keys: cellKeys, Warmup: 500 * time.Millisecond, For: 30 * time.Minute})
	go func() {
		a, err := p.ask(request{Do: "run", Order: o, Limit: time.Hour})
		ended <- end{a, err}
	}()
	time.Sleep(1500 * time.Millisecond)
	failure := f()
	time.Sleep(time.Second)
	if _, err := p.ask(request{Do: "halt", Limit: grace}); err != nil {
		return err
	}
	e := <-ended
	if e.err != nil {
		return e.err
	}
	if failure == nil && e.a.Result.Errors > 0 {
		failure = fmt.Errorf("%d writes failed: %s", e.a.Result.Errors, e.a.Result.FirstError)
	}
	if failure != nil {
		l.failed(figure, failure)
		return nil
	}
	l.note(figure, inMillis(e.a.Result.Max), "ms")
	return nil
}

// replaceOne takes a follower's directory away and lets it come back empty, under writes. stall has seen to it that the log no longer
// reaches back to the beginning, so that the state must be sent.
func (l *life) replaceOne(size int) error {
	leader, followers, err := l.leader()
	if err != nil {
		return err
	}
	p := followers[0]
	p.kill()
	if err := os.RemoveAll(p.conf.Dir); err != nil {
		return err
	}
	if _, err := leader.ask(request{Do: "replace", Member: p.conf.Index, Limit: time.Minute}); err != nil {
		return err
	}
	key, number, err := l.mark(leader)
	if err != nil {
		return err
	}
	p.conf.Lost = true
	if err := l.stalled(leader, fmt.Sprintf("stall/%d/replace", size), func() error {
		began := time.Now()
		if err := p.start(); err != nil {
			return err
		}
		if _, err := p.ask(request{Do: "caught up", Key: key, Number: number, Limit: 10 * time.Minute}); err != nil {
			return err
		}
		l.note(fmt.Sprint("replace/", size), inMillis(time.Since(began)), "ms")
		return nil
	}); err != nil {
		return err
	}
	return l.ready()
}
