//! h2's client and server, one connection, requests at once.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use node_agent::protocols::{Losses, Way, classify::PREFACE};
use proptest::prelude::*;

use crate::{
    recorder::{Record, connection},
    replay::{Told, View, cuts, partial, replay},
};

/// One exchange to be made.
#[derive(Clone, Debug)]
struct Plan {
    method: &'static str,
    path: String,
    status: u16,
    request: usize,
    response: usize,
    /// The status of a gRPC call.
    grpc: Option<u32>,
    /// A header that makes the block longer than a frame.
    long: bool,
}

fn plan() -> impl Strategy<Value = Plan> {
    let len = || prop_oneof![2 => Just(0_usize), 3 => 1..3000_usize, 1 => Just(40_000_usize)];
    (
        prop::sample::select(vec!["GET", "POST", "PUT", "DELETE"]),
        "/[a-z0-9/_-]{0,30}",
        prop::sample::select(vec![200_u16, 204, 302, 404, 500]),
        len(),
        len(),
        prop::option::of(0..17_u32),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(method, path, status, request, response, grpc, long)| Plan {
            method: if grpc.is_some() { "POST" } else { method },
            path,
            status: if grpc.is_some() { 200 } else { status },
            request,
            response,
            grpc,
            long,
        })
}

/// Sends a body as far as flow control lets it, then ends the stream.
async fn send(mut stream: h2::SendStream<Bytes>, len: usize, trailers: Option<HeaderMap>) {
    let mut left = len;
    while left > 0 {
        stream.reserve_capacity(left);
        let Some(Ok(capacity)) = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await else {
            return;
        };
        let part = capacity.min(left);
        stream.send_data(vec![b'x'; part].into(), false).unwrap();
        left -= part;
    }
    match trailers {
        Some(trailers) => stream.send_trailers(trailers).unwrap(),
        None => stream.send_data(Bytes::new(), true).unwrap(),
    }
}

async fn receive(mut stream: h2::RecvStream) -> usize {
    let mut len = 0;
    while let Some(data) = stream.data().await {
        let data = data.unwrap();
        len += data.len();
        stream.flow_control().release_capacity(data.len()).unwrap();
    }
    stream.trailers().await.unwrap();
    len
}

async fn serve(io: tokio::io::DuplexStream, plans: Arc<Vec<Plan>>) {
    let mut connection = h2::server::handshake(io).await.unwrap();
    while let Some(accepted) = connection.accept().await {
        let Ok((request, mut respond)) = accepted else { return };
        let plans = Arc::clone(&plans);
        tokio::spawn(async move {
            let number: usize = request.headers()["x-number"].to_str().unwrap().parse().unwrap();
            let plan = &plans[number];
            assert_eq!(receive(request.into_body()).await, plan.request);
            let mut response = Response::builder().status(plan.status).header("x-served", number);
            if plan.grpc.is_some() {
                response = response.header("content-type", "application/grpc+proto");
            }
            let trailers = plan.grpc.map(|status| {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", status.into());
                trailers
            });
            let stream = respond.send_response(response.body(()).unwrap(), false).unwrap();
            send(stream, plan.response, trailers).await;
        });
    }
}

