package quorate

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// newLone is one member without a network that has the entries.
func newLone(t *testing.T, entries ...string) *Service {
	t.Helper()
	s, err := Open(ctxFor(t, 20*time.Second), Config{Dir: filepath.Join(t.TempDir(), "data"), Logger: testLogger(t)})
	must(t, err)
	t.Cleanup(func() { s.Close() })
	must(t, s.Ready(ctxFor(t, 20*time.Second)))
	for i := 0; i < len(entries); i += 2 {
		must(t, s.Set(t.Context(), entries[i], []byte(entries[i+1])))
	}
	return s
}

// readRows gives one line for each row, and how they ended.
func readRows(rows *sql.Rows) (lines []string, err error) {
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return nil, err
	}
	values, into := make([]any, len(columns)), make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return lines, err
		}
		lines = append(lines, strings.TrimSuffix(fmt.Sprintln(values...), "\n"))
	}
	return lines, rows.Err()
}

func ask(t testing.TB, s *Service, query string, args ...any) ([]string, error) {
	t.Helper()
	rows, err := s.Query(ctxFor(t, 20*time.Second), query, args...)
	if err != nil {
		return nil, err
	}
	return readRows(rows)
}

func wantRows(t *testing.T, s *Service, want []string, query string, args ...any) {
	t.Helper()
	got, err := ask(t, s, query, args...)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%s %v: %q, %v, want %q", query, args, got, err, want)
	}
}

// TestPrefixInSQL holds what the documentation says of the ways to ask for a prefix.
func TestPrefixInSQL(t *testing.T) {
	t.Parallel()
	s := newLone(t, "done/1", "", "Done/2", "", "done0", "", "doing/3", "")
	for _, tt := range []struct {
		where string
		want  []string
		plan  string
	}{
		{"key GLOB 'done/*'", []string{"done/1"}, "SEARCH"},
		{"key >= 'done/' AND key < 'done0'", []string{"done/1"}, "SEARCH"},
		{"key LIKE 'done/%'", []string{"Done/2", "done/1"}, "SCAN"},
	} {
		wantRows(t, s, tt.want, "SELECT key FROM kv WHERE "+tt.where)
		if plan, err := ask(t, s, "EXPLAIN QUERY PLAN SELECT key FROM kv WHERE "+tt.where); err != nil || !strings.Contains(strings.Join(plan, " "), tt.plan) {
			t.Errorf("%s: %q, %v, want a %s", tt.where, plan, err, tt.plan)
		}
	}
}

const endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) "

