//! The parent's side of an init's birth.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use oci_spec::runtime::{Hook, LinuxNamespaceType as Kind};

use super::chore::Chore;
use super::opening::{self, Failed, Opening};
use super::seccomp::Filter;
use super::{
    Aim, Channel, Message, Pending, Process, adopted, describe, idmap, listener, net_devices, set_oom_score, write_proc,
};
use crate::cgroup::Cgroup;
use crate::cgroup::systemd::Unit;
use crate::child::init::{self, Init};
use crate::child::report::Record;
use crate::child::rootfs::open_source;
use crate::hooks;
use crate::plan::Plan;
use crate::plan::rootfs::{MountKind, MountPlan};
use crate::plan::seccomp::Listener;
use crate::sys::clone::{self, Side};
use crate::sys::mount::{MountAttr, setattr};
use crate::sys::process as sys;
use crate::trace::Trace;
use crate::{Error, Result, limits};

/// What a birth needs beside the plan.
#[derive(Debug)]
pub struct Begin<'a> {
    /// What to do.
    pub plan: Plan,
    /// What [`Sources`] has opened.
    pub opened: Option<Vec<(usize, OwnedFd)>>,
    /// The compiled seccomp filter.
    pub filter: Option<&'a Filter>,
    /// The container's cgroup, without its limits yet; only begun where that is enough (see [`makes_own_namespaces`]).
    pub cgroup: &'a mut Cgroup,
    /// Standard streams; None keeps the caller's.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Descriptors 3..3+n stay open.
    pub preserve_fds: u32,
    /// FIFOs to start by: the one read from, the one that records go to.
    pub gate: Option<(OwnedFd, OwnedFd)>,
    /// The state for hooks, without pid and status.
    pub state: serde_json::Map<String, serde_json::Value>,
    /// Where the steps are marked.
    pub trace: Option<Trace>,
}

