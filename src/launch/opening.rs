//! Opens in a child what may lie on a server that hangs: the descriptors come back over a socket, one by one.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use super::chore::{self, Term};
use super::{Pending, Process};
use crate::sys::process as sys;
use crate::{Error, Kind, Result};

/// Things that are being opened. Dropped before its end, the child is killed.
#[derive(Debug)]
pub struct Opening {
    process: Process,
    socket: OwnedFd,
    opened: Vec<OwnedFd>,
    /// The names of the things, for the error of one that hangs.
    names: Vec<String>,
    limit: Duration,
    term: Term,
}

/// Why something could not be opened.
#[derive(Debug)]
pub enum Failed {
    /// Its place in the list, and the errno.
    Errno(usize, Errno),
    /// Anything else.
    Error(Error),
}

/// Opens these things, each with a name for errors, within `limit` each.
pub fn begin<T>(
    things: &[T],
    names: Vec<String>,
    limit: Duration,
    open: impl Fn(&T) -> nix::Result<OwnedFd>,
) -> Result<Opening> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (socket, end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(|errno| Error::sys("open files: make a socket", errno))?;
    let process = chore::fork(end, |end| {
        let mut done = sys::close_others(&mut [end.as_raw_fd()]);
        for thing in things {
            let opened = done.and_then(|()| open(thing));
            if send(&end, &opened).is_err() || opened.is_err() {
                return;
            }
            done = Ok(());
        }
    })?;
    let term = Term::new(names.first().cloned().unwrap_or_default(), limit);
    Ok(Opening { process, socket, opened: Vec::new(), names, limit, term })
}

fn send(end: &OwnedFd, opened: &nix::Result<OwnedFd>) -> nix::Result<()> {
    let (errno, fds) = match opened {
        Ok(fd) => (0, vec![fd.as_raw_fd()]),
        Err(errno) => (*errno as i32, Vec::new()),
    };
    let (bytes, rights) = (errno.to_ne_bytes(), [ControlMessage::ScmRights(&fds)]);
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    sendmsg::<()>(end.as_raw_fd(), &[std::io::IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

impl Opening {
    fn receive(&mut self) -> nix::Result<Option<nix::Result<OwnedFd>>> {
        let (mut bytes, mut space) = ([0; 4], cmsg_space!([i32; 1]));
        let mut iov = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            other => other?,
        };
        let mut fd = None;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                fd = fds.first().and_then(|fd| sys::take_fd(*fd).ok());
            }
        }
        if message.bytes < 4 {
            // It has ended without a word.
            return Err(Errno::EPIPE);
        }
        let errno = i32::from_ne_bytes(bytes);
        Ok(Some(if errno == 0 { fd.ok_or(Errno::EBADF) } else { Err(Errno::from_raw(errno)) }))
    }

    /// Does what can be done without blocking; the descriptors, when all are there.
    pub fn poll(&mut self) -> std::result::Result<Option<Vec<OwnedFd>>, Failed> {
        while self.opened.len() < self.names.len() {
            match self.receive() {
                Ok(Some(Ok(fd))) => self.opened.push(fd),
                Ok(Some(Err(errno))) | Err(errno) => return Err(Failed::Errno(self.opened.len(), errno)),
                Ok(None) => return self.term.check(&self.process).map(|()| None).map_err(Failed::Error),
            }
            if let Some(name) = self.names.get(self.opened.len()) {
                self.term = Term::new(name.clone(), self.limit);
            }
        }
        Ok(Some(std::mem::take(&mut self.opened)))
    }
}

impl Pending for Opening {
    type Output = Vec<OwnedFd>;

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.term.deadline())
    }

    fn advance(&mut self) -> Result<Option<Vec<OwnedFd>>> {
        self.poll().map_err(|failed| match failed {
            Failed::Errno(at, errno) => match self.names.get(at) {
                Some(name) => Error::sys(name, errno),
                None => Error::new(Kind::System, "open files: the child has ended"),
            },
            Failed::Error(err) => err,
        })
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        chore::kill(&self.process);
    }
}
