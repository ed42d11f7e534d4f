//! The commands beyond the life of a container: update, events, exec in a sub-cgroup, sockets and notifications.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use skiff_test_support::{eventually, has_controllers, receive_console, run};

use super::{Case, is_skiff};

/// The directory of a v1 controller, or the v2 one, of a process.
pub fn cgroup(pid: &Value, controller: &str) -> PathBuf {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let v1 = Path::new("/sys/fs/cgroup").join(controller);
    let of = |name: &str| {
        let line = groups.lines().find(|line| line.split(':').nth(1).unwrap().split(',').any(|c| c == name)).unwrap();
        line.split(':').nth(2).unwrap().trim_start_matches('/').to_string()
    };
    if v1.is_dir() { v1.join(of(controller)) } else { Path::new("/sys/fs/cgroup").join(of("")) }
}

pub fn is_v1() -> bool {
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

/// A cgroup that is asked for by name, and can take no process, is an error; without a name the process goes where the init
/// lives.
#[test]
fn exec_enters_the_cgroup_that_is_named_or_none() {
    if is_v1() {
        return;
    }
    let case = Case::new(&["sleep", "1000"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let pid = case.state()["pid"].clone();
    let own = cgroup(&pid, "");
    std::fs::create_dir(own.join("leaf")).unwrap();
    std::fs::write(own.join("leaf/cgroup.procs"), pid.to_string()).unwrap();
    let controllers = std::fs::read_to_string(own.join("cgroup.controllers")).unwrap();
    let Some(controller) = controllers.split_whitespace().next() else { return };
    std::fs::write(own.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
    let out = case.cmd(&["exec", &case.id, "cat", "/proc/self/cgroup"]).ok().out;
    assert!(out.trim_end().ends_with("/leaf"), "{out}");
    let done = case.cmd(&["exec", "--cgroup", "/", &case.id, "true"]);
    assert_eq!(done.code, 255, "{done:?}");
    assert!(done.err.contains("adding pid ") && done.err.contains("device or resource busy"), "{done:?}");
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
fn a_plan_is_complete_and_true() {
    if !skiff_test_support::has_controllers(&["memory"]) {
        return;
    }
    if !is_skiff() {
        return;
    }
    let case = Case::sh("cat /proc/self/mountinfo; grep Cap /proc/self/status; stat -c '%n %a %u:%g' /dev/fuse").with(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/data", "type": "bind", "source": "/tmp", "options": ["rbind", "ro", "rnosuid", "rslave"]}));
        mounts.push(json!({"destination": "/mnt", "type": "tmpfs", "source": "x", "options": ["noatime", "size=1m"]}));
        spec["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
            "fileMode": 432, "uid": 3, "gid": 4}]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        spec["linux"]["resources"]["cpu"] = json!({"shares": 512});
        spec["linux"]["rootfsPropagation"] = json!("rslave");
        spec["linux"]["personality"] = json!({"domain": "LINUX"});
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 2});
        spec["process"]["oomScoreAdj"] = json!(10);
        spec["hooks"]["createRuntime"] = json!([{"path": "/bin/true", "args": ["true", "x"], "timeout": 5}]);
    });
    let text = case.cmd(&["plan"]).ok().out;
    for want in [
        "clone the init into new namespaces: mount, uts, ipc, pid, network",
        "make all of the host's mounts rslave in the new mount namespace",
        "bring lo up",
        "set the host name to box",
        "rbind /tmp at /data, ro,rnosuid,rslave",
        "mount tmpfs (size=1m) at /mnt, noatime",
        "mount devpts (newinstance,ptmxmode=0666,mode=0620,gid=5) at /dev/pts, nosuid,noexec",
        "make /dev/fuse (c 10:229), mode 0660, owner 3:4",
        "make /dev/null (c 1:3), mode 0666, owner 0:0",
        "link /dev/ptmx to pts/ptmx",
        "run the hook /bin/true x, for at most 5 s",
        "pivot_root to the rootfs and detach the old root",
        "make / rslave",
        "write 1 to /proc/sys/net/ipv4/ip_forward",
        "make / read-only",
        "make /proc/sys read-only",
        "mask /proc/kcore",
        "set oom_score_adj to 10",
        "limit RLIMIT_NOFILE to 100, and at most 200",
        "best-effort I/O priority 2",
        "execution domain LINUX",
        "set no_new_privs",
        "bounding: CAP_KILL,CAP_NET_BIND_SERVICE,CAP_AUDIT_WRITE",
        "inheritable: none",
        "become uid 0, gid 0, umask 0022",
        "deny all; deny a *:* rwm; allow c *:* m",
    ] {
        assert!(text.contains(want), "{want} in\n{text}");
    }
    let (memory, cpu) = if is_v1() {
        ("write 67108864 to memory.limit_in_bytes [linux.resources.memory.limit]", "write 512 to cpu.shares")
    } else {
        ("write 67108864 to memory.max [linux.resources.memory.limit]", "write 59 to cpu.weight")
    };
    assert!(text.contains(memory) && text.contains(cpu), "{text}");
    // What it says of the container is what the container sees.
    let out = case.run().ok().out;
    let mounts = text.lines().filter(|line| line.split_whitespace().nth(1) == Some("mounts"));
    for line in mounts {
        let at = line.split(" at ").nth(1).unwrap().split(',').next().unwrap();
        assert!(out.contains(&format!(" {at} ")), "{at} in {out}");
    }
    assert!(out.contains("/dev/fuse 660 3:4"), "{out}");
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
    // What a viewer of the format wants of every event: names for the tracks, and times for the steps.
    let tracks: Vec<&Value> =
        events.iter().filter(|event| event["ph"] == "M" && event["name"] == "thread_name").collect();
    let names: Vec<&str> = tracks.iter().map(|event| event["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["runtime", "container init"]);
    for event in events {
        assert!(event["pid"].is_u64(), "{event}");
        match event["ph"].as_str().unwrap() {
            "M" => assert!(event["args"]["name"].is_string(), "{event}"),
            "X" => {
                let of_a_track = tracks.iter().any(|track| track["tid"] == event["tid"]);
                let times = event["ts"].as_f64().unwrap() >= 0.0 && event["dur"].as_f64().unwrap() >= 0.0;
                assert!(of_a_track && times, "{event}");
            }
            other => panic!("{other}: {event}"),
        }
    }
    // A create that fails has a timeline up to there.
    let case = case.with(|spec| spec["process"]["args"] = json!(["nope"]));
    case.cmd(&["run", "--trace", path.to_str().unwrap(), &case.id]).failed();
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().iter().any(|event| event["name"] == "seal"), "{trace}");
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

#[test]
fn features_are_told_truly() {
    let case = Case::new(&["true"]);
    let features: Value = serde_json::from_str(&case.cmd(&["features"]).ok().out).unwrap();
    let list = |path: &str| -> Vec<String> {
        let list = features.pointer(path).unwrap_or_else(|| panic!("{path} in {features}"));
        list.as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_string()).collect()
    };
    assert_eq!(features["ociVersionMin"], "1.0.0");
    assert!(features["ociVersionMax"].as_str().unwrap().starts_with("1."));
    let hooks = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    assert_eq!(list("/hooks"), hooks);
    let has = |path: &str, names: &[&str]| {
        let have = list(path);
        for name in names {
            assert!(have.iter().any(|other| other == name), "{name} in {path}: {have:?}");
        }
    };
    has(
        "/mountOptions",
        &["ro", "rbind", "rro", "rnosuid", "ratime", "rprivate", "nosuid", "tmpcopyup", "strictatime"],
    );
    has("/linux/namespaces", &["cgroup", "ipc", "mount", "network", "pid", "user", "uts"]);
    has("/linux/capabilities", &["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE", "CAP_BPF"]);
    has("/linux/seccomp/actions", &["SCMP_ACT_ALLOW", "SCMP_ACT_NOTIFY", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG"]);
    has("/linux/seccomp/operators", &["SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"]);
    has("/linux/seccomp/archs", &["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64", "SCMP_ARCH_S390X"]);
    for path in [
        "cgroup/v1",
        "cgroup/v2",
        "cgroup/systemd",
        "cgroup/systemdUser",
        "seccomp/enabled",
        "apparmor/enabled",
        "selinux/enabled",
    ] {
        assert_eq!(features.pointer(&format!("/linux/{path}")), Some(&json!(true)), "{path}");
    }
    if is_skiff() {
        assert_eq!(features["ociVersionMax"], "1.3.0");
        has("/mountOptions", &["idmap", "ridmap", "nosymfollow", "rnosymfollow"]);
        has("/linux/namespaces", &["time"]);
        for path in [
            "intelRdt/enabled",
            "intelRdt/schemata",
            "intelRdt/monitoring",
            "mountExtensions/idmap/enabled",
            "netDevices/enabled",
            "cgroup/rdma",
        ] {
            assert_eq!(features.pointer(&format!("/linux/{path}")), Some(&json!(true)), "{path}");
        }
        has("/linux/memoryPolicy/modes", &["MPOL_BIND", "MPOL_WEIGHTED_INTERLEAVE"]);
        has("/linux/seccomp/supportedFlags", &["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]);
        has("/potentiallyUnsafeConfigAnnotations", &["org.criu.config", "org.systemd.property."]);
    }
    case.end();
}

#[test]
fn every_command_has_runcs_flags() {
    // Those of runc 1.5.
    let bundle = "bundle console-socket pidfd-socket pid-file no-pivot no-new-keyring preserve-fds";
    let criu = "image-path work-path tcp-established ext-unix-sk shell-job file-locks manage-cgroups-mode lazy-pages";
    for (command, flags) in [
        ("create", bundle.to_string()),
        ("run", format!("{bundle} detach keep no-subreaper")),
        ("start", String::new()),
        ("state", String::new()),
        ("delete", "force".into()),
        ("kill", "all".into()),
        ("list", "format quiet".into()),
        ("ps", "format".into()),
        ("pause", String::new()),
        ("resume", String::new()),
        ("events", "interval stats".into()),
        ("spec", "bundle rootless".into()),
        ("features", String::new()),
        (
            "exec",
            "console-socket pidfd-socket cwd env tty user additional-gids process detach pid-file process-label apparmor \
             no-new-privs cap preserve-fds cgroup ignore-paused"
                .into(),
        ),
        (
            "update",
            "resources blkio-weight cpu-period cpu-quota cpu-burst cpu-share cpu-rt-period cpu-rt-runtime cpu-idle \
             cpuset-cpus cpuset-mems memory memory-reservation memory-swap pids-limit l3-cache-schema mem-bw-schema"
                .into(),
        ),
        ("checkpoint", format!("{criu} parent-path leave-running status-fd page-server pre-dump empty-ns auto-dedup")),
        ("restore", format!("{criu} console-socket bundle detach pid-file no-subreaper no-pivot empty-ns auto-dedup lsm-profile lsm-mount-context")),
    ] {
        let case = Case::new(&["true"]);
        let help = case.cmd(&[command, "--help"]).ok().out;
        assert!(help.starts_with("NAME:\n") && help.contains(&format!(" {command} - ")), "{help}");
        let known = help.split_whitespace().filter_map(|word| word.strip_prefix("--"));
        let known: Vec<&str> = known.map(|word| word.trim_end_matches(',')).collect();
        for flag in flags.split_whitespace() {
            // runc 1.1 has not all of them yet.
            assert!(!is_skiff() || known.contains(&flag), "{command} --{flag} in {known:?}");
        }
        case.end();
    }
}

#[test]
fn lists_have_runcs_formats() {
    if !skiff_test_support::has_controllers(&["memory"]) {
        return;
    }
    let case = sleeping();
    let root = tempfile::tempdir().unwrap();
    let root = root.path().to_str().unwrap();
    assert_eq!(case.cmd(&["--root", root, "list", "-f", "json"]).ok().out, "null\n");
    assert_eq!(case.cmd(&["--root", root, "list", "-q"]).ok().out, "");
    // runc means to refuse it, too.
    assert!(!is_skiff() || case.cmd(&["--root", "/no/such/root", "list"]).code == 1);
    let ids = case.cmd(&["list", "--quiet"]).ok().out;
    assert!(ids.lines().any(|id| id == case.id), "{ids}");
    let rows: Vec<Value> = serde_json::from_str(&case.cmd(&["list", "--format", "json"]).ok().out).unwrap();
    let row = rows.iter().find(|row| row["id"] == case.id.as_str()).unwrap();
    assert_eq!((&row["status"], &row["owner"]), (&json!("running"), &json!("root")));
    let keys: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"]);
    case.cmd(&["list", "--format", "moon"]).failed();
    let table = case.cmd(&["ps", &case.id, "-e", "-o", "pid,comm"]).ok().out;
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines, [vec!["PID", "COMMAND"], vec![&row["pid"].to_string(), "sleep"]]);
    case.cmd(&["ps", "--format", "moon", &case.id]).failed();
    case.cmd(&["ps", &case.id, "-o", "comm"]).failed();
    remove(case);
}

#[test]
fn a_container_that_is_kept_stays_after_its_run() {
    if !super::since(1) {
        return;
    }
    let case = Case::sh("exit 4");
    assert_eq!(case.cmd(&["run", "--keep", "--no-subreaper", &case.id]).code, 4);
    assert_eq!(case.status(), "stopped");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn descriptors_are_passed_on_when_asked() {
    let case = Case::sh("cat <&3; echo; ls /proc/self/fd | wc -l; echo LISTEN_FDS=$LISTEN_FDS LISTEN_PID=$LISTEN_PID");
    std::fs::write(case.bundle.path().join("three"), "third").unwrap();
    // A shell puts the file at 3, as systemd would.
    let with = |flags: &str, env: &str| {
        let line = format!("{env} exec '{}' run {flags} {} 3<three", case.runtime.display(), case.id);
        run(std::process::Command::new("sh").args(["-c", &line]).current_dir(case.bundle.path()), "")
    };
    let out = with("--preserve-fds 1", "").ok().out;
    assert!(out.starts_with("third\n") && out.ends_with("LISTEN_FDS= LISTEN_PID=\n"), "{out}");
    let out = with("", "export LISTEN_FDS=1 LISTEN_PID=1;").ok().out;
    assert!(out.ends_with("LISTEN_FDS= LISTEN_PID=\n"), "they are for another process: {out}");
    let out = with("", "export LISTEN_FDS=1 LISTEN_PID=$$;").ok().out;
    assert!(out.starts_with("third\n") && out.ends_with("LISTEN_FDS=1 LISTEN_PID=1\n"), "{out}");
    // What the runtime itself has open is none of them.
    let done = with("--preserve-fds 2", "").failed();
    assert!(done.err.contains("preserved-fd 2 (of 2)"), "{done:?}");
    let done = with("--preserve-fds 200", "").failed();
    assert!(done.err.contains("preserved-fd ") && done.err.contains("(of 200)"), "{done:?}");
    case.end();
}

#[test]
fn logs_are_lines_of_text_or_json() {
    let case = Case::new(&["true"]).with(|spec| spec["process"]["cwd"] = json!("relative"));
    let log = case.bundle.path().join("log");
    let log = log.to_str().unwrap();
    let done = case.cmd(&["--log", log, "run", &case.id]).failed();
    assert!(!done.err.is_empty(), "it is told to who sits there, too");
    let done = case.cmd(&["--log", log, "--log-format", "json", "run", &case.id]).failed();
    assert!(done.err.contains("absolute path"), "{done:?}");
    let text = std::fs::read_to_string(log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("time=\"") && lines[0].contains(" level=error msg=\""), "{text}");
    let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert!(["level", "msg", "time"].iter().all(|key| last[key].is_string()), "{last}");
    let done = case.cmd(&["--log-format", "moon", "list"]).failed();
    assert!(done.err.contains("moon"), "{done:?}");
    case.end();
}

#[test]
fn every_process_is_signalled_with_all() {
    let case = Case::sh("sleep 1000 & sleep 1000 & wait").with(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|ns| ns["type"] != "pid");
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let pids = || -> Vec<i64> { serde_json::from_str(&case.cmd(&["ps", "-f", "json", &case.id]).ok().out).unwrap() };
    eventually("all three are there", || pids().len() == 3);
    case.cmd(&["kill", "--all", &case.id, "KILL"]).ok();
    eventually("none is", || case.status() == "stopped");
    case.cmd(&["kill", "--all", &case.id, "KILL"]).ok();
    // Since 1.2 runc takes a KILL for one of all where the pid namespace is shared.
    if is_skiff() || !super::since(2) {
        // The last of them may still be on their way out.
        eventually("nobody is left to be killed", || {
            let done = case.cmd(&["kill", &case.id, "KILL"]);
            done.code != 0 && done.err.contains("container not running")
        });
    }
    remove(case);
}

#[test]
fn an_exec_has_its_flags() {
    if !skiff_test_support::has_controllers(&["memory"]) {
        return;
    }
    let case = sleeping();
    let out = case.cmd(&["exec", "--no-new-privs", &case.id, "grep", "NoNewPrivs", "/proc/self/status"]).ok().out;
    assert_eq!(out, "NoNewPrivs:\t1\n");
    if is_skiff() && !Path::new("/sys/kernel/security/apparmor").exists() {
        let done = case.cmd(&["exec", "--apparmor", "some-profile", &case.id, "true"]);
        assert!(
            done.code == 255 && done.err.contains("process.apparmorProfile: apply \\\"some-profile\\\""),
            "{done:?}"
        );
        let done = case.cmd(&["exec", "--process-label", "a:b:c", &case.id, "true"]);
        assert!(done.code == 255 && done.err.contains("process.selinuxLabel: set \\\"a:b:c\\\""), "{done:?}");
    }
    let done = case.cmd(&["exec", &case.id]);
    assert_ne!(done.code, 0);
    let done = case.cmd(&["exec", "--process", "/no/such/process.json", &case.id]);
    assert!(done.code != 0 && done.err.contains("/no/such/process.json"), "{done:?}");
    case.cmd(&["pause", &case.id]).ok();
    let done = case.cmd(&["exec", &case.id, "true"]);
    assert!(
        done.code == 255 && done.err.contains("cannot exec in a paused container (use --ignore-paused to override)"),
        "{done:?}"
    );
    // It waits with the others until they go on.
    let mut ignoring = case.command(&["exec", "--ignore-paused", &case.id, "echo", "went on"]);
    let child = ignoring.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    case.cmd(&["resume", &case.id]).ok();
    assert_eq!(String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout), "went on\n");
    remove(case);
}
