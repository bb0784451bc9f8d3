package quorate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/types"
	"pgregory.net/rapid"
)

const tinySegment = 2 << 10

func TestLogSurvivesReopening(t *testing.T) {
	o := logOptionsIn(t)
	l := reopenLog(t, nil, o)
	wantLog(t, l, 0, 0)
	appendLog(t, l, 1, 1, 60)
	if err := l.SetUint64([]byte("term"), 7); err != nil {
		t.Fatal(err)
	}
	if err := l.Set([]byte("vote"), []byte("a")); err != nil {
		t.Fatal(err)
	}
	wantLog(t, l, 1, 60)
	l = reopenLog(t, l, o)
	wantLog(t, l, 1, 60)
	if index, term := l.last(); index != 60 || term != 1 {
		t.Fatalf("last is %d of term %d", index, term)
	}
	if n, err := l.GetUint64([]byte("term")); n != 7 || err != nil {
		t.Fatal(n, err)
	}
	if v, err := l.Get([]byte("vote")); string(v) != "a" || err != nil {
		t.Fatal(v, err)
	}
	if n, err := l.GetUint64([]byte("none")); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	deleteLog(t, l, 1, 20)
	wantLog(t, l, 21, 60)
	deleteLog(t, l, 41, 60)
	wantLog(t, l, 21, 40)
	l = reopenLog(t, l, o)
	wantLog(t, l, 21, 40)
	if err := l.reset(); err != nil {
		t.Fatal(err)
	}
	wantLog(t, l, 0, 0)
	if n, err := l.GetUint64([]byte("term")); n != 7 || err != nil {
		t.Fatal("after reset:", n, err)
	}
	appendLog(t, l, 1000, 9, 5)
	l = reopenLog(t, l, o)
	wantLog(t, l, 1000, 1004)
	if info, err := os.Stat(o.dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatal(info.Mode(), err)
	}
}

// A follower deletes a conflicting suffix of the newest segment, and restarts. raft-wal v0.4.0 can't read it then.
func TestLogConflictThenRestart(t *testing.T) {
	o := logOptionsIn(t)
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 8)
	deleteLog(t, l, 6, 8)
	l = reopenLog(t, l, o)
	wantLog(t, l, 1, 5)
	appendLog(t, l, 6, 2, 3)
	l = reopenLog(t, l, o)
	wantLog(t, l, 1, 8)
	for index, want := range map[uint64]uint64{5: 1, 6: 2, 8: 2} {
		if term, ok := l.termAt(index); term != want || !ok {
			t.Fatalf("term at %d is %d, %v", index, term, ok)
		}
	}
}

func TestLogNotFound(t *testing.T) {
	l := reopenLog(t, nil, logOptionsIn(t))
	appendLog(t, l, 5, 1, 3)
	for _, index := range []uint64{0, 4, 8, 1 << 60} {
		if err := l.GetLog(index, new(raft.Log)); err != raft.ErrLogNotFound {
			t.Fatalf("index %d: %v", index, err)
		}
		if _, ok := l.termAt(index); ok {
			t.Fatalf("a term at index %d", index)
		}
	}
}

func TestLogRefusesWhatDoesNotFollow(t *testing.T) {
	l := reopenLog(t, nil, logOptionsIn(t))
	appendLog(t, l, 1, 1, 3)
	for _, index := range []uint64{0, 2, 3, 5} {
		if err := l.StoreLog(testEntry(index, 1)); err == nil {
			t.Fatalf("index %d was stored after 3", index)
		}
	}
	if err := l.StoreLogs([]*raft.Log{testEntry(4, 1), testEntry(6, 1)}); err == nil {
		t.Fatal("a batch with a gap was stored")
	}
	if err := l.DeleteRange(2, 2); err == nil {
		t.Fatal("a range in the middle was deleted")
	}
	wantLog(t, l, 1, 3)
	if err := l.failed(); err != nil {
		t.Fatal(err)
	}
}

func TestLogRefusesWrongSum(t *testing.T) {
	l := reopenLog(t, nil, logOptionsIn(t))
	good, bad := testEntry(1, 1), testEntry(2, 1)
	sealEntry(bad)
	bad.Data = append([]byte("x"), bad.Data[1:]...)
	if err := l.StoreLogs([]*raft.Log{good, bad}); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	wantLog(t, l, 0, 0)
	if err := l.StoreLog(good); err != nil {
		t.Fatal(err)
	}
	if err := checkEntry(good); err != nil {
		t.Fatal("not sealed in place:", err)
	}
}

func TestEntrySum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := &raft.Log{
			Index: rapid.Uint64().Draw(t, "index"), Term: rapid.Uint64().Draw(t, "term"),
			Type: raft.LogType(rapid.Byte().Draw(t, "type")), Data: rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "data"),
		}
		if err := checkEntry(e); !errors.Is(err, ErrCorrupt) {
			t.Fatal("no checksum:", err)
		}
		sealEntry(e)
		if err := checkEntry(e); err != nil {
			t.Fatal(err)
		}
		bit := rapid.Uint64Range(0, 63).Draw(t, "bit")
		switch rapid.IntRange(0, 4).Draw(t, "field") {
		case 0:
			e.Index ^= 1 << bit
		case 1:
			e.Term ^= 1 << bit
		case 2:
			e.Type ^= 1 << (bit % 8)
		case 3:
			e.Data[int(bit)%len(e.Data)] ^= 1 << (bit % 8)
		case 4:
			e.Extensions[int(bit)%len(e.Extensions)] ^= 1 << (bit % 8)
		}
		if err := checkEntry(e); !errors.Is(err, ErrCorrupt) {
			t.Fatal("a flipped bit passed:", err)
		}
	})
}

