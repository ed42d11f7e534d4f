//! Standard streams between a process and the paths that containerd names. Does not live here: the process (process).
//!
//! Where it is safe the process writes to containerd's FIFOs itself, and nothing is copied: of each the shim keeps a
//! reader, so that a restart of containerd neither breaks the process nor loses what it has written. Everywhere else it
//! gets pipes.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use skiff::launch::chore::{self, Writer};
use skiff::launch::{Pending, opening};
use skiff::{Error, Kind, Result, limits};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::logger::Logger;
use crate::process::settle;

/// Most that one splice moves, bytes: a pipe's default size.
const CHUNK: usize = 64 << 10;

/// The paths of a process's streams as the request names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// Path of a FIFO, or empty.
    pub stdin: String,
    /// Path, `fifo://`, `file://` URI, or empty.
    pub stdout: String,
    /// Path or empty; ignored with a terminal and with `file://`.
    pub stderr: String,
    /// A pty instead of three streams.
    pub terminal: bool,
}

/// The shim's side of a process's streams.
pub struct Io {
    copies: Vec<JoinHandle<()>>,
    /// Our readers of FIFOs that the process has itself.
    direct: Vec<OwnedFd>,
    stdin: Option<JoinHandle<()>>,
    /// Where stdin is to go, until it is opened.
    stdin_pipe: Option<OwnedFd>,
    close_stdin: Rc<Notify>,
    /// Outputs that are not at their end.
    open: watch::Sender<usize>,
    /// The process is being deleted.
    closing: watch::Sender<bool>,
    logger: Option<Logger>,
}

/// Where an output goes, as the request names it.
enum Named {
    Null,
    Fifo(String),
    /// On a file system that may hang: a child looks what it is.
    Far(String),
    /// A file, and whether directories above it are to be made.
    File(String, bool),
}

/// The same, open.
enum Output {
    Null,
    /// Its writer, and a reader of our own.
    Open(OwnedFd, OwnedFd),
    /// Written by the process; a reader of our own.
    Direct(OwnedFd),
    /// A pipe to a logger or to a writer, for a terminal's copy.
    Pipe(OwnedFd),
    /// A child writes to the file what comes through a pipe.
    Written(Writer),
}

impl Named {
    /// Opens it. For a file, the second is the end of the pipe to write to.
    async fn open(self, field: &str) -> Result<(Output, Option<OwnedFd>)> {
        match self {
            Named::Null => Ok((Output::Null, None)),
            Named::Fifo(path) => {
                let opened = tokio::time::timeout(limits::within(limits::OPEN), open_output(&path)).await;
                let opened = opened.map_err(|_| nobody_reads(field, &path))?;
                let (writer, reader) = opened.map_err(|errno| Error::sys(format!("{field}: open {path:?}"), errno))?;
                Ok((Output::Open(writer, reader), None))
            }
            Named::Far(path) => match open_far(field, &path).await? {
                Some((writer, reader)) => Ok((Output::Open(writer, reader), None)),
                None => Box::pin(Named::File(path, false).open(field)).await,
            },
            Named::File(path, make_dirs) => {
                let (read, write) = pipe()?;
                let what = format!("{field}: open {path:?}");
                let mut writer = chore::write_file(what, limits::OPEN, read, Path::new(&path), make_dirs)?;
                settle(&mut writer).await?;
                Ok((Output::Written(writer), Some(write)))
            }
        }
    }
}

fn nobody_reads(field: &str, path: &str) -> Error {
    Error::new(Kind::Timeout, format!("{field}: nobody reads {path:?}"))
}

