//! Errors as one line, and the log.

pub use ovms_proto::chain;
use tracing::level_filters::LevelFilter;

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
