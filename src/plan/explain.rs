//! A plan in words: what a create would do, step by step.

use std::ffi::CStr;

use oci_spec::runtime::{Hook, LinuxNamespaceType as Kind};
use serde::Serialize;

use super::Plan;
use super::mount_options::Options;
use super::namespaces::{self, KINDS};
use super::rootfs::{MountKind, MountPlan};
use crate::sys::mount::attr;

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The part of the create that it belongs to.
    pub step: &'static str,
    /// What it does.
    pub does: String,
}

/// All steps in their order. `filter`: instructions of the compiled seccomp program.
pub fn lines(plan: &Plan, filter: usize) -> Vec<Line> {
    let mut out = Lines(Vec::new());
    cgroup(&mut out, plan);
    namespaces(&mut out, plan);
    rootfs(&mut out, plan);
    hooks(&mut out, "prestart", plan.hooks.prestart());
    hooks(&mut out, "createRuntime", plan.hooks.create_runtime());
    hooks(&mut out, "createContainer", plan.hooks.create_container());
    let enter = match (plan.rootfs.mount_namespace, plan.rootfs.no_pivot) {
        (false, _) => "chroot to the rootfs",
        (true, true) => "move the rootfs to / and chroot",
        (true, false) => "pivot_root to the rootfs and detach the old root",
    };
    out.push("root", enter);
    for sysctl in &plan.sysctls {
        out.push("sysctl", format!("write {} to /proc/sys/{}", text(&sysctl.value), text(&sysctl.path)));
    }
    seal(&mut out, plan);
    process(&mut out, plan, filter);
    out.0
}

struct Lines(Vec<Line>);

impl Lines {
    fn push(&mut self, step: &'static str, does: impl Into<String>) {
        self.0.push(Line { step, does: does.into() });
    }
}

fn text(text: &CStr) -> String {
    text.to_string_lossy().into_owned()
}

fn absolute(path: &CStr) -> String {
    format!("/{}", text(path).trim_start_matches('.'))
}

fn cgroup(out: &mut Lines, plan: &Plan) {
    for dir in &plan.cgroup.dirs {
        let controllers = dir.controllers.join(",");
        let controllers = if controllers.is_empty() { "v2".to_string() } else { controllers };
        out.push("cgroup", format!("make {} ({controllers})", dir.mountpoint.join(&dir.path).display()));
    }
    if let Some(owner) = plan.cgroup.owner.filter(|owner| *owner != 0) {
        out.push("cgroup", format!("give the cgroup to user {owner} of the host"));
    }
    for write in &plan.cgroup.writes {
        out.push("cgroup", format!("write {} to {} [{}]", write.value, write.file, write.field));
    }
    if let Some(rdt) = &plan.rdt {
        let group = rdt.named.as_deref().map_or("by the container's id".to_string(), |name| format!("{name:?}"));
        out.push("cgroup", format!("make or find the resctrl group {group}"));
        for line in &rdt.schemata {
            out.push("cgroup", format!("write {line} to its schemata [linux.intelRdt]"));
        }
        if rdt.monitored {
            out.push("cgroup", "make a monitoring group by the container's id in it");
        }
    }
    if let Some(rules) = &plan.cgroup.devices {
        out.push("cgroup", format!("allow devices by {} rules, the last that matches wins", rules.len()));
    }
}

fn namespaces(out: &mut Lines, plan: &Plan) {
    let made: Vec<&str> =
        KINDS.iter().filter(|kind| plan.namespaces.makes(**kind)).map(|kind| namespaces::name(*kind)).collect();
    out.push("namespaces", format!("clone the init into new namespaces: {}", made.join(", ")));
    for join in &plan.namespaces.joins {
        out.push("namespaces", format!("join the {} namespace {}", namespaces::name(join.kind), text(&join.path)));
    }
    for (name, map) in [("uid", &plan.namespaces.uid_map), ("gid", &plan.namespaces.gid_map)] {
        for line in map.lines() {
            out.push("namespaces", format!("map {name}s (inside outside count): {line}"));
        }
    }
    if let Some(offsets) = &plan.namespaces.time_offsets {
        out.push("namespaces", format!("move the clocks: {}", offsets.trim().replace('\n', ", ")));
    }
    if plan.namespaces.makes(Kind::Network) {
        out.push("network", "bring lo up");
    }
    for device in &plan.net_devices {
        out.push("network", format!("move {} in as {}", text(&device.host), text(&device.name)));
    }
    if let Some(name) = &plan.hostname {
        out.push("names", format!("set the host name to {}", text(name)));
    }
    if let Some(name) = &plan.domainname {
        out.push("names", format!("set the domain name to {}", text(name)));
    }
    if let Some(name) = &plan.keyring {
        out.push("names", format!("join a new session keyring {}", text(name)));
    }
}

