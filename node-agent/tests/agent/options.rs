//! Options that cannot be used: exit code 64, and every fault named with option, value, origin and what is accepted.

use std::fs;

use crate::process::{Ended, Rights, command, directory, finish, run_to_end};

/// What every refusal is: the usage status, and no word of the token that some of the values hold.
fn refused(ended: &Ended, named: &[&str]) {
    for text in named {
        assert!(ended.said.contains(text), "{text:?} is not in: {}", ended.said);
    }
    assert_eq!(ended.code, Some(64), "{}", ended.said);
    assert!(!ended.said.contains("tkn_secret"), "{}", ended.said);
}

#[test]
fn each_fault_is_named() {
    let out = "--output-stdout=json";
    for (args, named) in [
        // Unknown words.
        (
            &["standalone", "--intervall", "10s"][..],
            &["--intervall", "'--interval'"][..],
        ),
        (&["standalone", "--no-such"], &["--no-such"]),
        (&["collect"], &["unrecognized subcommand 'collect'"]),
        (&[], &["Usage: node-agent <COMMAND>"]),
        // Ill-typed values.
        (
            &["standalone", out, "--interval=soon"],
            &[
                "interval = \"soon\" (flag --interval)",
                "accepted: a duration from 1s to 1h",
            ],
        ),
        (
            &["standalone", out, "--interval=10"],
            &["interval = \"10\"", "it has no unit"],
        ),
        (
            &["standalone", out, "--interval=1ms"],
            &["interval = \"1ms\"", "from 1s to 1h"],
        ),
        (&["standalone", out, "--interval="], &["interval = \"\"", "it is empty"]),
        (
            &["standalone", out, "--loopback=maybe"],
            &["loopback = \"maybe\"", "true or false"],
        ),
        (
            &["standalone", out, "--ephemeral-port=70000"],
            &["ephemeral_port = \"70000\"", "from 0 to 65535"],
        ),
        (
            &["standalone", out, "--queue-max-size=5"],
            &["queue_max_size = \"5\"", "it has no unit", "16MiB to 64TiB"],
        ),
        (
            &["standalone", out, "--queue-max-size=5MiB"],
            &["queue_max_size = \"5MiB\"", "16MiB to 64TiB"],
        ),
        (
            &["standalone", out, "--ring-buffer-size=100KiB"],
            &["ring_buffer_size = \"100KiB\"", "power of two"],
        ),
        (
            &["standalone", out, "--flow-map-entries=10"],
            &["flow_map_entries = \"10\"", "less than 1024"],
        ),
        (
            &["standalone", out, "--admin-listen=nowhere"],
            &["admin_listen = \"nowhere\"", "address:port"],
        ),
        (
            &["standalone", out, "--log-level=loud"],
            &["log_level = \"loud\"", "accepted: off, error"],
        ),
        (
            &["standalone", out, "--tags=host=x"],
            &["tags = \"host=x\"", "set with the option hostname"],
        ),
        (
            &["standalone", out, "--tags=a b=x"],
            &["tags", "\"a b\" is not well-formed"],
        ),
        (&["standalone", out, "--tags=k="], &["tags = \"k=\"", "0 bytes long"]),
        (
            &["standalone", out, "--tags=pid=1"],
            &["tags = \"pid=1\"", "a key of the records themselves"],
        ),
        (
            &["standalone", out, "--enabled-plugins=ebpf-nett"],
            &["`ebpf-nett` is not one of ebpf-net, ebpf-bash"],
        ),
        (
            &["standalone", "--dataway=ftp://h?token=tkn_secret"],
            &["dataway = \"***\"", "neither http nor https"],
        ),
        (
            &["standalone", "--dataway=http://127.0.0.1:9"],
            &["dataway", "a DataWay server has no token"],
        ),
        (
            &[
                "standalone",
                "--dataway=http://127.0.0.1:9",
                "--dataway-token-file=/nowhere/token",
            ],
            &["dataway_token_file = \"/nowhere/token\"", "cannot be read"],
        ),
        (
            &["run", "--aggregator=10.0.0.1:1"],
            &["aggregator", "http://host:port or https://host:port"],
        ),
        // Contradictions.
        (
            &["standalone", out, "--interval=5s", "--interval=6s"],
            &["interval (flag --interval)", "is given twice"],
        ),
        (
            &[
                "standalone",
                out,
                "--sampling-rate=0.5",
                "--sampling-rate-pts-per-min=9",
            ],
            &["sampling_rate, sampling_rate_pts_per_min", "exclude each other"],
        ),
        (
            &[
                "run",
                "--aggregator=http://127.0.0.1:1",
                "--dataway=http://127.0.0.1:9?token=tkn_secret",
            ],
            &["aggregator, dataway", "exclude each other"],
        ),
        (
            &["standalone", out, "--enabled-plugins=ebpf-trace"],
            &["ebpf-trace together with ebpf-net"],
        ),
        (
            &["standalone"],
            &[
                "dataway",
                "there is no output",
                "dataway, kafka_address, loki_url, flow_metrics, output_file or output_stdout",
            ],
        ),
        (
            &["standalone", out, "--aggregator=http://127.0.0.1:1"],
            &[
                "aggregator = \"http://127.0.0.1:1\"",
                "standalone has an aggregator of its own",
            ],
        ),
        (&["run"], &["aggregator: is not set"]),
        (
            &["run", "--aggregator=http://127.0.0.1:1", out],
            &["output_stdout", "writes none"],
        ),
        (
            &["run", "--aggregator=http://10.0.0.1:1"],
            &["aggregator", "without TLS", "allow_plaintext = true"],
        ),
        (
            &["run", "--aggregator=https://10.0.0.1:1"],
            &["tls_ca, tls_cert, tls_key: not set"],
        ),
        (
            &["run", "--aggregator=https://10.0.0.1:1", "--tls-cert=/nowhere/cert"],
            &["tls_cert (flag --tls-cert)", "one is set without the other"],
        ),
        (
            &[
                "run",
                "--aggregator=https://10.0.0.1:1",
                "--tls-ca=/nowhere/ca",
                "--tls-cert=/nowhere/cert",
                "--tls-key=/nowhere/key",
            ],
            &["tls_ca = \"/nowhere/ca\": cannot be read", "tls_key = \"/nowhere/key\""],
        ),
        // What this machine or this build does not have.
        (
            &["standalone", out, "--host-proc=/dev"],
            &["host_proc: /dev is no /proc"],
        ),
        (
            &["standalone", out, "--enabled-plugins=ebpf-conntrack"],
            &["enabled_plugins = \"ebpf-conntrack\"", "collects on its own"],
        ),
        (
            &["doctor", "--config=/nowhere/ebpf.conf"],
            &["/nowhere/ebpf.conf", "cannot be read"],
        ),
    ] {
        let ended = run_to_end(Rights::Own, args);
        println!("node-agent {}\n{}", args.join(" "), ended.said);
        refused(&ended, named);
    }
}

