//go:build unix

package quorate

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	walfs "github.com/hashicorp/raft-wal/fs"
)

// What members say to each other and release 0.1.0 does not know. A fact is a field of a message, a header, a route, a query, a code of a
// refusal, a kind of an entry or of an op, a format or a protocol.

// newOnTheWire is all of it, with what that release does with it, and what this version does where it is missing. everyFact asserts it beside
// that release's program, but for those that begin with a test's name.
var newOnTheWire = map[string]string{
	"header Quorate-Reads": "passed over; missing: the first format",
	"query try=log":        "passed over; a status without logwaits: its log takes entries",
	"query try=disk":       "passed over; a status without stuck: its disk works",
	"query piece=":         "passed over; an answer without a size: it is the whole",
	"header Quorate-Size":  "TestDoorState: that release asks for no piece",
	"route piece":          "404: it gets the state in one request",
	"route transfer":       "404: ErrNotApplied, with the word release",

	"field refusal.final":        "passed over, it tries on; missing: this version tries on",
	"field refusal.logwaits":     "passed over, it tries on; missing: its log takes entries",
	"field joinAnswer.founders":  "passed over; missing: it was bootstrapped, or all of them have voted",
	"field indexAnswer.refusal":  "passed over, it reads; missing: the leader takes writes",
	"field memberAddr.novote":    "passed over; missing: not known",
	"field transferRequest.addr": "see its route",
	"field pieceHeader.id":       "see its route",
	"field pieceHeader.at":       "see its route",
	"field pieceHeader.install":  "see its route",
	"body readindex":             "passed over; missing: the round is made without it",

	"field statusAnswer.lastterm":      "passed over; missing: an older log, which votes for this member's",
	"field statusAnswer.leadersilence": "passed over; missing: it hears the leader, so that nobody stands before raft's own timeout",
	"field statusAnswer.follows":       "passed over; missing: what it says of its calls does not count",
	"field statusAnswer.confirmed":     "passed over; missing: it proves nothing to a stranger",
	"field statusAnswer.founders":      "passed over; missing: it is no founder",
	"field statusAnswer.held":          "passed over; missing: its cluster acknowledges",
	"field statusAnswer.empty":         "passed over; missing: it is a member of something",
	"field statusAnswer.logwaits":      "passed over; missing: its log takes entries",
	"field statusAnswer.stuck":         "passed over; missing: its disk works",
	"field statusAnswer.unfit":         "passed over; missing: fit to lead if it is healthy",
	"field statusAnswer.relieved":      "passed over; missing: never",
	"field statusAnswer.rests":         "passed over; missing: not at all",
	"field statusAnswer.fsync":         "passed over; missing: fast",
	"field statusAnswer.reached":       "passed over; missing: nothing is known, unless it forwards to this leader",
	"field reachAnswer.id":             "see statusAnswer.reached",
	"field reachAnswer.tried":          "see statusAnswer.reached",
	"field reachAnswer.failing":        "see statusAnswer.reached",
	"field reachAnswer.error":          "see statusAnswer.reached",

	"format 2":               "TestBesideTheFirstRelease/going_back_too_late: refused; members of it keep the cluster at the first",
	"protocol 2":             "TestBesideTheFirstRelease/going_back_meanwhile: refused, so that it learns of no commit",
	"field pieceAnswer.have": "TestSnapshotInPieces: that release sends no pieces, and is answered none",
	"field pieceAnswer.done": "TestSnapshotInPieces: as before",
}

// factsInSource are the facts that Go source names.
func factsInSource(t *testing.T, source fs.FS) map[string]bool {
	t.Helper()
	facts := make(map[string]bool)
	files, err := fs.Glob(source, "*.go")
	must(t, err)
	set := token.NewFileSet()
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := fs.ReadFile(source, name)
		must(t, err)
		file, err := parser.ParseFile(set, name, text, parser.SkipObjectResolution)
		must(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			for _, fact := range factsOf(n) {
				facts[fact] = true
			}
			return true
		})
	}
	return facts
}

