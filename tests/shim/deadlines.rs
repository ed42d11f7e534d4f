//! What hangs for too long is given up: the call fails and says what hung and where, nobody else is held up before that, and
//! nothing is left when it goes on. The limits of these shims are a few seconds (SKIFF_MAX_WAIT).
//!
//! The Go shim waits for ever: these tests are skiff's own.

use std::cell::RefCell;
use std::io::Read;
use std::path::Path;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::types::mount::Mount;
use skiff_test_support::{Bundle, add_user_namespace, eventually, unique};

use crate::blocked::{bind, create, image, nobody_else_waits};
use crate::daemon::{Container, Daemon, Form, context, is_skiff, refused};
use crate::wedge::{Gate, Wedge};

/// A shim whose patience is short.
fn impatient(bundle: Bundle) -> Daemon {
    let environment = [("SKIFF_MAX_WAIT", "3")];
    Daemon::launch_as(bundle, unique("rawtest"), &Form::Options(None), false, &environment)
}

/// The call was given up, and its error has these words.
#[track_caller]
fn given_up<T: std::fmt::Debug>(answer: ttrpc::Result<T>, words: &[&str]) {
    let text = format!("{:?}", answer.as_ref().expect_err("it hangs"));
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
    refused(answer, Code::DEADLINE_EXCEEDED);
}

/// A container in the same shim lives a whole life.
fn others_live(daemon: &Daemon) {
    let other = daemon.member(&["true"]);
    other.create().unwrap();
    other.begin("").unwrap();
    assert_eq!(other.wait("").unwrap(), 0);
    other.delete("").unwrap();
}

/// `call` hangs in the wedge: with patience until it is let go, and nobody else waits; without, until it is given up.
fn hangs_in(
    bundle: impl Fn() -> Bundle,
    call: impl Fn(&Container, &Path) -> ttrpc::Result<u32> + Sync,
    words: &[&str],
) {
    let daemon = Daemon::with(bundle());
    let wedge = RefCell::new(Wedge::new());
    let path = wedge.borrow().path().to_path_buf();
    let answer = nobody_else_waits(
        &daemon,
        || call(&daemon, &path),
        || wedge.borrow_mut().wait(),
        || wedge.borrow_mut().abort(),
    );
    answer.unwrap_err();
    drop(wedge);
    refused(daemon.state(""), Code::NOT_FOUND);
    daemon.end();

    let daemon = impatient(bundle());
    let mut wedge = Wedge::new();
    let path = wedge.path().to_path_buf();
    std::thread::scope(|scope| {
        let calling = scope.spawn(|| call(&daemon, &path));
        wedge.wait();
        given_up(calling.join().unwrap(), words);
    });
    refused(daemon.state(""), Code::NOT_FOUND);
    others_live(&daemon);
    wedge.abort();
    eventually("the id is free", || daemon.create().is_ok());
    daemon.begin("").unwrap();
    daemon.finish();
    daemon.end();
}

fn sleeper() -> Bundle {
    Bundle::new(&["sleep", "1000"])
}

fn with_stdout(container: &Container, stdout: String) -> ttrpc::Result<u32> {
    let request = CreateTaskRequest { stdout, ..container.create_request() };
    container.client.create(context(), &request).map(|answer| answer.pid)
}

#[test]
fn a_file_for_the_output() {
    if is_skiff() {
        let call = |one: &Container, wedge: &Path| with_stdout(one, format!("file://{}/log", wedge.display()));
        hangs_in(sleeper, call, &["stdout: open", "/log", "no answer within 3 s, hangs in "]);
    }
}

/// A file that takes its time gets all of it, also after the Delete that has waited long enough.
#[test]
fn a_file_that_is_slow() {
    if !is_skiff() {
        return;
    }
    let daemon = impatient(Bundle::new(&["head", "-c", "100000", "/dev/zero"]));
    let log = daemon.fifo("slow");
    let read = std::thread::spawn({
        let log = log.clone();
        move || std::fs::File::open(log).unwrap()
    });
    with_stdout(&daemon, format!("file://{}", log.display())).unwrap();
    let mut slow = read.join().unwrap();
    daemon.begin("").unwrap();
    assert_eq!(daemon.wait("").unwrap(), 0);
    daemon.delete("").unwrap();
    let mut got = Vec::new();
    slow.read_to_end(&mut got).unwrap();
    assert_eq!(got.iter().filter(|byte| **byte == 0).count(), 100_000);
    daemon.end();
}

