//! The sentence for a failed step: the child knows the step and the errno, the parent knows the plan.

use std::ffi::CStr;
use std::path::Path;

use nix::errno::Errno;

use super::hints;
use crate::child::report::{Failure, Step};
use crate::error::errno_text;
use crate::plan::Plan;
use crate::plan::process::{Process, limit_name};
use crate::plan::rootfs::MountKind;
use crate::{Error, Kind};

/// The error of a failed create or start.
pub fn init(plan: &Plan, failure: &Failure) -> Error {
    complete(one(plan, failure), failure, object(plan, failure), hints::init(plan, failure))
}

/// With the parts that a log has as fields of their own.
fn complete(err: Error, failure: &Failure, object: Option<String>, hint: Option<String>) -> Error {
    let err = err.in_step(failure.step.part());
    let err = if failure.errno == 0 { err } else { err.of_errno(Errno::from_raw(failure.errno)) };
    let err = object.into_iter().fold(err, Error::of_object);
    // An explanation that goes on after a hint would be read as its part.
    match hint.filter(|_| err.hint().is_none()) {
        Some(hint) => err.with_hint(hint),
        None => err,
    }
}

/// What a step of a create was at.
fn object(plan: &Plan, failure: &Failure) -> Option<String> {
    let item = failure.item as usize;
    let text = |text: &CStr| text.to_string_lossy().into_owned();
    let rootfs = &plan.rootfs;
    match failure.step {
        Step::Rootfs => Some(text(&rootfs.path)),
        Step::Join => plan.namespaces.joins.get(item).map(|join| text(&join.path)),
        Step::MountSource => match &rootfs.mounts.get(item)?.kind {
            MountKind::Bind { source, .. } => Some(text(source)),
            _ => None,
        },
        Step::MountTarget | Step::MountPlace | Step::Mount | Step::MountAttributes | Step::CopyUp => {
            rootfs.mounts.get(item).map(|mount| absolute(&mount.destination))
        }
        Step::Device => rootfs.devices.get(item).map(|device| absolute(&device.path)),
        Step::Sysctl => plan.sysctls.get(item).map(|sysctl| format!("/proc/sys/{}", text(&sysctl.path))),
        Step::ReadonlyPath => rootfs.readonly_paths.get(item).map(|path| absolute(path)),
        Step::MaskedPath => rootfs.masked_paths.get(item).map(|path| absolute(path)),
        Step::Hostname => plan.hostname.as_deref().map(text),
        Step::Domainname => plan.domainname.as_deref().map(text),
        _ => object_of_process(&plan.process, failure),
    }
}

