//! Which containers share a shim, and where its socket is (containerd cmd/containerd-shim-runc-v2/manager, pkg/shim/util_unix.go).

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use skiff::{Error, Result};

/// Annotations that name the group, first match wins.
const ANNOTATIONS: [&str; 3] =
    ["io.containerd.runc.v2.group", "io.containerd.skiff.group", "io.kubernetes.cri.sandbox-id"];

/// Where containerd keeps the sockets of shims, whatever its own state directory is.
pub const SOCKET_DIR: &str = "/run/containerd/s";

#[derive(Deserialize)]
struct Annotated {
    annotations: Option<HashMap<String, String>>,
}

/// The id that names the shim of the container in `bundle`: the group, or the container itself. A bundle without
/// config.json is a sandbox, which is its own group.
pub fn of(bundle: &Path, id: &str) -> Result<String> {
    let path = bundle.join("config.json");
    let mut json = Vec::new();
    let read = std::fs::File::open(&path).and_then(|file| file.take(16 << 20).read_to_end(&mut json));
    match read {
        Ok(_) => {}
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(id.to_string()),
        Err(err) => return Err(Error::io(format!("read {:?}", path.display().to_string()), &err)),
    }
    named(&json, id)
}

fn named(json: &[u8], id: &str) -> Result<String> {
    let spec: Annotated = serde_json::from_slice(json).map_err(|e| Error::invalid("config.json", e))?;
    let annotations = spec.annotations.unwrap_or_default();
    let group = by_annotations(|name| annotations.get(name).map(String::as_str));
    Ok(group.unwrap_or(id).to_string())
}

/// The group that annotations name, if they do.
pub fn by_annotations<'a>(find: impl Fn(&str) -> Option<&'a str>) -> Option<&'a str> {
    ANNOTATIONS.iter().find_map(|name| find(name).filter(|group| !group.is_empty()))
}

/// The socket of a group: its name is a hash of containerd's address, the namespace and the group.
pub fn socket(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    // Go's filepath.Join of the three, which cleans the result.
    let joined =
        [address, namespace, group].iter().filter(|part| !part.is_empty()).fold(PathBuf::new(), |mut path, part| {
            for name in Path::new(part).components() {
                match name {
                    std::path::Component::RootDir if path.as_os_str().is_empty() => path.push("/"),
                    std::path::Component::Normal(name) => path.push(name),
                    std::path::Component::ParentDir => {
                        path.pop();
                    }
                    _ => {}
                }
            }
            path
        });
    let hash = Sha256::digest(joined.to_string_lossy().as_bytes());
    let name: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    dir.join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_first_annotation_or_the_id() {
        let group = |json: &str| named(json.as_bytes(), "id").unwrap();
        assert_eq!(group("{}"), "id");
        assert_eq!(group(r#"{"annotations":null}"#), "id");
        assert_eq!(group(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#), "pod");
        let both = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(group(both), "g");
        assert!(named(b"{", "id").unwrap_err().to_string().starts_with("config.json: "));
    }

    #[test]
    fn no_config_json_is_a_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path(), "pod").unwrap(), "pod");
    }

    #[test]
    fn socket_names_are_those_of_the_go_shim() {
        // printf '%s' /run/containerd/containerd.sock/default/test | sha256sum
        let path = socket(Path::new("/run/containerd/s"), "/run/containerd/containerd.sock", "default", "test");
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(name.len(), 64);
        assert_eq!(name, "cfa94b04d543b3f64f78eff8125c7a7cd0903173f673d87367be72ff09fc92c2");
    }
}
