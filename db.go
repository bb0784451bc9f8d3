// Package quorate is a durable, replicated key-value store inside your own processes: the configuration, flags, ownership
// and registry of a service, without a server to run beside it. One process is an embedded store; start the next with the
// first one's address and they are a cluster. It has transactions, lists, watches and SQL that reads, on every member. Its state
// is an SQLite file. It needs neither CGO nor gRPC.
//
//	s, err := quorate.Start("10.0.0.1:7001", "/var/lib/app/quorate", "", nil, false)
//	if err != nil { … }
//	http.Handle("/raft/", s)
//	go http.ListenAndServe(":7001", nil)
//	err = s.Set(ctx, "flags/new-checkout", []byte("on"))
//	…
//	err = s.Close() // and then the server's Shutdown, not the other way round
//
// # What an acknowledged write means
//
// Set, Insert, Delete, Exec and Update return without an error once the write is in the log on the disks of a majority of the
// members (with fsync), and applied on the member that was called. Get, Lookup, List and Query are linearizable on every member:
// they see every write that returned before they were called, and no clock takes part in that. Local and Stale read this member's
// own copy at once, without asking anybody.
//
// Every change has a revision, one more than the change before, and an entry's Version is the revision of its last set. Exec
// makes a transaction depend on versions and values; Watch delivers every change after a revision, each once, in order.
//
// An error of a write says what became of it: ErrUnsatisfied and ErrNotApplied, that nothing happened and nothing will;
// ErrUncertain, that the caller must look.
//
// # What lies on disk
//
// The directory holds three entries: id (who this member is), snap (the state) and wal (the log). snap is an SQLite
// database that anyone may read while the program runs:
//
//	sqlite3 -readonly /var/lib/app/quorate/snap 'select key, value, version from kv'
//	sqlite3 -readonly /var/lib/app/quorate/snap 'select revision, key, value, deleted from history'
//
// It follows what is acknowledged by a moment, or by a few seconds under full load; Query, List and Backup miss nothing. The same
// file is the snapshot that a lagging member receives, and the backup.
//
// # What it is not for
//
// The whole state is on every member and every write passes through one leader: it is for megabytes to a few gigabytes of
// what a service must agree on, not for its bulk data. Three or five members in one region; not a cache, not a queue, not a
// way to share a disk between continents.
//
// # Reading the code
//
// One Set: db.go (the call) → tx.go (its limits and its verdict) → op.go (its bytes) → batch.go (one entry for all that wait) →
// raft and logstore.go (the log), ahead.go (to the others meanwhile) → fsm.go (apply) → sqlstore.go and memory.go (the state) →
// the answer; then flush.go, conn.go and history.go (the file). One Get: view.go (the call) → read.go (the round) → memory.go.
// What else reads: list.go, watch.go, query.go. One Update: keyturn.go (whose turn it is), then a Get and a Set.
//
// How members talk: peer.go, transport.go, link.go and frame.go; copy.go, pieces.go and fetch.go (how a state travels). Who takes
// part: member.go, join.go (how one asks to), waiting.go (who waits to), founding.go (how members begin together), stranger.go (who else
// has this address). Who leads: succession.go (when the leader is gone), handover.go (when it should not lead). How a directory comes
// to life: identity.go (who this member is), recover.go, restore.go (out of a backup). What is wrong: health.go (the faults), space.go
// (how much the disk has left), pace.go (how fast it is), disk.go (which errors pass), names.go and seat.go (files taken away, locks
// dropped), reach.go (who reaches whom), certificate.go. What is said: status.go (a Status as JSON), journal.go (lines about the
// others), slog.go (raft's lines), logqueue.go (their way to the caller).
package quorate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"
)

