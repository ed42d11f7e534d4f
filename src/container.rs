//! The verbs: create, start, exec, kill, pause, resume, update, ps, delete. Does not live here: how (launch, child, cgroup).

mod checkpoint;
mod create;
mod exec;
mod update;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use oci_spec::runtime::{Hook, LinuxResources};

pub use checkpoint::{Restoring, restore};
pub use create::{Create, Created, Creating, Leftover, NOTIFY, create};
pub use exec::{Exec, Execed, Execing, Tree};
use update::merge;

use crate::cgroup::systemd::Unit;
use crate::cgroup::{Cgroup, OomWatch, Stats};
use crate::error::{CONTAINER_DOES_NOT_EXIST, CONTAINER_NOT_RUNNING};
use crate::hooks;
use crate::host::Cgroups;
use crate::launch::chore::Chore;
use crate::launch::{self, Channel, Pending, describe};
use crate::plan;
use crate::rdt::Group;
use crate::state::{Dir, State, ids, proc_stat};
use crate::sys::clone::pidfd_open;
use crate::{Error, Kind, Result, limits};

/// The version of the runtime spec that skiff implements, in the states that it prints.
pub const OCI_VERSION: &str = "1.3.0";

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

/// A start under way; ends when the user's program runs and the poststart hooks have run.
#[derive(Debug)]
pub struct Starting {
    channel: Option<Channel>,
    running: Option<Chore>,
    hooks: std::collections::VecDeque<(usize, Hook)>,
    hook_state: Vec<u8>,
    program: String,
    dir: Dir,
    pid: i32,
    init: OwnedFd,
    /// By when the program has to run; None where somebody waits who may wait for ever.
    deadline: Option<Instant>,
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

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// A container, in memory of its maker or read back from its state directory.
#[derive(Debug)]
pub struct Container {
    dir: Dir,
    /// Lean: the whole is in the directory.
    state: State,
    cgroup: Cgroup,
    /// The init's report socket, when this process alone can start it.
    gate: Option<Channel>,
    /// The init's pidfd, when this process has made it.
    init: Option<OwnedFd>,
}

/// Mount points strictly below `rootfs`, in the order of their making.
fn mounts_below(rootfs: &Path) -> Vec<PathBuf> {
    let rootfs = std::fs::canonicalize(rootfs).unwrap_or_else(|_| rootfs.to_path_buf());
    let mounts = crate::host::mount_points();
    mounts.into_iter().filter(|at| at.starts_with(&rootfs) && *at != rootfs).collect()
}

/// Takes back what a container without a mount namespace has mounted in its rootfs.
fn unmount_below(rootfs: &Path, before: &[PathBuf]) {
    for at in mounts_below(rootfs).iter().rev().filter(|at| !before.contains(at)) {
        let flags = nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW;
        if let Err(errno) = nix::mount::umount2(at, flags) {
            log::warn!("unmount {at:?}: {}", crate::error::errno_text(errno));
        }
    }
}

fn check_preserved(count: u32) -> Result<()> {
    match (0..count).find(|at| !crate::sys::process::is_inherited(3 + *at as i32)) {
        Some(at) => {
            Err(Error::new(Kind::Invalid, format!("unable to stat preserved-fd {} (of {count}): not open", at + 1)))
        }
        None => Ok(()),
    }
}

/// What hooks get on stdin, without pid and status (runtime spec, runtime.md, "State").
fn hook_state(state: &State) -> serde_json::Map<String, serde_json::Value> {
    let mut map = serde_json::Map::new();
    map.insert("ociVersion".into(), OCI_VERSION.into());
    map.insert("id".into(), state.id.clone().into());
    map.insert("bundle".into(), state.skiff.bundle.display().to_string().into());
    map.insert("annotations".into(), serde_json::json!(state.skiff.annotations));
    map
}

fn hook_json(state: &State, pid: i32, status: &str) -> Vec<u8> {
    let mut map = hook_state(state);
    map.insert("pid".into(), pid.into());
    map.insert("status".into(), status.into());
    serde_json::Value::Object(map).to_string().into_bytes()
}

impl Container {
    /// Reads `root/id/state.json`. `Kind::NotFound` with "container does not exist" when there is none.
    pub fn load(root: &Path, id: &str) -> Result<Container> {
        let dir = Dir::at(root, id)?;
        let state = dir.load()?;
        let cgroup = Cgroup::open(&state.cgroup_paths)?.with(state.skiff.rdt_doors());
        Ok(Container { dir, state: state.lean(), cgroup, gate: None, init: None })
    }

