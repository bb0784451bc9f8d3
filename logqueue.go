package quorate

// The way of this member's lines to the caller's log handler. The handler is code of the caller's: it may block, panic or call the
// Service, while lines are written by raft's main loop, by apply and under locks. So they wait in a queue, which this file owns, and a
// goroutine hands them over. Open makes the queue, and Close waits for what is in it. slog.go decides what the lines of raft say.

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const lastLines = time.Second // that Open and Close wait for the handler

const maxLines = 1024 // that wait for the caller's handler; more are left out, and counted

// queuedLog is a handler that puts lines into a queue. What else it asks of the caller's handler is asked at once.
type queuedLog struct {
	lines *logLines
	to    slog.Handler
}

func (q queuedLog) Enabled(ctx context.Context, level slog.Level) (enabled bool) {
	defer func() { _ = recover() }() // then it is not
	return q.to.Enabled(ctx, level)
}

func (q queuedLog) Handle(_ context.Context, r slog.Record) error {
	q.lines.put(logLine{q.to, r.Clone()})
	return nil
}

func (q queuedLog) WithAttrs(attrs []slog.Attr) (h slog.Handler) {
	defer func() {
		if recover() != nil {
			h = q
		}
	}()
	return queuedLog{q.lines, q.to.WithAttrs(attrs)}
}

func (q queuedLog) WithGroup(name string) (h slog.Handler) {
	defer func() {
		if recover() != nil {
			h = q
		}
	}()
	return queuedLog{q.lines, q.to.WithGroup(name)}
}

type logLine struct {
	to slog.Handler
	r  slog.Record
}

func (l logLine) hand() {
	defer func() { _ = recover() }() // the line is lost: there is nobody to tell
	_ = l.to.Handle(context.Background(), l.r)
}

// logLines are the lines of one Service that wait for its caller's handler. The goroutine that hands them over lives only while
// there are any.
type logLines struct {
	to slog.Handler

	mu      sync.Mutex    // guards the fields below; never held while a handler runs
	waiting []logLine     // at most maxLines
	lost    int           // found no room since that was last said
	empty   chan struct{} // closed when all that waited was handed over; nil = nothing waits
}

func newLogLines(to slog.Handler) *logLines { return &logLines{to: to} }

func (q *logLines) logger() *slog.Logger { return slog.New(queuedLog{q, q.to}) }

func (q *logLines) put(l logLine) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) >= maxLines {
		q.lost++
		return
	}
	q.waiting = append(q.waiting, l)
	if q.empty == nil {
		q.empty = make(chan struct{})
		go q.handOver()
	}
}

// handOver ends when nothing waits. A handler may end the goroutine too, as a test's Fatal does.
func (q *logLines) handOver() {
	done := false
	defer func() {
		if !done {
			go q.handOver()
		}
	}()
	for l, more := q.next(); more; l, more = q.next() {
		l.hand()
	}
	done = true
}

func (q *logLines) next() (l logLine, more bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case len(q.waiting) > 0:
		l, q.waiting = q.waiting[0], q.waiting[1:]
	case q.lost > 0:
		l = logLine{q.to, slog.NewRecord(time.Now(), slog.LevelWarn, "lines are missing here: the log's handler was too slow", 0)}
		l.r.Add("lines", q.lost)
		q.lost = 0
	default:
		q.waiting = nil
		close(q.empty)
		q.empty = nil
		return l, false
	}
	return l, true
}

// flush waits until what waits now was handed over, or for the limit.
func (q *logLines) flush(limit time.Duration) {
	q.mu.Lock()
	empty := q.empty
	q.mu.Unlock()
	if empty == nil {
		return
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-empty:
	case <-t.C:
	}
}
