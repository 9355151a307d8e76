//! Sources ▶ [`ConfigBuilder`] ▶ [`AgentConfig`]: names are matched against the table, values parsed, all errors kept.

use std::{collections::BTreeMap, ffi::OsString, fs, path::Path};

use crate::{
    AgentConfig, ConfigError, ConfigErrors, Kind, OptionSpec, Raw, Source, check, collector::OptionValue,
    error::nearest, options, value,
};

/// Variables with this prefix are ours: an unknown one is a mistake.
const ENV_PREFIX: &str = "ENV_INPUT_EBPF_";

/// Collects values from all sources; [`ConfigBuilder::build`] gives the configuration or everything that is wrong.
#[derive(Clone, Debug, Default)]
pub struct ConfigBuilder {
    given: BTreeMap<&'static str, BTreeMap<Source, Given>>,
    errors: Vec<ConfigError>,
}

#[derive(Clone, Debug)]
struct Given {
    raw: Raw,
    origin: String,
}

// === impl ConfigBuilder ===

impl ConfigBuilder {
    /// No source yet: building gives the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a TOML file: keys below `[[inputs.ebpf]]`, or at the top level.
    pub fn toml_file(&mut self, path: &Path) -> &mut Self {
        let name = path.display().to_string();
        match fs::read_to_string(path) {
            Ok(text) => self.toml_str(&name, &text),
            Err(error) => self.refuse(
                "configuration file",
                Some(name),
                None,
                format!("cannot be read: {error}"),
                None,
            ),
        }
    }

    /// Takes the text of a TOML file; `name` is shown in errors.
    pub fn toml_str(&mut self, name: &str, text: &str) -> &mut Self {
        let origin = format!("file {name}");
        let root = match text.parse::<toml::Table>() {
            Ok(root) => root,
            Err(error) => {
                // The parser's long form shows the line, which may hold a token: only place and message are told.
                let at = error.span().map_or(0, |span| span.start);
                let before = text.get(..at).unwrap_or(text);
                let line = before.matches('\n').count() + 1;
                let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
                let problem = format!("line {line}, column {column}: {}", error.message());
                return self.refuse("configuration file", None, Some(origin), problem, Some("TOML"));
            }
        };
        for (key, value) in root {
            match (key.as_str(), value) {
                ("inputs", toml::Value::Table(inputs)) => self.toml_inputs(&origin, inputs),
                (_, value) => self.toml_key(&origin, &key, value),
            }
        }
        self
    }

    fn toml_inputs(&mut self, origin: &str, inputs: toml::Table) {
        for (name, value) in inputs {
            let mut tables = match (name.as_str(), value) {
                ("ebpf", toml::Value::Table(table)) => vec![toml::Value::Table(table)],
                ("ebpf", toml::Value::Array(tables)) => tables,
                _ => {
                    let problem = "is not an input of this agent".to_owned();
                    self.refuse(
                        &format!("inputs.{name}"),
                        None,
                        Some(origin.into()),
                        problem,
                        Some("[[inputs.ebpf]]"),
                    );
                    continue;
                }
            };
            if tables.len() > 1 {
                let problem = format!("is given {} times", tables.len());
                self.refuse(
                    "inputs.ebpf",
                    None,
                    Some(origin.into()),
                    problem,
                    Some("one [[inputs.ebpf]] table"),
                );
                continue;
            }
            match tables.pop() {
                Some(toml::Value::Table(table)) => {
                    for (key, value) in table {
                        self.toml_key(origin, &key, value);
                    }
                }
                Some(_) => {
                    let problem = "is not a table".to_owned();
                    self.refuse(
                        "inputs.ebpf",
                        None,
                        Some(origin.into()),
                        problem,
                        Some("an [[inputs.ebpf]] table"),
                    );
                }
                None => {}
            }
        }
    }

    fn toml_key(&mut self, origin: &str, key: &str, value: toml::Value) {
        let Some(spec) = find(key) else {
            let near = nearest(key, options().iter().map(|spec| spec.key));
            self.refuse(key, None, Some(origin.into()), unknown("option", near), None);
            return;
        };
        match toml_value(spec, value) {
            Ok(Raw::List(items)) if spec.key == "args" => {
                self.launcher_args(origin, &items);
                self.give(spec, Source::File, origin.to_owned(), Raw::List(items));
            }
            Ok(raw) => self.give(spec, Source::File, origin.to_owned(), raw),
            Err(problem) => {
                self.refuse(spec.key, None, Some(origin.into()), problem, Some(spec.accepts));
            }
        }
    }

