//! What people do with ctr.

use skiff_test_support::{Containerd, eventually, unique};

crate::under_both!(
    output_and_exit_status,
    stdin_reaches_the_container,
    terminals,
    a_detached_container_is_listed_entered_and_killed,
    what_cannot_run_leaves_nothing,
    instant_exits_are_not_lost,
    thirty_at_once,
    events_come_in_order,
    one_thread_serves,
);

fn output_and_exit_status(containerd: &mut Containerd) {
    let done = containerd.run(&["--rm"], &unique("out"), &["sh", "-c", "echo out; echo err >&2; exit 42"]);
    assert_eq!((done.code, done.out.as_str()), (42, "out\n"), "{}", done.err);
    assert!(done.err.contains("err\n"));
    assert_eq!(containerd.run(&["--rm"], &unique("true"), &["true"]).code, 0);
    let megabyte = containerd.run(&["--rm"], &unique("big"), &["sh", "-c", "yes 0123456789abcde | head -n 65536"]);
    assert_eq!((megabyte.code, megabyte.out.len()), (0, 1 << 20), "not a byte is lost");
}

fn stdin_reaches_the_container(containerd: &mut Containerd) {
    if !containerd.is_skiff() {
        // ctr asks for CloseIO only if its stdin ends after its Create was answered; the Go shim opens stdin before.
        return;
    }
    let done = containerd.run_with(&["--rm"], &unique("cat"), &["cat"], "to and fro").ok();
    assert_eq!(done.out, "to and fro");
    let long = "x".repeat(300_000);
    let done = containerd.run_with(&["--rm"], &unique("wc"), &["wc", "-c"], &long).ok();
    assert_eq!(done.out.trim(), "300000");
}

fn terminals(containerd: &mut Containerd) {
    let done = containerd.run(&["--rm", "-t"], &unique("tty"), &["sh", "-c", "tty; exit 5"]);
    assert!(done.code == 5 && done.out.contains("/dev/pts/"), "{done:?}");
    let id = unique("tty");
    containerd.run(&["-d"], &id, &["sleep", "1000"]).ok();
    let done = containerd.ctr_tty(&["tasks", "exec", "-t", "--exec-id", "e", &id, "tty"]);
    assert!(done.out.contains("/dev/pts/"), "{done:?}");
    end(containerd, &id);
}

/// Kills, deletes.
fn end(containerd: &Containerd, id: &str) {
    containerd.ctr(&["tasks", "kill", "-s", "KILL", id]).ok();
    eventually("the task stops", || containerd.status(id).as_deref() == Some("STOPPED"));
    containerd.ctr(&["tasks", "rm", id]);
    containerd.ctr(&["containers", "rm", id]).ok();
}

fn a_detached_container_is_listed_entered_and_killed(containerd: &mut Containerd) {
    let id = unique("bg");
    containerd.run(&["-d"], &id, &["sleep", "1000"]).ok();
    assert_eq!(containerd.status(&id).as_deref(), Some("RUNNING"));
    let exec =
        |name: &str, args: &[&str]| containerd.ctr(&[&["tasks", "exec", "--exec-id", name, &id][..], args].concat());
    let done = exec("e1", &["sh", "-c", "echo inside; exit 3"]);
    assert_eq!((done.code, done.out.as_str()), (3, "inside\n"), "{}", done.err);
    let done = containerd.ctr_with(&["tasks", "exec", "--exec-id", "e2", &id, "cat"], "piped").ok();
    assert_eq!(done.out, "piped");
    let done = exec("e3", &["no-such-program"]).failed();
    assert!(done.err.contains("executable file not found in $PATH"), "{}", done.err);
    for at in 0..20 {
        assert_eq!(exec(&format!("quick{at}"), &["true"]).code, 0);
    }
    let metrics = containerd.ctr(&["tasks", "metrics", &id]).ok().out;
    assert!(metrics.contains("pids.current"), "{metrics}");
    let pids = containerd.ctr(&["tasks", "ps", &id]).ok().out;
    assert!(pids.contains(&containerd.pid(&id).to_string()), "{pids}");
    containerd.ctr(&["tasks", "pause", &id]).ok();
    assert_eq!(containerd.status(&id).as_deref(), Some("PAUSED"));
    containerd.ctr(&["tasks", "resume", &id]).ok();
    containerd.ctr(&["tasks", "rm", &id]).failed();
    containerd.ctr(&["tasks", "kill", "-s", "KILL", &id]).ok();
    eventually("the task stops", || containerd.status(&id).as_deref() == Some("STOPPED"));
    containerd.ctr(&["tasks", "kill", "-s", "KILL", &id]).failed();
    let done = containerd.ctr(&["tasks", "rm", &id]);
    assert!(done.err.contains("137"), "the status of a killed task: {done:?}");
    containerd.ctr(&["containers", "rm", &id]).ok();
}

