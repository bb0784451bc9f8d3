// Embedded keeps a store in one process, without any network: it writes, reads, and shows what lies on disk. It makes a new
// directory under the system's temporary one, leaves it for you to look at, and ends by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/quorate/quorate"
)

func main() {
	log.SetFlags(0)
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "quorate-embedded-")
	if err != nil {
		return err
	}
	db, err := quorate.Open(ctx, quorate.Config{Dir: dir})
	if err != nil {
		return err
	}
	if err := errors.Join(use(ctx, db), look(dir), db.Close()); err != nil {
		return err
	}

	// Another process, or this one after a crash, goes on where the last one ended.
	if db, err = quorate.Open(ctx, quorate.Config{Dir: dir}); err != nil {
		return err
	}
	color, err := db.Get(ctx, "color")
	fmt.Printf("\nopened again: color = %s\nlook around, then: rm -r %s\n", color, dir)
	return errors.Join(err, db.Close())
}

func use(ctx context.Context, db *quorate.Service) error {
	// nil means that the write is on the disk, with fsync.
	if err := db.Set(ctx, "color", []byte("blue")); err != nil {
		return err
	}
	// Of all that insert one key, one wins: a name, a job that must be done once.
	for _, worker := range []string{"ann", "bob"} {
		switch err := db.Insert(ctx, "jobs/42", []byte(worker)); {
		case err == nil:
			fmt.Printf("insert jobs/42 = %s: done\n", worker)
		case errors.Is(err, quorate.ErrUnsatisfied):
			fmt.Printf("insert jobs/42 = %s: %v\n", worker, err)
		default:
			return err
		}
	}
	for _, key := range []string{"color", "jobs/42", "missing"} {
		val, err := db.Get(ctx, key) // a missing key is nil and no error
		if err != nil {
			return err
		}
		fmt.Printf("get %s: %q, nil: %t\n", key, val, val == nil)
	}
	fmt.Printf("stale color: %s\n", db.Stale().Get("color")) // memory speed; alone it is never behind
	return nil
}

// look shows the files, and reads one of them with SQLite's own tool while db is open.
func look(dir string) error {
	fmt.Printf("\nin %s:\n", dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		fmt.Println("  " + e.Name())
	}
	args := []string{"-readonly", filepath.Join(dir, "snap"), "select key, value, version from kv"}
	fmt.Printf("\nsqlite3 %s %s '%s'\n", args[0], args[1], args[2])
	out, err := exec.Command("sqlite3", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		fmt.Println("(there is no sqlite3 on this machine; its package has that name nearly everywhere)")
		return nil
	}
	fmt.Printf("%s", out)
	return err
}
