//! Loads and attaches the programs of `ebpf-net` and gives typed access to their maps.
//!
//! Entry: [`load`]. Each feature tries its hooks from best to last; the outcome goes into the capability vector.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use anyhow::{Context as _, anyhow};
use aya::{
    Btf, Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, Map, MapData, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, FExit, KProbe, Program, RawTracePoint,
        RawTracePointRunOptions, TestRun as _,
    },
};
use ebpf_common::net::{ABSENT, Adopt, NetConfig, NetOffsets, SampleBlock, SockOwner, stat};

use super::{
    btf::KernelTypes,
    capability::Capabilities,
    offsets::net_offsets,
    sys::{self, ProgramStats},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf_net"));

/// Programs without a hook, run by user space.
const ON_DEMAND: &[&str] = &["tcp_sample", "adopt_socket"];

/// TCP connection accounting.
pub const TCP: &str = "ebpf-net/tcp";
/// Open connections are read once per interval.
pub const TCP_OPEN: &str = "ebpf-net/tcp-open";
/// Connections older than the agent.
pub const TCP_OLDER: &str = "ebpf-net/tcp-older";
/// The accepting process of a connection.
pub const TCP_OWNER: &str = "ebpf-net/tcp-owner";
/// Datagrams sent.
pub const UDP_SENT: &str = "ebpf-net/udp-sent";
/// Datagrams received.
pub const UDP_RECEIVED: &str = "ebpf-net/udp-received";
/// Datagrams dropped at a full receive queue are taken back.
pub const UDP_OVERFLOW: &str = "ebpf-net/udp-overflow";
/// The process that made a UDP socket.
pub const UDP_OWNER: &str = "ebpf-net/udp-owner";

/// Sizes and switches of the object.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Entries of the open-connection map.
    pub tcp_connections_max: u32,
    /// Entries of each aggregation map.
    pub flow_map_entries: u32,
    /// Bytes of the event ring; a power of two and a multiple of the page size.
    pub ring_buffer_size: u32,
    /// Programs to treat as if the kernel had refused them; for trying out degradation.
    pub refuse: Vec<String>,
}

/// The loaded object. Dropping it detaches everything.
pub struct NetObject {
    ebpf: Ebpf,
    config: Array<MapData, NetConfig>,
    samples: Array<MapData, SampleBlock>,
    adopt: Array<MapData, Adopt>,
    stats: PerCpuArray<MapData, u64>,
    /// Ring of events.
    pub events: RingBuf<MapData>,
    maps: BTreeMap<&'static str, MapData>,
}

/// Loads the object and attaches what can be attached.
///
/// # Errors
/// Only if nothing of the plugin can work: no type information, or the maps cannot be made.
pub fn load(options: &LoadOptions, config: NetConfig, capabilities: &mut Capabilities) -> anyhow::Result<NetObject> {
    let types = KernelTypes::load()?;
    let (offsets, missing) = net_offsets(&types);
    if let Err(error) = sys::raise_memlock_limit() {
        tracing::debug!(%error, "Cannot raise the locked-memory limit; kernels before 5.11 need it");
    }
    let mut ebpf = EbpfLoader::new()
        .override_global("OFFSETS", &offsets, true)
        .map_max_entries("CONNS", options.tcp_connections_max)
        .map_max_entries("TCP_AGG_0", options.flow_map_entries)
        .map_max_entries("TCP_AGG_1", options.flow_map_entries)
        .map_max_entries("UDP_AGG_0", options.flow_map_entries)
        .map_max_entries("UDP_AGG_1", options.flow_map_entries)
        .map_max_entries("EVENTS", options.ring_buffer_size)
        .load(OBJECT)
        .context("cannot make the maps of ebpf-net; the agent needs CAP_BPF (or CAP_SYS_ADMIN)")?;
    // Before anything is attached: the first event finds the settings.
    {
        let map = ebpf
            .map_mut("CONFIG")
            .ok_or_else(|| anyhow!("object has no map CONFIG"))?;
        Array::<_, NetConfig>::try_from(map)?
            .set(0, config, 0)
            .context("cannot write the settings of ebpf-net")?;
    }
    let mut loader = Attach {
        ebpf: &mut ebpf,
        offsets: &offsets,
        missing: &missing,
        refuse: &options.refuse,
        types: &types,
    };
    loader.tcp(capabilities);
    loader.udp(capabilities);
    let mut maps = BTreeMap::new();
    for name in [
        "CONNS",
        "TCP_AGG_0",
        "TCP_AGG_1",
        "UDP_AGG_0",
        "UDP_AGG_1",
        "SOCK_OWNERS",
    ] {
        let map = ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"))?;
        let (Map::HashMap(data) | Map::LruHashMap(data)) = map else {
            return Err(anyhow!("map {name} has an unexpected type"));
        };
        maps.insert(name, data);
    }
    Ok(NetObject {
        config: Array::try_from(take(&mut ebpf, "CONFIG")?)?,
        samples: Array::try_from(take(&mut ebpf, "SAMPLES")?)?,
        adopt: Array::try_from(take(&mut ebpf, "ADOPT")?)?,
        stats: PerCpuArray::try_from(take(&mut ebpf, "STATS")?)?,
        events: RingBuf::try_from(take(&mut ebpf, "EVENTS")?)?,
        maps,
        ebpf,
    })
}

