//! containerd's streaming service: standard streams that are messages on connections, as CRI wants them for
//! `io_type = "streaming"` (containerd core/transfer/streaming). Between such a stream and the process lies a pipe: for all
//! the rest of the shim it is a FIFO, which [`Local`] names by its descriptor.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, CodedOutputStream, rt};
use containerd_shim_protos::ttrpc::asynchronous::{
    SSSender, ServerStream, Service as Dispatch, StreamHandler, StreamInner, TtrpcContext,
};
use containerd_shim_protos::ttrpc::{self, Response};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use skiff::{Error, Result};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::io::{Paths, watch_fd, write_all};
use crate::pending::Call;
use crate::task::Service;

/// Its name.
pub const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";
/// Most that one message carries, bytes.
const CHUNK: usize = 32 << 10;
/// What a sender may send before the receiver has taken it, bytes.
const WINDOW: i64 = 64 << 10;
/// How long an exit is held back for the last output.
const PATIENCE: Duration = Duration::from_secs(1);
/// Tag of a message's first field when it is text or bytes.
const BYTES: u32 = 10;
/// The same when it is a number.
const NUMBER: u32 = 8;

/// The service in ttrpc's table.
pub fn dispatch(service: Arc<Service>) -> Dispatch {
    let stream: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Method(service));
    Dispatch { methods: HashMap::new(), streams: HashMap::from([("Stream".to_string(), stream)]) }
}

struct Method(Arc<Service>);

#[async_trait]
impl StreamHandler for Method {
    /// A client says which stream it wants, is told that it has it, and keeps it until the shim has done with it.
    async fn handler(&self, _: TtrpcContext, stream: StreamInner) -> ttrpc::Result<Option<Response>> {
        let (to, mut from) = ServerStream::<Any, Any>::new(stream).split();
        // The request itself comes first, as a message with nothing in it.
        let mut init = from.recv().await?;
        if init.as_ref().is_some_and(|message| message.value.is_empty()) {
            init = from.recv().await?;
        }
        let id = init.and_then(|message| String::from_utf8(bytes(&message.value)?).ok());
        let id = id.ok_or_else(|| ttrpc::Error::Others("a stream has to begin with its id".into()))?;
        to.send(&Any::default()).await?;
        let (done, mut finished) = oneshot::channel();
        let (pass, messages) = mpsc::unbounded_channel();
        let client = Client { to, from: messages, _done: done };
        self.0
            .ask(Call::new("Stream", &id, ""), move |shim| async move {
                shim.streams.arrive(id, client);
                Ok(())
            })
            .await?;
        loop {
            // A window bounds what can be on the way.
            tokio::select! {
                message = from.recv() => {
                    let Ok(Some(message)) = message else { return Ok(None) };
                    if pass.send(message).is_err() {
                        return Ok(None);
                    }
                }
                _ = &mut finished => return Ok(None),
            }
        }
    }
}

/// Field 1 of a message, bytes.
fn bytes(message: &[u8]) -> Option<Vec<u8>> {
    first(message, BYTES, |input| input.read_bytes())
}

fn first<T>(
    message: &[u8],
    wanted: u32,
    read: impl Fn(&mut CodedInputStream<'_>) -> containerd_shim_protos::protobuf::Result<T>,
) -> Option<T> {
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        if tag == wanted {
            return read(&mut input).ok();
        }
        rt::skip_field_for_tag(tag, &mut input).ok()?;
    }
    None
}

