package quorate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/types"
)

// The model: founders that decide by decide, with directories, a network and clusters that are nothing but what matters here.
// Wipes, cuts, restarts, calls that are late or get lost, and lists that differ strike at random, between any two of a member's
// steps. A directory that one cluster of a list is in leaves no room for another cluster of that list.

type modelDir struct {
	id, cluster string
	begun       bool     // it has the cluster's state
	founders    []string // nothing is acknowledged before a majority of them votes; nil = that was so
}

type modelMember struct {
	addr   string
	list   []string
	up     bool
	life   int // of its process
	dir    modelDir
	asking bool
	asked  int // of list, in the pass
	pass   []heard
}

type modelCluster struct {
	id    string
	list  []string
	ids   map[string]string // by address: every member
	votes map[string]bool   // by address
	acked bool
	lost  int // directories of voters that were wiped
}

// A modelMail is something on its way; it arrives later, or never.
type modelMail struct {
	to, life int // life 0: whichever process is there
	arrive   func(m *modelMember)
}

type foundingModel struct {
	t        testing.TB
	rnd      *rand.Rand
	seed     uint64
	members  []*modelMember
	clusters []*modelCluster
	cuts     map[[2]int]bool
	mail     []modelMail
	made     int
	counts   map[string]int
}

func (w *foundingModel) name(what string) string {
	w.made++
	return fmt.Sprintf("%032x", w.made) // a valid id
}

func newFoundingModel(t testing.TB, seed uint64, n int) *foundingModel {
	w := &foundingModel{t: t, rnd: rand.New(rand.NewPCG(seed, 19)), seed: seed, cuts: make(map[[2]int]bool), counts: make(map[string]int)}
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("%c.test:7001", 'a'+i))
	}
	for _, addr := range list {
		m := &modelMember{addr: addr, list: list}
		w.members = append(w.members, m)
		w.start(m)
	}
	return w
}

func (w *foundingModel) start(m *modelMember) {
	m.up, m.asking, m.pass, m.asked = true, false, nil, 0
	m.life++
	if m.dir.id == "" {
		m.dir.id = w.name("member")
	}
}

func (w *foundingModel) at(addr string) (int, *modelMember) {
	i := slices.IndexFunc(w.members, func(m *modelMember) bool { return m.addr == addr })
	return i, w.members[i]
}

func (w *foundingModel) cluster(id string) *modelCluster {
	i := slices.IndexFunc(w.clusters, func(c *modelCluster) bool { return c.id == id })
	return w.clusters[i]
}

func (m *modelMember) founder() founder {
	f := founder{addr: m.addr, id: m.dir.id, list: m.list, asking: m.asking}
	if !m.dir.begun {
		f.admitted = m.dir.cluster
	}
	return f
}

// reach: a call from one member to another gets through, and its answer back.
func (w *foundingModel) reach(i, j int) bool {
	return w.members[i].up && w.members[j].up && !w.cuts[[2]int{i, j}] && !w.cuts[[2]int{j, i}]
}

// says is the status of a member.
func (m *modelMember) says() statusAnswer {
	a := statusAnswer{ID: m.dir.id, Addr: m.addr, Cluster: m.dir.cluster}
	if !m.dir.begun {
		a.Founders, a.Empty = m.list, m.founder().empty()
	}
	return a
}

// leads: this member leads the cluster: a majority of those that vote have their directories and reach it.
func (w *foundingModel) leads(i int, c *modelCluster) bool {
	yes := 0
	for addr := range c.votes {
		if j, v := w.at(addr); v.dir.begun && v.dir.id == c.ids[addr] && v.up && (i == j || w.reach(i, j)) {
			yes++
		}
	}
	m := w.members[i]
	return m.up && m.dir.begun && c.votes[m.addr] && c.ids[m.addr] == m.dir.id && yes > len(c.votes)/2
}

func (w *foundingModel) leader(c *modelCluster) (int, bool) {
	for _, i := range w.rnd.Perm(len(w.members)) {
		if w.leads(i, c) {
			return i, true
		}
	}
	return 0, false
}

// advance takes one step of a member that has no state: it asks the next founder, or decides.
func (w *foundingModel) advance(i int) {
	m := w.members[i]
	if !m.up || m.dir.begun || m.asking {
		return
	}
	if m.asked < len(m.list) {
		addr := m.list[m.asked]
		m.asked++
		if j, other := w.at(addr); j != i {
			h := heard{addr: addr, err: errors.New("silent")}
			if w.reach(i, j) {
				h = heard{addr: addr, status: other.says()}
			}
			m.pass = append(m.pass, h)
		}
		return
	}
	f, pass := m.founder(), m.pass
	m.pass, m.asked = nil, 0
	switch s := f.decide(pass); s.kind {
	case stepFound:
		w.found(m)
	case stepJoin:
		w.join(i, s.at[w.rnd.IntN(len(s.at))])
	default:
		if (s.fault == nil) == (s.words == "") {
			w.t.Fatalf("seed %d: a step that says nothing: %+v", w.seed, s)
		}
	}
}

