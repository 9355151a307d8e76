//! A plain encoder and table by the letter of RFC 7541, to make blocks whose meaning is known.

use proptest::prelude::*;

use super::{Decoder, Field, Scratch};

/// The table as the RFC describes it: the newest first.
struct Model {
    table: Vec<(String, String)>,
    max: usize,
}

/// What to do next; indices are taken modulo what there is.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Indexed(usize),
    Literal {
        name: Result<usize, String>,
        value: String,
        mode: Mode,
    },
    /// Only at the beginning of a block; left out elsewhere.
    Resize(usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Mode {
    Add,
    Without,
    Never,
}

impl Model {
    fn evict(&mut self, room: usize) {
        let size = |table: &[(String, String)]| -> usize { table.iter().map(|(n, v)| n.len() + v.len() + 32).sum() };
        while !self.table.is_empty() && size(&self.table) + room > self.max {
            self.table.pop();
        }
    }

    /// Encodes a block and says what it means.
    fn block(&mut self, steps: &[Step]) -> (Vec<u8>, Vec<(String, String)>) {
        let (mut out, mut fields) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Resize(max) if fields.is_empty() => {
                    self.max = *max;
                    self.evict(0);
                    integer(&mut out, 0x20, 5, *max);
                }
                Step::Resize(_) => {}
                Step::Indexed(at) => {
                    if let Some(field) = self.table.get(at % self.table.len().max(1)).cloned() {
                        integer(&mut out, 0x80, 7, 62 + at % self.table.len());
                        fields.push(field);
                    }
                }
                Step::Literal { name, value, mode } => {
                    let (first, bits) = match mode {
                        Mode::Add => (0x40, 6),
                        Mode::Without => (0x00, 4),
                        Mode::Never => (0x10, 4),
                    };
                    let name = match name {
                        Ok(at) if !self.table.is_empty() => {
                            let at = at % self.table.len();
                            integer(&mut out, first, bits, 62 + at);
                            self.table[at].0.clone()
                        }
                        Ok(_) => continue,
                        Err(name) => {
                            integer(&mut out, first, bits, 0);
                            string(&mut out, name);
                            name.clone()
                        }
                    };
                    string(&mut out, value);
                    fields.push((name.clone(), value.clone()));
                    if matches!(mode, Mode::Add) {
                        let size = name.len() + value.len() + 32;
                        self.evict(size);
                        if size <= self.max {
                            self.table.insert(0, (name, value.clone()));
                        }
                    }
                }
            }
        }
        (out, fields)
    }
}

fn integer(out: &mut Vec<u8>, first: u8, bits: u8, value: usize) {
    let mask = (1 << bits) - 1;
    if value < mask {
        out.push(first | value as u8);
        return;
    }
    out.push(first | mask as u8);
    let mut value = value - mask;
    while value >= 128 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn string(out: &mut Vec<u8>, text: &str) {
    integer(out, 0, 7, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn step() -> impl Strategy<Value = Step> {
    let name = prop_oneof![
        any::<usize>().prop_map(Ok),
        prop::sample::select(vec!["a", "kept-b", "kept-c", ":path", "long-name-of-no-interest"])
            .prop_map(|name| Err(name.to_owned())),
    ];
    let mode = prop_oneof![4 => Just(Mode::Add), 1 => Just(Mode::Without), 1 => Just(Mode::Never)];
    prop_oneof![
        6 => any::<usize>().prop_map(Step::Indexed),
        6 => (name, "[a-z/]{0,90}", mode).prop_map(|(name, value, mode)| Step::Literal { name, value, mode }),
        1 => prop::sample::select(vec![0, 64, 200, 4096]).prop_map(Step::Resize),
    ]
}

fn kept(name: &[u8]) -> bool {
    name.starts_with(b"kept") || name == b":path"
}

/// What a decoder says; `None` for what it does not know.
fn decoded(decoder: &mut Decoder, block: &[u8]) -> Vec<Option<(String, String)>> {
    let mut fields = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    decoder
        .decode(block, &mut Scratch::default(), &mut |field| {
            fields.push(match field {
                Field::Known(name, value) => Some((text(name), text(value))),
                Field::Unknown => None,
            });
        })
        .unwrap();
    fields
}

proptest! {
    #[test]
    fn agrees_with_the_model(
        blocks in prop::collection::vec(prop::collection::vec(step(), 1..12), 1..20),
        joins_at in 0..20_usize,
        misses in 0..20_usize,
    ) {
        let mut model = Model { table: Vec::new(), max: 4096 };
        let mut whole = Decoder::new(true, |_| true);
        let mut some = Decoder::new(true, kept);
        let mut joined = Decoder::new(false, |_| true);
        let mut missing = Decoder::new(true, |_| true);
        for (number, steps) in blocks.iter().enumerate() {
            let (block, fields) = model.block(steps);
            let expected: Vec<_> = fields.iter().cloned().map(Some).collect();
            prop_assert_eq!(decoded(&mut whole, &block), expected.clone());
            let of_interest: Vec<_> = fields.iter().filter(|(name, _)| kept(name.as_bytes())).cloned().map(Some).collect();
            prop_assert_eq!(decoded(&mut some, &block), of_interest);
            // One that came later, and one that missed a block: each field is right or not known.
            if number >= joins_at {
                let told = decoded(&mut joined, &block);
                prop_assert_eq!(told.len(), expected.len());
                for (told, expected) in told.iter().zip(&expected) {
                    prop_assert!(told.is_none() || told == expected, "{:?} for {:?}", told, expected);
                }
            }
            if number == misses {
                missing.forget();
            } else {
                for (told, expected) in decoded(&mut missing, &block).iter().zip(&expected) {
                    prop_assert!(told.is_none() || told == expected, "{:?} for {:?}", told, expected);
                }
            }
        }
    }
}
