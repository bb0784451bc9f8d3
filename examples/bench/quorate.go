package main

// quorate as a system under test: opened with the defaults, as the example trio does it.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/quorate/quorate"
)

type quorateMember struct {
	db     *quorate.Service
	server *http.Server
	snaps  *snapshotCounter
}

func openQuorate(ctx context.Context, c conf) (system, error) {
	q := &quorateMember{snaps: &snapshotCounter{}}
	// The others keep their keys in memory without a limit.
	config := quorate.Config{Memory: 1 << 30, Dir: c.Dir, Addr: c.addr(), Join: c.Peers[(c.Index+1)%3], Logger: slog.New(q.snaps)}
	if c.First && c.Index == 0 {
		config.Join = "" // it begins the cluster
	} else if c.First {
		config.Join = c.Peers[0]
	}
	var err error
	for {
		q.db, err = quorate.Open(ctx, config)
		if !errors.Is(err, quorate.ErrNotAllowed) { // the first member is still opening, or has not yet said so
			break
		}
		if wait(ctx, 5*time.Millisecond) != nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", c.addr())
	if err != nil {
		return nil, errors.Join(err, q.db.Close())
	}
	q.server = &http.Server{Handler: q.db, ReadHeaderTimeout: 5 * time.Second}
	go q.server.Serve(listener)
	if c.First && c.Index == 0 {
		for _, addr := range c.Peers[1:] {
			if err := q.db.AddAllowedMember(ctx, addr); err != nil {
				return nil, errors.Join(err, q.close())
			}
		}
	}
	return q, nil
}

func (q *quorateMember) set(ctx context.Context, key string, val []byte) error {
	return q.db.Set(ctx, key, val)
}

func (q *quorateMember) insert(ctx context.Context, key string, val []byte) error {
	err := q.db.Insert(ctx, key, val)
	if errors.Is(err, quorate.ErrUnsatisfied) {
		return errTaken
	}
	return err
}

func (q *quorateMember) get(ctx context.Context, key string) ([]byte, error) {
	return q.db.Get(ctx, key)
}

func (q *quorateMember) stale(_ context.Context, key string) ([]byte, error) {
	return q.db.Stale().Get(key), nil
}

func (q *quorateMember) leads() bool { return q.db.Status().Role == quorate.Leader }

func (q *quorateMember) ready(ctx context.Context) error {
	for {
		voters := 0
		for _, m := range q.db.Status().Members {
			if m.Voter {
				voters++
			}
		}
		if voters == 3 {
			return q.db.Ready(ctx)
		}
		if err := wait(ctx, 2*time.Millisecond); err != nil {
			return fmt.Errorf("%d voters: %w", voters, err)
		}
	}
}

func (q *quorateMember) caughtUp(ctx context.Context, key string, val []byte) error {
	own := q.db.Stale()
	for !bytes.Equal(own.Get(key), val) {
		if err := wait(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// snapshot waits for one, which comes with about 8,192 entries: there is no call for it, as it costs one fsync. It waits on until there
// is one at which the beginning of the log was cut off, of which the last 10,240 entries stay.
func (q *quorateMember) snapshot(ctx context.Context) error {
	for before := q.snaps.n.Load(); ; {
		if err := wait(ctx, time.Millisecond); err != nil {
			return err
		}
		if now := q.snaps.n.Load(); now == before {
			continue
		} else if before = now; q.db.Status().LastIndex > 10_240 {
			return nil
		}
	}
}

// replace does nothing: a member that comes back empty to an allowed address takes the place of the one that was there.
func (q *quorateMember) replace(context.Context, int) error { return nil }

func (q *quorateMember) close() error { return errors.Join(q.db.Close(), q.server.Close()) }

// A snapshotCounter is a slog.Handler that drops every line and counts those that end a snapshot.
type snapshotCounter struct{ n atomic.Int64 }

func (h *snapshotCounter) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

func (h *snapshotCounter) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "snapshot complete") {
		h.n.Add(1)
	}
	return nil
}

func (h *snapshotCounter) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *snapshotCounter) WithGroup(string) slog.Handler      { return h }
