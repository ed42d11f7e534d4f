//! How long is waited for what may hang: a disk, a server, a program. Past its limit it is killed, and whoever waits for it
//! is told what hung and where. Does not live here: who waits (launch, container, the shim).

use std::time::{Duration, Instant};

/// Environment: no limit is longer than so many seconds. For tests, and for who would rather have an error soon.
pub const MAX_WAIT: &str = "SKIFF_MAX_WAIT";

/// Mounting a root file system: a server that answers does so in seconds.
pub const MOUNT: Duration = Duration::from_secs(30);
/// Unmounting it: the last user of a file system writes back what it has in memory.
pub const UNMOUNT: Duration = Duration::from_secs(60);
/// Opening streams, and sources of bind mounts. A client that names a FIFO may take so long to open it, too.
pub const OPEN: Duration = Duration::from_secs(30);
/// A logger says that it is ready when it has opened its files.
pub const LOGGER: Duration = Duration::from_secs(30);
/// Writing what is left to the file of a process that has been deleted.
pub const WRITE: Duration = Duration::from_secs(300);
/// A hook that names no timeout.
pub const HOOK: Duration = Duration::from_secs(120);
/// From the clone of an init to its gate, and from the gate to its program; the time of hooks comes on top. The kubelet
/// gives a whole request two minutes.
pub const BIRTH: Duration = Duration::from_secs(120);
/// The same for an exec process.
pub const EXEC: Duration = Duration::from_secs(120);
/// A killed process that dies slower than this is in the middle of a system call that hangs.
pub const DEATH: Duration = Duration::from_secs(10);
/// Removing cgroups, mounts and the state directory; hooks come on top. Killed processes alone may take ten seconds.
pub const REMOVE: Duration = Duration::from_secs(60);
/// systemd makes or changes a unit.
pub const SYSTEMD: Duration = Duration::from_secs(60);
/// Freezing: a process in a slow system call stops only after it.
pub const FREEZE: Duration = Duration::from_secs(30);
/// A pod's namespaces.
pub const POD: Duration = Duration::from_secs(30);
/// CRIU writes or reads all the memory of a container.
pub const CRIU: Duration = Duration::from_secs(30 * 60);

/// Where somebody waits who may wait for ever, and can be interrupted.
pub const NONE: Duration = Duration::from_secs(1 << 31);

/// `limit`, or what [`MAX_WAIT`] has made of it.
pub fn within(limit: Duration) -> Duration {
    let most = std::env::var(MAX_WAIT).ok().and_then(|text| text.parse().ok()).map(Duration::from_secs);
    most.map_or(limit, |most| limit.min(most))
}

/// When that is over.
pub fn from_now(limit: Duration) -> Instant {
    Instant::now() + within(limit)
}
