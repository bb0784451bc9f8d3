// Cluster starts three members as three processes of this machine, writes, reads, races, kills the leader under load,
// restarts it, and checks that nothing that was acknowledged is missing anywhere. It ends by itself, with status 1 if
// anything is wrong. The files stay under the system's temporary directory for you to look at.
//
// A member is what your own service would be: it serves the store's /raft/ and, beside it, an API of its own.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/quorate/quorate"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) == 4 {
		member(os.Args[1], os.Args[2], os.Args[3])
		return
	}
	drive()
}

// check ends the process; members end when their driver has.
func check(err error, doing string) {
	if err != nil {
		log.Fatalf("%s: %v", doing, err)
	}
}

// member is one of the three processes.
func member(addr, dir, join string) {
	db, err := quorate.Open(context.Background(), quorate.Config{Dir: dir, Addr: addr, Join: join})
	check(err, "open")
	server := &http.Server{Addr: addr, Handler: handler(db), ReadHeaderTimeout: 5 * time.Second}
	go func() { check(server.ListenAndServe(), "serve") }()
	io.Copy(io.Discard, os.Stdin) // until the driver closes it or is gone
	check(db.Close(), "close")    // before the server, which ends with the process: a member is reached as long as it is one
}

func handler(db *quorate.Service) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/raft/", db)
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, req *http.Request) { answer(w, nil, db.Ready(req.Context())) })
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, req *http.Request) {
		data, err := json.Marshal(db.Status())
		answer(w, data, err)
	})
	mux.HandleFunc("PUT /members/{addr}", func(w http.ResponseWriter, req *http.Request) {
		answer(w, nil, db.AddAllowedMember(req.Context(), req.PathValue("addr")))
	})
	mux.HandleFunc("GET /keys/{key...}", func(w http.ResponseWriter, req *http.Request) {
		val, err := db.Get(req.Context(), req.PathValue("key"))
		answer(w, val, err)
	})
	mux.HandleFunc("PUT /keys/{key...}", func(w http.ResponseWriter, req *http.Request) { write(w, req, db.Set) })
	mux.HandleFunc("POST /keys/{key...}", func(w http.ResponseWriter, req *http.Request) { write(w, req, db.Insert) })
	mux.HandleFunc("POST /count", func(w http.ResponseWriter, req *http.Request) { // of these keys, in this member's own copy
		keys, err := io.ReadAll(req.Body)
		own, n := db.Stale(), 0
		for key := range strings.FieldsSeq(string(keys)) {
			if string(own.Get(key)) == "value of "+key {
				n++
			}
		}
		answer(w, fmt.Append(nil, n), err)
	})
	return mux
}

func write(w http.ResponseWriter, req *http.Request, verb func(context.Context, string, []byte) error) {
	val, err := io.ReadAll(http.MaxBytesReader(w, req.Body, 1<<20))
	if err == nil {
		err = verb(req.Context(), req.PathValue("key"), val)
	}
	answer(w, nil, err)
}

// answer gives each verdict a status of its own, so that a client knows what it may do next.
func answer(w http.ResponseWriter, body []byte, err error) {
	switch {
	case err == nil:
		w.Write(body)
	case errors.Is(err, quorate.ErrUnsatisfied):
		http.Error(w, err.Error(), http.StatusPreconditionFailed)
	case errors.Is(err, quorate.ErrUncertain): // read before you write again
		http.Error(w, err.Error(), http.StatusGatewayTimeout)
	default: // nothing happened
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	}
}

// A process is a member as the driver sees it.
type process struct {
	addr, dir string
	cmd       *exec.Cmd
	stdin     io.Closer
}

func (p *process) start(join string) {
	self, err := os.Executable()
	check(err, "find this program")
	p.cmd = exec.Command(self, p.addr, p.dir, join)
	p.cmd.Stderr = os.Stderr
	p.stdin, err = p.cmd.StdinPipe()
	check(err, "pipe")
	check(p.cmd.Start(), "start a member")
}

var client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

var errPrecondition = errors.New("412")

func (p *process) call(method, path, body string) (string, error) {
	req, err := http.NewRequest(method, "http://"+p.addr+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	switch {
	case err == nil && resp.StatusCode == http.StatusPreconditionFailed:
		err = errPrecondition
	case err == nil && resp.StatusCode != http.StatusOK:
		err = fmt.Errorf("%s %s: %s: %s", method, req.URL, resp.Status, data)
	}
	return string(data), err
}

func (p *process) status() (st quorate.Status, err error) {
	text, err := p.call("GET", "/status", "")
	if err == nil {
		err = json.Unmarshal([]byte(text), &st)
	}
	return st, err
}

// await asks until f is content, and ends the program with its last complaint if it never is.
func await(what string, f func() error) {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			check(err, what)
		}
	}
}

func say(what, format string, args ...any) {
	fmt.Printf("%-8s %s\n", what, fmt.Sprintf(format, args...))
}

func drive() {
	dir, err := os.MkdirTemp("", "quorate-cluster-")
	check(err, "directory")
	var all []*process
	port := 10000 + rand.IntN(20000) // below those that systems give to outgoing connections
	for i := range 3 {
		all = append(all, &process{addr: fmt.Sprint("127.0.0.1:", port+i), dir: filepath.Join(dir, fmt.Sprint(i+1))})
	}
	start(all)

	_, err = all[1].call("PUT", "/keys/color", "blue")
	check(err, "write")
	say("write", "on member 2: color = blue")
	color, err := all[2].call("GET", "/keys/color", "")
	check(err, "read")
	say("read", "on member 3: color = %s", color)
	if color != "blue" {
		log.Fatal("that is not what was written")
	}
	race(all)
	failover(all)

	for _, p := range all {
		check(p.stdin.Close(), "stop a member")
	}
	for _, p := range all {
		check(p.cmd.Wait(), "end of a member")
	}
	fmt.Printf("\nLook inside:\n  sqlite3 -readonly %s/snap 'select key, value, version from kv limit 5'\n", all[0].dir)
}

