//! `linux.resources` as the files of the cgroup have it, and what of it is refused.

use std::path::Path;

use serde_json::{Value, json};
use skiff_test_support::run;

use super::commands::{cgroup, is_v1};
use super::{Case, is_skiff, refused};

/// Makes a container with these resources and reads files of its cgroup: controller, file, content.
#[track_caller]
fn written(resources: Value, files: &[(&str, &str, &str)]) {
    let case = Case::new(&["sleep", "100"]).with(|spec| {
        let devices = spec["linux"]["resources"]["devices"].clone();
        spec["linux"]["resources"] = resources.clone();
        spec["linux"]["resources"]["devices"] = devices;
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let pid = case.state()["pid"].clone();
    for (controller, file, want) in files {
        let path = cgroup(&pid, controller).join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // Of a table the first line that has the key.
        let got = match want.split_once(' ') {
            Some((key, _)) if text.lines().count() > 1 => text.lines().find(|line| line.starts_with(key)).unwrap_or(""),
            _ => text.trim(),
        };
        assert_eq!(got, *want, "{file} of {resources}");
    }
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

/// The number of a disk of this machine that limits can be set for.
fn disk() -> Option<(i64, i64)> {
    std::fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let number = std::fs::read_to_string(entry.path().join("dev")).ok()?;
        let (major, minor) = number.trim().split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    })
}

#[test]
fn memory_has_its_files() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    let (limit, swap, low) = (64i64 << 20, 96i64 << 20, 32i64 << 20);
    let text = |n: i64| n.to_string();
    let resources = json!({"memory": {"limit": limit, "reservation": low}});
    if is_v1() {
        let files =
            [("memory", "memory.limit_in_bytes", &*text(limit)), ("memory", "memory.soft_limit_in_bytes", &*text(low))];
        written(resources, &files);
        written(json!({"memory": {"swappiness": 7}}), &[("memory", "memory.swappiness", "7")]);
        written(
            json!({"memory": {"limit": limit, "disableOOMKiller": true}}),
            &[("memory", "memory.oom_control", "oom_kill_disable 1")],
        );
        if Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists() {
            written(
                json!({"memory": {"limit": limit, "swap": swap}}),
                &[("memory", "memory.memsw.limit_in_bytes", &*text(swap))],
            );
        }
    } else {
        written(resources, &[("memory", "memory.max", &*text(limit)), ("memory", "memory.low", &*text(low))]);
        written(
            json!({"memory": {"limit": limit, "swap": swap}}),
            &[("memory", "memory.swap.max", &*text(swap - limit))],
        );
        written(json!({"memory": {"limit": -1}}), &[("memory", "memory.max", "max")]);
    }
    // What no kernel has any more is passed over.
    written(json!({"memory": {"limit": limit, "kernel": 1 << 24, "useHierarchy": true}}), &[]);
}

#[test]
fn shares_that_the_kernel_would_change_are_refused() {
    if !is_v1() {
        return;
    }
    for (shares, limit) in [(1, "2"), (500_000, "262144")] {
        let err = super::refused(|spec| spec["linux"]["resources"]["cpu"] = json!({"shares": shares}));
        assert!(err.contains("shares") && err.contains(limit), "{err}");
    }
}

#[test]
fn processors_have_their_files() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    let cpu = json!({"cpu": {"shares": 512, "quota": 20_000, "period": 40_000, "cpus": "0", "mems": "0"}});
    if is_v1() {
        written(
            cpu,
            &[
                ("cpu", "cpu.shares", "512"),
                ("cpu", "cpu.cfs_quota_us", "20000"),
                ("cpu", "cpu.cfs_period_us", "40000"),
                ("cpuset", "cpuset.cpus", "0"),
                ("cpuset", "cpuset.mems", "0"),
            ],
        );
        if Path::new("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists() {
            let resources = json!({"cpu": {"realtimeRuntime": 5000, "realtimePeriod": 900_000}});
            written(resources, &[("cpu", "cpu.rt_runtime_us", "5000"), ("cpu", "cpu.rt_period_us", "900000")]);
        }
    } else {
        written(
            cpu,
            &[
                ("", "cpu.weight", "59"),
                ("", "cpu.max", "20000 40000"),
                ("", "cpuset.cpus", "0"),
                ("", "cpuset.mems", "0"),
            ],
        );
        written(json!({"cpu": {"quota": -1, "period": 50_000}}), &[("", "cpu.max", "max 50000")]);
    }
    if is_skiff() {
        written(json!({"cpu": {"idle": 1}}), &[("cpu", "cpu.idle", "1")]);
        let burst = if is_v1() { "cpu.cfs_burst_us" } else { "cpu.max.burst" };
        written(json!({"cpu": {"quota": 20_000, "period": 40_000, "burst": 10_000}}), &[("cpu", burst, "10000")]);
    }
}

