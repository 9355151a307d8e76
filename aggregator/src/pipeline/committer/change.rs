//! Other sinks while the committer runs: what was taken before is stored for the old ones, what comes after for the new.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Committer, Outlet};
use crate::{
    config::ConversationOptions,
    pipeline::{conversations::Conversations, encode::Encoders},
    route::Plan,
    sinks::Sink,
};

/// The sinks from now on.
pub(crate) struct Change {
    /// Those without an outlet keep theirs.
    pub(crate) sinks: Vec<(Arc<Sink>, Option<Outlet>)>,
    pub(crate) plan: Plan,
    /// Whether conversations are followed, and how.
    pub(crate) conversations: Option<ConversationOptions>,
    /// Answered when it is done.
    pub(crate) done: oneshot::Sender<()>,
}

// === impl Committer ===

impl Committer {
    pub(super) fn change(&mut self, change: Change) {
        let Change {
            sinks,
            plan,
            conversations,
            done,
        } = change;
        let mut before = std::mem::take(&mut self.sinks);
        for (sink, outlet) in sinks {
            let known = before.iter().position(|(old, _)| Arc::ptr_eq(old, &sink));
            let kept = known.map(|index| before.swap_remove(index).1);
            self.retired.retain(|retired| !Arc::ptr_eq(retired, &sink));
            // The old outlet ends before the new one begins: both may write to the same place.
            let outlet = match outlet {
                None => kept,
                Some(mut outlet) => {
                    drop(kept);
                    if let Outlet::File(file) = &mut outlet {
                        file.settle();
                    }
                    Some(outlet)
                }
            };
            self.sinks.extend(outlet.map(|outlet| (sink, outlet)));
        }
        self.retired.extend(
            before
                .into_iter()
                .map(|(sink, _)| sink)
                .filter(|sink| sink.slot.is_some()),
        );
        self.plan = plan;
        match (conversations, &mut self.conversations) {
            (Some(options), Some(followed)) => followed.set(options),
            (options, followed) => *followed = options.map(Conversations::new),
        }
        self.encoders = Encoders::new();
        // Whoever asked may be gone.
        let _ = done.send(());
    }

    /// Sinks with a queue, in use or not.
    pub(super) fn queues(&self) -> impl Iterator<Item = &Arc<Sink>> {
        let in_use = self.sinks.iter().map(|(sink, _)| sink);
        in_use.chain(&self.retired).filter(|sink| sink.slot.is_some())
    }
}
