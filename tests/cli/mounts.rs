//! `mounts[].options`, propagation, cgroup mounts and devices, as the container's own tables show them.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use skiff_test_support::run;

use super::{Case, is_skiff, refused, seen, since};

/// The options of the mount at `at` in a mountinfo: its own, what it propagates, and the superblock's.
fn options(mountinfo: &str, at: &str) -> (Vec<String>, String, Vec<String>) {
    let line = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some(at));
    let line = line.unwrap_or_else(|| panic!("{at} in {mountinfo}"));
    let (mount, filesystem) = line.split_once(" - ").unwrap();
    let list = |text: &str| text.split(',').map(str::to_string).collect();
    let fields: Vec<&str> = mount.split(' ').collect();
    (list(fields[5]), fields[6..].join(" "), list(filesystem.rsplit(' ').next().unwrap()))
}

fn tmpfs(options: &[&str]) -> Value {
    json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": options})
}

fn add(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn every_option_of_a_new_file_system_has_its_effect() {
    // The option, what the mount then has, what it has not, and what its superblock has.
    type Words = &'static [&'static str];
    let cases: [(Words, Words, Words, Words); 22] = [
        (&["ro"], &["ro"], &["rw"], &[]),
        (&["ro", "rw"], &["rw"], &["ro"], &["rw"]),
        (&["nosuid"], &["nosuid"], &[], &[]),
        (&["nosuid", "suid"], &[], &["nosuid"], &[]),
        (&["nodev"], &["nodev"], &[], &[]),
        (&["nodev", "dev"], &[], &["nodev"], &[]),
        (&["noexec"], &["noexec"], &[], &[]),
        (&["noexec", "exec"], &[], &["noexec"], &[]),
        (&["noatime"], &["noatime"], &["relatime"], &[]),
        (&["relatime"], &["relatime"], &["noatime"], &[]),
        (&["strictatime"], &[], &["relatime", "noatime"], &[]),
        (&["atime"], &["relatime"], &["noatime"], &[]),
        (&["norelatime"], &["relatime"], &[], &[]),
        (&["nostrictatime"], &["relatime"], &[], &[]),
        (&["nodiratime"], &["nodiratime"], &[], &[]),
        (&["nodiratime", "diratime"], &[], &["nodiratime"], &[]),
        (&["sync"], &[], &[], &["sync"]),
        (&["dirsync"], &[], &[], &["dirsync"]),
        (&["sync", "async"], &[], &[], &[]),
        (&["lazytime"], &[], &[], &["lazytime"]),
        (&["nolazytime", "nomand", "noiversion", "iversion", "loud", "silent", "remount"], &["rw"], &[], &[]),
        (&["size=64k", "mode=711"], &["rw"], &[], &["size=64k", "mode=711"]),
    ];
    for (given, has, has_not, superblock) in cases {
        // With them runc changes more than the mount: it passes them on to mount(2) as they are.
        if !is_skiff() && given.contains(&"remount") {
            continue;
        }
        let out = seen("cat /proc/self/mountinfo", |spec| add(spec, tmpfs(given)));
        let (own, _, of_superblock) = options(&out, "/mnt");
        assert!(has.iter().all(|o| own.iter().any(|have| have == o)), "{given:?}: {own:?}");
        assert!(!has_not.iter().any(|o| own.iter().any(|have| have == o)), "{given:?}: {own:?}");
        assert!(!given.contains(&"async") || !of_superblock.contains(&"sync".to_string()), "{of_superblock:?}");
        assert!(superblock.iter().all(|o| of_superblock.iter().any(|have| have == o)), "{given:?}: {of_superblock:?}");
    }
    if since(2) {
        let out = seen("cat /proc/self/mountinfo", |spec| add(spec, tmpfs(&["nosymfollow"])));
        assert!(options(&out, "/mnt").0.contains(&"nosymfollow".to_string()), "{out}");
    }
    if is_skiff() {
        // fstab's word for nothing in particular, which runc hands to the file system.
        let out = seen("cat /proc/self/mountinfo", |spec| add(spec, tmpfs(&["defaults"])));
        assert_eq!(options(&out, "/mnt").0, ["rw", "relatime"]);
    }
}

