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
	go func() { log.Fatal(server.ListenAndServe()) }()

	ctx := context.Background()
	for _, addr := range []string{"10.0.0.2:7001", "10.0.0.3:7001"} {
		if err := s.AddAllowedMember(ctx, addr); err != nil {
			log.Fatal(err)
		}
	}
	if err := s.Set(ctx, "region", []byte("eu-west")); err != nil {
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
	fmt.Println(string(val), err, restored.Status().Revision == revision, restored.Status().Cluster == db.Status().Cluster)
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
