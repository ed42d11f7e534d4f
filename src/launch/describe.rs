//! The sentence for a failed step: the child knows the step and the errno, the parent knows the plan.

use std::ffi::CStr;

use nix::errno::Errno;

use crate::child::report::{Failure, Step};
use crate::error::errno_text;
use crate::plan::Plan;
use crate::plan::process::Process;
use crate::plan::rootfs::MountKind;
use crate::{Error, Kind};

/// The error of a failed create or start.
pub fn init(plan: &Plan, failure: &Failure) -> Error {
    one(plan, failure).in_step(failure.step.part())
}

fn one(plan: &Plan, failure: &Failure) -> Error {
    let item = failure.item as usize;
    let what = match failure.step {
        Step::Cgroup => format!("unable to apply cgroup configuration: enter cgroup {item}"),
        Step::Join => match plan.namespaces.joins.get(item) {
            Some(join) => format!("{}: join namespace {:?}", join.field, join.path),
            None => "join namespace".into(),
        },
        Step::Namespaces => "make namespaces".into(),
        Step::Loopback => "bring up the loopback interface".into(),
        Step::Hostname => format!("hostname: set {:?}", plan.hostname.clone().unwrap_or_default()),
        Step::Domainname => format!("domainname: set {:?}", plan.domainname.clone().unwrap_or_default()),
        Step::Keyring => "join a new session keyring".into(),
        Step::HostPropagation => "set the propagation of the host's mounts".into(),
        Step::Rootfs => format!("root.path: open {:?}", plan.rootfs.path),
        Step::MountSource | Step::MountTarget | Step::MountPlace | Step::Mount | Step::MountAttributes => {
            mount(plan, failure.step, item)
        }
        Step::CopyUp => format!("mounts[{item}].options: tmpcopyup"),
        Step::Chroot => "chroot to the rootfs".into(),
        Step::Device => match plan.rootfs.devices.get(item) {
            Some(device) => format!("make device {:?}", absolute(&device.path)),
            None => "make device".into(),
        },
        Step::Symlink => match plan.rootfs.symlinks.get(item) {
            Some((name, _)) => format!("make symlink \"/dev/{}\"", name.to_string_lossy()),
            None => "make symlinks in \"/dev\"".into(),
        },
        Step::PivotRoot if plan.rootfs.no_pivot => "move the rootfs to \"/\"".into(),
        Step::PivotRoot => "pivot_root".into(),
        Step::RootPropagation => "linux.rootfsPropagation: set".into(),
        Step::ReadonlyRoot => "root.readonly: remount".into(),
        Step::Procfs => "open a procfs".into(),
        Step::Sysctl => match plan.sysctls.get(item) {
            Some(s) => {
                format!("linux.sysctl: write {:?} to {:?}", s.value, format!("/proc/sys/{}", s.path.to_string_lossy()))
            }
            None => "linux.sysctl".into(),
        },
        Step::ReadonlyPath => format!("linux.readonlyPaths[{item}]: {}", listed(&plan.rootfs.readonly_paths, item)),
        Step::MaskedPath => format!("linux.maskedPaths[{item}]: {}", listed(&plan.rootfs.masked_paths, item)),
        Step::CreateContainerHook | Step::StartContainerHook => return Error::new(Kind::System, &failure.detail),
        _ => return shared("process", &plan.process, failure),
    };
    finish(what, failure)
}

/// The error of a start that failed after the gate, where nothing but the name of the program is known.
pub fn start(program: &str, failure: &Failure) -> Error {
    match failure.step {
        Step::Execve => execve(program, Errno::from_raw(failure.errno)),
        Step::StartContainerHook => Error::new(Kind::System, &failure.detail),
        Step::Seccomp => finish("linux.seccomp: install the filter".into(), failure),
        Step::Gate => finish("wait for start".into(), failure),
        step => finish(format!("start {program:?}: {step:?}"), failure),
    }
}

/// The error of a failed exec.
pub fn process(field: &str, plan: &Process, failure: &Failure) -> Error {
    shared(field, plan, failure).in_step(failure.step.part())
}

