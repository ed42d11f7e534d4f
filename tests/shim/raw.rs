//! The Task service without containerd: a client of our own drives each call in each state.

mod systemd;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, KillRequest, PauseRequest,
    PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest, StatsRequest, Status,
    UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::{self, Code};
use skiff_test_support::{Bundle, LeakCheck, eventually, has_controllers};

use crate::daemon::{Daemon, context, frame, is_skiff, refused};

/// Reads a FIFO to its end, from a thread.
pub fn reader(path: &Path) -> JoinHandle<String> {
    let path = path.to_path_buf();
    std::thread::spawn(move || std::fs::read_to_string(path).expect("a FIFO"))
}

#[test]
fn a_life_on_fifos() {
    let daemon = Daemon::start(&["sh", "-c", "echo out; echo err >&2; exit 9"]);
    let (out, err) = (daemon.fifo("out"), daemon.fifo("err"));
    let (out_read, err_read) = (reader(&out), reader(&err));
    let pid = daemon.create_with([Path::new(""), &out, &err]).unwrap();
    assert_eq!(daemon.status(""), Status::CREATED);
    let connected = daemon.client.connect(context(), &ConnectRequest { id: daemon.id.clone(), ..Default::default() });
    assert_eq!(connected.unwrap().task_pid, pid);
    let waiter = {
        let (client, id) = (daemon.connect(), daemon.id.clone());
        std::thread::spawn(move || client.wait(context(), &WaitRequest { id, ..Default::default() }))
    };
    assert_eq!(daemon.begin("").unwrap(), pid);
    assert_eq!(waiter.join().unwrap().unwrap().exit_status, 9);
    assert_eq!(daemon.wait("").unwrap(), 9, "Wait answers after the exit too");
    let state = daemon.state("").unwrap();
    assert_eq!((state.status.enum_value(), state.exit_status, state.pid), (Ok(Status::STOPPED), 9, pid));
    let pids = daemon.client.pids(context(), &PidsRequest { id: daemon.id.clone(), ..Default::default() }).unwrap();
    if is_skiff() {
        assert_eq!(pids.processes.iter().map(|p| p.pid).collect::<Vec<_>>(), [pid], "until it is deleted");
    }
    daemon.client.stats(context(), &StatsRequest { id: daemon.id.clone(), ..Default::default() }).unwrap();
    refused(daemon.kill("", 9, false), Code::NOT_FOUND);
    refused(daemon.begin(""), Code::FAILED_PRECONDITION);
    refused(daemon.exec("late", &["true"]), Code::FAILED_PRECONDITION);
    assert_eq!(daemon.delete("").unwrap(), 9);
    refused(daemon.delete(""), Code::NOT_FOUND);
    assert_eq!((out_read.join().unwrap().as_str(), err_read.join().unwrap().as_str()), ("out\n", "err\n"));
    daemon.end();
}

