//! Which kernel modules a machine loads, in order, with what they depend on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::project;

/// What the project's tests use where a kernel does not have it built in. A kernel that lacks one is left without.
pub(crate) const USUAL: &[&str] = &[
    // socket listings, as `ss` and the agent ask for them
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "unix_diag",
    "netlink_diag",
    // links between network namespaces
    "veth",
    "dummy",
    "bridge",
    "vxlan",
    "tun",
    // address translation and tracked connections
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_chain_nat",
    // programs at interfaces, and bad links
    "sch_ingress",
    "cls_bpf",
    "sch_netem",
];

/// The modules that [`USUAL`] and `extra` need, dependencies first. Every name of `extra` must exist.
pub(crate) fn needed(directory: &Path, extra: &[String]) -> Result<Vec<PathBuf>> {
    let path = directory.join("modules.dep");
    let dependencies = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let tree = Tree::parse(&dependencies);
    let mut order = Vec::new();
    for name in USUAL {
        tree.add(name, &mut order);
    }
    for name in extra {
        let name = name.replace('-', "_");
        if !tree.add(&name, &mut order) && !is_built_in(directory, &name) {
            bail!("--module {name}: not in {}", directory.display());
        }
    }
    Ok(order.into_iter().map(|path| directory.join(path)).collect())
}

/// Whether the kernel says that it holds a module itself. Not every package has the list.
fn is_built_in(directory: &Path, name: &str) -> bool {
    let list = fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
    list.lines().any(|path| module_name(path) == name)
}

/// The bytes of a module, uncompressed: older kernels cannot load a compressed one by themselves.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("reading {}", path.display())),
    };
    project::output(Command::new(tool).arg("-dc").arg(path))
}

/// The name of a module from its path: `kernel/net/a-b.ko.xz` is `a_b`.
pub(crate) fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// `modules.dep`: every module with all it depends on, directly or not.
struct Tree<'a>(BTreeMap<String, (&'a str, Vec<&'a str>)>);

impl<'a> Tree<'a> {
    fn parse(text: &'a str) -> Self {
        let entry = |line: &'a str| {
            let (path, needs) = line.split_once(':')?;
            Some((module_name(path), (path, needs.split_whitespace().collect())))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    /// Appends a module and, before it, what it needs and `order` does not hold yet. False if there is none.
    fn add(&self, name: &str, order: &mut Vec<&'a str>) -> bool {
        let Some((path, needs)) = self.0.get(name) else {
            return false;
        };
        // depmod lists the direct needs first: loading goes from the back.
        for path in needs.iter().rev().chain(std::iter::once(path)) {
            if !order.contains(path) {
                order.push(path);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let tree =
            Tree::parse("k/c-c.ko.xz: k/b.ko.xz k/a.ko.xz\nk/b.ko.xz: k/a.ko.xz\nk/a.ko.xz:\nk/d.ko: k/a.ko.xz\n");
        let mut order = Vec::new();
        assert!(tree.add("c_c", &mut order));
        assert!(tree.add("d", &mut order));
        assert!(!tree.add("absent", &mut order));
        assert_eq!(order, ["k/a.ko.xz", "k/b.ko.xz", "k/c-c.ko.xz", "k/d.ko"]);
    }

    #[test]
    fn names_are_as_the_kernel_spells_them() {
        assert_eq!(module_name("kernel/net/nf-x.ko.zst"), "nf_x");
        assert_eq!(module_name("plain.ko"), "plain");
    }
}
