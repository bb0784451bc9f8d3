package quorate

// How much space the file system has left, and what this member holds of it in reserve, so that what others have committed can still
// be stored and applied when the disk is full. It owns the limit below which a member is unfit to lead, and the file wal/reserve. It
// never decides what an entry or a flush does about a full disk: logstore.go and fsm.go give the reserve back when they meet one.
// Control comes from Open, watchSpace and Close.
//
// A member below the limit takes no new writes as a leader. So what still comes is in flight already, at most some batches, and the
// reserve is there for that. The reserve is made again when there is space for it and the limit both.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	spaceLow    = 64 << 20       // bytes of free space below which a member is unfit to lead, or
	spaceShare  = 16             // this part of the file system, if that is less, but
	spaceLeast  = 2 * logSegment // are needed for the log to go on, on a file system that has four times as much
	spaceTight  = logSegment     // more than the limit: with less free space the log behind the state is kept as short as it can be
	spaceSlack  = 16             // this part of the limit more has to be free before it is fit again
	spaceLook   = time.Second
	spaceOften  = 250 * time.Millisecond // while there is too little
	probeFalse  = 5 * time.Second        // a log that is full again within this time after a probe is probed more and more rarely, up to every
	probeMost   = 32 * time.Second
	trialFresh  = 250 * time.Millisecond
	trialLimit  = 500 * time.Millisecond // for the answer to a leader, which waits for probeTimeout
	reserveName = "reserve"
)

// A diskSpace is what a file system has, in bytes. total is 0 where that can't be told.
type diskSpace struct{ free, total int64 }

// low is the limit.
func (d diskSpace) low() int64 {
	return min(spaceLow, max(d.total/spaceShare, min(spaceLeast, d.total/4)))
}

// tight: what this member can do without should go, before others must lead.
func (d diskSpace) tight() bool { return d.total > 0 && d.free < d.low()+spaceTight }

// A ballast is a file that takes up space until something more important needs it.
type ballast struct {
	path string
	log  *slog.Logger

	mu     sync.Mutex // guards the file and the fields below, over the I/O
	size   int64      // of the file; 0 = there is none
	unable bool       // the file system can't promise space
	closed bool
}

func newBallast(dir string, log *slog.Logger) *ballast {
	b := &ballast{path: filepath.Join(dir, reserveName), log: log}
	if info, err := os.Stat(b.path); err == nil { // of a life that was killed
		b.size = info.Size()
	}
	return b
}

// missing is what hold would take from the free space.
func (b *ballast) missing(size int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.unable || b.size > 0 {
		return 0
	}
	return size
}

func (b *ballast) held() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.size
}

// hold makes the file, unless it is there.
func (b *ballast) hold(size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size > 0 || b.unable || b.closed || size == 0 {
		return
	}
	f, err := os.OpenFile(b.path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err == nil {
		err = errors.Join(uninterrupted(func() error { return allocate(f, size) }), f.Close())
	}
	if err == nil {
		b.size = size
		return
	}
	os.Remove(b.path)
	b.unable = !passing(err) && !errors.Is(err, syscall.EINTR)
	b.log.Debug("no space is held in reserve", "file", b.path, "error", err)
}

// uninterrupted tries again what a signal has interrupted, which says nothing about the file system.
func uninterrupted(f func() error) error {
	err := f()
	for n := 0; n < 100 && errors.Is(err, syscall.EINTR); n++ {
		err = f()
	}
	return err
}

// give removes the file. False: there was none.
func (b *ballast) give() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.giveLocked()
}

func (b *ballast) giveLocked() bool {
	if b.size == 0 {
		return false
	}
	b.size = 0
	return os.Remove(b.path) == nil
}

// close is give, for good.
func (b *ballast) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.giveLocked()
}

