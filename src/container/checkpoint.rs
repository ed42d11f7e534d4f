//! Checkpoint and restore of containers: what CRIU has to know of their mounts, namespaces, streams and cgroups.

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::{Mode, SFlag};
use oci_spec::runtime::{Hook, LinuxNamespaceType as Namespace, Spec};

use super::create::{Made, Prepared, plan_rootfs, prepare};
use super::{Container, Create, Created, Gate, Status, hook_json};
use crate::criu::{self, Message, Options, Response, Session};
use crate::hooks;
use crate::launch::chore::{self, Chore};
use crate::launch::{self, Pending, Process};
use crate::plan::rootfs::MountKind;
use crate::plan::{self, Plan, Request};
use crate::sys::clone::pidfd_open;
use crate::sys::{mount, path};
use crate::{Error, Kind, Result, limits};

const DUMP_LOG: &str = "dump.log";
const RESTORE_LOG: &str = "restore.log";

/// A mount that CRIU finds below the root and does not dump itself: where it is, and where it comes from.
struct External {
    inside: PathBuf,
    source: PathBuf,
}

/// The external mounts of a plan. `cgroups` are the container's directories.
fn externals(plan: &Plan, cgroups: &std::collections::BTreeMap<String, PathBuf>) -> Vec<External> {
    let root = plan_rootfs(plan);
    let root_fd = path::open_dir(&plan.rootfs.path).ok();
    let bytes = |text: &CStr| PathBuf::from(OsStr::from_bytes(text.to_bytes()));
    let inside = |destination: &CStr| {
        let real = root_fd.as_ref().and_then(|fd| real_path(fd.as_fd(), &root, destination));
        Path::new("/").join(real.unwrap_or_else(|| bytes(destination)))
    };
    let mut out = Vec::new();
    for mount in &plan.rootfs.mounts {
        match &mount.kind {
            MountKind::Bind { source, .. } => {
                out.push(External { inside: inside(&mount.destination), source: bytes(source) });
            }
            MountKind::CgroupV1(hierarchies) if !plan.namespaces.has(Namespace::Cgroup) => {
                for hierarchy in hierarchies {
                    let Some(own) = cgroups.get(&hierarchy.controller) else { continue };
                    out.push(External {
                        inside: inside(&mount.destination).join(bytes(&hierarchy.name)),
                        source: own.clone(),
                    });
                }
            }
            MountKind::CgroupV2(_) if !plan.namespaces.has(Namespace::Cgroup) => {
                let own = cgroups.get("").cloned();
                out.extend(own.map(|source| External { inside: inside(&mount.destination), source }));
            }
            MountKind::New { .. } | MountKind::CgroupV1(_) | MountKind::CgroupV2(_) => {}
        }
    }
    out.extend(
        plan.rootfs
            .devices
            .iter()
            .map(|device| External { inside: Path::new("/").join(bytes(&device.path)), source: bytes(&device.host) }),
    );
    out
}

/// Where `destination` leads to inside `root`, symlinks followed.
fn real_path(fd: BorrowedFd<'_>, root: &Path, destination: &CStr) -> Option<PathBuf> {
    let target = path::open_in_root(fd, destination, OFlag::O_PATH).ok()?;
    let at = |fd: RawFd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    let root = at(fd.as_raw_fd()).unwrap_or_else(|| root.to_path_buf());
    at(target.as_raw_fd())?.strip_prefix(root).ok().map(Path::to_path_buf)
}

fn external_mount(opts: &mut Message, inside: &Path, value: &Path) {
    let mut pair = Message::default();
    pair.bytes(1, inside.as_os_str().as_encoded_bytes()).bytes(2, value.as_os_str().as_encoded_bytes());
    opts.message(23, &pair);
}

/// The key by which CRIU knows a namespace that it does not dump itself.
fn namespace_key(kind: Namespace) -> Option<&'static str> {
    match kind {
        Namespace::Network => Some("extRootNetNS"),
        Namespace::Pid => Some("extRootPidNS"),
        _ => None,
    }
}

