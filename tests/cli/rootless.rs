//! Containers of an ordinary user, in a user namespace of that user's.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use skiff_test_support::{Done, run, seccomp_agent, unique};

use super::commands::is_v1;
use super::{Case, detach, is_skiff};

const USER: &str = "65534";

/// A bundle of that user's, and what its commands need.
struct Ordinary {
    case: Case,
    run_dir: tempfile::TempDir,
    spec: Value,
    id: String,
}

impl Ordinary {
    /// With the default spec of the runtime, running `script`.
    fn new(script: &str) -> Ordinary {
        let case = Case::sh(script);
        let run_dir = tempfile::tempdir().unwrap();
        let found = if is_skiff() { case.runtime.clone() } else { "/usr/sbin/runc".into() };
        std::fs::copy(found, run_dir.path().join("runtime")).unwrap();
        std::fs::remove_file(case.bundle.path().join("config.json")).unwrap();
        for path in [case.bundle.path(), run_dir.path()] {
            run(Command::new("chown").args(["-R", &format!("{USER}:{USER}")]).arg(path), "").ok();
        }
        let mut out = Ordinary { case, run_dir, spec: Value::Null, id: unique("rootless") };
        out.cmd(&["spec", "--rootless"]).ok();
        out.spec = serde_json::from_slice(&std::fs::read(out.config()).unwrap()).unwrap();
        out.spec["process"]["terminal"] = json!(false);
        out.spec["process"]["args"] = json!(["sh", "-c", script]);
        out.with(|_| ())
    }

    /// With a changed spec.
    fn with(mut self, change: impl FnOnce(&mut Value)) -> Ordinary {
        change(&mut self.spec);
        std::fs::write(self.config(), self.spec.to_string()).unwrap();
        self
    }

    fn config(&self) -> PathBuf {
        self.case.bundle.path().join("config.json")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
        command.arg(self.run_dir.path().join("runtime")).args(args);
        command.current_dir(self.case.bundle.path()).env("XDG_RUNTIME_DIR", self.run_dir.path());
        command.env("OF_THE_CALLER", "secret");
        command
    }

    fn cmd(&self, args: &[&str]) -> Done {
        run(&mut self.command(args), "")
    }

    fn run(&self) -> Done {
        self.cmd(&["run", &self.id])
    }

    /// `create` or `run -d`.
    fn detached(&self, args: &[&str]) -> Done {
        detach(self.command(&[args, &[&self.id]].concat()), self.case.bundle.path())
    }

    fn end(self) {
        self.cmd(&["delete", "--force", &self.id]);
        self.case.end();
    }
}

fn namespace(spec: &mut Value, kind: &str, path: Option<&str>) {
    let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
    all.retain(|namespace| namespace["type"] != kind);
    all.push(match path {
        Some(path) => json!({"type": kind, "path": path}),
        None => json!({"type": kind}),
    });
}

#[test]
fn an_ordinary_user_runs_a_container() {
    let user = Ordinary::new("id -u; cat /proc/self/uid_map; echo x >/dev/null && echo null");
    let out = user.run().ok().out;
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines, [vec!["0"], vec!["0", USER, "1"], vec!["null"]]);
    let user = user.with(|spec| spec["process"]["args"] = json!(["sleep", "100"]));
    user.detached(&["run", "-d"]).ok();
    let done = user.cmd(&["exec", &user.id, "sh", "-c", "readlink /proc/1/exe; exit 7"]);
    assert_eq!((done.code, done.out.as_str()), (7, "/bin/busybox\n"), "{}", done.err);
    user.end();
}

#[test]
fn one_that_waits_for_its_start_can_be_entered() {
    let user = Ordinary::new("exec sleep 100");
    user.detached(&["create"]).ok();
    assert_eq!(user.cmd(&["exec", &user.id, "id", "-u"]).ok().out, "0\n");
    user.cmd(&["start", &user.id]).ok();
    assert_eq!(user.cmd(&["exec", &user.id, "id", "-u"]).ok().out, "0\n");
    user.end();
}

/// Whoever enters it before its start sees the runtime as its first process. That is the user's own program, which the
/// container's root is that user to: it is not to be had for writing (CVE-2019-5736), nor is the caller's environment.
#[test]
fn the_runtime_is_not_the_containers() {
    let user = Ordinary::new("exec sleep 100").with(|spec| spec["root"]["readonly"] = json!(false));
    let program = user.run_dir.path().join("runtime");
    let before = std::fs::read(&program).unwrap();
    user.detached(&["create"]).ok();
    let environment = user.cmd(&["exec", &user.id, "cat", "/proc/1/environ"]);
    assert!(!environment.out.contains("secret"), "{environment:?}");
    let attack = "exec 9</proc/1/exe; touch /open; until grep -q sleep /proc/1/cmdline; do :; done; \
                  for way in 9 /proc/self/fd/9; do echo owned >>$way; done; touch /tried";
    detach(user.command(&["exec", "-d", &user.id, "sh", "-c", attack]), user.case.bundle.path()).ok();
    let there = |name: &str| skiff_test_support::eventually(name, || user.case.bundle.rootfs().join(name).exists());
    there("open");
    user.cmd(&["start", &user.id]).ok();
    there("tried");
    assert!(std::fs::read(&program).unwrap() == before, "the program has changed");
    user.end();
}

