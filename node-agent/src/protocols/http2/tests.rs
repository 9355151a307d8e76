//! Frames made by hand. Connections of a real implementation are in `tests/protocols`.

use proptest::prelude::*;

use crate::protocols::{
    Exchange, HttpOptions, HttpSession, Losses, Piece, Start, State, Transfer, Version, Way, classify::PREFACE,
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A literal that is added to the table if `add`.
fn literal(name: &str, value: &str, add: bool) -> Vec<u8> {
    let mut field = vec![if add { 0x40 } else { 0 }, name.len() as u8];
    field.extend(name.as_bytes());
    field.push(value.len() as u8);
    field.extend(value.as_bytes());
    field
}

/// `:method: GET`, `:scheme: http`, and the path as a literal.
fn get(path: &str) -> Vec<u8> {
    [&[0x82, 0x86][..], &literal(":path", path, false)].concat()
}

fn line(exchange: &Exchange<'_>) -> String {
    let transfer = |transfer: Option<Transfer>| match transfer {
        None => "-".to_owned(),
        Some(transfer) => format!("{}..{}/{}", transfer.first_ns, transfer.last_ns, transfer.bytes),
    };
    let flags = exchange.flags;
    let flags: String = [
        (flags.joined, "J"),
        (flags.bytes_missing, "M"),
        (flags.aborted, "A"),
        (flags.unfinished, "U"),
    ]
    .into_iter()
    .filter_map(|(set, sign)| set.then_some(sign))
    .collect();
    let grpc = match exchange.grpc {
        None => String::new(),
        Some(grpc) => format!(" grpc {:?}", grpc.status),
    };
    format!(
        "{} {} {} {} {}{grpc} {flags}",
        exchange.method.unwrap_or("-"),
        exchange.path.unwrap_or("-"),
        exchange.status.map_or("-".to_owned(), |status| status.to_string()),
        transfer(exchange.request),
        transfer(exchange.response),
    )
    .trim_end()
    .to_owned()
}

struct Run {
    session: HttpSession,
    told: Vec<String>,
    losses: Losses,
}

impl Run {
    fn new(start: Start, options: HttpOptions) -> Self {
        Self {
            session: HttpSession::new(start, options),
            told: Vec::new(),
            losses: Losses::default(),
        }
    }

    /// A connection whose client and server have said hello.
    fn fresh() -> Self {
        let mut run = Self::new(Start::Fresh, HttpOptions::default());
        run.up(0, &[PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[])]);
        run.down(
            0,
            &[frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]), frame(SETTINGS, 1, 0, &[])],
        );
        run
    }

    fn piece(&mut self, ts_ns: u64, way: Way, captured: &[u8], unseen: u64) -> State {
        let piece = Piece {
            way,
            ts_ns,
            captured,
            true_len: captured.len() as u64 + unseen,
        };
        let told = &mut self.told;
        let state = self.session.push(&piece, &mut |exchange| {
            assert!(exchange.version == Version::Http2);
            told.push(line(exchange));
        });
        self.losses.add(self.session.take_losses());
        state
    }

    fn up(&mut self, ts_ns: u64, frames: &[Vec<u8>]) -> State {
        self.piece(ts_ns, Way::ToServer, &frames.concat(), 0)
    }

    fn down(&mut self, ts_ns: u64, frames: &[Vec<u8>]) -> State {
        self.piece(ts_ns, Way::ToClient, &frames.concat(), 0)
    }

    fn told(&mut self) -> Vec<String> {
        std::mem::take(&mut self.told)
    }

    fn close(&mut self) -> Vec<String> {
        let told = &mut self.told;
        self.session.close(&mut |exchange| told.push(line(exchange)));
        self.losses.add(self.session.take_losses());
        self.told()
    }

    fn expire(&mut self, since_ns: u64) -> Vec<String> {
        let told = &mut self.told;
        self.session.expire(since_ns, &mut |exchange| told.push(line(exchange)));
        self.told()
    }
}

