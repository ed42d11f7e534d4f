//! The verbs: create, start, exec, kill, pause, resume, update, ps, delete. Does not live here: how (launch, child, cgroup).

mod checkpoint;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use oci_spec::runtime::{Hook, Hooks, LinuxNamespaceType as Namespace, LinuxResources, Process as ProcessSpec, Spec};

pub use checkpoint::{Restoring, restore};

use crate::cgroup::systemd::{self, Unit};
use crate::cgroup::{Cgroup, OomWatch, Stats};
use crate::error::{CONTAINER_DOES_NOT_EXIST, CONTAINER_NOT_RUNNING};
use crate::hooks::{self, Running};
use crate::host::Cgroups;
use crate::launch::{self, Channel, Pending, Process, chore, describe, exec, init, seccomp};
use crate::plan::{self, Plan, Request};
use crate::rdt::Group;
use crate::state::{Config, Dir, Own, State, check_id, ids, proc_stat};
use crate::sys::clone::pidfd_open;
use crate::trace::{Trace, Track};
use crate::{Error, Kind, Result};

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

/// A create request.
#[derive(Debug)]
pub struct Create {
    /// Container id.
    pub id: String,
    /// Directory of the bundle; relative paths of the spec start here.
    pub bundle: PathBuf,
    /// The file that the spec was read from, in the bundle's directory or absolute; None is `config.json`.
    pub config: Option<PathBuf>,
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
    /// The caller may lack the rights of a real root: see [`crate::host::rootless`].
    pub rootless: bool,
    /// Where the steps are marked as they happen.
    pub trace: Option<Trace>,
    /// Make the directory [`NOTIFY`] in the state directory, which the spec's mounts name.
    pub notify: bool,
    /// It is there to hold namespaces: instead of a program the init is a copy of the caller that waits, reaps, and ends
    /// at SIGTERM. A process with a label, which comes with a program alone, runs its program still.
    pub pause: bool,
}

/// The directory below the state directory that holds the socket for sd_notify(3).
pub const NOTIFY: &str = "notify";

/// A birth under way; ends in a created container whose init waits at the gate. Dropped before that, everything that
/// it had made is taken back.
#[derive(Debug)]
pub struct Creating(Option<Stage>);

#[derive(Debug)]
enum Stage {
    /// systemd makes the unit.
    Unit(Box<Prepared>, chore::Held),
    /// The init is on its way to its gate.
    Birth(Box<Underway>),
    /// It has failed, and its init is on its way out.
    Dying(Box<Underway>, Process, Error),
    /// What it had made is being taken back.
    Undo(chore::Chore, Error),
}

/// A create whose cgroup is still to be made.
#[derive(Debug)]
struct Prepared {
    made: Made,
    state: State,
    plan: Plan,
    gate: Gate,
    stdio: Option<[OwnedFd; 3]>,
    preserve_fds: u32,
    trace: Option<Trace>,
}

#[derive(Debug)]
struct Underway {
    birth: init::Birth,
    made: Made,
    state: State,
    gate: Gate,
    trace: Option<Trace>,
}

/// What a create leaves in the file system. Dropped, it is removed.
#[derive(Debug)]
struct Made {
    dir: Dir,
    cgroup: Option<Cgroup>,
    unit: Option<Unit>,
    rdt: Option<Group>,
    /// Without a mount namespace: the rootfs, and what was mounted below it before.
    host_mounts: Option<(PathBuf, Vec<PathBuf>)>,
    keep: bool,
}

impl Made {
    /// Has a child take it back: mounts and cgroups take their time.
    fn undo(mut self) -> Result<chore::Chore> {
        let undone = chore::start(|| {
            // Its descriptors have not come along.
            let cgroup = self.cgroup.as_ref().map(|cgroup| Cgroup::open(cgroup.paths())).transpose()?;
            self.remove(cgroup.as_ref());
            self.unit.as_ref().map_or(Ok(()), Unit::stop)?;
            self.dir.remove()
        })?;
        self.keep = true;
        Ok(undone)
    }