// Errors are told apart with errors.Is. Every error of a write other than ErrUnsatisfied is exactly one of ErrNotApplied
// and ErrUncertain, and may be one of the others too.
var (
	// ErrUnsatisfied: a precondition did not hold when the write's turn came. Nothing changed. Of Exec it is a *ConditionError,
	// which says which one.
	ErrUnsatisfied = errors.New("precondition not satisfied")

	// ErrNotApplied: the write did not happen and will not. Retrying is safe.
	ErrNotApplied = errors.New("not applied")
	// ErrUncertain: the write may have happened or may still happen. Read before you retry, unless doing it twice is the
	// same as once.
	//
	// When ctx has ended, the write is not sent again, unless another call of this member travels in the same log entry and still
	// waits. The same holds after 5 s of a leader whose disks, or those of too many others, are full: it takes no writes, and this
	// one may be in its log. A copy that is on its way may take effect until the member's next entry, which goes out at once, is in the log: so
	// after a cut of the network an old value may land over one that another member has written meanwhile, in the moment before
	// the two halves have spoken. It never lands over a later write through this Service that was acknowledged.
	ErrUncertain = errors.New("may or may not be applied")

	ErrNoLeader   = errors.New("no leader")                                // no majority of the voters can be reached; retrying is safe
	ErrInvalid    = errors.New("invalid argument")                         // the call can never succeed as it is
	ErrTooLarge   = errors.New("too large")                                // a *LimitError says what and by how much
	ErrClosed     = errors.New("closed")                                   // Close was called
	ErrRemoved    = errors.New("this member was removed from the cluster") // for good: its id never comes back
	ErrNotAllowed = errors.New("address not allowed to join")              // call AddAllowedMember on an existing member first
	ErrLocked     = errors.New("directory is in use")                      // by another Service, in this process or another
	ErrFormat     = errors.New("unknown format")                           // written by a newer version, or by something else
	ErrCorrupt    = errors.New("corrupt data")                             // the message names the file and the repair

	ErrNotFound  = errors.New("no such key")
	ErrCompacted = errors.New("the history no longer reaches back that far") // a *CompactedError says how far; begin anew, or use Resync
	ErrSlow      = errors.New("the consumer is too slow")                    // it took nothing for a minute, or held too much; begin anew
)

// LimitError says which limit a call broke. It is ErrTooLarge.
type LimitError struct {
	What       string // what is counted: "key bytes", "value bytes", "operations", "transaction bytes", "state bytes"
	Limit, Got int64
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("%v: %d %s, the limit is %d", ErrTooLarge, e.Got, e.What, e.Limit)
}

func (e *LimitError) Is(target error) bool { return target == ErrTooLarge }

// Getter reads a key. The value is a copy and nil if the key is missing.
type Getter interface {
	Get(key string) (value []byte)
}

