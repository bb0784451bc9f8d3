package quorate

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

var errStalledDisk = errors.New("the disk is stalled")

// A door is the host of a peer without a Service: member "a" of cluster "c" at 127.0.0.1:1, in a configuration with "b"
// and "n", a non-voter; "gone" was removed. The log ends at index 50 of term 7, applied up to 40.
type door struct {
	peerHost
	members   sync.Map // id → voter
	lead      atomic.Uint64
	led       atomic.Bool // a leader is known
	quiet     atomic.Bool
	closed    atomic.Bool
	strangers atomic.Int64
	contacts  atomic.Int64
	proposed  atomic.Int64
}

func doorHost() *door {
	d := &door{}
	d.members.Store("a", true)
	d.members.Store("b", true)
	d.members.Store("n", false)
	d.lead.Store(7)
	d.peerHost = peerHost{
		self:  func() (string, string, string) { return "a", "c", "127.0.0.1:1" },
		ready: func() bool { return !d.closed.Load() },
		server: func(id string) (string, bool, bool) {
			voter, known := d.members.Load(id)
			return "", known, known && voter.(bool)
		},
		announced:  func(string) string { return "" },
		unannounce: func(string, string) {},
		raftEnd:    func() uint64 { return 1 << 40 },
		allowed:    func(string) bool { return true },
		removed:    func(id string) bool { return id == "gone" },
		standsLast: func() bool { return false }, logWaits: func() error { return nil }, answers: func(raft.ServerID, uint64) {}, refuses: func(raft.ServerID, uint64) {},
		silent: func() error {
			if d.quiet.Load() {
				return errStalledDisk
			}
			return nil
		},
		formats:   func() (uint64, uint64) { return firstFormat, entryFormat },
		leading:   func(term uint64) bool { return d.lead.Load() == term },
		leader:    func() (string, string) { return "l", "127.0.0.1:9" },
		term:      func() uint64 { return 7 },
		states:    func() (uint64, error) { return 7, nil },
		hasLeader: d.led.Load,
		lastEntry: func() (uint64, uint64) { return 50, 7 },
		applied:   func() uint64 { return 40 },
		termAt:    func(i uint64) (uint64, bool) { return 7, i <= 50 },
		checkEntry: func(l *raft.Log) error {
			if string(l.Data) == "flipped" {
				return errors.New("wrong sum")
			}
			return nil
		},
		stranger: func(string) { d.strangers.Add(1) },
		contact:  func(string) { d.contacts.Add(1) },
		called:   func(string, string, time.Time, error) {},
		propose:  func(_ context.Context, data []byte) ([]byte, error) { d.proposed.Add(1); return data, nil },
		roundWith: func(_ string, states uint64) (readPoint, bool) {
			return readPoint{index: 50, term: states}, states == 3
		},
		readIndex: func(context.Context) (readPoint, error) { return readPoint{index: 50, term: 4}, nil },
		join:      func(context.Context, joinRequest) (joinAnswer, error) { return joinAnswer{Cluster: "c"}, nil },
		remove:    func(context.Context, string) error { return nil },
		status:    func() statusAnswer { return statusAnswer{ID: "a"} },
		confirm:   func(context.Context) {},
		state: func(context.Context) (stateCopy, error) {
			return stateCopy{io.NopCloser(strings.NewReader("state")), 5}, nil
		},
		snapshots: func(int) {},
	}
	return d
}

// peer serves d; what raft gets is answered by raft, which may be nil.
func (d *door) peer(t testing.TB, useTLS bool, answer func(raft.RPC)) (*peer, *atomic.Int64) {
	t.Helper()
	p := newPeer(d.peerHost, nil, useTLS, slog.New(slog.DiscardHandler))
	tr := p.transport()
	reached := new(atomic.Int64)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case rpc := <-tr.Consumer():
				reached.Add(1)
				if answer != nil {
					answer(rpc)
				}
			case <-p.ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() { p.close(); <-ended })
	return p, reached
}

// send is one request of member "b" with the given changes.
func send(h http.Handler, method, path string, body []byte, headers map[string]string) (*http.Response, *refusal) {
	req := httptest.NewRequest(method, "http://127.0.0.1:1/", bytes.NewReader(body))
	req.URL.Path = path
	for k, v := range map[string]string{headerProtocol: "1", headerCluster: "c", headerFrom: "b", headerFromAddr: "127.0.0.1:2", headerTo: "a"} {
		req.Header.Set(k, v)
	}
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	ctx, cancel := context.WithTimeout(req.Context(), 5*time.Second) // a raft that does not answer must not hang the test
	defer cancel()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req.WithContext(ctx))
	resp := w.Result()
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	r := &refusal{}
	if err := json.NewDecoder(resp.Body).Decode(r); err != nil {
		r.Code = "not a refusal: " + err.Error()
	}
	return resp, r
}

func from(id string) raft.RPCHeader {
	return raft.RPCHeader{ProtocolVersion: 3, ID: []byte(id), Addr: []byte("127.0.0.1:2")}
}

func appendOf(id string, entries ...*raft.Log) []byte {
	return encodeAppend(&raft.AppendEntriesRequest{RPCHeader: from(id), Term: 7, PrevLogEntry: 50, PrevLogTerm: 7, Entries: entries})
}

func asJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func TestDoorRefuses(t *testing.T) {
	t.Parallel()
	const post, get = http.MethodPost, http.MethodGet
	good := appendOf("b", &raft.Log{Index: 51, Term: 7, Data: []byte("x")})
	header := func(k, v string) map[string]string { return map[string]string{k: v} }
	snapshot := func(size int64, config []byte) []byte {
		s := someSnapshot()
		s.RPCHeader, s.Size, s.Term, s.LastLogIndex = from("b"), size, 7, 60
		if config != nil {
			s.Configuration = config
		}
		b, err := encodeSnapshotHeader(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		name, method, path string
		body               []byte
		headers            map[string]string
		status             int
		code               string
	}{
		{"no route", post, "/raft/nothing", nil, nil, 404, codeBadRequest},
		{"no name", post, "/raft/", nil, nil, 404, codeBadRequest},
		{"other path", post, "/append", nil, nil, 404, codeBadRequest},
		{"trailing slash", post, "/raft/append/", good, nil, 404, codeBadRequest},
		{"dots", post, "/raft/../append", good, nil, 404, codeBadRequest},
		{"double slash", post, "/raft//append", good, nil, 404, codeBadRequest},
		{"get append", get, "/raft/append", nil, nil, 405, codeBadRequest},
		{"post status", post, "/raft/status", nil, nil, 405, codeBadRequest},
		{"put join", "PUT", "/raft/join", nil, nil, 405, codeBadRequest},
		{"no protocol", post, "/raft/append", good, header(headerProtocol, ""), 412, codeProtocol},
		{"newer protocol", post, "/raft/append", good, header(headerProtocol, "3"), 412, codeProtocol},
		{"no cluster", post, "/raft/append", good, header(headerCluster, ""), 412, codeWrongCluster},
		{"other cluster", post, "/raft/append", good, header(headerCluster, "d"), 412, codeWrongCluster},
		{"join of another cluster", post, "/raft/join", nil, header(headerCluster, "d"), 412, codeWrongCluster},
		{"no target", post, "/raft/append", good, header(headerTo, ""), 412, codeWrongTarget},
		{"other target", post, "/raft/append", good, header(headerTo, "z"), 412, codeWrongTarget},
		{"no sender", post, "/raft/append", good, header(headerFrom, ""), 400, codeBadRequest},
		{"removed sender", post, "/raft/append", good, header(headerFrom, "gone"), 410, codeRemoved},
		{"removed candidate", post, "/raft/vote", nil, header(headerFrom, "gone"), 410, codeRemoved},
		{"status for a removed member", get, "/raft/status", nil, header(headerFrom, "gone"), 410, codeRemoved},
		{"propose of an unknown", post, "/raft/propose", nil, header(headerFrom, "x"), 403, codeNotAllowed},
		{"readindex of an unknown", post, "/raft/readindex", nil, header(headerFrom, "x"), 403, codeNotAllowed},
		{"remove of an unknown", post, "/raft/remove", []byte("{}"), header(headerFrom, "x"), 403, codeNotAllowed},
		{"state for an unknown", get, "/raft/state", nil, header(headerFrom, "x"), 403, codeNotAllowed},
		{"join without target", post, "/raft/join", []byte("garbage"), header(headerTo, ""), 421, codeNotLeader},
		{"empty append", post, "/raft/append", nil, nil, 400, codeBadRequest},
		{"garbage append", post, "/raft/append", []byte("garbage"), nil, 400, codeBadRequest},
		{"cut append", post, "/raft/append", good[:len(good)-1], nil, 400, codeBadRequest},
		{"append of another", post, "/raft/append", appendOf("l"), nil, 400, codeBadRequest},
		{"append with a hole", post, "/raft/append", appendOf("b", &raft.Log{Index: 53, Term: 7}), nil, 400, codeBadRequest},
		{"append of a flipped entry", post, "/raft/append", appendOf("b", &raft.Log{Index: 51, Term: 7, Data: []byte("flipped")}), nil, 400, codeBadRequest},
		{"append of 2^63 bytes", post, "/raft/append", binary.AppendUvarint([]byte{frameVersion, 3}, 1<<63), nil, 400, codeBadRequest},
		{"large append", post, "/raft/append", make([]byte, maxAppendBody+1), nil, 400, codeBadRequest},
		{"large proposal", post, "/raft/propose", make([]byte, maxProposeBody+1), nil, 400, codeBadRequest},
		{"large vote", post, "/raft/vote", make([]byte, maxSmallBody+1), nil, 400, codeBadRequest},
		{"garbage vote", post, "/raft/vote", []byte("{"), nil, 400, codeBadRequest},
		{"vote of another", post, "/raft/vote", asJSON(raft.RequestVoteRequest{RPCHeader: from("l")}), nil, 400, codeBadRequest},
		{"prevote of another", post, "/raft/prevote", asJSON(raft.RequestPreVoteRequest{RPCHeader: from("l")}), nil, 400, codeBadRequest},
		{"timeoutnow of another", post, "/raft/timeoutnow", []byte("null"), nil, 400, codeBadRequest},
		{"nested json", post, "/raft/vote", bytes.Repeat([]byte("["), maxSmallBody), nil, 400, codeBadRequest},
		{"join of another", post, "/raft/join", asJSON(joinRequest{ID: "x", Addr: "127.0.0.1:2"}), nil, 400, codeBadRequest},
		{"join of another address", post, "/raft/join", asJSON(joinRequest{ID: "b", Addr: "127.0.0.1:3"}), nil, 400, codeBadRequest},
		{"garbage remove", post, "/raft/remove", []byte("x"), nil, 400, codeBadRequest},
		{"garbage snapshot", post, "/raft/snapshot", []byte("garbage"), nil, 400, codeBadRequest},
		{"snapshot of no size", post, "/raft/snapshot", snapshot(32, nil), nil, 400, codeBadRequest},
		{"snapshot of 2^63-1 bytes", post, "/raft/snapshot", snapshot(1<<63-1, nil), nil, 400, codeBadRequest},
		{"snapshot without members", post, "/raft/snapshot", snapshot(40, []byte{0xc1}), nil, 400, codeBadRequest},
		{"snapshot header of 2^63", post, "/raft/snapshot", binary.AppendUvarint(nil, 1<<63), nil, 400, codeBadRequest},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := doorHost()
			p, reached := d.peer(t, false, nil)
			resp, r := send(p, c.method, c.path, c.body, c.headers)
			if r == nil || resp.StatusCode != c.status || r.Code != c.code {
				t.Errorf("status %d, %v, want %d %s", resp.StatusCode, r, c.status, c.code)
			}
			if reached.Load() != 0 || d.proposed.Load() != 0 {
				t.Error("it went through the door")
			}
			if resp.Header.Get(headerProtocol) != "1" || resp.Header.Get(headerFrom) != "a" || resp.Header.Get(headerCluster) != "c" {
				t.Errorf("headers of the answer: %v", resp.Header)
			}
			strange := c.headers[headerCluster] == "d"
			if got := d.strangers.Load() == 1; got != strange {
				t.Errorf("%d strangers reported", d.strangers.Load())
			}
		})
	}
}

