//! Serves the two queues of a console.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::console::{ByteSink, InputQueue};
use crate::virtio::queue::{copy_from, copy_to, total, QueueError, Turn, VirtQueue};
use crate::virtio::worker::QueueWorker;

/// Bytes that are moved at a time.
const CHUNK: usize = 4096;

/// Host to guest.
pub(super) struct Receiver {
    pub(super) input: Arc<InputQueue>,
    pub(super) data: Arc<EventFd>,
}

impl Receiver {
    /// Fills the driver's buffers while there is input. Buffers stay in the queue until there is.
    fn fill(&self, queue: &mut VirtQueue, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        for _ in 0..queue.size() {
            if self.input.is_empty() {
                return Ok(Turn::Idle);
            }
            if hurry.load(Ordering::Relaxed) {
                return Ok(Turn::More);
            }
            let Some(request) = queue.next()? else {
                if queue.listen()? {
                    continue;
                }
                return Ok(Turn::Idle);
            };
            let room = usize::try_from(total(&request.writable)).unwrap_or(CHUNK).min(CHUNK);
            let bytes = self.input.pop(room);
            let written = copy_to(queue.memory(), &request.writable, 0, &bytes);
            queue.complete(request.head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(Turn::More)
    }
}

impl QueueWorker for Receiver {
    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        queues.get_mut(at).map_or(Ok(Turn::Idle), |queue| self.fill(queue, hurry))
    }

    fn wake_fd(&self) -> Option<Arc<EventFd>> {
        Some(Arc::clone(&self.data))
    }

    fn woken(&mut self, queues: &mut [VirtQueue], hurry: &AtomicBool) -> Result<Turn, QueueError> {
        self.serve(queues, 0, hurry)
    }
}

/// Guest to host.
pub(super) struct Transmitter {
    pub(super) sink: Arc<dyn ByteSink>,
    /// Signalled when a full sink has room again.
    pub(super) room: Arc<EventFd>,
}

impl QueueWorker for Transmitter {
    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        let Some(queue) = queues.get_mut(at) else { return Ok(Turn::Idle) };
        let sink = &self.sink;
        if sink.is_full() {
            // Requests stay in the queue until there is room.
            return Ok(Turn::Idle);
        }
        queue.serve(
            || hurry.load(Ordering::Relaxed) || sink.is_full(),
            |mem, request| {
                // One request may say the same memory many times over; what a driver means to print is not that long.
                let mut left = total(&request.readable).min(crate::console::MAX_PUSH);
                let mut offset = 0u64;
                let mut chunk = [0; CHUNK];
                while left > 0 {
                    let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                    let Some(part) = chunk.get_mut(..want) else { break };
                    let got = copy_from(mem, &request.readable, offset, part);
                    sink.push(part.get(..got).unwrap_or_default());
                    offset = offset.saturating_add(got as u64);
                    left = left.saturating_sub(want as u64);
                }
                Ok(0)
            },
        )
    }

    fn wake_fd(&self) -> Option<Arc<EventFd>> {
        Some(Arc::clone(&self.room))
    }

    fn woken(&mut self, queues: &mut [VirtQueue], hurry: &AtomicBool) -> Result<Turn, QueueError> {
        self.serve(queues, 0, hurry)
    }
}
