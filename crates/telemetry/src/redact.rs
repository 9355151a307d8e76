//! Redaction: no secret of a URL reaches a log line, a metric or an error.

/// What stands in the place of a secret.
pub const REDACTED: &str = "***";

/// Hides the value of every query parameter whose name holds `token`, `secret`, `password` or `key`, and the userinfo
/// part of every URL in `text`. Works on whole messages as well as on a bare URL; other text is unchanged.
#[must_use]
pub fn redact_url(text: &str) -> String {
    let text = redact_parameters(text);
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find("://") {
        let (head, tail) = rest.split_at(at + 3);
        out.push_str(head);
        let authority_end = tail
            .find(|c: char| c.is_whitespace() || "/?#\"'<>".contains(c))
            .unwrap_or(tail.len());
        let (authority, tail) = tail.split_at(authority_end);
        match authority.rfind('@') {
            Some(at) => {
                out.push_str(REDACTED);
                out.push_str(authority.get(at..).unwrap_or_default());
            }
            None => out.push_str(authority),
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

/// Hides `name=value` values of secret names, where a name follows the start, `?`, `&`, `;`, a quote or white space.
fn redact_parameters(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(equals) = rest.find('=') {
        let (head, tail) = rest.split_at(equals);
        let name = head
            .rsplit(|c: char| is_delimiter(c) || c == '?')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        out.push_str(head);
        out.push('=');
        let tail = tail.get(1..).unwrap_or_default();
        let value_end = tail.find(is_delimiter).unwrap_or(tail.len());
        if value_end > 0
            && ["token", "secret", "password", "key"]
                .iter()
                .any(|word| name.contains(word))
        {
            out.push_str(REDACTED);
            rest = tail.get(value_end..).unwrap_or_default();
        } else {
            rest = tail;
        }
    }
    out.push_str(rest);
    out
}

fn is_delimiter(c: char) -> bool {
    c.is_whitespace() || "&;,#\"'<>)".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hides_tokens_and_userinfo_and_nothing_else() {
        for (text, want) in [
            (
                "https://h:9/v1/write/network?token=tkn_abc",
                "https://h:9/v1/write/network?token=***",
            ),
            ("https://h/?a=1&token=tkn_abc&b=2", "https://h/?a=1&token=***&b=2"),
            ("https://h/?TOKEN=tkn_abc#frag", "https://h/?TOKEN=***#frag"),
            ("https://u:p@h/x", "https://***@h/x"),
            ("https://u:p@ss@h/x?token=a=b", "https://***@h/x?token=***"),
            (
                "error for url (https://h/?token=tkn_abc): closed",
                "error for url (https://h/?token=***): closed",
            ),
            (
                "two: https://h/?token=a, http://g/?token=b",
                "two: https://h/?token=***, http://g/?token=***",
            ),
            ("token=abc", "token=***"),
            ("?access_token=abc", "?access_token=***"),
            ("https://h/?token=a://b", "https://h/?token=***"),
            ("wide\u{3000}token=abc", "wide\u{3000}token=***"),
            ("token=", "token="),
            ("mail a@b about x=1", "mail a@b about x=1"),
            ("http://[::1]:80/é?ü=1", "http://[::1]:80/é?ü=1"),
            ("", ""),
        ] {
            assert_eq!(redact_url(text), want, "{text}");
        }
    }
}
