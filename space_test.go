package quorate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"
)

func TestJudgeSpace(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	was := errors.New("it was low")
	for _, v := range []struct {
		what        string
		free, total int64
		missing     int64
		was         error
		low         bool
	}{
		{"not known", 0, 0, 0, nil, false},
		{"at the limit", 64 * mib, 100 << 30, 0, nil, false},
		{"below it", 64*mib - 1, 100 << 30, 0, nil, true},
		{"without the reserve", 95 * mib, 100 << 30, 32 * mib, nil, true},
		{"with room for the reserve", 96 * mib, 100 << 30, 32 * mib, nil, false},
		{"a sixteenth", 32 * mib, 512 * mib, 0, nil, false},
		{"less than a sixteenth", 32*mib - 1, 512 * mib, 0, nil, true},
		{"two segments, and more than a sixteenth", 16 * mib, 100 * mib, 0, nil, false},
		{"less than two segments", 16*mib - 1, 100 * mib, 0, nil, true},
		{"a quarter, and less than two segments", 12 * mib, 48 * mib, 0, nil, false},
		{"less than a quarter", 12*mib - 1, 48 * mib, 0, nil, true},
		{"it was low, and is a little above the limit", 67 * mib, 100 << 30, 0, was, true},
		{"it was low, and is well above the limit", 68 * mib, 100 << 30, 0, was, false},
	} {
		err := judgeSpace("/data", diskSpace{v.free, v.total}, v.missing, v.was)
		if (err != nil) != v.low || v.was != nil && err != nil && err != was {
			t.Errorf("%s: %v", v.what, err)
		}
	}
	wantWords(t, judgeSpace("/data", diskSpace{mib, 48 * mib}, 0, nil), "/data", "1.0 MiB left", "below 12.0 MiB")
}

func wantWords(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("%v does not say %q", err, w)
		}
	}
}

func TestBallast(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	size := func() int64 {
		info, err := os.Stat(filepath.Join(dir, reserveName))
		if err != nil {
			return 0
		}
		var st syscall.Stat_t
		must(t, syscall.Stat(filepath.Join(dir, reserveName), &st))
		if st.Blocks*512 < info.Size() {
			t.Errorf("%d bytes take %d blocks", info.Size(), st.Blocks)
		}
		return info.Size()
	}
	b := newBallast(dir, slog.New(slog.DiscardHandler))
	if b.hold(1 << 20); b.unable {
		t.Skip("this file system can't promise space")
	}
	if size() != 1<<20 || b.missing(5) != 0 {
		t.Errorf("it holds %d bytes", size())
	}
	if b = newBallast(dir, slog.New(slog.DiscardHandler)); b.missing(5) != 0 { // after a kill
		t.Error("what is there counts as missing")
	}
	if !b.give() || b.give() || size() != 0 || b.missing(5) != 5 {
		t.Errorf("given back, and %d bytes are there", size())
	}
	b.hold(1 << 20)
	b.close()
	if b.hold(1 << 20); size() != 0 {
		t.Error("there is a reserve after the end")
	}
}

func TestAllocationIsInterrupted(t *testing.T) {
	t.Parallel()
	n := 0
	is(t, uninterrupted(func() error {
		if n++; n < 4 {
			return os.NewSyscallError("fallocate", syscall.EINTR)
		}
		return syscall.ENOSPC
	}), syscall.ENOSPC)
	n = 0
	is(t, uninterrupted(func() error { n++; return syscall.EINTR }), syscall.EINTR)
	if n > 1000 {
		t.Errorf("%d tries", n)
	}
}

