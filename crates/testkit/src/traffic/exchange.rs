//! What happens on one TCP connection, from the client's and from the server's side. Every byte that a system call
//! accepted or returned is counted at once, so the counts hold also when the exchange ends in an error.

use std::{
    io,
    time::{Duration, Instant},
};

use socket2::Socket;

use super::{
    options::{Exchange, Pattern},
    report::Counts,
    sys,
};

/// Longest wait for a peer inside one exchange.
pub const PATIENCE: Duration = Duration::from_secs(20);

const UP: u64 = 1;
const DOWN: u64 = 2;

/// Payload sizes of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Payload {
    /// Bytes from client to server.
    pub up: usize,
    /// Bytes from server to client.
    pub down: usize,
}

/// Buffer and sources that one process reuses for all its connections.
#[derive(Debug)]
pub struct Scratch {
    /// Sent from and received into.
    pub buffer: Box<[u8]>,
    /// Content for `sendfile`.
    pub file: Option<std::fs::File>,
    /// End of a bulk exchange without a fixed size.
    pub deadline: Option<Instant>,
}

impl Exchange {
    /// True when sizes do not depend on the client's port.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        self.up.is_fixed() && self.down.is_fixed()
    }

    /// Sizes of message `round` on the connection from the client's `port`.
    #[must_use]
    pub fn payload(&self, seed: u64, port: u16, round: u32) -> Payload {
        Payload {
            up: self.up.of_connection(seed, port, round, UP),
            down: self.down.of_connection(seed, port, round, DOWN),
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            buffer: vec![0x5a; 128 << 10].into_boxed_slice(),
            file: None,
            deadline: None,
        }
    }
}

impl Scratch {
    /// Adds the file that `sendfile` sends from, in `TMPDIR` and already unlinked.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn with_file(mut self) -> io::Result<Self> {
        use std::io::Write as _;
        let path = std::env::temp_dir().join(format!("traffic-sendfile-{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        for _ in 0..8 {
            file.write_all(&self.buffer)?;
        }
        self.file = Some(file);
        Ok(self)
    }

    fn expired(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// The client's side of `pattern` on a connected socket. The caller closes it by dropping it.
///
/// # Errors
/// The failing call. A reset that the pattern asks for is none.
pub fn client(
    pattern: Pattern,
    socket: &Socket,
    payload: Payload,
    scratch: &mut Scratch,
    counts: &mut Counts,
) -> io::Result<()> {
    match pattern {
        Pattern::Request => {
            send_all(socket, payload.up, scratch, counts)?;
            socket.shutdown(std::net::Shutdown::Write)?;
            read_to_end(socket, scratch, counts)
        }
        Pattern::Oneway => send_all(socket, payload.up, scratch, counts),
        Pattern::Push => read_to_end(socket, scratch, counts),
        Pattern::HalfServer => {
            read_to_end(socket, scratch, counts)?;
            send_all(socket, payload.up, scratch, counts)
        }
        Pattern::Exchange => {
            send_all(socket, payload.up, scratch, counts)?;
            read_exactly(socket, payload.down, scratch, counts)
        }
        Pattern::Rst => {
            send_all(socket, payload.up, scratch, counts)?;
            wait_acknowledged(socket)?;
            socket.set_linger(Some(Duration::ZERO))
        }
        Pattern::Unread => {
            send_all(socket, payload.up, scratch, counts)?;
            match read_to_end(socket, scratch, counts) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
                other => other,
            }
        }
        Pattern::Bulk if payload.up == 0 => {
            while !scratch.expired() && !sys::stopping() {
                send_all(socket, scratch.buffer.len(), scratch, counts)?;
            }
            Ok(())
        }
        Pattern::Bulk => send_all(socket, payload.up, scratch, counts),
        Pattern::Sendfile => send_file(socket, payload.up, scratch, counts),
        // A connection here means that somebody listened; there is nothing to exchange.
        Pattern::Refused => Ok(()),
    }
}

/// The server's side of `pattern` on an accepted socket. The caller closes it by dropping it.
///
/// # Errors
/// The failing call. A reset that the pattern asks for is none.
pub fn server(
    pattern: Pattern,
    socket: &Socket,
    payload: Payload,
    scratch: &mut Scratch,
    counts: &mut Counts,
) -> io::Result<()> {
    match pattern {
        Pattern::Request => {
            read_to_end(socket, scratch, counts)?;
            send_all(socket, payload.down, scratch, counts)
        }
        Pattern::Oneway | Pattern::Bulk | Pattern::Sendfile | Pattern::Refused => read_to_end(socket, scratch, counts),
        Pattern::Push => send_all(socket, payload.down, scratch, counts),
        Pattern::HalfServer => {
            send_all(socket, payload.down, scratch, counts)?;
            socket.shutdown(std::net::Shutdown::Write)?;
            read_to_end(socket, scratch, counts)
        }
        Pattern::Exchange => {
            read_exactly(socket, payload.up, scratch, counts)?;
            send_all(socket, payload.down, scratch, counts)?;
            // The client closes first, so that its answer is never lost to a reset.
            read_to_end(socket, scratch, counts)
        }
        Pattern::Rst => match read_to_end(socket, scratch, counts) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            other => other,
        },
        Pattern::Unread => {
            let deadline = Instant::now() + PATIENCE;
            while sys::unread(socket)? < payload.up && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(50));
            }
            read_exactly(socket, payload.up / 2, scratch, counts)
        }
    }
}

