package quorate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallDisk is a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
		if os.Getenv("CI") == "true" && os.Getuid() == 0 {
			t.Fatalf("mount a small file system: %v", err)
		}
		t.Skipf("mount a small file system, as root can: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// A transaction that has met a full disk half-way is no foreign write to the next one.
func TestFlushAfterAFullDisk(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "1m")
	s := openTestStore(t, filepath.Join(dir, "snap"), -1)
	put(t, s, "k", "v")
	must(t, s.writer.pragma("cache_size=2")) // SQLite writes before the commit, as it does when there is much
	tx, err := s.begin()
	must(t, err)
	for i := range 20 {
		setTx(t, tx, fmt.Sprint("large", i), []byte(strings.Repeat("v", 100<<10)))
	}
	tx.commit()
	for range 2 {
		if err := s.flush(); !isFull(err) || isIO(err) {
			t.Fatalf("flush: %v", err)
		}
	}
	must(t, syscall.Mount("none", dir, "tmpfs", syscall.MS_REMOUNT, "size=32m"))
	if same, err := s.asWeLeftIt(); !same || err != nil {
		t.Error("the witness takes it for somebody else's:", err)
	}
	must(t, s.flush())
	if _, rows := fileState(t, s); len(rows) != 21 {
		t.Errorf("%d rows", len(rows))
	}
}

// A file system that is really full, under the log and the state of one member of three.
func TestFullFileSystem(t *testing.T) {
	t.Parallel()
	small := smallDisk(t, "160m")
	n := 0
	c := newCluster(t, 3, func(conf *Config) {
		if n++; n == 3 {
			conf.Dir = filepath.Join(small, "data")
		}
	})
	m := c[2]
	for _, role := range []string{"a follower's", "the leader's"} {
		t.Run(role, func(t *testing.T) {
			if role == "the leader's" {
				eventually(t, 30*time.Second, "it leads", func() error {
					if l := c.leader(t); l != m {
						l.s.raft.Load().LeadershipTransfer().Error()
						return errors.New("another one does")
					}
					return nil
				})
			}
			hog := filepath.Join(small, "hog")
			f, err := os.Create(hog)
			must(t, err)
			for block := make([]byte, 1<<20); err == nil; {
				if _, err = f.Write(block); err != nil && len(block) > 1 {
					block, err = block[:len(block)/2], nil
				}
			}
			must(t, f.Close())
			value := make([]byte, 256<<10)
			copy(value, t.Name())
			for i := range 80 { // more than the log has left of its segment
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				err := c[0].s.Set(ctx, fmt.Sprint("k", i%3), value)
				cancel()
				if err != nil && (!errors.Is(err, ErrUncertain) && !errors.Is(err, ErrNotApplied)) {
					t.Fatal(err)
				}
			}
			other := c.leaderOtherThan(t, m)
			must(t, other.s.Set(ctxFor(t, 20*time.Second), "on", nil))
			eventually(t, 30*time.Second, "a full disk in Err", func() error { // on a slow machine it hangs first
				if err := m.s.Err(); !isFull(err) {
					return fmt.Errorf("Err is %v", err)
				}
				return nil
			})
			if err := m.s.Ready(ctxFor(t, 200*time.Millisecond)); err == nil {
				t.Error("a member that can't apply is ready")
			}
			must(t, os.Remove(hog))
			must(t, m.s.Ready(ctxFor(t, 30*time.Second)))
			must(t, m.s.Set(ctxFor(t, 30*time.Second), "healed", []byte(t.Name())))
			c.awaitEqual(t)
			eventually(t, 10*time.Second, "no fault is left", m.s.Err)
		})
	}
	m.stop()
}
