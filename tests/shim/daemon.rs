//! A shim without containerd: started in every way that a containerd starts one, driven by a client of our own, its
//! events caught. Skiff's, or with SHIM_UNDER_TEST=io.containerd.runc.v2 the Go shim.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, ForwardRequest, KillRequest, PauseRequest, PidsRequest,
    PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::context::{Context, with_timeout};
use containerd_shim_protos::ttrpc::{self, Client, Code};
use containerd_shim_protos::{Events, create_events};
use skiff_test_support::{Bundle, LeakCheck, eventually, unique};

/// The names of the Task service.
pub const V2: &str = "containerd.task.v2.Task";
pub const V3: &str = "containerd.task.v3.Task";

/// True when skiff is under test, not the reference.
pub fn is_skiff() -> bool {
    std::env::var("SHIM_UNDER_TEST").map_or(true, |runtime| runtime.contains("skiff"))
}

/// The shim's program.
pub fn program() -> PathBuf {
    if is_skiff() { env!("CARGO_BIN_EXE_containerd-shim-skiff-v2").into() } else { "containerd-shim-runc-v2".into() }
}

/// How long a call may take.
pub fn context() -> Context {
    with_timeout(30_000_000_000)
}

/// The Task service under one of its names.
#[derive(Clone)]
pub struct Task {
    client: Client,
    service: &'static str,
}

macro_rules! calls {
    ($($name:ident $method:literal $request:ty => $response:ty;)*) => {
        impl Task {
            $(pub fn $name(&self, context: Context, request: &$request) -> ttrpc::Result<$response> {
                self.call($method, context, request)
            })*
        }
    };
}

calls! {
    state "State" StateRequest => StateResponse;
    create "Create" CreateTaskRequest => CreateTaskResponse;
    start "Start" StartRequest => StartResponse;
    delete "Delete" DeleteRequest => DeleteResponse;
    pids "Pids" PidsRequest => PidsResponse;
    pause "Pause" PauseRequest => Empty;
    resume "Resume" ResumeRequest => Empty;
    checkpoint "Checkpoint" CheckpointTaskRequest => Empty;
    kill "Kill" KillRequest => Empty;
    exec "Exec" ExecProcessRequest => Empty;
    resize_pty "ResizePty" ResizePtyRequest => Empty;
    close_io "CloseIO" CloseIORequest => Empty;
    update "Update" UpdateTaskRequest => Empty;
    wait "Wait" WaitRequest => WaitResponse;
    stats "Stats" StatsRequest => StatsResponse;
    connect "Connect" ConnectRequest => ConnectResponse;
    shutdown "Shutdown" ShutdownRequest => Empty;
}

impl Task {
    /// On a connection of its own.
    pub fn new(address: &str, service: &'static str) -> Task {
        Task { client: Client::connect(address).unwrap_or_else(|e| panic!("{address}: {e}")), service }
    }

    fn call<R: Message>(&self, method: &str, context: Context, request: &impl Message) -> ttrpc::Result<R> {
        let request = ttrpc::Request {
            service: self.service.into(),
            method: method.into(),
            timeout_nano: context.timeout_nano,
            metadata: ttrpc::context::to_pb(context.metadata),
            payload: request.write_to_bytes().expect("a message"),
            ..ttrpc::Request::default()
        };
        let response = self.client.request(request)?;
        Ok(R::parse_from_bytes(&response.payload).expect("an answer of its type"))
    }
}

/// The bytes of a request's frame: length, stream, type (1: request), flags.
pub fn frame(stream: u32, method: &str, message: &impl Message) -> Vec<u8> {
    let request = ttrpc::proto::Request {
        service: if is_skiff() { V3 } else { V2 }.into(),
        method: method.into(),
        payload: message.write_to_bytes().expect("a message"),
        ..ttrpc::proto::Request::default()
    };
    let request = request.write_to_bytes().expect("a message");
    [&(request.len() as u32).to_be_bytes()[..], &stream.to_be_bytes(), &[1, 0], &request].concat()
}

