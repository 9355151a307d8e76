//! Layouts of plugin `ebpf-net`: connections, aggregated flows, samples, events, configuration, offsets.
//!
//! Addresses are 16 bytes in network order; IPv4 is written as a v4-mapped IPv6 address. Ports are in host byte order.

use core::mem::size_of;

/// Offset or bit that the running kernel's BTF does not have.
pub const ABSENT: u32 = u32::MAX;

/// Process id of a process that belongs to another node, see [`NetConfig::pidns`].
pub const FOREIGN_PID: u32 = u32::MAX;

/// Connections sampled per run of the sampling program.
pub const SAMPLES_PER_RUN: usize = 32;

/// Flow direction codes.
pub mod direction {
    /// Not known to the kernel side; user space decides.
    pub const UNKNOWN: u8 = 0;
    /// The remote end opened the connection, or its datagram came first.
    pub const INCOMING: u8 = 1;
    /// The local end opened the connection, or its datagram came first.
    pub const OUTGOING: u8 = 2;
}

/// Flags of [`FlowKey::folded`].
pub mod folded {
    /// The local port was ephemeral and is left out of the key.
    pub const LOCAL: u8 = 1;
    /// The remote port was ephemeral and is left out of the key.
    pub const REMOTE: u8 = 2;
}

/// Flags of [`Sample::flags`].
pub mod sample {
    /// In: fill `tuple` and `inode` too.
    pub const WANT_IDENTITY: u32 = 1;
    /// Out: the connection was there before and after its counters were read, so they are its own.
    pub const VALID: u32 = 1 << 8;
    /// Out: the connection is closing; its close is reported by the closing side.
    pub const CLOSING: u32 = 1 << 9;
}

/// Operations of the `adopt` program ([`Adopt::op`]).
pub mod adopt {
    /// Describe the socket behind a descriptor of the calling process and start to track it if it is a connection.
    pub const SOCKET: u32 = 0;
    /// Describe it too, but of a connection only name the owner if it has none; track nothing new.
    pub const OWNER: u32 = 1;
    /// Tell the calling process's pid namespace: its address in [`super::Adopt::id`], its level in
    /// [`super::Adopt::state`].
    pub const PID_NAMESPACE: u32 = 2;
}

/// Kinds of ring-buffer events ([`EventHead::kind`]).
pub mod event {
    /// [`super::TcpCloseEvent`]
    pub const TCP_CLOSE: u16 = 1;
    /// [`super::UdpSpillEvent`]
    pub const UDP_SPILL: u16 = 2;
    /// [`super::TcpSpillEvent`]
    pub const TCP_SPILL: u16 = 3;
}

/// What is switched on for whom: values and keys of map `POLICY`.
///
/// A local end is looked up by the cgroup of its process, then by its network namespace; the first entry found decides,
/// and without one [`NetConfig::policy`] or, if no process is known, [`NetConfig::policy_unowned`] does.
pub mod policy {
    /// Bit of `netflow`.
    pub const NETFLOW: u32 = 1;
    /// Bit of `httpflow`.
    pub const HTTPFLOW: u32 = 2;
    /// Bit of `httpflow-tls`.
    pub const HTTPFLOW_TLS: u32 = 4;
    /// The end belongs to another node: nothing is reported, and skips are counted as such.
    pub const OTHER_NODE: u32 = 1 << 31;

    /// Key of a cgroup, by its id ([`super::Conn::owner_cgroup`]).
    #[inline(always)]
    #[must_use]
    pub const fn of_cgroup(id: u64) -> u64 {
        id
    }

    /// Key of a network namespace, by its inode number.
    #[inline(always)]
    #[must_use]
    pub const fn of_netns(inode: u32) -> u64 {
        inode as u64 | 1 << 63
    }
}

/// Version of all event layouts; a reader refuses others.
pub const EVENT_VERSION: u16 = 1;

