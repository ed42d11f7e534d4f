//! `start` as every version of containerd runs it, and a life after each.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::{ConnectRequest, StateRequest, Status};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::ttrpc::Code;
use skiff_test_support::{Bundle, LeakCheck, eventually, unique};

use crate::daemon::{self, Daemon, Form, Task, V2, V3, context, is_skiff, refused};

fn options(change: impl FnOnce(&mut Options)) -> Any {
    let mut options = Options::new();
    change(&mut options);
    any("containerd.runc.v1.Options", options.write_to_bytes().unwrap())
}

fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any { type_url: type_url.into(), value, ..Any::default() }
}

/// From Create to Delete, over this connection.
fn life(daemon: &Daemon, task: &Task) {
    daemon.forget_events();
    let created = task.create(context(), &daemon.create_request()).unwrap();
    let connected = task.connect(context(), &ConnectRequest { id: daemon.id.clone(), ..Default::default() }).unwrap();
    assert_eq!((connected.task_pid, connected.shim_pid as i32), (created.pid, daemon.pid()));
    daemon.begin("").unwrap();
    daemon.exec("e", &["sh", "-c", "exit 3"]).unwrap();
    daemon.begin("e").unwrap();
    assert_eq!(daemon.wait("e").unwrap(), 3);
    assert_eq!(daemon.delete("e").unwrap(), 3);
    let state = task.state(context(), &StateRequest { id: daemon.id.clone(), ..Default::default() }).unwrap();
    assert_eq!((state.status.enum_value(), state.pid), (Ok(Status::RUNNING), created.pid));
    daemon.finish();
    refused(daemon.state(""), Code::NOT_FOUND);
    let want = ["create", "start", "exec-added e", "exec-started e", "exit e 3", "exit init 137", "delete 137"];
    eventually("all has been told", || daemon.events(&daemon.id).len() >= want.len());
    assert_eq!(daemon.events(&daemon.id), want);
}

/// What the daemon has open as 0, 1 and 2.
fn inherited(pid: i32) -> Vec<PathBuf> {
    (0..3).map(|fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap()).collect()
}

/// A whole life of a task in a shim that was started like this, under each name of the service that it has.
fn lives(form: Form, version: i32) {
    let daemon = Daemon::launch(Bundle::new(&["sleep", "1000"]), &form, false);
    assert_eq!(daemon.reply.version, version, "{form:?}");
    let address = std::fs::read_to_string(daemon.home().join("address")).expect("the shim has written its address");
    assert_eq!(address, daemon.address);
    let socket = Path::new(daemon.address.strip_prefix("unix:///run/containerd/s/").expect("a socket where they are"));
    assert_eq!(socket.as_os_str().len(), 64);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&Path::new("/run/containerd/s").join(socket)), 0o600);
    let (null, log) = (Path::new("/dev/null"), daemon.home().join("log"));
    for open in inherited(daemon.pid()) {
        // The Go shim has its log as stderr.
        assert!(open == null || open == log, "{open:?} is containerd's");
    }
    // The Go shim of 1.6 and 1.7 knows only version 2.
    let names = if is_skiff() { &[V2, V3][..] } else { &[V2] };
    for name in names {
        life(&daemon, &daemon.on(name));
    }
    daemon.end();
}

#[test]
fn nothing_on_stdin() {
    lives(Form::Options(None), 2);
}

#[test]
fn options_on_stdin() {
    lives(Form::Options(Some(options(|o| o.no_new_keyring = true))), 2);
}

/// containerd's message of these bytes reads as parameters too: two strings in the same fields.
#[test]
fn options_that_read_as_parameters() {
    let value = options(|o| o.binary_name = "runc".into());
    assert!(std::str::from_utf8(&value.value).is_ok());
    lives(Form::Options(Some(value)), 2);
}

/// containerd's CRI plugin sends these to runtimes of another type; the Go shim takes only its own.
#[test]
fn generic_options_on_stdin() {
    if is_skiff() {
        let body = "NoNewKeyring = true\n";
        let value = [&[26, body.len() as u8][..], body.as_bytes()].concat();
        lives(Form::Options(Some(any("runtimeoptions.v1.Options", value))), 2);
    }
}

/// containerd from 2.3 on; the Go shim that is under test is older.
#[test]
fn parameters_on_stdin() {
    if is_skiff() {
        lives(Form::Params(None), 3);
        lives(Form::Params(Some(options(|o| o.no_new_keyring = true))), 3);
    }
}