func TestQueryReads(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", `{"n":1,"tags":["x","y"]}`, "b", `{"n":20}`, "blob", "\xff\x00", "empty", "", "text", "it's; -- text")
	ctx := t.Context()
	must(t, s.Set(ctx, "b", []byte(`{"n":21}`)))

	wantRows(t, s, []string{"a", "b", "blob", "empty", "text"}, "SELECT key FROM kv ORDER BY key")
	wantRows(t, s, []string{"b 6 2"}, "SELECT key, version, created FROM kv WHERE version != created;")
	wantRows(t, s, []string{"b"}, "SELECT key FROM kv WHERE json_valid(value) AND value->>'$.n' > 1")
	wantRows(t, s, []string{"a x", "a y"}, "SELECT kv.key, j.value FROM kv, json_each(kv.value, '$.tags') j WHERE kv.key = 'a' ORDER BY 2")
	wantRows(t, s, []string{"blob blob", "empty text"}, "SELECT key, typeof(value) FROM kv WHERE key IN ('blob', 'empty') ORDER BY key")
	wantRows(t, s, []string{"text"}, "SELECT key FROM kv WHERE value = 'it''s; -- text' -- and a comment; here")
	wantRows(t, s, []string{"1 <nil> 2.5 x"}, "VALUES(1, NULL, 2.5, 'x') /* ; */ ; -- end")
	wantRows(t, s, []string{"3"}, endless+"SELECT max(i) FROM (SELECT i FROM n LIMIT 3)")
	wantRows(t, s, nil, "SELECT key FROM kv WHERE key = 'none'")
	wantRows(t, s, []string{"text 5"}, "SELECT key, version FROM kv WHERE key = ? AND version >= ?", "text", 5)
	wantRows(t, s, []string{"text"}, "SELECT key FROM kv WHERE key = :k", sql.Named("k", "text"))
	wantRows(t, s, []string{"text 2"}, "SELECT key, ?1 FROM kv WHERE key = ?2", 2, "text")
	wantRows(t, s, []string{"blob"}, "SELECT key FROM kv WHERE value = ?", []byte("\xff\x00"))
	wantRows(t, s, []string{"1000"}, endless+"SELECT count(*) FROM (SELECT i FROM n LIMIT 1000)")
	wantRows(t, s, []string{"500500"}, endless+"SELECT sum(i) FROM (SELECT i FROM n LIMIT 1000)")
	got, err := ask(t, s, endless+"SELECT i FROM n LIMIT 1000") // more than is read ahead
	if err != nil || len(got) != 1000 || got[999] != "1000" {
		t.Errorf("%d rows, %v", len(got), err)
	}
	if got, err := ask(t, s, "EXPLAIN QUERY PLAN SELECT * FROM kv WHERE key = 'a'"); err != nil || len(got) != 1 {
		t.Errorf("explain: %q, %v", got, err)
	}

	must(t, s.Delete(ctx, "b"))
	wantRows(t, s, []string{`2 {"n":20} 0 0 2`, `6 {"n":21} 0 2 6`, "7 <nil> 1 6 7"},
		"SELECT revision, value, deleted, previous, last FROM history WHERE key = 'b' ORDER BY revision")

	rows, err := s.Query(ctx, "SELECT key, value, version FROM kv WHERE key IN ('blob', 'empty') ORDER BY key")
	must(t, err)
	defer rows.Close()
	types, err := rows.ColumnTypes()
	must(t, err)
	if types[0].DatabaseTypeName() != "TEXT" || types[2].DatabaseTypeName() != "INTEGER" {
		t.Errorf("types %s, %s", types[0].DatabaseTypeName(), types[2].DatabaseTypeName())
	}
	for _, want := range []string{"\xff\x00", ""} {
		var key string
		var value []byte
		var version uint64
		if !rows.Next() {
			t.Fatal(rows.Err())
		}
		must(t, rows.Scan(&key, &value, &version))
		if string(value) != want || value == nil || version == 0 {
			t.Errorf("%s: %q at %d, want %q", key, value, version, want)
		}
	}
}

