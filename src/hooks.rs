//! Runs hooks: the state on stdin, a deadline, bounded output. Does not live here: when they run (container, child).

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::Hook;

use crate::launch::chore::{self, Chore};
use crate::sys::clone::pidfd_open;
use crate::sys::process::CStrings;
use crate::{Error, Kind, Result, limits};

/// What a hook wrote is read back up to here, in bytes.
const MAX_OUTPUT: u64 = 16 << 10;

/// A hook that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pidfd: OwnedFd,
    deadline: Option<(Instant, u64)>,
    stdout: File,
    stderr: File,
    what: String,
}

/// Starts hook number `at` of a kind, e.g. `createRuntime`, with `state` on its stdin. `env` replaces an absent one; without
/// that it is this process's own, as with runc.
pub fn start(kind: &str, at: usize, hook: &Hook, state: &[u8], env: Option<&CStrings>) -> Result<Running> {
    let what = format!("error running {kind} hook #{at}");
    let fail = |err: &std::io::Error| Error::io(format!("{what}: start {:?}", hook.path().display().to_string()), err);
    let mut stdin = memfd().map_err(|e| fail(&e))?;
    stdin.write_all(state).and_then(|()| stdin.rewind()).map_err(|e| fail(&e))?;
    let (stdout, stderr) = (memfd().map_err(|e| fail(&e))?, memfd().map_err(|e| fail(&e))?);
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().unwrap_or_default().split_first() {
        command.arg0(name).args(rest);
    }
    match (hook.env(), env) {
        (Some(list), _) => {
            command.env_clear().envs(list.iter().filter_map(|var| var.split_once('=')));
        }
        (None, Some(env)) => {
            let vars = env.as_slice().iter().filter_map(|var| var.to_str().ok()?.split_once('='));
            command.env_clear().envs(vars);
        }
        (None, None) => {}
    }
    let out = stdout.try_clone().map_err(|e| fail(&e))?;
    let err = stderr.try_clone().map_err(|e| fail(&e))?;
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(out)).stderr(Stdio::from(err));
    let mut child = command.spawn().map_err(|e| fail(&e))?;
    let pidfd = match pidfd_open(child.id() as i32) {
        Ok(fd) => fd,
        Err(errno) => {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(Error::sys(format!("{what}: pidfd_open"), errno));
        }
    };
    let deadline = timeout(hook).map(|timeout| (Instant::now() + timeout, timeout.as_secs()));
    Ok(Running { child, pidfd, deadline, stdout, stderr, what })
}

/// Starts it from a child: its program may lie on a disk that hangs, and what it starts is killed with it. One that names no
/// timeout has `patience`.
pub fn start_apart(kind: &str, at: usize, hook: &Hook, state: &[u8], patience: Duration) -> Result<Chore> {
    // Its own timeout is up to the child, which has a better error for it.
    let limit = timeout(hook).map_or(patience, |timeout| timeout + limits::DEATH);
    let what = format!("error running {kind} hook #{at}");
    chore::start(what, limit, || start(kind, at, hook, state, None)?.finish())
}

/// Runs the hooks of a container that is gone. What fails is logged (runtime spec, runtime.md, "Lifecycle").
pub fn run_poststop(list: &[Hook], state: &[u8]) {
    for (at, hook) in list.iter().enumerate() {
        if let Err(err) = start("poststop", at, hook, state, None).and_then(Running::finish) {
            log::warn!("{err}");
        }
    }
}

/// How long these may take together: one that names no timeout has [`limits::HOOK`].
pub fn time(hooks: Option<&[Hook]>) -> Duration {
    let one = |hook| timeout(hook).unwrap_or_else(|| limits::within(limits::HOOK));
    hooks.unwrap_or_default().iter().map(one).sum()
}

fn timeout(hook: &Hook) -> Option<Duration> {
    hook.timeout().map(|seconds| Duration::from_secs(seconds.unsigned_abs()).min(limits::NONE))
}

fn memfd() -> std::io::Result<File> {
    Ok(memfd_create(c"hook", MFdFlags::MFD_CLOEXEC)?.into())
}

impl Running {
    /// Readable when the hook has exited.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// When it is killed.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline.map(|(at, _)| at)
    }

    /// Whether it has ended: None while it runs. Past its deadline it is killed and that is the error.
    pub fn poll(&mut self) -> Result<Option<()>> {
        match self.child.try_wait() {
            Ok(Some(status)) if status.success() => Ok(Some(())),
            Ok(Some(status)) => {
                let status = match status.signal() {
                    Some(libc::SIGSYS) => "signal: bad system call (the container's seccomp filter)".to_string(),
                    _ => status.to_string().replace("exit status: ", "exit status "),
                };
                let (stdout, stderr) = (text(&mut self.stdout), text(&mut self.stderr));
                let text = format!("{}: {status}, stdout: {stdout}, stderr: {stderr}", self.what);
                Err(Error::new(Kind::System, text))
            }
            Ok(None) => match self.deadline {
                Some((at, seconds)) if Instant::now() >= at => {
                    let text = format!("{}: hook ran past specified timeout of {seconds}.0s", self.what);
                    Err(Error::new(Kind::Timeout, text))
                }
                _ => Ok(None),
            },
            Err(err) => Err(Error::io(format!("{}: wait", self.what), &err)),
        }
    }

    /// Waits for its end. For callers that may block: the command line and the child.
    pub fn finish(mut self) -> Result<()> {
        loop {
            if self.poll()?.is_some() {
                return Ok(());
            }
            crate::launch::wait_readable(self.fd(), self.deadline())?;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn text(file: &mut File) -> String {
    let mut out = Vec::new();
    let _ = file.rewind().and_then(|()| file.take(MAX_OUTPUT).read_to_end(&mut out));
    String::from_utf8_lossy(&out).trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(json: &str) -> Hook {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_hook_gets_the_state_on_stdin_and_only_its_own_environment() {
        let script =
            r#"test "$(cat)" = state && test "$(env | grep -v -e PWD -e SHLVL -e ^_=)" = A=1 && test "$0" = name"#;
        let json = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script, "name"], "env": ["A=1"]});
        start("prestart", 0, &hook(&json.to_string()), b"state", None).unwrap().finish().unwrap();
    }

    #[test]
    fn a_failing_hook_is_named_with_its_output() {
        let json = r#"{"path":"/bin/sh","args":["sh","-c","echo out; echo err >&2; exit 3"]}"#;
        let err = start("createRuntime", 2, &hook(json), b"", None).unwrap().finish().unwrap_err();
        assert_eq!(err.to_string(), "error running createRuntime hook #2: exit status 3, stdout: out, stderr: err");
    }

    #[test]
    fn a_hook_past_its_timeout_is_killed() {
        let json = r#"{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}"#;
        let err = start("poststop", 0, &hook(json), b"", None).unwrap().finish().unwrap_err();
        assert_eq!(err.kind(), Kind::Timeout);
        assert!(err.to_string().ends_with("hook ran past specified timeout of 1.0s"), "{err}");
    }
}
