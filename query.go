package quorate

// Query: the caller's SQL over the state, for reading only. This file owns the connections that such SQL runs on, what it may
// do, how long it may run and how much of the WAL it may hold. db.go and view.go call it once the rows are as recent as they
// promise; it goes on to SQLite through database/sql, and never touches the log or the copy in memory.
//
// Three things keep a statement from writing to our file, and each of them alone would do: the connection is opened read-only,
// it is query_only, and an authorizer allows nothing but reading. Only the authorizer also stops what writes elsewhere (ATTACH
// makes a file, on a read-only connection too) or changes the connection for whoever has it next (PRAGMA query_only=0).

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
)

const (
	queryTime    = 30 * time.Second // that one Query may take, its Rows included
	queryPin     = 256 << 20        // bytes that the WAL may grow by while a Query keeps it from restarting
	querySQL     = 1 << 20          // bytes of a statement
	queryValue   = 64 << 20         // bytes of one value, given or computed
	maxParameter = 32766            // the greatest number of one, which is SQLite's default

	// Rows are read ahead, so that a short result lets go of the WAL whatever its consumer does, until one of:
	aheadRows  = 256
	aheadBytes = 256 << 10
	aheadTime  = 5 * time.Millisecond
)

// SQLite's numbers for what sqlite3_limit limits, and our limits: a mistake in a query must not take all of the memory.
var queryLimits = []struct{ id, limit int }{
	{0, queryValue},
	{1, querySQL},
	{5, 1 << 20},    // instructions of a compiled statement
	{7, 0},          // attached databases
	{8, 2 * maxKey}, // bytes of a LIKE or GLOB pattern: matching takes their product with the text's
}

// Query runs one SQL statement that reads, on this member, and sees one moment: every write that returned anywhere before Query
// was called, and of each transaction all or nothing. The tables are
//
//	kv(key, value, version, created)
//	history(revision, key, value, deleted, created, previous, last)
//
// with more columns to come, and history from when every member of the cluster reads it. A value is TEXT if it is valid UTF-8
// without NUL, so that value->>'$.a' is a field of one that is JSON, and a BLOB otherwise; that of a deletion is NULL. version,
// created, revision, previous and last are revisions. args stand for ? and ?2, and those made by [sql.Named] for :name. Close the
// Rows, and ask for their Err after the last one.
//
// What is not one reading statement is ErrInvalid: a statement that writes, a PRAGMA, BEGIN, ATTACH, two statements, wrong SQL, a
// private table, more arguments than parameters or fewer. A prefix of keys is key GLOB 'a/*' or key >= 'a/' AND key < 'a0', through the index; LIKE takes no notice of
// case and reads the whole table. A statement has 1 MiB at most (*LimitError), and a value in it or out of it 64 MiB. What is sorted or grouped and
// takes more than about 2 MB goes into the system's directory for temporary files meanwhile.
//
// Query waits as Get does, with the same errors, for at most Config.Timeout if ctx has no deadline. From then on the Rows end
// when ctx ends, and 30 seconds after the statement began: then their Err is context.DeadlineExceeded. It is ErrSlow if more than
// 256 MiB are written in that time and not all rows are read, because the file grows until they are, and ErrClosed after Close.
// One call of a function is never cut short: instr, replace or trim of one value of many MiB by another takes minutes, and what
// ends the Rows waits for it; Close, after five seconds, no longer does.
// Four queries for each of GOMAXPROCS run at a time, and a query runs until its Rows are closed; the next one waits. Retrying is
// safe after any error.
func (s *Service) Query(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	return s.query(ctx, s.catchUp, query, args)
}

// Query is [Service.Query] on this member's own copy as it is: it asks nobody, and works without a majority and after removal.
func (v View) Query(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	return v.s.query(ctx, v.open, query, args)
}

