//! The birth of a container's init, from clone to execve, as one straight line.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, umask};
use oci_spec::runtime::{Hook, LinuxNamespaceType as Kind};

use super::identity::Manner;
use super::report::{self, At, Failure, Record, Report, Step};
use super::rootfs::{self, Surroundings};
use super::{console, identity};
use crate::error::errno_words;
use crate::hooks;
use crate::plan::Plan;
use crate::sys::clone::{self, Side};
use crate::sys::path;
use crate::sys::pause::{self, Layout};
use crate::sys::process::{self as sys, CapSets, Execve, SockFilter};
use crate::trace::{Trace, Track};

/// Everything that the child needs beside its own copy of the parent's memory.
#[derive(Debug)]
pub struct Init<'a> {
    /// What to do.
    pub plan: &'a Plan,
    /// The compiled seccomp filter and its flags.
    pub filter: Option<(Vec<SockFilter>, u32)>,
    /// Namespaces to join, with their CLONE_NEW* flag and place in the plan; the pid namespace is not among them.
    pub joins: Vec<(u64, usize, OwnedFd)>,
    /// CLONE_NEW* of a second clone after the joins, when a user namespace is made and others are joined, as joining
    /// needs the rights that the new one takes away; and when one is joined, as it is to own those that are made.
    pub second_clone: Option<u64>,
    /// Sources of bind mounts that the parent has opened, by place in the plan.
    pub sources: Vec<Option<OwnedFd>>,
    /// CLONE_NEW* that the child makes while the parent makes the cgroup.
    pub unshare: Option<u64>,
    /// Files to enter the cgroup by; with `unshare` they come from the parent when they are there.
    pub doors: Vec<BorrowedFd<'a>>,
    /// The parent has something to do first: it says when it is done.
    pub wait_for_parent: bool,
    /// The container's cgroup directories.
    pub cgroups: BTreeMap<String, PathBuf>,
    /// Standard streams; None keeps the caller's.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Descriptors 3..3+n stay open.
    pub preserve_fds: u32,
    /// The socket to the parent.
    pub report: Option<OwnedFd>,
    /// A FIFO to read the start from and one to write records to afterwards; None goes on with the socket.
    pub gate: Option<(OwnedFd, OwnedFd)>,
    /// The state for hooks, without pid and status.
    pub state: serde_json::Map<String, serde_json::Value>,
    /// Where the steps are marked.
    pub trace: Option<Trace>,
    /// An ordinary user's, in a user namespace of that user's.
    pub of_user: bool,
    /// Offsets of a time namespace that the parent has no right to make.
    pub time_offsets: Option<&'a str>,
    /// It runs no program, but becomes a pause process with this memory.
    pub pause: Option<Layout>,
}

impl Init<'_> {
    fn mark(&self, step: &str) {
        self.trace.iter().for_each(|trace| trace.mark(Track::Child, step));
    }

    /// A created container may wait long for its start, and an exec may look at it meanwhile: nothing of the host's stays
    /// open. While a seccomp filter cannot forbid it yet.
    fn close_what_is_done(&self, report: &Report) -> nix::Result<()> {
        let mut keep = vec![report.as_raw_fd()];
        keep.extend(self.report.iter().map(AsRawFd::as_raw_fd));
        keep.extend(self.gate.iter().flat_map(|(go, answer)| [go.as_raw_fd(), answer.as_raw_fd()]));
        keep.extend(self.trace.iter().map(|trace| trace.as_raw_fd()));
        keep.extend(3..3 + self.preserve_fds as i32);
        sys::close_others(&mut keep)
    }
}

/// Runs in the child; does not return.
pub fn run(init: Init<'_>) -> ! {
    sys::reset_signals();
    let Some(Ok(fd)) = init.report.as_ref().map(OwnedFd::try_clone) else { sys::exit_now(1) };
    // Most of its descriptors are closed by number on the way.
    let mut init = std::mem::ManuallyDrop::new(init);
    if let Err((failure, report)) = birth(&mut init, Report::new(fd)) {
        let _ = report.send(&Record::Failed(failure));
    }
    sys::exit_now(1)
}

