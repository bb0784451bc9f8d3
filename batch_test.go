package quorate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// A wire is a batcher whose other end the test holds: it sees every entry that is sent, and answers it by hand. It lives
// in a synctest bubble, so that backoffs take no time and "nothing is sent" can be told for sure.
type wire struct {
	*batcher
	t          *testing.T
	sends      chan *sending
	moved      broadcast
	level      watermark
	leaderless atomic.Bool
	end        context.CancelFunc
	running    sync.WaitGroup
	calls      map[string]*call // of fill
}

// sending is one attempt to send an entry.
type sending struct {
	entry
	ctx   context.Context
	reply chan reply
}

type reply struct {
	o    outcome
	sent bool
	err  error
}

var errLost = errors.New("the connection broke")

func (s *sending) done(o outcome)     { s.reply <- reply{o: o, sent: true} }
func (s *sending) refuse()            { s.reply <- reply{err: ErrNoLeader} }
func (s *sending) lose()              { s.reply <- reply{sent: true, err: errLost} }
func (s *sending) gone()              { s.done(outcome{kind: outcomeGone}) }
func (s *sending) number() [2]uint64  { return [2]uint64{s.batch.session, s.batch.seq} }
func (s *sending) keys() (k []string) { return keysOf(s.batch.txs) }

// settle answers that every transaction of the batch is done.
func (s *sending) settle() {
	s.done(outcome{kind: outcomeDone, results: make([]result, len(s.batch.txs))})
}

func keysOf(txs []transaction) (keys []string) {
	for _, tx := range txs {
		keys = append(keys, tx[0].key)
	}
	return keys
}

// inBubble gives the test a batcher with an open session, number 7.
func inBubble(t *testing.T, f func(t *testing.T, l *wire)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := &wire{batcher: newBatcher(ctx), t: t, sends: make(chan *sending), end: cancel}
		l.propose, l.changed, l.noLead = l.carryOut, l.moved.wait, l.leaderless.Load
		l.format = func() uint64 { return entryFormat }
		l.applied = func(ctx context.Context, index, _ uint64) error { return l.level.wait(ctx, index) }
		l.begin = func([]byte, time.Duration) func(context.Context) (outcome, bool, error) { return nil }
		for range slots {
			l.running.Go(l.carry)
		}
		l.running.Go(l.keepSession)
		defer func() {
			l.stop(ErrClosed)
			cancel()
			l.running.Wait()
		}()
		l.openWith(7)
		f(t, l)
	})
}

func (l *wire) carryOut(ctx context.Context, data []byte) (outcome, bool, error) {
	e, err := decodeEntry(data)
	if err != nil {
		l.t.Errorf("sent %x: %v", data, err)
	}
	s := &sending{entry: e, ctx: ctx, reply: make(chan reply, 1)}
	select {
	case l.sends <- s:
	case <-ctx.Done():
		return outcome{}, false, ctx.Err()
	}
	select {
	case r := <-s.reply:
		return r.o, r.sent, r.err
	case <-ctx.Done():
		return outcome{}, true, ctx.Err()
	}
}

// openWith answers the request for a session that is due.
func (l *wire) openWith(session uint64) {
	l.t.Helper()
	s := l.next()
	if s.kind != entryOpen {
		l.t.Fatalf("sent kind %d, want a request for a session", s.kind)
	}
	s.done(outcome{kind: outcomeDone, session: session})
	synctest.Wait()
}

// next is the next entry on the wire; in the bubble a minute is nothing, and none in that time is none at all.
func (l *wire) next() *sending {
	l.t.Helper()
	select {
	case s := <-l.sends:
		return s
	case <-time.After(time.Minute):
		l.t.Fatal("nothing is sent")
		return nil
	}
}

// quiet: nothing is sent, however long one waits.
func (l *wire) quiet() {
	l.t.Helper()
	l.quietFor(time.Hour)
}

func (l *wire) quietFor(d time.Duration) {
	l.t.Helper()
	select {
	case s := <-l.sends:
		l.t.Fatalf("%v is sent with %v", s.number(), s.keys())
	case <-time.After(d):
	}
}

// A call is a submit under way.
type call struct {
	key    string
	cancel context.CancelFunc
	ended  chan struct{}
	res    result
	err    error
}

func (l *wire) set(key string) *call {
	return l.submitOp(op{kind: opSet, key: key, value: []byte("v")})
}

// submitOp returns when the transaction waits or is on its way.
func (l *wire) submitOp(o op) *call {
	ctx, cancel := context.WithCancel(context.Background())
	c := &call{key: o.key, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		c.res, c.err = l.submit(ctx, transaction{o})
	}()
	synctest.Wait()
	return c
}

