//! The clusters that the tests run on, and what can be done to each from outside.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::{
    images,
    local::{
        self,
        layout::{CONTROL_PLANE, Layout, OUTSIDE_V4, OUTSIDE_V6},
    },
};

/// Name of the cluster in kind.
const KIND_NAME: &str = "ec-e2e";
const KIND_CONFIG: &str = "kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking: { ipFamily: dual }
nodes: [{ role: control-plane }, { role: worker }, { role: worker }]
";
/// Where kind's control plane keeps what runs there, and a place beside it.
const KIND_MANIFEST: &str = "/etc/kubernetes/manifests/kube-apiserver.yaml";
const KIND_ASIDE: &str = "/etc/kubernetes/kube-apiserver.yaml";

/// Which cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// On this machine, without an image registry
    Local,
    /// Made by kind
    Kind,
    /// The one of KUBECONFIG; it has to have the images already
    Existing,
}

/// One cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    which: Which,
    /// Directories of the tests; for a local cluster, also the cluster's.
    pub layout: Layout,
    /// Programs of the local cluster, if it was built: kubectl and helm are among them.
    programs: Option<PathBuf>,
}

// === impl Cluster ===

impl Cluster {
    /// A handle; nothing is started.
    #[must_use]
    pub fn new(which: Which, layout: Layout, programs: Option<PathBuf>) -> Self {
        Self {
            which,
            layout,
            programs,
        }
    }

    /// Brings it up with all images of the tests.
    ///
    /// # Errors
    /// Something did not start.
    pub fn up(&self, dist: &Path) -> anyhow::Result<()> {
        let directory = self
            .layout
            .root
            .parent()
            .context("the cluster's directory has no parent")?
            .join("images");
        let programs = self.programs.as_deref();
        match self.which {
            Which::Local => {
                let programs = programs.context("E2E_PROGRAMS is not set: scripts/e2e.sh does it")?;
                let archives = images::write_all(dist, Some(programs), &directory)?;
                local::up(&self.layout, programs, &archives)
            }
            Which::Kind => {
                self.down()?;
                let archives = images::write_all(dist, None, &directory)?;
                std::fs::create_dir_all(&self.layout.root)?;
                let kubeconfig = self.kubeconfig()?.display().to_string();
                let create = [
                    "create", "cluster", "--name", KIND_NAME, "--config", "-", "--wait", "120s",
                ];
                run(
                    "kind",
                    &[&create[..], &["--kubeconfig", &kubeconfig]].concat(),
                    Some(KIND_CONFIG),
                )?;
                for archive in archives {
                    let archive = archive.display().to_string();
                    run("kind", &["load", "image-archive", &archive, "--name", KIND_NAME], None)?;
                }
                Ok(())
            }
            Which::Existing => Ok(()),
        }
    }

    /// Removes it; what was there before stays.
    ///
    /// # Errors
    /// Something would not go.
    pub fn down(&self) -> anyhow::Result<()> {
        match self.which {
            Which::Local => local::down(&self.layout),
            Which::Kind => {
                run("kind", &["delete", "cluster", "--name", KIND_NAME], None)?;
                match std::fs::remove_dir_all(&self.layout.root) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
                    _ => Ok(()),
                }
            }
            Which::Existing => Ok(()),
        }
    }

    /// Saves what nodes wrote, where logs are kept.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn keep_logs(&self) -> anyhow::Result<()> {
        match self.which {
            Which::Local => local::keep_logs(&self.layout),
            Which::Kind => {
                let place = self.layout.logs.display().to_string();
                run("kind", &["export", "logs", "--name", KIND_NAME, &place], None)
            }
            Which::Existing => Ok(()),
        }
    }

    /// How to reach it as an administrator.
    ///
    /// # Errors
    /// KUBECONFIG is not set though an existing cluster is asked for.
    pub fn kubeconfig(&self) -> anyhow::Result<PathBuf> {
        match self.which {
            Which::Existing => std::env::var_os("KUBECONFIG")
                .map(PathBuf::from)
                .context("E2E_CLUSTER is existing, but KUBECONFIG names no cluster"),
            Which::Local | Which::Kind => Ok(self.layout.kubeconfig()),
        }
    }

    /// kubectl or helm: the local cluster's, or that on PATH.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        match &self.programs {
            Some(programs) => programs.join(name),
            None => name.into(),
        }
    }

    /// Starts counting servers outside the cluster; none where that is not possible. Arguments are those of `traffic`.
    ///
    /// # Errors
    /// The server does not start.
    pub fn outside(&self, dist: &Path, arguments: &[&str]) -> anyhow::Result<Option<Outside>> {
        if self.which != Which::Local {
            return Ok(None);
        }
        let pid = local::pid(&self.layout, CONTROL_PLANE)?;
        let server = Command::new("nsenter")
            .arg(format!("--net=/proc/{pid}/ns/net"))
            .arg(dist.join("test/traffic"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start a server outside the cluster")?;
        Ok(Some(Outside {
            addresses: [OUTSIDE_V4, OUTSIDE_V6].map(str::to_owned),
            server,
        }))
    }

    /// Takes the API server away or gives it back; false where that cannot be done from here.
    ///
    /// # Errors
    /// The cluster is not up.
    pub fn set_api_server(&self, running: bool) -> anyhow::Result<bool> {
        match self.which {
            Which::Local => local::set_stopped(&self.layout, CONTROL_PLANE, "kube-apiserver", !running).map(|()| true),
            Which::Kind => {
                let (from, to) = if running {
                    (KIND_ASIDE, KIND_MANIFEST)
                } else {
                    (KIND_MANIFEST, KIND_ASIDE)
                };
                run(
                    "docker",
                    &["exec", &format!("{KIND_NAME}-control-plane"), "mv", from, to],
                    None,
                )?;
                Ok(true)
            }
            Which::Existing => Ok(false),
        }
    }

    /// The API server's audit log, where there is one.
    #[must_use]
    pub fn audit_log(&self) -> Option<PathBuf> {
        (self.which == Which::Local).then(|| self.layout.logs.join("audit.log"))
    }
}

/// A server outside the cluster; it ends with this.
pub struct Outside {
    /// IPv4 and IPv6.
    pub addresses: [String; 2],
    server: std::process::Child,
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Runs a program that has to succeed; returns nothing of what it writes.
fn run(program: &str, arguments: &[&str], input: Option<&str>) -> anyhow::Result<()> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    if let (Some(input), Some(mut pipe)) = (input, child.stdin.take()) {
        pipe.write_all(input.as_bytes())
            .with_context(|| format!("write to {program}"))?;
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("wait for {program}"))?;
    anyhow::ensure!(
        output.status.success(),
        "{program} {} ended with {}: {}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