// Config says how to open a member. The zero value of every field but Dir works.
type Config struct {
	// Dir holds everything that this member keeps. Required; created with mode 0700. One Service at a time. A relative path and
	// symbolic links are resolved once, by Open; the result can have 486 bytes, for SQLite takes no more. A link to nothing, as to a disk
	// that is not mounted, is ErrCorrupt, here and where id, snap or wal is one: nothing is made in its place.
	Dir string
	// Addr is the host:port at which peers reach this member. Empty: one member, no network, nothing to serve. Such a
	// directory can be opened with an Addr later and becomes the first member of a cluster.
	Addr string
	// Join is where an existing cluster answers: any member's address or URL, a name that stands for all of them (its addresses are
	// asked in turn, this member's own is passed over), or a load balancer in front of them. Each try is a new connection. Empty:
	// begin a new cluster. Ignored once Dir holds state, so it can always be given.
	Join string
	// Bootstrap makes a first start that can be repeated: the addresses of the members that begin the cluster together, the same list
	// on each of them and at every start, in any order. It is ignored once Dir holds state, that of Restore too; a start that was
	// ended while the founders waited goes on. Where a cluster answers at one of the addresses, this member joins it. Otherwise all
	// wait until each of them answers with the same list and an empty directory; then the smallest address begins the cluster, and
	// the others are allowed to join. A member whose Addr is not in the list only ever joins. A cluster that calls Addr from elsewhere
	// is never joined: while it answers this member waits, and Err names it, to be given as Join if it is the right one.
	//
	// Open returns at once, as nothing listens on Addr yet. Until this member has a cluster, Ready says who is missing, Err shows what
	// no waiting mends, Status.ID is empty, and calls wait as long as their contexts last. No write and no linearizable read is
	// answered before a majority of these addresses vote, so that nothing acknowledged rests on one disk. From then on a founder
	// whose directory was lost starts with an empty one and is a member again. All directories empty at once are a first start. Once
	// the members have moved away from these addresses, take Bootstrap away: empty directories there would begin another cluster.
	//
	// ErrInvalid with Join, without Addr, with a duplicate, and with more than 64 addresses.
	Bootstrap []string
	// Client carries every request to a peer, and with it the TLS identity. nil is http.DefaultClient. It is used through a
	// copy that has no Timeout and follows no redirect. Where its Transport is nil too and http.DefaultTransport is a plain
	// *http.Transport, what a write waits for takes connections of its own, dialed as that one would.
	Client *http.Client
	// TLS: peers are called with https, and callers without TLS are refused.
	TLS bool
	// Logger receives what an operator should know; nil is silent. Values never appear in it. Its handler gets one line at a time,
	// in order, in a goroutine of the Service's: it may wait, or call the Service, and delays nothing by that. Up to 1,024 lines
	// wait for it, then some are left out, and it is told how many. A line at which it panics is lost.
	Logger *slog.Logger
	// Timeout limits every call whose context has no deadline, and joining. 0 is one minute.
	Timeout time.Duration
	// MaxValue limits a value, in bytes. 0 is 1 MiB; at most 16 MiB.
	MaxValue int
	// MaxState limits the state: the bytes of all keys and values, which Status calls Size, and not those of the file, which also
	// holds the history and does not shrink. 0 is no limit. A write that would make the state larger than this is refused with a
	// *LimitError by the member that is called, before the log and by what that member has applied, so that what is on its way
	// meanwhile may exceed it. Deletes, and values that are no larger than those they replace, go on at any size. Give all members
	// the same.
	MaxState int64
	// Memory is how many bytes of state are also kept in memory, for reads. 0 is 64 MiB; negative is none. A state that is
	// larger is read from SQLite.
	Memory int64
	// History is how many changes are kept, for watches that resume and for people: rows of the table history. 0 is 10,000.
	// The first member's value holds for the cluster: it is part of the state, and what is given later, with more than one
	// member, changes nothing. Each change takes the disk space of its value once more.
	History int

	space   func(dir string) diskSpace                               // what its file system has; nil is the system's: a seam for tests that fill the disk
	vfs     types.VFS                                                // the log's files; nil is the system's: a seam for tests that break the disk
	segment int                                                      // bytes of a segment of the log; 0 is 8 MiB: a seam for tests of many segments
	lookup  func(ctx context.Context, host string) ([]string, error) // the addresses of a boot address's name; nil is the system's: a seam for tests
	format  uint64                                                   // what this member says it reads, and raises a cluster to; 0 is entryFormat: a seam for tests that play an older version
}

// Service is one member: it holds the data and takes part in the cluster. All methods may be called concurrently, on every
// member, leader or not.
type Service struct {
	conf    Config // with the defaults filled in
	log     *slog.Logger
	lines   *logLines // of log, on their way to the caller's handler
	updates keyTurns  // whose turn it is with which key
	lock    *dirLock
	store   *store
	wal     *logStore
	names   *nameWatch // of the files that are neither the log's nor the state's
	fsm     *fsm
	peer    *peer
	snaps   *snapshotStore
	batch   *batcher
	reads   *rounds
	hub     *hub
	asOf    latest // how old this member's copy can be: see Freshness

	identMu  sync.Mutex                // held while id is written; it guards the store of identity
	identity atomic.Pointer[identity]  // who this member is: see ident
	raft     atomic.Pointer[raft.Raft] // nil until Open is nearly done; replaced by restartRaft
	starts   atomic.Uint64             // odd while raft is started and s.raft may not be the one that votes
	faults   faults
	changes  broadcast              // the leader, as this member knows it, or its state changed
	members  peerTable              // what is known of the others beside the configuration
	voteless waitingList            // by id: why a member has no vote
	refused  waitingList            // by address: why nobody takes part from there
	reach    reachTable             // what became of this member's calls to them
	reign    reign                  // of the leader that this member knows
	heldBack atomic.Pointer[string] // who keeps the state at its format, as this leader has found; nil = nobody
	panel    panel                  // whom this leader's read rounds ask
	telling  sync.Mutex             // held by the one caller that tells raft of a commit (awaitApplied)
	changing chan struct{}          // one change of the configuration at a time on this leader: see changeMembers
	joined   chan struct{}          // has room for one: a member has joined or moved, and the leader looks at once whether it can be a voter

	begun        atomic.Int64             // when the raft that runs was started, by monotonic
	handing      chan struct{}            // one hand-over at a time: see handOver
	transferring atomic.Pointer[transfer] // what raft has not answered yet; nil = none
	turns        turns
	relief       relief
	refusal      atomic.Pointer[error] // why this leader takes no writes; nil = it does
	refusing     broadcast             // it takes none, each time that this is found
	ballast      *ballast
	trial        trial
	audible      atomic.Bool   // this member is not silent although its disk hangs: no election would help
	replaced     atomic.Bool   // a voter that is fit would lead in the place of this leader, whose log waits for space
	fitness      chan struct{} // has room for one: this member's fitness to lead may have changed

	founding   *founding  // set by Open, if this member has no cluster yet and Config.Bootstrap; else nil
	strangers  strangers  // other clusters that call this address
	confirming sync.Mutex // held by the one caller that has a quorum confirm the leader for an outsider

	ctx       context.Context // of everything that runs in the background; ends in Close
	cancel    context.CancelFunc
	running   sync.WaitGroup // every goroutine of this Service
	closing   sync.Once
	closed    chan struct{} // closed when Close has ended
	closeErr  error
	raftMu    sync.Mutex    // held while raft is started, restarted or shut down; guards ended
	ended     chan struct{} // closed when the raft that runs has shut down; nil = it was not told to
	rebuildCh chan struct{}
}