// verdict waits for the call's end and checks what its error is: nil, ErrNotApplied or ErrUncertain, and never two of them.
func (c *call) verdict(t *testing.T, want error) {
	t.Helper()
	select {
	case <-c.ended:
	case <-time.After(time.Minute):
		t.Fatalf("the write of %s has no answer", c.key)
	}
	defer c.cancel()
	if want == nil {
		if c.err != nil {
			t.Fatalf("the write of %s: %v", c.key, c.err)
		}
		return
	}
	other := ErrUncertain
	if want == ErrUncertain {
		other = ErrNotApplied
	}
	if !errors.Is(c.err, want) || errors.Is(c.err, other) {
		t.Fatalf("the write of %s: error %v, want %v", c.key, c.err, want)
	}
}

func (c *call) pending(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case <-c.ended:
		t.Fatalf("the write of %s has an answer already: %v", c.key, c.err)
	default:
	}
}

func TestWaitingWritesTravelTogether(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		a := l.set("a")
		first := l.next()
		b := l.set("b")
		second := l.next()
		var waiting []*call
		for i := range 100 {
			waiting = append(waiting, l.set(fmt.Sprintf("k%02d", i)))
		}
		first.settle()
		a.verdict(t, nil)
		third := l.next()
		if len(third.batch.txs) != 100 || third.keys()[0] != "k00" || third.keys()[99] != "k99" {
			t.Errorf("the third batch has %v, want all hundred in their order", third.keys())
		}
		third.done(outcome{kind: outcomeDone, results: append(make([]result, 99), result{status: txUnsatisfied, revision: 9})})
		for _, c := range waiting {
			c.verdict(t, nil)
		}
		if waiting[99].res.status != txUnsatisfied || waiting[98].res.status != txDone {
			t.Error("the answers went to the wrong callers")
		}
		second.settle()
		b.verdict(t, nil)
		synctest.Wait() // the slot may still gather
		if !l.empty() {
			t.Error("everybody has an answer and the batcher is not empty")
		}
	})
}

func TestBatchLimits(t *testing.T) {
	t.Run("number", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			calls, sent := l.fill(t)
			for i := range maxTransactions + 10 {
				calls = append(calls, l.set(fmt.Sprint("k", i)))
			}
			l.drainAll(t, calls, sent, []int{maxTransactions, 10})
		})
	})
	t.Run("bytes", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			calls, sent := l.fill(t)
			value := make([]byte, 100<<10)
			for i := range 7 {
				calls = append(calls, l.submitOp(op{kind: opSet, key: fmt.Sprint("k", i), value: value}))
			}
			l.drainAll(t, calls, sent, []int{5, 2})
		})
	})
	t.Run("a larger one travels alone", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			calls, sent := l.fill(t)
			calls = append(calls, l.set("small"), l.submitOp(op{kind: opSet, key: "large", value: make([]byte, maxBatch+1)}), l.set("small too"))
			l.drainAll(t, calls, sent, []int{1, 1, 1})
		})
	})
}

// What a batch leaves in the queue must not wait for that batch, though nobody else comes.
func TestTheRestGoesOutBesideASlowBatch(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		first := l.set("first")
		sent := l.next()
		l.mu.Lock()
		l.gathering = true // so that nothing but the end of this batch moves the queue
		l.mu.Unlock()
		calls := []*call{first}
		for i := range slots {
			calls = append(calls, l.submitOp(op{kind: opSet, key: fmt.Sprint("k", i), value: make([]byte, maxBatch)}))
		}
		l.mu.Lock()
		l.gathering = false
		l.mu.Unlock()
		sent.settle()
		var slow []*sending
		for range slots {
			slow = append(slow, l.next())
		}
		for _, s := range slow {
			s.settle()
		}
		for _, c := range calls {
			c.verdict(t, nil)
		}
	})
}

// fill takes every slot, so that what comes next has to wait.
func (l *wire) fill(t *testing.T) (calls []*call, sent []*sending) {
	l.calls = make(map[string]*call)
	for i := range slots {
		c := l.set(fmt.Sprint("first", i))
		l.calls[c.key] = c
		calls = append(calls, c)
		sent = append(sent, l.next())
	}
	return calls, sent
}

// drainAll answers everything and checks how many transactions each of the batches that follow has.
func (l *wire) drainAll(t *testing.T, calls []*call, sent []*sending, want []int) {
	t.Helper()
	for _, s := range sent {
		s.settle()
	}
	var got []int
	for range want {
		s := l.next()
		got = append(got, len(s.batch.txs))
		s.settle()
	}
	for _, c := range calls {
		c.verdict(t, nil)
	}
	// With two slots the batches may be met in either order.
	count := map[int]int{}
	for i := range want {
		count[want[i]]++
		count[got[i]]--
	}
	for _, n := range count {
		if n != 0 {
			t.Fatalf("batches of %v transactions, want %v", got, want)
		}
	}
}

