//! HTTP at full speed: nginx serves a small file to wrk, both on this machine, with `httpflow` on and off.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use testkit::service::LedgerCounts;

use crate::project;

/// Connections of wrk, kept.
pub(super) const CONNECTIONS: u64 = 50;
/// Bytes of the file.
pub(super) const FILE_BYTES: usize = 1024;
/// Longest wait for nginx to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server that logs nothing and counts its requests. Ended when dropped.
pub(super) struct Nginx {
    child: Child,
    port: u16,
}

/// What wrk saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seen {
    pub(super) requests: u64,
    pub(super) per_second: f64,
    /// 99th percentile of the latency, microseconds.
    pub(super) p99_us: f64,
}

impl Nginx {
    pub(super) fn start(directory: &Path) -> Result<Self> {
        let root = directory.join("nginx");
        fs::create_dir_all(root.join("www"))?;
        fs::create_dir_all(root.join("logs"))?;
        fs::write(root.join("www/small"), vec![b'x'; FILE_BYTES])?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let root_text = root.display();
        let configuration = format!(
            "daemon off; worker_processes 2; worker_rlimit_nofile 40000; pid {root_text}/pid; error_log {root_text}/logs/error.log;\n\
             events {{ worker_connections 16384; }}\n\
             http {{\n\
               access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000;\n\
               client_body_temp_path {root_text}/body; proxy_temp_path {root_text}/proxy;\n\
               fastcgi_temp_path {root_text}/fastcgi; uwsgi_temp_path {root_text}/uwsgi; scgi_temp_path {root_text}/scgi;\n\
               server {{ listen 127.0.0.1:{port} reuseport; root {root_text}/www;\n\
                 location = /status {{ stub_status; }} }}\n\
             }}\n"
        );
        let file = root.join("nginx.conf");
        fs::write(&file, configuration)?;
        let child = Command::new("nginx")
            .arg("-p")
            .arg(&root)
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("starting nginx; make setup installs it")?;
        let server = Self { child, port };
        let start = Instant::now();
        while TcpStream::connect(server.address()).is_err() {
            anyhow::ensure!(start.elapsed() < PATIENCE, "nginx does not listen on port {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    pub(super) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Port of the server.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Requests answered since the start, by the server's own count, without the one that asks.
    pub(super) fn requests(&self) -> Result<u64> {
        let text = project::output_text(
            Command::new("curl")
                .args(["-sS", "--max-time", "5"])
                .arg(format!("http://{}/status", self.address())),
        )?;
        // Three counts in the line after their names: accepted, handled, requests.
        let counts = text.lines().nth(2).unwrap_or_default();
        let requests = counts
            .split_whitespace()
            .nth(2)
            .and_then(|count| count.parse::<u64>().ok());
        Ok(requests.with_context(|| format!("nginx does not tell its requests: {text}"))? - 1)
    }

    /// wrk with connections that it keeps.
    pub(super) fn load(&self, duration: Duration) -> Result<Seen> {
        let text = project::output_text(
            Command::new("wrk")
                .args(["-t", "2", "-c", &CONNECTIONS.to_string(), "--latency"])
                .args(["-d", &format!("{}s", duration.as_secs().max(1))])
                .arg(format!("http://{}/small", self.address())),
        )
        .context("running wrk; make setup installs it")?;
        seen(&text)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Its workers go when it ends in order.
        // SAFETY: no pointers involved; our own child, not yet waited for.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let _ = self.child.wait();
    }
}

/// Reads what wrk prints.
fn seen(text: &str) -> Result<Seen> {
    let mut seen = (None, None, None);
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["99%", latency] => seen.2 = microseconds(latency),
            ["Requests/sec:", rate] => seen.1 = rate.parse().ok(),
            [count, "requests", "in", ..] => seen.0 = count.parse().ok(),
            ["Socket", "errors:", ..] | ["Non-2xx", ..] => bail!("wrk: {line}"),
            _ => {}
        }
    }
    match seen {
        (Some(requests), Some(per_second), Some(p99_us)) => Ok(Seen {
            requests,
            per_second,
            p99_us,
        }),
        _ => bail!("wrk printed no figures: {text}"),
    }
}

/// A time as wrk prints it.
fn microseconds(text: &str) -> Option<f64> {
    let digits = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at_checked(digits)?;
    let factor = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// What the stages of `httpflow` lost.
pub(super) fn lost(ledger: &LedgerCounts) -> u64 {
    let of_http = ledger
        .iter()
        .filter(|(stage, _)| stage.ends_with("http") || stage.ends_with("httpflow"));
    of_http.map(|(_, stage)| stage.lost()).sum()
}

/// Exchanges that `httpflow` rows of an output count for a port: those of its clients and those of its server.
pub(super) fn counted(output: &str, port: u16) -> Result<(u64, u64)> {
    let mut counts = (0, 0);
    let port = port.to_string();
    for line in output.lines().filter(|line| line.contains("httpflow")) {
        let row: serde_json::Value = serde_json::from_str(line).with_context(|| format!("reading {line}"))?;
        let text = |key: &str| row.get(key).and_then(serde_json::Value::as_str).unwrap_or_default();
        let count = row.get("count").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if text("measurement") != "httpflow" || text("path") != "/small" || row.get("status_code") != Some(&200.into())
        {
            continue;
        }
        match text("direction") {
            "outgoing" if text("dst_port") == port => counts.0 += count,
            "incoming" if text("src_port") == port => counts.1 += count,
            _ => {}
        }
    }
    Ok(counts)
}

/// Where programs of the load come from, for an early word if one is missing.
pub(super) fn programs() -> Result<Vec<PathBuf>> {
    ["nginx", "wrk", "curl"]
        .into_iter()
        .map(|name| {
            let found = std::env::var_os("PATH").and_then(|path| {
                std::env::split_paths(&path)
                    .chain([PathBuf::from("/usr/sbin")])
                    .map(|directory| directory.join(name))
                    .find(|file| file.is_file())
            });
            found.with_context(|| format!("{name} was not found on PATH: make setup"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Running 2s test @ http://127.0.0.1:8080/small
  2 threads and 50 connections
  Latency Distribution
     50%  400.00us
     99%    1.25ms
  220000 requests in 2.00s, 270.00MB read
Requests/sec: 110000.50
Transfer/sec:    135.00MB
";

    #[test]
    fn figures_of_wrk_are_read() {
        let expected = Seen {
            requests: 220_000,
            per_second: 110_000.5,
            p99_us: 1250.0,
        };
        assert!(seen(TEXT).is_ok_and(|seen| seen == expected));
        assert!(
            seen(&format!(
                "{TEXT}  Socket errors: connect 1, read 0, write 0, timeout 0\n"
            ))
            .is_err()
        );
        assert!(seen("").is_err());
    }

    #[test]
    fn both_ends_are_counted_apart() {
        let row = |direction: &str, ports: (&str, &str), count: u64| {
            format!(
                "{{\"measurement\":\"httpflow\",\"direction\":\"{direction}\",\"src_port\":\"{}\",\"dst_port\":\"{}\",\
                 \"path\":\"/small\",\"status_code\":200,\"count\":{count}}}\n",
                ports.0, ports.1
            )
        };
        let all = row("outgoing", ("*", "80"), 3) + &row("incoming", ("80", "*"), 4) + &row("incoming", ("81", "*"), 9);
        assert!(counted(&all, 80).is_ok_and(|counts| counts == (3, 4)));
    }
}
