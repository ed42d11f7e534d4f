//! Each call in each state, and what is answered: skiff's answers are the Go shim's, but where the table says why not.

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, DeleteRequest, KillRequest, PauseRequest, PidsRequest,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest, StatsRequest, UpdateTaskRequest,
    WaitRequest,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::{self, context::with_timeout};
use skiff_test_support::eventually;

use crate::daemon::{Daemon, context, is_skiff};

/// Where a process is when it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Unknown,
    Created,
    Running,
    Paused,
    Stopped,
    Deleted,
}

/// The columns of the tables.
const STATES: [At; 6] = [At::Unknown, At::Created, At::Running, At::Paused, At::Stopped, At::Deleted];

/// The answers about an init. `gone`, `finished`, `exists` and `no:` stand for errors, see [`matches`]; everything else
/// is the whole answer. Where there are two, they are skiff's and the Go shim's.
const INIT: [(&str, [&str; 6]); 17] = [
    (
        "State",
        [
            "gone",
            "ok ID CREATED pid=PID exit=0 terminal=false",
            "ok ID RUNNING pid=PID exit=0 terminal=false",
            "ok ID PAUSED pid=PID exit=0 terminal=false",
            "ok ID STOPPED pid=PID exit=137 terminal=false",
            "gone",
        ],
    ),
    ("Create", ["ok pid>0=true", "exists", "exists", "exists", "exists", "ok pid>0=true"]),
    ("Start", ["gone", "ok pid>0=true", "no: cannot start", "no: cannot start", "no: cannot start", "gone"]),
    ("Delete", ["gone", "ok pid=PID exit=0", "no: cannot delete", "no: cannot delete", "ok pid=PID exit=137", "gone"]),
    // A containerd that is started again takes a container without processes for a leak and deletes it: one that has
    // stopped meanwhile must have one.
    ("Pids", ["gone", "ok pid=PID", "ok pid=PID", "ok pid=PID", "ok pid=PID / ok", "gone"]),
    ("Pause", ["gone", "no: cannot pause", "ok", "no: cannot pause", "no: cannot pause", "gone"]),
    ("Resume", ["gone", "no: cannot resume", "no: cannot resume", "ok", "no: cannot resume", "gone"]),
    // By a CRIU that may not be there.
    ("Checkpoint", ["gone", "no: cannot checkpoint", "tried", "tried", "no: cannot checkpoint", "gone"]),
    ("Kill", ["gone", "ok", "ok", "ok", "finished", "gone"]),
    ("Exec", ["gone", "ok", "ok", "no: cannot exec", "no: cannot exec", "gone"]),
    ("ResizePty", ["gone", "ok", "ok", "ok", "ok", "gone"]),
    ("CloseIO", ["gone", "ok", "ok", "ok", "ok", "gone"]),
    // The CRI plugin minds no update that comes too late, if it is told so by this code.
    ("Update", ["gone", "ok", "ok", "ok", "finished / no: cannot update", "gone"]),
    ("Wait", ["gone", "waits", "waits", "waits", "ok exit=137", "gone"]),
    ("Stats", ["gone", METRICS, METRICS, METRICS, METRICS, "gone"]),
    ("Connect", ["ok pid=0", "ok pid=PID", "ok pid=PID", "ok pid=PID", "ok pid=PID", "ok pid=0"]),
    ("Shutdown", ["ok", "ok", "ok", "ok", "ok", "ok"]),
];

const METRICS: &str = "ok io.containerd.cgroups.v1.Metrics";

/// The answers about an exec process `e` of a container that runs, or is paused. The calls that are not here know no
/// exec processes.
const EXEC: [(&str, [&str; 6]); 8] = [
    (
        "State",
        [
            "gone",
            "ok e CREATED pid=0 exit=0 terminal=false",
            "ok e RUNNING pid=PID exit=0 terminal=false",
            "ok e PAUSED pid=PID exit=0 terminal=false",
            "ok e STOPPED pid=PID exit=137 terminal=false",
            "gone",
        ],
    ),
    ("Start", ["gone", "ok pid>0=true", "no: cannot start", "no: cannot start", "no: cannot start", "gone"]),
    ("Delete", ["gone", "ok pid=0 exit=0", "no: cannot delete", "no: cannot delete", "ok pid=PID exit=137", "gone"]),
    ("Kill", ["gone", "FAILED_PRECONDITION: process", "ok", "ok", "finished", "gone"]),
    ("Exec", ["ok", "exists", "exists", "exists", "exists", "ok"]),
    ("ResizePty", ["gone", "ok", "ok", "ok", "no: cannot resize", "gone"]),
    // The Go shim forgets the code of this one error.
    (
        "CloseIO",
        ["gone / UNKNOWN: process does not exist", "ok", "ok", "ok", "ok", "gone / UNKNOWN: process does not exist"],
    ),
    ("Wait", ["gone", "waits", "waits", "waits", "ok exit=137", "gone"]),
];

