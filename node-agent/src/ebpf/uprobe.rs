//! Probes at instructions of programs and libraries, for all processes that use the file.
//!
//! ```text
//! best:  link "uprobe_multi" (6.6 and later): takes the rights that loading took
//! else:  performance event of the PMU "uprobe": kernels since July 2025 want CAP_SYS_ADMIN for it
//! ```
//! aya 0.14 knows the second only; a program for the first is put together from the same object here. Entry:
//! [`Probes::load`].

use std::{
    collections::HashSet,
    ffi::CString,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf,
    maps::Map,
    programs::uprobe::{UProbe, UProbeLink, UProbeScope},
};
use aya_obj::generated::{bpf_attach_type::BPF_TRACE_UPROBE_MULTI, bpf_prog_type::BPF_PROG_TYPE_KPROBE};

const BPF_PROG_LOAD: i64 = 5;
const BPF_LINK_CREATE: i64 = 28;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;

/// `struct { ... }` of `BPF_PROG_LOAD` in `union bpf_attr`, up to what is used.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// `link_create` with `uprobe_multi` of `union bpf_attr`.
#[repr(C)]
struct MultiAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    ref_ctr_offsets: u64,
    cookies: u64,
    count: u32,
    multi_flags: u32,
    pid: u32,
    _pad: u32,
}

/// A loaded program, to be attached any number of times.
#[derive(Debug)]
pub struct Probes {
    name: &'static str,
    at: At,
    multi: Option<OwnedFd>,
}

/// What of a function a program is run at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// An instruction.
    Instruction,
    /// The return of the function that begins there (`uretprobe`).
    Return,
}

/// One attachment; dropping it takes it away.
#[derive(Debug)]
pub struct Attached {
    _how: How,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held until dropped")]
enum How {
    Multi(OwnedFd),
    Perf(Vec<UProbeLink>),
}

impl Probes {
    /// Loads the program `name` of `object`, whose maps `ebpf` has made, for the best way that this kernel has and allows.
    ///
    /// # Errors
    /// If there is none; the message says why each is refused.
    pub fn load(object: &[u8], ebpf: &mut Ebpf, name: &'static str, at: At) -> anyhow::Result<Self> {
        let mut this = Self { name, at, multi: None };
        let multi = load_multi(object, ebpf, name).and_then(|program| {
            this.multi = Some(program);
            this.try_out(ebpf)
        });
        let Err(multi) = multi else { return Ok(this) };
        this.multi = None;
        let program: &mut UProbe = program(ebpf, name)?;
        let perf = program.load().map_err(anyhow::Error::from);
        perf.and_then(|()| this.try_out(ebpf)).map_err(|perf| {
            anyhow!(
                "uprobe_multi (kernels from 6.6 on): {multi:#}; PMU uprobe (kernels since July 2025 want CAP_SYS_ADMIN): \
                 {perf:#}"
            )
        })?;
        Ok(this)
    }

    /// How probes are attached.
    #[must_use]
    pub fn hook(&self) -> &'static str {
        if self.multi.is_some() {
            "uprobe by uprobe_multi"
        } else {
            "uprobe by perf event"
        }
    }

    /// The program, if it is not one that aya loaded.
    #[must_use]
    pub fn program(&self) -> Option<BorrowedFd<'_>> {
        self.multi.as_ref().map(|program| program.as_fd())
    }

    /// Attaches to the instructions at `offsets` of an open file.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(&self, ebpf: &mut Ebpf, file: BorrowedFd<'_>, offsets: &[u64]) -> anyhow::Result<Attached> {
        // The open file itself, whatever its path leads to by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let how = match &self.multi {
            Some(program) => How::Multi(link_multi(program.as_fd(), &path, offsets, self.at)?),
            None => {
                let program: &mut UProbe = program(ebpf, self.name)?;
                let attach = |offset: &u64| {
                    let id = program.attach(*offset, Path::new(&path), UProbeScope::AllProcesses)?;
                    program.take_link(id)
                };
                How::Perf(offsets.iter().map(attach).collect::<Result<_, _>>()?)
            }
        };
        Ok(Attached { _how: how })
    }

    /// Attaches to a function of this process that is never called.
    fn try_out(&self, ebpf: &mut Ebpf) -> anyhow::Result<()> {
        let offset = own_offset(never_called as *const () as u64)?;
        let file = std::fs::File::open("/proc/self/exe").context("cannot open the agent's own program")?;
        self.attach(ebpf, file.as_fd(), &[offset]).map(drop)
    }
}

