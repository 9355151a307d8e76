//! What the encoders ask of a record.
//!
//! One implementation per kind of record; encoders are compiled for each, so that a read costs no more than a member.

use std::net::IpAddr;

use super::plan::End;
use crate::{
    Bash, Direction, Dnsflow, Endpoint, Family, Httpflow, K8sEndpoint, Measurement, Netflow, Port, Transport,
    column::{Counter, TextOf},
};

/// A record that can be encoded: [`Netflow`], [`Httpflow`], [`Dnsflow`] and [`Bash`].
#[expect(private_bounds, reason = "only records of this crate can be encoded")]
pub trait Record: Row {
    /// Its measurement.
    const MEASUREMENT: Measurement;
}

/// The parts of a record. What a kind of record does not have no table of it names.
pub(super) trait Row {
    fn time(&self) -> i64;
    fn endpoint(&self, end: End) -> &Endpoint;
    fn transport(&self) -> Transport;
    fn family(&self) -> Family;
    fn direction(&self) -> Direction;
    fn nat(&self) -> Option<(IpAddr, u16)>;
    fn domain(&self) -> &str;
    fn pid(&self) -> u32;
    fn process_name(&self) -> &str;
    fn netns(&self) -> u32;
    fn k8s(&self, end: End) -> Option<&K8sEndpoint>;
    /// Whether the part is there that [`crate::column::Cell::Optional`] tells of.
    fn has_optional(&self) -> bool {
        false
    }
    fn truncated(&self) -> bool {
        false
    }
    fn text(&self, _text: TextOf) -> &str {
        ""
    }
    fn counter(&self, counter: Counter) -> i64;
}

/// Implements the parts that all flows have; `$flow` is where they are.
macro_rules! flow_parts {
    ($record:ident => $($flow:tt)+) => {
        #[inline]
        fn time(&self) -> i64 {
            self.time_unix_ns
        }
        #[inline]
        fn endpoint(&self, end: End) -> &Endpoint {
            let $record = self;
            match end {
                End::Local => &$($flow)+.local,
                End::Remote => &$($flow)+.remote,
            }
        }
        #[inline]
        fn transport(&self) -> Transport {
            let $record = self;
            $($flow)+.transport
        }
        #[inline]
        fn family(&self) -> Family {
            let $record = self;
            $($flow)+.family
        }
        #[inline]
        fn direction(&self) -> Direction {
            let $record = self;
            $($flow)+.direction
        }
        #[inline]
        fn nat(&self) -> Option<(IpAddr, u16)> {
            let $record = self;
            $($flow)+.dst_nat
        }
        #[inline]
        fn domain(&self) -> &str {
            let $record = self;
            &$($flow)+.dst_domain
        }
        #[inline]
        fn pid(&self) -> u32 {
            let $record = self;
            $($flow)+.pid
        }
        #[inline]
        fn process_name(&self) -> &str {
            let $record = self;
            &$($flow)+.process_name
        }
        #[inline]
        fn netns(&self) -> u32 {
            let $record = self;
            $($flow)+.netns
        }
        #[inline]
        fn k8s(&self, end: End) -> Option<&K8sEndpoint> {
            let $record = self;
            match end {
                End::Local => $($flow)+.local_k8s.as_deref(),
                End::Remote => $($flow)+.remote_k8s.as_deref(),
            }
        }
    };
}

