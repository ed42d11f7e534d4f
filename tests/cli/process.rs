//! `process`: what its fields make of the program that runs.

use serde_json::{Value, json};
use skiff_test_support::receive_console;

use super::{Case, is_skiff, refused, seen, since};

/// Runs a command of busybox as the container's only process.
fn alone(args: &[&str], change: impl FnOnce(&mut Value)) -> String {
    let case = Case::new(args).with(change);
    let out = case.run().ok().out;
    case.end();
    out
}

/// On cgroup v1 a group may need a budget for real-time processes.
fn real_time(spec: &mut Value) {
    if std::path::Path::new("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists() {
        spec["linux"]["resources"]["cpu"] = json!({"realtimePeriod": 1_000_000, "realtimeRuntime": 10_000});
    }
}

#[test]
fn every_scheduler_has_its_policy() {
    if !since(2) {
        return;
    }
    // Nice value, real-time priority and policy of proc_pid_stat(5).
    let stat = |fields| ["busybox", "cut", "-d", " ", "-f", fields, "/proc/self/stat"];
    let ms = 1_000_000;
    for (scheduler, fields, want) in [
        (json!({"policy": "SCHED_OTHER", "nice": 5}), "19,40,41", "5 0 0"),
        (json!({"policy": "SCHED_BATCH", "nice": 3}), "19,40,41", "3 0 3"),
        (json!({"policy": "SCHED_IDLE"}), "40,41", "0 5"),
        (json!({"policy": "SCHED_FIFO", "priority": 10}), "40,41", "10 1"),
        (json!({"policy": "SCHED_RR", "priority": 20}), "40,41", "20 2"),
        (json!({"policy": "SCHED_RR", "priority": 20, "nice": 30}), "40,41", "20 2"),
        (json!({"policy": "SCHED_IDLE", "nice": 7}), "40,41", "0 5"),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 5 * ms, "deadline": 10 * ms, "period": 20 * ms}),
            "40,41",
            "0 6",
        ),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 5 * ms, "deadline": 10 * ms, "period": 20 * ms,
                "flags": ["SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]}),
            "40,41",
            "0 6",
        ),
    ] {
        let out = alone(&stat(fields), |spec| {
            real_time(spec);
            spec["process"]["scheduler"] = scheduler.clone();
        });
        assert_eq!(out.trim(), want, "{scheduler}");
    }
}

#[test]
fn a_policy_that_children_do_not_inherit() {
    if !since(2) {
        return;
    }
    let script = "busybox cut -d ' ' -f 41 /proc/$$/stat; busybox cut -d ' ' -f 41 /proc/self/stat; true";
    // The clone happens by the container's own rights: a child without the flag inherits.
    for (flags, want) in [(json!([]), "1\n1\n"), (json!(["SCHED_FLAG_RESET_ON_FORK"]), "1\n0\n")] {
        let out = seen(script, |spec| {
            real_time(spec);
            spec["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 1, "flags": flags});
        });
        assert_eq!(out, want);
    }
}

#[test]
fn schedulers_that_make_no_sense_are_refused() {
    if !is_skiff() {
        return;
    }
    for (scheduler, want) in [
        (json!({"policy": "SCHED_MOON"}), "process.scheduler.policy: "),
        (json!({"policy": "SCHED_OTHER", "nice": 20}), "process.scheduler.nice: "),
        (json!({"policy": "SCHED_OTHER", "priority": 1}), "process.scheduler.priority: "),
        (json!({"policy": "SCHED_FIFO", "priority": -1}), "process.scheduler.priority: "),
        (json!({"policy": "SCHED_FIFO", "priority": 100}), "process.scheduler: set: invalid argument (EINVAL)"),
        (json!({"policy": "SCHED_BATCH", "period": 5}), "process.scheduler.runtime: "),
        (json!({"policy": "SCHED_DEADLINE", "runtime": 5}), "process.scheduler: set: invalid argument (EINVAL)"),
        (json!({"policy": "SCHED_OTHER", "flags": ["MOON"]}), "process.scheduler.flags[0]: "),
        // In the spec, but in no kernel.
        (json!({"policy": "SCHED_ISO"}), "process.scheduler: set: invalid argument (EINVAL)"),
    ] {
        let err = refused(|spec| {
            real_time(spec);
            spec["process"]["scheduler"] = scheduler.clone();
        });
        assert!(err.contains(want), "{scheduler}: {err}");
    }
}

#[test]
fn every_io_priority_class_is_set() {
    if !since(2) {
        return;
    }
    for (class, priority, want) in
        [("RT", 4, "realtime: prio 4"), ("BE", 2, "best-effort: prio 2"), ("IDLE", 0, "idle")]
    {
        let out = seen("busybox ionice -p $$", |spec| {
            spec["process"]["ioPriority"] = json!({"class": format!("IOPRIO_CLASS_{class}"), "priority": priority});
        });
        assert_eq!(out.trim(), want);
    }
    if is_skiff() {
        let err = refused(|spec| spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 8}));
        assert!(err.contains("process.ioPriority.priority: 8 "), "{err}");
        let err = refused(|spec| spec["process"]["ioPriority"] = json!({"class": "MOON", "priority": 1}));
        assert!(err.contains("process.ioPriority.class: "), "{err}");
    }
}

