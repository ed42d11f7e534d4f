//! What the black-box tests share: bundles, private containerds and networks, the leak check.

mod agent;
mod bundle;
mod console;
mod containerd;
mod image;
mod leaks;
mod network;
mod programs;

pub use agent::seccomp_agent;
pub use bundle::{Bundle, add_user_namespace, fill_rootfs};
pub use console::{receive_console, receive_console_of};
pub use containerd::{Containerd, Driver, Pods, Version};
pub use image::NAME as IMAGE;
pub use leaks::LeakCheck;
pub use network::Network;
pub use programs::device_programs;

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Exit code; 128 + signal when one ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Done {
    /// The same, if it succeeded.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn ok(self) -> Done {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    /// The same, if it failed.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn failed(self) -> Done {
        assert_ne!(self.code, 0, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Done {
        use std::os::unix::process::ExitStatusExt;
        let signal = || output.status.signal().unwrap_or(0);
        Done {
            code: output.status.code().unwrap_or_else(|| 128 + signal()),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs a command with `input` on stdin. One that takes longer than a minute is killed: code 137.
pub fn run(command: &mut Command, input: &str) -> Done {
    use std::io::Write;
    let wrapped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = wrapped.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let pid = child.id() as i32;
    let mut stdin = child.stdin.take().expect("piped");
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let (done, killed) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if killed.recv_timeout(Duration::from_secs(60)).is_err() {
            // SAFETY: plain numbers; the child has not been waited for, so the pid is still its own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output().expect("wait for a child");
    let _ = done.send(());
    let _ = watchdog.join();
    output.into()
}

/// Waits until `check` holds.
///
/// # Panics
/// When it does not within half a minute.
#[track_caller]
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !check() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A name that no other test uses at the same time.
pub fn unique(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// True where cgroups have these controllers. In the view of `contrib/v2-view` most are missing, and what is about
/// their limits has nothing to look at.
pub fn has_controllers(names: &[&str]) -> bool {
    let root = std::path::Path::new("/sys/fs/cgroup");
    match std::fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(list) => names.iter().all(|name| list.split_whitespace().any(|one| one == *name)),
        // The one that has another name on v1.
        Err(_) => names.iter().all(|name| root.join(if *name == "io" { "blkio" } else { name }).is_dir()),
    }
}

/// Exchanges two names of one file system: renameat2(2).
pub fn exchange(one: &std::path::Path, other: &std::path::Path) {
    use std::os::unix::ffi::OsStrExt;
    let name = |path: &std::path::Path| std::ffi::CString::new(path.as_os_str().as_bytes()).expect("a path");
    let (one, other) = (name(one), name(other));
    // SAFETY: both are NUL-terminated and outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            one.as_ptr(),
            libc::AT_FDCWD,
            other.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
}
