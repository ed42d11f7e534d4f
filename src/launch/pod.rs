//! A process that holds the namespaces of a pod and reaps what is orphaned in them: the shim's own program, run under
//! another name.

use std::ffi::{CStr, CString};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::{Process, chore};
use crate::sys::clone::setns;
use crate::sys::process::{self as sys, CStrings};
use crate::{Error, Result};

/// The name that the program is run under to hold a pod.
pub const NAME: &str = "skiff-pod";

/// What to hold.
#[derive(Debug)]
pub struct Pod<'a> {
    /// Sandbox id, to be seen in the process list.
    pub id: &'a str,
    /// CLONE_NEW* of the namespaces to make.
    pub namespaces: u64,
    /// The network namespace to be in.
    pub netns: Option<&'a CStr>,
    /// Host name of a new UTS namespace.
    pub hostname: Option<&'a str>,
    /// Sysctls: name, value, and whether a kernel may lack it.
    pub sysctls: &'a [(&'a str, &'a str, bool)],
}

/// Starts the process. It ends with its parent.
pub fn hold(pod: &Pod<'_>) -> Result<Process> {
    let strings = |list: &[&str]| -> Result<CStrings> {
        let list =
            list.iter().map(|text| CString::new(*text).map_err(|_| Error::invalid("sandbox_id", "has a NUL byte")));
        Ok(CStrings::new(list.collect::<Result<_>>()?))
    };
    let sysctls = pod.sysctls.iter().map(|(name, value, optional)| Ok((sysctl_path(name)?, *value, *optional)));
    let sysctls = sysctls.collect::<Result<Vec<_>>>()?;
    let argv = strings(&[NAME, pod.id])?;
    let process = chore::spawn_in(pod.namespaces, c"/proc/self/exe", &argv, &strings(&[])?, &[], || {
        sys::set_parent_death_signal(libc::SIGKILL)?;
        if let Some(path) = pod.netns {
            let fd = nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            setns(fd.as_fd(), libc::CLONE_NEWNET as u64)?;
        }
        if let Some(name) = pod.hostname {
            nix::unistd::sethostname(name)?;
        }
        for (path, value, optional) in &sysctls {
            match write(path, value) {
                Err(_) if *optional => {}
                other => other?,
            }
        }
        Ok(())
    });
    process.map_err(|err| err.context("sandbox: hold its namespaces"))
}

/// Only what a namespace of the pod holds may be set for it.
fn sysctl_path(name: &str) -> Result<CString> {
    let path = crate::plan::sysctl::path(name);
    let ours =
        path.starts_with("net/") || path.starts_with("fs/mqueue/") || crate::plan::sysctl::IPC.contains(&path.as_str());
    if !ours || path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::invalid(format!("sysctls.{name}"), "is not in a namespace of the pod"));
    }
    crate::plan::cstring(name, format!("/proc/sys/{path}"))
}

fn write(path: &CStr, value: &str) -> nix::Result<()> {
    let file = nix::fcntl::open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::write(&file, value.as_bytes()).map(drop)
}

/// What the process does: nothing but reaping. Does not return.
pub fn run() -> ! {
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    let _ = child.thread_block();
    loop {
        while matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::EINTR)
        ) {}
        let _ = child.wait();
    }
}
