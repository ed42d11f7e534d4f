//! Create: from a request to an init that waits at its gate.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use oci_spec::runtime::{Hooks, LinuxNamespaceType as Namespace, LinuxResources, Spec};

use super::{Container, Gate, Stdio, check_preserved, hook_state, mounts_below, unmount_below};
use crate::cgroup::Cgroup;
use crate::cgroup::systemd::{self, Unit};
use crate::host::Cgroups;
use crate::launch::{Pending, Process, chore, init, seccomp};
use crate::plan::{self, Plan, Request};
use crate::rdt::Group;
use crate::state::{Config, Dir, Own, State, check_id};
use crate::trace::{Trace, Track};
use crate::{Error, Kind, Result};

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
pub(super) struct Prepared {
    pub(super) made: Made,
    pub(super) state: State,
    pub(super) plan: Plan,
    pub(super) gate: Gate,
    pub(super) stdio: Option<[OwnedFd; 3]>,
    pub(super) preserve_fds: u32,
    pub(super) trace: Option<Trace>,
}

#[derive(Debug)]
struct Underway {
    birth: init::Birth,
    made: Made,
    state: State,
    gate: Gate,
    trace: Option<Trace>,
    /// The pid of the state that has been staged.
    staged: i32,
}

/// What a create leaves in the file system. Dropped, it is removed.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) dir: Dir,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) unit: Option<Unit>,
    pub(super) rdt: Option<Group>,
    /// Without a mount namespace: the rootfs, and what was mounted below it before.
    pub(super) host_mounts: Option<(PathBuf, Vec<PathBuf>)>,
    pub(super) keep: bool,
}

impl Made {
    /// Has a child take it back: mounts and cgroups take their time.
    fn undo(mut self) -> Result<chore::Chore> {
        let undone = chore::start(|| {
            // Its descriptors have not come along.
            let cgroup = self.cgroup.as_ref().map(|cgroup| Cgroup::open(cgroup.paths())).transpose()?;
            self.remove(cgroup.as_ref());
            let stopped = self.unit.as_ref().map_or(Ok(()), Unit::stop);
            self.dir.remove().and(stopped)
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
        if let Some(Err(err)) = self.rdt.as_ref().map(Group::remove) {
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

/// Begins a create: plans, reserves the state directory, makes the cgroup, clones.
pub fn create(request: Create, spec: &Spec) -> Result<Creating> {
    let waits = request.gate == Gate::Socket;
    let prepared = prepare(request, spec, waits)?;
    match prepared.unit()? {
        None => prepared.begin().map(|birth| Creating(Some(Stage::Birth(birth)))),
        Some(held) => Ok(Creating(Some(Stage::Unit(Box::new(prepared), held)))),
    }
}

/// Plans a create and reserves the state directory. `waits`: for a start that this process alone can give.
pub(super) fn prepare(request: Create, spec: &Spec, waits: bool) -> Result<Prepared> {
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
        dir: Dir::reserve(&request.root, &request.id, waits)?,
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
    pub(super) fn unit(&self) -> Result<Option<chore::Held>> {
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
    pub(super) fn started(&mut self, path: &str) -> Result<()> {
        self.made.unit.clone_from(&self.state.skiff.unit);
        self.at(path)
    }

    /// Where systemd has put the unit: a user's systemd, or one in a container, has its units below its own cgroup.
    pub(super) fn at(&mut self, path: &str) -> Result<()> {
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
        let gate = (self.gate == Gate::Fifo).then(|| self.made.dir.make_gate()).transpose()?;
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
        mark("stage the state");
        let mut underway =
            Underway { birth, made: self.made, state: self.state, gate: self.gate, trace: self.trace, staged: 0 };
        // While the init is busy. One that clones the real init comes later by its pid.
        underway.stage(underway.birth.pid())?;
        mark("wait for the init");
        Ok(Box::new(underway))
    }
}

fn resources(spec: &Spec) -> LinuxResources {
    let mut resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    resources.set_devices(None);
    resources
}

pub(super) fn plan_rootfs(plan: &Plan) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(plan.rootfs.path.to_bytes()))
}

pub(super) fn absolute(bundle: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(bundle).map_err(|e| {
        let err = Error::io(format!("open bundle {:?}", bundle.display().to_string()), &e);
        if e.kind() == std::io::ErrorKind::NotFound { err.with_kind(Kind::NotFound) } else { err }
    })
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

impl Underway {
    fn stage(&mut self, pid: i32) -> Result<()> {
        self.state.has_init(pid)?;
        self.staged = pid;
        self.made.dir.stage(&self.state)
    }

    fn finish(mut self, born: init::Born) -> Result<Created> {
        self.trace.iter().for_each(|trace| trace.mark(Track::Parent, "save the state"));
        let pid = born.process.pid;
        let staged = if self.staged == pid { Ok(()) } else { self.stage(pid) };
        if let Err(err) = staged.and_then(|()| self.made.dir.commit()) {
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