fn rootfs(out: &mut Lines, plan: &Plan) {
    out.push("rootfs", format!("bind {} onto itself", text(&plan.rootfs.path)));
    for mount in &plan.rootfs.mounts {
        out.push("mounts", describe(mount));
    }
    for device in &plan.rootfs.devices {
        out.push("devices", format!("make {} mode {:o}", absolute(&device.path), device.mode));
    }
    for (name, target) in &plan.rootfs.symlinks {
        out.push("devices", format!("link /dev/{} to {}", text(name), text(target)));
    }
    if plan.rootfs.console {
        out.push("devices", "open a pty of /dev/pts and bind it onto /dev/console");
    }
}

fn describe(mount: &MountPlan) -> String {
    let what = match &mount.kind {
        MountKind::Bind { source, recursive, .. } => {
            format!("{} {}", if *recursive { "rbind" } else { "bind" }, text(source))
        }
        MountKind::New { fstype, options, .. } => {
            let option = |(key, value): &(std::ffi::CString, Option<std::ffi::CString>)| match value {
                Some(value) => format!("{}={}", text(key), text(value)),
                None => text(key),
            };
            let options: Vec<String> =
                options.iter().filter(|(key, _)| key.as_c_str() != c"source").map(option).collect();
            let options = if options.is_empty() { String::new() } else { format!(" ({})", options.join(",")) };
            format!("mount {}{options}", text(fstype))
        }
        MountKind::CgroupV2 => "mount cgroup2".to_string(),
        MountKind::CgroupV1(list) => format!("mount a tmpfs with {} cgroup hierarchies", list.len()),
    };
    let mut out = format!("{what} at {}", absolute(&mount.destination));
    let flags = flags(&mount.options);
    if !flags.is_empty() {
        out += &format!(", {}", flags.join(","));
    }
    if mount.idmap.is_some() {
        out += ", ids mapped";
    }
    if mount.options.tmpcopyup {
        out += ", with a copy of what it covers";
    }
    out
}

fn flags(options: &Options) -> Vec<String> {
    const NAMES: [(u64, &str); 7] = [
        (attr::RDONLY, "ro"),
        (attr::NOSUID, "nosuid"),
        (attr::NODEV, "nodev"),
        (attr::NOEXEC, "noexec"),
        (attr::NOATIME, "noatime"),
        (attr::NODIRATIME, "nodiratime"),
        (attr::NOSYMFOLLOW, "nosymfollow"),
    ];
    let mut out: Vec<String> =
        NAMES.iter().filter(|(bit, _)| options.set & bit != 0).map(|(_, name)| (*name).to_string()).collect();
    out.extend(NAMES.iter().filter(|(bit, _)| options.rec_set & bit != 0).map(|(_, name)| format!("r{name}")));
    for (flag, recursive) in &options.propagation {
        let name = match *flag {
            libc::MS_SHARED => "shared",
            libc::MS_SLAVE => "slave",
            libc::MS_PRIVATE => "private",
            _ => "unbindable",
        };
        out.push(if *recursive { format!("r{name}") } else { name.to_string() });
    }
    out
}

fn hooks(out: &mut Lines, kind: &'static str, list: &Option<Vec<Hook>>) {
    for hook in list.iter().flatten() {
        out.push(kind, format!("run the hook {}", hook.path().display()));
    }
}

