//! `run`: create, start, and stay with the container until it ends.

use clap::Args;
use skiff::Result;
use skiff::launch::block_on;

use super::create::{Bundle, finish_detached};
use super::{Globals, protect_program, tty, write_pid_file};

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

impl Run {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        protect_program();
        if self.detach {
            return self.detached(globals);
        }
        if !self.no_subreaper {
            let _ = skiff::sys::process::set_child_subreaper(true);
        }
        let signals = tty::Signals::block()?;
        let created = self.bundle.create(globals, self.id.clone(), false, false)?;
        let (mut container, init) = (created.container, created.init);
        let session = tty::Session::begin(created.console)?;
        let written = self.bundle.pid_file.as_deref().map_or(Ok(()), |path| write_pid_file(path, init.pid));
        let started = written.and_then(|()| container.start()).and_then(block_on);
        let ended = started.and_then(|()| session.attend(&init, &signals));
        drop(session);
        let status = match ended {
            Ok(exit) => Ok(exit.status as i32),
            Err(err) => {
                let _ = init.kill(libc::SIGKILL);
                let _ = init.wait();
                Err(err)
            }
        };
        if !self.keep || status.is_err() {
            let deleted = container.delete(true);
            return status.and_then(|status| deleted.map(|()| status));
        }
        status
    }

    fn detached(self, globals: &Globals) -> Result<i32> {
        let socket = self.bundle.console_socket.clone();
        let created = self.bundle.create(globals, self.id, socket.is_some(), true)?;
        let created = finish_detached(created, socket.as_deref(), self.bundle.pid_file.as_deref())?;
        let (mut container, init) = (created.container, created.init);
        match container.start().and_then(block_on) {
            Ok(()) => Ok(0),
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