func factsOf(n ast.Node) (facts []string) {
	switch n := n.(type) {
	case *ast.TypeSpec:
		s, ok := n.Type.(*ast.StructType)
		if !ok {
			return nil
		}
		for _, f := range s.Fields.List {
			if f.Tag == nil {
				continue
			}
			if name := jsonName(reflect.StructTag(strings.Trim(f.Tag.Value, "`"))); name != "" {
				facts = append(facts, "field "+n.Name.Name+"."+name)
			}
		}
	case *ast.ValueSpec:
		for i, name := range n.Names {
			if i < len(n.Values) {
				facts = append(facts, factOfConst(name.Name, n.Type, n.Values[i])...)
			}
		}
	case *ast.CompositeLit:
		m, ok := n.Type.(*ast.MapType)
		if !ok {
			return nil
		}
		if p, ok := m.Value.(*ast.StarExpr); !ok || fmt.Sprint(p.X) != "route" {
			return nil
		}
		for _, e := range n.Elts {
			if route, err := strconv.Unquote(e.(*ast.KeyValueExpr).Key.(*ast.BasicLit).Value); err == nil {
				facts = append(facts, "route "+route)
			}
		}
	}
	return facts
}

func jsonName(tag reflect.StructTag) string {
	name, _, _ := strings.Cut(tag.Get("json"), ",")
	return strings.Trim(name, "-")
}

func factOfConst(name string, kind ast.Expr, value ast.Expr) []string {
	if kind, ok := kind.(*ast.Ident); ok && (kind.Name == "entryKind" || kind.Name == "opKind") {
		return []string{kind.Name + " " + name}
	}
	lit, ok := value.(*ast.BasicLit)
	if !ok {
		return nil
	}
	text, err := strconv.Unquote(lit.Value)
	isText := err == nil
	switch {
	case name == "entryFormat":
		return []string{"format " + lit.Value}
	case name == "protocolVersion" || name == "laterProtocol":
		return []string{"protocol " + lit.Value}
	}
	for _, prefix := range []string{"header", "query", "code"} {
		if isText && strings.HasPrefix(name, prefix) {
			return []string{prefix + " " + text}
		}
	}
	return nil
}

// releaseSource is the source of an earlier release.
func releaseSource(t *testing.T, version string) fs.FS {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Open(filepath.Join("testdata", "release", version+".tar.gz"))
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return os.DirFS(dir)
		}
		must(t, err)
		if path.Dir(h.Name) == "quorate" && path.Ext(h.Name) == ".go" {
			text, err := io.ReadAll(r)
			must(t, errors.Join(err, os.WriteFile(filepath.Join(dir, path.Base(h.Name)), text, 0o600)))
		}
	}
}

// Whatever this version says that the first release did not know stands in the table above, so that somebody has thought of both sides.
func TestNewOnTheWire(t *testing.T) {
	t.Parallel()
	old, now := factsInSource(t, releaseSource(t, "v0.1.0")), factsInSource(t, os.DirFS("."))
	for _, known := range []string{"field statusAnswer.id", "header Quorate-To", "route append", "code busy", "entryKind entryRaise", "opKind opSet", "format 1", "protocol 1"} {
		if !old[known] {
			t.Errorf("the first release is found not to know %q", known)
		}
	}
	for fact := range now {
		if old[fact] == (newOnTheWire[fact] != "") {
			t.Errorf("%q: the first release knows it: %v, and the table says %q", fact, old[fact], newOnTheWire[fact])
		}
	}
	for fact := range newOnTheWire {
		if !now[fact] && fact != "body readindex" {
			t.Errorf("%q is in the table, and not in the source", fact)
		}
	}
	for fact := range old {
		if !now[fact] && fact != "format 1" {
			t.Errorf("%q, which the first release may send, is not known any more", fact)
		}
	}
}

// A talk is what members of this version and one of an earlier release have said to each other.
type talk struct {
	old string // that one's address

	mu          sync.Mutex     // guards the fields below
	said, heard map[string]int // facts, by this version and by the other, and how often
}

func newTalk(old string) *talk {
	return &talk{old: old, said: make(map[string]int), heard: make(map[string]int)}
}

func (k *talk) times(fact string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.said[fact]
}