fn any(
    type_url: &str,
    write: impl Fn(&mut CodedOutputStream<'_>) -> containerd_shim_protos::protobuf::Result<()>,
) -> Any {
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    // A vector takes everything.
    let _ = write(&mut output).and_then(|()| output.flush());
    drop(output);
    Any { type_url: type_url.into(), value, ..Any::default() }
}

/// A client's end of a stream. Dropped, it is told that this is the end.
struct Client {
    to: SSSender<Any>,
    /// Ends when the client has said all, or has gone.
    from: mpsc::UnboundedReceiver<Any>,
    _done: oneshot::Sender<()>,
}

/// Clients by the id of the stream that they want: they come before the process that it is for, and again after a restart of
/// containerd.
#[derive(Default)]
pub struct Streams(RefCell<HashMap<String, Door>>);

#[derive(Default)]
struct Door {
    /// To whoever serves the stream.
    inside: Option<mpsc::UnboundedSender<Client>>,
    /// The last one who came when nobody did yet.
    waiting: Option<Client>,
}

impl Streams {
    fn arrive(&self, id: String, client: Client) {
        let mut doors = self.0.borrow_mut();
        // What a client wants may never be made.
        let waits = |door: &Door| door.waiting.as_ref().is_some_and(|client| !client.from.is_closed());
        doors.retain(|_, door| door.inside.is_some() || waits(door));
        let door = doors.entry(id).or_default();
        match &door.inside {
            Some(inside) => drop(inside.send(client)),
            None => door.waiting = Some(client),
        }
    }

    fn claim(&self, id: &str) -> Result<mpsc::UnboundedReceiver<Client>> {
        let mut doors = self.0.borrow_mut();
        let door = doors.entry(id.to_string()).or_default();
        if door.inside.is_some() {
            return Err(Error::new(skiff::Kind::AlreadyExists, format!("stream {id:?} is in use")));
        }
        let (inside, clients) = mpsc::unbounded_channel();
        if let Some(client) = door.waiting.take() {
            let _ = inside.send(client);
        }
        door.inside = Some(inside);
        Ok(clients)
    }
}

/// Streams of a process as pipes. Dropped, nobody waits for clients any more; what runs goes on to its end.
pub struct Local {
    /// Their names for the rest of the shim.
    pub paths: Paths,
    /// Writers of outputs, until the process has its own.
    held: Vec<OwnedFd>,
    closing: watch::Sender<bool>,
    /// Outputs that are not at their end.
    open: watch::Sender<usize>,
}

/// The id that an URI names.
fn id(uri: &str) -> Option<&str> {
    uri.strip_prefix("ttrpc+unix://")?.split_once("?streaming_id=").map(|(_, id)| id)
}

impl Local {
    /// For paths that name streams; None for others.
    pub fn new(streams: &Rc<Streams>, paths: &Paths) -> Result<Option<Local>> {
        if id(&paths.stdout).is_none() {
            return Ok(None);
        }
        let mut local = Local {
            paths: Paths { terminal: paths.terminal, ..Paths::default() },
            held: Vec::new(),
            closing: watch::Sender::new(false),
            open: watch::Sender::new(0),
        };
        for (uri, name, is_output) in [
            (&paths.stdin, &mut local.paths.stdin, false),
            (&paths.stdout, &mut local.paths.stdout, true),
            (&paths.stderr, &mut local.paths.stderr, true),
        ] {
            let Some(id) = id(uri) else { continue };
            let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .map_err(|errno| Error::sys("make a pipe", errno))?;
            *name = format!("/proc/self/fd/{}", reader.as_raw_fd());
            let (clients, closing) = (streams.claim(id)?, local.closing.subscribe());
            let (streams, id) = (streams.clone(), id.to_string());
            let open = local.open.clone();
            if is_output {
                local.held.push(writer);
                open.send_modify(|n| *n += 1);
            }
            tokio::task::spawn_local(async move {
                let copied = if is_output {
                    output(reader, clients, closing).await
                } else {
                    input(reader, clients, closing).await
                };
                if let Err(errno) = copied {
                    log::warn!("stream {id}: {}", skiff::error::errno_text(errno));
                }
                streams.0.borrow_mut().remove(&id);
                if is_output {
                    open.send_modify(|n| *n -= 1);
                }
            });
        }
        Ok(Some(local))
    }

    /// The process has its streams.
    pub fn opened(&mut self) {
        self.held.clear();
    }

    /// Waits until its clients have been sent all output: at the word of an exit containerd gives the streams up, and with
    /// them what it has not read. What has been left running may keep an output open for longer than that is worth.
    pub fn sent(&self) -> impl Future<Output = ()> + use<> {
        let mut open = self.open.subscribe();
        async move {
            let _ = tokio::time::timeout(PATIENCE, open.wait_for(|n| *n == 0)).await;
        }
    }

    /// The process is being deleted: clients that are not there are not waited for.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }
}

async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

/// From a pipe to one client after the other, until the pipe's end.
async fn output(
    reader: OwnedFd,
    mut clients: mpsc::UnboundedReceiver<Client>,
    mut closing: watch::Receiver<bool>,
) -> nix::Result<()> {
    let pipe = watch_fd(reader, Interest::READABLE)?;
    let mut unsent = Vec::new();
    loop {
        let mut client = tokio::select! {
            biased;
            Some(client) = clients.recv() => client,
            () = closed(&mut closing) => return Ok(()),
        };
        let mut window = 0;
        loop {
            tokio::select! {
                Some(next) = clients.recv() => {
                    (client, window) = (next, 0);
                }
                message = client.from.recv() => match message {
                    Some(message) if message.type_url == WINDOW_UPDATE => {
                        window += i64::from(first(&message.value, NUMBER, |input| input.read_int32()).unwrap_or(0));
                    }
                    Some(_) => {}
                    None => break,
                },
                read = read(&pipe, &mut unsent, window), if window > 0 => {
                    read?;
                    if unsent.is_empty() {
                        return Ok(());
                    }
                    let data = any(DATA, |output| output.write_bytes(1, &unsent));
                    if client.to.send(&data).await.is_err() {
                        break;
                    }
                    window -= unsent.len() as i64;
                    unsent.clear();
                }
            }
        }
    }
}

/// What there is, as much as the window takes, unless something is there already. Nothing is the end.
async fn read(pipe: &AsyncFd<OwnedFd>, unsent: &mut Vec<u8>, window: i64) -> nix::Result<()> {
    if !unsent.is_empty() {
        return Ok(());
    }
    loop {
        let mut guard = pipe.readable().await.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        let mut buffer = vec![0; CHUNK.min(window as usize)];
        match nix::unistd::read(pipe.get_ref(), &mut buffer) {
            Ok(n) => {
                buffer.truncate(n);
                *unsent = buffer;
                return Ok(());
            }
            Err(Errno::EAGAIN) => guard.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// From one client after the other to a pipe. A client that has said all leaves it as somebody who closes a FIFO does.
async fn input(
    reader: OwnedFd,
    mut clients: mpsc::UnboundedReceiver<Client>,
    mut closing: watch::Receiver<bool>,
) -> nix::Result<()> {
    let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
    loop {
        let mut client = tokio::select! {
            Some(client) = clients.recv() => client,
            () = closed(&mut closing) => return Ok(()),
        };
        let writer = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let writer = writer.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        let to = watch_fd(writer.into(), Interest::WRITABLE)?;
        let mut window = 0;
        loop {
            if window < WINDOW {
                let update = any(WINDOW_UPDATE, |output| output.write_int32(1, WINDOW as i32));
                if client.to.send(&update).await.is_err() {
                    break;
                }
                window += WINDOW;
            }
            tokio::select! {
                message = client.from.recv() => {
                    let Some(message) = message else { break };
                    let data = bytes(&message.value).filter(|_| message.type_url == DATA).unwrap_or_default();
                    window -= data.len() as i64;
                    tokio::select! {
                        written = write_all(&to, &data) => written?,
                        () = closed(&mut closing) => return Ok(()),
                    }
                }
                () = closed(&mut closing) => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_named_by_their_uri() {
        assert_eq!(id("ttrpc+unix:///run/containerd/s/x?streaming_id=c-stdout"), Some("c-stdout"));
        assert_eq!(id("/run/fifo"), None);
        assert_eq!(id("binary:///x?streaming_id=c"), None);
    }

    #[test]
    fn messages_are_those_of_containerd() {
        assert_eq!(any(DATA, |output| output.write_bytes(1, b"ab")).value, [10, 2, b'a', b'b']);
        assert_eq!(bytes(&[16, 1, 10, 2, b'a', b'b']).unwrap(), b"ab");
        let update = any(WINDOW_UPDATE, |output| output.write_int32(1, 65_536)).value;
        assert_eq!(first(&update, NUMBER, |input| input.read_int32()), Some(65_536));
        assert_eq!(bytes(&[10, 9, 1]), None);
    }
}
