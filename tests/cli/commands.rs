//! The commands beyond the life of a container: update, events, exec in a sub-cgroup, sockets and notifications.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use skiff_test_support::{eventually, has_controllers, receive_console, run};

use super::{Case, is_skiff};

/// The directory of a v1 controller, or the v2 one, of a process.
fn cgroup(pid: &Value, controller: &str) -> PathBuf {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let v1 = Path::new("/sys/fs/cgroup").join(controller);
    let of = |name: &str| {
        let line = groups.lines().find(|line| line.split(':').nth(1).unwrap().split(',').any(|c| c == name)).unwrap();
        line.split(':').nth(2).unwrap().trim_start_matches('/').to_string()
    };
    if v1.is_dir() { v1.join(of(controller)) } else { Path::new("/sys/fs/cgroup").join(of("")) }
}

fn is_v1() -> bool {
    Path::new("/sys/fs/cgroup/memory").is_dir()
}

fn sleeping() -> Case {
    let case = Case::new(&["sleep", "1000"]).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        spec["linux"]["resources"]["cpu"] = json!({"shares": 512, "quota": 20000, "period": 50000});
    });
    case.detached(&["run", "-d", &case.id]).ok();
    case
}

fn remove(case: Case) {
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn update_changes_what_it_is_given_and_nothing_else() {
    if !has_controllers(&["memory", "cpu", "pids"]) {
        return;
    }
    let case = sleeping();
    let pid = case.state()["pid"].clone();
    let read = |controller: &str, v1: &str, v2: &str| {
        let file = if is_v1() { v1 } else { v2 };
        std::fs::read_to_string(cgroup(&pid, controller).join(file)).unwrap().trim().to_string()
    };
    case.cmd(&["update", "--pids-limit", "77", &case.id]).ok();
    assert_eq!(read("pids", "pids.max", "pids.max"), "77");
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    case.cmd(&["update", "--memory", "32M", "--cpu-quota", "30000", &case.id]).ok();
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (32 << 20).to_string());
    if is_v1() {
        assert_eq!(read("cpu", "cpu.cfs_quota_us", ""), "30000");
        assert_eq!(read("cpu", "cpu.cfs_period_us", ""), "50000");
        assert_eq!(read("cpu", "cpu.shares", ""), "512");
    } else {
        assert_eq!(read("cpu", "", "cpu.max"), "30000 50000");
    }
    let resources = json!({"memory": {"limit": 48 << 20}, "pids": {"limit": 99}}).to_string();
    run(&mut case.command(&["update", "--resources", "-", &case.id]), &resources).ok();
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (48 << 20).to_string());
    assert_eq!(read("pids", "pids.max", "pids.max"), "99");
    case.cmd(&["update", "--memory", "nonsense", &case.id]).failed();
    run(&mut case.command(&["update", "-r", "-", &case.id]), "{").failed();
    let done = case.cmd(&["exec", &case.id, "head", "-c", "1", "/dev/zero"]).ok();
    assert_eq!(done.out.len(), 1, "devices are untouched");
    remove(case);
}

#[test]
fn a_limit_that_cannot_be_set_changes_nothing() {
    if !has_controllers(&["memory", "cpu", "pids"]) {
        return;
    }
    let case = sleeping();
    let pid = case.state()["pid"].clone();
    // A quota below the kernel's least comes after the memory limit, which is put back.
    let done = case.cmd(&["update", "--memory", "40M", "--cpu-quota", "1", &case.id]).failed();
    if is_skiff() {
        assert!(done.err.contains("linux.resources.cpu.quota: write "), "{}", done.err);
        let file = if is_v1() { "memory.limit_in_bytes" } else { "memory.max" };
        let limit = std::fs::read_to_string(cgroup(&pid, "memory").join(file)).unwrap();
        assert_eq!(limit.trim(), (64 << 20).to_string());
    }
    remove(case);
}

