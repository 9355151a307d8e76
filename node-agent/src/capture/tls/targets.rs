//! What in a file is to be probed: functions of TLS libraries by their names, and where they return.
//!
//! ```text
//! open file ▶ [`look`] ─ symbols of C libraries ─┐
//!                      └ other kinds of programs ┴▶ [`Targets`]: which kernel program at which instruction
//! ```
//! A C function's returns are probed where its code shows all of them: that is a third of the price of a probe of its return,
//! which is for functions that end in another one. Entry: [`look`].

use std::fs::File;

use super::{
    blind::Reason,
    go::{self, Go, GoError, GoTls},
};
use crate::capture::elf::{self, ElfError, Exits};

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
/// Programs at returns: at instructions, and of functions.
pub(super) const RETURNS: &str = "tls_returns";
pub(super) const RETURNED: &str = "tls_returned";

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
    for symbol in elf::symbols(file, &names, depth)? {
        let (Some(function), Some(code)) = (FUNCTIONS.get(symbol.name), symbol.code) else {
            continue;
        };
        let spot = |program, at| Spot { program, at };
        targets.spots.push(spot(function.enter, code.at));
        if function.returns {
            match code.exits {
                Exits::Returns(all) => targets.spots.extend(all.into_iter().map(|at| spot(RETURNS, at))),
                Exits::Elsewhere(_) => targets.spots.push(spot(RETURNED, code.at)),
            }
        }
        if function.returns || targets.kind.is_empty() {
            targets.kind = function.kind;
        }
    }
    // Two names of one function.
    targets.spots.sort_unstable_by_key(|spot| (spot.at, spot.program));
    targets.spots.dedup();
    Ok(targets)
}
