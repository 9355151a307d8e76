//! Servers and clients of HTTP in other languages (`programs/`), each of which writes down every exchange: process, method, path,
//! status, bytes of request and response (`-` where it does not know), nanoseconds from before the request to the first byte.
//!
//! `/s/STATUS/N` is answered with that status and `N` bytes, `/slow/N` after `N` milliseconds, `/chunked/N` in `N` chunks.

use std::{
    convert::Infallible,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::TcpStream,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use testkit::service::free_port;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    http_net::Asked,
    process::{binary, prebuilt},
};

/// What programs are asked for, as clients take it: method, path, bytes of the body.
pub const PLAN: [&str; 12] = [
    "GET:/s/200/1024:0",
    "HEAD:/s/200/1024:0",
    "GET:/s/200/0:0",
    "GET:/s/200/300000:0",
    "POST:/s/201/10:20000",
    "PUT:/s/200/5:300000",
    "DELETE:/s/204/0:0",
    "GET:/s/304/0:0",
    "GET:/s/404/7:0",
    "GET:/s/503/0:0",
    "GET:/slow/40:0",
    "GET:/chunked/20:0",
];

/// One exchange as a program wrote it down.
#[derive(Clone, Debug)]
pub struct Noted {
    pub pid: String,
    pub asked: Asked,
    pub request: Option<u64>,
    pub response: Option<u64>,
    pub nanoseconds: u64,
}

/// Reads what was written down.
pub fn noted(log: &Path) -> Vec<Noted> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let parse = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [pid, method, path, status, request, response, nanoseconds] = words[..] else {
            panic!("{line}")
        };
        Noted {
            pid: pid.to_owned(),
            asked: (method.to_owned(), path.to_owned(), status.parse().unwrap()),
            request: request.parse().ok(),
            response: response.parse().ok(),
            nanoseconds: nanoseconds.parse().unwrap(),
        }
    };
    text.lines().map(parse).collect()
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/agent/programs")
        .join(name)
}

/// A Go program, built.
pub fn go(name: &'static str) -> PathBuf {
    if let Some(at) = prebuilt() {
        return at.join(name);
    }
    // With the agent's copy, it is removed at the end.
    let program = binary().with_file_name(name);
    if !program.exists() {
        let source = source(name);
        let mut command = Command::new("go");
        if source.is_dir() {
            command
                .args(["build", "-mod=readonly", "-o"])
                .arg(&program)
                .arg(".")
                .current_dir(source);
        } else {
            command.args(["build", "-o"]).arg(&program).arg(source);
        }
        let status = command.env("GOFLAGS", "").status().expect("go is installed");
        assert!(status.success(), "{name} is built");
    }
    program
}

/// The command of a server or client; its arguments follow.
pub fn program(name: &'static str) -> Command {
    let path = |program: &str, arg: PathBuf| {
        let mut command = Command::new(program);
        command.arg(arg);
        command
    };
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    let mut command = match extension {
        // A directory is a program in Go, too.
        Some("go") | None => Command::new(go(name)),
        Some("mjs") => path("node", source(name)),
        Some("java") => {
            let mut command = Command::new("java");
            command.args(["-XX:TieredStopAtLevel=1", "-Xmx128m"]).arg(source(name));
            command
        }
        // Not by way of anything that stands for it.
        _ => path("/usr/bin/python3", source(name)),
    };
    command.stdin(Stdio::null());
    command
}

/// A running server. Ends, with its children, when dropped.
pub struct Server {
    child: Child,
    pub log: PathBuf,
    pub port: u16,
}