/// What is tried out on.
#[inline(never)]
extern "C" fn never_called() -> u32 {
    std::hint::black_box(1)
}

/// Where in the file of this program an address of it is.
fn own_offset(address: u64) -> anyhow::Result<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").context("cannot read /proc/self/maps")?;
    let found = maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(words.nth(1)?)?);
        (start..end).contains(&address).then(|| address - start + offset)
    });
    found.context("the agent's own code is in no mapping")
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> anyhow::Result<&'e mut UProbe> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("object has no program {name}"))?;
    Ok(program.try_into()?)
}

fn load_multi(object: &[u8], ebpf: &Ebpf, name: &str) -> anyhow::Result<OwnedFd> {
    let mut object = aya_obj::Object::parse(object).context("cannot read the object")?;
    let maps: Vec<(String, aya_obj::Map)> = object.maps.drain().collect();
    let fds = maps.iter().map(|(name, map)| {
        let made = ebpf.map(name).ok_or_else(|| anyhow!("object has no map {name}"))?;
        let fd = match made {
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::PerCpuArray(data)
            | Map::RingBuf(data)
            | Map::SkStorage(data) => data.fd(),
            _ => return Err(anyhow!("map {name} has an unexpected type")),
        };
        Ok((name.as_str(), fd.as_fd().as_raw_fd(), map))
    });
    let fds = fds.collect::<anyhow::Result<Vec<_>>>()?;
    let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_maps(fds.into_iter(), &text)?;
    object.relocate_calls(&text)?;
    let program = object
        .programs
        .get(name)
        .ok_or_else(|| anyhow!("object has no program {name}"))?;
    let function = object
        .functions
        .get(&program.function_key())
        .ok_or_else(|| anyhow!("object has no code of {name}"))?;
    let mut prog_name = [0u8; 16];
    prog_name
        .iter_mut()
        .take(15)
        .zip(name.bytes())
        .for_each(|(to, from)| *to = from);
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_KPROBE as u32,
        insn_cnt: u32::try_from(function.instructions.len())?,
        insns: function.instructions.as_ptr() as u64,
        license: program.license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_TRACE_UPROBE_MULTI as u32,
    };
    // SAFETY: the attribute is the kernel's layout; instructions, license (a C string) and map descriptors live.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) };
    owned(fd).context("BPF_PROG_LOAD")
}

fn link_multi(program: BorrowedFd<'_>, path: &str, offsets: &[u64], at: At) -> anyhow::Result<OwnedFd> {
    let path = CString::new(path)?;
    let attr = MultiAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: 0,
        attach_type: BPF_TRACE_UPROBE_MULTI as u32,
        flags: 0,
        path: path.as_ptr() as u64,
        offsets: offsets.as_ptr() as u64,
        ref_ctr_offsets: 0,
        cookies: 0,
        count: u32::try_from(offsets.len())?,
        multi_flags: match at {
            At::Instruction => 0,
            At::Return => BPF_F_UPROBE_MULTI_RETURN,
        },
        pid: 0,
        _pad: 0,
    };
    // SAFETY: the attribute is the kernel's layout; path and offsets live.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attr, size_of::<MultiAttr>()) };
    owned(fd).context("BPF_LINK_CREATE")
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: just made by the kernel, and nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