// Who reads less than the state holds by now is refused on every route that could give it an answer or a vote; a request of a
// member whose own state is merely behind is not.
func TestDoorRefusesWhoReadsLess(t *testing.T) {
	t.Parallel()
	d := doorHost()
	d.formats = func() (uint64, uint64) { return historyFormat, entryFormat }
	p, reached := d.peer(t, false, nil)
	vote := asJSON(raft.RequestVoteRequest{RPCHeader: from("b"), Term: 8})
	for route, body := range map[string][]byte{"append": appendOf("b"), "vote": vote, "prevote": vote, "readindex": nil, "propose": []byte("x"), "term": nil} {
		for _, reads := range []string{"", "1", "x", "999"} {
			if _, r := send(p, http.MethodPost, "/raft/"+route, body, map[string]string{headerReads: reads}); r == nil || r.Code != codeProtocol ||
				!strings.Contains(r.Message, "upgrade it") {
				t.Errorf("%s of a member that reads %q: %v", route, reads, r)
			}
		}
	}
	if reached.Load() != 0 || d.proposed.Load() != 0 {
		t.Error("something went through the door")
	}
	if _, r := send(p, http.MethodPost, "/raft/term", nil, map[string]string{headerReads: "2"}); r != nil {
		t.Errorf("a member that reads it: %v", r)
	}
}

func TestDoorNotReady(t *testing.T) {
	t.Parallel()
	d := doorHost()
	p, _ := d.peer(t, false, nil)
	d.closed.Store(true)
	if resp, r := send(p, "GET", "/raft/status", nil, nil); resp.StatusCode != 503 || r.Code != codeNotReady {
		t.Errorf("before raft: %d %v", resp.StatusCode, r)
	}
	d.closed.Store(false)
	if resp, _ := send(p, "GET", "/raft/status", nil, nil); resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	d.quiet.Store(true)
	for route, body := range map[string][]byte{
		"append":     encodeAppend(&raft.AppendEntriesRequest{RPCHeader: from("b"), Term: 7}),
		"vote":       asJSON(raft.RequestVoteRequest{RPCHeader: from("b")}),
		"prevote":    asJSON(raft.RequestPreVoteRequest{RPCHeader: from("b")}),
		"timeoutnow": asJSON(raft.TimeoutNowRequest{RPCHeader: from("b")}),
	} {
		if resp, r := send(p, "POST", "/raft/"+route, body, nil); resp.StatusCode != 503 || r.Code != codeNotReady {
			t.Errorf("%s with a stalled disk: %d %v", route, resp.StatusCode, r)
		}
	}
	d.quiet.Store(false)
	p.close()
	if resp, _ := send(p, "GET", "/raft/status", nil, nil); resp.StatusCode != 503 {
		t.Errorf("after close: %d", resp.StatusCode)
	}
}

// A joiner whose cluster is still unknown to itself may get the leader's append before the answer to its join.
func TestDoorBeforeAdmission(t *testing.T) {
	t.Parallel()
	d := doorHost()
	d.self = func() (string, string, string) { return "a", "", "127.0.0.1:1" }
	p, reached := d.peer(t, false, nil)
	for route := range p.routes { // whoever names no cluster either is of none
		if route != "status" {
			if resp, r := send(p, p.routes[route].method, "/raft/"+route, nil, map[string]string{headerCluster: ""}); resp.StatusCode != 503 || r.Code != codeNotReady {
				t.Errorf("%s without a cluster: %d %v", route, resp.StatusCode, r)
			}
		}
	}
	if reached.Load() != 0 || d.proposed.Load() != 0 || d.strangers.Load() != 0 {
		t.Error("it went through the door")
	}
	if resp, r := send(p, "POST", "/raft/append", nil, nil); resp.StatusCode != 503 || d.strangers.Load() != 1 {
		t.Errorf("%d %v, %d strangers", resp.StatusCode, r, d.strangers.Load())
	}
}

func TestJoinWithoutTargetLearnsTheLeader(t *testing.T) {
	t.Parallel()
	d := doorHost()
	p, _ := d.peer(t, true, nil) // even over plain http to a member that wants TLS
	_, r := send(p, "POST", "/raft/join", nil, map[string]string{headerTo: "", headerCluster: ""})
	if r == nil || r.LeaderID != "l" || r.LeaderAddr != "127.0.0.1:9" {
		t.Errorf("%+v", r)
	}
	if resp, r := send(p, "POST", "/raft/join", nil, nil); resp.StatusCode != 403 || r.Code != codeTLS {
		t.Errorf("with a target: %d %v", resp.StatusCode, r)
	}
	d.leader = func() (string, string) { return "", "" }
	p, _ = d.peer(t, false, nil)
	if resp, r := send(p, "POST", "/raft/join", nil, map[string]string{headerTo: ""}); resp.StatusCode != 503 || r.Code != codeNotReady {
		t.Errorf("without a leader: %d %v", resp.StatusCode, r)
	}
}

