//! The parent side of a birth: clone, handshake, id maps. Does not live here: what the child does (child).

pub mod chore;
pub mod describe;
pub mod exec;
pub mod hang;
mod hints;
mod id_maps;
pub mod idmap;
pub mod init;
pub mod listener;
pub mod net_devices;
pub mod opening;
pub mod pod;
pub mod programs;
pub mod seccomp;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Instant, SystemTime};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use crate::child::report::{Failure, MAX_RECORD, Record};
use crate::error::PROCESS_ALREADY_FINISHED;
use crate::sys::clone::{pidfd_kill, setns};
use crate::{Error, Kind, Result};

/// Something under way that the caller drives: wait until `fd()` is readable or `deadline()` has passed, then call
/// `advance()`. The command line polls; the shim awaits. `fd()` may be another one after each `advance()`.
pub trait Pending {
    /// What it ends in.
    type Output;
    /// Readable when `advance` can do something.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Nothing is of interest before the other end of `fd()` is closed: who waits need not wake up earlier.
    fn until_closed(&self) -> bool {
        false
    }
    /// When to call `advance` at the latest.
    fn deadline(&self) -> Option<Instant>;
    /// Does what can be done without blocking; `None` when it has to wait again. After an error everything it had
    /// made is taken back.
    fn advance(&mut self) -> Result<Option<Self::Output>>;
}

impl<P: Pending> Pending for &mut P {
    type Output = P::Output;

    fn fd(&self) -> BorrowedFd<'_> {
        (**self).fd()
    }

    fn until_closed(&self) -> bool {
        (**self).until_closed()
    }

    fn deadline(&self) -> Option<Instant> {
        (**self).deadline()
    }

    fn advance(&mut self) -> Result<Option<P::Output>> {
        (**self).advance()
    }
}

/// Drives a [`Pending`] to its end with poll(2). For synchronous callers.
pub fn block_on<P: Pending>(mut pending: P) -> Result<P::Output> {
    loop {
        if let Some(output) = pending.advance()? {
            return Ok(output);
        }
        let events = if pending.until_closed() { PollFlags::empty() } else { PollFlags::POLLIN };
        wait_for(pending.fd(), events, pending.deadline())?;
    }
}

/// Waits until `fd` is readable (or its other end is closed) or the deadline has passed.
pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> Result<()> {
    wait_for(fd, PollFlags::POLLIN, deadline)
}

