//! `httpflow-tls` of plugin `ebpf-net`: HTTP exchanges inside TLS, from the plain text that processes give to their libraries
//! and get from them.
//!
//! ```text
//! processes ▶ [`find`]: which files ▶ [`targets`]: which functions ▶ probes, once per file
//! ring ▶ as of `httpflow`: connections ▶ sessions ▶ rows
//! ```
//! Connections, exchanges and rows are `capture::http`'s. Entry: [`TlsCapture`] as a `Beside`.

pub mod blind;
mod find;
mod go;
mod metrics;
mod sockets;
#[cfg(test)]
mod switch_tests;
mod targets;
mod users;

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use api::L7Flow;
use aya::maps::{MapData, RingBuf};
use ebpf_common::{
    http::{HttpConfig, stat as http_stat},
    net::policy,
    tls::{PROCESS_VERSION, ProcessEvent, process, stat},
};
use telemetry::Telemetry;

pub use self::metrics::TlsMetrics;
use self::{
    blind::Reason,
    find::{Finder, Standing},
};
use crate::{
    capture::{
        http::{Capture, From, Source, Turn, With, wait_for},
        whose::Policy,
    },
    ebpf::{
        capability::{Capabilities, State},
        http::LoadOptions,
        sys::ProgramStats,
        tls::{self, TlsObject},
    },
    identity::process::Proc,
};

/// The capture of what is inside TLS.
pub type TlsCapture = Capture<Libraries>;

/// Pause between looks at all processes, for libraries that were loaded late, and what was missed.
const SWEEP: Duration = Duration::from_secs(10);
/// The same where the kernel does not tell of starts.
const SWEEP_OFTEN: Duration = Duration::from_secs(1);
/// Starts and ends taken before other things have their turn.
const TURN: usize = 16_384;

/// Libraries of TLS as a source of plain text.
pub struct Libraries {
    object: TlsObject,
    finder: Option<Finder>,
    swept: Instant,
    sweep: Duration,
    /// Started or ended without being told.
    missed: bool,
    metrics: TlsMetrics,
    before: [u64; stat::COUNT as usize],
}

impl Source for Libraries {
    const NAME: &'static str = tls::TLS;
    const FLOW: u32 = policy::HTTPFLOW_TLS;
    const STAGES: (&'static str, &'static str) = ("capture.tls", "agent.httpflow_tls");
    const METRICS: &'static str = "httpflow_tls";
    const FROM: From = From::Calls;
    type Metrics = TlsMetrics;

    fn metrics(telemetry: &Telemetry) -> TlsMetrics {
        TlsMetrics::new(telemetry)
    }

    fn load(options: &LoadOptions, config: HttpConfig) -> anyhow::Result<Self> {
        Ok(Self {
            object: tls::load(options, config)?,
            finder: None,
            swept: Instant::now(),
            sweep: SWEEP,
            missed: false,
            metrics: TlsMetrics::default(),
            before: [0; stat::COUNT as usize],
        })
    }

    fn begin(&mut self, with: With<'_, TlsMetrics>, capabilities: &mut Capabilities) -> anyhow::Result<()> {
        self.object.attach(with.refuse, capabilities)?;
        if capabilities.state(tls::STARTS) != State::On {
            self.sweep = SWEEP_OFTEN;
        }
        self.metrics = with.metrics;
        let policy = Policy::new(with.cluster, |on| on.l7.contains(&L7Flow::HttpTls));
        let mut finder = Finder::new(Proc::new(with.proc), policy);
        finder.sweep(&mut self.object);
        self.swept = Instant::now();
        let counts = finder.counts();
        tracing::info!(
            processes = counts.processes,
            files = counts.files,
            kinds = finder.kinds().join(", "),
            "Looked for libraries of TLS"
        );
        self.metrics.processes(counts, finder.blind());
        self.finder = Some(finder);
        Ok(())
    }

