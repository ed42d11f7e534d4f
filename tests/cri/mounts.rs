//! Volumes and devices.

use std::path::{Path, PathBuf};
use std::process::Command;

use skiff_cri_client::cri::{self, ContainerConfig, MountPropagation};
use skiff_test_support::{IMAGE, Version};

use crate::node::{Node, idle, pod_security, security};

crate::under_both!(
    volumes,
    volumes_are_shared_by_containers,
    images_can_be_volumes,
    private_volumes_see_no_new_mounts,
    mounts_of_the_node_reach_rslave_volumes,
    mounts_of_a_container_leave_rshared_volumes,
    propagation_needs_a_shared_source,
    recursive_read_only_volumes,
    devices,
    other_devices_are_out_of_reach,
);

/// A directory to be a volume.
fn volume(node: &Node, name: &str) -> PathBuf {
    let path = node.containerd.dir().join("volumes").join(name);
    std::fs::create_dir_all(&path).expect("a volume");
    path
}

fn mount(host: &Path, container: &str) -> cri::Mount {
    let (host_path, container_path) = (host.display().to_string(), container.into());
    cri::Mount { host_path, container_path, ..cri::Mount::default() }
}

fn with_mounts(mounts: Vec<cri::Mount>) -> ContainerConfig {
    ContainerConfig { mounts, ..idle() }
}

/// A tmpfs on the node, in a peer group of its own.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: &Path) -> Tmpfs {
        std::fs::create_dir_all(at).expect("a directory");
        assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(at).status().expect("mount").success());
        Tmpfs(at.to_path_buf())
    }

    fn shared(at: &Path) -> Tmpfs {
        let tmpfs = Tmpfs::new(at);
        assert!(Command::new("mount").arg("--make-shared").arg(at).status().expect("mount").success());
        tmpfs
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-R", "-l"]).arg(&self.0).status();
    }
}

fn volumes(node: &mut Node) {
    let (dir, file) = (volume(node, "dir"), volume(node, "other").join("file"));
    std::fs::write(&file, "a file\n").expect("write a file");
    let pod = node.pod();
    let container = pod.start(with_mounts(vec![
        mount(&dir, "/made/for/it"),
        cri::Mount { readonly: true, ..mount(&dir, "/ro") },
        mount(&file, "/etc/a-file"),
        mount(&file, "/made/for/it/nested"),
    ]));
    container.says("echo written > /made/for/it/x");
    assert_eq!(std::fs::read_to_string(dir.join("x")).expect("it is on the node"), "written\n");
    assert_eq!(container.says("cat /ro/x /etc/a-file /made/for/it/nested"), "written\na file\na file\n");
    assert!(container.exec(&["touch", "/ro/y"]).failed().err.contains("Read-only file system"));
    let link = node.containerd.dir().join("volumes/link");
    std::os::unix::fs::symlink(&dir, &link).expect("a link");
    pod.start(with_mounts(vec![mount(&link, "/by-link")])).says("cat /by-link/x && ! test -L /by-link");
    pod.end();
    let pod = node.pod();
    let made = node.containerd.dir().join("volumes/not/yet");
    pod.start(with_mounts(vec![mount(&made, "/made")]));
    assert!(made.is_dir(), "a source that is not there is made, as it always was");
    pod.end();
}

fn volumes_are_shared_by_containers(node: &mut Node) {
    let dir = volume(node, "shared");
    let pod = node.pod();
    let one = pod.start(with_mounts(vec![mount(&dir, "/one")]));
    let two = pod.start(with_mounts(vec![mount(&dir, "/two")]));
    one.says("echo from one > /one/x");
    assert_eq!(two.says("cat /two/x"), "from one\n");
    pod.end();
}