/// A FIFO that may be on a file system that hangs: a child waits for its reader. None when it is a file.
async fn open_far(field: &str, path: &str) -> Result<Option<(OwnedFd, OwnedFd)>> {
    let open = |writes: &bool| {
        let how = if *writes { OFlag::O_WRONLY } else { OFlag::O_RDONLY | OFlag::O_NONBLOCK };
        if *writes && !std::fs::metadata(path).map_err(errno)?.file_type().is_fifo() {
            return Err(NO_FIFO);
        }
        let fd = nix::fcntl::open(path, how | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?;
        set_nonblocking(&fd)?;
        Ok(fd)
    };
    let name = format!("{field}: open {path:?}");
    let mut opening = opening::begin(&[true, false], vec![name.clone(), name.clone()], limits::OPEN, open)?;
    let opened = loop {
        match opening.poll() {
            Ok(Some(fds)) => break fds,
            Ok(None) => readable(opening.fd(), opening.deadline()).await?,
            Err(opening::Failed::Errno(_, NO_FIFO)) => return Ok(None),
            Err(opening::Failed::Errno(_, errno)) => return Err(Error::sys(name, errno)),
            Err(opening::Failed::Error(err)) => return Err(err),
        }
    };
    let mut fds = opened.into_iter();
    Ok(fds.next().zip(fds.next()))
}

/// What no open of a FIFO says.
const NO_FIFO: Errno = Errno::ESPIPE;

/// Pipes or FIFOs for a process that is to be made.
pub struct Pipes {
    process: [OwnedFd; 3],
    copies: Copies,
}

/// How a process's streams are made.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// User and group who own the process's ends of pipes.
    pub owner: (u32, u32),
    /// FIFOs may be given to the process: nobody who has them outlives its Delete, and no label forbids their use.
    pub direct: bool,
}

/// Who a logger is told that it logs for.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a> {
    /// Container id, or the exec id of an exec process.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
}

fn null(write: bool) -> Result<OwnedFd> {
    let file = OpenOptions::new().read(!write).write(write).open("/dev/null");
    file.map(OwnedFd::from).map_err(|e| Error::io("open \"/dev/null\"", &e))
}

fn set_nonblocking(fd: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// The process's end of an output, our end of a pipe, and where that goes.
async fn stream(field: &str, named: Named, manner: Manner) -> Result<(OwnedFd, Option<OwnedFd>, Output)> {
    match named.open(field).await? {
        (Output::Open(writer, reader), _) if manner.direct => {
            let blocking = fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty()));
            blocking.map_err(|errno| Error::sys(format!("{field}: set up the FIFO"), errno))?;
            Ok((writer, None, Output::Direct(reader)))
        }
        (to, Some(write)) => {
            own(&write, manner.owner)?;
            Ok((write, None, to))
        }
        (Output::Null, None) => Ok((null(true)?, None, Output::Null)),
        (to, None) => {
            let (read, write) = pipe()?;
            own(&write, manner.owner)?;
            set_nonblocking(&read).map_err(|errno| Error::sys("set up a pipe", errno))?;
            Ok((write, Some(read), to))
        }
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC).map_err(|errno| Error::sys("make a pipe", errno))
}

fn own(fd: &OwnedFd, owner: (u32, u32)) -> Result<()> {
    if owner == (0, 0) {
        return Ok(());
    }
    nix::unistd::fchown(fd, Some(owner.0.into()), Some(owner.1.into()))
        .map_err(|errno| Error::sys(format!("give a pipe to {}:{}", owner.0, owner.1), errno))
}

fn name_output(field: &str, uri: &str) -> Result<Named> {
    if uri.is_empty() {
        return Ok(Named::Null);
    }
    let (scheme, path) = match uri.split_once("://") {
        Some((scheme, path)) => (scheme, path),
        None => ("fifo", uri),
    };
    match scheme {
        "fifo" if !at_hand(path) => Ok(Named::Far(path.to_string())),
        "fifo" => match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_fifo() => Ok(Named::Fifo(path.to_string())),
            // Some clients name a plain file.
            Ok(_) => Ok(Named::File(path.to_string(), false)),
            Err(err) => Err(Error::io(format!("{field}: open {path:?}"), &err)),
        },
        "file" => Ok(Named::File(path.to_string(), true)),
        other => Err(Error::invalid(field, format!("unknown STDIO scheme {other:?}"))),
    }
}

/// Nobody has to be waited for to open it. Pipes to streams of containerd have names that mean nothing to a child.
fn at_hand(path: &str) -> bool {
    path.starts_with("/proc/self/fd/")
        || std::ffi::CString::new(path).is_ok_and(|path| skiff::sys::path::is_at_hand_or_in_run(&path))
}

/// Waits until `fd` is readable, or the time is over.
async fn readable(fd: std::os::fd::BorrowedFd<'_>, deadline: Option<Instant>) -> Result<()> {
    let fd = fd.try_clone_to_owned().map_err(|e| Error::io("watch a file being opened", &e))?;
    let fd = watch_fd(fd, Interest::READABLE).map_err(|errno| Error::sys("watch a file being opened", errno))?;
    let deadline = deadline.unwrap_or_else(|| limits::from_now(limits::OPEN));
    let _ = tokio::time::timeout_at(deadline.into(), fd.readable()).await;
    Ok(())
}

