//! One shim, driven by ttrpc as containerd does.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MessageHeader, Request, Response,
};
use skiff_test_support::{Bundle, unique};

/// Where a shim logs to, in its bundle.
pub const LOG: &str = "log";

/// A running shim with one bundle.
pub struct Daemon {
    /// The bundle.
    pub bundle: Bundle,
    /// Container id.
    pub id: String,
    /// The client of the published crate wakes threads of its own for each call, which would be measured, too.
    connection: UnixStream,
    stream: Cell<u32>,
    socket: PathBuf,
    _log: std::fs::File,
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
        let socket = PathBuf::from(address.trim_start_matches("unix://"));
        let connection = UnixStream::connect(&socket).unwrap_or_else(|e| panic!("{address}: {e}"));
        connection.set_read_timeout(Some(std::time::Duration::from_secs(60))).expect("a deadline");
        Daemon { bundle, id, connection, stream: Cell::new(1), socket, _log: log }
    }

    /// The same calls by name: both shims know version 2 of the service.
    fn call(&self, method: &str, message: &impl Message) {
        let request = Request {
            service: "containerd.task.v2.Task".into(),
            method: method.into(),
            payload: message.write_to_bytes().expect("a message"),
            ..Request::default()
        }
        .write_to_bytes()
        .expect("a request");
        let stream_id = self.stream.replace(self.stream.get() + 2);
        let length = u32::try_from(request.len()).expect("a short request");
        let header = MessageHeader { length, stream_id, type_: MESSAGE_TYPE_REQUEST, flags: 0 };
        let frame = [Vec::from(header), request].concat();
        let exchange = || -> std::io::Result<Vec<u8>> {
            (&self.connection).write_all(&frame)?;
            let mut header = [0; MESSAGE_HEADER_LENGTH];
            (&self.connection).read_exact(&mut header)?;
            let mut body = vec![0; MessageHeader::from(header.as_slice()).length as usize];
            (&self.connection).read_exact(&mut body)?;
            Ok(body)
        };
        let body = exchange().unwrap_or_else(|e| panic!("{method}: {e}"));
        let response = Response::parse_from_bytes(&body).unwrap_or_else(|e| panic!("{method}: {e}"));
        let code = response.status.code.value();
        assert_eq!(code, 0, "{method}: {}", response.status.message);
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