func (w *foundingModel) found(m *modelMember) {
	w.counts["founded"]++
	for _, old := range w.clusters {
		if old.acked && slices.Equal(old.list, m.list) && old.lost < len(old.list)/2+1 {
			w.t.Fatalf("seed %d: another cluster of %v, and %d of their disks are lost", w.seed, m.list, old.lost)
		}
	}
	c := &modelCluster{id: w.name("cluster"), list: m.list}
	w.clusters = append(w.clusters, c)
	m.dir = modelDir{id: w.name("member"), cluster: c.id, founders: m.list}
	c.ids, c.votes = map[string]string{m.addr: m.dir.id}, map[string]bool{m.addr: true}
	if w.rnd.IntN(8) == 0 { // killed before the first entry: see enter
		m.dir = modelDir{}
		w.start(m)
		return
	}
	m.dir.begun = true
}

// join asks by way of a member of a cluster. The leader admits, and the answer is on its way.
func (w *foundingModel) join(i int, via string) {
	m := w.members[i]
	j, other := w.at(via)
	if !w.reach(i, j) || other.dir.cluster == "" {
		return
	}
	c := w.cluster(other.dir.cluster)
	l, ok := w.leader(c)
	if !ok || !w.reach(i, l) || !slices.Contains(c.list, m.addr) {
		return
	}
	m.asking = true
	life, id, holds := m.life, m.dir.id, w.members[l].dir.founders
	ended := modelMail{i, life, func(m *modelMember) { m.asking = false }}
	if c.ids[m.addr] != id && !w.replace(l, c, m.addr) {
		w.mail = append(w.mail, ended)
		return
	}
	c.ids[m.addr] = id
	if w.rnd.IntN(5) == 0 { // the answer is lost
		w.mail = append(w.mail, ended)
		return
	}
	w.mail = append(w.mail, modelMail{i, life, func(m *modelMember) {
		m.asking, m.dir.cluster, m.dir.founders = false, c.id, holds
		w.counts["admitted"]++
	}})
}

// replace makes room at an address, as replaceAt does.
func (w *foundingModel) replace(l int, c *modelCluster, addr string) bool {
	if c.votes[addr] {
		live := 0
		for v := range c.votes {
			if j, m := w.at(v); v != addr && m.dir.begun && m.dir.id == c.ids[v] && (j == l || w.reach(l, j)) {
				live++
			}
		}
		if rest := len(c.votes) - 1; rest == 0 || live < rest/2+1 || live < len(c.votes)/2+1 {
			return false
		}
		w.counts["replaced"]++
	}
	delete(c.votes, addr)
	delete(c.ids, addr)
	return true
}

// lead has a leader send its state, or make a member a voter, or acknowledge a write.
func (w *foundingModel) lead(c *modelCluster) {
	l, ok := w.leader(c)
	if !ok {
		return
	}
	leader := w.members[l]
	config := raft.Configuration{}
	for addr := range c.votes {
		config.Servers = append(config.Servers, raft.Server{Suffrage: raft.Voter, Address: raft.ServerAddress(addr)})
	}
	have, need := votes(leader.dir.founders, config)
	if have >= need {
		leader.dir.founders = nil
	}
	switch addr := c.list[w.rnd.IntN(len(c.list))]; w.rnd.IntN(3) {
	case 0:
		if id := c.ids[addr]; id != "" && !c.votes[addr] {
			j, _ := w.at(addr)
			w.mail = append(w.mail, modelMail{j, 0, func(m *modelMember) {
				if m.up && m.dir.id == id && m.dir.cluster == c.id {
					m.dir.begun = true
				}
			}})
		}
	case 1:
		if j, m := w.at(addr); c.ids[addr] != "" && m.dir.id == c.ids[addr] && m.dir.begun && w.reach(l, j) {
			c.votes[addr] = true
		}
	case 2:
		if leader.dir.founders == nil && !c.acked {
			c.acked = true
			w.counts["acked"]++
		}
	}
}

// strike does one thing that nobody has asked for.
func (w *foundingModel) strike(lists, wipes bool) {
	i, j := w.rnd.IntN(len(w.members)), w.rnd.IntN(len(w.members))
	m := w.members[i]
	switch w.rnd.IntN(6) {
	case 0:
		if wipes {
			if c := m.dir.cluster; c != "" && w.cluster(c).votes[m.addr] && m.dir.begun {
				w.cluster(c).lost++
			}
			m.dir = modelDir{}
			w.start(m)
			w.counts["wiped"]++
		}
	case 1:
		w.start(m)
	case 2:
		m.up = false
	case 3:
		if !m.up {
			w.start(m)
		}
	case 4:
		w.cuts[[2]int{i, j}] = !w.cuts[[2]int{i, j}]
	case 5:
		if lists { // a list without one of them, or whole
			m.list = nil
			out := w.rnd.IntN(2 * len(w.members))
			for k, other := range w.members {
				if k != out || k == i {
					m.list = append(m.list, other.addr)
				}
			}
			w.start(m)
		}
	}
}

func (w *foundingModel) deliver() {
	if len(w.mail) == 0 {
		return
	}
	k := w.rnd.IntN(len(w.mail))
	mail := w.mail[k]
	w.mail = slices.Delete(w.mail, k, k+1)
	if m := w.members[mail.to]; mail.life == 0 || m.life == mail.life {
		mail.arrive(m)
	}
}

