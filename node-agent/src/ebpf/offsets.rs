//! Kernel member offsets for the programs, resolved from BTF by name.
//!
//! A member that the kernel does not have stays [`ABSENT`]; what depends on it is reported as degraded or off.

use ebpf_common::{
    dns::DnsOffsets,
    net::{ABSENT, NetOffsets},
};

use super::btf::KernelTypes;

/// Size of a pointer of the kernel.
const POINTER: u32 = 8;

/// Whose ids name the cgroup of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CgroupHierarchy {
    /// The unified hierarchy.
    #[default]
    V2,
    /// The version 1 hierarchy of this controller, as the kernel names it (`memory`, `pids`, `cpu`).
    V1(String),
}

/// Offsets for `ebpf-net`, and the names that could not be resolved.
#[must_use]
pub fn net_offsets(types: &KernelTypes, cgroups: &CgroupHierarchy) -> (NetOffsets, Vec<&'static str>) {
    let mut missing = Vec::new();
    let mut find = |label: &'static str, candidates: &[(&str, &str)]| {
        let found = candidates.iter().find_map(|(name, path)| types.offset(name, path));
        found.unwrap_or_else(|| {
            missing.push(label);
            ABSENT
        })
    };
    let offsets = NetOffsets {
        family: find("sock_common.skc_family", &[("sock_common", "skc_family")]),
        addrpair: find(
            "sock_common.skc_addrpair",
            &[("sock_common", "skc_addrpair"), ("sock_common", "skc_daddr")],
        ),
        dport: find("sock_common.skc_dport", &[("sock_common", "skc_dport")]),
        v6_daddr: find("sock_common.skc_v6_daddr", &[("sock_common", "skc_v6_daddr")]),
        v6_saddr: find("sock_common.skc_v6_rcv_saddr", &[("sock_common", "skc_v6_rcv_saddr")]),
        net: find(
            "sock_common.skc_net",
            &[("sock_common", "skc_net.net"), ("sock_common", "skc_net")],
        ),
        netns_inum: find("net.ns.inum", &[("net", "ns.inum"), ("net", "proc_inum")]),
        state: find("sock_common.skc_state", &[("sock_common", "skc_state")]),
        refcnt: find("sock_common.skc_refcnt", &[("sock_common", "skc_refcnt")]),
        protocol: find("sock.sk_protocol", &[("sock", "sk_protocol")]),
        lock_owned: find("sock.sk_lock.owned", &[("sock", "sk_lock.owned")]),
        flags: find("sock.sk_flags", &[("sock", "__sk_common.skc_flags")]),
        socket: find("sock.sk_socket", &[("sock", "sk_socket")]),
        sock_dead_bit: types.enumerator("SOCK_DEAD").unwrap_or(ABSENT),
        sock_done_bit: types.enumerator("SOCK_DONE").unwrap_or(ABSENT),
        sport: find("inet_sock.inet_sport", &[("inet_sock", "inet_sport")]),
        bytes_acked: find("tcp_sock.bytes_acked", &[("tcp_sock", "bytes_acked")]),
        snd_una: find("tcp_sock.snd_una", &[("tcp_sock", "snd_una")]),
        bytes_received: find("tcp_sock.bytes_received", &[("tcp_sock", "bytes_received")]),
        total_retrans: find("tcp_sock.total_retrans", &[("tcp_sock", "total_retrans")]),
        srtt_us: find("tcp_sock.srtt_us", &[("tcp_sock", "srtt_us")]),
        mdev_us: find("tcp_sock.mdev_us", &[("tcp_sock", "mdev_us")]),
        rcv_nxt: find("tcp_sock.rcv_nxt", &[("tcp_sock", "rcv_nxt")]),
        copied_seq: find("tcp_sock.copied_seq", &[("tcp_sock", "copied_seq")]),
        write_seq: find("tcp_sock.write_seq", &[("tcp_sock", "write_seq")]),
        group_leader: find("task_struct.group_leader", &[("task_struct", "group_leader")]),
        comm: find("task_struct.comm", &[("task_struct", "comm")]),
        tgid: find("task_struct.tgid", &[("task_struct", "tgid")]),
        nvcsw: find("task_struct.nvcsw", &[("task_struct", "nvcsw")]),
        min_flt: find("task_struct.min_flt", &[("task_struct", "min_flt")]),
        maj_flt: find("task_struct.maj_flt", &[("task_struct", "maj_flt")]),
        start_time: find("task_struct.start_time", &[("task_struct", "start_time")]),
        files: find("task_struct.files", &[("task_struct", "files")]),
        fdt: find("files_struct.fdt", &[("files_struct", "fdt")]),
        fd_array: find("fdtable.fd", &[("fdtable", "fd")]),
        max_fds: find("fdtable.max_fds", &[("fdtable", "max_fds")]),
        private_data: find("file.private_data", &[("file", "private_data")]),
        socket_sk: find("socket.sk", &[("socket", "sk")]),
        socket_file: find("socket.file", &[("socket", "file")]),
        socket_ino: socket_ino(types).unwrap_or(ABSENT),
        skb_sk: find("sk_buff.sk", &[("sk_buff", "sk")]),
        next_fd: find("files_struct.next_fd", &[("files_struct", "next_fd")]),
        task_btf: types.enumerator("BPF_FUNC_get_current_task_btf").map_or(ABSENT, |_| 1),
        real_parent: find("task_struct.real_parent", &[("task_struct", "real_parent")]),
        cgroups: find("task_struct.cgroups", &[("task_struct", "cgroups")]),
        css_set_cgroup: cgroups.css_set_cgroup(types).unwrap_or(ABSENT),
        css_cgroup: match cgroups {
            CgroupHierarchy::V2 => ABSENT,
            CgroupHierarchy::V1(_) => find("cgroup_subsys_state.cgroup", &[("cgroup_subsys_state", "cgroup")]),
        },
        cgroup_kn: find("cgroup.kn", &[("cgroup", "kn")]),
        kn_id: find("kernfs_node.id", &[("kernfs_node", "id")]),
        signal: find("task_struct.signal", &[("task_struct", "signal")]),
        tgid_pid: tgid_pid(types).unwrap_or(ABSENT),
        pid_level: find("pid.level", &[("pid", "level")]),
        pid_numbers: find("pid.numbers", &[("pid", "numbers")]),
        upid_nr: find("upid.nr", &[("upid", "nr")]),
        upid_ns: find("upid.ns", &[("upid", "ns")]),
        upid_size: types.size("upid").unwrap_or(ABSENT),
    };
    for (label, value) in [
        ("SOCK_DONE", offsets.sock_done_bit),
        ("socket_alloc.vfs_inode.i_ino", offsets.socket_ino),
        ("SOCK_DEAD", offsets.sock_dead_bit),
        ("the cgroup of a css_set", offsets.css_set_cgroup),
        ("signal_struct.pids", offsets.tgid_pid),
        ("upid", offsets.upid_size),
    ] {
        if value == ABSENT {
            missing.push(label);
        }
    }
    (offsets, missing)
}