    /// The documents set some options as flags in the launcher's `args`: those count as given in the file.
    fn launcher_args(&mut self, origin: &str, args: &[String]) {
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--") else { continue };
            let (flag, inline) = flag
                .split_once('=')
                .map_or((flag, None), |(flag, value)| (flag, Some(value.to_owned())));
            let Some(spec) = options().iter().find(|spec| spec.flag == Some(flag)) else {
                continue;
            };
            let value = match (inline, spec.kind) {
                (None, Kind::Switch) => Some("true".to_owned()),
                (None, _) => args.next().cloned(),
                (inline, _) => inline,
            };
            self.give(
                spec,
                Source::File,
                format!("{origin}, args"),
                Raw::Text(value.unwrap_or_default()),
            );
        }
    }

    /// Takes the options that an `EbpfCollector` object sets; errors name the object's field.
    pub fn object(&mut self, values: impl IntoIterator<Item = OptionValue>) -> &mut Self {
        for OptionValue { key, field, raw } in values {
            match find(key) {
                Some(spec) => self.give(spec, Source::Object, format!("field spec.{field}"), raw),
                None => {
                    self.refuse(
                        key,
                        None,
                        Some(format!("field spec.{field}")),
                        unknown("option", None),
                        None,
                    );
                }
            }
        }
        self
    }

    /// Takes the process's environment.
    pub fn process_env(&mut self) -> &mut Self {
        self.env(std::env::vars_os())
    }

    /// Takes environment variables. Others than ours are passed over; unknown ones with our prefix are refused. An
    /// empty value means "not set".
    pub fn env<K: Into<OsString>, V: Into<OsString>>(&mut self, vars: impl IntoIterator<Item = (K, V)>) -> &mut Self {
        let vars: BTreeMap<OsString, OsString> = vars.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        for spec in options() {
            let names = spec.env.iter().chain(spec.env_aliases);
            let mut set = names.filter_map(|name| Some((*name, vars.get(&OsString::from(name))?)));
            let Some((name, value)) = set.find(|(_, value)| !value.is_empty()) else {
                continue;
            };
            let origin = format!("environment variable {name}");
            match value.to_str() {
                Some(value) => self.give(spec, Source::Env, origin, Raw::Text(value.to_owned())),
                None => {
                    let problem = "is not UTF-8 text".to_owned();
                    self.refuse(spec.key, None, Some(origin), problem, Some(spec.accepts));
                }
            }
        }
        let known = || {
            options()
                .iter()
                .flat_map(|spec| spec.env.into_iter().chain(spec.env_aliases.iter().copied()))
        };
        for name in vars.keys().map(|name| name.to_string_lossy()) {
            if name.starts_with(ENV_PREFIX) && !known().any(|known| known == name) {
                self.refuse(
                    &name,
                    None,
                    Some("environment".into()),
                    unknown("variable", nearest(&name, known())),
                    None,
                );
            }
        }
        self
    }

    /// Takes one value of the option `key`. Lists and maps may be given again and again by one source.
    pub fn set(&mut self, key: &str, source: Source, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        let Some(spec) = find(key) else {
            let near = nearest(key, options().iter().map(|spec| spec.key));
            return self.refuse(key, None, Some(source.to_string()), unknown("option", near), None);
        };
        let origin = match (source, spec.flag, spec.env) {
            (Source::Flag, Some(flag), _) => format!("flag --{flag}"),
            (Source::Env, _, Some(env)) => format!("environment variable {env}"),
            _ => source.to_string(),
        };
        let before = self.given.get_mut(spec.key).and_then(|sources| sources.remove(&source));
        let raw = match (spec.kind, before) {
            (Kind::List | Kind::Map, before) => {
                let mut items = before.map(|given| given.raw.into_items()).unwrap_or_default();
                items.extend(value::split(
                    &value,
                    if spec.kind == Kind::Map { &[',', ';'] } else { &[','] },
                ));
                Raw::List(items)
            }
            (_, None) => Raw::Text(value),
            (_, Some(before)) if before.raw == Raw::Text(value.clone()) => before.raw,
            (_, Some(_)) => {
                return self.refuse(spec.key, None, Some(origin), "is given twice".into(), Some("one value"));
            }
        };
        self.give(spec, source, origin, raw);
        self
    }

    /// The configuration.
    ///
    /// # Errors
    /// Everything that is wrong with names, values and their combination. Exit with [`crate::EXIT_USAGE`] then.
    pub fn build(&self) -> Result<AgentConfig, ConfigErrors> {
        let mut errors = self.errors.clone();
        let mut config = AgentConfig::blank();
        let mut explicit = check::Explicit::new();
        for spec in options() {
            let given = self.given.get(spec.key).and_then(|sources| sources.last_key_value());
            let Some((_, given)) = given else {
                if let Some(default) = spec.default {
                    let default = Given {
                        raw: Raw::Text(default.into()),
                        origin: Source::Default.to_string(),
                    };
                    errors.extend(apply(spec, &mut config, &default).err());
                }
                continue;
            };
            explicit.insert(spec.key, given.origin.clone());
            errors.extend(apply(spec, &mut config, given).err());
            if let Some(reason) = spec.inert {
                config
                    .warnings
                    .push(format!("{} ({}) has no effect: {reason}", spec.key, given.origin));
            }
        }
        check::combination(&mut config, &explicit, &mut errors);
        if errors.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(errors))
        }
    }

    fn give(&mut self, spec: &'static OptionSpec, source: Source, origin: String, raw: Raw) {
        let given = Given {
            raw,
            origin: origin.clone(),
        };
        if let Some(before) = self.given.entry(spec.key).or_default().insert(source, given) {
            let problem = if before.origin == origin {
                "is given twice: at the top level and below [[inputs.ebpf]]".into()
            } else {
                format!("is given by {} as well", before.origin)
            };
            self.refuse(spec.key, None, Some(origin), problem, Some("one value"));
        }
    }

    fn refuse(
        &mut self,
        option: &str,
        value: Option<String>,
        origin: Option<String>,
        problem: String,
        accepted: Option<&str>,
    ) -> &mut Self {
        let accepted = accepted.map(str::to_owned);
        self.errors.push(ConfigError {
            option: option.into(),
            value,
            origin,
            problem,
            accepted,
        });
        self
    }
}

