//! Where a process hangs: the system call that it is in, for an error.

use crate::{Error, Kind};

/// System calls that may take long.
const CALLS: &[(libc::c_long, &str)] = &[
    (libc::SYS_read, "read"),
    (libc::SYS_write, "write"),
    (libc::SYS_close, "close"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_newfstatat, "newfstatat"),
    (libc::SYS_statx, "statx"),
    (libc::SYS_getdents64, "getdents64"),
    (libc::SYS_readlinkat, "readlinkat"),
    (libc::SYS_faccessat, "faccessat"),
    (libc::SYS_faccessat2, "faccessat2"),
    (libc::SYS_statfs, "statfs"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_chdir, "chdir"),
    (libc::SYS_execve, "execve"),
    (libc::SYS_execveat, "execveat"),
    (libc::SYS_exit_group, "exit_group"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_umount2, "umount2"),
    (libc::SYS_pivot_root, "pivot_root"),
    (libc::SYS_open_tree, "open_tree"),
    (libc::SYS_move_mount, "move_mount"),
    (libc::SYS_fsopen, "fsopen"),
    (libc::SYS_fsconfig, "fsconfig"),
    (libc::SYS_fsmount, "fsmount"),
    (libc::SYS_setns, "setns"),
    (libc::SYS_unshare, "unshare"),
    (libc::SYS_clone, "clone"),
    (libc::SYS_clone3, "clone3"),
    (libc::SYS_wait4, "wait4"),
    (libc::SYS_waitid, "waitid"),
    (libc::SYS_ppoll, "ppoll"),
    (libc::SYS_nanosleep, "nanosleep"),
    (libc::SYS_clock_nanosleep, "clock_nanosleep"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_recvfrom, "recvfrom"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_splice, "splice"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, "open"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_stat, "stat"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lstat, "lstat"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_access, "access"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "rmdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlink, "readlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, "poll"),
];

/// The error of a process that takes too long: `what` it does, and where it hangs.
pub fn late(pid: i32, what: &str) -> Error {
    Error::new(Kind::Timeout, format!("{what}{}", place(pid)))
}

/// What [`describe`] says, to go on with after what is said of a process; nothing, when there is nothing to say.
pub fn place(pid: i32) -> String {
    describe(pid).map_or(String::new(), |place| format!(", {place}"))
}

/// E.g. `hangs in umount2`; of a process that waits for a child of its own, `"cat" hangs in openat`. None of one that runs,
/// or has ended.
fn describe(pid: i32) -> Option<String> {
    let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let child = child.split_whitespace().next().and_then(|pid| pid.parse().ok());
    if let Some((child, place)) = child.and_then(|child| Some((child, call(child)?))) {
        let name = std::fs::read(format!("/proc/{child}/comm")).unwrap_or_default();
        return Some(format!("{:?} hangs in {place}", String::from_utf8_lossy(&name).trim_end()));
    }
    call(pid).map(|place| format!("hangs in {place}"))
}

/// The system call that it is in, of `/proc/PID/syscall` (proc_pid_syscall(5)).
fn call(pid: i32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    // -1: it is in none, as one that has a page read from a disk.
    let number = text.split_whitespace().next()?.parse::<libc::c_long>().ok()?;
    let known = CALLS.iter().find(|(one, _)| *one == number).map(|(_, name)| (*name).to_string());
    Some(known.unwrap_or_else(|| if number < 0 { "a page fault".into() } else { format!("system call {number}") }))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_waits_is_found_in_its_system_call() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        while describe(pid).as_deref() != Some("hangs in read") {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(describe(pid), None);
    }
}
