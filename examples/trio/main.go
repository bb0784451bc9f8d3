package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"os"
	"os/signal"
	"time"

	"github.com/quorate/quorate"
)

func main() {
	port, join := flag.String("port", "7001", "of this member"), flag.String("join", "", "host:port of any other member")
	flag.Parse()
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt)
	addr := "127.0.0.1:" + *port
	db, err := quorate.Open(ctx, quorate.Config{Dir: "data-" + *port, Addr: addr, Join: *join})
	check(err)
	server := &http.Server{Addr: addr, Handler: db, ReadHeaderTimeout: time.Second}
	go func() { check(server.ListenAndServe()) }()
	for _, other := range flag.Args() {
		check(db.AddAllowedMember(ctx, other))
	}
	check(db.Set(ctx, "seen/"+addr, []byte(time.Now().Format(time.TimeOnly))))
	val, err := db.Get(ctx, "seen/127.0.0.1:7001")
	check(err)
	log.Printf("%s: the first member was started at %s; Ctrl-C ends this one", addr, val)
	<-ctx.Done()
	check(db.Close()) // while the server still serves: a leader hands over, and is reached until then
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