/// Indices into the per-CPU statistics array; all count events since load. What is handed on is counted by user space
/// when it arrives there.
pub mod stat {
    /// TCP connection ends that ended.
    pub const TCP_ENTERED: u32 = 0;
    /// Skipped: an end on a loopback address while loopback is not reported.
    pub const TCP_SKIP_LOOPBACK: u32 = 1;
    /// Skipped: the handshake never completed.
    pub const TCP_SKIP_NOT_ESTABLISHED: u32 = 2;
    /// Skipped: opened before the agent and already closing when it started.
    pub const TCP_SKIP_PREDATES: u32 = 3;
    /// Skipped: IPv6 while `ipv6_disabled`.
    pub const TCP_SKIP_IPV6: u32 = 4;
    /// Lost: aggregation map and ring buffer both full.
    pub const TCP_LOST_FULL: u32 = 5;
    /// A connection could not be tracked because the connection map is full (it is still counted at its close).
    pub const TCP_CONN_MAP_FULL: u32 = 6;
    /// Datagrams seen at UDP sockets.
    pub const UDP_ENTERED: u32 = 7;
    /// Skipped: loopback.
    pub const UDP_SKIP_LOOPBACK: u32 = 8;
    /// Skipped: IPv6 while `ipv6_disabled`.
    pub const UDP_SKIP_IPV6: u32 = 9;
    /// Skipped: the receive queue was full, the process never gets the datagram (taken back from its flow).
    pub const UDP_SKIP_RCVBUF: u32 = 10;
    /// Lost: map and ring buffer both full.
    pub const UDP_LOST_FULL: u32 = 11;
    /// Skipped: the plugin is switched off for the pod or namespace of the local end ([`super::policy`]).
    pub const TCP_SKIP_POLICY: u32 = 12;
    /// Skipped: as `TCP_SKIP_POLICY`.
    pub const UDP_SKIP_POLICY: u32 = 13;
    /// Skipped: the local end's process belongs to another node that shares this kernel.
    pub const TCP_SKIP_OTHER_NODE: u32 = 14;
    /// Skipped: as `TCP_SKIP_OTHER_NODE`.
    pub const UDP_SKIP_OTHER_NODE: u32 = 15;
    /// Number of counters.
    pub const COUNT: u32 = 16;
}

/// Both ends of a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Local address, v4-mapped for IPv4.
    pub local: [u8; 16],
    /// Remote address, v4-mapped for IPv4.
    pub remote: [u8; 16],
    /// Local port, host order.
    pub local_port: u16,
    /// Remote port, host order.
    pub remote_port: u16,
    /// Inode number of the network namespace.
    pub netns: u32,
}

/// Key of an aggregated TCP flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Ends; folded ports are 0.
    pub tuple: Tuple,
    /// Thread group id of the owning process, 0 if unknown.
    pub pid: u32,
    /// [`direction`] code.
    pub direction: u8,
    /// [`folded`] flags.
    pub folded: u8,
    /// Zero.
    pub _pad: [u8; 2],
}

/// Counters of one TCP connection as of now, from the kernel's own accounting.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpCounters {
    /// Payload bytes the application has read.
    pub read: u64,
    /// Payload bytes the application has written.
    pub written: u64,
    /// Segments retransmitted.
    pub retransmits: u32,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Mean deviation of the round-trip time, microseconds.
    pub rtt_var_us: u32,
    /// TCP state number the counters were read in.
    pub state: u32,
}

/// Aggregated closed connections of one [`FlowKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpAgg {
    /// Sum of payload bytes read.
    pub read: u64,
    /// Sum of payload bytes written.
    pub written: u64,
    /// Sum of retransmitted segments.
    pub retransmits: u64,
    /// Sum over connections of the last smoothed round-trip time, microseconds.
    pub rtt_sum_us: u64,
    /// Sum over connections of the last mean deviation, microseconds.
    pub rtt_var_sum_us: u64,
    /// Connections closed.
    pub closed: u64,
    /// Connections established (all of them were closed too).
    pub established: u64,
    /// Monotonic time of the first close, nanoseconds.
    pub first_ns: u64,
    /// Name of the owning process, NUL padded.
    pub comm: [u8; 16],
    /// Cgroup of the owning process, see [`Conn::owner_cgroup`].
    pub cgroup: u64,
}

