//! `cargo xtask vm`: a program, alone, on a real kernel in QEMU.
//!
//! ```text
//! --kernel ▶ kernel (Debian package, cached) ─┐
//! program, files, modules ▶ initramfs ────────┴▶ qemu ▶ console log, exit code, files of /out
//! ```
//! Everything of one machine lands in `target/vm/`: `<kernel>.log` is its console, `<kernel>/` holds the files that the
//! program wrote to `/out`. To add a kernel line, add it to [`kernel::LINES`]; any other version is reached with
//! `--kernel VERSION` (a prefix of a Debian kernel release) or `--kernel PATH` (a kernel image).

mod debian;
mod initramfs;
mod kernel;
mod modules;
mod qemu;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::project;
use kernel::Kernel;
use qemu::Ending;

/// Exit codes for machines that gave no answer, as `timeout(1)` has them.
const TIMED_OUT: u8 = 124;
const NO_ANSWER: u8 = 125;

/// Arguments of `cargo xtask vm`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernel line (5.10, 6.1, 6.12, 7.3), any other Debian kernel version, or the path of a kernel image. Repeatable;
    /// all lines when left out.
    #[arg(long = "kernel", value_name = "VERSION|PATH")]
    kernels: Vec<String>,
    /// Show the kernel lines and what is cached of them, and end.
    #[arg(long)]
    list: bool,
    /// Download the kernels that are missing, and end.
    #[arg(long)]
    fetch: bool,
    /// Ask the mirror for newer packages even if the cached ones are recent.
    #[arg(long)]
    update: bool,
    /// Seconds until a machine is ended.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
    /// Memory of the machine.
    #[arg(long = "mem", default_value_t = 1024, value_name = "MIB")]
    memory: u32,
    /// Processors of the machine.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Put a file of the host into the machine. Repeatable.
    #[arg(long = "file", value_name = "HOST:GUEST")]
    files: Vec<String>,
    /// Put a program of the host and the libraries it needs into the machine's /bin. Repeatable.
    #[arg(long = "tool", value_name = "NAME|PATH")]
    tools: Vec<String>,
    /// Load a kernel module besides the usual ones. Repeatable.
    #[arg(long = "module", value_name = "NAME")]
    modules: Vec<String>,
    /// Set a variable in the program's environment. Repeatable.
    #[arg(long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Do not show the console, only keep it.
    #[arg(long, short)]
    quiet: bool,
    /// The program and its arguments. The first word is a path on the host.
    #[arg(last = true, value_name = "PROGRAM")]
    command: Vec<String>,
}

/// What a machine has to do; the same for every kernel.
pub(crate) struct Job {
    /// Program (a path on the host) and arguments.
    pub(crate) command: Vec<String>,
    /// `NAME=VALUE` pairs.
    pub(crate) environment: Vec<String>,
    /// Files of the host and their absolute paths in the machine.
    pub(crate) files: Vec<(PathBuf, String)>,
    /// Programs of the host, by name or path.
    pub(crate) tools: Vec<String>,
    /// Modules to load besides [`modules::USUAL`].
    pub(crate) modules: Vec<String>,
    /// Memory in MiB.
    pub(crate) memory: u32,
    /// Number of virtual processors.
    pub(crate) cpus: u32,
    /// When to give up.
    pub(crate) timeout: Duration,
    /// Keep the console to the log.
    pub(crate) quiet: bool,
}

/// How one machine went.
pub(crate) struct Outcome {
    /// How it ended.
    pub(crate) ending: Ending,
    /// From starting QEMU to the program's start, if it came that far.
    pub(crate) boot: Option<Duration>,
    /// From starting QEMU to its end.
    pub(crate) total: Duration,
    /// The console.
    pub(crate) log: PathBuf,
    /// Directory with the files that the program left in `/out`.
    pub(crate) files: PathBuf,
}

/// Runs one job on one kernel.
pub(crate) fn run(kernel: &Kernel, job: &Job) -> Result<Outcome> {
    let directory = project::target_dir()?.join("vm");
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    // Machines of one name share their log and result files: a second one waits for its turn.
    let lock = File::create(directory.join(format!("{}.lock", kernel.name))).context("creating the lock file")?;
    lock.lock().context("waiting for another run on this kernel")?;
    let image = directory.join(format!("{}.cpio", kernel.name));
    let outcome = initramfs::write(&image, kernel, job)
        .context("writing the initramfs")
        .and_then(|()| qemu::boot(kernel, &image, job, &directory));
    let _ = fs::remove_file(&image);
    outcome.with_context(|| format!("kernel {}", kernel.name))
}

/// Entry of the chore.
pub(crate) fn main(arguments: &Args) -> Result<ExitCode> {
    if arguments.list {
        kernel::list()?;
        return Ok(ExitCode::SUCCESS);
    }
    let wanted: Vec<String> = if arguments.kernels.is_empty() {
        kernel::LINES.iter().map(|line| (*line).to_owned()).collect()
    } else {
        arguments.kernels.clone()
    };
    let kernels = kernel::resolve(&wanted, arguments.update)?;
    if arguments.fetch {
        return Ok(ExitCode::SUCCESS);
    }
    let job = job(arguments)?;
    let mut code = 0;
    let mut table = Vec::new();
    for kernel in &kernels {
        let outcome = run(kernel, &job)?;
        if code == 0 {
            code = exit_code(&outcome.ending);
        }
        let boot = outcome
            .boot
            .map_or("-".to_owned(), |boot| format!("{:.1} s", boot.as_secs_f64()));
        table.push(format!(
            "{:<8} {:<32} {:>8} {:>8.1} s  {}",
            kernel.name,
            kernel.release,
            boot,
            outcome.total.as_secs_f64(),
            outcome.ending
        ));
        if !matches!(outcome.ending, Ending::Exit(0)) {
            table.push(format!("         console: {}", outcome.log.display()));
        }
        if outcome.files.exists() {
            table.push(format!("         files of /out: {}", outcome.files.display()));
        }
    }
    println!(
        "{:<8} {:<32} {:>8} {:>10}  result",
        "kernel", "release", "boot", "total"
    );
    for line in table {
        println!("{line}");
    }
    Ok(ExitCode::from(code))
}

fn exit_code(ending: &Ending) -> u8 {
    match ending {
        Ending::Exit(code) => u8::try_from(*code).unwrap_or(NO_ANSWER),
        Ending::TimedOut => TIMED_OUT,
        Ending::Panicked(_) | Ending::Died => NO_ANSWER,
    }
}

fn job(arguments: &Args) -> Result<Job> {
    if arguments.command.is_empty() {
        bail!("no program given: cargo xtask vm --kernel 6.1 -- PROGRAM ARGUMENTS");
    }
    let files = arguments
        .files
        .iter()
        .map(|pair| match pair.rsplit_once(':') {
            Some((host, guest)) if guest.starts_with('/') => Ok((PathBuf::from(host), guest.to_owned())),
            _ => bail!("--file {pair}: expected HOST:GUEST with an absolute path in the machine"),
        })
        .collect::<Result<_>>()?;
    if let Some(pair) = arguments.environment.iter().find(|pair| !pair.contains('=')) {
        bail!("--env {pair}: expected NAME=VALUE");
    }
    Ok(Job {
        command: arguments.command.clone(),
        environment: arguments.environment.clone(),
        files,
        tools: arguments.tools.clone(),
        modules: arguments.modules.clone(),
        memory: arguments.memory,
        cpus: arguments.cpus,
        timeout: Duration::from_secs(arguments.timeout),
        quiet: arguments.quiet,
    })
}
