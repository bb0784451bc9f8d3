package quorate

// How members talk: the handler under /raft/ with the checks at its door, and the calls of ours to other members. It never
// touches SQL or raft's log and does not know what a key means: what a route does beyond the checks comes from the Service
// as the functions of a peerHost. Requests come from net/http into ServeHTTP and go on to those functions, or to raft by
// way of transport.go. The bytes are frame.go's.

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

const (
	bodyTimeout  = 10 * time.Second // for a small body to come in, and for an answer to go out
	stallTimeout = 30 * time.Second // for a snapshot or a state to make any progress
)

// peerHost is what the Service gives to the peer. All functions may be called at any time, from any goroutine.
type peerHost struct {
	self       func() (id, cluster, addr string) // cluster is "" until admitted
	ready      func() bool                       // raft exists; until then every route answers 503
	server     func(id string) (addr string, known, voter bool)
	announced  func(id string) string // the address announced since, which overrides the configured one
	unannounce func(id, addr string)  // nobody of this id answers at the announced address
	allowed    func(addr string) bool // members and who may become one live at these addresses
	removed    func(id string) bool
	silent     func() error // why this member must be silent: its disk is stalled or has failed
	leading    func(term uint64) bool
	leader     func() (id, addr string)
	term       func() uint64
	states     func() (term uint64, err error) // what others may rely on: see stateTerm
	hasLeader  func() bool
	lastEntry  func() (index, term uint64)
	applied    func() uint64
	raftEnd    func() uint64 // raft's own last index, which may be behind what an install has applied
	termAt     func(index uint64) (uint64, bool)
	checkEntry func(*raft.Log) error
	formats    func() (state, reads uint64) // of this member: what its state is at, and the newest that it reads
	stranger   func(fromAddr string)        // a call from there names another cluster
	contact    func(id string)
	called     func(id, base string, began time.Time, err error) // what became of a call to that member

	propose   func(ctx context.Context, data []byte) ([]byte, error)
	roundWith func(from string, states uint64) (at readPoint, ok bool) // never waits
	readIndex func(ctx context.Context) (readPoint, error)
	join      func(ctx context.Context, r joinRequest) (joinAnswer, error)
	remove    func(ctx context.Context, addr string) error
	transfer  func(ctx context.Context, addr string) error
	status    func() statusAnswer
	confirm   func(ctx context.Context)                    // has a quorum confirm the leader, for a status that somebody of another cluster asks for
	state     func(ctx context.Context) (stateCopy, error) // of the leader, confirmed by a quorum
	snapshots func(delta int)
	incoming  func() string          // the file in which a snapshot that comes in pieces grows; nil: none is taken in pieces
	roomFor   func(size int64) error // why a snapshot of so many bytes can't be kept; nil = nobody knows
	noRoom    func(error)            // told what keeping one has met; nil = nobody

	logWaits   func() error                        // why the log takes no entries for now
	tryLog     func(ctx context.Context) error     // the same, after a try
	tryDisk    func() (stuck bool)                 // see hang.go
	standsLast func() bool                         // this member does not stand for election yet
	answers    func(id raft.ServerID, term uint64) // a peer has answered an append of raft's
	refuses    func(id raft.ServerID, term uint64) // a peer's log takes no entries for now

	others    func() []raft.Server // of the configuration that raft uses now
	committed func() uint64        // raft's commit index
}

type peer struct {
	host   peerHost
	client *http.Client
	idle   *http.Transport // if the client is ours alone: close ends its kept connections
	links  *links          // the same, for what may be sent twice; else nil
	traced bool            // the client tells httptrace when it has a connection
	useTLS bool
	log    *slog.Logger
	routes map[string]*route
	lookup func(ctx context.Context, host string) ([]string, error) // the addresses of a name
	slow   time.Duration                                            // bodyTimeout; a test waits for less

	ctx    context.Context // ends with close, and with it every call, every held append and every waiting handler
	cancel context.CancelFunc

	shown    shownTable
	sizes    sizes    // of the requests that get to the others
	arrivals arrivals // the snapshot that comes in pieces
	fetches  fetches  // the copies that others take in pieces

	callers sync.Map // member id → *atomic.Int64: when it last forwarded a write or a read, by monotonic

	mu      sync.Mutex // held by the replacement of current, so that there is one newest
	current atomic.Pointer[transport]
}

