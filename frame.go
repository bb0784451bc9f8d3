package quorate

// The bytes of messages between members: what the routes under /raft/ carry, and the limits on it. It owns these bytes and
// nothing else: no connection, no rule about who may speak. peer.go and transport.go encode and decode. The hot bodies
// (an append and its answer) are binary, the cold ones JSON, so that a person with curl can read them. Decoding is total:
// any bytes give a message or an error, and never allocate more than a small multiple of what really came.
//
//	append    version header term leader prevIndex prevTerm commit count { log }
//	log       index term type data extensions appendedAt
//	answer    version header term lastLog flags
//	header    protocol id addr                              raft's own header
//	snapshot  length json { byte }                          the json is raft's request, the bytes are the state
//
// Numbers are unsigned varints, except version, type and flags (a byte each). Byte strings are a length and the bytes.

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/hashicorp/raft"
)

// protocolVersion is spoken on every route; members of different versions refuse each other by name. laterProtocol is the same,
// asked by a member whose state is past the first format. A release that reads no more than that one refuses it, and is thereby
// told of no commit that it would pass over as bytes without meaning, and answer as if it had applied it.
const (
	protocolVersion = 1
	laterProtocol   = 2
)

// frameVersion is the first byte of the binary bodies.
const frameVersion = 1

// Headers of every request and, but for the target and the address, of every answer.
const (
	headerProtocol = "Quorate-Protocol"
	headerCluster  = "Quorate-Cluster"
	headerFrom     = "Quorate-From"
	headerFromAddr = "Quorate-From-Addr"
	headerTo       = "Quorate-To"
	headerReads    = "Quorate-Reads" // of requests: the newest format that the sender reads; missing = the first
	headerSize     = "Quorate-Size"  // of an answer that is a piece of the state: bytes of the whole; missing = it is the whole
)

// Limits of the wire. They are protocol, not configuration: members that disagreed about them could not replicate.
const (
	maxAppend         = 4 << 20 // bytes of the entries of one append, unless its only entry is larger
	maxAppendEntries  = 1024
	maxAppendBody     = maxAppend + maxEntry + 256<<10 // headers, sums and varints of 1,024 entries fit in the rest
	maxProposeBody    = maxEntry + 64<<10
	maxSmallBody      = 64 << 10 // vote, join and the like, and the header of a snapshot
	maxStatusBody     = 64 << 10 // a status may come from anybody
	maxAnswerBody     = 1 << 20  // of every other answer but a state
	maxSnapshot       = 64 << 30 // bytes
	minSnapshot       = 33       // more than the checksum that ends the stream
	minLogBytes       = 6        // encoded bytes of the smallest log entry
	maxIndex          = 1 << 62  // an index or a term above it is nobody's: arithmetic on it could wrap
	maxHeaderBytes    = 4 << 10  // an id or an address
	maxExtensionBytes = 64 << 10
)

// What a refusal says, for programs.
const (
	codeNotLeader    = "not-leader"    // 421, with the leader's address if it is known
	codeNotReady     = "not-ready"     // 503: not started, closing, or the disk is stalled; 400: the body did not come
	codeNotAllowed   = "not-allowed"   // 403
	codeRemoved      = "removed"       // 410
	codeWrongCluster = "wrong-cluster" // 412
	codeWrongTarget  = "wrong-target"  // 412
	codeProtocol     = "protocol"      // 412
	codeBadRequest   = "bad-request"   // 400
	codeTLS          = "tls"           // 403
	codeBusy         = "busy"          // 503
	codeUncertain    = "uncertain"     // 500: the entry may have been appended; every other code says that it was not
	codeNotApplied   = "not-applied"   // 503
	codeConflict     = "conflict"      // 409
)

