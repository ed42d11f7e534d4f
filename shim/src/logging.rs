//! The shim's log: logrus-like lines into the `log` FIFO that containerd reads, dropped when nobody does. It is the shim's
//! stderr, and so that of the children which do its chores.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use log::{Level, LevelFilter, Log, Metadata, Record};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

struct Stderr;

impl Log for Stderr {
    /// What ttrpc calls an error, such as a call that the client has given up, is none of the shim's.
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        log::max_level() >= LevelFilter::Debug || !metadata.target().starts_with("ttrpc")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        let line = format!(
            "time=\"{now}\" level={level} msg={:?} runtime=io.containerd.skiff.v2\n",
            record.args().to_string()
        );
        // One write, so that lines of several shims do not mix; a full FIFO loses the line rather than the shim.
        let _ = nix::unistd::write(std::io::stderr(), line.as_bytes());
    }

    fn flush(&self) {}
}

/// Logs to the FIFO `log` in the bundle. Opened for reading and writing, it neither blocks nor breaks without a reader.
pub fn open(bundle: &Path, debug: bool) {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join("log"));
    if let Ok(file) = file
        && skiff::sys::process::place_fd(file.as_fd(), libc::STDERR_FILENO).is_ok()
        && log::set_logger(&Stderr).is_ok()
    {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}
