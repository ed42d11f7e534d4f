//! Work that may block for long, done by a child process: its parent waits without being held up.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::{Pending, Process};
use crate::sys::clone::{self, Side};
use crate::sys::process as sys;
use crate::{Error, Kind, Result};

/// The longest error text that comes back, bytes.
const MAX_TEXT: u64 = 4096;

/// A chore under way. Dropped before its end, it goes on by itself.
#[derive(Debug)]
pub struct Chore {
    process: Process,
    answer: std::fs::File,
    text: Vec<u8>,
}

/// Starts `work` in a child. It has none of this process's descriptors, so that a chore that is stuck keeps no stream of
/// anybody open: `work` opens what it needs by itself.
pub fn start(work: impl FnOnce() -> Result<()>) -> Result<Chore> {
    let fail = |errno| Error::sys("start a chore", errno);
    let (answer, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
    match clone::clone3(0, None).map_err(fail)? {
        Side::Child => {
            let text = match sys::close_others(&mut [end.as_raw_fd()]) {
                Ok(()) => work().map_or_else(|err| format!("{:02}{err}", err.kind() as u8), |()| "ok".into()),
                Err(errno) => format!("{:02}close descriptors: {errno}", Kind::System as u8),
            };
            let _ = std::fs::File::from(end).write_all(&text.as_bytes()[..text.len().min(MAX_TEXT as usize)]);
            sys::exit_now(0)
        }
        Side::Parent(pid, pidfd) => {
            nix::fcntl::fcntl(&answer, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(fail)?;
            Ok(Chore { process: Process { pid, pidfd }, answer: answer.into(), text: Vec::new() })
        }
    }
}

/// A process that did a chore and stays until this is dropped: to keep what needs a process in it.
#[derive(Debug)]
pub struct Held {
    process: Option<Process>,
    answer: std::os::unix::net::UnixStream,
    text: Vec<u8>,
}

/// Starts `work` in a child, as [`start`] does; it comes back with a text.
pub fn hold(work: impl FnOnce() -> Result<String>) -> Result<Held> {
    let fail = |errno| Error::sys("start a chore", errno);
    let (answer, end) = std::os::unix::net::UnixStream::pair().map_err(|e| Error::io("start a chore", &e))?;
    match clone::clone3(0, None).map_err(fail)? {
        Side::Child => {
            let text = match sys::close_others(&mut [end.as_raw_fd()]) {
                Ok(()) => work().map_or_else(|err| format!("{:02}{err}", err.kind() as u8), |text| format!("ok{text}")),
                Err(errno) => format!("{:02}close descriptors: {errno}", Kind::System as u8),
            };
            let _ = (&end).write_all(&text.as_bytes()[..text.len().min(MAX_TEXT as usize)]);
            let _ = end.shutdown(std::net::Shutdown::Write);
            // Ends also with the other side.
            let _ = (&end).read(&mut [0]);
            sys::exit_now(0)
        }
        Side::Parent(pid, pidfd) => {
            drop(end);
            let held = Held { process: Some(Process { pid, pidfd }), answer, text: Vec::new() };
            held.answer.set_nonblocking(true).map_err(|e| Error::io("start a chore", &e))?;
            Ok(held)
        }
    }
}

impl Held {
    /// Readable when `advance` can do something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.answer.as_fd()
    }

    /// The text of the work, when it is done.
    pub fn advance(&mut self) -> Result<Option<String>> {
        match (&self.answer).take(MAX_TEXT).read_to_end(&mut self.text) {
            Ok(_) => {}
            Err(err) if err.raw_os_error() == Some(Errno::EAGAIN as i32) => return Ok(None),
            Err(err) => return Err(Error::io("read a chore's answer", &err)),
        }
        let text = String::from_utf8_lossy(&self.text);
        match text.strip_prefix("ok") {
            Some(text) => Ok(Some(text.to_string())),
            None => Err(failure(&text).unwrap_or_else(|| Error::new(Kind::System, "a chore ended without an answer"))),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.discard();
        }
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

impl Pending for Chore {
    type Output = ();

    fn fd(&self) -> BorrowedFd<'_> {
        self.answer.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn advance(&mut self) -> Result<Option<()>> {
        match (&self.answer).take(MAX_TEXT).read_to_end(&mut self.text) {
            Ok(_) => {}
            Err(err) if err.raw_os_error() == Some(Errno::EAGAIN as i32) => return Ok(None),
            Err(err) => return Err(Error::io("read a chore's answer", &err)),
        }
        // The answer ends with the process.
        let exit = self.process.wait()?;
        let text = String::from_utf8_lossy(&self.text);
        if text == "ok" {
            return Ok(Some(()));
        }
        Err(failure(&text)
            .unwrap_or_else(|| Error::new(Kind::System, format!("a chore ended with status {}", exit.status))))
    }
}

/// Starts a program with these descriptors as 3, 4, ... and nothing else of this process but an empty stdin, stdout and
/// stderr. `env` is its whole environment.
pub fn spawn(program: &std::ffi::CStr, argv: &sys::CStrings, env: &sys::CStrings, fds: &[OwnedFd]) -> Result<Process> {
    let fail = |errno| Error::sys(format!("run {program:?}"), errno);
    let null = nix::fcntl::open(c"/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty());
    let null = null.map_err(fail)?;
    let (said, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
    match clone::clone3(0, None).map_err(fail)? {
        Side::Child => {
            let errno = exec(program, argv, env, &null, fds).unwrap_or_else(|errno| errno);
            let _ = nix::unistd::write(&end, &(errno as i32).to_ne_bytes());
            sys::exit_now(127)
        }
        Side::Parent(pid, pidfd) => {
            drop(end);
            let process = Process { pid, pidfd };
            let mut code = [0; 4];
            match nix::unistd::read(&said, &mut code) {
                Ok(4) => {
                    process.discard();
                    Err(fail(Errno::from_raw(i32::from_ne_bytes(code))))
                }
                _ => Ok(process),
            }
        }
    }
}

fn exec(
    program: &std::ffi::CStr,
    argv: &sys::CStrings,
    env: &sys::CStrings,
    null: &OwnedFd,
    fds: &[OwnedFd],
) -> nix::Result<Errno> {
    sys::reset_signals();
    // Above every target first: one of the sources may have a target's number.
    let above = |fd: &OwnedFd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64));
    let copies = fds.iter().map(above).collect::<nix::Result<Vec<i32>>>()?;
    for number in 0..3 {
        sys::place_fd(null.as_fd(), number)?;
    }
    sys::cloexec_from(3)?;
    for (number, copy) in (3..).zip(copies) {
        sys::place_number(copy, number)?;
    }
    Ok(sys::Execve::new(program.to_owned(), argv.clone(), env.clone()).run())
}
