//! Kinds of threads. Also read by the build script, which compiles a filter for each.

/// Kinds of threads of a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The owner of the machine: parses the kernel, then control socket, state changes, end. One filter for both: a
    /// second, narrower one would take away an `lseek` and three ioctls of the boot processor, and costs 0.1 ms.
    Main,
    /// Runs guest code and answers its exits.
    Vcpu,
    /// Serves a block device's queues.
    Block,
    /// Moves bytes between the host's descriptors and console devices, and serves the remaining queues.
    Console,
    /// Reads ahead and records what a restored guest touches.
    WorkingSet,
    /// Takes snapshots: copies guest memory into a file.
    Snapshot,
}

impl ThreadKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 6] = [Self::Main, Self::Vcpu, Self::Block, Self::Console, Self::WorkingSet, Self::Snapshot];
}