// newPeer copies the client: a Timeout of the caller's would end snapshots, and a redirect could lead to a non-member.
func newPeer(host peerHost, client *http.Client, useTLS bool, log *slog.Logger) *peer {
	if client == nil {
		client = http.DefaultClient
	}
	own := *client
	own.Timeout = 0
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	// The default transport keeps two idle connections per peer, fewer than we use at once. Where the choice was left to us we
	// take a copy that keeps more.
	var idle *http.Transport
	if base, ok := http.DefaultTransport.(*http.Transport); ok && own.Transport == nil {
		idle = base.Clone()
		idle.MaxIdleConnsPerHost = linksKept
		idle.WriteBufferSize = linkBuffer // what does not fit goes through a buffer that net/http makes for every request
		idle.DisableCompression = true    // no member compresses
		own.Transport = idle
	}
	_, standard := own.Transport.(*http.Transport)
	p := &peer{
		host:   host,
		idle:   idle,
		client: &own,
		traced: standard,
		useTLS: useTLS,
		log:    log,
		lookup: net.DefaultResolver.LookupHost,
		slow:   bodyTimeout,
	}
	if idle != nil && own.Jar == nil {
		p.links = newLinks(idle)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.routes = p.makeRoutes()
	return p
}

// sendAhead is that of the transport of the raft that runs.
func (p *peer) sendAhead(entries []*raft.Log, prevTerm uint64) bool {
	t := p.current.Load()
	return t != nil && t.sendAhead(entries, prevTerm)
}

// acknowledged is that of the transport of the raft that runs.
func (p *peer) acknowledged(id raft.ServerID, term uint64) (index uint64, ok bool) {
	t := p.current.Load()
	if t == nil {
		return 0, false
	}
	return t.ahead.acknowledged(id, term)
}

// pace is that of the transport of the raft that runs.
func (p *peer) pace(id raft.ServerID, term uint64) (took time.Duration, ok bool) {
	t := p.current.Load()
	if t == nil {
		return 0, false
	}
	return t.ahead.pace(id, term)
}

// close is idempotent and waits for nobody.
func (p *peer) close() {
	p.cancel()
	if p.idle != nil {
		p.idle.CloseIdleConnections()
		p.links.close()
	}
}

// A route is one path below /raft/. The gates bound how many requests of it are worked on at a time, and with that the
// memory and the goroutines that strangers can make this member spend.
type route struct {
	method string
	member bool // the sender must be in our configuration
	bare   bool // the headers may be missing
	gate   chan struct{}
	large  chan struct{} // instead of gate, for bodies above maxSmallBody
	serve  func(ctx context.Context, x *exchange) error
}

func (p *peer) makeRoutes() map[string]*route {
	gate := func(n int) chan struct{} { return make(chan struct{}, n) }
	post := func(n int, serve func(context.Context, *exchange) error) *route {
		return &route{method: http.MethodPost, gate: gate(n), serve: serve}
	}
	routes := map[string]*route{
		"append":     post(64, p.serveAppend),
		"vote":       post(16, p.serveVote),
		"prevote":    post(16, p.servePreVote),
		"timeoutnow": post(4, p.serveTimeoutNow),
		"snapshot":   post(1, p.serveSnapshot),
		"piece":      post(2, p.servePiece),
		"propose":    post(256, p.servePropose),
		"readindex":  post(1024, p.serveReadIndex),
		"term":       post(1024, p.serveTerm),
		"join":       post(16, p.serveJoin),
		"remove":     post(16, p.serveRemove),
		"transfer":   post(16, p.serveTransfer),
		"status":     {method: http.MethodGet, gate: gate(64), serve: p.serveStatus, bare: true},
		"state":      {method: http.MethodGet, gate: gate(2), serve: p.serveState, member: true},
	}
	routes["append"].large = gate(8) // apart from the small ones, so that a follower's catching up delays no heartbeat
	routes["propose"].large = gate(32)
	for _, name := range []string{"propose", "readindex", "remove", "transfer"} {
		routes[name].member = true
	}
	return routes
}

func (r *route) enter(x *exchange) (leave func(), err error) {
	gate := r.gate
	if r.large != nil && (x.req.ContentLength < 0 || x.req.ContentLength > maxSmallBody) {
		gate = r.large
	}
	select {
	case gate <- struct{}{}:
		return func() { <-gate }, nil
	default:
		return nil, refuse(http.StatusServiceUnavailable, codeBusy, "too many requests of this kind at a time")
	}
}

// ServeHTTP answers everything under /raft/.
func (p *peer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	x := p.newExchange(w, req)
	if err := p.serve(x); err != nil {
		x.refuse(err)
	}
}

func (p *peer) serve(x *exchange) error {
	name, ok := strings.CutPrefix(x.req.URL.Path, "/raft/")
	r := p.routes[name]
	if !ok {
		return refuse(http.StatusNotFound, codeBadRequest, "the path arrives here as %q: register the Service for the pattern \"/raft/\", and not "+
			"behind http.StripPrefix", shortText(x.req.URL.Path))
	}
	if r == nil {
		return refuse(http.StatusNotFound, codeBadRequest, "no such route")
	}
	if x.req.Method != r.method {
		x.w.Header().Set("Allow", r.method)
		return refuse(http.StatusMethodNotAllowed, codeBadRequest, "%s wants %s", x.req.URL.Path, r.method)
	}
	if p.ctx.Err() != nil || !p.host.ready() {
		return refuse(http.StatusServiceUnavailable, codeNotReady, "starting or closing")
	}
	if err := p.check(x, name, r); err != nil {
		return err
	}
	leave, err := r.enter(x)
	if err != nil {
		return err
	}
	defer leave()
	if name != "join" && name != "status" {
		known := r.member // or it would not have come so far
		if !known {
			_, known, _ = p.host.server(x.from)
		}
		if known {
			p.host.contact(x.from)
			p.shown.note(x.from, x.req.TLS)
		}
	}
	return r.serve(x.req.Context(), x)
}

// bind ends ctx with the peer. Who waits for raft alone needs no such context: the transport ends with the peer.
func (p *peer) bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// check is the door. That the sender is in our configuration is asked only where the route says so, and never of raft's own
// messages: our configuration may be older than the sender, and a joiner's is empty (Raft, section 6).
func (p *peer) check(x *exchange, name string, r *route) error {
	if r.bare && x.from == "" {
		return p.checkPlain(x)
	}
	for _, v := range []string{x.cluster, x.from, x.fromAddr, x.to} {
		if len(v) > maxHeaderBytes { // it would come back in a refusal, and may be kept
			return refuse(http.StatusBadRequest, codeBadRequest, "a header of %d bytes, limit %d", len(v), maxHeaderBytes)
		}
	}
	if v := header(x.req.Header, headerProtocol); v != strconv.Itoa(protocolVersion) && v != strconv.Itoa(laterProtocol) {
		return refuse(http.StatusPreconditionFailed, codeProtocol, "protocol %q, and this member speaks %d", v, protocolVersion)
	}
	asksWay := name == "join" && x.to == ""
	if err := p.checkTLS(x, asksWay); err != nil {
		return err
	}
	if r.bare {
		if p.host.removed(x.from) && p.host.leading(p.host.term()) {
			return refuse(http.StatusGone, codeRemoved, "member %s was removed", shortID(x.from))
		}
		return nil
	}
	if x.from == "" {
		return refuse(http.StatusBadRequest, codeBadRequest, "no %s header", headerFrom)
	}
	if err := p.checkCluster(x, name); err != nil {
		return err
	}
	if asksWay {
		return p.notLeader()
	}
	if x.to != x.id {
		return refuse(http.StatusPreconditionFailed, codeWrongTarget, "meant for member %s, and this is %s", shortID(x.to), shortID(x.id))
	}
	if p.host.removed(x.from) {
		return refuse(http.StatusGone, codeRemoved, "member %s was removed", shortID(x.from))
	}
	if name != "join" { // which says it better
		if err := p.checkFormat(x); err != nil {
			return err
		}
	}
	if r.member {
		return p.checkHome(x)
	}
	return nil
}

// checkFormat refuses a member that went back to a release that can't read what is in the log by now. It has said once that it
// can, so entries of the newer format are written; it would neither apply them nor say so, and its vote must not make it a leader.
func (p *peer) checkFormat(x *exchange) error {
	reads, err := strconv.ParseUint(header(x.req.Header, headerReads), 10, 8)
	if err != nil {
		reads = firstFormat
	}
	if state, _ := p.host.formats(); reads < state {
		return refuse(http.StatusPreconditionFailed, codeProtocol, "the state is at format %d and member %s reads up to %d: upgrade it",
			state, shortID(x.from), reads)
	}
	return nil
}

// checkTLS: that a certificate was issued by the right authority is not enough, or any holder of one could speak as any
// member (CVE-2021-37219 in Consul): it must be good for the address that the sender claims.
func (p *peer) checkTLS(x *exchange, asksWay bool) error {
	if asksWay {
		return nil // through a proxy, without TLS or with the proxy's certificate: it learns only where the leader is
	}
	if err := p.checkPlain(x); err != nil {
		return err
	}
	if x.req.TLS == nil || len(x.req.TLS.VerifiedChains) == 0 || len(x.req.TLS.VerifiedChains[0]) == 0 {
		return nil
	}
	host, _, err := net.SplitHostPort(x.fromAddr)
	if err != nil {
		return refuse(http.StatusForbidden, codeTLS, "the sender's address %q has no host to check its certificate against", x.fromAddr)
	}
	if err := x.req.TLS.VerifiedChains[0][0].VerifyHostname(host); err != nil {
		return refuse(http.StatusForbidden, codeTLS, "the sender's certificate: %v", err)
	}
	return nil
}

// checkHome: a member is known to live at its address or one that is allowed, or a certificate for any host would do for any
// member's id. Raft's own messages are not asked: what this member has applied may be older than the sender's move.
func (p *peer) checkHome(x *exchange) error {
	addr, known, _ := p.host.server(x.from)
	switch {
	case !known:
		return refuse(http.StatusForbidden, codeNotAllowed, "member %s is not in the configuration", peerName(x.from, x.fromAddr))
	case x.req.TLS != nil && len(x.req.TLS.VerifiedChains) > 0 && x.fromAddr != addr && !p.host.allowed(x.fromAddr):
		return refuse(http.StatusForbidden, codeTLS, "member %s does not live at %s", shortID(x.from), x.fromAddr)
	}
	return nil
}

func (p *peer) checkPlain(x *exchange) error {
	if p.useTLS && x.req.TLS == nil {
		return refuse(http.StatusForbidden, codeTLS, "this member takes requests over TLS only")
	}
	return nil
}

func (p *peer) checkCluster(x *exchange, name string) error {
	_, cluster, _ := p.host.self()
	switch {
	case cluster == "": // the leader may know that we are a member before its answer to our join arrives
		if x.cluster != "" {
			p.host.stranger(x.fromAddr)
		}
		return refuse(http.StatusServiceUnavailable, codeNotReady, "not yet a member of a cluster")
	case x.cluster == cluster, x.cluster == "" && name == "join":
		return nil
	case x.cluster != "":
		p.host.stranger(x.fromAddr)
	}
	r := refuse(http.StatusPreconditionFailed, codeWrongCluster, "cluster %s, and this is %s", shortID(x.cluster), shortID(cluster))
	r.Cluster, r.Member = cluster, x.id
	return r
}

// notLeader names the leader. A member never forwards for another one: a loop of two would be endless.
func (p *peer) notLeader() error {
	id, cluster, _ := p.host.self()
	leader, addr := p.host.leader()
	if leader == "" {
		return refuse(http.StatusServiceUnavailable, codeNotReady, "no leader is known")
	}
	return &refusal{Status: http.StatusMisdirectedRequest, Code: codeNotLeader, Message: "the leader is " + addr,
		LeaderID: leader, LeaderAddr: addr, Cluster: cluster, Member: id}
}

// hasAsked notes that somebody waits at that member.
func (p *peer) hasAsked(id string) {
	at, ok := p.callers.Load(id)
	if !ok {
		at, _ = p.callers.LoadOrStore(id, &atomic.Int64{})
	}
	at.(*atomic.Int64).Store(monotonic())
}

func (p *peer) hasCallers(id raft.ServerID) bool { return p.askedWithin(id, askedLately) }

// askedWithin: the member has forwarded a write or a read to this one.
func (p *peer) askedWithin(id raft.ServerID, d time.Duration) bool {
	at, ok := p.callers.Load(string(id))
	return ok && monotonic()-at.(*atomic.Int64).Load() < int64(d)
}

func (p *peer) servePropose(ctx context.Context, x *exchange) error {
	p.hasAsked(x.from)
	data, err := x.body(maxProposeBody)
	if err != nil {
		return err
	}
	ctx, cancel := p.bind(ctx)
	defer cancel()
	outcome, err := p.host.propose(ctx, data)
	if err != nil {
		return err
	}
	x.answer(outcome)
	return nil
}

func (p *peer) serveReadIndex(ctx context.Context, x *exchange) error {
	p.hasAsked(x.from)
	data, err := x.body(maxSmallBody)
	if err != nil {
		return err
	}
	var own termAnswer
	if len(data) > 0 { // release 0.1.0 sends nothing
		if err := json.Unmarshal(data, &own); err != nil {
			return refuse(http.StatusBadRequest, codeBadRequest, "body: %v", err)
		}
	}
	at, ok := p.host.roundWith(x.from, own.Term)
	if !ok {
		ctx, cancel := p.bind(ctx)
		defer cancel()
		if at, err = p.host.readIndex(ctx); err != nil {
			return err
		}
	}
	return x.answerJSON(indexAnswer{Index: at.index, Term: at.term, Refusal: at.refusal})
}

// serveTerm stays off raft's main loop: a read must not wait behind a slow disk.
func (p *peer) serveTerm(_ context.Context, x *exchange) error {
	if _, err := x.body(maxSmallBody); err != nil {
		return err
	}
	term, err := p.host.states()
	if err != nil {
		return refuse(http.StatusServiceUnavailable, codeNotReady, "%v", err)
	}
	return x.answerJSON(termAnswer{term})
}

func (p *peer) serveJoin(ctx context.Context, x *exchange) error {
	var r joinRequest
	if err := x.bodyJSON(&r); err != nil {
		return err
	}
	// Else the check of the certificate would be of an address that nobody will use.
	if r.ID != x.from || r.Addr != x.fromAddr {
		return refuse(http.StatusBadRequest, codeBadRequest, "%s at %q asks for %s at %q", shortID(x.from), x.fromAddr, shortID(r.ID), r.Addr)
	}
	ctx, cancel := p.bind(ctx)
	defer cancel()
	answer, err := p.host.join(ctx, r)
	if err != nil {
		return err
	}
	return x.answerJSON(answer)
}

func (p *peer) serveRemove(ctx context.Context, x *exchange) error {
	var r removeRequest
	if err := x.bodyJSON(&r); err != nil {
		return err
	}
	ctx, cancel := p.bind(ctx)
	defer cancel()
	if err := p.host.remove(ctx, r.Addr); err != nil {
		return err
	}
	return x.answerJSON(struct{}{})
}

func (p *peer) serveTransfer(ctx context.Context, x *exchange) error {
	var r transferRequest
	if err := x.bodyJSON(&r); err != nil {
		return err
	}
	ctx, cancel := p.bind(ctx)
	defer cancel()
	if err := p.host.transfer(ctx, r.Addr); err != nil {
		return err
	}
	return x.answerJSON(struct{}{})
}

// serveStatus: who asks from outside may do so to learn whether this cluster lives: see stranger.go.
func (p *peer) serveStatus(ctx context.Context, x *exchange) error {
	if _, cluster, _ := p.host.self(); x.from != "" && x.cluster != cluster {
		p.host.confirm(ctx)
	}
	a := p.host.status()
	switch query := x.req.URL.RawQuery; {
	case query == queryTryLog && !a.LogWaits:
		a.LogWaits = p.host.tryLog(ctx) != nil
	case query == queryTryDisk:
		a.Stuck = p.host.tryDisk()
	}
	return x.answerJSON(a)
}

// An exchange is one request and its answer.
type exchange struct {
	w   http.ResponseWriter
	req *http.Request
	rc  *http.ResponseController
	id  string // ours

	slow time.Duration // for a small body to come in

	cluster, from, fromAddr, to string // as the request says
}

func (p *peer) newExchange(w http.ResponseWriter, req *http.Request) *exchange {
	id, cluster, _ := p.host.self()
	setHeaders(w.Header(), headerProtocol, strconv.Itoa(protocolVersion), headerCluster, cluster, headerFrom, id)
	w.Header()["Date"] = nil // is not sent: nobody reads it, and members do not go by the clock
	x := &exchange{
		w: w, req: req, rc: http.NewResponseController(w), id: id, slow: p.slow,
		cluster:  header(req.Header, headerCluster),
		from:     header(req.Header, headerFrom),
		fromAddr: header(req.Header, headerFromAddr),
		to:       header(req.Header, headerTo),
	}
	if req.ContentLength != 0 {
		// Covers a body that is refused unread too: net/http reads some of it before it takes the connection's next request.
		x.readWithin(x.slow)
	}
	return x
}

// setHeaders takes names and their values, one after the other. The names are canonical already, as all of ours are.
func setHeaders(h http.Header, list ...string) {
	values := make([]string, len(list)/2)
	for i := range values {
		values[i] = list[2*i+1]
		h[list[2*i]] = values[i : i+1 : i+1]
	}
}

// header is Get for a name that is canonical already.
func header(h http.Header, name string) string {
	if v := h[name]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// readWithin and forgetRead set deadlines where the caller's server can; where it cannot, its own timeouts must do.
func (x *exchange) readWithin(d time.Duration) { _ = x.rc.SetReadDeadline(time.Now().Add(d)) }
func (x *exchange) forgetRead()                { _ = x.rc.SetReadDeadline(time.Time{}) }

// body reads the whole body. What a Content-Length claims is not allocated until it comes.
func (x *exchange) body(limit int64) ([]byte, error) {
	if x.req.ContentLength > limit {
		return nil, refuse(http.StatusBadRequest, codeBadRequest, "body of %d bytes, limit %d", x.req.ContentLength, limit)
	}
	if x.req.ContentLength == 0 {
		return nil, nil
	}
	if more := timeFor(x.req.ContentLength); more > time.Second {
		x.readWithin(x.slow + more)
	}
	var b bytes.Buffer
	b.Grow(bytes.MinRead + int(min(max(x.req.ContentLength, 0), 512<<10)))
	src := http.MaxBytesReader(x.w, x.req.Body, limit)
	if x.req.ContentLength > maxSmallBody {
		src = &pacedBody{src, x, time.Now().Add(x.slow + timeFor(x.req.ContentLength))}
	}
	if _, err := b.ReadFrom(src); err != nil {
		x.w.Header().Set("Connection", "close")
		outer := (*http.MaxBytesError)(nil)
		switch {
		case !errors.As(err, &outer): // the line broke or stood still, and the same again may get here
			return nil, refuse(http.StatusBadRequest, codeNotReady, "the body did not come: %v", err)
		case outer.Limit < limit:
			return nil, refuse(http.StatusRequestEntityTooLarge, codeBadRequest, "a handler before the Service takes %d bytes of a request: raise the "+
				"limit of http.MaxBytesHandler or MaxBytesReader", outer.Limit)
		}
		return nil, refuse(http.StatusBadRequest, codeBadRequest, "body: %v", err)
	}
	// net/http is reading ahead by now, to see the client go away: an old deadline would look like that.
	x.forgetRead()
	return b.Bytes(), nil
}

// A pacedBody may take as long as its bytes do on a slow line, but not stand still for longer than a small body may.
type pacedBody struct {
	io.ReadCloser
	x     *exchange
	until time.Time
}

func (s *pacedBody) Read(b []byte) (int, error) {
	if time.Now().After(s.until) {
		return 0, fmt.Errorf("slower than %d bytes a second", slowestLine)
	}
	n, err := s.ReadCloser.Read(b)
	if n > 0 {
		s.until = s.until.Add(time.Duration(n) * time.Second / slowestLine)
		s.x.readWithin(min(s.x.slow, time.Until(s.until)))
	}
	return n, err
}

// timeFor is how long a member may take for n bytes beyond the fixed part: 1 MiB/s.
func timeFor(n int64) time.Duration { return time.Duration(max(n, 0)) * time.Second >> 20 }

func (x *exchange) bodyJSON(v any) error {
	data, err := x.body(maxSmallBody)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "body: %v", err)
	}
	return nil
}

