//! Reads `config.json` and `process.json` into the OCI types; names the JSON field of every error. Does not check meaning (plan).

use std::borrow::Cow;
use std::path::Path;

use oci_spec::runtime::{Process, Spec};
use serde::de::DeserializeOwned;

use crate::{Error, Kind, Result};

/// A config.json larger than this is refused: the largest that real callers write are well below.
const MAX_BYTES: u64 = 16 << 20;

/// Reads and parses the file `config` of the bundle at `dir`; None is `config.json`.
pub fn load(dir: &Path, config: Option<&Path>) -> Result<Spec> {
    let path = dir.join(config.unwrap_or_else(|| Path::new("config.json")));
    match read(&path) {
        Ok(json) => parse_spec(&json),
        Err(err) if err.errno() == Some(nix::errno::Errno::ENOENT) && dir.is_dir() => Err(Error::new(
            Kind::NotFound,
            format!("JSON specification file config.json not found in {:?}", dir.display().to_string()),
        )),
        Err(err) => Err(err),
    }
}

/// Reads a file of bounded size.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let name = path.display().to_string();
    let what = |verb: &str| format!("{verb} {name:?}");
    let file = std::fs::File::open(path).map_err(|e| {
        let err = Error::io(what("open"), &e);
        if e.kind() == std::io::ErrorKind::NotFound { err.with_kind(Kind::NotFound) } else { err }
    })?;
    let mut out = Vec::with_capacity(file.metadata().map_or(0, |m| m.len().min(MAX_BYTES)) as usize + 1);
    file.take(MAX_BYTES + 1).read_to_end(&mut out).map_err(|e| Error::io(what("read"), &e))?;
    if out.len() as u64 > MAX_BYTES {
        return Err(Error::new(Kind::Invalid, format!("{}: larger than {} MiB", what("read"), MAX_BYTES >> 20)));
    }
    Ok(out)
}

/// Parses the text of a `config.json`.
pub fn parse_spec(json: &[u8]) -> Result<Spec> {
    let spec: Spec = parse("config.json", json)?;
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let limits = resources.and_then(|resources| resources.hugepage_limits().as_ref());
    if limits.is_some_and(|limits| limits.iter().any(|limit| limit.page_size().is_empty())) {
        return parse("config.json", &with_spec_case(json));
    }
    Ok(spec)
}

/// Parses the text of a process document, as in `runc exec --process` and containerd's ExecProcessRequest.
pub fn parse_process(json: &[u8]) -> Result<Process> {
    parse("process", json)
}

/// The OCI types know a fixed list of capabilities, while the spec says that unknown ones should be no error, and they
/// insist on a user, which callers leave out for root: such things are put right and the text is read again.
fn parse<T: DeserializeOwned>(name: &str, json: &[u8]) -> Result<T> {
    // Serde would take an array for the fields of an object in their order.
    if json.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|byte| *byte != b'{') {
        return Err(error(name, ".", "must be a JSON object"));
    }
    let (path, cause) = match strictly(json) {
        Ok(value) => return Ok(value),
        Err(err) => err,
    };
    if (path.contains("capabilities.") || path.contains("scheduler.flags") || cause.contains("missing field `user`"))
        && let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(json)
    {
        let process = if value.get("process").is_some() { value.get_mut("process") } else { Some(&mut value) };
        if let Some(process) = process.and_then(serde_json::Value::as_object_mut) {
            drop_unknown_capabilities(process);
            spec_names_of_flags(process);
            process.entry("user").or_insert_with(|| serde_json::json!({"uid": 0, "gid": 0}));
        }
        return serde_path_to_error::deserialize(value)
            .map_err(|err| error(name, &err.path().to_string(), &err.into_inner().to_string()));
    }
    Err(error(name, &path, &cause))
}

