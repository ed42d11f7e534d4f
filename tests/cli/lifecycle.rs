//! Create, start, state, list, ps, kill, delete, run.

use serde_json::json;
use skiff_test_support::eventually;

use super::Case;

#[test]
fn the_walk_through_of_a_newcomer() {
    let case = Case::new(&["sleep", "5"]);
    std::fs::remove_file(case.bundle.path().join("config.json")).unwrap();
    case.cmd(&["spec"]).ok();
    case.cmd(&["spec"]).failed();
    let config = case.bundle.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("\"sh\"", "\"sleep\", \"5\"").replace("\"terminal\": true", "\"terminal\": false");
    std::fs::write(&config, text).unwrap();

    case.detached(&["create", &case.id]).ok();
    assert_eq!(case.status(), "created");
    case.cmd(&["start", &case.id]).ok();
    assert_eq!(case.status(), "running");
    let ps = case.cmd(&["ps", &case.id]).ok().out;
    assert!(ps.lines().next().unwrap().contains("PID") && ps.contains("sleep 5"), "{ps}");
    let list = case.cmd(&["list"]).ok().out;
    let line = list.lines().find(|line| line.starts_with(&case.id)).expect("a line of the list");
    assert!(line.contains("running") && line.contains(case.bundle.path().to_str().unwrap()), "{line}");
    assert!(list.starts_with("ID "), "{list}");
    eventually("the container stops", || case.status() == "stopped");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn state_tells_what_the_spec_wants() {
    let case = Case::new(&["sleep", "100"]).with(|spec| spec["annotations"] = json!({"a": "b"}));
    case.detached(&["run", "-d", &case.id]).ok();
    let state = case.state();
    assert_eq!(state["id"], case.id.as_str());
    assert_eq!(state["status"], "running");
    assert_eq!(state["bundle"], case.bundle.path().to_str().unwrap());
    assert_eq!(state["rootfs"], case.bundle.rootfs().to_str().unwrap());
    assert_eq!(state["annotations"], json!({"a": "b"}));
    let pid = state["pid"].as_i64().unwrap();
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(line, "sleep\x00100\x00");
    let json = case.cmd(&["ps", "--format", "json", &case.id]).ok().out;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), json!([pid]));
    case.cmd(&["kill", &case.id, "KILL"]).ok();
    eventually("the container stops", || case.status() == "stopped");
    assert_eq!(case.state()["pid"], 0);
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn run_gives_output_and_exit_status() {
    let case = Case::sh("echo out; echo err >&2; exit 42");
    let done = case.run();
    assert_eq!((done.code, done.out.as_str()), (42, "out\n"));
    assert!(done.err.contains("err\n"));
    case.end();
}

/// A process may call itself anything, also what is no UTF-8: it lives all the same.
#[test]
fn a_name_that_is_no_text_is_not_the_end_of_a_container() {
    let name = r"printf '\377) Z \376' > /proc/1/comm; echo named; while :; do read -t 1000 x < /gate; done";
    let case = Case::sh(name);
    let made = std::process::Command::new("mkfifo").arg(case.bundle.rootfs().join("gate")).status().unwrap();
    assert!(made.success());
    case.detached(&["run", "-d", &case.id]).ok();
    let out = case.bundle.path().join("out");
    eventually("it has the name", || std::fs::read_to_string(&out).unwrap() == "named\n");
    let comm = std::fs::read(format!("/proc/{}/comm", case.state()["pid"])).unwrap();
    assert_eq!(comm, b"\xff) Z \xfe\n");
    assert_eq!(case.status(), "running");
    let list = case.cmd(&["list"]).ok().out;
    assert!(list.lines().any(|line| line.starts_with(&case.id) && line.contains("running")), "{list}");
    case.cmd(&["ps", &case.id]).ok();
    let err = case.cmd(&["delete", &case.id]).failed().err;
    assert!(err.contains("not stopped") || err.contains("running"), "{err}");
    assert_eq!(case.status(), "running");
    case.cmd(&["kill", &case.id, "KILL"]).ok();
    eventually("the container stops", || case.status() == "stopped");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn run_takes_stdin() {
    let case = Case::new(&["cat"]);
    let done = skiff_test_support::run(&mut case.command(&["run", &case.id]), "through").ok();
    assert_eq!(done.out, "through");
    case.end();
}

#[test]
fn a_signal_is_128_and_its_number() {
    let case = Case::sh("kill -KILL $$").with(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|ns| ns["type"] != "pid");
    });
    assert_eq!(case.run().code, 137);
    case.end();
}