// A full disk is met by Create, after it has made the file: the next probe finds that file.
func TestProbeIsMadeAnew(t *testing.T) {
	t.Parallel()
	o, disk := faultyOptions(t)
	o.leader, o.resent = func() bool { return false }, true
	path := filepath.Join(o.dir, probeName)
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 3)
	disk.fail(setWrite, syscall.ENOSPC)
	is(t, l.StoreLogs([]*raft.Log{testEntry(4, 1)}), syscall.ENOSPC)
	disk.fail(setWrite, nil)
	must(t, l.settle())
	disk.fail(setCreate, syscall.ENOSPC)
	l.probe()
	is(t, l.failed(), syscall.ENOSPC)
	if _, err := os.Stat(path); err == nil {
		t.Error("a probe that failed leaves its file")
	}
	disk.fail(setCreate, nil)
	must(t, os.WriteFile(path, nil, 0o600)) // of one that was cut short
	l.probe()
	must(t, l.failed())
	appendLog(t, l, 4, 1, 1)
	must(t, os.WriteFile(path, nil, 0o600))
	reopenLog(t, l, o)
	if _, err := os.Stat(path); err == nil {
		t.Error("a start leaves the probe of a life that was killed")
	}
}

// A probe takes what a change of segments does: where that has no space, neither has the probe.
func TestProbeTakesASegment(t *testing.T) {
	t.Parallel()
	o, disk := faultyOptions(t)
	o.segmentSize = 512 << 10
	sizes := &sizedFS{VFS: disk}
	o.vfs = sizes
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 3)
	sizes.most.Store(300 << 10)
	if l.tryFile(l.segmentSize) == nil {
		t.Error("a probe finds space where a segment does not")
	}
	sizes.most.Store(0)
	must(t, l.tryFile(l.segmentSize))
}

func setCreate(f *faultFS, err error) { f.createErr = err }

// A sizedFS has no room for larger files.
type sizedFS struct {
	types.VFS
	most atomic.Int64 // 0 = any
}

func (f *sizedFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	if most := f.most.Load(); most > 0 && int64(size) > most {
		return nil, syscall.ENOSPC
	}
	return f.VFS.Create(dir, name, size)
}

func TestProbesBecomeRare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var p probing
		passes := 0
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(spaceOften) {
			if p.due(true) { // every probe succeeds, and the log is full again at the next look
				p.tried(true)
				passes++
			}
		}
		if passes < 10 || passes > 30 {
			t.Errorf("%d probes in ten minutes", passes)
		}
		p.due(false)
		time.Sleep(time.Minute)
		if !p.due(true) {
			t.Error("a log that was well for a minute is not probed at once")
		}
		p.tried(false)
		if time.Sleep(spaceOften); !p.due(true) {
			t.Error("a probe that has failed puts off the next one")
		}
	})
}

// A fakeDisk is as full as a test says.
type fakeDisk struct{ free atomic.Int64 }

func (d *fakeDisk) space(string) diskSpace { return diskSpace{d.free.Load(), 1 << 40} }

