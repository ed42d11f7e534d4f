//! Pods and containers come, run, answer and go.

use std::time::{Duration, Instant};

use skiff_cri_client::Code;
use skiff_cri_client::cri::{self, ContainerState, ContainerStatus, PodSandboxState};
use skiff_test_support::{Version, eventually};

use crate::node::{Node, call, idle, program, sh};

crate::under_both!(
    a_pod_with_a_container,
    exec_answers_with_output_and_exit_code,
    exec_has_a_timeout,
    ends_have_a_code_and_a_reason,
    what_cannot_start_says_why,
    stop_is_kind_then_firm,
    a_container_that_is_not_started_can_be_stopped_and_removed,
    a_stopped_pod_stops_its_containers,
    a_running_container_can_be_removed,
    what_is_not_there_is_no_failure,
    logs,
    a_lot_of_log,
    a_log_can_be_rotated,
    one_shim_per_pod,
    init_containers_run_in_order,
    containers_are_tried_again,
    many_pods_at_once,
    environment_and_directory,
    events_of_a_container,
    a_handler_says_what_it_can;
    with_a_pause_container: the_shim_of_a_stopped_pod_is_not_kept;
    built_in: a_pod_with_a_container, a_stopped_pod_stops_its_containers, one_shim_per_pod, many_pods_at_once,
        the_shim_of_a_stopped_pod_is_not_kept;
    streaming: a_pod_with_a_container, exec_answers_with_output_and_exit_code, exec_has_a_timeout,
        what_cannot_start_says_why, a_stopped_pod_stops_its_containers, logs, a_log_can_be_rotated, many_pods_at_once,
);

pub fn a_pod_with_a_container(node: &mut Node) {
    let pod = node.pod();
    assert_eq!(pod.status().state(), PodSandboxState::SandboxReady);
    let container = pod.create(idle()).expect("created");
    assert_eq!(container.status().state(), ContainerState::ContainerCreated);
    container.start().expect("started");
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    let listed = call!(node, list_containers, cri::Empty {}).expect("a list").containers;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].pod_sandbox_id.as_str(), listed[0].state()), (&*pod.id, ContainerState::ContainerRunning));
    assert_eq!(container.exec(&["echo", "inside"]).ok().out, "inside\n");
    container.stop(0);
    let status = container.ended();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(status.created_at > 0 && status.started_at >= status.created_at, "{status:?}");
    assert!(status.finished_at >= status.started_at, "{status:?}");
    container.remove();
    assert_eq!(call!(node, list_containers, cri::Empty {}).expect("a list").containers, []);
    pod.stop();
    assert_eq!(pod.status().state(), PodSandboxState::SandboxNotready);
    pod.stop();
    pod.remove();
}

fn exec_answers_with_output_and_exit_code(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    let done = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (3, "out\n", "err\n"));
    assert_eq!(container.exec(&["cat"]).ok().out, "", "stdin is at its end");
    assert_eq!(container.exec(&["sh", "-c", "kill -TERM $$"]).code, 143);
    let megabyte = container.exec(&["sh", "-c", "yes 0123456789abcde | head -n 65536"]).ok();
    assert_eq!(megabyte.out.len(), 1 << 20, "not a byte is lost");
    let error = container.try_exec(&["no-such-program"], 0).expect_err("there is no such program");
    assert!(error.message().contains("executable file not found in $PATH"), "{error}");
    for at in 0..20 {
        assert_eq!(container.exec(&["sh", "-c", &format!("exit {at}")]).code, at);
    }
    std::thread::scope(|scope| {
        let container = &container;
        let execs: Vec<_> = (0..10)
            .map(|at| scope.spawn(move || container.exec(&["sh", "-c", &format!("sleep 0.3; echo {at}")]).ok()))
            .collect();
        for (at, exec) in execs.into_iter().enumerate() {
            assert_eq!(exec.join().expect("an exec").out, format!("{at}\n"));
        }
    });
    pod.end();
}

