// An HTTP client that counts the bytes of its connections: URL LOG TIMES METHOD:PATH:BYTES...
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

type counted struct {
	net.Conn
}

var read, written int
var began, first time.Time

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && first.IsZero() {
		first = time.Now()
	}
	read += n
	return n, err
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	written += n
	return n, err
}

func main() {
	log, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		panic(err)
	}
	times, _ := strconv.Atoi(os.Args[3])
	client := http.Client{Transport: &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			return counted{conn}, err
		},
	}}
	for range times {
		for _, what := range os.Args[4:] {
			parts := strings.Split(what, ":")
			size, _ := strconv.Atoi(parts[2])
			var body io.Reader
			if size > 0 {
				body = bytes.NewReader(make([]byte, size))
			}
			request, err := http.NewRequest(parts[0], os.Args[1]+parts[1], body)
			if err != nil {
				panic(err)
			}
			read, written, first, began = 0, 0, time.Time{}, time.Now()
			response, err := client.Do(request)
			if err != nil {
				panic(err)
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			fmt.Fprintf(log, "%d %s %s %d %d %d %d\n", os.Getpid(), parts[0], parts[1], response.StatusCode, written, read,
				first.Sub(began).Nanoseconds())
		}
	}
}