// A leader's append meets a full disk: it waits as long as nobody else could lead, is no hang, and then answers. A follower's answers.
func TestLogFullDiskWaitsForSuccessor(t *testing.T) {
	t.Parallel()
	o, disk := faultyOptions(t)
	var leads, stays atomic.Bool
	rooms := 0
	o.leader, o.stays, o.resent = leads.Load, stays.Load, true
	o.room = func() bool { rooms++; return rooms == 1 }
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 30)
	leads.Store(true)
	stays.Store(true)
	disk.fail(setWrite, syscall.ENOSPC)
	done := make(chan error, 1)
	ended := inRaft(func() { done <- l.StoreLogs([]*raft.Log{testEntry(31, 1), testEntry(32, 1)}) })
	comesTrue(t, func() error {
		if l.staying.Load() == 0 {
			return errors.New("it does not wait")
		}
		return nil
	})
	if rooms < 1 {
		t.Error("the reserve was not asked for")
	}
	began := time.Now()
	longest := time.Duration(0)
	for time.Since(began) < 5*logRetry {
		longest = max(longest, l.busy())
		time.Sleep(time.Millisecond)
	}
	if longest > 3*logRetry {
		t.Errorf("a call that waits counts as one that hangs for %v", longest)
	}
	l.probe()
	is(t, l.failed(), syscall.ENOSPC)
	stays.Store(false)
	is(t, <-done, syscall.ENOSPC)
	if !<-ended {
		t.Error("Goexit")
	}
	leads.Store(false)
	is(t, l.StoreLogs([]*raft.Log{testEntry(31, 1), testEntry(32, 1)}), syscall.ENOSPC) // a follower's
	disk.fail(setWrite, nil)
	is(t, l.failed(), syscall.ENOSPC)
	l.probe()
	if err := l.failed(); err != nil {
		t.Errorf("after the probe: %v", err)
	}
	if _, err := os.Stat(filepath.Join(l.dir, probeName)); err == nil {
		t.Error("the probe stays")
	}
	appendLog(t, l, 31, 2, 10)
	wantLog(t, l, 1, 40)
	// What was cut off is in raft's memory yet: an error would leave it there.
	must(t, l.DeleteRange(36, 40))
	disk.fail(setWrite, syscall.ENOSPC)
	ended = inRaft(func() { done <- l.StoreLogs([]*raft.Log{testEntry(36, 3), testEntry(37, 3)}) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	wantParked(t, ended)
	disk.fail(setWrite, nil)
	must(t, <-done)
	wantLog(t, l, 1, 37)
}

// A leader whose log can't be opened anew, because the process has no descriptor, lets another one lead as soon as one can. That nothing is
// stored is certain only when it is open again.
func TestLogThatIsNotOpenedAnewLetsAnotherLead(t *testing.T) {
	t.Parallel()
	o, disk := faultyOptions(t)
	var stays atomic.Bool
	o.leader, o.stays, o.resent = func() bool { return true }, stays.Load, true
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 3)
	stays.Store(true)
	disk.fail(setWrite, syscall.ENOSPC)
	disk.fail(setOpen, syscall.EMFILE)
	done := make(chan error, 1)
	inRaft(func() { done <- l.StoreLogs([]*raft.Log{testEntry(4, 1)}) })
	comesTrue(t, func() error { return wantFault(l, syscall.EMFILE) })
	if l.staying.Load() == 0 {
		t.Error("it does not wait")
	}
	stays.Store(false)
	var err error
	select {
	case err = <-done:
	case <-time.After(patience):
		t.Fatal("it waits for the log")
	}
	if is(t, err, errUnsettled); !passing(err) || notStored(err) || !notStored(syscall.ENOSPC) || notStored(fmt.Errorf("%w; %w", syscall.ENOSPC, errSentAhead)) {
		t.Errorf("what is not stored: %v", err)
	}
	disk.fail(setWrite, nil)
	disk.fail(setOpen, nil)
	appendLog(t, l, 4, 2, 2)
	wantLog(t, l, 1, 5)
}

// fullness is a cluster of three in which disks fill.
type fullness struct {
	*script
	disks map[*scriptMember]*fakeDisk
	was   Status // of the leader, when all was well
}

func newFullness(t *testing.T) *fullness {
	c := &fullness{script: newScript(t), disks: make(map[*scriptMember]*fakeDisk)}
	var last *fakeDisk
	c.change = func(conf *Config) {
		last = new(fakeDisk)
		last.free.Store(1 << 39)
		conf.space, conf.vfs, conf.segment = last.space, newFaultFS(), 16<<10
	}
	c.obey("start a")
	c.disks[c.member("a")] = last
	for _, name := range []string{"b", "c"} {
		c.obey("join " + name + " via a")
		c.disks[c.member(name)] = last
	}
	c.obey("await voters 3")
	c.obey("set a k v")
	c.obey("await equal")
	c.leads(nil, scriptLimit)
	c.obey("cast leader L followers F G")
	c.was = c.cast["L"].s.Status()
	return c
}

func (c *fullness) first(n int) []*scriptMember {
	return []*scriptMember{c.cast["L"], c.cast["F"], c.cast["G"]}[:n]
}

