//! exec in all its forms.

use serde_json::json;

use super::{Case, is_skiff};

fn running() -> Case {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    case
}

fn done(case: Case) {
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn exec_gives_output_status_and_takes_stdin() {
    let case = running();
    let got = case.cmd(&["exec", &case.id, "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((got.code, got.out.as_str()), (7, "out\n"));
    assert!(got.err.contains("err\n"));
    let got = skiff_test_support::run(&mut case.command(&["exec", &case.id, "cat"]), "in").ok();
    assert_eq!(got.out, "in");
    done(case);
}

#[test]
fn exec_is_in_the_container() {
    let case = running();
    let script = "for n in mnt pid net ipc uts; do readlink /proc/self/ns/$n; done";
    let inside = case.cmd(&["exec", &case.id, "sh", "-c", script]).ok().out;
    let pid = case.state()["pid"].to_string();
    let init: String = ["mnt", "pid", "net", "ipc", "uts"]
        .iter()
        .map(|ns| format!("{}\n", std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap().display()))
        .collect();
    assert_eq!(inside, init);
    let cgroup = case.cmd(&["exec", &case.id, "cat", "/proc/self/cgroup"]).ok().out;
    assert_eq!(cgroup, std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap());
    done(case);
}

#[test]
fn exec_flags_change_the_process() {
    let case = running();
    let flags = ["exec", "--user", "1000:5", "-g", "7", "--env", "A=1", "--cwd", "/tmp", &case.id];
    let script = ["sh", "-c", "id -u; id -g; id -G; echo $A; pwd"];
    let got = case.cmd(&[&flags[..], &script[..]].concat()).ok();
    assert_eq!(got.out, "1000\n5\n5 7\n1\n/tmp\n");
    let got = case.cmd(&["exec", "-c", "CAP_NET_RAW", &case.id, "grep", "CapEff", "/proc/self/status"]).ok();
    let bits = u64::from_str_radix(got.out.split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_ne!(bits & 1 << 13, 0);
    let got = case.cmd(&["exec", "-c", "CAP_NET_RAW", &case.id, "grep", "CapInh", "/proc/self/status"]).ok();
    assert!(got.out.contains("0000000000000000"), "{}", got.out);
    done(case);
}

#[test]
fn a_process_document_is_taken_as_it_is() {
    let case = running();
    let file = case.bundle.path().join("process.json");
    let process = json!({"args": ["sh", "-c", "echo $X; pwd"], "cwd": "/etc", "env": ["PATH=/bin", "X=y"],
        "user": {"uid": 0, "gid": 0}});
    std::fs::write(&file, process.to_string()).unwrap();
    let got = case.cmd(&["exec", "--process", file.to_str().unwrap(), &case.id]).ok();
    assert_eq!(got.out, "y\n/etc\n");
    done(case);
}

#[test]
fn an_exec_that_cannot_run_is_255() {
    let case = running();
    let got = case.cmd(&["exec", &case.id, "nope"]);
    assert_eq!(got.code, 255);
    assert!(got.err.contains("exec: \\\"nope\\\": executable file not found in $PATH"), "{}", got.err);
    assert_eq!(case.cmd(&["exec", &case.id, "/etc/passwd"]).code, 255);
    assert_eq!(case.cmd(&["exec", "skifftest-unknown", "true"]).code, 255);
    done(case);
}

#[test]
fn a_detached_exec_leaves_a_pid_file() {
    let case = running();
    let file = case.bundle.path().join("exec.pid");
    case.detached(&["exec", "-d", "--pid-file", file.to_str().unwrap(), &case.id, "sleep", "99"]).ok();
    let pid = std::fs::read_to_string(&file).unwrap();
    assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap(), "sleep\x0099\x00");
    let pids = case.cmd(&["ps", "--format", "json", &case.id]).ok().out;
    assert!(pids.contains(&pid), "{pids}");
    done(case);
}

#[test]
fn an_exec_has_a_terminal_when_asked() {
    let case = running();
    let line = format!("'{}' exec -t {} tty", case.runtime.display(), case.id);
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &line, "/dev/null"]);
    let got = skiff_test_support::run(&mut command, "");
    assert!(got.code == 0 && got.out.contains("/dev/pts/"), "{got:?}");
    done(case);
}

#[test]
fn a_signal_is_told_by_its_number_real_time_ones_too() {
    let case = running();
    for signal in [15, 37, 64] {
        let got = case.cmd(&["exec", &case.id, "sh", "-c", &format!("kill -{signal} $$")]);
        assert_eq!(got.code, 128 + signal, "{got:?}");
    }
    done(case);
}

/// runc refuses the container.
#[test]
fn capabilities_that_cannot_be_granted_are_told_of() {
    if !is_skiff() {
        return;
    }
    let case = Case::sh("grep CapEff /proc/self/status").with(|spec| {
        let both = json!(["CAP_KILL", "CAP_CHOWN"]);
        spec["process"]["capabilities"] = json!({"bounding": both, "effective": both, "permitted": ["CAP_CHOWN"]});
    });
    let done = case.run().ok();
    assert_eq!(done.out, "CapEff:\t0000000000000001\n");
    assert!(done.err.contains("can't grant capability CAP_KILL: is effective, but not permitted"), "{}", done.err);
    case.end();
    // A runtime that has no more than root's own name.
    let case = Case::sh("grep CapEff /proc/self/status").with(|spec| {
        let caps = json!(["CAP_KILL", "CAP_NET_RAW"]);
        spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    let line = format!("exec setpriv --bounding-set=-net_raw {} run {}", case.runtime.display(), case.id);
    let done = skiff_test_support::run(
        std::process::Command::new("sh").args(["-c", &line]).current_dir(case.bundle.path()),
        "",
    )
    .ok();
    assert_eq!(done.out, "CapEff:\t0000000000000020\n");
    let want = "can't grant capability CAP_NET_RAW: the runtime does not have it itself";
    assert!(done.err.contains(want), "{}", done.err);
    case.end();
}

#[test]
fn capabilities_that_nobody_knows_are_passed_over_with_a_warning() {
    let case = Case::new(&["sleep", "100"]).with(|spec| {
        let caps = json!(["CAP_KILL", "CAP_MOONWALK"]);
        spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    let warned = case.detached(&["run", "-d", &case.id]).ok().err;
    assert!(warned.contains("CAP_MOONWALK"), "{warned}");
    let seen = ["grep", "CapEff", "/proc/self/status"];
    let args = [&["exec", "--cap", "CAP_NET_RAW", "--cap", "CAP_MARSWALK", &case.id][..], &seen].concat();
    let done = case.cmd(&args).ok();
    assert_eq!(done.out, "CapEff:\t0000000000002020\n");
    assert!(done.err.contains("CAP_MARSWALK"), "{}", done.err);
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}
