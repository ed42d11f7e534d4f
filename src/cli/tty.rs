//! The caller's terminal and signals while a container or exec process runs in the foreground.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use skiff::launch::{Exit, Process};
use skiff::sys::process::standard_stream;
use skiff::sys::tty;
use skiff::{Error, Kind, Result};

/// runc's rules for terminals and console sockets.
pub fn check(terminal: bool, has_socket: bool, detach: bool) -> Result<()> {
    let text = match (terminal, has_socket, detach) {
        (true, false, true) => "cannot allocate tty if skiff will detach without setting console socket",
        (false, true, _) | (_, true, false) => "cannot use console socket if skiff will not detach or allocate tty",
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Invalid, text))
}

/// A console socket. Connected before anything is made, so that who listens sees an end also when there will be no terminal.
#[derive(Debug)]
pub struct Console(UnixStream);

impl Console {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Console> {
        connect(path, "console").map(Console)
    }

    /// Sends a pty master, by the pty's name.
    pub fn send(&self, master: &OwnedFd) -> Result<()> {
        let number = tty::number(master.as_fd()).map_err(|errno| Error::sys("find the pty's number", errno))?;
        send(&self.0, master, &format!("/dev/pts/{number}"), "console")
    }
}

fn connect(socket: &Path, what: &str) -> Result<UnixStream> {
    let name = socket.display().to_string();
    UnixStream::connect(socket).map_err(|e| Error::io(format!("connect to {what} socket {name:?}"), &e))
}

/// Sends a descriptor to a unix socket: one message, `text` and the descriptor. `what` is for errors.
pub fn send_fd(fd: &OwnedFd, text: &str, what: &str, socket: &Path) -> Result<()> {
    send(&connect(socket, what)?, fd, text, what)
}

fn send(stream: &UnixStream, fd: &OwnedFd, text: &str, what: &str) -> Result<()> {
    let fds: [RawFd; 1] = [fd.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(text.as_bytes())], &control, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(|errno| Error::sys(format!("send the {what} to its socket"), errno))
}

/// Signals that would end this process, read from a descriptor instead.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks all that can be. Children start with an empty mask.
    pub fn block() -> Result<Signals> {
        let mask = SigSet::all();
        let fail = |errno| Error::sys("block signals", errno);
        mask.thread_block().map_err(fail)?;
        SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map(Signals).map_err(fail)
    }
}

/// The foreground's terminal, if there is one: raw until dropped.
#[derive(Debug)]
pub struct Session {
    master: Option<OwnedFd>,
    restore: Option<Termios>,
}

impl Session {
    /// Begins with the master of the process's pty.
    pub fn begin(master: Option<OwnedFd>) -> Result<Session> {
        let mut session = Session { master, restore: None };
        let Some(master) = &session.master else { return Ok(session) };
        nix::fcntl::fcntl(master, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .map_err(|errno| Error::sys("set up the terminal", errno))?;
        // One translation of line ends is enough, and it is the caller's terminal that does it, if there is one.
        if let Ok(mut termios) = tcgetattr(master) {
            termios.output_flags.remove(OutputFlags::ONLCR);
            tcsetattr(master, SetArg::TCSANOW, &termios).map_err(|errno| Error::sys("set up the terminal", errno))?;
        }
        let stdin = standard_stream(0);
        if let Ok(termios) = tcgetattr(stdin) {
            let mut raw = termios.clone();
            cfmakeraw(&mut raw);
            raw.output_flags.insert(OutputFlags::OPOST);
            tcsetattr(stdin, SetArg::TCSANOW, &raw).map_err(|errno| Error::sys("make the terminal raw", errno))?;
            session.restore = Some(termios);
            session.copy_size();
        }
        Ok(session)
    }

    fn copy_size(&self) {
        if let Some(master) = &self.master
            && let Ok(size) = tty::size(standard_stream(0))
        {
            let _ = tty::resize(master.as_fd(), size);
        }
    }

    /// Copies the terminal and forwards signals until the process ends.
    pub fn attend(&self, process: &Process, signals: &Signals) -> Result<Exit> {
        let mut input = self.master.is_some();
        let mut output = self.master.is_some();
        loop {
            let mut fds = vec![
                PollFd::new(signals.0.as_fd(), PollFlags::POLLIN),
                PollFd::new(process.pidfd.as_fd(), PollFlags::POLLIN),
            ];
            if let Some(master) = &self.master {
                let wanted = |on: bool| if on { PollFlags::POLLIN } else { PollFlags::empty() };
                if output {
                    fds.push(PollFd::new(master.as_fd(), wanted(true)));
                }
                if input {
                    fds.push(PollFd::new(standard_stream(0), wanted(true)));
                }
            }
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::sys("poll", errno)),
            }
            let happened: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            drop(fds);
            let mut next = 2;
            if let Some(master) = &self.master {
                if output {
                    if happened[next] {
                        output = copy(master.as_fd(), standard_stream(1));
                    }
                    next += 1;
                }
                if input && happened[next] {
                    input = copy(standard_stream(0), master.as_fd());
                }
            }
            if happened[0] {
                self.signals(process, signals);
            }
            if happened[1]
                && let Some(exit) = process.try_wait()?
            {
                if output {
                    self.drain();
                }
                return Ok(exit);
            }
        }
    }

    /// Copies what the terminal still holds: of a process that has ended.
    pub fn drain(&self) {
        if let Some(master) = &self.master {
            while readable(master) && copy(master.as_fd(), standard_stream(1)) {}
        }
    }

    fn signals(&self, process: &Process, signals: &Signals) {
        while let Ok(Some(info)) = signals.0.read_signal() {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => reap_others(process.pid),
                Ok(Signal::SIGWINCH) if self.master.is_some() => self.copy_size(),
                // The Go runtimes of callers use it for themselves.
                Ok(Signal::SIGURG) => {}
                _ => {
                    let _ = process.kill(info.ssi_signo as i32);
                }
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(termios) = &self.restore {
            let _ = tcsetattr(standard_stream(0), SetArg::TCSANOW, termios);
        }
    }
}

/// Reaps what was reparented to us, but not `pid`, whose exit is waited for by its pidfd.
fn reap_others(pid: i32) {
    let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(WaitStatus::Exited(other, _) | WaitStatus::Signaled(other, ..)) = waitid(Id::All, peek) {
        if other.as_raw() == pid {
            return;
        }
        let _ = waitid(Id::Pid(other), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
    }
}

fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// How long a terminal whose other side is closed may still bring something to light.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(1);

/// Copies what is there; false at the end.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0u8; 8192];
    let mut read = nix::unistd::read(from, &mut buffer);
    if read == Err(Errno::EIO) {
        // The slave's last user has gone, but the kernel may still be moving what it wrote (n_tty.c: a reader that is
        // told so waits for one run of the worker, which may have asked for another).
        std::thread::sleep(LAST_WORDS);
        read = nix::unistd::read(from, &mut buffer);
    }
    let n = match read {
        Ok(0) | Err(Errno::EIO) => return false,
        Ok(n) => n,
        Err(Errno::EAGAIN | Errno::EINTR) => return true,
        Err(_) => return false,
    };
    let mut rest = &buffer[..n];
    while !rest.is_empty() {
        match nix::unistd::write(to, rest) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let _ = poll(&mut [PollFd::new(to, PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(_) => return false,
        }
    }
    true
}
