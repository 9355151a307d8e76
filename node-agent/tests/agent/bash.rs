//! Plugin `ebpf-bash`: what is typed into shells on terminals comes out, with who typed it. The tests know what they typed.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use node_agent::ebpf::privileges::WANTED;

use crate::process::{Agent, NOBODY, PATIENCE, Rights, directory, doctor};

const PLUGIN: &str = "--enabled-plugins=ebpf-bash";
/// Bytes of a line that are kept, as documented.
const LINE_MAX: usize = 4095;

/// A shell on a terminal of its own.
struct Shell {
    child: Child,
    terminal: File,
    /// What it wrote, until it ends.
    output: std::thread::JoinHandle<()>,
}

/// Where and as whom a shell runs.
#[derive(Clone, Default)]
struct Place {
    root: Option<PathBuf>,
    uid: u32,
}

/// A row of the measurement.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    pid: String,
    user: String,
    cmd: String,
    truncated: bool,
}

impl Shell {
    fn start(program: &str, place: &Place) -> Self {
        let (terminal, other) = pty();
        let stdio = || Stdio::from(other.try_clone().unwrap());
        let mut command = Command::new(program);
        // Nothing else is read at start, and no line is taken for a key binding.
        command.args(["--norc", "--noprofile", "-i"]).env_clear();
        command
            .env("TERM", "dumb")
            .env("LC_ALL", "C.UTF-8")
            .env("PS1", "$ ")
            .env("PATH", "/bin:/usr/bin")
            .env("HISTFILE", "");
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let uid = place.uid;
        let root = place
            .root
            .as_ref()
            .map(|root| CString::new(root.as_os_str().as_bytes()).unwrap());
        // SAFETY: system calls only.
        unsafe {
            command.pre_exec(move || {
                check(libc::setsid())?;
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
                if let Some(root) = &root {
                    check(libc::unshare(libc::CLONE_NEWNS))?;
                    check(libc::chroot(root.as_ptr()))?;
                    check(libc::chdir(c"/".as_ptr()))?;
                }
                check(libc::setgroups(0, std::ptr::null()))?;
                check(libc::setresgid(uid, uid, uid))?;
                check(libc::setresuid(uid, uid, uid))
            });
        }
        let child = command.spawn().unwrap();
        drop(other);
        let mut reader = terminal.try_clone().unwrap();
        let output = std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            // The terminal gives an error once nobody has its other side open.
            while reader.read(&mut buffer).is_ok_and(|length| length > 0) {}
        });
        Self {
            child,
            terminal,
            output,
        }
    }

    fn types(&mut self, text: &str) {
        self.terminal.write_all(text.as_bytes()).unwrap();
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Types `exit`; it ends well.
    fn exit(mut self) {
        self.types("exit\n");
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the shell does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(self.terminal);
        self.output.join().unwrap();
    }
}

fn pty() -> (File, OwnedFd) {
    let (mut ours, mut other) = (0, 0);
    // SAFETY: two writable numbers; no name, no settings.
    let result = unsafe {
        libc::openpty(
            &raw mut ours,
            &raw mut other,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    check(result).unwrap();
    // Children of other tests are not to hold it open.
    for fd in [ours, other] {
        // SAFETY: no pointers.
        check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }).unwrap();
    }
    // SAFETY: just made, and nobody else's.
    unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(other)) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// All rows, and that messages say the same.
