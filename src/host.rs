//! Facts about this machine, read once. Does not live here: decisions made from them (plan).

use std::path::PathBuf;

use crate::Result;

/// Where cgroups are mounted, and of which kind.
#[derive(Clone, Debug, Default)]
pub struct Cgroups {
    /// v1 hierarchies: controller names (or `name=systemd`), mountpoint, and this process's own path in it.
    pub v1: Vec<Hierarchy>,
    /// The v2 mount: `/sys/fs/cgroup` where pure, elsewhere on hybrid hosts.
    pub v2: Option<Hierarchy>,
}

/// One mounted cgroup hierarchy.
#[derive(Clone, Debug, Default)]
pub struct Hierarchy {
    /// Controllers; empty on v2.
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The path of this process's cgroup in it, from `/proc/self/cgroup`.
    pub own: PathBuf,
}

impl Cgroups {
    /// Reads `/proc/self/mountinfo` and `/proc/self/cgroup`.
    pub fn read() -> Result<Cgroups> {
        todo!()
    }

    /// True when only v2 is mounted.
    pub fn pure_v2(&self) -> bool {
        self.v1.is_empty() && self.v2.is_some()
    }
}
