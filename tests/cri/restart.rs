//! containerd goes and comes back; shims die.

use skiff_cri_client::cri::{ContainerState, PodSandboxState};
use skiff_test_support::{Pods, Version, eventually};

use crate::node::{Node, idle, sh};

crate::under_both!(
    what_runs_goes_on,
    what_has_ended_is_remembered,
    an_end_while_containerd_is_away_is_known,
    a_pod_is_stopped_after_a_restart;
    with_a_pause_container: a_killed_shim_ends_its_pod;
    built_in: what_runs_goes_on, a_pod_is_stopped_after_a_restart, a_killed_shim_ends_its_pod;
    streaming: what_runs_goes_on, what_has_ended_is_remembered, an_end_while_containerd_is_away_is_known,
        a_pod_is_stopped_after_a_restart,
);

pub fn what_runs_goes_on(node: &mut Node) {
    let script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done";
    let (pod_id, id, pid) = {
        let pod = node.pod();
        let container = pod.start(sh(script));
        (pod.id.clone(), container.id.clone(), container.pid())
    };
    let before = node.containerd.shims();
    node.without_containerd(|| std::thread::sleep(std::time::Duration::from_secs(1)));
    assert_eq!(node.containerd.shims(), before);
    let pod = node.known_pod(&pod_id);
    let container = pod.known_container(&id);
    assert_eq!(pod.status().state(), PodSandboxState::SandboxReady);
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    assert_eq!(container.pid(), pid);
    assert_eq!(container.exec(&["echo", "again"]).ok().out, "again\n");
    let last = || container.output().lines().last().and_then(|line| line.parse::<u32>().ok()).unwrap_or(0);
    let then = last();
    eventually("it writes on", || last() > then + 3);
    if node.containerd.is_skiff() {
        let lines: Vec<u32> = container.output().lines().map(|line| line.parse().expect("a number")).collect();
        let gap = lines.windows(2).find(|pair| pair[1] != pair[0] + 1);
        assert_eq!(gap, None, "not a line is lost");
    }
    assert_eq!(pod.says("echo a new container"), "a new container\n");
    container.stop(0);
    assert_eq!(container.ended().exit_code, 137);
    pod.end();
}

fn what_has_ended_is_remembered(node: &mut Node) {
    let (pod_id, id) = {
        let pod = node.pod();
        let container = pod.start(sh("exit 7"));
        container.ended();
        (pod.id.clone(), container.id.clone())
    };
    node.without_containerd(|| ());
    let pod = node.known_pod(&pod_id);
    let status = pod.known_container(&id).status();
    assert_eq!(
        (status.state(), status.exit_code, status.reason.as_str()),
        (ContainerState::ContainerExited, 7, "Error")
    );
    pod.end();
}

fn an_end_while_containerd_is_away_is_known(node: &mut Node) {
    let (pod_id, id, pid) = {
        let pod = node.pod();
        let container = pod.start(sh("sleep 1; exit 7"));
        (pod.id.clone(), container.id.clone(), container.pid())
    };
    node.without_containerd(|| {
        eventually("it ends", || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            status.is_ok_and(|line| line.contains(") Z ")) || !std::path::Path::new(&format!("/proc/{pid}")).exists()
        });
    });
    let pod = node.known_pod(&pod_id);
    let status = pod.known_container(&id).ended();
    if node.containerd.is_skiff() {
        // The Go shim's containers that exit while containerd is away lose their status.
        assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    }
    assert_eq!(pod.status().state(), PodSandboxState::SandboxReady);
    pod.end();
}

fn a_pod_is_stopped_after_a_restart(node: &mut Node) {
    let id = {
        let pod = node.pod();
        pod.start(idle());
        pod.id.clone()
    };
    node.without_containerd(|| ());
    node.known_pod(&id).end();
}

fn kill_shims(node: &Node) {
    for shim in node.containerd.shims() {
        let killed = std::process::Command::new("kill").args(["-KILL", &shim.to_string()]).status();
        assert!(killed.expect("kill runs").success());
    }
}

/// Without a pause container there is nobody left who could say how the pod is: containerd answers with an error. It can be
/// stopped and removed all the same.
#[test]
fn a_killed_shim_ends_a_pod_without_a_pause_container() {
    crate::with_node(Version::V2, Pods::Shim, |node| {
        let pod = node.pod();
        let container = pod.start(idle());
        let pid = container.pid();
        kill_shims(node);
        container.ended();
        eventually("its process is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
        let other = node.pod();
        assert_eq!(other.says("echo another pod goes on"), "another pod goes on\n");
        other.end();
        pod.end();
    });
}

pub fn a_killed_shim_ends_its_pod(node: &mut Node) {
    if !node.containerd.is_skiff() && node.containerd.version() == Version::V2 {
        // containerd 2 cleans up after the pause container alone; the Go shim leaves the others as they are.
        return;
    }
    let pod = node.pod();
    let container = pod.start(idle());
    let pid = container.pid();
    kill_shims(node);
    eventually("the pod is not ready", || pod.status().state() == PodSandboxState::SandboxNotready);
    container.ended();
    if node.containerd.is_skiff() {
        eventually("its process is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
    pod.end();
}
