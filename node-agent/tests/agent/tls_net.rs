//! Servers and clients that speak HTTP inside TLS: programs that people run, with scripts.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
};

/// A program with a script; killed when dropped.
pub struct Script {
    pub child: Child,
    pub input: Option<ChildStdin>,
}

impl Script {
    pub fn start(program: &str, directory: &Path, name: &str, script: &str, args: &[&str]) -> Self {
        fs::write(directory.join(name), script).unwrap();
        let mut child = Command::new(program)
            .arg(name)
            .args(args)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let input = child.stdin.take();
        Self { child, input }
    }

    /// Waits for its next line.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let output = self.child.stdout.as_mut().unwrap();
        // One line at a time is all that it prints.
        BufReader::new(output).read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub fn go_on(&mut self) {
        writeln!(self.input.as_mut().unwrap()).unwrap();
    }

    pub fn end(mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Keeps a connection: asks once, waits for a line, asks some more.
pub const OLDER: &str = r#"
import ssl, http.client, sys
context = ssl.create_default_context(cafile='cert.pem')
connection = http.client.HTTPSConnection('localhost', int(sys.argv[1]), context=context)
def ask(path):
    connection.request('GET', path)
    connection.getresponse().read()
ask('/before')
print('ready', flush=True)
sys.stdin.readline()
for n in range(20):
    ask('/small')
"#;

/// Requests over one connection, with bodies.
pub const PYTHON: &str = r#"
import ssl, http.client, sys
context = ssl.create_default_context(cafile='cert.pem')
connection = http.client.HTTPSConnection('localhost', int(sys.argv[1]), context=context)
for n in range(30):
    connection.request('PUT', '/put', body=b'x' * 1000)
    connection.getresponse().read()
"#;

pub const NODE: &str = r#"
const https = require('https'), fs = require('fs');
const agent = new https.Agent({ keepAlive: true, maxSockets: 1, ca: fs.readFileSync('cert.pem') });
let left = 25;
function go() {
  if (left-- === 0) return agent.destroy();
  https.get({ host: 'localhost', port: process.argv[2], path: '/page', agent }, answer => {
    answer.on('data', () => {});
    answer.on('end', go);
  });
}
go();
"#;

/// Node has its own OpenSSL, and keeps records in memory.
pub const NODE_SERVER: &str = r#"
const https = require('https'), fs = require('fs');
https.createServer({ key: fs.readFileSync('key.pem'), cert: fs.readFileSync('cert.pem') }, (request, answer) => {
  request.resume().on('end', () => answer.end('n'.repeat(3000)));
}).listen(Number(process.argv[2]), '127.0.0.1');
"#;

pub const PYTHON_ASYNC: &str = r#"
import asyncio, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('cert.pem', 'key.pem')
async def serve(reader, writer):
    try:
        while True:
            await reader.readuntil(b'\r\n\r\n')
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n' + b'y' * 20000)
            await writer.drain()
    except asyncio.IncompleteReadError:
        writer.close()
async def main():
    server = await asyncio.start_server(serve, '127.0.0.1', int(sys.argv[1]), ssl=context)
    await server.serve_forever()
asyncio.run(main())
"#;

pub const PYTHON_SYNC: &str = r#"
import http.server, ssl, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        if self.path == '/slow':
            time.sleep(0.3)
        self.send_response(200)
        self.send_header('Content-Length', '1500')
        self.end_headers()
        self.wfile.write(b'z' * 1500)
    def log_message(self, *words):
        pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('cert.pem', 'key.pem')
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
"#;

/// Prints the files of OpenSSL that it has mapped, and waits.
pub const MAPPED: &str = r#"
import _ssl, sys
lines = (line.split(None, 5) for line in open('/proc/self/maps'))
files = {words[5].strip() for words in lines if len(words) == 6 and ('libssl' in words[5] or 'libcrypto' in words[5])}
print(' '.join(sorted(files)), flush=True)
sys.stdin.readline()
"#;

/// A proxy that is spoken to by TLS, for connections to one port.
pub const PROXY: &str = r#"
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('cert.pem', 'key.pem')
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
def serve(connection):
    try:
        client = context.wrap_socket(connection, server_side=True)
    except OSError:
        return
    while b'\r\n\r\n' not in client.recv(65536):
        pass
    server = socket.create_connection(('127.0.0.1', int(sys.argv[2])))
    client.sendall(b'HTTP/1.1 200 Connection established\r\n\r\n')
    threading.Thread(target=copy, args=(client, server), daemon=True).start()
    copy(server, client)
while True:
    try:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    except OSError:
        pass
"#;
