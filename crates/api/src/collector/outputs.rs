//! Where records go.

use std::collections::BTreeMap;

use super::{cel, object::object};
use crate::{DatawayEncoding, FileFormat, FlowFormat, FlowLogTypes, KafkaCompression, StdoutFormat};

object! {
    /// DataWay servers; each gets every record.
    #[schemars(extend("x-kubernetes-validations" = cel::dataway_rules()))]
    DatawaySpec {
        /// Address, such as https://openway.guance.com, without a token: that stands in a Secret. Excludes `urls`.
        #[schemars(length(max = 1024), regex(pattern = cel::HTTP_URL))]
        url: String,
        /// Several addresses, without tokens. Excludes `url`.
        #[schemars(length(min = 1, max = 8), extend("items" = {"type": "string", "maxLength": 1024, "pattern": cel::HTTP_URL}))]
        urls: Vec<String>,
        /// The Secret with the token of the servers, in the operator's namespace.
        token_secret_ref: SecretKeyRef,
        /// Format of request bodies.
        #[schemars(extend("default" = "protobuf"))]
        encoding: DatawayEncoding,
        /// Compress request bodies.
        #[schemars(extend("default" = true))]
        gzip: bool,
    }

    /// A key of a Secret in the operator's namespace.
    #[schemars(extend("required" = ["name"]))]
    SecretKeyRef {
        /// Name of the Secret.
        #[schemars(length(min = 1, max = 253))]
        name: String,
        /// Key in it.
        #[schemars(length(min = 1, max = 253), extend("default" = "token"))]
        key: String,
    }

    /// Outputs beside DataWay.
    OutputsSpec {
        /// Write records to the aggregator's standard output too.
        #[schemars(extend("default" = "off"))]
        stdout: StdoutFormat,
        /// Write records to a file in the aggregator's pod too.
        file: FileOutput,
        /// Types of the fields of flows in Kafka and Loki.
        #[schemars(extend("default" = "current"))]
        flow_format: FlowFormat,
        /// What is told of flows: each as it is, or the conversations that they are part of, or both.
        #[schemars(extend("default" = "flows"))]
        flow_log_types: FlowLogTypes,
        /// How conversations of flows are followed.
        conversations: ConversationsSpec,
        /// Flows in the NetObserv format to a Kafka topic.
        kafka: KafkaOutput,
        /// Flows in the NetObserv format to Loki.
        loki: LokiOutput,
        /// Metrics made from flows, for Prometheus to scrape.
        prometheus: PrometheusOutput,
        /// Flows as OpenTelemetry logs and metrics.
        otlp: OtlpOutput,
    }

    /// How conversations of flows are followed.
    ConversationsSpec {
        /// Time between two records of a conversation that goes on, from 1s to 1h.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "30s", "x-kubernetes-validations" = cel::duration_rules("1s", "1h")))]
        heartbeat: String,
        /// Silence after which a conversation is over, from 1s to 1h; longer than the time that packets of a flow are summed up.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "10s", "x-kubernetes-validations" = cel::duration_rules("1s", "1h")))]
        end_timeout: String,
        /// The same for a connection of TCP that both ends closed, or one reset.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "5s", "x-kubernetes-validations" = cel::duration_rules("1s", "1h")))]
        terminating_timeout: String,
        /// Conversations followed at a time.
        #[schemars(range(min = 1, max = 10_000_000), extend("default" = 50_000))]
        max: u32,
    }

    /// A file in the aggregator's pod.
    #[schemars(extend("required" = ["path"]))]
    FileOutput {
        /// The file to append to.
        #[schemars(length(min = 1, max = 1024))]
        path: String,
        /// Its format.
        #[schemars(extend("default" = "json"))]
        format: FileFormat,
    }

    /// A Kafka topic: one JSON object per message.
    #[schemars(extend("required" = ["address", "topic"]))]
    KafkaOutput {
        /// Brokers to start from, host:port with commas.
        #[schemars(length(min = 1, max = 2048))]
        address: String,
        /// Topic.
        #[schemars(length(min = 1, max = 249))]
        topic: String,
        /// Compression of messages.
        #[schemars(extend("default" = "snappy"))]
        compression: KafkaCompression,
        /// TLS; without it none.
        tls: TlsSpec,
        /// User and password; without it none.
        sasl: KafkaSasl,
    }