#[test]
fn interleaved_streams() {
    let mut run = Run::fresh();
    run.up(
        1,
        &[
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/a?q")),
            frame(HEADERS, END_HEADERS, 3, &get("/b")),
        ],
    );
    run.up(2, &[frame(DATA, 0, 3, &[0; 100])]);
    run.down(
        3,
        &[
            frame(HEADERS, END_HEADERS, 3, &[0x88]),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x8d]),
        ],
    );
    assert_eq!(run.told(), ["GET /a 404 1..1/23 3..3/10"]);
    run.down(
        4,
        &[
            frame(WINDOW_UPDATE, 0, 3, &[0, 0, 1, 0]),
            frame(DATA, END_STREAM, 3, &[0; 10]),
        ],
    );
    assert!(run.told().is_empty(), "the request has not ended");
    run.up(5, &[frame(PING, 0, 0, &[0; 8]), frame(DATA, END_STREAM, 3, &[])]);
    assert_eq!(run.told(), ["GET /b 200 1..5/139 3..4/29"]);
    assert!(run.close().is_empty());
    assert_eq!(run.losses, Losses::default());
}

#[test]
fn padding_priority_and_continuation() {
    let mut run = Run::fresh();
    let block = get("/padded");
    let padded = [&[5, 0, 0, 0, 3, 16][..], &block, &[0; 5]].concat();
    run.up(
        1,
        &[frame(HEADERS, END_HEADERS | END_STREAM | PADDED | PRIORITY, 1, &padded)],
    );
    run.down(
        2,
        &[
            frame(HEADERS, 0, 1, &[]),
            frame(CONTINUATION, 0, 1, &[]),
            frame(CONTINUATION, END_HEADERS, 1, &[0x88]),
        ],
    );
    run.down(3, &[frame(DATA, END_STREAM | PADDED, 1, &[3, b'x', 0, 0, 0])]);
    assert_eq!(
        run.told(),
        [format!(
            "GET /padded 200 1..1/{} 2..3/{}",
            9 + 6 + 17 + 5,
            9 * 4 + 1 + 5
        )]
    );

    let block = get("/in/three/parts");
    let (a, rest) = block.split_at(6);
    let (b, c) = rest.split_at(5);
    run.up(
        4,
        &[
            frame(HEADERS, END_STREAM, 3, a),
            frame(CONTINUATION, 0, 3, b),
            frame(CONTINUATION, END_HEADERS, 3, c),
        ],
    );
    run.down(5, &[frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x88])]);
    assert_eq!(
        run.told(),
        [format!("GET /in/three/parts 200 4..4/{} 5..5/10", 27 + block.len())]
    );
    assert_eq!(run.losses, Losses::default());

    // Something else between them.
    run.up(6, &[frame(HEADERS, END_STREAM, 5, a), frame(PING, 0, 0, &[0; 8])]);
    assert_eq!((run.losses.malformed, run.losses.resyncs), (1, 1));
}

#[test]
fn a_flood_of_continuations_ends() {
    let mut run = Run::fresh();
    run.up(1, &[frame(HEADERS, END_STREAM, 1, &get("/"))]);
    for _ in 0..1000 {
        run.up(2, &[frame(CONTINUATION, 0, 1, &[])]);
    }
    assert_eq!((run.losses.malformed, run.losses.resyncs), (1, 1));
    // 24 large ones: bounded too. The block is cut, and the frames after it are followed.
    let mut run = Run::fresh();
    run.up(1, &[frame(HEADERS, END_STREAM, 1, &get("/big"))]);
    let cookie = [&[0, 1, b'c', 0x7f, 0x81, 0x7f][..], &[b'x'; 16384 - 6]].concat();
    for _ in 0..24 {
        run.up(2, &[frame(CONTINUATION, 0, 1, &cookie)]);
    }
    run.up(
        3,
        &[
            frame(CONTINUATION, END_HEADERS, 1, &[]),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &get("/next")),
        ],
    );
    run.down(4, &[frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x88])]);
    assert_eq!(run.told(), ["GET /next 200 3..3/24 4..4/10"]);
    assert_eq!(run.losses.header_states, 1);
}

