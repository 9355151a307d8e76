//! Text to tokens.

use super::BlacklistError;

/// A token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Name(String),
    Int(i64),
    Text(String),
    Bool(bool),
    /// `( ) , ! == != < <= > >= && ||`
    Sign(&'static str),
    /// `;` or a line break.
    End,
}

/// A token and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) token: Token,
    pub(super) line: usize,
    pub(super) column: usize,
}

/// Longest first.
const SIGNS: [&str; 12] = ["&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "(", ")", ","];
/// Words of the language that no rule has.
const OTHER_WORDS: [&str; 22] = [
    "nil", "null", "if", "elif", "else", "for", "in", "while", "break", "continue", "return", "str", "bool", "int",
    "float", "list", "map", "let", "fn", "import", "and", "or",
];

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    column: usize,
}

/// All tokens of a program, with one end at its end.
pub(super) fn tokens(text: &str) -> Result<Vec<Placed>, BlacklistError> {
    let mut lexer = Lexer {
        rest: text,
        line: 1,
        column: 1,
    };
    let mut out = Vec::new();
    while let Some(token) = lexer.next()? {
        out.push(token);
    }
    out.push(lexer.placed(Token::End));
    Ok(out)
}

// === impl Lexer ===

impl Lexer<'_> {
    fn placed(&self, token: Token) -> Placed {
        Placed {
            token,
            line: self.line,
            column: self.column,
        }
    }

    fn refuse<T>(&self, found: impl Into<String>, expected: &str) -> Result<T, BlacklistError> {
        Err(BlacklistError {
            line: self.line,
            column: self.column,
            found: found.into(),
            expected: expected.to_owned(),
        })
    }

    /// Goes on by so many bytes, which end between characters.
    fn go(&mut self, bytes: usize) {
        let (done, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        for c in done.chars() {
            if c == '\n' {
                self.line += 1;
                self.column = 1;
            } else {
                self.column += 1;
            }
        }
        self.rest = rest;
    }

    fn next(&mut self) -> Result<Option<Placed>, BlacklistError> {
        loop {
            let blank = self.rest.len() - self.rest.trim_start_matches([' ', '\t', '\r']).len();
            self.go(blank);
            if !self.rest.starts_with('#') {
                break;
            }
            self.go(self.rest.find('\n').unwrap_or(self.rest.len()));
        }
        let Some(first) = self.rest.chars().next() else {
            return Ok(None);
        };
        if matches!(first, ';' | '\n') {
            let end = self.placed(Token::End);
            self.go(1);
            return Ok(Some(end));
        }
        if matches!(first, '"' | '\'') {
            return self.text().map(Some);
        }
        if first == '`' {
            let inner = self.rest.get(1..).unwrap_or_default();
            let Some(end) = inner
                .find(['`', '\n'])
                .filter(|end| inner.get(*end..=*end) == Some("`"))
            else {
                return self.refuse("a name in back-quotes without end", "`");
            };
            let token = self.placed(Token::Name(inner.get(..end).unwrap_or_default().to_owned()));
            self.go(end + 2);
            return Ok(Some(token));
        }
        if first.is_ascii_digit() {
            return self.number().map(Some);
        }
        if first.is_ascii_alphabetic() || first == '_' {
            return self.word().map(Some);
        }
        let Some(sign) = SIGNS.into_iter().find(|sign| self.rest.starts_with(sign)) else {
            let found = match first {
                '=' => "`=`, which assigns".to_owned(),
                '&' | '|' => format!("a single `{first}`"),
                '+' | '-' | '*' | '/' | '%' => format!("`{first}`: rules do not calculate"),
                other => format!("{other:?}"),
            };
            return self.refuse(
                found,
                "one of ( ) , ! == != < <= > >= && ||, a name, a number or a text in quotes",
            );
        };
        let token = self.placed(Token::Sign(sign));
        self.go(sign.len());
        Ok(Some(token))
    }

    fn word(&mut self) -> Result<Placed, BlacklistError> {
        let of_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let len = self.rest.find(|c| !of_word(c)).unwrap_or(self.rest.len());
        let word = self.rest.get(..len).unwrap_or_default();
        let lower = word.to_ascii_lowercase();
        let token = match lower.as_str() {
            "true" => Token::Bool(true),
            "false" => Token::Bool(false),
            other if OTHER_WORDS.contains(&other) => {
                return self.refuse(
                    format!("the word `{word}`"),
                    "a rule, made of comparisons, &&, || and !",
                );
            }
            _ => Token::Name(word.to_owned()),
        };
        let token = self.placed(token);
        self.go(len);
        Ok(token)
    }

    fn number(&mut self) -> Result<Placed, BlacklistError> {
        let of_number = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let len = self.rest.find(|c| !of_number(c)).unwrap_or(self.rest.len());
        let text = self.rest.get(..len).unwrap_or_default();
        let plain = text.replace('_', "");
        let lower = plain.to_ascii_lowercase();
        let parsed = if let Some(digits) = lower.strip_prefix("0x") {
            i64::from_str_radix(digits, 16)
        } else if let Some(digits) = lower.strip_prefix("0b") {
            i64::from_str_radix(digits, 2)
        } else if let Some(digits) = lower.strip_prefix("0o") {
            i64::from_str_radix(digits, 8)
        } else if lower.len() > 1 && lower.starts_with('0') {
            i64::from_str_radix(&lower, 8)
        } else {
            lower.parse()
        };
        match parsed {
            Ok(number) => {
                let token = self.placed(Token::Int(number));
                self.go(len);
                Ok(token)
            }
            Err(_) => self.refuse(format!("`{text}`"), "a whole number such as 80, 0x50 or 0120"),
        }
    }

    fn text(&mut self) -> Result<Placed, BlacklistError> {
        let quote = if self.rest.starts_with("\"\"\"") {
            "\"\"\""
        } else if self.rest.starts_with("'''") {
            "'''"
        } else if self.rest.starts_with('"') {
            "\""
        } else {
            "'"
        };
        let start = self.placed(Token::End);
        let mut out = String::new();
        let mut at = quote.len();
        loop {
            let Some(rest) = self.rest.get(at..).filter(|rest| !rest.is_empty()) else {
                return self.refuse("a text without end", quote);
            };
            if rest.starts_with(quote) {
                self.go(at + quote.len());
                return Ok(Placed {
                    token: Token::Text(out),
                    ..start
                });
            }
            let mut chars = rest.chars();
            match chars.next() {
                Some('\n') if quote.len() == 1 => return self.refuse("a text that the line ends in", quote),
                Some('\\') => {
                    let (value, len) = escape(chars.as_str()).map_or_else(
                        || {
                            self.refuse(
                                "an unknown escape in a text",
                                "\\n, \\t, \\\\, \\\", \\', \\xHH or \\uHHHH",
                            )
                        },
                        Ok,
                    )?;
                    out.push(value);
                    at += 1 + len;
                }
                Some(c) => {
                    out.push(c);
                    at += c.len_utf8();
                }
                None => return self.refuse("a text without end", quote),
            }
        }
    }
}

/// What stands for the text behind a back-slash, and its length.
fn escape(text: &str) -> Option<(char, usize)> {
    let digits = |from: usize, count: usize, radix: u32| {
        let digits = text.get(from..from + count)?;
        let plain = digits.bytes().all(|b| char::from(b).is_digit(radix));
        let value = plain.then(|| u32::from_str_radix(digits, radix).ok()).flatten()?;
        Some((char::from_u32(value)?, from + count))
    };
    let simple = |value| Some((value, 1));
    match text.chars().next()? {
        'a' => simple('\u{7}'),
        'b' => simple('\u{8}'),
        'f' => simple('\u{c}'),
        'n' => simple('\n'),
        'r' => simple('\r'),
        't' => simple('\t'),
        'v' => simple('\u{b}'),
        c @ ('\\' | '"' | '\'') => simple(c),
        'x' => digits(1, 2, 16),
        'u' => digits(1, 4, 16),
        'U' => digits(1, 8, 16),
        '0'..='7' => digits(0, 3, 8),
        _ => None,
    }
}