// A refusal is the answer of a member that did not do what it was asked. It travels as JSON with its HTTP status.
type refusal struct {
	Status     int    `json:"-"`
	Code       string `json:"code"`
	Message    string `json:"message,omitempty"`
	LeaderID   string `json:"leaderid,omitempty"`
	LeaderAddr string `json:"leaderaddr,omitempty"`
	Cluster    string `json:"cluster,omitempty"`
	Member     string `json:"member,omitempty"`
	Final      bool   `json:"final,omitempty"`    // of a write: another try would be refused as well, for now; release 0.1.0 tries on
	LogWaits   bool   `json:"logwaits,omitempty"` // of an append: the log takes no entries for now; release 0.1.0 reads the message alone
}

func (r *refusal) Error() string {
	if r.Message == "" {
		return r.Code
	}
	return r.Code + ": " + r.Message
}

func refuse(status int, code, format string, args ...any) *refusal {
	return &refusal{Status: status, Code: code, Message: fmt.Sprintf(format, args...)}
}

// A joinRequest asks to become a member or, with Announce, tells the address that a member has now.
type joinRequest struct {
	ID       string `json:"id"`
	Addr     string `json:"addr"`
	Format   uint64 `json:"format"`
	Announce bool   `json:"announce,omitempty"`
}

type joinAnswer struct {
	Cluster    string       `json:"cluster"`
	LeaderID   string       `json:"leaderid"`
	LeaderAddr string       `json:"leaderaddr"`
	Members    []memberAddr `json:"members"`
	Founders   []string     `json:"founders,omitempty"` // nothing is acknowledged before a majority of these vote: see founding.go
}

type memberAddr struct {
	ID    string `json:"id"`
	Addr  string `json:"addr"`
	Voter bool   `json:"voter"`

	NoVote string `json:"novote,omitempty"` // in a leader's status: why it has none; releases before 0.2 don't say
}

// A statusAnswer is for anyone who asks: it holds ids, roles and counters, never a key or a value.
type statusAnswer struct {
	ID            string        `json:"id"`
	Cluster       string        `json:"cluster"`
	Addr          string        `json:"addr"`
	Role          string        `json:"role"`
	Term          uint64        `json:"term"`
	LastIndex     uint64        `json:"lastindex"`
	LastTerm      uint64        `json:"lastterm"` // of the entry at LastIndex
	CommitIndex   uint64        `json:"commitindex"`
	Applied       uint64        `json:"applied"`
	Format        uint64        `json:"format"`
	LeaderID      string        `json:"leaderid"`
	LeaderAddr    string        `json:"leaderaddr"`
	LeaderSilence int64         `json:"leadersilence"`       // ms since the leader was last heard; 0 also if the release does not say
	Follows       int64         `json:"follows,omitempty"`   // ms since this member learned of that leader; 0 also if the release does not say
	Confirmed     int64         `json:"confirmed,omitempty"` // ms since a round began in which a quorum has confirmed the leader, and 1; 0 = none, or the release does not say
	Founders      []string      `json:"founders,omitempty"`  // Config.Bootstrap of a member that has no cluster yet: see founding.go
	Held          bool          `json:"held,omitempty"`      // a majority of the founders does not vote yet, so that nothing is acknowledged
	Empty         bool          `json:"empty,omitempty"`     // it is a member of nothing, and asks nobody to be admitted
	Healthy       bool          `json:"healthy"`
	LogWaits      bool          `json:"logwaits,omitempty"` // its log takes no entries for now: as far as it knows, or with queryTryLog after a try
	Stuck         bool          `json:"stuck,omitempty"`    // its disk is not known to work, with queryTryDisk alone: see hang.go; false also if the release does not say
	Unfit         string        `json:"unfit,omitempty"`    // why it should not lead; a release that does not say is fit if it is healthy
	Relieved      int64         `json:"relieved,omitempty"` // ms since it led, was unfit to, and handed over; 0 = never, or the release does not say
	Rests         int64         `json:"rests,omitempty"`    // ms for which it does not take the lead from one that is unfit, as it was so itself again and again
	Fsync         int64         `json:"fsync,omitempty"`    // µs that its appends to the log take, with their fsync; 0 = none yet, or the release does not say
	Members       []memberAddr  `json:"members"`
	Reached       []reachAnswer `json:"reached,omitempty"` // a release that does not say gives none
	Marks         []markAnswer  `json:"marks,omitempty"`
}

