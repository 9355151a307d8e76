//! Layouts of plugin `ebpf-bash`: `EVENTS`, `PROCESSES`, `CONFIG`, `STATS`.

/// Version of the event layouts.
pub const EVENT_VERSION: u16 = 1;
/// Bytes of a line that are kept, its end excluded.
pub const LINE_MAX: usize = LONG - 1;
/// Room of a short event, for a line and its end.
pub const SHORT: usize = 232;
/// Room of a long event.
pub const LONG: usize = 4096;
/// Levels of nested pid namespaces that the agent's own is looked for in; the kernel allows 32.
pub const PID_LEVELS: u32 = 8;

/// `EventHead::kind`.
pub mod event {
    /// A process started another program.
    pub const EXEC: u16 = 1;
    /// A process that has an entry in `PROCESSES` ended.
    pub const EXIT: u16 = 2;
    /// A line was read, in a [`ShortLine`](super::ShortLine).
    pub const SHORT_LINE: u16 = 3;
    /// A line was read, in a [`LongLine`](super::LongLine).
    pub const LONG_LINE: u16 = 4;
}

/// Values of `PROCESSES`, by process id in the agent's pid namespace. What has no entry is reported: user space decides.
pub mod verdict {
    /// Lines are reported.
    pub const REPORT: u32 = 1;
    /// Switched off for its namespace.
    pub const OFF: u32 = 2;
    /// Another program that reads lines with the same library.
    pub const OTHER_PROGRAM: u32 = 3;
}

/// Indices of `STATS`.
pub mod stat {
    /// Lines read, by whatever process.
    pub const LINES: u32 = 0;
    /// Of them: empty.
    pub const EMPTY: u32 = 1;
    /// Switched off.
    pub const OFF: u32 = 2;
    /// Of another program.
    pub const OTHER_PROGRAM: u32 = 3;
    /// Of a process outside the agent's pid namespace.
    pub const OTHER_NODE: u32 = 4;
    /// Lost: no room in the ring.
    pub const RING_FULL: u32 = 5;
    /// Lost: the process's memory could not be read.
    pub const UNREADABLE: u32 = 6;
    /// Starts and ends of processes that found no room in the ring.
    pub const PROCESSES_MISSED: u32 = 7;
    /// How many there are.
    pub const COUNT: u32 = 8;
}

/// Start of every event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct EventHead {
    /// [`EVENT_VERSION`].
    pub version: u16,
    /// See [`event`].
    pub kind: u16,
    /// Process id in the agent's pid namespace.
    pub pid: u32,
    /// Monotonic time, nanoseconds.
    pub time_ns: u64,
}

/// What is told of a line; its text follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LineHead {
    /// Start.
    pub head: EventHead,
    /// Real user id, in the machine's user namespace.
    pub uid: u32,
    /// Bytes of text, its end excluded.
    pub length: u16,
    /// 1 if the line was longer.
    pub cut: u16,
}

/// A line that fits into [`SHORT`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ShortLine {
    /// What is told of it.
    pub line: LineHead,
    /// Text; what follows its end is undefined.
    pub text: [u8; SHORT],
}

/// A longer one.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LongLine {
    /// What is told of it.
    pub line: LineHead,
    /// Text; what follows its end is undefined.
    pub text: [u8; LONG],
}

/// Where to find a process's id in the agent's pid namespace. Offsets are from BTF; not used while `pidns` is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BashConfig {
    /// Inode number of the agent's pid namespace; 0 if it is the machine's first.
    pub pidns: u32,
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
    /// `pid_namespace.ns.inum` (u32)
    pub pidns_inum: u32,
}

const _: () = {
    assert!(size_of::<EventHead>() == 16);
    assert!(size_of::<LineHead>() == 24);
    assert!(size_of::<ShortLine>() == 256);
    assert!(size_of::<LongLine>() == 24 + LONG);
    assert!(size_of::<BashConfig>() == 36);
};

#[cfg(feature = "user")]
mod pod {
    use super::BashConfig;

    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for BashConfig {}
}
