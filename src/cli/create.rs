//! `create`, and what it shares with `run`.

use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::Spec;
use skiff::container::{Create as Request, Created, Gate, Stdio, create};
use skiff::launch::block_on;
use skiff::trace::Trace;
use skiff::{Error, Kind, Result};

use super::{Globals, listen_fds, tty, write_pid_file};

/// Flags of `create` and `run`.
#[derive(Debug, Args)]
pub struct Bundle {
    /// path to the root of the bundle directory, defaults to the current directory
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    /// the configuration to use, relative to the bundle (crun's flag)
    #[arg(short = 'f', long)]
    pub config: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the pseudoterminal
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the init process
    #[arg(long)]
    pub pidfd_socket: Option<PathBuf>,
    /// write a timeline of the create to this file, for trace viewers
    #[arg(long)]
    pub trace: Option<PathBuf>,
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
        let has_socket = self.bundle.console_socket.is_some();
        let (created, console) = self.bundle.create(globals, self.id, (has_socket, true), Gate::Fifo)?;
        // The init lives on without this process; a handle that is dropped leaves it alone.
        self.bundle.finish(created, console.as_ref()).map(|_| 0)
    }
}

/// Removes what was created; the error.
fn undo(created: Created, err: Error) -> Error {
    if let Err(undo) = created.container.delete(true) {
        log::warn!("undo create: {undo}");
    }
    let _ = created.init.wait();
    err
}

impl Bundle {
    /// Hands the console and the pidfd over and writes the pid file. After an error nothing of the container is left.
    pub fn finish(&self, created: Created, console: Option<&tty::Console>) -> Result<Created> {
        let handed = match (&created.console, console) {
            (Some(master), Some(console)) => console.send(master),
            _ => Ok(()),
        };
        match handed.and_then(|()| self.announce(&created)) {
            Ok(()) => Ok(created),
            Err(err) => Err(undo(created, err)),
        }
    }

    /// Sends the pidfd and writes the pid file.
    pub fn announce(&self, created: &Created) -> Result<()> {
        if let Some(socket) = &self.pidfd_socket {
            tty::send_fd(&created.init.pidfd, "standard", "pidfd", socket)?;
        }
        self.pid_file.as_deref().map_or(Ok(()), |path| write_pid_file(path, created.init.pid))
    }

    fn spec(&self) -> Result<Spec> {
        let mut spec = skiff::bundle::load(&self.bundle, self.config.as_deref())?;
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

    /// What is asked of the library. `has_socket`: a console socket takes the terminal. `gate`: who starts it.
    pub fn request(
        &self,
        globals: &Globals,
        id: String,
        (has_socket, detach): (bool, bool),
        gate: Gate,
    ) -> Result<(Request, Spec)> {
        let mut spec = self.spec()?;
        let trace = self.trace.is_some().then(Trace::new).transpose()?;
        let notify = super::notify::wanted().is_some();
        if notify {
            super::notify::add(&mut spec, &globals.root.join(&id))?;
        }
        let terminal = spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false);
        tty::check(terminal, has_socket, detach)?;
        let request = Request {
            id,
            bundle: self.bundle.clone(),
            config: self.config.clone(),
            root: globals.root.clone(),
            stdio: if terminal { Stdio::Terminal } else { Stdio::Inherit },
            gate,
            systemd_cgroup: globals.systemd_cgroup,
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            preserve_fds: self.preserve_fds + listen_fds(),
            notify,
            pause: false,
            rootless: globals.rootless,
            trace,
        };
        if spec.process().is_none() {
            return Err(Error::new(Kind::Invalid, "process: property must not be empty"));
        }
        Ok((request, spec))
    }

    /// The console socket that was asked for.
    pub fn console(&self) -> Result<Option<tty::Console>> {
        self.console_socket.as_deref().map(tty::Console::connect).transpose()
    }

    /// Creates the container; its console socket.
    pub fn create(
        &self,
        globals: &Globals,
        id: String,
        how: (bool, bool),
        gate: Gate,
    ) -> Result<(Created, Option<tty::Console>)> {
        let (request, spec) = self.request(globals, id, how, gate)?;
        let console = self.console()?;
        let trace = request.trace.clone();
        let created = create(request, &spec).and_then(block_on);
        // A create that failed has a timeline too.
        let created = match (&self.trace, trace) {
            (Some(path), Some(trace)) => {
                let text = trace.events()?.to_string();
                let written = std::fs::write(path, text);
                let name = path.display().to_string();
                let written = written.map_err(|e| Error::io(format!("write trace {name:?}"), &e));
                created.and_then(|created| match written {
                    Ok(()) => Ok(created),
                    Err(err) => Err(undo(created, err)),
                })
            }
            _ => created,
        };
        created.map(|created| (created, console))
    }
}