func TestLogFindsFlippedBits(t *testing.T) {
	t.Parallel()
	sum := entrySum(testEntry(7, 1))
	for name, pattern := range map[string][]byte{"data": testEntry(7, 1).Data, "checksum": sum[:]} {
		t.Run(name, func(t *testing.T) {
			o := logOptionsIn(t)
			var told []error
			o.fault = func(err error) { told = append(told, err) }
			l := reopenLog(t, nil, o)
			appendLog(t, l, 1, 1, 40)
			closeLog(t, l)
			flipInFiles(t, o.dir, pattern)
			l = reopenLog(t, nil, o)
			err := l.verify(context.Background())
			wantDamage(t, err, o.dir, "index 7:")
			if _, ok := l.termAt(7); ok {
				t.Fatal("termAt serves a damaged entry")
			}
			if l.failed() != nil {
				t.Fatal("a check must not fail the log")
			}
			ended := inRaft(func() { l.GetLog(7, new(raft.Log)) })
			comesTrue(t, func() error { return wantFault(l, ErrCorrupt) })
			wantParked(t, ended)
			parked := inRaft(func() { l.StoreLog(testEntry(41, 1)) })
			wantParked(t, parked)
			wantEntry(t, l, 8)
			closeLog(t, l)
			if <-ended || <-parked {
				t.Fatal("a call on a failed log returned")
			}
			if len(told) != 1 {
				t.Fatal("told of", told)
			}
		})
	}
}

// A damaged index block leads to another entry, which is whole.
func TestLogFindsWrongEntry(t *testing.T) {
	t.Parallel()
	o := logOptionsIn(t)
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 60)
	closeLog(t, l)
	files, _ := filepath.Glob(filepath.Join(o.dir, "*.wal"))
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.LastIndex(data, []byte{32, 0, 0, 0}) // the first entry is behind the file's header
	first := binary.LittleEndian.Uint32(data[at:])
	second := binary.LittleEndian.Uint32(data[at+4:])
	binary.LittleEndian.PutUint32(data[at:], second)
	binary.LittleEndian.PutUint32(data[at+4:], first)
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	l = reopenLog(t, nil, o)
	wantDamage(t, l.verify(context.Background()), o.dir, "index 1:")
}

func TestLogOpenErrors(t *testing.T) {
	o, disk := faultyOptions(t)
	missing := o
	missing.dir = filepath.Join(o.dir, "no", "wal")
	if _, err := openLog(missing); !errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	disk.fail(diskFaults[2].set, syscall.ENOSPC)
	if _, err := openLog(o); !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	disk.fail(diskFaults[2].set, nil)
	l := reopenLog(t, nil, o) // blocks if the meta file is still locked
	appendLog(t, l, 1, 1, 100)
	closeLog(t, l)
	disk.fail(func(f *faultFS, err error) { f.openErr = err }, syscall.EIO)
	if _, err := openLog(o); !errors.Is(err, syscall.EIO) || errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	disk.fail(func(f *faultFS, err error) { f.openErr = err }, nil)
	if disk.open != 0 {
		t.Fatalf("%d files are still open", disk.open)
	}
	files, _ := filepath.Glob(filepath.Join(o.dir, "*.wal"))
	if err := os.Remove(files[1]); err != nil {
		t.Fatal(err)
	}
	_, err := openLog(o)
	wantDamage(t, err, o.dir, filepath.Base(files[1]))
}

// raft-wal replaces a lost tail by an empty one without a word.
func TestLogLossWhileWaiting(t *testing.T) {
	o, disk := faultyOptions(t)
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 3)
	disk.fail(diskFaults[0].set, syscall.ENOSPC)
	ended := inRaft(func() { l.StoreLog(testEntry(4, 1)) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	files, _ := filepath.Glob(filepath.Join(o.dir, "*.wal"))
	if err := os.Remove(files[len(files)-1]); err != nil {
		t.Fatal(err)
	}
	comesTrue(t, func() error { return wantFault(l, ErrCorrupt) })
	wantDamage(t, l.failed(), o.dir, "1 to 3")
	closeLog(t, l)
	if <-ended {
		t.Fatal("returned")
	}
}

// Whatever a flip or a cut does to the files, the log opens and serves what was stored, or says that it is corrupt.
func TestLogDamagedFiles(t *testing.T) {
	t.Parallel()
	o := logOptionsIn(t)
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 40)
	closeLog(t, l)
	r := rand.New(rand.NewPCG(1, 2))
	found := 0
	for round := range 150 {
		broken := o
		broken.dir = filepath.Join(t.TempDir(), "wal")
		if err := os.CopyFS(broken.dir, os.DirFS(o.dir)); err != nil {
			t.Fatal(err)
		}
		files, _ := filepath.Glob(filepath.Join(broken.dir, "*"))
		name := files[r.IntN(len(files))]
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		switch round % 3 {
		case 0:
			data = data[:r.IntN(len(data))]
		case 1:
			data[r.IntN(min(len(data), tinySegment))] ^= 1 << r.IntN(8)
		case 2:
			for i := range data[:min(len(data), 256)] {
				data[i] ^= 0xff
			}
		}
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := openLog(broken)
		if err == nil {
			err = l.verify(context.Background())
			first, last := l.bounds()
			for i := first; i != 0 && i <= last; i++ {
				var e raft.Log
				if l.read(i, &e) == nil && string(e.Data) != string(testEntry(i, 1).Data) {
					t.Fatalf("round %d, %s: wrong data at index %d", round, name, i)
				}
			}
			l.close()
		}
		if err == nil {
			continue
		}
		found++
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), broken.dir) || !strings.Contains(err.Error(), "repair") {
			t.Fatalf("round %d, %s: %v", round, name, err)
		}
	}
	if found < 30 {
		t.Fatalf("only %d of 150 were found", found)
	}
}

// The ways in which a segment file meets a full or a broken disk.
var diskFaults = []struct {
	name string
	set  func(*faultFS, error)
}{
	{"write", func(f *faultFS, err error) { f.writeErr = err }},
	{"sync, and the bytes reach the disk", func(f *faultFS, err error) { f.syncErr = err }},
	{"new segment", func(f *faultFS, err error) { f.createErr, f.writeErr = err, err }},
}