/// One open TCP connection end, keyed by its `struct sock` address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conn {
    /// Unique: monotonic nanoseconds when the entry was made.
    pub id: u64,
    /// Monotonic time of establishment, 0 before; for adopted connections the time of adoption.
    pub established_ns: u64,
    /// Bytes read before counting starts.
    pub base_read: u64,
    /// Bytes written before counting starts.
    pub base_written: u64,
    /// Retransmits before counting starts.
    pub base_retransmits: u32,
    /// 0, or 1 + the slot user space gave the connection when it first sampled it.
    pub slot: u32,
    /// Raised by the closing side before it decides how to report (see `slot`).
    pub closing: u64,
    /// Times user space sampled the connection.
    pub samples: u64,
    /// Monotonic time the connection reached CLOSE while a process still held the socket, else 0. The process may read
    /// what is queued; the entry ends with the socket.
    pub closed_ns: u64,
    /// Counters at `closed_ns`.
    pub at_close: TcpCounters,
    /// Thread group id that connected or accepted, 0 if unknown.
    pub owner_pid: u32,
    /// Thread group id that started the close, 0 if none did yet.
    pub closer_pid: u32,
    /// Name of `owner_pid`'s process.
    pub owner_comm: [u8; 16],
    /// Name of `closer_pid`'s process.
    pub closer_comm: [u8; 16],
    /// [`direction`] code.
    pub direction: u8,
    /// 1 if the connection is older than its entry: its establishment is not counted.
    pub adopted: u8,
    /// Remote port at `closed_ns`: a disconnect clears the socket's own.
    pub remote_port: u16,
    /// Thread group id of the process that accepted and then forked, 0 if none did.
    pub forker_pid: u32,
    /// The forker's voluntary context switches at that time.
    pub forker_nvcsw: u64,
    /// Cgroup that `owner_pid`'s process was in: id in the hierarchy that the loader chose (what the
    /// inode number of its directory is), 0 if unknown.
    pub owner_cgroup: u64,
    /// The same of `closer_pid`'s process.
    pub closer_cgroup: u64,
}

/// One connection's turn in the sampling program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// In: address of the socket.
    pub sk: u64,
    /// In: [`Conn::id`] that the caller saw.
    pub id: u64,
    /// In: slot to store, 1-based.
    pub slot: u32,
    /// In and out: [`sample`] flags.
    pub flags: u32,
    /// Out: counters now.
    pub counters: TcpCounters,
    /// Out, on request: the ends.
    pub tuple: Tuple,
    /// Out, on request: inode number of the socket, 0 if it has no file.
    pub inode: u64,
}

/// Argument and result block of the sampling program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleBlock {
    /// In: number of valid entries.
    pub count: u64,
    /// The entries.
    pub samples: [Sample; SAMPLES_PER_RUN],
}

/// Argument and result of the program that looks at a socket by descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopt {
    /// In: [`adopt`] operation.
    pub op: u32,
    /// In: descriptor in the calling process.
    pub fd: u32,
    /// In: thread group id of the process that owns the socket.
    pub pid: u32,
    /// Out: 1 if `sk` is an IP socket of the calling process's descriptor.
    pub found: u32,
    /// In: name of the owning process.
    pub comm: [u8; 16],
    /// In: cgroup of the owning process, see [`Conn::owner_cgroup`].
    pub cgroup: u64,
    /// Out: address of the socket.
    pub sk: u64,
    /// Out: [`Conn::id`] of the entry, 0 if none.
    pub id: u64,
    /// Out: the ends.
    pub tuple: Tuple,
    /// Out: TCP state number.
    pub state: u32,
    /// Out: IP protocol number.
    pub protocol: u32,
}

/// First bytes of every ring-buffer event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventHead {
    /// [`event`] kind.
    pub kind: u16,
    /// [`EVENT_VERSION`].
    pub version: u16,
    /// Length of the whole event in bytes.
    pub len: u32,
}

/// Close of a connection that user space has sampled before; counters are absolute.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpCloseEvent {
    /// Head.
    pub head: EventHead,
    /// [`Conn::id`].
    pub id: u64,
    /// Slot, 1-based.
    pub slot: u32,
    /// 1 if the connection was adopted.
    pub adopted: u32,
    /// Counters at the end.
    pub counters: TcpCounters,
    /// Key with the owner at close.
    pub key: FlowKey,
    /// Name of the owner.
    pub comm: [u8; 16],
    /// Cgroup of the owner, see [`Conn::owner_cgroup`].
    pub cgroup: u64,
}

/// A closed connection that found the aggregation map full.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpSpillEvent {
    /// Head.
    pub head: EventHead,
    /// Key.
    pub key: FlowKey,
    /// The one connection.
    pub agg: TcpAgg,
}

/// Key of an aggregated UDP flow: one socket and one peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct UdpKey {
    /// Socket cookie.
    pub cookie: u64,
    /// Local address of the packets.
    pub local: [u8; 16],
    /// Remote address of the packets.
    pub remote: [u8; 16],
    /// Local port.
    pub local_port: u16,
    /// Remote port.
    pub remote_port: u16,
    /// Zero.
    pub _pad: u32,
}

