//! Certificates of the connections between agents, aggregator and operator: one authority per object, and a leaf for each
//! of the three, renewed before they expire without a moment at which two ends do not trust each other.
//!
//! Data flow: what the Secrets hold, and the time ▶ [`Material::plan`] ▶ what they must hold. Nothing here does I/O.
//!
//! A new authority comes in three steps, each at least [`Policy::overlap`] after the one before:
//!
//! 1. **Announced**: its certificate joins the bundle that all ends trust; the old authority goes on signing.
//! 2. **Promoted**: every leaf is signed by it. All ends have had the bundle for the whole overlap.
//! 3. **Alone**: the old authority leaves the bundle. All ends have had their new leaf for the whole overlap.
//!
//! The overlap covers the way of a Secret into running pods (kubelet syncs about once a minute; programs read the files
//! again at each connection or every 30 s) with much room. For the steps to be safe across a crash, the authority's
//! Secret is written after those of the leaves: a step is on record only when its effect is.

mod pem;

use std::{fmt, time::Duration};

use jiff::Timestamp;

pub use self::pem::{Inspected, inspect};

/// How long certificates live.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Life of an authority.
    pub authority: Duration,
    /// Life of a leaf; it is renewed when a third is left.
    pub leaf: Duration,
    /// Time between two steps of an authority's replacement.
    pub overlap: Duration,
}

/// A certificate and its key, both PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyedCertificate {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// What the authority's Secret holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// Signs.
    pub current: KeyedCertificate,
    /// Announced, signs later.
    pub next: Option<KeyedCertificate>,
    /// Signed before; certificate only.
    pub previous: Option<String>,
    /// When the last step was taken.
    pub stepped: Timestamp,
}

/// Which end a leaf is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The aggregator: a server.
    Aggregator,
    /// Every agent: a client.
    Agent,
    /// The operator when it asks the aggregator: a client.
    Operator,
}

/// What exists, as read from the Secrets. Anything unreadable counts as absent.
#[derive(Clone, Debug, Default)]
pub struct Existing {
    /// The authority.
    pub authority: Option<Authority>,
    /// The aggregator's leaf.
    pub aggregator: Option<KeyedCertificate>,
    /// The agents' leaf.
    pub agent: Option<KeyedCertificate>,
    /// The operator's leaf.
    pub operator: Option<KeyedCertificate>,
}

/// What the Secrets must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Material {
    /// The authority.
    pub authority: Authority,
    /// The aggregator's leaf.
    pub aggregator: KeyedCertificate,
    /// The agents' leaf.
    pub agent: KeyedCertificate,
    /// The operator's leaf.
    pub operator: KeyedCertificate,
    /// What is new, for people.
    pub changes: Vec<Change>,
}

/// Something that was issued or a step that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// There was no usable authority; a new one signs from now on.
    Founded,
    /// A new authority is trusted from now on.
    Announced,
    /// The announced authority signs from now on.
    Promoted,
    /// The old authority is no longer trusted.
    Retired,
    /// A new leaf.
    Issued(Role),
}

/// A certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the {what} certificate: {source}")]
pub struct IssueError {
    /// Which one.
    pub what: &'static str,
    /// What the library said.
    #[source]
    pub source: rcgen::Error,
}

// === impl Policy ===

impl Default for Policy {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        Self {
            authority: DAY * 365,
            leaf: DAY * 90,
            overlap: DAY,
        }
    }
}

impl Policy {
    /// An authority with less than this left gets a successor: no leaf is ever to outlive the one that signed it.
    fn authority_margin(&self) -> Duration {
        self.leaf + self.overlap * 2
    }
}

// === impl KeyedCertificate ===

impl fmt::Debug for KeyedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedCertificate").finish_non_exhaustive()
    }
}

// === impl Existing ===

impl Existing {
    /// All of it, if nothing is missing; whether it is still good is not asked.
    #[must_use]
    pub fn whole(self) -> Option<Material> {
        Some(Material {
            authority: self.authority?,
            aggregator: self.aggregator?,
            agent: self.agent?,
            operator: self.operator?,
            changes: Vec::new(),
        })
    }
}

// === impl Authority ===