func TestResendUntilSettled(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		c := l.set("k")
		first := l.next()
		first.lose()
		for range 3 {
			s := l.next()
			if s.number() != first.number() || s.batch.sum != first.batch.sum {
				t.Fatalf("sent again as %v with sum %x, first as %v with %x", s.number(), s.batch.sum, first.number(), first.batch.sum)
			}
			c.pending(t)
			s.lose()
		}
		l.next().settle()
		c.verdict(t, nil)
		l.quiet()
	})
}

func TestResendAtOnceToNewLeader(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		c := l.set("k")
		for range 10 { // the backoff is at its longest now
			l.next().refuse()
		}
		synctest.Wait()
		began := time.Now()
		l.moved.notify()
		s := l.next()
		if d := time.Since(began); d != 0 {
			t.Errorf("sent %v after the leader changed", d)
		}
		s.settle()
		c.verdict(t, nil)
	})
}

func TestVerdictWhenCallerLeaves(t *testing.T) {
	t.Run("after a send that may have arrived", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next().lose()
			l.next().refuse() // a later refusal proves nothing about the first send
			synctest.Wait()
			c.cancel()
			c.verdict(t, ErrUncertain)
			l.fence(1).settle()
			l.quiet()
		})
	})
	t.Run("while a send is under way", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			s := l.next()
			c.cancel()
			c.verdict(t, ErrUncertain)
			l.fence(1).settle()
			<-s.ctx.Done()
			l.quiet()
		})
	})
	t.Run("when every send was refused", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c, d := l.set("first"), (*call)(nil)
			s := l.next()
			d = l.set("second")
			l.next().refuse()
			s.refuse()
			synctest.Wait()
			c.cancel()
			c.verdict(t, ErrNotApplied)
			if errors.Is(c.err, ErrNoLeader) || !errors.Is(c.err, context.Canceled) {
				t.Errorf("error %v: a leader is known, and the caller left", c.err)
			}
			s = l.next()
			if s.keys()[0] != "second" {
				t.Errorf("sent %v: its caller was told that it is not applied", s.keys())
			}
			s.settle()
			d.verdict(t, nil)
			l.quiet()
		})
	})
	t.Run("when no leader is known", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			l.leaderless.Store(true)
			c := l.set("k")
			l.next().refuse()
			synctest.Wait()
			c.cancel()
			c.verdict(t, ErrNotApplied)
			if !errors.Is(c.err, ErrNoLeader) {
				t.Errorf("error %v does not say that there is no leader", c.err)
			}
		})
	})
	t.Run("while it waits in the queue", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			c, d := l.set("left"), l.set("stayed")
			c.cancel()
			c.verdict(t, ErrNotApplied)
			for _, s := range sent {
				s.settle()
			}
			s := l.next()
			if strings.Join(s.keys(), " ") != "stayed" {
				t.Errorf("sent %v", s.keys())
			}
			s.settle()
			d.verdict(t, nil)
		})
	})
	t.Run("before it came", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err := l.submit(ctx, transaction{{kind: opDelete, key: "k"}})
			if !errors.Is(err, ErrNotApplied) || !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
			l.quiet()
		})
	})
}

// fence is the next entry on the wire, which carries nothing but that every batch up to this one is settled.
func (l *wire) fence(acked uint64) *sending {
	l.t.Helper()
	s := l.next()
	if len(s.batch.txs) != 0 || s.batch.acked != acked || s.batch.seq <= acked {
		l.t.Fatalf("batch %d with %v says that all up to %d are settled, want an empty one and %d", s.batch.seq, s.keys(), s.batch.acked, acked)
	}
	return s
}

// leave has the caller give up.
func (c *call) leave(t *testing.T, want error) {
	t.Helper()
	c.cancel()
	c.verdict(t, want)
}

