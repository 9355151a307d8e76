//! The blacklist language: what is left out, what is refused and how, and the compiled form against a plain reading.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::net::IpAddr;

use ec_api::blacklist::{Blacklist, Packet};
use proptest::prelude::*;

fn packet(src: &str, src_port: u16, dst: &str, dst_port: u16, proto: &str) -> Packet {
    Packet {
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
        src_port,
        dst_port,
        tcp: proto == "tcp",
        udp: proto == "udp",
    }
}

fn drops(program: &str, packet: &Packet, src_pod: &str, dst_pod: &str) -> bool {
    let compiled = Blacklist::compile(program).unwrap_or_else(|error| panic!("{program}: {error}"));
    compiled.packet_matches(packet) || compiled.flow_matches(packet, src_pod, dst_pod)
}

/// Program, whether each of the packets below is left out.
#[test]
fn documented_and_further_programs() {
    let web = packet("1.1.1.1", 50_000, "10.10.0.1", 80, "tcp");
    let dns = packet("127.0.0.1", 5353, "127.0.0.53", 53, "udp");
    let six = packet("fd00::1", 443, "fd00::2", 40_000, "tcp");
    let (src_pod, dst_pod) = ("datakit-kfez321", "web-0");
    let cases: &[(&str, [bool; 3])] = &[
        // The document's.
        (
            "(ip_saddr == \"1.1.1.1\" || ip_saddr == \"1.1.1.1\") &&\n     (src_port == 80 || dst_port == 80)",
            [true, false, false],
        ),
        (
            "udp\nip_saddr == \"1.1.1.1\" && (src_port == 80 || dst_port == 80);\nip_saddr == \"10.10.0.1\" && (src_port == 80 || dst_port == 80)\n\nipnet_contains(\"127.0.0.0/8\", ip_saddr); ipv6\n",
            [true, true, true],
        ),
        ("ipnet_contains(\"127.0.0.0/8\", ip_saddr)", [false, true, false]),
        (
            "has_prefix(k8s_src_pod, \"datakit-\") || has_prefix(k8s_dst_pod, \"datakit-\")",
            [true, true, true],
        ),
        ("ip_saddr=='127.0.0.1' || ip_daddr=='127.0.0.1'", [false, true, false]),
        // Precedence: && is tighter, whatever the order.
        ("tcp || udp && ipv6", [true, false, true]),
        ("ipv6 && udp || tcp", [true, false, true]),
        ("(tcp || udp) && ipv6", [false, false, true]),
        ("!tcp == udp", [true, true, true]),
        ("!(tcp == udp)", [true, true, true]),
        ("! ipv4", [false, false, true]),
        ("!!udp", [false, true, false]),
        // Comparisons, both ways round.
        ("dst_port < 80", [false, true, false]),
        ("dst_port <= 80", [true, true, false]),
        ("80 > dst_port", [false, true, false]),
        ("src_port != 443", [true, true, false]),
        ("dst_port >= 0x50 && dst_port <= 0120", [true, false, false]),
        ("src_port > dst_port", [true, true, false]),
        ("src_port == 70000", [false, false, false]),
        ("src_port < 70000", [true, true, true]),
        // An address of the other family is an empty text.
        ("ip_saddr == ''", [false, false, true]),
        ("ip_saddr != '1.1.1.1'", [false, true, true]),
        ("ip6_saddr != 'fd00::1'", [true, true, false]),
        ("ip6_daddr == 'FD00:0:0:0::2'", [false, false, true]),
        ("ipnet_contains('fd00::/8', ip6_daddr)", [false, false, true]),
        ("!ipnet_contains('0.0.0.0/0', ip_saddr)", [false, false, true]),
        ("ip_saddr == ip_daddr", [false, false, true]),
        ("ipv4 == true", [true, true, false]),
        ("ipv4 != tcp", [false, true, true]),
        // Pods.
        ("k8s_dst_pod == 'web-0' && dst_port == 80", [true, false, false]),
        ("k8s_src_pod != k8s_dst_pod && udp", [false, true, false]),
        ("k8s_dst_pod == '' || dst_port == 53", [false, true, false]),
        // Form.
        ("", [false, false, false]),
        (";;\n # nothing\n;", [false, false, false]),
        ("udp # with a comment ; tcp\n", [false, true, false]),
        ("`udp`", [false, true, false]),
        ("TRUE", [true, true, true]),
        ("ip_saddr == '''127.0.0.1'''", [false, true, false]),
        ("ip_saddr == \"\\x31.1.1.1\"", [true, false, false]),
        ("ipnet_contains(\n\"127.0.0.0/8\",\nip_saddr\n)", [false, true, false]),
    ];
    for (program, wanted) in cases {
        let told = [&web, &dns, &six].map(|packet| drops(program, packet, src_pod, dst_pod));
        assert_eq!(told, *wanted, "{program}");
    }
}