impl Container {
    /// Dumps the container to `options.images` by criu(8). Without `leave_running` and `pre_dump` its processes are gone
    /// afterwards, and it is to be deleted.
    pub fn checkpoint(&self, options: &Options) -> Result<()> {
        let status = self.status()?;
        if !matches!(status, Status::Running | Status::Paused) {
            let text = format!("Container cannot be checkpointed in {status} state");
            return Err(Error::new(Kind::FailedPrecondition, text));
        }
        let pid = self.state.init_process_pid;
        let files = options.open(true)?;
        if let Some(parent) = &options.parent {
            if parent.is_absolute() {
                return Err(Error::new(Kind::Invalid, "--parent-path must be relative"));
            }
            let dir = options.images.join(parent);
            let name = dir.display().to_string();
            let there =
                std::fs::metadata(&dir).map_err(|e| Error::io(format!("invalid --parent-path: {name:?}"), &e))?;
            if !there.is_dir() {
                return Err(Error::sys(format!("invalid --parent-path: {name:?}"), Errno::ENOTDIR));
            }
        }
        let config = criu::config_of(self.annotations());
        let mut opts = options.request(&files, self.rootfs(), DUMP_LOG, config)?;
        opts.number(2, pid as u64)
            .flag(3, options.leave_running)
            .flag(18, options.link_remap)
            .flag(46, options.tcp_skip_in_flight);
        if let Some((address, port)) = &options.page_server {
            let mut server = Message::default();
            server.text(1, address).number(2, u64::from(*port));
            opts.message(11, &server);
        }
        if let Some(parent) = &options.parent {
            opts.bytes(14, parent.as_os_str().as_encoded_bytes()).flag(15, true);
        }
        if let Some(dir) = self.cgroup.freezer_path() {
            opts.bytes(44, dir.as_os_str().as_encoded_bytes());
        }
        if !options.pre_dump {
            self.describe_to_criu(&mut opts)?;
            let streams: Vec<String> = (0..3)
                .map(|fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")))
                .map(|link| link.map(|link| link.display().to_string()).unwrap_or_default())
                .collect();
            let path = options.images.join(criu::DESCRIPTORS);
            let json = serde_json::json!(streams).to_string();
            std::fs::write(&path, json)
                .map_err(|e| Error::io(format!("write {:?}", path.display().to_string()), &e))?;
        }
        let kind = if options.pre_dump { criu::PRE_DUMP } else { criu::DUMP };
        let session = Session::start(None, false, &[])?;
        session.send(&criu::request(kind, &opts))?;
        let dumped = dumped(&session, options);
        match dumped {
            Ok(()) => session.finish(),
            Err(err) => {
                session.abort(true);
                Err(err)
            }
        }
    }

    /// What a whole dump has to know of mounts and namespaces.
    fn describe_to_criu(&self, opts: &mut Message) -> Result<()> {
        let spec = crate::bundle::load(self.bundle(), self.config())?;
        let plan = plan::build(
            &Request {
                id: self.id(),
                bundle: self.bundle(),
                terminal: false,
                systemd_cgroup: false,
                no_pivot: false,
                no_new_keyring: true,
                rootless: self.state.rootless,
            },
            &spec_without_cgroup(spec),
            &crate::host::Cgroups::read()?,
        )?;
        for external in externals(&plan, &self.cgroup.paths()) {
            external_mount(opts, &external.inside, &external.inside);
        }
        let pid = self.state.init_process_pid;
        for masked in &plan.rootfs.masked_paths {
            let inside = Path::new("/").join(OsStr::from_bytes(masked.to_bytes()));
            let seen = format!("/proc/{pid}/root{}", inside.display());
            if std::fs::metadata(seen).is_ok_and(|file| !file.is_dir()) {
                external_mount(opts, &inside, Path::new("/dev/null"));
            }
        }
        for join in &plan.namespaces.joins {
            if let Some(key) = namespace_key(join.kind) {
                let path = Path::new(OsStr::from_bytes(join.path.to_bytes()));
                let inode = std::fs::metadata(path).map(|file| std::os::unix::fs::MetadataExt::ino(&file));
                let inode = inode.map_err(|e| Error::io(format!("{}: look at {:?}", join.field, join.path), &e))?;
                opts.text(37, &format!("{}[{inode}]:{key}", crate::plan::namespaces::proc_name(join.kind)));
            }
        }
        Ok(())
    }
}

/// The container's cgroup is there; where the spec wants it does not matter any more.
fn spec_without_cgroup(mut spec: Spec) -> Spec {
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(None).set_resources(None);
    }
    spec
}

