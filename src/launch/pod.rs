//! A process that holds the namespaces of a pod and reaps what is orphaned in them: a child of the shim that runs no
//! program, has an empty root and no rights, and little memory.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;

use super::chore::Term;
use super::{Channel, Message, Pending, Process, adopted};
use crate::child::report::{At, Failure, Record, Report, Step};
use crate::sys::clone::{self, Side, owner, setns};
use crate::sys::mount::{attach, attr, new_mount, pivot_root};
use crate::sys::path::open_dir;
use crate::sys::pause::{self, Layout};
use crate::sys::process::{self as sys, CapSets};
use crate::{Error, Kind, Result, limits};

/// The name of the process.
const NAME: &CStr = c"skiff-pod";

/// What to hold.
#[derive(Debug)]
pub struct Pod<'a> {
    /// Sandbox id, to be seen in the process list.
    pub id: &'a str,
    /// CLONE_NEW* of the namespaces to make.
    pub namespaces: u64,
    /// The network namespace to be in.
    pub netns: Option<&'a CStr>,
    /// All of it in the user namespace that the network namespace belongs to.
    pub in_user_namespace: bool,
    /// Host name of a new UTS namespace.
    pub hostname: Option<&'a str>,
    /// Sysctls: name, value, and whether a kernel may lack it.
    pub sysctls: &'a [(&'a str, &'a str, bool)],
}

/// Where the memory of this program is.
pub(super) fn layout() -> Result<Layout> {
    Layout::read().map_err(|e| Error::io("find the memory of a pause process", &e))
}

/// A pod's process that is on its way. Dropped before its end, it is killed.
#[derive(Debug)]
pub struct Holding {
    channel: Channel,
    process: Option<Process>,
    term: Term,
    /// The names that errors tell: network namespace, host name, sysctls.
    names: (CString, String, Vec<String>),
}

/// Starts the process. It ends with its parent.
pub fn hold(pod: &Pod<'_>) -> Result<Holding> {
    held(pod).map_err(|err| err.context(WHAT))
}

const WHAT: &str = "sandbox: hold its namespaces";

fn held(pod: &Pod<'_>) -> Result<Holding> {
    let sysctls = pod.sysctls.iter().map(|(name, value, optional)| Ok((sysctl_path(name)?, *value, *optional)));
    let sysctls = sysctls.collect::<Result<Vec<_>>>()?;
    // Without a namespace of its own it would change the host's.
    if pod.in_user_namespace && pod.netns.is_none() {
        return Err(Error::invalid(
            "netns_path",
            "a pod with a user namespace needs the one that its network belongs to",
        ));
    }
    let layout = layout()?;
    let (channel, end) = Channel::pair()?;
    // Its root is its own, too: who may look into it from a container must not find the host's there.
    let flags = pod.namespaces | libc::CLONE_NEWNS as u64;
    let first = if pod.in_user_namespace { 0 } else { flags };
    let process = match clone::clone3(first, None).map_err(|errno| Error::sys("clone", errno))? {
        Side::Child => run(pod, flags, &sysctls, &layout, &Report::new(end)),
        Side::Parent(pid, pidfd) => Process { pid, pidfd },
    };
    let netns = pod.netns.unwrap_or_default().to_owned();
    let names = pod.sysctls.iter().map(|one| one.0.to_string()).collect();
    Ok(Holding {
        channel,
        process: Some(process),
        term: Term::new(WHAT, limits::POD),
        names: (netns, pod.hostname.unwrap_or_default().to_string(), names),
    })
}

impl Pending for Holding {
    type Output = Process;

    fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.term.deadline())
    }

    fn advance(&mut self) -> Result<Option<Process>> {
        let lost = || Error::new(Kind::System, "the process has ended").context(WHAT);
        loop {
            match self.channel.receive()? {
                Message::Later => {
                    return self.process.as_ref().map_or(Ok(()), |process| self.term.check(process)).map(|()| None);
                }
                Message::Record(Record::Born, Some(pidfd)) => {
                    // Cloned to this same parent; who did it exits.
                    let real = adopted(pidfd)?.ok_or_else(lost)?;
                    if let Some(first) = self.process.replace(real) {
                        first.abandon();
                    }
                }
                Message::Record(Record::Failed(failure), _) => return Err(self.describe(&failure).context(WHAT)),
                Message::Record(..) => {}
                Message::Executed => return self.process.take().map(Some).ok_or_else(lost),
                Message::Lost => return Err(lost()),
            }
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.abandon();
        }
    }
}

