//! `linux.namespaces`, id mappings and time offsets.

use std::collections::BTreeSet;
use std::ffi::CString;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType as Kind, Spec};

use super::cstring;
use crate::{Error, Result};

/// A namespace to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// Its kind.
    pub kind: Kind,
    /// Its file.
    pub path: CString,
    /// The field that names it, e.g. `linux.namespaces[2].path`.
    pub field: String,
}

/// The namespaces of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// CLONE_NEW* of the namespaces to make.
    pub new: u64,
    /// Those to join, in the order of the spec.
    pub joins: Vec<Join>,
    /// Text of `/proc/<pid>/uid_map`, when a user namespace is made.
    pub uid_map: String,
    /// Text of `/proc/<pid>/gid_map`.
    pub gid_map: String,
    /// Text of `/proc/<pid>/timens_offsets`, when there are offsets.
    pub time_offsets: Option<String>,
}

impl Namespaces {
    /// True when the container does not share the caller's namespace of this kind.
    pub fn has(&self, kind: Kind) -> bool {
        self.makes(kind) || self.joined(kind).is_some()
    }

    /// True when a new one of this kind is made.
    pub fn makes(&self, kind: Kind) -> bool {
        self.new & kind as u64 != 0
    }

    /// The one of this kind to join.
    pub fn joined(&self, kind: Kind) -> Option<&Join> {
        self.joins.iter().find(|join| join.kind == kind)
    }

    /// CLONE_NEW* of all kinds that the container does not share with the caller.
    pub fn all(&self) -> u64 {
        self.joins.iter().fold(self.new, |flags, join| flags | join.kind as u64)
    }
}

/// The kernel takes at most this many lines in an id map (user_namespaces(7)).
const MAX_MAPPINGS: usize = 340;

/// Plans the namespaces of a spec.
pub fn plan(spec: &Spec) -> Result<Namespaces> {
    let Some(linux) = spec.linux() else { return Ok(Namespaces::default()) };
    let mut out = Namespaces::default();
    let mut seen = BTreeSet::new();
    for (at, ns) in linux.namespaces().iter().flatten().enumerate() {
        let field = format!("linux.namespaces[{at}]");
        if !seen.insert(ns.typ() as u64) {
            return Err(Error::invalid(field, format!("duplicated namespace {:?}", name(ns.typ()))));
        }
        match ns.path() {
            Some(path) if !path.as_os_str().is_empty() => {
                let field = format!("{field}.path");
                if !path.is_absolute() {
                    return Err(Error::invalid(field, "must be an absolute path"));
                }
                let path = cstring(&field, path.as_os_str().as_encoded_bytes())?;
                out.joins.push(Join { kind: ns.typ(), path, field });
            }
            _ => out.new |= ns.typ() as u64,
        }
    }
    let uid = linux.uid_mappings().as_deref().unwrap_or_default();
    let gid = linux.gid_mappings().as_deref().unwrap_or_default();
    if out.makes(Kind::User) {
        out.uid_map = map("linux.uidMappings", uid)?;
        out.gid_map = map("linux.gidMappings", gid)?;
    } else if !(uid.is_empty() && gid.is_empty()) && out.joined(Kind::User).is_none() {
        let field = if uid.is_empty() { "linux.gidMappings" } else { "linux.uidMappings" };
        return Err(Error::invalid(
            field,
            "user namespace mappings specified, but user namespace isn't enabled in the config",
        ));
    }
    if let Some(offsets) = linux.time_offsets().as_ref().filter(|o| !o.is_empty()) {
        if !out.makes(Kind::Time) {
            let cause = match out.joined(Kind::Time) {
                Some(_) => "offsets cannot be set in a time namespace that is joined by path",
                None => "time namespace offsets specified, but time namespace isn't enabled in the config",
            };
            return Err(Error::invalid("linux.timeOffsets", cause));
        }
        let mut text = String::new();
        for (clock, offset) in offsets {
            if clock != "monotonic" && clock != "boottime" {
                return Err(Error::invalid(format!("linux.timeOffsets.{clock}"), "must be monotonic or boottime"));
            }
            text += &format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        }
        out.time_offsets = Some(text);
    }
    Ok(out)
}