// judgeSpace is the fault of a file system with too little space; was is the one that is there.
func judgeSpace(dir string, d diskSpace, missing int64, was error) error {
	low := d.low()
	limit := low + missing
	if was != nil {
		limit += low / spaceSlack
	}
	if d.total == 0 || d.free >= limit {
		return nil
	}
	if was != nil {
		return was
	}
	return fmt.Errorf("the file system of %s has %s left: below %s this member leads only where no other can, and then takes no writes: "+
		"free space, or give it a larger one", dir, mebibytes(d.free), mebibytes(limit))
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// checkSpace looks at the file system, and takes the reserve when there is room for it. free tells whether there was enough.
func (s *Service) checkSpace() (free bool) {
	d := s.conf.space(s.conf.Dir)
	reserve := d.low() / 2
	err := judgeSpace(s.conf.Dir, d, s.ballast.missing(reserve), s.faults.first(faultSpace))
	if err == nil && s.faults.first(faultLogWaits, faultStateWaits) == nil {
		s.ballast.hold(reserve)
	}
	s.faults.set(faultSpace, err)
	return err == nil
}

// noteSpace is the first look, before this member takes part.
func (s *Service) noteSpace() {
	d := s.conf.space(s.conf.Dir)
	s.faults.set(faultSpace, judgeSpace(s.conf.Dir, d, s.ballast.missing(d.low()/2), nil))
}

// watchSpace looks once a second, and more often while the disk is full. What nothing else would notice while no write is taken is
// that the log has space again: it is tried out.
func (s *Service) watchSpace() {
	var probes probing
	for pause := spaceLook; ; {
		select {
		case <-time.After(pause):
		case <-s.ctx.Done():
			return
		}
		pause = spaceLook
		free := s.checkSpace()
		full := isFull(s.wal.failed())
		if probes.due(full) && free {
			s.wal.probe()
			probes.tried(s.wal.failed() == nil)
		}
		if !free || full {
			pause = spaceOften
		}
	}
}

// A probing says when a full log is probed. A probe can succeed where no append does, for something else takes the space in between, and
// each time the fault goes and comes again: so that becomes rare.
type probing struct {
	full   bool // as of the last look
	passed time.Time
	pause  time.Duration
	next   time.Time // not before
}

// due takes whether the log is full now.
func (p *probing) due(full bool) bool {
	if full && !p.full {
		switch {
		case p.passed.IsZero() || time.Since(p.passed) > probeFalse:
			p.pause = 0
		default:
			p.pause = min(max(2*p.pause, spaceLook), probeMost)
		}
		p.next = time.Now().Add(p.pause)
	}
	p.full = full
	return full && !time.Now().Before(p.next)
}

// tried takes what became of a probe.
func (p *probing) tried(passed bool) {
	if passed {
		p.passed, p.full = time.Now(), false
	}
}

// A trial is the newest attempt to find out whether the log takes an entry. It serves all who ask within a moment, for anybody may ask.
type trial struct {
	mu    sync.Mutex // guards the fields below
	began time.Time
	ended chan struct{} // closed when err is there; nil = there was none yet
	err   error
}

// begin begins the attempt unless one is going on or began a moment ago; ended is closed when that has an outcome.
func (t *trial) begin(attempt func() error) (ended chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ended = t.ended
	if ended == nil || isClosed(ended) && time.Since(t.began) > trialFresh {
		ended = make(chan struct{})
		t.began, t.ended = time.Now(), ended
		go func() {
			err := attempt()
			t.mu.Lock()
			defer t.mu.Unlock()
			t.err = err
			close(ended)
		}()
	}
	return ended
}

// outcome is that of attempt, or of one that began a moment ago. ctx ends the wait for it alone.
func (t *trial) outcome(ctx context.Context, attempt func() error) error {
	ended := t.begin(attempt)
	select {
	case <-ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// tryLog says why this member's log takes no entry now. What is known may be nothing where none was appended: then it is tried out.
func (s *Service) tryLog(ctx context.Context) error {
	if err := s.faults.first(faultLogWaits); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, trialLimit)
	defer cancel()
	return s.trial.outcome(ctx, s.wal.trySmall)
}

// roomFor says why a state of so many bytes can't be received: it takes its size once, beside the one that is there. The reserve is given
// for it.
func (s *Service) roomFor(size int64) error {
	d := s.conf.space(s.conf.Dir)
	if d.total == 0 || d.free >= size {
		return nil
	}
	d.free += s.ballast.held()
	if d.free < size {
		err := fmt.Errorf("it has %s, and the file system of %s has %s left: free space, or give it a larger one: %w", mebibytes(size), s.conf.Dir, mebibytes(d.free), syscall.ENOSPC)
		s.faults.ofApply(unreceived(err)) // and the reserve stays, which would not do
		return err
	}
	s.spaceNeeded()
	return nil
}

// spaceNeeded gives the reserve back to a log or a state that has met a full disk. True: trying again is worth it.
func (s *Service) spaceNeeded() bool {
	if !s.ballast.give() {
		return false
	}
	s.log.Warn("the disk is full: the space held in reserve is given back", "file", s.ballast.path)
	return true
}
