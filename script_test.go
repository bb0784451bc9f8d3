package quorate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestScript plays the histories of testdata/script. Each is played by real members on real files, in a bubble where time
// passes only while everybody waits, on a network in memory. A file is blocks of a command, a line of four dashes and the
// exact output; lines that begin with # are for the reader. The commands are the methods of script; which member is
// elected is chance, so a cast gives names to the parts and the rest of the history speaks of those.
func TestScript(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/script/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			must(t, err)
			var got string
			synctest.Test(t, func(t *testing.T) { got = play(t, string(text)) })
			if *update {
				must(t, os.WriteFile(file, []byte(got), 0o644))
				return
			}
			if got != string(text) {
				t.Errorf("%s is not what happened. Rewrite it with -update and read the difference, or mend the code.\n%s", file, firstDifference(string(text), got))
			}
		})
	}
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(w), len(g)) {
		if w[i] != g[i] {
			return fmt.Sprintf("line %d\nwant: %s\ngot:  %s\nin:\n%s", i+1, w[i], g[i], strings.Join(g[max(0, i-3):min(len(g), i+4)], "\n"))
		}
	}
	return "one is longer"
}

// play returns the text with the output that the commands gave.
func play(t *testing.T, text string) string {
	c := newScript(t)
	defer c.end()
	var out bytes.Buffer
	old := false // inside the old output of a block
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		command := strings.Fields(line)
		switch {
		case line == "":
			old = false
			fmt.Fprintln(&out)
		case old:
		case line == "----":
			old = true
		case strings.HasPrefix(line, "#"):
			fmt.Fprintln(&out, line)
		default:
			fmt.Fprintf(&out, "%s\n----\n%s\n", line, c.run(command))
		}
	}
	return out.String()
}

// script is a cluster that obeys words.
type script struct {
	t       *testing.T
	net     *memNet
	members []*scriptMember
	cast    map[string]*scriptMember
	going   map[string]chan string
	change  func(*Config)                   // of members that start; nil = nothing
	front   func(http.Handler) http.Handler // what stands before every member; nil = nothing
	journal *journal                        // of members that start; nil = none
}

type scriptMember struct {
	name string
	conf Config
	s    *Service // nil while it is down
}

func newScript(t *testing.T) *script {
	return &script{t: t, net: newMemNet(), cast: make(map[string]*scriptMember), going: make(map[string]chan string)}
}

// obey is a command that must be answered with ok.
func (c *script) obey(line string) {
	c.t.Helper()
	if got := c.run(strings.Fields(line)); got != "ok" {
		c.t.Fatalf("%s: %s", line, got)
	}
}

// scriptLimit is of cluster time, for one command that does not say another.
const scriptLimit = 20 * time.Second

func (c *script) end() {
	c.net.heal()
	for _, m := range c.members {
		if m.s != nil {
			if err := m.s.Close(); err != nil {
				c.t.Errorf("close %s: %v", m.name, err)
			}
		}
	}
}

// run carries out one command: "VERB ARGUMENTS [within DURATION]".
func (c *script) run(words []string) string {
	limit := scriptLimit
	if n := len(words); n > 2 && words[n-2] == "within" {
		var err error
		limit, err = time.ParseDuration(words[n-1])
		must(c.t, err)
		words = words[:n-2]
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), limit)
	defer cancel()
	verb, args := words[0], words[1:]
	switch verb {
	case "start": // start NAME
		return c.start(ctx, args[0], "")
	case "join": // join NAME via NAME
		return c.join(ctx, args[0], c.member(args[2]))
	case "stop", "kill": // a killed member leaves the network first, so that it can tell nobody
		return c.stop(c.member(args[0]), verb == "kill")
	case "restart":
		return c.open(ctx, c.member(args[0]))
	case "cast": // cast leader NAME followers NAME...
		return c.castParts(ctx, args[1], args[3:])
	case "elect": // elect NAME among NAME...
		return c.elect(ctx, args[0], args[2:])
	case "await":
		return c.await(ctx, args)
	case "partition": // partition {NAME...} {NAME...}
		return c.partition(strings.Join(args, " "))
	case "cut": // cut NAME to NAME: this way only
		c.net.cut(c.member(args[0]).conf.Addr, c.member(args[2]).conf.Addr)
		return "ok"
	case "delay": // delay NAME to NAME DURATION
		d, err := time.ParseDuration(args[3])
		must(c.t, err)
		c.net.delay(c.member(args[0]).conf.Addr, c.member(args[2]).conf.Addr, d)
		return "ok"
	case "reset": // reset NAME: what is held on its way there is lost
		c.net.reset(c.member(args[0]).conf.Addr)
		return "ok"
	case "journal": // of what is logged from now on
		if c.journal == nil {
			c.journal = newJournal(c.t)
		}
		c.journal.restart()
		return "ok"
	case "log": // log NAME naming NAME...: what it has logged since the last journal or log
		return c.log(c.member(args[0]), "", args[2:])
	case "warnings": // warnings NAME...: how many of each
		var counts []string
		for _, name := range args {
			if got := c.log(c.member(name), "level=WARN", nil); got != "nothing" {
				counts = append(counts, got)
			}
		}
		return cmp.Or(strings.Join(counts, "\n"), "none")
	case "heal":
		c.net.heal()
		return "ok"
	case "advance":
		d, err := time.ParseDuration(args[0])
		must(c.t, err)
		time.Sleep(d)
		return "ok"
	case "begin": // begin NAME COMMAND...: in the background
		done := make(chan string, 1)
		c.going[args[0]] = done
		go func() { done <- c.run(append(slices.Clone(args[1:]), "within", limit.String())) }()
		synctest.Wait()
		return "begun"
	case "end": // end NAME: the output of what was begun
		return <-c.going[args[0]]
	default:
		return c.call(ctx, verb, args)
	}
}

