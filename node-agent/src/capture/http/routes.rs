//! Patterns that stand for the paths that match them, so that many paths are one series. Pure.
//!
//! The patterns are a tree of segments; a path goes down it once. Entry: [`Routes::of`].

use ahash::RandomState;
use api::{HttpRoute, RoutePart};
use hashbrown::HashMap;

/// All patterns.
#[derive(Debug, Default)]
pub(super) struct Routes {
    patterns: Vec<Box<str>>,
    nodes: Vec<Node>,
}

/// What may follow the same beginning. Numbers are of `nodes` and of `patterns`.
#[derive(Debug, Default)]
struct Node {
    texts: HashMap<Box<str>, usize, RandomState>,
    any: Option<usize>,
    rest: Option<usize>,
    end: Option<usize>,
}

impl Routes {
    pub(super) fn new(routes: &[HttpRoute]) -> Self {
        let mut this = Self::default();
        for route in routes {
            let number = this.patterns.len();
            this.patterns.push(route.as_str().into());
            this.insert(route, number);
        }
        this
    }

    fn insert(&mut self, route: &HttpRoute, number: usize) {
        if self.nodes.is_empty() {
            self.nodes.push(Node::default());
        }
        let mut at = 0;
        for part in route.parts() {
            let new = self.nodes.len();
            let Some(node) = self.nodes.get_mut(at) else { return };
            at = match part {
                RoutePart::Text(text) => *node.texts.entry(text.into()).or_insert(new),
                RoutePart::Any => *node.any.get_or_insert(new),
                RoutePart::Rest => {
                    node.rest.get_or_insert(number);
                    return;
                }
            };
            if at == new {
                self.nodes.push(Node::default());
            }
        }
        if let Some(node) = self.nodes.get_mut(at) {
            node.end.get_or_insert(number);
        }
    }

    /// The pattern that a path matches. Of one that was cut, only patterns match for which it does not matter how it goes on.
    pub(super) fn of(&self, path: &str, cut: bool) -> Option<&str> {
        if self.nodes.is_empty() {
            return None;
        }
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let number = self.find(0, path.strip_prefix('/')?, cut)?;
        self.patterns.get(number).map(|pattern| &**pattern)
    }

    /// Goes no deeper than patterns have segments, and comes to each node once at most.
    fn find(&self, node: usize, path: &str, cut: bool) -> Option<usize> {
        let node = self.nodes.get(node)?;
        let (segment, behind) = match memchr::memchr(b'/', path.as_bytes()) {
            Some(at) => (path.get(..at)?, path.get(at + 1..)),
            None => (path, None),
        };
        let below = |next: usize| match behind {
            Some(path) => self.find(next, path, cut),
            None if cut => None,
            None => self.nodes.get(next)?.end,
        };
        // A segment that was cut may have been another text.
        let text = node.texts.get(segment).copied().filter(|_| !cut || behind.is_some());
        text.and_then(below)
            .or_else(|| node.any.filter(|_| !segment.is_empty()).and_then(below))
            .or_else(|| node.rest.filter(|_| !path.is_empty()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn routes(patterns: &[&str]) -> Routes {
        let patterns: Vec<HttpRoute> = patterns.iter().map(|pattern| pattern.parse().unwrap()).collect();
        Routes::new(&patterns)
    }

    #[test]
    fn paths_are_told_as_their_patterns() {
        let routes = routes(&[
            "/users/{id}",
            "/users/{id}/orders/*",
            "/users/me",
            "/users/{id}/orders/last",
            "/static/*",
            "/a/",
            "/{x}/b/c",
            "/",
        ]);
        for (path, pattern) in [
            ("/users/17", Some("/users/{id}")),
            ("/users/me", Some("/users/me")),
            ("/users/me?x=/users/1", Some("/users/me")),
            ("/users/me/orders/9/items", Some("/users/{id}/orders/*")),
            ("/users/17/orders/last", Some("/users/{id}/orders/last")),
            ("/users/17/orders/last/", Some("/users/{id}/orders/*")),
            ("/users/17/orders/", None),
            ("/users/17/orders", None),
            ("/users/", None),
            ("/users", None),
            ("/static/a/b/c", Some("/static/*")),
            ("/a/", Some("/a/")),
            ("/a", None),
            // Not by the text of the first segment, so by its place.
            ("/users/b/c", Some("/{x}/b/c")),
            ("/", Some("/")),
            ("", None),
            ("users/17", None),
            ("*", None),
        ] {
            assert_eq!(routes.of(path, false), pattern, "{path}");
        }
        for (cut, pattern) in [
            ("/users/17/orders/la", Some("/users/{id}/orders/*")),
            ("/users/17/orders/last", Some("/users/{id}/orders/*")),
            ("/users/17", None),
            ("/static/x", Some("/static/*")),
        ] {
            assert_eq!(routes.of(cut, true), pattern, "{cut}");
        }
        assert_eq!(Routes::default().of("/a", false), None);
    }

    #[test]
    fn many_patterns_are_found_fast() {
        let patterns: Vec<String> = (0..250)
            .map(|n| format!("/api/v{}/kind{n}/{{id}}/part/*", n % 5))
            .collect();
        let routes = routes(&patterns.iter().map(String::as_str).collect::<Vec<_>>());
        let rounds = 20_000;
        let mut best = Duration::MAX;
        for _ in 0..5 {
            let begun = Instant::now();
            for _ in 0..rounds {
                let path = std::hint::black_box("/api/v2/kind247/0123-4567-89ab/part/a/b/c");
                assert_eq!(routes.of(path, false), Some("/api/v2/kind247/{id}/part/*"));
            }
            best = best.min(begun.elapsed());
        }
        println!("{} ns per path", best.as_nanos() / rounds);
        // Optimised it is below 200 ns; what is built for debugging takes longer.
        assert!(best.as_nanos() / rounds < if cfg!(debug_assertions) { 20_000 } else { 200 });
    }
}
