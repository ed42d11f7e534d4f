//! `Spec + Request + Host -> Plan`, pure: no file, no environment, no clock, no system call. Does not live here: applying it (child, cgroup).

pub mod capabilities;
pub mod cgroup;
mod checks;
pub mod explain;
pub mod mount_options;
pub mod namespaces;
pub mod net_devices;
pub mod process;
pub mod rdt;
pub mod rootfs;
pub mod scope;
pub mod seccomp;
pub mod sysctl;

use std::ffi::CString;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, Spec};

use crate::host::Cgroups;
use crate::{Error, Result};
use cgroup::CgroupPlan;

/// What the caller of create asks beside the spec.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Container id.
    pub id: &'a str,
    /// Absolute path of the bundle.
    pub bundle: &'a Path,
    /// The process gets a pty.
    pub terminal: bool,
    /// cgroupsPath is `slice:prefix:name`.
    pub systemd_cgroup: bool,
    /// MS_MOVE and chroot instead of pivot_root.
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// The caller may lack the right to make cgroups, and to raise priorities.
    pub rootless: bool,
}

/// Everything that a create will do, in words of the kernel.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Namespaces to make and to join.
    pub namespaces: namespaces::Namespaces,
    /// The root file system and what is mounted in it.
    pub rootfs: rootfs::Rootfs,
    /// The init process.
    pub process: process::Process,
    /// cgroup directories and limits.
    pub cgroup: CgroupPlan,
    /// Group of the resctrl file system.
    pub rdt: Option<rdt::Rdt>,
    /// Network devices to move in.
    pub net_devices: Vec<net_devices::NetDevice>,
    /// Seccomp profile, checked.
    pub seccomp: Option<seccomp::Profile>,
    /// Paths below /proc/sys, and values.
    pub sysctls: Vec<sysctl::Sysctl>,
    /// Host name.
    pub hostname: Option<CString>,
    /// NIS domain name.
    pub domainname: Option<CString>,
    /// Name of the session keyring.
    pub keyring: Option<CString>,
    /// Hooks of all kinds.
    pub hooks: Hooks,
    /// What only a real root may do is not insisted on.
    pub rootless: bool,
}

/// Plans a create. Every error names the field of `config.json`.
pub fn build(request: &Request<'_>, spec: &Spec, host: &Cgroups) -> Result<Plan> {
    checks::spec(spec)?;
    let namespaces = namespaces::plan(spec)?;
    checks::against_namespaces(spec, &namespaces)?;
    let process = spec.process().as_ref().ok_or_else(|| Error::invalid("process", "must not be empty"))?;
    let rootfs = rootfs::plan(request, spec, &namespaces, host)?;
    let owner = cgroup::owner(spec, &namespaces, &rootfs, host);
    let mut process = process::plan("process", process, request.terminal)?;
    if let Some(linux) = spec.linux() {
        process.personality = process::personality(linux)?;
        process.memory_policy = process::memory_policy(linux)?;
    }
    let keyring = if request.no_new_keyring { None } else { Some(cstring("id", format!("_ses.{}", request.id))?) };
    Ok(Plan {
        rootfs,
        process,
        cgroup: CgroupPlan {
            rootless: request.rootless,
            owner,
            ..cgroup::plan(request.id, spec, host, request.systemd_cgroup, request.rootless)?
        },
        rootless: request.rootless,
        rdt: rdt::plan(spec)?,
        net_devices: net_devices::plan(spec, &namespaces)?,
        seccomp: seccomp::plan(spec)?,
        sysctls: sysctl::plan(spec, &namespaces)?,
        hostname: spec.hostname().as_ref().map(|name| cstring("hostname", name.as_str())).transpose()?,
        domainname: spec.domainname().as_ref().map(|name| cstring("domainname", name.as_str())).transpose()?,
        keyring,
        hooks: spec.hooks().clone().unwrap_or_default(),
        namespaces,
    })
}

/// A C string, or an error that names the field with the NUL byte.
pub(crate) fn cstring(field: impl std::fmt::Display, text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(field, "contains a NUL byte"))
}

/// Path `path` without `.`, `//` and `..`, as if `/` were its root.
pub(crate) fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            std::path::Component::Normal(name) => out.push(name),
            std::path::Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// Path `path` below `/` as a lookup below a root fd takes it: relative, `.` for the root itself.
pub(crate) fn inside(field: impl std::fmt::Display, path: &Path) -> Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    let cleaned = clean(path);
    let bytes = cleaned.as_os_str().as_bytes();
    cstring(field, if bytes.len() == 1 { &b"."[..] } else { &bytes[1..] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_keeps_paths_below_the_root() {
        for (path, want) in [("/a/../../b/./c//d", "/b/c/d"), ("x", "/x"), ("/..", "/"), ("", "/")] {
            assert_eq!(clean(Path::new(path)), Path::new(want), "{path}");
        }
        assert_eq!(inside("f", Path::new("/")).unwrap().to_bytes(), b".");
        assert_eq!(inside("f", Path::new("/proc/sys")).unwrap().to_bytes(), b"proc/sys");
    }
}
