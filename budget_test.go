package quorate

import (
	"context"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The budget of leader changes: whatever single fault there is, the leader changes at most budgetFirst times in its first minute, and
// never again while the fault lasts. Each fault lasts for minutes of a cluster in a bubble, under load on all members.

const (
	budgetFirst = 2
	budgetLasts = 5 * time.Minute
	healLimit   = 10 * time.Second
)

// A night is a cluster of which each disk and each way can fail.
type night struct {
	*script
	l       *scriptMember   // that led when the fault began
	others  []*scriptMember // in the order of their names
	disks   map[*scriptMember]*nightDisk
	longest time.Duration // of an fsync
	down    []*scriptMember
	wiped   []*scriptMember // of them, who begins with an empty directory

	mu    sync.Mutex // guards the fields below
	led   map[uint64]string
	since []time.Time // when each of the later terms began
}

// A nightDisk is that of one member.
type nightDisk struct {
	*faultFS
	fsync atomic.Int64
	free  atomic.Int64
}

func (d *nightDisk) space(string) diskSpace { return diskSpace{d.free.Load(), 1 << 40} }

// hang has every fsync hang until the disk is mended.
func (d *nightDisk) hang(c chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faultFS.hang = c
}

// A lasting fault begins, goes on and is mended by the night's mend.
type lasting struct {
	name   string
	begin  func(n *night)
	each   func(n *night, second int) // of a fault that comes and goes: then each minute has the budget of the first; nil = it lasts
	outage bool                       // no majority can write
	five   bool                       // also with five members
}

func (n *night) all() []*scriptMember { return append([]*scriptMember{n.l}, n.others...) }

// first are the leader and so many others.
func (n *night) first(k int) []*scriptMember { return n.all()[:k] }

func (n *night) cutAll(from, to []*scriptMember) {
	for _, a := range from {
		for _, b := range to {
			if a != b {
				n.net.cut(a.conf.Addr, b.conf.Addr)
			}
		}
	}
}

func (n *night) kill(list ...*scriptMember) {
	for _, m := range list {
		n.down = append(n.down, m)
		n.obey("kill " + m.name)
	}
}

func (n *night) slow(list []*scriptMember, d time.Duration) {
	n.longest = max(n.longest, d)
	for _, m := range list {
		n.disks[m].fsync.Store(int64(d))
	}
}

// full: the log takes nothing, the state neither, and the file system says so.
func (n *night) full(list []*scriptMember, log, state, seen bool) {
	for _, m := range list {
		if log {
			n.disks[m].fail(setWrite, syscall.ENOSPC)
		}
		if state {
			n.pages(m, 1)
		}
		if seen {
			n.disks[m].free.Store(20 << 10)
		}
	}
}

func (n *night) pages(m *scriptMember, most int) {
	if m.s == nil {
		return
	}
	m.s.store.fileMu.Lock()
	defer m.s.store.fileMu.Unlock()
	m.s.store.writer.pragma(fmt.Sprintf("max_page_count=%d", most))
}

func setOpen(f *faultFS, err error) { f.openErr = err }

// mend ends all faults, and starts who is down.
func (n *night) mend() {
	n.net.heal()
	n.slow(n.members, 0)
	for _, m := range n.members {
		d := n.disks[m]
		for _, set := range []func(*faultFS, error){setWrite, setCreate, setOpen, setSync} {
			d.fail(set, nil)
		}
		d.free.Store(1 << 39)
		n.pages(m, 1<<20)
		d.mu.Lock()
		if d.faultFS.hang != nil {
			close(d.faultFS.hang)
			d.faultFS.hang = nil
		}
		d.mu.Unlock()
	}
	for _, m := range n.members {
		if m.s != nil && !slices.Contains(n.down, m) {
			n.net.serve(m.conf.Addr, n.front(m.s))
		}
	}
	for _, m := range n.down {
		if m.s != nil {
			n.obey("kill " + m.name)
		}
		if slices.Contains(n.wiped, m) {
			must(n.t, os.RemoveAll(m.conf.Dir))
		}
		n.obey("restart " + m.name)
	}
}

// lastingFaults are the single ones that this harness can make.
var lastingFaults = []lasting{
	{name: "a dead follower", begin: func(n *night) { n.kill(n.others[0]) }, five: true},
	{name: "the leader is dead", begin: func(n *night) { n.kill(n.l) }, five: true},
	{name: "a majority is dead", begin: func(n *night) { n.kill(n.others...) }, outage: true},
	{name: "the leader is alone", begin: func(n *night) {
		n.cutAll(n.first(1), n.others)
		n.cutAll(n.others, n.first(1))
	}, five: true},
	{name: "nothing reaches the leader", begin: func(n *night) { n.cutAll(n.others, n.first(1)) }},
	{name: "nothing leaves the leader", begin: func(n *night) { n.cutAll(n.first(1), n.others) }},
	{name: "calls of the leader are refused", begin: func(n *night) { n.deafen(n.l) }, five: true},
	{name: "a follower is alone", begin: func(n *night) {
		n.cutAll(n.others[:1], n.all())
		n.cutAll(n.all(), n.others[:1])
	}},
	{name: "nothing reaches a follower", begin: func(n *night) { n.cutAll(n.all(), n.others[:1]) }},
	{name: "nothing leaves a follower", begin: func(n *night) { n.cutAll(n.others[:1], n.all()) }},
	{name: "calls of a follower are refused", begin: func(n *night) { n.deafen(n.others[0]) }},
	{name: "the leader does not reach a follower", begin: func(n *night) { n.cutAll(n.first(1), n.others[:1]) }, five: true},
	{name: "a follower does not reach the leader", begin: func(n *night) { n.cutAll(n.others[:1], n.first(1)) }, five: true},
	{name: "the leader and a follower do not reach each other", begin: func(n *night) {
		n.cutAll(n.first(1), n.others[:1])
		n.cutAll(n.others[:1], n.first(1))
	}, five: true},
	{name: "two followers do not reach each other", begin: func(n *night) {
		n.cutAll(n.others[:1], n.others[1:2])
		n.cutAll(n.others[1:2], n.others[:1])
	}},
	{name: "everybody is alone", begin: func(n *night) { n.cutAll(n.all(), n.all()) }, outage: true},
	{name: "the certificate of the leader has ended", begin: func(n *night) { n.distrusted(n.l) }},
	{name: "the certificate of a follower has ended", begin: func(n *night) { n.distrusted(n.others[0]) }},
	{name: "the certificates of all have ended", begin: func(n *night) { n.distrusted(n.all()...) }, outage: true},
	{name: "the leader's ways are slow", begin: func(n *night) { n.late(n.first(1), 150*time.Millisecond) }},
	{name: "all ways are slow", begin: func(n *night) { n.late(n.all(), 60*time.Millisecond) }},
	{name: "all ways are very slow", begin: func(n *night) { n.late(n.all(), 200*time.Millisecond) }, five: true},
	{name: "all ways are too slow", begin: func(n *night) { n.late(n.all(), 300*time.Millisecond) }, outage: true},
	{name: "a slow disk of the leader", begin: func(n *night) { n.slow(n.first(1), 2*time.Second) }, five: true},
	{name: "a slow disk of a follower", begin: func(n *night) { n.slow(n.others[:1], 2*time.Second) }},
	{name: "slow disks of two", begin: func(n *night) { n.slow(n.first(2), 2*time.Second) }},
	{name: "slow disks of all", begin: func(n *night) { n.slow(n.all(), 2*time.Second) }, five: true},
	{name: "very slow disks of all", begin: func(n *night) { n.slow(n.all(), 4500*time.Millisecond) }},
	{name: "the disks of all take longer than a hang may", begin: func(n *night) { n.slow(n.all(), 7*time.Second) }, five: true},
	{name: "the disks of two take longer than a hang may", begin: func(n *night) { n.slow(n.first(2), 7*time.Second) }, five: true},
	{name: "the disks of two followers take longer than a hang may", begin: func(n *night) { n.slow(n.others[:2], 7*time.Second) }},
	{name: "each disk takes longer than a hang may in its own way", begin: func(n *night) {
		for i, m := range n.all() {
			n.slow([]*scriptMember{m}, stallLimit+time.Duration(1+i%3)*500*time.Millisecond)
		}
	}},
	{name: "the disk of the leader hangs", begin: func(n *night) { n.hang(n.first(1)) }, five: true},
	{name: "the disk of a follower hangs", begin: func(n *night) { n.hang(n.others[:1]) }},
	{name: "the disks of all hang", begin: func(n *night) { n.hang(n.all()) }, outage: true},
	{name: "the disk of the leader has failed", begin: func(n *night) { n.broken(n.l) }, five: true},
	{name: "the disk of a follower has failed", begin: func(n *night) { n.broken(n.others[0]) }},
	{name: "the disk of the leader is full", begin: func(n *night) { n.full(n.first(1), true, true, true) }, five: true},
	{name: "the disk of a follower is full", begin: func(n *night) { n.full(n.others[:1], true, true, true) }},
	{name: "the disks of two are full", begin: func(n *night) { n.full(n.first(2), true, true, true) }, outage: true},
	{name: "the disks of two followers are full", begin: func(n *night) { n.full(n.others[:2], true, true, true) }, outage: true},
	{name: "the disks of all are full", begin: func(n *night) { n.full(n.all(), true, true, true) }, outage: true, five: true},
	{name: "the log of the leader is full", begin: func(n *night) { n.full(n.first(1), true, false, false) }},
	{name: "the logs of two are full", begin: func(n *night) { n.full(n.first(2), true, false, false) }, outage: true},
	{name: "the logs of all are full", begin: func(n *night) { n.full(n.all(), true, false, false) }, outage: true},
	{name: "the state of the leader is full", begin: func(n *night) { n.full(n.first(1), false, true, false) }},
	{name: "the states of two are full", begin: func(n *night) { n.full(n.first(2), false, true, false) }},
	{name: "the states of all are full", begin: func(n *night) { n.full(n.all(), false, true, false) }, outage: true},
	{name: "little space on the leader", begin: func(n *night) { n.full(n.first(1), false, false, true) }, five: true},
	{name: "little space on two", begin: func(n *night) { n.full(n.first(2), false, false, true) }},
	{name: "little space on all", begin: func(n *night) { n.full(n.all(), false, false, true) }, outage: true},
	{name: "the leader has no descriptors", begin: func(n *night) { n.noFiles(n.first(1)) }, five: true},
	{name: "a follower has no descriptors", begin: func(n *night) { n.noFiles(n.others[:1]) }},
	{name: "nobody has descriptors", begin: func(n *night) { n.noFiles(n.all()) }, outage: true},
	{name: "the directory of the leader is removed", begin: func(n *night) { n.remove(n.l, "") }, five: true},
	{name: "the directory of a follower is removed", begin: func(n *night) { n.remove(n.others[0], "") }},
	{name: "the log of the leader is removed", begin: func(n *night) { n.remove(n.l, "wal/*") }},
	{name: "the log of a follower is removed", begin: func(n *night) { n.remove(n.others[0], "wal/*") }},
	{name: "the disk of the leader takes longer than a hang may", begin: func(n *night) { n.slow(n.first(1), 7*time.Second) }},
	{name: "the ways of a follower are very slow", begin: func(n *night) { n.late(n.others[:1], 300*time.Millisecond) }},
	{name: "the ways of the leader are very slow", begin: func(n *night) { n.late(n.first(1), 300*time.Millisecond) }},
	{name: "calls of one of the others to the leader are refused", begin: func(n *night) { n.deafen(n.l, n.others[0]) }, five: true},
	{name: "calls of the leader to the others are refused", begin: func(n *night) { n.deafTo(n.l) }, five: true},
	{name: "calls of two followers to each other are refused", begin: func(n *night) {
		n.deafen(n.others[0], n.others[1])
		n.deafen(n.others[1], n.others[0])
	}},
	{name: "connections are reset", each: func(n *night, second int) {
		for _, m := range n.all() {
			n.net.reset(m.conf.Addr)
		}
	}},
	{name: "the leader is alone again and again", each: func(n *night, second int) {
		if n.net.heal(); second%5 == 0 {
			n.cutAll(n.first(1), n.others)
			n.cutAll(n.others, n.first(1))
		}
	}},
	{name: "calls of the leader are refused again and again", each: func(n *night, second int) {
		if n.undeafen(n.l); second%20 < 10 {
			n.deafen(n.l)
		}
	}},
	{name: "the disk of the leader hangs again and again", each: func(n *night, second int) {
		if n.slow(n.first(1), 0); second%20 < 10 {
			n.slow(n.first(1), 7*time.Second)
		}
	}},
	{name: "the disks of all are slow again and again", each: func(n *night, second int) {
		if n.slow(n.all(), 0); second%40 < 20 {
			n.slow(n.all(), 2*time.Second)
		}
	}},
	{name: "little space on one after the other", each: func(n *night, second int) {
		for i, m := range n.all() {
			free := int64(1 << 39)
			if (second+7*i)%20 < 13 {
				free = 20 << 10
			}
			n.disks[m].free.Store(free)
		}
	}},
	{name: "little space on the leader again and again", each: func(n *night, second int) {
		free := int64(1 << 39)
		if second%20 < 10 {
			free = 20 << 10
		}
		n.disks[n.l].free.Store(free)
	}},
}

// deafTo has all the others refuse the calls of this member.
func (n *night) deafTo(m *scriptMember) {
	for _, other := range n.members {
		if other != m {
			n.deafen(other, m)
		}
	}
}

// distrusted: whoever calls these members, and whom they call, refuses the certificate.
func (n *night) distrusted(list ...*scriptMember) {
	for _, m := range list {
		for _, other := range n.members {
			if other != m {
				err := x509.CertificateInvalidError{Reason: x509.Expired}
				n.net.fail(m.conf.Addr, other.conf.Addr, err)
				n.net.fail(other.conf.Addr, m.conf.Addr, err)
			}
		}
	}
}

func (n *night) late(list []*scriptMember, d time.Duration) {
	for _, m := range list {
		for _, other := range n.members {
			if other != m {
				n.net.delay(m.conf.Addr, other.conf.Addr, d)
				n.net.delay(other.conf.Addr, m.conf.Addr, d)
			}
		}
	}
}

func (n *night) hang(list []*scriptMember) {
	for _, m := range list {
		n.disks[m].hang(make(chan struct{}))
	}
}

// broken is for good: only a restart reads the disk again.
func (n *night) broken(m *scriptMember) {
	n.disks[m].fail(setSync, syscall.EIO)
	n.down = append(n.down, m)
}

// noFiles: whatever opens a file of the log fails.
func (n *night) noFiles(list []*scriptMember) {
	for _, m := range list {
		n.disks[m].fail(setCreate, syscall.EMFILE)
		n.disks[m].fail(setOpen, syscall.EMFILE)
	}
}

// remove removes files under a member, or with "" its directory. It starts from nothing when all is mended.
func (n *night) remove(m *scriptMember, pattern string) {
	n.removeFiles(m.name, pattern)
	n.down, n.wiped = append(n.down, m), append(n.wiped, m)
	for _, other := range n.members {
		if other != m {
			m.conf.Join = other.conf.Addr
		}
	}
}

// newNight begins a cluster of so many.
func newNight(t *testing.T, size int) *night {
	n := &night{script: newScript(t), disks: make(map[*scriptMember]*nightDisk), led: make(map[uint64]string)}
	root := quickDir(t)
	var last *nightDisk
	n.change = func(c *Config) {
		last = &nightDisk{faultFS: newFaultFS()}
		last.free.Store(1 << 39)
		c.Dir, c.segment = filepath.Join(root, c.Addr[:1]), 16<<10
		c.vfs, c.space = slowFS{last.faultFS, &last.fsync}, last.space
	}
	r := &reigns{t: t, led: make(map[uint64]string), began: n.began}
	n.front = r.watch
	for i, name := range simulatedNames[:size] {
		if i == 0 {
			n.obey("start a")
		} else {
			n.obey("join " + name + " via a")
		}
		n.disks[n.members[i]] = last
	}
	n.obey(fmt.Sprint("await voters ", size))
	n.obey("set a k v")
	n.obey("await equal")
	n.leads(nil, scriptLimit)
	n.l = n.cast["L"]
	n.others = slices.DeleteFunc(slices.Clone(n.members), func(m *scriptMember) bool { return m == n.l })
	return n
}

// began is told of each term in which somebody leads.
func (n *night) began(term uint64, leader string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.since = append(n.since, time.Now())
}

// changes are when the leader has changed, since the fault began.
func (n *night) changes(since time.Time) (list []time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, at := range n.since {
		if !at.Before(since) {
			list = append(list, at.Sub(since).Round(time.Millisecond))
		}
	}
	return list
}

// A register is a key that one client writes, a number that grows. So what a read may answer is known.
type register struct {
	key   string
	acked atomic.Int64 // the newest acknowledged one
	tried atomic.Int64 // the newest that may be there
	late  atomic.Int64 // how many were acknowledged after the first minute
}

// write writes the next number.
func (r *register) write(ctx context.Context, s *Service, late bool) {
	next := r.tried.Load() + 1
	r.tried.Store(next)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if s.Set(ctx, r.key, []byte(strconv.FormatInt(next, 10))) == nil {
		r.acked.Store(next)
		if late {
			r.late.Add(1)
		}
	}
}

// read reads it on any member. Not less than was acknowledged before, or was read before by anybody.
func (r *register) read(ctx context.Context, t *testing.T, what string, seen *atomic.Int64, s *Service) {
	ctx, cancel := context.WithTimeout(ctx, 1500*time.Millisecond)
	defer cancel()
	least := max(r.acked.Load(), seen.Load())
	v, err := s.Get(ctx, r.key)
	if err != nil {
		return
	}
	got, _ := strconv.ParseInt(string(v), 10, 64)
	if got < least || got > r.tried.Load() {
		violated(t, "%s: a read of %s answers %d, at least %d was there and at most %d", what, r.key, got, least, r.tried.Load())
	}
	for was := seen.Load(); was < got && !seen.CompareAndSwap(was, got); was = seen.Load() {
	}
}

// within reports whether these changes keep to the budget.
func (f lasting) within(changes []time.Duration) bool {
	for i, at := range changes {
		switch {
		case f.each == nil && at >= time.Minute:
			return false
		case i >= budgetFirst && at < changes[i-budgetFirst]+time.Minute:
			return false
		}
	}
	return true
}

// live lets the fault last, with a writer and a reader on each member, and judges what was promised.
func (n *night) live(f lasting, lasts time.Duration) {
	t := n.t
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	regs, seen := make([]*register, len(n.members)), make([]atomic.Int64, len(n.members))
	began := time.Now()
	for i, m := range n.members {
		regs[i] = &register{key: fmt.Sprint("of ", m.name)}
	}
	for i, m := range n.members {
		s := m.s
		every := time.Duration(400+rand.IntN(100)) * time.Millisecond
		clients.Go(func() {
			for ctx.Err() == nil {
				regs[i].write(ctx, s, time.Since(began) > time.Minute)
				time.Sleep(every)
			}
		})
		clients.Go(func() {
			for k := i; ctx.Err() == nil; k++ {
				k %= len(regs)
				regs[k].read(ctx, t, f.name, &seen[k], s)
				time.Sleep(every)
			}
		})
	}
	time.Sleep(time.Second)
	from := time.Now()
	if f.begin != nil {
		f.begin(n)
	}
	counted.faults.add(1)
	if f.each == nil {
		time.Sleep(lasts)
	}
	for k := 0; f.each != nil && k < int(lasts.Seconds()); k++ {
		f.each(n, k)
		time.Sleep(time.Second)
	}
	changes := n.changes(from)
	if !f.within(changes) {
		violated(t, "%s: the leader changes %v after the beginning", f.name, changes)
	}
	t.Logf("the leader changes after %v", changes)
	late := int64(0)
	for _, r := range regs {
		late += r.late.Load()
	}
	judged := 70 * time.Second
	if n.longest > stallLimit { // a write takes half a minute
		judged = budgetLasts - 1
	}
	if works := late > 0; works == f.outage && lasts > judged {
		violated(t, "%s: %d writes were acknowledged after the first minute", f.name, late)
	}
	stop()
	clients.Wait()
	n.mend()
	n.healed(f, regs)
	time.Sleep(n.longest) // a mutex that a call to the disk holds keeps the time of the bubble
}

// healed: everybody writes, and has everything.
func (n *night) healed(f lasting, regs []*register) {
	t := n.t
	began := time.Now()
	for i, m := range n.members {
		ctx, cancel := context.WithTimeout(t.Context(), scriptLimit)
		if got := n.poll(ctx, func() error { return m.s.Set(ctx, "end", []byte(m.name)) }); got != "ok" {
			violated(t, "%s, mended: %s (%d) is stuck: %s", f.name, m.name, i, got)
		}
		cancel()
	}
	t.Logf("mended, all write after %v", time.Since(began).Round(time.Millisecond))
	if took := time.Since(began); took > healLimit {
		t.Errorf("%s, mended: it takes %v until all write", f.name, took)
	}
	n.obey("await equal")
	for _, m := range n.members {
		for _, r := range regs {
			got, _ := strconv.ParseInt(string(m.s.Stale().Get(r.key)), 10, 64)
			if got < r.acked.Load() || got > r.tried.Load() {
				violated(t, "%s, mended: %s has %d for %s, acknowledged was %d, tried %d", f.name, m.name, got, r.key, r.acked.Load(), r.tried.Load())
			}
		}
	}
}

// TestCampaignBudget has each fault last. go test takes some of them at random and lets them last for less, QUORATE_CAMPAIGN all.
func TestCampaignBudget(t *testing.T) {
	t.Parallel()
	type trial struct {
		lasting
		size int
	}
	var trials []trial
	for _, f := range lastingFaults {
		trials = append(trials, trial{f, 3})
		if f.five && dose(0, 1) > 0 {
			trials = append(trials, trial{f, 5})
		}
	}
	rand.Shuffle(len(trials), func(i, j int) { trials[i], trials[j] = trials[j], trials[i] })
	lasts := time.Duration(dose(90, int(budgetLasts.Seconds()))) * time.Second
	for _, f := range trials[:dose(3, len(trials))] {
		t.Run(fmt.Sprint(f.name, " of ", f.size), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNight(t, f.size)
				defer n.end()
				n.live(f.lasting, lasts)
			})
		})
	}
}

// The judgement is tested, as no test above tells what it lets pass.
func TestBudgetIsKept(t *testing.T) {
	t.Parallel()
	at := func(seconds ...int) (list []time.Duration) {
		for _, s := range seconds {
			list = append(list, time.Duration(s)*time.Second)
		}
		return list
	}
	each := func(*night, int) {}
	for _, v := range []struct {
		each    func(*night, int)
		changes []time.Duration
		within  bool
	}{
		{nil, nil, true}, {nil, at(1, 59), true}, {nil, at(1, 2, 3), false}, {nil, at(60), false}, {nil, at(1, 200), false},
		{each, at(1, 59, 62, 121), true}, {each, at(1, 59, 60), false}, {each, at(1, 100, 159, 159), false},
	} {
		if got := (lasting{each: v.each}).within(v.changes); got != v.within {
			t.Errorf("%v, comes and goes %v: %v", v.changes, v.each != nil, got)
		}
	}
}
