//! What in a file is to be probed: functions of TLS libraries by their names, and where they return.
//!
//! ```text
//! open file ▶ [`look`] ─ symbols of C libraries ─┐
//!                      └ other kinds of programs ┴▶ [`Targets`]: which kernel program at which instruction
//! ```
//! A probe at an instruction that the kernel has to step through costs ten times what others do in a virtual machine. So
//! functions are probed where the kernel need not, and by probes of their return rather than at the instructions with which
//! they do; and of OpenSSL the function that both of a pair hand their arguments on to. Entry: [`look`].

use std::fs::File;

use super::{
    blind::Reason,
    go::{self, Go, GoError, GoTls},
};
use crate::capture::elf::{self, Code, ElfError, Place};

/// Where a kernel program is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// Name of the program in the object `ebpf_tls`.
    pub(super) program: &'static str,
    /// File offset of the instruction; with a program for returns (`uretprobe`), of the function.
    pub(super) at: u64,
}

/// What was found in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Targets {
    /// Probes, all or none of which are of use.
    pub(super) spots: Vec<Spot>,
    /// What is known of its kind, for metrics and `doctor`: `openssl`, `gnutls`, `go`.
    pub(super) kind: &'static str,
    /// It takes part in TLS, and plain text cannot be seen: why.
    pub(super) blind: Option<Reason>,
}

/// A function of a C library.
struct Function {
    name: &'static str,
    enter: &'static str,
    /// Its return is of interest.
    returns: bool,
    kind: &'static str,
}

const OPENSSL: &str = "openssl";
const GNUTLS: &str = "gnutls";
const GO: &str = "go";
/// Program at returns of functions.
pub(super) const RETURNED: &str = "tls_returned";
/// Functions that hand all they get on to one that does the work, and others that may use it too.
const PAIRS: [(&str, &str); 2] = [("SSL_read_ex", "SSL_read"), ("SSL_write_ex", "SSL_write")];

const fn function(name: &'static str, enter: &'static str, returns: bool, kind: &'static str) -> Function {
    Function {
        name,
        enter,
        returns,
        kind,
    }
}

/// Functions of OpenSSL (and BoringSSL, LibreSSL) and GnuTLS.
const FUNCTIONS: [Function; 13] = [
    function("SSL_read", "tls_read", true, OPENSSL),
    function("SSL_write", "tls_write", true, OPENSSL),
    function("SSL_read_ex", "tls_read_ex", true, OPENSSL),
    function("SSL_write_ex", "tls_write_ex", true, OPENSSL),
    function("SSL_sendfile", "tls_sendfile", true, OPENSSL),
    function("SSL_do_handshake", "tls_handshake", true, OPENSSL),
    function("SSL_free", "tls_free", false, OPENSSL),
    function("SSL_clear", "tls_free", false, OPENSSL),
    function("BIO_write", "tls_bio_write", false, OPENSSL),
    function("gnutls_record_recv", "tls_read", true, GNUTLS),
    function("gnutls_record_send", "tls_write", true, GNUTLS),
    function("gnutls_handshake", "tls_handshake", true, GNUTLS),
    function("gnutls_deinit", "tls_free", false, GNUTLS),
];

/// Finds what there is to probe in a file that is mapped for execution.
///
/// # Errors
/// If the file cannot be read, or is none of the kind.
pub(super) fn look(file: &File, depth: elf::Depth) -> Result<Targets, ElfError> {
    let blind = |reason| Targets {
        kind: GO,
        blind: Some(reason),
        ..Targets::default()
    };
    match go::inspect(file) {
        Ok(Go::No) => c_library(file, depth),
        Ok(Go::WithoutTls) => Ok(Targets::default()),
        Ok(Go::Tls(found)) => Ok(go_program(found)),
        Err(error) => {
            tracing::debug!(%error, "The TLS of a Go program cannot be seen");
            Ok(blind(match error {
                GoError::Old(_) => Reason::OldGo,
                _ => Reason::Go,
            }))
        }
    }
}

/// By what is known of `crypto/tls`.
fn go_program(found: GoTls) -> Targets {
    let at = |program: &'static str, all: Vec<u64>| all.into_iter().map(move |at| Spot { program, at });
    let spots = at("go_write", vec![found.write])
        .chain(at("go_read", found.read_returns))
        .chain(at("go_close", Vec::from_iter(found.close)))
        .chain(at("go_handshake", found.handshakes));
    Targets {
        spots: spots.collect(),
        kind: GO,
        blind: None,
    }
}

