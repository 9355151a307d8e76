//! Loads the programs of `httpflow` and gives typed access to their maps. Entry: [`load`].

use std::{
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Btf, Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Iter, ProgramFd, RawTracePoint, RawTracePointRunOptions,
        TestRun as _,
    },
};
use ebpf_common::{
    http::{HttpConfig, OwnNamespace, stat},
    net::ABSENT,
};

use parking_lot::Mutex;

use super::{
    attach::{cgroup2_root, is_whole},
    btf::KernelTypes,
    capability::Capabilities,
    counters,
    entry::{Entered, Entry},
    namespaces,
    offsets::{CgroupHierarchy, net_offsets},
    sys::{self, ProgramStats},
};

use crate::identity::process::Proc;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf_http"));

/// HTTP exchanges in plain text.
pub const HTTP: &str = "ebpf-net/httpflow";

/// What does not speak HTTP is told from connections older than the programs.
pub const OLDER_TOLD: &str = "ebpf-net/httpflow/older";

/// Programs of the object.
pub const PROGRAMS: [&str; 4] = ["http_egress", "http_ingress", NAMESPACE, OLDER];
const OLDER: &str = "http_older";
const NAMESPACE: &str = "http_namespace";
const HOOKS: [(&str, CgroupSkbAttachType); 2] = [
    ("http_egress", CgroupSkbAttachType::Egress),
    ("http_ingress", CgroupSkbAttachType::Ingress),
];

/// Pause between looks for network namespaces that are new.
const MARK_AGAIN: Duration = Duration::from_secs(10);

/// Sizes and switches of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Bytes of the event ring; a power of two and a multiple of the page size.
    pub ring_buffer_size: u32,
    /// Whose ids name cgroups.
    pub cgroups: CgroupHierarchy,
    /// Programs to treat as if the kernel had refused them; for trying out degradation.
    pub refuse: Vec<String>,
}

/// The loaded object. Dropping it detaches everything.
pub struct HttpObject {
    /// If the programs have no hook of their own.
    entered: Option<Entered>,
    ebpf: Ebpf,
    config: Array<MapData, HttpConfig>,
    quit: HashMap<MapData, u64, u32>,
    stats: PerCpuArray<MapData, u64>,
    policy: MapData,
    marked: HashMap<MapData, u32, u8>,
    settings: HttpConfig,
    next_marks: Instant,
    marks_older: bool,
    refused: bool,
    done: namespaces::Done,
    /// Ring of events.
    pub events: RingBuf<MapData>,
}