#[test]
fn an_id_is_taken_until_it_is_deleted() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["create", &case.id]).ok();
    let done = case.detached(&["create", &case.id]).failed();
    assert!(done.err.contains("container with given ID already exists"), "{}", done.err);
    assert_eq!(case.status(), "created");
    case.cmd(&["delete", &case.id]).ok();
    case.detached(&["create", &case.id]).ok();
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_running_container_is_not_deleted_unforced() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let done = case.cmd(&["delete", &case.id]).failed();
    assert!(done.err.contains("that is not stopped: running"), "{}", done.err);
    case.cmd(&["delete", "-f", &case.id]).ok();
    let done = case.cmd(&["delete", &case.id]).failed();
    assert!(done.err.contains("container does not exist"), "{}", done.err);
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn start_starts_once() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["create", &case.id]).ok();
    case.cmd(&["start", &case.id]).ok();
    let done = case.cmd(&["start", &case.id]).failed();
    assert!(done.err.contains("cannot start an already running container"), "{}", done.err);
    case.cmd(&["kill", &case.id, "9"]).ok();
    eventually("the container stops", || case.status() == "stopped");
    case.cmd(&["start", &case.id]).failed();
    let done = case.cmd(&["kill", &case.id]).failed();
    assert!(done.err.contains("container not running"), "{}", done.err);
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn a_pid_file_is_there_when_create_is_done() {
    let case = Case::new(&["sleep", "100"]);
    let file = case.bundle.path().join("pid");
    case.detached(&["create", "--pid-file", file.to_str().unwrap(), &case.id]).ok();
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, case.state()["pid"].to_string(), "no newline");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn edits_of_config_json_after_create_change_nothing() {
    let case = Case::sh("echo first");
    case.detached(&["create", &case.id]).ok();
    std::fs::write(case.bundle.path().join("config.json"), "{}").unwrap();
    case.cmd(&["start", &case.id]).ok();
    let out = case.bundle.path().join("out");
    eventually("the output of what was created", || std::fs::read_to_string(&out).unwrap() == "first\n");
    eventually("the container stops", || case.status() == "stopped");
    case.cmd(&["delete", &case.id]).ok();
    case.end();
}

#[test]
fn paused_containers_wait() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    case.cmd(&["pause", &case.id]).ok();
    assert_eq!(case.status(), "paused");
    case.cmd(&["exec", &case.id, "true"]).failed();
    case.cmd(&["resume", &case.id]).ok();
    case.cmd(&["exec", &case.id, "true"]).ok();
    let done = case.cmd(&["resume", &case.id]).failed();
    assert!(done.err.contains("container not paused"), "{}", done.err);
    case.cmd(&["pause", &case.id]).ok();
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_terminal_is_the_callers() {
    let case =
        Case::sh("test -t 0 && test -t 1 && tty && exit 5").with(|spec| spec["process"]["terminal"] = json!(true));
    let line = format!("'{}' run {}", case.runtime.display(), case.id);
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).current_dir(case.bundle.path());
    let done = skiff_test_support::run(&mut command, "");
    assert_eq!(done.code, 5, "{}", done.out);
    assert!(done.out.contains("/dev/pts/0") || done.out.contains("/dev/console"), "{}", done.out);
    let refused = case.detached(&["create", &case.id]).failed();
    assert!(refused.err.contains("cannot allocate tty if"), "{}", refused.err);
    case.end();
}

