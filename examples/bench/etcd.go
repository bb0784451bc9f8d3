package main

// etcd as a system under test: the server embedded in the member's process, with the in-process client that etcd offers for it.

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

type etcdMember struct {
	etcd   *embed.Etcd
	client *clientv3.Client
	conf   conf
}

func openEtcd(ctx context.Context, c conf) (system, error) {
	config := embed.NewConfig() // fsync is on, heartbeats are 100 ms apart, elections begin after 1 s
	config.Name, config.Dir = etcdName(c.Index), c.Dir
	config.ListenPeerUrls, config.AdvertisePeerUrls = etcdURL(c.addr()), etcdURL(c.addr())
	config.ListenClientUrls, config.AdvertiseClientUrls = etcdURL(c.Extra[c.Index]), etcdURL(c.Extra[c.Index])
	var all []string
	for i, addr := range c.Peers {
		all = append(all, etcdName(i)+"=http://"+addr)
	}
	config.InitialCluster = strings.Join(all, ",")
	if c.Lost {
		config.ClusterState = embed.ClusterStateFlagExisting
	}
	// A store of which every old version is kept slows down and hits the default quota of 2 GiB in the middle of a run. 8 GiB is the most
	// that its documentation advises; 10,000 is what quorate keeps of its history.
	config.AutoCompactionMode, config.AutoCompactionRetention = embed.CompactorModeRevision, "10000"
	config.QuotaBackendBytes = 8 << 30
	config.LogLevel, config.LogOutputs = "error", []string{embed.StdErrLogOutput} // its warnings of slow disks would cost it time
	e, err := embed.StartEtcd(config)
	if err != nil {
		return nil, err
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		return nil, err
	case <-ctx.Done():
		e.Close()
		return nil, fmt.Errorf("etcd is not ready: %w", ctx.Err())
	}
	return &etcdMember{etcd: e, client: v3client.New(e.Server), conf: c}, nil
}

func etcdName(i int) string { return fmt.Sprint("member-", i) }

func etcdURL(addr string) []url.URL { return []url.URL{{Scheme: "http", Host: addr}} }

func (e *etcdMember) set(ctx context.Context, key string, val []byte) error {
	_, err := e.client.Put(ctx, key, string(val))
	return err
}

func (e *etcdMember) insert(ctx context.Context, key string, val []byte) error {
	absent := clientv3.Compare(clientv3.CreateRevision(key), "=", 0)
	resp, err := e.client.Txn(ctx).If(absent).Then(clientv3.OpPut(key, string(val))).Commit()
	if err == nil && !resp.Succeeded {
		err = errTaken
	}
	return err
}

func (e *etcdMember) get(ctx context.Context, key string) ([]byte, error) { return e.read(ctx, key) }

func (e *etcdMember) stale(ctx context.Context, key string) ([]byte, error) {
	return e.read(ctx, key, clientv3.WithSerializable())
}

func (e *etcdMember) read(ctx context.Context, key string, opts ...clientv3.OpOption) ([]byte, error) {
	resp, err := e.client.Get(ctx, key, opts...)
	if err != nil || len(resp.Kvs) == 0 {
		return nil, err
	}
	return resp.Kvs[0].Value, nil
}

func (e *etcdMember) leads() bool { return e.etcd.Server.Leader() == e.etcd.Server.MemberID() }

// ready: the members are in the configuration from the first start, so that a linearizable read says all there is to say.
func (e *etcdMember) ready(ctx context.Context) error {
	for {
		err := within(ctx, time.Second, func(ctx context.Context) error {
			_, err := e.get(ctx, "ready")
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

func (e *etcdMember) caughtUp(ctx context.Context, key string, val []byte) error {
	return awaitGet(ctx, e.stale, key, val)
}

// snapshot waits for the next that comes by itself: there is one at least for every SnapshotCount entries.
func (e *etcdMember) snapshot(ctx context.Context) error {
	s := e.etcd.Server
	for from := s.AppliedIndex(); s.AppliedIndex() <= from+s.Cfg.SnapshotCount+1; {
		if err := wait(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// replace takes the lost member out and adds its address again, under which it then has a new id.
func (e *etcdMember) replace(ctx context.Context, lost int) error {
	list, err := e.client.MemberList(ctx)
	if err != nil {
		return err
	}
	for _, m := range list.Members {
		if m.Name != etcdName(lost) {
			continue
		}
		if err := e.untilHealthy(ctx, func() error { _, err := e.client.MemberRemove(ctx, m.ID); return err }); err != nil {
			return err
		}
		return e.untilHealthy(ctx, func() error {
			_, err := e.client.MemberAdd(ctx, []string{"http://" + e.conf.Peers[lost]})
			return err
		})
	}
	return errors.New("no such member")
}

// untilHealthy repeats what etcd refuses while members have been connected for less than five seconds.
func (e *etcdMember) untilHealthy(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil || !strings.Contains(err.Error(), "unhealthy cluster") {
			return err
		}
		if wait(ctx, 50*time.Millisecond) != nil {
			return err
		}
	}
}

func (e *etcdMember) close() error {
	e.etcd.Close()
	return nil
}
