package quorate

// The joiner's side of joining: which addresses a boot address stands for, how they are asked, and what each answer means. It
// owns the calls to Config.Join and nothing of the cluster: the leader decides in member.go. Control comes from recover.go's enter,
// before this member has a raft; recover.go and health.go ask a boot address for a status later.
//
// A boot address is often a name for all members: a headless Service of Kubernetes, a DNS name, a balancer. The joiner itself and
// others that join too may be among them, where nothing answers yet. So each try is a new connection, for a kept one would lead to
// the same place again and again, and the addresses of a name are asked in turn.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	joinAttempt    = 10 * time.Second       // for one answer
	wayTimeout     = 2 * time.Second        // to connect to one of several addresses of a name
	waysMost       = 64                     // of a name
	notAllowedWait = 10 * time.Second       // a permission may be under way when its member starts
	notAllowedPace = 500 * time.Millisecond // between two tries meanwhile
)

var errPassedOver = errors.New("that is this member itself, which is passed over")

// join asks to be admitted until it is, or is refused for good, or ctx ends. The boot address only names the leader: a proxy may
// stand there. The leader is asked directly, and that request alone is judged.
func (s *Service) join(ctx context.Context) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	j := joining{s: s, base: s.conf.Join, answers: make(map[string]error)}
	var refused error // by the try before
	for backoff := 10 * time.Millisecond; ; backoff = min(2*backoff, 2*time.Second) {
		a, err := j.pass(ctx)
		if err == nil {
			return s.admitted(a)
		}
		pause, final := j.judge(err, backoff)
		if final != nil && pause == 0 {
			return final
		}
		if ctx.Err() != nil { // which has cut this try short
			final = cmpErr(final, refused)
		}
		refused = final
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if final != nil {
				return final
			}
			return j.all(fmt.Errorf("join: %w", context.Cause(ctx)))
		}
	}
}

// A joining is one call of join.
type joining struct {
	s       *Service
	base    string           // where to ask first
	answers map[string]error // the last one of each place that was asked
	told    bool             // that the boot address is this member's own
	refused time.Time        // when the answer was first that this member is not allowed; zero = it was not
}

// pass asks every address of the boot address once, until one admits this member or its answer is final. Its own is passed over,
// unless there is no other one: then its answer stands in the error of Open, with a word that says so.
func (j *joining) pass(ctx context.Context) (a joinAnswer, err error) {
	s := j.s
	own := s.peer.ways(ctx, baseURL(s.conf.Addr, s.conf.TLS))
	isOwn := func(way string) bool {
		return way != "" && slices.Contains(own, way) || way == "" && hostOf(j.base) == s.conf.Addr
	}
	ways := s.peer.ways(ctx, j.base)
	alone := !slices.ContainsFunc(ways, func(way string) bool { return !isOwn(way) })
	for _, way := range ways {
		if isOwn(way) && !alone {
			err = j.note(ctx, j.base, way, false, errPassedOver)
			continue
		}
		if alone && !j.told {
			j.told = true
			s.log.Warn("Join is this member's own address: give the address of another member, or none to begin a new cluster",
				"join", s.conf.Join, "address", s.conf.Addr)
		}
		if a, err = j.ask(ctx, way, alone); err == nil || s.refusedForGood(err) != nil || ctx.Err() != nil {
			return a, err
		}
	}
	return a, err
}

// ask is one attempt by way of one address, which may be this member's own.
func (j *joining) ask(ctx context.Context, way string, own bool) (joinAnswer, error) {
	s := j.s
	req := joinRequest{ID: s.ident().id, Addr: s.conf.Addr, Format: s.conf.format}
	base, to := j.base, ""
	for range 3 { // the boot address names a leader; that one may have lost its office meanwhile
		attempt, cancel := context.WithTimeout(ctx, joinAttempt)
		a, err := s.peer.join(attempt, base, to, way, req)
		cancel()
		var r *refusal
		if errors.As(err, &r) && r.Code == codeNotLeader && r.LeaderAddr != "" {
			base, to, way, own = baseURL(r.LeaderAddr, s.conf.TLS), r.LeaderID, "", false
			continue
		}
		if err == nil && !validID(a.Cluster) {
			err = fmt.Errorf("%w: admitted to cluster %q", errFrame, a.Cluster)
		}
		return a, j.note(ctx, base, way, own, err)
	}
	return joinAnswer{}, j.note(ctx, base, way, own, errors.New("members name each other as the leader"))
}

// note keeps an answer for the error of Open, and tells the log when it is another one than before.
func (j *joining) note(ctx context.Context, base, way string, own bool, err error) error {
	place := base
	if way != "" && way != hostOf(base) {
		place += " at " + way
	}
	if err == nil || ctx.Err() != nil && j.answers[place] != nil { // the end of ctx is no answer
		return err
	}
	words := explain(err, base)
	if own {
		words = fmt.Errorf("%w (that is this member itself: give the address of another one)", words)
	}
	if place != base {
		words = fmt.Errorf("at %s: %w", way, words)
	}
	if was := j.answers[place]; was == nil || gist(was) != gist(words) {
		j.s.log.Info("not admitted yet", "address", place, "error", words)
	}
	j.answers[place] = words
	return err
}

// gist is what an error says without its numbers: ports and counters differ from one time to the next.
func gist(err error) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, err.Error())
}

