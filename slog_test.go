package quorate

import (
	"errors"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// logTo returns a logger from this level on and the bytes that it writes, one line per record, without the time.
func logTo(level slog.Level, source bool) (*slog.Logger, *safeBuffer) {
	buf := new(safeBuffer)
	return slog.New(slog.NewTextHandler(buf, &slog.HandlerOptions{
		Level:     level,
		AddSource: source,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	})), buf
}

var stderr = os.Stderr // go test -json puts another file in its place

func TestStandardLogIsTheApplications(t *testing.T) {
	if log.Writer() != stderr || log.Flags() != log.LstdFlags {
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
		{"a member", func(l hclog.Logger) {
			l.Info("m", "peer", raft.Server{ID: "547fe683d4355776d3b1727a609919de", Address: "a:1"}, "id", raft.ServerID("547fe683d4355776d3b1727a609919de"))
		}, `level=INFO msg=m peer="a:1 (547fe683)" id=547fe683`},
		{"members", func(l hclog.Logger) {
			l.Info("m", "servers", hclog.Fmt("%+v", []raft.Server{{ID: "547fe683d4355776d3b1727a609919de", Address: "a:1"}, {ID: "1", Address: "b:1"}}))
		}, `level=INFO msg=m servers="a:1 (547fe683), b:1 (1)"`},
		{"a whole id in words", func(l hclog.Logger) {
			l.Info("to 547fe683d4355776d3b1727a609919de", "e", errors.New("at 547fe683d4355776d3b1727a609919de"), "s", "547fe683d4355776d3b1727a609919de")
		}, `level=INFO msg="to 547fe683" e="at 547fe683" s=547fe683`},
		{"pointers", func(l hclog.Logger) {
			id, addr := raft.ServerID("547fe683d4355776d3b1727a609919de"), raft.ServerAddress("a:1")
			l.Info("m", "id", &id, "address", &addr, "none", (*raft.ServerID)(nil))
		}, `level=INFO msg=m id=547fe683 address=a:1 none=""`},
		{"one with a counterpart", func(l hclog.Logger) { l.Error("failed to heartbeat to", "peer", "a:1") }, `level=DEBUG msg="failed to heartbeat to" peer=a:1`},
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

// loud are raft's lines at Warn and above that keep their level: each is a fault of this machine's disk, or should never be seen.
var loud = map[string]bool{
	"pre-vote is disabled because it is not supported by the Transport": true, "failed to get log": true, "failed to list snapshots": true,
	"restore committed logs enabled but log store does not support it": true, "failed to get commit index from store": true,
	"failed to get last log index from store": true, "could not get configuration for stats": true, "failed to remove old logs": true,
	"failed to stage commit index in commit tracking log store": true, "got unexpected command": true, "expected heartbeat, got": true,
	"failed to get log entry": true, "failed to clear log suffix": true, "failed to append entry": true, "failed to get last vote term": true,
	"failed to get last vote candidate": true, "failed to persist vote": true, "failed to create snapshot to install": true,
	"failed to copy snapshot": true, "failed to receive whole snapshot": true, "failed to finalize snapshot": true,
	"failed to restore snapshot": true, "failed to reset logs": true, "failed to compact logs": true,
	"target does not support pre-vote RPC, treating as granted": true, "failed to start pipeline replication to": true,
	"failed to open snapshot": true, "failed to pipeline appendEntries": true, "failed to take snapshot": true,
	"failed to get last log index": true,
}

// TestRaftsLinesAreKnown reads raft's source: a line that a newer raft has, or has no more, is seen here.
func TestRaftsLinesAreKnown(t *testing.T) {
	t.Parallel()
	file, _ := runtime.FuncForPC(reflect.ValueOf(raft.NewRaft).Pointer()).FileLine(0)
	line := regexp.MustCompile(`logger\.(Debug|Info|Warn|Error)\("([^"]+)"`)
	found := make(map[string]bool)
	for _, name := range []string{"api.go", "raft.go", "replication.go", "snapshot.go", "fsm.go", "progress.go"} {
		text, err := os.ReadFile(filepath.Join(filepath.Dir(file), name))
		if err != nil {
			t.Skip("raft's source is not there:", err)
		}
		for _, m := range line.FindAllStringSubmatch(string(text), -1) {
			found[m[2]] = true
			if (m[1] == "Warn" || m[1] == "Error") && !quiet[m[2]] && !loud[m[2]] {
				t.Errorf("raft logs %q at %s, and nobody has thought about it", m[2], m[1])
			}
		}
	}
	for msg := range loud {
		if !found[msg] {
			t.Errorf("raft does not log %q", msg)
		}
	}
	for msg := range quiet {
		if !found[msg] && !strings.HasPrefix(msg, "snapshot ") {
			t.Errorf("raft does not log %q", msg)
		}
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