/// Counters of one [`UdpKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpAgg {
    /// Payload bytes delivered to the socket.
    pub read: u64,
    /// Datagrams delivered to the socket.
    pub datagrams_read: u64,
    /// Payload bytes sent.
    pub written: u64,
    /// Datagrams sent.
    pub datagrams_written: u64,
    /// Monotonic time of the first datagram, nanoseconds.
    pub first_ns: u64,
    /// Thread group id of the first sender, 0 while nothing was sent.
    pub pid: u32,
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Name of `pid`'s process.
    pub comm: [u8; 16],
    /// [`direction`] code by the first datagram.
    pub direction: u8,
    /// Zero.
    pub _pad: [u8; 7],
    /// Cgroup of the first sender, see [`Conn::owner_cgroup`].
    pub cgroup: u64,
}

/// A datagram that found the aggregation map full.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpSpillEvent {
    /// Head.
    pub head: EventHead,
    /// Key.
    pub key: UdpKey,
    /// The one datagram.
    pub agg: UdpAgg,
}

/// Creator of a socket, keyed by cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SockOwner {
    /// Thread group id.
    pub pid: u32,
    /// Zero.
    pub _pad: u32,
    /// Name of the process.
    pub comm: [u8; 16],
    /// Its cgroup, see [`Conn::owner_cgroup`].
    pub cgroup: u64,
}

/// The datagram a CPU is handing to a socket, to take it back if the receive queue turns out to be full.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpLast {
    /// 1 while the rest is valid.
    pub valid: u64,
    /// Payload bytes.
    pub bytes: u64,
    /// Datagrams.
    pub datagrams: u64,
    /// Index of the aggregation map.
    pub map: u64,
    /// Key.
    pub key: UdpKey,
}

/// What `tcp_state` did last on a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handled {
    /// Address of the socket, 0 if nothing.
    pub sk: u64,
    /// The state it changed to.
    pub state: u64,
}

/// A connection that a process accepted last, or that a forked child inherited; keyed by thread group id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inherited {
    /// Address of the socket.
    pub sk: u64,
    /// [`Conn::id`].
    pub id: u64,
}

/// A process's last execve; keyed by thread group id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Executed {
    /// When, monotonic nanoseconds.
    pub at_ns: u64,
    /// Page faults of the task until then.
    pub faults: u64,
}

/// Settings that may change while programs run; one entry of an array map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// Which of the two aggregation maps is written (0 or 1).
    pub active: u32,
    /// 1: report flows with an end on a loopback address.
    pub loopback: u32,
    /// 1: leave IPv6 out.
    pub ipv6_disabled: u32,
    /// Client-side ports from here on are folded.
    pub ephemeral_port: u32,
    /// Monotonic time until which closes without an entry are taken as older than the agent.
    pub settled_ns: u64,
    /// Ring-buffer fill in bytes from which the reader is woken.
    pub wake_bytes: u64,
    /// Thread group id of the agent. It borrows sockets to look at them and may so be the last to close one.
    pub agent_pid: u32,
    /// 1: connections older than the agent are adopted, so that one without an entry is not older.
    pub adopts: u32,
    /// [`policy`] bits of an end whose process is known and that has no entry in map `POLICY`.
    pub policy: u32,
    /// The same of an end whose process is not known.
    pub policy_unowned: u32,
    /// 1 if map `POLICY` has entries.
    pub policy_entries: u32,
    /// Level of the pid namespace `pidns`.
    pub pidns_level: u32,
    /// Address of the agent's pid namespace, if processes outside of it belong to other nodes that share this kernel; 0
    /// if all processes are the agent's to report.
    pub pidns: u64,
    /// 1: the local port of connections that were opened here is not folded; user space asks where it leads first.
    pub keep_local_port: u32,
    /// Zero.
    pub _pad: u32,
}