fn dumped(session: &Session, options: &Options) -> Result<()> {
    loop {
        let Some((response, _)) = session.receive()? else {
            launch::wait_readable(session.fd(), None)?;
            continue;
        };
        if !response.success {
            return Err(criu::failed("DUMP", &response, &options.why(DUMP_LOG)));
        }
        if response.kind != criu::NOTIFY {
            return Ok(());
        }
        log::debug!("notify: {}", response.script);
        if response.script == "status-ready"
            && let Some(fd) = options.status_fd
        {
            crate::sys::process::write_byte_and_close(fd);
        }
        session.go_on()?;
    }
}

/// A restore under way; ends in a container that runs. Dropped before that, everything that it had made is taken back.
#[derive(Debug)]
pub struct Restoring(Option<Stage>);

#[derive(Debug)]
enum Stage {
    /// systemd makes the unit.
    Unit(Box<(Prepared, chore::Held, Options)>),
    /// A child makes the mount points.
    MountPoints(Box<(Prepared, Options)>, Chore),
    /// CRIU is at work.
    Criu(Box<Underway>),
    /// It has failed, and what it had made is being taken back.
    Undo(Chore, Error),
}

#[derive(Debug)]
struct Underway {
    session: Option<Session>,
    /// Goes before the state directory, which it lies in.
    root: Root,
    prepared: Prepared,
    /// CRIU opens the directories through this process.
    _files: criu::Files,
    options: Options,
    console: Option<OwnedFd>,
    init: Option<Process>,
    waiting: VecDeque<(&'static str, usize, Hook)>,
    running: Option<Chore>,
    hooked: i32,
    /// When it is given up; None where somebody waits who may wait for ever.
    deadline: Option<Instant>,
}

impl Drop for Underway {
    fn drop(&mut self) {
        let waits = self.deadline.is_some();
        if let Some(running) = self.running.take() {
            running.stop();
        }
        if let Some(session) = self.session.take() {
            session.abort(!waits);
        }
        match self.init.take() {
            Some(init) if waits => init.abandon(),
            Some(init) => init.discard(),
            None => {}
        }
    }
}

/// The rootfs, bound to a place whose parent nothing covers, as CRIU wants it. Dropped, it is unmounted.
#[derive(Debug)]
struct Root(PathBuf);

impl Root {
    fn bind(rootfs: &Path, at: PathBuf) -> Result<Root> {
        let name = at.display().to_string();
        std::fs::create_dir(&at).map_err(|e| Error::io(format!("make {name:?}"), &e))?;
        let none: Option<&str> = None;
        nix::mount::mount(Some(rootfs), &at, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .map_err(|errno| Error::sys(format!("bind the rootfs to {name:?}"), errno))?;
        Ok(Root(at))
    }
}

impl Root {
    fn unmount(&self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Begins a restore of the container that was dumped to `options.images`, under the id of `request`.
pub fn restore(request: Create, spec: &Spec, options: Options) -> Result<Restoring> {
    if options.images.as_os_str().is_empty() || !options.images.is_dir() {
        let name = options.images.display().to_string();
        return Err(Error::new(Kind::NotFound, format!("image path {name:?}: no such directory")));
    }
    let waits = request.gate == Gate::Socket;
    let prepared = match prepare(request, spec, false) {
        Ok(prepared) => prepared,
        Err((Some(mut made), err)) if waits => return Ok(Restoring(Some(Stage::Undo(made.undo()?, err)))),
        Err((_, err)) => return Err(err),
    };
    Ok(Restoring(Some(match prepared.unit()? {
        None => make_mount_points(prepared, options)?,
        Some(held) => Stage::Unit(Box::new((prepared, held, options))),
    })))
}

fn begin(mut prepared: Prepared, options: Options) -> Result<Box<Underway>> {
    let deadline = (prepared.gate == Gate::Socket).then(|| limits::from_now(limits::CRIU));
    let cgroup = prepared
        .made
        .cgroup
        .insert(crate::cgroup::Cgroup::create(&prepared.plan.cgroup)?.with(prepared.state.skiff.rdt_doors()));
    prepared.state.cgroup_paths = cgroup.paths();
    cgroup.set_devices(&prepared.plan.cgroup)?;
    let root = Root::bind(&prepared.state.config.rootfs, prepared.made.dir.path().join(crate::state::CRIU_ROOT))?;
    let files = options.open(false)?;
    let config = criu::config_of(&prepared.state.skiff.annotations);
    let mut opts = options.request(&files, &root.0, RESTORE_LOG, config)?;
    opts.flag(6, true).flag(26, true);
    if let Some(profile) = &options.lsm_profile {
        opts.text(53, profile);
    }
    if let Some(context) = &options.lsm_mount_context {
        opts.text(63, context);
    }
    let inherited = describe_namespaces(&prepared.plan, &mut opts)?;
    for external in externals(&prepared.plan, &cgroup.paths()) {
        external_mount(&mut opts, &external.inside, &external.source);
    }
    if !prepared.plan.rootfs.masked_paths.is_empty() {
        external_mount(&mut opts, Path::new("/dev/null"), Path::new("/dev/null"));
    }
    let path = options.images.join(criu::DESCRIPTORS);
    let streams: Vec<String> = serde_json::from_slice(&crate::bundle::read(&path)?)
        .map_err(|e| Error::invalid(path.display().to_string(), e))?;
    for (fd, stream) in streams.iter().enumerate().filter(|(_, stream)| stream.contains("pipe:")) {
        inherit(&mut opts, stream, fd as RawFd);
    }
    let passed: Vec<&OwnedFd> = inherited.iter().collect();
    let keeps_streams = prepared.stdio.is_none() && !prepared.plan.rootfs.console;
    let session = Session::start(prepared.stdio.take(), keeps_streams, &passed)?;
    let mut underway = Box::new(Underway {
        session: None,
        root,
        prepared,
        _files: files,
        options,
        console: None,
        init: None,
        waiting: VecDeque::new(),
        running: None,
        hooked: 0,
        deadline,
    });
    // What CRIU restores is born where CRIU is.
    let pid = session.pid();
    underway.session = Some(session);
    let cgroup = underway.prepared.made.cgroup.as_ref().expect("it was made above");
    cgroup.attach(pid)?;
    underway.prepared.held = None;
    cgroup.apply(&underway.prepared.plan.cgroup)?;
    for (controller, path) in cgroups_of(pid)? {
        let mut root = Message::default();
        root.text(1, &controller).text(2, &path);
        opts.message(25, &root);
    }
    underway.session().send(&criu::request(criu::RESTORE, &opts))?;
    Ok(underway)
}

fn inherit(opts: &mut Message, key: &str, fd: RawFd) {
    let mut pair = Message::default();
    pair.text(1, key).number(2, fd as u64);
    opts.message(27, &pair);
}

/// Namespaces that the container joins. Returns what CRIU is to inherit.
fn describe_namespaces(plan: &Plan, opts: &mut Message) -> Result<Vec<OwnedFd>> {
    let mut out = Vec::new();
    for join in &plan.namespaces.joins {
        let path = OsStr::from_bytes(join.path.to_bytes());
        match (join.kind, namespace_key(join.kind)) {
            (_, Some(key)) => {
                let file = std::fs::File::open(path)
                    .map_err(|e| Error::io(format!("{}: open {:?}", join.field, join.path), &e))?;
                inherit(opts, key, file.as_raw_fd());
                out.push(file.into());
            }
            (Namespace::Cgroup, None) => {
                return Err(Error::invalid(&join.field, "a restored container cannot join a cgroup namespace"));
            }
            (kind, None) => {
                let mut joined = Message::default();
                joined.text(1, crate::plan::namespaces::proc_name(kind)).bytes(2, path.as_bytes());
                opts.message(39, &joined);
            }
        }
    }
    Ok(out)
}

/// Controller and path of every cgroup of a process.
fn cgroups_of(pid: i32) -> Result<Vec<(String, String)>> {
    let file = format!("/proc/{pid}/cgroup");
    let text = std::fs::read_to_string(&file).map_err(|e| Error::io(format!("read {file:?}"), &e))?;
    let mut out = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        out.extend(controllers.split(',').map(|controller| (controller.to_string(), path.to_string())));
    }
    Ok(out)
}

/// Makes the mount points that are missing in the rootfs, also those inside other mounts: in a mount namespace that goes
/// away with the child that does it. What lies on a tmpfs CRIU brings along.
fn make_mount_points(prepared: Prepared, options: Options) -> Result<Stage> {
    if prepared.plan.rootfs.mounts.is_empty() {
        return begin(prepared, options).map(Stage::Criu);
    }
    let rootfs = prepared.plan.rootfs.clone();
    let chore = chore::start("make the mount points of a restore", limits::MOUNT, move || {
        let fail = |errno| Error::sys("make the mount points of a restore", errno);
        crate::sys::clone::unshare(libc::CLONE_NEWNS as u64).map_err(fail)?;
        let none: Option<&str> = None;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(fail)?;
        let root = path::open_dir(&rootfs.path).map_err(fail)?;
        let mut covered: Vec<Vec<u8>> = Vec::new();
        for mount in &rootfs.mounts {
            let destination = mount.destination.to_bytes();
            if covered.iter().any(|above| destination.starts_with(above)) {
                continue;
            }
            let (source, is_dir) = match &mount.kind {
                MountKind::Bind { source, recursive, .. } => {
                    let fd = mount::clone_tree(path::open_dir(c"/").map_err(fail)?.as_fd(), source, *recursive)
                        .map_err(fail)?;
                    let is_dir = path::kind(fd.as_fd()).map_err(fail)?.0 == SFlag::S_IFDIR;
                    (Some(fd), is_dir)
                }
                MountKind::New { fstype, .. } => {
                    if fstype.to_bytes() == b"tmpfs" {
                        covered.push([destination, b"/"].concat());
                    }
                    (None, true)
                }
                // On v1 below a tmpfs, on v2 part of /sys.
                MountKind::CgroupV1(_) | MountKind::CgroupV2(_) => continue,
            };
            let target = if is_dir {
                path::mkdir_all(root.as_fd(), &mount.destination, Mode::from_bits_truncate(0o755))
            } else {
                path::create_file(root.as_fd(), &mount.destination)
            };
            let target = target.map_err(fail)?;
            if let Some(source) = source {
                mount::attach(source.as_fd(), target.as_fd()).map_err(fail)?;
            }
        }
        Ok(())
    })?;
    Ok(Stage::MountPoints(Box::new((prepared, options)), chore))
}

impl Underway {
    /// The error of one that takes too long.
    fn late(&self) -> Error {
        launch::hang::late(self.session.as_ref().map_or(0, Session::pid), "restore: criu has not done it in time")
    }

