//! The device: its features and configuration space, and its workers.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk as b;

use super::request::{ID_BYTES, MAX_RANGES, MAX_RANGE_SECTORS, SECTOR, SEG_MAX, SIZE_MAX};
use super::worker::{BlockWorker, Shared};
use super::BlockBackend;
use crate::log_limit::LogLimit;
use crate::threads::{Spawner, ThreadKind};
use crate::virtio::worker::Worker;
use crate::virtio::{read_bytes, ActivateError, ActiveState, QueueProgress, VirtioDevice, TYPE_BLOCK};

/// Entries of each queue: room for two of the largest requests.
const QUEUE_SIZE: u16 = 256;
/// Queues that make sense: a thread each.
const MAX_QUEUES: u16 = 32;

pub(super) const FLUSH: u64 = 1 << b::VIRTIO_BLK_F_FLUSH;
const READ_ONLY: u64 = 1 << b::VIRTIO_BLK_F_RO;
const ALWAYS: u64 = (1 << b::VIRTIO_BLK_F_SIZE_MAX)
    | (1 << b::VIRTIO_BLK_F_SEG_MAX)
    | (1 << b::VIRTIO_BLK_F_BLK_SIZE)
    | (1 << b::VIRTIO_BLK_F_TOPOLOGY)
    | (1 << b::VIRTIO_BLK_F_MQ);
const WRITABLE: u64 = FLUSH | (1 << b::VIRTIO_BLK_F_DISCARD) | (1 << b::VIRTIO_BLK_F_WRITE_ZEROES);

/// Blocks of 2^3 sectors: the stack's own granularity of 4 KiB.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// What a block device is made of, besides its backend.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// Queues, 1 to 32: one per vCPU up to a few is best, since each is a thread.
    pub queues: u16,
    /// The serial number that the guest sees, of which 20 bytes are kept.
    pub serial: String,
}

/// A disk.
pub struct Block {
    pub(super) shared: Arc<Shared>,
    pub(super) capacity: AtomicU64,
    workers: Vec<Worker>,
    sizes: Vec<u16>,
    features: u64,
}

impl Block {
    /// A disk on `backend`, with its threads.
    ///
    /// # Errors
    /// The system has no threads or eventfds to give.
    pub fn new(backend: Arc<dyn BlockBackend>, options: &BlockOptions, spawner: &Spawner) -> io::Result<Arc<Self>> {
        let queues = options.queues.clamp(1, MAX_QUEUES);
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let features = ALWAYS | if backend.is_read_only() { READ_ONLY } else { WRITABLE };
        let capacity = AtomicU64::new(backend.size() / SECTOR);
        let shared = Arc::new(Shared { backend, id, log: LogLimit::new() });
        let spawn = |index| {
            let work = BlockWorker::new(Arc::clone(&shared));
            Worker::spawn(spawner, ThreadKind::Block, &format!("blk-{index}"), work)
        };
        let workers = (0..queues).map(spawn).collect::<io::Result<Vec<_>>>()?;
        Ok(Arc::new(Self { capacity, workers, sizes: vec![QUEUE_SIZE; queues.into()], features, shared }))
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let queues = u16::try_from(self.workers.len()).unwrap_or(MAX_QUEUES);
        let sectors_per_block = 1u16 << PHYSICAL_BLOCK_EXPONENT;
        let mut config = self.capacity.load(Ordering::Acquire).to_le_bytes().to_vec();
        config.extend(SIZE_MAX.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        // No geometry.
        config.extend([0; 4]);
        config.extend((SECTOR as u32).to_le_bytes());
        config.extend([PHYSICAL_BLOCK_EXPONENT, 0]);
        config.extend(sectors_per_block.to_le_bytes());
        config.extend([0; 4]);
        // Writeback and a reserved byte.
        config.extend([0; 2]);
        config.extend(queues.to_le_bytes());
        for field in [MAX_RANGE_SECTORS, MAX_RANGES, u32::from(sectors_per_block), MAX_RANGE_SECTORS, MAX_RANGES] {
            config.extend(field.to_le_bytes());
        }
        // Zeroes may unmap.
        config.extend([1, 0, 0, 0]);
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        TYPE_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, state: ActiveState) -> Result<(), ActivateError> {
        if !state.queues.iter().any(|queue| queue.index == 0) {
            return Err(ActivateError::MissingQueue(0));
        }
        for queue in state.queues {
            if let Some(worker) = self.workers.get(usize::from(queue.index)) {
                worker.activate(ActiveState {
                    mem: Arc::clone(&state.mem),
                    queues: vec![queue],
                    features: state.features,
                    interrupt: Arc::clone(&state.interrupt),
                })?;
            }
        }
        Ok(())
    }

    fn reset(&self) {
        for worker in &self.workers {
            worker.reset();
        }
    }

    fn pause(&self) -> Vec<QueueProgress> {
        self.workers.iter().flat_map(Worker::pause).collect()
    }

    fn hold(&self, until: Instant) -> bool {
        // Every one is asked, whichever keeps the others waiting.
        self.workers.iter().filter(|worker| !worker.hold(until)).count() == 0
    }

    fn resume(&self) {
        for worker in &self.workers {
            worker.resume();
        }
    }
}

#[cfg(test)]
mod tests;
