//! Expressions to rules: conjunctions that can be compared packet by packet.

use std::net::IpAddr;

use super::{
    Packet,
    parse::{Expr, How, Number, Text},
};

/// Alternatives of one statement at most, while it is taken apart.
const MAX_ALTERNATIVES: usize = 64;
/// Parts of an expression looked at, at most: comparisons of comparisons double with each.
const MAX_STEPS: u32 = 4096;
const TCP: u8 = 1;
const UDP: u8 = 2;
const OTHER: u8 = 4;
const V4: u8 = 1;
const V6: u8 = 2;

/// Addresses that begin alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The address, as IPv6 (an IPv4 address as v4-mapped), host bits 0.
    pub bits: u128,
    /// The bits that are compared.
    pub mask: u128,
}

/// A range of ports, both ends within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

/// A packet matches when all of it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Source address.
    pub src: Prefix,
    /// Destination address.
    pub dst: Prefix,
    /// Source port.
    pub src_ports: Ports,
    /// Destination port.
    pub dst_ports: Ports,
    /// IPv4: 1, IPv6: 2.
    pub families: u8,
    /// TCP: 1, UDP: 2, others: 4.
    pub protocols: u8,
    /// The source address must not be so.
    pub not_src: bool,
    /// The destination address must not be so.
    pub not_dst: bool,
}

// === impl Prefix ===

impl Prefix {
    /// Every address.
    pub const ALL: Self = Self { bits: 0, mask: 0 };

    /// Reads `10.0.0.0/8` or `fd00::/8`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (ip, len) = text.split_once('/')?;
        if len.is_empty() || !len.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let (ip, len): (IpAddr, u32) = (ip.parse().ok()?, len.parse().ok()?);
        let len = match ip {
            IpAddr::V4(_) => (len <= 32).then_some(len + 96)?,
            IpAddr::V6(_) => (len <= 128).then_some(len)?,
        };
        let mask = u128::MAX.checked_shl(128 - len).unwrap_or(0);
        Some(Self {
            bits: bits(ip) & mask,
            mask,
        })
    }

    fn one(ip: IpAddr) -> Self {
        Self {
            bits: bits(ip),
            mask: u128::MAX,
        }
    }

    /// Whether it is of IPv6. One of IPv4 has all of the mapping's bits in its mask.
    #[must_use]
    pub const fn is_v6(&self) -> bool {
        !(self.bits >> 32 == 0xffff && self.mask >> 32 == u128::MAX >> 32)
    }

    /// Whether the address is within.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        bits(ip) & self.mask == self.bits && ip.is_ipv6() == self.is_v6()
    }
}

const fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

// === impl Ports ===

impl Ports {
    /// Every port, and none.
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    const fn and(self, other: Self) -> Option<Self> {
        let first = if self.first > other.first {
            self.first
        } else {
            other.first
        };
        let last = if self.last < other.last { self.last } else { other.last };
        if first <= last {
            Some(Self { first, last })
        } else {
            None
        }
    }
}

// === impl Rule ===

impl Rule {
    /// Matches everything.
    const ALL: Self = Self {
        src: Prefix::ALL,
        dst: Prefix::ALL,
        src_ports: Ports::ALL,
        dst_ports: Ports::ALL,
        families: V4 | V6,
        protocols: TCP | UDP | OTHER,
        not_src: false,
        not_dst: false,
    };

    /// Whether a packet matches.
    #[must_use]
    pub fn matches(&self, packet: &Packet) -> bool {
        let family = if packet.src.is_ipv6() { V6 } else { V4 };
        let protocol = match (packet.tcp, packet.udp) {
            (true, _) => TCP,
            (false, true) => UDP,
            (false, false) => OTHER,
        };
        let within = |ports: Ports, port| ports.first <= port && port <= ports.last;
        self.families & family != 0
            && self.protocols & protocol != 0
            && within(self.src_ports, packet.src_port)
            && within(self.dst_ports, packet.dst_port)
            && (bits(packet.src) & self.src.mask == self.src.bits) != self.not_src
            && (bits(packet.dst) & self.dst.mask == self.dst.bits) != self.not_dst
    }

