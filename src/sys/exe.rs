//! Keeps containers from writing to our own program through `/proc/<pid>/exe` (CVE-2019-5736).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile;
use nix::sys::stat::{Mode, fstat};
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
    Err(run(copy.as_fd()))
}

/// The same for an ordinary user, who has no right to make mounts: a copy in memory that nobody can change. Returns at once
/// when this is one, or when the program on disk is root's alone.
pub fn run_sealed() -> nix::Result<()> {
    let exe = open(c"/proc/self/exe", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    let sealed = fcntl(&exe, FcntlArg::F_GET_SEALS).is_ok_and(|has| has & seals.bits() == seals.bits());
    let meta = fstat(&exe)?;
    if sealed || (meta.st_uid == 0 && meta.st_mode & 0o022 == 0) {
        return Ok(());
    }
    let copy = memfd_create(c"skiff", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut left = usize::try_from(meta.st_size).map_err(|_| Errno::EFBIG)?;
    while left > 0 {
        match sendfile(&copy, &exe, None, left)? {
            0 => return Err(Errno::EIO),
            sent => left -= sent,
        }
    }
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals))?;
    Err(run(copy.as_fd()))
}

/// Runs the program behind `program` with the arguments and the environment of this one. Returns the error when it cannot.
fn run(program: BorrowedFd<'_>) -> Errno {
    match vectors() {
        Ok((argv, envp)) => run_with(program, &argv, &envp),
        Err(errno) => errno,
    }
}

fn vectors() -> nix::Result<(CStrings, CStrings)> {
    let argv = std::env::args_os().map(|word| CString::new(word.into_vec()).map_err(|_| Errno::EINVAL));
    let argv = CStrings::new(argv.collect::<nix::Result<_>>()?);
    let variables = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        CString::new(name.into_vec()).map_err(|_| Errno::EINVAL)
    });
    Ok((argv, CStrings::new(variables.collect::<nix::Result<_>>()?)))
}

fn run_with(program: BorrowedFd<'_>, argv: &CStrings, envp: &CStrings) -> Errno {
    let (argv_pointers, envp_pointers) = (argv.pointers(), envp.pointers());
    // SAFETY: both vectors are NULL-terminated and point into `argv` and `envp`'s strings, which outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv_pointers.as_ptr(),
            envp_pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last()
}
