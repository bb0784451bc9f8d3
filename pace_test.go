package quorate

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/types"
)

func TestPace(t *testing.T) {
	t.Parallel()
	var p pace
	for _, x := range []struct{ add, median time.Duration }{
		{9, 9}, {1, 9}, {2, 2}, {8, 8}, {3, 3}, // of 1 2 3 8 9
		{4, 3}, {5, 4}, {6, 5}, {7, 5}, // of 3 4 5 6 7
	} {
		if p.add(x.add); p.median() != x.median {
			t.Errorf("after %v: %v, want %v", x.add, p.median(), x.median)
		}
	}
	if (&pace{}).median() != 0 {
		t.Error("nothing has a pace")
	}
}

func TestQuorumPace(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		answers []time.Duration
		voters  int
		want    time.Duration // 0 = too few
	}{
		{nil, 1, 0}, {[]time.Duration{1}, 2, 0}, {[]time.Duration{1}, 3, 0},
		{[]time.Duration{7, 1}, 3, 7},
		{[]time.Duration{9, 1, 5}, 5, 9}, {[]time.Duration{9, 1, 5, 3}, 5, 5},
		{[]time.Duration{9, 1}, 5, 0},
	} {
		if got, ok := quorumPace(x.answers, x.voters); got != x.want || ok != (x.want != 0) {
			t.Errorf("%v of %d voters: %v, %v", x.answers, x.voters, got, ok)
		}
	}
}

// A slow disk is one of which three of the last five appends were slow and the others' were not; it is held against the member for a
// minute, then for twice as long if it happens again, at most ten.
func TestSlowness(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const quick, late = 10 * time.Millisecond, 2 * time.Second
		for _, x := range []struct {
			appends []time.Duration
			others  time.Duration
			known   bool
			slow    bool
		}{
			{[]time.Duration{late, late, late}, quick, true, true},
			{[]time.Duration{late, quick, late, quick, late}, quick, true, true},
			{[]time.Duration{late, late, quick, quick, quick}, quick, true, false},
			{[]time.Duration{late, late}, quick, true, false},
			{[]time.Duration{late, late, late}, late / slowTimes, true, false}, // no more than five times as slow
			{[]time.Duration{late, late, late}, late/slowTimes - 1, true, true},
			{[]time.Duration{late, late, late}, quick, false, false}, // it does not lead, or the others are not known
			{[]time.Duration{slowAppend, slowAppend, slowAppend}, 0, true, false},
		} {
			var j slowness
			if err := j.judge(x.appends, len(x.appends), x.others, x.known); (err != nil) != x.slow {
				t.Errorf("%+v: %v", x, err)
			}
		}
		var j slowness
		slow := []time.Duration{late, late, 3 * time.Second, quick, quick}
		n := 0
		again := func(slow []time.Duration, known bool) error {
			n += len(slow)
			return j.judge(slow, n, quick, known)
		}
		if err := again(slow, true); err == nil || !strings.Contains(err.Error(), "takes 2s") || !strings.Contains(err.Error(), "in 10ms") {
			t.Errorf("the fault is %v", err)
		}
		for i, minutes := range []time.Duration{1, 2, 4, 8, 10, 10} {
			time.Sleep(minutes*time.Minute - 1)
			if again(nil, true) == nil || j.judged > n || i == 0 && j.judged != n {
				t.Errorf("fault %d has ended too soon", i)
			}
			time.Sleep(time.Nanosecond)
			if i%2 == 0 { // it goes on, also where it follows by now
				if again(slow, false) == nil {
					t.Errorf("fault %d ends while appends are slow", i)
				}
				continue
			}
			if err := again(nil, true); err != nil {
				t.Errorf("fault %d goes on: %v", i, err)
			}
			if again(slow, true) == nil {
				t.Errorf("fault %d is not followed by another", i)
			}
		}
		time.Sleep(slowMost)
		again(nil, true)
		time.Sleep(slowMost + 1)
		again(slow, true)
		time.Sleep(slowPause)
		if err := again(nil, true); err != nil {
			t.Errorf("after a long time without: %v", err)
		}
	})
}

// A slowFS is raft-wal's file system on a disk whose fsync takes a while.
type slowFS struct {
	types.VFS
	fsync *atomic.Int64
}

type slowFile struct {
	types.WritableFile
	fsync *atomic.Int64
}

func (f slowFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	w, err := f.VFS.Create(dir, name, size)
	return slowFile{w, f.fsync}, err
}

func (f slowFS) OpenWriter(dir, name string) (types.WritableFile, error) {
	w, err := f.VFS.OpenWriter(dir, name)
	return slowFile{w, f.fsync}, err
}

func (f slowFile) Sync() error {
	time.Sleep(time.Duration(f.fsync.Load()))
	return f.WritableFile.Sync()
}

// slowBubble is a bubble of members with disks that can be slowed down, by address.
func slowBubble(t *testing.T, f func(c *script, l, f, g *scriptMember, slow func(*scriptMember, time.Duration))) {
	t.Helper()
	bubbleOf(t, func(c *Config) { c.vfs = slowFS{walfs.New(), new(atomic.Int64)} }, func(t *testing.T, c *script, l, f1, f2 *scriptMember) {
		slow := func(m *scriptMember, d time.Duration) { m.conf.vfs.(slowFS).fsync.Store(int64(d)) }
		f(c, l, f1, f2, slow)
		for _, m := range c.members {
			slow(m, 0)
		}
		time.Sleep(10 * time.Second)
	})
}