fn wait_for(fd: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> Result<()> {
    let timeout = match deadline {
        Some(at) => {
            let left = at.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
        None => PollTimeout::NONE,
    };
    match poll(&mut [PollFd::new(fd, events)], timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(Error::sys("poll", errno)),
    }
}

/// True when the process of a pidfd has exited, reaped or not.
pub fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// A live child of this process. Its exit is collected with [`Process::try_wait`].
#[derive(Debug)]
pub struct Process {
    /// The pid in this process's pid namespace.
    pub pid: i32,
    /// Readable when the process has exited.
    pub pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + signal number.
    pub status: u32,
    /// When it was collected.
    pub at: SystemTime,
}

impl Process {
    /// The exit if it has exited: waitid(P_PIDFD, WEXITED | WNOHANG). Only the parent can ask.
    pub fn try_wait(&self) -> Result<Option<Exit>> {
        self.collect(libc::WNOHANG)
    }

    /// Waits for the exit. For callers that may block.
    pub fn wait(&self) -> Result<Exit> {
        loop {
            if let Some(exit) = self.collect(0)? {
                return Ok(exit);
            }
        }
    }

    fn collect(&self, flags: libc::c_int) -> Result<Option<Exit>> {
        match crate::sys::process::wait_exit(self.pidfd.as_fd(), flags) {
            Ok(status) => Ok(status.map(|status| Exit { status, at: SystemTime::now() })),
            Err(Errno::EINTR) => Ok(None),
            Err(errno) => Err(Error::sys(format!("wait for process {}", self.pid), errno)),
        }
    }

    /// Sends `signal` through the pidfd. `Kind::NotFound` with [`PROCESS_ALREADY_FINISHED`] when it has exited.
    pub fn kill(&self, signal: i32) -> Result<()> {
        match pidfd_kill(self.pidfd.as_fd(), signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(Error::new(Kind::NotFound, PROCESS_ALREADY_FINISHED)),
            Err(errno) => Err(Error::sys(format!("send signal {signal} to process {}", self.pid), errno)),
        }
    }

    /// Kills it and waits for nothing: in the middle of a system call that hangs it dies after that. Who has many children
    /// reaps what nobody waits for; others end soon.
    pub fn abandon(&self) {
        let _ = pidfd_kill(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = self.try_wait();
    }

    /// Kills and reaps it: a birth that failed.
    pub(crate) fn discard(&self) {
        let _ = pidfd_kill(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = self.wait();
    }
}

/// The parent's end of a report socket or FIFO.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
    socket: bool,
    execing: bool,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What came over a channel.
#[derive(Debug)]
enum Message {
    /// Nothing yet.
    Later,
    /// A record, and the descriptor that came with it.
    Record(Record, Option<OwnedFd>),
    /// The end after `Execing`: execve succeeded.
    Executed,
    /// The end without a word.
    Lost,
}

impl Channel {
    /// A socket pair: the parent's channel and the child's end.
    pub fn pair() -> Result<(Channel, OwnedFd)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (parent, child) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|errno| Error::sys("make report socket", errno))?;
        Ok((Channel { fd: parent, socket: true, execing: false }, child))
    }

    /// On the read end of a FIFO that was opened without blocking.
    pub fn fifo(fd: OwnedFd) -> Channel {
        Channel { fd, socket: false, execing: false }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Starts an init that waits at this socket.
    pub fn open_gate(&self) -> Result<()> {
        self.go()
    }

    /// Lets the child go on.
    fn go(&self) -> Result<()> {
        self.go_with(&[])
    }

    /// The same, with descriptors that it is to have.
    fn go_with(&self, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if fds.is_empty() { &[] } else { &rights[..] };
        // A child that has died meanwhile is reported by the records or their end.
        let word = [std::io::IoSlice::new(&[0])];
        match sendmsg::<()>(self.fd.as_raw_fd(), &word, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) | Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(()),
            Err(errno) => Err(Error::sys("tell the child to go on", errno)),
        }
    }

    fn receive(&mut self) -> Result<Message> {
        let mut buf = [0u8; MAX_RECORD];
        let mut descriptor = None;
        let mut receive = || {
            let mut space = cmsg_space!([i32; 1]);
            let mut iov = [std::io::IoSliceMut::new(&mut buf)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            recvmsg::<()>(self.fd.as_raw_fd(), &mut iov, Some(&mut space), flags).map(|message| {
                for control in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(fds) = control {
                        descriptor = fds.first().and_then(|fd| crate::sys::process::take_fd(*fd).ok());
                    }
                }
                message.bytes
            })
        };
        let read = match self.socket {
            // Told once, and before what has come, when the child died with a word of ours unread (unix(7)).
            true => receive().or_else(|errno| if errno == Errno::ECONNRESET { receive() } else { Err(errno) }),
            false => nix::unistd::read(&self.fd, &mut buf),
        };
        let n = match read {
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Message::Later),
            Err(Errno::ECONNRESET) => 0,
            Err(errno) => return Err(Error::sys("read the child's report", errno)),
        };
        let mut bytes = &buf[..n];
        // A FIFO has no message boundaries: a failed execve may follow the announcement in one read.
        if !self.socket && bytes.len() > 1 && bytes[0] == Record::Execing.encode()[0] {
            self.execing = true;
            bytes = &bytes[1..];
        }
        if bytes.is_empty() {
            return Ok(if self.execing { Message::Executed } else { Message::Lost });
        }
        let record = Record::decode(bytes).ok_or_else(|| Error::new(Kind::System, "child's report is not readable"))?;
        self.execing |= record == Record::Execing;
        Ok(Message::Record(record, descriptor))
    }

    /// Waits for the start to succeed or fail. None: not yet.
    pub(crate) fn executed(&mut self) -> Result<Option<std::result::Result<(), Option<Failure>>>> {
        loop {
            match self.receive()? {
                Message::Later => return Ok(None),
                Message::Executed => return Ok(Some(Ok(()))),
                Message::Lost => return Ok(Some(Err(None))),
                Message::Record(Record::Failed(failure), _) => return Ok(Some(Err(Some(failure)))),
                Message::Record(..) => {}
            }
        }
    }
}

/// Namespaces that a process enters only by its birth: this process points at them for the length of a clone.
#[derive(Debug, Default)]
struct Aim {
    restore: Vec<(OwnedFd, u64)>,
}

impl Aim {
    /// Children are born into the pid namespace of `fd`, a namespace file or a pidfd.
    fn at_pid_namespace(&mut self, fd: BorrowedFd<'_>) -> nix::Result<()> {
        let own = own_namespace(c"/proc/self/ns/pid")?;
        setns(fd, libc::CLONE_NEWPID as u64)?;
        self.restore.push((own, libc::CLONE_NEWPID as u64));
        Ok(())
    }

    /// Children are born into a new time namespace with these offsets.
    fn at_new_time_namespace(&mut self, offsets: &str) -> nix::Result<()> {
        let own = own_namespace(c"/proc/self/ns/time")?;
        crate::sys::clone::unshare(crate::sys::clone::CLONE_NEWTIME)?;
        self.restore.push((own, crate::sys::clone::CLONE_NEWTIME));
        crate::sys::clone::set_time_offsets(offsets)
    }

    /// Back to this process's own namespaces.
    fn done(mut self) -> nix::Result<()> {
        std::mem::take(&mut self.restore).iter().try_for_each(|(fd, kind)| setns(fd.as_fd(), *kind))
    }
}

impl Drop for Aim {
    /// Also where a birth has failed on its way: what this process clones next is not for that container.
    fn drop(&mut self) {
        for (fd, kind) in &self.restore {
            if let Err(errno) = setns(fd.as_fd(), *kind) {
                log::error!("return to the runtime's namespaces: {}", crate::error::errno_text(errno));
            }
        }
    }
}

fn own_namespace(path: &std::ffi::CStr) -> nix::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
}

