//! The one mapping from the library's kinds to ttrpc status codes.

use containerd_shim_protos::ttrpc;
use skiff::{Error, Kind};
use ttrpc::{Code, get_status};

/// The status that containerd gets for an error.
pub fn status(err: &Error) -> ttrpc::Error {
    let code = match err.kind() {
        Kind::Invalid => Code::INVALID_ARGUMENT,
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        Kind::Unsupported => Code::UNIMPLEMENTED,
        Kind::Timeout => Code::DEADLINE_EXCEEDED,
        Kind::System => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(get_status(code, err.to_string()))
}

/// A container that is not in the table.
pub fn no_container(id: &str) -> Error {
    Error::new(Kind::NotFound, format!("container {id:?} not found"))
}

/// An exec that is not in the table.
pub fn no_exec(id: &str, exec_id: &str) -> Error {
    Error::new(Kind::NotFound, format!("process {exec_id:?} of container {id:?} not found"))
}

/// The container or process is not in a state that allows the call.
pub fn precondition(text: impl Into<String>) -> Error {
    Error::new(Kind::FailedPrecondition, text)
}
