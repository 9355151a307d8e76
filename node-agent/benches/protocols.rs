//! Speed of the protocol parsers on one core: ns and allocations per message, GB/s.
//!
//! `cargo bench -p ec-node-agent --bench protocols`. Prints the best of several rounds, so that other load on the machine
//! disturbs least; asserts nothing.
#![allow(clippy::expect_used, missing_docs)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use node_agent::protocols::{
    HttpOptions, HttpSession, Piece, Start, Way,
    classify::{PREFACE, classify},
    dns::{DnsOptions, DnsSession, Message, TcpSplitter},
};

/// Counts every allocation and re-allocation.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed to the system allocator unchanged; counting touches no memory it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `ptr` came from `System` with this layout.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROUNDS: u32 = 25;
/// Exchanges per round.
const TIMES: u64 = 20_000;

/// Runs `round`, which handles [`TIMES`] times `messages` messages of together `bytes`, and prints the best.
fn measure(name: &str, messages: u64, bytes: usize, mut round: impl FnMut()) {
    round();
    let (mut best, mut allocations) = (Duration::MAX, u64::MAX);
    for _ in 0..ROUNDS {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let start = Instant::now();
        round();
        best = best.min(start.elapsed());
        allocations = allocations.min(ALLOCATIONS.load(Ordering::Relaxed) - before);
    }
    let ns = best.as_secs_f64() * 1e9;
    let per_message = ns / (TIMES * messages) as f64;
    println!(
        "{name:<44} {per_message:>8.1} ns/message {:>7.2} GB/s {:>6.3} allocations/message",
        (TIMES * bytes as u64) as f64 / ns,
        allocations as f64 / (TIMES * messages) as f64,
    );
}

fn piece(way: Way, captured: &[u8], true_len: usize) -> Piece<'_> {
    Piece {
        way,
        ts_ns: 1,
        captured,
        true_len: true_len as u64,
    }
}

/// An exchange again and again on one connection. Requests and responses are given as captured bytes and true lengths.
fn http(name: &str, hello: &[(Way, &[u8])], exchange: &[(Way, Vec<u8>, usize)]) {
    let mut session = HttpSession::new(Start::Fresh, HttpOptions::default());
    let mut told = 0_u64;
    for (way, bytes) in hello {
        session.push(&piece(*way, bytes, bytes.len()), &mut |_| {});
    }
    let bytes: usize = exchange.iter().map(|(_, captured, _)| captured.len()).sum();
    measure(name, 2, bytes, || {
        for _ in 0..TIMES {
            for (way, captured, true_len) in exchange {
                session.push(&piece(*way, captured, *true_len), &mut |exchange| {
                    told += 1;
                    black_box(exchange.path);
                });
            }
        }
    });
    assert_eq!(told, u64::from(ROUNDS + 1) * TIMES, "{name}: every exchange is told");
}

