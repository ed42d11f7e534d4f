//! Standard streams between a process and the paths that containerd names. Does not live here: the process (process).
//!
//! Where it is safe the process writes to containerd's FIFOs itself, and nothing is copied: of each the shim keeps a
//! reader, so that a restart of containerd neither breaks the process nor loses what it has written. Everywhere else it
//! gets pipes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use skiff::{Error, Kind, Result};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::logger::Logger;

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

/// How long a client may take to open the FIFOs that it has named.
const OPENING: Duration = Duration::from_secs(30);

impl Output {
    async fn open(&mut self, field: &str) -> Result<()> {
        let Output::Fifo(path) = self else { return Ok(()) };
        let opened = tokio::time::timeout(OPENING, open_output(path)).await;
        let opened = opened.map_err(|_| Error::new(Kind::Timeout, format!("{field}: nobody reads {path:?}")))?;
        let (writer, reader) = opened.map_err(|errno| Error::sys(format!("{field}: open {path:?}"), errno))?;
        *self = Output::Open(writer, reader);
        Ok(())
    }
}

enum Output {
    Null,
    Fifo(String),
    /// Its writer, and a reader of our own.
    Open(OwnedFd, OwnedFd),
    /// Written by the process; a reader of our own.
    Direct(OwnedFd),
    File(File),
    /// A pipe to a logger, for a terminal's copy.
    Pipe(OwnedFd),
}

/// Pipes whose one end the process gets, and the other ends for [`Copies`].
pub struct Pipes {
    stdin: (OwnedFd, Option<OwnedFd>),
    outputs: [Stream; 2],
    logger: Option<Logger>,
}

/// An output of the process.
struct Stream {
    /// The process's end; None while it waits to be the FIFO itself.
    process: Option<OwnedFd>,
    /// Our end of a pipe.
    pipe: Option<OwnedFd>,
    to: Output,
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

impl Stream {
    fn new(to: Output, manner: Manner) -> Result<Stream> {
        match &to {
            Output::Null => Ok(Stream { process: Some(null(true)?), pipe: None, to }),
            Output::Fifo(_) if manner.direct => Ok(Stream { process: None, pipe: None, to }),
            _ => {
                let (read, write) = pipe()?;
                own(&write, manner.owner)?;
                set_nonblocking(&read).map_err(|errno| Error::sys("set up a pipe", errno))?;
                Ok(Stream { process: Some(write), pipe: Some(read), to })
            }
        }
    }

    /// For a process that writes to `end` without us.
    fn beside(end: OwnedFd) -> Stream {
        Stream { process: Some(end), pipe: None, to: Output::Null }
    }

    async fn ready(mut self, field: &str) -> Result<(OwnedFd, Option<OwnedFd>, Output)> {
        self.to.open(field).await?;
        match (self.process, self.to) {
            (Some(process), to) => Ok((process, self.pipe, to)),
            (None, Output::Open(writer, reader)) => {
                let blocking = fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty()));
                blocking.map_err(|errno| Error::sys(format!("{field}: set up the FIFO"), errno))?;
                Ok((writer, None, Output::Direct(reader)))
            }
            (None, to) => Ok((null(true)?, None, to)),
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

fn output(field: &str, uri: &str) -> Result<Output> {
    if uri.is_empty() {
        return Ok(Output::Null);
    }
    let (scheme, path) = match uri.split_once("://") {
        Some((scheme, path)) => (scheme, path),
        None => ("fifo", uri),
    };
    match scheme {
        "fifo" => match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_fifo() => Ok(Output::Fifo(path.to_string())),
            // Kept open for a plain file too: some clients name one.
            Ok(_) => append(field, path).map(Output::File),
            Err(err) => Err(Error::io(format!("{field}: open {path:?}"), &err)),
        },
        "file" => {
            if let Some(parent) = Path::new(path).parent() {
                let made = std::fs::create_dir_all(parent);
                made.map_err(|e| Error::io(format!("{field}: make {:?}", parent.display().to_string()), &e))?;
            }
            append(field, path).map(Output::File)
        }
        other => Err(Error::invalid(field, format!("unknown STDIO scheme {other:?}"))),
    }
}

fn append(field: &str, path: &str) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(|e| Error::io(format!("{field}: open {path:?}"), &e))
}

impl Pipes {
    /// Makes the pipes.
    pub fn new(paths: &Paths, manner: Manner, name: Name<'_>) -> Result<Pipes> {
        let stdin = if paths.stdin.is_empty() {
            (null(false)?, None)
        } else {
            check_stdin(&paths.stdin)?;
            let (read, write) = pipe()?;
            own(&read, manner.owner)?;
            set_nonblocking(&write).map_err(|errno| Error::sys("set up a pipe", errno))?;
            (read, Some(write))
        };
        if let Some((logger, out, err)) = Logger::start(&paths.stdout, name.id, name.namespace)? {
            own(&out, manner.owner)?;
            own(&err, manner.owner)?;
            let outputs = [Stream::beside(out), Stream::beside(err)];
            return Ok(Pipes { stdin, outputs, logger: Some(logger) });
        }
        let stdout = output("stdout", &paths.stdout)?;
        let stderr = match &stdout {
            // With a file both streams go to it.
            Output::File(file) if paths.stdout.contains("://") => {
                Output::File(file.try_clone().map_err(|e| Error::io("stderr: share the log file", &e))?)
            }
            _ => output("stderr", &paths.stderr)?,
        };
        let outputs = [Stream::new(stdout, manner)?, Stream::new(stderr, manner)?];
        Ok(Pipes { stdin, outputs, logger: None })
    }

