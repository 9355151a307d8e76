//! Records to messages.

use std::net::IpAddr;

use ahash::AHashMap;
use records::{
    AnyRecord, Bash, Direction, Dnsflow, Family, Flow, Httpflow, K8sEndpoint, Netflow, Port, Question, RecordBatch,
    Str, Transport,
};

use super::Limits;
use crate::{limits, v1};

/// Encodes the batches of one stream.
#[derive(Debug)]
pub struct StreamEncoder {
    limits: Limits,
    numbers: AHashMap<Str, u32>,
    bytes: usize,
}

/// Why a batch can not be sent on any stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A text is longer than the peer takes.
    #[error("a text of {len} bytes is longer than the {max} the aggregator takes")]
    TextTooLong {
        /// Its length, bytes.
        len: usize,
        /// The bound, bytes.
        max: usize,
    },
    /// The batch alone has more texts than a stream may hold.
    #[error("one batch has more texts than the {entries} texts of {bytes} bytes the aggregator takes")]
    DictionaryFull {
        /// Bound in texts.
        entries: usize,
        /// Bound in bytes.
        bytes: usize,
    },
}

/// Most bytes of one record on the wire without its texts: the sum of every field at its largest, rounded up.
const RECORD_BOUND: usize = 300;
/// Most bytes of one text besides its own: tag and length, and its number where that is one of a list.
const TEXT_OVERHEAD: usize = 4 + 3;

/// Bytes that one record needs on the wire at most, its texts included as if all were new. `None`: a text is longer
/// than [`limits::MAX_STRING_BYTES`], so the record can not be sent.
#[must_use]
pub fn wire_bound(record: &AnyRecord) -> Option<usize> {
    let mut sum = match record {
        AnyRecord::FlowLog(record) => super::flowlog::bound(record),
        _ => RECORD_BOUND,
    };
    let mut fits = true;
    for_each_text(record, |text| {
        sum += text.len() + TEXT_OVERHEAD;
        fits &= text.len() <= limits::MAX_STRING_BYTES;
    });
    fits.then_some(sum)
}

fn for_each_text<'a>(record: &'a AnyRecord, mut visit: impl FnMut(&'a Str)) {
    let (local, remote) = match record {
        AnyRecord::Netflow(record) => {
            visit(&record.process_name);
            visit(&record.dst_domain);
            (&record.local_k8s, &record.remote_k8s)
        }
        AnyRecord::Httpflow(Httpflow {
            flow,
            method,
            path,
            http_version,
            ..
        }) => {
            for text in [&flow.process_name, &flow.dst_domain, method, path, http_version] {
                visit(text);
            }
            (&flow.local_k8s, &flow.remote_k8s)
        }
        AnyRecord::Dnsflow(Dnsflow { flow, question, .. }) => {
            visit(&flow.process_name);
            visit(&flow.dst_domain);
            if let Some(Question { name, kind }) = question {
                visit(name);
                visit(kind);
            }
            (&flow.local_k8s, &flow.remote_k8s)
        }
        AnyRecord::Bash(Bash { user, cmd, k8s, .. }) => {
            visit(user);
            visit(cmd);
            (k8s, &None)
        }
        AnyRecord::FlowLog(record) => return super::flowlog::for_each_text(record, visit),
    };
    for k8s in [local, remote].into_iter().flatten() {
        let K8sEndpoint {
            namespace,
            pod,
            service,
            workload,
            workload_type,
            labels,
        } = k8s.as_ref();
        [namespace, pod, service, workload, workload_type]
            .into_iter()
            .chain(sent(labels).iter().flat_map(|(key, value)| [key, value]))
            .for_each(&mut visit);
    }
}

/// As many labels as a record may carry.
fn sent(labels: &[(Str, Str)]) -> &[(Str, Str)] {
    labels.get(..limits::MAX_LABELS).unwrap_or(labels)
}

// === impl StreamEncoder ===