#[test]
fn grpc() {
    let mut run = Run::fresh();
    let call = [
        &[0x83, 0x86][..],
        &literal(":path", "/pkg.Service/Call", false),
        &literal("content-type", "application/grpc+proto", true),
    ];
    run.up(
        1,
        &[
            frame(HEADERS, END_HEADERS, 1, &call.concat()),
            frame(DATA, END_STREAM, 1, &[0; 12]),
        ],
    );
    let head = [&[0x88][..], &literal("content-type", "application/grpc", true)].concat();
    run.down(2, &[frame(HEADERS, END_HEADERS, 1, &head), frame(DATA, 0, 1, &[0; 20])]);
    run.down(
        3,
        &[frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            1,
            &literal("grpc-status", "13", true),
        )],
    );
    let told = run.told();
    assert_eq!(told.len(), 1);
    assert!(
        told[0].starts_with("POST /pkg.Service/Call 200 1..1/") && told[0].ends_with("grpc Some(13)"),
        "{told:?}"
    );
    // Only trailers, and all of it from the table: status 13 is the newest entry of the server's.
    run.up(
        4,
        &[frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            3,
            &[&get("/x")[..], &[0xbe]].concat(),
        )],
    );
    run.down(5, &[frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x88, 0xbf, 0xbe])]);
    assert!(run.told()[0].ends_with("grpc Some(13)"));
    // Reset before there is a status.
    run.up(
        6,
        &[frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            5,
            &[&get("/x")[..], &[0xbe]].concat(),
        )],
    );
    run.down(7, &[frame(RESET, 0, 5, &[0, 0, 0, 8])]);
    assert_eq!(run.told(), ["GET /x - 6..6/22 - grpc None A"]);
}

#[test]
fn interim_responses_resets_and_go_away() {
    let mut run = Run::fresh();
    run.up(1, &[frame(HEADERS, END_HEADERS, 1, &get("/c"))]);
    run.down(2, &[frame(HEADERS, END_HEADERS, 1, &literal(":status", "100", false))]);
    run.up(3, &[frame(DATA, END_STREAM, 1, b"body")]);
    run.down(4, &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88])]);
    assert_eq!(run.told(), ["GET /c 200 1..3/34 4..4/32"]);
    // Answered before the request has ended, and reset since the rest is not wanted.
    run.up(5, &[frame(HEADERS, END_HEADERS, 3, &get("/c"))]);
    run.down(
        6,
        &[
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x88]),
            frame(RESET, 0, 3, &[0; 4]),
        ],
    );
    assert_eq!(run.told(), ["GET /c 200 5..5/21 6..6/10"]);
    // What was on its way belongs to nothing.
    run.up(7, &[frame(DATA, END_STREAM, 3, b"late")]);
    assert_eq!(run.losses.unattributed_bytes, 13);
    run.up(
        8,
        &[
            frame(HEADERS, END_HEADERS | END_STREAM, 5, &get("/5")),
            frame(HEADERS, END_HEADERS | END_STREAM, 7, &get("/7")),
        ],
    );
    run.down(9, &[frame(GO_AWAY, 0, 0, &[0, 0, 0, 5, 0, 0, 0, 0])]);
    assert_eq!(run.told(), ["GET /7 - 8..8/21 - A"]);
    run.down(10, &[frame(HEADERS, END_HEADERS, 5, &[0x88])]);
    assert_eq!(run.close(), ["GET /5 200 8..8/21 10..10/10 A"]);
}

#[test]
fn pushed_requests_keep_the_table_right() {
    let mut run = Run::fresh();
    run.up(1, &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/a"))]);
    let promise = [
        &[0, 0, 0, 2][..],
        &get("/pushed"),
        &literal("content-type", "application/grpc", true),
    ]
    .concat();
    run.down(2, &[frame(PUSH_PROMISE, END_HEADERS, 1, &promise)]);
    run.down(3, &[frame(HEADERS, END_HEADERS | END_STREAM, 2, &[0x88])]);
    run.down(4, &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88, 0xbe])]);
    assert_eq!(run.told(), ["GET /a 200 1..1/21 4..4/11 grpc None"]);
}

#[test]
fn connect() {
    let mut run = Run::fresh();
    let head = [
        literal(":method", "CONNECT", false),
        literal(":authority", "h:443", false),
    ]
    .concat();
    run.up(1, &[frame(HEADERS, END_HEADERS, 1, &head)]);
    run.down(2, &[frame(HEADERS, END_HEADERS, 1, &[0x88])]);
    assert_eq!(
        run.close(),
        [format!("CONNECT h:443 200 1..1/{} 2..2/10 A", 9 + head.len())]
    );
}