// between has a member's side of the talk be noted. joined is called when it has admitted the other one, before the answer goes out.
func (k *talk) between(m *testMember, joined func()) {
	m.conf.Client = &http.Client{Transport: talker{k, m.conf.Client.Transport}}
	m.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if header(req.Header, headerFromAddr) != k.old {
				h.ServeHTTP(w, req)
				return
			}
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			req.Body = io.NopCloser(bytes.NewReader(body))
			k.asked(k.heard, req, body)
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, req)
			if joined != nil && path.Base(req.URL.Path) == "join" && answer.Code == http.StatusOK {
				joined()
			}
			k.headers(k.said, answer.Header())
			data := k.answered(k.said, req, answer.Code, answer.Body.Bytes())
			maps.Copy(w.Header(), answer.Header())
			w.Header()["Content-Length"] = []string{strconv.Itoa(len(data))}
			w.WriteHeader(answer.Code)
			w.Write(data)
		})
	}
}

type talker struct {
	k  *talk
	to http.RoundTripper
}

func (r talker) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != r.k.old {
		return r.to.RoundTrip(req)
	}
	var body []byte
	if req.Body != nil {
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
		req = req.Clone(req.Context())
		req.Body = io.NopCloser(bytes.NewReader(body))
	}
	r.k.asked(r.k.said, req, body)
	resp, err := r.to.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	r.k.headers(r.k.heard, resp.Header)
	r.k.answered(r.k.heard, req, resp.StatusCode, data)
	resp.Body = io.NopCloser(bytes.NewReader(data))
	return resp, nil
}

// wireBodies are the JSON bodies of the routes: of the request, and of the answer.
var wireBodies = map[string][2]any{
	"readindex": {termAnswer{}, indexAnswer{}},
	"join":      {joinRequest{}, joinAnswer{}},
	"status":    {nil, statusAnswer{}},
	"term":      {nil, termAnswer{}},
	"transfer":  {transferRequest{}, nil},
	"piece":     {nil, pieceAnswer{}},
}

func (k *talk) asked(by map[string]int, req *http.Request, body []byte) {
	route := path.Base(req.URL.Path)
	k.note(by, "route "+route)
	if name, _, ok := strings.Cut(req.URL.RawQuery, "="); ok {
		k.note(by, "query "+name+"=")
		k.note(by, "query "+req.URL.RawQuery)
	}
	k.headers(by, req.Header)
	if len(body) == 0 {
		return
	}
	if route == "readindex" {
		k.note(by, "body readindex")
	}
	if route == "piece" {
		r := reader{b: body}
		k.fields(by, reflect.TypeFor[pieceHeader](), r.bytes(maxSmallBody))
	} else if v := wireBodies[route][0]; v != nil {
		k.fields(by, reflect.TypeOf(v), body)
	}
}

// answered returns what is to be answered: what this version says is filled up with all that the other one does not know, as if there were
// something to say of everything.
func (k *talk) answered(by map[string]int, req *http.Request, status int, data []byte) []byte {
	route := path.Base(req.URL.Path)
	v := wireBodies[route][1]
	if status != http.StatusOK {
		v = refusal{}
	}
	if v == nil {
		return data
	}
	if full := reflect.New(reflect.TypeOf(v)); route == "status" || route == "join" {
		if header(req.Header, headerReads) == "" && status == http.StatusOK && json.Unmarshal(data, full.Interface()) == nil {
			fillNew(full.Elem())
			data, _ = json.Marshal(full.Interface())
		}
	}
	k.fields(by, reflect.TypeOf(v), data)
	return data
}

// fillNew sets all fields that the first release does not know.
func fillNew(v reflect.Value) {
	for i := range v.NumField() {
		f := v.Field(i)
		isNew := newOnTheWire["field "+v.Type().Name()+"."+jsonName(v.Type().Field(i).Tag)] != ""
		switch f.Kind() {
		case reflect.Slice:
			if isNew && f.Len() == 0 {
				f.Set(reflect.MakeSlice(f.Type(), 1, 1))
			}
			for j := range f.Len() {
				if e := f.Index(j); e.Kind() == reflect.Struct {
					fillNew(e)
				} else if isNew && e.IsZero() {
					e.SetString("127.0.0.1:1")
				}
			}
		case reflect.String:
			if isNew {
				f.SetString("something")
			}
		case reflect.Bool:
			f.SetBool(f.Bool() || isNew)
		case reflect.Int64:
			if isNew {
				f.SetInt(max(f.Int(), 60_000))
			}
		}
	}
}

