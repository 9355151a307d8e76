//! Servers and clients that speak HTTP, and what they count themselves.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use testkit::service::free_port;

use crate::process::PATIENCE;

/// What was asked, and how it was answered.
pub type Asked = (String, String, u64);

/// Exchanges of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub count: u64,
    /// Bytes of requests and of responses.
    pub requests: u64,
    pub responses: u64,
}

pub type Sums = BTreeMap<Asked, Sum>;

pub fn add(sums: &mut Sums, asked: Asked, requests: usize, responses: usize) {
    let sum = sums.entry(asked).or_default();
    sum.count += 1;
    sum.requests += requests as u64;
    sum.responses += responses as u64;
}

/// Rows of `httpflow`.
pub fn rows(directory: &Path) -> Vec<Value> {
    let text = fs::read_to_string(directory.join("rows.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let rows = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter(|row| row["measurement"] == "httpflow").collect()
}

pub fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_else(|| panic!("{key} of {row}"))
}

pub fn number(row: &Value, key: &str) -> u64 {
    row[key].as_u64().unwrap_or_else(|| panic!("{key} of {row}"))
}

/// Rows of the clients (`outgoing`) or servers (`incoming`) of one of these ports.
pub fn rows_at<'a>(rows: &'a [Value], direction: &str, ports: &[u16]) -> Vec<&'a Value> {
    let server = if direction == "outgoing" {
        "dst_port"
    } else {
        "src_port"
    };
    rows.iter()
        .filter(|row| text(row, "direction") == direction)
        .filter(|row| ports.iter().any(|port| text(row, server) == port.to_string()))
        .collect()
}

/// The sums of rows.
pub fn sums_of(rows: &[&Value]) -> Sums {
    let mut sums = Sums::new();
    for row in rows {
        let asked = (
            text(row, "method").to_owned(),
            text(row, "path").to_owned(),
            number(row, "status_code"),
        );
        let (read, written) = (number(row, "bytes_read"), number(row, "bytes_written"));
        let (requests, responses) = if text(row, "direction") == "outgoing" {
            (written, read)
        } else {
            (read, written)
        };
        let sum = sums.entry(asked).or_default();
        sum.count += number(row, "count");
        sum.requests += requests;
        sum.responses += responses;
    }
    sums
}

/// nginx, with an access log that counts bytes. Ends when dropped.
pub struct Nginx {
    child: Child,
    directory: PathBuf,
    pub port: u16,
    /// Speaks HTTP/2 without TLS.
    pub port2: u16,
    /// Speaks either inside TLS, if it was started for that.
    pub port_tls: u16,
}

/// A port that rows show, because no client is given one like it.
fn low_port() -> u16 {
    (8000..8100)
        .find(|port| std::net::TcpListener::bind(("::", *port)).is_ok())
        .unwrap_or_else(|| free_port().unwrap().port())
}

impl Nginx {
    /// With files below `directory/www`.
    pub fn start(directory: &Path) -> Self {
        Self::launch(directory, "")
    }

    /// The same, with TLS; the certificate is `directory/cert.pem`.
    pub fn start_tls(directory: &Path) -> Self {
        certificate(directory);
        let root = directory.display();
        Self::launch(
            directory,
            &format!("ssl http2; ssl_certificate {root}/cert.pem; ssl_certificate_key {root}/key.pem; "),
        )
    }

