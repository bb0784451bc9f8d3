package quorate_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/quorate/quorate"
)

// One member without a network: an embedded store.
func Example() {
	dir, err := os.MkdirTemp("", "quorate-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	ctx := context.Background()
	db, err := quorate.Open(ctx, quorate.Config{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	if err := db.Set(ctx, "flags/checkout", []byte("on")); err != nil {
		log.Fatal(err)
	}
	val, err := db.Get(ctx, "flags/checkout")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", val)
	missing, err := db.Get(ctx, "flags/search")
	fmt.Println(missing == nil, err)
	// Output:
	// on
	// true <nil>
}

// The first member of a cluster. The others are started with its address, or that of any other member, as the third argument.
func ExampleStart() {
	s, err := quorate.Start("10.0.0.1:7001", "/var/lib/app/quorate", "", nil, false)
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/raft/", s) // beside the routes of your own
	server := &http.Server{Addr: ":7001", Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			log.Fatal(err)
		}
	}()

	ctx := context.Background()
	for _, addr := range []string{"10.0.0.2:7001", "10.0.0.3:7001"} {
		if err := s.AddAllowedMember(ctx, addr); err != nil {
			log.Fatal(err)
		}
	}
	if err := s.Set(ctx, "region", []byte("eu-west")); err != nil {
		log.Fatal(err)
	}

	// At the end the member, which hands over if it leads, and after it the server: not the other way round.
	if err := errors.Join(s.Close(), server.Shutdown(ctx)); err != nil {
		log.Fatal(err)
	}
}

// Of all that insert one key, on whichever member, one wins.
func ExampleService_Insert() {
	db, done := open()
	defer done()

	ctx := context.Background()
	for _, worker := range []string{"ann", "bob"} {
		switch err := db.Insert(ctx, "jobs/42", []byte(worker)); {
		case err == nil:
			fmt.Println(worker, "does the job")
		case errors.Is(err, quorate.ErrUnsatisfied):
			fmt.Println(worker, "leaves it alone")
		case errors.Is(err, quorate.ErrUncertain): // perhaps it was inserted: Get tells whose it is
			log.Fatal(err)
		default: // ErrNotApplied: it was not, and a retry is safe
			log.Fatal(err)
		}
	}
	// Output:
	// ann does the job
	// bob leaves it alone
}

// A transaction: the money moves if it is still there, and then in one step for whoever reads.
func ExampleService_Exec() {
	db, done := open()
	defer done()

	ctx := context.Background()
	if _, err := db.Exec(ctx, quorate.Set("accounts/ann", []byte("7")), quorate.Set("accounts/bob", []byte("0"))); err != nil {
		log.Fatal(err)
	}
	for range 2 {
		revision, err := db.Exec(ctx,
			quorate.IfValue("accounts/ann", []byte("7")),
			quorate.Set("accounts/ann", []byte("2")),
			quorate.Set("accounts/bob", []byte("5")))
		var condition *quorate.ConditionError
		switch {
		case err == nil:
			fmt.Println("moved at revision", revision)
		case errors.As(err, &condition):
			fmt.Println(condition.Key, "has", condition.Have, "since revision", condition.Version)
		default:
			log.Fatal(err)
		}
	}
	// Output:
	// moved at revision 4
	// accounts/ann has another value since revision 3
}

// A counter that every member counts up: no increment is lost, whoever else counts.
func ExampleService_Update() {
	db, done := open()
	defer done()

	ctx := context.Background()
	for range 3 {
		e, err := db.Update(ctx, "visits", func(old quorate.Entry) ([]byte, error) {
			n := 0
			if old.Version != 0 { // there is one
				var err error
				if n, err = strconv.Atoi(string(old.Value)); err != nil {
					return nil, err
				}
			}
			return strconv.AppendInt(nil, int64(n+1), 10), nil
		})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s, version %d\n", e.Value, e.Version)
	}
	// Output:
	// 1, version 1
	// 2, version 2
	// 3, version 3
}

// An entry's version makes a write depend on what was read.
func ExampleService_Lookup() {
	db, done := open()
	defer done()

	ctx := context.Background()
	_, err := db.Lookup(ctx, "owner")
	fmt.Println(errors.Is(err, quorate.ErrNotFound))
	if err := db.Set(ctx, "owner", []byte("ann")); err != nil {
		log.Fatal(err)
	}
	e, err := db.Lookup(ctx, "owner")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, version %d\n", e.Value, e.Version)
	if err := db.Set(ctx, "owner", []byte("bob")); err != nil {
		log.Fatal(err)
	}
	_, err = db.Exec(ctx, quorate.IfVersion("owner", e.Version), quorate.Delete("owner"))
	fmt.Println(err)
	// Output:
	// true
	// ann, version 1
	// precondition not satisfied: key "owner": want version 1, have version 2
}

// Local reads this member's copy, and tells how old it can be: an answer from a copy that is too old is none.
func ExampleService_Local() {
	db, done := open()
	defer done()

	if err := db.Set(context.Background(), "flags/checkout", []byte("on")); err != nil {
		log.Fatal(err)
	}
	local := db.Local()
	if age := time.Since(local.Freshness().AsOf); age > time.Minute {
		log.Fatal("this member has confirmed nothing for ", age)
	}
	e, err := local.Lookup("flags/checkout")
	fmt.Printf("%s %v\n", e.Value, err)
	// Output: on <nil>
}

// Stale answers from this member's memory: for what is read at every request and may be a moment old.
func ExampleService_Stale() {
	db, done := open()
	defer done()

	if err := db.Set(context.Background(), "flags/checkout", []byte("on")); err != nil {
		log.Fatal(err)
	}
	flags := db.Stale()
	if string(flags.Get("flags/checkout")) == "on" {
		fmt.Println("the new checkout")
	}
	// Output: the new checkout
}

// Ready waits for a majority; what is missing is in the error.
func ExampleService_Ready() {
	db, done := open()
	defer done()

	http.HandleFunc("GET /readyz", func(w http.ResponseWriter, req *http.Request) {
		ctx, cancel := context.WithTimeout(req.Context(), time.Second)
		defer cancel()
		if err := db.Ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	fmt.Println(db.Ready(context.Background()), db.Status().Role)
	// Output: <nil> leader
}

// A list is of one moment: what the body writes is not in it.
func ExampleService_List() {
	db, done := open()
	defer done()

	ctx := context.Background()
	for _, job := range []string{"jobs/1", "jobs/2", "jobs/3", "workers/ann"} {
		if err := db.Set(ctx, job, []byte("new")); err != nil {
			log.Fatal(err)
		}
	}
	for e, err := range db.List(ctx, "jobs/", quorate.From("jobs/2")) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s %s, version %d\n", e.Key, e.Value, e.Version)
		if err := db.Set(ctx, e.Key+"/seen", nil); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// jobs/2 new, version 2
	// jobs/3 new, version 3
}

// A copy of a part of the state that follows every change of it.
func ExampleService_Watch() {
	db, done := open()
	defer done()

	ctx := context.Background()
	if err := db.Set(ctx, "flags/checkout", []byte("on")); err != nil {
		log.Fatal(err)
	}
	flags := make(map[string]string)
	for e, err := range db.Watch(ctx, "flags/", 0) {
		switch {
		case err != nil:
			log.Fatal(err) // or watch again, from the last e.Revision
		case e.Kind == quorate.EventReset:
			clear(flags)
		case e.Kind == quorate.EventSet:
			flags[e.Entry.Key] = string(e.Entry.Value)
		case e.Kind == quorate.EventDelete:
			delete(flags, e.Entry.Key)
		}
		fmt.Println(e.Kind, e.Revision, flags)
		if e.Kind == quorate.EventSynced { // somebody changes something
			go db.Exec(ctx, quorate.Delete("flags/checkout"), quorate.Set("flags/search", []byte("off")))
		}
		if e.Revision == 3 {
			break
		}
	}
	// Output:
	// reset 0 map[]
	// set 0 map[flags/checkout:on]
	// synced 1 map[flags/checkout:on]
	// delete 2 map[]
	// set 3 map[flags/search:off]
}

// A backup is an SQLite file; Restore makes a new cluster of one member out of it.
func ExampleRestore() {
	db, done := open()
	defer done()
	ctx := context.Background()
	if err := db.Set(ctx, "color", []byte("blue")); err != nil {
		log.Fatal(err)
	}
	var backup bytes.Buffer
	revision, err := db.Backup(ctx, &backup)
	if err != nil {
		log.Fatal(err)
	}

	dir, err := os.MkdirTemp("", "quorate-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "backup.db")
	if err := os.WriteFile(file, backup.Bytes(), 0o600); err != nil {
		log.Fatal(err)
	}
	if err := quorate.Restore(filepath.Join(dir, "new"), file); err != nil {
		log.Fatal(err)
	}
	restored, err := quorate.Open(ctx, quorate.Config{Dir: filepath.Join(dir, "new")})
	if err != nil {
		log.Fatal(err)
	}
	defer restored.Close()
	val, err := restored.Get(ctx, "color")
	fmt.Println(string(val), err, restored.Status().Revision > revision, restored.Status().Cluster == db.Status().Cluster)
	// Output: blue <nil> true false
}

// open gives an example a store of its own.
func open() (db *quorate.Service, done func()) {
	dir, err := os.MkdirTemp("", "quorate-")
	if err != nil {
		log.Fatal(err)
	}
	db, err = quorate.Open(context.Background(), quorate.Config{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	return db, func() {
		db.Close()
		os.RemoveAll(dir)
	}
}

// SQL over the current entries and over what led to them. It only reads: anything else is ErrInvalid.
func ExampleService_Query() {
	dir, err := os.MkdirTemp("", "quorate-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	ctx := context.Background()
	db, err := quorate.Open(ctx, quorate.Config{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	for _, job := range []struct{ key, val string }{
		{"jobs/1", `{"queue":"mail","tries":0}`},
		{"jobs/2", `{"queue":"bills","tries":0}`},
		{"jobs/2", `{"queue":"bills","tries":3}`},
	} {
		if err := db.Set(ctx, job.key, []byte(job.val)); err != nil {
			log.Fatal(err)
		}
	}
	if err := db.Delete(ctx, "jobs/1"); err != nil {
		log.Fatal(err)
	}

	rows, err := db.Query(ctx, `SELECT key, value->>'$.tries', version FROM kv WHERE value->>'$.queue' = ?`, "bills")
	if err != nil {
		log.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var key string
		var tries int
		var version uint64
		if err := rows.Scan(&key, &tries, &version); err != nil {
			log.Fatal(err)
		}
		fmt.Println(key, tries, version)
	}
	if err := rows.Err(); err != nil {
		log.Fatal(err)
	}

	past, err := db.Query(ctx, `SELECT revision, key, deleted FROM history WHERE revision > ? ORDER BY revision`, 2)
	if err != nil {
		log.Fatal(err)
	}
	defer past.Close()
	for past.Next() {
		var revision uint64
		var key string
		var deleted bool
		if err := past.Scan(&revision, &key, &deleted); err != nil {
			log.Fatal(err)
		}
		fmt.Println(revision, key, deleted)
	}
	if err := past.Err(); err != nil {
		log.Fatal(err)
	}
	_, err = db.Query(ctx, `DELETE FROM kv`)
	fmt.Println(errors.Is(err, quorate.ErrInvalid), err)
	// Output:
	// jobs/2 3 3
	// 3 jobs/2 false
	// 4 jobs/1 true
	// true query: invalid argument: Query only reads
}