func TestDoorVote(t *testing.T) {
	t.Parallel()
	var got atomic.Value
	d := doorHost()
	p, _ := d.peer(t, false, func(rpc raft.RPC) {
		got.Store(string(rpc.Command.(*raft.RequestVoteRequest).ID))
		rpc.Respond(&raft.RequestVoteResponse{Term: 8, Granted: true}, nil)
	})
	for candidate, want := range map[string]string{"b": "b", "n": "", "unknown": ""} {
		body := asJSON(raft.RequestVoteRequest{RPCHeader: from(candidate), Term: 8})
		resp, r := send(p, "POST", "/raft/vote", body, map[string]string{headerFrom: candidate})
		if r != nil {
			t.Fatalf("%s: %v", candidate, r)
		}
		var answer raft.RequestVoteResponse
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || !answer.Granted || answer.Term != 8 {
			t.Errorf("%s: %+v, %v", candidate, answer, err)
		}
		if got.Load() != want {
			t.Errorf("%s: raft saw id %q, want %q", candidate, got.Load(), want)
		}
	}
}

func TestDoorPreVote(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		candidate      string
		term           uint64
		logTerm, index uint64
		led            bool
		reaches        bool
		granted        bool
		want           uint64 // term of the answer
	}{
		"voter":                     {"b", 8, 7, 50, true, true, false, 99},
		"unknown":                   {"x", 8, 7, 50, false, false, true, 8},
		"unknown, same term":        {"x", 7, 7, 50, false, false, true, 7},
		"non-voter":                 {"n", 8, 7, 51, false, false, true, 8},
		"unknown, newer last term":  {"x", 9, 8, 3, false, false, true, 9},
		"unknown, with a leader":    {"x", 8, 7, 50, true, false, false, 7},
		"unknown, old term":         {"x", 6, 7, 50, false, false, false, 7},
		"unknown, shorter log":      {"x", 8, 7, 49, false, false, false, 7},
		"unknown, older last term":  {"x", 8, 6, 90, false, false, false, 7},
		"non-voter, with a leader ": {"n", 8, 7, 50, true, false, false, 7},
	} {
		d := doorHost()
		d.led.Store(c.led)
		p, reached := d.peer(t, false, func(rpc raft.RPC) { rpc.Respond(&raft.RequestPreVoteResponse{Term: 99}, nil) })
		body := asJSON(raft.RequestPreVoteRequest{RPCHeader: from(c.candidate), Term: c.term, LastLogIndex: c.index, LastLogTerm: c.logTerm})
		resp, r := send(p, "POST", "/raft/prevote", body, map[string]string{headerFrom: c.candidate})
		if r != nil {
			t.Errorf("%s: %v", name, r)
			continue
		}
		var answer raft.RequestPreVoteResponse
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
			t.Fatal(err)
		}
		if answer.Granted != c.granted || answer.Term != c.want || (reached.Load() == 1) != c.reaches {
			t.Errorf("%s: %+v, reached raft %d times", name, answer, reached.Load())
		}
	}
}

func TestDoorTimeoutNow(t *testing.T) {
	t.Parallel()
	d := doorHost()
	p, reached := d.peer(t, false, func(rpc raft.RPC) { rpc.Respond(&raft.TimeoutNowResponse{}, nil) })
	body := asJSON(raft.TimeoutNowRequest{RPCHeader: from("b")})
	if _, r := send(p, "POST", "/raft/timeoutnow", body, nil); r != nil || reached.Load() != 1 {
		t.Errorf("a voter: %v", r)
	}
	d.members.Store("a", false)
	if resp, _ := send(p, "POST", "/raft/timeoutnow", body, nil); resp.StatusCode != 403 || reached.Load() != 1 {
		t.Errorf("without a vote: %d", resp.StatusCode)
	}
}

// Raft's own messages go through though the sender is in no configuration of ours.
func TestDoorAppendOfAnUnknownLeader(t *testing.T) {
	t.Parallel()
	d := doorHost()
	p, _ := d.peer(t, false, func(rpc raft.RPC) {
		rpc.Respond(&raft.AppendEntriesResponse{Term: 7, LastLog: 51, Success: true}, nil)
	})
	resp, r := send(p, "POST", "/raft/append", appendOf("x", &raft.Log{Index: 51, Term: 7}), map[string]string{headerFrom: "x"})
	if r != nil {
		t.Fatal(r)
	}
	data, _ := io.ReadAll(resp.Body)
	var answer raft.AppendEntriesResponse
	if err := decodeAppendAnswer(data, &answer); err != nil || !answer.Success || answer.LastLog != 51 {
		t.Errorf("%+v, %v", answer, err)
	}
	if d.contacts.Load() != 0 { // or anybody could fill the table of those who were heard
		t.Errorf("%d contacts", d.contacts.Load())
	}
}

