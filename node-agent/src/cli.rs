//! The command line: subcommands, and one flag per option of the table in crate `api`.

use std::path::PathBuf;

use api::{AgentConfig, ConfigBuilder, ConfigErrors, Kind, Source, options};
use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource, value_parser};

/// Where the standalone file is looked for when `--config` is not given.
const CONFIG: &str = "config";
/// Programs to treat as refused by the kernel.
const REFUSE: &str = "refuse_programs";

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Collect and stream to an aggregator.
    Run(Box<AgentConfig>, Vec<String>),
    /// Collect and deliver from this process.
    Standalone(Box<AgentConfig>, Vec<String>),
    /// Say what can be seen here.
    Doctor {
        /// Options.
        config: Box<AgentConfig>,
        /// Programs to treat as refused.
        refuse: Vec<String>,
        /// As JSON.
        json: bool,
    },
}

/// Reads the command line, environment and file.
///
/// # Errors
/// All refused options at once.
pub fn parse() -> Result<Action, ConfigErrors> {
    parse_from(command().get_matches())
}

fn parse_from(matches: ArgMatches) -> Result<Action, ConfigErrors> {
    let Some((name, matches)) = matches.subcommand() else {
        // clap demands a subcommand before this is reached.
        return Err(ConfigErrors(Vec::new()));
    };
    let config = Box::new(build(matches)?);
    let refuse = matches
        .get_many::<String>(REFUSE)
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    Ok(match name {
        "standalone" => Action::Standalone(config, refuse),
        "doctor" => Action::Doctor {
            config,
            refuse,
            json: matches.get_flag("json"),
        },
        _ => Action::Run(config, refuse),
    })
}

fn build(matches: &ArgMatches) -> Result<AgentConfig, ConfigErrors> {
    let mut builder = ConfigBuilder::new();
    if let Some(file) = matches.get_one::<PathBuf>(CONFIG) {
        builder.toml_file(file);
    }
    builder.process_env();
    for spec in options().iter().filter(|spec| spec.flag.is_some()) {
        if matches.value_source(spec.key) == Some(ValueSource::CommandLine) {
            for value in matches.get_many::<String>(spec.key).into_iter().flatten() {
                builder.set(spec.key, Source::Flag, value);
            }
        }
    }
    builder.build()
}

fn command() -> Command {
    Command::new("node-agent")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Collects connections and exchanges of one node with eBPF")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(with_options(
            Command::new("run").about("Collect, and stream records to an aggregator (--aggregator)"),
        ))
        .subcommand(with_options(Command::new("standalone").about(
            "Collect and deliver from this one process: agent and aggregator together",
        )))
        .subcommand(
            with_options(
                Command::new("doctor")
                    .about("Say what this kernel and these privileges let the agent see, and why not"),
            )
            .arg(
                Arg::new("json")
                    .long("json")
                    .action(ArgAction::SetTrue)
                    .help("Print JSON"),
            ),
        )
}

fn with_options(mut command: Command) -> Command {
    command = command
        .arg(
            Arg::new(CONFIG)
                .long(CONFIG)
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("TOML file with the same option names, below [[inputs.ebpf]] or at the top level"),
        )
        .arg(
            Arg::new(REFUSE)
                .long("refuse-program")
                .value_name("NAME")
                .action(ArgAction::Append)
                .help("Treat this kernel program as refused by the kernel, to try out how the agent degrades"),
        );
    for spec in options() {
        let Some(flag) = spec.flag else { continue };
        let variable = spec.env.map(|env| format!(" [env: {env}]")).unwrap_or_default();
        let default = spec
            .default
            .filter(|text| !text.is_empty())
            .map(|text| format!(" [default: {text}]"));
        let help = format!(
            "{} Accepts {}{}{variable}",
            spec.doc,
            spec.accepts,
            default.unwrap_or_default()
        );
        let arg = Arg::new(spec.key).long(flag).help(help).action(ArgAction::Append);
        command = command.arg(match spec.kind {
            Kind::Switch => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .value_name("BOOL"),
            Kind::Value | Kind::List | Kind::Map => arg.value_name("VALUE"),
        });
    }
    command
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn flags_of_the_table_reach_the_configuration() {
        command().debug_assert();
        let matches = command()
            .try_get_matches_from([
                "node-agent",
                "standalone",
                "--interval",
                "2s",
                "--loopback",
                "--output-stdout",
                "json",
            ])
            .unwrap();
        let Action::Standalone(config, _) = parse_from(matches).unwrap() else {
            panic!("not standalone")
        };
        assert_eq!(config.interval.as_secs(), 2);
        assert!(config.net.loopback);
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let matches = command()
            .try_get_matches_from(["node-agent", "run", "--interval", "soon"])
            .unwrap();
        let errors = parse_from(matches).unwrap_err().to_string();
        assert!(errors.contains("interval") && errors.contains("soon"), "{errors}");
    }
}