fn birth(init: &mut Init<'_>, report: Report) -> Result<(), (Failure, Report)> {
    let ready = match create(init, &report) {
        Ok(ready) => ready,
        Err(failure) => return Err((failure, report)),
    };
    init.trace.iter().for_each(|trace| trace.end(Track::Child));
    if let Err(errno) = report.send(&Record::Ready) {
        return Err((Failure::new(Step::Parent, 0, errno), report));
    }
    let (go, report) = match (init.gate.take(), init.report.take()) {
        (Some((go, answer)), _) => (go, Report::new(answer)),
        (None, Some(socket)) => (socket, report),
        (None, None) => return Ok(()),
    };
    let failed = match start(init, ready, go, &report) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    Err((failed, report))
}

fn create(init: &mut Init<'_>, report: &Report) -> Result<Execve, Failure> {
    let plan = init.plan;
    // While the parent makes the cgroup, unless the names are those of a namespace that is joined later.
    let names_first = init.unshare.is_some_and(|flags| flags & Kind::Uts as u64 != 0);
    let mut later = Vec::new();
    if let Some(flags) = init.unshare {
        init.mark("namespaces of its own");
        clone::unshare(flags).at(Step::Namespaces)?;
        if names_first {
            name(plan)?;
        }
        init.mark("wait for the cgroup");
        later = report.wait_for_fds().at(Step::Parent)?;
    }
    init.mark("cgroup");
    // In a user namespace of its own it may not lower its score: the parent does it.
    let score = plan.process.oom_score_adj.filter(|_| !plan.namespaces.makes(Kind::User));
    let doors: Vec<_> = init.doors.iter().copied().chain(later.iter().map(AsFd::as_fd)).collect();
    identity::settle(&doors, score, plan.rootless)?;
    drop(later);
    let init = &*init;
    if init.wait_for_parent {
        report.wait().at(Step::Parent)?;
    }
    // Which processors the caller was confined to is not the container's affair: its cpuset decides.
    let _ = sys::set_affinity(0, &sys::ALL_PROCESSORS);
    init.mark("namespaces");
    namespaces(init, report)?;
    umask(Mode::empty());
    let _ = nix::unistd::setsid();
    if !names_first {
        init.mark("network and names");
        name(plan)?;
    }
    if let Some(name) = &plan.keyring {
        sys::new_session_keyring(name).at(Step::Keyring)?;
    }
    let around = Surroundings {
        sources: &init.sources,
        report,
        cgroups: &init.cgroups,
        cgroup_namespace: plan.namespaces.has(Kind::Cgroup),
        bind_devices: plan.namespaces.has(Kind::User),
    };
    init.mark("rootfs, mounts and devices");
    let mut prepared = rootfs::prepare(&plan.rootfs, &around)?;
    let slave = if plan.rootfs.console {
        let slave = console::open(prepared.root.as_fd(), &plan.process, report)?;
        console::bind(prepared.root.as_fd(), &slave)?;
        Some(slave)
    } else {
        None
    };
    init.mark("hooks");
    if has(plan.hooks.prestart()) || has(plan.hooks.create_runtime()) {
        report.send(&Record::Mounted).at(Step::Parent)?;
        report.wait().at(Step::Parent)?;
    }
    if has(plan.hooks.create_container()) {
        // What they are there for lies in the rootfs, which is not the root yet.
        nix::unistd::fchdir(&prepared.root).at(Step::CreateContainerHook)?;
    }
    run_hooks(
        Step::CreateContainerHook,
        "createContainer",
        plan.hooks.create_container(),
        &init.state,
        "creating",
        // They are the host's programs in the host's root: what an image puts into the environment is not for them.
        &sys::CStrings::new(Vec::new()),
    )?;
    init.mark("root");
    rootfs::enter(&plan.rootfs, &prepared)?;
    let cwd = plan.process.cwd.to_bytes();
    if cwd != b"/" {
        // Missing directories are made; one that only the user may see is left to the chdir that follows.
        let inside = crate::sys::mount::cstring(&cwd[1..]).at(Step::MakeCwd)?;
        match path::mkdir_all(prepared.root.as_fd(), &inside, Mode::from_bits_truncate(0o755)) {
            Ok(_) | Err(Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ELOOP | Errno::EXDEV) => {}
            Err(errno) => return Err(Failure::new(Step::MakeCwd, 0, errno)),
        }
    }
    init.mark("sysctl");
    if !plan.sysctls.is_empty() {
        let proc = identity::procfs().at(Step::Procfs)?;
        for (at, sysctl) in plan.sysctls.iter().enumerate() {
            let name = crate::sys::mount::cstring([b"sys/", sysctl.path.to_bytes()].concat());
            identity::write_below(proc.as_fd(), &name.at_item(Step::Sysctl, at)?, sysctl.value.to_bytes())
                .at_item(Step::Sysctl, at)?;
        }
    }
    init.mark("seal");
    rootfs::seal(&plan.rootfs, &mut prepared)?;
    drop(prepared);
    match (&slave, &init.stdio) {
        (Some(slave), _) => console::take(slave)?,
        (None, Some(streams)) => {
            for (number, stream) in streams.iter().enumerate() {
                sys::place_fd(stream.as_fd(), number as i32).at(Step::Stdio)?;
            }
        }
        (None, None) => {}
    }
    drop(slave);
    own_null().at(Step::Stdio)?;
    init.close_what_is_done(report).at(Step::Descriptors)?;
    for fd in 3..3 + init.preserve_fds as i32 {
        sys::set_cloexec(fd, false).at(Step::Descriptors)?;
    }
    // As the first process of its pid namespace it would not be reached by them otherwise (pid_namespaces(7)).
    sys::exit_on(&[libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM]);
    init.mark("process, capabilities and seccomp");
    let filter = init.filter.as_ref().map(|(program, flags)| (program.as_slice(), *flags));
    let in_user_namespace = plan.namespaces.has(Kind::User);
    let manner = Manner { own_limits: !in_user_namespace, dumpable: init.of_user };
    identity::become_user(&plan.process, filter, in_user_namespace, manner, report)
}