#[test]
fn stats_have_runcs_layout() {
    if !has_controllers(&["memory", "cpu", "pids"]) {
        return;
    }
    let case = sleeping();
    let line = case.cmd(&["events", "--stats", &case.id]).ok().out;
    let stats: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&stats["type"], &stats["id"]), (&json!("stats"), &json!(case.id)));
    let data = &stats["data"];
    assert!(data["cpu"]["usage"]["total"].as_u64().unwrap() > 0);
    assert_eq!(data["memory"]["usage"]["limit"], json!(64 << 20));
    assert!(data["memory"]["raw"].as_object().unwrap().len() > 10);
    assert_eq!(data["pids"]["current"], json!(1));
    case.cmd(&["kill", &case.id, "KILL"]).ok();
    eventually("it stops", || case.status() == "stopped");
    let done = case.cmd(&["events", "--stats", &case.id]).failed();
    assert!(done.err.contains("is not running"), "{}", done.err);
    remove(case);
}

#[test]
fn events_tell_of_oom_and_end_with_the_container() {
    if !has_controllers(&["memory"]) {
        return;
    }
    if !is_skiff() {
        // runc 1.1 does not end with the container on cgroup v1.
        return;
    }
    let script = "sleep 1; (x=$(yes aaaaaaaaaaaaaaaa | head -c 100000000 | tr -d '\\n')); sleep 1";
    let case = Case::sh(script).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 8 << 20, "swap": 8 << 20});
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let text = case.cmd(&["events", "--interval", "100ms", &case.id]).ok().out;
    let kinds: Vec<Value> =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["type"].clone()).collect();
    assert!(kinds.contains(&json!("stats")) && kinds.contains(&json!("oom")), "{kinds:?}");
    remove(case);
}

#[test]
fn exec_enters_cgroups_below_the_containers() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["sleep", "1000"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let pid = case.state()["pid"].clone();
    let own = cgroup(&pid, "pids");
    std::fs::create_dir(own.join("below")).unwrap();
    let arg = if is_v1() { "pids:below" } else { "below" };
    let out = case.cmd(&["exec", "--cgroup", arg, &case.id, "cat", "/proc/self/cgroup"]).ok().out;
    assert!(out.lines().any(|line| line.ends_with("/below")), "{out}");
    for (arg, want) in [
        ("..", "bad sub cgroup path"),
        ("nonexistent", "no such file or directory"),
        ("whaat:/", "unknown controller whaat"),
    ] {
        let done = case.cmd(&["exec", "--cgroup", arg, &case.id, "true"]);
        assert!(done.code == 255 && done.err.contains(want), "{arg}: {done:?}");
    }
    case.cmd(&["exec", "--cgroup", "/", &case.id, "true"]).ok();
    remove(case);
}

#[test]
fn pidfds_are_handed_over() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["sleep", "1000"]);
    let socket = case.bundle.path().join("pidfd.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let socket = socket.to_str().unwrap();
    case.detached(&["create", "--pidfd-socket", socket, &case.id]).ok();
    let (name, pidfd) = receive_console(&listener);
    assert_eq!(name, "standard");
    let info =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&pidfd))).unwrap();
    assert!(info.contains(&format!("Pid:\t{}\n", case.state()["pid"])), "{info}");
    case.cmd(&["start", &case.id]).ok();
    case.cmd(&["exec", "--pidfd-socket", socket, &case.id, "true"]).ok();
    assert_eq!(receive_console(&listener).0, "setns");
    remove(case);
}