// write has a writer write on a member until the end, and counts what is acknowledged and what is not.
func (c *script) write(m *scriptMember, every time.Duration) (end func() (good int, bad []error)) {
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan struct{})
	good, bad := 0, []error(nil)
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			one, stop := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			if err := m.s.Set(one, "k", nil); err != nil {
				bad = append(bad, err)
			} else {
				good++
			}
			stop()
			time.Sleep(every)
		}
	}()
	return func() (int, []error) { cancel(); <-done; return good, bad }
}

// A leader whose disk is slow hands over, once, and writes are quick again. It says so in figures.
func TestSlowDiskOfLeader(t *testing.T) {
	t.Parallel()
	for _, delay := range []time.Duration{2 * time.Second, 4500 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			t.Parallel()
			slowBubble(t, func(c *script, l, f, g *scriptMember, slow func(*scriptMember, time.Duration)) {
				term := l.s.Status().Term
				slow(l, delay)
				end := c.write(f, 50*time.Millisecond)
				began := time.Now()
				for l.s.Status().Role == Leader && time.Since(began) < 20*time.Second {
					time.Sleep(100 * time.Millisecond)
				}
				c.t.Logf("it led for %v", time.Since(began))
				if l.s.Status().Role == Leader {
					c.t.Errorf("the slow member leads after 20 s")
				}
				time.Sleep(2 * time.Second)
				good, bad := end()
				if good < 20 || bad != nil {
					c.t.Errorf("%d writes in 20 s; %v", good, bad)
				}
				if got := l.s.Status().Fsync; got != delay {
					c.t.Errorf("Fsync is %v, want %v", got, delay)
				}
				if err := l.s.unfitToLead(); err == nil || !strings.Contains(err.Error(), "the disk of the log is slow") {
					c.t.Errorf("unfit: %v", err)
				}
				end = c.write(f, 500*time.Millisecond)
				time.Sleep(70 * time.Second)
				end()
				if st := l.s.Status(); st.Role != Follower || st.Term > term+1 {
					c.t.Errorf("after two minutes: %v in term %d, it began in %d", st.Role, st.Term, term)
				}
			})
		})
	}
}

// Where nobody is faster, nobody else leads.
func TestSlowDiskOfAll(t *testing.T) {
	t.Parallel()
	slowBubble(t, func(c *script, l, f, g *scriptMember, slow func(*scriptMember, time.Duration)) {
		term := l.s.Status().Term
		for _, m := range c.members {
			slow(m, 2*time.Second)
		}
		end := c.write(f, 10*time.Millisecond)
		time.Sleep(2 * time.Minute)
		good, bad := end()
		if st := l.s.Status(); st.Role != Leader || st.Term != term || good < 20 || bad != nil {
			c.t.Errorf("%v in term %d, it began in %d; %d writes; %v", st.Role, st.Term, term, good, bad)
		}
	})
}

// An append that has not ended is slow before it ends.
func TestAppendsInProgress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := &logStore{}
		for range 4 {
			l.pace.add(time.Millisecond)
		}
		l.writes(time.Now())
		time.Sleep(slowAppend)
		if took, n := l.appends(0); len(took) != 4 || n != 4 {
			t.Errorf("%v of %d", took, n)
		}
		time.Sleep(time.Nanosecond)
		if took, n := l.appends(1); len(took) != 4 || took[3] != slowAppend+1 || n != 4 {
			t.Errorf("%v of %d", took, n)
		}
		l.writes(time.Time{})
		l.pace.add(2 * time.Second)
		if took, n := l.appends(0); len(took) != paceKept || took[4] != 2*time.Second || n != 5 {
			t.Errorf("%v of %d", took, n)
		}
	})
}

// A voter's pace is the longest of its newest answers and of what it has not answered yet; none, if it does not keep up.
func TestPaceOfPeer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const term = 7
		var a aheadTable
		want := func(what string, want time.Duration, ok bool) {
			t.Helper()
			if got, is := a.pace("f", term); got != want || is != ok {
				t.Errorf("%s: %v, %v, want %v, %v", what, got, is, want, ok)
			}
		}
		last := uint64(0)
		append := func(took time.Duration) {
			args := &raft.AppendEntriesRequest{Term: term, PrevLogEntry: last, Entries: commands(term, last+1)}
			last++
			a.ordinary("f", args)
			time.Sleep(took)
			a.holds("f", args)
		}
		want("nothing is known", 0, false)
		append(time.Second)
		append(2)
		want("two answers", 0, false)
		append(2)
		want("three", time.Second, true)
		append(3)
		append(1)
		want("the first is old", 3, true)
		append(2 * time.Second)
		want("the disk of all turns slow", 2*time.Second, true)
		for range 3 {
			append(1)
		}
		args := &raft.AppendEntriesRequest{Term: term, PrevLogEntry: last, Entries: commands(term, last+1)}
		e := a.begin("f", args)
		time.Sleep(5 * time.Nanosecond)
		want("an early send is not answered", 5, true)
		close(e.done)
		want("it is", 1, true)
		a.ordinary("f", args)
		time.Sleep(6 * time.Nanosecond)
		want("raft's append is not answered", 6, true)
		a.forget("f", term, 0)
		want("it failed", 0, false)
		if _, ok := a.pace("f", term+1); ok {
			t.Error("it is known in another term")
		}
	})
}
