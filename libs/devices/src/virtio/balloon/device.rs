//! The device: its target, its configuration space and its worker.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::worker::{BalloonWorker, Shared, PAGE};
use crate::sync::lock;
use crate::virtio::worker::Worker;
use crate::virtio::{
    read_bytes, ActivateError, ActiveState, ConfigNotifier, MemoryDiscard, QueueProgress, VirtioDevice, WorkerThread,
    TYPE_BALLOON,
};

/// Inflate, deflate, statistics, reporting.
const SIZES: [u16; 4] = [128; 4];

/// VIRTIO_BALLOON_F_STATS_VQ (feature bits: virtio 1.2, 5.5.3).
pub(super) const STATS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: a guest that runs out of memory may take pages back by itself.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING (Linux: include/uapi/linux/virtio_balloon.h).
pub(super) const REPORTING: u64 = 1 << 5;

/// Offset of the `actual` field in `struct virtio_balloon_config`.
const ACTUAL: u64 = 4;

/// What a guest says of its memory (virtio 1.2, 5.5.6.4): bytes, or counts since boot. `None` is "not said".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    pub free: Option<u64>,
    /// Bytes that the kernel manages.
    pub total: Option<u64>,
    /// Bytes that programs could get without swapping.
    pub available: Option<u64>,
    /// Bytes of page cache.
    pub disk_caches: Option<u64>,
}

impl BalloonStats {
    /// Takes one tag and value off the wire; unknown tags are for later drivers.
    pub(super) fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            _ => return,
        };
        *field = Some(value);
    }
}

/// A memory balloon.
pub struct Balloon {
    pub(super) target: AtomicU32,
    pub(super) actual: AtomicU32,
    pub(super) shared: Arc<Shared>,
    ask_stats: Arc<EventFd>,
    worker: Worker,
    notifier: ConfigNotifier,
}

impl Balloon {
    /// An empty balloon that `thread` will serve; what it takes is given to `memory`.
    ///
    /// # Errors
    /// The system has no eventfd to give.
    pub fn new(memory: Arc<dyn MemoryDiscard>, thread: &mut WorkerThread) -> io::Result<Arc<Self>> {
        let ask_stats = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let shared = Arc::<Shared>::default();
        let work =
            BalloonWorker { shared: Arc::clone(&shared), memory, ask_stats: Arc::clone(&ask_stats), roles: Vec::new() };
        let worker = thread.add(work);
        let (target, actual) = (AtomicU32::new(0), AtomicU32::new(0));
        Ok(Arc::new(Self { target, actual, shared, ask_stats, worker, notifier: ConfigNotifier::default() }))
    }

