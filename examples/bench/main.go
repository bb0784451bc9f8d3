// Bench measures quorate and what else a Go program can embed for the same purpose, side by side: three members of each as three
// processes of this machine, with data on its disk and fsync on, under the same closed-loop driver inside the members' processes.
// It prints a Markdown report and writes it, a plot, and every single result to the directory that -out names:
//
//	go run .                                                everything: some two hours
//	go run . -rounds 1 -cell 1s -warmup 500ms -life none    a first look: some minutes
//	go run . -merge a/results.jsonl,b/results.jsonl         one report of several runs
//
// README.md says what is configured how, and what the figures mean. It runs on Linux.
//
// The code: main.go (the plan of a run), cluster.go (three processes), member.go (one of them), driver.go (its workers), life.go (the
// figures of starts, ends and sizes), report.go and plot.go; one file for each system.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const allCells = "set/1,set/16,set/64,set/256,set/1024,set/64@follower,get/1,get/64,get/256,get/1@follower,get/64@follower,get/256@follower," +
	"stale/1@follower,stale/64@follower,mix/64,insert/64" // the last one leaves more keys behind than it found

func main() {
	log.SetFlags(0)
	if len(os.Args) == 2 && os.Args[1] == "member" {
		if err := serveMember(os.Stdin, os.Stdout); err != nil {
			log.Fatal(err)
		}
		return
	}
	b, err := parseFlags()
	if err != nil {
		log.Fatal(err)
	}
	if err := b.measure(); err != nil {
		log.Fatal(err)
	}
	if b.faulty {
		log.Fatalf("something failed or was wrong: see the report; the members' directories and logs are kept in %s", b.dir)
	}
}

// A bench is one call of the program.
type bench struct {
	kinds        []kind
	cells        []cell
	rounds       int
	cell, warmup time.Duration
	life         []string
	lifeRounds   int
	sizes        []int
	dir, out     string
	merge        []string
	profile      bool

	results       io.Writer // a line for each record
	records       []record
	began         time.Time
	done, planned int  // cells
	faulty        bool // some record could not be had, or is bad: what the members left is kept
}

// A record is one result: of a cell, or one figure of a life. It is a line of results.jsonl.
type record struct {
	Time   time.Time
	Round  int     `json:",omitempty"`
	System string  `json:",omitempty"`
	Cell   string  `json:",omitempty"` // if it is of a cell
	Figure string  `json:",omitempty"` // if it is of a life: "restart/100000"
	Value  float64 `json:",omitempty"`
	Unit   string  `json:",omitempty"`
	Error  string  `json:",omitempty"` // it could not be had

	Rate          float64       `json:",omitempty"` // operations a second
	P50, P99, Max time.Duration `json:",omitempty"`
	Errors, Wrong uint64        `json:",omitempty"`
	FirstError    string        `json:",omitempty"`
	FirstBad      string        `json:",omitempty"`
	CPULeader     float64       `json:",omitempty"` // µs for one write
	CPUFollower   float64       `json:",omitempty"`
	Written       float64       `json:",omitempty"` // bytes that a member wrote for a byte of key and value
	Elsewhere     float64       `json:",omitempty"` // of the machine's processors, the share that was used by others than this cluster
	Moved         bool          `json:",omitempty"` // the leader was another one afterwards

	About *about `json:",omitempty"` // if it is the first line of a run
}

// An about says where and how a run was made.
type about struct {
	CPUs             int
	Kernel, FS, Go   string
	Fsync            time.Duration // median time of a write of 4 KiB and its fdatasync
	Versions         map[string]string
	Cell, Warmup     time.Duration
	Rounds, LifeRuns int
}

