//! Role `dns-client`: asks a name server and counts the answers by question and response code.
//!
//! Entry: [`run`].

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use super::{
    options::DnsClient,
    report::{Exchanged, Recorder},
    role, sys,
};

/// Port of name servers.
const PORT: u16 = 53;
/// Response code of a question that nobody answered in time.
const NO_ANSWER: i32 = -1;
/// Largest answer over UDP.
const ANSWER_MAX: usize = 4096;

/// A question on its way.
struct Question<'a> {
    name: &'a str,
    kind: (&'static str, u16),
    id: u16,
}

/// Runs the role.
///
/// # Errors
/// Setup failed. Questions that fail are in the report.
pub fn run(options: &DnsClient) -> anyhow::Result<()> {
    role::start(&options.common)?;
    let mut recorder = Recorder::default();
    let mut id = 0_u16;
    'all: for _ in 0..options.rounds {
        for server in &options.server {
            for name in &options.question {
                for kind in [("A", 1), ("AAAA", 28)] {
                    if sys::stopping() {
                        break 'all;
                    }
                    id = id.wrapping_add(1);
                    let question = Question { name, kind, id };
                    if let Err(error) = ask(options, *server, &question, &mut recorder) {
                        recorder.error("ask", &error);
                    }
                    std::thread::sleep(Duration::from_millis(options.pause_ms));
                }
            }
        }
    }
    role::finish(&options.common, "dns-client", &mut recorder)
}

fn ask(options: &DnsClient, server: IpAddr, question: &Question<'_>, recorder: &mut Recorder) -> io::Result<()> {
    let target = SocketAddr::new(server, PORT);
    let message = question.message();
    let patience = Duration::from_millis(options.patience_ms);
    let began = Instant::now();
    let answer = if options.tcp {
        over_tcp(target, &message, patience)
    } else {
        over_udp(target, &message, patience)
    };
    let (rcode, received) = match answer {
        Ok(answer) => (question.rcode_of(&answer)?, answer.len()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => (NO_ANSWER, 0),
        Err(error) => return Err(error),
    };
    recorder.exchanged(
        server,
        PORT,
        (question.kind.0, question.name, rcode),
        &Exchanged::one(message.len() as u64, received as u64, began.elapsed()),
    );
    Ok(())
}

fn over_udp(target: SocketAddr, message: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
    let any: IpAddr = if target.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(target)?;
    socket.set_read_timeout(Some(patience))?;
    socket.send(message)?;
    let mut answer = vec![0; ANSWER_MAX];
    let length = socket.recv(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

fn over_tcp(target: SocketAddr, message: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let length = u16::try_from(message.len()).map_err(|_| ErrorKind::InvalidInput)?;
    let mut all = length.to_be_bytes().to_vec();
    all.extend_from_slice(message);
    stream.write_all(&all)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

// === impl Question ===

impl Question<'_> {
    /// As RFC 1035 has it, with recursion desired.
    fn message(&self) -> Vec<u8> {
        let mut message = self.id.to_be_bytes().to_vec();
        message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in self.name.trim_end_matches('.').split('.') {
            message.push(u8::try_from(label.len()).unwrap_or(63));
            message.extend_from_slice(label.as_bytes());
        }
        message.push(0);
        message.extend_from_slice(&self.kind.1.to_be_bytes());
        message.extend_from_slice(&[0, 1]);
        message
    }

    /// The response code of an answer to this question.
    fn rcode_of(&self, answer: &[u8]) -> io::Result<i32> {
        match answer {
            [high, low, flags, code, ..] if [*high, *low] == self.id.to_be_bytes() && flags & 0x80 != 0 => {
                Ok(i32::from(code & 0x0f))
            }
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_as_others_write_it() {
        let question = Question {
            name: "db.shop.",
            kind: ("AAAA", 28),
            id: 0x1234,
        };
        let expected = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x04shop\x00\x00\x1c\x00\x01";
        assert_eq!(question.message(), expected);
        assert_eq!(question.rcode_of(b"\x12\x34\x81\x83\x00\x01").unwrap(), 3);
        assert!(question.rcode_of(b"\x12\x35\x81\x83\x00\x01").is_err());
        assert!(question.rcode_of(expected).is_err());
    }
}
