//! Create: from a request to an init that waits at its gate.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Hooks, LinuxNamespaceType as Namespace, LinuxResources, Spec};

use super::{Container, Gate, Stdio, check_preserved, hook_json, hook_state, mounts_below, unmount_below};
use crate::cgroup::Cgroup;
use crate::cgroup::systemd::{self, Unit};
use crate::hooks;
use crate::host::Cgroups;
use crate::launch::{Pending, Process, chore, hang, init, programs, seccomp};
use crate::plan::{self, Plan, Request};
use crate::rdt::Group;
use crate::state::{Config, ConfigCgroup, ConfigNamespace, Dir, Own, State, check_id, runcs_name};
use crate::trace::{Trace, Track};
use crate::{Error, Kind, Result, limits};

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
    /// A child opens the sources of mounts.
    Sources(Box<Prepared>, Box<init::Sources>),
    /// The init is on its way to its gate.
    Birth(Box<Underway>),
    /// It has failed, and its init is on its way out.
    Dying(Box<Made>, Process, Error, Instant),
    /// What it had made is being taken back.
    Undo(Box<Made>, chore::Chore, Error),
    /// It has been given up; what it had made is still there.
    Left(Leftover),
}

/// What a create that has failed has left, because something hung: its init, or the chore that takes it back.
#[derive(Debug)]
pub struct Leftover {
    made: Box<Made>,
    hangs: OwnedFd,
}

impl Leftover {
    fn new(mut made: Box<Made>, hangs: BorrowedFd<'_>) -> Result<Leftover> {
        made.keep = true;
        let hangs = hangs.try_clone_to_owned().map_err(|e| Error::io("hold the process that hangs", &e))?;
        Ok(Leftover { made, hangs })
    }

    /// Readable when what hung has ended. Before that there is no sense in another try.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.hangs.as_fd()
    }

    /// Tries again.
    pub fn undo(&mut self) -> Result<chore::Chore> {
        let chore = self.made.undo()?;
        self.hangs = chore.end().try_clone_to_owned().map_err(|e| Error::io("hold the process that hangs", &e))?;
        Ok(chore)
    }
}

/// A create whose cgroup is still to be made.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) made: Box<Made>,
    pub(super) state: State,
    pub(super) plan: Plan,
    pub(super) gate: Gate,
    pub(super) stdio: Option<[OwnedFd; 3]>,
    pub(super) preserve_fds: u32,
    pub(super) trace: Option<Trace>,
    /// The process that keeps the unit of systemd until the init is in it.
    pub(super) held: Option<chore::Held>,
}

#[derive(Debug)]
struct Underway {
    birth: init::Birth,
    made: Box<Made>,
    state: State,
    gate: Gate,
    trace: Option<Trace>,
    /// The pid of the state that has been staged.
    staged: i32,
    /// When it is given up.
    deadline: Option<Instant>,
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
    /// Hooks that are due when it is gone, and what they get.
    pub(super) poststop: Option<(Vec<Hook>, Vec<u8>)>,
    /// Its maker has others to look after, and waits for nothing here.
    pub(super) waits: bool,
    pub(super) keep: bool,
}

impl Made {
    /// Has a child take it back: mounts and cgroups take their time.
    pub(super) fn undo(&mut self) -> Result<chore::Chore> {
        let what = format!("take back what the create of {:?} has made", self.dir.path().display().to_string());
        let undone = chore::start(what, limits::REMOVE + self.poststop_time(), || {
            // Its descriptors have not come along.
            let cgroup = self.cgroup.as_ref().map(|cgroup| Cgroup::open(&cgroup.paths())).transpose()?;
            let removed = self.remove(cgroup.as_ref());
            let stopped = self.unit.as_ref().map_or(Ok(()), Unit::stop);
            self.dir.remove().and(removed).and(stopped)?;
            self.run_poststop();
            Ok(())
        })?;
        self.keep = true;
        Ok(undone)
    }

    /// Moves it out of where it is; what stays there is nothing to remove.
    pub(super) fn take(&mut self) -> Box<Made> {
        let dir = self.dir.clone();
        let rest = Made {
            dir,
            cgroup: None,
            unit: None,
            rdt: None,
            host_mounts: None,
            poststop: None,
            waits: false,
            keep: true,
        };
        Box::new(std::mem::replace(self, rest))
    }

