// A gRPC server and client that write down every call: serve PORT LOG, or ask ADDRESS LOG TIMES.
//
// The first byte of what is sent last says with which status the server ends the call. Unary and Bidi send back what they get,
// Hang does not end before the client gives up.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type bytesValue = wrapperspb.BytesValue

func ended(code byte) error {
	if code == 0 {
		return nil
	}
	return status.Error(codes.Code(code), "as wanted")
}

var log *os.File

func note(path string, code any) {
	fmt.Fprintf(log, "%d %s %v\n", os.Getpid(), path, code)
}

func unary(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var request bytesValue
	if err := decode(&request); err != nil {
		return nil, err
	}
	note("/truth.Echo/Unary", request.Value[0])
	return &request, ended(request.Value[0])
}

func bidi(_ any, stream grpc.ServerStream) error {
	var last byte
	for {
		var message bytesValue
		err := stream.RecvMsg(&message)
		if err == io.EOF {
			note("/truth.Echo/Bidi", last)
			return ended(last)
		}
		if err != nil {
			return err
		}
		last = message.Value[0]
		if err := stream.SendMsg(&message); err != nil {
			return err
		}
	}
}

func hang(_ any, stream grpc.ServerStream) error {
	var message bytesValue
	if err := stream.RecvMsg(&message); err != nil {
		return err
	}
	stream.SendMsg(&message)
	<-stream.Context().Done()
	note("/truth.Echo/Hang", "-")
	return stream.Context().Err()
}

func serve(port string) {
	server := grpc.NewServer()
	both := grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	streams := []grpc.StreamDesc{both, both}
	streams[0].StreamName, streams[0].Handler = "Bidi", bidi
	streams[1].StreamName, streams[1].Handler = "Hang", hang
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "truth.Echo",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Unary", Handler: unary}},
		Streams:     streams,
	}, struct{}{})
	listener, err := net.Listen("tcp", "[::]:"+port)
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	panic(server.Serve(listener))
}

func ask(address string, times int) {
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	both := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	for n := range times {
		message := wrapperspb.Bytes(make([]byte, 1+n*1000))
		message.Value[0] = byte(n % 4)
		var answer bytesValue
		err := connection.Invoke(ctx, "/truth.Echo/Unary", message, &answer)
		note("/truth.Echo/Unary", int(status.Code(err)))

		stream, err := connection.NewStream(ctx, both, "/truth.Echo/Bidi")
		if err != nil {
			panic(err)
		}
		for range 5 {
			stream.SendMsg(message)
			if err := stream.RecvMsg(&answer); err != nil {
				panic(err)
			}
		}
		stream.CloseSend()
		err = stream.RecvMsg(&answer)
		if err == io.EOF {
			err = nil
		}
		note("/truth.Echo/Bidi", int(status.Code(err)))

		short, cancel := context.WithCancel(ctx)
		stream, err = connection.NewStream(short, both, "/truth.Echo/Hang")
		if err != nil {
			panic(err)
		}
		stream.SendMsg(message)
		if err := stream.RecvMsg(&answer); err != nil {
			panic(err)
		}
		cancel()
		note("/truth.Echo/Hang", "-")
		// Sent later than the call ends here.
		time.Sleep(20 * time.Millisecond)
	}
	connection.Close()
}

func main() {
	var err error
	log, err = os.OpenFile(os.Args[3], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		panic(err)
	}
	if os.Args[1] == "serve" {
		serve(os.Args[2])
	} else {
		times, _ := strconv.Atoi(os.Args[4])
		ask(os.Args[2], times)
	}
}
