package quorate

import (
	"context"
	"errors"
	"log/slog"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// An aheadPair is the transport of a leader "a" of term 7, whose log ends at 9, and a real door of its follower "b".
type aheadPair struct {
	t       *testing.T
	host    *door
	tr      *transport
	reached atomic.Int64 // appends that b's raft was given, and answers as was set then

	mu     sync.Mutex
	refuse bool
	hang   chan struct{} // the answers wait for it
}

func newAheadPair(t *testing.T) *aheadPair {
	t.Parallel()
	a := &aheadPair{t: t, host: doorHost()}
	follower := doorHost()
	follower.self = func() (string, string, string) { return "b", "c", "127.0.0.1:2" }
	p, _ := follower.peer(t, false, func(rpc raft.RPC) {
		a.mu.Lock()
		refuse, hang := a.refuse, a.hang
		a.mu.Unlock()
		a.reached.Add(1)
		go func() {
			if hang != nil {
				<-hang
			}
			rpc.Respond(&raft.AppendEntriesResponse{Term: 7, Success: !refuse}, nil)
		}()
	})
	srv := httptest.NewServer(p)
	t.Cleanup(srv.Close)
	a.host.announced = func(string) string { return srv.Listener.Addr().String() }
	a.host.committed = func() uint64 { return 8 }
	a.host.others = func() []raft.Server {
		return []raft.Server{{ID: "b", Suffrage: raft.Voter}, {ID: "n", Suffrage: raft.Nonvoter}}
	}
	leader := newPeer(a.host.peerHost, nil, false, slog.New(slog.DiscardHandler))
	t.Cleanup(leader.close)
	a.tr = leader.transport()
	return a
}

func commands(term uint64, indexes ...uint64) (list []*raft.Log) {
	for _, i := range indexes {
		list = append(list, &raft.Log{Index: i, Term: term, Type: raft.LogCommand, Data: []byte("data")})
	}
	return list
}

// raft sends entries as raft's replication does, and returns how many of them were covered.
func (a *aheadPair) raft(entries ...*raft.Log) int {
	a.t.Helper()
	term := entries[0].Term
	args := &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: 3, ID: []byte("a")},
		Term:      term, PrevLogEntry: entries[0].Index - 1, PrevLogTerm: term, Entries: entries,
	}
	var resp raft.AppendEntriesResponse
	must(a.t, a.tr.AppendEntries("b", "", args, &resp))
	if !resp.Success {
		return 0
	}
	return len(args.Entries)
}

func (a *aheadPair) want(what string, sent bool, wantSent bool, reached int64) {
	a.t.Helper()
	if sent != wantSent {
		a.t.Errorf("%s: sent ahead: %v", what, sent)
	}
	until(a.t, 5*time.Second, what, func() bool { return a.reached.Load() == reached }, func() any { return a.reached.Load() })
}

// newest is the early send that b got last, ended.
func (a *aheadPair) newest() *early {
	sends := a.untaken("b")
	e := sends[len(sends)-1]
	<-e.done
	return e
}

// keepFresh: however long the test waits for the processor, the answer to the early send that b got last is not too old.
func (a *aheadPair) keepFresh() {
	e := a.newest()
	e.at = e.at.Add(time.Hour)
}

func (a *aheadPair) untaken(id raft.ServerID) []*early {
	a.tr.ahead.mu.Lock()
	defer a.tr.ahead.mu.Unlock()
	return a.tr.ahead.peers[id].sends
}

func (a *aheadPair) set(refuse bool, hang chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuse, a.hang = refuse, hang
}

