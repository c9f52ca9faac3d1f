//! cgroup version 2: one hierarchy for all controllers (the kernel's Documentation/admin-guide/cgroup-v2.rst).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::files::{self, field, fields, number, read, set};
use super::v1::{device, pid_stats, set_number, set_text};
use super::{file_error, Bounds, OomWatch};
use crate::error::{Error, Kind, Result};
use crate::spec::Limits;
use crate::stats::{CgroupVersion, CpuStats, IoStats, MemoryStats, Stats};

/// Controllers that a machine's cgroup needs.
const CONTROLLERS: [&str; 5] = ["cpu", "memory", "pids", "io", "cpuset"];

/// A cgroup in the one hierarchy.
#[derive(Debug)]
pub(crate) struct V2 {
    root: PathBuf,
    dir: PathBuf,
}

impl V2 {
    pub(super) fn find(mountinfo: &str, path: &Path) -> Option<Self> {
        let mount = files::mounts(mountinfo).into_iter().find(|mount| mount.kind == "cgroup2")?;
        Some(Self { dir: mount.point.join(path), root: mount.point })
    }

    pub(super) fn dirs(&self) -> Vec<PathBuf> {
        vec![self.dir.clone()]
    }

    /// Makes the directory, and switches the controllers on at every level above it.
    pub(super) fn create(&self) -> Result<()> {
        files::make_dir(&self.dir)?;
        let levels: Vec<_> = self.dir.ancestors().skip(1).take_while(|dir| dir.starts_with(&self.root)).collect();
        for dir in levels.into_iter().rev() {
            for controller in CONTROLLERS {
                let path = dir.join("cgroup.subtree_control");
                // Not every host has every controller; a limit that needs it says so when it is set.
                if let Err(err) = files::write(&path, &format!("+{controller}")) {
                    tracing::debug!(path = %path.display(), controller, %err, "a cgroup controller stays off");
                }
            }
        }
        Ok(())
    }

    pub(super) fn open(&self) -> Result<OwnedFd> {
        File::open(&self.dir).map(OwnedFd::from).map_err(file_error("opened", &self.dir))
    }

    pub(super) fn apply(&self, bounds: &Bounds) -> Result<()> {
        let (dir, limits) = (self.dir.as_path(), &bounds.limits);
        set_number(dir, "memory.max", bounds.memory)?;
        set_text(dir, "memory.swap.max", swap_max(bounds).as_deref())?;
        set_text(dir, "memory.low", limits.memory_reservation.and_then(limit_text).as_deref())?;
        set_number(dir, "cpu.weight", limits.cpu_shares.filter(|shares| *shares > 0).map(weight_of_shares))?;
        set_text(dir, "cpu.max", cpu_max(limits).as_deref())?;
        set_text(dir, "cpuset.cpus", limits.cpuset_cpus.as_deref())?;
        set_text(dir, "cpuset.mems", limits.cpuset_mems.as_deref())?;
        if let Some(weight) = limits.io_weight.filter(|weight| *weight > 0) {
            if dir.join("io.bfq.weight").exists() {
                set(dir, "io.bfq.weight", &weight.to_string())?;
            } else {
                set(dir, "io.weight", &format!("default {}", weight_of_io(weight)))?;
            }
        }
        for (file, value) in &limits.unified {
            if file.contains('/') || !file.contains('.') || file.starts_with('.') || file.starts_with("cgroup.") {
                let message = format!("{file:?} in the spec's linux.resources.unified is no controller's file");
                return Err(Error::new(Kind::InvalidArgument, message));
            }
            set(dir, file, value)?;
        }
        Ok(())
    }

    pub(super) fn watch_oom(&self) -> Result<OomWatch> {
        let counter = self.dir.join("memory.events");
        let file = File::open(&counter).map_err(file_error("opened", &counter))?;
        let watch = OomWatch { fd: file.into(), version: CgroupVersion::V2, counter };
        watch.kills();
        Ok(watch)
    }

