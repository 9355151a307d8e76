//! Outputs that change while records come in: nothing lost, nothing twice, and what cannot be used changes nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aggregator::{
    config::{AggregatorConfig, SinkConfig, SinkKind, TextFormat},
    live::Live,
    pipeline::{AcceptError, Accepted},
};
use api::{AgentConfig, ConfigBuilder, Source};
use common::{arrived, assert_exactly, assert_ledger_closes, config, dataway, delivery, eventually, start, stub};
use telemetry::{Telemetry, health};
use testkit::dataway::{Fault, StubHandle};
use tokio::sync::watch;

const DRAIN: Duration = Duration::from_secs(60);

/// How often each record arrived at any of the stubs.
fn arrived_at(stubs: &[&StubHandle]) -> BTreeMap<u32, usize> {
    let mut all = BTreeMap::new();
    for stub in stubs {
        assert_eq!(stub.summary().violations, Vec::<String>::new());
        for (number, times) in arrived(stub) {
            *all.entry(number).or_default() += times;
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn another_address_under_load_loses_and_doubles_nothing() {
    const BATCHES: u32 = 400;
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (stub().await, stub().await);
    let small = |stub: &StubHandle| vec![dataway("dataway", &stub.url(), |d| d.max_body_bytes = 8 << 10)];
    let (mut aggregator, telemetry) = start(config(dir.path(), small(&one))).await;
    let accept = aggregator.accept();
    let sending = tokio::spawn(async move {
        for n in 0..BATCHES {
            let numbers = n * 50..(n + 1) * 50;
            let stored = accept.accept(delivery(1, u64::from(n) + 1, numbers)).await.unwrap();
            assert_eq!(stored, Accepted::Stored);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut changes = 0;
    while !sending.is_finished() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let next = if changes % 2 == 0 { &two } else { &one };
        assert!(aggregator.reconfigure(config(dir.path(), small(next))).await.unwrap());
        changes += 1;
    }
    sending.await.unwrap();
    assert!(changes >= 4, "only {changes} changes: the test shows little");
    assert!(aggregator.drain(DRAIN).await.left.is_empty());
    let expected: BTreeMap<u32, usize> = (0..BATCHES * 50).map(|n| (n, 1)).collect();
    assert_eq!(arrived_at(&[&one, &two]), expected);
    for stub in [&one, &two] {
        let summary = stub.summary();
        assert!(summary.bodies > 10 && summary.duplicates == 0, "{summary:?}");
    }
    assert_ledger_closes(&telemetry);
    let ledger = telemetry.ledger.snapshot();
    assert_eq!(ledger["sink.dataway.queue"].emitted, u64::from(BATCHES) * 50);
    assert!(ledger["sink.dataway.queue"].lost.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_hangs_is_left_in_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let (hanging, good) = (stub().await, stub().await);
    hanging.set_fault(Fault::Hang { seconds: 50.0 });
    let sink = |stub: &StubHandle| vec![dataway("dataway", &stub.url(), |d| d.timeout = Duration::from_secs(50))];
    let (mut aggregator, telemetry) = start(config(dir.path(), sink(&hanging))).await;
    aggregator.accept().accept(delivery(1, 1, 0..500)).await.unwrap();
    eventually("a request hangs", || !hanging.summary().faulted.is_empty()).await;
    let begun = Instant::now();
    aggregator.reconfigure(config(dir.path(), sink(&good))).await.unwrap();
    eventually("all is delivered", || arrived(&good).len() == 500).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
    aggregator.drain(DRAIN).await;
    assert_exactly(&good, 0..500);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_come_go_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (stub().await, stub().await);
    let rows = dir.path().join("rows");
    let first = || dataway("dataway", &one.url(), |_| {});
    let second = || dataway("dataway-2", &two.url(), |_| {});
    let file = |format| SinkConfig::file(rows.clone(), format);
    let lines = || fs::read_to_string(&rows).unwrap_or_default().lines().count();
    let (mut aggregator, telemetry) = start(config(dir.path(), vec![first()])).await;
    let accept = aggregator.accept();
    accept.accept(delivery(1, 1, 0..10)).await.unwrap();

    let all = vec![first(), second(), file(TextFormat::Json)];
    aggregator.reconfigure(config(dir.path(), all.clone())).await.unwrap();
    accept.accept(delivery(1, 2, 10..20)).await.unwrap();
    assert_eq!(lines(), 10, "the file is written before the acknowledgement");
    eventually("the second gets its records", || arrived(&two).len() == 10).await;

    // What the second has not delivered waits for its return.
    two.set_fault(Fault::Status {
        status: 503,
        retry_after: None,
    });
    accept.accept(delivery(1, 3, 20..30)).await.unwrap();
    eventually("the second fails", || !two.summary().faulted.is_empty()).await;
    assert!(aggregator.statuses().iter().any(|sink| sink.failing));
    aggregator.reconfigure(config(dir.path(), vec![first()])).await.unwrap();
    assert_eq!(aggregator.statuses().len(), 1);
    assert_eq!(telemetry.health.snapshot()["sink.dataway-2"].state, health::State::Ok);
    accept.accept(delivery(1, 4, 30..40)).await.unwrap();
    assert_eq!(lines(), 20);
    two.set_fault(Fault::None);
    aggregator.reconfigure(config(dir.path(), all)).await.unwrap();
    accept.accept(delivery(1, 5, 40..50)).await.unwrap();
    assert_eq!(lines(), 30);

    let table = vec![first(), second(), file(TextFormat::Table)];
    aggregator.reconfigure(config(dir.path(), table)).await.unwrap();
    accept.accept(delivery(1, 6, 50..60)).await.unwrap();
    assert_eq!(
        lines(),
        30 + 1 + 10,
        "another form goes to the same file, with its head"
    );
    assert!(aggregator.drain(DRAIN).await.left.is_empty());
    assert_exactly(&one, 0..60);
    let expected: BTreeMap<u32, usize> = (10..30).chain(40..60).map(|n| (n, 1)).collect();
    assert_eq!(arrived(&two), expected);
    assert_ledger_closes(&telemetry);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (stub().await, stub().await);
    let before = config(dir.path(), vec![dataway("dataway", &one.url(), |_| {})]);
    let (mut aggregator, _) = start(before.clone()).await;
    let accept = aggregator.accept();
    assert!(!aggregator.reconfigure(before).await.unwrap(), "the same is no change");
    let missing = dir.path().join("missing.pem");
    let other = || dataway("dataway", &two.url(), |d| d.ca_file = Some(missing.clone()));
    let refused: [(Vec<SinkConfig>, &str); 3] = [
        (vec![other()], "missing.pem"),
        (
            vec![
                dataway("dataway", &two.url(), |_| {}),
                SinkConfig::file("/proc/none/rows".into(), TextFormat::Json),
            ],
            "/proc/none/rows",
        ),
        (Vec::new(), "sinks"),
    ];
    for (sinks, named) in refused {
        let error = aggregator.reconfigure(config(dir.path(), sinks)).await.unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
    accept.accept(delivery(1, 1, 0..100)).await.unwrap();
    aggregator.drain(DRAIN).await;
    assert_exactly(&one, 0..100);
    assert!(arrived(&two).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wider_bound_makes_room_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let stub = stub().await;
    stub.set_fault(Fault::Status {
        status: 503,
        retry_after: None,
    });
    let bounded = |bytes| {
        let mut config = config(dir.path(), vec![dataway("dataway", &stub.url(), |d| d.gzip_level = 0)]);
        config.queue_max_bytes = bytes;
        config
    };
    let (mut aggregator, telemetry) = start(bounded(1 << 16)).await;
    let accept = aggregator.accept();
    let mut seq = 0;
    let refused = loop {
        seq += 1;
        let first = seq as u32 * 100;
        if let Err(error) = accept.accept(delivery(1, seq, first..first + 100)).await {
            break error;
        }
    };
    assert!(matches!(refused, AcceptError::Full { .. }), "{refused}");
    aggregator.reconfigure(bounded(1 << 24)).await.unwrap();
    let first = seq as u32 * 100;
    accept.accept(delivery(1, seq, first..first + 100)).await.unwrap();
    stub.set_fault(Fault::None);
    assert!(aggregator.drain(DRAIN).await.left.is_empty());
    assert_exactly(&stub, 100..first + 100);
    assert_ledger_closes(&telemetry);
}

fn options(given: &[(&str, &str)]) -> Arc<AgentConfig> {
    let mut sources = ConfigBuilder::new();
    for (key, value) in given {
        sources.set(key, Source::Flag, *value);
    }
    Arc::new(sources.build().unwrap())
}

fn build(dir: &Path) -> impl Fn(&AgentConfig) -> anyhow::Result<AggregatorConfig> + use<> {
    let queue = dir.join("queue");
    move |options| {
        let mut config = AggregatorConfig::from_options(options)?;
        config.queue_dir = Some(queue.clone());
        config.min_free_disk = 0;
        for sink in &mut config.sinks {
            if let SinkKind::Dataway(dataway) = &mut sink.kind {
                // A wrong token would be tried again after this long.
                dataway.auth_retry = Duration::from_secs(600);
            }
        }
        Ok(config)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_and_token_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (stub().await, stub().await);
    let token = dir.path().join("token");
    let to = |stub: &StubHandle, more: &[(&str, &str)]| {
        let (url, token) = (format!("http://{}", stub.addr), token.display().to_string());
        options(
            &[
                &[("dataway", url.as_str()), ("dataway_token_file", token.as_str())],
                more,
            ]
            .concat(),
        )
    };
    let telemetry = Telemetry::new("aggregator", "test");
    let (sender, mut options) = watch::channel(options(&[]));
    let says = || {
        let component = telemetry.health.snapshot().remove("configuration").unwrap();
        (component.state, component.reason.unwrap_or_default())
    };
    let starting = {
        let (telemetry, build) = (telemetry.clone(), build(dir.path()));
        tokio::spawn(async move {
            let live = Live::start(build, &mut options, &telemetry).await;
            (live, options)
        })
    };
    eventually("it waits for an output", || {
        telemetry.health.snapshot().contains_key("configuration") && says().1.contains("there is no output")
    })
    .await;
    sender.send(to(&one, &[])).unwrap();
    eventually("it waits for the token", || says().1.contains("dataway_token_file")).await;
    assert_eq!(says().0, health::State::Starting);
    fs::write(&token, "tkn_wrong").unwrap();
    let (live, mut options) = starting.await.unwrap();
    let mut live = live.unwrap();
    let accept = live.aggregator.accept();
    let running = tokio::spawn(async move { live.run(&mut options).await });

    accept.accept(delivery(1, 1, 0..100)).await.unwrap();
    eventually("the token is refused", || {
        telemetry.health.snapshot()["sink.dataway"].state == health::State::Degraded
    })
    .await;
    let begun = Instant::now();
    fs::write(&token, one.url().split("token=").last().unwrap()).unwrap();
    eventually("the records are let in", || arrived(&one).len() == 100).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "took {:?}", begun.elapsed());

    // Without a usable token the last one stays.
    fs::write(&token, "").unwrap();
    eventually("the token is missed", || says().0 == health::State::Degraded).await;
    assert!(says().1.contains("dataway_token_file"), "{:?}", says());
    accept.accept(delivery(1, 2, 100..200)).await.unwrap();
    eventually("the last token serves", || arrived(&one).len() == 200).await;
    fs::write(&token, two.url().split("token=").last().unwrap()).unwrap();

    sender.send(to(&two, &[("log_format", "json")])).unwrap();
    eventually("the other option waits for a start", || {
        says()
            == (
                health::State::Degraded,
                "takes effect at the next start: log_format = json".into(),
            )
    })
    .await;
    accept.accept(delivery(1, 3, 200..300)).await.unwrap();
    eventually("the other address is used", || arrived(&two).len() == 100).await;
    sender.send(to(&two, &[])).unwrap();
    eventually("all is well", || says().0 == health::State::Ok).await;
    running.abort();
    let once = |numbers: std::ops::Range<u32>| numbers.map(|n| (n, 1)).collect::<BTreeMap<u32, usize>>();
    assert_eq!((arrived(&one), arrived(&two)), (once(0..200), once(200..300)));
}
