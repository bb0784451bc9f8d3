//go:build unix

package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// This version beside the first release: the program of testdata/release/member, built from that one's source.

// buildRelease builds that program with the library of an earlier version.
func buildRelease(t *testing.T, version string) (program string) {
	t.Helper()
	archive, err := filepath.Abs(filepath.Join("testdata", "release", version+".tar.gz"))
	must(t, err)
	dir := t.TempDir()
	run := func(dir, name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOWORK=off", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
	run(dir, "tar", "xzf", archive)
	source := filepath.Join(dir, "quorate")
	must(t, os.CopyFS(filepath.Join(source, "member"), os.DirFS(filepath.Join("testdata", "release", "member"))))
	program = filepath.Join(dir, "program")
	run(source, "go", "build", "-o", program, "./member")
	return program
}

func TestBesideTheFirstRelease(t *testing.T) {
	t.Parallel()
	program := buildRelease(t, "v0.1.0")
	t.Run("every fact", func(t *testing.T) { everyFact(t, program) })
	t.Run("unfit leaders", func(t *testing.T) { unfitLeaders(t, program) })
	t.Run("upgrade", func(t *testing.T) { rollingUpgrade(t, program) })
	t.Run("founders", func(t *testing.T) { foundersBeside(t, program) })
	t.Run("going back in the first format", func(t *testing.T) { goingBackInTime(t, program) })
	t.Run("restored in the first format", func(t *testing.T) { restoredForTheFirst(t, program) })
	t.Run("without a vote", func(t *testing.T) { voteless(t, program) })
	t.Run("going back meanwhile", func(t *testing.T) { goingBackMeanwhile(t, program) })
	t.Run("going back too late", func(t *testing.T) { goingBackTooLate(t, program) })
}

// rollingUpgrade upgrades one member after another, while clients write and read on all of them.
func rollingUpgrade(t *testing.T, program string) {
	list := newProcesses(t, func(p *process) { p.program = program })
	c := make(testCluster, len(list))
	up := make([]atomic.Pointer[Service], len(list)) // what the clients see
	h := newFirstHistory()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	do := func(i int) func(order) (report, error) {
		return func(o order) (report, error) {
			if s := up[i].Load(); s != nil {
				return obey(s, o), nil
			}
			return list[i].do(o)
		}
	}
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() { h.run(ctx, t, i, do(i%3), 5*time.Millisecond) })
	}
	log := newLogged("keeps the cluster")
	for i, p := range list {
		p.stop()
		l := new(line)
		c[i] = &testMember{t: t, line: l, conf: Config{Dir: p.dir, Addr: p.addr, Client: newClient(t, l), Logger: slog.New(log)}}
		t.Cleanup(c[i].stop)
		up[i].Store(c[i].start())
		must(t, c[i].s.Ready(ctxFor(t, patience)))
		passesBatches(t, c[i].s)
		switch i {
		case 0:
			checkFirstFormat(t, c[i], list[1:])
			checkOthers(t, c[i], list[1:])
		case 1:
			oneOfUsLeads(t, c[:2], list[2])
			eventually(t, patience, "that the leader has looked", func() error {
				if texts := log.all(); !slices.ContainsFunc(texts, func(text string) bool {
					return strings.Contains(text, list[2].addr) && strings.Contains(text, "reads up to format 1")
				}) {
					return fmt.Errorf("the log says %q", texts)
				}
				return nil
			})
			checkFirstFormat(t, c[i], list[2:])
			checkOthers(t, c[0], list[2:])
			checkOthers(t, c[1], list[2:])
			handOverBeside(t, c[:2], list[2])
		}
	}
	eventually(t, patience, "the new format", func() error {
		for _, m := range c {
			if at := m.s.store.meta().format; at != historyFormat {
				return fmt.Errorf("%s is at format %d", m.conf.Addr, at)
			}
		}
		return nil
	})
	eventually(t, patience, "writes in the new format", func() error {
		if m := c[0].s.store.meta(); m.revision-m.oldest() < 20 {
			return fmt.Errorf("the history has %d changes", m.revision-m.oldest())
		}
		return nil
	})
	cancel()
	clients.Wait()
	must(t, c[0].s.Set(ctxFor(t, patience), "last", nil))
	c.awaitEqual(t)
	rows := sqlite3(t, "-readonly", c[0].snap(), "select * from history")
	for i, m := range c {
		if got := sqlite3(t, "-readonly", m.snap(), "select * from history"); got != rows {
			t.Errorf("the history of member %d is\n%s\nand that of the first\n%s", i, got, rows)
		}
	}
	for key := range h.keys {
		h.make(t, 99, do(0), asked{op: "get", key: key})
	}
	h.check(t, nil)
}