/// Offsets for `dnsflow`, and the names that could not be resolved.
#[must_use]
pub fn dns_offsets(types: &KernelTypes) -> (DnsOffsets, Vec<&'static str>) {
    let (net, _) = net_offsets(types, &CgroupHierarchy::V2);
    let all = [
        ("sk_buff.sk", net.skb_sk),
        ("sock_common.skc_net", net.net),
        ("net.ns.inum", net.netns_inum),
        ("sock_common.skc_family", net.family),
        ("sock_common.skc_addrpair", net.addrpair),
        ("sock_common.skc_dport", net.dport),
        ("sock_common.skc_v6_daddr", net.v6_daddr),
        ("sock_common.skc_v6_rcv_saddr", net.v6_saddr),
        ("inet_sock.inet_sport", net.sport),
    ];
    let offsets = DnsOffsets {
        skb_sk: net.skb_sk,
        net: net.net,
        netns_inum: net.netns_inum,
        family: net.family,
        addrpair: net.addrpair,
        dport: net.dport,
        v6_daddr: net.v6_daddr,
        v6_saddr: net.v6_saddr,
        sport: net.sport,
    };
    let missing = all.into_iter().filter(|(_, offset)| *offset == ABSENT);
    (offsets, missing.map(|(name, _)| name).collect())
}

impl CgroupHierarchy {
    /// Offset in `css_set` of the pointer that leads to the cgroup.
    fn css_set_cgroup(&self, types: &KernelTypes) -> Option<u32> {
        match self {
            Self::V2 => types.offset("css_set", "dfl_cgrp"),
            Self::V1(controller) => {
                let index = types.enumerator(&format!("{controller}_cgrp_id"))?;
                types
                    .offset("css_set", "subsys")?
                    .checked_add(index.checked_mul(POINTER)?)
            }
        }
    }
}

/// Offset of the pointer to the thread group's `struct pid`.
pub(super) fn tgid_pid(types: &KernelTypes) -> Option<u32> {
    let index = types.enumerator("PIDTYPE_TGID")?;
    types
        .offset("signal_struct", "pids")?
        .checked_add(index.checked_mul(POINTER)?)
}

/// Distance from a `struct socket` to the inode number of the `struct socket_alloc` around it.
fn socket_ino(types: &KernelTypes) -> Option<u32> {
    let socket = types.offset("socket_alloc", "socket")?;
    let inode = types.offset("socket_alloc", "vfs_inode.i_ino")?;
    inode.checked_sub(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_members_of_the_running_kernel() {
        let Ok(types) = KernelTypes::load() else {
            println!("SKIPPED: this kernel has no BTF");
            return;
        };
        let (_, missing) = net_offsets(&types, &CgroupHierarchy::V2);
        assert_eq!(missing, Vec::<&str>::new());
    }
}
