//! What a person may do about a failed step: a clause after its cause. Looked for only when something has failed.
//! Does not live here: the sentence before it (describe).

use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use oci_spec::runtime::LinuxNamespaceType as Kind;

use crate::child::report::{Failure, Step};
use crate::plan::Plan;
use crate::plan::process::Process;
use crate::plan::rootfs::MountKind;
use crate::sys::mount::attr;
use crate::sys::path;

/// About a bind source that is not there.
pub const NO_SOURCE: &str = "the source of a bind mount must exist on the host";

/// About a step of a create.
pub fn init(plan: &Plan, failure: &Failure) -> Option<String> {
    let errno = Errno::from_raw(failure.errno);
    let in_user_namespace = plan.namespaces.has(Kind::User);
    let text = match (failure.step, errno) {
        (Step::Rootfs, Errno::ENOENT) => "the bundle has no root file system there",
        (Step::Rootfs, Errno::ENOTDIR | Errno::ELOOP) => "it must be a directory and no symlink",
        (Step::Rootfs | Step::MountSource, Errno::EACCES) if in_user_namespace => {
            "root of the user namespace must be let through every directory above it"
        }
        (Step::MountSource, Errno::ENOENT) => NO_SOURCE,
        (Step::Mount | Step::MountTarget, Errno::ENOTDIR | Errno::EISDIR) => {
            "are you trying to mount a directory onto a file (or vice-versa)?"
        }
        (Step::MountTarget, Errno::EROFS) => {
            "the mount point is missing and cannot be made on a read-only file system: the image should have it"
        }
        (Step::Mount, _) if failure.detail.starts_with("option \"context=") && !selinux_enabled() => {
            "SELinux is not enabled on this machine"
        }
        (Step::Mount, Errno::ENODEV) => "this kernel has no such file system, or not yet: see /proc/filesystems",
        (Step::Mount, Errno::EPERM) if in_user_namespace => mount_in_user_namespace(plan, failure)?,
        (Step::MountAttributes, Errno::EPERM) if in_user_namespace => {
            "what the source forbids (ro, nosuid, nodev, noexec, its atime) stays so in a user namespace"
        }
        (Step::Join, Errno::EINVAL) => "it is no namespace of this type, or one that this process is in already",
        (Step::Namespaces, Errno::ENOSPC) => "a limit of the host is reached: see /proc/sys/user/max_*_namespaces",
        (Step::Hostname | Step::Domainname, Errno::EINVAL) => "64 bytes are the most",
        (Step::Sysctl, Errno::ENOENT) => "this kernel has no such sysctl, or not in this namespace",
        (Step::Sysctl, Errno::EINVAL | Errno::ERANGE) => "the kernel does not take this value",
        (Step::Device, Errno::EEXIST) => "something else is there already",
        (Step::Device, Errno::ENOENT | Errno::ENODEV) if in_user_namespace => {
            "in a user namespace the host's device is bound, and the host has not this one"
        }
        (Step::Program, Errno::EACCES) => return program(plan),
        _ => return process(&plan.process, failure),
    };
    Some(text.into())
}

fn mount_in_user_namespace(plan: &Plan, failure: &Failure) -> Option<&'static str> {
    let MountKind::New { fstype, .. } = &plan.rootfs.mounts.get(failure.item as usize)?.kind else { return None };
    match fstype.to_bytes() {
        b"sysfs" => Some("a sysfs needs a network namespace that is the user namespace's own"),
        b"proc" => {
            Some("a proc needs a pid namespace that is the user namespace's own, and an uncovered /proc outside")
        }
        _ => Some("this file system cannot be mounted in a user namespace"),
    }
}

/// About a step that init and exec share.
pub fn process(plan: &Process, failure: &Failure) -> Option<String> {
    let text = match (failure.step, Errno::from_raw(failure.errno)) {
        (Step::Cgroup, Errno::EBUSY) => {
            "its cgroups below have controllers enabled (cgroups(7), no internal processes)"
        }
        (Step::Scheduler, Errno::EPERM) => match plan.scheduler.map(|attr| attr.policy) {
            // sched_setattr(2): a deadline is for a thread that may run everywhere.
            Some(6) => {
                "process scheduler can't be used together with AllowedCPUs, or another cpuset, where it is for a deadline"
            }
            _ => "on cgroup v1 it may need linux.resources.cpu.realtimeRuntime, and always CAP_SYS_NICE",
        },
        (Step::Scheduler, Errno::EINVAL) => "the kernel does not have this policy, or not with these values",
        (Step::MemoryPolicy, Errno::EINVAL) => "the mode does not go with these nodes, or the machine has them not",
        (Step::AppArmor, _) if !apparmor_enabled() => "AppArmor is not enabled on this machine",
        (Step::AppArmor, Errno::ENOENT) => "no such profile is loaded",
        (Step::SeLinux, _) if !selinux_enabled() => "SELinux is not enabled on this machine",
        (Step::SeLinux, Errno::EINVAL) => "the policy does not know this label",
        (Step::Seccomp, Errno::EACCES) => "without noNewPrivileges a filter needs CAP_SYS_ADMIN",
        (Step::Groups, Errno::EPERM) => "a rootless container cannot have additional groups",
        (Step::Rlimit, Errno::EINVAL) => "the soft limit is above the hard one",
        (Step::Rlimit, Errno::EPERM) => "only a privileged runtime may raise a hard limit",
        (Step::Chdir, Errno::ENOENT) => "it is not in the container",
        (Step::Chdir | Step::MakeCwd, Errno::ENOTDIR) => "it is not a directory",
        (Step::Chdir, Errno::EACCES) => return Some(format!("uid {} may not enter it", plan.uid)),
        (Step::Program, Errno::ENOENT) if failure.item == 1 && plan.path.is_none() => "process.env has no PATH",
        _ => return None,
    };
    Some(text.into())
}