// load has all members write, each whatever becomes of the others, until it is told to stop.
// The members are equal only after stop: call it before that is awaited.
func (c *fullness) load() (stop func()) {
	ctx, cancel := context.WithCancel(c.t.Context())
	var load sync.WaitGroup
	for _, m := range c.members {
		load.Go(func() {
			for ctx.Err() == nil {
				one, cancel := context.WithTimeout(ctx, time.Second)
				m.s.Set(one, "load", []byte(m.name))
				cancel()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return func() { cancel(); load.Wait() }
}

// reads has every member answer a linearizable read.
func (c *fullness) reads(when string, except ...*scriptMember) {
	c.t.Helper()
	for _, m := range c.members {
		if slices.Contains(except, m) {
			continue
		}
		ctx, cancel := context.WithTimeout(c.t.Context(), time.Second)
		if v, err := m.s.Get(ctx, "k"); err != nil || string(v) != "v" {
			c.t.Errorf("%s: %s reads %q, %v", when, m.name, v, err)
		}
		cancel()
	}
}

// writes has every member write within so long.
func (c *fullness) writes(when string, within time.Duration, except ...*scriptMember) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), within)
	defer cancel()
	for _, m := range c.members {
		if slices.Contains(except, m) {
			continue
		}
		if err := m.s.Set(ctx, "w", []byte(m.name)); err != nil {
			c.t.Errorf("%s: %s writes: %v", when, m.name, err)
		}
		if m.s.unready() == nil {
			if err := m.s.Ready(ctx); err != nil {
				c.t.Errorf("%s: Ready of %s: %v", when, m.name, err)
			}
		}
	}
}

// refused has every member refuse a write at once, and say so in Ready.
func (c *fullness) refused(when string) { c.t.Helper(); c.refusedFor(when, errRefused.Error()) }

func (c *fullness) refusedFor(when, why string) {
	c.t.Helper()
	for _, m := range c.members {
		began := time.Now()
		err := m.s.Set(c.t.Context(), "w", nil)
		if took := time.Since(began); took > 500*time.Millisecond || !errors.Is(err, ErrNotApplied) || !strings.Contains(fmt.Sprint(err), why) {
			c.t.Errorf("%s: %s answers a write after %v: %v", when, m.name, took, err)
		}
		ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Second)
		if err := m.s.Ready(ctx); err == nil || m.s.unready() == nil && !strings.Contains(err.Error(), why) {
			c.t.Errorf("%s: Ready of %s: %v", when, m.name, err)
		}
		cancel()
	}
}

// changes wants the leader to have changed so often, at least and at most, since it was asked before.
func (c *fullness) changes(when string, least, most int) {
	c.t.Helper()
	c.leads(nil, scriptLimit)
	st := c.cast["L"].s.Status()
	same, terms := st.ID == c.was.ID, int(st.Term-c.was.Term)
	if same && (terms > 0 || least > 0) || !same && (most == 0 || terms > 2*most) {
		c.t.Errorf("%s: %s leads in term %d, and before in %d, the same: %v", when, c.cast["L"].name, st.Term, c.was.Term, same)
	}
	c.was = st
}

// The disks of one, two and three of three run low, with and without load: reads go on, the leader changes at most once, and writes
// go on at once or two seconds after there is space.
func TestSpaceRunsLow(t *testing.T) {
	t.Parallel()
	for n := 1; n <= 3; n++ {
		t.Run(fmt.Sprint(n, " of 3"), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newFullness(t)
				defer c.end()
				ctx, stop := context.WithCancel(t.Context())
				var load sync.WaitGroup
				if n != 2 {
					load.Go(func() {
						for ctx.Err() == nil {
							c.members[0].s.Set(ctx, "load", nil)
							time.Sleep(20 * time.Millisecond)
						}
					})
				}
				low := c.first(n)
				for _, m := range low {
					c.disks[m].free.Store(10 << 20)
				}
				time.Sleep(2500 * time.Millisecond)
				for _, m := range low {
					wantWords(t, m.s.Err(), "10.0 MiB left")
				}
				c.reads("low")
				if n < 3 {
					c.changes("low", 1, 1)
					c.writes("low", time.Second)
				} else {
					c.changes("low", 0, 1) // they notice within a second of each other
					c.refused("low")
					must(t, c.members[1].s.AddAllowedMember(t.Context(), "d.test:7001")) // what mends it goes on
					if err := c.cast["L"].s.Ready(ctxFor(t, 100*time.Millisecond)); err == nil {
						t.Error("a leader that takes no writes is ready")
					}
				}
				time.Sleep(4 * time.Second)
				c.reads("low for a while")
				c.changes("low for a while", 0, 0)
				for _, m := range low {
					c.disks[m].free.Store(1 << 39)
				}
				time.Sleep(time.Second)
				c.writes("with space back", time.Second)
				c.changes("with space back", 0, 0)
				for _, m := range low {
					if err := m.s.Err(); err != nil {
						t.Errorf("with space back: %v", err)
					}
				}
				stop()
				load.Wait()
				c.obey("await equal")
			})
		})
	}
}