/// Whether an answer is the one that the table wants.
fn matches(answer: &str, want: &str) -> bool {
    let want = match want.split_once(" / ") {
        Some((skiff, go)) => {
            if is_skiff() {
                skiff
            } else {
                go
            }
        }
        None => want,
    };
    let error = |code: &str, text: &str| answer.starts_with(&format!("{code}: ")) && answer.contains(text);
    // Where the Go shim has a plain error, skiff tells what kind of error it is.
    let plain = |code: &str, text: &str| error(if is_skiff() { code } else { "UNKNOWN" }, text);
    match want {
        "gone" => error("NOT_FOUND", "not found"),
        "finished" => error("NOT_FOUND", "process already finished"),
        "exists" => error("ALREADY_EXISTS", "already exists") || plain("ALREADY_EXISTS", "already exists"),
        "tried" => answer == "ok" || error("UNKNOWN", "") || error("UNIMPLEMENTED", "criu"),
        _ => match want.split_once(": ") {
            Some(("no", text)) => plain("FAILED_PRECONDITION", text),
            Some((code, text)) => error(code, text),
            None => answer == want,
        },
    }
}

/// The events of a container's life, as far as it has come.
struct Story {
    events: Vec<&'static str>,
    at: At,
}

impl Story {
    fn new() -> Story {
        Story { events: Vec::new(), at: At::Unknown }
    }

    /// What a call that is allowed does to an init.
    fn call(&mut self, name: &str) {
        let (event, next) = match (name, self.at) {
            ("Create", At::Unknown | At::Deleted) => ("create", At::Created),
            ("Start", At::Created) => ("start", At::Running),
            ("Pause", At::Running) => ("paused", At::Paused),
            ("Resume", At::Paused) => ("resumed", At::Running),
            ("Kill", At::Created | At::Running | At::Paused) => ("exit init 137", At::Stopped),
            ("Delete", At::Stopped) => ("delete 137", At::Deleted),
            ("Exec", At::Created | At::Running) => ("exec-added new", self.at),
            ("Delete", At::Created) => {
                self.events.push("exit init 137");
                ("delete 0", At::Deleted)
            }
            _ => return,
        };
        self.events.push(event);
        self.at = next;
    }
}

/// An answer in words: the code and text of an error, or the fields.
fn words<T>(daemon: &Daemon, pid: u32, result: ttrpc::Result<T>, fields: impl FnOnce(T) -> String) -> String {
    let text = match result {
        Ok(answer) => format!("ok {}", fields(answer)).trim_end().to_string(),
        Err(ttrpc::Error::RpcStatus(status)) => {
            format!("{:?}: {}", status.code.enum_value().expect("a known code"), status.message)
        }
        Err(err) => format!("{err:?}"),
    };
    let text = text.replace(&daemon.id, "ID");
    if pid == 0 { text } else { text.replace(&format!("={pid}"), "=PID") }
}

