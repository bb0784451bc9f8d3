package quorate

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Another cluster's calls to this address, and what may follow from them.

// A forger is what answers at an address that a call has named. It counts who asks.
type forger struct {
	mu     sync.Mutex // guards the fields below
	answer http.HandlerFunc
	asked  []time.Time
	open   int // questions that are being answered
	most   int
}

func (f *forger) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	f.mu.Lock()
	f.asked = append(f.asked, time.Now())
	f.open++
	f.most = max(f.most, f.open)
	answer := f.answer
	f.mu.Unlock()
	answer(w, req)
	f.mu.Lock()
	f.open--
	f.mu.Unlock()
}

func (f *forger) answers(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = h
}

func (f *forger) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked)
}

// statusOf answers as a member of this status would.
func statusOf(a statusAnswer, more string) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		setHeaders(w.Header(), headerProtocol, "1", headerCluster, a.Cluster, headerFrom, a.ID)
		w.Write(append(asJSON(a), more...))
	}
}

// callAs sends what a member of another cluster sends, from an address.
func (c *script) callAs(m *scriptMember, cluster, fromAddr string) {
	c.t.Helper()
	_, r := send(m.s, http.MethodPost, "/raft/append", nil, map[string]string{headerCluster: cluster, headerFrom: newID(), headerFromAddr: fromAddr})
	if r == nil || r.Code != codeWrongCluster {
		c.t.Fatalf("a call of another cluster: %v", r)
	}
}

// refusesCallers: this member refuses writes, linearizable reads and Ready at once, and says why in Err.
func (c *script) refusesCallers(m *scriptMember) error {
	began := time.Now()
	set := m.s.Set(c.t.Context(), "k", nil)
	_, get := m.s.Get(c.t.Context(), "k")
	ready, err := m.s.Ready(ctxFor(c.t, time.Millisecond)), m.s.Err()
	if !errors.Is(set, ErrNotApplied) || get == nil || ready == nil || err == nil || time.Since(began) > 10*time.Millisecond {
		return fmt.Errorf("Set %v, Get %v, Ready %v, Err %v after %v", set, get, ready, err, time.Since(began))
	}
	if !strings.Contains(ready.Error(), err.Error()) {
		return fmt.Errorf("Ready says %v, Err %v", ready, err)
	}
	return nil
}

func (c *script) serves(m *scriptMember) error {
	_, get := m.s.Get(c.t.Context(), "k")
	return errors.Join(m.s.Set(c.t.Context(), "k", nil), get, m.s.Ready(ctxFor(c.t, time.Second)), m.s.Err())
}

const forgedAddr = "forger.test:7001"