const (
	queryTryLog  = "try=log"  // of a GET status: it tries out whether its log takes an entry
	queryTryDisk = "try=disk" // of a GET status: it tries out whether its disk works
	queryPiece   = "piece="   // of a GET state: see fetch.go; release 0.1.0 gives the whole
)

// A reachAnswer is what became of the calls of the member that answers to another one. Times are ms before the answer.
type reachAnswer struct {
	ID      string `json:"id"`
	Tried   int64  `json:"tried"`             // when the newest call ended
	Failing int64  `json:"failing,omitempty"` // when the first of those began that were not answered since; 0 = the newest was answered
	Error   string `json:"error,omitempty"`   // what the newest met
}

type markAnswer struct {
	Boundary uint64 `json:"boundary"`
	Applied  uint64 `json:"applied"`
	Sum      uint64 `json:"sum"`
	Chain    string `json:"chain"`
}

// indexAnswer is an entry that is committed, and that whoever asked must have applied before it reads.
type indexAnswer struct {
	Index   uint64 `json:"index"`
	Term    uint64 `json:"term"`
	Refusal string `json:"refusal,omitempty"` // why the leader takes no write now; release 0.1.0 neither sends nor reads it
}

// termAnswer is the term of whoever sends it. It is the answer to term, and may be the body of readindex: the sender had read it
// after what it asks for had begun. Release 0.1.0 sends no body there and reads none.
type termAnswer struct {
	Term uint64 `json:"term"`
}

type removeRequest struct {
	Addr string `json:"addr"`
}

// A transferRequest asks the leader to hand over, to the voter at Addr or to the best one. Release 0.1.0 answers 404.
type transferRequest struct {
	Addr string `json:"addr"`
}

var errFrame = errors.New("malformed message")

// cutEntries keeps the longest prefix of at most maxAppend bytes, and at least one entry. Without it, raft's limit by
// number would make one request of 64 values of 16 MiB each.
func cutEntries(entries []*raft.Log) []*raft.Log {
	size := 0
	for i, e := range entries {
		size += len(e.Data) + len(e.Extensions) + minLogBytes
		if i > 0 && size > maxAppend || i == maxAppendEntries {
			return entries[:i]
		}
	}
	return entries
}

// cutToPass keeps the longest prefix that makes an append of at most room bytes, and at least one entry.
func cutToPass(entries []*raft.Log, room int64) []*raft.Log {
	size := int64(appendOverhead)
	for i, e := range entries {
		if size += entryBytes(e); i > 0 && size > room {
			return entries[:i]
		}
	}
	return entries
}

const appendOverhead = 512 // bytes of an append beside its entries, at most, but for addresses of an odd length

// entryBytes is at least what an entry takes in an append.
func entryBytes(e *raft.Log) int64 { return int64(len(e.Data) + len(e.Extensions) + 48) }

func encodeAppend(a *raft.AppendEntriesRequest) []byte {
	size := 128 + len(a.ID) + len(a.Addr)
	for _, e := range a.Entries {
		size += len(e.Data) + len(e.Extensions) + 48
	}
	b := append(make([]byte, 0, size), frameVersion)
	b = appendHeader(b, a.RPCHeader)
	b = binary.AppendUvarint(b, a.Term)
	b = binary.AppendUvarint(b, a.PrevLogEntry)
	b = binary.AppendUvarint(b, a.PrevLogTerm)
	b = binary.AppendUvarint(b, a.LeaderCommitIndex)
	b = binary.AppendUvarint(b, uint64(len(a.Entries)))
	for _, e := range a.Entries {
		b = binary.AppendUvarint(b, e.Index)
		b = binary.AppendUvarint(b, e.Term)
		b = append(b, byte(e.Type))
		b = appendBytes(b, e.Data)
		b = appendBytes(b, e.Extensions)
		b = binary.AppendUvarint(b, encodeTime(e.AppendedAt))
	}
	return b
}

