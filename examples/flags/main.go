// Flags keeps feature flags on three members, three processes of this machine, and shows them on a live page of each. Switch a
// flag on one page, and the other two repaint; kill a member, and see what the others make of it; start it again. Ctrl-C ends
// all three. The standard library is enough: the pages are html/template and server-sent events.
//
// A member is what your own service would be: /raft/ beside its own routes, on one port. Only main, which starts, kills and
// restarts the processes, is for show.
package main

import (
	"bufio"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/quorate/quorate"
)

const prefix = "flags/" // of every key; the rest of it is the flag's name

func main() {
	log.SetFlags(0)
	if len(os.Args) > 3 {
		number, err := strconv.Atoi(os.Args[1])
		check(err, "member")
		serve(number, os.Args[2], os.Args[3:])
		return
	}
	if err := supervise(); err != nil {
		log.Fatal(err)
	}
}

func check(err error, doing string) {
	if err != nil {
		log.Fatalf("%s: %v", doing, err)
	}
}

// A member is one of the three processes, and what it knows.
type member struct {
	number int // from 1
	addrs  []string
	db     *quorate.Service

	mu      sync.Mutex           // guards the fields below
	missing string               // what keeps it from writing; empty: nothing
	heard   map[string]time.Time // by address: the newest sign of life that it knows of
}

func (m *member) addr() string { return m.addrs[m.number-1] }

// serve is the process of a member, which ends when its standard input does. Its standard output goes to the supervisor, a line
// for each thing that it shall do.
func serve(number int, dir string, addrs []string) {
	signal.Ignore(os.Interrupt) // Ctrl-C reaches every process of a terminal; the supervisor ends this one
	ctx := context.Background()
	m := &member{number: number, addrs: addrs, missing: "it has only just started", heard: make(map[string]time.Time)}
	var err error
	m.db, err = quorate.Open(ctx, quorate.Config{Dir: dir, Addr: m.addr(), Bootstrap: addrs}) // the same for all, at every start
	check(err, "open")
	listener, err := net.Listen("tcp", m.addr())
	check(err, "listen")
	server := &http.Server{Handler: m.handler(), ReadHeaderTimeout: 5 * time.Second}
	go server.Serve(listener)
	go m.look(ctx)
	go m.begin(ctx)
	io.Copy(io.Discard, os.Stdin)
	check(m.db.Close(), "close") // first: it ends every Watch, and with it the pages' requests, which Shutdown waits for
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	check(server.Shutdown(ctx), "shut down")
}

// begin says when this member is ready. The first one makes the flags; at later starts that changes nothing, for they are inserted
// only if they are missing.
func (m *member) begin(ctx context.Context) {
	err := m.db.Ready(ctx)
	for errors.Is(err, context.DeadlineExceeded) { // a minute has passed, and the others are down
		err = m.db.Ready(ctx)
	}
	if err != nil {
		return // the page says why
	}
	if m.number == 1 {
		for _, name := range []string{"dark-mode", "new-checkout", "search-v2"} {
			if err := m.db.Insert(ctx, prefix+name, []byte("off")); err != nil && !errors.Is(err, quorate.ErrUnsatisfied) {
				log.Print(err)
			}
		}
	}
	fmt.Println("ready", m.number)
}

func (m *member) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/raft/", m.db)
	mux.HandleFunc("GET /{$}", m.page)
	mux.HandleFunc("GET /events", m.events)
	mux.HandleFunc("GET /members", func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(m.db.Status().Members) })
	mux.HandleFunc("PUT /flags/{name...}", func(w http.ResponseWriter, req *http.Request) {
		value, err := io.ReadAll(http.MaxBytesReader(w, req.Body, 100))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		m.change(w, req, quorate.Set(prefix+req.PathValue("name"), value))
	})
	mux.HandleFunc("DELETE /flags/{name...}", func(w http.ResponseWriter, req *http.Request) {
		m.change(w, req, quorate.Delete(prefix+req.PathValue("name")))
	})
	mux.HandleFunc("POST /processes/{number}/{verb}", func(w http.ResponseWriter, req *http.Request) {
		fmt.Println(req.PathValue("verb"), req.PathValue("number"))
	})
	return http.NewCrossOriginProtection().Handler(mux) // the members' own calls are no browser's, and pass
}

