// A server of net/http that tableflip upgrades on HUP, drained by Shutdown within 30 s, as its documentation shows.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

func main() {
	upgrader, err := tableflip.New(tableflip.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer upgrader.Stop()
	go func() {
		hangups := make(chan os.Signal, 1)
		signal.Notify(hangups, syscall.SIGHUP)
		for range hangups {
			if err := upgrader.Upgrade(); err != nil {
				log.Println("upgrade failed:", err)
			}
		}
	}()

	release := load()
	listener, err := upgrader.Listen("tcp", os.Getenv("ADDRESS"))
	if err != nil {
		log.Fatal(err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		parts := strings.Split(strings.Trim(request.URL.Path, "/"), "/")
		if parts[0] == "slow" {
			seconds, _ := strconv.ParseFloat(parts[1], 64)
			time.Sleep(time.Duration(seconds * float64(time.Second)))
		}
		fmt.Fprintf(response, "%s %s", release, parts[len(parts)-1])
	})}
	go func() {
		if err := server.Serve(listener); err != http.ErrServerClosed {
			log.Println(err)
		}
	}()
	if err := upgrader.Ready(); err != nil {
		log.Fatal(err)
	}
	<-upgrader.Exit()
	time.AfterFunc(30*time.Second, func() { os.Exit(1) })
	server.Shutdown(context.Background())
}

// load reads the release, which takes as long as that of an application.
func load() string {
	release, err := os.ReadFile(os.Getenv("RELEASE_FILE"))
	if err != nil || string(release) == "broken" {
		log.Fatal("a release that does not start")
	}
	seconds, _ := strconv.ParseFloat(os.Getenv("IMPORT_SECONDS"), 64)
	time.Sleep(time.Duration(seconds * float64(time.Second)))
	return string(release)
}
