//! Programs that the kernel refuses: what needs them is off or limited and says so, the rest counts on.

use testkit::traffic::report::Counts;

use crate::{
    process::{Agent, Feature, Rights, directory, doctor},
    traffic::{Ends, tcp_service, udp_service},
};

fn named<'a>(features: &'a [Feature], name: &str) -> &'a Feature {
    features.iter().find(|feature| feature.name == name).expect(name)
}

/// 2 on, 1 degraded, 0 off, as the metric shows it.
fn grade(feature: &Feature) -> u32 {
    match feature.state.as_str() {
        "on" => 2,
        "degraded" => 1,
        "off" => 0,
        other => panic!("{other} is no state"),
    }
}

#[test]
#[ignore = "native: needs root"]
fn each_program_can_be_missing() {
    let (whole, _) = doctor(&[]);
    assert!(whole.programs.len() > 10, "{whole:?}");
    for program in &whole.programs {
        let refuse = format!("--refuse-program={}", program.name);
        let (limited, code) = doctor(&[&refuse]);
        assert_eq!(limited.error, None);
        assert!(limited.programs.iter().all(|other| other.name != program.name));
        let reason = format!("program {} is refused", program.name);
        let lowered: Vec<&Feature> = limited
            .features
            .iter()
            .filter(|feature| feature.reason.contains(&reason))
            .collect();
        println!("without {}: {lowered:?}", program.name);
        assert!(!lowered.is_empty(), "nothing misses {}: {limited:?}", program.name);
        for feature in &limited.features {
            let before = named(&whole.features, &feature.name);
            if feature.reason.contains(&reason) {
                assert!(grade(feature) < 2 && grade(feature) <= grade(before), "{feature:?}");
            } else {
                assert_eq!(feature, before, "has nothing to do with {}", program.name);
            }
        }
        let off = limited
            .features
            .iter()
            .any(|feature| feature.state == "off" && feature.reason != "NotInThisBuild");
        assert_eq!(code, Some(if off { 2 } else { 0 }));
        the_rest_goes_on(&refuse, &limited.features);
    }
}

/// The agent says the same as doctor, and what is not off is exact.
fn the_rest_goes_on(refuse: &str, expected: &[Feature]) {
    let directory = directory();
    let agent = Agent::start(Rights::Own, directory.path(), &[refuse]);
    let shown = agent.features();
    for (feature, value) in &shown {
        assert_eq!(feature, named(expected, &feature.name));
        assert_eq!(*value, grade(feature));
    }
    let off: Vec<&Feature> = shown.iter().map(|(f, _)| f).filter(|f| f.state == "off").collect();
    let (status, ready) = agent.page("/readyz").unwrap();
    assert_eq!(status, 200, "{ready}");
    for feature in &off {
        assert!(ready.contains("degraded") && ready.contains(&feature.name), "{ready}");
    }
    let is_on = |name: &str| off.iter().all(|feature| feature.name != name);

    let (listener, mut tcp) = tcp_service();
    let (socket, mut udp) = udp_service();
    tcp.connections(&listener, 20);
    udp.datagrams(&socket, 50);
    if !is_on("ebpf-net/tcp") {
        tcp.truth = Ends::default();
    }
    for (feature, forget) in [
        ("ebpf-net/udp-sent", forget_sent as fn(&mut Counts)),
        ("ebpf-net/udp-received", forget_received),
    ] {
        if !is_on(feature) {
            forget(&mut udp.truth.outgoing);
            forget(&mut udp.truth.incoming);
        }
    }
    let rows = agent.stop();
    assert_eq!(tcp.reported(&rows), tcp.truth, "{refuse}");
    // Which end began is told by its first datagram; where that is not seen, the ends may change places.
    if is_on("ebpf-net/udp-sent") && is_on("ebpf-net/udp-received") {
        assert_eq!(udp.reported(&rows), udp.truth, "{refuse}");
    }
    assert_eq!(udp.reported_in_all(&rows), udp.truth.sum(), "{refuse}");
}

fn forget_sent(counts: &mut Counts) {
    (counts.datagrams_sent, counts.bytes_sent) = (0, 0);
}

fn forget_received(counts: &mut Counts) {
    (counts.datagrams_received, counts.bytes_received) = (0, 0);
}

#[test]
#[ignore = "native: needs root"]
fn without_any_program_it_is_not_ready_and_says_why() {
    let (whole, _) = doctor(&[]);
    let mut refuse: Vec<String> = [
        "accept_exit_2",
        "accept_exit_4",
        "accept_again_2",
        "accept_again_4",
        "accept_return",
    ]
    .map(|name| format!("--refuse-program={name}"))
    .into();
    refuse.extend(whole.programs.iter().map(|p| format!("--refuse-program={}", p.name)));
    let mut args: Vec<&str> = refuse.iter().map(String::as_str).collect();
    args.push("--output-stdout=json");
    let directory = directory();
    let mut agent = Agent::spawn(Rights::Own, directory.path(), &args);
    agent.wait_until("it is up", |agent| agent.log().contains("Agent is up"));
    let (status, ready) = agent.page("/readyz").unwrap();
    assert_eq!(status, 503, "{ready}");
    for feature in ["ebpf-net/tcp", "ebpf-net/udp-sent", "ebpf-net/udp-received"] {
        assert!(ready.contains(&format!("{feature}: program ")), "{ready}");
    }
    assert_eq!(agent.page("/healthz").unwrap().0, 200, "a restart would not help");
    assert!(agent.is_running());
    assert!(agent.end(libc::SIGTERM).success());
}
