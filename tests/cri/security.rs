//! Who the programs are, and what they may do.

use std::os::unix::fs::PermissionsExt;

use skiff_cri_client::cri::security_profile::ProfileType;
use skiff_cri_client::cri::{self, ContainerConfig};
use skiff_test_support::{Pods, Version};

use crate::node::{Node, idle, pod_security, program, security, sh};

crate::under_both!(
    users_and_groups,
    groups_of_the_image,
    a_group_needs_a_user,
    read_only_rootfs,
    capabilities,
    no_new_privileges,
    masked_and_read_only_paths,
    privileged,
    seccomp_runtime_default,
    seccomp_unconfined,
    seccomp_localhost,
    seccomp_outweighs_capabilities;
    with_a_pause_container: seccomp_of_a_pod;
    built_in: seccomp_of_a_pod, privileged,
);

fn changed(
    mut config: ContainerConfig,
    change: impl FnOnce(&mut cri::LinuxContainerSecurityContext),
) -> ContainerConfig {
    change(security(&mut config));
    config
}

fn number(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

/// A field of /proc/self/status.
fn field(name: &str) -> ContainerConfig {
    program(&["grep", &format!("^{name}:"), "/proc/self/status"])
}

/// The effective capabilities of this process, which runs containerd: what a privileged container gets.
fn all_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    u64::from_str_radix(line.trim(), 16).expect("a hexadecimal number")
}

fn users_and_groups(node: &mut Node) {
    let pod = node.pod_with(|config| {
        let pod = pod_security(config);
        (pod.run_as_user, pod.run_as_group) = (number(1000), number(2000));
        pod.supplemental_groups = vec![3000];
    });
    let ids = || sh("id -u; id -g; id -G");
    assert_eq!(pod.output(changed(ids(), |c| c.run_as_user = number(0))), "0\n0\n0\n");
    let output = pod.output(changed(ids(), |c| {
        (c.run_as_user, c.run_as_group) = (number(1000), number(2000));
        c.supplemental_groups = vec![3000, 4000];
    }));
    assert_eq!(output, "1000\n2000\n2000 3000 4000\n");
    let output = pod.output(changed(ids(), |c| c.run_as_username = "user".into()));
    assert!(output.starts_with("1000\n1000\n1000"), "{output}");
    let unknown = changed(ids(), |c| c.run_as_username = "nobody-knows".into());
    assert!(pod.create(unknown).and_then(|container| container.start()).is_err());
    let container = pod.start(changed(idle(), |c| (c.run_as_user, c.run_as_group) = (number(1000), number(2000))));
    assert_eq!(container.says("id -u; id -g"), "1000\n2000\n", "exec is the same user");
    assert_eq!(container.exec(&["touch", "/root/x"]).code, 1);
    pod.end();
}

fn groups_of_the_image(node: &mut Node) {
    let pod = node.pod();
    let member = |strict: bool| {
        let container = pod.start(changed(idle(), |c| {
            (c.run_as_user, c.supplemental_groups) = (number(1001), vec![1234]);
            let policy = [cri::SupplementalGroupsPolicy::Merge, cri::SupplementalGroupsPolicy::Strict];
            c.supplemental_groups_policy = policy[usize::from(strict)].into();
        }));
        let mut groups: Vec<i64> =
            container.says("id -G").split_whitespace().map(|id| id.parse().expect("an id")).collect();
        groups.sort();
        let user = container.status().user.and_then(|user| user.linux);
        // containerd 1.x does not tell.
        if let Some(mut user) = user {
            user.supplemental_groups.sort();
            assert_eq!((user.uid, user.gid, &user.supplemental_groups), (1001, 1001, &groups));
        }
        groups
    };
    assert_eq!(member(false), [1001, 1234, 50_000]);
    if node.containerd.version() == Version::V2 {
        assert_eq!(member(true), [1001, 1234]);
    }
    pod.end();
}

fn a_group_needs_a_user(node: &mut Node) {
    let mut config = node.pod_config();
    pod_security(&mut config).run_as_group = number(2000);
    let pod = node.run(config);
    if node.pods == Pods::Shim {
        // There is nobody whose group it could be.
        pod.unwrap_or_else(|e| panic!("run a pod: {e}")).end();
    } else {
        assert!(pod.is_err());
    }
    let pod = node.pod();
    assert!(pod.create(changed(idle(), |c| c.run_as_group = number(2000))).and_then(|c| c.start()).is_err());
    pod.end();
}

fn read_only_rootfs(node: &mut Node) {
    let pod = node.pod_with(|config| pod_security(config).readonly_rootfs = true);
    let container = pod.start(changed(idle(), |c| c.readonly_rootfs = true));
    assert!(container.exec(&["touch", "/x"]).failed().err.contains("Read-only file system"));
    container.says("touch /dev/shm/x");
    pod.start(idle()).says("touch /x");
    pod.end();
}

