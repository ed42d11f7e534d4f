//! The daemon: one thread, one event loop, the Task service in both versions on one socket.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use futures_core::Stream;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use skiff::{Error, Kind, Result};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

use crate::args::Args;
use crate::events::Events;
use crate::io::watch_fd;
use crate::logging;
use crate::spans::Spans;
use crate::streaming;
use crate::task::{self, Service, Shim};

const V2: &str = "containerd.task.v2.Task";
const V3: &str = "containerd.task.v3.Task";
/// Events of descriptors that the loop takes from the kernel at once: room for them is held all the time.
const IO_EVENTS: usize = 32;
/// How long events may still go out at the end.
const FLUSH: Duration = Duration::from_secs(5);

/// Serves until Shutdown or a signal.
pub fn run(args: &Args, bundle: &Path, listener: StdListener, events: Option<String>) -> Result<()> {
    let address = listener.local_addr().map_err(|e| Error::io("find the address of the listener", &e))?;
    let socket = address.as_pathname().map(Path::to_path_buf);
    logging::open(bundle, args.debug);
    let fail = |what: &'static str| move |errno| Error::sys(what, errno);
    skiff::sys::process::set_dumpable(false).map_err(fail("make the shim undumpable"))?;
    skiff::sys::process::set_child_subreaper(true).map_err(fail("become a subreaper"))?;
    let tidy = task::Tidy::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_io_events_per_tick(IO_EVENTS)
        .on_thread_park({
            let tidy = tidy.clone();
            move || {
                if tidy.swap(false, Ordering::Relaxed) {
                    skiff::sys::process::give_memory_back();
                }
            }
        })
        .build()
        .map_err(|e| Error::io("make the event loop", &e))?;
    skiff::sys::process::ignored_signals();
    let local = tokio::task::LocalSet::new();
    let served = local.block_on(&runtime, serve(args, listener, events, socket, tidy));
    if let Err(err) = &served {
        log::error!("{err}");
    }
    served
}

async fn serve(
    args: &Args,
    listener: StdListener,
    address: Option<String>,
    socket: Option<PathBuf>,
    tidy: task::Tidy,
) -> Result<()> {
    let events = Events::new(&args.namespace, address);
    let spans = Spans::asked_for();
    let shim = Shim::new(&args.namespace, events.clone(), socket, spans.clone());
    if let Some(spans) = &spans {
        tokio::task::spawn_local(spans.clone().export());
    }
    let (service, jobs) = Service::new();
    tokio::task::spawn_local(task::run(shim.clone(), jobs, tidy));
    let io = |e| Error::io("listen", &e);
    listener.set_nonblocking(true).map_err(io)?;
    let accept = Accept(UnixListener::from_std(listener).map_err(io)?);
    let mut server = Server::new().add_listener(Listener::new(accept)).register_service(services(service)?);
    server.start().await.map_err(|e| Error::new(Kind::System, format!("serve: {e}")))?;
    let told = until_told(&shim).await;
    shim.leave();
    told?;
    let _ = tokio::time::timeout(FLUSH, events.flushed()).await;
    if let Some(spans) = spans {
        let _ = tokio::time::timeout(FLUSH, spans.flush()).await;
    }
    Ok(())
}

/// The service under both of its names: the messages are the same.
fn services(service: Service) -> Result<HashMap<String, containerd_shim_protos::ttrpc::asynchronous::Service>> {
    let mut out = HashMap::new();
    let service: Arc<Service> = Arc::new(service);
    for name in [V2, V3] {
        let mut made = create_task(service.clone());
        let one = made.remove(V3).ok_or_else(|| Error::new(Kind::System, format!("no service {V3}")))?;
        out.insert(name.to_string(), one);
    }
    out.insert(streaming::SERVICE.to_string(), streaming::dispatch(service.clone()));
    out.extend(create_sandbox(service));
    Ok(out)
}

/// Accepted connections of our own user; others are closed at once.
struct Accept(UnixListener);

impl Stream for Accept {
    type Item = std::io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            return match self.0.poll_accept(context) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok((stream, _))) => {
                    let peer = stream.peer_cred();
                    if !peer.is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw()) {
                        log::warn!("a connection of another user is refused");
                        continue;
                    }
                    Poll::Ready(Some(Ok(stream)))
                }
                // The listener outlives a shortage of descriptors.
                Poll::Ready(Err(err)) => {
                    log::warn!("accept: {err}");
                    continue;
                }
            };
        }
    }
}

/// The signals that are for the shim, by a descriptor: what the event loop's own way to them keeps in memory for every
/// signal there is, is more than all else that an idle shim has in it.
fn signals() -> Result<(SignalFd, AsyncFd<OwnedFd>)> {
    let fail = |errno| Error::sys("watch signals", errno);
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGCHLD] {
        mask.add(signal);
    }
    // Children start with an empty mask.
    mask.thread_block().map_err(fail)?;
    let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(fail)?;
    let watched = fd.as_fd().try_clone_to_owned().map_err(|e| Error::io("watch signals", &e))?;
    Ok((fd, watch_fd(watched, Interest::READABLE).map_err(fail)?))
}

async fn until_told(shim: &Rc<Shim>) -> Result<()> {
    let (signals, watched) = signals()?;
    let child = Rc::new(Notify::new());
    tokio::task::spawn_local(reap_orphans(child.clone()));
    loop {
        let mut guard = tokio::select! {
            () = shim.exit.notified() => return Ok(()),
            guard = watched.readable() => guard.map_err(|e| Error::io("watch signals", &e))?,
        };
        let Ok(Some(info)) = signals.read_signal() else {
            guard.clear_ready();
            continue;
        };
        match Signal::try_from(info.ssi_signo as i32) {
            Ok(Signal::SIGCHLD) => child.notify_one(),
            Ok(Signal::SIGUSR1) => shim.describe().iter().for_each(|line| log::info!("{line}")),
            _ => return Ok(()),
        }
    }
}

/// Who waits for a child learns of its exit in the same loop as this, and is quicker by far.
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

/// Reaps what was reparented to this subreaper. Children that somebody waits for go within moments of their exit; what
/// is still a zombie after two looks is nobody's.
async fn reap_orphans(child: Rc<Notify>) {
    loop {
        child.notified().await;
        let before = zombies();
        if before.is_empty() {
            continue;
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
        for pid in zombies().into_iter().filter(|pid| before.contains(pid)) {
            let _ = waitid(Id::Pid(nix::unistd::Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        }
    }
}

fn zombies() -> Vec<i32> {
    // Most children have been reaped by whoever waits for them.
    if !skiff::sys::process::has_zombies() {
        return Vec::new();
    }
    let pid = std::process::id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
    pids.filter(|pid| skiff::state::proc_stat(*pid).is_some_and(|stat| stat.dead)).collect()
}