func parseFlags() (*bench, error) {
	b := &bench{}
	var names []string
	for _, k := range kinds {
		names = append(names, k.name)
	}
	systems := flag.String("systems", strings.Join(names, ","), "to measure")
	cells := flag.String("cells", "all", "operation/workers[@follower] of set, insert, get, stale, mix; or all, or none")
	flag.IntVar(&b.rounds, "rounds", 5, "of all cells; 0 measures no cell")
	flag.DurationVar(&b.cell, "cell", 5*time.Second, "how long a cell is measured")
	flag.DurationVar(&b.warmup, "warmup", 2*time.Second, "how long it runs before that")
	life := flag.String("life", "all", "figures of "+strings.Join(lifeFigures, ",")+"; or all, or none")
	flag.IntVar(&b.lifeRounds, "life-rounds", 1, "rounds that have them too")
	sizes := flag.String("keys", "100000,1000000", "states in which a life is measured")
	flag.StringVar(&b.dir, "dir", "data", "where the members keep their data: on the disk that is to be measured")
	flag.StringVar(&b.out, "out", "data/out", "where report.md, plot.svg and results.jsonl go")
	flag.BoolVar(&b.profile, "profile", false, "also write CPU profiles of each cell, one by each member's process, to -out")
	merge := flag.String("merge", "", "results.jsonl files of earlier runs to be reported together; nothing is measured")
	flag.Parse()
	if flag.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if *merge != "" {
		b.merge = strings.Split(*merge, ",")
	}
	for name := range strings.SplitSeq(*systems, ",") {
		i := slices.Index(names, name)
		if i < 0 {
			return nil, fmt.Errorf("no system %q: there are %s", name, strings.Join(names, ", "))
		}
		b.kinds = append(b.kinds, kinds[i])
	}
	for _, name := range listFlag(*cells, allCells) {
		c, err := parseCell(name)
		if err != nil {
			return nil, err
		}
		b.cells = append(b.cells, c)
	}
	for _, name := range listFlag(*life, strings.Join(lifeFigures, ",")) {
		if !slices.Contains(lifeFigures, name) {
			return nil, fmt.Errorf("no figure %q: there are %s", name, strings.Join(lifeFigures, ", "))
		}
		b.life = append(b.life, name)
	}
	for text := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < cellKeys {
			return nil, fmt.Errorf("keys %q: at least %d", text, cellKeys)
		}
		b.sizes = append(b.sizes, n)
	}
	slices.Sort(b.sizes)
	b.planned = b.rounds * len(b.cells) * len(b.kinds)
	return b, nil
}

func listFlag(given, all string) []string {
	switch given {
	case "none":
		return nil
	case "all":
		given = all
	}
	return strings.Split(given, ",")
}

func (b *bench) measure() (err error) {
	if len(b.merge) > 0 {
		if b.records, err = readRecords(b.merge); err != nil {
			return err
		}
		return b.report()
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	results, err := os.Create(filepath.Join(b.out, "results.jsonl"))
	if err != nil {
		return err
	}
	defer results.Close()
	b.results, b.began = results, time.Now()
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	if b.out, err = filepath.Abs(b.out); err != nil {
		return err
	}
	about, err := b.describe()
	if err != nil {
		return err
	}
	b.add(record{About: about})
	interrupted := make(chan os.Signal, 1) // the cell or the life under way is finished, and what there is is reported
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	stopped := func() bool { return len(interrupted) > 0 }
	for round := 1; round <= max(b.rounds, b.lifeRounds) && !stopped(); round++ {
		if round <= b.rounds && len(b.cells) > 0 {
			b.roundOfCells(round, stopped)
		}
		for _, k := range b.kinds {
			if round <= b.lifeRounds && len(b.life) > 0 && !stopped() {
				b.liveOnce(k, round)
			}
		}
	}
	return errors.Join(b.report(), b.tidy())
}

// tidy removes the gigabytes that the members leave behind; their logs are of use if something has failed.
func (b *bench) tidy() error {
	if b.faulty {
		return nil
	}
	var errs []error
	for _, k := range b.kinds {
		errs = append(errs, os.RemoveAll(filepath.Join(b.dir, k.name)))
	}
	return errors.Join(errs...)
}

func (b *bench) describe() (*about, error) {
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	a := &about{CPUs: runtime.NumCPU(), Go: runtime.Version(), Versions: map[string]string{}, Cell: b.cell, Warmup: b.warmup,
		Rounds: b.rounds, LifeRuns: b.lifeRounds}
	if kernel, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		a.Kernel = strings.TrimSpace(string(kernel))
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(b.dir, &fs); err != nil {
		return nil, err
	}
	const tmpfs, ramfs = 0x01021994, 0x858458f6
	if fs.Type == tmpfs || fs.Type == ramfs {
		return nil, fmt.Errorf("%s is in memory: an fsync there costs nothing, so give a -dir on a disk", b.dir)
	}
	a.FS = fmt.Sprintf("%#x", fs.Type)
	if name := map[int64]string{0xef53: "ext4", 0x58465342: "xfs", 0x9123683e: "btrfs", 0x794c7630: "overlayfs"}[int64(fs.Type)]; name != "" {
		a.FS = name
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			a.Versions[m.Path] = m.Version
		}
	}
	var err error
	a.Fsync, err = fsyncTime(b.dir)
	return a, err
}

