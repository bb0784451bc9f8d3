//go:build unix

package quorate

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Directories as a kill at some step of the first Open leaves them, each made by hand out of real parts; and kills at
// random moments.

func TestOpenAfterAKillWhileBootstrapping(t *testing.T) {
	t.Parallel()
	ident := func() identity { return identity{id: newID(), cluster: newID(), intent: intentBootstrap} }
	for name, h := range map[string]halfMade{
		"id only":             {ident: ident()},
		"id and wal":          {ident: ident(), wal: true},
		"id, wal and snap":    {ident: ident(), wal: true, snap: true},
		"term but no entry":   {ident: ident(), wal: true, term: true, snap: true},
		"term and no snap":    {ident: ident(), wal: true, term: true},
		"id and snap, no wal": {ident: ident(), snap: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMember(t, "")
			h.build(t, m)
			s := m.start()
			must(t, s.Set(t.Context(), "k", []byte("v")))
			if st := s.Status(); st.ID != h.ident.id || st.Cluster != h.ident.cluster || len(st.Members) != 1 {
				t.Errorf("%+v", st)
			}
			m.stop()
			if got := names(t, m.conf.Dir); got != "id snap wal" {
				t.Errorf("the directory holds %s", got)
			}
		})
	}
	t.Run("with a bootURL at the second try", func(t *testing.T) {
		c := newCluster(t, 1)
		m := newMember(t, c[0].conf.Addr)
		h := halfMade{ident: ident(), wal: true, term: true, snap: true}
		h.build(t, m)
		must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
		m.start()
		c.awaitMember(t, m)
		if st := m.s.Status(); st.ID == h.ident.id || st.Cluster != c[0].s.Status().Cluster {
			t.Errorf("an id that began a cluster joined another: %+v", st)
		}
		c.leave(t, m)
	})
	t.Run("no id", func(t *testing.T) {
		m := newMember(t, "")
		halfMade{ident: ident(), wal: true, snap: true}.build(t, m)
		must(t, os.Remove(filepath.Join(m.conf.Dir, "id")))
		_, err := m.open()
		is(t, err, ErrCorrupt, "id is missing", "put id back")
	})
}

func TestOpenAfterAKillWhileJoining(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	for name, h := range map[string]halfMade{
		"id only":           {},
		"id, wal and snap":  {wal: true, snap: true},
		"term but no entry": {wal: true, term: true, snap: true},
	} {
		for _, admitted := range []bool{false, true} {
			for _, told := range []bool{false, true} {
				if told && !admitted {
					continue
				}
				t.Run(fmt.Sprintf("%s, admitted %v, told %v", name, admitted, told), func(t *testing.T) {
					m := newMember(t, c[0].conf.Addr)
					h.ident = identity{id: newID(), intent: intentJoin}
					must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
					if admitted {
						admit(t, c[0], h.ident.id, m.conf.Addr)
					}
					if told {
						h.ident.cluster = c[0].s.Status().Cluster
					}
					h.build(t, m)

					m.conf.Join = ""
					_, err := m.open()
					is(t, err, ErrInvalid, "began by joining", "give the bootURL")
					m.conf.Join = c[0].conf.Addr
					m.start()
					c.awaitMember(t, m)
					if st := m.s.Status(); st.ID != h.ident.id || len(st.Members) != 2 {
						t.Errorf("%+v", st)
					}
					c.leave(t, m)
				})
			}
		}
	}
}

// A child process opens a directory and is killed some time after it has begun to write there.
func TestOpenKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	for round := range 30 {
		m := newMember(t, "")
		if round%2 == 1 {
			m.conf.Join = c[0].conf.Addr
			must(t, c[0].s.AddAllowedMember(t.Context(), m.conf.Addr))
		}
		p := &process{t: t, dir: m.conf.Dir, addr: m.conf.Addr, join: m.conf.Join}
		p.launch()
		eventually(t, patience, "a child that begins", func() error {
			_, err := os.Lstat(filepath.Join(p.dir, "wal"))
			return err
		})
		<-time.After(time.Duration(rand.IntN(60)) * time.Millisecond)
		p.kill()
		left := names(t, p.dir)
		if _, err := m.open(); err != nil {
			t.Fatalf("round %d, with %s: %v", round, left, err)
		}
		must(t, m.s.Set(ctxFor(t, patience), "k", []byte("v")))
		if round%2 == 1 {
			c.awaitMember(t, m)
			c.leave(t, m)
		} else {
			if n := len(m.s.Status().Members); n != 1 {
				t.Errorf("round %d: %d members", round, n)
			}
			m.stop()
		}
	}
}

