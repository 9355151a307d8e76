//! A cluster on this machine, for where no image registry can be reached: the real Kubernetes programs, two nodes, each with
//! network, process, mount and host name namespaces of its own.
//!
//! Data flow of [`up`]: removes what an earlier cluster left ▶ writes certificates and configurations ▶ starts a first
//! process ([`init`]) in new namespaces for the control plane and each node ▶ joins them by veth pairs ▶ gives each its
//! [`init::Plan`] ▶ waits until the nodes are ready ▶ installs DNS. On the machine itself there is nothing but one listening
//! socket on loopback, cgroups and the cluster's directory; [`down`] ends the processes and removes those.

mod cgroups;
mod control_plane;
pub mod forward;
pub mod import;
pub mod init;
pub mod layout;
mod node;
mod pki;
pub mod runtime;

use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use layout::{API_SERVICE_IP, Addresses, CONTROL_PLANE, CONTROL_PLANE_V4, Layout, NODES};

const BOOTSTRAP: &str = include_str!("../../manifests/bootstrap.yaml");
const DNS: &str = include_str!("../../manifests/dns.yaml");
/// How long one step of the start may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// Starts a cluster, after removing what an earlier one left. `programs` is where `scripts/e2e.sh programs` put them,
/// `images` are archives for its nodes.
///
/// # Errors
/// Something did not start; the message names it and its log.
pub fn up(layout: &Layout, programs: &Path, images: &[PathBuf]) -> anyhow::Result<()> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "a local cluster needs root: it makes namespaces and cgroups"
    );
    down(layout)?;
    let _ = fs::remove_dir_all(&layout.logs);
    let start = Instant::now();
    // The machine's end of the way to the API server; the port is known before anything runs.
    let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback for the API server")?;
    let server = format!(
        "https://{}",
        listener.local_addr().context("read the listener's address")?
    );
    write_files(layout, &server)?;
    for image in images {
        let name = image
            .file_name()
            .with_context(|| format!("{} is no file", image.display()))?;
        fs::copy(image, layout.images().join(name)).with_context(|| format!("copy {}", image.display()))?;
    }
    let executable = layout.root.join("ec-e2e");
    fs::copy(std::env::current_exe().context("find this program")?, &executable)
        .with_context(|| format!("copy this program to {}", executable.display()))?;
    let stand_in = layout.root.join(runtime::NAME);
    fs::hard_link(&executable, &stand_in).with_context(|| format!("make {}", stand_in.display()))?;
    // Nodes see the cluster's directory, and the programs through it.
    let control_plane = spawn(
        layout,
        CONTROL_PLANE,
        &executable,
        programs,
        Stdio::from(OwnedFd::from(listener)),
    )?;
    for name in NODES {
        let pid = spawn(layout, name, &executable, programs, Stdio::null())?;
        run(&format!(
            "nsenter --net=/proc/{control_plane}/ns/net ip link add name {name} type veth peer name eth0 netns {pid}"
        ))?;
    }
    write_plan(
        layout,
        CONTROL_PLANE,
        &control_plane::plan(layout, programs, &executable),
    )?;
    for (index, name) in NODES.iter().enumerate() {
        write_plan(layout, name, &node::plan(layout, index, name))?;
    }
    for name in [CONTROL_PLANE].into_iter().chain(NODES) {
        wait_for(&format!("{name} to be prepared"), || {
            fs::read_to_string(layout.place(name).join("prepared")).map(|outcome| match outcome.as_str() {
                "ok" => Ok(()),
                problem => Err(anyhow::anyhow!("{name}: {problem}")),
            })
        })?;
    }
    note(start, "namespaces and networks");
    let kubectl = Kubectl::new(layout, programs);
    kubectl.until_ok("the API server to be ready", &["get", "--raw", "/readyz"])?;
    note(start, "API server");
    kubectl.apply(BOOTSTRAP)?;
    wait_for_images(layout, images)?;
    note(start, "images");
    for name in NODES {
        kubectl.until_ok(&format!("{name} to register"), &["get", "node", name])?;
    }
    kubectl.run(
        &["wait", "node", "--all", "--for=condition=Ready", "--timeout=60s"],
        None,
    )?;
    note(start, "nodes");
    kubectl.apply(DNS)?;
    kubectl.run(
        &[
            "-n",
            "kube-system",
            "rollout",
            "status",
            "deployment/coredns",
            "--timeout=60s",
        ],
        None,
    )?;
    note(start, "DNS");
    Ok(())
}