fn rows(directory: &Path) -> Vec<Row> {
    let text = fs::read_to_string(directory.join("rows.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let row = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(value["measurement"], "bash", "{line}");
        let text = |key: &str| {
            value[key]
                .as_str()
                .unwrap_or_else(|| panic!("{key} of {line}"))
                .to_owned()
        };
        let row = Row {
            pid: text("pid"),
            user: text("user"),
            cmd: text("cmd"),
            truncated: value["truncated"].as_bool().unwrap(),
        };
        let end = format!("Z pid:`{}` user:`{}` cmd:`{}`", row.pid, row.user, row.cmd);
        assert!(text("message").ends_with(&end), "{line}");
        row
    };
    whole.lines().map(row).collect()
}

fn of(rows: &[Row], pid: &str) -> Vec<(String, String)> {
    let own = rows.iter().filter(|row| row.pid == pid);
    own.map(|row| (row.user.clone(), row.cmd.clone())).collect()
}

fn typed(user: &str, lines: &[&str]) -> Vec<(String, String)> {
    lines.iter().map(|line| (user.to_owned(), (*line).to_owned())).collect()
}

/// A root directory with a bash of its own, its libraries, and its own users.
fn container(directory: &Path, passwd: &str) -> PathBuf {
    let root = directory.join("root");
    let libraries = Command::new("ldd").arg("/bin/bash").output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    let words = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for path in words.chain(["/bin/bash"]) {
        let to = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(path, to).unwrap();
    }
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    for directory in [directory, &root] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    root
}

fn nobody_with_documented_rights() -> Rights {
    let needed = WANTED.iter().filter(|privilege| privilege.name != "CAP_SYS_RESOURCE");
    Rights::Nobody(needed.fold(0, |set, privilege| set | 1 << privilege.bit))
}

/// Waits until as many rows are there.
fn wait_for(agent: &Agent, directory: &Path, count: usize) {
    agent.wait_until(&format!("{count} rows"), |_| rows(directory).len() >= count);
}

fn the_users_of_host_and_container_are_named(rights: Rights) {
    let files = tempfile::tempdir().unwrap();
    let root = container(
        files.path(),
        "root:x:0:0::/:/bin/bash\nalice:x:4321:4321::/:/bin/bash\n",
    );
    let (host_root, nobody) = (
        Place::default(),
        Place {
            uid: NOBODY,
            ..Place::default()
        },
    );
    let alice = Place {
        uid: 4321,
        root: Some(root.clone()),
    };
    let stranger = Place {
        uid: 999_999,
        root: Some(root),
    };
    // Older than the agent.
    let mut older = Shell::start("/bin/bash", &host_root);
    older.types(": before the agent\n");
    std::thread::sleep(Duration::from_millis(500));
    let directory = directory();
    let agent = Agent::start(rights, directory.path(), &[PLUGIN]);
    older.types("echo $((1 + 1))\n\n   \n: ü 'quoted`'\n");
    // Younger, and quick: the host's first lines are there before the shell asks for one.
    let mut shells = Vec::new();
    for (place, name) in [(&nobody, "nobody"), (&alice, "alice"), (&stranger, "999999")] {
        let mut shell = Shell::start("/bin/bash", place);
        if place.root.is_some() {
            // Nobody types into a terminal sooner; the host's program has its probe already.
            std::thread::sleep(Duration::from_millis(300));
        }
        shell.types(": first\ntrue | false\n");
        shells.push((shell, name));
    }
    let mut expected = vec![(
        older.pid(),
        typed("root", &["echo $((1 + 1))", ": ü 'quoted`'", "exit"]),
    )];
    older.exit();
    for (shell, name) in shells {
        expected.push((shell.pid(), typed(name, &[": first", "true | false", "exit"])));
        shell.exit();
    }
    wait_for(&agent, directory.path(), 12);
    // The container's program has no user any more.
    let gauge = |agent: &Agent, name: &str| {
        let name = format!("ebpfcollector_ebpf_bash_{name} ");
        let metrics = agent.metrics();
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(&name).map(str::to_owned));
        line.unwrap().parse::<u64>().unwrap()
    };
    agent.wait_until("its probe is gone", |agent| gauge(agent, "files") < 2);
    let found = rows(directory.path());
    for (pid, lines) in &expected {
        assert_eq!(&of(&found, pid), lines, "of {pid}\n{}", agent.log());
    }
    let counts = &agent.ledger()["agent.bash"];
    assert!(counts.skipped["empty"] >= 2, "{counts:?}");
    assert_eq!(counts.lost.values().sum::<u64>(), 0, "{counts:?}");
    agent.stop();
}

#[test]
#[ignore = "native: needs root"]
fn users_of_host_and_container_are_named() {
    the_users_of_host_and_container_are_named(Rights::Own);
}

#[test]
#[ignore = "native: needs root"]
fn the_documented_capabilities_are_enough_for_bash() {
    the_users_of_host_and_container_are_named(nobody_with_documented_rights());
}

