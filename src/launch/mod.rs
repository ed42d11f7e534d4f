//! The parent side of a birth: clone, handshake, id maps. Does not live here: what the child does (child).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use crate::Result;

/// Something under way that the caller drives: wait until `fd()` is readable or `deadline()` has passed, then call
/// `advance()`. The command line polls; the shim awaits. `fd()` may be another one after each `advance()`.
pub trait Pending {
    /// What it ends in.
    type Output;
    /// Readable when `advance` can do something.
    fn fd(&self) -> BorrowedFd<'_>;
    /// When to call `advance` at the latest.
    fn deadline(&self) -> Option<Instant>;
    /// Does what can be done without blocking; `None` when it has to wait again. After an error everything it had
    /// made is taken back.
    fn advance(&mut self) -> Result<Option<Self::Output>>;
}

/// Drives a [`Pending`] to its end with poll(2). For synchronous callers.
pub fn block_on<P: Pending>(_pending: P) -> Result<P::Output> {
    todo!()
}

/// A live child of this process. Its exit is collected with [`Process::try_wait`].
#[derive(Debug)]
pub struct Process {
    /// The pid in this process's pid namespace.
    pub pid: i32,
    /// Readable when the process has exited.
    pub pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + signal number.
    pub status: u32,
    /// When it was collected.
    pub at: std::time::SystemTime,
}

impl Process {
    /// The exit if it has exited: waitid(P_PIDFD, WEXITED | WNOHANG). Only the parent can ask.
    pub fn try_wait(&self) -> Result<Option<Exit>> {
        todo!()
    }

    /// Sends `signal` through the pidfd. `Kind::NotFound` with [`crate::error::PROCESS_ALREADY_FINISHED`] when it has exited.
    pub fn kill(&self, _signal: i32) -> Result<()> {
        todo!()
    }
}
