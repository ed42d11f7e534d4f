//! What an exec is asked for, and what comes of it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use oci_spec::runtime::Process as ProcessSpec;

use super::Stdio;
use crate::Result;
use crate::cgroup::Cgroup;
use crate::launch::{Pending, Process, exec};

/// An exec request.
#[derive(Debug)]
pub struct Exec {
    /// The process to run; nothing is taken from the bundle.
    pub process: ProcessSpec,
    /// Its standard streams.
    pub stdio: Stdio,
    /// Pass fds 3..3+n of the caller on.
    pub preserve_fds: u32,
    /// `controller[,controller]:path`, or one `path` for all, below the container's cgroup.
    pub cgroups: Vec<String>,
    /// Run although the container is paused.
    pub ignore_paused: bool,
    /// A cgroup of its own, so that its process tree can be killed as a whole ([`Container::tree`]); otherwise it runs
    /// in the container's.
    pub tree: Option<Tree>,
    /// How long it may take until the program runs; None: for ever.
    pub limit: Option<Duration>,
}

/// An exec under way; ends when the user's program runs.
#[derive(Debug)]
pub struct Execing {
    pub(super) birth: exec::Birth,
    pub(super) tree: Option<Tree>,
    pub(super) deadline: Option<Instant>,
}

/// The cgroup of an exec process and its descendants: a part of its container's. Dropped, it is killed and removed.
#[derive(Debug)]
pub struct Tree {
    pub(super) cgroup: Cgroup,
    removed: bool,
}

impl Tree {
    pub(super) fn new(cgroup: Cgroup) -> Tree {
        Tree { cgroup, removed: false }
    }

    /// Kills what is left in it.
    pub fn kill(&self) -> Result<()> {
        self.cgroup.kill(libc::SIGKILL)
    }

    /// True when nothing is left in it; it is removed then.
    pub fn remove_if_empty(&mut self) -> bool {
        self.removed = self.removed || self.cgroup.remove_if_empty();
        self.removed
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if !self.remove_if_empty() {
            let _ = self.kill();
            self.remove_if_empty();
        }
    }
}

/// A running exec process.
#[derive(Debug)]
pub struct Execed {
    /// The process.
    pub process: Process,
    /// The pty master if it has a terminal.
    pub console: Option<OwnedFd>,
}

impl Execing {
    /// The cgroup that it was asked with; also after a failure, when its process may still be on its way out.
    pub fn take_tree(&mut self) -> Option<Tree> {
        self.tree.take()
    }
}

impl Pending for Execing {
    type Output = Execed;

    fn fd(&self) -> BorrowedFd<'_> {
        self.birth.fd()
    }

    fn until_closed(&self) -> bool {
        self.birth.until_closed()
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn advance(&mut self) -> Result<Option<Execed>> {
        let born = self.birth.advance()?;
        if born.is_none() && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(self.birth.late());
        }
        Ok(born.map(|(process, console)| Execed { process, console }))
    }
}