func (s *Service) query(ctx context.Context, ready func(context.Context) error, text string, args []any) (rows *sql.Rows, err error) {
	text, err = oneStatement(text)
	if err == nil {
		args, err = arguments(text, args)
	}
	if err != nil {
		return nil, fmt.Errorf("query: %w", err)
	}
	returned := false
	defer func() {
		if !returned && rows != nil {
			rows.Close()
		}
	}()
	func() {
		wait, cancel := s.limited(ctx)
		defer cancel() // which asks the caller's context, and that may panic
		if err = ready(wait); err != nil {
			err = fmt.Errorf("query: %w", err)
			return
		}
		rows, err = s.store.queries.query(ctx, wait, text, args)
	}()
	returned = true
	return rows, err
}

// A querier runs the queries of one store. Its pool is database/sql's, for the sake of *sql.Rows; below it lies another one
// that keeps no connections, because the driver sets SQLite's limits on a *sql.Conn only.
type querier struct {
	s     *store
	slots chan struct{} // one token for each query that runs

	time  time.Duration // queryTime, shorter in tests
	ahead time.Duration // aheadTime, shorter in tests
	pin   int64         // queryPin, less in tests

	mu     sync.Mutex // guards the fields below
	pool   *sql.DB    // nil until the first query
	below  *sql.DB
	conns  map[*queryConn]bool
	closed bool
}

func newQuerier(s *store) *querier {
	return &querier{s: s, slots: make(chan struct{}, 4*runtime.GOMAXPROCS(0)), time: queryTime, ahead: aheadTime, pin: queryPin,
		conns: make(map[*queryConn]bool)}
}

// query runs one statement. ctx ends the rows too; wait limits only how long it waits for its turn.
func (q *querier) query(ctx, wait context.Context, text string, args []any) (*sql.Rows, error) {
	select {
	case q.slots <- struct{}{}:
	case <-q.s.ending:
		return nil, fmt.Errorf("query: %w", ErrClosed)
	case <-wait.Done():
		return nil, fmt.Errorf("query: waiting for one of the %d that run: %w", cap(q.slots), context.Cause(wait))
	}
	// The context may be of a type of the caller's: however its methods end, nothing stays taken.
	taken, begun := true, false
	defer func() {
		if taken {
			<-q.slots
		}
	}()
	r := q.begin(ctx)
	taken = false // it is r's now
	defer func() {
		if !begun {
			r.finish()
		}
	}()
	err := q.s.sync(wait)
	var pool *sql.DB
	if err == nil {
		pool, err = q.open()
	}
	if err == nil {
		err = q.s.hold(r)
	}
	if err != nil {
		return nil, fmt.Errorf("query: %w", err)
	}
	rows, err := pool.QueryContext(r, text, args...)
	if err == nil {
		begun = true
		return rows, nil
	}
	switch ended := r.Err(); {
	case ended != nil:
		return nil, ended
	case r.failed != nil:
		return nil, fmt.Errorf("query: %w", r.failed)
	}
	return nil, fmt.Errorf("query: %w: %w", ErrInvalid, err) // database/sql could make nothing of the arguments
}

// open opens the pools with the first query.
func (q *querier) open() (*sql.DB, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, ErrClosed
	}
	if q.pool == nil {
		q.below = sql.OpenDB(readOnly{q.s.path})
		q.below.SetMaxIdleConns(-1)
		q.pool = sql.OpenDB(q)
		q.pool.SetMaxIdleConns(runtime.GOMAXPROCS(0))
	}
	return q.pool, nil
}

// close returns when no connection is left, whoever may still hold Rows. The store has ended what runs.
func (q *querier) close() {
	q.mu.Lock()
	q.closed = true
	pool, below := q.pool, q.below
	conns := slices.Collect(maps.Keys(q.conns))
	q.mu.Unlock()
	if pool == nil {
		return
	}
	for _, c := range conns {
		c.Close()
	}
	pool.Close()
	below.Close()
}

// closeOld closes the idle connections to what was snap before.
func (q *querier) closeOld() {
	q.mu.Lock()
	conns := slices.Collect(maps.Keys(q.conns))
	q.mu.Unlock()
	for _, c := range conns {
		if c.seat != q.s.seat.Load() {
			c.closeIdle()
		}
	}
}