fn capabilities(node: &mut Node) {
    let pod = node.pod();
    let effective = |add: &[&str], drop: &[&str]| {
        let strings = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let output = pod.output(changed(field("CapEff"), |c| {
            let wanted = cri::Capability { add_capabilities: strings(add), drop_capabilities: strings(drop) };
            c.capabilities = Some(wanted);
        }));
        u64::from_str_radix(output.trim_start_matches("CapEff:").trim(), 16).expect("a hexadecimal number")
    };
    let (chown, net_admin, sys_admin) = (1 << 0, 1 << 12, 1 << 21);
    let default = effective(&[], &[]);
    assert_eq!(default & (chown | net_admin | sys_admin), chown, "{default:x}");
    assert_eq!(effective(&["NET_ADMIN"], &[]), default | net_admin);
    assert_eq!(effective(&[], &["CHOWN"]), default & !chown);
    assert_eq!(effective(&[], &["ALL"]), 0);
    assert_eq!(effective(&["SYS_ADMIN"], &["ALL"]), sys_admin);
    assert_eq!(effective(&["NET_ADMIN"], &["ALL"]), net_admin);
    assert_eq!(effective(&["ALL"], &["CHOWN"]), all_capabilities() & !chown);
    let output = pod.output(changed(field("Cap..."), |c| c.run_as_user = number(1000)));
    assert!(output.contains("CapEff:\t0000000000000000"), "{output}");
    assert!(output.contains(&format!("CapBnd:\t{default:016x}")), "{output}");
    pod.end();
}

fn no_new_privileges(node: &mut Node) {
    let pod = node.pod();
    let set = |wanted: bool| pod.output(changed(field("NoNewPrivs"), |c| c.no_new_privs = wanted));
    assert_eq!((set(true).as_str(), set(false).as_str()), ("NoNewPrivs:\t1\n", "NoNewPrivs:\t0\n"));
    // The node's id(1) with the set-user-id bit, and what it is linked with.
    let dir = node.containerd.dir().join("set-user-id");
    std::fs::create_dir(&dir).expect("a volume");
    std::fs::copy("/usr/bin/id", dir.join("id")).expect("copy a program");
    std::fs::set_permissions(dir.join("id"), std::fs::Permissions::from_mode(0o4755)).expect("set the bit");
    let effective = |wanted: bool| {
        let mut config = changed(program(&["/set-user-id/id", "-u"]), |c| {
            (c.no_new_privs, c.run_as_user) = (wanted, number(1000));
        });
        let dirs = [("/set-user-id", dir.to_str().expect("utf-8")), ("/lib", "/lib"), ("/lib64", "/lib64")];
        let dirs = dirs.into_iter().filter(|(_, host)| std::path::Path::new(host).exists());
        let mount = |(inside, host): (&str, &str)| cri::Mount {
            container_path: inside.into(),
            host_path: host.into(),
            readonly: true,
            ..cri::Mount::default()
        };
        config.mounts = dirs.map(mount).collect();
        pod.output(config)
    };
    assert_eq!((effective(true).as_str(), effective(false).as_str()), ("1000\n", "0\n"));
    pod.end();
}

fn masked_and_read_only_paths(node: &mut Node) {
    let pod = node.pod();
    // What the kubelet sends by default, and what it sends for `procMount: Unmasked`.
    let masked = changed(idle(), |c| {
        c.masked_paths = ["/proc/timer_list", "/proc/keys", "/proc/sysvipc"].map(String::from).into();
        c.readonly_paths = ["/proc/sys", "/proc/bus"].map(String::from).into();
    });
    let masked = pod.start(masked);
    assert_eq!(masked.says("cat /proc/timer_list /proc/keys; ls -A /proc/sysvipc"), "");
    assert!(masked.exec(&["sh", "-c", "echo x > /proc/sys/kernel/domainname"]).failed().err.contains("Read-only"));
    let own = pod.start(changed(idle(), |c| {
        (c.masked_paths, c.readonly_paths) = (vec!["/etc/passwd".into()], vec!["/tmp".into()]);
    }));
    assert_eq!(own.says("cat /etc/passwd"), "");
    assert!(own.exec(&["touch", "/tmp/x"]).failed().err.contains("Read-only file system"));
    let open = pod.start(idle());
    assert_ne!(open.says("cat /proc/timer_list"), "");
    assert_eq!(open.says("grep ' /proc/' /proc/self/mounts || true"), "");
    pod.end();
}

