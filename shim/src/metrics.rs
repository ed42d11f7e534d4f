//! Resource usage as containerd's cgroup Metrics. Does not live here: reading it (skiff::cgroup).

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use skiff::cgroup::Stats;
use skiff::cgroup::stats::{BlkioEntry, Pressure, Psi, Usage, V1, V2};

/// Fills fields of a message from `key value` pairs where the names agree.
macro_rules! fill {
    ($target:expr, $pairs:expr, { $($key:literal => $field:ident,)* }) => {
        for (key, value) in $pairs {
            match key.as_str() {
                $($key => $target.$field = *value,)*
                _ => {}
            }
        }
    };
}

/// The Any of a Stats answer. Its URL is the bare message name: one collector compares it as a whole.
pub fn any(stats: &Stats) -> Any {
    let (type_url, value) = match stats {
        Stats::V1(stats) => ("io.containerd.cgroups.v1.Metrics", metrics_v1(stats).write_to_bytes()),
        Stats::V2(stats) => ("io.containerd.cgroups.v2.Metrics", metrics_v2(stats).write_to_bytes()),
    };
    Any { type_url: type_url.into(), value: value.unwrap_or_default(), ..Any::default() }
}

fn metrics_v1(stats: &V1) -> v1::Metrics {
    let mut memory = v1::MemoryStat::new();
    fill!(memory, &stats.memory_stat, {
        "cache" => cache,
        "rss" => rss,
        "rss_huge" => rss_huge,
        "mapped_file" => mapped_file,
        "dirty" => dirty,
        "writeback" => writeback,
        "pgpgin" => pg_pg_in,
        "pgpgout" => pg_pg_out,
        "pgfault" => pg_fault,
        "pgmajfault" => pg_maj_fault,
        "inactive_anon" => inactive_anon,
        "active_anon" => active_anon,
        "inactive_file" => inactive_file,
        "active_file" => active_file,
        "unevictable" => unevictable,
        "hierarchical_memory_limit" => hierarchical_memory_limit,
        "hierarchical_memsw_limit" => hierarchical_swap_limit,
        "total_cache" => total_cache,
        "total_rss" => total_rss,
        "total_rss_huge" => total_rss_huge,
        "total_mapped_file" => total_mapped_file,
        "total_dirty" => total_dirty,
        "total_writeback" => total_writeback,
        "total_pgpgin" => total_pg_pg_in,
        "total_pgpgout" => total_pg_pg_out,
        "total_pgfault" => total_pg_fault,
        "total_pgmajfault" => total_pg_maj_fault,
        "total_inactive_anon" => total_inactive_anon,
        "total_active_anon" => total_active_anon,
        "total_inactive_file" => total_inactive_file,
        "total_active_file" => total_active_file,
        "total_unevictable" => total_unevictable,
    });
    let entry = |usage: &Usage| {
        MessageField::some(v1::MemoryEntry {
            limit: usage.limit,
            usage: usage.usage,
            max: usage.max,
            failcnt: usage.failcnt,
            ..v1::MemoryEntry::default()
        })
    };
    memory.usage = entry(&stats.memory);
    memory.swap = entry(&stats.swap);
    memory.kernel = entry(&stats.kernel);
    memory.kernel_tcp = entry(&stats.kernel_tcp);
    let mut blkio = v1::BlkIOStat::new();
    for (name, entries) in &stats.blkio {
        let list = entries.iter().map(blkio_entry).collect();
        match *name {
            "throttle.io_service_bytes_recursive" => blkio.io_service_bytes_recursive = list,
            "throttle.io_serviced_recursive" => blkio.io_serviced_recursive = list,
            _ => {}
        }
    }
    let (periods, throttled_periods, throttled_time) = stats.throttling;
    let (oom_kill_disable, under_oom, oom_kill) = stats.oom_control;
    v1::Metrics {
        hugetlb: stats
            .hugetlb
            .iter()
            .map(|(pagesize, usage)| v1::HugetlbStat {
                usage: usage.usage,
                max: usage.max,
                failcnt: usage.failcnt,
                pagesize: pagesize.clone(),
                ..v1::HugetlbStat::default()
            })
            .collect(),
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids.usage,
            limit: stats.pids.limit,
            ..v1::PidsStat::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: stats.cpu_total,
                kernel: stats.cpu_kernel,
                user: stats.cpu_user,
                per_cpu: stats.cpu_each.clone(),
                ..v1::CPUUsage::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods,
                throttled_periods,
                throttled_time,
                ..v1::Throttle::default()
            }),
            ..v1::CPUStat::default()
        }),
        memory: MessageField::some(memory),
        blkio: MessageField::some(blkio),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill_disable,
            under_oom,
            oom_kill,
            ..v1::MemoryOomControl::default()
        }),
        ..v1::Metrics::default()
    }
}

