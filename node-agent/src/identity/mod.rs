//! Who owns a socket, and what that process is called.

pub mod process;
pub mod sockets;