    fn remove(&self, cgroup: Option<&Cgroup>) {
        if let Some((rootfs, before)) = &self.host_mounts {
            unmount_below(rootfs, before);
        }
        if let Some(cgroup) = cgroup
            && let Err(err) = cgroup.kill(libc::SIGKILL).and_then(|()| cgroup.remove())
        {
            log::warn!("undo create: {err}");
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        self.remove(self.cgroup.as_ref());
        // systemd may take its time, and the caller has others to look after.
        if let Some(unit) = self.unit.take()
            && let Err(err) = chore::start(move || unit.stop())
        {
            log::warn!("undo create: {err}");
        }
        if let Some(Err(err)) = self.rdt.as_ref().map(Group::remove) {
            log::warn!("undo create: {err}");
        }
        if let Err(err) = self.dir.remove() {
            log::warn!("undo create: {err}");
        }
    }
}

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

/// A start under way; ends when the user's program runs and the poststart hooks have run.
#[derive(Debug)]
pub struct Starting {
    channel: Option<Channel>,
    running: Option<Running>,
    hooks: std::collections::VecDeque<(usize, Hook)>,
    hook_state: Vec<u8>,
    program: String,
    dir: Dir,
    pid: i32,
}

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
}

/// An exec under way; ends when the user's program runs.
#[derive(Debug)]
pub struct Execing {
    birth: exec::Birth,
    tree: Option<Tree>,
}

/// The cgroup of an exec process and its descendants: a part of its container's. Dropped, it is killed and removed.
#[derive(Debug)]
pub struct Tree(Cgroup);

impl Tree {
    /// Kills what is left in it.
    pub fn kill(&self) -> Result<()> {
        self.0.kill(libc::SIGKILL)
    }