/// Ends everything of the cluster and removes it; logs stay. No cluster is no error.
///
/// # Errors
/// Something would not go; it is named.
pub fn down(layout: &Layout) -> anyhow::Result<()> {
    let killed = cgroups::clear(&layout.id)?;
    if killed > 0 {
        println!("    ended {killed} processes of {}", layout.id);
    }
    match fs::remove_dir_all(&layout.root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", layout.root.display()))
        }
        _ => Ok(()),
    }
}

/// Copies what the nodes' programs and pods wrote to where the control plane's logs are.
///
/// # Errors
/// Nothing can be written there.
pub fn keep_logs(layout: &Layout) -> anyhow::Result<()> {
    for name in NODES {
        let kept = layout.logs.join(name);
        fs::create_dir_all(&kept).with_context(|| format!("make {}", kept.display()))?;
        for part in ["programs", "log/pods"] {
            let from = layout.place(name).join(part);
            run(&format!("cp -r {} {}", from.display(), kept.display()))?;
        }
    }
    Ok(())
}

/// Process id, as the machine sees it, of a namespace's first process.
///
/// # Errors
/// The cluster is not up.
pub fn pid(layout: &Layout, name: &str) -> anyhow::Result<u32> {
    let path = layout.place(name).join("pid");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}: is the cluster up?", path.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("{} holds no number", path.display()))
}

/// Keeps a program from running, or lets it run again.
///
/// # Errors
/// The cluster is not up.
pub fn set_stopped(layout: &Layout, name: &str, program: &str, stopped: bool) -> anyhow::Result<()> {
    let path = layout.place(name).join("stopped").join(program);
    if stopped {
        fs::write(&path, "").with_context(|| format!("write {}", path.display()))
    } else {
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }
}