    /// Waits for the logger, if there is one, and for the readers of FIFOs: a client that is told of an exit before it
    /// has opened them gives them up. Returns the process's ends, and the rest.
    pub async fn ready(self) -> Result<([OwnedFd; 3], Copies)> {
        if let Some(logger) = &self.logger {
            logger.ready().await?;
        }
        let [stdout, stderr] = self.outputs;
        let (stdout, pipe, to) = stdout.ready("stdout").await?;
        let mut outputs = vec![(pipe, to)];
        let (stderr, pipe, to) = stderr.ready("stderr").await?;
        outputs.push((pipe, to));
        let (stdin, ours) = self.stdin;
        Ok(([stdin, stdout, stderr], Copies { stdin: ours, outputs, logger: self.logger }))
    }
}

/// Streams that are ready to be copied once the process runs.
pub struct Copies {
    stdin: Option<OwnedFd>,
    outputs: Vec<(Option<OwnedFd>, Output)>,
    logger: Option<Logger>,
}

/// The client's stdin FIFO and a writer of our own: without it a client that goes away would end the stream.
struct Stdin {
    fifo: OwnedFd,
    holder: OwnedFd,
}

fn check_stdin(path: &str) -> Result<()> {
    std::fs::metadata(path).map(drop).map_err(|e| Error::io(format!("stdin: open {path:?}"), &e))
}

fn open_stdin(path: &str) -> Result<Stdin> {
    let open = |write: bool| {
        let file = OpenOptions::new().read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(path);
        file.map(OwnedFd::from).map_err(|e| Error::io(format!("stdin: open {path:?}"), &e))
    };
    Ok(Stdin { fifo: open(false)?, holder: open(true)? })
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
    fn copy(&mut self, what: &'static str, copy: impl Future<Output = nix::Result<()>> + 'static) {
        self.open.send_modify(|n| *n += 1);
        let open = self.open.clone();
        self.copies.push(tokio::task::spawn_local(async move {
            if let Err(errno) = copy.await {
                log::warn!("copy {what}: {}", skiff::error::errno_text(errno));
            }
            open.send_modify(|n| *n -= 1);
        }));
    }

    /// Copies between a pty master and the client's FIFOs, or to a logger.
    pub async fn console(master: OwnedFd, paths: &Paths, name: Name<'_>) -> Result<Io> {
        set_nonblocking(&master).map_err(|errno| Error::sys("set up the terminal", errno))?;
        let mut io = Io::new();
        let again =
            |what: &str| master.try_clone().map_err(|e| Error::io(format!("share the terminal for {what}"), &e));
        if !paths.stdin.is_empty() {
            check_stdin(&paths.stdin)?;
            io.stdin_pipe = Some(again("stdin")?);
        }
        let mut output = match Logger::start(&paths.stdout, name.id, name.namespace)? {
            Some((logger, out, _)) => {
                set_nonblocking(&out).map_err(|errno| Error::sys("set up a pipe", errno))?;
                io.logger = Some(logger);
                Output::Pipe(out)
            }
            None => output("stdout", &paths.stdout)?,
        };
        if let Some(logger) = &io.logger {
            logger.ready().await?;
        }
        output.open("stdout").await?;
        let copy = copy_console(master, output, io.closing.subscribe());
        io.copy("terminal", copy);
        Ok(io)
    }

    /// Opens the client's stdin and copies it. Not before the start: a client that has nothing to say may close it the
    /// moment it is open, and asks for CloseIO only when it has the answer to its Create.
    pub fn open_stdin(&mut self, path: &str) -> Result<()> {
        if let Some(pipe) = self.stdin_pipe.take() {
            let copy = copy_stdin(open_stdin(path)?, pipe, self.close_stdin.clone());
            self.stdin = Some(tokio::task::spawn_local(copy));
        }
        Ok(())
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
        Output::Null | Output::Pipe(_) | Output::Fifo(_) | Output::Direct(_) => Ok(()),
        Output::File(file) => copy_to_file(pipe, file).await,
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

async fn copy_to_file(pipe: OwnedFd, mut file: File) -> nix::Result<()> {
    let pipe = watch_fd(pipe, Interest::READABLE)?;
    let mut buffer = vec![0u8; 16 << 10];
    loop {
        let mut guard = pipe.readable().await.map_err(errno)?;
        match nix::unistd::read(pipe.get_ref(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => file.write_all(&buffer[..n]).map_err(errno)?,
            Err(Errno::EAGAIN) => guard.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
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
        Output::Null | Output::Fifo(_) | Output::Direct(_) => copy_terminal(master, To::Null).await,
        Output::File(file) => copy_terminal(master, To::File(file)).await,
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
    File(File),
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
                To::File(file) => file.write_all(&buffer[..n]).map_err(errno)?,
                To::Fifo(fifo) => write_all(fifo, &buffer[..n]).await?,
            },
            Err(Errno::EAGAIN) => guard.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