// judge: the directories hold at most one cluster of each list.
func (w *foundingModel) judge() {
	seen := make(map[string]*modelCluster) // by list
	for _, m := range w.members {
		if m.dir.cluster == "" {
			continue
		}
		c := w.cluster(m.dir.cluster)
		list := strings.Join(c.list, ",")
		if other := seen[list]; other != nil && other != c {
			w.t.Fatalf("seed %d: two clusters of %s, acknowledged %v and %v", w.seed, list, c.acked, other.acked)
		}
		seen[list] = c
	}
	for _, c := range w.clusters {
		n := 0
		for addr := range c.votes {
			if _, m := w.at(addr); m.dir.begun && m.dir.id == c.ids[addr] {
				n++
			}
		}
		if c.acked && w.counts["wiped"] == 0 && n < len(c.list)/2+1 {
			w.t.Fatalf("seed %d: acknowledged by %d of %d", w.seed, n, len(c.list))
		}
	}
}

func (w *foundingModel) turn(strikes, lists, wipes bool) {
	switch n := w.rnd.IntN(20); {
	case n < 10:
		w.advance(w.rnd.IntN(len(w.members)))
	case n < 14:
		w.deliver()
	case n < 19:
		if len(w.clusters) > 0 {
			w.lead(w.clusters[w.rnd.IntN(len(w.clusters))])
		}
	case strikes:
		w.strike(lists, wipes)
	}
	w.judge()
}

func TestFoundingModel(t *testing.T) {
	t.Parallel()
	total := make(map[string]int)
	for seed := range uint64(dose(800, 100_000)) {
		n := 1 + int(seed%5)
		w := newFoundingModel(t, seed, n)
		for range 300 {
			w.turn(true, seed%3 == 0, seed%4 != 0)
		}
		for what, n := range w.counts {
			total[what] += n
		}
		if seed%3 == 0 || seed%4 != 0 {
			continue
		}
		clear(w.cuts) // nothing was lost, and now all is well: one cluster of them all comes of it
		for _, m := range w.members {
			if !m.up {
				w.start(m)
			}
		}
		for range 3000 {
			w.turn(false, false, false)
		}
		for _, m := range w.members {
			if c := m.dir.cluster; c == "" || !m.dir.begun || !w.cluster(c).votes[m.addr] || !w.cluster(c).acked {
				t.Fatalf("seed %d: %s ends with %+v", seed, m.addr, m.dir)
			}
		}
	}
	t.Log(total)
	for _, what := range []string{"founded", "admitted", "acked", "wiped", "replaced"} {
		if total[what] < 5 {
			t.Errorf("%s %d times", what, total[what])
		}
	}
}

// --- real members

// founders starts members with one list, which is theirs unless it is given.
func (c *script) founders(names string, list ...string) {
	c.t.Helper()
	if list == nil {
		list = strings.Split(names, "")
	}
	for i := range list {
		list[i] += ".test:7001"
	}
	c.change = func(conf *Config) { conf.Bootstrap = list }
	for name := range strings.SplitSeq(names, "") {
		c.obey("start " + name)
	}
}

// whole waits until these members are one cluster of so many voters that takes writes.
func (c *script) whole(names string, voters int) {
	c.t.Helper()
	for name := range strings.SplitSeq(names, "") {
		c.obey("await ready " + name)
	}
	c.obey(fmt.Sprint("await voters ", voters))
	first := c.member(names[:1]).s.Status().Cluster
	for name := range strings.SplitSeq(names, "") {
		m := c.member(name)
		if st := m.s.Status(); st.Cluster != first || st.ID == "" {
			c.t.Errorf("%s has id %s in cluster %s, the first one is in %s", name, st.ID, st.Cluster, first)
		}
		must(c.t, c.serves(m))
		c.idFormat(m, identityFirst)
	}
	c.obey("await equal")
}

// idFormat waits until the id file is in a format.
func (c *script) idFormat(m *scriptMember, want int) {
	c.t.Helper()
	words := fmt.Sprintf("quorate member %d\n", want)
	if got := c.poll(ctxFor(c.t, 5*time.Second), func() error {
		if data, err := os.ReadFile(filepath.Join(m.conf.Dir, "id")); err != nil || !strings.HasPrefix(string(data), words) {
			return fmt.Errorf("%s: %v\n%s", m.name, err, data)
		}
		return nil
	}); got != "ok" {
		c.t.Error(got)
	}
}

// wipe empties a member's directory, as a lost disk does.
func (c *script) wipe(name string) {
	c.t.Helper()
	if m := c.member(name); m.s != nil {
		c.obey("kill " + name)
	}
	must(c.t, os.RemoveAll(c.member(name).conf.Dir))
}

// waits: a member has no cluster, its calls wait as long as they may, and its Ready says these words.
func (c *script) waits(name string, words ...string) {
	c.t.Helper()
	s := c.member(name).s
	began := time.Now()
	ctx := ctxFor(c.t, 2*time.Second)
	ready := s.Ready(ctx)
	ctx = ctxFor(c.t, time.Second)
	set := s.Set(ctx, "k", nil)
	_, get := s.Get(ctxFor(c.t, time.Second), "k")
	if !errors.Is(ready, context.DeadlineExceeded) || !errors.Is(set, ErrNotApplied) || !errors.Is(set, context.DeadlineExceeded) ||
		!errors.Is(get, ErrNoLeader) || time.Since(began) != 4*time.Second {
		c.t.Errorf("%s after %v: Ready %v, Set %v, Get %v", name, time.Since(began), ready, set, get)
	}
	for _, word := range words {
		for what, err := range map[string]error{"Ready": ready, "Set": set, "Get": get} {
			if err == nil || !strings.Contains(err.Error(), word) {
				c.t.Errorf("%s of %s says %v, without %q", what, name, err, word)
			}
		}
	}
}