// What Query refuses, most of it because it would write, with {dir} for a directory of this test's own.
var refused = []string{
	"INSERT INTO kv(key, value, version, created, sum) VALUES('x', 'x', 1, 1, 1)",
	"INSERT OR REPLACE INTO kv SELECT * FROM kv",
	"INSERT INTO kv DEFAULT VALUES",
	"REPLACE INTO kv(key, value, version, created, sum) VALUES('a', 'x', 1, 1, 1)",
	"UPDATE kv SET value = 'x'",
	"UPDATE kv SET value = 'x' WHERE key = 'a' RETURNING key",
	"UPDATE kv SET value = 'x' WHERE 0",
	"DELETE FROM kv",
	"DELETE FROM kv WHERE key = 'a' RETURNING *",
	"WITH old AS (SELECT key FROM kv) DELETE FROM kv WHERE key IN old",
	"WITH new(k) AS (VALUES('x')) INSERT INTO kv SELECT k, k, 1, 1, 1 FROM new",
	"WITH n(i) AS (SELECT 1) UPDATE kv SET version = 7",
	"UPDATE quorate_meta SET applied = 0",
	"DELETE FROM quorate_session",
	"DROP TABLE kv",
	"DROP TABLE IF EXISTS kv",
	"DROP TABLE IF EXISTS missing",
	"DROP INDEX IF EXISTS missing",
	"DROP TRIGGER IF EXISTS missing",
	"DROP VIEW IF EXISTS missing",
	"ALTER TABLE kv ADD COLUMN x",
	"ALTER TABLE kv RENAME TO x",
	"ALTER TABLE kv DROP COLUMN sum",
	"CREATE TABLE x(a)",
	"CREATE TABLE IF NOT EXISTS kv(a)",
	"CREATE TABLE x AS SELECT * FROM kv",
	"CREATE TEMP TABLE x(a)",
	"CREATE TEMP TABLE kv AS SELECT 1 AS key",
	"CREATE INDEX x ON kv(value)",
	"CREATE TRIGGER x AFTER DELETE ON kv BEGIN SELECT 1; END",
	"CREATE TEMP TRIGGER x AFTER DELETE ON kv BEGIN SELECT 1; END",
	"CREATE VIEW x AS SELECT 1",
	"CREATE TEMP VIEW kv AS SELECT 1",
	"CREATE VIRTUAL TABLE x USING fts5(a)",
	"CREATE VIRTUAL TABLE temp.x USING rtree(a, b, c)",
	"ATTACH '{dir}/attached' AS x",
	"ATTACH DATABASE 'file:{dir}/attached?mode=rwc' AS x",
	"ATTACH ':memory:' AS x",
	"ATTACH '' AS x",
	"DETACH main",
	"VACUUM",
	"VACUUM INTO '{dir}/vacuumed'",
	"BEGIN",
	"BEGIN IMMEDIATE",
	"BEGIN EXCLUSIVE TRANSACTION",
	"COMMIT",
	"END",
	"ROLLBACK",
	"SAVEPOINT x",
	"RELEASE x",
	"PRAGMA journal_mode",
	"PRAGMA journal_mode=DELETE",
	"PRAGMA locking_mode=EXCLUSIVE",
	"PRAGMA writable_schema=ON",
	"PRAGMA user_version",
	"PRAGMA user_version=7",
	"PRAGMA application_id=7",
	"PRAGMA schema_version=7",
	"PRAGMA wal_checkpoint(TRUNCATE)",
	"PRAGMA wal_autocheckpoint=1",
	"PRAGMA query_only=0",
	"PRAGMA temp_store_directory='{dir}'",
	"PRAGMA trusted_schema=ON",
	"PRAGMA table_info(kv)",
	"PRAGMA optimize",
	"PRAGMA incremental_vacuum",
	"pragma main.journal_mode = off",
	"SELECT * FROM pragma_optimize",
	"SELECT * FROM pragma_journal_mode",
	"SELECT * FROM kv, pragma_user_version",
	"REINDEX",
	"REINDEX kv",
	"ANALYZE",
	"ANALYZE kv",
	"EXPLAIN DELETE FROM kv",
	"EXPLAIN QUERY PLAN UPDATE kv SET value = 'x'",
	"UPDATE sqlite_dbpage SET data = zeroblob(4096) WHERE pgno = 1",
	"DELETE FROM sqlite_dbpage",
	"INSERT INTO sqlite_schema VALUES('table', 'x', 'x', 0, 'CREATE TABLE x(a)')",
	"UPDATE sqlite_master SET sql = 'x'",
	"SELECT load_extension('{dir}/x')",
	"SELECT writefile('{dir}/written', 'x')",
	"SELECT readfile('/etc/hostname')",
	"SELECT edit('x')",
	"SELECT fts3_tokenizer('simple', x'00')",
	"SELECT fts3_tokenizer('simple')",
	"SELECT quorate_step(1)",
	"SELECT key, quorate_step(1) FROM kv",
	"SELECT * FROM quorate_meta",
	"SELECT count(*) FROM quorate_session",
	"SELECT * FROM kv JOIN main.QUORATE_ALLOWED",
	"SELECT data FROM sqlite_dbpage WHERE pgno = 2",
	"SELECT 1; SELECT 2",
	"SELECT 1; DROP TABLE kv",
	"SELECT 1;DELETE FROM kv;",
	"; DELETE FROM kv",
	"SELECT 1 /* ; */; /* */ DELETE FROM kv",
	"SELECT 1; -- \nDELETE FROM kv",
	"SELECT ';'; DELETE FROM kv",
	"SELECT 'it''s' AS \"a;b\", [key] AS `c;` FROM kv; VACUUM",
	"/* SELECT 1 */ DELETE FROM kv",
	"-- SELECT 1\nDELETE FROM kv",
	"SELECT 1\x00; DELETE FROM kv",
	"",
	" \n;",
	"-- nothing",
	"/* nothing",
	"SELECT",
	"SELECT no_such_column FROM kv",
	`SELECT "no such column" FROM kv`,
	"SELECT * FROM no_such_table",
	"SELECT no_such_function()",
	"SELECT ? + ?", // no arguments
	"SELECT :a",
	"SELECT json('{')",
	"SELECT zeroblob(100000000)",
	"SELECT 'x' LIKE printf('%.*c', 100000, 'x')",
}