    fn session(&self) -> &Session {
        self.session.as_ref().expect("a restore has a session until it ends")
    }

    fn advance(&mut self) -> Result<Option<Created>> {
        loop {
            if let Some(running) = &mut self.running {
                if running.advance()?.is_none() {
                    return Ok(None);
                }
                self.running = None;
                self.next_hook()?;
                continue;
            }
            let Some((response, fd)) = self.session().receive()? else { return Ok(None) };
            if !response.success {
                return Err(criu::failed("RESTORE", &response, &self.options.why(RESTORE_LOG)));
            }
            if response.kind == criu::NOTIFY {
                self.notified(&response, fd)?;
                continue;
            }
            return self.finish().map(Some);
        }
    }

    fn notified(&mut self, response: &Response, fd: Option<OwnedFd>) -> Result<()> {
        log::debug!("notify: {}", response.script);
        match response.script.as_str() {
            "setup-namespaces" => {
                self.hooked = response.pid;
                let hooks = &self.prepared.plan.hooks;
                for (kind, list) in [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime())] {
                    self.waiting.extend(list.iter().flatten().enumerate().map(|(at, hook)| (kind, at, hook.clone())));
                }
                return self.next_hook();
            }
            "orphan-pts-master" => self.console = fd,
            "post-restore" => {
                let fail = |errno| Error::sys("hold the restored init", errno);
                self.init = Some(Process { pid: response.pid, pidfd: pidfd_open(response.pid).map_err(fail)? });
            }
            _ => {}
        }
        self.session().go_on()
    }

