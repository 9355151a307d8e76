//! Names of the nodes that pods are on, by number: a pod has a word for it.

use ahash::RandomState;
use hashbrown::HashMap;
use records::Str;

/// The number of nodes that found no room: a cluster has a tenth of them at most.
const NOWHERE: u16 = u16::MAX;

/// Nodes of pods. A number is given anew when the last pod that had it is forgotten.
#[derive(Debug, Default)]
pub(super) struct PodNodes {
    numbers: HashMap<Str, u16, RandomState>,
    /// Name, and how many pods have it.
    nodes: Vec<(Str, u32)>,
    free: Vec<u16>,
}

impl PodNodes {
    /// The number of a node for one pod more.
    pub(super) fn hold(&mut self, name: &str) -> u16 {
        if let Some(number) = self.numbers.get(name) {
            if let Some((_, pods)) = self.nodes.get_mut(usize::from(*number)) {
                *pods += 1;
            }
            return *number;
        }
        let new = || u16::try_from(self.nodes.len()).unwrap_or(NOWHERE);
        let number = self.free.pop().unwrap_or_else(new);
        if number == NOWHERE {
            return NOWHERE;
        }
        let name: Str = name.into();
        if usize::from(number) == self.nodes.len() {
            self.nodes.push(Default::default());
        }
        if let Some(node) = self.nodes.get_mut(usize::from(number)) {
            *node = (name.clone(), 1);
        }
        self.numbers.insert(name, number);
        number
    }

    /// One pod less.
    pub(super) fn release(&mut self, number: u16) {
        let Some((name, pods)) = self.nodes.get_mut(usize::from(number)) else {
            return;
        };
        *pods = pods.saturating_sub(1);
        if *pods == 0 {
            self.numbers.remove(name);
            *name = Str::default();
            self.free.push(number);
        }
    }

    /// Its name; empty for none.
    pub(super) fn name(&self, number: u16) -> &str {
        self.nodes.get(usize::from(number)).map_or("", |(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_nodes_without_pods_are_given_anew() {
        let mut nodes = PodNodes::default();
        let [one, two, again] = ["one", "two", "one"].map(|name| nodes.hold(name));
        assert_eq!((one, nodes.name(one), nodes.name(two)), (again, "one", "two"));
        nodes.release(one);
        assert_eq!(nodes.name(one), "one");
        nodes.release(again);
        assert_eq!(nodes.name(one), "");
        assert_eq!(nodes.hold("three"), one);
        assert_eq!(
            (nodes.name(one), nodes.name(two), nodes.nodes.len()),
            ("three", "two", 2)
        );
        assert_eq!(nodes.name(7), "");
    }
}
