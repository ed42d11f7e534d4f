//! What a container sees of its spec.

use serde_json::json;
use skiff_test_support::{add_user_namespace, eventually};

use super::{Case, is_skiff, seen};

#[test]
fn namespaces_are_its_own() {
    let out =
        seen("for n in mnt pid net ipc uts; do readlink /proc/self/ns/$n; done; hostname; ls -d /proc/[0-9]*", |_| {});
    for (line, ns) in out.lines().zip(["mnt", "pid", "net", "ipc", "uts"]) {
        assert_ne!(line, std::fs::read_link(format!("/proc/self/ns/{ns}")).unwrap().to_str().unwrap());
    }
    assert_eq!(out.lines().nth(5), Some("box"));
    assert!(out.lines().count() <= 8, "only its own processes: {out}");
}

#[test]
fn a_namespace_is_joined_by_path() {
    let out = seen("readlink /proc/self/ns/net", |spec| {
        for ns in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            if ns["type"] == "network" {
                ns["path"] = json!(format!("/proc/{}/ns/net", std::process::id()));
            }
        }
    });
    assert_eq!(out.trim(), std::fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap());
}

#[test]
fn the_loopback_interface_is_up() {
    assert!(seen("ip addr show lo", |_| {}).contains("127.0.0.1/8"));
}

#[test]
fn user_groups_and_umask_are_set() {
    let out = seen("id -u; id -g; id -G; umask", |spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 63});
    });
    assert_eq!(out, "1000\n1001\n1001 7 8\n0077\n");
}

#[test]
fn home_comes_from_passwd_and_env_from_the_spec() {
    let out = seen("echo $HOME $A", |spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["env"] = json!(["PATH=/bin", "A=b"]);
    });
    assert_eq!(out, "/home/user b\n");
}

#[test]
fn capabilities_are_exact() {
    let out = seen("grep -E 'Cap|NoNewPrivs' /proc/self/status", |spec| {
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"], "effective": ["CAP_CHOWN"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    });
    let set = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    assert_eq!(set("CapBnd"), 1 | 1 << 5 | 1 << 13);
    // Across execve a user keeps what is ambient (capabilities(7)).
    assert_eq!((set("CapAmb"), set("CapPrm"), set("CapEff"), set("CapInh")), (1 << 5, 1 << 5, 1 << 5, 1 << 5));
    assert!(out.contains("NoNewPrivs:\t1"));
}

#[test]
fn limits_and_oom_score_are_set() {
    let out = seen("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj", |spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
        spec["process"]["oomScoreAdj"] = json!(500);
    });
    assert_eq!(out, "100\n200\n500\n");
}

#[test]
fn devices_and_links_are_there() {
    let script = "cd /dev; for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' $d; done; \
                  for l in fd stdin ptmx; do readlink $l; done; echo x >null; head -c1 zero | wc -c; stat -c '%n %t:%T %a %u:%g' fuse";
    let out = seen(script, |spec| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 432, "uid": 3, "gid": 4}]);
    });
    for want in [
        "null 1:3 666",
        "zero 1:5 666",
        "full 1:7 666",
        "random 1:8 666",
        "urandom 1:9 666",
        "tty 5:0 666",
        "/proc/self/fd",
        "/proc/self/fd/0",
        "pts/ptmx",
        "fuse a:e5 660 3:4",
    ] {
        assert!(out.lines().any(|line| line == want), "{want} in {out}");
    }
}

#[test]
fn a_default_device_may_be_another() {
    let out = seen("stat -c '%n %t:%T %a %u:%g' /dev/full /dev/tty /dev/zero", |spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/dev/full", "type": "c", "major": 1, "minor": 3},
            {"path": "/dev/tty", "type": "c", "major": 5, "minor": 0, "fileMode": 400, "uid": 0, "gid": 5},
        ]);
    });
    assert_eq!(out, "/dev/full 1:3 666 0:0\n/dev/tty 5:0 620 0:5\n/dev/zero 1:5 666 0:0\n");
}