/// Fields are of type int: a count beyond it stays at the largest int.
#[inline]
fn int(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

// === impl Netflow ===

impl Record for Netflow {
    const MEASUREMENT: Measurement = Measurement::Netflow;
}

impl Row for Netflow {
    flow_parts!(record => record);

    #[inline]
    fn counter(&self, counter: Counter) -> i64 {
        int(match counter {
            Counter::BytesRead => self.bytes_read,
            Counter::BytesWritten => self.bytes_written,
            Counter::Retransmits => self.retransmits,
            Counter::Rtt => self.rtt_us,
            Counter::RttVar => self.rtt_var_us,
            Counter::TcpClosed => self.tcp_closed,
            Counter::TcpEstablished => self.tcp_established,
            Counter::DatagramsRead => self.datagrams_read,
            Counter::DatagramsWritten => self.datagrams_written,
            _ => 0,
        })
    }
}

// === impl Httpflow ===

impl Record for Httpflow {
    const MEASUREMENT: Measurement = Measurement::Httpflow;
}

impl Row for Httpflow {
    flow_parts!(record => record.flow);

    #[inline]
    fn has_optional(&self) -> bool {
        self.grpc_status.is_some()
    }

    #[inline]
    fn truncated(&self) -> bool {
        self.truncated
    }

    #[inline]
    fn text(&self, text: TextOf) -> &str {
        match text {
            TextOf::Method => &self.method,
            TextOf::Path => &self.path,
            TextOf::HttpVersion => &self.http_version,
            _ => "",
        }
    }

    #[inline]
    fn counter(&self, counter: Counter) -> i64 {
        int(match counter {
            Counter::BytesRead => self.bytes_read,
            Counter::BytesWritten => self.bytes_written,
            Counter::Count => self.count,
            Counter::Latency => self.latency_ns,
            Counter::StatusCode => self.status_code.into(),
            Counter::GrpcStatus => self.grpc_status.unwrap_or_default().into(),
            _ => 0,
        })
    }
}

// === impl Dnsflow ===

impl Record for Dnsflow {
    const MEASUREMENT: Measurement = Measurement::Dnsflow;
}

impl Row for Dnsflow {
    flow_parts!(record => record.flow);

    #[inline]
    fn has_optional(&self) -> bool {
        self.question.is_some()
    }

    #[inline]
    fn text(&self, text: TextOf) -> &str {
        match (text, &self.question) {
            (TextOf::QueryName, Some(question)) => &question.name,
            (TextOf::QueryType, Some(question)) => &question.kind,
            _ => "",
        }
    }

    #[inline]
    fn counter(&self, counter: Counter) -> i64 {
        match counter {
            Counter::Count => int(self.count),
            Counter::Latency => int(self.latency_ns),
            Counter::LatencyMax => int(self.latency_max_ns),
            Counter::Rcode => self.rcode.into(),
            _ => 0,
        }
    }
}

// === impl Bash ===

impl Record for Bash {
    const MEASUREMENT: Measurement = Measurement::Bash;
}

/// A command line has no ends.
const NO_END: Endpoint = Endpoint {
    ip: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
    port: Port::Any,
};

impl Row for Bash {
    #[inline]
    fn time(&self) -> i64 {
        self.time_unix_ns
    }

    fn endpoint(&self, _end: End) -> &Endpoint {
        &NO_END
    }

    fn transport(&self) -> Transport {
        Transport::Tcp
    }

    fn family(&self) -> Family {
        Family::V4
    }

    fn direction(&self) -> Direction {
        Direction::Outgoing
    }

    fn nat(&self) -> Option<(IpAddr, u16)> {
        None
    }

    fn domain(&self) -> &str {
        ""
    }

    #[inline]
    fn pid(&self) -> u32 {
        self.pid
    }

    fn process_name(&self) -> &str {
        ""
    }

    fn netns(&self) -> u32 {
        0
    }

    #[inline]
    fn k8s(&self, end: End) -> Option<&K8sEndpoint> {
        match end {
            End::Local => self.k8s.as_deref(),
            End::Remote => None,
        }
    }

    #[inline]
    fn truncated(&self) -> bool {
        self.truncated
    }

    #[inline]
    fn text(&self, text: TextOf) -> &str {
        match text {
            TextOf::User => &self.user,
            TextOf::Cmd => &self.cmd,
            TextOf::Message => &self.message,
            _ => "",
        }
    }

    fn counter(&self, _counter: Counter) -> i64 {
        0
    }
}
