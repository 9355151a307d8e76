//! Leadership through a Lease: the requests around [`crate::lease`].
//!
//! Data flow: Lease ▶ [`Elector`] ▶ write with the version that was read as precondition, so of two that write at once one
//! is refused. Entry: [`Leadership::round`], again after the time that it returns.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{Api, Client, ResourceExt as _, api::PostParams};

use crate::{
    cluster::{ClusterError, failed},
    lease::{self, Claim, Decision, Elector},
    names,
};

/// Name of the Lease.
pub const LEASE: &str = names::FIELD_MANAGER;
/// Pause after a write that another one was faster with, or that succeeded.
const AGAIN: Duration = Duration::from_secs(1);

/// One candidate.
pub struct Leadership {
    api: Api<Lease>,
    identity: String,
    elector: Elector,
    started: Instant,
}

// === impl Leadership ===

impl Leadership {
    /// A candidate for the Lease in `namespace`; `identity` (the pod's name) is unique.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            identity: identity.to_owned(),
            elector: Elector::new(identity),
            started: Instant::now(),
        }
    }

    /// Whether we may work now.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.elector.is_leader(self.started.elapsed())
    }

    /// Reads the Lease and writes it if it is ours to write; returns when to look again.
    ///
    /// # Errors
    /// [`ClusterError`] when a request failed for another reason than a faster candidate.
    pub async fn round(&mut self) -> Result<Duration, ClusterError> {
        let live = self.api.get_opt(LEASE).await.map_err(failed("read", "Lease", LEASE))?;
        let began = self.started.elapsed();
        match self.elector.decide(live.as_ref().map(claim).as_ref(), began) {
            Decision::Wait(pause) => Ok(pause),
            Decision::Acquire | Decision::Renew => {
                if self.write(live, Some(&self.identity)).await? {
                    self.elector.written(began);
                }
                Ok(AGAIN)
            }
        }
    }

    /// Gives the Lease back, so that another candidate need not wait. Only if it is ours.
    ///
    /// # Errors
    /// [`ClusterError`] when a request failed.
    pub async fn release(self) -> Result<(), ClusterError> {
        let live = self.api.get_opt(LEASE).await.map_err(failed("read", "Lease", LEASE))?;
        if live.as_ref().is_some_and(|live| claim(live).holder == self.identity) {
            self.write(live, None).await?;
        }
        Ok(())
    }

    /// Whether it was written: false if another candidate was faster.
    async fn write(&self, live: Option<Lease>, holder: Option<&str>) -> Result<bool, ClusterError> {
        let now = MicroTime(Timestamp::now());
        let former = live.as_ref().and_then(|live| live.spec.clone()).unwrap_or_default();
        let stays = former.holder_identity.as_deref() == holder;
        let spec = LeaseSpec {
            holder_identity: Some(holder.unwrap_or_default().to_owned()),
            lease_duration_seconds: i32::try_from(lease::DURATION.as_secs()).ok(),
            renew_time: Some(now.clone()),
            acquire_time: former.acquire_time.filter(|_| stays).or(Some(now)),
            lease_transitions: Some(
                former
                    .lease_transitions
                    .unwrap_or_default()
                    .saturating_add(i32::from(!stays)),
            ),
            ..LeaseSpec::default()
        };
        let result = match live {
            // With the version that was read in its metadata: the precondition.
            Some(mut lease) => {
                lease.spec = Some(spec);
                self.api.replace(LEASE, &PostParams::default(), &lease).await
            }
            None => {
                let mut lease = Lease {
                    spec: Some(spec),
                    ..Lease::default()
                };
                lease.metadata.name = Some(LEASE.to_owned());
                self.api.create(&PostParams::default(), &lease).await
            }
        };
        match result {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(failed("write", "Lease", LEASE)(error)),
        }
    }
}

fn claim(lease: &Lease) -> Claim {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec
        .lease_duration_seconds
        .and_then(|seconds| u64::try_from(seconds).ok());
    Claim {
        holder: spec.holder_identity.unwrap_or_default(),
        resource_version: lease.resource_version().unwrap_or_default(),
        duration: seconds.map_or(lease::DURATION, Duration::from_secs),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cluster::tests::FakeServer;

    fn candidate(server: &FakeServer, name: &str) -> Leadership {
        Leadership::new(server.client(), "observe", name)
    }

    #[tokio::test]
    async fn one_of_two_leads_until_it_gives_the_lease_back() {
        let server = FakeServer::default();
        let (mut a, mut b) = (candidate(&server, "a"), candidate(&server, "b"));
        a.round().await.unwrap();
        b.round().await.unwrap();
        assert_eq!((a.is_leader(), b.is_leader()), (true, false));
        a.release().await.unwrap();
        b.round().await.unwrap();
        assert!(b.is_leader());
    }

    #[tokio::test]
    async fn a_write_over_what_another_wrote_is_refused() {
        let server = FakeServer::default();
        let (mut a, b) = (candidate(&server, "a"), candidate(&server, "b"));
        a.round().await.unwrap();
        let read = b.api.get(LEASE).await.unwrap();
        assert!(a.write(Some(read.clone()), Some("a")).await.unwrap());
        assert!(!b.write(Some(read), Some("b")).await.unwrap());
        assert!(!b.write(None, Some("b")).await.unwrap());
        assert_eq!(claim(&b.api.get(LEASE).await.unwrap()).holder, "a");
    }
}