/// The sandbox controller of containerd 2.0 to 2.2, with no config.json; not with the Go shim, which has no sandboxes.
#[test]
fn a_sandbox_of_the_shims_own() {
    if is_skiff() {
        lives(Form::Sandbox, 3);
    }
}

/// Parameters that name another container are no parameters, but neither are they options.
#[test]
fn parameters_of_another() {
    if !is_skiff() {
        return;
    }
    use containerd_shim_protos::bootstrap_api::BootstrapParams;
    let params = |id: &str, namespace: &str| {
        let (instance_id, namespace) = (id.to_string(), namespace.to_string());
        BootstrapParams { instance_id, namespace, ..Default::default() }.write_to_bytes().unwrap()
    };
    // As an Any these have a type that nobody knows: its options are for somebody else.
    lives(Form::Bytes(params("another", daemon::NAMESPACE)), 2);
}

#[test]
fn what_is_neither_is_refused() {
    let bundle = Bundle::new(&["true"]);
    bundle.write();
    let (ok, said) = daemon::start(bundle.path(), &unique("bad"), false, &Form::Bytes(vec![0xff; 8]));
    assert!(!ok, "{}", String::from_utf8_lossy(&said));
    let (ok, said) = daemon::start(
        bundle.path(),
        &unique("bad"),
        false,
        &Form::Options(Some(options(|o| {
            o.shim_cgroup = "/no/such/cgroup".into();
        }))),
    );
    assert!(!ok && String::from_utf8_lossy(&said).contains("/no/such/cgroup"), "{}", String::from_utf8_lossy(&said));
    // The Go shim of 1.6 writes it before it knows.
    assert!(!is_skiff() || !bundle.path().join("address").exists());
}

#[test]
fn a_group_started_at_once_agrees_on_one_daemon() {
    let group = unique("pod");
    let bundles: Vec<(Bundle, String, std::fs::File)> = (0..6)
        .map(|_| {
            let mut bundle = Bundle::new(&["sleep", "1000"]);
            bundle.spec["annotations"] = serde_json::json!({"io.kubernetes.cri.sandbox-id": group});
            bundle.write();
            let log = daemon::open_log(bundle.path());
            (bundle, unique("member"), log)
        })
        .collect();
    // The name of the socket has containerd's address in it: all of a group are of one containerd.
    let address = bundles[0].0.path().join("none.sock");
    let replies: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let start = |(bundle, id, _): &(Bundle, String, std::fs::File)| {
            let (ok, said) = daemon::start_for(&address, bundle.path(), id, false, &Form::Options(None), &[]);
            assert!(ok, "{}", String::from_utf8_lossy(&said));
            said
        };
        let starts: Vec<_> = bundles.iter().map(|one| scope.spawn(move || start(one))).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert!(replies.iter().all(|reply| *reply == replies[0]), "{replies:?}");
    let said = String::from_utf8(replies[0].clone()).unwrap();
    let task = Task::new(said.trim(), if is_skiff() { V3 } else { V2 });
    let shims: Vec<u32> = bundles
        .iter()
        .map(|(bundle, id, _)| {
            assert_eq!(std::fs::read_to_string(bundle.path().join("address")).unwrap(), said.trim());
            task.connect(context(), &ConnectRequest { id: id.clone(), ..Default::default() }).unwrap().shim_pid
        })
        .collect();
    assert!(shims.iter().all(|pid| *pid == shims[0]), "{shims:?}");
    task.shutdown(context(), &Default::default()).unwrap();
    let socket = PathBuf::from(said.trim().trim_start_matches("unix://"));
    eventually("the socket is gone", || !socket.exists());
    LeakCheck::new(&[&address.display().to_string()]).end();
}

#[test]
fn a_socket_of_the_dead_is_replaced() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    let (socket, dead) = (daemon.address.trim_start_matches("unix://").to_string(), daemon.pid());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(dead), nix::sys::signal::Signal::SIGKILL).unwrap();
    eventually("the daemon is dead", || std::os::unix::net::UnixStream::connect(&socket).is_err());
    assert!(Path::new(&socket).exists(), "a killed daemon leaves its socket");
    let (ok, said) = daemon::start(daemon.home(), &daemon.id, false, &Form::Options(None));
    assert!(ok && String::from_utf8_lossy(&said).trim() == daemon.address, "{}", String::from_utf8_lossy(&said));
    let task = daemon.connect();
    let request = ConnectRequest { id: daemon.id.clone(), ..Default::default() };
    assert_ne!(task.connect(context(), &request).unwrap().shim_pid as i32, dead);
    task.shutdown(context(), &Default::default()).unwrap();
    eventually("the second one ends", || !Path::new(&socket).exists());
}
