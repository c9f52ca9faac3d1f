//! How devices start their threads.
//!
//! Every thread of this crate is started while its device is built, never from a vCPU thread: a thread inherits its
//! creator's seccomp filter. The machine monitor hands in what a new thread does first (install the filter of its
//! kind, set its name for accounting).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

/// What a thread is for; the machine monitor picks its seccomp filter by it.
///
/// Besides what the allocator, locks and a panic need, all of them make `poll`, `read` and `write` (eventfds), and
/// whatever the machine monitor's own [`crate::irq::MsiSink`] and [`crate::pci::MsixNotifier`] do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Reads a console's input from a host descriptor; `statx` at its end.
    ConsoleReader,
    /// Writes a console's output to a host descriptor.
    ConsoleWriter,
    /// Serves queues of a block device: makes the system calls of `ovms_disk::Stack`.
    Block,
    /// Serves queues of all other devices: `getrandom`, and what [`crate::virtio::MemoryDiscard`] does.
    Device,
}

/// Bytes of stack of a device's thread: the deepest path, a block request, needs less than a tenth.
const STACK_BYTES: usize = 256 << 10;

/// Starts threads that first do what the machine monitor wants of them.
#[derive(Clone)]
pub struct Spawner {
    enter: Arc<dyn Fn(ThreadKind) + Send + Sync>,
}

impl Spawner {
    /// `enter` runs on each new thread before anything else.
    pub fn new(enter: impl Fn(ThreadKind) + Send + Sync + 'static) -> Self {
        Self { enter: Arc::new(enter) }
    }

    /// Starts a thread; the kernel shows the first 15 bytes of `name`.
    ///
    /// # Errors
    /// What the system says if it has no thread to give.
    pub fn spawn(
        &self,
        kind: ThreadKind,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let enter = Arc::clone(&self.enter);
        Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(move || {
            enter(kind);
            body();
        })
    }
}

impl Default for Spawner {
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Spawner")
    }
}
