//! The protocol parsers against real implementations: hyper for HTTP/1, h2 for HTTP/2. What client and server say they did
//! is the truth; the parsers see what passed between them.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod http1;
mod http2;
mod recorder;
mod replay;