func start(all []*process) {
	began := time.Now()
	for _, p := range all {
		if p == all[0] {
			p.start("") // there is nothing to join: this one begins a cluster
		} else {
			_, err := all[0].call("PUT", "/members/"+p.addr, "")
			check(err, "allow a member")
			p.start(all[0].addr) // any member would do, and so would a load balancer
		}
		await("ready", func() error { _, err := p.call("GET", "/ready", ""); return err })
	}
	await("three voters", func() error {
		st, err := all[0].status()
		voters := 0
		for _, m := range st.Members {
			if m.Voter {
				voters++
			}
		}
		if err == nil && voters < len(all) {
			err = fmt.Errorf("%d of them", voters)
		}
		return err
	})
	say("start", "three processes are three voters after %d ms, at %s and the next two ports", time.Since(began).Milliseconds(), all[0].addr)
}

// race inserts one key on all members at once: one wins, whichever it is.
func race(all []*process) {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, p := range all {
		wg.Go(func() { _, errs[i] = p.call("POST", "/keys/lock", fmt.Sprint("member ", i+1)) })
	}
	wg.Wait()
	winner, refused := 0, 0
	for i, err := range errs {
		switch err {
		case nil:
			winner = i + 1
		case errPrecondition:
			refused++
		}
	}
	if winner == 0 || refused != 2 {
		log.Fatal("race: want one winner and two refusals: ", errs)
	}
	say("race", "the same Insert on all three at once: member %d won, %d got ErrUnsatisfied", winner, refused)
}

// load is many writers on all members, each write with a key of its own.
type load struct {
	mu    sync.Mutex    // guards the fields below
	acked []string      // keys
	last  time.Time     // of the newest acknowledgement
	pause time.Duration // the longest time without one in this lap
}

func (l *load) write(ctx context.Context, writer int, all []*process) {
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("load/%d/%d", writer, n)
		_, err := all[(writer+n/100)%len(all)].call("PUT", "/keys/"+key, "value of "+key)
		l.mu.Lock()
		if err == nil { // otherwise it may be there or not, and nobody was told
			l.acked, l.pause, l.last = append(l.acked, key), max(l.pause, time.Since(l.last)), time.Now()
		}
		l.mu.Unlock()
	}
}

// lap returns how many writes are acknowledged and the longest pause of this lap, and begins the next.
func (l *load) lap() (acked int, pause time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	pause, l.pause = l.pause, 0
	return len(l.acked), pause
}

// failover kills the leader under load, restarts it, and counts what is there.
func failover(all []*process) {
	st, err := all[0].status()
	check(err, "status")
	leader, other := all[0], all[1]
	for _, p := range all[1:] {
		if p.addr == st.LeaderAddr {
			leader, other = p, all[0]
		}
	}
	l := &load{last: time.Now()}
	ctx, stop := context.WithCancel(context.Background())
	var writers sync.WaitGroup
	for writer := range 24 {
		writers.Go(func() { l.write(ctx, writer, all) })
	}
	time.Sleep(time.Second)
	n, _ := l.lap()
	say("load", "24 writers on all three: %s writes acknowledged in the first second", comma(n))

	check(leader.cmd.Process.Kill(), "kill") // SIGKILL: no handler runs, nothing is flushed
	leader.cmd.Wait()
	before, _ := l.lap()
	var pause time.Duration
	await("writes after the kill", func() error {
		n, longest := l.lap()
		if pause = max(pause, longest); n < before+100 { // more than could still be on their way
			return fmt.Errorf("%d of them", n-before)
		}
		return nil
	})
	time.Sleep(time.Second)
	st, err = other.status()
	check(err, "status")
	say("kill -9", "of the leader, %s: writes paused for %d ms; now %s leads", leader.addr, pause.Milliseconds(), st.LeaderAddr)

	began := time.Now()
	leader.start(other.addr)
	await("ready", func() error { _, err := leader.call("GET", "/ready", ""); return err })
	say("restart", "of the killed member: ready after %d ms", time.Since(began).Milliseconds())
	time.Sleep(time.Second)
	stop()
	writers.Wait()
	l.check(all)
}

// check compares what was acknowledged with what each member holds.
func (l *load) check(all []*process) {
	var hash string
	await("equal states", func() error {
		first, err := all[0].status()
		hash = first.Hash
		for _, p := range all[1:] {
			st, statusErr := p.status()
			err = errors.Join(err, statusErr)
			if st.AppliedIndex != first.AppliedIndex || st.Hash != first.Hash {
				err = errors.Join(err, fmt.Errorf("%s at index %d, %s at index %d", first.Hash, first.AppliedIndex, st.Hash, st.AppliedIndex))
			}
		}
		return err
	})
	for _, p := range all {
		n, err := p.call("POST", "/count", strings.Join(l.acked, "\n"))
		check(err, "count")
		if n != fmt.Sprint(len(l.acked)) {
			log.Fatalf("LOST: %d writes were acknowledged and %s holds %s of them", len(l.acked), p.addr, n)
		}
	}
	n := comma(len(l.acked))
	say("check", "%s acknowledged, %s present on all three, hashes equal (%s)", n, n, hash)
}

func comma(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", comma(n/1000), n%1000)
}
