//! containerd goes and comes back; shims die.

use skiff_test_support::{Containerd, eventually, unique};

crate::under_both!(
    output_survives_a_restart_of_containerd,
    a_killed_shim_is_cleaned_up_after,
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

fn a_killed_shim_is_cleaned_up_after(containerd: &mut Containerd) {
    let id = unique("killed");
    containerd.run(&["-d"], &id, &["sleep", "1000"]).ok();
    let init = containerd.pid(&id);
    for shim in containerd.shims() {
        assert!(
            std::process::Command::new("kill").args(["-KILL", &shim.to_string()]).status().expect("kill").success()
        );
    }
    eventually("the task is gone", || containerd.status(&id).is_none());
    eventually("its process is gone", || !std::path::Path::new(&format!("/proc/{init}")).exists());
    unmounted(&id);
    containerd.ctr(&["containers", "rm", &id]).ok();
}

fn a_killed_shim_of_a_group_takes_all_with_it(containerd: &mut Containerd) {
    let leader = unique("leader");
    let annotation = format!("io.containerd.runc.v2.group={leader}");
    let ids = [leader, unique("member"), unique("member")];
    for id in &ids {
        containerd.run(&["-d", "--annotation", &annotation], id, &["sleep", "1000"]).ok();
    }
    let inits: Vec<i32> = ids.iter().map(|id| containerd.pid(id)).collect();
    let shims = containerd.shims();
    assert_eq!(shims.len(), 1, "one shim serves the group");
    let killed = std::process::Command::new("kill").args(["-KILL", &shims[0].to_string()]).status();
    assert!(killed.expect("kill").success());
    for (id, init) in ids.iter().zip(inits) {
        eventually("the task is gone", || containerd.status(id).is_none());
        eventually("its process is gone", || !std::path::Path::new(&format!("/proc/{init}")).exists());
        unmounted(id);
        containerd.ctr(&["containers", "rm", id]).ok();
    }
}
