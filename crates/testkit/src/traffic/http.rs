//! Roles `http-server` and `http-client`: HTTP/1.1 on kept connections, each end counting its own exchanges.
//!
//! A request for `/s/STATUS/LENGTH` is answered with that status and so many bytes. Entry: [`run_server`], [`run_client`].

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use parking_lot::Mutex;

use super::{
    http_uring,
    options::{HttpBy, HttpClient, HttpServer},
    report::{Exchanged, Recorder},
    role, sys,
};

/// How long an end waits at a time before it looks whether it is to stop.
const TICK: Duration = Duration::from_millis(100);
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest head that is read.
const HEAD_MAX: usize = 64 * 1024;
/// Connections that a server keeps at once.
const CONNECTIONS_MAX: usize = 256;

/// One end of a connection, with what was read beyond the message before.
struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A message as it was read.
pub(super) struct Message {
    pub(super) first_line: String,
    /// Bytes of head and body.
    pub(super) bytes: u64,
    /// When its first bytes were there.
    pub(super) first: Instant,
}

// === impl Wire ===

impl Wire {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Reads the next message. `None` if the connection ended, or the role is to stop, before it began.
    fn message(&mut self, has_body: bool, patience: Option<Duration>) -> io::Result<Option<Message>> {
        let began = Instant::now();
        let mut first = (!self.buffer.is_empty()).then_some(began);
        loop {
            if let Some((first_line, length)) = whole(&self.buffer, has_body)? {
                self.buffer.drain(..length);
                return Ok(Some(Message {
                    first_line,
                    bytes: length as u64,
                    first: first.unwrap_or(began),
                }));
            }
            if !self.more(began, patience)? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(ErrorKind::UnexpectedEof.into())
                };
            }
            first.get_or_insert_with(Instant::now);
        }
    }

    /// Reads what there is; false at the end.
    fn more(&mut self, began: Instant, patience: Option<Duration>) -> io::Result<bool> {
        let mut part = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut part) {
                Ok(0) => return Ok(false),
                Ok(length) => {
                    self.buffer.extend_from_slice(part.get(..length).unwrap_or_default());
                    return Ok(true);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if patience.is_some_and(|patience| began.elapsed() > patience) {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    if sys::stopping() && self.buffer.is_empty() {
                        return Ok(false);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The first line and the length of the message that a buffer begins with, if all of it is there.
pub(super) fn whole(buffer: &[u8], has_body: bool) -> io::Result<Option<(String, usize)>> {
    let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if buffer.len() > HEAD_MAX {
            Err(ErrorKind::InvalidData.into())
        } else {
            Ok(None)
        };
    };
    let head = String::from_utf8_lossy(buffer.get(..at).unwrap_or_default());
    let body = if has_body { content_length(&head)? } else { 0 };
    let length = (at + 4).checked_add(body).ok_or(ErrorKind::InvalidData)?;
    let first_line = head.lines().next().unwrap_or_default().to_owned();
    Ok((buffer.len() >= length).then_some((first_line, length)))
}

fn content_length(head: &str) -> io::Result<usize> {
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim())
    });
    match value {
        None => Ok(0),
        Some(value) => value.parse().map_err(|_| ErrorKind::InvalidData.into()),
    }
}

/// Runs the role `http-server`.
///
/// # Errors
/// It cannot listen. What fails on a connection is in the report.
pub fn run_server(options: &HttpServer) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let listener = TcpListener::bind(SocketAddr::new(options.listen, options.port))
        .with_context(|| format!("listening on port {}", options.port))?;
    listener.set_nonblocking(true)?;
    let recorder = Arc::new(Mutex::new(Recorder::default()));
    let mut connections: Vec<std::thread::JoinHandle<()>> = Vec::new();
    if options.by == HttpBy::IoUring {
        listener.set_nonblocking(false)?;
        http_uring::serve(&listener, &recorder)?;
        return role::finish(&options.common, "http-server", &mut recorder.lock());
    }
    role::ready()?;
    while !sys::stopping() {
        sys::poll(listener.as_fd(), libc::POLLIN, TICK)?;
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(error) => {
                recorder.lock().error("accept", &error);
                continue;
            }
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= CONNECTIONS_MAX {
            continue;
        }
        let recorder = Arc::clone(&recorder);
        connections.push(std::thread::spawn(move || {
            if let Err(error) = serve(stream, peer, &recorder) {
                recorder.lock().error("serve", &error);
            }
        }));
    }
    for connection in connections {
        // A thread that panicked has written why.
        let _ = connection.join();
    }
    let mut recorder = recorder.lock();
    role::finish(&options.common, "http-server", &mut recorder)
}

fn serve(stream: TcpStream, peer: SocketAddr, recorder: &Mutex<Recorder>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let local = stream.local_addr()?;
    let mut wire = Wire::new(stream)?;
    while let Some(request) = wire.message(true, None)? {
        let answer = answer(&request.first_line);
        wire.stream.write_all(&answer)?;
        note(recorder, peer, local.port(), &request, answer.len());
    }
    Ok(())
}

