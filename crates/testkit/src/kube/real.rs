//! etcd and kube-apiserver as `scripts/e2e.sh programs` builds them, alone on loopback: nothing schedules or runs pods.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::{service::free_port, traffic::sys};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);
const TOKEN: &str = "control-plane";

/// A running control plane; it ends when dropped.
#[derive(Debug)]
pub struct ControlPlane {
    programs: PathBuf,
    /// In the order to end them.
    children: Vec<Child>,
    apiserver: Vec<String>,
    directory: tempfile::TempDir,
}

// === impl ControlPlane ===

impl ControlPlane {
    /// Whether the programs are there.
    #[must_use]
    pub fn is_built() -> bool {
        programs().is_ok()
    }

    /// Starts both programs and waits until they serve.
    ///
    /// # Errors
    /// The programs are not built, or do not come up; their logs are in the message.
    pub fn start() -> anyhow::Result<Self> {
        let programs = programs()?;
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        let (client, peer, secure) = (free_port()?, free_port()?, free_port()?);
        let accounts = rcgen::KeyPair::generate()?;
        fs::write(at("sa.key"), accounts.serialize_pem())?;
        fs::write(at("sa.pub"), accounts.public_key_pem())?;
        fs::write(at("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))?;
        fs::write(at("kubeconfig"), kubeconfig(secure).to_string())?;
        let etcd = [
            format!("--data-dir={}", at("etcd")),
            format!("--listen-client-urls=http://{client}"),
            format!("--advertise-client-urls=http://{client}"),
            format!("--listen-peer-urls=http://{peer}"),
            format!("--initial-advertise-peer-urls=http://{peer}"),
            format!("--initial-cluster=default=http://{peer}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        let apiserver = vec![
            format!("--etcd-servers=http://{client}"),
            format!("--secure-port={}", secure.port()),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", at("certificates")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", at("sa.pub")),
            format!("--service-account-signing-key-file={}", at("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
            format!("--token-auth-file={}", at("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
        ];
        let mut plane = Self {
            programs,
            children: Vec::new(),
            apiserver,
            directory,
        };
        plane.spawn("etcd", &etcd)?;
        plane.serve()?;
        Ok(plane)
    }

    /// Starts the API server (again) and waits until it serves.
    ///
    /// # Errors
    /// It does not come up.
    pub fn serve(&mut self) -> anyhow::Result<()> {
        self.spawn("kube-apiserver", &self.apiserver.clone())?;
        self.until(&["get", "--raw", "/readyz"])
    }

    /// Tries until kubectl has no complaint.
    fn until(&self, words: &[&str]) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.kubectl(words, None) {
            if Instant::now() >= deadline {
                bail!("{error} for {PATIENCE:?}: {}", self.log("kube-apiserver"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Kills the API server; etcd stays.
    ///
    /// # Errors
    /// It was not running.
    pub fn kill_apiserver(&mut self) -> anyhow::Result<()> {
        let mut apiserver = self.children.pop().context("no API server runs")?;
        apiserver.kill()?;
        apiserver.wait()?;
        Ok(())
    }

    /// For the variable `KUBECONFIG`.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// Runs kubectl with words and standard input; gives what it prints.
    ///
    /// # Errors
    /// It fails; what it says is in the message.
    pub fn kubectl(&self, words: &[&str], input: Option<&str>) -> anyhow::Result<String> {
        let given = self.directory.path().join("input");
        fs::write(&given, input.unwrap_or_default())?;
        let output = Command::new(self.programs.join("kubectl"))
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(words)
            .stdin(File::open(&given)?)
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {words:?}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies the definition in `crds` and waits until it is served.
    ///
    /// # Errors
    /// As [`Self::kubectl`].
    pub fn define(&self, crds: &Path) -> anyhow::Result<()> {
        let file = crds.display().to_string();
        self.kubectl(&["create", "-f", &file], None)?;
        self.until(&["get", "ebpfcollectors"])
    }

    /// Changes the spec of the object `cluster` by a merge patch.
    ///
    /// # Errors
    /// As [`Self::kubectl`].
    pub fn patch(&self, spec: &Value) -> anyhow::Result<()> {
        let patch = json!({ "spec": spec }).to_string();
        self.kubectl(
            &["patch", "ebpfcollector", "cluster", "--type=merge", "-p", &patch],
            None,
        )
        .map(drop)
    }

    fn spawn(&mut self, program: &str, arguments: &[String]) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.log_file(program))?;
        let mut command = Command::new(self.programs.join(program));
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: the hook makes one system call.
        unsafe {
            command.pre_exec(sys::die_with_parent);
        }
        let child = command.spawn().with_context(|| format!("start {program}"))?;
        self.children.push(child);
        Ok(())
    }

    fn log_file(&self, program: &str) -> PathBuf {
        self.directory.path().join(format!("{program}.log"))
    }

    fn log(&self, program: &str) -> String {
        fs::read_to_string(self.log_file(program)).unwrap_or_default()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The newest complete set of programs in the cache.
fn programs() -> anyhow::Result<PathBuf> {
    let cache = match (std::env::var_os("EBPFCOLLECTOR_CACHE"), std::env::var_os("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => PathBuf::from(home).join(".cache/ebpf-collector"),
        (None, None) => bail!("neither EBPFCOLLECTOR_CACHE nor HOME is set"),
    };
    let sets = cache.join("cluster");
    let complete = |set: &PathBuf| {
        ["etcd", "kube-apiserver", "kubectl"]
            .iter()
            .all(|program| set.join(program).exists())
    };
    let mut found: Vec<PathBuf> = fs::read_dir(&sets)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(complete)
        .collect();
    found.sort_by_key(|set| fs::metadata(set).and_then(|set| set.modified()).ok());
    found
        .pop()
        .with_context(|| format!("no programs below {}: run `scripts/e2e.sh programs`", sets.display()))
}

fn kubeconfig(apiserver: SocketAddr) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": {
            // Its certificate is made at its start and is of no authority.
            "server": format!("https://{apiserver}"), "insecure-skip-tls-verify": true,
        } }],
        "users": [{ "name": "test", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    })
}