func TestFounders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		began := time.Now()
		c.founders("cab", "b", "c", "a")
		c.whole("abc", 3)
		if d := time.Since(began); d > 4*time.Second {
			t.Errorf("the first start took %v", d)
		}
	})
}

// heardAs is what a founder with an empty directory answers.
func heardAs(addr string, list []string, change func(*statusAnswer)) heard {
	h := heard{addr: addr, status: statusAnswer{ID: newID(), Addr: addr, Founders: list, Empty: true}}
	if change != nil {
		change(&h.status)
	}
	return h
}

func TestFounderDecides(t *testing.T) {
	t.Parallel()
	list := []string{"a:1", "b:1", "c:1"}
	x, y := newID(), newID()
	of := func(cluster string) func(*statusAnswer) {
		return func(a *statusAnswer) { a.Cluster, a.Founders, a.Empty = cluster, nil, false }
	}
	b, c := heardAs("b:1", list, nil), heardAs("c:1", list, nil)
	self := founder{addr: "a:1", id: newID(), list: list}
	for name, w := range map[string]struct {
		f     founder
		pass  []heard
		kind  stepKind
		at    string
		fault bool
		words string
	}{
		"all are there":                {self, []heard{b, c}, stepFound, "", false, ""},
		"not the smallest":             {founder{addr: "b:1", id: self.id, list: list}, []heard{heardAs("a:1", list, nil), c}, stepWait, "", false, "a:1 is about to begin"},
		"no founder":                   {founder{addr: "a:0", id: self.id, list: list}, []heard{heardAs("a:1", list, nil), b, c}, stepWait, "", false, "no founder"},
		"alone in the list":            {founder{addr: "a:1", id: self.id, list: list[:1]}, nil, stepFound, "", false, ""},
		"silent":                       {self, []heard{b, {addr: "c:1", err: errors.New("why")}}, stepWait, "", false, "c:1 is silent (why)"},
		"not asked":                    {self, []heard{b}, stepWait, "", false, "c:1 is silent"},
		"not empty":                    {self, []heard{b, heardAs("c:1", list, func(a *statusAnswer) { a.Empty = false })}, stepWait, "", false, "c:1 asks"},
		"an older release":             {self, []heard{b, heardAs("c:1", nil, nil)}, stepWait, "", false, "c:1 does not wait for founders: its release"},
		"at another address":           {self, []heard{b, heardAs("c:1", list, func(a *statusAnswer) { a.Addr = "b:1" })}, stepWait, "", false, "c:1 is not its own"},
		"this member itself":           {self, []heard{b, heardAs("c:1", list, func(a *statusAnswer) { a.ID = self.id })}, stepWait, "", false, "c:1 is not its own"},
		"another at our address":       {self, []heard{heardAs("a:1", list, nil), b, c}, stepWait, "", false, "a:1 is this member's own"},
		"another list":                 {self, []heard{b, heardAs("c:1", list[1:], nil)}, stepWait, "", true, "[a:1 b:1 c:1] here and [b:1 c:1] at c:1"},
		"another list, and silent":     {self, []heard{{addr: "b:1", err: errors.New("why")}, heardAs("c:1", list[1:], nil)}, stepWait, "", true, "differ"},
		"a cluster":                    {self, []heard{heardAs("b:1", nil, of(x)), c}, stepJoin, "b:1", false, ""},
		"a cluster beside a silent":    {self, []heard{{addr: "b:1", err: errors.New("why")}, heardAs("c:1", nil, of(x))}, stepJoin, "c:1", false, ""},
		"a cluster of another list":    {self, []heard{heardAs("b:1", list[1:], nil), heardAs("c:1", nil, of(x))}, stepJoin, "c:1", false, ""},
		"a cluster elsewhere":          {self, []heard{b, c, heardAs("d:1", nil, of(x))}, stepWait, "", true, "at d:1"},
		"elsewhere, and another here":  {self, []heard{b, heardAs("c:1", nil, of(y)), heardAs("d:1", nil, of(x))}, stepWait, "", true, "at d:1"},
		"elsewhere, and the same here": {self, []heard{b, heardAs("c:1", nil, of(x)), heardAs("d:1", nil, of(x))}, stepJoin, "c:1", false, ""},
		"admitted, and elsewhere":      {founder{addr: "a:1", id: self.id, list: list, admitted: x}, []heard{b, c, heardAs("d:1", nil, of(x))}, stepWait, "", false, "has not called yet"},
		"two clusters":                 {self, []heard{heardAs("b:1", nil, of(x)), heardAs("c:1", nil, of(y))}, stepWait, "", true, "at c:1"},
		"admitted elsewhere":           {founder{addr: "a:1", id: self.id, list: list, admitted: y}, []heard{heardAs("b:1", nil, of(x)), c}, stepWait, "", true, "has admitted this member"},
		"admitted, and nobody answers": {founder{addr: "a:1", id: self.id, list: list, admitted: y}, []heard{b, c}, stepWait, "", false, "has admitted this member"},
		"admitted":                     {founder{addr: "a:1", id: self.id, list: list, admitted: x}, []heard{heardAs("b:1", nil, of(x)), c}, stepJoin, "b:1", false, ""},
		"asking":                       {founder{addr: "a:1", id: self.id, list: list, asking: true}, []heard{b, c}, stepWait, "", false, "asks to be admitted"},
		"an id of nobody":              {self, []heard{b, heardAs("c:1", list, func(a *statusAnswer) { a.ID = "" })}, stepWait, "", false, "c:1 is not"},
		"a cluster without a name":     {self, []heard{b, heardAs("c:1", nil, of("?"))}, stepWait, "", false, "c:1 does not wait"},
	} {
		if empty := w.f.admitted == "" && !w.f.asking; w.f.empty() != empty {
			t.Errorf("%s: it says of its own directory that it is empty: %t", name, !empty)
		}
		got := w.f.decide(w.pass)
		text := got.words
		if got.fault != nil {
			text = got.fault.Error()
		}
		if got.kind != w.kind || strings.Join(got.at, ",") != w.at || (got.fault != nil) != w.fault || !strings.Contains(text, w.words) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// Only founders count, wherever else voters are.
func TestVotesOfFounders(t *testing.T) {
	var c raft.Configuration
	for i, addr := range []string{"a:1", "b:1", "x:1", "y:1"} {
		c.Servers = append(c.Servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(fmt.Sprint(i)), Address: raft.ServerAddress(addr)})
	}
	c.Servers[1].Suffrage = raft.Nonvoter
	for founders, want := range map[string][2]int{"a:1": {1, 1}, "a:1 b:1": {1, 2}, "a:1 b:1 c:1": {1, 2}, "a:1 x:1 y:1 z:1": {3, 3}} {
		if have, need := votes(strings.Fields(founders), c); have != want[0] || need != want[1] {
			t.Errorf("%d of %s vote, and %d must, want %v", have, founders, need, want)
		}
	}
}

// Whoever is admitted to another cluster than the one that it has asked belongs to neither.
func TestFounderIsAdmittedElsewhere(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		asked, other := statusAnswer{ID: newID(), Cluster: newID(), Addr: "b.test:7001"}, newID()
		status := statusOf(asked, "")
		c.net.serve("b.test:7001", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if filepath.Base(req.URL.Path) != "join" {
				status(w, req)
				return
			}
			setHeaders(w.Header(), headerProtocol, "1", headerCluster, other, headerFrom, asked.ID)
			w.Write(asJSON(joinAnswer{Cluster: other}))
		}))
		c.founders("a", "a", "b")
		time.Sleep(5 * time.Second)
		c.waits("a", "admitted to cluster "+shortID(other)+" instead of "+shortID(asked.Cluster))
		if ident := c.member("a").s.ident(); ident.cluster != "" {
			t.Errorf("it belongs to cluster %s", ident.cluster)
		}
	})
}

