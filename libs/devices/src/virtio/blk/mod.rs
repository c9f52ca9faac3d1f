//! virtio-blk (virtio 1.2, 5.2): a disk of several queues, each served by a thread of its own, straight between guest
//! memory and the backend.
//!
//! ```text
//!   queue 0 ──> Worker ──┐                                    ┌─ preadv/pwritev from guest buffers
//!   queue 1 ──> Worker ──┼──> request::execute ──> BlockBackend ── flush
//!   queue n ──> Worker ──┘                                    └─ discard, write zeroes
//! ```
//!
//! I/O is synchronous, so a worker has at most one request in flight, and [`crate::virtio::VirtioDevice::pause`]
//! returns when each has completed its own: after it, nothing is on its way to the disk.

mod backend;
mod device;
mod persist;
mod request;
#[allow(unsafe_code, reason = "hands guest buffers to vectored system calls without a copy")]
mod sys;
mod worker;

pub use backend::BlockBackend;
pub use device::{Block, BlockOptions};
pub use request::MAX_REQUEST_BYTES;
