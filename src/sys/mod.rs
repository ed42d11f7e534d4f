//! The only room with unsafe code: thin typed system calls, fds in, fds out, `nix::Result`. No policy lives here.
#![allow(unsafe_code)]

pub mod bpf;
pub mod clone;
#[cfg(target_arch = "x86_64")]
mod entry;
pub mod exe;
pub mod mount;
pub mod netlink;
pub mod path;
pub mod pause;
pub mod process;
pub mod program;
pub mod tty;

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Turns the result of a raw system call into the fd that it made.
fn owned(ret: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(ret)?;
    // SAFETY: the kernel has just returned this descriptor to us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