/// Makes the exchanges over one connection, `together` at a time, and gives the record.
async fn converse(plans: Vec<Plan>, together: usize) -> Record {
    let (io, server, record) = connection();
    let plans = Arc::new(plans);
    let server = tokio::spawn(serve(server, Arc::clone(&plans)));
    let (client, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    for first in (0..plans.len()).step_by(together) {
        let mut calls = Vec::new();
        for (number, plan) in plans.iter().enumerate().skip(first).take(together) {
            let mut request = Request::builder()
                .method(Method::from_bytes(plan.method.as_bytes()).unwrap())
                .uri(format!("http://test.example{}", plan.path))
                .header("x-number", number);
            if plan.long {
                request = request.header("x-long", "l".repeat(20_000));
            }
            if plan.grpc.is_some() {
                request = request
                    .header("content-type", "application/grpc")
                    .header("te", "trailers");
            }
            client = client.ready().await.unwrap();
            let (response, stream) = client.send_request(request.body(()).unwrap(), false).unwrap();
            let (request, expected) = (plan.request, plan.response);
            calls.push(tokio::spawn(async move {
                let send = send(stream, request, None);
                let receive = async {
                    let response = response.await.unwrap();
                    assert_eq!(receive(response.into_body()).await, expected);
                };
                tokio::join!(send, receive);
            }));
        }
        for call in calls {
            call.await.unwrap();
        }
    }
    drop(client);
    connection.await.unwrap().unwrap();
    server.await.unwrap();
    std::mem::take(&mut *record.lock().unwrap())
}

fn record_of(plans: &[Plan], together: usize) -> Record {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(converse(plans.to_vec(), together))
}

/// Bytes of HEADERS, CONTINUATION and DATA frames of each stream, by a plain walk over everything that passed one way.
fn frames_of(record: &Record, way: Way) -> BTreeMap<u32, u64> {
    let all: Vec<u8> = record
        .iter()
        .filter(|(other, _)| *other == way)
        .flat_map(|(_, bytes)| bytes.clone())
        .collect();
    let mut rest = all.strip_prefix(PREFACE.as_slice()).unwrap_or(&all);
    let mut streams = BTreeMap::new();
    while !rest.is_empty() {
        let len = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
        if matches!(rest[3], 0 | 1 | 9) {
            *streams
                .entry(u32::from_be_bytes([rest[5], rest[6], rest[7], rest[8]]))
                .or_default() += 9 + len as u64;
        }
        rest = &rest[9 + len..];
    }
    streams
}

/// What is to be told of a plan.
fn expected(plan: &Plan, bytes: (u64, u64)) -> Told {
    Told {
        method: Some(plan.method.to_owned()),
        path: Some(plan.path.clone()),
        status: Some(plan.status),
        grpc: plan.grpc.map(Some),
        bytes,
        clean: true,
        truncated: false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn tells_what_was_done(plans in prop::collection::vec(plan(), 1..10), together in 1..6_usize, cuts in cuts()) {
        let record = record_of(&plans, together);
        let (mut told, losses) = replay(&record, &View::whole(cuts));
        // A client may end the connection with streams that are done; nothing else belongs to nothing.
        prop_assert_eq!(losses, Losses::default());
        // The client numbers its streams in the order of its requests.
        let (up, down) = (frames_of(&record, Way::ToServer), frames_of(&record, Way::ToClient));
        let mut truth: Vec<_> = plans
            .iter()
            .zip((1..).step_by(2))
            .map(|(plan, stream)| expected(plan, (up[&stream], down[&stream])))
            .collect();
        truth.sort();
        told.sort();
        prop_assert_eq!(told, truth);
    }

    /// Where bytes are missing, exchanges and names may be missing, but what is told is right.
    #[test]
    fn tells_nothing_wrong(plans in prop::collection::vec(plan(), 1..10), together in 1..6_usize, view in partial()) {
        let record = record_of(&plans, together);
        let (told, _) = replay(&record, &view);
        prop_assert!(told.len() <= plans.len());
        let is = |told: &Told, plan: &Plan| {
            told.method.as_deref().is_none_or(|method| method == plan.method)
                && told.path.as_deref().is_none_or(|path| path == plan.path)
                && told.status.is_none_or(|status| status == plan.status)
                && told.grpc.flatten().is_none_or(|status| plan.grpc == Some(status))
        };
        for told in &told {
            prop_assert!(plans.iter().any(|plan| is(told, plan)), "{told:?}");
        }
    }
}

/// Of the preface only a beginning is captured: it is the preface all the same, and no request.
#[test]
fn a_cut_preface_is_no_request() {
    let plan = Plan {
        method: "GET",
        path: "/".to_owned(),
        status: 200,
        request: 0,
        response: 0,
        grpc: None,
        long: false,
    };
    let record = record_of(&[plan], 1);
    for limit in 1..=PREFACE.len() {
        let view = View {
            limit,
            ..View::whole(Vec::new())
        };
        let (told, _) = replay(&record, &view);
        let wrong = told
            .iter()
            .find(|told| told.method.as_deref().is_some_and(|method| method != "GET") || told.path.is_some());
        assert_eq!(wrong, None, "{limit} bytes captured");
    }
}