// filesIn is every file under dir.
func filesIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, path)
		}
		return err
	}))
	return names
}

func TestQueryOnlyReads(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1", "b", "2")
	dir := t.TempDir()
	lines := func() []string {
		rows, err := ask(t, s, "SELECT key, value, version, created, sum FROM kv ORDER BY key")
		must(t, err)
		schema, err := ask(t, s, "SELECT type, name, sql FROM sqlite_schema UNION ALL SELECT type, name, sql FROM sqlite_temp_schema")
		must(t, err)
		return append(rows, schema...)
	}
	files, other, rows, status := filesIn(t, s.conf.Dir), filesIn(t, dir), lines(), s.Status()
	for i, text := range refused {
		text = strings.ReplaceAll(text, "{dir}", dir)
		for range 2 { // the second one meets what the first has left of the connection
			got, err := ask(t, s, text)
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%s: %q, %v, want ErrInvalid", text, got, err)
			} else if i < 30 && !strings.Contains(text, "BEGIN") && !strings.Contains(err.Error(), "Query only reads") {
				t.Errorf("%s: %v does not say that Query only reads", text, err)
			}
		}
		if now := filesIn(t, dir); !slices.Equal(now, other) {
			t.Fatalf("%s made %q", text, now)
		}
	}
	if now := filesIn(t, s.conf.Dir); !slices.Equal(now, files) {
		t.Errorf("files %q, were %q", now, files)
	}
	if now := lines(); !slices.Equal(now, rows) {
		t.Errorf("rows %q, were %q", now, rows)
	}
	if now := s.Status(); now.Hash != status.Hash || now.AppliedIndex != status.AppliedIndex {
		t.Errorf("state %+v, was %+v", now, status)
	}
	if _, err := ask(t, s, "SELECT '"+strings.Repeat("x", querySQL)+"'"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a long statement: %v", err)
	}
	if _, err := ask(t, s, "SELECT ?", struct{}{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("an argument of no type that SQL knows: %v", err)
	}
	must(t, s.Set(t.Context(), "a", []byte("3")))
	wantRows(t, s, []string{"3"}, "SELECT value FROM kv WHERE key = 'a'")
	if foreign, err := s.store.foreign(); foreign || err != nil {
		t.Errorf("foreign write: %t, %v", foreign, err)
	}
}

