//! The birth of an exec process: joins the container through its init's pidfd, becomes the user, execs.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::stat::{Mode, umask};

use super::report::{At, Failure, Record, Report, Step};
use super::{console, identity, init};
use crate::plan::process::Process;
use crate::sys::process::{self as sys, SockFilter};
use crate::sys::{clone, path};

/// Everything that the child needs beside its own copy of the parent's memory.
#[derive(Debug)]
pub struct Exec<'a> {
    /// The process.
    pub process: &'a Process,
    /// The container's seccomp filter and its flags.
    pub filter: Option<(Vec<SockFilter>, u32)>,
    /// The container's init.
    pub init: OwnedFd,
    /// CLONE_NEW* of the namespaces to join; the pid namespace is joined by birth.
    pub namespaces: u64,
    /// The pid namespace is entered by a second clone, after the user namespace that gives the right to it.
    pub second_clone: bool,
    /// The container has a user namespace.
    pub in_user_namespace: bool,
    /// Standard streams; None keeps the caller's.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Descriptors 3..3+n stay open.
    pub preserve_fds: u32,
    /// Name of the session keyring to make.
    pub keyring: Option<std::ffi::CString>,
    /// The socket to the parent.
    pub report: OwnedFd,
    /// Files to enter the cgroup by.
    pub doors: Vec<BorrowedFd<'a>>,
    /// What is not allowed to an ordinary user is no failure.
    pub lenient: bool,
    /// The parent has something to do first: it says when it is done.
    pub wait_for_parent: bool,
    /// An ordinary user's, in a user namespace of that user's.
    pub of_user: bool,
}

/// Runs in the child; does not return.
pub fn run(exec: Exec<'_>) -> ! {
    sys::reset_signals();
    let report = match exec.report.try_clone() {
        Ok(fd) => Report::new(fd),
        Err(_) => sys::exit_now(1),
    };
    let Err(failure) = birth(&exec, &report);
    let _ = report.send(&Record::Failed(failure));
    sys::exit_now(1)
}

fn birth(exec: &Exec<'_>, report: &Report) -> Result<std::convert::Infallible, Failure> {
    let plan = exec.process;
    if let Some(mask) = &plan.affinity.initial {
        sys::set_affinity(0, mask).at(Step::Affinity)?;
    }
    identity::settle(&exec.doors, plan.oom_score_adj, exec.lenient)?;
    if exec.wait_for_parent {
        report.wait().at(Step::Parent)?;
    }
    match &plan.affinity.last {
        Some(mask) => sys::set_affinity(0, mask).at(Step::Affinity)?,
        None => {
            let _ = sys::set_affinity(0, &sys::ALL_PROCESSORS);
        }
    }
    if exec.namespaces != 0 {
        clone::setns(exec.init.as_fd(), exec.namespaces).at(Step::Join)?;
    }
    if exec.second_clone {
        match clone::clone3(libc::CLONE_PARENT as u64, None).at(Step::Join)? {
            clone::Side::Child => {}
            clone::Side::Parent(_, pidfd) => {
                let sent = report.send_fd(&Record::Born, pidfd.as_fd());
                sys::exit_now(i32::from(sent.is_err()));
            }
        }
    }
    if exec.in_user_namespace {
        identity::become_namespace_root(plan)?;
        sys::set_dumpable(false).at(Step::NamespaceRoot)?;
    }
    umask(Mode::empty());
    let _ = nix::unistd::setsid();
    if let Some(name) = &exec.keyring {
        sys::new_session_keyring(name).at(Step::Keyring)?;
    }
    let root = path::open_dir(c"/").at(Step::Rootfs)?;
    if plan.terminal {
        let slave = console::open(root.as_fd(), plan, report)?;
        console::take(&slave)?;
    } else if let Some(streams) = &exec.stdio {
        for (number, stream) in streams.iter().enumerate() {
            sys::place_fd(stream.as_fd(), number as i32).at(Step::Stdio)?;
        }
    }
    drop(root);
    let filter = exec.filter.as_ref().map(|(program, flags)| (program.as_slice(), *flags));
    let dumpable = exec.of_user && identity::notifies(filter);
    // While a seccomp filter cannot forbid it yet.
    if dumpable {
        // Whoever is in the container may look at it from then on: nothing of the host's is left to be seen.
        let mut keep: Vec<_> = (3..3 + exec.preserve_fds as i32).chain([report.as_raw_fd()]).collect();
        sys::close_others(&mut keep).at(Step::Descriptors)?;
    }
    sys::cloexec_from(3 + exec.preserve_fds).at(Step::Descriptors)?;
    for fd in 3..3 + exec.preserve_fds as i32 {
        sys::set_cloexec(fd, false).at(Step::Descriptors)?;
    }
    let manner = identity::Manner { own_limits: !exec.in_user_namespace, dumpable };
    let execve = identity::become_user(plan, filter, exec.in_user_namespace, manner, report)?;
    report.send(&Record::Execing).at(Step::Parent)?;
    if plan.no_new_privs && !identity::notifies(filter) {
        identity::install(filter, report)?;
    }
    Err(init::execve(&execve))
}
