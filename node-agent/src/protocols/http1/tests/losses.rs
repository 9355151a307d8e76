//! Conversations with bytes that were not captured, or that are not HTTP.

use super::Run;
use crate::protocols::{Losses, Start, State, Way};

#[test]
fn bodies_that_nobody_saw() {
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /file HTTP/1.1\r\n\r\n");
    run.down(2, format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 200_000_000));
    // sendfile
    for ts_ns in 3..103 {
        run.piece(ts_ns, Way::ToClient, b"", 2_000_000);
    }
    assert_eq!(run.told(), ["GET /file - 200 1.1 1..1/22 2..102/200000046"]);
    // A body of which the capture saw the beginning, in the same piece as the head.
    run.up(200, "GET /big HTTP/1.1\r\n\r\n");
    run.piece(
        201,
        Way::ToClient,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nbeginning",
        4991,
    );
    assert_eq!(run.told(), ["GET /big - 200 1.1 200..200/21 201..201/5041"]);
    // Chunks of which the capture saw the beginnings.
    run.up(300, "GET /chunks HTTP/1.1\r\n\r\n");
    run.piece(
        301,
        Way::ToClient,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nabc",
        4093 + 2,
    );
    run.piece(302, Way::ToClient, b"1000\r\nabc", 4093);
    run.piece(302, Way::ToClient, b"\r\n", 0);
    run.down(303, "0\r\n\r\n");
    let bytes = 47 + 2 * (6 + 4096 + 2) + 5;
    assert_eq!(
        run.told(),
        [format!("GET /chunks - 200 1.1 300..300/24 301..303/{bytes}")]
    );
    assert_eq!(run.losses, Losses::default());
}