impl Server {
    /// Starts a program that says `ready`; `args` go before its port and its log.
    pub fn start(name: &'static str, args: &[&str], directory: &Path) -> Self {
        let port = free_port().unwrap().port();
        let log = directory.join(format!("served-{name}-{}", args.join("-")));
        let mut child = program(name)
            .args(args)
            .arg(port.to_string())
            .arg(&log)
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        assert_eq!(said, "ready\n", "{name}");
        let this = Self { child, log, port };
        crate::http_net::wait_for(name, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        this
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: no pointers; the child leads a group of its own and is not reaped yet.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

/// Has a client ask for everything of `plan` so many times on one connection; what it wrote down.
pub fn asks(client: &'static str, url: &str, times: usize, plan: &[&str], directory: &Path) -> Vec<Noted> {
    let log = directory.join(format!("asked-{client}"));
    let _ = fs::remove_file(&log);
    if client == "curl" {
        curl(url, times, plan, &log);
    } else {
        let mut command = program(client);
        command.arg(url).arg(&log).arg(times.to_string()).args(plan);
        assert!(command.status().unwrap().success(), "{client} asks {url}");
    }
    noted(&log)
}

fn curl(url: &str, times: usize, plan: &[&str], log: &Path) {
    let mut file = fs::File::options().create(true).append(true).open(log).unwrap();
    let body = log.with_extension("body");
    for _ in 0..times {
        let mut command = Command::new("curl");
        for (n, one) in plan.iter().enumerate() {
            let parts: Vec<&str> = one.split(':').collect();
            let [method, path, size] = parts[..] else {
                panic!("{one}")
            };
            if n > 0 {
                command.arg("--next");
            }
            command.args(["-s", "-g", "-o", "/dev/null", "-H", "Expect:"]);
            command.args(["-w", "%{method} %{http_code} %{size_request} %{size_upload} %{size_header} %{size_download} %{time_starttransfer} %{time_total}\n"]);
            if method == "HEAD" {
                command.arg("--head");
            } else {
                command.args(["-X", method]);
            }
            if size != "0" {
                let body = body.with_extension(size);
                fs::write(&body, vec![0; size.parse().unwrap()]).unwrap();
                command.arg("--data-binary").arg(format!("@{}", body.display()));
            }
            command.arg(format!("{url}{path}"));
        }
        let child = command.stdout(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        assert_eq!(said.lines().count(), plan.len(), "{said}");
        for (line, one) in said.lines().zip(plan) {
            let words: Vec<&str> = line.split(' ').collect();
            let [method, status, request, upload, header, download, first, whole] = words[..] else {
                panic!("{line}")
            };
            // It counts some of a body as part of the request, and what chunks hold.
            let path = one.split(':').nth(1).unwrap();
            // With a body its first byte may be one of that.
            let seconds = if upload == "0" { first } else { whole };
            let request = if upload == "0" { request } else { "-" };
            let response = if path.starts_with("/chunked") {
                "-".to_owned()
            } else {
                (header.parse::<u64>().unwrap() + download.parse::<u64>().unwrap()).to_string()
            };
            let nanoseconds = (seconds.parse::<f64>().unwrap() * 1e9) as u64;
            writeln!(
                file,
                "{pid} {method} {path} {status} {request} {response} {nanoseconds}"
            )
            .unwrap();
        }
    }
}

/// A server made of hyper, in this process.
pub struct Hyper {
    _runtime: tokio::runtime::Runtime,
    pub log: PathBuf,
    pub port: u16,
}

/// A stream that counts what is read and written.
struct Counted {
    stream: tokio::net::TcpStream,
    counts: Arc<[AtomicU64; 2]>,
}

/// The exchanges of one connection. One is over when the next begins, for clients wait, or when the connection ends.
struct Book {
    log: PathBuf,
    counts: Arc<[AtomicU64; 2]>,
    then: [u64; 2],
    line: Option<String>,
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

impl Hyper {
    pub fn start(directory: &Path) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = std::net::TcpListener::bind("[::]:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let log = directory.join("served-hyper");
        runtime.spawn(serve(listener, log.clone()));
        Self {
            _runtime: runtime,
            log,
            port,
        }
    }
}

async fn serve(listener: std::net::TcpListener, log: PathBuf) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    while let Ok((stream, _)) = listener.accept().await {
        let counts: Arc<[AtomicU64; 2]> = Arc::default();
        let book = Arc::new(Mutex::new(Book {
            log: log.clone(),
            counts: Arc::clone(&counts),
            then: [0; 2],
            line: None,
        }));
        let service = service_fn(move |request| answer(request, Arc::clone(&book)));
        let stream = TokioIo::new(Counted { stream, counts });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(stream, service));
    }
}

async fn answer(request: Request<Incoming>, book: Arc<Mutex<Book>>) -> Result<Response<Body>, Infallible> {
    // What was written until now is the answer to the request before.
    book.lock().end();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.into_body().collect().await.unwrap();
    let parts: Vec<&str> = path.split('/').collect();
    let number: usize = parts.last().unwrap().parse().unwrap();
    let status: u16 = if parts[1] == "s" {
        parts[2].parse().unwrap()
    } else {
        200
    };
    book.lock().begin(&format!("{method} {path} {status}"));
    let whole = |length: usize| Full::new(Bytes::from(vec![0; length])).boxed();
    let response = Response::builder().status(status);
    let response = match parts[1] {
        "slow" => {
            tokio::time::sleep(Duration::from_millis(number as u64)).await;
            response.body(whole(2))
        }
        "chunked" => {
            let frames = (0..number).map(|_| Ok(Frame::data(Bytes::from(vec![0; 1000]))));
            response.body(StreamBody::new(tokio_stream::iter(frames)).boxed())
        }
        // With a length, hyper leaves the body out by itself.
        _ => response.body(whole(number)),
    };
    Ok(response.unwrap())
}

// === impl Book ===

impl Book {
    fn now(&self, way: usize) -> u64 {
        self.counts[way].load(Ordering::SeqCst)
    }

    /// All of a request is read.
    fn begin(&mut self, asked: &str) {
        let read = self.now(0);
        self.line = Some(format!("{} {asked} {}", std::process::id(), read - self.then[0]));
        self.then[0] = read;
    }

    /// All of its answer is written.
    fn end(&mut self) {
        let Some(line) = self.line.take() else { return };
        let written = self.now(1);
        let mut log = fs::File::options().create(true).append(true).open(&self.log).unwrap();
        writeln!(log, "{line} {} 0", written - self.then[1]).unwrap();
        self.then[1] = written;
    }
}

impl Drop for Book {
    fn drop(&mut self) {
        self.end();
    }
}

// === impl Counted ===

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(context, into);
        self.counts[0].fetch_add((into.filled().len() - before) as u64, Ordering::SeqCst);
        poll
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, from);
        if let Poll::Ready(Ok(written)) = poll {
            self.counts[1].fetch_add(written as u64, Ordering::SeqCst);
        }
        poll
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
