//! Messages to records, checking everything.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use records::{
    Bash, Direction, Dnsflow, Endpoint, Family, Flow, Httpflow, K8sEndpoint, Netflow, Port, Question, RecordBatch, Str,
    Transport,
};

use super::Limits;
use crate::{limits, v1};

/// Decodes the batches of one stream; holds the texts the stream has numbered.
#[derive(Debug)]
pub struct StreamDecoder {
    limits: Limits,
    /// Index is the text's number; number 0 is the empty text.
    texts: Vec<Str>,
    bytes: usize,
}

/// What is wrong with a batch. The stream can not go on: the two ends may disagree about the texts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// `seq` is 0.
    #[error("batch.seq is 0: sequence numbers start at 1")]
    Seq,
    /// More records than a batch may have.
    #[error("batch has {records} records: accepted is at most {max}")]
    TooManyRecords {
        /// How many came.
        records: usize,
        /// The bound.
        max: usize,
    },
    /// The two ends number texts differently.
    #[error("batch.strings.first_id is {first_id}: the next number is {expected}")]
    TextNumber {
        /// What came.
        first_id: u32,
        /// What had to come.
        expected: u32,
    },
    /// A text is too long.
    #[error("batch.strings.texts[{index}] is {len} bytes long: accepted is 1 to {max}")]
    TextLength {
        /// Place in the message.
        index: usize,
        /// Its length, bytes.
        len: usize,
        /// The bound, bytes.
        max: usize,
    },
    /// The stream's texts outgrow their bound.
    #[error("batch.strings would make this stream hold more than {entries} texts of {bytes} bytes: reset the texts")]
    DictionaryFull {
        /// Bound in texts.
        entries: usize,
        /// Bound in bytes.
        bytes: usize,
    },
    /// A number that no text has.
    #[error("batch.{kind}[{record}].{field} is text {id}: this stream has numbered {known}")]
    UnknownText {
        /// Field of the batch.
        kind: &'static str,
        /// Index of the record.
        record: usize,
        /// Field of the record.
        field: &'static str,
        /// The number.
        id: u32,
        /// How many texts there are.
        known: usize,
    },
    /// Too many labels, or one without its value.
    #[error("batch.{kind}[{record}] has {numbers} numbers for labels: an even number up to {} is accepted", 2 * limits::MAX_LABELS)]
    Labels {
        /// Field of the batch.
        kind: &'static str,
        /// Index of the record.
        record: usize,
        /// How many there are.
        numbers: usize,
    },
    /// An enum value this version does not have.
    #[error("batch.{kind}[{record}].{field} is {value}: no such value")]
    Enum {
        /// Field of the batch.
        kind: &'static str,
        /// Index of the record.
        record: usize,
        /// Field of the record.
        field: &'static str,
        /// The value.
        value: i32,
    },
    /// An address is missing, incomplete or ambiguous.
    #[error("batch.{kind}[{record}].{field}_v4/_v6_hi/_v6_lo: {why}")]
    Address {
        /// Field of the batch.
        kind: &'static str,
        /// Index of the record.
        record: usize,
        /// Field of the record, without `_v4` or `_v6_*`.
        field: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// A command line that is too long.
    #[error("batch.bash[{record}].cmd is {len} bytes long: accepted is at most {max}")]
    Line {
        /// Index of the record.
        record: usize,
        /// Its length, bytes.
        len: usize,
        /// The bound, bytes.
        max: usize,
    },
    /// A value out of its range.
    #[error("batch.{kind}[{record}].{field} is {value}: accepted is {accepted}")]
    Range {
        /// Field of the batch.
        kind: &'static str,
        /// Index of the record.
        record: usize,
        /// Field of the record.
        field: &'static str,
        /// The value.
        value: u64,
        /// What would be.
        accepted: &'static str,
    },
    /// A port beyond 65535.
    #[error("batch.{kind}[{record}].{field} is {value}: accepted is at most {max}")]
    Port {
        /// Field of the batch.
        kind: &'static str,
        /// Index of the record.
        record: usize,
        /// Field of the record.
        field: &'static str,
        /// The value.
        value: u32,
        /// The bound.
        max: u32,
    },
}

/// Where in a batch a record stands.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    decoder: &'a StreamDecoder,
    kind: &'static str,
    record: usize,
}

// === impl DecodeError ===

impl DecodeError {
    /// Reason for counters.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Seq => "seq",
            Self::TooManyRecords { .. } => "too_many_records",
            Self::TextNumber { .. } => "text_number",
            Self::TextLength { .. } => "text_length",
            Self::DictionaryFull { .. } => "dictionary_full",
            Self::UnknownText { .. } => "unknown_text",
            Self::Labels { .. } => "labels",
            Self::Enum { .. } => "enum",
            Self::Address { .. } => "address",
            Self::Port { .. } => "port",
            Self::Line { .. } => "line",
            Self::Range { .. } => "range",
        }
    }
}

