//! cgroup version 1: one hierarchy for each controller (the kernel's Documentation/admin-guide/cgroup-v1).

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::files::{self, field, fields, number, read, set};
use super::{file_error, Bounds, OomWatch};
use crate::error::{Error, Result};
use crate::spec::Limits;
use crate::stats::{CgroupVersion, CpuStats, IoStats, MemoryStats, PidStats, Stats};

/// Nanoseconds in a tick of `cpuacct.stat` (USER_HZ is 100 on x86).
const TICK_NS: u64 = 10_000_000;

/// A cgroup below each hierarchy.
#[derive(Debug)]
pub(crate) struct V1 {
    hierarchies: Vec<Hierarchy>,
}

#[derive(Debug)]
struct Hierarchy {
    options: Vec<String>,
    root: PathBuf,
    dir: PathBuf,
}

impl V1 {
    /// A host uses version 1 if the memory or the cpu controller has a hierarchy of its own.
    pub(super) fn find(mountinfo: &str, path: &Path) -> Option<Self> {
        let hierarchies: Vec<_> = files::mounts(mountinfo)
            .into_iter()
            .filter(|mount| mount.kind == "cgroup")
            .map(|mount| Hierarchy { dir: mount.point.join(path), root: mount.point, options: mount.options })
            .collect();
        let found = Self { hierarchies };
        (found.dir("memory").is_some() || found.dir("cpu").is_some()).then_some(found)
    }

    fn hierarchy(&self, controller: &str) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|hierarchy| hierarchy.options.iter().any(|option| option == controller))
    }

    fn dir(&self, controller: &str) -> Option<&Path> {
        self.hierarchy(controller).map(|hierarchy| hierarchy.dir.as_path())
    }

    pub(super) fn dirs(&self) -> Vec<PathBuf> {
        self.hierarchies.iter().map(|hierarchy| hierarchy.dir.clone()).collect()
    }

    /// Makes the directory in every hierarchy, so that the VMM is in none of the caller's.
    pub(super) fn create(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            files::make_dir(&hierarchy.dir)?;
        }
        match self.hierarchy("cpuset") {
            Some(hierarchy) => inherit_cpuset(hierarchy),
            None => Ok(()),
        }
    }

    pub(super) fn tasks(&self) -> Result<Vec<OwnedFd>> {
        let open = |hierarchy: &Hierarchy| {
            let path = hierarchy.dir.join("tasks");
            File::options().write(true).open(&path).map(OwnedFd::from).map_err(file_error("opened", &path))
        };
        self.hierarchies.iter().map(open).collect()
    }

    pub(super) fn apply(&self, bounds: &Bounds) -> Result<()> {
        let limits = &bounds.limits;
        if let Some(dir) = self.dir("memory") {
            apply_memory(dir, bounds)?;
        }
        if let Some(dir) = self.dir("cpu") {
            set_number(dir, "cpu.shares", limits.cpu_shares.filter(|shares| *shares > 0))?;
            set_number(dir, "cpu.cfs_period_us", limits.cpu_period.filter(|period| *period > 0))?;
            set_number(dir, "cpu.cfs_quota_us", limits.cpu_quota.filter(|quota| *quota != 0))?;
        }
        if let Some(dir) = self.dir("cpuset") {
            set_text(dir, "cpuset.cpus", limits.cpuset_cpus.as_deref())?;
            set_text(dir, "cpuset.mems", limits.cpuset_mems.as_deref())?;
        }
        if let Some(dir) = self.dir("blkio") {
            let bfq = dir.join("blkio.bfq.weight").exists();
            let file = if bfq { "blkio.bfq.weight" } else { "blkio.weight" };
            set_number(dir, file, limits.io_weight.filter(|weight| *weight > 0))?;
        }
        if let Some(warning) = lost(limits) {
            tracing::warn!("{warning}");
        }
        Ok(())
    }

    pub(super) fn watch_oom(&self) -> Result<OomWatch> {
        let dir = self.dir("memory").ok_or_else(no_memory)?;
        let error = || Error::io("an eventfd cannot be made");
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let eventfd = eventfd.map_err(std::io::Error::from).map_err(error())?;
        let counter = dir.join("memory.oom_control");
        let file = File::open(&counter).map_err(file_error("opened", &counter))?;
        let control = dir.join("cgroup.event_control");
        let line = format!("{} {}", eventfd.as_fd().as_raw_fd(), file.as_raw_fd());
        files::write(&control, &line).map_err(file_error("written", &control))?;
        Ok(OomWatch { fd: eventfd.into(), version: CgroupVersion::V1, counter })
    }

    pub(super) fn stats(&self) -> Stats {
        Stats {
            version: CgroupVersion::V1,
            cpu: self.cpu_stats(),
            memory: self.dir("memory").map(memory_stats).unwrap_or_default(),
            pids: self.dir("pids").map(pid_stats).unwrap_or_default(),
            io: self.dir("blkio").map(io_stats).unwrap_or_default(),
        }
    }

    fn cpu_stats(&self) -> CpuStats {
        let mut stats = CpuStats::default();
        if let Some(dir) = self.dir("cpuacct") {
            let split = read(&dir.join("cpuacct.stat")).unwrap_or_default();
            stats.usage_ns = number(&dir.join("cpuacct.usage"));
            stats.user_ns = field(&split, "user").saturating_mul(TICK_NS);
            stats.system_ns = field(&split, "system").saturating_mul(TICK_NS);
            let each = read(&dir.join("cpuacct.usage_percpu")).unwrap_or_default();
            stats.per_cpu_ns = each.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        }
        if let Some(dir) = self.dir("cpu") {
            let text = read(&dir.join("cpu.stat")).unwrap_or_default();
            stats.periods = field(&text, "nr_periods");
            stats.throttled_periods = field(&text, "nr_throttled");
            stats.throttled_ns = field(&text, "throttled_time");
        }
        stats
    }
}

