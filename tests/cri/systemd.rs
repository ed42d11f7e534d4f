//! What depends on cgroups, under the systemd driver: `SystemdCgroup = true`, pods in slices. These need systemd as PID 1
//! and cgroup v2: they are ignored unless asked for.

use std::process::Command;

use skiff_test_support::{Driver, Pods, Version};

use crate::node::{Node, idle};
use crate::{lifecycle, namespaces, resources, restart};

/// Tests of other modules, and of this one, with the systemd driver.
macro_rules! under_systemd {
    ($($test:path as $name:ident),* $(,)? ; with_a_pause_container: $($paused:path as $paused_name:ident),* $(,)?) => {
        mod v1 {
            use super::*;
            $(under_systemd!(@ $name, Version::V1, Pods::Image, $test);)*
            $(under_systemd!(@ $paused_name, Version::V1, Pods::Image, $paused);)*
        }
        mod v2 {
            use super::*;
            $(under_systemd!(@ $name, Version::V2, Pods::Image, $test);)*
            $(under_systemd!(@ $paused_name, Version::V2, Pods::Image, $paused);)*
        }
        mod sandbox {
            use super::*;
            $(under_systemd!(@ $name, Version::V2, Pods::Shim, $test);)*
        }
    };
    (@ $name:ident, $version:expr, $pods:expr, $test:path) => {
        #[test]
        #[ignore = "needs systemd as PID 1"]
        fn $name() {
            crate::with_driver($version, $pods, Driver::Systemd, $test)
        }
    };
}

under_systemd!(
    crate::systemd::containers_are_units_of_the_pods_slice as containers_are_units_of_the_pods_slice,
    lifecycle::a_pod_with_a_container as a_pod_with_a_container,
    lifecycle::exec_has_a_timeout as exec_has_a_timeout,
    lifecycle::what_cannot_start_says_why as what_cannot_start_says_why,
    lifecycle::a_container_that_is_not_started_can_be_stopped_and_removed as not_started,
    lifecycle::many_pods_at_once as many_pods_at_once,
    restart::what_runs_goes_on as what_runs_goes_on,
    resources::limits as limits,
    resources::limits_are_changed_in_place as limits_are_changed_in_place,
    resources::limits_of_a_container_that_is_not_started as limits_of_a_container_that_is_not_started,
    resources::stats as stats,
    resources::too_much_memory_is_a_reason as too_much_memory_is_a_reason,
    resources::a_child_that_is_killed_for_memory_is_no_end as a_child_that_is_killed_for_memory_is_no_end,
    resources::cgroups_of_a_container_are_its_own_to_see as cgroups_of_a_container_are_its_own_to_see;
    with_a_pause_container:
    restart::a_killed_shim_ends_its_pod as a_killed_shim_ends_its_pod,
    namespaces::user_namespaces as user_namespaces,
);

fn property(unit: &str, name: &str) -> String {
    let output = Command::new("systemctl").args(["show", "--value", "-p", name, unit]).output().expect("systemctl");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

fn containers_are_units_of_the_pods_slice(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    let unit = format!("cri-containerd-{}.scope", container.id);
    assert_eq!(property(&unit, "Slice"), node.containerd.pod_parent());
    assert_eq!((property(&unit, "ActiveState"), property(&unit, "Delegate")), ("active".into(), "yes".into()));
    let group = std::fs::read_to_string(format!("/proc/{}/cgroup", container.pid())).expect("a process");
    assert_eq!(group.trim(), format!("0::{}", property(&unit, "ControlGroup")));
    let reloaded = Command::new("systemctl").arg("daemon-reload").status().expect("systemctl");
    assert!(reloaded.success());
    assert_eq!(container.says("echo x >/dev/null; head -c 1 /dev/zero | wc -c"), "1\n", "its devices are as before");
    pod.end();
    assert_eq!(property(&unit, "LoadState"), "not-found");
}
