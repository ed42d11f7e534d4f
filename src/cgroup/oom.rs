//! Watches a cgroup for the kernel's OOM killer without inotify: an eventfd on v1, EPOLLPRI of memory.events on v2.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Cgroup, stats};

/// A watch. `fd()` becomes readable (v1), or has priority data (v2), when [`Cgroup::oom_kills`] is worth another look.
#[derive(Debug)]
pub struct OomWatch {
    fd: OwnedFd,
    v2: bool,
    /// memory.oom_control: the notification ends with this descriptor.
    _control: Option<OwnedFd>,
}

impl OomWatch {
    /// Watches `cgroup`; None where it has no memory controller.
    pub fn new(cgroup: &Cgroup) -> nix::Result<Option<OomWatch>> {
        let open = |controller: &str, name: &str, flags| match cgroup.controller(controller) {
            Some(dir) => match dir.open_file(name, flags) {
                Err(Errno::ENOENT) => Ok(None),
                other => other.map(Some),
            },
            None => Ok(None),
        };
        if cgroup.is_v2() {
            let fd = open("", "memory.events", OFlag::O_RDONLY)?;
            return Ok(fd.map(|fd| OomWatch { fd, v2: true, _control: None }));
        }
        let Some(control) = open("memory", "memory.oom_control", OFlag::O_RDONLY)? else { return Ok(None) };
        let Some(listen) = open("memory", "cgroup.event_control", OFlag::O_WRONLY)? else { return Ok(None) };
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let line = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
        nix::unistd::write(&listen, line.as_bytes())?;
        Ok(Some(OomWatch { fd: OwnedFd::from(event), v2: false, _control: Some(control) }))
    }

    /// The descriptor to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// True when the descriptor is to be waited for with POLLPRI, not POLLIN.
    pub fn by_priority(&self) -> bool {
        self.v2
    }

    /// Takes note of what has happened: the descriptor is quiet again until the next time. True when the kernel is short of
    /// memory and is about to kill: what it kills it counts a little later.
    pub fn clear(&self) -> bool {
        let mut buf = [0; 512];
        if !self.v2 {
            let _ = nix::unistd::read(&self.fd, &mut buf[..8]);
            return true;
        }
        let n = nix::sys::uio::pread(&self.fd, &mut buf, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&buf[..n]);
        stats::value(&text, "oom") > stats::value(&text, "oom_kill")
    }
}
