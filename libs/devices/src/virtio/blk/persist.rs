//! Saved state of a block device: what its driver was told of the disk. The disk itself is saved with the block stack.

use std::sync::atomic::Ordering;

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use super::request::SECTOR;
use super::Block;

const KIND: &str = "virtio-blk";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct BlockV1 {
    capacity: u64,
    read_only: bool,
}

impl Persist for Block {
    fn save(&self) -> Result<Section, StateError> {
        let capacity = self.capacity.load(Ordering::Acquire);
        Section::encode(KIND, VERSION, &BlockV1 { capacity, read_only: self.shared.backend.is_read_only() })
    }

    /// The driver must find the disk that it was told of: no smaller, and as writable. One that has grown looks as
    /// before.
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: BlockV1 = section.decode(KIND, VERSION)?;
        let backend = &self.shared.backend;
        let sectors = backend.size() / SECTOR;
        if state.capacity > sectors || state.read_only != backend.is_read_only() {
            let what = format!(
                "a disk of {} sectors, read-only: {}; this one has {sectors}, read-only: {}",
                state.capacity,
                state.read_only,
                backend.is_read_only()
            );
            return Err(StateError::Invalid { kind: KIND, what });
        }
        self.capacity.store(state.capacity, Ordering::Release);
        Ok(())
    }
}