func TestAheadSavesTheSecondRequest(t *testing.T) {
	a := newAheadPair(t)
	a.want("nothing is known of b", a.tr.sendAhead(commands(7, 9), 7), false, 0)
	a.raft(commands(7, 9)...)
	a.tr.ahead.holds("n", &raft.AppendEntriesRequest{Term: 7, PrevLogEntry: 9})
	a.want("raft's own", a.tr.sendAhead(commands(7, 11), 7), false, 1)
	a.want("a gap", a.tr.sendAhead(commands(7, 10), 7), true, 2)
	a.keepFresh()
	a.want("before raft has asked for the first", a.tr.sendAhead(commands(7, 11, 12), 7), true, 3)
	a.keepFresh()
	a.tr.ahead.mu.Lock()
	if next := a.tr.ahead.peers["n"].next; next != 10 {
		t.Errorf("sent ahead to a non-voter: the next one is %d", next)
	}
	a.tr.ahead.mu.Unlock()
	if n := a.raft(commands(7, 10, 11, 12)...); n != 1 {
		t.Errorf("the first early send covered %d entries", n)
	}
	if n := a.raft(commands(7, 11, 12, 13)...); n != 2 {
		t.Errorf("the second early send covered %d entries", n)
	}
	a.want("two answers were used", false, false, 3)
	a.raft(commands(7, 11, 12)...)
	a.want("an answer was used twice", false, false, 4)

	hang, done := make(chan struct{}), make(chan int)
	a.set(false, hang)
	go func() { done <- a.raft(commands(7, 13)...) }()
	a.want("raft's own is under way", false, false, 5)
	a.want("beside it", a.tr.sendAhead(commands(7, 14), 7), true, 6)
	close(hang)
	a.keepFresh()
	if <-done+a.raft(commands(7, 14)...) != 2 {
		t.Error("not both were taken")
	}
	a.want("the last one was sent again", false, false, 6)
}

func TestAheadFallsBack(t *testing.T) {
	t.Run("an old answer", func(t *testing.T) {
		a := newAheadPair(t)
		a.raft(commands(7, 9)...)
		a.want("early", a.tr.sendAhead(commands(7, 10), 7), true, 2)
		e := a.newest()
		e.at = e.at.Add(-aheadFresh)
		a.raft(commands(7, 10)...)
		a.want("the old answer was used", false, false, 3)
	})
	t.Run("a refusal", func(t *testing.T) {
		a := newAheadPair(t)
		a.raft(commands(7, 9)...)
		hang := make(chan struct{})
		a.set(true, hang)
		a.want("early", a.tr.sendAhead(commands(7, 10), 7), true, 2)
		a.set(false, nil)
		go func() {
			until(t, patience, "raft waits for it", func() bool { return len(a.untaken("b")) == 0 })
			close(hang)
		}()
		if a.raft(commands(7, 10)...) != 1 {
			t.Error("raft got the refusal of an early send")
		}
		pause := func(until time.Time) (was time.Time) {
			a.tr.ahead.mu.Lock()
			defer a.tr.ahead.mu.Unlock()
			was, a.tr.ahead.peers["b"].pause = a.tr.ahead.peers["b"].pause, until
			return was
		}
		if pause(time.Now().Add(time.Hour)).IsZero() { // a busy machine may need more than the pause to come here
			t.Error("no pause after a refusal")
		}
		a.want("so soon after a refusal", a.tr.sendAhead(commands(7, 11), 7), false, 3)
		pause(time.Now())
		a.want("again", a.tr.sendAhead(commands(7, 11), 7), true, 4)
	})
	t.Run("another term", func(t *testing.T) {
		a := newAheadPair(t)
		a.raft(commands(7, 9)...)
		a.want("early", a.tr.sendAhead(commands(7, 10), 7), true, 2)
		a.newest()
		a.host.lead.Store(8)
		a.raft(commands(8, 10)...)
		a.want("an answer of the old term was used", false, false, 3)
		a.want("not leader of that term", a.tr.sendAhead(commands(7, 11), 7), false, 3)
	})
	t.Run("raft's own way", func(t *testing.T) {
		a := newAheadPair(t)
		a.raft(commands(7, 9)...)
		noop := commands(7, 10, 11)
		noop[1].Type = raft.LogNoop
		a.want("not only commands", a.tr.sendAhead(noop, 7), false, 1)
		large := commands(7, 10)
		large[0].Data = make([]byte, aheadLimit+1)
		a.want("large", a.tr.sendAhead(large, 7), false, 1)
		a.host.quiet.Store(true)
		a.want("silent", a.tr.sendAhead(commands(7, 10), 7), false, 1)
	})
	t.Run("a frozen peer", func(t *testing.T) {
		a := newAheadPair(t)
		a.raft(commands(7, 9)...)
		hang := make(chan struct{})
		a.set(false, hang)
		for i := range uint64(aheadSends) {
			a.want("early", a.tr.sendAhead(commands(7, 10+i), 7), true, int64(2+i))
		}
		a.want("one too many", a.tr.sendAhead(commands(7, 10+aheadSends), 7), false, 1+aheadSends)
		done := make(chan error, 1)
		go func() {
			args := &raft.AppendEntriesRequest{Term: 7, PrevLogEntry: 9, PrevLogTerm: 7, Entries: commands(7, 10)}
			done <- a.tr.AppendEntries("b", "", args, new(raft.AppendEntriesResponse))
		}()
		a.tr.p.close()
		if err := within(t, 5*time.Second, done); !errors.Is(err, raft.ErrTransportShutdown) {
			t.Error(err)
		}
		close(hang)
	})
}