    /// TLS of a connection to an output.
    TlsSpec {
        /// Whether TLS is used.
        #[schemars(extend("default" = true))]
        enable: bool,
        /// Do not check the server's certificate.
        #[schemars(extend("default" = false))]
        insecure_skip_verify: bool,
        /// Authorities to trust; otherwise the usual public ones.
        ca_cert: SecretKeyRef,
        /// Own certificate chain; together with `userKey`.
        user_cert: SecretKeyRef,
        /// Key of `userCert`.
        user_key: SecretKeyRef,
    }

    /// User and password at Kafka.
    #[schemars(extend("x-kubernetes-validations" = [cel::rule("!has(self.type) || self.type == 'Disabled' || (has(self.clientIDReference) && has(self.clientSecretReference))", "clientIDReference and clientSecretReference are needed")]))]
    KafkaSasl {
        /// How they are sent.
        #[schemars(extend("enum" = ["Disabled", "Plain", "ScramSHA512"], "default" = "Disabled"))]
        r#type: String,
        /// The user.
        #[serde(rename = "clientIDReference")]
        client_id_reference: SecretKeyRef,
        /// The password.
        client_secret_reference: SecretKeyRef,
    }

    /// Loki.
    #[schemars(extend("required" = ["url"]))]
    LokiOutput {
        /// Address, such as http://loki:3100.
        #[schemars(length(max = 1024), regex(pattern = cel::HTTP_URL))]
        url: String,
        /// Value of the header X-Scope-OrgID.
        #[schemars(length(min = 1, max = 256), extend("default" = "netobserv"))]
        tenant: String,
        /// Longest wait for an answer.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "10s"))]
        write_timeout: String,
        /// Longest that entries wait to be sent together.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "1s"))]
        write_batch_wait: String,
        /// Most bytes sent together.
        #[schemars(range(min = 1024, max = 67108864), extend("default" = 10485760))]
        write_batch_size: u32,
        /// First pause before a retry.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "1s"))]
        write_min_backoff: String,
        /// Longest pause before a retry.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "5s"))]
        write_max_backoff: String,
        /// Labels that every entry gets.
        #[schemars(extend("maxProperties" = 16, "default" = {"app": "netobserv-flowcollector"}))]
        static_labels: BTreeMap<String, String>,
        /// Labels left in the line instead.
        #[schemars(length(max = 16), extend("items" = cel::texts(128)))]
        exclude_labels: Vec<String>,
        /// The bearer token; without it none.
        token_secret_ref: SecretKeyRef,
        /// TLS of an https:// address.
        tls: TlsSpec,
    }

    /// Metrics made from flows, served at the aggregator's metrics port.
    PrometheusOutput {
        /// Whether they are served.
        #[schemars(extend("default" = true))]
        enable: bool,
        /// Put before the names of metrics.
        #[schemars(length(max = 64), extend("default" = "netobserv_"))]
        prefix: String,
        /// Names of the predefined metrics to serve; otherwise the documented default ones.
        #[schemars(length(max = 128), extend("items" = cel::texts(128)))]
        include_list: Vec<String>,
        /// Metrics of one's own.
        #[schemars(length(max = 64))]
        metrics: Vec<MetricItem>,
        /// Series of one metric; flows beyond them are summed up in one whose labels are all `other`.
        #[schemars(range(min = 1, max = 1000000), extend("default" = 10000))]
        series_max: u32,
        /// A series without new flows for this long is dropped.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "2m"))]
        expiry: String,
    }

    /// One metric made from flows.
    #[schemars(extend("required" = ["name", "type"]))]
    MetricItem {
        /// Its name, without the prefix.
        #[schemars(length(max = 128), regex(pattern = "^[a-zA-Z_][a-zA-Z0-9_]*$"))]
        name: String,
        /// Its kind.
        #[schemars(extend("enum" = ["counter", "gauge", "histogram"]))]
        r#type: String,
        /// What it tells.
        #[schemars(length(max = 512))]
        help: String,
        /// Flows it is made from: filters of one field are alternatives, of different fields must all hold.
        #[schemars(length(max = 32))]
        filters: Vec<MetricFilter>,
        /// Field that is summed up; otherwise flows are counted.
        #[schemars(length(max = 128))]
        value_key: String,
        /// Fields that become labels.
        #[schemars(length(max = 32), extend("items" = cel::texts(128)))]
        labels: Vec<String>,
        /// Other names for labels.
        #[schemars(extend("maxProperties" = 32))]
        remap: BTreeMap<String, String>,
        /// List fields of which each element makes a sample.
        #[schemars(length(max = 8), extend("items" = cel::texts(128)))]
        flatten: Vec<String>,
        /// Upper bounds of a histogram's buckets.
        #[schemars(length(max = 64))]
        buckets: Vec<f64>,
        /// The value is divided by this.
        value_scale: f64,
    }

