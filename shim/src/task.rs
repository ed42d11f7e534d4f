//! The Task service, v2 and v3: decodes requests, asks the one task that owns everything, encodes answers.
//!
//! ttrpc drops the future of a handler when its client goes away. What changes state therefore runs in a local task
//! of its own, and the handler only waits for its answer.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Result as TtrpcResult;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::{protobuf, ttrpc};
use skiff::container::{Create, Gate};
use skiff::{Error, Kind, Result};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::cleanup::Rest;
use crate::container::{
    Container, Home, Streams, ToRestore, connect, execs_may_have_fifos, init_may_have_fifos, wants_checkpoints,
};
use crate::error::{no_container, status};
use crate::events::{Events, timestamp};
use crate::io::{Manner, Name, Paths};
use crate::pending::{Call, Calls};
use crate::process::{Phase, Process, settle};
use crate::spans::Spans;
use crate::streaming::{self, Local};
use crate::{metrics, options, pause, rootfs, sandbox};

/// Base of the state directories, as the Go shim has it: other programs look there.
pub const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// Everything that this shim holds.
pub struct Shim {
    /// containerd's namespace.
    pub namespace: String,
    /// Where events go.
    pub events: Events,
    /// Notified when the shim is to end.
    pub exit: Notify,
    containers: RefCell<BTreeMap<String, Rc<Container>>>,
    /// Those whose Create has failed, and who are not taken back yet.
    dying: RefCell<BTreeSet<String>>,
    /// Those whose Create is under way.
    creating: watch::Sender<BTreeSet<String>>,
    shutdown_refused: std::cell::Cell<bool>,
    /// Where it listens.
    socket: RefCell<Option<PathBuf>>,
    /// It is about to exit.
    leaving: std::cell::Cell<bool>,
    /// Requests that are not answered yet.
    pub calls: Calls,
    /// The pod, where there is no pause container.
    pub sandbox: sandbox::Slot,
    /// Clients of the streaming service.
    pub streams: Rc<streaming::Streams>,
    rootless: bool,
}

