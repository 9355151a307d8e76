//! Options `sampling_rate` and `sampling_rate_pts_per_min`: which records are reported.
//!
//! ```text
//! batch ▶ share to keep (fixed, or what the last minute allows) ▶ each record by its own draw ▶ what is kept
//! ```
//! Each record is drawn by itself, so a sum over the records kept, divided by the share, has no bias whatever the size of
//! a batch. Time and chance are given, not taken: no I/O. Entry: [`Sampler::keep`].

use api::SamplingConfig;
use rand::Rng;
use records::RecordBatch;

/// Buckets that make up the minute looked back on.
const BUCKETS: usize = 60;
const BUCKET_NS: u64 = 1_000_000_000;

/// Draws records, and remembers how many came in the last minute.
#[derive(Debug)]
pub(super) struct Sampler<R> {
    chance: R,
    /// Records that came, by second of the last minute.
    came: [u64; BUCKETS],
    /// Second of the last batch, since an arbitrary start.
    second: u64,
}

impl<R: Rng> Sampler<R> {
    /// Nothing came yet.
    #[must_use]
    pub(super) fn new(chance: R) -> Self {
        Self {
            chance,
            came: [0; BUCKETS],
            second: 0,
        }
    }

    /// Takes the records out of `batch` that are not reported; returns their number. `now_ns` is monotonic.
    pub(super) fn keep(&mut self, batch: &mut RecordBatch, options: &SamplingConfig, now_ns: u64) -> u64 {
        let before = batch.len() as u64;
        let in_minute = self.arrived(before, now_ns);
        let share = match (options.rate, options.pts_per_min) {
            (Some(rate), _) => rate,
            #[expect(clippy::cast_precision_loss, reason = "a share, not a count")]
            (None, Some(limit)) if in_minute > limit => limit as f64 / in_minute as f64,
            (None, _) => 1.0,
        };
        if share < 1.0 {
            batch.retain(|| self.chance.random_bool(share.max(0.0)));
        }
        before - batch.len() as u64
    }

    /// Records of the last minute, `records` more included.
    fn arrived(&mut self, records: u64, now_ns: u64) -> u64 {
        let second = now_ns / BUCKET_NS;
        let passed = second.saturating_sub(self.second).min(BUCKETS as u64);
        for back in 0..passed {
            if let Some(bucket) = self.bucket(second - back) {
                *bucket = 0;
            }
        }
        self.second = self.second.max(second);
        if let Some(bucket) = self.bucket(self.second) {
            *bucket += records;
        }
        self.came.iter().sum()
    }

    fn bucket(&mut self, second: u64) -> Option<&mut u64> {
        let index = usize::try_from(second % BUCKETS as u64).ok()?;
        self.came.get_mut(index)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use rand::{SeedableRng, rngs::StdRng};
    use records::{Direction, Endpoint, Family, Netflow, Port, Transport};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn batch(records: usize) -> RecordBatch {
        let end = Endpoint {
            ip: IpAddr::from([10, 0, 0, 1]),
            port: Port::Any,
        };
        let record = Netflow {
            time_unix_ns: 0,
            local: end,
            remote: end,
            transport: Transport::Tcp,
            family: Family::V4,
            direction: Direction::Outgoing,
            netns: 0,
            pid: 0,
            process_name: "".into(),
            dst_nat: None,
            dst_domain: "".into(),
            local_k8s: None,
            remote_k8s: None,
            bytes_read: 1,
            bytes_written: 0,
            retransmits: 0,
            rtt_us: 0,
            rtt_var_us: 0,
            tcp_closed: 0,
            tcp_established: 0,
            datagrams_read: 0,
            datagrams_written: 0,
        };
        RecordBatch {
            netflow: vec![record; records],
            ..RecordBatch::default()
        }
    }

    fn kept(sampler: &mut Sampler<StdRng>, records: usize, options: &SamplingConfig, second: u64) -> usize {
        let mut batch = batch(records);
        let dropped = sampler.keep(&mut batch, options, second * SECOND);
        assert_eq!(dropped, (records - batch.netflow.len()) as u64);
        batch.netflow.len()
    }

    fn sampler() -> Sampler<StdRng> {
        Sampler::new(StdRng::seed_from_u64(7))
    }

    #[test]
    fn a_share_holds_for_any_size_of_batch() {
        for rate in [0.01, 0.34, 0.5, 0.9] {
            let options = SamplingConfig {
                rate: Some(rate),
                pts_per_min: None,
            };
            for size in [1, 7, 10_000] {
                let mut sampler = sampler();
                let rounds = 100_000 / size;
                let sum: usize = (0..rounds).map(|_| kept(&mut sampler, size, &options, 0)).sum();
                #[expect(clippy::cast_precision_loss, reason = "small numbers")]
                let (share, n) = (sum as f64 / (rounds * size) as f64, (rounds * size) as f64);
                // Five standard deviations.
                let bound = 5.0 * (rate * (1.0 - rate) / n).sqrt();
                assert!((share - rate).abs() < bound, "{rate} of {size}: {share}");
            }
        }
    }

    #[test]
    fn without_an_option_everything_is_kept() {
        let none = SamplingConfig {
            rate: None,
            pts_per_min: None,
        };
        assert_eq!(kept(&mut sampler(), 50_000, &none, 0), 50_000);
    }

    #[test]
    fn a_limit_lowers_the_share_by_what_the_last_minute_brought() {
        let options = SamplingConfig {
            rate: None,
            pts_per_min: Some(6_000),
        };
        let mut sampler = sampler();
        // Below the limit nothing is taken away.
        let calm: usize = (0..60).map(|second| kept(&mut sampler, 100, &options, second)).sum();
        assert_eq!(calm, 6_000);
        // Ten times as many: about the limit remains, once the minute is full of them.
        for second in 60..120 {
            kept(&mut sampler, 1_000, &options, second);
        }
        let busy: usize = (120..180)
            .map(|second| kept(&mut sampler, 1_000, &options, second))
            .sum();
        assert!((5_500..6_500).contains(&busy), "{busy}");
        // An hour later what was then does not count.
        assert_eq!(kept(&mut sampler, 6_000, &options, 4_000), 6_000);
        // One large batch alone is cut too.
        let burst = kept(&mut sampler, 60_000, &options, 8_000);
        assert!((5_500..6_500).contains(&burst), "{burst}");
    }

    #[test]
    fn a_clock_that_stands_still_or_jumps_back_loses_nothing() {
        let options = SamplingConfig {
            rate: None,
            pts_per_min: Some(10),
        };
        let mut sampler = sampler();
        assert_eq!(kept(&mut sampler, 10, &options, 100), 10);
        assert!(kept(&mut sampler, 90, &options, 50) < 40);
    }
}