#[test]
fn a_fifo_on_a_server() {
    if is_skiff() {
        let call = |one: &Container, wedge: &Path| with_stdout(one, wedge.join("fifo").display().to_string());
        hangs_in(sleeper, call, &["stdout: open", "/fifo", "no answer within 3 s, hangs in "]);
    }
}

#[test]
fn a_stdin_on_a_server() {
    if is_skiff() {
        let call = |one: &Container, wedge: &Path| one.create_with([&wedge.join("in"), Path::new(""), Path::new("")]);
        hangs_in(sleeper, call, &["stdin: open", "/in", "no answer within 3 s, hangs in "]);
    }
}

#[test]
fn the_program_of_a_logger() {
    if is_skiff() {
        let call = |one: &Container, wedge: &Path| with_stdout(one, format!("binary://{}/logger", wedge.display()));
        hangs_in(sleeper, call, &["stdout: ", "is not ready within 3 s, hangs in execve"]);
    }
}

#[test]
fn a_logger_that_is_not_ready() {
    if !is_skiff() {
        return;
    }
    for patient in [true, false] {
        let daemon = if patient { Daemon::with(sleeper()) } else { impatient(sleeper()) };
        let gate = Gate::new(daemon.bundle.path());
        let uri = format!("binary:///bin/cat?{}", daemon.bundle.path().join("gate").display());
        let held = RefCell::new(None);
        if patient {
            let hangs = || drop(held.replace(Some(gate.hold())));
            nobody_else_waits(&daemon, || with_stdout(&daemon, uri), hangs, || drop(held.take())).unwrap();
            daemon.begin("").unwrap();
            daemon.finish();
        } else {
            given_up(with_stdout(&daemon, uri), &["stdout: ", "is not ready within 3 s, hangs in open"]);
            refused(daemon.state(""), Code::NOT_FOUND);
        }
        daemon.end();
    }
}

#[test]
fn a_rootfs_to_mount() {
    if !is_skiff() {
        return;
    }
    let daemon = impatient(sleeper());
    let image = image(&daemon.bundle);
    let mut wedge = Wedge::new();
    let hung = bind(&wedge.path().join("x"), "");
    std::thread::scope(|scope| {
        let calling = scope.spawn(|| create(&daemon, vec![hung]));
        wedge.wait();
        given_up(calling.join().unwrap(), &["mount ", "/rootfs", "no answer within 3 s, hangs in mount"]);
    });
    // Its id is taken as long as the mount may still come about.
    let text = format!("{:?}", create(&daemon, vec![bind(&image, "")]).unwrap_err());
    assert!(text.contains("is still being deleted"), "{text}");
    refused(daemon.delete(""), Code::NOT_FOUND);
    others_live(&daemon);
    wedge.abort();
    eventually("the id is free", || create(&daemon, vec![bind(&image, "")]).is_ok());
    daemon.begin("").unwrap();
    daemon.finish();
    daemon.end();
}

