//! cgroup v2: each field of the spec in its file, devices, freezing, killing, and cgroups below the container's. These
//! need a machine with v2 alone and all its controllers, as `make test-vm` has: they are ignored unless asked for.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use skiff_test_support::{device_programs, eventually};

use super::{Case, is_skiff};

impl Case {
    /// The directory of the container's cgroup.
    pub fn group(&self) -> PathBuf {
        let pid = self.state()["pid"].to_string();
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("a running init");
        Path::new("/sys/fs/cgroup").join(text.trim().strip_prefix("0::/").expect("v2 alone"))
    }

    fn begin_with(resources: Value) -> Case {
        let case = Case::new(&["sleep", "1000"]).with(|spec| {
            for (key, value) in resources.as_object().expect("an object") {
                spec["linux"]["resources"][key] = value.clone();
            }
        });
        case.detached(&["run", "-d", &case.id]).ok();
        case
    }

    fn remove(self) {
        self.cmd(&["delete", "--force", &self.id]).ok();
        self.end();
    }
}

#[track_caller]
pub fn read(group: &Path, name: &str) -> String {
    let path = group.join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")).trim().to_string()
}

/// A disk of this machine: major and minor number.
fn disk() -> (u32, u32) {
    let text = std::fs::read_dir("/sys/block").expect("sysfs").flatten().find_map(|entry| {
        let text = std::fs::read_to_string(entry.path().join("dev")).ok()?;
        entry.file_name().to_str()?.starts_with("vd").then_some(text)
    });
    let text = text.expect("a disk");
    let (major, minor) = text.trim().split_once(':').expect("two numbers");
    (major.parse().expect("a number"), minor.parse().expect("a number"))
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn every_limit_is_in_its_file() {
    let (major, minor) = disk();
    let device = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let case = Case::begin_with(json!({
        "memory": {"limit": 64 << 20, "swap": 96 << 20, "reservation": 16 << 20},
        "cpu": {"shares": 262_144, "quota": 25_000, "period": 50_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 20},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
        "blockIO": {
            "throttleReadBpsDevice": device(1 << 20), "throttleWriteBpsDevice": device(2 << 20),
            "throttleReadIOPSDevice": device(100), "throttleWriteIOPSDevice": device(200),
        },
        "unified": {
            "memory.high": "50331648", "memory.min": "1048576", "memory.oom.group": "1", "cgroup.max.depth": "7",
        },
    }));
    let group = case.group();
    for (file, want) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "16777216"),
        ("memory.high", "50331648"),
        ("memory.min", "1048576"),
        ("memory.oom.group", "1"),
        ("cpu.weight", "10000"),
        ("cpu.max", "25000 50000"),
        ("cpuset.cpus", "0"),
        ("cpuset.cpus.effective", "0"),
        ("cpuset.mems", "0"),
        ("pids.max", "20"),
        ("hugetlb.2MB.max", "4194304"),
        ("hugetlb.2MB.rsvd.max", "4194304"),
        ("cgroup.max.depth", "7"),
        ("io.max", &format!("{major}:{minor} rbps=1048576 wbps=2097152 riops=100 wiops=200")),
    ] {
        assert_eq!(read(&group, file), want, "{file}");
    }
    case.remove();
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn weights_of_disks_are_for_bfq_or_the_io_controller() {
    let with_bfq = std::fs::read_dir("/sys/block").expect("sysfs").flatten().find(|entry| {
        std::fs::read_to_string(entry.path().join("queue/scheduler")).is_ok_and(|text| text.contains("[bfq]"))
    });
    let number = with_bfq.map(|disk| read(&disk.path(), "dev")).expect("a disk with the scheduler BFQ");
    let (major, minor) = number.split_once(':').expect("two numbers");
    let number = |text: &str| text.parse::<u32>().expect("a number");
    let device = json!([{"major": number(major), "minor": number(minor), "weight": 300}]);
    let case = Case::begin_with(json!({"blockIO": {"weight": 500, "weightDevice": device}}));
    let group = case.group();
    assert_eq!(read(&group, "io.bfq.weight"), format!("default 500\n{major}:{minor} 300"));
    if is_skiff() {
        // Whichever the disk obeys; runc writes the one or the other.
        assert_eq!(read(&group, "io.weight"), "default 4950");
    }
    case.remove();
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn bursts_and_idle_groups_can_be_had_and_changed() {
    if !is_skiff() {
        // runc has them from 1.2 on.
        return;
    }
    let case = Case::begin_with(json!({"cpu": {"quota": 50_000, "period": 100_000, "burst": 40_000}}));
    let group = case.group();
    let now = || (read(&group, "cpu.max"), read(&group, "cpu.max.burst"));
    assert_eq!(now(), ("50000 100000".into(), "40000".into()));
    case.cmd(&["update", "--cpu-quota", "20000", "--cpu-burst", "10000", &case.id]).ok();
    assert_eq!(now(), ("20000 100000".into(), "10000".into()), "a quota below the old burst");
    case.cmd(&["update", "--cpu-quota", "60000", "--cpu-burst", "60000", &case.id]).ok();
    assert_eq!(now(), ("60000 100000".into(), "60000".into()), "a burst above the old quota");
    case.cmd(&["update", "--cpu-idle", "1", &case.id]).ok();
    assert_eq!(read(&group, "cpu.idle"), "1");
    case.cmd(&["update", "--cpu-idle", "0", "--cpu-share", "262144", &case.id]).ok();
    assert_eq!((read(&group, "cpu.idle"), read(&group, "cpu.weight")), ("0".into(), "10000".into()));
    case.remove();
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn swap_is_what_exceeds_the_memory() {
    for (memory, swap) in [
        (json!({"limit": 64 << 20, "swap": 64 << 20}), "0"),
        (json!({"limit": 64 << 20, "swap": -1}), "max"),
        (json!({"limit": -1}), "max"),
        (json!({"limit": 64 << 20}), "max"),
    ] {
        let case = Case::begin_with(json!({"memory": memory}));
        assert_eq!(read(&case.group(), "memory.swap.max"), swap, "{memory}");
        case.remove();
    }
    for memory in [json!({"swap": 64 << 20}), json!({"limit": 64 << 20, "swap": 32 << 20})] {
        let case = Case::new(&["true"]).with(|spec| spec["linux"]["resources"]["memory"] = memory);
        let err = case.run().failed().err;
        assert!(err.contains("swap"), "{err}");
        case.end();
    }
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn an_update_reaches_the_files_and_never_the_devices() {
    let (major, minor) = disk();
    let case = Case::new(&["sleep", "1000"]).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20, "swap": 96 << 20});
        let rule = json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "r"});
        spec["linux"]["resources"]["devices"].as_array_mut().expect("rules").push(rule);
        spec["linux"]["devices"] = json!([{"path": "/dev/disk", "type": "b", "major": major, "minor": minor}]);
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let group = case.group();
    let programs = device_programs(&group);
    assert_eq!(programs.len(), 1);
    let can = |script: &str| case.cmd(&["exec", &case.id, "sh", "-c", script]).code == 0;
    let access = || [can("head -c 1 /dev/disk >/dev/null"), can(": >/dev/disk"), can("head -c 1 /dev/zero")];
    assert_eq!(access(), [true, false, true], "it may be read, and not written");
    case.cmd(&["update", "--memory", "32M", "--memory-swap", "48M", "--cpuset-cpus", "1", &case.id]).ok();
    let now = ["memory.max", "memory.swap.max", "cpuset.cpus"].map(|file| read(&group, file));
    assert_eq!(now, ["33554432", "16777216", "1"]);
    assert_eq!(device_programs(&group), programs, "the same program, and the only one");
    assert_eq!(access(), [true, false, true]);
    case.remove();
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn a_paused_tree_of_cgroups_is_killed_as_a_whole() {
    let case = Case::new(&["sleep", "1000"]).with(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "pid");
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let group = case.group();
    std::fs::create_dir(group.join("below")).expect("a cgroup below");
    let args = ["exec", "--cgroup", "below", &case.id, "sh", "-c", "sleep 1000 </dev/null >/dev/null 2>&1 &"];
    case.detached(&args).ok();
    let members = |at: &Path| read(at, "cgroup.procs").lines().map(str::to_string).collect::<BTreeSet<_>>();
    assert_eq!(members(&group.join("below")).len(), 1);
    case.cmd(&["pause", &case.id]).ok();
    assert_eq!((case.status().as_str(), read(&group, "cgroup.freeze").as_str()), ("paused", "1"));
    assert!(read(&group, "cgroup.events").contains("frozen 1"));
    case.cmd(&["resume", &case.id]).ok();
    assert_eq!((case.status().as_str(), read(&group, "cgroup.freeze").as_str()), ("running", "0"));
    case.cmd(&["pause", &case.id]).ok();
    case.cmd(&["kill", &case.id, "KILL"]).ok();
    eventually("all are dead", || read(&group, "cgroup.events").contains("populated 0"));
    case.cmd(&["delete", &case.id]).ok();
    assert!(!group.exists());
    case.end();
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn usage_has_peaks_and_pressure() {
    let case = Case::begin_with(json!({"memory": {"limit": 64 << 20}}));
    case.cmd(&["exec", &case.id, "sh", "-c", "x=$(head -c 8388608 /dev/zero | tr '\\0' x); sleep 0"]).ok();
    let group = case.group();
    let stats = || -> Value {
        let line = case.cmd(&["events", "--stats", &case.id]).ok().out;
        serde_json::from_str::<Value>(&line).expect("JSON")["data"].clone()
    };
    let data = stats();
    let memory = &data["memory"];
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} in {data}"));
    assert_eq!(number(&memory["usage"]["limit"]), 64 << 20);
    assert!(number(&memory["usage"]["usage"]) > 0);
    assert_eq!(number(&data["pids"]["current"]), 1);
    assert!(number(&data["cpu"]["usage"]["total"]) > 0);
    assert!(data["hugetlb"]["2MB"].is_object(), "{data}");
    if is_skiff() {
        // runc has these from 1.2 on.
        assert_eq!(memory["usage"]["max"], json!(read(&group, "memory.peak").parse::<u64>().expect("a number")));
        assert!(number(&memory["usage"]["max"]) > 8 << 20);
        for controller in ["cpu", "memory", "blkio"] {
            let total = &data[controller]["psi"]["some"]["total"];
            assert!(total.is_u64(), "{controller}: {data}");
        }
    }
    case.remove();
}