// Only a whole proof is believed, and one that somebody else's answer lacks in one point is none.
func TestStrangerNeedsProof(t *testing.T) {
	t.Parallel()
	other := newID()
	proof := func(change func(*statusAnswer)) statusAnswer {
		a := statusAnswer{ID: newID(), Cluster: other, Addr: forgedAddr, Confirmed: 1000,
			Members: []memberAddr{{ID: newID(), Addr: forgedAddr, Voter: true}, {ID: newID(), Addr: "a.test:7001", Voter: true}}}
		if change != nil {
			change(&a)
		}
		return a
	}
	for name, x := range map[string]struct {
		proves bool
		answer http.HandlerFunc
	}{
		"whole":              {true, statusOf(proof(nil), "")},
		"of an old release":  {false, statusOf(proof(func(a *statusAnswer) { a.Confirmed = 0 }), "")},
		"confirmed long ago": {false, statusOf(proof(func(a *statusAnswer) { a.Confirmed = 1001 }), "")},
		"confirmed later":    {false, statusOf(proof(func(a *statusAnswer) { a.Confirmed = -1 }), "")},
		"no such member":     {false, statusOf(proof(func(a *statusAnswer) { a.Members = a.Members[:1] }), "")},
		"no cluster":         {false, statusOf(proof(func(a *statusAnswer) { a.Cluster = "" }), "")},
		"64 KiB":             {true, statusOf(proof(nil), strings.Repeat(" ", maxStatusBody-1000))},
		"more than 64 KiB":   {false, statusOf(proof(nil), strings.Repeat(" ", maxStatusBody))},
		"no member answers": {false, func(w http.ResponseWriter, _ *http.Request) {
			w.Write(asJSON(proof(nil)))
		}},
		"a redirect to one": {false, func(w http.ResponseWriter, req *http.Request) {
			http.Redirect(w, req, "http://true.test:7001/raft/status", http.StatusFound)
		}},
		"refused": {false, func(w http.ResponseWriter, _ *http.Request) {
			setHeaders(w.Header(), headerProtocol, "1")
			w.WriteHeader(http.StatusServiceUnavailable)
			w.Write(asJSON(refusal{Code: codeNotReady}))
		}},
		"none": {false, func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newScript(t)
				defer c.end()
				c.obey("start a")
				a := c.member("a")
				f := &forger{answer: x.answer}
				c.net.serve(forgedAddr, f)
				c.net.serve("true.test:7001", statusOf(proof(nil), ""))
				must(t, c.serves(a))
				c.callAs(a, other, forgedAddr)
				time.Sleep(3 * time.Second)
				if f.count() == 0 {
					t.Error("nobody asked back")
				}
				if x.proves {
					must(t, c.refusesCallers(a))
				} else {
					must(t, c.serves(a))
				}
			})
		})
	}
	t.Run("of this very cluster", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			c := newScript(t)
			defer c.end()
			c.obey("start a")
			a := c.member("a")
			c.net.serve(forgedAddr, statusOf(proof(func(s *statusAnswer) { s.Cluster = a.s.Status().Cluster }), ""))
			c.callAs(a, other, forgedAddr)
			c.callAs(a, other, a.conf.Addr)
			time.Sleep(3 * time.Second)
			must(t, c.serves(a))
		})
	})
}

// The fault ends when the cluster has removed the address, or 15 s after the last proof.
func TestStrangerEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.obey("start a")
		a := c.member("a")
		must(t, c.serves(a))
		proof := statusAnswer{ID: newID(), Cluster: newID(), Confirmed: 1, Members: []memberAddr{{ID: newID(), Addr: a.conf.Addr}}}
		removed := proof
		removed.Members = []memberAddr{{ID: newID(), Addr: forgedAddr}}
		old := removed
		old.Confirmed = 0
		foreign := removed
		foreign.Cluster = newID()
		f := &forger{answer: statusOf(proof, "")}
		c.net.serve(forgedAddr, f)
		strike := func() {
			f.answers(statusOf(proof, ""))
			c.callAs(a, proof.Cluster, forgedAddr)
			time.Sleep(2 * time.Second)
			must(t, c.refusesCallers(a))
		}
		strike()
		time.Sleep(time.Minute) // nobody calls any more, and the cluster still has the address
		must(t, c.refusesCallers(a))
		f.answers(statusOf(removed, ""))
		time.Sleep(2 * time.Second)
		must(t, c.serves(a))
		for what, answer := range map[string]http.HandlerFunc{
			"nobody confirms": statusOf(old, ""), "another cluster answers": statusOf(foreign, ""), "nobody answers": func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() },
		} {
			strike()
			f.answers(answer)
			time.Sleep(13 * time.Second)
			if err := c.refusesCallers(a); err != nil {
				t.Errorf("%s, 13 s later: %v", what, err)
			}
			time.Sleep(5 * time.Second)
			if err := c.serves(a); err != nil {
				t.Errorf("%s, 18 s later: %v", what, err)
			}
		}
	})
}

