package quorate

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// A gateLog hands on the lines' texts, one for each token.
type gateLog struct {
	slog.Handler
	gate chan struct{}
	got  []string
}

func (h *gateLog) Enabled(context.Context, slog.Level) bool { return true }

func (h *gateLog) Handle(_ context.Context, r slog.Record) error {
	<-h.gate
	h.got = append(h.got, r.Message)
	r.Attrs(func(a slog.Attr) bool { h.got = append(h.got, a.String()); return true })
	return nil
}

func TestLogQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &gateLog{gate: make(chan struct{})}
		q := newLogLines(h)
		log := q.logger()
		for i := range maxLines + 11 { // the handler has one more
			log.Info(fmt.Sprint(i))
			if i == 0 {
				synctest.Wait()
			}
		}
		began := time.Now()
		q.flush(time.Second)
		if d := time.Since(began); d != time.Second {
			t.Errorf("waited %v for a handler that hangs", d)
		}
		close(h.gate)
		q.flush(time.Second)
		if len(h.got) != maxLines+3 || h.got[0] != "0" || h.got[maxLines] != fmt.Sprint(maxLines) || h.got[maxLines+2] != "lines=10" {
			t.Errorf("%d lines, the last ones %q", len(h.got), h.got[max(0, len(h.got)-4):])
		}
		log.Info("later")
		q.flush(time.Second)
		if h.got[len(h.got)-1] != "later" {
			t.Errorf("the last line is %q", h.got[len(h.got)-1])
		}
	})
}

// A handler that hangs, as one that writes into a pipe that nobody reads, holds up nothing but its lines.
func TestLogHandlerThatHangs(t *testing.T) {
	t.Parallel()
	h := &gateLog{gate: make(chan struct{})}
	conf := Config{Dir: filepath.Join(t.TempDir(), "data"), Logger: slog.New(h)}
	s, err := Open(t.Context(), conf)
	must(t, err)
	must(t, s.Set(t.Context(), "k", []byte("v")))
	s.faults.set(faultLogDamage, fmt.Errorf("a fault for the log"))
	if _, err := s.Get(t.Context(), "k"); err != nil {
		t.Error(err)
	}
	must(t, s.Close())
	close(h.gate)
}