// call is a call of the public API on one member.
func (c *script) call(ctx context.Context, verb string, args []string) string {
	m := c.member(args[0])
	if m.s == nil {
		return "down"
	}
	switch verb {
	case "set":
		return verdict(m.s.Set(ctx, args[1], []byte(args[2])))
	case "insert":
		return verdict(m.s.Insert(ctx, args[1], []byte(args[2])))
	case "writes": // writes NAME N DURATION: so many of them, so far apart
		n, err := strconv.Atoi(args[1])
		must(c.t, err)
		pause, err := time.ParseDuration(args[2])
		must(c.t, err)
		for i := range n {
			if err := m.s.Set(ctx, fmt.Sprint("written/", i%10), make([]byte, 1000)); err != nil {
				return verdict(err)
			}
			time.Sleep(pause)
		}
		return "ok"
	case "delete":
		return verdict(m.s.Delete(ctx, args[1]))
	case "get":
		v, err := m.s.Get(ctx, args[1])
		if err != nil {
			return verdict(err)
		}
		return scriptValue(v)
	case "stale":
		return scriptValue(m.s.Stale().Get(args[1]))
	case "remove": // remove NAME NAME: the first one is asked to remove the second
		return verdict(m.s.RemoveMember(ctx, c.member(args[1]).conf.Addr))
	case "status":
		st := m.s.Status()
		return fmt.Sprintf("%v, %d voters, revision %d", st.Role, countVoters(st), st.Revision)
	}
	c.t.Fatalf("unknown command %s", verb)
	return ""
}

func scriptValue(v []byte) string {
	if v == nil {
		return "missing"
	}
	return string(v)
}

// verdict names what an error Is.
func verdict(err error) string {
	if err == nil {
		return "ok"
	}
	var words []string
	for _, v := range []struct {
		is   error
		word string
	}{
		{ErrUnsatisfied, "unsatisfied"}, {ErrNotApplied, "not applied"}, {ErrUncertain, "uncertain"}, {ErrNoLeader, "no leader"},
		{ErrClosed, "closed"}, {ErrRemoved, "removed"}, {ErrNotAllowed, "not allowed"}, {context.DeadlineExceeded, "too late"},
	} {
		if errors.Is(err, v.is) {
			words = append(words, v.word)
		}
	}
	if words == nil {
		return err.Error()
	}
	return strings.Join(words, ", ")
}

func (c *script) member(name string) *scriptMember {
	if m := c.cast[name]; m != nil {
		return m
	}
	for _, m := range c.members {
		if m.name == name {
			return m
		}
	}
	c.t.Fatalf("no member %s", name)
	return nil
}

func (c *script) start(ctx context.Context, name, join string) string {
	addr := name + ".test:7001"
	m := &scriptMember{name: name, conf: Config{Dir: filepath.Join(c.t.TempDir(), name), Addr: addr, Join: join, Client: c.net.client(addr), Logger: testLogger(c.t)}}
	if m.conf.Logger != nil {
		m.conf.Logger = m.conf.Logger.With("member", name)
	}
	if c.journal != nil {
		m.conf.Logger = c.journal.logger(name)
	}
	if c.change != nil {
		c.change(&m.conf)
	}
	c.members = append(c.members, m)
	return c.open(ctx, m)
}

func (c *script) open(ctx context.Context, m *scriptMember) string {
	c.net.serve(m.conf.Addr, http.NotFoundHandler()) // it can call; nobody is served yet
	s, err := Open(ctx, m.conf)
	if err != nil {
		c.net.serve(m.conf.Addr, nil)
		return verdict(err)
	}
	m.s = s
	h := http.Handler(s)
	if c.front != nil {
		h = c.front(h)
	}
	c.net.serve(m.conf.Addr, h)
	return "ok"
}