func TestLogFullDiskFollower(t *testing.T) {
	for _, fault := range diskFaults {
		for _, size := range []int{8 << 20, tinySegment} {
			t.Run(fmt.Sprint(fault.name, size), func(t *testing.T) {
				o, disk := faultyOptions(t)
				o.segmentSize = size
				var mu sync.Mutex
				var told []error
				o.fault = func(err error) { mu.Lock(); told = append(told, err); mu.Unlock() }
				l := reopenLog(t, nil, o)
				appendLog(t, l, 1, 1, 30)
				disk.fail(fault.set, syscall.ENOSPC)
				ended := inRaft(func() { appendEntries(t, l, 31, 1, 40) })
				comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
				wantParked(t, ended)
				if first, _ := l.bounds(); first != 1 {
					t.Fatal("bounds while waiting")
				}
				disk.fail(fault.set, nil)
				if !<-ended {
					t.Fatal("the append ended with Goexit")
				}
				wantLog(t, l, 1, 70)
				if err := l.failed(); err != nil {
					t.Fatal(err)
				}
				l = reopenLog(t, l, o)
				wantLog(t, l, 1, 70)
				mu.Lock()
				defer mu.Unlock()
				if len(told) != 2 || !isFull(told[0]) || told[1] != nil {
					t.Fatal("told of", told)
				}
			})
		}
	}
}

func TestLogFullDiskLeader(t *testing.T) {
	for _, fault := range diskFaults {
		for _, size := range []int{8 << 20, tinySegment} {
			t.Run(fmt.Sprint(fault.name, size), func(t *testing.T) {
				o, disk := faultyOptions(t)
				o.segmentSize = size
				o.leader = func() bool { return true }
				l := reopenLog(t, nil, o)
				appendLog(t, l, 1, 1, 30)
				disk.fail(fault.set, syscall.ENOSPC)
				refused := make(chan error, 1)
				next := uint64(31)
				ended := inRaft(func() {
					for { // a batch may still fit into the segment at hand
						err := l.StoreLogs([]*raft.Log{testEntry(next, 1), testEntry(next+1, 1)})
						if err != nil {
							refused <- err
							return
						}
						next += 2
					}
				})
				comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
				if fault.name == "new segment" {
					disk.fail(fault.set, nil) // it answers when it can vouch for the log
				}
				if err := <-refused; !errors.Is(err, syscall.ENOSPC) || !<-ended {
					t.Fatal(err)
				}
				wantLog(t, l, 1, next-1)
				disk.fail(fault.set, nil)
				if size == tinySegment { // what was refused does not come back
					l = reopenLog(t, l, o)
					wantLog(t, l, 1, next-1)
				}
				appendLog(t, l, next, 2, 40)
				if l.failed() != nil {
					t.Fatal(l.failed())
				}
				l = reopenLog(t, l, o)
				wantLog(t, l, 1, next+39)
				if term, _ := l.termAt(next); term != 2 {
					t.Fatal("an entry that was refused came back")
				}
			})
		}
	}
}

