//! Names of users, as a process's own root directory has them.
//!
//! ```text
//! user id of the machine ▶ uid_map of the process (user namespaces) ▶ etc/passwd below its root ▶ name
//! ```
//! Entry: [`Users`]. Other sources of names (LDAP and the like) are not asked: who is not in the file is told by number.

use std::{fs, io::Read as _, os::unix::fs::MetadataExt as _, sync::Arc};

use ahash::RandomState;
use hashbrown::HashMap;
use records::Str;

use crate::{capture::files::open_below_root, identity::process::Proc};

/// Bytes of a passwd file that are read.
const PASSWD_MAX: u64 = 1 << 20;
/// Files remembered.
const FILES_MAX: usize = 64;

type Names = Arc<HashMap<u32, Str, RandomState>>;
/// Device, inode number, size, times of change.
type Version = (u64, u64, u64, (i64, i64), (i64, i64));

/// Passwd files that were read.
#[derive(Debug, Default)]
pub(super) struct Users {
    files: HashMap<Version, Names, RandomState>,
}

/// Who the users of one process are.
#[derive(Clone, Debug, Default)]
pub(super) struct Of {
    names: Names,
    map: Vec<Range>,
}

/// A line of `uid_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

impl Users {
    /// The users of a process.
    pub(super) fn of(&mut self, proc: &Proc, pid: u32) -> Of {
        let map = fs::read_to_string(proc.path(pid, "uid_map")).map(|text| ranges(&text));
        Of {
            names: self.names(proc, pid).unwrap_or_default(),
            map: map.unwrap_or_default(),
        }
    }

    fn names(&mut self, proc: &Proc, pid: u32) -> Option<Names> {
        let file = open_below_root(proc, pid, "etc/passwd")?;
        let about = file.metadata().ok().filter(fs::Metadata::is_file)?;
        let version = (
            about.dev(),
            about.ino(),
            about.len(),
            (about.mtime(), about.mtime_nsec()),
            (about.ctime(), about.ctime_nsec()),
        );
        if let Some(known) = self.files.get(&version) {
            return Some(Arc::clone(known));
        }
        let mut text = Vec::new();
        file.take(PASSWD_MAX).read_to_end(&mut text).ok()?;
        let names = Arc::new(passwd(&String::from_utf8_lossy(&text)));
        if self.files.len() >= FILES_MAX {
            self.files.clear();
        }
        self.files.insert(version, Arc::clone(&names));
        Some(names)
    }
}

impl Of {
    /// The name of a user id of the machine, or its number in the process's own user namespace.
    pub(super) fn name(&self, uid: u32) -> Str {
        let inside = self.map.iter().find_map(|range| {
            let within = uid.checked_sub(range.outside).filter(|within| *within < range.count)?;
            range.inside.checked_add(within)
        });
        let uid = inside.unwrap_or(uid);
        let named = self.names.get(&uid).cloned();
        named.unwrap_or_else(|| uid.to_string().into())
    }
}

/// Names by number; the first entry of a number counts, as in the C library.
fn passwd(text: &str) -> HashMap<u32, Str, RandomState> {
    let mut names = HashMap::default();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(uid)) = (fields.next(), fields.nth(1))
            && !name.is_empty()
            && !name.starts_with(['#', '+', '-'])
            && let Ok(uid) = uid.parse::<u32>()
        {
            names.entry(uid).or_insert_with(|| name.into());
        }
    }
    names
}

fn ranges(text: &str) -> Vec<Range> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Range {
            inside: next()?,
            outside: next()?,
            count: next()?,
        })
    };
    text.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reads_passwd_files() {
        let names = passwd(
            "root:x:0:0:root:/root:/bin/bash\n# none:x:7:7::/:/bin/sh\nann:x:1000:1000:Ann,,,:/home/ann:/bin/bash\n\
             toor:x:0:0::/root:/bin/sh\nbroken\n:x:5:5::/:/bin/sh\nodd:x:-1:5::/:/bin/sh\n+nis::9:::\n",
        );
        let mut all: Vec<(u32, &str)> = names.iter().map(|(uid, name)| (*uid, &**name)).collect();
        all.sort_unstable();
        assert_eq!(all, [(0, "root"), (1000, "ann")]);
    }

    #[test]
    fn numbers_of_user_namespaces_are_told_as_inside() {
        let of = Of {
            names: Arc::new(passwd("root:x:0:0::/:/bin/sh\nann:x:1000:1000::/:/bin/sh")),
            map: ranges("         0     100000      65536\n"),
        };
        assert_eq!(&*of.name(100_000), "root");
        assert_eq!(&*of.name(101_000), "ann");
        assert_eq!(&*of.name(101_001), "1001");
        assert_eq!(&*of.name(5), "5", "not in the namespace");
        assert_eq!(
            ranges("0 0 4294967295\nx y z\n"),
            [Range {
                inside: 0,
                outside: 0,
                count: u32::MAX
            }]
        );
    }

    #[test]
    fn own_user_is_named_as_the_system_does() {
        let proc = Proc::new("/proc");
        let expected = std::process::Command::new("id").arg("-un").output().unwrap();
        let expected = String::from_utf8(expected.stdout).unwrap();
        // SAFETY: no arguments.
        let uid = unsafe { libc::getuid() };
        let found = Users::default().of(&proc, std::process::id()).name(uid);
        assert_eq!(&*found, expected.trim());
    }
}