func TestGivenUp(t *testing.T) {
	t.Run("one waits and 63 have left", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			var calls []*call
			for i := range 64 {
				calls = append(calls, l.set(fmt.Sprint("k", i)))
			}
			sent[0].settle()
			sent[1].settle()
			s := l.next()
			for _, c := range calls[1:] {
				c.leave(t, ErrUncertain)
			}
			s.lose()
			for range 5 {
				again := l.next()
				if again.number() != s.number() || again.batch.sum != s.batch.sum {
					t.Fatalf("sent %v with %v, want what was sent before", again.number(), again.keys())
				}
				again.lose()
			}
			later := l.set("later") // could be undone by one of those that were left, if it overtook them
			l.next().settle()
			calls[0].verdict(t, nil)
			s = l.next()
			s.settle()
			later.verdict(t, nil)
			l.quiet()
		})
	})
	t.Run("the next batch passes it", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			waits := l.set("waits")
			for _, s := range sent {
				s.lose()
			}
			first, second := l.next(), l.next()
			if first.batch.seq != 1 {
				first, second = second, first
			}
			l.calls["first0"].leave(t, ErrUncertain)
			l.quietFor(sendAfter)
			s := l.next()
			if s.batch.acked != 1 || strings.Join(s.keys(), " ") != "waits" {
				t.Errorf("sent %v with acked %d", s.keys(), s.batch.acked)
			}
			s.settle()
			waits.verdict(t, nil)
			second.settle()
			l.quiet()
		})
	})
	t.Run("an older one is not settled yet", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			l.calls["first1"].leave(t, ErrUncertain)
			later := l.set("later")
			sent[0].lose()
			again := l.next()
			if again.batch.seq != 1 {
				t.Fatalf("sent %v, which does not pass batch 2", again.keys())
			}
			later.pending(t)
			again.settle()
			s := l.next()
			if s.batch.acked != 2 || strings.Join(s.keys(), " ") != "later" {
				t.Errorf("sent %v with acked %d, want later with 2", s.keys(), s.batch.acked)
			}
			s.settle()
			later.verdict(t, nil)
			l.quiet()
		})
	})
	t.Run("a log that does not commit gets few entries", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("first")
			l.next()
			d := l.set("second")
			l.next()
			c.leave(t, ErrUncertain)
			d.leave(t, ErrUncertain)
			l.fence(2) // nobody was waiting
			for i := range 20 {
				e := l.set(fmt.Sprint("k", i))
				l.quietFor(time.Second)
				e.leave(t, ErrNotApplied)
			}
		})
	})
	t.Run("the batch that passes it is given up too", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, _ = l.fill(t)
			h := l.set("h")
			l.calls["first0"].leave(t, ErrUncertain)
			if s := l.next(); strings.Join(s.keys(), " ") != "h" {
				t.Fatalf("sent %v", s.keys())
			}
			i := l.set("i")
			h.leave(t, ErrUncertain)
			l.calls["first1"].leave(t, ErrUncertain)
			s := l.fence(3)
			i.pending(t)
			s.settle()
			s = l.next()
			if s.batch.acked != 4 || strings.Join(s.keys(), " ") != "i" {
				t.Errorf("sent %v with acked %d", s.keys(), s.batch.acked)
			}
			s.settle()
			i.verdict(t, nil)
			l.quiet()
			_, _ = l.fill(t) // and the next time it is as if nothing had been
			m := l.set("m")
			l.calls["first0"].leave(t, ErrUncertain)
			if s = l.next(); strings.Join(s.keys(), " ") != "m" {
				t.Errorf("sent %v, want a batch that passes what was given up and carries what waits", s.keys())
			}
			s.settle()
			m.verdict(t, nil)
		})
	})
	t.Run("its session is gone", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			sent[0].gone()
			l.openWith(8)
			l.calls["first1"].leave(t, ErrUncertain)
			s := l.next()
			if s.batch.session != 8 || strings.Join(s.keys(), " ") != "first0" {
				t.Errorf("sent %v in session %d", s.keys(), s.batch.session)
			}
			s.settle()
			l.quiet()
		})
	})
	t.Run("its fence meets the end of the session", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next()
			c.leave(t, ErrUncertain)
			l.fence(1).gone()
			l.openWith(8)
			l.quiet()
		})
	})
	t.Run("its fence goes out at once", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next()
			time.Sleep(slotAfter)
			began := time.Now()
			c.leave(t, ErrUncertain)
			l.fence(1).settle()
			if d := time.Since(began); d != 0 {
				t.Errorf("sent %v after the caller has left", d)
			}
		})
	})
	t.Run("the answer to a batch that does not pass it", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			l.calls["first0"].leave(t, ErrUncertain)
			sent[1].settle()
			l.calls["first1"].verdict(t, nil)
			l.fence(2).settle()
			l.quiet()
		})
	})
	t.Run("its session was gone long before", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			sent[0].gone()
			l.openWith(8)
			l.next().settle()
			l.calls["first0"].verdict(t, nil)
			l.calls["first1"].leave(t, ErrUncertain)
			l.quiet()
		})
	})
	t.Run("the refused batch goes without those who were told that it is uncertain", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			a, b := l.set("a"), l.set("b")
			sent[0].settle()
			s := l.next()
			a.leave(t, ErrUncertain)
			s.refuse()
			if s = l.next(); strings.Join(s.keys(), " ") != "b" {
				t.Errorf("sent %v", s.keys())
			}
			s.settle()
			b.verdict(t, nil)
			sent[1].settle()
			l.quiet()
		})
	})
	t.Run("a closed member sends nothing", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next().lose()
			l.next().lose()
			synctest.Wait()
			c.leave(t, ErrUncertain)
			pass := l.next() // what gives the batch up
			l.stop(ErrClosed)
			pass.lose()
			l.quiet()
		})
	})
}

