//! Conversations of which every byte was captured.

use super::{Run, told};
use crate::protocols::{HttpOptions, Losses, Start, State, Version, Way};

#[test]
fn keep_alive() {
    assert_eq!(
        told(&[
            ('>', "GET /a?q=1 HTTP/1.1\r\nHost: h\r\n\r\n"),
            ('<', "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
            ('>', "POST /b HTTP/1.1\r\nhost:h:80\r\ncontent-length: 3\r\n\r\nabc"),
            ('<', "HTTP/1.0 404 Not Found\r\nCONTENT-LENGTH:0\r\n\r\n"),
        ]),
        [
            "GET /a h 200 1.1 1..1/32 2..2/43",
            "POST /b h:80 404 1.0 3..3/53 4..4/44",
        ]
    );
}

#[test]
fn bodies() {
    assert_eq!(
        told(&[
            (
                '>',
                "POST /chunked HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\nContent-Length: 7\r\n\r\n"
            ),
            ('>', "5;ext=1\r\nhello\r\n0\r\nTrailer: x\r\n\r\n"),
            (
                '<',
                "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n"
            ),
            ('<', "0\r\n\r\n"),
            ('>', "HEAD /head HTTP/1.1\r\n\r\n"),
            ('<', "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
            ('>', "GET /304 HTTP/1.1\r\n\r\n"),
            ('<', "HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n"),
            ('>', "DELETE /204 HTTP/1.1\r\n\r\n"),
            ('<', "HTTP/1.1 204\r\n\r\n"),
        ]),
        [
            "POST /chunked - 201 1.1 1..2/112 3..4/72",
            "HEAD /head - 200 1.1 5..5/23 6..6/41",
            "GET /304 - 304 1.1 7..7/21 8..8/51",
            "DELETE /204 - 204 1.1 9..9/24 10..10/16",
        ]
    );
}

#[test]
fn interim_responses() {
    assert_eq!(
        told(&[
            (
                '>',
                "PUT /c HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
            ),
            ('<', "HTTP/1.1 100 Continue\r\n\r\n"),
            ('>', "body"),
            ('<', "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
            ('<', "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"),
            ('<', "x"),
        ]),
        ["PUT /c - 200 1.1 1..3/64 5..6/101"]
    );
}

#[test]
fn pipelined() {
    let mut run = Run::new(Start::Fresh);
    let requests: String = (0..1000).map(|n| format!("GET /{n} HTTP/1.1\r\n\r\n")).collect();
    let responses = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx".repeat(1000);
    run.up(1, &requests);
    assert!(run.told().is_empty());
    run.down(2, &responses);
    let told = run.told();
    assert_eq!(told.len(), 1000);
    for (n, told) in told.iter().enumerate() {
        let bytes = 18 + n.to_string().len();
        assert_eq!(*told, format!("GET /{n} - 200 1.1 1..1/{bytes} 2..2/39"));
    }
    assert_eq!(run.losses, Losses::default());
}

#[test]
fn more_pipelined_than_there_is_room() {
    let mut run = Run::with(
        Start::Fresh,
        HttpOptions {
            max_pending: 2,
            ..HttpOptions::default()
        },
    );
    let response = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx";
    run.up(1, "GET /0 HTTP/1.1\r\n\r\n".repeat(4));
    run.down(2, response);
    // There is room again, but the ones without room come first. What they carry is skipped all the same.
    run.up(3, "POST /1 HTTP/1.1\r\nContent-Length: 3\r\n\r\nGET");
    run.down(4, response.repeat(4));
    run.up(5, "GET /2 HTTP/1.1\r\n\r\n");
    run.down(6, response);
    assert_eq!(
        run.told(),
        [
            "GET /0 - 200 1.1 1..1/19 2..2/39",
            "GET /0 - 200 1.1 1..1/19 4..4/39",
            "- - - 200 1.1 - 4..4/39",
            "- - - 200 1.1 - 4..4/39",
            "- - - 200 1.1 - 4..4/39",
            "GET /2 - 200 1.1 5..5/19 6..6/39",
        ]
    );
    assert_eq!(run.losses.refused, 3);
}

#[test]
fn a_response_before_the_request_has_ended() {
    assert_eq!(
        told(&[
            ('>', "POST /up HTTP/1.1\r\nContent-Length: 10\r\n\r\n01234"),
            ('<', "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"),
            ('>', "56789"),
            ('>', "GET /next HTTP/1.1\r\n\r\n"),
            ('<', "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ]),
        [
            "POST /up - 413 1.1 1..3/51 2..2/45",
            "GET /next - 200 1.1 4..4/22 5..5/38",
        ]
    );
}

#[test]
fn tunnels_and_upgrades() {
    let mut run = Run::new(Start::Fresh);
    run.up(1, "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n");
    assert_eq!(
        run.down(2, "HTTP/1.1 200 Established\r\n\r\n\x16\x03\x01"),
        State::Opaque
    );
    assert_eq!(run.up(3, "\x16\x03\x01"), State::Opaque);
    assert_eq!(
        run.told(),
        ["CONNECT example.org:443 example.org:443 200 1.1 1..1/59 2..2/28"]
    );

    let mut run = Run::new(Start::Fresh);
    run.up(1, "CONNECT example.org:443 HTTP/1.1\r\n\r\n");
    run.down(2, "HTTP/1.1 407 Who\r\nContent-Length: 2\r\n\r\nno");
    assert_eq!(
        run.told(),
        ["CONNECT example.org:443 example.org:443 407 1.1 1..1/36 2..2/41"]
    );

    let mut run = Run::new(Start::Fresh);
    run.up(
        1,
        "GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    let state = run.down(
        2,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x01\x05hello",
    );
    assert_eq!(state, State::Opaque);
    assert_eq!(run.told(), ["GET /ws - 101 1.1 1..1/61 2..2/56"]);

    // An upgrade that the server does not care for.
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /h2 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n");
    assert_eq!(
        run.down(2, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        State::Active
    );
    assert_eq!(run.told(), ["GET /h2 - 200 1.1 1..1/55 2..2/38"]);
}

#[test]
fn ends_with_the_connection() {
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET / HTTP/1.0\r\n\r\n");
    run.down(2, "HTTP/1.0 200 OK\r\n\r\nsome ");
    run.piece(3, Way::ToClient, b"", 1 << 31);
    assert!(run.told().is_empty());
    assert_eq!(
        run.close(),
        [format!("GET / - 200 1.0 1..1/18 2..3/{}", (1_u64 << 31) + 24)]
    );
    assert!(run.close().is_empty());

    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET / HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HT");
    run.down(2, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    assert_eq!(
        run.close(),
        [
            "GET / - 200 1.1 1..1/18 2..2/43 A",
            "GET /2 - - 1.1 1..1/19 - A",
            "- - - - 1.1 1..1/9 - A",
        ]
    );
}

#[test]
fn targets() {
    let mut run = Run::with(
        Start::Fresh,
        HttpOptions {
            keep_query: true,
            path_limit: 10,
            ..HttpOptions::default()
        },
    );
    let long = "/a/very/long?".to_owned() + &"q".repeat(5000);
    for target in [
        "http://u.example/p?q",
        "http://u.example",
        "*",
        "/?x=1",
        "/12345678",
        "/123456789",
        &long,
    ] {
        run.up(1, format!("OPTIONS {target} HTTP/1.1\r\nHost: other\r\n\r\n"));
        run.down(2, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    }
    let told = run.told();
    let start = |n: usize| told[n].split(" 200").next().unwrap();
    assert_eq!(start(0), "OPTIONS /p?q u.example");
    assert_eq!(start(1), "OPTIONS / u.example");
    assert_eq!(start(2), "OPTIONS * other");
    assert_eq!(start(3), "OPTIONS /?x=1 other");
    assert_eq!(start(4), "OPTIONS /12345678 other");
    assert_eq!(start(5), "OPTIONS /123456789… other");
    assert_eq!(start(6), "OPTIONS /a/very/lo… other");
}

#[test]
fn versions_are_written_as_documented() {
    assert_eq!(
        [Version::Http10, Version::Http11, Version::Http2].map(Version::as_str),
        ["1.0", "1.1", "2.0"]
    );
}
