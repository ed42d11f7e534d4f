//! What pod specs ask for, seen from inside.

use skiff_cri_client::cri::{self, ContainerState, NamespaceMode, security_profile::ProfileType};
use skiff_test_support::eventually;

use crate::node::{Node, call, idle, pod_security, resources, security, sh};

crate::under_both!(
    one_shim_serves_a_pod,
    namespaces_are_shared_as_asked,
    namespaces_of_the_host_are_used_as_asked,
    pods_have_sysctls_dns_and_a_network,
    users_groups_and_capabilities,
    seccomp_and_read_only_roots,
    volumes_and_devices,
    limits_change_in_place_and_stats_tell,
    out_of_memory_is_the_reason,
    a_probe_that_takes_too_long_is_ended,
    containerd_comes_back_to_its_pods,
);

/// Without a pause container. Not with the host's network: containerd 2.1 itself crashes on such a pod.
mod sandbox {
    #[test]
    fn namespaces_are_shared_as_asked() {
        crate::with_sandbox_node(super::namespaces_are_shared_as_asked);
    }
    #[test]
    fn pods_have_sysctls_dns_and_a_network() {
        crate::with_sandbox_node(super::pods_have_sysctls_dns_and_a_network);
    }
    #[test]
    fn users_groups_and_capabilities() {
        crate::with_sandbox_node(super::users_groups_and_capabilities);
    }
    #[test]
    fn seccomp_and_read_only_roots() {
        crate::with_sandbox_node(super::seccomp_and_read_only_roots);
    }
    #[test]
    fn volumes_and_devices() {
        crate::with_sandbox_node(super::volumes_and_devices);
    }
    #[test]
    fn limits_change_in_place_and_stats_tell() {
        crate::with_sandbox_node(super::limits_change_in_place_and_stats_tell);
    }
    #[test]
    fn out_of_memory_is_the_reason() {
        crate::with_sandbox_node(super::out_of_memory_is_the_reason);
    }
    #[test]
    fn a_probe_that_takes_too_long_is_ended() {
        crate::with_sandbox_node(super::a_probe_that_takes_too_long_is_ended);
    }
    #[test]
    fn containerd_comes_back_to_its_pods() {
        crate::with_sandbox_node(super::containerd_comes_back_to_its_pods);
    }
    #[test]
    fn one_shim_serves_a_pod() {
        crate::with_sandbox_node(super::one_shim_serves_a_pod);
    }
    #[test]
    fn a_pod_has_no_pause_container() {
        crate::with_sandbox_node(super::a_pod_has_no_pause_container);
    }
}