/// What is under `start`'s stdin and around it, by containerd's version.
#[derive(Clone, Debug)]
pub enum Form {
    /// 1.6 to 2.2: the options, or nothing.
    Options(Option<Any>),
    /// 2.0 to 2.2, a sandbox of the shim's own: nothing on stdin, and no config.json.
    Sandbox,
    /// 2.3 and later: parameters for this container, with the options in them.
    Params(Option<Any>),
    /// Any other bytes.
    Bytes(Vec<u8>),
}

/// What `start` has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The API's version; 2 when the answer is an address alone.
    pub version: i32,
    /// Of the socket.
    pub address: String,
}

impl Reply {
    fn read(bytes: &[u8], form: &Form) -> Reply {
        let text = String::from_utf8_lossy(bytes).into_owned();
        match form {
            Form::Params(_) => {
                let result = BootstrapResult::parse_from_bytes(bytes).unwrap_or_else(|e| panic!("{text:?}: {e}"));
                assert_eq!(result.protocol, "ttrpc");
                Reply { version: result.version, address: result.address }
            }
            Form::Sandbox => {
                let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
                assert_eq!(json["protocol"], "ttrpc");
                let address = json["address"].as_str().expect("an address").to_string();
                Reply { version: json["version"].as_i64().expect("a version") as i32, address }
            }
            // containerd trims it, and takes all of the rest.
            Form::Options(_) | Form::Bytes(_) => Reply { version: 2, address: text.trim().to_string() },
        }
    }
}

/// Runs `start` as containerd does: stdout and stderr are one stream, read to its end, so that a daemon which kept it
/// would hang the test. False when it failed.
pub fn start(dir: &Path, id: &str, debug: bool, form: &Form) -> (bool, Vec<u8>) {
    start_for(&dir.join(ADDRESS), dir, id, debug, form, &[])
}

/// The same for a containerd at `address`, with more in its environment.
pub fn start_for(
    address: &Path,
    dir: &Path,
    id: &str,
    debug: bool,
    form: &Form,
    environment: &[(&str, &str)],
) -> (bool, Vec<u8>) {
    let input = match form {
        Form::Options(None) | Form::Sandbox => Vec::new(),
        Form::Options(Some(options)) => options.write_to_bytes().expect("a message"),
        Form::Params(options) => params(dir, id, options.as_ref()).write_to_bytes().expect("a message"),
        Form::Bytes(bytes) => bytes.clone(),
    };
    let stdin = dir.join("stdin");
    std::fs::write(&stdin, input).expect("write the input");
    let (mut said, end) = std::io::pipe().expect("a pipe");
    let mut command = Command::new(program());
    command.args(["-namespace", NAMESPACE, "-publish-binary", "/bin/true", "-id", id, "-address"]);
    command.arg(address).args(debug.then_some("-debug")).arg("start");
    command.env("TTRPC_ADDRESS", dir.join(EVENTS)).envs(environment.iter().copied()).current_dir(dir);
    command.stdin(std::fs::File::open(&stdin).expect("the input"));
    command.stdout(end.try_clone().expect("a pipe")).stderr(end);
    let mut child = command.spawn().expect("the shim starts");
    drop(command);
    let mut reply = Vec::new();
    said.read_to_end(&mut reply).expect("read the answer");
    (child.wait().expect("wait for start").success(), reply)
}

fn params(dir: &Path, id: &str, options: Option<&Any>) -> BootstrapParams {
    use containerd_shim_protos::bootstrap_api::Extension;
    let extension = |any: &Any| Extension { value: MessageField::some(any.clone()), ..Extension::default() };
    BootstrapParams {
        instance_id: id.into(),
        namespace: NAMESPACE.into(),
        containerd_version: "2.3.4".into(),
        containerd_grpc_address: dir.join(ADDRESS).display().to_string(),
        containerd_ttrpc_address: dir.join(EVENTS).display().to_string(),
        extensions: options.iter().map(|any| extension(any)).collect(),
        ..BootstrapParams::default()
    }
}

