//! Peers that send what they must not. The server says why, counts it, and serves the next one.

use std::{net::SocketAddr, time::Duration};

use aggregator::ingest::{IngestConfig, ServerTls};
use proto::{
    codec::StrictCodec,
    v1::{self, ClientMessage, ServerMessage, client_message::Kind, server_message},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time,
};
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig},
};

use crate::support::{Client, Fake, Mood, PATIENCE, Server, hello, loopback, until};

/// A good stream still works.
async fn assert_serves(server: &Server) {
    let mut client = Client::greeted(server.url()).await;
    client.batch(1).await;
    client.expect_ack(1).await;
}

fn assert_refused(status: &Status, names: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(
        status.message().contains(names),
        "`{}` does not name `{names}`",
        status.message()
    );
}

#[tokio::test]
async fn wrong_beginnings_are_refused() {
    let server = Server::start(loopback(), Fake::new(Mood::Willing)).await;
    let cases = [
        (
            Some(Kind::Hello(v1::Hello {
                protocol_version: 2,
                ..hello()
            })),
            "protocol_version is 2",
            "hello_version",
        ),
        (
            Some(Kind::Hello(v1::Hello {
                node: String::new(),
                ..hello()
            })),
            "hello.node",
            "hello_field",
        ),
        (
            Some(Kind::Batch(v1::Batch::default())),
            "first message must be hello",
            "hello_missing",
        ),
        (None, "kind", "kind"),
    ];
    for (kind, names, reason) in cases {
        let mut client = Client::connect(server.url()).await;
        client.message(ClientMessage { kind }).await;
        assert_refused(&client.end().await, names);
        assert_eq!(server.metrics.malformed_of(reason), 1, "{reason}");
    }
    let mut client = Client::greeted(server.url()).await;
    client.say(Kind::Hello(hello())).await;
    assert_refused(&client.end().await, "hello comes once");
    assert_serves(&server).await;
}

#[tokio::test]
async fn malformed_batches_are_named_and_end_the_stream() {
    type Change = fn(&mut v1::Batch);
    let fake = Fake::new(Mood::Willing);
    let server = Server::start(loopback(), fake.clone()).await;
    let cases: [(Change, &str, &str); 5] = [
        (
            |batch| batch.netflow[1].process_name = 9,
            "netflow[1].process_name is text 9",
            "unknown_text",
        ),
        (
            |batch| batch.netflow[2].transport = 77,
            "netflow[2].transport is 77",
            "enum",
        ),
        (
            |batch| batch.netflow[0].local_v4 = None,
            "netflow[0].local_v4",
            "address",
        ),
        (
            |batch| batch.netflow[0].remote_port_plus_one = 1 << 17,
            "remote_port_plus_one is 131072",
            "port",
        ),
        (
            |batch| batch.strings.as_mut().unwrap().first_id = 5,
            "first_id is 5",
            "text_number",
        ),
    ];
    for (change, names, reason) in cases {
        let mut client = Client::greeted(server.url()).await;
        let mut batch = client.encode(4);
        change(&mut batch);
        client.say(Kind::Batch(batch)).await;
        let answer = client.hear().await.unwrap();
        assert!(
            matches!(&answer, server_message::Kind::Nack(nack) if nack.seq == 4 && nack.detail.contains(names)),
            "{answer:?}"
        );
        assert_refused(&client.end().await, names);
        assert_eq!(server.metrics.malformed_of(reason), 1, "{reason}");
    }
    let mut client = Client::greeted(server.url()).await;
    client.batch(8).await;
    client.expect_ack(8).await;
    client.batch(7).await;
    assert!(matches!(client.hear().await.unwrap(), server_message::Kind::Nack(nack) if nack.seq == 7));
    assert_refused(&client.end().await, "batch.seq is 7 after 8");
    assert_eq!(fake.stored(), [8]);
    // Five malformed batches and one out of order, of three records each, and one good.
    assert_eq!(server.closed(), (21, 3, 0, 18));
    assert_serves(&server).await;
}

/// Has the field numbers of [`ClientMessage`] and other types.
#[derive(Clone, PartialEq, prost::Message)]
struct Lookalike {
    #[prost(uint64, tag = "1")]
    hello: u64,
}