/// What its network and UTS namespaces are to be like.
fn name(plan: &Plan) -> Result<(), Failure> {
    if plan.namespaces.makes(Kind::Network) {
        sys::loopback_up().at(Step::Loopback)?;
    }
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(std::ffi::OsStr::new(&*name.to_string_lossy())).at(Step::Hostname)?;
    }
    plan.domainname.as_ref().map_or(Ok(()), |name| sys::setdomainname(name.to_bytes()).at(Step::Domainname))
}

/// A stream on the host's /dev/null moves to the container's: it would hold a mount of the host's, which criu(8) cannot
/// dump either. As long as the container has one.
fn own_null() -> nix::Result<()> {
    let null = (SFlag::S_IFCHR, libc::makedev(1, 3));
    let mut own: Option<OwnedFd> = None;
    for number in 0..3 {
        if path::kind(sys::standard_stream(number)) != Ok(null) {
            continue;
        }
        if own.is_none() {
            let root = path::open_dir(c"/")?;
            let Ok(fd) = path::open_no_symlinks(root.as_fd(), c"dev/null", OFlag::O_PATH) else { return Ok(()) };
            if path::kind(fd.as_fd())? != null {
                return Ok(());
            }
            let Ok(fd) = path::open_no_symlinks(root.as_fd(), c"dev/null", OFlag::O_RDWR) else { return Ok(()) };
            own = Some(fd);
        }
        if let Some(own) = &own {
            sys::place_fd(own.as_fd(), number)?;
        }
    }
    Ok(())
}

fn namespaces(init: &Init<'_>, report: &Report) -> Result<(), Failure> {
    let plan = &init.plan.namespaces;
    let process = &init.plan.process;
    join(&init.joins)?;
    let mut in_user_namespace = plan.has(Kind::User);
    if let Some(flags) = init.second_clone {
        if plan.makes(Kind::User) {
            clone::unshare(Kind::User as u64).at(Step::Namespaces)?;
            report.send(&Record::NeedMaps).at(Step::Parent)?;
            report.wait().at(Step::Parent)?;
        }
        identity::become_namespace_root(process)?;
        if let Some(offsets) = init.time_offsets {
            // Root's otherwise, not that of this namespace's.
            sys::set_dumpable(true).at(Step::NamespaceRoot)?;
            clone::unshare(clone::CLONE_NEWTIME)
                .and_then(|()| clone::set_time_offsets(offsets))
                .at(Step::TimeOffsets)?;
            sys::set_dumpable(false).at(Step::NamespaceRoot)?;
        }
        match clone::clone3(flags | libc::CLONE_PARENT as u64, None).at(Step::Namespaces)? {
            Side::Child => {}
            Side::Parent(_, pidfd) => {
                let sent = report.send_fd(&Record::Born, pidfd.as_fd());
                sys::exit_now(i32::from(sent.is_err()));
            }
        }
        in_user_namespace = true;
    }
    if in_user_namespace {
        identity::become_namespace_root(process)?;
        // A change of ids sets the flag back to the system's default (prctl(2)).
        sys::set_dumpable(false).at(Step::NamespaceRoot)?;
    }
    if plan.makes(Kind::Cgroup) {
        // Its root is the cgroup of the caller, so it is made only now that the parent has moved us.
        clone::unshare(Kind::Cgroup as u64).at(Step::Namespaces)?;
    }
    Ok(())
}