impl Pipes {
    /// Makes the pipes, starts a logger or a writer, and waits for them and for the readers of FIFOs: a client that is told
    /// of an exit before it has opened them gives them up.
    pub async fn open(paths: &Paths, manner: Manner, name: Name<'_>) -> Result<Pipes> {
        let (stdin, ours) = if paths.stdin.is_empty() {
            (null(false)?, None)
        } else {
            check_stdin(&paths.stdin).await?;
            let (read, write) = pipe()?;
            own(&read, manner.owner)?;
            set_nonblocking(&write).map_err(|errno| Error::sys("set up a pipe", errno))?;
            (read, Some(write))
        };
        if let Some((mut logger, out, err)) = Logger::start(&paths.stdout, name.id, name.namespace)? {
            own(&out, manner.owner)?;
            own(&err, manner.owner)?;
            logger.ready().await?;
            let copies = Copies { stdin: ours, outputs: Vec::new(), logger: Some(logger) };
            return Ok(Pipes { process: [stdin, out, err], copies });
        }
        let out = name_output("stdout", &paths.stdout)?;
        // With a file both streams go to it.
        let one_file = matches!(&out, Named::File(..)) && paths.stdout.contains("://");
        let err = if one_file { Named::Null } else { name_output("stderr", &paths.stderr)? };
        let (stdout, pipe, to) = stream("stdout", out, manner).await?;
        let mut outputs = vec![(pipe, to)];
        let stderr = if one_file {
            stdout.try_clone().map_err(|e| Error::io("stderr: share the log file", &e))?
        } else {
            let (stderr, pipe, to) = stream("stderr", err, manner).await?;
            outputs.push((pipe, to));
            stderr
        };
        Ok(Pipes { process: [stdin, stdout, stderr], copies: Copies { stdin: ours, outputs, logger: None } })
    }

    /// The process's ends, and the rest.
    pub fn split(self) -> ([OwnedFd; 3], Copies) {
        (self.process, self.copies)
    }
}

/// Streams that are ready to be copied once the process runs.
pub struct Copies {
    stdin: Option<OwnedFd>,
    outputs: Vec<(Option<OwnedFd>, Output)>,
    logger: Option<Logger>,
}

/// The client's stdin FIFO and a writer of our own: without it a client that goes away would end the stream.
pub struct Stdin {
    fifo: OwnedFd,
    holder: OwnedFd,
}

async fn check_stdin(path: &str) -> Result<()> {
    if at_hand(path) {
        return std::fs::metadata(path).map(drop).map_err(|e| Error::io(format!("stdin: open {path:?}"), &e));
    }
    let look = |path: &&str| nix::fcntl::open(*path, OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty());
    settle(opening::begin(&[path], vec![format!("stdin: open {path:?}")], limits::OPEN, look)?).await.map(drop)
}

/// Opens the client's FIFO, in a child if it may hang.
pub async fn open_stdin(path: &str) -> Result<Stdin> {
    let open = |write: &bool| {
        let file = OpenOptions::new().read(!write).write(*write).custom_flags(libc::O_NONBLOCK).open(path);
        file.map(OwnedFd::from).map_err(errno)
    };
    let what = format!("stdin: open {path:?}");
    let fail = |errno| Error::sys(&what, errno);
    if at_hand(path) {
        return Ok(Stdin { fifo: open(&false).map_err(fail)?, holder: open(&true).map_err(fail)? });
    }
    let opening = opening::begin(&[false, true], vec![what.clone(), what.clone()], limits::OPEN, open)?;
    let mut fds = settle(opening).await?.into_iter();
    let both = fds.next().zip(fds.next());
    both.map(|(fifo, holder)| Stdin { fifo, holder }).ok_or_else(|| fail(Errno::EBADF))
}

