//! The chart and the operator against a real API server, with role-based access control: what the chart grants is what the
//! operator needs.
//!
//! Needs the programs that `scripts/e2e.sh programs` builds, in the directory that CLUSTER_PROGRAMS names;
//! `scripts/test.sh chart` sees to both. Everything listens on loopback and ends with the test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod control_plane;

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command},
};

use control_plane::{ControlPlane, port, programs, succeeded};
use serde::Deserialize as _;
use serde_json::Value;

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/ebpf-collector");
const ACCOUNT: &str = "collector-ebpf-collector-operator";
const USER: &str = "system:serviceaccount:observe:collector-ebpf-collector-operator";
const OBJECT: &str = "
apiVersion: ebpfcollector.io/v1alpha1
kind: EbpfCollector
metadata:
  name: cluster
spec:
  dataway:
    url: https://openway.example
    tokenSecretRef: { name: dataway, key: token }
";

/// An operator that runs as the chart's ServiceAccount.
struct Operator {
    child: Child,
    admin: u16,
}

impl Operator {
    fn start(plane: &ControlPlane) -> Self {
        let token = plane.must(&["-n", "observe", "create", "token", ACCOUNT]);
        let kubeconfig = plane.kubeconfig("operator", token.trim());
        // The very variables that the chart gives, so that a name that differs is seen.
        let deployment = plane.get(&["-n", "observe", "deployment", ACCOUNT]);
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        let given = container["env"].as_array().unwrap().iter();
        let given = given.filter_map(|it| Some((it["name"].as_str()?, it["value"].as_str()?)));
        let admin = port();
        let mut command = Command::new(env!("CARGO_BIN_EXE_operator"));
        command
            .envs(given)
            .envs([("POD_NAME", "operator-0"), ("POD_NAMESPACE", "observe")])
            .env("KUBECONFIG", kubeconfig)
            .arg(format!("--admin-listen=127.0.0.1:{admin}"));
        Self {
            child: plane.log_of(&mut command, "operator"),
            admin,
        }
    }

    /// The sum of all samples of a metric, zero before the first.
    fn metric(&self, name: &str) -> f64 {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.admin)) else {
            return 0.0;
        };
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let samples = text.lines().filter(|line| line.starts_with(name));
        samples
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn condition(object: &Value, kind: &str) -> String {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|it| it["type"] == kind);
    found.map_or_else(String::new, |it| {
        format!("{} {}", it["status"].as_str().unwrap(), it["reason"].as_str().unwrap())
    })
}

/// Kind and name of all that carries the operator's label.
fn made(plane: &ControlPlane) -> Vec<String> {
    let kinds = "daemonsets,statefulsets,services,serviceaccounts,secrets,networkpolicies,poddisruptionbudgets,\
                 persistentvolumeclaims";
    let selector = "app.kubernetes.io/managed-by=ebpfcollector-operator";
    let mut names = plane.must(&["-n", "observe", "get", kinds, "-l", selector, "-o", "name"]);
    names.push_str(&plane.must(&["get", "clusterroles,clusterrolebindings", "-l", selector, "-o", "name"]));
    names.lines().map(str::to_owned).collect()
}

/// All that is left in the namespace of a release, and of the release in the rest of the cluster.
fn left(plane: &ControlPlane) -> Vec<String> {
    let kinds = "deployments,daemonsets,statefulsets,services,serviceaccounts,secrets,configmaps,roles,rolebindings,leases,\
                 networkpolicies,poddisruptionbudgets,persistentvolumeclaims";
    let inside = plane.must(&["-n", "observe", "get", kinds, "-o", "name"]);
    let mut outside = plane.must(&["-n", "default", "get", "roles,rolebindings", "-o", "name"]);
    outside.push_str(&plane.must(&["get", "clusterroles,clusterrolebindings", "-o", "name"]));
    let ours = outside
        .lines()
        .filter(|name| ["ebpf", "cluster-ag"].iter().any(|it| name.contains(it)));
    inside.lines().chain(ours).map(str::to_owned).collect()
}

