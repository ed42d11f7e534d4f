//! One process of a container, init or exec: its streams, its state, its exit. Does not live here: how it is made (the library).

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use skiff::launch::{Exit, Pending, Process as Child};
use skiff::{Error, Kind, Result, limits};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::io::{Io, Paths, open_stdin, watch_fd};
use crate::streaming::Local;

/// How long Delete waits for the last output, as the Go shim does.
const DRAIN: Duration = Duration::from_secs(10);

/// Where a process is in its life (shim contract: created, running, stopped; deleted ones are dropped).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Made, not started.
    Created,
    /// Being started.
    Starting,
    /// Runs.
    Running,
    /// Has exited, or could not be started.
    Stopped,
}

/// A process.
pub struct Process {
    /// Exec id; empty for the init.
    pub exec_id: String,
    /// Its streams as the request named them.
    pub paths: Paths,
    phase: watch::Sender<Phase>,
    exit: watch::Sender<Option<Exit>>,
    pid: Cell<i32>,
    child: RefCell<Option<Rc<Watched>>>,
    reaped: Cell<Option<Exit>>,
    io: RefCell<Option<Io>>,
    console: RefCell<Option<OwnedFd>>,
    /// Its streams, when they are not what `paths` names.
    local: RefCell<Option<Local>>,
    close_stdin: Cell<bool>,
}

struct Watched {
    child: Child,
    /// A duplicate of the child's pidfd, in the event loop.
    exited: AsyncFd<OwnedFd>,
}

impl Process {
    /// One that has not been made yet.
    pub fn new(exec_id: &str, paths: Paths) -> Rc<Process> {
        Rc::new(Process {
            exec_id: exec_id.to_string(),
            paths,
            phase: watch::Sender::new(Phase::Created),
            exit: watch::Sender::new(None),
            pid: Cell::new(0),
            child: RefCell::default(),
            reaped: Cell::new(None),
            io: RefCell::default(),
            console: RefCell::default(),
            local: RefCell::default(),
            close_stdin: Cell::new(false),
        })
    }

    /// Takes over the child, whose exit is collected from now on; kills it when it cannot be watched.
    pub fn set_child(self: &Rc<Self>, child: Child) -> Result<()> {
        self.pid.set(child.pid);
        let watched = child.pidfd.try_clone().map_err(|e| Error::io("watch the process", &e)).and_then(|pidfd| {
            watch_fd(pidfd, Interest::READABLE).map_err(|errno| Error::sys("watch the process", errno))
        });
        let exited = watched.inspect_err(|_| child.abandon())?;
        *self.child.borrow_mut() = Some(Rc::new(Watched { child, exited }));
        let process = self.clone();
        tokio::task::spawn_local(async move { process.reap().await });
        Ok(())
    }

    /// Its streams are these.
    pub fn set_local(&self, local: Option<Local>) {
        *self.local.borrow_mut() = local;
    }

    /// The paths of its streams for whoever opens them.
    pub fn local_paths(&self) -> Paths {
        self.local.borrow().as_ref().map_or_else(|| self.paths.clone(), |local| local.paths.clone())
    }

    /// Its outputs have been opened.
    pub fn opened(&self) {
        self.local.borrow_mut().iter_mut().for_each(Local::opened);
    }

    /// Waits for what has to come before the word of its exit.
    pub async fn sent(&self) {
        let sent = self.local.borrow().as_ref().map(Local::sent);
        if let Some(sent) = sent {
            sent.await;
        }
    }

    /// Takes over the streams.
    pub fn set_io(&self, io: Io) {
        if self.close_stdin.get() {
            io.close_stdin();
        }
        *self.io.borrow_mut() = Some(io);
    }

    /// Connects its stdin with the client's.
    pub async fn open_stdin(&self) -> Result<()> {
        if !self.io.borrow().as_ref().is_some_and(Io::wants_stdin) {
            return Ok(());
        }
        let stdin = open_stdin(&self.local_paths().stdin).await?;
        if let Some(io) = self.io.borrow_mut().as_mut() {
            io.copy_stdin(stdin);
        }
        Ok(())
    }

    /// Keeps the pty master for resizing.
    pub fn set_console(&self, console: OwnedFd) {
        *self.console.borrow_mut() = Some(console);
    }