// A heartbeat that changes nothing does not wait for raft's main loop; one that changes the term goes through it.
func TestDoorHeartbeat(t *testing.T) {
	t.Parallel()
	d := doorHost()
	d.leader = func() (string, string) { return "b", "127.0.0.1:2" }
	p := newPeer(d.peerHost, nil, false, slog.New(slog.DiscardHandler))
	defer p.close()
	tr := p.transport() // its main loop takes nothing
	var beats atomic.Int64
	tr.SetHeartbeatHandler(func(rpc raft.RPC) {
		beats.Add(1)
		rpc.Respond(&raft.AppendEntriesResponse{Term: 7, Success: true}, nil)
	})
	beat := func(term uint64) int {
		body := encodeAppend(&raft.AppendEntriesRequest{RPCHeader: from("b"), Term: term})
		resp, _ := send(p, "POST", "/raft/append", body, nil)
		return resp.StatusCode
	}
	d.led.Store(true)
	if got := beat(7); got != 200 || beats.Load() != 1 {
		t.Errorf("the term's leader: %d, %d beats", got, beats.Load())
	}
	if got := beat(6); got != 200 || beats.Load() != 2 {
		t.Errorf("an old leader: %d, %d beats", got, beats.Load())
	}
	began := time.Now()
	if got := beat(8); got != 503 || beats.Load() != 2 {
		t.Errorf("a new term: %d, %d beats", got, beats.Load())
	}
	if took := time.Since(began); took > 2*voteTimeout {
		t.Errorf("the handler waited %v", took)
	}
}

func TestDoorSnapshot(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		index, logTerm, term uint64
		reaches              bool
	}{
		"applied already":        {40, 5, 7, false},
		"in the log":             {45, 7, 7, false},
		"in the log, newer term": {45, 7, 8, false},
		"conflicts with the log": {45, 6, 7, true},
		"above the log":          {60, 7, 7, true},
		"of an old leader":       {40, 5, 6, true},
	} {
		d := doorHost()
		var read atomic.Int64
		p, reached := d.peer(t, false, func(rpc raft.RPC) {
			n, _ := io.Copy(io.Discard, rpc.Reader)
			read.Store(n)
			rpc.Respond(&raft.InstallSnapshotResponse{Term: 7, Success: true}, nil)
		})
		s := someSnapshot()
		s.RPCHeader, s.LastLogIndex, s.LastLogTerm, s.Term = from("b"), c.index, c.logTerm, c.term
		body, err := encodeSnapshotHeader(s)
		if err != nil {
			t.Fatal(err)
		}
		body = append(body, make([]byte, s.Size+10)...) // what comes above the size is not the snapshot's
		resp, r := send(p, "POST", "/raft/snapshot", body, nil)
		if r != nil {
			t.Errorf("%s: %v", name, r)
			continue
		}
		var answer raft.InstallSnapshotResponse
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || !answer.Success || answer.Term != 7 {
			t.Errorf("%s: %+v, %v", name, answer, err)
		}
		if (reached.Load() == 1) != c.reaches || c.reaches && read.Load() != s.Size {
			t.Errorf("%s: reached raft %d times, which read %d bytes", name, reached.Load(), read.Load())
		}
	}
}

func TestOneSnapshotAtATime(t *testing.T) {
	t.Parallel()
	d := doorHost()
	taken, release := make(chan struct{}), make(chan struct{})
	p, _ := d.peer(t, false, func(rpc raft.RPC) {
		close(taken)
		<-release
		rpc.Respond(&raft.InstallSnapshotResponse{Term: 7, Success: true}, nil)
	})
	s := someSnapshot()
	s.RPCHeader, s.Term = from("b"), 7
	body, err := encodeSnapshotHeader(s)
	if err != nil {
		t.Fatal(err)
	}
	first := make(chan int, 1)
	go func() {
		resp, _ := send(p, "POST", "/raft/snapshot", append(body, make([]byte, 40)...), nil)
		first <- resp.StatusCode
	}()
	<-taken
	if resp, r := send(p, "POST", "/raft/snapshot", body, nil); resp.StatusCode != 503 || r.Code != codeBusy {
		t.Errorf("second: %d %v", resp.StatusCode, r)
	}
	close(release)
	if got := <-first; got != 200 {
		t.Errorf("first: %d", got)
	}
}

func TestHandlersEndWithClose(t *testing.T) {
	t.Parallel()
	d := doorHost()
	taken := make(chan struct{}, 1)
	p, _ := d.peer(t, false, func(raft.RPC) { taken <- struct{}{} }) // and never answers
	done := make(chan int, 1)
	go func() {
		resp, _ := send(p, "POST", "/raft/append", appendOf("b"), nil)
		done <- resp.StatusCode
	}()
	<-taken
	p.close()
	select {
	case got := <-done:
		if got != 503 {
			t.Errorf("status %d", got)
		}
	case <-time.After(time.Second):
		t.Error("the handler hangs")
	}
}

// --- calls over real connections

// served is a peer on a real server, and another one, "b", that calls it.
func served(t testing.TB, d *door, config func(*httptest.Server)) (base string, caller *peer) {
	t.Helper()
	p, _ := d.peer(t, false, nil)
	srv := httptest.NewUnstartedServer(p)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	if config != nil {
		config(srv)
	}
	srv.Start()
	t.Cleanup(srv.Close)
	return srv.URL, callerOf(t, nil, false)
}

func callerOf(t testing.TB, client *http.Client, useTLS bool) *peer {
	t.Helper()
	b := doorHost()
	b.self = func() (string, string, string) { return "b", "c", "127.0.0.1:2" }
	caller := newPeer(b.peerHost, client, useTLS, slog.New(slog.DiscardHandler))
	t.Cleanup(caller.close)
	return caller
}

