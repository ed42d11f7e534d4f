//! The shim's log: logrus-like lines into the `log` FIFO that containerd reads, dropped when nobody does.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use log::{Level, LevelFilter, Log, Metadata, Record};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

struct Fifo(File);

impl Log for Fifo {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
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
        let _ = (&self.0).write(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Logs to the FIFO `log` in the bundle. Opened for reading and writing, it neither blocks nor breaks without a reader.
pub fn open(bundle: &Path, debug: bool) {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join("log"));
    if let Ok(file) = file
        && log::set_boxed_logger(Box::new(Fifo(file))).is_ok()
    {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}