// One of two transactions of a refused batch is taken out; the other one goes on under the same number.
func TestRefusedBatchWithoutTheOneWhoLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		_, sent := l.fill(t)
		a, b := l.set("a"), l.set("b")
		sent[0].settle()
		s := l.next()
		s.refuse()
		synctest.Wait()
		a.cancel()
		a.verdict(t, ErrNotApplied)
		again := l.next()
		if again.number() != s.number() || strings.Join(again.keys(), " ") != "b" {
			t.Errorf("%v with %v, want %v with b", again.number(), again.keys(), s.number())
		}
		again.done(outcome{kind: outcomeDone, results: []result{{revision: 42}}})
		b.verdict(t, nil)
		if b.res.revision != 42 {
			t.Errorf("b got revision %d, the answer says 42", b.res.revision)
		}
		sent[1].settle()
	})
}

func TestSessionGone(t *testing.T) {
	t.Run("a batch that had no effect goes into the next session", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next().gone()
			l.openWith(8)
			s := l.next()
			if s.batch.session != 8 || s.keys()[0] != "k" {
				t.Errorf("sent in session %d: %v", s.batch.session, s.keys())
			}
			s.settle()
			c.verdict(t, nil)
			if d := l.set("later"); l.next().batch.session != 8 {
				d.cancel()
				t.Error("a later write went into the session that is gone")
			}
		})
	})
	t.Run("a batch that may have had an effect is uncertain", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next().lose()
			l.next().gone()
			c.verdict(t, ErrUncertain)
			l.openWith(8)
			l.quiet()
		})
	})
	t.Run("they go back in front of those that wait", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			l.set("late")
			sent[0].gone()
			sent[1].gone()
			synctest.Wait()
			l.openWith(8)
			s := l.next()
			if len(s.batch.txs) != 3 || s.keys()[2] != "late" {
				t.Errorf("sent %v, want the two that were first, then late", s.keys())
			}
			s.settle()
		})
	})
	t.Run("a caller leaves while there is none", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next().gone()
			s := l.next() // the request for a new session, not answered
			c.cancel()
			c.verdict(t, ErrNotApplied)
			if l.open() {
				t.Error("open without a session")
			}
			s.done(outcome{kind: outcomeDone, session: 8})
			l.quiet()
		})
	})
}

// The state forgets answers up to acked, so acked must not pass a batch that still needs its own.
func TestAckedStopsAtTheOldestUnsettled(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		l.set("a")
		one := l.next()
		acked := func(key string, want uint64) *sending {
			t.Helper()
			l.set(key)
			s := l.next()
			if s.batch.acked != want {
				t.Errorf("batch %d says that all up to %d are settled, want %d", s.batch.seq, s.batch.acked, want)
			}
			return s
		}
		acked("b", 0).settle()
		synctest.Wait()
		acked("c", 0).settle()
		synctest.Wait()
		one.lose()
		one = l.next()
		if one.batch.seq != 1 || one.batch.acked != 0 {
			t.Errorf("batch %d sent again with acked %d", one.batch.seq, one.batch.acked)
		}
		one.settle()
		synctest.Wait()
		acked("d", 3).settle()
	})
}

// A write returns when this member has applied it, and not merely when the leader has answered.
func TestAnswerWaitsForOwnApply(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		c := l.set("k")
		l.next().done(outcome{kind: outcomeDone, index: 5, results: make([]result, 1)})
		c.pending(t)
		l.level.advance(5)
		c.verdict(t, nil)
	})
}

func TestOwnApplyAnswersFirst(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		c := l.set("k")
		s := l.next()
		l.deliver(6, 1, outcome{kind: outcomeDone, results: make([]result, 1)}) // of somebody else's session
		c.pending(t)
		l.deliver(7, 1, outcome{kind: outcomeDone, results: []result{{revision: 3}}})
		c.verdict(t, nil)
		if c.res.revision != 3 {
			t.Errorf("revision %d, want 3", c.res.revision)
		}
		<-s.ctx.Done() // the answer of the leader is not waited for, or the slot would be lost
		l.quiet()
		if !l.empty() {
			t.Error("the slot is still taken")
		}
	})
}

