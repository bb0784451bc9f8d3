package quorate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// What comes from strangers, broken members and careless callers must be refused with the right words, soon, in bounded memory,
// and change nothing. Every case is one function; its error says what was wrong about the answer.

type hostileCase struct {
	name string
	try  func() error
	logs bool // a condition that fails is in the log: the index and the chain go on, the rows do not
}

// A besieged cluster has a leader, two followers and a member that was removed.
type besieged struct {
	t                testing.TB
	c                testCluster
	leader, follower *testMember
	gone             string // id of the removed member
	client           *http.Client
	panics           atomic.Int64
}

const (
	slowBody    = 500 * time.Millisecond // of the besieged, for a small body to come in
	hostilePace = 30 * time.Second       // more than any case may take
)

// besiege starts a cluster whose handlers are looked at: net/http would hide a panic.
func besiege(t testing.TB) *besieged {
	h := &besieged{t: t, client: newClient(t, &line{})}
	h.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	for i := range 3 {
		join := ""
		if i > 0 {
			join = h.c[0].conf.Addr
		}
		m := newMember(t, join)
		m.conf.MaxValue = 100 << 10
		m.wrap = h.watched
		if i > 0 {
			must(t, h.c[0].s.AddAllowedMember(ctxFor(t, patience), m.conf.Addr))
		}
		m.start()
		h.c = append(h.c, m)
	}
	h.c.awaitVoters(t, 3)
	h.leader = h.c.leader(t)
	h.follower = h.c.follower(t)
	ctx := ctxFor(t, patience)
	for i := range 100 {
		must(t, h.leader.s.Set(ctx, fmt.Sprintf("key/%03d", i), fmt.Appendf(nil, "value %d", i)))
	}
	// It was admitted without ever running, and taken out again.
	addr := freeAddr(t)
	must(t, h.leader.s.AddAllowedMember(ctx, addr))
	h.gone = newID()
	status, r := h.send(h.leader, message{route: "join", header: map[string]string{headerFrom: h.gone, headerFromAddr: addr},
		body: asJSON(joinRequest{ID: h.gone, Addr: addr, Format: entryFormat})})
	if status != http.StatusOK {
		t.Fatalf("join: %d %v", status, r)
	}
	must(t, h.leader.s.RemoveMember(ctx, addr))
	h.settle()
	return h
}

// watched also gives a body less time than a real member does.
func (h *besieged) watched(mux http.Handler) http.Handler {
	service, _ := mux.(*http.ServeMux).Handler(&http.Request{Method: "POST", URL: mustURL("/raft/append")})
	service.(*Service).peer.slow = slowBody
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		defer func() {
			if v := recover(); v != nil {
				h.panics.Add(1)
				violated(h.t, "%s %s: panic: %v", req.Method, req.URL, v)
			}
		}()
		mux.ServeHTTP(w, req)
	})
}

// settle waits until every member has applied the same and knows the removed member.
func (h *besieged) settle() {
	h.c.awaitEqual(h.t)
	eventually(h.t, patience, "the removal", func() error {
		for _, m := range h.c {
			if m.s.fsm.members.Load().removed[h.gone] == 0 || len(m.s.Status().Members) != 3 {
				return errors.New("not known everywhere")
			}
		}
		return nil
	})
}

// A siegeState is what no case may change.
type siegeState struct {
	Role                    Role
	Term, Revision, Applied uint64
	Hash, LeaderID, Members string
	LastIndex               uint64
}

func (h *besieged) state(logs bool) (all []siegeState) {
	for _, m := range h.c {
		st := m.s.Status()
		s := siegeState{Role: st.Role, Term: st.Term, Revision: st.Revision, Applied: st.AppliedIndex, Hash: st.Hash, LeaderID: st.LeaderID, LastIndex: st.LastIndex}
		for _, v := range st.Members {
			s.Members += fmt.Sprint(v.ID, v.Addr, v.Voter, " ")
		}
		if logs {
			s.Applied, s.LastIndex, s.Hash = 0, 0, kvSum(st.Hash)
		}
		all = append(all, s)
	}
	return all
}

// run goes through cases one after the other, so that what changes something is known by name. On a machine that stands still for a
// moment there can be an election that is no case's doing: a case that saw one is tried again.
func (h *besieged) run(list []hostileCase) {
	h.t.Helper()
	for _, c := range list {
		counted.hostileCases.add(1)
		for again := range 5 {
			before := h.state(c.logs)
			err := bounded(c.try)
			if c.logs {
				h.c.awaitEqual(h.t)
			}
			after := h.state(c.logs)
			same := reflect.DeepEqual(before, after)
			if err == nil && same {
				break
			}
			if again < 4 && h.electionIn(before, after) {
				h.t.Logf("%s: an election, trying it again (%v)", c.name, err)
				h.reinstate()
				continue
			}
			if err != nil {
				violated(h.t, "%s: %v", c.name, err)
			}
			if !same {
				violated(h.t, "%s: state %+v, before %+v", c.name, after, before)
			}
			break
		}
	}
}

// electionIn: the first leader did not lead all the time.
func (h *besieged) electionIn(before, after []siegeState) bool {
	id := h.leader.s.Status().ID
	for i := range before {
		if before[i].LeaderID != id || after[i].LeaderID != id || before[i].Term != after[i].Term {
			return true
		}
	}
	return false
}

// reinstate makes the leader the leader again.
func (h *besieged) reinstate() {
	eventually(h.t, patience, "the first leader in office", func() error {
		if l := h.c.leader(h.t); l != h.leader {
			st := h.leader.s.Status()
			l.s.raft.Load().LeadershipTransferToServer(raft.ServerID(st.ID), raft.ServerAddress(st.Addr)).Error()
			return fmt.Errorf("%s leads", l.conf.Addr)
		}
		return h.leader.s.Ready(ctxFor(h.t, patience))
	})
	h.c.awaitEqual(h.t)
}

func bounded(try func() error) error {
	done := make(chan error, 1)
	go func() { done <- try() }()
	select {
	case err := <-done:
		return err
	case <-time.After(hostilePace):
		return fmt.Errorf("no end within %v", hostilePace)
	}
}