/// Names what version 1 has no files for.
fn lost(limits: &Limits) -> Option<String> {
    let names: Vec<_> = limits.unified.iter().map(|(file, _)| file.as_str()).collect();
    (!names.is_empty()).then(|| {
        let names = names.join(", ");
        format!(
            "this host has cgroup v1, so these limits of the spec's linux.resources.unified have no effect: {names}"
        )
    })
}

fn no_memory() -> Error {
    Error::new(crate::Kind::Unavailable, "the host has no memory controller")
}

/// The kernel keeps `limit <= memory+swap limit` at every step, so the order depends on the direction.
fn apply_memory(dir: &Path, bounds: &Bounds) -> Result<()> {
    const BOTH: &str = "memory.memsw.limit_in_bytes";
    const MEMORY: &str = "memory.limit_in_bytes";
    let both = bounds.memory_and_swap.filter(|limit| *limit != 0);
    match bounds.memory {
        Some(limit) if both.is_some() && number(&dir.join(BOTH)) < limit => {
            set_number(dir, BOTH, both)?;
            set_number(dir, MEMORY, Some(limit))?;
        }
        limit => {
            set_number(dir, MEMORY, limit)?;
            set_number(dir, BOTH, both)?;
        }
    }
    let reservation = bounds.limits.memory_reservation.filter(|bytes| *bytes != 0);
    set_number(dir, "memory.soft_limit_in_bytes", reservation)
}