pub fn exec_has_a_timeout(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    let begin = Instant::now();
    let error = container.try_exec(&["sleep", "987"], 1).expect_err("it takes too long");
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    let took = begin.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(15)).contains(&took), "{took:?}");
    assert!(!container.exec(&["ps"]).ok().out.contains("sleep 987"), "the program is killed");
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    pod.end();
}

fn ends_have_a_code_and_a_reason(node: &mut Node) {
    let pod = node.pod();
    for (script, code, reason) in [("exit 0", 0, "Completed"), ("exit 7", 7, "Error"), ("kill -9 $$", 0, "Completed")] {
        // A PID 1 cannot kill itself.
        let container = pod.start(sh(script));
        let status = container.ended();
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{script}");
        let error = container.try_exec(&["true"], 0).expect_err("it has ended");
        assert!(error.message().contains("container is in CONTAINER_EXITED state"), "{error}");
        container.remove();
    }
    pod.end();
}

pub fn what_cannot_start_says_why(node: &mut Node) {
    let pod = node.pod();
    let container = pod.create(program(&["no-such-program"])).expect("created");
    let error = container.start().expect_err("it cannot start");
    assert!(error.message().contains("executable file not found in $PATH"), "{error}");
    let ContainerStatus { exit_code, reason, message, .. } = container.ended();
    assert_eq!((exit_code, reason.as_str()), (128, "StartError"));
    assert!(message.contains("no-such-program"), "{message}");
    container.remove();
    let mut config = idle();
    config.mounts = vec![cri::Mount {
        container_path: "/proc/nowhere".into(),
        host_path: node.containerd.dir().display().to_string(),
        ..cri::Mount::default()
    }];
    let container = pod.create(config).expect("created");
    let error = container.start().expect_err("nothing is mounted in /proc");
    assert!(error.message().contains("/proc/nowhere"), "{error}");
    container.remove();
    assert_eq!(pod.says("echo the pod goes on"), "the pod goes on\n");
    pod.end();
}

fn stop_is_kind_then_firm(node: &mut Node) {
    let pod = node.pod();
    let kind = pod.start(sh("trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done"));
    eventually("the trap is set", || kind.output() == "ready\n");
    let begin = Instant::now();
    kind.stop(20);
    assert!(begin.elapsed() < Duration::from_secs(10), "it is not waited for longer than it takes");
    assert_eq!((kind.ended().exit_code, kind.output().as_str()), (5, "ready\nbye\n"));
    kind.stop(20);
    let deaf = pod.start(sh("trap '' TERM; echo ready; while :; do sleep 0.05; done"));
    eventually("the trap is set", || deaf.output() == "ready\n");
    let begin = Instant::now();
    deaf.stop(1);
    assert!((Duration::from_secs(1)..Duration::from_secs(15)).contains(&begin.elapsed()));
    assert_eq!(deaf.ended().exit_code, 137);
    pod.end();
}

pub fn a_container_that_is_not_started_can_be_stopped_and_removed(node: &mut Node) {
    let pod = node.pod();
    let stopped = pod.create(idle()).expect("created");
    stopped.stop(0);
    stopped.remove();
    pod.create(idle()).expect("created").remove();
    pod.create(idle()).expect("created");
    pod.end();
}

fn a_stopped_pod_stops_its_containers(node: &mut Node) {
    let pod = node.pod();
    let containers = [pod.start(idle()), pod.start(sh("sleep 1000 & sleep 1000 & wait"))];
    pod.stop();
    for container in &containers {
        assert_eq!(container.ended().exit_code, 137);
    }
    pod.remove();
}

fn the_shim_of_a_stopped_pod_is_not_kept(node: &mut Node) {
    let pod = node.pod();
    pod.start(idle());
    assert_eq!(node.containerd.shims().len(), 1);
    pod.stop();
    eventually("the shim is gone", || node.containerd.shims().is_empty());
    pod.remove();
}

fn a_running_container_can_be_removed(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    let pid = container.pid();
    container.remove();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    pod.end();
}

