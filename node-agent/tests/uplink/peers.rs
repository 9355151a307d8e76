//! The uplink against aggregators that misbehave.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::{
    convert::Limits,
    v1::{
        self, ClientMessage, ServerMessage, client_message,
        collector_server::{Collector, CollectorServer},
        server_message,
    },
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    start,
    support::{PATIENCE, closed, flows, grpc, until, uplink},
};

type Answers = Arc<dyn Fn(u64) -> Option<server_message::Kind> + Send + Sync>;

/// Answers each batch by its number, and remembers the numbers; a heartbeat is number 0.
#[derive(Clone)]
struct Odd {
    hello: v1::HelloAck,
    answers: Answers,
    seen: Arc<Mutex<Vec<u64>>>,
}

#[tonic::async_trait]
impl Collector for Odd {
    type StreamStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn stream(&self, request: Request<Streaming<ClientMessage>>) -> Result<Response<Self::StreamStream>, Status> {
        let (out, answers) = mpsc::channel(64);
        let (odd, mut inbound) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                let kind = match message.kind {
                    Some(client_message::Kind::Hello(_)) => Some(server_message::Kind::HelloAck(odd.hello.clone())),
                    Some(client_message::Kind::Batch(batch)) => {
                        odd.seen.lock().push(batch.seq);
                        (odd.answers)(batch.seq)
                    }
                    Some(client_message::Kind::Heartbeat(_)) => {
                        odd.seen.lock().push(0);
                        None
                    }
                    Some(client_message::Kind::Capabilities(_) | client_message::Kind::AgentStatus(_)) | None => None,
                };
                if let Some(kind) = kind
                    && out.send(Ok(ServerMessage { kind: Some(kind) })).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

fn hello() -> v1::HelloAck {
    v1::HelloAck {
        protocol_version: 1,
        last_seq: 0,
        limits: Some(Limits::default().into()),
        takes_node_reports: false,
        takes_records: proto::takes_records(),
    }
}

async fn odd(
    hello: v1::HelloAck,
    answers: impl Fn(u64) -> Option<server_message::Kind> + Send + Sync + 'static,
) -> (SocketAddr, Arc<Mutex<Vec<u64>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let odd = Odd {
        hello,
        answers: Arc::new(answers),
        seen: Arc::default(),
    };
    let seen = Arc::clone(&odd.seen);
    let server = tonic::transport::Server::builder().add_service(CollectorServer::new(odd));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, seen)
}

fn ack(seq: u64) -> Option<server_message::Kind> {
    Some(server_message::Kind::Ack(v1::Ack { seq }))
}

/// An aggregator of an earlier version would take a batch and drop the kinds that it does not know, unseen.
#[tokio::test]
async fn kinds_that_the_aggregator_does_not_know_are_counted_as_lost() {
    let old = v1::HelloAck {
        takes_records: vec![proto::batch_field(records::Measurement::Dnsflow)],
        ..hello()
    };
    let (address, seen) = odd(old, ack).await;
    let (handle, ledger) = start(uplink(grpc(address)));
    let mut batch = flows(0..3);
    let line = || records::Bash::new(1, 2, "ann".into(), "ls".into(), false, None);
    batch.bash = vec![line(), line()];
    handle.send(batch).await;
    let only = records::RecordBatch {
        bash: vec![line()],
        ..records::RecordBatch::default()
    };
    handle.send(only).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    assert_eq!(*seen.lock(), [1, 2]);
    assert_eq!(closed(&ledger, "uplink.send"), (6, 3, 0, 3));
    assert_eq!(ledger.stage("uplink.send").snapshot().lost["uplink_unknown_kind"], 3);
}

#[tokio::test]
async fn a_batch_rejected_twice_is_given_up_and_the_rest_goes_on() {
    let (address, seen) = odd(hello(), |seq| match seq {
        2 => Some(server_message::Kind::Nack(v1::Nack {
            seq,
            detail: "test".to_owned(),
        })),
        _ => ack(seq),
    })
    .await;
    let (handle, ledger) = start(node_agent::uplink::UplinkConfig {
        batch_records: 10,
        ..uplink(grpc(address))
    });
    handle.send(flows(0..40)).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    assert_eq!(closed(&ledger, "uplink.send"), (40, 30, 0, 10));
    assert_eq!(ledger.stage("uplink.send").snapshot().lost["uplink_rejected"], 10);
    assert_eq!(seen.lock().iter().filter(|seq| **seq == 2).count(), 2);
}

#[tokio::test]
async fn a_hello_that_knows_what_was_never_sent_is_not_believed() {
    let (address, seen) = odd(v1::HelloAck { last_seq: 1, ..hello() }, ack).await;
    let (handle, _ledger) = start(uplink(grpc(address)));
    until("refused: nothing was sent yet, so nothing can be known", || {
        handle.metrics().connect_failures() > 2
    })
    .await;
    handle.send(flows(0..10)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(
        seen.lock().is_empty() && handle.unacked().records == 10,
        "an impossible hello was believed"
    );
}

#[tokio::test]
async fn impossible_answers_end_the_stream_and_lose_nothing() {
    let lies: [fn(u64) -> Option<server_message::Kind>; 4] = [
        |seq| ack(seq + 1_000),
        |_| {
            Some(server_message::Kind::Busy(v1::Busy {
                seq: 0,
                ..v1::Busy::default()
            }))
        },
        |_| Some(server_message::Kind::HelloAck(hello())),
        |seq| {
            Some(server_message::Kind::Busy(v1::Busy {
                seq: seq + 1_000,
                ..v1::Busy::default()
            }))
        },
    ];
    for lie in lies {
        let (address, _) = odd(hello(), lie).await;
        let (handle, ledger) = start(uplink(grpc(address)));
        handle.send(flows(0..10)).await;
        until("the stream is opened again", || handle.metrics().connect_failures() > 2).await;
        assert_eq!(handle.unacked().records, 10);
        assert_eq!(ledger.stage("uplink.send").snapshot().emitted, 0);
    }
}

#[tokio::test]
async fn a_silent_aggregator_is_left_and_tried_again() {
    let (address, seen) = odd(hello(), |_| None).await;
    let config = node_agent::uplink::UplinkConfig {
        ack_timeout: Duration::from_millis(50),
        ..uplink(grpc(address))
    };
    let (handle, _ledger) = start(config);
    handle.send(flows(0..10)).await;
    until("sent three times", || seen.lock().len() >= 3).await;
    assert_eq!(handle.unacked().records, 10);
}

#[tokio::test]
async fn limits_below_the_promise_and_other_versions_are_refused() {
    let small = v1::Limits {
        max_message_bytes: 1,
        ..Limits::default().into()
    };
    for hello in [
        v1::HelloAck {
            limits: Some(small),
            ..hello()
        },
        v1::HelloAck {
            limits: None,
            ..hello()
        },
        v1::HelloAck {
            protocol_version: 2,
            ..hello()
        },
    ] {
        let (address, seen) = odd(hello, ack).await;
        let (handle, _ledger) = start(uplink(grpc(address)));
        handle.send(flows(0..10)).await;
        until("refused a few times", || handle.metrics().connect_failures() > 2).await;
        assert!(seen.lock().is_empty());
    }
}

#[tokio::test]
async fn no_more_is_in_flight_than_the_aggregator_allows() {
    let limits = Limits {
        max_unacked_batches: 3,
        ..Limits::default()
    };
    let (address, seen) = odd(
        v1::HelloAck {
            limits: Some(limits.into()),
            ..hello()
        },
        |_| None,
    )
    .await;
    let (handle, _ledger) = start(node_agent::uplink::UplinkConfig {
        batch_records: 1,
        ..uplink(grpc(address))
    });
    handle.send(flows(0..100)).await;
    until("three are sent", || seen.lock().len() == 3).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(*seen.lock(), [1, 2, 3]);
}

#[tokio::test]
async fn an_idle_uplink_says_that_it_is_there() {
    let limits = Limits {
        idle_ms: 60,
        ..Limits::default()
    };
    let (address, seen) = odd(
        v1::HelloAck {
            limits: Some(limits.into()),
            ..hello()
        },
        ack,
    )
    .await;
    let (handle, _ledger) = start(uplink(grpc(address)));
    until("three heartbeats", || {
        seen.lock().len() >= 3 && seen.lock().iter().all(|seq| *seq == 0)
    })
    .await;
    handle.send(flows(0..10)).await;
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    assert_eq!(handle.metrics().connects(), 1);
}