func (x *exchange) answer(data []byte) { x.write(http.StatusOK, "application/octet-stream", data) }

func (x *exchange) answerJSON(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	x.write(http.StatusOK, "application/json", data)
	return nil
}

// refuse: an error that is no refusal came from behind the door, where the entry may have been appended.
func (x *exchange) refuse(err error) {
	var r *refusal
	if !errors.As(err, &r) {
		r = refuse(http.StatusInternalServerError, codeUncertain, "%v", err)
	}
	data, err := json.Marshal(r)
	if err != nil {
		data = nil // strings and nothing else: it cannot fail
	}
	status := r.Status
	if status < 400 || status > 599 {
		status = http.StatusInternalServerError
	}
	x.write(status, "application/json", data)
}

// write sets its own deadline, so that the caller's WriteTimeout, which began when the request came, does not cut off the
// answer to one that took its time. net/http flushes under it and clears it after the request.
func (x *exchange) write(status int, kind string, data []byte) {
	_ = x.rc.SetWriteDeadline(time.Now().Add(bodyTimeout))
	setHeaders(x.w.Header(), "Content-Type", kind, "Content-Length", strconv.Itoa(len(data)))
	x.w.WriteHeader(status)
	_, _ = x.w.Write(data) // the sender sees a short answer as no answer
}