/// Work for the task that owns the shim.
pub type Job = Box<dyn FnOnce(Rc<Shim>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The service as ttrpc sees it: a way to the owner.
#[derive(Clone)]
pub struct Service {
    jobs: mpsc::UnboundedSender<Job>,
}

impl Service {
    /// The service, and the jobs that it makes.
    pub fn new() -> (Service, mpsc::UnboundedReceiver<Job>) {
        let (jobs, receiver) = mpsc::unbounded_channel();
        (Service { jobs }, receiver)
    }

    /// Lets the owner work on a request, and waits for its answer.
    pub async fn ask<T, F, A>(&self, call: Call, ask: A) -> TtrpcResult<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
        A: FnOnce(Rc<Shim>) -> F + Send + 'static,
    {
        let (mut answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |shim| {
            Box::pin(async move {
                let calls = shim.calls.clone();
                let call = calls.begin(call);
                let done = tokio::select! {
                    done = ask(shim) => done,
                    // What only waits ends with its client; what changes something is done to its end.
                    () = answer.closed(), if call.only_waits => Err(gone_away()),
                };
                calls.answered(&call, done.as_ref().err());
                let _ = answer.send(done);
            })
        });
        let gone = || ttrpc::Error::Others("shim is ending".to_string());
        self.jobs.send(job).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?.map_err(|err| status(&err))
    }
}

fn gone_away() -> Error {
    Error::new(Kind::System, "the client has gone away")
}

/// After so long without a request memory goes back to the kernel: a create takes more of it than a container that runs.
const QUIET: Duration = Duration::from_millis(250);

/// Set when memory is to go back before the event loop waits the next time: nothing deep is on the stack then.
pub type Tidy = Arc<AtomicBool>;

/// Runs each job in a local task of its own.
pub async fn run(shim: Rc<Shim>, mut jobs: mpsc::UnboundedReceiver<Job>, tidy: Tidy) {
    let mut quiet = true;
    loop {
        let job = if quiet {
            jobs.recv().await
        } else if let Ok(job) = tokio::time::timeout(QUIET, jobs.recv()).await {
            job
        } else {
            tidy.store(true, Ordering::Relaxed);
            quiet = true;
            continue;
        };
        let Some(job) = job else { return };
        quiet = false;
        tokio::task::spawn_local(job(shim.clone()));
    }
}

impl Shim {
    /// An empty one.
    pub fn new(namespace: &str, events: Events, socket: Option<PathBuf>, spans: Option<Rc<Spans>>) -> Rc<Shim> {
        Rc::new(Shim {
            socket: RefCell::new(socket),
            leaving: std::cell::Cell::new(false),
            namespace: namespace.to_string(),
            events,
            exit: Notify::new(),
            containers: RefCell::default(),
            dying: RefCell::default(),
            creating: watch::Sender::default(),
            shutdown_refused: std::cell::Cell::new(false),
            calls: Calls::new(spans),
            sandbox: sandbox::Slot::default(),
            streams: Rc::default(),
            rootless: skiff::host::rootless(),
        })
    }

    fn container(&self, id: &str) -> Result<Rc<Container>> {
        self.containers.borrow().get(id).cloned().ok_or_else(|| no_container(id))
    }

    /// Lines for the log.
    pub fn describe(&self) -> Vec<String> {
        let containers = self.containers.borrow();
        containers.values().map(|container| container.describe()).chain(self.calls.describe()).collect()
    }

    fn is_empty(&self) -> bool {
        let idle = self.containers.borrow().is_empty() && self.creating.borrow().is_empty();
        idle && self.dying.borrow().is_empty() && self.sandbox.borrow().is_none()
    }

    async fn create(self: &Rc<Self>, request: CreateTaskRequest) -> Result<u32> {
        skiff::state::check_id(&request.id)?;
        if self.leaving.get() {
            return Err(Error::new(Kind::FailedPrecondition, "the shim is shutting down"));
        }
        if self.dying.borrow().contains(&request.id) {
            let text = format!("container {:?} is still being deleted: something hangs", request.id);
            return Err(Error::new(Kind::AlreadyExists, text));
        }
        let mut free = !self.containers.borrow().contains_key(&request.id);
        self.creating.send_modify(|ids| free = free && ids.insert(request.id.clone()));
        if !free {
            return Err(Error::new(Kind::AlreadyExists, skiff::error::CONTAINER_ID_EXISTS));
        }
        let created = self.create_reserved(&request).await;
        self.creating.send_modify(|ids| {
            ids.remove(&request.id);
        });
        if created.is_err() {
            self.leave_if_asked();
        }
        created
    }

    /// A Shutdown that was refused is due when nothing is left.
    fn leave_if_asked(&self) {
        if self.shutdown_refused.get() && self.is_empty() {
            self.leave();
            self.exit.notify_one();
        }
    }

    /// Takes back what a failed create has made. Done, or given up for now, when this comes back; then it goes on by itself.
    async fn take_back(self: &Rc<Self>, id: &str, rest: Rest) {
        self.dying.borrow_mut().insert(id.to_string());
        let (shim, id) = (self.clone(), id.to_string());
        let (tried, first_try) = oneshot::channel();
        tokio::task::spawn_local(async move {
            rest.take_back(&id, tried).await;
            shim.dying.borrow_mut().remove(&id);
            shim.leave_if_asked();
        });
        let _ = first_try.await;
    }

    async fn create_reserved(self: &Rc<Self>, request: &CreateTaskRequest) -> Result<u32> {
        let options = options::parse(request.options.as_ref())?;
        let bundle = PathBuf::from(&request.bundle);
        let mut spec = skiff::bundle::load(&bundle, None)?;
        if let Some(sandbox) = &*self.sandbox.borrow() {
            sandbox.complete(&mut spec)?;
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let owner = (options.io_uid, options.io_gid);
        if let Some(root) = &options.root {
            crate::delete::remember_root(&bundle, root)?;
        }
        let name = Name { id: &request.id, namespace: &self.namespace };
        let checkpoint = Some(PathBuf::from(&request.checkpoint)).filter(|path| !path.as_os_str().is_empty());
        // CRIU dumps pipes, but no FIFOs that lie outside of the container.
        let pipes = checkpoint.is_some() || options.criu_work_path.is_some() || wants_checkpoints(&spec);
        let manner = Manner { owner, direct: !pipes && owner == (0, 0) && init_may_have_fifos(&spec) };
        let local = Local::new(&self.streams, &paths)?;
        let opened = local.as_ref().map_or(&paths, |local| &local.paths);
        let (stdio, copies) = Streams::open(opened, manner, name).await?.split();
        let mounted = !request.rootfs.is_empty();
        let mut rest = Rest { mounted: mounted.then(|| bundle.clone()), ..Rest::default() };
        let made = async {
            if mounted {
                rootfs::set_up(&bundle, &request.rootfs, &mut rest.mounting).await?;
            }
            let root = options.root.clone().unwrap_or_else(|| DEFAULT_ROOT.into()).join(&self.namespace);
            let create = Create {
                id: request.id.clone(),
                config: None,
                bundle: bundle.clone(),
                root: root.clone(),
                stdio,
                gate: Gate::Socket,
                systemd_cgroup: options.systemd_cgroup || skiff::plan::scope::is_meant(&spec),
                no_pivot: options.no_pivot_root,
                no_new_keyring: options.no_new_keyring,
                preserve_fds: 0,
                notify: false,
                trace: self.calls.trace(&request.id),
                rootless: self.rootless,
                pause: pause::wanted(&spec, options.builtin_pause),
            };
            let init = Process::new("", paths);
            init.set_local(local);
            let home = Home { root, namespace: self.namespace.clone(), mounted, work: options.criu_work_path };
            let exec_manner = Manner { direct: manner.direct && execs_may_have_fifos(&spec), ..manner };
            let events = self.events.clone();
            if let Some(images) = checkpoint {
                let to_restore = ToRestore { request: create, spec, images, copies };
                return Ok(Container::to_restore(to_restore, bundle.clone(), init, home, exec_manner, events));
            }
            let mut creating = skiff::container::create(create, &spec)?;
            // While the init is busy; what lives on gets its place.
            drop(spec);
            let created = settle(&mut creating).await;
            rest.left = creating.leftover();
            let created = created?;
            rest.init = Some((init.clone(), home.clone()));
            init.set_child(created.init)?;
            connect(&init, copies, created.console, name).await?;
            Ok(Container::new(created.container, bundle.clone(), init, home, exec_manner, events))
        }
        .await;
        let container = match made {
            Ok(container) => container,
            Err(err) => {
                self.take_back(&request.id, rest).await;
                return Err(err);
            }
        };
        let pid = container.init.pid();
        self.containers.borrow_mut().insert(request.id.clone(), container);
        self.events.send("/tasks/create", &created_event(request, pid));
        Ok(pid)
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse> {
        // A client that has given its Create up, or a containerd that has been started again, would leave behind what
        // comes of it.
        let _ = self.creating.subscribe().wait_for(|ids| !ids.contains(&request.id)).await;
        let container = self.container(&request.id)?;
        let (pid, exit) = if request.exec_id.is_empty() {
            let deleted = container.delete().await?;
            self.containers.borrow_mut().remove(&request.id);
            self.leave_if_asked();
            deleted
        } else {
            container.delete_exec(&request.exec_id).await?
        };
        Ok(DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..DeleteResponse::default()
        })
    }

    fn state(&self, request: &StateRequest) -> Result<StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.exit();
        let status = match process.phase() {
            _ if exit.is_some() => Status::STOPPED,
            Phase::Created | Phase::Starting => Status::CREATED,
            _ if container.paused() => Status::PAUSED,
            // Its exit is about to be published.
            Phase::Running | Phase::Stopped => Status::RUNNING,
        };
        Ok(StateResponse {
            id: if request.exec_id.is_empty() { request.id.clone() } else { request.exec_id.clone() },
            bundle: container.bundle.display().to_string(),
            pid: process.pid(),
            status: status.into(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id.clone(),
            ..StateResponse::default()
        })
    }

    /// Asked for while containers are left, it is remembered: some versions of containerd ask only once.
    pub fn shutdown(self: &Rc<Self>) {
        if !self.is_empty() {
            self.shutdown_refused.set(true);
            return;
        }
        self.leave();
        let shim = self.clone();
        tokio::task::spawn_local(async move {
            // The answer to this very request goes out first: the tasks that send it are ready, and this timer is not.
            tokio::time::sleep(Duration::from_millis(1)).await;
            shim.exit.notify_one();
        });
    }

    /// The socket goes before the answer: whoever starts a shim from now on gets a new one.
    pub fn leave(&self) {
        self.leaving.set(true);
        if let Some(socket) = self.socket.take() {
            let _ = std::fs::remove_file(socket);
        }
    }
}

fn created_event(request: &CreateTaskRequest, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..TaskIO::default()
        }),
        checkpoint: request.checkpoint.clone(),
        pid,
        ..TaskCreate::default()
    }
}

