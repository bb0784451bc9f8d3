package quorate

import (
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// The fault campaign: tests named TestCampaign… inject what breaks in the night, and count it. go test runs a short dose of each;
//
//	QUORATE_CAMPAIGN=10m go test -run TestCampaign -timeout 0 .
//
// runs the long one: histories go on for so long, the other tests go through all of their cases. It shows on the terminal how far it
// is, and at the end a table of what was counted (with -v also where there is no terminal).

const campaignEnv = "QUORATE_CAMPAIGN"

// ownEnvs are what tests set for the processes that they start, which run this binary and have no campaign of their own.
var ownEnvs = []string{processEnv, childEnv, syncsEnv, powerEnv, logEnv, ioEnv, followerEnv, quotaEnv}

// powerEnv, logEnv, ioEnv, followerEnv and quotaEnv are the directories of what is traced: members, a log and a store alone.
const (
	powerEnv    = "QUORATE_TEST_POWER"
	logEnv      = "QUORATE_TEST_LOG"
	ioEnv       = "QUORATE_TEST_IO"
	followerEnv = "QUORATE_TEST_FOLLOWER"
	quotaEnv    = "QUORATE_TEST_QUOTA"
)

// processEnv holds what a member in a process of its own is told.
const processEnv = "QUORATE_TEST_MEMBER"

// campaign is how long the tests with a time of their own go on; without QUORATE_CAMPAIGN they end as soon as they can.
func campaign(t testing.TB) time.Duration {
	text := os.Getenv(campaignEnv)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	must(t, err)
	return d
}

// dose is how many cases a test goes through: short ones in go test, long ones in a campaign.
func dose(short, long int) int {
	if os.Getenv(campaignEnv) == "" {
		return short
	}
	return long
}

// A tally is one line of the campaign's table.
type tally struct{ atomic.Int64 }

func (c *tally) add(n int) { c.Add(int64(n)) }

// counted is what this process has counted.
var counted struct {
	operations   tally // calls of clients in checked histories
	faults       tally // struck during histories
	kills        tally // kill -9 of a real process
	powerCuts    tally // of a log, a state file or a whole directory
	ioPoints     tally // I/O calls that failed, each in a run of its own
	corruptions  tally // files with flipped bits or dropped pieces
	staleMisses  tally // of them missed by Stale before the file check of the start had ended, as documented
	hostileCases tally // requests and calls that must change nothing
	simulations  tally // runs of a whole cluster in a bubble
	undecided    tally // keys of histories that are too hard for the checker
	violations   tally // of anything that is promised
}

var tallies = []struct {
	name string
	of   *tally
}{
	{"operations", &counted.operations}, {"faults", &counted.faults}, {"kills", &counted.kills}, {"power cuts", &counted.powerCuts},
	{"I/O calls failed", &counted.ioPoints}, {"corrupted files", &counted.corruptions}, {"of them missed by Stale for a while", &counted.staleMisses},
	{"hostile cases", &counted.hostileCases}, {"simulated runs", &counted.simulations}, {"undecided keys", &counted.undecided},
	{"violations", &counted.violations},
}

// violated fails the test and counts it.
func violated(t testing.TB, format string, args ...any) {
	t.Helper()
	counted.violations.add(1)
	t.Errorf(format, args...)
}

func TestMain(m *testing.M) {
	// Tests that run side by side mostly wait, for elections and disks. Whoever gives -parallel gets what he gives.
	if err := flag.Set("test.parallel", strconv.Itoa(3*runtime.GOMAXPROCS(0))); err != nil {
		panic(err)
	}
	if os.Getenv(campaignEnv) == "" || slices.ContainsFunc(ownEnvs, func(name string) bool { return os.Getenv(name) != "" }) {
		os.Exit(m.Run())
	}
	began, out := time.Now(), io.Writer(os.Stderr)
	if tty, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil { // go test shows the rest when the package has ended, if at all
		out = tty
	}
	ended := make(chan int)
	go func() { ended <- m.Run() }()
	for {
		select {
		case code := <-ended:
			fmt.Fprintf(out, "\n| campaign of %v | |\n|---|---:|\n", time.Since(began).Round(time.Second))
			for _, c := range tallies {
				fmt.Fprintf(out, "| %s | %d |\n", c.name, c.of.Load())
			}
			os.Exit(code)
		case <-time.After(10 * time.Second):
			var line strings.Builder
			for _, c := range tallies {
				if n := c.of.Load(); n > 0 {
					fmt.Fprintf(&line, ", %d %s", n, c.name)
				}
			}
			fmt.Fprintf(out, "campaign: %v%s\n", time.Since(began).Round(time.Second), line.String())
		}
	}
}
