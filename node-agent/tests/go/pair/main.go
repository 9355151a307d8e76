// Speaks HTTP over TLS by crypto/tls, and counts what passes: the truth of the tests of Go programs.
//
//	pair serve ADDRESS [wrap]   prints "port N", and at the end of its input "METHOD PATH STATUS COUNT" for all it served
//	pair ask ADDRESS            for each line "1|2 GOROUTINES ROUNDS WHAT..." of its input asks for what the words say, prints
//	                            "METHOD PATH STATUS COUNT SENT READ" for what it asked, then "done"; connections stay open
//
// A word is METHOD:PATH:SIZE, with the size of the request's body.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

type sum struct{ count, sent, read int64 }

// Sums by "METHOD PATH STATUS".
type sums struct {
	lock sync.Mutex
	all  map[string]sum
}

func (s *sums) add(key string, sent, read int64) {
	s.lock.Lock()
	defer s.lock.Unlock()
	was := s.all[key]
	s.all[key] = sum{was.count + 1, was.sent + sent, was.read + read}
}

func main() {
	switch os.Args[1] {
	case "serve":
		serve(os.Args[2], len(os.Args) > 3)
	case "ask":
		ask(os.Args[2])
	}
}

// A connection inside of another type, as programs make them that watch their connections.
type wrapped struct {
	name string
	net.Conn
}

type wrapping struct{ net.Listener }

func (l wrapping) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &wrapped{"wrapped", conn}, err
}

func serve(address string, wrap bool) {
	served := sums{all: map[string]sum{}}
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		words := strings.Split(r.URL.Path, "/")
		size, _ := strconv.Atoi(words[len(words)-1])
		status := 200
		switch words[1] {
		case "bytes":
			w.Header().Set("Content-Length", strconv.Itoa(size))
			w.Write(bytes.Repeat([]byte{'x'}, size))
		case "chunks":
			for ; size > 0; size -= 1000 {
				w.Write(bytes.Repeat([]byte{'x'}, 1000))
				w.(http.Flusher).Flush()
			}
		case "echo":
			w.Write(body)
		case "status":
			status = size
			w.WriteHeader(status)
		case "pkg.Service":
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			w.Write(body)
			w.Header().Set("Grpc-Status", strconv.Itoa(size))
		}
		served.add(fmt.Sprint(r.Method, " ", r.URL.Path, " ", status), 0, 0)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("port", listener.Addr().(*net.TCPAddr).Port)
	if wrap {
		listener = wrapping{listener}
	}
	server := http.Server{
		Handler:   http.HandlerFunc(handler),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	go server.ServeTLS(listener, "", "")
	io.Copy(io.Discard, os.Stdin)
	for key, sum := range served.all {
		fmt.Println(key, sum.count)
	}
}

func certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Counts the bytes that pass, and knows how many there were when an exchange began.
type counted struct {
	net.Conn
	sent, read atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read.Add(int64(n))
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	// Before the answer can come.
	c.sent.Add(int64(len(b)))
	return c.Conn.Write(b)
}

func ask(address string) {
	config := &tls.Config{InsecureSkipVerify: true}
	// One connection each, so that nothing else is counted on it.
	one := []*http.Transport{}
	dial := func(_ context.Context, network, address string) (net.Conn, error) {
		conn, err := tls.Dial(network, address, config)
		return &counted{Conn: conn}, err
	}
	two := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		goroutines, _ := strconv.Atoi(words[1])
		rounds, _ := strconv.Atoi(words[2])
		asked := sums{all: map[string]sum{}}
		var all sync.WaitGroup
		for n := range goroutines {
			if n == len(one) {
				one = append(one, &http.Transport{DialTLSContext: dial})
			}
			transport := two
			if words[0] == "1" {
				transport = one[n]
			}
			all.Add(1)
			go func() {
				defer all.Done()
				for range rounds {
					for _, word := range words[3:] {
						exchange(transport, address, strings.Split(word, ":"), &asked)
					}
				}
			}()
		}
		all.Wait()
		for key, sum := range asked.all {
			fmt.Println(key, sum.count, sum.sent, sum.read)
		}
		fmt.Println("done")
	}
}

func exchange(transport *http.Transport, address string, what []string, asked *sums) {
	size, _ := strconv.Atoi(what[2])
	var conn *counted
	var sent, read int64
	trace := httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if c, ok := got.Conn.(*counted); ok {
			conn, sent, read = c, c.sent.Load(), c.read.Load()
		}
	}}
	context := httptrace.WithClientTrace(context.Background(), &trace)
	body := bytes.NewReader(bytes.Repeat([]byte{'y'}, size))
	request, err := http.NewRequestWithContext(context, what[0], "https://"+address+what[1], body)
	if err != nil {
		log.Fatal(err)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		log.Fatal(err)
	}
	// All of it is on its way before the connection is given back.
	rest, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err, len(rest))
	}
	if conn != nil {
		sent, read = conn.sent.Load()-sent, conn.read.Load()-read
	}
	response.Body.Close()
	asked.add(fmt.Sprint(what[0], " ", what[1], " ", response.StatusCode), sent, read)
}
