//! One room per plugin: from the kernel's maps and events to records.

pub mod bash;
pub mod beside;
pub mod conntrack;
pub mod dns;
pub mod domains;
pub mod ebpf_net;
mod elf;
mod ends;
mod files;
pub mod http;
pub mod packets;
mod policy;
#[cfg(test)]
mod test_pods;
pub mod tls;
mod whose;
