//! Standard streams in all their forms, by a client of our own.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::{CloseIORequest, CreateTaskRequest, ExecProcessRequest, ResizePtyRequest, Status};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::ttrpc::Code;
use skiff_test_support::{Bundle, eventually};

use crate::daemon::{Daemon, context, is_skiff, refused};
use crate::raw::reader;

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// From Create to Delete with these streams; the exit status.
fn life(daemon: &Daemon, request: &CreateTaskRequest) -> u32 {
    daemon.client.create(context(), request).unwrap();
    daemon.begin("").unwrap();
    let status = daemon.wait("").unwrap();
    assert_eq!(daemon.delete("").unwrap(), status);
    status
}

const SAYS: [&str; 3] = ["sh", "-c", "echo out; echo err >&2; cat; exit 4"];

/// A file is added to, not begun anew, made with its directories, and gets stderr as well.
#[test]
fn a_file_gets_both_streams() {
    let daemon = Daemon::start(&SAYS);
    let file = daemon.bundle.path().join("logs/of/this/file");
    let uri = format!("file://{}", file.display());
    let request = CreateTaskRequest { stdout: uri.clone(), stderr: uri, ..daemon.create_request() };
    for round in 1..=2 {
        assert_eq!(life(&daemon, &request), 4);
        let mut lines: Vec<String> = std::fs::read_to_string(&file).unwrap().lines().map(str::to_string).collect();
        lines.sort();
        assert_eq!(lines, [vec!["err"; round], vec!["out"; round]].concat());
    }
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o644);
    daemon.end();
}

/// Each stream is a form of its own; what has none is empty.
#[test]
fn mixed_forms() {
    let daemon = Daemon::start(&SAYS);
    let (stdin, out, err) = (daemon.fifo("in"), daemon.fifo("out"), daemon.fifo("err"));
    let plain = daemon.bundle.path().join("plain");
    std::fs::write(&plain, "before\n").unwrap();

    // Both outputs, no input: the process sees its end.
    let (out_text, err_text) = (reader(&out), reader(&err));
    let request = CreateTaskRequest { stdout: text(&out), stderr: text(&err), ..daemon.create_request() };
    assert_eq!(life(&daemon, &request), 4);
    assert_eq!((out_text.join().unwrap().as_str(), err_text.join().unwrap().as_str()), ("out\n", "err\n"));

    // Input, one FIFO by its URI, and a plain file that is named as a path.
    let out_text = reader(&out);
    let request = CreateTaskRequest {
        stdin: text(&stdin),
        // The Go shim of 1.6 takes the whole of it for a path.
        stdout: format!("{}{}", if is_skiff() { "fifo://" } else { "" }, out.display()),
        stderr: text(&plain),
        ..daemon.create_request()
    };
    let writing = {
        let stdin = stdin.clone();
        std::thread::spawn(move || {
            std::fs::File::options().write(true).open(stdin).unwrap().write_all(b"in\n").unwrap()
        })
    };
    daemon.client.create(context(), &request).unwrap();
    daemon.begin("").unwrap();
    writing.join().unwrap();
    let close = CloseIORequest { id: daemon.id.clone(), stdin: true, ..Default::default() };
    daemon.client.close_io(context(), &close).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 4);
    daemon.delete("").unwrap();
    assert_eq!(out_text.join().unwrap(), "out\nin\n");
    assert_eq!(std::fs::read_to_string(&plain).unwrap(), "before\nerr\n");

    // One output only, which the Go shim cannot.
    if is_skiff() {
        for (stdout, stderr, want) in [(text(&out), String::new(), "out\n"), (String::new(), text(&out), "err\n")] {
            let output = reader(&out);
            assert_eq!(life(&daemon, &CreateTaskRequest { stdout, stderr, ..daemon.create_request() }), 4);
            assert_eq!(output.join().unwrap(), want);
        }
    }
    assert_eq!(life(&daemon, &daemon.create_request()), 4);
    daemon.end();
}