#[test]
fn processes_are_counted() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    written(json!({"pids": {"limit": 33}}), &[("pids", "pids.max", "33")]);
    written(json!({"pids": {"limit": -1}}), &[("pids", "pids.max", "max")]);
    // None at all is a limit since runtime spec 1.3, as small as the kernel lets it be with an init.
    if is_skiff() {
        written(json!({"pids": {"limit": 0}}), &[("pids", "pids.max", "1")]);
    }
    let case = Case::sh("(sleep 1 & sleep 1 & sleep 1 & wait) 2>&1; true").with(|spec| {
        spec["linux"]["resources"]["pids"] = json!({"limit": 3});
    });
    let out = case.run();
    assert!(out.out.contains("can't fork"), "{out:?}");
    case.end();
}

#[test]
fn disks_have_their_files() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    let Some((major, minor)) = disk() else { panic!("a machine without any block device") };
    let rate = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let resources = json!({"blockIO": {
        "throttleReadBpsDevice": rate(1 << 20), "throttleWriteBpsDevice": rate(2 << 20),
        "throttleReadIOPSDevice": rate(100), "throttleWriteIOPSDevice": rate(200)}});
    let device = format!("{major}:{minor}");
    if is_v1() {
        written(
            resources,
            &[
                ("blkio", "blkio.throttle.read_bps_device", &format!("{device} 1048576")),
                ("blkio", "blkio.throttle.write_bps_device", &format!("{device} 2097152")),
                ("blkio", "blkio.throttle.read_iops_device", &format!("{device} 100")),
                ("blkio", "blkio.throttle.write_iops_device", &format!("{device} 200")),
            ],
        );
    } else {
        let want = format!("{device} rbps=1048576 wbps=2097152 riops=100 wiops=200");
        written(resources, &[("", "io.max", &want)]);
    }
}

/// A weight needs a scheduler that knows weights.
#[test]
fn a_weight_of_disks_is_set_or_an_error() {
    if !is_v1() || !skiff_test_support::has_controllers(&["io"]) {
        return;
    }
    let probe = Case::new(&["sleep", "100"]);
    probe.detached(&["run", "-d", &probe.id]).ok();
    let files = ["blkio.weight", "blkio.bfq.weight"];
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", probe.state()["pid"])).unwrap();
    let path = groups.lines().find_map(|line| line.split_once(":blkio:")).expect("a group of blkio").1;
    let group = Path::new("/sys/fs/cgroup/blkio").join(path.trim_start_matches('/'));
    let file = files.into_iter().find(|file| group.join(file).exists());
    probe.cmd(&["delete", "--force", &probe.id]).ok();
    probe.end();
    if let Some(file) = file {
        written(json!({"blockIO": {"weight": 500}}), &[("blkio", file, "500")]);
        return;
    }
    for (block_io, files) in [
        (json!({"weight": 500}), "blkio.weight nor blkio.bfq.weight"),
        (
            json!({"weightDevice": [{"major": 8, "minor": 0, "weight": 500}]}),
            "blkio.weight_device nor blkio.bfq.weight_device",
        ),
    ] {
        let err = refused(|spec| spec["linux"]["resources"]["blockIO"] = block_io);
        assert!(!is_skiff() || err.contains(&format!("has neither {files}")), "{err}");
    }
}

#[test]
fn files_of_v2_are_written_as_they_are() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    if is_v1() {
        let err = refused(|spec| spec["linux"]["resources"]["unified"] = json!({"memory.max": "1000000000"}));
        assert!(err.contains("cannot use unified on cgroup v1") || !is_skiff() && err.contains("unified"), "{err}");
        return;
    }
    written(
        json!({"unified": {"memory.high": "50331648", "pids.max": "44"}}),
        &[("", "memory.high", "50331648"), ("", "pids.max", "44")],
    );
    if is_skiff() {
        let err = refused(|spec| spec["linux"]["resources"]["unified"] = json!({"memory.no_such": "1"}));
        assert!(err.contains("linux.resources.unified.memory.no_such: write "), "{err}");
    }
}

