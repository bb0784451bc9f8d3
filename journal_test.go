package quorate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A journal is what the members of a script log. Every line, Debug too, is checked for its form; those from Info on are kept.
type journal struct {
	t *testing.T

	mu    sync.Mutex // guards the fields below
	began time.Time
	lines map[string][]string // by member
}

func newJournal(t *testing.T) *journal {
	return &journal{t: t, began: time.Now(), lines: make(map[string][]string)}
}

func (j *journal) logger(name string) *slog.Logger {
	return slog.New(&journalHandler{j: j, name: name})
}

// take is what the member has logged since the journal was taken last; the times of the lines that follow count from now.
func (j *journal) take(name string) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	lines := j.lines[name]
	delete(j.lines, name)
	return lines
}

func (j *journal) restart() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.began = time.Now()
	clear(j.lines)
}

type journalHandler struct {
	j     *journal
	name  string
	attrs []slog.Attr
}

func (h *journalHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *journalHandler) WithGroup(string) slog.Handler            { return h }

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &journalHandler{h.j, h.name, append(h.attrs[:len(h.attrs):len(h.attrs)], attrs...)}
}

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	var buf bytes.Buffer
	text := slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}).WithAttrs(h.attrs)
	if err := text.Handle(ctx, r); err != nil {
		return err
	}
	line := strings.TrimSpace(buf.String())
	if what := malformed(line); what != "" {
		h.j.t.Errorf("%s logs %s: %s", h.name, what, line)
	}
	if r.Level < slog.LevelInfo {
		return nil
	}
	h.j.mu.Lock()
	defer h.j.mu.Unlock()
	h.j.lines[h.name] = append(h.j.lines[h.name], roughly(time.Since(h.j.began))+" "+line)
	return nil
}

var (
	goSyntax = regexp.MustCompile(`\{\w*:|&\{|map\[|%!|\[\{|0xc0[0-9a-f]{6}|<nil>`)
	aPeer    = regexp.MustCompile(`(\w+)\.test:7001 \([0-9a-f]{8}\)`)
	anAddr   = regexp.MustCompile(`\b([a-z])\.test:7001`)
	aNumber  = regexp.MustCompile(`\b(term|index)=\d+`)
)

// malformed says what no line of a log may hold.
func malformed(line string) string {
	switch {
	case goSyntax.MatchString(line):
		return "a Go value"
	case wholeID.MatchString(line):
		return "a whole id"
	}
	return ""
}

// roughly is coarse, as elections take what they take.
func roughly(d time.Duration) string {
	if d < 20*time.Second {
		return "soon:"
	}
	return d.Round(time.Minute).String() + ":"
}

func TestMalformedLines(t *testing.T) {
	t.Parallel()
	for _, line := range []string{
		`msg=m servers="[{Suffrage:Voter ID:1 Address:a:1}]"`, `msg=m peer="{Suffrage:Voter ID:1}"`, `msg=m a="&{1 2}"`, `msg=m a=map[a:1]`,
		`msg=m a="%!d(string=x)"`, `msg=m a=<nil>`, `msg=m id=547fe683d4355776d3b1727a609919de`,
	} {
		if malformed(line) == "" {
			t.Errorf("not seen: %s", line)
		}
	}
	if what := malformed(`level=INFO msg="this member leads now" leader="a.test:7001 (547fe683)" why="{}"`); what != "" {
		t.Errorf("a good line is taken for %s", what)
	}
}

// log is the journal of a member: all lines, or with a level's name those of that level. Members have the names that the cast has for
// those that are named, and all others are "other", for their parts are chance.
func (c *script) log(m *scriptMember, level string, named []string) string {
	name := func(letter string) string {
		for _, cast := range named {
			if c.member(cast).name == letter {
				return cast
			}
		}
		return "other"
	}
	var out []string
	for _, line := range c.journal.take(m.name) {
		if !strings.Contains(line, level) {
			continue
		}
		line = aPeer.ReplaceAllStringFunc(line, func(s string) string { return name(s[:1]) + " (ID)" })
		line = anAddr.ReplaceAllStringFunc(line, func(s string) string { return name(s[:1]) })
		out = append(out, aNumber.ReplaceAllString(line, "$1=N"))
	}
	if out == nil {
		return "nothing"
	}
	return strings.Join(out, "\n")
}

// TestHealthyHour: while all goes well and values are written, snapshots taken and the log cut, nothing is logged. The campaign lives
// through an hour.
func TestHealthyHour(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newScript(t)
		defer c.end()
		c.change = func(conf *Config) { conf.segment = 16 << 10 }
		c.obey("journal")
		c.obey("start a")
		c.obey("join b via a")
		c.obey("join c via a")
		c.obey("await voters 3")
		c.obey("cast leader l followers f g")
		c.obey("journal")
		n := dose(100, 3600)
		c.obey(fmt.Sprintf("writes l %d 500ms within %ds", n, n))
		c.obey(fmt.Sprintf("writes f %d 500ms within %ds", n, n))
		for _, m := range c.members {
			for _, line := range c.journal.take(m.name) {
				t.Errorf("%s logs: %s", m.name, line)
			}
		}
	})
}

