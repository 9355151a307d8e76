//! Loads the programs of `dnsflow` and gives typed access to their maps. Entry: [`load`].

use std::{
    collections::BTreeSet,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, Map, MapData, PerCpuArray, ProgramArray, RingBuf},
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, ProgramFd},
};
use ebpf_common::dns::{DnsConfig, stat};

use super::{
    attach::{cgroup2_root, is_whole, reason},
    btf::KernelTypes,
    capability::Capabilities,
    counters,
    entry::{Entered, Entry},
    offsets::dns_offsets,
    sys::{self, ProgramStats},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf_dns"));

/// Look-ups and their answers.
pub const DNSFLOW: &str = "ebpf-net/dnsflow";

/// Programs of the object.
pub const PROGRAMS: [&str; 2] = ["dns_ingress", "dns_egress"];

/// The loaded object. Dropping it detaches everything.
pub struct DnsObject {
    /// If the programs have no hook of their own.
    _entered: Option<Entered>,
    ebpf: Ebpf,
    config: Array<MapData, DnsConfig>,
    stats: PerCpuArray<MapData, u64>,
    policy: MapData,
    /// Ring of events.
    pub events: RingBuf<MapData>,
}

/// Loads the object and attaches it; it sees nothing before [`DnsObject::set_config`] switches it on. Programs in `refuse`
/// are treated as if the kernel had refused them.
///
/// # Errors
/// If look-ups cannot be seen on this machine: with one direction alone there is nothing to tell.
pub fn load(
    ring_buffer_size: u32,
    ports: &BTreeSet<u16>,
    refuse: &[String],
    entry: &Entry,
    capabilities: &mut Capabilities,
) -> anyhow::Result<DnsObject> {
    let types = KernelTypes::load()?;
    let (offsets, missing) = dns_offsets(&types);
    if let Err(error) = sys::raise_memlock_limit() {
        tracing::debug!(%error, "Cannot raise the locked-memory limit; kernels before 5.11 need it");
    }
    let mut ebpf = EbpfLoader::new()
        .override_global("OFFSETS", &offsets, true)
        .map_max_entries("EVENTS", ring_buffer_size)
        .load(OBJECT)
        .context("cannot make the maps of dnsflow; the agent needs CAP_BPF (or CAP_SYS_ADMIN)")?;
    let map = ebpf
        .map_mut("PORTS")
        .ok_or_else(|| anyhow!("object has no map PORTS"))?;
    let mut words = Array::<_, u64>::try_from(map)?;
    for (index, word) in port_words(ports) {
        words.set(index, word, 0).context("cannot write the ports of dnsflow")?;
    }
    let (path, cgroup) = cgroup2_root().map_err(|error| anyhow!(reason(&error)))?;
    for name in PROGRAMS {
        anyhow::ensure!(
            refuse.iter().all(|refused| refused != name),
            "program {name} is refused by the option refuse_programs"
        );
        let program = skb(&mut ebpf, name)?;
        program.load().map_err(|error| anyhow!(reason(&error.into())))?;
    }
    let after = ebpf
        .take_map("AFTER")
        .ok_or_else(|| anyhow!("object has no map AFTER"))?;
    let after = ProgramArray::try_from(after)?;
    let entered = {
        let (egress, ingress) = (fd(&ebpf, "dns_egress")?, fd(&ebpf, "dns_ingress")?);
        entry.enter_dns(&port_words(ports), [egress, ingress], after)
    };
    let entered = match entered {
        Ok(entered) => Some(entered),
        Err(error) => {
            tracing::debug!(
                error = format!("{error:#}"),
                "Programs of dnsflow have hooks of their own"
            );
            for (name, hook) in PROGRAMS
                .into_iter()
                .zip([CgroupSkbAttachType::Ingress, CgroupSkbAttachType::Egress])
            {
                skb(&mut ebpf, name)?
                    .attach(&cgroup, hook, CgroupAttachMode::Single)
                    .context("attach to the cgroup root")?;
            }
            None
        }
    };
    let hook = format!("cgroup_skb at {}", path.display());
    if !is_whole(&path) {
        capabilities.degraded(
            DNSFLOW,
            hook,
            "this is a cgroup namespace: only sockets of this container are seen; run in the host's (docker: --cgroupns \
             host)",
        );
    } else if missing.is_empty() {
        capabilities.on(DNSFLOW, hook);
    } else {
        capabilities.degraded(DNSFLOW, hook, format!("this kernel lacks {}", missing.join(", ")));
    }
    let mut take = |name: &str| ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"));
    let (config, stats, events, policy): (Map, Map, Map, Map) =
        (take("CONFIG")?, take("STATS")?, take("EVENTS")?, take("POLICY")?);
    let Map::HashMap(policy) = policy else {
        return Err(anyhow!("map POLICY has an unexpected type"));
    };
    Ok(DnsObject {
        _entered: entered,
        config: Array::try_from(config)?,
        stats: PerCpuArray::try_from(stats)?,
        events: RingBuf::try_from(events)?,
        policy,
        ebpf,
    })
}

fn skb<'e>(ebpf: &'e mut Ebpf, name: &str) -> anyhow::Result<&'e mut CgroupSkb> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("object has no program {name}"))?;
    Ok(program.try_into()?)
}

fn fd<'e>(ebpf: &'e Ebpf, name: &str) -> anyhow::Result<&'e ProgramFd> {
    let program = ebpf
        .program(name)
        .ok_or_else(|| anyhow!("object has no program {name}"))?;
    Ok(program.fd()?)
}

/// The words of map `PORTS` that are not zero.
fn port_words(ports: &BTreeSet<u16>) -> Vec<(u32, u64)> {
    let mut words: Vec<(u32, u64)> = Vec::new();
    for port in ports {
        let (index, bit) = (u32::from(port >> 6), 1u64 << (port & 63));
        match words.last_mut().filter(|(last, _)| *last == index) {
            Some((_, word)) => *word |= bit,
            None => words.push((index, bit)),
        }
    }
    words
}

// === impl DnsObject ===

impl DnsObject {
    /// Changes the running programs' settings.
    ///
    /// # Errors
    /// If the kernel refuses the map update.
    pub fn set_config(&mut self, config: DnsConfig) -> anyhow::Result<()> {
        self.config
            .set(0, config, 0)
            .context("cannot write the settings of dnsflow")
    }

    /// Another descriptor of map `POLICY`.
    ///
    /// # Errors
    /// If there are no descriptors to be had.
    pub fn policy(&self) -> anyhow::Result<OwnedFd> {
        Ok(self.policy.fd().as_fd().try_clone_to_owned()?)
    }

    /// All counters of [`stat`], over all CPUs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn stats(&self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        counters::sums(&self.stats).context("cannot read the counters of dnsflow")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_is_one_bit() {
        let words = port_words(&BTreeSet::from([0, 53, 63, 64, 5353, 65_535]));
        assert_eq!(
            words,
            [
                (0, 1 | 1 << 53 | 1 << 63),
                (1, 1),
                (5353 / 64, 1 << (5353 % 64)),
                (1023, 1 << 63)
            ]
        );
        assert_eq!(port_words(&BTreeSet::new()), []);
    }
}