func TestBootstrapThatIsInvalid(t *testing.T) {
	t.Parallel()
	many := make([]string, maxFounders+1)
	for i := range many {
		many[i] = fmt.Sprintf("n%d.test:7001", i)
	}
	for name, c := range map[string]Config{
		"with Join":       {Addr: "a.test:7001", Join: "b.test:7001", Bootstrap: []string{"a.test:7001", "b.test:7001"}},
		"without Addr":    {Bootstrap: []string{"a.test:7001"}},
		"twice":           {Addr: "a.test:7001", Bootstrap: []string{"a.test:7001", "b.test:7001", "A.test.:7001"}},
		"with no address": {Addr: "a.test:7001", Bootstrap: []string{"a.test:7001", "b.test"}},
		"with a URL":      {Addr: "a.test:7001", Bootstrap: []string{"http://a.test:7001"}},
		"with too many":   {Addr: "a.test:7001", Bootstrap: many},
	} {
		c.Dir = filepath.Join(t.TempDir(), "data")
		if _, err := Open(t.Context(), c); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "Bootstrap") && name != "without Addr" {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(c.Dir); err == nil {
			t.Errorf("%s: something was made", name)
		}
	}
}

// Whoever has lost its directory comes back with the flags that it had, and what was acknowledged is there; the smallest, which begins
// first starts, like the others. All of them empty is a first start.
func TestFounderThatWasWiped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.founders("abc")
		c.whole("abc", 3)
		cluster := c.member("a").s.Status().Cluster
		for _, name := range []string{"a", "c", "b"} {
			c.obey("set b last " + name)
			old := c.member(name).s.Status().ID
			c.wipe(name)
			c.obey("restart " + name)
			c.whole("abc", 3)
			if st := c.member(name).s.Status(); st.Cluster != cluster || st.ID == old || len(st.Members) != 3 {
				t.Errorf("%s came back as %+v", name, st)
			}
			if got := c.run(strings.Fields("get " + name + " last")); got != name {
				t.Errorf("%s reads %q", name, got)
			}
		}
		for _, name := range []string{"a", "b", "c"} {
			c.obey("stop " + name)
		}
		for _, name := range []string{"b", "c", "a"} { // and with state the list says nothing
			c.member(name).conf.Bootstrap = []string{name + ".test:7001", "z.test:7001"}
			c.obey("restart " + name)
		}
		c.whole("abc", 3)
		for _, name := range []string{"a", "b", "c"} {
			c.wipe(name)
		}
		for _, name := range []string{"a", "b", "c"} {
			c.change(&c.member(name).conf)
			c.obey("restart " + name)
		}
		c.whole("abc", 3)
		if got := c.member("a").s.Status().Cluster; got == cluster {
			t.Error("all of them are empty, and the cluster is the old one")
		}
	})
}

