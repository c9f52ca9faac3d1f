//! Errors as one line, and the log.

use std::error::Error;
use std::fmt::Write;

use tracing::level_filters::LevelFilter;

/// The whole chain of an error, outermost first, joined by `: `.
pub fn chain(err: &(dyn Error + 'static)) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(err) = source {
        // Writing to a String does not fail.
        let _ = write!(text, ": {err}");
        source = err.source();
    }
    text
}

/// Starts logging to stderr at `level` (`error`, `warn`, `info`, `debug`, `trace`; anything else is `info`).
pub fn start_log(level: &str) {
    let level = level.parse::<LevelFilter>().unwrap_or(LevelFilter::INFO);
    // A log that was started before stays.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use thiserror::Error;

    #[derive(Debug, Error)]
    #[error("outer")]
    struct Outer(#[source] Inner);

    #[derive(Debug, Error)]
    #[error("inner")]
    struct Inner;

    #[test]
    fn chain_joins_every_source_once() {
        assert_eq!(chain(&Outer(Inner)), "outer: inner");
    }
}