/// A spec whose container has a cgroup namespace, and a user namespace that begins at 100000.
fn delegated(script: &str, options: &[&str]) -> Case {
    let case = Case::sh(script);
    crate::inside::open_to_all(case.bundle.path());
    case.with(|spec| {
        skiff_test_support::add_user_namespace(spec);
        spec["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "cgroup"}));
        for mount in spec["mounts"].as_array_mut().expect("mounts") {
            if mount["destination"] == "/sys/fs/cgroup" {
                mount["options"] = json!(options);
            }
        }
    })
}

const WRITABLE: [&str; 3] = ["nosuid", "noexec", "nodev"];

/// A container that puts its processes into cgroups of its own, with limits.
pub fn a_container_manages_its_cgroups(case: &Case, globals: &[&str]) {
    let with = |args: &[&str]| [globals, args].concat().iter().map(ToString::to_string).collect::<Vec<_>>();
    let run = with(&["run", "-d", &case.id]);
    case.detached(&run.iter().map(String::as_str).collect::<Vec<_>>()).ok();
    let out = || std::fs::read_to_string(case.bundle.path().join("out")).unwrap_or_default();
    eventually("it has cgroups of its own", || out().contains("ready") || case.status() == "stopped");
    let said = out() + &std::fs::read_to_string(case.bundle.path().join("err")).unwrap_or_default();
    assert!(said.contains("16777216\nnot ours\nready\n"), "{said}");
    let leaf = case.group();
    assert!(leaf.ends_with("leaf"), "{leaf:?}");
    let group = leaf.parent().expect("a parent");
    let owner = |name: &str| std::fs::metadata(group.join(name)).expect("a file").uid();
    for name in [".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        assert_eq!(owner(name), 100_000, "{name}");
    }
    for name in ["memory.max", "pids.max", "cgroup.freeze"] {
        assert_eq!(owner(name), 0, "{name}");
    }
    let inside = case.cmd(&["exec", &case.id, "cat", "/proc/self/cgroup"]).ok().out;
    assert_eq!(inside, "0::/leaf\n", "where its init is: its own cgroup takes no process any more");
    assert!(case.cmd(&["events", "--stats", &case.id]).ok().out.contains("\"pids\""));
}

const MANAGE: &str = "cd /sys/fs/cgroup && mkdir leaf app && echo 1 >leaf/cgroup.procs &&
    echo '+memory +pids' >cgroup.subtree_control && echo 16M >app/memory.max && cat app/memory.max &&
    ! (echo max >memory.max) 2>/dev/null && echo not ours && echo ready && exec sleep 1000";

/// The same, made ready for either driver.
pub fn managing() -> Case {
    delegated(MANAGE, &WRITABLE)
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn a_container_can_manage_cgroups_of_its_own() {
    if !is_skiff() {
        // runc gives them away under systemd alone.
        return;
    }
    let case = managing();
    a_container_manages_its_cgroups(&case, &[]);
    case.remove();
}

#[test]
#[ignore = "needs cgroup v2 with all its controllers"]
fn what_a_container_cannot_write_stays_roots() {
    let case = delegated("exec sleep 1000", &["nosuid", "noexec", "nodev", "ro"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let group = case.group();
    for name in [".", "cgroup.procs"] {
        assert_eq!(std::fs::metadata(group.join(name)).expect("a file").uid(), 0, "{name}");
    }
    case.remove();
}