// passesBatches sends what a member sends when callers have left: a batch that may have no transactions, and says that those before it
// are settled. The leader and the others, of whatever release, take it.
func passesBatches(t *testing.T, s *Service) {
	t.Helper()
	b := s.batch
	eventually(t, patience, "a first write", func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.session == 0 || b.seq == 0 {
			return fmt.Errorf("session %d, batch %d", b.session, b.seq)
		}
		b.dropped, b.bare = b.seq, true
		if f := b.takeLocked(); f != nil {
			b.work <- f
		}
		return nil
	})
	eventually(t, patience, "batches that are passed", func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.passed < b.dropped {
			return fmt.Errorf("up to %d, want %d", b.passed, b.dropped)
		}
		return nil
	})
}

// oneOfUsLeads stops the last member of the first release until another one leads.
func oneOfUsLeads(t *testing.T, c testCluster, last *process) {
	t.Helper()
	leads := func() error {
		for _, m := range c {
			if m.s.Status().Role == Leader {
				return nil
			}
		}
		return errors.New("none of them does")
	}
	if leads() == nil {
		return
	}
	last.freeze()
	defer last.thaw()
	eventually(t, 4*patience, "one of this version to lead", leads)
}

// handOverBeside: a leader of this version hands over to a member of the first release, which does not say whether it is fit, and is
// told by one that leads that it can't be asked.
func handOverBeside(t *testing.T, c testCluster, old *process) {
	t.Helper()
	eventually(t, patience, "the first release to lead", func() error {
		return c[1].s.TransferLeader(ctxFor(t, patience), old.addr)
	})
	is(t, c[0].s.TransferLeader(ctxFor(t, patience), c[0].conf.Addr), ErrNotApplied, "release", old.addr)
	oneOfUsLeads(t, c, old)
}

// checkFirstFormat: the state is at the first format, and what that version did not know works all the same on this one.
func checkFirstFormat(t *testing.T, m *testMember, older []*process) {
	t.Helper()
	ctx := ctxFor(t, patience)
	if at := m.s.store.meta().format; at != firstFormat {
		t.Errorf("format %d with members of the first release", at)
	}
	if got := sqlite3(t, "-readonly", m.snap(), "pragma user_version; select count(*) from sqlite_schema where name = 'history'"); got != "1\n0" {
		t.Errorf("version and number of histories are %q", got)
	}
	prefix := m.conf.Addr + "/"
	tx := []Op{IfNotExists(prefix + "x"), Set(prefix+"x", []byte("1")), Set(prefix+"y", []byte("2"))}
	revision, err := m.s.Exec(ctx, tx...)
	must(t, err)
	if _, err := m.s.Exec(ctx, tx...); !errors.Is(err, ErrUnsatisfied) {
		t.Errorf("the same again: %v", err)
	}
	var got []Entry
	for e, err := range m.s.List(ctx, prefix) {
		must(t, err)
		got = append(got, e)
	}
	want := []Entry{{prefix + "x", []byte("1"), revision - 1, revision - 1}, {prefix + "y", []byte("2"), revision, revision}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the list is %v, want %v", got, want)
	}
	var seen []string
	for e, err := range m.s.Watch(ctx, prefix, 0) {
		must(t, err)
		if seen = append(seen, fmt.Sprint(e.Kind, " ", strings.TrimPrefix(e.Entry.Key, prefix))); e.Kind == EventDelete {
			break
		} else if e.Kind == EventSynced {
			must(t, m.s.Delete(ctx, prefix+"x"))
		}
	}
	if want := []string{fmt.Sprint(EventReset, " "), fmt.Sprint(EventSet, " x"), fmt.Sprint(EventSet, " y"), fmt.Sprint(EventSynced, " "), fmt.Sprint(EventDelete, " x")}; !slices.Equal(seen, want) {
		t.Errorf("watched %q, want %q", seen, want)
	}
	for _, p := range older {
		if v := p.must(order{Op: "get", Key: prefix + "y"}).Value; string(v) != "2" {
			t.Errorf("%s, of the first release, reads %q", p.addr, v)
		}
	}
}