// runAtOnce is for cases that mostly wait.
func (h *besieged) runAtOnce(list []hostileCase) {
	h.t.Helper()
	h.run([]hostileCase{{name: "all at once", try: func() error {
		errs := make([]error, len(list))
		var wg sync.WaitGroup
		for i, c := range list {
			wg.Go(func() {
				if err := c.try(); err != nil {
					errs[i] = fmt.Errorf("%s: %w", c.name, err)
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}}})
	counted.hostileCases.add(len(list) - 1)
}

// A message is a request to a route under /raft/, from another member of the cluster unless its headers say otherwise.
type message struct {
	method, route string // "" is POST
	body          []byte
	header        map[string]string
}

func (h *besieged) sender(to *testMember) *testMember {
	if to == h.leader {
		return h.follower
	}
	return h.leader
}

// send returns the status and, if it is none of success, the refusal.
func (h *besieged) send(to *testMember, m message) (int, *refusal) {
	if m.method == "" {
		m.method = http.MethodPost
	}
	ctx, cancel := context.WithTimeout(context.Background(), hostilePace)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, m.method, "http://"+to.conf.Addr+"/raft/"+m.route, bytes.NewReader(m.body))
	if err != nil {
		return 0, &refusal{Code: err.Error()}
	}
	st, from := to.s.Status(), h.sender(to).s.Status()
	for k, v := range map[string]string{headerProtocol: "2", headerReads: "2", headerCluster: st.Cluster, headerFrom: from.ID,
		headerFromAddr: from.Addr, headerTo: st.ID} {
		req.Header.Set(k, v)
	}
	for k, v := range m.header {
		req.Header.Set(k, v)
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return 0, &refusal{Code: err.Error()}
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, &refusal{Code: err.Error()}
	}
	r := &refusal{}
	if resp.StatusCode != http.StatusOK && m.method != http.MethodHead {
		if err := json.Unmarshal(data, r); err != nil || r.Code == "" {
			return resp.StatusCode, &refusal{Code: fmt.Sprintf("not a refusal: %.100q", data)}
		}
	}
	return resp.StatusCode, r
}

// refused is a case for the leader and a case for a follower.
func (h *besieged) refused(name string, status int, code string, make func(to, from Status) message) []hostileCase {
	on := func(where string, to *testMember) hostileCase {
		return hostileCase{name: name + ", to " + where, try: func() error {
			m := make(to.s.Status(), h.sender(to).s.Status())
			if got, r := h.send(to, m); got != status || r.Code != code {
				return fmt.Errorf("status %d, %v, want %d %s", got, r, status, code)
			}
			return nil
		}}
	}
	return []hostileCase{on("the leader", h.leader), on("a follower", h.follower)}
}

func (h *besieged) one(to *testMember, name string, status int, code string, make func(to, from Status) message) hostileCase {
	if to == h.leader {
		return h.refused(name, status, code, make)[0]
	}
	return h.refused(name, status, code, make)[1]
}

var raftRoutes = []string{"append", "vote", "prevote", "timeoutnow", "snapshot", "propose", "readindex", "term", "join", "remove", "status", "state"}

// doorCases: each route, with each thing wrong that the door looks at.
func (h *besieged) doorCases() (list []hostileCase) {
	add := func(name string, status int, code string, m message) {
		list = append(list, h.refused(name, status, code, func(_, _ Status) message { return m })...)
	}
	for _, route := range raftRoutes {
		right, wrong := "POST", "GET"
		if route == "status" || route == "state" {
			right, wrong = "GET", "POST"
		}
		with := func(k, v string) message {
			return message{method: right, route: route, header: map[string]string{k: v}}
		}
		add(wrong+" "+route, 405, codeBadRequest, message{method: wrong, route: route})
		add(route+" with a protocol of the future", 412, codeProtocol, with(headerProtocol, "3"))
		add(route+" with a protocol that is no number", 412, codeProtocol, with(headerProtocol, "1.0"))
		add(route+" with a sender of 5,000 bytes", 400, codeBadRequest, with(headerFrom, strings.Repeat("x", 5000)))
		if route == "status" { // is for anyone
			continue
		}
		add(route+" of no sender", 400, codeBadRequest, with(headerFrom, ""))
		add(route+" of another cluster", 412, codeWrongCluster, with(headerCluster, newID()))
		add(route+" for another member", 412, codeWrongTarget, with(headerTo, newID()))
		add(route+" of a removed member", 410, codeRemoved, with(headerFrom, h.gone))
		if route != "join" {
			add(route+" of no cluster", 412, codeWrongCluster, with(headerCluster, ""))
			add(route+" for nobody", 412, codeWrongTarget, with(headerTo, ""))
			add(route+" of a release that reads less", 412, codeProtocol, with(headerReads, "1"))
		}
		if slices.Contains([]string{"propose", "readindex", "remove", "state"}, route) {
			add(route+" of an unknown member", 403, codeNotAllowed, with(headerFrom, newID()))
		}
	}
	for _, method := range []string{"PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"} {
		add(method+" append", 405, codeBadRequest, message{method: method, route: "append"})
	}
	for _, route := range []string{"nothing", "", "append/", "append/append", "Append", "append;x", "append%00", "%61ppend%20", "append%2f", "v1/append"} {
		add("route "+route, 404, codeBadRequest, message{route: route})
	}
	add("a target of 5,000 bytes", 400, codeBadRequest, message{route: "append", header: map[string]string{headerTo: strings.Repeat("x", 5000)}})
	add("a cluster of 5,000 bytes", 400, codeBadRequest, message{route: "append", header: map[string]string{headerCluster: strings.Repeat("x", 5000)}})
	add("an address of 5,000 bytes", 400, codeBadRequest, message{route: "append", header: map[string]string{headerFromAddr: strings.Repeat("x", 5000)}})
	list = append(list, h.one(h.leader, "status for a removed member", 410, codeRemoved, func(_, _ Status) message {
		return message{method: "GET", route: "status", header: map[string]string{headerFrom: h.gone}}
	}))
	return list
}

// appendFrom is a good append of one entry that follows the log of its receiver.
func appendFrom(to, from Status) *raft.AppendEntriesRequest {
	e := &raft.Log{Index: to.LastIndex + 1, Term: to.Term, Data: []byte("entry")}
	return &raft.AppendEntriesRequest{RPCHeader: headerOf(from), Term: to.Term, PrevLogEntry: to.LastIndex, PrevLogTerm: to.Term, Entries: []*raft.Log{e}}
}

func headerOf(from Status) raft.RPCHeader {
	return raft.RPCHeader{ProtocolVersion: 3, ID: []byte(from.ID), Addr: []byte(from.ID + "@" + from.Addr)}
}

func sealed(a *raft.AppendEntriesRequest) []byte {
	for _, e := range a.Entries {
		sealEntry(e)
	}
	return encodeAppend(a)
}

func (h *besieged) appendCases() (list []hostileCase) {
	raw := func(name string, change func(good []byte) []byte) {
		list = append(list, h.refused("append "+name, 400, codeBadRequest, func(to, from Status) message {
			return message{route: "append", body: change(sealed(appendFrom(to, from)))}
		})...)
	}
	spoilt := func(name string, change func(a *raft.AppendEntriesRequest)) {
		list = append(list, h.refused("append "+name, 400, codeBadRequest, func(to, from Status) message {
			a := appendFrom(to, from)
			change(a)
			return message{route: "append", body: sealed(a)}
		})...)
	}
	for _, n := range []int{0, 1, 2, 10, 36, 60, 90} {
		raw(fmt.Sprintf("cut after %d bytes", n), func(b []byte) []byte { return b[:n] })
	}
	raw("without its last byte", func(b []byte) []byte { return b[:len(b)-1] })
	raw("with a byte more", func(b []byte) []byte { return append(b, 0) })
	raw("twice in one body", func(b []byte) []byte { return append(b, b...) })
	raw("of frame version 0", func(b []byte) []byte { b[0] = 0; return b })
	raw("of frame version 2", func(b []byte) []byte { b[0] = 2; return b })
	raw("of JSON", func([]byte) []byte { return []byte(`{"Term":1}`) })
	raw("of 0xff", func([]byte) []byte { return bytes.Repeat([]byte{0xff}, 4096) })
	raw("of zeros", func([]byte) []byte { return make([]byte, 4096) })
	raw("with an id of 2^63 bytes", func([]byte) []byte { return binary.AppendUvarint([]byte{frameVersion, 3}, 1<<63) })
	raw("with a varint that never ends", func([]byte) []byte { return append([]byte{frameVersion}, bytes.Repeat([]byte{0x80}, 64)...) })
	raw("of raft's protocol 2^17", func(b []byte) []byte {
		return append(binary.AppendUvarint([]byte{frameVersion}, 1<<17), b[2:]...)
	})
	head := func(to, from Status) []byte {
		a := appendFrom(to, from)
		a.Entries = nil
		b := encodeAppend(a)
		return b[:len(b)-1]
	}
	for name, n := range map[string]uint64{"1,025": maxAppendEntries + 1, "2^31": 1 << 31, "2^64-1": math.MaxUint64, "1,024": maxAppendEntries} {
		list = append(list, h.refused("append of "+name+" entries that do not come", 400, codeBadRequest, func(to, from Status) message {
			return message{route: "append", body: binary.AppendUvarint(head(to, from), n)}
		})...)
	}
	for name, n := range map[string]uint64{"17 MiB": 17 << 20, "2^40": 1 << 40, "2^63": 1 << 63} {
		list = append(list, h.refused("append of an entry of "+name+" that does not come", 400, codeBadRequest, func(to, from Status) message {
			return message{route: "append", body: append(binary.AppendUvarint(append(head(to, from), 1, 1, 1, 0), n), make([]byte, 64)...)}
		})...)
	}
	spoilt("with a hole", func(a *raft.AppendEntriesRequest) { a.Entries[0].Index += 2 })
	spoilt("of an entry before its place", func(a *raft.AppendEntriesRequest) { a.Entries[0].Index-- })
	spoilt("of the same entry twice", func(a *raft.AppendEntriesRequest) { a.Entries = append(a.Entries, a.Entries[0]) })
	spoilt("of an entry of term 0", func(a *raft.AppendEntriesRequest) { a.Entries[0].Term = 0 })
	spoilt("of an entry of a later term", func(a *raft.AppendEntriesRequest) { a.Entries[0].Term++ })
	spoilt("of term 2^62+1", func(a *raft.AppendEntriesRequest) { a.Term = maxIndex + 1 })
	spoilt("of term 2^64-1", func(a *raft.AppendEntriesRequest) { a.Term = math.MaxUint64 })
	spoilt("after index 2^64-1", func(a *raft.AppendEntriesRequest) { a.PrevLogEntry, a.Entries[0].Index = math.MaxUint64, 0 })
	spoilt("after index 2^62+1", func(a *raft.AppendEntriesRequest) { a.PrevLogEntry, a.Entries[0].Index = maxIndex+1, maxIndex+2 })
	for _, kind := range []raft.LogType{raft.LogAddPeerDeprecated, raft.LogRemovePeerDeprecated, 6, 255} {
		spoilt(fmt.Sprintf("of an entry of type %d", kind), func(a *raft.AppendEntriesRequest) { a.Entries[0].Type = kind })
	}
	for name, data := range map[string][]byte{"no bytes": nil, "garbage": {0xc1, 0xff}, "no members": raft.EncodeConfiguration(raft.Configuration{}),
		"2^32 members": {0x81, 0xa7, 'S', 'e', 'r', 'v', 'e', 'r', 's', 0xdd, 0xff, 0xff, 0xff, 0xff}, "nested arrays": bytes.Repeat([]byte{0x91}, 50_000)} {
		spoilt("of a configuration of "+name, func(a *raft.AppendEntriesRequest) {
			a.Entries[0].Type, a.Entries[0].Data = raft.LogConfiguration, data
		})
	}
	spoilt("of another member", func(a *raft.AppendEntriesRequest) { a.ID = []byte(newID()) })
	spoilt("of no member", func(a *raft.AppendEntriesRequest) { a.ID = nil })
	for name, change := range map[string]func(e *raft.Log){
		"without a checksum":      func(e *raft.Log) { e.Extensions = nil },
		"with a flipped bit":      func(e *raft.Log) { e.Data = []byte("entrx") },
		"with a checksum too few": func(e *raft.Log) { e.Extensions = e.Extensions[1:] },
		"with another type":       func(e *raft.Log) { e.Type = raft.LogNoop },
	} {
		list = append(list, h.one(h.follower, "append of an entry "+name, 400, codeBadRequest, func(to, from Status) message {
			a := appendFrom(to, from)
			sealEntry(a.Entries[0])
			change(a.Entries[0])
			return message{route: "append", body: encodeAppend(a)}
		}))
	}
	// One that is whole, from somebody who cannot lead this term.
	list = append(list, h.one(h.leader, "append of the leader's own term by a follower", 409, codeConflict, func(to, from Status) message {
		return message{route: "append", body: sealed(appendFrom(to, from))}
	}))
	other := newID()
	forged := func(entries bool) func(to, from Status) message {
		return func(to, from Status) message {
			from.ID, from.Addr = other, "127.0.0.1:1"
			a := appendFrom(to, from)
			if !entries {
				a.Entries, a.PrevLogEntry, a.PrevLogTerm = nil, 0, 0
			}
			return message{route: "append", body: sealed(a), header: map[string]string{headerFrom: other, headerFromAddr: from.Addr}}
		}
	}
	list = append(list, h.refused("append of this term by a stranger", 409, codeConflict, forged(true))...)
	list = append(list, h.refused("heartbeat of this term by a stranger", 409, codeConflict, forged(false))...)
	// Old ones, as they come out of a slow network: raft says its term, and that it has taken nothing.
	list = append(list, h.refused("append of an old term", 200, "", func(to, from Status) message {
		a := appendFrom(to, from)
		a.Term, a.PrevLogTerm, a.Entries[0].Term = to.Term-1, to.Term-1, max(1, to.Term-1)
		return message{route: "append", body: sealed(a)}
	})...)
	list = append(list, h.refused("heartbeat of an old term", 200, "", func(to, from Status) message {
		return message{route: "append", body: encodeAppend(&raft.AppendEntriesRequest{RPCHeader: headerOf(from), Term: to.Term - 1})}
	})...)
	list = append(list, h.one(h.follower, "append after another term's entry", 200, "", func(to, from Status) message {
		a := appendFrom(to, from)
		a.PrevLogTerm--
		return message{route: "append", body: sealed(a)}
	}))
	list = append(list, h.one(h.follower, "append far beyond the log", 200, "", func(to, from Status) message {
		a := appendFrom(to, from)
		a.PrevLogEntry, a.Entries[0].Index = to.LastIndex+1000, to.LastIndex+1001
		return message{route: "append", body: sealed(a)}
	}))
	list = append(list, h.one(h.follower, "append that commits entries which are not there", 200, "", func(to, from Status) message {
		return message{route: "append", body: encodeAppend(&raft.AppendEntriesRequest{RPCHeader: headerOf(from), Term: to.Term,
			PrevLogEntry: to.LastIndex, PrevLogTerm: to.Term, LeaderCommitIndex: math.MaxUint64})}
	}))
	return list
}

// ballotCases: votes, pre-votes and the order to become a candidate.
func (h *besieged) ballotCases() (list []hostileCase) {
	add := func(name string, status int, code string, make func(to, from Status) message) {
		list = append(list, h.refused(name, status, code, make)...)
	}
	for _, route := range []string{"vote", "prevote", "timeoutnow", "join", "remove"} {
		for name, body := range map[string]string{
			"nothing": "", "a brace": "{", "null": "null", "a list": "[]", "a string": `"x"`, "a number": "1e999",
			"nested lists": strings.Repeat("[", 60_000), "nested objects": strings.Repeat(`{"a":`, 12_000), "two values": "{}{}",
			"wrong types": `{"Term":"x","ID":7,"id":7,"addr":7,"RPCHeader":[]}`, "invalid UTF-8": "{\"id\":\"\xff\xfe\"}", "NUL": "\x00",
		} {
			add(route+" of "+name, 400, codeBadRequest, func(_, _ Status) message { return message{route: route, body: []byte(body)} })
		}
		add(route+" of 64 KiB and a byte", 400, codeBadRequest, func(_, _ Status) message {
			return message{route: route, body: make([]byte, maxSmallBody+1)}
		})
	}
	other := newID()
	ballot := func(route string, from string, change func(r *raft.RequestVoteRequest)) func(to, from Status) message {
		return func(to, f Status) message {
			if from != "" {
				f.ID = from
			}
			r := raft.RequestVoteRequest{RPCHeader: headerOf(f), Term: to.Term + 1, LastLogIndex: to.LastIndex, LastLogTerm: to.Term}
			header := map[string]string{headerFrom: f.ID}
			change(&r)
			if route == "prevote" {
				return message{route: route, header: header, body: asJSON(raft.RequestPreVoteRequest{RPCHeader: r.RPCHeader, Term: r.Term,
					LastLogIndex: r.LastLogIndex, LastLogTerm: r.LastLogTerm})}
			}
			return message{route: route, header: header, body: asJSON(r)}
		}
	}
	for _, route := range []string{"vote", "prevote"} {
		add(route+" for term 2^62+1", 400, codeBadRequest, ballot(route, "", func(r *raft.RequestVoteRequest) { r.Term = maxIndex + 1 }))
		add(route+" for term 2^64-1", 400, codeBadRequest, ballot(route, "", func(r *raft.RequestVoteRequest) { r.Term = math.MaxUint64 }))
		add(route+" in another's name", 400, codeBadRequest, ballot(route, "", func(r *raft.RequestVoteRequest) { r.ID = []byte(other) }))
		// There is a leader, so nobody gets a vote and no term is taken over.
		add(route+" for a stranger while there is a leader", 200, "", ballot(route, other, func(*raft.RequestVoteRequest) {}))
		add(route+" for a stranger of term 2^62", 200, "", ballot(route, other, func(r *raft.RequestVoteRequest) { r.Term = maxIndex }))
		add(route+" for a stranger with a log of 2^64-1 entries", 200, "", ballot(route, other, func(r *raft.RequestVoteRequest) {
			r.LastLogIndex, r.LastLogTerm = math.MaxUint64, math.MaxUint64
		}))
		add(route+" for a stranger at the leader's address", 200, "", func(to, from Status) message {
			m := ballot(route, other, func(r *raft.RequestVoteRequest) { r.Addr = []byte(other + "@" + h.leader.conf.Addr) })(to, from)
			m.header[headerFromAddr] = h.leader.conf.Addr
			return m
		})
		add(route+" for a stranger to whom leadership is said to be handed over", 200, "", ballot(route, other, func(r *raft.RequestVoteRequest) { r.LeadershipTransfer = true }))
		add(route+" for an old term", 200, "", ballot(route, other, func(r *raft.RequestVoteRequest) { r.Term = 1 }))
	}
	add("timeoutnow in another's name", 400, codeBadRequest, func(_, _ Status) message {
		return message{route: "timeoutnow", body: asJSON(raft.TimeoutNowRequest{RPCHeader: from(other)})}
	})
	return list
}

// memberCases: joining, removing, forwarding.
func (h *besieged) memberCases() (list []hostileCase) {
	third := h.c[slices.IndexFunc(h.c, func(m *testMember) bool { return m != h.leader && m != h.follower })].s.Status()
	stranger, somewhere := newID(), freeAddr(h.t)
	join := func(name string, status int, code string, r joinRequest) {
		list = append(list, h.one(h.leader, "join "+name, status, code, func(_, _ Status) message {
			return message{route: "join", header: map[string]string{headerFrom: r.ID, headerFromAddr: r.Addr}, body: asJSON(r)}
		}))
	}
	join("from an address that nobody allowed", 403, codeNotAllowed, joinRequest{ID: stranger, Addr: somewhere, Format: entryFormat})
	join("under a voter's id", 409, codeConflict, joinRequest{ID: third.ID, Addr: third.Addr, Format: entryFormat})
	join("under a voter's id from elsewhere", 409, codeConflict, joinRequest{ID: third.ID, Addr: somewhere, Format: entryFormat})
	join("under the leader's id", 409, codeConflict, joinRequest{ID: h.leader.s.Status().ID, Addr: somewhere, Format: entryFormat})
	join("at a living member's address", 409, codeConflict, joinRequest{ID: stranger, Addr: third.Addr, Format: entryFormat})
	join("at the leader's address", 409, codeConflict, joinRequest{ID: stranger, Addr: h.leader.conf.Addr, Format: entryFormat})
	join("of a release that reads nothing", 412, codeProtocol, joinRequest{ID: stranger, Addr: somewhere})
	join("under a removed id", 410, codeRemoved, joinRequest{ID: h.gone, Addr: somewhere, Format: entryFormat})
	join("that moves a voter to an address that nobody allowed", 403, codeNotAllowed, joinRequest{ID: third.ID, Addr: somewhere, Format: entryFormat, Announce: true})
	for name, addr := range map[string]string{"no address": "", "no port": "127.0.0.1", "port 0": "127.0.0.1:0", "port 65536": "127.0.0.1:65536",
		"every address": "0.0.0.0:80", "every address of IPv6": "[::]:80", "a URL": "http://127.0.0.1:80", "a placeholder": "local:x",
		"a path": "127.0.0.1:80/x", "a user": "a@127.0.0.1:80", "a line break": "a\nb:80", "a blank": "a b:80"} {
		list = append(list, h.refused("join at "+name, 400, codeBadRequest, func(_, _ Status) message {
			return message{route: "join", header: map[string]string{headerFrom: stranger, headerFromAddr: strings.ReplaceAll(addr, "\n", " ")},
				body: asJSON(joinRequest{ID: stranger, Addr: addr, Format: entryFormat})}
		})...)
		list = append(list, h.refused("remove of "+name, 400, codeBadRequest, func(_, _ Status) message {
			return message{route: "remove", body: asJSON(removeRequest{addr})}
		})...)
	}
	for name, id := range map[string]string{"short": "x", "of capitals": strings.Repeat("A", 32), "of a path": "../../../../../../../../etc/pass"} {
		list = append(list, h.refused("join with an id "+name, 400, codeBadRequest, func(_, _ Status) message {
			return message{route: "join", header: map[string]string{headerFrom: id, headerFromAddr: somewhere},
				body: asJSON(joinRequest{ID: id, Addr: somewhere, Format: entryFormat})}
		})...)
	}
	list = append(list, h.refused("join for another id", 400, codeBadRequest, func(_, from Status) message {
		return message{route: "join", body: asJSON(joinRequest{ID: stranger, Addr: from.Addr, Format: entryFormat})}
	})...)
	list = append(list, h.refused("join for another address", 400, codeBadRequest, func(_, from Status) message {
		return message{route: "join", body: asJSON(joinRequest{ID: from.ID, Addr: somewhere, Format: entryFormat})}
	})...)
	list = append(list, h.refused("join that asks the way to the leader", 421, codeNotLeader, func(_, _ Status) message {
		return message{route: "join", header: map[string]string{headerTo: "", headerCluster: "", headerFrom: stranger}}
	})...)
	propose := func(name string, body []byte) {
		list = append(list, h.refused("propose "+name, 400, codeBadRequest, func(_, _ Status) message { return message{route: "propose", body: body} })...)
	}
	whole := encodeBatch(entryFormat, 1, 1, 0, [][]byte{appendTransaction(nil, transaction{setOp("k", "v")})})
	flipped := bytes.Clone(whole)
	flipped[len(flipped)-1] ^= 1
	in := func(tx []byte) []byte { return encodeBatch(entryFormat, 1, 1, 0, [][]byte{tx}) }
	propose("nothing", nil)
	propose("garbage", []byte("\x01garbage"))
	propose("format 0", append([]byte{0}, whole[1:]...))
	propose("kind 9", append([]byte{entryFormat, 9}, whole[2:]...))
	propose("a term's start", encodeTermStart(entryFormat))
	propose("a raise", encodeRaise(entryFormat, 1))
	propose("a batch cut short", whole[:len(whole)-1])
	propose("a batch with a byte more", append(bytes.Clone(whole), 0))
	propose("a batch with a flipped bit", flipped)
	propose("a session cut short", []byte{entryFormat, byte(entryOpen), 1, 2, 3})
	propose("2^35 transactions", in([]byte("\xff\xff\xff\xff\x7f")))
	propose("129 operations", in(appendTransaction(nil, deletes(maxOps+1))))
	propose("an operation of kind 5", in(appendTransaction(nil, transaction{{kind: 5, key: "k"}})))
	propose("a key of no bytes", in(appendTransaction(nil, transaction{setOp("", "v")})))
	propose("a key with a NUL", in(appendTransaction(nil, transaction{setOp("a\x00b", "v")})))
	propose("a key that is not UTF-8", in(appendTransaction(nil, transaction{setOp("\xff", "v")})))
	propose("a key of 4,097 bytes", in(appendTransaction(nil, transaction{setOp(strings.Repeat("k", maxKey+1), "v")})))
	propose("a value of 16 MiB and a byte", in(appendTransaction(nil, transaction{{kind: opSet, key: "k", value: make([]byte, maxValueEver+1)}})))
	list = append(list, h.refused("propose a newer format", 412, codeProtocol, func(_, _ Status) message {
		return message{route: "propose", body: append([]byte{entryFormat + 1}, whole[1:]...)}
	})...)
	// A follower never forwards what was forwarded to it: two that take each other for the leader would never end.
	for route, body := range map[string][]byte{"propose": whole, "readindex": nil, "remove": asJSON(removeRequest{third.Addr})} {
		list = append(list, h.one(h.follower, route+" forwarded to a follower", 421, codeNotLeader, func(_, _ Status) message {
			return message{route: route, body: body}
		}))
	}
	list = append(list, h.one(h.follower, "join forwarded to a follower", 421, codeNotLeader, func(_, _ Status) message {
		return message{route: "join", header: map[string]string{headerFrom: stranger, headerFromAddr: somewhere},
			body: asJSON(joinRequest{ID: stranger, Addr: somewhere, Format: entryFormat})}
	}))
	list = append(list, h.one(h.follower, "state of a follower", 421, codeNotLeader, func(_, _ Status) message {
		return message{method: "GET", route: "state"}
	}))
	for name, body := range map[string]string{"garbage": "x", "a negative term": `{"term":-1}`, "a term of text": `{"term":"1"}`} {
		list = append(list, h.refused("readindex with "+name, 400, codeBadRequest, func(_, _ Status) message {
			return message{route: "readindex", body: []byte(body)}
		})...)
	}
	list = append(list, h.one(h.leader, "readindex with a term of the future", 200, "", func(_, _ Status) message {
		return message{route: "readindex", body: []byte(`{"term":18446744073709551615}`)}
	}))
	list = append(list, h.one(h.leader, "remove of a member by its placeholder", 400, codeBadRequest, func(_, _ Status) message {
		return message{route: "remove", body: asJSON(removeRequest{placeholderAddr(third.ID)})}
	}))
	return list
}

// snapshotCases: the streams are of this cluster's state at an index that is still to come, so that each would be installed if it
// were not for the one thing that is wrong with it.
func (h *besieged) snapshotCases() (list []hostileCase) {
	spoilt := func(name string, change func(r *raft.InstallSnapshotRequest)) {
		list = append(list, h.refused("snapshot "+name, 400, codeBadRequest, func(to, from Status) message {
			r := snapshotFrom(h, to, from, 4096+sha256.Size)
			change(r)
			return message{route: "snapshot", body: headed(h.t, r, make([]byte, 4096+sha256.Size))}
		})...)
	}
	raw := func(name string, body []byte) {
		list = append(list, h.refused("snapshot "+name, 400, codeBadRequest, func(_, _ Status) message { return message{route: "snapshot", body: body} })...)
	}
	for name, n := range map[string]int64{"no bytes": 0, "32 bytes": 32, "-1 bytes": -1, "64 GiB and a byte": maxSnapshot + 1, "2^63-1 bytes": math.MaxInt64, "-2^63 bytes": math.MinInt64} {
		spoilt("of "+name, func(r *raft.InstallSnapshotRequest) { r.Size = n })
	}
	spoilt("at index 0", func(r *raft.InstallSnapshotRequest) { r.LastLogIndex = 0 })
	spoilt("at index 2^62+1", func(r *raft.InstallSnapshotRequest) { r.LastLogIndex = maxIndex + 1 })
	spoilt("at index 2^64-1", func(r *raft.InstallSnapshotRequest) { r.LastLogIndex = math.MaxUint64 })
	spoilt("with a configuration of later", func(r *raft.InstallSnapshotRequest) { r.ConfigurationIndex = r.LastLogIndex + 1 })
	spoilt("of term 0", func(r *raft.InstallSnapshotRequest) { r.LastLogTerm = 0 })
	spoilt("of a later term", func(r *raft.InstallSnapshotRequest) { r.LastLogTerm = r.Term + 1 })
	spoilt("of term 2^62+1", func(r *raft.InstallSnapshotRequest) { r.Term = maxIndex + 1 })
	for _, v := range []raft.SnapshotVersion{-1, 0, 2, 255} {
		spoilt(fmt.Sprintf("of version %d", v), func(r *raft.InstallSnapshotRequest) { r.SnapshotVersion = v })
	}
	spoilt("of no configuration", func(r *raft.InstallSnapshotRequest) { r.Configuration = nil })
	spoilt("of a garbled configuration", func(r *raft.InstallSnapshotRequest) { r.Configuration = []byte{0xc1} })
	spoilt("without members", func(r *raft.InstallSnapshotRequest) { r.Configuration = raft.EncodeConfiguration(raft.Configuration{}) })
	spoilt("in another's name", func(r *raft.InstallSnapshotRequest) { r.ID = []byte(newID()) })
	raw("of nothing", nil)
	raw("of a header of 2^63 bytes", binary.AppendUvarint(nil, 1<<63))
	raw("of a header of 64 KiB and a byte", append(binary.AppendUvarint(nil, maxSmallBody+1), make([]byte, maxSmallBody+1)...))
	raw("of a header that does not come", binary.AppendUvarint(nil, 500))
	raw("of an empty header", []byte{0})
	raw("of a length that never ends", bytes.Repeat([]byte{0xff}, 100))
	raw("of nested JSON", append(binary.AppendUvarint(nil, 60_000), bytes.Repeat([]byte("["), 60_000)...))
	raw("of null", []byte("\x04null"))

	good := h.stream(func(string) {})
	resum := func(b []byte) []byte {
		sum := sha256.Sum256(b[:len(b)-sha256.Size])
		copy(b[len(b)-sha256.Size:], sum[:])
		return b
	}
	whole := func(name string, status int, code string, body []byte, change func(r *raft.InstallSnapshotRequest)) {
		list = append(list, h.one(h.follower, "snapshot "+name, status, code, func(to, from Status) message {
			r := snapshotFrom(h, to, from, int64(len(body)))
			if change != nil {
				change(r)
			}
			return message{route: "snapshot", body: headed(h.t, r, body)}
		}))
	}
	bad := func(name string, body []byte) { whole(name, 503, codeNotReady, body, nil) }
	with := func(name string, change func(b []byte) []byte) { bad(name, change(bytes.Clone(good))) }
	for name, at := range map[string]int{"33 bytes": 33, "a page": 4096, "half": len(good) / 2, "all but the checksum": len(good) - sha256.Size, "all but a byte": len(good) - 1} {
		with("of which there is only "+name, func(b []byte) []byte { return b[:at] })
	}
	with("with a wrong checksum", func(b []byte) []byte { b[len(b)-1]++; return b })
	with("with a flipped bit", func(b []byte) []byte { b[5000] ^= 4; return b })
	with("with a flipped bit, summed anew", func(b []byte) []byte {
		b[bytes.LastIndex(b, []byte("key/050"))+9] ^= 1
		return resum(b)
	})
	with("with a page too many", func(b []byte) []byte {
		return resum(append(b[:len(b)-sha256.Size], make([]byte, 4096+sha256.Size)...))
	})
	with("with a page too few", func(b []byte) []byte { return resum(b[:len(b)-4096]) })
	with("with half a page too many", func(b []byte) []byte { return resum(append(b, make([]byte, 2048)...)) })
	for name, pages := range map[string]uint32{"no page": 0, "one page": 1, "2^32-1 pages": math.MaxUint32} {
		with("whose file says it has "+name, func(b []byte) []byte {
			binary.BigEndian.PutUint32(b[28:], pages)
			return resum(b)
		})
	}
	for name, size := range map[string]uint16{"512": 512, "65536": 1, "3": 3, "0": 0} {
		with("with pages of "+name+" bytes", func(b []byte) []byte { binary.BigEndian.PutUint16(b[16:], size); return resum(b) })
	}
	with("in a later version of SQLite's format", func(b []byte) []byte { b[18], b[19] = 9, 9; return resum(b) })
	with("with a root page that is no table", func(b []byte) []byte { b[100] = 0xff; return resum(b) })
	with("of zeros", func(b []byte) []byte { clear(b); return resum(b) })
	with("of text", func(b []byte) []byte { copy(b, bytes.Repeat([]byte("quorate "), len(b)/8)); return resum(b) })
	with("with a free list that leads nowhere", func(b []byte) []byte {
		binary.BigEndian.PutUint32(b[32:], 1<<30)
		binary.BigEndian.PutUint32(b[36:], 7)
		return resum(b)
	})
	for name, sql := range map[string]string{
		"with a trigger":                       "CREATE TRIGGER x AFTER INSERT ON kv BEGIN DELETE FROM kv; END",
		"with a view":                          "CREATE VIEW x AS SELECT * FROM kv",
		"with a table of its own":              "CREATE TABLE x(a)",
		"with an index of its own":             "CREATE INDEX x ON kv(value)",
		"with a virtual table":                 "CREATE VIRTUAL TABLE x USING fts5(a)",
		"of another application":               "PRAGMA application_id=7",
		"of a later version":                   "PRAGMA user_version=99",
		"of no version":                        "PRAGMA user_version=0",
		"without a row":                        "DELETE FROM kv WHERE key='key/007'",
		"with another value":                   "UPDATE kv SET value='x' WHERE key='key/007'",
		"with a row too many":                  "INSERT INTO kv SELECT 'x', value, version, created, sum FROM kv WHERE key='key/007'",
		"with a row of another type":           "UPDATE kv SET value=7 WHERE key='key/007'",
		"without its table":                    "DROP TABLE kv",
		"without meta":                         "DELETE FROM quorate_meta",
		"with meta of another index":           "UPDATE quorate_meta SET applied=applied+1",
		"with meta of index -1":                "UPDATE quorate_meta SET applied=-1",
		"with meta of text":                    "UPDATE quorate_meta SET revision='x'",
		"with a session of garbage":            "UPDATE quorate_session SET results=x'ffff'",
		"with an address that it does not sum": "UPDATE quorate_allowed SET addr='evil.example:1' WHERE addr=(SELECT max(addr) FROM quorate_allowed)",
		"with a change of history too few":     "DELETE FROM history WHERE revision=50",
		"with an empty chain":                  "UPDATE quorate_meta SET chain=x''",
	} {
		body, err := h.changed(sql)
		if err != nil {
			list = append(list, hostileCase{name: "snapshot " + name, try: func() error { return fmt.Errorf("the case can't be made: %w", err) }})
			continue
		}
		bad(name, body)
	}
	whole("that says an index that it does not hold", 503, codeNotReady, good, func(r *raft.InstallSnapshotRequest) { r.LastLogIndex++ })
	whole("that says a term that it does not hold", 503, codeNotReady, good, func(r *raft.InstallSnapshotRequest) { r.LastLogTerm = max(1, r.LastLogTerm-1) })
	whole("that says members that it does not hold", 503, codeNotReady, good, func(r *raft.InstallSnapshotRequest) {
		r.Configuration = raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "evil", Address: "evil.example:1"}}})
	})
	whole("that says less than it has", 503, codeNotReady, good, func(r *raft.InstallSnapshotRequest) { r.Size -= 4096 })
	whole("of an old term", 200, "", good, func(r *raft.InstallSnapshotRequest) { r.Term, r.LastLogTerm = r.Term-1, max(1, r.LastLogTerm-1) })
	whole("that the member holds already", 200, "", make([]byte, 4096), func(r *raft.InstallSnapshotRequest) { r.LastLogIndex = 5; r.ConfigurationIndex = 1 })
	list = append(list, h.one(h.leader, "snapshot of the leader's own term", 409, codeConflict, func(to, from Status) message {
		return message{route: "snapshot", body: headed(h.t, snapshotFrom(h, to, from, int64(len(good))), good)}
	}))
	return list
}

