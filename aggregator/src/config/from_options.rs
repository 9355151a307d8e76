//! From the documented options to an [`AggregatorConfig`].

use api::{
    ConfigError as OptionError, ConfigErrors, DatawayEncoding, DatawayUrl, FileFormat, OutputsConfig, StdoutFormat,
};
use records::flowlog::FlowFormat;

use super::{
    AggregatorConfig, ConversationOptions, Endpoint, FlowMetric, FlowRecords, KafkaCompression, KafkaConfig, LokiAuth,
    LokiConfig, PointEncoding, PrometheusConfig, Sasl, SaslMechanism, SinkConfig, SinkKind, TextFormat, TlsFiles,
    WhenFull,
};
use crate::sinks::flow_metrics::predefined;

impl AggregatorConfig {
    /// The aggregator that the options of groups "Outputs" and "Disk queue" describe. DataWay sinks are named `dataway`,
    /// `dataway-2`, ... in the order given: their queues belong to the names. Reads `dataway_token_file`.
    ///
    /// # Errors
    /// When the token file cannot be read, a server has no token, or there is no output at all.
    pub fn from_options(options: &api::AgentConfig) -> Result<Self, ConfigErrors> {
        let outputs = &options.outputs;
        let mut sinks = Vec::new();
        for (index, server) in outputs.dataway_with_tokens()?.iter().enumerate() {
            let name = if index == 0 {
                "dataway".to_owned()
            } else {
                format!("dataway-{}", index + 1)
            };
            let mut sink = SinkConfig::dataway(name, endpoint(server)?);
            if let SinkKind::Dataway(dataway) = &mut sink.kind {
                dataway.encoding = match outputs.dataway_encoding {
                    DatawayEncoding::Protobuf => PointEncoding::Protobuf,
                    DatawayEncoding::LineProtocol => PointEncoding::LineProtocol,
                };
                if !outputs.dataway_gzip {
                    dataway.gzip_level = 0;
                }
            }
            sinks.push(sink);
        }
        if let Some(path) = &outputs.file {
            let format = match outputs.file_format {
                FileFormat::Json => TextFormat::Json,
                FileFormat::LineProtocol => TextFormat::LineProtocol,
                FileFormat::Table => TextFormat::Table,
            };
            sinks.push(SinkConfig::file(path.clone(), format));
        }
        let terminal = match outputs.stdout {
            StdoutFormat::Off => None,
            StdoutFormat::Json => Some(TextFormat::Json),
            StdoutFormat::LineProtocol => Some(TextFormat::LineProtocol),
            StdoutFormat::Table => Some(TextFormat::Table),
        };
        sinks.extend(terminal.map(SinkConfig::stdout));
        sinks.extend(kafka(outputs)?);
        sinks.extend(loki(outputs)?);
        sinks.extend(flow_metrics(outputs)?);
        if sinks.is_empty() {
            return Err(refused(
                "dataway",
                None,
                "there is no output",
                "dataway, kafka_address, loki_url, flow_metrics, output_file or output_stdout",
            ));
        }
        // Only what goes over the network needs the disk; a file alone would make de-duplication across restarts depend on a directory that
        // nobody asked for.
        let queued = sinks.iter().any(|sink| sink.kind.is_queued());
        let queue_dir = queued.then(|| options.queue.dir.clone());
        let mut config = Self::new(queue_dir, sinks);
        config.queue_max_bytes = options.queue.max_size.0;
        config.queue_max_age = options.queue.max_age;
        config.conversations = conversations(outputs);
        Ok(config)
    }
}

fn conversations(outputs: &OutputsConfig) -> Option<ConversationOptions> {
    let records = match outputs.flow_log_types {
        api::FlowLogTypes::Flows => return None,
        api::FlowLogTypes::Conversations => FlowRecords::Conversations,
        api::FlowLogTypes::EndedConversations => FlowRecords::EndedConversations,
        api::FlowLogTypes::All => FlowRecords::All,
    };
    let options = &outputs.conversations;
    Some(ConversationOptions {
        records,
        heartbeat: options.heartbeat,
        end_timeout: options.end_timeout,
        terminating_timeout: options.terminating_timeout,
        max: options.max as usize,
    })
}

