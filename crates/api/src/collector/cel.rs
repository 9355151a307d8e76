//! Parts of the schema that attributes cannot hold: validation rules (CEL) and patterns.
//!
//! The API server bounds the cost of every rule by the sizes in the schema: each list, map and text that a rule looks at
//! has a maximum.

use serde_json::{Value, json};

use crate::check::RECORD_KEYS;

/// A duration with units that both CEL and the options read.
pub(crate) const DURATION: &str = "^([0-9]{1,6}(ms|s|m|h)){1,4}$";
/// A size with its unit.
pub(crate) const SIZE: &str = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?([bB]|[kKmMgGtT][bB]?|[kKmMgGtT][iI][bB])$";
/// A size per second.
pub(crate) const RATE: &str = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?([bB]|[kKmMgGtT][bB]?|[kKmMgGtT][iI][bB])(/[sS])?$";
/// A power of two from 64KiB to 1GiB.
pub(crate) const RING_BUFFER: &str = "^((64|128|256|512)KiB|(1|2|4|8|16|32|64|128|256|512|1024)MiB|1GiB)$";
/// Rules by `;` or line: words, comparisons and calls, joined by `&&` and `||`, with brackets and `!`. Whether brackets
/// pair up is beyond a pattern.
pub(crate) const BLACKLIST: &str = concat!(
    r"^[\s(!]*",
    r#"[a-z0-9_]+(\s*(==|!=|<=|>=|<|>)\s*('[^']*'|"[^"]*"|[0-9]+|true|false)|\([^()]*\))?"#,
    r"[\s)]*((&&|\|\||;|\n)[\s(!]*",
    r#"[a-z0-9_]+(\s*(==|!=|<=|>=|<|>)\s*('[^']*'|"[^"]*"|[0-9]+|true|false)|\([^()]*\))?"#,
    r"[\s)]*)*[;\s]*$"
);
/// A host and port.
pub(crate) const HOST_PORT: &str = r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$";
/// The address of an HTTP server.
pub(crate) const HTTP_URL: &str = r"^https?://[^\s#@]+$";

/// One rule with the message shown when it does not hold.
pub(crate) fn rule(rule: &str, message: &str) -> Value {
    json!({ "rule": rule, "message": message })
}

/// `enabled` of the object at `path`, where absent means on.
fn on(path: &str) -> String {
    format!("(!has({path}.enabled) || {path}.enabled)")
}

/// Rules of the whole spec.
pub(crate) fn spec_rules() -> Value {
    let trace_in_a_rule = "has(self.namespaces) && self.namespaces.exists(n, has(n.plugins) && \
         has(n.plugins.ebpf__dash__trace) && has(n.plugins.ebpf__dash__trace.enabled) && \
         n.plugins.ebpf__dash__trace.enabled)";
    json!([rule(
        &format!(
            "!({trace_in_a_rule}) || (has(self.plugins) && has(self.plugins.ebpf__dash__trace) && \
             has(self.plugins.ebpf__dash__trace.server))"
        ),
        "a namespace rule enables ebpf-trace: plugins.ebpf-trace.server is needed",
    )])
}

/// Rules of `plugins`.
pub(crate) fn plugins_rules() -> Value {
    let net = "self.ebpf__dash__net";
    json!([rule(
        &format!(
            "!has(self.ebpf__dash__trace) || !{} || (has({net}) && {} && (has({net}.l7) ? 'httpflow' in {net}.l7 : \
             (!has({net}.l7Disabled) || !('httpflow' in {net}.l7Disabled))))",
            on("self.ebpf__dash__trace"),
            on(net)
        ),
        "ebpf-trace is made from the requests that ebpf-net reads: enable ebpf-net with httpflow too",
    )])
}

/// Rules of an object with `l7` and `l7Disabled`.
pub(crate) fn l7_rules() -> Value {
    json!([rule(
        "!(has(self.l7) && has(self.l7Disabled))",
        "l7 and l7Disabled exclude each other"
    )])
}

/// Rules of `plugins.ebpf-trace`.
pub(crate) fn trace_rules() -> Value {
    json!([rule(
        "(has(self.enabled) && !self.enabled) || has(self.server)",
        "ebpf-trace has nowhere to send its spans: set server to host:port, or enabled to false",
    )])
}