#[test]
fn all_faults_are_named_at_once() {
    let ended = run_to_end(
        Rights::Own,
        &[
            "standalone",
            "--interval=soon",
            "--loopback=maybe",
            "--queue-max-size=5",
            "--dataway=ftp://h?token=tkn_secret",
            "--admin-listen=nowhere",
        ],
    );
    refused(
        &ended,
        &[
            "5 problems with the options",
            "interval =",
            "loopback =",
            "queue_max_size =",
            "dataway =",
            "admin_listen =",
        ],
    );
}

#[test]
fn environment_and_file_are_no_softer_than_flags() {
    let mut misspelt = command(Rights::Own, &["standalone", "--output-stdout=json"]);
    misspelt.env("ENV_INPUT_EBPF_INTERVALL", "10s");
    refused(
        &finish(misspelt),
        &[
            "ENV_INPUT_EBPF_INTERVALL (environment)",
            "did you mean ENV_INPUT_EBPF_INTERVAL?",
        ],
    );

    let mut bad = command(Rights::Own, &["standalone", "--output-stdout=json"]);
    bad.env("ENV_INPUT_EBPF_QUEUE_MAX_AGE", "-3h");
    refused(
        &finish(bad),
        &["queue_max_age = \"-3h\" (environment variable ENV_INPUT_EBPF_QUEUE_MAX_AGE)"],
    );

    let directory = directory();
    let path = directory.path().join("ebpf.conf");
    let config = format!("--config={}", path.display());
    for (text, named) in [
        (
            "[[inputs.ebpf]]\nintervall = '10s'\nintervals = 3\n",
            &["intervall (file ", "did you mean interval?", "intervals"][..],
        ),
        (
            "[[inputs.ebpf]]\ninterval = 5\n",
            &["interval = \"5\" (file ", "it has no unit"],
        ),
        (
            "[[inputs.ebpf]]\ninterval = '5s'\ninterval = '6s'\n",
            &["configuration file", "line 3", "duplicate key"],
        ),
        ("[[inputs.ebpf]\n", &["configuration file", "line 1, column 15"]),
        ("[[inputs.cpu]]\n", &["inputs.cpu", "not an input of this agent"]),
        ("dataway = 'tkn_secret\n", &["configuration file", "line 1"]),
    ] {
        fs::write(&path, text).unwrap();
        let ended = run_to_end(Rights::Own, &["standalone", "--output-stdout=json", &config]);
        println!("{text}{}", ended.said);
        refused(&ended, named);
    }
}

#[test]
fn help_and_version_are_no_faults() {
    for word in ["--help", "--version"] {
        assert_eq!(run_to_end(Rights::Own, &[word]).code, Some(0));
    }
}