fn take(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"))
}

// === impl NetObject ===

impl NetObject {
    /// Changes the running programs' settings.
    ///
    /// # Errors
    /// If the kernel refuses the map update.
    pub fn set_config(&mut self, config: NetConfig) -> anyhow::Result<()> {
        self.config
            .set(0, config, 0)
            .context("cannot write the settings of ebpf-net")
    }

    /// Detaches every hook; maps and the programs run on demand stay.
    pub fn detach(&mut self) {
        for (name, program) in self.ebpf.programs_mut() {
            if ON_DEMAND.contains(&name) || program.fd().is_err() {
                continue;
            }
            let unloaded = match program {
                Program::RawTracePoint(program) => program.unload(),
                Program::CgroupSkb(program) => program.unload(),
                Program::CgroupSock(program) => program.unload(),
                Program::FExit(program) => program.unload(),
                Program::KProbe(program) => program.unload(),
                _ => Ok(()),
            };
            if let Err(error) = unloaded {
                tracing::warn!(program = name, %error, "Cannot detach a program; it ends with this process");
            }
        }
    }

    /// Runs the sampling program over `block`.
    ///
    /// # Errors
    /// If a map access or the run fails.
    pub fn sample(&mut self, block: &mut SampleBlock) -> anyhow::Result<()> {
        self.samples.set(0, *block, 0).context("cannot hand over samples")?;
        self.run("tcp_sample")?;
        *block = self.samples.get(&0, 0).context("cannot read samples")?;
        Ok(())
    }

    /// Runs the program that looks at one of our descriptors.
    ///
    /// # Errors
    /// If a map access or the run fails.
    pub fn adopt(&mut self, adopt: Adopt) -> anyhow::Result<Adopt> {
        self.adopt.set(0, adopt, 0).context("cannot hand over a descriptor")?;
        self.run("adopt_socket")?;
        self.adopt.get(&0, 0).context("cannot read about a descriptor")
    }

    fn run(&mut self, name: &str) -> anyhow::Result<()> {
        let program = self
            .ebpf
            .program(name)
            .ok_or_else(|| anyhow!("object has no program {name}"))?;
        let Program::RawTracePoint(program) = program else {
            return Err(anyhow!("program {name} has an unexpected type"));
        };
        program
            .test_run(RawTracePointRunOptions::new())
            .with_context(|| format!("cannot run program {name}"))?;
        Ok(())
    }