fn images_can_be_volumes(node: &mut Node) {
    if node.containerd.version() == Version::V1 {
        // Not in its interface yet.
        return;
    }
    let pod = node.pod();
    let image = Some(cri::ImageSpec { image: IMAGE.into() });
    let container = pod.start(with_mounts(vec![cri::Mount {
        container_path: "/image".into(),
        readonly: true,
        image,
        ..cri::Mount::default()
    }]));
    assert_eq!(container.says("/image/bin/busybox head -n 1 /image/etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n");
    assert!(container.exec(&["touch", "/image/x"]).failed().err.contains("Read-only file system"));
    pod.end();
}

/// A container with a volume of this propagation; what is mounted on the node later is seen, or not.
fn sees_later_mounts(node: &Node, propagation: MountPropagation) -> bool {
    let source = Tmpfs::shared(&volume(node, "propagated"));
    let pod = node.pod();
    let mounted = cri::Mount { propagation: propagation.into(), ..mount(&source.0, "/volume") };
    let container = pod.start(with_mounts(vec![mounted]));
    let _later = Tmpfs::new(&source.0.join("later"));
    std::fs::write(source.0.join("later/x"), "").expect("write a file");
    let seen = container.exec(&["test", "-e", "/volume/later/x"]).code == 0;
    pod.end();
    seen
}

fn private_volumes_see_no_new_mounts(node: &mut Node) {
    assert!(!sees_later_mounts(node, MountPropagation::Private));
}

fn mounts_of_the_node_reach_rslave_volumes(node: &mut Node) {
    assert!(sees_later_mounts(node, MountPropagation::HostToContainer));
}

fn mounts_of_a_container_leave_rshared_volumes(node: &mut Node) {
    let source = Tmpfs::shared(&volume(node, "propagated"));
    let pod = node.pod_with(|config| pod_security(config).privileged = true);
    let start = |propagation: MountPropagation| {
        let mounted = cri::Mount { propagation: propagation.into(), ..mount(&source.0, "/volume") };
        let mut config = with_mounts(vec![mounted]);
        security(&mut config).privileged = true;
        pod.start(config)
    };
    let [both, inward] = [MountPropagation::Bidirectional, MountPropagation::HostToContainer].map(start);
    inward.says("mkdir /volume/in && mount -t tmpfs none /volume/in && touch /volume/in/x");
    assert!(!source.0.join("in/x").exists(), "an rslave volume lets nothing out");
    both.says("mkdir /volume/out && mount -t tmpfs none /volume/out && touch /volume/out/x");
    assert!(source.0.join("out/x").exists(), "an rshared volume does");
    assert_eq!(inward.exec(&["test", "-e", "/volume/out/x"]).code, 0, "and the others see it");
    both.stop(0);
    assert!(source.0.join("out/x").exists(), "it outlives the container");
    pod.end();
}

fn propagation_needs_a_shared_source(node: &mut Node) {
    let source = Tmpfs::new(&volume(node, "private"));
    assert!(Command::new("mount").arg("--make-private").arg(&source.0).status().expect("mount").success());
    let pod = node.pod_with(|config| pod_security(config).privileged = true);
    for propagation in [MountPropagation::HostToContainer, MountPropagation::Bidirectional] {
        let mounted = cri::Mount { propagation: propagation.into(), ..mount(&source.0, "/volume") };
        let mut config = with_mounts(vec![mounted]);
        security(&mut config).privileged = true;
        let refused = pod.create(config).and_then(|container| container.start()).expect_err("the source is private");
        assert!(refused.message().contains("is not a shared"), "{refused}");
    }
    pod.end();
}

fn recursive_read_only_volumes(node: &mut Node) {
    if node.containerd.version() == Version::V1 {
        // Not in its interface yet.
        return;
    }
    let source = Tmpfs::new(&volume(node, "tree"));
    let _below = Tmpfs::new(&source.0.join("below"));
    let pod = node.run_with_handler(node.pod_config(), "path").unwrap_or_else(|e| panic!("run a pod: {e}"));
    let plain = cri::Mount { readonly: true, ..mount(&source.0, "/plain") };
    let recursive = cri::Mount { recursive_read_only: true, readonly: true, ..mount(&source.0, "/recursive") };
    let container = pod.start(with_mounts(vec![plain, recursive]));
    let refused = |mount: cri::Mount| assert!(pod.create(with_mounts(vec![mount])).is_err());
    let writable = cri::Mount { recursive_read_only: true, ..mount(&source.0, "/volume") };
    let read_only = cri::Mount { readonly: true, ..writable.clone() };
    refused(writable);
    for propagation in [MountPropagation::HostToContainer, MountPropagation::Bidirectional] {
        refused(cri::Mount { propagation: propagation.into(), ..read_only.clone() });
    }
    container.exec(&["touch", "/plain/x"]).failed();
    container.exec(&["touch", "/recursive/x"]).failed();
    container.says("touch /plain/below/x");
    assert!(container.exec(&["touch", "/recursive/below/x"]).failed().err.contains("Read-only file system"));
    pod.end();
}

fn devices(node: &mut Node) {
    let pod = node.pod();
    let device = |container_path: &str, permissions: &str| cri::Device {
        container_path: container_path.into(),
        host_path: "/dev/kmsg".into(),
        permissions: permissions.into(),
    };
    let start = |permissions: &str| {
        let mut config = reader_of_the_log();
        config.devices = vec![device("/dev/the-log", permissions)];
        pod.start(config)
    };
    let reader = start("r");
    assert!(reader.says("ls -l /dev/the-log").starts_with('c'));
    reader.says(": < /dev/the-log");
    let refused = reader.exec(&["sh", "-c", ": > /dev/the-log"]).failed();
    assert!(refused.err.contains("Operation not permitted"), "{}", refused.err);
    start("rw").says(": < /dev/the-log; : > /dev/the-log");
    pod.end();
}

/// What the kernel lets read its log, if only it has the device.
fn reader_of_the_log() -> ContainerConfig {
    let mut config = idle();
    let capability = cri::Capability { add_capabilities: vec!["SYSLOG".into()], ..cri::Capability::default() };
    security(&mut config).capabilities = Some(capability);
    config
}

fn other_devices_are_out_of_reach(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(reader_of_the_log());
    container.says("mknod /tmp/log c 1 11");
    assert!(container.exec(&["sh", "-c", ": < /tmp/log"]).failed().err.contains("Operation not permitted"));
    container
        .says("for d in null zero full random urandom tty; do test -c /dev/$d || exit 1; done; echo x > /dev/null");
    pod.end();
}