// While one is silent nothing begins, across restarts of those that wait, and they say who is missing.
func TestFoundersWaitForTheSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.founders("ab", "a", "b", "c")
		for range 2 {
			for _, name := range []string{"a", "b"} {
				c.waits(name, "c.test:7001 is silent", "the founders wait")
				st := c.member(name).s.Status()
				if st.ID != "" || st.Cluster != "" || st.Role != NonVoter || len(st.Members) != 0 || c.member(name).s.Err() != nil {
					t.Errorf("%s: %+v, Err %v", name, st, c.member(name).s.Err())
				}
			}
			c.obey("kill a")
			c.obey("restart a")
			time.Sleep(time.Minute)
		}
		a := c.member("a") // which came with Bootstrap, and has nothing yet
		c.obey("stop a")
		bootstrap := a.conf.Bootstrap
		a.conf.Bootstrap = nil
		if _, err := Open(t.Context(), a.conf); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "Bootstrap") {
			t.Errorf("without Bootstrap again: %v", err)
		}
		a.conf.Bootstrap = bootstrap
		c.obey("restart a")

		// A release that knows no Bootstrap: starting, and as a member that says nothing of founders.
		c.net.serve("c.test:7001", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			setHeaders(w.Header(), headerProtocol, "1")
			w.WriteHeader(http.StatusServiceUnavailable)
			w.Write(asJSON(refusal{Code: codeNotReady, Message: "starting or closing"}))
		}))
		time.Sleep(3 * time.Second)
		c.waits("a", "c.test:7001", "starting or closing")
		c.net.serve("c.test:7001", statusOf(statusAnswer{ID: newID(), Addr: "c.test:7001"}, ""))
		time.Sleep(3 * time.Second)
		c.waits("a", "c.test:7001 does not wait for founders: its release does not know Bootstrap")
		waited := a.s.ident().id
		c.obey("start c")
		c.whole("abc", 3)
		if st := a.s.Status(); st.ID == waited {
			t.Error("the id that was to join has begun the cluster")
		}
	})
}

func TestFoundersWithOtherLists(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.founders("ab", "a", "b", "c")
		c.founders("c", "b", "c")
		time.Sleep(5 * time.Second)
		c.waits("a", "[a.test:7001 b.test:7001 c.test:7001] here", "[b.test:7001 c.test:7001] at c.test:7001")
		for _, name := range []string{"a", "c"} {
			if err := c.member(name).s.Err(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "[b.test:7001 c.test:7001]") {
				t.Errorf("Err of %s: %v", name, err)
			}
		}
		c.obey("stop c")
		c.member("c").conf.Bootstrap = c.member("a").conf.Bootstrap
		c.obey("restart c")
		c.whole("abc", 3)
	})
}

// Where clusters are already: one is joined if it lets this member in, and of two neither.
func TestFounderMeetsClusters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.obey("start b")
		c.obey("start c")
		c.founders("a", "a", "b", "c")
		b, other := c.member("b").s, c.member("c").s
		time.Sleep(5 * time.Second)
		c.waits("a", shortID(b.Status().Cluster)+" at b.test:7001", shortID(other.Status().Cluster)+" at c.test:7001")
		if err := c.member("a").s.Err(); !errors.Is(err, ErrInvalid) {
			t.Errorf("Err is %v", err)
		}
		c.wipe("c")
		c.net.serve("c.test:7001", nil)
		time.Sleep(12 * time.Second)
		c.waits("a", `AddAllowedMember(ctx, "a.test:7001")`)
		if err := c.member("a").s.Err(); !errors.Is(err, ErrNotAllowed) {
			t.Errorf("Err is %v", err)
		}
		if !c.member("a").s.founder().empty() {
			t.Error("it has been refused, and says that it may be admitted at any time")
		}
		before := c.net.arrivals()["b.test:7001 join"]
		time.Sleep(time.Minute)
		if n := c.net.arrivals()["b.test:7001 join"] - before; n > 12 { // one question, and one to the leader that it names
			t.Errorf("asked %d times in a minute", n)
		}
		must(t, b.AddAllowedMember(t.Context(), "a.test:7001"))
		time.Sleep(11 * time.Second)
		c.whole("ab", 2)
		if a := c.member("a").s; !a.takeStep(step{words: "nobody answers"}) {
			t.Error("it has its state, and waits for the founders to answer")
		}

		// One that is not in the list, and one that is called by a cluster that its list does not lead to.
		must(t, b.AddAllowedMember(t.Context(), "d.test:7001"))
		c.founders("d", "a", "b", "c")
		c.whole("abd", 3)
		c.wipe("d")
		c.member("d").conf.Bootstrap = []string{"c.test:7001", "d.test:7001"}
		c.obey("restart d")
		time.Sleep(3 * time.Second)
		c.waits("d", "cluster "+shortID(b.Status().Cluster), ".test:7001, says", "give it as Join", `RemoveMember(ctx, "d.test:7001")`)
		if err := c.member("d").s.Err(); !errors.Is(err, ErrInvalid) {
			t.Errorf("Err is %v", err)
		}
		c.obey("stop d")
		c.member("d").conf.Bootstrap, c.member("d").conf.Join = nil, "a.test:7001"
		c.obey("restart d")
		c.whole("abd", 3)
		c.founders("e", "x", "y")
		c.waits("e", "x.test:7001 is silent")
	})
}

