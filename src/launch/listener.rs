//! Hands the notification descriptor of a seccomp filter to the agent that listens at `linux.seccomp.listenerPath`.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

use crate::plan::seccomp::Listener;
use crate::sys::clone::pidfd_getfd;
use crate::{Error, Result};

/// An agent that has stopped taking connections is no reason to wait: EAGAIN.
fn connect_at_once(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// Takes descriptor `number` of the process and sends it, with the container process state (runtime spec,
/// config-linux.md, "The Container Process State") on the first message.
pub fn hand_over(
    process: BorrowedFd<'_>,
    number: i32,
    listener: &Listener,
    pid: i32,
    state: &serde_json::Map<String, serde_json::Value>,
) -> Result<()> {
    let name = listener.path.display().to_string();
    let fd = pidfd_getfd(process, number).map_err(|errno| Error::sys("linux.seccomp: take the listener", errno))?;
    let stream = connect_at_once(&listener.path).map_err(|errno| {
        Error::sys(format!("linux.seccomp.listenerPath: failed to connect with seccomp agent {name:?}"), errno)
    })?;
    let message = serde_json::json!({
        "ociVersion": crate::container::OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": listener.metadata,
        "state": state,
    });
    let bytes = message.to_string().into_bytes();
    let fds: [RawFd; 1] = [fd.as_raw_fd()];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    sent.map(drop).map_err(|errno| Error::sys(format!("linux.seccomp.listenerPath: send to {name:?}"), errno))
}