/// SELinux is there and a policy is loaded.
fn selinux_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

fn apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"))
}

/// Why the user may not run a program that is there.
fn program(plan: &Plan) -> Option<String> {
    let name = plan.process.argv.as_slice().first()?.to_str().ok()?;
    let inside = crate::plan::clean(Path::new(name));
    let mounts = plan.rootfs.mounts.iter().enumerate();
    let mut covering = mounts.filter(|(_, mount)| {
        let at = Path::new("/").join(mount.destination.to_string_lossy().as_ref());
        inside.starts_with(at) && (mount.options.set | mount.options.rec_set) & attr::NOEXEC != 0
    });
    if let Some((at, mount)) = covering.next_back() {
        return Some(format!("mounts[{at}] at {:?} is noexec", format!("/{}", mount.destination.to_string_lossy())));
    }
    let root = path::open_dir(&plan.rootfs.path).ok()?;
    let file = path::open_in_root(root.as_fd(), &below(name)?, OFlag::O_PATH).ok()?;
    let mode = nix::sys::stat::fstat(&file).ok()?.st_mode & 0o7777;
    Some(format!("its mode is {mode:04o}, and uid {} runs it", plan.process.uid))
}

/// Why execve(2) has refused `program` of the root at `root`, as far as its first bytes tell. Whoever wrote the image may
/// have put anything there, and this process has rights that a container has not: only regular files on the root's own
/// mount are opened, and only where that is a file system of this machine, which answers.
pub fn execve(root: &Path, program: &str, errno: Errno) -> Option<String> {
    if !matches!(errno, Errno::ENOENT | Errno::ENOEXEC) {
        return None;
    }
    let root = CString::new(root.as_os_str().as_encoded_bytes()).ok()?;
    let root = path::open_dir(&root).ok()?;
    if !LOCAL.contains(&path::magic(root.as_fd()).ok()?) {
        return None;
    }
    let head = head(&root, program)?;
    let lookup = |name: &CStr| path::open_on_mount(root.as_fd(), name, OFlag::O_PATH);
    let missing = |name: &str| below(name).is_some_and(|name| lookup(&name).err() == Some(Errno::ENOENT));
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let interpreter = line.trim_start().split([' ', '\t']).next().unwrap_or_default();
        if line.ends_with('\r') {
            return Some(format!("its first line ends as Windows ends lines (CRLF): there is no {interpreter:?}"));
        }
        return missing(interpreter).then(|| format!("its interpreter {interpreter:?} is not in the container"));
    }
    match Elf::read(&head) {
        Some(elf) if HOST.0 != 0 && elf.machine != HOST.0 && !(elf.machine == 3 && HOST.0 == 62) => {
            Some(format!("it is a program for {}, and this machine is {}", machine(elf.machine), HOST.1))
        }
        Some(elf) => {
            let loader = elf.interpreter.filter(|loader| missing(loader))?;
            Some(format!("its dynamic loader {loader:?} is not in the container"))
        }
        None if errno == Errno::ENOEXEC && head.is_empty() => Some("it is empty".into()),
        None if errno == Errno::ENOEXEC => Some("it is no program of this system, nor does it begin with #!".into()),
        None => None,
    }
}

/// Magic numbers (statfs(2)) of file systems that wait for nobody: ext4, XFS, Btrfs, F2FS, tmpfs, ramfs, overlayfs, EROFS,
/// squashfs, ZFS.
const LOCAL: [i64; 10] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0xf2f5_2010,
    0x0102_1994,
    0x8584_58f6,
    0x794c_7630,
    0xe0f5_e1e2,
    0x7371_7368,
    0x2fc1_2fc1,
];

/// An absolute path as a lookup below a root takes it.
fn below(name: &str) -> Option<CString> {
    CString::new(name.strip_prefix('/')?).ok().filter(|name| !name.is_empty())
}

