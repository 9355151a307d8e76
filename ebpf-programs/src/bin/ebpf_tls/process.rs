//! Processes: which start and which end; the agent's own pid namespace.

use aya_ebpf::{helpers::bpf_get_current_pid_tgid, macros::raw_tracepoint, programs::RawTracePointContext};
use ebpf_common::{
    http::OwnNamespace,
    net::FOREIGN_PID,
    tls::{PROCESS_VERSION, ProcessEvent, process, stat},
};

use crate::{
    kernel::{current_pidns, current_process_by_task, current_task},
    maps::{CALLS, NAMESPACE, STARTS, TRACKED, config, count},
};

/// `sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`, in the process.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub(crate) fn tls_exec(_ctx: RawTracePointContext) -> i32 {
    let _ = CALLS.remove(&current_task());
    if let Some(pid) = current_pid() {
        tell(process::EXEC, pid);
    }
    0
}

/// `sched_process_exit(struct task_struct *p, ...)`, in each thread that ends; the first one stands for the process.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub(crate) fn tls_exit(_ctx: RawTracePointContext) -> i32 {
    // Another thread may get its address.
    let _ = CALLS.remove(&current_task());
    let both = bpf_get_current_pid_tgid();
    if both as u32 == (both >> 32) as u32
        && let Some(pid) = current_pid()
        && TRACKED.remove(&pid).is_ok()
    {
        tell(process::EXIT, pid);
    }
    0
}

/// Writes where the agent's pid namespace is; run by user space.
#[raw_tracepoint]
pub(crate) fn tls_namespace(_ctx: RawTracePointContext) -> i32 {
    let (address, level) = current_pidns();
    let _ = NAMESPACE.set(
        0,
        OwnNamespace {
            address,
            level: level as u64,
        },
        0,
    );
    0
}

/// Number of the current process as the agent knows it; `None` if it has none there.
#[inline(always)]
fn current_pid() -> Option<u32> {
    let pid = current_process_by_task(&config()?.net).pid;
    (pid != FOREIGN_PID).then_some(pid)
}

#[inline(always)]
fn tell(kind: u16, pid: u32) {
    let Some(mut entry) = STARTS.reserve::<ProcessEvent>(0) else {
        return count(stat::PROCESSES_MISSED, 1);
    };
    entry.write(ProcessEvent {
        version: PROCESS_VERSION,
        kind,
        pid,
    });
    entry.submit(0);
}
