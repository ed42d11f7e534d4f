//! The systemd cgroup driver. These need systemd as PID 1 and cgroup v2: they are ignored unless asked for, as
//! `make test-vm` does.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;
use skiff_test_support::{device_programs, eventually};

use super::unified::{a_container_manages_its_cgroups, managing};
use super::{Case, is_skiff, run};

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
        // A node whose use no rule allows.
        linux["devices"] = json!([{"path": "/dev/disk", "type": "b", "major": 254, "minor": 0}]);
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

    /// What a process in it may do with devices, and how many programs see to that.
    fn device_access(&self) -> (bool, bool, usize) {
        let can = |script: &str| self.cmd(&["exec", &self.id, "sh", "-c", script]).code == 0;
        (can("echo > /dev/null"), can("head -c 1 /dev/disk"), device_programs(&self.group()).len())
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
    assert_eq!((devices.0, devices.1), (true, false), "a disk is not for containers");
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
        assert_eq!((case.device_access().0, case.device_access().1), (true, false));
        run(Command::new("systemctl").arg("daemon-reload"), "").ok();
    }
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn an_update_that_is_refused_leaves_the_unit_as_it_was() {
    if !is_skiff() {
        return;
    }
    let case = Case::systemd("system.slice");
    case.begin();
    let update = |resources: serde_json::Value| {
        let mut update = case.command(&["--systemd-cgroup", "update", "-r", "-", &case.id]);
        run(&mut update, &resources.to_string()).failed().err
    };
    let err = update(json!({"memory": {"limit": 4096, "swap": 8192, "checkBeforeUpdate": true}}));
    assert!(err.contains("rejecting memory limit 4096 <= usage "), "{err}");
    // Less than the kernel takes.
    let err = update(json!({"memory": {"limit": 80 << 20}, "cpu": {"quota": 1}}));
    assert!(err.contains("linux.resources.cpu.quota: write "), "{err}");
    assert_eq!(case.status(), "running");
    let unit = case.unit();
    let now = ["MemoryMax", "MemorySwapMax", "CPUQuotaPerSecUSec"].map(|name| property(&unit, name));
    assert_eq!(now, ["67108864", "33554432", "500ms"]);
    assert_eq!((case.file("memory.max").as_str(), case.file("cpu.max").as_str()), ("67108864", "25000 50000"));
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn an_idle_unit_can_be_made_busy_again() {
    if !is_skiff() {
        return;
    }
    let case = Case::systemd("system.slice");
    case.begin();
    for (idle, weight) in [("1", "idle"), ("0", "[not set]")] {
        case.cmd(&["--systemd-cgroup", "update", "--cpu-idle", idle, &case.id]).ok();
        run(Command::new("systemctl").arg("daemon-reload"), "").ok();
        assert_eq!((case.file("cpu.idle").as_str(), property(&case.unit(), "CPUWeight").as_str()), (idle, weight));
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

/// What systemd says of a unit that depends on who made it, but not on when.
const SHOWN: &[&str] = &[
    "Slice",
    "Delegate",
    "DelegateControllers",
    "DefaultDependencies",
    "CollectMode",
    "TimeoutStopUSec",
    "KillMode",
    "OOMPolicy",
    "Wants",
    "MemoryAccounting",
    "CPUAccounting",
    "IOAccounting",
    "TasksAccounting",
    "MemoryMax",
    "MemoryHigh",
    "MemoryLow",
    "MemoryMin",
    "MemorySwapMax",
    "CPUWeight",
    "CPUQuotaPerSecUSec",
    "CPUQuotaPeriodUSec",
    "AllowedCPUs",
    "AllowedMemoryNodes",
    "TasksMax",
    "IOWeight",
    "DevicePolicy",
    "DeviceAllow",
];
const FILES: &[&str] = &[
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.min",
    "memory.swap.max",
    "memory.oom.group",
    "cpu.weight",
    "cpu.max",
    "cpuset.cpus",
    "cpuset.mems",
    "pids.max",
    "hugetlb.2MB.max",
    "cgroup.max.depth",
    "cgroup.controllers",
    "cgroup.subtree_control",
];

impl Case {
    /// Properties of the unit, and files of its cgroup.
    fn shown(&self) -> Vec<String> {
        let lines = systemctl(&["show", "-p", &SHOWN.join(","), &self.unit()]);
        let mut lines: Vec<String> = lines.lines().map(str::to_string).collect();
        lines.extend(FILES.iter().map(|name| format!("{name}={}", self.file(name))));
        lines.sort();
        lines
    }
}

/// A unit with as much of the spec as both runtimes know.
fn as_much_as_can_be(runtime: &str) -> Case {
    let mut case = Case::systemd("skifftest-same.slice");
    case.runtime = runtime.into();
    case.with(|spec| {
        let resources = &mut spec["linux"]["resources"];
        // Runtimes differ in what they make of others.
        resources["cpu"]["shares"] = json!(262_144);
        resources["cpu"]["mems"] = json!("0");
        resources["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": 4 << 20}]);
        resources["unified"] = json!({
            "memory.high": "50331648", "memory.min": "1048576", "memory.oom.group": "1", "cgroup.max.depth": "7",
        });
        resources["devices"].as_array_mut().expect("rules").extend([
            json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}),
            json!({"allow": true, "type": "b", "major": 254, "access": "rwm"}),
        ]);
        spec["annotations"] = json!({
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.TimeoutStopUSec": "uint64 123456789",
        });
    })
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn the_unit_and_its_cgroup_are_those_of_runc() {
    if !is_skiff() {
        return;
    }
    let [theirs, ours] = ["/usr/sbin/runc", env!("CARGO_BIN_EXE_skiff")].map(as_much_as_can_be);
    let look = |what: &str| {
        let [theirs, ours] = [&theirs, &ours].map(Case::shown);
        let differ: Vec<_> = theirs.iter().zip(&ours).filter(|(theirs, ours)| theirs != ours).collect();
        assert!(theirs.len() == ours.len() && differ.is_empty(), "{what}: {differ:#?}");
    };
    theirs.begin();
    ours.begin();
    look("after the start");
    assert!(property(&ours.unit(), "Description").ends_with(&ours.id));
    let resources = json!({
        "memory": {"limit": 128 << 20, "swap": 256 << 20, "reservation": 32 << 20},
        "cpu": {"shares": 2, "quota": 33_333, "period": 100_000, "cpus": "0-1"},
        "pids": {"limit": 33},
        "unified": {"memory.high": "100663296"},
    });
    for case in [&theirs, &ours] {
        let mut update = case.command(&["--systemd-cgroup", "update", "-r", "-", &case.id]);
        run(&mut update, &resources.to_string()).ok();
    }
    look("after an update");
    for case in [&theirs, &ours] {
        case.cmd(&["--systemd-cgroup", "update", "--cpu-quota", "-1", "--pids-limit", "-1", &case.id]).ok();
    }
    look("after limits are taken back");
    theirs.finish();
    ours.finish();
}

