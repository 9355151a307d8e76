//! The role `http-server` by io_uring: accept, recv and send are entries of one ring, and no system call of their own moves a
//! byte. Entry: [`serve`].

use std::{
    collections::HashMap,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _},
    time::Instant,
};

use anyhow::Context as _;
use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;

use super::{
    http::{Message, answer, note, whole},
    report::Recorder,
    role, sys,
};

/// Entries of the ring; also the most connections at once, as each has one entry under way.
const ENTRIES: u32 = 512;
/// What an entry is, by its `user_data`: these two, or a connection's number.
const ACCEPT: u64 = 0;
const TICK: u64 = 1;
/// How long it waits at a time before it looks whether it is to stop.
static PAUSE: types::Timespec = types::Timespec::new().nsec(100_000_000);

/// A connection. One entry of the ring at most points into its buffers, which are not touched meanwhile.
struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    input: Box<[u8]>,
    /// Read, and not answered.
    buffer: Vec<u8>,
    first: Option<Instant>,
    /// The request that is being answered, and how much of the answer was sent.
    under_way: Option<(Message, Vec<u8>, usize)>,
}

/// Serves until it is to stop.
///
/// # Errors
/// The kernel does not let this process have a ring.
pub fn serve(listener: &TcpListener, recorder: &Mutex<Recorder>) -> anyhow::Result<()> {
    let mut ring = IoUring::new(ENTRIES).context("making a ring of io_uring")?;
    let port = listener.local_addr()?.port();
    let accept = opcode::Accept::new(
        types::Fd(listener.as_raw_fd()),
        std::ptr::null_mut(),
        std::ptr::null_mut(),
    );
    let accept = accept.build().user_data(ACCEPT);
    let tick = opcode::Timeout::new(&raw const PAUSE).build().user_data(TICK);
    let mut connections: HashMap<u64, Connection> = HashMap::new();
    let mut next = TICK + 1;
    let mut push = vec![accept.clone(), tick.clone()];
    role::ready()?;
    while !sys::stopping() {
        for entry in push.drain(..) {
            // SAFETY: what an entry points at is in `connections`, in a heap block that stays until the entry is completed, or
            // static.
            unsafe { ring.submission().push(&entry) }.context("the ring is full")?;
        }
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        }
        for done in ring.completion() {
            match done.user_data() {
                TICK => push.push(tick.clone()),
                ACCEPT => {
                    match accepted(done.result()) {
                        Ok(connection) if connections.len() < ENTRIES as usize / 2 => {
                            let connection = connections.entry(next).insert_entry(connection).into_mut();
                            push.push(connection.read().user_data(next));
                            next += 1;
                        }
                        Ok(_) => {}
                        Err(error) => recorder.lock().error("accept", &error),
                    }
                    push.push(accept.clone());
                }
                number => {
                    let Some(connection) = connections.get_mut(&number) else {
                        continue;
                    };
                    match connection.completed(done.result(), port, recorder) {
                        Ok(Some(entry)) => push.push(entry.user_data(number)),
                        Ok(None) => drop(connections.remove(&number)),
                        Err(error) => {
                            recorder.lock().error("serve", &error);
                            connections.remove(&number);
                        }
                    }
                }
            }
        }
    }
    // Entries under way still point into them; the process ends.
    std::mem::forget(connections);
    Ok(())
}

fn result(code: i32) -> io::Result<usize> {
    usize::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code))
}

fn accepted(code: i32) -> io::Result<Connection> {
    result(code)?;
    // SAFETY: the kernel gave this process a new descriptor, which nobody else has.
    let stream = unsafe { TcpStream::from_raw_fd(code) };
    stream.set_nodelay(true)?;
    Ok(Connection {
        peer: stream.peer_addr()?,
        stream,
        input: vec![0; 16 * 1024].into(),
        buffer: Vec::new(),
        first: None,
        under_way: None,
    })
}

// === impl Connection ===

impl Connection {
    fn read(&mut self) -> squeue::Entry {
        let length = u32::try_from(self.input.len()).unwrap_or(u32::MAX);
        opcode::Recv::new(types::Fd(self.stream.as_raw_fd()), self.input.as_mut_ptr(), length).build()
    }

    /// Goes on after an entry; `None` when the connection ended.
    fn completed(&mut self, code: i32, port: u16, recorder: &Mutex<Recorder>) -> io::Result<Option<squeue::Entry>> {
        let length = result(code)?;
        match &mut self.under_way {
            Some((request, out, sent)) => {
                *sent += length;
                if *sent >= out.len() {
                    note(recorder, self.peer, port, request, out.len());
                    self.under_way = None;
                    self.first = (!self.buffer.is_empty()).then(Instant::now);
                }
            }
            None if length == 0 => return Ok(None),
            None => {
                self.first.get_or_insert_with(Instant::now);
                self.buffer
                    .extend_from_slice(self.input.get(..length).unwrap_or_default());
            }
        }
        if self.under_way.is_none()
            && let Some((first_line, length)) = whole(&self.buffer, true)?
        {
            self.buffer.drain(..length);
            let out = answer(&first_line);
            let request = Message {
                first_line,
                bytes: length as u64,
                first: self.first.unwrap_or_else(Instant::now),
            };
            self.under_way = Some((request, out, 0));
        }
        Ok(Some(match &self.under_way {
            None => self.read(),
            Some((_, out, sent)) => {
                let left = out.get(*sent..).unwrap_or_default();
                let length = u32::try_from(left.len()).unwrap_or(u32::MAX);
                opcode::Send::new(types::Fd(self.stream.as_raw_fd()), left.as_ptr(), length)
                    .flags(libc::MSG_NOSIGNAL)
                    .build()
            }
        }))
    }
}