func TestCalls(t *testing.T) {
	t.Parallel()
	d := doorHost()
	base, b := served(t, d, nil)
	addr := strings.TrimPrefix(base, "http://")
	ctx := context.Background()
	if out, sent, err := b.propose(ctx, "a", addr, []byte("entry")); err != nil || !sent || string(out) != "entry" {
		t.Errorf("propose: %q %v %v", out, sent, err)
	}
	if index, err := b.readIndex(ctx, "a", addr, 3); err != nil || index != (readPoint{index: 50, term: 3}) {
		t.Errorf("readindex: %v %v", index, err)
	}
	if index, err := b.readIndex(ctx, "a", addr, 5); err != nil || index != (readPoint{index: 50, term: 4}) {
		t.Errorf("readindex with a term that says nothing: %v %v", index, err)
	}
	if term, err := b.askTerm(ctx, "a", addr); err != nil || term != 7 {
		t.Errorf("term: %d %v", term, err)
	}
	if a, err := b.join(ctx, base, "a", "", joinRequest{ID: "b", Addr: "127.0.0.1:2"}); err != nil || a.Cluster != "c" {
		t.Errorf("join: %+v %v", a, err)
	}
	var r *refusal
	if _, err := b.join(ctx, base+"/", "", "", joinRequest{ID: "b", Addr: "127.0.0.1:2"}); !errors.As(err, &r) || r.LeaderAddr != "127.0.0.1:9" || r.Status != 421 {
		t.Errorf("join without target: %v", err)
	}
	if err := b.remove(ctx, "a", addr, "127.0.0.1:5"); err != nil {
		t.Errorf("remove: %v", err)
	}
	if s, err := b.status(ctx, base); err != nil || s.ID != "a" {
		t.Errorf("status: %+v %v", s, err)
	}
	body, err := b.state(ctx, "a", addr)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := io.ReadAll(body); err != nil || string(data) != "state" {
		t.Errorf("state: %q %v", data, err)
	}
	body.Close()
	d.lead.Store(0)
	if _, err := b.state(ctx, "a", addr); !errors.As(err, &r) || r.Code != codeNotLeader {
		t.Errorf("state of a follower: %v", err)
	}
	// Another member at the address does not count.
	if _, err := b.askTerm(ctx, "z", addr); !errors.As(err, &r) || r.Code != codeWrongTarget {
		t.Errorf("term of another: %v", err)
	}
	b.close()
	if _, err := b.status(ctx, base); !errors.Is(err, ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}

func TestAnswerOfAnotherMemberDoesNotCount(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]http.Header{
		"other member":  {headerProtocol: {"1"}, headerFrom: {"z"}, headerCluster: {"c"}},
		"other cluster": {headerProtocol: {"1"}, headerFrom: {"a"}, headerCluster: {"d"}},
		"no member":     {headerProtocol: {"1"}},
		"protocol":      {headerProtocol: {"2"}, headerFrom: {"a"}, headerCluster: {"c"}},
		"not ours":      {},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for k, v := range h {
				w.Header()[k] = v
			}
			fmt.Fprint(w, `{"term":7,"index":7}`)
		}))
		b := callerOf(t, nil, false)
		if term, err := b.askTerm(context.Background(), "a", srv.Listener.Addr().String()); err == nil {
			t.Errorf("%s: term %d counts", name, term)
		}
		if _, sent, err := b.propose(context.Background(), "a", srv.Listener.Addr().String(), nil); err == nil || !sent {
			t.Errorf("%s: propose: sent %v, %v", name, sent, err)
		}
		srv.Close()
	}
}

func TestProposeSent(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refuse error
		sent   bool
	}{
		"not leader":  {refuse(421, codeNotLeader, ""), false},
		"not applied": {refuse(503, codeNotApplied, ""), false},
		"uncertain":   {refuse(500, codeUncertain, ""), true},
		"new code":    {refuse(503, "of-a-later-version", ""), true},
		"plain error": {errors.New("leadership lost"), true},
	} {
		d := doorHost()
		d.propose = func(context.Context, []byte) ([]byte, error) { return nil, c.refuse }
		base, b := served(t, d, nil)
		_, sent, err := b.propose(context.Background(), "a", strings.TrimPrefix(base, "http://"), nil)
		if err == nil || sent != c.sent {
			t.Errorf("%s: sent %v, %v", name, sent, err)
		}
	}
	b := callerOf(t, nil, false)
	if _, sent, err := b.propose(context.Background(), "a", closedPort(t), nil); err == nil || sent {
		t.Errorf("nobody listens: sent %v, %v", sent, err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, sent, err := b.propose(ended, "a", closedPort(t), nil); err == nil || sent {
		t.Errorf("context ended before: sent %v, %v", sent, err)
	}
	// The connection breaks after the request was read.
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		panic(http.ErrAbortHandler)
	}))
	defer srv.Close()
	if _, sent, err := b.propose(context.Background(), "a", srv.Listener.Addr().String(), []byte("x")); err == nil || !sent {
		t.Errorf("broken connection: sent %v, %v", sent, err)
	}
}

// The way to the leader is cut when a write is given up, and whole again later on. What the system had not delivered by then must
// not arrive.
func TestGivenUpProposalIsNotDelivered(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			accepted <- conn // and nothing is read: the window closes after some hundred KiB
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	wrote := make(chan struct{})
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { close(wrote) }})
	ended := make(chan error, 1)
	body := make([]byte, 1<<20)
	go func() {
		_, sent, err := callerOf(t, nil, false).propose(traced, "b", l.Addr().String(), body)
		if !sent {
			err = fmt.Errorf("said to be not sent: %w", err)
		}
		ended <- err
	}()
	conn := <-accepted
	defer conn.Close()
	select {
	case <-wrote: // all of it is in the hands of the system
	case <-time.After(10 * time.Second):
		t.Skip("this system takes no request that nobody reads")
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the call ended with %v", err)
	}
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := io.Copy(io.Discard, conn)
	if n >= int64(len(body)) || err == nil {
		t.Errorf("%d bytes arrived, then %v: a request of %d bytes was given up", n, err, len(body))
	}
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	var followed atomic.Int64
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	defer evil.Close()
	srv := httptest.NewServer(http.RedirectHandler(evil.URL, http.StatusTemporaryRedirect))
	defer srv.Close()
	b := callerOf(t, nil, false)
	_, sent, err := b.propose(context.Background(), "a", srv.Listener.Addr().String(), []byte("secret"))
	if err == nil || !sent || followed.Load() != 0 {
		t.Errorf("sent %v, %v, followed %d times", sent, err, followed.Load())
	}
}

