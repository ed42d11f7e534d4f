//! Limits, their updates, what is used, and what happens when it is too much.

use std::path::{Path, PathBuf};

use skiff_cri_client::cri::{self, ContainerState};
use skiff_test_support::eventually;

use crate::node::{Container, Node, call, idle, resources, sh};

crate::under_both!(
    limits,
    limits_are_changed_in_place,
    limits_of_a_container_that_is_not_started,
    stats,
    stats_of_a_pod,
    too_much_memory_is_a_reason,
    a_child_that_is_killed_for_memory_is_no_end,
    cgroups_of_a_container_are_its_own_to_see,
);

const MIB: i64 = 1 << 20;

/// True where one hierarchy has all controllers.
fn unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A file of the container's cgroup: of version 1 below its controller, or of version 2.
fn cgroup_file(container: &Container, controller: &str, one: &str, two: &str) -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    if unified() {
        let text = read(Path::new(&format!("/proc/{}/cgroup", container.pid())));
        return root.join(text.strip_prefix("0::/").expect("version 2 alone")).join(two);
    }
    root.join(controller).join(container.node.containerd.cgroup_parent()).join(&container.id).join(one)
}

#[track_caller]
fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_string()
}

#[track_caller]
fn memory_limit(container: &Container) -> String {
    read(&cgroup_file(container, "memory", "memory.limit_in_bytes", "memory.max"))
}

/// Quota and period.
#[track_caller]
fn cpu_quota(container: &Container) -> String {
    if unified() {
        return read(&cgroup_file(container, "cpu", "", "cpu.max"));
    }
    let file = |name: &str| read(&cgroup_file(container, "cpu", name, ""));
    format!("{} {}", file("cpu.cfs_quota_us"), file("cpu.cfs_period_us"))
}

fn shares_are(container: &Container, shares: u64) {
    // Runtimes differ in how they convert the one to the other: in a line, or (runc from 1.3.2 on) on a curve through 100.
    let line = 1 + (shares - 2) * 9999 / 262_142;
    let log = (shares as f64).log2();
    let curve = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil() as u64;
    let found: u64 = read(&cgroup_file(container, "cpu", "cpu.shares", "cpu.weight")).parse().expect("a number");
    assert!(if unified() { found == line || found == curve } else { found == shares }, "{found}");
}

fn limited() -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 * MIB,
        oom_score_adj: 500,
        cpuset_cpus: "0".into(),
    }
}

pub fn limits(node: &mut Node) {
    let pod = node.pod();
    let mut config = idle();
    *resources(&mut config) = limited();
    let container = pod.start(config);
    assert_eq!(memory_limit(&container), (64 * MIB).to_string());
    assert_eq!(cpu_quota(&container), "50000 100000");
    shares_are(&container, 512);
    assert_eq!(read(&cgroup_file(&container, "cpuset", "cpuset.cpus", "cpuset.cpus")), "0");
    assert_eq!(container.says("cat /proc/1/oom_score_adj /proc/self/oom_score_adj"), "500\n500\n");
    pod.end();
}

#[track_caller]
fn update(container: &Container, linux: cri::LinuxContainerResources) {
    let request = cri::UpdateContainerResourcesRequest { container_id: container.id.clone(), linux: Some(linux) };
    call!(container.node, update_container_resources, request).unwrap_or_else(|e| panic!("update resources: {e}"));
}

pub fn limits_are_changed_in_place(node: &mut Node) {
    let pod = node.pod();
    let mut config = idle();
    *resources(&mut config) = limited();
    let container = pod.start(config);
    let pid = container.pid();
    update(
        &container,
        cri::LinuxContainerResources {
            cpu_quota: 150_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 128 * MIB,
            ..limited()
        },
    );
    assert_eq!(memory_limit(&container), (128 * MIB).to_string());
    assert_eq!(cpu_quota(&container), "150000 100000");
    shares_are(&container, 1024);
    update(&container, cri::LinuxContainerResources { memory_limit_in_bytes: 32 * MIB, ..limited() });
    assert_eq!(memory_limit(&container), (32 * MIB).to_string());
    let status = container.status();
    assert_eq!((container.pid(), status.state()), (pid, ContainerState::ContainerRunning));
    let linux = status.resources.and_then(|resources| resources.linux).expect("resources in the status");
    assert_eq!(linux.memory_limit_in_bytes, 32 * MIB);
    pod.end();
}

pub fn limits_of_a_container_that_is_not_started(node: &mut Node) {
    let pod = node.pod();
    let mut config = idle();
    *resources(&mut config) = limited();
    let container = pod.create(config).expect("created");
    update(&container, cri::LinuxContainerResources { memory_limit_in_bytes: 96 * MIB, ..limited() });
    container.start().expect("started");
    assert_eq!(memory_limit(&container), (96 * MIB).to_string());
    pod.end();
}

