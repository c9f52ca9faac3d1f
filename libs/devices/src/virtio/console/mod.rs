//! virtio-console (virtio 1.2, 5.3): one port, in and out, with its size. No multiport.
//!
//! ```text
//!   host ──> InputQueue ──on_data──> receive worker ──> queue 0 (guest reads)
//!   host <── ByteSink   <─────────── transmit worker <── queue 1 (guest writes)
//! ```
//!
//! The directions have a worker each, which wait for nothing: while the host takes no output, what the guest writes stays
//! in the queue, and a ^C still gets through.

mod device;
mod persist;
mod worker;

pub use device::Console;