// fields notes those that are in a JSON body, and what is in them.
func (k *talk) fields(by map[string]int, of reflect.Type, data []byte) {
	for of.Kind() == reflect.Slice || of.Kind() == reflect.Pointer {
		if of.Kind() == reflect.Slice {
			var list []json.RawMessage
			json.Unmarshal(data, &list)
			for _, e := range list {
				k.fields(by, of.Elem(), e)
			}
			return
		}
		of = of.Elem()
	}
	if of.Kind() != reflect.Struct || of.PkgPath() != reflect.TypeFor[refusal]().PkgPath() {
		return
	}
	var has map[string]json.RawMessage
	json.Unmarshal(data, &has)
	for i := range of.NumField() {
		f := of.Field(i)
		if raw, ok := has[jsonName(f.Tag)]; ok {
			k.note(by, "field "+of.Name()+"."+jsonName(f.Tag))
			k.fields(by, f.Type, raw)
		}
	}
}

func (k *talk) headers(by map[string]int, h http.Header) {
	for name := range h {
		k.note(by, "header "+name)
	}
}

func (k *talk) note(by map[string]int, fact string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	by[fact]++
}

// everyFact: whatever this version says, a member of the first release works beside it as ever, and whatever that one leaves out, this
// version does too, whichever of them leads.
func everyFact(t *testing.T, program string) {
	t.Parallel()
	m, disk := newMember(t, ""), new(fakeDisk)
	disk.free.Store(1 << 39)
	vfs := newFaultFS()
	older(&m.conf)
	m.conf.space, m.conf.vfs, m.conf.segment = disk.space, vfs, 16<<10
	old := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), join: m.conf.Addr, program: program, client: newClient(t, new(line))}
	t.Cleanup(old.stop)
	k := newTalk(old.addr)
	var held atomic.Pointer[func()] // ends the change of the members
	unlock := func() {
		if end := held.Swap(nil); end != nil {
			(*end)()
		}
	}
	k.between(m, func() { // nobody is promoted for now
		m.mu.Lock()
		s := m.s
		m.mu.Unlock()
		if end, err := s.changeMembers(t.Context()); err == nil {
			held.Store(&end)
		}
	})
	m.start()
	defer unlock()
	must(t, m.s.Set(t.Context(), "k", []byte("v")))
	testCluster{m}.cutLogs(t, m.s.Status().AppliedIndex)
	must(t, m.s.AddAllowedMember(t.Context(), old.addr))
	old.start()
	old.awaitReady()
	id := old.must(order{Op: "status"}).Status.ID
	leaderIsFull(t, k, m, disk, old)
	unlock()
	testCluster{m}.awaitVoters(t, 2)

	oldLeads := func() {
		t.Helper()
		eventually(t, patience, "the first release to lead", func() error { return m.s.TransferLeader(ctxFor(t, patience), old.addr) })
	}
	oldLeads()
	n := newMember(t, old.addr)
	older(&n.conf)
	n.conf.vfs, n.conf.segment = vfs, 16<<10
	k.between(n, nil)
	old.must(order{Op: "allow", Key: n.conf.Addr})
	n.start()
	if founders := n.s.ident().founders; founders != "" || n.s.held() {
		t.Errorf("it has joined by the first release, and waits for founders %q: %v", founders, n.s.held())
	}
	must(t, n.s.Ready(ctxFor(t, patience)))
	testCluster{m, n}.awaitVoters(t, 3)
	oldLeads()
	is(t, m.s.TransferLeader(ctxFor(t, patience), m.conf.Addr), ErrNotApplied, "release")
	for _, s := range []*Service{m.s, n.s} {
		if at, err := s.peer.readIndex(ctxFor(t, patience), id, old.addr, s.raft.Load().CurrentTerm()); err != nil || at.refusal != "" {
			t.Errorf("a round of the first release: %+v, %v", at, err)
		}
		must(t, s.Ready(ctxFor(t, patience)))
		must(t, s.Set(ctxFor(t, patience), "k", []byte("v")))
	}
	followersAreFull(t, k, m, vfs, old, oldLeads)
	eventually(t, patience, "space in the logs", func() error { return errors.Join(m.s.Err(), n.s.Err()) })
	m.s.distrust(corrupt("a row")) // the first release gives its state in one answer
	eventually(t, patience, "a state from the first release", func() error {
		if k.times("query piece=") == 0 {
			return errors.New("it was not asked")
		}
		return m.s.Err()
	})
	must(t, m.s.Ready(ctxFor(t, patience)))
	for _, ask := range []func(context.Context, string) (statusAnswer, error){m.s.peer.statusTried, m.s.peer.statusOfDisk} {
		_, err := ask(ctxFor(t, patience), baseURL(old.addr, false))
		must(t, err)
	}
	hearsTheLeader(t, testCluster{m, n}, old, id)
	takesTheState(t, k, old)
	leaderIsGone(t, testCluster{m, n}, old)

	k.mu.Lock()
	defer k.mu.Unlock()
	for fact, what := range newOnTheWire {
		if k.heard[fact] > 0 {
			t.Errorf("the first release says %q", fact)
		}
		if k.said[fact] == 0 && !strings.HasPrefix(what, "Test") {
			t.Errorf("the first release was not told %q", fact)
		}
	}
	for _, fact := range []string{"field refusal.code", "field joinAnswer.leaderid", "field indexAnswer.index", "field memberAddr.voter", "route join", "route readindex"} {
		if k.heard[fact] == 0 {
			t.Errorf("the first release has not said %q", fact)
		}
	}
}