impl StreamEncoder {
    /// For a stream whose aggregator announced `limits`.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            numbers: AHashMap::new(),
            bytes: 0,
        }
    }

    /// Encodes one batch. When its texts do not fit beside those already numbered, all are numbered anew.
    ///
    /// # Errors
    /// [`EncodeError`] when the batch fits no stream of this peer; the stream can go on with other batches.
    pub fn encode(&mut self, seq: u64, batch: &RecordBatch) -> Result<v1::Batch, EncodeError> {
        let known = self.numbers.len();
        match self.encode_with(seq, batch, known == 0) {
            Err(EncodeError::DictionaryFull { .. }) if known > 0 => {
                self.forget();
                self.encode_with(seq, batch, true)
            }
            other => other,
        }
        .inspect_err(|_| {
            // Numbers given during the failed attempt never reach the peer: start anew, with a reset in the next batch.
            self.forget();
        })
    }

    fn forget(&mut self) {
        self.numbers.clear();
        self.bytes = 0;
    }

    fn encode_with(&mut self, seq: u64, batch: &RecordBatch, reset: bool) -> Result<v1::Batch, EncodeError> {
        let RecordBatch {
            netflow,
            httpflow,
            dnsflow,
            bash,
            flowlog,
        } = batch;
        let first_id = self.next_id();
        let mut texts = Texts {
            encoder: self,
            new: Vec::new(),
        };
        let netflow = netflow
            .iter()
            .map(|record| texts.netflow(record))
            .collect::<Result<Vec<_>, _>>()?;
        let httpflow = httpflow
            .iter()
            .map(|record| texts.httpflow(record))
            .collect::<Result<Vec<_>, _>>()?;
        let dnsflow = dnsflow
            .iter()
            .map(|record| texts.dnsflow(record))
            .collect::<Result<Vec<_>, _>>()?;
        let bash = bash
            .iter()
            .map(|record| texts.bash(record))
            .collect::<Result<Vec<_>, _>>()?;
        let flowlog = flowlog
            .iter()
            .map(|record| texts.flowlog(record))
            .collect::<Result<Vec<_>, _>>()?;
        let new = texts.new;
        let strings = (reset || !new.is_empty()).then_some(v1::Strings {
            reset,
            first_id,
            texts: new,
        });
        Ok(v1::Batch {
            seq,
            strings,
            netflow,
            httpflow,
            dnsflow,
            bash,
            flowlog,
        })
    }

    fn next_id(&self) -> u32 {
        // Bounded by max_dictionary_entries, itself a u32.
        u32::try_from(self.numbers.len()).unwrap_or(u32::MAX).saturating_add(1)
    }
}

/// One batch's view of the encoder's texts.
pub(super) struct Texts<'a> {
    encoder: &'a mut StreamEncoder,
    new: Vec<String>,
}