#[test]
fn every_limit_is_set() {
    // The name in the spec, that of /proc/self/limits, and a value that the host lets everybody have.
    const LIMITS: [(&str, &str, u64); 16] = [
        ("AS", "Max address space", 1 << 40),
        ("CORE", "Max core file size", 4096),
        ("CPU", "Max cpu time", 1000),
        ("DATA", "Max data size", 1 << 36),
        ("FSIZE", "Max file size", 1 << 30),
        ("LOCKS", "Max file locks", 77),
        ("MEMLOCK", "Max locked memory", 4096),
        ("MSGQUEUE", "Max msgqueue size", 8192),
        ("NICE", "Max nice priority", 0),
        ("NOFILE", "Max open files", 99),
        ("NPROC", "Max processes", 555),
        ("RSS", "Max resident set", 1 << 30),
        ("RTPRIO", "Max realtime priority", 0),
        ("RTTIME", "Max realtime timeout", 100_000),
        ("SIGPENDING", "Max pending signals", 66),
        ("STACK", "Max stack size", 1 << 22),
    ];
    let out = alone(&["cat", "/proc/self/limits"], |spec| {
        let limit = |(name, _, value): &(&str, &str, u64)| json!({"type": format!("RLIMIT_{name}"), "soft": value, "hard": value});
        spec["process"]["rlimits"] = LIMITS.iter().map(limit).collect();
    });
    for (name, label, value) in LIMITS {
        let line = out.lines().find(|line| line.starts_with(label)).unwrap();
        let fields: Vec<&str> = line[label.len()..].split_whitespace().collect();
        assert_eq!(fields[..2], [value.to_string(), value.to_string()], "{name}");
    }
    let err = refused(|spec| spec["process"]["rlimits"] = json!([{"type": "RLIMIT_MOON", "soft": 1, "hard": 1}]));
    assert!(!is_skiff() || err.contains("process.rlimits[0].type: unknown variant `RLIMIT_MOON`"), "{err}");
    let err = refused(|spec| spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}]));
    assert!(!is_skiff() || err.contains("process.rlimits[0]: set limit RLIMIT_NOFILE to 9:8: "), "{err}");
}

#[test]
fn what_is_not_set_is_the_callers() {
    let own = |file: &str| std::fs::read_to_string(file).unwrap();
    assert_eq!(seen("cat /proc/self/oom_score_adj", |_| {}), own("/proc/self/oom_score_adj"));
    let limits = |text: &str| {
        let of = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_string();
        ["Max locked memory", "Max stack size", "Max core file size"].map(of)
    };
    assert_eq!(limits(&alone(&["cat", "/proc/self/limits"], |_| {})), limits(&own("/proc/self/limits")));
    assert_eq!(seen("umask", |_| {}), "0022\n");
}

#[test]
fn a_terminal_has_its_size_and_owner() {
    let case = Case::sh("stty size; stat -c '%u %g %a' /dev/pts/0; sleep 100").with(|spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"height": 11, "width": 97});
        spec["process"]["user"] = json!({"uid": 7, "gid": 8});
    });
    let socket = case.bundle.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    case.detached(&["run", "-d", "--console-socket", socket.to_str().unwrap(), &case.id]).ok();
    let (_, mut master) = receive_console(&listener);
    let mut text = String::new();
    while !text.contains("620") {
        let mut buffer = [0; 64];
        let n = std::io::Read::read(&mut master, &mut buffer).unwrap();
        text += &String::from_utf8_lossy(&buffer[..n]);
    }
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["11", "97", "7", "5", "620"]);
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
    // Without a terminal the size says nothing.
    assert_eq!(seen("echo ok", |spec| spec["process"]["consoleSize"] = json!({"height": 1, "width": 2})), "ok\n");
}

