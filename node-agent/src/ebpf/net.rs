//! Loads and attaches the programs of `ebpf-net` and gives typed access to their maps.
//!
//! Entry: [`load`]. Each feature tries its hooks from best to last; the outcome goes into the capability vector.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, Map, MapData, PerCpuArray, ProgramArray, RingBuf},
    programs::{Program, RawTracePointRunOptions, TestRun as _},
};
use ebpf_common::net::{Adopt, NetConfig, SampleBlock, SockOwner, adopt, stat};

use super::{
    attach::Attach,
    bash,
    btf::KernelTypes,
    capability::{Capabilities, State},
    counters, dns,
    entry::EntryMaps,
    http,
    offsets::{CgroupHierarchy, net_offsets},
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Entries of the open-connection map.
    pub tcp_connections_max: u32,
    /// Entries of each aggregation map.
    pub flow_map_entries: u32,
    /// Bytes of the event ring; a power of two and a multiple of the page size.
    pub ring_buffer_size: u32,
    /// Whose ids name cgroups.
    pub cgroups: CgroupHierarchy,
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
    entry: Option<EntryMaps>,
}

/// Loads the object and attaches what can be attached.
///
/// # Errors
/// Only if nothing of the plugin can work: no type information, or the maps cannot be made.
pub fn load(options: &LoadOptions, config: NetConfig, capabilities: &mut Capabilities) -> anyhow::Result<NetObject> {
    let types = KernelTypes::load()?;
    let (offsets, missing) = net_offsets(&types, &options.cgroups);
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
    for name in &options.refuse {
        if ebpf.program(name).is_none() {
            let own = ebpf.programs().map(|(name, _)| name);
            let known: Vec<&str> = own
                .chain(dns::PROGRAMS)
                .chain(http::PROGRAMS)
                .chain(bash::PROGRAMS)
                .collect();
            return Err(api::ConfigErrors(vec![api::ConfigError {
                option: "refuse-program".to_owned(),
                value: Some(name.clone()),
                origin: None,
                problem: "is no kernel program of this build".to_owned(),
                accepted: Some(known.join(", ")),
            }])
            .into());
        }
    }
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
        "POLICY",
    ] {
        let map = ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"))?;
        let (Map::HashMap(data) | Map::LruHashMap(data)) = map else {
            return Err(anyhow!("map {name} has an unexpected type"));
        };
        maps.insert(name, data);
    }
    let hooked = [UDP_SENT, UDP_RECEIVED]
        .iter()
        .all(|name| capabilities.state(name) != State::Off);
    let entry = EntryMaps {
        next: ProgramArray::try_from(take(&mut ebpf, "NEXT")?)?,
        beside: Array::try_from(take(&mut ebpf, "BESIDE")?)?,
        ports: Array::try_from(take(&mut ebpf, "DNS_PORTS")?)?,
    };
    Ok(NetObject {
        entry: hooked.then_some(entry),
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

    /// The way into the hooks of UDP for other programs; `None` if there are none, or it was taken before.
    pub fn take_entry(&mut self) -> Option<EntryMaps> {
        self.entry.take()
    }

    /// Detaches every hook; maps and the programs run on demand stay.
    pub fn detach(&mut self) {
        for (name, program) in self.ebpf.programs_mut() {
            if ON_DEMAND.contains(&name) || program.fd().is_err() {
                continue;
            }
            let unloaded = match program {
                Program::RawTracePoint(program) => program.unload(),
                Program::BtfTracePoint(program) => program.unload(),
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

    /// Address and level of this process's pid namespace.
    ///
    /// # Errors
    /// As [`Self::adopt`].
    pub fn own_pid_namespace(&mut self) -> anyhow::Result<(u64, u32)> {
        let answer = self.adopt(Adopt {
            op: adopt::PID_NAMESPACE,
            ..Adopt::default()
        })?;
        anyhow::ensure!(answer.id != 0, "cannot read the agent's own pid namespace");
        Ok((answer.id, answer.state))
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
        counters::sums(&self.stats).context("cannot read the counters of ebpf-net")
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