/// containerd's namespace.
pub const NAMESPACE: &str = "raw";
const ADDRESS: &str = "none.sock";
const EVENTS: &str = "none.sock.ttrpc";

/// containerd's side of the events.
struct Sink(Arc<Mutex<Vec<(String, Any)>>>);

impl Events for Sink {
    fn forward(&self, _: &ttrpc::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        assert_eq!(envelope.namespace, NAMESPACE);
        self.0.lock().expect("a lock").push((envelope.topic.clone(), envelope.event.clone().unwrap_or_default()));
        Ok(Empty::new())
    }
}

/// An event in a word or two: `exit e 0` is that of process `e` with status 0.
fn word(topic: &str, event: &Any) -> (String, String) {
    fn of<M: Message>(any: &Any) -> M {
        M::parse_from_bytes(&any.value).expect("an event of its type")
    }
    let name = topic.trim_start_matches("/tasks/");
    assert!(event.type_url.starts_with("containerd.events.Task"), "{}", event.type_url);
    let (id, rest) = match name {
        "create" => (of::<TaskCreate>(event).container_id, String::new()),
        "start" => (of::<TaskStart>(event).container_id, String::new()),
        "exec-added" => {
            let event: TaskExecAdded = of(event);
            (event.container_id, event.exec_id)
        }
        "exec-started" => {
            let event: TaskExecStarted = of(event);
            (event.container_id, event.exec_id)
        }
        "exit" => {
            let event: TaskExit = of(event);
            let who = if event.id == event.container_id { "init" } else { &event.id };
            (event.container_id.clone(), format!("{who} {}", event.exit_status))
        }
        "delete" => {
            let event: TaskDelete = of(event);
            (event.container_id, event.exit_status.to_string())
        }
        "oom" => (of::<TaskOOM>(event).container_id, String::new()),
        "paused" => (of::<TaskPaused>(event).container_id, String::new()),
        "resumed" => (of::<TaskResumed>(event).container_id, String::new()),
        other => panic!("event {other:?}"),
    };
    (id, format!("{name} {rest}").trim_end().to_string())
}

/// A container to be: a bundle, an id, and a connection to the shim.
pub struct Container {
    pub bundle: Bundle,
    pub id: String,
    pub client: Task,
}

/// A daemon, and the container that it was started for.
pub struct Daemon {
    container: Container,
    pub address: String,
    pub reply: Reply,
    /// Where the daemon logs: its bundle, or that of a sandbox.
    home: PathBuf,
    log: std::fs::File,
    events: Arc<Mutex<Vec<(String, Any)>>>,
    server: Option<ttrpc::Server>,
}

impl Daemon {
    pub fn start(args: &[&str]) -> Daemon {
        Daemon::with(Bundle::new(args))
    }

    pub fn with(bundle: Bundle) -> Daemon {
        Daemon::launch(bundle, &Form::Options(None), false)
    }

    /// Started in the given way, with or without `-debug`.
    pub fn launch(bundle: Bundle, form: &Form, debug: bool) -> Daemon {
        Daemon::launch_as(bundle, unique("rawtest"), form, debug, &[])
    }

    /// The same with an id that the bundle knows of, and more in its environment.
    pub fn launch_as(bundle: Bundle, id: String, form: &Form, debug: bool, environment: &[(&str, &str)]) -> Daemon {
        bundle.write();
        let home = match form {
            Form::Sandbox => bundle.path().join("io.containerd.sandbox.controller.v1.shim").join(NAMESPACE).join(&id),
            _ => bundle.path().to_path_buf(),
        };
        std::fs::create_dir_all(&home).expect("make a bundle");
        let log = open_log(&home);
        let events = Arc::new(Mutex::new(Vec::new()));
        let mut server = ttrpc::Server::new()
            .bind(&format!("unix://{}", home.join(EVENTS).display()))
            .expect("bind a socket for events")
            .register_service(create_events(Arc::new(Sink(events.clone()))));
        server.start().expect("listen for events");
        let (ok, said) = start_for(&home.join(ADDRESS), &home, &id, debug, form, environment);
        assert!(ok, "{}", String::from_utf8_lossy(&said));
        let reply = Reply::read(&said, form);
        let address = reply.address.clone();
        let client = Task::new(&address, if is_skiff() { V3 } else { V2 });
        let container = Container { bundle, id, client };
        Daemon { container, address, reply, home, log, events, server: Some(server) }
    }