#[test]
fn denied_devices_cannot_be_opened() {
    let out = seen("mknod /dev/kmsg-too c 1 11; head -c1 /dev/kmsg-too >/dev/null 2>&1 || echo denied", |spec| {
        let caps = json!(["CAP_MKNOD", "CAP_SYSLOG"]);
        spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    assert_eq!(out, "denied\n");
}

#[test]
fn mounts_have_their_options() {
    let case = Case::sh("cat /proc/self/mountinfo; touch /ro/x 2>&1; touch /rw/y; cat /file");
    let (dir, file) = (case.bundle.path().join("dir"), case.bundle.path().join("file"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(&file, "content\n").unwrap();
    let case = case.with(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/ro", "type": "bind", "source": dir, "options": ["rbind", "ro", "nosuid"]}));
        mounts.push(json!({"destination": "/rw", "type": "bind", "source": "dir", "options": ["bind"]}));
        mounts.push(json!({"destination": "/file", "type": "bind", "source": file, "options": ["bind", "ro"]}));
        mounts.push(
            json!({"destination": "/tmp/a/b", "type": "tmpfs", "source": "x", "options": ["noexec", "size=64k"]}),
        );
        spec["root"]["readonly"] = json!(false);
    });
    let done = case.run().ok();
    let options = |at: &str| {
        let line = done.out.lines().find(|line| line.split(' ').nth(4) == Some(at)).expect("a mount");
        line.split(' ').nth(5).unwrap().split(',').map(str::to_string).collect::<Vec<_>>()
    };
    assert!(["ro", "nosuid"].iter().all(|o| options("/ro").iter().any(|got| got == o)));
    assert!(options("/rw").iter().any(|o| o == "rw"));
    assert!(options("/tmp/a/b").iter().any(|o| o == "noexec"));
    assert!(done.out.contains("Read-only file system") && done.out.ends_with("content\n"), "{}", done.out);
    assert!(dir.join("y").exists() && !dir.join("x").exists());
    case.end();
}

#[test]
fn the_root_is_read_only_when_it_says_so() {
    assert_eq!(seen("touch /x 2>/dev/null || echo ro", |_| {}), "ro\n");
    assert_eq!(seen("touch /x && echo rw", |spec| spec["root"]["readonly"] = json!(false)), "rw\n");
}

#[test]
fn masked_and_read_only_paths_are() {
    let script = "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; (echo 1 >/proc/sys/vm/swappiness) 2>&1 | tail -n 1";
    let out = seen(script, |_| {});
    assert!(out.starts_with("0\n0\n") && out.contains("Read-only file system"), "{out}");
}

#[test]
fn sysctls_are_written() {
    let out = seen("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax", |spec| {
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "4096"});
    });
    assert_eq!(out, "1\n4096\n");
}

#[test]
fn seccomp_denies() {
    for no_new_privileges in [true, false] {
        let out = seen("mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status", |spec| {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]});
        });
        assert!(out.contains("Operation not permitted") && out.contains("Seccomp:\t2"), "{out}");
    }
}

#[test]
fn a_working_directory_is_made() {
    let out = seen("pwd; stat -c %u .", |spec| {
        spec["process"]["cwd"] = json!("/made/for/it");
        spec["root"]["readonly"] = json!(false);
    });
    assert_eq!(out, "/made/for/it\n0\n");
}

#[test]
fn a_user_namespace_has_its_maps() {
    let case = Case::sh(
        "id -u; cat /proc/self/uid_map; echo x >/dev/null; cat /data/f; touch /tmp/mine; stat -c %u /tmp/mine",
    );
    let data = case.bundle.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("f"), "shared\n").unwrap();
    open_to_all(case.bundle.path());
    let case = case.with(|spec| {
        add_user_namespace(spec);
        spec["linux"].as_object_mut().unwrap().remove("resources");
        spec["root"]["readonly"] = json!(false);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
        mounts.push(json!({"destination": "/data", "type": "bind", "source": "data", "options": ["bind", "ro"]}));
    });
    let out = case.run().ok().out;
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines, [vec!["0"], vec!["0", "100000", "65536"], vec!["shared"], vec!["0"]]);
    case.end();
}

