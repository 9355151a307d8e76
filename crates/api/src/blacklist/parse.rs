//! Tokens to typed expressions.

use std::{cmp::Ordering, net::IpAddr};

use super::{
    BlacklistError, View,
    lex::{Placed, Token, tokens},
    rules::Prefix,
};

/// Brackets and negations within one another at most.
const MAX_DEPTH: usize = 64;
/// Operators of one statement at most.
const MAX_OPERATORS: usize = 256;
const VARIABLES: &str =
    "tcp, udp, ipv4, ipv6, src_port, dst_port, ip_saddr, ip_daddr, ip6_saddr, ip6_daddr, k8s_src_pod or k8s_dst_pod";

/// Something true or false.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expr {
    Constant(bool),
    Tcp,
    Udp,
    Family {
        v6: bool,
    },
    Not(Box<Self>),
    And(Box<Self>, Box<Self>),
    Or(Box<Self>, Box<Self>),
    /// Both are true, or both false.
    Same(Box<Self>, Box<Self>),
    Ports(Number, How, Number),
    Text(Text, Text),
    Contains(Prefix, Text),
    /// The first begins with the second.
    Prefix(Text, Text),
}

/// A number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    Literal(i64),
    Port { source: bool },
}

/// A text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Text {
    Literal(String),
    Address { source: bool, v6: bool },
    Pod { source: bool },
}

/// A comparison of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A value of any type.
enum Value {
    Bool(Expr),
    Int(Number),
    Str(Text),
}

struct Parser {
    tokens: Vec<Placed>,
    at: usize,
    depth: usize,
    /// Of this statement.
    operators: usize,
}

/// The statements of a program.
pub(super) fn program(text: &str) -> Result<Vec<Expr>, BlacklistError> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        depth: 0,
        operators: 0,
    };
    let mut statements = Vec::new();
    loop {
        while parser.peek() == Some(&Token::End) {
            parser.at += 1;
        }
        if parser.peek().is_none() {
            return Ok(statements);
        }
        let start = parser.at;
        parser.operators = 0;
        match parser.or()? {
            Value::Bool(expr) => statements.push(expr),
            other => {
                return Err(parser.error_at(start, &format!("{} as a rule", other.kind()), "something true or false"));
            }
        }
        if parser.peek() != Some(&Token::End) {
            let expected = if parser.operators >= MAX_OPERATORS {
                "at most 256 operators in a statement"
            } else {
                "an operator, `;` or the end of the line"
            };
            return Err(parser.error(expected));
        }
    }
}

