//! cgroups of v1, v2 and both: create, limits, devices, freeze, kill, stats, oom, remove. Does not live here: what to write (plan::cgroup).

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::Result;
use crate::plan::cgroup::CgroupPlan;

/// A cgroup: one directory on v2, one in each hierarchy on v1 (and hybrid).
#[derive(Debug)]
pub struct Cgroup {}

/// Resource usage, v1 or v2.
#[derive(Clone, Debug, Default)]
pub struct Stats {}

impl Cgroup {
    /// Makes the directories. A cgroup that exists and has processes, or is frozen, is refused. On an error nothing that it made stays.
    pub fn create(plan: &CgroupPlan) -> Result<Cgroup> {
        let _ = plan;
        todo!()
    }

    /// An existing one, by what [`Cgroup::paths`] said (state.json `cgroup_paths`).
    pub fn open(paths: &BTreeMap<String, PathBuf>) -> Result<Cgroup> {
        let _ = paths;
        todo!()
    }

    /// Controller to absolute path of the directory; the key is "" on v2.
    pub fn paths(&self) -> &BTreeMap<String, PathBuf> {
        todo!()
    }

    /// The directory to clone a child into (CLONE_INTO_CGROUP) where the host is pure v2.
    pub fn clone_fd(&self) -> Option<BorrowedFd<'_>> {
        todo!()
    }

    /// Moves a process into every hierarchy.
    pub fn attach(&self, pid: i32) -> Result<()> {
        let _ = pid;
        todo!()
    }

    /// Writes the limits and sets the device policy.
    pub fn apply(&self, plan: &CgroupPlan) -> Result<()> {
        let _ = plan;
        todo!()
    }

    /// Freezes every process; returns when they are.
    pub fn freeze(&self) -> Result<()> {
        todo!()
    }

    /// Thaws every process.
    pub fn thaw(&self) -> Result<()> {
        todo!()
    }

    /// True when frozen; false also when the cgroup is gone.
    pub fn frozen(&self) -> Result<bool> {
        todo!()
    }

    /// Host pids of all processes here and below; empty when the cgroup is gone.
    pub fn pids(&self) -> Result<Vec<i32>> {
        todo!()
    }

    /// Signals every process here and below; SIGKILL uses cgroup.kill where the kernel has it, and works on a frozen cgroup.
    pub fn kill(&self, signal: i32) -> Result<()> {
        let _ = signal;
        todo!()
    }

    /// Resource usage now; missing files count as zero. `Kind::NotFound` when the cgroup is gone.
    pub fn stats(&self) -> Result<Stats> {
        todo!()
    }

    /// Times the kernel's OOM killer has killed in it.
    pub fn oom_kills(&self) -> Result<u64> {
        todo!()
    }

    /// Removes it and everything below; Ok when it is gone already.
    pub fn remove(&self) -> Result<()> {
        todo!()
    }
}
