//! On programs that the `go` of this machine builds, each compared with what Go's and GNU's tools say of it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use proptest::prelude::*;

use super::{Go, GoError, GoTls, inspect};

const WRITE: &str = "crypto/tls.(*Conn).Write";
const READ: &str = "crypto/tls.(*Conn).Read";
const CLOSE: &str = "crypto/tls.(*Conn).Close";
const HANDSHAKES: [&str; 2] = [
    "crypto/tls.(*Conn).clientHandshake",
    "crypto/tls.(*Conn).serverHandshake",
];

/// A way to build it: its name, arguments of `go build`, and environment.
type Way = (
    &'static str,
    &'static [&'static str],
    &'static [(&'static str, &'static str)],
);

const WAYS: &[Way] = &[
    ("static", &[], &[("CGO_ENABLED", "0")]),
    ("cgo", &["-ldflags=-linkmode=external"], &[("CGO_ENABLED", "1")]),
    ("pie", &["-buildmode=pie"], &[("CGO_ENABLED", "0")]),
    (
        "pie-cgo",
        &["-buildmode=pie", "-ldflags=-linkmode=external"],
        &[("CGO_ENABLED", "1")],
    ),
    ("arm", &[], &[("CGO_ENABLED", "0"), ("GOARCH", "arm64")]),
];
/// Ways without symbols: arguments.
const STRIPPED: &[Way] = &[
    ("static-small", &["-ldflags=-s -w"], &[("CGO_ENABLED", "0")]),
    (
        "pie-small",
        &["-buildmode=pie", "-ldflags=-s -w"],
        &[("CGO_ENABLED", "0")],
    ),
];

/// Builds the pair of test programs, once per way.
fn build((name, args, environment): &(&str, &[&str], &[(&str, &str)])) -> Option<PathBuf> {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let to = DIRECTORY.get_or_init(|| tempfile::tempdir().unwrap()).path().join(name);
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&to)
        .args(*args)
        .envs(environment.iter().copied())
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/go/pair"))
        .output();
    let Ok(built) = built else {
        println!("SKIPPED: this machine has no go");
        return None;
    };
    let said = String::from_utf8_lossy(&built.stderr);
    if !built.status.success() && environment.contains(&("CGO_ENABLED", "1")) {
        println!("SKIPPED: {name}: no C compiler for cgo: {said}");
        return None;
    }
    assert!(built.status.success(), "{name}: {said}");
    Some(to)
}

fn run(program: &str, args: &[&str], file: &Path) -> String {
    let out = Command::new(program).args(args).arg(file).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// Address and size of a function, by `go tool nm`.
fn symbol(file: &Path, name: &str) -> (u64, u64) {
    let all = run("go", &["tool", "nm", "-size"], file);
    let found = all.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.get(3..) == Some(&[name])).then(|| (hex(words[0]), words[1].parse().unwrap()))
    });
    found.unwrap_or_else(|| panic!("no {name} in {}", file.display()))
}

/// Instructions of a function by `go tool objdump`: address and text.
fn instructions(file: &Path, name: &str) -> Vec<(u64, String)> {
    let all = run("go", &["tool", "objdump", "-s", &format!("^{}$", regex(name))], file);
    let parsed = all.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let address = words.get(1)?.strip_prefix("0x")?;
        Some((hex(address), words.get(3..)?.join(" ")))
    });
    parsed.collect()
}

fn regex(name: &str) -> String {
    name.chars()
        .flat_map(|c| [if "().*".contains(c) { "\\" } else { "" }.to_owned(), c.to_string()])
        .collect()
}

/// Where the segment of code is in the file, by its address, by `readelf`.
fn shift(file: &Path, address: u64) -> u64 {
    let all = run("readelf", &["-lW"], file);
    let found = all.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["LOAD", offset, start, _, size, ..] = words.as_slice() else {
            return None;
        };
        let (offset, start, size) = (hex(offset), hex(start), hex(size));
        (start..start + size).contains(&address).then(|| start - offset)
    });
    found.unwrap()
}

