//! The `main` of skiff's programs. What Rust's own does beyond this, a handler for stack overflows with a stack of its own
//! and a look at the memory map for it, costs each of them more than a container's mounts.

use std::os::fd::{AsRawFd, IntoRawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use super::process::standard_stream;

/// Defines `main`: it runs `$run`, a `fn() -> i32`, and exits with what that returns. The crate says
/// `#![cfg_attr(not(test), no_main)]`.
#[macro_export]
macro_rules! program {
    ($run:path) => {
        // A test program has another `main`.
        #[allow(unsafe_code, dead_code)]
        #[cfg_attr(not(test), unsafe(export_name = "main"))]
        extern "C" fn c_main() -> std::ffi::c_int {
            $crate::sys::program::begin();
            std::process::exit($run())
        }
    };
}

/// What every program needs first: three open standard streams, so that no other file gets their numbers, and no death by
/// a pipe whose reader has gone.
pub fn begin() {
    let mut streams = [0, 1, 2].map(|number| PollFd::new(standard_stream(number), PollFlags::empty()));
    let _ = poll(&mut streams, PollTimeout::ZERO);
    let closed = |stream: &PollFd<'_>| stream.revents().is_some_and(|events| events.contains(PollFlags::POLLNVAL));
    if streams.iter().any(closed) {
        // The lowest free number is the one that is taken.
        while let Ok(null) = nix::fcntl::open(c"/dev/null", OFlag::O_RDWR, Mode::empty()) {
            if null.as_raw_fd() > 2 {
                break;
            }
            let _ = null.into_raw_fd();
        }
    }
    // SAFETY: ignoring a signal runs no code.
    let ignored = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    debug_assert_ne!(ignored, libc::SIG_ERR, "{}", Errno::last());
}
