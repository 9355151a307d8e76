"""An HTTP client that counts its bytes: URL LOG TIMES METHOD:PATH:BYTES..."""

import http.client
import io
import os
import sys
import time
import urllib.parse

url, log_path, times, what = urllib.parse.urlsplit(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
log = os.open(log_path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
counts = {"read": 0, "written": 0, "first": 0}


class Raw(io.RawIOBase):
    """The reading side of a socket."""

    def __init__(self, sock):
        self.sock = sock

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.sock.recv_into(buffer)
        counts["first"] = counts["first"] or time.monotonic_ns()
        counts["read"] += count
        return count


class Counted:
    """A socket that counts."""

    def __init__(self, sock):
        self.sock = sock

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def sendall(self, data):
        counts["written"] += len(data)
        self.sock.sendall(data)

    def makefile(self, *_):
        return io.BufferedReader(Raw(self.sock))


connection = http.client.HTTPConnection(url.hostname, url.port)
connection.connect()
connection.sock = Counted(connection.sock)
for _ in range(times):
    for one in what:
        method, path, size = one.split(":")
        counts.update(read=0, written=0, first=0)
        began = time.monotonic_ns()
        connection.request(method, path, body=bytes(int(size)) or None)
        response = connection.getresponse()
        response.read()
        took = counts["first"] - began
        line = f"{os.getpid()} {method} {path} {response.status} {counts['written']} {counts['read']} {took}\n"
        os.write(log, line.encode())
