//! Fields of the runtime spec by their effect inside. runc 1.1 does not know those of spec 1.2 and later: it is not asked.

use std::process::Command;

use nix::mount::MsFlags;
use serde_json::json;
use skiff_test_support::{run, seccomp_agent};

use super::{Case, is_skiff, refused, seen};

#[test]
fn personality_is_set() {
    if is_skiff() {
        let out = seen("uname -m", |spec| spec["linux"]["personality"] = json!({"domain": "LINUX32"}));
        assert_ne!(out.trim(), "x86_64");
        let err = refused(|spec| spec["linux"]["personality"] = json!({"domain": "LINUX", "flags": ["X"]}));
        assert!(err.contains("linux.personality.flags: "), "{err}");
        let err = refused(|spec| spec["linux"]["personality"] = json!({"domain": "MOON"}));
        assert!(err.contains("linux.personality.domain: "), "{err}");
    }
}

#[test]
fn the_memory_policy_is_set() {
    if is_skiff() {
        let out = seen("head -n 1 /proc/self/numa_maps", |spec| {
            spec["linux"]["memoryPolicy"] =
                json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
        });
        assert!(out.contains(" bind=static:0 "), "{out}");
        let err = refused(|spec| spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "x"}));
        assert!(err.contains("linux.memoryPolicy.nodes: "), "{err}");
        let err = refused(|spec| spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "1000"}));
        assert!(err.contains("linux.memoryPolicy: set: "), "{err}");
    }
}