#[test]
fn wrong_programs_are_refused_with_their_place() {
    for (program, message) in [
        (
            "tcp &&",
            "line 1, column 7: the end of the program; expected a name, a number, a text in quotes, `!` or `(`",
        ),
        ("tcp\n&& udp", "line 2, column 1: `&&`; expected a name"),
        (
            "udp\n  src_prt == 1",
            "line 2, column 3: the unknown name `src_prt`; expected tcp, udp, ipv4",
        ),
        (
            "src_port == \"80\"",
            "line 1, column 13: a text compared with a number; expected a number",
        ),
        (
            "ip_saddr == 80",
            "line 1, column 13: a number compared with a text; expected a text",
        ),
        (
            "ip_saddr < '1.1.1.1'",
            "line 1, column 10: `<` beside a text; expected numbers on both sides",
        ),
        (
            "src_port",
            "line 1, column 1: a number as a rule; expected something true or false",
        ),
        (
            "ip_saddr",
            "line 1, column 1: a text as a rule; expected something true or false",
        ),
        (
            "!src_port",
            "line 1, column 2: a number beside `!`; expected something true or false",
        ),
        (
            "tcp && 1",
            "line 1, column 8: a number beside `&&`; expected something true or false",
        ),
        ("(tcp", "line 1, column 5: the end of the program; expected `)`"),
        (
            "tcp)",
            "line 1, column 4: `)`; expected an operator, `;` or the end of the line",
        ),
        ("tcp udp", "line 1, column 5: `udp`; expected an operator"),
        ("tcp & udp", "line 1, column 5: a single `&`; expected one of"),
        ("src_port = 1", "line 1, column 10: `=`, which assigns; expected one of"),
        ("src_port + 1 == 2", "line 1, column 10: `+`: rules do not calculate"),
        ("-1 == 1 || tcp", "line 1, column 1: `-`: rules do not calculate"),
        ("src_port == 1.5", "line 1, column 13: `1.5`; expected a whole number"),
        ("ip_saddr == 'x", "line 1, column 13: a text without end; expected '"),
        (
            "ip_saddr == '1.1.1'",
            "line 1, column 13: the text \"1.1.1\", which it never is; expected an IPv4 address",
        ),
        (
            "ip6_saddr == '1.1.1.1'",
            "line 1, column 14: the text \"1.1.1.1\", which it never is; expected an IPv6",
        ),
        (
            "ipnet_contains('10.0.0.0', ip_saddr)",
            "line 1, column 16: the text \"10.0.0.0\"; expected a subnet in quotes",
        ),
        (
            "ipnet_contains('10.0.0.0/33', ip_saddr)",
            "line 1, column 16: the text \"10.0.0.0/33\"; expected a subnet",
        ),
        (
            "ipnet_contains('10.0.0.0/8', ip6_saddr)",
            "line 1, column 30: an address of the other family",
        ),
        (
            "ipnet_contains('10.0.0.0/8')",
            "line 1, column 1: 1 arguments of ipnet_contains; expected two arguments",
        ),
        (
            "has_prefix(k8s_src_pod, 1)",
            "line 1, column 25: a number as an argument; expected a text",
        ),
        (
            "has_suffix(k8s_src_pod, 'x')",
            "line 1, column 1: the unknown function `has_suffix`; expected ipnet_contains",
        ),
        (
            "has_prefix",
            "line 1, column 11: the end of the program; expected `(` after the function has_prefix",
        ),
        ("if tcp", "line 1, column 1: the word `if`; expected a rule"),
        (
            "ip_saddr == '\\q'",
            "line 1, column 13: an unknown escape in a text; expected \\n",
        ),
        ("tcp; größe", "line 1, column 8: 'ö'; expected one of"),
    ] {
        let error = Blacklist::compile(program).unwrap_err().to_string();
        assert!(error.starts_with(message), "{program}: {error}");
    }
    let deep = format!("{}tcp{}", "(".repeat(200), ")".repeat(200));
    assert!(Blacklist::compile(&deep).unwrap_err().to_string().contains("64 deep"));
    assert!(
        Blacklist::compile(&" ".repeat(20_000))
            .unwrap_err()
            .to_string()
            .contains("at most 16384")
    );
}

