//! A lock on ranges of blocks. Few are held at once (one for each queue thread at most), so a list does.

use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug, Default)]
pub(super) struct RangeLock {
    held: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

/// Holds a range until it is dropped.
pub(super) struct Held<'a> {
    lock: &'a RangeLock,
    range: (u64, u64),
}

impl RangeLock {
    /// Waits until no one holds a part of `start..end`, then holds it.
    pub fn lock(&self, start: u64, end: u64) -> Held<'_> {
        let overlaps = |held: &mut Vec<(u64, u64)>| held.iter().any(|&(s, e)| s < end && start < e);
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = self.freed.wait_while(held, overlaps).unwrap_or_else(PoisonError::into_inner);
        held.push((start, end));
        Held { lock: self, range: (start, end) }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.lock.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = held.iter().position(|r| *r == self.range) {
            held.swap_remove(i);
        }
        drop(held);
        self.lock.freed.notify_all();
    }
}
