//! Stands in for runc on machines that lack a capability themselves (inside a container or virtual machine that took it away):
//! takes what the machine does not have out of what a container is to be given, and becomes runc. Engines refuse the whole
//! container otherwise.

use std::{
    ffi::OsString,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use serde_json::Value;

/// Under this name the program stands in for runc.
pub const NAME: &str = "runc-within";

/// Names of all capabilities by their number, see capabilities(7).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Capabilities that no process of this machine can have.
///
/// # Errors
/// `/proc/self/status` does not tell.
pub fn missing() -> anyhow::Result<Vec<String>> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
        .context("/proc/self/status has no line CapBnd")?;
    let names = CAPABILITIES.iter().enumerate();
    Ok(names
        .filter(|(number, _)| bounding >> number & 1 == 0)
        .map(|(_, name)| format!("CAP_{name}"))
        .collect())
}

/// Becomes runc with these arguments; returns only if that fails.
///
/// # Errors
/// A file of the container cannot be read or written, or runc not be started.
pub fn run(arguments: &[OsString]) -> anyhow::Result<()> {
    let missing = missing()?;
    if let Some(bundle) = value_of(arguments, "--bundle") {
        edit(&Path::new(bundle).join("config.json"), |config| {
            without(config.get_mut("process"), &missing)
        })?;
    }
    if let Some(process) = value_of(arguments, "--process") {
        edit(&PathBuf::from(process), |process| without(Some(process), &missing))?;
    }
    Err(Command::new("runc").args(arguments).exec()).context("become runc")
}

fn value_of<'a>(arguments: &'a [OsString], flag: &str) -> Option<&'a OsString> {
    arguments.iter().skip_while(|argument| *argument != flag).nth(1)
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut value = serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))?;
    change(&mut value);
    fs::write(path, serde_json::to_vec(&value)?).with_context(|| format!("write {}", path.display()))
}

fn without(process: Option<&mut Value>, missing: &[String]) {
    let sets = process
        .and_then(|process| process.get_mut("capabilities"))
        .and_then(Value::as_object_mut);
    for set in sets
        .into_iter()
        .flat_map(|sets| sets.values_mut())
        .filter_map(Value::as_array_mut)
    {
        set.retain(|name| !missing.iter().any(|missing| name == missing));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_missing_goes_and_from_every_set() {
        let mut process = json!({ "args": ["x"], "capabilities": {
            "bounding": ["CAP_BPF", "CAP_SYS_RESOURCE"], "effective": ["CAP_SYS_RESOURCE"] } });
        without(Some(&mut process), &["CAP_SYS_RESOURCE".to_owned()]);
        assert_eq!(
            process["capabilities"],
            json!({ "bounding": ["CAP_BPF"], "effective": [] })
        );
        assert_eq!(process["args"], json!(["x"]));
    }

    #[test]
    fn the_bundle_is_found_among_runcs_arguments() {
        let arguments: Vec<OsString> = ["--root", "/r", "create", "--bundle", "/b", "id"]
            .map(OsString::from)
            .into();
        assert_eq!(value_of(&arguments, "--bundle"), Some(&OsString::from("/b")));
        assert_eq!(value_of(&arguments, "--process"), None);
    }
}
