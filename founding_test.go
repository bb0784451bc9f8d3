package quorate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
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