/// The host's right to join a namespace ends with the join of a user namespace, and begins with it for namespaces that
/// belong to that one: so the others go first, and those that were refused once more afterwards.
fn join(joins: &[(u64, usize, OwnedFd)]) -> Result<(), Failure> {
    let user = Kind::User as u64;
    let mut refused = Vec::new();
    for (kind, at, fd) in joins.iter().filter(|(kind, ..)| *kind != user) {
        match clone::setns(fd.as_fd(), *kind) {
            Err(Errno::EPERM) => refused.push((*kind, *at, fd)),
            other => other.at_item(Step::Join, *at)?,
        }
    }
    for (kind, at, fd) in joins.iter().filter(|(kind, ..)| *kind == user) {
        clone::setns(fd.as_fd(), *kind).at_item(Step::Join, *at)?;
    }
    for (kind, at, fd) in refused {
        clone::setns(fd.as_fd(), kind).at_item(Step::Join, at)?;
    }
    Ok(())
}

fn start(init: &Init<'_>, execve: Execve, go: OwnedFd, report: &Report) -> Result<std::convert::Infallible, Failure> {
    let plan = init.plan;
    report::wait(go.as_fd()).at(Step::Gate)?;
    let filter = init.filter.as_ref().map(|(program, flags)| (program.as_slice(), *flags));
    let mut filter_is_due = plan.process.no_new_privs && !identity::notifies(filter);
    if has(plan.hooks.start_container()) {
        // They are the container's code, and under its filter.
        if std::mem::take(&mut filter_is_due) {
            identity::install(filter, report)?;
        }
        let hooks = plan.hooks.start_container();
        run_hooks(Step::StartContainerHook, "startContainer", hooks, &init.state, "created", execve.env())?;
    }
    if init.pause.is_some() {
        drop(go);
        become_pause(report)?;
    }
    report.send(&Record::Execing).at(Step::Parent)?;
    if filter_is_due {
        identity::install(filter, report)?;
    }
    if let (Some(layout), Some(title)) = (&init.pause, &plan.process.pause) {
        pause::rest(layout, c"skiff-pause", title, report.as_fd());
    }
    Err(self::execve(&execve))
}

/// What execve would do: descriptors go, and the rights that a user other than root has no use for. It waits for signals and
/// for children, which needs none. Its memory is not to be looked into: it has been the runtime's.
fn become_pause(report: &Report) -> Result<(), Failure> {
    sys::close_others(&mut [report.as_raw_fd()]).at(Step::Descriptors)?;
    sys::clear_ambient().and_then(|()| sys::capset(CapSets::default())).at(Step::Capabilities)?;
    sys::set_dumpable(false).at(Step::Capabilities)
}

/// Becomes the user's program. Its failure is told to who reads the container's stderr, too.
pub fn execve(execve: &Execve) -> Failure {
    let errno = execve.run();
    let program = execve.program();
    let text = format!("exec {}: {}\n", program.to_string_lossy(), errno_words(errno));
    let _ = nix::unistd::write(std::io::stderr(), text.as_bytes());
    Failure::new(Step::Execve, 0, errno).detail(program.to_string_lossy())
}

fn has(hooks: &Option<Vec<Hook>>) -> bool {
    hooks.as_ref().is_some_and(|list| !list.is_empty())
}

fn run_hooks(
    step: Step,
    kind: &str,
    list: &Option<Vec<Hook>>,
    state: &serde_json::Map<String, serde_json::Value>,
    status: &str,
    env: &sys::CStrings,
) -> Result<(), Failure> {
    for (at, hook) in list.iter().flatten().enumerate() {
        let mut state = state.clone();
        state.insert("pid".into(), std::process::id().into());
        state.insert("status".into(), status.into());
        let json = serde_json::Value::Object(state).to_string();
        hooks::start(kind, at, hook, json.as_bytes(), Some(env))
            .and_then(hooks::Running::finish)
            .map_err(|err| Failure { step, item: at as u32, errno: 0, detail: err.to_string() })?;
    }
    Ok(())
}