fn kafka(outputs: &OutputsConfig) -> Result<Option<SinkConfig>, ConfigErrors> {
    let options = &outputs.kafka;
    let Some(topic) = options.topic.as_ref().filter(|_| !options.address.is_empty()) else {
        return Ok(None);
    };
    let mut kafka = KafkaConfig::new(options.address.clone(), topic);
    kafka.format = format(outputs);
    kafka.compression = match options.compression {
        api::KafkaCompression::None => KafkaCompression::None,
        api::KafkaCompression::Gzip => KafkaCompression::Gzip,
        api::KafkaCompression::Snappy => KafkaCompression::Snappy,
    };
    kafka.tls = options.tls.then(|| tls(&options.files));
    let mechanism = match options.sasl {
        api::KafkaSasl::Disabled => None,
        api::KafkaSasl::Plain => Some(SaslMechanism::Plain),
        api::KafkaSasl::ScramSha256 => Some(SaslMechanism::ScramSha256),
        api::KafkaSasl::ScramSha512 => Some(SaslMechanism::ScramSha512),
    };
    if let (Some(mechanism), Some(user), Some(password)) = (mechanism, &options.user_file, &options.password_file) {
        kafka.sasl = Some(Sasl {
            mechanism,
            user: OutputsConfig::secret_file("kafka_user_file", user)?.expose().to_owned(),
            password: OutputsConfig::secret_file("kafka_password_file", password)?,
        });
    }
    Ok(Some(named("kafka", SinkKind::Kafka(kafka))))
}

fn loki(outputs: &OutputsConfig) -> Result<Option<SinkConfig>, ConfigErrors> {
    let options = &outputs.loki;
    let Some(url) = &options.url else { return Ok(None) };
    let url = reqwest::Url::parse(url).map_err(|error| {
        refused(
            "loki_url",
            Some(url.clone()),
            &error.to_string(),
            "http(s)://HOST[:PORT]",
        )
    })?;
    let mut loki = LokiConfig::new(url);
    loki.format = format(outputs);
    loki.tenant.clone_from(&options.tenant);
    loki.timeout = options.timeout;
    loki.max_body_bytes = usize::try_from(options.batch_size.0).unwrap_or(usize::MAX);
    (loki.retry_min, loki.retry_max) = (options.min_backoff, options.max_backoff);
    loki.static_labels.clone_from(&options.static_labels);
    loki.exclude_labels.clone_from(&options.exclude_labels);
    loki.tls = tls(&options.files);
    if let Some(path) = &options.token_file {
        loki.auth = LokiAuth::Bearer(OutputsConfig::secret_file("loki_token_file", path)?);
    } else if let (Some(user), Some(path)) = (&options.user, &options.password_file) {
        loki.auth = LokiAuth::Basic {
            user: user.clone(),
            password: OutputsConfig::secret_file("loki_password_file", path)?,
        };
    }
    Ok(Some(named("loki", SinkKind::Loki(loki))))
}

fn flow_metrics(outputs: &OutputsConfig) -> Result<Option<SinkConfig>, ConfigErrors> {
    let options = &outputs.flow_metrics;
    if !options.enable {
        return Ok(None);
    }
    let mut metrics = Vec::new();
    for name in &options.include {
        if name == "default" {
            metrics.extend(predefined::default_list());
        } else {
            let accepted = || format!("default, or any of {}", predefined::names().join(", "));
            metrics.push(predefined::find(name).ok_or_else(|| {
                refused(
                    "flow_metrics_include",
                    Some(name.clone()),
                    "there is no such metric",
                    &accepted(),
                )
            })?);
        }
    }
    if let Some(text) = &options.custom {
        let own: Vec<FlowMetric> = serde_json::from_str(text).map_err(|error| {
            let accepted = "a JSON list of objects with name, type, help, filters, valueKey, labels, remap, flatten, \
                            buckets, valueScale";
            refused("flow_metrics_custom", None, &error.to_string(), accepted)
        })?;
        metrics.extend(own);
    }
    let config = PrometheusConfig {
        prefix: options.prefix.clone(),
        metrics,
        series_max: options.series_max as usize,
        expiry: options.expiry,
    };
    Ok(Some(named("prometheus", SinkKind::Prometheus(config))))
}