// --- calls of ours to other members

// propose says sent=false only if the entry cannot be in the log for this call: nobody was connected to, or a member
// answered that it was not appended. A redirect, a proxy's error or a broken connection leave it open.
func (p *peer) propose(ctx context.Context, to, addr string, data []byte) (outcome []byte, sent bool, err error) {
	var connected atomic.Bool
	ctx, done := abortable(ctx, &connected)
	defer done()
	outcome, err = p.call(ctx, request{route: "propose", base: p.base(addr), to: to, body: data})
	var r *refusal
	switch {
	case err == nil:
		return outcome, true, nil
	case tooLarge(err): // by whom ever: no part of it is a batch
		p.sizes.refused(p.base(addr), int64(len(data)))
		return nil, false, fmt.Errorf("a batch of %d bytes does not get to the leader: %w", len(data), explain(err, p.base(addr)))
	case errors.As(err, &r):
		return nil, !r.definite(), err
	case p.traced && (!connected.Load() || neverConnected(err)): // another kind of client may have tried twice
		return nil, false, err
	}
	return nil, true, err
}

// abortable is for a request that must not arrive once its sender has stopped waiting: when ctx ends, what the system has not
// delivered of it is thrown away. Else it would go on sending for up to a minute after the connection is closed, and a write that was
// given up would arrive when the network is whole again, over newer ones. What another machine holds is out of reach.
func abortable(ctx context.Context, connected *atomic.Bool) (_ context.Context, done func()) {
	var conn atomic.Value // of lingerer
	inner, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if c, ok := conn.Load().(lingerer); ok {
			_ = c.l.SetLinger(0) // before net/http closes it
		}
		cancel(context.Cause(ctx))
	})
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		connected.Store(true)
		conn.Store(lingererOf(info.Conn))
	}}
	return httptrace.WithClientTrace(inner, trace), func() { stop(); cancel(nil) }
}