// Why the authorizer is there: a read-only connection makes files.
func TestReadOnlyConnectionMakesFiles(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	made := filepath.Join(t.TempDir(), "made")
	raw, err := readOnly{s.store.path}.Connect(t.Context())
	must(t, err)
	defer raw.Close()
	if _, err := raw.(driver.ExecerContext).ExecContext(t.Context(), "ATTACH '"+made+"' AS x", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(made); err != nil {
		t.Error("it makes none: then the authorizer has less to do than query.go says: ", err)
	}
}

func TestQuerySeesWholeTransactions(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	move := func(a, b int) error { // one transaction: the sum stays 100
		_, err := s.Exec(context.Background(), Set("a", fmt.Append(nil, a)), Set("b", fmt.Append(nil, b)))
		return err
	}
	must(t, move(50, 50))
	// The writer goes on beside the queries, but not without end: under the race detector it is faster than the file.
	turns := make(chan struct{}, 100)
	go func() {
		for i := 0; ctx.Err() == nil; i++ {
			select {
			case <-turns:
			case <-ctx.Done():
			}
			if err := move(i%100, 100-i%100); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for range 200 {
		for len(turns) < cap(turns) {
			turns <- struct{}{}
		}
		wantRows(t, s, []string{"100 2"}, "SELECT sum(value), count(*) FROM kv")
		wantRows(t, s, []string{"1"}, "SELECT (SELECT max(revision) FROM history) = (SELECT max(version) FROM kv)")
	}
	stop()
	must(t, <-done)
}

// A goroutine that gets no processor may find the time to read ahead over before the first row: each row still comes, and no other one.
func TestQueryWithoutTimeToReadAhead(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1", "b", "2", "c", "3")
	s.store.queries.ahead = 0
	wantRows(t, s, []string{"a 1", "b 2", "c 3"}, "SELECT key, value FROM kv ORDER BY key")
	wantRows(t, s, []string{"3"}, "SELECT count(*) FROM kv")
	wantRows(t, s, nil, "SELECT key FROM kv WHERE key = 'd'")
}

func TestQueryOnFollowerSeesWrites(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	l, f := c.leader(t).s, c.follower(t).s
	for i := range 20 {
		want := fmt.Sprint(i)
		must(t, l.Set(t.Context(), "k", []byte(want)))
		wantRows(t, f, []string{want}, "SELECT value FROM kv WHERE key = 'k'")
	}
	for _, m := range c {
		if m.s != f {
			m.isolate()
		}
	}
	if _, err := f.Query(ctxFor(t, 200*time.Millisecond), "SELECT 1"); !errors.Is(err, ErrNoLeader) {
		t.Errorf("without a majority: %v", err)
	}
	rows, err := f.Local().Query(t.Context(), "SELECT value FROM kv")
	must(t, err)
	if got, err := readRows(rows); err != nil || !slices.Equal(got, []string{"19"}) {
		t.Errorf("local: %q, %v", got, err)
	}
}

// awaitNoQuery waits until nothing of any query is left but idle connections.
func awaitNoQuery(t *testing.T, s *Service) {
	t.Helper()
	q := s.store.queries
	eventually(t, patience, "the end of all queries", func() error {
		q.mu.Lock()
		defer q.mu.Unlock()
		if len(s.store.openHolds()) != 0 || len(q.slots) != 0 || q.pool.Stats().InUse != 0 {
			return fmt.Errorf("%d run, %d slots, %d connections in use", len(s.store.openHolds()), len(q.slots), q.pool.Stats().InUse)
		}
		return nil
	})
}

// holding counts the queries that the WAL can't restart for.
func holding(s *Service) (n int) {
	for _, h := range s.store.openHolds() {
		if r, ok := h.(*running); ok && r.pins(-1) {
			n++
		}
	}
	return n
}

func TestQueryEndsWithItsContext(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1")
	for _, text := range []string{
		endless + "SELECT i FROM n",                    // rows without end
		endless + "SELECT i FROM n WHERE i = 0",        // never a row
		endless + "SELECT i FROM n WHERE i IN (1, 10)", // two rows, and then never another
	} {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		rows, err := s.Local().Query(ctx, text)
		if err == nil {
			_, err = readRows(rows)
		}
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", text, err)
		}
	}
	awaitNoQuery(t, s)
	wantRows(t, s, []string{"1"}, "SELECT value FROM kv")
}

func TestQueryTooLong(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1")
	s.store.queries.time = 50 * time.Millisecond
	for _, text := range []string{endless + "SELECT i FROM n WHERE i = 0", endless + "SELECT i FROM n WHERE i IN (1, 0)", endless + "SELECT i FROM n"} {
		_, err := ask(t, s, text)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "query: longer than 50ms") {
			t.Errorf("%s: %v", text, err)
		}
	}
	awaitNoQuery(t, s)
	s.store.queries.time = queryTime
	wantRows(t, s, []string{"1"}, "SELECT value FROM kv")
}

// Rows that nobody reads or closes keep nothing for longer than a query may take.
func TestQueryForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newLone(t, "a", "1")
		slots := cap(s.store.queries.slots)
		var all []*sql.Rows
		for range slots {
			rows, err := s.Local().Query(context.Background(), endless+"SELECT i FROM n")
			must(t, err)
			if !rows.Next() {
				t.Fatal(rows.Err())
			}
			all = append(all, rows)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := s.Query(ctx, "SELECT 1"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting") {
			t.Errorf("while all %d are taken: %v", slots, err)
		}
		began := time.Now()
		rows, err := s.Query(context.Background(), "SELECT value FROM kv") // it waits for them
		must(t, err)
		if got, err := readRows(rows); err != nil || len(got) != 1 {
			t.Errorf("%q, %v", got, err)
		}
		if took := time.Since(began); took < 20*time.Second || took > queryTime {
			t.Errorf("waited %v", took)
		}
		synctest.Wait()
		for _, rows := range all {
			if err := rows.Err(); rows.Next() || !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("forgotten rows end with %v", err)
			}
		}
		awaitNoQuery(t, s)
		must(t, s.Close())
	})
}

