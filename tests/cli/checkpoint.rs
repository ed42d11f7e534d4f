//! `checkpoint` and `restore`, which need a criu(8) that can dump on this kernel; all but the errors are ignored
//! elsewhere.

use serde_json::json;

use super::{Case, is_skiff};

const COUNT: &str = "i=0; while :; do i=$((i + 1)); echo $i >/tmp/count; sleep 0.1; done";

fn count(case: &Case, id: &str) -> u64 {
    case.cmd(&["exec", id, "cat", "/tmp/count"]).ok().out.trim().parse().unwrap_or(0)
}

fn counting() -> Case {
    let case = Case::sh(COUNT).with(|spec| {
        spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    });
    assert_eq!(quietly(&case, &["run", "-d", &case.id]), Some(0));
    skiff_test_support::eventually("it counts", || count(&case, &case.id) > 3);
    case
}

/// What CRIU dumps must not have files of the host open, as streams either. The exit code.
fn quietly(case: &Case, args: &[&str]) -> Option<i32> {
    let null = std::process::Stdio::null;
    let mut command = case.command(args);
    command.stdin(null()).stdout(null()).stderr(null()).status().unwrap().code()
}

fn state(case: &Case) -> String {
    let state = case.cmd(&["state", &case.id]).ok().out;
    serde_json::from_str::<serde_json::Value>(&state).unwrap()["status"].as_str().unwrap().to_string()
}

#[test]
#[ignore = "needs a working criu"]
fn a_container_goes_on_where_it_was() {
    let case = counting();
    for _ in 0..2 {
        case.cmd(&["checkpoint", "--image-path", "images", "--work-path", "work", &case.id]).ok();
        assert!(case.cmd(&["state", &case.id]).failed().err.contains("does not exist"));
        let restore = ["restore", "-d", "--image-path", "images", "--work-path", "work", &case.id];
        assert_eq!(quietly(&case, &restore), Some(0));
        assert_eq!(state(&case), "running");
        let before = count(&case, &case.id);
        assert!(before > 3, "it has not begun again: {before}");
        skiff_test_support::eventually("it counts on", || count(&case, &case.id) > before);
        // CRIU has made it a time namespace: whoever enters it is in that, too, or the next dump cannot be restored.
        let clock = |of: &str| case.cmd(&["exec", &case.id, "readlink", &format!("/proc/{of}/ns/time")]).ok().out;
        assert_eq!(clock("self"), clock("1"));
        assert_eq!(quietly(&case, &["exec", "-d", &case.id, "sleep", "1000"]), Some(0));
    }
    case.cmd(&["kill", &case.id, "KILL"]).ok();
    skiff_test_support::eventually("it has stopped", || state(&case) == "stopped");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
#[ignore = "needs a working criu"]
fn a_dump_can_leave_the_container_running() {
    let case = counting();
    case.cmd(&["checkpoint", "--pre-dump", "--image-path", "first", &case.id]).ok();
    case.cmd(&["checkpoint", "--parent-path", "../first", "--leave-running", "--image-path", "images", &case.id]).ok();
    assert_eq!(state(&case), "running");
    let err = case.cmd(&["checkpoint", "--parent-path", "../no", "--image-path", "images", &case.id]).failed().err;
    assert!(err.contains("invalid --parent-path"), "{err}");
    case.cmd(&["delete", "--force", &case.id]).ok();
    let restored = format!("{}-again", case.id);
    assert_eq!(quietly(&case, &["restore", "-d", "--image-path", "images", &restored]), Some(0));
    assert!(count(&case, &restored) > 3);
    case.cmd(&["delete", "--force", &restored]).ok();
    case.end();
}

#[test]
#[ignore = "needs a working criu"]
fn binds_pipes_and_masks_are_restored() {
    let case = Case::sh("read line; cat /data/file; echo got $line; exit 6").with(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/link", "type": "bind", "source": "data", "options": ["rbind"]}));
        mounts.push(json!({"destination": "/data/inner", "type": "bind", "source": "inner", "options": ["bind"]}));
        spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/acpi", "/proc/keys"]);
    });
    let dir = case.bundle.path();
    std::os::unix::fs::symlink("data", case.bundle.rootfs().join("link")).unwrap();
    for name in ["data", "inner"] {
        std::fs::create_dir(dir.join(name)).unwrap();
    }
    std::fs::write(dir.join("data/file"), "content ").unwrap();
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let ((input, writer), (reader, output)) = (pipe(), pipe());
    let run = |args: &[&str]| {
        let mut command = case.command(args);
        command.stdin(input.try_clone().unwrap()).stdout(output.try_clone().unwrap());
        assert!(command.stderr(std::process::Stdio::null()).status().unwrap().success(), "{args:?}");
    };
    run(&["run", "-d", &case.id]);
    case.cmd(&["checkpoint", "--image-path", "images", &case.id]).ok();
    run(&["restore", "-d", "--image-path", "images", &case.id]);
    nix::unistd::write(&writer, b"it\n").unwrap();
    skiff_test_support::eventually("it has stopped", || state(&case) == "stopped");
    drop((input, output, writer));
    let text = std::io::read_to_string(std::fs::File::from(reader)).unwrap();
    assert_eq!(text, "content got it\n");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
#[ignore = "needs a working criu"]
fn a_restore_in_the_foreground_has_the_exit_status() {
    let case = Case::sh("while ! test -e /data/go; do sleep 0.1; done; exit 9").with(|spec| {
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"destination": "/data", "type": "bind", "source": "data", "options": ["rbind"]}));
    });
    std::fs::create_dir(case.bundle.path().join("data")).unwrap();
    assert_eq!(quietly(&case, &["run", "-d", &case.id]), Some(0));
    case.cmd(&["checkpoint", "--image-path", "images", &case.id]).ok();
    std::fs::write(case.bundle.path().join("data/go"), "").unwrap();
    assert_eq!(quietly(&case, &["restore", "--image-path", "images", &case.id]), Some(9));
    assert!(case.cmd(&["state", &case.id]).failed().err.contains("does not exist"));
    case.end();
}

