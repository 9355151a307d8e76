//! Metrics of the process itself, read from `/proc/self` at each scrape, under the names every exporter uses.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// CPU time, memory, descriptors and start time of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ProcessStats {
    /// CPU time used so far, user and system, in seconds.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// Threads.
    pub threads: u64,
    /// Start of the process, seconds since the epoch.
    pub start_time_seconds: f64,
}

impl ProcessStats {
    /// Reads them now; `None` where `/proc` is not readable or not understood.
    #[must_use]
    pub fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The command name may hold spaces and parentheses: fields are counted from the last `)`; the first one after
        // it is field 3 (state) of proc(5).
        let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let ticks = sysconf(libc::_SC_CLK_TCK)?;
        let boot = boot_time_seconds()?;
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) as f64 / ticks as f64,
            resident_bytes: field(24)? * sysconf(libc::_SC_PAGESIZE)?,
            open_fds: fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            threads: field(20)?,
            start_time_seconds: boot as f64 + field(22)? as f64 / ticks as f64,
        })
    }
}

fn sysconf(name: libc::c_int) -> Option<u64> {
    // SAFETY: sysconf reads a constant of the system and touches no memory of ours.
    u64::try_from(unsafe { libc::sysconf(name) })
        .ok()
        .filter(|value| *value > 0)
}

fn boot_time_seconds() -> Option<u64> {
    fs::read_to_string("/proc/stat")
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}

#[derive(Debug)]
pub(crate) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(stats) = ProcessStats::read() else {
            return Ok(());
        };
        ConstCounter::new(stats.cpu_seconds).encode(encoder.encode_descriptor(
            "process_cpu_seconds",
            "CPU time used, user and system",
            None,
            MetricType::Counter,
        )?)?;
        let mut gauge = |name: &str, help: &str, value: f64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        gauge(
            "process_resident_memory_bytes",
            "Resident memory",
            stats.resident_bytes as f64,
        )?;
        gauge("process_open_fds", "Open file descriptors", stats.open_fds as f64)?;
        gauge("process_threads", "Threads", stats.threads as f64)?;
        gauge(
            "process_start_time_seconds",
            "Start of the process since the epoch",
            stats.start_time_seconds,
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn agrees_with_what_the_test_does() {
        let before = ProcessStats::read().unwrap();
        let files: Vec<_> = (0..50).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect();
        let mut block = vec![0_u8; 64 << 20];
        block.iter_mut().step_by(1024).for_each(|byte| *byte = 1);
        let after = ProcessStats::read().unwrap();
        // Other tests of this process run beside this one and close files of their own.
        assert!(
            after.open_fds + 20 >= before.open_fds + files.len() as u64,
            "{before:?} {after:?}"
        );
        assert!(
            after.resident_bytes > before.resident_bytes + (48 << 20),
            "{before:?} {after:?}"
        );
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let rss = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"))
            .unwrap();
        let rss = rss.trim().parse::<u64>().unwrap() << 10;
        assert!(
            after.resident_bytes.abs_diff(rss) < 32 << 20,
            "{after:?}, status says {rss}"
        );
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(
            (now - 86_400.0..now + 2.0).contains(&after.start_time_seconds),
            "{after:?} at {now}"
        );
        assert!(after.cpu_seconds >= before.cpu_seconds && after.threads >= 1);
    }
}