fn call(daemon: &Daemon, name: &str, exec_id: &str, pid: u32) -> String {
    let (task, id) = (&daemon.client, || daemon.id.clone());
    let exec_id = || exec_id.to_string();
    let c = context;
    let none = |_| String::new();
    macro_rules! ask {
        ($call:ident, $request:expr) => {
            words(daemon, pid, task.$call(c(), &$request), none)
        };
        ($call:ident, $request:expr, $fields:expr) => {
            words(daemon, pid, task.$call(c(), &$request), $fields)
        };
    }
    match name {
        "State" => ask!(state, StateRequest { id: id(), exec_id: exec_id(), ..Default::default() }, |s| {
            assert_eq!(s.bundle, daemon.bundle.path().display().to_string());
            assert_eq!(s.exited_at.seconds > 0, s.exit_status != 0 && s.status.value() == 3, "{s:?}");
            let status = s.status.enum_value().expect("a known status");
            format!("{} {status:?} pid={} exit={} terminal={}", s.id, s.pid, s.exit_status, s.terminal)
        }),
        "Create" => ask!(create, daemon.create_request(), |r| format!("pid>0={}", r.pid > 0)),
        "Start" => {
            ask!(start, StartRequest { id: id(), exec_id: exec_id(), ..Default::default() }, |r| format!(
                "pid>0={}",
                r.pid > 0
            ))
        }
        "Delete" => ask!(delete, DeleteRequest { id: id(), exec_id: exec_id(), ..Default::default() }, |r| {
            assert_eq!(r.exited_at.seconds > 0, r.exit_status != 0, "{r:?}");
            format!("pid={} exit={}", r.pid, r.exit_status)
        }),
        "Pids" => ask!(pids, PidsRequest { id: id(), ..Default::default() }, |r| {
            let pids: Vec<String> = r.processes.iter().map(|p| format!("pid={}", p.pid)).collect();
            pids.join(" ")
        }),
        "Pause" => ask!(pause, PauseRequest { id: id(), ..Default::default() }),
        "Resume" => ask!(resume, ResumeRequest { id: id(), ..Default::default() }),
        "Checkpoint" => {
            ask!(
                checkpoint,
                CheckpointTaskRequest {
                    id: id(),
                    path: daemon.bundle.path().join("images").display().to_string(),
                    ..Default::default()
                }
            )
        }
        "Kill" => ask!(kill, KillRequest { id: id(), exec_id: exec_id(), signal: 9, ..Default::default() }),
        "Exec" => ask!(exec, daemon.exec_request(if exec_id().is_empty() { "new" } else { "e" }, &["sleep", "1000"])),
        "ResizePty" => ask!(
            resize_pty,
            ResizePtyRequest { id: id(), exec_id: exec_id(), width: 80, height: 24, ..Default::default() }
        ),
        "CloseIO" => ask!(close_io, CloseIORequest { id: id(), exec_id: exec_id(), stdin: true, ..Default::default() }),
        "Update" => {
            let type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into();
            let resources = Any { type_url, value: br#"{"pids":{"limit":99}}"#.to_vec(), ..Any::default() };
            ask!(update, UpdateTaskRequest { id: id(), resources: MessageField::some(resources), ..Default::default() })
        }
        // What does not answer at once waits for the exit.
        "Wait" => {
            let request = WaitRequest { id: id(), exec_id: exec_id(), ..Default::default() };
            match daemon.connect().wait(with_timeout(300_000_000), &request) {
                Err(ttrpc::Error::RpcStatus(status)) if status.code.value() == 4 => "waits".into(),
                Err(ttrpc::Error::Others(text)) if text.contains("timeout") => "waits".into(),
                answer => words(daemon, pid, answer, |r| {
                    assert_eq!(r.exited_at.seconds > 0, r.exit_status != 0, "{r:?}");
                    format!("exit={}", r.exit_status)
                }),
            }
        }
        "Stats" => {
            ask!(stats, StatsRequest { id: id(), ..Default::default() }, |r| r.stats.type_url.replace(".v2.", ".v1."))
        }
        "Connect" => ask!(connect, ConnectRequest { id: id(), ..Default::default() }, |r| {
            assert_eq!(r.shim_pid as i32, daemon.pid());
            format!("pid={}", r.task_pid)
        }),
        "Shutdown" => ask!(shutdown, ShutdownRequest { id: id(), ..Default::default() }),
        other => panic!("{other}"),
    }
}

/// The calls that lead to a state.
fn way(at: At) -> &'static [&'static str] {
    match at {
        At::Unknown => &[],
        At::Created => &["Create"],
        At::Running => &["Create", "Start"],
        At::Paused => &["Create", "Start", "Pause"],
        At::Stopped => &["Create", "Start", "Kill"],
        At::Deleted => &["Create", "Start", "Kill", "Delete"],
    }
}

fn succeed(daemon: &Daemon, name: &str, exec_id: &str) {
    let mut answer = call(daemon, name, exec_id, 0);
    // runc gives up freezing soon when the machine is busy.
    while !is_skiff() && answer.ends_with("unable to freeze") {
        answer = call(daemon, name, exec_id, 0);
    }
    assert!(answer.starts_with("ok"), "{name}: {answer}");
    if name == "Kill" {
        daemon.wait(exec_id).expect("an exit");
    }
}

