//go:build unix

package quorate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const descriptorsEnv = "QUORATE_TEST_DESCRIPTORS"

// A process without a descriptor left goes through changes of segments, and its member works again when there are some.
func TestOutOfDescriptors(t *testing.T) {
	if dir := os.Getenv(descriptorsEnv); dir != "" {
		outOfDescriptors(t, dir)
		return
	}
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^TestOutOfDescriptors$", "-test.v")
	cmd.Env = append(os.Environ(), descriptorsEnv+"="+filepath.Join(quickDir(t), "data"))
	said, err := cmd.CombinedOutput()
	if err != nil || strings.Contains(string(said), "panic") {
		t.Fatalf("%v: %s", err, said)
	}
}

func outOfDescriptors(t *testing.T, dir string) {
	must(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 100, Max: 100}))
	c := Config{Dir: dir, segment: 1 << 20, Logger: testLogger(t)}
	s, err := Open(t.Context(), c)
	must(t, err)
	defer func() { s.Close() }()
	acked := 0
	set := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		return s.Set(ctx, fmt.Sprintf("k%03d", acked), make([]byte, 30<<10))
	}
	must(t, s.Ready(t.Context()))
	must(t, set())
	acked++
	s.store.fileMu.Lock() // the flush takes what comes now in one piece, larger than its cache
	for i := range 24 {
		var ops []Op
		for j := range 16 {
			ops = append(ops, Set(fmt.Sprint("large", i, "/", j), make([]byte, 30<<10)))
		}
		_, err := s.Exec(t.Context(), ops...)
		must(t, err)
	}
	var hog []int
	for {
		fd, err := syscall.Open(os.DevNull, 0, 0)
		if err != nil {
			break
		}
		hog = append(hog, fd)
	}
	s.store.fileMu.Unlock()
	must(t, s.store.sync(t.Context())) // SQLite puts nothing aside into a temporary file
	for err = set(); err == nil && acked < 200; err = set() {
		acked++
	}
	if acked < 10 || !errors.Is(err, ErrNotApplied) && !errors.Is(err, ErrUncertain) {
		t.Fatalf("after %d writes: %v", acked, err)
	}
	eventually(t, patience, "Err names it", func() error {
		if err := s.Err(); !errors.Is(err, syscall.EMFILE) || s.refusesWrites() != nil || s.silent() != nil {
			return fmt.Errorf("%v, sticky %v, silent %v", err, s.refusesWrites(), s.silent())
		}
		return nil
	})
	if v := s.Stale().Get("k000"); len(v) != 30<<10 {
		t.Fatal(len(v))
	}
	if rows, err := s.Query(t.Context(), "SELECT count(*) FROM kv"); err == nil { // it opens a connection, and does not wait for one
		rows.Close()
	}
	for _, fd := range hog {
		syscall.Close(fd)
	}
	eventually(t, patience, "a write", set)
	acked++
	eventually(t, patience, "Err is nil", s.Err)
	must(t, s.Ready(t.Context()))
	rows, err := s.Query(t.Context(), "SELECT count(*) FROM kv")
	must(t, err)
	rows.Close()
	must(t, s.Close())
	s, err = Open(t.Context(), c)
	must(t, err)
	for i := range acked {
		if v, err := s.Get(t.Context(), fmt.Sprintf("k%03d", i)); len(v) != 30<<10 || err != nil {
			t.Fatal(i, len(v), err)
		}
	}
}
