//! A small cluster's network in three namespaces: a pod, its node, and the two backends of a service. The node translates, as
//! kube-proxy makes it: connections to the service go to the two backends in turn.
//!
//! ```text
//!   NAME-pod .2 ── 10.78.1.0/24, fd78:1::/64 ── .1 NAME-node .1 ── 10.78.2.0/24, fd78:2::/64 ── .2, .3 NAME-back
//! ```
//! The backends write down who came to which address: that is the truth.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use testkit::traffic::netns::inside;

/// Addresses of the service.
pub const SERVICE: [&str; 2] = ["10.96.78.10", "fd96::78:10"];
/// Its port, for both transports.
pub const PORT: u16 = 80;
/// The port of the backends.
pub const BACKEND_PORT: u16 = 8080;
const BACKENDS: [[&str; 2]; 2] = [["10.78.2.2", "10.78.2.3"], ["fd78:2::2", "fd78:2::3"]];

/// The network. Removed when dropped.
pub struct NatNet {
    name: &'static str,
    /// A process in each namespace: without one a namespace is nobody's.
    holders: Vec<Child>,
}

/// Who came to which backend, by the transport's name and the client's end.
pub type Came = Arc<Mutex<HashMap<(&'static str, SocketAddr), SocketAddr>>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Pod,
    Node,
    Back,
}

const PLACES: [Place; 3] = [Place::Pod, Place::Node, Place::Back];

/// A command that finds programs of root's too.
fn command(program: &str, args: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command
        .args(args.split_ascii_whitespace())
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(Stdio::null());
    command
}

/// Runs a command; fails with what it says.
fn run(program: &str, args: &str) -> String {
    let output = command(program, args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

// === impl NatNet ===

impl NatNet {
    pub fn up(name: &'static str) -> Self {
        remove(name);
        let mut net = Self {
            name,
            holders: Vec::new(),
        };
        for place in PLACES {
            run("ip", &format!("netns add {}", net.namespace(place)));
        }
        let [pod, node, back] = PLACES.map(|place| net.namespace(place));
        for (far, near, n) in [(&pod, "pod0", 1), (&back, "back0", 2)] {
            run(
                "ip",
                &format!("-n {far} link add eth0 type veth peer name {near} netns {node}"),
            );
            net.ip(Place::Node, &format!("addr add 10.78.{n}.1/24 dev {near}"));
            net.ip(Place::Node, &format!("addr add fd78:{n}::1/64 dev {near} nodad"));
            net.ip(Place::Node, &format!("link set {near} up"));
            let place = if n == 1 { Place::Pod } else { Place::Back };
            for last in if n == 1 { 2..=2 } else { 2..=3 } {
                net.ip(place, &format!("addr add 10.78.{n}.{last}/24 dev eth0"));
                net.ip(place, &format!("addr add fd78:{n}::{last}/64 dev eth0 nodad"));
            }
            net.ip(place, "link set eth0 up");
            net.ip(place, &format!("route add default via 10.78.{n}.1"));
            net.ip(place, &format!("-6 route add default via fd78:{n}::1"));
        }
        // A way to the service, before it is translated.
        net.ip(Place::Node, "route add default via 10.78.2.2");
        net.ip(Place::Node, "-6 route add default via fd78:2::2");
        for place in PLACES {
            net.ip(place, "link set lo up");
        }
        net.inside(Place::Node, || {
            for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(Path::new("/proc/sys/net").join(file), "1").unwrap();
            }
        });
        for chain in ["PREROUTING", "OUTPUT"] {
            net.translate(Place::Node, chain);
        }
        for place in PLACES {
            let sleep = command("ip", &format!("netns exec {} sleep 1000", net.namespace(place)));
            net.holders.push({ sleep }.spawn().unwrap());
        }
        net
    }

    fn namespace(&self, place: Place) -> String {
        format!("{}-{}", self.name, format!("{place:?}").to_lowercase())
    }

    fn file(&self, place: Place) -> File {
        File::open(Path::new("/run/netns").join(self.namespace(place))).unwrap()
    }

    fn ip(&self, place: Place, args: &str) {
        run("ip", &format!("-n {} {args}", self.namespace(place)));
    }

    /// Runs a program in a namespace.
    pub fn exec(&self, place: Place, args: &str) -> String {
        run("ip", &format!("netns exec {} {args}", self.namespace(place)))
    }

    /// Runs something on a thread in a namespace.
    pub fn inside<T: Send>(&self, place: Place, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.file(place), || Ok(work())).unwrap()
    }

    /// Inode number of a namespace.
    pub fn netns(&self, place: Place) -> u32 {
        use std::os::unix::fs::MetadataExt as _;
        u32::try_from(self.file(place).metadata().unwrap().ino()).unwrap()
    }

    /// Rules that send the service's connections to the backends in turn.
    pub fn translate(&self, place: Place, chain: &str) {
        for ((iptables, service), backends) in ["iptables", "ip6tables"].iter().zip(SERVICE).zip(BACKENDS) {
            for protocol in ["tcp", "udp"] {
                let to = |ip: &str| SocketAddr::new(ip.parse().unwrap(), BACKEND_PORT);
                let rule = format!("{iptables} -t nat -A {chain} -p {protocol} -d {service} --dport {PORT}");
                let [first, second] = backends.map(to);
                self.exec(
                    place,
                    &format!("{rule} -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination {first}"),
                );
                self.exec(place, &format!("{rule} -j DNAT --to-destination {second}"));
            }
        }
    }

    /// A `/proc` whose first process is in the node's namespace, as on a node: all else is the machine's.
    pub fn proc(&self, directory: &Path) -> PathBuf {
        use std::os::unix::fs::symlink;
        let proc = directory.join("proc");
        std::fs::create_dir(&proc).unwrap();
        let link = |name: &str, to: u32| symlink(format!("/proc/{to}"), proc.join(name)).unwrap();
        link("1", self.holders[1].id());
        for holder in &self.holders {
            link(&holder.id().to_string(), holder.id());
        }
        link(&std::process::id().to_string(), std::process::id());
        for file in ["stat", "sys"] {
            symlink(Path::new("/proc").join(file), proc.join(file)).unwrap();
        }
        proc
    }

    /// The backends: they take connections and datagrams, send back what they get, and write down who came.
    pub fn serve(&self) -> Came {
        let came = Came::default();
        for ip in BACKENDS.iter().flatten() {
            let address = SocketAddr::new(ip.parse().unwrap(), BACKEND_PORT);
            let (listener, socket) = self.inside(Place::Back, || {
                (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap())
            });
            let seen = Arc::clone(&came);
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    let ends = (stream.peer_addr().unwrap(), stream.local_addr().unwrap());
                    seen.lock().insert(("tcp", ends.0), ends.1);
                    thread::spawn(move || {
                        let mut buffer = [0; 4096];
                        while let Ok(read @ 1..) = stream.read(&mut buffer) {
                            if stream.write_all(&buffer[..read]).is_err() {
                                return;
                            }
                        }
                    });
                }
            });
            let seen = Arc::clone(&came);
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok((read, from)) = socket.recv_from(&mut buffer) {
                    seen.lock().insert(("udp", from), address);
                    let _ = socket.send_to(&buffer[..read], from);
                }
            });
        }
        came
    }
}

