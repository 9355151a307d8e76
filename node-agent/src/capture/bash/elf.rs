//! What an executable or a library has to do with `readline`, from its symbols.
//!
//! Lines are read at the instructions with which the function returns, not by a probe of its return: that one is set as a
//! call begins, and a shell that waits for its user is inside of the call already.
//!
//! Entry: [`inspect`].

use std::fs::File;

use crate::capture::elf::{self, Depth, Exits, Own, Place};

/// The function that reads a line.
const READLINE: &str = "readline";
/// A variable that every bash has.
const BASH: &str = "interactive_shell";
/// Bytes of symbols, or of their names, that are read of a program that nothing says is a bash. Bash has a tenth of it.
const GUESS_MAX: u64 = 1 << 20;
/// The same of one that is called bash, and of libraries.
const KNOWN_MAX: u64 = 32 << 20;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    /// File offsets of the instructions with which the function `readline` returns, if it is in here.
    pub(super) readline: Option<Vec<u64>>,
    /// It is in a library.
    pub(super) imports: bool,
    /// The program is a bash by its symbols.
    pub(super) is_bash: bool,
}

/// Why a file could not be looked into.
#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] elf::ElfError),
    /// The function is not made of what is expected.
    #[error("the returns of its readline cannot be made out")]
    Code,
}

/// Looks for `readline`. With `known`, also where only a program that is one already is worth the time.
///
/// # Errors
/// If the file is damaged or no ELF file.
pub(super) fn inspect(file: &File, known: bool) -> Result<Image, ElfError> {
    let depth = Depth {
        max: if known { KNOWN_MAX } else { GUESS_MAX },
        own: if known { Own::Always } else { Own::Never },
    };
    let mut image = Image::default();
    for symbol in elf::symbols(file, &[BASH, READLINE], depth)? {
        if symbol.name == 0 {
            image.is_bash = true;
            continue;
        }
        match symbol.place {
            Place::Elsewhere => image.imports = true,
            Place::Memory => {}
            Place::Here(code) => match code.exits {
                Exits::Returns(returns) | Exits::Elsewhere(returns) if !returns.is_empty() => {
                    image.readline = Some(returns);
                }
                _ => return Err(ElfError::Code),
            },
        }
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{
        io::{Seek as _, SeekFrom, Write as _},
        process::Command,
    };

    use super::*;

    fn of(path: &str, known: bool) -> Option<Image> {
        inspect(&File::open(path).ok()?, known).ok()
    }

    /// What binutils say of the same file: the returns of its dynamic symbol, and where they are in the file.
    fn by_binutils(path: &str) -> Option<Vec<u64>> {
        let say = |program: &str, options: &[&str]| {
            let output = Command::new(program).args(options).arg(path).output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let run = |option: &str| say("readelf", &["-W", option]);
        let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let symbols = run("--dyn-syms")?;
        let line = symbols
            .lines()
            .find(|line| line.split_whitespace().nth(7).is_some_and(|name| name == "readline"))?;
        let address = hex(line.split_whitespace().nth(1)?)?;
        let size: u64 = line.split_whitespace().nth(2)?.parse().ok()?;
        let code = say(
            "objdump",
            &[
                "-d",
                &format!("--start-address={address}"),
                &format!("--stop-address={}", address + size),
            ],
        )?;
        let returns = code.lines().filter_map(|line| {
            let (at, rest) = line.trim().split_once(":\t")?;
            rest.split('\t').any(|word| word.trim() == "ret").then(|| hex(at))?
        });
        let shift = run("--segments")?.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [kind, offset, start, _, size, ..] = words.as_slice() else {
                return None;
            };
            let (offset, start, size) = (hex(offset)?, hex(start)?, hex(size)?);
            (*kind == "LOAD" && (start..start + size).contains(&address)).then(|| start - offset)
        })?;
        Some(returns.map(|address| address - shift).collect())
    }

    #[test]
    fn finds_readline_where_binutils_do() {
        let Some(bash) = of("/bin/bash", true) else {
            println!("SKIPPED: this machine has no bash");
            return;
        };
        assert!(bash.is_bash);
        assert_eq!(of("/bin/bash", false), Some(bash.clone()), "whatever it is called");
        if let Some(returns) = by_binutils("/bin/bash") {
            assert!(!returns.is_empty());
            assert_eq!((bash.readline, bash.imports), (Some(returns), false));
        } else {
            println!("SKIPPED: no binutils");
        }
    }

    #[test]
    fn other_programs_are_none() {
        let own = std::env::current_exe().unwrap();
        let image = of(own.to_str().unwrap(), true).unwrap();
        assert_eq!(image, Image::default());
    }

    #[test]
    fn damaged_files_are_refused() {
        let Ok(bash) = std::fs::read("/bin/bash") else { return };
        let mut file = tempfile::tempfile().unwrap();
        for length in [0, 3, 16, 63, 64, 4096, bash.len() / 2, bash.len() - 1] {
            file.set_len(0).unwrap();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.write_all(&bash[..length]).unwrap();
            assert!(inspect(&file, true).is_err(), "{length}");
        }
        // Section headers that claim the moon.
        let mut bad = bash.clone();
        for at in (bash.len() - 1500..bash.len()).step_by(7) {
            bad[at] = 0xff;
        }
        file.set_len(0).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&bad).unwrap();
        let _ = inspect(&file, true);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
        /// Whatever a file says of itself.
        #[test]
        fn any_header_is_taken_or_refused(at in proptest::collection::vec((0..64usize, proptest::num::u8::ANY), 1..8)) {
            let Ok(mut bytes) = std::fs::read("/proc/self/exe").map(|mut bytes| { bytes.truncate(100_000); bytes }) else {
                return Ok(());
            };
            for (at, value) in at {
                bytes[at] = value;
            }
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let _ = inspect(&file, true);
        }
    }
}