/// The steps that init and exec share.
fn shared(field: &str, plan: &Process, failure: &Failure) -> Error {
    let name = plan.argv.as_slice()[0].to_string_lossy().into_owned();
    let errno = Errno::from_raw(failure.errno);
    let what = match failure.step {
        Step::Parent => "lost the runtime".into(),
        Step::Cgroup => format!("unable to apply cgroup configuration: enter cgroup {}", failure.item),
        Step::OomScore => format!("{field}.oomScoreAdj: set {}", plan.oom_score_adj.unwrap_or_default()),
        Step::Join => "join the container's namespaces".into(),
        Step::NamespaceRoot => "become root of the user namespace".into(),
        Step::Console => "make the terminal".into(),
        Step::Rootfs => "open the root".into(),
        Step::Keyring => "join a new session keyring".into(),
        Step::MakeCwd => format!("{field}.cwd: make {:?}", plan.cwd),
        Step::NoNewPrivs => format!("{field}.noNewPrivileges: set"),
        Step::Scheduler if errno == Errno::EPERM => {
            // sched_setattr(2): a deadline is for a thread that may run everywhere.
            let hint = "process scheduler can't be used together with AllowedCPUs, or is not permitted";
            format!("{field}.scheduler: set ({hint})")
        }
        Step::Scheduler => format!("{field}.scheduler: set"),
        Step::IoPriority => format!("{field}.ioPriority: set"),
        Step::Affinity => format!("{field}.execCPUAffinity: set"),
        Step::Personality => "linux.personality: set".into(),
        Step::MemoryPolicy => "linux.memoryPolicy: set".into(),
        Step::Procfs => "open a procfs".into(),
        Step::AppArmor => {
            format!("{field}.apparmorProfile: apply {:?}", plan.apparmor.clone().unwrap_or_default())
        }
        Step::SeLinux => format!("{field}.selinuxLabel: set {:?}", plan.selinux.clone().unwrap_or_default()),
        Step::Seccomp => "linux.seccomp: install the filter".into(),
        Step::Bounding => format!("{field}.capabilities.bounding: drop capability {}", failure.item),
        Step::Capabilities => format!("{field}.capabilities: set"),
        Step::Groups => format!("{field}.user.additionalGids: set"),
        Step::Gid if errno == Errno::EINVAL => {
            return Error::invalid(
                format!("{field}.user.gid"),
                format!("cannot setgid to unmapped gid {} in user namespace", plan.gid),
            );
        }
        Step::Uid if errno == Errno::EINVAL => {
            return Error::invalid(
                format!("{field}.user.uid"),
                format!("cannot setuid to unmapped uid {} in user namespace", plan.uid),
            );
        }
        Step::Gid => format!("{field}.user.gid: set {}", plan.gid),
        Step::Uid => format!("{field}.user.uid: set {}", plan.uid),
        Step::StdioOwner => format!("give stream {} to uid {}", failure.item, plan.uid),
        Step::Stdio => "set up the standard streams".into(),
        Step::Rlimit => match plan.rlimits.get(failure.item as usize) {
            Some((resource, soft, hard)) => {
                format!("{field}.rlimits[{}]: set limit {resource} to {soft}:{hard}", failure.item)
            }
            None => format!("{field}.rlimits: set"),
        },
        Step::Chdir => format!("{field}.cwd: chdir to {:?}", plan.cwd),
        Step::CwdOutside => {
            let cause = "current working directory is outside of container mount namespace root";
            return Error::invalid(format!("{field}.cwd"), format!("{:?}: {cause}", plan.cwd));
        }
        Step::Program => return program(&name, failure, errno),
        Step::Gate => "wait for start".into(),
        Step::Descriptors => "mark the descriptors".into(),
        Step::Execve => return execve(&name, errno),
        other => format!("{other:?}").to_lowercase(),
    };
    finish(what, failure)
}

/// Docker and Podman look for these words to tell 126 from 127.
fn program(name: &str, failure: &Failure, errno: Errno) -> Error {
    let cause = match errno {
        Errno::ENOENT if failure.item == 1 => "executable file not found in $PATH".into(),
        Errno::ENOENT => "no such file or directory".into(),
        Errno::EACCES => "permission denied".into(),
        Errno::EISDIR => "is a directory".into(),
        other => errno_text(other),
    };
    Error::new(Kind::Invalid, format!("exec: {name:?}: {cause}"))
}

fn execve(name: &str, errno: Errno) -> Error {
    let cause = match errno {
        Errno::ENOENT => {
            "no such file or directory (its interpreter is missing: see its first line, or its dynamic loader)".into()
        }
        Errno::ENOEXEC => "exec format error (ENOEXEC): not a program for this machine, or a script without #!".into(),
        Errno::EACCES => "permission denied (EACCES): not executable, or on a noexec mount".into(),
        other => errno_text(other),
    };
    Error::new(Kind::Invalid, format!("exec {name}: {cause}"))
}

fn mount(plan: &Plan, step: Step, item: usize) -> String {
    let Some(mount) = plan.rootfs.mounts.get(item) else { return "mount".into() };
    let at = absolute(&mount.destination);
    let (what, source) = match &mount.kind {
        MountKind::Bind { source, .. } => (format!("{source:?}"), Some(source)),
        MountKind::New { fstype, .. } => (fstype.to_string_lossy().into_owned(), None),
        MountKind::CgroupV2 | MountKind::CgroupV1(_) => ("cgroup".into(), None),
    };
    let field = format!("mounts[{item}]");
    match (step, source) {
        (Step::MountSource, Some(source)) => format!("{field}.source: open {source:?} for {at:?}"),
        (Step::MountTarget, _) => format!("{field}.destination: make {at:?}"),
        (Step::MountPlace, _) => {
            format!("{field}.destination: filesystem {what} must be mounted on ordinary directory: {at:?}")
        }
        (Step::MountAttributes, _) => format!("{field}.options: apply to {at:?}"),
        _ => format!("{field}: mount {what} at {at:?}"),
    }
}

fn absolute(path: &CStr) -> String {
    format!("/{}", path.to_string_lossy())
}

fn listed(paths: &[std::ffi::CString], item: usize) -> String {
    paths.get(item).map_or_else(String::new, |path| format!("cover {:?}", absolute(path)))
}

fn finish(what: String, failure: &Failure) -> Error {
    match (failure.errno, failure.detail.is_empty()) {
        (0, _) => Error::new(Kind::System, format!("{what}: {}", failure.detail)),
        (errno, true) => Error::sys(what, Errno::from_raw(errno)),
        (errno, false) => Error::sys(format!("{what}: {}", failure.detail), Errno::from_raw(errno)),
    }
}
