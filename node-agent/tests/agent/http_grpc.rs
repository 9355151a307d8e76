//! gRPC in Go and in Rust, both ways: unary calls, streams, and streams that are given up. Every call is written down by client
//! and server (`programs/grpc`), by path and by the status that it ended with.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Stdio},
    sync::Arc,
    task::{Context, Poll},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use testkit::service::free_port;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    codegen::{BoxFuture, Service, http},
    transport::Channel,
};
use tonic_prost::ProstCodec;

use crate::{
    http_net::{number, rows, rows_at, text, wait_for},
    http_programs::{go, program},
    process::{Agent, Rights, directory},
};

/// Calls by process, path and status; `None` for one that was given up.
type Calls = BTreeMap<(String, String, Option<u64>), u64>;

const UNARY: &str = "/truth.Echo/Unary";
const BIDI: &str = "/truth.Echo/Bidi";
const HANG: &str = "/truth.Echo/Hang";
const TIMES: usize = 12;

/// A Go program that serves, killed when dropped; or a server of tonic in this process.
enum Server {
    Go(Child, PathBuf),
    Tonic(Echo, Option<tokio::runtime::Runtime>),
}

/// The service in Rust, and what it was asked.
#[derive(Clone, Default)]
struct Echo(Arc<Mutex<Calls>>);

fn note(calls: &Mutex<Calls>, path: &str, status: Option<u64>) {
    let key = (std::process::id().to_string(), path.to_owned(), status);
    *calls.lock().entry(key).or_default() += 1;
}

fn ended(code: u8) -> Result<(), Status> {
    if code == 0 {
        return Ok(());
    }
    Err(Status::new(i32::from(code).into(), "as wanted"))
}

/// What the Go program wrote down.
fn noted(log: &Path) -> Calls {
    let mut calls = Calls::new();
    for line in fs::read_to_string(log).unwrap_or_default().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [pid, path, status] = words[..] else {
            panic!("{line}")
        };
        *calls
            .entry((pid.to_owned(), path.to_owned(), status.parse().ok()))
            .or_default() += 1;
    }
    calls
}

impl Server {
    fn go(directory: &Path) -> (Self, u16) {
        let (port, log) = (free_port().unwrap().port(), directory.join("grpc-served"));
        let mut child = std::process::Command::new(go("grpc"))
            .args(["serve", &port.to_string()])
            .arg(&log)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        assert_eq!(said, "ready\n");
        (Self::Go(child, log), port)
    }

    fn tonic(address: SocketAddr) -> (Self, u16) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let echo = Echo::default();
        let serving = tonic::transport::Server::builder()
            .add_service(echo.clone())
            .serve(address);
        runtime.spawn(serving);
        wait_for("tonic listens", || std::net::TcpStream::connect(address).is_ok());
        (Self::Tonic(echo, Some(runtime)), address.port())
    }

    fn calls(&self) -> Calls {
        match self {
            Self::Go(_, log) => noted(log),
            Self::Tonic(echo, _) => echo.0.lock().clone(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match self {
            Self::Go(child, _) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Self::Tonic(_, runtime) => runtime.take().unwrap().shutdown_background(),
        }
    }
}

/// Calls by the Go client.
fn ask_in_go(port: u16, directory: &Path) -> Calls {
    let log = directory.join("grpc-asked");
    let mut command = program("grpc");
    command
        .args(["ask", &format!("127.0.0.1:{port}")])
        .arg(&log)
        .arg(TIMES.to_string());
    assert!(command.status().unwrap().success());
    noted(&log)
}

/// Calls of `times` on a connection.
async fn ask(channel: Channel, times: std::ops::Range<usize>, calls: &Mutex<Calls>) {
    let mut client = tonic::client::Grpc::new(channel);
    let code = |result: Result<(), Status>| Some(result.err().map_or(0, |status| status.code() as u64));
    for n in times {
        let mut message = vec![0_u8; 1 + n * 1000];
        message[0] = (n % 4) as u8;
        client.ready().await.unwrap();
        let codec = ProstCodec::<Vec<u8>, Vec<u8>>::default();
        let answer = client.unary(
            Request::new(message.clone()),
            http::uri::PathAndQuery::from_static(UNARY),
            codec,
        );
        note(calls, UNARY, code(answer.await.map(drop)));
        for path in [BIDI, HANG] {
            client.ready().await.unwrap();
            let (send, receive) = mpsc::channel(1);
            let codec = ProstCodec::<Vec<u8>, Vec<u8>>::default();
            let path_and_query = http::uri::PathAndQuery::from_static(path);
            let stream = client.streaming(Request::new(ReceiverStream::new(receive)), path_and_query, codec);
            send.send(message.clone()).await.unwrap();
            let mut answers: Streaming<Vec<u8>> = stream.await.unwrap().into_inner();
            assert_eq!(answers.message().await.unwrap().unwrap().len(), message.len());
            if path == HANG {
                drop((answers, send));
                note(calls, path, None);
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            for _ in 0..4 {
                send.send(message.clone()).await.unwrap();
                assert_eq!(answers.message().await.unwrap().unwrap().len(), message.len());
            }
            drop(send);
            note(
                calls,
                path,
                code(answers.message().await.map(|none| assert!(none.is_none()))),
            );
        }
    }
}

/// Calls by the client of tonic.
fn ask_in_rust(port: u16) -> Calls {
    let calls = Mutex::new(Calls::new());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let endpoint = Channel::from_shared(format!("http://[::1]:{port}")).unwrap();
        let endpoint = endpoint.connect().await;
        let channel = match endpoint {
            Ok(channel) => channel,
            // The server in this process is of one family.
            Err(_) => Channel::from_shared(format!("http://127.0.0.1:{port}"))
                .unwrap()
                .connect()
                .await
                .unwrap(),
        };
        ask(channel, 0..TIMES, &calls).await;
        // What was given up last is still told to the server.
        tokio::time::sleep(Duration::from_millis(200)).await;
    });
    calls.into_inner()
}

