//! Serves the one queue of the entropy device.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::rand::{getrandom, GetRandomFlags};

use crate::virtio::queue::{copy_to, total, QueueError, Turn, VirtQueue};
use crate::virtio::worker::QueueWorker;

/// Bytes that one request gets at most.
pub const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// Bytes that the guest gets per second at most, over time; Linux asks for 64 bytes at a time.
pub const BYTES_PER_SECOND: u64 = 1 << 20;
/// Bytes that it may get at once after a rest.
const BURST_BYTES: u64 = 256 << 10;
/// Bytes fetched from the host at a time: getrandom never splits, nor fails, below 257 of them.
const CHUNK: usize = 256;

/// A token bucket of bytes.
#[derive(Debug)]
pub(super) struct Budget {
    tokens: u64,
    since: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { tokens: BURST_BYTES, since: now }
    }

    /// Refills for the time that has passed; `Err` says how long to wait if nothing is left.
    fn available(&mut self, now: Instant) -> Result<u64, Duration> {
        let passed = u64::try_from(now.saturating_duration_since(self.since).as_micros()).unwrap_or(u64::MAX);
        let earned = passed.saturating_mul(BYTES_PER_SECOND) / 1_000_000;
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(BURST_BYTES);
            self.since = now;
        }
        if self.tokens > 0 {
            Ok(self.tokens)
        } else {
            Err(Duration::from_millis(10))
        }
    }

    fn take(&mut self, bytes: u64) {
        self.tokens = self.tokens.saturating_sub(bytes);
    }
}

pub(super) struct RngWorker {
    pub(super) budget: Budget,
}

impl RngWorker {
    fn fill(&mut self, queue: &mut VirtQueue, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        for _ in 0..queue.size() {
            if hurry.load(Ordering::Relaxed) {
                return Ok(Turn::More);
            }
            let available = match self.budget.available(Instant::now()) {
                Ok(available) => available,
                Err(wait) => return Ok(Turn::Later(wait)),
            };
            let Some(request) = queue.next()? else {
                if queue.listen()? {
                    continue;
                }
                return Ok(Turn::Idle);
            };
            let room = total(&request.writable).min(MAX_REQUEST_BYTES).min(available);
            let mut written = 0u64;
            while written < room {
                let mut chunk = [0; CHUNK];
                let want = usize::try_from(room.saturating_sub(written)).unwrap_or(CHUNK).min(CHUNK);
                let got = chunk.get_mut(..want).map_or(0, |part| getrandom(part, GetRandomFlags::empty()).unwrap_or(0));
                let copied = copy_to(queue.memory(), &request.writable, written, chunk.get(..got).unwrap_or_default());
                if copied == 0 {
                    break;
                }
                written = written.saturating_add(copied as u64);
            }
            self.budget.take(written.max(1));
            queue.complete(request.head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(Turn::More)
    }
}

impl QueueWorker for RngWorker {
    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        queues.get_mut(at).map_or(Ok(Turn::Idle), |queue| self.fill(queue, hurry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_allows_a_burst_then_the_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!(budget.available(start), Ok(BURST_BYTES));
        budget.take(BURST_BYTES);
        assert!(budget.available(start).is_err());
        assert_eq!(budget.available(start + Duration::from_millis(100)), Ok(BYTES_PER_SECOND / 10));
        assert_eq!(budget.available(start + Duration::from_secs(3600)), Ok(BURST_BYTES));
    }
}
