//! clone3(2) of a one-threaded process.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sched::CloneFlags;

/// CLONE_NEWTIME of linux/sched.h; shares its bit with CSIGNAL, so it goes through clone3 and unshare alone.
pub const CLONE_NEWTIME: u64 = 0x80;
/// CLONE_INTO_CGROUP of linux/sched.h.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a clone this is.
#[derive(Debug)]
pub enum Side {
    /// In the child.
    Child,
    /// In the parent, with the child's pid and pidfd.
    Parent(i32, OwnedFd),
}

/// clone3(2) with CLONE_PIDFD and SIGCHLD on exit. Neither memory nor files are shared. `into` is a cgroup v2 directory.
///
/// # Panics
/// When the process has more than one thread: the child would inherit locks that nobody opens.
pub fn clone3(flags: u64, into: Option<BorrowedFd<'_>>) -> nix::Result<Side> {
    assert_eq!(threads(), 1, "clone needs a process with one thread");
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain data for which all zeroes is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    if flags & libc::CLONE_PARENT as u64 == 0 {
        args.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(fd) = into {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child runs on its own copy of this stack; the process has one thread, so no lock
    // of another thread is copied in a held state. `args` and `pidfd` outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match Errno::result(ret)? {
        0 => Ok(Side::Child),
        // SAFETY: CLONE_PIDFD has stored a descriptor that is ours.
        pid => Ok(Side::Parent(pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// Threads of this process; 1 when /proc is not there to tell.
pub fn threads() -> u64 {
    fs::metadata("/proc/self/task").map(|m| m.nlink().saturating_sub(2)).unwrap_or(1)
}

/// unshare(2), CLONE_NEWTIME included.
pub fn unshare(flags: u64) -> nix::Result<()> {
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::syscall(libc::SYS_unshare, flags) }).map(drop)
}

/// The clocks of the time namespace that children of this process are born into: `CLOCK SECONDS NANOSECONDS` a line
/// (time_namespaces(7)).
pub fn set_time_offsets(offsets: &str) -> nix::Result<()> {
    let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(c"/proc/self/timens_offsets", flags, nix::sys::stat::Mode::empty())?;
    nix::unistd::write(&file, offsets.as_bytes()).map(drop)
}

/// setns(2) with any flag, CLONE_NEWTIME included; `fd` is a namespace file or a pidfd.
pub fn setns(fd: BorrowedFd<'_>, flags: u64) -> nix::Result<()> {
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::setns(fd.as_raw_fd(), flags as libc::c_int) }).map(drop)
}

/// NS_GET_USERNS of ioctl_nsfs(2): the user namespace that `namespace` belongs to.
pub fn owner(namespace: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    const NS_GET_USERNS: libc::c_ulong = 0xb701;
    // SAFETY: takes no argument.
    super::owned(unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS as _) }.into())
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    super::owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// pidfd_send_signal(2); signal 0 tests for life.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    let ret =
        // SAFETY: the null siginfo asks the kernel to fill it in.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    Errno::result(ret).map(drop)
}

/// pidfd_getfd(2): a duplicate of descriptor `number` of another process.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    super::owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// Flags of all namespaces but time, as clone3 takes them.
pub const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWCGROUP)
    .union(CloneFlags::CLONE_NEWUSER);