    /// All containers below `root`, by id; those that cannot be read are left out. An absent root is empty.
    pub fn list(root: &Path) -> Result<Vec<Container>> {
        Ok(ids(root)?.iter().filter_map(|id| Container::load(root, id).ok()).collect())
    }

    /// Removes what a create that was killed half-way has left of `id`. True when there was something.
    pub fn remove_leftover(root: &Path, id: &str) -> Result<bool> {
        let dir = Dir::at(root, id)?;
        let there = dir.exists();
        dir.remove().map(|()| there)
    }

    /// Its state directory.
    pub fn state_dir(&self) -> &Path {
        self.dir.path()
    }

    /// Container id.
    pub fn id(&self) -> &str {
        &self.state.id
    }

    /// The file that the spec was read from, unless it is `config.json`.
    pub fn config(&self) -> Option<&Path> {
        self.state.skiff.config.as_deref()
    }

    /// Absolute path of the bundle.
    pub fn bundle(&self) -> &Path {
        &self.state.skiff.bundle
    }

    /// Absolute path of the rootfs on the host.
    pub fn rootfs(&self) -> &Path {
        &self.state.config.rootfs
    }

    /// The annotations of the spec.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.state.skiff.annotations
    }

    /// Creation time, RFC 3339 with nanoseconds, UTC.
    pub fn created(&self) -> &str {
        &self.state.created
    }

    /// User id that made the container.
    pub fn owner(&self) -> u32 {
        self.state.skiff.owner
    }

    /// The init's pid on this host; 0 when it has exited.
    pub fn pid(&self) -> i32 {
        if self.alive() { self.state.init_process_pid } else { 0 }
    }

    fn alive(&self) -> bool {
        if let Some(init) = &self.init {
            return !launch::has_exited(init.as_fd());
        }
        let state = &self.state;
        proc_stat(state.init_process_pid).is_some_and(|stat| !stat.dead && stat.start == state.init_process_start)
    }

    /// True when the container has a pid namespace of its own, so that everything in it dies with its init.
    pub fn has_own_pid_namespace(&self) -> bool {
        self.state.skiff.own_pid_namespace
    }

    /// Status now.
    pub fn status(&self) -> Result<Status> {
        if !self.alive() {
            return Ok(Status::Stopped);
        }
        let frozen = self.cgroup.frozen()?;
        Ok(match frozen {
            true => Status::Paused,
            false if self.dir.has_gate() => Status::Created,
            false => Status::Running,
        })
    }

    /// The unit of systemd that holds it.
    pub fn unit(&self) -> Option<&Unit> {
        self.state.skiff.unit.as_ref()
    }

