//! A DataWay that refuses: the agent keeps running, says so, keeps the records, and delivers each once when it is let in.

use testkit::{
    dataway::{DatawayStub, Point, StubConfig, StubHandle, Value},
    exactness::flow::Flow,
    traffic::report::{Counts, Direction, Transport},
};

use crate::{
    process::{Agent, Rights, directory},
    traffic::{Service, tcp_service, udp_service},
};

/// A stub on a runtime of its own; the test itself blocks.
struct Stub {
    handle: StubHandle,
    _runtime: tokio::runtime::Runtime,
}

impl Stub {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let handle = runtime.block_on(DatawayStub::start(StubConfig::default())).unwrap();
        Self {
            handle,
            _runtime: runtime,
        }
    }

    fn rows(&self) -> Vec<Flow> {
        self.handle.points().iter().map(flow).collect()
    }

    fn answers(&self, status: u16) -> u64 {
        self.handle.summary().requests.get(&status).copied().unwrap_or(0)
    }
}

fn flow(point: &Point) -> Flow {
    let tag = |key: &str| point.tags.get(key).cloned().unwrap_or_default();
    let field = |key: &str| match point.fields.get(key) {
        Some(Value::Int(n)) => u64::try_from(*n).unwrap(),
        Some(Value::Uint(n)) => *n,
        _ => 0,
    };
    Flow {
        transport: if tag("transport") == "tcp" {
            Transport::Tcp
        } else {
            Transport::Udp
        },
        family: tag("family"),
        direction: if tag("direction") == "incoming" {
            Direction::Incoming
        } else {
            Direction::Outgoing
        },
        src_ip: tag("src_ip").parse().unwrap(),
        src_port: tag("src_port"),
        dst_ip: tag("dst_ip").parse().unwrap(),
        dst_port: tag("dst_port"),
        pid: tag("pid").parse().unwrap(),
        process_name: tag("process_name"),
        counts: Counts {
            connections: field("tcp_established"),
            closed: field("tcp_closed"),
            bytes_sent: field("bytes_written"),
            bytes_received: field("bytes_read"),
            ..Counts::default()
        },
        retransmits: field("retransmits"),
        rtt_us: field("rtt"),
    }
}

/// Everything, and nothing twice.
fn arrived(stub: &Stub, services: [&Service; 2]) -> bool {
    let rows = stub.rows();
    services.iter().all(|service| {
        let reported = service.reported(&rows);
        if reported != service.truth {
            println!("{} points: {reported:?}\n      of {:?}", rows.len(), service.truth);
        }
        reported == service.truth
    })
}

#[test]
#[ignore = "native: needs root"]
fn what_a_wrong_token_kept_back_goes_out_once_with_the_right_one() {
    let stub = Stub::start();
    let directory = directory();
    let wrong = format!("--dataway=http://{}/?token=tkn_wrong", stub.handle.addr);
    let mut agent = Agent::spawn(Rights::Own, directory.path(), &[&wrong]);
    agent.wait_until("it is up", |agent| agent.log().contains("Agent is up"));
    let (listener, mut tcp) = tcp_service();
    let (socket, mut udp) = udp_service();
    tcp.connections(&listener, 20);
    udp.datagrams(&socket, 20);
    // The documented record has no number of datagrams.
    for end in [&mut udp.truth.outgoing, &mut udp.truth.incoming] {
        (end.datagrams_sent, end.datagrams_received) = (0, 0);
    }
    agent.wait_until("it is refused", |_| stub.answers(403) > 0);
    let mut ready = (0, String::new());
    agent.wait_until("readyz tells", |agent| {
        ready = agent.page("/readyz").unwrap();
        ready.1.contains("403")
    });
    println!("{}", ready.1);
    assert!(ready.1.contains("check the token"), "what to do: {}", ready.1);
    assert_eq!(ready.0, 200, "records are kept, a restart would not help: {}", ready.1);
    assert!(agent.is_running());
    assert!(agent.end(libc::SIGTERM).success());
    assert!(!agent.log().contains("tkn_wrong"), "the token is in the log");
    assert_eq!(stub.handle.summary().points, 0);

    let mut agent = Agent::spawn(
        Rights::Own,
        directory.path(),
        &[&format!("--dataway={}", stub.handle.url())],
    );
    agent.wait_until("all has arrived", |_| arrived(&stub, [&tcp, &udp]));
    assert!(agent.end(libc::SIGTERM).success());
    // No more than was made, and no body twice.
    assert!(arrived(&stub, [&tcp, &udp]));
    let summary = stub.handle.summary();
    assert_eq!((summary.duplicates, summary.duplicate_points), (0, 0), "{summary:?}");
    assert!(
        !agent.log().contains(&StubConfig::default().token),
        "the token is in the log"
    );
}
