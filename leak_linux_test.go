package quorate

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

// A footprint is what this process holds.
type footprint struct {
	goroutines, descriptors int
	heap, resident          int64 // bytes
}

func (f footprint) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %d KiB of heap, %d MiB resident", f.goroutines, f.descriptors, f.heap>>10, f.resident>>20)
}

func footprintNow(t *testing.T) footprint {
	t.Helper()
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	open, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	text, err := os.ReadFile("/proc/self/statm")
	must(t, err)
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	must(t, err)
	return footprint{runtime.NumGoroutine(), len(open), int64(m.HeapAlloc), pages * int64(os.Getpagesize())}
}

// steady repeats what leaves nothing behind, and compares what is held after the last time with what was after the first few. So
// many connections of a running cluster may come and go meanwhile.
func steady(t *testing.T, few, all, connections int, f func(i int)) {
	t.Helper()
	for i := range few {
		f(i)
	}
	before := footprintNow(t)
	for i := few; i < all; i++ {
		f(i)
	}
	var after footprint
	eventually(t, patience, "nothing is left behind", func() error {
		after = footprintNow(t)
		switch {
		case after.goroutines > before.goroutines+3*connections, after.descriptors > before.descriptors+2*connections, after.heap > before.heap+2<<20, after.resident > before.resident+48<<20:
			return fmt.Errorf("%v after %d times, and %v after %d", before, few, after, all)
		}
		return nil
	})
	t.Logf("after %d times %v, after %d %v", few, before, all, after)
}

// TestCampaignLeaks opens and closes a member, lets one join and removes it, again and again.
func TestCampaignLeaks(t *testing.T) {
	t.Run("alone", func(t *testing.T) {
		m := newMember(t, "")
		steady(t, 5, dose(15, 110), 0, func(i int) {
			s := m.start()
			must(t, s.Set(ctxFor(t, patience), fmt.Sprint("k", i%10), []byte("v")))
			wantGet(t, s, fmt.Sprint("k", i%10), []byte("v"))
			m.stop()
			wantOnly(t, m.conf.Dir, "id", "snap", "wal")
		})
	})
	t.Run("one of three", func(t *testing.T) {
		c := newCluster(t, 3)
		m := c.follower(t)
		steady(t, 3, dose(6, 105), 8, func(i int) {
			m.stop()
			m.start()
			must(t, m.s.Ready(ctxFor(t, patience)))
			must(t, m.s.Set(ctxFor(t, patience), "k", []byte(fmt.Sprint(i))))
			m.idle()
		})
	})
	t.Run("a fourth one joins and is removed", func(t *testing.T) {
		c := newCluster(t, 3)
		m := newMember(t, c[0].conf.Addr)
		steady(t, 1, dose(3, 102), 8, func(int) {
			must(t, c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
			m.start()
			append(c, m).awaitVoters(t, 4)
			must(t, c[0].s.RemoveMember(ctxFor(t, patience), m.conf.Addr))
			eventually(t, patience, "it knows", func() error {
				if err := m.s.Err(); !errors.Is(err, ErrRemoved) {
					return fmt.Errorf("Err is %v", err)
				}
				return nil
			})
			m.stop()
			must(t, os.RemoveAll(m.conf.Dir))
			for _, m := range append(c, m) {
				m.idle()
			}
		})
		for _, m := range c {
			files, err := filepath.Glob(filepath.Join(m.conf.Dir, "*"))
			must(t, err)
			if len(files) > 5 { // id, snap, snap-shm, snap-wal, wal
				t.Errorf("%v", files)
			}
		}
	})
}

// idle closes the connections that the member keeps for its next calls: they end by themselves, later.
func (m *testMember) idle() { m.conf.Client.Transport.(*http.Transport).CloseIdleConnections() }
