//! The mount API by file descriptors: fsopen(2), fsmount(2), open_tree(2), move_mount(2), mount_setattr(2), pivot_root(2).

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

/// MOUNT_ATTR_* of linux/mount.h.
pub mod attr {
    /// MOUNT_ATTR_RDONLY.
    pub const RDONLY: u64 = 0x1;
    /// MOUNT_ATTR_NOSUID.
    pub const NOSUID: u64 = 0x2;
    /// MOUNT_ATTR_NODEV.
    pub const NODEV: u64 = 0x4;
    /// MOUNT_ATTR_NOEXEC.
    pub const NOEXEC: u64 = 0x8;
    /// MOUNT_ATTR__ATIME: the mask of the access time setting.
    pub const ATIME: u64 = 0x70;
    /// MOUNT_ATTR_RELATIME: the access time setting of value zero.
    pub const RELATIME: u64 = 0;
    /// MOUNT_ATTR_NOATIME.
    pub const NOATIME: u64 = 0x10;
    /// MOUNT_ATTR_STRICTATIME.
    pub const STRICTATIME: u64 = 0x20;
    /// MOUNT_ATTR_NODIRATIME.
    pub const NODIRATIME: u64 = 0x80;
    /// MOUNT_ATTR_IDMAP.
    pub const IDMAP: u64 = 0x10_0000;
    /// MOUNT_ATTR_NOSYMFOLLOW.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// struct mount_attr of linux/mount.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MountAttr {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE or 0.
    pub propagation: u64,
    /// User namespace fd for MOUNT_ATTR_IDMAP.
    pub userns_fd: u64,
}

const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const AT_RECURSIVE: libc::c_uint = 0x8000;
const AT_EMPTY_PATH: libc::c_uint = libc::AT_EMPTY_PATH as libc::c_uint;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_SET_FD: libc::c_uint = 5;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;

/// A detached copy of the mount at `path` (of everything below it when `recursive`), looked up from `dir`.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> nix::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    super::owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches the mount `from` onto what `onto` refers to.
pub fn attach(from: BorrowedFd<'_>, onto: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let ret =
        // SAFETY: both paths are static empty strings.
        unsafe { libc::syscall(libc::SYS_move_mount, from.as_raw_fd(), c"".as_ptr(), onto.as_raw_fd(), c"".as_ptr(), flags) };
    Errno::result(ret).map(drop)
}

/// The MOUNT_ATTR_* of the mount that `fd` is on, as fstatvfs(3) tells them.
pub fn attributes(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    // SAFETY: statvfs is plain data for which all zeroes is a valid value, and outlives the call.
    let mut buf: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `buf` is a valid statvfs.
    Errno::result(unsafe { libc::fstatvfs(fd.as_raw_fd(), &raw mut buf) })?;
    let flags = buf.f_flag;
    // include/linux/statfs.h
    const NOSYMFOLLOW: u64 = 0x2000;
    let mut out = [
        (libc::ST_RDONLY, attr::RDONLY),
        (libc::ST_NOSUID, attr::NOSUID),
        (libc::ST_NODEV, attr::NODEV),
        (libc::ST_NOEXEC, attr::NOEXEC),
        (libc::ST_NODIRATIME, attr::NODIRATIME),
        (NOSYMFOLLOW, attr::NOSYMFOLLOW),
    ]
    .iter()
    .fold(0, |out, (flag, attribute)| if flags & flag != 0 { out | attribute } else { out });
    if flags & libc::ST_NOATIME != 0 {
        out |= attr::NOATIME;
    } else if flags & libc::ST_RELATIME == 0 {
        out |= attr::STRICTATIME;
    }
    Ok(out)
}

/// mount_setattr(2) on the mount that `fd` is the root of.
pub fn setattr(fd: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> nix::Result<()> {
    let flags = AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` is a valid mount_attr for the length of the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attr as *const MountAttr,
            size_of::<MountAttr>(),
        )
    };
    Errno::result(ret).map(drop)
}

/// A file system being configured: fsopen(2).
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// fsopen(2) of `fstype`.
    pub fn open(fstype: &CStr) -> nix::Result<FsContext> {
        // SAFETY: `fstype` is NUL-terminated and outlives the call.
        super::owned(unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), 1) }).map(FsContext)
    }

    /// Sets `key=value`, or the flag `key` when there is no value.
    pub fn set(&self, key: &CStr, value: Option<&CStr>) -> nix::Result<()> {
        let (cmd, value) = match value {
            Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
            None => (FSCONFIG_SET_FLAG, std::ptr::null()),
        };
        self.config(cmd, key.as_ptr(), value, 0)
    }

    /// Sets `key` to a descriptor.
    pub fn set_fd(&self, key: &CStr, fd: BorrowedFd<'_>) -> nix::Result<()> {
        self.config(FSCONFIG_SET_FD, key.as_ptr(), std::ptr::null(), fd.as_raw_fd())
    }

    /// Creates the superblock and a detached mount of it with `attrs` (MOUNT_ATTR_*).
    pub fn mount(self, attrs: u64) -> std::result::Result<OwnedFd, (Errno, FsContext)> {
        if let Err(errno) = self.config(FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null(), 0) {
            return Err((errno, self));
        }
        // SAFETY: takes no pointer.
        super::owned(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), 1, attrs as libc::c_uint) })
            .map_err(|errno| (errno, self))
    }

    /// What the file system says about its last error, if anything.
    pub fn message(&self) -> Option<String> {
        let mut buf = [0u8; 256];
        let n = nix::unistd::read(&self.0, &mut buf).ok()?;
        let text = String::from_utf8_lossy(&buf[..n]);
        Some(text.trim_end().trim_start_matches(['e', 'w', 'i']).trim_start().to_string())
    }

    fn config(
        &self,
        cmd: libc::c_uint,
        key: *const libc::c_char,
        value: *const libc::c_char,
        aux: libc::c_int,
    ) -> nix::Result<()> {
        // SAFETY: the callers pass NUL-terminated strings or null, as fsconfig(2) wants for `cmd`.
        let ret = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), cmd, key, value, aux) };
        Errno::result(ret).map(drop)
    }
}

/// A new detached mount of `fstype` with the given options and attributes.
pub fn new_mount(fstype: &CStr, options: &[(&CStr, Option<&CStr>)], attrs: u64) -> nix::Result<OwnedFd> {
    let context = FsContext::open(fstype)?;
    for (key, value) in options {
        context.set(key, *value)?;
    }
    context.mount(attrs).map_err(|(errno, _)| errno)
}

/// Makes `root` (a mount) the root of this mount namespace and drops the old one: pivot_root(2) with both arguments
/// ".", after which the old root lies over the new one and is detached.
pub fn pivot_root(root: BorrowedFd<'_>) -> nix::Result<()> {
    let old = super::path::open_dir(c"/")?;
    nix::unistd::fchdir(root)?;
    // SAFETY: both paths are static strings.
    Errno::result(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    nix::unistd::fchdir(old.as_fd())?;
    // The old root's mounts must not carry the detach to the host's.
    let none: Option<&CStr> = None;
    nix::mount::mount(none, c".", none, nix::mount::MsFlags::MS_SLAVE | nix::mount::MsFlags::MS_REC, none)?;
    nix::mount::umount2(c".", nix::mount::MntFlags::MNT_DETACH)?;
    nix::unistd::chdir(c"/")
}

/// A C string of `bytes` that are known to have no NUL, or EINVAL.
pub fn cstring(bytes: impl Into<Vec<u8>>) -> nix::Result<CString> {
    CString::new(bytes).map_err(|_| Errno::EINVAL)
}