#[test]
fn an_exec_process_runs_where_its_affinity_says() {
    if !is_skiff() || std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return;
    }
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let process = |affinity: serde_json::Value| {
        let mut process = case.bundle.spec["process"].clone();
        process["args"] = json!(["grep", "Cpus_allowed_list", "/proc/self/status"]);
        process["execCPUAffinity"] = affinity;
        let path = case.bundle.path().join("process.json");
        std::fs::write(&path, process.to_string()).unwrap();
        case.cmd(&["exec", "-p", path.to_str().unwrap(), &case.id]).ok().out
    };
    assert!(process(json!({"initial": "0", "final": "1"})).ends_with(":\t1\n"));
    assert!(process(json!({})).contains("0-"));
    // The caller's own affinity is not the container's.
    let mut pinned = Command::new("taskset");
    pinned.args(["-c", "0"]).arg(&case.runtime).args([
        "exec",
        &case.id,
        "grep",
        "Cpus_allowed_list",
        "/proc/self/status",
    ]);
    assert!(run(&mut pinned, "").ok().out.contains("0-"));
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_tmpfs_takes_what_it_covers() {
    let out = seen("cat /etc/passwd | head -n 1; touch /etc/x && echo writable; stat -f -c %T /etc", |spec| {
        let mount =
            json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=755"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    assert_eq!(out, "root:x:0:0:root:/root:/bin/sh\nwritable\ntmpfs\n");
}

#[test]
fn ids_of_a_mount_are_mapped() {
    if !is_skiff() {
        return;
    }
    let case = Case::sh("stat -c %u:%g /data/f; touch /data/new; stat -c %u /data/new");
    let data = case.bundle.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("f"), "").unwrap();
    std::os::unix::fs::chown(data.join("f"), Some(7), Some(8)).unwrap();
    let map = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 65536}]);
    let case = case.with(|spec| {
        spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/data", "type": "bind", "source": "data",
            "options": ["rbind", "ridmap"], "uidMappings": map(1000), "gidMappings": map(2000)}));
    });
    // The container's root is 1000 below: it may not write there unless its own id is mapped, which 0 is not.
    let out = case.run().out;
    assert!(out.starts_with("1007:2008\n"), "{out}");
    case.end();
    let err = refused(|spec| {
        let mount = json!({"destination": "/data", "type": "bind", "source": "/tmp", "options": ["bind", "idmap"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    assert!(err.contains("mounts[7].options: idmap without mappings"), "{err}");
    let err = refused(|spec| {
        let mount = json!({"destination": "/data", "type": "bind", "source": "/proc", "options": ["bind"],
            "uidMappings": map(1), "gidMappings": map(1)});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    assert!(err.contains("does not support idmapped mounts"), "{err}");
}

#[test]
fn network_devices_move_in_with_their_addresses() {
    if !is_skiff() {
        return;
    }
    let ip = |line: &str| run(Command::new("ip").args(line.split(' ')), "");
    let (host, peer) = (format!("sk{}", std::process::id()), format!("sp{}", std::process::id()));
    ip(&format!("link add {host} type veth peer name {peer}")).ok();
    ip(&format!("addr add 192.0.2.7/24 dev {host}")).ok();
    let out = seen("ip addr show in0", |spec| {
        spec["linux"]["netDevices"] = json!({host.as_str(): {"name": "in0"}});
    });
    assert!(out.contains("192.0.2.7/24") && out.contains("UP"), "{out}");
    ip(&format!("link show {host}")).failed();
    let err = refused(|spec| spec["linux"]["netDevices"] = json!({"no-such-dev": {}}));
    assert!(err.contains("linux.netDevices: find ") && err.contains("ENODEV"), "{err}");
}

#[test]
fn an_agent_is_asked_about_calls() {
    if !is_skiff() {
        return;
    }
    for no_new_privileges in [true, false] {
        let case = Case::sh("mkdir /tmp/x 2>&1; echo done");
        let socket = case.bundle.path().join("agent.sock");
        let agent = seccomp_agent(&socket, 12);
        let case = case.with(|spec| {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["annotations"] = json!({"a": "b"});
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": socket,
                "listenerMetadata": "meta",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]});
        });
        let out = case.run().ok().out;
        assert!(out.contains("Cannot allocate memory") && out.ends_with("done\n"), "{out}");
        let told: serde_json::Value = serde_json::from_str(&agent.join().unwrap()).unwrap();
        assert_eq!((&told["fds"], &told["metadata"]), (&json!(["seccompFd"]), &json!("meta")));
        assert_eq!((&told["state"]["id"], &told["state"]["status"]), (&json!(case.id), &json!("creating")));
        assert_eq!((&told["state"]["annotations"]["a"], &told["state"]["pid"]), (&json!("b"), &told["pid"]));
        std::fs::remove_file(&socket).unwrap();
        let err = case.run().failed().err;
        assert!(err.contains("linux.seccomp.listenerPath: failed to connect "), "{err}");
        case.end();
    }
}

#[test]
fn without_a_mount_namespace_the_rootfs_is_only_the_root() {
    let case = Case::sh("readlink /proc/self/ns/mnt; ls /bin | head -n 1").with(|spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != "mount");
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["root"]["readonly"] = json!(false);
        spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] == "/proc");
    });
    let out = case.run().ok().out;
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    assert!(out.starts_with(own.to_str().unwrap()) && out.contains("busybox") | out.contains("cat"), "{out}");
    if !is_skiff() {
        // runc leaves its mounts behind.
        run(Command::new("umount").arg("-R").arg(case.bundle.rootfs()), "").ok();
    }
    case.end();
    if is_skiff() {
        let err = refused(|spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != "mount");
        });
        assert!(err.contains("unable to restrict sys entries without a private MNT namespace"), "{err}");
        let err = refused(|spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != "mount");
            let linux = spec["linux"].as_object_mut().unwrap();
            linux.remove("maskedPaths");
            linux.remove("readonlyPaths");
            spec["mounts"] = json!([{"destination": "/", "type": "tmpfs"}]);
        });
        assert!(err.contains("mounts[0].destination: is the root of a container without"), "{err}");
    }
}

#[test]
fn mounts_inside_the_rootfs_may_be_sources() {
    if !is_skiff() {
        return;
    }
    for (user_namespace, option) in [(false, "rbind"), (true, "rbind"), (false, "ridmap"), (true, "ridmap")] {
        let case = Case::sh("cat /copy/below/file");
        let rootfs = case.bundle.rootfs().display().to_string();
        for name in ["first", "below"] {
            std::fs::create_dir(case.bundle.path().join(name)).unwrap();
            std::fs::write(case.bundle.path().join(name).join("file"), name).unwrap();
        }
        std::fs::create_dir(case.bundle.path().join("first/below")).unwrap();
        if user_namespace {
            crate::inside::open_to_all(case.bundle.path());
        }
        let case = case.with(|spec| {
            let bind = |from: String, to: String| {
                json!({"destination": to, "type": "bind", "source": from,
                "options": ["rbind"]})
            };
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(bind("first".into(), "/seen".into()));
            mounts.push(bind("below".into(), format!("{rootfs}/seen/below")));
            let mut copy = bind(format!("{rootfs}/seen"), "/copy".into());
            if option == "ridmap" {
                let map = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
                copy["options"] = json!(["rbind", "ridmap"]);
                copy["uidMappings"] = map.clone();
                copy["gidMappings"] = map;
            }
            mounts.push(copy);
            if user_namespace {
                spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
                let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
                spec["linux"]["uidMappings"] = map.clone();
                spec["linux"]["gidMappings"] = map;
            }
        });
        assert_eq!(case.run().ok().out, "below", "user namespace {user_namespace}, {option}");
        case.end();
    }
}

