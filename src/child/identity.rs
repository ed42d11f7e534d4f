//! From a root in the container to the user that the spec names: labels, capabilities, ids, working directory, program.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, SFlag, fstat, stat};
use nix::unistd::{AccessFlags, faccessat};

use super::report::{At, Failure, Record, Report, Step};
use crate::plan::capabilities::CapPlan;
use crate::plan::process::Process;
use crate::plan::seccomp::NEW_LISTENER;
use crate::sys::process::{self as sys, CapSets, Execve, SockFilter};
use crate::sys::{mount, path};

/// A compiled seccomp filter: program and flags.
pub type Filter<'a> = Option<(&'a [SockFilter], u32)>;

const SYS_ADMIN: u64 = 1 << 21;

/// True when the filter asks an agent: it is then installed early, so that the parent can hand the listener over.
pub fn notifies(filter: Filter<'_>) -> bool {
    filter.is_some_and(|(_, flags)| flags & NEW_LISTENER != 0)
}

/// What is to be done while the process is still the runtime's: enters its cgroup, leaves the caller's processors, and
/// sets its score while it may still lower it. `lenient`: what is not allowed is no failure.
pub fn settle(doors: &[BorrowedFd<'_>], score: Option<i32>, lenient: bool) -> Result<(), Failure> {
    let allowed = |done: nix::Result<usize>| match done {
        Err(Errno::EACCES | Errno::EPERM) if lenient => Ok(()),
        other => other.map(drop),
    };
    for (at, door) in doors.iter().enumerate() {
        allowed(nix::unistd::write(door, b"0")).at_item(Step::Cgroup, at)?;
    }
    if let Some(score) = score {
        let file = nix::fcntl::open(c"/proc/self/oom_score_adj", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        allowed(file.and_then(|file| nix::unistd::write(&file, score.to_string().as_bytes()))).at(Step::OomScore)?;
    }
    Ok(())
}

/// Becomes root of the user namespace that this process is in, or where no id is mapped to root the user to be: the rights
/// come with the namespace.
pub fn become_namespace_root(plan: &Process) -> Result<(), Failure> {
    // setgroups(2) may be forbidden here, and nobody has groups that matter yet.
    let _ = sys::setgroups(&[]);
    let root_or = |set: fn(u32) -> nix::Result<()>, id: u32| match set(0) {
        Err(Errno::EINVAL) => set(id),
        other => other,
    };
    root_or(sys::setgid, plan.gid).and_then(|()| root_or(sys::setuid, plan.uid)).at(Step::NamespaceRoot)
}

/// What is different about some processes.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Its limits are set by itself, as late as it still may raise them; otherwise its parent does it.
    pub own_limits: bool,
    /// Its parent is an ordinary user, who may not look into an undumpable process: not take a listener from it, nor enter
    /// its namespaces before it runs a program.
    pub dumpable: bool,
}

/// Becomes the user. Afterwards nothing is left to do but the gate, the filter when no_new_privs is set, and the execve that
/// it returns.
pub fn become_user(
    plan: &Process,
    filter: Filter<'_>,
    in_user_namespace: bool,
    manner: Manner,
    report: &Report,
) -> Result<Execve, Failure> {
    scheduling(plan)?;
    labels(plan)?;
    let home = plan.find_home.then(|| home(plan.uid));
    if plan.no_new_privs {
        sys::set_no_new_privs().at(Step::NoNewPrivs)?;
    }
    nix::sys::stat::umask(Mode::from_bits_truncate(plan.umask));
    let early = chdir(&plan.cwd);
    if let Some(caps) = &plan.capabilities {
        for cap in 0..64 {
            if caps.bounding & (1 << cap) != 0 {
                continue;
            }
            match sys::drop_bounding(cap) {
                // Past the last capability of this kernel.
                Err(Errno::EINVAL) => break,
                other => other.at_item(Step::Bounding, cap.into())?,
            }
        }
    }
    own_stdio(plan.uid)?;
    if manner.own_limits {
        for (at, (resource, soft, hard)) in plan.rlimits.iter().enumerate() {
            sys::prlimit(0, *resource, *soft, *hard).at_item(Step::Rlimit, at)?;
        }
    }
    sys::keep_caps(true).at(Step::Capabilities)?;
    match sys::setgroups(&plan.groups) {
        // A user namespace may forbid setgroups(2); having nothing to set is then no failure.
        Err(Errno::EPERM) if plan.groups.is_empty() && in_user_namespace => {}
        other => other.at(Step::Groups)?,
    }
    sys::setgid(plan.gid).at(Step::Gid)?;
    sys::setuid(plan.uid).at(Step::Uid)?;
    let last = match &plan.capabilities {
        Some(caps) => Some(granted(caps)?),
        None if plan.uid != 0 => Some(CapSets::default()),
        None => None,
    };
    // Without no_new_privs the kernel wants this one for a filter, and the filter is to forbid nothing of what follows.
    let early_filter = filter.is_some() && (!plan.no_new_privs || notifies(filter));
    let loan =
        if early_filter && !plan.no_new_privs { sys::permitted().at(Step::Capabilities)? & SYS_ADMIN } else { 0 };
    if let Some(sets) = last {
        let sets = CapSets { effective: sets.effective | loan, permitted: sets.permitted | loan, ..sets };
        sys::capset(sets).at(Step::Capabilities)?;
    }
    sys::keep_caps(false).at(Step::Capabilities)?;
    if let (Some(caps), Some(sets)) = (&plan.capabilities, last) {
        raise_ambient(sets, caps.ambient)?;
    }
    if let Err(errno) = early {
        // Only the user may be able to enter it (a home on NFS).
        if errno != Errno::EACCES {
            return Err(Failure::new(Step::Chdir, 0, errno));
        }
        chdir(&plan.cwd).at(Step::Chdir)?;
    }
    cwd_is_inside()?;
    let program = if plan.pause.is_some() { CString::default() } else { find_program(plan)? };
    let mut env = plan.env.clone();
    home.into_iter().for_each(|home| env.push(home));
    let execve = Execve::new(program, plan.argv.clone(), env);
    if manner.dumpable {
        // The last change of ids is behind, and no filter forbids it yet. What the caller's environment holds is not for the
        // container; the program has its own.
        sys::forget_environment();
        sys::set_dumpable(true).at(Step::Capabilities)?;
    }
    if early_filter {
        install(filter, report)?;
    }
    if let Some(sets) = last.filter(|sets| loan & !(sets.effective & sets.permitted) != 0) {
        sys::capset(sets).at(Step::Capabilities)?;
    }
    Ok(execve)
}

/// Installs the filter, if there is one.
pub fn install(filter: Filter<'_>, report: &Report) -> Result<(), Failure> {
    let Some((program, flags)) = filter else { return Ok(()) };
    if let Some(listener) = sys::seccomp_filter(program, flags).at(Step::Seccomp)? {
        report.send(&Record::Listener(listener.as_raw_fd())).at(Step::Parent)?;
        report.wait().at(Step::Parent)?;
    }
    Ok(())
}

fn scheduling(plan: &Process) -> Result<(), Failure> {
    if let Some(attr) = &plan.scheduler {
        sys::set_scheduler(attr).at(Step::Scheduler)?;
    }
    if let Some((class, priority)) = plan.io_priority {
        sys::set_io_priority(class, priority).at(Step::IoPriority)?;
    }
    if let Some(domain) = plan.personality {
        sys::set_personality(domain).at(Step::Personality)?;
    }
    if let Some(policy) = &plan.memory_policy {
        sys::set_mempolicy(policy.mode, &policy.nodes).at(Step::MemoryPolicy)?;
    }
    Ok(())
}

/// What this process does not hold itself cannot be granted, and the spec makes that no failure.
fn granted(caps: &CapPlan) -> Result<CapSets, Failure> {
    let held = sys::permitted().at(Step::Capabilities)?;
    Ok(CapSets {
        effective: caps.effective & caps.permitted & held,
        permitted: caps.permitted & held,
        inheritable: caps.inheritable & held,
    })
}

/// Only what is both permitted and inheritable can be ambient (capabilities(7)); the rest is left out.
fn raise_ambient(sets: CapSets, ambient: u64) -> Result<(), Failure> {
    sys::clear_ambient().at(Step::Capabilities)?;
    let ambient = ambient & sets.permitted & sets.inheritable;
    (0..64u8).filter(|cap| ambient & (1 << cap) != 0).try_for_each(|cap| sys::raise_ambient(cap).at(Step::Capabilities))
}

/// The user of the process may open its own streams again by /dev/stdout; /dev/null is everybody's.
fn own_stdio(uid: u32) -> Result<(), Failure> {
    for number in 0..3 {
        let stream = sys::standard_stream(number);
        let Ok(stat) = fstat(stream) else { continue };
        let null = stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == libc::makedev(1, 3);
        if stat.st_uid == uid || null {
            continue;
        }
        match nix::unistd::fchown(stream, Some(uid.into()), None) {
            // A stream of the host that is not ours to give away: unmapped owner, read-only or foreign file system.
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS | Errno::ENOSYS) => {}
            Err(errno) => return Err(Failure::new(Step::StdioOwner, number as usize, errno)),
        }
    }
    Ok(())
}