// Start opens a member with the defaults: see Open and Config. laddr is Config.Addr, bootURL is Config.Join. The caller
// registers the Service for the pattern "/raft/" and serves on laddr, before or after Start.
func Start(laddr, dir, bootURL string, httpClient *http.Client, useTLS bool) (*Service, error) {
	return Open(context.Background(), Config{Dir: dir, Addr: laddr, Join: bootURL, Client: httpClient, TLS: useTLS})
}

// Open opens a member and returns once it is bootstrapped, admitted or recovered; it is not yet Ready, and nothing needs to
// listen on Addr yet. ctx limits joining only (Config.Timeout if it has no deadline), which is retried while nothing answers.
//
// Errors: ErrInvalid, ErrLocked, ErrNotAllowed (an existing member must call AddAllowedMember first; a permission that is under way is
// waited for, with a warning in the log, for up to 10 s), ErrRemoved, ErrFormat,
// ErrCorrupt. Whatever the error, calling Open again is safe. At the end call Close, and only then Shutdown of the server that serves
// this member: see ServeHTTP.
func Open(ctx context.Context, c Config) (*Service, error) {
	c, err := c.resolve()
	if err != nil {
		return nil, fmt.Errorf("quorate: %w", err)
	}
	lines := newLogLines(c.Logger.Handler())
	c.Logger = lines.logger()
	s := &Service{
		conf: c, log: c.Logger, lines: lines, closed: make(chan struct{}), changing: make(chan struct{}, 1), joined: make(chan struct{}, 1),
		handing: make(chan struct{}, 1), fitness: make(chan struct{}, 1),
		rebuildCh: make(chan struct{}, 1),
	}
	s.asOf.begin = time.Now()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.faults.log, s.faults.moved = c.Logger, func() { give(s.fitness) }
	opened := false
	defer func() { // also if code of the caller's panics, which ctx may be
		if !opened {
			s.abandon()
		}
		s.lines.flush(lastLines)
	}()
	if err := s.open(ctx); err != nil {
		return nil, fmt.Errorf("quorate: open %s: %w", c.Dir, err)
	}
	opened = true
	return s, nil
}

