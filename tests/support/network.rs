//! A network namespace without a name: it ends with what is in it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

/// A network of a test's own.
#[derive(Debug)]
pub struct Network(File);

impl Network {
    /// One with nothing in it but a loopback device that is up.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn new() -> Network {
        let make = || {
            // SAFETY: it concerns this thread alone, which does nothing else and ends.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "unshare: {}", std::io::Error::last_os_error());
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.expect("ip runs").success(), "bring the loopback device up");
            File::open("/proc/thread-self/ns/net").expect("this thread's network")
        };
        Network(std::thread::scope(|scope| scope.spawn(make).join().expect("a network")))
    }

    /// Runs `inside` on a thread that is in the network. What it starts stays there.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let fd = self.0.as_raw_fd();
        let enter = || {
            // SAFETY: a descriptor that outlives the call; it concerns this thread alone.
            assert_eq!(unsafe { libc::setns(fd, libc::CLONE_NEWNET) }, 0, "setns: {}", std::io::Error::last_os_error());
            inside()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().expect("what runs inside"))
    }

    /// What `/proc/self/ns/net` names in it.
    ///
    /// # Panics
    /// When the kernel does not say.
    pub fn name(&self) -> String {
        use std::os::unix::fs::MetadataExt;
        format!("net:[{}]", self.0.metadata().expect("a namespace").ino())
    }
}

impl Default for Network {
    fn default() -> Network {
        Network::new()
    }
}
