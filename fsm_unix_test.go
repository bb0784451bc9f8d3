//go:build linux || darwin

package quorate

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
)

// Invariants (3) and (4): after an error of the disk nothing is answered, and no later sync that seems to work lets raft cut
// its log. The next start goes on from what the file holds.
func TestDiskErrorInApplyIsForGood(t *testing.T) {
	f := newFSMWith(t, 1<<20)
	told := make(chan error, 1)
	f.fault = func(err error) {
		if err != nil {
			told <- err
		}
	}
	session := openTestSession(t, f, 1, "one")
	must(t, f.store.flush())
	set := func(index uint64, value string) *raft.Log {
		return command(index, batchBytes(session, index, 0, transaction{setOp("k", value)}))
	}
	lift := limitFileSize(t, uint64(f.store.walSize())+pageSize)
	applyOne(t, f, set(2, strings.Repeat("x", 100<<10)))
	if err := f.store.flush(); !isIO(err) {
		t.Fatalf("flush: %v", err)
	}
	answer := make(chan []any, 1)
	go func() { answer <- f.ApplyBatch([]*raft.Log{set(3, "y")}) }() // finds that the file can't be written
	err := <-told
	lift()
	if !isIO(err) || !strings.Contains(err.Error(), "apply has stopped") {
		t.Fatalf("told %v", err)
	}
	snaps := &snapshotStore{fsm: f}
	sink, err := snaps.Create(1, 1, 1, raft.Configuration{}, 0, nil)
	must(t, err)
	snap, _ := f.Snapshot()
	if err := snap.Persist(sink); err == nil {
		t.Error("a snapshot after a failed write")
	}
	<-told
	close(f.closing)
	if a := <-answer; a[0] != nil {
		t.Errorf("answered %+v", a)
	}
	if err := f.store.close(); !isIO(err) {
		t.Errorf("close: %v", err)
	}
	f = openFSM(t, f.store.path, 1<<20)
	defer f.store.close()
	if at := f.store.meta().applied; at != 1 {
		t.Fatalf("the file is at %d, want 1", at)
	}
	for i := range uint64(2) { // raft replays them
		if o := applyOne(t, f, set(2+i, "y")); o.kind != outcomeDone || f.store.meta().revision != 1+i {
			t.Errorf("after a restart: %+v at revision %d", o, f.store.meta().revision)
		}
	}
}

// What an install has written under a name that is gone is on no disk: raft does not cut its log for it.
func TestInstallWithoutNames(t *testing.T) {
	t.Parallel()
	from, to := newFSMWith(t, 1<<20), newFSMWith(t, 1<<20)
	// The received file lies elsewhere, so that it can't take the place of snap.
	source, target := &snapshotStore{fsm: from, path: from.store.path + ".incoming"}, &snapshotStore{fsm: to, path: filepath.Join(t.TempDir(), "incoming")}
	session := openTestSession(t, from, 1, "one")
	applyOne(t, from, command(2, batchBytes(session, 2, 0, transaction{setOp("k", "v")})))
	must(t, os.Remove(to.store.path+"-wal"))
	if err := sendSnapshot(source, target, nil); !errors.Is(err, errUnseated) {
		t.Error(err)
	}
}

// limitFileSize makes every write beyond a size fail, as a broken disk does: with an error that is not "no space".
func limitFileSize(t *testing.T, size uint64) (lift func()) {
	t.Helper()
	var was syscall.Rlimit
	must(t, syscall.Getrlimit(syscall.RLIMIT_FSIZE, &was))
	must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: size, Max: was.Max}))
	lift = sync.OnceFunc(func() { syscall.Setrlimit(syscall.RLIMIT_FSIZE, &was) })
	t.Cleanup(lift)
	return lift
}