func (c Config) resolve() (Config, error) {
	var err error
	if c.Dir, err = memberDir(c.Dir); err != nil {
		return c, err
	}
	if c.Addr == "" && c.Join != "" {
		return c, fmt.Errorf("%w: a member without Addr has no network and can't join %s: give the address at which peers reach it", ErrInvalid, c.Join)
	}
	if c.Addr != "" {
		if c.Addr, err = canonicalAddr(c.Addr); err != nil {
			return c, err
		}
	}
	if c.Join != "" {
		if c.Join, err = bootAddr(c.Join, c.TLS); err != nil {
			return c, err
		}
	}
	if c.Bootstrap, err = c.founders(); err != nil {
		return c, err
	}
	if c.MaxValue < 0 || c.MaxValue > maxValueEver {
		return c, fmt.Errorf("%w: MaxValue %d, it can be at most %d", ErrInvalid, c.MaxValue, maxValueEver)
	}
	if c.MaxState < 0 {
		return c, fmt.Errorf("%w: MaxState %d is negative", ErrInvalid, c.MaxState)
	}
	if c.Timeout < 0 {
		return c, fmt.Errorf("%w: Timeout %v is negative", ErrInvalid, c.Timeout)
	}
	if c.History < 0 || c.History > maxHistory {
		return c, fmt.Errorf("%w: History %d, it can be at most %d changes", ErrInvalid, c.History, maxHistory)
	}
	if c.History == 0 {
		c.History = defaultHistory
	}
	if c.MaxValue == 0 {
		c.MaxValue = 1 << 20
	}
	if c.Timeout == 0 {
		c.Timeout = time.Minute
	}
	if c.Memory == 0 {
		c.Memory = 64 << 20
	}
	if c.space == nil {
		c.space = spaceOf
	}
	if c.format == 0 {
		c.format = entryFormat
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.TLS && c.Addr != "" {
		if err := checkCertificate(c.Client, c.Addr, c.Logger); err != nil {
			return c, err
		}
	}
	return c, nil
}

// open takes the steps of Open in the order that a crash at any of them allows; what it has opened, abandon closes.
func (s *Service) open(ctx context.Context) error {
	var err error
	if s.lock, err = lockDir(s.conf.Dir, s.conf.Addr); err != nil {
		return err
	}
	if err := s.identify(); err != nil {
		return err
	}
	s.startPeer()
	if err := s.openState(ctx); err != nil {
		return err
	}
	s.noteSpace()
	s.batch = newBatcher(s.ctx)
	s.batch.propose, s.batch.begin, s.batch.changed, s.batch.applied = s.propose, s.begin, s.changes.wait, s.awaitApplied
	s.batch.most = func() int { return int(s.peer.sizes.least()) - 2*appendOverhead }
	s.batch.noLead = func() bool { id, _ := s.leader(); return id == "" }
	s.batch.format = func() uint64 { return s.store.meta().format }
	s.fsm.delivered = s.batch.deliver
	s.reads = newRounds(s.ctx, s.readIndex)
	if err := s.enter(ctx); err != nil {
		return err
	}
	if err := s.startRaft(ctx); err != nil {
		return err
	}
	s.startBackground()
	s.watchCertificates()
	s.awaitOwnLog(ctx)
	return nil
}

// startBackground starts every goroutine that lives as long as the Service; Close waits for all of them.
func (s *Service) startBackground() {
	for range slots {
		s.running.Go(s.batch.carry)
	}
	s.running.Go(func() {
		s.awaitFounders()
		s.awaitRaise()
		s.batch.keepSession()
	})
	s.running.Go(s.reads.carry)
	s.running.Go(func() { s.hub.ring(s.ctx) })
	s.running.Go(func() { s.store.maintain(s.ctx) })
	s.running.Go(s.lead)
	s.running.Go(s.watchLeader)
	s.running.Go(s.tellLeader)
	s.running.Go(s.announce)
	s.running.Go(s.watchHealth)
	s.running.Go(s.askStrangers)
	if s.founding != nil {
		s.running.Go(s.found)
	}
	s.running.Go(s.watchReach)
	s.running.Go(s.watchPace)
	s.running.Go(s.watchHangs)
	s.running.Go(s.watchFitness)
	s.running.Go(s.watchSpace)
	s.running.Go(s.rebuildLoop)
	s.running.Go(s.verifyLog)
}

func (s *Service) verifyLog() {
	if err := s.wal.verify(s.ctx); err != nil && s.ctx.Err() == nil {
		s.faults.set(faultLogDamage, err)
	}
}

// abandon closes what a failed open has opened.
func (s *Service) abandon() {
	s.cancel()
	if s.peer != nil {
		s.peer.close()
	}
	if s.ballast != nil {
		s.ballast.close()
	}
	if s.wal != nil {
		s.wal.close()
	}
	if s.store != nil {
		s.store.close()
	}
	if s.lock != nil {
		s.lock.unlock()
	}
}

// Close ends this member's part: calls in flight return, a leader hands over first, the files are closed, and snap is a
// plain database that can be copied. It takes under a second with a healthy majority and ten in the worst case. An error says what is not
// as it should be: after one snap may lack the last changes, which are in the log and which the next Open writes. Calling Close again
// returns the same error. A closed directory can be opened again. Stop the http.Server that serves it afterwards, not before: see
// ServeHTTP.
func (s *Service) Close() error {
	s.closing.Do(func() {
		s.closeErr = s.close()
		s.lines.flush(lastLines)
		close(s.closed)
	})
	<-s.closed
	return s.closeErr
}

func (s *Service) close() error {
	s.faults.set(faultClosed, ErrClosed)
	s.hub.wake()
	s.changes.notify()
	s.batch.refuse(ErrClosed)
	s.drain(2 * time.Second)
	s.leave()
	s.batch.stop(ErrClosed)
	s.cancel()
	s.store.endSoon(flushLast)
	close(s.fsm.closing)
	err := s.stopRaft()
	limit := 5 * time.Second
	if err != nil {
		limit = time.Second
	}
	files := make(chan error, 1)
	go func() {
		s.running.Wait()
		s.ballast.close()
		files <- errors.Join(s.wal.close(), s.store.close(), s.lock.unlock())
	}()
	select {
	case closed := <-files:
		return errors.Join(err, closed)
	case <-time.After(limit): // nothing in this process can end a call that hangs in the system, or in one of SQL's functions
		return errors.Join(err, fmt.Errorf("quorate: close: the disk does not answer, or a function in a Query does not return: %s "+
			"stays locked until then", s.conf.Dir))
	}
}

// drain waits until the accepted writes have their answers.
func (s *Service) drain(limit time.Duration) {
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	for !s.batch.empty() && s.faults.first(faultRemoved, faultLog, faultApply, faultGone, faultState, faultLogWaits, faultStateWaits) == nil {
		wait, stop := context.WithTimeout(ctx, 5*time.Millisecond)
		<-wait.Done()
		stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// leave lets another voter lead, so that the others need not wait for an election timeout.
func (s *Service) leave() {
	ctx, cancel := context.WithTimeout(s.ctx, handOverLimit)
	defer cancel()
	if err := s.handOver(ctx, choice{leaving: true}); err != nil && len(s.others()) > 0 {
		s.log.Info("closing without handing over", "why", err)
	}
}

// stopRaft ends raft and everything that waits for it. A goroutine of raft that is parked in a store call because of a disk
// fault is ended by closing the log under it.
func (s *Service) stopRaft() error {
	s.peer.close()
	late := time.AfterFunc(2*time.Second, func() { s.wal.close() }) // a restart of raft holds raftMu, and may wait for the disk
	s.raftMu.Lock()
	late.Stop()
	defer s.raftMu.Unlock()
	s.settleApply()
	ended := s.endRaftLocked()
	for _, limit := range []time.Duration{2 * time.Second, 3 * time.Second} {
		select {
		case <-ended:
			return nil
		case <-time.After(limit):
			go s.wal.close() // it waits for a call that hangs in the disk
		}
	}
	return errors.New("quorate: close: raft did not stop; its goroutines may remain")
}

// settleApply lets apply take what raft has handed to it: the futures of what is left there are never answered.
func (s *Service) settleApply() {
	for range 50 {
		if n := s.raft.Load().Stats()["fsm_pending"]; n == "0" || n == "" {
			return
		}
		<-time.After(2 * time.Millisecond)
	}
}

// await waits for a raft future, but never longer than ctx: raft may leave a future unanswered when it shuts down.
func await(ctx context.Context, f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// limited gives a context without a deadline the configured one, and so one that has a deadline and never ends: a type that is to
// outlive its parent, and hides Done and Err of it only.
func (s *Service) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		if ctx.Done() != nil {
			return ctx, func() {}
		}
		ctx = noDeadline{ctx}
	}
	return context.WithTimeout(ctx, s.conf.Timeout)
}

type noDeadline struct{ context.Context }

func (noDeadline) Deadline() (time.Time, bool) { return time.Time{}, false }

// untilClose is ctx, ended when the Service closes. It is for what waits for others; quick paths do without its cost.
func (s *Service) untilClose(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })
	return ctx, func() { stop(); cancel(nil) }
}

