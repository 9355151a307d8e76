//! Which agents there are and what they said of themselves, for the overview.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use proto::convert::{Feature, Hello};
use records::Str;
use tokio::time::Instant;

use super::IngestMetrics;

/// Nodes remembered at most.
pub(super) const MAX_NODES: usize = 10_000;
/// A node without a stream is forgotten after this time.
pub(super) const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// All nodes that were heard lately.
#[derive(Debug)]
pub(super) struct Nodes {
    started: Instant,
    max_nodes: usize,
    known: Mutex<HashMap<Str, Arc<Node>>>,
    metrics: IngestMetrics,
}

/// One node.
#[derive(Debug)]
struct Node {
    records: AtomicU64,
    /// Milliseconds from [`Nodes::started`].
    last_seen: AtomicU64,
    generation: AtomicI64,
    session: Mutex<Session>,
}

/// What belongs to the latest stream of a node.
#[derive(Debug)]
struct Session {
    boot_id: u64,
    agent_version: Str,
    /// Open streams; an agent that was replaced may still have one.
    streams: u32,
    features: Arc<[Feature]>,
}

/// An open stream of a node; dropping it says that the stream ended.
#[derive(Debug)]
pub(super) struct Presence {
    nodes: Arc<Nodes>,
    node: Arc<Node>,
    boot_id: u64,
}

/// One node as known now.
#[derive(Debug)]
pub(super) struct NodeView {
    pub(super) name: Str,
    pub(super) agent_version: Str,
    pub(super) boot_id: u64,
    pub(super) connected: bool,
    /// Time since its last message.
    pub(super) silent: Duration,
    pub(super) generation: i64,
    pub(super) features: Arc<[Feature]>,
    pub(super) records: u64,
}

/// All nodes, counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeCounts {
    pub(super) known: usize,
    pub(super) connected: usize,
    /// Since start.
    pub(super) forgotten: u64,
}

// === impl Nodes ===