    fn launch(directory: &Path, tls: &str) -> Self {
        let port = low_port();
        let port2 = (port + 1..9000)
            .find(|port| std::net::TcpListener::bind(("::", *port)).is_ok())
            .unwrap();
        let port_tls = (port2 + 1..9000)
            .find(|port| std::net::TcpListener::bind(("::", *port)).is_ok())
            .unwrap();
        let inside = if tls.is_empty() {
            String::new()
        } else {
            format!(
                "server {{ listen 127.0.0.1:{port_tls} {tls} listen [::1]:{port_tls} ssl http2; root {}/www;\n\
                 location /put {{ return 201; }} }}\n",
                directory.display()
            )
        };
        let www = directory.join("www");
        fs::create_dir_all(&www).unwrap();
        let root = directory.display();
        let configuration = format!(
            "daemon off; master_process on; worker_processes 2; pid {root}/nginx.pid; error_log {root}/error.log;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n\
             log_format truth '$request_method $uri $status $request_length $bytes_sent';\n\
             access_log {root}/access.log truth buffer=64k flush=100ms; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n\
             client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;\n\
             uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi; client_max_body_size 100m;\n\
             server {{ listen 127.0.0.1:{port}; listen [::1]:{port}; root {root}/www;\n\
             location /zip/ {{ alias {root}/www/; gzip on; gzip_min_length 1; gzip_types *; }}\n\
             location /teapot {{ return 418 'short and stout'; }}\n\
             location /put {{ return 201; }} }}\n\
             server {{ listen 127.0.0.1:{port2} http2; listen [::1]:{port2} http2; root {root}/www; }}\n\
             {inside}}}\n"
        );
        let file = directory.join("nginx.conf");
        fs::write(&file, configuration).unwrap();
        let child = Command::new("nginx")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .args(["-c", &file.display().to_string(), "-e", &format!("{root}/error.log")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx is installed");
        let this = Self {
            child,
            directory: directory.to_owned(),
            port,
            port2,
            port_tls,
        };
        wait_for(&format!("nginx: {}/error.log", directory.display()), || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        this
    }

    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// What the access log says, once it is complete.
    pub fn truth(&self) -> Sums {
        let read = || fs::read_to_string(self.directory.join("access.log")).unwrap_or_default();
        let mut log = read();
        // It is written late.
        loop {
            std::thread::sleep(Duration::from_millis(400));
            let later = read();
            if later == log {
                break;
            }
            log = later;
        }
        let mut sums = Sums::new();
        for line in log.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [method, path, status, requests, responses] = words[..] else {
                panic!("{line}")
            };
            // Connections that ask nothing.
            if status == "400" {
                continue;
            }
            let asked = (method.to_owned(), path.to_owned(), status.parse().unwrap());
            add(&mut sums, asked, requests.parse().unwrap(), responses.parse().unwrap());
        }
        sums
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: no pointers; the child is not reaped yet. SIGTERM ends its workers too.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let _ = self.child.wait();
    }
}

/// A certificate for localhost, and its key, in `directory`.
pub fn certificate(directory: &Path) {
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        ])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(directory)
        .stderr(Stdio::null())
        .status()
        .expect("openssl is installed");
    assert!(made.success());
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What curl says of one exchange.
#[derive(Debug)]
pub struct Curled {
    pub request: usize,
    pub response: usize,
    pub body: usize,
    pub first_byte: Duration,
}

pub fn curl(args: &[&str]) -> Curled {
    let format = "%{size_request} %{size_header} %{size_download} %{size_upload} %{time_starttransfer}";
    let out = Command::new("curl")
        .args(["-s", "-g", "-o", "/dev/null", "-w", format])
        .args(args)
        .output()
        .unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    let words: Vec<&str> = said.split(' ').collect();
    let [request, header, download, upload, first] = words[..] else {
        panic!("curl {args:?}: {said}")
    };
    let size = |word: &str| word.parse::<usize>().unwrap();
    Curled {
        request: size(request) + size(upload),
        response: size(header) + size(download),
        body: size(download),
        first_byte: Duration::from_secs_f64(first.parse().unwrap()),
    }
}

/// A client that counts what it sends and reads. Responses have a length.
pub struct Client {
    stream: TcpStream,
    left: Vec<u8>,
}

impl Client {
    pub fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            left: Vec::new(),
        }
    }

    /// Another way to send on it.
    pub fn writer(&self) -> TcpStream {
        self.stream.try_clone().unwrap()
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Reads one response; its status and its bytes.
    pub fn response(&mut self, head: bool) -> (u64, usize) {
        loop {
            if let Some(end) = self.left.windows(4).position(|four| four == b"\r\n\r\n") {
                let text = String::from_utf8_lossy(&self.left[..end]).to_lowercase();
                let status = text.split(' ').nth(1).unwrap().parse().unwrap();
                let length = text
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: "))
                    .map_or(0, |length| length.trim().parse::<usize>().unwrap());
                let whole = end + 4 + if head { 0 } else { length };
                while self.left.len() < whole {
                    self.read();
                }
                self.left.drain(..whole);
                return (status, whole);
            }
            self.read();
        }
    }

    fn read(&mut self) {
        let mut buffer = vec![0; 256 * 1024];
        let size = self.stream.read(&mut buffer).unwrap();
        assert!(size > 0, "the server closed the connection");
        self.left.extend_from_slice(&buffer[..size]);
    }

    /// One exchange, counted.
    pub fn exchange(&mut self, method: &str, path: &str, sums: &mut Sums) {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.send(request.as_bytes());
        let (status, bytes) = self.response(method == "HEAD");
        let plain = path.split('?').next().unwrap();
        add(
            sums,
            (method.to_owned(), plain.to_owned(), status),
            request.len(),
            bytes,
        );
    }
}