// leaderIsFull: a leader that takes no writes for now says that another try would be in vain, and how long in the answers to reads. The first
// release goes on trying, and reads.
func leaderIsFull(t *testing.T, k *talk, m *testMember, disk *fakeDisk, old *process) {
	t.Helper()
	disk.free.Store(1 << 20)
	eventually(t, patience, "the leader to refuse writes", func() error {
		if m.s.refusal.Load() == nil {
			return errors.New("it does not")
		}
		return nil
	})
	done := make(chan report, 1)
	go func() {
		r, err := old.do(order{Op: "set", Key: "k", Value: []byte("w"), Timeout: patience})
		if err != nil {
			r.Verdict = err.Error()
		}
		done <- r
	}()
	eventually(t, patience, "two tries of the first release", func() error {
		if n := k.times("field refusal.final"); n < 2 {
			return fmt.Errorf("%d refusals", n)
		}
		return nil
	})
	if v := old.must(order{Op: "get", Key: "k"}).Value; string(v) != "v" {
		t.Errorf("the first release reads %q while the leader takes no writes", v)
	}
	disk.free.Store(1 << 39)
	if r := <-done; r.Verdict != "ok" {
		t.Errorf("the write that was tried on: %s %s", r.Verdict, r.Error)
	}
	old.must(order{Op: "err"})
}

// followersAreFull: followers whose logs take nothing say so to a leader of the first release, which goes on trying.
func followersAreFull(t *testing.T, k *talk, m *testMember, vfs *faultFS, old *process, oldLeads func()) {
	t.Helper()
	for try := 0; ; try++ {
		before := k.times("field refusal.logwaits")
		vfs.fail(setWrite, syscall.ENOSPC)
		done := make(chan report, 1)
		go func() {
			r, err := old.do(order{Op: "set", Key: "full", Value: []byte{byte(try)}, Timeout: patience})
			if err != nil {
				r.Verdict = err.Error()
			}
			done <- r
		}()
		told := 0
		eventually(t, patience, "two tries of the first release, or another leader", func() error {
			if told = k.times("field refusal.logwaits") - before; told < 2 && m.s.Status().LeaderAddr == old.addr {
				return fmt.Errorf("%d refusals", told)
			}
			return nil
		})
		vfs.fail(setWrite, nil)
		if r := <-done; r.Verdict != "ok" {
			t.Errorf("the write that was tried on: %s %s", r.Verdict, r.Error)
		}
		if oldLeads(); told >= 2 {
			return
		}
		if try > 10 {
			t.Fatal("the first release does not keep the lead")
		}
	}
}

