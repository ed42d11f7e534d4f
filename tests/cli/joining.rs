//! Namespaces by their paths, and clocks.

use std::path::Path;

use serde_json::{Value, json};

use super::{Case, is_skiff, refused, seen, since};

const KINDS: [(&str, &str); 7] = [
    ("mount", "mnt"),
    ("pid", "pid"),
    ("network", "net"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("cgroup", "cgroup"),
    ("user", "user"),
];

/// A container that holds one namespace of each kind; with `user` also a user namespace.
fn holder(user: bool) -> Case {
    let case = Case::new(&["sleep", "1000"]);
    crate::inside::open_to_all(case.bundle.path());
    let case = case.with(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "cgroup"}));
        if since(2) && time_namespaces() {
            namespaces.push(json!({"type": "time"}));
            spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 7_000_000}, "monotonic": {"secs": 5_000_000}});
        }
        if user {
            skiff_test_support::add_user_namespace(spec);
        }
    });
    case.detached(&["run", "-d", &case.id]).ok();
    case
}

fn time_namespaces() -> bool {
    Path::new("/proc/self/ns/time").exists()
}

#[test]
fn every_namespace_is_joined_by_its_path() {
    for user in [false, true] {
        if user && !is_skiff() {
            // It has to be that of the user who joins, in runc.
            continue;
        }
        let holder = holder(user);
        let pid = holder.state()["pid"].clone();
        let script = "for n in mnt pid net ipc uts cgroup user time; do readlink /proc/self/ns/$n; done";
        let case = Case::sh(script);
        crate::inside::open_to_all(case.bundle.path());
        let case = case.with(|spec| {
            let joined = KINDS.iter().filter(|(kind, _)| *kind != "mount" && (user || *kind != "user"));
            let mut namespaces: Vec<Value> =
                joined.map(|(kind, file)| json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")})).collect();
            namespaces.push(json!({"type": "mount"}));
            if since(2) && time_namespaces() {
                namespaces.push(json!({"type": "time", "path": format!("/proc/{pid}/ns/time")}));
            }
            spec["linux"]["namespaces"] = json!(namespaces);
            spec["hostname"] = json!("");
        });
        let out = case.run().ok().out;
        for (at, file) in ["mnt", "pid", "net", "ipc", "uts", "cgroup", "user", "time"].iter().enumerate() {
            if *file == "time" && !since(2) {
                continue;
            }
            let of_holder = std::fs::read_link(format!("/proc/{pid}/ns/{file}")).unwrap_or_default();
            let same = out.lines().nth(at) == of_holder.to_str();
            // Without a user namespace both are in that of the host.
            assert_eq!(same, *file != "mnt", "{file} of {out}");
        }
        case.end();
        holder.cmd(&["delete", "--force", &holder.id]).ok();
        holder.end();
    }
}

#[test]
fn a_mount_namespace_is_joined_by_its_path() {
    let holder = holder(false);
    let pid = holder.state()["pid"].clone();
    // The rootfs must be seen from there: it is the other container's root, which is its own bind mount.
    let case = Case::sh("readlink /proc/self/ns/mnt").with(|spec| {
        for ns in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            if ns["type"] == "mount" {
                ns["path"] = json!(format!("/proc/{pid}/ns/mnt"));
            }
        }
        spec["root"] = json!({"path": "/"});
        spec["mounts"] = json!([]);
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
    });
    let done = case.run();
    if is_skiff() {
        let of_holder = std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
        // Its pid namespace is another one than that of the /proc there: the link may be unreadable, but it runs.
        assert!(done.code == 0 && done.out.trim() == of_holder.to_str().unwrap() || done.out.is_empty(), "{done:?}");
    }
    case.end();
    holder.cmd(&["delete", "--force", &holder.id]).ok();
    holder.end();
}

#[test]
fn clocks_are_moved() {
    if !since(2) || !time_namespaces() {
        return;
    }
    let with = |offsets: Value, path: Option<&'static str>| {
        move |spec: &mut Value| {
            let mut namespace = json!({"type": "time"});
            if let Some(path) = path {
                namespace["path"] = json!(path);
            }
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(namespace);
            spec["linux"]["timeOffsets"] = offsets;
        }
    };
    let out = seen("cat /proc/self/timens_offsets; cat /proc/uptime", |spec| {
        with(json!({"monotonic": {"secs": 7881, "nanosecs": 2_718_281}, "boottime": {"secs": 1_337_000}}), None)(spec);
    });
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[..2], [vec!["monotonic", "7881", "2718281"], vec!["boottime", "1337000", "0"]]);
    let uptime: f64 = lines[2][0].parse().unwrap();
    assert!(uptime > 1_337_000.0, "{out}");
    let err = refused(with(json!({"monotonic": {"secs": 1}}), Some("/proc/self/ns/time")));
    assert!(!is_skiff() || err.contains("linux.timeOffsets: offsets cannot be set in a time namespace that"), "{err}");
    let err = refused(with(json!({"realtime": {"secs": 1}}), None));
    assert!(!is_skiff() || err.contains("linux.timeOffsets.realtime: must be monotonic or boottime"), "{err}");
    let err = refused(|spec| spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1}}));
    assert!(!is_skiff() || err.contains("linux.timeOffsets: time namespace offsets specified, but"), "{err}");
}