// checkOthers: this version learns of members of the first release, whichever leads, what it learns of its own; that they say nothing of
// their calls is held against nobody.
func checkOthers(t *testing.T, m *testMember, older []*process) {
	t.Helper()
	eventually(t, patience, "a call to each", func() error {
		st := m.s.Status()
		for _, o := range st.Members {
			if !slices.ContainsFunc(older, func(p *process) bool { return p.addr == o.Addr }) {
				continue
			}
			if r := m.s.reach.of(o.ID); r.answered.IsZero() || o.LastError != "" || !o.FailingSince.IsZero() || (st.Role == Leader) != (o.Lag >= 0) {
				return fmt.Errorf("%v says of a member of the first release %+v, %+v", st.Role, o, r)
			}
			if st.Role == Leader && !strings.HasPrefix(st.FormatHeldBy, o.Addr) {
				return fmt.Errorf("format %d is held by %q", st.Format, st.FormatHeldBy)
			}
		}
		return m.s.unreached()
	})
}

// foundersBeside: a member of the first release is no founder, and is named as the one that is missing. Beside the cluster that comes
// of the others, and as its leader, it lets in a founder that was wiped; and what it calls proves nothing to one that is a stranger.
func foundersBeside(t *testing.T, program string) {
	c := testCluster{newMember(t, ""), newMember(t, ""), newMember(t, "")}
	third := c[2]
	old := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: third.conf.Addr, join: c[0].conf.Addr, program: program, client: third.conf.Client}
	t.Cleanup(old.stop)
	for _, m := range c {
		older(&m.conf)
		for _, founder := range c {
			m.conf.Bootstrap = append(m.conf.Bootstrap, founder.conf.Addr)
		}
	}
	old.launch()
	c[0].start()
	c[1].start()
	is(t, c[0].s.Ready(ctxFor(t, 2*time.Second)), context.DeadlineExceeded, "the founders wait", old.addr+" is silent")
	must(t, c[0].s.Err())
	old.kill()
	third.start()
	c.awaitVoters(t, 3)

	old = &process{t: t, dir: old.dir + "2", addr: freeAddr(t), join: c[0].conf.Addr, program: program, client: third.conf.Client}
	t.Cleanup(old.stop)
	must(t, c[1].s.AddAllowedMember(ctxFor(t, patience), old.addr))
	old.start()
	old.awaitReady()
	c.awaitVoters(t, 4)
	eventually(t, patience, "the first release to lead", func() error { return c.leader(t).s.TransferLeader(ctxFor(t, patience), old.addr) })
	must(t, c[0].s.Set(ctxFor(t, patience), "k", []byte("v")))
	third.stop()
	must(t, os.RemoveAll(third.conf.Dir))
	third.start()
	must(t, third.s.Ready(ctxFor(t, patience)))
	if v, err := third.s.Get(ctxFor(t, patience), "k"); string(v) != "v" || err != nil || third.s.held() {
		t.Errorf("a wiped founder reads %q, %v", v, err)
	}
	if r := old.must(order{Op: "status"}).Status; r.Role != Leader {
		t.Logf("meanwhile the leadership has gone to %s", r.LeaderAddr)
	}
	third.stop()
	must(t, os.RemoveAll(third.conf.Dir))
	bootstrap, log := third.conf.Bootstrap, newLogged("gives no proof")
	third.conf.Bootstrap, third.conf.Logger = nil, slog.New(log)
	third.start()
	eventually(t, patience, "a hint without proof, or a proof", func() error {
		if len(log.all()) == 0 && third.s.Err() == nil {
			return errors.New("neither")
		}
		return nil
	})
	// The others call too, and those of this version have a proof, whoever leads.
	if _, _, err := third.s.askBack(old.addr); err == nil || strings.Contains(fmt.Sprint(third.s.Err()), old.addr) {
		t.Errorf("proved by the first release: %v, %v", err, third.s.Err())
	}
	third.stop()
	third.conf.Bootstrap = bootstrap
}

