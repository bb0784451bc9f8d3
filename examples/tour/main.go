// Tour goes through what comes after Set and Get, on one member without a network: conditions, transactions, lists, watches,
// history and SQL. It makes the directory data-tour where it is started, leaves it for you to look at, and ends by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"github.com/quorate/quorate"
)

func main() {
	log.SetFlags(0)
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	if err := os.RemoveAll("data-tour"); err != nil {
		return err
	}
	db, err := quorate.Open(ctx, quorate.Config{Dir: "data-tour"})
	if err != nil {
		return err
	}
	for _, step := range []func(context.Context, *quorate.Service) error{claim, count, finish, list, look, query} {
		if err := step(ctx, db); err != nil {
			return err
		}
	}
	return db.Close()
}

// claim: of all that insert one key, one wins.
func claim(ctx context.Context, db *quorate.Service) error {
	for _, worker := range []string{"ann", "bob"} {
		err := db.Insert(ctx, "jobs/42", []byte(worker))
		fmt.Printf("%s claims job 42: %v\n", worker, err)
	}
	return nil
}

// count reads, changes and writes, and does it again if someone else has written meanwhile.
func count(ctx context.Context, db *quorate.Service) error {
	e, err := db.Update(ctx, "tries/42", func(old quorate.Entry) ([]byte, error) {
		n, _ := strconv.Atoi(string(old.Value)) // 0 if there is no such key yet
		return []byte(strconv.Itoa(n + 1)), nil
	})
	fmt.Printf("try %s of job 42, at revision %d\n", e.Value, e.Version)
	return err
}

// finish: all conditions hold and all of it happens, or nothing does.
func finish(ctx context.Context, db *quorate.Service) error {
	for range 2 {
		_, err := db.Exec(ctx,
			quorate.IfValue("jobs/42", []byte("ann")), // still mine
			quorate.Delete("jobs/42"),
			quorate.Set("done/42", []byte(`{"by": "ann", "seconds": 7}`)))
		fmt.Printf("ann ends job 42: %v\n", err)
	}
	return nil
}

// list goes through a prefix as it was at one moment, however long the loop takes.
func list(ctx context.Context, db *quorate.Service) error {
	for e, err := range db.List(ctx, "", quorate.Limit(10)) {
		if err != nil {
			return err
		}
		fmt.Printf("%s = %s (version %d)\n", e.Key, e.Value, e.Version)
	}
	return nil
}

// look follows the changes for a moment.
func look(ctx context.Context, db *quorate.Service) error {
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := follow(ctx, db, 1); !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// follow sees every change after a revision, each once, in order, until ctx ends.
func follow(ctx context.Context, db *quorate.Service, since uint64) error {
	for event, err := range db.Watch(ctx, "", since) {
		if err != nil {
			return err
		}
		fmt.Println(event.Revision, event.Kind, event.Entry.Key)
		since = event.Revision // where to go on after a restart
	}
	return nil
}

// query is SQL that can only read.
func query(ctx context.Context, db *quorate.Service) error {
	rows, err := db.Query(ctx, "SELECT key, value->>'$.by', value->>'$.seconds' FROM kv WHERE key GLOB 'done/*'")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var key, by string
		var seconds int
		if err := rows.Scan(&key, &by, &seconds); err != nil {
			return err
		}
		fmt.Printf("%s: by %s in %d s\n", key, by, seconds)
	}
	return rows.Err()
}
