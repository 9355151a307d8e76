//! A real Kafka broker on loopback, and a reader of its own client as the witness.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub const USER: &str = "flows";
pub const PASSWORD: &str = "s3cretword";

/// One node, broker and controller at once.
pub struct Broker {
    dir: tempfile::TempDir,
    libs: PathBuf,
    plain: u16,
    secure: u16,
    running: Option<Child>,
}

/// A message as the witness read it.
#[derive(Debug)]
pub struct Message {
    pub partition: u32,
    /// In hexadecimal digits.
    pub key: String,
    pub pkg_id: String,
    pub value: serde_json::Value,
}

const READER: &str = r#"
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.*;
import org.apache.kafka.clients.consumer.*;
import org.apache.kafka.common.*;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;

public class Reader {
    public static void main(String[] args) {
        Properties p = new Properties();
        p.put("bootstrap.servers", args[0]);
        p.put("key.deserializer", ByteArrayDeserializer.class.getName());
        p.put("value.deserializer", ByteArrayDeserializer.class.getName());
        try (KafkaConsumer<byte[], byte[]> c = new KafkaConsumer<>(p)) {
            List<TopicPartition> all = new ArrayList<>();
            for (PartitionInfo i : c.partitionsFor(args[1])) all.add(new TopicPartition(args[1], i.partition()));
            c.assign(all);
            c.seekToBeginning(all);
            Map<TopicPartition, Long> ends = c.endOffsets(all);
            StringBuilder out = new StringBuilder();
            while (all.stream().anyMatch(t -> c.position(t) < ends.get(t))) {
                for (ConsumerRecord<byte[], byte[]> r : c.poll(Duration.ofSeconds(1))) {
                    Header h = r.headers().lastHeader("pkg_id");
                    String id = h == null ? "-" : new String(h.value(), StandardCharsets.UTF_8);
                    out.append(r.partition()).append('\t').append(r.offset()).append('\t')
                       .append(HexFormat.of().formatHex(r.key())).append('\t').append(id).append('\t')
                       .append(new String(r.value(), StandardCharsets.UTF_8)).append('\n');
                }
            }
            System.out.print(out);
        }
    }
}
"#;

impl Broker {
    /// Starts one with `partitions` for topics made on demand.
    pub fn start(partitions: u32) -> Self {
        let libs = std::env::var_os("EBPFCOLLECTOR_KAFKA_LIBS").expect("EBPFCOLLECTOR_KAFKA_LIBS names the jars");
        let dir = tempfile::tempdir().unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (plain, secure, controller) = (free(), free(), free());
        let certificate =
            rcgen::generate_simple_self_signed(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let pem = format!("{}{}", certificate.signing_key.serialize_pem(), certificate.cert.pem());
        fs::write(dir.path().join("ca.pem"), certificate.cert.pem()).unwrap();
        fs::write(dir.path().join("broker.pem"), pem).unwrap();
        let at = dir.path().display();
        let settings = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
             listeners=PLAIN://127.0.0.1:{plain},SECURE://localhost:{secure},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAIN://127.0.0.1:{plain},SECURE://localhost:{secure}\n\
             listener.security.protocol.map=PLAIN:PLAINTEXT,SECURE:SASL_SSL,CONTROLLER:PLAINTEXT\n\
             inter.broker.listener.name=PLAIN\ncontroller.listener.names=CONTROLLER\n\
             sasl.enabled.mechanisms=SCRAM-SHA-512\n\
             listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;\n\
             ssl.keystore.type=PEM\nssl.keystore.location={at}/broker.pem\n\
             log.dirs={at}/log\nnum.partitions={partitions}\nauto.create.topics.enable=true\n\
             offsets.topic.replication.factor=1\ntransaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\nshare.coordinator.state.topic.replication.factor=1\n\
             share.coordinator.state.topic.min.isr=1\n"
        );
        fs::write(dir.path().join("server.properties"), settings).unwrap();
        fs::write(dir.path().join("Reader.java"), READER).unwrap();
        let mut broker = Self {
            dir,
            libs: libs.into(),
            plain,
            secure,
            running: None,
        };
        let scram = format!("SCRAM-SHA-512=[name={USER},password={PASSWORD}]");
        let formatted = broker
            .java()
            .args([
                "kafka.tools.StorageTool",
                "format",
                "-t",
                "MkU3OEVBNTcwNTJENDM2Qg",
                "-c",
            ])
            .arg(broker.dir.path().join("server.properties"))
            .args(["--add-scram", &scram])
            .output()
            .unwrap();
        assert!(formatted.status.success(), "{formatted:?}");
        broker.up();
        broker
    }

    fn java(&self) -> Command {
        let mut java = Command::new("java");
        java.args(["-Xmx384m", "-cp"]).arg(format!("{}/*", self.libs.display()));
        java
    }

    /// Starts the broker, which was down.
    pub fn up(&mut self) {
        let log = fs::File::create(self.dir.path().join("out")).unwrap();
        let child = self
            .java()
            .arg("kafka.Kafka")
            .arg(self.dir.path().join("server.properties"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.running = Some(child);
        let deadline = Instant::now() + Duration::from_secs(90);
        while std::net::TcpStream::connect(("127.0.0.1", self.secure)).is_err() {
            let out = || fs::read_to_string(self.dir.path().join("out")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the broker does not start: {}", out());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Kills the broker as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn plain(&self) -> String {
        format!("127.0.0.1:{}", self.plain)
    }

    /// With TLS and SCRAM.
    pub fn secure(&self) -> String {
        format!("localhost:{}", self.secure)
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// All messages of a topic, as Kafka's own client reads them.
    pub fn read(&self, topic: &str) -> Vec<Message> {
        let reader: &Path = &self.dir.path().join("Reader.java");
        let mut child = self
            .java()
            .arg(reader)
            .args([&self.plain(), topic])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success());
        text.lines()
            .map(|line| {
                let [partition, _offset, key, pkg_id, value] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
                Message {
                    partition: partition.parse().unwrap(),
                    key: key.to_owned(),
                    pkg_id: pkg_id.to_owned(),
                    value: serde_json::from_str(value).unwrap(),
                }
            })
            .collect()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How often each number of `Bytes` came, repeats that the header tells left out.
pub fn numbers(messages: &[Message]) -> BTreeMap<u64, usize> {
    let mut seen = std::collections::HashSet::new();
    let mut counts = BTreeMap::new();
    for message in messages {
        if seen.insert(&message.pkg_id) {
            *counts.entry(message.value["Bytes"].as_u64().unwrap()).or_default() += 1;
        }
    }
    counts
}
