//! Which processes hold TCP sockets, by `/proc`. For people who ask, not for the capture.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
};

use ahash::RandomState;
use hashbrown::{HashMap, HashSet};

use crate::identity::process::Proc;

/// Descriptors of a process that are looked at.
const DESCRIPTORS_MAX: usize = 65_536;
/// Bytes of a table of sockets that are read.
const TABLE_MAX: u64 = 64 << 20;

type Inodes = HashSet<u64, RandomState>;

/// TCP sockets of the network namespaces asked about so far.
pub(super) struct Sockets<'a> {
    proc: &'a Proc,
    /// By inode number of the namespace.
    known: HashMap<u64, Inodes, RandomState>,
}

impl<'a> Sockets<'a> {
    pub(super) fn new(proc: &'a Proc) -> Self {
        Self {
            proc,
            known: HashMap::default(),
        }
    }

    /// True if a process holds a TCP socket, listening or connected.
    pub(super) fn holds_tcp(&mut self, pid: u32) -> bool {
        let Ok(namespace) = fs::metadata(self.proc.path(pid, "ns/net")) else {
            return false;
        };
        let proc = self.proc;
        let inodes = self.known.entry(namespace.ino()).or_insert_with(|| {
            let tables = ["net/tcp", "net/tcp6"].map(|table| read(proc, pid, table).unwrap_or_default());
            tables.iter().flat_map(|table| inodes(table)).collect()
        });
        let descriptors = fs::read_dir(proc.path(pid, "fd")).into_iter().flatten();
        descriptors.take(DESCRIPTORS_MAX).any(|entry| {
            let link = entry.and_then(|entry| fs::read_link(entry.path()));
            link.is_ok_and(|link| socket(&link.to_string_lossy()).is_some_and(|inode| inodes.contains(&inode)))
        })
    }
}

fn read(proc: &Proc, pid: u32, table: &str) -> io::Result<String> {
    let mut text = Vec::new();
    fs::File::open(proc.path(pid, table))?
        .take(TABLE_MAX)
        .read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Inode numbers in a table of sockets.
fn inodes(table: &str) -> impl Iterator<Item = u64> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(9)?.parse().ok())
}

/// Inode number of the socket that a descriptor leads to.
fn socket(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_tables_and_links() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 100\n";
        assert_eq!(inodes(table).collect::<Vec<_>>(), [4242]);
        assert_eq!(socket("socket:[17]"), Some(17));
        assert_eq!(socket("pipe:[17]"), None);
    }

    #[test]
    fn own_sockets_are_found() {
        let proc = Proc::new("/proc");
        let listener = std::net::TcpListener::bind("127.0.0.1:0");
        if listener.is_ok() {
            assert!(Sockets::new(&proc).holds_tcp(std::process::id()));
        }
    }
}
