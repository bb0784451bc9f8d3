package quorate

// A connection to SQLite: the driver's, with its prepared statements, and what is in the rows that they read: values, hashes,
// error codes. It holds no state of the store's and takes no lock of it; sqlstore.go and copy.go call it.

import (
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"modernc.org/sqlite"
	sqlitelib "modernc.org/sqlite/lib"
)

// A conn is one connection of the driver, with its prepared statements, for one goroutine at a time. The driver is used
// directly: database/sql costs another 1.7 times on a read, and one writer needs no pool. It is a Driver of our own, so
// that functions and hooks that the application registers with the driver never run on our connections.
type conn struct {
	raw   driver.Conn
	stmts [queries]driver.Stmt
	args  []driver.NamedValue
	buf   []byte
	seat  int64 // of the store, when it was opened: see reconnect
}

var sqliteDriver sqlite.Driver

func openConn(path, params string, pragmas ...string) (*conn, error) {
	return openConnWith(&sqliteDriver, path, params, pragmas...)
}

func openConnWith(d *sqlite.Driver, path, params string, pragmas ...string) (*conn, error) {
	raw, err := d.Open(fileURI(path, params))
	if err != nil {
		return nil, err
	}
	c := &conn{raw: raw}
	for _, p := range append([]string{"busy_timeout=5000"}, pragmas...) {
		if err := c.pragma(p); err != nil {
			c.close()
			return nil, err
		}
	}
	return c, nil
}

// fileURI keeps what a path may hold from being read as a parameter.
func fileURI(path, params string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	path = filepath.ToSlash(path)
	if !strings.HasPrefix(path, "/") { // C:/…
		path = "/" + path
	}
	return "file://" + (&url.URL{Path: path}).EscapedPath() + "?" + params
}