pub fn stats(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh(
        "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; head -c 8388608 /dev/zero > /dev/shm/x; exec sleep 1000",
    );
    *resources(&mut config) = cri::LinuxContainerResources { memory_limit_in_bytes: 64 * MIB, ..Default::default() };
    let container = pod.start(config);
    eventually("it has done its work", || container.says("cat /proc/1/cmdline").starts_with("sleep"));
    let answer = call!(node, container_stats, container.request()).expect("stats").stats.expect("stats");
    assert_eq!(answer.attributes.expect("attributes").id, container.id);
    let cpu = answer.cpu.expect("cpu");
    let nanos = cpu.usage_core_nano_seconds.expect("usage").value;
    assert!((1_000_000..60_000_000_000).contains(&nanos), "{nanos} ns");
    assert!(cpu.timestamp > 0);
    let memory = answer.memory.expect("memory");
    let used = memory.working_set_bytes.expect("a working set").value;
    assert!((8 * MIB as u64..64 * MIB as u64).contains(&used), "{used} bytes");
    let usage = memory.usage_bytes.expect("usage").value;
    assert!(usage >= used, "{usage} bytes");
    let available = memory.available_bytes.expect("what is available").value;
    assert_eq!(available, 64 * MIB as u64 - used);
    let other = pod.start(idle());
    let list = call!(node, list_container_stats, cri::Empty {}).expect("stats of all").stats;
    let mut ids: Vec<String> = list.into_iter().filter_map(|stats| Some(stats.attributes?.id)).collect();
    let mut want = vec![container.id.clone(), other.id.clone()];
    ids.sort();
    want.sort();
    assert_eq!(ids, want);
    other.stop(0);
    let list = call!(node, list_container_stats, cri::Empty {}).expect("stats of what runs").stats;
    assert!(list.iter().any(|stats| stats.attributes.as_ref().is_some_and(|one| one.id == container.id)));
    pod.end();
}

fn stats_of_a_pod(node: &mut Node) {
    // As the kubelet does: the pod has a cgroup, its containers are below it.
    let pod = node.pod_with(|config| {
        let parent = &mut config.linux.as_mut().expect("linux").cgroup_parent;
        *parent = format!("{parent}/{}", config.hostname);
    });
    pod.start(sh("head -c 8388608 /dev/zero > /dev/shm/x; exec sleep 1000"));
    let stats = || call!(node, pod_sandbox_stats, pod.request()).expect("stats").stats.and_then(|stats| stats.linux);
    eventually("the pod's memory is counted", || {
        let memory = stats().and_then(|linux| linux.memory).and_then(|memory| memory.usage_bytes);
        memory.is_some_and(|bytes| bytes.value > 8 * MIB as u64)
    });
    let parent = pod.config.linux.clone().expect("linux").cgroup_parent;
    pod.end();
    // The kubelet removes what it has made.
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten().map(|entry| entry.path());
    for root in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
        let _ = std::fs::remove_dir(root.join(parent.trim_start_matches('/')));
    }
}

pub fn too_much_memory_is_a_reason(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("exec tail /dev/zero");
    *resources(&mut config) = cri::LinuxContainerResources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
    for _ in 0..3 {
        config.metadata.as_mut().expect("metadata").attempt += 1;
        let container = pod.start(config.clone());
        assert_eq!(container.ended().exit_code, 137);
        // containerd up to 2.2 learns of the end and of the reason in two ways, which it follows at the same time.
        eventually("the reason is known", || container.status().reason == "OOMKilled");
        container.remove();
    }
    pod.end();
}

pub fn a_child_that_is_killed_for_memory_is_no_end(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("tail /dev/zero; echo $?; exec sleep 1000");
    *resources(&mut config) = cri::LinuxContainerResources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
    let container = pod.start(config);
    eventually("the child is killed", || container.output().contains("137\n"));
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    assert_eq!(container.exec(&["tail", "/dev/zero"]).code, 137, "an exec too");
    pod.end();
}

pub fn cgroups_of_a_container_are_its_own_to_see(node: &mut Node) {
    let pod = node.pod();
    let mut config = idle();
    *resources(&mut config) = limited();
    let container = pod.start(config);
    let file = if unified() { "memory.max" } else { "memory/memory.limit_in_bytes" };
    assert_eq!(container.says(&format!("cat /sys/fs/cgroup/{file}")).trim(), (64 * MIB).to_string());
    let mkdir = if unified() { "/sys/fs/cgroup/x" } else { "/sys/fs/cgroup/memory/x" };
    assert!(container.exec(&["mkdir", mkdir]).failed().err.contains("Read-only file system"));
    pod.end();
}
