//! The agent as a child process: who it runs as, what it prints, its admin pages, its rows.

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use testkit::{
    exactness::flow::{Flow, read_flows},
    service::{LedgerCounts, free_port, http_get},
};

/// Far beyond what anything here takes, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The user `nobody`.
pub const NOBODY: u32 = 65_534;

/// What the agent is allowed to be.
#[derive(Clone, Copy, Debug)]
pub enum Rights {
    /// Those of the test.
    Own,
    /// User `nobody` with these capabilities (bits) and no way to others.
    Nobody(u64),
}

/// What a finished run left behind.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    /// Standard output and error.
    pub said: String,
}

/// A running agent; killed when dropped.
pub struct Agent {
    child: Child,
    admin: SocketAddr,
    log: PathBuf,
    rows: PathBuf,
}

/// One feature as the metric and `doctor` show it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Feature {
    pub name: String,
    pub state: String,
    pub reason: String,
}

/// What `doctor --json` says.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct Doctor {
    pub features: Vec<Feature>,
    pub programs: Vec<Program>,
    pub error: Option<String>,
}

#[derive(Clone, Debug, serde::Deserialize)]
pub struct Program {
    pub name: String,
}

static COPY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();

/// A static is not dropped at the end, and each copy is large.
extern "C" fn remove_copy() {
    if let Some((directory, _)) = COPY.get() {
        let _ = fs::remove_dir_all(directory.path());
    }
}

/// Where a machine has the programs that are built elsewhere: `node-agent`, and those in Go.
pub fn prebuilt() -> Option<PathBuf> {
    std::env::var_os("EBPFCOLLECTOR_TEST_PROGRAMS").map(PathBuf::from)
}

/// A copy of the binary that every user can run: the build directory may be closed to others.
pub fn binary() -> &'static Path {
    let (_, path) = COPY.get_or_init(|| {
        let directory = tempfile::Builder::new().prefix("node-agent").tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = directory.path().join("node-agent");
        let built = prebuilt().map_or_else(|| env!("CARGO_BIN_EXE_node-agent").into(), |at| at.join("node-agent"));
        fs::copy(built, &path).unwrap();
        // SAFETY: a function of this program, which does not unwind.
        unsafe { libc::atexit(remove_copy) };
        (directory, path)
    });
    path
}

/// A directory that every user can write.
pub fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    directory
}

/// The agent's command, with no option from the environment of the test.
pub fn command(rights: Rights, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ENV_") {
            command.env_remove(name);
        }
    }
    command.args(args).env("RUST_BACKTRACE", "1").stdin(Stdio::null());
    // SAFETY: the hook only makes system calls that are safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if let Rights::Nobody(capabilities) = rights {
                become_nobody(capabilities)?;
            }
            // Last: a change of user takes it back.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))
        });
    }
    command
}

/// Runs the agent until it ends by itself.
pub fn run_to_end(rights: Rights, args: &[&str]) -> Ended {
    finish(command(rights, args))
}

