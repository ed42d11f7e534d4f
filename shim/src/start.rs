//! `start`: finds the daemon of a container's group or becomes it, and tells containerd its address.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use skiff::sys::clone::{Side, clone3};
use skiff::sys::process as sys;
use skiff::{Error, Kind, Result};

use crate::args::Args;
use crate::{bootstrap, group, options, serve};

/// The file in the bundle by which containerd 1.x finds the shim again.
const ADDRESS: &str = "address";
/// Longest path of a unix socket, bytes (unix(7)), less the final NUL.
const MAX_SOCKET_PATH: usize = 107;

/// The daemon to be, in its own process.
pub struct Daemon {
    bundle: PathBuf,
    listener: UnixListener,
    /// Where containerd takes events, when the bootstrap parameters say so.
    events: String,
}

/// Runs `start`. In the child that it makes it returns the daemon.
pub fn run(args: &Args) -> Result<Option<Daemon>> {
    // Returns when there is no need for it, or no way: without the mount API it is no worse.
    let _ = skiff::sys::exe::run_read_only();
    let bundle = std::env::current_dir().map_err(|e| Error::io("find the bundle", &e))?;
    let input = bootstrap::read(&args.id, &args.namespace)?;
    let options = options::parse(input.options.as_ref())?;
    let params = input.params.clone().unwrap_or_default();
    let dir = Some(params.socket_dir().to_string()).filter(|dir| !dir.is_empty());
    let dir = dir.map_or_else(|| PathBuf::from(group::SOCKET_DIR), PathBuf::from);
    let socket = group::socket(&dir, &args.address, &args.namespace, &group::of(&bundle, &args.id)?);
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::invalid("socket_dir", format!("{:?} is too long for a socket", dir.display().to_string())));
    }
    let bound = bind(&dir, &socket)?;
    // A daemon that nobody is told of would stay for ever.
    let reply = write_address(&bundle, &socket).and_then(|()| bootstrap::reply(&input, &bundle, &socket));
    let undo = || {
        for path in [&bundle.join(ADDRESS), &socket] {
            let _ = std::fs::remove_file(path);
        }
    };
    let reply = reply.inspect_err(|_| bound.iter().for_each(|_| undo()))?;
    if let Some(listener) = bound {
        match daemon(&options.shim_cgroup) {
            Ok(Side::Child) => return Ok(Some(Daemon { bundle, listener, events: params.containerd_ttrpc_address })),
            Ok(Side::Parent(..)) => {}
            Err(err) => {
                undo();
                return Err(err);
            }
        }
    }
    std::io::stdout().write_all(&reply).map(|()| None).map_err(|e| Error::io("write the address", &e))
}

/// Binds the group's socket; None when a daemon listens there already. A lock on the directory keeps two from both
/// finding it dead, and goes away with this function.
fn bind(dir: &Path, socket: &Path) -> Result<Option<UnixListener>> {
    let name = dir.display().to_string();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| Error::io(format!("make socket directory {name:?}"), &e))?;
    let opened = std::fs::File::open(dir).map_err(|e| Error::io(format!("open {name:?}"), &e))?;
    let _lock = Flock::lock(opened, FlockArg::LockExclusive)
        .map_err(|(_, errno)| Error::sys(format!("lock {name:?}"), errno))?;
    let old = umask(Mode::from_bits_truncate(0o177));
    let bound = bind_locked(socket);
    umask(old);
    bound.map_err(|e| Error::io(format!("bind {:?}", socket.display().to_string()), &e))
}

fn bind_locked(socket: &Path) -> std::io::Result<Option<UnixListener>> {
    match UnixListener::bind(socket) {
        Err(err) if err.kind() == std::io::ErrorKind::AddrInUse => {}
        other => return other.map(Some),
    }
    match UnixStream::connect(socket) {
        Ok(_) => Ok(None),
        // Its shim was killed.
        Err(_) if std::fs::symlink_metadata(socket)?.file_type().is_socket() => {
            std::fs::remove_file(socket)?;
            UnixListener::bind(socket).map(Some)
        }
        Err(err) => Err(err),
    }
}

