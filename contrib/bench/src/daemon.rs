//! One shim, driven by ttrpc as containerd does.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::Client;
use containerd_shim_protos::ttrpc::context::{Context, with_timeout};
use containerd_shim_protos::ttrpc::proto::Request;
use skiff_test_support::{Bundle, unique};

/// Where a shim logs to, in its bundle.
pub const LOG: &str = "log";

/// A running shim with one bundle.
pub struct Daemon {
    /// The bundle.
    pub bundle: Bundle,
    /// Container id.
    pub id: String,
    client: Client,
    socket: PathBuf,
    _log: std::fs::File,
}

fn context() -> Context {
    with_timeout(60_000_000_000)
}

impl Daemon {
    /// Starts a shim for a bundle that has the FIFO [`LOG`].
    pub fn start(shim: &Path, bundle: Bundle) -> Daemon {
        let (id, dir) = (unique("bench"), bundle.path());
        let log = std::fs::OpenOptions::new().read(true).write(true).custom_flags(0o4000).open(dir.join(LOG));
        let log = log.expect("a FIFO");
        let output = Command::new(shim)
            .args(["-namespace", "bench", "-publish-binary", "/bin/true", "-id", &id, "-address"])
            .arg(dir.join("none.sock"))
            .arg("start")
            .env("TTRPC_ADDRESS", dir.join("none.sock.ttrpc"))
            .current_dir(dir)
            .stdin(Stdio::null())
            .output()
            .expect("the shim starts");
        let address = String::from_utf8_lossy(&output.stdout).trim().to_string();
        let client = Client::connect(&address).unwrap_or_else(|e| panic!("{address}: {e}"));
        let socket = PathBuf::from(address.trim_start_matches("unix://"));
        Daemon { bundle, id, client, socket, _log: log }
    }

    /// The same calls by name: both shims know version 2 of the service.
    fn call(&self, method: &str, message: &impl Message) {
        let request = Request {
            service: "containerd.task.v2.Task".into(),
            method: method.into(),
            payload: message.write_to_bytes().expect("a message"),
            timeout_nano: context().timeout_nano,
            ..Request::default()
        };
        self.client.request(request).unwrap_or_else(|e| panic!("{method}: {e}"));
    }

    /// Create, with stdout at a FIFO or nowhere.
    pub fn create(&self, stdout: &str) {
        let bundle = self.bundle.path().display().to_string();
        let (id, stderr) = (self.id.clone(), stdout.into());
        // The Go shim has no stdout without a stderr.
        let request = CreateTaskRequest { id, bundle, stdout: stdout.into(), stderr, ..Default::default() };
        self.call("Create", &request);
    }

    /// Start of the init, or of an exec process.
    pub fn begin(&self, exec_id: &str) {
        self.call("Start", &StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() });
    }

    /// Wait.
    pub fn wait(&self, exec_id: &str) {
        self.call("Wait", &WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() });
    }

    /// Delete.
    pub fn delete(&self, exec_id: &str) {
        self.call("Delete", &DeleteRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() });
    }

    /// A whole exec of `true`.
    pub fn exec(&self, exec_id: &str) {
        let process =
            serde_json::json!({"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
        let spec = Any { type_url: "x".into(), value: process.to_string().into_bytes(), ..Any::default() };
        let spec = MessageField::some(spec);
        self.call(
            "Exec",
            &ExecProcessRequest { id: self.id.clone(), exec_id: exec_id.into(), spec, ..Default::default() },
        );
        self.begin(exec_id);
        self.wait(exec_id);
        self.delete(exec_id);
    }

    /// Shutdown; true when the socket has gone before long.
    pub fn shutdown(&self) {
        self.call("Shutdown", &ShutdownRequest { id: self.id.clone(), ..Default::default() });
    }

    /// Kills the container and ends the shim.
    pub fn end(self) {
        self.call("Kill", &KillRequest { id: self.id.clone(), signal: 9, all: true, ..Default::default() });
        self.wait("");
        self.delete("");
        self.shutdown();
        self.gone();
    }

    /// Waits until the socket is gone.
    pub fn gone(&self) {
        skiff_test_support::eventually("the shim is gone", || !self.socket.exists());
    }

    /// The shim's pid.
    pub fn pid(&self) -> i32 {
        let needle = self.bundle.path().join("none.sock").display().to_string();
        let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
        let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let ours = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&needle)
        };
        pids.find(ours).expect("the shim runs")
    }
}
