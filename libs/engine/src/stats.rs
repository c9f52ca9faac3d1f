//! Figures of a machine's cgroup, in one shape for both versions of cgroups.

/// Which version of cgroups the figures come from, and so which type a containerd client should get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// One hierarchy for each controller (also where systemd mounts a controller-less v2 hierarchy beside them).
    V1,
    /// One hierarchy for all.
    V2,
}

/// What a machine has used. A figure that the host does not offer is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Where they come from.
    pub version: CgroupVersion,
    /// Processor time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Processes and threads.
    pub pids: PidStats,
    /// Block I/O.
    pub io: Vec<IoStats>,
}

/// Processor time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Nanoseconds in all.
    pub usage_ns: u64,
    /// Nanoseconds in user mode.
    pub user_ns: u64,
    /// Nanoseconds in the kernel.
    pub system_ns: u64,
    /// Nanoseconds for each host CPU (v1 only).
    pub per_cpu_ns: Vec<u64>,
    /// Periods of the bandwidth control that have passed.
    pub periods: u64,
    /// Periods in which the machine was held back.
    pub throttled_periods: u64,
    /// Nanoseconds for which it was held back.
    pub throttled_ns: u64,
}

/// Memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in use, page cache included.
    pub usage: u64,
    /// Most bytes that were in use at once.
    pub max_usage: u64,
    /// Limit in bytes; `u64::MAX`: none.
    pub limit: u64,
    /// How often the limit was met.
    pub failcnt: u64,
    /// Bytes of memory plus swap in use (v1) or of swap in use (v2).
    pub swap_usage: u64,
    /// Limit of `swap_usage`; `u64::MAX`: none.
    pub swap_limit: u64,
    /// Kernel memory in use in bytes.
    pub kernel_usage: u64,
    /// How often the OOM killer killed.
    pub oom_kills: u64,
    /// The lines of `memory.stat` as the kernel names them.
    pub stat: Vec<(String, u64)>,
    /// The lines of v2's `memory.events`.
    pub events: Vec<(String, u64)>,
}

impl MemoryStats {
    /// One line of `memory.stat`; 0 if there is none.
    #[must_use]
    pub fn stat(&self, name: &str) -> u64 {
        self.stat.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value)
    }
}

/// Processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PidStats {
    /// How many there are.
    pub current: u64,
    /// How many there may be; 0: no limit.
    pub limit: u64,
}

/// Block I/O with one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Read requests.
    pub read_ops: u64,
    /// Write requests.
    pub write_ops: u64,
}