/// What is expected of a program with symbols, by the tools.
fn truth(file: &Path) -> GoTls {
    let body = |name: &str| {
        let (address, _) = symbol(file, name);
        let code = instructions(file, name);
        assert_eq!(code[0].0, address, "{name}");
        let at = code
            .iter()
            .position(|(_, text)| text.starts_with("JBE") || text.starts_with("BLS"))
            .unwrap();
        assert!(at < 6, "{name}: {code:?}");
        code[at + 1].0 - shift(file, address)
    };
    let returns = instructions(file, READ).into_iter().filter(|(_, text)| text == "RET");
    let version = run("go", &["version"], file);
    GoTls {
        version: version.rsplit(": ").next().unwrap().trim().to_owned(),
        write: body(WRITE),
        close: Some(body(CLOSE)),
        handshakes: HANDSHAKES.map(body).to_vec(),
        read_returns: returns.map(|(address, _)| address - shift(file, address)).collect(),
    }
}

fn look(file: &Path) -> Result<Go, GoError> {
    inspect(&File::open(file).unwrap())
}

fn found(file: &Path) -> GoTls {
    match look(file) {
        Ok(Go::Tls(found)) => found,
        other => panic!("{}: {other:?}", file.display()),
    }
}

#[test]
fn places_are_those_of_the_tools_however_a_program_is_built() {
    for way in WAYS {
        let Some(file) = build(way) else { continue };
        let truth = truth(&file);
        assert!(truth.read_returns.len() > 1, "{truth:?}");
        assert_eq!(found(&file), truth, "{}", way.0);
        // Without symbols, and then without names of sections, and without sections.
        let bare = file.with_extension("bare");
        fs::copy(&file, &bare).unwrap();
        if way.0 != "arm" {
            run("strip", &["--strip-all"], &bare);
            assert_eq!(found(&bare), truth, "{}, stripped", way.0);
        }
        let mut bytes = fs::read(&bare).unwrap();
        // e_shoff, e_shnum, e_shstrndx
        bytes[0x28..0x30].fill(0);
        bytes[0x3c..0x40].fill(0);
        fs::write(&bare, &bytes).unwrap();
        assert_eq!(found(&bare), truth, "{}, without sections", way.0);
    }
}

#[test]
fn programs_that_are_built_without_symbols_have_the_same_code() {
    for (way, like) in STRIPPED.iter().zip(["static", "pie"]) {
        let like = WAYS.iter().find(|way| way.0 == like).unwrap();
        let (Some(file), Some(like)) = (build(way), build(like)) else {
            continue;
        };
        assert!(
            run("readelf", &["-sW"], &file)
                .lines()
                .all(|line| !line.contains("crypto/tls"))
        );
        let (found, truth) = (found(&file), truth(&like));
        assert_eq!(found.version, truth.version);
        assert_eq!(found.read_returns.len(), truth.read_returns.len());
        // What differs is where it is, if anything: the code around each place is the same.
        let around = |file: &Path, at: u64| {
            let mut bytes = [0; 24];
            File::open(file).unwrap().read_exact_at(&mut bytes, at - 8).unwrap();
            bytes
        };
        let places = |of: &GoTls| [&[of.write, of.close.unwrap()][..], &of.read_returns, &of.handshakes].concat();
        for (ours, theirs) in places(&found).into_iter().zip(places(&truth)) {
            assert_eq!(
                around(&file, ours)[8..16],
                around(&like, theirs)[8..16],
                "{ours:x} {theirs:x}"
            );
        }
        assert_eq!(found.read_returns[0] - found.write, truth.read_returns[0] - truth.write);
    }
}

#[test]
fn what_is_no_go_program_or_has_no_tls_is_told_apart() {
    let own = std::env::current_exe().unwrap();
    assert_eq!(look(&own).unwrap(), Go::No);
    assert_eq!(look(Path::new("/proc/self/maps")).unwrap(), Go::No);
    // The compiler is a Go program without it.
    let Ok(root) = Command::new("go").args(["env", "GOTOOLDIR"]).output() else {
        println!("SKIPPED: this machine has no go");
        return;
    };
    let asm = PathBuf::from(String::from_utf8(root.stdout).unwrap().trim()).join("asm");
    assert_eq!(look(&asm).unwrap(), Go::WithoutTls);
}

