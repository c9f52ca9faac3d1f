//! virtio-rng (virtio 1.2, 5.4): the host's randomness for the guest.
//!
//! A request yields at most [`MAX_REQUEST_BYTES`], whatever its chain says, and all requests together at most
//! [`BYTES_PER_SECOND`]: a guest that asks for ever gets its share and no more of the host's time.

mod device;
mod persist;
mod worker;

pub use device::Rng;
pub use worker::{BYTES_PER_SECOND, MAX_REQUEST_BYTES};