/// Rules of `plugins.bpf-netlog`.
pub(crate) fn netlog_rules() -> Value {
    json!([rule(
        "(has(self.enabled) && !self.enabled) || !has(self.metric) || self.metric || (has(self.log) && self.log)",
        "bpf-netlog makes neither records nor logs: set metric or log to true, or enabled to false",
    )])
}

/// Rules of `sampling`.
pub(crate) fn sampling_rules() -> Value {
    json!([
        rule(
            "!(has(self.rate) && has(self.ptsPerMin))",
            "rate and ptsPerMin exclude each other"
        ),
        rule(
            "!has(self.rate) || self.rate >= 0.01",
            "rate is a number from 0.01 to 1"
        ),
    ])
}

/// Rules of `limits`. The server compares a whole number with the whole part of `minimum`, so 0 passes for 0.01 there.
pub(crate) fn limits_rules() -> Value {
    json!([rule(
        "!has(self.cpu) || self.cpu >= 0.01",
        "cpu is a number of cores from 0.01 to 1024"
    )])
}

/// Rules of a duration between two others.
pub(crate) fn duration_rules(min: &str, max: &str) -> Value {
    json!([rule(
        &format!("duration(self) >= duration('{min}') && duration(self) <= duration('{max}')"),
        &format!("must be a duration from {min} to {max}"),
    )])
}

/// Rules of the user's tags.
pub(crate) fn tags_rules() -> Value {
    let reserved: Vec<String> = RECORD_KEYS.iter().map(|key| format!("'{key}'")).collect();
    json!([
        rule(
            "self.all(k, k.matches('^[A-Za-z_][A-Za-z0-9_-]{0,255}$'))",
            "keys are letters, digits, `_` and `-`, at most 256, and start with a letter or `_`",
        ),
        rule(
            &format!("self.all(k, !(k in [{}]))", reserved.join(", ")),
            "a key is one of the records' own",
        ),
    ])
}

/// Rules of a size from 16 MiB, and up to `max` bytes if there is a limit.
pub(crate) fn size_rules(max: Option<f64>, accepted: &str) -> Value {
    let bytes = "double(self.find('^[0-9]+([.][0-9]+)?')) * {'b': 1.0, \
                 'k': 1000.0, 'kb': 1000.0, 'kib': 1024.0, \
                 'm': 1000000.0, 'mb': 1000000.0, 'mib': 1048576.0, \
                 'g': 1000000000.0, 'gb': 1000000000.0, 'gib': 1073741824.0, \
                 't': 1000000000000.0, 'tb': 1000000000000.0, 'tib': 1099511627776.0}\
                 [self.find('[A-Za-z]+$').lowerAscii()]";
    let upper = max.map_or_else(String::new, |max| format!(" && {bytes} <= {max:.1}"));
    json!([rule(&format!("{bytes} >= 16777216.0{upper}"), accepted)])
}

/// Rules of a rate. A rate of zero would be no limit at all.
pub(crate) fn rate_rules() -> Value {
    json!([rule(
        "double(self.find('^[0-9]+([.][0-9]+)?')) > 0.0",
        "must be a size per second above zero, such as 100MiB/s"
    )])
}

/// Rules of `dataway`.
pub(crate) fn dataway_rules() -> Value {
    // Whatever the case: the servers read the parameter that way.
    let token = "matches('[?&][tT][oO][kK][eE][nN]=')";
    json!([
        rule("has(self.url) != has(self.urls)", "set either url or urls"),
        rule(
            &format!("!(has(self.url) && self.url.{token}) && !(has(self.urls) && self.urls.exists(u, u.{token}))"),
            "a token does not stand in the object, which many may read: put it into a Secret and name that in \
             tokenSecretRef",
        ),
        rule(
            "has(self.tokenSecretRef)",
            "tokenSecretRef is needed: it names the Secret with the servers' token"
        ),
    ])
}

/// Rules of a namespace rule's `match`.
pub(crate) fn match_rules() -> Value {
    json!([rule(
        "has(self.names) != has(self.selector)",
        "set either names or selector"
    )])
}

/// Rules of the queue's storage.
pub(crate) fn storage_rules() -> Value {
    json!([rule(
        "has(self.emptyDir) != has(self.volumeClaim)",
        "set either emptyDir or volumeClaim"
    )])
}

/// Schema of a list's items: texts up to a length.
pub(crate) fn texts(max: u32) -> Value {
    json!({ "type": "string", "minLength": 1, "maxLength": max })
}