    pub fn connect(&self) -> Task {
        self.on(self.client.service)
    }

    /// A connection to the service of this name.
    pub fn on(&self, service: &'static str) -> Task {
        Task::new(&self.address, service)
    }

    /// A connection that nobody reads from.
    pub fn socket(&self) -> std::os::unix::net::UnixStream {
        std::os::unix::net::UnixStream::connect(self.address.trim_start_matches("unix://")).expect("it listens")
    }

    /// The directory that the daemon was started in.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The same, with nobody left who reads its log.
    pub fn without_log(mut self) -> Daemon {
        self.log = std::fs::File::open("/dev/null").expect("/dev/null");
        self
    }

    /// What has been logged since the last time.
    pub fn logged(&self) -> String {
        let mut bytes = Vec::new();
        let _ = (&self.log).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The daemon's pid.
    pub fn pid(&self) -> i32 {
        let request = ConnectRequest { id: self.id.clone(), ..ConnectRequest::default() };
        self.client.connect(context(), &request).expect("Connect answers").shim_pid as i32
    }

    /// The events of container `id` so far, in words.
    pub fn events(&self, id: &str) -> Vec<String> {
        let all = self.events.lock().expect("a lock");
        let words = all.iter().map(|(topic, event)| word(topic, event));
        words.filter(|(container, _)| container == id).map(|(_, word)| word).collect()
    }

    /// Forgets the events so far.
    pub fn forget_events(&self) {
        self.events.lock().expect("a lock").clear();
    }

    /// One more container in the same shim.
    pub fn member(&self, args: &[&str]) -> Container {
        let bundle = Bundle::new(args);
        bundle.write();
        Container { bundle, id: unique("rawtest"), client: self.connect() }
    }

    /// Shutdown, after which nothing may be left.
    pub fn end(mut self) {
        let request = ShutdownRequest { id: self.id.clone(), ..ShutdownRequest::default() };
        let answer = self.client.shutdown(context(), &request);
        // The Go shim may be gone before it has answered, and skiff after a Shutdown that it has remembered.
        if !matches!(&answer, Err(ttrpc::Error::Socket(_) | ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed)) {
            answer.expect("Shutdown answers");
        }
        let socket = PathBuf::from(self.address.trim_start_matches("unix://"));
        if is_skiff() {
            assert!(!socket.exists(), "who starts a shim from now on gets a new one");
        }
        eventually("the socket is gone", || !socket.exists());
        LeakCheck::new(&[&self.id, &self.bundle.path().display().to_string()]).end();
        self.server.take().expect("a server").shutdown();
    }
}

impl std::ops::Deref for Daemon {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.container
    }
}

