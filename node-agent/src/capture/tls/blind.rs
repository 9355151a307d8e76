//! Why the plain text of a process is not seen. No I/O.

use std::fmt;

/// A reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The TLS of a Java virtual machine.
    Java,
    /// A library that is not known.
    OtherLibrary,
    /// A library that is known by its name, without its functions.
    NoFunctions,
    /// A program that holds TCP sockets and has nothing to do with any TLS that is known.
    NothingKnown,
    /// A program in Go whose functions cannot be found.
    Go,
    /// A program in Go from before arguments were passed in registers.
    OldGo,
    /// The file cannot be opened.
    Unreadable,
    /// The kernel refused a probe.
    NoProbe,
    /// There are too many files or processes.
    Full,
    /// Its namespace, or the node's own processes, are switched off.
    SwitchedOff,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Java,
        Self::OtherLibrary,
        Self::NoFunctions,
        Self::NothingKnown,
        Self::Go,
        Self::OldGo,
        Self::Unreadable,
        Self::NoProbe,
        Self::Full,
        Self::SwitchedOff,
    ];

    /// As a label of metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Java => "java",
            Self::OtherLibrary => "other_library",
            Self::NoFunctions => "no_functions",
            Self::NothingKnown => "nothing_known",
            Self::Go => "go",
            Self::OldGo => "old_go",
            Self::Unreadable => "unreadable",
            Self::NoProbe => "no_probe",
            Self::Full => "full",
            Self::SwitchedOff => "switched_off",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Java => "Java's own TLS is made at run time; no function of it is in a file",
            Self::OtherLibrary => "its TLS library is none of OpenSSL, BoringSSL, GnuTLS",
            Self::NoFunctions => {
                "a TLS library in it has none of the functions that take and give plain text (stripped)"
            }
            Self::NothingKnown => {
                "no TLS library, nor a function of one, is known in it: it speaks without, or has TLS of its own \
                 (stripped, rustls)"
            }
            Self::Go => "it is a Go program whose crypto/tls cannot be found or is unlike that of known versions",
            Self::OldGo => "it is a Go program built before Go 1.17 (1.18 on 64-bit Arm)",
            Self::Unreadable => "its files cannot be opened; it takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
            Self::NoProbe => "the kernel refused a probe",
            Self::Full => "there are more processes or files than are followed",
            Self::SwitchedOff => "httpflow-tls is off for its namespace",
        })
    }
}

/// What a mapped file has to do with TLS, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    /// Nothing.
    Nothing,
    /// It is a library that may have the functions, or another's that has one of them in itself.
    Library {
        /// Without the functions something is missing.
        certain: bool,
    },
    /// It is one that cannot be looked into.
    Blind(Reason),
}

/// Judges a file's name.
pub(super) fn by_name(name: &str) -> Named {
    let starts = |words: &[&str]| words.iter().any(|word| name.starts_with(word));
    if starts(&["libjvm.so"]) {
        Named::Blind(Reason::Java)
    } else if starts(&[
        "libssl3.so",
        "libmbedtls.so",
        "libwolfssl.so",
        "libs2n.so",
        "libpolarssl.so",
    ]) {
        Named::Blind(Reason::OtherLibrary)
    } else if starts(&["libssl", "libgnutls.so", "libgnutls-", "cygrpc."]) {
        // The last is gRPC of Python, with a BoringSSL in it.
        Named::Library { certain: true }
    } else if starts(&[
        "libcrypto",
        "libnode.so",
        "libboringssl",
        "libconscrypt",
        "libnetty_tcnative",
        "libgrpc",
    ]) {
        Named::Library { certain: false }
    } else {
        Named::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_libraries() {
        for (name, named) in [
            ("libssl.so.3", Named::Library { certain: true }),
            ("libssl-81ffa89e.so.1.1", Named::Library { certain: true }),
            ("libssl3.so", Named::Blind(Reason::OtherLibrary)),
            ("libgnutls.so.30.34.3", Named::Library { certain: true }),
            ("libgnutlsxx.so.30", Named::Nothing),
            ("libcrypto.so.3", Named::Library { certain: false }),
            ("libjvm.so", Named::Blind(Reason::Java)),
            (
                "cygrpc.cpython-311-x86_64-linux-gnu.so",
                Named::Library { certain: true },
            ),
            ("libc.so.6", Named::Nothing),
        ] {
            assert_eq!(by_name(name), named, "{name}");
        }
    }
}