fn process_info((pid, exec_id): (u32, Option<String>)) -> ProcessInfo {
    let info = exec_id.map(|exec_id| {
        let details = containerd_shim_protos::shim::oci::ProcessDetails { exec_id, ..Default::default() };
        protobuf::well_known_types::any::Any {
            type_url: "containerd.runc.v1.ProcessDetails".into(),
            value: details.write_to_bytes().unwrap_or_default(),
            ..Default::default()
        }
    });
    ProcessInfo { pid, info: info.into(), ..ProcessInfo::default() }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, context: &TtrpcContext, request: StateRequest) -> TtrpcResult<StateResponse> {
        self.ask(Call::new("State", &request.id, &request.exec_id).of(context), move |shim| async move {
            shim.state(&request)
        })
        .await
    }

    async fn create(&self, context: &TtrpcContext, request: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        let pid =
            self.ask(Call::new("Create", &request.id, "").of(context), move |shim| async move {
                shim.create(request).await
            })
            .await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, context: &TtrpcContext, request: StartRequest) -> TtrpcResult<StartResponse> {
        let pid = self
            .ask(Call::new("Start", &request.id, &request.exec_id).of(context), move |shim| async move {
                shim.container(&request.id)?.start(&request.exec_id).await
            })
            .await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        self.ask(Call::new("Delete", &request.id, &request.exec_id).of(context), move |shim| async move {
            shim.delete(request).await
        })
        .await
    }

    async fn pids(&self, context: &TtrpcContext, request: PidsRequest) -> TtrpcResult<PidsResponse> {
        let pids = self
            .ask(Call::new("Pids", &request.id, "").of(context), move |shim| async move {
                shim.container(&request.id)?.pids()
            })
            .await?;
        let processes = pids.into_iter().map(process_info).collect();
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Pause", &request.id, "").of(context), move |shim| async move {
            shim.container(&request.id)?.pause().await
        })
        .await
        .map(|()| Empty::new())
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Resume", &request.id, "").of(context), move |shim| async move {
            shim.container(&request.id)?.resume()
        })
        .await
        .map(|()| Empty::new())
    }

    async fn checkpoint(&self, context: &TtrpcContext, request: api::CheckpointTaskRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Checkpoint", &request.id, "").of(context), move |shim| async move {
            let container = shim.container(&request.id)?;
            container.checkpoint(options::checkpoint(request.options.as_ref(), &request.path)?).await
        })
        .await
        .map(|()| Empty::new())
    }

    async fn kill(&self, context: &TtrpcContext, request: KillRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Kill", &request.id, &request.exec_id).of(context), move |shim| async move {
            shim.container(&request.id)?.kill(&request.exec_id, request.signal, request.all)
        })
        .await
        .map(|()| Empty::new())
    }

    async fn exec(&self, context: &TtrpcContext, request: ExecProcessRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Exec", &request.id, &request.exec_id).of(context), move |shim| async move {
            let container = shim.container(&request.id)?;
            if request.exec_id.is_empty() {
                return Err(Error::invalid("exec_id", "must not be empty"));
            }
            let process = skiff::bundle::parse_process(&request.spec.value)?;
            let paths = Paths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            let local = Local::new(&shim.streams, &paths)?;
            container.add_exec(&request.exec_id, process, paths, local)
        })
        .await
        .map(|()| Empty::new())
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: ResizePtyRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("ResizePty", &request.id, &request.exec_id).of(context), move |shim| async move {
            let process = shim.container(&request.id)?.process(&request.exec_id)?;
            if process.exit().is_some() && !request.exec_id.is_empty() {
                return Err(crate::error::precondition("cannot resize a stopped process"));
            }
            process.resize(request.width, request.height)
        })
        .await
        .map(|()| Empty::new())
    }

    async fn close_io(&self, context: &TtrpcContext, request: CloseIORequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("CloseIO", &request.id, &request.exec_id).of(context), move |shim| async move {
            let process = shim.container(&request.id)?.process(&request.exec_id)?;
            if request.stdin {
                process.close_stdin();
            }
            Ok(())
        })
        .await
        .map(|()| Empty::new())
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Update", &request.id, "").of(context), move |shim| async move {
            let resources =
                serde_json::from_slice(&request.resources.value).map_err(|e| Error::invalid("resources", e))?;
            shim.container(&request.id)?.update(resources).await
        })
        .await
        .map(|()| Empty::new())
    }

    async fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> TtrpcResult<WaitResponse> {
        let exit = self
            .ask(Call::new("Wait", &request.id, &request.exec_id).of(context).only_waits(), move |shim| async move {
                let process = shim.container(&request.id)?.process(&request.exec_id)?;
                process.wait().await.ok_or_else(|| no_container(&request.id))
            })
            .await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, context: &TtrpcContext, request: StatsRequest) -> TtrpcResult<StatsResponse> {
        let stats = self
            .ask(Call::new("Stats", &request.id, "").of(context), move |shim| async move {
                shim.container(&request.id)?.stats()
            })
            .await?;
        Ok(StatsResponse { stats: MessageField::some(metrics::any(&stats)), ..StatsResponse::default() })
    }

    /// Never fails: it is how containerd finds out whether a shim lives.
    async fn connect(&self, context: &TtrpcContext, request: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        let task_pid = self
            .ask(Call::new("Connect", &request.id, "").of(context), move |shim| async move {
                Ok(shim.container(&request.id).map_or(0, |c| c.init.pid()))
            })
            .await
            .unwrap_or(0);
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, context: &TtrpcContext, request: ShutdownRequest) -> TtrpcResult<Empty> {
        self.ask(Call::new("Shutdown", &request.id, "").of(context), move |shim| async move {
            shim.shutdown();
            Ok(())
        })
        .await
        .map(|()| Empty::new())
    }
}
