//! Images without a container engine: files of this machine as one layer `FROM scratch`, written as an archive that
//! containerd imports (the OCI image layout in a tar file).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The image that holds the namespaces of a pod.
pub const PAUSE: &str = "docker.io/ec-e2e/pause:1";
/// The image of the workloads: counting traffic and the DataWay stub.
pub const WORKLOAD: &str = "docker.io/ec-e2e/workload:1";
/// The image of the cluster's DNS.
pub const DNS: &str = "docker.io/ec-e2e/coredns:1";
/// The image of the product.
pub const PRODUCT: &str = "docker.io/ec-e2e/ebpf-collector:e2e";

/// Users of the workload's image.
const PASSWD: &str = "root:x:0:0:root:/:/usr/bin/bash\nworker:x:1000:1000::/:/usr/bin/bash\n";

/// Its groups, which nginx asks for.
const GROUP: &str = "root:x:0:\n";

/// A server of TLS that writes down what it served: method, path, status, bytes sent, version.
const NGINX: &str = r#"
user root root;
daemon off;
master_process off;
pid /nginx.pid;
error_log /dev/stderr;
events {}
http {
    log_format served "$request_method $uri $status $bytes_sent $server_protocol";
    access_log /dev/stdout served;
    client_body_temp_path /body;
    proxy_temp_path /proxy;
    fastcgi_temp_path /fastcgi;
    uwsgi_temp_path /uwsgi;
    scgi_temp_path /scgi;
    server {
        listen 7601 ssl http2;
        listen [::]:7601 ssl http2;
        ssl_certificate /etc/cert.pem;
        ssl_certificate_key /etc/key.pem;
        location /short { return 200 "some words"; }
        location /none { return 404 "none"; }
        location /warm { return 204; }
    }
}
"#;

/// What goes into an image.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Full name with the tag.
    pub name: String,
    /// Path in the image (without the leading `/`) and file of this machine.
    pub files: Vec<(String, PathBuf)>,
    /// What runs.
    pub entrypoint: Vec<String>,
    /// Environment.
    pub environment: BTreeMap<String, String>,
    /// `UID:GID`; root if empty.
    pub user: String,
}

/// Writes the archive.
///
/// # Errors
/// A file cannot be read, or the archive not be written.
pub fn write(image: &Image, archive: &Path) -> anyhow::Result<()> {
    let layer_path = archive.with_extension("layer");
    let (layer_digest, layer_size) = write_layer(image, &layer_path)?;
    let environment: Vec<String> = image
        .environment
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Entrypoint": image.entrypoint, "Env": environment, "User": image.user, "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
        "history": [{ "created_by": "ec-e2e" }],
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer_digest, "size": layer_size }],
    }))?;
    let mut described = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    if let Value::Object(fields) = &mut described {
        let tag = image.name.rsplit(':').next().unwrap_or_default();
        fields.insert(
            "annotations".to_owned(),
            json!({ "io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": tag }),
        );
    }
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [described] }))?;
    let part = archive.with_extension("part");
    let mut tar = tar::Builder::new(File::create(&part).with_context(|| format!("make {}", part.display()))?);
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", &index)?;
    append(&mut tar, &blob(&digest(&config)), &config)?;
    append(&mut tar, &blob(&digest(&manifest)), &manifest)?;
    let mut layer = File::open(&layer_path).with_context(|| format!("open {}", layer_path.display()))?;
    tar.append_data(&mut header(layer_size, 0o644), blob(&layer_digest), &mut layer)?;
    tar.into_inner()?.flush()?;
    fs::remove_file(&layer_path).with_context(|| format!("remove {}", layer_path.display()))?;
    fs::rename(&part, archive).with_context(|| format!("write {}", archive.display()))
}

/// Writes the archives of all images that the tests need: workload and product, and for a cluster of our own (`programs` has
/// its programs) pause and DNS. `dist` has the static programs of this project.
///
/// # Errors
/// A program is missing.
pub fn write_all(dist: &Path, programs: Option<&Path>, directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let mut all = vec![
        ("workload.tar", workload(dist, directory)?),
        ("ebpf-collector.tar", product(dist)),
    ];
    if let Some(programs) = programs {
        all.extend([("pause.tar", pause(dist)), ("coredns.tar", dns(programs))]);
    }
    let mut archives = Vec::new();
    for (file, image) in all {
        let archive = directory.join(file);
        write(&image, &archive)?;
        archives.push(archive);
    }
    Ok(archives)
}

fn pause(dist: &Path) -> Image {
    Image {
        name: PAUSE.to_owned(),
        files: vec![("pause".to_owned(), dist.join("test/pause"))],
        entrypoint: vec!["/pause".to_owned()],
        user: "65535:65535".to_owned(),
        ..Image::default()
    }
}

fn dns(programs: &Path) -> Image {
    Image {
        name: DNS.to_owned(),
        files: vec![("coredns".to_owned(), programs.join("coredns"))],
        entrypoint: vec!["/coredns".to_owned()],
        ..Image::default()
    }
}

