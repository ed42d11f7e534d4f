//! What `start` reads from stdin and writes to stdout, by containerd's version (shim bootstrap protocol).

use std::fs::File;
use std::io::Read;
use std::path::Path;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use skiff::{Error, Result};

/// containerd's own limit for this input, bytes.
const MAX_STDIN: u64 = 10 << 20;

/// What containerd sent on stdin.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Input {
    /// Parameters of containerd 2.3 and later.
    pub params: Option<BootstrapParams>,
    /// Runtime options.
    pub options: Option<Any>,
}

/// Reads stdin to its end.
pub fn read(id: &str, namespace: &str) -> Result<Input> {
    let mut bytes = Vec::new();
    // The standard library's stdin would keep its buffer for the daemon's whole life.
    let stdin = skiff::sys::process::standard_stream(0).try_clone_to_owned().map(File::from);
    stdin
        .and_then(|stdin| stdin.take(MAX_STDIN + 1).read_to_end(&mut bytes))
        .map_err(|e| Error::io("read the bootstrap parameters", &e))?;
    if bytes.len() as u64 > MAX_STDIN {
        return Err(Error::invalid("stdin", "larger than 10 MiB"));
    }
    parse(&bytes, id, namespace)
}

/// An Any of options may be readable as parameters too: only those that name this very container are.
fn parse(bytes: &[u8], id: &str, namespace: &str) -> Result<Input> {
    if bytes.is_empty() {
        return Ok(Input::default());
    }
    if let Ok(params) = BootstrapParams::parse_from_bytes(bytes)
        && params.instance_id == id
        && params.namespace == namespace
    {
        let options = params.extensions.iter().find_map(|extension| extension.value.clone().into_option());
        return Ok(Input { params: Some(params), options });
    }
    match Any::parse_from_bytes(bytes) {
        Ok(options) => Ok(Input { params: None, options: Some(options) }),
        Err(err) => Err(Error::invalid("stdin", format!("neither bootstrap parameters nor options: {err}"))),
    }
}

/// The reply with the address of the shim's socket.
pub fn reply(input: &Input, cwd: &Path, socket: &Path) -> Result<Vec<u8>> {
    let address = format!("unix://{}", socket.display());
    if input.params.is_some() {
        let result = BootstrapResult { version: 3, address, protocol: "ttrpc".into(), ..BootstrapResult::default() };
        return result.write_to_bytes().map_err(|e| Error::invalid("reply", e));
    }
    // Only the sandbox controller of containerd 2.0 to 2.2 uses such a bundle; it needs version 3.
    if cwd.components().any(|part| part.as_os_str() == "io.containerd.sandbox.controller.v1.shim") {
        let json = serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"});
        return Ok(json.to_string().into_bytes());
    }
    Ok(address.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: &str = "/run/containerd/io.containerd.runtime.v2.task/default/a";

    fn params(id: &str) -> Vec<u8> {
        let params =
            BootstrapParams { instance_id: id.into(), namespace: "default".into(), ..BootstrapParams::default() };
        params.write_to_bytes().unwrap()
    }

    #[test]
    fn nothing_on_stdin_is_answered_with_the_bare_address() {
        let input = parse(b"", "a", "default").unwrap();
        let reply = reply(&input, Path::new(TASK), Path::new("/run/containerd/s/x")).unwrap();
        assert_eq!(reply, b"unix:///run/containerd/s/x");
    }

    #[test]
    fn options_on_stdin_are_answered_with_the_bare_address() {
        let any = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![8, 1], ..Any::default() };
        let input = parse(&any.write_to_bytes().unwrap(), "a", "default").unwrap();
        assert_eq!(input.options, Some(any));
        assert!(reply(&input, Path::new(TASK), Path::new("/s")).unwrap().starts_with(b"unix://"));
    }

    #[test]
    fn options_that_read_as_parameters_of_another_are_options() {
        let any = Any { type_url: "a".into(), value: b"other".to_vec(), ..Any::default() };
        let input = parse(&any.write_to_bytes().unwrap(), "a", "default").unwrap();
        assert!(input.params.is_none());
        let input = parse(&params("b"), "a", "default").unwrap();
        assert!(input.params.is_none(), "parameters of another container");
    }

    #[test]
    fn parameters_are_answered_in_protobuf() {
        let input = parse(&params("a"), "a", "default").unwrap();
        let reply = reply(&input, Path::new(TASK), Path::new("/s/x")).unwrap();
        let result = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///s/x", "ttrpc"));
        assert!(!reply.last().unwrap().is_ascii_whitespace(), "older readers trim");
    }

    #[test]
    fn the_sandbox_controller_gets_json_of_version_3() {
        let cwd = Path::new("/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io/pod");
        let reply = reply(&Input::default(), cwd, Path::new("/s/x")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&reply).unwrap();
        assert_eq!(json, serde_json::json!({"version": 3, "address": "unix:///s/x", "protocol": "ttrpc"}));
    }

    #[test]
    fn garbage_on_stdin_is_an_error() {
        assert!(parse(&[0xff; 8], "a", "default").unwrap_err().to_string().starts_with("stdin: "));
    }
}