type lingerer struct {
	l interface{ SetLinger(sec int) error } // never nil
}

type noLinger struct{}

func (noLinger) SetLinger(int) error { return nil }

// lingererOf is not for HTTP/2, whose connection carries other calls too.
func lingererOf(conn net.Conn) lingerer {
	if c, ok := conn.(*tls.Conn); ok && c.ConnectionState().NegotiatedProtocol != "h2" {
		conn = c.NetConn()
	}
	if l, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		return lingerer{l}
	}
	return lingerer{noLinger{}}
}

// definite: the code says that nothing was appended. A code of a newer version says nothing to this one.
func (r *refusal) definite() bool {
	switch r.Code {
	case codeNotLeader, codeNotReady, codeNotAllowed, codeRemoved, codeWrongCluster, codeWrongTarget, codeProtocol,
		codeBadRequest, codeTLS, codeBusy, codeNotApplied, codeConflict:
		return true
	}
	return false
}

func neverConnected(err error) bool {
	var op *net.OpError
	var cert *tls.CertificateVerificationError
	return errors.As(err, &op) && op.Op == "dial" || errors.As(err, &cert) || errors.Is(err, http.ErrSchemeMismatch)
}

// readIndex states this member's own term too. It may be sent twice: a term that was stated stays true.
func (p *peer) readIndex(ctx context.Context, to, addr string, states uint64) (readPoint, error) {
	var a indexAnswer
	err := p.callJSON(ctx, request{route: "readindex", base: p.base(addr), to: to, again: true}, termAnswer{states}, &a)
	return readPoint{index: a.Index, term: a.Term, refusal: a.Refusal}, err
}

