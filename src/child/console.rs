//! The terminal of a container's process: a pty of the container's own devpts.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;

use super::report::{At, Failure, Record, Report, Step};
use crate::plan::process::Process;
use crate::sys::{mount, path, process, tty};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Opens a pty of the devpts at `/dev/pts` below `root`, and sends its master to the parent. Returns the slave.
pub fn open(root: BorrowedFd<'_>, plan: &Process, report: &Report) -> Result<OwnedFd, Failure> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
    let master = path::open_in_root(root, c"dev/pts/ptmx", flags).at(Step::Console)?;
    // The image decides what lies at this path: only the multiplexer (5:2) of a devpts makes a pty.
    let genuine = path::magic(master.as_fd()).at(Step::Console)? == DEVPTS_SUPER_MAGIC
        && path::kind(master.as_fd()).at(Step::Console)? == (SFlag::S_IFCHR, libc::makedev(5, 2));
    if !genuine {
        return Err(Failure::new(Step::Console, 0, Errno::ENODEV).detail("/dev/pts/ptmx is not a pty multiplexer"));
    }
    let slave = tty::open_slave(master.as_fd()).at(Step::Console)?;
    if let Some(size) = plan.console_size {
        tty::resize(slave.as_fd(), size).at(Step::Console)?;
    }
    path::chown(slave.as_fd(), Some(plan.uid), None).at(Step::Console)?;
    report.send_fd(&Record::Console, master.as_fd()).at(Step::Console)?;
    Ok(slave)
}

/// Binds the slave onto `/dev/console` below `root`.
pub fn bind(root: BorrowedFd<'_>, slave: &OwnedFd) -> Result<(), Failure> {
    const CONSOLE: &CStr = c"dev/console";
    let target = match path::open_no_symlinks(root, CONSOLE, OFlag::O_PATH) {
        Err(Errno::ELOOP) => {
            return Err(Failure::new(Step::Console, 0, Errno::ELOOP).detail("/dev/console is a symlink"));
        }
        Err(Errno::ENOENT) => path::create_file(root, CONSOLE),
        other => other,
    };
    let target = target.at(Step::Console)?;
    let copy = mount::clone_tree(slave.as_fd(), c"", false).at(Step::Console)?;
    mount::attach(copy.as_fd(), target.as_fd()).at(Step::Console)
}

/// Makes the slave the controlling terminal and the three standard streams.
pub fn take(slave: &OwnedFd) -> Result<(), Failure> {
    tty::set_controlling(slave).at(Step::Console)?;
    for number in 0..3 {
        process::place_fd(slave.as_fd(), number).at(Step::Stdio)?;
    }
    Ok(())
}