    /// Descriptor of a hash map of the object.
    ///
    /// # Errors
    /// If there is no map of that name.
    pub fn map(&self, name: &str) -> anyhow::Result<BorrowedFd<'_>> {
        let map = self.maps.get(name).ok_or_else(|| anyhow!("object has no map {name}"))?;
        Ok(map.fd().as_fd())
    }

    /// Removes a connection whose close was never seen; false if it is gone already.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn forget_connection(&mut self, sk: u64) -> anyhow::Result<bool> {
        Ok(sys::delete(self.map("CONNS")?, &sk)?)
    }

    /// Creator of a UDP socket by cookie.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn sock_owner(&self, cookie: u64) -> anyhow::Result<Option<SockOwner>> {
        Ok(sys::lookup(self.map("SOCK_OWNERS")?, &cookie)?)
    }

    /// Sum over CPUs of one counter of [`stat`].
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn stat(&self, index: u32) -> anyhow::Result<u64> {
        let values = self
            .stats
            .get(&index, 0)
            .context("cannot read the counters of ebpf-net")?;
        Ok(values.iter().fold(0u64, |sum, v| sum.wrapping_add(*v)))
    }

    /// All counters of [`stat`].
    ///
    /// # Errors
    /// As [`Self::stat`].
    pub fn stats(&self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        let mut all = [0; stat::COUNT as usize];
        for (index, value) in all.iter_mut().enumerate() {
            *value = self.stat(u32::try_from(index)?)?;
        }
        Ok(all)
    }

    /// Kernel statistics of each loaded program.
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        self.ebpf
            .programs()
            .filter_map(|(name, program)| {
                let fd = program.fd().ok()?;
                Some((name.to_owned(), sys::program_stats(fd.as_fd()).ok()?))
            })
            .collect()
    }
}

/// Attaching, hook by hook.
struct Attach<'a> {
    ebpf: &'a mut Ebpf,
    offsets: &'a NetOffsets,
    missing: &'a [&'static str],
    refuse: &'a [String],
    types: &'a KernelTypes,
}

