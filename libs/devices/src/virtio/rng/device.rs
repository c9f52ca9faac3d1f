//! The device: one queue, no configuration.

use std::sync::Arc;
use std::time::Instant;

use super::worker::{Budget, RngWorker};
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, ActiveState, QueueProgress, VirtioDevice, WorkerThread, TYPE_RNG};

const SIZES: [u16; 1] = [64];

/// An entropy source.
pub struct Rng {
    worker: Worker,
}

impl Rng {
    /// An entropy source that `thread` will serve.
    pub fn new(thread: &mut WorkerThread) -> Arc<Self> {
        let work = RngWorker { budget: Budget::new(Instant::now()) };
        Arc::new(Self { worker: thread.add(work) })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        TYPE_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, state: ActiveState) -> Result<(), ActivateError> {
        if state.queues.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        self.worker.activate(state)
    }

    fn reset(&self) {
        self.worker.reset();
    }

    fn pause(&self) -> Vec<QueueProgress> {
        self.worker.pause()
    }

    fn hold(&self, until: Instant) -> bool {
        self.worker.hold(until)
    }

    fn resume(&self) {
        self.worker.resume();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BYTES_PER_SECOND, MAX_REQUEST_BYTES};
    use super::*;
    use crate::testkit::driver::{Driver, Part};
    use crate::testkit::{on_thread, virtio as virtio_contract};

    fn rng() -> Arc<Rng> {
        on_thread(Rng::new)
    }

    #[test]
    fn requests_get_different_random_bytes() {
        let mut driver = Driver::ready(rng(), 0);
        let (used, first) = driver.request(0, &[Part::In(32), Part::In(32)]);
        assert_eq!(used.len, 64);
        let (_, second) = driver.request(0, &[Part::In(64)]);
        assert_ne!(first.concat(), second.concat());
        assert!(first.concat().iter().any(|b| *b != first[0][0]));
    }

    #[test]
    fn request_for_more_than_the_cap_gets_the_cap() {
        let mut driver = Driver::ready(rng(), 0);
        let cap = MAX_REQUEST_BYTES as u32;
        let (used, answers) = driver.request(0, &[Part::In(cap), Part::In(4096)]);
        assert_eq!(used.len, cap);
        assert_eq!(answers[1], [0xee; 4096], "nothing beyond the cap is touched");
    }

    #[test]
    fn greedy_driver_is_held_to_the_rate() {
        let mut driver = Driver::ready(rng(), 0);
        let start = Instant::now();
        let mut got = 0;
        while got < 512 << 10 {
            got += u64::from(driver.request(0, &[Part::In(64 << 10)]).0.len);
        }
        let least = (got - (256 << 10)) as f64 / BYTES_PER_SECOND as f64;
        assert!(start.elapsed().as_secs_f64() > least * 0.8, "{:?}", start.elapsed());
    }

    #[test]
    fn what_is_written_is_noted_for_a_snapshot() {
        let (changed, lacking) = Driver::ready(rng(), 0).unnoted(0, &[Part::In(64 << 10)]);
        assert!(changed >= 2 && lacking.is_empty(), "{changed} {lacking:?}");
    }

    #[test]
    fn contract_holds() {
        virtio_contract::device(rng);
    }
}
