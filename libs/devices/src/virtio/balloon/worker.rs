//! Serves the queues of a balloon.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::device::{BalloonStats, REPORTING, STATS};
use crate::sync::lock;
use crate::virtio::queue::{copy_from, total, QueueError, Request, Turn, VirtQueue};
use crate::virtio::worker::QueueWorker;
use crate::virtio::MemoryDiscard;
use crate::GuestMemory;

/// The balloon's unit, whatever the guest's pages are.
pub(super) const PAGE: u64 = 4096;
/// Page numbers taken from one request; Linux sends 256.
const MAX_PAGES: usize = 16 << 10;
/// Statistics taken from one buffer; the specification knows ten.
const MAX_STATS: usize = 64;
/// Bytes of one statistic: a 16-bit tag and a 64-bit value, packed.
const STAT_BYTES: usize = 10;

/// What the device and its worker share.
#[derive(Default)]
pub(super) struct Shared {
    /// The buffer that the driver gave for statistics, until someone asks for new ones.
    pub(super) held: Mutex<Option<u16>>,
    pub(super) stats: Mutex<BalloonStats>,
    /// Someone wants new ones.
    pub(super) asked: AtomicBool,
}

/// What a queue is for. Queues of features that were not agreed on do not exist, and those behind them move up
/// (virtio 1.2, 5.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

fn roles(features: u64) -> Vec<Role> {
    let mut roles = vec![Role::Inflate, Role::Deflate];
    roles.extend((features & STATS != 0).then_some(Role::Stats));
    roles.extend((features & REPORTING != 0).then_some(Role::Reporting));
    roles
}

pub(super) struct BalloonWorker {
    pub(super) shared: Arc<Shared>,
    pub(super) memory: Arc<dyn MemoryDiscard>,
    pub(super) ask_stats: Arc<EventFd>,
    /// The role of each queue of this driver.
    pub(super) roles: Vec<Role>,
}

impl BalloonWorker {
    fn role(&self, queue: &VirtQueue) -> Option<Role> {
        self.roles.get(usize::from(queue.index())).copied()
    }
}

/// Discards the pages that `numbers` name, runs of them at once.
fn discard_pages(mem: &GuestMemory, discard: &dyn MemoryDiscard, numbers: impl Iterator<Item = u32>) {
    let mut run: Option<(u64, u64)> = None;
    for number in numbers {
        let address = u64::from(number).saturating_mul(PAGE);
        if !mem.check_range(GuestAddress(address), PAGE as usize) {
            continue;
        }
        run = match run {
            Some((start, len)) if start.checked_add(len) == Some(address) => Some((start, len.saturating_add(PAGE))),
            done => {
                if let Some((start, len)) = done {
                    discard.discard(start, len);
                }
                Some((address, PAGE))
            }
        };
    }
    if let Some((start, len)) = run {
        discard.discard(start, len);
    }
}

fn inflate(mem: &GuestMemory, discard: &dyn MemoryDiscard, request: &Request) {
    let given = usize::try_from(total(&request.readable)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; given.min(MAX_PAGES.saturating_mul(4))];
    let got = copy_from(mem, &request.readable, 0, &mut bytes);
    let (numbers, _) = bytes.get(..got).unwrap_or_default().as_chunks::<4>();
    discard_pages(mem, discard, numbers.iter().map(|n| u32::from_le_bytes(*n)));
}

/// Discards the whole pages of each reported range; the segments were checked to lie in guest memory.
fn report(discard: &dyn MemoryDiscard, request: &Request) {
    for segment in &request.writable {
        let Some(start) = segment.address.0.checked_next_multiple_of(PAGE) else { continue };
        let end = segment.address.0.saturating_add(segment.len.into()) & !(PAGE - 1);
        if end > start {
            discard.discard(start, end.saturating_sub(start));
        }
    }
}

impl BalloonWorker {
    /// Takes the driver's statistics and keeps the buffer.
    fn take_stats(&self, queue: &mut VirtQueue) -> Result<Turn, QueueError> {
        loop {
            while let Some(request) = queue.next()? {
                let given = usize::try_from(total(&request.readable)).unwrap_or(usize::MAX);
                let mut bytes = vec![0; given.min(MAX_STATS.saturating_mul(STAT_BYTES))];
                let got = copy_from(queue.memory(), &request.readable, 0, &mut bytes);
                let (entries, _) = bytes.get(..got).unwrap_or_default().as_chunks::<STAT_BYTES>();
                let mut stats = BalloonStats::default();
                for [t0, t1, value @ ..] in entries {
                    stats.set(u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(*value));
                }
                *lock(&self.shared.stats) = stats;
                // A driver has one such buffer; one that gives a second gets the first back.
                let before = lock(&self.shared.held).replace(request.head);
                if let Some(head) = before {
                    queue.complete(head, 0)?;
                    return Ok(Turn::More);
                }
            }
            if !queue.listen()? {
                return Ok(Turn::Idle);
            }
        }
    }
}

impl QueueWorker for BalloonWorker {
    fn activated(&mut self, features: u64) {
        self.roles = roles(features);
    }

    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        let Some(queue) = queues.get_mut(at) else { return Ok(Turn::Idle) };
        let memory = self.memory.as_ref();
        // Giving memory back takes up to milliseconds a request, and others wait for the thread: one is a turn.
        let one = || true;
        match self.role(queue) {
            Some(Role::Inflate) => queue.serve(one, |mem, request| {
                inflate(mem, memory, request);
                Ok(0)
            }),
            Some(Role::Deflate) => queue.serve(|| hurry.load(Ordering::Relaxed), |_, _| Ok(0)),
            Some(Role::Stats) => self.take_stats(queue),
            Some(Role::Reporting) => queue.serve(one, |_, request| {
                report(memory, request);
                Ok(0)
            }),
            None => Ok(Turn::Idle),
        }
    }

    fn wake_fd(&self) -> Option<Arc<EventFd>> {
        Some(Arc::clone(&self.ask_stats))
    }

    /// Someone wants fresh statistics: the driver answers the return of its buffer with them.
    fn woken(&mut self, queues: &mut [VirtQueue], _hurry: &AtomicBool) -> Result<Turn, QueueError> {
        let stats = queues.iter_mut().find(|queue| self.role(queue) == Some(Role::Stats));
        if let (Some(queue), true) = (stats, self.shared.asked.swap(false, Ordering::AcqRel)) {
            let held = lock(&self.shared.held).take();
            if let Some(head) = held {
                queue.complete(head, 0)?;
            }
        }
        Ok(Turn::Idle)
    }

    fn reset(&mut self) {
        *lock(&self.shared.held) = None;
        *lock(&self.shared.stats) = BalloonStats::default();
    }
}