// A running is one Query until its Rows are closed, and the context that it runs under: it ends when the caller's does, when the
// Query has taken too long or when the store closes, and its Err says which; database/sql hands that on as the error of the Rows.
// It is not done when the Query ends well, or the Rows could take that for their error. database/sql asks it for values and for a
// deadline while it holds a connection, so there are none: the caller's context would be asked.
type running struct {
	q      *querier
	before int64 // the WAL's size when it began
	pin    int64 // by how much it may grow
	done   chan struct{}
	stop   func()      // of what ends it
	read   atomic.Bool // all rows are read: nothing is held any more
	failed error       // why it has not begun; for the goroutine that begins it

	mu       sync.Mutex // guards the fields below
	err      error      // why it was ended
	rows     *queryRows
	finished bool
}

// begin starts what ends it: the time, and the caller's context.
func (q *querier) begin(ctx context.Context) *running {
	r := &running{q: q, before: q.s.walSize(), pin: q.pin, done: make(chan struct{})}
	tooLong := fmt.Errorf("query: longer than %v: %w", q.time, context.DeadlineExceeded)
	left := context.AfterFunc(ctx, func() { r.end(ctx.Err()) })
	timer := time.AfterFunc(q.time, func() { r.end(tooLong) })
	r.stop = func() { timer.Stop(); left() }
	return r
}

func (r *running) Done() <-chan struct{}       { return r.done }
func (r *running) Value(any) any               { return nil }
func (r *running) Deadline() (time.Time, bool) { return time.Time{}, false }

func (r *running) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// attach names the rows that end has to release, unless it has come already.
func (r *running) attach(rows *queryRows) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.rows = rows
	}
	return r.err
}

// end makes the statement stop, and frees what it holds without waiting for the consumer of its rows: the connection too, which
// database/sql would keep with the turn for as long as the consumer holds an [sql.RawBytes]. It waits for a function of SQL.
func (r *running) end(err error) {
	r.mu.Lock()
	if r.err != nil || r.finished {
		r.mu.Unlock()
		return
	}
	r.err = err
	close(r.done)
	rows := r.rows
	r.mu.Unlock()
	if rows != nil {
		rows.abort()
		r.finish()
	}
}

// pinned: most queries have ended before anything waits for them.
func (r *running) pinned() bool { return r.pins(walAgain) }

func (r *running) pins(bytes int64) bool { return !r.read.Load() && r.q.s.walSize()-r.before > bytes }

// tend does not wait for the end: while a function of SQL runs, the store has others to look after.
func (r *running) tend(time.Duration) {
	if r.pins(r.pin) {
		go r.end(fmt.Errorf("query: %w: it keeps the write-ahead log, to which %d MiB were added meanwhile", ErrSlow, r.pin>>20))
	}
}

func (r *running) close() { r.end(fmt.Errorf("query: %w", ErrClosed)) }

// finish is for when the Rows are closed or never came to be. Again does nothing.
func (r *running) finish() {
	r.mu.Lock()
	again := r.finished
	r.finished = true
	r.mu.Unlock()
	if again {
		return
	}
	r.q.s.letGo(r)
	<-r.q.slots
	r.stop() // asks the caller's context, which may panic
}

// readOnly opens connections for the pool below.
type readOnly struct{ path string }

func (o readOnly) Driver() driver.Driver { return queryDriver() }

func (o readOnly) Connect(context.Context) (driver.Conn, error) {
	c, err := openConnWith(queryDriver(), o.path, "mode=ro&_defensive=1&_dqs=0&_time_format=sqlite",
		"query_only=ON", "trusted_schema=OFF", "cache_size=-2000")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(c.keepWAL(true), c.pragma("user_version")); err != nil { // its first read
		c.close()
		return nil, err
	}
	return c.raw, nil
}

// Driver makes the querier a connector of database/sql.
func (q *querier) Driver() driver.Driver { return queryDriver() }

// Connect opens a connection of the pool.
func (q *querier) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := q.connect(ctx)
	if err == nil {
		return c, nil
	}
	err = q.s.explain("open", err)
	if r, ok := ctx.(*running); ok {
		r.failed = err
	}
	return nil, err
}

