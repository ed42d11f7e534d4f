//! `linux.resources` and `linux.cgroupsPath` as cgroup file writes.

use oci_spec::runtime::{LinuxResources, Spec};

use crate::Result;
use crate::host::Cgroups;

/// What the container's cgroup will be.
#[derive(Clone, Debug, Default)]
pub struct CgroupPlan {}

/// Plans the cgroup of container `id`. Errors name the JSON field.
pub fn plan(id: &str, spec: &Spec, host: &Cgroups, systemd: bool) -> Result<CgroupPlan> {
    let _ = (id, spec, host, systemd);
    todo!()
}

/// Plans an update of an existing cgroup. Devices are never part of it.
pub fn plan_update(resources: &LinuxResources, host: &Cgroups) -> Result<CgroupPlan> {
    let _ = (resources, host);
    todo!()
}