/// Byte offsets of kernel members, resolved from the running kernel's BTF before load. [`ABSENT`] where missing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOffsets {
    /// `sock_common.skc_family` (u16)
    pub family: u32,
    /// `sock_common.skc_addrpair` (be32 daddr, be32 rcv_saddr)
    pub addrpair: u32,
    /// `sock_common.skc_dport` (be16)
    pub dport: u32,
    /// `sock_common.skc_v6_daddr`
    pub v6_daddr: u32,
    /// `sock_common.skc_v6_rcv_saddr`
    pub v6_saddr: u32,
    /// `sock_common.skc_net.net`
    pub net: u32,
    /// `net.ns.inum` (u32)
    pub netns_inum: u32,
    /// `sock_common.skc_state` (u8)
    pub state: u32,
    /// `sock_common.skc_refcnt` (int)
    pub refcnt: u32,
    /// `sock.sk_protocol` (u16)
    pub protocol: u32,
    /// `sock.sk_lock.owned` (int)
    pub lock_owned: u32,
    /// `sock.sk_flags` (unsigned long)
    pub flags: u32,
    /// `sock.sk_socket`
    pub socket: u32,
    /// Number of bit `SOCK_DEAD` in `sk_flags`.
    pub sock_dead_bit: u32,
    /// Number of bit `SOCK_DONE` in `sk_flags`.
    pub sock_done_bit: u32,
    /// `inet_sock.inet_sport` (be16)
    pub sport: u32,
    /// `tcp_sock.bytes_acked` (u64)
    pub bytes_acked: u32,
    /// `tcp_sock.snd_una` (u32)
    pub snd_una: u32,
    /// `tcp_sock.bytes_received` (u64)
    pub bytes_received: u32,
    /// `tcp_sock.total_retrans` (u32)
    pub total_retrans: u32,
    /// `tcp_sock.srtt_us` (u32, eighths)
    pub srtt_us: u32,
    /// `tcp_sock.mdev_us` (u32, quarters)
    pub mdev_us: u32,
    /// `tcp_sock.rcv_nxt` (u32)
    pub rcv_nxt: u32,
    /// `tcp_sock.copied_seq` (u32)
    pub copied_seq: u32,
    /// `tcp_sock.write_seq` (u32)
    pub write_seq: u32,
    /// `task_struct.group_leader`
    pub group_leader: u32,
    /// `task_struct.comm`
    pub comm: u32,
    /// `task_struct.tgid` (u32)
    pub tgid: u32,
    /// `task_struct.nvcsw` (unsigned long)
    pub nvcsw: u32,
    /// `task_struct.min_flt` (unsigned long)
    pub min_flt: u32,
    /// `task_struct.maj_flt` (unsigned long)
    pub maj_flt: u32,
    /// `task_struct.start_time` (u64, monotonic nanoseconds)
    pub start_time: u32,
    /// `task_struct.files`
    pub files: u32,
    /// `files_struct.fdt`
    pub fdt: u32,
    /// `fdtable.fd`
    pub fd_array: u32,
    /// `fdtable.max_fds` (u32)
    pub max_fds: u32,
    /// `file.private_data`
    pub private_data: u32,
    /// `socket.sk`
    pub socket_sk: u32,
    /// `socket.file`
    pub socket_file: u32,
    /// Distance from `struct socket` to its inode's `i_ino` (through `socket_alloc`).
    pub socket_ino: u32,
    /// `sk_buff.sk`
    pub skb_sk: u32,
    /// `files_struct.next_fd`
    pub next_fd: u32,
    /// 1 if the helper `bpf_get_current_task_btf` is there, [`ABSENT`] otherwise.
    pub task_btf: u32,
    /// `task_struct.real_parent`
    pub real_parent: u32,
    /// `task_struct.cgroups`
    pub cgroups: u32,
    /// `css_set.dfl_cgrp`, or the element of `css_set.subsys` of the version 1 hierarchy that is used.
    pub css_set_cgroup: u32,
    /// `cgroup_subsys_state.cgroup` for a version 1 hierarchy, [`ABSENT`] for version 2.
    pub css_cgroup: u32,
    /// `cgroup.kn`
    pub cgroup_kn: u32,
    /// `kernfs_node.id` (u64)
    pub kn_id: u32,
    /// `task_struct.signal`
    pub signal: u32,
    /// Element `PIDTYPE_TGID` of `signal_struct.pids`
    pub tgid_pid: u32,
    /// `pid.level` (u32)
    pub pid_level: u32,
    /// `pid.numbers`
    pub pid_numbers: u32,
    /// `upid.nr` (u32)
    pub upid_nr: u32,
    /// `upid.ns`
    pub upid_ns: u32,
    /// Size of `struct upid`.
    pub upid_size: u32,
}