// Whoever calls a founder and answers at the address that the call names may keep it waiting, and no more.
func TestFounderJoinsNoForger(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.founders("a", "a", "b")
		a, other := c.member("a"), newID()
		list := a.conf.Bootstrap
		proof := statusAnswer{ID: newID(), Cluster: other, Addr: forgedAddr, Confirmed: 1, Members: []memberAddr{{ID: newID(), Addr: a.conf.Addr, Voter: true}}}
		proof.LeaderID, proof.LeaderAddr = proof.ID, proof.Addr
		forge := statusOf(proof, "")
		c.net.serve(forgedAddr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if filepath.Base(req.URL.Path) != "join" {
				forge(w, req)
				return
			}
			setHeaders(w.Header(), headerProtocol, "1", headerCluster, other, headerFrom, proof.ID)
			w.Write(asJSON(joinAnswer{Cluster: other}))
		}))
		send(a.s, http.MethodPost, "/raft/append", nil, map[string]string{headerCluster: other, headerFrom: proof.ID, headerFromAddr: forgedAddr})
		time.Sleep(5 * time.Second)
		c.waits("a", "cluster "+shortID(other), forgedAddr, "give it as Join")
		c.change = func(conf *Config) { conf.Bootstrap = list }
		c.obey("start b")
		time.Sleep(time.Minute)
		if n, ident := c.net.arrivals()[forgedAddr+" join"], a.s.ident(); n > 0 || ident.cluster != "" || a.s.Err() == nil {
			t.Errorf("asked %d times; %+v, Err %v", n, ident, a.s.Err())
		}
		c.net.serve(forgedAddr, nil)
		time.Sleep(strangerAge + 2*time.Second)
		c.whole("ab", 2)
	})
}

// Nothing is acknowledged before a majority of the founders vote: not after a restart, and not without Bootstrap.
func TestHoldOfFounders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		var shut atomic.Bool
		shut.Store(true)
		c.front = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if shut.Load() && filepath.Base(req.URL.Path) == "join" {
					http.NotFound(w, req)
					return
				}
				next.ServeHTTP(w, req)
			})
		}
		c.founders("abc")
		a := c.member("a")
		c.obey("elect L among a")
		for _, bootstrap := range [][]string{a.conf.Bootstrap, nil, {"z.test:7001"}} {
			a.conf.Bootstrap = bootstrap
			c.waits("a", "1 of 3 founders vote, and 2 must", "b.test:7001, c.test:7001")
			c.waits("b", "cluster "+shortID(a.s.Status().Cluster)+" answers at a.test:7001")
			if err := a.s.refuseHeld(); err == nil {
				t.Error("what others forward is not refused")
			}
			if _, ok := a.s.roundWith("", a.s.Status().Term); ok {
				t.Error("a round is answered")
			}
			if _, err := a.s.serveReadIndex(t.Context()); err == nil {
				t.Error("a read of another member is answered")
			}
			if _, err := a.s.servePropose(t.Context(), encodeOpen(firstFormat, [16]byte{1})); err == nil {
				t.Error("a session of another member is opened")
			}
			c.idFormat(a, identityFormat)
			c.obey("kill a")
			c.obey("restart a")
			c.obey("elect L among a")
		}
		shut.Store(false)
		c.whole("abc", 3)
		must(t, c.member("b").s.RemoveMember(t.Context(), "c.test:7001"))
		c.obey("stop c")
		for _, name := range []string{"a", "b"} { // the permission was given once
			c.obey("stop " + name)
			c.obey("restart " + name)
		}
		c.whole("ab", 2)
		if a.s.fsm.members.Load().allowed["c.test:7001"] {
			t.Error("an address that was removed is allowed again")
		}
	})
}

// A member that was away while a majority voted, and comes back when all have moved, finds that it may go on.
func TestHoldEndsByTheState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.founders("abc")
		c.whole("abc", 3)
		b := c.member("b")
		c.obey("stop b")
		ident, _, err := readIdentity(b.conf.Dir)
		must(t, err)
		ident.founders = "x.test:1,y.test:1,z.test:1"
		must(t, writeIdentity(b.conf.Dir, ident))
		c.obey("restart b")
		c.whole("abc", 3)
	})
}

// The member that began the cluster loses its directory before anybody else votes. Nothing was acknowledged, nobody can lead, and the
// words say what to do.
func TestFounderLostTooEarly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.front = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if filepath.Base(req.URL.Path) == "append" { // so that nobody gets the log, and a vote with it
					http.NotFound(w, req)
					return
				}
				next.ServeHTTP(w, req)
			})
		}
		c.founders("abc")
		if got := c.poll(ctxFor(t, scriptLimit), func() error {
			if c.member("b").s.Status().Cluster == "" || c.member("c").s.Status().Cluster == "" {
				return errors.New("not admitted")
			}
			return nil
		}); got != "ok" {
			t.Fatal(got)
		}
		c.wipe("a")
		c.obey("restart a")
		time.Sleep(3 * time.Second)
		c.waits("a", "nothing is acknowledged in it yet", "empty the directories of all founders")
		c.waits("b", "0 of 3 founders vote")
		c.front = nil
		for _, name := range []string{"a", "b", "c"} {
			c.wipe(name)
		}
		for _, name := range []string{"a", "b", "c"} {
			c.obey("restart " + name)
		}
		c.whole("abc", 3)
	})
}