// change carries out what a page asks for, if the flag is still as that page shows it: of two people who click at the same time
// the second is told, and does not undo what the first has done.
func (m *member) change(w http.ResponseWriter, req *http.Request, op quorate.Op) {
	version, err := strconv.ParseUint(req.URL.Query().Get("version"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(req.Context(), 3*time.Second)
	defer cancel()
	name := req.PathValue("name")
	revision, err := m.db.Exec(ctx, quorate.IfVersion(prefix+name, version), op)
	switch {
	case err == nil:
		fmt.Fprintf(w, "%s was changed at revision %d.", name, revision)
	case errors.Is(err, quorate.ErrUnsatisfied):
		http.Error(w, fmt.Sprintf("Not done: %s has changed since you saw it (%v).", name, err), http.StatusPreconditionFailed)
	case errors.Is(err, quorate.ErrUncertain):
		http.Error(w, fmt.Sprintf("It may be done or not: %v.", err), http.StatusGatewayTimeout)
	default:
		http.Error(w, fmt.Sprintf("Not done: %v.", err), http.StatusServiceUnavailable)
	}
}

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// A row is one flag on the page, and one message about it.
type row struct {
	Kind    string `json:"kind"` // set, delete, reset, synced
	Name    string `json:"name"`
	Value   string `json:"value"`
	Version uint64 `json:"version"`
}

func newRow(kind quorate.EventKind, e quorate.Entry) row {
	return row{kind.String(), strings.TrimPrefix(e.Key, prefix), string(e.Value), e.Version}
}

// A link leads to a member's page.
type link struct {
	Number int
	Addr   string
}

// page shows this member's own copy, at once and whoever else is down. The page then asks for the events since that revision.
func (m *member) page(w http.ResponseWriter, req *http.Request) {
	data := struct {
		Number   int
		Members  []link
		Revision uint64 // read before the flags: nothing is missed, and seeing a change again does no harm
		Flags    []row
		New      row
	}{Number: m.number, Revision: m.db.Local().Freshness().Revision}
	for i, addr := range m.addrs {
		data.Members = append(data.Members, link{i + 1, addr})
	}
	for e, err := range m.db.Local().List(req.Context(), prefix) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		data.Flags = append(data.Flags, newRow(quorate.EventSet, e))
	}
	if err := pageTemplate.Execute(w, data); err != nil {
		log.Print(err)
	}
}

// events sends every change since the last one that the page has, as server-sent events whose id is the revision, and what this
// member knows of itself and the others twice a second. It ends when the page is closed or the member is.
func (m *member) events(w http.ResponseWriter, req *http.Request) {
	since, _ := strconv.ParseUint(cmp.Or(req.Header.Get("Last-Event-ID"), req.URL.Query().Get("since")), 10, 64)
	ctx, cancel := context.WithCancel(req.Context())
	defer cancel()
	changes := make(chan quorate.Event)
	go func() {
		defer close(changes)
		for e, err := range m.db.Watch(ctx, prefix, since, quorate.Resync()) {
			if err != nil {
				return // the page comes again by itself
			}
			select {
			case changes <- e:
			case <-ctx.Done():
			}
		}
	}()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	fmt.Fprint(w, "retry: 500\n\n") // milliseconds
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	err := send(w, 0, m.status())
	for err == nil {
		select {
		case e, ok := <-changes:
			if !ok {
				return
			}
			err = send(w, e.Revision, newRow(e.Kind, e.Entry))
		case <-tick.C:
			err = send(w, 0, m.status())
		}
	}
}

// send makes one event. Revision 0 gives it no id: after such a one a page resumes where it was before.
func send(w http.ResponseWriter, revision uint64, message any) error {
	data, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if revision > 0 {
		fmt.Fprintf(w, "id: %d\n", revision)
	}
	fmt.Fprintf(w, "data: %s\n\n", data)
	return http.NewResponseController(w).Flush()
}

type status struct {
	Kind     string    `json:"kind"` // status
	Role     string    `json:"role"`
	Leader   string    `json:"leader"` // its address; empty: none is known
	Revision uint64    `json:"revision"`
	Age      float64   `json:"age"`     // seconds by which this copy can be behind, at most; negative: not known
	Missing  string    `json:"missing"` // what keeps it from writing
	Heard    []float64 `json:"heard"`   // of each member, seconds since its last sign of life; negative: none
}

func (m *member) status() status {
	st, fresh := m.db.Status(), m.db.Local().Freshness()
	s := status{Kind: "status", Role: st.Role.String(), Leader: st.LeaderAddr, Revision: fresh.Revision, Age: secondsSince(fresh.AsOf)}
	m.mu.Lock()
	defer m.mu.Unlock()
	s.Missing = m.missing
	for _, addr := range m.addrs {
		s.Heard = append(s.Heard, secondsSince(m.heard[addr]))
	}
	return s
}

func secondsSince(t time.Time) float64 {
	if t.IsZero() {
		return -1
	}
	return time.Since(t).Seconds()
}

// look finds out, for all pages of this member, what Status and Freshness alone don't say: whether a write would be accepted,
// how fresh the copy is when nobody reads (a read makes sure), and who has been heard by the leader, who talks to everybody.
func (m *member) look(ctx context.Context) {
	for {
		round, cancel := context.WithTimeout(ctx, time.Second)
		missing := ""
		err := m.db.Ready(round)
		if err == nil {
			_, err = m.db.Get(round, prefix)
		}
		if err != nil {
			missing = err.Error()
		}
		st := m.db.Status()
		members := st.Members
		if st.Role != quorate.Leader && st.LeaderAddr != "" {
			members = append(members, membersOf(round, st.LeaderAddr)...)
		}
		cancel()
		m.mu.Lock()
		m.missing = missing
		for _, other := range members {
			at := time.Now().Add(-other.Heard)
			if other.Heard >= 0 && at.After(m.heard[other.Addr]) {
				m.heard[other.Addr] = at
			}
		}
		m.mu.Unlock()
		time.Sleep(400 * time.Millisecond)
	}
}

// membersOf asks another member whom it has heard. Nobody, if it does not answer.
func membersOf(ctx context.Context, addr string) (list []quorate.Member) {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+addr+"/members", nil)
	if err != nil {
		return nil
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil
	}
	defer resp.Body.Close()
	json.NewDecoder(resp.Body).Decode(&list)
	return list
}