/// By the names of functions.
fn c_library(file: &File, depth: elf::Depth) -> Result<Targets, ElfError> {
    let names = FUNCTIONS.map(|function| function.name);
    let mut targets = Targets::default();
    let mut codes: Vec<(&Function, Code)> = Vec::new();
    for symbol in elf::symbols(file, &names, depth)? {
        if let (Some(function), Place::Here(code)) = (FUNCTIONS.get(symbol.name), symbol.place) {
            codes.push((function, code));
        }
    }
    let spot = |program, at| Spot { program, at };
    let of = |name: &str| codes.iter().find(|(function, _)| function.name == name);
    let mut done = Vec::new();
    for (handing, other) in PAIRS {
        let Some((function, code)) = of(handing) else { continue };
        let Some(inner) = code.inner else { continue };
        targets
            .spots
            .extend([spot(function.enter, inner), spot(RETURNED, inner)]);
        targets.kind = function.kind;
        done.push(handing);
        if of(other).is_some_and(|(_, code)| code.calls.contains(&inner)) {
            done.push(other);
        }
    }
    for (function, code) in &codes {
        if function.returns || targets.kind.is_empty() {
            targets.kind = function.kind;
        }
        if done.contains(&function.name) {
            continue;
        }
        if function.returns {
            // A probe of the return is one of the first instruction, too.
            targets
                .spots
                .extend([spot(function.enter, code.at), spot(RETURNED, code.at)]);
        } else {
            targets.spots.push(spot(function.enter, code.early));
        }
    }
    // Two names of one function.
    targets.spots.sort_unstable_by_key(|spot| (spot.at, spot.program));
    targets.spots.dedup();
    Ok(targets)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::Command;

    use super::*;
    use crate::capture::elf::{Depth, Own};

    const DEPTH: Depth = Depth {
        max: 64 << 20,
        own: Own::IfNone,
    };

    /// Libraries of this machine by name, as the loader knows them.
    fn library(name: &str) -> Option<String> {
        let all = Command::new("ldconfig").arg("-p").output().ok()?;
        let all = String::from_utf8(all.stdout).ok()?;
        let line = all.lines().find(|line| line.trim_start().starts_with(name))?;
        Some(line.rsplit(' ').next()?.to_owned())
    }

    /// Where binutils say that a function is: its address, which in these libraries is its offset in the file, and size.
    fn by_binutils(path: &str, name: &str) -> Option<(u64, u64)> {
        let all = Command::new("readelf").args(["-W", "--dyn-syms", path]).output().ok()?;
        let all = String::from_utf8(all.stdout).ok()?;
        all.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [_, address, size, "FUNC", .., symbol] = words.as_slice() else {
                return None;
            };
            (symbol.split('@').next() == Some(name))
                .then(|| Some((u64::from_str_radix(address, 16).ok()?, size.parse().ok()?)))?
        })
    }

    #[test]
    fn finds_functions_where_binutils_do() {
        for (name, kind, functions) in [
            (
                "libssl.so.3 ",
                OPENSSL,
                &["SSL_read", "SSL_write_ex", "SSL_free", "SSL_do_handshake"][..],
            ),
            (
                "libgnutls.so.30 ",
                GNUTLS,
                &["gnutls_record_recv", "gnutls_record_send"],
            ),
        ] {
            let Some(path) = library(name) else {
                println!("SKIPPED: this machine has no {name}");
                continue;
            };
            let targets = look(&File::open(&path).unwrap(), DEPTH).unwrap();
            assert_eq!((targets.kind, targets.blind), (kind, None));
            for function in functions {
                let Some((at, size)) = by_binutils(&path, function) else {
                    println!("SKIPPED: no binutils, or {function} is not in {path}");
                    continue;
                };
                let known = FUNCTIONS.iter().find(|known| known.name == *function).unwrap();
                let of = |program| targets.spots.iter().filter(move |spot| spot.program == program);
                let here = of(known.enter).any(|spot| (at..at + size).contains(&spot.at));
                let paired = PAIRS.iter().any(|(one, other)| [*one, *other].contains(function));
                assert!(here || paired, "{function}: {targets:?}");
                if known.returns && here {
                    assert!(targets.spots.contains(&Spot { program: RETURNED, at }), "{function}");
                }
            }
            // Each begin that waits for a return has one.
            for function in FUNCTIONS.iter().filter(|function| function.returns) {
                for spot in targets.spots.iter().filter(|spot| spot.program == function.enter) {
                    let returned = Spot {
                        program: RETURNED,
                        at: spot.at,
                    };
                    assert!(targets.spots.contains(&returned), "{spot:?} of {targets:?}");
                }
            }
        }
    }

    #[test]
    fn other_files_have_none() {
        let own = File::open("/proc/self/exe").unwrap();
        let targets = look(&own, DEPTH).unwrap_or_default();
        assert_eq!(targets.kind, "");
        assert!(targets.spots.is_empty());
        assert!(look(&File::open("/proc/self/maps").unwrap(), DEPTH).is_err());
    }
}