#[test]
fn long_programs_are_compiled_in_time_or_refused() {
    let started = std::time::Instant::now();
    let chain = vec!["tcp"; 200].join(" == ");
    assert_eq!(Blacklist::compile(&chain).unwrap().rules().len(), 0);
    let told = drops(&chain, &packet("10.0.0.1", 1, "10.0.0.2", 2, "udp"), "", "");
    // An even number of equal values.
    assert!(told);
    let longer = Blacklist::compile(&vec!["tcp"; 300].join(" == ")).unwrap_err();
    assert!(longer.to_string().contains("at most 256 operators"), "{longer}");
    assert!(started.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn what_can_goes_to_the_kernel() {
    let parts = |program: &str| {
        let compiled = Blacklist::compile(program).unwrap();
        (compiled.rules().len(), compiled.asks_flows(), compiled.names_pods())
    };
    assert_eq!(parts("udp; ipv6 && dst_port == 80"), (2, false, false));
    assert_eq!(parts("udp || k8s_src_pod == 'x'"), (1, true, true));
    assert_eq!(parts("udp && k8s_src_pod == 'x'"), (0, true, true));
    assert_eq!(parts("src_port == dst_port"), (0, true, false));
    assert_eq!(parts("ip_saddr == '1.1.1.1' && udp && !udp"), (0, false, false));
    let many = (0..100).map(|port| format!("dst_port == {port}\n")).collect::<String>();
    assert_eq!(parts(&many), (64, true, false));
}

/// A program as text, with a plain reading of its own.
#[derive(Clone, Debug)]
enum Node {
    Tcp,
    Udp,
    V4,
    V6,
    Port(bool, &'static str, u16),
    Address(bool, bool, &'static str, bool),
    Net(bool, bool, usize),
    Pod(bool, bool, &'static str),
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Same(Box<Node>, Box<Node>, bool),
}

const FOUR: [&str; 3] = ["10.0.0.1", "10.0.0.2", "10.1.0.1"];
const SIX: [&str; 3] = ["fd00::1", "fd00::2", "fd01::1"];
/// Subnet, and which of the addresses above are within.
const FOUR_NETS: [(&str, [bool; 3]); 3] = [
    ("10.0.0.0/24", [true, true, false]),
    ("10.0.0.0/8", [true; 3]),
    ("10.1.0.1/32", [false, false, true]),
];
const SIX_NETS: [(&str, [bool; 3]); 3] = [
    ("fd00::/64", [true, true, false]),
    ("::/0", [true; 3]),
    ("fd01::/16", [false, false, true]),
];

fn node() -> impl Strategy<Value = Node> {
    let sign = prop::sample::select(vec!["==", "!=", "<", "<=", ">", ">="]);
    let leaf = prop_oneof![
        Just(Node::Tcp),
        Just(Node::Udp),
        Just(Node::V4),
        Just(Node::V6),
        (any::<bool>(), sign, prop::sample::select(vec![0, 53, 80, 443, 65535]))
            .prop_map(|(s, sign, p)| Node::Port(s, sign, p)),
        (any::<bool>(), any::<bool>(), 0..3usize, any::<bool>()).prop_map(|(s, six, at, equal)| Node::Address(
            s,
            six,
            if six { SIX[at] } else { FOUR[at] },
            equal
        )),
        (any::<bool>(), any::<bool>(), 0..3usize).prop_map(|(s, six, at)| Node::Net(s, six, at)),
        (
            any::<bool>(),
            any::<bool>(),
            prop::sample::select(vec!["", "web", "web-1"])
        )
            .prop_map(|(s, prefix, t)| Node::Pod(s, prefix, t)),
    ];
    leaf.prop_recursive(5, 24, 2, |inner| {
        let boxed = inner.prop_map(Box::new);
        prop_oneof![
            boxed.clone().prop_map(Node::Not),
            (boxed.clone(), boxed.clone()).prop_map(|(a, b)| Node::And(a, b)),
            (boxed.clone(), boxed.clone()).prop_map(|(a, b)| Node::Or(a, b)),
            (boxed.clone(), boxed, any::<bool>()).prop_map(|(a, b, equal)| Node::Same(a, b, equal)),
        ]
    })
}

impl Node {
    fn text(&self) -> String {
        let side = |source: &bool| if *source { 's' } else { 'd' };
        let end = |source: &bool| if *source { "src" } else { "dst" };
        match self {
            Self::Tcp => "tcp".to_owned(),
            Self::Udp => "udp".to_owned(),
            Self::V4 => "ipv4".to_owned(),
            Self::V6 => "ipv6".to_owned(),
            Self::Port(source, sign, port) => format!("{}_port {sign} {port}", end(source)),
            Self::Address(source, six, ip, equal) => {
                let sign = if *equal { "==" } else { "!=" };
                format!("ip{}_{}addr {sign} '{ip}'", if *six { "6" } else { "" }, side(source))
            }
            Self::Net(source, six, at) => {
                let net = if *six { SIX_NETS[*at].0 } else { FOUR_NETS[*at].0 };
                format!(
                    "ipnet_contains(\"{net}\", ip{}_{}addr)",
                    if *six { "6" } else { "" },
                    side(source)
                )
            }
            Self::Pod(source, true, text) => format!("has_prefix(k8s_{}_pod, '{text}')", end(source)),
            Self::Pod(source, false, text) => format!("k8s_{}_pod == '{text}'", end(source)),
            Self::Not(inner) => format!("!({})", inner.text()),
            Self::And(a, b) => format!("({}) &&\n({})", a.text(), b.text()),
            Self::Or(a, b) => format!("({}) || ({})", a.text(), b.text()),
            Self::Same(a, b, equal) => format!("({}) {} ({})", a.text(), if *equal { "==" } else { "!=" }, b.text()),
        }
    }

    fn holds(&self, packet: &Packet, pods: [&str; 2]) -> bool {
        let ip = |source: bool| if source { packet.src } else { packet.dst }.to_string();
        let is_six = packet.src.is_ipv6();
        match self {
            Self::Tcp => packet.tcp,
            Self::Udp => packet.udp,
            Self::V4 => !is_six,
            Self::V6 => is_six,
            Self::Port(source, sign, port) => {
                let own = if *source { packet.src_port } else { packet.dst_port };
                match *sign {
                    "==" => own == *port,
                    "!=" => own != *port,
                    "<" => own < *port,
                    "<=" => own <= *port,
                    ">" => own > *port,
                    _ => own >= *port,
                }
            }
            Self::Address(source, six, text, equal) => {
                let own = if is_six == *six { ip(*source) } else { String::new() };
                (own == *text) == *equal
            }
            Self::Net(source, six, at) => {
                let (addresses, nets) = if *six { (SIX, SIX_NETS) } else { (FOUR, FOUR_NETS) };
                let place = addresses.iter().position(|known| *known == ip(*source));
                is_six == *six && place.is_some_and(|place| nets[*at].1[place])
            }
            Self::Pod(source, prefix, text) => {
                let own = pods[usize::from(!*source)];
                if *prefix { own.starts_with(text) } else { own == *text }
            }
            Self::Not(inner) => !inner.holds(packet, pods),
            Self::And(a, b) => a.holds(packet, pods) && b.holds(packet, pods),
            Self::Or(a, b) => a.holds(packet, pods) || b.holds(packet, pods),
            Self::Same(a, b, equal) => (a.holds(packet, pods) == b.holds(packet, pods)) == *equal,
        }
    }
}

fn any_packet() -> impl Strategy<Value = Packet> {
    let port = || prop::sample::select(vec![0_u16, 52, 53, 80, 81, 443, 65535]);
    (any::<bool>(), 0..3usize, 0..3usize, port(), port(), 0..3u8).prop_map(|(six, a, b, src_port, dst_port, proto)| {
        let ip = |at: usize| -> IpAddr { if six { SIX[at] } else { FOUR[at] }.parse().unwrap() };
        Packet {
            src: ip(a),
            dst: ip(b),
            src_port,
            dst_port,
            tcp: proto == 0,
            udp: proto == 1,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn compiled_programs_mean_what_is_written(nodes in prop::collection::vec(node(), 1..4), packets in prop::collection::vec(any_packet(), 12)) {
        let program = nodes.iter().map(Node::text).collect::<Vec<_>>().join(";");
        let compiled = Blacklist::compile(&program).unwrap();
        for packet in packets {
            for pods in [["", ""], ["web", "web-1"]] {
                let wanted = nodes.iter().any(|node| node.holds(&packet, pods));
                let told = compiled.packet_matches(&packet) || compiled.flow_matches(&packet, pods[0], pods[1]);
                prop_assert_eq!(told, wanted, "{} {:?}", program, packet);
            }
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,80}") {
        let _ = Blacklist::compile(&text);
    }

    #[test]
    fn any_tokens_are_read_or_refused(words in prop::collection::vec(prop::sample::select(vec!["tcp", "(", ")", "!", "&&", "||", "==", "<", ",", ";", "\n", "80", "'x'", "ip_saddr", "has_prefix", "ipnet_contains", "src_port", "#", "`", "\"", "true"]), 0..30)) {
        let _ = Blacklist::compile(&words.join(" "));
        let _ = Blacklist::compile(&words.concat());
    }
}