// hearsTheLeader: a follower of the first release does not say for how long it has not heard the leader, so that nobody stands at once on its
// account; and what it refuses does not say that another try is in vain.
func hearsTheLeader(t *testing.T, c testCluster, old *process, id string) {
	t.Helper()
	var other *testMember
	var own, a statusAnswer
	eventually(t, patience, "a follower of the first release that holds no more than the other one", func() (err error) {
		oneOfUsLeads(t, c, old)
		other = c.follower(t)
		own = other.s.statusAnswer()
		if a, err = other.s.peer.status(ctxFor(t, patience), baseURL(old.addr, false)); err != nil {
			return err
		}
		if a.Role != Follower.String() || own.Role != Follower.String() || a.LeaderID != own.LeaderID || a.Term != own.Term || a.LastIndex > own.LastIndex {
			return fmt.Errorf("%+v, %+v", own, a)
		}
		return nil
	})
	if isHeir(own, []statusAnswer{a}, 3) {
		t.Errorf("it would stand beside one that may hear the leader: %+v", a)
	}
	if a.LeaderSilence = time.Minute.Milliseconds(); !isHeir(own, []statusAnswer{a}, 3) {
		t.Errorf("it would not stand beside one that has not heard the leader for a minute: %+v", a)
	}
	data := encodeBatch(firstFormat, 1<<60, 1, 0, [][]byte{appendTransaction(nil, transaction{{kind: opSet, key: "k"}})}) // of no session
	var r *refusal
	eventually(t, patience, "a batch that is refused", func() error {
		oneOfUsLeads(t, c, old)
		_, _, err := other.s.peer.propose(ctxFor(t, patience), id, old.addr, data)
		if !errors.As(err, &r) || r.Code != codeNotLeader {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if r.Final || r.LogWaits {
		t.Errorf("a follower of the first release answers a batch with %+v", r)
	}
}

// takesTheState: one of the first release whose state another program has changed asks for the whole, and gets it in one answer.
func takesTheState(t *testing.T, k *talk, old *process) {
	t.Helper()
	sqlite3(t, filepath.Join(old.dir, "snap"), "UPDATE kv SET value = 'x' WHERE key = 'k'")
	eventually(t, patience, "a state for the first release", func() error {
		k.mu.Lock()
		n := k.heard["route state"]
		k.mu.Unlock()
		if n == 0 {
			return errors.New("it has not asked")
		}
		r, err := old.do(order{Op: "err"})
		if err == nil && r.Verdict != "ok" {
			err = errors.New(r.Error)
		}
		return err
	})
	old.awaitReady()
	if v := old.must(order{Op: "get", Key: "k"}).Value; string(v) != "v" {
		t.Errorf("the first release reads %q after it has fetched the state", v)
	}
}

// leaderIsGone: the other two go on.
func leaderIsGone(t *testing.T, c testCluster, old *process) {
	t.Helper()
	oneOfUsLeads(t, c, old)
	l, other := c.leader(t), c.follower(t)
	l.isolate()
	defer l.rejoin()
	must(t, other.s.Set(ctxFor(t, patience), "k", []byte("w")))
	if v := old.must(order{Op: "get", Key: "k"}).Value; string(v) != "w" {
		t.Errorf("the first release reads %q beside a leader that is gone", v)
	}
}

// playsOld has a script's member say what the first release says, and know what that one knows.
func (c *script) playsOld(m *scriptMember) {
	c.net.serve(m.conf.Addr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		route := path.Base(req.URL.Path)
		if newOnTheWire["route "+route] != "" {
			http.NotFound(w, req)
			return
		}
		if route != "status" {
			m.s.ServeHTTP(w, req)
			return
		}
		req.URL.RawQuery = ""
		answer := httptest.NewRecorder()
		m.s.ServeHTTP(answer, req)
		var has map[string]json.RawMessage
		if json.Unmarshal(answer.Body.Bytes(), &has) != nil || answer.Code != http.StatusOK {
			return
		}
		for name := range has {
			if newOnTheWire["field statusAnswer."+name] != "" {
				delete(has, name)
			}
		}
		data, _ := json.Marshal(has)
		maps.Copy(w.Header(), answer.Header())
		w.Header()["Content-Length"] = []string{strconv.Itoa(len(data))}
		w.WriteHeader(answer.Code)
		w.Write(data)
	}))
}

// A leader that nobody reaches hands over to the one of three that says so, also if the third is of the first release. Where only that
// one reaches it, the third leads, which all reach.
func TestMuteLeaderBesideAnOlderOne(t *testing.T) {
	t.Parallel()
	for what, forwards := range map[string]bool{"nobody reaches it": false, "the older one does": true} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			clusterOf(t, 3, func(c *script, log *logged, l *scriptMember, others []*scriptMember) {
				f, old := others[0], others[1]
				c.playsOld(old)
				term, next, deaf := l.s.Status().Term, f, []*scriptMember(nil)
				if forwards {
					next, deaf = old, []*scriptMember{f}
				}
				end := c.write(old, 500*time.Millisecond)
				time.Sleep(time.Second)
				c.deafen(l, deaf...)
				for range 3 {
					time.Sleep(10 * time.Second)
					if st := f.s.Status(); st.LeaderAddr != next.conf.Addr || st.Term != term+1 {
						c.t.Errorf("%s leads in term %d, want %s in term %d", st.LeaderAddr, st.Term, next.conf.Addr, term+1)
					}
					time.Sleep(time.Minute)
				}
				if _, bad := end(); bad != nil {
					c.t.Errorf("writes: %v", bad)
				}
				c.undeafen(l)
				c.obey("await equal")
			})
		})
	}
}

