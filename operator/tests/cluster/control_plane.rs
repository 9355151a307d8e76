//! A control plane of its own on loopback: etcd, kube-apiserver and, for the garbage collector, kube-controller-manager.
//! No node: pods are made and never run.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;
use tempfile::TempDir;

/// Token of the administrator.
const ADMIN: &str = "administrators-token";

/// Who is written into the audit log: every request, without bodies.
const AUDIT: &str =
    "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{ level: Metadata }]\n";

/// Running programs. They end with it.
pub(crate) struct ControlPlane {
    directory: TempDir,
    programs: PathBuf,
    server: String,
    children: Vec<Child>,
}

impl ControlPlane {
    /// Starts it and waits until it answers.
    pub(crate) fn start() -> Self {
        let programs = programs();
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name).display().to_string();
        let (etcd, peers, secure) = (port(), port(), port());
        let etcd = format!("http://127.0.0.1:{etcd}");
        write_keys(directory.path());
        fs::write(file("audit.yaml"), AUDIT).unwrap();
        fs::write(file("tokens.csv"), format!("{ADMIN},admin,admin,\"system:masters\"\n")).unwrap();
        let mut plane = Self {
            programs,
            server: format!("https://127.0.0.1:{secure}"),
            children: Vec::new(),
            directory,
        };
        let file = |name: &str| plane.directory.path().join(name).display().to_string();
        let arguments = [
            format!("--data-dir={}", file("etcd")),
            format!("--listen-client-urls={etcd}"),
            format!("--advertise-client-urls={etcd}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peers}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=error".to_owned(),
        ];
        let child = plane.spawn("etcd", &arguments);
        plane.children.push(child);
        let file = |name: &str| plane.directory.path().join(name).display().to_string();
        let arguments = [
            format!("--etcd-servers={etcd}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={secure}"),
            format!("--cert-dir={}", file("")),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--service-account-key-file={}", file("accounts.pub")),
            format!("--service-account-signing-key-file={}", file("accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            // Owner references that block deletion need a right of their own then: strict clusters have this.
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement".to_owned(),
            format!("--token-auth-file={}", file("tokens.csv")),
            format!("--audit-policy-file={}", file("audit.yaml")),
            format!("--audit-log-path={}", file("audit.log")),
            // Lines are in the file before the request is answered.
            "--audit-log-mode=blocking-strict".to_owned(),
        ];
        let child = plane.spawn("kube-apiserver", &arguments);
        plane.children.push(child);
        plane.kubeconfig("admin", ADMIN);
        plane.until("the API server answers", || {
            let output = plane.kubectl(&["get", "--raw", "/readyz"]);
            output.status.success()
        });
        let arguments = [
            format!(
                "--kubeconfig={}",
                plane.directory.path().join("admin.kubeconfig").display()
            ),
            "--controllers=garbage-collector-controller".to_owned(),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
        ];
        let child = plane.spawn("kube-controller-manager", &arguments);
        plane.children.push(child);
        plane
    }

    /// Runs kubectl as the administrator.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Output {
        self.tool("kubectl").args(arguments).output().unwrap()
    }

    /// As [`ControlPlane::kubectl`], with the text on standard input; the output must be of a success.
    pub(crate) fn apply(&self, manifest: &str) -> Result<String, String> {
        let path = self.directory.path().join("manifest.yaml");
        fs::write(&path, manifest).unwrap();
        let output = self.kubectl(&["apply", "-f", path.to_str().unwrap()]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    /// Runs kubectl, which must succeed.
    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        succeeded(arguments, &self.kubectl(arguments))
    }

    /// An object as JSON; null if there is none.
    pub(crate) fn get(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        let output = self.kubectl(&all);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Runs helm as the administrator.
    pub(crate) fn helm(&self, arguments: &[&str]) -> Output {
        self.tool("helm").args(arguments).output().unwrap()
    }

    /// A kubeconfig with that token; returns its path.
    pub(crate) fn kubeconfig(&self, name: &str, token: &str) -> PathBuf {
        let path = self.directory.path().join(format!("{name}.kubeconfig"));
        let authority = self.directory.path().join("ca.crt");
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": name,
            "clusters": [{ "name": name, "cluster": { "server": self.server, "certificate-authority": authority } }],
            "users": [{ "name": name, "user": { "token": token } }],
            "contexts": [{ "name": name, "context": { "cluster": name, "user": name } }],
        });
        fs::write(&path, text.to_string()).unwrap();
        path
    }

    /// The requests of `user` so far: verb, what about, and the answer's code.
    pub(crate) fn requests(&self, user: &str) -> Vec<Request> {
        let log = fs::read_to_string(self.directory.path().join("audit.log")).unwrap();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .filter(|line| line["user"]["username"] == user)
            .map(|line| Request {
                verb: line["verb"].as_str().unwrap_or_default().to_owned(),
                resource: line["objectRef"]["resource"].as_str().unwrap_or_default().to_owned(),
                uri: line["requestURI"].as_str().unwrap_or_default().to_owned(),
                code: line["responseStatus"]["code"].as_i64().unwrap_or_default(),
            })
            .collect()
    }

    /// Waits for something that must come within a minute.
    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "after a minute not yet: {what}\n{}",
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A program whose output goes into a file of the control plane's directory.
    pub(crate) fn log_of(&self, command: &mut Command, name: &str) -> Child {
        let log = fs::File::create(self.directory.path().join(format!("{name}.log"))).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        command.spawn().unwrap()
    }

    fn spawn(&self, program: &str, arguments: &[String]) -> Child {
        self.log_of(Command::new(self.programs.join(program)).args(arguments), program)
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        let home = self.directory.path();
        command.env("KUBECONFIG", home.join("admin.kubeconfig"));
        command
            .env("HOME", home)
            .env("HELM_CACHE_HOME", home)
            .env("HELM_CONFIG_HOME", home);
        command
    }

    /// The end of every log.
    fn last_words(&self) -> String {
        let mut words = String::new();
        for entry in fs::read_dir(self.directory.path()).unwrap().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|it| it == "log") && !path.ends_with("audit.log") {
                let text = fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                let tail = lines.iter().rev().take(8).rev().copied().collect::<Vec<_>>().join("\n");
                words.push_str(&format!("--- {}\n{tail}\n", path.display()));
            }
        }
        words
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

/// One request of the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) verb: String,
    pub(crate) resource: String,
    pub(crate) uri: String,
    pub(crate) code: i64,
}

/// The programs of `scripts/e2e.sh programs`.
pub(crate) fn programs() -> PathBuf {
    let directory = std::env::var_os("CLUSTER_PROGRAMS");
    PathBuf::from(directory.expect("CLUSTER_PROGRAMS must name the directory that `scripts/e2e.sh programs` prints"))
}

/// The output of a command that must have succeeded.
pub(crate) fn succeeded(what: &[&str], output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{what:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A port of loopback that nobody uses now.
pub(crate) fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An authority, the server's certificate, and a key for the tokens of service accounts.
fn write_keys(directory: &Path) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = authority.self_signed(&key).unwrap();
    fs::write(directory.join("ca.crt"), certificate.pem()).unwrap();
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate().unwrap();
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let server = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    fs::write(directory.join("server.crt"), server.pem()).unwrap();
    fs::write(directory.join("server.key"), key.serialize_pem()).unwrap();
    let accounts = KeyPair::generate().unwrap();
    fs::write(directory.join("accounts.key"), accounts.serialize_pem()).unwrap();
    fs::write(directory.join("accounts.pub"), accounts.public_key_pem()).unwrap();
}
