//! A queue as devices use it: whole, checked requests out, used lengths in.
//!
//! A chain is read once, completely, before anything of it is done: its segments lie in guest memory, the readable ones
//! come first, it ends, and it has at most [`MAX_SEGMENTS`]. A guest that changes a descriptor afterwards changes
//! nothing. A chain that breaks a rule breaks the queue: the device stops and asks to be reset.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, QueueProgress, VirtioInterrupt};
use crate::GuestMemory;

/// Segments that one request may have: four times what any device here lets its driver use.
pub const MAX_SEGMENTS: usize = 1024;

/// How a driver broke its queue.
#[derive(Debug, Error)]
pub(crate) enum QueueError {
    #[error("the ring cannot be used")]
    Ring(#[source] virtio_queue::Error),
    #[error("descriptor chain {0} is empty, loops or leaves its table")]
    Endless(u16),
    #[error("descriptor chain {0} has more than {MAX_SEGMENTS} segments")]
    TooLong(u16),
    #[error("descriptor chain {0} has a segment outside of guest memory")]
    OutsideMemory(u16),
    #[error("descriptor chain {0} has a readable segment after a writable one")]
    Disorder(u16),
    #[error("a request of {0} has no room for its answer")]
    NoRoom(&'static str),
}

/// A stretch of guest memory that lies wholly inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// One checked descriptor chain.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) head: u16,
    /// What the driver gave the device to read.
    pub(crate) readable: Vec<Segment>,
    /// Where the device writes its answer.
    pub(crate) writable: Vec<Segment>,
}

/// Bytes of all segments together. At most 4 GiB: the length of a chain is checked to fit 32 bits.
pub(crate) fn total(segments: &[Segment]) -> u64 {
    segments.iter().fold(0u64, |sum, s| sum.saturating_add(u64::from(s.len)))
}

/// The part of `segments` from byte `offset` on, `len` bytes of it or less if there are less.
pub(crate) fn slice(segments: &[Segment], offset: u64, len: u64) -> Vec<Segment> {
    let (mut skip, mut left) = (offset, len);
    let mut part = Vec::with_capacity(segments.len());
    for segment in segments {
        let have = u64::from(segment.len);
        let skipped = skip.min(have);
        skip = skip.saturating_sub(skipped);
        let taken = have.saturating_sub(skipped).min(left);
        left = left.saturating_sub(taken);
        if taken > 0 {
            let address = GuestAddress(segment.address.0.saturating_add(skipped));
            part.push(Segment { address, len: u32::try_from(taken).unwrap_or(u32::MAX) });
        }
    }
    part
}

/// Copies out of `segments` from byte `offset` on; returns how many bytes there were.
pub(crate) fn copy_from(mem: &GuestMemory, segments: &[Segment], offset: u64, data: &mut [u8]) -> usize {
    let mut done = 0usize;
    for segment in slice(segments, offset, data.len() as u64) {
        let end = done.saturating_add(segment.len as usize);
        match data.get_mut(done..end).map(|part| mem.read_slice(part, segment.address)) {
            Some(Ok(())) => done = end,
            _ => break,
        }
    }
    done
}

/// Copies into `segments` from byte `offset` on; returns how many bytes found room.
pub(crate) fn copy_to(mem: &GuestMemory, segments: &[Segment], offset: u64, data: &[u8]) -> usize {
    let mut done = 0usize;
    for segment in slice(segments, offset, data.len() as u64) {
        let end = done.saturating_add(segment.len as usize);
        match data.get(done..end).map(|part| mem.write_slice(part, segment.address)) {
            Some(Ok(())) => done = end,
            _ => break,
        }
    }
    done
}

/// A live queue in its worker.
pub(crate) struct VirtQueue {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    mem: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
}

/// What became of a turn at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing waits; the next kick will wake the worker.
    Idle,
    /// The turn was cut short: come again.
    More,
    /// Come again after this time: the device has used up its budget.
    Later(Duration),
}

impl VirtQueue {
    pub(crate) fn new(active: ActiveQueue, mem: Arc<GuestMemory>, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        Self { index: active.index, queue: active.queue, kick: active.kick, mem, interrupt }
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.mem
    }

