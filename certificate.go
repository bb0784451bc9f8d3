package quorate

// The certificates of this member and of the others: whether its own is good for its address, and how long each of them is valid. It
// owns what is read out of a certificate and when that is logged. It refuses nobody, for that is crypto/tls's and the door's. Control
// comes from Open and from startBackground.
//
// A renewer exchanges certificates under a running process, and a kept connection shows the one that was there when it was opened. So
// this member's own is asked of its client again and again, and the others' are looked at on new connections.

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	certificateNotice  = 14 * 24 * time.Hour // before the end
	certificateAgain   = 24 * time.Hour      // between two lines on one certificate
	certificateLook    = time.Hour           // between two looks at the others', and at what this member's own server shows
	certificateOwnLook = time.Minute         // between two looks at this member's own
	certificateSoon    = time.Second         // after the start: the application begins to listen
	certificateCall    = 5 * time.Second
)

// checkCertificate refuses a client whose own certificate is not valid for addr's host: a member uses one certificate as
// client and as server, so its peers, which dial addr, would refuse it one by one and later. addr is canonical. A transport
// that is not net/http's cannot be looked into: log says so once. Without an address there are no peers and nothing to check.
func checkCertificate(client *http.Client, addr string, log *slog.Logger) error {
	if addr == "" {
		return nil
	}
	transport := http.DefaultTransport
	if client != nil && client.Transport != nil {
		transport = client.Transport
	}
	t, ok := transport.(*http.Transport)
	if !ok {
		if log != nil {
			log.Warn("certificate not checked: the client's transport is not an *http.Transport", "transport", fmt.Sprintf("%T", transport))
		}
		return nil
	}
	sent, err := clientCertificates(t.TLSClientConfig)
	if err != nil {
		return fmt.Errorf("%w: the client's certificate: %w", ErrInvalid, err)
	}
	if len(sent) == 0 {
		return nil
	}
	leaf := sent[0]
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if leaf.VerifyHostname(host) != nil {
		return fmt.Errorf("%w: the client's certificate is valid for %s, not for %s, the host of this member's address; "+
			"a member uses one certificate as client and as server", ErrInvalid, certificateNames(leaf), host)
	}
	return nil
}

// clientCertificates returns what a handshake would send, the leaf first; none if that is nothing.
func clientCertificates(c *tls.Config) ([]*x509.Certificate, error) {
	var cert tls.Certificate
	switch {
	case c == nil:
	case c.GetClientCertificate != nil: // takes precedence in crypto/tls too
		info := &tls.CertificateRequestInfo{
			Version: tls.VersionTLS13,
			SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256, tls.ECDSAWithP384AndSHA384,
				tls.ECDSAWithP521AndSHA512, tls.Ed25519, tls.PSSWithSHA256, tls.PSSWithSHA384, tls.PSSWithSHA512},
		}
		got, err := careful("GetClientCertificate", func() (*tls.Certificate, error) { return c.GetClientCertificate(info) })
		if err != nil {
			return nil, err
		}
		if got != nil {
			cert = *got
		}
	case len(c.Certificates) > 0:
		cert = c.Certificates[0]
	}
	var sent []*x509.Certificate
	for _, der := range cert.Certificate {
		one, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		sent = append(sent, one)
	}
	return sent, nil
}

func certificateNames(c *x509.Certificate) string {
	names := append([]string(nil), c.DNSNames...)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return fmt.Sprintf("no host (its common name %q does not count)", c.Subject.CommonName)
	}
	return strings.Join(names, ", ")
}

// A validity is for how long those who check a certificate take it: its own time, and that of all that stand above it.
type validity struct {
	from, until time.Time
	leaf, first *x509.Certificate // first is the one of the chain that ends first
}

// validityOf is that of the chain that holds longest; false if nothing was sent. What was sent is judged by the chains that were
// verified or, if nobody has, by those up to one of the roots that were valid when the leaf was issued.
func validityOf(sent []*x509.Certificate, verified [][]*x509.Certificate, roots *x509.CertPool) (v validity, ok bool) {
	if len(sent) == 0 {
		return validity{}, false
	}
	if len(verified) == 0 && roots != nil {
		verified = chainsOf(sent, roots)
	}
	if len(verified) == 0 {
		verified = [][]*x509.Certificate{issuersOf(sent)}
	}
	for _, chain := range verified {
		if one := validityOfChain(chain); v.leaf == nil || one.until.After(v.until) {
			v = one
		}
	}
	return v, true
}

func validityOfChain(chain []*x509.Certificate) validity {
	v := validity{from: chain[0].NotBefore, until: chain[0].NotAfter, leaf: chain[0], first: chain[0]}
	for _, c := range chain[1:] {
		if c.NotAfter.Before(v.until) {
			v.until, v.first = c.NotAfter, c
		}
		if c.NotBefore.After(v.from) {
			v.from = c.NotBefore
		}
	}
	return v
}

