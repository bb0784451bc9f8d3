package quorate

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// What happens to the disk under a member in a process of its own: it is full, its files are removed, or the process gets no descriptor
// more.

// disks are file systems in memory, one for each member, whose size can be changed. Whoever is not root has none.
type disks struct {
	t     *testing.T
	dir   string
	roots map[*process]string
}

const diskSize = "size=8g" // far more than is ever used, and nothing of it is taken before

// newDisks comes before the processes, so that it ends after them.
func newDisks(t *testing.T) *disks {
	d := &disks{t, t.TempDir(), make(map[*process]string)}
	t.Cleanup(func() {
		for _, root := range d.roots {
			syscall.Unmount(root, syscall.MNT_DETACH)
		}
	})
	return d
}

// give puts the directory of a process that is not started yet on a disk of its own.
func (d *disks) give(p *process) {
	root := filepath.Join(d.dir, fmt.Sprint(len(d.roots)))
	must(d.t, os.MkdirAll(root, 0o700))
	if err := syscall.Mount("none", root, "tmpfs", 0, diskSize); err != nil {
		d.t.Logf("no disk can be full here: %v", err)
		return
	}
	d.roots[p] = root
	p.dir = filepath.Join(root, "data")
}

// fill takes all space that these have left, again and again: a member gives back what it holds in reserve.
func (d *disks) fill(lasts time.Duration, list ...*process) {
	for end := time.Now().Add(lasts); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
		for _, p := range list {
			var st syscall.Statfs_t
			must(d.t, syscall.Statfs(d.roots[p], &st))
			used := int64(st.Blocks-st.Bfree) * st.Bsize
			d.resize(p, fmt.Sprint("size=", used)) // fails if the member has just taken more
		}
	}
	for _, p := range list {
		must(d.t, d.resize(p, diskSize))
	}
}

func (d *disks) resize(p *process, size string) error {
	return syscall.Mount("none", d.roots[p], "tmpfs", syscall.MS_REMOUNT, size)
}

// withoutDescriptors has this process open nothing for a while.
func withoutDescriptors(lasts time.Duration) error {
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		return err
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	now := was
	now.Cur = uint64(len(open) - 1) // without that of the listing
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
		return err
	}
	<-time.After(lasts)
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was)
}

// faultsOfDisks are those of the disks.
func faultsOfDisks(t *testing.T, rnd *rand.Rand, list []*process, disks *disks) []fault {
	lasts := func() time.Duration { return time.Duration(1000+rnd.IntN(2000)) * time.Millisecond }
	leader := func() *process { return leaderProcess(t, list) }
	some := func() *process { return list[rnd.IntN(len(list))] }
	removed := func(p *process, pattern string) {
		names, err := filepath.Glob(filepath.Join(p.dir, pattern))
		must(t, err)
		for _, name := range names {
			must(t, os.RemoveAll(name))
		}
		<-time.After(lasts())
		wipeProcess(t, list, p)
		p.start()
		awaitVoters(t, list)
	}
	faults := []fault{
		{name: "the leader has no descriptor left", strike: func() { leader().must(order{Op: "descriptors", Timeout: lasts()}) }},
		{name: "the directory of the leader is removed", strike: func() { removed(leader(), "") }},
		{name: "the directory of one is removed", strike: func() { removed(some(), "") }},
		{name: "the log of the leader is removed", strike: func() { removed(leader(), "wal/*") }},
	}
	if len(disks.roots) < len(list) {
		return faults
	}
	return append(faults,
		fault{name: "the disk of the leader is full", strike: func() { disks.fill(lasts(), leader()) }},
		fault{name: "the disk of one is full", strike: func() { disks.fill(lasts(), some()) }},
		fault{name: "the disks of all are full", strike: func() { disks.fill(lasts(), list...) }})
}