/// Go reads keys in any case, and one of them is often written in another.
fn with_spec_case(json: &[u8]) -> Cow<'_, [u8]> {
    const OTHER: &[u8] = b"\"pagesize\"";
    let mut json = Cow::Borrowed(json);
    while let Some(at) = json.windows(OTHER.len()).position(|window| window == OTHER) {
        json.to_mut()[at..at + OTHER.len()].copy_from_slice(b"\"pageSize\"");
    }
    json
}

/// The value, or where in the document what is wrong. The way to it is kept only where there is an error: it costs as much
/// as the reading itself.
fn strictly<T: DeserializeOwned>(json: &[u8]) -> std::result::Result<T, (String, String)> {
    if let Ok(value) = serde_json::from_slice(json) {
        return Ok(value);
    }
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut deserializer)
        .map_err(|err| (err.path().to_string(), err.into_inner().to_string()))?;
    deserializer.end().map_err(|err| (".".to_string(), err.to_string()))?;
    Ok(value)
}

fn error(name: &str, path: &str, cause: &str) -> Error {
    // What the path ends in when the text ends before a field's name does.
    let path = path.trim_end_matches('?').trim_end_matches('.');
    if path.is_empty() { Error::invalid(name, cause) } else { Error::invalid(format!("{name}: {path}"), cause) }
}

/// Of two flags the OCI types know other names.
fn spec_names_of_flags(process: &mut serde_json::Map<String, serde_json::Value>) {
    let flags = process.get_mut("scheduler").and_then(|s| s.get_mut("flags")).and_then(|f| f.as_array_mut());
    for flag in flags.into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
}

fn drop_unknown_capabilities(process: &mut serde_json::Map<String, serde_json::Value>) {
    let Some(sets) = process.get_mut("capabilities").and_then(|c| c.as_object_mut()) else { return };
    for (set, list) in sets {
        let Some(list) = list.as_array_mut() else { continue };
        list.retain(|cap| {
            let known = cap.as_str().is_none_or(|name| crate::plan::capabilities::number(name).is_some());
            if !known {
                log::warn!("process.capabilities.{set}: unknown capability {cap} is ignored");
            }
            known
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_json_field() {
        for (json, want) in [
            ("{", "config.json: EOF while parsing"),
            ("[]", "config.json: must be a JSON object"),
            (r#"{"ociVersion":"1.0.2"} x"#, "config.json: trailing characters"),
            (r#"{"ociVersion":"1.0.2","process":{"args":"sh"}}"#, "config.json: process.args: invalid type: string"),
            (
                r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"pid"},{"type":"moon"}]}}"#,
                "config.json: linux.namespaces[1].type: unknown variant `moon`",
            ),
            (
                r#"{"ociVersion":"1.0.2","mounts":[{"destination":1}]}"#,
                "config.json: mounts[0].destination: invalid type",
            ),
        ] {
            let err = parse_spec(json.as_bytes()).unwrap_err().to_string();
            assert!(err.starts_with(want), "{json}: {err}");
        }
    }

    #[test]
    fn unknown_fields_and_capabilities_are_ignored() {
        let json = r#"{"ociVersion":"1.0.2","extra":{"a":1},"process":{"cwd":"/","user":{"uid":0,"gid":0},
            "capabilities":{"bounding":["CAP_CHOWN","CAP_MOONWALK"]}}}"#;
        let spec = parse_spec(json.as_bytes()).unwrap();
        let caps = spec.process().as_ref().unwrap().capabilities().as_ref().unwrap();
        assert_eq!(caps.bounding().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn a_missing_config_json_and_a_missing_bundle_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let err = load(dir.path(), None).unwrap_err();
        assert!(err.to_string().starts_with("JSON specification file config.json not found"), "{err}");
        let err = load(&dir.path().join("no"), None).unwrap_err();
        assert!(err.to_string().ends_with("no such file or directory (ENOENT)"), "{err}");
        assert_eq!(err.kind(), Kind::NotFound);
    }
}