/// The pipes belong to whom the options name, as a user namespace's root needs it.
#[test]
fn pipes_have_an_owner() {
    let mut bundle = Bundle::new(&["sh", "-c", "for n in 0 1 2; do stat -Lc %u:%g /proc/self/fd/$n; done"]);
    bundle.spec["process"]["user"] = serde_json::json!({"uid": 1234, "gid": 2345});
    let daemon = Daemon::with(bundle);
    let (stdin, out, err) = (daemon.fifo("in"), daemon.fifo("out"), daemon.fifo("err"));
    let (out_text, err_text) = (reader(&out), reader(&err));
    let options = Options { io_uid: 1234, io_gid: 2345, ..Options::default() };
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: options.write_to_bytes().unwrap(),
        ..Any::default()
    };
    let request = CreateTaskRequest {
        stdin: text(&stdin),
        stdout: text(&out),
        stderr: text(&err),
        options: MessageField::some(options),
        ..daemon.create_request()
    };
    let writer = std::fs::File::options().read(true).write(true).open(&stdin).unwrap();
    assert_eq!(life(&daemon, &request), 0);
    drop(writer);
    assert_eq!(out_text.join().unwrap(), "1234:2345\n".repeat(3));
    assert_eq!(err_text.join().unwrap(), "");
    daemon.end();
}

/// A program that writes what it reads, and what it is told, to `log`.
fn logger(daemon: &Daemon, ready: &str) -> (PathBuf, PathBuf) {
    let (program, log) = (daemon.bundle.path().join("logger"), daemon.bundle.path().join("logged"));
    let script = format!(
        "#!/bin/sh\nexec >>{}\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $*\"\n\
         tr '\\0' '\\n' </proc/$$/environ | cut -d= -f1 | sort\n{ready}\nexec 5>&-\n\
         cat <&3 &\ncat <&4 &\nwait\necho end\n",
        log.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    (program, log)
}

#[test]
fn a_logger_is_a_program_with_arguments() {
    for scheme in ["binary", "binary-v2"] {
        if scheme == "binary-v2" && !is_skiff() {
            // The Go shim knows it from containerd 2.3 on.
            continue;
        }
        let daemon = Daemon::start(&SAYS);
        let (program, log) = logger(&daemon, "printf x >&5");
        let stdout = format!("{scheme}://{}?key=some%20value", program.display());
        let request = CreateTaskRequest { stdout: stdout.clone(), stderr: stdout, ..daemon.create_request() };
        assert_eq!(life(&daemon, &request), 4);
        let read = || std::fs::read_to_string(&log).unwrap_or_default();
        eventually("both streams are logged", || read().contains("out\n") && read().contains("err\n"));
        let first = format!("{} raw key some value\nCONTAINER_ID\nCONTAINER_NAMESPACE\n", daemon.id);
        assert!(read().starts_with(&first), "{}", read());
        if is_skiff() {
            // The Go shim ends it by a signal before it has seen the end of its streams.
            eventually("the logger sees the end", || read().ends_with("end\n"));
        }
        daemon.end();
    }
}

/// A logger that ends before it has said that it is ready fails the create, in the second version of its protocol.
#[test]
fn a_logger_that_is_never_ready() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::start(&SAYS);
    let (program, _) = logger(&daemon, "exit 1");
    let stdout = format!("binary-v2://{}", program.display());
    let request = CreateTaskRequest { stdout, ..daemon.create_request() };
    refused(daemon.client.create(context(), &request), Code::UNKNOWN);
    refused(daemon.state(""), Code::NOT_FOUND);
    let nowhere = CreateTaskRequest { stdout: "binary:///no/such/program".into(), ..daemon.create_request() };
    daemon.client.create(context(), &nowhere).unwrap_err();
    assert_eq!(life(&daemon, &daemon.create_request()), 4);
    daemon.end();
}

/// CloseIO before the start is remembered: the process gets what was written, and then the end.
#[test]
fn stdin_is_closed_before_the_start() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    let (stdin, out) = (daemon.fifo("in"), daemon.fifo("out"));
    let output = reader(&out);
    let (stdin_path, stdout) = (text(&stdin), text(&out));
    let stderr = if is_skiff() { String::new() } else { stdout.clone() };
    let request = ExecProcessRequest { stdin: stdin_path, stdout, stderr, ..daemon.exec_request("e", &["cat"]) };
    daemon.client.exec(context(), &request).unwrap();
    let mut writer = std::fs::File::options().read(true).write(true).open(&stdin).unwrap();
    writer.write_all(b"early").unwrap();
    let close = CloseIORequest { id: daemon.id.clone(), exec_id: "e".into(), stdin: true, ..CloseIORequest::default() };
    daemon.client.close_io(context(), &close).unwrap();
    daemon.begin("e").unwrap();
    if !is_skiff() {
        // The Go shim forgets it.
        daemon.client.close_io(context(), &close).unwrap();
    }
    drop(writer);
    assert_eq!(daemon.wait("e").unwrap(), 0);
    daemon.delete("e").unwrap();
    assert_eq!(output.join().unwrap(), "early");
    daemon.finish();
    daemon.end();
}

