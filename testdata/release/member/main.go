// Command member is one member of a cluster, built by the tests against the source of an earlier release: it serves the
// other members at /raft/ and does at POST /do what a test orders. It ends when its standard input does.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/quorate/quorate"
)

// The order and the report of the tests' own member processes, as far as an earlier release can obey.
type order struct {
	Op      string
	Key     string
	Value   []byte
	Timeout time.Duration
}

type report struct {
	Verdict string
	Value   []byte
	Status  quorate.Status
	Error   string
}

func main() {
	log.SetFlags(0)
	var c quorate.Config
	flag.StringVar(&c.Dir, "dir", "", "directory")
	flag.StringVar(&c.Addr, "addr", "", "address")
	flag.StringVar(&c.Join, "join", "", "where the cluster answers")
	flag.Parse()
	if err := run(c); err != nil {
		log.Fatal(err)
	}
}

func run(c quorate.Config) error {
	s, err := quorate.Open(context.Background(), c)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("/raft/", s)
	mux.HandleFunc("POST /do", func(w http.ResponseWriter, req *http.Request) {
		var o order
		if err := json.NewDecoder(req.Body).Decode(&o); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		json.NewEncoder(w).Encode(obey(s, o))
	})
	l, err := net.Listen("tcp", c.Addr)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	go http.Serve(l, mux)
	io.Copy(io.Discard, os.Stdin)
	return s.Close()
}

func obey(s *quorate.Service, o order) report {
	ctx, cancel := context.WithTimeout(context.Background(), o.Timeout)
	defer cancel()
	var r report
	var err error
	switch o.Op {
	case "set":
		err = s.Set(ctx, o.Key, o.Value)
	case "insert":
		err = s.Insert(ctx, o.Key, o.Value)
	case "delete":
		err = s.Delete(ctx, o.Key)
	case "get":
		r.Value, err = s.Get(ctx, o.Key)
	case "allow":
		err = s.AddAllowedMember(ctx, o.Key)
	case "ready":
		err = s.Ready(ctx)
	case "err":
		err = s.Err()
	case "status":
		r.Status = s.Status()
	default:
		err = errors.New("unknown order")
	}
	r.Verdict = verdict(err)
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

func verdict(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, quorate.ErrUnsatisfied):
		return "unsatisfied"
	case errors.Is(err, quorate.ErrNotApplied):
		return "not applied"
	case errors.Is(err, quorate.ErrUncertain):
		return "uncertain"
	}
	return err.Error()
}
