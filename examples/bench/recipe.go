package main

// The recipe as a system under test: what one gets by following hashicorp/raft's examples. A map behind a lock is the state machine,
// every write is one Apply, followers send what only the leader can do to the leader over HTTP, and a linearizable read is
// VerifyLeader and a look into the map. The log is kept by raft-boltdb or by raft-wal.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	wal "github.com/hashicorp/raft-wal"
)

type recipeMember struct {
	raft   *raft.Raft
	state  *recipeState
	conf   conf
	server *http.Server
	client *http.Client
	log    logStore
}

type logStore interface {
	raft.LogStore
	raft.StableStore
	io.Closer
}

func openRaftBolt(_ context.Context, c conf) (system, error) {
	return openRecipe(c, func() (logStore, error) { return raftboltdb.NewBoltStore(filepath.Join(c.Dir, "raft.db")) })
}

func openRaftWAL(_ context.Context, c conf) (system, error) {
	return openRecipe(c, func() (logStore, error) {
		dir := filepath.Join(c.Dir, "wal")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		return wal.Open(dir)
	})
}

func openRecipe(c conf, openLog func() (logStore, error)) (system, error) {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	m := &recipeMember{conf: c, state: &recipeState{values: map[string][]byte{}}}
	var err error
	if m.log, err = openLog(); err != nil {
		return nil, err
	}
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Error, Output: os.Stderr})
	config := raft.DefaultConfig()
	config.LocalID, config.Logger = raft.ServerID(c.addr()), logger
	// quorate's, half of the default: a failover should compare what was built and not a setting.
	config.HeartbeatTimeout, config.ElectionTimeout, config.LeaderLeaseTimeout = 500*time.Millisecond, 500*time.Millisecond, 250*time.Millisecond
	cached, err := raft.NewLogCache(512, m.log)
	if err != nil {
		return nil, err
	}
	snapshots, err := raft.NewFileSnapshotStoreWithLogger(c.Dir, 2, logger)
	if err != nil {
		return nil, err
	}
	transport, err := raft.NewTCPTransportWithLogger(c.addr(), nil, 3, 10*time.Second, logger)
	if err != nil {
		return nil, err
	}
	if c.First {
		var all raft.Configuration
		for _, addr := range c.Peers {
			all.Servers = append(all.Servers, raft.Server{ID: raft.ServerID(addr), Address: raft.ServerAddress(addr)})
		}
		if err := raft.BootstrapCluster(config, cached, m.log, snapshots, transport, all); err != nil {
			return nil, err
		}
	}
	if m.raft, err = raft.NewRaft(config, m.state, cached, m.log, snapshots, transport); err != nil {
		return nil, err
	}
	return m, m.serve()
}

// serve takes what followers forward.
func (m *recipeMember) serve() error {
	listener, err := net.Listen("tcp", m.conf.Extra[m.conf.Index])
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /apply", func(w http.ResponseWriter, req *http.Request) {
		command, err := io.ReadAll(req.Body)
		if err == nil {
			err = m.apply(command, 10*time.Second)
		}
		if errors.Is(err, errTaken) {
			w.WriteHeader(http.StatusConflict)
		} else if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("GET /get", func(w http.ResponseWriter, req *http.Request) {
		val, err := m.verifiedGet(req.URL.Query().Get("key"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write(val)
	})
	m.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	m.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: maxWorkers}} // the default of 2 makes a new connection for most calls
	go m.server.Serve(listener)
	return nil
}

func (m *recipeMember) set(ctx context.Context, key string, val []byte) error {
	return m.write(ctx, command('s', key, val))
}

func (m *recipeMember) insert(ctx context.Context, key string, val []byte) error {
	return m.write(ctx, command('i', key, val))
}

// command is what a log entry holds: a verb, the key's length in two bytes, the key, the value.
func command(verb byte, key string, val []byte) []byte {
	c := make([]byte, 0, 3+len(key)+len(val))
	c = append(c, verb)
	c = binary.BigEndian.AppendUint16(c, uint16(len(key)))
	c = append(c, key...)
	return append(c, val...)
}

func (m *recipeMember) write(ctx context.Context, command []byte) error {
	if !m.leads() {
		_, err := m.forward(ctx, "POST", "/apply", command)
		return err
	}
	deadline, _ := ctx.Deadline()
	return m.apply(command, time.Until(deadline))
}