/// Writes of the operator but those of its Lease.
fn writes(plane: &ControlPlane) -> usize {
    let requests = plane.requests(USER);
    let reads = ["get", "list", "watch"];
    let writes = requests
        .iter()
        .filter(|it| !reads.contains(&it.verb.as_str()) && it.resource != "leases");
    writes.count()
}

/// Resource and verb of everything that the rendered chart grants.
fn granted(rendered: &str) -> BTreeSet<(String, String)> {
    let mut all = BTreeSet::new();
    for document in serde_yaml::Deserializer::from_str(rendered) {
        let object = Value::deserialize(document).unwrap();
        if !["ClusterRole", "Role"].iter().any(|kind| object["kind"] == *kind) {
            continue;
        }
        for rule in object["rules"].as_array().unwrap() {
            for resource in rule["resources"].as_array().unwrap() {
                let verbs = rule["verbs"].as_array().unwrap().iter();
                all.extend(verbs.map(|verb| (text(resource), text(verb))));
            }
        }
    }
    all
}

/// The same from the tables that docs/SECURITY.md has of the operator.
fn documented() -> BTreeSet<(String, String)> {
    let document = include_str!("../../../docs/SECURITY.md");
    let mut all = BTreeSet::new();
    let mut inside = false;
    for line in document.lines() {
        inside = line.starts_with("| operator, in ") || (inside && line.starts_with('|'));
        let mut cells = line.split('|').skip(1).map(quoted);
        let (Some(resources), Some(verbs), true) = (cells.next(), cells.next(), inside) else {
            continue;
        };
        for resource in resources {
            all.extend(verbs.iter().map(|verb| (resource.clone(), verb.clone())));
        }
    }
    all
}

