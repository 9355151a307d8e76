//! The ledger: every hand-off counts what entered, what it passed on, what it left out and why, what it lost and why.
//!
//! Invariant, once a stage is quiescent (`pending == 0`): `entered = emitted + sum(skipped) + sum(lost)`.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::RwLock;

/// All stages of one process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    stages: Arc<RwLock<BTreeMap<&'static str, Stage>>>,
}

/// Counters of one hand-off. Cheap to clone; all methods are lock-free except the first use of a reason.
#[derive(Clone, Debug, Default)]
pub struct Stage {
    inner: Arc<StageInner>,
}

#[derive(Debug, Default)]
struct StageInner {
    entered: std::sync::atomic::AtomicU64,
    emitted: std::sync::atomic::AtomicU64,
    skipped: RwLock<BTreeMap<&'static str, u64>>,
    lost: RwLock<BTreeMap<&'static str, u64>>,
}

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
        self.stages.read().iter().map(|(name, stage)| (*name, stage.snapshot())).collect()
    }
}

// === impl Stage ===

impl Stage {
    /// Counts items taken in.
    pub fn entered(&self, n: u64) {
        self.inner.entered.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
    }

    /// Counts items handed on.
    pub fn emitted(&self, n: u64) {
        self.inner.emitted.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
    }

    /// Counts items left out on purpose. Reasons are a small fixed set of snake_case words.
    pub fn skipped(&self, reason: &'static str, n: u64) {
        if n > 0 {
            *self.inner.skipped.write().entry(reason).or_default() += n;
        }
    }

    /// Counts items lost. Reasons are a small fixed set of snake_case words.
    pub fn lost(&self, reason: &'static str, n: u64) {
        if n > 0 {
            *self.inner.lost.write().entry(reason).or_default() += n;
        }
    }

    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> StageSnapshot {
        StageSnapshot {
            entered: self.inner.entered.load(std::sync::atomic::Ordering::Relaxed),
            emitted: self.inner.emitted.load(std::sync::atomic::Ordering::Relaxed),
            skipped: self.inner.skipped.read().clone(),
            lost: self.inner.lost.read().clone(),
        }
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