#[test]
fn recursive_options_reach_what_is_below() {
    let dir = tempfile::Builder::new().prefix("skiff-tree-").tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let sub = dir.path().join("sub").display().to_string();
    for (given, has, has_not) in [
        (&["rbind", "rro"][..], "ro", "rw"),
        (&["rbind", "rro", "rrw"], "rw", "ro"),
        (&["rbind", "rnosuid"], "nosuid", "suid"),
        (&["rbind", "rnodev"], "nodev", "dev"),
        (&["rbind", "rnoexec"], "noexec", "exec"),
        (&["rbind", "rnodiratime"], "nodiratime", "diratime"),
        (&["rbind", "rnoatime"], "noatime", "relatime"),
        (&["rbind", "rnoatime", "rrelatime"], "relatime", "noatime"),
        (&["rbind", "rstrictatime"], "rw", "relatime"),
        (&["rbind", "rnosymfollow"], "nosymfollow", "symfollow"),
        (&["rbind", "ratime"], "relatime", "noatime"),
        (&["rbind", "rnorelatime", "rnostrictatime"], "relatime", "noatime"),
    ] {
        // Of these, and of two that contradict each other, runc makes what it should since 1.2 and later.
        if !is_skiff() && given.iter().any(|o| o.contains("atime") || *o == "rrw" || *o == "rnosymfollow") {
            continue;
        }
        run(Command::new("mount").args(["-t", "tmpfs", "skiff-tree", &sub]), "").ok();
        let case = Case::sh("cat /proc/self/mountinfo").with(|spec| {
            add(spec, json!({"destination": "/mnt", "type": "bind", "source": dir.path(), "options": given}));
        });
        let done = case.run();
        run(Command::new("umount").arg(&sub), "").ok();
        let out = done.ok().out;
        for at in ["/mnt", "/mnt/sub"] {
            let (own, ..) = options(&out, at);
            let right = own.iter().any(|o| o == has) && !own.iter().any(|o| o == has_not);
            assert!(right, "{given:?} {at}: {own:?}");
        }
        case.end();
    }
}

#[test]
fn what_a_recursive_option_clears_is_cleared_below() {
    let dir = tempfile::Builder::new().prefix("skiff-tree-").tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let sub = dir.path().join("sub").display().to_string();
    let all = "ro,nosuid,nodev,noexec,nodiratime";
    run(Command::new("mount").args(["-t", "tmpfs", "-o", all, "skiff-tree", &sub]), "").ok();
    let case = Case::sh("cat /proc/self/mountinfo").with(|spec| {
        let options = ["rbind", "rrw", "rsuid", "rdev", "rexec", "rdiratime", "rsymfollow"];
        add(spec, json!({"destination": "/mnt", "type": "bind", "source": dir.path(), "options": options}));
    });
    let done = case.run();
    run(Command::new("umount").arg(&sub), "").ok();
    assert_eq!(options(&done.ok().out, "/mnt/sub").0, ["rw", "relatime"]);
    case.end();
}

#[test]
fn mounts_and_the_root_propagate_as_they_are_told() {
    for (word, want) in [
        ("shared", "shared:"),
        ("rshared", "shared:"),
        ("private", ""),
        ("rprivate", ""),
        ("unbindable", "unbindable"),
        ("runbindable", "unbindable"),
    ] {
        let out = seen("cat /proc/self/mountinfo", |spec| add(spec, tmpfs(&[word])));
        let (_, propagation, _) = options(&out, "/mnt");
        let right = |propagation: &str| match want {
            "" => propagation.is_empty(),
            want => propagation.starts_with(want),
        };
        assert!(!since(2) || right(&propagation), "{word}: {out}");
        // runc cannot bind a rootfs that it has made unbindable.
        if !since(2) || (want == "unbindable" && !is_skiff()) {
            continue;
        }
        let out = seen("cat /proc/self/mountinfo", |spec| spec["linux"]["rootfsPropagation"] = json!(word));
        let (_, propagation, _) = options(&out, "/");
        assert!(right(&propagation), "{word}: {out}");
    }
    for word in ["slave", "rslave"] {
        // A slave of nobody is private.
        let out = seen("cat /proc/self/mountinfo", |spec| {
            add(spec, tmpfs(&["shared", word]));
            spec["linux"]["rootfsPropagation"] = json!(word);
        });
        assert!(!options(&out, "/mnt").1.contains("shared:") && !options(&out, "/").1.contains("shared:"), "{out}");
    }
    let err = refused(|spec| spec["linux"]["rootfsPropagation"] = json!("moon"));
    assert!(!is_skiff() || err.contains("linux.rootfsPropagation: \\\"moon\\\" is not a propagation"), "{err}");
}

