//! Errors that a person can act on: the field, what was done to what, the errno, and what may be the matter.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::{Case, is_skiff};

/// What the log has of a failed run: message and parts.
fn told(case: &Case) -> Value {
    let log = case.bundle.path().join("log.json");
    let done = case.cmd(&["--log", log.to_str().unwrap(), "--log-format", "json", "run", &case.id]).failed();
    let text = std::fs::read_to_string(log).unwrap_or_else(|e| panic!("{e}: {done:?}"));
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(last["time"].as_str().unwrap().ends_with('Z'), "{last}");
    last
}

struct Fault {
    what: &'static str,
    prepare: fn(&Case),
    change: fn(&mut Value),
    field: &'static str,
    step: &'static str,
    errno: &'static str,
    object: &'static str,
    hint: &'static str,
}

fn program(case: &Case, content: &[u8], mode: u32) {
    let path = case.bundle.rootfs().join("program");
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
}

fn run_program(spec: &mut Value) {
    spec["process"]["args"] = json!(["/program"]);
}

fn mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

fn bind(spec: &mut Value, source: &str, destination: &str) {
    mount(spec, json!({"destination": destination, "type": "bind", "source": source, "options": ["bind"]}));
}

const NOTHING: fn(&Case) = |_| {};

/// An executable of another architecture, as far as its head.
fn foreign() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    elf[16] = 2;
    // e_machine of LoongArch.
    (elf[18], elf[19]) = (2, 1);
    elf
}

fn faults() -> Vec<Fault> {
    let fault = |what, prepare, change, (field, step, errno, object, hint)| Fault {
        what,
        prepare,
        change,
        field,
        step,
        errno,
        object,
        hint,
    };
    let arg = "process.args[0]";
    vec![
        fault(
            "a script without its interpreter",
            |case| program(case, b"#!/usr/bin/perl -w\n", 0o755),
            run_program,
            (arg, "execve", "ENOENT", "/program", "its interpreter \"/usr/bin/perl\" is not in the container"),
        ),
        fault(
            "a script from Windows",
            |case| program(case, b"#!/bin/sh\r\necho hello\r\n", 0o755),
            run_program,
            (
                arg,
                "execve",
                "ENOENT",
                "/program",
                "its first line ends as Windows ends lines (CRLF): there is no \"/bin/sh\\r\"",
            ),
        ),
        fault(
            "a program of another machine",
            |case| program(case, &foreign(), 0o755),
            run_program,
            (arg, "execve", "ENOEXEC", "/program", "it is a program for loongarch64, and this machine is "),
        ),
        fault(
            "a file that is no program",
            |case| program(case, b"echo hello\n", 0o755),
            run_program,
            (arg, "execve", "ENOEXEC", "/program", "it is no program of this system, nor does it begin with #!"),
        ),
        fault(
            "an empty file",
            |case| program(case, b"", 0o755),
            run_program,
            (arg, "execve", "ENOEXEC", "/program", "it is empty"),
        ),
        fault(
            "a file without the permission",
            |case| program(case, b"#!/bin/sh\n", 0o644),
            run_program,
            (arg, "execve", "EACCES", "/program", "its mode is 0644, and uid 0 runs it"),
        ),
        fault(
            "a program on a noexec mount",
            |case| {
                std::fs::create_dir(case.bundle.path().join("data")).unwrap();
                std::fs::copy("/bin/busybox", case.bundle.path().join("data/sh")).unwrap();
            },
            |spec| {
                mount(
                    spec,
                    json!({"destination": "/data", "type": "bind", "source": "data", "options": ["bind", "noexec"]}),
                );
                spec["process"]["args"] = json!(["/data/sh"]);
            },
            (arg, "execve", "EACCES", "/data/sh", "mounts[7] at \"/data\" is noexec"),
        ),
        fault(
            "a name without a PATH",
            NOTHING,
            |spec| spec["process"]["env"] = json!([]),
            (arg, "execve", "ENOENT", "true", "process.env has no PATH"),
        ),
        fault(
            "a rootfs that is not there",
            NOTHING,
            |spec| spec["root"]["path"] = json!("missing"),
            ("root.path", "rootfs", "ENOENT", "/missing", "the bundle has no root file system there"),
        ),
        fault(
            "a rootfs that is a file",
            |case| std::fs::write(case.bundle.path().join("file"), "").unwrap(),
            |spec| spec["root"]["path"] = json!("file"),
            ("root.path", "rootfs", "ENOTDIR", "/file", "it must be a directory and no symlink"),
        ),
        fault(
            "a bind source that is not there",
            NOTHING,
            |spec| bind(spec, "/no/such/dir", "/mnt"),
            (
                "mounts[7].source",
                "mounts",
                "ENOENT",
                "/no/such/dir",
                "the source of a bind mount must exist on the host",
            ),
        ),
        fault(
            "a directory on a file",
            NOTHING,
            |spec| bind(spec, "/tmp", "/etc/passwd"),
            (
                "mounts[7].destination",
                "mounts",
                "ENOTDIR",
                "/etc/passwd",
                "are you trying to mount a directory onto a file (or vice-versa)?",
            ),
        ),
        fault(
            "a file on a directory",
            NOTHING,
            |spec| bind(spec, "/etc/passwd", "/etc"),
            (
                "mounts[7]",
                "mounts",
                "ENOTDIR",
                "/etc",
                "are you trying to mount a directory onto a file (or vice-versa)?",
            ),
        ),
        fault(
            "a file system that the kernel has not",
            NOTHING,
            |spec| mount(spec, json!({"destination": "/mnt", "type": "moonfs", "source": "x"})),
            (
                "mounts[7]",
                "mounts",
                "ENODEV",
                "/mnt",
                "this kernel has no such file system, or not yet: see /proc/filesystems",
            ),
        ),
        fault(
            "a mount without ids on a file system that maps none",
            NOTHING,
            |spec| {
                let map = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
                mount(
                    spec,
                    json!({"destination": "/mnt", "type": "bind", "source": "/proc", "options": ["bind"],
                    "uidMappings": map, "gidMappings": map}),
                );
            },
            ("mounts[7]", "", "EINVAL", "", "its file system does not support idmapped mounts"),
        ),
        fault(
            "a working directory that is a file",
            NOTHING,
            |spec| spec["process"]["cwd"] = json!("/etc/passwd"),
            ("process.cwd", "process", "ENOTDIR", "/etc/passwd", "it is not a directory"),
        ),
        fault(
            "a limit that is none",
            NOTHING,
            |spec| spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}]),
            ("process.rlimits[0]", "process", "EINVAL", "", "the soft limit is above the hard one"),
        ),
        fault(
            "a cgroup limit that the kernel does not take",
            NOTHING,
            |spec| spec["linux"]["resources"]["cpu"] = json!({"quota": 10}),
            ("linux.resources.cpu.quota", "cgroup", "EINVAL", "/sys/fs/cgroup", "a quota is at least 1000 us"),
        ),
        fault(
            "a sysctl that is none",
            NOTHING,
            |spec| spec["linux"]["sysctl"] = json!({"net.ipv4.moon": "1"}),
            (
                "linux.sysctl",
                "sysctl",
                "ENOENT",
                "/proc/sys/net/ipv4/moon",
                "this kernel has no such sysctl, or not in this namespace",
            ),
        ),
        fault(
            "a user that has no passwd line, which is no name",
            NOTHING,
            |spec| spec["process"]["user"] = json!({"uid": "nobody", "gid": 0}),
            ("config.json: process.user.uid", "", "", "", ""),
        ),
    ]
}

