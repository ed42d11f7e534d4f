//! The parent's side of an exec process's birth.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::seccomp::Filter;
use super::{Aim, Channel, Message, Process, adopted, describe, listener};
use crate::cgroup::Cgroup;
use crate::cgroup::systemd::Unit;
use crate::child::exec::{self, Exec};
use crate::child::report::Record;
use crate::plan::process::Process as ProcessPlan;
use crate::plan::seccomp::Listener;
use crate::sys::clone::{self, Side};
use crate::sys::process as sys;
use crate::{Error, Kind, Result};

/// What a birth needs beside the plan.
#[derive(Debug)]
pub struct Begin<'a> {
    /// The process.
    pub plan: ProcessPlan,
    /// The container's seccomp filter.
    pub filter: Option<&'a Filter>,
    /// Where it goes.
    pub cgroup: &'a Cgroup,
    /// It was asked for by name: there and nowhere else.
    pub named: bool,
    /// A part of that to go to instead.
    pub part: Option<&'a Cgroup>,
    /// The unit of systemd that this belongs to.
    pub unit: Option<&'a Unit>,
    /// The container's init.
    pub init: OwnedFd,
    /// Its pid.
    pub init_pid: i32,
    /// CLONE_NEW* of the container's namespaces.
    pub namespaces: u64,
    /// Standard streams; None keeps the caller's.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Descriptors 3..3+n stay open.
    pub preserve_fds: u32,
    /// Name of the session keyring.
    pub keyring: Option<std::ffi::CString>,
    /// The container's state for a seccomp agent, without pid and status.
    pub state: serde_json::Map<String, serde_json::Value>,
}

/// An exec process between its clone and execve. Dropped before that, it is killed.
#[derive(Debug)]
pub struct Birth {
    plan: ProcessPlan,
    process: Option<Process>,
    channel: Channel,
    console: Option<OwnedFd>,
    listener: Option<Listener>,
    state: serde_json::Map<String, serde_json::Value>,
    init_pid: i32,
    by_second_clone: bool,
}

/// Clones the process.
pub fn begin(begin: Begin<'_>) -> Result<Birth> {
    let Begin {
        plan,
        filter,
        cgroup,
        named,
        part,
        unit,
        init,
        init_pid,
        namespaces,
        stdio,
        preserve_fds,
        keyring,
        state,
    } = begin;
    let stopped = |errno: Errno, what: &str| match errno {
        Errno::ESRCH => Error::new(Kind::FailedPrecondition, "cannot exec in a stopped container"),
        errno => Error::sys(what, errno),
    };
    let pid_namespace = libc::CLONE_NEWPID as u64;
    let in_user_namespace = namespaces & libc::CLONE_NEWUSER as u64 != 0;
    // A process with processors of its own before it enters the cgroup cannot be born there.
    let into =
        if plan.affinity.initial.is_some() { None } else { part.and_then(Cgroup::clone_fd).or(cgroup.clone_fd()) };
    let (channel, child_end) = Channel::pair()?;
    // Only root may point at a pid namespace that belongs to another user namespace.
    let of_user = in_user_namespace && !nix::unistd::geteuid().is_root();
    let by_second_clone = of_user && namespaces & pid_namespace != 0;
    let limits_by_parent = in_user_namespace && !plan.rlimits.is_empty();
    let mut child = Exec {
        filter: filter.map(|f| (f.program(), f.flags)),
        namespaces: if by_second_clone { namespaces } else { namespaces & !pid_namespace },
        second_clone: by_second_clone,
        in_user_namespace,
        stdio,
        preserve_fds,
        keyring,
        report: child_end,
        doors: cgroup.doors_but(part, into.is_some())?,
        lenient: crate::host::rootless(),
        wait_for_parent: limits_by_parent,
        of_user,
        process: &plan,
        init,
    };
    sys::set_dumpable(false).map_err(|errno| Error::sys("make the runtime undumpable", errno))?;
    let mut aim = Aim::default();
    if namespaces & pid_namespace != 0 && !by_second_clone {
        aim.at_pid_namespace(child.init.as_fd())
            .map_err(|errno| stopped(errno, "join the container's pid namespace"))?;
    }
    let mut attach = None;
    let cloned = match clone::clone3(0, into) {
        Err(errno @ (Errno::EBUSY | Errno::EOPNOTSUPP | Errno::ENOENT)) if into.is_some() && named => {
            let path = cgroup.paths().into_values().next().unwrap_or_default();
            let what = format!("unable to apply cgroup configuration: adding pid to cgroups {path:?}");
            return Err(Error::sys(what, errno));
        }
        // The container has made cgroups of its own below, and its init lives in one of them.
        Err(Errno::EBUSY | Errno::EOPNOTSUPP | Errno::ENOENT) if into.is_some() => {
            child.doors = cgroup.doors_but(part, true)?;
            let moved = crate::cgroup::of_process(init_pid);
            moved.and_then(|dir| clone::clone3(0, Some(dir.as_fd())))
        }
        // A user may move nothing from a session into a unit of the user's systemd, which can.
        Err(Errno::EACCES) if into.is_some() && child.lenient && unit.is_some() => {
            attach = unit;
            child.wait_for_parent = true;
            clone::clone3(0, None)
        }
        other => other,
    };
    let process = match cloned {
        Ok(Side::Child) => exec::run(child),
        Ok(Side::Parent(pid, pidfd)) => Ok(Process { pid, pidfd }),
        Err(Errno::ENOMEM) if namespaces & pid_namespace != 0 => {
            // What clone(2) says when the pid namespace's init is gone.
            Err(stopped(Errno::ESRCH, ""))
        }
        Err(errno) => Err(Error::sys("clone the exec process", errno)),
    };
    if let (Ok(process), true) = (&process, log::log_enabled!(log::Level::Debug)) {
        let pid = process.pid;
        log::debug!("nsexec container setup: process {pid} cloned, joins namespaces {namespaces:#x}");
        if let Some(initial) = &plan.affinity.initial {
            let mask: String = initial.iter().rev().map(|word| format!("{word:016x}")).collect();
            let mask = mask.trim_start_matches('0');
            log::debug!("nsexec[{pid}]: affinity: 0x{}", if mask.is_empty() { "0" } else { mask });
        }
        log::debug!("child process in init(): pid {pid}, then setns_init: about to exec");
    }
    let wait_for_parent = child.wait_for_parent;
    drop(child);
    let restored = aim.done();
    let listener = filter.and_then(|f| f.listener.clone());
    let birth =
        Birth { plan, process: Some(process?), channel, console: None, listener, state, init_pid, by_second_clone };
    restored.map_err(|errno| Error::sys("return to the runtime's pid namespace", errno))?;
    if wait_for_parent {
        let pid = birth.pid();
        attach.map_or(Ok(()), |unit| unit.attach(pid))?;
        for (at, (resource, soft, hard)) in birth.plan.rlimits.iter().enumerate().filter(|_| limits_by_parent) {
            sys::prlimit(pid, *resource, *soft, *hard)
                .map_err(|errno| Error::sys(format!("process.rlimits[{at}]: set limit {resource}"), errno))?;
        }
        birth.channel.go()?;
    }
    Ok(birth)
}

