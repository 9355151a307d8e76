//! Loads the programs of `ebpf-bash` and gives typed access to their maps. Entry: [`load`].

use std::os::fd::{AsFd as _, BorrowedFd};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::RawTracePoint,
};
use ebpf_common::bash::{BashConfig, stat};

use super::{
    btf::KernelTypes,
    capability::Capabilities,
    counters,
    offsets::tgid_pid,
    sys::{self, ProgramStats},
    uprobe::{At, Attached, Probes},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf_bash"));

/// Lines typed into bash.
pub const LINES: &str = "ebpf-bash/lines";
/// Shells are found as they start.
pub const SHELLS: &str = "ebpf-bash/shells";

/// Programs of the object.
pub const PROGRAMS: [&str; 3] = [READLINE, "shell_exec", "shell_exit"];
const READLINE: &str = "readline_return";

/// The loaded object. Dropping it detaches everything.
pub struct BashObject {
    ebpf: Ebpf,
    probes: Probes,
    processes: HashMap<MapData, u32, u32>,
    stats: PerCpuArray<MapData, u64>,
    /// Ring of events.
    pub events: RingBuf<MapData>,
}

/// Loads the object. Programs in `refuse` are treated as if the kernel had refused them.
///
/// # Errors
/// If lines cannot be seen on this machine.
pub fn load(ring_buffer_size: u32, refuse: &[String], capabilities: &mut Capabilities) -> anyhow::Result<BashObject> {
    if let Err(error) = sys::raise_memlock_limit() {
        tracing::debug!(%error, "Cannot raise the locked-memory limit; kernels before 5.11 need it");
    }
    let config = own_namespace().context("cannot tell the agent's pid namespace")?;
    let mut ebpf = EbpfLoader::new()
        .map_max_entries("EVENTS", ring_buffer_size)
        .load(OBJECT)
        .context("cannot make the maps of ebpf-bash; the agent needs CAP_BPF (or CAP_SYS_ADMIN)")?;
    let map = ebpf
        .map_mut("CONFIG")
        .ok_or_else(|| anyhow!("object has no map CONFIG"))?;
    Array::<_, BashConfig>::try_from(map)?
        .set(0, config, 0)
        .context("cannot write the settings of ebpf-bash")?;
    let refused = |name: &str| {
        let refused = refuse.iter().any(|other| other == name);
        (!refused)
            .then_some(())
            .ok_or_else(|| anyhow!("program {name} is refused by the option refuse_programs"))
    };
    let probes = refused(READLINE).and_then(|()| Probes::load(OBJECT, &mut ebpf, READLINE, At::Instruction))?;
    capabilities.on(LINES, probes.hook());
    let hooked = [
        ("shell_exit", "sched_process_exit"),
        ("shell_exec", "sched_process_exec"),
    ]
    .into_iter()
    .try_for_each(|(name, hook)| {
        refused(name)?;
        let program: &mut RawTracePoint = ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("object has no program {name}"))?
            .try_into()?;
        program.load()?;
        program.attach(hook)?;
        anyhow::Ok(())
    });
    match hooked {
        Ok(()) => capabilities.on(SHELLS, "raw tracepoints sched_process_exec, sched_process_exit"),
        Err(error) => capabilities.degraded(
            SHELLS,
            "looks at all processes",
            format!("commands of a shell's first second may be missed: {error:#}"),
        ),
    }
    let mut take = |name: &str| ebpf.take_map(name).ok_or_else(|| anyhow!("object has no map {name}"));
    let (processes, stats, events): (Map, Map, Map) = (take("PROCESSES")?, take("STATS")?, take("EVENTS")?);
    Ok(BashObject {
        processes: HashMap::try_from(processes)?,
        stats: PerCpuArray::try_from(stats)?,
        events: RingBuf::try_from(events)?,
        probes,
        ebpf,
    })
}

/// Where processes have the numbers that the agent knows them by.
fn own_namespace() -> anyhow::Result<BashConfig> {
    use std::os::unix::fs::MetadataExt as _;

    /// `PROC_PID_INIT_INO`: the first pid namespace.
    const FIRST: u64 = 0xefff_fffc;
    let inode = std::fs::metadata("/proc/self/ns/pid")?.ino();
    if inode == FIRST {
        return Ok(BashConfig::default());
    }
    let types = KernelTypes::load()?;
    let find = |name: &str, path: &str| {
        types
            .offset(name, path)
            .with_context(|| format!("this kernel lacks {name}.{path}"))
    };
    Ok(BashConfig {
        pidns: u32::try_from(inode)?,
        signal: find("task_struct", "signal")?,
        tgid_pid: tgid_pid(&types).context("this kernel lacks signal_struct.pids")?,
        pid_level: find("pid", "level")?,
        pid_numbers: find("pid", "numbers")?,
        upid_nr: find("upid", "nr")?,
        upid_ns: find("upid", "ns")?,
        upid_size: types.size("upid").context("this kernel lacks struct upid")?,
        pidns_inum: find("pid_namespace", "ns.inum")?,
    })
}

// === impl BashObject ===

impl BashObject {
    /// Reads lines at the instructions of an open file with which `readline` returns, by offset in the file.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(&mut self, file: BorrowedFd<'_>, returns: &[u64]) -> anyhow::Result<Attached> {
        self.probes.attach(&mut self.ebpf, file, returns)
    }

    /// Says what is to be done with a process's lines, see [`ebpf_common::bash::verdict`].
    ///
    /// # Errors
    /// If the map refuses; it may be full.
    pub fn judge(&mut self, pid: u32, verdict: u32) -> anyhow::Result<()> {
        self.processes
            .insert(pid, verdict, 0)
            .with_context(|| format!("cannot note what becomes of the lines of process {pid}"))
    }

    /// Forgets a process.
    pub fn forget(&mut self, pid: u32) {
        // It may have ended, and the kernel side taken it out.
        let _ = self.processes.remove(&pid);
    }

    /// Takes the probes for starts and ends of processes away, so that no more events come.
    pub fn quiet(&mut self) {
        for name in ["shell_exit", "shell_exec"] {
            if let Some(Ok(program)) = self.ebpf.program_mut(name).map(<&mut RawTracePoint>::try_from) {
                // It may not have been loaded.
                let _ = program.unload();
            }
        }
    }

    /// All counters of [`stat`], over all CPUs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn stats(&self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        counters::sums(&self.stats).context("cannot read the counters of ebpf-bash")
    }

    /// Kernel statistics of each loaded program.
    pub fn programs(&self) -> Vec<(String, ProgramStats)> {
        let programs = self.ebpf.programs().filter_map(|(name, program)| {
            let fd = program.fd().ok()?;
            Some((name.to_owned(), sys::program_stats(fd.as_fd()).ok()?))
        });
        let multi = self.probes.program().and_then(|fd| sys::program_stats(fd).ok());
        programs
            .chain(multi.map(|stats| (READLINE.to_owned(), stats)))
            .collect()
    }
}
