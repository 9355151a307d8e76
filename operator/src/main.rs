//! The operator as a process: only its head, as the loop that applies the library's decisions is not in this build.

fn main() -> std::process::ExitCode {
    eprintln!("operator: watching EbpfCollector objects is not in this build");
    std::process::ExitCode::FAILURE
}