impl Birth {
    fn pid(&self) -> i32 {
        self.process.as_ref().map_or(0, |process| process.pid)
    }

    /// The error of one that takes too long.
    pub(crate) fn late(&self) -> Error {
        let program = self.plan.argv.as_slice()[0].to_string_lossy();
        super::hang::late(self.pid(), &format!("start {program:?}: it does not run in time"))
    }

    /// Readable when `advance` can do something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// It asks for nothing on its way.
    pub fn until_closed(&self) -> bool {
        !self.plan.terminal && self.listener.is_none() && !self.by_second_clone
    }

    /// Does what can be done without blocking.
    pub fn advance(&mut self) -> Result<Option<(Process, Option<OwnedFd>)>> {
        loop {
            match self.channel.receive()? {
                Message::Later => return Ok(None),
                Message::Record(Record::Born, Some(pidfd)) => {
                    let first = self.process.take();
                    self.process = adopted(pidfd)?;
                    first.map_or(Ok(()), |first| first.wait().map(drop))?;
                }
                Message::Record(Record::Console, Some(master)) => self.console = Some(master),
                Message::Record(Record::Listener(number), _) => {
                    if let (Some(listener), Some(process)) = (&self.listener, &self.process) {
                        self.state.insert("pid".into(), self.init_pid.into());
                        self.state.insert("status".into(), "running".into());
                        listener::hand_over(process.pidfd.as_fd(), number, listener, process.pid, &self.state)?;
                    }
                    self.channel.go()?;
                }
                Message::Record(Record::Failed(failure), _) => {
                    let root = format!("/proc/{}/root", self.init_pid);
                    return Err(describe::process("process", &self.plan, &failure, root.as_ref()));
                }
                Message::Record(..) => {}
                Message::Executed => {
                    let process = self.process.take();
                    return Ok(process.map(|process| (process, self.console.take())));
                }
                Message::Lost => {
                    return Err(Error::new(Kind::System, "exec process died before it ran the program"));
                }
            }
        }
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.abandon();
        }
    }
}