// Set sets key to val (nil is the empty value). nil means: on the disks of a majority and applied here. Errors are
// ErrNotApplied (retry as you like) or ErrUncertain (a retry sets it again, which may undo a later write of someone else).
// Keys are 1 to 4096 bytes of UTF-8 without NUL, values at most Config.MaxValue bytes.
func (s *Service) Set(ctx context.Context, key string, val []byte) error {
	_, err := s.write(ctx, op{kind: opSet, key: key, value: val})
	return err
}

// Insert sets key only if it has no value, and returns ErrUnsatisfied otherwise. A retry inside the library never meets
// its own write. A retry by the caller after ErrUncertain can: then ErrUnsatisfied may mean that the first attempt won, and
// the value tells (put something of your own into it).
func (s *Service) Insert(ctx context.Context, key string, val []byte) error {
	_, err := s.write(ctx, op{kind: opIfNotExists, key: key}, op{kind: opSet, key: key, value: val})
	return err
}

// Delete deletes key. A missing key is no error. Errors and retries as for Set.
func (s *Service) Delete(ctx context.Context, key string) error {
	_, err := s.write(ctx, op{kind: opDelete, key: key})
	return err
}

// AddAllowedMember allows the member that peers reach at addr (host:port) to join. Doing it again is no error, and neither
// is a retry after any error.
func (s *Service) AddAllowedMember(ctx context.Context, addr string) error {
	addr, err := canonicalAddr(addr)
	if err != nil {
		return notApplied(err)
	}
	_, err = s.write(ctx, op{kind: opAllow, key: addr})
	return err
}