// Raft may leave a future without an answer for ever. The write has its answer from apply, and the slot must not wait.
func TestSlotSurvivesUnansweredFuture(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		silent := true
		l.begin = func(data []byte, _ time.Duration) func(context.Context) (outcome, bool, error) {
			if !silent {
				return nil
			}
			return func(ctx context.Context) (outcome, bool, error) {
				<-ctx.Done()
				return outcome{}, true, ctx.Err()
			}
		}
		for i := range slots {
			c := l.set(fmt.Sprint("k", i))
			time.Sleep(2 * slotAfter) // the second batch waits so long for the first
			synctest.Wait()
			l.deliver(7, uint64(i+1), outcome{kind: outcomeDone, results: make([]result, 1)})
			c.verdict(t, nil)
		}
		silent = false
		c := l.set("next")
		l.next().settle()
		c.verdict(t, nil)
	})
}

func TestWrongNumberOfAnswers(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		c := l.set("k")
		l.next().done(outcome{kind: outcomeDone, results: make([]result, 2)})
		c.verdict(t, ErrUncertain)
	})
}

func TestStopAnswersEverybody(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		onWire := l.set("on the wire")
		l.next()
		refused := l.set("refused")
		l.next().refuse()
		waiting := l.set("waiting")
		l.refuse(ErrClosed)
		l.set("late").verdict(t, ErrNotApplied)
		waiting.pending(t)
		l.stop(ErrClosed)
		onWire.verdict(t, ErrUncertain)
		refused.verdict(t, ErrNotApplied)
		waiting.verdict(t, ErrNotApplied)
		for _, c := range []*call{onWire, refused, waiting} {
			if !errors.Is(c.err, ErrClosed) {
				t.Errorf("%s: error %v does not say why", c.key, c.err)
			}
		}
		l.stop(ErrClosed)
		l.end()
	})
}

// The last send was refused, and an earlier one may be in the log.
func TestStopBetweenSends(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		c := l.set("k")
		l.next().lose()
		l.next().refuse()
		synctest.Wait()
		l.stop(ErrClosed)
		c.verdict(t, ErrUncertain)
		l.end()
	})
}

// refuseForGood answers that the leader takes no writes.
func (s *sending) refuseForGood() {
	s.reply <- reply{err: fmt.Errorf("%w: its disk is full", errRefused)}
}

func TestLeaderThatTakesNoWrites(t *testing.T) {
	t.Run("an earlier send may have arrived", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			waits := l.set("waits")
			sent[1].settle()
			s := l.next()
			s.lose()
			l.next().refuseForGood() // proves nothing about the first send
			waits.pending(t)
			l.next().settle()
			waits.verdict(t, nil)
			sent[0].settle()
		})
	})
	t.Run("who waits behind it, in the queue or for room in it", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			_, sent := l.fill(t)
			var calls []*call
			for i := range 5 { // the last one waits for room
				calls = append(calls, l.submitOp(op{kind: opSet, key: fmt.Sprint("k", i), value: make([]byte, queueBytes/4-16)}))
			}
			sent[0].lose()
			l.next().refuseForGood()
			for _, c := range calls {
				if c.verdict(t, ErrNotApplied); !errors.Is(c.err, errRefused) {
					t.Errorf("%s: %v", c.key, c.err)
				}
			}
		})
	})
	t.Run("it refuses a fence", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *wire) {
			c := l.set("k")
			l.next()
			c.leave(t, ErrUncertain)
			for range 3 {
				s := l.fence(1)
				s.refuseForGood()
				synctest.Wait()
				l.quietFor(resendMin - 1) // no new one at once, and again
			}
			l.fence(1).settle()
			l.quiet()
		})
	})
}

// Whoever waits for room in the queue is told of the close, although nobody makes room any more.
func TestStopTellsWhoWaitsForRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		l.fill(t)
		var calls []*call
		for i := range 5 {
			calls = append(calls, l.submitOp(op{kind: opSet, key: fmt.Sprint("k", i), value: make([]byte, queueBytes/4-16)}))
		}
		l.refuse(ErrClosed)
		calls[4].verdict(t, ErrNotApplied)
		if !errors.Is(calls[4].err, ErrClosed) {
			t.Error(calls[4].err)
		}
		calls[3].pending(t)
	})
}

// Every member keeps the answers of all batches behind the oldest that is not settled: they are few.
func TestWindowBehindTheOldest(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		oldest := l.set("oldest")
		s := l.next()
		for i := range window - 1 {
			time.Sleep(slotAfter)
			c := l.set(fmt.Sprint("k", i))
			l.next().settle()
			c.verdict(t, nil)
		}
		time.Sleep(slotAfter)
		waits := l.set("waits")
		l.quiet()
		s.settle()
		oldest.verdict(t, nil)
		l.next().settle()
		waits.verdict(t, nil)
	})
}