fn find(key: &str) -> Option<&'static OptionSpec> {
    options().iter().find(|spec| spec.key == key)
}

fn unknown(what: &str, near: Option<&str>) -> String {
    match near {
        Some(near) => format!("is no known {what}; did you mean {near}?"),
        None => format!("is no known {what}"),
    }
}

fn apply(spec: &OptionSpec, config: &mut AgentConfig, given: &Given) -> Result<(), ConfigError> {
    (spec.set)(config, &given.raw).map_err(|problem| ConfigError {
        option: spec.key.into(),
        value: Some(if spec.secret {
            "***".into()
        } else {
            without_token(given.raw.to_string())
        }),
        origin: Some(given.origin.clone()),
        problem: without_token(problem),
        accepted: Some(spec.accepts.into()),
    })
}

/// A token may stand in the wrong option too: what follows `token=` is not shown.
pub(crate) fn without_token(mut shown: String) -> String {
    const NAME: &str = "token=";
    if let Some(at) = shown.to_ascii_lowercase().find(NAME) {
        shown.truncate(at + NAME.len());
        shown.push_str("***");
    }
    shown
}

fn toml_value(spec: &OptionSpec, value: toml::Value) -> Result<Raw, String> {
    match value {
        toml::Value::Array(items) if spec.kind == Kind::List => items
            .into_iter()
            .map(|item| toml_scalar(item, "a list in a list"))
            .collect::<Result<_, _>>()
            .map(Raw::List),
        toml::Value::Table(table) if spec.kind == Kind::Map => table
            .into_iter()
            .map(|(key, value)| Ok((key, toml_scalar(value, "a table or list as a value")?)))
            .collect::<Result<_, String>>()
            .map(Raw::Map),
        value => toml_scalar(value, "a table or list where one value is wanted").map(Raw::Text),
    }
}

fn toml_scalar(value: toml::Value, otherwise: &str) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(word) => Ok(word.to_string()),
        toml::Value::Datetime(time) => Ok(time.to_string()),
        toml::Value::Array(_) | toml::Value::Table(_) => Err(format!("is {otherwise}")),
    }
}