fn a_pod_has_no_pause_container(node: &mut Node) {
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

fn one_shim_serves_a_pod(node: &mut Node) {
    let pod = node.pod();
    let (first, second) = (pod.start(idle()), pod.start(idle()));
    assert_eq!(node.containerd.shims().len(), 1);
    assert_ne!(first.pid(), second.pid());
    pod.end();
}

fn namespaces_are_shared_as_asked(node: &mut Node) {
    let shared = node.pod_with(|config| {
        let options = cri::NamespaceOption { pid: NamespaceMode::Pod.into(), ..Default::default() };
        pod_security(config).namespace_options = Some(options);
    });
    let mut config = idle();
    let options = cri::NamespaceOption { pid: NamespaceMode::Pod.into(), ..Default::default() };
    security(&mut config).namespace_options = Some(options);
    let container = shared.start(config);
    let seen = container.says("ps -o pid,args");
    assert!(seen.lines().any(|line| line.trim_start().starts_with("1 ") && !line.contains("sleep 1000")), "{seen}");
    shared.end();
}

fn namespaces_of_the_host_are_used_as_asked(node: &mut Node) {
    let host = node.pod_with(|config| {
        let node = NamespaceMode::Node.into();
        let options = cri::NamespaceOption { network: node, pid: node, ipc: node, ..Default::default() };
        pod_security(config).namespace_options = Some(options);
        config.hostname.clear();
    });
    let mut config = idle();
    let all = NamespaceMode::Node.into();
    security(&mut config).namespace_options =
        Some(cri::NamespaceOption { network: all, pid: all, ipc: all, ..Default::default() });
    let container = host.start(config);
    let inside = container.says("readlink /proc/self/ns/ipc; readlink /proc/self/ns/pid");
    let outside = |ns: &str| std::fs::read_link(format!("/proc/self/ns/{ns}")).unwrap().display().to_string();
    assert_eq!(inside, format!("{}\n{}\n", outside("ipc"), outside("pid")));
    host.end();
}

fn pods_have_sysctls_dns_and_a_network(node: &mut Node) {
    let pod = node.pod_with(|config| {
        config.linux.as_mut().unwrap().sysctls.insert("kernel.msgmax".into(), "4096".into());
        config.dns_config = Some(cri::DnsConfig {
            servers: vec!["192.0.2.1".into()],
            searches: vec!["example.test".into()],
            options: Vec::new(),
        });
    });
    let container = pod.start(idle());
    assert_eq!(container.says("cat /proc/sys/kernel/msgmax"), "4096\n");
    assert_eq!(container.says("cat /etc/resolv.conf"), "search example.test\nnameserver 192.0.2.1\n");
    let ip = pod.status().network.expect("a network").ip;
    assert!(container.says("ip addr show eth0").contains(&ip));
    let other = pod.start(idle());
    assert!(other.says("ip addr show eth0").contains(&ip), "containers of a pod share its network");
    pod.end();
}

fn users_groups_and_capabilities(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("id -u; id -g; id -G; grep CapEff /proc/self/status");
    let context = security(&mut config);
    context.run_as_user = Some(cri::Int64Value { value: 1000 });
    context.run_as_group = Some(cri::Int64Value { value: 1001 });
    context.supplemental_groups = vec![7, 8];
    let out = pod.output(config);
    assert!(out.starts_with("1000\n1001\n1001 7 8\n") && out.ends_with("CapEff:\t0000000000000000\n"), "{out}");
    let mut config = sh("grep CapBnd /proc/self/status");
    let add = vec!["NET_ADMIN".to_string()];
    security(&mut config).capabilities =
        Some(cri::Capability { add_capabilities: add, drop_capabilities: vec!["ALL".into()] });
    assert_eq!(pod.output(config), "CapBnd:\t0000000000001000\n");
    pod.end();
}

fn seccomp_and_read_only_roots(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("grep Seccomp: /proc/self/status; touch /x 2>&1");
    let context = security(&mut config);
    context.seccomp =
        Some(cri::SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), localhost_ref: String::new() });
    context.readonly_rootfs = true;
    let out = pod.output(config);
    assert!(out.contains("Seccomp:\t2") && out.contains("Read-only file system"), "{out}");
    let profile = node.containerd.dir().join("profile.json");
    let text =
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&profile, text).unwrap();
    let mut config = sh("mkdir /tmp/d 2>&1");
    security(&mut config).seccomp = Some(cri::SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: profile.display().to_string(),
    });
    assert!(pod.output(config).contains("Operation not permitted"));
    let mut config = sh("grep Seccomp: /proc/self/status; ls /dev | wc -l");
    security(&mut config).privileged = true;
    let denied = pod.create(config);
    assert!(denied.is_err(), "a privileged container needs a privileged pod");
    pod.end();
}

fn volumes_and_devices(node: &mut Node) {
    let pod = node.pod();
    let dir = node.containerd.dir().join("volume");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("f"), "content\n").unwrap();
    let mut config = sh("cat /v/f; touch /v/x && echo written; touch /r/y 2>&1; echo x >/dev/other && echo device");
    let mount = |path: &str, readonly| cri::Mount {
        container_path: path.into(),
        host_path: dir.display().to_string(),
        readonly,
        ..Default::default()
    };
    config.mounts = vec![mount("/v", false), mount("/r", true)];
    config.devices = vec![cri::Device {
        container_path: "/dev/other".into(),
        host_path: "/dev/null".into(),
        permissions: "rwm".into(),
    }];
    let out = pod.output(config);
    assert!(out.starts_with("content\nwritten\n") && out.contains("Read-only file system"), "{out}");
    assert!(out.ends_with("device\n") && dir.join("x").exists(), "{out}");
    pod.end();
}

