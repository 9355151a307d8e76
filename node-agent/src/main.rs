//! `node-agent`: reads the options, does what was asked, says on one line why it could not.

use std::process::ExitCode;

use node_agent::{
    agent::{self, Mode},
    cli::{self, Action, Refused},
    doctor,
};

fn main() -> ExitCode {
    let action = match cli::parse() {
        Ok(action) => action,
        Err(Refused::Words(words)) => {
            let _ = words.print();
            // Help and version are no faults.
            return if words.use_stderr() { usage() } else { ExitCode::SUCCESS };
        }
        Err(Refused::Options(errors)) => {
            eprintln!("{errors}");
            return usage();
        }
    };
    let done = match action {
        Action::Run {
            config,
            sources,
            refuse,
        } => agent::run(*config, refuse, Mode::Agent(sources)),
        Action::Standalone(config, refuse) => agent::run(*config, refuse, Mode::Standalone),
        Action::Doctor {
            config,
            refuse,
            json,
            blind,
        } => {
            let done = if blind {
                doctor::blind(&config, &refuse, json)
            } else {
                doctor::run(&config, refuse, json)
            };
            return match done {
                Ok(true) => ExitCode::SUCCESS,
                // Something is off or degraded: not a failure of the command, but scripts can tell.
                Ok(false) => ExitCode::from(2),
                Err(error) => fail(&error),
            };
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("node-agent: {}", agent::one_line(error));
    if error.chain().any(|cause| cause.is::<api::ConfigErrors>()) {
        usage()
    } else {
        ExitCode::FAILURE
    }
}

fn usage() -> ExitCode {
    ExitCode::from(api::EXIT_USAGE)
}