// Whatever arrives, this member asks back once a second, one at a time, where a host and a port are named, and a true hint among
// invented ones is found.
func TestStrangersFlood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.obey("start a")
		a := c.member("a")
		must(t, c.serves(a))
		f := &forger{answer: func(w http.ResponseWriter, req *http.Request) {
			time.Sleep(100 * time.Millisecond)
			http.NotFound(w, req)
		}}
		flood := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
				for i := range 5 {
					c.callAs(a, newID(), fmt.Sprintf("n%d.test:7001", i+int(time.Now().UnixMilli())%200))
				}
				c.callAs(a, newID(), "http://evil.test:7001/x?y=")
				c.callAs(a, newID(), "evil.test")
			}
		}
		for i := range 205 {
			c.net.serve(fmt.Sprintf("n%d.test:7001", i), f)
		}
		c.net.serve("evil.test:7001", f)
		flood(20 * time.Second)
		must(t, c.serves(a))
		if f.most != 1 || len(f.asked) < 10 || len(f.asked) > 20 {
			t.Errorf("asked %d times, %d at once", len(f.asked), f.most)
		}
		for i := range f.asked[1:] {
			if d := f.asked[i+1].Sub(f.asked[i]); d < strangerPause {
				t.Errorf("asked again after %v", d)
			}
		}
		f.answers(http.NotFound)
		c.net.serve(forgedAddr, statusOf(statusAnswer{ID: newID(), Cluster: newID(), Confirmed: 1, Members: []memberAddr{{Addr: a.conf.Addr}}}, ""))
		ctx := ctxFor(t, 5*time.Minute)
		for a.s.Err() == nil && ctx.Err() == nil {
			flood(100 * time.Millisecond)
			c.callAs(a, newID(), forgedAddr)
		}
		must(t, c.refusesCallers(a))
	})
}

// A real cluster whose first member has lost its directory and was started as at the very first time. The fault is there within
// seconds, and over when that cluster has removed the address; and the members of that cluster believe no such thing of themselves.
func TestWipedMemberRefusesItsCallers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "kill a"} {
			c.obey(line)
		}
		a, b := c.member("a"), c.member("b")
		must(t, os.RemoveAll(a.conf.Dir))
		c.obey("restart a")
		time.Sleep(4 * time.Second)
		must(t, c.refusesCallers(a))
		for _, word := range []string{"cluster " + shortID(b.s.Status().Cluster), "RemoveMember", "bootURL"} {
			if !strings.Contains(a.s.Err().Error(), word) {
				t.Errorf("Err is %v, without %q", a.s.Err(), word)
			}
		}
		c.obey("set b k v")
		must(t, b.s.Err())
		c.obey("remove b a")
		time.Sleep(3 * time.Second)
		must(t, c.serves(a))
		c.obey("stop a")
		must(t, os.RemoveAll(a.conf.Dir))
		must(t, b.s.AddAllowedMember(t.Context(), a.conf.Addr))
		a.conf.Join = b.conf.Addr
		c.obey("restart a")
		c.obey("await voters 3")
		for range 3 { // members of several clusters call each other for a while, with no effect
			c.callAs(b, newID(), "a.test:7001")
			time.Sleep(time.Second)
		}
		must(t, c.serves(b))
	})
}

// A cluster without a quorum proves nothing: its members may be the ones that are cut off.
func TestStrangerWithoutQuorum(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "kill a", "kill b"} {
			c.obey(line)
		}
		a := c.member("a")
		must(t, os.RemoveAll(a.conf.Dir))
		log := newLogged("gives no proof")
		a.conf.Logger = slog.New(log)
		c.obey("restart a")
		time.Sleep(10 * time.Second)
		must(t, c.serves(a))
		if n := len(log.all()); n != 1 {
			t.Errorf("%d warnings of hints without proof", n)
		}
		c.obey("restart b")
		time.Sleep(5 * time.Second)
		must(t, c.refusesCallers(a))
	})
}

// What Restore made goes on, and says once that the old cluster still has its address.
func TestStrangerOfRestored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "set a k v", "await equal", "stop a"} {
			c.obey(line)
		}
		a := c.member("a")
		old := a.conf.Dir
		a.conf.Dir += "-restored"
		must(t, Restore(a.conf.Dir, old+"/snap"))
		log := newLogged("was restored")
		a.conf.Logger = slog.New(log)
		for range 2 {
			c.obey("restart a")
			time.Sleep(20 * time.Second)
			must(t, c.serves(a))
			c.obey("stop a")
		}
		if n := len(log.all()); n != 2 {
			t.Errorf("%d warnings in two runs, want one each", n)
		}
	})
}