// The logs of one, two and three of three meet a full disk, whatever the file system says of its space.
func TestLogsAreFull(t *testing.T) {
	t.Parallel()
	for i := range 6 {
		n, load := i%3+1, i >= 3
		t.Run(fmt.Sprint(n, " of 3", map[bool]string{true: " under load"}[load]), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newFullness(t)
				defer c.end()
				stop := func() {}
				if load {
					stop = c.load()
				}
				defer stop()
				full := c.first(n)
				writer := c.cast["L"]
				if n == 1 {
					writer = c.cast["F"] // what only others store is not applied on the leader
				}
				except := full[n-1:] // its log takes nothing, and the two others commit what it meets
				var refused []string
				for i := range full {
					m := full[n-1-i] // the leader last: that a log takes nothing is known when it has been tried
					m.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
					c.disks[m].free.Store(20 << 10)
					ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
					key := fmt.Sprint("meets", i)
					err := writer.s.Set(ctx, key, nil) // meets it
					cancel()
					if errors.Is(err, ErrNotApplied) {
						refused = append(refused, key)
					}
					if left := 2 - i; (err == nil) != (left >= 2) {
						t.Errorf("a write meets %d full logs: %v", i+1, err)
					}
				}
				c.reads("full", except...)
				if n == 1 {
					c.changes("full", 1, 1)
					c.writes("full", time.Second, except...)
				} else {
					c.changes("full", 0, 0)
					c.refused("full")
				}
				time.Sleep(7 * time.Second) // longer than a hang
				c.reads("full for a while", except...)
				c.changes("full for a while", 0, 0)
				for _, m := range full {
					m.conf.vfs.(*faultFS).fail(setWrite, nil)
					c.disks[m].free.Store(1 << 39)
				}
				time.Sleep(time.Second)
				c.writes("with space back", time.Second)
				c.changes("with space back", 0, 1)
				stop()
				c.obey("await equal")
				for _, key := range refused {
					if _, err := writer.s.Lookup(t.Context(), key); !errors.Is(err, ErrNotFound) {
						t.Errorf("%s was refused as not applied, and reads as %v", key, err)
					}
				}
			})
		})
	}
}

// Whether a log takes an entry is not known before it was tried. A leader that hands over where the next one finds no majority of logs
// for its first entry leaves the cluster without reads: it stays, refuses writes, and reads go on.
func TestNoHandOverWithoutLogs(t *testing.T) {
	t.Parallel()
	for what, fill := range map[string]func(t *testing.T, c *fullness, l, f *scriptMember){
		"the leader has little space, and a voter's log is full": func(t *testing.T, c *fullness, l, f *scriptMember) {
			f.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
			must(t, l.s.Set(t.Context(), "w", nil)) // meets it
			l.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
			c.disks[l].free.Store(20 << 10)
		},
		"both have little space, and full logs that nobody has tried": func(t *testing.T, c *fullness, l, f *scriptMember) {
			for _, m := range []*scriptMember{f, l} {
				m.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
				c.disks[m].free.Store(20 << 10)
			}
		},
		"the leader's log is full, and one that nobody has tried": func(t *testing.T, c *fullness, l, f *scriptMember) {
			for _, m := range []*scriptMember{f, l} {
				m.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
			}
			c.disks[l].free.Store(20 << 10)
			l.s.Set(ctxFor(t, time.Millisecond), "w", nil)
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newFullness(t)
				defer c.end()
				l, f := c.cast["L"], c.cast["F"]
				fill(t, c, l, f)
				time.Sleep(2500 * time.Millisecond)
				c.reads("full", f)
				c.changes("full", 0, 0)
				c.refused("full")
				for _, m := range []*scriptMember{f, l} {
					m.conf.vfs.(*faultFS).fail(setWrite, nil)
					c.disks[m].free.Store(1 << 39)
				}
				time.Sleep(time.Second)
				c.writes("with space back", time.Second)
				c.obey("await equal")
			})
		})
	}
}

