//! Work that may block for long, done by a child process: its parent waits without being held up.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{Pending, Process, hang};
use crate::sys::clone::{self, Side};
use crate::sys::process as sys;
use crate::{Error, Kind, Result, limits};

/// The longest error text that comes back, bytes.
const MAX_TEXT: u64 = 40 << 10;

/// A chore under way. Dropped before its end, it goes on by itself; past its deadline it is killed, with everybody whom it
/// has started, and waited for by nobody: who is in the middle of a system call dies after it.
#[derive(Debug)]
pub struct Chore {
    process: Process,
    answer: std::fs::File,
    /// The answer is complete, and the process on its way out.
    answered: bool,
    text: Vec<u8>,
    term: Term,
}

/// What is waited for, and how long.
#[derive(Debug)]
pub(crate) struct Term {
    what: String,
    limit: Duration,
    deadline: Instant,
}

impl Term {
    pub(crate) fn new(what: impl Into<String>, limit: Duration) -> Term {
        let limit = limits::within(limit);
        Term { what: what.into(), limit, deadline: Instant::now() + limit }
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The error, when the time is over: what hangs, and where `process` does.
    pub(crate) fn check(&self, process: &Process) -> Result<()> {
        if Instant::now() < self.deadline {
            return Ok(());
        }
        Err(hang::late(process.pid, &format!("{}: no answer within {} s", self.what, self.limit.as_secs())))
    }
}

/// Starts `work`, which reads `what` in an error, in a child. It has none of this process's descriptors, so that a chore
/// that is stuck keeps no stream of anybody open: `work` opens what it needs by itself.
pub fn start(what: impl Into<String>, limit: Duration, work: impl FnOnce() -> Result<()>) -> Result<Chore> {
    let fail = |errno| Error::sys("start a chore", errno);
    let (answer, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
    let process = fork(end, |end| {
        let done = close_but(&[end.as_fd()]).and_then(|()| work());
        answer_with(&mut std::fs::File::from(end), done.map(|()| String::new()));
    })?;
    nix::fcntl::fcntl(&answer, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(fail)?;
    Ok(Chore { process, answer: answer.into(), answered: false, text: Vec::new(), term: Term::new(what, limit) })
}

/// A child in a process group of its own, so that it can be killed with everybody whom it has started.
pub(super) fn fork(end: OwnedFd, work: impl FnOnce(OwnedFd)) -> Result<Process> {
    let own_group = |pid| nix::unistd::setpgid(Pid::from_raw(pid), Pid::from_raw(0));
    match clone::clone3(0, None).map_err(|errno| Error::sys("start a chore", errno))? {
        Side::Child => {
            let _ = own_group(0);
            // What it starts has this mask.
            sys::unblock_signals();
            work(end);
            sys::exit_now(0)
        }
        Side::Parent(pid, pidfd) => {
            // Whoever comes first; it has to be done before anybody kills the group.
            let _ = own_group(pid);
            Ok(Process { pid, pidfd })
        }
    }
}

/// Kills a chore and everybody whom it has started.
pub(super) fn kill(process: &Process) {
    // The pid is still its own: nobody has waited for it.
    if let Ok(None) = process.try_wait() {
        let _ = killpg(Pid::from_raw(process.pid), Signal::SIGKILL);
        process.abandon();
    }
}

/// A process that did a chore and stays until this is dropped: to keep what needs a process in it.
#[derive(Debug)]
pub struct Held {
    process: Process,
    answer: std::os::unix::net::UnixStream,
    text: Vec<u8>,
    term: Term,
}

/// Starts `work` in a child, as [`start`] does; it comes back with a text.
pub fn hold(what: impl Into<String>, limit: Duration, work: impl FnOnce() -> Result<String>) -> Result<Held> {
    let (answer, end) = std::os::unix::net::UnixStream::pair().map_err(|e| Error::io("start a chore", &e))?;
    let process = fork(end.into(), |end| {
        let end = std::os::unix::net::UnixStream::from(end);
        answer_with(&mut &end, close_but(&[end.as_fd()]).and_then(|()| work()));
        let _ = end.shutdown(std::net::Shutdown::Write);
        // Ends also with the other side.
        let _ = (&end).read(&mut [0]);
    })?;
    answer.set_nonblocking(true).map_err(|e| Error::io("start a chore", &e))?;
    Ok(Held { process, answer, text: Vec::new(), term: Term::new(what, limit) })
}

impl Held {
    /// Readable when `advance` can do something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.answer.as_fd()
    }

    /// When to call `advance` at the latest.
    pub fn deadline(&self) -> Instant {
        self.term.deadline
    }

    /// The text of the work, when it is done.
    pub fn advance(&mut self) -> Result<Option<String>> {
        if !complete(&self.answer, &mut self.text)? {
            return self.term.check(&self.process).map(|()| None);
        }
        said(&self.text, || "a chore ended without an answer".into()).map(Some)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        kill(&self.process);
    }
}

/// In the child: closes all but standard streams and `keep`.
fn close_but(keep: &[BorrowedFd<'_>]) -> Result<()> {
    let mut keep: Vec<_> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    sys::close_others(&mut keep).map_err(|errno| Error::new(Kind::System, format!("close descriptors: {errno}")))
}

/// In the child: writes what has come of it, for [`said`].
fn answer_with(to: &mut impl Write, done: Result<String>) {
    let text = done.map_or_else(|err| format!("{:02}{err}", err.kind() as u8), |text| format!("ok{text}"));
    let _ = to.write_all(&text.as_bytes()[..text.len().min(MAX_TEXT as usize)]);
}

/// Reads on what a child answers; true when it is all there.
fn complete(from: impl Read, text: &mut Vec<u8>) -> Result<bool> {
    match from.take(MAX_TEXT).read_to_end(text) {
        Ok(_) => Ok(true),
        Err(err) if err.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(false),
        Err(err) => Err(Error::io("read a chore's answer", &err)),
    }
}

/// What a complete answer says; `nothing` is the error of none.
fn said(text: &[u8], nothing: impl FnOnce() -> String) -> Result<String> {
    let text = String::from_utf8_lossy(text);
    match text.strip_prefix("ok") {
        Some(text) => Ok(text.to_string()),
        None => Err(failure(&text).unwrap_or_else(|| Error::new(Kind::System, nothing()))),
    }
}

/// The error that a chore's text stands for.
fn failure(text: &str) -> Option<Error> {
    let kinds = [
        Kind::Invalid,
        Kind::NotFound,
        Kind::AlreadyExists,
        Kind::FailedPrecondition,
        Kind::Unsupported,
        Kind::Timeout,
        Kind::System,
    ];
    let kind = text.get(..2)?.parse::<u8>().ok()?;
    let kind = kinds.into_iter().find(|one| *one as u8 == kind)?;
    Some(Error::new(kind, text.get(2..)?))
}

impl Chore {
    /// Kills it, and whom it has started.
    pub fn stop(self) {
        kill(&self.process);
    }

    /// Readable when its process has exited: for who has given it up.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.process.pidfd.as_fd()
    }
}

impl Pending for Chore {
    type Output = ();

    fn fd(&self) -> BorrowedFd<'_> {
        if self.answered { self.end() } else { self.answer.as_fd() }
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.term.deadline)
    }

