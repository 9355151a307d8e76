//! Layouts that kernel programs and user space share.
//!
//! Every struct is `repr(C)`, made of integers and byte arrays only, with explicit padding and an asserted size, so that
//! every bit pattern is valid and both sides agree. Codes cross as integers; user space converts and refuses unknown ones.

#![no_std]

pub mod bash;
pub mod dns;
pub mod http;
pub mod net;
pub mod netlog;
pub mod packets;
pub mod tls;