// The logs of both followers are full, and the leader's is not: what it takes is in its log, and nobody can say whether it will be
// committed. Its callers learn that in seconds, later ones are refused at once, and reads go on.
func TestFollowersLogsAreFull(t *testing.T) {
	t.Parallel()
	for _, by := range []string{"L", "F"} {
		t.Run("met by "+by, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newFullness(t)
				defer c.end()
				full := []*scriptMember{c.cast["F"], c.cast["G"]}
				for _, m := range full {
					m.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
				}
				began := time.Now()
				is(t, c.cast[by].s.Set(t.Context(), "w", nil), ErrUncertain, errRefused.Error())
				if took := time.Since(began); took > refusedLimit+2*resendMax {
					t.Errorf("a write in the log of the leader ends after %v", took)
				}
				c.reads("full")
				c.changes("full", 0, 0)
				c.refusedFor("full", "1 of 3 voters")
				if err := c.cast["L"].s.Ready(ctxFor(t, 100*time.Millisecond)); err == nil {
					t.Error("a leader that takes no writes is ready")
				}
				time.Sleep(7 * time.Second)
				c.reads("full for a while")
				c.refusedFor("full for a while", "1 of 3 voters")
				full[1].conf.vfs.(*faultFS).fail(setWrite, nil)
				time.Sleep(time.Second)
				c.writes("with space back", time.Second, full[0])
				c.changes("with space back", 0, 0)
				full[0].conf.vfs.(*faultFS).fail(setWrite, nil)
				time.Sleep(time.Second)
				c.writes("with all space back", time.Second)
				c.obey("await equal")
			})
		})
	}
}

// The same with the states. Their logs are whole, so that two of them are no reason to stay.
func TestStatesAreFull(t *testing.T) {
	t.Parallel()
	for n := 1; n <= 3; n++ {
		t.Run(fmt.Sprint(n, " of 3"), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newFullness(t)
				defer c.end()
				stop := func() {}
				if n != 1 {
					stop = c.load()
				}
				defer stop()
				full := c.first(n)
				limit := func(pages int) {
					for _, m := range full {
						m.s.store.fileMu.Lock()
						must(t, m.s.store.writer.pragma(fmt.Sprintf("max_page_count=%d", pages)))
						m.s.store.fileMu.Unlock()
					}
				}
				limit(1)
				for i := range 5 {
					must(t, full[0].s.Set(t.Context(), fmt.Sprint("big", i), make([]byte, 100<<10)))
				}
				time.Sleep(3 * time.Second)
				for _, m := range full {
					if err := m.s.Err(); !isFull(err) {
						t.Errorf("Err is %v", err)
					}
				}
				c.reads("full")
				if n < 3 {
					c.changes("full", 1, 1)
					c.writes("full", time.Second)
				} else {
					c.changes("full", 0, 1)
					c.refused("full")
				}
				time.Sleep(4 * time.Second)
				c.reads("full for a while")
				c.changes("full for a while", 0, 0)
				limit(1 << 20)
				time.Sleep(time.Second)
				c.writes("with space back", time.Second)
				c.changes("with space back", 0, 0)
				stop()
				c.obey("await equal")
			})
		})
	}
}

// A leader that was relieved a moment ago takes writes again when its disk runs low once more, and hands over after seconds.
func TestFullLeaderIsRelievedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newFullness(t)
		defer c.end()
		l := c.cast["L"]
		for _, tries := range []int{15, 80} {
			c.disks[l].free.Store(10 << 20)
			for range tries {
				c.writes("low", time.Second)
				time.Sleep(100 * time.Millisecond)
			}
			c.changes("low", 1, 1)
			if c.cast["L"] == l {
				t.Fatal("it leads, and others are fit")
			}
			c.disks[l].free.Store(1 << 39)
			eventually(t, scriptLimit, "it leads again", func() error { return l.s.TransferLeader(t.Context(), l.conf.Addr) })
			c.changes("well", 1, 1)
		}
	})
}