/// What the rows of one end say, and bytes of requests and responses.
fn told(directory: &Path, direction: &str, port: u16) -> (Calls, (u64, u64)) {
    let rows = rows(directory);
    let (mut calls, mut bytes) = (Calls::new(), (0, 0));
    for row in rows_at(&rows, direction, &[port]) {
        assert_eq!(
            (text(row, "method"), text(row, "http_version")),
            ("POST", "2.0"),
            "{row}"
        );
        let key = (
            text(row, "pid").to_owned(),
            text(row, "path").to_owned(),
            row["grpc_status"].as_u64(),
        );
        *calls.entry(key).or_default() += number(row, "count");
        let (read, written) = (number(row, "bytes_read"), number(row, "bytes_written"));
        let (there, back) = if direction == "outgoing" {
            (written, read)
        } else {
            (read, written)
        };
        bytes = (bytes.0 + there, bytes.1 + back);
    }
    (calls, bytes)
}

#[test]
#[ignore = "native: needs root"]
fn calls_are_told_as_client_and_server_say() {
    for (server, client) in [("go", "go"), ("go", "rust"), ("rust", "go"), ("rust", "rust")] {
        let directory = directory();
        let path = directory.path();
        let (server_is, port) = if server == "go" {
            Server::go(path)
        } else {
            Server::tonic(free_port().unwrap())
        };
        let agent = Agent::start(Rights::Own, path, &["--ephemeral-port=65535"]);
        let asked = if client == "go" {
            ask_in_go(port, path)
        } else {
            ask_in_rust(port)
        };
        let expected: u64 = asked.values().sum();
        assert_eq!(expected, 3 * TIMES as u64);
        let seen = |direction| told(path, direction, port).0.values().sum::<u64>();
        wait_for("all calls are told", || {
            seen("outgoing") >= expected && seen("incoming") >= expected
        });
        agent.stop();
        let (at_client, at_server) = (told(path, "outgoing", port), told(path, "incoming", port));
        let what = format!("{client} asks {server}");
        println!("{what}: {expected} calls, bytes {:?}", at_client.1);
        assert_eq!(at_client.0, asked, "{what}: client");
        assert_eq!(at_server.0, server_is.calls(), "{what}: server");
        assert_eq!(at_client.1, at_server.1, "{what}: bytes of both ends");
        // One unary message each way, five on a stream, one on what is given up.
        let payload: u64 = (0..TIMES as u64).map(|n| 7 * (1 + n * 1000)).sum();
        assert!(
            at_client.1.0 > payload && at_client.1.0 < payload + 200 * expected,
            "{what}: {:?}",
            at_client.1
        );
    }
}

