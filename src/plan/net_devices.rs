//! `linux.netDevices`: network devices of the host that move into the container.

use std::ffi::CString;

use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use super::cstring;
use super::namespaces::Namespaces;
use crate::{Error, Result};

/// A device to move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    /// Its name on the host.
    pub host: CString,
    /// Its name in the container.
    pub name: CString,
}

/// Plans the devices, sorted by their name on the host.
pub fn plan(spec: &Spec, namespaces: &Namespaces) -> Result<Vec<NetDevice>> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.net_devices().as_ref());
    let mut out = Vec::new();
    for (host, device) in devices.into_iter().flatten() {
        let field = format!("linux.netDevices.{host}");
        let name = device.name().as_deref().filter(|name| !name.is_empty()).unwrap_or(host);
        for name in [host.as_str(), name] {
            if !valid(name) {
                return Err(Error::invalid(field, format!("invalid network device name {name:?}")));
            }
        }
        if !namespaces.has(Kind::Network) {
            return Err(Error::invalid(field, "unable to move network devices without a NET namespace"));
        }
        let device = NetDevice { host: cstring(&field, host.as_str())?, name: cstring(&field, name)? };
        if out.iter().any(|other: &NetDevice| other.name == device.name) {
            return Err(Error::invalid(field, format!("two devices are to be called {name:?}")));
        }
        out.push(device);
    }
    out.sort_by(|a, b| a.host.cmp(&b.host));
    Ok(out)
}

/// What the kernel takes (dev_valid_name of net/core/dev.c), without templates like `eth%d`.
fn valid(name: &str) -> bool {
    let odd = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace();
    !name.is_empty() && name.len() <= 15 && name != "." && name != ".." && !name.contains(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_a_namespace_is_needed() {
        let planned = |namespaces: &str, devices: &str| {
            let json =
                format!(r#"{{"ociVersion":"1.3.0","linux":{{"namespaces":[{namespaces}],"netDevices":{devices}}}}}"#);
            let spec: Spec = serde_json::from_str(&json).unwrap();
            plan(&spec, &super::super::namespaces::plan(&spec).unwrap())
        };
        let net = r#"{"type":"network"}"#;
        let two = planned(net, r#"{"eth1":{"name":"in0"},"eth0":{}}"#).unwrap();
        assert_eq!((two[0].name.to_str(), two[1].name.to_str()), (Ok("eth0"), Ok("in0")));
        for (namespaces, devices, want) in [
            ("", r#"{"eth0":{}}"#, "unable to move network devices without"),
            (net, r#"{"eth0":{"name":"a/b"}}"#, "invalid network device name \"a/b\""),
            (net, r#"{"a-name-of-sixteen":{}}"#, "invalid network device name"),
            (net, r#"{"eth0":{"name":"x"},"eth1":{"name":"x"}}"#, "two devices are to be called"),
        ] {
            let err = planned(namespaces, devices).unwrap_err().to_string();
            assert!(err.contains(want), "{err}");
        }
    }
}