// A batch that is too large for the way is not made into others if it may be in the log: its first transactions would have an effect twice.
func TestUncertainBatchIsNotSplit(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		l.most = func() int { return maxBatch }
		_, sent := l.fill(t)
		a, b := l.set("a"), l.set("b")
		sent[0].settle()
		s := l.next()
		l.mu.Lock()
		l.most = func() int { return 1 }
		l.mu.Unlock()
		s.lose()
		again := l.next()
		again.reply <- reply{err: &foreignAnswer{status: http.StatusRequestEntityTooLarge}}
		if again = l.next(); again.number() != s.number() || again.batch.sum != s.batch.sum {
			t.Errorf("sent %v with %v, want the batch as it was", again.number(), again.keys())
		}
		again.settle()
		a.verdict(t, nil)
		b.verdict(t, nil)
		sent[1].settle()
	})
}

// Close waits for what was accepted, so that must still be sent.
func TestRefuseSendsWhatWasAccepted(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		calls, sent := l.fill(t)
		calls = append(calls, l.set("waiting"))
		l.refuse(ErrClosed)
		l.set("late").verdict(t, ErrNotApplied)
		l.drainAll(t, calls, sent, []int{1})
		synctest.Wait()
		if !l.empty() {
			t.Error("the batcher is not empty")
		}
	})
}

func TestFullQueue(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		_, sent := l.fill(t)
		large := func(key string) *call {
			return l.submitOp(op{kind: opSet, key: key, value: make([]byte, queueBytes/4)})
		}
		for i := range 3 {
			large(fmt.Sprint("k", i))
		}
		waits, leaves := large("waits"), large("leaves")
		leaves.cancel()
		leaves.verdict(t, ErrNotApplied)
		waits.pending(t)
		sent[0].settle()
		for range 4 {
			l.next().settle()
		}
		waits.verdict(t, nil)
		sent[1].settle()
		l.quiet()
	})
}

// Without a majority callers come, wait and leave for hours, and must not leave a full queue behind.
func TestThoseWhoLeftTakeNoRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		first := l.set("first")
		l.next().gone()
		s := l.next() // the request for a new session, which waits for a leader
		l.leaderless.Store(true)
		for i := range 50 {
			c := l.submitOp(op{kind: opSet, key: fmt.Sprint("k", i), value: make([]byte, queueBytes/10)})
			c.cancel()
			c.verdict(t, ErrNotApplied)
			if strings.Contains(c.err.Error(), "full") || !errors.Is(c.err, ErrNoLeader) {
				t.Fatalf("the write of k%d: %v", i, c.err)
			}
		}
		last := l.set("last")
		s.done(outcome{kind: outcomeDone, session: 8})
		s = l.next()
		if strings.Join(s.keys(), " ") != "first last" {
			t.Errorf("sent %v", s.keys())
		}
		s.settle()
		first.verdict(t, nil)
		last.verdict(t, nil)
		if l.bytes != 0 || l.left != 0 || len(l.queue) != 0 {
			t.Errorf("the queue counts %d bytes and %d who left, and has %d", l.bytes, l.left, len(l.queue))
		}
	})
}

// Callers that give up on a full queue come and go for as long as there is no majority.
func TestFullQueueForgetsThoseWhoGiveUp(t *testing.T) {
	inBubble(t, func(t *testing.T, l *wire) {
		l.fill(t)
		for i := range 4 {
			l.submitOp(op{kind: opSet, key: fmt.Sprint("k", i), value: make([]byte, queueBytes/4-16)})
		}
		objects := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapObjects
		}
		tx := transaction{{kind: opDelete, key: strings.Repeat("k", 100)}}
		before := objects()
		for range 20_000 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
			_, err := l.submit(ctx, tx)
			cancel()
			if !errors.Is(err, ErrNotApplied) || !strings.Contains(err.Error(), "full") {
				t.Fatal(err)
			}
		}
		if after := objects(); after > before+5000 {
			t.Errorf("%d objects are left behind by 20,000 callers that gave up", after-before)
		}
	})
}

