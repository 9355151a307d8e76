//! hyper's client and server, one connection, requests in turn.

use std::{convert::Infallible, sync::Arc};

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper_util::rt::TokioIo;
use node_agent::protocols::{Losses, Way};
use proptest::prelude::*;

use crate::{
    recorder::{Record, connection},
    replay::{Told, View, bytes_of, cuts, partial, replay},
};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// One exchange to be made.
#[derive(Clone, Debug)]
struct Plan {
    method: &'static str,
    path: String,
    status: u16,
    /// Chunks of the bodies. One chunk is sent with its length.
    request: Vec<usize>,
    response: Vec<usize>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let body = || {
        prop_oneof![
            2 => Just(Vec::new()),
            3 => prop::collection::vec(0..3000_usize, 1..2),
            3 => prop::collection::vec(1..2000_usize, 2..5),
            1 => Just(vec![70_000]),
        ]
    };
    (
        prop::sample::select(vec!["GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS", "BREW"]),
        "/[a-z0-9/_-]{0,30}",
        "(\\?[a-z=&]{0,10})?",
        prop::sample::select(vec![200_u16, 201, 204, 301, 304, 404, 500]),
        body(),
        body(),
    )
        .prop_map(|(method, path, query, status, request, response)| Plan {
            method,
            path: path + &query,
            status,
            // What has no body says so by itself.
            request: if matches!(method, "GET" | "HEAD") {
                Vec::new()
            } else {
                request
            },
            response: if matches!(status, 204 | 304) {
                Vec::new()
            } else {
                response
            },
        })
}

fn body(chunks: &[usize]) -> Body {
    let bytes = |len: usize| Bytes::from(vec![b'x'; len]);
    match chunks {
        [] => Full::new(Bytes::new()).boxed_unsync(),
        [len] => Full::new(bytes(*len)).boxed_unsync(),
        chunks => {
            let frames: Vec<_> = chunks.iter().map(|len| Ok(Frame::data(bytes(*len)))).collect();
            StreamBody::new(futures::stream::iter(frames)).boxed_unsync()
        }
    }
}

/// Makes the exchanges over one connection and gives the record.
async fn converse(plans: Vec<Plan>) -> Record {
    let (client, server, record) = connection();
    let plans = Arc::new(plans);
    let theirs = Arc::clone(&plans);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let plans = Arc::clone(&theirs);
        async move {
            let number: usize = request.headers()["x-number"].to_str().unwrap().parse().unwrap();
            let plan = &plans[number];
            assert_eq!(request.uri().path_and_query().unwrap().as_str(), plan.path);
            request.into_body().collect().await.unwrap();
            let response = Response::builder()
                .status(plan.status)
                .body(body(&plan.response))
                .unwrap();
            Ok::<_, Infallible>(response)
        }
    });
    let server = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client))
        .await
        .unwrap();
    let requests = async move {
        for (number, plan) in plans.iter().enumerate() {
            let request = Request::builder()
                .method(Method::from_bytes(plan.method.as_bytes()).unwrap())
                .uri(&plan.path)
                .header("host", "test.example")
                .header("x-number", number)
                .body(body(&plan.request))
                .unwrap();
            sender.ready().await.unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::from_u16(plan.status).unwrap());
            let received = response.into_body().collect().await.unwrap().to_bytes().len();
            let sent = if plan.method == "HEAD" {
                0
            } else {
                plan.response.iter().sum()
            };
            assert_eq!(received, sent);
        }
    };
    let (_, connection, ()) = tokio::join!(server, connection, requests);
    connection.unwrap();
    std::mem::take(&mut *record.lock().unwrap())
}

fn record_of(plans: &[Plan]) -> Record {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(converse(plans.to_vec()))
}

fn path_of(plan: &Plan) -> &str {
    plan.path.split('?').next().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tells_what_was_done(plans in prop::collection::vec(plan(), 1..8), cuts in cuts()) {
        let record = record_of(&plans);
        let (told, losses) = replay(&record, &View::whole(cuts));
        prop_assert_eq!(losses, Losses::default());
        prop_assert_eq!(told.len(), plans.len());
        for (told, plan) in told.iter().zip(&plans) {
            prop_assert_eq!(told.method.as_deref(), Some(plan.method));
            prop_assert_eq!(told.path.as_deref(), Some(path_of(plan)));
            prop_assert_eq!(told.status, Some(plan.status));
            prop_assert!(told.clean, "{told:?}");
            // Not less than the bodies.
            prop_assert!(told.bytes.0 > plan.request.iter().sum::<usize>() as u64);
            if plan.method != "HEAD" {
                prop_assert!(told.bytes.1 > plan.response.iter().sum::<usize>() as u64);
            }
        }
        // Every byte belongs to one of them.
        prop_assert_eq!(told.iter().map(|told| told.bytes.0).sum::<u64>(), bytes_of(&record, Way::ToServer));
        prop_assert_eq!(told.iter().map(|told| told.bytes.1).sum::<u64>(), bytes_of(&record, Way::ToClient));
    }

    /// Where bytes are missing, exchanges may be missing or marked, but those that are not marked are right.
    #[test]
    fn tells_nothing_wrong(plans in prop::collection::vec(plan(), 1..8), view in partial()) {
        let record = record_of(&plans);
        let (told, _) = replay(&record, &view);
        prop_assert!(told.len() <= plans.len());
        let is = |told: &Told, plan: &Plan| {
            told.method.as_deref().is_none_or(|method| method == plan.method)
                && told.path.as_deref().is_none_or(|path| {
                    if told.truncated { path_of(plan).starts_with(path) } else { path == path_of(plan) }
                })
                && told.status.is_none_or(|status| status == plan.status)
        };
        for told in told.iter().filter(|told| told.clean) {
            prop_assert!(plans.iter().any(|plan| is(told, plan)), "{told:?}");
        }
    }
}
