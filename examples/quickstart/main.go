package main

import (
	"context"
	"fmt"
	"log"

	"github.com/quorate/quorate"
)

func main() {
	ctx := context.Background()
	db, err := quorate.Open(ctx, quorate.Config{Dir: "data"})
	check(err)
	check(db.Set(ctx, "flags/checkout", []byte("on")))
	val, err := db.Get(ctx, "flags/checkout")
	check(err)
	fmt.Printf("flags/checkout = %s\n", val)
	check(db.Close())
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
