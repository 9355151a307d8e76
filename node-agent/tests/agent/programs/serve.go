// An HTTP server that counts the bytes of its connections: PORT LOG.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A connection, and what it carried. Written to by the connection's own goroutine; read counts are taken while the client waits.
type counted struct {
	net.Conn
	mu                  sync.Mutex
	read, written       int
	readThen, writeThen int
	request             string
	requestBytes        int
}

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &counted{Conn: conn}, err
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	c.read += n
	c.mu.Unlock()
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.mu.Lock()
	c.written += n
	c.mu.Unlock()
	return n, err
}

type key struct{}

func handle(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	c := r.Context().Value(key{}).(*counted)
	parts := strings.Split(r.URL.Path, "/")
	status, number := 200, 0
	if parts[1] == "s" {
		status, _ = strconv.Atoi(parts[2])
		number, _ = strconv.Atoi(parts[3])
	} else {
		number, _ = strconv.Atoi(parts[2])
	}
	c.mu.Lock()
	c.request = fmt.Sprintf("%s %s %d", r.Method, r.URL.Path, status)
	// All of it is here, and nothing of the next.
	c.requestBytes, c.readThen = c.read-c.readThen, c.read
	c.mu.Unlock()
	switch parts[1] {
	case "s":
		if status != 204 && status != 304 {
			w.Header().Set("Content-Length", strconv.Itoa(number))
		}
		w.WriteHeader(status)
		if r.Method != "HEAD" && number > 0 {
			w.Write(make([]byte, number))
		}
	case "slow":
		time.Sleep(time.Duration(number) * time.Millisecond)
		w.Write([]byte("ok"))
	case "chunked":
		for range number {
			w.Write(make([]byte, 1000))
			w.(http.Flusher).Flush()
		}
	}
}

func main() {
	log, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		panic(err)
	}
	inner, err := net.Listen("tcp", "[::]:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	server := http.Server{
		Handler:     http.HandlerFunc(handle),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, key{}, c) },
		ConnState: func(conn net.Conn, state http.ConnState) {
			c := conn.(*counted)
			c.mu.Lock()
			defer c.mu.Unlock()
			if (state == http.StateIdle || state == http.StateClosed) && c.request != "" {
				fmt.Fprintf(log, "%d %s %d %d 0\n", os.Getpid(), c.request, c.requestBytes, c.written-c.writeThen)
				c.request, c.writeThen = "", c.written
			}
		},
	}
	fmt.Println("ready")
	panic(server.Serve(listener{inner}))
}