// The entries that wait for space are deletable meanwhile: it may be the deletion that makes space.
func TestLogFullDiskDelete(t *testing.T) {
	o, disk := faultyOptions(t)
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 40)
	disk.fail(func(f *faultFS, err error) { f.writeErr = err }, syscall.EDQUOT)
	ended := inRaft(func() { l.StoreLog(testEntry(41, 1)) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	deleteLog(t, l, 1, 20)
	wantParked(t, ended)
	disk.fail(func(f *faultFS, err error) { f.writeErr = err }, nil)
	if !<-ended {
		t.Fatal("ended with Goexit")
	}
	// A suffix needs a new segment, which needs space.
	disk.fail(diskFaults[2].set, syscall.ENOSPC)
	ended = inRaft(func() { l.DeleteRange(31, 41) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	disk.fail(diskFaults[2].set, nil)
	if !<-ended {
		t.Fatal("ended with Goexit")
	}
	wantLog(t, l, 21, 30)
	l = reopenLog(t, l, o)
	wantLog(t, l, 21, 30)
	appendLog(t, l, 31, 2, 10)
}

func TestLogFullDiskMeta(t *testing.T) {
	o := logOptionsIn(t)
	meta := &faultMeta{}
	o.meta = meta
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 3)
	meta.fail(errors.New("file resize error: write x: no space left on device")) // as bbolt says it
	ended := inRaft(func() { l.SetUint64([]byte("term"), 3) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	wantParked(t, ended)
	meta.fail(nil)
	if !<-ended {
		t.Fatal("ended with Goexit")
	}
	// The change to a new segment fails in the background; the next append finds out.
	meta.fail(syscall.ENOSPC)
	ended = inRaft(func() { appendEntries(t, l, 4, 1, 40) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	meta.fail(nil)
	if !<-ended {
		t.Fatal("ended with Goexit")
	}
	l = reopenLog(t, l, o)
	wantLog(t, l, 1, 43)
	meta.fail(syscall.ENOSPC)
	ended = inRaft(func() { l.DeleteRange(1, 10) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	meta.fail(nil)
	if !<-ended {
		t.Fatal("ended with Goexit")
	}
	l = reopenLog(t, l, o)
	wantLog(t, l, 11, 43)
	if n, _ := l.GetUint64([]byte("term")); n != 3 {
		t.Fatal(n)
	}
	meta.fail(syscall.EIO)
	ended = inRaft(func() { l.Set([]byte("vote"), []byte("x")) })
	comesTrue(t, func() error { return wantFault(l, syscall.EIO) })
	meta.fail(nil)
	wantParked(t, ended)
	closeLog(t, l)
	if <-ended {
		t.Fatal("a vote that may be lost was acknowledged")
	}
}

func TestLogBrokenDisk(t *testing.T) {
	for _, fault := range diskFaults {
		t.Run(fault.name, func(t *testing.T) {
			o, disk := faultyOptions(t)
			told := make(chan error, 10)
			o.fault = func(err error) { told <- err }
			l := reopenLog(t, nil, o)
			appendLog(t, l, 1, 1, 30)
			disk.fail(fault.set, syscall.EIO)
			calls := []chan bool{inRaft(func() { appendEntries(t, l, 31, 1, 40) })}
			if err := <-told; !errors.Is(err, syscall.EIO) || !errors.Is(l.failed(), syscall.EIO) {
				t.Fatal(err, l.failed())
			}
			disk.fail(fault.set, nil) // too late
			for _, call := range []func(){
				func() { l.StoreLog(testEntry(31, 1)) },
				func() { l.Set([]byte("vote"), []byte("x")) },
				func() { l.SetUint64([]byte("term"), 1) },
				func() { l.DeleteRange(1, 3) },
			} {
				calls = append(calls, inRaft(call))
			}
			for _, ended := range calls {
				wantParked(t, ended)
			}
			wantEntry(t, l, 5)
			if l.busy() == 0 {
				t.Fatal("parked calls are not busy")
			}
			closeLog(t, l)
			for _, ended := range calls {
				if <-ended {
					t.Fatal("a call on a failed log returned")
				}
			}
			if len(told) != 0 || l.busy() != 0 {
				t.Fatal("told again, or busy after close")
			}
			if err := l.close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestLogBrokenDiskLeader(t *testing.T) {
	o, disk := faultyOptions(t)
	o.leader = func() bool { return true }
	l := reopenLog(t, nil, o)
	appendLog(t, l, 1, 1, 3)
	disk.fail(func(f *faultFS, err error) { f.syncErr = err }, syscall.EIO)
	if err := l.StoreLog(testEntry(4, 1)); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	disk.fail(func(f *faultFS, err error) { f.syncErr = err }, nil)
	if err := l.StoreLog(testEntry(4, 1)); !errors.Is(err, syscall.EIO) {
		t.Fatal("retried as if it had worked:", err)
	}
	wantLog(t, l, 1, 3)
}

func TestLogCloseEndsWaiting(t *testing.T) {
	o, disk := faultyOptions(t)
	l := reopenLog(t, nil, o)
	disk.fail(diskFaults[0].set, syscall.ENOSPC)
	ended := inRaft(func() { l.StoreLog(testEntry(1, 1)) })
	comesTrue(t, func() error { return wantFault(l, syscall.ENOSPC) })
	closeLog(t, l)
	if <-ended {
		t.Fatal("an append without space returned")
	}
	if err := l.reset(); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

func TestLogBusy(t *testing.T) {
	o, disk := faultyOptions(t)
	l := reopenLog(t, nil, o)
	if l.busy() != 0 {
		t.Fatal("busy at rest")
	}
	hang := make(chan struct{})
	disk.mu.Lock()
	disk.hang = hang
	disk.mu.Unlock()
	ended := inRaft(func() { l.StoreLog(testEntry(1, 1)) })
	comesTrue(t, func() error {
		if d := l.busy(); d < 20*time.Millisecond {
			return fmt.Errorf("busy for %v", d)
		}
		return nil
	})
	wantLog(t, l, 0, 0) // answers while the disk hangs
	close(hang)
	if !<-ended || l.busy() != 0 {
		t.Fatal("busy after the call")
	}
	wantLog(t, l, 1, 1)
}

// The process ends after the write that fills a segment, before raft-wal has entered the next one.
func TestLogEndsAtFullSegment(t *testing.T) {
	t.Parallel()
	o := logOptionsIn(t)
	l := reopenLog(t, nil, o)
	closeLog(t, l)
	before, err := os.ReadFile(filepath.Join(o.dir, metadb.FileName))
	if err != nil {
		t.Fatal(err)
	}
	l = reopenLog(t, nil, o)
	var n uint64
	for files := 1; files == 1; {
		n++
		appendLog(t, l, n, 1, 1)
		if err := l.wal.DeleteRange(n+1, n+1); err != nil { // waits for the new segment, if there is to be one
			t.Fatal(err)
		}
		names, _ := filepath.Glob(filepath.Join(o.dir, "*.wal"))
		files = len(names)
	}
	closeLog(t, l)
	if err := os.WriteFile(filepath.Join(o.dir, metadb.FileName), before, 0o600); err != nil {
		t.Fatal(err)
	}
	l = reopenLog(t, nil, o)
	wantLog(t, l, 1, n)
	appendLog(t, l, n+1, 1, 50)
	l = reopenLog(t, l, o)
	wantLog(t, l, 1, n+50)
}

// The power fails in the write that fills a segment: raft-wal takes the segment for ended although that batch is not whole.
func TestLogTornLastWriteOfSegment(t *testing.T) {
	t.Parallel()
	for name, batch := range map[string]uint64{"index block": 8, "only batch": 1} {
		t.Run(name, func(t *testing.T) {
			o, disk := faultyOptions(t)
			o.segmentSize = 16 << 10
			index := uint64(1)
			if batch == 1 {
				index = bigEntry
			}
			full := index + (batchesToFill(t, o, index, batch)-1)*batch
			o.dir = filepath.Join(t.TempDir(), "wal")
			l := reopenLog(t, nil, o)
			for i := index; i < full; i += batch {
				storeBatch(l, i, batch)
			}
			disk.fail(diskFaults[1].set, syscall.EIO)
			inRaft(func() { storeBatch(l, full, batch) })
			comesTrue(t, func() error { return wantFault(l, syscall.EIO) })
			closeLog(t, l)
			disk.fail(diskFaults[1].set, nil)
			whole, torn := o.dir, maps.Clone(disk.unsynced)
			for round := range 16 {
				o.dir = filepath.Join(t.TempDir(), "wal")
				if err := os.CopyFS(o.dir, os.DirFS(whole)); err != nil {
					t.Fatal(err)
				}
				for path, sectors := range torn {
					disk.unsynced[filepath.Join(o.dir, filepath.Base(path))] = sectors
				}
				disk.cut(t, func(i int) bool { return round>>(i%4)&1 == 1 && (i < 4 || batch == 1) && (i > 0 || batch > 1) })
				l = reopenLog(t, nil, o)
				_, last := l.bounds()
				if whole := full + batch - 1; last != whole && last != full-1 && (last != 0 || full != index) {
					t.Fatalf("round %d: %d were acknowledged, %d are there", round, full-1, last)
				}
				next := max(index, last+1)
				appendLog(t, l, next, 1, 10)
				l = reopenLog(t, l, o)
				wantLog(t, l, index, next+9)
				closeLog(t, l)
			}
		})
	}
}

// batchesToFill is how many batches fill a segment.
func batchesToFill(t *testing.T, o logOptions, index, batch uint64) uint64 {
	t.Helper()
	l := reopenLog(t, nil, o)
	defer l.close()
	for n := uint64(1); ; n++ {
		if err := storeBatch(l, index+(n-1)*batch, batch); err != nil {
			t.Fatal(err)
		}
		if err := l.wal.DeleteRange(index+n*batch, index+n*batch); err != nil {
			t.Fatal(err)
		}
		if files, _ := filepath.Glob(filepath.Join(o.dir, "*.wal")); len(files) > 1 {
			return n
		}
	}
}

func storeBatch(l *logStore, index, n uint64) error {
	var es []*raft.Log
	for i := range n {
		es = append(es, testEntry(index+i, 1))
	}
	return l.StoreLogs(es)
}

// A removalFS removes files when it may.
type removalFS struct {
	types.VFS
	may    chan struct{} // closed when it may
	refuse bool          // and then does not
}

func (f *removalFS) Delete(dir, name string) error {
	<-f.may
	if f.refuse {
		return syscall.EIO
	}
	return f.VFS.Delete(dir, name)
}

// Appends and reads do not wait for the removal of what a truncation leaves over; close does, and what stays is removed by the next
// open.
func TestLogRemovesInTheBackground(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		o := logOptionsIn(t)
		o.segmentSize = 4 << 10
		disk := &removalFS{VFS: walfs.New(), may: make(chan struct{}), refuse: refuse}
		o.vfs = disk
		segments := func() int {
			files, err := filepath.Glob(filepath.Join(o.dir, "*.wal"))
			must(t, err)
			return len(files)
		}
		l := reopenLog(t, nil, o)
		appendLog(t, l, 1, 1, 600)
		before := segments()
		deleteLog(t, l, 1, 590)
		appendLog(t, l, 601, 1, 10)
		wantLog(t, l, 591, 610)
		if now := segments(); before < 8 || now < before {
			t.Fatalf("%d segments of %d while none may be removed", now, before)
		}
		closed := make(chan error)
		go func() { closed <- l.close() }()
		select {
		case err := <-closed:
			t.Fatal("closed during a removal:", err)
		case <-time.After(10 * time.Millisecond):
		}
		close(disk.may)
		must(t, <-closed)
		if now := segments(); (now < before) == refuse {
			t.Fatalf("%d segments of %d after close, removals refused: %t", now, before, refuse)
		}
		disk.refuse = false
		l = reopenLog(t, nil, o)
		wantLog(t, l, 591, 610)
		if now := segments(); now > 3 {
			t.Fatalf("%d segments after open", now)
		}
		closeLog(t, l)
	}
}

// A zeroFS counts the zeros that are written ahead, and knows where the log ends in each file.
type zeroFS struct {
	types.VFS
	t      *testing.T
	refuse bool
	large  bool // writes, which get no zeros
	size   int64
	made   atomic.Int32 // files
	writes atomic.Int32 // of zeros
}

type zeroFile struct {
	types.WritableFile
	fs         *zeroFS
	end, zeros int64 // of the log, and of what is written ahead
}

func (f *zeroFS) watch(w types.WritableFile, err error) (types.WritableFile, error) {
	if err != nil {
		return nil, err
	}
	return &zeroFile{WritableFile: w, fs: f}, nil
}

func (f *zeroFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	f.made.Add(1)
	return f.watch(f.VFS.Create(dir, name, size))
}

func (f *zeroFS) OpenWriter(dir, name string) (types.WritableFile, error) {
	return f.watch(f.VFS.OpenWriter(dir, name))
}

func (z *zeroFile) WriteAt(b []byte, at int64) (int, error) {
	end := at + int64(len(b))
	if len(bytes.Trim(b, "\x00")) > 0 {
		z.end = end
		return z.WritableFile.WriteAt(b, at)
	}
	if at == z.end {
		z.fs.writes.Add(1)
	}
	if at != z.end && at != z.zeros || end > z.fs.size || end > z.end+zeroAhead {
		z.fs.t.Errorf("zeros from %d to %d of %d, and the log ends at %d", at, end, z.fs.size, z.end)
	}
	if z.fs.refuse {
		return 0, syscall.ENOSPC
	}
	z.zeros = end
	return z.WritableFile.WriteAt(b, at)
}

func (z *zeroFile) Sync() error {
	if z.zeros < z.end && z.end < z.fs.size && !z.fs.refuse && !z.fs.large {
		z.fs.t.Errorf("the log ends at %d, the zeros at %d", z.end, z.zeros)
	}
	return z.WritableFile.Sync()
}

// Each sync after a small write finds zeros where the next ones will be, they are not written anew for each of them, and a log does
// without them.
func TestLogWritesZerosAhead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		batch         uint64 // entries of about 80 bytes
		refuse, large bool
	}{{batch: 150}, {batch: 150, refuse: true}, {batch: 600, large: true}} {
		o := logOptionsIn(t)
		o.segmentSize = 3*zeroAhead + 1000
		disk := &zeroFS{VFS: walfs.New(), t: t, refuse: c.refuse, large: c.large, size: int64(o.segmentSize)}
		o.vfs = disk
		l := reopenLog(t, nil, o)
		last, opened := uint64(0), int32(1)
		for ; disk.made.Load() < 3; last += c.batch {
			must(t, storeBatch(l, last+1, c.batch))
			if last%6000 == 0 {
				l = reopenLog(t, l, o)
				opened++
			}
		}
		made, writes := disk.made.Load(), disk.writes.Load()
		if c.large {
			if writes != 0 {
				t.Errorf("zeros were written %d times after large writes", writes)
			}
		} else if writes < 2*3 || writes > 3*4+opened {
			t.Errorf("zeros were written %d times in %d files, of a log that was opened %d times", writes, made, opened)
		}
		wantLog(t, l, 1, last)
		l = reopenLog(t, l, o)
		wantLog(t, l, 1, last)
		closeLog(t, l)
	}
}

// TestCampaignLogPowerCuts: the power fails during an append: of the sectors not synced some are written, some are not.
func TestCampaignLogPowerCuts(t *testing.T) {
	t.Parallel()
	o, disk := faultyOptions(t)
	r := rand.New(rand.NewPCG(3, 4))
	var l *logStore
	var first, last uint64
	for round := range dose(100, 1000) {
		l = reopenLog(t, nil, o)
		gotFirst, gotLast := l.bounds()
		if round > 0 && (gotFirst != first || gotLast < last) {
			t.Fatalf("round %d: %d to %d were acknowledged, %d to %d are there", round, first, last, gotFirst, gotLast)
		}
		wantLog(t, l, gotFirst, gotLast)
		first, last = gotFirst, gotLast
		for range r.IntN(6) {
			switch n := 1 + r.Uint64N(12); {
			case r.IntN(5) == 0 && last > first+n:
				deleteLog(t, l, last-n+1, last)
				last -= n
			case r.IntN(5) == 0 && last > first+n:
				deleteLog(t, l, first, first+n-1)
				first += n
			default:
				appendLog(t, l, last+1, 1, n)
				first, last = max(first, 1), last+n
			}
		}
		disk.fail(func(f *faultFS, err error) { f.syncErr = err }, syscall.EIO)
		ended := inRaft(func() { appendEntries(t, l, last+1, 1, 1+r.Uint64N(20)) })
		comesTrue(t, func() error { return wantFault(l, syscall.EIO) })
		closeLog(t, l)
		<-ended
		disk.fail(func(f *faultFS, err error) { f.syncErr = err }, nil)
		disk.cut(t, func(int) bool { return r.IntN(2) == 0 })
		counted.powerCuts.add(1)
	}
}

func TestLogAgainstSlice(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		o := logOptionsIn(t)
		o.dir = filepath.Join(dir, "wal")
		l := reopenLog(t, nil, o)
		defer func() { l.close() }()
		var model []raft.Log
		term := uint64(1)
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				next := uint64(1)
				if len(model) > 0 {
					next = model[len(model)-1].Index + 1
				} else {
					next = rapid.Uint64Range(1, 1000).Draw(rt, "first")
				}
				var es []*raft.Log
				for range rapid.IntRange(1, 12).Draw(rt, "n") {
					e := testEntry(next, term)
					e.Data = append(e.Data, make([]byte, rapid.IntRange(0, 700).Draw(rt, "size"))...)
					es, next = append(es, e), next+1
					model = append(model, *e)
				}
				if err := l.StoreLogs(es); err != nil {
					rt.Fatal(err)
				}
			},
			"term": func(*rapid.T) { term++ },
			"prefix": func(rt *rapid.T) {
				if n := rapid.IntRange(0, len(model)).Draw(rt, "n"); n > 0 {
					deleteLog(t, l, model[0].Index, model[n-1].Index)
					model = model[n:]
				}
			},
			"suffix": func(rt *rapid.T) {
				if n := rapid.IntRange(0, len(model)).Draw(rt, "n"); n > 0 {
					deleteLog(t, l, model[len(model)-n].Index, model[len(model)-1].Index)
					model = model[:len(model)-n]
				}
			},
			"reset": func(rt *rapid.T) {
				if err := l.reset(); err != nil {
					rt.Fatal(err)
				}
				model = nil
			},
			"reopen": func(*rapid.T) { l = reopenLog(t, l, o) },
			"": func(rt *rapid.T) {
				var first, last, lastTerm uint64
				if len(model) > 0 {
					first, last, lastTerm = model[0].Index, model[len(model)-1].Index, model[len(model)-1].Term
				}
				gotFirst, gotLast := l.bounds()
				index, gotTerm := l.last()
				if gotFirst != first || gotLast != last || index != last || gotTerm != lastTerm {
					rt.Fatalf("%d to %d (%d, term %d), want %d to %d, term %d", gotFirst, gotLast, index, gotTerm, first, last, lastTerm)
				}
				for _, outside := range []uint64{first - 1, last + 1, last + 5} {
					if err := l.GetLog(outside, new(raft.Log)); err != raft.ErrLogNotFound {
						rt.Fatalf("index %d, outside %d to %d: %v", outside, first, last, err)
					}
				}
				for _, want := range model {
					var e raft.Log
					if err := l.GetLog(want.Index, &e); err != nil || e.Index != want.Index || e.Term != want.Term || string(e.Data) != string(want.Data) {
						rt.Fatalf("index %d: %v", want.Index, err)
					}
				}
				if l.bytes() < 0 || len(model) == 0 && l.bytes() != 0 {
					rt.Fatalf("%d bytes", l.bytes())
				}
			},
		})
	})
}

func TestLogCache(t *testing.T) {
	var c logCache
	for i := range uint64(2000) {
		c.add(&raft.Log{Index: 10 + i, Data: make([]byte, i*20)})
	}
	total := 0
	for i := c.low; i <= c.high; i++ {
		e, ok := c.get(i)
		if !ok || e.Index != i {
			t.Fatalf("index %d: %v, %v", i, e.Index, ok)
		}
		total += len(e.Data)
	}
	if c.high != 2009 || total != c.bytes || total > logCacheBytes || c.high-c.low+1 > logCacheEntries {
		t.Fatalf("%d to %d, %d bytes, %d counted", c.low, c.high, total, c.bytes)
	}
	if _, ok := c.get(c.low - 1); ok {
		t.Fatal("an entry that was dropped")
	}
	c.add(&raft.Log{Index: 2010, Data: make([]byte, logCacheBytes+1)})
	if _, ok := c.get(2010); ok || c.bytes != 0 {
		t.Fatal("an entry larger than the cache")
	}
	c.add(&raft.Log{Index: 2011, Data: []byte("a")})
	c.keep(1, 2010)
	if _, ok := c.get(2011); ok || c.bytes != 0 {
		t.Fatal("an entry that was deleted")
	}
	c.add(&raft.Log{Index: 2011, Term: 2})
	if e, ok := c.get(2011); !ok || e.Term != 2 {
		t.Fatal("the entry in its place", e, ok)
	}
}

// countFSM counts commands.
type countFSM struct {
	mu sync.Mutex
	n  int
}

func (f *countFSM) Apply(*raft.Log) any {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	return nil
}
func (f *countFSM) Snapshot() (raft.FSMSnapshot, error) { return nil, errors.New("none") }
func (f *countFSM) Restore(r io.ReadCloser) error       { return r.Close() }
func (f *countFSM) count() int                          { f.mu.Lock(); defer f.mu.Unlock(); return f.n }

func TestLogUnderRaft(t *testing.T) {
	t.Parallel()
	o := logOptionsIn(t)
	snaps := raft.NewInmemSnapshotStore()
	for round := range 3 {
		l := reopenLog(t, nil, o)
		addr, trans := raft.NewInmemTransport("a")
		config := raft.DefaultConfig()
		config.LocalID, config.Logger = "a", hclog.NewNullLogger()
		config.HeartbeatTimeout, config.ElectionTimeout = 50*time.Millisecond, 50*time.Millisecond
		config.LeaderLeaseTimeout = 50 * time.Millisecond
		if round == 0 {
			servers := raft.Configuration{Servers: []raft.Server{{ID: "a", Address: addr}}}
			if err := raft.BootstrapCluster(config, l, l, snaps, trans, servers); err != nil {
				t.Fatal(err)
			}
		}
		fsm := &countFSM{}
		r, err := raft.NewRaft(config, fsm, l, l, snaps, trans)
		if err != nil {
			t.Fatal(err)
		}
		comesTrue(t, func() error {
			if r.State() != raft.Leader {
				return errors.New(r.State().String())
			}
			return nil
		})
		var f raft.ApplyFuture
		for i := range 100 {
			f = r.Apply(fmt.Appendf(nil, "%d", i), time.Second)
		}
		if err := f.Error(); err != nil {
			t.Fatal(err)
		}
		if n := fsm.count(); n != 100*(round+1) {
			t.Fatalf("round %d: %d applied", round, n)
		}
		if err := r.Shutdown().Error(); err != nil {
			t.Fatal(err)
		}
		if err := l.verify(context.Background()); err != nil {
			t.Fatal(err)
		}
		closeLog(t, l)
	}
}

// A faultFS is raft-wal's file system with the faults that are set, and remembers what is not synced.
type faultFS struct {
	types.VFS
	mu        sync.Mutex
	writeErr  error // half of the bytes are written
	syncErr   error
	createErr error // the file is there, and empty
	openErr   error // of the tail
	open      int
	hang      chan struct{}
	unsynced  map[string]map[int64][]byte // file, sector, what it held
	created   map[string]bool             // never synced: a power cut may take them away
}

type faultFile struct {
	types.WritableFile
	fs   *faultFS
	path string
}

const sector = 512

func (f *faultFS) fail(set func(*faultFS, error), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set(f, err)
}

func (f *faultFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := filepath.Join(dir, name)
	if f.createErr != nil {
		os.WriteFile(path, nil, 0o600)
		return nil, f.createErr
	}
	w, err := f.VFS.Create(dir, name, size)
	if err != nil {
		return nil, err
	}
	f.created[path] = true
	f.open++
	return &faultFile{w, f, path}, nil
}

func (f *faultFS) OpenReader(dir, name string) (types.ReadableFile, error) {
	file, err := f.VFS.OpenReader(dir, name)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open++
	return &faultFile{file.(types.WritableFile), f, filepath.Join(dir, name)}, nil
}

func (f *faultFS) OpenWriter(dir, name string) (types.WritableFile, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.openErr != nil {
		return nil, f.openErr
	}
	w, err := f.VFS.OpenWriter(dir, name)
	if err != nil {
		return nil, err
	}
	f.open++
	return &faultFile{w, f, filepath.Join(dir, name)}, nil
}

func (f *faultFile) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.fs.open--
	return f.WritableFile.Close()
}

func (f *faultFile) WriteAt(b []byte, at int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.remember(at, int64(len(b)))
	if f.fs.writeErr != nil {
		n, _ := f.WritableFile.WriteAt(b[:len(b)/2], at)
		return n, f.fs.writeErr
	}
	return f.WritableFile.WriteAt(b, at)
}

func (f *faultFile) remember(at, n int64) {
	sectors := f.fs.unsynced[f.path]
	if sectors == nil {
		sectors = map[int64][]byte{}
		f.fs.unsynced[f.path] = sectors
	}
	for s := at / sector; s*sector < at+n; s++ {
		if sectors[s] == nil {
			sectors[s] = make([]byte, sector)
			f.ReadAt(sectors[s], s*sector)
		}
	}
}

func (f *faultFile) Sync() error {
	f.fs.mu.Lock()
	hang := f.fs.hang
	f.fs.mu.Unlock()
	if hang != nil {
		<-hang
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.syncErr != nil {
		return f.fs.syncErr
	}
	delete(f.fs.unsynced, f.path)
	delete(f.fs.created, f.path)
	return f.WritableFile.Sync()
}

// cut is the power failing, while nothing is open: the unsynced sectors for whose rank lost says so are as they were.
func (f *faultFS) cut(t *testing.T, lost func(i int) bool) {
	for path, sectors := range f.unsynced {
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		for i, s := range slices.Sorted(maps.Keys(sectors)) {
			if lost(i) {
				file.WriteAt(sectors[s], s*sector)
			}
		}
		file.Close()
	}
	for path := range f.created {
		if lost(0) {
			os.Remove(path)
		}
	}
	clear(f.unsynced)
	clear(f.created)
}

// A faultMeta is raft-wal's meta store, until it fails.
type faultMeta struct {
	metadb.BoltMetaDB
	mu  sync.Mutex
	err error
}

func (m *faultMeta) fail(err error) { m.mu.Lock(); m.err = err; m.mu.Unlock() }
func (m *faultMeta) failing() error { m.mu.Lock(); defer m.mu.Unlock(); return m.err }

func (m *faultMeta) SetStable(key, value []byte) error {
	if err := m.failing(); err != nil {
		return err
	}
	return m.BoltMetaDB.SetStable(key, value)
}

func (m *faultMeta) CommitState(s types.PersistentState) error {
	if err := m.failing(); err != nil {
		return err
	}
	return m.BoltMetaDB.CommitState(s)
}

func logOptionsIn(t *testing.T) logOptions {
	return logOptions{dir: filepath.Join(t.TempDir(), "wal"), segmentSize: tinySegment, log: slog.New(slog.DiscardHandler)}
}

func faultyOptions(t *testing.T) (logOptions, *faultFS) {
	o := logOptionsIn(t)
	disk := &faultFS{VFS: walfs.New(), unsynced: map[string]map[int64][]byte{}, created: map[string]bool{}}
	o.vfs = disk
	return o, disk
}

// reopenLog closes l, unless it is nil, and opens what o says.
func reopenLog(t *testing.T, l *logStore, o logOptions) *logStore {
	t.Helper()
	if l != nil {
		closeLog(t, l)
	}
	l, err := openLog(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	return l
}

func closeLog(t *testing.T, l *logStore) {
	t.Helper()
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
}

const bigEntry = 5000 // the one index whose entry fills a segment

func testEntry(index, term uint64) *raft.Log {
	data := binary.BigEndian.AppendUint64([]byte("entry "), index)
	size := int(index * 37 % 40)
	if index == bigEntry {
		size = 20 << 10
	}
	return &raft.Log{Index: index, Term: term, Data: append(data, bytes.Repeat([]byte{byte(index)}, size)...)}
}

// appendEntries stores n entries from index on, three at a time.
func appendEntries(t *testing.T, l *logStore, index, term, n uint64) {
	var es []*raft.Log
	for i := range n {
		es = append(es, testEntry(index+i, term))
	}
	for batch := range slices.Chunk(es, 3) {
		if err := l.StoreLogs(batch); err != nil {
			t.Errorf("append at %d: %v", batch[0].Index, err)
			return
		}
	}
}

func appendLog(t *testing.T, l *logStore, index, term, n uint64) {
	t.Helper()
	appendEntries(t, l, index, term, n)
	if t.Failed() {
		t.FailNow()
	}
}

func deleteLog(t *testing.T, l *logStore, low, high uint64) {
	t.Helper()
	if err := l.DeleteRange(low, high); err != nil {
		t.Fatal(err)
	}
}

// wantLog wants the log to hold first to last, in memory and on disk.
func wantLog(t *testing.T, l *logStore, first, last uint64) {
	t.Helper()
	gotFirst, _ := l.FirstIndex()
	gotLast, _ := l.LastIndex()
	if gotFirst != first || gotLast != last {
		t.Fatalf("holds %d to %d, want %d to %d", gotFirst, gotLast, first, last)
	}
	for i := first; i != 0 && i <= last; i++ {
		wantEntry(t, l, i)
	}
	if l.busy() > 0 {
		return // the disk hangs
	}
	if err := l.verify(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func wantEntry(t *testing.T, l *logStore, index uint64) {
	t.Helper()
	var e raft.Log
	if err := l.read(index, &e); err != nil {
		t.Fatal(err)
	}
	if e.Index != index || string(e.Data) != string(testEntry(index, 1).Data) {
		t.Fatalf("index %d holds %d, %q", index, e.Index, e.Data)
	}
}

func wantFault(l *logStore, want error) error {
	if err := l.failed(); !errors.Is(err, want) {
		return fmt.Errorf("failed() is %v, want %v", err, want)
	}
	return nil
}

func wantDamage(t *testing.T, err error, parts ...string) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) {
		t.Fatalf("%v, want ErrCorrupt", err)
	}
	for _, part := range append(parts, logRepair) {
		if !strings.Contains(err.Error(), part) {
			t.Fatalf("%q does not say %q", err, part)
		}
	}
}

// inRaft runs f as one of raft's goroutines does. True follows if f returned, false if it ended with Goexit.
func inRaft(f func()) chan bool {
	ended := make(chan bool, 1)
	go func() {
		returned := false
		defer func() { ended <- returned; close(ended) }()
		f()
		returned = true
	}()
	return ended
}

func wantParked(t *testing.T, ended chan bool) {
	t.Helper()
	select {
	case returned := <-ended:
		t.Fatalf("ended, want it to wait; returned: %v", returned)
	default:
	}
}

// comesTrue waits until f gives no error.
func comesTrue(t *testing.T, f func() error) {
	t.Helper()
	eventually(t, 10*time.Second, "what the log should come to", f)
}

func flipInFiles(t *testing.T, dir string, pattern []byte) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "*.wal"))
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(data, pattern); i >= 0 {
			data[i+len(pattern)-1] ^= 4
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%x is in no file of %s", pattern, dir)
}