// What a batch means when raft's log holds it more than once, or late: the real state machine answers.
func TestBatchTakesEffectOnce(t *testing.T) {
	f, apply := newTestFSM(t)
	session := apply(encodeOpen(firstFormat, [16]byte{1})).session
	insert := func(session, seq, acked uint64, key string) []byte {
		return encodeEntry(batchOf(session, seq, acked, transaction{{kind: opIfNotExists, key: key}, {kind: opSet, key: key, value: []byte("v")}}))
	}
	expect := func(words string, o outcome, kind outcomeKind, status txStatus, revision uint64) {
		t.Helper()
		if o.kind != kind {
			t.Fatalf("%s: outcome %d, want %d", words, o.kind, kind)
		}
		if kind == outcomeDone && (len(o.results) != 1 || o.results[0].status != status || o.results[0].revision != revision) {
			t.Fatalf("%s: %+v, want status %d, revision %d", words, o.results, status, revision)
		}
		if r := f.store.meta().revision; kind != outcomeDone && r != revision {
			t.Fatalf("%s: revision %d, want %d", words, r, revision)
		}
	}
	expect("the first", apply(insert(session, 1, 0, "a")), outcomeDone, txDone, 1)
	expect("the same again does not meet itself", apply(insert(session, 1, 0, "a")), outcomeDone, txDone, 1)
	expect("another insert of the key", apply(insert(session, 3, 0, "a")), outcomeDone, txUnsatisfied, 1)
	expect("an older number, later", apply(insert(session, 2, 0, "b")), outcomeDone, txDone, 2)
	expect("and that again, with the same body and a newer acked", apply(insert(session, 2, 1, "b")), outcomeDone, txDone, 2)
	expect("one that its sender had settled", apply(insert(session, 1, 1, "a")), outcomeStale, 0, 2)
	expect("the refused one again", apply(insert(session, 3, 1, "a")), outcomeDone, txUnsatisfied, 1)
	for i := range maxSessions {
		apply(encodeOpen(firstFormat, [16]byte{2, byte(i), byte(i >> 8)}))
	}
	expect("after its session was evicted", apply(insert(session, 2, 1, "c")), outcomeGone, 0, 2)
	if _, ok, _ := f.store.get("c"); ok {
		t.Error("a batch of an evicted session had an effect")
	}
}

// newTestFSM is a state machine on a file of its own, and a function that applies the next entry.
func newTestFSM(t *testing.T) (*fsm, func(data []byte) outcome) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	st, err := openStore(storeOptions{path: filepath.Join(t.TempDir(), "snap"), memory: 1 << 20, log: log})
	must(t, err)
	t.Cleanup(func() { st.close() })
	f, err := newFSM(st, log)
	must(t, err)
	index := uint64(0)
	return f, func(data []byte) outcome {
		t.Helper()
		index++
		o, ok := f.Apply(&raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: data}).(outcome)
		if !ok {
			t.Fatalf("apply gave no outcome for entry %d", index)
		}
		return o
	}
}

// Three times a follower is cut off for eight seconds, and its callers give up on writes that were on their way. Nothing of that
// may turn up afterwards, over what others have written and were told is done.
func TestAbandonedWritesStayAway(t *testing.T) {
	for _, cut := range []string{"both ways", "to the leader", "from the leader"} {
		t.Run(cut, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { abandonThreeTimes(t, cut) })
		})
	}
}

func abandonThreeTimes(t *testing.T, cut string) {
	c := newScript(t)
	c.change = func(c *Config) { c.segment = 16 << 10 }
	defer c.end()
	for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3"} {
		c.obey(line)
	}
	wrong, given := 0, 0
	for round := range 3 {
		c.obey("cast leader L followers F G")
		l, f, g := c.member("L"), c.member("F"), c.member("G")
		if cut != "from the leader" {
			c.net.cut(f.conf.Addr, l.conf.Addr)
		}
		if cut != "to the leader" {
			c.net.cut(l.conf.Addr, f.conf.Addr)
		}
		var callers sync.WaitGroup
		for i := range 4 {
			callers.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i)*time.Second)
				defer cancel()
				if err := f.s.Set(ctx, fmt.Sprint("k", i), []byte("old")); errors.Is(err, ErrUncertain) {
					given++ // one at a time: each has another limit
				}
			})
		}
		callers.Wait()
		time.Sleep(200 * time.Millisecond)
		for i := range 4 {
			must(t, g.s.Set(t.Context(), fmt.Sprint("k", i), fmt.Append(nil, "new ", round)))
		}
		time.Sleep(8*time.Second - 4200*time.Millisecond)
		c.obey("heal")
		time.Sleep(5 * time.Second)
		for i := range 4 {
			got, err := g.s.Get(t.Context(), fmt.Sprint("k", i))
			must(t, err)
			if string(got) != fmt.Sprint("new ", round) {
				wrong++
			}
		}
		must(t, f.s.Set(t.Context(), "still", []byte("alive")))
	}
	if wrong > 0 || given == 0 {
		t.Errorf("%d values are those of writes that were given up long before, of %d that were uncertain", wrong, given)
	}
}