impl Attach<'_> {
    fn tcp(&mut self, capabilities: &mut Capabilities) {
        let o = self.offsets;
        let needed = [
            o.family,
            o.addrpair,
            o.dport,
            o.protocol,
            o.sport,
            o.bytes_acked,
            o.snd_una,
            o.bytes_received,
            o.rcv_nxt,
            o.copied_seq,
            o.write_seq,
            o.flags,
            o.sock_dead_bit,
            o.sock_done_bit,
        ];
        if needed.contains(&ABSENT) {
            let reason = format!(
                "this kernel lacks members that TCP accounting reads: {}",
                self.missing.join(", ")
            );
            for name in [TCP, TCP_OPEN, TCP_OLDER, TCP_OWNER] {
                capabilities.off(name, reason.clone());
            }
            return;
        }
        // All three are needed: the nested one sees what interrupts the first; without the last, entries of connections
        // that end in a process's hands would stay.
        let hooked = self
            .raw_tracepoint("tcp_state", Some("inet_sock_set_state"))
            .and_then(|()| self.raw_tracepoint("tcp_state_nested", Some("inet_sock_set_state")))
            .and_then(|()| self.raw_tracepoint("tcp_destroy", Some("tcp_destroy_sock")))
            .and_then(|()| self.raw_tracepoint("tcp_destroy_nested", Some("tcp_destroy_sock")));
        match hooked {
            Ok(()) if self.missing.is_empty() => {
                capabilities.on(TCP, "raw tracepoints inet_sock_set_state, tcp_destroy_sock")
            }
            Ok(()) => capabilities.degraded(
                TCP,
                "raw tracepoints inet_sock_set_state, tcp_destroy_sock",
                format!("this kernel lacks {}", self.missing.join(", ")),
            ),
            Err(error) => {
                for name in [TCP, TCP_OPEN, TCP_OLDER, TCP_OWNER] {
                    capabilities.off(name, reason(&error));
                }
                return;
            }
        }
        match self.raw_tracepoint("tcp_sample", None) {
            Ok(()) => capabilities.on(TCP_OPEN, "program run on demand"),
            Err(error) => capabilities.off(TCP_OPEN, reason(&error)),
        }
        match self.raw_tracepoint("adopt_socket", None) {
            Ok(()) => capabilities.on(TCP_OLDER, "pidfd_getfd and program run on demand"),
            Err(error) => capabilities.off(TCP_OLDER, reason(&error)),
        }
        self.owner(capabilities);
    }

    /// The accepting process: by return of the accept function, else by the system call.
    fn owner(&mut self, capabilities: &mut Capabilities) {
        let mut refusals = Vec::new();
        let mut hook = None;
        match self.types.parameters("inet_csk_accept") {
            Some(count @ (2 | 4)) => {
                let (first, again) = if count == 2 {
                    ("accept_exit_2", "accept_again_2")
                } else {
                    ("accept_exit_4", "accept_again_4")
                };
                let function = "inet_csk_accept";
                match self.fexit(first, function).and_then(|()| self.fexit(again, function)) {
                    Ok(()) => hook = Some(("fexit inet_csk_accept", "")),
                    Err(error) => refusals.push(format!("fexit: {}", reason(&error))),
                }
            }
            other => refusals.push(format!("fexit: inet_csk_accept has {other:?} parameters")),
        }
        let fallbacks: [(&str, &str, &str); 2] = [
            (
                "accept_syscall",
                "raw tracepoint sys_exit",
                "accept through io_uring is named at close only",
            ),
            (
                "accept_return",
                "kretprobe inet_csk_accept",
                "with many processes blocked in accept some are named at close only",
            ),
        ];
        for (program, label, limit) in fallbacks {
            if hook.is_some() {
                break;
            }
            let attached = if program == "accept_return" {
                self.kretprobe(program, "inet_csk_accept")
            } else {
                self.raw_tracepoint(program, Some("sys_exit"))
            };
            match attached {
                Ok(()) => hook = Some((label, limit)),
                Err(error) => refusals.push(format!("{program}: {}", reason(&error))),
            }
        }
        let forks = self
            .raw_tracepoint("process_fork", Some("sched_process_fork"))
            .and_then(|()| self.raw_tracepoint("process_exec", Some("sched_process_exec")));
        let fork_limit = forks
            .err()
            .map(|error| format!("children of forking servers: {}", reason(&error)));
        let (label, limit) = hook.unwrap_or((
            "close and descriptor scan",
            "accepting processes are named at close only",
        ));
        if limit.is_empty() && fork_limit.is_none() {
            capabilities.on(TCP_OWNER, label);
        } else {
            let mut reasons: Vec<String> = (!limit.is_empty()).then(|| limit.to_owned()).into_iter().collect();
            reasons.extend(refusals);
            reasons.extend(fork_limit);
            capabilities.degraded(TCP_OWNER, label, reasons.join("; "));
        }
    }

    fn udp(&mut self, capabilities: &mut Capabilities) {
        let cgroup = match cgroup2_root() {
            Ok(cgroup) => cgroup,
            Err(error) => {
                for name in [UDP_SENT, UDP_RECEIVED, UDP_OVERFLOW, UDP_OWNER] {
                    capabilities.off(name, reason(&error));
                }
                return;
            }
        };
        let (path, file) = cgroup;
        // The root of the whole hierarchy has no type; a cgroup namespace shows a part of it as its root.
        let partial = path.join("cgroup.type").exists();
        for (name, program, attach) in [
            (UDP_SENT, "udp_egress", CgroupSkbAttachType::Egress),
            (UDP_RECEIVED, "udp_ingress", CgroupSkbAttachType::Ingress),
        ] {
            match self.cgroup_skb(program, &file, attach) {
                Ok(()) if partial => capabilities.degraded(
                    name,
                    format!("cgroup_skb at {}", path.display()),
                    "this is a cgroup namespace: only sockets of this container are seen; run in the host's (docker: \
                     --cgroupns host)",
                ),
                Ok(()) => capabilities.on(name, format!("cgroup_skb at {}", path.display())),
                Err(error) => capabilities.off(name, reason(&error)),
            }
        }
        match self.raw_tracepoint("udp_overflow", Some("udp_fail_queue_rcv_skb")) {
            Ok(()) => capabilities.on(UDP_OVERFLOW, "raw tracepoint udp_fail_queue_rcv_skb"),
            Err(error) => capabilities.degraded(
                UDP_OVERFLOW,
                "",
                format!(
                    "datagrams dropped at a full receive queue count as received: {}",
                    reason(&error)
                ),
            ),
        }
        match self.cgroup_sock("sock_create", &file) {
            Ok(()) => capabilities.on(UDP_OWNER, format!("cgroup sock_create at {}", path.display())),
            Err(error) => capabilities.degraded(
                UDP_OWNER,
                "sender and descriptor scan",
                format!(
                    "sockets that only receive and live less than an interval have no process: {}",
                    reason(&error)
                ),
            ),
        }
    }

    fn program<'p, T>(&'p mut self, name: &str) -> anyhow::Result<&'p mut T>
    where
        &'p mut T: TryFrom<&'p mut Program, Error: std::error::Error + Send + Sync + 'static>,
    {
        if self.refuse.iter().any(|refused| refused == name) {
            return Err(anyhow!("program {name} is refused by the option refuse_programs"));
        }
        let program = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("object has no program {name}"))?;
        Ok(program.try_into()?)
    }

    fn raw_tracepoint(&mut self, name: &str, tracepoint: Option<&str>) -> anyhow::Result<()> {
        let program: &mut RawTracePoint = self.program(name)?;
        program.load()?;
        if let Some(tracepoint) = tracepoint {
            program
                .attach(tracepoint)
                .with_context(|| format!("tracepoint {tracepoint}"))?;
        }
        Ok(())
    }

    fn fexit(&mut self, name: &str, function: &str) -> anyhow::Result<()> {
        let types = Btf::from_sys_fs()?;
        let program: &mut FExit = self.program(name)?;
        program.load(function, &types)?;
        program.attach().with_context(|| format!("function {function}"))?;
        Ok(())
    }

    fn kretprobe(&mut self, name: &str, function: &str) -> anyhow::Result<()> {
        let program: &mut KProbe = self.program(name)?;
        program.load()?;
        program
            .attach(function, 0)
            .with_context(|| format!("function {function}"))?;
        Ok(())
    }

    fn cgroup_skb(&mut self, name: &str, cgroup: &File, attach: CgroupSkbAttachType) -> anyhow::Result<()> {
        let program: &mut CgroupSkb = self.program(name)?;
        program.load()?;
        program
            .attach(cgroup, attach, CgroupAttachMode::Single)
            .context("attach to the cgroup root")?;
        Ok(())
    }

    fn cgroup_sock(&mut self, name: &str, cgroup: &File) -> anyhow::Result<()> {
        let program: &mut CgroupSock = self.program(name)?;
        program.load()?;
        program
            .attach(cgroup, CgroupAttachMode::Single)
            .context("attach to the cgroup root")?;
        Ok(())
    }
}

/// The root of the cgroup v2 hierarchy: on hybrid systems it is mounted beside the v1 controllers.
fn cgroup2_root() -> anyhow::Result<(PathBuf, File)> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let path = mounts
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(3);
            (right.starts_with("cgroup2 ") && left.next() == Some("/")).then(|| left.next())?
        })
        .next()
        .ok_or_else(|| {
            anyhow!("cgroup v2 is not mounted; mount it, e.g. `mount -t cgroup2 none /sys/fs/cgroup/unified`")
        })?;
    let path = PathBuf::from(path);
    let file = File::open(&path).with_context(|| format!("cannot open cgroup root {}", path.display()))?;
    Ok((path, file))
}

/// An error with its causes on one line, without the verifier's log.
fn reason(error: &anyhow::Error) -> String {
    let mut text = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if let Some(end) = text.find('\n') {
        text.truncate(end);
    }
    text
}