func (q *querier) connect(ctx context.Context) (*queryConn, error) {
	q.mu.Lock()
	defer q.mu.Unlock() // so that close sees every connection
	if q.closed {
		return nil, ErrClosed
	}
	seat := q.s.seat.Load()
	if err := q.s.seated(); err != nil {
		return nil, err
	}
	held, err := q.below.Conn(ctx)
	if err != nil {
		return nil, err
	}
	c := &queryConn{q: q, held: held, seat: seat, id: lastConn.Add(1)}
	err = c.prepare()
	if unseated := q.s.seated(); unseated != nil { // its first read has opened the WAL by its name
		err = unseated
	}
	if err != nil {
		held.Close()
		return nil, err
	}
	q.conns[c] = true
	stepping.Store(c.id, c)
	return c, nil
}

// SQLite's driver lets a context interrupt a statement until its first row, but not from one row to the next, which may take as
// long. It does interrupt what Exec runs. So the rows are read by a function that a statement of ours calls in Exec, on the
// same connection and goroutine: an interrupt ends everything that the connection runs.
const (
	stepFunction  = "quorate_step"
	stepStatement = "SELECT " + stepFunction + "(?1)"
)

var (
	lastConn atomic.Int64
	stepping sync.Map // the connections of all queriers by their ids, for the function
)

var queryDriver = sync.OnceValue(func() *sqlite.Driver {
	d := new(sqlite.Driver)
	d.MustRegisterScalarFunction(stepFunction, 1, func(_ *sqlite.FunctionContext, args []driver.Value) (driver.Value, error) {
		id, _ := args[0].(int64)
		if c, ok := stepping.Load(id); ok {
			c.(*queryConn).readAhead() // c is the connection that calls: authorize lets no other statement say this
		}
		return nil, nil
	})
	return d
})

// A queryConn is a connection of the pool: the caller's SQL can do nothing on it but read.
type queryConn struct {
	q    *querier
	held *sql.Conn // of the pool below; it keeps raw ours
	raw  driver.Conn
	id   int64
	seat int64 // of the store, when it was opened

	mu     sync.Mutex  // guards the fields below; held across calls of SQLite, which one goroutine at a time may make
	step   driver.Stmt // stepStatement
	rows   *queryRows  // of the query that it runs
	ours   bool        // SQLite works at stepStatement
	denied string      // what the authorizer has denied, in words
	closed bool
}

func (c *queryConn) prepare() error {
	for _, l := range queryLimits {
		if _, err := sqlite.Limit(c.held, l.id, l.limit); err != nil {
			return err
		}
	}
	return c.held.Raw(func(raw any) (err error) {
		c.raw = raw.(driver.Conn)
		if c.step, err = c.raw.Prepare(stepStatement); err != nil {
			return err
		}
		return c.raw.(sqlite.AuthorizerRegisterer).RegisterAuthorizer(c.authorize)
	})
}

// authorize decides about each thing that a statement would do, while SQLite compiles it.
func (c *queryConn) authorize(action sqlite.AuthorizerActionCode, first, second, _, _ string) sqlite.AuthorizerReturnCode {
	switch action {
	case sqlite.AuthSelect, sqlite.AuthRecursive:
		return sqlite.AuthorizerOK
	case sqlite.AuthRead:
		table := strings.ToLower(first)
		if !strings.HasPrefix(table, "quorate_") && table != "sqlite_dbpage" { // which has the pages of all tables
			return sqlite.AuthorizerOK
		}
		return c.deny("table %s is private: kv and history are for Query", first)
	case sqlite.AuthFunction:
		switch strings.ToLower(second) {
		case stepFunction:
			if c.ours {
				return sqlite.AuthorizerOK
			}
		case "load_extension", "fts3_tokenizer":
		default:
			return sqlite.AuthorizerOK
		}
		return c.deny("function %s is not for Query", second)
	}
	return c.deny("Query only reads")
}

func (c *queryConn) deny(format string, args ...any) sqlite.AuthorizerReturnCode {
	if c.denied == "" {
		c.denied = fmt.Sprintf(format, args...)
	}
	return sqlite.AuthorizerDeny
}

