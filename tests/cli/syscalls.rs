//! `linux.seccomp`, by what calls do inside.

use serde_json::{Value, json};

use super::{Case, is_skiff, refused, since};

/// The exit code and output of a script under a profile.
fn under(script: &str, seccomp: &Value) -> (i32, String) {
    let case = Case::sh(script).with(|spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
        spec["linux"]["seccomp"] = seccomp.clone();
    });
    let done = case.run();
    case.end();
    (done.code, done.out)
}

fn rule(action: &str) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": action}]})
}

#[test]
fn every_action_has_its_effect() {
    // A shell reports a child that SIGSYS has ended as 128 and 31.
    let script = "mkdir /tmp/x 2>/tmp/err; echo $?";
    let answer = |action: &str| {
        let script = script.replace("2>/tmp/err", "2>/dev/null");
        under(&script, &rule(action)).1.trim().to_string()
    };
    for (action, want) in [
        ("SCMP_ACT_KILL", "159"),
        ("SCMP_ACT_KILL_THREAD", "159"),
        ("SCMP_ACT_KILL_PROCESS", "159"),
        ("SCMP_ACT_TRAP", "159"),
    ] {
        assert_eq!(answer(action), want, "{action}");
    }
    // The root is read-only: the call itself fails with that.
    let text = |seccomp: &Value| under("mkdir /tmp/x 2>&1; true", seccomp).1;
    for (action, want) in [
        ("SCMP_ACT_ERRNO", "Operation not permitted"),
        // Nobody traces it.
        ("SCMP_ACT_TRACE", "Function not implemented"),
        ("SCMP_ACT_LOG", "Read-only file system"),
        ("SCMP_ACT_ALLOW", "Read-only file system"),
    ] {
        assert!(text(&rule(action)).contains(want), "{action}: {}", text(&rule(action)));
    }
    let mut errno = rule("SCMP_ACT_ERRNO");
    errno["syscalls"][0]["errnoRet"] = json!(28);
    assert!(text(&errno).contains("No space left on device"));
}

#[test]
fn a_profile_that_does_not_know_how_a_program_is_looked_for_starts_it() {
    for nnp in [true, false] {
        let case = Case::sh("echo here").with(|spec| {
            spec["process"]["noNewPrivileges"] = json!(nnp);
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["faccessat2", "faccessat", "access"], "action": "SCMP_ACT_ERRNO"}]});
        });
        assert_eq!(case.run().ok().out, "here\n", "no_new_privs {nnp}");
        case.end();
    }
}

#[test]
fn the_default_action_has_its_errno() {
    if !since(1) {
        return;
    }
    // What a static busybox needs to say something; all else is denied.
    let known = [
        "read",
        "write",
        "writev",
        "execve",
        "exit",
        "exit_group",
        "brk",
        "mmap",
        "munmap",
        "mprotect",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "uname",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "setuid",
        "setgid",
        "setgroups",
        "capset",
        "capget",
        "prctl",
        "close",
        "close_range",
        "openat",
        "openat2",
        "newfstatat",
        "fstat",
        "stat",
        "fcntl",
        "ioctl",
        "rt_sigaction",
        "rt_sigprocmask",
        "chdir",
        "getcwd",
        "futex",
        "faccessat",
        "faccessat2",
        "fchown",
        "fstatfs",
        "getpid",
        "gettid",
        "getppid",
        "sched_yield",
        "nanosleep",
        "epoll_ctl",
        "epoll_pwait",
        "tgkill",
        "lseek",
        "getdents64",
        "poll",
        "ppoll",
        "dup2",
        "dup3",
        "pipe2",
        "statx",
        "umask",
        "sigaltstack",
        "wait4",
        "rt_sigreturn",
        "clone",
        "clone3",
        "vfork",
        "getpgrp",
        "sendto",
        "recvfrom",
        "sendmsg",
        "recvmsg",
        "lstat",
        "access",
        "open",
        "fchdir",
        "seccomp",
        "madvise",
        "pread64",
        "epoll_create1",
        "eventfd2",
    ];
    for (errno, want) in [(json!(null), "Operation not permitted"), (json!(28), "No space left on device")] {
        let mut profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_NATIVE"],
            "syscalls": [{"names": known.as_slice(), "action": "SCMP_ACT_ALLOW"}]});
        if !errno.is_null() {
            profile["defaultErrnoRet"] = errno;
        }
        if cfg!(target_arch = "x86_64") && is_skiff() {
            let (_, out) = under("mkdir /tmp/x 2>&1; true", &profile);
            assert!(out.contains(want), "{want}: {out}");
        }
    }
}