fn object_of_process(plan: &Process, failure: &Failure) -> Option<String> {
    let text = |text: &CStr| text.to_string_lossy().into_owned();
    match failure.step {
        Step::MakeCwd | Step::Chdir | Step::CwdOutside => Some(text(&plan.cwd)),
        Step::Program | Step::Execve => plan.argv.as_slice().first().map(|name| text(name)),
        Step::AppArmor => plan.apparmor.as_deref().map(text),
        Step::SeLinux => plan.selinux.as_deref().map(text),
        _ => None,
    }
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
        Step::TimeOffsets => "linux.timeOffsets: set".into(),
        Step::Loopback => "bring up the loopback interface".into(),
        Step::Hostname => format!("hostname: set {:?}", plan.hostname.clone().unwrap_or_default()),
        Step::Domainname => format!("domainname: set {:?}", plan.domainname.clone().unwrap_or_default()),
        Step::Keyring => "join a new session keyring".into(),
        Step::HostPropagation => "set the propagation of the host's mounts".into(),
        Step::Rootfs => format!("root.path: open {:?}", plan.rootfs.path),
        Step::MountSource | Step::MountTarget | Step::MountPlace | Step::Mount | Step::MountAttributes => {
            mount(plan, failure.step, item, &failure.detail)
        }
        Step::CopyUp => format!("mounts[{item}].options: tmpcopyup"),
        Step::Chroot => "chroot to the rootfs".into(),
        Step::Device => match plan.rootfs.devices.get(item) {
            Some(device) => format!("linux.devices: make {:?}", absolute(&device.path)),
            None => "linux.devices: make".into(),
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

/// The error of a start that failed after the gate, where nothing but the name of the program and where the rootfs is
/// are known.
pub fn start(program: &str, failure: &Failure, rootfs: Option<&Path>) -> Error {
    let err = start_step(program, failure, rootfs);
    complete(err, failure, (failure.step == Step::Execve).then(|| program.to_string()), None)
}

fn start_step(program: &str, failure: &Failure, rootfs: Option<&Path>) -> Error {
    match failure.step {
        Step::Execve => execve(program, failure, rootfs),
        Step::StartContainerHook => Error::new(Kind::System, &failure.detail),
        Step::Seccomp => finish("linux.seccomp: install the filter".into(), failure),
        Step::Gate => finish("wait for start".into(), failure),
        step => finish(format!("start {program:?}: {step:?}"), failure),
    }
}

/// The error of a failed exec in the container whose root is at `root`.
pub fn process(field: &str, plan: &Process, failure: &Failure, root: &Path) -> Error {
    let err = match failure.step {
        Step::Execve => execve(&plan.argv.as_slice()[0].to_string_lossy(), failure, Some(root)),
        _ => shared(field, plan, failure),
    };
    complete(err, failure, object_of_process(plan, failure), hints::process(plan, failure))
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
                format!("{field}.rlimits[{}]: set limit {} to {soft}:{hard}", failure.item, limit_name(*resource))
            }
            None => format!("{field}.rlimits: set"),
        },
        Step::Chdir => format!("{field}.cwd: chdir to {:?}", plan.cwd),
        Step::CwdOutside => {
            let cause = "current working directory is outside of container mount namespace root";
            return Error::invalid(format!("{field}.cwd"), format!("{:?}: {cause}", plan.cwd));
        }
        Step::Program => return program(&name, failure, errno).of_field(format!("{field}.args[0]")),
        Step::Gate => "wait for start".into(),
        Step::Descriptors => "mark the descriptors".into(),
        Step::Execve => return execve(&name, failure, None),
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

/// `failure.detail` is where the program was found.
fn execve(name: &str, failure: &Failure, root: Option<&Path>) -> Error {
    let errno = Errno::from_raw(failure.errno);
    let found = if failure.detail.is_empty() { name } else { &failure.detail };
    let general = match errno {
        Errno::ENOENT => Some("its interpreter is missing: see its first line, or its dynamic loader"),
        Errno::ENOEXEC => Some("it is no program for this machine, or a script without #!"),
        Errno::EACCES => Some("it is not executable, or on a noexec mount"),
        Errno::E2BIG => Some("its arguments and environment are too large (execve(2))"),
        Errno::ETXTBSY => Some("somebody has it open for writing"),
        _ => None,
    };
    let err = Error::new(Kind::Invalid, format!("exec {name}: {}", errno_text(errno))).of_field("process.args[0]");
    let hint = root.and_then(|root| hints::execve(root, found, errno)).or(general.map(str::to_string));
    hint.into_iter().fold(err, Error::with_hint)
}

fn mount(plan: &Plan, step: Step, item: usize, detail: &str) -> String {
    let Some(mount) = plan.rootfs.mounts.get(item) else { return "mount".into() };
    let at = absolute(&mount.destination);
    let (what, source) = match &mount.kind {
        MountKind::Bind { source, .. } => (format!("{source:?}"), Some(source)),
        MountKind::New { fstype, .. } => (fstype.to_string_lossy().into_owned(), None),
        MountKind::CgroupV2(_) | MountKind::CgroupV1(_) => ("cgroup".into(), None),
    };
    let field = format!("mounts[{item}]");
    if step == Step::Mount && detail.starts_with("option \"context=") {
        return format!("linux.mountLabel: mount {what} at {at:?}");
    }
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

/// The error of a bind source that the parent could not open.
pub fn source(at: usize, source: &CStr, errno: Errno) -> Error {
    let field = format!("mounts[{at}].source");
    let err = Error::sys(format!("{field}: open {source:?}"), errno).of_field(field).in_step("mounts");
    let err = err.of_object(source.to_string_lossy());
    if errno == Errno::ENOENT { err.with_hint(hints::NO_SOURCE) } else { err }
}

fn absolute(path: &CStr) -> String {
    format!("/{}", path.to_string_lossy())
}

fn listed(paths: &[std::ffi::CString], item: usize) -> String {
    paths.get(item).map_or_else(String::new, |path| format!("cover {:?}", absolute(path)))
}

fn finish(what: String, failure: &Failure) -> Error {
    // What stands before the first colon is a field, unless it is a sentence.
    let field = what.split(": ").next().filter(|field| !field.contains(' ') && *field != what).map(str::to_string);
    let err = match (failure.errno, failure.detail.is_empty()) {
        (0, _) => Error::new(Kind::System, format!("{what}: {}", failure.detail)),
        (errno, true) => Error::sys(what, Errno::from_raw(errno)),
        (errno, false) => Error::sys(format!("{what}: {}", failure.detail), Errno::from_raw(errno)),
    };
    field.into_iter().fold(err, Error::of_field)
}
