//! One container of this shim and what may happen to it when: the state table of the shim contract.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process as ProcessSpec, Spec};
use skiff::cgroup::{self, OomWatch, Stats};
use skiff::container::{Container as Inner, Create, Exec, Status, Stdio, Tree};
use skiff::criu;
use skiff::launch::Exit;
use skiff::launch::chore::{self, Chore};
use skiff::{Error, Kind, Result, limits};
use tokio::io::Interest;
use tokio::sync::watch;

use crate::error::{no_exec, precondition};
use crate::events::{Events, timestamp};
use crate::io::{Copies, Io, Manner, Name, Paths, Pipes, watch_fd};
use crate::process::{Phase, Process, settle};
use crate::rootfs;
use crate::streaming::Local;

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The init.
    pub init: Rc<Process>,
    inner: RefCell<Option<Inner>>,
    execs: RefCell<BTreeMap<String, Rc<Exec1>>>,
    running_execs: watch::Sender<usize>,
    home: Home,
    deleting: watch::Sender<bool>,
    oom_kills: Cell<u64>,
    /// Of these, what events have told of.
    oom_told: Cell<u64>,
    /// At the last look the kernel was short of memory, and had killed nobody yet.
    oom_is_near: Cell<bool>,
    /// What the cgroups above had counted at the last look; systemd takes away the one below them when it is empty.
    oom_above: RefCell<Vec<(PathBuf, u64)>>,
    /// The streams of exec processes.
    manner: Manner,
    events: Events,
    last_stats: RefCell<Option<Box<Stats>>>,
    exec_number: Cell<u64>,
    /// Its start is a restore.
    to_restore: RefCell<Option<Box<ToRestore>>>,
}

/// A container whose Start restores it: containerd may change its rootfs before that.
pub struct ToRestore {
    /// What a create would be asked for.
    pub request: Create,
    /// The spec.
    pub spec: Spec,
    /// The directory of the images.
    pub images: PathBuf,
    /// Its streams.
    pub copies: Option<Copies>,
}

/// Where a container is kept.
#[derive(Clone, Debug)]
pub struct Home {
    /// Base of the state directories, with the namespace.
    pub root: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Mounts of containerd's lie on the bundle's rootfs.
    pub mounted: bool,
    /// Where CRIU works and logs, when that is not in the bundle.
    pub work: Option<PathBuf>,
}

/// An exec process, what it is to run, and the cgroup of its process tree.
struct Exec1 {
    process: Rc<Process>,
    spec: ProcessSpec,
    tree: RefCell<Option<Tree>>,
}

/// Status of who was killed by SIGKILL.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// Annotation: what an exec process leaves running stays when the process is deleted.
const KEEP_CHILDREN: &str = "io.containerd.skiff.exec-keeps-children";

impl Container {
    /// A container that has been created; its exit is watched from now on.
    pub fn new(
        inner: Inner,
        bundle: PathBuf,
        init: Rc<Process>,
        home: Home,
        manner: Manner,
        events: Events,
    ) -> Rc<Container> {
        let container = Container::empty(inner.id().to_string(), bundle, init, home, manner, events);
        container.begin(inner);
        container
    }

    /// A container that is made by its start.
    pub fn to_restore(
        to_restore: ToRestore,
        bundle: PathBuf,
        init: Rc<Process>,
        home: Home,
        manner: Manner,
        events: Events,
    ) -> Rc<Container> {
        let container = Container::empty(to_restore.request.id.clone(), bundle, init, home, manner, events);
        *container.to_restore.borrow_mut() = Some(Box::new(to_restore));
        container
    }

    fn empty(
        id: String,
        bundle: PathBuf,
        init: Rc<Process>,
        home: Home,
        manner: Manner,
        events: Events,
    ) -> Rc<Container> {
        Rc::new(Container {
            id,
            bundle,
            init,
            inner: RefCell::default(),
            to_restore: RefCell::default(),
            execs: RefCell::default(),
            running_execs: watch::Sender::new(0),
            home,
            deleting: watch::Sender::new(false),
            exec_number: Cell::new(0),
            oom_kills: Cell::new(0),
            oom_told: Cell::new(0),
            oom_is_near: Cell::new(false),
            oom_above: RefCell::default(),
            manner,
            events,
            last_stats: RefCell::default(),
        })
    }