/// An init between its clone and its gate. Dropped before that, it is killed.
#[derive(Debug)]
pub struct Birth {
    plan: Plan,
    process: Option<Process>,
    channel: Option<Channel>,
    console: Option<OwnedFd>,
    waiting: VecDeque<(&'static str, usize, Hook)>,
    running: Option<Chore>,
    state: serde_json::Map<String, serde_json::Value>,
    listener: Option<Listener>,
    /// Its maker has nobody else to look after, and may wait for its end.
    by_fifo: bool,
    /// The network namespace that the container joins.
    joined_net: Option<OwnedFd>,
    /// The user namespace that it joins, where mounts inside its root are to have that one's ids.
    joined_user: Option<OwnedFd>,
}

/// An init at its gate.
#[derive(Debug)]
pub struct Born {
    /// The process.
    pub process: Process,
    /// The socket that starts it, unless FIFOs do.
    pub channel: Channel,
    /// The pty master, if it has a terminal.
    pub console: Option<OwnedFd>,
    /// The plan.
    pub plan: Plan,
}

/// CLONE_NEW* that the init makes itself while its parent makes the directories of cgroup v1. A network namespace takes the
/// kernel as long as all of these together. Not where the parent has to do something with these namespaces first.
pub fn makes_own_namespaces(plan: &Plan) -> Option<u64> {
    let ns = &plan.namespaces;
    let alone = !ns.has(Kind::User) && plan.net_devices.is_empty() && !plan.rootless && plan.cgroup.scope.is_none();
    // A resctrl group is entered through doors that are open.
    let alone = alone && plan.rdt.is_none();
    let v1 = plan.cgroup.dirs.iter().any(|dir| !dir.is_v2());
    let own = [Kind::Mount, Kind::Uts, Kind::Ipc, Kind::Network];
    (alone && v1 && ns.makes(Kind::Network))
        .then(|| own.into_iter().filter(|kind| ns.makes(*kind)).fold(0, |flags, kind| flags | kind as u64))
}

/// Clones the init and lets it begin.
pub fn begin(begin: Begin<'_>) -> Result<Birth> {
    let Begin { plan, opened, filter, cgroup, stdio, preserve_fds, gate, state, trace } = begin;
    let ns = &plan.namespaces;
    let of_user = ns.has(Kind::User) && !nix::unistd::geteuid().is_root();
    let mut aim = Aim::default();
    let mut joins = Vec::new();
    for (at, join) in ns.joins.iter().enumerate() {
        let fd = open_namespace(&join.path)
            .map_err(|errno| Error::sys(format!("{}: open {:?}", join.field, join.path), errno))?;
        // A user has the right to it in the user namespace that it belongs to.
        if join.kind == Kind::Pid && !(of_user && ns.joined(Kind::User).is_some()) {
            aim.at_pid_namespace(fd.as_fd())
                .map_err(|errno| Error::sys(format!("{}: join namespace {:?}", join.field, join.path), errno))?;
        } else {
            joins.push((join.kind as u64, at, fd));
        }
    }
    let mut flags = ns.new & !(Kind::Cgroup as u64);
    let late_offsets = ns.time_offsets.as_deref().filter(|_| of_user);
    if ns.time_offsets.is_some() {
        flags &= !clone::CLONE_NEWTIME;
    }
    if let Some(offsets) = ns.time_offsets.as_ref().filter(|_| !of_user) {
        aim.at_new_time_namespace(offsets).map_err(|errno| Error::sys("linux.timeOffsets: set", errno))?;
    }
    let user = ns.makes(Kind::User);
    let late_user = (user && (!joins.is_empty() || late_offsets.is_some())) || ns.joined(Kind::User).is_some();
    let second_clone = late_user.then_some(flags & !(Kind::User as u64));
    let unshare = makes_own_namespaces(&plan);
    let first_flags = if late_user { 0 } else { flags & !unshare.unwrap_or(0) };
    let (channel, child_end) = Channel::pair()?;
    let joined_user = joins.iter().find(|(kind, ..)| *kind == Kind::User as u64).map(|(.., fd)| fd);
    let opened = match opened {
        Some(opened) => opened,
        None => open_here(&plan)?,
    };
    let sources = sources(&plan, opened, joined_user)?;
    let late_maps = plan
        .rootfs
        .mounts
        .iter()
        .any(|mount| mount.idmap.is_some() && matches!(&mount.kind, MountKind::Bind { within: Some(_), .. }));
    let joined_user = joined_user.filter(|_| late_maps).map(OwnedFd::try_clone).transpose();
    let joined_user = joined_user.map_err(|e| Error::io("hold the user namespace", &e))?;
    let joined_net = joins.iter().find(|(kind, ..)| *kind == Kind::Network as u64).map(|(.., fd)| fd.try_clone());
    let joined_net = joined_net.transpose().map_err(|e| Error::io("hold the network namespace", &e))?;
    let mut init = Init {
        filter: filter.map(|f| (f.program(), f.flags)),
        joins,
        second_clone,
        sources,
        unshare,
        doors: if unshare.is_some() { Vec::new() } else { cgroup.doors(true)? },
        // The kernel takes a real-time policy only when the cgroup has its budget.
        wait_for_parent: user || !plan.net_devices.is_empty() || plan.process.scheduler.is_some(),
        cgroups: if unshare.is_some() { plan.cgroup.paths() } else { cgroup.paths() },
        stdio,
        preserve_fds,
        report: Some(child_end),
        gate,
        state: state.clone(),
        trace,
        of_user,
        time_offsets: late_offsets,
        pause: plan.process.pause.as_ref().map(|_| super::pod::layout()).transpose()?,
        plan: &plan,
    };
    // The files in /proc of an undumpable process belong to root: an ordinary user could not write the id maps. Its
    // child becomes undumpable when they are written.
    if nix::unistd::geteuid().is_root() {
        sys::set_dumpable(false).map_err(|errno| Error::sys("make the runtime undumpable", errno))?;
    }
    let into = cgroup.clone_fd();
    let (mut attach, mut born) = (None, true);
    let side = match clone::clone3(first_flags, into) {
        // The cgroup cannot take a process by birth (a threaded one, an older kernel): it walks in.
        Err(Errno::EBUSY | Errno::EOPNOTSUPP | Errno::E2BIG) if into.is_some() => {
            born = false;
            if unshare.is_none() {
                init.doors = cgroup.doors(false)?;
            }
            clone::clone3(first_flags, None)
        }
        Err(Errno::EACCES) if into.is_some() && plan.rootless => {
            // A user may move nothing from a session into a unit of the user's systemd, which can.
            attach = plan.cgroup.scope.as_ref().map(|scope| Unit { name: scope.unit.clone(), user: scope.user });
            clone::clone3(first_flags, None)
        }
        other => other,
    };
    let side = side.map_err(|errno| Error::sys("clone the init process", errno))?;
    let process = match side {
        Side::Child => init::run(init),
        Side::Parent(pid, pidfd) => Process { pid, pidfd },
    };
    log::debug!("nsexec container setup: init {} cloned, with namespaces {first_flags:#x}", process.pid);
    if let Some(filter) = filter {
        log::debug!("seccomp filter flags: {}", filter.flags & !(libc::SECCOMP_FILTER_FLAG_TSYNC as u32));
    }
    let (wait_for_parent, by_fifo) = (init.wait_for_parent, init.gate.is_some());
    drop(init);
    let birth = Birth {
        plan,
        process: Some(process),
        channel: Some(channel),
        console: None,
        waiting: VecDeque::new(),
        running: None,
        state,
        listener: filter.and_then(|f| f.listener.clone()),
        by_fifo,
        joined_net,
        joined_user,
    };
    aim.done().map_err(|errno| Error::sys("return to the runtime's namespaces", errno))?;
    let pid = birth.pid();
    if let Some(unit) = attach {
        unit.attach(pid)?;
    }
    if let Some(score) = birth.plan.process.oom_score_adj.filter(|_| user) {
        set_oom_score(pid, score, birth.plan.rootless)?;
    }
    if !late_user && birth.plan.namespaces.makes(Kind::User) {
        birth.write_maps()?;
    }
    if !late_user {
        birth.move_net_devices()?;
    }
    if unshare.is_some() {
        cgroup.complete(&birth.plan.cgroup)?;
        cgroup.set_devices(&birth.plan.cgroup)?;
        birth.channel().go_with(&cgroup.doors(born)?)?;
    }
    let limits_first = birth.plan.process.scheduler.is_some();
    if limits_first {
        cgroup.apply(&birth.plan.cgroup)?;
    }
    if wait_for_parent {
        birth.channel().go()?;
    }
    if !limits_first {
        // While the child mounts; it does nothing of the container's before the parent has seen its reports.
        cgroup.apply(&birth.plan.cgroup)?;
    }
    log::debug!("child process in init(): pid {}, its cgroup and limits are set", birth.pid());
    Ok(birth)
}

fn open_namespace(path: &CStr) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
}

