//! One opaque error type with a kind; texts read `verb object: cause`. Does not live here: the mapping to ttrpc codes (shim).

use std::fmt;

/// A result whose error is skiff's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Text that containerd and BuildKit look for when a container is unknown.
pub const CONTAINER_DOES_NOT_EXIST: &str = "container does not exist";
/// Text that containerd looks for when a signal finds nothing to signal.
pub const CONTAINER_NOT_RUNNING: &str = "container not running";
/// Text that go-runc looks for when a process is gone.
pub const PROCESS_ALREADY_FINISHED: &str = "os: process already finished";
/// Text for `create` with an id that is taken.
pub const CONTAINER_ID_EXISTS: &str = "container with given ID already exists";
/// Text for an id that is not `[A-Za-z0-9_+.-]+`.
pub const INVALID_ID: &str = "invalid container ID format";

/// What a caller can decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request, the config.json or an argument is wrong; names the field.
    Invalid,
    /// The container, process or bundle is unknown, or its process is gone.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The container is not in a state that allows this.
    FailedPrecondition,
    /// This kernel, machine or version of skiff cannot do it.
    Unsupported,
    /// A deadline passed.
    Timeout,
    /// A system call failed.
    System,
}

/// An error with a kind, one line of text and, when a system call failed, its errno.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    kind: Kind,
    text: String,
    errno: Option<i32>,
    field: Option<String>,
    step: Option<&'static str>,
    object: Option<Box<str>>,
    hint: Option<Box<str>>,
    told: bool,
}

impl Error {
    /// An error of `kind` that reads `text`.
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), errno: None, field: None, step: None, object: None, hint: None, told: false }
    }

    /// `config.json` (or a request field) `field` is wrong because of `cause`.
    pub fn invalid(field: impl fmt::Display, cause: impl fmt::Display) -> Self {
        let field = field.to_string();
        Self { field: Some(field.clone()), ..Self::new(Kind::Invalid, format!("{field}: {cause}")) }
    }

    /// A failed system call: `what` is `verb object`, e.g. `mount proc at "/proc"`.
    pub fn sys(what: impl fmt::Display, errno: nix::errno::Errno) -> Self {
        let text = format!("{what}: {}", errno_text(errno));
        Self { errno: Some(errno as i32), ..Self::new(Kind::System, text) }
    }

    /// A failed operation of the standard library: `what` is `verb object`.
    pub fn io(what: impl fmt::Display, err: &std::io::Error) -> Self {
        match err.raw_os_error() {
            Some(code) => Self::sys(what, nix::errno::Errno::from_raw(code)),
            None => Self::new(Kind::System, format!("{what}: {err}")),
        }
    }

    /// The same error with `what: ` before its text.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.text = format!("{what}: {}", self.text);
        self
    }

    /// The same error with another kind.
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// The same error as one of a step of a birth.
    pub fn in_step(mut self, step: &'static str) -> Self {
        self.step = Some(step);
        self
    }

    /// The same error, about `field` of `config.json`, which its text names already or does not have to.
    pub fn of_field(mut self, field: impl fmt::Display) -> Self {
        self.field = Some(field.to_string());
        self
    }

    /// The same error, which this errno is behind.
    pub fn of_errno(mut self, errno: nix::errno::Errno) -> Self {
        self.errno = Some(errno as i32);
        self
    }

    /// The same error, about this path, program or name.
    pub fn of_object(mut self, object: impl Into<String>) -> Self {
        self.object = Some(object.into().into());
        self
    }

    /// The same error, with what a person may do about it after its text.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        self.text = format!("{}; {hint}", self.text);
        self.hint = Some(hint.into());
        self
    }

    /// The same error, which the container's stderr has been told already.
    pub fn that_was_told(mut self) -> Self {
        self.told = true;
        self
    }

    /// Whoever reads the container's stderr knows of it.
    pub fn was_told(&self) -> bool {
        self.told
    }

    /// What the failed step was at: a path, a program, a name.
    pub fn object(&self) -> Option<&str> {
        self.object.as_deref()
    }

    /// What a person may do about it; its text ends in it.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The step of a birth that failed, as `skiff plan` and traces name it.
    pub fn step(&self) -> Option<&'static str> {
        self.step
    }

    /// The field of `config.json` or of the request that is wrong.
    pub fn field(&self) -> Option<&str> {
        self.field.as_deref()
    }

    /// What a caller can decide on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The errno of the failed system call, if one failed.
    pub fn errno(&self) -> Option<nix::errno::Errno> {
        self.errno.map(nix::errno::Errno::from_raw)
    }
}

/// `no such file or directory (ENOENT)`: by text and by name, lower case.
pub fn errno_text(errno: nix::errno::Errno) -> String {
    format!("{} ({errno:?})", errno_words(errno))
}

/// `no such file or directory`: lower case.
pub fn errno_words(errno: nix::errno::Errno) -> String {
    let desc = errno.desc();
    let mut chars = desc.chars();
    match chars.next() {
        Some(first) if !desc.starts_with("RPC") && !desc.starts_with("I/O") => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => desc.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    #[test]
    fn system_errors_name_the_errno_by_text_and_name() {
        let err = Error::sys("mount tmpfs at \"/dev/shm\"", Errno::EPERM);
        assert_eq!(err.to_string(), "mount tmpfs at \"/dev/shm\": operation not permitted (EPERM)");
        assert_eq!(err.kind(), Kind::System);
        assert_eq!(err.errno(), Some(Errno::EPERM));
    }

    #[test]
    fn a_hint_goes_after_the_text() {
        let err = Error::sys("open \"/x\"", Errno::ENOENT).of_field("mounts[0].source").with_hint("it must exist");
        assert_eq!(err.to_string(), "open \"/x\": no such file or directory (ENOENT); it must exist");
        assert_eq!((err.field(), err.hint()), (Some("mounts[0].source"), Some("it must exist")));
    }

    #[test]
    fn context_goes_before_the_text() {
        let err = Error::invalid("process.cwd", "must be an absolute path").context("config.json");
        assert_eq!(err.to_string(), "config.json: process.cwd: must be an absolute path");
    }
}