fn http1() {
    let small = (
        "GET /index.html HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\r\n",
        "HTTP/1.1 200 OK\r\nServer: nginx/1.26.0\r\nDate: Mon, 21 Oct 2013 20:13:21 GMT\r\nContent-Type: text/html\r\n\
         Content-Length: 1024\r\nLast-Modified: Mon, 21 Oct 2013 20:13:21 GMT\r\nConnection: keep-alive\r\n\
         ETag: \"5265-400\"\r\nAccept-Ranges: bytes\r\n\r\n",
    );
    let up = |text: &str| (Way::ToServer, text.as_bytes().to_vec(), text.len());
    http(
        "HTTP/1 wrk and nginx, 1 KiB body unseen",
        &[],
        &[up(small.0), (Way::ToClient, small.1.into(), small.1.len() + 1024)],
    );
    let browser = "GET /shop/item/4711?ref=start&utm_source=mail HTTP/1.1\r\nHost: shop.example.com\r\n\
        User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n\
        Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n\
        Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nConnection: keep-alive\r\n\
        Cookie: session=0123456789abcdef0123456789abcdef; consent=yes; _ga=GA1.2.1234567890.1234567890\r\n\
        Upgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: document\r\nSec-Fetch-Mode: navigate\r\n\
        Sec-Fetch-Site: same-origin\r\nSec-Fetch-User: ?1\r\nPriority: u=0, i\r\n\r\n";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/html\r\n\r\n";
    http(
        "HTTP/1 browser, chunked response",
        &[],
        &[
            up(browser),
            (
                Way::ToClient,
                format!("{chunked}4000\r\n").into_bytes(),
                chunked.len() + 6 + 0x4000 + 2,
            ),
            (Way::ToClient, b"0\r\n\r\n".to_vec(), 5),
        ],
    );
    let (first, rest) = browser.split_at(300);
    http(
        "HTTP/1 browser, request in two pieces",
        &[],
        &[
            up(first),
            up(rest),
            (Way::ToClient, small.1.into(), small.1.len() + 1024),
        ],
    );
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len())
        .expect("short")
        .to_be_bytes()
        .get(1..)
        .expect("four")
        .to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn http2() {
    let settings = frame(4, 0, 0, &[]);
    let client = [PREFACE.as_slice(), &settings].concat();
    // What is sent once: the fields are in the table from then on.
    let indexed = |name: &str, value: &str| {
        let mut field = vec![0x40, name.len() as u8];
        field.extend(name.as_bytes());
        field.push(value.len() as u8);
        field.extend(value.as_bytes());
        field
    };
    let request_fields: Vec<u8> = [
        (":authority", "svc.default.svc.cluster.local:50051"),
        (":path", "/payments.v1.Ledger/Append"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("user-agent", "grpc-go/1.70.0"),
    ]
    .iter()
    .flat_map(|(name, value)| indexed(name, value))
    .collect();
    let response_fields: Vec<u8> = [
        ("content-type", "application/grpc"),
        ("grpc-status", "0"),
        ("grpc-message", ""),
    ]
    .iter()
    .flat_map(|(name, value)| indexed(name, value))
    .collect();
    let first_request = frame(1, 5, 1, &[&[0x83, 0x86][..], &request_fields].concat());
    let first_response = frame(1, 5, 1, &[&[0x88][..], &response_fields].concat());
    let hello = [
        (Way::ToServer, client.as_slice()),
        (Way::ToClient, settings.as_slice()),
        (Way::ToServer, &first_request),
        (Way::ToClient, &first_response),
    ];
    let request = [
        frame(1, 4, 3, &[0x83, 0x86, 0xc2, 0xc1, 0xc0, 0xbf, 0xbe]),
        frame(0, 1, 3, &[0; 64]),
    ]
    .concat();
    let response = [
        frame(1, 4, 3, &[0x88, 0xc0]),
        frame(0, 0, 3, &[0; 64]),
        frame(1, 5, 3, &[0xbf, 0xbe]),
    ]
    .concat();
    let (up, down) = (request.len(), response.len());
    http(
        "HTTP/2 gRPC unary, fields in the table",
        &hello,
        &[(Way::ToServer, request, up), (Way::ToClient, response, down)],
    );
    // RFC 7541 C.4.1 and C.6.1, without adding: Huffman codes each time.
    let request = frame(
        1,
        5,
        3,
        &[
            0x82, 0x86, 0x84, 0x01, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff, 0x0f,
            0x2b, 0x96, 0xd0, 0x7a, 0xbe, 0x94, 0x10, 0x54, 0xd4, 0x44, 0xa8, 0x20, 0x05, 0x95, 0x04, 0x0b, 0x81, 0x66,
            0xe0, 0x82, 0xa6, 0x2d, 0x1b, 0xff,
        ],
    );
    let response = frame(
        1,
        5,
        3,
        &[
            0x88, 0x0f, 0x1f, 0x91, 0x9d, 0x29, 0xad, 0x17, 0x18, 0x63, 0xc7, 0x8f, 0x0b, 0x97, 0xc8, 0xe9, 0xae, 0x82,
            0xae, 0x43, 0xd3,
        ],
    );
    let (up, down) = (request.len(), response.len());
    http(
        "HTTP/2, HPACK literals with Huffman code",
        &hello,
        &[(Way::ToServer, request, up), (Way::ToClient, response, down)],
    );
}

fn dns() {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["payments", "default", "svc", "cluster", "local"] {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let mut answer = query.clone();
    for (byte, value) in answer.iter_mut().skip(2).zip([0x81, 0x80, 0, 1, 0, 2]) {
        *byte = value;
    }
    for last in 1..=2 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 0, 0, last]);
    }
    let mut session = DnsSession::new(DnsOptions::default());
    let mut told = 0_u64;
    let bytes = query.len() + answer.len();
    measure("DNS query and answer, with addresses", 2, bytes, || {
        for _ in 0..TIMES {
            for bytes in [&query, &answer] {
                let message = Message::parse(black_box(bytes), bytes.len() as u64).expect("a message");
                session.message(1_u64, 1, &message, &mut |lookup| {
                    told += 1;
                    black_box(lookup.name);
                });
                if message.is_response {
                    black_box(message.addresses().count());
                }
            }
        }
    });
    assert_eq!(told, u64::from(ROUNDS + 1) * TIMES);
    let framed = |message: &[u8]| [&(message.len() as u16).to_be_bytes()[..], message].concat();
    let stream = [framed(&query), framed(&answer)].concat();
    let mut splitter = TcpSplitter::new(false);
    measure("DNS over TCP, two messages in a piece", 2, stream.len(), || {
        for _ in 0..TIMES {
            splitter.push(&piece(Way::ToServer, &stream, stream.len()), &mut |message| {
                black_box(Message::parse(message.bytes, message.true_len).expect("a message").id);
            });
        }
    });
}

fn first_bytes() {
    for (name, bytes) in [
        ("classify: an HTTP/1 request", &b"POST /path HTTP/1.1\r\n"[..]),
        (
            "classify: nothing known",
            b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12",
        ),
    ] {
        measure(name, 1, bytes.len(), || {
            for _ in 0..TIMES {
                black_box(classify(black_box(bytes)));
            }
        });
    }
}

fn main() {
    http1();
    http2();
    dns();
    first_bytes();
}
