//! Pods and containers come, run, answer and go.

use skiff_cri_client::cri::{ContainerState, PodSandboxState};

use crate::node::{Node, idle};

crate::under_both!(a_pod_with_a_container);

fn a_pod_with_a_container(node: &mut Node) {
    let pod = node.pod();
    assert_eq!(pod.status().state(), PodSandboxState::SandboxReady);
    let container = pod.start(idle());
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    let done = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (3, "out\n", "err\n"));
    assert_eq!(container.says("hostname").trim(), pod.config.hostname);
    container.stop(0);
    let status = container.ended();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    container.remove();
    pod.end();
}