const snapshotAhead = 1000 // entries that the snapshots are ahead of the members

// stream is the leader's state as a snapshot of later, after a change.
func (h *besieged) stream(change func(path string)) []byte {
	c, err := h.leader.s.store.copy(ctxFor(h.t, patience))
	must(h.t, err)
	defer c.Close()
	data, err := io.ReadAll(c)
	must(h.t, err)
	path := filepath.Join(h.t.TempDir(), "stream")
	must(h.t, os.WriteFile(path, data[:len(data)-sha256.Size], 0o600))
	must(h.t, changeFile(path, func(c *conn) error {
		m, err := c.readMeta()
		m.applied += snapshotAhead
		return errors.Join(err, c.writeMeta(&m))
	}))
	change(path)
	data, err = os.ReadFile(path)
	must(h.t, err)
	sum := sha256.Sum256(data)
	return append(data, sum[:]...)
}

func (h *besieged) changed(sql string) (stream []byte, err error) {
	stream = h.stream(func(path string) {
		err = changeFile(path, func(c *conn) error { return c.execText(sql) })
	})
	return stream, err
}

func snapshotFrom(h *besieged, to, from Status, size int64) *raft.InstallSnapshotRequest {
	m := h.leader.s.store.meta()
	return &raft.InstallSnapshotRequest{RPCHeader: headerOf(from), SnapshotVersion: 1, Term: to.Term, LastLogIndex: m.applied + snapshotAhead,
		LastLogTerm: m.term, Configuration: m.config, ConfigurationIndex: m.configIndex, Size: size}
}