/// What a request asks for: method, path, status, length.
fn wanted(first_line: &str) -> (&str, &str, u16, usize) {
    let mut words = first_line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let wanted = path.strip_prefix("/s/").and_then(|rest| rest.split_once('/'));
    let (status, length) = wanted
        .and_then(|(status, length)| Some((status.parse::<u16>().ok()?, length.parse::<usize>().ok()?)))
        .unwrap_or((400, 0));
    (method, path, status, length)
}

/// The answer to a request.
pub(super) fn answer(first_line: &str) -> Vec<u8> {
    let (method, _, status, length) = wanted(first_line);
    let mut answer = format!("HTTP/1.1 {status} As wanted\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    let body = if method == "HEAD" { 0 } else { length };
    answer.resize(answer.len() + body, b'x');
    answer
}

/// Counts an exchange that was served.
pub(super) fn note(recorder: &Mutex<Recorder>, peer: SocketAddr, port: u16, request: &Message, answered: usize) {
    let (method, path, status, _) = wanted(&request.first_line);
    recorder.lock().exchanged(
        peer.ip(),
        port,
        (method, path, i32::from(status)),
        &Exchanged::one(answered as u64, request.bytes, request.first.elapsed()),
    );
}

/// Runs the role `http-client`.
///
/// # Errors
/// Setup failed. What fails on a connection is in the report.
pub fn run_client(options: &HttpClient) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let mut recorder = Recorder::default();
    let mut wires = Vec::new();
    for number in 0..options.connections {
        let target = options
            .dst
            .get(number % options.dst.len().max(1))
            .map(|ip| SocketAddr::new(*ip, options.port));
        let Some(target) = target else { break };
        match TcpStream::connect_timeout(&target, PATIENCE).and_then(Wire::new) {
            Ok(wire) => wires.push((target, wire)),
            Err(error) => recorder.error("connect", &error),
        }
    }
    'rounds: for round in 0..options.requests {
        for (target, wire) in &mut wires {
            if sys::stopping() {
                break 'rounds;
            }
            let Some(request) = options.request.get(round % options.request.len().max(1)) else {
                break 'rounds;
            };
            if let Err(error) = ask(request, *target, wire, &mut recorder) {
                recorder.error("exchange", &error);
            }
        }
        std::thread::sleep(Duration::from_millis(options.pause_ms));
    }
    role::finish(&options.common, "http-client", &mut recorder)
}

/// One exchange: `METHOD:PATH`, or `METHOD:PATH:BYTES` with so many bytes of body.
fn ask(request: &str, target: SocketAddr, wire: &mut Wire, recorder: &mut Recorder) -> io::Result<()> {
    let mut parts = request.split(':');
    let (method, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let body: usize = parts.next().and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
    let host = target.ip().to_canonical();
    let mut message =
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {body}\r\n\r\n").into_bytes();
    message.resize(message.len() + body, b'y');
    let began = Instant::now();
    wire.stream.write_all(&message)?;
    let answer = wire.message(method != "HEAD", Some(PATIENCE))?;
    let answer = answer.ok_or(ErrorKind::UnexpectedEof)?;
    let status = answer
        .first_line
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or(ErrorKind::InvalidData)?;
    recorder.exchanged(
        target.ip(),
        target.port(),
        (method, path, status),
        &Exchanged::one(message.len() as u64, answer.bytes, answer.first.duration_since(began)),
    );
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_count_the_same() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let target = listener.local_addr().unwrap();
        let served = Arc::new(Mutex::new(Recorder::default()));
        let server = std::thread::spawn({
            let served = Arc::clone(&served);
            move || {
                let (stream, peer) = listener.accept().unwrap();
                serve(stream, peer, &served).unwrap();
            }
        });
        let mut asked = Recorder::default();
        let mut wire = Wire::new(TcpStream::connect(target).unwrap()).unwrap();
        for request in [
            "GET:/s/200/70000",
            "HEAD:/s/404/10",
            "POST:/s/201/0:300",
            "GET:/s/200/70000",
        ] {
            ask(request, target, &mut wire, &mut asked).unwrap();
        }
        drop(wire);
        server.join().unwrap();
        let (asked, served) = (asked.report("c", "r", ""), served.lock().report("s", "r", ""));
        let ways = |report: &super::super::report::Report, turned: bool| -> Vec<(String, u64, u64, u64)> {
            let way = |row: &super::super::report::ExchangeRow| {
                let (sent, received) = (row.counts.bytes_sent, row.counts.bytes_received);
                let (up, down) = if turned { (received, sent) } else { (sent, received) };
                (
                    format!("{} {} {}", row.method, row.path, row.status),
                    row.counts.count,
                    up,
                    down,
                )
            };
            report.exchanges.iter().map(way).collect()
        };
        assert_eq!(ways(&asked, false), ways(&served, true));
        assert_eq!(asked.exchanges.len(), 3);
        assert_eq!(asked.exchanges.iter().map(|row| row.counts.count).sum::<u64>(), 4);
        assert_eq!((asked.errors.len(), served.errors.len()), (0, 0));
    }
}
