package quorate

// The log of our dependencies: an hclog.Logger, which raft and raft-wal ask for, that writes to the caller's slog.Logger.
// It never prints anywhere else. Levels are mapped, and the slog handler filters; a line that has one of ours for a counterpart, or
// that tells of what is normal, is Debug. Values are written as an operator reads them: no Go structs, and a member is its address
// and the first digits of its id. Open makes one and hands it to raft and raft-wal; lines come from their goroutines.

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// init gives the application its standard logger back. raft-wal imports an old etcd package, whose capnslog takes over the
// whole of package log when it is initialized: other lines, or the journal if this process is a child of init.
func init() {
	if fmt.Sprintf("%T", log.Writer()) != "capnslog.packageWriter" {
		return // a newer raft-wal, or somebody has set the output since
	}
	log.SetOutput(os.Stderr)
	if log.Flags() == 0 {
		log.SetFlags(log.LstdFlags)
	}
}

// quiet are the lines of raft that are Debug here, whatever raft takes them for. What is not in this list keeps its level.
var quiet = makeQuiet(
	// A peer that does not answer: outage says so. Raft repeats these up to four times a second for each peer.
	"failed to heartbeat to", "failed to contact", "failed to appendEntries to", "failed to make requestVote RPC",
	// Who leads, or that nobody does: tellLeader.
	"entering follower state", "entering candidate state", "entering leader state", "election won",
	"pre-vote successful, starting election", "pre-vote campaign failed, waiting for election timeout",
	"heartbeat timeout reached, starting election", "Election timeout reached, restarting election",
	"heartbeat timeout reached, not part of a stable configuration or a non-voter, not triggering a leader election",
	"no known peers, aborting election", "not part of stable configuration, aborting election",
	"failed to contact quorum of nodes, stepping down", "new leader elected, stepping down", "peer has newer term, stopping replication",
	"removed ourself, transitioning to follower", "removed ourself, shutting down",
	// A vote that is not given is a part of every election; what comes of it is who leads.
	"rejecting vote request since node is not in configuration", "rejecting vote request since we have a leader",
	"rejecting vote request since node is not a voter", "rejecting vote request since our last term is greater",
	"rejecting vote request since our last index is greater", "rejecting pre-vote request since node is not in configuration",
	"rejecting pre-vote request since we have a leader", "rejecting pre-vote request since node is not a voter",
	"rejecting pre-vote request since our last term is greater", "rejecting pre-vote request since our last index is greater",
	"duplicate requestVote for same term", "duplicate requestVote from",
	// How a leader finds out what a follower's log holds, and replaces what was never committed: so it goes after every change of the
	// leader, at every start, and when an entry that was sent early overtakes another.
	"failed to get previous log", "previous log term mis-match", "appendEntries rejected, sending older logs", "clearing log suffix",
	"skipping application of old log",
	// The log's own trouble: logStore says it once.
	"failed to commit logs", "failed to append to logs",
	// Who takes part: serveJoin, promote and serveRemove.
	"updating configuration", "added peer, starting replication", "updating peer", "removed peer, stopping replication",
	// A snapshot here is one sync of the file. One that is sent is told by InstallSnapshot, and by the fsm of the receiver.
	"starting snapshot up to", "snapshot complete up to", "compacting logs", "no logs to truncate", "removing all old logs from log store",
	"opening snapshot", "installing snapshot on", "failed to install snapshot", "installSnapshot rejected to", "failed to send snapshot to",
	"copied to local snapshot", "Installed remote snapshot", "snapshot network transfer progress", "snapshot restore progress",
)

func makeQuiet(list ...string) map[string]bool {
	m := make(map[string]bool, len(list))
	for _, msg := range list {
		m[msg] = true
	}
	return m
}

// hclogger returns a logger for raft and raft-wal; nil is silence.
func hclogger(l *slog.Logger) hclog.Logger {
	if l == nil {
		return hclog.NewNullLogger()
	}
	return raftLog{base: l, log: l}
}

// raftLog is immutable: With and Named make new ones.
type raftLog struct {
	base    *slog.Logger // without name and implied
	log     *slog.Logger // with both
	name    string
	implied []any // key, value, …
}

func (l raftLog) Log(level hclog.Level, msg string, args ...any) { l.emit(level, msg, args) }
func (l raftLog) Trace(msg string, args ...any)                  { l.emit(hclog.Trace, msg, args) }
func (l raftLog) Debug(msg string, args ...any)                  { l.emit(hclog.Debug, msg, args) }
func (l raftLog) Info(msg string, args ...any)                   { l.emit(hclog.Info, msg, args) }
func (l raftLog) Warn(msg string, args ...any)                   { l.emit(hclog.Warn, msg, args) }
func (l raftLog) Error(msg string, args ...any)                  { l.emit(hclog.Error, msg, args) }

func (l raftLog) IsTrace() bool { return l.enabled(hclog.Trace) }
func (l raftLog) IsDebug() bool { return l.enabled(hclog.Debug) }
func (l raftLog) IsInfo() bool  { return l.enabled(hclog.Info) }
func (l raftLog) IsWarn() bool  { return l.enabled(hclog.Warn) }
func (l raftLog) IsError() bool { return l.enabled(hclog.Error) }