/// The last user of what a failed create has mounted hangs at its end.
#[test]
fn what_a_failed_create_has_mounted() {
    if !is_skiff() {
        return;
    }
    let mut bundle = sleeper();
    let gate = Gate::new(bundle.path());
    let hook = format!("cat {}; exit 1", bundle.path().join("gate").display());
    bundle.spec["hooks"] = serde_json::json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", hook]}]});
    let daemon = impatient(bundle);
    let image = image(&daemon.bundle);
    let mut wedge = Wedge::on_a_disk();
    let mounts = vec![bind(&image, ""), bind(wedge.path(), "disk")];
    std::thread::scope(|scope| {
        let calling = scope.spawn(|| create(&daemon, mounts));
        let held = gate.hold();
        wedge.hide();
        drop(held);
        wedge.wait_for_the_end();
        others_live(&daemon);
        let text = format!("{:?}", calling.join().unwrap().unwrap_err());
        assert!(text.contains("createRuntime hook #0"), "{text}");
    });
    others_live(&daemon);
    wedge.abort();
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = daemon.bundle.rootfs().display().to_string();
    eventually("its mounts are gone", || !mounts().contains(&at));
    let broken = Mount { type_: "tmpfs".into(), options: vec!["nope=1".into()], ..Mount::default() };
    eventually("the id is free", || format!("{:?}", create(&daemon, vec![broken.clone()])).contains("tmpfs"));
    daemon.end();
}

/// A container with a user namespace, for which these are bound.
fn with_sources(sources: &[&Path]) -> Bundle {
    let mut bundle = sleeper();
    add_user_namespace(&mut bundle.spec);
    let bound =
        |source| serde_json::json!({"destination": "/x", "type": "bind", "source": source, "options": ["rbind"]});
    bundle.spec["mounts"].as_array_mut().unwrap().extend(sources.iter().map(bound));
    bundle
}

#[test]
fn the_source_of_a_mount_in_a_user_namespace() {
    if !is_skiff() {
        return;
    }
    for patient in [true, false] {
        let wedge = RefCell::new(Wedge::new());
        let bundle = with_sources(&[&wedge.borrow().path().join("x")]);
        let daemon = if patient { Daemon::with(bundle) } else { impatient(bundle) };
        if patient {
            let (hangs, release) = (|| wedge.borrow_mut().wait(), || wedge.borrow_mut().abort());
            nobody_else_waits(&daemon, || daemon.create(), hangs, release).unwrap_err();
        } else {
            std::thread::scope(|scope| {
                let calling = scope.spawn(|| daemon.create());
                wedge.borrow_mut().wait();
                given_up(calling.join().unwrap(), &["].source: open", "no answer within 3 s, hangs in open_tree"]);
            });
            others_live(&daemon);
            wedge.borrow_mut().abort();
        }
        eventually("the id is free", || !format!("{:?}", daemon.create()).contains("deleted"));
        refused(daemon.state(""), Code::NOT_FOUND);
        drop(wedge);
        daemon.end();
    }
}

/// Those are opened by a child: its word of one that is not there is the same as ever.
#[test]
fn a_source_that_is_not_there() {
    if !is_skiff() {
        return;
    }
    let bundle = with_sources(&[Path::new("/bin"), Path::new("/no/such/source")]);
    let at = bundle.spec["mounts"].as_array().unwrap().len() - 1;
    let daemon = Daemon::with(bundle);
    let Err(ttrpc::Error::RpcStatus(status)) = daemon.create() else { panic!("it is not there") };
    let words = format!("mounts[{at}].source: open \"/no/such/source\": no such file or directory (ENOENT)");
    assert!(status.message.starts_with(&words), "{}", status.message);
    daemon.end();
}

#[test]
fn the_program_of_an_exec() {
    if !is_skiff() {
        return;
    }
    for patient in [true, false] {
        let daemon = if patient { Daemon::with(sleeper()) } else { impatient(sleeper()) };
        let image = image(&daemon.bundle);
        let wedge = RefCell::new(Wedge::new());
        create(&daemon, vec![bind(&image, ""), bind(wedge.borrow().path(), "disk")]).unwrap();
        daemon.begin("").unwrap();
        daemon.exec("e", &["/disk/program"]).unwrap();
        if patient {
            let (hangs, release) = (|| wedge.borrow_mut().wait(), || wedge.borrow_mut().abort());
            nobody_else_waits(&daemon, || daemon.begin("e"), hangs, release).unwrap_err();
        } else {
            std::thread::scope(|scope| {
                let calling = scope.spawn(|| daemon.begin("e"));
                wedge.borrow_mut().wait();
                given_up(calling.join().unwrap(), &["/disk/program", "does not run in time, hangs in "]);
            });
            others_live(&daemon);
            daemon.exec("f", &["true"]).unwrap();
            daemon.begin("f").unwrap();
            assert_eq!(daemon.wait("f").unwrap(), 0);
            wedge.borrow_mut().abort();
        }
        daemon.finish();
        drop(wedge);
        daemon.end();
    }
}