func headed(t testing.TB, r *raft.InstallSnapshotRequest, stream []byte) []byte {
	header, err := encodeSnapshotHeader(r)
	must(t, err)
	return append(header, stream...)
}

// say writes bytes to a member's port and returns the status of the answer, 0 if the connection ends without one.
func say(addr, text string, limit time.Duration) (int, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	go io.WriteString(conn, text)
	line, err := bufio.NewReader(conn).ReadString('\n')
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return 0, fmt.Errorf("no answer in %v", limit)
	case err != nil:
		return 0, nil
	}
	status := 0
	fmt.Sscanf(line, "HTTP/1.%d %d", new(int), &status)
	return status, nil
}

// wireCases are HTTP that no member sends. What net/http refuses by itself is here too: it is the server that people will use.
func (h *besieged) wireCases() (list, waiting []hostileCase) {
	st, from := h.follower.s.Status(), h.leader.s.Status()
	headers := fmt.Sprintf("Host: %s\r\n%s: 2\r\n%s: 2\r\n%s: %s\r\n%s: %s\r\n%s: %s\r\n%s: %s\r\n", st.Addr, headerProtocol, headerReads,
		headerCluster, st.Cluster, headerFrom, from.ID, headerFromAddr, from.Addr, headerTo, st.ID)
	add := func(name, text string, statuses ...int) {
		list = append(list, hostileCase{name: "http: " + name, try: func() error {
			got, err := say(h.follower.conf.Addr, text, hostilePace)
			if err != nil || !slices.Contains(statuses, got) {
				return fmt.Errorf("status %d, %v, want %v", got, err, statuses)
			}
			return nil
		}})
	}
	post := func(rest string) string { return "POST /raft/vote HTTP/1.1\r\n" + headers + rest }
	add("random bytes", "\x00\x01\x02\xff\xfe\r\n\r\n", 400)
	add("a TLS hello", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400)
	add("HTTP/2 without TLS", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 404, 405, 505, 0)
	add("HTTP/0.9", "GET /raft/status\r\n\r\n", 400)
	add("HTTP/1.0 with a body", "POST /raft/vote HTTP/1.0\r\n"+headers+"Content-Length: 2\r\n\r\n{}", 400)
	add("HTTP/3.0", "GET /raft/status HTTP/3.0\r\n\r\n", 505, 400)
	add("no host", "GET /raft/status HTTP/1.1\r\n\r\n", 400)
	add("two hosts", "GET /raft/status HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400)
	add("CONNECT", "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n", 404, 405)
	add("CONNECT to a route", "CONNECT /raft/append HTTP/1.1\r\n"+headers+"\r\n", 405)
	add("TRACE", "TRACE /raft/status HTTP/1.1\r\n"+headers+"\r\n", 405)
	add("HEAD", "HEAD /raft/status HTTP/1.1\r\n"+headers+"\r\n", 405)
	add("a method in small letters", "post /raft/vote HTTP/1.1\r\n"+headers+"\r\n", 405)
	add("a method of no letters", "P()T /raft/vote HTTP/1.1\r\n"+headers+"\r\n", 400)
	for name, path := range map[string]string{"dots": "/raft/../raft/append", "encoded dots": "/raft/%2e%2e/raft/append", "encoded dots and slash": "/raft/%2e%2e%2fraft/append",
		"an encoded slash": "/raft%2fappend", "two slashes": "//raft/append", "two slashes within": "/raft//append", "a dot": "/raft/./append",
		"a NUL": "/raft/append%00", "a null at the end": "/raft/append%00.json", "a backslash": "/raft\\append", "a file": "/raft/../../../../etc/passwd",
		"encoded twice": "/raft/%252e%252e/append", "overlong UTF-8": "/raft/%c0%ae%c0%ae/append", "a line break": "/raft/append%0d%0aX:%20y", "10,000 bytes": "/raft/" + strings.Repeat("a/", 5000)} {
		add("a path of "+name, "POST "+path+" HTTP/1.1\r\n"+headers+"Content-Length: 0\r\n\r\n", 301, 307, 404, 400)
	}
	add("a bad percent", "POST /raft/%zz HTTP/1.1\r\n"+headers+"\r\n", 400)
	add("a blank in the path", "POST /raft/vote x HTTP/1.1\r\n"+headers+"\r\n", 400)
	add("another host in the line", "POST http://evil.example/raft/vote HTTP/1.1\r\n"+headers+"Content-Length: 1\r\n\r\n{", 400)
	add("two lengths", post("Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"), 400)
	add("a negative length", post("Content-Length: -1\r\n\r\n"), 400)
	add("a length that is no number", post("Content-Length: 0x10\r\n\r\n"), 400)
	add("a length of 2^64", post("Content-Length: 18446744073709551616\r\n\r\n"), 400)
	add("a length of 2^63-1", post("Content-Length: 9223372036854775807\r\n\r\n{}"), 400)
	add("a length and chunks", post("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n"), 400)
	add("chunks of chunks", post("Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"), 400, 501)
	add("an unknown encoding", post("Transfer-Encoding: gzip\r\n\r\n"), 400, 501)
	add("a body of gzip", post("Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"), 400)
	add("a chunk of 2^64 bytes", post("Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{"), 400)
	add("a chunk of a negative size", post("Transfer-Encoding: chunked\r\n\r\n-1\r\n{"), 400)
	add("a chunk extension of 100 KiB", post("Transfer-Encoding: chunked\r\n\r\n1;x="+strings.Repeat("x", 100<<10)+"\r\n{\r\n0\r\n\r\n"), 400)
	add("chunks that end in garbage", post("Transfer-Encoding: chunked\r\n\r\n1\r\n{garbage\r\n"), 400)
	add("chunks of 70 KiB", post("Transfer-Encoding: chunked\r\n\r\n11800\r\n"+strings.Repeat("[", 70<<10)+"\r\n0\r\n\r\n"), 400)
	add("a trailer in the place of a header", post("Transfer-Encoding: chunked\r\nTrailer: "+headerTo+"\r\n\r\n1\r\n{\r\n0\r\n"+headerTo+": x\r\n\r\n"), 400)
	add("garbage behind the body", post("Content-Length: 1\r\n\r\n{GARBAGE / HTTP/9.9\r\n\r\n"), 400)
	add("a header of 2 MiB", post("X: "+strings.Repeat("x", 2<<20)+"\r\n\r\n"), 431, 0)
	add("100,000 headers", post(strings.Repeat("X: x\r\n", 100_000)+"Content-Length: 1\r\n\r\n{"), 400, 431, 0)
	add("a header with a NUL", post("X: a\x00b\r\n\r\n"), 400)
	add("a header without a colon", post("X\r\n\r\n"), 400)
	add("a folded header", post("X: a\r\n b\r\nContent-Length: 1\r\n\r\n{"), 400)
	add("a header with a blank name", post("X y: z\r\n\r\n"), 400)
	add("an expectation that nobody has", post("Expect: the-spanish-inquisition\r\nContent-Length: 1\r\n\r\n{"), 417)
	add("an upgrade", "GET /raft/append HTTP/1.1\r\n"+headers+"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 405)
	add("two senders", "POST /raft/vote HTTP/1.1\r\n"+headerFrom+": evil\r\n"+headers+"Content-Length: 1\r\n\r\n{", 400)
	add("two targets", "POST /raft/vote HTTP/1.1\r\n"+headerTo+": evil\r\n"+headers+"Content-Length: 1\r\n\r\n{", 412)

	// Bodies and headers that do not come hold their place for the time that is given, and no longer.
	for route, size := range map[string]int{"vote": 100, "prevote": 100, "timeoutnow": 10, "propose": 1000, "append": 1000, "join": 100, "remove": 100, "readindex": 10, "term": 10} {
		for name, begin := range map[string]string{"nothing": "", "a byte": "{"} {
			waiting = append(waiting, hostileCase{name: "slow: " + route + " of which " + name + " comes", try: func() error {
				got, err := say(h.follower.conf.Addr, fmt.Sprintf("POST /raft/%s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s", route, headers, size, begin), hostilePace)
				if err != nil || got != 400 {
					return fmt.Errorf("status %d, %v, want 400", got, err)
				}
				return nil
			}})
		}
		waiting = append(waiting, hostileCase{name: "slow: " + route + " in chunks that stop", try: func() error {
			got, err := say(h.follower.conf.Addr, "POST /raft/"+route+" HTTP/1.1\r\n"+headers+"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", hostilePace)
			if err != nil || got != 400 {
				return fmt.Errorf("status %d, %v, want 400", got, err)
			}
			return nil
		}})
	}
	waiting = append(waiting, hostileCase{name: "slow: a removed member's body that is not read", try: func() error {
		text := strings.Replace(post("Content-Length: 100\r\n\r\n{"), from.ID, h.gone, 1)
		if got, err := say(h.follower.conf.Addr, text, hostilePace); err != nil || got != 410 {
			return fmt.Errorf("status %d, %v, want 410", got, err)
		}
		return nil
	}})
	return list, waiting
}

// The largest snapshot leaves its receiver more time than a small one.
func TestInstallTimeOfTheLargestSnapshot(t *testing.T) {
	if got, want := installTime(maxSnapshot), 4*time.Hour; got < want {
		t.Errorf("%v, want at least %v", got, want)
	}
}

// A snapshot may take as long as its bytes do: a GiB that was declared buys no time for one that trickles in.
func TestTricklingSnapshotEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := doorHost()
		p, _ := d.peer(t, false, func(rpc raft.RPC) {
			_, err := io.Copy(io.Discard, rpc.Reader)
			rpc.Respond(&raft.InstallSnapshotResponse{}, err)
		})
		s := someSnapshot()
		s.RPCHeader, s.Size, s.Term, s.LastLogIndex = from("b"), 1<<30, 7, 60
		req := httptest.NewRequest("POST", "/raft/snapshot", io.MultiReader(bytes.NewReader(headed(t, s, nil)), io.LimitReader(trickle{}, 3600)))
		setHeaders(req.Header, headerProtocol, "1", headerCluster, "c", headerFrom, "b", headerTo, "a")
		began := time.Now()
		w := httptest.NewRecorder()
		p.ServeHTTP(w, req)
		if took := time.Since(began); w.Code != 503 || took > 2*stallTimeout {
			t.Errorf("status %d after %v", w.Code, took)
		}
		p.close()
		synctest.Wait()
	})
}

