//! Whatever hangs, everybody else in the same shim is answered. That it still hangs is what each of these tests ends with;
//! how long an answer takes is not looked at.
//!
//! The Go shim of 1.6 locks everything for the length of a Create, and has threads to hang in: these tests are skiff's own.

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_shim_protos::api::{ConnectRequest, CreateTaskRequest, PidsRequest, StateRequest, StatsRequest, Status};
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::types::mount::Mount;
use skiff_test_support::{Bundle, LeakCheck, eventually, unique};

use crate::daemon::{Container, Daemon, context, is_skiff, refused};
use crate::wedge::{Gate, Wedge};

/// Everything about a container that runs is answered, and ends with it.
pub fn is_served(other: &Container) {
    assert_eq!(other.status(""), Status::RUNNING);
    let id = || other.id.clone();
    let connected = other.client.connect(context(), &ConnectRequest { id: id(), ..Default::default() }).unwrap();
    assert_ne!((connected.shim_pid, connected.task_pid), (0, 0));
    other.client.pids(context(), &PidsRequest { id: id(), ..Default::default() }).unwrap();
    other.client.stats(context(), &StatsRequest { id: id(), ..Default::default() }).unwrap();
    other.exec("e", &["sh", "-c", "exit 7"]).unwrap();
    other.begin("e").unwrap();
    assert_eq!(other.wait("e").unwrap(), 7);
    other.delete("e").unwrap();
    other.kill("", 9, false).unwrap();
    assert_eq!(other.wait("").unwrap(), 137);
    assert_eq!(other.delete("").unwrap(), 137);
}

pub fn running(daemon: &Daemon) -> Container {
    let other = daemon.member(&["sleep", "1000"]);
    other.create().unwrap();
    other.begin("").unwrap();
    other
}

/// While `call` hangs, as `hangs` waits for, another container of the shim is served. `release` lets the call go on.
pub fn nobody_else_waits<T: Send>(
    daemon: &Daemon,
    call: impl FnOnce() -> T + Send,
    hangs: impl FnOnce(),
    release: impl FnOnce(),
) -> T {
    let other = running(daemon);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let calling = scope.spawn(|| {
            let answer = call();
            done.store(true, Ordering::SeqCst);
            answer
        });
        hangs();
        // Released also when an assertion fails: the thread is joined then.
        let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            is_served(&other);
            assert!(!done.load(Ordering::SeqCst), "it hangs to the end");
        }));
        release();
        let answer = calling.join().expect("an answer");
        served.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        answer
    })
}

pub fn bind(source: &Path, target: &str) -> Mount {
    Mount {
        type_: "bind".into(),
        source: source.display().to_string(),
        target: target.into(),
        options: vec!["rbind".into()],
        ..Mount::default()
    }
}

pub fn create(container: &Container, rootfs: Vec<Mount>) -> ttrpc::Result<u32> {
    let request = CreateTaskRequest { rootfs, ..container.create_request() };
    container.client.create(context(), &request).map(|answer| answer.pid)
}

/// A rootfs below another directory than the bundle's, so that it can be mounted there.
pub fn image(bundle: &Bundle) -> std::path::PathBuf {
    let image = bundle.path().join("image");
    std::fs::rename(bundle.rootfs(), &image).unwrap();
    std::fs::create_dir(bundle.rootfs()).unwrap();
    std::fs::create_dir(image.join("disk")).unwrap();
    image
}

#[test]
fn a_mount_of_the_rootfs() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let image = image(&daemon.bundle);
    let overlay = |lower: &Path| Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: vec![format!("lowerdir={}:{}", lower.display(), image.display())],
        ..Mount::default()
    };
    for of in ["a bind", "an overlay"] {
        let mut wedge = Wedge::new();
        let rootfs = if of == "a bind" { bind(&wedge.path().join("x"), "") } else { overlay(wedge.path()) };
        let wedge = std::cell::RefCell::new(Some(&mut wedge));
        let answer = nobody_else_waits(
            &daemon,
            || create(&daemon, vec![rootfs]),
            || wedge.borrow_mut().as_mut().expect("there").wait(),
            || wedge.borrow_mut().take().expect("there").abort(),
        );
        refused(answer, Code::UNKNOWN);
        refused(daemon.state(""), Code::NOT_FOUND);
    }
    // The id is free, and what lies at hand is mounted.
    let lower = daemon.bundle.path().join("lower");
    std::fs::create_dir(&lower).unwrap();
    create(&daemon, vec![overlay(&lower)]).unwrap();
    daemon.begin("").unwrap();
    daemon.finish();
    daemon.end();
}