/// The pid of a process that is there.
fn pid(daemon: &Daemon, exec_id: &str) -> u32 {
    daemon.state(exec_id).map_or(0, |state| state.pid)
}

/// Ends what is left of the container, however far it has come.
fn clean(daemon: &Daemon, story: &mut Story) {
    for name in ["Resume", "Kill", "Delete"] {
        let needed = match name {
            "Resume" => story.at == At::Paused,
            "Kill" => matches!(story.at, At::Created | At::Running),
            _ => story.at == At::Stopped,
        };
        if needed {
            succeed(daemon, name, "");
            story.call(name);
        }
    }
}

/// The Go shim takes the end of a cgroup of v1 for one more kill by the kernel's OOM killer.
fn events(daemon: &Daemon) -> Vec<String> {
    let mut events = daemon.events(&daemon.id);
    events.retain(|event| is_skiff() || event != "oom");
    events
}

fn told(daemon: &Daemon, what: &str, want: &[&str]) {
    eventually("all has been told", || events(daemon).len() >= want.len());
    assert_eq!(events(daemon), want, "{what}: events");
}

/// Every call about an init in this state: what is answered, and what is told.
fn inits(at: At) {
    // What an Update changes.
    if !skiff_test_support::has_controllers(&["pids"]) {
        return;
    }
    let column = STATES.iter().position(|state| *state == at).expect("a column");
    // A checkpoint lets it go on where criu(8) works; a sleep would end, interrupted.
    let daemon = Daemon::start(&["tail", "-f", "/dev/null"]);
    for (name, wants) in &INIT[..INIT.len() - 1] {
        daemon.forget_events();
        let mut story = Story::new();
        for step in way(at) {
            succeed(&daemon, step, "");
            story.call(step);
        }
        let before = if at == At::Deleted { 0 } else { pid(&daemon, "") };
        let answer = call(&daemon, name, "", before);
        assert!(matches(&answer, wants[column]), "{name}, {at:?}: {answer} instead of {}", wants[column]);
        if answer.starts_with("ok") {
            story.call(name);
        }
        if *name == "Kill" && story.at == At::Stopped {
            assert_eq!(daemon.wait("").expect("an exit"), 137);
        }
        clean(&daemon, &mut story);
        told(&daemon, &format!("{name}, {at:?}"), &story.events);
    }
    let mut story = Story::new();
    for step in way(at) {
        succeed(&daemon, step, "");
        story.call(step);
    }
    // Refused while there is a container, but no error; the shim remembers it, and the Go shim is asked again.
    if !matches!(at, At::Unknown | At::Deleted) {
        assert_eq!(call(&daemon, "Shutdown", "", 0), "ok");
        assert_ne!(pid(&daemon, ""), 0, "it is still there");
    }
    clean(&daemon, &mut story);
    daemon.end();
}

#[test]
fn of_no_container() {
    inits(At::Unknown);
}

#[test]
fn of_a_created_container() {
    inits(At::Created);
}

#[test]
fn of_a_running_container() {
    inits(At::Running);
}

#[test]
fn of_a_paused_container() {
    inits(At::Paused);
}

#[test]
fn of_a_stopped_container() {
    inits(At::Stopped);
}

#[test]
fn of_a_deleted_container() {
    inits(At::Deleted);
}

