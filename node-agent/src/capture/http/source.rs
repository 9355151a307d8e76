//! Where the bytes of connections come from.

use std::{
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    path::Path,
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use ebpf_common::{
    http::{HttpConfig, stat},
    net::policy,
};
use telemetry::Telemetry;

use super::HTTPFLOW;
use crate::{
    capture::ebpf_net::InCluster,
    ebpf::{
        capability::Capabilities,
        entry::Entry,
        http::{self, HttpObject, LoadOptions},
        sys::ProgramStats,
    },
    identity::process::Proc,
};

/// What a source begins with.
pub struct With<'a, M> {
    /// `/proc` of the host's pid namespace.
    pub proc: &'a Path,
    /// Programs to treat as refused.
    pub refuse: &'a [String],
    /// In a cluster: what is on for whom.
    pub cluster: Option<InCluster>,
    /// Its own metrics.
    pub metrics: M,
    /// The way into the hooks of `ebpf-net`.
    pub entry: Entry,
}

/// What came of a source's turn.
#[derive(Debug, Default)]
pub struct Turn {
    /// Processes that ended: so did their connections.
    pub ended: Vec<u32>,
    /// Sockets and connections that the kernel side gave up may be of interest now.
    pub look_again: bool,
    /// What works has changed.
    pub changed: bool,
}

/// Whether bytes come as packets do, or as a process gives and takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Those into a socket may overtake each other; each has a socket.
    Packets,
    /// In order both ways; the socket may become known later.
    Calls,
}

/// A kernel object that tells what connections carry, in the events of `ebpf_common::http`.
pub trait Source: Sized + Send + 'static {
    /// Name of the feature, the thread, the health.
    const NAME: &'static str;
    /// Bit of `ebpf_common::net::policy`.
    const FLOW: u32;
    /// Stages of the ledger: of events, of rows.
    const STAGES: (&'static str, &'static str);
    /// First word of the metrics.
    const METRICS: &'static str;
    /// How its bytes come.
    const FROM: From;
    /// Metrics of its own.
    type Metrics: Clone + Send + 'static;

    /// Registers them.
    fn metrics(telemetry: &Telemetry) -> Self::Metrics;
    /// Loads the object; nothing is attached yet.
    ///
    /// # Errors
    /// If it is of no use on this machine.
    fn load(options: &LoadOptions, config: HttpConfig) -> anyhow::Result<Self>;
    /// Begins to look.
    ///
    /// # Errors
    /// If nothing can be seen on this machine.
    fn begin(&mut self, with: With<'_, Self::Metrics>, capabilities: &mut Capabilities) -> anyhow::Result<()>;
    /// Ends to look; maps stay.
    fn detach(&mut self);
    /// Does what is due besides events.
    fn turn(&mut self, _proc: &Proc, _capabilities: &mut Capabilities) -> Turn {
        Turn::default()
    }
    /// Waits until there is something to do, but not for longer than `time`.
    fn wait(&mut self, time: Duration);
    /// Where this process's pid namespace is, and its level.
    ///
    /// # Errors
    /// If the kernel refuses to look.
    fn own_pid_namespace(&mut self) -> anyhow::Result<(u64, u32)>;
    /// Changes the running programs' settings.
    ///
    /// # Errors
    /// If the kernel refuses.
    fn set_config(&mut self, config: HttpConfig) -> anyhow::Result<()>;
    /// The map of what is switched on for whom.
    ///
    /// # Errors
    /// If there is no descriptor left.
    fn policy(&self) -> anyhow::Result<OwnedFd>;
    /// Says that a connection is followed no longer.
    ///
    /// # Errors
    /// If the kernel refuses.
    fn quit(&mut self, cookie: u64) -> anyhow::Result<()>;
    /// Counters of `ebpf_common::http::stat`.
    ///
    /// # Errors
    /// If they cannot be read.
    fn stats(&mut self) -> anyhow::Result<[u64; stat::COUNT as usize]>;
    /// The ring.
    fn events(&mut self) -> &mut RingBuf<MapData>;
    /// Kernel statistics of each program.
    fn programs(&self) -> Vec<(String, ProgramStats)>;
}

/// Waits for bytes to read.
pub(in crate::capture) fn wait_for<const N: usize>(descriptors: [RawFd; N], time: Duration) {
    let mut polls = descriptors.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // A rest of less than a millisecond is one.
    let timeout = i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: as many valid pollfds as it says.
    unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, timeout) };
}

impl Source for HttpObject {
    const NAME: &'static str = HTTPFLOW;
    const FLOW: u32 = policy::HTTPFLOW;
    const STAGES: (&'static str, &'static str) = ("capture.http", "agent.httpflow");
    const METRICS: &'static str = "httpflow";
    const FROM: From = From::Packets;
    type Metrics = ();

    fn metrics(_telemetry: &Telemetry) {}

    fn load(options: &LoadOptions, config: HttpConfig) -> anyhow::Result<Self> {
        http::load(options, config)
    }

    fn begin(&mut self, with: With<'_, ()>, capabilities: &mut Capabilities) -> anyhow::Result<()> {
        self.attach(&with.entry, capabilities)?;
        self.mark_older_in_time(&Proc::new(with.proc), capabilities);
        Ok(())
    }

    fn turn(&mut self, proc: &Proc, capabilities: &mut Capabilities) -> Turn {
        Turn {
            changed: self.mark_older_in_time(proc, capabilities),
            ..Turn::default()
        }
    }

    fn detach(&mut self) {
        Self::detach(self);
    }

    fn wait(&mut self, time: Duration) {
        wait_for([self.events.as_raw_fd()], time);
    }

    fn own_pid_namespace(&mut self) -> anyhow::Result<(u64, u32)> {
        Self::own_pid_namespace(self)
    }

    fn set_config(&mut self, config: HttpConfig) -> anyhow::Result<()> {
        Self::set_config(self, config)
    }

    fn policy(&self) -> anyhow::Result<OwnedFd> {
        Self::policy(self)
    }

    fn quit(&mut self, cookie: u64) -> anyhow::Result<()> {
        Self::quit(self, cookie)
    }

    fn stats(&mut self) -> anyhow::Result<[u64; stat::COUNT as usize]> {
        Self::stats(self)
    }

    fn events(&mut self) -> &mut RingBuf<MapData> {
        &mut self.events
    }

    fn programs(&self) -> Vec<(String, ProgramStats)> {
        Self::programs(self)
    }
}