// === impl StreamDecoder ===

impl StreamDecoder {
    /// For a stream that was announced `limits`.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            texts: vec![Arc::from("")],
            bytes: 0,
        }
    }

    /// Decodes one batch.
    ///
    /// # Errors
    /// [`DecodeError`]: nothing of the batch is used, and the stream must end.
    pub fn decode(&mut self, batch: v1::Batch) -> Result<(u64, RecordBatch), DecodeError> {
        let records = batch.records();
        let v1::Batch {
            seq,
            strings,
            netflow,
            httpflow,
            dnsflow,
            bash,
            flowlog,
        } = batch;
        self.learn(seq, strings)?;
        if records > limits::MAX_BATCH_RECORDS {
            return Err(DecodeError::TooManyRecords {
                records,
                max: limits::MAX_BATCH_RECORDS,
            });
        }
        let batch = RecordBatch {
            netflow: self.each("netflow", netflow, At::netflow)?,
            httpflow: self.each("httpflow", httpflow, At::httpflow)?,
            dnsflow: self.each("dnsflow", dnsflow, At::dnsflow)?,
            bash: self.each("bash", bash, At::bash)?,
            flowlog: self.each("flowlog", flowlog, At::flowlog)?,
        };
        Ok((seq, batch))
    }

    fn each<'a, W, R>(
        &'a self,
        kind: &'static str,
        wire: Vec<W>,
        decode: fn(At<'a>, W) -> Result<R, DecodeError>,
    ) -> Result<Vec<R>, DecodeError> {
        let at = |record| At {
            decoder: self,
            kind,
            record,
        };
        wire.into_iter()
            .enumerate()
            .map(|(record, wire)| decode(at(record), wire))
            .collect()
    }

    /// Takes only the texts of a batch whose records are not wanted now: later batches use them.
    ///
    /// # Errors
    /// [`DecodeError`]: the stream must end.
    pub fn skip(&mut self, batch: v1::Batch) -> Result<u64, DecodeError> {
        self.learn(batch.seq, batch.strings)?;
        Ok(batch.seq)
    }

    fn learn(&mut self, seq: u64, strings: Option<v1::Strings>) -> Result<(), DecodeError> {
        if seq == 0 {
            return Err(DecodeError::Seq);
        }
        let Some(v1::Strings { reset, first_id, texts }) = strings else {
            return Ok(());
        };
        if reset {
            self.texts.truncate(1);
            self.bytes = 0;
        }
        let expected = u32::try_from(self.texts.len()).unwrap_or(u32::MAX);
        if first_id != expected {
            return Err(DecodeError::TextNumber { first_id, expected });
        }
        let Limits {
            max_string_bytes,
            max_dictionary_entries,
            max_dictionary_bytes,
            ..
        } = self.limits;
        for (index, text) in texts.into_iter().enumerate() {
            if text.is_empty() || text.len() > max_string_bytes {
                return Err(DecodeError::TextLength {
                    index,
                    len: text.len(),
                    max: max_string_bytes,
                });
            }
            // The empty text does not count.
            if self.texts.len() > max_dictionary_entries || self.bytes + text.len() > max_dictionary_bytes {
                return Err(DecodeError::DictionaryFull {
                    entries: max_dictionary_entries,
                    bytes: max_dictionary_bytes,
                });
            }
            self.bytes += text.len();
            self.texts.push(text.into());
        }
        Ok(())
    }
}

// === impl At ===