fn labels(plan: &Process) -> Result<(), Failure> {
    if plan.apparmor.is_none() && plan.selinux.is_none() {
        return Ok(());
    }
    let proc = procfs().at(Step::Procfs)?;
    if let Some(profile) = &plan.apparmor {
        let text = [b"exec ", profile.as_bytes()].concat();
        let file = match write_below(proc.as_fd(), c"thread-self/attr/apparmor/exec", &text) {
            Err(Errno::ENOENT) => write_below(proc.as_fd(), c"thread-self/attr/exec", &text),
            other => other,
        };
        file.at(Step::AppArmor)?;
    }
    if let Some(label) = &plan.selinux {
        write_below(proc.as_fd(), c"thread-self/attr/exec", label.as_bytes()).at(Step::SeLinux)?;
    }
    Ok(())
}

/// A procfs of our own that nothing of the container can stand in for; where it cannot be made (a user namespace
/// without its own pid namespace), the one at /proc if it is the root of a genuine procfs.
pub fn procfs() -> nix::Result<std::os::fd::OwnedFd> {
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    const PROC_ROOT_INO: u64 = 1;
    match mount::new_mount(c"proc", &[], 0) {
        Err(Errno::EPERM | Errno::ENOSYS) => {
            let root = path::open_dir(c"/")?;
            let proc = path::open_no_symlinks(root.as_fd(), c"proc", OFlag::O_PATH | OFlag::O_DIRECTORY)?;
            let genuine = path::magic(proc.as_fd())? == PROC_SUPER_MAGIC && fstat(&proc)?.st_ino == PROC_ROOT_INO;
            if genuine { Ok(proc) } else { Err(Errno::ENODEV) }
        }
        other => other,
    }
}

