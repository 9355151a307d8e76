//! Patterns of HTTP paths: `/users/{id}/orders/*`.

use std::{fmt, str::FromStr};

/// Longest pattern, in bytes.
const LENGTH_MAX: usize = 512;
/// Most segments of a pattern.
const SEGMENTS_MAX: usize = 32;

/// A pattern of paths. `{name}` stands for one segment that is not empty, `*` at the end for one or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRoute(String);

/// A part of a pattern, between two slashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutePart<'a> {
    /// This text.
    Text(&'a str),
    /// Any one segment that is not empty.
    Any,
    /// All that follows.
    Rest,
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{pattern}` at byte {at}: {why}")]
pub struct BadRoute {
    /// The text, as much of it as is of use.
    pub pattern: String,
    /// Where it goes wrong, from 1.
    pub at: usize,
    /// What is wrong.
    pub why: &'static str,
}

impl HttpRoute {
    /// The pattern as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its parts; an empty last one if it ends with a slash.
    pub fn parts(&self) -> impl Iterator<Item = RoutePart<'_>> {
        self.0.split('/').skip(1).map(|part| match part {
            "*" => RoutePart::Rest,
            part if part.starts_with('{') => RoutePart::Any,
            part => RoutePart::Text(part),
        })
    }

    /// True if both match the same paths.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        self.parts().eq(other.parts())
    }
}

impl FromStr for HttpRoute {
    type Err = BadRoute;

    fn from_str(text: &str) -> Result<Self, BadRoute> {
        let bad = |at: usize, why| {
            Err(BadRoute {
                pattern: text.chars().take(80).collect(),
                at: at + 1,
                why,
            })
        };
        if text.len() > LENGTH_MAX {
            return bad(LENGTH_MAX, "a pattern has at most 512 bytes");
        }
        let Some(rest) = text.strip_prefix('/') else {
            return bad(0, "a pattern begins with a slash");
        };
        if let Some(at) = text.find(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#')) {
            return bad(at, "no path has such a character");
        }
        let mut at = 1;
        let count = rest.split('/').count();
        if count > SEGMENTS_MAX {
            return bad(text.len(), "a pattern has at most 32 segments");
        }
        for (number, part) in rest.split('/').enumerate() {
            let last = number + 1 == count;
            if part == "*" {
                if !last {
                    return bad(at, "`*` stands at the end only; one segment is {name}");
                }
            } else if let Some(inner) = part.strip_prefix('{') {
                let Some(name) = inner.strip_suffix('}') else {
                    return bad(at, "a segment that begins with { ends with }");
                };
                if name.is_empty() {
                    return bad(at, "there is no name between { and }");
                }
                if let Some(inside) = name.find(['{', '}', '*']) {
                    return bad(at + 1 + inside, "a name has no braces and no `*`");
                }
            } else if let Some(inside) = part.find(['{', '}', '*']) {
                return bad(at + inside, "{name} and `*` are whole segments");
            } else if part.is_empty() && !last {
                return bad(at, "a segment is empty");
            }
            at += part.len() + 1;
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for HttpRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_read() {
        let parts = |text: &str| {
            text.parse::<HttpRoute>()
                .unwrap()
                .parts()
                .map(|part| format!("{part:?}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(parts("/users/{id}/*"), [r#"Text("users")"#, "Any", "Rest"]);
        assert_eq!(parts("/"), [r#"Text("")"#]);
        assert_eq!(parts("/a/"), [r#"Text("a")"#, r#"Text("")"#]);
        assert_eq!(parts("/*"), ["Rest"]);
        let like = |a: &str, b: &str| a.parse::<HttpRoute>().unwrap().is_like(&b.parse().unwrap());
        assert!(like("/a/{x}", "/a/{y}") && !like("/a/{x}", "/a/*"));
    }

    #[test]
    fn a_malformed_pattern_is_refused_where_it_goes_wrong() {
        let long = format!("/{}", "x".repeat(600));
        let deep = "/x".repeat(40);
        for (text, at) in [
            ("users/{id}", 1),
            ("", 1),
            ("/a/*/b", 4),
            ("/a/{id", 4),
            ("/a/{}", 4),
            ("/a/b{id}", 5),
            ("/a/b*", 5),
            ("/a/{i}d}", 6),
            ("/a//b", 4),
            ("/a?b", 3),
            ("/a b", 3),
            (&long, 513),
            (&deep, 81),
        ] {
            assert_eq!(text.parse::<HttpRoute>().unwrap_err().at, at, "{text}");
        }
    }
}
