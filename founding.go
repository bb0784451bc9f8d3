package quorate

// A first start that can be repeated: members that all have the same list of addresses, Config.Bootstrap, begin one cluster among
// them, and find it again when one of them has lost its directory. It owns what a member does from an empty directory to a cluster
// that it belongs to: what it says of itself meanwhile, whom it asks, and the decision, which is a function of what was heard in one
// pass (decide; founding_test.go plays it against wipes, cuts and lists that differ). After that it owns the hold: nothing is
// acknowledged before a majority of the founders vote. Control comes from recover.go's enter and goes on behind Open, because
// nobody listens at this member's address yet.
//
// Why two clusters of one list never come to life of which one has acknowledged a write:
//
//	(1) Only the smallest address begins one, and only when in one pass each other founder has said, at its own address, that it has
//	    the same list, that its directory is empty and that it is asking nobody to be admitted.
//	(2) A cluster acknowledges nothing before a majority of the founders vote in it. From then on a directory of each of these holds it.
//	(3) So while a cluster that has acknowledged is in the directory of any founder, that founder does not say that it is empty, and
//	    if it is silent nobody begins. Who has said that it is empty enters a cluster only by the answer to a call that it makes
//	    later, and the smallest address, whose directory was empty during the pass, leads none that could answer.
//
// All founders' directories emptied at once are a first start, for there is nobody who could know better.

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

const (
	maxFounders    = 64
	foundingSoon   = 20 * time.Millisecond // after a first pass, and then twice as long each time, up to
	foundingPace   = 200 * time.Millisecond
	refusedPace    = 10 * time.Second // to an answer that only a person can change
	foundingWait   = time.Second      // for an answer
	foundingLength = 3                // entries of a founded log: see firstEntries
)

// A founder is what a member without a cluster knows of itself.
type founder struct {
	addr, id string
	list     []string // Config.Bootstrap, in order
	admitted string   // the cluster that has admitted this member, which has none of its state yet; "" = none
	asking   bool     // to be admitted: the answer may make it a member at any time
}

// empty: nothing but a call that this member makes later can make it a member of anything.
func (f founder) empty() bool { return f.admitted == "" && !f.asking }

// A heard is what one address has answered in a pass.
type heard struct {
	addr   string
	status statusAnswer
	err    error // no status, and why
}

var errNotAsked = errors.New("nobody has asked it")

type stepKind int

const (
	stepWait stepKind = iota
	stepFound
	stepJoin
)

// A step is what to do after a pass.
type step struct {
	kind  stepKind
	at    []string // stepJoin: where the cluster answers
	fault error    // stepWait: what no waiting mends
	words string   // stepWait: what is missing
}

// decide is the whole decision. A cluster that answers is joined, whatever else is heard: it may have acknowledged writes.
func (f founder) decide(pass []heard) step {
	clusters := make(map[string][]string) // → where it answers
	if f.admitted != "" {
		clusters[f.admitted] = nil
	}
	for _, h := range pass {
		if c := h.status.Cluster; h.err == nil && validID(c) {
			clusters[c] = append(clusters[c], h.addr)
		}
	}
	switch len(clusters) {
	case 0:
		return f.decideAlone(pass)
	case 1:
		for c, at := range clusters {
			if len(at) == 0 {
				return step{words: fmt.Sprintf("cluster %s has admitted this member, and no founder answers for it: %s", shortID(c), troubles(pass))}
			}
			return step{kind: stepJoin, at: at}
		}
	}
	return step{fault: f.twoClusters(clusters)}
}

func (f founder) twoClusters(clusters map[string][]string) error {
	var list []string
	for _, c := range slices.Sorted(maps.Keys(clusters)) {
		where := "at " + strings.Join(clusters[c], ", ")
		if c == f.admitted {
			where = strings.TrimSuffix(where, "at ") + " (it has admitted this member)"
		}
		list = append(list, fmt.Sprintf("%s %s", shortID(c), strings.TrimSpace(where)))
	}
	return fmt.Errorf("%w: members of several clusters answer, and this one joins neither: %s: empty the directories of the members of the one that "+
		"is not to stay", ErrInvalid, strings.Join(list, "; "))
}