fn workload(dist: &Path, written: &Path) -> anyhow::Result<Image> {
    let mut files: BTreeMap<String, PathBuf> = ["traffic", "dataway-stub"]
        .map(|name| (format!("usr/bin/{name}"), dist.join("test").join(name)))
        .into();
    let signed = rcgen::generate_simple_self_signed(vec!["e2e".to_owned()]).context("make a certificate")?;
    for (path, content) in [
        ("etc/passwd", PASSWD),
        ("etc/group", GROUP),
        ("etc/nginx.conf", NGINX),
        ("etc/cert.pem", &signed.cert.pem()),
        ("etc/key.pem", &signed.signing_key.serialize_pem()),
    ] {
        let file = written.join(path.replace('/', "-"));
        fs::write(&file, content).with_context(|| format!("write {}", file.display()))?;
        files.insert(path.to_owned(), file);
    }
    for (path, program) in [
        ("usr/bin/bash", "/bin/bash"),
        ("usr/bin/curl", "/usr/bin/curl"),
        ("usr/bin/nginx", "/usr/sbin/nginx"),
    ] {
        files.extend(with_libraries(path, Path::new(program))?);
    }
    Ok(Image {
        name: WORKLOAD.to_owned(),
        files: files.into_iter().collect(),
        environment: [("PATH".to_owned(), "/usr/bin".to_owned())].into(),
        ..Image::default()
    })
}

/// A program of this machine, with the libraries that it is linked to at the paths where it looks for them.
fn with_libraries(path: &str, program: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let program =
        fs::canonicalize(program).with_context(|| format!("find {}, for pods that run it", program.display()))?;
    let output = Command::new("ldd").arg(&program).output().context("start ldd")?;
    anyhow::ensure!(
        output.status.success(),
        "ldd {} ended with {}",
        program.display(),
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let mut files = vec![(path.to_owned(), program)];
    files.extend(libraries.map(|path| (path.trim_start_matches('/').to_owned(), PathBuf::from(path))));
    Ok(files)
}

/// The same content as the `prebuilt` stage of the Dockerfile.
fn product(dist: &Path) -> Image {
    let programs = ["node-agent", "aggregator", "operator"];
    let mut files: Vec<(String, PathBuf)> = programs.map(|name| (format!("usr/bin/{name}"), dist.join(name))).into();
    let certificates = "ca-certificates.crt";
    files.push((format!("etc/ssl/certs/{certificates}"), dist.join(certificates)));
    Image {
        name: PRODUCT.to_owned(),
        files,
        environment: [
            ("PATH".to_owned(), "/usr/bin".to_owned()),
            ("SSL_CERT_FILE".to_owned(), format!("/etc/ssl/certs/{certificates}")),
        ]
        .into(),
        user: "65532:65532".to_owned(),
        ..Image::default()
    }
}

fn write_layer(image: &Image, path: &Path) -> anyhow::Result<(String, u64)> {
    let mut tar = tar::Builder::new(File::create(path).with_context(|| format!("make {}", path.display()))?);
    for (name, source) in &image.files {
        let mut file =
            File::open(source).with_context(|| format!("open {} for image {}", source.display(), image.name))?;
        let size = file.metadata()?.len();
        tar.append_data(&mut header(size, 0o755), name, &mut file)
            .with_context(|| format!("put {} into an image", source.display()))?;
    }
    tar.into_inner()?.flush()?;
    let mut file = File::open(path)?;
    let (mut hasher, mut buffer, mut size) = (Sha256::new(), vec![0; 1 << 16], 0_u64);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            length => {
                hasher.update(buffer.get(..length).unwrap_or_default());
                size += length as u64;
            }
        }
    }
    Ok((format!("sha256:{}", hex(&hasher.finalize())), size))
}

/// The same bytes give the same archive: no time, no owner.
fn header(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header.set_entry_type(tar::EntryType::Regular);
    header
}

fn append(tar: &mut tar::Builder<File>, name: &str, bytes: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(bytes.len() as u64, 0o644), name, bytes)
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": kind, "digest": digest(bytes), "size": bytes.len() })
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_what_its_digests_say() {
        let directory = std::env::temp_dir().join(format!("ec-e2e-image-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("program");
        fs::write(&file, "what runs").unwrap();
        let archive = directory.join("image.tar");
        let image = Image {
            name: "docker.io/ec-e2e/test:1".to_owned(),
            files: vec![("usr/bin/program".to_owned(), file)],
            entrypoint: vec!["/usr/bin/program".to_owned()],
            ..Image::default()
        };
        write(&image, &archive).unwrap();
        let mut found = BTreeMap::new();
        for entry in tar::Archive::new(File::open(&archive).unwrap()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            if let Some(name) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(name, hex(&Sha256::digest(&bytes)), "{path}");
            }
            found.insert(path, bytes);
        }
        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let index = json(&found["index.json"]);
        let manifest = json(&found[&blob(index["manifests"][0]["digest"].as_str().unwrap())]);
        let config = json(&found[&blob(manifest["config"]["digest"].as_str().unwrap())]);
        let layer = &found[&blob(manifest["layers"][0]["digest"].as_str().unwrap())];
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(manifest["layers"][0]["size"], layer.len());
        let mut layer = tar::Archive::new(layer.as_slice());
        let mut entry = layer.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap().display().to_string(), "usr/bin/program");
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        assert_eq!(text, "what runs");
        fs::remove_dir_all(&directory).unwrap();
    }
}