/// Every call about an exec process in every state.
#[test]
fn of_exec_processes() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    for (column, at) in STATES.into_iter().enumerate() {
        for (name, wants) in &EXEC {
            daemon.forget_events();
            for step in ["Create", "Start"] {
                succeed(&daemon, step, "");
            }
            let mut want = vec!["create", "start"];
            for step in way(at) {
                match *step {
                    "Create" => succeed(&daemon, "Exec", "e"),
                    "Pause" => succeed(&daemon, "Pause", ""),
                    other => succeed(&daemon, other, "e"),
                }
                want.extend(match *step {
                    "Create" => Some("exec-added e"),
                    "Start" => Some("exec-started e"),
                    "Pause" => Some("paused"),
                    "Kill" => Some("exit e 137"),
                    _ => None,
                });
            }
            let answer = call(&daemon, name, "e", pid(&daemon, "e"));
            assert!(matches(&answer, wants[column]), "{name}, {at:?}: {answer} instead of {}", wants[column]);
            match (*name, at) {
                ("Exec", At::Unknown | At::Deleted) => want.push("exec-added e"),
                ("Start", At::Created) => want.push("exec-started e"),
                _ => {}
            }
            if at == At::Paused {
                succeed(&daemon, "Resume", "");
                want.push("resumed");
            }
            // The end of the init's pid namespace, if nothing else, ends it, and before the init.
            daemon.finish();
            if matches!(at, At::Running | At::Paused) || (*name, at) == ("Start", At::Created) {
                want.push("exit e 137");
            }
            want.extend(["exit init 137", "delete 137"]);
            eventually("all has been told", || events(&daemon).len() >= want.len());
            let mut events = events(&daemon);
            if (*name, at) == ("Kill", At::Paused) {
                // What is frozen in a cgroup of v1 dies when it is thawed, in v2 at once.
                let (exit, resumed) = ("exit e 137".to_string(), "resumed".to_string());
                let place = |one: &String| events.iter().position(|event| event == one).expect("told");
                let (exit, resumed) = (place(&exit), place(&resumed));
                if exit < resumed {
                    events.swap(exit, resumed);
                }
            }
            assert_eq!(events, want, "{name}, {at:?}: events");
        }
    }
    daemon.end();
}

/// The calls in this order: an exec process whose program is not there, and then one that comes too late.
#[test]
fn of_exec_processes_that_do_not_start() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    for step in ["Create", "Start"] {
        succeed(&daemon, step, "");
    }
    daemon.exec("e", &["no-such-program"]).unwrap();
    let no_program = if is_skiff() {
        "INVALID_ARGUMENT: executable file not found in $PATH"
    } else {
        "UNKNOWN: executable file not found in $PATH"
    };
    // The Go shim has it created again, with an exit of 0 all the same.
    for (name, want) in [
        ("Start", no_program),
        ("State", "ok e STOPPED pid=0 exit=255 terminal=false / ok e CREATED pid=0 exit=0 terminal=false"),
        ("Wait", "ok exit=255 / ok exit=0"),
        ("Kill", "finished / FAILED_PRECONDITION: process not created"),
        ("CloseIO", "ok"),
        ("Delete", "ok pid=0 exit=255 / ok pid=0 exit=0"),
        ("State", "gone"),
    ] {
        let answer = call(&daemon, name, "e", 0);
        assert!(matches(&answer, want), "{name}: {answer} instead of {want}");
    }
    daemon.exec("late", &["true"]).unwrap();
    daemon.kill("", 9, false).unwrap();
    daemon.wait("").unwrap();
    for (name, want) in
        [("Start", "no: "), ("Kill", "FAILED_PRECONDITION: process"), ("Delete", "ok pid=0 exit=0"), ("State", "gone")]
    {
        let answer = call(&daemon, name, "late", 0);
        assert!(matches(&answer, want), "late {name}: {answer} instead of {want}");
    }
    daemon.delete("").unwrap();
    let want = ["create", "start", "exec-added e", "exec-added late", "exit init 137", "delete 137"];
    told(&daemon, "in the end", &want);
    daemon.end();
}

/// An init whose program turns out to be none when it is started.
#[test]
fn of_a_container_that_does_not_start() {
    if !is_skiff() {
        // runc has answered by then.
        return;
    }
    let bundle = skiff_test_support::Bundle::new(&["bad"]);
    let program = bundle.rootfs().join("bin/bad");
    std::fs::write(&program, "not a program").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let daemon = Daemon::with(bundle);
    for (name, want) in [
        ("Create", "ok pid>0=true"),
        ("Start", "INVALID_ARGUMENT: exec format error"),
        ("Wait", "ok exit=1"),
        ("State", "ok ID STOPPED pid=PID exit=1 terminal=false"),
        ("Kill", "finished"),
        ("Exec", "no: cannot exec"),
        ("Start", "no: cannot start"),
        ("Delete", "ok pid=PID exit=1"),
        ("State", "gone"),
    ] {
        let answer = call(&daemon, name, "", pid(&daemon, ""));
        assert!(matches(&answer, want), "{name}: {answer} instead of {want}");
    }
    told(&daemon, "in the end", &["create", "exit init 1", "delete 1"]);
    daemon.end();
}