// A trickle gives a byte a second.
type trickle struct{}

func (trickle) Read(b []byte) (int, error) {
	time.Sleep(time.Second)
	return copy(b, "x"), nil
}

// Bodies without an end, many at once, to a member in a process of its own: what it keeps of them is bounded by its limits and
// its gates.
func TestCampaignHostileSizes(t *testing.T) {
	p := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), client: newClient(t, &line{})}
	t.Cleanup(p.stop)
	p.start()
	p.awaitReady()
	st := p.must(order{Op: "status"}).Status
	page := make([]byte, 64<<10)
	send := func(route string, declared int64) error {
		ctx, cancel := context.WithTimeout(context.Background(), hostilePace)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, "POST", "http://"+st.Addr+"/raft/"+route, io.LimitReader(repeated{page}, 64<<20))
		if err != nil {
			return err
		}
		req.ContentLength = declared
		setHeaders(req.Header, headerProtocol, "2", headerReads, "2", headerCluster, st.Cluster, headerFrom, st.ID, headerFromAddr, st.Addr, headerTo, st.ID)
		resp, err := p.client.Do(req)
		switch {
		case err != nil && ctx.Err() == nil: // the connection was closed on the rest
			return nil
		case err != nil:
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != 400 && resp.StatusCode != 503 {
			return errors.New(resp.Status)
		}
		return nil
	}
	var wg sync.WaitGroup
	for _, route := range []string{"append", "propose", "vote", "prevote", "timeoutnow", "snapshot", "join", "remove", "readindex", "term"} {
		for how, declared := range map[string]int64{"in chunks": -1, "of 64 MiB": 64 << 20} {
			counted.hostileCases.add(1)
			for range dose(4, 8) {
				wg.Go(func() {
					if err := send(route, declared); err != nil {
						violated(t, "%s %s: %v", route, how, err)
					}
				})
			}
		}
	}
	wg.Wait()
	if after := p.must(order{Op: "status"}).Status; after.Hash != st.Hash || after.Term != st.Term || after.AppliedIndex != st.AppliedIndex {
		violated(t, "state %+v, before %+v", after, st)
	}
	if peak, ok := p.peakMemory(); ok {
		t.Logf("the member took %d MiB at most", peak>>20)
		if peak > besiegedMemory {
			violated(t, "the member took %d MiB, want at most %d", peak>>20, besiegedMemory>>20)
		}
	}
}

// besiegedMemory is more than its gates let large bodies take, 8 and 16 at a time, each of 20 MiB in a buffer that has just grown, with
// what the race detector adds. Without limits it would be 15 GiB.
const besiegedMemory = 3 << 30

// peakMemory is the most that the process ever had resident, where the system tells.
func (p *process) peakMemory() (bytes int64, ok bool) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, false
	}
	_, line, ok := strings.Cut(string(status), "VmHWM:")
	if !ok {
		return 0, false
	}
	_, err = fmt.Sscanf(line, "%d kB", &bytes)
	return bytes << 10, err == nil
}

type repeated struct{ page []byte }

func (r repeated) Read(b []byte) (int, error) { return copy(b, r.page), nil }

// answerCases: somebody else answers where a member was called.
func answerCases(t testing.TB) (list []hostileCase) {
	ours := http.Header{headerProtocol: {"1"}, headerFrom: {"a"}, headerCluster: {"c"}}
	with := func(k, v string) http.Header { h := ours.Clone(); h.Set(k, v); return h }
	type answering struct {
		name   string
		header http.Header
		status int
		body   []byte
	}
	endless := make([]byte, maxAnswerBody+1)
	wrap := binary.AppendUvarint([]byte{frameVersion, 3, 0, 0}, math.MaxUint64)
	wrap = append(wrap, 0, 1)
	var answers []answering
	for _, status := range []int{200, 421, 503} {
		for name, h := range map[string]http.Header{"of another member": with(headerFrom, "z"), "of another cluster": with(headerCluster, "d"),
			"of no member": with(headerFrom, ""), "of a later protocol": with(headerProtocol, "9"), "of nobody that we know": {}} {
			if status == 200 || name == "of nobody that we know" {
				answers = append(answers, answering{fmt.Sprintf("%d %s", status, name), h, status, []byte(`{"term":7,"index":7}`)})
			}
		}
		answers = append(answers,
			answering{fmt.Sprintf("%d of more than a MiB", status), ours, status, endless},
			answering{fmt.Sprintf("%d of nothing", status), ours, status, nil},
			answering{fmt.Sprintf("%d of nested JSON", status), ours, status, bytes.Repeat([]byte("["), 1<<19)},
			answering{fmt.Sprintf("%d of wrong types", status), ours, status, []byte(`{"code":7,"term":"x","index":-1,"Term":"x","id":[],"cluster":{}}`)},
			answering{fmt.Sprintf("%d of half a value", status), ours, status, []byte(`{"term":`)},
			answering{fmt.Sprintf("%d of 0xff", status), ours, status, bytes.Repeat([]byte{0xff}, 100)})
	}
	location := ours.Clone()
	location.Set("Location", "/raft/term")
	answers = append(answers,
		answering{"a redirect to itself", location, 307, nil},
		answering{"a refusal with a newline in the leader's address", ours, 421, []byte(`{"code":"not-leader","leaderaddr":"a\nb:1","leaderid":"x\r\ny"}`)},
		answering{"a refusal of an unknown code", ours, 400, []byte(`{"code":"of-a-later-version"}`)},
		answering{"a status that there is not", ours, 299, []byte(`{}`)},
		answering{"term 2^64-1", ours, 200, wrap})
	for _, a := range answers {
		list = append(list, hostileCase{name: "answer: " + a.name, try: func() error { return answered(t, a.header, a.status, a.body) }})
	}
	for name, term := range map[string]string{"2^62+1": "4611686018427387905", "2^64-1": "18446744073709551615", "-1": "-1"} {
		list = append(list, hostileCase{name: "answer: a vote of term " + name, try: func() error {
			return answered(t, ours, 200, []byte(`{"Term":`+term+`,"Granted":true,"VoteGranted":true,"Success":true}`), "vote", "prevote", "snapshot")
		}})
	}
	return list
}

