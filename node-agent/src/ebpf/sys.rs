//! Calls to the kernel that aya does not offer: batched map access, program statistics, RCU grace periods.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};

use aya::Pod;
use aya_obj::generated::bpf_prog_info;

const BPF_OBJ_GET_INFO_BY_FD: i64 = 15;
const BPF_MAP_LOOKUP_BATCH: i64 = 24;
const BPF_MAP_LOOKUP_AND_DELETE_BATCH: i64 = 25;
const MEMBARRIER_CMD_GLOBAL: i64 = 1;

/// `struct { ... } batch` of `union bpf_attr`.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `struct { ... } info` of `union bpf_attr`.
#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// Walks a hash map in batches; one cursor per walk.
pub struct Batches<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
    cursor: [u64; 2],
    started: bool,
    done: bool,
    command: i64,
}

impl<K: Pod + Default, V: Pod + Default> Batches<K, V> {
    /// A walk that leaves the entries in the map.
    #[must_use]
    pub fn read(capacity: usize) -> Self {
        Self::new(capacity, BPF_MAP_LOOKUP_BATCH)
    }

    /// A walk that takes the entries out of the map.
    #[must_use]
    pub fn take(capacity: usize) -> Self {
        Self::new(capacity, BPF_MAP_LOOKUP_AND_DELETE_BATCH)
    }

    fn new(capacity: usize, command: i64) -> Self {
        Self {
            keys: vec![K::default(); capacity],
            values: vec![V::default(); capacity],
            cursor: [0; 2],
            started: false,
            done: false,
            command,
        }
    }

    /// Starts again from the beginning, keeping the buffers.
    pub fn rewind(&mut self) {
        self.started = false;
        self.done = false;
        self.cursor = [0; 2];
    }

    /// The next batch, `None` after the last one.
    ///
    /// # Errors
    /// What the system call said. `ENOSPC` is handled by growing the buffers.
    pub fn next<'a>(
        &'a mut self,
        map: BorrowedFd<'_>,
    ) -> io::Result<Option<impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V>>> {
        while !self.done {
            let mut next_cursor = [0u64; 2];
            let mut attr = BatchAttr {
                in_batch: if self.started { self.cursor.as_ptr() as u64 } else { 0 },
                out_batch: next_cursor.as_mut_ptr() as u64,
                keys: self.keys.as_mut_ptr() as u64,
                values: self.values.as_mut_ptr() as u64,
                count: u32::try_from(self.keys.len()).unwrap_or(u32::MAX),
                map_fd: map.as_raw_fd().cast_unsigned(),
                elem_flags: 0,
                flags: 0,
            };
            // SAFETY: the attribute is the kernel's layout; keys and values point at `count` elements each, the cursors
            // at 16 bytes, which is more than a hash map's cursor takes.
            let result = unsafe { libc::syscall(libc::SYS_bpf, self.command, &raw mut attr, size_of::<BatchAttr>()) };
            if result < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::ENOENT) => self.done = true,
                    // One bucket holds more than the buffer: nothing was copied nor deleted.
                    Some(libc::ENOSPC) => {
                        let grown = self.keys.len() * 2;
                        self.keys.resize(grown, K::default());
                        self.values.resize(grown, V::default());
                        continue;
                    }
                    Some(libc::EINTR | libc::EAGAIN) => continue,
                    _ => return Err(error),
                }
            }
            self.cursor = next_cursor;
            self.started = true;
            let count = attr.count as usize;
            if count > 0 {
                return Ok(Some(self.keys.iter().zip(&self.values).take(count)));
            }
        }
        Ok(None)
    }
}

const BPF_MAP_LOOKUP_ELEM: i64 = 1;
const BPF_MAP_UPDATE_ELEM: i64 = 2;
const BPF_MAP_DELETE_ELEM: i64 = 3;

/// `struct { ... }` of single-element commands in `union bpf_attr`.
#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The value of one key, `None` if there is none.
///
/// # Errors
/// What the system call said.
pub fn lookup<K: Pod, V: Pod + Default>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::default();
    let found = element(
        map,
        BPF_MAP_LOOKUP_ELEM,
        std::ptr::from_ref(key) as u64,
        (&raw mut value) as u64,
    )?;
    Ok(found.then_some(value))
}

/// Sets the value of one key.
///
/// # Errors
/// What the system call said; `E2BIG` if the map is full.
pub fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let (key, value) = (std::ptr::from_ref(key) as u64, std::ptr::from_ref(value) as u64);
    element(map, BPF_MAP_UPDATE_ELEM, key, value).map(drop)
}

/// Deletes one key; false if there is none.
///
/// # Errors
/// What the system call said.
pub fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    element(map, BPF_MAP_DELETE_ELEM, std::ptr::from_ref(key) as u64, 0)
}

fn element(map: BorrowedFd<'_>, command: i64, key: u64, value: u64) -> io::Result<bool> {
    let attr = ElemAttr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        _pad: 0,
        key,
        value,
        flags: 0,
    };
    // SAFETY: the attribute is the kernel's layout; the callers' generic types have the map's key and value sizes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attr, size_of::<ElemAttr>()) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOENT) {
        Ok(false)
    } else {
        Err(error)
    }
}

/// What the kernel knows of a loaded program.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProgramStats {
    /// Instructions the verifier walked.
    pub verified_insns: u32,
    /// Nanoseconds run, counted only while `kernel.bpf_stats_enabled` is 1.
    pub run_time_ns: u64,
    /// Runs, counted likewise.
    pub run_count: u64,
    /// Events missed because the program was already running on that CPU.
    pub recursion_misses: u64,
}

/// Statistics of a loaded program.
///
/// # Errors
/// What the system call said.
pub fn program_stats(fd: BorrowedFd<'_>) -> io::Result<ProgramStats> {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    let mut attr = InfoAttr {
        fd: fd.as_raw_fd().cast_unsigned(),
        len: u32::try_from(size_of::<bpf_prog_info>()).unwrap_or(u32::MAX),
        info: (&raw mut info) as u64,
    };
    // SAFETY: the attribute is the kernel's layout and `info` points at `len` writable bytes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET_INFO_BY_FD,
            &raw mut attr,
            size_of::<InfoAttr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ProgramStats {
        verified_insns: info.verified_insns,
        run_time_ns: info.run_time_ns,
        run_count: info.run_cnt,
        recursion_misses: info.recursion_misses,
    })
}

/// Waits until every kernel program that was running when this was called has ended.
pub fn wait_for_running_programs() {
    // MEMBARRIER_CMD_GLOBAL is synchronize_rcu(); programs run inside RCU read-side sections.
    // SAFETY: plain system call without pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        // Refused on nohz_full kernels: no program runs for anywhere near this long.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// User-mode and system CPU time of this thread.
#[must_use]
pub fn thread_cpu() -> Duration {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists and `ts` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut ts) };
    Duration::new(ts.tv_sec.cast_unsigned(), u32::try_from(ts.tv_nsec).unwrap_or(0))
}

/// Nanoseconds of `CLOCK_MONOTONIC`, the clock of `bpf_ktime_get_ns`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists and `ts` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut ts) };
    ts.tv_sec.cast_unsigned() * 1_000_000_000 + ts.tv_nsec.cast_unsigned()
}

/// Lets kernels before 5.11 lock the memory of maps; newer ones account it to the cgroup.
///
/// # Errors
/// What the system call said; without `CAP_SYS_RESOURCE` it is `EPERM`.
pub fn raise_memlock_limit() -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is a valid rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
