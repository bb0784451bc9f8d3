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
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const aDay = 24 * time.Hour

// A minted is a certificate with its key and those above it.
type minted struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	by   *minted // nil: itself
}

// mint makes a certificate for 127.0.0.1 that ends then, or an authority.
func mint(t *testing.T, name string, ends time.Time, by *minted, authority bool) *minted {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<60))
	must(t, err)
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-30 * aDay), NotAfter: ends,
		IsCA: authority, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	if authority {
		template.KeyUsage = x509.KeyUsageCertSign
	}
	m := &minted{key: key, by: by}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	must(t, err)
	m.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return m
}

// tls sends all but the root.
func (m *minted) tls() tls.Certificate {
	c := tls.Certificate{PrivateKey: m.key}
	for ; m.by != nil || len(c.Certificate) == 0; m = m.by {
		c.Certificate = append(c.Certificate, m.cert.Raw)
	}
	return c
}

func pool(list ...*minted) *x509.CertPool {
	p := x509.NewCertPool()
	for _, m := range list {
		p.AddCert(m.cert)
	}
	return p
}

func TestValidityOfAChain(t *testing.T) {
	t.Parallel()
	now := time.Now().Truncate(time.Second)
	in := func(days int) time.Time { return now.Add(time.Duration(days) * aDay) }
	root, shortRoot, endedRoot := mint(t, "root", in(100), nil, true), mint(t, "short root", in(5), nil, true), mint(t, "ended root", in(-2), nil, true)
	middle := mint(t, "middle", in(50), root, true)
	shortMiddle := mint(t, "short middle", in(7), root, true)
	otherMiddle := mint(t, "middle", in(3), root, true)
	leafOf := func(by *minted) *minted { return mint(t, "leaf", in(60), by, false) }
	certs := func(list ...*minted) []*x509.Certificate {
		var out []*x509.Certificate
		for _, m := range list {
			out = append(out, m.cert)
		}
		return out
	}
	self, underMiddle, underShort, underShortRoot, underEnded := leafOf(nil), leafOf(middle), leafOf(shortMiddle), leafOf(shortRoot), leafOf(endedRoot)
	tests := []struct {
		name     string
		sent     []*x509.Certificate
		verified [][]*x509.Certificate
		roots    *x509.CertPool
		want     int // days
		first    string
	}{
		{"of itself", certs(self), nil, nil, 60, "leaf"},
		{"an intermediate that ends sooner", certs(underMiddle, middle), nil, nil, 50, "middle"},
		{"one that ends much sooner", certs(underShort, shortMiddle), nil, pool(root), 7, "short middle"},
		{"the root ends sooner and is not sent", certs(underShortRoot), nil, pool(shortRoot), 5, "short root"},
		{"the root has ended", certs(underEnded), nil, pool(endedRoot), -2, "ended root"},
		{"an old root that is sent and stands above nothing", certs(underMiddle, middle, endedRoot), nil, nil, 50, "middle"},
		{"an authority of the same name is sent first", certs(underMiddle, otherMiddle, middle), nil, nil, 50, "middle"},
		{"verified", certs(underMiddle), [][]*x509.Certificate{certs(underMiddle, middle, root)}, nil, 50, "middle"},
		{"verified in two ways", certs(self), [][]*x509.Certificate{certs(self, shortRoot), certs(self, root)}, nil, 60, "leaf"},
		{"roots that do not fit", certs(underMiddle, middle), nil, pool(shortRoot), 50, "middle"},
	}
	for _, tt := range tests {
		v, ok := validityOf(tt.sent, tt.verified, tt.roots)
		if !ok || !v.until.Equal(in(tt.want)) || v.first.Subject.CommonName != tt.first || v.leaf != tt.sent[0] {
			t.Errorf("%s: %v until %v by %v, want %v by %s", tt.name, ok, v.until, v.first.Subject.CommonName, in(tt.want), tt.first)
		}
	}
	if _, ok := validityOf(nil, nil, pool(root)); ok {
		t.Error("nothing is valid")
	}
}