func (c *conn) close() error {
	var errs []error
	for _, s := range c.stmts {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	return errors.Join(append(errs, c.raw.Close())...)
}

func (c *conn) stmt(q query) (driver.Stmt, error) {
	if c.stmts[q] == nil {
		s, err := c.raw.Prepare(queryText[q])
		if err != nil {
			return nil, err
		}
		c.stmts[q] = s
	}
	return c.stmts[q], nil
}

func (c *conn) bind(args []driver.Value) []driver.NamedValue {
	c.args = c.args[:0]
	for i, a := range args {
		c.args = append(c.args, driver.NamedValue{Ordinal: i + 1, Value: a})
	}
	return c.args
}

func (c *conn) exec(q query, args ...driver.Value) error {
	s, err := c.stmt(q)
	if err != nil {
		return err
	}
	_, err = s.(driver.StmtExecContext).ExecContext(context.Background(), c.bind(args))
	return c.explain(err)
}

func (c *conn) query(q query, args ...driver.Value) (driver.Rows, error) {
	s, err := c.stmt(q)
	if err != nil {
		return nil, err
	}
	rows, err := s.(driver.StmtQueryContext).QueryContext(context.Background(), c.bind(args))
	return rows, c.explain(err)
}

// each calls f with the columns of every row; they are valid until f returns, but strings and bytes among them stay.
func (c *conn) each(q query, args []driver.Value, f func(v []driver.Value) error) error {
	rows, err := c.query(q, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	v := make([]driver.Value, len(rows.Columns()))
	for {
		if err := rows.Next(v); err == io.EOF {
			return nil
		} else if err != nil {
			return c.explain(err)
		}
		if err := f(v); err != nil {
			return err
		}
	}
}

// one returns the first column of the only row.
func (c *conn) one(q query) (n int64, err error) {
	err = c.each(q, nil, func(v []driver.Value) error {
		n, _ = v[0].(int64)
		return nil
	})
	return n, err
}

// execText is for statements that run once, and for those pragmas that act when they are prepared.
func (c *conn) execText(sql string) error {
	_, err := c.raw.(driver.ExecerContext).ExecContext(context.Background(), sql, nil)
	return c.explain(err)
}

func (c *conn) pragma(p string) error { return c.execText("PRAGMA " + p) }

func (c *conn) text(sql string) (string, error) {
	rows, err := c.raw.(driver.QueryerContext).QueryContext(context.Background(), sql, nil)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	var v [1]driver.Value
	if err := rows.Next(v[:]); err != nil {
		return "", err
	}
	s, _ := v[0].(string)
	return s, nil
}

// passive moves the WAL into the database if enough of it waits.
func (c *conn) passive() error {
	var waiting int64
	err := c.each(qBacklog, nil, func(v []driver.Value) error {
		log, _ := v[1].(int64)
		done, _ := v[2].(int64)
		waiting = (log - done) * pageSize
		return nil
	})
	if err != nil || waiting < walBackground {
		return err
	}
	return c.exec(qPassive)
}

// checkSchema refuses what is not ours: a trigger or a view could run at our writes, and a copy would carry it on. Where all of our
// tables are as they should be, the error is a *strangeSchema.
func (c *conn) checkSchema() error {
	application, err := c.one(qApplicationID)
	if err != nil {
		return err
	}
	version, err := c.one(qUserVersion)
	if err != nil {
		return err
	}
	page, err := c.one(qPageSize)
	if err != nil {
		return err
	}
	if err := checkIdentity(application, version, page); err != nil {
		return err
	}
	var want []table
	for format := uint64(firstFormat); format <= uint64(version); format++ {
		want = append(want, schema[format]...)
	}
	found, strange := 0, &strangeSchema{}
	err = c.each(qSchema, nil, func(v []driver.Value) error {
		name, _ := v[1].(string)
		sql, _ := v[3].(string)
		if slices.Contains(want, table{name, sql}) {
			found++
		} else if name != "sqlite_sequence" && !strings.HasPrefix(name, "sqlite_autoindex_") { // which nobody can drop, and they do nothing
			kind, _ := v[0].(string)
			on, _ := v[2].(string)
			strange.objects = append(strange.objects, object{kind, name, on, sql})
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case found != len(want):
		return corrupt("%d of %d tables are missing, or not as they were made", len(want)-found, len(want))
	case len(strange.objects) > 0:
		return strange
	}
	return nil
}

// A strangeSchema is what somebody has put beside our tables: tables and indexes of another tool.
type strangeSchema struct{ objects []object }

type object struct{ kind, name, on, sql string }

// drop is for people too, who paste all of a list: a table takes its indexes with it, and a virtual one others.
func (o object) drop() string {
	return fmt.Sprintf(`DROP %s IF EXISTS "%s"`, strings.ToUpper(o.kind), strings.ReplaceAll(o.name, `"`, `""`))
}

func (e *strangeSchema) Error() string {
	var names, drops []string
	for _, o := range e.objects {
		name := fmt.Sprintf("%s %q", o.kind, o.name)
		if o.on != o.name {
			name += " on " + o.on
		}
		names, drops = append(names, name), append(drops, o.drop())
	}
	return fmt.Sprintf("%v: the schema has what is not ours, %s; if someone has added it, drop it with sqlite3: %s; else this copy of the state must be "+
		"replaced", ErrCorrupt, listed(names), strings.Join(drops, "; "))
}

func (e *strangeSchema) Unwrap() error { return ErrCorrupt }

// inTheWay tells of what has a name that a format of ours takes, now or later.
func (e *strangeSchema) inTheWay() bool {
	return slices.ContainsFunc(e.objects, func(o object) bool {
		name := strings.ToLower(o.name)
		if strings.HasPrefix(name, "quorate_") {
			return true
		}
		for _, tables := range schema {
			if slices.ContainsFunc(tables, func(t table) bool { return t.name == name }) {
				return true
			}
		}
		return false
	})
}

// hasTrigger tells of what would run at our writes.
func (e *strangeSchema) hasTrigger() bool {
	return slices.ContainsFunc(e.objects, func(o object) bool { return o.kind == "trigger" })
}

// listed is a list for people, cut short.
func listed(names []string) string {
	if most := 8; len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// dropTriggers takes away what would run at our writes. It says what that was.
func (c *conn) dropTriggers() (dropped []string, err error) {
	var list []object
	err = c.each(qSchema, nil, func(v []driver.Value) error {
		if kind, _ := v[0].(string); kind == "trigger" {
			name, _ := v[1].(string)
			sql, _ := v[3].(string)
			list = append(list, object{kind: kind, name: name, sql: sql})
		}
		return nil
	})
	for _, o := range list {
		if err := c.execText(o.drop()); err != nil {
			return nil, err
		}
		dropped = append(dropped, o.sql)
	}
	return dropped, err
}

// dropStrange takes away what another program has put beside our tables, except what has a name that a format of ours takes.
func (c *conn) dropStrange() error {
	err := c.checkSchema()
	strange := new(strangeSchema)
	if !errors.As(err, &strange) {
		return err
	}
	if strange.inTheWay() {
		return err
	}
	kinds := []string{"trigger", "view", "index", "table"}
	slices.SortStableFunc(strange.objects, func(a, b object) int { return slices.Index(kinds, a.kind) - slices.Index(kinds, b.kind) })
	for _, o := range strange.objects {
		if again := c.execText(o.drop()); again != nil {
			return fmt.Errorf("%w (%w)", err, again)
		}
	}
	return nil
}

// createTables adds what a format has brought.
func (c *conn) createTables(format uint64) error {
	for _, t := range schema[format] {
		if err := c.execText(t.sql); err != nil {
			return err
		}
	}
	return c.pragma(fmt.Sprintf("user_version=%d", format))
}

func (c *conn) readMeta() (m meta, err error) {
	found := false
	err = c.each(qMeta, nil, func(v []driver.Value) error {
		found = true
		for i, p := range m.numbers() {
			*p = columnUint(v[i])
		}
		config, _ := columnBytes(v[5])
		chain, _ := columnBytes(v[9])
		m.config = config
		if copy(m.chain[:], chain); len(chain) != len(m.chain) || m.hash() != columnUint(v[13]) {
			return corrupt("the meta row is not what was written")
		}
		return nil
	})
	if err == nil && !found {
		err = corrupt("the meta row is missing")
	}
	if err == nil && m.format >= historyFormat {
		m.keep, m.base, err = c.bounds()
	}
	return m, err
}

func (c *conn) writeMeta(m *meta) error {
	return c.exec(qSetMeta, int64(m.format), int64(m.applied), int64(m.term), int64(m.installed), int64(m.revision), blob(m.config),
		int64(m.configIndex), int64(m.kvSum), int64(m.ownSum), m.chain[:], int64(m.barrier), int64(m.keys), int64(m.bytes),
		int64(m.hash()))
}

// numbers are the integer columns by their place in metaColumns.
func (m *meta) numbers() map[int]*uint64 {
	return map[int]*uint64{0: &m.format, 1: &m.applied, 2: &m.term, 3: &m.installed, 4: &m.revision, 6: &m.configIndex,
		7: &m.kvSum, 8: &m.ownSum, 10: &m.barrier, 11: &m.keys, 12: &m.bytes}
}

func (m *meta) hash() uint64 {
	b := make([]byte, 0, 16*8+len(m.chain)+len(m.config))
	b = appendUints(b, m.format, m.applied, m.term, m.installed, m.revision, m.configIndex, m.kvSum, m.ownSum, m.barrier, m.keys, m.bytes)
	b = append(b, m.chain[:]...)
	return hash64(append(b, m.config...))
}

// get returns nil if there is no such row.
func (c *conn) get(key string) (it *item, err error) {
	err = c.each(qGet, []driver.Value{key}, func(v []driver.Value) error {
		it, err = c.item(key, v)
		return err
	})
	return it, err
}

// item makes a row of value, version, created and sum, and checks it.
func (c *conn) item(key string, v []driver.Value) (*item, error) {
	value, ok := columnText(v[0])
	it := &item{row: row{value, columnUint(v[1]), columnUint(v[2])}}
	c.buf, it.hash = rowHash(c.buf, key, value, it.version, it.created)
	if !ok || it.hash != columnUint(v[3]) {
		return nil, corrupt("kv row %q is not what was written", key)
	}
	return it, nil
}

// chunk reads rows after a key, in order, and whether they are the last.
func (c *conn) chunk(after string) (rows []keyed, last bool, err error) {
	enough := errors.New("enough")
	q, args := qScan, []driver.Value(nil)
	if after != "" {
		q, args = qScanAfter, []driver.Value{after}
	}
	size := 0
	err = c.each(q, args, func(v []driver.Value) error {
		if len(rows) >= chunkRows || size >= chunkBytes {
			return enough
		}
		r, err := c.keyed(v)
		if err == nil {
			rows, size = append(rows, r), size+len(r.value)
		}
		return err
	})
	if err == enough {
		return rows, false, nil
	}
	return rows, true, err
}

func (c *conn) keyed(v []driver.Value) (keyed, error) {
	key, ok := v[0].(string)
	if !ok || !validKey(key) {
		return keyed{}, corrupt("kv has a row whose key was never written")
	}
	it, err := c.item(key, v[1:])
	return keyed{key, it}, err
}

// checkRows reads all of kv.
func (c *conn) checkRows(m meta) error {
	var sum, keys, size uint64
	err := c.each(qScan, nil, func(v []driver.Value) error {
		r, err := c.keyed(v)
		if err == nil {
			sum, keys, size = sum+r.hash, keys+1, size+uint64(len(r.key)+len(r.value))
		}
		return err
	})
	if err == nil && (sum != m.kvSum || keys != m.keys || size != m.bytes) {
		err = corrupt("kv has %d rows and should have %d, or some are not what was written", keys, m.keys)
	}
	return err
}

func (c *conn) eachSession(f func(r sessionRow, h uint64) error) error {
	return c.each(qSessions, nil, func(v []driver.Value) error {
		r := sessionRow{id: columnUint(v[0]), acked: columnUint(v[2]), last: columnUint(v[3])}
		nonce, _ := columnBytes(v[1])
		r.results, _ = columnBytes(v[4])
		if copy(r.nonce[:], nonce); len(nonce) != len(r.nonce) {
			return corrupt("session %d is not what was written", r.id)
		}
		return f(r, columnUint(v[5]))
	})
}

func (c *conn) eachAllowed(f func(addr string, h uint64) error) error {
	return c.each(qAllowed, nil, func(v []driver.Value) error {
		addr, _ := columnText(v[0])
		return f(addr, columnUint(v[1]))
	})
}

func (c *conn) eachRemoved(f func(id string, at, h uint64) error) error {
	return c.each(qRemoved, nil, func(v []driver.Value) error {
		id, _ := columnText(v[0])
		return f(id, columnUint(v[1]), columnUint(v[2]))
	})
}

func (c *conn) eachMark(f func(m mark, h uint64) error) error {
	return c.each(qMarks, nil, func(v []driver.Value) error {
		m := mark{boundary: columnUint(v[0]), applied: columnUint(v[1]), kvSum: columnUint(v[2])}
		chain, _ := columnBytes(v[3])
		if copy(m.chain[:], chain); len(chain) != len(m.chain) {
			return corrupt("mark %d is not what was written", m.boundary)
		}
		return f(m, columnUint(v[4]))
	})
}

// An ownRow is a private row as a scan sees it: what its hash is and what it should be.
type ownRow struct {
	key      ownKey
	has, now uint64
}

func (c *conn) ownRows(format uint64) (rows []ownRow, err error) {
	add := func(k ownKey, has, now uint64) error {
		rows = append(rows, ownRow{k, has, now})
		return nil
	}
	err = c.eachSession(func(r sessionRow, h uint64) error { return add(ownKey{'s', r.id, ""}, h, sessionHash(r)) })
	if err == nil {
		err = c.eachAllowed(func(addr string, h uint64) error { return add(ownKey{'a', 0, addr}, h, allowedHash(addr)) })
	}
	if err == nil {
		err = c.eachRemoved(func(id string, at, h uint64) error { return add(ownKey{'r', 0, id}, h, removedHash(id, at)) })
	}
	if err == nil {
		err = c.eachMark(func(m mark, h uint64) error { return add(ownKey{'m', m.boundary, ""}, h, markHash(m)) })
	}
	if err == nil && format >= historyFormat {
		err = c.eachBounds(func(keep, base, h uint64) error { return add(boundsKey, h, boundsHash(keep, base)) })
	}
	return rows, err
}

// readOwn checks the private tables and returns their hashes.
func (c *conn) readOwn(m meta) (map[ownKey]uint64, error) {
	rows, err := c.ownRows(m.format)
	if err != nil {
		return nil, err
	}
	own, sum := make(map[ownKey]uint64, len(rows)), uint64(0)
	for _, r := range rows {
		if r.has != r.now {
			return nil, corrupt("a row of the private tables is not what was written")
		}
		own[r.key] = r.now
		sum += r.now
	}
	if sum != m.ownSum {
		return nil, corrupt("the private tables are not what was written")
	}
	return own, nil
}

// fixOwn gives every private row the hash of what it holds.
func (c *conn) fixOwn(m meta) (map[ownKey]uint64, uint64, error) {
	rows, err := c.ownRows(m.format)
	if err != nil {
		return nil, 0, err
	}
	fix := map[byte]query{'s': qFixSession, 'a': qFixAllowed, 'r': qFixRemoved, 'm': qFixMark, 'h': qFixHistory}
	own, sum := make(map[ownKey]uint64, len(rows)), uint64(0)
	for _, r := range rows {
		own[r.key] = r.now
		sum += r.now
		if r.has == r.now {
			continue
		}
		key := driver.Value(int64(r.key.id))
		if r.key.name != "" {
			key = r.key.name
		}
		if err := c.exec(fix[r.key.table], key, int64(r.now)); err != nil {
			return nil, 0, err
		}
	}
	return own, sum, nil
}

// rowHash hashes what a kv row holds; buf is for reuse.
func rowHash(buf []byte, key, value string, version, created uint64) ([]byte, uint64) {
	buf = binary.AppendUvarint(buf[:0], uint64(len(key)))
	buf = append(buf, key...)
	buf = binary.AppendUvarint(buf, uint64(len(value)))
	buf = append(buf, value...)
	buf = appendUints(buf, version, created)
	h := hash64(buf)
	if cap(buf) > 1<<20 {
		buf = nil // one large value must not hold its size for ever
	}
	return buf, h
}

// The private rows' hashes begin with the table, so that a row is worth nothing in another one.
func sessionHash(r sessionRow) uint64 {
	b := appendUints([]byte{'s'}, r.id, r.acked, r.last)
	return hash64(append(append(b, r.nonce[:]...), r.results...))
}

func allowedHash(addr string) uint64 { return hash64(append([]byte{'a'}, addr...)) }
func removedHash(id string, at uint64) uint64 {
	return hash64(append(appendUints([]byte{'r'}, at), id...))
}

func markHash(m mark) uint64 {
	return hash64(append(appendUints([]byte{'m'}, m.boundary, m.applied, m.kvSum), m.chain[:]...))
}

func appendUints(b []byte, ns ...uint64) []byte {
	for _, n := range ns {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return b
}

func hash64(b []byte) uint64 {
	h := sha256.Sum256(b)
	return binary.BigEndian.Uint64(h[:])
}

// valueRows is a row of parameters so many times.
func valueRows(row string, rows int) string { return row + strings.Repeat(`, `+row, rows-1) }

// sqlValue: people and their tools see text as text.
func sqlValue(value string) driver.Value {
	if utf8.ValidString(value) && strings.IndexByte(value, 0) < 0 {
		return value
	}
	return []byte(value)
}

// blob never binds nil, which is what the driver reads an empty blob as.
func blob(b []byte) driver.Value {
	if b == nil {
		return []byte{}
	}
	return b
}

func columnUint(v driver.Value) uint64 {
	n, _ := v.(int64)
	return uint64(n)
}

// columnBytes: ok is false for what we never write, a number.
func columnBytes(v driver.Value) (b []byte, ok bool) {
	switch v := v.(type) {
	case string:
		return []byte(v), true
	case []byte:
		return v, true
	case nil:
		return nil, true
	}
	return nil, false
}

// columnText is columnBytes as a string, which may hold any bytes.
func columnText(v driver.Value) (text string, ok bool) {
	if text, ok = v.(string); ok {
		return text, true
	}
	b, ok := columnBytes(v)
	return string(b), ok
}

// SQLite's primary result codes that we act on.
const (
	sqliteError      = 1 // in the SQL, or in what a function of SQL was given
	sqliteBusy       = 5
	sqliteNoMem      = 7
	sqliteReadOnly   = 8
	sqliteIOErr      = 10
	sqliteCorrupt    = 11
	sqliteFull       = 13
	sqliteCantOpen   = 14
	sqliteTooBig     = 18
	sqliteConstraint = 19
	sqliteMismatch   = 20
	sqliteRange      = 25
	sqliteNotADB     = 26
	sqliteWrite      = sqliteIOErr | 3<<8 // extended, as is the next
	sqliteShmSize    = sqliteIOErr | 19<<8
)

// explain adds the system's error to that of a write which the quota of this user has refused. SQLite tells a full disk from a broken
// one by ENOSPC alone, and takes EDQUOT for a failure. The same number from a sync is one.
func (c *conn) explain(err error) error {
	var e *sqlite.Error
	if errors.As(err, &e) && e.Code() == sqliteWrite && c.systemErrno() == syscall.EDQUOT {
		return fmt.Errorf("%w: %w", syscall.EDQUOT, err)
	}
	return err
}

// systemErrno is what the system has said to the call that failed last on this connection; 0 = unknown. The driver has no method for
// it: where a later one has other fields, nothing is known, and a quota is a failed disk.
func (c *conn) systemErrno() syscall.Errno {
	v := reflect.Indirect(reflect.ValueOf(c.raw))
	if v.Kind() != reflect.Struct {
		return 0
	}
	tls, db := v.FieldByName("tls"), v.FieldByName("db")
	f := reflect.ValueOf(sqlitelib.Xsqlite3_system_errno)
	if !tls.IsValid() || !db.IsValid() || tls.Type() != f.Type().In(0) || db.Type() != f.Type().In(1) {
		return 0
	}
	args := []reflect.Value{reflect.NewAt(tls.Type().Elem(), tls.UnsafePointer()), reflect.ValueOf(uintptr(db.Uint()))}
	return syscall.Errno(f.Call(args)[0].Int())
}

// sqliteMemory are extended codes of I/O errors that came before any I/O: no memory, or no space for the index of the WAL in all
// likelihood. Nothing that was written is in doubt.
var sqliteMemory = []int{sqliteIOErr | 12<<8, sqliteShmSize, sqliteIOErr | 18<<8, sqliteIOErr | 21<<8}

func sqliteCode(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		if e.Code() == sqliteWrite && errors.Is(err, syscall.EDQUOT) {
			return sqliteFull
		}
		return e.Code() & 0xff
	}
	return 0
}

func isBusy(err error) bool { return sqliteCode(err) == sqliteBusy }

// isIO: the disk has failed. Nothing that was written since the last barrier can be relied on.
func isIO(err error) bool {
	var e *sqlite.Error
	if errors.As(err, &e) && slices.Contains(sqliteMemory, e.Code()) {
		return false
	}
	return sqliteCode(err) == sqliteIOErr || errors.Is(err, syscall.EIO)
}
