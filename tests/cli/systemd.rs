//! The systemd cgroup driver. These need systemd as PID 1 and cgroup v2: they are ignored unless asked for, as
//! `make test-vm` does.

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use super::{Case, run};

fn systemctl(args: &[&str]) -> String {
    run(Command::new("systemctl").args(args), "").out
}

fn property(unit: &str, name: &str) -> String {
    systemctl(&["show", "--value", "-p", name, unit]).trim().to_string()
}

impl Case {
    /// A container of this slice with limits, made through systemd.
    fn systemd(slice: &str) -> Case {
        let mut case = Case::new(&["sleep", "1000"]);
        let id = case.id.clone();
        let linux = &mut case.bundle.spec["linux"];
        linux["cgroupsPath"] = json!(format!("{slice}:skifftest:{id}"));
        linux["resources"]["memory"] = json!({"limit": 64 << 20, "reservation": 16 << 20, "swap": 96 << 20});
        linux["resources"]["cpu"] = json!({"shares": 2048, "quota": 25_000, "period": 50_000, "cpus": "0"});
        linux["resources"]["pids"] = json!({"limit": 20});
        case.bundle.write();
        case
    }

    fn unit(&self) -> String {
        format!("skifftest-{}.scope", self.id)
    }

    fn begin(&self) {
        self.detached(&["--systemd-cgroup", "run", "-d", &self.id]).ok();
    }

    fn finish(self) {
        self.cmd(&["--systemd-cgroup", "delete", "--force", &self.id]).ok();
        assert_eq!(property(&self.unit(), "LoadState"), "not-found", "the unit is gone");
        self.end();
    }

    /// Of the container's cgroup.
    fn file(&self, name: &str) -> String {
        let group = property(&self.unit(), "ControlGroup");
        let path = PathBuf::from("/sys/fs/cgroup").join(group.trim_start_matches('/')).join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")).trim().to_string()
    }

    fn limits(&self) -> Vec<String> {
        ["memory.max", "memory.low", "memory.swap.max", "cpu.weight", "cpu.max", "cpuset.cpus", "pids.max"]
            .map(|name| self.file(name))
            .to_vec()
    }

    /// What a process in it may do with devices.
    fn device_access(&self) -> (i32, i32) {
        let null = self.cmd(&["exec", &self.id, "sh", "-c", "echo > /dev/null"]).code;
        let disk = self.cmd(&["exec", &self.id, "sh", "-c", "mknod /dev/shm/d b 254 0 && cat /dev/shm/d"]).code;
        (null, disk)
    }
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_container_is_a_scope_of_its_slice() {
    let case = Case::systemd("skifftest-a.slice");
    case.begin();
    let unit = case.unit();
    let group = format!("/skifftest.slice/skifftest-a.slice/{unit}");
    assert_eq!(property(&unit, "ControlGroup"), group);
    let pid = case.state()["pid"].to_string();
    let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(own.trim(), format!("0::{group}"));
    for (name, want) in [
        ("ActiveState", "active"),
        ("Delegate", "yes"),
        ("DefaultDependencies", "no"),
        ("MemoryAccounting", "yes"),
        ("TasksAccounting", "yes"),
        ("MemoryMax", "67108864"),
        ("MemoryLow", "16777216"),
        ("MemorySwapMax", "33554432"),
        ("CPUQuotaPerSecUSec", "500ms"),
        ("CPUQuotaPeriodUSec", "50ms"),
        ("AllowedCPUs", "0"),
        ("TasksMax", "20"),
        ("DevicePolicy", "strict"),
    ] {
        assert_eq!(property(&unit, name), want, "{name}");
    }
    assert_eq!(property(&unit, "CPUWeight"), case.file("cpu.weight"));
    assert_eq!(case.file("memory.max"), "67108864");
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_reload_of_systemd_changes_nothing() {
    let case = Case::systemd("system.slice");
    case.begin();
    let (limits, devices) = (case.limits(), case.device_access());
    assert_eq!(devices.0, 0);
    assert_ne!(devices.1, 0, "a disk is not for containers");
    run(Command::new("systemctl").arg("daemon-reload"), "").ok();
    assert_eq!((case.limits(), case.device_access()), (limits, devices));
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn an_update_reaches_the_unit_and_survives_a_reload() {
    let case = Case::systemd("system.slice");
    case.begin();
    case.cmd(&["--systemd-cgroup", "update", "--memory", "83886080", "--pids-limit", "30", &case.id]).ok();
    for _ in 0..2 {
        assert_eq!(property(&case.unit(), "MemoryMax"), "83886080");
        assert_eq!(property(&case.unit(), "TasksMax"), "30");
        assert_eq!((case.file("memory.max").as_str(), case.file("pids.max").as_str()), ("83886080", "30"));
        run(Command::new("systemctl").arg("daemon-reload"), "").ok();
    }
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_failed_unit_of_the_same_name_is_no_obstacle() {
    let case = Case::systemd("system.slice");
    let unit = case.unit();
    let failed = run(
        Command::new("systemd-run").args(["--scope", "-p", "RuntimeMaxSec=1", "--unit", &unit, "sleep", "100"]),
        "",
    );
    failed.failed();
    skiff_test_support::eventually("the unit has failed", || property(&unit, "ActiveState") == "failed");
    case.begin();
    assert_eq!(property(&unit, "ActiveState"), "active");
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_path_that_names_no_unit_is_an_error() {
    let mut case = Case::systemd("system.slice");
    case.bundle.spec["linux"]["cgroupsPath"] = json!("/a/b");
    case.bundle.write();
    let err = case.cmd(&["--systemd-cgroup", "run", &case.id]).failed().err;
    assert!(
        err.contains("expected cgroupsPath to be of format \\\"slice:prefix:name\\\"")
            || err.contains("expected cgroupsPath to be of format \"slice:prefix:name\""),
        "{err}"
    );
    case.end();
}