/// The first bytes of a regular file of the container, which may be anything.
fn head(root: &OwnedFd, program: &str) -> Option<Vec<u8>> {
    let found = path::open_on_mount(root.as_fd(), &below(program)?, OFlag::O_PATH).ok()?;
    // To open a device is to use it.
    if path::kind(found.as_fd()).ok()?.0 != SFlag::S_IFREG {
        return None;
    }
    let file = std::fs::File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
    let mut head = Vec::new();
    file.take(4096).read_to_end(&mut head).ok()?;
    Some(head)
}

/// The e_machine of elf.h and the name of what this is built for.
const HOST: (u16, &str) = if cfg!(target_arch = "x86_64") {
    (62, "x86_64")
} else if cfg!(target_arch = "aarch64") {
    (183, "aarch64")
} else if cfg!(target_arch = "riscv64") {
    (243, "riscv64")
} else {
    (0, std::env::consts::ARCH)
};

fn machine(number: u16) -> String {
    match number {
        3 => "x86".into(),
        20 | 21 => "ppc64".into(),
        22 => "s390x".into(),
        40 => "arm".into(),
        62 => "x86_64".into(),
        183 => "aarch64".into(),
        243 => "riscv64".into(),
        258 => "loongarch64".into(),
        other => format!("machine {other} of elf.h"),
    }
}

/// What the head of an ELF file tells.
struct Elf {
    machine: u16,
    interpreter: Option<String>,
}

impl Elf {
    fn read(head: &[u8]) -> Option<Elf> {
        const PT_INTERP: u64 = 3;
        if !head.starts_with(b"\x7fELF") {
            return None;
        }
        let (wide, little) = (*head.get(4)? == 2, *head.get(5)? == 1);
        let number = |at: usize, bytes: usize| -> Option<u64> {
            let bytes = head.get(at..at.checked_add(bytes)?)?.iter();
            let add = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
            Some(if little { bytes.rev().fold(0, add) } else { bytes.fold(0, add) })
        };
        let machine = number(18, 2)? as u16;
        let interpreter = || -> Option<String> {
            let (table, entry, count) = if wide {
                (number(32, 8)?, number(54, 2)?, number(56, 2)?)
            } else {
                (number(28, 4)?, number(42, 2)?, number(44, 2)?)
            };
            let at = |n: u64| usize::try_from(table.checked_add(n * entry)?).ok();
            let at = (0..count).filter_map(at).find(|at| number(*at, 4) == Some(PT_INTERP))?;
            let (offset, size) = if wide {
                (number(at + 8, 8)?, number(at + 32, 8)?)
            } else {
                (number(at + 4, 4)?, number(at + 16, 4)?)
            };
            let end = offset.checked_add(size)?;
            let text = head.get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)?;
            CStr::from_bytes_until_nul(text).ok().map(|text| text.to_string_lossy().into_owned())
        };
        Some(Elf { machine, interpreter: interpreter() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_why_a_program_does_not_run() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("bin")).unwrap();
        std::fs::write(root.path().join("bin/sh"), "").unwrap();
        let says = |content: &[u8], errno| {
            std::fs::write(root.path().join("p"), content).unwrap();
            execve(root.path(), "/p", errno)
        };
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        elf[18] = 0x16;
        assert_eq!(
            says(b"#! /bin/bash -e\n", Errno::ENOENT).unwrap(),
            "its interpreter \"/bin/bash\" is not in the container"
        );
        assert!(says(b"#!/bin/sh\r\n", Errno::ENOENT).unwrap().contains("CRLF"));
        assert_eq!(says(b"#!/bin/sh\n", Errno::ENOENT), None);
        assert!(says(&elf, Errno::ENOEXEC).unwrap().starts_with("it is a program for s390x, and this machine is "));
        assert_eq!(says(b"", Errno::ENOEXEC).unwrap(), "it is empty");
        assert!(says(b"echo hello\n", Errno::ENOEXEC).unwrap().ends_with("begin with #!"));
        assert_eq!(execve(root.path(), "/no", Errno::ENOENT), None);
        assert_eq!(execve(root.path(), "/bin", Errno::EACCES), None);
    }

    #[test]
    fn a_missing_dynamic_loader_is_named() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let Some(loader) = Elf::read(&own[..4096]).unwrap().interpreter else { return };
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("p"), &own[..4096]).unwrap();
        let want = format!("its dynamic loader {loader:?} is not in the container");
        assert_eq!(execve(root.path(), "/p", Errno::ENOENT).unwrap(), want);
    }

    #[test]
    fn what_is_no_file_is_not_opened() {
        let root = tempfile::tempdir().unwrap();
        // To open it would wait for a writer.
        nix::unistd::mkfifo(&root.path().join("p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(execve(root.path(), "/p", Errno::ENOENT), None);
        std::os::unix::fs::symlink("/p", root.path().join("link")).unwrap();
        assert_eq!(execve(root.path(), "/link", Errno::ENOEXEC), None);
    }

    #[test]
    fn a_broken_head_is_no_panic() {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        for length in 0..200 {
            head.resize(7 + length, 0xff);
            let _ = Elf::read(&head);
        }
    }
}
