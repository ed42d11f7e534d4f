//! sd_notify(3) from a container: its messages go through a socket in the state directory, with its pid put right.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Spec;
use serde_json::json;
use skiff::container::{Container, NOTIFY};
use skiff::{Error, Result};

const INSIDE: &str = "/run/notify";
const SOCKET: &str = "notify.sock";

/// The socket that the caller wants to be notified at.
pub fn wanted() -> Option<PathBuf> {
    std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()).map(PathBuf::from)
}

/// Gives the container a socket to notify, at `state_dir/notify`.
pub fn add(spec: &mut Spec, state_dir: &Path) -> Result<()> {
    let source = state_dir.join(NOTIFY);
    let mount = json!({"destination": INSIDE, "type": "bind", "source": source,
        "options": ["bind", "nosuid", "noexec", "nodev", "ro"]});
    let mount = serde_json::from_value(mount).map_err(|e| Error::invalid("notify socket", e))?;
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        env.push(format!("NOTIFY_SOCKET={INSIDE}/{SOCKET}"));
        process.set_env(Some(env));
    }
    Ok(())
}

/// The container's socket, before it is started.
#[derive(Debug)]
pub struct Relay {
    inside: UnixDatagram,
    host: PathBuf,
}

impl Relay {
    /// Binds it, if the caller wants to be notified and the container was created with a directory for it.
    pub fn bind(container: &Container) -> Result<Option<Relay>> {
        let (Some(host), dir) = (wanted(), container.state_dir().join(NOTIFY)) else { return Ok(None) };
        let Ok(opened) = std::fs::File::open(&dir) else { return Ok(None) };
        // A path of the descriptor, because the real one may be too long for a socket.
        let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd()));
        let fail = |e: std::io::Error| Error::io(format!("bind {:?}", dir.join(SOCKET).display().to_string()), &e);
        let inside = UnixDatagram::bind(&path).map_err(fail)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).map_err(fail)?;
        Ok(Some(Relay { inside, host }))
    }

    /// Waits for READY=1 and passes it on with the pid on this host; ends also with the container.
    pub fn run(&self, init: &OwnedFd, pid: i32) -> Result<()> {
        let mut buf = [0u8; 4096];
        loop {
            let mut fds =
                [PollFd::new(self.inside.as_fd(), PollFlags::POLLIN), PollFd::new(init.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Error::sys("poll", errno)),
            }
            if fds[0].any().unwrap_or(false) {
                let n = self.inside.recv(&mut buf).map_err(|e| Error::io("read the notify socket", &e))?;
                if buf[..n].split(|b| *b == b'\n').any(|line| line == b"READY=1") {
                    return self.ready(pid);
                }
            } else if fds[1].any().unwrap_or(false) {
                return Ok(());
            }
        }
    }

    fn ready(&self, pid: i32) -> Result<()> {
        let name = self.host.display().to_string();
        let out = UnixDatagram::unbound().map_err(|e| Error::io("make a socket", &e))?;
        let message = format!("READY=1\nMAINPID={pid}\n");
        let sent = match name.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                std::os::unix::net::SocketAddr::from_abstract_name(name)
                    .and_then(|address| out.send_to_addr(message.as_bytes(), &address))
            }
            None => out.send_to(message.as_bytes(), &self.host),
        };
        sent.map(drop).map_err(|e| Error::io(format!("notify {name:?}"), &e))
    }
}
