//! The ledger: every hand-off counts what entered, what it passed on, what it left out and why, what it lost and why.
//!
//! Invariant, once a stage is quiescent (`pending == 0`): `entered = emitted + sum(skipped) + sum(lost)`.
//!
//! Entry: [`Ledger::stage`] once per hand-off at start, then the counters of [`Stage`]. Hot paths take a [`Reason`]
//! handle once ([`Stage::skip_reason`], [`Stage::lost_reason`]) and count with one atomic add.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// All stages of one process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    stages: Arc<RwLock<BTreeMap<&'static str, Stage>>>,
}

/// Counters of one hand-off. Cheap to clone. [`Stage::entered`] and [`Stage::emitted`] are one atomic add.
#[derive(Clone, Debug, Default)]
pub struct Stage {
    inner: Arc<StageInner>,
}

#[derive(Debug, Default)]
struct StageInner {
    entered: AtomicU64,
    emitted: AtomicU64,
    skipped: Reasons,
    lost: Reasons,
}

#[derive(Debug, Default)]
struct Reasons(RwLock<BTreeMap<&'static str, Reason>>);

/// The counter of one reason of one stage: one atomic add per use. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Reason(Arc<AtomicU64>);

/// A consistent-enough copy of one stage's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct StageSnapshot {
    /// Items taken in.
    pub entered: u64,
    /// Items handed on.
    pub emitted: u64,
    /// Items left out on purpose, by reason.
    pub skipped: BTreeMap<&'static str, u64>,
    /// Items lost, by reason.
    pub lost: BTreeMap<&'static str, u64>,
}

// === impl Ledger ===

impl Ledger {
    /// The stage of that name, created on first use. Names are `<component>.<hand-off>`, e.g. `uplink.send`.
    #[must_use]
    pub fn stage(&self, name: &'static str) -> Stage {
        if let Some(stage) = self.stages.read().get(name) {
            return stage.clone();
        }
        self.stages.write().entry(name).or_default().clone()
    }

    /// All stages by name.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<&'static str, StageSnapshot> {
        self.stages
            .read()
            .iter()
            .map(|(name, stage)| (*name, stage.snapshot()))
            .collect()
    }
}

// === impl Stage ===

impl Stage {
    /// Counts items taken in. Call it before the item can leave the stage, so that `pending` is never negative.
    pub fn entered(&self, n: u64) {
        self.inner.entered.fetch_add(n, Ordering::Relaxed);
    }

    /// Counts items handed on.
    pub fn emitted(&self, n: u64) {
        self.inner.emitted.fetch_add(n, Ordering::Release);
    }

    /// Counts items left out on purpose. Reasons are a small fixed set of snake_case words.
    pub fn skipped(&self, reason: &'static str, n: u64) {
        self.inner.skipped.add(reason, n);
    }

    /// Counts items lost. Reasons are a small fixed set of snake_case words.
    pub fn lost(&self, reason: &'static str, n: u64) {
        self.inner.lost.add(reason, n);
    }

    /// The counter behind [`Stage::skipped`] for that reason; it shows in the ledger from now on, even at zero.
    #[must_use]
    pub fn skip_reason(&self, reason: &'static str) -> Reason {
        self.inner.skipped.handle(reason)
    }

    /// The counter behind [`Stage::lost`] for that reason; it shows in the ledger from now on, even at zero.
    #[must_use]
    pub fn lost_reason(&self, reason: &'static str) -> Reason {
        self.inner.lost.handle(reason)
    }

    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> StageSnapshot {
        // What left is read before what entered: an item counted as gone was counted as entered before, so a
        // snapshot taken under load can show items too many inside, never fewer than none.
        let skipped = self.inner.skipped.snapshot();
        let lost = self.inner.lost.snapshot();
        let emitted = self.inner.emitted.load(Ordering::Acquire);
        let entered = self.inner.entered.load(Ordering::Relaxed);
        StageSnapshot {
            entered,
            emitted,
            skipped,
            lost,
        }
    }
}

// === impl Reasons ===

impl Reasons {
    fn add(&self, reason: &'static str, n: u64) {
        if n == 0 {
            return;
        }
        if let Some(counter) = self.0.read().get(reason) {
            counter.add(n);
            return;
        }
        self.handle(reason).add(n);
    }

    fn handle(&self, reason: &'static str) -> Reason {
        self.0.write().entry(reason).or_default().clone()
    }

    fn snapshot(&self) -> BTreeMap<&'static str, u64> {
        self.0
            .read()
            .iter()
            .map(|(reason, counter)| (*reason, counter.get()))
            .collect()
    }
}

// === impl Reason ===

impl Reason {
    /// Counts items for this reason.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Release);
    }

    /// Items counted so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