fn seal(out: &mut Lines, plan: &Plan) {
    for mount in plan.rootfs.mounts.iter().filter(|mount| mount.late_readonly) {
        out.push("seal", format!("make {} read-only", absolute(&mount.destination)));
    }
    if plan.rootfs.readonly {
        out.push("seal", "make / read-only");
    }
    for path in &plan.rootfs.readonly_paths {
        out.push("seal", format!("make {} read-only", absolute(path)));
    }
    for path in &plan.rootfs.masked_paths {
        out.push("seal", format!("mask {}", absolute(path)));
    }
}

fn process(out: &mut Lines, plan: &Plan, filter: usize) {
    let process = &plan.process;
    if let Some(score) = process.oom_score_adj {
        out.push("process", format!("set oom_score_adj to {score}"));
    }
    for (resource, soft, hard) in &process.rlimits {
        out.push("process", format!("limit resource {resource} to {soft}:{hard}"));
    }
    for (name, label) in [("AppArmor profile", &process.apparmor), ("SELinux label", &process.selinux)] {
        if let Some(label) = label {
            out.push("process", format!("{name} {} at execve", text(label)));
        }
    }
    if process.no_new_privs {
        out.push("process", "set no_new_privs");
    }
    if let Some(caps) = &process.capabilities {
        for (set, bits) in [
            ("bounding", caps.bounding),
            ("effective", caps.effective),
            ("permitted", caps.permitted),
            ("inheritable", caps.inheritable),
            ("ambient", caps.ambient),
        ] {
            let names: Vec<String> =
                (0..64u8).filter(|n| bits & (1 << n) != 0).map(super::capabilities::name).collect();
            let names = if names.is_empty() { "none".to_string() } else { names.join(",") };
            out.push("capabilities", format!("{set}: {names}"));
        }
    }
    if let Some(seccomp) = &plan.seccomp {
        let (rules, action) = (seccomp.syscalls.len(), seccomp.default_action);
        out.push("seccomp", format!("a filter of {filter} instructions from {rules} rules, default {action}"));
    }
    let groups: Vec<String> = process.groups.iter().map(u32::to_string).collect();
    let groups = if groups.is_empty() { String::new() } else { format!(", groups {}", groups.join(",")) };
    out.push(
        "process",
        format!("become uid {}, gid {}{groups}, umask {:04o}", process.uid, process.gid, process.umask),
    );
    out.push("process", format!("change to {}", text(&process.cwd)));
    out.push("gate", "wait for start");
    hooks(out, "startContainer", plan.hooks.start_container());
    let argv: Vec<String> = process.argv.as_slice().iter().map(|arg| text(arg)).collect();
    out.push("execve", argv.join(" "));
    hooks(out, "poststart", plan.hooks.poststart());
    hooks(out, "poststop", plan.hooks.poststop());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Cgroups;
    use crate::plan::{Request, build};

    #[test]
    fn a_plan_reads_from_the_cgroup_to_execve() {
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["sleep", "5"], "cwd": "/", "user": {"uid": 7, "gid": 8},
                "capabilities": {"bounding": ["CAP_KILL"]}},
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [{"destination": "/dev/shm", "type": "tmpfs", "options": ["nosuid", "mode=1777"]}],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}], "maskedPaths": ["/proc/kcore"]},
        });
        let request = Request {
            id: "a",
            bundle: std::path::Path::new("/b"),
            terminal: false,
            systemd_cgroup: false,
            no_pivot: false,
            no_new_keyring: true,
            rootless: false,
        };
        let plan = build(&request, &serde_json::from_value(spec).unwrap(), &Cgroups::default()).unwrap();
        let lines: Vec<String> = lines(&plan, 0).iter().map(|line| format!("{}: {}", line.step, line.does)).collect();
        for want in [
            "namespaces: clone the init into new namespaces: mount, pid",
            "mounts: mount tmpfs (mode=1777) at /dev/shm, nosuid",
            "seal: make / read-only",
            "seal: mask /proc/kcore",
            "capabilities: bounding: CAP_KILL",
            "process: become uid 7, gid 8, umask 0022",
            "execve: sleep 5",
        ] {
            assert!(lines.iter().any(|line| line == want), "{want} in {lines:#?}");
        }
    }
}