    /// Host pid; 0 before it is made.
    pub fn pid(&self) -> u32 {
        self.pid.get().unsigned_abs()
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves on.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Records the exit: from now on Wait answers.
    pub fn set_exit(&self, exit: Exit) {
        if let Some(io) = self.io.borrow_mut().as_mut() {
            io.exited();
        }
        self.set_phase(Phase::Stopped);
        self.exit.send_replace(Some(exit));
    }

    /// Waits for the recorded exit.
    pub fn wait(&self) -> impl Future<Output = Option<Exit>> + use<> {
        let mut exit = self.exit.subscribe();
        async move { exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit) }
    }

    /// Waits until nobody is starting it.
    pub async fn settled(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::Starting).await;
    }

    /// Waits until the kernel reports the exit, and reaps it.
    pub async fn reap(&self) -> Result<Exit> {
        let child = self.child.borrow().clone();
        let child = child.ok_or_else(|| Error::new(Kind::System, "no process to wait for"))?;
        loop {
            let mut guard = child.exited.readable().await.map_err(|e| Error::io("wait for the process", &e))?;
            if self.reaped.get().is_none() {
                self.reaped.set(child.child.try_wait()?);
            }
            match self.reaped.get() {
                Some(exit) => return Ok(exit),
                None => guard.clear_ready(),
            }
        }
    }

    /// Its exit has been collected, and is told when all that comes before it has been.
    pub fn has_ended(&self) -> bool {
        self.reaped.get().is_some()
    }

    /// Kills and reaps a process that has been made for nothing. False when it does not die.
    pub async fn discard(&self) -> bool {
        if self.child.borrow().is_none() {
            return true;
        }
        let _ = self.kill(libc::SIGKILL);
        tokio::time::timeout(limits::within(limits::DEATH), self.reap()).await.is_ok()
    }

    /// The error of one that was killed and does not die.
    pub fn undead(&self) -> Error {
        let pid = self.pid.get();
        skiff::launch::hang::late(pid, &format!("process {pid} was killed and does not die"))
    }

    /// Signals this one process.
    pub fn kill(&self, signal: i32) -> Result<()> {
        match &*self.child.borrow() {
            Some(child) => child.child.kill(signal),
            None => Err(crate::error::precondition("process has not been started")),
        }
    }

    /// Ends its stdin; remembered when it comes before the start.
    pub fn close_stdin(&self) {
        self.close_stdin.set(true);
        if let Some(io) = &*self.io.borrow() {
            io.close_stdin();
        }
    }

    /// Changes the size of its terminal; nothing when it has none.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        let cut = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = skiff::sys::tty::Size { width: cut(width), height: cut(height) };
        match &*self.console.borrow() {
            Some(console) => {
                skiff::sys::tty::resize(console.as_fd(), size).map_err(|errno| Error::sys("resize the terminal", errno))
            }
            None => Ok(()),
        }
    }

    /// Waits for the last output and closes the streams.
    pub async fn close_io(&self) {
        self.local.borrow().iter().for_each(Local::close);
        let drained = self.io.borrow_mut().as_mut().map(|io| io.drained(limits::within(DRAIN)));
        if let Some(drained) = drained {
            drained.await;
        }
        *self.io.borrow_mut() = None;
        *self.console.borrow_mut() = None;
    }
}

/// Drives a birth to its end without blocking anybody else.
pub async fn settle<P: Pending>(mut pending: P) -> Result<P::Output> {
    loop {
        if let Some(output) = pending.advance()? {
            return Ok(output);
        }
        // A duplicate: epoll forgets a descriptor when it is taken out, not when `pending` closes its own.
        let fd = pending.fd().try_clone_to_owned().map_err(|e| Error::io("watch a birth", &e))?;
        let interest = if pending.until_closed() { Interest::PRIORITY } else { Interest::READABLE };
        let fd = watch_fd(fd, interest).map_err(|errno| Error::sys("watch a birth", errno))?;
        let readable = async { fd.ready(interest).await.map(drop) };
        match pending.deadline() {
            Some(at) => {
                let _ = tokio::time::timeout_at(at.into(), readable).await;
            }
            None => readable.await.map_err(|e| Error::io("watch a birth", &e))?,
        }
    }
}
