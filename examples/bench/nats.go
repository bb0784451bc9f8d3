package main

// NATS JetStream's key-value buckets as a system under test: the server embedded in the member's process, and one connection to it
// inside the process.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	bucketName = "bench"
	streamName = "KV_" + bucketName
	subject    = "$KV." + bucketName + "."
	account    = "$G"
)

type natsMember struct {
	server *server.Server
	conn   *nats.Conn
	kv     jetstream.KeyValue
	stream jetstream.Stream
	old    nats.JetStreamContext // has the read that only the leader answers
}

func openNATS(ctx context.Context, c conf) (system, error) {
	options := &server.Options{
		ServerName: fmt.Sprint("member-", c.Index),
		Host:       "127.0.0.1", Port: portOf(c.Extra[c.Index]), // without a port for clients it never opens the one for its peers
		NoSigs: true, LogFile: c.Dir + ".log",
		JetStream: true, StoreDir: c.Dir,
		SyncAlways: true, // the default syncs every two minutes
		Cluster:    server.ClusterOpts{Name: "bench", Host: "127.0.0.1", Port: portOf(c.addr())},
	}
	for i, addr := range c.Peers {
		if i != c.Index {
			options.Routes = append(options.Routes, &url.URL{Scheme: "nats", Host: addr})
		}
	}
	s, err := server.NewServer(options)
	if err != nil {
		return nil, err
	}
	s.ConfigureLogger()
	s.Start()
	n := &natsMember{server: s}
	if !s.ReadyForConnections(30 * time.Second) {
		return nil, errors.Join(errors.New("nats: not ready for connections"), n.close())
	}
	if err := n.connect(ctx, c.First && c.Index == 0); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func portOf(addr string) int {
	_, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	return n
}

func (n *natsMember) connect(ctx context.Context, create bool) (err error) {
	if n.conn, err = nats.Connect("", nats.InProcessServer(n.server), nats.MaxReconnects(-1)); err != nil {
		return err
	}
	if n.old, err = n.conn.JetStream(); err != nil {
		return err
	}
	js, err := jetstream.New(n.conn)
	if err != nil {
		return err
	}
	for {
		err := within(ctx, time.Second, func(ctx context.Context) (err error) {
			if create {
				n.kv, err = js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
					Bucket: bucketName, History: 1, Replicas: 3, Storage: jetstream.FileStorage})
			} else {
				n.kv, err = js.KeyValue(ctx, bucketName)
			}
			if err == nil {
				n.stream, err = js.Stream(ctx, streamName)
			}
			return err
		})
		if err == nil {
			return nil
		}
		if wait(ctx, 5*time.Millisecond) != nil {
			return fmt.Errorf("nats: bucket: %w", err)
		}
	}
}

func (n *natsMember) set(ctx context.Context, key string, val []byte) error {
	_, err := n.kv.Put(ctx, key, val)
	return err
}

func (n *natsMember) insert(ctx context.Context, key string, val []byte) error {
	_, err := n.kv.Create(ctx, key, val)
	if errors.Is(err, jetstream.ErrKeyExists) {
		return errTaken
	}
	return err
}

// get asks the stream's leader. It is the strongest read there is, but not a linearizable one: a leader that has been deposed and
// does not know it yet answers too.
func (n *natsMember) get(ctx context.Context, key string) ([]byte, error) {
	msg, err := n.old.GetLastMsg(streamName, subject+key, nats.Context(ctx))
	if errors.Is(err, nats.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return msg.Data, nil
}

// stale is the bucket's Get, a "direct get": any replica may answer, and NATS prefers the one in this process.
func (n *natsMember) stale(ctx context.Context, key string) ([]byte, error) {
	entry, err := n.kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return entry.Value(), nil
}

func (n *natsMember) leads() bool { return n.server.JetStreamIsStreamLeader(account, streamName) }

// ready: a bucket of three replicas exists from the moment when this member is open.
func (n *natsMember) ready(ctx context.Context) error {
	for {
		err := within(ctx, time.Second, func(ctx context.Context) error {
			info, err := n.stream.Info(ctx)
			if err == nil && (info.Cluster == nil || info.Cluster.Leader == "" || len(info.Cluster.Replicas) != 2) {
				err = errors.New("nats: the stream has no leader or too few replicas")
			}
			return err
		})
		if err == nil {
			return nil
		}
		if wait(ctx, 2*time.Millisecond) != nil {
			return err
		}
	}
}

// caughtUp compares positions in the stream, since a direct get may be answered by another replica while this one is not ready.
func (n *natsMember) caughtUp(ctx context.Context, key string, val []byte) error {
	if err := awaitGet(ctx, n.get, key, val); err != nil {
		return err
	}
	msg, err := n.old.GetLastMsg(streamName, subject+key, nats.Context(ctx))
	if err != nil {
		return err
	}
	for {
		detail, err := n.server.JszAccount(&server.JSzOptions{Account: account, Streams: true})
		if err == nil {
			for _, s := range detail.Streams {
				if s.Name == streamName && s.State.LastSeq >= msg.Sequence && n.server.JetStreamIsStreamCurrent(account, streamName) {
					return nil
				}
			}
		}
		if wait(ctx, 2*time.Millisecond) != nil {
			return fmt.Errorf("nats: the own replica is behind (error %v): %w", err, ctx.Err())
		}
	}
}

func (n *natsMember) snapshot(context.Context) error {
	return n.server.JetStreamSnapshotStream(account, streamName)
}

// replace does nothing: replicas are known by their server's name, and one that comes back empty is brought up to date.
func (n *natsMember) replace(context.Context, int) error { return nil }

func (n *natsMember) close() error {
	if n.conn != nil {
		n.conn.Close()
	}
	n.server.Shutdown()
	n.server.WaitForShutdown()
	return nil
}
