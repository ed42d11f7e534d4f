//! Keeps containers from writing to our own program through `/proc/<pid>/exe` (CVE-2019-5736).

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::mount::{MountAttr, attr, clone_tree, setattr};
use super::process::CStrings;

/// Runs this program again from a detached read-only mount of itself, whose pages are shared with everybody else's.
/// Returns at once when it already runs from a read-only mount; an error leaves everything as it is.
pub fn run_read_only() -> nix::Result<()> {
    run_read_only_as(std::env::args_os().collect(), &[])
}

/// The same with other arguments, and with these variables in the environment.
pub fn run_read_only_as(args: Vec<OsString>, variables: &[(&str, &str)]) -> nix::Result<()> {
    let exe = open(c"/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    if fstatvfs(&exe)?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let copy = clone_tree(exe.as_fd(), c"", false)?;
    setattr(copy.as_fd(), false, &MountAttr { set: attr::RDONLY, ..MountAttr::default() })?;
    let strings = |list: Vec<OsString>| -> nix::Result<CStrings> {
        let list = list.into_iter().map(|s| CString::new(s.into_vec()).map_err(|_| Errno::EINVAL));
        Ok(CStrings::new(list.collect::<nix::Result<_>>()?))
    };
    let argv = strings(args)?;
    let line = |(mut name, value): (OsString, OsString)| {
        name.push("=");
        name.push(value);
        name
    };
    let kept = std::env::vars_os().filter(|(name, _)| variables.iter().all(|(other, _)| name != other));
    let added = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let envp = strings(kept.chain(added).map(line).collect())?;
    let (argv_pointers, envp_pointers) = (argv.pointers(), envp.pointers());
    // SAFETY: both vectors are NULL-terminated and point into `argv` and `envp`'s strings, which outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            copy.as_raw_fd(),
            c"".as_ptr(),
            argv_pointers.as_ptr(),
            envp_pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(Errno::last())
}