#[test]
fn readiness_reaches_the_caller() {
    let case = Case::sh("printf 'READY=1\\n' | nc -w 1 -u local:$NOTIFY_SOCKET; sleep 1000");
    if !is_skiff() {
        return;
    }
    // busybox has no client for datagram sockets of the file system: the test speaks for the container.
    let host = case.bundle.path().join("host.sock");
    let listening = UnixDatagram::bind(&host).unwrap();
    let id = case.id.clone();
    let null = || std::process::Stdio::null();
    let mut create = case.command(&["create", &id]);
    let created = create.env("NOTIFY_SOCKET", &host).stdin(null()).stdout(null()).stderr(null()).status().unwrap();
    assert!(created.success());
    let pid = case.state()["pid"].clone();
    let env = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut start = case.command(&["start", &id]);
    let mut starting = start.env("NOTIFY_SOCKET", &host).spawn().unwrap();
    let inside = PathBuf::from(format!("/proc/{pid}/root/run/notify/notify.sock"));
    eventually("the socket is there", || inside.exists());
    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to(b"STATUS=warming up", &inside).unwrap();
    sender.send_to(b"READY=1", &inside).unwrap();
    assert!(starting.wait().unwrap().success());
    let mut buf = [0; 100];
    let n = listening.recv(&mut buf).unwrap();
    assert_eq!(std::str::from_utf8(&buf[..n]).unwrap(), format!("READY=1\nMAINPID={pid}\n"), "{env}");
    remove(case);
}

#[test]
fn a_plan_is_told_without_doing_it_and_without_privilege() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["true"]).with(|spec| {
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}]});
    });
    run(std::process::Command::new("chmod").args(["-R", "a+rX"]).arg(case.bundle.path()), "").ok();
    let mut as_user = std::process::Command::new("setpriv");
    as_user.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    let mut command = as_user;
    let copy = case.bundle.path().join("runtime");
    std::fs::copy(&case.runtime, &copy).unwrap();
    command.arg(&copy).args(["plan", "--format", "json"]).arg(case.bundle.path());
    let lines: Vec<Value> = serde_json::from_str(&run(&mut command, "").ok().out).unwrap();
    let has = |step: &str, part: &str| {
        lines.iter().any(|line| line["step"] == step && line["does"].as_str().unwrap().contains(part))
    };
    assert!(has("mounts", "mount proc at /proc") && has("seal", "mask /proc/kcore") && has("execve", "true"));
    assert!(has("seccomp", "from 1 rules, default SCMP_ACT_ERRNO"), "{lines:#?}");
    assert!(case.cmd(&["plan"]).ok().out.starts_with("  1. cgroup "));
    let case = case.with(|spec| spec["process"]["cwd"] = json!("relative"));
    assert!(case.cmd(&["plan"]).failed().err.contains("process.cwd: "));
    case.end();
}

#[test]
fn a_trace_has_the_steps_of_both_sides() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["true"]);
    let path = case.bundle.path().join("trace.json");
    case.cmd(&["run", "--trace", path.to_str().unwrap(), &case.id]).ok();
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let at = |name: &str| {
        let event = events.iter().find(|event| event["name"] == name);
        event.unwrap_or_else(|| panic!("{name} in {events:#?}"))["ts"].as_f64().unwrap()
    };
    assert!(at("plan") < at("make the cgroup") && at("make the cgroup") < at("clone the init"));
    assert!(at("namespaces") < at("rootfs, mounts and devices") && at("rootfs, mounts and devices") < at("seal"));
    case.end();
}

#[test]
fn json_logs_have_the_parts_of_an_error() {
    if !is_skiff() {
        return;
    }
    let last = |case: &Case| -> Value {
        let log = case.bundle.path().join("log.json");
        case.cmd(&["--log", log.to_str().unwrap(), "--log-format", "json", "run", &case.id]).failed();
        serde_json::from_str(std::fs::read_to_string(log).unwrap().lines().last().unwrap()).unwrap()
    };
    let case = Case::new(&["true"]).with(|spec| spec["process"]["cwd"] = json!("relative"));
    let line = last(&case);
    assert_eq!((&line["level"], &line["field"]), (&json!("error"), &json!("process.cwd")));
    case.end();
    let case = Case::new(&["true"]).with(|spec| {
        let mount = json!({"destination": "/x", "type": "bind", "source": "/no/such/dir", "options": ["bind"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    let line = last(&case);
    assert_eq!((&line["step"], &line["errno"]), (&json!("mounts"), &json!("ENOENT")));
    assert!(line["msg"].as_str().unwrap().contains("mounts[7].source: open \"/no/such/dir\""));
    case.end();
}