/// Sends `count` bytes.
///
/// # Errors
/// The failing `send`.
pub fn send_all(socket: &Socket, count: usize, scratch: &Scratch, counts: &mut Counts) -> io::Result<()> {
    let mut left = count;
    while left > 0 {
        let part = scratch.buffer.get(..left.min(scratch.buffer.len())).unwrap_or_default();
        match socket.send(part) {
            Ok(sent) => {
                counts.bytes_sent += sent as u64;
                left -= sent;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted && !sys::timed_out() => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if sys::poll(sys::fd_of(socket), libc::POLLOUT, PATIENCE)? == 0 && !sys::stopping() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_exactly(socket: &Socket, count: usize, scratch: &mut Scratch, counts: &mut Counts) -> io::Result<()> {
    let mut left = count;
    while left > 0 {
        let room = left.min(scratch.buffer.len());
        match receive(socket, scratch.buffer.get_mut(..room).unwrap_or_default(), counts)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            received => left -= received,
        }
    }
    Ok(())
}

/// Reads exactly `count` bytes of an answer; as the exchange does.
///
/// # Errors
/// The failing `recv`, or `UnexpectedEof`.
pub fn read_answer(socket: &Socket, count: usize, scratch: &mut Scratch, counts: &mut Counts) -> io::Result<()> {
    read_exactly(socket, count, scratch, counts)
}

fn read_to_end(socket: &Socket, scratch: &mut Scratch, counts: &mut Counts) -> io::Result<()> {
    while receive(socket, &mut scratch.buffer, counts)? > 0 {}
    Ok(())
}

fn receive(socket: &Socket, buffer: &mut [u8], counts: &mut Counts) -> io::Result<usize> {
    loop {
        match sys::recv(socket, buffer) {
            Ok(received) => {
                counts.bytes_received += received as u64;
                return Ok(received);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted && !sys::timed_out() => {}
            Err(error) => return Err(error),
        }
    }
}

fn wait_acknowledged(socket: &Socket) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while sys::unacked(socket)? > 0 {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

fn send_file(socket: &Socket, count: usize, scratch: &Scratch, counts: &mut Counts) -> io::Result<()> {
    let Some(file) = &scratch.file else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let length = scratch.buffer.len() * 8;
    let mut sent = 0;
    while if count == 0 {
        !scratch.expired() && !sys::stopping()
    } else {
        sent < count
    } {
        let start = sent % length;
        let part = (length - start).min(if count == 0 { length } else { count - sent });
        let mut offset = i64::try_from(start).unwrap_or(0);
        match sys::sendfile(socket, file, &mut offset, part) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                counts.bytes_sent += done as u64;
                sent += done;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted && !sys::timed_out() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