    fn next_hook(&mut self) -> Result<()> {
        let Some((kind, at, hook)) = self.waiting.pop_front() else { return self.session().go_on() };
        let state = hook_json(&self.prepared.state, self.hooked, "creating");
        let patience = if self.deadline.is_some() { limits::HOOK } else { limits::NONE };
        self.running = Some(hooks::start_apart(kind, at, &hook, &state, patience)?);
        Ok(())
    }

    fn finish(&mut self) -> Result<Created> {
        let lost = || Error::new(Kind::System, "criu has restored no init");
        let pid = self.init.as_ref().ok_or_else(lost)?.pid;
        self.prepared.state.has_init(pid)?;
        // CRIU makes one for a container that had none: its clocks go on from where they were.
        let time = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/time")).ok();
        if time(&pid.to_string()) != time("self") {
            self.prepared.state.skiff.namespaces |= crate::sys::clone::CLONE_NEWTIME;
        }
        self.prepared.made.dir.save(&self.prepared.state)?;
        if let Some(session) = self.session.take() {
            session.finish()?;
        }
        self.root.unmount();
        let made = &mut self.prepared.made;
        let cgroup = made.cgroup.take().expect("a restore has a cgroup");
        made.keep = true;
        let state = self.prepared.state.clone().lean();
        let container = Container { dir: made.dir.clone(), state, cgroup, gate: None, init: None };
        Ok(Created { container, init: self.init.take().ok_or_else(lost)?, console: self.console.take() })
    }
}

impl Restoring {
    fn go_on(&mut self, stage: Stage) -> Result<Option<Created>> {
        self.0 = Some(stage);
        self.advance()
    }