    /// Reads the state again, after another process has changed it.
    pub fn reload(&mut self) -> Result<()> {
        self.state = self.dir.load()?.lean();
        Ok(())
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A pidfd of what has the init's pid. Only with that pinned its start time tells that it is the one that was meant.
    fn pinned(&self) -> Result<OwnedFd> {
        match &self.init {
            Some(init) => init.try_clone().map_err(|e| Error::io("open the init process", &e)),
            None => pidfd_open(self.state.init_process_pid).map_err(|errno| match errno {
                Errno::ESRCH => Error::new(Kind::NotFound, CONTAINER_NOT_RUNNING),
                errno => Error::sys("open the init process", errno),
            }),
        }
    }

    /// A pidfd of the living init.
    fn init(&self) -> Result<OwnedFd> {
        let fd = self.pinned()?;
        if self.alive() { Ok(fd) } else { Err(Error::new(Kind::NotFound, CONTAINER_NOT_RUNNING)) }
    }

    /// A descriptor that is readable when the init has exited; any process may wait for it.
    pub fn watch(&self) -> Result<OwnedFd> {
        self.init()
    }

    /// Opens the gate. Errors when the container is not created (runc's texts).
    pub fn start(&mut self) -> Result<Starting> {
        let refuse = |text: &str| Err(Error::new(Kind::FailedPrecondition, text));
        // Before the look at what it is, which then is true of this one.
        let init = self.pinned();
        match self.status()? {
            Status::Created => {}
            Status::Stopped => return refuse("cannot start a container that has stopped"),
            Status::Running => return refuse("cannot start an already running container"),
            other => return refuse(&format!("cannot start a container in the {other} state")),
        }
        let init = init?;
        let deadline = self
            .gate
            .is_some()
            .then(|| limits::from_now(limits::BIRTH) + Duration::from_secs(self.state.skiff.start_hooks));
        let channel = match self.gate.take() {
            Some(channel) => {
                channel.open_gate()?;
                channel
            }
            None => match self.dir.open_gate()? {
                Some(answer) => Channel::fifo(answer),
                None => return refuse("container process is already dead, or waits for the process that created it"),
            },
        };
        let pid = self.state.init_process_pid;
        let own = &self.state.skiff;
        Ok(Starting {
            channel: Some(channel),
            running: None,
            hooks: own.hooks.poststart().iter().flatten().cloned().enumerate().collect(),
            hook_state: hook_json(&self.state, pid, "running"),
            program: own.program.clone(),
            dir: self.dir.clone(),
            pid,
            init,
            deadline,
        })
    }

    /// Begins an exec.
    pub fn exec(&self, request: Exec) -> Result<Execing> {
        let refuse = |text: &str| Err(Error::new(Kind::FailedPrecondition, text));
        match self.status()? {
            Status::Stopped => return refuse("cannot exec in a stopped container"),
            Status::Paused if !request.ignore_paused => {
                return refuse("cannot exec in a paused container (use --ignore-paused to override)");
            }
            _ => {}
        }
        let below = (!request.cgroups.is_empty()).then(|| self.cgroup.below(&request.cgroups)).transpose()?;
        let tree = request.tree;
        let deadline = request.limit.map(limits::from_now);
        check_preserved(request.preserve_fds)?;
        let terminal = matches!(request.stdio, Stdio::Terminal);
        let mut plan = plan::process::plan("process", &request.process, terminal)?;
        let own = &self.state.skiff;
        plan.personality = own.personality;
        plan.memory_policy = own.memory_policy.clone();
        let keyring = own.keyring.then(|| plan::cstring("id", format!("_ses.{}", self.state.id))).transpose()?;
        launch::exec::begin(launch::exec::Begin {
            plan,
            filter: own.seccomp.as_ref(),
            cgroup: below.as_ref().unwrap_or(&self.cgroup),
            named: below.is_some(),
            part: tree.as_ref().map(|tree| &tree.cgroup),
            unit: own.unit.as_ref(),
            init: self.init()?,
            init_pid: self.state.init_process_pid,
            namespaces: own.namespaces,
            stdio: match request.stdio {
                Stdio::Fds(fds) => Some(fds),
                Stdio::Inherit | Stdio::Terminal => None,
            },
            preserve_fds: request.preserve_fds,
            keyring,
            state: hook_state(&self.state),
        })
        .map(|birth| Execing { birth, tree, deadline })
    }

    /// A cgroup of its own below the container's, for an exec process. None where it cannot be made.
    pub fn tree(&self, name: &str) -> Option<Tree> {
        self.cgroup.part(name).ok().map(Tree::new)
    }

    /// Signals the init, or every process of the cgroup.
    pub fn kill(&self, signal: i32, all: bool) -> Result<()> {
        let shared = !self.has_own_pid_namespace();
        // A user's container may have no cgroup: there is nobody to be found but the init.
        if (all || (shared && signal == libc::SIGKILL)) && !self.cgroup.is_nothing() {
            if !self.alive() && self.cgroup.pids()?.is_empty() {
                return if all { Ok(()) } else { Err(Error::new(Kind::NotFound, CONTAINER_NOT_RUNNING)) };
            }
            return self.cgroup.kill(signal);
        }
        let init = self.init()?;
        match crate::sys::clone::pidfd_kill(init.as_fd(), signal) {
            Ok(()) => {}
            Err(Errno::ESRCH) => return Err(Error::new(Kind::NotFound, CONTAINER_NOT_RUNNING)),
            Err(Errno::EINVAL) => return Err(Error::new(Kind::Invalid, format!("unknown signal {signal}"))),
            Err(errno) => return Err(Error::sys(format!("send signal {signal} to the container"), errno)),
        }
        // A frozen process of cgroup v1 does not die before it is thawed.
        if signal == libc::SIGKILL && self.cgroup.frozen()? {
            return self.cgroup.kill(signal);
        }
        Ok(())
    }

    /// Freezes the cgroup.
    pub fn pause(&self) -> Result<()> {
        match self.status()? {
            Status::Running | Status::Created => self.cgroup.freeze(),
            _ => Err(Error::new(Kind::FailedPrecondition, CONTAINER_NOT_RUNNING)),
        }
    }

    /// Thaws the cgroup.
    pub fn resume(&self) -> Result<()> {
        match self.status()? {
            Status::Paused => self.cgroup.thaw(),
            _ => Err(Error::new(Kind::FailedPrecondition, "container not paused")),
        }
    }

    /// Changes limits: those that `changes` has, the others stay. Devices are never touched. After an error the old
    /// limits are put back as far as the kernel lets them.
    pub fn update(&mut self, changes: &LinuxResources) -> Result<()> {
        if self.status()? == Status::Stopped {
            return Err(Error::new(Kind::FailedPrecondition, CONTAINER_NOT_RUNNING));
        }
        let host = Cgroups::read()?;
        let old = &self.state.skiff.resources;
        let (merged, mut writes) = merge(old, changes)?;
        writes.set_devices(None);
        let plan = plan::cgroup::plan_update(&writes, &host)?;
        // systemd writes the files by itself.
        self.cgroup.check_memory(&plan)?;
        if let Err(err) = self.set_unit(&plan).and_then(|()| self.cgroup.apply(&plan)) {
            if let Ok(undo) = plan::cgroup::plan_update(old, &host) {
                let _ = self.set_unit(&undo);
                let _ = self.cgroup.apply(&undo);
            }
            return Err(err);
        }
        self.state.skiff.resources = merged;
        let mut state = self.dir.load()?;
        state.skiff.resources = self.state.skiff.resources.clone();
        self.dir.save(&state)
    }

    fn set_unit(&self, plan: &plan::cgroup::CgroupPlan) -> Result<()> {
        match &self.state.skiff.unit {
            Some(unit) => unit.set(&plan::scope::limits(&plan.writes)?),
            None => Ok(()),
        }
    }

    /// Changes the cache and memory bandwidth schemas of its resctrl group.
    pub fn update_rdt(&mut self, l3_cache: Option<&str>, mem_bw: Option<&str>) -> Result<()> {
        let lines = plan::rdt::lines(l3_cache, mem_bw)?;
        match &self.state.skiff.rdt {
            Some(group) => group.set(&lines),
            None => Err(Error::invalid("linux.intelRdt", "was not in the container's config.json")),
        }
    }

    /// Watches for the kernel's OOM killer; None where the cgroup has no memory controller.
    pub fn watch_oom(&self) -> Result<Option<OomWatch>> {
        OomWatch::new(&self.cgroup).map_err(|errno| Error::sys("watch the cgroup for OOM", errno))
    }

    /// Host pids of all processes in the cgroup.
    pub fn pids(&self) -> Result<Vec<i32>> {
        self.cgroup.pids()
    }

    /// Resource usage.
    pub fn stats(&self) -> Result<Stats> {
        self.cgroup.stats()
    }

    /// Removes the cgroup and the state directory, then runs the poststop hooks. The init must have exited, be
    /// waiting at the gate, or `force` kills it. The caller reaps the init if it is its child.
    pub fn delete(&self, force: bool) -> Result<()> {
        let status = self.status()?;
        match status {
            Status::Stopped => {}
            Status::Created => self.kill_and_wait()?,
            _ if force => self.kill_and_wait()?,
            _ => {
                let text = format!("cannot delete container {} that is not stopped: {status}", self.id());
                return Err(Error::new(Kind::FailedPrecondition, text));
            }
        }
        if self.state.skiff.unit.is_some() || !self.cgroup.remove_if_bare() {
            self.cgroup.kill(libc::SIGKILL)?;
            if let Some(unit) = &self.state.skiff.unit
                && let Err(err) = unit.stop()
            {
                // The container goes also when systemd does not answer.
                log::warn!("{err}");
            }
            self.cgroup.remove()?;
        }
        if let Some(Err(err)) = self.state.skiff.rdt.as_ref().map(Group::remove) {
            log::warn!("{err}");
        }
        if let Some(before) = &self.state.skiff.mounts_before {
            unmount_below(self.rootfs(), before);
        }
        self.dir.remove()?;
        if let Some(list) = self.state.skiff.hooks.poststop() {
            hooks::run_poststop(list, &hook_json(&self.state, 0, "stopped"));
        }
        Ok(())
    }

    /// Deletes a stopped container where nothing takes time: no hooks, no systemd, no resctrl, neither process nor cgroup left. False when something
    /// would; [`Container::delete`] is due then.
    pub fn delete_at_once(&self) -> Result<bool> {
        let own = &self.state.skiff;
        let slow = own.unit.is_some() || own.mounts_before.is_some() || own.rdt.is_some();
        let slow = slow || own.hooks.poststop().is_some();
        if slow || self.alive() || !self.cgroup.remove_if_bare() {
            return Ok(false);
        }
        self.dir.remove().map(|()| true)
    }

    /// How long its poststop hooks may take.
    pub fn poststop_time(&self) -> Duration {
        hooks::time(self.state.skiff.hooks.poststop().as_deref())
    }

    fn kill_and_wait(&self) -> Result<()> {
        let init = match self.init() {
            Err(err) if err.kind() == Kind::NotFound => return Ok(()),
            other => other?,
        };
        match self.kill(libc::SIGKILL, false) {
            // It was on its way out already.
            Err(err) if err.kind() == Kind::NotFound => {}
            other => other?,
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.alive() {
            if Instant::now() >= deadline {
                return Err(Error::new(Kind::Timeout, "container init still running"));
            }
            launch::wait_readable(init.as_fd(), Some(deadline))?;
        }
        Ok(())
    }
}

/// Container `id` does not exist: for callers that keep their own table.
pub fn does_not_exist() -> Error {
    Error::new(Kind::NotFound, CONTAINER_DOES_NOT_EXIST)
}

impl Starting {
    /// The program has run: what fails from now on is a hook, and ends the container.
    pub fn has_run(&self) -> bool {
        self.channel.is_none()
    }

    fn kill(&self) {
        let _ = crate::sys::clone::pidfd_kill(self.init.as_fd(), libc::SIGKILL);
    }
}

impl Pending for Starting {
    type Output = ();

    fn fd(&self) -> BorrowedFd<'_> {
        match (&self.running, &self.channel) {
            (Some(running), _) => running.fd(),
            (None, Some(channel)) => channel.as_fd(),
            (None, None) => panic!("a finished start is not waited for"),
        }
    }

    fn until_closed(&self) -> bool {
        self.running.is_none()
    }

    fn deadline(&self) -> Option<Instant> {
        self.running.as_ref().map_or(self.deadline, Pending::deadline)
    }

    fn advance(&mut self) -> Result<Option<()>> {
        if let Some(channel) = &mut self.channel {
            match channel.executed()? {
                None if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    let late =
                        launch::hang::late(self.pid, &format!("start {:?}: it does not run in time", self.program));
                    self.kill();
                    return Err(late);
                }
                None => return Ok(None),
                Some(Ok(())) => {}
                Some(Err(Some(failure))) => {
                    let rootfs = self.dir.load().ok().map(|state| state.config.rootfs);
                    return Err(describe::start(&self.program, &failure, rootfs.as_deref()));
                }
                Some(Err(None)) => {
                    return Err(Error::new(Kind::FailedPrecondition, "container process is already dead"));
                }
            }
            self.channel = None;
            self.dir.remove_gate();
        }
        loop {
            if let Some(running) = &mut self.running {
                match running.advance() {
                    Ok(None) => return Ok(None),
                    Ok(Some(())) => self.running = None,
                    Err(err) => {
                        // A failed poststart hook stops the container (runtime spec 1.3, runtime.md, "Lifecycle").
                        self.kill();
                        return Err(err);
                    }
                }
            }
            let Some((at, hook)) = self.hooks.pop_front() else { return Ok(Some(())) };
            let patience = if self.deadline.is_some() { limits::HOOK } else { limits::NONE };
            self.running = Some(hooks::start_apart("poststart", at, &hook, &self.hook_state, patience)?);
        }
    }
}
