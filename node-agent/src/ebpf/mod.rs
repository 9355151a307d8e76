//! Getting programs into the kernel: type look-ups, offsets, loading and attaching, capability vector.
//!
//! ```text
//! btf (/sys/kernel/btf/vmlinux) ▶ offsets ▶ net::load (per-program attach, best hook first) ▶ capability vector
//! ```
//! Features are probed by trying; no version strings. A program that fails to load or attach costs its feature only.

mod attach;
pub mod bash;
pub mod btf;
pub mod capability;
mod counters;
pub mod dns;
pub mod entry;
pub mod http;
pub mod namespaces;
pub mod net;
pub mod offsets;
pub mod packets;
pub mod privileges;
pub mod rtnetlink;
pub mod sys;
pub mod tc;
pub mod tls;
pub mod uprobe;