#[test]
fn a_mount_that_propagates_is_seen_on_both_sides() {
    let dir = tempfile::Builder::new().prefix("skiff-shared-").tempdir().unwrap();
    let at = dir.path().display().to_string();
    run(Command::new("mount").args(["-t", "tmpfs", "skiff-shared", &at]), "").ok();
    run(Command::new("mount").args(["--make-shared", &at]), "").ok();
    std::fs::create_dir(dir.path().join("host")).unwrap();
    for (word, seen_inside) in [("rslave", "1\n"), ("rprivate", "0\n"), ("rshared", "1\n")] {
        let case = Case::sh("while ! test -e /mnt/go; do sleep 0.05; done; grep -c ' /mnt/host ' /proc/self/mountinfo")
            .with(|spec| {
                spec["linux"]["rootfsPropagation"] = json!(if word == "rprivate" { "rprivate" } else { "rslave" });
                if word == "rshared" {
                    spec["linux"]["rootfsPropagation"] = json!("rshared");
                }
                add(spec, json!({"destination": "/mnt", "type": "bind", "source": at, "options": ["rbind", word]}));
            });
        case.detached(&["run", "-d", &case.id]).ok();
        run(Command::new("mount").args(["-t", "tmpfs", "skiff-below", &format!("{at}/host")]), "").ok();
        std::fs::write(dir.path().join("go"), "").unwrap();
        let out = case.bundle.path().join("out");
        skiff_test_support::eventually("the container has looked", || {
            std::fs::read_to_string(&out).is_ok_and(|text| text.ends_with('\n'))
        });
        let text = std::fs::read_to_string(&out).unwrap();
        run(Command::new("umount").arg(format!("{at}/host")), "").ok();
        std::fs::remove_file(dir.path().join("go")).unwrap();
        case.cmd(&["delete", "--force", &case.id]).ok();
        case.end();
        assert_eq!(text, seen_inside, "{word}");
    }
    run(Command::new("umount").arg(&at), "").ok();
}

#[test]
fn a_cgroup_mount_shows_the_containers_own_cgroup() {
    for own_namespace in [false, true] {
        let script = "cat /proc/self/mountinfo; ls /sys/fs/cgroup; mkdir /sys/fs/cgroup/x /sys/fs/cgroup/pids/x 2>&1; \
            cat /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs 2>/dev/null; true";
        let case = Case::sh(script).with(|spec| {
            if own_namespace {
                spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "cgroup"}));
            }
        });
        let out = case.run().ok().out;
        assert!(out.contains("Read-only file system"), "{out}");
        // The shell and cat, by the container's own numbers.
        assert!(out.lines().any(|line| line == "1"), "{out}");
        let v1 = Path::new("/sys/fs/cgroup/memory").is_dir();
        if v1 {
            for controller in ["memory", "pids", "cpu", "freezer"] {
                let (own, ..) = options(&out, &format!("/sys/fs/cgroup/{controller}"));
                assert!(
                    ["ro", "nosuid", "noexec", "nodev"].iter().all(|o| own.iter().any(|have| have == o)),
                    "{own:?}"
                );
            }
        }
        case.end();
    }
}

#[test]
fn devices_of_every_type_are_made() {
    let script = "cd /dev; stat -c '%n %F %t:%T %a %u:%g' char unbuffered block pipe plain; stat -c '%n %F %t:%T' null";
    let out = seen(script, |spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/dev/char", "type": "c", "major": 10, "minor": 229, "fileMode": 432, "uid": 3, "gid": 4},
            {"path": "/dev/unbuffered", "type": "u", "major": 10, "minor": 200, "fileMode": 256},
            {"path": "/dev/block", "type": "b", "major": 7, "minor": 1, "fileMode": 384},
            {"path": "/dev/pipe", "type": "p", "fileMode": 420},
            {"path": "/dev/plain", "type": "c", "major": 1, "minor": 5},
        ]);
    });
    if !is_skiff() {
        return;
    }
    assert_eq!(
        out,
        "char character special file a:e5 660 3:4\nunbuffered character special file a:c8 400 0:0\n\
         block block special file 7:1 600 0:0\npipe fifo 0:0 644 0:0\nplain character special file 1:5 666 0:0\n\
         null character special file 1:3\n"
    );
    for (device, want) in [
        (json!({"path": "dev/x", "type": "c", "major": 1, "minor": 3}), "linux.devices[0].path: must be an absolute"),
        (json!({"path": "/dev/x", "type": "z", "major": 1, "minor": 3}), "linux.devices[0].type: unknown variant"),
        (json!({"path": "/dev/x", "type": "a", "major": 1, "minor": 3}), "linux.devices[0].type: must be one of"),
        (json!({"path": "/dev/x", "type": "c", "major": -1, "minor": 3}), "linux.devices[0].major: -1 is not"),
        (json!({"path": "/dev/x", "type": "c", "major": 1, "minor": 9_999_999}), "linux.devices[0].minor: 9999999"),
    ] {
        let err = refused(|spec| spec["linux"]["devices"] = json!([device]));
        assert!(err.contains(want), "{device}: {err}");
    }
}

