//! What a container costs in things that can be counted: processes, programs and system calls. Times are the benchmark's.

use super::{Case, is_skiff};

/// Processes cloned, programs executed and system calls made by a command, its children's among them.
fn counted(case: &Case, args: &[&str]) -> (usize, usize, usize) {
    let trace = case.bundle.path().join("trace");
    let mut command = std::process::Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&trace).arg(&case.runtime).args(args).current_dir(case.bundle.path());
    skiff_test_support::run(&mut command, "").ok();
    let text = std::fs::read_to_string(&trace).unwrap();
    std::fs::remove_file(&trace).unwrap();
    let calls = || text.lines().filter_map(|line| line.split_once(' ').map(|(_, call)| call.trim_start()));
    let named = |names: &[&str]| calls().filter(|call| names.iter().any(|name| call.starts_with(name))).count();
    let all = calls().filter(|call| call.starts_with(|c: char| c.is_ascii_lowercase())).count();
    (named(&["clone(", "clone3(", "fork(", "vfork("]), named(&["execve(", "execveat("]), all)
}

#[test]
fn a_run_and_an_exec_keep_to_their_budget() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["true"]);
    let (processes, programs, calls) = counted(&case, &["run", &case.id]);
    // Ours, the same from a read-only mount, and the container's.
    assert_eq!((processes, programs), (1, 3));
    assert!(calls <= 1130, "{calls} system calls for a run");
    case.end();

    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let (processes, programs, calls) = counted(&case, &["exec", &case.id, "true"]);
    assert_eq!((processes, programs), (1, 3));
    assert!(calls <= 660, "{calls} system calls for an exec");
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}