    fn detach(&mut self) {
        if let Some(finder) = &mut self.finder {
            finder.unprobe();
        }
        self.object.detach();
    }

    fn turn(&mut self, _proc: &Proc, _capabilities: &mut Capabilities) -> Turn {
        let Some(finder) = &mut self.finder else {
            return Turn::default();
        };
        let mut turn = Turn::default();
        for _ in 0..TURN {
            let Some(bytes) = self.object.starts.next() else { break };
            match event(&bytes) {
                Some((process::EXEC, pid)) if finder.started(pid) => turn.ended.push(pid),
                Some((process::EXIT, pid)) if finder.forget(pid) => turn.ended.push(pid),
                Some(_) => {}
                None => self.missed = true,
            }
        }
        turn.look_again = finder.look_again(&mut self.object);
        let now = Instant::now();
        let switched = finder.policy.changed();
        if switched {
            finder.doubt();
        }
        if switched || self.missed || now >= self.swept + self.sweep {
            (self.swept, self.missed) = (now, false);
            turn.look_again |= finder.sweep(&mut self.object);
            self.metrics.processes(finder.counts(), finder.blind());
        }
        finder.expire(now);
        turn
    }

    fn wait(&mut self, time: Duration) {
        let next = self.finder.as_ref().and_then(Finder::next_look);
        let time = next.map_or(time, |next| next.saturating_duration_since(Instant::now()).min(time));
        wait_for([self.object.events.as_raw_fd(), self.object.starts.as_raw_fd()], time);
    }

    fn own_pid_namespace(&mut self) -> anyhow::Result<(u64, u32)> {
        self.object.own_pid_namespace()
    }

    fn set_config(&mut self, config: HttpConfig) -> anyhow::Result<()> {
        self.object.set_config(config)
    }

    fn policy(&self) -> anyhow::Result<OwnedFd> {
        self.object.policy()
    }

    fn quit(&mut self, cookie: u64) -> anyhow::Result<()> {
        self.object.quit(cookie)
    }

    fn stats(&mut self) -> anyhow::Result<[u64; http_stat::COUNT as usize]> {
        let all = self.object.stats()?;
        self.missed |= self.metrics.kernel(&self.before, &all) > 0;
        self.before = all;
        let mut common = [0; http_stat::COUNT as usize];
        for (to, from) in common.iter_mut().zip(all) {
            *to = from;
        }
        Ok(common)
    }

    fn events(&mut self) -> &mut RingBuf<MapData> {
        &mut self.object.events
    }

    fn programs(&self) -> Vec<(String, ProgramStats)> {
        self.object.programs()
    }
}

/// Processes whose plain text is not seen, whether they hold TCP sockets, and why.
///
/// Those that hold sockets and have nothing to do with any known TLS are among them, as theirs may be one of their own.
pub fn unseen(libraries: &Libraries, proc: &Proc) -> Vec<(u32, bool, Reason)> {
    let Some(finder) = &libraries.finder else {
        return Vec::new();
    };
    let mut sockets = sockets::Sockets::new(proc);
    let own = std::process::id();
    let mut all = Vec::new();
    for (pid, standing) in finder.all().filter(|(pid, _)| *pid != own) {
        match standing {
            Standing::Seen => {}
            Standing::Blind(reason) => all.push((pid, sockets.holds_tcp(pid), reason)),
            Standing::Nothing if sockets.holds_tcp(pid) => all.push((pid, true, Reason::NothingKnown)),
            Standing::Nothing => {}
        }
    }
    all
}

/// Kind and process of an event; `None` if it is of another build.
fn event(bytes: &[u8]) -> Option<(u16, u32)> {
    let bytes = bytes.get(..size_of::<ProcessEvent>())?;
    // SAFETY: long enough; integers only; unaligned reads are allowed here.
    let event: ProcessEvent = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
    (event.version == PROCESS_VERSION).then_some((event.kind, event.pid))
}
