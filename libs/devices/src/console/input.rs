//! The bounded queue between a console's reader thread and its device.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, OnceLock};

use super::Callback;
use crate::sync::lock;

/// Bytes that wait for the guest at most; what does not fit stays in the host's pipe.
const CAPACITY: usize = 4096;

#[derive(Default)]
struct Inner {
    bytes: VecDeque<u8>,
    held: bool,
}

/// A console's input on its way to the guest.
#[derive(Default)]
pub struct InputQueue {
    inner: Mutex<Inner>,
    on_data: OnceLock<Callback>,
    on_room: OnceLock<Callback>,
}

impl InputQueue {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what the device does when bytes arrive. The first caller wins; a queue has one device.
    pub fn on_data(&self, callback: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_data.set(Box::new(callback));
    }

    /// Sets what the reader does when a full queue has room again. The first caller wins.
    pub fn on_room(&self, callback: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_room.set(Box::new(callback));
    }

    /// Bytes that [`InputQueue::push`] would take now.
    pub fn room(&self) -> usize {
        let inner = lock(&self.inner);
        if inner.held {
            0
        } else {
            CAPACITY.saturating_sub(inner.bytes.len())
        }
    }

    /// Takes as many of `bytes` as there is room for and tells the device. Returns how many.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut inner = lock(&self.inner);
            let room = if inner.held { 0 } else { CAPACITY.saturating_sub(inner.bytes.len()) };
            let taken = bytes.iter().take(room);
            let count = taken.len();
            inner.bytes.extend(taken);
            count
        };
        if taken > 0 {
            if let Some(tell) = self.on_data.get() {
                tell();
            }
        }
        taken
    }

    /// Moves up to `max` bytes out, and tells the reader if the queue was full.
    pub fn pop(&self, max: usize) -> Vec<u8> {
        let (bytes, was_full) = {
            let mut inner = lock(&self.inner);
            let was_full = inner.bytes.len() >= CAPACITY;
            let count = max.min(inner.bytes.len());
            (inner.bytes.drain(..count).collect::<Vec<u8>>(), was_full)
        };
        if was_full && !bytes.is_empty() {
            self.tell_reader();
        }
        bytes
    }

    /// Puts bytes back at the front: the guest never saw them. May exceed the capacity by as much.
    pub fn unread(&self, bytes: &[u8]) {
        let mut inner = lock(&self.inner);
        for &byte in bytes.iter().rev() {
            inner.bytes.push_front(byte);
        }
    }

    /// Adds what the reader had read when the queue was held; the device learns of it at the release.
    pub(crate) fn append_held(&self, bytes: &[u8]) {
        lock(&self.inner).bytes.extend(bytes);
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        lock(&self.inner).bytes.is_empty()
    }

    /// Takes no more bytes until [`InputQueue::release`], so that a paused machine stays as it is.
    pub fn hold(&self) {
        lock(&self.inner).held = true;
    }

    /// Ends a [`InputQueue::hold`].
    pub fn release(&self) {
        lock(&self.inner).held = false;
        self.tell_reader();
        if let Some(tell) = self.on_data.get() {
            tell();
        }
    }

    /// A copy of what waits, for a device's saved state.
    pub(crate) fn contents(&self) -> Vec<u8> {
        lock(&self.inner).bytes.iter().copied().collect()
    }

    /// The most bytes that a saved state may hold: the queue, and what was once put back.
    pub(crate) const MAX_CONTENTS: usize = CAPACITY * 2;

    /// Takes over what waited when the state was saved.
    pub(crate) fn set_contents(&self, bytes: &[u8]) {
        lock(&self.inner).bytes = bytes.iter().copied().take(Self::MAX_CONTENTS).collect();
    }

    fn tell_reader(&self) {
        if let Some(tell) = self.on_room.get() {
            tell();
        }
    }
}

impl fmt::Debug for InputQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InputQueue").field("waiting", &lock(&self.inner).bytes.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Arc;

    #[test]
    fn push_beyond_capacity_takes_what_fits_and_pop_tells_the_reader() {
        let queue = InputQueue::new();
        let told = Arc::new(AtomicUsize::new(0));
        let counter = told.clone();
        queue.on_room(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(queue.push(&[7; CAPACITY + 5]), CAPACITY);
        assert_eq!(queue.room(), 0);
        assert_eq!(queue.pop(1), [7]);
        assert_eq!(queue.pop(1), [7]);
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn push_while_held_takes_nothing() {
        let queue = InputQueue::new();
        queue.hold();
        assert_eq!((queue.room(), queue.push(b"x")), (0, 0));
        queue.release();
        assert_eq!(queue.push(b"x"), 1);
    }

    #[test]
    fn unread_bytes_come_first_again() {
        let queue = InputQueue::new();
        queue.push(b"cd");
        queue.unread(b"ab");
        assert_eq!(queue.pop(9), b"abcd");
    }
}