// An append that has overtaken the one before it waits for it, and not for ever.
func TestAppendWaitsForTheOneBefore(t *testing.T) {
	t.Parallel()
	var end atomic.Uint64
	end.Store(9)
	var order []uint64 // read when all has been answered
	host := doorHost()
	host.raftEnd = end.Load
	p, reached := host.peer(t, false, func(rpc raft.RPC) {
		args := rpc.Command.(*raft.AppendEntriesRequest)
		order = append(order, args.PrevLogEntry)
		end.Store(max(end.Load(), args.PrevLogEntry+1))
		rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
	})
	tr := p.current.Load()
	tr.gap.limit = time.Minute
	take := func(prev uint64) error {
		_, err := tr.takeAppend(context.Background(), &raft.AppendEntriesRequest{Term: 7, PrevLogEntry: prev, PrevLogTerm: 7, Entries: commands(7, prev+1)})
		return err
	}
	later := make(chan error, 1)
	go func() { later <- take(10) }()
	until(t, patience, "it waits", func() bool {
		tr.gap.mu.Lock()
		defer tr.gap.mu.Unlock()
		return tr.gap.moved != nil
	})
	must(t, take(9))
	must(t, <-later)
	tr.gap.limit = gapWait
	must(t, take(99))
	if !slices.Equal(order, []uint64{9, 10, 99}) || reached.Load() != 3 {
		t.Errorf("raft got the appends after %v", order)
	}
}

// What was sent ahead and not stored may happen all the same.
func TestLogSaysWhatWasSentAhead(t *testing.T) {
	t.Parallel()
	o, disk := faultyOptions(t)
	var leads atomic.Bool
	o.leader = leads.Load
	var asked []uint64
	o.ahead = func(entries []*raft.Log, prevTerm uint64) bool {
		if len(entries[0].Extensions) == 0 || prevTerm != 1 {
			t.Errorf("entry %d without a checksum, or after one of term %d", entries[0].Index, prevTerm)
		}
		asked = append(asked, entries[0].Index)
		return true
	}
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 2)
	leads.Store(true)
	appendLog(t, l, 3, 1, 1)
	if err := l.StoreLogs([]*raft.Log{testEntry(9, 1)}); err == nil || errors.Is(err, errSentAhead) {
		t.Errorf("a gap: %v", err)
	}
	disk.fail(setWrite, syscall.ENOSPC)
	if err := l.StoreLogs([]*raft.Log{testEntry(4, 1)}); !errors.Is(err, syscall.ENOSPC) || !errors.Is(err, errSentAhead) {
		t.Errorf("the first after the disk was full: %v", err)
	}
	if err := l.StoreLogs([]*raft.Log{testEntry(4, 1)}); !errors.Is(err, syscall.ENOSPC) || errors.Is(err, errSentAhead) {
		t.Errorf("the disk is known to be full: %v", err)
	}
	disk.fail(setWrite, nil)
	must(t, l.StoreLogs([]*raft.Log{testEntry(4, 1)}))
	must(t, l.StoreLogs([]*raft.Log{testEntry(5, 1)}))
	if len(asked) != 3 || asked[0] != 3 || asked[1] != 4 || asked[2] != 5 {
		t.Errorf("asked for %v", asked)
	}
}