func (c *script) join(ctx context.Context, name string, via *scriptMember) string {
	if err := via.s.AddAllowedMember(ctx, name+".test:7001"); err != nil {
		return verdict(err)
	}
	return c.start(ctx, name, via.conf.Addr)
}

func (c *script) stop(m *scriptMember, kill bool) string {
	s := m.s
	m.s = nil
	if kill {
		c.net.serve(m.conf.Addr, nil)
	}
	err := s.Close()
	c.net.serve(m.conf.Addr, nil)
	return verdict(err)
}

// partition cuts every way between the groups.
func (c *script) partition(groups string) string {
	var sides [][]string
	for g := range strings.SplitSeq(groups, "}") {
		if names := strings.Fields(strings.Trim(g, " {")); len(names) > 0 {
			sides = append(sides, names)
		}
	}
	for i, side := range sides {
		for j, other := range sides {
			for _, from := range side {
				for _, to := range other {
					if i != j {
						c.net.cut(c.member(from).conf.Addr, c.member(to).conf.Addr)
					}
				}
			}
		}
	}
	return "ok"
}

// poll waits in cluster time for a condition.
func (c *script) poll(ctx context.Context, f func() error) string {
	for {
		err := f()
		if err == nil {
			return "ok"
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return "not in time: " + err.Error()
		}
	}
}

func (c *script) running(names []string) []*scriptMember {
	var list []*scriptMember
	for _, m := range c.members {
		if m.s != nil && (names == nil || slices.ContainsFunc(names, func(n string) bool { return c.member(n) == m })) {
			list = append(list, m)
		}
	}
	return list
}

// leaderOf is the member on whose leadership all of these agree.
func leaderOf(list []*scriptMember) (*scriptMember, error) {
	var leader *scriptMember
	id := list[0].s.Status().LeaderID
	for _, m := range list {
		st := m.s.Status()
		if st.LeaderID == "" || st.LeaderID != id {
			return nil, errors.New("they don't agree on a leader")
		}
		if st.Role == Leader && st.ID == id {
			leader = m
		}
	}
	if leader == nil {
		return nil, errors.New("none of them leads")
	}
	return leader, nil
}

func (c *script) castParts(ctx context.Context, leader string, followers []string) string {
	return c.poll(ctx, func() error {
		list := c.running(nil)
		l, err := leaderOf(list)
		if err != nil {
			return err
		}
		c.cast[leader] = l
		rest := slices.DeleteFunc(list, func(m *scriptMember) bool { return m == l })
		for i, name := range followers {
			c.cast[name] = rest[i]
		}
		return nil
	})
}

func (c *script) elect(ctx context.Context, name string, among []string) string {
	return c.poll(ctx, func() error {
		l, err := leaderOf(c.running(among))
		if err == nil {
			c.cast[name] = l
		}
		return err
	})
}

func (c *script) await(ctx context.Context, args []string) string {
	switch args[0] {
	case "ready": // await ready NAME...
		for _, name := range args[1:] {
			if err := c.member(name).s.Ready(ctx); err != nil {
				return verdict(err)
			}
		}
		return "ok"
	case "voters": // await voters N: every running member knows as many
		return c.poll(ctx, func() error {
			for _, m := range c.running(nil) {
				if n := countVoters(m.s.Status()); fmt.Sprint(n) != args[1] {
					return fmt.Errorf("%s knows %d voters", m.name, n)
				}
			}
			return nil
		})
	case "no-leader": // await no-leader NAME: it knows none
		return c.poll(ctx, func() error {
			if c.member(args[1]).s.Status().LeaderID != "" {
				return errors.New("it takes someone for the leader")
			}
			return nil
		})
	case "removed": // await removed NAME: it has learned that it is no member any more
		return c.poll(ctx, func() error {
			if err := c.member(args[1]).s.Err(); !errors.Is(err, ErrRemoved) {
				return fmt.Errorf("its Err is %v", err)
			}
			return nil
		})
	case "equal": // all running members hold the same state
		return c.poll(ctx, func() error {
			list := c.running(nil)
			first := list[0].s.Status()
			for _, m := range list[1:] {
				if st := m.s.Status(); st.Hash != first.Hash || st.AppliedIndex != first.AppliedIndex {
					return fmt.Errorf("%s and %s differ", m.name, list[0].name)
				}
			}
			return nil
		})
	case "stale": // await stale NAME KEY VALUE: its own copy shows the value
		return c.poll(ctx, func() error {
			if v := scriptValue(c.member(args[1]).s.Stale().Get(args[2])); v != args[3] {
				return errors.New(v)
			}
			return nil
		})
	}
	c.t.Fatalf("unknown condition %s", args[0])
	return ""
}

func countVoters(st Status) int {
	n := 0
	for _, m := range st.Members {
		if m.Voter {
			n++
		}
	}
	return n
}
