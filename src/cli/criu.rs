//! `checkpoint` and `restore`.

use std::path::PathBuf;

use clap::Args;
use skiff::container::{Gate, restore};
use skiff::criu::Options;
use skiff::launch::block_on;
use skiff::{Error, Kind, Result};

use super::Globals;
use super::create::Bundle;
use super::run;

/// Flags that both have.
#[derive(Debug, Args)]
struct Common {
    /// path for criu image files
    #[arg(long, default_value = "checkpoint")]
    image_path: PathBuf,
    /// path for saving work files and logs
    #[arg(long)]
    work_path: Option<PathBuf>,
    /// allow open tcp connections
    #[arg(long)]
    tcp_established: bool,
    /// allow external unix sockets
    #[arg(long)]
    ext_unix_sk: bool,
    /// allow shell jobs
    #[arg(long)]
    shell_job: bool,
    /// handle file locks, for safety
    #[arg(long)]
    file_locks: bool,
    /// cgroups mode: soft|full|strict|ignore (default: soft)
    #[arg(long)]
    manage_cgroups_mode: Option<String>,
    /// create a namespace, but don't restore its properties
    #[arg(long)]
    empty_ns: Vec<String>,
    /// enable auto deduplication of memory images
    #[arg(long)]
    auto_dedup: bool,
    /// use userfaultfd to lazily restore memory pages
    #[arg(long)]
    lazy_pages: bool,
}

impl Common {
    fn options(&self) -> Result<Options> {
        let absolute =
            |path: &PathBuf| std::path::absolute(path).map_err(|e| Error::io("find the working directory", &e));
        let mut empty_namespaces = 0;
        for name in &self.empty_ns {
            empty_namespaces |= match name.as_str() {
                "network" => libc::CLONE_NEWNET as u64,
                other => return Err(Error::new(Kind::Invalid, format!("namespace {other:?} is not supported"))),
            };
        }
        Ok(Options {
            images: absolute(&self.image_path)?,
            work: self.work_path.as_ref().map(absolute).transpose()?,
            tcp_established: self.tcp_established,
            external_unix_sockets: self.ext_unix_sk,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            cgroups_mode: self.manage_cgroups_mode.clone(),
            empty_namespaces,
            auto_dedup: self.auto_dedup,
            lazy_pages: self.lazy_pages,
            ..Options::default()
        })
    }
}

/// `checkpoint`.
#[derive(Debug, Args)]
pub struct Checkpoint {
    #[command(flatten)]
    common: Common,
    /// path for previous criu image files in pre-dump
    #[arg(long)]
    parent_path: Option<PathBuf>,
    /// leave the process running after checkpointing
    #[arg(long)]
    leave_running: bool,
    /// skip in-flight tcp connections
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// allow one to link unlinked files back when possible
    #[arg(long)]
    link_remap: bool,
    /// criu writes \0 to this FD once lazy-pages is ready
    #[arg(long)]
    status_fd: Option<i32>,
    /// ADDRESS:PORT of the page server
    #[arg(long)]
    page_server: Option<String>,
    /// dump container's memory information only, leave the container running after this
    #[arg(long)]
    pre_dump: bool,
    #[arg(value_name = "container-id")]
    id: String,
}

impl Checkpoint {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let container = globals.container(&self.id)?;
        let page_server = self.page_server.as_deref().map(|text| {
            let parsed = text.rsplit_once(':').and_then(|(host, port)| Some((host.to_string(), port.parse().ok()?)));
            parsed.filter(|(host, _)| !host.is_empty()).ok_or_else(|| {
                Error::new(Kind::Invalid, format!("--page-server {text:?}: use ADDRESS:PORT to specify page server"))
            })
        });
        if let Some(fd) = self.status_fd.filter(|fd| !skiff::sys::process::is_inherited(*fd)) {
            return Err(Error::new(Kind::Invalid, format!("invalid --status-fd argument {fd}: not open")));
        }
        let options = Options {
            parent: self.parent_path.clone(),
            leave_running: self.leave_running,
            tcp_skip_in_flight: self.tcp_skip_in_flight,
            link_remap: self.link_remap,
            status_fd: self.status_fd,
            page_server: page_server.transpose()?,
            pre_dump: self.pre_dump,
            ..self.common.options()?
        };
        container.checkpoint(&options)?;
        if self.leave_running || self.pre_dump {
            return Ok(0);
        }
        container.delete(true).map(|()| 0)
    }
}

/// `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    bundle: Bundle,
    /// detach from the container's process
    #[arg(short, long)]
    detach: bool,
    /// disable the use of the subreaper used to reap reparented processes
    #[arg(long)]
    no_subreaper: bool,
    /// specify an LSM profile to be used during restore in the form of TYPE:NAME
    #[arg(long)]
    lsm_profile: Option<String>,
    /// specify an LSM mount context to be used during restore
    #[arg(long)]
    lsm_mount_context: Option<String>,
    #[arg(value_name = "container-id")]
    id: String,
}

impl Restore {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let options = Options {
            lsm_profile: self.lsm_profile.clone(),
            lsm_mount_context: self.lsm_mount_context.clone(),
            ..self.common.options()?
        };
        let has_socket = self.bundle.console_socket.is_some();
        if self.detach {
            let (request, spec) = self.bundle.request(globals, self.id, (has_socket, true), Gate::Fifo)?;
            let console = self.bundle.console()?;
            let restored = restore(request, &spec, options).and_then(block_on)?;
            return self.bundle.finish(restored, console.as_ref()).map(|_| 0);
        }
        run::attended(&self.bundle, !self.no_subreaper, (false, false), || {
            let (request, spec) = self.bundle.request(globals, self.id.clone(), (false, false), Gate::Fifo)?;
            restore(request, &spec, options.clone()).and_then(block_on)
        })
    }
}