func (l raftLog) ImpliedArgs() []any { return slices.Clone(l.implied) }
func (l raftLog) Name() string       { return l.name }

func (l raftLog) With(args ...any) hclog.Logger {
	return l.derive(l.name, slices.Concat(l.implied, args))
}

func (l raftLog) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.derive(name, l.implied)
}

func (l raftLog) ResetNamed(name string) hclog.Logger { return l.derive(name, l.implied) }

// SetLevel does nothing, which hclog allows: the level belongs to the caller's handler.
func (l raftLog) SetLevel(hclog.Level) {}

func (l raftLog) GetLevel() hclog.Level {
	for _, level := range []hclog.Level{hclog.Debug, hclog.Info, hclog.Warn, hclog.Error} {
		if l.enabled(level) {
			return level
		}
	}
	return hclog.Off
}

func (l raftLog) StandardLogger(opts *hclog.StandardLoggerOptions) *log.Logger {
	level := hclog.Info
	if opts != nil && opts.ForceLevel != hclog.NoLevel {
		level = opts.ForceLevel
	}
	return slog.NewLogLogger(l.log.Handler(), slogLevel(level))
}

func (l raftLog) StandardWriter(opts *hclog.StandardLoggerOptions) io.Writer {
	return l.StandardLogger(opts).Writer()
}

func (l raftLog) derive(name string, implied []any) hclog.Logger {
	out := l.base.With(attrs(implied)...)
	if name != "" {
		out = out.With("logger", name)
	}
	return raftLog{base: l.base, log: out, name: name, implied: implied}
}

func (l raftLog) enabled(level hclog.Level) bool {
	return level != hclog.Off && l.log.Enabled(context.Background(), slogLevel(level))
}

// emit builds the record itself, so that a handler with AddSource shows the line in raft and not one of this file.
// Exactly one method stands between it and the caller.
func (l raftLog) emit(level hclog.Level, msg string, args []any) {
	if quiet[msg] {
		level = hclog.Debug
	}
	if !l.enabled(level) {
		return
	}
	var pc [1]uintptr
	runtime.Callers(3, pc[:]) // Callers, emit, the method
	r := slog.NewRecord(time.Now(), slogLevel(level), shortIDs(msg), pc[0])
	r.Add(attrs(args)...)
	_ = l.log.Handler().Handle(context.Background(), r) // as slog.Logger does: nobody to tell
}

func slogLevel(level hclog.Level) slog.Level {
	switch level {
	case hclog.Trace, hclog.Debug:
		return slog.LevelDebug
	case hclog.Warn:
		return slog.LevelWarn
	case hclog.Error:
		return slog.LevelError
	}
	return slog.LevelInfo
}

// attrs turns hclog's alternating keys and values into slog.Attrs. A last value without a key keeps hclog's name for it.
func attrs(args []any) []any {
	out := make([]any, 0, (len(args)+1)/2)
	for ; len(args) >= 2; args = args[2:] {
		key, ok := args[0].(string)
		if !ok {
			key = fmt.Sprint(args[0])
		}
		out = append(out, slog.Any(key, rendered(args[1])))
	}
	if len(args) == 1 {
		out = append(out, slog.Any(hclog.MissingKey, rendered(args[0])))
	}
	return out
}

// rendered resolves the types with which hclog's callers ask for a certain form, and writes members as we do; slog would print what
// is inside them.
func rendered(v any) any {
	switch v := v.(type) {
	case hclog.Format:
		if len(v) == 0 {
			return ""
		}
		args := make([]any, len(v)-1)
		for i, arg := range v[1:] {
			args[i] = rendered(arg)
		}
		if format, ok := v[0].(string); ok {
			return fmt.Sprintf(format, args...)
		}
		return fmt.Sprint(append([]any{v[0]}, args...)...)
	case hclog.Hex:
		return "0x" + strconv.FormatUint(uint64(v), 16)
	case hclog.Octal:
		return "0" + strconv.FormatUint(uint64(v), 8)
	case hclog.Binary:
		return "0b" + strconv.FormatUint(uint64(v), 2)
	case hclog.Quote:
		return strconv.Quote(string(v))
	case raft.Server:
		return peerName(v.ID, v.Address)
	case []raft.Server:
		names := make([]string, len(v))
		for i, m := range v {
			names[i] = peerName(m.ID, m.Address)
		}
		return strings.Join(names, ", ")
	case raft.ServerID:
		return shortID(string(v))
	case *raft.ServerID:
		if v != nil {
			return shortID(string(*v))
		}
		return ""
	case *raft.ServerAddress:
		if v != nil {
			return shortIDs(string(*v))
		}
		return ""
	case string:
		return shortIDs(v)
	case error:
		if text := v.Error(); wholeID.MatchString(text) {
			return shortIDs(text)
		}
	case *raft.Raft:
		return shortIDs(v.String())
	case raft.ServerAddress:
		return shortIDs(string(v))
	}
	return v
}