impl Copies {
    /// Starts the copies.
    pub fn start(self) -> Io {
        let mut io = Io::new();
        for (pipe, output) in self.outputs {
            match (pipe, output) {
                (Some(pipe), output) => {
                    let copy = copy_output(pipe, output, io.closing.subscribe());
                    io.copy("output", copy);
                }
                (None, Output::Direct(reader)) => io.direct.push(reader),
                (None, Output::Written(writer)) => io.writes(writer),
                (None, _) => {}
            }
        }
        io.stdin_pipe = self.stdin;
        io.logger = self.logger;
        io
    }
}

impl Io {
    fn new() -> Io {
        Io {
            copies: Vec::new(),
            direct: Vec::new(),
            stdin: None,
            stdin_pipe: None,
            close_stdin: Rc::new(Notify::new()),
            open: watch::Sender::new(0),
            closing: watch::Sender::new(false),
            logger: None,
        }
    }

    /// Does `copy` in a task of its own, and counts it while it lasts.
    fn count(&self, what: &'static str, copy: impl Future<Output = nix::Result<()>> + 'static) -> JoinHandle<()> {
        self.open.send_modify(|n| *n += 1);
        let open = self.open.clone();
        tokio::task::spawn_local(async move {
            if let Err(errno) = copy.await {
                log::warn!("copy {what}: {}", skiff::error::errno_text(errno));
            }
            open.send_modify(|n| *n -= 1);
        })
    }

    /// The same; it ends with the streams.
    fn copy(&mut self, what: &'static str, copy: impl Future<Output = nix::Result<()>> + 'static) {
        let task = self.count(what, copy);
        self.copies.push(task);
    }

    /// Looks after a writer. It may go on when nobody waits for it any more.
    fn writes(&self, writer: Writer) {
        drop(self.count("output", written(writer, self.closing.subscribe())));
    }

    /// Copies between a pty master and the client's FIFOs, or to a logger.
    pub async fn console(master: OwnedFd, paths: &Paths, name: Name<'_>) -> Result<Io> {
        set_nonblocking(&master).map_err(|errno| Error::sys("set up the terminal", errno))?;
        let mut io = Io::new();
        let again =
            |what: &str| master.try_clone().map_err(|e| Error::io(format!("share the terminal for {what}"), &e));
        if !paths.stdin.is_empty() {
            check_stdin(&paths.stdin).await?;
            io.stdin_pipe = Some(again("stdin")?);
        }
        let output = match Logger::start(&paths.stdout, name.id, name.namespace)? {
            Some((mut logger, out, _)) => {
                logger.ready().await?;
                io.logger = Some(logger);
                Output::Pipe(out)
            }
            None => match name_output("stdout", &paths.stdout)?.open("stdout").await? {
                (Output::Written(writer), Some(pipe)) => {
                    io.writes(writer);
                    Output::Pipe(pipe)
                }
                (output, _) => output,
            },
        };
        if let Output::Pipe(pipe) = &output {
            set_nonblocking(pipe).map_err(|errno| Error::sys("set up a pipe", errno))?;
        }
        let copy = copy_console(master, output, io.closing.subscribe());
        io.copy("terminal", copy);
        Ok(io)
    }

    /// True when there is a stdin that is not open yet.
    pub fn wants_stdin(&self) -> bool {
        self.stdin_pipe.is_some()
    }

    /// Copies the client's stdin. It is not opened before the start: a client that has nothing to say may close it the
    /// moment it is open, and asks for CloseIO only when it has the answer to its Create.
    pub fn copy_stdin(&mut self, stdin: Stdin) {
        if let Some(pipe) = self.stdin_pipe.take() {
            let copy = copy_stdin(stdin, pipe, self.close_stdin.clone());
            self.stdin = Some(tokio::task::spawn_local(copy));
        }
    }

    /// Ends the stdin of the process when the client has written all that it will.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// The process has exited: nobody reads its stdin any more. What it has written and nobody has read yet gets a
    /// writer again, for a client that comes back only now: its opening waits for one.
    pub fn exited(&mut self) {
        if let Some(stdin) = self.stdin.take() {
            stdin.abort();
        }
        for reader in std::mem::take(&mut self.direct) {
            let mut closing = self.closing.subscribe();
            self.copy("output", async move {
                let unread = skiff::sys::tty::unread(reader.as_fd()).is_ok_and(|bytes| bytes > 0);
                let writer = if unread { Some(open_again(&reader)?) } else { None };
                let read = async {
                    if let Some(writer) = writer {
                        all_read(&writer).await;
                    }
                };
                // What it has left running may write on until it is deleted.
                let deleted = async {
                    let _ = closing.wait_for(|closing| *closing).await;
                    drop(reader);
                };
                tokio::join!(read, deleted);
                Ok(())
            });
        }
    }

