//! Loads the programs of `httpflow-tls` and gives typed access to their maps. Entry: [`load`].

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, RawTracePoint, RawTracePointRunOptions, TestRun as _,
    },
};
use ebpf_common::{
    http::{HttpConfig, OwnNamespace},
    net::ABSENT,
    tls::stat,
};

use super::{
    attach::{cgroup2_root, is_whole},
    btf::KernelTypes,
    capability::Capabilities,
    counters,
    http::LoadOptions,
    offsets::net_offsets,
    sys::{self, ProgramStats},
    uprobe::{At, Attached, Probes},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf_tls"));

/// HTTP exchanges inside TLS.
pub const TLS: &str = "ebpf-net/httpflow-tls";
/// Of them, those of Go programs.
pub const TLS_OF_GO: &str = "ebpf-net/httpflow-tls/go";
/// Processes are found as they start.
pub const STARTS: &str = "ebpf-net/httpflow-tls/starts";

const EGRESS: &str = "tls_egress";
const NAMESPACE: &str = "tls_namespace";
const TRACEPOINTS: [(&str, &str); 2] = [("tls_exit", "sched_process_exit"), ("tls_exec", "sched_process_exec")];
/// Programs at functions, and at what of them.
const PROBES: [(&str, At); 9] = [
    ("tls_read", At::Instruction),
    ("tls_write", At::Instruction),
    ("tls_read_ex", At::Instruction),
    ("tls_write_ex", At::Instruction),
    ("tls_sendfile", At::Instruction),
    ("tls_handshake", At::Instruction),
    ("tls_free", At::Instruction),
    ("tls_bio_write", At::Instruction),
    ("tls_returned", At::Return),
];
/// For Go, which the rest does without.
const GO: [(&str, At); 4] = [
    ("go_write", At::Instruction),
    ("go_read", At::Instruction),
    ("go_handshake", At::Instruction),
    ("go_close", At::Instruction),
];

/// The loaded object. Dropping it detaches everything.
pub struct TlsObject {
    ebpf: Ebpf,
    probes: BTreeMap<&'static str, Probes>,
    /// Why Go programs are not seen.
    go: Option<anyhow::Error>,
    config: Array<MapData, HttpConfig>,
    quit: HashMap<MapData, u64, u32>,
    tracked: HashMap<MapData, u32, u32>,
    stats: PerCpuArray<MapData, u64>,
    policy: MapData,
    /// Ring of events of connections.
    pub events: RingBuf<MapData>,
    /// Ring of starts and ends of processes.
    pub starts: RingBuf<MapData>,
}

/// True for a program of this object.
#[must_use]
pub fn is_program(name: &str) -> bool {
    [EGRESS, NAMESPACE].contains(&name)
        || TRACEPOINTS.iter().any(|(other, _)| *other == name)
        || PROBES.iter().chain(&GO).any(|(other, _)| *other == name)
}

/// Loads the object; nothing is attached yet.
///
/// # Errors
/// If plain text cannot be seen on this machine.
pub fn load(options: &LoadOptions, config: HttpConfig) -> anyhow::Result<TlsObject> {
    if let Err(error) = sys::raise_memlock_limit() {
        tracing::debug!(%error, "Cannot raise the locked-memory limit; kernels before 5.11 need it");
    }
    let (offsets, missing) = net_offsets(&KernelTypes::load()?, &options.cgroups);
    let needed = [
        offsets.skb_sk,
        offsets.lock_owned,
        offsets.net,
        offsets.netns_inum,
        offsets.tgid,
        offsets.family,
        offsets.addrpair,
        offsets.dport,
        offsets.sport,
    ];
    if needed.contains(&ABSENT) {
        anyhow::bail!(
            "this kernel lacks members that tell whose a socket is: {}",
            missing.join(", ")
        );
    }
    let mut ebpf = EbpfLoader::new()
        .override_global("OFFSETS", &offsets, true)
        .map_max_entries("EVENTS", options.ring_buffer_size)
        .load(OBJECT)
        .context("cannot make the maps of httpflow-tls; the agent needs CAP_BPF (or CAP_SYS_ADMIN)")?;
    let refused = |name: &str| options.refuse.iter().any(|refused| refused == name);
    for name in [EGRESS].into_iter().chain(PROBES.iter().map(|(name, _)| *name)) {
        if refused(name) {
            anyhow::bail!("program {name} is refused by the option refuse_programs");
        }
    }
    let egress: &mut CgroupSkb = program(&mut ebpf, EGRESS)?.try_into()?;
    egress.load().with_context(|| format!("program {EGRESS}"))?;
    let mut probes = BTreeMap::new();
    for (name, at) in PROBES {
        let loaded = Probes::load(OBJECT, &mut ebpf, name, at).with_context(|| format!("program {name}"))?;
        probes.insert(name, loaded);
    }
    let go = GO.iter().try_for_each(|(name, at)| {
        anyhow::ensure!(
            !refused(name),
            "program {name} is refused by the option refuse_programs"
        );
        anyhow::ensure!(
            [offsets.files, offsets.private_data, offsets.socket_file]
                .iter()
                .all(|at| *at != ABSENT),
            "this kernel lacks members that lead from descriptors to sockets: {}",
            missing.join(", ")
        );
        let loaded = Probes::load(OBJECT, &mut ebpf, name, *at).with_context(|| format!("program {name}"))?;
        probes.insert(*name, loaded);
        Ok(())
    });
    let mut take = |name: &str| ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"));
    let (settings, quit, stats): (Map, Map, Map) = (take("CONFIG")?, take("QUIT")?, take("STATS")?);
    let (policy, events, starts) = (take("POLICY")?, take("EVENTS")?, take("STARTS")?);
    let tracked = take("TRACKED")?;
    let Map::HashMap(policy) = policy else {
        anyhow::bail!("map POLICY has an unexpected type");
    };
    let mut object = TlsObject {
        config: Array::try_from(settings)?,
        quit: HashMap::try_from(quit)?,
        tracked: HashMap::try_from(tracked)?,
        stats: PerCpuArray::try_from(stats)?,
        events: RingBuf::try_from(events)?,
        starts: RingBuf::try_from(starts)?,
        policy,
        probes,
        go: go.err(),
        ebpf,
    };
    object.set_config(config)?;
    Ok(object)
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> anyhow::Result<&'e mut aya::programs::Program> {
    ebpf.program_mut(name)
        .ok_or_else(|| anyhow!("object has no program {name}"))
}

// === impl TlsObject ===

impl TlsObject {
    /// Begins to look at sockets, and at starts and ends of processes unless one is in `refuse`.
    ///
    /// # Errors
    /// If sockets cannot be seen on this machine.
    pub fn attach(&mut self, refuse: &[String], capabilities: &mut Capabilities) -> anyhow::Result<()> {
        let (path, cgroup) = cgroup2_root()?;
        let egress: &mut CgroupSkb = program(&mut self.ebpf, EGRESS)?.try_into()?;
        egress
            .attach(&cgroup, CgroupSkbAttachType::Egress, CgroupAttachMode::Single)
            .with_context(|| format!("program {EGRESS} at the cgroup root"))?;
        let how = self.probes.values().next().map_or("uprobe", Probes::hook);
        let hook = format!("{how}, cgroup_skb at {}", path.display());
        if !is_whole(&path) {
            capabilities.degraded(
                TLS,
                hook,
                "this is a cgroup namespace: only sockets of this container are seen; run in the host's (docker: \
                 --cgroupns host)",
            );
        } else {
            capabilities.on(TLS, hook);
        }
        match &self.go {
            None => capabilities.on(TLS_OF_GO, how),
            Some(error) => capabilities.off(TLS_OF_GO, format!("{error:#}")),
        }
        let hooked = TRACEPOINTS.into_iter().try_for_each(|(name, hook)| {
            anyhow::ensure!(
                !refuse.iter().any(|refused| refused == name),
                "program {name} is refused by the option refuse_programs"
            );
            let program: &mut RawTracePoint = program(&mut self.ebpf, name)?.try_into()?;
            program.load()?;
            program.attach(hook)?;
            anyhow::Ok(())
        });
        match hooked {
            Ok(()) => capabilities.on(STARTS, "raw tracepoints sched_process_exec, sched_process_exit"),
            Err(error) => capabilities.degraded(
                STARTS,
                "looks at all processes",
                format!("exchanges of a program's first second may be missed: {error:#}"),
            ),
        }
        Ok(())
    }

    /// Ends to look at anything; maps stay. Probes at functions are their holder's to take away.
    pub fn detach(&mut self) {
        let unloaded = program(&mut self.ebpf, EGRESS).and_then(|program| {
            let program: &mut CgroupSkb = program.try_into()?;
            Ok(program.unload()?)
        });
        if let Err(error) = unloaded {
            tracing::warn!(
                program = EGRESS,
                error = format!("{error:#}"),
                "Cannot detach a program; it ends with this process"
            );
        }
        for (name, _) in TRACEPOINTS {
            if let Some(Ok(program)) = self.ebpf.program_mut(name).map(<&mut RawTracePoint>::try_from) {
                // It may not have been loaded.
                let _ = program.unload();
            }
        }
    }

    /// Runs a program at places of an open file, by offset.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn probe(&mut self, program: &str, file: BorrowedFd<'_>, at: &[u64]) -> anyhow::Result<Attached> {
        let probes = self
            .probes
            .get(program)
            .ok_or_else(|| anyhow!("program {program} is not loaded"))?;
        probes.attach(&mut self.ebpf, file, at)
    }

    /// Where this process's pid namespace is, and its level.
    ///
    /// # Errors
    /// If the kernel refuses the program that looks.
    pub fn own_pid_namespace(&mut self) -> anyhow::Result<(u64, u32)> {
        let program: &mut RawTracePoint = program(&mut self.ebpf, NAMESPACE)?.try_into()?;
        program.load()?;
        program
            .test_run(RawTracePointRunOptions::new())
            .with_context(|| format!("cannot run program {NAMESPACE}"))?;
        let map = self
            .ebpf
            .map("NAMESPACE")
            .ok_or_else(|| anyhow!("object has no map NAMESPACE"))?;
        let own: OwnNamespace = Array::try_from(map)?.get(&0, 0)?;
        anyhow::ensure!(own.address != 0, "cannot read the agent's own pid namespace");
        Ok((own.address, u32::try_from(own.level)?))
    }

    /// Changes the running programs' settings.
    ///
    /// # Errors
    /// If the kernel refuses the map update.
    pub fn set_config(&mut self, config: HttpConfig) -> anyhow::Result<()> {
        self.config
            .set(0, config, 0)
            .context("cannot write the settings of httpflow-tls")
    }

    /// The map of what is switched on for whom.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn policy(&self) -> anyhow::Result<OwnedFd> {
        Ok(self.policy.fd().as_fd().try_clone_to_owned()?)
    }

    /// Says that a connection, by number, is followed no longer.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn quit(&mut self, number: u64) -> anyhow::Result<()> {
        Ok(self.quit.insert(number, 1, 0)?)
    }

    /// Wants to be told when a process ends.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn track(&mut self, pid: u32) -> anyhow::Result<()> {
        Ok(self.tracked.insert(pid, 1, 0)?)
    }

    /// Forgets a process.
    pub fn forget(&mut self, pid: u32) {
        // It may have ended, and the kernel side taken it out.
        let _ = self.tracked.remove(&pid);
    }

    /// All counters of [`stat`], over all CPUs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn stats(&self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        counters::sums(&self.stats).context("cannot read the counters of httpflow-tls")
    }

    /// Kernel statistics of each loaded program.
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        let programs = self.ebpf.programs().filter_map(|(name, program)| {
            let fd = program.fd().ok()?;
            Some((name.to_owned(), sys::program_stats(fd.as_fd()).ok()?))
        });
        let multi = self
            .probes
            .iter()
            .filter_map(|(name, probes)| Some(((*name).to_owned(), sys::program_stats(probes.program()?).ok()?)));
        programs.chain(multi).collect()
    }
}
