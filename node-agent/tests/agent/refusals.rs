//! A machine that does not let the agent work: it says what is missing and ends, before anything is attached.

use std::{ffi::CStr, fs, io, os::unix::process::CommandExt as _, path::Path};

use crate::process::{Agent, Ended, Rights, command, directory, finish, run_to_end};

fn is_root() -> bool {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// No rights at all: those of the test, or less.
fn nobody() -> Rights {
    if is_root() { Rights::Nobody(0) } else { Rights::Own }
}

fn refused(ended: &Ended, named: &[&str]) {
    for text in named {
        assert!(ended.said.contains(text), "{text:?} is not in: {}", ended.said);
    }
    assert_eq!(ended.code, Some(1), "{}", ended.said);
}

fn standalone(queue: &Path, more: &[&str]) -> Vec<String> {
    let queue = format!("--queue-dir={}", queue.display());
    let fixed = ["standalone", "--admin-listen=127.0.0.1:0", &queue];
    fixed.iter().chain(more).map(|word| (*word).to_owned()).collect()
}

fn run(rights: Rights, args: &[String]) -> Ended {
    run_to_end(rights, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn without_rights_it_names_the_capabilities() {
    let directory = directory();
    let ended = run(
        nobody(),
        &standalone(&directory.path().join("queue"), &["--output-stdout=json"]),
    );
    println!("{}", ended.said);
    let needed = [
        "CAP_BPF",
        "CAP_PERFMON",
        "CAP_NET_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_DAC_READ_SEARCH",
    ];
    refused(&ended, &needed);
    refused(
        &ended,
        &[
            "Run it as root or give it these capabilities",
            "Operation not permitted",
        ],
    );

    // Doctor tells the same, and is not at a loss itself.
    let ended = run_to_end(nobody(), &["doctor"]);
    assert_eq!(ended.code, Some(2), "{}", ended.said);
    for name in needed {
        let line = ended.said.lines().find(|line| line.starts_with(name)).expect(name);
        assert!(line.contains("MISSING"), "{line}");
    }
    assert!(ended.said.contains("Nothing can be collected here"), "{}", ended.said);
}

#[test]
#[ignore = "native: needs root"]
fn without_kernel_types_it_names_the_kernel_option() {
    let hidden = |args: &[&str]| {
        let mut command = command(Rights::Own, args);
        // SAFETY: the hook only makes system calls.
        unsafe {
            command.pre_exec(hide_kernel_types);
        }
        finish(command)
    };
    let directory = directory();
    let args = standalone(&directory.path().join("queue"), &["--output-stdout=json"]);
    let ended = hidden(&args.iter().map(String::as_str).collect::<Vec<_>>());
    println!("{}", ended.said);
    refused(&ended, &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF=y"]);
    assert!(!ended.said.contains("CAP_"), "rights are not the cause: {}", ended.said);
    assert_eq!(
        ended.said.matches("No such file").count(),
        1,
        "said twice: {}",
        ended.said
    );

    let ended = hidden(&["doctor"]);
    assert_eq!(ended.code, Some(2));
    assert!(
        ended.said.contains("has no BTF: needs CONFIG_DEBUG_INFO_BTF=y"),
        "{}",
        ended.said
    );
}

/// Puts an empty file system over the kernel's type information, for this process alone.
fn hide_kernel_types() -> io::Result<()> {
    const NONE: &CStr = c"none";
    let mount = |target: &CStr, kind: &CStr, flags| {
        // SAFETY: NUL-terminated strings that outlive the call.
        match unsafe { libc::mount(NONE.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: no pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    mount(c"/", NONE, libc::MS_REC | libc::MS_PRIVATE)?;
    mount(c"/sys/kernel/btf", c"tmpfs", 0)
}

#[test]
fn a_queue_directory_that_cannot_be_written_is_named() {
    let directory = directory();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let closed = directory.path().join("closed");
    fs::create_dir(&closed).unwrap();
    let mut readable = fs::metadata(&closed).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut readable, 0o555);
    fs::set_permissions(&closed, readable).unwrap();
    for (queue, reason) in [
        (file.clone(), "File exists"),
        (file.join("below"), "Not a directory"),
        (closed.clone(), "Permission denied"),
        (closed.join("below"), "Permission denied"),
    ] {
        let ended = run(
            nobody(),
            &standalone(&queue, &["--dataway=http://127.0.0.1:9?token=tkn_secret"]),
        );
        println!("{}", ended.said);
        refused(
            &ended,
            &[
                &format!("queue directory `{}", queue.display()),
                reason,
                "name a directory that this user can write",
            ],
        );
        assert!(!ended.said.contains("tkn_secret"));
    }
    let ended = run(
        nobody(),
        &standalone(&closed, &[&format!("--output-file={}", closed.join("rows").display())]),
    );
    refused(
        &ended,
        &[
            "sink `file`",
            "cannot be written: Permission denied",
            "name a file that this user can write",
        ],
    );
}

#[test]
fn an_address_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let listen = format!("--admin-listen={address}");
    let ended = run_to_end(nobody(), &["standalone", "--output-stdout=json", &listen]);
    println!("{}", ended.said);
    refused(
        &ended,
        &[
            &format!("admin server cannot listen on {address}"),
            "Address already in use",
            "choose another address",
        ],
    );
    assert_eq!(
        ended.said.matches("Address already in use").count(),
        1,
        "{}",
        ended.said
    );
}

#[test]
#[ignore = "native: needs root"]
fn a_second_agent_on_the_same_queue_is_refused_by_name() {
    let directory = directory();
    let dataway = "--dataway=http://127.0.0.1:9?token=tkn_secret";
    let first = Agent::start(Rights::Own, directory.path(), &[dataway]);
    let ended = run(Rights::Own, &standalone(&directory.path().join("queue"), &[dataway]));
    println!("{}", ended.said);
    refused(&ended, &["queue", "another process"]);
    drop(first);
}