#[test]
fn users_that_a_user_namespace_has_not_are_refused() {
    for (field, id, want) in
        [("uid", 70_000, "cannot setuid to unmapped uid 70000"), ("gid", 80_000, "cannot setgid to unmapped gid 80000")]
    {
        let case = Case::new(&["true"]);
        crate::inside::open_to_all(case.bundle.path());
        let case = case.with(|spec| {
            skiff_test_support::add_user_namespace(spec);
            spec["process"]["user"][field] = json!(id);
        });
        let err = case.run().failed().err;
        assert!(!is_skiff() || err.contains(&format!("process.user.{field}: {want} in user namespace")), "{err}");
        case.end();
    }
}

#[test]
fn what_is_for_other_systems_or_unknown_is_passed_over() {
    let out = seen("echo fine", |spec| {
        spec["process"]["commandLine"] = json!("not for Linux");
        spec["process"]["user"]["username"] = json!("not for Linux");
        spec["windows"] = json!({"layerFolders": ["x"]});
        spec["solaris"] = json!({"milestone": "x"});
        spec["vm"] = json!({"kernel": {"path": "/x"}});
        spec["unheardOf"] = json!({"deep": [1, {"er": null}]});
        spec["linux"]["unheardOf"] = json!(1);
        spec["annotations"] = json!({"unheard.of": "", "other": "x"});
    });
    assert_eq!(out, "fine\n");
}

#[test]
fn labels_of_modules_that_are_not_there_are_named() {
    if !is_skiff() || std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        return;
    }
    let err = refused(|spec| spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0"));
    assert!(err.contains("process.selinuxLabel: ") && err.contains("SELinux is not enabled"), "{err}");
    let err = refused(|spec| spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0"));
    assert!(err.contains("linux.mountLabel: ") && err.contains("SELinux is not enabled"), "{err}");
    if !std::path::Path::new("/sys/kernel/security/apparmor").exists() {
        let err = refused(|spec| spec["process"]["apparmorProfile"] = json!("some-profile"));
        let named = err.contains("process.apparmorProfile: ") && err.contains("some-profile");
        assert!(named && err.contains("AppArmor is not enabled"), "{err}");
    }
}

#[test]
fn every_memory_policy_is_set() {
    if !since(4) {
        return;
    }
    for (policy, want) in [
        (json!({"mode": "MPOL_DEFAULT", "nodes": ""}), "default"),
        (json!({"mode": "MPOL_PREFERRED", "nodes": "0"}), "prefer:0"),
        (json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_RELATIVE_NODES"]}), "bind=relative:0"),
        (json!({"mode": "MPOL_INTERLEAVE", "nodes": "0-0"}), "interleave:0"),
        (json!({"mode": "MPOL_WEIGHTED_INTERLEAVE", "nodes": "0"}), "weighted interleave:0"),
        (json!({"mode": "MPOL_PREFERRED_MANY", "nodes": "0"}), "prefer (many):0"),
        (json!({"mode": "MPOL_LOCAL"}), "local"),
    ] {
        let out = seen("head -n 1 /proc/self/numa_maps", |spec| spec["linux"]["memoryPolicy"] = policy.clone());
        assert_eq!(out.split_once(' ').map(|(_, rest)| rest.starts_with(want)), Some(true), "{policy}: {out}");
    }
    let err = refused(|spec| spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_MOON", "nodes": "0"}));
    assert!(!is_skiff() || err.contains("linux.memoryPolicy.mode: "), "{err}");
    let err =
        refused(|spec| spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["X"]}));
    assert!(!is_skiff() || err.contains("linux.memoryPolicy.flags[0]: "), "{err}");
}

#[test]
fn a_user_with_the_right_to_it_runs_what_is_roots_alone() {
    let case = Case::new(&["/own/busybox", "id", "-u"]);
    let dir = case.bundle.rootfs().join("own");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(case.bundle.rootfs().join("bin/busybox"), dir.join("busybox")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    let case = case.with(|spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let caps = json!(["CAP_DAC_OVERRIDE"]);
        spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    assert_eq!(case.run().ok().out, "1000\n");
    case.end();
}
