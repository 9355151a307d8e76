//! Labels of pods and workloads that become tags.
//!
//! Nothing is kept unless labels are wanted.

use std::sync::Arc;

use ahash::RandomState;
use hashbrown::HashMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use records::Str;

use super::Kind;
use crate::identity::cgroup::Uid;

/// Tags made of the labels of one object.
type Tags = Arc<[(Str, Str)]>;

/// Labels of all objects, by uid.
#[derive(Debug, Default)]
pub(super) struct Labels {
    /// Names of labels and of the tags made of them.
    wanted: Vec<(String, Str)>,
    pods: HashMap<Uid, Tags, RandomState>,
    /// Replica sets and jobs.
    owners: HashMap<Uid, Tags, RandomState>,
    /// Deployments, stateful sets, daemon sets, cron jobs: with their kind and the list they were seen in.
    workloads: HashMap<Uid, (Kind, u32, Tags), RandomState>,
}

impl Labels {
    pub(super) fn want(&mut self, wanted: &[(String, String)]) {
        *self = Self::default();
        self.wanted = wanted
            .iter()
            .map(|(label, tag)| (label.clone(), tag.as_str().into()))
            .collect();
    }

    fn tags(&self, meta: &ObjectMeta) -> Option<Tags> {
        let labels = meta.labels.as_ref()?;
        let tags = self.wanted.iter().filter_map(|(label, tag)| {
            let value = labels.get(label).filter(|value| !value.is_empty())?;
            Some((tag.clone(), value.as_str().into()))
        });
        let tags: Vec<_> = tags.collect();
        (!tags.is_empty()).then(|| tags.into())
    }

    pub(super) fn set_pod(&mut self, uid: Uid, meta: &ObjectMeta) {
        match self.tags(meta) {
            Some(tags) => drop(self.pods.insert(uid, tags)),
            None => self.remove_pod(uid),
        }
    }

    pub(super) fn remove_pod(&mut self, uid: Uid) {
        self.pods.remove(&uid);
    }

    pub(super) fn set_owner(&mut self, uid: Uid, meta: &ObjectMeta) {
        match self.tags(meta) {
            Some(tags) => drop(self.owners.insert(uid, tags)),
            None => self.remove_owner(uid),
        }
    }

    pub(super) fn remove_owner(&mut self, uid: Uid) {
        self.owners.remove(&uid);
    }

    pub(super) fn set_workload(&mut self, uid: Uid, kind: Kind, list: u32, meta: &ObjectMeta) {
        match self.tags(meta) {
            Some(tags) => drop(self.workloads.insert(uid, (kind, list, tags))),
            None => self.remove_workload(uid),
        }
    }

    pub(super) fn remove_workload(&mut self, uid: Uid) {
        self.workloads.remove(&uid);
    }

    /// What of a kind was not in its latest list is gone.
    pub(super) fn end_list(&mut self, kind: Kind, list: u32) {
        self.workloads.retain(|_, (of, seen, _)| *of != kind || *seen == list);
    }

    /// Tags of a pod: its workload's labels go before those of what is between them, and these before its own.
    pub(super) fn of(&self, pod: Uid, owner: Option<Uid>, parent: Option<Uid>) -> Tags {
        if self.wanted.is_empty() {
            return Tags::default();
        }
        let workload = |uid: Option<Uid>| uid.and_then(|uid| self.workloads.get(&uid)).map(|(_, _, tags)| tags);
        let between = owner.and_then(|uid| self.owners.get(&uid));
        let all = [workload(parent), workload(owner), between, self.pods.get(&pod)];
        let mut all = all.into_iter().flatten();
        let Some(first) = all.next() else {
            return Tags::default();
        };
        let rest: Vec<&Tags> = all.collect();
        if rest.is_empty() {
            return Arc::clone(first);
        }
        let mut tags = first.to_vec();
        for (tag, value) in rest.into_iter().flat_map(|tags| tags.iter()) {
            if !tags.iter().any(|(known, _)| known == tag) {
                tags.push((tag.clone(), value.clone()));
            }
        }
        tags.into()
    }
}
