//! Pods that the shim itself holds: what is different without a pause container. All the rest is in the other files.

use skiff_test_support::{Pods, Version};

use crate::node::{Node, idle};

#[test]
fn a_pod_has_no_pause_container() {
    crate::with_node(Version::V2, Pods::Shim, alone);
}

fn alone(node: &mut Node) {
    let pod = node.pod();
    let tasks = node.containerd.ctr(&["tasks", "ls", "-q"]).ok().out;
    assert_eq!(tasks, "", "a pod alone is no task");
    let container = pod.start(idle());
    assert_eq!(container.says("hostname").trim(), pod.config.hostname);
    assert!(container.says("cat /etc/hosts").contains("127.0.0.1"));
    let other = pod.start(idle());
    container.says("echo shared >/dev/shm/f");
    assert_eq!(other.says("cat /dev/shm/f"), "shared\n");
    pod.end();
}