impl Container {
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.bundle.path().join(name);
        make_fifo(&path);
        path
    }

    pub fn create_request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.path().display().to_string(),
            ..CreateTaskRequest::default()
        }
    }

    pub fn create_with(&self, [stdin, stdout, stderr]: [&Path; 3]) -> ttrpc::Result<u32> {
        let text = |path: &Path| path.display().to_string();
        let request = CreateTaskRequest {
            stdin: text(stdin),
            stdout: text(stdout),
            stderr: stderr_beside(&text(stdout), &text(stderr)),
            ..self.create_request()
        };
        self.client.create(context(), &request).map(|response| response.pid)
    }

    pub fn create(&self) -> ttrpc::Result<u32> {
        self.create_with([Path::new(""); 3])
    }

    pub fn start_request(&self, exec_id: &str) -> StartRequest {
        StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..StartRequest::default() }
    }

    pub fn begin(&self, exec_id: &str) -> ttrpc::Result<u32> {
        self.client.start(context(), &self.start_request(exec_id)).map(|response| response.pid)
    }

    pub fn exec(&self, exec_id: &str, args: &[&str]) -> ttrpc::Result<()> {
        self.exec_to(exec_id, args, Path::new(""))
    }

    pub fn exec_to(&self, exec_id: &str, args: &[&str], stdout: &Path) -> ttrpc::Result<()> {
        let stdout = stdout.display().to_string();
        let stderr = stderr_beside(&stdout, "");
        let request = ExecProcessRequest { stdout, stderr, ..self.exec_request(exec_id, args) };
        self.client.exec(context(), &request).map(drop)
    }

    pub fn exec_request(&self, exec_id: &str, args: &[&str]) -> ExecProcessRequest {
        self.process_request(exec_id, args, false)
    }

    /// With a terminal, whose output goes to `stdout`.
    pub fn terminal_request(&self, exec_id: &str, args: &[&str], stdout: &Path) -> ExecProcessRequest {
        let stdout = stdout.display().to_string();
        ExecProcessRequest { terminal: true, stdout, ..self.process_request(exec_id, args, true) }
    }

    fn process_request(&self, exec_id: &str, args: &[&str], terminal: bool) -> ExecProcessRequest {
        let process = serde_json::json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "terminal": terminal,
            "user": {"uid": 0, "gid": 0}});
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".into();
        let spec = Any { type_url, value: process.to_string().into_bytes(), ..Any::default() };
        ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        }
    }

    pub fn state(&self, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest { id: self.id.clone(), exec_id: exec_id.into(), ..StateRequest::default() };
        self.client.state(context(), &request)
    }

    pub fn status(&self, exec_id: &str) -> Status {
        self.state(exec_id).expect("a state").status.enum_value().expect("a known status")
    }

    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request =
            KillRequest { id: self.id.clone(), exec_id: exec_id.into(), signal, all, ..KillRequest::default() };
        self.client.kill(context(), &request).map(drop)
    }

    pub fn wait(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..WaitRequest::default() };
        self.client.wait(context(), &request).map(|response| response.exit_status)
    }

    pub fn delete(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: exec_id.into(), ..DeleteRequest::default() };
        self.client.delete(context(), &request).map(|response| response.exit_status)
    }

    /// Kills what runs, and deletes it.
    pub fn finish(&self) {
        self.kill("", 9, true).expect("kill");
        self.wait("").expect("wait");
        self.delete("").expect("delete");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the shim's log: {}", self.logged());
            let _ = self.kill("", 9, true);
            let line = self.home.join(ADDRESS);
            let _ = Command::new("pkill").args(["-KILL", "-f"]).arg(line).status();
        }
        // Only when it is empty: other tests may be at it.
        let _ = std::fs::remove_dir(Path::new("/run/containerd/runc").join(NAMESPACE));
    }
}

/// Makes the FIFO of a shim's log, and opens it as containerd does.
pub fn open_log(dir: &Path) -> std::fs::File {
    make_fifo(&dir.join("log"));
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(dir.join("log")).expect("a FIFO")
}

pub fn make_fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).stdin(Stdio::null()).status().expect("mkfifo").success());
}

/// The Go shim has no stdout without a stderr.
fn stderr_beside(stdout: &str, stderr: &str) -> String {
    if is_skiff() || !stderr.is_empty() { stderr } else { stdout }.to_string()
}

/// An error of this code; many of the Go shim's have none.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: ttrpc::Result<T>, code: Code) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => {
            let got = status.code.enum_value().expect("a known code");
            assert!(got == code || (!is_skiff() && got == Code::UNKNOWN), "{got:?}: {}", status.message);
        }
        other => panic!("{code:?} was expected, not {other:?}"),
    }
}
