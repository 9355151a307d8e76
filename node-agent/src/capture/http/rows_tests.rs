//! Rows from exchanges.

#![allow(clippy::indexing_slicing)]

use super::*;
use crate::{
    capture::ends::UnnamedEnds,
    identity::process::Proc,
    protocols::{Flags, Grpc, Transfer},
};

fn take(rows: &mut Rows) -> Vec<Httpflow> {
    let (proc, unnamed) = (Proc::new("/nonexistent"), UnnamedEnds::default());
    let mut taken = rows.take(Which::All, 10_000, 7, &mut Names::new(&proc, None, &unnamed));
    taken.sort_by(|a, b| (&a.path, a.status_code, a.grpc_status).cmp(&(&b.path, b.status_code, b.grpc_status)));
    taken
}

fn origin(client: bool) -> Origin {
    Origin {
        tuple: Tuple {
            local_port: 8080,
            remote_port: 40_000,
            ..Tuple::default()
        },
        client,
        owner: Owner::default(),
    }
}

fn exchange<'a>(method: &'a str, path: &'a str, status: Option<u16>) -> Exchange<'a> {
    let part = |first_ns| Transfer {
        first_ns,
        last_ns: first_ns + 1,
        bytes: 10,
    };
    Exchange {
        method: Some(method),
        path: Some(path),
        path_truncated: false,
        host: None,
        status,
        version: Version::Http11,
        grpc: None,
        request: Some(part(100)),
        response: status.map(|_| part(150)),
        flags: Flags::default(),
    }
}

#[test]
fn rows_are_told_apart_by_what_was_said() {
    let mut rows = Rows::new(100, 10_001, Ends::default());
    let (origin, mut known) = (origin(false), Known::default());
    let plain = exchange("GET", "/a", Some(200));
    let mut call = exchange("GET", "/a", Some(200));
    call.grpc = Some(Grpc { status: Some(5) });
    let unanswered = exchange("GET", "/a", None);
    for exchange in [plain, call, unanswered, plain, exchange("PUT", "/b", Some(200))] {
        rows.add(&origin, &mut known, &exchange);
    }
    let taken = take(&mut rows);
    let said: Vec<_> = taken
        .iter()
        .map(|row| (&*row.path, row.status_code, row.grpc_status, row.count, row.latency_ns))
        .collect();
    assert_eq!(
        said,
        [
            ("/a", 0, None, 1, 0),
            ("/a", 200, None, 2, 50),
            ("/a", 200, Some(5), 1, 50),
            ("/b", 200, None, 1, 50)
        ]
    );
    assert_eq!((taken[1].bytes_read, taken[1].bytes_written), (20, 20));
    // The client's port is left out, and points with the same tags have times of their own.
    assert_eq!(
        (taken[0].flow.local.port, taken[0].flow.remote.port),
        (Port::Number(8080), Port::Any)
    );
    let mut times: Vec<i64> = taken.iter().map(|row| row.time_unix_ns).collect();
    times.sort_unstable();
    assert_eq!(times, [7, 8, 9, 10]);
}

#[test]
fn too_many_paths_share_a_row() {
    let mut rows = Rows::new(3, 10_001, Ends::default());
    let (origin, mut known) = (origin(true), Known::default());
    for n in 0..10 {
        rows.add(&origin, &mut known, &exchange("GET", &format!("/{n}"), Some(200)));
    }
    for method in ["BREW", "WHEN"] {
        rows.add(&origin, &mut known, &exchange(method, "/pot", Some(200)));
    }
    rows.add(&origin, &mut known, &exchange("GET", "/1", Some(200)));
    let taken = take(&mut rows);
    let said: Vec<_> = taken.iter().map(|row| (&*row.method, &*row.path, row.count)).collect();
    let mut expected = [
        ("GET", "/0", 1),
        ("GET", "/1", 2),
        ("GET", "/2", 1),
        ("GET", "other", 7),
        ("other", "other", 2),
    ];
    let mut said = said;
    said.sort_unstable();
    expected.sort_unstable();
    assert_eq!(said, expected);
    let counts = rows.take_counts();
    assert_eq!((counts.exchanges, counts.other, counts.refused), (13, 9, 0));
}

#[test]
fn rows_are_bounded() {
    let mut rows = Rows::new(100, 10_001, Ends::default());
    for port in 0..5000 {
        let mut origin = origin(true);
        origin.tuple.remote_port = port;
        rows.add(&origin, &mut Known::default(), &exchange("GET", "/", Some(200)));
    }
    let counts = rows.take_counts();
    assert_eq!(rows.len() as u64 + counts.refused, 5000);
    assert_eq!(rows.len(), 100 + 25 + 1024);
}

#[test]
fn of_nothing_there_is_no_row() {
    let mut rows = Rows::new(100, 10_001, Ends::default());
    let mut nothing = exchange("", "", None);
    (nothing.method, nothing.path) = (None, None);
    rows.add(&origin(true), &mut Known::default(), &nothing);
    assert!(rows.is_empty());
    assert_eq!(rows.take_counts().nothing, 1);
}