func TestCertificateNoticeIsDaily(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ends := time.Now().Add(20 * aDay)
		v := validityOfChain([]*x509.Certificate{mint(t, "leaf", ends, nil, false).cert})
		l, buf := logTo(slog.LevelDebug, false)
		n := certificateNotices{log: l}
		count := func(days int) int {
			buf.Reset()
			for range days * 24 {
				n.see("m", "calls", v)
				n.see("m", "answers", v) // one of its own
				time.Sleep(time.Hour)
			}
			return strings.Count(buf.String(), "use=calls")
		}
		if got := count(6); got != 0 {
			t.Errorf("%d lines more than 14 days before the end", got)
		}
		if got := count(14); got != 14 {
			t.Errorf("%d lines in the last 14 days: %s", got, buf)
		}
		if got := count(2); got != 2 || !strings.Contains(buf.String(), "has ended") {
			t.Errorf("%d lines in two days after the end: %s", got, buf)
		}
		v.until = time.Now().Add(90 * aDay)
		if got := count(70); got != 0 {
			t.Errorf("%d lines after it was renewed: %s", got, buf)
		}
	})
}

// TestOwnCertificateThatHasEnded: the member opens, says so, and notices that a renewer has exchanged the certificate.
func TestOwnCertificateThatHasEnded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		root := mint(t, "root", time.Now().Add(100*aDay), nil, true)
		var current atomic.Pointer[tls.Certificate]
		use := func(ends time.Duration) {
			c := mint(t, "leaf", time.Now().Add(ends), root, false).tls()
			current.Store(&c)
		}
		use(-time.Hour)
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool(root),
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if c := current.Load(); c != nil {
					return c, nil
				}
				return nil, errors.New("no file")
			}}, DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no network") }}
		l, buf := logTo(slog.LevelInfo, false)
		s, err := Open(t.Context(), Config{Dir: dir, Addr: "127.0.0.1:7001", TLS: true, Client: &http.Client{Transport: tr}, Logger: l})
		must(t, err)
		defer s.Close()
		has := func(word string) {
			t.Helper()
			if err := s.Err(); err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("Err is %v, which does not say %q", err, word)
			}
		}
		has("has ended: it is valid from")
		if !strings.Contains(buf.String(), "level=ERROR") || !strings.Contains(buf.String(), "a certificate has ended") {
			t.Errorf("the log says %s", buf)
		}
		must(t, s.Set(t.Context(), "k", []byte("v"))) // it is no refusal
		must(t, s.Ready(t.Context()))
		use(aDay)
		time.Sleep(certificateOwnLook + time.Second)
		if err := s.Err(); err != nil {
			t.Errorf("after it was renewed: %v", err)
		}
		use(2 * time.Minute)
		time.Sleep(4 * time.Minute)
		has("has ended")
		current.Store(nil)
		time.Sleep(certificateOwnLook)
		has("no file")
	})
}

// A safeBuffer may be read while a member logs into it.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (b *safeBuffer) Len() int { return len(b.String()) }

func (b *safeBuffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.Reset()
}

func (b *safeBuffer) lines(words ...string) (n int) {
	for line := range strings.Lines(b.String()) {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			n++
		}
	}
	return n
}

// TestCertificatesOfMembers: each sees its own and those of the other, as client and as server, whatever ends first.
func TestCertificatesOfMembers(t *testing.T) {
	t.Parallel()
	root := mint(t, "root", time.Now().Add(100*aDay), nil, true)
	middle := mint(t, "middle", time.Now().Add(9*aDay), root, true)
	of := func(days int, by *minted) tls.Certificate {
		return mint(t, "leaf", time.Now().Add(time.Duration(days)*aDay), by, false).tls()
	}
	type kept struct {
		*testMember
		log *safeBuffer
	}
	secured := func(join string, client, server tls.Certificate) kept {
		m := kept{newMember(t, join), new(safeBuffer)}
		m.secure(pool(root), tls.RequireAndVerifyClientCert, server)
		m.conf.Client.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{client}
		m.conf.Logger = slog.New(slog.NewTextHandler(m.log, nil))
		return m
	}
	a := secured("", of(60, root), of(3, root))
	a.start()
	b := secured(a.conf.Addr, of(60, middle), of(-1, root))
	must(t, a.s.AddAllowedMember(ctxFor(t, patience), b.conf.Addr))
	b.start()
	nameB := peerName(b.s.ident().id, b.conf.Addr)
	for _, want := range []struct {
		of    kept
		words []string
	}{
		{a, []string{`"this member"`, `use="answers the others"`, "ends soon", "days=2"}},
		{b, []string{`"this member"`, `use="calls the others"`, "ends soon", "days=8", "authority=middle"}},
		{a, []string{nameB, `use="answers the others"`, "has ended"}},
		{b, []string{`"this member"`, `use="answers the others"`, "has ended"}},
	} {
		eventually(t, 3*patience, "a line of "+want.of.conf.Addr, func() error {
			if want.of.log.lines(append(want.words, "level=WARN")...) == 0 {
				return errors.New(strings.Join(want.words, " "))
			}
			return nil
		})
	}
	eventually(t, patience, "Err", func() error {
		if err := b.s.Err(); err == nil || !strings.Contains(err.Error(), "answers the others") {
			return errors.Join(errors.New("Err says nothing of it"), err)
		}
		return nil
	})
	if err := a.s.Err(); err != nil {
		t.Errorf("the other one's Err is %v", err)
	}
	// What a member shows when it calls is seen at the door.
	c := secured(a.conf.Addr, of(60, middle), of(60, root))
	must(t, a.s.AddAllowedMember(ctxFor(t, patience), c.conf.Addr))
	c.start()
	must(t, c.s.Ready(ctxFor(t, patience)))
	must(t, c.s.Set(ctxFor(t, patience), "k", []byte("v")))
	seen := new(safeBuffer)
	w := certificateWatch{s: a.s, notices: certificateNotices{log: slog.New(slog.NewTextHandler(seen, nil))}}
	w.lookAtOthers()
	nameC := peerName(c.s.ident().id, c.conf.Addr)
	if seen.lines(nameC, `use="calls the others"`, "authority=middle", "days=8") != 1 || seen.lines(nameC) != 1 {
		t.Errorf("the other one calls with a certificate that ends soon, and the log says %s", &seen.b)
	}
}

