//! The client's end of a connection, with a record of what passed.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use node_agent::protocols::Way;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// Transfers in their order.
pub(crate) type Record = Vec<(Way, Vec<u8>)>;

/// A stream that remembers what is read and written.
pub(crate) struct Recorder {
    io: DuplexStream,
    record: Arc<Mutex<Record>>,
}

/// Both ends of a connection, and its record.
pub(crate) fn connection() -> (Recorder, DuplexStream, Arc<Mutex<Record>>) {
    let (client, server) = tokio::io::duplex(16 * 1024);
    let record = Arc::new(Mutex::new(Record::new()));
    let recorder = Recorder {
        io: client,
        record: Arc::clone(&record),
    };
    (recorder, server, record)
}

impl AsyncRead for Recorder {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let read = buf.filled()[before..].to_vec();
        if !read.is_empty() {
            self.record.lock().unwrap().push((Way::ToClient, read));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Recorder {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.record
            .lock()
            .unwrap()
            .push((Way::ToServer, buf[..written].to_vec()));
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