#[test]
fn finds_the_next_message_after_missing_bytes() {
    // The end of the heads was not captured; both belong to one exchange.
    let mut run = Run::new(Start::Fresh);
    run.piece(1, Way::ToServer, b"GET /a HTTP/1.1\r\nCookie: aaaa", 4000);
    run.piece(2, Way::ToClient, b"HTTP/1.1 200 OK\r\nSet-Cookie: aa", 4000);
    assert!(run.told().is_empty());
    run.up(3, "GET /b HTTP/1.1\r\n\r\n");
    assert_eq!(run.told(), ["GET /a - 200 1.1 1..1/4029 2..2/4031 M"]);
    run.down(4, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(run.told(), ["GET /b - 200 1.1 3..3/19 4..4/38"]);
    // The request's end is not known, the response's is.
    run.piece(5, Way::ToServer, b"GET /c HTTP/1.1\r\nCookie: aaaa", 4000);
    run.down(6, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(run.told(), ["GET /c - 200 1.1 5..5/4029 6..6/38 M"]);
    // A last exchange without end is told when nothing comes.
    run.up(7, "GET /d HTTP/1.1\r\n\r\n");
    run.piece(8, Way::ToClient, b"HTTP/1.1 200 OK\r\nSet-Cookie: aa", 4000);
    assert!(run.expire(7).is_empty());
    assert_eq!(run.expire(8), ["GET /d - 200 1.1 7..7/19 8..8/4031 MU"]);
    assert!(run.expire(9).is_empty());
    // The path was cut by the capture.
    run.piece(9, Way::ToServer, b"GET /long-pa", 100);
    run.down(10, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(run.told(), ["GET /long-pa… - 200 1.1 9..9/112 10..10/38 M"]);
    assert_eq!(run.losses.resyncs, 5);
}

#[test]
fn a_response_that_passed_unseen_does_not_shift_the_others() {
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /a HTTP/1.1\r\n\r\n");
    run.piece(2, Way::ToClient, b"", 300);
    run.up(3, "GET /b HTTP/1.1\r\n\r\n");
    run.down(4, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(
        run.told(),
        ["GET /a - - 1.1 1..1/19 - M", "GET /b - 200 1.1 3..3/19 4..4/38"]
    );
    assert_eq!(run.losses.unattributed_bytes, 300);
}

#[test]
fn chunks_are_found_again() {
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /a HTTP/1.1\r\n\r\n");
    // Two chunks in one piece, of which the second was not seen; then a whole one; then the end.
    run.piece(
        2,
        Way::ToClient,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6",
        2 + 6 + 2,
    );
    run.down(3, "4\r\nabcd\r\n");
    run.down(4, "0\r\n\r\n");
    assert_eq!(run.told(), ["GET /a - 200 1.1 1..1/19 2..4/82 M"]);
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /a HTTP/1.1\r\n\r\n");
    run.piece(
        2,
        Way::ToClient,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        100,
    );
    run.down(3, "middle of a chunk\r\n0\r\n\r\n");
    assert_eq!(run.told(), ["GET /a - 200 1.1 1..1/19 2..3/177 M"]);
}

#[test]
fn joined_in_the_middle() {
    let mut run = Run::new(Start::Joined);
    run.down(1, "the end of some body");
    run.down(2, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx");
    run.up(3, "GET /a HTTP/1.1\r\n\r\n");
    run.down(4, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx");
    run.up(5, "GET /b HTTP/1.1\r\n\r\n");
    run.down(6, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx");
    assert_eq!(
        run.told(),
        [
            "- - - 200 1.1 - 2..2/39 J",
            "GET /a - 200 1.1 3..3/19 4..4/39",
            "GET /b - 200 1.1 5..5/19 6..6/39",
        ]
    );
    assert_eq!(run.losses.unattributed_bytes, 20);
}

#[test]
fn what_is_not_http() {
    for bytes in [
        "SSH-2.0-x\r\n",
        "GET /\r\n",
        "GET  HTTP/1.1\r\n",
        "G@T / HTTP/1.1\r\n",
        "GET /a HTTP/3.0\r\n",
    ] {
        assert_eq!(Run::new(Start::Fresh).up(1, bytes), State::NotHttp, "{bytes}");
    }
    for head in [
        "Content-Length: -1",
        "Content-Length: 1, 2",
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 99999999999999999999999",
        "Content-Length: 9223372036854775808",
        "Content-Length: ",
    ] {
        let mut run = Run::new(Start::Fresh);
        let state = run.up(1, format!("GET / HTTP/1.1\r\n{head}\r\n\r\n"));
        assert_eq!((state, run.losses.malformed), (State::NotHttp, 1), "{head}");
    }
    // Known to be HTTP, it is followed on.
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /a HTTP/1.1\r\n\r\n");
    run.down(2, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(run.up(3, "\x16\x03\x01garbage\r\n"), State::Active);
    run.up(4, "GET /b HTTP/1.1\r\n\r\n");
    run.down(5, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(run.told().len(), 2);
    assert_eq!((run.losses.malformed, run.losses.unattributed_bytes), (1, 12));
}

#[test]
fn a_giant_head_is_not_kept() {
    let mut run = Run::new(Start::Fresh);
    run.up(1, "GET /a HTTP/1.1\r\nCookie: ");
    for _ in 0..1000 {
        run.up(2, [b'x'; 8192]);
    }
    run.up(3, "\r\nHost: h\r\n\r\n");
    run.down(4, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(
        run.told(),
        [format!("GET /a h 200 1.1 1..3/{} 4..4/38", 8_192_000 + 25 + 13)]
    );
}

#[test]
fn the_answer_to_an_unseen_head_does_not_take_the_next_one_for_its_body() {
    for length in ["", "Content-Length: 1000\r\n"] {
        let mut run = Run::new(Start::Fresh);
        run.piece(1, Way::ToServer, b"", 19);
        run.down(2, format!("HTTP/1.1 200 OK\r\n{length}\r\n"));
        run.up(3, "GET /a HTTP/1.1\r\n\r\n");
        run.down(4, "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n");
        run.up(5, "GET /b HTTP/1.1\r\n\r\n");
        run.down(6, "HTTP/1.1 204 No\r\n\r\n");
        let bytes = 19 + length.len();
        assert_eq!(
            run.told(),
            [
                format!("- - - 200 1.1 - 2..2/{bytes} M"),
                // Not told before it was known to have ended.
                "GET /a - 404 1.1 3..3/19 4..4/38 M".to_owned(),
                "GET /b - 204 1.1 5..5/19 6..6/19".to_owned(),
            ]
        );
    }
}