func TestRenewedCertificateIsTheOneThatCounts(t *testing.T) {
	t.Parallel()
	root := mint(t, "root", time.Now().Add(100*aDay), nil, true)
	old, renewed := mint(t, "leaf", time.Now().Add(aDay), root, false).cert, mint(t, "leaf", time.Now().Add(60*aDay), root, false).cert
	renewed.NotBefore = time.Now()
	stateOf := func(c *x509.Certificate) *tls.ConnectionState {
		return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}, VerifiedChains: [][]*x509.Certificate{{c, root.cert}}}
	}
	var table shownTable
	table.note("m", nil)
	table.note("m", &tls.ConnectionState{PeerCertificates: []*x509.Certificate{renewed}})
	if table.of("m") != nil {
		t.Error("what nobody has verified is noted")
	}
	first, second := stateOf(old), stateOf(renewed)
	table.note("m", first)
	table.note("m", second)
	table.note("m", first) // a connection that was kept
	if table.of("m") != second {
		t.Error("the old one counts")
	}
	if !succeeds(renewed, old, "127.0.0.1:1") || succeeds(old, renewed, "127.0.0.1:1") || succeeds(renewed, old, "10.0.0.1:1") {
		t.Error("a renewed certificate stands in for its predecessor, and for no other host")
	}
	renewed.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if succeeds(renewed, old, "127.0.0.1:1") {
		t.Error("a certificate for servers stands in for that of a client")
	}
}

// A call of the client's code that does not return is the only one, however long the member runs, and what it returns at last counts.
func TestOwnCertificateThatDoesNotCome(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int64
		release := make(chan struct{})
		letGo := sync.OnceFunc(func() { close(release) })
		defer letGo()
		ended := mint(t, "leaf", time.Now().Add(-time.Hour), mint(t, "root", time.Now().Add(aDay), nil, true), false).tls()
		tr := &http.Transport{TLSClientConfig: &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if calls.Add(1) > 1 { // the first is that of Open's check
				<-release
			}
			return &ended, nil
		}}, DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no network") }}
		s, err := Open(t.Context(), Config{Dir: dir, Addr: "127.0.0.1:7001", TLS: true, Client: &http.Client{Transport: tr}, Logger: testLogger(t)})
		must(t, err)
		defer s.Close()
		time.Sleep(10 * certificateOwnLook)
		if n := calls.Load(); n != 2 || s.Err() != nil {
			t.Errorf("%d calls, Err is %v", n, s.Err())
		}
		letGo()
		time.Sleep(certificateOwnLook + time.Second)
		if err := s.Err(); err == nil || !strings.Contains(err.Error(), "has ended") {
			t.Errorf("Err is %v", err)
		}
		time.Sleep(5 * certificateOwnLook)
		if n := calls.Load(); n < 5 {
			t.Errorf("%d calls after the one that had not returned", n)
		}
	})
}
