"""HTTP servers that count their bytes: KIND PORT LOG.

KIND: threads (http.server, a thread per connection), pool (a few threads), prefork (processes that share the listener),
passed (one process accepts, another serves), asyncio.
"""

import array
import asyncio
import concurrent.futures
import http.server
import os
import socket
import socketserver
import sys
import time

kind, port, log_path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
log = os.open(log_path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)


def note(method, path, status, request, response):
    os.write(log, f"{os.getpid()} {method} {path} {status} {request} {response} 0\n".encode())


class Counted:
    """A file that counts what goes through it."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def readline(self, *args):
        line = self.inner.readline(*args)
        self.count += len(line)
        return line

    def read(self, *args):
        data = self.inner.read(*args)
        self.count += len(data)
        return data

    def write(self, data):
        self.count += len(data)
        return self.inner.write(data)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.rfile, self.wfile = Counted(self.rfile), Counted(self.wfile)

    def log_message(self, *args):
        pass

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("/")
        status = int(parts[2]) if parts[1] == "s" else 200
        number = int(parts[-1])
        if parts[1] == "slow":
            time.sleep(number / 1000)
            number = 2
        self.send_response(status)
        if parts[1] == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif status not in (204, 304):
            self.send_header("Content-Length", str(number))
        self.end_headers()
        if parts[1] == "chunked":
            for _ in range(number):
                self.wfile.write(b"3e8\r\n" + bytes(1000) + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        elif self.command != "HEAD" and number:
            self.wfile.write(bytes(number))
        note(self.command, self.path, status, self.rfile.count, self.wfile.count)
        self.rfile.count = self.wfile.count = 0


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128


class Pool(Server):
    workers = concurrent.futures.ThreadPoolExecutor(8)

    def process_request(self, request, client_address):
        self.workers.submit(self.process_request_thread, request, client_address)


def listen():
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    print("ready", flush=True)
    return listener


def prefork():
    listener = listen()
    for _ in range(4):
        if os.fork() == 0:
            break
    else:
        while True:
            time.sleep(60)
    server = Server(("::", port), Handler, bind_and_activate=False)
    server.socket = listener
    server.server_name, server.server_port = "test", port
    server.serve_forever()


def passed():
    accepts, serves = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        accepts.close()
        server = Server(("::", port), Handler, bind_and_activate=False)
        while True:
            _, ancillary, _, _ = serves.recvmsg(1, socket.CMSG_SPACE(4))
            (_, _, data) = ancillary[0]
            request = socket.socket(fileno=array.array("i", data)[0])
            server.process_request(request, request.getpeername())
    serves.close()
    listener = listen()
    while True:
        connection, _ = listener.accept()
        accepts.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))])
        connection.close()


async def connected(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            break
        lines = head.decode().lower().split("\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
        await reader.readexactly(length)
        method, path, _ = head.decode().split(" ", 2)
        parts = path.split("/")
        status = int(parts[2]) if parts[1] == "s" else 200
        number = int(parts[-1])
        if parts[1] == "slow":
            await asyncio.sleep(number / 1000)
            number = 2
        answer = f"HTTP/1.1 {status} Well\r\n".encode()
        if parts[1] == "chunked":
            answer += b"Transfer-Encoding: chunked\r\n\r\n" + (b"3e8\r\n" + bytes(1000) + b"\r\n") * number
            answer += b"0\r\n\r\n"
        elif status in (204, 304):
            answer += b"\r\n"
        else:
            answer += f"Content-Length: {number}\r\n\r\n".encode()
            answer += bytes(number) if method != "HEAD" else b""
        writer.write(answer)
        note(method, path, status, len(head) + length, len(answer))
        try:
            await writer.drain()
        except ConnectionError:
            break
    writer.close()


async def asynchronous():
    server = await asyncio.start_server(connected, sock=listen())
    await server.serve_forever()


if kind in ("threads", "pool"):
    server = (Server if kind == "threads" else Pool)(("::", port), Handler)
    print("ready", flush=True)
    server.serve_forever()
elif kind == "prefork":
    prefork()
elif kind == "passed":
    passed()
else:
    asyncio.run(asynchronous())