// decodeAppend aliases data: the entries live as long as the body does.
func decodeAppend(data []byte) (*raft.AppendEntriesRequest, error) {
	r := reader{b: data}
	if v := r.byte(); v != frameVersion {
		return nil, fmt.Errorf("%w: append of version %d", errFrame, v)
	}
	a := &raft.AppendEntriesRequest{RPCHeader: r.header()}
	a.Term = r.uint()
	a.PrevLogEntry, a.PrevLogTerm, a.LeaderCommitIndex = r.uint(), r.uint(), r.uint()
	n := r.count(maxAppendEntries)
	if n > len(r.b)/minLogBytes {
		return nil, errFrame
	}
	if n > 0 {
		a.Entries = make([]*raft.Log, 0, n)
	}
	for range n {
		e := &raft.Log{Index: r.uint(), Term: r.uint(), Type: raft.LogType(r.byte())}
		e.Data = r.some(maxEntry)
		e.Extensions = r.some(maxExtensionBytes)
		e.AppendedAt = decodeTime(r.uint())
		if r.bad {
			return nil, errFrame
		}
		a.Entries = append(a.Entries, e)
	}
	if r.bad || len(r.b) != 0 {
		return nil, errFrame
	}
	return a, nil
}

func encodeAppendAnswer(a *raft.AppendEntriesResponse) []byte {
	b := append(make([]byte, 0, 64+len(a.ID)+len(a.Addr)), frameVersion)
	b = appendHeader(b, a.RPCHeader)
	b = binary.AppendUvarint(b, a.Term)
	b = binary.AppendUvarint(b, a.LastLog)
	var flags byte
	if a.Success {
		flags |= 1
	}
	if a.NoRetryBackoff {
		flags |= 2
	}
	return append(b, flags)
}

func decodeAppendAnswer(data []byte, a *raft.AppendEntriesResponse) error {
	r := reader{b: data}
	version := r.byte()
	answer := raft.AppendEntriesResponse{RPCHeader: r.header(), Term: r.uint(), LastLog: r.uint()}
	flags := r.byte()
	if r.bad || len(r.b) != 0 || version != frameVersion || flags > 3 || answer.Term > maxIndex {
		return fmt.Errorf("%w: answer to an append", errFrame)
	}
	answer.Success, answer.NoRetryBackoff = flags&1 != 0, flags&2 != 0
	*a = answer
	return nil
}

func appendHeader(b []byte, h raft.RPCHeader) []byte {
	b = binary.AppendUvarint(b, uint64(h.ProtocolVersion))
	b = appendBytes(b, h.ID)
	return appendBytes(b, h.Addr)
}

func (r *reader) header() raft.RPCHeader {
	version := r.uint()
	if version > 1<<16 {
		r.bad = true
	}
	return raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersion(version & 0xffff),
		ID:              r.some(maxHeaderBytes),
		Addr:            r.some(maxHeaderBytes),
	}
}

// some is bytes with nil for none: raft tells an absent id from an empty one by its length, its callers by nil.
func (r *reader) some(limit int) []byte {
	b := r.bytes(limit)
	if len(b) == 0 {
		return nil
	}
	return b
}

func appendBytes(b, v []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(v)))
	return append(b, v...)
}

// A time is its nanoseconds since 1970, and 0 is the zero time. It only serves metrics.
func encodeTime(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixNano())
}

func decodeTime(n uint64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(n))
}