// apply waits for the entry to be committed and applied. limit is for the entry to begin; nothing limits the rest, as in the recipe.
func (m *recipeMember) apply(command []byte, limit time.Duration) error {
	f := m.raft.Apply(command, limit)
	if err := f.Error(); err != nil {
		return err
	}
	err, _ := f.Response().(error)
	return err
}

func (m *recipeMember) get(ctx context.Context, key string) ([]byte, error) {
	if !m.leads() {
		return m.forward(ctx, "GET", "/get?key="+url.QueryEscape(key), nil)
	}
	return m.verifiedGet(key)
}

func (m *recipeMember) verifiedGet(key string) ([]byte, error) {
	if err := m.raft.VerifyLeader().Error(); err != nil {
		return nil, err
	}
	return m.state.get(key), nil
}

func (m *recipeMember) stale(_ context.Context, key string) ([]byte, error) {
	return m.state.get(key), nil
}

func (m *recipeMember) forward(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	_, leader := m.raft.LeaderWithID()
	to := ""
	for i, addr := range m.conf.Peers {
		if addr == string(leader) {
			to = m.conf.Extra[i]
		}
	}
	if to == "" {
		return nil, errors.New("no leader")
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+to+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
	case resp.StatusCode == http.StatusConflict:
		err = errTaken
	case resp.StatusCode != http.StatusOK:
		err = fmt.Errorf("the leader says: %s", data)
	}
	return data, err
}

func (m *recipeMember) leads() bool { return m.raft.State() == raft.Leader }

// ready: the three are in the configuration from the first start, so that a read through the leader says all there is to say.
func (m *recipeMember) ready(ctx context.Context) error {
	for {
		_, err := m.get(ctx, "ready")
		if err == nil {
			return nil
		}
		if wait(ctx, 2*time.Millisecond) != nil {
			return err
		}
	}
}

func (m *recipeMember) caughtUp(ctx context.Context, key string, val []byte) error {
	return awaitGet(ctx, m.stale, key, val)
}

func (m *recipeMember) snapshot(context.Context) error { return m.raft.Snapshot().Error() }

// replace does nothing: the leader sends the member that comes back under its old name a snapshot. Raft's promises do not cover
// this, since votes are forgotten; it is done all the same.
func (m *recipeMember) replace(context.Context, int) error { return nil }

func (m *recipeMember) close() error {
	return errors.Join(m.server.Close(), m.raft.Shutdown().Error(), m.log.Close())
}

// recipeState is the state machine.
type recipeState struct {
	mu     sync.RWMutex      // guards values
	values map[string][]byte // parts of log entries; never changed
}

func (s *recipeState) get(key string) []byte {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.values[key]
}

func (s *recipeState) Apply(l *raft.Log) any {
	verb, rest := l.Data[0], l.Data[3:]
	n := binary.BigEndian.Uint16(l.Data[1:])
	key, val := string(rest[:n]), rest[n:]
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.values[key]; ok && verb == 'i' {
		return errTaken
	}
	s.values[key] = val
	return nil
}

func (s *recipeState) Snapshot() (raft.FSMSnapshot, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return recipeSnapshot(maps.Clone(s.values)), nil
}

func (s *recipeState) Restore(r io.ReadCloser) error {
	defer r.Close()
	in := bufio.NewReader(r)
	values := map[string][]byte{}
	for {
		var sizes [6]byte
		if _, err := io.ReadFull(in, sizes[:]); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		both := make([]byte, int(binary.BigEndian.Uint16(sizes[:]))+int(binary.BigEndian.Uint32(sizes[2:])))
		if _, err := io.ReadFull(in, both); err != nil {
			return err
		}
		n := binary.BigEndian.Uint16(sizes[:])
		values[string(both[:n])] = both[n:]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = values
	return nil
}

type recipeSnapshot map[string][]byte

func (s recipeSnapshot) Persist(sink raft.SnapshotSink) error {
	out := bufio.NewWriter(sink)
	for key, val := range s {
		var sizes []byte
		sizes = binary.BigEndian.AppendUint16(sizes, uint16(len(key)))
		sizes = binary.BigEndian.AppendUint32(sizes, uint32(len(val)))
		out.Write(sizes) // a bufio.Writer keeps its first error for Flush
		out.WriteString(key)
		out.Write(val)
	}
	if err := out.Flush(); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

func (s recipeSnapshot) Release() {}