/// In a user namespace the child may not reach what root reaches, and may not map ids: the sources of these mounts are opened
/// for it. By place in the plan.
fn sources_of_parent(plan: &Plan) -> Vec<(usize, &CStr, bool)> {
    let all = plan.namespaces.has(Kind::User) && nix::unistd::geteuid().is_root();
    let mut out = Vec::new();
    for (at, mount) in plan.rootfs.mounts.iter().enumerate() {
        if let MountKind::Bind { source, within: None, recursive } = &mount.kind
            && (all || mount.idmap.is_some())
        {
            out.push((at, source.as_c_str(), *recursive));
        }
    }
    out
}

/// A detached copy of what is there.
fn open_detached(source: &CStr, recursive: bool, slave: bool) -> nix::Result<OwnedFd> {
    let fd = open_source(source, recursive)?;
    if slave {
        setattr(fd.as_fd(), true, &MountAttr { propagation: libc::MS_SLAVE, ..MountAttr::default() })?;
    }
    Ok(fd)
}

/// Sources that a child of this process opens, as one of them may lie on a server that hangs.
#[derive(Debug)]
pub struct Sources {
    opening: Opening,
    wanted: Vec<(usize, CString)>,
}

impl Sources {
    /// Has them opened; None where nothing is to be opened, or all is at hand.
    pub fn open(plan: &Plan) -> Result<Option<Sources>> {
        let wanted = sources_of_parent(plan);
        if wanted.iter().all(|(_, source, _)| crate::sys::path::is_at_hand(source)) {
            return Ok(None);
        }
        let slave = plan.rootfs.host_propagation.0 == libc::MS_SLAVE;
        let names = wanted.iter().map(|(at, source, _)| format!("mounts[{at}].source: open {source:?}")).collect();
        let open = |(_, source, recursive): &(usize, &CStr, bool)| open_detached(source, *recursive, slave);
        let opening = opening::begin(&wanted, names, limits::OPEN, open)?;
        Ok(Some(Sources { opening, wanted: wanted.iter().map(|one| (one.0, one.1.to_owned())).collect() }))
    }

    /// Readable when `advance` can do something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.opening.fd()
    }

    /// When to call `advance` at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.opening.deadline()
    }

    /// The sources by place in the plan, when they are all open.
    pub fn advance(&mut self) -> Result<Option<Vec<(usize, OwnedFd)>>> {
        let opened = self.opening.poll().map_err(|failed| match failed {
            Failed::Errno(number, errno) => match self.wanted.get(number) {
                Some((at, source)) => describe::source(*at, source, errno),
                None => Error::sys("open sources", errno),
            },
            Failed::Error(err) => err,
        })?;
        Ok(opened.map(|fds| self.wanted.iter().map(|one| one.0).zip(fds).collect()))
    }
}

