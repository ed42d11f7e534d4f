//! A plan in words: what a create would do, step by step.

use std::ffi::CStr;

use oci_spec::runtime::{Hook, LinuxNamespaceType as Kind};
use serde::Serialize;

use super::Plan;
use super::cgroup::Rule;
use super::mount_options::Options;
use super::namespaces::{self, KINDS};
use super::rootfs::{Device, MountKind, MountPlan};
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
    if let Some(change) = plan.rootfs.propagation {
        out.push("root", format!("make / {}", propagation(change)));
    }
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
        let rules: Vec<String> = rules.iter().map(rule).collect();
        out.push("cgroup", format!("devices, the last that matches wins: deny all; {}", rules.join("; ")));
    }
    if let Some(scope) = &plan.cgroup.scope {
        let whose = if scope.user { "the user's systemd" } else { "systemd" };
        out.push("cgroup", format!("have {whose} start the unit {} in {}", scope.unit, scope.slice));
    }
}

fn rule(rule: &Rule) -> String {
    let number = |number: Option<u32>| number.map_or("*".to_string(), |number| number.to_string());
    let access = [(rule.read, 'r'), (rule.write, 'w'), (rule.mknod, 'm')];
    let access: String = access.iter().filter(|(has, _)| *has).map(|(_, letter)| *letter).collect();
    let verb = if rule.allow { "allow" } else { "deny" };
    format!("{verb} {} {}:{} {access}", rule.kind, number(rule.major), number(rule.minor))
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
    if plan.rootfs.mount_namespace {
        let around = propagation(plan.rootfs.host_propagation);
        out.push("rootfs", format!("make all of the host's mounts {around} in the new mount namespace"));
        out.push("rootfs", format!("bind {} onto itself", text(&plan.rootfs.path)));
    }
    if let Some(label) = &plan.rootfs.mount_label {
        out.push("rootfs", format!("give new file systems the SELinux context {}", text(label)));
    }
    for mount in &plan.rootfs.mounts {
        out.push("mounts", describe(mount));
    }
    for device in &plan.rootfs.devices {
        out.push("devices", describe_device(device, plan.namespaces.has(Kind::User)));
    }
    for (name, target) in &plan.rootfs.symlinks {
        out.push("devices", format!("link /dev/{} to {}", text(name), text(target)));
    }
    if plan.rootfs.console {
        out.push("devices", "open a pty of /dev/pts and bind it onto /dev/console");
    }
}

fn describe_device(device: &Device, bound: bool) -> String {
    let kind = match device.format {
        libc::S_IFBLK => "b",
        libc::S_IFIFO => "p",
        _ => "c",
    };
    let (major, minor) = (libc::major(device.rdev), libc::minor(device.rdev));
    let number = if kind == "p" { String::new() } else { format!(" {major}:{minor}") };
    let at = absolute(&device.path);
    if bound {
        return format!("bind {} ({kind}{number}) onto {at}", text(&device.host));
    }
    format!("make {at} ({kind}{number}), mode {:04o}, owner {}:{}", device.mode, device.uid, device.gid)
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
        MountKind::CgroupV2(_) => "mount cgroup2".to_string(),
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
    const NAMES: [(u64, &str, &str); 6] = [
        (attr::RDONLY, "ro", "rw"),
        (attr::NOSUID, "nosuid", "suid"),
        (attr::NODEV, "nodev", "dev"),
        (attr::NOEXEC, "noexec", "exec"),
        (attr::NODIRATIME, "nodiratime", "diratime"),
        (attr::NOSYMFOLLOW, "nosymfollow", "symfollow"),
    ];
    let mut out = Vec::new();
    for (prefix, set, clear) in [("", options.set, options.clear), ("r", options.rec_set, options.rec_clear)] {
        for (bit, name, contrary) in NAMES {
            match (set & bit, clear & bit) {
                (0, 0) => {}
                (0, _) => out.push(format!("{prefix}{contrary}")),
                _ => out.push(format!("{prefix}{name}")),
            }
        }
        if clear & attr::ATIME != 0 {
            let name = match set & attr::ATIME {
                attr::NOATIME => "noatime",
                attr::STRICTATIME => "strictatime",
                _ => "relatime",
            };
            out.push(format!("{prefix}{name}"));
        }
    }
    out.extend(options.propagation.iter().map(|change| propagation(*change)));
    out
}