    /// Which flows a metric is made from.
    #[schemars(extend("required" = ["key"]))]
    MetricFilter {
        /// Field.
        #[schemars(length(min = 1, max = 128))]
        key: String,
        /// What it is compared with.
        #[schemars(length(max = 512))]
        value: String,
        /// How.
        #[schemars(extend("enum" = ["equal", "not_equal", "presence", "absence", "match_regex", "not_match_regex"], "default" = "equal"))]
        r#type: String,
    }

    /// An OpenTelemetry collector.
    #[schemars(extend("required" = ["targetHost"]))]
    OtlpOutput {
        /// Its host.
        #[schemars(length(min = 1, max = 253))]
        target_host: String,
        /// Its port; 4318 is usual with http.
        #[schemars(range(min = 1, max = 65535), extend("default" = 4317))]
        target_port: u16,
        /// Protocol.
        #[schemars(extend("enum" = ["grpc", "http"], "default" = "grpc"))]
        protocol: String,
        /// Other names for fields.
        #[schemars(length(max = 128))]
        fields_mapping: Vec<OtlpMapping>,
        /// Headers sent along.
        #[schemars(extend("maxProperties" = 32))]
        headers: BTreeMap<String, String>,
        /// TLS; without it none.
        tls: TlsSpec,
        /// Flows as logs.
        logs: OtlpLogs,
        /// Flows as metrics.
        metrics: OtlpMetrics,
    }

    /// Another name for a field.
    #[schemars(extend("required" = ["input", "output"]))]
    OtlpMapping {
        /// The field.
        #[schemars(length(min = 1, max = 128))]
        input: String,
        /// The name sent.
        #[schemars(length(min = 1, max = 128))]
        output: String,
        /// The factor its value is multiplied by.
        multiplier: i64,
    }

    /// Flows as logs.
    OtlpLogs {
        /// Whether they are sent.
        #[schemars(extend("default" = true))]
        enable: bool,
    }

    /// Flows as metrics.
    OtlpMetrics {
        /// Whether they are sent.
        #[schemars(extend("default" = true))]
        enable: bool,
        /// Time between two deliveries.
        #[schemars(length(max = 32), regex(pattern = cel::DURATION), extend("default" = "20s"))]
        push_time_interval: String,
    }
}

// === impl DatawaySpec ===

impl DatawaySpec {
    /// All addresses, from `url` or `urls`.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        self.url.iter().chain(self.urls.iter().flatten()).cloned().collect()
    }
}

// === impl OutputsSpec ===

impl OutputsSpec {
    /// Outputs, and parts of them, that are set and that this build does not carry out.
    #[must_use]
    pub fn not_built(&self) -> Vec<&'static str> {
        let (kafka, loki) = (self.kafka.as_ref(), self.loki.as_ref());
        let kafka_tls = kafka.and_then(|kafka| kafka.tls.as_ref());
        let loki_tls = loki.and_then(|loki| loki.tls.as_ref());
        let certificates = |tls: &TlsSpec| tls.ca_cert.is_some() || tls.user_cert.is_some() || tls.user_key.is_some();
        [
            ("kafka.tls (its Secrets)", kafka_tls.is_some_and(certificates)),
            (
                "kafka.sasl",
                kafka
                    .and_then(|kafka| kafka.sasl.as_ref()?.r#type.as_deref())
                    .is_some_and(|kind| kind != "Disabled"),
            ),
            ("loki.tls (its Secrets)", loki_tls.is_some_and(certificates)),
            (
                "loki.tokenSecretRef",
                loki.is_some_and(|loki| loki.token_secret_ref.is_some()),
            ),
            (
                "loki.writeBatchWait",
                loki.is_some_and(|loki| loki.write_batch_wait.is_some()),
            ),
            ("otlp", self.otlp.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, set)| set.then_some(name))
        .collect()
    }
}