#[test]
fn unknown_ids_are_not_found_and_connect_never_fails() {
    let daemon = Daemon::start(&["true"]);
    let id = || "unknown".to_string();
    let c = &daemon.client;
    refused(c.state(context(), &StateRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.start(context(), &StartRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.delete(context(), &DeleteRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.pids(context(), &PidsRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.pause(context(), &PauseRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.resume(context(), &ResumeRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.kill(context(), &KillRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.wait(context(), &WaitRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.stats(context(), &StatsRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.close_io(context(), &CloseIORequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    refused(c.resize_pty(context(), &ResizePtyRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    let resources = || MessageField::some(Any { value: b"{}".to_vec(), ..Any::default() });
    let update = UpdateTaskRequest { id: id(), resources: resources(), ..Default::default() };
    refused(c.update(context(), &update), Code::NOT_FOUND);
    refused(c.checkpoint(context(), &CheckpointTaskRequest { id: id(), ..Default::default() }), Code::NOT_FOUND);
    let connected = c.connect(context(), &ConnectRequest { id: id(), ..Default::default() }).unwrap();
    assert_eq!(connected.task_pid, 0);
    assert_ne!(connected.shim_pid, 0);
    daemon.end();
}

#[test]
fn a_created_container_can_be_killed_or_deleted() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    assert_eq!(daemon.delete("").unwrap(), 137);
    daemon.create().unwrap();
    assert_eq!(daemon.delete("").unwrap(), 0);
    daemon.end();
}

#[test]
fn a_running_container_keeps_to_the_table() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    refused(daemon.create(), Code::ALREADY_EXISTS);
    daemon.begin("").unwrap();
    refused(daemon.begin(""), Code::FAILED_PRECONDITION);
    refused(daemon.delete(""), Code::FAILED_PRECONDITION);
    daemon.exec("e", &["sh", "-c", "exit 5"]).unwrap();
    refused(daemon.exec("e", &["true"]), Code::ALREADY_EXISTS);
    assert_eq!(daemon.status("e"), Status::CREATED);
    refused(daemon.kill("e", 9, false), Code::FAILED_PRECONDITION);
    daemon.begin("e").unwrap();
    assert_eq!(daemon.wait("e").unwrap(), 5);
    assert_eq!(daemon.status("e"), Status::STOPPED);
    refused(daemon.kill("e", 9, false), Code::NOT_FOUND);
    assert_eq!(daemon.delete("e").unwrap(), 5);
    refused(daemon.state("e"), Code::NOT_FOUND);
    daemon.exec("bad", &["no-such-program"]).unwrap();
    refused(daemon.begin("bad"), Code::INVALID_ARGUMENT);
    daemon.wait("bad").expect("a failed start ends the wait");
    daemon.delete("bad").expect("and can be deleted");
    daemon.exec("forked", &["sh", "-c", "sleep 999 & exit 0"]).unwrap();
    daemon.begin("forked").unwrap();
    assert_eq!(daemon.wait("forked").unwrap(), 0);
    daemon.delete("forked").unwrap();
    daemon.kill("", 15, true).unwrap();
    // sleep is init here and does not mind SIGTERM.
    daemon.kill("", 9, true).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    daemon.delete("").unwrap();
    daemon.end();
}

#[test]
fn bad_input_leaves_nothing_and_the_shim_lives_on() {
    if !is_skiff() {
        // The Go shim waits for a FIFO of stdin that is not there.
        return;
    }
    let daemon = Daemon::start(&["true"]);
    let config = daemon.bundle.path().join("config.json");
    let good = std::fs::read(&config).unwrap();
    for bad in ["{", "[]", "{}", r#"{"ociVersion":"1.0.0","process":{"args":1}}"#] {
        std::fs::write(&config, bad).unwrap();
        refused(daemon.create(), Code::INVALID_ARGUMENT);
    }
    std::fs::remove_file(&config).unwrap();
    refused(daemon.create(), Code::NOT_FOUND);
    std::fs::write(&config, &good).unwrap();
    daemon.create_with([Path::new("/no/such/fifo"), Path::new(""), Path::new("")]).unwrap_err();
    refused(daemon.create_with([Path::new(""), Path::new("moon:///x"), Path::new("")]), Code::INVALID_ARGUMENT);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    assert_eq!(daemon.wait("").unwrap(), 0);
    daemon.delete("").unwrap();
    daemon.end();
}

#[test]
fn stdin_goes_on_until_close_io() {
    let daemon = Daemon::start(&["cat"]);
    let (stdin, out) = (daemon.fifo("in"), daemon.fifo("out"));
    let output = reader(&out);
    daemon.create_with([&stdin, &out, Path::new("")]).unwrap();
    daemon.begin("").unwrap();
    for text in ["one ", "two "] {
        // A client that goes away does not end the stream.
        std::fs::OpenOptions::new().write(true).open(&stdin).unwrap().write_all(text.as_bytes()).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(daemon.status(""), Status::RUNNING);
    let close = CloseIORequest { id: daemon.id.clone(), stdin: true, ..Default::default() };
    daemon.client.close_io(context(), &close).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 0);
    daemon.delete("").unwrap();
    assert_eq!(output.join().unwrap(), "one two ");
    daemon.end();
}

#[test]
fn output_waits_for_a_reader_that_comes_back() {
    let daemon = Daemon::start(&["sh", "-c", "seq 1 100000; exit 4"]);
    let out = daemon.fifo("out");
    let first = {
        let out = out.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 1000];
            let mut file = std::fs::File::open(out).unwrap();
            file.read_exact(&mut buffer).unwrap();
            buffer
        })
    };
    daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
    daemon.begin("").unwrap();
    let mut text = first.join().unwrap();
    // Nobody reads for a while: as when containerd is restarted.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(daemon.status(""), Status::RUNNING, "it waits for its reader");
    let rest = reader(&out);
    assert_eq!(daemon.wait("").unwrap(), 4);
    daemon.delete("").unwrap();
    text.extend(rest.join().unwrap().bytes());
    let want: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(text == want.as_bytes(), "not a byte is lost: {} of {}", text.len(), want.len());
    daemon.end();
}

/// Prints the inode number of its stdout.
const WHICH: [&str; 3] = ["sh", "-c", "stat -Lc %i /proc/self/fd/1"];

/// What `WHICH` prints for the init and for an exec process of this bundle, and the inode numbers of their FIFOs.
fn which_stdout(bundle: Bundle) -> [(u64, u64); 2] {
    let daemon = Daemon::with(bundle);
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&path.metadata().unwrap());
    let number = |text: String| text.trim().parse::<u64>().unwrap_or_else(|_| panic!("a number: {text:?}"));
    let (out, exec_out) = (daemon.fifo("out"), daemon.fifo("exec-out"));
    let (text, exec_text) = (reader(&out), reader(&exec_out));
    let pid = daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
    daemon.begin("").unwrap();
    eventually("the init has told", || {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sleep"))
    });
    daemon.exec_to("which", &WHICH, &exec_out).unwrap();
    daemon.begin("which").unwrap();
    assert_eq!(daemon.wait("which").unwrap(), 0);
    daemon.delete("which").unwrap();
    let line = format!("/proc/{}/cmdline", daemon.state("").unwrap().pid);
    eventually("the init has printed", || std::fs::read_to_string(&line).unwrap().starts_with("sleep"));
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    daemon.delete("").unwrap();
    let seen = [(number(text.join().unwrap()), inode(&out)), (number(exec_text.join().unwrap()), inode(&exec_out))];
    daemon.end();
    seen
}

fn prints_which() -> Bundle {
    Bundle::new(&["sh", "-c", "stat -Lc %i /proc/self/fd/1; exec sleep 1000"])
}

#[test]
fn processes_write_to_the_fifos_themselves() {
    if !is_skiff() {
        // The Go shim copies everything.
        return;
    }
    let [init, exec] = which_stdout(prints_which());
    assert_eq!(init.0, init.1, "no pipe and no copy between");
    assert_eq!(exec.0, exec.1, "no pipe and no copy between");
}

#[test]
fn who_may_outlive_its_delete_writes_to_a_pipe() {
    if !is_skiff() {
        // The Go shim copies everything.
        return;
    }
    let mut bundle = prints_which();
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|ns| ns["type"] != "pid");
    let [init, exec] = which_stdout(bundle);
    assert!(init.0 != init.1 && exec.0 != exec.1, "without a pid namespace of its own: {init:?} {exec:?}");

    let mut bundle = prints_which();
    bundle.spec["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw", "nosuid", "nodev"]}));
    let [init, exec] = which_stdout(bundle);
    assert_eq!(init.0, init.1, "the init's processes end with it");
    assert_ne!(exec.0, exec.1, "where cgroups can be written it might leave its own");
}

#[test]
fn what_an_exec_leaves_running_delays_no_delete_and_loses_no_line() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    let out = daemon.fifo("out");
    let text = reader(&out);
    daemon.exec_to("leaves", &["sh", "-c", "(sleep 1; echo late; sleep 1000) & echo now"], &out).unwrap();
    daemon.begin("leaves").unwrap();
    assert_eq!(daemon.wait("leaves").unwrap(), 0);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    daemon.delete("leaves").unwrap();
    assert_eq!(text.join().unwrap(), "now\nlate\n", "the end comes with Delete, and all before it");
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    daemon.delete("").unwrap();
    daemon.end();
}

#[test]
fn a_reader_that_comes_after_the_exit_gets_what_was_written() {
    if !is_skiff() {
        // The Go shim has closed its FIFO by then.
        return;
    }
    let daemon = Daemon::start(&["sh", "-c", "sleep 0.3; seq 1 1000"]);
    let out = daemon.fifo("out");
    let first = {
        let out = out.clone();
        std::thread::spawn(move || drop(std::fs::File::open(out).unwrap()))
    };
    daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
    first.join().unwrap();
    daemon.begin("").unwrap();
    assert_eq!(daemon.wait("").unwrap(), 0);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let rest = reader(&out);
    daemon.delete("").unwrap();
    let want: String = (1..=1000).map(|n| format!("{n}\n")).collect();
    assert_eq!(rest.join().unwrap(), want, "the kernel kept it for who comes back");
    daemon.end();
}

#[test]
fn a_user_who_is_not_root_can_open_its_stdout_again() {
    let mut bundle = Bundle::new(&["sh", "-c", "echo one; echo two >/dev/stdout; echo three >>/proc/self/fd/1"]);
    bundle.spec["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000});
    let daemon = Daemon::with(bundle);
    let out = daemon.fifo("out");
    let text = reader(&out);
    daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
    daemon.begin("").unwrap();
    assert_eq!(daemon.wait("").unwrap(), 0);
    daemon.delete("").unwrap();
    assert_eq!(text.join().unwrap(), "one\ntwo\nthree\n");
    daemon.end();
}

#[test]
fn a_created_container_holds_no_reader_up() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    let out = daemon.fifo("out");
    let text = reader(&out);
    daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
    daemon.delete("").unwrap();
    assert_eq!(text.join().unwrap(), "", "its end comes with Delete");
    daemon.end();
}

#[test]
fn a_terminal_that_leads_nowhere_leaves_nothing() {
    if !is_skiff() {
        // The Go shim leaves a container behind.
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.spec["process"]["terminal"] = serde_json::json!(true);
    let daemon = Daemon::with(bundle);
    let request = CreateTaskRequest {
        id: daemon.id.clone(),
        bundle: daemon.bundle.path().display().to_string(),
        terminal: true,
        stdout: "/no/such/fifo".into(),
        ..CreateTaskRequest::default()
    };
    refused(daemon.client.create(context(), &request), Code::UNKNOWN);
    refused(daemon.state(""), Code::NOT_FOUND);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    let exec = daemon.terminal_request("tty", &["sleep", "7"], Path::new("/no/such/fifo"));
    daemon.client.exec(context(), &exec).unwrap();
    refused(daemon.begin("tty"), Code::UNKNOWN);
    daemon.delete("tty").unwrap();
    let pids = daemon.client.pids(context(), &PidsRequest { id: daemon.id.clone(), ..Default::default() }).unwrap();
    assert_eq!(pids.processes.len(), 1, "only the init is left");
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    daemon.delete("").unwrap();
    daemon.end();
}

/// runc's own commands, which people and programs use on what containerd runs, know what a shim has made.
#[test]
fn runc_reads_the_state() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    let pid = daemon.create().unwrap();
    daemon.begin("").unwrap();
    let root = format!("/run/containerd/runc/{}", crate::daemon::NAMESPACE);
    let runc = |args: &[&str]| {
        skiff_test_support::run(std::process::Command::new("runc").args(["--root", &root]).args(args), "").ok().out
    };
    let state: serde_json::Value = serde_json::from_str(&runc(&["state", &daemon.id])).unwrap();
    assert_eq!((&state["status"], &state["pid"]), (&"running".into(), &pid.into()));
    assert!(runc(&["list", "--quiet"]).lines().any(|id| id == daemon.id));
    assert!(runc(&["ps", "--format", "json", &daemon.id]).contains(&pid.to_string()));
    runc(&["delete", "--force", &daemon.id]);
    assert_eq!(daemon.wait("").unwrap(), 137);
    assert_eq!(daemon.status(""), Status::STOPPED);
    daemon.delete("").unwrap();
    daemon.end();
}

/// A process that shares the host's pid namespace leaves nobody: when its exit is told, they are gone.
#[test]
fn what_an_init_leaves_is_gone_with_its_exit() {
    let mut bundle = Bundle::new(&["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 4711 & done; exec sleep 1000"]);
    bundle.spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    let daemon = Daemon::with(bundle);
    let pid = daemon.create().unwrap();
    daemon.begin("").unwrap();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let pids = || std::fs::read_to_string(&children).unwrap_or_default();
    skiff_test_support::eventually("all are there", || pids().split_whitespace().count() == 8);
    let pids = pids();
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    for child in pids.split_whitespace() {
        let line = std::fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
        assert!(!line.contains("4711"), "{child} is still there");
    }
    daemon.delete("").unwrap();
    daemon.end();
}

/// What a shim blocks for itself, it does not hand on.
#[test]
fn a_hook_may_be_signalled() {
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    let file = bundle.path().join("mask");
    let script = format!("grep SigBlk /proc/self/status >> {}", file.display());
    let hook = serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    for kind in ["createRuntime", "createContainer", "poststart", "poststop"] {
        bundle.spec["hooks"][kind] = hook.clone();
    }
    let daemon = Daemon::with(bundle);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    daemon.finish();
    let masks = std::fs::read_to_string(file).unwrap();
    let empty: Vec<&str> = masks.lines().filter(|line| line.ends_with("\t0000000000000000")).collect();
    assert_eq!(empty.len(), 4, "{masks}");
    daemon.end();
}

#[test]
fn limits_are_updated() {
    if !has_controllers(&["pids", "cpuset"]) {
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    let update = |resources: &str| {
        let resources = MessageField::some(Any { value: resources.as_bytes().to_vec(), ..Any::default() });
        let request = UpdateTaskRequest { id: daemon.id.clone(), resources, ..Default::default() };
        daemon.client.update(context(), &request).map(drop)
    };
    update(r#"{"pids":{"limit":55}}"#).unwrap();
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", daemon.state("").unwrap().pid)).unwrap();
    let of = |name: &str| {
        let line = groups.lines().find(|line| line.split(':').nth(1) == Some(name))?;
        Some(line.split(':').nth(2)?.trim_start_matches('/').to_string())
    };
    let file = match of("pids") {
        Some(path) => Path::new("/sys/fs/cgroup/pids").join(path),
        None => Path::new("/sys/fs/cgroup").join(of("").unwrap()),
    };
    assert_eq!(std::fs::read_to_string(file.join("pids.max")).unwrap().trim(), "55");
    refused(update("{"), Code::INVALID_ARGUMENT);
    refused(update(r#"{"cpu":{"cpus":"nonsense"}}"#), Code::INVALID_ARGUMENT);
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    refused(update("{}"), Code::NOT_FOUND);
    daemon.delete("").unwrap();
    daemon.end();
}

#[test]
fn a_client_that_goes_away_changes_nothing() {
    if !is_skiff() {
        // The Go shim cancels what a client that goes away has asked for.
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    // The client is gone as soon as it has written: what it asked for is done all the same.
    daemon.socket().write_all(&frame(1, "Create", &daemon.create_request())).unwrap();
    eventually("the container is there", || daemon.state("").is_ok());
    daemon.begin("").unwrap();
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    daemon.delete("").unwrap();
    daemon.end();
}

#[test]
fn shutdown_is_refused_while_there_are_containers_and_remembered() {
    if !is_skiff() {
        // The Go shim forgets it.
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    daemon.client.shutdown(context(), &ShutdownRequest::default()).unwrap();
    daemon.begin("").unwrap();
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    daemon.delete("").unwrap();
    let socket = PathBuf::from(daemon.address.trim_start_matches("unix://"));
    eventually("the daemon ends by itself", || !socket.exists());
    LeakCheck::new(&[&daemon.id]).end();
}

fn checkpoint(daemon: &Daemon, path: &Path, options: &[u8]) -> ttrpc::Result<()> {
    let request = CheckpointTaskRequest {
        id: daemon.id.clone(),
        path: path.display().to_string(),
        options: MessageField::some(Any { value: options.to_vec(), ..Any::default() }),
        ..CheckpointTaskRequest::default()
    };
    daemon.client.checkpoint(context(), &request).map(drop)
}

#[test]
fn a_restore_that_fails_leaves_a_container_to_delete() {
    if !is_skiff() {
        // The Go shim asks CRIU before it looks for images.
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let images = daemon.bundle.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let request = CreateTaskRequest {
        id: daemon.id.clone(),
        bundle: daemon.bundle.path().display().to_string(),
        checkpoint: images.display().to_string(),
        ..CreateTaskRequest::default()
    };
    assert_eq!(daemon.client.create(context(), &request).unwrap().pid, 0, "nothing is made before Start");
    assert_eq!(daemon.status(""), Status::CREATED);
    refused(daemon.exec("early", &["true"]), Code::FAILED_PRECONDITION);
    refused(checkpoint(&daemon, &images, &[]), Code::FAILED_PRECONDITION);
    let err = daemon.begin("").unwrap_err();
    assert!(format!("{err}").contains("descriptors.json"), "{err}");
    assert_eq!(daemon.status(""), Status::STOPPED);
    daemon.delete("").unwrap();
    assert!(daemon.bundle.rootfs().join("bin").exists(), "the rootfs is as it was");
    daemon.client.create(context(), &request).unwrap();
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    daemon.delete("").unwrap();
    daemon.client.create(context(), &request).unwrap();
    daemon.delete("").unwrap();
    daemon.end();
}

#[test]
#[ignore = "needs a working criu"]
fn a_container_is_restored_by_its_start() {
    let mut bundle = Bundle::new(&["sh", "-c", "i=0; while sleep 0.05; do i=$((i + 1)); echo $i; done"]);
    bundle.spec["annotations"] = serde_json::json!({"io.containerd.skiff.checkpoint": "true"});
    let daemon = Daemon::with(bundle);
    let images = daemon.bundle.path().join("images");
    let (out, again) = (daemon.fifo("out"), daemon.fifo("again"));
    let text = reader(&out);
    daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
    daemon.begin("").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    checkpoint(&daemon, &images, &[]).unwrap();
    assert_eq!(daemon.status(""), Status::RUNNING, "without exit it runs on");
    // CheckpointOptions{1: exit}.
    checkpoint(&daemon, &images, &[8, 1]).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    daemon.delete("").unwrap();
    let numbers = |text: String| -> Vec<u64> { text.lines().filter_map(|line| line.parse().ok()).collect() };
    let last = *numbers(text.join().unwrap()).last().expect("it has counted");
    let text = reader(&again);
    let request = CreateTaskRequest {
        id: daemon.id.clone(),
        bundle: daemon.bundle.path().display().to_string(),
        stdout: again.display().to_string(),
        checkpoint: images.display().to_string(),
        ..CreateTaskRequest::default()
    };
    daemon.client.create(context(), &request).unwrap();
    assert_ne!(daemon.begin("").unwrap(), 0);
    assert_eq!(daemon.status(""), Status::RUNNING);
    daemon.exec("probe", &["true"]).unwrap();
    daemon.begin("probe").unwrap();
    assert_eq!(daemon.wait("probe").unwrap(), 0);
    daemon.delete("probe").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    daemon.delete("").unwrap();
    let first = *numbers(text.join().unwrap()).first().expect("it counts on");
    assert!(first >= last && first <= last + 3, "it goes on where it was: {last} {first}");
    daemon.end();
}
