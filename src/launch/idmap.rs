//! Mounts with ids mapped (mount_setattr(2), MOUNT_ATTR_IDMAP): prepared by the parent, which may do it for any mount.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::{Process, write_proc};
use crate::child::report;
use crate::sys::clone::{self, Side};
use crate::sys::mount::{MountAttr, attr, setattr};
use crate::sys::process as sys;
use crate::{Error, Result};

/// A user namespace with these maps (lines of `/proc/<pid>/uid_map`), held by nothing but its descriptor.
pub fn user_namespace(uid_map: &str, gid_map: &str) -> Result<OwnedFd> {
    let fail = |errno| Error::sys("make a user namespace for an idmapped mount", errno);
    let (wait, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
    let process = match clone::clone3(libc::CLONE_NEWUSER as u64, None).map_err(fail)? {
        Side::Child => {
            drop(end);
            let _ = report::wait(wait.as_fd());
            sys::exit_now(0)
        }
        Side::Parent(pid, pidfd) => Process { pid, pidfd },
    };
    let made = write_proc(process.pid, "uid_map", uid_map)
        .and_then(|()| write_proc(process.pid, "gid_map", gid_map))
        .and_then(|()| {
            let path = format!("/proc/{}/ns/user", process.pid);
            nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(fail)
        });
    drop(end);
    process.discard();
    made
}

/// Maps the ids of the detached mount `mount`, and of everything below it when `recursive`.
pub fn apply(mount: &OwnedFd, namespace: &OwnedFd, recursive: bool) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    let change = MountAttr { set: attr::IDMAP, userns_fd: namespace.as_raw_fd() as u64, ..MountAttr::default() };
    setattr(mount.as_fd(), recursive, &change)
}

/// Why it may have failed.
pub fn hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::EINVAL => Some("its file system does not support idmapped mounts"),
        Errno::EPERM => Some("idmapped mounts need CAP_SYS_ADMIN in the file system's user namespace"),
        _ => None,
    }
}