#[tokio::test]
async fn messages_that_do_not_decode_are_the_senders_fault() {
    let server = Server::start(loopback(), Fake::new(Mood::Willing)).await;
    let channel = Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = "/ebpfcollector.v1.Collector/Stream".parse().unwrap();
    let messages = tonic::Request::new(tokio_stream::once(Lookalike { hello: 5 }));
    let mut answers = grpc
        .streaming(messages, path, StrictCodec::<Lookalike, ServerMessage>::default())
        .await
        .unwrap()
        .into_inner();
    let status = answers.message().await.unwrap_err();
    assert_refused(&status, "ClientMessage.kind");
    assert_eq!(server.metrics.malformed_of("undecodable"), 1);
    assert_serves(&server).await;
}

#[tokio::test]
async fn oversized_messages_are_refused_as_such() {
    let config = IngestConfig {
        max_message_bytes: 2 << 20,
        ..loopback()
    };
    let server = Server::start(config, Fake::new(Mood::Willing)).await;
    let mut client = Client::greeted(server.url()).await;
    let texts = vec!["x".repeat(3 << 20)];
    let strings = Some(v1::Strings {
        reset: true,
        first_id: 1,
        texts,
    });
    client
        .say(Kind::Batch(v1::Batch {
            seq: 1,
            strings,
            ..v1::Batch::default()
        }))
        .await;
    let status = client.end().await;
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("max_message_bytes = 2097152"), "{status}");
    assert_eq!(server.metrics.malformed_of("oversized"), 1);
    assert_serves(&server).await;
}

/// Sends bytes and reads until the server closes.
async fn raw(address: SocketAddr, bytes: &[u8]) {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    // The server may close before all is written, and with a reset: both are its right.
    drop(tcp.write_all(bytes).await);
    let mut answer = Vec::new();
    drop(
        time::timeout(PATIENCE, tcp.read_to_end(&mut answer))
            .await
            .expect("connection not closed"),
    );
}

#[tokio::test]
async fn garbage_on_the_port_is_closed_and_counted() {
    let config = IngestConfig {
        first_message_timeout: Duration::from_millis(200),
        ..loopback()
    };
    let server = Server::start(config, Fake::new(Mood::Willing)).await;
    raw(server.address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    raw(server.address, &[0xff; 4096]).await;
    until("both are counted", || server.metrics.refused_of("not_http2") == 2).await;
    raw(server.address, b"").await;
    raw(server.address, b"PRI * HT").await;
    until("both silent ones are counted", || {
        server.metrics.refused_of("silent") == 2
    })
    .await;
    // The right beginning, then frames that are none.
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend([0x5a; 70_000]);
    raw(server.address, &bytes).await;
    assert_serves(&server).await;
}

#[tokio::test]
async fn more_connections_than_allowed_are_closed_and_counted() {
    let server = Server::start(
        IngestConfig {
            max_connections: 1,
            ..loopback()
        },
        Fake::new(Mood::Willing),
    )
    .await;
    let mut client = Client::greeted(server.url()).await;
    raw(server.address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert_eq!(server.metrics.refused_of("limit"), 1);
    client.batch(1).await;
    client.expect_ack(1).await;
    drop(client);
    // The slot is free again once the server has seen the end.
    let deadline = time::Instant::now() + PATIENCE;
    while Channel::from_shared(server.url()).unwrap().connect().await.is_err() {
        assert!(time::Instant::now() < deadline, "the slot never came free");
        time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn peers_without_certificate_are_refused_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let ca = authority.self_signed(&authority_key).unwrap().pem();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let cert = params.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("ca"), &ca).unwrap();
    std::fs::write(path("cert"), cert.pem()).unwrap();
    std::fs::write(path("key"), key.serialize_pem()).unwrap();
    let tls = ServerTls::new(path("cert"), path("key"), path("ca"));
    let fake = Fake::new(Mood::Willing);
    let server = Server::start(
        IngestConfig {
            tls: Some(tls),
            ..loopback()
        },
        fake.clone(),
    )
    .await;

    let anonymous = Channel::from_shared(format!("https://{}", server.address))
        .unwrap()
        .tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)))
        .unwrap();
    // TLS 1.3 lets the client believe for a moment that it is in.
    if let Ok(channel) = anonymous.connect().await {
        let mut client = v1::collector_client::CollectorClient::new(channel);
        let hello = ClientMessage {
            kind: Some(Kind::Hello(hello())),
        };
        assert!(
            client.stream(tokio_stream::once(hello)).await.is_err(),
            "served without a certificate"
        );
    }
    until("counted", || server.metrics.refused_of("tls") == 1).await;
    raw(server.address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    until("plaintext is counted too", || server.metrics.refused_of("tls") == 2).await;
    assert!(fake.calls().is_empty());
}