/// A program with some bytes changed.
fn changed(original: &[u8], changes: &[(usize, u8)], length: usize) -> File {
    let mut bytes = original.to_vec();
    for (at, value) in changes {
        if let Some(byte) = bytes.get_mut(*at) {
            *byte = *value;
        }
    }
    bytes.truncate(length);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

#[test]
fn programs_that_are_cut_short_are_refused() {
    let Some(file) = build(&WAYS[2]) else { return };
    let original = fs::read(&file).unwrap();
    let length = original.len();
    for length in [0, 1, 63, 64, 100, 4096, length / 8, length / 4, length / 3, length / 2] {
        let result = inspect(&changed(&original, &[], length));
        assert!(!matches!(result, Ok(Go::Tls(_))), "{length}: {result:?}");
    }
}

/// Where what is parsed is: headers, the table's head and its beginnings, the module.
fn parsed_places(file: &Path) -> Vec<(usize, usize)> {
    let all = run("readelf", &["-SW"], file);
    let of = |name: &str| {
        let line = all.lines().find(|line| line.contains(name))?;
        let words: Vec<&str> = line.split(name).nth(1)?.split_whitespace().collect();
        Some(usize::try_from(hex(words[2])).unwrap())
    };
    let mut places = vec![(0, 64 + 56 * 12)];
    for name in [
        ".gopclntab ",
        ".go.buildinfo ",
        ".go.module ",
        ".rela ",
        ".rela.dyn ",
        ".dynamic ",
    ] {
        places.extend(of(name).map(|offset| (offset, 256)));
    }
    places
}

#[test]
fn damaged_programs_end_in_an_answer() {
    let Some(file) = build(&WAYS[2]) else { return };
    let (original, places) = (fs::read(&file).unwrap(), parsed_places(&file));
    let change = (proptest::sample::select(places), 0..1000usize, any::<u8>());
    let all = proptest::collection::vec(change, 1..6);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(150));
    let result = runner.run(&all, |changes| {
        let changes: Vec<_> = changes
            .iter()
            .map(|((at, size), n, value)| (at + n % size, *value))
            .collect();
        if let Ok(Go::Tls(found)) = inspect(&changed(&original, &changes, original.len())) {
            // Whatever it says, it is in the file.
            prop_assert!(found.read_returns.iter().all(|at| (*at as usize) < original.len()));
        }
        Ok(())
    });
    result.unwrap();
}

/// Each word of the table's head, and many of its entries, made as large as can be.
#[test]
fn tables_that_claim_the_moon_are_refused() {
    let Some(file) = build(&WAYS[0]) else { return };
    let (original, places) = (fs::read(&file).unwrap(), parsed_places(&file));
    let (table, _) = places[1];
    for field in 1..9 {
        let changes: Vec<_> = (0..8).map(|n| (table + 8 * field + n, 0xff)).collect();
        let result = inspect(&changed(&original, &changes, original.len()));
        // Files and units of the table are not read; where code begins is taken from the module.
        let spared = matches!(field, 2 | 3 | 6 | 7);
        assert_eq!(matches!(result, Ok(Go::Tls(_))), spared, "{field}: {result:?}");
    }
    // Descriptions far apart: each look is a read of its own, until the budget is spent.
    let functions =
        table + usize::try_from(u64::from_le_bytes(original[table + 64..table + 72].try_into().unwrap())).unwrap();
    let end = original.len() - functions;
    let changes: Vec<_> = (0..60_000usize)
        .flat_map(|n| {
            let far = if n % 2 == 0 { 600_000u32 } else { 1_900_000 }.min(end as u32);
            far.to_le_bytes()
                .into_iter()
                .enumerate()
                .map(move |(byte, value)| (functions + 8 * n + 4 + byte, value))
        })
        .collect();
    let started = std::time::Instant::now();
    let result = inspect(&changed(&original, &changes, original.len()));
    assert!(
        matches!(result, Err(GoError::Damaged(_) | GoError::Table(_))),
        "{result:?}"
    );
    assert!(started.elapsed() < std::time::Duration::from_secs(10));
}
