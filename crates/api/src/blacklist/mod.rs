//! The blacklist language of `bpf-netlog`: which packets are left out.
//!
//! ```text
//! text ─▶ lex ─▶ parse (types, names, arguments) ─▶ rules: conjunctions for the kernel, the rest per flow
//! ```
//! Entry: [`Blacklist::compile`]. A packet is left out when any statement is true. Of each statement the alternatives that
//! speak of addresses, ports and protocols alone become [`Rule`]s, which the kernel side compares packet by packet; those
//! with names of pods, and the few that no rule can say, are asked once per flow ([`Blacklist::flow_matches`]).
//!
//! `&&` binds tighter than `||`. The documented table has them on one level; the existing collector does it as here.

mod lex;
mod parse;
mod rules;

use std::{fmt, net::IpAddr};

pub use rules::{Ports, Prefix, Rule};

use parse::{Expr, Text};

/// Rules that the kernel side compares at most.
pub const MAX_RULES: usize = 64;
/// Longest program, bytes.
pub const MAX_BYTES: usize = 16 << 10;

/// A compiled blacklist.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Blacklist {
    rules: Vec<Rule>,
    per_flow: Vec<Expr>,
    names_pods: bool,
}

/// What is compared, of one packet. Its source is the side that is observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port; 0 for none.
    pub src_port: u16,
    /// Destination port; 0 for none.
    pub dst_port: u16,
    /// It is TCP.
    pub tcp: bool,
    /// It is UDP.
    pub udp: bool,
}

/// What is wrong with a program, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {found}; expected {expected}")]
pub struct BlacklistError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is there.
    pub found: String,
    /// What would be right.
    pub expected: String,
}

/// Values of one flow.
struct View<'a> {
    packet: &'a Packet,
    src_pod: &'a str,
    dst_pod: &'a str,
}

// === impl Blacklist ===

impl Blacklist {
    /// Compiles a program.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn compile(text: &str) -> Result<Self, BlacklistError> {
        if text.len() > MAX_BYTES {
            return Err(BlacklistError {
                line: 1,
                column: 1,
                found: format!("{} bytes", text.len()),
                expected: format!("at most {MAX_BYTES}"),
            });
        }
        let statements = parse::program(text)?;
        let mut out = Self::default();
        for statement in statements {
            out.names_pods |= statement.names_pods();
            match rules::of(&statement) {
                Some((rules, rest)) if out.rules.len() + rules.len() <= MAX_RULES => {
                    out.rules.extend(rules);
                    out.per_flow.extend(rest);
                }
                _ => out.per_flow.push(statement),
            }
        }
        Ok(out)
    }

    /// For the kernel side: a packet that any of them matches is left out.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Whether flows must be asked for too.
    #[must_use]
    pub fn asks_flows(&self) -> bool {
        !self.per_flow.is_empty()
    }

    /// Whether names of pods matter.
    #[must_use]
    pub const fn names_pods(&self) -> bool {
        self.names_pods
    }

    /// Whether a rule matches: what the kernel side does.
    #[must_use]
    pub fn packet_matches(&self, packet: &Packet) -> bool {
        self.rules.iter().any(|rule| rule.matches(packet))
    }

    /// Whether what is left to ask per flow matches. Names of pods are empty where there is none.
    #[must_use]
    pub fn flow_matches(&self, packet: &Packet, src_pod: &str, dst_pod: &str) -> bool {
        let view = View {
            packet,
            src_pod,
            dst_pod,
        };
        self.per_flow.iter().any(|expr| expr.holds(&view))
    }
}

impl std::str::FromStr for Blacklist {
    type Err = BlacklistError;

    fn from_str(text: &str) -> Result<Self, BlacklistError> {
        Self::compile(text)
    }
}

// === impl View ===

impl View<'_> {
    /// The address as the variables for one family have it.
    fn address(&self, source: bool, v6: bool) -> Option<IpAddr> {
        let ip = if source { self.packet.src } else { self.packet.dst };
        (ip.is_ipv6() == v6).then_some(ip)
    }
}

// === impl Expr ===

impl Expr {
    fn holds(&self, view: &View<'_>) -> bool {
        match self {
            Self::Constant(value) => *value,
            Self::Tcp => view.packet.tcp,
            Self::Udp => view.packet.udp,
            Self::Family { v6 } => view.packet.src.is_ipv6() == *v6,
            Self::Not(inner) => !inner.holds(view),
            Self::And(left, right) => left.holds(view) && right.holds(view),
            Self::Or(left, right) => left.holds(view) || right.holds(view),
            Self::Same(left, right) => left.holds(view) == right.holds(view),
            Self::Ports(left, how, right) => how.holds(left.value(view).cmp(&right.value(view))),
            Self::Text(left, right) => same_text(left, right, view),
            Self::Contains(prefix, text) => match text {
                Text::Address { source, v6 } => view.address(*source, *v6).is_some_and(|ip| prefix.contains(ip)),
                Text::Literal(text) => text.parse().is_ok_and(|ip| prefix.contains(ip)),
                Text::Pod { .. } => text_of(text, view).parse().is_ok_and(|ip| prefix.contains(ip)),
            },
            Self::Prefix(text, prefix) => match (text, prefix) {
                (Text::Pod { .. }, Text::Literal(prefix)) => pod(text, view).starts_with(prefix.as_str()),
                _ => text_of(text, view).starts_with(&text_of(prefix, view)),
            },
        }
    }
}

fn same_text(left: &Text, right: &Text, view: &View<'_>) -> bool {
    match (left, right) {
        (Text::Address { source, v6 }, Text::Literal(literal))
        | (Text::Literal(literal), Text::Address { source, v6 }) => {
            match (view.address(*source, *v6), literal.parse::<IpAddr>()) {
                (Some(ip), Ok(wanted)) => ip == wanted,
                // The variable of the other family is an empty text.
                (None, _) => literal.is_empty(),
                (Some(_), Err(_)) => false,
            }
        }
        (Text::Pod { .. }, Text::Literal(literal)) | (Text::Literal(literal), Text::Pod { .. }) => {
            let name = if matches!(left, Text::Pod { .. }) { left } else { right };
            pod(name, view) == literal
        }
        _ => text_of(left, view) == text_of(right, view),
    }
}

fn pod<'a>(text: &Text, view: &View<'a>) -> &'a str {
    match text {
        Text::Pod { source: true } => view.src_pod,
        Text::Pod { source: false } => view.dst_pod,
        Text::Address { .. } | Text::Literal(_) => "",
    }
}

fn text_of(text: &Text, view: &View<'_>) -> String {
    match text {
        Text::Literal(text) => text.clone(),
        Text::Pod { .. } => pod(text, view).to_owned(),
        Text::Address { source, v6 } => view.address(*source, *v6).map_or_else(String::new, |ip| ip.to_string()),
    }
}

impl fmt::Display for Blacklist {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rules in the kernel, {} per flow",
            self.rules.len(),
            self.per_flow.len()
        )
    }
}
