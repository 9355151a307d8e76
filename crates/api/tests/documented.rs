//! Everything the collector's document names is here, under the same names. The lists in `data/` are taken from it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{collections::BTreeSet, time::Duration};

use ec_api::{AgentConfig, ConfigBuilder, Kind, Origin, Source, options};

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.starts_with('#'))
}

#[test]
fn every_documented_variable_and_example_is_accepted() {
    let rows: Vec<Vec<&str>> = lines(include_str!("data/documented_env.txt"))
        .map(|line| line.split('\t').collect())
        .collect();
    assert_eq!(rows.len(), 22);
    for row in rows {
        let (key, env, example) = (row[0], row[1], row[2].replace("<ip>:<port>", "10.0.0.1:9529"));
        let spec = options()
            .iter()
            .find(|spec| spec.key == key)
            .unwrap_or_else(|| panic!("no option {key}"));
        assert_eq!(spec.env, Some(env), "{key}");
        assert_eq!(spec.origin, Origin::Documented, "{key}");
        let mut vars = vec![(env, example.as_str())];
        if example.contains("ebpf-trace") {
            vars.push(("ENV_INPUT_EBPF_TRACE_SERVER", "10.0.0.1:9529"));
        }
        ConfigBuilder::new()
            .env(vars)
            .build()
            .unwrap_or_else(|errors| panic!("{env}={example}: {errors}"));
    }
}

#[test]
fn every_documented_key_and_flag_is_known() {
    let keys: BTreeSet<&str> = options().iter().map(|spec| spec.key).collect();
    let documented: Vec<&str> = lines(include_str!("data/documented_keys.txt")).collect();
    assert_eq!(documented.len(), 31);
    for key in documented {
        assert!(keys.contains(key), "{key}");
    }
    let flags: Vec<&str> = lines(include_str!("data/documented_flags.txt")).collect();
    assert_eq!(flags.len(), 5);
    for flag in flags {
        assert!(options().iter().any(|spec| spec.flag == Some(flag)), "{flag}");
    }
}

#[test]
fn documented_sample_is_the_default() {
    let config = ConfigBuilder::new()
        .toml_str("sample", include_str!("data/documented.conf"))
        .build()
        .unwrap();
    let warned: Vec<&str> = config.warnings.iter().map(|w| w.split(' ').next().unwrap()).collect();
    assert_eq!(
        warned,
        [
            "netlog_metric",
            "netlog_log",
            "pprof_host",
            "pprof_port",
            "datakit_apiserver",
            "daemon",
            "name",
            "cmd",
            "args",
            "envs"
        ]
    );
    assert_eq!(
        (config.pprof.host.as_deref(), config.pprof.port),
        (Some("127.0.0.1"), Some(6061))
    );
    let mut sample = config;
    let default = AgentConfig::default();
    sample.warnings.clear();
    sample.pprof = default.pprof.clone();
    assert_eq!(sample, default);
    assert_eq!(default.interval, Duration::from_secs(60));
    assert_eq!(default.net.ephemeral_port, 10001);
    assert_eq!(default, ConfigBuilder::new().build().unwrap());
}

#[test]
fn launcher_arguments_that_are_options_count() {
    let text = r#"
        [[inputs.ebpf]]
        args = ["--datakit-apiserver", "0.0.0.0:9529", "--hostname", "node-7", "--log-level=debug", "--other", "x"]
    "#;
    let config = ConfigBuilder::new().toml_str("f", text).build().unwrap();
    assert_eq!(config.identity.hostname.as_deref(), Some("node-7"));
    assert_eq!(config.log.level, "debug");
    let config = ConfigBuilder::new()
        .toml_str("f", text)
        .set("hostname", Source::Flag, "x")
        .build()
        .unwrap();
    assert_eq!(config.identity.hostname.as_deref(), Some("x"));
    let errors = ConfigBuilder::new()
        .toml_str("f", &format!("{text}\nhostname = 'y'"))
        .build()
        .unwrap_err();
    assert_eq!(errors.0.len(), 1, "{errors}");
    let errors = ConfigBuilder::new()
        .toml_str("f", "args = ['--interval']")
        .build()
        .unwrap_err();
    assert!(
        errors
            .to_string()
            .contains("interval = \"\" (file f, args): it is empty"),
        "{errors}"
    );
}

#[test]
fn tags_named_like_any_documented_tag_or_field_are_refused() {
    let keys: Vec<&str> = lines(include_str!("data/record_keys.txt")).collect();
    assert!(keys.len() > 90);
    for key in keys {
        let error = ConfigBuilder::new()
            .set("tags", Source::Flag, format!("{key}=x"))
            .build()
            .unwrap_err();
        assert!(error.to_string().contains(key), "{key}: {error}");
    }
    let config = ConfigBuilder::new()
        .set("tags", Source::Flag, "project=shop")
        .build()
        .unwrap();
    assert_eq!(config.tags["project"], "shop");
}

#[test]
fn names_are_regular_and_unique() {
    let mut names = BTreeSet::new();
    for spec in options() {
        assert!(names.insert(spec.key), "{} twice", spec.key);
        if spec.origin == Origin::OldLauncher {
            assert_eq!((spec.env, spec.flag), (None, None));
            continue;
        }
        let (env, flag) = (spec.env.unwrap(), spec.flag.unwrap());
        assert_eq!(flag, spec.key.replace('_', "-"));
        if spec.key != "sampling_rate_pts_per_min" {
            assert_eq!(env, format!("ENV_INPUT_EBPF_{}", spec.key.to_uppercase()));
        }
        for name in spec.env_aliases.iter().copied().chain([env]) {
            assert!(names.insert(name), "{name} twice");
        }
        assert!(
            !spec.doc.is_empty() && spec.doc.ends_with('.') && !spec.accepts.is_empty(),
            "{}",
            spec.key
        );
        assert_eq!(
            spec.kind == Kind::Switch,
            spec.accepts.starts_with("true or false"),
            "{}",
            spec.key
        );
    }
}