    /// True when nothing is left in it; it is removed then.
    pub fn remove_if_empty(&self) -> bool {
        self.0.remove_if_empty()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if !self.0.remove_if_empty() {
            let _ = self.0.kill(libc::SIGKILL);
            self.0.remove_if_empty();
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
    /// Its cgroup, if it has one of its own.
    pub tree: Option<Tree>,
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
    state: State,
    cgroup: Cgroup,
    /// The init's report socket, when this process alone can start it.
    gate: Option<Channel>,
    /// The init's pidfd, when this process has made it.
    init: Option<OwnedFd>,
}

/// Begins a create: plans, reserves the state directory, makes the cgroup, clones.
pub fn create(request: Create, spec: &Spec) -> Result<Creating> {
    let prepared = prepare(request, spec)?;
    match prepared.unit()? {
        None => prepared.begin().map(|birth| Creating(Some(Stage::Birth(birth)))),
        Some(held) => Ok(Creating(Some(Stage::Unit(Box::new(prepared), held)))),
    }
}

/// Plans a create and reserves the state directory.
fn prepare(request: Create, spec: &Spec) -> Result<Prepared> {
    check_id(&request.id)?;
    let mark = |step| request.trace.iter().for_each(|trace| trace.mark(Track::Parent, step));
    mark("plan");
    let bundle = absolute(&request.bundle)?;
    let mut plan = plan::build(
        &Request {
            id: &request.id,
            bundle: &bundle,
            terminal: matches!(request.stdio, Stdio::Terminal),
            systemd_cgroup: request.systemd_cgroup,
            no_pivot: request.no_pivot,
            no_new_keyring: request.no_new_keyring,
            rootless: request.rootless,
        },
        spec,
        &Cgroups::read()?,
    )?;
    let labelled = plan.process.apparmor.is_some() || plan.process.selinux.is_some();
    plan.process.pause = (request.pause && !labelled).then(|| request.id.clone());
    check_preserved(request.preserve_fds)?;
    mark("compile seccomp");
    let filter = plan.seccomp.as_ref().map(seccomp::compile).transpose()?;
    mark("make the state directory");
    let mut made = Made {
        dir: Dir::reserve(&request.root, &request.id)?,
        cgroup: None,
        unit: None,
        rdt: None,
        host_mounts: None,
        keep: false,
    };
    if request.notify {
        let dir = made.dir.path().join(NOTIFY);
        std::fs::create_dir(&dir).map_err(|e| Error::io(format!("make {:?}", dir.display().to_string()), &e))?;
    }
    if !plan.rootfs.mount_namespace {
        let rootfs = plan_rootfs(&plan);
        let before = mounts_below(&rootfs);
        made.host_mounts = Some((rootfs, before));
    }
    let mut state = new_state(&request.id, &bundle, spec, &plan, filter);
    state.skiff.config.clone_from(&request.config);
    if let Some(rdt) = &plan.rdt {
        let group = made.rdt.insert(Group::make(rdt, &request.id)?);
        state.intel_rdt_path = group.path().display().to_string();
        state.intel_rdt_mon_path = group.monitor_path().map(|path| path.display().to_string()).unwrap_or_default();
        state.skiff.rdt = Some(group.clone());
    }
    state.skiff.mounts_before = made.host_mounts.as_ref().map(|(_, before)| before.clone());
    Ok(Prepared {
        made,
        state,
        plan,
        gate: request.gate,
        stdio: match request.stdio {
            Stdio::Fds(fds) => Some(fds),
            Stdio::Inherit | Stdio::Terminal => None,
        },
        preserve_fds: request.preserve_fds,
        trace: request.trace.clone(),
    })
}

/// The cgroup that systemd has put a process into, of `/proc/PID/cgroup`.
fn own_cgroup(text: &str) -> Option<&str> {
    let of = |prefix: &str| text.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(prefix));
    of("name=systemd:").or_else(|| of(":"))
}

impl Prepared {
    /// Has systemd start the unit, if the cgroup is to be one.
    fn unit(&self) -> Result<Option<chore::Held>> {
        let Some(scope) = self.plan.cgroup.scope.clone() else { return Ok(None) };
        let devices = self.plan.cgroup.devices.clone();
        self.trace.iter().for_each(|trace| trace.mark(Track::Parent, "start the unit of systemd"));
        // systemd makes no unit without a process, and the init, which is cloned into it, is not there yet.
        let held = chore::hold(move || {
            systemd::start(&scope, devices.as_deref(), std::process::id())?;
            match std::fs::read_to_string("/proc/self/cgroup") {
                _ if scope.unit.ends_with(".slice") => Ok(String::new()),
                Ok(text) => Ok(own_cgroup(&text).unwrap_or_default().to_string()),
                Err(err) => Err(Error::io("read \"/proc/self/cgroup\"", &err)),
            }
        })?;
        Ok(Some(held))
    }

    /// The unit is there, with its cgroup at `path`.
    fn started(&mut self, path: &str) -> Result<()> {
        self.made.unit.clone_from(&self.state.skiff.unit);
        self.at(path)
    }

    /// Where systemd has put the unit: a user's systemd, or one in a container, has its units below its own cgroup.
    fn at(&mut self, path: &str) -> Result<()> {
        let Some(scope) = &self.plan.cgroup.scope else { return Ok(()) };
        if path.is_empty() {
            return Ok(());
        }
        let path = Path::new(path);
        if path.file_name() != Some(std::ffi::OsStr::new(&scope.unit)) {
            let text = format!("start unit {:?} of systemd: its process is in cgroup {path:?}", scope.unit);
            return Err(Error::new(Kind::System, text));
        }
        for dir in &mut self.plan.cgroup.dirs {
            dir.path = path.strip_prefix("/").unwrap_or(path).to_path_buf();
        }
        Ok(())
    }

