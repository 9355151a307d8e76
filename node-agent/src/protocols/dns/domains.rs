//! By which names clients know addresses: what their look-ups were answered with, for as long as an answer may be used.

use std::{hash::Hash, net::IpAddr, sync::Arc};

use ahash::RandomState;
use hashbrown::HashMap;

/// How long answers are used, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainsOptions {
    /// An answer is used for at least this long whatever its own limit: it was asked for to be used. Nanoseconds.
    pub least_ns: u64,
    /// And for at most this long. Nanoseconds.
    pub most_ns: u64,
    /// Addresses that are known at once, of all clients.
    pub max: usize,
}

impl Default for DomainsOptions {
    fn default() -> Self {
        Self {
            least_ns: 5_000_000_000,
            most_ns: 24 * 3_600 * 1_000_000_000,
            max: 65_536,
        }
    }
}

/// Names of addresses by client. `K` says whose resolver it was that asked: answers differ between clients.
///
/// Kept in two generations: when the younger is full the older goes, so that what is not asked for again leaves.
#[derive(Debug)]
pub struct Domains<K> {
    options: DomainsOptions,
    young: Generation<K>,
    old: Generation<K>,
    /// Names that are in use, so that many addresses of one name share it.
    pub(super) texts: HashMap<Arc<str>, (), RandomState>,
    forgotten: u64,
}

type Generation<K> = HashMap<(K, IpAddr), Known, RandomState>;

#[derive(Clone, Debug)]
struct Known {
    name: Arc<str>,
    /// When it was told, and until when it is used. Monotonic nanoseconds.
    from_ns: u64,
    until_ns: u64,
    /// The name before, and when that was told; used for what happened before `from_ns`.
    before: Option<(Arc<str>, u64)>,
}

// === impl Domains ===

impl<K: Copy + Eq + Hash> Domains<K> {
    /// No name known.
    #[must_use]
    pub fn new(options: DomainsOptions) -> Self {
        Self {
            options,
            young: HashMap::default(),
            old: HashMap::default(),
            texts: HashMap::default(),
            forgotten: 0,
        }
    }

    /// A look-up of `name` by `client` was answered with `ip` at `now_ns`, for `ttl_s` seconds.
    pub fn learn(&mut self, client: K, name: &str, ip: IpAddr, ttl_s: u32, now_ns: u64) {
        if name.is_empty() {
            return;
        }
        let name = self.text(name);
        let DomainsOptions { least_ns, most_ns, max } = self.options;
        let ttl_ns = (u64::from(ttl_s) * 1_000_000_000).clamp(least_ns, most_ns);
        let key = (client, ip);
        let last = self.young.remove(&key).or_else(|| self.old.remove(&key));
        let (from_ns, before) = match last {
            // Told again in time: it never was unknown.
            Some(last) if last.name == name && last.until_ns >= now_ns => (last.from_ns, last.before),
            Some(last) => (now_ns, Some((last.name, last.from_ns))),
            None => (now_ns, None),
        };
        if self.young.len() >= (max / 2).max(1) {
            let gone = std::mem::replace(&mut self.old, std::mem::take(&mut self.young));
            self.forgotten += gone.values().filter(|known| known.until_ns > now_ns).count() as u64;
            drop(gone);
            // What nobody uses any more has only the table's own reference.
            self.texts.retain(|text, ()| Arc::strong_count(text) > 1);
        }
        let known = Known {
            name,
            from_ns,
            until_ns: now_ns.saturating_add(ttl_ns),
            before,
        };
        self.young.insert(key, known);
    }

    /// The name that `client` knew `ip` by at `at_ns`.
    #[must_use]
    pub fn name(&self, client: K, ip: IpAddr, at_ns: u64) -> Option<&Arc<str>> {
        let key = (client, ip);
        let known = self.young.get(&key).or_else(|| self.old.get(&key))?;
        if at_ns >= known.from_ns {
            return (at_ns < known.until_ns).then_some(&known.name);
        }
        let (name, from_ns) = known.before.as_ref()?;
        (at_ns >= *from_ns).then_some(name)
    }

    /// Addresses known, also those whose time is over.
    #[must_use]
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// True if none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names that could still have been used and made room for others, since the last call.
    pub fn take_forgotten(&mut self) -> u64 {
        std::mem::take(&mut self.forgotten)
    }

    fn text(&mut self, name: &str) -> Arc<str> {
        if let Some((text, ())) = self.texts.get_key_value(name) {
            return Arc::clone(text);
        }
        let text: Arc<str> = name.into();
        self.texts.insert(Arc::clone(&text), ());
        text
    }
}