#[test]
fn hooks_start_where_their_files_are() {
    let script = "test -d bin && touch from-create-container";
    let hook = |script: &str| json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    let out = seen("ls /from-create-container", |spec| spec["hooks"] = json!({"createContainer": hook(script)}));
    assert_eq!(out, "/from-create-container\n");
    // The container's own code is under the container's filter.
    let err = refused(|spec| {
        spec["process"]["noNewPrivileges"] = json!(true);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL"}]});
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
        spec["hooks"] = json!({"startContainer": hook("exec mkdir /tmp/made")});
    });
    assert!(err.contains("bad system call") && (!is_skiff() || err.contains("startContainer hook")), "{err}");
}

#[test]
fn what_go_reads_is_read() {
    let case = Case::new(&["true"]).with(|spec| {
        spec["process"].as_object_mut().unwrap().remove("user");
        spec["process"]["args"] = json!(["id", "-u"]);
        spec["process"]["scheduler"] =
            json!({"policy": "SCHED_BATCH", "nice": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
    });
    // runc knows the flag by this name since 1.2.
    if is_skiff() {
        assert_eq!(case.run().ok().out, "0\n");
    }
    case.end();
    let err = refused(|spec| {
        spec["linux"]["resources"] = json!({"hugepageLimits": [{"pagesize": "no-size", "limit": 1}]});
    });
    assert!(!is_skiff() || err.contains("hugepageLimits[0].pageSize: ") && err.contains("no-size"), "{err}");
}

#[test]
fn a_user_with_limits_and_no_capabilities_runs() {
    let out = seen("ulimit -n; id -u", |spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 124}]);
    });
    assert_eq!(out, "123\n1000\n");
}

#[test]
fn a_bind_mount_has_the_attributes_that_are_named() {
    let attributes = |source: &std::path::Path, options: serde_json::Value, user_namespace: bool| {
        let case = Case::sh("awk '$5 == \"/mnt\" {print $6}' /proc/self/mountinfo");
        if user_namespace {
            crate::inside::open_to_all(case.bundle.path());
        }
        let case = case.with(|spec| {
            let mount = json!({"destination": "/mnt", "type": "bind", "source": source, "options": options});
            spec["mounts"].as_array_mut().unwrap().push(mount);
            if user_namespace {
                skiff_test_support::add_user_namespace(spec);
            }
        });
        let done = case.run();
        case.end();
        (done.code, done.out.trim().to_string())
    };
    // runc has kept to this since 1.2.
    if !is_skiff() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("skiff-source-").tempdir().unwrap();
    let mount = |flags: MsFlags| {
        let none: Option<&str> = None;
        nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        nix::mount::mount(none, dir.path(), none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none).unwrap();
    };
    mount(MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME);
    let source = dir.path();
    assert_eq!(attributes(source, json!(["bind"]), false), (0, "ro,noexec,noatime".into()));
    assert_eq!(attributes(source, json!(["bind", "nodev"]), false), (0, "rw,nodev,noatime".into()));
    assert_eq!(attributes(source, json!(["bind", "relatime"]), false), (0, "rw,relatime".into()));
    // What the host forbids stays forbidden in a user namespace, and the contrary is refused.
    assert_eq!(attributes(source, json!(["bind", "nodev"]), true), (0, "ro,nodev,noexec,noatime".into()));
    assert_ne!(attributes(source, json!(["bind", "rw"]), true).0, 0);
    nix::mount::umount(source).unwrap();
}