    /// Makes the cgroup and clones the init.
    fn begin(mut self) -> Result<Box<Underway>> {
        let trace = self.trace.clone();
        let mark = |step| trace.iter().for_each(|trace| trace.mark(Track::Parent, step));
        mark("make the cgroup");
        let cgroup = if init::makes_own_namespaces(&self.plan).is_some() {
            self.made.cgroup.insert(Cgroup::begin(&self.plan.cgroup)?)
        } else {
            let cgroup = Cgroup::create(&self.plan.cgroup)?.with(self.state.skiff.rdt_doors());
            let cgroup = self.made.cgroup.insert(cgroup);
            mark("set the device policy");
            cgroup.set_devices(&self.plan.cgroup)?;
            cgroup
        };
        mark("clone the init");
        let gate = match self.gate {
            Gate::Fifo => Some(self.made.dir.make_gate()?),
            Gate::Socket => {
                self.made.dir.mark_gate()?;
                None
            }
        };
        let birth = init::begin(init::Begin {
            filter: self.state.skiff.seccomp.as_ref(),
            cgroup,
            stdio: self.stdio,
            preserve_fds: self.preserve_fds,
            gate,
            state: hook_state(&self.state),
            trace: self.trace.clone(),
            plan: self.plan,
        })?;
        self.state.cgroup_paths = self.made.cgroup.as_ref().map(|cgroup| cgroup.paths().clone()).unwrap_or_default();
        mark("wait for the init");
        Ok(Box::new(Underway { birth, made: self.made, state: self.state, gate: self.gate, trace: self.trace }))
    }
}

fn resources(spec: &Spec) -> LinuxResources {
    let mut resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    resources.set_devices(None);
    resources
}

fn plan_rootfs(plan: &Plan) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(plan.rootfs.path.to_bytes()))
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

fn absolute(bundle: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(bundle).map_err(|e| {
        let err = Error::io(format!("open bundle {:?}", bundle.display().to_string()), &e);
        if e.kind() == std::io::ErrorKind::NotFound { err.with_kind(Kind::NotFound) } else { err }
    })
}

fn check_preserved(count: u32) -> Result<()> {
    match (0..count).find(|at| !crate::sys::process::is_open(3 + *at as i32)) {
        Some(at) => {
            Err(Error::new(Kind::Invalid, format!("unable to stat preserved-fd {} (of {count}): not open", at + 1)))
        }
        None => Ok(()),
    }
}

