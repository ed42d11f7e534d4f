//! Checkpoint and restore by criu(8), over its service protocol. Does not live here: what is dumped and restored of a
//! container (container), the encoding (wire).

mod wire;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair};

pub use wire::{Message, Response};

use crate::launch::Process;
use crate::{Error, Kind, Result};

/// criu_req_type: a dump that ends the container.
pub const DUMP: u64 = 1;
/// criu_req_type: a restore.
pub const RESTORE: u64 = 2;
/// criu_req_type: a dump of memory alone, before the real one.
pub const PRE_DUMP: u64 = 4;
/// criu_req_type: CRIU tells of a step and waits.
pub const NOTIFY: u64 = 6;
/// A larger answer is none.
const MAX_RESPONSE: usize = 40 << 10;
/// The file in the image directory that says what the standard streams were.
pub const DESCRIPTORS: &str = "descriptors.json";
/// The annotation that names a configuration file for CRIU.
const CONFIG: &str = "org.criu.config";
/// What is read when that annotation is missing.
const DEFAULT_CONFIG: &str = "/etc/criu/runc.conf";

/// What a caller may ask of a dump or a restore; the names are those of runc's flags.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the images are.
    pub images: PathBuf,
    /// Where CRIU logs and keeps its own files; None is with the images.
    pub work: Option<PathBuf>,
    /// Images of an earlier pre-dump, relative to the images.
    pub parent: Option<PathBuf>,
    /// The container runs on after a dump.
    pub leave_running: bool,
    /// Open TCP connections are dumped and restored.
    pub tcp_established: bool,
    /// Connections that are being made are left out.
    pub tcp_skip_in_flight: bool,
    /// Unlinked files are linked again.
    pub link_remap: bool,
    /// Unix sockets may lead out of the container.
    pub external_unix_sockets: bool,
    /// The terminal's session is not the container's own.
    pub shell_job: bool,
    /// File locks are dumped and restored.
    pub file_locks: bool,
    /// Memory alone, the container runs on.
    pub pre_dump: bool,
    /// Memory that a later dump has again is taken out of the earlier one.
    pub auto_dedup: bool,
    /// Memory is fetched when it is used.
    pub lazy_pages: bool,
    /// Gets a zero byte when the server of lazy pages listens.
    pub status_fd: Option<RawFd>,
    /// Address and port of a page server.
    pub page_server: Option<(String, u16)>,
    /// soft, full, strict or ignore.
    pub cgroups_mode: Option<String>,
    /// CLONE_NEW* of namespaces that are made but not filled.
    pub empty_namespaces: u64,
    /// TYPE:NAME of the profile to restore under.
    pub lsm_profile: Option<String>,
    /// The SELinux context of restored mounts.
    pub lsm_mount_context: Option<String>,
}

impl Options {
    /// criu_cg_mode.
    pub fn mode(&self) -> Result<u64> {
        Ok(match self.cgroups_mode.as_deref() {
            None | Some("") => 6,
            Some("ignore") => 0,
            Some("soft") => 3,
            Some("full") => 4,
            Some("strict") => 5,
            Some(other) => {
                return Err(Error::invalid(
                    "manage-cgroups-mode",
                    format!("{other:?} is not soft, full, strict, ignore"),
                ));
            }
        })
    }

    /// The options that dump and restore share. `root` is the rootfs.
    pub fn request(&self, files: &Files, root: &Path, log: &str, config: Option<&str>) -> Result<Message> {
        let mut opts = Message::default();
        opts.number(1, files.images.as_raw_fd() as u64)
            .number(9, 4)
            .text(10, log)
            .flag(12, true)
            .bytes(13, root.as_os_str().as_encoded_bytes())
            .flag(4, self.external_unix_sockets)
            .flag(5, self.tcp_established)
            .flag(7, self.shell_job)
            .flag(8, self.file_locks)
            .flag(16, self.auto_dedup)
            .flag(24, true)
            .number(34, self.mode()?)
            .number(38, self.empty_namespaces)
            .flag(48, self.lazy_pages)
            .flag(50, true);
        if let Some(work) = &files.work {
            opts.number(17, work.as_raw_fd() as u64);
        }
        match config {
            Some("") => {}
            Some(path) => {
                opts.text(51, path);
            }
            None if Path::new(DEFAULT_CONFIG).exists() => {
                opts.text(51, DEFAULT_CONFIG);
            }
            None => {}
        }
        Ok(opts)
    }