#[test]
fn bodies_that_nobody_saw() {
    let mut run = Run::fresh();
    run.up(1, &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/big"))]);
    // The head and the header of a DATA frame, then 16 KiB of which a part was captured.
    let start = [
        frame(HEADERS, END_HEADERS, 1, &[0x88]),
        frame(DATA, END_STREAM, 1, &[0; 16384]),
    ]
    .concat();
    run.piece(2, Way::ToClient, &start[..100], 10_000);
    run.piece(3, Way::ToClient, &[], (start.len() - 10_100) as u64);
    assert_eq!(run.told(), [format!("GET /big 200 1..1/23 2..3/{}", start.len())]);
    assert_eq!(run.losses, Losses::default());
}

#[test]
fn a_lost_boundary_is_found_and_its_table_void() {
    let mut run = Run::fresh();
    let head = |path| [&get(path)[..], &literal("content-type", "application/grpc", true)].concat();
    run.up(1, &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &head("/a"))]);
    // A frame that was captured in part, and whatever came after it.
    run.down(2, &[frame(HEADERS, END_HEADERS, 1, &[0x88])]);
    let data = frame(DATA, 0, 1, &[7; 1000]);
    run.piece(3, Way::ToClient, &data[..50], 5000);
    // The middle of something, then frames again. What the server's table says is not known.
    run.piece(4, Way::ToClient, &[7; 300], 0);
    run.down(
        5,
        &[
            frame(DATA, 0, 1, &[7; 20]),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xbe]),
        ],
    );
    let told = run.told();
    assert_eq!(told.len(), 1);
    assert!(
        told[0].starts_with("GET /a 200 1..1/") && told[0].ends_with("grpc None M"),
        "{told:?}"
    );
    assert_eq!((run.losses.resyncs, run.losses.header_states), (1, 1));
    // The client's is still known.
    run.up(
        6,
        &[frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            3,
            &[&get("/b")[..], &[0xbe]].concat(),
        )],
    );
    // A server's end that is never seen.
    run.down(7, &[frame(HEADERS, END_HEADERS, 3, &[0x88])]);
    run.piece(8, Way::ToClient, &[], 5000);
    assert!(run.expire(6).is_empty());
    assert_eq!(run.expire(7), ["GET /b 200 6..6/22 7..7/10 grpc None MU"]);
}

#[test]
fn joined_in_the_middle() {
    let mut run = Run::new(Start::Joined, HttpOptions::default());
    // The end of a frame.
    run.piece(1, Way::ToServer, &[9; 40], 0);
    // A path that is in the table since before, and one that is sent now and referred to later.
    run.up(2, &[frame(HEADERS, END_HEADERS | END_STREAM, 21, &[0x82, 0x86, 0xbe])]);
    run.up(
        3,
        &[frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            23,
            &[&[0x82, 0x86][..], &literal(":path", "/new", true)].concat(),
        )],
    );
    run.up(
        4,
        &[frame(HEADERS, END_HEADERS | END_STREAM, 25, &[0x82, 0x86, 0xbe, 0xbf])],
    );
    run.down(5, &[frame(HEADERS, END_HEADERS | END_STREAM, 19, &[0x88])]);
    run.down(
        6,
        &[21, 23, 25].map(|stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88])),
    );
    assert_eq!(
        run.told(),
        [
            "- - 200 - 5..5/10 J",
            "GET - 200 2..2/12 6..6/10 J",
            "GET /new 200 3..3/23 6..6/10",
            "GET /new 200 4..4/13 6..6/10 J",
        ]
    );
}

