//! Tests of the command line. The same tests pass with RUNTIME_UNDER_TEST=runc, but for those that say why not.

mod acting;
mod budget;
mod checkpoint;
mod commands;
mod errors;
mod exec;
mod fields;
mod hooks;
mod inside;
mod joining;
mod lifecycle;
mod limits;
mod mounts;
mod process;
mod rootless;
mod syscalls;
mod systemd;
mod traps;
mod unified;

use std::path::{Path, PathBuf};
use std::process::Command;

use skiff_test_support::{Bundle, Done, LeakCheck, run, unique};

/// A runtime, a bundle, and the id of one container.
struct Case {
    bundle: Bundle,
    id: String,
    runtime: PathBuf,
}

fn runtime() -> PathBuf {
    std::env::var_os("RUNTIME_UNDER_TEST").map_or_else(|| env!("CARGO_BIN_EXE_skiff").into(), PathBuf::from)
}

fn is_skiff() -> bool {
    std::env::var_os("RUNTIME_UNDER_TEST").is_none()
}

/// True where the runtime under test knows what runc knows since 1.`minor`.
fn since(minor: u32) -> bool {
    if is_skiff() {
        return true;
    }
    let out = run(Command::new(runtime()).arg("--version"), "").ok().out;
    let version = out.split_whitespace().nth(2).unwrap_or_default();
    version.split(['.', '+', '-']).nth(1).and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n >= minor)
}

/// What a script sees in a container with a changed spec.
#[track_caller]
fn seen(script: &str, change: impl FnOnce(&mut serde_json::Value)) -> String {
    let case = Case::sh(script).with(change);
    let out = case.run().ok().out;
    case.end();
    out
}

/// The error of a run with a changed spec; nothing of it is left.
#[track_caller]
fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let case = Case::new(&["true"]).with(change);
    let err = case.run().failed().err;
    case.end();
    err
}

/// Runs a command whose container keeps its streams: they go to files in `dir`.
fn detach(mut command: Command, dir: &Path) -> Done {
    let (out, err) = (dir.join("out"), dir.join("err"));
    let file = |path: &Path| std::fs::File::create(path).expect("a file for output");
    let status = command.stdin(std::process::Stdio::null()).stdout(file(&out)).stderr(file(&err)).status();
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    Done { code: status.expect("the runtime runs").code().unwrap_or(-1), out: read(&out), err: read(&err) }
}

impl Case {
    /// For a container that runs `args`.
    fn new(args: &[&str]) -> Case {
        let case = Case { bundle: Bundle::new(args), id: unique("skifftest"), runtime: runtime() };
        case.bundle.write();
        case
    }

    /// The same, running a script.
    fn sh(script: &str) -> Case {
        Case::new(&["sh", "-c", script])
    }

    /// With a changed spec.
    fn with(mut self, change: impl FnOnce(&mut serde_json::Value)) -> Case {
        change(&mut self.bundle.spec);
        self.bundle.write();
        self
    }

    /// A command of the runtime in the bundle's directory.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.runtime);
        command.args(args).current_dir(self.bundle.path());
        command
    }

    fn cmd(&self, args: &[&str]) -> Done {
        run(&mut self.command(args), "")
    }

    /// `run ID`.
    fn run(&self) -> Done {
        self.cmd(&["run", &self.id])
    }

    /// `create ID` or `run -d ID`.
    fn detached(&self, args: &[&str]) -> Done {
        detach(self.command(args), self.bundle.path())
    }

    fn state(&self) -> serde_json::Value {
        serde_json::from_str(&self.cmd(&["state", &self.id]).ok().out).expect("JSON")
    }

    fn status(&self) -> String {
        self.state()["status"].as_str().unwrap_or_default().to_string()
    }

    /// Nothing of it is left.
    #[track_caller]
    fn end(self) {
        let check = LeakCheck::new(&[&self.id, &self.bundle.path().display().to_string()]);
        check.end();
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.cmd(&["delete", "--force", &self.id]);
        }
    }
}