#[test]
fn hooks_without_a_timeout() {
    if !is_skiff() {
        return;
    }
    for kind in ["createRuntime", "poststart", "poststop"] {
        let mut bundle = sleeper();
        let gate = Gate::new(bundle.path());
        // A child of the hook is killed with it.
        let script = format!("cat {}; exit", bundle.path().join("gate").display());
        bundle.spec["hooks"] = serde_json::json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
        let daemon = impatient(bundle);
        let error = format!("{kind} hook #0: no answer within 3 s");
        if kind == "poststop" {
            daemon.create().unwrap();
            daemon.begin("").unwrap();
            daemon.kill("", 9, false).unwrap();
            assert_eq!(daemon.wait("").unwrap(), 137);
            given_up(daemon.delete(""), &["remove container ", "no answer within 3 s", "hangs in "]);
            assert_eq!(daemon.delete("").unwrap(), 137, "what is left is removed");
        } else if kind == "createRuntime" {
            let answer = daemon.create();
            let text = format!("{:?}", answer.unwrap_err());
            assert!(text.contains(&error) || text.contains("not at its gate in time"), "{text}");
            refused(daemon.state(""), Code::NOT_FOUND);
        } else {
            daemon.create().unwrap();
            given_up(daemon.begin(""), &[&error, "hangs in "]);
            assert_eq!(daemon.wait("").unwrap(), 137);
            daemon.delete("").unwrap();
        }
        others_live(&daemon);
        drop(gate);
        daemon.end();
    }
}

#[test]
fn a_restore() {
    if !is_skiff() {
        return;
    }
    let bundle = sleeper();
    let (bin, images) = (bundle.path().join("fake"), bundle.path().join("images"));
    std::fs::create_dir(&bin).unwrap();
    std::fs::create_dir(&images).unwrap();
    std::fs::write(images.join("descriptors.json"), "[]").unwrap();
    std::os::unix::fs::symlink("/bin/sleep", bin.join("sleep")).unwrap();
    // "swrk 3" is what it is asked for.
    std::fs::write(bin.join("criu"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bin.join("criu"), executable).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let environment = [("SKIFF_MAX_WAIT", "3"), ("PATH", path.as_str())];
    let daemon = Daemon::launch_as(bundle, unique("rawtest"), &Form::Options(None), false, &environment);
    let request = CreateTaskRequest { checkpoint: images.display().to_string(), ..daemon.create_request() };
    daemon.client.create(context(), &request).unwrap();
    given_up(daemon.begin(""), &["restore: criu has not done it in time, hangs in "]);
    others_live(&daemon);
    daemon.delete("").unwrap();
    daemon.end();
}

/// Nobody waits for an agent that takes no connections.
#[test]
fn a_seccomp_agent() {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
    use std::os::fd::AsRawFd;
    if !is_skiff() {
        return;
    }
    let mut bundle = sleeper();
    let path = bundle.path().join("agent");
    let address = UnixAddr::new(&path).unwrap();
    let new = || socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    let agent = new();
    bind(agent.as_raw_fd(), &address).unwrap();
    listen(&agent, Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = new();
        if connect(client.as_raw_fd(), &address).is_err() {
            break;
        }
        waiting.push(client);
    }
    bundle.spec["linux"]["seccomp"] = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": path,
        "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
    });
    let daemon = Daemon::with(bundle);
    let answer = daemon.create().and_then(|_| daemon.begin(""));
    let text = format!("{:?}", answer.unwrap_err());
    assert!(text.contains("failed to connect with seccomp agent") && text.contains("EAGAIN"), "{text}");
    others_live(&daemon);
    let _ = daemon.delete("");
    daemon.end();
}
