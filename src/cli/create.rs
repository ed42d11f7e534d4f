//! `create`, and what it shares with `run`.

use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::Spec;
use skiff::container::{Create as Request, Created, Gate, Stdio, create};
use skiff::launch::block_on;
use skiff::{Error, Kind, Result};

use super::{Globals, listen_fds, protect_program, tty, write_pid_file};

/// Flags of `create` and `run`.
#[derive(Debug, Args)]
pub struct Bundle {
    /// path to the root of the bundle directory, defaults to the current directory
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the pseudoterminal
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// specify the file to write the process id to
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// do not use pivot root to jail process inside rootfs
    #[arg(long)]
    pub no_pivot: bool,
    /// do not create a new session keyring for the container
    #[arg(long)]
    pub no_new_keyring: bool,
    /// pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: u32,
}

/// `create`.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    bundle: Bundle,
    #[arg(value_name = "container-id")]
    id: String,
}

impl Create {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        protect_program();
        let socket = self.bundle.console_socket.clone();
        let created = self.bundle.create(globals, self.id, socket.is_some(), true)?;
        // The init lives on without this process; a handle that is dropped leaves it alone.
        finish_detached(created, socket.as_deref(), self.bundle.pid_file.as_deref()).map(|_| 0)
    }
}

/// Hands the console over and writes the pid file. After an error nothing of the container is left.
pub fn finish_detached(
    created: Created,
    socket: Option<&std::path::Path>,
    pid_file: Option<&std::path::Path>,
) -> Result<Created> {
    let handed = match (&created.console, socket) {
        (Some(master), Some(socket)) => tty::send(master, socket),
        _ => Ok(()),
    };
    let done = handed.and_then(|()| pid_file.map_or(Ok(()), |path| write_pid_file(path, created.init.pid)));
    match done {
        Ok(()) => Ok(created),
        Err(err) => {
            if let Err(undo) = created.container.delete(true) {
                log::warn!("undo create: {undo}");
            }
            let _ = created.init.wait();
            Err(err)
        }
    }
}

impl Bundle {
    fn spec(&self) -> Result<Spec> {
        let mut spec = skiff::bundle::load(&self.bundle)?;
        let count = listen_fds();
        if count > 0
            && let Some(process) = spec.process_mut()
        {
            let mut env = process.env().clone().unwrap_or_default();
            env.push(format!("LISTEN_FDS={count}"));
            env.push("LISTEN_PID=1".into());
            process.set_env(Some(env));
        }
        Ok(spec)
    }

    /// Creates the container. `has_socket`: a console socket takes the terminal.
    pub fn create(&self, globals: &Globals, id: String, has_socket: bool, detach: bool) -> Result<Created> {
        let spec = self.spec()?;
        let terminal = spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false);
        tty::check(terminal, has_socket, detach)?;
        let request = Request {
            id,
            bundle: self.bundle.clone(),
            root: globals.root.clone(),
            stdio: if terminal { Stdio::Terminal } else { Stdio::Inherit },
            gate: Gate::Fifo,
            systemd_cgroup: globals.systemd_cgroup,
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            preserve_fds: self.preserve_fds + listen_fds(),
        };
        if spec.process().is_none() {
            return Err(Error::new(Kind::Invalid, "process: property must not be empty"));
        }
        block_on(create(request, &spec)?)
    }
}