// goingBackInTime: at the first format the state of this version is what the first release takes for its own, as a snapshot that
// it receives and as a directory that it opens.
func goingBackInTime(t *testing.T, program string) {
	c := newCluster(t, 1, older)
	m := c[0]
	_, err := m.s.Exec(t.Context(), Set("j", []byte("1")), Set("k", []byte("2")))
	must(t, err)
	c.cutLogs(t, m.s.Status().AppliedIndex)
	joiner := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), join: m.conf.Addr, program: program, client: m.conf.Client}
	t.Cleanup(joiner.stop)
	must(t, m.s.AddAllowedMember(t.Context(), joiner.addr))
	joiner.start()
	joiner.awaitReady()
	c.awaitVoters(t, 2)
	m.stop()
	back := &process{t: t, dir: m.conf.Dir, addr: m.conf.Addr, program: program, client: m.conf.Client}
	t.Cleanup(back.stop)
	back.start()
	for _, p := range []*process{joiner, back} {
		p.awaitReady()
		if v := p.must(order{Op: "get", Key: "k"}).Value; string(v) != "2" {
			t.Errorf("%s reads %q", p.addr, v)
		}
		p.must(order{Op: "set", Key: "k", Value: []byte("2")})
		p.must(order{Op: "err"})
	}
	// The state went to the earlier release in one request, and comes back in one: both its leaders have no log from the beginning.
	m = newMember(t, joiner.addr)
	back.must(order{Op: "allow", Key: m.conf.Addr})
	m.start()
	testCluster{m}.awaitMember(t, m)
	if v, err := m.s.Get(t.Context(), "k"); err != nil || string(v) != "2" {
		t.Errorf("the new one reads %q, %v", v, err)
	}
	if first, _ := m.s.wal.bounds(); first == 1 { // 0 = it has received no entry after the state yet
		t.Error("it was sent entries from the first on, and no state")
	}
	awaitEqualProcesses(t, []*process{joiner, back})
}

// goingBackMeanwhile: a member that said that it reads the next format, and went back before it had applied the raise, gives no answer
// at all, for it would pass over what it can't read. Upgraded again, it goes on.
func goingBackMeanwhile(t *testing.T, program string) {
	c := newCluster(t, 3, older)
	must(t, c[0].s.Set(ctxFor(t, patience), "k", []byte("1")))
	c.awaitEqual(t)
	m := c.follower(t)
	m.stop()
	for _, o := range c { // or the one that applies the raise first would refuse the other
		if o != m {
			o.stop()
			o.conf.format = 0
			o.start()
		}
	}
	l := c.leader(t)
	must(t, l.s.Ready(ctxFor(t, patience)))
	l.s.proposeRaise(historyFormat, 100)
	must(t, l.s.Set(ctxFor(t, patience), "k", []byte("2")))
	back := &process{t: t, dir: m.conf.Dir, addr: m.conf.Addr, program: program, client: m.conf.Client}
	t.Cleanup(back.stop)
	back.start()
	r, err := back.do(order{Op: "get", Key: "k", Timeout: time.Second})
	if must(t, err); r.Verdict == "ok" {
		t.Errorf("the first release reads %q", r.Value)
	}
	back.stop()
	m.conf.format = 0
	wantGet(t, m.start(), "k", []byte("2"))
	c.awaitEqual(t)
}

// goingBackTooLate: what this version has written since is not for the first release, whose errors say so and change nothing.
func goingBackTooLate(t *testing.T, program string) {
	c := newCluster(t, 1)
	must(t, c[0].s.Set(t.Context(), "k", []byte("v")))
	refused := func(dir, addr, join string, words ...string) {
		t.Helper()
		cmd := exec.CommandContext(ctxFor(t, patience), program, "-dir", dir, "-addr", addr, "-join", join)
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("it opens %s", dir)
		}
		for _, w := range append(words, ErrFormat.Error()) {
			if !bytes.Contains(out, []byte(w)) {
				t.Errorf("%q does not say %q", out, w)
			}
		}
	}
	addr := freeAddr(t)
	must(t, c[0].s.AddAllowedMember(t.Context(), addr))
	refused(filepath.Join(t.TempDir(), "data"), addr, c[0].conf.Addr, "format 2", "reads up to 1", "upgrade it")
	if n := len(c[0].s.Status().Members); n != 1 {
		t.Errorf("%d members", n)
	}
	c[0].stop()
	snap, err := os.ReadFile(c[0].snap())
	must(t, err)
	refused(c[0].conf.Dir, c[0].conf.Addr, "", "version 2")
	if after, err := os.ReadFile(c[0].snap()); err != nil || !bytes.Equal(snap, after) {
		t.Errorf("the refused start changed snap: %v", err)
	}
	wantGet(t, c[0].start(), "k", []byte("v"))
}