#[test]
fn every_fault_is_told_with_its_field_errno_and_hint() {
    if !skiff_test_support::has_controllers(&["cpu", "cpuset", "memory", "pids"]) {
        return;
    }
    if !is_skiff() {
        return;
    }
    for fault in faults() {
        let case = Case::new(&["true"]);
        (fault.prepare)(&case);
        let case = case.with(fault.change);
        let line = told(&case);
        let part = |name: &str| line[name].as_str().unwrap_or_default().to_string();
        let message = part("msg");
        let what = fault.what;
        assert_eq!(part("field"), fault.field, "{what}: {line}");
        assert!(fault.step.is_empty() || part("step") == fault.step, "{what}: {line}");
        assert!(part("errno") == fault.errno, "{what}: {line}");
        assert!(part("object").contains(fault.object), "{what}: {line}");
        assert!(part("hint").starts_with(fault.hint), "{what}: {line}");
        assert!(message.ends_with(&part("hint")), "{what}: {line}");
        // The errno's name or, where callers look for words, its text.
        let words = ["permission denied", "no such file", "not found", "(E"];
        assert!(fault.errno.is_empty() || words.iter().any(|word| message.contains(word)), "{what}: {line}");
        assert!(!message.contains('\n'), "{what}: {line}");
        case.end();
    }
}

#[test]
fn an_exec_tells_why_too() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["sleep", "100"]);
    program(&case, b"#!/bin/bash\n", 0o755);
    case.detached(&["run", "-d", &case.id]).ok();
    let done = case.cmd(&["exec", &case.id, "/program"]);
    assert_eq!(done.code, 255);
    assert!(done.err.contains("; its interpreter \\\"/bin/bash\\\" is not in the container"), "{}", done.err);
    let done = case.cmd(&["exec", "--cwd", "/etc/passwd", &case.id, "true"]);
    assert!(
        done.code == 255 && done.err.contains("process.cwd: chdir to \\\"/etc/passwd\\\": not a directory"),
        "{done:?}"
    );
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}