/// A terminal has the size that it was given before the start. That of an exec process is not there yet, which is no
/// error.
#[test]
fn a_terminal_is_resized_before_the_start() {
    let mut bundle = Bundle::new(&["sh", "-c", "stty size; exec sleep 1000"]);
    bundle.spec["process"]["terminal"] = serde_json::json!(true);
    let daemon = Daemon::with(bundle);
    let out = daemon.fifo("out");
    let output = reader(&out);
    let request = CreateTaskRequest { terminal: true, stdout: text(&out), ..daemon.create_request() };
    daemon.client.create(context(), &request).unwrap();
    let size = |exec_id: &str, width, height| {
        let (id, exec_id) = (daemon.id.clone(), exec_id.to_string());
        let request = ResizePtyRequest { id, exec_id, width, height, ..ResizePtyRequest::default() };
        daemon.client.resize_pty(context(), &request).unwrap();
    };
    size("", 91, 17);
    daemon.begin("").unwrap();
    let exec_out = daemon.fifo("exec-out");
    let exec_output = reader(&exec_out);
    let script = "until [ \"$(stty size)\" = '18 92' ]; do sleep 0.02; done; echo so be it";
    daemon.client.exec(context(), &daemon.terminal_request("e", &["sh", "-c", script], &exec_out)).unwrap();
    size("e", 80, 24);
    daemon.begin("e").unwrap();
    size("e", 92, 18);
    assert_eq!(daemon.wait("e").unwrap(), 0);
    daemon.delete("e").unwrap();
    assert!(exec_output.join().unwrap().contains("so be it"));
    let line = format!("/proc/{}/cmdline", daemon.state("").unwrap().pid);
    eventually("it has printed", || std::fs::read_to_string(&line).unwrap().starts_with("sleep"));
    daemon.finish();
    assert_eq!(output.join().unwrap().trim(), "17 91");
    daemon.end();
}

/// An exec process that ends while its client is still on the way to its terminal's output: the status is its own.
#[test]
fn an_exit_before_the_terminal_is_read() {
    let daemon = Daemon::start(&["sleep", "1000"]);
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    let out = daemon.fifo("out");
    daemon.client.exec(context(), &daemon.terminal_request("e", &["sh", "-c", "echo word; exit 7"], &out)).unwrap();
    let output = std::thread::scope(|scope| {
        let starting = scope.spawn(|| daemon.connect().start(context(), &daemon.start_request("e")));
        // Longer than the shim leaves orphans unreaped.
        std::thread::sleep(std::time::Duration::from_millis(2500));
        let output = reader(&out);
        starting.join().unwrap().unwrap();
        output
    });
    assert_eq!(daemon.wait("e").unwrap(), 7);
    daemon.delete("e").unwrap();
    assert_eq!(output.join().unwrap().trim(), "word");
    daemon.finish();
    daemon.end();
}

/// The Go shim waits for it.
#[test]
fn a_stdin_that_is_not_there() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let stdin = daemon.bundle.path().join("in");
    let streams = [stdin.as_path(), Path::new(""), Path::new("")];
    refused(daemon.create_with(streams), Code::UNKNOWN);
    refused(daemon.state(""), Code::NOT_FOUND);
    daemon.fifo("in");
    daemon.create_with(streams).unwrap();
    std::fs::remove_file(&stdin).unwrap();
    refused(daemon.begin(""), Code::UNKNOWN);
    assert_eq!(daemon.status(""), Status::CREATED);
    daemon.fifo("in");
    daemon.begin("").unwrap();
    daemon.finish();
    daemon.end();
}