impl At<'_> {
    pub(super) fn text(self, field: &'static str, id: u32) -> Result<Str, DecodeError> {
        let texts = &self.decoder.texts;
        usize::try_from(id)
            .ok()
            .and_then(|index| texts.get(index))
            .cloned()
            .ok_or(DecodeError::UnknownText {
                kind: self.kind,
                record: self.record,
                field,
                id,
                known: texts.len() - 1,
            })
    }

    pub(super) fn address(
        self,
        field: &'static str,
        v4: Option<u32>,
        v6_hi: Option<u64>,
        v6_lo: Option<u64>,
    ) -> Result<Option<IpAddr>, DecodeError> {
        let bad = |why| {
            Err(DecodeError::Address {
                kind: self.kind,
                record: self.record,
                field,
                why,
            })
        };
        match (v4, v6_hi, v6_lo) {
            (None, None, None) => Ok(None),
            (Some(bits), None, None) => Ok(Some(Ipv4Addr::from_bits(bits).into())),
            (None, Some(hi), Some(lo)) => {
                let v6 = Ipv6Addr::from_bits(u128::from(hi) << 64 | u128::from(lo));
                if v6.to_ipv4_mapped().is_some() {
                    return bad("a v4-mapped IPv6 address must be sent as IPv4");
                }
                Ok(Some(v6.into()))
            }
            (None, _, _) => bad("half of an IPv6 address"),
            (Some(_), _, _) => bad("both an IPv4 and an IPv6 address"),
        }
    }

    fn endpoint(
        self,
        field: &'static str,
        address: Option<IpAddr>,
        port_field: &'static str,
        port_plus_one: u32,
    ) -> Result<Endpoint, DecodeError> {
        let ip = address.ok_or(DecodeError::Address {
            kind: self.kind,
            record: self.record,
            field,
            why: "no address",
        })?;
        let port = match port_plus_one.checked_sub(1) {
            None => Port::Any,
            Some(number) => Port::Number(self.port(port_field, number, port_plus_one, 65_536)?),
        };
        Ok(Endpoint { ip, port })
    }

    fn port(self, field: &'static str, number: u32, value: u32, max: u32) -> Result<u16, DecodeError> {
        u16::try_from(number).map_err(|_| DecodeError::Port {
            kind: self.kind,
            record: self.record,
            field,
            value,
            max,
        })
    }

    fn k8s(self, wire: Option<&v1::K8sEndpoint>) -> Result<Option<Arc<K8sEndpoint>>, DecodeError> {
        let Some(v1::K8sEndpoint {
            namespace,
            pod,
            service,
            workload,
            workload_type,
            labels,
        }) = wire
        else {
            return Ok(None);
        };
        if labels.len() > 2 * limits::MAX_LABELS || labels.len() % 2 != 0 {
            return Err(DecodeError::Labels {
                kind: self.kind,
                record: self.record,
                numbers: labels.len(),
            });
        }
        let texts = labels.chunks_exact(2).map(|pair| match *pair {
            [key, value] => Ok((self.text("k8s.labels", key)?, self.text("k8s.labels", value)?)),
            _ => Ok(Default::default()),
        });
        let labels: Arc<[(Str, Str)]> = if labels.is_empty() {
            Arc::default()
        } else {
            texts.collect::<Result<_, _>>()?
        };
        Ok(Some(Arc::new(K8sEndpoint {
            namespace: self.text("k8s.namespace", *namespace)?,
            pod: self.text("k8s.pod", *pod)?,
            service: self.text("k8s.service", *service)?,
            workload: self.text("k8s.workload", *workload)?,
            workload_type: self.text("k8s.workload_type", *workload_type)?,
            labels,
        })))
    }

    /// The value if it is accepted.
    pub(super) fn range<T: TryFrom<u64>>(
        self,
        field: &'static str,
        value: impl Into<u64>,
        accepted: &'static str,
    ) -> Result<T, DecodeError> {
        let value = value.into();
        T::try_from(value).map_err(|_| self.refused(field, value, accepted))
    }

    pub(super) fn refused(self, field: &'static str, value: u64, accepted: &'static str) -> DecodeError {
        DecodeError::Range {
            kind: self.kind,
            record: self.record,
            field,
            value,
            accepted,
        }
    }

    fn unknown(self, field: &'static str, value: i32) -> DecodeError {
        DecodeError::Enum {
            kind: self.kind,
            record: self.record,
            field,
            value,
        }
    }

    fn flow(self, wire: &v1::Flow) -> Result<Flow, DecodeError> {
        let local = self.address("local", wire.local_v4, wire.local_v6_hi, wire.local_v6_lo)?;
        let remote = self.address("remote", wire.remote_v4, wire.remote_v6_hi, wire.remote_v6_lo)?;
        let dst_nat = match self.address("nat", wire.nat_v4, wire.nat_v6_hi, wire.nat_v6_lo)? {
            Some(ip) => Some((ip, self.port("nat_port", wire.nat_port, wire.nat_port, 65_535)?)),
            None if wire.nat_port != 0 => {
                return Err(DecodeError::Address {
                    kind: self.kind,
                    record: self.record,
                    field: "nat",
                    why: "nat_port without address",
                });
            }
            None => None,
        };
        Ok(Flow {
            local: self.endpoint("local", local, "local_port_plus_one", wire.local_port_plus_one)?,
            remote: self.endpoint("remote", remote, "remote_port_plus_one", wire.remote_port_plus_one)?,
            transport: match v1::Transport::try_from(wire.transport) {
                Ok(v1::Transport::Tcp) => Transport::Tcp,
                Ok(v1::Transport::Udp) => Transport::Udp,
                Ok(v1::Transport::Unspecified) | Err(_) => return Err(self.unknown("transport", wire.transport)),
            },
            family: match v1::Family::try_from(wire.family) {
                Ok(v1::Family::Ipv4) => Family::V4,
                Ok(v1::Family::Ipv6) => Family::V6,
                Ok(v1::Family::Unspecified) | Err(_) => return Err(self.unknown("family", wire.family)),
            },
            direction: match v1::Direction::try_from(wire.direction) {
                Ok(v1::Direction::Incoming) => Direction::Incoming,
                Ok(v1::Direction::Outgoing) => Direction::Outgoing,
                Ok(v1::Direction::Unspecified) | Err(_) => return Err(self.unknown("direction", wire.direction)),
            },
            netns: wire.netns,
            pid: wire.pid,
            process_name: self.text("process_name", wire.process_name)?,
            dst_nat,
            dst_domain: self.text("dst_domain", wire.dst_domain)?,
            local_k8s: self.k8s(wire.local_k8s.as_ref())?,
            remote_k8s: self.k8s(wire.remote_k8s.as_ref())?,
        })
    }

    fn some_flow(self, wire: Option<&v1::Flow>) -> Result<Flow, DecodeError> {
        wire.map_or_else(|| self.flow(&v1::Flow::default()), |wire| self.flow(wire))
    }

    fn netflow(self, wire: v1::Netflow) -> Result<Netflow, DecodeError> {
        let Flow {
            local,
            remote,
            transport,
            family,
            direction,
            netns,
            pid,
            process_name,
            dst_nat,
            dst_domain,
            local_k8s,
            remote_k8s,
        } = self.flow(&v1::Flow {
            transport: wire.transport,
            family: wire.family,
            direction: wire.direction,
            local_v4: wire.local_v4,
            local_v6_hi: wire.local_v6_hi,
            local_v6_lo: wire.local_v6_lo,
            local_port_plus_one: wire.local_port_plus_one,
            remote_v4: wire.remote_v4,
            remote_v6_hi: wire.remote_v6_hi,
            remote_v6_lo: wire.remote_v6_lo,
            remote_port_plus_one: wire.remote_port_plus_one,
            nat_v4: wire.nat_v4,
            nat_v6_hi: wire.nat_v6_hi,
            nat_v6_lo: wire.nat_v6_lo,
            nat_port: wire.nat_port,
            netns: wire.netns,
            pid: wire.pid,
            process_name: wire.process_name,
            dst_domain: wire.dst_domain,
            local_k8s: wire.local_k8s,
            remote_k8s: wire.remote_k8s,
        })?;
        Ok(Netflow {
            time_unix_ns: wire.time_unix_ns,
            local,
            remote,
            transport,
            family,
            direction,
            netns,
            pid,
            process_name,
            dst_nat,
            dst_domain,
            local_k8s,
            remote_k8s,
            bytes_read: wire.bytes_read,
            bytes_written: wire.bytes_written,
            retransmits: wire.retransmits,
            rtt_us: wire.rtt_us,
            rtt_var_us: wire.rtt_var_us,
            tcp_closed: wire.tcp_closed,
            tcp_established: wire.tcp_established,
            datagrams_read: wire.datagrams_read,
            datagrams_written: wire.datagrams_written,
        })
    }

    fn httpflow(self, wire: v1::Httpflow) -> Result<Httpflow, DecodeError> {
        Ok(Httpflow {
            time_unix_ns: wire.time_unix_ns,
            flow: self.some_flow(wire.flow.as_ref())?,
            method: self.text("method", wire.method)?,
            path: self.text("path", wire.path)?,
            http_version: self.text("http_version", wire.http_version)?,
            status_code: wire.status_code,
            grpc_status: wire.grpc_status,
            truncated: wire.truncated,
            count: wire.count,
            latency_ns: wire.latency_ns,
            bytes_read: wire.bytes_read,
            bytes_written: wire.bytes_written,
        })
    }

    fn dnsflow(self, wire: v1::Dnsflow) -> Result<Dnsflow, DecodeError> {
        let question = match wire.question {
            Some(v1::DnsQuestion { name, kind }) => Some(Question {
                name: self.text("question.name", name)?,
                kind: self.text("question.kind", kind)?,
            }),
            None => None,
        };
        Ok(Dnsflow {
            time_unix_ns: wire.time_unix_ns,
            flow: self.some_flow(wire.flow.as_ref())?,
            question,
            rcode: wire.rcode,
            count: wire.count,
            latency_ns: wire.latency_ns,
            latency_max_ns: wire.latency_max_ns,
        })
    }

    fn bash(self, wire: v1::Bash) -> Result<Bash, DecodeError> {
        let max = self.decoder.limits.max_string_bytes;
        if wire.cmd.len() > max {
            return Err(DecodeError::Line {
                record: self.record,
                len: wire.cmd.len(),
                max,
            });
        }
        let user = self.text("user", wire.user)?;
        let k8s = self.k8s(wire.k8s.as_ref())?;
        let cmd = wire.cmd.into();
        Ok(Bash::new(wire.time_unix_ns, wire.pid, user, cmd, wire.truncated, k8s))
    }
}
