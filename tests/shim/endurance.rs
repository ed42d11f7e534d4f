//! Many times: cycles, and clients that go away in the middle of a call. Nothing is left of it in the shim.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, KillRequest, StartRequest, Status, WaitRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, Code};
use skiff_test_support::eventually;

use crate::daemon::{Daemon, frame, is_skiff};

/// What a shim holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    children: usize,
    /// Names below /run that have the container's id in them.
    names: BTreeSet<String>,
}

fn held(daemon: &Daemon, pid: i32) -> Held {
    let count = |dir: String| std::fs::read_dir(dir).expect("procfs").count();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let mut names = BTreeSet::new();
    collect(Path::new("/run/containerd"), &daemon.id, &mut names);
    Held { descriptors: count(format!("/proc/{pid}/fd")), children: children.split_whitespace().count(), names }
}

fn collect(dir: &Path, mark: &str, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path().display().to_string();
        if path.contains(mark) {
            names.insert(path);
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), mark, names);
        }
    }
}

/// KiB that only this process has.
fn private(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let line = text.lines().find(|line| line.starts_with("Private_Dirty:")).expect("a figure");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

fn exec_cycle(daemon: &Daemon, at: usize) {
    let id = format!("e{at}");
    daemon.exec(&id, &["true"]).unwrap();
    daemon.begin(&id).unwrap();
    assert_eq!(daemon.wait(&id).unwrap(), 0);
    daemon.delete(&id).unwrap();
}

fn container_cycle(daemon: &Daemon) {
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    daemon.finish();
}

/// Cycles leave descriptors, children and files as they were, and take no more than two pages for a hundred.
#[test]
fn cycles() {
    if !is_skiff() {
        // The Go shim's memory goes up and down with its garbage.
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let pid = daemon.pid();
    let grows = |what: &str, cycles: usize, cycle: &dyn Fn(usize)| {
        (0..cycles / 2).for_each(cycle);
        let before = held(&daemon, pid);
        let memory = private(pid);
        (0..cycles).for_each(cycle);
        eventually("what was held is let go", || held(&daemon, pid) == before);
        // Memory goes back to the kernel a moment after the last call.
        let most = memory + 8 * cycles.div_ceil(100) as u64;
        eventually(&format!("{what}: {memory} KiB again, not {}", private(pid)), || private(pid) <= most);
    };
    grows("containers", 100, &|_| container_cycle(&daemon));
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    grows("execs", 300, &|at| exec_cycle(&daemon, at));
    daemon.finish();
    daemon.end();
}

/// Numbers that look random, the same each time (Numerical Recipes' generator).
struct Random(u32);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as usize % limit
    }
}

/// Sends a request, or half of it, and is gone at some point of the call.
fn drop_in_the_middle(daemon: &Daemon, random: &mut Random, method: &str, message: &impl Message) {
    let mut frames = frame(1, method, message);
    let mut socket = daemon.socket();
    if random.below(4) == 0 {
        // One more that is answered later, or never.
        let wait = WaitRequest { id: daemon.id.clone(), ..Default::default() };
        frames = [frame(1, "Wait", &wait), frame(3, method, message)].concat();
    }
    let sent = if random.below(5) == 0 { random.below(frames.len()) } else { frames.len() };
    socket.write_all(&frames[..sent]).unwrap();
    std::thread::sleep(Duration::from_micros(random.below(6000) as u64));
}

/// The same call again, over a connection that stays: it does what has not been done, or is told that it has.
#[track_caller]
fn again<T: std::fmt::Debug>(result: ttrpc::Result<T>, done: Code) {
    match result {
        Ok(_) => {}
        Err(ttrpc::Error::RpcStatus(status)) if status.code.enum_value() == Ok(done) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn clients_that_go_away_in_the_middle() {
    if !is_skiff() {
        // The Go shim cancels what a client that goes away has asked for.
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let pid = daemon.pid();
    container_cycle(&daemon);
    let before = held(&daemon, pid);
    let mut random = Random(1);
    for round in 0..60 {
        let id = || daemon.id.clone();
        let exec_id = || format!("e{round}");
        drop_in_the_middle(&daemon, &mut random, "Create", &daemon.create_request());
        again(daemon.create(), Code::ALREADY_EXISTS);
        eventually("it is created", || daemon.state("").is_ok());
        assert_eq!(daemon.status(""), Status::CREATED);
        drop_in_the_middle(&daemon, &mut random, "Start", &StartRequest { id: id(), ..Default::default() });
        again(daemon.begin(""), Code::FAILED_PRECONDITION);
        eventually("it runs", || daemon.status("") == Status::RUNNING);
        drop_in_the_middle(&daemon, &mut random, "Exec", &daemon.exec_request(&exec_id(), &["sh", "-c", "exit 4"]));
        again(daemon.exec(&exec_id(), &["sh", "-c", "exit 4"]), Code::ALREADY_EXISTS);
        let start = StartRequest { id: id(), exec_id: exec_id(), ..Default::default() };
        drop_in_the_middle(&daemon, &mut random, "Start", &start);
        again(daemon.begin(&exec_id()), Code::FAILED_PRECONDITION);
        assert_eq!(daemon.wait(&exec_id()).unwrap(), 4);
        let delete = DeleteRequest { id: id(), exec_id: exec_id(), ..Default::default() };
        drop_in_the_middle(&daemon, &mut random, "Delete", &delete);
        again(daemon.delete(&exec_id()), Code::NOT_FOUND);
        drop_in_the_middle(&daemon, &mut random, "Kill", &KillRequest { id: id(), signal: 9, ..Default::default() });
        again(daemon.kill("", 9, false), Code::NOT_FOUND);
        assert_eq!(daemon.wait("").unwrap(), 137);
        drop_in_the_middle(&daemon, &mut random, "Delete", &DeleteRequest { id: id(), ..Default::default() });
        again(daemon.delete(""), Code::NOT_FOUND);
        let want = [
            "create",
            "start",
            &format!("exec-added {}", exec_id()),
            &format!("exec-started {}", exec_id()),
            &format!("exit {} 4", exec_id()),
            "exit init 137",
            "delete 137",
        ];
        eventually("all has been told", || daemon.events(&daemon.id).len() >= want.len() * (round + 2) - 3);
        let events = daemon.events(&daemon.id);
        assert_eq!(events[events.len() - want.len()..], want, "once each, round {round}");
    }
    eventually("what was held is let go", || held(&daemon, pid) == before);
    daemon.end();
}