    /// Both together; `None` if one rule cannot say it, `Some(None)` if nothing matches both.
    fn and(&self, other: &Self) -> Option<Option<Self>> {
        let families = self.families & other.families;
        let protocols = self.protocols & other.protocols;
        let ports = self
            .src_ports
            .and(other.src_ports)
            .zip(self.dst_ports.and(other.dst_ports));
        let Some((src_ports, dst_ports)) = ports.filter(|_| families != 0 && protocols != 0) else {
            return Some(None);
        };
        let src = both((self.src, self.not_src), (other.src, other.not_src))?;
        let dst = both((self.dst, self.not_dst), (other.dst, other.not_dst))?;
        let Some(((src, not_src), (dst, not_dst))) = src.zip(dst) else {
            return Some(None);
        };
        Some(Some(Self {
            src,
            dst,
            src_ports,
            dst_ports,
            families,
            protocols,
            not_src,
            not_dst,
        }))
    }
}

type Address = (Prefix, bool);

/// As [`Rule::and`], of one address.
fn both(one: Address, other: Address) -> Option<Option<Address>> {
    let all = (Prefix::ALL, false);
    if one == all || one == other {
        return Some(Some(other));
    }
    if other == all {
        return Some(Some(one));
    }
    let (wide, narrow) = if one.0.mask & other.0.mask == one.0.mask {
        (one, other)
    } else if one.0.mask & other.0.mask == other.0.mask {
        (other, one)
    } else {
        return None;
    };
    let inside = narrow.0.bits & wide.0.mask == wide.0.bits;
    match (wide.1, narrow.1) {
        (false, false) => Some(inside.then_some(narrow)),
        // Not in the wide one, but in the narrow one.
        (true, false) => Some((!inside).then_some(narrow)),
        // In the wide one, but not in the narrow one within it.
        (false, true) => {
            if inside {
                None
            } else {
                Some(Some(wide))
            }
        }
        (true, true) => {
            if inside {
                Some(Some(wide))
            } else {
                None
            }
        }
    }
}

/// A part of a statement: rules, alternatives that only a flow can be asked, or both.
struct Parts {
    rules: Vec<Rule>,
    rest: Vec<Expr>,
}

/// Takes a statement apart: alternatives that are rules, and what else is left of it.
pub(super) fn of(statement: &Expr) -> Option<(Vec<Rule>, Vec<Expr>)> {
    let parts = split(statement);
    (parts.rules.len() <= MAX_ALTERNATIVES).then_some((parts.rules, parts.rest))
}

/// Alternatives at the top of a statement, each by itself.
fn split(expr: &Expr) -> Parts {
    if let Expr::Or(left, right) = expr {
        let (mut left, right) = (split(left), split(right));
        left.rules.extend(right.rules);
        left.rest.extend(right.rest);
        return left;
    }
    let mut steps = MAX_STEPS;
    match rules(expr, true, &mut steps) {
        Some(rules) => Parts {
            rules,
            rest: Vec::new(),
        },
        None => Parts {
            rules: Vec::new(),
            rest: vec![expr.clone()],
        },
    }
}

/// Rules of which one matches when the expression is `wanted`; `None` where rules cannot say that.
fn rules(expr: &Expr, wanted: bool, steps: &mut u32) -> Option<Vec<Rule>> {
    *steps = steps.checked_sub(1)?;
    let when = |holds: bool| if holds { vec![Rule::ALL] } else { Vec::new() };
    let families = |families| vec![Rule { families, ..Rule::ALL }];
    let protocols = |protocols: u8| {
        let protocols = if wanted {
            protocols
        } else {
            (TCP | UDP | OTHER) & !protocols
        };
        vec![Rule { protocols, ..Rule::ALL }]
    };
    match expr {
        Expr::Constant(value) => Some(when(*value == wanted)),
        Expr::Tcp => Some(protocols(TCP)),
        Expr::Udp => Some(protocols(UDP)),
        Expr::Family { v6 } => Some(families(if *v6 == wanted { V6 } else { V4 })),
        Expr::Not(inner) => rules(inner, !wanted, steps),
        Expr::And(left, right) if wanted => every(rules(left, true, steps)?, &rules(right, true, steps)?),
        Expr::Or(left, right) if !wanted => every(rules(left, false, steps)?, &rules(right, false, steps)?),
        Expr::And(left, right) | Expr::Or(left, right) => {
            any(rules(left, wanted, steps)?, rules(right, wanted, steps)?)
        }
        Expr::Same(left, right) => any(
            every(rules(left, true, steps)?, &rules(right, wanted, steps)?)?,
            every(rules(left, false, steps)?, &rules(right, !wanted, steps)?)?,
        ),
        Expr::Ports(left, how, right) => ports(*left, *how, *right, wanted),
        Expr::Text(Text::Address { source, v6 }, Text::Literal(text))
        | Expr::Text(Text::Literal(text), Text::Address { source, v6 }) => match text.parse::<IpAddr>() {
            Ok(ip) => Some(address(*source, *v6, Prefix::one(ip), wanted)),
            // Empty: the packet is of the other family.
            Err(_) => Some(families(if *v6 == wanted { V4 } else { V6 })),
        },
        Expr::Contains(prefix, Text::Address { source, v6 }) => Some(address(*source, *v6, *prefix, wanted)),
        Expr::Text(Text::Literal(left), Text::Literal(right)) => Some(when((left == right) == wanted)),
        Expr::Text(..) | Expr::Contains(..) | Expr::Prefix(..) => None,
    }
}

