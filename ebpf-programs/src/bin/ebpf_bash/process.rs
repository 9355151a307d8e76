//! Processes: which start, which end, and their numbers as the agent knows them.

use core::mem::MaybeUninit;

use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns, generated},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use ebpf_common::bash::{BashConfig, EVENT_VERSION, EventHead, PID_LEVELS, event, stat};

use crate::maps::{CONFIG, EVENTS, PROCESSES, count};

/// `sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`, in the process: its number now
/// stands for another program.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub(crate) fn shell_exec(_ctx: RawTracePointContext) -> i32 {
    if let Some(pid) = current_pid() {
        let _ = PROCESSES.remove(&pid);
        tell(event::EXEC, pid);
    }
    0
}

/// `sched_process_exit(struct task_struct *p, ...)`, in each thread that ends; the first one stands for the process.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub(crate) fn shell_exit(_ctx: RawTracePointContext) -> i32 {
    let both = bpf_get_current_pid_tgid();
    if both as u32 == (both >> 32) as u32
        && let Some(pid) = current_pid()
        && PROCESSES.remove(&pid).is_ok()
    {
        tell(event::EXIT, pid);
    }
    0
}

#[inline(always)]
fn tell(kind: u16, pid: u32) {
    let Some(mut entry) = EVENTS.reserve::<EventHead>(0) else {
        count(stat::PROCESSES_MISSED);
        return;
    };
    entry.write(head(kind, pid));
    entry.submit(0);
}

/// Start of an event of now.
#[inline(always)]
pub(crate) fn head(kind: u16, pid: u32) -> EventHead {
    EventHead {
        version: EVENT_VERSION,
        kind,
        pid,
        // SAFETY: takes no argument.
        time_ns: unsafe { bpf_ktime_get_ns() },
    }
}

/// Number of the current process in the agent's pid namespace; `None` if it has none there.
#[inline(always)]
pub(crate) fn current_pid() -> Option<u32> {
    let config = CONFIG.get(0)?;
    if config.pidns == 0 {
        return Some((bpf_get_current_pid_tgid() >> 32) as u32);
    }
    pid_in_namespace(config)
}

/// The same, where the agent's pid namespace is not the first: one of those that the process is in, from its own outwards.
#[inline(always)]
fn pid_in_namespace(config: &BashConfig) -> Option<u32> {
    // SAFETY: takes no argument.
    let task = unsafe { generated::bpf_get_current_task() };
    let signal: u64 = read(task, config.signal);
    let pid: u64 = read(signal, config.tgid_pid);
    let level: u32 = read(pid, config.pid_level);
    for up in 0..PID_LEVELS {
        if up > level {
            return None;
        }
        let upid = pid + config.pid_numbers as u64 + (level - up) as u64 * config.upid_size as u64;
        let namespace: u64 = read(upid, config.upid_ns);
        if read::<u32>(namespace, config.pidns_inum) == config.pidns {
            return Some(read(upid, config.upid_nr));
        }
    }
    None
}

/// Reads a plain value at `base + offset`; zero if the memory cannot be read.
#[inline(always)]
fn read<T: Copy>(base: u64, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the helper checks the source and writes exactly size_of::<T>() bytes; T is an integer, so zeroed or filled
    // it is valid.
    unsafe {
        generated::bpf_probe_read_kernel(
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            (base + offset as u64) as *const _,
        );
        value.assume_init()
    }
}