// QueryContext is called by database/sql, with the context that query gave it.
func (c *queryConn) QueryContext(ctx context.Context, text string, args []driver.NamedValue) (driver.Rows, error) {
	r := ctx.(*running)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		if !isClosed(c.q.s.ending) {
			return nil, driver.ErrBadConn // closeOld was faster; the pool opens another one
		}
		r.failed = ErrClosed
		return nil, ErrClosed
	}
	c.denied = ""
	raw, err := c.raw.(driver.QueryerContext).QueryContext(r, text, args)
	if err != nil {
		r.failed = c.explain(err)
		return nil, r.failed
	}
	rows := &queryRows{c: c, run: r, raw: raw, columns: raw.Columns()}
	for i := range rows.columns {
		rows.types = append(rows.types, raw.(driver.RowsColumnTypeDatabaseTypeName).ColumnTypeDatabaseTypeName(i))
	}
	if len(rows.columns) == 0 { // DROP TABLE IF EXISTS of what does not exist asks nobody
		r.failed = fmt.Errorf("%w: the statement has no result: Query only reads", ErrInvalid)
	} else {
		r.failed = r.attach(rows)
	}
	if r.failed != nil {
		raw.Close()
		return nil, r.failed
	}
	c.rows = rows
	return rows, nil
}

// explain says whose fault an error of SQLite's is.
func (c *queryConn) explain(err error) error {
	if c.denied != "" {
		return fmt.Errorf("%w: %s", ErrInvalid, c.denied)
	}
	switch sqliteCode(err) {
	case 0: // not SQLite's but the driver's, about an argument
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	case sqliteError, sqliteReadOnly, sqliteTooBig, sqliteMismatch, sqliteRange:
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	err = c.q.s.explain("read", err)
	if errors.Is(err, ErrCorrupt) {
		c.q.s.damaged(err)
	}
	return err
}

// IsValid is false after an interrupt, which could hit the next statement too.
func (c *queryConn) IsValid() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.closed && c.raw.(driver.Validator).IsValid()
}

// ResetSession comes before a connection of the pool is used again: not if the file was put in place anew since.
func (c *queryConn) ResetSession(context.Context) error {
	if c.seat != c.q.s.seat.Load() {
		return driver.ErrBadConn
	}
	return nil
}

// Close ends a query that still runs.
func (c *queryConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closeLocked()
}

func (c *queryConn) closeIdle() {
	if !c.mu.TryLock() { // it works
		return
	}
	defer c.mu.Unlock()
	if c.rows == nil {
		c.closeLocked()
	}
}

func (c *queryConn) closeLocked() error {
	if c.closed {
		return nil
	}
	c.closed = true
	if c.rows != nil {
		c.rows.releaseLocked()
	}
	err := errors.Join(c.step.Close(), c.held.Close())
	stepping.Delete(c.id)
	c.q.mu.Lock()
	delete(c.q.conns, c)
	c.q.mu.Unlock()
	return err
}

var errOnlyQuery = errors.New("this connection only runs queries")

// Prepare is part of driver.Conn; database/sql has no reason to call it, and neither has it for Begin.
func (c *queryConn) Prepare(string) (driver.Stmt, error) { return nil, errOnlyQuery }

// Begin is part of driver.Conn.
func (c *queryConn) Begin() (driver.Tx, error) { return nil, errOnlyQuery }

// readAhead runs inside stepStatement, under c.mu. The first row is read however long this goroutine has waited for a processor.
func (c *queryConn) readAhead() {
	r, began, size := c.rows, time.Now(), 0
	for len(r.ahead) == 0 || len(r.ahead) < aheadRows && size < aheadBytes && time.Since(began) < c.q.ahead {
		row := make([]driver.Value, len(r.columns))
		if r.err = r.raw.Next(row); r.err != nil {
			return
		}
		r.ahead = append(r.ahead, row)
		for _, v := range row {
			b, _ := columnBytes(v)
			size += len(b)
		}
	}
}

// queryRows are what database/sql reads the Rows from.
type queryRows struct {
	c       *queryConn
	run     *running
	columns []string
	types   []string

	// c.mu guards the fields below.
	raw   driver.Rows // nil when they are all read, or ended
	ahead [][]driver.Value
	err   error // that comes after the rows ahead
}

