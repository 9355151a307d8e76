//! Deterministic sizes: both ends of a connection derive the same payload sizes from a seed and the client's port, so
//! that no header travels and a payload of 0 or 1 byte is possible.

/// A range of payload sizes, bytes, both ends included. Text form `MIN-MAX` or `N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Smallest size.
    pub min: u32,
    /// Largest size.
    pub max: u32,
}

/// Why a size range was refused.
#[derive(Debug, thiserror::Error)]
#[error("size range `{0}` is neither N nor MIN-MAX with MIN <= MAX, in bytes")]
pub struct BadSizes(String);

/// A small fast generator (splitmix64); the same seed gives the same sequence on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

// === impl Rng ===

impl Rng {
    /// A generator for `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

// === impl Sizes ===

impl Sizes {
    /// True when there is only one possible size, so that callers can skip finding out the port.
    #[must_use]
    pub fn is_fixed(self) -> bool {
        self.min == self.max
    }

    /// A size from `bits`: one in eight the smallest, one in eight the next, else spread evenly over the orders of
    /// magnitude, since small payloads are both the common and the difficult case.
    #[must_use]
    pub fn pick(self, bits: u64) -> usize {
        if self.is_fixed() {
            return self.min as usize;
        }
        let span = u64::from(self.max - self.min);
        let offset = match bits & 7 {
            0 => 0,
            1 => 1,
            _ => {
                let width = 64 - span.leading_zeros();
                let shift = u32::try_from((bits >> 3) & 63).unwrap_or(0) % width;
                (bits >> 9) % ((span >> shift) + 1)
            }
        };
        self.min as usize + usize::try_from(offset.min(span)).unwrap_or(0)
    }

    /// The size of message `round` of the connection from `port`; `salt` tells the two directions apart.
    #[must_use]
    pub fn of_connection(self, seed: u64, port: u16, round: u32, salt: u64) -> usize {
        self.pick(mix(seed
            ^ (u64::from(port) << 40)
            ^ (u64::from(round) << 8)
            ^ salt.wrapping_mul(0x2545_f491_4f6c_dd1d)))
    }
}

impl std::str::FromStr for Sizes {
    type Err = BadSizes;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadSizes(text.to_owned());
        let (min, max) = text.split_once('-').unwrap_or((text, text));
        let sizes = Self {
            min: min.trim().parse().map_err(|_| bad())?,
            max: max.trim().parse().map_err(|_| bad())?,
        };
        if sizes.min <= sizes.max { Ok(sizes) } else { Err(bad()) }
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.min, self.max)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_stay_in_range_and_reach_the_edges() {
        let sizes: Sizes = "0-9000".parse().unwrap();
        let mut rng = Rng::new(7);
        let picked: Vec<usize> = (0..20_000).map(|_| sizes.pick(rng.next_u64())).collect();
        assert!(picked.iter().all(|size| *size <= 9000));
        assert!(picked.contains(&0) && picked.contains(&1));
        assert!(picked.iter().any(|size| *size > 8500), "large sizes are missing");
    }

    #[test]
    fn both_ends_agree_and_directions_differ() {
        let sizes: Sizes = "0-65535".parse().unwrap();
        let there: Vec<usize> = (1..100).map(|port| sizes.of_connection(3, port, 0, 1)).collect();
        let again: Vec<usize> = (1..100).map(|port| sizes.of_connection(3, port, 0, 1)).collect();
        let back: Vec<usize> = (1..100).map(|port| sizes.of_connection(3, port, 0, 2)).collect();
        assert_eq!(there, again);
        assert_ne!(there, back);
    }

    #[test]
    fn bad_ranges_are_refused_with_their_text() {
        for text in ["", "9-3", "x", "1-"] {
            assert!(text.parse::<Sizes>().unwrap_err().to_string().contains(text));
        }
    }
}
