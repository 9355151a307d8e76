//! From the documented options to an [`AggregatorConfig`].

use api::{ConfigError as OptionError, ConfigErrors, DatawayEncoding, DatawayUrl, FileFormat, StdoutFormat};

use super::{AggregatorConfig, Endpoint, PointEncoding, SinkConfig, SinkKind, TextFormat};

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
        if sinks.is_empty() {
            return Err(refused(
                "dataway",
                None,
                "there is no output",
                "dataway, output_file or output_stdout",
            ));
        }
        // Only DataWay needs the disk; a file alone would make de-duplication across restarts depend on a directory that
        // nobody asked for.
        let queue_dir = outputs.dataway.first().map(|_| options.queue.dir.clone());
        let mut config = Self::new(queue_dir, sinks);
        config.queue_max_bytes = options.queue.max_size.0;
        config.queue_max_age = options.queue.max_age;
        Ok(config)
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
    fn no_output_and_no_token_are_refused() {
        assert!(config(&[]).unwrap_err().to_string().contains("there is no output"));
        let error = config(&[("dataway", "http://127.0.0.1:2")]).unwrap_err().to_string();
        assert!(error.contains("token"), "{error}");
    }
}