fn memory_stats(dir: &Path) -> MemoryStats {
    let limit = |file: &str| match number(&dir.join(file)) {
        // The kernel writes "no limit" as the largest number of whole pages.
        limit if limit >= (i64::MAX as u64) & !0xffff => u64::MAX,
        limit => limit,
    };
    let oom = read(&dir.join("memory.oom_control")).unwrap_or_default();
    MemoryStats {
        usage: number(&dir.join("memory.usage_in_bytes")),
        max_usage: number(&dir.join("memory.max_usage_in_bytes")),
        limit: limit("memory.limit_in_bytes"),
        failcnt: number(&dir.join("memory.failcnt")),
        swap_usage: number(&dir.join("memory.memsw.usage_in_bytes")),
        swap_limit: limit("memory.memsw.limit_in_bytes"),
        kernel_usage: number(&dir.join("memory.kmem.usage_in_bytes")),
        oom_kills: field(&oom, "oom_kill"),
        stat: fields(&read(&dir.join("memory.stat")).unwrap_or_default()),
        events: Vec::new(),
    }
}

pub(super) fn pid_stats(dir: &Path) -> PidStats {
    let limit = number(&dir.join("pids.max"));
    PidStats { current: number(&dir.join("pids.current")), limit: if limit == u64::MAX { 0 } else { limit } }
}

/// `major:minor operation number` lines.
fn io_stats(dir: &Path) -> Vec<IoStats> {
    let mut all: Vec<IoStats> = Vec::new();
    type Add = fn(&mut IoStats, u64);
    let files: [(&str, Add, Add); 2] = [
        ("blkio.throttle.io_service_bytes_recursive", |io, n| io.read_bytes += n, |io, n| io.write_bytes += n),
        ("blkio.throttle.io_serviced_recursive", |io, n| io.read_ops += n, |io, n| io.write_ops += n),
    ];
    for (file, add_read, add_write) in files {
        for line in read(&dir.join(file)).unwrap_or_default().lines() {
            let mut words = line.split_ascii_whitespace();
            let Some((major, minor)) = words.next().and_then(device) else { continue };
            let add = match words.next() {
                Some("Read") => add_read,
                Some("Write") => add_write,
                _ => continue,
            };
            let value = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            add(entry(&mut all, major, minor), value);
        }
    }
    all
}

/// `8:0` → (8, 0).
pub(super) fn device(word: &str) -> Option<(u64, u64)> {
    let (major, minor) = word.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn entry(all: &mut Vec<IoStats>, major: u64, minor: u64) -> &mut IoStats {
    let index = all.iter().position(|io| (io.major, io.minor) == (major, minor)).unwrap_or_else(|| {
        all.push(IoStats { major, minor, ..IoStats::default() });
        all.len() - 1
    });
    &mut all[index]
}

/// A new cpuset has no CPUs and takes no process: each level that is empty gets those of the level above.
fn inherit_cpuset(hierarchy: &Hierarchy) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let levels: Vec<_> = hierarchy.dir.ancestors().take_while(|dir| dir.starts_with(&hierarchy.root)).collect();
        let mut above = String::new();
        for dir in levels.into_iter().rev() {
            let path = dir.join(file);
            let own = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
            if own.is_empty() && !above.is_empty() {
                files::write(&path, &above).map_err(file_error("written", &path))?;
            } else {
                above = own;
            }
        }
    }
    Ok(())
}

pub(super) fn set_number(dir: &Path, file: &str, value: Option<impl ToString>) -> Result<()> {
    value.map_or(Ok(()), |value| set(dir, file, &value.to_string()))
}

