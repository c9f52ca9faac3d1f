//! virtio-console (virtio 1.2, 5.3): one port, in and out, with its size. No multiport.
//!
//! ```text
//!   host ──> InputQueue ──on_data──> receive worker ──> queue 0 (guest reads)
//!   host <── ByteSink   <─────────── transmit worker <── queue 1 (guest writes)
//! ```
//!
//! The directions have a worker each: output that the host does not take must not keep a ^C from the guest.

mod device;
mod persist;
mod worker;

pub use device::Console;