#[test]
fn limits_that_cannot_be_are_named_with_a_hint() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    if !is_skiff() {
        return;
    }
    let missing = |controller: &str| is_v1() && !Path::new("/sys/fs/cgroup").join(controller).exists();
    for (resources, want, hint) in [
        (json!({"cpu": {"quota": 10}}), "linux.resources.cpu.quota: write ", "a quota is at least 1000 us"),
        (json!({"cpu": {"cpus": "9000"}}), "linux.resources.cpu.cpus: write ", "no such processors"),
        (json!({"cpu": {"cpus": "x"}}), "linux.resources.cpu.cpus: \\\"x\\\" is not a list", ""),
        (json!({"memory": {"limit": 100, "swap": 50}}), "linux.resources.memory.swap: memory+swap limit", ""),
        (json!({"blockIO": {"weight": 5}}), "linux.resources.blockIO.weight: 5 is not between", ""),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 4000, "minor": 1, "rate": 5}]}}),
            "linux.resources.blockIO.throttleReadBpsDevice[0]: write ",
            "no such device",
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "x", "limit": 1}]}),
            "linux.resources.hugepageLimits[0].pageSize: ",
            "",
        ),
        (json!({"pids": {"limit": "many"}}), "linux.resources.pids.limit: invalid type", ""),
        (json!({"rdma": {"a b": {"hcaHandles": 1}}}), "linux.resources.rdma.a b: not a device name", ""),
    ] {
        let err = refused(|spec| {
            for (key, value) in resources.as_object().unwrap() {
                spec["linux"]["resources"][key] = value.clone();
            }
        });
        assert!(err.contains(want) && err.contains(hint), "{resources}: {err}");
    }
    if missing("net_cls") {
        let err = refused(|spec| spec["linux"]["resources"]["network"] = json!({"classID": 5}));
        assert!(err.contains("linux.resources.network.classID: cannot set limit"), "{err}");
    }
    if missing("rdma") {
        let err = refused(|spec| spec["linux"]["resources"]["rdma"] = json!({"mlx5_0": {"hcaHandles": 1}}));
        assert!(err.contains("linux.resources.rdma.mlx5_0: cannot set limit"), "{err}");
    }
}

#[test]
fn a_container_without_the_resctrl_file_system_has_no_group_of_it() {
    if std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(" - resctrl ") {
        return;
    }
    // runc has this as a warning, or not at all.
    if is_skiff() {
        let err = refused(|spec| spec["linux"]["intelRdt"] = json!({"closID": "gold", "l3CacheSchema": "L3:0=f"}));
        assert!(err.contains("linux.intelRdt: the resctrl file system is not mounted"), "{err}");
        let err = refused(|spec| spec["linux"]["intelRdt"] = json!({"closID": "a/b"}));
        assert!(err.contains("linux.intelRdt.closID: invalid closID"), "{err}");
        let case = Case::new(&["sleep", "100"]);
        case.detached(&["run", "-d", &case.id]).ok();
        let done = case.cmd(&["update", "--l3-cache-schema", "L3:0=f", &case.id]).failed();
        assert!(done.err.contains("linux.intelRdt: was not in the container's config.json"), "{}", done.err);
        case.cmd(&["delete", "--force", &case.id]).ok();
        case.end();
    }
}

#[test]
fn every_flag_of_update_has_its_file() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "io", "memory", "pids"]) {
        return;
    }
    let case = Case::new(&["sleep", "1000"]).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let pid = case.state()["pid"].clone();
    let mut flags = vec![
        ("--cpu-share", "256", "cpu", "cpu.shares", "256", "cpu.weight", "35"),
        ("--cpu-quota", "30000", "cpu", "cpu.cfs_quota_us", "30000", "cpu.max", "30000 100000"),
        ("--cpu-period", "60000", "cpu", "cpu.cfs_period_us", "60000", "cpu.max", "30000 60000"),
        ("--cpuset-cpus", "0", "cpuset", "cpuset.cpus", "0", "cpuset.cpus", "0"),
        ("--cpuset-mems", "0", "cpuset", "cpuset.mems", "0", "cpuset.mems", "0"),
        ("--memory", "48M", "memory", "memory.limit_in_bytes", "50331648", "memory.max", "50331648"),
        ("--memory-reservation", "16M", "memory", "memory.soft_limit_in_bytes", "16777216", "memory.low", "16777216"),
        ("--pids-limit", "55", "pids", "pids.max", "55", "pids.max", "55"),
        ("--pids-limit", "-1", "pids", "pids.max", "max", "pids.max", "max"),
    ];
    if is_skiff() {
        flags.push(("--cpu-burst", "10000", "cpu", "cpu.cfs_burst_us", "10000", "cpu.max.burst", "10000"));
        flags.push(("--cpu-quota", "-1", "cpu", "cpu.cfs_quota_us", "-1", "cpu.max", "max 60000"));
        flags.push(("--cpu-idle", "1", "cpu", "cpu.idle", "1", "cpu.idle", "1"));
    }
    for (flag, value, controller, v1, want_v1, v2, want_v2) in flags {
        let (file, want) = if is_v1() { (v1, want_v1) } else { (v2, want_v2) };
        case.cmd(&["update", flag, value, &case.id]).ok();
        let got = std::fs::read_to_string(cgroup(&pid, controller).join(file)).unwrap();
        assert_eq!(got.trim(), want, "{flag} {value}");
    }
    for flag in ["--kernel-memory", "--kernel-memory-tcp"] {
        case.cmd(&["update", flag, "100M", &case.id]);
    }
    case.cmd(&["update", "--blkio-weight", "500", &case.id]);
    // A document goes before flags.
    let document = json!({"pids": {"limit": 66}}).to_string();
    run(&mut case.command(&["update", "--pids-limit", "11", "--resources", "-", &case.id]), &document).ok();
    let got = std::fs::read_to_string(cgroup(&pid, "pids").join("pids.max")).unwrap();
    assert_eq!(got.trim(), "66");
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}
