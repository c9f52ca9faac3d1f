//! Serves one queue of a block device.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::device::FLUSH;
use super::request::{Executor, Failure, ID_BYTES};
use super::BlockBackend;
use crate::log_limit::LogLimit;
use crate::virtio::queue::{QueueError, Turn, VirtQueue};
use crate::virtio::worker::QueueWorker;

/// What the workers of one device share.
pub(super) struct Shared {
    pub(super) backend: Arc<dyn BlockBackend>,
    pub(super) id: [u8; ID_BYTES],
    pub(super) log: LogLimit,
}

pub(super) struct BlockWorker {
    shared: Arc<Shared>,
    write_through: bool,
}

impl BlockWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, write_through: true }
    }
}

impl QueueWorker for BlockWorker {
    fn activated(&mut self, features: u64) {
        self.write_through = features & FLUSH == 0;
    }

    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        let shared = &self.shared;
        let executor = Executor { backend: shared.backend.as_ref(), id: &shared.id, write_through: self.write_through };
        let Some(queue) = queues.get_mut(at) else { return Ok(Turn::Idle) };
        queue.serve(
            || hurry.load(Ordering::Relaxed),
            |mem, request| {
                let (written, failure) = executor.execute(mem, request)?;
                if let Some(Failure::Backend(error)) = failure {
                    if shared.log.allows() {
                        tracing::warn!(error = &error as &dyn std::error::Error, "a request to the disk failed");
                    }
                }
                Ok(written)
            },
        )
    }
}