impl Authority {
    /// All certificates that ends trust, PEM.
    #[must_use]
    pub fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|next| next.certificate.as_str());
        [Some(self.current.certificate.as_str()), next, self.previous.as_deref()]
            .into_iter()
            .flatten()
            .map(|certificate| format!("{}\n", certificate.trim_end()))
            .collect()
    }
}

// === impl Role ===

impl Role {
    /// The name in the certificate.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aggregator => "aggregator",
            Self::Agent => "node-agent",
            Self::Operator => "operator",
        }
    }
}

// === impl Material ===

impl Material {
    /// What must exist at `now`, given what does. `server_names` are the DNS names that the aggregator answers to.
    ///
    /// # Errors
    /// [`IssueError`] when a key or certificate cannot be made.
    pub fn plan(
        existing: Existing,
        server_names: &[String],
        policy: &Policy,
        now: Timestamp,
    ) -> Result<Self, IssueError> {
        let Existing {
            authority,
            aggregator,
            agent,
            operator,
        } = existing;
        let mut changes = Vec::new();
        let authority = step(authority, policy, now, &mut changes)?;
        let mut leaf = |role, existing: Option<KeyedCertificate>| {
            let names: &[String] = if role == Role::Aggregator { server_names } else { &[] };
            match existing.filter(|leaf| is_good(leaf, role, names, &authority, policy, now)) {
                Some(leaf) => Ok(leaf),
                None => {
                    changes.push(Change::Issued(role));
                    pem::leaf(role, names, &authority.current, now, policy.leaf)
                }
            }
        };
        Ok(Self {
            aggregator: leaf(Role::Aggregator, aggregator)?,
            agent: leaf(Role::Agent, agent)?,
            operator: leaf(Role::Operator, operator)?,
            authority,
            changes,
        })
    }

    /// When the first of the leaves that are in use expires.
    #[must_use]
    pub fn first_expiry(&self) -> Option<Timestamp> {
        [&self.aggregator, &self.agent, &self.operator]
            .into_iter()
            .filter_map(|leaf| inspect(&leaf.certificate).map(|leaf| leaf.not_after))
            .min()
    }
}

/// The authority at `now`: at most one step further than before.
fn step(
    existing: Option<Authority>,
    policy: &Policy,
    now: Timestamp,
    changes: &mut Vec<Change>,
) -> Result<Authority, IssueError> {
    let usable = existing.filter(|authority| {
        inspect(&authority.current.certificate).is_some_and(|it| it.is_ca && it.left(now) > Duration::ZERO)
    });
    let Some(mut authority) = usable else {
        changes.push(Change::Founded);
        return Ok(Authority {
            current: pem::authority(now, policy.authority)?,
            next: None,
            previous: None,
            stepped: now,
        });
    };
    let waited = Duration::try_from(now.duration_since(authority.stepped)).unwrap_or_default();
    let over = waited >= policy.overlap;
    let left = inspect(&authority.current.certificate).map_or(Duration::ZERO, |it| it.left(now));
    match authority.next.take() {
        Some(next) if over => {
            changes.push(Change::Promoted);
            let old = std::mem::replace(&mut authority.current, next);
            authority.previous = Some(old.certificate);
            authority.stepped = now;
        }
        Some(next) => authority.next = Some(next),
        None if authority.previous.is_some() && over => {
            changes.push(Change::Retired);
            authority.previous = None;
            authority.stepped = now;
        }
        None if authority.previous.is_none() && left < policy.authority_margin() => {
            changes.push(Change::Announced);
            authority.next = Some(pem::authority(now, policy.authority)?);
            authority.stepped = now;
        }
        None => {}
    }
    Ok(authority)
}

/// Whether a leaf can stay in use.
fn is_good(
    leaf: &KeyedCertificate,
    role: Role,
    names: &[String],
    authority: &Authority,
    policy: &Policy,
    now: Timestamp,
) -> bool {
    let Some(it) = inspect(&leaf.certificate) else {
        return false;
    };
    it.name == role.name()
        && it.left(now) > policy.leaf / 3
        && names.iter().all(|name| it.dns_names.contains(name))
        && pem::matches_key(leaf)
        && pem::is_signed_by(&leaf.certificate, &authority.current.certificate)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