/// What stands between backquotes.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[test]
fn the_chart_is_in_order() {
    let helm = |arguments: &[&str]| Command::new(programs().join("helm")).args(arguments).output().unwrap();
    succeeded(&["lint"], &helm(&["lint", "--strict", CHART]));
    let template = |values: &[&str]| {
        let mut arguments = vec!["template", "a", CHART, "--kube-version", "1.33.4", "-n", "observe"];
        arguments.extend(values.iter().flat_map(|value| ["--set", value]));
        helm(&arguments)
    };
    let text = succeeded(&["template"], &template(&["image.repository=r/c", "image.tag=v7"]));
    assert!(
        text.contains("image: \"r/c:v7\"") && text.contains("value: \"r/c:v7\""),
        "{text}"
    );
    let digest = format!("sha256:{}", "0".repeat(64));
    let text = succeeded(
        &["template"],
        &template(&[&format!("image.digest={digest}"), "image.tag=v7"]),
    );
    assert!(text.contains(&format!("image: \"ebpf-collector@{digest}\"")), "{text}");
    let text = succeeded(
        &["template"],
        &template(&["collector.create=true", "collector.spec.interval=5s"]),
    );
    assert!(
        text.contains("kind: EbpfCollector") && text.contains("interval: 5s"),
        "{text}"
    );
    let text = succeeded(&["template"], &template(&["crd.upgrade=false", "rbac.create=false"]));
    assert!(
        !text.contains("kind: ClusterRole") && !text.contains("customresourcedefinitions"),
        "{text}"
    );
    assert_eq!(granted(&succeeded(&["template"], &template(&[]))), documented());
    for (value, named) in [
        ("imag.tag=7", "imag"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=7", "digest"),
        ("replicas=two", "replicas"),
        ("collector.name=A", "name"),
    ] {
        let output = template(&[value]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(named), "{value}: {error}");
    }
}

/// What the schema and its rules refuse at apply, by the API server itself.
fn bad_objects_are_refused(plane: &ControlPlane) {
    let dataway = "dataway: { url: 'https://h', tokenSecretRef: { name: s } }";
    for (spec, named) in [
        (
            "dataway: { url: 'https://h?token=tkn_1', tokenSecretRef: { name: s } }",
            "put it into a Secret",
        ),
        (
            "dataway: { urls: ['https://h/?a=1&Token=tkn_1'], tokenSecretRef: { name: s } }",
            "put it into a Secret",
        ),
        ("dataway: { url: 'https://h' }", "tokenSecretRef is needed"),
        (
            "dataway: { url: 'https://h', urls: ['https://g'], tokenSecretRef: { name: s } }",
            "either url or urls",
        ),
        ("limits: { mem: 1MiB }", "spec.limits.mem"),
        ("limits: { mem: 16383kib }", "a size from 16MiB"),
        ("limits: { mem: '7' }", "spec.limits.mem"),
        ("limits: { net: 0MiB/s }", "above zero"),
        ("aggregator: { queue: { size: 15.9MiB } }", "16MiB to 64TiB"),
        ("aggregator: { queue: { size: 65TiB } }", "16MiB to 64TiB"),
        ("interval: 2h", "spec.interval"),
        ("sampling: { rate: 0.5, ptsPerMin: 3 }", "exclude each other"),
        ("agent: { affinity: { nodeAffinity: 7 } }", "nodeAffinity"),
    ] {
        let object = format!(
            "apiVersion: ebpfcollector.io/v1alpha1\nkind: EbpfCollector\nmetadata: {{ name: bad }}\nspec: {{ {spec} }}\n"
        );
        let refusal = plane.apply(&object).expect_err(spec);
        assert!(
            refusal.contains(named) && !refusal.contains("tkn_1'"),
            "{spec}: {refusal}"
        );
    }
    for spec in [
        "limits: { mem: 16MiB, net: 1.5kb/s, cpu: 0.5 }",
        "limits: { mem: 0.25gib }, aggregator: { queue: { size: 64TiB } }",
        "limits: { mem: 16777216 B }",
        "agent: { maxUnavailable: 10% }",
    ] {
        let object = format!(
            "apiVersion: ebpfcollector.io/v1alpha1\nkind: EbpfCollector\nmetadata: {{ name: good }}\n\
             spec: {{ {dataway}, {spec} }}\n"
        );
        plane.apply(&object).expect(spec);
        plane.must(&["delete", "ebpfcollector", "good"]);
    }
}

#[test]
fn an_object_becomes_objects_and_goes_without_a_trace() {
    let plane = ControlPlane::start();
    let install = ["install", "collector", CHART, "-n", "observe", "--create-namespace"];
    let notes = succeeded(&install, &plane.helm(&install));
    assert!(notes.contains("kubectl apply -f -"), "{notes}");
    // There is one operator in a cluster.
    let second = plane.helm(&["install", "other", CHART, "-n", "elsewhere", "--create-namespace"]);
    let refusal = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        !second.status.success() && refusal.contains("ebpf-collector-operator"),
        "{refusal}"
    );

    // As an older chart left it: Helm does not touch the definition again, the operator does.
    let definition = ["crd", "ebpfcollectors.ebpfcollector.io"];
    let limits = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/limits";
    let older = format!(r#"[{{ "op": "remove", "path": "{limits}" }}]"#);
    plane.must(&["patch", definition[0], definition[1], "--type=json", "-p", &older]);
    let operator = Operator::start(&plane);
    plane.until("the definition is this version's", || {
        plane.get(&definition).pointer(limits).is_some()
    });
    plane.until("this operator works", || {
        operator.metric("ebpfcollector_operator_leader") > 0.0
    });
    bad_objects_are_refused(&plane);

    plane.apply(OBJECT).unwrap();
    let object = || plane.get(&["ebpfcollector", "cluster"]);
    plane.until("the missing Secret is told", || {
        condition(&object(), "Ready") == "False SecretMissing"
    });
    assert_eq!(made(&plane), Vec::<String>::new());
    plane.must(&[
        "-n",
        "observe",
        "create",
        "secret",
        "generic",
        "dataway",
        "--from-literal=token=tkn_1",
    ]);
    plane.until("there are agents", || {
        !plane.get(&["-n", "observe", "daemonset", "cluster-agent"]).is_null()
    });
    plane.until("the roll-out is told", || {
        condition(&object(), "Progressing") == "True RollingOut"
    });
    let all = made(&plane);
    assert_eq!(all.len(), 15, "{all:#?}");
    let aggregator = plane.get(&["-n", "observe", "statefulset", "cluster-aggregator"]);
    assert!(!aggregator.to_string().contains("tkn_1"), "{aggregator}");

    // The agents' account may do what its role says, and no more.
    let agent = "--as=system:serviceaccount:observe:cluster-agent";
    assert!(
        plane
            .kubectl(&["auth", "can-i", "watch", "pods", "-A", agent])
            .status
            .success()
    );
    for forbidden in [
        ["get", "secrets"],
        ["delete", "pods"],
        ["patch", "ebpfcollectors"],
        ["list", "configmaps"],
    ] {
        let answer = plane.kubectl(&["auth", "can-i", forbidden[0], forbidden[1], "-A", agent]);
        assert!(!answer.status.success(), "{forbidden:?}");
    }

    // What others change is put back.
    let daemon_set = ["-n", "observe", "daemonset", "cluster-agent"];
    plane.must(&["-n", "observe", "delete", "networkpolicy", "cluster-aggregator"]);
    plane.until("what was deleted is there again", || made(&plane).len() == all.len());
    let patch = r#"[{ "op": "replace", "path": "/spec/template/spec/hostPID", "value": false }]"#;
    plane.must(&[
        "-n",
        "observe",
        "patch",
        "daemonset",
        "cluster-agent",
        "--type=json",
        "-p",
        patch,
    ]);
    plane.until("what was changed is as before", || {
        plane.get(&daemon_set)["spec"]["template"]["spec"]["hostPID"] == true
    });
    let told = || plane.must(&["-n", "default", "get", "events", "-o", "jsonpath={.items[*].reason}"]);
    for reason in ["SecretMissing", "Created", "CertificatesIssued", "Repaired"] {
        plane.until(reason, || told().contains(reason));
    }

    // An upgrade keeps the object, what was made of it, and who works.
    let upgrade = [
        "upgrade",
        "collector",
        CHART,
        "-n",
        "observe",
        "--set",
        "log.level=debug",
    ];
    let (uid, before) = (object()["metadata"]["uid"].clone(), made(&plane));
    succeeded(&upgrade, &plane.helm(&upgrade));
    assert_eq!((&object()["metadata"]["uid"], made(&plane)), (&uid, before));
    let lease = plane.get(&["-n", "observe", "lease", "ebpfcollector-operator"]);
    assert_eq!(lease["spec"]["holderIdentity"], "operator-0");

    // A hundred looks at an object that is as it should be.
    let reconciles = || operator.metric("ebpfcollector_operator_reconciles_total");
    let mut before = reconciles();
    plane.until("it is quiet", || {
        let quiet = reconciles() == before;
        before = reconciles();
        quiet
    });
    let (written, mut seen) = (writes(&plane), reconciles());
    for count in 0..100 {
        plane.must(&[
            "annotate",
            "ebpfcollector",
            "cluster",
            &format!("count={count}"),
            "--overwrite",
        ]);
        plane.until("it is looked at again", || reconciles() > seen);
        seen = reconciles();
    }
    let requests = plane.requests(USER);
    assert_eq!(
        writes(&plane),
        written,
        "{:#?}",
        requests.iter().rev().take(20).collect::<Vec<_>>()
    );

    // All that it asked for was granted.
    let refused: Vec<_> = requests.iter().filter(|it| it.code == 403).collect();
    assert!(refused.is_empty(), "{refused:#?}");

    plane.must(&["delete", "ebpfcollector", "cluster"]);
    plane.until("all that was made is gone", || made(&plane).is_empty());
    plane.must(&["-n", "observe", "delete", "secret", "dataway"]);
    let uninstall = ["uninstall", "collector", "-n", "observe"];
    succeeded(&uninstall, &plane.helm(&uninstall));
    drop(operator);
    plane.until("the release is gone", || left(&plane).is_empty());
    assert!(!plane.get(&definition).is_null());
}
