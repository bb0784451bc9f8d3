package quorate

import (
	"crypto/sha256"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
)

// What was received in pieces takes no space a second time while it is written to another file.
func TestPiecesGiveTheirSpaceBack(t *testing.T) {
	t.Parallel()
	f, err := os.Create(filepath.Join(t.TempDir(), "part"))
	must(t, err)
	defer f.Close()
	data := make([]byte, 4*pieceMost+1000)
	for i := range data {
		data[i] = byte(i>>12) | 1
	}
	_, err = f.Write(data)
	must(t, err)
	before := blocks(t, f)
	l := &lastReader{file: f, r: io.NewSectionReader(f, 0, int64(len(data)))}
	hash := sha256.New()
	_, err = io.Copy(hash, l)
	must(t, err)
	if [sha256.Size]byte(hash.Sum(nil)) != sha256.Sum256(data) {
		t.Error("other bytes were read")
	}
	if err := giveBack(f, 0, pieceMost); err != nil {
		t.Skip("this file system can't free a part of a file: ", err)
	}
	if now := blocks(t, f); now > before/8 {
		t.Errorf("%d blocks of %d are in use after all was read", now, before)
	}
}

func blocks(t *testing.T, f *os.File) int64 {
	t.Helper()
	must(t, f.Sync())
	info, err := f.Stat()
	must(t, err)
	return info.Sys().(*syscall.Stat_t).Blocks
}

// A state meets a full disk while it is received, in pieces or in one request: the member says so, and nothing of it stays.
func TestFullWhileReceiving(t *testing.T) {
	t.Parallel()
	small := smallDisk(t, "64k")
	part := filepath.Join(small, "part")
	d := doorHost()
	var met error
	d.incoming, d.noRoom = func() string { return part }, func(err error) { met = err }
	p, _ := d.peer(t, false, func(raft.RPC) {})
	h := pieceHeader{ID: newID(), Install: *someSnapshot()}
	h.Install.RPCHeader, h.Install.Term, h.Install.LastLogIndex, h.Install.LastLogTerm, h.Install.Size = from("b"), 7, 60, 7, 1<<20
	body, err := encodePiece(&h, make([]byte, 100<<10))
	must(t, err)
	if resp, _ := send(p, "POST", "/raft/piece", body, nil); resp.StatusCode != http.StatusConflict || !isFull(met) {
		t.Errorf("status %d, and told %v", resp.StatusCode, met)
	}
	leader, f := newFSMWith(t, 1<<20), newFSMWith(t, 1<<20)
	session := openTestSession(t, leader, 1, "one")
	applyOne(t, leader, command(2, batchBytes(session, 2, 0, transaction{setOp("k", strings.Repeat("x", 200<<10))})))
	var told error
	f.fault = func(err error) { told = err }
	source, target := &snapshotStore{fsm: leader}, &snapshotStore{fsm: f, path: filepath.Join(small, "snap.incoming")}
	if err := sendSnapshot(source, target, nil); err == nil || !isFull(told) {
		t.Errorf("%v, and told %v", err, told)
	}
	if left, _ := os.ReadDir(small); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
