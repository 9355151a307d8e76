//! Why not all is known, as the capability vector says it. Pure.

use super::CONNTRACK;
use crate::ebpf::capability::Capabilities;

/// Why not all is known.
#[derive(Debug, Default)]
pub(super) struct Limits {
    /// The node's namespace is not heard of.
    pub(super) node_unknown: bool,
    /// The kernel is told to tell nothing.
    pub(super) silent: bool,
    /// Why namespaces other than the agent's own are not heard of.
    pub(super) deaf: Option<String>,
    /// Processes may not be looked at.
    pub(super) refused: bool,
    /// Why what is older than the agent is not known in some namespace.
    pub(super) undumped: Option<String>,
    /// Why a namespace has no number.
    pub(super) unnumbered: Option<String>,
    /// There are more namespaces than are followed.
    pub(super) crowded: bool,
    /// Namespaces cannot be entered: what is there already is read from `/proc`.
    pub(super) locked_out: bool,
}

impl Limits {
    /// The feature's standing.
    pub(super) fn capabilities(&self) -> Capabilities {
        let Self {
            node_unknown,
            silent,
            deaf,
            refused,
            undumped,
            unnumbered,
            crowded,
            locked_out,
        } = self;
        let mut reasons = Vec::new();
        let mut add = |holds: bool, reason: &str| {
            if holds {
                reasons.push(reason.to_owned());
            }
        };
        add(*node_unknown, "the node's network namespace is not heard of");
        add(
            *silent,
            "net.netfilter.nf_conntrack_events is 0, set it to 1: only connections that last are found",
        );
        add(
            *refused,
            "processes refused a look at their network namespace; it takes CAP_SYS_PTRACE",
        );
        add(*crowded, "there are more network namespaces than are followed");
        if let Some(why) = deaf {
            reasons.push(format!("only the agent's own network namespace is heard of; {why}"));
        }
        if let Some(why) = unnumbered {
            reasons.push(format!("a network namespace got no number: {why}"));
        }
        if let Some(why) = undumped {
            reasons.push(format!(
                "connections of other network namespaces that are older than the agent are not known: {why}; it takes \
                 CAP_SYS_ADMIN, or CAP_DAC_READ_SEARCH and CONFIG_NF_CONNTRACK_PROCFS"
            ));
        }
        let hook = match (deaf.is_some(), locked_out) {
            (true, _) => "ctnetlink in the agent's network namespace",
            (false, false) => "ctnetlink in every network namespace",
            (false, true) => "ctnetlink; other network namespaces' older connections from /proc",
        };
        let mut capabilities = Capabilities::default();
        if reasons.is_empty() {
            capabilities.on(CONNTRACK, hook);
        } else {
            capabilities.degraded(CONNTRACK, hook, reasons.join("; "));
        }
        capabilities
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::*;
    use crate::ebpf::capability::State;

    #[test]
    fn every_limit_is_told() {
        let all = Limits {
            node_unknown: true,
            silent: true,
            deaf: Some("it takes CAP_NET_BROADCAST".to_owned()),
            refused: true,
            undumped: Some("No such file".to_owned()),
            unnumbered: Some("refused".to_owned()),
            crowded: true,
            locked_out: false,
        };
        let told = &all.capabilities().features[0];
        assert_eq!(told.state, State::Degraded);
        for part in [
            "node's network",
            "nf_conntrack_events",
            "CAP_NET_BROADCAST",
            "CAP_SYS_PTRACE",
            "No such file",
            "CAP_SYS_ADMIN",
            "no number: refused",
            "more network namespaces",
        ] {
            assert!(told.reason.contains(part), "{part}: {}", told.reason);
        }
        // Not entering is no limit where the text serves.
        let from_text = Limits {
            locked_out: true,
            ..Limits::default()
        };
        let told = &from_text.capabilities().features[0];
        assert_eq!((told.state, told.reason.as_str()), (State::On, ""));
        assert!(told.hook.contains("/proc"), "{}", told.hook);
    }
}