// answered makes the calls of a member to one that answers so. None may succeed, or take long.
func answered(t testing.TB, header http.Header, status int, body []byte, only ...string) error {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(status)
		w.Write(body)
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go srv.Serve(l)
	defer srv.Close()
	b := callerOf(t, newClient(t, &line{}), false)
	defer b.close()
	tr := b.transport()
	addr := l.Addr().String()
	target := raft.ServerAddress(addr)
	ctx, cancel := context.WithTimeout(context.Background(), hostilePace/2)
	defer cancel()
	snapshot := someSnapshot()
	errs := []error{}
	for name, call := range map[string]func() error{
		"term":      func() error { _, err := b.askTerm(ctx, "a", addr); return err },
		"readindex": func() error { _, err := b.readIndex(ctx, "a", addr, 7); return err },
		"join":      func() error { _, err := b.join(ctx, "http://"+addr, "a", "", joinRequest{}); return err },
		"propose": func() error {
			answer, _, err := b.propose(ctx, "a", addr, []byte("x"))
			if err == nil {
				_, err = decodeOutcome(answer)
			}
			return err
		},
		"append": func() error {
			return tr.AppendEntries("a", target, &raft.AppendEntriesRequest{Term: 7}, new(raft.AppendEntriesResponse))
		},
		"vote": func() error {
			return tr.RequestVote("a", target, &raft.RequestVoteRequest{}, new(raft.RequestVoteResponse))
		},
		"prevote": func() error {
			return tr.RequestPreVote("a", target, &raft.RequestPreVoteRequest{}, new(raft.RequestPreVoteResponse))
		},
		"snapshot": func() error {
			_, err := b.call(ctx, request{route: "snapshot", base: "http://" + addr, to: "a", body: []byte("x")})
			if err == nil {
				resp := new(raft.InstallSnapshotResponse)
				err = tr.InstallSnapshot("a", target, snapshot, resp, bytes.NewReader(make([]byte, snapshot.Size)))
			}
			return err
		},
	} {
		if len(only) > 0 && !slices.Contains(only, name) {
			continue
		}
		err := call()
		// Some JSON means something to a call that takes no field of it.
		if harmless := status == 200 && bytes.Equal(body, []byte(`{}`)); err == nil && !harmless {
			errs = append(errs, fmt.Errorf("%s takes it", name))
		}
		var r *refusal
		if errors.As(err, &r) && status == 200 {
			errs = append(errs, fmt.Errorf("%s: %v is no refusal", name, err))
		}
	}
	return errors.Join(errs...)
}

// joinerCases: whoever joins meets something else than a cluster.
func joinerCases(t testing.TB) (list []hostileCase) {
	id := newID()
	for name, c := range map[string]struct {
		status int
		body   string
		err    error
	}{
		"names itself as the leader":           {421, `{"code":"not-leader","leaderid":"` + id + `","leaderaddr":"{addr}"}`, context.DeadlineExceeded},
		"names an address of no sense":         {421, `{"code":"not-leader","leaderid":"` + id + `","leaderaddr":"a b/c?d"}`, context.DeadlineExceeded},
		"names a leader with a line break":     {421, `{"code":"not-leader","leaderid":"x\r\ny","leaderaddr":"{addr}"}`, context.DeadlineExceeded},
		"admits to no cluster":                 {200, `{}`, context.DeadlineExceeded},
		"admits to a cluster of no sense":      {200, `{"cluster":"../../x"}`, context.DeadlineExceeded},
		"admits to a cluster of a MiB":         {200, `{"cluster":"` + strings.Repeat("x", maxAnswerBody) + `"}`, context.DeadlineExceeded},
		"answers garbage":                      {200, "garbage", context.DeadlineExceeded},
		"answers like another kind of service": {404, "not found", context.DeadlineExceeded},
		"says that the address is not allowed": {403, `{"code":"not-allowed"}`, ErrNotAllowed},
		"says that the id was removed":         {410, `{"code":"removed"}`, ErrRemoved},
	} {
		list = append(list, hostileCase{name: "join: the boot address " + name, try: func() error {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			addr := l.Addr().String()
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				setHeaders(w.Header(), headerProtocol, "1", headerFrom, id, headerCluster, id)
				w.WriteHeader(c.status)
				io.WriteString(w, strings.ReplaceAll(c.body, "{addr}", addr))
			})}
			go srv.Serve(l)
			defer srv.Close()
			limit := 700 * time.Millisecond
			if c.err != context.DeadlineExceeded {
				limit = hostilePace
			}
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			dir := filepath.Join(t.TempDir(), "data")
			log := slog.New(listener{slog.DiscardHandler, notAllowedYet, cancel}) // a permission may still come
			s, err := Open(ctx, Config{Logger: log, Dir: dir, Addr: freeAddr(t), Join: addr, Client: newClient(t, &line{})})
			if err == nil {
				s.Close()
			}
			if !errors.Is(err, c.err) {
				return fmt.Errorf("%v, want %v", err, c.err)
			}
			// It can still join a cluster that is one.
			data, err := os.ReadFile(filepath.Join(dir, "id"))
			if err != nil {
				return err
			}
			if ident, err := decodeIdentity(data); err != nil || ident.cluster != "" {
				return fmt.Errorf("it believes to be in %q, %v", ident.cluster, err)
			}
			return nil
		}})
	}
	return list
}