/// The process behind a pidfd that a child sent: one that it has cloned to this same parent.
fn adopted(pidfd: OwnedFd) -> Result<Option<Process>> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let info = std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path:?}"), &e))?;
    let pid: Option<i32> = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    Ok(pid.filter(|pid| *pid > 0).map(|pid| Process { pid, pidfd }))
}

/// A lower score needs a right that `lenient` callers may lack; the process then keeps the caller's.
fn set_oom_score(pid: i32, score: i32, lenient: bool) -> Result<()> {
    match write_proc(pid, "oom_score_adj", &score.to_string()) {
        Err(err) if lenient && matches!(err.errno(), Some(Errno::EACCES | Errno::EPERM)) => Ok(()),
        other => other.map_err(|err| err.context(format!("process.oomScoreAdj: set {score}"))),
    }
}

/// Writes `text` to a file of a process in /proc that this process has just made.
fn write_proc(pid: i32, name: &str, text: &str) -> Result<()> {
    use std::io::Write;
    let path = format!("/proc/{pid}/{name}");
    let mut file =
        std::fs::OpenOptions::new().write(true).open(&path).map_err(|e| Error::io(format!("open {path:?}"), &e))?;
    file.write_all(text.as_bytes()).map_err(|e| Error::io(format!("write {:?} to {path:?}", text.trim_end()), &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_channel_means_success_only_after_execing() {
        let (mut channel, child) = Channel::pair().unwrap();
        assert!(channel.executed().unwrap().is_none());
        nix::unistd::write(&child, &Record::Execing.encode()).unwrap();
        assert!(channel.executed().unwrap().is_none());
        drop(child);
        assert_eq!(channel.executed().unwrap(), Some(Ok(())));

        let (mut channel, child) = Channel::pair().unwrap();
        drop(child);
        assert_eq!(channel.executed().unwrap(), Some(Err(None)));
    }

    #[test]
    fn a_failure_after_execing_on_a_fifo_is_a_failure() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let failure = Failure::new(crate::child::report::Step::Execve, 0, Errno::ENOEXEC);
        let records = [Record::Execing.encode(), Record::Failed(failure.clone()).encode()].concat();
        nix::unistd::write(&write, &records).unwrap();
        assert_eq!(Channel::fifo(read).executed().unwrap(), Some(Err(Some(failure))));
    }
}