// Kept connections are used again, after refusals too.
func TestConnectionsAreReused(t *testing.T) {
	t.Parallel()
	var opened atomic.Int64
	d := doorHost()
	base, _ := served(t, d, func(srv *httptest.Server) {
		srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				opened.Add(1)
			}
		}
	})
	b := callerOf(t, &http.Client{Transport: &http.Transport{}}, false)
	addr := strings.TrimPrefix(base, "http://")
	for i := range 40 {
		to := []string{"a", "z"}[i%2]
		_, _, _ = b.propose(context.Background(), to, addr, []byte("entry"))
		_, _ = b.askTerm(context.Background(), to, addr)
	}
	if n := opened.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// BenchmarkCall is one call between two members over loopback, both sides of it.
func BenchmarkCall(b *testing.B) {
	base, caller := served(b, doorHost(), nil)
	addr := strings.TrimPrefix(base, "http://")
	data := make([]byte, 512)
	for _, bb := range []struct {
		route string
		call  func(ctx context.Context) error
	}{
		{"term", func(ctx context.Context) error { _, err := caller.askTerm(ctx, "a", addr); return err }},
		{"readindex", func(ctx context.Context) error { _, err := caller.readIndex(ctx, "a", addr, 3); return err }},
		{"propose", func(ctx context.Context) error { _, _, err := caller.propose(ctx, "a", addr, data); return err }},
	} {
		b.Run(bb.route, func(b *testing.B) {
			ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
			defer cancel()
			b.ReportAllocs()
			for b.Loop() {
				if err := bb.call(ctx); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// Neither the caller's short timeouts nor our deadline for the body cut off an answer that takes its time.
func TestSlowAnswer(t *testing.T) {
	t.Parallel()
	d := doorHost()
	takesTime := func(ctx context.Context) error {
		select {
		case <-time.After(250 * time.Millisecond):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d.propose = func(ctx context.Context, data []byte) ([]byte, error) { return data, takesTime(ctx) }
	d.readIndex = func(ctx context.Context) (readPoint, error) {
		return readPoint{index: 50, term: 3}, takesTime(ctx)
	}
	p, _ := d.peer(t, false, nil)
	p.slow = 100 * time.Millisecond
	srv := httptest.NewUnstartedServer(p)
	srv.Config.ReadTimeout, srv.Config.WriteTimeout = 100*time.Millisecond, 100*time.Millisecond
	srv.Start()
	defer srv.Close()
	b := callerOf(t, nil, false)
	if _, _, err := b.propose(context.Background(), "a", srv.Listener.Addr().String(), []byte("x")); err != nil {
		t.Error(err)
	}
	// Without a body net/http reads ahead from the start.
	if _, err := b.readIndex(context.Background(), "a", srv.Listener.Addr().String(), 4); err != nil {
		t.Error(err)
	}
}

// A body that never ends holds its place for the deadline and no longer, and nothing comes of it.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	d := doorHost()
	p, reached := d.peer(t, false, nil)
	p.slow = 200 * time.Millisecond
	srv := httptest.NewServer(p)
	defer srv.Close()
	for _, c := range []struct{ sender, answer string }{
		{"b", "HTTP/1.1 400"},    // cut off while it is read
		{"gone", "HTTP/1.1 410"}, // refused without being read, and the connection does not wait for the rest for ever
	} {
		conn, err := net.Dial("tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /raft/vote HTTP/1.1\r\nHost: x\r\n%s: 1\r\n%s: c\r\n%s: %s\r\n%s: a\r\nContent-Length: 100\r\n\r\n{",
			headerProtocol, headerCluster, headerFrom, c.sender, headerTo)
		if _, err := callerOf(t, nil, false).askTerm(context.Background(), "a", srv.Listener.Addr().String()); err != nil {
			t.Errorf("another request meanwhile: %v", err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(answer), c.answer) {
			t.Errorf("%s: %q, %v", c.sender, answer, err)
		}
		conn.Close()
	}
	if reached.Load() != 0 {
		t.Error("raft was reached")
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	defer other.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	secure.StartTLS()
	defer secure.Close()
	hang := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	defer slow.Close()
	defer close(hang)
	_, port, _ := net.SplitHostPort(secure.Listener.Addr().String())
	trusting := x509.NewCertPool()
	trusting.AddCert(secure.Certificate())
	named := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: trusting, ServerName: "wrong.test"},
	}}
	for base, want := range map[string]string{
		"http://" + closedPort(t): "refused the connection",
		plain.URL:                 "nothing answers at " + plain.URL + "/raft/: register the Service there",
		other.URL:                 "is no member",
		strings.Replace(plain.URL, "http:", "https:", 1): "speaks plain http, this member expects TLS",
		"http://127.0.0.1:" + port:                       "speaks TLS, this member plain http",
		secure.URL:                                       "not trusted",
		slow.URL:                                         "did not answer in time",
	} {
		limit := 10 * time.Second
		if base == slow.URL {
			limit = 200 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		_, err := callerOf(t, nil, false).status(ctx, base)
		cancel()
		got := explain(err, base)
		if outer, ok := err.(*url.Error); ok {
			err = outer.Err
		}
		if err == nil || !strings.Contains(got.Error(), want) || !errors.Is(got, err) {
			t.Errorf("%s: %v, want %q", base, got, want)
		}
	}
	_, err := callerOf(t, named, true).status(context.Background(), secure.URL)
	if got := explain(err, secure.URL); err == nil || !strings.Contains(got.Error(), "for another name") {
		t.Errorf("%v", got)
	}
	if got := explain(&net.OpError{Op: "dial", Err: &net.DNSError{IsNotFound: true}}, "http://x"); !strings.Contains(got.Error(), "unknown host") {
		t.Errorf("%v", got)
	}
	if explain(nil, "") != nil {
		t.Error("nothing is explained as something")
	}
}

// authority issues certificates for the tests.
func authority(t *testing.T) (*x509.CertPool, func(host string) tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return pool, func(host string) tls.Certificate {
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: host}, NotAfter: time.Now().Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}
		if ip := net.ParseIP(host); ip != nil {
			leaf.IPAddresses = []net.IP{ip}
		} else {
			leaf.DNSNames = []string{host}
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
}

func TestClientCertificates(t *testing.T) {
	t.Parallel()
	pool, issue := authority(t)
	d := doorHost()
	p, _ := d.peer(t, true, nil)
	srv := httptest.NewUnstartedServer(p)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	srv.TLS = &tls.Config{
		Certificates: []tls.Certificate{issue("127.0.0.1")}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}
	srv.StartTLS()
	defer srv.Close()
	ask := func(certificates ...tls.Certificate) error {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: certificates}}
		defer tr.CloseIdleConnections()
		_, err := callerOf(t, &http.Client{Transport: tr}, true).askTerm(context.Background(), "a", srv.Listener.Addr().String())
		return err
	}
	if err := ask(issue("127.0.0.1")); err != nil {
		t.Errorf("right name: %v", err)
	}
	var r *refusal
	if err := ask(issue("other.test")); !errors.As(err, &r) || r.Status != 403 || r.Code != codeTLS {
		t.Errorf("right authority, wrong name: %v", err)
	}
	if err := ask(); err == nil || errors.As(err, &r) && r.Code != codeTLS {
		t.Errorf("no certificate: %v", err)
	} else if got := explain(err, srv.URL); !strings.Contains(got.Error(), "does not take this member's") {
		t.Errorf("no certificate: %v", got)
	}
}

func FuzzServeHTTP(f *testing.F) {
	f.Add("POST", "/raft/append", "1", "c", "b", "a", appendOf("b"))
	f.Add("POST", "/raft/vote", "1", "c", "b", "a", asJSON(raft.RequestVoteRequest{RPCHeader: from("b")}))
	f.Add("POST", "/raft/prevote", "1", "c", "x", "a", asJSON(raft.RequestPreVoteRequest{RPCHeader: from("x")}))
	f.Add("POST", "/raft/vote", "2", "c", "b", "a", asJSON(raft.RequestVoteRequest{RPCHeader: from("b")}))
	f.Add("POST", "/raft/vote", "3", "c", "b", "a", asJSON(raft.RequestVoteRequest{RPCHeader: from("b")}))
	f.Add("POST", "/raft/join", "1", "", "x", "", asJSON(joinRequest{ID: "x"}))
	f.Add("POST", "/raft/snapshot", "1", "c", "b", "a", []byte("\x02{}"))
	f.Add("GET", "/raft/status", "", "", "", "", []byte(nil))
	f.Add("GET", "/raft/../status", "1", "c", "b", "a", []byte(nil))
	d := doorHost()
	p, reached := d.peer(f, false, func(rpc raft.RPC) { rpc.Respond(nil, errors.New("no raft here")) })
	f.Fuzz(func(t *testing.T, method, path, protocol, cluster, sender, to string, body []byte) {
		req := httptest.NewRequest("POST", "http://127.0.0.1:1/", bytes.NewReader(body))
		req.Method, req.URL.Path = method, path
		req.Header = http.Header{headerProtocol: {protocol}, headerCluster: {cluster}, headerFrom: {sender}, headerTo: {to}}
		w := httptest.NewRecorder()
		before := reached.Load()
		p.ServeHTTP(w, req)
		if w.Code != 200 {
			var r refusal
			if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || r.Code == "" {
				t.Fatalf("status %d with %q", w.Code, w.Body)
			}
		}
		spoken := protocol == "1" || protocol == "2"
		if reached.Load() != before && (!spoken || cluster != "c" || to != "a" || sender == "gone") {
			t.Fatal("raft was reached")
		}
	})
}

// A certificate for some host of the right authority must not do for any member's id, where this member can know better; and
// raft's own messages must pass, for what it has applied may be older than the sender's move.
func TestDoorMemberLivesAtItsAddress(t *testing.T) {
	d := doorHost()
	d.allowed = func(addr string) bool { return addr == "allowed.example:1" }
	p, _ := d.peer(t, true, nil)
	home, _, _ := d.server("b")
	for _, c := range []struct {
		addr string
		ok   bool
	}{{home, true}, {"allowed.example:1", true}, {"evil.example:1", false}} {
		req := httptest.NewRequest("POST", "/raft/propose", nil)
		req.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{{}}}}
		req.Header.Set(headerFrom, "b")
		req.Header.Set(headerFromAddr, c.addr)
		if err := p.checkHome(p.newExchange(httptest.NewRecorder(), req)); err == nil != c.ok {
			t.Errorf("from %s: %v", c.addr, err)
		}
	}
	for _, name := range []string{"append", "snapshot", "vote", "prevote", "timeoutnow", "term"} {
		if p.routes[name].member {
			t.Errorf("%s asks where the sender lives", name)
		}
	}
}
