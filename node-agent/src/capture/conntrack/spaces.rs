//! Which network namespaces are heard of. Pure.
//!
//! The kernel names them in two ways: by inode number (captures, `/proc`) and by a number that the agent's namespace has for
//! them (events). Both are used again when a namespace is gone; a [`Space`] is not.

use std::collections::VecDeque;

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};

use super::{
    socket::From,
    table::{LINGER_NS, Space},
};

/// Namespaces at most.
const SPACES_MAX: usize = 4096;
/// Numbers of namespaces without a process that are remembered.
const STRANGERS_MAX: usize = 1024;

/// The agent's own.
pub(super) const OWN: Space = Space(0);

/// The namespaces that are heard of.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    by_nsid: HashMap<i32, (Space, u32), RandomState>,
    /// By inode number; one that is gone stays for a while.
    by_inode: HashMap<u32, Space, RandomState>,
    leaving: VecDeque<(u64, u32, Space)>,
    /// Numbers that no process's namespace has.
    strangers: HashSet<i32, RandomState>,
    /// Heard of since the last look for namespaces.
    unknown: HashSet<i32, RandomState>,
    last: u32,
}

impl Spaces {
    /// The agent's own alone.
    pub(super) fn new(own_inode: u32) -> Self {
        let mut this = Self::default();
        this.by_inode.insert(own_inode, OWN);
        this
    }

    /// Where an event comes from; remembers what is not known.
    pub(super) fn of(&mut self, from: From) -> Option<Space> {
        let nsid = match from {
            From::Own => return Some(OWN),
            From::Nsid(nsid) => nsid,
        };
        let found = self.by_nsid.get(&nsid).map(|(space, _)| *space);
        if found.is_none() && self.unknown.len() < STRANGERS_MAX && !self.strangers.contains(&nsid) {
            self.unknown.insert(nsid);
        }
        found
    }

    /// True if a namespace was heard of that might be found by looking.
    pub(super) fn wants_a_look(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// A look is over: what is not found by now has no process.
    pub(super) fn looked(&mut self) {
        if self.strangers.len() >= STRANGERS_MAX {
            self.strangers.clear();
        }
        let by_nsid = &self.by_nsid;
        self.strangers
            .extend(self.unknown.drain().filter(|nsid| !by_nsid.contains_key(nsid)));
    }

    /// The namespace of an inode number.
    pub(super) fn of_inode(&self, inode: u32) -> Option<Space> {
        self.by_inode.get(&inode).copied()
    }

    /// The same, if it is still heard of.
    pub(super) fn live(&self, inode: u32) -> Option<Space> {
        let space = self.of_inode(inode)?;
        (!self.leaving.iter().any(|(_, _, leaving)| *leaving == space)).then_some(space)
    }

    /// True if no more can be followed.
    pub(super) fn is_full(&self) -> bool {
        self.by_inode.len() >= SPACES_MAX
    }

    /// A namespace that was found. Gives also the one that had its number before, which must be gone.
    pub(super) fn found(&mut self, inode: u32, nsid: i32) -> (Space, Option<Space>) {
        self.last = self.last.wrapping_add(1).max(1);
        let space = Space(self.last);
        let before = self.by_nsid.insert(nsid, (space, inode)).map(|(space, _)| space);
        self.by_inode.insert(inode, space);
        (space, before)
    }

    /// It could not be looked at: to be found again.
    pub(super) fn unfound(&mut self, space: Space) {
        self.by_nsid.retain(|_, (other, _)| *other != space);
        self.by_inode.retain(|_, other| *other != space);
    }

    /// A number was given to a namespace.
    pub(super) fn numbered(&mut self, nsid: i32) {
        self.strangers.remove(&nsid);
    }

    /// A number was taken from a namespace; gives the one that is gone.
    pub(super) fn gone(&mut self, nsid: i32, now: u64) -> Option<Space> {
        self.strangers.remove(&nsid);
        let (space, inode) = self.by_nsid.remove(&nsid)?;
        self.leaving.push_back((now + LINGER_NS, inode, space));
        Some(space)
    }

    /// Any number may have been taken away; gives the namespaces that were heard of.
    pub(super) fn all_gone(&mut self, now: u64) -> Vec<Space> {
        let numbers: Vec<i32> = self.by_nsid.keys().copied().collect();
        self.strangers.clear();
        numbers.into_iter().filter_map(|nsid| self.gone(nsid, now)).collect()
    }

    /// Forgets inode numbers that nothing is told of any more; true if there were some.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        let before = self.by_inode.len();
        while let Some((_, inode, space)) = self.leaving.pop_front_if(|(at, ..)| *at <= now) {
            if self.by_inode.get(&inode) == Some(&space) {
                self.by_inode.remove(&inode);
            }
        }
        self.by_inode.len() != before
    }

    /// How many are heard of.
    pub(super) fn len(&self) -> usize {
        self.by_nsid.len() + 1
    }

    /// All, by inode number.
    pub(super) const fn by_inode(&self) -> &HashMap<u32, Space, RandomState> {
        &self.by_inode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_used_again_and_spaces_are_not() {
        let mut spaces = Spaces::new(100);
        assert_eq!(spaces.of(From::Own), spaces.of_inode(100));
        assert_eq!(spaces.of(From::Nsid(3)), None);
        assert!(spaces.wants_a_look());
        let (first, none) = spaces.found(200, 3);
        assert_eq!(none, None);
        spaces.looked();
        assert_eq!(spaces.of(From::Nsid(3)), Some(first));
        // Gone: what still comes from captures is told by the inode number for a while.
        assert_eq!(spaces.gone(3, 5), Some(first));
        assert_eq!((spaces.of(From::Nsid(3)), spaces.of_inode(200)), (None, Some(first)));
        let (second, _) = spaces.found(200, 3);
        assert_ne!(first, second);
        spaces.expire(5 + LINGER_NS);
        assert_eq!(spaces.of_inode(200), Some(second));
        assert_eq!(spaces.gone(3, 6), Some(second));
        spaces.expire(6 + LINGER_NS);
        assert_eq!((spaces.of_inode(200), spaces.len()), (None, 1));
    }

    #[test]
    fn one_without_a_process_is_looked_for_once() {
        let mut spaces = Spaces::new(100);
        spaces.of(From::Nsid(9));
        assert!(spaces.wants_a_look());
        spaces.looked();
        spaces.of(From::Nsid(9));
        assert!(!spaces.wants_a_look());
        // Another namespace has the number now.
        spaces.numbered(9);
        spaces.of(From::Nsid(9));
        assert!(spaces.wants_a_look());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut spaces = Spaces::new(100);
        for nsid in 0..10_000 {
            spaces.of(From::Nsid(nsid));
            if nsid % 100 == 0 {
                spaces.looked();
            }
        }
        assert!(spaces.unknown.len() <= STRANGERS_MAX && spaces.strangers.len() <= 2 * STRANGERS_MAX);
    }
}