/// Writes `text` to the existing file `name` beneath `proc`, in one write.
pub fn write_below(proc: BorrowedFd<'_>, name: &CStr, text: &[u8]) -> nix::Result<()> {
    let file = path::open_beneath(proc, name, OFlag::O_WRONLY)?;
    match nix::unistd::write(&file, text)? {
        n if n == text.len() => Ok(()),
        _ => Err(Errno::EIO),
    }
}

fn chdir(cwd: &CStr) -> nix::Result<()> {
    nix::unistd::chdir(cwd)
}

/// A working directory outside of the root (through an inherited descriptor, or one that was deleted) has no path.
fn cwd_is_inside() -> Result<(), Failure> {
    match nix::unistd::getcwd() {
        Ok(cwd) if cwd.is_absolute() => Ok(()),
        Ok(_) => Err(Failure::new(Step::CwdOutside, 0, Errno::ENOENT)),
        Err(errno) => Err(Failure::new(Step::CwdOutside, 0, errno)),
    }
}

/// Looks the program up as execvp(3) would, as the user that will run it, so that a missing one fails the create.
fn find_program(plan: &Process) -> Result<CString, Failure> {
    let name = &plan.argv.as_slice()[0];
    if name.to_bytes().contains(&b'/') {
        return executable(name).map(|()| name.clone()).at(Step::Program);
    }
    let mut cause = Errno::ENOENT;
    for dir in plan.path.iter().flatten() {
        let Ok(path) = CString::new([dir.to_bytes(), b"/", name.to_bytes()].concat()) else { continue };
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err(errno @ (Errno::EACCES | Errno::EISDIR)) => cause = errno,
            Err(_) => {}
        }
    }
    Err(Failure::new(Step::Program, 1, if cause == Errno::EISDIR { Errno::ENOENT } else { cause }))
}

fn executable(path: &CStr) -> nix::Result<()> {
    let stat = stat(path)?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    // By the effective rights, as execve(2) goes: for the real ones a user other than root has no capabilities. A filter that
    // the runtime itself runs under may know nothing of this call.
    match faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        Err(Errno::EPERM | Errno::ENOSYS) if stat.st_mode & 0o111 != 0 => Ok(()),
        other => other,
    }
}

/// The home of `uid` in the container's `/etc/passwd`; `/` when it does not tell. The file is the image's: only a
/// regular one is read, and only so far.
fn home(uid: u32) -> CString {
    const LIMIT: usize = 1 << 20;
    let read = || -> nix::Result<Vec<u8>> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let root = path::open_dir(c"/")?;
        let file = path::open_in_root(root.as_fd(), c"etc/passwd", flags)?;
        if path::kind(file.as_fd())?.0 != SFlag::S_IFREG {
            return Err(Errno::EINVAL);
        }
        let mut text = Vec::new();
        let mut chunk = [0u8; 4096];
        while text.len() < LIMIT {
            match nix::unistd::read(&file, &mut chunk)? {
                0 => break,
                n => text.extend_from_slice(&chunk[..n]),
            }
        }
        Ok(text)
    };
    let home = read().ok().and_then(|text| home_in(&text, uid)).unwrap_or_else(|| b"/".to_vec());
    CString::new([&b"HOME="[..], &home].concat()).unwrap_or_else(|_| c"HOME=/".to_owned())
}

fn home_in(passwd: &[u8], uid: u32) -> Option<Vec<u8>> {
    let uid = uid.to_string();
    let fields = |line: &'_ [u8]| line.split(|b| *b == b':').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let line = passwd.split(|b| *b == b'\n').map(fields).find(|f| f.get(2).is_some_and(|id| id == uid.as_bytes()))?;
    line.into_iter().nth(5).filter(|home| !home.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_the_sixth_field_of_the_users_line() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken\nu:x:1000:1000::/home/u:/bin/sh\nn:x:7:7::";
        assert_eq!(home_in(passwd, 1000).unwrap(), b"/home/u");
        assert_eq!(home_in(passwd, 0).unwrap(), b"/root");
        assert_eq!(home_in(passwd, 7), None);
        assert_eq!(home_in(passwd, 1), None);
    }
}