impl Drop for NatNet {
    fn drop(&mut self) {
        for holder in &mut self.holders {
            let _ = holder.kill();
            let _ = holder.wait();
        }
        remove(self.name);
    }
}

fn remove(name: &str) {
    for place in ["pod", "node", "back"] {
        let _ = command("ip", &format!("netns del {name}-{place}"))
            .stderr(Stdio::null())
            .status();
    }
}

/// The service's address of a family.
pub fn service(v6: bool) -> SocketAddr {
    SocketAddr::new(SERVICE[usize::from(v6)].parse().unwrap(), PORT)
}

/// One client: a connection, or a socket that sends datagrams.
pub enum Client {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Client {
    /// Call it in the namespace it shall be in.
    pub fn new(transport: &'static str, to: SocketAddr) -> Self {
        if transport == "tcp" {
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10)).unwrap();
            stream.set_nodelay(true).unwrap();
            return Self::Tcp(stream);
        }
        let any: IpAddr = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self::Udp(socket)
    }

    pub fn local(&self) -> SocketAddr {
        match self {
            Self::Tcp(stream) => stream.local_addr().unwrap(),
            Self::Udp(socket) => socket.local_addr().unwrap(),
        }
    }

    /// Sends so many bytes and waits until they are back.
    pub fn exchange(&mut self, bytes: usize) {
        let mut buffer = vec![7; bytes];
        match self {
            Self::Tcp(stream) => {
                stream.write_all(&buffer).unwrap();
                stream.read_exact(&mut buffer).unwrap();
            }
            Self::Udp(socket) => {
                assert_eq!(socket.send(&buffer).unwrap(), bytes);
                assert_eq!(socket.recv(&mut buffer).unwrap(), bytes);
            }
        }
    }

    /// Ends at once, with a reset if it is a connection: connection tracking forgets those first.
    pub fn abort(self) {
        if let Self::Tcp(stream) = self {
            let linger = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            let length = libc::socklen_t::try_from(size_of_val(&linger)).unwrap();
            // SAFETY: `linger` is readable for that length.
            let result = unsafe {
                libc::setsockopt(
                    stream.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    (&raw const linger).cast(),
                    length,
                )
            };
            assert_eq!(result, 0);
        }
    }
}