func (r *queryRows) Columns() []string { return r.columns }

// ColumnTypeDatabaseTypeName is the type that the table declares, if the column is a table's.
func (r *queryRows) ColumnTypeDatabaseTypeName(i int) string { return r.types[i] }

func (r *queryRows) Next(row []driver.Value) error {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if err := r.run.Err(); err != nil {
		return err
	}
	if len(r.ahead) == 0 && r.err == nil {
		r.fill()
	}
	if len(r.ahead) == 0 {
		return r.err
	}
	copy(row, r.ahead[0])
	r.ahead = r.ahead[1:]
	return nil
}

// fill reads ahead, at least one row or an error. After the last row the read transaction ends.
func (r *queryRows) fill() {
	c := r.c
	r.ahead = r.ahead[:0:0]
	c.ours = true
	_, err := c.step.(driver.StmtExecContext).ExecContext(r.run, []driver.NamedValue{{Ordinal: 1, Value: c.id}})
	c.ours = false
	ended := r.run.Err()
	switch {
	case ended != nil:
		r.ahead, r.err = nil, ended
	case r.err != nil && r.err != io.EOF:
		r.err = c.explain(r.err)
	case r.err == nil && err != nil:
		r.err = c.explain(err)
	case r.err == nil && len(r.ahead) == 0: // database/sql would take nothing at all for a row of NULLs
		r.err = errors.New("query: the rows were not read")
	}
	if r.err != nil {
		r.releaseLocked()
	}
}

func (r *queryRows) Close() error {
	r.release()
	r.run.finish()
	return nil
}

// abort closes the connection, unless the rows have let go of it: then another query may run on it.
func (r *queryRows) abort() {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if r.c.rows == r {
		r.c.closeLocked()
	}
}

// release ends the statement and with it the read transaction.
func (r *queryRows) release() {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	r.releaseLocked()
}

func (r *queryRows) releaseLocked() {
	if r.raw == nil {
		return
	}
	r.raw.Close() // it repeats the error of the last step
	r.raw, r.c.rows = nil, nil
	r.run.read.Store(true)
}

// oneStatement returns the only statement of a text, without what may come after its end.
func oneStatement(text string) (string, error) {
	if len(text) > querySQL {
		return "", &LimitError{What: "query bytes", Limit: querySQL, Got: int64(len(text))}
	}
	if strings.IndexByte(text, 0) >= 0 { // SQLite would take it for the end
		return "", fmt.Errorf("%w: the query holds a NUL", ErrInvalid)
	}
	end, empty := len(text), true
	for i := 0; i < len(text); {
		n, kind := sqlToken(text[i:])
		switch {
		case kind == ';' && end == len(text):
			end = i
		case kind == ' ' || kind == ';':
		case end < len(text):
			return "", fmt.Errorf("%w: more than one statement in a query", ErrInvalid)
		default:
			empty = false
		}
		i += n
	}
	if empty {
		return "", fmt.Errorf("%w: the query is empty", ErrInvalid)
	}
	return text[:end], nil
}

// arguments are what the caller has given for the statement's parameters, as SQLite takes them. A [driver.Valuer] is asked here, where
// nothing is taken yet: it is code of the caller's, which may panic, wait, or call Query.
func arguments(text string, args []any) ([]any, error) {
	list := make([]any, len(args))
	for i, a := range args {
		named, isNamed := a.(sql.NamedArg)
		if isNamed {
			a = named.Value
		}
		v, err := driver.DefaultParameterConverter.ConvertValue(a)
		if err != nil {
			return nil, fmt.Errorf("%w: argument %d: %w", ErrInvalid, i+1, err)
		}
		if list[i] = v; isNamed {
			named.Value = v
			list[i] = named
		}
	}
	return list, checkArguments(sqlParameters(text), list)
}

