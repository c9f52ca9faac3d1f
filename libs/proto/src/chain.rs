//! An error as it goes over a socket, into a log or to a user: one line.

use std::error::Error;
use std::fmt::Write;

/// The sentence of `error` and those of its sources, outermost first, joined by `: `. No error repeats its source, so each
/// thing is said once.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        // Writing to a String does not fail.
        let _ = write!(line, ": {source}");
        next = source.source();
    }
    line
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