// catchUp returns once this member has applied everything that was acknowledged before the call.
func (s *Service) catchUp(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for backoff := time.Millisecond; ; backoff = min(2*backoff, 200*time.Millisecond) {
		if err := s.refusesReads(); err != nil {
			return err
		}
		changed := s.changes.wait()
		rd, err := s.acknowledgedRound(ctx)
		if err == nil {
			if err := s.awaitApplied(ctx, rd.index, rd.term); err != nil {
				return fmt.Errorf("waiting for index %d, this member is at %d: %w", rd.index, s.fsm.applied.at(), err)
			}
			s.asOf.advance(rd.began)
			return s.verified(ctx)
		}
		select {
		case <-changed:
		case <-time.After(backoff):
		case <-ctx.Done():
			return unconfirmed(ctx, err)
		case <-s.ctx.Done():
			return ErrClosed
		}
	}
}

// unconfirmed is the error of a read whose context ended before a majority had confirmed a round; err is what the last round met.
// To a caller who gave it time that is ErrNoLeader, also where a leader is known and does not answer.
func unconfirmed(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, context.DeadlineExceeded) && !errors.Is(err, ErrNoLeader) {
		err = fmt.Errorf("%w has answered: %w", ErrNoLeader, err)
	}
	if !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", err, cause)
	}
	return err
}

// verified waits until the check of the file that began at Open has ended: until then a row that the disk has lost could be
// taken for a missing key.
func (s *Service) verified(ctx context.Context) error {
	for {
		ok, err := s.store.verified()
		if ok || err != nil {
			return err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the check of snap that began at the start has not ended: %w", context.Cause(ctx))
		case <-s.ctx.Done():
			return ErrClosed
		}
	}
}

// Err returns a serious error that keeps this process from working now, or nil. It may recover by itself and be nil again,
// except for ErrRemoved, ErrClosed and a failed disk. It costs one atomic load.
func (s *Service) Err() error { return s.faults.err() }