// askTerm is called with a context that ends with the Service.
func (p *peer) askTerm(ctx context.Context, to, addr string) (uint64, error) {
	var a termAnswer
	err := p.callJSON(ctx, request{route: "term", base: p.base(addr), to: to, again: true, bound: true}, nil, &a)
	return a.Term, err
}

// tryPost sends a request that means nothing, of the size that every way to a member must let pass.
func (p *peer) tryPost(ctx context.Context, to, addr string) error {
	_, err := p.call(ctx, request{route: "term", base: p.base(addr), to: to, body: bytes.Repeat([]byte{' '}, maxSmallBody)})
	return err
}

// join connects by way of an address of base's name; "" leaves the choice to the system.
func (p *peer) join(ctx context.Context, base, to, way string, r joinRequest) (joinAnswer, error) {
	var a joinAnswer
	err := p.callJSON(ctx, request{route: "join", base: base, to: to, fresh: true, way: way}, r, &a)
	return a, err
}

func (p *peer) remove(ctx context.Context, to, addr, target string) error {
	var a struct{}
	return p.callJSON(ctx, request{route: "remove", base: p.base(addr), to: to}, removeRequest{target}, &a)
}

func (p *peer) transfer(ctx context.Context, to, addr, target string) error {
	var a struct{}
	return p.callJSON(ctx, request{route: "transfer", base: p.base(addr), to: to}, transferRequest{target}, &a)
}