impl Holding {
    fn describe(&self, failure: &Failure) -> Error {
        let (netns, hostname, sysctls) = &self.names;
        let text = match failure.step {
            Step::Join => format!("join network namespace {netns:?}"),
            Step::NamespaceRoot => "become root of the user namespace".into(),
            Step::Namespaces => "make namespaces".into(),
            Step::Hostname => format!("hostname: set {hostname:?}"),
            Step::Sysctl => format!("sysctls: set {:?}", sysctls.get(failure.item as usize).map_or("", String::as_str)),
            Step::PivotRoot => "enter an empty root".into(),
            step => format!("{step:?}"),
        };
        Error::sys(text, Errno::from_raw(failure.errno))
    }
}

type Sysctl<'a> = (CString, &'a str, bool);

fn run(pod: &Pod<'_>, flags: u64, sysctls: &[Sysctl<'_>], layout: &Layout, report: &Report) -> ! {
    sys::reset_signals();
    let settled = join(pod, flags, report).and_then(|()| settle(pod, sysctls)).and_then(|()| leave(report));
    if let Err(failure) = settled {
        let _ = report.send(&Record::Failed(failure));
        sys::exit_now(1)
    }
    pause::rest(layout, NAME, pod.id, report.as_fd())
}

/// Enters the network namespace; with a user namespace that first, and then the others are made in it.
fn join(pod: &Pod<'_>, flags: u64, report: &Report) -> std::result::Result<(), Failure> {
    let Some(path) = pod.netns else { return Ok(()) };
    let net = nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).at(Step::Join)?;
    if !pod.in_user_namespace {
        return setns(net.as_fd(), libc::CLONE_NEWNET as u64).at(Step::Join);
    }
    let users = owner(net.as_fd()).at(Step::Join)?;
    setns(users.as_fd(), libc::CLONE_NEWUSER as u64).at(Step::Join)?;
    setns(net.as_fd(), libc::CLONE_NEWNET as u64).at(Step::Join)?;
    let _ = sys::setgroups(&[]);
    sys::setgid(0).and_then(|()| sys::setuid(0)).at(Step::NamespaceRoot)?;
    match clone::clone3(flags | libc::CLONE_PARENT as u64, None).at(Step::Namespaces)? {
        Side::Child => Ok(()),
        Side::Parent(_, pidfd) => {
            let sent = report.send_fd(&Record::Born, pidfd.as_fd());
            sys::exit_now(i32::from(sent.is_err()));
        }
    }
}

fn settle(pod: &Pod<'_>, sysctls: &[Sysctl<'_>]) -> std::result::Result<(), Failure> {
    if let Some(name) = pod.hostname {
        nix::unistd::sethostname(name).at(Step::Hostname)?;
    }
    for (at, (path, value, optional)) in sysctls.iter().enumerate() {
        match write(path, value) {
            Err(_) if *optional => {}
            other => other.at_item(Step::Sysctl, at)?,
        }
    }
    Ok(())
}

/// Leaves everything behind that the host and the shim have: files, descriptors, rights.
fn leave(report: &Report) -> std::result::Result<(), Failure> {
    let null = nix::fcntl::open(c"/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
    let null = null.at(Step::Stdio)?;
    for number in 0..3 {
        sys::place_fd(null.as_fd(), number).at(Step::Stdio)?;
    }
    drop(null);
    empty_root().at(Step::PivotRoot)?;
    sys::close_others(&mut [report.as_raw_fd()]).at(Step::Descriptors)?;
    sys::clear_ambient().and_then(|()| sys::capset(CapSets::default())).at(Step::Capabilities)?;
    // A change of ids sets both back (prctl(2)).
    sys::set_dumpable(false).and_then(|()| sys::set_parent_death_signal(libc::SIGKILL)).at(Step::Capabilities)?;
    report.send(&Record::Execing).at(Step::Parent)
}

fn empty_root() -> nix::Result<()> {
    let none: Option<&CStr> = None;
    mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let attributes = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
    let root = new_mount(c"tmpfs", &[(c"mode", Some(c"555"))], attributes)?;
    // Any directory would do.
    attach(root.as_fd(), open_dir(c"/proc")?.as_fd())?;
    pivot_root(root.as_fd())
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