// restoredForTheFirst: what Restore makes of a state of the first format is a directory of the first release, and of this version after it.
func restoredForTheFirst(t *testing.T, program string) {
	m := newMember(t, "")
	older(&m.conf)
	must(t, m.start().Set(t.Context(), "k", []byte("v")))
	m.stop()
	dir := filepath.Join(t.TempDir(), "restored")
	must(t, Restore(dir, m.snap()))
	back := &process{t: t, dir: dir, addr: m.conf.Addr, program: program, client: m.conf.Client}
	t.Cleanup(back.stop)
	back.start()
	back.awaitReady()
	if v := back.must(order{Op: "get", Key: "k"}).Value; string(v) != "v" {
		t.Errorf("the first release reads %q", v)
	}
	back.must(order{Op: "set", Key: "l", Value: []byte("w")})
	back.must(order{Op: "err"})
	back.stop()
	m.conf.Dir, m.conf.format = dir, 0
	s := m.start()
	wantGet(t, s, "k", []byte("v"))
	wantGet(t, s, "l", []byte("w"))
	if e, err := s.Lookup(t.Context(), "l"); err != nil || e.Version <= 1<<40 {
		t.Errorf("the first release went on at %+v, %v", e, err)
	}
}

// voteless: why a member has no vote is known where one of this version leads. A leader of the first release does not say it, and the
// member works beside it all the same.
func voteless(t *testing.T, program string) {
	m := newMember(t, "")
	older(&m.conf)
	m.start()
	old := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), join: m.conf.Addr, program: program, client: m.conf.Client}
	t.Cleanup(old.stop)
	join := func() *testMember {
		n := newMember(t, m.conf.Addr)
		older(&n.conf)
		must(t, m.s.AddAllowedMember(ctxFor(t, patience), n.conf.Addr))
		n.start()
		return n
	}
	must(t, m.s.AddAllowedMember(ctxFor(t, patience), old.addr))
	old.start()
	old.awaitReady()
	down := join()
	testCluster{m, down}.awaitVoters(t, 3)
	eventually(t, patience, "the first release to lead", func() error { return m.s.TransferLeader(ctxFor(t, patience), old.addr) })
	down.stop()
	n := join()
	must(t, n.s.Ready(ctxFor(t, patience)))
	must(t, n.s.Set(ctxFor(t, patience), "k", []byte("v")))
	why := func(s *Service) string {
		for _, o := range s.Status().Members {
			if o.ID == n.s.ident().id && !o.Voter {
				return o.NoVote
			}
		}
		return "it has a vote, or is no member"
	}
	if old.must(order{Op: "status"}).Status.Role == Leader && why(n.s) != "" {
		t.Errorf("beside the first release it says %q", why(n.s))
	}
	saysNothingNew(t, m, old)
	old.stop() // it hands over
	old.start()
	eventually(t, patience, "the reason", func() error {
		for _, s := range []*Service{m.s, n.s} {
			if got := why(s); !strings.Contains(got, down.conf.Addr) {
				return fmt.Errorf("it has no vote because %q", got)
			}
		}
		return nil
	})
	wantGet(t, n.s, "k", []byte("v"))
	down.start()
	testCluster{m, n, down}.awaitVoters(t, 4)
	eventually(t, patience, "no reason any more", func() error {
		if got := why(m.s); !strings.HasPrefix(got, "it has a vote") {
			return errors.New(got)
		}
		return nil
	})
}

// saysNothingNew: the first release answers the questions of this version, the one that has another log tried too, and all that it does
// not know is left out and means that nothing is known.
func saysNothingNew(t *testing.T, m *testMember, old *process) {
	t.Helper()
	base := baseURL(old.addr, false)
	for _, ask := range []func(context.Context, string) (statusAnswer, error){m.s.peer.status, m.s.peer.statusTried} {
		a, err := ask(ctxFor(t, patience), base)
		must(t, err)
		if a.ID == "" || !a.Healthy || len(a.Members) == 0 || a.Format != firstFormat {
			t.Errorf("the first release says %+v", a)
		}
		if a.LogWaits || a.Unfit != "" || a.Relieved != 0 || a.Rests != 0 || a.Fsync != 0 || a.Reached != nil || a.Confirmed != 0 ||
			a.Follows != 0 || a.Founders != nil || a.Held || a.Empty {
			t.Errorf("the first release says what it does not know: %+v", a)
		}
		for _, o := range a.Members {
			if o.NoVote != "" {
				t.Errorf("the first release says why: %+v", o)
			}
		}
	}
	id := old.must(order{Op: "status"}).Status.ID
	if _, err := m.s.peer.call(ctxFor(t, patience), request{route: "piece", base: base, to: id}); !unknownRoute(err) {
		t.Errorf("a piece of a state is %v to the first release", err)
	}
}