impl Nodes {
    pub(super) fn new(max_nodes: usize, metrics: IngestMetrics) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            max_nodes,
            known: Mutex::default(),
            metrics,
        })
    }

    /// A stream of this agent start was opened. Its node is forgotten at once when there is no room for it.
    pub(super) fn arrived(self: &Arc<Self>, hello: &Hello) -> Presence {
        let mut known = self.known.lock();
        self.forget(&mut known);
        let node = match known.get(&hello.node) {
            Some(node) => Arc::clone(node),
            None => {
                let node = Arc::new(Node {
                    records: AtomicU64::new(0),
                    last_seen: AtomicU64::new(0),
                    generation: AtomicI64::new(0),
                    session: Mutex::new(Session {
                        boot_id: hello.boot_id,
                        agent_version: hello.agent_version.clone(),
                        streams: 0,
                        features: Arc::default(),
                    }),
                });
                if known.len() >= self.max_nodes && !self.make_room(&mut known) {
                    self.metrics.node_forgotten("no_room");
                } else {
                    known.insert(hello.node.clone(), Arc::clone(&node));
                }
                node
            }
        };
        {
            let mut session = node.session.lock();
            session.streams += 1;
            session.agent_version = hello.agent_version.clone();
            if session.boot_id != hello.boot_id {
                // What another start of the agent said does not hold for this one.
                session.boot_id = hello.boot_id;
                session.features = Arc::default();
                node.generation.store(0, Ordering::Relaxed);
            }
        }
        drop(known);
        let presence = Presence {
            nodes: Arc::clone(self),
            node,
            boot_id: hello.boot_id,
        };
        presence.heard();
        presence
    }

    /// Up to `max` nodes whose names come after `after`, in the order of their names, and whether more follow.
    pub(super) fn page(&self, after: &str, max: usize) -> (Vec<NodeView>, bool) {
        let now = self.now_ms();
        let mut nodes: Vec<(Str, Arc<Node>)> = {
            let mut known = self.known.lock();
            self.forget(&mut known);
            let later = known.iter().filter(|(name, _)| &***name > after);
            later.map(|(name, node)| (name.clone(), Arc::clone(node))).collect()
        };
        nodes.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let more = nodes.len() > max;
        let view = |(name, node): (Str, Arc<Node>)| {
            let session = node.session.lock();
            NodeView {
                name,
                agent_version: session.agent_version.clone(),
                boot_id: session.boot_id,
                connected: session.streams > 0,
                silent: Duration::from_millis(now.saturating_sub(node.last_seen.load(Ordering::Relaxed))),
                generation: node.generation.load(Ordering::Relaxed),
                features: Arc::clone(&session.features),
                records: node.records.load(Ordering::Relaxed),
            }
        };
        (nodes.into_iter().take(max).map(view).collect(), more)
    }

    pub(super) fn counts(&self) -> NodeCounts {
        let mut known = self.known.lock();
        self.forget(&mut known);
        NodeCounts {
            known: known.len(),
            connected: known.values().filter(|node| node.session.lock().streams > 0).count(),
            forgotten: self.metrics.nodes_forgotten(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Forgets nodes that have been away for long.
    fn forget(&self, known: &mut HashMap<Str, Arc<Node>>) {
        let now = self.now_ms();
        known.retain(|_, node| {
            let silent = now.saturating_sub(node.last_seen.load(Ordering::Relaxed));
            let keep = u128::from(silent) < FORGET_AFTER.as_millis() || node.session.lock().streams > 0;
            if !keep {
                self.metrics.node_forgotten("disconnected");
            }
            keep
        });
    }

    /// Forgets the disconnected node that was silent the longest; false if all are connected.
    fn make_room(&self, known: &mut HashMap<Str, Arc<Node>>) -> bool {
        let away = known.iter().filter(|(_, node)| node.session.lock().streams == 0);
        let oldest = away.min_by_key(|(_, node)| node.last_seen.load(Ordering::Relaxed));
        let Some(name) = oldest.map(|(name, _)| name.clone()) else {
            return false;
        };
        known.remove(&name);
        self.metrics.node_forgotten("no_room");
        true
    }
}

// === impl Presence ===

impl Presence {
    /// A message came.
    pub(super) fn heard(&self) {
        self.node.last_seen.fetch_max(self.nodes.now_ms(), Ordering::Relaxed);
    }

    /// Records were stored.
    pub(super) fn stored(&self, records: u64) {
        self.node.records.fetch_add(records, Ordering::Relaxed);
    }

    /// The agent said what it can see.
    pub(super) fn capabilities(&self, features: Vec<Feature>) {
        let mut session = self.node.session.lock();
        // A stream of an older start has nothing to say any more.
        if session.boot_id == self.boot_id {
            session.features = features.into();
        }
    }

    /// The agent said which configuration it runs.
    pub(super) fn generation(&self, generation: i64) {
        let session = self.node.session.lock();
        if session.boot_id == self.boot_id {
            self.node.generation.store(generation, Ordering::Relaxed);
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.heard();
        let mut session = self.node.session.lock();
        session.streams = session.streams.saturating_sub(1);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use proto::convert::FeatureState;
    use tokio::time::advance;

    use super::*;

    fn hello(node: &str, boot_id: u64) -> Hello {
        Hello {
            node: node.into(),
            boot_id,
            agent_version: "1".into(),
            globals: Arc::default(),
        }
    }

    fn names(nodes: &Nodes, after: &str, max: usize) -> (Vec<String>, bool) {
        let (page, more) = nodes.page(after, max);
        (page.into_iter().map(|node| node.name.to_string()).collect(), more)
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_away_for_an_hour_is_forgotten_and_one_with_a_stream_is_not() {
        let nodes = Nodes::new(10, IngestMetrics::default());
        let stays = nodes.arrived(&hello("stays", 1));
        drop(nodes.arrived(&hello("goes", 2)));
        advance(FORGET_AFTER - Duration::from_millis(1)).await;
        assert_eq!(
            names(&nodes, "", 10),
            (vec!["goes".to_owned(), "stays".to_owned()], false)
        );
        advance(Duration::from_millis(1)).await;
        assert_eq!(names(&nodes, "", 10), (vec!["stays".to_owned()], false));
        let counts = nodes.counts();
        assert_eq!((counts.known, counts.connected, counts.forgotten), (1, 1, 1));
        assert_eq!(nodes.page("", 1).0[0].silent, FORGET_AFTER);
        drop(stays);
    }

    #[tokio::test(start_paused = true)]
    async fn without_room_the_longest_away_goes_and_never_a_connected_one() {
        let nodes = Nodes::new(2, IngestMetrics::default());
        drop(nodes.arrived(&hello("older", 1)));
        advance(Duration::from_secs(1)).await;
        drop(nodes.arrived(&hello("newer", 1)));
        let third = nodes.arrived(&hello("third", 1));
        assert_eq!(names(&nodes, "", 10).0, ["newer", "third"]);
        let fourth = nodes.arrived(&hello("fourth", 1));
        assert_eq!(names(&nodes, "", 10).0, ["fourth", "third"]);
        // Both are connected: the fifth is served, but not remembered.
        let fifth = nodes.arrived(&hello("fifth", 1));
        fifth.stored(1);
        assert_eq!(names(&nodes, "", 10).0, ["fourth", "third"]);
        assert_eq!(nodes.counts().forgotten, 3);
        drop((third, fourth, fifth));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_start_of_the_agent_says_all_anew_and_the_old_one_nothing_more() {
        let feature = Feature {
            name: "ebpf-net/tcp".into(),
            state: FeatureState::On,
            reason: "".into(),
        };
        let nodes = Nodes::new(10, IngestMetrics::default());
        let old = nodes.arrived(&hello("n", 1));
        old.capabilities(vec![feature.clone()]);
        old.generation(4);
        old.stored(3);
        let new = nodes.arrived(&hello("n", 2));
        old.capabilities(vec![feature]);
        old.generation(5);
        drop(old);
        let node = nodes.page("", 1).0.remove(0);
        assert_eq!(
            (node.boot_id, node.connected, node.generation, node.records),
            (2, true, 0, 3)
        );
        assert!(node.features.is_empty());
        drop(new);
        assert!(!nodes.page("", 1).0[0].connected);
    }

    #[test]
    fn pages_follow_the_order_of_names() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let nodes = Nodes::new(10, IngestMetrics::default());
        for name in ["c", "a", "b"] {
            drop(nodes.arrived(&hello(name, 1)));
        }
        assert_eq!(names(&nodes, "", 2), (vec!["a".to_owned(), "b".to_owned()], true));
        assert_eq!(names(&nodes, "b", 2), (vec!["c".to_owned()], false));
        assert_eq!(names(&nodes, "c", 2), (Vec::new(), false));
    }
}