/// A profile need allow nothing of what the runtime does on its way, but for what cannot be done before it is on: the execve,
/// and without no_new_privs the wait for the start and the end of the rights that the filter took.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_strictest_of_profiles_lets_a_container_start() {
    if !is_skiff() {
        return;
    }
    // A static busybox's, to do nothing and to sleep.
    let program = [
        "arch_prctl",
        "brk",
        "clock_nanosleep",
        "execve",
        "exit_group",
        "getrandom",
        "getuid",
        "mprotect",
        "nanosleep",
        "prctl",
        "prlimit64",
        "readlink",
        "readlinkat",
        "rseq",
        "set_robust_list",
        "set_tid_address",
    ];
    // By others than root busybox may be set-uid, and looks for its configuration.
    let as_user = ["getgid", "newfstatat", "setgid", "setuid"];
    for action in ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"] {
        for (no_new_privs, more) in [(true, &[][..]), (false, &["capset", "read", "write"])] {
            for uid in [0, 1000] {
                let user = if uid == 0 { &[][..] } else { &as_user };
                let names = [&program, more, user].concat();
                let strict = |args: &[&str]| {
                    Case::new(args).with(|spec| {
                        spec["process"]["noNewPrivileges"] = json!(no_new_privs);
                        spec["process"]["user"] = json!({"uid": uid, "gid": uid, "additionalGids": [5]});
                        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
                        spec["linux"]["seccomp"] = json!({"defaultAction": action,
                            "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}]});
                    })
                };
                let what = format!("{action}, no_new_privs {no_new_privs}, user {uid}");
                let case = strict(&["true"]);
                let done = case.run();
                assert_eq!((done.code, done.err.as_str()), (0, ""), "{what}");
                case.end();
                let case = strict(&["sleep", "100"]);
                case.detached(&["run", "-d", &case.id]).ok();
                let done = case.cmd(&["exec", &case.id, "true"]);
                assert_eq!((done.code, done.err.as_str()), (0, ""), "exec: {what}");
                let status = std::fs::read_to_string(format!("/proc/{}/status", case.state()["pid"])).unwrap();
                let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
                // What the filter took is given back: CAP_AUDIT_WRITE, CAP_KILL, CAP_NET_BIND_SERVICE.
                let held = if uid == 0 { "0000000020000420" } else { "0000000000000000" };
                assert_eq!((field("CapPrm:"), field("CapEff:"), field("Seccomp:")), (held, held, "2"), "{what}");
                case.cmd(&["delete", "--force", &case.id]).ok();
                case.end();
            }
        }
    }
}

#[test]
fn every_operator_compares() {
    // Signals that are ignored by default, as the second argument of kill(2): CHLD 17, CONT 18, URG 23, WINCH 28.
    let script = "for s in 17 18 23 28; do kill -$s $$ 2>/dev/null && printf '%s ' $s; done; true";
    for (op, value, two, allowed) in [
        ("SCMP_CMP_EQ", 18, 0, "17 23 28 "),
        ("SCMP_CMP_NE", 18, 0, "18 "),
        ("SCMP_CMP_LT", 23, 0, "23 28 "),
        ("SCMP_CMP_LE", 23, 0, "28 "),
        ("SCMP_CMP_GT", 18, 0, "17 18 "),
        ("SCMP_CMP_GE", 18, 0, "17 "),
        // Those that have bit 2 and not bit 3: 23.
        ("SCMP_CMP_MASKED_EQ", 0b1100, 0b0100, "17 18 28 "),
    ] {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["kill"],
            "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": value, "valueTwo": two, "op": op}]}]});
        assert_eq!(under(script, &profile).1, allowed, "{op}");
    }
    // All of a rule's conditions must hold: of two on different arguments none is enough alone.
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 0, "value": 12345, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 18, "op": "SCMP_CMP_EQ"}]}]});
    assert_eq!(under(script, &profile).1, "17 18 23 28 ");
}

#[test]
fn a_filter_is_on_every_process_of_the_container() {
    let case = Case::new(&["sleep", "100"]).with(|spec| spec["linux"]["seccomp"] = rule("SCMP_ACT_ERRNO"));
    case.detached(&["run", "-d", &case.id]).ok();
    let done = case.cmd(&["exec", &case.id, "sh", "-c", "mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status"]).ok();
    assert!(done.out.contains("Operation not permitted") && done.out.contains("Seccomp:\t2"), "{}", done.out);
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn flags_are_taken_and_unknown_words_are_named() {
    for flags in [json!([]), json!(["SECCOMP_FILTER_FLAG_LOG"]), json!(["SECCOMP_FILTER_FLAG_SPEC_ALLOW"])] {
        let mut profile = rule("SCMP_ACT_ERRNO");
        profile["flags"] = flags;
        if since(2) {
            assert!(under("mkdir /tmp/x 2>&1; true", &profile).1.contains("not permitted"), "{profile}");
        }
    }
    if !is_skiff() {
        return;
    }
    for (field, value, want) in [
        ("flags", json!(["MOON"]), "linux.seccomp.flags[0]: unknown variant `MOON`"),
        ("architectures", json!(["SCMP_ARCH_MOON"]), "linux.seccomp.architectures[0]: unknown variant"),
        ("defaultAction", json!("SCMP_ACT_MOON"), "linux.seccomp.defaultAction: unknown variant"),
        ("defaultErrnoRet", json!(5), "linux.seccomp.defaultErrnoRet: does not go with action"),
        ("syscalls", json!([{"names": ["x"], "action": "MOON"}]), "linux.seccomp.syscalls[0].action: unknown variant"),
        (
            "syscalls",
            json!([{"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]),
            "linux.seccomp.syscalls[0].args: index 6",
        ),
        ("listenerMetadata", json!("x"), "linux.seccomp.listenerPath: must be set"),
    ] {
        let err = refused(|spec| {
            spec["linux"]["seccomp"] = rule("SCMP_ACT_ERRNO");
            spec["linux"]["seccomp"][field] = value;
        });
        assert!(err.contains(want), "{field}: {err}");
    }
}