fn address(source: bool, v6: bool, prefix: Prefix, wanted: bool) -> Vec<Rule> {
    let (own, other) = if v6 { (V6, V4) } else { (V4, V6) };
    let mut rule = Rule {
        families: own,
        ..Rule::ALL
    };
    if source {
        (rule.src, rule.not_src) = (prefix, !wanted);
    } else {
        (rule.dst, rule.not_dst) = (prefix, !wanted);
    }
    if wanted {
        return vec![rule];
    }
    // The variable is an empty text in a packet of the other family, which is no address.
    let elsewhere = Rule {
        families: other,
        ..Rule::ALL
    };
    vec![rule, elsewhere]
}

fn ports(left: Number, how: How, right: Number, wanted: bool) -> Option<Vec<Rule>> {
    let (source, literal, how) = match (left, right) {
        (Number::Literal(left), Number::Literal(right)) => {
            let holds = how.holds(left.cmp(&right)) == wanted;
            return Some(if holds { vec![Rule::ALL] } else { Vec::new() });
        }
        (Number::Port { source }, Number::Literal(literal)) => (source, literal, how),
        (Number::Literal(literal), Number::Port { source }) => {
            let turned = match how {
                How::Equal => How::Equal,
                How::Less => How::Greater,
                How::LessOrEqual => How::GreaterOrEqual,
                How::Greater => How::Less,
                How::GreaterOrEqual => How::LessOrEqual,
            };
            (source, literal, turned)
        }
        (Number::Port { .. }, Number::Port { .. }) => return None,
    };
    let (first, last) = (0, i64::from(u16::MAX));
    let (below, above) = (literal.saturating_sub(1), literal.saturating_add(1));
    let ranges = match (how, wanted) {
        (How::Equal, true) => vec![(literal, literal)],
        (How::Equal, false) => vec![(first, below), (above, last)],
        (How::Less, true) | (How::GreaterOrEqual, false) => vec![(first, below)],
        (How::LessOrEqual, true) | (How::Greater, false) => vec![(first, literal)],
        (How::Greater, true) | (How::LessOrEqual, false) => vec![(above, last)],
        (How::GreaterOrEqual, true) | (How::Less, false) => vec![(literal, last)],
    };
    let rule = |(from, to): (i64, i64)| {
        let (from, to) = (from.max(first), to.min(last));
        let ports = Ports {
            first: u16::try_from(from).ok()?,
            last: u16::try_from(to).ok()?,
        };
        let mut rule = Rule::ALL;
        if source {
            rule.src_ports = ports;
        } else {
            rule.dst_ports = ports;
        }
        (from <= to).then_some(rule)
    };
    Some(ranges.into_iter().filter_map(rule).collect())
}

fn every(left: Vec<Rule>, right: &[Rule]) -> Option<Vec<Rule>> {
    let mut out = Vec::new();
    for one in &left {
        for other in right {
            out.extend(one.and(other)?);
            if out.len() > MAX_ALTERNATIVES {
                return None;
            }
        }
    }
    Some(out)
}

fn any(mut left: Vec<Rule>, right: Vec<Rule>) -> Option<Vec<Rule>> {
    left.extend(right);
    (left.len() <= MAX_ALTERNATIVES).then_some(left)
}