// A consumer that has left with an sql.RawBytes holds a lock of database/sql's for ever, and keeps nobody from querying.
func TestQueryForgottenWithRawBytes(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1")
	q := s.store.queries
	q.time = time.Second
	for range cap(q.slots) {
		rows, err := s.Local().Query(t.Context(), endless+"SELECT 'x' FROM n")
		must(t, err)
		var raw sql.RawBytes
		if !rows.Next() {
			t.Fatal(rows.Err())
		}
		must(t, rows.Scan(&raw))
	}
	wantRows(t, s, []string{"1"}, "SELECT value FROM kv")
	eventually(t, patience, "the end of all that they hold", func() error {
		q.mu.Lock()
		defer q.mu.Unlock()
		if len(s.store.openHolds()) != 0 || len(q.slots) != 0 || len(q.conns) > 1 {
			return fmt.Errorf("%d run, %d slots, %d connections", len(s.store.openHolds()), len(q.slots), len(q.conns))
		}
		return nil
	})
}

// SQLite does not interrupt a function. Until it returns, what looks after all that hold the WAL must not wait for this one.
func TestQueryInALongFunction(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	eventually(t, 20*time.Second, "the newest format, the last entry of the start", func() error {
		if format := s.store.meta().format; format < entryFormat {
			return fmt.Errorf("format %d", format)
		}
		return nil
	})
	s.store.queries.pin = 1
	for size := 40_000; !tendsBesideFunction(t, s, size); size *= 2 {
		if size > 200_000 {
			t.Fatal("the function has always ended before tend had returned, or nothing ended the query: tend waits for the function")
		}
	}
}

// tendsBesideFunction: the query was ended while its function, which takes a time of size squared, was running. False if the function
// had ended first: on a busy machine a small one does, and then what holds the connection is the reading of the last row.
func tendsBesideFunction(t *testing.T, s *Service, size int) bool {
	must(t, s.store.sync(t.Context())) // what the query itself would write to the file first counts as what it holds up
	rows, err := s.Query(t.Context(), "WITH n(i) AS (VALUES(1), (2)) "+
		"SELECT CASE i WHEN 2 THEN instr(hex(zeroblob(?1 * 2)), hex(zeroblob(?1)) || '1') END FROM n", size)
	must(t, err)
	defer rows.Close()
	h := s.store.openHolds()[0].(*running)
	ended := make(chan error, 1)
	go func() {
		for rows.Next() {
		}
		ended <- rows.Err()
	}()
	for len(ended) == 0 && h.rows.c.mu.TryLock() { // until the function runs
		h.rows.c.mu.Unlock()
		runtime.Gosched()
	}
	must(t, s.Set(t.Context(), "a", fmt.Append(nil, size)))
	h.tend(0)
	beside := len(ended) == 0
	if h.rows.c.mu.TryLock() {
		h.rows.c.mu.Unlock()
		beside = false
	}
	return errors.Is(<-ended, ErrSlow) && beside
}

