//! A file system whose server never answers: whoever uses it hangs.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// It is mounted in a directory of its own. Dropped, its server is gone, and everybody who hangs goes on with an error.
pub struct Wedge {
    dir: tempfile::TempDir,
    server: File,
    disk: Option<String>,
    _alone: Flock<File>,
}

/// Two that hang at once fool each other: who lets one go may wait for the other. One at a time, of all tests.
fn alone() -> Flock<File> {
    let path = std::env::temp_dir().join("skiff-wedge.lock");
    let file = File::options().create(true).append(true).open(path).expect("a lock file");
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).expect("a lock")
}

/// struct fuse_in_header of linux/fuse.h: length, opcode, number of the request, ...
const HEADER: usize = 40;
const INIT: u32 = 26;
const DESTROY: u32 = 38;

impl Wedge {
    /// Whoever looks something up in it hangs.
    pub fn new() -> Wedge {
        Wedge::with(None, alone())
    }

    /// Its last user hangs when it is unmounted, too: one on a block device is told of its end, and has to answer.
    pub fn on_a_disk() -> Wedge {
        let alone = alone();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("image");
        File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().expect("losetup");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Wedge::with(Some(String::from_utf8_lossy(&output.stdout).trim().to_string()), alone)
    }

    fn with(disk: Option<String>, alone: Flock<File>) -> Wedge {
        let dir = tempfile::Builder::new().prefix("wedge-").tempdir().expect("a temporary directory");
        let server = File::options().read(true).write(true).open("/dev/fuse").expect("FUSE");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let (source, kind) = match &disk {
            Some(disk) => (disk.as_str(), "fuseblk"),
            None => ("wedge", "fuse"),
        };
        mount(Some(source), dir.path(), Some(kind), MsFlags::empty(), Some(options.as_str())).expect("mount");
        let mut wedge = Wedge { dir, server, disk, _alone: alone };
        let (opcode, unique) = wedge.read();
        assert_eq!(opcode, INIT);
        // struct fuse_init_out: version 7.31, and of everything the least.
        let mut answer = Vec::new();
        for number in [7u32, 31, 4096, 0, 1 | 1 << 16, 4096, 1] {
            answer.extend(number.to_ne_bytes());
        }
        answer.resize(64, 0);
        wedge.answer(unique, &answer);
        wedge
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until somebody hangs.
    pub fn wait(&mut self) {
        self.read();
    }

    /// Waits until its last user hangs at its end.
    pub fn wait_for_the_end(&mut self) {
        while self.read().0 != DESTROY {}
    }

    /// Takes it from where it was mounted; other mounts of it stay.
    pub fn hide(&self) {
        umount2(self.dir.path(), MntFlags::MNT_DETACH).expect("unmount");
    }

    /// Its server is gone: nobody hangs any more.
    pub fn abort(&mut self) {
        self.server = File::open("/dev/null").expect("/dev/null");
    }

    fn read(&mut self) -> (u32, u64) {
        let mut fds = [PollFd::new(self.server.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(30_000u16)).expect("poll");
        assert_eq!(ready, 1, "nobody uses it");
        let mut bytes = vec![0; 64 << 10];
        let got = self.server.read(&mut bytes).expect("a request");
        assert!(got >= HEADER);
        let four = |at: usize| bytes[at..at + 4].try_into().expect("four bytes");
        (u32::from_ne_bytes(four(4)), u64::from_ne_bytes(bytes[8..16].try_into().expect("eight bytes")))
    }

    fn answer(&mut self, unique: u64, body: &[u8]) {
        let length = (16 + body.len() as u32).to_ne_bytes();
        let all = [&length[..], &0i32.to_ne_bytes(), &unique.to_ne_bytes(), body].concat();
        self.server.write_all(&all).expect("answer");
    }
}

impl Drop for Wedge {
    fn drop(&mut self) {
        self.abort();
        let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
        if let Some(disk) = &self.disk {
            let _ = Command::new("losetup").args(["--detach", disk]).status();
        }
    }
}

/// A program that hangs until it is let go: one end of a FIFO.
pub struct Gate(PathBuf);

impl Gate {
    pub fn new(dir: &Path) -> Gate {
        let path = dir.join("gate");
        crate::daemon::make_fifo(&path);
        Gate(path)
    }

    /// A hook that waits at it.
    pub fn hook(&self) -> serde_json::Value {
        serde_json::json!([{"path": "/bin/cat", "args": ["cat", self.0]}])
    }

    /// A FIFO that is there.
    pub fn at(path: PathBuf) -> Gate {
        Gate(path)
    }

    /// Waits until somebody is there, who is let through when this is dropped.
    pub fn hold(&self) -> File {
        File::options().write(true).open(&self.0).expect("a FIFO")
    }
}