// decideAlone: nobody has a cluster, as far as is heard.
func (f founder) decideAlone(pass []heard) step {
	for _, h := range pass {
		if theirs := h.status.Founders; h.err == nil && h.status.ID != f.id && len(theirs) > 0 && !slices.Equal(theirs, f.list) {
			return step{fault: fmt.Errorf("%w: the founders' lists differ: Config.Bootstrap is %v here and %v at %s: give all of them the same one",
				ErrInvalid, f.list, theirs, h.addr)}
		}
	}
	by := make(map[string]heard)
	for _, h := range pass {
		by[h.addr] = h
	}
	var missing []string
	for _, addr := range f.list {
		h, asked := by[addr]
		if !asked {
			h = heard{addr: addr, err: errNotAsked}
		}
		if why := f.notWaiting(h); why != "" {
			missing = append(missing, addr+" "+why)
		}
	}
	switch {
	case len(missing) > 0:
		return step{words: "the founders wait for each other: " + strings.Join(missing, "; ")}
	case !slices.Contains(f.list, f.addr):
		return step{words: "this member is no founder, and joins when they have begun: " + strings.Join(f.list, ", ")}
	case f.addr != f.list[0]:
		return step{words: fmt.Sprintf("the founders are there, and %s is about to begin the cluster", f.list[0])}
	case !f.empty():
		return step{words: "this member asks to be admitted"}
	}
	return step{kind: stepFound}
}

// notWaiting says why what was heard is no word of a founder with an empty directory at its own address; "" if it is.
func (f founder) notWaiting(h heard) string {
	a := h.status
	switch {
	case h.addr == f.addr && (h.err != nil || a.ID == f.id):
		return "" // whether this member reaches itself matters to nobody here
	case h.addr == f.addr:
		return fmt.Sprintf("is this member's own address, and member %s answers there", shortID(a.ID))
	case h.err != nil:
		return fmt.Sprintf("is silent (%v)", h.err)
	case len(a.Founders) == 0:
		return "does not wait for founders: its release does not know Bootstrap, or it was started without"
	case a.Addr != h.addr || a.ID == f.id || !validID(a.ID):
		return fmt.Sprintf("is not its own address: member %s, of %s, answers there", shortID(a.ID), a.Addr)
	case !a.Empty:
		return "asks to be admitted to a cluster"
	}
	return ""
}

// troubles are the errors of a pass, for people.
func troubles(pass []heard) string {
	var list []string
	for _, h := range pass {
		if h.err != nil {
			list = append(list, fmt.Sprintf("%s is silent (%v)", h.addr, h.err))
		}
	}
	return strings.Join(list, "; ")
}

// votes counts the founders that vote in a configuration, and says how many must before anything is acknowledged.
func votes(founders []string, c raft.Configuration) (have, need int) {
	for _, v := range voters(c) {
		if slices.Contains(founders, string(v.Address)) {
			have++
		}
	}
	return have, len(founders)/2 + 1
}

// checkFounders gives a list its one form: canonical, in order, without duplicates.
func checkFounders(given []string) ([]string, error) {
	if len(given) > maxFounders {
		return nil, fmt.Errorf("%w: Bootstrap names %d founders, and can name %d", ErrInvalid, len(given), maxFounders)
	}
	var list []string
	for _, addr := range given {
		addr, err := canonicalAddr(addr)
		if err != nil {
			return nil, fmt.Errorf("Bootstrap: %w", err)
		}
		if slices.Contains(list, addr) {
			return nil, fmt.Errorf("%w: Bootstrap names %s twice", ErrInvalid, addr)
		}
		list = append(list, addr)
	}
	slices.Sort(list)
	return list, nil
}
