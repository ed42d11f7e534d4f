//! Reads `config.json` and `process.json` into the OCI types; names the JSON field of every error. Does not check meaning (plan).

use std::path::Path;

use oci_spec::runtime::{Process, Spec};

use crate::Result;

/// Reads and parses `config.json` of the bundle at `dir`.
pub fn load(dir: &Path) -> Result<Spec> {
    let _ = dir;
    todo!()
}

/// Parses the text of a `config.json`.
pub fn parse_spec(json: &[u8]) -> Result<Spec> {
    let _ = json;
    todo!()
}

/// Parses the text of a process document, as in `runc exec --process` and containerd's ExecProcessRequest.
pub fn parse_process(json: &[u8]) -> Result<Process> {
    let _ = json;
    todo!()
}
