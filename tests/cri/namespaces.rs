//! What the containers of a pod share, with each other and with the node.

use std::io::Read;
use std::os::unix::fs::MetadataExt;

use skiff_cri_client::cri::{self, NamespaceMode};
use skiff_test_support::{Pods, Version, eventually};

use crate::node::{Node, Pod, call, idle, pod_security, program, security, sh};

crate::under_both!(
    containers_share_network_ipc_and_uts,
    a_container_has_its_own_pids,
    a_pod_can_share_its_pids,
    a_container_can_join_the_pids_of_another,
    host_pids,
    host_ipc,
    pods_have_addresses,
    ports_of_the_node,
    the_network_is_for_those_who_may,
    sysctls,
    hostname_and_dns,
    user_namespaces,
    users_that_cannot_be_mapped;
    with_a_pause_container: host_network;
    built_in: a_pod_can_share_its_pids, host_pids, host_ipc, sysctls, host_network, user_namespaces,
);

fn namespace(which: &str) -> String {
    std::fs::read_link(format!("/proc/self/ns/{which}")).expect("a namespace").display().to_string()
}

/// What the kubelet sends to both the pod and its containers.
fn modes(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> cri::NamespaceOption {
    cri::NamespaceOption { network: network.into(), pid: pid.into(), ipc: ipc.into(), ..Default::default() }
}

fn pod_within<'a>(node: &'a Node, modes: &cri::NamespaceOption) -> Pod<'a> {
    node.pod_with(|config| pod_security(config).namespace_options = Some(modes.clone()))
}

