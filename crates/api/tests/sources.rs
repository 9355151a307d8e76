//! Files, environment and flags: precedence, forms, and what is refused with which words.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
    path::Path,
    time::Duration,
};

use ec_api::{AgentConfig, Bytes, ConfigBuilder, ConfigErrors, L7Flow, Plugin, Source};

fn file(text: &str) -> Result<AgentConfig, ConfigErrors> {
    ConfigBuilder::new().toml_str("ebpf.conf", text).build()
}

fn env(vars: &[(&str, &str)]) -> Result<AgentConfig, ConfigErrors> {
    ConfigBuilder::new().env(vars.iter().copied()).build()
}

fn flags(flags: &[(&str, &str)]) -> Result<AgentConfig, ConfigErrors> {
    let mut builder = ConfigBuilder::new();
    for (key, value) in flags {
        builder.set(key, Source::Flag, *value);
    }
    builder.build()
}

/// The one error of `result`, which must hold all `words`.
#[track_caller]
fn refused(result: Result<AgentConfig, ConfigErrors>, words: &[&str]) {
    let errors = result.expect_err("refused");
    assert_eq!(errors.0.len(), 1, "{errors}");
    let text = errors.0[0].to_string();
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

#[test]
fn flag_over_environment_over_object_over_file_over_default() {
    let object = ec_api::collector::EbpfCollectorSpec {
        interval: Some("15s".into()),
        ..Default::default()
    };
    let seconds = |sources: &[Source]| {
        let mut builder = ConfigBuilder::new();
        for source in sources {
            match source {
                Source::Default => {}
                Source::File => drop(builder.toml_str("f", "interval = '10s'")),
                Source::Object => drop(builder.object(object.agent_options())),
                Source::Env => drop(builder.env([("ENV_INPUT_EBPF_INTERVAL", "20s")])),
                Source::Flag => drop(builder.set("interval", Source::Flag, "30s")),
            }
        }
        builder.build().unwrap().interval.as_secs()
    };
    use Source::{Env, File, Flag, Object};
    assert_eq!(seconds(&[]), 60);
    assert_eq!(seconds(&[File]), 10);
    assert_eq!(seconds(&[Object, File]), 15);
    assert_eq!(seconds(&[Env, Object, File]), 20);
    assert_eq!(seconds(&[Env, File]), 20);
    assert_eq!(seconds(&[Flag, Env, File]), 30);
    assert_eq!(seconds(&[File, Flag]), 30);
}

#[test]
fn a_value_that_is_overridden_is_not_judged() {
    let mut builder = ConfigBuilder::new();
    builder
        .toml_str("f", "interval = 'never'")
        .set("interval", Source::Flag, "5s");
    assert_eq!(builder.build().unwrap().interval.as_secs(), 5);
}

#[test]
fn all_forms_of_the_file() {
    let want = Duration::from_secs(90);
    for text in [
        "[[inputs.ebpf]]\ninterval = '1m30s'",
        "[inputs.ebpf]\ninterval = '1m30s'",
        "interval = '1m30s'",
        "tags = { zone = 'a' }\n[[inputs.ebpf]]\ninterval = '1m30s'",
    ] {
        assert_eq!(file(text).unwrap().interval, want, "{text}");
    }
    let config = file(
        "[[inputs.ebpf]]\nsampling_rate = 0.5\npprof_port = '6061'\nephemeral_port = 32768\nipv6_disabled = true\n\
         loopback = '1'\nmem_limit = '4GiB'\nnet_limit = '100MiB/s'\nenabled_plugins = 'ebpf-net,ebpf-bash'\n\
         l7net_enabled = []\n[inputs.ebpf.tags]\nzone = 'a,b=c'\nrack = 7",
    )
    .unwrap();
    assert_eq!(config.sampling.rate, Some(0.5));
    assert_eq!(config.net.ephemeral_port, 32768);
    assert!(config.net.ipv6_disabled && config.net.loopback && config.net.l7.is_empty());
    assert_eq!(
        (config.limits.mem, config.limits.net),
        (Some(Bytes(4 << 30)), Some(Bytes(100 << 20)))
    );
    assert_eq!(
        config.plugins.into_iter().collect::<Vec<_>>(),
        [Plugin::EbpfNet, Plugin::EbpfBash]
    );
    assert_eq!(config.tags["zone"], "a,b=c");
    assert_eq!(config.tags["rack"], "7");
}

#[test]
fn all_forms_of_flags_and_environment() {
    let config = flags(&[
        ("tags", "zone=a"),
        ("tags", "rack=7;row=1"),
        ("enabled_plugins", "ebpf-net"),
        ("enabled_plugins", "ebpf-bash,ebpf-conntrack"),
        ("trace_server", ""),
    ])
    .unwrap();
    assert_eq!(config.tags.len(), 3);
    assert_eq!(config.plugins.len(), 3);
    assert!(config.plugins_not_built().is_empty());
    let config = env(&[
        ("ENV_INPUT_EBPF_TAGS", "zone=a,rack=7"),
        ("ENV_INPUT_EBPF_INTERVAL", ""),
        ("ENV_NETLOG_LOG", "TRUE"),
        ("HOST_ROOT", "/rootfs"),
        ("ENV_HOSTNAME", "general"),
        ("ENV_INPUT_EBPF_HOSTNAME", "ours"),
        ("ENV_INPUT_EBPFTRACE_WINDOW", "20s"),
        ("ENV_INPUT_CPU", "x"),
    ])
    .unwrap();
    assert_eq!(config.tags.len(), 2);
    assert_eq!(config.interval.as_secs(), 60, "an empty variable is not set");
    assert!(config.netlog.log);
    assert_eq!(config.identity.proc_dir(), Path::new("/rootfs/proc"));
    assert_eq!(config.identity.hostname.as_deref(), Some("ours"));
    let disabled = flags(&[("l7net_disabled", "httpflow")]).unwrap();
    assert_eq!(disabled.net.l7.into_iter().collect::<Vec<_>>(), [L7Flow::HttpTls]);
}

#[test]
fn bad_values_name_option_value_source_and_what_is_accepted() {
    refused(
        file("interval = 60"),
        &[
            "interval = \"60\"",
            "(file ebpf.conf)",
            "no unit",
            "accepted",
            "1s to 1h",
        ],
    );
    refused(
        env(&[("ENV_INPUT_EBPF_INTERVAL", "2h")]),
        &[
            "interval = \"2h\"",
            "environment variable ENV_INPUT_EBPF_INTERVAL",
            "more than 1h",
        ],
    );
    refused(
        flags(&[("interval", "soon")]),
        &["interval = \"soon\"", "(flag --interval)", "not a duration"],
    );
    for (key, value, why) in [
        ("sampling_rate", "0", "less than 0.01"),
        ("sampling_rate", "1.5", "more than 1"),
        ("sampling_rate_pts_per_min", "0", "less than 1"),
        ("ephemeral_port", "65536", "more than 65535"),
        ("ephemeral_port", "-1", "less than 0"),
        ("ipv6_disabled", "maybe", "neither true nor false"),
        ("enabled_plugins", "ebpf-nat", "`ebpf-nat` is not one of ebpf-net"),
        ("enabled_plugins", "", "none is named"),
        ("enabled_plugins", "none,ebpf-net", "`none` is not one of ebpf-net"),
        ("l7net_enabled", "http", "`http` is not one of httpflow"),
        ("cpu_limit", "two", "decimal"),
        ("mem_limit", "4", "no unit"),
        ("net_limit", "100Mbit", "`Mbit` is not a unit"),
        ("tags", "zone", "not key=value"),
        ("tags", "a b=c", "not well-formed"),
        ("tags", "host=c", "option hostname"),
        ("tags", "a=", "0 bytes"),
        ("tags", "a=x\\", "back-slash"),
        ("aggregator", "agg:4317", "scheme"),
        ("admin_listen", "localhost", "invalid socket address"),
        ("trace_server", "10.0.0.1", "no port"),
        ("output_stdout", "yaml", "not one of off, json"),
        ("ring_buffer_size", "3MiB", "power of two"),
        ("queue_max_size", "1MiB", "less than 16MiB"),
        ("queue_max_age", "1s", "less than 1m"),
        ("queue_dir", " ", "empty"),
    ] {
        refused(flags(&[(key, value)]), &[key, why, "accepted"]);
    }
}

#[test]
fn wrong_types_in_the_file_are_refused() {
    refused(file("interval = ['1s']"), &["interval", "list", "one value is wanted"]);
    refused(file("enabled_plugins = { a = 1 }"), &["enabled_plugins", "table"]);
    refused(file("tags = ['a=b']"), &["tags", "list"]);
    refused(file("tags = { a = { b = 1 } }"), &["tags", "table"]);
    refused(file("inputs = 1"), &["inputs"]);
    refused(file("[inputs]\nebpf = 1"), &["inputs.ebpf"]);
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    refused(
        file("intervall = '1s'"),
        &["intervall", "did you mean interval?", "file ebpf.conf"],
    );
    refused(
        file("[[inputs.ebpf]]\nflux_capacitor = 1"),
        &["flux_capacitor", "no known option"],
    );
    refused(file("[[inputs.cpu]]\na = 1"), &["inputs.cpu", "[[inputs.ebpf]]"]);
    refused(
        env(&[("ENV_INPUT_EBPF_SAMPLING_RATE_PTS_PER_MIN", "5")]),
        &["did you mean ENV_INPUT_EBPF_SAMPLING_RATE_PTSPERMIN?"],
    );
    refused(flags(&[("tag", "a=b")]), &["tag", "did you mean tags?"]);
    refused(
        ConfigBuilder::new()
            .env([(
                OsString::from("ENV_INPUT_EBPF_INTERVAL"),
                OsString::from(OsStr::from_bytes(b"\xff")),
            )])
            .build(),
        &["interval", "UTF-8"],
    );
}

#[test]
fn given_twice_is_refused() {
    refused(
        file("interval = '1s'\n[[inputs.ebpf]]\ninterval = '2s'"),
        &["interval", "twice"],
    );
    refused(file("[[inputs.ebpf]]\n[[inputs.ebpf]]"), &["inputs.ebpf", "2 times"]);
    refused(flags(&[("interval", "1s"), ("interval", "2s")]), &["interval", "twice"]);
    refused(
        flags(&[("tags", "a=1"), ("tags", "a=2")]),
        &["tags", "`a` is given twice"],
    );
}

#[test]
fn contradictions_are_refused() {
    let trace = ("enabled_plugins", "ebpf-net,ebpf-trace");
    let server = ("trace_server", "10.0.0.1:9529");
    for (given, words) in [
        (
            vec![("sampling_rate", "0.5"), ("sampling_rate_pts_per_min", "9")],
            vec!["sampling_rate_pts_per_min", "exclude"],
        ),
        (
            vec![("l7net_enabled", "httpflow"), ("l7net_disabled", "httpflow")],
            vec!["l7net_disabled", "exclude"],
        ),
        (
            vec![("bearer_token", "/x"), ("bearer_token_string", "x")],
            vec!["bearer_token", "exclude"],
        ),
        (
            vec![("aggregator", "https://a"), ("dataway", "https://h?token=x")],
            vec!["aggregator, dataway"],
        ),
        (
            vec![("enabled_plugins", "ebpf-trace"), server],
            vec!["together with ebpf-net"],
        ),
        (
            vec![trace, server, ("l7net_enabled", "httpflow-tls")],
            vec!["l7net_enabled", "httpflow"],
        ),
        (vec![trace], vec!["trace_server", "nowhere"]),
        (
            vec![("enabled_plugins", "bpf-netlog"), ("netlog_metric", "false")],
            vec!["netlog_metric", "neither"],
        ),
        (vec![("tls_cert", "/c")], vec!["tls_cert", "without the other"]),
        (vec![("tls_key", "/c")], vec!["tls_key", "without the other"]),
        (
            vec![("aggregator", "http://127.0.0.1:1"), ("tls_ca", "/c")],
            vec!["tls_ca", "https://"],
        ),
        (
            vec![("aggregator", "http://10.0.0.1:1")],
            vec!["aggregator", "allow_plaintext"],
        ),
        (vec![("dataway", "https://h")], vec!["dataway", "no token"]),
        (vec![("dataway_token_file", "/t")], vec!["dataway_token_file"]),
        (
            vec![("dataway_token_file", "/t"), ("dataway", "https://h?token=x")],
            vec!["of its own"],
        ),
    ] {
        refused(flags(&given), &words);
    }
    for given in [
        vec![trace, server],
        vec![("aggregator", "http://10.0.0.1:1"), ("allow_plaintext", "true")],
        vec![("aggregator", "http://[::1]:1")],
        vec![
            ("aggregator", "https://a"),
            ("tls_ca", "/a"),
            ("tls_cert", "/c"),
            ("tls_key", "/k"),
        ],
        vec![("dataway", "https://h,https://g?token=x"), ("dataway_token_file", "/t")],
    ] {
        flags(&given).unwrap_or_else(|errors| panic!("{given:?}: {errors}"));
    }
}

#[test]
fn all_errors_at_once_and_no_follow_up_errors() {
    let mut builder = ConfigBuilder::new();
    builder
        .toml_file(Path::new("/nonexistent/ebpf.conf"))
        .toml_str("f", "interval = 'x'\ncolour = 'red'")
        .env([("ENV_INPUT_EBPF_EPHEMERAL_PORT", "x")])
        .set("enabled_plugins", Source::Flag, "ebpf-net,ebpf-trace")
        .set("trace_server", Source::Flag, "nowhere");
    let errors = builder.build().unwrap_err();
    let options: Vec<&str> = errors.0.iter().map(|error| error.option.as_str()).collect();
    assert_eq!(
        options,
        [
            "configuration file",
            "colour",
            "interval",
            "ephemeral_port",
            "trace_server"
        ]
    );
    let text = errors.to_string();
    assert!(text.starts_with("5 problems with the options:\n"), "{text}");
    assert!(text.contains("/nonexistent/ebpf.conf"), "{text}");
    assert_eq!(ec_api::EXIT_USAGE, 64);
}

#[test]
fn no_error_or_dump_shows_a_secret() {
    let secret = "tkn_S3CRET";
    let url = format!("https://h/?token={secret}");
    let broken = format!("interval = '1s'\ndataway = ['{url}\n");
    let errors = file(&broken).unwrap_err();
    assert!(errors.to_string().contains("line 2"), "{errors}");
    assert!(!errors.to_string().contains(secret), "{errors}");
    for bad in [
        format!("ftp://h/?token={secret}"),
        format!("https://h/?token={secret}!"),
        secret.to_owned(),
    ] {
        let errors = flags(&[("dataway", &bad)]).unwrap_err();
        assert!(!format!("{errors} {errors:?}").contains(secret), "{errors}");
    }
    let errors = flags(&[("aggregator", &url), ("trace_server", &url), ("tags", &url)]).unwrap_err();
    assert_eq!(errors.0.len(), 3, "{errors}");
    assert!(
        !errors.to_string().contains(secret) && errors.to_string().contains("https://h/?token=***"),
        "{errors}"
    );
    let config = flags(&[("dataway", &url), ("bearer_token_string", secret)]).unwrap();
    assert!(!format!("{config:?}{}", config.to_toml()).contains(secret));
    assert_eq!(config.outputs.dataway[0].expose().expose(), url);
}

#[test]
fn token_file_completes_the_servers_without_a_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let config = flags(&[
        ("dataway", "https://h/,https://g/?token=own"),
        ("dataway_token_file", path.to_str().unwrap()),
    ])
    .unwrap();
    let missing = config.outputs.dataway_with_tokens().unwrap_err();
    assert!(missing.to_string().contains("cannot be read"), "{missing}");
    fs::write(&path, "tkn_1\n").unwrap();
    let tokens: Vec<String> = config
        .outputs
        .dataway_with_tokens()
        .unwrap()
        .iter()
        .map(|server| server.token().unwrap().expose().to_owned())
        .collect();
    assert_eq!(tokens, ["tkn_1", "own"]);
    fs::write(&path, "  \n").unwrap();
    assert!(
        config
            .outputs
            .dataway_with_tokens()
            .unwrap_err()
            .to_string()
            .contains("empty")
    );
    fs::write(&path, "tkn 2").unwrap();
    let bad = config.outputs.dataway_with_tokens().unwrap_err().to_string();
    assert!(bad.contains("characters") && !bad.contains("tkn 2"), "{bad}");
}

#[test]
fn options_without_effect_are_told() {
    let config = flags(&[("mem_limit", "4GiB"), ("pprof_port", "6061")]).unwrap();
    assert_eq!(config.warnings.len(), 2, "{:?}", config.warnings);
    assert!(
        config.warnings[0].starts_with("mem_limit (flag --mem-limit) has no effect: "),
        "{:?}",
        config.warnings
    );
    let config = flags(&[("output_format", "table")]).unwrap();
    assert!(
        config.warnings[0].contains("output_file is not set"),
        "{:?}",
        config.warnings
    );
    assert_eq!(flags(&[("interval", "1s")]).unwrap().warnings, Vec::<String>::new());
    let alone = flags(&[("enabled_plugins", "ebpf-bash,ebpf-conntrack")]).unwrap();
    assert!(
        alone.warnings.len() == 1 && alone.warnings[0].contains("ebpf-conntrack has no effect"),
        "{:?}",
        alone.warnings
    );
}