func (p *peer) status(ctx context.Context, base string) (statusAnswer, error) {
	return p.askedStatus(ctx, request{method: http.MethodGet, route: "status", base: base})
}

// statusTried is status of a member that has tried out whether its log takes an entry. Release 0.1.0 says what it knows.
func (p *peer) statusTried(ctx context.Context, base string) (statusAnswer, error) {
	return p.askedStatus(ctx, request{method: http.MethodGet, route: "status", base: base, query: queryTryLog})
}

// statusOfDisk is status of a member that also says whether its disk works. Release 0.1.0 does not.
func (p *peer) statusOfDisk(ctx context.Context, base string) (statusAnswer, error) {
	return p.askedStatus(ctx, request{method: http.MethodGet, route: "status", base: base, query: queryTryDisk})
}

// statusBy is status on a new connection, by way of an address of base's name.
func (p *peer) statusBy(ctx context.Context, base, way string) (statusAnswer, error) {
	return p.askedStatus(ctx, request{method: http.MethodGet, route: "status", base: base, fresh: true, way: way})
}

func (p *peer) askedStatus(ctx context.Context, r request) (statusAnswer, error) {
	var a statusAnswer
	r.limit = maxStatusBody
	data, err := p.call(ctx, r)
	if err == nil {
		err = json.Unmarshal(data, &a)
	}
	return a, err
}

