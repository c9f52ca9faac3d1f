//! Keeps a guest from filling the host's log: what it can provoke at will is written a few times and then no more.

use std::sync::atomic::{AtomicU32, Ordering};

/// Lines that one source may write.
const LINES: u32 = 16;

/// How many lines a source has left. What the machine monitor writes because of a guest is held to it too.
#[derive(Debug)]
pub struct LogLimit(AtomicU32);

impl LogLimit {
    /// All lines are left.
    pub const fn new() -> Self {
        Self(AtomicU32::new(LINES))
    }

    /// Whether one more line may be written.
    pub fn allows(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_run_out() {
        let limit = LogLimit::new();
        assert_eq!((0..100).filter(|_| limit.allows()).count(), LINES as usize);
    }
}