/// All rights in a user namespace come with it, not with an id.
#[test]
fn a_user_namespace_need_not_have_a_root() {
    if !is_skiff() {
        // runc wants a root in it.
        return;
    }
    let script = "id -u; id -g; cat /proc/self/uid_map; echo x >/dev/null; touch /tmp/mine; stat -c %u:%g /tmp/mine";
    let case = Case::new(&["sh", "-c", &format!("{script}; exec sleep 100")]);
    open_to_all(case.bundle.path());
    let case = case.with(|spec| {
        let map = json!([{"containerID": 1000, "hostID": 100_000, "size": 1}]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["linux"].as_object_mut().unwrap().remove("resources");
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let mounts = spec["mounts"].as_array_mut().unwrap();
        // The group of terminals, 5, has no id here.
        mounts.iter_mut().filter(|mount| mount["destination"] == "/dev/pts").for_each(|mount| {
            mount["options"] = json!(["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]);
        });
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let log = case.bundle.path().join("out");
    let lines = || std::fs::read_to_string(&log).unwrap_or_default();
    eventually("it has said all", || lines().contains("1000:1000"));
    let lines: Vec<_> = lines().split_whitespace().map(str::to_string).collect();
    assert_eq!(lines, ["1000", "1000", "1000", "100000", "1", "1000:1000"]);
    assert_eq!(case.cmd(&["exec", &case.id, "id", "-u"]).ok().out.trim(), "1000");
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

/// The ids of a user namespace must get through to the bundle.
pub fn open_to_all(bundle: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(bundle, std::fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["dev", "proc", "sys", "tmp", "."] {
        let path = bundle.join("rootfs").join(name);
        std::os::unix::fs::chown(&path, Some(100_000), Some(100_000)).unwrap();
    }
}

#[test]
fn cgroup_limits_are_the_hosts_files() {
    if !skiff_test_support::has_controllers(&["memory", "cpu", "pids"]) {
        return;
    }
    let case = Case::new(&["sleep", "100"]).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 67_108_864});
        spec["linux"]["resources"]["pids"] = json!({"limit": 77});
        spec["linux"]["resources"]["cpu"] = json!({"shares": 512, "quota": 20000, "period": 50000});
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let pid = case.state()["pid"].to_string();
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let read = |controller: &str, file: &str| {
        let line = groups.lines().find(|line| line.split(':').nth(1).unwrap().split(',').any(|c| c == controller));
        let path = line.map(|line| line.split(':').nth(2).unwrap().trim_start_matches('/'));
        path.map(|path| {
            let dir = std::path::Path::new("/sys/fs/cgroup").join(controller).join(path);
            std::fs::read_to_string(dir.join(file)).unwrap().trim().to_string()
        })
    };
    if std::path::Path::new("/sys/fs/cgroup/memory").exists() {
        assert_eq!(read("memory", "memory.limit_in_bytes").as_deref(), Some("67108864"));
        assert_eq!(read("pids", "pids.max").as_deref(), Some("77"));
        assert_eq!(read("cpu", "cpu.shares").as_deref(), Some("512"));
        assert_eq!(read("cpu", "cpu.cfs_quota_us").as_deref(), Some("20000"));
        assert_eq!(read("cpu", "cpu.cfs_period_us").as_deref(), Some("50000"));
    } else {
        assert_eq!(read("", "memory.max").as_deref(), Some("67108864"));
        assert_eq!(read("", "pids.max").as_deref(), Some("77"));
        assert_eq!(read("", "cpu.max").as_deref(), Some("20000 50000"));
    }
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn only_the_standard_streams_and_what_was_preserved_are_open() {
    let out = seen("ls /proc/$$/fd", |_| {});
    let fds: Vec<&str> = out.split_whitespace().collect();
    // ash keeps a copy of its own at 10 when it has a script on a descriptor.
    assert!(fds.starts_with(&["0", "1"]) && fds.contains(&"2") && fds.len() <= 4, "{out}");
}
