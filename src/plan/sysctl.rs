//! `linux.sysctl`: only what a namespace of the container's own holds.

use std::ffi::CString;

use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use super::cstring;
use super::namespaces::Namespaces;
use crate::{Error, Result};

/// One write below /proc/sys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below /proc/sys.
    pub path: CString,
    /// Value, as given.
    pub value: CString,
}

/// Of the IPC namespace.
pub const IPC: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// Plans the sysctls, sorted by path.
pub fn plan(spec: &Spec, namespaces: &Namespaces) -> Result<Vec<Sysctl>> {
    let map = spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref());
    let mut out = Vec::new();
    for (key, value) in map.into_iter().flatten() {
        let field = format!("linux.sysctl.{key}");
        let path = path(key);
        if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(Error::invalid(field, "not a sysctl name"));
        }
        check(&path, value, spec, namespaces).map_err(|cause| Error::invalid(&field, cause))?;
        out.push(Sysctl { path: cstring(&field, path)?, value: cstring(&field, value.as_str())? });
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

/// sysctl(8): the first separator of the key tells which of `.` and `/` separates; the other one is then literal.
pub fn path(key: &str) -> String {
    match key.find(['.', '/']) {
        Some(at) if key.as_bytes()[at] == b'.' => key
            .chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect(),
        _ => key.to_string(),
    }
}

fn check(path: &str, value: &str, spec: &Spec, namespaces: &Namespaces) -> std::result::Result<(), &'static str> {
    if IPC.contains(&path) || path.starts_with("fs/mqueue/") {
        return if namespaces.has(Kind::Ipc) { Ok(()) } else { Err("is not allowed in the hosts ipc namespace") };
    }
    if path.starts_with("net/") {
        return if namespaces.has(Kind::Network) { Ok(()) } else { Err("not allowed in host network namespace") };
    }
    if path.starts_with("user/") {
        let has = namespaces.has(Kind::User);
        return if has { Ok(()) } else { Err("setting ucounts without a user namespace not allowed") };
    }
    match path {
        "kernel/domainname" if !namespaces.has(Kind::Uts) => Err("is not allowed in the hosts UTS namespace"),
        "kernel/domainname" if spec.domainname().as_ref().is_some_and(|name| !name.is_empty() && name != value) => {
            Err("is not what the OCI \"domainname\" field says")
        }
        "kernel/domainname" => Ok(()),
        "kernel/hostname" if spec.hostname().as_ref().is_some_and(|h| !h.is_empty()) => {
            Err("is not allowed as it conflicts with the OCI \"hostname\" field")
        }
        "kernel/hostname" if namespaces.has(Kind::Uts) => Err("is not allowed, use the OCI \"hostname\" field"),
        _ => Err("is not in a separate kernel namespace"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(namespaces: &str, key: &str) -> Result<Vec<Sysctl>> {
        let spec: Spec = serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}],"sysctl":{{"{key}":"1"}}}}}}"#
        ))
        .unwrap();
        plan(&spec, &super::super::namespaces::plan(&spec)?)
    }

    #[test]
    fn only_namespaced_sysctls_are_taken() {
        let net = r#"{"type":"network"}"#;
        let ipc = r#"{"type":"ipc"}"#;
        assert_eq!(planned(net, "net.ipv4.ip_forward").unwrap()[0].path.to_bytes(), b"net/ipv4/ip_forward");
        assert_eq!(
            planned(net, "net/ipv4/conf/eth0.100/forwarding").unwrap()[0].path.to_bytes(),
            b"net/ipv4/conf/eth0.100/forwarding"
        );
        planned(ipc, "kernel.shm_rmid_forced").unwrap();
        planned(ipc, "fs.mqueue.msg_max").unwrap();
        for (ns, key) in [
            (ipc, "net.ipv4.ip_forward"),
            (net, "kernel.shmmax"),
            (net, "kernel.core_pattern"),
            (net, "net/../kernel/core_pattern"),
            (net, "net..x"),
            (net, "../../sysrq-trigger"),
            (net, "vm.swappiness"),
        ] {
            let err = planned(ns, key).unwrap_err().to_string();
            assert!(err.starts_with(&format!("linux.sysctl.{key}: ")), "{err}");
        }
    }

    #[test]
    fn a_domain_name_is_said_once() {
        let planned = |value: &str| {
            let spec: Spec = serde_json::from_value(serde_json::json!({
                "ociVersion": "1.0.2", "domainname": "here",
                "linux": {"namespaces": [{"type": "uts"}], "sysctl": {"kernel.domainname": value}},
            }))
            .unwrap();
            plan(&spec, &super::super::namespaces::plan(&spec)?)
        };
        planned("here").unwrap();
        let err = planned("there").unwrap_err().to_string();
        assert_eq!(err, "linux.sysctl.kernel.domainname: is not what the OCI \"domainname\" field says");
    }
}
