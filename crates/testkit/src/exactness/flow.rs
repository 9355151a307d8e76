//! Reads the agent's `netflow` JSON lines. Numbers may be JSON numbers or strings.

use std::{io, net::IpAddr};

use serde_json::{Map, Value};

use crate::traffic::report::{Counts, Direction, Transport};

/// One `netflow` row.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    /// Tag `transport`.
    pub transport: Transport,
    /// Tag `family`.
    pub family: String,
    /// Tag `direction`.
    pub direction: Direction,
    /// Tag `src_ip`: the local end.
    pub src_ip: IpAddr,
    /// Tag `src_port`, a number or `*`.
    pub src_port: String,
    /// Tag `dst_ip`.
    pub dst_ip: IpAddr,
    /// Tag `dst_port`, a number or `*`.
    pub dst_port: String,
    /// Tag `pid`; 0 when unknown.
    pub pid: u32,
    /// Tag `process_name`.
    pub process_name: String,
    /// The counts that a report has too.
    pub counts: Counts,
    /// Field `retransmits`.
    pub retransmits: u64,
    /// Field `rtt`, microseconds.
    pub rtt_us: u64,
}

/// Reads all `netflow` rows of an output; rows of other measurements are left out.
///
/// # Errors
/// `InvalidData` with the line when it is no JSON object, or lacks a documented key.
pub fn read_flows(text: &str) -> io::Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let flow = read_flow(line).map_err(|reason| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("output line {}: {reason}: {line}", number + 1),
            )
        })?;
        flows.extend(flow);
    }
    Ok(flows)
}

fn read_flow(line: &str) -> Result<Option<Flow>, String> {
    let Value::Object(mut object) = serde_json::from_str(line).map_err(|error| error.to_string())? else {
        return Err("no JSON object".to_owned());
    };
    for part in ["tags", "fields"] {
        if let Some(Value::Object(inner)) = object.remove(part) {
            object.extend(inner);
        }
    }
    if text(&object, "measurement").or_else(|_| text(&object, "source"))? != "netflow" {
        return Ok(None);
    }
    let address = |key: &str| -> Result<IpAddr, String> {
        let value = text(&object, key)?;
        value
            .parse()
            .map_err(|_| format!("`{key}` is `{value}`, not an address"))
    };
    // Only one transport has each of these; a row of the other leaves them out.
    let transport = text(&object, "transport")?;
    let of = |only: &str, key: &str| if transport == only { number(&object, key) } else { Ok(0) };
    Ok(Some(Flow {
        transport: match transport.as_str() {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            other => return Err(format!("`transport` is `{other}`")),
        },
        family: text(&object, "family")?,
        direction: match text(&object, "direction")?.as_str() {
            "incoming" => Direction::Incoming,
            "outgoing" => Direction::Outgoing,
            other => return Err(format!("`direction` is `{other}`")),
        },
        src_ip: address("src_ip")?,
        src_port: text(&object, "src_port")?,
        dst_ip: address("dst_ip")?,
        dst_port: text(&object, "dst_port")?,
        pid: u32::try_from(number(&object, "pid")?).map_err(|_| "`pid` is too large".to_owned())?,
        process_name: text(&object, "process_name").unwrap_or_default(),
        counts: Counts {
            connections: of("tcp", "tcp_established")?,
            closed: of("tcp", "tcp_closed")?,
            bytes_sent: number(&object, "bytes_written")?,
            bytes_received: number(&object, "bytes_read")?,
            datagrams_sent: of("udp", "datagrams_written")?,
            datagrams_received: of("udp", "datagrams_read")?,
            failures: 0,
        },
        retransmits: of("tcp", "retransmits")?,
        rtt_us: of("tcp", "rtt")?,
    }))
}

fn text(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(_) => Err(format!("`{key}` is neither text nor number")),
        None => Err(format!("`{key}` is missing")),
    }
}

fn number(object: &Map<String, Value>, key: &str) -> Result<u64, String> {
    let value = text(object, key)?;
    value.parse().map_err(|_| format!("`{key}` is `{value}`, not a count"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"measurement":"netflow","time":1,"transport":"udp","family":"IPv4","direction":"incoming",
        "src_ip":"10.77.0.1","src_port":"7000","dst_ip":"10.77.128.1","dst_port":"*","pid":"12","process_name":"x",
        "tcp_established":0,"tcp_closed":0,"bytes_written":5,"bytes_read":"7","datagrams_written":1,
        "datagrams_read":2,"retransmits":0,"rtt":0}"#;

    #[test]
    fn numbers_may_be_text_and_other_measurements_are_left_out() {
        let line = LINE.replace('\n', " ");
        let other = line.replace("netflow", "httpflow");
        let flows = read_flows(&format!("{line}\n{other}\n")).unwrap();
        assert_eq!(flows.len(), 1);
        assert_eq!((flows[0].pid, flows[0].counts.bytes_received), (12, 7));
    }

    #[test]
    fn a_missing_key_is_named() {
        let line = LINE.replace('\n', " ").replace("\"bytes_written\":5,", "");
        let error = read_flows(&line).unwrap_err().to_string();
        assert!(error.contains("`bytes_written` is missing"), "{error}");
    }
}
