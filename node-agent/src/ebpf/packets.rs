//! Loads the programs of the packet capture and gives typed access to their maps. Entry: [`load`].

use std::os::fd::{AsFd as _, BorrowedFd};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, Map, MapData, PerCpuArray},
    programs::SchedClassifier,
};
use ebpf_common::packets::{FlowKey, FlowValue, OtherKey, OtherValue, PacketConfig, PacketOffsets, direction, stat};

use super::{
    attach::reason,
    btf::KernelTypes,
    counters,
    sys::{self, Batches, ProgramStats},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf_packets"));

/// Programs of the object: of received and of sent packets, by where the interface is.
pub const PROGRAMS: [[&str; 2]; 4] = [
    ["packet_in", "packet_out"],
    ["packet_in_ns", "packet_out_ns"],
    ["packet_in_bare", "packet_out_bare"],
    ["packet_in_bare_ns", "packet_out_bare_ns"],
];

/// Flows taken out of the kernel at a time.
const BATCH: usize = 4096;

/// Which programs an interface needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its frames begin with headers of Ethernet.
    pub ethernet: bool,
    /// It is in the agent's network namespace.
    pub own: bool,
}

/// The loaded object; what attaches its programs is elsewhere.
pub struct PacketObject {
    ebpf: Ebpf,
    config: Array<MapData, PacketConfig>,
    stats: PerCpuArray<MapData, u64>,
    flows: [MapData; 2],
    other: MapData,
    batches: Batches<FlowKey, FlowValue>,
    /// Members that the kernel has not: interfaces of other namespaces are not told apart.
    pub missing: Vec<&'static str>,
}

/// True for a program of this object.
#[must_use]
pub fn is_program(name: &str) -> bool {
    PROGRAMS.as_flattened().contains(&name)
}

/// Loads the object; it counts nothing before [`PacketObject::set_config`] switches it on and its programs are attached.
/// Programs in `refuse` are treated as if the kernel had refused them.
///
/// # Errors
/// If packets cannot be counted on this machine.
pub fn load(max_flows: u32, refuse: &[String]) -> anyhow::Result<PacketObject> {
    let types = KernelTypes::load()?;
    let (offsets, missing) = offsets(&types);
    if let Err(error) = sys::raise_memlock_limit() {
        tracing::debug!(%error, "Cannot raise the locked-memory limit; kernels before 5.11 need it");
    }
    let mut ebpf = EbpfLoader::new()
        .override_global("OFFSETS", &offsets, true)
        .map_max_entries("FLOWS_0", max_flows)
        .map_max_entries("FLOWS_1", max_flows)
        .load(OBJECT)
        .context("cannot make the maps of bpf-netlog; the agent needs CAP_BPF (or CAP_SYS_ADMIN)")?;
    for name in PROGRAMS.as_flattened() {
        anyhow::ensure!(
            refuse.iter().all(|refused| refused != name),
            "program {name} is refused by the option refuse_programs"
        );
        let program: &mut SchedClassifier = ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("object has no program {name}"))?
            .try_into()?;
        program.load().map_err(|error| anyhow!(reason(&error.into())))?;
    }
    let mut take = |name: &str| ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"));
    let (config, stats) = (take("CONFIG")?, take("STATS")?);
    let mut hash = |name| match take(name)? {
        Map::HashMap(map) => Ok(map),
        _ => Err(anyhow!("map {name} has an unexpected type")),
    };
    let (flows, other) = ([hash("FLOWS_0")?, hash("FLOWS_1")?], hash("OTHER")?);
    Ok(PacketObject {
        config: Array::try_from(config)?,
        stats: PerCpuArray::try_from(stats)?,
        flows,
        other,
        batches: Batches::take(BATCH),
        missing,
        ebpf,
    })
}

fn offsets(types: &KernelTypes) -> (PacketOffsets, Vec<&'static str>) {
    let mut missing = Vec::new();
    let mut find = |name: &'static str, places: &[(&str, &str)]| {
        let found = places.iter().find_map(|(of, path)| types.offset(of, path));
        found.unwrap_or_else(|| {
            missing.push(name);
            ebpf_common::net::ABSENT
        })
    };
    let offsets = PacketOffsets {
        skb_dev: find("sk_buff.dev", &[("sk_buff", "dev")]),
        dev_net: find(
            "net_device.nd_net",
            &[("net_device", "nd_net.net"), ("net_device", "nd_net")],
        ),
        netns_inum: find("net.ns.inum", &[("net", "ns.inum"), ("net", "proc_inum")]),
    };
    (offsets, missing)
}

// === impl PacketObject ===

impl PacketObject {
    /// The program for a direction.
    ///
    /// # Errors
    /// If it is not loaded.
    pub fn program(&self, place: Place, way: u8) -> anyhow::Result<BorrowedFd<'_>> {
        let [own, other, bare, bare_other] = PROGRAMS;
        let [ingress, egress] = match (place.ethernet, place.own) {
            (true, true) => own,
            (true, false) => other,
            (false, true) => bare,
            (false, false) => bare_other,
        };
        let name = if way == direction::INGRESS { ingress } else { egress };
        let program = self
            .ebpf
            .program(name)
            .ok_or_else(|| anyhow!("object has no program {name}"))?;
        Ok(program.fd()?.as_fd())
    }

    /// Changes the running programs' settings.
    ///
    /// # Errors
    /// If the kernel refuses the map update.
    pub fn set_config(&mut self, config: PacketConfig) -> anyhow::Result<()> {
        self.config
            .set(0, config, 0)
            .context("cannot write the settings of bpf-netlog")
    }

    /// Takes all flows out of a table that no program writes any more.
    ///
    /// # Errors
    /// What the kernel said; flows that were taken out by then were told.
    pub fn drain(&mut self, table: u32, mut take: impl FnMut(&FlowKey, &FlowValue)) -> anyhow::Result<()> {
        let [first, second] = &self.flows;
        let map = if table == 0 { first } else { second };
        self.batches.rewind();
        while let Some(batch) = self
            .batches
            .next(map.fd().as_fd())
            .context("cannot read the flows of bpf-netlog")?
        {
            batch.for_each(|(key, value)| take(key, value));
        }
        Ok(())
    }

    /// Makes room for what is in no flow.
    ///
    /// # Errors
    /// If there is none.
    pub fn make_other(&self, key: &OtherKey) -> anyhow::Result<()> {
        sys::update(self.other.fd().as_fd(), key, &OtherValue::default()).context("cannot make a sum for an interface")
    }

    /// What is in no flow, so far.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn other(&self, key: &OtherKey) -> anyhow::Result<Option<OtherValue>> {
        Ok(sys::lookup(self.other.fd().as_fd(), key)?)
    }

    /// Takes the room away; false if there was none.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn forget_other(&self, key: &OtherKey) -> anyhow::Result<bool> {
        Ok(sys::delete(self.other.fd().as_fd(), key)?)
    }

    /// All counters of [`stat`], over all CPUs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn stats(&self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        counters::sums(&self.stats).context("cannot read the counters of bpf-netlog")
    }

    /// Kernel statistics of each loaded program.
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        let programs = self.ebpf.programs().filter_map(|(name, program)| {
            let fd = program.fd().ok()?;
            Some((name.to_owned(), sys::program_stats(fd.as_fd()).ok()?))
        });
        programs.collect()
    }
}
