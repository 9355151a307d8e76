//! `bash`: command lines that were typed into interactive shells, one record per line.

mod table;

use std::{fmt::Write as _, sync::Arc};

pub use table::COLUMNS;

use crate::{K8sEndpoint, Str};

/// One command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Bash {
    /// When the line was entered, nanoseconds since the Unix epoch.
    pub time_unix_ns: i64,
    /// Process id of the shell in the host's pid namespace.
    pub pid: u32,
    /// Name of the user, or its number where no name is known.
    pub user: Str,
    /// The line.
    pub cmd: Str,
    /// The line was longer than what is kept, and was cut there.
    pub truncated: bool,
    /// Time, process, user and line as one text, as documented.
    pub message: Str,
    /// Pod that the shell runs in.
    pub k8s: Option<Arc<K8sEndpoint>>,
}

// === impl Bash ===

impl Bash {
    /// A record whose message is made of the rest.
    #[must_use]
    pub fn new(
        time_unix_ns: i64,
        pid: u32,
        user: Str,
        cmd: Str,
        truncated: bool,
        k8s: Option<Arc<K8sEndpoint>>,
    ) -> Self {
        let mut message = String::with_capacity(cmd.len() + user.len() + 64);
        put_time(&mut message, time_unix_ns.div_euclid(1_000_000_000));
        // Writing to a String cannot fail.
        let _ = write!(message, " pid:`{pid}` user:`{user}` cmd:`{cmd}`");
        Self {
            time_unix_ns,
            pid,
            user,
            cmd,
            truncated,
            message: message.into(),
            k8s,
        }
    }
}

/// RFC 3339 in UTC.
fn put_time(out: &mut String, unix_s: i64) {
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    // Days since 1 March of year 0: leap days come last in a year then.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let _ = write!(
        out,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_documented() {
        for (unix_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (1_790_000_000, "2026-09-21T14:13:20Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            let record = Bash::new(unix_s * 1_000_000_000, 7, "ann".into(), "ls -l".into(), false, None);
            assert_eq!(*record.message, format!("{text} pid:`7` user:`ann` cmd:`ls -l`"));
        }
    }
}
