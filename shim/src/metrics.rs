//! The engine's figures as the messages that containerd's clients know: `io.containerd.cgroups.v1.Metrics` and
//! `io.containerd.cgroups.v2.Metrics`. CPU, memory and pids are always there: nerdctl reads them without asking.

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::MessageField;
use ovms_engine::{CgroupVersion, MemoryStats, Stats};

use crate::events::any;

/// The message that fits the host's control groups.
pub fn encode(stats: &Stats) -> Any {
    match stats.version {
        CgroupVersion::V1 => any("io.containerd.cgroups.v1.Metrics", &encode_v1(stats)),
        CgroupVersion::V2 => any("io.containerd.cgroups.v2.Metrics", &encode_v2(stats)),
    }
}

fn encode_v1(stats: &Stats) -> v1::Metrics {
    let cpu = &stats.cpu;
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: cpu.usage_ns,
                kernel: cpu.system_ns,
                user: cpu.user_ns,
                per_cpu: cpu.per_cpu_ns.clone(),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: cpu.periods,
                throttled_periods: cpu.throttled_periods,
                throttled_time: cpu.throttled_ns,
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(memory_v1(&stats.memory)),
        blkio: MessageField::some(block_v1(stats)),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: stats.memory.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory_v1(memory: &MemoryStats) -> v1::MemoryStat {
    let entry = |usage, limit, max, failcnt| {
        MessageField::some(v1::MemoryEntry { usage, limit, max, failcnt, ..Default::default() })
    };
    v1::MemoryStat {
        cache: memory.stat("cache"),
        rss: memory.stat("rss"),
        rss_huge: memory.stat("rss_huge"),
        mapped_file: memory.stat("mapped_file"),
        dirty: memory.stat("dirty"),
        writeback: memory.stat("writeback"),
        pg_pg_in: memory.stat("pgpgin"),
        pg_pg_out: memory.stat("pgpgout"),
        pg_fault: memory.stat("pgfault"),
        pg_maj_fault: memory.stat("pgmajfault"),
        inactive_anon: memory.stat("inactive_anon"),
        active_anon: memory.stat("active_anon"),
        inactive_file: memory.stat("inactive_file"),
        active_file: memory.stat("active_file"),
        unevictable: memory.stat("unevictable"),
        hierarchical_memory_limit: memory.stat("hierarchical_memory_limit"),
        hierarchical_swap_limit: memory.stat("hierarchical_memsw_limit"),
        total_cache: memory.stat("total_cache"),
        total_rss: memory.stat("total_rss"),
        total_rss_huge: memory.stat("total_rss_huge"),
        total_mapped_file: memory.stat("total_mapped_file"),
        total_dirty: memory.stat("total_dirty"),
        total_writeback: memory.stat("total_writeback"),
        total_pg_pg_in: memory.stat("total_pgpgin"),
        total_pg_pg_out: memory.stat("total_pgpgout"),
        total_pg_fault: memory.stat("total_pgfault"),
        total_pg_maj_fault: memory.stat("total_pgmajfault"),
        total_inactive_anon: memory.stat("total_inactive_anon"),
        total_active_anon: memory.stat("total_active_anon"),
        total_inactive_file: memory.stat("total_inactive_file"),
        total_active_file: memory.stat("total_active_file"),
        total_unevictable: memory.stat("total_unevictable"),
        usage: entry(memory.usage, memory.limit, memory.max_usage, memory.failcnt),
        swap: entry(memory.swap_usage, memory.swap_limit, 0, 0),
        kernel: entry(memory.kernel_usage, u64::MAX, 0, 0),
        kernel_tcp: entry(0, u64::MAX, 0, 0),
        ..Default::default()
    }
}

fn block_v1(stats: &Stats) -> v1::BlkIOStat {
    let entries = |figure: fn(&ovms_engine::IoStats) -> [(&'static str, u64); 2]| {
        let of_device = |io: &ovms_engine::IoStats| {
            let (major, minor) = (io.major, io.minor);
            figure(io).map(|(op, value)| v1::BlkIOEntry { op: op.into(), major, minor, value, ..Default::default() })
        };
        stats.io.iter().flat_map(of_device).collect()
    };
    v1::BlkIOStat {
        io_service_bytes_recursive: entries(|io| [("Read", io.read_bytes), ("Write", io.write_bytes)]),
        io_serviced_recursive: entries(|io| [("Read", io.read_ops), ("Write", io.write_ops)]),
        ..Default::default()
    }
}

fn encode_v2(stats: &Stats) -> v2::Metrics {
    let cpu = &stats.cpu;
    let memory = &stats.memory;
    let event = |name: &str| memory.events.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value);
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: cpu.usage_ns / 1000,
            user_usec: cpu.user_ns / 1000,
            system_usec: cpu.system_ns / 1000,
            nr_periods: cpu.periods,
            nr_throttled: cpu.throttled_periods,
            throttled_usec: cpu.throttled_ns / 1000,
            ..Default::default()
        }),
        memory: MessageField::some(memory_v2(memory)),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: stats
                .io
                .iter()
                .map(|io| v2::IOEntry {
                    major: io.major,
                    minor: io.minor,
                    rbytes: io.read_bytes,
                    wbytes: io.write_bytes,
                    rios: io.read_ops,
                    wios: io.write_ops,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory_v2(memory: &MemoryStats) -> v2::MemoryStat {
    v2::MemoryStat {
        anon: memory.stat("anon"),
        file: memory.stat("file"),
        kernel_stack: memory.stat("kernel_stack"),
        slab: memory.stat("slab"),
        sock: memory.stat("sock"),
        shmem: memory.stat("shmem"),
        file_mapped: memory.stat("file_mapped"),
        file_dirty: memory.stat("file_dirty"),
        file_writeback: memory.stat("file_writeback"),
        anon_thp: memory.stat("anon_thp"),
        inactive_anon: memory.stat("inactive_anon"),
        active_anon: memory.stat("active_anon"),
        inactive_file: memory.stat("inactive_file"),
        active_file: memory.stat("active_file"),
        unevictable: memory.stat("unevictable"),
        slab_reclaimable: memory.stat("slab_reclaimable"),
        slab_unreclaimable: memory.stat("slab_unreclaimable"),
        pgfault: memory.stat("pgfault"),
        pgmajfault: memory.stat("pgmajfault"),
        pgrefill: memory.stat("pgrefill"),
        pgscan: memory.stat("pgscan"),
        pgsteal: memory.stat("pgsteal"),
        pgactivate: memory.stat("pgactivate"),
        pgdeactivate: memory.stat("pgdeactivate"),
        pglazyfree: memory.stat("pglazyfree"),
        pglazyfreed: memory.stat("pglazyfreed"),
        thp_fault_alloc: memory.stat("thp_fault_alloc"),
        thp_collapse_alloc: memory.stat("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.limit,
        max_usage: memory.max_usage,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::Message;
    use ovms_engine::{CpuStats, IoStats, PidStats};

    fn stats(version: CgroupVersion) -> Stats {
        Stats {
            version,
            cpu: CpuStats { usage_ns: 5_000_000, user_ns: 3_000_000, system_ns: 2_000_000, ..CpuStats::default() },
            memory: MemoryStats {
                usage: 100,
                limit: 1000,
                stat: vec![("total_inactive_file".into(), 7), ("inactive_file".into(), 6)],
                ..MemoryStats::default()
            },
            pids: PidStats { current: 4, limit: 0 },
            io: vec![IoStats { major: 8, read_bytes: 512, ..IoStats::default() }],
        }
    }

    #[test]
    fn v1_hosts_get_v1_metrics() {
        let any = encode(&stats(CgroupVersion::V1));
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 5_000_000);
        assert_eq!((metrics.memory.usage.usage, metrics.memory.usage.limit), (100, 1000));
        assert_eq!(metrics.memory.total_inactive_file, 7);
        assert_eq!(metrics.pids.current, 4);
        assert_eq!(metrics.blkio.io_service_bytes_recursive[0].value, 512);
    }

    #[test]
    fn v2_hosts_get_v2_metrics() {
        let any = encode(&stats(CgroupVersion::V2));
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec), (5000, 3000));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit, metrics.memory.inactive_file), (100, 1000, 6));
        assert_eq!(metrics.pids.current, 4);
        assert_eq!(metrics.io.usage[0].rbytes, 512);
    }
}
