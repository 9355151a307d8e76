//! Asks the kernel what its BPF programs cost: a source outside of the agent.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

const BPF_PROG_LOAD: i64 = 5;
const BPF_PROG_TEST_RUN: i64 = 10;
const BPF_PROG_GET_NEXT_ID: i64 = 11;
const BPF_PROG_GET_FD_BY_ID: i64 = 13;
const BPF_OBJ_GET_INFO_BY_FD: i64 = 15;
const BPF_ENABLE_STATS: i64 = 32;

/// What one program did since it was loaded, while statistics were enabled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Program {
    /// Name, at most 15 bytes.
    pub(super) name: String,
    /// Time spent, nanoseconds.
    pub(super) run_time_ns: u64,
    /// Number of runs.
    pub(super) runs: u64,
    /// Instructions that the verifier looked at; 0 before Linux 5.16.
    pub(super) verified_insns: u32,
}

/// Statistics are enabled as long as this lives.
#[derive(Debug)]
pub(super) struct Statistics {
    _fd: OwnedFd,
}

fn bpf(command: i64, attributes: &mut [u32; 32]) -> io::Result<i64> {
    let size = size_of_val(attributes);
    // SAFETY: the attributes are zeroed beyond what the command uses, and outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn attributes(words: &[u32]) -> [u32; 32] {
    let mut all = [0; 32];
    all.iter_mut().zip(words).for_each(|(slot, word)| *slot = *word);
    all
}

fn owned(fd: i64) -> Result<OwnedFd> {
    let fd = i32::try_from(fd).context("descriptor out of range")?;
    // SAFETY: just returned by the kernel, and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Statistics {
    /// Makes the kernel measure every run of every program (some 20 ns each).
    ///
    /// # Errors
    /// Not permitted, or Linux before 5.8.
    pub(super) fn enable() -> Result<Self> {
        let fd = bpf(BPF_ENABLE_STATS, &mut attributes(&[0])).context("enabling BPF run-time statistics")?;
        Ok(Self { _fd: owned(fd)? })
    }
}

/// Rates are those of programs that are not measured: statistics add 25 to 35 ns to each run.
///
/// # Errors
/// If they are on for the whole machine.
pub(super) fn statistics_are_off() -> Result<()> {
    const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
    // Kernels without the switch have no statistics.
    let on = std::fs::read_to_string(SWITCH).is_ok_and(|value| value.trim() != "0");
    anyhow::ensure!(
        !on,
        "{SWITCH} is on: each run of each BPF program costs more, and rates with the agent come out too low; switch it off \
         by `sysctl kernel.bpf_stats_enabled=0`"
    );
    Ok(())
}

/// What the statistics say of an empty program, nanoseconds per run: their own cost, part of each run of any program.
///
/// # Errors
/// Not permitted.
pub(super) fn cost_of_nothing(_enabled: &Statistics) -> Result<f64> {
    const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
    const REPEAT: u32 = 2_000_000;
    // r0 = 0; exit.
    let code: [u64; 2] = [0xb7, 0x95];
    let license = *b"GPL\0";
    let packet = [0_u8; 64];
    let words = |address: usize| -> [u32; 2] {
        let bytes = (address as u64).to_ne_bytes();
        let [a, b, c, d, e, f, g, h] = bytes;
        [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
    };
    let ([code_0, code_1], [license_0, license_1]) = (words(code.as_ptr() as usize), words(license.as_ptr() as usize));
    let program = owned(
        bpf(
            BPF_PROG_LOAD,
            &mut attributes(&[BPF_PROG_TYPE_SOCKET_FILTER, 2, code_0, code_1, license_0, license_1]),
        )
        .context("loading an empty BPF program")?,
    )?;
    let fd = u32::try_from(program.as_raw_fd()).context("descriptor out of range")?;
    let [packet_0, packet_1] = words(packet.as_ptr() as usize);
    let size = u32::try_from(packet.len()).context("packet too large")?;
    // prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat.
    bpf(
        BPF_PROG_TEST_RUN,
        &mut attributes(&[fd, 0, size, 0, packet_0, packet_1, 0, 0, REPEAT]),
    )
    .context("running an empty BPF program")?;
    let program = info(&program)?;
    anyhow::ensure!(program.runs > 0, "the kernel counted no run of an empty BPF program");
    Ok(program.run_time_ns as f64 / program.runs as f64)
}

/// All programs of the machine by id.
///
/// # Errors
/// Not permitted.
pub(super) fn programs() -> Result<BTreeMap<u32, Program>> {
    let mut all = BTreeMap::new();
    let mut id = 0;
    loop {
        let mut next = attributes(&[id]);
        match bpf(BPF_PROG_GET_NEXT_ID, &mut next) {
            Ok(_) => id = next.get(1).copied().unwrap_or(0),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(error) => return Err(error).context("listing BPF programs"),
        }
        // A program may be gone between the two calls.
        if let Ok(fd) = bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes(&[id])) {
            all.insert(id, info(&owned(fd)?)?);
        }
    }
}

fn info(program: &OwnedFd) -> Result<Program> {
    // struct bpf_prog_info, as far as verified_insns (byte 216).
    let mut buffer = [0_u8; 256];
    let address = buffer.as_mut_ptr() as u64;
    let fd = u32::try_from(program.as_raw_fd()).context("descriptor out of range")?;
    let length = u32::try_from(buffer.len()).context("buffer too large")?;
    // Little and big endian machines store the two halves of the pointer in different order.
    let [low, high] = if cfg!(target_endian = "little") {
        [address as u32, (address >> 32) as u32]
    } else {
        [(address >> 32) as u32, address as u32]
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes(&[fd, length, low, high])).context("asking for a BPF program")?;
    let word = |at: usize| {
        buffer
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_ne_bytes)
    };
    let half = |at: usize| {
        buffer
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    let name = buffer.get(64..80).unwrap_or_default();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Program {
        name: String::from_utf8_lossy(name).into_owned(),
        run_time_ns: word(192),
        runs: word(200),
        verified_insns: half(216),
    })
}