    /// Opens the directories; CRIU reaches them through /proc.
    pub fn open(&self, make: bool) -> Result<Files> {
        let open = |dir: &Path, make: bool| -> Result<OwnedFd> {
            let name = dir.display().to_string();
            if make {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .create(dir)
                    .map_err(|e| Error::io(format!("make {name:?}"), &e))?;
            }
            let file = std::fs::File::open(dir).map_err(|e| Error::io(format!("open {name:?}"), &e))?;
            Ok(file.into())
        };
        let work = self.work.as_deref().map(|dir| open(dir, true)).transpose()?;
        Ok(Files { images: open(&self.images, make)?, work })
    }

    /// The end of CRIU's log that tells why it failed.
    pub fn why(&self, log: &str) -> String {
        let path = self.work.as_ref().unwrap_or(&self.images).join(log);
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).take(4).collect();
        format!("{} (log file: {})", errors.join("; "), path.display())
    }
}

/// The name of the configuration file that the container's annotations ask for.
pub fn config_of(annotations: &std::collections::BTreeMap<String, String>) -> Option<&str> {
    annotations.get(CONFIG).map(String::as_str)
}

/// The directories of a dump or restore.
#[derive(Debug)]
pub struct Files {
    images: OwnedFd,
    work: Option<OwnedFd>,
}

/// A request of this type with these options.
pub fn request(kind: u64, opts: &Message) -> Message {
    let mut out = Message::default();
    out.number(1, kind).message(2, opts);
    out
}

/// A running criu(8) that serves this process.
#[derive(Debug)]
pub struct Session {
    socket: OwnedFd,
    criu: Process,
}

impl Session {
    /// Starts it. Its standard streams are those that a restored container gets; without any it has none.
    pub fn start(stdio: Option<[OwnedFd; 3]>, inherit: bool, passed: &[&OwnedFd]) -> Result<Session> {
        let fail = |errno| Error::sys("start criu", errno);
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).map_err(fail)?;
        let mut command = Command::new("criu");
        command.arg("swrk").arg(theirs.as_raw_fd().to_string());
        match stdio {
            Some([stdin, stdout, stderr]) => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
            None if inherit => {}
            None => {
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        for fd in passed.iter().copied().chain([&theirs]) {
            crate::sys::process::set_cloexec(fd.as_raw_fd(), false).map_err(fail)?;
        }
        let child = command.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::new(Kind::Unsupported, "start criu: it is not installed"),
            _ => Error::io("start criu", &e),
        })?;
        let pid = child.id() as i32;
        let pidfd = crate::sys::clone::pidfd_open(pid).map_err(fail)?;
        Ok(Session { socket, criu: Process { pid, pidfd } })
    }

    /// Readable when CRIU has said something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.criu.pid
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> Result<()> {
        let sent = send(self.socket.as_raw_fd(), message.encoded(), MsgFlags::MSG_NOSIGNAL);
        sent.map(drop).map_err(|errno| Error::sys("ask criu", errno))
    }

    /// Lets CRIU go on after a notification.
    pub fn go_on(&self) -> Result<()> {
        let mut message = Message::default();
        message.number(1, NOTIFY).flag(3, true);
        self.send(&message)
    }

    /// The next answer and the descriptor that came with it; None when there is none yet.
    pub fn receive(&self) -> Result<Option<(Response, Option<OwnedFd>)>> {
        let mut buf = vec![0; MAX_RESPONSE];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut iov = [std::io::IoSliceMut::new(&mut buf)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut descriptor = None;
        let read = recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut space), flags).map(|message| {
            for control in message.cmsgs().into_iter().flatten() {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    descriptor = fds.first().and_then(|fd| crate::sys::process::take_fd(*fd).ok());
                }
            }
            message.bytes
        });
        match read {
            Ok(0) => Err(Error::new(Kind::System, "criu has ended without an answer")),
            Ok(n) => Ok(Some((Response::decode(&buf[..n])?, descriptor))),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(Error::sys("read criu's answer", errno)),
        }
    }

    /// Waits for the end of CRIU, which comes when its work is done.
    pub fn finish(self) -> Result<()> {
        let Session { socket, criu } = self;
        let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        criu.wait().map(drop)
    }

    /// Ends it in the middle of its work, and waits for its end if asked to.
    pub fn abort(self, wait: bool) {
        if wait { self.criu.discard() } else { self.criu.abandon() }
    }
}

/// The error of an answer that says that a dump or restore failed.
pub fn failed(what: &str, response: &Response, why: &str) -> Error {
    let message = if response.message.is_empty() { String::new() } else { format!(": {}", response.message) };
    let text = format!("criu failed: type {what} errno {}{message}: {why}", response.errno);
    Error::new(Kind::System, text)
}
