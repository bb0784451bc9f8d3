package quorate

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestHeir(t *testing.T) {
	own := statusAnswer{ID: "m", Role: "follower", Term: 5, LastTerm: 5, LastIndex: 100, LeaderID: "l", LeaderSilence: 150, Healthy: true}
	with := func(change func(a *statusAnswer)) statusAnswer {
		a := own
		a.ID, a.LeaderSilence = "z", 120
		change(&a)
		return a
	}
	same := with(func(*statusAnswer) {})
	back := func(index uint64) statusAnswer {
		return with(func(a *statusAnswer) { a.ID, a.LeaderID, a.LastIndex = "l", "", index })
	}
	for _, c := range []struct {
		name    string
		answers []statusAnswer
		all     int
		want    bool
	}{
		{"nobody answers", nil, 3, false},
		{"the other one of three doesn't hear it either", []statusAnswer{same}, 3, true},
		{"one of four is no majority", []statusAnswer{same}, 5, false},
		{"two of four are", []statusAnswer{same, same}, 5, true},
		{"it hears the leader", []statusAnswer{with(func(a *statusAnswer) { a.LeaderSilence = 99 })}, 3, false},
		{"it can't say", []statusAnswer{with(func(a *statusAnswer) { a.LeaderSilence, a.LastTerm = 0, 0 })}, 3, false},
		{"its id is smaller", []statusAnswer{with(func(a *statusAnswer) { a.ID = "b" })}, 3, false},
		{"its id is smaller and its log shorter", []statusAnswer{with(func(a *statusAnswer) { a.ID, a.LastIndex = "b", 99 })}, 3, true},
		{"its log is longer", []statusAnswer{with(func(a *statusAnswer) { a.LastIndex = 101 })}, 3, false},
		{"its log is longer and of an older term", []statusAnswer{with(func(a *statusAnswer) { a.LastIndex, a.LastTerm = 200, 4 })}, 3, true},
		{"its log is longer and it can't lead: the third one is enough",
			[]statusAnswer{with(func(a *statusAnswer) { a.LastIndex, a.Healthy = 101, false }), same, same}, 5, true},
		{"it is unfit to lead, and votes", []statusAnswer{with(func(a *statusAnswer) { a.ID, a.Unfit = "b", "full" })}, 3, true},
		{"it is unfit to lead, and its log is longer", []statusAnswer{with(func(a *statusAnswer) { a.LastIndex, a.Unfit = 101, "full" })}, 3, false},
		{"its disk has failed", []statusAnswer{with(func(a *statusAnswer) { a.Healthy = false })}, 3, false},
		{"it is a candidate", []statusAnswer{with(func(a *statusAnswer) { a.Role, a.LeaderID = "candidate", "" }), same, same}, 5, false},
		{"it has given the leader up", []statusAnswer{with(func(a *statusAnswer) { a.LeaderID = "" }), same, same}, 5, false},
		{"it follows another", []statusAnswer{with(func(a *statusAnswer) { a.LeaderID = "n" }), same, same}, 5, false},
		{"it leads", []statusAnswer{with(func(a *statusAnswer) { a.Role, a.LeaderID = "leader", "z" }), same, same}, 5, false},
		{"the leader leads again", []statusAnswer{with(func(a *statusAnswer) { a.ID, a.Role = "l", "leader" }), same, same}, 5, false},
		{"it stands, and has not given the leader up", []statusAnswer{with(func(a *statusAnswer) { a.Role = "candidate" }), same, same}, 5, false},
		{"it was removed, and votes no more", []statusAnswer{with(func(a *statusAnswer) { a.Role = "removed" })}, 3, false},
		{"it is of a newer term", []statusAnswer{with(func(a *statusAnswer) { a.Term = 6 }), same, same}, 5, false},
		{"the leader is back, with the same log", []statusAnswer{back(100)}, 3, true},
		{"the leader is back, with a longer log", []statusAnswer{back(101)}, 3, false},
		{"the leader is back, with a longer log, and there is the third one", []statusAnswer{back(101), same}, 3, true},
	} {
		if got := isHeir(own, c.answers, c.all); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// A member whose every call is refused, the leader's too, must not come back with a newer term: the leader would have to step down.
func TestCutOffRaisesNoTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		for _, line := range []string{"start a", "join b via a", "join c via a", "await voters 3", "cast leader L followers F G"} {
			c.obey(line)
		}
		f, l := c.member("F"), c.member("L")
		before := l.s.Status()
		c.net.serve(f.conf.Addr, nil)
		time.Sleep(5 * heartbeatTimeout)
		if st := f.s.Status(); st.Term != before.Term {
			t.Errorf("term %d while it is cut off, and %d before", st.Term, before.Term)
		}
		c.net.serve(f.conf.Addr, f.s)
		c.obey("set F k v")
		if st := l.s.Status(); st.Term != before.Term || st.Role != Leader {
			t.Errorf("%v of term %d, and the leader of term %d before", st.Role, st.Term, before.Term)
		}
	})
}