func TestQueryTimeoutIsNotForRows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newLone(t, "a", "1")
		s.conf.Timeout = time.Second
		rows, err := s.Query(context.Background(), endless+"SELECT i FROM n LIMIT 100000")
		must(t, err)
		time.Sleep(20 * time.Second)
		if got, err := readRows(rows); len(got) != 100000 || err != nil {
			t.Errorf("%d rows, %v", len(got), err)
		}
		must(t, s.Close())
	})
}

func TestQuerySlow(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1")
	s.store.queries.pin = 1 << 20
	slow, err := s.Query(t.Context(), endless+"SELECT i, value FROM n, kv")
	must(t, err)
	defer slow.Close()
	short, err := s.Query(t.Context(), "SELECT value FROM kv") // it is read ahead, and keeps nothing
	must(t, err)
	if !slow.Next() || !short.Next() {
		t.Fatal(slow.Err(), short.Err())
	}
	var pinned sql.RawBytes // holds a lock of database/sql's until the next call
	must(t, slow.Scan(new(int), &pinned))
	must(t, short.Scan(new(string)))
	if n := holding(s); n != 1 {
		t.Fatalf("%d queries hold the WAL", n)
	}
	eventually(t, 10*time.Second, "the end of the slow query", func() error {
		must(t, s.Set(t.Context(), "b", make([]byte, 512<<10)))
		if n := holding(s); n > 0 {
			return fmt.Errorf("%d hold the WAL at %d bytes", n, s.store.walSize())
		}
		return nil
	})
	if slow.Next() || !errors.Is(slow.Err(), ErrSlow) {
		t.Errorf("slow: %v", slow.Err())
	}
	if short.Next() || short.Err() != nil {
		t.Errorf("short: %v", short.Err())
	}
	awaitNoQuery(t, s)
}

func TestCloseEndsQueries(t *testing.T) {
	t.Parallel()
	s := newLone(t, "a", "1")
	open, err := s.Query(t.Context(), endless+"SELECT i FROM n")
	must(t, err)
	held, err := s.Query(t.Context(), endless+"SELECT i, 'x' FROM n")
	must(t, err)
	if !open.Next() || !held.Next() {
		t.Fatal(open.Err(), held.Err())
	}
	var raw sql.RawBytes
	must(t, held.Scan(new(int), &raw))
	busy := make(chan error, 1)
	go func() {
		_, err := ask(t, s, endless+"SELECT i FROM n WHERE i IN (1, 0)")
		busy <- err
	}()
	eventually(t, patience, "the third query", func() error {
		if n := holding(s); n != 3 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	must(t, s.Close())
	if names := filesIn(t, s.conf.Dir); slices.ContainsFunc(names, func(n string) bool { return strings.Contains(filepath.Base(n), "snap-") }) {
		t.Errorf("left: %q", names)
	}
	for open.Next() {
	}
	for held.Next() {
	}
	for _, err := range []error{open.Err(), held.Err(), <-busy} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("rows end with %v", err)
		}
	}
	if _, err := s.Query(t.Context(), "SELECT 1"); !errors.Is(err, ErrClosed) {
		t.Errorf("Query: %v", err)
	}
	if _, err := s.Local().Query(t.Context(), "SELECT 1"); !errors.Is(err, ErrClosed) {
		t.Errorf("View.Query: %v", err)
	}
}

// What SQLite finds damaged is ErrCorrupt, and wakes the repair as any read does.
func TestQueryDamaged(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	for i := range 64 {
		must(t, s.Set(t.Context(), fmt.Sprint("k", i), []byte("the good value"+strings.Repeat("-", 200))))
	}
	must(t, s.Close())
	path := s.path("snap")
	data, err := os.ReadFile(path)
	must(t, err)
	page := strings.LastIndex(string(data), "k5") / pageSize * pageSize // a leaf: its first byte is its kind
	data[page] = 0xff
	must(t, os.WriteFile(path, data, 0o600))
	s, err = Open(t.Context(), Config{Dir: s.conf.Dir, Logger: testLogger(t)})
	must(t, err)
	defer s.Close()
	rows, err := s.Local().Query(t.Context(), "SELECT key, sum FROM kv UNION ALL SELECT key, sum FROM history")
	if err == nil {
		_, err = readRows(rows)
	}
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), path) {
		t.Errorf("%v, want ErrCorrupt and the path", err)
	}
	if !errors.Is(s.Err(), ErrCorrupt) {
		t.Errorf("Err: %v", s.Err())
	}
}