/// Lines of a uid_map or gid_map.
pub fn map(field: &str, mappings: &[LinuxIdMapping]) -> Result<String> {
    if mappings.is_empty() {
        return Err(Error::invalid(
            field,
            "user namespaces enabled, but no namespace path to join nor mappings to apply specified",
        ));
    }
    if mappings.len() > MAX_MAPPINGS {
        return Err(Error::invalid(field, format!("{} mappings, the kernel takes {MAX_MAPPINGS}", mappings.len())));
    }
    let mut text = String::new();
    for (at, m) in mappings.iter().enumerate() {
        if m.size() == 0 {
            return Err(Error::invalid(format!("{field}[{at}].size"), "must be greater than zero"));
        }
        if m.container_id().checked_add(m.size() - 1).is_none() || m.host_id().checked_add(m.size() - 1).is_none() {
            return Err(Error::invalid(format!("{field}[{at}]"), "ids do not fit 32 bits"));
        }
        text += &format!("{} {} {}\n", m.container_id(), m.host_id(), m.size());
    }
    Ok(text)
}

/// The OCI name of a kind, which is also what the spec's `type` says.
pub fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Mount => "mount",
        Kind::Cgroup => "cgroup",
        Kind::Uts => "uts",
        Kind::Ipc => "ipc",
        Kind::User => "user",
        Kind::Pid => "pid",
        Kind::Network => "network",
        Kind::Time => "time",
    }
}

/// The name of a kind's file in `/proc/<pid>/ns`.
pub fn proc_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Mount => "mnt",
        Kind::Network => "net",
        other => name(other),
    }
}

/// All kinds.
pub const KINDS: [Kind; 8] =
    [Kind::Mount, Kind::Cgroup, Kind::Uts, Kind::Ipc, Kind::User, Kind::Pid, Kind::Network, Kind::Time];

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(linux: &str) -> Result<Namespaces> {
        plan(&serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{linux}}}"#)).unwrap())
    }

    #[test]
    fn namespaces_are_made_or_joined() {
        let ns =
            planned(r#"{"namespaces":[{"type":"pid"},{"type":"network","path":"/run/netns/a"},{"type":"mount"}]}"#)
                .unwrap();
        assert!(ns.makes(Kind::Pid) && ns.makes(Kind::Mount) && !ns.makes(Kind::Network));
        assert_eq!(ns.joined(Kind::Network).unwrap().field, "linux.namespaces[1].path");
        assert_eq!(ns.all(), 0x2000_0000 | 0x4000_0000 | 0x2_0000);
    }

    #[test]
    fn errors_name_the_field() {
        for (linux, want) in [
            (r#"{"namespaces":[{"type":"pid"},{"type":"pid"}]}"#, "linux.namespaces[1]: duplicated"),
            (r#"{"namespaces":[{"type":"pid","path":"x"}]}"#, "linux.namespaces[0].path: must be"),
            (r#"{"namespaces":[{"type":"user"}]}"#, "linux.uidMappings: user namespaces enabled"),
            (r#"{"uidMappings":[{"containerID":0,"hostID":0,"size":1}]}"#, "linux.uidMappings: user namespace map"),
            (
                r#"{"namespaces":[{"type":"user"}],"uidMappings":[{"containerID":0,"hostID":1,"size":0}],"gidMappings":[]}"#,
                "linux.uidMappings[0].size: must",
            ),
            (r#"{"timeOffsets":{"monotonic":{"secs":1}}}"#, "linux.timeOffsets: time namespace"),
            (r#"{"namespaces":[{"type":"time"}],"timeOffsets":{"real":{"secs":1}}}"#, "linux.timeOffsets.real: "),
        ] {
            let err = planned(linux).unwrap_err().to_string();
            assert!(err.starts_with(want), "{linux}: {err}");
        }
    }

    #[test]
    fn maps_are_the_kernels_text() {
        let ns = planned(
            r#"{"namespaces":[{"type":"user"}],
                "uidMappings":[{"containerID":0,"hostID":100000,"size":65536}],
                "gidMappings":[{"containerID":0,"hostID":200000,"size":10}]}"#,
        )
        .unwrap();
        assert_eq!(ns.uid_map, "0 100000 65536\n");
        assert_eq!(ns.gid_map, "0 200000 10\n");
    }
}
