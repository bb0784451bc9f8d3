package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/quorate/quorate"
)

func main() {
	port := flag.String("port", "7001", "of this member")
	members := flag.String("members", "127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003", "all three, the same for each")
	flag.Parse()
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt)
	addr := "127.0.0.1:" + *port
	db, err := quorate.Open(ctx, quorate.Config{Dir: "data-" + *port, Addr: addr, Bootstrap: strings.Split(*members, ","), Timeout: time.Hour})
	check(err)
	server := &http.Server{Addr: addr, Handler: db, ReadHeaderTimeout: time.Second}
	go func() { check(server.ListenAndServe()) }()
	log.Printf("%s waits for the others, for an hour at most", addr)
	check(db.Set(ctx, "seen/"+addr, []byte(time.Now().Format(time.TimeOnly))))
	log.Printf("%s is in, and %s leads; Ctrl-C ends this one", addr, db.Status().LeaderAddr)
	<-ctx.Done()
	check(db.Close()) // while the server still serves: a leader hands over, and is reached until then
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
