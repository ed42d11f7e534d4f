//! containerd goes and comes back; shims die.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skiff_test_support::{Containerd, eventually, unique};

crate::under_both!(
    output_survives_a_restart_of_containerd,
    nothing_is_lost_when_containerd_is_restarted_under_load,
    a_killed_shim_is_cleaned_up_after,
    a_shim_that_is_told_to_end_is_cleaned_up_after,
    a_killed_shim_of_a_group_takes_all_with_it,
);

fn output_survives_a_restart_of_containerd(containerd: &mut Containerd) {
    let id = unique("restart");
    let log = containerd.dir().join("out.log");
    let uri = format!("file://{}", log.display());
    let script = "for i in $(seq 1 20); do echo line $i; sleep 0.1; done; exit 9";
    containerd.run(&["-d", "--log-uri", &uri], &id, &["sh", "-c", script]).ok();
    containerd.down();
    eventually("the container writes on", || std::fs::read_to_string(&log).unwrap_or_default().ends_with("line 20\n"));
    containerd.up();
    let text = std::fs::read_to_string(&log).expect("a log");
    assert_eq!(text.lines().count(), 20, "{text}");
    if containerd.is_skiff() {
        // The Go shim's containers that exit while containerd is away lose their status.
        eventually("the task is known to have stopped", || containerd.status(&id).as_deref() == Some("STOPPED"));
        let done = containerd.ctr(&["tasks", "rm", &id]);
        assert!(done.err.contains('9'), "the exit status is kept: {done:?}");
    } else {
        containerd.ctr(&["tasks", "rm", "-f", &id]);
    }
    containerd.ctr(&["containers", "rm", &id]).ok();
}

/// containerd's call of `delete` has come to its end: it lists a task whose shim is dead no more before that.
fn unmounted(id: &str) {
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    eventually("its rootfs is unmounted", || !mounts().contains(&format!("/{id}/rootfs")));
}

/// Writers that end with statuses of their own, and exec after exec in one that goes on, while containerd is killed and
/// started again and again.
fn nothing_is_lost_when_containerd_is_restarted_under_load(containerd: &mut Containerd) {
    const LINES: usize = 40;
    let dir = containerd.dir().to_path_buf();
    let log = |id: &str| dir.join(format!("{id}.log"));
    let lines = |id: &str| std::fs::read_to_string(log(id)).unwrap_or_default().lines().count();
    let start = |containerd: &Containerd, id: &str, script: &str| {
        let uri = format!("file://{}", log(id).display());
        containerd.run(&["-d", "--log-uri", &uri], id, &["sh", "-c", script]).ok();
    };
    let writers: Vec<(String, usize)> = (11..14).map(|status| (unique("writer"), status)).collect();
    for (id, status) in &writers {
        // One after the other they end, some while containerd is away.
        let pause = 0.01 * *status as f64;
        start(
            containerd,
            id,
            &format!("for i in $(seq 1 {LINES}); do echo line $i; sleep {pause}; done; exit {status}"),
        );
    }
    let stays = unique("stays");
    start(containerd, &stays, "while echo still there; do sleep 0.05; done");
    let inits: Vec<i32> = std::iter::once(containerd.pid(&stays)).collect();
    for round in 0..3 {
        {
            let (containerd, stays, down) = (&*containerd, &stays, AtomicBool::new(false));
            std::thread::scope(|scope| {
                let execs = scope.spawn(|| {
                    let mut done = 0;
                    while !down.load(Ordering::SeqCst) {
                        let name = format!("e{round}-{done}");
                        let exec = containerd.ctr(&["tasks", "exec", "--exec-id", &name, stays, "sh", "-c", "exit 6"]);
                        assert_eq!(exec.code, 6, "{exec:?}");
                        done += 1;
                    }
                    done
                });
                std::thread::sleep(std::time::Duration::from_millis(400));
                down.store(true, Ordering::SeqCst);
                assert!(execs.join().expect("execs") > 0);
            });
        }
        // One is under way when it goes.
        let left = unique("left");
        let mut under_way = containerd.ctr_background(&["tasks", "exec", "--exec-id", &left, &stays, "sleep", "0.3"]);
        std::thread::sleep(std::time::Duration::from_millis(100));
        containerd.down();
        let _ = under_way.kill();
        let _ = under_way.wait();
        let seen = lines(&stays);
        eventually("it writes on without containerd", || lines(&stays) > seen + 2);
        containerd.up();
        assert_eq!(containerd.status(&stays).as_deref(), Some("RUNNING"));
    }
    assert_eq!(containerd.pid(&stays), inits[0]);
    for (id, status) in &writers {
        eventually("it has written all", || lines(id) == LINES);
        if containerd.is_skiff() {
            // The Go shim's containers that exit while containerd is away lose their status, or all.
            eventually("it is known to have stopped", || containerd.status(id).as_deref() == Some("STOPPED"));
            let done = containerd.ctr(&["tasks", "rm", id]);
            assert!(done.err.contains(&status.to_string()), "the exit status is kept: {done:?}");
        } else {
            containerd.ctr(&["tasks", "rm", "-f", id]);
        }
        containerd.ctr(&["containers", "rm", id]).ok();
    }
    containerd.ctr(&["tasks", "kill", "-s", "KILL", &stays]).ok();
    eventually("the task stops", || containerd.status(&stays).as_deref() == Some("STOPPED"));
    containerd.ctr(&["tasks", "rm", &stays]);
    containerd.ctr(&["containers", "rm", &stays]).ok();
}

/// A shim that ends by this signal takes its containers with it; containerd tells of the end of each, with 137.
fn ends_by(signal: Signal, containerd: &Containerd, ids: &[String], flags: &[&str]) {
    let mut events = containerd.ctr_background(&["events"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    for id in ids {
        containerd.run(&[&["-d"][..], flags].concat(), id, &["sleep", "1000"]).ok();
    }
    let inits: Vec<i32> = ids.iter().map(|id| containerd.pid(id)).collect();
    let shims = containerd.shims();
    assert_eq!(shims.len(), 1, "one shim serves them all");
    kill(Pid::from_raw(shims[0]), signal).expect("kill");
    for (id, init) in ids.iter().zip(inits) {
        eventually("the task is gone", || containerd.status(id).is_none());
        eventually("its process is gone", || !Path::new(&format!("/proc/{init}")).exists());
        unmounted(id);
        containerd.ctr(&["containers", "rm", id]).ok();
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    let _ = events.kill();
    let mut text = String::new();
    std::io::Read::read_to_string(events.stdout.as_mut().expect("piped"), &mut text).expect("events");
    let _ = events.wait();
    for id in ids {
        let exit = text.lines().find(|line| line.contains("/tasks/exit") && line.contains(id.as_str()));
        let exit = exit.unwrap_or_else(|| panic!("the exit of {id}: {text}"));
        assert!(exit.contains("\"exit_status\":137"), "{exit}");
    }
}

fn a_killed_shim_is_cleaned_up_after(containerd: &mut Containerd) {
    ends_by(Signal::SIGKILL, containerd, &[unique("killed")], &[]);
}

fn a_shim_that_is_told_to_end_is_cleaned_up_after(containerd: &mut Containerd) {
    ends_by(Signal::SIGTERM, containerd, &[unique("told")], &[]);
}

fn a_killed_shim_of_a_group_takes_all_with_it(containerd: &mut Containerd) {
    let leader = unique("leader");
    let annotation = format!("io.containerd.runc.v2.group={leader}");
    let ids = [leader, unique("member"), unique("member")];
    ends_by(Signal::SIGKILL, containerd, &ids, &["--annotation", &annotation]);
}
