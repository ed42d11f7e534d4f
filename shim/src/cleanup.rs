//! What a failed create has made, and how it is taken back: also when something hangs, as soon as that goes on.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use skiff::Result;
use skiff::container::Leftover;
use skiff::launch::chore::Chore;
use tokio::io::Interest;
use tokio::sync::oneshot;

use crate::container::{Home, remove};
use crate::io::watch_fd;
use crate::process::{Process, settle};
use crate::rootfs;

/// Between two tries: first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// What there is to take back.
#[derive(Default)]
pub struct Rest {
    /// An init that has been made for nothing, and where its container is kept.
    pub init: Option<(Rc<Process>, Home)>,
    /// What the library could not take back.
    pub left: Option<Leftover>,
    /// Mounts the rootfs, has been killed, and may still mount something when it goes on.
    pub mounting: Option<Chore>,
    /// The bundle whose rootfs has been mounted.
    pub mounted: Option<PathBuf>,
}

/// Told when all has been done, or when something hangs.
type Tried = Option<oneshot::Sender<()>>;

impl Rest {
    /// Does it; comes back when all is done. `tried` is told before that when something hangs.
    pub async fn take_back(self, id: &str, tried: oneshot::Sender<()>) {
        let mut tried = Some(tried);
        if let Some((init, home)) = self.init {
            if !init.discard().await {
                log::warn!("container {id:?}: {}", init.undead());
                tried.take();
                let _ = init.reap().await;
            }
            let bundle = self.mounted.clone().unwrap_or_default();
            until_done(id, &mut tried, || remove(&home, id, &bundle)).await;
        }
        if let Some(mut left) = self.left {
            tried.take();
            ended(left.fd()).await;
            until_done(id, &mut tried, || left.undo()).await;
        }
        if let Some(chore) = self.mounting {
            if !skiff::launch::has_exited(chore.end()) {
                tried.take();
            }
            ended(chore.end()).await;
        }
        if let Some(bundle) = self.mounted {
            until_done(id, &mut tried, || rootfs::take_down(&bundle)).await;
        }
    }
}

/// Tries until it is done. A try that was killed because it hung has to end before the next one.
async fn until_done(id: &str, tried: &mut Tried, mut start: impl FnMut() -> Result<Chore>) {
    let mut pause = PAUSES.0;
    loop {
        let done = match start() {
            Ok(mut chore) => {
                let done = settle(&mut chore).await;
                if done.is_err() {
                    tried.take();
                    ended(chore.end()).await;
                }
                done
            }
            Err(err) => Err(err),
        };
        let Err(err) = done else { return };
        log::warn!("container {id:?}: undo create: {err}");
        tried.take();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Waits for the end of a process.
async fn ended(pidfd: BorrowedFd<'_>) {
    let Ok(fd) = pidfd.try_clone_to_owned() else { return };
    if let Ok(fd) = watch_fd(fd, Interest::READABLE) {
        let _ = fd.readable().await;
    }
}