#[test]
#[ignore = "needs a working criu"]
fn a_terminal_comes_back_over_the_console_socket() {
    let case = Case::sh("read line; exit 3").with(|spec| spec["process"]["terminal"] = json!(true));
    let socket = case.bundle.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let masters = std::thread::spawn(move || [(), ()].map(|()| skiff_test_support::receive_console(&listener).1));
    let socket = socket.to_str().unwrap();
    case.detached(&["run", "-d", "--console-socket", socket, &case.id]).ok();
    case.cmd(&["checkpoint", "--image-path", "images", &case.id]).ok();
    case.detached(&["restore", "-d", "--console-socket", socket, "--image-path", "images", &case.id]).ok();
    let [_, master] = masters.join().unwrap();
    nix::unistd::write(&master, b"word\n").unwrap();
    skiff_test_support::eventually("it has stopped", || state(&case) == "stopped");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn what_cannot_be_dumped_or_restored_is_an_error() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["create", &case.id]).ok();
    let err = case.cmd(&["checkpoint", &case.id]).failed().err;
    assert!(err.contains("Container cannot be checkpointed in created state"), "{err}");
    case.cmd(&["delete", "--force", &case.id]).ok();
    if is_skiff() {
        let err = case.detached(&["restore", "-d", "--image-path", "none", &case.id]).failed().err;
        assert!(err.contains("image path") && err.contains("no such directory"), "{err}");
        // Nothing in it is an image.
        std::fs::create_dir(case.bundle.path().join("empty")).unwrap();
        case.detached(&["restore", "-d", "--image-path", "empty", &case.id]).failed();
        assert!(case.bundle.rootfs().join("bin").exists(), "the rootfs is as it was");
    }
    case.end();
}