    /// Waits until all output has been copied, or nobody reads it, or the time is over.
    pub fn drained(&mut self, patience: Duration) -> impl Future<Output = ()> + use<> {
        self.exited();
        self.closing.send_replace(true);
        let mut open = self.open.subscribe();
        async move {
            let _ = tokio::time::timeout(patience, open.wait_for(|n| *n == 0)).await;
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        for copy in self.copies.iter().chain(&self.stdin) {
            copy.abort();
        }
    }
}

/// Opens a FIFO for writing as soon as somebody reads it, and then a reader of our own: it keeps what is written when
/// the other one goes away, and the process from being told.
async fn open_output(path: &str) -> nix::Result<(OwnedFd, OwnedFd)> {
    let mut pause = Duration::from_millis(1);
    loop {
        let opened = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
        match opened {
            Ok(writer) => {
                let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
                let reader = reader.map_err(errno)?;
                return Ok((writer.into(), reader.into()));
            }
            Err(err) if err.raw_os_error() == Some(libc::ENXIO) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(10));
            }
            Err(err) => return Err(errno(err)),
        }
    }
}

/// Another writer of a FIFO that may have lost its name.
fn open_again(reader: &OwnedFd) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
    let writer = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
    writer.map(OwnedFd::from).map_err(errno)
}

fn errno(err: std::io::Error) -> Errno {
    Errno::from_raw(err.raw_os_error().unwrap_or(libc::EIO))
}

/// Watches a descriptor.
#[allow(deprecated, reason = "sound for a type that owns one descriptor for its whole life; the other way is unsafe")]
pub fn watch_fd(fd: OwnedFd, interest: Interest) -> nix::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest).map_err(errno)
}

/// Does `copy` to a FIFO, of which `reader` is our own one: it is given up when the process is deleted, so that a client
/// that has stopped reading is seen to have gone.
async fn to_fifo(
    copy: impl Future<Output = nix::Result<()>>,
    reader: Option<OwnedFd>,
    mut closing: watch::Receiver<bool>,
) -> nix::Result<()> {
    tokio::pin!(copy);
    let mut reader = reader;
    loop {
        tokio::select! {
            result = &mut copy => return match result {
                Err(Errno::EPIPE) => Ok(()),
                other => other,
            },
            _ = closing.wait_for(|closing| *closing), if reader.is_some() => drop(reader.take()),
        }
    }
}

async fn copy_output(pipe: OwnedFd, output: Output, closing: watch::Receiver<bool>) -> nix::Result<()> {
    match output {
        Output::Null | Output::Pipe(_) | Output::Direct(_) | Output::Written(_) => Ok(()),
        Output::Open(writer, reader) => {
            let to = watch_fd(writer, Interest::WRITABLE)?;
            let copy = async {
                move_pages(watch_fd(pipe, Interest::READABLE)?, &to).await?;
                all_read(to.get_ref()).await;
                Ok(())
            };
            to_fifo(copy, Some(reader), closing).await
        }
    }
}

/// splice(2) from pipe to pipe until the end of `from`.
async fn move_pages(from: AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> nix::Result<()> {
    loop {
        let mut readable = from.readable().await.map_err(errno)?;
        let mut writable = to.writable().await.map_err(errno)?;
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        match splice(from.get_ref(), None, to.get_ref(), None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                // splice does not tell which end it was, and either may have changed since: readiness is given up only
                // for an end that is seen not to be ready, as no event would come for one that is.
                if !ready(from.get_ref(), PollFlags::POLLIN) {
                    readable.clear_ready();
                }
                if !ready(to.get_ref(), PollFlags::POLLOUT) {
                    writable.clear_ready();
                }
                tokio::task::yield_now().await;
            }
            Err(errno) => return Err(errno),
        }
    }
}