    /// It has an init, whose exit is watched from now on.
    fn begin(self: &Rc<Self>, inner: Inner) {
        *self.inner.borrow_mut() = Some(inner);
        if self.with(|inner| Ok(inner.unit().is_some())).unwrap_or(false) {
            self.count_oom();
        }
        tokio::task::spawn_local(self.clone().watch_init());
        match self.with(Inner::watch_oom) {
            Ok(Some(watch)) => drop(tokio::task::spawn_local(self.clone().watch_oom(watch))),
            Ok(None) => {}
            Err(err) => log::warn!("container {:?}: {err}", self.id),
        }
    }

    fn is_to_be_restored(&self) -> bool {
        self.to_restore.borrow().is_some()
    }

    fn with<T>(&self, f: impl FnOnce(&Inner) -> Result<T>) -> Result<T> {
        match &*self.inner.borrow() {
            Some(inner) => f(inner),
            None => Err(Error::new(Kind::NotFound, format!("container {:?} is being deleted", self.id))),
        }
    }

    /// The init, or the exec process `exec_id`.
    pub fn process(&self, exec_id: &str) -> Result<Rc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let exec = self.execs.borrow().get(exec_id).map(|exec| exec.process.clone());
        exec.ok_or_else(|| no_exec(&self.id, exec_id))
    }

    /// True while the container is frozen.
    pub fn paused(&self) -> bool {
        self.init.phase() == Phase::Running && self.with(|inner| inner.cgroup().frozen()).unwrap_or(false)
    }

    async fn watch_init(self: Rc<Self>) {
        let exit = self.init.reap().await.unwrap_or_else(|err| {
            log::error!("container {:?}: {err}", self.id);
            Exit { status: 255, at: SystemTime::now() }
        });
        // systemd removes the cgroup as soon as it sees that it is empty, and may have been quicker.
        let counted = self.count_oom();
        let first = self.oom_kills.get() == 0;
        if !counted && first && exit.status == KILLED && (self.oom_is_near.get() || self.oom_was_counted_above()) {
            self.oom_kills.set(1);
        }
        // The start event comes first, and the exits of execs before that of the init.
        self.init.settled().await;
        if !self.with(|inner| Ok(inner.has_own_pid_namespace())).unwrap_or(true) {
            if let Err(err) = self.with(|inner| inner.cgroup().kill(libc::SIGKILL)) {
                log::warn!("container {:?}: kill what the init has left: {err}", self.id);
            }
            self.emptied().await;
        }
        self.init.set_phase(Phase::Stopped);
        let _ = self.running_execs.subscribe().wait_for(|n| *n == 0).await;
        self.init.sent().await;
        self.report_oom();
        self.init.set_exit(exit);
        self.exited(&self.init, exit);
    }

    /// Waits a moment for the end of what the init has left, which is to be gone when its exit is told.
    async fn emptied(&self) {
        for _ in 0..100 {
            if self.with(Inner::pids).map_or(true, |pids| pids.is_empty()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Reports kills of the OOM killer as they happen, until the init has exited.
    async fn watch_oom(self: Rc<Self>, watch: OomWatch) {
        let interest = if watch.by_priority() { Interest::PRIORITY } else { Interest::READABLE };
        let Ok(fd) = watch.fd().try_clone_to_owned() else { return };
        let Ok(fd) = watch_fd(fd, interest) else { return };
        let ended = self.init.wait();
        tokio::pin!(ended);
        loop {
            tokio::select! {
                _ = &mut ended => return,
                ready = fd.ready(interest) => {
                    let Ok(mut guard) = ready else { return };
                    self.look_for_oom(&watch);
                    guard.clear_ready();
                    // The kernel tells of the shortage before it has chosen whom to kill, and on v2 of nothing more for ten
                    // milliseconds, in which systemd may have removed the cgroup with the count.
                    let pauses: &[u64] = if watch.by_priority() { &[1, 2, 4, 8] } else { &[5, 50] };
                    for pause in pauses.iter().copied() {
                        tokio::time::sleep(Duration::from_millis(pause)).await;
                        self.look_for_oom(&watch);
                    }
                }
            }
        }
    }

    fn look_for_oom(&self, watch: &OomWatch) {
        self.oom_is_near.set(watch.clear());
        self.report_oom();
    }

    async fn watch_exec(self: Rc<Self>, process: Rc<Process>) {
        let exit = process.reap().await.unwrap_or_else(|err| {
            log::error!("container {:?}, process {:?}: {err}", self.id, process.exec_id);
            Exit { status: 255, at: SystemTime::now() }
        });
        process.sent().await;
        self.report_oom();
        if let Some(exec) = self.execs.borrow().get(&process.exec_id) {
            // Most leave nothing behind.
            exec.tree.borrow_mut().take_if(Tree::remove_if_empty);
        }
        process.set_exit(exit);
        self.exited(&process, exit);
        self.running_execs.send_modify(|n| *n -= 1);
    }

    fn exited(&self, process: &Process, exit: Exit) {
        let id = if process.exec_id.is_empty() { &self.id } else { &process.exec_id };
        self.events.send(
            "/tasks/exit",
            &TaskExit {
                container_id: self.id.clone(),
                id: id.clone(),
                pid: process.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..TaskExit::default()
            },
        );
    }

    /// False when there is nothing to count by any more.
    fn count_oom(&self) -> bool {
        // First, so that no kill is in here that is not in its own count.
        let above = self.with(|inner| Ok(inner.unit().map(|_| inner.cgroup().oom_kills_above()))).unwrap_or(None);
        let kills = self.with(|inner| Ok(inner.cgroup().oom_kills())).unwrap_or(None);
        if let Some(above) = above.filter(|_| kills.is_some()) {
            *self.oom_above.borrow_mut() = above;
        }
        self.oom_kills.set(self.oom_kills.get().max(kills.unwrap_or(0)));
        kills.is_some()
    }

    /// Since the last look somebody has been killed below the nearest cgroup above that is still there.
    fn oom_was_counted_above(&self) -> bool {
        let since = |(path, before): &(PathBuf, u64)| cgroup::oom_kills_at(path).map(|now| now > *before);
        self.oom_above.borrow().iter().find_map(since).unwrap_or(false)
    }

    fn report_oom(&self) {
        self.count_oom();
        let kills = self.oom_kills.get();
        if kills > self.oom_told.replace(kills) {
            self.events.send("/tasks/oom", &TaskOOM { container_id: self.id.clone(), ..TaskOOM::default() });
        }
    }

    /// Starts the init or an exec process. Returns its pid.
    pub async fn start(self: &Rc<Self>, exec_id: &str) -> Result<u32> {
        if exec_id.is_empty() { self.start_init().await } else { self.start_exec(exec_id).await }
    }

    async fn start_init(self: &Rc<Self>) -> Result<u32> {
        match self.init.phase() {
            Phase::Created => {}
            Phase::Starting => return Err(precondition("container is being started")),
            Phase::Running => return Err(precondition("cannot start an already running container")),
            Phase::Stopped => return Err(precondition("cannot start a container that has stopped")),
        }
        self.init.set_phase(Phase::Starting);
        let to_restore = self.to_restore.borrow_mut().take();
        if let Some(to_restore) = to_restore {
            let restored = self.restore(*to_restore).await;
            if restored.is_err() {
                self.init.set_exit(Exit { status: 255, at: SystemTime::now() });
            }
            restored?;
            return Ok(self.started());
        }
        // Nothing has been started yet: it may be asked for again.
        self.init.open_stdin().await.inspect_err(|_| {
            if self.init.phase() == Phase::Starting && !self.init.has_ended() {
                self.init.set_phase(Phase::Created);
            }
        })?;
        let starting = match &mut *self.inner.borrow_mut() {
            Some(inner) => inner.start(),
            None => Err(precondition("container is being deleted")),
        };
        let started = match starting {
            Ok(starting) => settle(starting).await,
            Err(err) => Err(err),
        };
        match started {
            Ok(()) => Ok(self.started()),
            Err(err) => {
                self.init.set_phase(Phase::Stopped);
                Err(err)
            }
        }
    }

    fn started(&self) -> u32 {
        let pid = self.init.pid();
        let event = TaskStart { container_id: self.id.clone(), pid, ..TaskStart::default() };
        self.events.send("/tasks/start", &event);
        self.init.set_phase(Phase::Running);
        pid
    }

    async fn restore(self: &Rc<Self>, to_restore: ToRestore) -> Result<()> {
        let ToRestore { request, spec, images, copies } = to_restore;
        let options = criu::Options { images, work: Some(self.work_path()), ..criu::Options::default() };
        let restored = settle(skiff::container::restore(request, &spec, options)?).await?;
        self.init.set_child(restored.init)?;
        let name = Name { id: &self.id, namespace: &self.home.namespace };
        let connected = connect(&self.init, copies, restored.console, name).await;
        let connected = match connected {
            Ok(()) => self.init.open_stdin().await,
            failed => failed,
        };
        if let Err(err) = connected {
            // One that does not die is removed by Delete.
            if self.init.discard().await {
                // What containerd has mounted stays until Delete.
                let home = Home { mounted: false, ..self.home.clone() };
                if let Err(undo) = settle(remove(&home, &self.id, &self.bundle)?).await {
                    log::warn!("undo restore: {undo}");
                }
            }
            return Err(err);
        }
        self.begin(restored.container);
        Ok(())
    }

    fn work_path(&self) -> PathBuf {
        self.home.work.clone().unwrap_or_else(|| self.bundle.join("criu-work"))
    }

    /// Dumps it to images. The dump takes its time: a child waits for it.
    pub async fn checkpoint(&self, mut options: criu::Options) -> Result<()> {
        if self.init.phase() != Phase::Running {
            return Err(precondition("cannot checkpoint a container that is not running"));
        }
        options.work.get_or_insert_with(|| self.work_path());
        let (root, id) = (self.home.root.clone(), self.id.clone());
        let what = format!("checkpoint container {id:?}");
        settle(chore::start(what, limits::CRIU, move || Inner::load(&root, &id)?.checkpoint(&options))?).await
    }

    /// Adds an exec process; nothing of it is made before its start.
    pub fn add_exec(&self, exec_id: &str, spec: ProcessSpec, paths: Paths, local: Option<Local>) -> Result<()> {
        if self.execs.borrow().contains_key(exec_id) {
            return Err(Error::new(Kind::AlreadyExists, format!("id {exec_id}: exec process already exists")));
        }
        match self.init.phase() {
            _ if self.is_to_be_restored() => return Err(precondition("cannot exec in a container before its restore")),
            Phase::Stopped => return Err(precondition("cannot exec in a stopped container")),
            _ if self.paused() => return Err(precondition("cannot exec in a paused container")),
            _ => {}
        }
        let exec = Exec1 { process: Process::new(exec_id, paths), spec, tree: RefCell::default() };
        exec.process.set_local(local);
        self.execs.borrow_mut().insert(exec_id.to_string(), Rc::new(exec));
        let event =
            TaskExecAdded { container_id: self.id.clone(), exec_id: exec_id.to_string(), ..TaskExecAdded::default() };
        self.events.send("/tasks/exec-added", &event);
        Ok(())
    }

    async fn start_exec(self: &Rc<Self>, exec_id: &str) -> Result<u32> {
        let exec = self.execs.borrow().get(exec_id).cloned().ok_or_else(|| no_exec(&self.id, exec_id))?;
        match exec.process.phase() {
            Phase::Created => {}
            Phase::Starting => return Err(precondition("process is being started")),
            Phase::Running => return Err(precondition("cannot start an already running process")),
            Phase::Stopped => return Err(precondition("cannot start a process that has stopped")),
        }
        if self.init.phase() == Phase::Stopped {
            return Err(precondition(format!("container {} init process is not running", self.id)));
        }
        exec.process.set_phase(Phase::Starting);
        // Counted from here on: the exit of the init is not reported before this one's.
        self.running_execs.send_modify(|n| *n += 1);
        match self.launch_exec(&exec).await {
            Ok(()) => {
                let pid = exec.process.pid();
                self.events.send(
                    "/tasks/exec-started",
                    &TaskExecStarted {
                        container_id: self.id.clone(),
                        exec_id: exec_id.to_string(),
                        pid,
                        ..TaskExecStarted::default()
                    },
                );
                exec.process.set_phase(Phase::Running);
                tokio::task::spawn_local(self.clone().watch_exec(exec.process.clone()));
                Ok(pid)
            }
            Err(err) => {
                exec.process.set_exit(Exit { status: 255, at: SystemTime::now() });
                self.running_execs.send_modify(|n| *n -= 1);
                Err(err)
            }
        }
    }

    async fn launch_exec(&self, exec: &Exec1) -> Result<()> {
        let process = &exec.process;
        let name = Name { id: &process.exec_id, namespace: &self.home.namespace };
        let number = self.exec_number.get();
        self.exec_number.set(number + 1);
        let tree = self.with(|inner| {
            let keep = inner.annotations().get(KEEP_CHILDREN).is_some_and(|value| value == "true");
            Ok(if keep { None } else { inner.tree(&format!("skiff-exec-{number}")) })
        })?;
        // What outlives the Delete of an exec process must not keep the client's streams open.
        let direct = self.manner.direct && tree.is_some() && !labelled(&exec.spec);
        let manner = Manner { direct, ..self.manner };
        let (stdio, copies) = Streams::open(&process.local_paths(), manner, name).await?.split();
        let request = Exec {
            process: exec.spec.clone(),
            stdio,
            preserve_fds: 0,
            cgroups: Vec::new(),
            ignore_paused: false,
            tree,
            limit: Some(limits::EXEC),
        };
        let mut execing = self.with(|inner| inner.exec(request))?;
        let execed = settle(&mut execing).await;
        *exec.tree.borrow_mut() = execing.take_tree();
        let execed = execed?;
        process.set_child(execed.process)?;
        let connected = connect(process, copies, execed.console, name).await;
        let connected = match connected {
            Ok(()) => process.open_stdin().await,
            failed => failed,
        };
        if connected.is_err() {
            process.discard().await;
        }
        connected
    }

    /// Signals the init, an exec process, or everything in the container.
    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let signal = i32::try_from(signal).map_err(|_| Error::invalid("signal", signal))?;
        let process = self.process(exec_id)?;
        if exec_id.is_empty() && self.to_restore.borrow_mut().take().is_some() {
            let exit = Exit { status: 128 + signal.unsigned_abs(), at: SystemTime::now() };
            self.init.set_exit(exit);
            self.exited(&self.init, exit);
            return Ok(());
        }
        if process.phase() == Phase::Stopped && !(all && exec_id.is_empty()) {
            return Err(Error::new(Kind::NotFound, skiff::error::PROCESS_ALREADY_FINISHED));
        }
        if !exec_id.is_empty() {
            return process.kill(signal);
        }
        if process.phase() == Phase::Stopped && self.with(|inner| inner.pids())?.is_empty() {
            return Err(Error::new(Kind::NotFound, skiff::error::PROCESS_ALREADY_FINISHED));
        }
        self.with(|inner| inner.kill(signal, all)).map_err(|err| match err.kind() {
            Kind::NotFound => Error::new(Kind::NotFound, skiff::error::PROCESS_ALREADY_FINISHED),
            _ => err,
        })
    }

    /// Changes its limits.
    pub async fn update(&self, resources: LinuxResources) -> Result<()> {
        // CRI takes a container that has stopped meanwhile for no error only when it is not found.
        if self.init.phase() == Phase::Stopped {
            return Err(Error::new(Kind::NotFound, skiff::error::PROCESS_ALREADY_FINISHED));
        }
        if self.is_to_be_restored() {
            return Err(precondition("cannot update a container before its restore"));
        }
        if self.with(|inner| Ok(inner.unit().is_none()))? {
            return match &mut *self.inner.borrow_mut() {
                Some(inner) => inner.update(&resources),
                None => Err(crate::error::no_container(&self.id)),
            };
        }
        // systemd may take its time.
        let (root, id) = (self.home.root.clone(), self.id.clone());
        let what = format!("update container {id:?}");
        settle(chore::start(what, limits::SYSTEMD, move || Inner::load(&root, &id)?.update(&resources))?).await?;
        match &mut *self.inner.borrow_mut() {
            Some(inner) => inner.reload(),
            None => Err(crate::error::no_container(&self.id)),
        }
    }

    /// Freezes the container.
    pub async fn pause(&self) -> Result<()> {
        if self.init.phase() != Phase::Running || self.paused() {
            return Err(precondition("cannot pause a container that is not running"));
        }
        // A process in the middle of a slow system call freezes only after it.
        let (root, id) = (self.home.root.clone(), self.id.clone());
        let what = format!("pause container {id:?}");
        settle(chore::start(what, limits::FREEZE, move || Inner::load(&root, &id)?.pause())?).await?;
        self.events.send("/tasks/paused", &TaskPaused { container_id: self.id.clone(), ..TaskPaused::default() });
        Ok(())
    }

    /// Thaws the container.
    pub fn resume(&self) -> Result<()> {
        if !self.paused() {
            return Err(precondition("cannot resume a container that is not paused"));
        }
        self.with(Inner::resume)?;
        self.events.send("/tasks/resumed", &TaskResumed { container_id: self.id.clone(), ..TaskResumed::default() });
        Ok(())
    }

    /// Host pids with the exec ids that are known of them. A stopped init is among them until it is deleted: an empty
    /// list would make a restarted containerd throw the container away.
    pub fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        if self.is_to_be_restored() {
            return Ok(Vec::new());
        }
        let mut pids: Vec<u32> = self.with(Inner::pids)?.into_iter().map(i32::unsigned_abs).collect();
        if self.init.exit().is_some() || pids.is_empty() {
            pids.push(self.init.pid());
        }
        let execs = self.execs.borrow();
        let exec_of = |pid: u32| execs.values().find(|e| e.process.pid() == pid).map(|e| e.process.exec_id.clone());
        Ok(pids.into_iter().map(|pid| (pid, exec_of(pid))).collect())
    }

    /// Resource usage, also after the exit.
    pub fn stats(&self) -> Result<Stats> {
        match self.with(Inner::stats) {
            Ok(stats) => {
                *self.last_stats.borrow_mut() = Some(Box::new(stats.clone()));
                Ok(stats)
            }
            Err(err) => self.last_stats.borrow().as_deref().cloned().ok_or(err),
        }
    }

    /// Deletes an exec process that does not run.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<(u32, Option<Exit>)> {
        let process = self.process(exec_id)?;
        match process.phase() {
            Phase::Running | Phase::Starting => return Err(precondition("cannot delete a running process")),
            Phase::Created | Phase::Stopped => {}
        }
        let tree = self.execs.borrow().get(exec_id).and_then(|exec| exec.tree.borrow_mut().take());
        if let Some(tree) = &tree {
            // Whoever it has left running would keep its streams open, and outlive it.
            tree.kill()?;
        }
        process.close_io().await;
        self.execs.borrow_mut().remove(exec_id);
        if let Some(mut tree) = tree {
            for _ in 0..50 {
                if tree.remove_if_empty() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        Ok((process.pid(), process.exit()))
    }

    /// Deletes a container that does not run: cgroup, state, rootfs mounts. One that was never started is killed.
    pub async fn delete(&self) -> Result<(u32, Option<Exit>)> {
        let never_started = self.init.phase() == Phase::Created;
        match self.init.phase() {
            Phase::Running | Phase::Starting => return Err(precondition("cannot delete a running process")),
            Phase::Created if self.to_restore.borrow_mut().take().is_some() => {}
            Phase::Created => {
                match self.with(|inner| inner.kill(libc::SIGKILL, false)) {
                    // It is on its way out already.
                    Err(err) if err.kind() == Kind::NotFound && self.inner.borrow().is_some() => {}
                    other => other?,
                }
                let died = tokio::time::timeout(limits::within(limits::DEATH), self.init.wait()).await;
                died.map_err(|_| self.init.undead())?;
            }
            // Stopped by a failed start, its exit may still be on its way.
            Phase::Stopped => {
                let _ = tokio::time::timeout(Duration::from_secs(5), self.init.wait()).await;
            }
        }
        if self.deleting.send_replace(true) {
            // A repeated Delete waits for the first one: then there is nothing left, or it is this one's turn.
            let _ = self.deleting.subscribe().wait_for(|deleting| !deleting).await;
            if self.inner.borrow().is_none() {
                return Err(crate::error::no_container(&self.id));
            }
            self.deleting.send_replace(true);
        }
        let execs: Vec<_> = self.execs.borrow().values().cloned().collect();
        self.init.close_io().await;
        for exec in execs {
            exec.process.close_io().await;
        }
        let removed = self.remove().await;
        if removed.is_ok() {
            self.inner.borrow_mut().take();
        }
        self.deleting.send_replace(false);
        removed?;
        let exit = self.init.exit().filter(|_| !never_started);
        self.events.send(
            "/tasks/delete",
            &TaskDelete {
                container_id: self.id.clone(),
                pid: self.init.pid(),
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exit.map(|exit| timestamp(exit.at)).into(),
                ..TaskDelete::default()
            },
        );
        Ok((self.init.pid(), exit))
    }

    async fn remove(&self) -> Result<()> {
        let deleted = match &*self.inner.borrow() {
            Some(inner) => inner.delete_at_once()?,
            None => false,
        };
        if deleted && !self.home.mounted {
            return Ok(());
        }
        settle(remove(&self.home, &self.id, &self.bundle)?).await
    }

    /// A line for the log.
    pub fn describe(&self) -> String {
        let execs: Vec<String> =
            self.execs.borrow().values().map(|e| format!("{} {:?}", e.process.exec_id, e.process.phase())).collect();
        let status = self.with(Inner::status).unwrap_or(Status::Stopped);
        format!("container {} pid {} {:?} {status} execs {execs:?}", self.id, self.init.pid(), self.init.phase())
    }
}

/// Removes what there is of a container whose init has ended, or is to end. Hooks, slow file systems and processes on
/// their way out take their time: a child waits for them. What a failed Delete has left, the next one removes.
pub fn remove(home: &Home, id: &str, bundle: &Path) -> Result<Chore> {
    let hooks = Inner::load(&home.root, id).map_or(Duration::ZERO, |inner| inner.poststop_time());
    chore::start(format!("remove container {id:?}"), limits::REMOVE + hooks, || {
        match Inner::load(&home.root, id) {
            Ok(inner) => inner.delete(true)?,
            Err(err) if err.kind() == Kind::NotFound => drop(Inner::remove_leftover(&home.root, id)?),
            Err(err) => return Err(err),
        }
        if home.mounted { rootfs::unmount_all(bundle) } else { Ok(()) }
    })
}

/// The streams of a process to be: pipes, or the wish for a terminal.
pub enum Streams {
    /// Pipes to copy.
    Pipes(Box<Pipes>),
    /// A pty, made by the child.
    Terminal,
}

impl Streams {
    /// For these paths; waits for a logger, for a file to be open, and for the readers of FIFOs.
    pub async fn open(paths: &Paths, manner: Manner, name: Name<'_>) -> Result<Streams> {
        if paths.terminal {
            return Ok(Streams::Terminal);
        }
        Pipes::open(paths, manner, name).await.map(Box::new).map(Streams::Pipes)
    }

    /// What the process gets, and what is copied.
    pub fn split(self) -> (Stdio, Option<crate::io::Copies>) {
        match self {
            Streams::Terminal => (Stdio::Terminal, None),
            Streams::Pipes(pipes) => {
                let (process, copies) = pipes.split();
                (Stdio::Fds(process), Some(copies))
            }
        }
    }
}

/// Whether the init may write to containerd's FIFOs itself: nothing in a pid namespace outlives its first process.
pub fn init_may_have_fifos(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let own = |ns: &LinuxNamespace| ns.typ() == LinuxNamespaceType::Pid && ns.path().is_none();
    namespaces.is_some_and(|all| all.iter().any(own)) && !spec.process().as_ref().is_some_and(labelled)
}

/// The same for exec processes: what one leaves running is killed with its cgroup, unless it can leave that.
pub fn execs_may_have_fifos(spec: &Spec) -> bool {
    let cgroup = |mount: &&Mount| mount.typ().as_deref().is_some_and(|typ| typ.starts_with("cgroup"));
    let read_only = |mount: &Mount| mount.options().as_ref().is_some_and(|all| all.iter().any(|o| o == "ro"));
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    init_may_have_fifos(spec) && mounts.iter().filter(cgroup).all(read_only)
}

/// Annotation: the container is to be one that can be dumped to a checkpoint.
const CHECKPOINTS: &str = "io.containerd.skiff.checkpoint";

/// True when the container says that it will be dumped.
pub fn wants_checkpoints(spec: &Spec) -> bool {
    spec.annotations().as_ref().and_then(|all| all.get(CHECKPOINTS)).is_some_and(|value| value == "true")
}

/// A label may forbid what is not the container's own.
fn labelled(process: &ProcessSpec) -> bool {
    let some = |label: &Option<String>| label.as_ref().is_some_and(|label| !label.is_empty());
    some(process.selinux_label()) || some(process.apparmor_profile())
}

/// Starts the copies of a process that has been made.
pub async fn connect(
    process: &Process,
    copies: Option<crate::io::Copies>,
    console: Option<std::os::fd::OwnedFd>,
    name: Name<'_>,
) -> Result<()> {
    if let Some(copies) = copies {
        process.set_io(copies.start());
    }
    if let Some(master) = console {
        let keep = master.try_clone().map_err(|e| Error::io("share the terminal", &e))?;
        process.set_io(Io::console(master, &process.local_paths(), name).await?);
        process.set_console(keep);
    }
    process.opened();
    Ok(())
}