fn limits_change_in_place_and_stats_tell(node: &mut Node) {
    let pod = node.pod();
    let mut config = idle();
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let container = pod.start(config);
    let linux = cri::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, cpu_shares: 512, ..Default::default() };
    let request = cri::UpdateContainerResourcesRequest { container_id: container.id.clone(), linux: Some(linux) };
    call!(node, update_container_resources, request).unwrap_or_else(|e| panic!("update: {e}"));
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", container.pid())).unwrap();
    let of = |name: &str| {
        let line = groups.lines().find(|line| line.split(':').nth(1) == Some(name))?;
        Some(line.split(':').nth(2)?.trim_start_matches('/').to_string())
    };
    let file = match of("memory") {
        Some(path) => format!("/sys/fs/cgroup/memory/{path}/memory.limit_in_bytes"),
        None => format!("/sys/fs/cgroup/{}/memory.max", of("").unwrap()),
    };
    assert_eq!(std::fs::read_to_string(file).unwrap().trim(), (32 << 20).to_string());
    let mut last = None;
    eventually("the stats are there", || {
        let request = container.request();
        let stats = call!(node, container_stats, request).ok().and_then(|answer| answer.stats);
        last =
            stats.and_then(|stats| Some((stats.cpu?.usage_core_nano_seconds?.value, stats.memory?.usage_bytes?.value)));
        last.is_some_and(|(cpu, memory)| cpu > 0 && memory > 0)
    });
    pod.end();
}

fn out_of_memory_is_the_reason(node: &mut Node) {
    let pod = node.pod();
    let mut config = sh("x=$(yes aaaaaaaaaaaaaaaa | head -c 200000000 | tr -d '\\n'); echo survived");
    resources(&mut config).memory_limit_in_bytes = 16 << 20;
    let container = pod.start(config);
    let status = container.ended();
    assert_eq!(status.reason, "OOMKilled", "{status:?}");
    container.remove();
    pod.end();
}

fn a_probe_that_takes_too_long_is_ended(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    container.try_exec(&["sleep", "555"], 1).unwrap_err();
    eventually("it is gone", || !container.says("ps").contains("sleep 555"));
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    pod.end();
}

fn containerd_comes_back_to_its_pods(node: &mut Node) {
    let pod_config = node.pod_config();
    let pod = node.run(pod_config).unwrap_or_else(|e| panic!("run a pod: {e}"));
    let (stays, ends) = (pod.start(idle()), pod.start(sh("sleep 1; echo last words; exit 7")));
    let (pod_id, stays, ends) = (pod.id.clone(), stays.id.clone(), ends.id.clone());
    let skiff = node.containerd.is_skiff();
    drop(pod);
    node.without_containerd(|| std::thread::sleep(std::time::Duration::from_secs(2)));
    let status = |id: &str| {
        let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: false };
        call!(node, container_status, request).unwrap_or_else(|e| panic!("status: {e}")).status.expect("a status")
    };
    assert_eq!(status(&stays).state(), ContainerState::ContainerRunning);
    eventually("the other is known to have ended", || status(&ends).state() == ContainerState::ContainerExited);
    if skiff {
        assert_eq!(status(&ends).exit_code, 7, "its status is kept");
    }
    let request = || cri::PodRequest { pod_sandbox_id: pod_id.clone() };
    call!(node, stop_pod_sandbox, request()).unwrap_or_else(|e| panic!("stop a pod: {e}"));
    call!(node, remove_pod_sandbox, request()).unwrap_or_else(|e| panic!("remove a pod: {e}"));
}