// Whoever leads runs low on space a second later, and has space again when another one leads: the lead is not sent around, and writes go on.
func TestReliefOfAllFlaps(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newFullness(t)
		defer c.end()
		changes, was := 0, c.cast["L"]
		for range 12 {
			c.leads(nil, time.Second)
			l := c.cast["L"]
			if l != was {
				changes++
				was = l
			}
			for _, m := range c.members {
				free := int64(1 << 39)
				if m == l {
					free = 10 << 20
				}
				c.disks[m].free.Store(free)
			}
			must(t, l.s.Set(ctxFor(t, time.Second), "w", nil))
			time.Sleep(2 * time.Second)
		}
		if changes == 0 || changes > reliefsMost {
			t.Errorf("%d changes of leader within a minute", changes)
		}
	})
}

// The logs of the leader and of a voter are full, and the leader is cut off for a while. The third one is elected meanwhile. The leader
// of before follows it, though its own log has no space yet.
func TestFullLeaderIsOvertaken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newFullness(t)
		defer c.end()
		l, f, g := c.cast["L"], c.cast["F"], c.cast["G"]
		full := []*scriptMember{f, l}
		for _, m := range full {
			m.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
			c.disks[m].free.Store(20 << 10)
			l.s.Set(ctxFor(t, 3*time.Second), "w", nil) // meets it
		}
		c.changes("full", 0, 0)
		if l.s.wal.staying.Load() == 0 {
			t.Fatal("its log does not wait")
		}
		c.obey("partition {L} {F G}")
		c.obey("elect N among F G")
		if c.cast["N"] != g {
			t.Fatal("the full one leads")
		}
		c.obey("advance 2s")
		c.obey("heal")
		eventually(t, 3*time.Second, "the leader of before follows", func() error {
			if st := l.s.Status(); st.Role != Follower || st.LeaderID != g.s.Status().ID {
				return fmt.Errorf("it is %v of term %d, and %q leads", st.Role, st.Term, st.LeaderID)
			}
			return nil
		})
		f.conf.vfs.(*faultFS).fail(setWrite, nil)
		c.disks[f].free.Store(1 << 39)
		time.Sleep(2 * time.Second)
		c.writes("one has space", time.Second, l)
		l.conf.vfs.(*faultFS).fail(setWrite, nil)
		c.disks[l].free.Store(1 << 39)
		time.Sleep(time.Second)
		c.writes("with space back", time.Second)
		c.obey("await equal")
	})
}

// A leader whose log waits for space is cut off, and raft there waits for the log: it takes itself for the leader as long as that lasts. It
// answers no linearizable read, ends writes, and steps down once it has space, also if it reaches nobody yet.
func TestFullLeaderIsCutOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newFullness(t)
		defer c.end()
		l, f, g := c.cast["L"], c.cast["F"], c.cast["G"]
		for _, m := range []*scriptMember{f, l} {
			m.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
			c.disks[m].free.Store(20 << 10)
		}
		l.s.Set(ctxFor(t, 3*time.Second), "w", nil)
		eventually(t, 3*time.Second, "the log of the leader waits", func() error {
			if l.s.wal.staying.Load() == 0 {
				l.s.batch.propose(ctxFor(t, 100*time.Millisecond), encodeOpen(l.s.batch.format(), [16]byte{1})) // is taken by a leader that refuses writes
				return errors.New("it does not")
			}
			return nil
		})
		c.obey("partition {L} {F G}")
		f.conf.vfs.(*faultFS).fail(setWrite, nil)
		c.disks[f].free.Store(1 << 39)
		c.obey("elect N among F G")
		must(t, g.s.Set(ctxFor(t, 5*time.Second), "k", []byte("new")))
		if l.s.role() != Leader {
			t.Error("raft does not wait for its log")
		}
		for range 3 {
			if v, err := l.s.Get(ctxFor(t, time.Second), "k"); err == nil {
				t.Errorf("it reads %q, and others have written", v)
			}
			began := time.Now()
			is(t, l.s.Set(ctxFor(t, 3*time.Second), "k", []byte("old")), ErrNotApplied)
			if took := time.Since(began); took > 1500*time.Millisecond {
				t.Errorf("a write there ends after %v", took)
			}
		}
		l.conf.vfs.(*faultFS).fail(setWrite, nil)
		c.disks[l].free.Store(1 << 39)
		eventually(t, 3*time.Second, "it steps down", func() error {
			if r := l.s.role(); r == Leader {
				return errors.New("it leads")
			}
			return nil
		})
		c.obey("heal")
		time.Sleep(2 * time.Second)
		c.writes("with space back", 2*time.Second)
		if v, err := l.s.Get(ctxFor(t, time.Second), "k"); string(v) != "new" {
			t.Errorf("it reads %q, %v", v, err)
		}
		c.obey("await equal")
	})
}