#[test]
fn a_device_node_that_is_there_must_be_the_same() {
    if !is_skiff() {
        return;
    }
    let make = |path: &Path, minor: &str| run(Command::new("mknod").arg(path).args(["c", "10", minor]), "").ok();
    for (minor, fits) in [("229", true), ("228", false)] {
        let case = Case::new(&["true"]).with(|spec| {
            spec["root"]["readonly"] = json!(false);
            spec["linux"]["devices"] = json!([{"path": "/node", "type": "c", "major": 10, "minor": 229}]);
        });
        make(&case.bundle.rootfs().join("node"), minor);
        let done = case.run();
        assert_eq!(done.code == 0, fits, "{done:?}");
        if !fits {
            assert!(
                done.err.contains("linux.devices: make \\\"/node\\\": file exists (EEXIST); something else"),
                "{}",
                done.err
            );
        }
        case.end();
    }
}

#[test]
fn device_rules_allow_and_deny_by_type_number_and_access() {
    // Where the bundle lies devices may not be opened.
    let script = "cd /dev; mknod r c 1 11; mknod w c 1 5; mknod b b 7 7; \
        (head -c0 r && echo read) 2>/dev/null; (: >r && echo wrote) 2>/dev/null; \
        (head -c1 w >/dev/null && echo read-zero) 2>/dev/null; (head -c0 <b && echo read-block) 2>/dev/null; true";
    let run = |rules: Value| {
        seen(script, |spec| {
            let caps = json!(["CAP_MKNOD", "CAP_SYSLOG"]);
            spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
            spec["linux"]["resources"]["devices"] = rules;
        })
    };
    let deny = json!({"allow": false, "access": "rwm"});
    assert_eq!(run(json!([deny])), "read-zero\n", "zero is always allowed");
    assert_eq!(
        run(json!([deny, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}])),
        "read\nread-zero\n"
    );
    assert_eq!(
        run(json!([deny, {"allow": true, "type": "c", "major": 1, "access": "rw"}])),
        "read\nwrote\nread-zero\n"
    );
}

/// What is mounted on the root is the root: of later mounts, of the process, and read-only when that is asked for.
#[test]
fn a_mount_on_the_root() {
    let other = tempfile::tempdir().unwrap();
    skiff_test_support::fill_rootfs(other.path());
    std::fs::write(other.path().join("marker"), "other").unwrap();
    let other = other.path().display().to_string();
    let script =
        "cat /marker; stat -f -c %T /mnt; touch /new && echo written; ls /proc/self/fd >/dev/null && echo proc";
    for (mount, marker) in [
        (json!({"destination": "/", "type": "bind", "source": other, "options": ["rbind"]}), "other"),
        (json!({"destination": "/", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}), "own"),
    ] {
        for readonly in [false, true] {
            let case = Case::sh(script);
            std::fs::write(case.bundle.rootfs().join("marker"), "own").unwrap();
            let case = case.with(|spec| {
                let mounts = spec["mounts"].as_array_mut().unwrap();
                mounts.insert(0, mount.clone());
                mounts.push(tmpfs(&[]));
                spec["root"]["readonly"] = json!(readonly);
            });
            let done = case.run().ok();
            let written = if readonly { "" } else { "written\n" };
            assert_eq!(done.out, format!("{marker}tmpfs\n{written}proc\n"), "{}", done.err);
            assert!(!case.bundle.rootfs().join("new").exists(), "it has a root of its own");
            case.end();
        }
    }
}