// explain says what a failed call means for the person who runs the members. errors.Is and As still see what is in err.
func explain(err error, base string) error {
	var foreign *foreignAnswer
	var encoded *encodedAnswer
	var refused *refusal
	var dns *net.DNSError
	var name x509.HostnameError
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var op *net.OpError
	var timeout net.Error
	if outer := (*url.Error)(nil); errors.As(err, &outer) && outer.Err != nil {
		err = outer.Err // it only repeats the URL
	}
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refused):
		return fmt.Errorf("%s answers %w", base, err)
	case errors.As(err, &foreign):
		return explainForeign(foreign, base, err)
	case errors.As(err, &encoded):
		return fmt.Errorf("what stands before %s/raft/ compresses its answers: leave /raft/ out of that: %w", base, err)
	case errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%s speaks plain http, this member expects TLS: %w", base, err)
	case errors.As(err, &name):
		return fmt.Errorf("the certificate of %s is for another name: %w", base, err)
	case errors.As(err, &unknown), errors.As(err, &invalid):
		return fmt.Errorf("the certificate of %s is not trusted: %w", base, err)
	case errors.As(err, &op) && op.Op == "remote error": // a TLS alert
		return fmt.Errorf("%s does not take this member's TLS or certificate: %w", base, err)
	case strings.HasPrefix(base, "https:") && closedOnUs(err): // TLS 1.3 refuses a certificate when the client is done with its part
		return fmt.Errorf("%s closes the connection: it may not take this member's certificate: %w", base, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s refused the connection: %w", base, err)
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Errorf("unknown host in %s: %w", base, err)
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%s did not answer in time: %w", base, err)
	}
	return fmt.Errorf("%s: %w", base, err)
}

// closedOnUs: HTTP/2's own error has no type that could be asked for.
func closedOnUs(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) ||
		strings.Contains(err.Error(), "http2: client conn could not be established")
}

// A foreignAnswer is an answer that no member gave.
type foreignAnswer struct {
	status int
	body   string // its beginning
	allow  string // the methods that would be taken
	server string // what answers says it is
}

func foreign(resp *http.Response) *foreignAnswer {
	start, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // only to explain it
	return &foreignAnswer{resp.StatusCode, string(start), header(resp.Header, "Allow"), shortText(header(resp.Header, "Server"))}
}

func (f *foreignAnswer) Error() string {
	if f.server != "" {
		return fmt.Sprintf("an answer that is not ours, status %d, by %q", f.status, f.server)
	}
	return fmt.Sprintf("an answer that is not ours, status %d", f.status)
}

// tooLarge: something on the way, a proxy or a handler before the Service, takes no body of this size. The member has seen none of it.
func tooLarge(err error) bool {
	var f *foreignAnswer
	var r *refusal
	return errors.As(err, &f) && f.status == http.StatusRequestEntityTooLarge || errors.As(err, &r) && r.Status == http.StatusRequestEntityTooLarge
}

// An encodedAnswer is a member's answer that was changed on its way.
type encodedAnswer struct{ coding string }

func (e *encodedAnswer) Error() string { return fmt.Sprintf("an answer in the coding %q", e.coding) }

// explainForeign tells what stands in place of a member, or before it, by what it answers.
func explainForeign(f *foreignAnswer, base string, err error) error {
	why := fmt.Sprintf("what answers at %s/raft/ is no member", base)
	switch {
	case f.status == http.StatusBadRequest && strings.Contains(f.body, "HTTPS"): // what Go's and nginx's TLS ports say
		why = fmt.Sprintf("%s speaks TLS, this member plain http", base)
	case f.status == http.StatusNotFound:
		why = fmt.Sprintf("nothing answers at %s/raft/: register the Service there", base)
	case f.status == http.StatusMethodNotAllowed:
		why = fmt.Sprintf("%s/raft/ takes only some methods (%s): register the Service for the pattern \"/raft/\" without a method", base, f.allow)
	case f.status == http.StatusUnauthorized, f.status == http.StatusProxyAuthRequired:
		why = fmt.Sprintf("%s/raft/ asks for a login, and a member has none: leave /raft/ out of it", base)
	case f.status == http.StatusForbidden, f.status == http.StatusTooManyRequests:
		why = fmt.Sprintf("what stands before %s/raft/ lets this member not pass: leave /raft/ out of its rules", base)
	case f.status == http.StatusRequestEntityTooLarge:
		why = fmt.Sprintf("what stands before %s/raft/ limits the size of a request: raise that, client_max_body_size in nginx", base)
	case f.status == http.StatusBadGateway, f.status == http.StatusServiceUnavailable, f.status == http.StatusGatewayTimeout:
		why = fmt.Sprintf("a proxy answers at %s/raft/, and the member behind it does not", base)
	case f.status >= 300 && f.status < 400:
		why = fmt.Sprintf("%s/raft/ redirects, which is not followed", base)
	}
	return fmt.Errorf("%s: %w", why, err)
}