// encodeSnapshotHeader is what comes before the bytes of a snapshot.
func encodeSnapshotHeader(req *raft.InstallSnapshotRequest) ([]byte, error) {
	header, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	if len(header) > maxSmallBody {
		return nil, &LimitError{What: "header of a snapshot", Limit: maxSmallBody, Got: int64(len(header))}
	}
	return append(binary.AppendUvarint(nil, uint64(len(header))), header...), nil
}

// readSnapshotHeader leaves body at the first byte of the state.
func readSnapshotHeader(body io.Reader) (*raft.InstallSnapshotRequest, error) {
	size, err := binary.ReadUvarint(byteReader{body})
	if err != nil {
		return nil, fmt.Errorf("%w: snapshot: %v", errFrame, err)
	}
	if size > maxSmallBody {
		return nil, fmt.Errorf("%w: snapshot header of %d bytes", errFrame, size)
	}
	header := make([]byte, size)
	if _, err := io.ReadFull(body, header); err != nil {
		return nil, fmt.Errorf("%w: snapshot: %v", errFrame, err)
	}
	var req raft.InstallSnapshotRequest
	if err := json.Unmarshal(header, &req); err != nil {
		return nil, fmt.Errorf("%w: snapshot: %v", errFrame, err)
	}
	return &req, nil
}

// A byteReader reads single bytes without reading ahead: what follows belongs to someone else.
type byteReader struct{ r io.Reader }

func (b byteReader) ReadByte() (byte, error) {
	var one [1]byte
	_, err := io.ReadFull(b.r, one[:])
	return one[0], err
}

// checkAppend refuses what raft would panic on or store wrongly: its decoder of configurations panics on bytes that are not
// one, and entries that do not follow each other leave a hole in the log.
func checkAppend(a *raft.AppendEntriesRequest) error {
	if a.Term > maxIndex || a.PrevLogEntry > maxIndex {
		return fmt.Errorf("%w: term %d, previous index %d", errFrame, a.Term, a.PrevLogEntry)
	}
	for i, e := range a.Entries {
		if want := a.PrevLogEntry + 1 + uint64(i); e.Index != want {
			return fmt.Errorf("%w: entry %d where %d belongs", errFrame, e.Index, want)
		}
		if e.Term == 0 || e.Term > a.Term {
			return fmt.Errorf("%w: entry %d of term %d from a leader of term %d", errFrame, e.Index, e.Term, a.Term)
		}
		switch e.Type {
		case raft.LogCommand, raft.LogNoop, raft.LogBarrier:
		case raft.LogConfiguration:
			if err := checkConfiguration(e.Data); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%w: entry %d of type %d", errFrame, e.Index, e.Type)
		}
	}
	return nil
}

func checkSnapshot(req *raft.InstallSnapshotRequest) error {
	switch {
	case req.Size < minSnapshot || req.Size > maxSnapshot:
		return fmt.Errorf("%w: snapshot of %d bytes", errFrame, req.Size)
	case req.LastLogIndex == 0 || req.LastLogIndex > maxIndex || req.ConfigurationIndex > req.LastLogIndex:
		return fmt.Errorf("%w: snapshot at index %d, configuration at %d", errFrame, req.LastLogIndex, req.ConfigurationIndex)
	case req.Term > maxIndex || req.LastLogTerm == 0 || req.LastLogTerm > req.Term:
		return fmt.Errorf("%w: snapshot of term %d from a leader of term %d", errFrame, req.LastLogTerm, req.Term)
	case req.SnapshotVersion != 1:
		return fmt.Errorf("%w: snapshot of version %d", errFrame, req.SnapshotVersion)
	}
	return checkConfiguration(req.Configuration)
}

func checkConfiguration(data []byte) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: %v", errFrame, v)
		}
	}()
	if c := raft.DecodeConfiguration(data); len(c.Servers) == 0 {
		return fmt.Errorf("%w: configuration without members", errFrame)
	}
	return nil
}