    /// Asks the driver to hand over `bytes` of its memory in all, rounded down to pages of 4 KiB.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if self.target.swap(pages, Ordering::AcqRel) != pages {
            self.notifier.notify();
        }
    }

    /// Bytes that the driver was asked for.
    pub fn target(&self) -> u64 {
        u64::from(self.target.load(Ordering::Acquire)).saturating_mul(PAGE)
    }

    /// Bytes that the driver says it has handed over.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Acquire)).saturating_mul(PAGE)
    }

    /// The statistics that the driver gave last.
    pub fn stats(&self) -> BalloonStats {
        *lock(&self.shared.stats)
    }

    /// Asks the driver for new statistics; they show up in [`Balloon::stats`] when it has answered.
    pub fn request_stats(&self) {
        self.shared.asked.store(true, Ordering::Release);
        let _ = self.ask_stats.write(1);
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        TYPE_BALLOON
    }

    fn features(&self) -> u64 {
        STATS | REPORTING | DEFLATE_ON_OOM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.target.load(Ordering::Acquire).to_le_bytes().to_vec();
        config.extend(self.actual.load(Ordering::Acquire).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, [a, b, c, d]) = (offset, data) {
            self.actual.store(u32::from_le_bytes([*a, *b, *c, *d]), Ordering::Release);
        }
    }

    fn activate(&self, state: ActiveState) -> Result<(), ActivateError> {
        let missing = [0, 1].into_iter().find(|index| !state.queues.iter().any(|queue| queue.index == *index));
        if let Some(index) = missing {
            return Err(ActivateError::MissingQueue(index));
        }
        self.notifier.set(Arc::clone(&state.interrupt));
        self.worker.activate(state)
    }

    fn reset(&self) {
        self.notifier.clear();
        self.worker.reset();
        self.actual.store(0, Ordering::Release);
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
    use super::*;
    use crate::testkit::driver::{function, guest_memory, Driver, Part};
    use crate::testkit::{on_thread, virtio as virtio_contract};
    use ovms_state::Persist;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Discards(Mutex<Vec<(u64, u64)>>);

    impl Discards {
        fn take(&self) -> Vec<(u64, u64)> {
            std::mem::take(&mut lock(&self.0))
        }
    }

    impl MemoryDiscard for Discards {
        fn discard(&self, address: u64, len: u64) {
            assert!(address.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0, "{address:#x}+{len:#x}");
            let mem = guest_memory();
            let inside = vm_memory::GuestMemoryBackend::check_range(
                mem.as_ref(),
                vm_memory::GuestAddress(address),
                len as usize,
            );
            assert!(inside, "{address:#x}+{len:#x} is outside of guest memory");
            lock(&self.0).push((address, len));
        }
    }

    fn balloon() -> (Arc<Balloon>, Arc<Discards>) {
        let discards = Arc::<Discards>::default();
        (on_thread(|thread| Balloon::new(discards.clone(), thread).unwrap()), discards)
    }

    fn pages(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    fn stat(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn inflated_pages_are_discarded_in_runs() {
        let (balloon, discards) = balloon();
        let mut driver = Driver::ready(balloon, 0);
        driver.request(0, &[Part::Out(&pages(&[5, 6, 7, 9, 8])), Part::Out(&pages(&[100]))]);
        assert_eq!(discards.take(), [(0x5000, 0x3000), (0x9000, 0x1000), (0x8000, 0x1000), (0x64000, 0x1000)]);
        driver.request(1, &[Part::Out(&pages(&[5, 6]))]);
        assert!(discards.take().is_empty());
    }

    #[test]
    fn pages_outside_of_memory_are_ignored() {
        let (balloon, discards) = balloon();
        let mut driver = Driver::ready(balloon, 0);
        driver.request(0, &[Part::Out(&pages(&[0x400, u32::MAX, 0x7ff, 0x800])), Part::Out(b"odd")]);
        assert_eq!(discards.take(), [(0x80_0000, 0x1000)]);
    }

    #[test]
    fn reported_ranges_are_discarded_without_their_ragged_ends() {
        let (balloon, discards) = balloon();
        let mut driver = Driver::ready(balloon, 0);
        let (_, places) = driver.prepare(3, &[Part::In(0x3000)]);
        driver.offer(3, 0);
        driver.wait_used(3).unwrap();
        let start = places[0].next_multiple_of(PAGE);
        let end = (places[0] + 0x3000) / PAGE * PAGE;
        assert_eq!(discards.take(), [(start, end - start)]);
    }

    #[test]
    fn reporting_queue_moves_up_when_there_are_no_statistics() {
        let (balloon, discards) = balloon();
        let mut driver = Driver::ready(balloon, STATS);
        driver.request(2, &[Part::In(0x2000)]);
        assert_eq!(discards.take().len(), 1);
    }

    #[test]
    fn target_is_shown_with_an_interrupt_and_actual_is_read() {
        let (balloon, _) = balloon();
        let driver = Driver::ready(balloon.clone(), 0);
        balloon.set_target(10 * PAGE + 1);
        assert_eq!(driver.interrupts.take()[0].data, 0x40);
        assert_eq!(driver.read(0x2000, 4), 10);
        driver.write(0x2004, 4, 9);
        assert_eq!((balloon.target(), balloon.actual()), (10 * PAGE, 9 * PAGE));
        driver.write(0x2000, 4, 77);
        assert_eq!(balloon.target(), 10 * PAGE, "the target is not the driver's");
    }

    #[test]
    fn statistics_are_taken_and_asked_for_anew_also_after_a_restore() {
        let (balloon, _) = balloon();
        let mut driver = Driver::ready(balloon.clone(), 0);
        let (head, _) = driver.prepare(2, &[Part::Out(&[stat(4, 111), stat(99, 5), stat(5, 222)].concat())]);
        driver.offer(2, head);
        assert!(driver.wait_for(|_| balloon.stats().total == Some(222)));
        assert_eq!(balloon.stats(), BalloonStats { free: Some(111), total: Some(222), ..BalloonStats::default() });
        assert_eq!(driver.poll_used(2), None, "the buffer is kept");
        let saved = driver.function.save().unwrap();
        let (again, _) = super::tests::balloon();
        driver.function = function(again.clone(), driver.mem.clone()).0;
        driver.function.restore(&saved).unwrap();
        driver.function.resume();
        again.request_stats();
        assert_eq!(driver.wait_used(2).unwrap().head, head);
    }

    #[test]
    fn statistics_buffer_of_before_a_reset_is_forgotten() {
        let (balloon, _) = balloon();
        let mut driver = Driver::ready(balloon.clone(), 0);
        let (head, _) = driver.prepare(2, &[Part::Out(&stat(4, 1))]);
        driver.offer(2, head);
        assert!(driver.wait_for(|_| balloon.stats().free.is_some()));
        driver.start(0);
        assert_eq!(balloon.stats(), BalloonStats::default());
        balloon.request_stats();
        driver.function.pause();
        driver.function.resume();
        driver.function.pause();
        assert_eq!(driver.poll_used(2), None);
    }

    #[test]
    fn restore_of_a_buffer_outside_of_the_queue_returns_invalid() {
        use ovms_state::{Section, StateError};
        let (balloon, _) = balloon();
        for (head, fits) in [(127, true), (128, false)] {
            let state = serde_json::json!({"target": 0, "actual": 0, "held": head});
            let section = Section { payload: state.to_string().into_bytes(), ..balloon.save().unwrap() };
            match balloon.restore(&section) {
                Ok(()) => assert!(fits),
                Err(error) => assert!(!fits && matches!(error, StateError::Invalid { .. }), "{error}"),
            }
        }
    }

    #[test]
    fn contract_holds() {
        virtio_contract::device(|| balloon().0);
    }
}