/// Waits until what is in a FIFO has been read, or there is nobody to read it: closed before that, it would be lost on a
/// client that has not come to its opening yet.
async fn all_read(fifo: &OwnedFd) {
    let mut pause = Duration::from_micros(100);
    while skiff::sys::tty::unread(fifo.as_fd()).is_ok_and(|bytes| bytes > 0) && !ready(fifo, PollFlags::POLLERR) {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

fn ready(fd: &OwnedFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    let polled = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0);
    polled && fds[0].revents().is_some_and(|got| got.intersects(events | PollFlags::POLLERR | PollFlags::POLLHUP))
}

/// Waits until a writer has written all, and long after its process has been deleted not any more.
async fn written(writer: Writer, mut closing: watch::Receiver<bool>) -> nix::Result<()> {
    let fd = writer.process().pidfd.try_clone().map_err(errno)?;
    let exited = watch_fd(fd, Interest::READABLE)?;
    let too_long = async {
        // Until the streams are given up.
        while closing.changed().await.is_ok() {}
        tokio::time::sleep(limits::within(limits::WRITE)).await;
    };
    tokio::select! {
        exited = exited.readable() => drop(exited.map_err(errno)?),
        () = too_long => {}
    }
    Ok(())
}

/// From the client's FIFO to the process, until the process closes it or the client ends it after CloseIO.
async fn copy_stdin(stdin: Stdin, to: OwnedFd, close: Rc<Notify>) {
    let Stdin { fifo, holder } = stdin;
    let mut holder = Some(holder);
    let copy = async move {
        let from = watch_fd(fifo, Interest::READABLE)?;
        let to = watch_fd(to, Interest::WRITABLE)?;
        let mut buffer = vec![0u8; 4 << 10];
        loop {
            let mut guard = from.readable().await.map_err(errno)?;
            let mut file = FdFile(from.get_ref());
            match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => write_all(&to, &buffer[..n]).await?,
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
                Err(err) => return Err(errno(err)),
            }
        }
    };
    tokio::pin!(copy);
    loop {
        tokio::select! {
            result = &mut copy => {
                let result: nix::Result<()> = result;
                match result {
                    Ok(()) | Err(Errno::EPIPE | Errno::EIO) => {}
                    Err(errno) => log::warn!("copy stdin: {}", skiff::error::errno_text(errno)),
                }
                return;
            }
            () = close.notified() => drop(holder.take()),
        }
    }
}

struct FdFile<'a>(&'a OwnedFd);

impl Read for FdFile<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        Ok(nix::unistd::read(self.0, buf)?)
    }
}

/// Writes all of it.
pub async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> nix::Result<()> {
    while !bytes.is_empty() {
        let mut guard = to.writable().await.map_err(errno)?;
        match nix::unistd::write(to.get_ref(), bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EAGAIN) => guard.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

async fn copy_console(master: OwnedFd, output: Output, closing: watch::Receiver<bool>) -> nix::Result<()> {
    match output {
        Output::Null | Output::Direct(_) | Output::Written(_) => copy_terminal(master, To::Null).await,
        Output::Open(writer, reader) => {
            let copy = copy_terminal(master, To::Fifo(watch_fd(writer, Interest::WRITABLE)?));
            to_fifo(copy, Some(reader), closing).await
        }
        Output::Pipe(pipe) => {
            let copy = copy_terminal(master, To::Fifo(watch_fd(pipe, Interest::WRITABLE)?));
            to_fifo(copy, None, closing).await
        }
    }
}

/// Where a terminal's output goes.
enum To {
    Null,
    Fifo(AsyncFd<OwnedFd>),
}

async fn copy_terminal(master: OwnedFd, mut to: To) -> nix::Result<()> {
    let master = watch_fd(master, Interest::READABLE)?;
    let mut buffer = vec![0u8; 8 << 10];
    let mut closed = false;
    loop {
        let mut guard = master.readable().await.map_err(errno)?;
        let read = nix::unistd::read(master.get_ref(), &mut buffer);
        if read == Err(Errno::EIO) && !std::mem::replace(&mut closed, true) {
            // The slave's last user has gone, but the kernel may still be moving what it wrote (n_tty.c: a reader that
            // is told so waits for one run of the worker, which may have asked for another).
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        closed &= read.is_err();
        match read {
            Ok(0) | Err(Errno::EIO) => return Ok(()),
            Ok(n) => match &mut to {
                To::Null => {}
                To::Fifo(fifo) => write_all(fifo, &buffer[..n]).await?,
            },
            Err(Errno::EAGAIN) => guard.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
