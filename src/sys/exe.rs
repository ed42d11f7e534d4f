//! Keeps containers from writing to our own program through `/proc/<pid>/exe` (CVE-2019-5736).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::mount::{MountAttr, attr, clone_tree, setattr};
use super::process::CStrings;

/// Runs this program again from a detached read-only mount of itself, whose pages are shared with everybody else's.
/// Returns at once when it already runs from a read-only mount, as it does where the program's entry has seen to it; an
/// error leaves everything as it is.
pub fn run_read_only() -> nix::Result<()> {
    let exe = open(c"/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    if fstatvfs(&exe)?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let copy = clone_tree(exe.as_fd(), c"", false)?;
    setattr(copy.as_fd(), false, &MountAttr { set: attr::RDONLY, ..MountAttr::default() })?;
    let argv = std::env::args_os().map(|word| CString::new(word.into_vec()).map_err(|_| Errno::EINVAL));
    let argv = CStrings::new(argv.collect::<nix::Result<_>>()?);
    let variables = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        CString::new(name.into_vec()).map_err(|_| Errno::EINVAL)
    });
    let envp = CStrings::new(variables.collect::<nix::Result<_>>()?);
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