// unfitLeaders: beside a voter of the first release a leader hands over that nobody reaches, and one whose disk is slow.
func unfitLeaders(t *testing.T, program string) {
	t.Parallel()
	disks := make(map[string]slowFS) // by address
	c := newCluster(t, 2, older, func(conf *Config) {
		d := slowFS{walfs.New(), new(atomic.Int64)}
		disks[conf.Addr], conf.vfs = d, d
	})
	l, n := c.leader(t), c.follower(t)
	old := &process{t: t, dir: filepath.Join(t.TempDir(), "data"), addr: freeAddr(t), join: l.conf.Addr, program: program, client: newClient(t, new(line))}
	t.Cleanup(old.stop)
	must(t, l.s.AddAllowedMember(t.Context(), old.addr))
	old.start()
	old.awaitReady()
	c.awaitVoters(t, 3)
	leads := func(from, to *testMember) {
		t.Helper()
		eventually(t, patience, "a leader that is to be unfit", func() error { return from.s.TransferLeader(ctxFor(t, patience), to.conf.Addr) })
	}
	another := func(than, asked *testMember) {
		t.Helper()
		eventually(t, 4*patience, "another leader", func() error {
			if addr := asked.s.Status().LeaderAddr; addr == "" || addr == than.conf.Addr {
				return fmt.Errorf("it is %q", addr)
			}
			return nil
		})
		must(t, asked.s.Set(ctxFor(t, patience), "k", []byte(asked.conf.Addr)))
		if v := old.must(order{Op: "get", Key: "k"}).Value; string(v) != asked.conf.Addr {
			t.Errorf("the first release reads %q", v)
		}
		old.must(order{Op: "err"})
	}
	leads(n, l)
	l.cut()
	another(l, n)
	l.heal()
	must(t, l.s.Ready(ctxFor(t, patience)))
	leads(l, n)
	slow := disks[n.conf.Addr].fsync
	slow.Store(int64(1500 * time.Millisecond))
	defer slow.Store(0)
	for ctx := ctxFor(t, patience); n.s.Status().Role == Leader && ctx.Err() == nil; {
		l.s.Set(ctx, "k", nil)
	}
	another(n, l)
}