func chainsOf(sent []*x509.Certificate, roots *x509.CertPool) [][]*x509.Certificate {
	between := x509.NewCertPool()
	for _, c := range sent[1:] {
		between.AddCert(c)
	}
	for _, at := range []time.Time{time.Now(), sent[0].NotBefore} {
		chains, err := sent[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: at,
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		if err == nil {
			return chains
		}
	}
	return nil
}

// issuersOf leaves out what was sent and stands above nothing, as an old root that servers still send.
func issuersOf(sent []*x509.Certificate) []*x509.Certificate {
	chain, rest := sent[:1:1], slices.Clone(sent[1:])
	for {
		last := chain[len(chain)-1]
		i := slices.IndexFunc(rest, func(c *x509.Certificate) bool {
			return bytes.Equal(c.RawSubject, last.RawIssuer) && last.CheckSignatureFrom(c) == nil
		})
		if i < 0 {
			return chain
		}
		chain, rest = append(chain, rest[i]), slices.Delete(rest, i, i+1)
	}
}

// trouble says what is wrong with a certificate now; empty is nothing.
func (v validity) trouble() string {
	switch now := time.Now(); {
	case now.After(v.until):
		return "has ended"
	case now.Before(v.from):
		return "is not valid yet"
	}
	return ""
}

// fault is trouble as Err shows it. The use says what the member does with its certificate.
func (v validity) fault(use string) error {
	trouble := v.trouble()
	if trouble == "" {
		return nil
	}
	return fmt.Errorf("the certificate with which this member %s (%s) %s: it is valid from %s to %s%s; members that check it refuse "+
		"this one until it is renewed", use, certificateNames(v.leaf), trouble, v.from.UTC().Format(time.RFC3339),
		v.until.UTC().Format(time.RFC3339), v.above())
}

// above names what ends before the certificate itself.
func (v validity) above() string {
	if v.first == v.leaf {
		return ""
	}
	return fmt.Sprintf(", as its authority %q does", v.first.Subject.CommonName)
}

// certificateNotices are the lines that were written, so that each certificate has one a day.
type certificateNotices struct {
	log  *slog.Logger
	last map[string]time.Time // by member and use
}

// see logs what is due about a certificate.
func (n *certificateNotices) see(of, use string, v validity) {
	trouble := v.trouble()
	if trouble == "" && time.Until(v.until) > certificateNotice {
		return
	}
	if last, ok := n.last[of+use]; ok && time.Since(last) < certificateAgain {
		return
	}
	if n.last == nil {
		n.last = make(map[string]time.Time)
	}
	n.last[of+use] = time.Now()
	if trouble == "" {
		trouble = "ends soon"
	}
	attrs := []any{"of", of, "use", use, "names", certificateNames(v.leaf), "from", v.from.UTC(), "to", v.until.UTC()}
	if left := time.Until(v.until); left > 0 {
		attrs = append(attrs, "days", int(left/(24*time.Hour)))
	}
	if v.first != v.leaf {
		attrs = append(attrs, "authority", v.first.Subject.CommonName)
	}
	n.log.Warn("a certificate "+trouble+": renew it", attrs...)
}

// What a member does with its certificate.
const (
	useCalls   = "calls the others"
	useAnswers = "answers the others"
)

// A certificateWatch looks at the certificates as long as the Service runs. One goroutine has it.
type certificateWatch struct {
	s              *Service
	notices        certificateNotices
	calls, answers error               // the faults of this member's own
	asked          chan ownCertificate // the call of the client's code that is out; nil = none is
}

type ownCertificate struct {
	sent []*x509.Certificate
	err  error
}

// watchCertificates is begun by Open itself, so that what has ended is in Err when it returns.
func (s *Service) watchCertificates() {
	if !s.conf.TLS || s.conf.Addr == "" {
		return
	}
	w := &certificateWatch{s: s, notices: certificateNotices{log: s.log}}
	w.lookAtOwn()
	s.running.Go(w.carry)
}

func (w *certificateWatch) carry() {
	s := w.s
	own := time.NewTicker(certificateOwnLook)
	defer own.Stop()
	others := time.NewTimer(certificateSoon)
	defer others.Stop()
	for {
		select {
		case <-own.C:
			w.lookAtOwn()
		case <-others.C:
			w.lookAtOthers()
			others.Reset(certificateLook)
		case <-s.ctx.Done():
			return
		}
	}
}

// lookAtOwn asks the client for the certificate that it would send now. While one such call has not returned there is no other.
func (w *certificateWatch) lookAtOwn() {
	t, ok := w.s.peer.client.Transport.(*http.Transport)
	if !ok || t.TLSClientConfig == nil {
		return
	}
	if w.asked == nil {
		asked := make(chan ownCertificate, 1)
		w.asked = asked
		go func() { // the caller's code may take its time, or never return
			sent, err := clientCertificates(t.TLSClientConfig)
			asked <- ownCertificate{sent, err}
		}()
	}
	var own ownCertificate
	select {
	case own = <-w.asked:
		w.asked = nil
	case <-time.After(certificateCall):
		return
	case <-w.s.ctx.Done():
		return
	}
	if own.err != nil {
		w.calls = fmt.Errorf("the certificate with which this member %s can't be had: %w", useCalls, own.err)
	} else {
		w.calls = w.judgeOwn(useCalls, own.sent, nil, t.TLSClientConfig.RootCAs)
	}
	w.tell()
}

func (w *certificateWatch) judgeOwn(use string, sent []*x509.Certificate, verified [][]*x509.Certificate, roots *x509.CertPool) error {
	v, ok := validityOf(sent, verified, roots)
	if !ok {
		return nil
	}
	w.notices.see("this member", use, v)
	return v.fault(use)
}

func (w *certificateWatch) tell() {
	w.s.faults.set(faultExpired, cmpErr(w.calls, w.answers))
}

// lookAtOthers calls every member, this one too, on a new connection. What a member shows when it calls this one was noted at the
// door.
func (w *certificateWatch) lookAtOthers() {
	s := w.s
	roots := func() *x509.CertPool {
		if t, ok := s.peer.client.Transport.(*http.Transport); ok && t.TLSClientConfig != nil {
			return t.TLSClientConfig.RootCAs
		}
		return nil
	}()
	for _, m := range append(s.others(), raft.Server{ID: raft.ServerID(s.ident().id), Address: raft.ServerAddress(s.conf.Addr)}) {
		addr := s.addressOf(m)
		sent, verified := s.peer.presented(s.ctx, string(m.ID), s.peer.base(addr))
		if string(m.ID) == s.ident().id {
			if sent != nil {
				w.answers = w.judgeOwn(useAnswers, sent, verified, roots)
				w.tell()
			}
			continue
		}
		name := peerName(m.ID, addr)
		shown, ok := validityOf(sent, verified, roots)
		if ok {
			w.notices.see(name, useAnswers, shown)
		}
		if state := s.peer.shown.of(string(m.ID)); state != nil && !(ok && succeeds(shown.leaf, state.PeerCertificates[0], addr)) {
			if v, ok := validityOf(state.PeerCertificates, state.VerifiedChains, nil); ok {
				w.notices.see(name, useCalls, v)
			}
		}
	}
}

// succeeds reports whether a certificate was issued after another one and can be used in its place: who has renewed it may go on
// with connections on which the old one was shown.
func succeeds(c, old *x509.Certificate, addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	return err == nil && c.NotBefore.After(old.NotBefore) && c.VerifyHostname(host) == nil &&
		(len(c.ExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny))
}

// presented is what a member's server shows on a new connection, also if this member does not take it; nil if that is not to be had.
func (p *peer) presented(ctx context.Context, id, base string) (sent []*x509.Certificate, verified [][]*x509.Certificate) {
	ctx, cancel := context.WithTimeout(ctx, certificateCall)
	defer cancel()
	resp, err := p.do(ctx, request{method: http.MethodGet, route: "status", base: base, to: id, fresh: true})
	var refused *tls.CertificateVerificationError
	switch {
	case errors.As(err, &refused):
		return refused.UnverifiedCertificates, nil
	case err != nil:
		return nil, nil
	}
	defer resp.Body.Close()
	if resp.TLS == nil {
		return nil, nil
	}
	return resp.TLS.PeerCertificates, resp.TLS.VerifiedChains
}

// shownTable is what the members have shown when they called this one: of each, the certificate that was issued last.
type shownTable struct {
	list sync.Map // member id → *tls.ConnectionState
}

// note is called for every request of a member. What nobody has verified anyone can show.
func (t *shownTable) note(id string, state *tls.ConnectionState) {
	if state == nil || len(state.VerifiedChains) == 0 || len(state.PeerCertificates) == 0 {
		return
	}
	was := t.of(id)
	if was == state || was != nil && state.PeerCertificates[0].NotBefore.Before(was.PeerCertificates[0].NotBefore) {
		return
	}
	t.list.Store(id, state)
}

func (t *shownTable) of(id string) *tls.ConnectionState {
	v, _ := t.list.Load(id)
	state, _ := v.(*tls.ConnectionState)
	return state
}