impl Texts<'_> {
    pub(super) fn number(&mut self, text: &Str) -> Result<u32, EncodeError> {
        if text.is_empty() {
            return Ok(0);
        }
        let encoder = &mut *self.encoder;
        if let Some(number) = encoder.numbers.get(text) {
            return Ok(*number);
        }
        let Limits {
            max_string_bytes,
            max_dictionary_entries,
            max_dictionary_bytes,
            ..
        } = encoder.limits;
        if text.len() > max_string_bytes {
            return Err(EncodeError::TextTooLong {
                len: text.len(),
                max: max_string_bytes,
            });
        }
        if encoder.numbers.len() >= max_dictionary_entries || encoder.bytes + text.len() > max_dictionary_bytes {
            return Err(EncodeError::DictionaryFull {
                entries: max_dictionary_entries,
                bytes: max_dictionary_bytes,
            });
        }
        let number = encoder.next_id();
        encoder.numbers.insert(text.clone(), number);
        encoder.bytes += text.len();
        self.new.push(text.as_ref().to_owned());
        Ok(number)
    }

    fn k8s(&mut self, k8s: Option<&K8sEndpoint>) -> Result<Option<v1::K8sEndpoint>, EncodeError> {
        let Some(K8sEndpoint {
            namespace,
            pod,
            service,
            workload,
            workload_type,
            labels,
        }) = k8s
        else {
            return Ok(None);
        };
        let mut numbers = Vec::with_capacity(2 * labels.len());
        for (key, value) in sent(labels) {
            numbers.extend([self.number(key)?, self.number(value)?]);
        }
        Ok(Some(v1::K8sEndpoint {
            labels: numbers,
            namespace: self.number(namespace)?,
            pod: self.number(pod)?,
            service: self.number(service)?,
            workload: self.number(workload)?,
            workload_type: self.number(workload_type)?,
        }))
    }

    fn netflow(&mut self, record: &Netflow) -> Result<v1::Netflow, EncodeError> {
        // Destructured so that a new field is a compile error here.
        let Netflow {
            time_unix_ns,
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
            bytes_read,
            bytes_written,
            retransmits,
            rtt_us,
            rtt_var_us,
            tcp_closed,
            tcp_established,
            datagrams_read,
            datagrams_written,
        } = record;
        let (local_v4, local_v6_hi, local_v6_lo) = address(local.ip);
        let (remote_v4, remote_v6_hi, remote_v6_lo) = address(remote.ip);
        let (nat_v4, nat_v6_hi, nat_v6_lo) = dst_nat.map_or((None, None, None), |(ip, _)| address(ip));
        Ok(v1::Netflow {
            time_unix_ns: *time_unix_ns,
            transport: match transport {
                Transport::Tcp => v1::Transport::Tcp,
                Transport::Udp => v1::Transport::Udp,
            }
            .into(),
            family: match family {
                Family::V4 => v1::Family::Ipv4,
                Family::V6 => v1::Family::Ipv6,
            }
            .into(),
            direction: match direction {
                Direction::Incoming => v1::Direction::Incoming,
                Direction::Outgoing => v1::Direction::Outgoing,
            }
            .into(),
            local_v4,
            local_v6_hi,
            local_v6_lo,
            local_port_plus_one: port(local.port),
            remote_v4,
            remote_v6_hi,
            remote_v6_lo,
            remote_port_plus_one: port(remote.port),
            nat_v4,
            nat_v6_hi,
            nat_v6_lo,
            nat_port: dst_nat.map_or(0, |(_, port)| u32::from(port)),
            netns: *netns,
            pid: *pid,
            process_name: self.number(process_name)?,
            dst_domain: self.number(dst_domain)?,
            local_k8s: self.k8s(local_k8s.as_deref())?,
            remote_k8s: self.k8s(remote_k8s.as_deref())?,
            bytes_read: *bytes_read,
            bytes_written: *bytes_written,
            retransmits: *retransmits,
            rtt_us: *rtt_us,
            rtt_var_us: *rtt_var_us,
            tcp_closed: *tcp_closed,
            tcp_established: *tcp_established,
            datagrams_read: *datagrams_read,
            datagrams_written: *datagrams_written,
        })
    }

    fn flow(&mut self, flow: &Flow) -> Result<v1::Flow, EncodeError> {
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
        } = flow;
        let (local_v4, local_v6_hi, local_v6_lo) = address(local.ip);
        let (remote_v4, remote_v6_hi, remote_v6_lo) = address(remote.ip);
        let (nat_v4, nat_v6_hi, nat_v6_lo) = dst_nat.map_or((None, None, None), |(ip, _)| address(ip));
        Ok(v1::Flow {
            transport: match transport {
                Transport::Tcp => v1::Transport::Tcp,
                Transport::Udp => v1::Transport::Udp,
            }
            .into(),
            family: match family {
                Family::V4 => v1::Family::Ipv4,
                Family::V6 => v1::Family::Ipv6,
            }
            .into(),
            direction: match direction {
                Direction::Incoming => v1::Direction::Incoming,
                Direction::Outgoing => v1::Direction::Outgoing,
            }
            .into(),
            local_v4,
            local_v6_hi,
            local_v6_lo,
            local_port_plus_one: port(local.port),
            remote_v4,
            remote_v6_hi,
            remote_v6_lo,
            remote_port_plus_one: port(remote.port),
            nat_v4,
            nat_v6_hi,
            nat_v6_lo,
            nat_port: dst_nat.map_or(0, |(_, port)| u32::from(port)),
            netns: *netns,
            pid: *pid,
            process_name: self.number(process_name)?,
            dst_domain: self.number(dst_domain)?,
            local_k8s: self.k8s(local_k8s.as_deref())?,
            remote_k8s: self.k8s(remote_k8s.as_deref())?,
        })
    }

    fn httpflow(&mut self, record: &Httpflow) -> Result<v1::Httpflow, EncodeError> {
        let Httpflow {
            time_unix_ns,
            flow,
            method,
            path,
            http_version,
            status_code,
            grpc_status,
            truncated,
            count,
            latency_ns,
            bytes_read,
            bytes_written,
        } = record;
        Ok(v1::Httpflow {
            time_unix_ns: *time_unix_ns,
            flow: Some(self.flow(flow)?),
            method: self.number(method)?,
            path: self.number(path)?,
            http_version: self.number(http_version)?,
            status_code: *status_code,
            grpc_status: *grpc_status,
            truncated: *truncated,
            count: *count,
            latency_ns: *latency_ns,
            bytes_read: *bytes_read,
            bytes_written: *bytes_written,
        })
    }

    fn dnsflow(&mut self, record: &Dnsflow) -> Result<v1::Dnsflow, EncodeError> {
        let Dnsflow {
            time_unix_ns,
            flow,
            question,
            rcode,
            count,
            latency_ns,
            latency_max_ns,
        } = record;
        let question = match question {
            Some(Question { name, kind }) => Some(v1::DnsQuestion {
                name: self.number(name)?,
                kind: self.number(kind)?,
            }),
            None => None,
        };
        Ok(v1::Dnsflow {
            time_unix_ns: *time_unix_ns,
            flow: Some(self.flow(flow)?),
            question,
            rcode: *rcode,
            count: *count,
            latency_ns: *latency_ns,
            latency_max_ns: *latency_max_ns,
        })
    }

    fn bash(&mut self, record: &Bash) -> Result<v1::Bash, EncodeError> {
        let Bash {
            time_unix_ns,
            pid,
            user,
            cmd,
            truncated,
            message: _,
            k8s,
        } = record;
        let max = self.encoder.limits.max_string_bytes;
        if cmd.len() > max {
            return Err(EncodeError::TextTooLong { len: cmd.len(), max });
        }
        Ok(v1::Bash {
            time_unix_ns: *time_unix_ns,
            pid: *pid,
            user: self.number(user)?,
            cmd: cmd.as_ref().to_owned(),
            truncated: *truncated,
            k8s: self.k8s(k8s.as_deref())?,
        })
    }
}

/// The three address fields. A v4-mapped IPv6 address is sent as the IPv4 address it is.
pub(super) fn address(ip: IpAddr) -> (Option<u32>, Option<u64>, Option<u64>) {
    match ip.to_canonical() {
        IpAddr::V4(v4) => (Some(v4.to_bits()), None, None),
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            // Upper half, then the cut to the lower half.
            (None, Some((bits >> 64) as u64), Some(bits as u64))
        }
    }
}

fn port(port: Port) -> u32 {
    match port {
        Port::Any => 0,
        Port::Number(number) => u32::from(number) + 1,
    }
}
