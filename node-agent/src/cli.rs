//! The command line: subcommands, and one flag per option of the table in crate `api`.

use std::path::PathBuf;

use api::{AgentConfig, ConfigBuilder, ConfigError, ConfigErrors, Kind, Plugin, Source, StdoutFormat, options};
use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource, value_parser};

/// Where the standalone file is looked for when `--config` is not given.
const CONFIG: &str = "config";
/// Programs to treat as refused by the kernel.
const REFUSE: &str = "refuse_programs";
/// What `doctor` is asked about.
const ABOUT: &str = "about";

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Collect and stream to an aggregator.
    Run {
        /// Options; with an object, those that it may add to.
        config: Box<AgentConfig>,
        /// What the options are made of, to put an object between.
        sources: Box<ConfigBuilder>,
        /// Programs to treat as refused.
        refuse: Vec<String>,
    },
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
        /// Say whose TLS cannot be read.
        blind: bool,
    },
}

/// Why there is nothing to do.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The words are no command line of ours, or ask for the help or the version.
    #[error(transparent)]
    Words(#[from] clap::Error),
    /// The options cannot be used.
    #[error(transparent)]
    Options(#[from] ConfigErrors),
}

/// Reads the command line, environment and file.
///
/// # Errors
/// All refused options at once.
pub fn parse() -> Result<Action, Refused> {
    parse_from(command().try_get_matches()?)
}

fn parse_from(matches: ArgMatches) -> Result<Action, Refused> {
    let Some((name, matches)) = matches.subcommand() else {
        // clap demands a subcommand before this is reached.
        return Err(ConfigErrors(Vec::new()).into());
    };
    let sources = Box::new(sources(matches));
    let config = Box::new(sources.build()?);
    check(name, &config)?;
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
            blind: matches.get_one::<String>(ABOUT).is_some(),
        },
        _ => Action::Run {
            config,
            sources,
            refuse,
        },
    })
}

fn sources(matches: &ArgMatches) -> ConfigBuilder {
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
    builder
}

/// What is wrong with options that are fine by themselves: with this subcommand, on this machine, in this build.
pub(crate) fn check(subcommand: &str, config: &AgentConfig) -> Result<(), ConfigErrors> {
    let mut problems = Vec::new();
    let mut refuse = |option: &str, value: Option<String>, problem: String, accepted: &str| {
        problems.push(ConfigError {
            option: option.into(),
            value,
            origin: None,
            problem,
            accepted: Some(accepted.into()),
        });
    };
    let (uplink, outputs) = (&config.uplink, &config.outputs);
    match (subcommand, &uplink.aggregator) {
        ("run", None) => refuse(
            "aggregator",
            None,
            "is not set".into(),
            "the URL of the aggregator, or `node-agent standalone`, which needs none",
        ),
        ("standalone", Some(aggregator)) => refuse(
            "aggregator",
            Some(aggregator.to_string()),
            "standalone has an aggregator of its own".into(),
            "no aggregator, or `node-agent run`",
        ),
        _ => {}
    }
    if subcommand == "run" {
        let tls = &uplink.tls;
        let files = [("tls_ca", &tls.ca), ("tls_cert", &tls.cert), ("tls_key", &tls.key)];
        if uplink.aggregator.as_ref().is_some_and(api::Endpoint::is_tls) && files.iter().any(|(_, file)| file.is_none())
        {
            let absent: Vec<&str> = files
                .iter()
                .filter(|(_, f)| f.is_none())
                .map(|(name, _)| *name)
                .collect();
            refuse(
                &absent.join(", "),
                None,
                "not set, and the aggregator's address is https: both ends show a certificate".into(),
                "tls_ca, tls_cert and tls_key together",
            );
        }
        for (option, file) in files {
            if let Some((file, error)) = file.as_ref().and_then(|f| Some((f, std::fs::File::open(f).err()?))) {
                refuse(
                    option,
                    Some(file.display().to_string()),
                    format!("cannot be read: {error}"),
                    "a PEM file that this user can read",
                );
            }
        }
        for (option, set) in [
            ("output_file", outputs.file.is_some()),
            ("output_stdout", outputs.stdout != StdoutFormat::Off),
        ] {
            if set {
                refuse(
                    option,
                    None,
                    "`node-agent run` sends records to the aggregator and writes none".into(),
                    "the option at the aggregator, or `node-agent standalone`",
                );
            }
        }
    }
    let collector = config.kubernetes.collector.as_ref();
    if let ("standalone", Some(collector)) = (subcommand, collector) {
        refuse(
            "collector",
            Some(collector.clone()),
            "standalone is for machines outside a cluster".into(),
            "no collector, or `node-agent run`",
        );
    }
    // With an object, all plugins may be off for a while.
    let collects = [Plugin::EbpfNet, Plugin::EbpfBash, Plugin::BpfNetlog]
        .iter()
        .any(|plugin| config.plugins.contains(plugin));
    if !collects && collector.is_none() {
        let plugins: Vec<String> = config.plugins.iter().map(ToString::to_string).collect();
        refuse(
            "enabled_plugins",
            Some(plugins.join(",")),
            "none of them is in this build, or collects on its own".into(),
            "ebpf-net, ebpf-bash or bpf-netlog, alone or with others",
        );
    }
    let proc = config.identity.proc_dir();
    if let Err(error) = std::fs::metadata(proc.join("stat")) {
        let option = if config.identity.host_proc.is_some() {
            "host_proc"
        } else {
            "host_root"
        };
        refuse(
            option,
            None,
            format!("{} is no /proc: its file stat cannot be seen: {error}", proc.display()),
            "where the host's /proc is mounted",
        );
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ConfigErrors(problems))
    }
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
                Arg::new(ABOUT)
                    .value_name("ABOUT")
                    .value_parser(["blind"])
                    .help("`blind`: list the processes whose TLS cannot be read, with reasons"),
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

    #[test]
    fn what_a_subcommand_cannot_use_is_refused() {
        let refused = |words: &[&str]| match command().try_get_matches_from([&["node-agent"], words].concat()) {
            Ok(matches) => parse_from(matches).unwrap_err().to_string(),
            Err(error) => panic!("{error}"),
        };
        for (words, named) in [
            (&["run"][..], "aggregator: is not set"),
            (
                &[
                    "standalone",
                    "--aggregator",
                    "http://127.0.0.1:1",
                    "--output-stdout",
                    "json",
                ],
                "aggregator = \"http://127.0.0.1:1\": standalone has an aggregator of its own",
            ),
            (
                &["run", "--aggregator", "http://127.0.0.1:1", "--output-stdout", "json"],
                "output_stdout: `node-agent run` sends records to the aggregator",
            ),
            (
                &["run", "--aggregator", "https://127.0.0.1:1", "--tls-ca", "/dev/null"],
                "tls_cert, tls_key: not set",
            ),
            (&["doctor", "--host-proc", "/dev"], "host_proc: /dev is no /proc"),
            (
                &["doctor", "--enabled-plugins", "ebpf-conntrack"],
                "none of them is in this build",
            ),
        ] {
            let errors = refused(words);
            assert!(errors.contains(named), "{words:?}: {errors}");
        }
    }
}
