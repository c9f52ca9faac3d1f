//! Byte streams between a guest's console and the host.
//!
//! ```text
//!   host fd ──Reader thread──> InputQueue ──> serial / virtio-console ──> ByteSink (Writer ring) ──Writer thread──> host fd
//!        ^                        │ room                                       │ full
//!        └──── stops reading ─────┘                       vCPU waits at gate ──┘
//! ```
//!
//! Nothing is lost in either direction while both ends live. Input that the guest has no room for stays in the host's
//! pipe. Output is always accepted, since a register write cannot wait; the vCPU waits *after* the exit, at
//! [`ByteSink::wait_room`], where it holds no lock and can be kicked. virtio-console leaves output in the guest's queue
//! and is told of room ([`ByteSink::on_room`]).

mod input;
mod reader;
mod writer;

use std::fmt;

pub use input::InputQueue;
pub use reader::Reader;
pub use writer::Writer;

/// Bytes that one request or one exit may push at most; what a guest adds to it is lost.
pub(crate) const MAX_PUSH: u64 = 256 << 10;

/// Tells somebody that something has come. Called on whichever thread brought it: must not wait.
pub type Callback = Box<dyn Fn() + Send + Sync>;

/// Takes a console's output.
pub trait ByteSink: Send + Sync {
    /// Takes `bytes`, always, without waiting.
    fn push(&self, bytes: &[u8]);

    /// Whether who pushes should wait before it pushes more. One atomic load.
    fn is_full(&self) -> bool;

    /// Waits until the sink is not full, or until `stop` says so. `stop` is asked at once and after each
    /// [`ByteSink::kick`].
    fn wait_room(&self, stop: &dyn Fn() -> bool);

    /// Wakes whoever waits in [`ByteSink::wait_room`], to ask its `stop` again.
    fn kick(&self);

    /// Sets what is called each time that a full sink has room again, for whoever cannot wait. The first caller wins.
    fn on_room(&self, callback: Callback);
}

/// A sink that forgets.
#[derive(Clone, Copy, Default)]
pub struct NullSink;

impl ByteSink for NullSink {
    fn push(&self, _bytes: &[u8]) {}
    fn is_full(&self) -> bool {
        false
    }
    fn wait_room(&self, _stop: &dyn Fn() -> bool) {}
    fn kick(&self) {}
    fn on_room(&self, _callback: Callback) {}
}

impl fmt::Debug for NullSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NullSink")
    }
}
