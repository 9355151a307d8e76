//! Pods by uid and by address, small.

use std::net::IpAddr;

use ahash::RandomState;
use hashbrown::{HashMap, HashTable};

use super::PodEntry;
use crate::identity::cgroup::Uid;

/// Pods by uid; the uid is in the entry, a table slot is one word.
#[derive(Debug, Default)]
pub(super) struct Pods {
    table: HashTable<Box<PodEntry>>,
    hasher: RandomState,
}

impl Pods {
    pub(super) fn get(&self, uid: Uid) -> Option<&PodEntry> {
        let found = self.table.find(self.hasher.hash_one(uid), |pod| pod.uid == uid);
        found.map(|pod| &**pod)
    }

    pub(super) fn get_mut(&mut self, uid: Uid) -> Option<&mut PodEntry> {
        let hash = self.hasher.hash_one(uid);
        self.table.find_mut(hash, |pod| pod.uid == uid).map(|pod| &mut **pod)
    }

    /// Its uid must not be there yet.
    pub(super) fn insert(&mut self, pod: PodEntry) {
        let hasher = &self.hasher;
        let hash = hasher.hash_one(pod.uid);
        self.table
            .insert_unique(hash, Box::new(pod), |pod| hasher.hash_one(pod.uid));
    }

    pub(super) fn remove(&mut self, uid: Uid) -> Option<Box<PodEntry>> {
        let hash = self.hasher.hash_one(uid);
        let found = self.table.find_entry(hash, |pod| pod.uid == uid).ok()?;
        Some(found.remove().0)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &PodEntry> {
        self.table.iter().map(|pod| &**pod)
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }
}

/// Holders of each address, the latest last. Nearly every address has one; the others have a table of their own.
#[derive(Debug, Default)]
pub(super) struct Holders {
    one: HashMap<IpAddr, Uid, RandomState>,
    more: HashMap<IpAddr, Vec<Uid>, RandomState>,
}

impl Holders {
    pub(super) fn of(&self, ip: IpAddr) -> &[Uid] {
        let one = || self.one.get(&ip).map_or(&[][..], std::slice::from_ref);
        self.more.get(&ip).map_or_else(one, Vec::as_slice)
    }

    pub(super) fn add(&mut self, ip: IpAddr, uid: Uid) {
        if let Some(uids) = self.more.get_mut(&ip) {
            uids.retain(|it| *it != uid);
            uids.push(uid);
        } else if let Some(one) = self.one.insert(ip, uid)
            && one != uid
        {
            self.one.remove(&ip);
            self.more.insert(ip, vec![one, uid]);
        }
    }

    pub(super) fn remove(&mut self, ip: IpAddr, uid: Uid) {
        if let Some(uids) = self.more.get_mut(&ip) {
            uids.retain(|it| *it != uid);
            if let [one] = *uids.as_slice() {
                self.more.remove(&ip);
                self.one.insert(ip, one);
            }
        } else if self.one.get(&ip) == Some(&uid) {
            self.one.remove(&ip);
        }
    }
}
