//! cgroups of v1, v2 and both: create, limits, devices, freeze, kill, stats, oom, remove. Does not live here: what to write (plan::cgroup).

mod dbus;
mod devices;
mod dir;
mod oom;
pub mod stats;
pub mod systemd;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::plan::cgroup::{CgroupPlan, Write};
use crate::{Error, Kind, Result};
use dir::Directory;
pub use oom::OomWatch;
pub use stats::Stats;

/// A cgroup: one directory on v2, one in each hierarchy on v1 (and hybrid).
#[derive(Debug)]
pub struct Cgroup {
    /// What the caller has no right to is no error.
    rootless: bool,
    dirs: Vec<Directory>,
    /// Files of groups that are no cgroups, which a process enters like one.
    beside: Vec<Beside>,
}

/// A file of a group that is no cgroup, and its descriptor from the first use on.
#[derive(Debug)]
struct Beside {
    path: PathBuf,
    door: OnceCell<OwnedFd>,
}

impl Beside {
    fn door(&self) -> Result<BorrowedFd<'_>> {
        let open = || nix::fcntl::open(&self.path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        dir::open_once(&self.door, open)
            .map_err(|errno| Error::sys(format!("linux.intelRdt: open {:?}", self.path), errno))
    }
}

/// How long freezing and removing may take before it is an error.
const PATIENCE: Duration = Duration::from_secs(2);

impl Cgroup {
    /// Makes the directories. A cgroup that exists and has processes, or is frozen, is refused. On an error nothing that it made stays.
    pub fn create(plan: &CgroupPlan) -> Result<Cgroup> {
        let mut out = Cgroup { rootless: plan.rootless, dirs: Vec::new(), beside: Vec::new() };
        out.make(plan, |_| true)?;
        Ok(out)
    }

    /// Makes what a process is born into where that is one of several directories: [`Cgroup::complete`] makes the rest.
    pub fn begin(plan: &CgroupPlan) -> Result<Cgroup> {
        let mut out = Cgroup { rootless: plan.rootless, dirs: Vec::new(), beside: Vec::new() };
        out.make(plan, crate::plan::cgroup::Dir::is_v2)?;
        Ok(out)
    }

    /// Makes the directories that [`Cgroup::begin`] has left out.
    pub fn complete(&mut self, plan: &CgroupPlan) -> Result<()> {
        self.make(plan, |dir| !dir.is_v2())
    }

    fn make(&mut self, plan: &CgroupPlan, which: impl Fn(&crate::plan::cgroup::Dir) -> bool) -> Result<()> {
        let mut undo: Vec<PathBuf> = Vec::new();
        let pure_v2 = plan.dirs.iter().all(crate::plan::cgroup::Dir::is_v2);
        // A unit of systemd is new, and has a process that keeps it until the init is there.
        let shared = plan.scope.is_some();
        for dir in plan.dirs.iter().filter(|dir| which(dir)) {
            let made = Directory::create(dir, pure_v2, shared, &mut undo).and_then(|directory| {
                match plan.owner.map_or(Ok(()), |owner| directory.delegate(owner)) {
                    Err(err) if !(plan.rootless && refused(err.errno())) => Err(err),
                    _ => Ok(directory),
                }
            });
            let err = match made {
                Ok(directory) => {
                    self.dirs.push(directory);
                    continue;
                }
                Err(err) if plan.rootless && refused(err.errno()) => {
                    let limited = plan.writes.iter().any(|write| dir.controllers.contains(&write.controller));
                    match (plan.named, limited) {
                        (true, _) => err.context("unable to apply cgroup configuration"),
                        (false, true) => err.context(
                            "rootless needs no limits + no cgrouppath when no permission is granted for cgroups",
                        ),
                        (false, false) => continue,
                    }
                }
                Err(err) => err,
            };
            for path in undo.iter().rev() {
                let _ = std::fs::remove_dir(path);
            }
            return Err(err);
        }
        Ok(())
    }

