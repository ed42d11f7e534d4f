//! `--log`, `--log-format`, `--debug`: what go-runc and containerd read an error from.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::Path;

use log::{LevelFilter, Log, Metadata, Record};
use skiff::{Error, Kind, Result};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Where log lines go.
#[derive(Clone, Debug)]
pub struct Logs {
    file: Option<std::sync::Arc<File>>,
    json: bool,
}

/// Opens the log. An absent file, and /dev/stderr, mean stderr.
pub fn open(file: Option<&Path>, format: &str, debug: bool) -> Result<Logs> {
    let json = match format {
        "text" | "" => false,
        "json" => true,
        other => return Err(Error::new(Kind::Invalid, format!("invalid log-format: {other}"))),
    };
    let file = match file.filter(|path| !path.as_os_str().is_empty() && *path != Path::new("/dev/stderr")) {
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            Some(file.map_err(|e| Error::io(format!("open log file {:?}", path.display().to_string()), &e))?.into())
        }
        None => None,
    };
    let logs = Logs { file, json };
    if log::set_boxed_logger(Box::new(logs.clone())).is_ok() {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
    Ok(logs)
}

impl Logs {
    /// The error that ends the program: into the log, and onto stderr for whoever sits there. What stderr was told by the
    /// container already is said again, with all that is known, to a person alone: programs read its lines.
    pub fn error(&self, err: &Error) {
        let told = err.was_told() && !std::io::stderr().is_terminal();
        if told && self.file.is_none() && !self.json {
            return;
        }
        let text = err.to_string();
        let errno = err.errno().map(|errno| format!("{errno:?}"));
        let parts = [
            ("field", err.field()),
            ("step", err.step()),
            ("object", err.object()),
            ("errno", errno.as_deref()),
            ("hint", err.hint()),
        ];
        self.line("error", &text, &parts);
        if self.file.is_some() && !told {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// `more` goes into JSON as fields of their own.
    fn line(&self, level: &str, text: &str, more: &[(&str, Option<&str>)]) {
        let now = OffsetDateTime::now_utc();
        let now = now.replace_nanosecond(0).unwrap_or(now).format(&Rfc3339).unwrap_or_default();
        let line = if self.json {
            let mut line = serde_json::json!({"level": level, "msg": text, "time": now});
            for (key, value) in more.iter().filter_map(|(key, value)| Some((key, (*value)?))) {
                line[key] = value.into();
            }
            format!("{line}\n")
        } else {
            format!("time=\"{now}\" level={level} msg={}\n", quoted(text))
        };
        let _ = match &self.file {
            Some(file) => (&**file).write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }
}

/// As logrus quotes: only what needs it inside the quotes is escaped.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("\"{escaped}\"")
}

impl Log for Logs {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            log::Level::Error => "error",
            log::Level::Warn => "warning",
            log::Level::Info => "info",
            log::Level::Debug | log::Level::Trace => "debug",
        };
        self.line(level, &record.args().to_string(), &[]);
    }

    fn flush(&self) {}
}