    fn advance(&mut self) -> Result<Option<()>> {
        if !self.answered {
            self.answered = complete(&self.answer, &mut self.text)?;
        }
        // What it has open, and its namespaces, go after the answer.
        let exit = if self.answered { self.process.try_wait()? } else { None };
        let Some(exit) = exit else {
            return match self.term.check(&self.process) {
                Ok(()) => Ok(None),
                Err(err) => {
                    kill(&self.process);
                    Err(err)
                }
            };
        };
        said(&self.text, || format!("a chore ended with status {}", exit.status)).map(|_| Some(()))
    }
}

/// A child that copies what comes from a pipe into a file, until the end of it: a disk that hangs holds up nobody else.
/// Its output is that the file is open. Dropped, it is killed.
#[derive(Debug)]
pub struct Writer(Chore);

/// Has a child open the file, and then write to it what comes from `input`.
pub fn write_file(what: String, limit: Duration, input: OwnedFd, path: &Path, make_dirs: bool) -> Result<Writer> {
    let fail = |errno| Error::sys("start a writer", errno);
    let (answer, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
    let text = what.clone();
    let process = fork(end, |end| {
        let opened = close_but(&[end.as_fd(), input.as_fd()]).and_then(|()| open_to_append(&text, path, make_dirs));
        let (file, done) = opened.map_or_else(|err| (None, Err(err)), |file| (Some(file), Ok(String::new())));
        answer_with(&mut std::fs::File::from(end), done);
        if let Some(Err(err)) = file.map(|file| copy(input, file)) {
            log::warn!("write to {path:?}: {err}");
        }
    })?;
    nix::fcntl::fcntl(&answer, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(fail)?;
    let term = Term::new(what, limit);
    Ok(Writer(Chore { process, answer: answer.into(), answered: false, text: Vec::new(), term }))
}

fn open_to_append(what: &str, path: &Path, make_dirs: bool) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    if make_dirs && let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| Error::io(what, &e))?;
    }
    let mut options = std::fs::OpenOptions::new();
    options.append(true).create(true).mode(0o644).open(path).map_err(|e| Error::io(what, &e))
}