// Founders in processes of their own are killed at any moment of their first start, and one of them loses its directory too. What comes of it is one cluster.
func TestFoundersKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	for round := range dose(2, 50) {
		var list []*process
		var addrs []string
		for range 3 {
			p := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), client: newClient(t, new(line))}
			t.Cleanup(p.stop)
			list, addrs = append(list, p), append(addrs, p.addr)
		}
		for _, p := range list {
			p.bootstrap = addrs
		}
		list[0].launch()
		list[1].launch()
		for i := range 4 {
			<-time.After(time.Duration(rand.IntN(250)) * time.Millisecond)
			p := list[rand.IntN(2+i/2)]
			p.kill()
			if i == round%2 { // while the third is silent there is no cluster; one of two voters would be a quorum
				must(t, os.RemoveAll(p.dir))
			}
			p.launch()
			if i == 1 {
				list[2].launch()
			}
		}
		eventually(t, patience, "one cluster of three", func() error {
			cluster := ""
			for _, p := range list {
				r, err := p.do(order{Op: "status"})
				switch {
				case err != nil:
					return err
				case r.Status.Cluster == "" || cluster != "" && r.Status.Cluster != cluster || countVoters(r.Status) != 3:
					return fmt.Errorf("%s: %+v, and another one is in cluster %s", p.addr, r.Status, cluster)
				}
				cluster = r.Status.Cluster
			}
			return nil
		})
		for _, p := range list {
			p.must(order{Op: "set", Key: p.addr})
		}
		for _, p := range list {
			p.kill()
		}
	}
}

// The first member loses its directory and is started again as at the very first time, with an empty bootURL: that makes a
// second cluster, whose only member the others still call.
func TestWipedFirstMember(t *testing.T) {
	t.Parallel()
	list := newProcesses(t)
	first, rest := list[0], list[1:]
	rest[0].must(order{Op: "set", Key: "k", Value: []byte("v")})
	cluster := rest[0].must(order{Op: "status"}).Status.Cluster
	wipe := func() {
		first.kill()
		must(t, os.RemoveAll(first.dir))
	}
	wipe()
	first.start()
	eventually(t, patience, "its Err", func() error {
		r, err := first.do(order{Op: "err"})
		must(t, err)
		for _, word := range []string{"members of cluster " + shortID(cluster), "know this address", "empty the directory and start with a bootURL"} {
			if !strings.Contains(r.Error, word) {
				return fmt.Errorf("Err is %q, without %q", r.Error, word)
			}
		}
		return nil
	})
	if r, err := first.do(order{Op: "set", Key: "foreign", Value: []byte("x")}); err != nil || r.Verdict != "not applied" {
		t.Errorf("a write on the wiped member: %v %+v", err, r)
	}
	if r, err := first.do(order{Op: "get", Key: "k"}); err != nil || r.Verdict == "ok" {
		t.Errorf("a read on the wiped member: %v %+v", err, r)
	}
	for _, p := range rest {
		p.awaitReady()
		p.must(order{Op: "set", Key: "k", Value: []byte("w")})
		if v := p.must(order{Op: "get", Key: "foreign"}).Value; v != nil {
			t.Errorf("a value of another cluster: %q", v)
		}
		p.must(order{Op: "err"})
	}
	if st := first.must(order{Op: "status"}).Status; len(st.Members) != 1 || st.Cluster == cluster {
		t.Errorf("the wiped member took part: %+v", st)
	}

	wipe()
	first.join = rest[1].addr
	first.start()
	first.awaitReady()
	eventually(t, patience, "three voters again", func() error {
		for _, p := range list {
			r, err := p.do(order{Op: "status"})
			if err != nil || countVoters(r.Status) != 3 || len(r.Status.Members) != 3 {
				return fmt.Errorf("%w %+v", errors.Join(err, errors.New("not yet")), r.Status)
			}
		}
		return nil
	})
	if v := first.must(order{Op: "get", Key: "k"}).Value; string(v) != "w" {
		t.Errorf("read %q", v)
	}
	if v := first.must(order{Op: "get", Key: "foreign"}).Value; v != nil {
		t.Errorf("a value of another cluster: %q", v)
	}
}

// An id has made promises with its state. Without it, beginning again under the same id would break them: alone the old data
// would be gone without a word, and beside the others two clusters would have one name.
func TestIDWithoutItsStateIsRefused(t *testing.T) {
	t.Parallel()
	for _, lost := range [][]string{{"snap", "wal"}, {"wal"}} {
		m := newMember(t, "")
		m.start()
		must(t, m.s.Set(ctxFor(t, 10*time.Second), "k", []byte("v")))
		m.stop()
		for _, name := range lost {
			must(t, os.RemoveAll(filepath.Join(m.conf.Dir, name)))
		}
		if _, err := m.open(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("without %v: %v, want ErrCorrupt", lost, err)
		}
	}
}