fn what_is_not_there_is_no_failure(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(sh("exit 0"));
    container.ended();
    for _ in 0..2 {
        container.stop(0);
    }
    let request = container.request();
    container.remove();
    call!(node, remove_container, request).expect("removed again");
    // containerd 1.x says that it is not found, of which the kubelet makes nothing.
    let fine = |stopped: Result<cri::Empty, skiff_cri_client::Status>| {
        let code = stopped.err().map(|status| status.code());
        assert!(code.is_none_or(|code| code == Code::NotFound), "{code:?}");
    };
    let stop = cri::StopContainerRequest { container_id: "never-there".into(), timeout: 0 };
    fine(call!(node, stop_container, stop));
    pod.stop();
    pod.stop();
    let request = pod.request();
    pod.remove();
    call!(node, remove_pod_sandbox, request.clone()).expect("removed again");
    fine(call!(node, stop_pod_sandbox, request));
}

fn logs(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(sh("echo out; echo err >&2"));
    let log = || std::fs::read_to_string(&container.log).unwrap_or_default();
    eventually("both lines are there", || log().lines().count() == 2);
    for entry in ["stdout F out", "stderr F err"] {
        let line = log().lines().find(|line| line.ends_with(entry)).expect("an entry").to_string();
        let time = line.strip_suffix(entry).expect("a time");
        assert!(time.contains('T') && time.ends_with("Z "), "{line}");
    }
    let container = pod.start(sh("yes | tr -d '\\n' | head -c 40000; echo; echo -n end; sleep 0.5"));
    let long = format!("{}\nend", "y".repeat(40_000));
    eventually("long lines can be put together, and the end of one is not invented", || container.output() == long);
    let log = std::fs::read_to_string(&container.log).expect("a log");
    assert!(log.lines().all(|line| line.len() < 17_000) && log.contains(" stdout P y"), "long lines are cut");
    container.ended();
    pod.end();
}

fn a_lot_of_log(node: &mut Node) {
    let pod = node.pod();
    let begin = Instant::now();
    let container = pod.start(sh("seq 1 50000"));
    assert_eq!(container.ended().exit_code, 0);
    // containerd gives the shim ten seconds to delete a task whose output it may have stopped to read.
    assert!(begin.elapsed() < Duration::from_secs(8), "it took {:?} to end", begin.elapsed());
    let want: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    eventually("the lines are there", || {
        let output = container.output();
        // containerd 1.6 may stop before the last of them, whichever the shim.
        if node.containerd.version() == Version::V1 { want.starts_with(&output) } else { output == want }
    });
    pod.end();
}

fn a_log_can_be_rotated(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(sh("n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"));
    eventually("there is a log", || container.output().lines().count() > 5);
    let old = container.log.with_extension("old");
    std::fs::rename(&container.log, &old).expect("rename the log");
    call!(node, reopen_container_log, container.request()).expect("reopened");
    eventually("there is a new log", || container.log.exists() && container.output().lines().count() > 5);
    container.stop(0);
    let last = std::fs::read_to_string(&old).expect("the old log");
    let last: u32 = last.lines().last().and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect("a number");
    let next: u32 = container.output().lines().next().and_then(|line| line.parse().ok()).expect("a number");
    assert_eq!(next, last + 1, "not a line is lost");
    pod.end();
}

fn one_shim_per_pod(node: &mut Node) {
    let pods = [node.pod(), node.pod()];
    let containers: Vec<_> = pods.iter().flat_map(|pod| [pod.start(idle()), pod.start(idle())]).collect();
    let shims = node.containerd.shims();
    assert_eq!(shims.len(), 2);
    for shim in shims {
        let line = std::fs::read_to_string(format!("/proc/{shim}/cmdline")).expect("a command line");
        let program = line.split('\0').next().expect("a program");
        assert_eq!(program.ends_with("containerd-shim-skiff-v2"), node.containerd.is_skiff(), "{program}");
        if node.containerd.is_skiff() {
            assert_eq!(std::fs::read_dir(format!("/proc/{shim}/task")).expect("threads").count(), 1);
        }
    }
    for container in containers {
        assert_eq!(container.exec(&["echo", "here"]).ok().out, "here\n");
        container.stop(0);
        container.remove();
    }
    assert_eq!(node.containerd.shims().len(), 2, "a shim stays as long as its pod");
    for pod in pods {
        pod.end();
    }
}

