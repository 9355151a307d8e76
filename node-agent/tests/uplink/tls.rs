//! Certificates: good, foreign, rotated.

use std::{fs, path::Path};

use aggregator::ingest::{IngestConfig, ServerTls};
use node_agent::uplink::{ClientTls, GrpcConfig, Transport};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::{
    start,
    support::{Mood, PATIENCE, Recorder, Server, flows, loopback, until, uplink},
};

/// Writes a new authority and one certificate that it signed, for client and server both, as `NAME.*.pem`.
fn issue(dir: &Path, name: &str) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let authority_cert = authority.self_signed(&authority_key).unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "aggregator.test".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
    fs::write(dir.join(format!("{name}.ca.pem")), authority_cert.pem()).unwrap();
    fs::write(dir.join(format!("{name}.cert.pem")), cert.pem()).unwrap();
    fs::write(dir.join(format!("{name}.key.pem")), key.serialize_pem()).unwrap();
}

fn copy(dir: &Path, from: &str, to: &str) {
    for part in ["ca", "cert", "key"] {
        fs::copy(
            dir.join(format!("{from}.{part}.pem")),
            dir.join(format!("{to}.{part}.pem")),
        )
        .unwrap();
    }
}

fn server_tls(dir: &Path, name: &str) -> ServerTls {
    let file = |part: &str| dir.join(format!("{name}.{part}.pem"));
    ServerTls::new(file("cert"), file("key"), file("ca"))
}

fn client(address: std::net::SocketAddr, dir: &Path, name: &str, ca: &str) -> GrpcConfig {
    let file = |name: &str, part: &str| dir.join(format!("{name}.{part}.pem"));
    let tls = ClientTls {
        cert: file(name, "cert"),
        key: file(name, "key"),
        ca: file(ca, "ca"),
        server_name: None,
    };
    GrpcConfig {
        tls: Some(tls),
        ..GrpcConfig::new(format!("https://{address}"))
    }
}

#[tokio::test]
async fn good_certificates_pass_and_foreign_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), "ours");
    issue(dir.path(), "foreign");
    let recorder = Recorder::new(Mood::Willing);
    let config = IngestConfig {
        tls: Some(server_tls(dir.path(), "ours")),
        ..loopback()
    };
    let server = Server::start(config, recorder.clone()).await;

    let foreign = client(server.address, dir.path(), "foreign", "ours");
    let (handle, _ledger) = start(uplink(Transport::Grpc(foreign)));
    handle.send(flows(100..110)).await;
    until("refused by the server", || server.metrics.refused_of("tls") > 0).await;
    until("failed at the agent", || handle.metrics().connect_failures() > 1).await;
    assert_eq!((handle.metrics().connects(), handle.unacked().records), (0, 10));

    let distrusting = client(server.address, dir.path(), "ours", "foreign");
    let (handle, _ledger) = start(uplink(Transport::Grpc(distrusting)));
    handle.send(flows(100..110)).await;
    until("refused by the agent", || handle.metrics().connect_failures() > 1).await;
    assert_eq!((handle.metrics().connects(), handle.unacked().records), (0, 10));

    let mut misnamed = client(server.address, dir.path(), "ours", "ours");
    misnamed.tls.as_mut().unwrap().server_name = Some("other.test".to_owned());
    let (handle, _ledger) = start(uplink(Transport::Grpc(misnamed)));
    until("refused by the agent", || handle.metrics().connect_failures() > 1).await;

    let mut named = client(server.address, dir.path(), "ours", "ours");
    named.tls.as_mut().unwrap().server_name = Some("aggregator.test".to_owned());
    for good in [client(server.address, dir.path(), "ours", "ours"), named] {
        let recorded = recorder.order().len();
        let (handle, _ledger) = start(uplink(Transport::Grpc(good)));
        handle.send(flows(0..10)).await;
        assert_eq!(handle.drain(PATIENCE).await.records, 0);
        assert_eq!(recorder.order().len(), recorded + 1);
    }
}

#[tokio::test]
async fn rotated_certificates_are_used_by_both_ends() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), "first");
    issue(dir.path(), "second");
    copy(dir.path(), "first", "server");
    copy(dir.path(), "second", "client");
    let recorder = Recorder::new(Mood::Willing);
    let mut tls = server_tls(dir.path(), "server");
    tls.reload_interval = std::time::Duration::from_millis(10);
    let server = Server::start(
        IngestConfig {
            tls: Some(tls),
            ..loopback()
        },
        recorder.clone(),
    )
    .await;
    // Fails as long as the server has the first certificates.
    let config = client(server.address, dir.path(), "client", "client");
    let (handle, _ledger) = start(uplink(Transport::Grpc(config)));
    handle.send(flows(0..10)).await;
    until("refused", || handle.metrics().connect_failures() > 1).await;
    // A half-written file must not take the server down.
    fs::write(dir.path().join("server.cert.pem"), "-----BEGIN").unwrap();
    let failures = handle.metrics().connect_failures();
    until("refused again", || handle.metrics().connect_failures() > failures + 1).await;
    copy(dir.path(), "second", "server");
    assert_eq!(handle.drain(PATIENCE).await.records, 0);
    recorder.assert_exactly(10);
}