/// Runs a command until it ends by itself.
pub fn finish(mut command: Command) -> Ended {
    let directory = directory();
    let path = directory.path().join("said");
    let said = File::create(&path).unwrap();
    let mut child = command
        .stdout(said.try_clone().unwrap())
        .stderr(said)
        .spawn()
        .expect("the agent starts");
    let deadline = Instant::now() + PATIENCE;
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!(
                "still running after {PATIENCE:?}: {}",
                fs::read_to_string(&path).unwrap()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let said = fs::read_to_string(&path).unwrap();
    assert!(
        !said.contains("panicked at") && !said.contains("stack backtrace"),
        "not a message for users: {said}"
    );
    Ended { code, said }
}

/// What `doctor --json` says with these arguments, and its exit code.
pub fn doctor(args: &[&str]) -> (Doctor, Option<i32>) {
    let ended = run_to_end(Rights::Own, &[&["doctor", "--json"], args].concat());
    let start = ended.said.find('{').unwrap_or(0);
    let doctor = serde_json::from_str(&ended.said[start..]).unwrap_or_else(|error| panic!("{error}: {}", ended.said));
    (doctor, ended.code)
}

// === impl Agent ===

impl Agent {
    /// Starts `node-agent standalone` with rows of every second, loopback included, in a file of `directory`.
    pub fn start(rights: Rights, directory: &Path, args: &[&str]) -> Self {
        let rows = directory.join("rows.jsonl");
        let file = format!("--output-file={}", rows.display());
        let agent = Self::spawn(rights, directory, &[&[file.as_str()], args].concat());
        agent.wait_until("it is ready", |agent| {
            agent.page("/readyz").is_some_and(|(status, _)| status == 200)
        });
        agent
    }

    /// Starts it without an output and without waiting.
    pub fn spawn(rights: Rights, directory: &Path, args: &[&str]) -> Self {
        let queue = format!("--queue-dir={}", directory.join("queue").display());
        let standard = ["standalone", "--interval=1s", "--loopback", &queue];
        Self::launch(directory, command(rights, &[&standard, args].concat()))
    }

    /// Starts `node-agent run` with the object `cluster` of the API server that `kubeconfig` names; without waiting.
    pub fn follow(directory: &Path, kubeconfig: &Path, args: &[&str]) -> Self {
        let mut command = command(
            Rights::Own,
            &[&["run", "--collector=cluster", "--host-root=/"], args].concat(),
        );
        command.env("KUBECONFIG", kubeconfig);
        Self::launch(directory, command)
    }

    fn launch(directory: &Path, mut command: Command) -> Self {
        let (log, rows) = (directory.join("log"), directory.join("rows.jsonl"));
        let admin = free_port().unwrap();
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = command
            .arg(format!("--admin-listen={admin}"))
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self {
            child,
            admin,
            log,
            rows,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Status and body of an admin page, `None` while nobody answers.
    pub fn page(&self, path: &str) -> Option<(u16, String)> {
        http_get(self.admin, path).ok()
    }

    pub fn metrics(&self) -> String {
        self.page("/metrics").expect("the admin server answers").1
    }

    pub fn ledger(&self) -> LedgerCounts {
        let (_, body) = self.page("/ledger").expect("the admin server answers");
        serde_json::from_str(&body).unwrap()
    }

    /// Features as the metric `ebpfcollector_node_feature` shows them.
    pub fn features(&self) -> Vec<(Feature, u32)> {
        let metrics = self.metrics();
        let lines = metrics
            .lines()
            .filter_map(|line| line.strip_prefix("ebpfcollector_node_feature{"));
        lines
            .map(|line| {
                let label = |name: &str| {
                    let (_, rest) = line.split_once(&format!("{name}=\"")).expect(line);
                    rest.split('"').next().unwrap().to_owned()
                };
                let feature = Feature {
                    name: label("feature"),
                    state: label("state"),
                    reason: label("reason"),
                };
                (feature, line.rsplit(' ').next().unwrap().parse().expect(line))
            })
            .collect()
    }

    /// Rows written so far; a line that is being written is left out.
    pub fn rows(&self) -> Vec<Flow> {
        rows_of(&self.rows)
    }

    /// Waits for something to become true; fails with the log.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited in vain: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: no pointers; the child is not reaped before `self` is gone, so the pid is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// True while it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal and waits until it ended.
    pub fn end(&mut self, signal: i32) -> ExitStatus {
        self.signal(signal);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "did not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM; it ends well, and these are all rows it wrote.
    pub fn stop(mut self) -> Vec<Flow> {
        let status = self.end(libc::SIGTERM);
        assert!(status.success(), "{status}: {}", self.log());
        self.rows()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the agent\n{}", self.log());
        }
    }
}

fn rows_of(path: &Path) -> Vec<Flow> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    read_flows(whole).unwrap()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Takes the calling process's rights away, but for the capabilities. Between fork and exec: system calls only.
fn become_nobody(capabilities: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let held = |bit: u32| capabilities & (1 << bit) != 0;
    // SAFETY: plain system calls; the two structs are the kernel's layout, with two sets for version 3.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1))?;
        for bit in (0..64).filter(|bit| !held(*bit)) {
            // The kernel has fewer than 64.
            if libc::prctl(libc::PR_CAPBSET_DROP, bit) < 0 {
                break;
            }
        }
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(NOBODY, NOBODY, NOBODY))?;
        check(libc::setresuid(NOBODY, NOBODY, NOBODY))?;
        let half = |shift: u32| {
            let bits = ((capabilities >> shift) & u64::from(u32::MAX)) as u32;
            Sets {
                effective: bits,
                permitted: bits,
                inheritable: bits,
            }
        };
        let header = Header {
            version: VERSION_3,
            pid: 0,
        };
        let sets = [half(0), half(32)];
        if libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        for bit in (0..64).filter(|bit| held(*bit)) {
            check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, bit, 0, 0))?;
        }
    }
    Ok(())
}