#[test]
fn a_joined_connection_may_turn_out_to_be_http1() {
    let mut session = HttpSession::new(Start::Joined, HttpOptions::default());
    let mut told = 0;
    let mut push = |way, captured: &[u8]| {
        let piece = Piece {
            way,
            ts_ns: 1,
            captured,
            true_len: captured.len() as u64,
        };
        session.push(&piece, &mut |exchange| {
            assert_eq!(exchange.version, Version::Http11);
            told += 1;
        })
    };
    // The middle of a body that looks like frames.
    push(Way::ToServer, &frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]));
    push(Way::ToServer, b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(
        push(Way::ToClient, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        State::Active
    );
    assert_eq!(told, 1);
}

#[test]
fn upgraded() {
    let request = "GET /up HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n\r\n";
    let switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n";
    let mut run = Run::new(Start::Fresh, HttpOptions::default());
    run.piece(1, Way::ToServer, request.as_bytes(), 0);
    let answer = [frame(SETTINGS, 0, 0, &[]), frame(HEADERS, END_HEADERS, 1, &[0x88])].concat();
    run.piece(2, Way::ToClient, &[&switch[..], &answer].concat(), 0);
    run.up(
        3,
        &[
            PREFACE.to_vec(),
            frame(SETTINGS, 0, 0, &[]),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &get("/3")),
        ],
    );
    run.down(
        4,
        &[
            frame(DATA, END_STREAM, 1, b"x"),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x88]),
        ],
    );
    assert_eq!(
        run.told(),
        [
            format!("GET /up 200 1..1/{} 2..4/{}", request.len(), switch.len() + 10 + 10),
            "GET /3 200 3..3/21 4..4/10".to_owned(),
        ]
    );
    assert_eq!(run.losses, Losses::default());
}

#[test]
fn more_streams_than_there_is_room() {
    let mut run = Run::new(
        Start::Fresh,
        HttpOptions {
            max_streams: 2,
            ..HttpOptions::default()
        },
    );
    run.up(0, &[PREFACE.to_vec()]);
    for stream in [1, 3, 5] {
        run.up(1, &[frame(HEADERS, END_HEADERS | END_STREAM, stream, &get("/s"))]);
    }
    for stream in [1, 3, 5] {
        run.down(2, &[frame(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88])]);
    }
    assert_eq!(run.told().len(), 2);
    assert_eq!((run.losses.refused, run.losses.unattributed_bytes), (1, 10));
}

#[test]
fn what_is_not_http2() {
    let mut run = Run::new(Start::Fresh, HttpOptions::default());
    assert_eq!(
        run.piece(1, Way::ToServer, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", 0),
        State::NotHttp
    );
    let mut run = Run::new(Start::Fresh, HttpOptions::default());
    assert_eq!(
        run.up(1, &[PREFACE.to_vec(), frame(SETTINGS, 0, 1, &[])]),
        State::NotHttp
    );
    let mut run = Run::new(Start::Fresh, HttpOptions::default());
    assert_eq!(
        run.up(1, &[PREFACE.to_vec(), frame(HEADERS, END_HEADERS, 1, &[0xff, 0xff])]),
        State::Active,
        "cut"
    );
    assert_eq!(
        run.up(2, &[frame(HEADERS, END_HEADERS, 3, &[0x80])]),
        State::NotHttp,
        "index 0"
    );
}

/// Everything told of a connection, cut at `cuts` within each part.
fn told_cut(cuts: &[usize]) -> (Vec<String>, Losses) {
    let padded = [&[3, 0, 0, 0, 1, 9][..], &get("/padded?x=1"), &[0; 3]].concat();
    let long = get(&format!("/{}", "long".repeat(25)));
    let (long_start, long_end) = long.split_at(40);
    let parts: [(Way, Vec<u8>); 6] = [
        (
            Way::ToServer,
            [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 9])].concat(),
        ),
        (
            Way::ToServer,
            [
                frame(HEADERS, END_HEADERS | PADDED | PRIORITY, 1, &padded),
                frame(DATA, END_STREAM, 1, &[1; 30]),
                frame(HEADERS, END_STREAM, 3, long_start),
                frame(CONTINUATION, 0, 3, &[]),
                frame(CONTINUATION, END_HEADERS, 3, long_end),
            ]
            .concat(),
        ),
        (
            Way::ToClient,
            [
                frame(SETTINGS, 0, 0, &[]),
                frame(HEADERS, END_HEADERS, 3, &[0x88]),
                frame(0x21, 7, 3, b"other"),
            ]
            .concat(),
        ),
        (
            Way::ToClient,
            [
                frame(DATA, PADDED, 3, &[1, 1, 0]),
                frame(HEADERS, END_HEADERS | END_STREAM, 3, &literal("grpc-status", "7", true)),
            ]
            .concat(),
        ),
        (
            Way::ToServer,
            [
                frame(HEADERS, END_HEADERS, 5, &get("/five")),
                frame(HEADERS, END_HEADERS, 7, &get("/7")),
            ]
            .concat(),
        ),
        (
            Way::ToClient,
            [
                frame(HEADERS, 0, 1, &[0x8d]),
                frame(CONTINUATION, END_HEADERS, 1, &[0xbe]),
                frame(RESET, 0, 1, &[0; 4]),
                frame(GO_AWAY, 0, 0, &[0, 0, 0, 5, 0, 0, 0, 0]),
            ]
            .concat(),
        ),
    ];
    let mut run = Run::new(Start::Fresh, HttpOptions::default());
    for (number, (way, bytes)) in parts.iter().enumerate() {
        let mut from = 0;
        for cut in cuts
            .iter()
            .copied()
            .filter(|cut| *cut < bytes.len())
            .chain([bytes.len()])
        {
            let cut = cut.max(from);
            run.piece(number as u64, *way, &bytes[from..cut], 0);
            from = cut;
        }
    }
    let mut told = run.told();
    told.extend(run.close());
    (told, run.losses)
}