pub(super) fn set_text(dir: &Path, file: &str, value: Option<&str>) -> Result<()> {
    value.filter(|value| !value.is_empty()).map_or(Ok(()), |value| set(dir, file, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(dir: &Path) -> V1 {
        let line = |name: &str| format!("1 1 0:1 / {}/{name} rw - cgroup cgroup rw,{name}\n", dir.display());
        let mountinfo = ["memory", "cpu", "cpuacct", "blkio", "pids"].map(line).concat();
        let v1 = V1::find(&mountinfo, Path::new("default/vm1")).unwrap();
        v1.create().unwrap();
        v1
    }

    fn put(v1: &V1, controller: &str, file: &str, text: &str) {
        fs::write(v1.dir(controller).unwrap().join(file), text).unwrap();
    }

    #[test]
    fn limits_go_to_the_files_of_their_controllers() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = fake(dir.path());
        for (controller, file) in
            [("memory", "memory.limit_in_bytes"), ("cpu", "cpu.shares"), ("cpu", "cpu.cfs_quota_us")]
        {
            put(&v1, controller, file, "0");
        }
        let limits = Limits { cpu_shares: Some(512), cpu_quota: Some(-1), ..Limits::default() };
        v1.apply(&Bounds { limits, memory: Some(64 << 20), memory_and_swap: None }).unwrap();
        let read = |controller: &str, file: &str| fs::read_to_string(v1.dir(controller).unwrap().join(file)).unwrap();
        assert!(read("memory", "memory.limit_in_bytes").starts_with("67108864"));
        assert!(read("cpu", "cpu.shares").starts_with("512"));
        assert!(read("cpu", "cpu.cfs_quota_us").starts_with("-1"));
    }

    #[test]
    fn limits_for_version_2_alone_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = fake(dir.path());
        let unified = [("memory.high", "1"), ("io.latency", "2")].map(|(file, value)| (file.into(), value.into()));
        let limits = Limits { unified: unified.into(), ..Limits::default() };
        let log = crate::log::tests::captured(|| {
            v1.apply(&Bounds { limits, ..Bounds::default() }).unwrap();
            v1.apply(&Bounds::default()).unwrap();
        });
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("linux.resources.unified have no effect: memory.high, io.latency"), "{log}");
    }

    #[test]
    fn stats_are_read_from_every_controller() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = fake(dir.path());
        put(&v1, "cpuacct", "cpuacct.usage", "5000\n");
        put(&v1, "cpuacct", "cpuacct.stat", "user 2\nsystem 1\n");
        put(&v1, "cpuacct", "cpuacct.usage_percpu", "3000 2000 \n");
        put(&v1, "cpu", "cpu.stat", "nr_periods 4\nnr_throttled 1\nthrottled_time 99\n");
        put(&v1, "memory", "memory.usage_in_bytes", "4096\n");
        put(&v1, "memory", "memory.limit_in_bytes", "9223372036854771712\n");
        put(&v1, "memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        put(&v1, "memory", "memory.stat", "cache 7\nrss 8\n");
        put(&v1, "pids", "pids.current", "3\n");
        put(&v1, "pids", "pids.max", "max\n");
        put(
            &v1,
            "blkio",
            "blkio.throttle.io_service_bytes_recursive",
            "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n",
        );
        put(&v1, "blkio", "blkio.throttle.io_serviced_recursive", "8:0 Read 1\n8:0 Write 2\n");
        let stats = v1.stats();
        assert_eq!((stats.cpu.usage_ns, stats.cpu.user_ns, stats.cpu.throttled_ns), (5000, 2 * TICK_NS, 99));
        assert_eq!(stats.cpu.per_cpu_ns, [3000, 2000]);
        assert_eq!((stats.memory.usage, stats.memory.limit, stats.memory.oom_kills), (4096, u64::MAX, 2));
        assert_eq!(stats.memory.stat("rss"), 8);
        assert_eq!(stats.pids, PidStats { current: 3, limit: 0 });
        let io = IoStats { major: 8, minor: 0, read_bytes: 10, write_bytes: 20, read_ops: 1, write_ops: 2 };
        assert_eq!(stats.io, [io]);
    }

    #[test]
    fn a_hybrid_host_is_version_1_and_a_unified_one_is_not() {
        let hybrid = "1 1 0:1 / /c/memory rw - cgroup cgroup rw,memory\n2 1 0:2 / /c/unified rw - cgroup2 cgroup2 rw\n";
        assert!(V1::find(hybrid, Path::new("x")).is_some());
        assert!(V1::find("2 1 0:2 / /c rw - cgroup2 cgroup2 rw\n", Path::new("x")).is_none());
    }
}