fn what_cannot_run_leaves_nothing(containerd: &mut Containerd) {
    let done = containerd.run(&["--rm"], &unique("nope"), &["no-such-program"]).failed();
    assert!(done.err.contains("executable file not found in $PATH"), "{}", done.err);
    let id = unique("mount");
    let mount = "type=bind,src=/no/such/source,dst=/x,options=rbind";
    let done = containerd.run(&["--rm", "--mount", mount], &id, &["true"]).failed();
    assert!(done.err.contains("/no/such/source"), "{}", done.err);
}

fn instant_exits_are_not_lost(containerd: &mut Containerd) {
    for at in 0..30 {
        let status = (at % 3).to_string();
        let done = containerd.run(&["--rm"], &unique("instant"), &["sh", "-c", &format!("echo {at}; exit {status}")]);
        assert_eq!((done.code, done.out), (at % 3, format!("{at}\n")), "{}", done.err);
    }
}

fn thirty_at_once(containerd: &mut Containerd) {
    let containerd = &*containerd;
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..30)
            .map(|at| {
                scope.spawn(move || {
                    containerd.run(&["--rm"], &unique("many"), &["sh", "-c", &format!("echo {at}; exit {at}")])
                })
            })
            .collect();
        for (at, run) in runs.into_iter().enumerate() {
            let done = run.join().expect("a run");
            assert_eq!((done.code, done.out), (at as i32, format!("{at}\n")), "{}", done.err);
        }
    });
}

fn events_come_in_order(containerd: &mut Containerd) {
    let mut events = containerd.ctr_background(&["events"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let id = unique("order");
    containerd.run(&["-d"], &id, &["sleep", "1000"]).ok();
    containerd.ctr(&["tasks", "exec", "--exec-id", "e", &id, "true"]).ok();
    end(containerd, &id);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let _ = events.kill();
    let text = std::io::read_to_string(events.stdout.take().expect("piped")).expect("utf-8");
    let _ = events.wait();
    let topics: Vec<&str> =
        text.split_whitespace().filter(|word| word.starts_with("/tasks/")).map(|word| &word[7..]).collect();
    assert_eq!(topics, ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"], "{text}");
}

fn one_thread_serves(containerd: &mut Containerd) {
    if !containerd.is_skiff() {
        return;
    }
    let id = unique("thread");
    containerd.run(&["-d"], &id, &["sleep", "1000"]).ok();
    containerd.ctr(&["tasks", "exec", "--exec-id", "e", &id, "true"]).ok();
    let shims = containerd.shims();
    assert_eq!(shims.len(), 1);
    let threads = || std::fs::read_dir(format!("/proc/{}/task", shims[0])).expect("the shim").count();
    assert_eq!(threads(), 1);
    let containerd = &*containerd;
    std::thread::scope(|scope| {
        for at in 0..4 {
            let id = &id;
            scope.spawn(move || {
                containerd.ctr(&["tasks", "exec", "--exec-id", &format!("p{at}"), id, "sleep", "1"]).ok()
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(threads(), 1, "while it works");
    });
    end(containerd, &id);
}