// TestFlappingPeer: a peer that comes and goes all the time does not fill the log, and one that is gone for good is still told of.
func TestFlappingPeer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		o := (&outages{log: j.logger("l")}).of("1", 1)
		down := func(d time.Duration) {
			for began := time.Now(); time.Since(began) < d; time.Sleep(100 * time.Millisecond) {
				o.goesOn("p", began, errors.New("down"))
			}
			o.over("p")
		}
		down(900 * time.Millisecond)
		if got := j.take("l"); got != nil {
			t.Errorf("an outage of less than a second: %q", got)
		}
		for range 200 {
			down(2500 * time.Millisecond)
			time.Sleep(500 * time.Millisecond)
		}
		if got := j.take("l"); len(got) < 2 || len(got) > 6 {
			t.Errorf("200 outages in ten minutes make %d lines: %q", len(got), got)
		}
		down(11 * time.Minute)
		if got := j.take("l"); len(got) < 3 {
			t.Errorf("an outage after those is told in %q", got)
		}
		time.Sleep(2 * outageCalm)
		down(1500 * time.Millisecond)
		if got := j.take("l"); len(got) != 2 {
			t.Errorf("an outage after a calm time is told in %q", got)
		}
	})
}

func TestStateThatIsNotTaken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		o := (&outages{log: j.logger("l")}).of("1", 1)
		for range 1200 {
			o.sent("p", time.Now(), 5, errors.New("413"))
			time.Sleep(time.Second)
		}
		if got := j.take("l"); len(got) != 3 {
			t.Errorf("1200 failures make %q", got)
		}
		o.sent("p", time.Now(), 5, nil)
		if got := j.take("l"); len(got) != 1 || !strings.Contains(got[0], "has taken the state") {
			t.Errorf("then it is taken: %q", got)
		}
	})
}

// The reason of an outage is said again when it is another one, and lasts.
func TestOutageForAnotherReason(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		words := newLogged("does not answer")
		o := (&outages{log: slog.New(words)}).of("a", 1)
		began := time.Now()
		refused, login, flap := errors.New("127.0.0.1:40123 refused"), errors.New("status 401"), errors.New("in between")
		for i := range 100 { // ten seconds
			why := refused
			switch {
			case i >= 40:
				why = login
			case i == 20:
				why = flap
			}
			time.Sleep(100 * time.Millisecond)
			o.goesOn("a:1", began, why)
		}
		if list := words.all(); len(list) != 2 || !strings.Contains(list[0], "refused") || !strings.Contains(list[1], "for another reason now") ||
			!strings.Contains(list[1], "401") {
			t.Errorf("%q", list)
		}
	})
}

// The goroutine of a term before is still at its call to the peer, and ends beside the one of the next term.
func TestOutageInTwoTerms(t *testing.T) {
	t.Parallel()
	words := newLogged("does not answer")
	list := &outages{log: slog.New(words)}
	began := time.Now().Add(-time.Hour)
	old := list.of("a", 1)
	old.goesOn("a:1", began, errors.New("refused"))
	now := list.of("a", 3)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 1000 {
			old.leftAlone(1)
		}
	})
	for i := range 1000 {
		now.goesOn("a:1", began, fmt.Errorf("refused %d", i))
	}
	wg.Wait()
	if n := len(words.all()); n != 1 {
		t.Errorf("the outage is logged %d times", n)
	}
	now.leftAlone(3)
	if now.goesOn("a:1", began, errors.New("refused")); len(words.all()) != 2 {
		t.Errorf("after its end: %q", words.all())
	}
	wg.Go(func() {
		for range 1000 {
			old.over("a:1")
		}
	})
	for i := range 1000 {
		now.goesOn("a:1", began, fmt.Errorf("refused %d", i))
	}
	wg.Wait()
}

func TestTroubleThatGoesOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		var x trouble
		for i := range 1200 {
			x.goesOn(j.logger("l"), "it fails", fmt.Errorf("try %d of a disk that is full", i))
			if i%100 == 50 {
				x.goesOn(j.logger("l"), "it fails", errors.New("another error, which is not hidden"))
			}
			time.Sleep(time.Second)
		}
		if got := j.take("l"); len(got) != 4 || !strings.Contains(got[1], "not hidden") {
			t.Errorf("1200 failures of two kinds make %q", got)
		}
		x.over()
		x.goesOn(j.logger("l"), "it fails", errors.New("another error, which is not hidden"))
		if got := j.take("l"); len(got) != 1 {
			t.Errorf("the next trouble makes %q", got)
		}
	})
}

func TestLeaderThatIsElectedAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		s, err := Open(t.Context(), Config{Dir: dir, Logger: j.logger("a")})
		must(t, err)
		defer s.Close()
		must(t, s.Ready(t.Context()))
		must(t, s.peer.stand())
		time.Sleep(time.Second)
		var said int
		for _, line := range j.take("a") {
			if strings.Contains(line, "this member leads now") {
				said++
			}
		}
		if said != 2 {
			t.Errorf("two terms of one leader make %d lines", said)
		}
	})
}