// A spareTable is a leader's, of term 7.
type spareTable struct {
	*aheadTable
	t       *testing.T
	callers []raft.ServerID
}

// want chooses among the voters and compares those that are spared.
func (s *spareTable) want(what string, voters string, spared string) {
	s.t.Helper()
	var list []raft.Server
	for _, id := range voters {
		list = append(list, raft.Server{ID: raft.ServerID(id), Suffrage: raft.Voter})
	}
	s.spare(list, 7, func(id raft.ServerID) bool { return slices.Contains(s.callers, id) })
	got := ""
	for _, id := range voters {
		if s.spares(raft.ServerID(id), 7) {
			got += string(id)
		}
	}
	if got != spared {
		s.t.Errorf("%s: %q of %q are spared, want %q", what, got, voters, spared)
	}
}

// answers has the members answer raft's own appends after so long.
func (s *spareTable) answers(members string, after time.Duration) {
	for range 50 {
		for _, id := range members {
			args := &raft.AppendEntriesRequest{Term: 7, PrevLogEntry: 8, Entries: commands(7, 9)}
			s.ordinary(raft.ServerID(id), args)
			time.Sleep(after)
			s.holds(raft.ServerID(id), args)
		}
	}
}

func TestMajorityIsAskedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spareTable{aheadTable: &aheadTable{}, t: t}
		s.want("nothing is known", "bc", "")
		s.answers("bcde", time.Millisecond)
		s.want("two members", "b", "")
		s.want("three", "bc", "c")
		s.want("four, and c stays", "bcd", "c")
		s.want("five", "bcde", "ce")
		s.callers = []raft.ServerID{"c"}
		s.want("c has callers", "bc", "b")
		s.callers = nil
		s.want("c is asked as before", "bc", "b")
		s.answers("b", 900*time.Microsecond)
		s.want("b is a little faster", "bc", "b")
		s.answers("b", 400*time.Microsecond)
		s.want("b is clearly faster", "bc", "c")
		s.ordinary("b", &raft.AppendEntriesRequest{Term: 7, PrevLogEntry: 9, Entries: commands(7, 10)})
		time.Sleep(answerLate + 1)
		s.want("b is late", "bc", "")
		s.answers("b", 400*time.Microsecond)
		s.want("b answers", "bc", "c")
		s.holds("b", &raft.AppendEntriesRequest{Term: 7, PrevLogEntry: 8, Entries: commands(7, 9)})
		s.want("an answer after it was forgotten", "bc", "c")
		s.forget("b", 7, 0)
		if s.spares("c", 7) {
			t.Error("b has failed, and c is still spared")
		}
		s.want("b has failed", "bc", "")
		if s.spares("b", 6) {
			t.Error("spared in a term that is over")
		}
	})
}

func TestSpareMemberIsToldLater(t *testing.T) {
	a := newAheadPair(t)
	a.raft(commands(7, 9)...)
	a.tr.ahead.mu.Lock()
	a.tr.ahead.peers["b"].spare = true
	a.tr.ahead.mu.Unlock()
	began := time.Now()
	if n := a.raft(commands(7, 10, 11)...); n != 2 || time.Since(began) < spareRest {
		t.Errorf("%d entries after %v", n, time.Since(began))
	}
	a.tr.sendAhead(commands(7, 12), 7) // b is the only other voter, and is needed
	if a.tr.ahead.spares("b", 7) {
		t.Error("the only other voter is spared")
	}
}