#[test]
fn a_console_socket_takes_the_terminal() {
    let case = Case::sh("tty; sleep 100").with(|spec| spec["process"]["terminal"] = json!(true));
    let socket = case.bundle.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    case.detached(&["run", "-d", "--console-socket", socket.to_str().unwrap(), &case.id]).ok();
    let (name, mut master) = skiff_test_support::receive_console(&listener);
    assert!(name.starts_with("/dev/"), "{name}");
    let mut buffer = [0; 64];
    let n = std::io::Read::read(&mut master, &mut buffer).unwrap();
    assert!(String::from_utf8_lossy(&buffer[..n]).starts_with("/dev/"));
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

/// Who has the master is told by a hang-up that there is nobody at the other end.
#[test]
fn a_console_that_was_handed_over_hangs_up_when_the_rest_fails() {
    use std::io::Read;
    for (what, args, hook, script) in [
        ("a create", &["create", "--pid-file", "no/such/dir"][..], "", "true"),
        ("a hook", &["run", "-d"], "exit 3", "true"),
        // It has left a child behind.
        ("a hook with a child", &["run", "-d"], "sleep 1000 & exit 3", "true"),
        ("a start", &["run", "-d"], "", "no program"),
    ] {
        if args[0] == "run" && !super::is_skiff() {
            // runc has said that it runs by then.
            continue;
        }
        let case = Case::new(&["/tmp/program"]).with(|spec| spec["process"]["terminal"] = json!(true));
        let program = case.bundle.rootfs().join("tmp/program");
        std::fs::write(&program, if script == "true" { "#!/bin/sh\n" } else { "?" }).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let case = case.with(|spec| {
            if !hook.is_empty() {
                spec["hooks"]["startContainer"] = json!([{"path": "/bin/sh", "args": ["sh", "-c", hook]}]);
            }
        });
        let socket = case.bundle.path().join("console.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let args = [args, &["--console-socket", socket.to_str().unwrap(), &case.id]].concat();
        case.detached(&args).failed();
        let (mut stream, _) = listener.accept().unwrap();
        let (_, mut master) = skiff_test_support::receive_console_of(&stream);
        let mut rest = Vec::new();
        assert_eq!(stream.read_to_end(&mut rest).unwrap(), 0, "{what}: the socket's end");
        let err = master.read_to_end(&mut rest).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EIO), "{what}: {rest:?}");
        case.end();
    }
}

/// So does that of an exec whose pidfd nobody takes.
#[test]
fn a_console_of_an_exec_hangs_up_when_the_rest_fails() {
    use std::io::Read;
    if !super::since(2) {
        // runc has the pidfd socket since 1.2.
        return;
    }
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let socket = case.bundle.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let args = ["exec", "-d", "-t", "--console-socket", socket.to_str().unwrap(), "--pidfd-socket", "no/such/socket"];
    let args = [&args[..], &[&case.id, "sh", "-c", "sleep 1000 & exec sleep 1000"]].concat();
    case.detached(&args).failed();
    let (_, mut master) = skiff_test_support::receive_console(&listener);
    let err = master.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(libc::EIO));
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn who_waits_for_a_terminal_sees_that_none_comes() {
    let case = Case::new(&["no-such-program"]).with(|spec| spec["process"]["terminal"] = json!(true));
    let socket = case.bundle.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    case.detached(&["create", "--console-socket", socket.to_str().unwrap(), &case.id]).failed();
    listener.set_nonblocking(true).unwrap();
    let (mut stream, _) = listener.accept().expect("it was there");
    let mut buffer = [0; 64];
    assert_eq!(std::io::Read::read(&mut stream, &mut buffer).unwrap(), 0, "and has gone without a terminal");
    case.end();
}

#[test]
fn hooks_get_the_state_in_their_order() {
    let case = Case::new(&["true"]).with(|_| {});
    let log = case.bundle.path().join("hooks");
    let log_name = log.to_str().unwrap().to_string();
    let case = case.with(|spec| {
        let hook = |name: &str| {
            let script = format!("printf '%s ' {name} >>{log_name}; cat >>{log_name}; echo >>{log_name}");
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
        };
        spec["hooks"] = json!({
            "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
            "createContainer": hook("createContainer"), "poststart": hook("poststart"), "poststop": hook("poststop"),
        });
        spec["annotations"] = json!({"k": "v"});
    });
    case.run().ok();
    let text = std::fs::read_to_string(&log).unwrap();
    let mut names = Vec::new();
    for line in text.lines() {
        let (name, state) = line.split_once(' ').unwrap();
        names.push(name);
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["id"], case.id.as_str());
        assert_eq!(state["bundle"], case.bundle.path().to_str().unwrap());
        assert_eq!(state["annotations"]["k"], "v");
        assert_eq!(state["status"] == "stopped", name == "poststop", "{line}");
    }
    assert_eq!(names, ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]);
    case.end();
}

#[test]
fn a_failing_hook_fails_the_create() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let case = Case::new(&["true"]).with(|spec| {
            spec["hooks"] = json!({});
            spec["hooks"][kind] = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"]}]);
        });
        let done = case.run().failed();
        assert!(["hook #0", "exit status 3", "why"].iter().all(|text| done.err.contains(text)), "{kind}: {}", done.err);
        case.end();
    }
}