fn containers_share_network_ipc_and_uts(node: &mut Node) {
    let modes = modes(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
    let pod = pod_within(node, &modes);
    let (one, two) = (pod.start(idle()), pod.start(idle()));
    for which in ["net", "ipc", "uts"] {
        let link = format!("readlink /proc/self/ns/{which}");
        assert_eq!(one.says(&link), two.says(&link), "{which}");
        assert_ne!(one.says(&link).trim(), namespace(which), "{which}");
    }
    for which in ["pid", "mnt"] {
        let link = format!("readlink /proc/self/ns/{which}");
        assert_ne!(one.says(&link), two.says(&link), "{which}");
        assert_ne!(one.says(&link).trim(), namespace(which), "{which}");
    }
    one.says("echo through shared memory > /dev/shm/note");
    assert_eq!(two.says("cat /dev/shm/note"), "through shared memory\n");
    let server = pod.start(sh("echo through the network | nc -l -p 8000"));
    eventually("the server listens", || two.says("cat /proc/net/tcp /proc/net/tcp6").contains(":1F40 "));
    assert_eq!(two.says("nc 127.0.0.1 8000 < /dev/null"), "through the network\n");
    server.ended();
    pod.end();
}

fn a_container_has_its_own_pids(node: &mut Node) {
    let modes = modes(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
    let pod = pod_within(node, &modes);
    let container = pod.start(program(&["sleep", "1001"]));
    pod.start(program(&["sleep", "1002"]));
    let ps = container.exec(&["ps"]).ok().out;
    let lines: Vec<&str> = ps.lines().skip(1).collect();
    assert!(lines.len() == 2 && lines[0].contains(" 1 ") && lines[0].ends_with("sleep 1001"), "{ps}");
    pod.end();
}

fn a_pod_can_share_its_pids(node: &mut Node) {
    let modes = modes(NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod);
    let pod = pod_within(node, &modes);
    let one = pod.start(sh("sleep 1001 & exec sleep 1002"));
    let two = pod.start(program(&["sleep", "1003"]));
    let link = "readlink /proc/self/ns/pid";
    assert_eq!(one.says(link), two.says(link));
    let ps = || two.exec(&["ps"]).ok().out;
    for each in ["sleep 1001", "sleep 1002", "sleep 1003", "    1 root"] {
        assert!(ps().contains(each), "{each}: {}", ps());
    }
    assert!(!ps().lines().any(|line| line.contains(" 1 root") && line.contains("sleep 100")), "PID 1 is the pod's");
    one.stop(0);
    assert_eq!(one.ended().exit_code, 137);
    eventually("all that it has started is gone", || !ps().contains("sleep 1001"));
    assert!(ps().contains("sleep 1003"), "the other goes on");
    pod.end();
}

fn a_container_can_join_the_pids_of_another(node: &mut Node) {
    let modes = modes(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
    let pod = pod_within(node, &modes);
    let target = pod.start(program(&["sleep", "1001"]));
    let mut ephemeral = idle();
    security(&mut ephemeral).namespace_options =
        Some(cri::NamespaceOption { pid: NamespaceMode::Target.into(), target_id: target.id.clone(), ..modes.clone() });
    let ephemeral = pod.start(ephemeral);
    let ps = ephemeral.exec(&["ps"]).ok().out;
    assert!(ps.lines().any(|line| line.trim_start().starts_with("1 ") && line.ends_with("sleep 1001")), "{ps}");
    ephemeral.stop(0);
    assert_eq!(target.exec(&["echo", "on"]).ok().out, "on\n", "the target goes on");
    pod.end();
}

fn host_pids(node: &mut Node) {
    let modes = modes(NamespaceMode::Pod, NamespaceMode::Node, NamespaceMode::Pod);
    let pod = pod_within(node, &modes);
    let container = pod.start(sh("sleep 1001 & exec sleep 1002"));
    assert_eq!(container.says("readlink /proc/self/ns/pid").trim(), namespace("pid"));
    assert_eq!(container.says("ls -d /proc/1").trim(), "/proc/1");
    assert_eq!(
        container.says(&format!("ls -d /proc/{}", std::process::id())).trim(),
        format!("/proc/{}", std::process::id())
    );
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", container.pid())).expect("children");
    let child: u32 = children.trim().parse().expect("one child");
    container.stop(0);
    assert_eq!(container.ended().exit_code, 137);
    eventually("its children are gone", || !std::path::Path::new(&format!("/proc/{child}")).exists());
    pod.end();
}

/// Without a pause container containerd 2.1 itself crashes on such a pod.
fn host_network(node: &mut Node) {
    let modes = modes(NamespaceMode::Node, NamespaceMode::Container, NamespaceMode::Pod);
    let pod = node.pod_with(|config| {
        pod_security(config).namespace_options = Some(modes.clone());
        config.hostname = String::new();
    });
    let container = pod.start(idle());
    let network = node.containerd.network().expect("a network").name();
    assert_eq!(container.says("readlink /proc/self/ns/net").trim(), network);
    assert_eq!(container.says("readlink /proc/self/ns/uts").trim(), namespace("uts"));
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a hostname");
    assert_eq!(container.says("hostname"), hostname);
    assert_eq!(container.says("ls /sys/class/net | grep lo"), "lo\n");
    pod.end();
}

fn host_ipc(node: &mut Node) {
    let modes = modes(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Node);
    let pod = pod_within(node, &modes);
    let container = pod.start(idle());
    assert_eq!(container.says("readlink /proc/self/ns/ipc").trim(), namespace("ipc"));
    let note = format!("/dev/shm/{}", pod.config.hostname);
    std::fs::write(&note, "from the node").expect("write to /dev/shm");
    let read = container.exec(&["cat", &note]);
    std::fs::remove_file(&note).expect("remove the note");
    assert_eq!(read.ok().out, "from the node");
    pod.end();
}

fn pods_have_addresses(node: &mut Node) {
    let (one, two) = (node.pod(), node.pod());
    let address = |pod: &Pod| pod.status().network.expect("a network").ip;
    assert!(address(&one).starts_with("10.88.0.") && address(&one) != address(&two));
    let server = one.start(sh("ip addr show eth0; echo from one pod to another | nc -l -p 8000"));
    eventually("the server listens", || server.says("cat /proc/net/tcp /proc/net/tcp6").contains(":1F40 "));
    assert!(server.output().contains(&format!("inet {}/16", address(&one))), "{}", server.output());
    assert_eq!(two.says(&format!("nc {} 8000 < /dev/null", address(&one))), "from one pod to another\n");
    server.ended();
    one.end();
    two.end();
}

fn ports_of_the_node(node: &mut Node) {
    let pod = node.pod_with(|config| {
        config.port_mappings = vec![cri::PortMapping { container_port: 8000, host_port: 12_000 }];
    });
    let server = pod.start(sh("echo through the port | nc -l -p 8000"));
    eventually("the server listens", || server.says("cat /proc/net/tcp /proc/net/tcp6").contains(":1F40 "));
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        std::net::TcpStream::connect("10.88.0.1:12000")?.read_to_string(&mut text)?;
        Ok(text)
    };
    assert_eq!(node.containerd.network().expect("a network").run(read).expect("connect"), "through the port\n");
    server.ended();
    pod.end();
}

fn the_network_is_for_those_who_may(node: &mut Node) {
    let pod = node.pod();
    let mut config = idle();
    let add_capabilities = vec!["NET_ADMIN".into()];
    security(&mut config).capabilities = Some(cri::Capability { add_capabilities, ..Default::default() });
    let device = ["ip", "link", "add", "dummy1", "type", "bridge"];
    pod.start(config).exec(&device).ok();
    assert!(pod.start(idle()).exec(&device).failed().err.contains("Operation not permitted"));
    pod.end();
}

fn sysctls(node: &mut Node) {
    let sysctls = [
        ("kernel.shm_rmid_forced", "1"),
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("kernel.msgmax", "9000"),
        ("fs.mqueue.msg_max", "100"),
    ];
    let pod = node.pod_with(|config| {
        let linux = config.linux.as_mut().expect("linux");
        linux.sysctls = sysctls.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    });
    let container = pod.start(idle());
    for (key, value) in sysctls {
        let said = container.says(&format!("cat /proc/sys/{}", key.replace('.', "/")));
        assert_eq!(said.trim(), value, "{key}");
    }
    let ours = std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").expect("a sysctl");
    assert_eq!(ours.trim(), "0", "the node keeps its own");
    pod.end();
    let mut config = node.pod_config();
    config.linux.as_mut().expect("linux").sysctls.insert("kernel.no_such_sysctl".into(), "1".into());
    let error = node.run(config).err().expect("there is no such sysctl");
    assert!(error.message().contains("no_such_sysctl"), "{error}");
}

fn hostname_and_dns(node: &mut Node) {
    let pod = node.pod_with(|config| {
        config.hostname = "a-host-of-its-own".into();
        config.dns_config = Some(cri::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        });
    });
    let container = pod.start(idle());
    assert_eq!(container.says("hostname; cat /etc/hostname; uname -n"), "a-host-of-its-own\n".repeat(3));
    assert_eq!(
        container.says("cat /etc/resolv.conf"),
        "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    );
    pod.end();
}

pub fn user_namespaces(node: &mut Node) {
    let status = call!(node, status, cri::StatusRequest { verbose: false }).expect("a status");
    let handler = status.runtime_handlers.into_iter().find(|handler| handler.name == "path");
    let offered = handler.and_then(|handler| handler.features).is_some_and(|features| features.user_namespaces);
    // The other runtime of that name has no other sandboxer.
    let handler = if node.pods == Pods::Shim { "" } else { "path" };
    // 1.7 says nothing of handlers; it has these pods, but cannot map the ids of volumes.
    let is_1_7 = node.containerd.release().contains(" 1.7.");
    if !offered && !is_1_7 {
        // Not offered: containerd 1.6, and a runc that cannot map the ids of mounts.
        assert!(!node.containerd.is_skiff() || node.containerd.version() == Version::V1);
        return;
    }
    let mappings = || vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let users = cri::UserNamespace { mode: NamespaceMode::Pod.into(), uids: mappings(), gids: mappings() };
    let mut config = node.pod_config();
    let options = pod_security(&mut config).namespace_options.get_or_insert_default();
    options.userns_options = Some(users);
    options.pid = NamespaceMode::Pod.into();
    config.linux.as_mut().expect("linux").sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
    let pod = node.run_with_handler(config, handler).unwrap_or_else(|e| panic!("run a pod: {e}"));
    let volume = node.containerd.dir().join("volume");
    std::fs::create_dir(&volume).expect("a volume");
    let mut config = idle();
    if offered {
        config.mounts = vec![cri::Mount {
            container_path: "/volume".into(),
            host_path: volume.display().to_string(),
            uid_mappings: mappings(),
            gid_mappings: mappings(),
            ..cri::Mount::default()
        }];
    }
    let container = pod.start(config);
    let other = pod.start(idle());
    assert_eq!(container.says("id -u; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"), "0\n80\n");
    let map = container.says("cat /proc/self/uid_map");
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536"]);
    assert_eq!(container.says("readlink /proc/self/ns/user"), other.says("readlink /proc/self/ns/user"));
    let owner = |path: &std::path::Path| std::fs::metadata(path).expect("a file").uid();
    assert_eq!(owner(format!("/proc/{}", container.pid()).as_ref()), 100_000, "it is nobody on the node");
    assert_eq!(container.says("touch /root/x && stat -c %u /root/x /bin/busybox"), "0\n0\n");
    if offered {
        container.says("touch /volume/x");
        assert_eq!(owner(&volume.join("x")), 0, "the ids of a volume are mapped");
        assert_eq!(container.says("stat -c %u /volume"), "0\n");
    }
    container.says("echo shared > /dev/shm/note; cat /etc/hosts /etc/hostname /etc/resolv.conf > /dev/null");
    assert_eq!(other.says("cat /dev/shm/note; hostname"), format!("shared\n{}\n", pod.config.hostname));
    // All of the pod belongs to its users: who is root among them may change it, but not the node.
    let mut config = idle();
    let capabilities = ["NET_ADMIN", "SYS_ADMIN"].map(String::from).to_vec();
    let capabilities = cri::Capability { add_capabilities: capabilities, ..cri::Capability::default() };
    security(&mut config).capabilities = Some(capabilities);
    let powerful = pod.start(config);
    powerful.says("ip link set lo down && ip link set lo up && hostname another");
    assert_eq!(other.says("hostname"), "another\n");
    powerful.exec(&["mknod", "/tmp/null", "c", "1", "3"]).failed();
    pod.end();
}

fn users_that_cannot_be_mapped(node: &mut Node) {
    if node.containerd.version() == Version::V1 {
        // Not in its interface yet.
        return;
    }
    let map = |container_id, host_id| cri::IdMapping { host_id, container_id, length: 100_000 };
    let two = vec![map(0, 1000), map(0, 2000)];
    let wrong = [
        (NamespaceMode::Pod, two),
        (NamespaceMode::Pod, vec![map(1, 1000)]),
        (NamespaceMode::Container, Vec::new()),
        (NamespaceMode::Target, Vec::new()),
    ];
    for (mode, maps) in wrong {
        let mut config = node.pod_config();
        let users = cri::UserNamespace { mode: mode.into(), uids: maps.clone(), gids: maps };
        pod_security(&mut config).namespace_options.get_or_insert_default().userns_options = Some(users.clone());
        assert!(node.run(config).is_err(), "{users:?}");
    }
    let users = cri::UserNamespace { mode: NamespaceMode::Node.into(), ..cri::UserNamespace::default() };
    let pod = node.pod_with(|config| {
        pod_security(config).namespace_options.get_or_insert_default().userns_options = Some(users);
    });
    assert_eq!(pod.says("readlink /proc/self/ns/user").trim(), namespace("user"), "the node's own");
    pod.end();
}