    fn remove(&self, cgroup: Option<&Cgroup>) -> Result<()> {
        if let Some((rootfs, before)) = &self.host_mounts {
            unmount_below(rootfs, before);
        }
        if let Some(Err(err)) = self.rdt.as_ref().map(Group::remove) {
            log::warn!("undo create: {err}");
        }
        cgroup.map_or(Ok(()), |cgroup| cgroup.kill(libc::SIGKILL).and_then(|()| cgroup.remove()))
    }

    fn poststop_time(&self) -> Duration {
        hooks::time(self.poststop.as_ref().map(|(list, _)| list.as_slice()))
    }

    fn run_poststop(&self) {
        if let Some((list, state)) = &self.poststop {
            hooks::run_poststop(list, state);
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(err) = self.remove(self.cgroup.as_ref()) {
            log::warn!("undo create: {err}");
        }
        // systemd may take its time, and the caller has others to look after.
        if let Some(unit) = self.unit.take()
            && let Err(err) = chore::start("stop the unit of systemd", limits::SYSTEMD, move || unit.stop())
        {
            log::warn!("undo create: {err}");
        }
        if let Err(err) = self.dir.remove() {
            log::warn!("undo create: {err}");
        }
        if self.poststop.is_none() {
            return;
        }
        if !self.waits {
            return self.run_poststop();
        }
        if let Err(err) = chore::start("poststop hooks", self.poststop_time(), || {
            self.run_poststop();
            Ok(())
        }) {
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

/// Begins a create: plans, reserves the state directory, makes the cgroup, clones. With a socket as gate, what has been
/// made when it fails is taken back by a child, and the error comes after that.
pub fn create(request: Create, spec: &Spec) -> Result<Creating> {
    let waits = request.gate == Gate::Socket;
    match prepare(request, spec, waits) {
        Ok(prepared) => Creating::begin(prepared, waits),
        Err((Some(made), err)) if waits => Creating::undone(made, err),
        Err((_, err)) => Err(err),
    }
}

/// An error, and what had been made before it.
pub(super) type Failed = (Option<Box<Made>>, Error);

/// Plans a create and reserves the state directory. `waits`: for a start that this process alone can give.
pub(super) fn prepare(request: Create, spec: &Spec, waits: bool) -> std::result::Result<Prepared, Failed> {
    let (plan, filter, bundle) = planned(&request, spec).map_err(|err| (None, err))?;
    request.trace.iter().for_each(|trace| trace.mark(Track::Parent, "make the state directory"));
    let mut made = Box::new(Made {
        dir: Dir::reserve(&request.root, &request.id, waits).map_err(|err| (None, err))?,
        cgroup: None,
        unit: None,
        rdt: None,
        host_mounts: None,
        poststop: None,
        waits,
        keep: false,
    });
    let mut state = new_state(&request.id, &bundle, spec, &plan, filter);
    state.skiff.config.clone_from(&request.config);
    match complete(&request, &plan, &mut made, &mut state) {
        Ok(()) => Ok(Prepared {
            made,
            state,
            plan,
            gate: request.gate,
            stdio: match request.stdio {
                Stdio::Fds(fds) => Some(fds),
                Stdio::Inherit | Stdio::Terminal => None,
            },
            preserve_fds: request.preserve_fds,
            trace: request.trace,
            held: None,
        }),
        Err(err) => Err((Some(made), err)),
    }
}

/// The plan, the compiled filter, and the bundle's absolute path.
fn planned(request: &Create, spec: &Spec) -> Result<(Plan, Option<seccomp::Filter>, PathBuf)> {
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
    // A new user namespace gives all of them.
    if let Some(capabilities) = plan.process.capabilities.filter(|_| !plan.namespaces.has(Namespace::User)) {
        capabilities.warn_of_missing(crate::sys::process::permitted().unwrap_or(u64::MAX));
    }
    let labelled = plan.process.apparmor.is_some() || plan.process.selinux.is_some();
    plan.process.pause = (request.pause && !labelled).then(|| request.id.clone());
    check_preserved(request.preserve_fds)?;
    mark("compile seccomp");
    let filter = plan.seccomp.as_ref().map(|profile| programs::filter(profile, &request.root)).transpose()?;
    Ok((plan, filter, bundle))
}

/// What is made with the state directory.
fn complete(request: &Create, plan: &Plan, made: &mut Made, state: &mut State) -> Result<()> {
    if request.notify {
        let dir = made.dir.path().join(NOTIFY);
        std::fs::create_dir(&dir).map_err(|e| Error::io(format!("make {:?}", dir.display().to_string()), &e))?;
    }
    if !plan.rootfs.mount_namespace {
        let rootfs = plan_rootfs(plan);
        let before = mounts_below(&rootfs);
        made.host_mounts = Some((rootfs, before));
    }
    if let Some(rdt) = &plan.rdt {
        let group = made.rdt.insert(Group::make(rdt, &request.id)?);
        state.intel_rdt_path = group.path().display().to_string();
        state.intel_rdt_mon_path = group.monitor_path().map(|path| path.display().to_string()).unwrap_or_default();
        state.skiff.rdt = Some(group.clone());
    }
    state.skiff.mounts_before = made.host_mounts.as_ref().map(|(_, before)| before.clone());
    Ok(())
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
        let what = format!("start unit {:?} of systemd", scope.unit);
        let held = chore::hold(what, limits::SYSTEMD, move || {
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
    fn begin(self, opened: Option<Vec<(usize, OwnedFd)>>) -> std::result::Result<Box<Underway>, Failed> {
        let Prepared { mut made, mut state, plan, gate, stdio, preserve_fds, trace, held: _held } = self;
        let mark = |step| trace.iter().for_each(|trace| trace.mark(Track::Parent, step));
        let deadline = (gate == Gate::Socket).then(|| Instant::now() + birth_limit(&plan));
        let poststop = state.skiff.hooks.poststop().clone();
        made.poststop = poststop.map(|list| (list, hook_json(&state, 0, "stopped")));
        let cloned = make_cgroup(&plan, &mut made, &state, &mark).and_then(|()| {
            mark("clone the init");
            let fifos = (gate == Gate::Fifo).then(|| made.dir.make_gate()).transpose()?;
            let cgroup = made.cgroup.as_mut().expect("it has just been made");
            init::begin(init::Begin {
                filter: state.skiff.seccomp.as_ref(),
                cgroup,
                stdio,
                preserve_fds,
                gate: fifos,
                state: hook_state(&state),
                trace: trace.clone(),
                opened,
                plan,
            })
        });
        let birth = match cloned {
            Ok(birth) => birth,
            Err(err) => return Err((Some(made), err)),
        };
        state.cgroup_paths = made.cgroup.as_ref().map(Cgroup::paths).unwrap_or_default();
        mark("stage the state");
        let mut underway = Box::new(Underway { birth, made, state, gate, trace: trace.clone(), staged: 0, deadline });
        // While the init is busy. One that clones the real init comes later by its pid.
        match underway.stage(underway.birth.pid()) {
            Ok(()) => mark("wait for the init"),
            Err(err) => return Err((Some(underway.made), err)),
        }
        Ok(underway)
    }
}

/// The cgroup, and for an init that makes no namespaces by itself its device policy.
fn make_cgroup(plan: &Plan, made: &mut Made, state: &State, mark: &dyn Fn(&'static str)) -> Result<()> {
    mark("make the cgroup");
    if init::makes_own_namespaces(plan).is_some() {
        made.cgroup = Some(Cgroup::begin(&plan.cgroup)?);
        return Ok(());
    }
    let cgroup = made.cgroup.insert(Cgroup::create(&plan.cgroup)?.with(state.skiff.rdt_doors()));
    if cgroup.is_nothing() && !plan.namespaces.has(Namespace::Pid) {
        log::warn!(
            "a container without a cgroup and without a pid namespace of its own cannot be killed as a whole. Such \
             configuration is strongly discouraged"
        );
    }
    mark("set the device policy");
    cgroup.set_devices(&plan.cgroup)
}

/// How long an init may take to its gate: what it does itself, and its hooks.
fn birth_limit(plan: &Plan) -> Duration {
    let hooks = &plan.hooks;
    let all = [hooks.prestart(), hooks.create_runtime(), hooks.create_container()];
    limits::within(limits::BIRTH) + all.into_iter().map(|list| hooks::time(list.as_deref())).sum::<Duration>()
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

fn config_namespaces(plan: &Plan) -> Vec<ConfigNamespace> {
    let one = |kind: &Namespace| {
        let joined = plan.namespaces.joined(*kind).map(|join| join.path.to_string_lossy().into_owned());
        let there = joined.is_some() || plan.namespaces.makes(*kind);
        there.then(|| ConfigNamespace { kind: runcs_name(*kind), path: joined.unwrap_or_default() })
    };
    plan::namespaces::KINDS.iter().filter_map(one).collect()
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
        config: Config {
            rootfs: plan_rootfs(plan),
            labels,
            cgroups: ConfigCgroup {
                path: plan.cgroup.dirs.first().map(|dir| dir.path.clone()).unwrap_or_default(),
                memory: 0,
            },
            namespaces: config_namespaces(plan),
        },
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
            start_hooks: hooks::time(plan.hooks.start_container().as_deref()).as_secs(),
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

/// What is left of a create that failed at its end: an init is among it.
type Unfinished = (Box<Made>, Process, Error);

impl Underway {
    fn stage(&mut self, pid: i32) -> Result<()> {
        self.state.has_init(pid)?;
        self.staged = pid;
        self.made.dir.stage(&self.state)
    }

    /// After an error the process is still to be killed.
    fn finish(mut self, born: init::Born) -> std::result::Result<Created, Box<Unfinished>> {
        self.trace.iter().for_each(|trace| trace.mark(Track::Parent, "save the state"));
        let pid = born.process.pid;
        let staged = if self.staged == pid { Ok(()) } else { self.stage(pid) };
        let hold = || born.process.pidfd.try_clone().map_err(|e| Error::io("hold the init process", &e));
        let pidfd = match staged.and_then(|()| self.made.dir.commit()).and_then(|()| hold()) {
            Ok(pidfd) => pidfd,
            Err(err) => return Err(Box::new((self.made, born.process, err))),
        };
        self.made.keep = true;
        self.trace.iter().for_each(|trace| trace.end(Track::Parent));
        // With the plan: what lives on gets its place.
        drop(self.birth);
        let cgroup = self.made.cgroup.take().expect("a create has a cgroup");
        let container = Container {
            dir: self.made.dir.clone(),
            state: self.state.lean(),
            cgroup,
            gate: (self.gate == Gate::Socket).then_some(born.channel),
            init: Some(pidfd),
        };
        Ok(Created { container, init: born.process, console: born.console })
    }
}

impl Creating {
    fn begin(prepared: Prepared, waits: bool) -> Result<Creating> {
        match prepared.unit() {
            Ok(None) => Creating::clone(prepared, waits),
            Ok(Some(held)) => Ok(Creating(Some(Stage::Unit(Box::new(prepared), held)))),
            Err(err) if waits => Creating::undone(prepared.made, err),
            Err(err) => Err(err),
        }
    }

    fn clone(prepared: Prepared, waits: bool) -> Result<Creating> {
        let sources = if waits { init::Sources::open(&prepared.plan) } else { Ok(None) };
        match sources {
            Ok(None) => Creating::cloned(prepared.begin(None), waits),
            Ok(Some(sources)) => Ok(Creating(Some(Stage::Sources(Box::new(prepared), Box::new(sources))))),
            Err(err) => Creating::undone(prepared.made, err),
        }
    }

    fn cloned(begun: std::result::Result<Box<Underway>, Failed>, waits: bool) -> Result<Creating> {
        match begun {
            Ok(underway) => Ok(Creating(Some(Stage::Birth(underway)))),
            Err((Some(made), err)) if waits => Creating::undone(made, err),
            Err((_, err)) => Err(err),
        }
    }

    /// One that has failed: who has others to look after waits for nothing here.
    fn undone(mut made: Box<Made>, err: Error) -> Result<Creating> {
        match made.undo() {
            Ok(chore) => Ok(Creating(Some(Stage::Undo(made, chore, err)))),
            Err(undo) => {
                log::warn!("undo create: {undo}");
                Err(err)
            }
        }
    }

    /// What it has left, when it has failed and something hung.
    pub fn leftover(&mut self) -> Option<Leftover> {
        match self.0.take()? {
            Stage::Left(left) => Some(left),
            _ => None,
        }
    }

    /// Goes on as `other`.
    fn go_on(&mut self, other: Creating) -> Result<Option<Created>> {
        *self = other;
        self.advance()
    }

    fn leave(&mut self, made: Box<Made>, hangs: BorrowedFd<'_>) {
        match Leftover::new(made, hangs) {
            Ok(left) => self.0 = Some(Stage::Left(left)),
            Err(err) => log::warn!("undo create: {err}"),
        }
    }
}

impl Pending for Creating {
    type Output = Created;

    fn fd(&self) -> BorrowedFd<'_> {
        match self.0.as_ref().expect("a finished create is not waited for") {
            Stage::Unit(_, held) => held.fd(),
            Stage::Sources(_, sources) => sources.fd(),
            Stage::Birth(underway) => underway.birth.fd(),
            Stage::Dying(_, process, ..) => process.pidfd.as_fd(),
            Stage::Undo(_, chore, _) => chore.fd(),
            Stage::Left(left) => left.fd(),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.0.as_ref()? {
            Stage::Unit(_, held) => Some(held.deadline()),
            Stage::Sources(_, sources) => sources.deadline(),
            Stage::Birth(underway) => [underway.birth.deadline(), underway.deadline].into_iter().flatten().min(),
            Stage::Dying(.., deadline) => Some(*deadline),
            Stage::Undo(_, chore, _) => chore.deadline(),
            Stage::Left(_) => None,
        }
    }

    fn advance(&mut self) -> Result<Option<Created>> {
        let ended = || Error::new(Kind::System, "create has ended already");
        match self.0.take().ok_or_else(ended)? {
            Stage::Birth(underway) => self.advance_birth(underway),
            Stage::Dying(made, process, err, deadline) => match process.try_wait() {
                Ok(Some(_)) => self.go_on(Creating::undone(made, err)?),
                Ok(None) if Instant::now() >= deadline => {
                    self.leave(made, process.pidfd.as_fd());
                    let place = hang::place(process.pid);
                    Err(err.context(format!("init process {} does not die{place}", process.pid)))
                }
                Ok(None) => {
                    self.0 = Some(Stage::Dying(made, process, err, deadline));
                    Ok(None)
                }
                // Somebody else has reaped it.
                Err(_) => self.go_on(Creating::undone(made, err)?),
            },
            Stage::Undo(made, mut chore, err) => {
                match chore.advance() {
                    Ok(None) => {
                        self.0 = Some(Stage::Undo(made, chore, err));
                        return Ok(None);
                    }
                    Ok(Some(())) => {}
                    Err(undo) => {
                        log::warn!("undo create: {undo}");
                        self.leave(made, chore.end());
                    }
                }
                Err(err)
            }
            Stage::Unit(mut prepared, mut held) => {
                let waits = prepared.gate == Gate::Socket;
                match held.advance().and_then(|path| path.map(|path| prepared.started(&path)).transpose()) {
                    Ok(None) => {
                        self.0 = Some(Stage::Unit(prepared, held));
                        Ok(None)
                    }
                    Ok(Some(())) => {
                        prepared.held = Some(held);
                        self.go_on(Creating::clone(*prepared, waits)?)
                    }
                    Err(err) if waits => self.go_on(Creating::undone(prepared.made, err)?),
                    Err(err) => Err(err),
                }
            }
            Stage::Sources(prepared, mut sources) => match sources.advance() {
                Ok(None) => {
                    self.0 = Some(Stage::Sources(prepared, sources));
                    Ok(None)
                }
                Ok(Some(opened)) => self.go_on(Creating::cloned(prepared.begin(Some(opened)), true)?),
                Err(err) => self.go_on(Creating::undone(prepared.made, err)?),
            },
            Stage::Left(_) => Err(ended()),
        }
    }
}

impl Creating {
    /// Kills the init, and waits for its end.
    fn die(&mut self, made: Box<Made>, process: Process, err: Error) -> Option<Created> {
        let _ = process.kill(libc::SIGKILL);
        self.0 = Some(Stage::Dying(made, process, err, limits::from_now(limits::DEATH)));
        None
    }

    fn advance_birth(&mut self, mut underway: Box<Underway>) -> Result<Option<Created>> {
        let late = underway.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let err = match underway.birth.advance() {
            Ok(Some(born)) => {
                let waits = underway.gate == Gate::Socket;
                return match underway.finish(born) {
                    Ok(created) => Ok(Some(created)),
                    Err(unfinished) => {
                        let (made, process, err) = *unfinished;
                        if waits {
                            return Ok(self.die(made, process, err));
                        }
                        process.discard();
                        drop(made);
                        Err(err)
                    }
                };
            }
            Ok(None) if late => underway.birth.late(),
            Ok(None) => {
                self.0 = Some(Stage::Birth(underway));
                return Ok(None);
            }
            Err(err) => err,
        };
        // Who has a gate of its own has others to look after, and waits for nothing here.
        if underway.gate != Gate::Socket {
            return Err(err);
        }
        match underway.birth.give_up() {
            Some(process) => Ok(self.die(underway.made, process, err)),
            None => self.go_on(Creating::undone(underway.made, err)?),
        }
    }
}
