//! `delete`, as containerd runs it when a shim is gone, or is not.

use std::path::Path;
use std::process::Command;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skiff_test_support::{LeakCheck, eventually};

use crate::daemon::{Container, Daemon, NAMESPACE, is_skiff, program, refused};

/// Runs `delete` for a container: its answer is all of stdout.
fn delete(container: &Container) -> DeleteResponse {
    // The Go shim looks for the bundle beside its own, by the id.
    let beside = container.bundle.path().with_file_name(&container.id);
    let _ = std::os::unix::fs::symlink(container.bundle.path(), &beside);
    let output = Command::new(program())
        .args(["-namespace", NAMESPACE, "-address", "/none", "-publish-binary", "/bin/true", "-id", &container.id])
        .arg("-bundle")
        .arg(container.bundle.path())
        .arg("delete")
        .current_dir(container.bundle.path())
        .stdin(std::process::Stdio::null())
        .output()
        .expect("the shim runs");
    let _ = std::fs::remove_file(&beside);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    DeleteResponse::parse_from_bytes(&output.stdout).expect("an answer")
}

fn running(container: &Container) -> u32 {
    container.create().unwrap();
    container.begin("").unwrap()
}

fn die(daemon: &Daemon) {
    let pid = daemon.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    eventually("it is dead", || {
        std::os::unix::net::UnixStream::connect(daemon.address.trim_start_matches("unix://")).is_err()
    });
}

fn gone(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

#[test]
fn of_a_running_container_whose_shim_is_dead() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    let pid = running(&daemon);
    die(&daemon);
    let answers: Vec<DeleteResponse> = std::thread::scope(|scope| {
        // containerd may be at it more than once; the Go shim's runc minds.
        let at_once = if is_skiff() { 4 } else { 1 };
        let deletes: Vec<_> = (0..at_once).map(|_| scope.spawn(|| delete(&daemon))).collect();
        deletes.into_iter().map(|delete| delete.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|answer| answer.exit_status == 137 && answer.exited_at.seconds > 0), "{answers:?}");
    assert!(answers.iter().any(|answer| answer.pid == pid) || !is_skiff(), "{answers:?}");
    eventually("its process is gone", || gone(pid));
    assert_eq!(delete(&daemon).exit_status, 137, "again: nothing is left, which is no error");
    LeakCheck::new(&[&daemon.id]).end();
    let socket = daemon.address.trim_start_matches("unix://").to_string();
    if is_skiff() {
        assert!(!Path::new(&socket).exists());
    } else {
        std::fs::remove_file(socket).unwrap();
    }
}

/// After an ordinary Delete, and beside others in a shim that lives, it changes nothing.
#[test]
fn of_a_container_that_is_gone_from_a_shim_that_lives() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    let other = daemon.member(&["sleep", "1000"]);
    running(&daemon);
    let pid = running(&other);
    daemon.finish();
    assert_eq!(delete(&daemon).exit_status, 137);
    assert!(!gone(pid));
    other.exec("e", &["true"]).unwrap();
    other.begin("e").unwrap();
    assert_eq!(other.wait("e").unwrap(), 0);
    other.finish();
    refused(daemon.state(""), Code::NOT_FOUND);
    daemon.end();
}