#[test]
fn the_unmount_of_a_rootfs() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let image = image(&daemon.bundle);
    let mut wedge = Wedge::on_a_disk();
    create(&daemon, vec![bind(&image, ""), bind(wedge.path(), "disk")]).unwrap();
    wedge.hide();
    daemon.begin("").unwrap();
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    // The kernel drops the mounts of its namespace a little after its end; then those of the bundle are the last.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let wedge = std::cell::RefCell::new(&mut wedge);
    let answer = nobody_else_waits(
        &daemon,
        || daemon.delete(""),
        || {
            wedge.borrow_mut().wait_for_the_end();
            let state =
                daemon.connect().state(context(), &StateRequest { id: daemon.id.clone(), ..Default::default() });
            assert_eq!(state.unwrap().exit_status, 137, "of itself, too");
        },
        || wedge.borrow_mut().abort(),
    );
    assert_eq!(answer.unwrap(), 137);
    daemon.end();
}

/// What a failed create has made is gone when it is answered: the next one finds the id free, and the rootfs unmounted.
#[test]
fn a_failed_create_is_taken_back_before_its_answer() {
    let mut bundle = Bundle::new(&["no-such-program"]);
    let image = image(&bundle);
    let group = unique("failed");
    bundle.spec["linux"]["cgroupsPath"] = serde_json::json!(format!("/{group}"));
    let daemon = Daemon::with(bundle);
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = daemon.bundle.rootfs().display().to_string();
    let broken = Mount { type_: "tmpfs".into(), options: vec!["nope=1".into()], ..Mount::default() };
    for _ in 0..20 {
        let err = format!("{:?}", create(&daemon, vec![bind(&image, "")]).unwrap_err());
        assert!(err.contains("no-such-program"), "{err}");
        assert!(!mounts().contains(&at));
        let err = format!("{:?}", create(&daemon, vec![bind(&image, ""), broken.clone()]).unwrap_err());
        assert!(err.contains("tmpfs") || !is_skiff(), "{err}");
        assert!(!mounts().contains(&at));
    }
    LeakCheck::new(&[&group]).end();
    daemon.end();
}

#[test]
fn hooks() {
    if !is_skiff() {
        return;
    }
    for kind in ["createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        let mut bundle = Bundle::new(&["sleep", "1000"]);
        let gate = Gate::new(bundle.path());
        let inside = matches!(kind, "startContainer");
        bundle.spec["hooks"] = serde_json::json!({kind: gate.hook()});
        if inside {
            // In the container's own root.
            crate::daemon::make_fifo(&bundle.rootfs().join("gate"));
            bundle.spec["hooks"] = serde_json::json!({kind: [{"path": "/bin/cat", "args": ["cat", "/gate"]}]});
        }
        let gate = if inside { Gate::at(bundle.rootfs().join("gate")) } else { gate };
        let daemon = Daemon::with(bundle);
        let held = std::cell::RefCell::new(None);
        let hangs = || drop(held.replace(Some(gate.hold())));
        let release = || drop(held.take());
        match kind {
            "createRuntime" | "createContainer" => {
                nobody_else_waits(&daemon, || daemon.create(), hangs, release).unwrap();
                daemon.begin("").unwrap();
                daemon.finish();
            }
            "startContainer" | "poststart" => {
                daemon.create().unwrap();
                nobody_else_waits(&daemon, || daemon.begin(""), hangs, release).unwrap();
                daemon.finish();
            }
            _ => {
                daemon.create().unwrap();
                daemon.begin("").unwrap();
                daemon.kill("", 9, false).unwrap();
                daemon.wait("").unwrap();
                assert_eq!(nobody_else_waits(&daemon, || daemon.delete(""), hangs, release).unwrap(), 137);
            }
        }
        daemon.end();
    }
}