#[test]
#[ignore = "native: needs root"]
fn a_thousand_pasted_lines_are_all_there() {
    let directory = directory();
    let agent = Agent::start(Rights::Own, directory.path(), &[PLUGIN]);
    let mut shell = Shell::start("/bin/bash", &Place::default());
    let lines: Vec<String> = (0..1000)
        .map(|n| format!(": line {n} {}", "x".repeat(n % 300)))
        .collect();
    shell.types(&format!("{}\n", lines.join("\n")));
    let pid = shell.pid();
    wait_for(&agent, directory.path(), 1000);
    // As much as is kept, and one byte and a page more.
    let long: Vec<String> = [LINE_MAX, LINE_MAX + 1, LINE_MAX + 4096]
        .iter()
        .map(|length| format!(": {}", "y".repeat(length - 2)))
        .collect();
    for line in &long {
        // In parts: a terminal takes 4 KiB at a time until its reader has asked for them.
        for part in line.as_bytes().chunks(512) {
            shell.types(std::str::from_utf8(part).unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
        shell.types("\n");
    }
    shell.exit();
    wait_for(&agent, directory.path(), 1004);
    let found = rows(directory.path());
    let own: Vec<&Row> = found.iter().filter(|row| row.pid == pid).collect();
    let commands: Vec<&str> = own.iter().map(|row| row.cmd.as_str()).collect();
    let mut expected: Vec<&str> = lines.iter().map(String::as_str).collect();
    expected.extend(long.iter().map(|line| &line[..LINE_MAX]));
    expected.push("exit");
    assert_eq!(commands, expected);
    let cut: Vec<bool> = own[1000..].iter().map(|row| row.truncated).collect();
    assert_eq!(cut, [false, true, true, false]);
    assert!(own[..1000].iter().all(|row| !row.truncated));
    let counts = &agent.ledger()["agent.bash"];
    assert_eq!(counts.entered, counts.emitted, "{counts:?}");
    agent.stop();
}

/// A bash that has its `readline` from the library, as other distributions build it, and another program that does.
#[test]
#[ignore = "native: needs root"]
fn lines_read_by_a_shared_library_are_those_of_shells_only() {
    let library = [
        "/lib/x86_64-linux-gnu/libreadline.so.8",
        "/lib/aarch64-linux-gnu/libreadline.so.8",
    ]
    .into_iter()
    .find(|path| Path::new(path).exists());
    let Some(library) = library else {
        println!("SKIPPED: this machine has no libreadline.so.8");
        return;
    };
    let files = tempfile::tempdir().unwrap();
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let source = files.path().join("reader.c");
    fs::write(&source, READER).unwrap();
    let program = |name: &str| {
        let path = files.path().join(name);
        let built = Command::new("cc")
            .arg(&source)
            .arg("-o")
            .arg(&path)
            .arg(library)
            .status()
            .unwrap();
        assert!(built.success());
        path.display().to_string()
    };
    let (bash, other) = (program("bash"), program("calculator"));
    let directory = directory();
    let agent = Agent::start(Rights::Own, directory.path(), &[PLUGIN]);
    let mut expected = Vec::new();
    for round in 0..3 {
        let mut shell = Shell::start(&bash, &Place::default());
        let mut calculator = Shell::start(&other, &Place::default());
        for _ in 0..3 {
            calculator.types("6 * 7\n");
            shell.types(": by library\n");
            // The first one is there after the library is mapped, and that takes a moment to be found.
            std::thread::sleep(Duration::from_millis(if round == 0 { 300 } else { 20 }));
        }
        expected.push((
            shell.pid(),
            typed("root", &[": by library", ": by library", ": by library", "exit"]),
        ));
        expected.push((calculator.child.id().to_string(), Vec::new()));
        shell.exit();
        calculator.exit();
    }
    let (last, lines) = &expected[4];
    agent.wait_until("the lines of the last shell", |_| {
        of(&rows(directory.path()), last).len() >= lines.len()
    });
    let found = rows(directory.path());
    for (pid, lines) in &expected {
        let mut own = of(&found, pid);
        // In the first round the very first line may be typed before the probe is there.
        if own.len() + 1 == lines.len() && pid == &expected[0].0 {
            own.insert(0, lines[0].clone());
        }
        assert_eq!(&own, lines);
    }
    let counts = &agent.ledger()["agent.bash"];
    assert!(counts.skipped["other_program"] >= 6, "{counts:?}");
    agent.stop();
}

const READER: &str = r#"
#include <stdlib.h>
#include <string.h>
char *readline(const char *);
int main(void) {
    char *line;
    int end = 0;
    while (!end && (line = readline("> "))) {
        end = !strcmp(line, "exit");
        free(line);
    }
    return 0;
}
"#;

#[test]
#[ignore = "native: needs root"]
fn what_cannot_be_seen_is_told() {
    let files = tempfile::tempdir().unwrap();
    let bash = files.path().join("bash");
    fs::copy("/bin/sleep", &bash).unwrap();
    // Called bash, without readline.
    let mut blind = Command::new(&bash).arg("60").spawn().unwrap();
    let (report, code) = doctor(&[PLUGIN]);
    let lines = report
        .features
        .iter()
        .find(|feature| feature.name == "ebpf-bash/lines")
        .unwrap();
    assert_eq!(lines.state, "degraded");
    assert!(lines.reason.contains("no symbol readline"), "{}", lines.reason);
    assert!(lines.reason.contains(&blind.id().to_string()), "{}", lines.reason);
    assert_eq!(code, Some(0), "{report:?}");
    blind.kill().unwrap();
    blind.wait().unwrap();
    let (report, _) = doctor(&[PLUGIN, "--refuse-program=readline_return"]);
    let off = report
        .features
        .iter()
        .find(|feature| feature.name == "ebpf-bash")
        .unwrap();
    assert_eq!((off.state.as_str(), report.error), ("off", None));
}
