//! virtio-balloon (virtio 1.2, 5.5): takes memory from the guest on the host's wish, and takes back pages that the
//! guest reports as free, at any time.
//!
//! ```text
//!   set_target() ──config──> driver ──inflate queue──> page numbers ──┐
//!                            driver ──reporting queue─> free ranges ──┼──> MemoryDiscard
//!                            driver ──deflate queue──> page numbers ──┘ (nothing to do: a touch brings a page back)
//!   request_stats() ──> hands back the statistics buffer ──> driver fills it anew ──> stats()
//! ```

mod device;
mod persist;
mod worker;

pub use device::{Balloon, BalloonStats};