fn new_state(id: &str, bundle: &Path, spec: &Spec, plan: &Plan, filter: Option<seccomp::Filter>) -> State {
    let annotations: BTreeMap<String, String> = spec.annotations().clone().unwrap_or_default().into_iter().collect();
    let mut labels = vec![format!("bundle={}", bundle.display())];
    labels.extend(annotations.iter().map(|(key, value)| format!("{key}={value}")));
    let created = time::OffsetDateTime::now_utc();
    let mut hooks = Hooks::default();
    hooks.set_poststart(plan.hooks.poststart().clone());
    hooks.set_poststop(plan.hooks.poststop().clone());
    State {
        id: id.to_string(),
        init_process_pid: 0,
        init_process_start: 0,
        created: created.format(&time::format_description::well_known::Rfc3339).unwrap_or_default(),
        config: Config { rootfs: plan_rootfs(plan), labels },
        rootless: plan.rootless,
        cgroup_paths: BTreeMap::new(),
        namespace_paths: BTreeMap::new(),
        external_descriptors: Vec::new(),
        intel_rdt_path: String::new(),
        intel_rdt_mon_path: String::new(),
        skiff: Own {
            bundle: bundle.to_path_buf(),
            annotations,
            owner: nix::unistd::getuid().as_raw(),
            program: plan.process.argv.as_slice()[0].to_string_lossy().into_owned(),
            namespaces: plan.namespaces.all(),
            own_pid_namespace: plan.namespaces.makes(Namespace::Pid),
            unit: plan.cgroup.scope.as_ref().map(|scope| Unit { name: scope.unit.clone(), user: scope.user }),
            hooks,
            seccomp: filter,
            keyring: plan.keyring.is_some(),
            mounts_before: None,
            resources: resources(spec),
            personality: plan.process.personality,
            memory_policy: plan.process.memory_policy.clone(),
            config: None,
            rdt: None,
        },
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

impl Underway {
    fn finish(mut self, born: init::Born) -> Result<Created> {
        self.trace.iter().for_each(|trace| trace.mark(Track::Parent, "save the state"));
        if let Err(err) = self.state.has_init(born.process.pid).and_then(|()| self.made.dir.save(&self.state)) {
            let _ = born.process.kill(libc::SIGKILL);
            let _ = born.process.wait();
            return Err(err);
        }
        let pidfd = born.process.pidfd.try_clone().map_err(|e| Error::io("hold the init process", &e))?;
        self.made.keep = true;
        self.trace.iter().for_each(|trace| trace.end(Track::Parent));
        let cgroup = self.made.cgroup.take().expect("a create has a cgroup");
        let container = Container {
            dir: self.made.dir.clone(),
            state: self.state,
            cgroup,
            gate: (self.gate == Gate::Socket).then_some(born.channel),
            init: Some(pidfd),
        };
        Ok(Created { container, init: born.process, console: born.console })
    }
}

impl Container {
    /// Reads `root/id/state.json`. `Kind::NotFound` with "container does not exist" when there is none.
    pub fn load(root: &Path, id: &str) -> Result<Container> {
        let dir = Dir::at(root, id)?;
        let state = dir.load()?;
        let cgroup = Cgroup::open(&state.cgroup_paths)?.with(state.skiff.rdt_doors());
        Ok(Container { dir, state, cgroup, gate: None, init: None })
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
        self.state = self.dir.load()?;
        Ok(())
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A pidfd of the living init.
    fn init(&self) -> Result<OwnedFd> {
        let gone = || Error::new(Kind::NotFound, CONTAINER_NOT_RUNNING);
        if let Some(init) = &self.init {
            let own = init.try_clone().map_err(|e| Error::io("open the init process", &e))?;
            return if self.alive() { Ok(own) } else { Err(gone()) };
        }
        let fd = match pidfd_open(self.state.init_process_pid) {
            Err(Errno::ESRCH) => return Err(gone()),
            other => other.map_err(|errno| Error::sys("open the init process", errno))?,
        };
        // Only now, with the process pinned, its start time tells that it is the one that was meant.
        if self.alive() { Ok(fd) } else { Err(gone()) }
    }

    /// A descriptor that is readable when the init has exited; any process may wait for it.
    pub fn watch(&self) -> Result<OwnedFd> {
        self.init()
    }

    /// Opens the gate. Errors when the container is not created (runc's texts).
    pub fn start(&mut self) -> Result<Starting> {
        let refuse = |text: &str| Err(Error::new(Kind::FailedPrecondition, text));
        match self.status()? {
            Status::Created => {}
            Status::Stopped => return refuse("cannot start a container that has stopped"),
            Status::Running => return refuse("cannot start an already running container"),
            other => return refuse(&format!("cannot start a container in the {other} state")),
        }
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
        check_preserved(request.preserve_fds)?;
        let terminal = matches!(request.stdio, Stdio::Terminal);
        let mut plan = plan::process::plan("process", &request.process, terminal)?;
        let own = &self.state.skiff;
        plan.personality = own.personality;
        plan.memory_policy = own.memory_policy.clone();
        let keyring = own.keyring.then(|| plan::cstring("id", format!("_ses.{}", self.state.id))).transpose()?;
        exec::begin(exec::Begin {
            plan,
            filter: own.seccomp.as_ref(),
            cgroup: below.as_ref().unwrap_or(&self.cgroup),
            part: tree.as_ref().map(|tree| &tree.0),
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
        .map(|birth| Execing { birth, tree })
    }

    /// A cgroup of its own below the container's, for an exec process. None where it cannot be made.
    pub fn tree(&self, name: &str) -> Option<Tree> {
        self.cgroup.part(name).ok().map(Tree)
    }

    /// Signals the init, or every process of the cgroup.
    pub fn kill(&self, signal: i32, all: bool) -> Result<()> {
        let shared = !self.has_own_pid_namespace();
        if all || (shared && signal == libc::SIGKILL) {
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
        self.dir.save(&self.state)
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
        self.cgroup.kill(libc::SIGKILL)?;
        if let Some(unit) = &self.state.skiff.unit
            && let Err(err) = unit.stop()
        {
            // The container goes also when systemd does not answer.
            log::warn!("{err}");
        }
        self.cgroup.remove()?;
        if let Some(Err(err)) = self.state.skiff.rdt.as_ref().map(Group::remove) {
            log::warn!("{err}");
        }
        if let Some(before) = &self.state.skiff.mounts_before {
            unmount_below(self.rootfs(), before);
        }
        self.dir.remove()?;
        for (at, hook) in self.state.skiff.hooks.poststop().iter().flatten().enumerate() {
            let state = hook_json(&self.state, 0, "stopped");
            if let Err(err) = hooks::start("poststop", at, hook, &state, &[]).and_then(Running::finish) {
                log::warn!("{err}");
            }
        }
        Ok(())
    }

    /// Deletes a stopped container where nothing takes time: no hooks, no systemd, no resctrl, no process left. False when something
    /// would; [`Container::delete`] is due then.
    pub fn delete_at_once(&self) -> Result<bool> {
        let own = &self.state.skiff;
        let slow = own.unit.is_some() || own.mounts_before.is_some() || own.rdt.is_some();
        let slow = slow || own.hooks.poststop().is_some();
        if slow || self.alive() || !self.cgroup.remove_if_empty() {
            return Ok(false);
        }
        self.dir.remove().map(|()| true)
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

/// The limits after an update, and what is to be written for it: quota and period of the processor are one setting.
fn merge(old: &LinuxResources, changes: &LinuxResources) -> Result<(LinuxResources, LinuxResources)> {
    let json =
        |resources: &LinuxResources| serde_json::to_value(resources).map_err(|e| Error::invalid("linux.resources", e));
    let back = |value| serde_json::from_value(value).map_err(|e| Error::invalid("linux.resources", e));
    let (mut merged, mut writes) = (json(old)?, json(changes)?);
    overlay(&mut merged, &writes);
    if let Some(cpu) = writes.get_mut("cpu").and_then(|cpu| cpu.as_object_mut()) {
        let set = |cpu: &serde_json::Map<String, serde_json::Value>, key: &str| {
            cpu.get(key).and_then(serde_json::Value::as_i64).is_some_and(|n| n != 0)
        };
        for (one, other) in [("quota", "period"), ("period", "quota")] {
            if set(cpu, one)
                && !set(cpu, other)
                && let Some(value) = old_number(old, other)
            {
                cpu.insert(other.into(), value);
            }
        }
    }
    Ok((back(merged)?, back(writes)?))
}

fn old_number(old: &LinuxResources, key: &str) -> Option<serde_json::Value> {
    let cpu = old.cpu().as_ref()?;
    match key {
        "quota" => cpu.quota().map(Into::into),
        _ => cpu.period().map(Into::into),
    }
}

/// Puts the fields of `over` into `under`, objects field by field.
fn overlay(under: &mut serde_json::Value, over: &serde_json::Value) {
    match (under.as_object_mut(), over.as_object()) {
        (Some(fields), Some(changes)) => {
            for (key, value) in changes {
                overlay(fields.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        _ => *under = over.clone(),
    }
}

/// Container `id` does not exist: for callers that keep their own table.
pub fn does_not_exist() -> Error {
    Error::new(Kind::NotFound, CONTAINER_DOES_NOT_EXIST)
}

impl Creating {
    fn undo(&mut self, made: Made, err: Error) -> Result<Option<Created>> {
        match made.undo() {
            Ok(chore) => {
                self.0 = Some(Stage::Undo(chore, err));
                Ok(None)
            }
            Err(undo) => {
                log::warn!("undo create: {undo}");
                Err(err)
            }
        }
    }
}

impl Pending for Creating {
    type Output = Created;

    fn fd(&self) -> BorrowedFd<'_> {
        match self.0.as_ref().expect("a finished create is not waited for") {
            Stage::Unit(_, held) => held.fd(),
            Stage::Birth(underway) => underway.birth.fd(),
            Stage::Dying(_, process, _) => process.pidfd.as_fd(),
            Stage::Undo(chore, _) => chore.fd(),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match &self.0 {
            Some(Stage::Birth(underway)) => underway.birth.deadline(),
            // The chore has one itself.
            _ => None,
        }
    }

    fn advance(&mut self) -> Result<Option<Created>> {
        let ended = || Error::new(Kind::System, "create has ended already");
        let mut underway = match self.0.take().ok_or_else(ended)? {
            Stage::Birth(underway) => underway,
            Stage::Dying(underway, process, err) => {
                if process.try_wait()?.is_none() {
                    self.0 = Some(Stage::Dying(underway, process, err));
                    return Ok(None);
                }
                return self.undo(underway.made, err);
            }
            Stage::Undo(mut chore, err) => {
                match chore.advance() {
                    Ok(None) => {
                        self.0 = Some(Stage::Undo(chore, err));
                        return Ok(None);
                    }
                    Ok(Some(())) => {}
                    Err(undo) => log::warn!("undo create: {undo}"),
                }
                return Err(err);
            }
            Stage::Unit(mut prepared, mut held) => match held.advance()? {
                None => {
                    self.0 = Some(Stage::Unit(prepared, held));
                    return Ok(None);
                }
                Some(path) => {
                    prepared.started(&path)?;
                    // Only now may the process go that has kept the unit.
                    prepared.begin()?
                }
            },
        };
        match underway.birth.advance() {
            Ok(Some(born)) => underway.finish(born).map(Some),
            Ok(None) => {
                self.0 = Some(Stage::Birth(underway));
                Ok(None)
            }
            // Who has a gate of its own has others to look after, and waits for nothing here.
            Err(err) if underway.gate == Gate::Socket => match underway.birth.give_up() {
                Some(process) => {
                    self.0 = Some(Stage::Dying(underway, process, err));
                    Ok(None)
                }
                None => self.undo(underway.made, err),
            },
            Err(err) => Err(err),
        }
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
        self.running.as_ref().and_then(Running::deadline)
    }

    fn advance(&mut self) -> Result<Option<()>> {
        if let Some(channel) = &mut self.channel {
            match channel.executed()? {
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
                match running.poll() {
                    Ok(None) => return Ok(None),
                    Ok(Some(())) => self.running = None,
                    Err(err) => {
                        // A failed poststart hook stops the container (runtime spec 1.3, runtime.md, "Lifecycle").
                        if let Ok(init) = pidfd_open(self.pid) {
                            let _ = crate::sys::clone::pidfd_kill(init.as_fd(), libc::SIGKILL);
                        }
                        return Err(err);
                    }
                }
            }
            let Some((at, hook)) = self.hooks.pop_front() else { return Ok(Some(())) };
            self.running = Some(hooks::start("poststart", at, &hook, &self.hook_state, &[])?);
        }
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
        None
    }

    fn advance(&mut self) -> Result<Option<Execed>> {
        let born = self.birth.advance()?;
        Ok(born.map(|(process, console)| Execed { process, console, tree: self.tree.take() }))
    }
}