    /// An existing one, by what [`Cgroup::paths`] said (state.json `cgroup_paths`).
    pub fn open(paths: &BTreeMap<String, PathBuf>) -> Result<Cgroup> {
        let mut dirs: Vec<Directory> = Vec::new();
        for (controller, path) in paths {
            match dirs.iter_mut().find(|dir| dir.path() == path) {
                Some(dir) => dir.controllers = format!("{},{controller}", dir.controllers),
                None => dirs.push(Directory::open(path, controller.clone())),
            }
        }
        Ok(Cgroup { rootless: false, dirs, beside: Vec::new() })
    }

    /// Cgroups below this one that exist already: each of `paths` is `controller[,controller]:path`, or a single
    /// `path` for all. Errors name what is wrong with one of them; nothing above this cgroup can be named.
    pub fn below(&self, paths: &[String]) -> Result<Cgroup> {
        let bad = |cause: String| Error::invalid("--cgroup", cause);
        let mut wanted: BTreeMap<&str, &str> = BTreeMap::new();
        for arg in paths {
            let (controllers, path) = match arg.split_once(':') {
                Some(split) => split,
                None if paths.len() == 1 => ("", arg.as_str()),
                None => return Err(bad(format!("{arg}: the controller: before the path is missing"))),
            };
            if arg.contains(':') && controllers.split(',').any(str::is_empty) {
                return Err(bad(format!("{arg}: the controller: before the path is empty")));
            }
            for controller in controllers.split(',') {
                if wanted.insert(controller, path).is_some() {
                    return Err(bad(format!("controller {controller} is named twice")));
                }
            }
        }
        let mut out = self.paths();
        if let Some(unknown) = wanted.keys().find(|name| !name.is_empty() && !out.contains_key(**name)) {
            return Err(bad(format!("unknown controller {unknown}")));
        }
        for (controller, dir) in &mut out {
            let Some(path) = wanted.get(controller.as_str()).or_else(|| wanted.get("")) else { continue };
            let path = std::path::Path::new(path.trim_start_matches('/'));
            if path.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
                return Err(bad(format!("bad sub cgroup path: {} is not a sub cgroup path", path.display())));
            }
            dir.push(path);
        }
        Ok(Cgroup::open(&out)?.with(self.beside.iter().map(|beside| beside.path.clone()).collect()))
    }

    /// The same, with files of groups that are no cgroups ([`crate::rdt`]), which a process enters like one.
    pub fn with(mut self, beside: Vec<PathBuf>) -> Cgroup {
        self.beside = beside.into_iter().map(|path| Beside { path, door: OnceCell::new() }).collect();
        self
    }

    /// Controller to absolute path of the directory; the key is "" on v2.
    pub fn paths(&self) -> BTreeMap<String, PathBuf> {
        let of = |dir: &Directory| {
            let path = dir.path().to_path_buf();
            dir.names().map(|name| (name.to_string(), path.clone())).collect::<Vec<_>>()
        };
        self.dirs.iter().flat_map(of).collect()
    }

    /// True when the caller has no right to any hierarchy.
    pub fn is_nothing(&self) -> bool {
        self.dirs.is_empty()
    }

    /// True on a host with v2 alone.
    pub fn is_v2(&self) -> bool {
        self.dirs.len() == 1 && self.dirs[0].is_v2()
    }

    /// The v2 directory to clone a child into (CLONE_INTO_CGROUP); on hybrid hosts it is one of several.
    pub fn clone_fd(&self) -> Option<BorrowedFd<'_>> {
        self.controller("").and_then(Directory::fd)
    }

    /// Files by which a process enters: it writes `0` to each. A single thread that moves itself in v1 takes no lock
    /// that the whole machine waits for, and no RCU grace period, unlike a process that is moved by another
    /// (kernel/cgroup/cgroup.c, cgroup_procs_write_start). `born`: the process is in the v2 directory already.
    pub fn doors(&self, born: bool) -> Result<Vec<BorrowedFd<'_>>> {
        self.doors_but(None, born)
    }

    /// The same, where the directories of `part`, a [`Cgroup::part`], stand for this one's.
    pub fn doors_but<'a>(&'a self, part: Option<&'a Cgroup>, born: bool) -> Result<Vec<BorrowedFd<'a>>> {
        let mut out = Vec::new();
        for dir in self.dirs.iter().filter(|dir| !(born && dir.is_v2())) {
            let instead = part.into_iter().flat_map(|part| &part.dirs).find(|one| one.controllers == dir.controllers);
            let dir = instead.unwrap_or(dir);
            match dir.door() {
                Err(errno) if self.rootless && refused(Some(errno)) => {}
                Err(errno) => {
                    let what = format!(
                        "unable to apply cgroup configuration: adding pid to {}/cgroup.procs",
                        dir.path().display()
                    );
                    return Err(Error::sys(what, errno));
                }
                Ok(fd) => out.push(fd),
            }
        }
        for beside in &self.beside {
            out.push(beside.door()?);
        }
        Ok(out)
    }

    /// Moves a process into every hierarchy.
    pub fn attach(&self, pid: i32) -> Result<()> {
        for dir in &self.dirs {
            let moved = dir.write("cgroup.procs", &pid.to_string());
            if self.rootless && refused(moved.err()) {
                continue;
            }
            moved.map_err(|errno| {
                Error::sys(format!("unable to apply cgroup configuration: adding pid {pid} to {:?}", dir.path()), errno)
            })?;
        }
        for Beside { path, .. } in &self.beside {
            std::fs::write(path, pid.to_string())
                .map_err(|e| Error::io(format!("linux.intelRdt: write {pid} to {path:?}"), &e))?;
        }
        Ok(())
    }

    fn controller(&self, name: &str) -> Option<&Directory> {
        self.dirs.iter().find(|dir| dir.names().any(|controller| controller == name))
    }

    /// Refuses a limit that is not above what is used now, if the plan asks for it.
    pub fn check_memory(&self, plan: &CgroupPlan) -> Result<()> {
        if plan.check_memory.is_none() && plan.check_swap.is_none() {
            return Ok(());
        }
        let used = |file: &str| self.controller("").and_then(|dir| dir.number(file)).unwrap_or(0);
        let memory = used("memory.current");
        for (what, limit, usage) in [
            ("memory", plan.check_memory, memory),
            ("memory+swap", plan.check_swap, memory.saturating_add(used("memory.swap.current"))),
        ] {
            if let Some(limit) = limit.and_then(|limit| u64::try_from(limit).ok())
                && usage >= limit
            {
                let text = format!("rejecting {what} limit {limit} <= usage {usage}");
                return Err(Error::invalid("linux.resources.memory", text));
            }
        }
        Ok(())
    }

    /// Sets the device policy: before the first process enters, which would meet a policy that is half written.
    pub fn set_devices(&self, plan: &CgroupPlan) -> Result<()> {
        plan.devices.as_ref().map_or(Ok(()), |rules| self.apply_devices(rules))
    }

    /// Writes the limits.
    pub fn apply(&self, plan: &CgroupPlan) -> Result<()> {
        self.check_memory(plan)?;
        let mut at = 0;
        while let Some(write) = plan.writes.get(at) {
            match (self.write(write), plan.writes.get(at + 1)) {
                (Err(err), Some(next)) if write.swaps_with_next && swappable(&err) => {
                    self.write(next)?;
                    self.write(write)?;
                    at += 1;
                }
                (other, _) => other?,
            }
            at += 1;
        }
        Ok(())
    }

    fn write(&self, write: &Write) -> Result<()> {
        let Some(dir) = self.controller(&write.controller) else {
            if write.optional {
                return Ok(());
            }
            let text =
                format!("cannot set limit: the container could not join or create a {} cgroup", write.controller);
            return Err(Error::invalid(&write.field, text).with_kind(Kind::Unsupported));
        };
        let mut written = dir.write(&write.file, &write.value);
        if let Some((file, value)) = &write.other {
            written = match (written, dir.write(file, value)) {
                (Err(Errno::ENOENT), other) => other,
                (first, Err(Errno::ENOENT)) => first,
                (first, other) => first.and(other),
            };
        }
        match (written, &write.other) {
            (Err(Errno::ENOENT), Some((other, _))) if !dir.lacks_controller(&write.file) => {
                let text = format!("cannot set limit: {:?} has neither {} nor {other}", dir.path(), write.file);
                return Err(Error::invalid(&write.field, text).with_kind(Kind::Unsupported));
            }
            _ => {}
        }
        match written {
            Ok(()) => Ok(()),
            Err(Errno::ENOENT) if write.optional => Ok(()),
            Err(Errno::ENOENT) if dir.lacks_controller(&write.file) => {
                let controller = write.file.split('.').next().unwrap_or_default();
                let text = format!("cannot set limit: {:?} has no {controller} controller", dir.path());
                Err(Error::invalid(&write.field, text).with_kind(Kind::Unsupported))
            }
            Err(Errno::EBUSY) if write.file == "memory.limit_in_bytes" => {
                let number = |file: &str| dir.number(file).unwrap_or(0);
                let (now, peak) = (number("memory.usage_in_bytes"), number("memory.max_usage_in_bytes"));
                let value = &write.value;
                let text = format!("unable to set memory limit to {value} (current usage: {now}, peak usage: {peak})");
                let err = Error::sys(format!("{}: {text}", write.field), Errno::EBUSY);
                Err(err.of_field(&write.field).in_step("cgroup"))
            }
            Err(errno) => {
                let path = dir.path().join(&write.file);
                let err = Error::sys(format!("{}: write {:?} to {path:?}", write.field, write.value), errno);
                let err = err.of_field(&write.field).of_object(path.display().to_string()).in_step("cgroup");
                Err(hint(errno, &write.file).into_iter().fold(err, Error::with_hint))
            }
        }
    }

    fn apply_devices(&self, rules: &[crate::plan::cgroup::Rule]) -> Result<()> {
        if let Some(dir) = self.controller("devices") {
            let mut opened: Option<(&str, OwnedFd)> = None;
            for (file, line) in devices::lines(rules) {
                let fail = |errno| {
                    Error::sys(format!("linux.resources.devices: write {line:?} to {:?}", dir.path().join(file)), errno)
                };
                let fd = match opened.take_if(|(name, _)| *name == file) {
                    Some((_, fd)) => fd,
                    None => dir.open_file(file, OFlag::O_WRONLY).map_err(fail)?,
                };
                dir::write(&fd, &line).map_err(fail)?;
                opened = Some((file, fd));
            }
        } else if let Some(fd) = self.clone_fd().filter(|_| self.is_v2()) {
            let cgroup = dir::reopen(fd).map_err(|errno| Error::sys("open the cgroup", errno))?;
            let attached = devices::attach(cgroup.as_fd(), rules);
            if self.rootless && refused(attached.err()) {
                return Ok(());
            }
            attached.map_err(|errno| Error::sys("linux.resources.devices: attach the device program", errno))?;
        }
        Ok(())
    }

    /// Freezes every process; returns when they are.
    pub fn freeze(&self) -> Result<()> {
        match self.set_frozen(true) {
            Ok(()) => Ok(()),
            Err(err) => {
                let _ = self.set_frozen(false);
                Err(err)
            }
        }
    }

    /// Thaws every process.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let what = if frozen { "freeze" } else { "thaw" };
        let deadline = Instant::now() + PATIENCE;
        let fail = |errno| Error::sys(format!("{what} the cgroup"), errno);
        let (dir, file, value) = match self.freezer() {
            Some((dir, true)) => (dir, "cgroup.freeze", if frozen { "1" } else { "0" }),
            Some((dir, false)) => (dir, "freezer.state", if frozen { "FROZEN" } else { "THAWED" }),
            None => return Err(fail(Errno::EOPNOTSUPP)),
        };
        loop {
            dir.write(file, value).map_err(fail)?;
            if self.frozen()? == frozen {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::new(Kind::Timeout, format!("{what} the cgroup: not done after {PATIENCE:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The directory that freezes, and whether it is of v2.
    fn freezer(&self) -> Option<(&Directory, bool)> {
        self.controller("freezer").map(|dir| (dir, false)).or_else(|| self.controller("").map(|dir| (dir, true)))
    }

    /// True when frozen; false also when the cgroup is gone.
    pub fn frozen(&self) -> Result<bool> {
        Ok(match self.freezer() {
            Some((dir, false)) => dir.read("freezer.state").is_some_and(|state| state.trim() != "THAWED"),
            Some((dir, true)) => dir.read("cgroup.events").is_some_and(|events| events.contains("frozen 1")),
            None => false,
        })
    }

    /// The directory that freezes it.
    pub fn freezer_path(&self) -> Option<&Path> {
        self.freezer().map(|(dir, _)| dir.path())
    }

    /// Host pids of all processes here and below; empty when the cgroup is gone.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let Some(dir) = self.any() else { return Ok(Vec::new()) };
        let mut out = Vec::new();
        dir.pids(&mut out);
        out.sort_unstable();
        out.dedup();
        Ok(out)
    }

    /// The directory to list processes by: a hierarchy that containers rarely make groups in by themselves.
    fn any(&self) -> Option<&Directory> {
        let first = ["freezer", "pids", "devices", ""].iter().find_map(|name| self.controller(name));
        first.or_else(|| self.dirs.first())
    }

    /// Signals every process here and below; SIGKILL uses cgroup.kill where the kernel has it, and works on a frozen cgroup.
    pub fn kill(&self, signal: i32) -> Result<()> {
        if signal != libc::SIGKILL {
            return self.signal_all(signal);
        }
        if let Some(dir) = self.controller("")
            && self.is_v2()
        {
            match dir.write("cgroup.kill", "1") {
                Ok(()) | Err(Errno::ENODEV) => return Ok(()),
                Err(Errno::ENOENT) if !dir.path().exists() => return Ok(()),
                Err(_) => {}
            }
        }
        if self.pids()?.is_empty() {
            return Ok(());
        }
        // Killed again and again until nobody new turns up: only who forks faster has to be frozen for it.
        let mut known: Vec<i32> = Vec::new();
        for _ in 0..8 {
            let now = self.pids()?;
            if now.iter().all(|pid| known.contains(pid)) {
                return self.thaw_killed();
            }
            self.signal_all(signal)?;
            known = now;
        }
        let _ = self.freeze();
        let result = self.signal_all(signal);
        self.thaw_killed()?;
        result
    }

    /// A frozen process of v1 dies when it is thawed.
    fn thaw_killed(&self) -> Result<()> {
        match self.freezer() {
            Some((dir, false)) if self.frozen()? => {
                dir.write("freezer.state", "THAWED").map_err(|errno| Error::sys("thaw the cgroup", errno))
            }
            _ => Ok(()),
        }
    }

    /// A new cgroup below this one, for a process tree that is to be killed as a whole. It has no limits of its own; on
    /// v1 it is one directory, in the hierarchy that [`Cgroup::pids`] looks at.
    pub fn part(&self, name: &str) -> Result<Cgroup> {
        let Some(dir) = self.any() else { return Err(Error::new(Kind::Unsupported, "no cgroup")) };
        let path = dir.path().join(name);
        std::fs::create_dir(&path).map_err(|e| Error::io(format!("make cgroup {path:?}"), &e))?;
        let directory = Directory::open(&path, dir.controllers.clone());
        Ok(Cgroup { rootless: self.rootless, dirs: vec![directory], beside: Vec::new() })
    }

    /// Removes it if there is neither a process nor a cgroup in it; takes no time. The directory that tells whether there
    /// are processes goes first: as long as it is there, [`Cgroup::kill`] finds them.
    pub fn remove_if_bare(&self) -> bool {
        self.any().is_none_or(|dir| dir.remove_bare().is_ok()) && self.dirs.iter().all(|dir| dir.remove_bare().is_ok())
    }

    /// Removes it if it has no processes; one that has them stays.
    pub fn remove_if_empty(&self) -> bool {
        self.dirs.iter().all(|dir| dir.remove().is_ok())
    }

    fn signal_all(&self, signal: i32) -> Result<()> {
        for pid in self.pids()? {
            let sent =
                crate::sys::clone::pidfd_open(pid).and_then(|fd| crate::sys::clone::pidfd_kill(fd.as_fd(), signal));
            match sent {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(Error::sys(format!("send signal {signal} to process {pid}"), errno)),
            }
        }
        Ok(())
    }

    /// Resource usage now; missing files count as zero. `Kind::NotFound` when the cgroup is gone.
    pub fn stats(&self) -> Result<Stats> {
        if !self.any().is_some_and(|dir| dir.path().exists()) {
            return Err(Error::new(Kind::NotFound, "cgroup does not exist"));
        }
        Ok(stats::read(|controller| self.controller(controller), self.is_v2()))
    }

    /// Times the kernel's OOM killer has killed in it; None when it is gone, or has no such controller.
    pub fn oom_kills(&self) -> Option<u64> {
        let (controller, file) = if self.is_v2() { ("", "memory.events") } else { ("memory", "memory.oom_control") };
        self.controller(controller).and_then(|dir| dir.read(file)).map(|text| stats::value(&text, "oom_kill"))
    }

    /// The same of the cgroups above, nearest first, which count what is killed below them (cgroup v2).
    pub fn oom_kills_above(&self) -> Vec<(PathBuf, u64)> {
        let Some(dir) = self.controller("").filter(|_| self.is_v2()) else { return Vec::new() };
        let counted = |path: &std::path::Path| oom_kills_at(path).map(|kills| (path.to_path_buf(), kills));
        dir.path().ancestors().skip(1).map_while(counted).collect()
    }

    /// Removes it and everything below; Ok when it is gone already.
    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for dir in &self.dirs {
            let mut pause = Duration::from_micros(200);
            loop {
                match dir.remove() {
                    Ok(()) => break,
                    // Processes that were killed a moment ago are still on their way out.
                    Err(Errno::EBUSY) if Instant::now() < deadline => std::thread::sleep(pause),
                    Err(errno) => return Err(Error::sys(format!("remove cgroup {:?}", dir.path()), errno)),
                }
                pause = (pause * 2).min(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// A file of a controller's directory, to be kept open: for watching.
    pub fn file(&self, controller: &str, name: &str) -> Option<PathBuf> {
        self.controller(controller).map(|dir| dir.path().join(name))
    }
}

/// Times the kernel's OOM killer has killed in a v2 cgroup or below it; None when it is gone.
pub fn oom_kills_at(path: &std::path::Path) -> Option<u64> {
    std::fs::read_to_string(path.join("memory.events")).ok().map(|text| stats::value(&text, "oom_kill"))
}

/// The v2 cgroup that a process is in now.
pub fn of_process(pid: i32) -> nix::Result<OwnedFd> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|_| Errno::ESRCH)?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).ok_or(Errno::ENOENT)?;
    let host = crate::host::Cgroups::read().map_err(|_| Errno::ENOENT)?;
    let dir = host.v2.ok_or(Errno::ENOENT)?.mountpoint.join(path.trim_start_matches('/'));
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(&dir, flags, Mode::empty())
}

/// Why the kernel may have refused a limit.
fn hint(errno: Errno, file: &str) -> Option<&'static str> {
    Some(match (errno, file) {
        (Errno::ENOENT, _) => "this kernel has no such file, or the cgroup above does not hand the controller down",
        (Errno::EINVAL, "cpu.cfs_quota_us" | "cpu.cfs_period_us" | "cpu.max") => {
            "a quota is at least 1000 us, a period from 1000 to 1000000 us, and not more than the cgroup above has"
        }
        (Errno::EINVAL, "cpu.rt_runtime_us") => "the cgroup above has no real-time budget left for it",
        (Errno::EINVAL | Errno::EACCES | Errno::ENOSPC | Errno::ERANGE, "cpuset.cpus" | "cpuset.mems") => {
            "the machine and the cgroup above have no such processors or memory nodes to give"
        }
        (Errno::ENODEV | Errno::ENXIO, _) => "this machine has no such device",
        (Errno::EBUSY, _) => "it is in use",
        _ => return None,
    })
}

fn refused(errno: Option<Errno>) -> bool {
    matches!(errno, Some(Errno::EACCES | Errno::EPERM | Errno::EROFS))
}

fn swappable(err: &Error) -> bool {
    matches!(err.errno(), Some(Errno::EINVAL | Errno::EBUSY))
}

#[cfg(test)]
mod kernel_tests;