// A process is a member as the supervisor sees it.
type process struct {
	number int
	cmd    *exec.Cmd // nil while it is down
	stdin  io.Closer // the process ends when this is closed
}

// An order is a line of a member's standard output, or its end.
type order struct {
	verb   string // ready, kill, start, ended
	number int
}

// start lets the process run until it ends, and passes on what it orders.
func (p *process) start(dir string, addrs []string, orders chan<- order) {
	self, err := os.Executable()
	check(err, "find this program")
	p.cmd = exec.Command(self, append([]string{fmt.Sprint(p.number), filepath.Join(dir, fmt.Sprint(p.number))}, addrs...)...)
	p.cmd.Stderr = os.Stderr
	p.stdin, err = p.cmd.StdinPipe()
	check(err, "pipe")
	stdout, err := p.cmd.StdoutPipe()
	check(err, "pipe")
	check(p.cmd.Start(), "start a member")
	go func(cmd *exec.Cmd) {
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var o order
			if n, _ := fmt.Sscan(lines.Text(), &o.verb, &o.number); n == 2 && o.number >= 1 && o.number <= len(addrs) {
				orders <- o
			}
		}
		cmd.Wait()
		orders <- order{"ended", p.number}
	}(p.cmd)
}

// A supervisor starts the processes and does what they order. All of it happens in one goroutine.
type supervisor struct {
	dir     string
	addrs   []string
	all     []*process
	orders  chan order
	ready   int // how often a member has become ready
	running int
	closing bool
	err     error
}

// supervise runs until Ctrl-C, or until a member fails before all of them have been ready.
func supervise() error {
	interrupt, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	dir, err := os.MkdirTemp("", "quorate-flags-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s := &supervisor{dir: dir, addrs: freeAddrs(), orders: make(chan order), all: []*process{{number: 1}, {number: 2}, {number: 3}}}
	go func() {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); { // Enter
			for _, p := range s.all {
				s.orders <- order{"start", p.number}
			}
		}
	}()
	for _, p := range s.all {
		s.start(p)
	}
	for interrupted := interrupt.Done(); !s.closing || s.running > 0; {
		select {
		case <-interrupted:
			stop() // a second Ctrl-C ends this program at once, and so its members
			interrupted = nil
			s.end()
		case o := <-s.orders:
			s.obey(o)
		}
	}
	return s.err
}

func (s *supervisor) start(p *process) {
	s.running++
	p.start(s.dir, s.addrs, s.orders)
}

func (s *supervisor) end() {
	s.closing = true
	for _, p := range s.all {
		if p.cmd != nil {
			p.stdin.Close()
		}
	}
}

func (s *supervisor) obey(o order) {
	p := s.all[o.number-1]
	switch {
	case o.verb == "ready":
		switch s.ready++; {
		case s.ready == len(s.all):
			s.welcome()
		case s.ready > len(s.all):
			fmt.Printf("member %d is back\n", p.number)
		}
	case o.verb == "kill" && p.cmd != nil:
		p.cmd.Process.Kill() // SIGKILL: no handler runs, nothing is flushed
	case o.verb == "start" && p.cmd == nil && s.ready >= len(s.all) && !s.closing:
		s.start(p)
	case o.verb == "ended":
		p.cmd = nil
		s.running--
		switch {
		case s.closing:
		case s.ready < len(s.all):
			s.err = fmt.Errorf("member %d has failed", p.number)
			s.end()
		default:
			fmt.Printf("member %d is down; start it on another one's page, or with Enter\n", p.number)
		}
	}
}

func (s *supervisor) welcome() {
	fmt.Println("Three members run. Open their pages side by side:")
	for _, addr := range s.addrs {
		fmt.Printf("  http://%s/\n", addr)
	}
	fmt.Printf("Look inside:\n  sqlite3 -readonly %s 'select key, value, version from kv'\n", filepath.Join(s.dir, "1", "snap"))
	fmt.Println("Ctrl-C ends all three and removes their files.")
}

// freeAddrs are three addresses of this machine on which nobody listens.
func freeAddrs() []string {
	for port := 7001; ; port = 10000 + rand.IntN(20000) { // below those that systems give to outgoing connections
		var addrs []string
		for i := range 3 {
			addr := fmt.Sprint("127.0.0.1:", port+i)
			if l, err := net.Listen("tcp", addr); err == nil {
				l.Close()
				addrs = append(addrs, addr)
			}
		}
		if len(addrs) == 3 {
			return addrs
		}
	}
}