// A founder that was killed between its new id and its first entry begins anew with the others, or alone and held if it is started
// without its list.
func TestFounderThatWasKilled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.founders("a", "a", "b")
		a := c.member("a")
		list := a.conf.Bootstrap
		half := func() identity {
			c.wipe("a")
			ident := identity{id: newID(), cluster: newID(), intent: intentBootstrap, founders: strings.Join(list, ",")}
			must(t, os.MkdirAll(a.conf.Dir, 0o700))
			must(t, writeIdentity(a.conf.Dir, ident))
			return ident
		}
		was := half()
		c.obey("restart a")
		c.waits("a", "b.test:7001 is silent")
		if now := a.s.ident(); now.intent != intentJoin || now.id == was.id {
			t.Errorf("it goes on as %+v, and was %+v: its list may be another one now", now, was)
		}
		ident := half()
		a.conf.Bootstrap = nil
		c.obey("restart a")
		c.obey("elect L among a")
		c.waits("a", "1 of 2 founders vote")
		if st := a.s.Status(); st.Cluster != ident.cluster || st.ID != ident.id {
			t.Errorf("%+v, want %+v", st, ident)
		}
		c.obey("start b")
		c.whole("ab", 2)
	})
}

// A blockFS lets nobody write id anew from the first write to the log on, once it is armed.
type blockFS struct {
	types.VFS
	dir   string
	armed atomic.Bool
}

func (f *blockFS) inTheWay() string { return filepath.Join(f.dir, "id.tmp", "in", "the", "way") }

func (f *blockFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	w, err := f.VFS.Create(dir, name, size)
	return blockFile{w, f}, err
}

type blockFile struct {
	types.WritableFile
	fs *blockFS
}

func (w blockFile) WriteAt(p []byte, off int64) (int, error) {
	if w.fs.armed.Swap(false) {
		if err := os.MkdirAll(w.fs.inTheWay(), 0o700); err != nil {
			return 0, err
		}
	}
	return w.WritableFile.WriteAt(p, off)
}

// What fails after the first entries are in the log is done again, with the id that they name.
func TestFoundingThatFailsHalfWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		disk := &blockFS{VFS: walfs.New()}
		disk.armed.Store(true)
		c.founders("b", "a", "b")
		list := c.member("b").conf.Bootstrap
		c.change = func(conf *Config) { conf.Bootstrap, conf.vfs, disk.dir = list, disk, conf.Dir }
		c.obey("start a")
		a := c.member("a")
		c.waits("a", "begin the founders' cluster", "id.tmp")
		if disk.armed.Load() || a.s.Err() == nil {
			t.Errorf("armed %t, Err %v", disk.armed.Load(), a.s.Err())
		}
		began, _, err := readIdentity(a.conf.Dir)
		must(t, err)
		must(t, os.RemoveAll(filepath.Join(a.conf.Dir, "id.tmp")))
		c.whole("ab", 2)
		must(t, a.s.tryBegin()) // as when only raft has not started
		c.whole("ab", 2)
		if now := a.s.ident(); now.id != began.id || now.cluster != began.cluster || now.intent != intentMember {
			t.Errorf("%+v has become %+v", began, now)
		}

		// A process that is killed at that point goes on at its next start.
		c.wipe("a")
		c.wipe("b")
		disk.armed.Store(true)
		c.obey("restart b")
		c.obey("restart a")
		c.waits("a", "begin the founders' cluster", "id.tmp")
		c.obey("kill a")
		began, _, err = readIdentity(a.conf.Dir)
		must(t, err)
		must(t, os.RemoveAll(filepath.Join(a.conf.Dir, "id.tmp")))
		c.obey("restart a")
		c.whole("ab", 2)
		if now := a.s.ident(); began.intent != intentBootstrap || now.id != began.id || now.cluster != began.cluster {
			t.Errorf("%+v has become %+v", began, now)
		}
	})
}

// Who asks to be admitted does not say that it is empty: the answer may be on its way.
func TestFounderThatAsksIsNotEmpty(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.obey("start b")
		c.founders("a", "a", "b")
		a := c.member("a")
		c.obey("cut b to a") // the answer to its call
		time.Sleep(3 * time.Second)
		if st := a.s.statusAnswer(); st.Empty && a.s.founding.asking.Load() {
			t.Errorf("%+v", st)
		}
		c.obey("heal")
		c.net.delay("b.test:7001", "a.test:7001", 300*time.Millisecond)
		if got := c.poll(ctxFor(t, 30*time.Second), func() error {
			if st := a.s.statusAnswer(); st.Empty || len(st.Founders) != 2 {
				return errors.New("it says that it is empty all the time")
			}
			return nil
		}); got != "ok" {
			t.Error(got)
		}
		c.obey("heal")
	})
}