/// By runc from 1.2 on.
#[test]
fn an_agent_is_asked() {
    if !is_skiff() {
        return;
    }
    for no_new_privileges in [true, false] {
        let user = Ordinary::new("exec sleep 100");
        let sockets = tempfile::tempdir().unwrap();
        let socket = sockets.path().join("agent");
        let user = user.with(|spec| {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "listenerPath": socket,
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
            });
        });
        let open = |path: &Path| run(Command::new("chmod").args(["-R", "a+rwX"]).arg(path), "").ok();
        let user = user.with(|spec| spec["process"]["args"] = json!(["sh", "-c", "mkdir /tmp/x; exec sleep 100"]));
        let agent = seccomp_agent(&socket, libc::EXDEV);
        open(sockets.path());
        user.detached(&["run", "-d"]).ok();
        let state: Value = serde_json::from_str(&agent.join().unwrap()).unwrap();
        assert_eq!(state["state"]["id"], json!(user.id));
        std::fs::remove_file(&socket).unwrap();
        let agent = seccomp_agent(&socket, libc::EXDEV);
        open(sockets.path());
        let done = user.cmd(&["exec", &user.id, "mkdir", "/tmp/y"]);
        agent.join().unwrap();
        assert!(done.code == 1 && done.err.contains("Invalid cross-device link"), "{done:?}");
        user.end();
    }
}

#[test]
fn clocks_may_be_set() {
    let user = Ordinary::new("cat /proc/self/timens_offsets; cut -d. -f1 /proc/uptime").with(|spec| {
        namespace(spec, "time", None);
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}, "monotonic": {"secs": 7}});
    });
    if !is_skiff() {
        // Of 1.2 and later.
        return user.end();
    }
    let out = user.run().ok().out;
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].split_whitespace().eq(["monotonic", "7", "0"]), "{out}");
    assert!(lines[2].parse::<u64>().unwrap() > 1_000_000_000, "{out}");
    user.end();
}

#[test]
fn namespaces_of_another_container_are_joined() {
    let first = Ordinary::new("exec sleep 100");
    first.detached(&["run", "-d"]).ok();
    let state: Value = serde_json::from_str(&first.cmd(&["state", &first.id]).ok().out).unwrap();
    let of_first = |kind: &str| format!("/proc/{}/ns/{kind}", state["pid"]);
    let second = Ordinary::new("readlink /proc/1/exe; grep -c sleep /proc/1/cmdline; id -u").with(|spec| {
        namespace(spec, "pid", Some(&of_first("pid")));
        namespace(spec, "user", Some(&of_first("user")));
        // runc 1.1 wants them said again.
        if is_skiff() {
            let linux = spec["linux"].as_object_mut().unwrap();
            linux.remove("uidMappings");
            linux.remove("gidMappings");
        }
    });
    assert_eq!(second.run().ok().out, "/bin/busybox\n1\n0\n");
    let second = second.with(|spec| spec["process"]["args"] = json!(["sleep", "4712"]));
    second.detached(&["run", "-d"]).ok();
    second.cmd(&["kill", &second.id, "KILL"]).ok();
    skiff_test_support::eventually("it has stopped", || {
        second.cmd(&["state", &second.id]).ok().out.contains(r#""status": "stopped""#)
    });
    second.cmd(&["delete", &second.id]).ok();
    second.end();
    first.end();
}

/// Whatever the user may write on the host, it is not to be had by way of the container (CVE-2023-25809). Debian's runc 1.1.5
/// is of before that.
#[test]
fn cgroups_are_read_only() {
    if !is_skiff() {
        return;
    }
    for own in [false, true] {
        // What is covered is in the list, too.
        let script =
            "while read -r x at rest; do test -e $at && echo $x $at $rest; done </proc/self/mounts | grep cgroup";
        let user = Ordinary::new(script).with(|spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "cgroup");
            if own {
                namespace(spec, "cgroup", None);
            }
        });
        let out = user.run().ok().out;
        let mut last = std::collections::BTreeMap::new();
        for line in out.lines() {
            let mut words = line.split(' ').skip(1);
            let (path, kind) = (words.next().unwrap(), words.next().unwrap());
            last.insert(path.to_string(), (kind.to_string(), words.next().unwrap().to_string()));
        }
        assert!(last.values().all(|(_, options)| options.starts_with("ro,")), "{out}");
        assert!(last.values().any(|(kind, _)| kind.starts_with("cgroup")), "{out}");
        user.end();
    }
}

#[test]
fn a_cgroup_that_the_user_may_not_make() {
    if !is_v1() {
        // systemd may have given some to the user.
        return;
    }
    let user = Ordinary::new("true").with(|spec| spec["linux"]["cgroupsPath"] = json!("/not-for-users"));
    let done = user.run().failed();
    let words = ["unable to apply cgroup configuration", "permission denied"];
    assert!(words.iter().all(|word| done.err.contains(word)), "{}", done.err);
    user.end();
    let user = Ordinary::new("true").with(|spec| spec["linux"]["resources"] = json!({"pids": {"limit": 10}}));
    let done = user.run().failed();
    assert!(!is_skiff() || done.err.contains("rootless needs no limits"), "{}", done.err);
    user.end();
}

#[test]
fn what_cannot_be_killed_as_a_whole_is_told_of() {
    let warns = |user: Ordinary| {
        let done = user.run().ok();
        user.end();
        done.err.contains("Such configuration is strongly discouraged")
    };
    if !is_v1() || !is_skiff() {
        // runc 1.2 and later.
        return;
    }
    assert!(!warns(Ordinary::new("true")));
    assert!(warns(Ordinary::new("true").with(|spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
        let proc = json!({"destination": "/proc", "type": "none", "source": "/proc", "options": ["rbind"]});
        spec["mounts"].as_array_mut().unwrap()[0] = proc;
    })));
}