    fn undo(&mut self, mut made: Box<Made>, err: Error) -> Result<Option<Created>> {
        match made.undo() {
            Ok(chore) => self.go_on(Stage::Undo(chore, err)),
            Err(_) => Err(err),
        }
    }
}

impl Pending for Restoring {
    type Output = Created;

    fn fd(&self) -> BorrowedFd<'_> {
        match self.0.as_ref().expect("a finished restore is not waited for") {
            Stage::Unit(unit) => unit.1.fd(),
            Stage::MountPoints(_, chore) | Stage::Undo(chore, _) => chore.fd(),
            Stage::Criu(underway) => underway.running.as_ref().map_or_else(|| underway.session().fd(), Pending::fd),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.0.as_ref()? {
            Stage::Unit(unit) => Some(unit.1.deadline()),
            Stage::MountPoints(_, chore) | Stage::Undo(chore, _) => chore.deadline(),
            Stage::Criu(underway) => {
                let hook = underway.running.as_ref().and_then(Pending::deadline);
                [hook, underway.deadline].into_iter().flatten().min()
            }
        }
    }

    fn advance(&mut self) -> Result<Option<Created>> {
        let ended = || Error::new(Kind::System, "restore has ended already");
        let next = match self.0.take().ok_or_else(ended)? {
            Stage::Unit(mut unit) => match unit.1.advance()? {
                None => Stage::Unit(unit),
                Some(path) => {
                    let (mut prepared, held, options) = *unit;
                    prepared.held = Some(held);
                    prepared.started(&path)?;
                    return self.go_on(make_mount_points(prepared, options)?);
                }
            },
            Stage::MountPoints(prepared, mut chore) => match chore.advance() {
                Ok(None) => Stage::MountPoints(prepared, chore),
                Ok(Some(())) => {
                    let (prepared, options) = *prepared;
                    return self.go_on(Stage::Criu(begin(prepared, options)?));
                }
                Err(err) => return self.undo(prepared.0.made, err),
            },
            Stage::Criu(mut underway) => {
                let late = underway.deadline.is_some_and(|deadline| Instant::now() >= deadline);
                match underway.advance() {
                    Ok(Some(created)) => return Ok(Some(created)),
                    Ok(None) if !late => Stage::Criu(underway),
                    other => {
                        let err = other.err().unwrap_or_else(|| underway.late());
                        if underway.deadline.is_none() {
                            return Err(err);
                        }
                        let made = underway.prepared.made.take();
                        drop(underway);
                        return self.undo(made, err);
                    }
                }
            }
            Stage::Undo(mut chore, err) => match chore.advance() {
                Ok(None) => Stage::Undo(chore, err),
                Ok(Some(())) => return Err(err),
                Err(undo) => {
                    log::warn!("undo restore: {undo}");
                    return Err(err);
                }
            },
        };
        self.0 = Some(next);
        Ok(None)
    }
}