// === impl Parser ===

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|placed| &placed.token)
    }

    fn error(&self, expected: &str) -> BlacklistError {
        let last = self.at + 1 >= self.tokens.len();
        let found = match self.peek() {
            None | Some(Token::End) if last => "the end of the program".to_owned(),
            None | Some(Token::End) => "the end of a statement".to_owned(),
            Some(Token::Name(name)) => format!("`{name}`"),
            Some(Token::Int(number)) => format!("`{number}`"),
            Some(Token::Text(text)) => format!("the text {text:?}"),
            Some(Token::Bool(value)) => format!("`{value}`"),
            Some(Token::Sign(sign)) => format!("`{sign}`"),
        };
        self.error_at(self.at, &found, expected)
    }

    fn error_at(&self, at: usize, found: &str, expected: &str) -> BlacklistError {
        let placed = self.tokens.get(at).or(self.tokens.last());
        BlacklistError {
            line: placed.map_or(1, |placed| placed.line),
            column: placed.map_or(1, |placed| placed.column),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }

    /// Takes one of these signs, with the line breaks behind it that an operator allows.
    fn operator(&mut self, signs: &[&'static str]) -> Option<&'static str> {
        let Some(Token::Sign(sign)) = self.peek() else {
            return None;
        };
        let sign = *sign;
        if !signs.contains(&sign) || self.operators >= MAX_OPERATORS {
            return None;
        }
        self.operators += 1;
        self.at += 1;
        self.breaks();
        Some(sign)
    }

    /// Line breaks, which are ends; a `;` is not told apart from them here, as nothing may stand before it.
    fn breaks(&mut self) {
        while self.peek() == Some(&Token::End) && self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T, BlacklistError>) -> Result<T, BlacklistError> {
        if self.depth >= MAX_DEPTH {
            return Err(self.error("less within brackets and negations (64 deep at most)"));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    fn bool_of(&self, value: Value, at: usize, of: &str) -> Result<Expr, BlacklistError> {
        match value {
            Value::Bool(expr) => Ok(expr),
            other => Err(self.error_at(
                at,
                &format!("{} beside `{of}`", other.kind()),
                "something true or false",
            )),
        }
    }

    fn or(&mut self) -> Result<Value, BlacklistError> {
        self.chain("||", Self::and, |left, right| Expr::Or(left.into(), right.into()))
    }

    fn and(&mut self) -> Result<Value, BlacklistError> {
        self.chain("&&", Self::comparison, |left, right| {
            Expr::And(left.into(), right.into())
        })
    }

    fn chain(
        &mut self,
        sign: &'static str,
        part: fn(&mut Self) -> Result<Value, BlacklistError>,
        join: fn(Expr, Expr) -> Expr,
    ) -> Result<Value, BlacklistError> {
        let mut at = self.at;
        let mut left = part(self)?;
        while self.operator(&[sign]).is_some() {
            let first = self.bool_of(left, at, sign)?;
            at = self.at;
            let value = part(self)?;
            let second = self.bool_of(value, at, sign)?;
            left = Value::Bool(join(first, second));
        }
        Ok(left)
    }

    fn comparison(&mut self) -> Result<Value, BlacklistError> {
        let at = self.at;
        let mut left = self.unary()?;
        loop {
            let sign_at = self.at;
            let Some(sign) = self.operator(&["==", "!=", "<=", ">=", "<", ">"]) else {
                return Ok(left);
            };
            let right_at = self.at;
            let right = self.unary()?;
            left = Value::Bool(self.compare(left, at, sign, sign_at, right, right_at)?);
        }
    }

    fn compare(
        &self,
        left: Value,
        left_at: usize,
        sign: &str,
        sign_at: usize,
        right: Value,
        right_at: usize,
    ) -> Result<Expr, BlacklistError> {
        let negate = |expr: Expr| if sign == "!=" { Expr::Not(expr.into()) } else { expr };
        let equality = matches!(sign, "==" | "!=");
        match (left, right) {
            (Value::Int(left), Value::Int(right)) => {
                let how = match sign {
                    "<" => How::Less,
                    "<=" => How::LessOrEqual,
                    ">" => How::Greater,
                    ">=" => How::GreaterOrEqual,
                    _ => How::Equal,
                };
                Ok(negate(Expr::Ports(left, how, right)))
            }
            (Value::Bool(left), Value::Bool(right)) if equality => Ok(negate(Expr::Same(left.into(), right.into()))),
            (Value::Str(left), Value::Str(right)) if equality => {
                for (one, other, at) in [(&left, &right, right_at), (&right, &left, left_at)] {
                    if let (Text::Address { v6, .. }, Text::Literal(text)) = (one, other) {
                        let fits = text.is_empty() || text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == *v6);
                        if !fits {
                            let wanted = if *v6 {
                                "an IPv6 address such as \"fd00::1\""
                            } else {
                                "an IPv4 address such as \"10.0.0.1\""
                            };
                            return Err(self.error_at(at, &format!("the text {text:?}, which it never is"), wanted));
                        }
                    }
                }
                Ok(negate(Expr::Text(left, right)))
            }
            (left, right) if equality => Err(self.error_at(
                right_at,
                &format!("{} compared with {}", right.kind(), left.kind()),
                &left.kind(),
            )),
            (left, right) => {
                let wrong = if matches!(left, Value::Int(_)) { right } else { left };
                Err(self.error_at(
                    sign_at,
                    &format!("`{sign}` beside {}", wrong.kind()),
                    "numbers on both sides",
                ))
            }
        }
    }

    fn unary(&mut self) -> Result<Value, BlacklistError> {
        if self.peek() != Some(&Token::Sign("!")) {
            return self.primary();
        }
        self.at += 1;
        let at = self.at;
        let value = self.deeper(Self::unary)?;
        let expr = self.bool_of(value, at, "!")?;
        Ok(Value::Bool(Expr::Not(expr.into())))
    }

    fn primary(&mut self) -> Result<Value, BlacklistError> {
        let Some(token) = self.peek().cloned() else {
            return Err(self.error("a rule"));
        };
        match token {
            Token::Bool(value) => {
                self.at += 1;
                Ok(Value::Bool(Expr::Constant(value)))
            }
            Token::Int(number) => {
                self.at += 1;
                Ok(Value::Int(Number::Literal(number)))
            }
            Token::Text(text) => {
                self.at += 1;
                Ok(Value::Str(Text::Literal(text)))
            }
            Token::Sign("(") => {
                self.at += 1;
                self.breaks();
                let value = self.deeper(Self::or)?;
                self.breaks();
                self.close()?;
                Ok(value)
            }
            Token::Name(name) => self.name(&name),
            Token::Sign(_) | Token::End => Err(self.error("a name, a number, a text in quotes, `!` or `(`")),
        }
    }

    fn close(&mut self) -> Result<(), BlacklistError> {
        if self.peek() != Some(&Token::Sign(")")) {
            return Err(self.error("`)`"));
        }
        self.at += 1;
        Ok(())
    }

    fn name(&mut self, name: &str) -> Result<Value, BlacklistError> {
        let at = self.at;
        self.at += 1;
        if self.peek() == Some(&Token::Sign("(")) {
            self.at += 1;
            return self.deeper(|parser| parser.call(name, at));
        }
        let address = |source, v6| Ok(Value::Str(Text::Address { source, v6 }));
        match name {
            "tcp" => Ok(Value::Bool(Expr::Tcp)),
            "udp" => Ok(Value::Bool(Expr::Udp)),
            "ipv4" => Ok(Value::Bool(Expr::Family { v6: false })),
            "ipv6" => Ok(Value::Bool(Expr::Family { v6: true })),
            "src_port" => Ok(Value::Int(Number::Port { source: true })),
            "dst_port" => Ok(Value::Int(Number::Port { source: false })),
            "ip_saddr" => address(true, false),
            "ip_daddr" => address(false, false),
            "ip6_saddr" => address(true, true),
            "ip6_daddr" => address(false, true),
            "k8s_src_pod" => Ok(Value::Str(Text::Pod { source: true })),
            "k8s_dst_pod" => Ok(Value::Str(Text::Pod { source: false })),
            "ipnet_contains" | "has_prefix" => Err(self.error(&format!("`(` after the function {name}"))),
            _ => Err(self.error_at(at, &format!("the unknown name `{name}`"), VARIABLES)),
        }
    }

    fn call(&mut self, name: &str, name_at: usize) -> Result<Value, BlacklistError> {
        if !matches!(name, "ipnet_contains" | "has_prefix") {
            let expected = "ipnet_contains or has_prefix";
            return Err(self.error_at(name_at, &format!("the unknown function `{name}`"), expected));
        }
        let mut arguments = Vec::new();
        self.breaks();
        while self.peek() != Some(&Token::Sign(")")) {
            let at = self.at;
            match self.or()? {
                Value::Str(text) => arguments.push((text, at)),
                other => return Err(self.error_at(at, &format!("{} as an argument", other.kind()), "a text")),
            }
            self.breaks();
            if self.operator(&[","]).is_none() {
                break;
            }
        }
        self.breaks();
        self.close()?;
        let count = arguments.len();
        let Ok([(first, first_at), (second, second_at)]) = <[(Text, usize); 2]>::try_from(arguments) else {
            let found = format!("{count} arguments of {name}");
            return Err(self.error_at(name_at, &found, "two arguments"));
        };
        if name == "has_prefix" {
            return Ok(Value::Bool(Expr::Prefix(first, second)));
        }
        let subnet = "a subnet in quotes, such as \"10.0.0.0/8\"";
        let Text::Literal(text) = &first else {
            return Err(self.error_at(first_at, "a name", subnet));
        };
        let Some(prefix) = Prefix::parse(text) else {
            return Err(self.error_at(first_at, &format!("the text {text:?}"), subnet));
        };
        if let Text::Address { v6, .. } = second
            && v6 != prefix.is_v6()
        {
            let expected = "a subnet and an address of one family";
            return Err(self.error_at(second_at, "an address of the other family", expected));
        }
        Ok(Value::Bool(Expr::Contains(prefix, second)))
    }
}

// === impl Value ===

impl Value {
    fn kind(&self) -> String {
        match self {
            Self::Bool(_) => "something true or false",
            Self::Int(_) => "a number",
            Self::Str(_) => "a text",
        }
        .to_owned()
    }
}

// === impl Expr ===

impl Expr {
    /// Whether it speaks of pods.
    pub(super) fn names_pods(&self) -> bool {
        let pod = |text: &Text| matches!(text, Text::Pod { .. });
        match self {
            Self::Constant(_) | Self::Tcp | Self::Udp | Self::Family { .. } | Self::Ports(..) => false,
            Self::Not(inner) => inner.names_pods(),
            Self::And(left, right) | Self::Or(left, right) | Self::Same(left, right) => {
                left.names_pods() || right.names_pods()
            }
            Self::Text(left, right) | Self::Prefix(left, right) => pod(left) || pod(right),
            Self::Contains(_, text) => pod(text),
        }
    }
}

// === impl Number ===

impl Number {
    pub(super) fn value(self, view: &View<'_>) -> i64 {
        match self {
            Self::Literal(number) => number,
            Self::Port { source: true } => view.packet.src_port.into(),
            Self::Port { source: false } => view.packet.dst_port.into(),
        }
    }
}

// === impl How ===

impl How {
    pub(super) const fn holds(self, ordering: Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::Less => ordering.is_lt(),
            Self::LessOrEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterOrEqual => ordering.is_ge(),
        }
    }
}
