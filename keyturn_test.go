package quorate

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// waiting is how many turns there are of a key, the one that is on included.
func (q *keyTurns) waiting(key string) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l := q.byKey[key]; l != nil {
		return l.Len()
	}
	return 0
}

func increment(old Entry) ([]byte, error) {
	n, _ := strconv.Atoi(string(old.Value))
	return strconv.AppendInt(nil, int64(n+1), 10), nil
}

// A function that takes so long that another Update of the key could always come in between gets its write in at the first try, and
// those that came meanwhile follow in their order.
func TestUpdatesTakeTurns(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	const others = 10
	var callers sync.WaitGroup
	var mu sync.Mutex // guards order
	var order []int
	calls := 0
	_, err := s.Update(t.Context(), "k", func(old Entry) ([]byte, error) {
		if calls++; calls > 1 {
			return nil, errors.New("another update has overtaken it")
		}
		for i := range others {
			done := make(chan struct{})
			callers.Go(func() {
				defer close(done)
				_, err := s.Update(t.Context(), "k", func(old Entry) ([]byte, error) {
					mu.Lock()
					defer mu.Unlock()
					order = append(order, i)
					return increment(old)
				})
				if err != nil {
					t.Error(err)
				}
			})
			eventually(t, patience, "the next one waits, or is done", func() error {
				select {
				case <-done:
				default:
					if n := s.updates.waiting("k"); n != i+2 {
						return fmt.Errorf("%d turns", n)
					}
				}
				return nil
			})
		}
		_, err := s.Update(t.Context(), "another", increment) // which waits for nobody
		must(t, err)
		return increment(old)
	})
	must(t, err)
	callers.Wait()
	if got := string(s.Stale().Get("k")); got != fmt.Sprint(others+1) || !slices.IsSorted(order) || len(order) != others {
		t.Errorf("%s updates, in the order %v", got, order)
	}
	if n := s.updates.waiting("k"); n != 0 {
		t.Errorf("%d turns are left", n)
	}
}

func TestTurnsEnd(t *testing.T) {
	for name, f := range map[string]func(t *testing.T, s *Service){
		"whoever leaves holds up nobody": func(t *testing.T, s *Service) {
			reason := errors.New("enough")
			ctx, leave := context.WithCancelCause(t.Context())
			left, stayed := make(chan error, 1), make(chan error, 1)
			_, err := s.Update(t.Context(), "k", func(old Entry) ([]byte, error) {
				go func() { _, err := s.Update(ctx, "k", increment); left <- err }()
				synctest.Wait()
				go func() { _, err := s.Update(t.Context(), "k", increment); stayed <- err }()
				synctest.Wait()
				leave(reason)
				if err := <-left; !errors.Is(err, reason) || !errors.Is(err, ErrNotApplied) {
					t.Errorf("who leaves gets %v", err)
				}
				return increment(old)
			})
			began := time.Now()
			must(t, errors.Join(err, <-stayed))
			if d := time.Since(began); d >= turnLimit {
				t.Errorf("who stayed waited %v", d)
			}
		},
		"an Update in an Update of the key": func(t *testing.T, s *Service) {
			calls := 0
			_, err := s.Update(t.Context(), "k", func(old Entry) ([]byte, error) {
				if calls++; calls == 1 {
					_, err := s.Update(t.Context(), "k", increment)
					must(t, err)
				} else if n := s.updates.waiting("k"); n != 1 {
					t.Errorf("%d turns at the second try, whose first turn has ended", n)
				}
				return increment(old)
			})
			must(t, err)
		},
		"two that wait for each other's key": func(t *testing.T, s *Service) {
			var both sync.WaitGroup
			begun := make(chan struct{}, 2)
			for i, key := range []string{"k", "l"} {
				both.Go(func() {
					once := false
					_, err := s.Update(t.Context(), key, func(old Entry) ([]byte, error) {
						if !once {
							once = true
							begun <- struct{}{}
							for len(begun) < 2 {
								time.Sleep(time.Millisecond)
							}
							_, err := s.Update(t.Context(), []string{"l", "k"}[i], increment)
							must(t, err)
						}
						return increment(old)
					})
					must(t, err)
				})
			}
			both.Wait()
		},
		"a slow one and those behind it": func(t *testing.T, s *Service) {
			slow, fast := make(chan error, 1), make(chan error, 1)
			calls := 0
			go func() {
				_, err := s.Update(t.Context(), "k", func(old Entry) ([]byte, error) {
					if calls++; calls == 1 {
						time.Sleep(5 * time.Second)
					}
					return increment(old)
				})
				slow <- err
			}()
			synctest.Wait()
			began := time.Now()
			go func() { _, err := s.Update(t.Context(), "k", increment); fast <- err }()
			must(t, <-fast)
			if d := time.Since(began); d != turnLimit {
				t.Errorf("waited %v for one turn", d)
			}
			must(t, <-slow)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, err := Open(t.Context(), Config{Dir: filepath.Join(t.TempDir(), "data")})
				must(t, err)
				defer s.Close()
				began := time.Now()
				f(t, s)
				if got := string(s.Stale().Get("k")); got != "2" {
					t.Errorf("%s updates, want 2", got)
				}
				if d := time.Since(began); d > 20*time.Second {
					t.Errorf("it took %v", d)
				}
				if n := s.updates.waiting("k") + s.updates.waiting("l"); n != 0 {
					t.Errorf("%d turns are left", n)
				}
			})
		})
	}
}

// Close ends the wait for a turn.
func TestCloseEndsTheWaitForATurn(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	waits, on := make(chan error, 1), make(chan struct{})
	_, err := s.Update(t.Context(), "k", func(old Entry) ([]byte, error) {
		go func() {
			close(on)
			_, err := s.Update(t.Context(), "k", increment)
			waits <- err
		}()
		<-on
		eventually(t, patience, "the other one waits", func() error {
			if n := s.updates.waiting("k"); n != 2 {
				return fmt.Errorf("%d turns", n)
			}
			return nil
		})
		must(t, s.Close())
		if err := <-waits; !errors.Is(err, ErrClosed) || !errors.Is(err, ErrNotApplied) {
			t.Errorf("who waits gets %v", err)
		}
		if n := s.updates.waiting("k"); n != 1 {
			t.Errorf("%d turns when who waited has left", n)
		}
		return increment(old)
	})
	if !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}