fn blkio_entry(entry: &BlkioEntry) -> v1::BlkIOEntry {
    v1::BlkIOEntry {
        op: entry.op.clone(),
        major: entry.major,
        minor: entry.minor,
        value: entry.value,
        ..v1::BlkIOEntry::default()
    }
}

fn metrics_v2(stats: &V2) -> v2::Metrics {
    let mut cpu = v2::CPUStat { psi: psi(stats.cpu_psi), ..v2::CPUStat::default() };
    fill!(cpu, &stats.cpu, {
        "usage_usec" => usage_usec,
        "user_usec" => user_usec,
        "system_usec" => system_usec,
        "nr_periods" => nr_periods,
        "nr_throttled" => nr_throttled,
        "throttled_usec" => throttled_usec,
        "nr_bursts" => nr_bursts,
        "burst_usec" => burst_usec,
    });
    let mut memory = v2::MemoryStat {
        usage: stats.memory.usage,
        usage_limit: stats.memory.limit,
        max_usage: stats.memory.max,
        swap_usage: stats.swap.usage,
        swap_limit: stats.swap.limit,
        swap_max_usage: stats.swap.max,
        psi: psi(stats.memory_psi),
        ..v2::MemoryStat::default()
    };
    fill!(memory, &stats.memory_stat, {
        "anon" => anon,
        "file" => file,
        "kernel_stack" => kernel_stack,
        "slab" => slab,
        "sock" => sock,
        "shmem" => shmem,
        "file_mapped" => file_mapped,
        "file_dirty" => file_dirty,
        "file_writeback" => file_writeback,
        "anon_thp" => anon_thp,
        "inactive_anon" => inactive_anon,
        "active_anon" => active_anon,
        "inactive_file" => inactive_file,
        "active_file" => active_file,
        "unevictable" => unevictable,
        "slab_reclaimable" => slab_reclaimable,
        "slab_unreclaimable" => slab_unreclaimable,
        "pgfault" => pgfault,
        "pgmajfault" => pgmajfault,
        "workingset_refault" => workingset_refault,
        "workingset_activate" => workingset_activate,
        "workingset_nodereclaim" => workingset_nodereclaim,
        "pgrefill" => pgrefill,
        "pgscan" => pgscan,
        "pgsteal" => pgsteal,
        "pgactivate" => pgactivate,
        "pgdeactivate" => pgdeactivate,
        "pglazyfree" => pglazyfree,
        "pglazyfreed" => pglazyfreed,
        "thp_fault_alloc" => thp_fault_alloc,
        "thp_collapse_alloc" => thp_collapse_alloc,
    });
    let mut events = v2::MemoryEvents::default();
    fill!(events, &stats.memory_events, {
        "low" => low,
        "high" => high,
        "max" => max,
        "oom" => oom,
        "oom_kill" => oom_kill,
        "oom_group_kill" => oom_group_kill,
    });
    let io = stats.io.iter().map(|(major, minor, pairs)| {
        let mut entry = v2::IOEntry { major: *major, minor: *minor, ..v2::IOEntry::default() };
        fill!(entry, pairs, {
            "rbytes" => rbytes,
            "wbytes" => wbytes,
            "rios" => rios,
            "wios" => wios,
        });
        entry
    });
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids.usage,
            limit: stats.pids.limit,
            ..v2::PidsStat::default()
        }),
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory),
        io: MessageField::some(v2::IOStat { usage: io.collect(), psi: psi(stats.io_psi), ..v2::IOStat::default() }),
        hugetlb: stats
            .hugetlb
            .iter()
            .map(|(pagesize, usage)| v2::HugeTlbStat {
                current: usage.usage,
                max: usage.limit,
                pagesize: pagesize.clone(),
                failcnt: usage.failcnt,
                ..v2::HugeTlbStat::default()
            })
            .collect(),
        memory_events: MessageField::some(events),
        ..v2::Metrics::default()
    }
}

fn psi(psi: Option<Psi>) -> MessageField<v2::PSIStats> {
    let data = |p: Pressure| {
        MessageField::some(v2::PSIData {
            avg10: p.avg10,
            avg60: p.avg60,
            avg300: p.avg300,
            total: p.total,
            ..v2::PSIData::default()
        })
    };
    psi.map(|psi| v2::PSIStats { some: data(psi.some), full: data(psi.full), ..v2::PSIStats::default() }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_and_the_url_is_bare() {
        let stats = V2 {
            cpu: vec![("usage_usec".into(), 7), ("unknown".into(), 1)],
            memory_stat: vec![("inactive_file".into(), 9)],
            memory_events: vec![("oom_kill".into(), 2)],
            memory: Usage { usage: 5, limit: u64::MAX, max: 6, failcnt: 0 },
            ..V2::default()
        };
        let any = any(&Stats::V2(Box::new(stats)));
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.inactive_file, metrics.memory_events.oom_kill), (7, 9, 2));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (5, u64::MAX));
    }
}