// checkArguments refuses an argument that the statement has no parameter for: SQLite's driver would leave it out, and a mistake in the
// statement would go unseen. That a parameter has no argument it says itself.
func checkArguments(parameters []string, args []any) error {
	used, named := make([]bool, len(args)), make(map[string]int)
	for j, a := range args {
		if a, ok := a.(sql.NamedArg); ok {
			if _, twice := named[a.Name]; !twice {
				named[a.Name] = j
			}
		}
	}
	for i, p := range parameters {
		number := i + 1
		if p != "" { // the driver takes ?2 and $2 for the second argument
			number = 0
			if p[0] == '?' || p[0] == '$' {
				number, _ = strconv.Atoi(p[1:])
			}
		}
		if 0 < number && number <= len(args) {
			used[number-1] = true
		}
		if p == "" {
			continue
		}
		if j, ok := named[p[1:]]; ok {
			used[j] = true
		}
	}
	if i := slices.Index(used, false); i >= 0 {
		return fmt.Errorf("%w: argument %d of %d belongs to no parameter: the statement has %d", ErrInvalid, i+1, len(args), len(parameters))
	}
	return nil
}

// sqlParameters are the names of a statement's parameters by their numbers, as SQLite numbers them; "" has no name.
func sqlParameters(text string) (names []string) {
	known := make(map[string]bool)
	for i, n := 0, 0; i < len(text); i += n {
		var kind byte
		if n, kind = sqlToken(text[i:]); kind != '?' {
			continue
		}
		name := text[i : i+n]
		number, err := strconv.Atoi(name[1:])
		switch {
		case name == "?":
			names = append(names, "")
		case name[0] != '?':
			if !known[name] {
				known[name] = true
				names = append(names, name)
			}
		case err == nil && 0 < number && number <= maxParameter: // else SQLite refuses it
			for len(names) < number {
				names = append(names, "")
			}
			names[number-1] = name
		}
	}
	return names
}

// sqlToken measures the first token of a text that is not empty, as SQLite divides it: ' ' is a space or a comment, ';' is
// itself, '?' a parameter, and 'x' anything else.
func sqlToken(s string) (n int, kind byte) {
	through := func(from int, end string) int {
		if i := strings.Index(s[from:], end); i >= 0 {
			return from + i + len(end)
		}
		return len(s)
	}
	switch c := s[0]; {
	case strings.IndexByte(" \t\n\f\r", c) >= 0:
		return 1, ' '
	case c == ';':
		return 1, ';'
	case strings.HasPrefix(s, "--"):
		return through(2, "\n"), ' '
	case strings.HasPrefix(s, "/*") && len(s) > 2:
		return through(2, "*/"), ' '
	case c == '\'' || c == '"' || c == '`': // one that is doubled inside makes two tokens, to the same end
		return through(1, string(c)), 'x'
	case c == '[':
		return through(1, "]"), 'x'
	case c == '?':
		return 1 + leading(s[1:], func(c byte) bool { return '0' <= c && c <= '9' }), '?'
	case strings.IndexByte("$@:#", c) >= 0:
		if n := 1 + parameterName(s[1:]); n > 1 {
			return n, '?'
		}
	case idByte(c):
		return leading(s, idByte), 'x'
	}
	return 1, 'x'
}

// idByte tells whether SQLite takes c for a part of a name.
func idByte(c byte) bool {
	return c >= 0x80 || c == '_' || c == '$' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
}

// leading is how many bytes at the beginning of s are such ones.
func leading(s string, such func(byte) bool) int {
	n := 0
	for n < len(s) && such(s[n]) {
		n++
	}
	return n
}

// parameterName is the length of what follows $, @, : or # in a parameter's name; :: and a last part in parentheses belong to it, as in
// Tcl.
func parameterName(s string) (n int) {
	for named := false; n < len(s); {
		switch {
		case idByte(s[n]):
			n, named = n+1, true
		case s[n] == '(' && named:
			if end := strings.IndexAny(s[n:], ") \t\n\v\f\r"); end > 0 && s[n+end] == ')' {
				return n + end + 1
			}
			return 0
		case strings.HasPrefix(s[n:], "::"):
			n += 2
		default:
			if !named {
				return 0
			}
			return n
		}
	}
	return n
}