// Ready waits until a write would be accepted and a linearizable read answered here, now: a leader is known, a majority answers it,
// this member can send to it and has applied what was acknowledged before. When ctx ends it says what is missing, and wraps
// ctx.Err(); one that has ended already is an error too. A member that has no vote yet can be Ready, as it forwards and reads: in
// Status its Role is NonVoter until it votes, and Member.NoVote says why.
func (s *Service) Ready(ctx context.Context) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	missing := ""
	var target landing // the round whose entry is waited for; zero = none
	for {
		if err := s.refusesWrites(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("not ready: %s: %w", cmp.Or(missing, "nothing was asked, for the context had ended"), context.Cause(ctx))
		}
		changed := s.changes.wait()
		ready, behind := s.serves(ctx, &target)
		if ready {
			return nil
		}
		found := s.diagnose(ctx)
		if behind != "" {
			found = behind + "; " + found
		}
		if ctx.Err() == nil || missing == "" {
			missing = found
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

const (
	readyWait = time.Second     // between two looks at what may be wrong, while this member catches up
	readyLag  = 2 * time.Second // a member that needs longer for what a round has found is behind
)

// serves makes one attempt at what Ready promises. It goes on with the target of the attempt before, so that under load what is waited
// for does not move away; but one that took long to reach is old, and the next round's must be reached sooner. behind says how far
// this member has come, if that is all that is missing.
func (s *Service) serves(ctx context.Context, target *landing) (ready bool, behind string) {
	if s.unready() != nil {
		return false, ""
	}
	if target.index == 0 {
		var err error
		if *target, err = s.reads.join(ctx); err != nil {
			*target = landing{}
			return false, ""
		}
	}
	if refusal := target.refusal; refusal != "" {
		*target = landing{}
		return false, refusal
	}
	wait, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	if s.awaitApplied(wait, target.index, target.term) != nil {
		return false, fmt.Sprintf("this member has applied %d of %d entries", s.fsm.applied.at(), target.index)
	}
	late := time.Since(target.began) > readyLag
	*target = landing{}
	if late || !s.batch.open() || s.unready() != nil || s.refusal.Load() != nil {
		return false, ""
	}
	if err := s.verified(wait); err != nil {
		return false, err.Error()
	}
	return true, ""
}

// Backup writes one consistent copy of the state to w while writes go on: an SQLite file that sqlite3 opens and Restore
// takes. It holds every write that returned before the call. revision is the newest revision in it. It needs a majority; where
// there is none, take [View.Backup]. ctx ends it at any time, and Config.Timeout limits only the read round at its beginning. A w that
// takes less than it is given without an error is io.ErrShortWrite. After an error what is in w is worth nothing, and a retry must
// start with an empty w.
func (s *Service) Backup(ctx context.Context, w io.Writer) (revision uint64, err error) {
	round, cancel := s.limited(ctx)
	err = s.catchUp(round)
	cancel()
	if err != nil {
		return 0, fmt.Errorf("backup: %w", err)
	}
	return s.backup(ctx, w)
}

func (s *Service) backup(ctx context.Context, w io.Writer) (revision uint64, err error) {
	m, err := s.store.backup(ctx, w)
	if err != nil {
		return 0, fmt.Errorf("backup: %w", err)
	}
	return m.revision, nil
}

// Restore makes dir a new cluster of one member out of a backup, or out of the snap of a member that is not running (closed or
// killed: then its write-ahead log must lie beside it). Keys, values and the versions of entries are kept; cluster and member get new
// ids, so that members of the old cluster and this one never take each other for their own. Open dir afterwards; other members join
// it with empty directories. What the old cluster acknowledged after the backup was taken (or what this snap had not yet received) is
// lost.
//
// The revision goes on far above any that the old cluster has given out: at the time since 2020 in units of 2^-21 s, or, if this
// machine's clock is behind that, 2^32 above the file's. The history begins there. So a token made of a revision is never given out
// again, and a watch from a revision of the old cluster gets ErrCompacted (with Resync, EventReset and the entries as they are). Each
// further Restore of the same file begins higher, as long as the clock does not go back. Revisions stay below 2^53 until 2156. A
// state in which nothing was ever written begins at 0.
//
// Tables, indexes, views and triggers that another program has put into the file, beside a member that was alone, are left out.
//
// from may be a symbolic link. dir must be empty or missing. Before it answers nil Restore reads back all that it has made; if it
// answers an error, dir is as it was, and calling it again is safe. Errors: ErrLocked if a member has the file or dir open; ErrInvalid
// if dir holds a member, or if from is not whole, as a copy of a running member's snap alone (the error says how to make a whole one);
// ErrFormat, ErrCorrupt.
func Restore(dir, from string) error {
	if err := restore(dir, from, time.Now); err != nil {
		return fmt.Errorf("quorate: restore %s from %s: %w", dir, from, err)
	}
	return nil
}