fn open_here(plan: &Plan) -> Result<Vec<(usize, OwnedFd)>> {
    let slave = plan.rootfs.host_propagation.0 == libc::MS_SLAVE;
    let open = |(at, source, recursive): (usize, &CStr, bool)| match open_detached(source, recursive, slave) {
        Ok(fd) => Ok((at, fd)),
        Err(errno) => Err(describe::source(at, source, errno)),
    };
    sources_of_parent(plan).into_iter().map(open).collect()
}

/// What the child gets of them, with their ids mapped.
fn sources(plan: &Plan, opened: Vec<(usize, OwnedFd)>, joined_user: Option<&OwnedFd>) -> Result<Vec<Option<OwnedFd>>> {
    if opened.is_empty() {
        return Ok(Vec::new());
    }
    let mut namespaces = Mappers::new();
    let mut out: Vec<Option<OwnedFd>> = plan.rootfs.mounts.iter().map(|_| None).collect();
    for (at, fd) in opened {
        map_ids(at, &plan.rootfs.mounts[at], &fd, joined_user, &mut namespaces)?;
        out[at] = Some(fd);
    }
    Ok(out)
}

/// User namespaces that have been made for mappings.
type Mappers<'a> = Vec<(&'a (String, String), OwnedFd)>;

/// Gives a detached mount its id maps, if it is to have some.
fn map_ids<'a>(
    at: usize,
    mount: &'a MountPlan,
    fd: &OwnedFd,
    joined_user: Option<&OwnedFd>,
    namespaces: &mut Mappers<'a>,
) -> Result<()> {
    let (Some(map), MountKind::Bind { source, .. }) = (&mount.idmap, &mount.kind) else { return Ok(()) };
    let namespace = match &map.maps {
        None => joined_user,
        Some(maps) => {
            if !namespaces.iter().any(|(known, _)| *known == maps) {
                let made = idmap::user_namespace(&maps.0, &maps.1);
                namespaces.push((maps, made.map_err(|err| err.context(format!("mounts[{at}]")))?));
            }
            namespaces.iter().find(|(known, _)| *known == maps).map(|(_, fd)| fd)
        }
    };
    let applied = namespace.map_or(Err(Errno::EINVAL), |ns| idmap::apply(fd, ns, map.recursive));
    applied.map_err(|errno| {
        let field = format!("mounts[{at}]");
        let err = Error::sys(format!("{field}: idmapped mount of {source:?}"), errno).of_field(field).in_step("mounts");
        idmap::hint(errno).into_iter().fold(err, Error::with_hint)
    })
}

impl Birth {
    fn process(&self) -> &Process {
        self.process.as_ref().expect("a birth has a process until it ends")
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("a birth has a channel until it ends")
    }

    /// Its pid; that of another process later, where this one only clones the real init.
    pub(crate) fn pid(&self) -> i32 {
        self.process().pid
    }