    pub(super) fn stats(&self) -> Stats {
        let dir = &self.dir;
        let cpu = read(&dir.join("cpu.stat")).unwrap_or_default();
        let nanos = |name: &str| field(&cpu, name).saturating_mul(1000);
        let events = read(&dir.join("memory.events")).unwrap_or_default();
        let stat = read(&dir.join("memory.stat")).unwrap_or_default();
        Stats {
            version: CgroupVersion::V2,
            cpu: CpuStats {
                usage_ns: nanos("usage_usec"),
                user_ns: nanos("user_usec"),
                system_ns: nanos("system_usec"),
                per_cpu_ns: Vec::new(),
                periods: field(&cpu, "nr_periods"),
                throttled_periods: field(&cpu, "nr_throttled"),
                throttled_ns: nanos("throttled_usec"),
            },
            memory: MemoryStats {
                usage: number(&dir.join("memory.current")),
                max_usage: number(&dir.join("memory.peak")),
                limit: number(&dir.join("memory.max")),
                failcnt: field(&events, "max"),
                swap_usage: number(&dir.join("memory.swap.current")),
                swap_limit: number(&dir.join("memory.swap.max")),
                kernel_usage: field(&stat, "kernel"),
                oom_kills: field(&events, "oom_kill"),
                stat: fields(&stat),
                events: fields(&events),
            },
            pids: pid_stats(dir),
            io: read(&dir.join("io.stat")).unwrap_or_default().lines().filter_map(io_line).collect(),
        }
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`
fn io_line(line: &str) -> Option<IoStats> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = device(words.next()?)?;
    let mut io = IoStats { major, minor, ..IoStats::default() };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => io.read_bytes = value,
            "wbytes" => io.write_bytes = value,
            "rios" => io.read_ops = value,
            "wios" => io.write_ops = value,
            _ => (),
        }
    }
    Some(io)
}

/// Shares of version 1 (2 to 262144) as a weight (1 to 10000), linearly, as Kubernetes' KEP 2254 defines it.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// The OCI spec's weight (10 to 1000) as `io.weight`'s (1 to 10000), linearly.
fn weight_of_io(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990
}

fn cpu_max(limits: &Limits) -> Option<String> {
    let period = limits.cpu_period.filter(|period| *period > 0);
    match (limits.cpu_quota.filter(|quota| *quota != 0), period) {
        (None, None) => None,
        (quota, period) => {
            let quota = quota.filter(|quota| *quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
            Some(format!("{quota} {}", period.unwrap_or(100_000)))
        }
    }
}

/// Version 1 limits the sum of memory and swap, version 2 swap alone.
fn swap_max(bounds: &Bounds) -> Option<String> {
    let both = bounds.memory_and_swap.filter(|limit| *limit != 0)?;
    let Ok(both) = u64::try_from(both) else { return Some("max".into()) };
    Some(both.saturating_sub(bounds.memory?).to_string())
}

fn limit_text(bytes: i64) -> Option<String> {
    match bytes {
        0 => None,
        bytes if bytes < 0 => Some("max".into()),
        bytes => Some(bytes.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn fake(dir: &Path) -> V2 {
        let mountinfo = format!("1 1 0:1 / {} rw - cgroup2 cgroup2 rw\n", dir.display());
        let v2 = V2::find(&mountinfo, Path::new("default/vm1")).unwrap();
        v2.create().unwrap();
        v2
    }

    #[test]
    fn limits_are_translated() {
        let dir = tempfile::tempdir().unwrap();
        let v2 = fake(dir.path());
        for file in ["memory.max", "memory.swap.max", "cpu.weight", "cpu.max", "io.weight", "memory.high"] {
            fs::write(v2.dir.join(file), "").unwrap();
        }
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota: Some(150_000),
            io_weight: Some(1000),
            unified: vec![("memory.high".into(), "1".into())],
            ..Limits::default()
        };
        v2.apply(&Bounds { limits, memory: Some(100), memory_and_swap: Some(150) }).unwrap();
        let read = |file: &str| fs::read_to_string(v2.dir.join(file)).unwrap();
        assert_eq!(
            [read("memory.max"), read("memory.swap.max"), read("cpu.weight"), read("cpu.max"), read("io.weight")],
            ["100", "50", "39", "150000 100000", "default 10000"]
        );
        assert_eq!(read("memory.high"), "1");
    }

    #[test]
    fn apply_unified_outside_of_cgroup_returns_invalid_argument() {
        let dir = tempfile::tempdir().unwrap();
        let v2 = fake(dir.path());
        for file in ["../x.y", "cgroup.procs", "plain", ".x"] {
            let limits = Limits { unified: vec![(file.into(), "1".into())], ..Limits::default() };
            let err = v2.apply(&Bounds { limits, ..Bounds::default() }).unwrap_err();
            assert_eq!(err.kind(), Kind::InvalidArgument, "{file}");
        }
    }

    #[test]
    fn stats_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let v2 = fake(dir.path());
        let files = [
            ("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.events", "max 7\noom_kill 1\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n"),
        ];
        for (file, text) in files {
            fs::write(v2.dir.join(file), text).unwrap();
        }
        let stats = v2.stats();
        assert_eq!((stats.cpu.usage_ns, stats.memory.usage, stats.memory.limit), (5000, 4096, u64::MAX));
        assert_eq!((stats.memory.oom_kills, stats.memory.failcnt), (1, 7));
        let io = IoStats { major: 8, minor: 0, read_bytes: 1, write_bytes: 2, read_ops: 3, write_ops: 4 };
        assert_eq!(stats.io, [io]);
    }
}