fn copy(input: OwnedFd, mut file: std::fs::File) -> std::io::Result<()> {
    let (mut input, mut buffer) = (std::fs::File::from(input), [0; 16 << 10]);
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => file.write_all(&buffer[..n])?,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

impl Writer {
    /// Its process: it ends when all has been written.
    pub fn process(&self) -> &Process {
        &self.0.process
    }
}

impl Pending for Writer {
    type Output = ();

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.answer.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.deadline()
    }

    fn advance(&mut self) -> Result<Option<()>> {
        let chore = &mut self.0;
        if !complete(&chore.answer, &mut chore.text)? {
            return chore.term.check(&chore.process).map(|()| None);
        }
        said(&chore.text, || "a writer ended without an answer".into()).map(|_| Some(()))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        kill(&self.0.process);
    }
}

/// A program that is being started. Dropped before it runs, it is left alone.
#[derive(Debug)]
pub struct Spawning {
    said: OwnedFd,
    what: String,
}

/// Starts a program with these descriptors as 3, 4, ... and nothing else of this process but an empty stdin, stdout and
/// stderr. `env` is its whole environment. It runs when the second of what this returns says so.
pub fn spawn(
    program: &std::ffi::CStr,
    argv: &sys::CStrings,
    env: &sys::CStrings,
    fds: &[OwnedFd],
) -> Result<(Process, Spawning)> {
    let fail = |errno| Error::sys(format!("run {program:?}"), errno);
    let null = nix::fcntl::open(c"/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty());
    let null = null.map_err(fail)?;
    let (said, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
    match clone::clone3(0, None).map_err(fail)? {
        Side::Child => {
            let (errno, end) = match above(&end) {
                Ok(end) => (exec(program, argv, env, &null, fds, &end).unwrap_or_else(|errno| errno), end),
                Err(errno) => (errno, end),
            };
            let _ = nix::unistd::write(&end, &(errno as i32).to_ne_bytes());
            sys::exit_now(127)
        }
        Side::Parent(pid, pidfd) => {
            drop(end);
            nix::fcntl::fcntl(&said, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(fail)?;
            Ok((Process { pid, pidfd }, Spawning { said, what: format!("run {program:?}") }))
        }
    }
}

impl Pending for Spawning {
    type Output = ();

    fn fd(&self) -> BorrowedFd<'_> {
        self.said.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn advance(&mut self) -> Result<Option<()>> {
        let mut code = [0; 4];
        match nix::unistd::read(&self.said, &mut code) {
            Ok(4) => Err(Error::sys(&self.what, Errno::from_raw(i32::from_ne_bytes(code)))),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            _ => Ok(Some(())),
        }
    }
}

/// A duplicate above every number that a descriptor is to have.
fn above(fd: &OwnedFd) -> nix::Result<OwnedFd> {
    sys::take_fd(nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64))?)
}

fn exec(
    program: &std::ffi::CStr,
    argv: &sys::CStrings,
    env: &sys::CStrings,
    null: &OwnedFd,
    fds: &[OwnedFd],
    end: &OwnedFd,
) -> nix::Result<Errno> {
    sys::reset_signals();
    let copies = fds.iter().map(above).collect::<nix::Result<Vec<OwnedFd>>>()?;
    for number in 0..3 {
        sys::place_fd(null.as_fd(), number)?;
    }
    // A program on a disk that hangs keeps what is open, and that may be the stream of somebody else.
    let mut keep: Vec<_> = copies.iter().chain([end]).map(AsRawFd::as_raw_fd).collect();
    sys::close_others(&mut keep)?;
    for (number, copy) in (3..).zip(&copies) {
        sys::place_fd(copy.as_fd(), number)?;
    }
    Ok(sys::Execve::new(program.to_owned(), argv.clone(), env.clone()).run())
}
