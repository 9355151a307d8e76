//! Logging: structured lines on standard error, as text or JSON.

use std::{io, sync::OnceLock};

use tracing_subscriber::{EnvFilter, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// The filter of the subscriber that [`init`] installed.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Shape of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// How to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// A level (`info`), or a filter with levels per target (`info,node_agent::capture=debug`).
    pub level: String,
    /// Shape of a line.
    pub format: LogFormat,
}

/// Why logging did not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not understood.
    #[error(
        "log level `{level}` is not understood: {reason}; accepted: off, error, warn, info, debug, trace, or a list \
         such as `info,node_agent=debug`"
    )]
    Filter {
        /// The filter as given.
        level: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A subscriber is installed already; it stays in force.
    #[error("logging is set up already; the first setting stays")]
    AlreadySet,
}

/// Installs the process's log subscriber, writing to standard error.
///
/// # Errors
/// [`LogError::Filter`] for a filter that is not understood; [`LogError::AlreadySet`] on a second call, which changes
/// nothing.
pub fn init(config: &LogConfig) -> Result<(), LogError> {
    let (filter, handle) = reload::Layer::new(filter(&config.level)?);
    let layer = fmt::layer().with_writer(io::stderr).with_target(true);
    let registry = tracing_subscriber::registry().with(filter);
    match config.format {
        LogFormat::Text => registry.with(layer.with_ansi(is_terminal())).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    }
    .map_err(|_| LogError::AlreadySet)?;
    FILTER.set(handle).map_err(|_| LogError::AlreadySet)
}

/// Changes what is logged from now on. Does nothing before [`init`].
///
/// # Errors
/// [`LogError::Filter`] for a filter that is not understood; the one before stays in force.
pub fn set_level(level: &str) -> Result<(), LogError> {
    let new = filter(level)?;
    if let Some(handle) = FILTER.get() {
        // It fails only when the subscriber is gone, and with it every log.
        let _ = handle.reload(new);
    }
    Ok(())
}

/// Checks and builds the filter.
///
/// # Errors
/// [`LogError::Filter`].
fn filter(level: &str) -> Result<EnvFilter, LogError> {
    let refuse = |reason: String| LogError::Filter {
        level: level.to_owned(),
        reason,
    };
    let directives: Vec<&str> = level.split(',').map(str::trim).collect();
    for directive in &directives {
        if directive.is_empty() {
            return Err(refuse("a part of it is empty".into()));
        }
        // The filter takes a bare word for a target and would silence everything else: a misspelt level must not.
        let is_bare_word = !directive.contains(['=', ':', '[']);
        if is_bare_word && directive.parse::<tracing_subscriber::filter::LevelFilter>().is_err() {
            return Err(refuse(format!("`{directive}` is no level")));
        }
    }
    EnvFilter::try_new(directives.join(",")).map_err(|error| refuse(error.to_string()))
}

fn is_terminal() -> bool {
    io::IsTerminal::is_terminal(&io::stderr())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn accepts_levels_and_filters() {
        for level in ["info", "WARN", "off", "info,node_agent=debug", "warn, ec::x=trace"] {
            assert!(filter(level).is_ok(), "{level}");
        }
    }

    #[test]
    fn refuses_what_would_silence_or_be_ignored() {
        for level in ["", " ", "verbose", "infos", "info,debugg", "a=loud", "info,,"] {
            let error = filter(level).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(
                error.contains(&format!("`{level}`")) && error.contains("accepted"),
                "{level}: {error:?}"
            );
        }
    }

    #[test]
    fn second_init_says_so_and_the_level_can_change() {
        let config = LogConfig {
            level: "off".into(),
            format: LogFormat::Json,
        };
        init(&config).unwrap();
        assert!(matches!(init(&config), Err(LogError::AlreadySet)));
        assert!(!tracing::enabled!(tracing::Level::ERROR));
        set_level("warn").unwrap();
        assert!(tracing::enabled!(tracing::Level::ERROR) && !tracing::enabled!(tracing::Level::INFO));
        assert!(set_level("loud").is_err());
        assert!(
            tracing::enabled!(tracing::Level::ERROR),
            "a bad level changed something"
        );
    }
}
