package quorate

// How long disks take. It owns the newest few times of something that is done again and again, and the figure that stands for them. It
// never measures: logstore.go does, around its own writes.

import (
	"slices"
	"time"
)

const paceKept = 5

// A pace is the newest times that something took, paceKept at most. The zero value is ready.
type pace struct {
	took [paceKept]time.Duration
	n    int // how many there were in all
}

func (p *pace) add(took time.Duration) {
	p.took[p.n%paceKept] = took
	p.n++
}

// median is the middle one: above a limit if most of them are. 0 if there is none.
func (p *pace) median() time.Duration {
	n := min(p.n, paceKept)
	if n == 0 {
		return 0
	}
	list := p.took
	slices.Sort(list[:n])
	return max(list[n/2], 1)
}