// callCases: what a careless or malicious caller of the API on one member may try.
func (h *besieged) callCases(where string, s *Service) (list []hostileCase) {
	add := func(name string, call func(ctx context.Context) error, want ...error) {
		list = append(list, hostileCase{name: "call: " + name + ", on " + where, try: func() error {
			ctx, cancel := context.WithTimeout(context.Background(), hostilePace)
			defer cancel()
			err := call(ctx)
			for _, w := range want {
				if !errors.Is(err, w) {
					return fmt.Errorf("%v, want %v", err, w)
				}
			}
			return nil
		}})
	}
	unsatisfied := func(name string, ops ...Op) {
		add(name, func(ctx context.Context) error { _, err := s.Exec(ctx, ops...); return err }, ErrUnsatisfied)
		list[len(list)-1].logs = true
	}
	exec := func(name string, want error, ops ...Op) {
		add(name, func(ctx context.Context) error { _, err := s.Exec(ctx, ops...); return err }, want, ErrNotApplied)
	}
	keys := map[string]struct {
		key  string
		want error
	}{
		"no bytes": {"", ErrInvalid}, "a NUL": {"\x00", ErrInvalid}, "a NUL within": {"key/\x00001", ErrInvalid}, "a NUL at the end": {"key/001\x00", ErrInvalid},
		"a lone byte 0xff": {"\xff", ErrInvalid}, "half a character": {"\xe2\x82", ErrInvalid}, "an overlong slash": {"\xc0\xaf", ErrInvalid},
		"a surrogate": {"\xed\xa0\x80", ErrInvalid}, "beyond Unicode": {"\xf4\x90\x80\x80", ErrInvalid},
		"4,097 bytes": {strings.Repeat("k", maxKey+1), ErrTooLarge}, "64 MiB": {strings.Repeat("k", 64<<20), ErrTooLarge},
	}
	for name, k := range keys {
		add("Set of a key of "+name, func(ctx context.Context) error { return s.Set(ctx, k.key, nil) }, k.want, ErrNotApplied)
		add("Insert of a key of "+name, func(ctx context.Context) error { return s.Insert(ctx, k.key, nil) }, k.want, ErrNotApplied)
		add("Delete of a key of "+name, func(ctx context.Context) error { return s.Delete(ctx, k.key) }, k.want, ErrNotApplied)
		add("Get of a key of "+name, func(ctx context.Context) error { _, err := s.Get(ctx, k.key); return err }, k.want)
		add("Lookup of a key of "+name, func(ctx context.Context) error { _, err := s.Lookup(ctx, k.key); return err }, k.want)
		add("Update of a key of "+name, func(ctx context.Context) error {
			_, err := s.Update(ctx, k.key, func(Entry) ([]byte, error) { return nil, nil })
			return err
		}, k.want, ErrNotApplied)
		add("Exec of a key of "+name, func(ctx context.Context) error {
			_, err := s.Exec(ctx, IfVersion(k.key, 1), Set("key/001", nil))
			return err
		}, k.want, ErrNotApplied)
		add("Stale of a key of "+name, func(context.Context) error {
			if v := s.Stale().Get(k.key); v != nil {
				return fmt.Errorf("it has the value %q", v)
			}
			return nil
		})
		if k.key == "" {
			continue // every key has this prefix
		}
		add("List of a prefix of "+name, func(ctx context.Context) error { return last(s.List(ctx, k.key)) }, k.want)
		add("Watch of a prefix of "+name, func(ctx context.Context) error { return last(s.Watch(ctx, k.key, 0)) }, k.want)
	}
	for name, size := range map[string]int{"a byte too many": 100<<10 + 1, "16 MiB": 16 << 20, "64 MiB": 64 << 20} {
		value := make([]byte, size)
		add("Set of a value of "+name, func(ctx context.Context) error { return s.Set(ctx, "key/001", value) }, ErrTooLarge, ErrNotApplied)
		add("Insert of a value of "+name, func(ctx context.Context) error { return s.Insert(ctx, "new", value) }, ErrTooLarge, ErrNotApplied)
		exec("IfValue of a value of "+name, ErrTooLarge, IfValue("key/001", value))
		add("Update to a value of "+name, func(ctx context.Context) error {
			_, err := s.Update(ctx, "key/001", func(Entry) ([]byte, error) { return value, nil })
			return err
		}, ErrTooLarge, ErrNotApplied)
	}
	for name, n := range map[string]int{"129": 129, "10,000": 10_000, "100,000": 100_000} {
		ops := make([]Op, n)
		for i := range ops {
			ops[i] = IfExists("key/001")
		}
		exec(name+" conditions", ErrTooLarge, ops...)
		nested := Set("key/001", nil)
		for range min(n, 1000) {
			nested = All(nested, IfExists("key/001"))
		}
		exec(name+" conditions, nested in each other", ErrTooLarge, nested)
	}
	exec("seven values of 100 KiB", ErrTooLarge, func() (ops []Op) {
		for i := range 7 {
			ops = append(ops, Set(fmt.Sprint("key/", i), make([]byte, 100<<10)))
		}
		return ops
	}()...)
	exec("128 conditions of 4 KiB and a value", ErrTooLarge, append(func() (ops []Op) {
		for range 127 {
			ops = append(ops, IfExists(strings.Repeat("k", maxKey)))
		}
		return ops
	}(), Set("key/001", make([]byte, 50<<10)))...)
	exec("one key set twice", ErrInvalid, Set("key/001", nil), Set("key/001", []byte("x")))
	exec("one key set and deleted", ErrInvalid, Set("key/001", nil), Delete("key/001"))
	exec("one key deleted twice, far apart", ErrInvalid, Delete("key/001"), All(All(Set("a", nil)), Set("b", nil)), Delete("key/001"))
	unsatisfied("a version of 2^64-1", IfVersion("key/001", math.MaxUint64), Set("key/001", nil))
	unsatisfied("a version of 2^63", IfVersion("key/001", 1<<63), Delete("key/001"))
	unsatisfied("a version of a missing key", IfVersion("missing", 1), Set("missing", nil))
	unsatisfied("a value that is a prefix", IfValue("key/001", []byte("value")), Set("key/001", nil))
	unsatisfied("the empty value", IfValue("key/001", nil), Set("key/001", nil))
	unsatisfied("conditions that exclude each other", IfExists("key/001"), IfNotExists("key/001"), Set("key/001", nil))
	unsatisfied("127 conditions that hold and one that does not", append(slices.Repeat([]Op{IfExists("key/001")}, 126), IfNotExists("key/001"), Delete("key/001"))...)
	unsatisfied("a condition in words of SQL", IfValue("key/001", []byte("' OR '1'='1")), Set("key/001", nil))
	unsatisfied("a key in words of SQL", IfExists("'; DROP TABLE kv; --"), Set("key/001", nil))

	ended, cancel := context.WithCancel(context.Background())
	cancel()
	late, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Hour))
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		want error
	}{"was cancelled": {ended, context.Canceled}, "ended an hour ago": {late, context.DeadlineExceeded}} {
		for verb, call := range map[string]func() error{
			"Set":          func() error { return s.Set(c.ctx, "key/001", nil) },
			"Insert":       func() error { return s.Insert(c.ctx, "new", nil) },
			"Delete":       func() error { return s.Delete(c.ctx, "key/001") },
			"Exec":         func() error { _, err := s.Exec(c.ctx, Set("key/001", nil)); return err },
			"Get":          func() error { _, err := s.Get(c.ctx, "key/001"); return err },
			"Lookup":       func() error { _, err := s.Lookup(c.ctx, "key/001"); return err },
			"List":         func() error { return last(s.List(c.ctx, "")) },
			"Watch":        func() error { return last(s.Watch(c.ctx, "", 1)) },
			"Backup":       func() error { _, err := s.Backup(c.ctx, io.Discard); return err },
			"Query":        func() error { rows, err := s.Query(c.ctx, "SELECT 1"); closeRows(rows); return err },
			"Update":       func() error { _, err := s.Update(c.ctx, "key/001", nil); return err },
			"RemoveMember": func() error { return s.RemoveMember(c.ctx, h.leader.conf.Addr) },
			"AddAllowed":   func() error { return s.AddAllowedMember(c.ctx, "evil.example:1") },
		} {
			add(verb+" with a context that "+name, func(context.Context) error { return call() }, c.want)
		}
	}
	for name, addr := range map[string]string{"nothing": "", "no port": "host", "port 0": "host:0", "a port too high": "host:99999", "a port of text": "host:http x",
		"every address": "0.0.0.0:1", "a URL": "http://host:1/", "a blank": "a b:1", "a NUL": "a\x00:1", "a path": "../..:1"} {
		add("AddAllowedMember of "+name, func(ctx context.Context) error { return s.AddAllowedMember(ctx, addr) }, ErrInvalid, ErrNotApplied)
		add("RemoveMember of "+name, func(ctx context.Context) error { return s.RemoveMember(ctx, addr) }, ErrInvalid, ErrNotApplied)
	}
	add("List with a negative limit", func(ctx context.Context) error { return last(s.List(ctx, "", Limit(-1))) }, ErrInvalid)
	add("List from a key that is none", func(ctx context.Context) error { return last(s.List(ctx, "key/", From("\xff\x00"))) })
	add("List of a prefix of 4 KiB that nothing has", func(ctx context.Context) error { return last(s.List(ctx, strings.Repeat("key/", maxKey/4))) })
	add("List without a consumer's patience", func(ctx context.Context) error {
		for range s.List(ctx, "") {
			break
		}
		return nil
	})
	add("Watch from a revision of the future", func(ctx context.Context) error { return last(s.Watch(ctx, "", math.MaxUint64)) }, ErrInvalid)
	add("Backup to a writer that fails", func(ctx context.Context) error { _, err := s.Backup(ctx, brokenWriter{}); return err }, io.ErrClosedPipe)
	failed := errors.New("f failed")
	add("Update by a function that fails", func(ctx context.Context) error {
		_, err := s.Update(ctx, "key/001", func(Entry) ([]byte, error) { return nil, failed })
		return err
	}, failed, ErrNotApplied)
	add("Update by a function that panics", func(ctx context.Context) (err error) {
		defer func() { err = recover().(error) }()
		s.Update(ctx, "key/001", func(Entry) ([]byte, error) { panic(failed) })
		return nil
	}, failed)
	add("Update by no function", func(ctx context.Context) (err error) {
		defer func() { err = recover().(error) }()
		s.Update(ctx, "key/001", nil)
		return nil
	})
	add("List whose consumer panics", func(ctx context.Context) (err error) {
		defer func() { err = recover().(error) }()
		for range s.List(ctx, "") {
			panic(failed)
		}
		return nil
	}, failed)
	add("Watch whose consumer panics", func(ctx context.Context) (err error) {
		defer func() { err = recover().(error) }()
		for range s.Watch(ctx, "", 0) {
			panic(failed)
		}
		return nil
	}, failed)
	add("a value written into after Get", func(ctx context.Context) error {
		v, err := s.Get(ctx, "key/001")
		if err != nil {
			return err
		}
		clear(v)
		if v, err = s.Get(ctx, "key/001"); err != nil || string(v) != "value 1" {
			return fmt.Errorf("it is %q now, %v", v, err)
		}
		return nil
	})
	dir := h.t.TempDir()
	for _, text := range refused { // of query_test.go: what writes, attaches, loads, or is no statement
		text := strings.ReplaceAll(text, "{dir}", dir)
		add(fmt.Sprintf("Query %.60q", text), func(ctx context.Context) error {
			_, err := drain(s, ctx, text)
			if files, _ := os.ReadDir(dir); err != nil && len(files) > 0 {
				return fmt.Errorf("it made %v", files)
			}
			return err
		}, ErrInvalid)
	}
	add("Query of a MiB and more", func(ctx context.Context) error {
		_, err := drain(s, ctx, "SELECT '"+strings.Repeat("x", querySQL)+"'")
		return err
	}, ErrTooLarge)
	for name, text := range map[string]string{
		"a value of 1 GB":           "SELECT length(zeroblob(1000000000))",
		"a value of 1 GB, printed":  "SELECT printf('%1000000000s', 'x')",
		"a value doubled 40 times":  "WITH RECURSIVE d(v, n) AS (SELECT 'xxxxxxxx', 0 UNION ALL SELECT v||v, n+1 FROM d WHERE n < 40) SELECT max(length(v)) FROM d",
		"2,000 nested calls":        "SELECT " + strings.Repeat("abs(", 2000) + "1" + strings.Repeat(")", 2000),
		"3,000 columns":             "SELECT 1" + strings.Repeat(",1", 3000),
		"600 selects":               "SELECT 1" + strings.Repeat(" UNION ALL SELECT 1", 600),
		"a join of 70":              "SELECT count(*) FROM kv" + strings.Repeat(" JOIN kv", 70),
		"an extension":              "SELECT load_extension('/lib/x86_64-linux-gnu/libm.so.6')",
		"a file":                    "SELECT readfile('/etc/passwd')",
		"a file that is to be made": "SELECT writefile('" + dir + "/made', 'x')",
		"JSON of 100,000 levels":    "SELECT json(printf('%.*c', 100000, '['))",
		"an undefined function":     "SELECT quorate()",
		"a function of ours":        "SELECT quorate_next()",
		"a private table":           "SELECT * FROM quorate_session",
		"the schema's writable one": "UPDATE sqlite_schema SET sql = ''",
		"a blob made of a pointer":  "SELECT fts3_tokenizer('simple')",
		"a bad pattern of regexp":   "SELECT 'x' REGEXP '['",
		"integer overflow":          "SELECT sum(9223372036854775807) FROM kv",
		"abs of the smallest":       "SELECT abs(-9223372036854775807 - 1)",
	} {
		add("Query of "+name, func(ctx context.Context) error {
			_, err := drain(s, ctx, text)
			if err == nil {
				return errors.New("it has a result")
			}
			if files, _ := os.ReadDir(dir); len(files) > 0 {
				return fmt.Errorf("it made %v", files)
			}
			return ErrInvalid // any error will do
		}, ErrInvalid)
	}
	for name, text := range map[string]string{
		"rows without an end":      endless + "SELECT i FROM n",
		"a count without an end":   endless + "SELECT count(*) FROM n",
		"a sort without an end":    endless + "SELECT i FROM n ORDER BY -i",
		"a join of everything":     "SELECT count(*) FROM kv a, kv b, kv c, kv d, kv e WHERE a.value||b.value = c.value||d.value||e.value",
		"a group without an end":   endless + "SELECT i % 7, count(*) FROM n GROUP BY 1",
		"an existence without end": endless + "SELECT 1 WHERE EXISTS (SELECT 1 FROM n WHERE i < 0)",
	} {
		add("Query of "+name, func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
			defer cancel()
			_, err := drain(s, ctx, text)
			return err
		}, context.DeadlineExceeded)
	}
	return list
}

// last is the error that ends a sequence, if any. Endless ones are left after a while.
func last[T any](seq func(yield func(T, error) bool)) (last error) {
	n := 0
	for _, err := range seq {
		if last = err; n > 1000 {
			break
		}
		n++
	}
	return last
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// handshakes: with TLS, a certificate of the right authority is good for its own name only.
func handshakes(t testing.TB) (list []hostileCase) {
	pool, issue := authority(t.(*testing.T))
	_, forge := authority(t.(*testing.T))
	m := newMember(t, "")
	m.secure(pool, tls.VerifyClientCertIfGiven, issue("127.0.0.1"))
	s := m.start()
	must(t, s.Ready(ctxFor(t, patience)))
	st := s.Status()
	ask := func(scheme, route, claims string, want int, certificates ...tls.Certificate) error {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: certificates}}
		defer tr.CloseIdleConnections()
		client := &http.Client{Transport: tr, Timeout: hostilePace}
		req, err := http.NewRequest("POST", scheme+"://"+st.Addr+"/raft/"+route, strings.NewReader("{"))
		if err != nil {
			return err
		}
		for k, v := range map[string]string{headerProtocol: "2", headerReads: "2", headerCluster: st.Cluster, headerFrom: st.ID, headerFromAddr: claims, headerTo: st.ID} {
			req.Header.Set(k, v)
		}
		before := s.Status()
		resp, err := client.Do(req)
		got := 0
		if err == nil {
			resp.Body.Close()
			got = resp.StatusCode
		}
		if after := s.Status(); after.Hash != before.Hash || after.Term != before.Term || after.AppliedIndex != before.AppliedIndex {
			return fmt.Errorf("the state is %+v, it was %+v", after, before)
		}
		if got != want {
			return fmt.Errorf("status %d, %v, want %d", got, err, want)
		}
		return nil
	}
	add := func(name string, try func(route string) error) {
		for _, route := range []string{"append", "vote", "prevote", "snapshot", "timeoutnow", "propose", "join", "term"} {
			list = append(list, hostileCase{name: "tls: " + route + name, try: func() error { return try(route) }})
		}
	}
	add(" in plain HTTP", func(route string) error { return ask("http", route, st.Addr, 400) })
	add(" with a certificate of another name", func(route string) error {
		return ask("https", route, st.Addr, 403, issue("evil.example"))
	})
	add(" with a certificate for a name like ours", func(route string) error {
		return ask("https", route, st.Addr, 403, issue("127.0.0.1.evil.example"))
	})
	add(" with a certificate, and no address", func(route string) error { return ask("https", route, "", 403, issue("127.0.0.1")) })
	add(" with a certificate of another authority", func(route string) error { return ask("https", route, st.Addr, 0, forge("127.0.0.1")) })
	list = append(list, hostileCase{name: "tls: propose with a certificate of a host that is no member's", try: func() error {
		return ask("https", "propose", "evil.example:1", 403, issue("evil.example"))
	}})
	return list
}

