//! Lookups below a root that no symlink can leave: openat2(2) with RESOLVE_IN_ROOT, directories made one by one on fds.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};

/// Opens a directory of this process's own view as a path fd.
pub fn open_dir(path: &CStr) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Opens `path` inside `root`: absolute symlinks and `..` stay inside; magic links are refused.
pub fn open_in_root(root: BorrowedFd<'_>, path: &CStr, flags: OFlag) -> nix::Result<OwnedFd> {
    resolve(root, path, flags, ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

/// Opens `path` inside `root` on the mount of `root` itself: EXDEV where another one is on the way.
pub fn open_on_mount(root: BorrowedFd<'_>, path: &CStr, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    resolve(root, path, flags, how)
}

/// Opens `path` inside `root` if no component of it is a symlink.
pub fn open_no_symlinks(root: BorrowedFd<'_>, path: &CStr, flags: OFlag) -> nix::Result<OwnedFd> {
    resolve(root, path, flags, ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS)
}

/// Opens `path` beneath `dir` without leaving its mount: for writes to a procfs that we have mounted ourselves, whose
/// own plain symlinks (`thread-self`) are followed.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &CStr, flags: OFlag) -> nix::Result<OwnedFd> {
    resolve(
        dir,
        path,
        flags,
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    )
}

fn resolve(dir: BorrowedFd<'_>, path: &CStr, flags: OFlag, how: ResolveFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(how);
    // A rename anywhere on the machine makes the kernel give up with EAGAIN when it met "..".
    for _ in 0..128 {
        match openat2(dir, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// Opens the directory `path` inside `root`, making what is missing with `mode`: below a symlink that dangles, where it
/// points to.
pub fn mkdir_all(root: BorrowedFd<'_>, path: &CStr, mode: Mode) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match open_in_root(root, &path, flags) {
            Err(Errno::ENOENT) => {}
            other => return other,
        }
        match mkdir_missing(root, &path, mode)? {
            Made::Directory(dir) => return Ok(dir),
            Made::Elsewhere(real) => path = real,
        }
    }
    Err(Errno::ELOOP)
}

/// How many dangling symlinks are followed (path_resolution(7)).
const MAX_LINKS: usize = 40;

enum Made {
    Directory(OwnedFd),
    /// A dangling symlink stood in the way: the path without it.
    Elsewhere(CString),
}

/// The part that exists is resolved as one path, so that its symlinks keep their meaning, and only real directories are
/// made below it.
fn mkdir_missing(root: BorrowedFd<'_>, path: &CStr, mode: Mode) -> nix::Result<Made> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let bytes = path.to_bytes();
    let mut at = bytes.len();
    let (mut dir, rest) = loop {
        while at > 0 && bytes[at - 1] == b'/' {
            at -= 1;
        }
        while at > 0 && bytes[at - 1] != b'/' {
            at -= 1;
        }
        let head = if at == 0 { c".".to_owned() } else { CString::new(&bytes[..at]).map_err(|_| Errno::EINVAL)? };
        match open_in_root(root, &head, flags) {
            Err(Errno::ENOENT) if at > 0 => {}
            Ok(dir) => break (dir, &bytes[at..]),
            Err(errno) => return Err(errno),
        }
    };
    let mut done = at;
    for name in rest.split(|b| *b == b'/') {
        let here = done;
        done += name.len() + 1;
        if name.is_empty() || name == b"." {
            continue;
        }
        if name == b".." {
            return Err(Errno::EINVAL);
        }
        let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
        match mkdirat(dir.as_fd(), name.as_c_str(), mode) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                if let Some(target) = link(dir.as_fd(), &name)? {
                    let tail = bytes.get(done..).unwrap_or_default();
                    return without_link(&bytes[..here], &target, tail).map(Made::Elsewhere);
                }
            }
            Err(errno) => return Err(errno),
        }
        dir = nix::fcntl::openat(
            dir.as_fd(),
            name.as_c_str(),
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
    }
    Ok(Made::Directory(dir))
}

/// What the symlink `name` points to; None when it is none.
fn link(dir: BorrowedFd<'_>, name: &CStr) -> nix::Result<Option<Vec<u8>>> {
    use std::os::unix::ffi::OsStringExt;
    match nix::fcntl::readlinkat(dir, name) {
        Ok(target) => Ok(Some(target.into_vec())),
        Err(Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The path `head`/LINK/`tail` with the link replaced by its target.
fn without_link(head: &[u8], target: &[u8], tail: &[u8]) -> nix::Result<CString> {
    let head = if target.starts_with(b"/") { b"" } else { head };
    let path = [head, b"/", target, b"/", tail].concat();
    CString::new(path).map_err(|_| Errno::EINVAL)
}

/// Splits off the last component: `a/b/c` is (`a/b`, `c`). The parent of a single name is `.`.
pub fn split(path: &CStr) -> nix::Result<(CString, CString)> {
    let bytes = path.to_bytes();
    let end = bytes.iter().rposition(|b| *b != b'/').ok_or(Errno::EINVAL)? + 1;
    let start = bytes[..end].iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    let parent = if start == 0 { &b"."[..] } else { &bytes[..start] };
    let leaf = &bytes[start..end];
    if leaf == b".." || leaf == b"." {
        return Err(Errno::EINVAL);
    }
    Ok((CString::new(parent).map_err(|_| Errno::EINVAL)?, CString::new(leaf).map_err(|_| Errno::EINVAL)?))
}

/// Opens the file `path` inside `root` as a path fd, making an empty one (and its directories) when it is missing.
pub fn create_file(root: BorrowedFd<'_>, path: &CStr) -> nix::Result<OwnedFd> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match open_in_root(root, &path, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {}
            other => return other,
        }
        let (parent, leaf) = split(&path)?;
        let dir = mkdir_all(root, &parent, Mode::from_bits_truncate(0o755))?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        match nix::fcntl::openat(dir.as_fd(), leaf.as_c_str(), flags, Mode::from_bits_truncate(0o644)) {
            Ok(_) => {}
            Err(Errno::EEXIST) => {
                if let Some(target) = link(dir.as_fd(), &leaf)? {
                    // It dangles: what it points to is made, inside the root.
                    path = without_link(parent.to_bytes(), &target, b"")?;
                    while path.to_bytes().len() > 1 && path.to_bytes().ends_with(b"/") {
                        let bytes = path.to_bytes();
                        path = CString::new(&bytes[..bytes.len() - 1]).map_err(|_| Errno::EINVAL)?;
                    }
                    continue;
                }
            }
            Err(errno) => return Err(errno),
        }
        return open_in_root(dir.as_fd(), &leaf, OFlag::O_PATH | OFlag::O_NOFOLLOW);
    }
    Err(Errno::ELOOP)
}

/// Type and device number of what an fd refers to.
pub fn kind(fd: BorrowedFd<'_>) -> nix::Result<(SFlag, u64)> {
    let stat: FileStat = fstat(fd)?;
    Ok((SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT), stat.st_rdev))
}

/// fchownat(2) on the fd itself; `None` leaves an id as it is.
pub fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> nix::Result<()> {
    nix::unistd::fchownat(fd, c"", uid.map(Into::into), gid.map(Into::into), AtFlags::AT_EMPTY_PATH)
}

/// RESOLVE_CACHED of linux/openat2.h.
const RESOLVE_CACHED: u64 = 0x20;

/// True when `path` can be looked up from memory alone, and what is there lies on a block device: whoever uses it waits
/// for no server and no program of this machine. Asking waits for nobody either.
pub fn is_at_hand(path: &CStr) -> bool {
    device_at_hand(path).is_some_and(|device| device.0 != 0)
}

/// The same for what may be in memory, too: on the file system of /run.
pub fn is_at_hand_or_in_run(path: &CStr) -> bool {
    device_at_hand(path).is_some_and(|device| device.0 != 0 || Some(device) == device_at_hand(c"/run"))
}

fn device_at_hand(path: &CStr) -> Option<(u32, u32)> {
    let cached = ResolveFlag::from_bits_retain(RESOLVE_CACHED);
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(cached);
    let fd = openat2(nix::fcntl::AT_FDCWD, path, how).ok()?;
    // SAFETY: statx is plain data for which all zeroes is a valid value, and outlives the call.
    let mut buf: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // With an empty mask, a file system of a server or a program is not asked (statx(2)); the device is always told.
    // SAFETY: the path is a static empty string, `buf` a valid statx.
    let ret = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, 0, &raw mut buf) };
    (ret == 0).then_some((buf.stx_dev_major, buf.stx_dev_minor))
}

/// f_type of the file system that an fd is on (PROC_SUPER_MAGIC, ...).
pub fn magic(fd: BorrowedFd<'_>) -> nix::Result<i64> {
    // SAFETY: statfs is plain data for which all zeroes is a valid value, and outlives the call.
    let mut buf: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `buf` is a valid statfs.
    Errno::result(unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut buf) })?;
    Ok(buf.f_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_no_disk_is_not_on_one() {
        assert!(!is_at_hand(c"/proc"));
        assert!(!is_at_hand(c"/proc/no/such/path"));
    }
}