// fsyncTime is the median of what one small durable write costs: the floor under every figure of a single writer.
func fsyncTime(dir string) (time.Duration, error) {
	f, err := os.CreateTemp(dir, "fsync-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var took []time.Duration
	for range 200 {
		began := time.Now()
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// roundOfCells starts all systems and measures cell by cell, each on all of them, so that whatever else the machine does meets them alike.
// Those that wait are idle.
func (b *bench) roundOfCells(round int, stopped func() bool) {
	var clusters []*cluster
	defer func() {
		for _, c := range clusters {
			c.stop()
		}
	}()
	for _, k := range b.kinds {
		b.say(round, k.name, "start", "")
		c, err := b.prepare(k)
		if err == nil {
			clusters = append(clusters, c)
			continue
		}
		if c != nil {
			c.stop()
		}
		r := record{Round: round, System: k.name, Cell: "start", Error: err.Error()} // the others still have their round
		b.add(r)
		b.say(round, k.name, r.Cell, r.summary())
		b.done += len(b.cells)
	}
	for i, cell := range b.cells {
		for j := range clusters {
			if stopped() {
				return
			}
			c := clusters[(i+j+round)%len(clusters)] // none has its turn always after the same neighbour
			r := record{Round: round, System: c.kind.name, Cell: cell.String()}
			if err := b.runCell(c, cell, cellKeys, &r); err != nil {
				r.Error = err.Error()
			}
			b.done++
			b.add(r)
			b.say(round, c.kind.name, cell.String(), r.summary())
		}
	}
}

// prepare starts a cluster, loads the keys of the cells, and looks whether every member tells the truth about them.
func (b *bench) prepare(k kind) (*cluster, error) {
	c, err := newCluster(k, filepath.Join(b.dir, k.name))
	if err != nil {
		return nil, err
	}
	if err := c.start(); err != nil {
		return c, err
	}
	if err := c.load(0, cellKeys, loaders); err != nil {
		return c, err
	}
	return c, b.checkLoaded(c, 0, cellKeys)
}

// checkLoaded wants some of the keys from..to on every member, and every member to refuse an insert of one.
func (b *bench) checkLoaded(c *cluster, from, to int) error {
	loaded := map[string]uint64{}
	for i := from; i < to; i += max(1, (to-from)/sampleSize) {
		loaded[keyAt(i)] = uint64(i)
	}
	for _, p := range c.members {
		if _, err := b.verify(p, loaded); err != nil {
			return err
		}
		if _, err := p.ask(request{Do: "refuse", Key: keyAt(from), Limit: grace}); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) verify(p *process, acked map[string]uint64) (answer, error) {
	a, err := p.ask(request{Do: "verify", Acked: acked, Limit: time.Minute})
	if err == nil && a.Wrong > 0 {
		err = fmt.Errorf("%s: %d of %d acknowledged writes are not there: %s", p.name(), a.Wrong, len(acked), a.Bad)
	}
	return a, err
}

// runCell runs one cell on a cluster and puts what came of it into r. What was acknowledged is then read through another member.
func (b *bench) runCell(c *cluster, cell cell, keys int, r *record) error {
	leader, followers, err := c.leader()
	if err != nil {
		return err
	}
	target, other := leader, followers[0]
	if cell.Follower {
		target, other = other, target
	}
	before, machine, err := c.usages()
	if err != nil {
		return err
	}
	o := c.order(order{Cell: cell, Keys: keys, Warmup: b.warmup, For: b.cell})
	if b.profile {
		name := strings.ReplaceAll(fmt.Sprintf("%s-%s-%d", r.System, r.Cell, r.Round), "/", "-")
		for i, p := range c.members {
			path := filepath.Join(b.out, fmt.Sprintf("%s-member%d.pprof", name, i))
			if _, err := p.ask(request{Do: "profile", Profile: path, For: b.warmup + b.cell, Limit: grace}); err != nil {
				return err
			}
		}
	}
	a, err := target.ask(request{Do: "run", Order: o, Limit: b.warmup + b.cell + 2*grace})
	if err != nil {
		return err
	}
	after, machineAfter, err := c.usages()
	if err != nil {
		return err
	}
	res := a.Result
	r.Rate, r.P50, r.P99, r.Max = res.rate(), res.P50, res.P99, res.Max
	r.Errors, r.FirstError, r.Wrong, r.FirstBad = res.Errors, res.FirstError, res.Wrong, res.FirstBad
	own, leads := time.Duration(0), slices.Index(c.members[:], leader)
	for i := range after {
		used := after[i].CPU - before[i].CPU
		own += used
		if !cell.writes() || res.Total == 0 {
			continue
		}
		perWrite := float64(used) / float64(time.Microsecond) / float64(res.Total)
		if i == leads {
			r.CPULeader = perWrite
		} else {
			r.CPUFollower += perWrite / 2
		}
		r.Written += float64(after[i].Written-before[i].Written) / 3 / float64(res.Total*(keyBytes+valueBytes))
	}
	r.Elsewhere = max(0, float64(machineAfter-machine-own)/float64(b.warmup+b.cell)/float64(runtime.NumCPU()))
	now, _, err := c.leader()
	if err != nil {
		return err
	}
	r.Moved = now != leader
	if res.Ops == 0 {
		return fmt.Errorf("no operation ended in time; the first of %d errors: %s", res.Errors, res.FirstError)
	}
	_, err = b.verify(other, res.Acked)
	return err
}

func (c *cluster) usages() (all [3]usage, machine time.Duration, err error) {
	for i, p := range c.members {
		if all[i], err = p.usage(); err != nil {
			return all, 0, err
		}
	}
	machine, err = machineCPU()
	return all, machine, err
}

func (b *bench) add(r record) {
	r.Time = time.Now().UTC().Truncate(time.Millisecond)
	b.records = append(b.records, r)
	b.faulty = b.faulty || r.Error != "" || r.Wrong > 0
	line, err := json.Marshal(r)
	if err == nil {
		_, err = b.results.Write(append(line, '\n'))
	}
	if err != nil {
		log.Print("results: ", err)
	}
}

func (r record) summary() string {
	switch {
	case r.Error != "":
		return "FAILED: " + r.Error
	case r.Figure != "":
		return fmt.Sprintf("%s %s", number3(r.Value), r.Unit)
	}
	text := fmt.Sprintf("%s/s, median %s ms, p99 %s ms", number3(r.Rate), millis(r.P50), millis(r.P99))
	if r.Errors > 0 {
		text += fmt.Sprintf(", %d errors (%s)", r.Errors, r.FirstError)
	}
	if r.Wrong > 0 {
		text += fmt.Sprintf(", %d WRONG (%s)", r.Wrong, r.FirstBad)
	}
	if r.Moved {
		text += ", the leader moved"
	}
	return text
}

// say is the progress line.
func (b *bench) say(round int, system, what, came string) {
	left := ""
	if b.done > 0 && b.done < b.planned {
		each := time.Since(b.began) / time.Duration(b.done)
		left = fmt.Sprintf("  [%d of %d cells, %v left]", b.done, b.planned, (each * time.Duration(b.planned-b.done)).Round(time.Second))
	}
	log.Printf("round %d  %-11s  %-16s  %s%s", round, system, what, came, left)
}