#[test]
fn a_fifo_that_nobody_reads() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::start(&["sh", "-c", "echo out; exec sleep 1000"]);
    let (out, exec_out) = (daemon.fifo("out"), daemon.fifo("exec-out"));
    let reader = std::cell::RefCell::new(None);
    // Opened without waiting for a writer, it lets a writer in.
    let open = |path: &Path| {
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        reader.replace(Some(file.unwrap()));
    };
    let streams = [Path::new(""), &out, Path::new("")];
    nobody_else_waits(&daemon, || daemon.create_with(streams), || (), || open(&out)).unwrap();
    daemon.begin("").unwrap();
    daemon.exec_to("e", &["sleep", "1000"], &exec_out).unwrap();
    nobody_else_waits(&daemon, || daemon.begin("e"), || (), || open(&exec_out)).unwrap();
    assert_eq!(daemon.status("e"), Status::RUNNING);
    daemon.kill("e", 9, false).unwrap();
    assert_eq!(daemon.wait("e").unwrap(), 137);
    daemon.delete("e").unwrap();
    daemon.finish();
    daemon.end();
}

/// Who writes more than anybody reads hangs; it can be looked at and killed all the same, with the Go shim as well.
#[test]
fn a_fifo_that_is_full() {
    let daemon = Daemon::start(&["yes"]);
    let out = daemon.fifo("out");
    let mut reader = {
        let path = out.clone();
        let opened = std::thread::spawn(move || std::fs::File::open(path).unwrap());
        daemon.create_with([Path::new(""), &out, Path::new("")]).unwrap();
        opened.join().unwrap()
    };
    daemon.begin("").unwrap();
    eventually("it waits for its reader", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/wchan", daemon.state("").unwrap().pid));
        stat.unwrap().contains("pipe")
    });
    is_served(&running(&daemon));
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    // Its last bytes are there for who reads them.
    let reading = std::thread::spawn(move || {
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        text.len()
    });
    assert_eq!(daemon.delete("").unwrap(), 137);
    assert!(reading.join().unwrap() >= 64 << 10);
    daemon.end();
}

/// A Delete that comes while Create is under way, as from a containerd that was started again, deletes what comes of it.
#[test]
fn a_delete_waits_for_its_create() {
    if !is_skiff() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    let gate = Gate::new(bundle.path());
    bundle.spec["hooks"] = serde_json::json!({"createRuntime": gate.hook()});
    let daemon = Daemon::with(bundle);
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| daemon.create());
        let held = gate.hold();
        refused(daemon.state(""), Code::NOT_FOUND);
        refused(daemon.kill("", 9, false), Code::NOT_FOUND);
        refused(daemon.create(), Code::ALREADY_EXISTS);
        let deleting = scope.spawn(|| daemon.delete(""));
        // Remembered: nothing is left after the Delete.
        daemon.connect().shutdown(context(), &Default::default()).unwrap();
        drop(held);
        creating.join().unwrap().unwrap();
        assert_eq!(deleting.join().unwrap().unwrap(), 0);
    });
    eventually("the shim ends", || std::os::unix::net::UnixStream::connect(&daemon.address[7..]).is_err());
    daemon.end();
}

/// Of two Deletes one waits for the other, and finds nothing then.
#[test]
fn a_delete_waits_for_another() {
    if !is_skiff() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    let gate = Gate::new(bundle.path());
    bundle.spec["hooks"] = serde_json::json!({"poststop": gate.hook()});
    let daemon = Daemon::with(bundle);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| daemon.delete(""));
        let held = gate.hold();
        let second = scope.spawn(|| daemon.delete(""));
        assert_eq!(daemon.status(""), Status::STOPPED);
        drop(held);
        assert_eq!(first.join().unwrap().unwrap(), 137);
        refused(second.join().unwrap(), Code::NOT_FOUND);
    });
    daemon.end();
}