fn write_files(layout: &Layout, server: &str) -> anyhow::Result<()> {
    let place = layout.place(CONTROL_PLANE);
    let make = |path: PathBuf| fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()));
    make(layout.images())?;
    make(layout.logs.clone())?;
    make(layout.root.join("bin"))?;
    make(place.join("stopped"))?;
    let authority = pki::Authority::new()?;
    authority.write(&layout.root.join("ca.crt"))?;
    authority.write(&place.join("ca.crt"))?;
    let names = [
        "127.0.0.1",
        "localhost",
        CONTROL_PLANE_V4,
        API_SERVICE_IP,
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    authority
        .identity("kube-apiserver", None, &names)?
        .write(&place, "apiserver")?;
    authority
        .identity("service-accounts", None, &[])?
        .write(&place, "service-accounts")?;
    let masters = Some("system:masters");
    authority
        .identity("kube-apiserver-kubelet", masters, &[])?
        .write(&place, "kubelet-client")?;
    let admin = authority.identity("administrator", masters, &[])?;
    authority.write_kubeconfig(&layout.kubeconfig(), server, &admin)?;
    for name in ["controller-manager", "scheduler"] {
        let identity = authority.identity(&format!("system:kube-{name}"), None, &[])?;
        let path = place.join(format!("{name}.kubeconfig"));
        authority.write_kubeconfig(&path, &node::server(), &identity)?;
    }
    let policy = place.join("audit-policy.json");
    fs::write(&policy, control_plane::AUDIT_POLICY).with_context(|| format!("write {}", policy.display()))?;
    let missing = runtime::missing()?;
    if !missing.is_empty() {
        println!("    this machine lacks {}: containers go without", missing.join(", "));
    }
    let runtime = if missing.is_empty() { None } else { Some(runtime::NAME) };
    for (index, name) in NODES.iter().enumerate() {
        let place = layout.place(name);
        for directory in node::DIRECTORIES {
            make(place.join(directory))?;
        }
        for (file, text) in node::files(layout, index, name, runtime) {
            let path = place.join(file);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        let addresses = Addresses::of(index);
        let kubelet = authority.identity(
            &format!("system:node:{name}"),
            Some("system:nodes"),
            &[name, &addresses.v4, &addresses.v6],
        )?;
        kubelet.write(&place, "kubelet")?;
        authority.write_kubeconfig(&place.join("kubelet.kubeconfig"), &node::server(), &kubelet)?;
        let proxy = authority.identity("system:kube-proxy", None, &[])?;
        authority.write_kubeconfig(&place.join("kube-proxy.kubeconfig"), &node::server(), &proxy)?;
    }
    Ok(())
}

/// Starts a first process in new namespaces, and returns its id once it has told it.
fn spawn(layout: &Layout, name: &str, executable: &Path, programs: &Path, stdin: Stdio) -> anyhow::Result<u32> {
    let place = layout.place(name);
    let log_path = layout.logs.join(format!("{name}-init.log"));
    let log = fs::File::create(&log_path).with_context(|| format!("make {}", log_path.display()))?;
    // Signals of the terminal are not for the cluster.
    let mut command = Command::new("setsid");
    command.args([
        "unshare",
        "--net",
        "--pid",
        "--mount",
        "--uts",
        "--ipc",
        "--fork",
        "--kill-child=KILL",
        "--",
    ]);
    command
        .args(["sh", "-ec", "mount --bind \"$1\" \"$2\"; shift 2; exec \"$@\"", "sh"])
        .arg(programs)
        .arg(layout.root.join("bin"))
        .arg(executable)
        .arg("init")
        .arg(&place)
        .stdin(stdin)
        .stdout(log.try_clone().context("share the log")?)
        .stderr(log);
    let mut outer = command.spawn().context("start unshare (package util-linux)")?;
    wait_for(&format!("{name} to start"), || {
        if let Ok(Some(status)) = outer.try_wait() {
            return Ok(Err(anyhow::anyhow!(
                "{name} ended with {status}, see {}",
                log_path.display()
            )));
        }
        fs::metadata(place.join("pid")).map(|_| Ok(()))
    })?;
    let pid = pid(layout, name)?;
    cgroups::enter(&layout.id, name, pid)?;
    cgroups::enter(&layout.id, name, outer.id())?;
    Ok(pid)
}

fn write_plan(layout: &Layout, name: &str, plan: &init::Plan) -> anyhow::Result<()> {
    // Appears at once and whole.
    let (part, path) = (
        layout.place(name).join("init.part"),
        layout.place(name).join("init.json"),
    );
    fs::write(&part, serde_json::to_vec_pretty(plan)?)
        .and_then(|()| fs::rename(&part, &path))
        .with_context(|| format!("write {}", path.display()))
}

/// Runs a command of words without spaces, which has to succeed.
fn run(line: &str) -> anyhow::Result<()> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start `{line}`"))?;
    anyhow::ensure!(
        output.status.success(),
        "`{line}` ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn note(start: Instant, what: &str) {
    println!("    {what} after {:.1} s", start.elapsed().as_secs_f64());
}

/// Until every node's containerd has every archive.
fn wait_for_images(layout: &Layout, images: &[PathBuf]) -> anyhow::Result<()> {
    for (node, name) in NODES
        .iter()
        .flat_map(|node| images.iter().filter_map(move |path| Some((node, path.file_name()?))))
    {
        wait_for(&format!("{} to be in {node}", name.display()), || {
            let wanted = import::stamp(&layout.images().join(name))?;
            let found = fs::read_to_string(layout.place(node).join("imported").join(name))?;
            if wanted == found {
                Ok(Ok(()))
            } else {
                Err(std::io::Error::other("an older one is there"))
            }
        })?;
    }
    Ok(())
}

/// The cluster's own kubectl with the administrator's kubeconfig.
struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    fn new(layout: &Layout, programs: &Path) -> Self {
        Self {
            program: programs.join("kubectl"),
            kubeconfig: layout.kubeconfig(),
        }
    }

    fn run(&self, arguments: &[&str], input: Option<&str>) -> anyhow::Result<()> {
        let mut child = Command::new(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        if let (Some(input), Some(mut pipe)) = (input, child.stdin.take()) {
            pipe.write_all(input.as_bytes()).context("write to kubectl")?;
        }
        let output = child.wait_with_output().context("wait for kubectl")?;
        anyhow::ensure!(
            output.status.success(),
            "kubectl {} ended with {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    fn apply(&self, manifest: &str) -> anyhow::Result<()> {
        self.run(&["apply", "--server-side", "-f", "-"], Some(manifest))
    }

    fn until_ok(&self, what: &str, arguments: &[&str]) -> anyhow::Result<()> {
        wait_for(what, || {
            self.run(arguments, None).map(Ok).map_err(std::io::Error::other)
        })
    }
}

/// Asks until there is an answer: an I/O error is none yet.
fn wait_for(what: &str, mut ask: impl FnMut() -> std::io::Result<anyhow::Result<()>>) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(error) => anyhow::ensure!(Instant::now() < end, "waited {PATIENCE:?} for {what}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
