//! What the shim has in place of the pause image's program. That its pods are as others is in the other files.

use std::path::PathBuf;

use skiff_cri_client::cri::security_profile::ProfileType;
use skiff_cri_client::cri::{self, NamespaceMode, PodSandboxState};
use skiff_test_support::{Pods, Version, eventually};

use crate::node::{Node, Pod, idle, pod_security, sh};

mod v1 {
    use super::*;
    #[test]
    fn a_process_without_a_program() {
        crate::with_node(Version::V1, Pods::BuiltIn, super::a_process_without_a_program);
    }
    #[test]
    fn by_an_option() {
        crate::with_node(Version::V1, Pods::BuiltIn, super::by_an_option);
    }
}

mod v2 {
    use super::*;
    #[test]
    fn a_process_without_a_program() {
        crate::with_node(Version::V2, Pods::BuiltIn, super::a_process_without_a_program);
    }
    #[test]
    fn by_an_option() {
        crate::with_node(Version::V2, Pods::BuiltIn, super::by_an_option);
    }
    #[test]
    fn it_reaps() {
        crate::with_node(Version::V2, Pods::BuiltIn, super::it_reaps);
    }
    #[test]
    fn its_end_is_that_of_the_pod() {
        crate::with_node(Version::V2, Pods::BuiltIn, super::its_end_is_that_of_the_pod);
    }
}

mod sandbox {
    use super::*;
    #[test]
    fn it_reaps() {
        crate::with_node(Version::V2, Pods::Shim, super::it_reaps);
    }
    #[test]
    fn there_is_nothing_of_the_nodes_in_it() {
        crate::with_node(Version::V2, Pods::Shim, super::there_is_nothing_of_the_nodes_in_it);
    }
}

/// A file of the pod's process in the node's procfs.
fn file(pod: &Pod, name: &str) -> PathBuf {
    format!("/proc/{}/{name}", pod.node.containerd.pid(&pod.id)).into()
}

#[track_caller]
fn read(pod: &Pod, name: &str) -> String {
    let path = file(pod, name);
    String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"))).into_owned()
}

/// A field of its status.
#[track_caller]
fn field(pod: &Pod, name: &str) -> String {
    let status = read(pod, "status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a field");
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn a_process_without_a_program(node: &mut Node) {
    let pod = node.pod_with(|config| {
        let pod = pod_security(config);
        pod.seccomp =
            Some(cri::SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), ..Default::default() });
        pod.run_as_user = Some(cri::Int64Value { value: 65_535 });
    });
    assert_eq!(read(&pod, "cmdline"), format!("skiff-pause {}\0", pod.id));
    assert_eq!(read(&pod, "comm"), "skiff-pause\n");
    assert_eq!(read(&pod, "environ").trim_matches('\0'), "", "nothing is left of the shim's");
    assert_eq!(field(&pod, "Uid"), "65535 65535 65535 65535");
    assert_eq!((field(&pod, "Seccomp"), field(&pod, "NoNewPrivs")), ("2".into(), "1".into()));
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(&pod, set), "0000000000000000", "{set}");
    }
    let fds: Vec<_> = std::fs::read_dir(file(&pod, "fd")).expect("descriptors").flatten().collect();
    assert_eq!(fds.len(), 3, "{fds:?}");
    for fd in fds {
        assert_eq!(std::fs::read_link(fd.path()).expect("a link"), PathBuf::from("/dev/null"));
    }
    let exe = std::fs::File::open(file(&pod, "exe")).expect("a program");
    let flags = nix::sys::statvfs::fstatvfs(&exe).expect("its file system").flags();
    assert!(flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY), "nobody can write to the program: {flags:?}");
    let smaps = read(&pod, "smaps_rollup");
    let own = smaps.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).expect("a number");
    let own: u32 = own.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(own <= 24, "it keeps {own} KiB to itself");
    assert_eq!(pod.start(idle()).says("hostname").trim(), pod.config.hostname);
    pod.end();
}

fn by_an_option(node: &mut Node) {
    let mut config = node.pod_config();
    config.annotations.clear();
    let pod = node.run_with_handler(config.clone(), "built-in").unwrap_or_else(|e| panic!("run a pod: {e}"));
    assert_eq!(read(&pod, "comm"), "skiff-pause\n");
    let container = pod.start(idle());
    assert_eq!(container.says("hostname").trim(), pod.config.hostname);
    pod.end();
    config.metadata.as_mut().expect("metadata").attempt = 1;
    config.annotations.insert("io.containerd.skiff.builtin-pause".into(), "false".into());
    let pod = node.run(config).unwrap_or_else(|e| panic!("run a pod: {e}"));
    assert_eq!(read(&pod, "comm"), "sh\n");
    pod.end();
}

fn it_reaps(node: &mut Node) {
    let pod = node.pod_with(|config| {
        pod_security(config).namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    });
    let container = pod.start(idle());
    // Their parent ends at once: they are left to PID 1.
    container.says("for i in 1 2 3 4 5; do (sleep 0.2 &); done");
    let ps = || container.exec(&["ps", "-o", "pid,ppid,stat,args"]).ok().out;
    eventually("they have been left to it, and are gone", || !ps().contains("sleep 0.2") && !ps().contains("[sleep]"));
    pod.end();
}

fn its_end_is_that_of_the_pod(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    node.containerd.ctr(&["tasks", "kill", "--signal", "SIGTERM", &pod.id]).ok();
    eventually("the pod is not ready", || pod.status().state() == PodSandboxState::SandboxNotready);
    container.stop(0);
    pod.end();
    // What it ends with, without CRI in between.
    for signal in ["SIGTERM", "SIGINT"] {
        let id = skiff_test_support::unique("pause");
        let annotations = ["io.kubernetes.cri.container-type=sandbox", "io.containerd.skiff.builtin-pause=true"];
        let flags = ["-d", "--annotation", annotations[0], "--annotation", annotations[1]];
        node.containerd.run(&flags, &id, &["no-such-program"]).ok();
        node.containerd.ctr(&["tasks", "kill", "--signal", signal, &id]).ok();
        eventually("it ends", || node.containerd.status(&id).as_deref() == Some("STOPPED"));
        assert_eq!(node.containerd.ctr(&["tasks", "rm", &id]).code, 0, "it ends well");
        node.containerd.ctr(&["containers", "rm", &id]).ok();
    }
}

/// A container that may trace others sees what its pod's PID 1 sees.
fn there_is_nothing_of_the_nodes_in_it(node: &mut Node) {
    let pod = node.pod_with(|config| {
        pod_security(config).namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    });
    let mut config = sh("exec sleep 1000");
    let capability = cri::Capability { add_capabilities: vec!["SYS_PTRACE".into()], ..cri::Capability::default() };
    crate::node::security(&mut config).capabilities = Some(capability);
    let container = pod.start(config);
    assert_eq!(container.says("tr '\\0' ' ' < /proc/1/cmdline"), format!("skiff-pod {} ", pod.id));
    assert_eq!(container.says("ls -A /proc/1/root/"), "");
    assert_eq!(container.says("tr -d '\\0' < /proc/1/environ"), "");
    assert_eq!(container.says("for fd in /proc/1/fd/*; do readlink $fd; done"), "/null\n".repeat(3));
    assert!(container.exec(&["touch", "/proc/1/root/x"]).failed().err.contains("Read-only file system"));
    pod.end();
}