// A leader whose log waits for space hands over when it is asked to, and at once.
func TestHandOverWithFullLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newFullness(t)
		defer c.end()
		l := c.cast["L"]
		l.s.relief.mu.Lock()
		l.s.relief.again = time.Now().Add(time.Hour) // nothing but the request moves the lead
		l.s.relief.mu.Unlock()
		l.conf.vfs.(*faultFS).fail(setWrite, syscall.ENOSPC)
		l.s.Set(ctxFor(t, 3*time.Second), "w", nil)
		c.changes("full", 0, 0)
		if l.s.wal.staying.Load() == 0 {
			t.Fatal("its log does not wait")
		}
		began := time.Now()
		must(t, l.s.TransferLeader(ctxFor(t, 5*time.Second), ""))
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("it took %v", took)
		}
		c.changes("full", 1, 1)
		c.writes("full", time.Second, l)
		l.conf.vfs.(*faultFS).fail(setWrite, nil)
		time.Sleep(2 * time.Second)
		c.writes("with space back", time.Second)
		c.changes("with space back", 0, 0)
		c.obey("await equal")
	})
}

// A member that lags needs the state of the leader, and has too little space for that: it says so, serves what it has, and leaves the
// space to what else needs it. With room for the state once it catches up, and with more it is as any other.
func TestNoRoomForTheState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newFullness(t)
		defer c.end()
		l, f := c.cast["L"], c.cast["F"]
		c.obey("partition {L G} {F}")
		for i := range 20 {
			must(t, l.s.Set(t.Context(), fmt.Sprint("big", i), make([]byte, 100<<10)))
		}
		_, last := l.s.wal.bounds()
		must(t, cutLog(l.s, last-10))
		state, err := l.s.store.copy(t.Context())
		must(t, errors.Join(err, state.Close()))
		const some = 100 << 10
		f.s.ballast.give()
		f.s.ballast.hold(2 * some)
		held := f.s.ballast.held() // none where the file system can't promise space
		c.disks[f].free.Store(state.size - held - some)
		c.obey("heal")
		eventually(t, 15*time.Second, "a word", func() error {
			if err := f.s.faults.first(faultStateWaits); !isFull(err) || !strings.Contains(err.Error(), "can't be received: it has") {
				return fmt.Errorf("%v", err)
			}
			return nil
		})
		if v := f.s.Local().Get("k"); string(v) != "v" {
			t.Errorf("what it had is %q", v)
		}
		if left, _ := filepath.Glob(f.s.store.path + ".*"); len(left) > 0 {
			t.Error("left:", left)
		}
		c.disks[f].free.Store(state.size - held + some)
		eventually(t, 60*time.Second, "it catches up", func() error { // raft sends a state again after ten seconds at most
			if f, l := f.s.Status().AppliedIndex, l.s.Status().AppliedIndex; f < l {
				return fmt.Errorf("at %d of %d", f, l)
			}
			return nil
		})
		c.obey("await equal")
		if seat := f.s.store.seat.Load(); seat != 1 {
			t.Errorf("the state took the place of snap %d times", seat)
		}
		if f.s.ballast.held() > 0 {
			t.Error("the reserve was not given for it")
		}
		c.disks[f].free.Store(1 << 39)
		eventually(t, 5*time.Second, "no fault", f.s.Err)
		c.writes("with space back", time.Second)
		c.obey("await equal")
	})
}
