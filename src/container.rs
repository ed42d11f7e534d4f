//! The verbs: create, start, exec, kill, pause, resume, update, ps, delete. Does not live here: how (launch, child, cgroup).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use oci_spec::runtime::{Process as ProcessSpec, Spec};

use crate::Result;
use crate::cgroup::{Cgroup, Stats};
use crate::launch::{Pending, Process};

/// What the container's process gets as fds 0, 1 and 2.
#[derive(Debug)]
pub enum Stdio {
    /// The caller's own 0, 1 and 2.
    Inherit,
    /// These three; the caller's copies are closed when the process has been cloned.
    Fds([OwnedFd; 3]),
    /// A pty of the container's devpts; its master comes back as `console`.
    Terminal,
}

/// How `start` will be told to a created container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// runc's `exec.fifo` in the state directory: another process can start it.
    Fifo,
    /// A socket that this process holds: only it can start the container.
    Socket,
}

/// A create request.
#[derive(Debug)]
pub struct Create {
    /// Container id.
    pub id: String,
    /// Directory of the bundle; relative paths of the spec start here.
    pub bundle: PathBuf,
    /// State root; the container's state directory is `root/id`.
    pub root: PathBuf,
    /// The process's standard streams.
    pub stdio: Stdio,
    /// How it will be started.
    pub gate: Gate,
    /// cgroupsPath is `slice:prefix:name`, made through systemd.
    pub systemd_cgroup: bool,
    /// MS_MOVE and chroot instead of pivot_root.
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Pass fds 3..3+n of the caller on.
    pub preserve_fds: u32,
}

/// A birth under way; ends in a created container whose init waits at the gate.
#[derive(Debug)]
pub struct Creating {}

/// A created container.
#[derive(Debug)]
pub struct Created {
    /// The container.
    pub container: Container,
    /// Its init process.
    pub init: Process,
    /// The pty master if the process has a terminal.
    pub console: Option<OwnedFd>,
}

/// A start under way; ends when the user's program runs.
#[derive(Debug)]
pub struct Starting {}

/// An exec request.
#[derive(Debug)]
pub struct Exec {
    /// The process to run; nothing is taken from the bundle.
    pub process: ProcessSpec,
    /// Its standard streams.
    pub stdio: Stdio,
    /// Pass fds 3..3+n of the caller on.
    pub preserve_fds: u32,
    /// `controller:path` or `path` below the container's cgroup (runc exec --cgroup).
    pub cgroups: Vec<String>,
    /// Run although the container is paused.
    pub ignore_paused: bool,
}

/// An exec under way; ends when the user's program runs.
#[derive(Debug)]
pub struct Execing {}

/// A running exec process.
#[derive(Debug)]
pub struct Execed {
    /// The process.
    pub process: Process,
    /// The pty master if it has a terminal.
    pub console: Option<OwnedFd>,
}

/// Status as `runc state` prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Being created by another process.
    Creating,
    /// Waits at the gate.
    Created,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Its init has exited.
    Stopped,
}

/// A container, in memory of its maker or read back from its state directory.
#[derive(Debug)]
pub struct Container {}

/// Begins a create: plans, reserves the state directory, makes the cgroup, clones.
pub fn create(request: Create, spec: &Spec) -> Result<Creating> {
    let _ = (request, spec);
    todo!()
}

impl Container {
    /// Reads `root/id/state.json`. `Kind::NotFound` with "container does not exist" when there is none.
    pub fn load(root: &Path, id: &str) -> Result<Container> {
        let _ = (root, id);
        todo!()
    }

    /// All containers below `root`, by id; those that cannot be read are left out. An absent root is empty.
    pub fn list(root: &Path) -> Result<Vec<Container>> {
        let _ = root;
        todo!()
    }

    /// Container id.
    pub fn id(&self) -> &str {
        todo!()
    }

    /// Absolute path of the bundle.
    pub fn bundle(&self) -> &Path {
        todo!()
    }

    /// Absolute path of the rootfs on the host.
    pub fn rootfs(&self) -> &Path {
        todo!()
    }

    /// The annotations of the spec.
    pub fn annotations(&self) -> &std::collections::BTreeMap<String, String> {
        todo!()
    }

    /// Creation time, RFC 3339 with nanoseconds, UTC.
    pub fn created(&self) -> &str {
        todo!()
    }

    /// User id that made the container.
    pub fn owner(&self) -> u32 {
        todo!()
    }

    /// The init's pid on this host; 0 when it has exited.
    pub fn pid(&self) -> i32 {
        todo!()
    }

    /// True when the container has a pid namespace of its own, so that everything in it dies with its init.
    pub fn has_own_pid_namespace(&self) -> bool {
        todo!()
    }

    /// Status now.
    pub fn status(&self) -> Result<Status> {
        todo!()
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        todo!()
    }

    /// Opens the gate. Errors when the container is not created (runc's texts).
    pub fn start(&mut self) -> Result<Starting> {
        todo!()
    }

    /// Begins an exec.
    pub fn exec(&self, request: Exec) -> Result<Execing> {
        let _ = request;
        todo!()
    }

    /// Signals the init, or every process of the cgroup.
    pub fn kill(&self, signal: i32, all: bool) -> Result<()> {
        let _ = (signal, all);
        todo!()
    }

    /// Freezes the cgroup.
    pub fn pause(&self) -> Result<()> {
        todo!()
    }

    /// Thaws the cgroup.
    pub fn resume(&self) -> Result<()> {
        todo!()
    }

    /// Host pids of all processes in the cgroup.
    pub fn pids(&self) -> Result<Vec<i32>> {
        todo!()
    }

    /// Resource usage.
    pub fn stats(&self) -> Result<Stats> {
        todo!()
    }

    /// Removes the cgroup and the state directory, then runs the poststop hooks. The init must have exited, be
    /// waiting at the gate, or `force` kills it. The caller reaps the init if it is its child.
    pub fn delete(self, force: bool) -> Result<()> {
        let _ = force;
        todo!()
    }
}

impl Pending for Creating {
    type Output = Created;
    fn fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn advance(&mut self) -> Result<Option<Created>> {
        todo!()
    }
}

impl Pending for Starting {
    type Output = ();
    fn fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn advance(&mut self) -> Result<Option<()>> {
        todo!()
    }
}

impl Pending for Execing {
    type Output = Execed;
    fn fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn advance(&mut self) -> Result<Option<Execed>> {
        todo!()
    }
}
