//! `run`: create, start, and stay with the container until it ends.

use clap::Args;
use skiff::container::{Created, Gate};
use skiff::launch::{Process, block_on};
use skiff::{Error, Result};

use super::create::Bundle;
use super::notify::Relay;
use super::{Globals, tty};

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    bundle: Bundle,
    /// detach from the container's process
    #[arg(short, long)]
    detach: bool,
    /// do not delete the container after it exits
    #[arg(long)]
    keep: bool,
    /// disable the use of the subreaper used to reap reparented processes
    #[arg(long)]
    no_subreaper: bool,
    #[arg(value_name = "container-id")]
    id: String,
}

/// The foreground belongs to the container's terminal and signals.
fn in_background(relay: Relay, init: &Process) -> Result<()> {
    let (pid, pidfd) = (init.pid, init.pidfd.try_clone().map_err(|e| Error::io("watch the process", &e))?);
    std::thread::spawn(move || relay.run(&pidfd, pid));
    Ok(())
}

/// Makes a container and stays with it until its init ends; its exit status. `start`: it waits for its start.
pub fn attended(
    bundle: &Bundle,
    subreaper: bool,
    (start, keep): (bool, bool),
    make: impl FnOnce() -> Result<Created>,
) -> Result<i32> {
    if subreaper {
        let _ = skiff::sys::process::set_child_subreaper(true);
    }
    let signals = tty::Signals::block()?;
    let created = make()?;
    let announced = bundle.announce(&created);
    let (mut container, init) = (created.container, created.init);
    let session = tty::Session::begin(created.console)?;
    let started = announced.and_then(|()| Relay::bind(&container)).and_then(|relay| {
        if start {
            container.start().and_then(block_on).map_err(|err| match err.step() {
                // Which the container has tried, and has had to say something of: on the streams that are this program's.
                Some("execve") => err.that_was_told(),
                _ => err,
            })?;
        }
        relay.map_or(Ok(()), |relay| in_background(relay, &init))
    });
    let status = match started.and_then(|()| session.attend(&init, &signals)) {
        Ok(exit) => Ok(exit.status as i32),
        Err(err) => {
            let _ = init.kill(libc::SIGKILL);
            let _ = init.wait();
            session.drain();
            Err(err)
        }
    };
    drop(session);
    if !keep || status.is_err() {
        let deleted = container.delete(true);
        return status.and_then(|status| deleted.map(|()| status));
    }
    status
}

impl Run {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        if self.detach {
            return self.detached(globals);
        }
        let make = || self.bundle.create(globals, self.id.clone(), (false, false), Gate::Socket).map(|(made, _)| made);
        attended(&self.bundle, !self.no_subreaper, (true, self.keep), make)
    }

    fn detached(self, globals: &Globals) -> Result<i32> {
        let has_socket = self.bundle.console_socket.is_some();
        let (created, console) = self.bundle.create(globals, self.id, (has_socket, true), Gate::Socket)?;
        let created = self.bundle.finish(created, console.as_ref())?;
        let (mut container, init) = (created.container, created.init);
        let relay = Relay::bind(&container);
        let started = relay.and_then(|relay| container.start().and_then(block_on).map(|()| relay));
        match started {
            Ok(relay) => relay.map_or(Ok(()), |relay| relay.run(&init.pidfd, init.pid)).map(|()| 0),
            Err(err) => {
                let _ = init.kill(libc::SIGKILL);
                let _ = init.wait();
                if let Err(undo) = container.delete(true) {
                    log::warn!("undo run: {undo}");
                }
                Err(err)
            }
        }
    }
}
