//! One cgroup directory: made, read and written below a directory fd.

use std::cell::OnceCell;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::plan::cgroup::Dir;
use crate::{Error, Kind, Result};

/// A cgroup directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    fd: Option<OwnedFd>,
    door: OnceCell<OwnedFd>,
    /// Its controllers, with commas; empty on v2.
    pub controllers: String,
}

const MAX_FILE: usize = 1 << 20;

impl Directory {
    /// Makes it with its parents; what it makes is added to `made`. One that is there already must be unused, unless
    /// `shared`.
    pub fn create(plan: &Dir, enable: bool, shared: bool, made: &mut Vec<PathBuf>) -> Result<Directory> {
        let is_v2 = plan.is_v2();
        let mut at = plan.mountpoint.clone();
        let mut wanted = String::new();
        if is_v2 && enable {
            let controllers = fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
            wanted = controllers.split_whitespace().map(|name| format!("+{name} ")).collect();
        }
        let mut new = false;
        for part in plan.path.components() {
            if !wanted.is_empty() {
                enable_controllers(&at, wanted.trim_end());
            }
            let parent = at.clone();
            at.push(part);
            let created = fs::create_dir(&at);
            new = created.is_ok();
            match created {
                Ok(()) => {
                    made.push(at.clone());
                    if plan.controllers.iter().any(|controller| controller == "cpuset") {
                        inherit_cpuset(&plan.mountpoint, &parent, &at);
                    }
                }
                Err(err) if err.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(err) => return Err(Error::io(format!("make cgroup {:?}", at.display().to_string()), &err)),
            }
        }
        let directory = Directory::open(&at, plan.controllers.join(","));
        if !new && !shared {
            directory.check_unused()?;
        }
        Ok(directory)
    }

    /// An existing one; one that is gone has no files.
    pub fn open(path: &Path, controllers: String) -> Directory {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Directory {
            path: path.to_path_buf(),
            fd: open(path, flags, Mode::empty()).ok(),
            door: OnceCell::new(),
            controllers,
        }
    }

