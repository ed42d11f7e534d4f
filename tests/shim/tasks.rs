//! What people do with ctr.

use skiff_test_support::{Containerd, eventually, has_controllers, unique};

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
    loggers_get_the_streams,
    an_exec_ends_with_its_tree,
    oom_is_told_before_the_exit,
    cycles_leave_nothing_in_the_shim,
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

/// `binary://` loggers get both streams, and their names in the environment.
fn loggers_get_the_streams(containerd: &mut Containerd) {
    let logger = containerd.dir().join("logger");
    let log = containerd.dir().join("logged");
    let script = format!(
        "#!/bin/sh\nexec >{}\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $*\"\nexec 5>&-\ncat <&3 &\ncat <&4 &\nwait\necho end\n",
        log.display()
    );
    std::fs::write(&logger, script).unwrap();
    std::fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let id = unique("log");
    let uri = format!("binary://{}?key=value", logger.display());
    let args = ["-d", "--log-uri", uri.as_str()];
    containerd.run(&args, &id, &["sh", "-c", "echo out; echo err >&2"]).ok();
    let read = || std::fs::read_to_string(&log).unwrap_or_default();
    eventually("both streams are in the log", || read().contains("out\n") && read().contains("err\n"));
    assert!(read().starts_with(&id) && read().contains(" key value\n"), "{}", read());
    if containerd.is_skiff() {
        // The Go shim keeps the streams open until the task is deleted.
        eventually("the logger sees the end", || read().ends_with("end\n"));
    }
    eventually("the task stops", || containerd.status(&id).as_deref() == Some("STOPPED"));
    containerd.ctr(&["tasks", "rm", &id]);
    containerd.ctr(&["containers", "rm", &id]).ok();
}

/// A deleted exec process takes those with it that it has started in the background, unless an annotation says not to.
fn an_exec_ends_with_its_tree(containerd: &mut Containerd) {
    if !containerd.is_skiff() {
        return;
    }
    for keep in [false, true] {
        let id = unique("tree");
        let annotation = format!("io.containerd.skiff.exec-keeps-children={keep}");
        containerd.run(&["-d", "--annotation", &annotation], &id, &["sleep", "1000"]).ok();
        let script = "(sleep 777 </dev/null >/dev/null 2>&1 &) ; echo started";
        let done = containerd.ctr(&["tasks", "exec", "--exec-id", "e", &id, "sh", "-c", script]).ok();
        assert_eq!(done.out, "started\n");
        let sleeping =
            || containerd.ctr(&["tasks", "exec", "--exec-id", "ps", &id, "ps"]).ok().out.contains("sleep 777");
        assert_eq!(sleeping(), keep);
        end(containerd, &id);
    }
}

/// The kernel's OOM killer is told of, before the exit of whom it has killed.
fn oom_is_told_before_the_exit(containerd: &mut Containerd) {
    if !has_controllers(&["memory"]) {
        return;
    }
    let mut watching = containerd.ctr_background(&["events"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let id = unique("oom");
    let hog = "x=$(yes aaaaaaaaaaaaaaaa | head -c 200000000 | tr -d '\\n'); echo survived";
    let done = containerd.run(&["--rm", "--memory-limit", "16777216"], &id, &["sh", "-c", hog]);
    assert!(!done.out.contains("survived"), "{done:?}");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let _ = watching.kill();
    let mut text = String::new();
    std::io::Read::read_to_string(watching.stdout.as_mut().unwrap(), &mut text).unwrap();
    let _ = watching.wait();
    let at = |topic: &str| text.find(topic).unwrap_or_else(|| panic!("{topic} in {text}"));
    assert!(at("/tasks/oom") < at("/tasks/exit"), "{text}");
}

/// Many cycles leave descriptors and memory as they were.
fn cycles_leave_nothing_in_the_shim(containerd: &mut Containerd) {
    if !containerd.is_skiff() {
        return;
    }
    let id = unique("soak");
    containerd.run(&["-d"], &id, &["sleep", "1000"]).ok();
    let shim = containerd.shims()[0];
    let cycle = |from: usize, n: usize| {
        for at in from..from + n {
            assert_eq!(containerd.ctr(&["tasks", "exec", "--exec-id", &format!("c{at}"), &id, "true"]).code, 0);
        }
    };
    let look = || {
        let fds = std::fs::read_dir(format!("/proc/{shim}/fd")).unwrap().count();
        let status = std::fs::read_to_string(format!("/proc/{shim}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        (fds, line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
    };
    cycle(0, 20);
    let before = look();
    cycle(20, 60);
    let mut after = look();
    for _ in 0..100 {
        if after.0 <= before.0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        after = look();
    }
    assert!(after.0 <= before.0, "descriptors: {before:?} {after:?}");
    assert!(after.1 <= before.1 + 64, "memory in KiB: {before:?} {after:?}");
    end(containerd, &id);
}
