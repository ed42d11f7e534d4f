//! Copies what a tmpfs is about to cover into it (mount option `tmpcopyup`), by descriptors alone.

use std::os::fd::{AsFd, BorrowedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat, mknodat};

use crate::sys::path;

/// Deeper trees are refused, so that an image cannot use up the stack.
const MAX_DEPTH: usize = 128;

/// Copies the content of the directory `from`, and its owner and mode, to the directory `to`.
pub fn tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> nix::Result<()> {
    let from = reopen(from)?;
    path::chown(to, Some(fstat(&from)?.st_uid), Some(fstat(&from)?.st_gid))?;
    content(from, to, MAX_DEPTH)
}

fn reopen(dir: BorrowedFd<'_>) -> nix::Result<std::os::fd::OwnedFd> {
    openat(dir, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

fn content(from: std::os::fd::OwnedFd, to: BorrowedFd<'_>, depth: usize) -> nix::Result<()> {
    if depth == 0 {
        return Err(Errno::ELOOP);
    }
    let mut entries = Dir::from_fd(reopen(from.as_fd())?)?;
    for entry in entries.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = fstatat(&from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        let kind = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT);
        match kind {
            SFlag::S_IFDIR => {
                mkdirat(to, name, mode)?;
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let (below, copy) =
                    (openat(&from, name, flags, Mode::empty())?, openat(to, name, flags, Mode::empty())?);
                content(below, copy.as_fd(), depth - 1)?;
            }
            SFlag::S_IFREG => file(from.as_fd(), to, name)?,
            SFlag::S_IFLNK => nix::unistd::symlinkat(&*nix::fcntl::readlinkat(&from, name)?, to, name)?,
            _ => mknodat(to, name, kind, mode, stat.st_rdev)?,
        }
        own(to, name, &stat, kind)?;
    }
    Ok(())
}

fn own(to: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &FileStat, kind: SFlag) -> nix::Result<()> {
    let (uid, gid) = (Some(stat.st_uid.into()), Some(stat.st_gid.into()));
    nix::unistd::fchownat(to, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind == SFlag::S_IFLNK {
        return Ok(());
    }
    // A change of the owner takes the set-id bits away.
    fchmodat(to, name, Mode::from_bits_truncate(stat.st_mode & 0o7777), FchmodatFlags::FollowSymlink)
}

fn file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &std::ffi::CStr) -> nix::Result<()> {
    let source = openat(from, name, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let copy = openat(to, name, flags, Mode::from_bits_truncate(0o600))?;
    loop {
        match nix::sys::sendfile::sendfile(&copy, &source, None, 1 << 20) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_tree_is_copied_with_owners_modes_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(from.path().join("d")).unwrap();
        std::fs::write(from.path().join("d/f"), "content").unwrap();
        std::fs::set_permissions(from.path().join("d/f"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        std::os::unix::fs::symlink("/nowhere", from.path().join("l")).unwrap();
        std::fs::set_permissions(from.path().join("d"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        let open = |path: &std::path::Path| std::fs::File::open(path).unwrap();
        tree(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        assert_eq!(std::fs::read_to_string(to.path().join("d/f")).unwrap(), "content");
        assert_eq!(std::fs::metadata(to.path().join("d/f")).unwrap().mode() & 0o7777, 0o4751);
        assert_eq!(std::fs::metadata(to.path().join("d")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(std::fs::read_link(to.path().join("l")).unwrap(), std::path::Path::new("/nowhere"));
    }
}
