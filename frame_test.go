package quorate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func someAppend() *raft.AppendEntriesRequest {
	config := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "127.0.0.1:1"}}})
	return &raft.AppendEntriesRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: 3, ID: []byte("a"), Addr: []byte("127.0.0.1:1")},
		Term:         7,
		PrevLogEntry: 41,
		PrevLogTerm:  6,
		Entries: []*raft.Log{
			{Index: 42, Term: 6, Type: raft.LogCommand, Data: []byte("data"), Extensions: []byte("sum"), AppendedAt: time.Unix(1, 2)},
			{Index: 43, Term: 7, Type: raft.LogNoop},
			{Index: 44, Term: 7, Type: raft.LogConfiguration, Data: config, Extensions: []byte{0}},
		},
		LeaderCommitIndex: 40,
	}
}

func TestAppendRoundTrip(t *testing.T) {
	for _, want := range []*raft.AppendEntriesRequest{someAppend(), {}, {Term: math.MaxUint64, PrevLogEntry: math.MaxUint64}} {
		got, err := decodeAppend(encodeAppend(want))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v\nwant %+v", got, want)
		}
	}
	if err := checkAppend(someAppend()); err != nil {
		t.Errorf("a good append is refused: %v", err)
	}
}

func TestAppendAnswerRoundTrip(t *testing.T) {
	for _, want := range []raft.AppendEntriesResponse{
		{},
		{RPCHeader: raft.RPCHeader{ProtocolVersion: 3, ID: []byte("b"), Addr: []byte("x:1")}, Term: 9, LastLog: 5, Success: true},
		{Term: 1, NoRetryBackoff: true},
	} {
		got := raft.AppendEntriesResponse{Term: 99, LastLog: 99, Success: true, NoRetryBackoff: true} // raft reuses it
		if err := decodeAppendAnswer(encodeAppendAnswer(&want), &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

// Every prefix of a message is refused, and so is a message with a byte more.
func TestAppendCutShort(t *testing.T) {
	whole := encodeAppend(someAppend())
	for n := range whole {
		if _, err := decodeAppend(whole[:n]); !errors.Is(err, errFrame) {
			t.Fatalf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
	if _, err := decodeAppend(append(whole, 0)); !errors.Is(err, errFrame) {
		t.Errorf("a byte more: %v", err)
	}
	answer := encodeAppendAnswer(&raft.AppendEntriesResponse{Term: 300, LastLog: 300})
	for n := range answer {
		if err := decodeAppendAnswer(answer[:n], new(raft.AppendEntriesResponse)); !errors.Is(err, errFrame) {
			t.Fatalf("answer, %d of %d bytes: %v", n, len(answer), err)
		}
	}
}

func TestAppendOfImpossibleLengths(t *testing.T) {
	for _, n := range []uint64{maxAppendEntries + 1, 1 << 31, 1 << 63, math.MaxUint64} {
		head := []byte{frameVersion, 3, 0, 0, 1, 0, 0, 0, 0}
		count := append(binary.AppendUvarint(bytes.Clone(head), n), make([]byte, 4096)...)
		if _, err := decodeAppend(count); !errors.Is(err, errFrame) {
			t.Errorf("count %d: %v", n, err)
		}
		data := append(bytes.Clone(head), 1, 1, 1, 0)
		data = append(binary.AppendUvarint(data, n<<8), make([]byte, 64)...)
		if _, err := decodeAppend(data); !errors.Is(err, errFrame) {
			t.Errorf("length %d: %v", n<<8, err)
		}
	}
}

func TestCheckAppend(t *testing.T) {
	for name, spoil := range map[string]func(*raft.AppendEntriesRequest){
		"hole":            func(a *raft.AppendEntriesRequest) { a.Entries[1].Index = 50 },
		"twice":           func(a *raft.AppendEntriesRequest) { a.Entries[1].Index = 42 },
		"first too late":  func(a *raft.AppendEntriesRequest) { a.PrevLogEntry = 40 },
		"newer than term": func(a *raft.AppendEntriesRequest) { a.Entries[2].Term = 8 },
		"term 0":          func(a *raft.AppendEntriesRequest) { a.Entries[0].Term = 0 },
		"peer list":       func(a *raft.AppendEntriesRequest) { a.Entries[0].Type = raft.LogAddPeerDeprecated },
		"unknown type":    func(a *raft.AppendEntriesRequest) { a.Entries[0].Type = 99 },
		"configuration":   func(a *raft.AppendEntriesRequest) { a.Entries[2].Data = []byte{0xc1, 0xff} },
		"no members":      func(a *raft.AppendEntriesRequest) { a.Entries[2].Data = raft.EncodeConfiguration(raft.Configuration{}) },
		"index wraps":     func(a *raft.AppendEntriesRequest) { a.PrevLogEntry = math.MaxUint64 },
	} {
		a := someAppend()
		spoil(a)
		if err := checkAppend(a); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCutEntries(t *testing.T) {
	log := func(size int) *raft.Log { return &raft.Log{Data: make([]byte, size)} }
	small := make([]*raft.Log, maxAppendEntries+9)
	for i := range small {
		small[i] = log(1)
	}
	for name, c := range map[string]struct {
		entries []*raft.Log
		want    int
	}{
		"none":              {nil, 0},
		"one too large":     {[]*raft.Log{log(maxValueEver), log(1)}, 1},
		"two, then too big": {[]*raft.Log{log(1 << 20), log(2 << 20), log(2 << 20)}, 2},
		"exactly":           {[]*raft.Log{log(2<<20 - minLogBytes), log(2<<20 - minLogBytes), log(0)}, 2},
		"too many":          {small, maxAppendEntries},
	} {
		if got := cutEntries(c.entries); len(got) != c.want {
			t.Errorf("%s: %d entries, want %d", name, len(got), c.want)
		}
	}
	largest := encodeAppend(&raft.AppendEntriesRequest{Entries: []*raft.Log{log(maxEntry)}})
	if len(largest) > maxAppendBody {
		t.Errorf("the largest entry makes an append of %d bytes, limit %d", len(largest), maxAppendBody)
	}
}

func someSnapshot() *raft.InstallSnapshotRequest {
	return &raft.InstallSnapshotRequest{
		RPCHeader:       raft.RPCHeader{ProtocolVersion: 3, ID: []byte("a"), Addr: []byte("127.0.0.1:1")},
		SnapshotVersion: 1, Term: 5, LastLogIndex: 100, LastLogTerm: 4, Size: 40,
		Configuration:      raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "127.0.0.1:1"}}}),
		ConfigurationIndex: 1,
	}
}

func TestSnapshotHeader(t *testing.T) {
	want := someSnapshot()
	b, err := encodeSnapshotHeader(want)
	if err != nil {
		t.Fatal(err)
	}
	body := io.MultiReader(bytes.NewReader(b), strings.NewReader("the state"))
	got, err := readSnapshotHeader(body)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, %v\nwant %+v", got, err, want)
	}
	if rest, _ := io.ReadAll(body); string(rest) != "the state" {
		t.Errorf("what follows is %q", rest)
	}
	if err := checkSnapshot(want); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*raft.InstallSnapshotRequest){
		"empty":         func(s *raft.InstallSnapshotRequest) { s.Size = 0 },
		"negative":      func(s *raft.InstallSnapshotRequest) { s.Size = -1 },
		"huge":          func(s *raft.InstallSnapshotRequest) { s.Size = math.MaxInt64 },
		"index 0":       func(s *raft.InstallSnapshotRequest) { s.LastLogIndex = 0 },
		"configuration": func(s *raft.InstallSnapshotRequest) { s.Configuration = []byte("x") },
		"version":       func(s *raft.InstallSnapshotRequest) { s.SnapshotVersion = 0 },
		"term":          func(s *raft.InstallSnapshotRequest) { s.LastLogTerm = 6 },
	} {
		s := someSnapshot()
		spoil(s)
		if err := checkSnapshot(s); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{
		"nothing":     nil,
		"huge length": binary.AppendUvarint(nil, 1<<63),
		"too long":    append(binary.AppendUvarint(nil, maxSmallBody+1), make([]byte, maxSmallBody+1)...),
		"short":       append(binary.AppendUvarint(nil, 100), "{}"...),
		"no json":     append(binary.AppendUvarint(nil, 2), "[x"...),
	} {
		if _, err := readSnapshotHeader(bytes.NewReader(b)); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzAppendFrame(f *testing.F) {
	f.Add(encodeAppend(someAppend()))
	f.Add(encodeAppend(&raft.AppendEntriesRequest{}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, err := decodeAppend(data)
		runtime.ReadMemStats(&after)
		// 128 bytes for a log of 6, and other goroutines of the test's.
		if grown := after.TotalAlloc - before.TotalAlloc; grown > uint64(len(data))*32+1<<20 {
			t.Fatalf("%d bytes allocated for %d", grown, len(data))
		}
		if err != nil {
			return
		}
		_ = checkAppend(got)
		again, err := decodeAppend(encodeAppend(got))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, again) {
			t.Fatalf("%+v\nbecomes %+v", got, again)
		}
	})
}