// === impl StageSnapshot ===

impl StageSnapshot {
    /// Items still inside the stage: entered minus all that left it.
    #[must_use]
    pub fn pending(&self) -> i64 {
        let out = self.emitted + self.skipped.values().sum::<u64>() + self.lost.values().sum::<u64>();
        self.entered.wrapping_sub(out).cast_signed()
    }
}

/// Shows the ledger as metrics, computed at each scrape.
#[derive(Debug)]
pub(crate) struct LedgerCollector(pub(crate) Ledger);

impl Collector for LedgerCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let stages = self.0.snapshot();
        let per_stage = |value: fn(&StageSnapshot) -> u64| {
            stages
                .iter()
                .map(move |(name, stage)| (vec![("stage", *name)], value(stage)))
                .collect::<Vec<_>>()
        };
        let per_reason = |values: fn(&StageSnapshot) -> &BTreeMap<&'static str, u64>| {
            let mut rows = Vec::new();
            for (name, stage) in &stages {
                for (reason, n) in values(stage) {
                    rows.push((vec![("stage", *name), ("reason", *reason)], *n));
                }
            }
            rows
        };
        counters(
            &mut encoder,
            "ledger_entered",
            "Items a hand-off took in",
            per_stage(|s| s.entered),
        )?;
        counters(
            &mut encoder,
            "ledger_emitted",
            "Items a hand-off passed on",
            per_stage(|s| s.emitted),
        )?;
        counters(
            &mut encoder,
            "ledger_skipped",
            "Items a hand-off left out on purpose, by reason",
            per_reason(|s| &s.skipped),
        )?;
        counters(
            &mut encoder,
            "ledger_lost",
            "Items a hand-off lost, by reason",
            per_reason(|s| &s.lost),
        )?;

        let mut family = encoder.encode_descriptor(
            "ledger_pending",
            "Items inside a hand-off: entered - emitted - skipped - lost",
            None,
            MetricType::Gauge,
        )?;
        for (name, stage) in &stages {
            ConstGauge::new(stage.pending()).encode(family.encode_family(&[("stage", *name)])?)?;
        }
        Ok(())
    }
}

type Row = (Vec<(&'static str, &'static str)>, u64);

fn counters(encoder: &mut DescriptorEncoder, name: &str, help: &str, rows: Vec<Row>) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in rows {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn balances_when_quiescent() {
        let ledger = Ledger::default();
        let stage = ledger.stage("test.balance");
        stage.entered(10);
        stage.emitted(5);
        stage.skipped("loopback", 3);
        assert_eq!(ledger.snapshot()["test.balance"].pending(), 2);
        stage.lost("queue_full", 2);
        let snapshot = ledger.snapshot().remove("test.balance").unwrap();
        assert_eq!(snapshot.pending(), 0);
        assert_eq!(snapshot.skipped, BTreeMap::from([("loopback", 3)]));
        assert_eq!(snapshot.lost, BTreeMap::from([("queue_full", 2)]));
    }

    #[test]
    fn handle_and_name_are_one_counter() {
        let stage = Stage::default();
        let handle = stage.lost_reason("ring_full");
        assert_eq!(
            stage.snapshot().lost,
            BTreeMap::from([("ring_full", 0)]),
            "a registered reason shows at zero"
        );
        handle.add(2);
        stage.lost("ring_full", 3);
        assert_eq!(handle.get(), 5);
        assert_eq!(stage.snapshot().lost, BTreeMap::from([("ring_full", 5)]));
        assert!(stage.snapshot().skipped.is_empty(), "lost and skipped are apart");
    }

    #[test]
    fn zero_does_not_invent_a_reason() {
        let stage = Stage::default();
        stage.skipped("never", 0);
        stage.lost("never", 0);
        assert_eq!(stage.snapshot(), StageSnapshot::default());
    }

    #[test]
    fn one_stage_per_name() {
        let ledger = Ledger::default();
        ledger.stage("a").entered(1);
        ledger.clone().stage("a").entered(1);
        assert_eq!(ledger.snapshot()["a"].entered, 2);
    }

    #[test]
    fn pending_is_never_negative_under_load() {
        let stage = Stage::default();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let lost = stage.lost_reason("odd");
                    for n in 0..200_000_u64 {
                        stage.entered(1);
                        if n % 2 == 0 { stage.emitted(1) } else { lost.add(1) }
                    }
                    stop.store(true, Ordering::Relaxed);
                });
            }
            while !stop.load(Ordering::Relaxed) {
                assert!(stage.snapshot().pending() >= 0);
            }
        });
        assert_eq!(stage.snapshot().pending(), 0);
        assert_eq!(stage.snapshot().entered, 400_000);
    }
}