    pub(crate) fn progress(&self) -> QueueProgress {
        QueueProgress { index: self.index, next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// The next request, or `None` when nothing waits.
    pub(crate) fn next(&mut self) -> Result<Option<Request>, QueueError> {
        let mem = self.mem.as_ref();
        let Some(chain) = self.queue.iter(mem).map_err(QueueError::Ring)?.next() else { return Ok(None) };
        let head = chain.head_index();
        let mut request = Request { head, readable: Vec::new(), writable: Vec::new() };
        let mut ended = false;
        for (count, descriptor) in chain.enumerate() {
            if count >= MAX_SEGMENTS {
                return Err(QueueError::TooLong(head));
            }
            ended = !descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
            if segment.len == 0 {
                continue;
            }
            if !mem.check_range(segment.address, segment.len as usize) {
                return Err(QueueError::OutsideMemory(head));
            }
            if descriptor.is_write_only() {
                request.writable.push(segment);
            } else if request.writable.is_empty() {
                request.readable.push(segment);
            } else {
                return Err(QueueError::Disorder(head));
            }
        }
        if ended {
            Ok(Some(request))
        } else {
            Err(QueueError::Endless(head))
        }
    }

    /// Hands a request back, with `len` bytes written into it, and interrupts the driver if it wants that.
    pub(crate) fn complete(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.complete_quietly(head, len)?;
        self.notify()
    }

    /// As [`VirtQueue::complete`], without the interrupt: call [`VirtQueue::notify`] after the last of a batch.
    pub(crate) fn complete_quietly(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.queue.add_used(self.mem.as_ref(), head, len).map_err(QueueError::Ring)
    }

    pub(crate) fn notify(&mut self) -> Result<(), QueueError> {
        if self.queue.needs_notification(self.mem.as_ref()).map_err(QueueError::Ring)? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver to kick for the next request; returns whether one has come meanwhile.
    pub(crate) fn listen(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(self.mem.as_ref()).map_err(QueueError::Ring)
    }

    /// The most requests that a driver can have waiting, and that a turn should take.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Serves what waits, one request after the other: `handle` returns how many bytes it wrote. Ends early, and says
    /// so, after as many requests as the queue has entries or when `enough`, asked after each, says so: pause and reset,
    /// and the others on the thread, need not wait for a driver that never stops.
    pub(crate) fn serve(
        &mut self,
        enough: impl Fn() -> bool,
        mut handle: impl FnMut(&GuestMemory, &Request) -> Result<u32, QueueError>,
    ) -> Result<Turn, QueueError> {
        let mut left = self.queue.size();
        loop {
            self.queue.disable_notification(self.mem.as_ref()).map_err(QueueError::Ring)?;
            while let Some(request) = self.next()? {
                let written = handle(&self.mem, &request)?;
                self.complete(request.head, written)?;
                left = left.saturating_sub(1);
                if left == 0 || enough() {
                    return Ok(Turn::More);
                }
            }
            if !self.listen()? {
                return Ok(Turn::Idle);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(list: &[(u64, u32)]) -> Vec<Segment> {
        list.iter().map(|&(address, len)| Segment { address: GuestAddress(address), len }).collect()
    }

    #[test]
    fn slice_cuts_across_segments() {
        let all = segments(&[(0x1000, 16), (0x3000, 512), (0x2000, 1)]);
        assert_eq!(slice(&all, 0, 16), segments(&[(0x1000, 16)]));
        assert_eq!(slice(&all, 8, 16), segments(&[(0x1008, 8), (0x3000, 8)]));
        assert_eq!(slice(&all, 528, 99), segments(&[(0x2000, 1)]));
        assert_eq!(slice(&all, 529, 1), []);
        assert_eq!(total(&all), 529);
    }

    #[test]
    fn copies_cross_segments_and_stop_at_the_end() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let all = segments(&[(0x10, 3), (0x100, 3)]);
        assert_eq!(copy_to(&mem, &all, 1, b"abcdefgh"), 5);
        let mut data = [0; 9];
        assert_eq!(copy_from(&mem, &all, 2, &mut data), 4);
        assert_eq!(&data[..4], b"bcde");
    }
}