/// Loads the object; nothing is attached yet.
///
/// # Errors
/// If exchanges cannot be seen on this machine.
pub fn load(options: &LoadOptions, config: HttpConfig) -> anyhow::Result<HttpObject> {
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
        .context("cannot make the maps of httpflow; the agent needs CAP_BPF (or CAP_SYS_ADMIN)")?;
    for name in PROGRAMS.iter().filter(|name| **name != OLDER) {
        if options.refuse.iter().any(|refused| refused == name) {
            anyhow::bail!("program {name} is refused by the option refuse_programs");
        }
    }
    for (name, _) in HOOKS {
        skb(&mut ebpf, name)?
            .load()
            .with_context(|| format!("program {name}"))?;
    }
    let mut take = |name: &str| ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"));
    let (settings, quit, stats): (Map, Map, Map) = (take("CONFIG")?, take("QUIT")?, take("STATS")?);
    let (policy, events, marked): (Map, Map, Map) = (take("POLICY")?, take("EVENTS")?, take("MARKED")?);
    let Map::HashMap(policy) = policy else {
        anyhow::bail!("map POLICY has an unexpected type");
    };
    let mut object = HttpObject {
        entered: None,
        config: Array::try_from(settings)?,
        quit: HashMap::try_from(quit)?,
        stats: PerCpuArray::try_from(stats)?,
        events: RingBuf::try_from(events)?,
        policy,
        marked: HashMap::try_from(marked)?,
        settings: config,
        next_marks: Instant::now(),
        done: namespaces::Done::default(),
        marks_older: true,
        refused: options.refuse.iter().any(|refused| refused == OLDER),
        ebpf,
    };
    object.set_config(config)?;
    Ok(object)
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

// === impl HttpObject ===

impl HttpObject {
    /// Begins to look at segments.
    ///
    /// # Errors
    /// If they cannot be seen on this machine.
    pub fn attach(&mut self, entry: &Entry, capabilities: &mut Capabilities) -> anyhow::Result<()> {
        let (path, cgroup) = cgroup2_root()?;
        match entry.enter_http([fd(&self.ebpf, "http_egress")?, fd(&self.ebpf, "http_ingress")?]) {
            Ok(entered) => self.entered = Some(entered),
            Err(error) => {
                tracing::debug!(
                    error = format!("{error:#}"),
                    "Programs of httpflow have hooks of their own"
                );
                for (name, hook) in HOOKS {
                    skb(&mut self.ebpf, name)?
                        .attach(&cgroup, hook, CgroupAttachMode::Single)
                        .with_context(|| format!("program {name} at the cgroup root"))?;
                }
            }
        }
        let hook = format!("cgroup_skb at {}", path.display());
        if is_whole(&path) {
            capabilities.on(HTTP, hook);
        } else {
            capabilities.degraded(
                HTTP,
                hook,
                "this is a cgroup namespace: only sockets of this container are seen; run in the host's (docker: \
                 --cgroupns host)",
            );
        }
        Ok(())
    }

    /// Marks connections, now and when it is time again; see [`HttpObject::mark_older`]. True if what works has changed.
    pub fn mark_older_in_time(&mut self, proc: &Proc, capabilities: &mut Capabilities) -> bool {
        let now = Instant::now();
        if now < self.next_marks || !self.marks_older {
            return false;
        }
        self.next_marks = now + MARK_AGAIN;
        let before = self.marks();
        let outcome = self.mark_older(proc);
        if self.marks() == before && outcome.is_ok() {
            return false;
        }
        if let Err(error) = self.set_config(self.settings) {
            tracing::warn!(
                error = format!("{error:#}"),
                "Cannot tell the kernel that connections are marked"
            );
        }
        capabilities.features.retain(|feature| feature.name != OLDER_TOLD);
        match outcome {
            Ok(()) => capabilities.on(OLDER_TOLD, "iterator of TCP sockets in each network namespace"),
            Err(error) => capabilities.degraded(
                OLDER_TOLD,
                "",
                format!("connections that do not speak HTTP are remembered, and cost more: {error:#}"),
            ),
        }
        true
    }

    /// True if connections older than the programs have their marks.
    fn marks(&self) -> bool {
        self.marks_older && !self.done.is_empty()
    }

    /// Marks the connections that are there, in network namespaces where that was not done yet: of later ones that turn out to
    /// speak something else nothing need be remembered. Does nothing if it failed before.
    ///
    /// # Errors
    /// If the kernel has no iterator of sockets that may mark them (5.11), or a namespace cannot be entered. Connections there
    /// cost what they would without.
    fn mark_older(&mut self, proc: &Proc) -> anyhow::Result<()> {
        // Tried again where it works, and not where it does not.
        self.marks_older = false;
        anyhow::ensure!(
            !self.refused,
            "program {OLDER} is refused by the option refuse_programs"
        );
        let marked = Mutex::new(&mut self.marked);
        let program: &mut Iter = self
            .ebpf
            .program_mut(OLDER)
            .ok_or_else(|| anyhow!("object has no program {OLDER}"))?
            .try_into()?;
        if self.done.is_empty() {
            program
                .load("tcp", &Btf::from_sys_fs()?)
                .with_context(|| format!("program {OLDER}"))?;
        }
        let program = Mutex::new(program);
        namespaces::in_each_new(proc, &mut self.done, |inode| {
            let mut program = program.lock();
            let link = program.attach().with_context(|| format!("program {OLDER}"))?;
            // Made and read here: it runs over the sockets of the namespace it is made in.
            let mut run = program.take_link(link)?.into_file()?;
            std::io::copy(&mut run, &mut std::io::sink()).with_context(|| format!("cannot run program {OLDER}"))?;
            marked.lock().insert(u32::try_from(inode)?, 1, 0)?;
            Ok(())
        })?;
        self.marks_older = true;
        Ok(())
    }

    /// Ends to look at segments; maps stay.
    pub fn detach(&mut self) {
        self.entered = None;
        for (name, _) in HOOKS {
            let unloaded = skb(&mut self.ebpf, name).and_then(|program| Ok(program.unload()?));
            if let Err(error) = unloaded {
                tracing::warn!(
                    program = name,
                    error = format!("{error:#}"),
                    "Cannot detach a program; it ends with this process"
                );
            }
        }
    }

    /// Where this process's pid namespace is, and its level.
    ///
    /// # Errors
    /// If the kernel refuses the program that looks.
    pub fn own_pid_namespace(&mut self) -> anyhow::Result<(u64, u32)> {
        let program: &mut RawTracePoint = self
            .ebpf
            .program_mut(NAMESPACE)
            .ok_or_else(|| anyhow!("object has no program {NAMESPACE}"))?
            .try_into()?;
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
        self.settings = config;
        let config = HttpConfig {
            marked: u32::from(self.marks()),
            ..config
        };
        self.config
            .set(0, config, 0)
            .context("cannot write the settings of httpflow")
    }

    /// The map of what is switched on for whom.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn policy(&self) -> anyhow::Result<OwnedFd> {
        Ok(self.policy.fd().as_fd().try_clone_to_owned()?)
    }

    /// Says that a socket, by cookie, is followed no longer.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn quit(&mut self, cookie: u64) -> anyhow::Result<()> {
        Ok(self.quit.insert(cookie, 1, 0)?)
    }

    /// All counters of [`stat`], over all CPUs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn stats(&self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        counters::sums(&self.stats).context("cannot read the counters of httpflow")
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

    #[test]
    fn the_kernel_side_tells_protocols_as_the_agent_does() {
        use crate::protocols::{Verdict, classify};
        use ebpf_programs::http::{LOOK, verdict};

        let words: [&[u8]; 14] = [
            b"PROPPATCH /dav HTTP/1.1\r\n",
            b"PROPFIND /dav HTTP/1.1\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost",
            b"CONNECT a:443 HTTP/1.1\r\n",
            b"GET http://a/ HTTP/1.1\r\n",
            b"UNLOCK /a HTTP/1.1\r\nHost",
            b"DELETE x HTTP/1.1\r\nHost:",
            b"HTTP/1.1 200 OK\r\nServer:",
            b"HTTP/1.2 200 OK\r\nServer:",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
            b"\x00\x00\x10\x01\x25\x00\x00\x00\x03abcdefghijklmnop",
            b"SSH-2.0-OpenSSH_9.2\r\n",
        ];
        let mut seed = 1u64;
        let mut random = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(seed >> 33).unwrap_or(0)
        };
        for round in 0..20_000 {
            let mut bytes = words.get(random() % words.len()).copied().unwrap_or_default().to_vec();
            bytes.truncate(1 + random() % LOOK);
            if round % 3 == 0 {
                let at = random() % bytes.len();
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = u8::try_from(random() % 256).unwrap_or(0);
                }
            }
            let mut first = [0; LOOK];
            for (to, from) in first.iter_mut().zip(&bytes) {
                *to = *from;
            }
            let len = u32::try_from(bytes.len()).unwrap_or(0);
            let expected: &[u8] = match classify(&bytes) {
                Verdict::Http1Request => &[verdict::REQUEST],
                Verdict::Http1Response => &[verdict::RESPONSE],
                Verdict::Http2Preface => &[verdict::PREFACE],
                Verdict::Http2Frames => &[verdict::FRAMES, verdict::SETTINGS],
                Verdict::Tls => &[verdict::TLS],
                // The agent follows frames further.
                Verdict::NotHttp => &[verdict::OTHER, verdict::FRAMES, verdict::SETTINGS],
                Verdict::NeedMore => &[verdict::NEED_MORE],
            };
            let told = ebpf_programs::http::classify(&first, len);
            assert!(expected.contains(&told), "{bytes:?}: {told}, not {expected:?}");
        }
    }
}