fn propagation((flag, recursive): (u64, bool)) -> String {
    let name = match flag {
        libc::MS_SHARED => "shared",
        libc::MS_SLAVE => "slave",
        libc::MS_PRIVATE => "private",
        _ => "unbindable",
    };
    if recursive { format!("r{name}") } else { name.to_string() }
}

fn hooks(out: &mut Lines, kind: &'static str, list: &Option<Vec<Hook>>) {
    for hook in list.iter().flatten() {
        let args = hook.args().iter().flatten().skip(1).map(|arg| format!(" {arg}")).collect::<String>();
        let limit = hook.timeout().map(|seconds| format!(", for at most {seconds} s")).unwrap_or_default();
        out.push(kind, format!("run the hook {}{args}{limit}", hook.path().display()));
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
        let number = |n: u64| if n == u64::MAX { "unlimited".to_string() } else { n.to_string() };
        let name = super::process::limit_name(*resource);
        out.push("process", format!("limit {name} to {}, and at most {}", number(*soft), number(*hard)));
    }
    scheduling(out, plan);
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
        if let Some(listener) = &seccomp.listener {
            out.push("seccomp", format!("hand its listener to the agent at {}", listener.path.display()));
        }
    }
    let groups: Vec<String> = process.groups.iter().map(u32::to_string).collect();
    let groups = if groups.is_empty() { String::new() } else { format!(", groups {}", groups.join(",")) };
    out.push(
        "process",
        format!("become uid {}, gid {}{groups}, umask {:04o}", process.uid, process.gid, process.umask),
    );
    out.push("process", format!("change to {}", text(&process.cwd)));
    if process.find_home {
        out.push("process", format!("take HOME from the line of uid {} in /etc/passwd", process.uid));
    }
    out.push("gate", "wait for start");
    hooks(out, "startContainer", plan.hooks.start_container());
    let argv: Vec<String> = process.argv.as_slice().iter().map(|arg| text(arg)).collect();
    out.push("execve", argv.join(" "));
    hooks(out, "poststart", plan.hooks.poststart());
    hooks(out, "poststop", plan.hooks.poststop());
}

fn scheduling(out: &mut Lines, plan: &Plan) {
    let process = &plan.process;
    if let Some(attr) = &process.scheduler {
        let names = ["SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE"];
        let name = names.get(attr.policy as usize).unwrap_or(&"SCHED_DEADLINE");
        let how = match attr.policy {
            0 | 3 => format!(", nice {}", attr.nice),
            1 | 2 => format!(", priority {}", attr.priority),
            6 => format!(", {} of every {} ns, within {} ns", attr.runtime, attr.period, attr.deadline),
            _ => String::new(),
        };
        out.push("process", format!("schedule it by {name}{how}"));
    }
    if let Some((class, priority)) = process.io_priority {
        let class = ["none", "real-time", "best-effort", "idle"].get(class as usize).unwrap_or(&"unknown");
        out.push("process", format!("{class} I/O priority {priority}"));
    }
    if let Some(domain) = process.personality {
        out.push("process", format!("execution domain {}", if domain == 8 { "LINUX32" } else { "LINUX" }));
    }
    if let Some(policy) = &process.memory_policy {
        let nodes = policy.nodes.iter().enumerate().flat_map(|(word, bits)| {
            (0..64).filter(move |bit| bits & (1u64 << bit) != 0).map(move |bit| (word * 64 + bit).to_string())
        });
        let nodes = nodes.collect::<Vec<_>>().join(",");
        out.push("process", format!("memory policy {:#x} on nodes {nodes}", policy.mode));
    }
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