// An argument that belongs to no parameter is a mistake in the statement or in the call, and SQLite's driver says nothing.
func TestQueryArguments(t *testing.T) {
	t.Parallel()
	s := newLone(t)
	named := func(name string, v any) any { return sql.Named(name, v) }
	for _, c := range []struct {
		text string
		args []any
		want string // "" = ErrInvalid
	}{
		{"SELECT ?", []any{1}, "1"},
		{"SELECT ?", []any{1, 2}, ""},
		{"SELECT ?", nil, ""},
		{"SELECT 1", []any{1}, ""},
		{"SELECT ?, ?", []any{1, 2}, "1 2"},
		{"SELECT ?2, ?1", []any{1, 2}, "2 1"},
		{"SELECT ?2", []any{1, 2}, "2"}, // the driver asks for the first one too
		{"SELECT ?2", []any{1, 2, 3}, ""},
		{"SELECT ?1, ?", []any{1, 2}, "1 2"},
		{"SELECT $1, $2", []any{1, 2}, "1 2"},
		{"SELECT $1", []any{1, 2}, ""},
		{"SELECT :a, @b, $c", []any{named("a", 1), named("b", 2), named("c", 3)}, "1 2 3"},
		{"SELECT :a, :a", []any{named("a", 1)}, "1 1"},
		{"SELECT :a", []any{named("a", 1), named("b", 2)}, ""},
		{"SELECT :a", []any{named("a", 1), named("a", 2)}, ""},
		{"SELECT :a", []any{named("a", 1), 2}, ""},
		{"SELECT :aé", []any{named("aé", 1)}, "1"},
		{"SELECT ?, ':a', \"?\", [?], `?` FROM (SELECT 1 AS \"?\") /* ? */ -- ?", []any{1}, "1 :a 1 1 1"},
		{"SELECT 'it''s ?', ?", []any{1}, "it's ? 1"},
		{"SELECT a$1 FROM (SELECT 7 AS a$1)", []any{1}, ""},
		{"SELECT '{\"a\":3}'->>'$.a'", nil, "3"},
		{"SELECT '{\"a\":3}'->>?", []any{"$.a"}, "3"},
		{"SELECT x'41' = ?", []any{[]byte("A")}, "1"},
		{"SELECT 1?", []any{1}, ""},
		{"SELECT ?;", []any{1}, "1"},
		{"SELECT $a::b(c)", []any{named("a::b(c)", 1)}, "1"},
		{"SELECT ?", []any{sql.Out{}}, ""},
		{"SELECT ?", []any{valuer(func() (driver.Value, error) { return nil, errors.New("no value") })}, ""},
		{"SELECT ?", []any{(*string)(nil)}, "<nil>"},
	} {
		got, err := ask(t, s, c.text, c.args...)
		switch {
		case c.want == "" && !errors.Is(err, ErrInvalid):
			t.Errorf("%s with %v: %q, %v, want ErrInvalid", c.text, c.args, got, err)
		case c.want != "" && (err != nil || len(got) != 1 || got[0] != c.want):
			t.Errorf("%s with %v: %q, %v, want %s", c.text, c.args, got, err, c.want)
		}
	}
	for text, want := range map[string][]string{
		"?3 ?":                   {"", "", "?3", ""},
		":a ? :a @a":             {":a", "", "@a"},
		"$a::b(c d) $x::y(z) $q": {"$x::y(z)", "$q"}, // the first is no token
		"?0 ?99999999999999 ?":   {""},
		"a:b #1":                 {":b", "#1"},
		": $ @ ?":                {""},
	} {
		if got := sqlParameters(text); !slices.Equal(got, want) {
			t.Errorf("the parameters of %s: %q, want %q", text, got, want)
		}
	}
}
