//! The system calls of a first process, each as a small safe function.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use anyhow::{Context, Result};

/// Type, place and options of every file system a test may expect. What a kernel lacks is left out.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("devpts", "/dev/pts", ""),
    ("tmpfs", "/dev/shm", ""),
    ("tmpfs", "/tmp", ""),
    ("tmpfs", "/run", ""),
    ("debugfs", "/sys/kernel/debug", ""),
    ("tracefs", "/sys/kernel/tracing", ""),
    ("bpf", "/sys/fs/bpf", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
];

/// Mounts everything of [`MOUNTS`] that the kernel knows.
pub(crate) fn mount_all() {
    for (kind, place, options) in MOUNTS {
        // Directories below sysfs are the kernel's; creating them again is refused, which is fine.
        let _ = fs::create_dir_all(place);
        if let Err(error) = mount(kind, place, options) {
            // devtmpfs may be mounted by the kernel already.
            if error.raw_os_error() != Some(libc::EBUSY) {
                crate::say(&format!("vm-init: {kind} not mounted on {place}: {error}"));
            }
        }
    }
}

fn mount(kind: &str, place: &str, options: &str) -> io::Result<()> {
    let [kind, place, options] = [CString::new(kind)?, CString::new(place)?, CString::new(options)?];
    // SAFETY: all pointers are to NUL-terminated strings that live across the call.
    let result = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
    check(result)
}

/// Loads one uncompressed module.
pub(crate) fn load_module(path: &str) -> Result<()> {
    let file = File::open(path).context("opening")?;
    // SAFETY: the descriptor is open and the parameter string is NUL-terminated and static.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match (result, io::Error::last_os_error()) {
        (0, _) => Ok(()),
        (_, error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        (_, error) => Err(error.into()),
    }
}

/// Sets the loopback interface up; the kernel gives it 127.0.0.1 and ::1 itself.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    // SAFETY: plain system call; the result is checked before use.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor was just opened and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is a valid `ifreq` that lives across the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

/// Waits for any child to end.
pub(crate) fn wait_any() -> Result<(i32, ExitStatus)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        match check(pid) {
            Ok(()) => return Ok((pid, ExitStatus::from_raw(status))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("waiting for the command"),
        }
    }
}

/// Switches a terminal to pass bytes through unchanged.
pub(crate) fn make_raw(tty: &File) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `termios`.
    let mut settings: libc::termios = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open and `settings` is a valid place for the answer.
    check(unsafe { libc::tcgetattr(tty.as_raw_fd(), &raw mut settings) })?;
    // SAFETY: `settings` was filled above.
    unsafe { libc::cfmakeraw(&raw mut settings) };
    settings.c_cflag = (settings.c_cflag & !libc::CBAUD) | libc::B115200;
    // SAFETY: the descriptor is open and `settings` is valid.
    check(unsafe { libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, &raw const settings) })
}

/// Waits until everything written to a terminal has left the machine.
pub(crate) fn drain(tty: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    check(unsafe { libc::tcdrain(tty.as_raw_fd()) })
}

/// Ends the machine. Returns only when that failed, and then ends the process, which makes the kernel panic.
pub(crate) fn power_off() {
    // SAFETY: neither call takes a pointer.
    unsafe {
        libc::sync();
        libc::tcdrain(libc::STDOUT_FILENO);
        libc::reboot(libc::RB_POWER_OFF);
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