fn named(name: &str, kind: SinkKind) -> SinkConfig {
    SinkConfig {
        name: name.to_owned(),
        when_full: WhenFull::default(),
        kind,
    }
}

const fn format(outputs: &OutputsConfig) -> FlowFormat {
    match outputs.flow_format {
        api::FlowFormat::Current => FlowFormat::Current,
        api::FlowFormat::Seed => FlowFormat::Seed,
    }
}

fn tls(files: &api::OutputTls) -> TlsFiles {
    TlsFiles {
        ca: files.ca.clone(),
        cert: files.cert.clone(),
        key: files.key.clone(),
        insecure: files.insecure,
    }
}

fn endpoint(server: &DatawayUrl) -> Result<Endpoint, ConfigErrors> {
    let token = server.token().map(api::Secret::expose);
    Endpoint::with_token(server.url().as_str(), token).map_err(|error| {
        refused(
            "dataway",
            Some(server.to_string()),
            &error.to_string(),
            "https://HOST?token=TOKEN, or a token file",
        )
    })
}

fn refused(option: &str, value: Option<String>, problem: &str, accepted: &str) -> ConfigErrors {
    ConfigErrors(vec![OptionError {
        option: option.to_owned(),
        value,
        origin: None,
        problem: problem.to_owned(),
        accepted: Some(accepted.to_owned()),
    }])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use std::path::PathBuf;

    use api::{ConfigBuilder, Source};

    use super::*;

    fn config(options: &[(&str, &str)]) -> Result<AggregatorConfig, ConfigErrors> {
        let mut builder = ConfigBuilder::new();
        for (key, value) in options {
            builder.set(key, Source::Flag, *value);
        }
        AggregatorConfig::from_options(&builder.build()?)
    }

    #[test]
    fn every_output_becomes_a_sink() {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, "tkn_file\n").unwrap();
        let config = config(&[
            ("dataway", "http://127.0.0.1:1?token=tkn_url,http://127.0.0.1:2"),
            ("dataway_token_file", token.to_str().unwrap()),
            ("dataway_encoding", "line-protocol"),
            ("dataway_gzip", "false"),
            ("output_file", "/tmp/rows"),
            ("output_format", "table"),
            ("output_stdout", "json"),
            ("queue_dir", "/tmp/q"),
            ("queue_max_size", "32MiB"),
        ])
        .unwrap();
        config.validate().unwrap();
        let names: Vec<&str> = config.sinks.iter().map(|sink| sink.name.as_str()).collect();
        assert_eq!(names, ["dataway", "dataway-2", "file", "stdout"]);
        assert_eq!(
            (config.queue_dir.clone(), config.queue_max_bytes),
            (Some(PathBuf::from("/tmp/q")), 32 << 20)
        );
        let tokens: Vec<String> = config
            .sinks
            .iter()
            .filter_map(|sink| match &sink.kind {
                SinkKind::Dataway(dataway) => {
                    assert_eq!((dataway.encoding, dataway.gzip_level), (PointEncoding::LineProtocol, 0));
                    Some(dataway.endpoint.write_url("network").query().unwrap().to_owned())
                }
                _ => None,
            })
            .collect();
        assert_eq!(tokens, ["token=tkn_url", "token=tkn_file"]);
    }

    #[test]
    fn flows_go_to_kafka_loki_and_metrics() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name).display().to_string()
        };
        let made = config(&[
            ("kafka_address", "k1:9092,k2:9092"),
            ("kafka_topic", "flows"),
            ("kafka_sasl", "ScramSHA512"),
            ("kafka_user_file", &file("user", "me\n")),
            ("kafka_password_file", &file("password", "pw0rd\n")),
            ("kafka_compression", "gzip"),
            ("loki_url", "http://loki:3100"),
            ("loki_exclude_labels", "FlowDirection"),
            ("loki_token_file", &file("token", "t0ken")),
            ("flow_format", "seed"),
            ("flow_metrics", "true"),
            ("flow_metrics_include", "default,node_flows"),
            (
                "flow_metrics_custom",
                r#"[{"name":"x","type":"counter","labels":["Proto"]}]"#,
            ),
            ("queue_dir", "/tmp/q"),
        ])
        .unwrap();
        made.validate().unwrap();
        let names: Vec<&str> = made.sinks.iter().map(|sink| sink.name.as_str()).collect();
        assert_eq!(names, ["kafka", "loki", "prometheus"]);
        assert_eq!(made.queue_dir, Some(PathBuf::from("/tmp/q")));
        let shown = format!("{made:?}");
        assert!(!shown.contains("pw0rd") && !shown.contains("t0ken"), "{shown}");
        let SinkKind::Kafka(kafka) = &made.sinks[0].kind else {
            unreachable!()
        };
        assert_eq!(kafka.sasl.as_ref().unwrap().password.expose(), "pw0rd");
        let SinkKind::Prometheus(metrics) = &made.sinks[2].kind else {
            unreachable!()
        };
        assert_eq!(metrics.metrics.len(), predefined::DEFAULT.len() + 2);
    }

    #[test]
    fn wrong_flow_options_are_named() {
        let refused = |options: &[(&str, &str)]| match config(options) {
            Err(errors) => errors.to_string(),
            Ok(config) => config.validate().unwrap_err().to_string(),
        };
        for (options, wanted) in [
            (&[("kafka_address", "k1:9092")][..], "kafka_address"),
            (&[("kafka_address", "k1"), ("kafka_topic", "t")], "kafka_address"),
            (
                &[("kafka_address", "k1:1"), ("kafka_topic", "a b")],
                "sinks.kafka.topic: `a b`",
            ),
            (
                &[("kafka_address", "k1:1"), ("kafka_topic", "t"), ("kafka_sasl", "Plain")],
                "kafka_sasl",
            ),
            (
                &[("kafka_address", "k1:1"), ("kafka_topic", "t"), ("kafka_tls_ca", "/ca")],
                "kafka_tls",
            ),
            (&[("loki_url", "ftp://loki")], "loki_url"),
            (&[("loki_url", "http://u:secret@loki")], "loki_url"),
            (
                &[("loki_url", "http://loki"), ("loki_exclude_labels", "SrcAddr")],
                "sinks.loki.exclude_labels: `SrcAddr`",
            ),
            (
                &[("loki_url", "http://loki"), ("loki_static_labels", "a-b=c")],
                "sinks.loki.static_labels: `a-b=c`",
            ),
            (
                &[("loki_url", "http://loki"), ("loki_token_file", "/nowhere")],
                "loki_token_file",
            ),
            (
                &[("loki_url", "http://loki"), ("loki_min_backoff", "9s")],
                "loki_min_backoff",
            ),
            (
                &[("flow_metrics", "true"), ("flow_metrics_include", "node_nothing")],
                "flow_metrics_include",
            ),
            (
                &[("flow_metrics", "true"), ("flow_metrics_custom", "[{")],
                "flow_metrics_custom",
            ),
            (
                &[
                    ("flow_metrics", "true"),
                    (
                        "flow_metrics_custom",
                        r#"[{"name":"x","type":"counter","labels":["SrcAddr"]}]"#,
                    ),
                ],
                "sinks.prometheus.metrics.x.labels: `SrcAddr`",
            ),
        ] {
            let error = refused(options);
            assert!(error.contains(wanted), "{options:?}: {error}");
        }
    }

    #[test]
    fn no_output_and_no_token_are_refused() {
        assert!(config(&[]).unwrap_err().to_string().contains("there is no output"));
        let error = config(&[("dataway", "http://127.0.0.1:2")]).unwrap_err().to_string();
        assert!(error.contains("token"), "{error}");
    }
}