/// Of a connection that is older than the agent, what its ends put into their tables before cannot be known. All ends here spell
/// paths out, but not `grpc-status`: calls are told by path, with their bytes, and without a gRPC status rather than with a wrong one.
///
/// The server has a higher port than any client, or a lower one: which end asks is not to be guessed by that.
#[test]
#[ignore = "native: needs root"]
fn calls_on_connections_older_than_the_agent_are_told() {
    for ports in [8100..9000, 61_000..65_000] {
        let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        older_than_the_agent({ ports }.find(free).unwrap());
    }
}

fn older_than_the_agent(port: u16) {
    const BEFORE: usize = 4;
    let directory = directory();
    let path = directory.path();
    let (server, port) = Server::tonic(([127, 0, 0, 1], port).into());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let calls = Mutex::new(Calls::new());
    let channel = runtime.block_on(async {
        let endpoint = Channel::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
        let channel = endpoint.connect().await.unwrap();
        ask(channel.clone(), 0..BEFORE, &calls).await;
        channel
    });
    calls.lock().clear();
    let agent = Agent::start(Rights::Own, path, &["--ephemeral-port=65535"]);
    runtime.block_on(ask(channel, BEFORE..TIMES, &calls));
    thread::sleep(Duration::from_secs(3));
    agent.stop();
    let asked: BTreeMap<String, u64> =
        calls
            .into_inner()
            .into_iter()
            .fold(BTreeMap::new(), |mut sums, ((_, path, _), count)| {
                *sums.entry(path).or_default() += count;
                sums
            });
    let (at_client, at_server) = (told(path, "outgoing", port), told(path, "incoming", port));
    println!("{at_client:?}");
    for (calls, _) in [&at_client, &at_server] {
        assert!(
            calls
                .keys()
                .all(|(pid, _, status)| *pid == std::process::id().to_string() && status.is_none())
        );
        let by_path: BTreeMap<String, u64> = calls
            .iter()
            .map(|((_, path, _), count)| (path.clone(), *count))
            .collect();
        assert_eq!(by_path, asked);
    }
    assert_eq!(at_client.1, at_server.1, "bytes of both ends");
    let payload: u64 = (BEFORE as u64..TIMES as u64).map(|n| 7 * (1 + n * 1000)).sum();
    assert!(at_client.1.0 > payload, "{:?}", at_client.1);
    drop(server);
}

// === impl Echo ===

impl tonic::server::NamedService for Echo {
    const NAME: &'static str = "truth.Echo";
}

impl Service<http::Request<tonic::body::Body>> for Echo {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Vec<u8>, Vec<u8>>::default());
            let path = request.uri().path().to_owned();
            Ok(match path.as_str() {
                UNARY => grpc.unary(this, request).await,
                BIDI => grpc.streaming(Bidi(this), request).await,
                _ => grpc.streaming(Hang(this), request).await,
            })
        })
    }
}

impl tonic::server::UnaryService<Vec<u8>> for Echo {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let message = request.into_inner();
            note(&this.0, UNARY, Some(message[0].into()));
            ended(message[0])?;
            Ok(Response::new(message))
        })
    }
}

type Answers = Pin<Box<dyn tokio_stream::Stream<Item = Result<Vec<u8>, Status>> + Send>>;

struct Bidi(Echo);

impl tonic::server::StreamingService<Vec<u8>> for Bidi {
    type Response = Vec<u8>;
    type ResponseStream = Answers;
    type Future = BoxFuture<Response<Answers>, Status>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let echo = self.0.clone();
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut messages = request.into_inner();
            let mut last = 0;
            while let Some(Ok(message)) = messages.next().await {
                last = message[0];
                let _ = send.send(Ok(message)).await;
            }
            note(&echo.0, BIDI, Some(last.into()));
            if let Err(status) = ended(last) {
                let _ = send.send(Err(status)).await;
            }
        });
        Box::pin(async { Ok(Response::new(Box::pin(ReceiverStream::new(receive)) as Answers)) })
    }
}

struct Hang(Echo);

impl tonic::server::StreamingService<Vec<u8>> for Hang {
    type Response = Vec<u8>;
    type ResponseStream = Answers;
    type Future = BoxFuture<Response<Answers>, Status>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let echo = self.0.clone();
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut messages = request.into_inner();
            let first = messages.next().await.unwrap().unwrap();
            let _ = send.send(Ok(first)).await;
            send.closed().await;
            note(&echo.0, HANG, None);
        });
        Box::pin(async { Ok(Response::new(Box::pin(ReceiverStream::new(receive)) as Answers)) })
    }
}