fn init_containers_run_in_order(node: &mut Node) {
    let pod = node.pod();
    let shared = node.containerd.dir().join("shared");
    std::fs::create_dir(&shared).expect("a volume");
    for at in 1..=3 {
        let mut init = sh(&format!("echo {at} >> /shared/order; cat /shared/order"));
        init.mounts = vec![cri::Mount {
            container_path: "/shared".into(),
            host_path: shared.display().to_string(),
            ..cri::Mount::default()
        }];
        let container = pod.start(init);
        assert_eq!(container.ended().reason, "Completed");
        assert_eq!(container.output().lines().count(), at, "the earlier ones have run");
    }
    pod.start(idle());
    pod.end();
}

fn containers_are_tried_again(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("exit 1");
    for attempt in 0..5 {
        config.metadata.as_mut().expect("metadata").attempt = attempt;
        assert_eq!(pod.start(config.clone()).ended().exit_code, 1);
    }
    pod.end();
}

pub fn many_pods_at_once(node: &mut Node) {
    let node = &*node;
    std::thread::scope(|scope| {
        for at in 0..8 {
            scope.spawn(move || {
                let pod = node.pod();
                let container = pod.start(idle());
                assert_eq!(container.exec(&["echo", &at.to_string()]).ok().out, format!("{at}\n"));
                assert_eq!(pod.says(&format!("echo {at}")), format!("{at}\n"));
                pod.end();
            });
        }
    });
}

fn environment_and_directory(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("echo $GREETING; pwd; echo $PATH; echo $HOSTNAME");
    config.envs = vec![cri::KeyValue { key: "GREETING".into(), value: "hello there".into() }];
    config.working_dir = "/made/on/the/way".into();
    let hostname = &pod.config.hostname;
    assert_eq!(pod.output(config), format!("hello there\n/made/on/the/way\n/bin\n{hostname}\n"));
    pod.end();
}

fn a_handler_says_what_it_can(node: &mut Node) {
    let status = call!(node, status, cri::StatusRequest { verbose: false }).expect("a status");
    if node.containerd.version() == Version::V1 {
        // Not in its interface yet.
        assert_eq!(status.runtime_handlers, []);
        return;
    }
    let handler = status.runtime_handlers.into_iter().find(|handler| handler.name == "path").expect("the handler");
    assert!(handler.features.expect("features").recursive_read_only_mounts);
}

/// What a kubelet with the evented PLEG goes by; containerd 1.6 has none.
fn events_of_a_container(node: &mut Node) {
    if node.containerd.version() == Version::V1 {
        return;
    }
    let events = skiff_cri_client::events(&node.containerd.socket());
    let pod = node.pod();
    // Until somebody listens, they are nobody's.
    eventually("there are events", || {
        let container = pod.start(idle());
        container.stop(0);
        container.remove();
        events.try_recv().is_ok()
    });
    let container = pod.start(idle());
    let own = container.id.clone();
    container.stop(0);
    container.ended();
    container.remove();
    use cri::ContainerEventType as Type;
    let mut kinds = Vec::new();
    while kinds.last() != Some(&Type::ContainerDeletedEvent) {
        let (id, kind) = events.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("after {kinds:?}"));
        if id == own {
            kinds.push(kind);
        }
    }
    let want = [
        Type::ContainerCreatedEvent,
        Type::ContainerStartedEvent,
        Type::ContainerStoppedEvent,
        Type::ContainerDeletedEvent,
    ];
    assert_eq!(kinds, want);
    pod.end();
}