func TestCampaignHostile(t *testing.T) {
	t.Parallel()
	h := besiege(t)
	began := time.Now()
	took := func(what string) {
		t.Logf("%s: %v, %d cases so far", what, time.Since(began).Round(time.Millisecond), counted.hostileCases.Load())
	}
	for _, part := range []struct {
		name string
		make func() []hostileCase
	}{
		{"door", h.doorCases}, {"append", h.appendCases}, {"votes", h.ballotCases}, {"members", h.memberCases}, {"snapshots", h.snapshotCases},
		{"calls on a follower", func() []hostileCase { return h.callCases("a follower", h.follower.s) }},
		{"calls on the leader", func() []hostileCase {
			all := h.callCases("the leader", h.leader.s) // go through the same checks as on a follower
			return all[:dose(0, len(all))]
		}},
		{"answers", func() []hostileCase { return answerCases(t) }},
		{"tls", func() []hostileCase { return handshakes(t) }},
	} {
		h.run(part.make())
		took(part.name)
	}
	wire, waiting := h.wireCases()
	h.run(wire)
	took("http")
	h.runAtOnce(append(waiting, joinerCases(t)...))
	took("slow ones")
	// Everybody lives and takes writes.
	for _, m := range h.c {
		must(t, m.s.Err())
		must(t, m.s.Set(ctxFor(t, patience), "key/001", []byte("after the siege")))
	}
	h.c.awaitEqual(t)
	if n := h.panics.Load(); n != 0 {
		t.Errorf("%d panics", n)
	}
}

func mustURL(path string) *url.URL { return &url.URL{Path: path} }

func closeRows(rows *sql.Rows) {
	if rows != nil {
		rows.Close()
	}
}

// drain reads all rows of a query.
func drain(s *Service, ctx context.Context, text string) (n int, err error) {
	rows, err := s.Query(ctx, text)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	for rows.Next() {
		n++
	}
	return n, rows.Err()
}

// Any entries whatever: two state machines that get the same ones in other portions, one of them opened anew in between, end with the
// same rows, the same hash and the same answers, and neither stops.
func FuzzApply(f *testing.F) {
	for _, g := range goldenEntries {
		f.Add(joined(encodeOpen(entryFormat, [16]byte{1}), encodeEntry(g.entry)), uint8(1))
	}
	session := encodeOpen(entryFormat, [16]byte{7})
	batch := func(seq uint64, ops ...op) []byte {
		return encodeBatch(entryFormat, 1, seq, seq-1, [][]byte{appendTransaction(nil, ops)})
	}
	f.Add(joined(session, batch(1, setOp("k", "v")), batch(2, op{kind: opIfVersion, key: "k", version: 1}, setOp("k", "w")), batch(2, setOp("k", "w"))), uint8(2))
	f.Add(joined(encodeRaise(entryFormat, 3), session, batch(1, setOp("a", "1"), setOp("b", "2")), batch(2, op{kind: opDelete, key: "a"})), uint8(3))
	f.Add(joined(session, batch(1, op{kind: opAllow, key: "host:1"}), batch(2, op{kind: opDisallow, key: "host:1"}), encodeTermStart(1)), uint8(0))
	f.Add(joined(session, nil, []byte("garbage"), batch(1<<63, setOp("k", "v")), batch(1, setOp("k", "\xff\x00"))), uint8(4))
	f.Add(joined(encodeRaise(entryFormat, 1), encodeRaise(entryFormat, math.MaxUint64), encodeRaise(1, 0)), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, portion uint8) {
		var logs []*raft.Log
		r := reader{b: data}
		for len(r.b) > 0 && !r.bad && len(logs) < 32 {
			kind, entry := r.byte(), r.bytes(4096)
			l := command(uint64(len(logs)+1), entry)
			switch kind % 8 {
			case 7:
				l.Type, l.Data = raft.LogConfiguration, raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{
					{ID: raft.ServerID(hex.EncodeToString(entry)), Address: "host:1", Suffrage: raft.ServerSuffrage(kind >> 7)}}})
			case 6: // its sum made right, so that it gets behind it
				if e := (reader{b: entry}); len(entry) > 3 {
					l.Data = encodeBatch(entryFormat, uint64(e.byte()%4)+1, uint64(e.byte()%8), uint64(e.byte()%8), [][]byte{e.b})
				}
			}
			if _, err := decodeEntry(l.Data); l.Type == raft.LogCommand && errors.Is(err, ErrFormat) {
				continue // is refused before the log: whoever wrote it is newer than this build
			}
			logs = append(logs, l)
		}
		dir := t.TempDir()
		one, two := openFSM(t, filepath.Join(dir, "one"), 1<<20), openFSM(t, filepath.Join(dir, "two"), -1)
		defer func() { one.store.close(); two.store.close() }()
		var answers, others []any
		for _, l := range logs {
			answers = append(answers, one.ApplyBatch([]*raft.Log{l})...)
		}
		step := int(portion%8) + 1
		for i := 0; i < len(logs); i += step {
			others = append(others, two.ApplyBatch(logs[i:min(i+step, len(logs))])...)
			if i == step {
				must(t, two.store.close())
				two = openFSM(t, filepath.Join(dir, "two"), -1)
			}
		}
		if !reflect.DeepEqual(answers, others) {
			t.Errorf("answers %+v, and %+v", answers, others)
		}
		for i, a := range answers {
			if _, ok := a.(outcome); !ok {
				t.Errorf("entry %d has no answer", i+1)
			}
		}
		if a, b := one.store.meta().stateHash(), two.store.meta().stateHash(); a != b {
			t.Errorf("hash %s, and %s", a, b)
		}
		if a, b := dumpState(t, one), dumpState(t, two); !reflect.DeepEqual(a, b) {
			t.Errorf("%+v, and %+v", a, b)
		}
		// What is in the file is what the file says: a member that gets it takes it.
		if _, err := receiveCopy(t, one.store); err != nil {
			t.Error(err)
		}
	})
}

// joined is the input of FuzzApply: entries, each after a byte of its own.
func joined(entries ...[]byte) (b []byte) {
	for _, e := range entries {
		b = binary.AppendUvarint(append(b, 0), uint64(len(e)))
		b = append(b, e...)
	}
	return b
}

// Any stream whatever: it is installed whole or refused, and then nothing has changed. fix makes the checksum right, so that the
// bytes get as far as SQLite; patches change a stream that is good.
func FuzzInstall(f *testing.F) {
	from, to := newFSMWith(f, 1<<20), newFSMWith(f, 1<<20)
	number := openTestSession(f, from, 1, "fuzz")
	for i := range 60 {
		applyOne(f, from, command(uint64(i+2), batchBytes(number, uint64(i+1), uint64(i), transaction{setOp(fmt.Sprintf("key/%02d", i), fmt.Sprintf("%060d", i))})))
	}
	must(f, from.store.flush())
	c, err := from.store.copy(f.Context())
	must(f, err)
	good, err := io.ReadAll(c)
	must(f, err)
	meta := c.meta
	c.Close()
	before := dumpState(f, to)
	path := filepath.Join(f.TempDir(), "snap.incoming")
	f.Add([]byte(nil), true, true)
	f.Add([]byte("\x00\x10\x02\xff\xff"), true, true)
	f.Add([]byte("\x1c\x04\xff\xff\xff\xff"), true, true)
	f.Add([]byte("\x44\x04QRAU"), true, true)
	f.Add([]byte("\x64\x01\x05\x80\x40\x02zz"), true, true)
	f.Add([]byte("\x00\x01\x00"), true, false)
	f.Add(good[:4096+sha256.Size], false, true)
	f.Add(good[:100], false, true)
	f.Add([]byte("SQLite format 3\x00"), false, true)
	f.Add(good, false, false)
	f.Fuzz(func(t *testing.T, data []byte, patch, fix bool) {
		stream := bytes.Clone(data)
		if patch {
			stream = patched(good, data, true)
		}
		if n := len(stream) - sha256.Size; fix && n >= 0 {
			sum := sha256.Sum256(stream[:n])
			copy(stream[n:], sum[:])
		}
		sink, err := (&snapshotStore{fsm: to, path: path}).Create(1, meta.applied, meta.term, raft.Configuration{}, meta.configIndex, nil)
		must(t, err)
		if _, err = io.Copy(sink, bytes.NewReader(stream)); err != nil {
			sink.Cancel()
		} else {
			err = sink.Close()
		}
		if err == nil {
			// The same bytes, or others where nothing lies: then the state is that one and no other.
			got := to.incoming.meta
			if got.kvSum != meta.kvSum || got.applied != meta.applied || got.revision != meta.revision || got.ownSum != meta.ownSum {
				t.Errorf("taken: %+v, want %+v", got, meta)
			}
			to.incoming = nil
			os.Remove(path)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("snap.incoming is left: %v", err)
		}
		if after := dumpState(t, to); !reflect.DeepEqual(before, after) {
			t.Errorf("state %+v, before %+v", after, before)
		}
	})
}

// A log of any bytes whatever: it opens with entries that pass their checks, or it does not, with an error that names what is broken,
// and a panic never.
func FuzzOpenLog(f *testing.F) {
	dir := f.TempDir()
	o := logOptions{dir: filepath.Join(dir, "wal"), segmentSize: tinySegment, log: slog.New(slog.DiscardHandler)}
	l, err := openLog(o)
	must(f, err)
	var want []*raft.Log
	for i := range uint64(40) {
		e := testEntry(i+1, 1)
		want = append(want, e)
		must(f, l.StoreLog(e))
	}
	must(f, l.close())
	files := map[string][]byte{}
	var names []string
	list, err := os.ReadDir(o.dir)
	must(f, err)
	for _, e := range list {
		files[e.Name()], err = os.ReadFile(filepath.Join(o.dir, e.Name()))
		must(f, err)
		names = append(names, e.Name())
	}
	for i := range names {
		f.Add(uint8(i), []byte(nil), true)
		f.Add(uint8(i), []byte("\x00\x04\xff\xff\xff\xff"), true)
		f.Add(uint8(i), []byte("\x20\x08\x00\x00\x00\x00\x00\x00\x00\x01"), true)
		f.Add(uint8(i), []byte("\x80\x02\x01\x7f"), true)
		f.Add(uint8(i), []byte(nil), false)
		f.Add(uint8(i), files[names[i]][:64], false)
		f.Add(uint8(i), bytes.Repeat([]byte{0xff}, 300), false)
	}
	f.Fuzz(func(t *testing.T, which uint8, data []byte, patch bool) {
		o := o
		o.dir = filepath.Join(t.TempDir(), "wal")
		must(t, os.Mkdir(o.dir, 0o700))
		for i, name := range names {
			content := files[name]
			if i == int(which)%len(names) {
				content = patched(content, data, patch)
			}
			must(t, os.WriteFile(filepath.Join(o.dir, name), content, 0o600))
		}
		l, err := openLog(o)
		if err != nil {
			return
		}
		defer l.close()
		first, last := l.bounds()
		if last > 40 || first > last+1 {
			t.Fatalf("entries %d to %d of 40", first, last)
		}
		for i := first; i <= last && i > 0; i++ {
			var e raft.Log
			if err := l.read(i, &e); err == nil && !bytes.Equal(e.Data, want[i-1].Data) {
				t.Errorf("entry %d is %q", i, e.Data)
			}
			if l.failed() != nil {
				return
			}
		}
	})
}

func patched(content, data []byte, patch bool) []byte {
	if !patch {
		return data
	}
	content = bytes.Clone(content)
	r := reader{b: data}
	for len(r.b) > 0 && !r.bad && len(content) > 0 {
		at := int(r.uint() % uint64(len(content)))
		copy(content[at:], r.bytes(64))
	}
	return content
}