fn privileged(node: &mut Node) {
    let pod = node.pod_with(|config| pod_security(config).privileged = true);
    let container = pod.start(changed(idle(), |c| c.privileged = true));
    let status = container.says("cat /proc/self/status");
    assert!(status.contains(&format!("CapEff:\t{:016x}", all_capabilities())), "{status}");
    assert!(status.contains("Seccomp:\t0"), "{status}");
    container.says("mount -t tmpfs none /tmp && umount /tmp");
    if node.containerd.is_skiff() || node.containerd.version() == Version::V2 {
        // containerd 1.6 wants the pause container's sysfs read-only; runc makes that so for the whole network namespace.
        assert_eq!(container.says("grep -c '^sysfs /sys sysfs rw' /proc/self/mounts"), "1\n", "/sys is writable");
    }
    assert_eq!(container.says("grep -E ' /sys/fs/cgroup[^ ]* cgroup2? ro' /proc/self/mounts | wc -l"), "0\n");
    let devices = container.says("ls /dev");
    for device in ["kmsg", "fuse"].into_iter().filter(|name| std::path::Path::new("/dev").join(name).exists()) {
        assert!(devices.lines().any(|line| line == device), "the devices of the node: {devices}");
    }
    container.says("head -c 1 /dev/kmsg; mknod /tmp/kmsg c 1 11 && echo hello > /tmp/kmsg");
    let other = pod.start(idle());
    other.exec(&["mount", "-t", "tmpfs", "none", "/tmp"]).failed();
    pod.end();
    let pod = node.pod();
    let refused = pod.create(changed(idle(), |c| c.privileged = true)).err().expect("the pod is not privileged");
    assert!(refused.message().contains("privileged"), "{refused}");
    pod.end();
}

fn profile(kind: ProfileType, reference: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile { profile_type: kind.into(), localhost_ref: reference.into() })
}

fn seccomp_runtime_default(node: &mut Node) {
    let pod = node.pod_with(|config| pod_security(config).seccomp = profile(ProfileType::RuntimeDefault, ""));
    let container = pod.start(changed(idle(), |c| c.seccomp = profile(ProfileType::RuntimeDefault, "")));
    assert_eq!(container.says("grep ^Seccomp: /proc/self/status"), "Seccomp:\t2\n");
    // Needs no capability: it is the profile that refuses.
    assert!(container.exec(&["busybox", "unshare", "-U", "true"]).failed().err.contains("Operation not permitted"));
    assert_eq!(
        pod.output(changed(sh("grep ^Seccomp: /proc/1/status"), |c| {
            c.seccomp = profile(ProfileType::RuntimeDefault, "");
            c.run_as_user = number(1000);
        })),
        "Seccomp:\t2\n"
    );
    pod.end();
}

fn seccomp_unconfined(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(changed(idle(), |c| c.seccomp = profile(ProfileType::Unconfined, "")));
    assert_eq!(container.says("grep ^Seccomp: /proc/self/status"), "Seccomp:\t0\n");
    container.says("busybox unshare -U true");
    pod.end();
}

fn seccomp_localhost(node: &mut Node) {
    let path = node.containerd.dir().join("profile.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122}]}"#;
    std::fs::write(&path, text).expect("write a profile");
    let pod = node.pod();
    let localhost = profile(ProfileType::Localhost, path.to_str().expect("utf-8"));
    let container = pod.start(changed(idle(), |c| c.seccomp = localhost));
    assert!(container.exec(&["mkdir", "/tmp/x"]).failed().err.contains("Disk quota exceeded"), "by exec");
    container.says("touch /tmp/x");
    let missing = profile(ProfileType::Localhost, "/no/such/profile.json");
    let error = pod.create(changed(idle(), |c| c.seccomp = missing)).and_then(|c| c.start()).expect_err("no profile");
    assert!(error.message().contains("/no/such/profile.json"), "{error}");
    pod.end();
}

/// SYS_ADMIN may set the name of the host; a profile forbids it; who is privileged has no profile.
fn seccomp_outweighs_capabilities(node: &mut Node) {
    let path = node.containerd.dir().join("profile.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&path, text).expect("write a profile");
    let pod = node.pod_with(|config| pod_security(config).privileged = true);
    let with = |profile: Option<cri::SecurityProfile>, privileged: bool| {
        let container = pod.start(changed(idle(), |c| {
            let add_capabilities = vec!["SYS_ADMIN".into()];
            c.capabilities = Some(cri::Capability { add_capabilities, ..Default::default() }).filter(|_| !privileged);
            (c.seccomp, c.privileged) = (profile, privileged);
        }));
        container.exec(&["hostname", "another"])
    };
    let forbidding = || profile(ProfileType::Localhost, path.to_str().expect("utf-8"));
    with(None, false).ok();
    with(profile(ProfileType::Unconfined, ""), false).ok();
    assert!(with(forbidding(), false).failed().err.contains("Operation not permitted"));
    with(forbidding(), true).ok();
    pod.end();
}

fn seccomp_of_a_pod(node: &mut Node) {
    let pod = node.pod_with(|config| {
        let pod = pod_security(config);
        pod.seccomp = profile(ProfileType::RuntimeDefault, "");
        pod.namespace_options.get_or_insert_default().pid = cri::NamespaceMode::Pod.into();
    });
    let container = pod.start(changed(idle(), |c| c.seccomp = profile(ProfileType::Unconfined, "")));
    assert_eq!(
        container.says("grep ^Seccomp: /proc/1/status /proc/self/status | tr '\\n' ' '"),
        "/proc/1/status:Seccomp:\t2 /proc/self/status:Seccomp:\t0 "
    );
    pod.end();
}