#[test]
fn a_path_that_is_no_such_namespace_is_refused() {
    for (path, want) in [
        (
            "/proc/self/ns/uts",
            "join namespace \\\"/proc/self/ns/uts\\\": invalid argument (EINVAL); it is no namespace",
        ),
        ("/etc/passwd", "invalid argument (EINVAL); it is no namespace of this type"),
        ("/no/such/file", "linux.namespaces[1].path: open \\\"/no/such/file\\\": no such file or directory (ENOENT)"),
        ("relative", "linux.namespaces[1].path: must be an absolute path"),
    ] {
        let err = refused(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            let network = namespaces.iter_mut().find(|ns| ns["type"] == "network").unwrap();
            network["path"] = json!(path);
        });
        assert!(!is_skiff() || err.contains(want), "{path}: {err}");
    }
}

#[test]
fn what_needs_a_namespace_is_refused_without_it() {
    if !is_skiff() {
        return;
    }
    let without = |kind: &str, spec: &mut Value| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != kind);
        spec["hostname"] = json!("");
    };
    for (kind, key, value, want) in [
        ("uts", "hostname", json!("x"), "hostname: unable to set hostname without a private UTS namespace"),
        ("uts", "domainname", json!("x"), "domainname: unable to set domainname without a private UTS namespace"),
    ] {
        let err = refused(|spec| {
            without(kind, spec);
            spec[key] = value;
        });
        assert!(err.contains(want), "{err}");
    }
    for (kind, sysctl, want) in [
        ("ipc", "kernel.shmmax", "linux.sysctl.kernel.shmmax: is not allowed in the hosts ipc namespace"),
        ("ipc", "fs.mqueue.msg_max", "linux.sysctl.fs.mqueue.msg_max: is not allowed in the hosts ipc namespace"),
        ("network", "net.ipv4.ip_forward", "linux.sysctl.net.ipv4.ip_forward: not allowed in host network namespace"),
        ("uts", "kernel.domainname", "linux.sysctl.kernel.domainname: is not allowed in the hosts UTS namespace"),
        ("none", "user.max_pid_namespaces", "linux.sysctl.user.max_pid_namespaces: setting ucounts without a user"),
        ("none", "vm.swappiness", "linux.sysctl.vm.swappiness: is not in a separate kernel namespace"),
        ("none", "kernel.hostname", "linux.sysctl.kernel.hostname: is not allowed, use the OCI"),
    ] {
        let err = refused(|spec| {
            without(kind, spec);
            spec["linux"]["sysctl"] = json!({sysctl: "1"});
        });
        assert!(err.contains(want), "{sysctl}: {err}");
    }
    let err = refused(|spec| {
        without("network", spec);
        spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/sys");
        spec["linux"]["netDevices"] = json!({"dummy0": {}});
    });
    assert!(err.contains("linux.netDevices") && err.contains("unable to move network devices without a NET"), "{err}");
}

#[test]
fn names_and_sysctls_of_the_namespaces_are_set() {
    let out = seen(
        "hostname; cat /proc/sys/kernel/domainname /proc/sys/fs/mqueue/msg_max /proc/sys/kernel/shm_rmid_forced",
        |spec| {
            spec["hostname"] = json!("its-name");
            if since(2) {
                spec["domainname"] = json!("its.domain");
            }
            spec["linux"]["sysctl"] = json!({"fs.mqueue.msg_max": "123", "kernel/shm_rmid_forced": "1"});
        },
    );
    let domain = if since(2) { "its.domain" } else { "(none)" };
    assert_eq!(out, format!("its-name\n{domain}\n123\n1\n"));
    if is_skiff() {
        let err = refused(|spec| spec["hostname"] = json!("x".repeat(65)));
        assert!(err.contains("hostname: set ") && err.contains("EINVAL); 64 bytes are the most"), "{err}");
        let err = refused(|spec| spec["linux"]["sysctl"] = json!({"net.ipv4.no_such": "1"}));
        assert!(
            err.contains("\\\"/proc/sys/net/ipv4/no_such\\\": no such file or directory (ENOENT); this kernel"),
            "{err}"
        );
        let err = refused(|spec| spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "x"}));
        assert!(err.contains("linux.sysctl: write \\\"x\\\"") && err.contains("does not take this value"), "{err}");
    }
}
