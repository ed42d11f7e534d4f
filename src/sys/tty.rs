//! Pseudo terminals by descriptor: no path under /dev/pts is ever opened.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Unlocks `master` and opens its slave: TIOCSPTLCK, TIOCGPTPEER.
pub fn open_slave(master: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    let flags = (OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).bits();
    // SAFETY: TIOCGPTPEER takes open flags by value.
    super::owned(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
}

/// The number N of the slave /dev/pts/N: TIOCGPTN.
pub fn number(master: BorrowedFd<'_>) -> nix::Result<u32> {
    let mut n: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes an unsigned int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut n) })?;
    Ok(n)
}

/// Sets the size of the terminal behind `fd`: TIOCSWINSZ.
pub fn resize(fd: BorrowedFd<'_>, size: Size) -> nix::Result<()> {
    let win = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const win) }).map(drop)
}

/// The size of the terminal behind `fd`: TIOCGWINSZ.
pub fn size(fd: BorrowedFd<'_>) -> nix::Result<Size> {
    // SAFETY: winsize is plain data for which all zeroes is a valid value.
    let mut win: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes a winsize.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut win) })?;
    Ok(Size { width: win.ws_col, height: win.ws_row })
}

/// Bytes that wait in a pipe or terminal: FIONREAD.
pub fn unread(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Makes `slave` the controlling terminal of this session leader: TIOCSCTTY.
pub fn set_controlling(slave: &OwnedFd) -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes its argument by value.
    Errno::result(unsafe { libc::ioctl(slave.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}
