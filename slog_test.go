package quorate

import (
	"bytes"
	"errors"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// logTo returns a logger from this level on and the bytes that it writes, one line per record, without the time.
func logTo(level slog.Level, source bool) (*slog.Logger, *bytes.Buffer) {
	var buf bytes.Buffer
	return slog.New(slog.NewTextHandler(&buf, &slog.HandlerOptions{
		Level:     level,
		AddSource: source,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	})), &buf
}

func TestStandardLogIsTheApplications(t *testing.T) {
	if log.Writer() != os.Stderr || log.Flags() != log.LstdFlags {
		t.Errorf("package log writes to a %T with flags %d, as a dependency has set it", log.Writer(), log.Flags())
	}
}

func TestHclogLines(t *testing.T) {
	tests := []struct {
		name string
		log  func(hclog.Logger)
		want string
	}{
		{"trace is debug", func(l hclog.Logger) { l.Trace("m") }, `level=DEBUG msg=m`},
		{"debug", func(l hclog.Logger) { l.Debug("m") }, `level=DEBUG msg=m`},
		{"info", func(l hclog.Logger) { l.Info("m") }, `level=INFO msg=m`},
		{"warn", func(l hclog.Logger) { l.Warn("m") }, `level=WARN msg=m`},
		{"error", func(l hclog.Logger) { l.Error("m") }, `level=ERROR msg=m`},
		{"level as a value", func(l hclog.Logger) { l.Log(hclog.Warn, "m", "k", 1) }, `level=WARN msg=m k=1`},
		{"no level is info", func(l hclog.Logger) { l.Log(hclog.NoLevel, "m") }, `level=INFO msg=m`},
		{"off is nothing", func(l hclog.Logger) { l.Log(hclog.Off, "m") }, ``},
		{"pairs", func(l hclog.Logger) { l.Info("m", "peer", "a:1", "error", errors.New("x y"), "took", time.Second) },
			`level=INFO msg=m peer=a:1 error="x y" took=1s`},
		{"value without key", func(l hclog.Logger) { l.Info("m", "k", 1, "lost") }, `level=INFO msg=m k=1 EXTRA_VALUE_AT_END=lost`},
		{"key that is no string", func(l hclog.Logger) { l.Info("m", 7, "v") }, `level=INFO msg=m 7=v`},
		{"format", func(l hclog.Logger) { l.Info("m", "done", hclog.Fmt("%0.2f%%", 12.5)) }, `level=INFO msg=m done=12.50%`},
		{"formats without a format", func(l hclog.Logger) { l.Info("m", "a", hclog.Format{}, "b", hclog.Format{1, 2}) },
			`level=INFO msg=m a="" b="1 2"`},
		{"hex, octal, binary", func(l hclog.Logger) { l.Info("m", "h", hclog.Hex(255), "o", hclog.Octal(8), "b", hclog.Binary(5)) },
			`level=INFO msg=m h=0xff o=010 b=0b101`},
		{"quote", func(l hclog.Logger) { l.Info("m", "q", hclog.Quote("a\nb")) }, `level=INFO msg=m q="\"a\\nb\""`},
		{"with", func(l hclog.Logger) { l.With("id", hclog.Fmt("%03d", 7)).Info("m", "k", 1) }, `level=INFO msg=m id=007 k=1`},
		{"with twice", func(l hclog.Logger) { l.With("a", 1).With("b", 2).Info("m") }, `level=INFO msg=m a=1 b=2`},
		{"named", func(l hclog.Logger) { l.Named("raft").Named("snap").Info("m") }, `level=INFO msg=m logger=raft.snap`},
		{"renamed", func(l hclog.Logger) { l.Named("raft").With("a", 1).ResetNamed("wal").Info("m") }, `level=INFO msg=m a=1 logger=wal`},
		{"standard logger", func(l hclog.Logger) { l.Named("raft").StandardLogger(nil).Print("m") }, `level=INFO msg=m logger=raft`},
		{"standard writer", func(l hclog.Logger) {
			_, _ = l.StandardWriter(&hclog.StandardLoggerOptions{ForceLevel: hclog.Error}).Write([]byte("m\n"))
		}, `level=ERROR msg=m`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, buf := logTo(slog.LevelDebug, false)
			tt.log(hclogger(l))
			if got := strings.TrimSuffix(buf.String(), "\n"); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestHclogLevelIsTheHandlers(t *testing.T) {
	l, buf := logTo(slog.LevelWarn, false)
	h := hclogger(l)
	h.SetLevel(hclog.Trace)
	h.Info("quiet")
	if buf.Len() != 0 {
		t.Errorf("below the handler's level: %s", buf)
	}
	if h.IsTrace() || h.IsDebug() || h.IsInfo() || !h.IsWarn() || !h.IsError() || h.GetLevel() != hclog.Warn {
		t.Errorf("level is %v, want warn", h.GetLevel())
	}
	off, _ := logTo(slog.LevelError+1, false)
	if got := hclogger(off).GetLevel(); got != hclog.Off {
		t.Errorf("level is %v, want off", got)
	}
}

func TestHclogDerivedLeavesParentAlone(t *testing.T) {
	l, buf := logTo(slog.LevelInfo, false)
	parent := hclogger(l).With("a", 1)
	one, two := parent.With("b", 2), parent.With("c", 3)
	if got := parent.ImpliedArgs(); len(got) != 2 || got[0] != "a" {
		t.Errorf("implied arguments are %v", got)
	}
	one.Info("one")
	two.Info("two")
	parent.Info("parent")
	want := "level=INFO msg=one a=1 b=2\nlevel=INFO msg=two a=1 c=3\nlevel=INFO msg=parent a=1\n"
	if buf.String() != want {
		t.Errorf("got\n%swant\n%s", buf, want)
	}
	if got := parent.Named("x").Name(); got != "x" || parent.Name() != "" {
		t.Errorf("names are %q and %q", got, parent.Name())
	}
}

func TestHclogSourceIsTheCaller(t *testing.T) {
	l, buf := logTo(slog.LevelDebug, true)
	h := hclogger(l)
	h.Info("m")
	h.Log(hclog.Info, "m")
	for line := range strings.Lines(buf.String()) {
		if !strings.Contains(line, "slog_test.go:") {
			t.Errorf("source is not this file: %s", line)
		}
	}
}

// Not parallel: it stands in for the process's standard error.
func TestHclogNilIsSilent(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	old := os.Stderr
	os.Stderr = f
	defer func() { os.Stderr = old }()
	h := hclogger(nil)
	h.Error("m", "k", 1)
	h.Named("raft").With("k", 2).StandardLogger(nil).Print("m")
	if h.IsError() {
		t.Error("a silent logger says that it would write errors")
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
		t.Errorf("wrote %d bytes to standard error (%v)", fi.Size(), err)
	}
}
