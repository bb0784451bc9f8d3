package quorate

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"
)

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("QUORATE_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func TestTry3(t *testing.T) {
	t0 := time.Now()
	c := newCluster(t, 3)
	t.Log("cluster", time.Since(t0))
	ctx := context.Background()
	for i, m := range c {
		t0 = time.Now()
		must(t, m.s.Set(ctx, fmt.Sprint("k", i), []byte("v")))
		t.Log("set", i, time.Since(t0), m.s.Status().Role)
		for _, o := range c {
			t0 = time.Now()
			v, err := o.s.Get(ctx, fmt.Sprint("k", i))
			if err != nil || string(v) != "v" {
				t.Fatal(err, v)
			}
			t.Log("get", time.Since(t0))
		}
	}
	l := c.leader(t)
	t0 = time.Now()
	l.stop()
	t.Log("close leader", time.Since(t0))
	t0 = time.Now()
	for _, m := range c {
		if m.s != nil {
			must(t, m.s.Set(ctx, "after", []byte("x")))
		}
	}
	t.Log("write after", time.Since(t0))
	l.start()
	c.awaitVoters(t, 3)
	c.awaitEqual(t)
	t.Log("end")
}