// judge says how long to wait after an answer; no pause is that the error is final. One that would be, had it not been given so
// lately, is returned beside a pause.
func (j *joining) judge(err error, backoff time.Duration) (pause time.Duration, final error) {
	final = j.s.refusedForGood(err)
	if !errors.Is(final, ErrNotAllowed) {
		if final != nil {
			return 0, final
		}
		return backoff, nil
	}
	if j.refused.IsZero() {
		j.refused = time.Now()
		j.s.log.Warn("this member is not allowed to join yet: call AddAllowedMember with its address on an existing member",
			"address", j.s.conf.Addr, "trying for", notAllowedWait)
	}
	left := notAllowedWait - time.Since(j.refused)
	if left <= 0 {
		return 0, final
	}
	return min(backoff, notAllowedPace, left), final
}

// all adds the last answers to an error.
func (j *joining) all(err error) error {
	for _, place := range slices.Sorted(maps.Keys(j.answers)) {
		err = fmt.Errorf("%w; %w", err, j.answers[place])
	}
	return err
}

// refusedForGood turns an answer that no retry changes into the error of Open. Only a permission may still come.
func (s *Service) refusedForGood(err error) error {
	var r *refusal
	if !errors.As(err, &r) {
		return nil
	}
	switch r.Code {
	case codeNotAllowed:
		return fmt.Errorf("%w: call AddAllowedMember(ctx, %q) on an existing member first (%s)", ErrNotAllowed, s.conf.Addr, r.Message)
	case codeRemoved:
		return fmt.Errorf("%w: empty the directory to join as a new member", ErrRemoved)
	case codeProtocol:
		return fmt.Errorf("%w: %s", ErrFormat, r.Message)
	case codeWrongCluster, codeBadRequest, codeConflict:
		return fmt.Errorf("%w: %w", ErrInvalid, r)
	}
	return nil
}

// askBoot asks for the status of whoever answers at an address. Where that is the boot address, each of its addresses is tried
// until one answers.
func (s *Service) askBoot(ctx context.Context, base string) (a statusAnswer, err error) {
	if base != s.conf.Join {
		return s.peer.status(ctx, base)
	}
	for _, way := range s.peer.ways(ctx, base) {
		if a, err = s.peer.statusBy(ctx, base, way); err == nil && a.ID != s.ident().id || ctx.Err() != nil {
			break
		}
	}
	return a, err
}

// hostOf is a base URL's host and port.
func hostOf(base string) string {
	_, host, _ := strings.Cut(base, "://")
	return host
}

// --- the ways to a name

// ways are the addresses that the host of a base URL stands for, as host:port in a fixed order. One way "" is the name itself: it
// is an address already, is not known here, or is none of ours to look up, because a proxy or the caller's own code connects to it.
func (p *peer) ways(ctx context.Context, base string) []string {
	asIs := []string{""}
	u, err := url.Parse(base)
	if err != nil || !p.mayChoose(u) {
		return asIs
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		return []string{net.JoinHostPort(ip.Unmap().String(), port)}
	}
	ctx, cancel := context.WithTimeout(ctx, joinAttempt)
	defer cancel()
	list, err := p.lookup(ctx, u.Hostname())
	if err != nil {
		return asIs
	}
	var ips []netip.Addr
	for _, text := range list {
		if ip, err := netip.ParseAddr(text); err == nil {
			ips = append(ips, ip.Unmap())
		}
	}
	slices.SortFunc(ips, netip.Addr.Compare) // a DNS server turns the order with every answer
	ips = slices.Compact(ips)
	if len(ips) == 0 {
		return asIs
	}
	var ways []string
	for _, ip := range ips[:min(len(ips), waysMost)] {
		ways = append(ways, net.JoinHostPort(ip.String(), port))
	}
	return ways
}

// mayChoose: the client's connections go where this member says.
func (p *peer) mayChoose(u *url.URL) bool {
	t, ok := p.client.Transport.(*http.Transport)
	switch {
	//lint:ignore SA1019 a caller's transport may still use it
	case !ok, u.Scheme == "https" && (t.DialTLSContext != nil || t.DialTLS != nil):
		return false
	case t.Proxy == nil:
		return true
	}
	via, err := careful("the choice of a proxy", func() (*url.URL, error) { return t.Proxy(&http.Request{URL: u}) })
	return via == nil && err == nil
}

// onNewConnection is the client for one call that must not take a kept connection, connected by way of one address. The name that
// TLS checks and the Host header stay what they were. The connection ends with the call; the caller's own are left alone.
func (p *peer) onNewConnection(way string) func(*http.Request) (*http.Response, error) {
	base, ok := p.client.Transport.(*http.Transport)
	if !ok {
		return func(req *http.Request) (*http.Response, error) {
			req.Close = true
			return p.client.Do(req)
		}
	}
	t := base.Clone()
	t.DisableKeepAlives = true
	ownHTTP2(t)
	if way != "" {
		dial := t.DialContext
		if dial == nil {
			dial = new(net.Dialer).DialContext
			//lint:ignore SA1019 a caller's transport may still use it
			if old := t.Dial; old != nil {
				dial = func(_ context.Context, network, addr string) (net.Conn, error) { return old(network, addr) }
			}
		}
		t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, wayTimeout)
			defer cancel()
			return dial(ctx, network, way)
		}
	}
	client := *p.client
	client.Transport = t
	return client.Do
}

// ownHTTP2: a clone whose original speaks HTTP/2 must have connections of its own for that, or none. Clone copies the list of
// protocols that TLS offers, but not what serves them; what a caller has configured by itself puts connections into a pool of the
// original's.
func ownHTTP2(t *http.Transport) {
	c := t.TLSClientConfig
	if c == nil || !slices.Contains(c.NextProtos, "h2") {
		return
	}
	if t.TLSNextProto == nil {
		t.ForceAttemptHTTP2 = true
		return
	}
	clear(t.TLSNextProto)
	c.NextProtos = slices.DeleteFunc(slices.Clone(c.NextProtos), func(name string) bool { return name == "h2" })
}