const _: () = {
    assert!(size_of::<Tuple>() == 40);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<TcpCounters>() == 32);
    assert!(size_of::<TcpAgg>() == 88);
    assert!(size_of::<Conn>() == 168);
    assert!(size_of::<Sample>() == 104);
    assert!(size_of::<SampleBlock>() == 8 + 104 * SAMPLES_PER_RUN);
    assert!(size_of::<Adopt>() == 104);
    assert!(size_of::<EventHead>() == 8);
    assert!(size_of::<TcpCloseEvent>() == 128);
    assert!(size_of::<TcpSpillEvent>() == 144);
    assert!(size_of::<UdpKey>() == 48);
    assert!(size_of::<UdpAgg>() == 80);
    assert!(size_of::<UdpSpillEvent>() == 136);
    assert!(size_of::<SockOwner>() == 32);
    assert!(size_of::<Executed>() == 16);
    assert!(size_of::<UdpLast>() == 80);
    assert!(size_of::<NetConfig>() == 72);
    assert!(size_of::<NetOffsets>() == 56 * 4);
};

// === impl SampleBlock ===

impl Default for SampleBlock {
    fn default() -> Self {
        Self {
            count: 0,
            samples: [Sample::default(); SAMPLES_PER_RUN],
        }
    }
}

// === impl NetOffsets ===

impl NetOffsets {
    /// Nothing known: what the object holds until the loader fills it.
    pub const UNKNOWN: Self = Self {
        family: ABSENT,
        addrpair: ABSENT,
        dport: ABSENT,
        v6_daddr: ABSENT,
        v6_saddr: ABSENT,
        net: ABSENT,
        netns_inum: ABSENT,
        state: ABSENT,
        refcnt: ABSENT,
        protocol: ABSENT,
        lock_owned: ABSENT,
        flags: ABSENT,
        socket: ABSENT,
        sock_dead_bit: ABSENT,
        sock_done_bit: ABSENT,
        sport: ABSENT,
        bytes_acked: ABSENT,
        snd_una: ABSENT,
        bytes_received: ABSENT,
        total_retrans: ABSENT,
        srtt_us: ABSENT,
        mdev_us: ABSENT,
        rcv_nxt: ABSENT,
        copied_seq: ABSENT,
        write_seq: ABSENT,
        group_leader: ABSENT,
        comm: ABSENT,
        tgid: ABSENT,
        nvcsw: ABSENT,
        min_flt: ABSENT,
        maj_flt: ABSENT,
        start_time: ABSENT,
        files: ABSENT,
        fdt: ABSENT,
        fd_array: ABSENT,
        max_fds: ABSENT,
        private_data: ABSENT,
        socket_sk: ABSENT,
        socket_file: ABSENT,
        socket_ino: ABSENT,
        skb_sk: ABSENT,
        next_fd: ABSENT,
        task_btf: ABSENT,
        real_parent: ABSENT,
        cgroups: ABSENT,
        css_set_cgroup: ABSENT,
        css_cgroup: ABSENT,
        cgroup_kn: ABSENT,
        kn_id: ABSENT,
        signal: ABSENT,
        tgid_pid: ABSENT,
        pid_level: ABSENT,
        pid_numbers: ABSENT,
        upid_nr: ABSENT,
        upid_ns: ABSENT,
        upid_size: ABSENT,
    };
}

#[cfg(feature = "user")]
mod pod {
    //! Marks the layouts as plain data for map access.
    use super::{
        Adopt, Conn, FlowKey, NetConfig, NetOffsets, SampleBlock, SockOwner, TcpAgg, Tuple, UdpAgg, UdpKey, UdpLast,
    };

    macro_rules! pod {
        ($($t:ty),*) => { $(
            // SAFETY: `repr(C)`, integers and byte arrays only, no implicit padding (sizes asserted above).
            unsafe impl aya::Pod for $t {}
        )* };
    }
    pod!(
        Adopt,
        Conn,
        FlowKey,
        NetConfig,
        NetOffsets,
        SampleBlock,
        SockOwner,
        TcpAgg,
        Tuple,
        UdpAgg,
        UdpKey,
        UdpLast
    );
}

/// Programs of other captures that the hooks of UDP hand packets on to.
pub mod beside {
    /// Bit: DNS on the watched ports.
    pub const DNS: u32 = 1;
    /// Bit: segments of TCP that tell something.
    pub const HTTP: u32 = 2;
    /// Added to a slot: packets that leave.
    pub const EGRESS: u32 = 0;
    /// Added to a slot: packets that arrive.
    pub const INGRESS: u32 = 1;
    /// First slot of DNS.
    pub const DNS_SLOT: u32 = 0;
    /// First slot of HTTP.
    pub const HTTP_SLOT: u32 = 2;
    /// Number of slots.
    pub const SLOTS: u32 = 4;
}
