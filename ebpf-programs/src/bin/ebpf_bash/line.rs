//! Lines, where `readline` returns them: at its return instructions, where the value is what the caller will get.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_uid_gid, generated},
    macros::uprobe,
    programs::{ProbeContext, RetProbeContext},
};
use ebpf_common::bash::{LONG, LineHead, LongLine, SHORT, ShortLine, event, stat, verdict};
use ebpf_programs::stack::stay_on_own;

use crate::{
    maps::{EVENTS, PROCESSES, count},
    process::{current_pid, head},
};

/// What became of a line.
enum Read {
    /// Bytes, its end included.
    Whole(u32),
    /// There is no room for all of it.
    Longer,
    Nothing,
}

/// Return of `char *readline(const char *prompt)`: a line, or null at the end of input.
#[uprobe]
pub(crate) fn readline_return(ctx: ProbeContext) -> u32 {
    stay_on_own();
    let line: u64 = RetProbeContext::new(ctx.as_ptr()).ret();
    if line != 0 {
        count(stat::LINES);
        took(line);
    }
    0
}

#[inline(always)]
fn took(line: u64) {
    let Some(pid) = current_pid() else {
        count(stat::OTHER_NODE);
        return;
    };
    if let Some(verdict) = PROCESSES.get_ptr(pid) {
        // SAFETY: a live map value.
        match unsafe { *verdict } {
            verdict::OFF => return count(stat::OFF),
            verdict::OTHER_PROGRAM => return count(stat::OTHER_PROGRAM),
            _ => {}
        }
    }
    // Most are short, and take a sixteenth of the room.
    let Some(mut entry) = EVENTS.reserve::<ShortLine>(0) else {
        return count(stat::RING_FULL);
    };
    let event = entry.as_mut_ptr();
    // SAFETY: reserved memory of that size; the text is written by the helper.
    let read = unsafe { read_line((&raw mut (*event).text).cast(), SHORT as u32, line) };
    if let Read::Whole(size) = read {
        // SAFETY: as above.
        unsafe { (*event).line = line_head(event::SHORT_LINE, pid, size, false) };
        entry.submit(0);
        return;
    }
    entry.discard(0);
    if let Read::Longer = read {
        took_long(line, pid);
    }
}

#[inline(always)]
fn took_long(line: u64, pid: u32) {
    let Some(mut entry) = EVENTS.reserve::<LongLine>(0) else {
        return count(stat::RING_FULL);
    };
    let event = entry.as_mut_ptr();
    // SAFETY: reserved memory of that size; the text is written by the helper.
    let read = unsafe { read_line((&raw mut (*event).text).cast(), LONG as u32, line) };
    let (size, cut) = match read {
        Read::Whole(size) => (size, false),
        // It fits if its end is just where there is no more room.
        Read::Longer => (LONG as u32, byte_at(line + LONG as u64 - 1) != 0),
        Read::Nothing => {
            entry.discard(0);
            return;
        }
    };
    // SAFETY: as above.
    unsafe { (*event).line = line_head(event::LONG_LINE, pid, size, cut) };
    entry.submit(0);
}

/// Reads a line to `to`, which has room for `room` bytes.
///
/// # Safety
/// `to` is writable for `room` bytes.
#[inline(always)]
unsafe fn read_line(to: *mut u8, room: u32, line: u64) -> Read {
    // SAFETY: as demanded of the caller; the helper checks the source.
    let size = unsafe { generated::bpf_probe_read_user_str(to.cast(), room, line as *const _) };
    if size < 0 {
        count(stat::UNREADABLE);
        Read::Nothing
    } else if size <= 1 {
        count(stat::EMPTY);
        Read::Nothing
    } else if size as u32 >= room {
        Read::Longer
    } else {
        Read::Whole(size as u32)
    }
}

/// A byte of the process, zero if it cannot be read.
#[inline(always)]
fn byte_at(address: u64) -> u8 {
    let mut byte = 0u8;
    // SAFETY: writes one byte; the helper checks the source.
    unsafe { generated::bpf_probe_read_user((&raw mut byte).cast(), 1, address as *const _) };
    byte
}

#[inline(always)]
fn line_head(kind: u16, pid: u32, size: u32, cut: bool) -> LineHead {
    LineHead {
        head: head(kind, pid),
        uid: bpf_get_current_uid_gid() as u32,
        length: (size - 1) as u16,
        cut: cut as u16,
    }
}