#[test]
fn cuts_change_nothing() {
    let whole = told_cut(&[]);
    assert_eq!(whole.0.len(), 4, "{whole:?}");
    assert_eq!(whole.1, Losses::default());
    for cut in 0..260 {
        assert_eq!(told_cut(&[cut]), whole, "cut at {cut}");
        for second in cut..260 {
            assert_eq!(told_cut(&[cut, second]), whole, "cut at {cut} and {second}");
        }
    }
    assert_eq!(told_cut(&(0..260).collect::<Vec<_>>()), whole, "byte by byte");
}

fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let block = prop_oneof![
        Just(get("/a")),
        Just(vec![0x88]),
        Just(vec![0x82, 0xbe]),
        Just(literal(":path", "/added", true)),
        Just(literal("grpc-status", "1", true)),
        Just(vec![0x3f, 0xff, 0xff, 0x7f]),
        prop::collection::vec(any::<u8>(), 0..60),
    ];
    let made = (0..12_u8, any::<u8>(), 0..8_u32, block).prop_map(|(kind, flags, stream, block)| {
        // Half of them with the flags that make sense.
        frame(
            kind,
            if flags & 0x80 == 0 {
                flags
            } else {
                END_HEADERS | END_STREAM
            },
            stream,
            &block,
        )
    });
    let part = prop_oneof![6 => made, 1 => prop::collection::vec(any::<u8>(), 0..40), 1 => Just(PREFACE.to_vec())];
    prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    /// Whatever comes: no panic, no more bytes told than there were.
    #[test]
    fn any_bytes(
        start in prop::sample::select(vec![Start::Fresh, Start::Joined]),
        greeted in any::<bool>(),
        pieces in prop::collection::vec((any::<bool>(), hostile(), prop_oneof![4 => Just(0_u64), 1 => 0..50_u64, 1 => any::<u64>()]), 0..40),
    ) {
        let mut session = HttpSession::new(start, HttpOptions { max_streams: 3, ..HttpOptions::default() });
        let (mut told_up, mut told_down, mut up, mut down) = (0_u128, 0_u128, 0_u128, 0_u128);
        let hello = greeted.then(|| (true, PREFACE.to_vec(), 0));
        for (number, (to_server, bytes, unseen)) in hello.iter().chain(&pieces).enumerate() {
            let piece = Piece {
                way: if *to_server { Way::ToServer } else { Way::ToClient },
                ts_ns: number as u64,
                captured: bytes,
                true_len: (bytes.len() as u64).saturating_add(*unseen),
            };
            *(if *to_server { &mut up } else { &mut down }) += u128::from(piece.true_len);
            let mut count = |exchange: &Exchange<'_>| {
                told_up += u128::from(exchange.request.map_or(0, |request| request.bytes));
                told_down += u128::from(exchange.response.map_or(0, |response| response.bytes));
            };
            session.push(&piece, &mut count);
            if number % 7 == 6 {
                session.expire(number as u64 - 3, &mut count);
            }
        }
        session.close(&mut |exchange| {
            told_up += u128::from(exchange.request.map_or(0, |request| request.bytes));
            told_down += u128::from(exchange.response.map_or(0, |response| response.bytes));
        });
        prop_assert!(told_up <= up && told_down <= down, "{} of {}, {} of {}", told_up, up, told_down, down);
    }
}