/// What is said on the bus about a unit, while something is done.
struct Listener {
    monitor: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Listener {
    fn new() -> Listener {
        let args = ["monitor", "--json=short", "org.freedesktop.systemd1"];
        let mut command = Command::new("busctl");
        let mut monitor = command.args(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("busctl");
        let (sender, lines) = std::sync::mpsc::channel();
        let out = BufReader::new(monitor.stdout.take().expect("piped"));
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let listener = Listener { monitor, lines };
        eventually("the bus can be heard", || {
            call_about("skifftest-first.scope");
            listener.lines.try_iter().any(|line| line.contains("skifftest-first.scope"))
        });
        listener
    }

    /// The methods that were called with this unit in the arguments, so far.
    fn calls(&self, unit: &str) -> Vec<String> {
        // What comes after this has been said before.
        let end = skiff_test_support::unique("skifftest-end");
        call_about(&end);
        let mut out = Vec::new();
        loop {
            let line = self.lines.recv_timeout(std::time::Duration::from_secs(30)).expect("the bus can be heard");
            let message: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if message["type"] != "method_call" {
                continue;
            }
            if line.contains(&end) {
                return out;
            }
            if message["payload"].to_string().contains(unit) {
                out.push(message["member"].as_str().unwrap_or_default().to_string());
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

/// A call that changes nothing.
fn call_about(unit: &str) {
    let object = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];
    run(Command::new("busctl").arg("call").args(object).args(["GetUnit", "s", unit]), "");
}

/// A busy systemd is what holds nodes up.
#[test]
#[ignore = "needs systemd as PID 1"]
fn systemd_is_asked_once_for_a_start_and_never_for_an_exec() {
    if !is_skiff() {
        return;
    }
    let case = Case::systemd("system.slice");
    let unit = case.unit();
    let listener = Listener::new();
    // Without this skiff uses systemd's own socket, where nobody can listen.
    let on_the_bus = |args: &[&str]| {
        let mut command = case.command(args);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/run/dbus/system_bus_socket");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().expect("it runs").code()
    };
    let said = |args: &[&str]| {
        assert_eq!(on_the_bus(&[&["--systemd-cgroup"], args].concat()), Some(0), "{args:?}");
        listener.calls(&unit)
    };
    let id = case.id.as_str();
    assert_eq!(said(&["create", id]), ["StartTransientUnit"]);
    for args in [
        &["start", id][..],
        &["exec", id, "true"],
        &["events", "--stats", id],
        &["ps", id],
        &["pause", id],
        &["resume", id],
        &["state", id],
    ] {
        assert_eq!(said(args), [""; 0], "{args:?}");
    }
    assert_eq!(said(&["update", "--pids-limit", "30", id]), ["SetUnitProperties"]);
    assert_eq!(said(&["kill", id, "KILL"]), [""; 0]);
    eventually("it stops", || case.status() == "stopped");
    let end = said(&["delete", id]);
    assert!(
        ["StopUnit", "ResetFailedUnit"].starts_with(&end.iter().map(String::as_str).collect::<Vec<_>>()),
        "{end:?}"
    );
    case.end();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_systemd_that_does_not_answer_is_an_error_after_a_while() {
    if !is_skiff() {
        return;
    }
    let case = Case::systemd("system.slice");
    let socket = case.bundle.path().join("bus");
    let _silent = UnixListener::bind(&socket).expect("a socket");
    let mut command = case.command(&["--systemd-cgroup", "create", &case.id]);
    command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", socket.display()));
    let err = run(&mut command, "").failed().err;
    let want = format!("start unit \\\"{}\\\" of systemd: wait for systemd: it does not answer", case.unit());
    assert!(err.contains(&want), "{err}");
    case.end();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_container_goes_when_systemd_does_not_answer() {
    if !is_skiff() {
        return;
    }
    let case = Case::systemd("system.slice");
    case.begin();
    let socket = case.bundle.path().join("bus");
    let _silent = UnixListener::bind(&socket).expect("a socket");
    let mut command = case.command(&["--systemd-cgroup", "delete", "--force", &case.id]);
    command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", socket.display()));
    let err = run(&mut command, "").ok().err;
    let want = format!("stop unit \\\"{}\\\" of systemd: wait for systemd: it does not answer", case.unit());
    assert!(err.contains(&want), "{err}");
    case.end();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_failed_create_leaves_no_unit() {
    for change in [json!({"args": ["no-such-program"]}), json!({"cwd": "/bin/sh"})] {
        let case = Case::systemd("system.slice").with(|spec| {
            for (key, value) in change.as_object().expect("an object") {
                spec["process"][key] = value.clone();
            }
        });
        case.cmd(&["--systemd-cgroup", "run", &case.id]).failed();
        let unit = case.unit();
        eventually("the unit is gone", || property(&unit, "LoadState") == "not-found");
        case.end();
    }
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_unit_goes_with_its_container_however_that_ends() {
    let case = Case::systemd("system.slice").with(|spec| spec["process"]["args"] = json!(["sh", "-c", "exit 3"]));
    assert_eq!(case.cmd(&["--systemd-cgroup", "run", &case.id]).code, 3);
    assert_eq!(property(&case.unit(), "LoadState"), "not-found");
    case.begin();
    eventually("it stops", || case.status() == "stopped");
    case.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_unit_can_manage_cgroups_of_its_own() {
    let case = managing().with(|spec| spec["linux"]["cgroupsPath"] = json!("system.slice:skifftest:managing"));
    a_container_manages_its_cgroups(&case, &["--systemd-cgroup"]);
    case.cmd(&["--systemd-cgroup", "delete", "--force", &case.id]).ok();
    assert_eq!(property("skifftest-managing.scope", "LoadState"), "not-found");
    case.end();
}

/// An ordinary user's systemd makes the unit, and limits hold as far as it has controllers.
#[test]
#[ignore = "needs systemd as PID 1 and a user with the id 1000"]
fn an_ordinary_users_systemd_makes_the_unit() {
    let case = Case::new(&["sleep", "1000"]);
    let _ = std::fs::remove_file(case.bundle.path().join("config.json"));
    run(Command::new("loginctl").args(["enable-linger", "1000"]), "").ok();
    eventually("the user's systemd runs", || {
        run(Command::new("systemctl").args(["is-active", "user@1000.service"]), "").code == 0
    });
    let program = case.bundle.path().join("runtime");
    let found = if is_skiff() { case.runtime.clone() } else { "/usr/sbin/runc".into() };
    std::fs::copy(found, &program).expect("a copy that the user can run");
    run(Command::new("chown").args(["-R", "1000:1000"]).arg(case.bundle.path()), "").ok();
    let as_user = |program: &std::path::Path, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "1000", "--regid", "1000", "--clear-groups"]).arg(program).args(args);
        command.env("XDG_RUNTIME_DIR", "/run/user/1000").env_remove("DBUS_SESSION_BUS_ADDRESS");
        command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/run/user/1000/bus").current_dir(case.bundle.path());
        command
    };
    run(&mut as_user(&program, &["spec", "--rootless"]), "").ok();
    let path = case.bundle.path().join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(["sleep", "1000"]);
    spec["linux"]["cgroupsPath"] = json!(format!("user.slice:skifftest:{}", case.id));
    spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 20}});
    std::fs::write(&path, spec.to_string()).unwrap();
    let null = Stdio::null;
    let errors = std::fs::File::create(case.bundle.path().join("err")).unwrap();
    let mut start = as_user(&program, &["--systemd-cgroup", "run", "-d", &case.id]);
    let started = start.stdin(null()).stdout(null()).stderr(errors).status().expect("it runs");
    let said = std::fs::read_to_string(case.bundle.path().join("err")).unwrap();
    assert!(started.success(), "{said}");
    let show = |name: &str| {
        let args = ["--user", "show", "--value", "-p", name, &case.unit()];
        run(&mut as_user("/usr/bin/systemctl".as_ref(), &args), "").ok().out.trim().to_string()
    };
    assert_eq!((show("MemoryMax"), show("TasksMax")), ("67108864".into(), "20".into()));
    let group = PathBuf::from(format!("/sys/fs/cgroup{}", show("ControlGroup")));
    assert!(group.display().to_string().contains("/user@1000.service/"), "{group:?}");
    let files = ["memory.max", "pids.max"].map(|name| std::fs::read_to_string(group.join(name)).unwrap());
    assert_eq!(files, ["67108864\n", "20\n"]);
    if is_skiff() {
        // runc moves them from 1.5 on.
        let mut exec = as_user(&program, &["exec", "-d", &case.id, "sleep", "1000"]);
        assert!(exec.stdin(null()).stdout(null()).stderr(null()).status().expect("it runs").success());
        let members = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert_eq!(members.lines().count(), 2, "{members}");
    }
    run(&mut as_user(&program, &["--systemd-cgroup", "update", "--pids-limit", "30", &case.id]), "").ok();
    assert_eq!(
        (show("TasksMax"), std::fs::read_to_string(group.join("pids.max")).unwrap()),
        ("30".into(), "30\n".into())
    );
    run(&mut as_user(&program, &["--systemd-cgroup", "delete", "--force", &case.id]), "").ok();
    assert_eq!(show("LoadState"), "not-found");
    case.end();
}