    /// Readable when `advance` can do something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.running.as_ref().map_or_else(|| self.channel().fd(), Pending::fd)
    }

    /// When to call `advance` at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.running.as_ref().and_then(Pending::deadline)
    }

    /// Does what can be done without blocking.
    pub fn advance(&mut self) -> Result<Option<Born>> {
        loop {
            if let Some(running) = &mut self.running {
                if running.advance()?.is_none() {
                    return Ok(None);
                }
                self.running = None;
                self.next_hook()?;
                continue;
            }
            match self.channel.as_mut().expect("a birth has a channel until it ends").receive()? {
                Message::Later => return Ok(None),
                Message::Record(Record::NeedMaps, _) => {
                    self.write_maps()?;
                    self.channel().go()?;
                }
                Message::Record(Record::Born, Some(pidfd)) => self.adopt(pidfd)?,
                Message::Record(Record::Mounted, _) => {
                    let hooks = &self.plan.hooks;
                    let kinds = [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime())];
                    for (kind, list) in kinds {
                        let list = list.iter().flatten().enumerate();
                        self.waiting.extend(list.map(|(at, hook)| (kind, at, hook.clone())));
                    }
                    self.next_hook()?;
                }
                Message::Record(Record::Listener(number), _) => {
                    let Some(listener) = &self.listener else { return Err(self.lost()) };
                    let mut state = self.state.clone();
                    state.insert("pid".into(), self.pid().into());
                    state.insert("status".into(), "creating".into());
                    let pidfd = self.process().pidfd.as_fd();
                    listener::hand_over(pidfd, number, listener, self.pid(), &state)?;
                    self.channel().go()?;
                }
                Message::Record(Record::NeedIdmap(at), Some(fd)) => {
                    let at = at as usize;
                    let mount = self.plan.rootfs.mounts.get(at).ok_or_else(|| self.lost())?;
                    map_ids(at, mount, &fd, self.joined_user.as_ref(), &mut Mappers::new())?;
                    self.channel().go()?;
                }
                Message::Record(Record::Console, Some(master)) => self.console = Some(master),
                Message::Record(Record::Ready, _) => {
                    log::debug!("init: closing the pipe to signal completion");
                    return self.ready().map(Some);
                }
                Message::Record(Record::Failed(failure), _) => return Err(describe::init(&self.plan, &failure)),
                Message::Record(record, _) => {
                    return Err(Error::new(crate::Kind::System, format!("unexpected report {record:?}")));
                }
                Message::Executed | Message::Lost => return Err(self.lost()),
            }
        }
    }

    fn next_hook(&mut self) -> Result<()> {
        let Some((kind, at, hook)) = self.waiting.pop_front() else { return self.channel().go() };
        self.state.insert("pid".into(), self.pid().into());
        self.state.insert("status".into(), "creating".into());
        let state = serde_json::Value::Object(self.state.clone()).to_string();
        let patience = if self.by_fifo { limits::NONE } else { limits::HOOK };
        self.running = Some(hooks::start_apart(kind, at, &hook, state.as_bytes(), patience)?);
        Ok(())
    }

    fn write_maps(&self) -> Result<()> {
        let ns = &self.plan.namespaces;
        if !nix::unistd::geteuid().is_root() {
            return super::id_maps::write(self.pid(), &ns.uid_map, &ns.gid_map);
        }
        write_proc(self.pid(), "uid_map", &ns.uid_map).map_err(|err| err.context("linux.uidMappings"))?;
        write_proc(self.pid(), "gid_map", &ns.gid_map).map_err(|err| err.context("linux.gidMappings"))
    }

    /// The child has cloned the real init, to this same parent, and exits.
    fn adopt(&mut self, pidfd: OwnedFd) -> Result<()> {
        let real = adopted(pidfd)?.ok_or_else(|| self.lost())?;
        let first = self.process.replace(real);
        match first {
            Some(first) if self.by_fifo => drop(first.wait()?),
            Some(first) => first.abandon(),
            None => {}
        }
        self.move_net_devices()
    }

    fn move_net_devices(&self) -> Result<()> {
        if self.plan.net_devices.is_empty() {
            return Ok(());
        }
        let opened;
        let namespace = match &self.joined_net {
            Some(fd) => fd,
            None => {
                let path = format!("/proc/{}/ns/net", self.pid());
                opened = nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
                    .map_err(|errno| Error::sys("linux.netDevices: open the network namespace", errno))?;
                &opened
            }
        };
        net_devices::move_all(&self.plan.net_devices, namespace.as_fd())
    }

    fn ready(&mut self) -> Result<Born> {
        // In a user namespace it has no right to raise them.
        let by_parent = self.plan.namespaces.has(Kind::User);
        for (at, (resource, soft, hard)) in self.plan.process.rlimits.iter().enumerate().filter(|_| by_parent) {
            sys::prlimit(self.pid(), *resource, *soft, *hard).map_err(|errno| {
                Error::sys(format!("process.rlimits[{at}]: set limit {resource} to {soft}:{hard}"), errno)
            })?;
        }
        Ok(Born {
            process: self.process.take().expect("a birth has a process until it ends"),
            channel: self.channel.take().expect("a birth has a channel until it ends"),
            console: self.console.take(),
            plan: self.plan.clone(),
        })
    }

    /// Kills the init of a birth that has failed; the caller waits for its end. None when it has been reaped already.
    pub(crate) fn give_up(&mut self) -> Option<Process> {
        self.stop_hook();
        let process = self.process.take()?;
        match process.kill(libc::SIGKILL) {
            Ok(()) => Some(process),
            Err(_) => process.try_wait().ok()?.is_none().then_some(process),
        }
    }

    fn stop_hook(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop();
        }
    }

    /// The error of one that takes too long.
    pub(crate) fn late(&self) -> Error {
        super::hang::late(self.pid(), "init process: not at its gate in time")
    }

    fn lost(&self) -> Error {
        let how = match self.process().try_wait() {
            Ok(Some(exit)) if exit.status == 137 => {
                ": it was killed (possibly OOM-killed: is the memory limit too low?)".into()
            }
            Ok(Some(exit)) => format!(": it ended with status {}", exit.status),
            _ => String::new(),
        };
        Error::new(crate::Kind::System, format!("container init died during create{how}"))
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        self.stop_hook();
        if let Some(process) = self.process.take() {
            if self.by_fifo { process.discard() } else { process.abandon() }
        }
    }
}