/// Makes the daemon's process: a copy of this one, ready to serve.
fn daemon(shim_cgroup: &str) -> Result<Side> {
    oom_score()?;
    if std::env::var("SCHED_CORE").is_ok_and(|value| !value.is_empty()) {
        sys::core_scheduling().map_err(|errno| Error::sys("SCHED_CORE: make a core scheduling cookie", errno))?;
    }
    let side = clone3(0, None).map_err(|errno| Error::sys("clone the daemon", errno))?;
    if let Side::Parent(pid, _) = &side
        && !shim_cgroup.is_empty()
        && let Err(err) = move_to_cgroup(*pid, shim_cgroup)
    {
        if let Side::Parent(_, pidfd) = &side {
            let _ = skiff::sys::clone::pidfd_kill(pidfd.as_fd(), libc::SIGKILL);
        }
        return Err(err);
    }
    Ok(side)
}

impl Daemon {
    /// Detaches from containerd, and serves to its end. It runs from where no container can write to it already.
    pub fn run(self, args: &Args) -> Result<()> {
        // A program that was run by a descriptor is named after its number by older kernels.
        let _ = nix::sys::prctl::set_name(c"containerd-shim");
        let _ = nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0));
        // containerd reads the reply until its last writer is gone.
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        let null = null.map_err(|e| Error::io("open \"/dev/null\"", &e))?;
        for number in 0..3 {
            sys::place_fd(null.as_fd(), number).map_err(|errno| Error::sys("detach", errno))?;
        }
        drop(null);
        sys::close_others(&mut [self.listener.as_raw_fd()]).map_err(|errno| Error::sys("detach", errno))?;
        let events = Some(self.events).filter(|address| !address.is_empty());
        serve::run(args, &self.bundle, self.listener, events.or_else(events_address))
    }
}

fn events_address() -> Option<String> {
    std::env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty())
}

/// One more than the parent's, so that the kernel takes shims before containerd.
fn oom_score() -> Result<()> {
    let parent = format!("/proc/{}/oom_score_adj", nix::unistd::getppid());
    let Some(score) = std::fs::read_to_string(parent).ok().and_then(|text| text.trim().parse::<i32>().ok()) else {
        return Ok(());
    };
    let score = (score + 1).min(1000);
    match std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        // Lowering needs a privilege that a shim may not have.
        Err(err) if err.kind() != std::io::ErrorKind::PermissionDenied => {
            Err(Error::io(format!("set oom_score_adj to {score}"), &err))
        }
        _ => Ok(()),
    }
}

/// ShimCgroup: an existing cgroup, in every hierarchy.
fn move_to_cgroup(pid: i32, cgroup: &str) -> Result<()> {
    let host = skiff::host::Cgroups::read()?;
    let pure_v2 = host.pure_v2();
    for hierarchy in host.v1.iter().chain(host.v2.iter().filter(|_| pure_v2)) {
        let dir = hierarchy.mountpoint.join(cgroup.trim_start_matches('/'));
        let path = dir.join("cgroup.procs");
        if !dir.is_dir() {
            let text = format!("options ShimCgroup: cgroup {:?} does not exist", dir.display().to_string());
            return Err(Error::new(Kind::NotFound, text));
        }
        std::fs::write(&path, pid.to_string())
            .map_err(|e| Error::io(format!("options ShimCgroup: write {:?}", path.display().to_string()), &e))?;
    }
    Ok(())
}

/// containerd 1.x finds the shim by this file when it has been restarted.
fn write_address(bundle: &Path, socket: &Path) -> Result<()> {
    let (temporary, path) = (bundle.join(format!(".address.{}", std::process::id())), bundle.join(ADDRESS));
    let write = || -> std::io::Result<()> {
        std::fs::write(&temporary, format!("unix://{}", socket.display()))?;
        std::fs::rename(&temporary, &path)
    };
    write().map_err(|e| Error::io(format!("write {:?}", path.display().to_string()), &e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_live_socket_is_joined_and_a_dead_one_replaced() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("s");
        let socket = dir.join("x");
        let first = bind(&dir, &socket).unwrap().expect("nobody listens yet");
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(bind(&dir, &socket).unwrap().is_none());
        drop(first);
        assert_eq!(UnixStream::connect(&socket).unwrap_err().raw_os_error(), Some(libc::ECONNREFUSED));
        assert!(bind(&dir, &socket).unwrap().is_some());
    }

    #[test]
    fn a_file_in_the_way_is_not_removed() {
        let base = tempfile::tempdir().unwrap();
        let socket = base.path().join("x");
        std::fs::write(&socket, "precious").unwrap();
        assert!(bind(base.path(), &socket).is_err());
        assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
    }
}