    /// Absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its controllers; `""` alone on v2.
    pub fn names(&self) -> std::str::Split<'_, char> {
        self.controllers.split(',')
    }

    /// True when it is of v2.
    pub fn is_v2(&self) -> bool {
        self.controllers.is_empty()
    }

    /// The file by which a process enters alone, see [`super::Cgroup::doors`]; it stays open for the next one.
    pub fn door(&self) -> nix::Result<BorrowedFd<'_>> {
        // A single thread that moves itself enters v1 by its own file.
        let name = if self.is_v2() { "cgroup.procs" } else { "tasks" };
        open_once(&self.door, || self.file(name, OFlag::O_WRONLY))
    }

    /// Its fd, if it is there.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// A cgroup that is in use by others, or would stop its processes at once, is none for a new container.
    fn check_unused(&self) -> Result<()> {
        if self.path.parent().is_none_or(|parent| parent == Path::new("/")) {
            return Ok(());
        }
        let mut pids = Vec::new();
        self.pids(&mut pids);
        let count = pids.len();
        if count > 0 {
            let text = format!("container's cgroup is not empty: {count} process(es) found in {:?}", self.path);
            return Err(Error::new(Kind::FailedPrecondition, text));
        }
        let frozen = self.read("cgroup.freeze").is_some_and(|text| text.trim() == "1")
            || self.read("freezer.state").is_some_and(|text| text.trim() != "THAWED");
        if frozen {
            let text = format!("container's cgroup unexpectedly frozen: {:?}", self.path);
            return Err(Error::new(Kind::FailedPrecondition, text));
        }
        Ok(())
    }

    /// Writes to one of its files, in one write.
    pub fn write(&self, file: &str, value: &str) -> nix::Result<()> {
        write(&self.file(file, OFlag::O_WRONLY)?, value)
    }

    /// Reads one of its files; None when it is not there.
    pub fn read(&self, file: &str) -> Option<String> {
        let fd = self.file(file, OFlag::O_RDONLY).ok()?;
        let mut out = Vec::with_capacity(1024);
        let mut chunk = [0u8; 4096];
        while out.len() < MAX_FILE {
            match nix::unistd::read(&fd, &mut chunk) {
                Ok(n) => {
                    out.extend_from_slice(&chunk[..n]);
                    // The kernel fills what it is given line by line: there is no further one.
                    if n < chunk.len() / 2 {
                        return String::from_utf8(out).ok();
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Reads a file that holds one number; `max` is the largest one.
    pub fn number(&self, file: &str) -> Option<u64> {
        match self.read(file)?.trim() {
            "max" => Some(u64::MAX),
            text => text.parse().ok(),
        }
    }

    /// True on v2 when the controller that `file` belongs to is not there.
    pub fn lacks_controller(&self, file: &str) -> bool {
        let name = file.split('.').next();
        let there = self.read("cgroup.controllers").filter(|_| self.is_v2());
        there.is_some_and(|list| name != Some("cgroup") && !list.split_whitespace().any(|one| Some(one) == name))
    }

    /// Gives it to a user, who may then make cgroups in it and move processes between them (cgroups(7), "Cgroups
    /// delegation"). The limits stay with whom they belong to.
    pub fn delegate(&self, owner: u32) -> Result<()> {
        if nix::unistd::geteuid().as_raw() == owner {
            return Ok(());
        }
        let list = fs::read_to_string("/sys/kernel/cgroup/delegate");
        let list = list.unwrap_or_else(|_| "cgroup.procs cgroup.subtree_control cgroup.threads".into());
        let owner = Some(nix::unistd::Uid::from_raw(owner));
        let dir = self.fd().ok_or_else(|| Error::sys(format!("open cgroup {:?}", self.path), Errno::ENOENT))?;
        for name in std::iter::once(".").chain(list.split_whitespace()) {
            match nix::unistd::fchownat(dir, name, owner, None, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => {
                    return Err(Error::sys(format!("give cgroup {:?} to its user", self.path.join(name)), errno));
                }
            }
        }
        Ok(())
    }

    /// Opens a file of it.
    pub fn open_file(&self, name: &str, flags: OFlag) -> nix::Result<OwnedFd> {
        self.file(name, flags)
    }

    fn file(&self, name: &str, flags: OFlag) -> nix::Result<OwnedFd> {
        if name.contains('/') {
            return Err(Errno::EINVAL);
        }
        let dir = self.fd.as_ref().ok_or(Errno::ENOENT)?;
        openat(dir, name, flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())
    }

    /// Adds the pids here and below to `out`.
    pub fn pids(&self, out: &mut Vec<i32>) {
        if let Some(procs) = self.read("cgroup.procs") {
            out.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        for child in self.children() {
            child.pids(out);
        }
    }

    fn children(&self) -> Vec<Directory> {
        let Ok(entries) = fs::read_dir(&self.path) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| Directory::open(&entry.path(), self.controllers.clone()))
            .collect()
    }

    /// Removes it alone: EBUSY when there is something in it.
    pub fn remove_bare(&self) -> nix::Result<()> {
        let (Some(fd), Some(name)) = (&self.fd, self.path.file_name()) else { return rmdir(&self.path) };
        // By way of its own descriptor the kernel has to look up one name, not five.
        let name = Path::new("..").join(name);
        match nix::unistd::unlinkat(fd, &name, nix::unistd::UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOENT | Errno::EROFS) => rmdir(&self.path),
            other => other,
        }
    }

    /// Removes it and everything below it.
    pub fn remove(&self) -> nix::Result<()> {
        match self.remove_bare() {
            Err(Errno::EBUSY | Errno::ENOTEMPTY) => {}
            other => return other,
        }
        for child in self.children() {
            child.remove()?;
        }
        rmdir(&self.path)
    }
}

/// What `open` opens, from the first use on.
pub fn open_once(cell: &OnceCell<OwnedFd>, open: impl FnOnce() -> nix::Result<OwnedFd>) -> nix::Result<BorrowedFd<'_>> {
    match cell.get() {
        Some(fd) => Ok(fd.as_fd()),
        None => open().map(|fd| cell.get_or_init(|| fd).as_fd()),
    }
}

/// Writes to a file of a cgroup, in one write.
pub fn write(file: &OwnedFd, value: &str) -> nix::Result<()> {
    loop {
        match nix::unistd::write(file, value.as_bytes()) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

fn rmdir(path: &Path) -> nix::Result<()> {
    match fs::remove_dir(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))) {
        Err(Errno::ENOENT) => Ok(()),
        // On a read-only mount the kernel says so before it looks whether there is anything.
        Err(Errno::EROFS) if !path.exists() => Ok(()),
        other => other,
    }
}

/// Opens the directory behind a path fd for reading, as bpf(2) wants it.
pub fn reopen(fd: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    openat(fd, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// All at once, or what can be had one by one.
fn enable_controllers(dir: &Path, wanted: &str) {
    let file = dir.join("cgroup.subtree_control");
    if fs::write(&file, wanted).is_err() {
        for controller in wanted.split(' ') {
            let _ = fs::write(&file, controller);
        }
    }
}

/// A new v1 cpuset has no processors and no memory, and takes no process before it has some. Whoever made the parent may
/// have left it as empty.
fn inherit_cpuset(top: &Path, parent: &Path, dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value = || fs::read_to_string(parent.join(file)).unwrap_or_default();
        let mut inherited = value();
        if inherited.trim().is_empty()
            && parent != top
            && let Some(above) = parent.parent()
        {
            inherit_cpuset(top, above, parent);
            inherited = value();
        }
        let _ = fs::write(dir.join(file), inherited.trim());
    }
}
