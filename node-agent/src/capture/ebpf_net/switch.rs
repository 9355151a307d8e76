//! What a running capture does when something is switched on or off.

use std::sync::Arc;

use api::collector::EbpfCollectorSpec;
use ebpf_common::net::policy;
use tokio::sync::watch;

use super::{NetCapture, owners::Cgroups};
use crate::{
    capture::policy::{Keeper, PolicyMetrics, Sharing, Switched, Switches},
    ebpf::{
        capability::State,
        net::{self, NetObject},
    },
    identity::k8s::Names,
};

/// The cluster's part in a capture.
#[derive(Clone, Debug)]
pub struct InCluster {
    /// Names of ends.
    pub names: Names,
    /// The object: what is on for which namespace.
    pub spec: watch::Receiver<Arc<EbpfCollectorSpec>>,
}

/// What is on for whom, in a cluster.
#[derive(Debug)]
pub(super) struct Policy {
    names: Names,
    told: watch::Receiver<Switches>,
    now: Switches,
    metrics: PolicyMetrics,
    /// Until somebody runs it.
    pub keeper: Option<Keeper>,
}

impl Policy {
    /// Fills the kernel's map.
    pub(super) fn start(
        cluster: InCluster,
        object: &NetObject,
        sharing: Sharing,
        metrics: PolicyMetrics,
    ) -> anyhow::Result<Self> {
        let InCluster { names, spec } = cluster;
        let map = object.map("POLICY")?.try_clone_to_owned()?;
        let (keeper, mut told) = Keeper::start(map, names.clone(), spec, sharing, policy::NETFLOW, metrics.clone());
        let now = told.borrow_and_update().clone();
        Ok(Self {
            names,
            told,
            now,
            metrics,
            keeper: Some(keeper),
        })
    }

    /// What is on.
    pub(super) const fn switches(&self) -> &Switches {
        &self.now
    }

    /// Processes in pods of this node, with their cgroups.
    pub(super) fn cgroups(&self) -> Cgroups {
        self.names.processes(|uid| self.names.is_local(uid) != Some(false))
    }

    /// Whether the sockets of a process are to be adopted: `netflow` is on for it, and with `switched`, was off before.
    pub(super) fn adopts(&self, pid: u32, cgroups: &Cgroups, switched: Option<&Switched>) -> bool {
        match cgroups.get(&pid).and_then(|id| self.names.pod_of_cgroup(*id)) {
            Some(uid) => match switched {
                Some(switched) => switched.on.contains(&uid),
                None => !self.now.off.contains(&uid),
            },
            None => match switched {
                Some(switched) => switched.host == Some(true),
                None => self.now.host & policy::NETFLOW != 0,
            },
        }
    }
}

impl NetCapture {
    /// Takes over what was switched on or off since the last call; true if rows are to be sent at once, for they are the
    /// last ones of somebody.
    pub(super) fn follow_switches(&mut self) -> bool {
        let Some(policy) = self
            .policy
            .as_mut()
            .filter(|policy| policy.told.has_changed().unwrap_or(false))
        else {
            return false;
        };
        let new = policy.told.borrow_and_update().clone();
        let switched = Switched::between(&policy.now, &new);
        policy.now = new;
        self.guarded("switches", Self::write_switches);
        let last = !switched.off.is_empty() || switched.host == Some(false);
        if last {
            // However young: there is no later look at these connections.
            let settle = self.tracker.sample_all();
            self.guarded("sample", Self::end_interval);
            self.tracker.settle(settle);
        }
        self.leave_out();
        if last || !switched.new_off.is_empty() {
            match self.tracker.evict(&mut self.object, self.rows.ends()) {
                Ok(evicted) if !last => {
                    if let Some(policy) = &self.policy {
                        policy.metrics.late.inc_by(evicted);
                    }
                }
                Ok(_) => {}
                Err(error) => tracing::error!(error = format!("{error:#}"), "Cannot drop what is switched off"),
            }
        }
        if (!switched.on.is_empty() || switched.host == Some(true))
            && let Err(error) = self.adopt(&switched)
        {
            tracing::error!(
                error = format!("{error:#}"),
                "Cannot adopt connections of what was switched on"
            );
        }
        tracing::info!(
            off = switched.off.len(),
            on = switched.on.len(),
            host = ?switched.host,
            "Switched pods"
        );
        last
    }

    /// Hands the defaults to the kernel side.
    pub(super) fn write_switches(&mut self) -> anyhow::Result<()> {
        let Some(policy) = &self.policy else { return Ok(()) };
        policy.now.write_to(&mut self.kernel);
        self.object.set_config(self.kernel)
    }

    /// From now on contributions of what is off are left out.
    pub(super) fn leave_out(&mut self) {
        if let Some(policy) = &self.policy {
            let Switches { host, off, .. } = &policy.now;
            self.rows.ends().leave_out(Arc::clone(off), host & policy::NETFLOW == 0);
        }
    }

    /// Takes over whether flows are looked up in connection tracking, and whose.
    pub(super) fn follow_nat(&mut self) {
        let nat = self.nat.borrow().clone();
        self.kernel.keep_local_port = u32::from(nat.is_some());
        let (off, host_off) = self
            .policy
            .as_ref()
            .map(Policy::switches)
            .map_or_else(Default::default, |it| (Arc::clone(&it.nat_off), it.host_nat_off));
        self.rows.ends().translate(nat, off, host_off);
    }

    /// Adopts what was open while its owner was off; counting begins now.
    fn adopt(&mut self, switched: &Switched) -> anyhow::Result<()> {
        let Some(policy) = &self.policy else { return Ok(()) };
        if self.capabilities.state(net::TCP_OLDER) == State::Off {
            return Ok(());
        }
        let cgroups = policy.cgroups();
        let wanted = |pid| policy.adopts(pid, &cgroups, Some(switched));
        let report = self
            .owners
            .adopt_all(&mut self.object, &self.proc, &mut self.flows, &cgroups, &wanted)?;
        tracing::info!(
            connections = report.connections,
            "Adopted connections of what was switched on"
        );
        Ok(())
    }
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
