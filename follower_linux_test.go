package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// followerScript has a member join two others, write what they write, cut its log, and get two snapshots from them after it was away. It
// says which index of the log has been acknowledged while one of the others was down, so that this member's disk counted. Calls of
// the member may fail at any moment; the process must live, and every call must return.
func followerScript(t *testing.T, dir string, say func(word, key, value string)) {
	small := func(c *Config) { c.History, c.segment = 32, 16<<10 }
	c := newCluster(t, 2, small)
	m := newMember(t, c[0].conf.Addr)
	small(&m.conf)
	m.conf.Dir = dir
	must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
	say("addr", m.conf.Addr, m.conf.Join)
	// till is false if the member has failed for good, which it may.
	till := func(ok func() bool) bool {
		for end := time.Now().Add(patience); time.Now().Before(end); <-time.After(5 * time.Millisecond) {
			if ok() {
				return true
			}
			if err := m.s.Err(); err != nil && !isFull(err) {
				return false
			}
		}
		t.Errorf("it waits for ever: %+v", m.s.Status())
		return false
	}
	open := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := m.openWithin(ctx); err != nil {
			say("open", "failed", strings.ReplaceAll(err.Error(), " ", "_"))
			return false
		}
		say("open", "well", "1")
		return true
	}
	shut := func() {
		m.mu.Lock()
		s, server := m.s, m.server
		m.s, m.server = nil, nil
		m.mu.Unlock()
		closed := make(chan error, 1)
		go func() { closed <- s.Close() }()
		select {
		case err := <-closed:
			say("closed", "with", strings.ReplaceAll(fmt.Sprint(err), " ", "_"))
		case <-time.After(20 * time.Second):
			t.Error("Close does not return")
		}
		server.Close()
	}
	n := 0
	write := func(count int, down *testMember) bool {
		for range count {
			n++
			say("try", "n", strconv.Itoa(n))
			var l *testMember
			for _, o := range c {
				if o != down {
					l = o
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			err := l.s.Set(ctx, fmt.Sprint("k", n%5), []byte(fmt.Sprint(n, " ", strings.Repeat("v", (n*97)%1500))))
			cancel()
			if err != nil && down == nil {
				t.Errorf("the two others do not write: %v", err)
			}
			if err != nil {
				return false
			}
			if down != nil {
				say("ack", "log", strconv.FormatUint(l.s.Status().AppliedIndex, 10))
			}
		}
		return true
	}
	// with has one of the others down, so that nothing is acknowledged without the member.
	with := func() bool {
		down := c[0]
		if c.leader(t) == down {
			down = c[1]
		}
		down.stop()
		well := write(12, down)
		if well {
			cut := make(chan error, 1)
			go func(s *Service) { cut <- cutLog(s, 0) }(m.s) // a barrier, and raft truncates its log
			select {
			case <-cut:
			case <-time.After(time.Second): // raft's own future may never end
			}
			well = write(12, down)
		}
		down.start()
		return well
	}
	voter := func() bool {
		voters, _ := c.leader(t).counts()
		return voters == 3
	}
	well := open() && till(voter)
	if well {
		say("has", "a", "state")
		well = with()
	}
	for range 2 {
		if !well {
			break
		}
		past := m.s.Status().LastIndex
		shut()
		write(30, nil)
		c.cutLogs(t, past)
		well = open() && till(func() bool { return m.s.store.meta().installed > past }) && with()
	}
	if m.s == nil {
		return
	}
	caughtUp := func() bool {
		st, l := m.s.Status(), c.leader(t).s.Status()
		return m.s.Err() == nil && st.AppliedIndex >= l.AppliedIndex && st.Hash == l.Hash
	}
	if till(caughtUp) {
		say("well", "in", "the_end")
	} else {
		say("fault", "is", strings.ReplaceAll(fmt.Sprint(m.s.Err()), " ", "_"))
	}
	shut()
}

// judgeFollower starts the member where nobody answers it: it has what it acknowledged, and its state is one that the cluster had.
func judgeFollower(t *testing.T, dir, addr, join, what string, opened bool, acked uint64, tried int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if !opened { // it may have to join, and nobody is there
		ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
	}
	s, err := Open(ctx, Config{Dir: dir, Addr: addr, Join: join, History: 32, segment: 16 << 10, Logger: testLogger(t)})
	if err != nil {
		if opened || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), join) {
			violated(t, "%s: %v", what, err)
		}
		return
	}
	defer s.Close()
	applied, first, last := s.store.meta().applied, uint64(0), uint64(0)
	if first, last = s.wal.bounds(); max(applied, last) < acked {
		violated(t, "%s: the log of %d to %d and the state at %d do not reach %d, which was acknowledged", what, first, last, applied, acked)
	}
	if last > applied && first > applied+1 {
		violated(t, "%s: the log begins at %d and the state ends at %d", what, first, applied)
	}
	for i := max(first, applied+1); i <= last; i++ {
		if _, whole := s.wal.termAt(i); !whole {
			violated(t, "%s: entry %d of %d to %d is not whole", what, i, first, last)
		}
	}
	var has []int
	for key := range 5 {
		word, _, _ := bytes.Cut(s.Stale().Get(fmt.Sprint("k", key)), []byte(" "))
		n, _ := strconv.Atoi(string(word))
		has = append(has, n)
	}
	newest := slices.Max(has)
	for key, n := range has {
		if want := newest - (newest-key+5)%5; n != max(want, 0) || newest > tried {
			violated(t, "%s: k%d is of write %d, and the newest one is %d of %d: %v", what, key, n, newest, tried, has)
		}
	}
	eventually(t, patience, what+": the check of the file", func() error {
		if st := s.Status(); !st.Verified || s.Err() != nil {
			return fmt.Errorf("not verified: %v", s.Err())
		}
		return nil
	})
}

// TestFollowerScript is no test: it is what is traced.
func TestFollowerScript(t *testing.T) {
	dir := os.Getenv(followerEnv)
	if dir == "" {
		t.Skip("run by other tests")
	}
	followerScript(t, dir, sayer())
}
