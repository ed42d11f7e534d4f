//! The state directory `root/id`: state.json in runc's layout, the FIFOs of `start`. Does not live here: what the state means (container).

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use oci_spec::runtime::{Hooks, LinuxNamespaceType, LinuxResources};
use serde::{Deserialize, Serialize};

use crate::error::{CONTAINER_DOES_NOT_EXIST, CONTAINER_ID_EXISTS, INVALID_ID};
use crate::launch::seccomp::Filter;
use crate::plan::namespaces;
use crate::plan::process::MemoryPolicy;
use crate::{Error, Kind, Result};

/// state.json. The fields before `skiff` are runc's, which other programs read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Container id.
    pub id: String,
    /// Host pid of the init.
    pub init_process_pid: i32,
    /// Its start time in clock ticks after boot (proc_pid_stat(5), field 22): tells it from a later owner of the pid.
    pub init_process_start: u64,
    /// RFC 3339, UTC.
    pub created: String,
    /// The part of runc's configuration that others look at.
    pub config: Config,
    /// Made without privileges.
    pub rootless: bool,
    /// Controller to cgroup directory; "" on v2.
    pub cgroup_paths: BTreeMap<String, PathBuf>,
    /// `NEWPID` etc. to namespace file.
    pub namespace_paths: BTreeMap<String, String>,
    /// Always empty: for CRIU.
    pub external_descriptors: Vec<String>,
    /// The group of the resctrl file system; empty without one.
    pub intel_rdt_path: String,
    /// The monitoring group below it; empty without one.
    #[serde(default)]
    pub intel_rdt_mon_path: String,
    /// What skiff itself needs later.
    pub skiff: Own,
}

/// The part of runc's `config` that other programs look at.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Config {
    /// Root file system on the host.
    pub rootfs: PathBuf,
    /// `bundle=PATH`, then the annotations as `key=value`.
    pub labels: Vec<String>,
    /// Without them runc's own `list`, `state`, `kill` and `delete` know nothing of the container.
    #[serde(default)]
    pub cgroups: ConfigCgroup,
    /// Of the container's own, and those that it has joined.
    #[serde(default)]
    pub namespaces: Vec<ConfigNamespace>,
}

/// `config.cgroups` of runc: the paths are `cgroup_paths`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ConfigCgroup {
    /// Below the hierarchies.
    pub path: PathBuf,
    /// runc takes an object without any limit for one without a cgroup.
    pub memory: i64,
}

/// One of `config.namespaces` of runc.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConfigNamespace {
    /// `NEWPID` etc.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it was joined; empty for a new one.
    pub path: String,
}

/// What skiff needs for exec, start and delete; config.json may have changed by then.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Own {
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Annotations of the spec.
    pub annotations: BTreeMap<String, String>,
    /// User that made the container.
    pub owner: u32,
    /// The first of the process's arguments, for the error of a failed start.
    pub program: String,
    /// CLONE_NEW* of the namespaces that the container does not share with the host.
    pub namespaces: u64,
    /// The container has made its pid namespace: its processes die with its init.
    pub own_pid_namespace: bool,
    /// The unit of systemd that holds it.
    #[serde(default)]
    pub unit: Option<crate::cgroup::systemd::Unit>,
    /// Hooks that are still to come.
    pub hooks: Hooks,
    /// How long its startContainer hooks may take, seconds.
    #[serde(default)]
    pub start_hooks: u64,
    /// The seccomp filter of every process.
    pub seccomp: Option<Filter>,
    /// Its processes get a session keyring of their own.
    pub keyring: bool,
    /// Without a mount namespace: what was mounted below the rootfs before the container was made.
    #[serde(default)]
    pub mounts_before: Option<Vec<PathBuf>>,
    /// The limits of its cgroup, with all updates; devices are not among them.
    #[serde(default)]
    pub resources: LinuxResources,
    /// The execution domain of its processes.
    #[serde(default)]
    pub personality: Option<u64>,
    /// The NUMA policy of its processes.
    #[serde(default)]
    pub memory_policy: Option<MemoryPolicy>,
    /// The file that the spec was read from, unless it is `config.json`.
    #[serde(default)]
    pub config: Option<PathBuf>,
    /// Its group of the resctrl file system.
    #[serde(default)]
    pub rdt: Option<crate::rdt::Group>,
}

impl Own {
    /// Files by which its processes enter its resctrl group.
    pub fn rdt_doors(&self) -> Vec<PathBuf> {
        self.rdt.as_ref().map(crate::rdt::Group::doors).unwrap_or_default()
    }
}

/// What runc calls a kind of namespace.
pub fn runcs_name(kind: LinuxNamespaceType) -> String {
    match namespaces::proc_name(kind) {
        "mnt" => "NEWNS".to_string(),
        file => format!("NEW{}", file.to_uppercase()),
    }
}

impl State {
    /// The init is this process.
    pub fn has_init(&mut self, pid: i32) -> Result<()> {
        let stat = proc_stat(pid).ok_or_else(|| Error::new(Kind::System, "container init died during create"))?;
        self.init_process_pid = pid;
        self.init_process_start = stat.start;
        let path =
            |kind: &LinuxNamespaceType| (runcs_name(*kind), format!("/proc/{pid}/ns/{}", namespaces::proc_name(*kind)));
        self.namespace_paths = namespaces::KINDS.iter().map(path).collect();
        Ok(())
    }

    /// The same without what is there for others alone: for who keeps many.
    #[must_use]
    pub fn lean(self) -> State {
        State {
            cgroup_paths: BTreeMap::new(),
            namespace_paths: BTreeMap::new(),
            config: Config { rootfs: self.config.rootfs, ..Config::default() },
            ..self
        }
    }
}

/// The FIFO that `start` writes to; there until the container is started.
pub const GATE: &str = "exec.fifo";
/// The FIFO that the init answers `start` on. It has the gate's name, which is the one that tools know an init to hold.
const ANSWER: &str = "answer/exec.fifo";
const ANSWERS: &str = "answer";
const FILE: &str = "state.json";
const STAGED: &str = ".state.json";
/// Of the state directory: its name may be asked for, its contents are root's.
const MODE: u32 = 0o711;
/// The sticky bit of a state directory: its container waits for a start that its maker alone can give. A mark that costs no file.
const WAITS: u32 = 0o1000;
/// Where the rootfs is bound during a restore.
pub const CRIU_ROOT: &str = "criu-root";

/// Checks a container id: `[A-Za-z0-9_+.-]+`, neither `.` nor `..`, and short enough for a file name.
pub fn check_id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "_+.-".contains(c);
    match id {
        "" => Err(Error::new(Kind::Invalid, "container id cannot be empty")),
        "." | ".." => Err(Error::new(Kind::Invalid, format!("{INVALID_ID}: {id:?}"))),
        _ if id.len() > 255 || !id.chars().all(good) => Err(Error::new(Kind::Invalid, format!("{INVALID_ID}: {id:?}"))),
        _ => Ok(()),
    }
}

/// The state directory of one container.
#[derive(Clone, Debug)]
pub struct Dir(PathBuf);

impl Dir {
    /// Of container `id` below `root`. Nothing is looked up.
    pub fn at(root: &Path, id: &str) -> Result<Dir> {
        check_id(id)?;
        Ok(Dir(root.join(id)))
    }

    /// Makes it; the id is taken when it is there already. `waits`: marked as one whose container waits for its start.
    pub fn reserve(root: &Path, id: &str, waits: bool) -> Result<Dir> {
        let dir = Dir::at(root, id)?;
        let mode = if waits { MODE | WAITS } else { MODE };
        let make = || fs::DirBuilder::new().mode(mode).create(&dir.0);
        let made = match make() {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                let name = root.display().to_string();
                fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(root)
                    .map_err(|e| Error::io(format!("make state root {name:?}"), &e))?;
                make()
            }
            other => other,
        };
        match made {
            Ok(()) => Ok(dir),
            Err(err) if err.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(Error::new(Kind::AlreadyExists, CONTAINER_ID_EXISTS))
            }
            Err(err) => Err(Error::io(format!("make state directory {:?}", dir.0.display().to_string()), &err)),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes state.json: all of it or nothing.
    pub fn save(&self, state: &State) -> Result<()> {
        self.stage(state)?;
        self.commit()
    }

    /// Writes what [`Dir::commit`] makes state.json; until then nobody reads it.
    pub fn stage(&self, state: &State) -> Result<()> {
        let json = serde_json::to_vec(state).map_err(|e| Error::new(Kind::System, format!("write state.json: {e}")))?;
        let write = || -> std::io::Result<()> {
            let mut options = fs::OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(self.0.join(STAGED))?;
            file.write_all(&json)
        };
        write().map_err(|e| self.unwritten(&e))
    }

    /// The state that was staged counts from now on.
    pub fn commit(&self) -> Result<()> {
        fs::rename(self.0.join(STAGED), self.0.join(FILE)).map_err(|e| self.unwritten(&e))
    }

    fn unwritten(&self, err: &std::io::Error) -> Error {
        Error::io(format!("write {:?}", self.0.join(FILE).display().to_string()), err)
    }

    /// Reads state.json.
    pub fn load(&self) -> Result<State> {
        let path = self.0.join(FILE);
        let json = crate::bundle::read(&path).map_err(|err| match err.kind() {
            Kind::NotFound => Error::new(Kind::NotFound, CONTAINER_DOES_NOT_EXIST),
            _ => err,
        })?;
        serde_json::from_slice(&json)
            .map_err(|e| Error::new(Kind::System, format!("read {:?}: {e}", path.display().to_string())))
    }

    /// True while the container waits for its start.
    pub fn has_gate(&self) -> bool {
        self.is_marked() || self.0.join(GATE).exists()
    }

    fn is_marked(&self) -> bool {
        fs::metadata(&self.0).is_ok_and(|dir| dir.mode() & WAITS != 0)
    }

    /// Makes the gate. Both FIFOs are opened for reading and writing, so that neither end waits for the other.
    pub fn make_gate(&self) -> Result<(OwnedFd, OwnedFd)> {
        let make = |name: &str| -> nix::Result<OwnedFd> {
            let path = self.0.join(name);
            nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))?;
            nix::fcntl::open(&path, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        };
        let make = |name: &str| make(name).map_err(|errno| Error::sys(format!("make {name:?}"), errno));
        nix::unistd::mkdir(&self.0.join(ANSWERS), Mode::from_bits_truncate(0o700))
            .map_err(|errno| Error::sys(format!("make {ANSWERS:?}"), errno))?;
        Ok((make(GATE)?, make(ANSWER)?))
    }

    /// Opens the gate of a waiting init: writes its word and returns where it answers. None when nobody waits.
    pub fn open_gate(&self) -> Result<Option<OwnedFd>> {
        let open = |name: &str, flags: OFlag| {
            nix::fcntl::open(&self.0.join(name), flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
        };
        let answer = match open(ANSWER, OFlag::O_RDONLY) {
            Err(Errno::ENOENT) => return Ok(None),
            other => other.map_err(|errno| Error::sys(format!("open {ANSWER:?}"), errno))?,
        };
        let gate = match open(GATE, OFlag::O_WRONLY) {
            Err(Errno::ENXIO | Errno::ENOENT) => return Ok(None),
            other => other.map_err(|errno| Error::sys(format!("open {GATE:?}"), errno))?,
        };
        nix::unistd::write(&gate, b"0").map_err(|errno| Error::sys(format!("write {GATE:?}"), errno))?;
        Ok(Some(answer))
    }

    /// Removes the gate: the container has been started.
    pub fn remove_gate(&self) {
        if self.is_marked() {
            let _ = fs::set_permissions(&self.0, fs::Permissions::from_mode(MODE));
            return;
        }
        for name in [GATE, ANSWER] {
            let _ = fs::remove_file(self.0.join(name));
        }
        let _ = fs::remove_dir(self.0.join(ANSWERS));
    }

    /// Removes the directory; Ok when it is gone already.
    pub fn remove(&self) -> Result<()> {
        // A restore that was killed has left the rootfs bound here: nothing below it may be removed.
        let bound = self.0.join(CRIU_ROOT);
        if let Err(err) = fs::remove_dir(&bound)
            && err.kind() != std::io::ErrorKind::NotFound
        {
            let flags = nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW;
            let unmounted = nix::mount::umount2(&bound, flags).map_err(std::io::Error::from);
            unmounted
                .and_then(|()| fs::remove_dir(&bound))
                .map_err(|e| Error::io(format!("unmount {:?}", bound.display().to_string()), &e))?;
        }
        // What most have left is the state alone.
        let _ = fs::remove_file(self.0.join(FILE));
        if fs::remove_dir(&self.0).is_ok() {
            return Ok(());
        }
        match fs::remove_dir_all(&self.0) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {:?}", self.0.display().to_string()), &err))
            }
            _ => Ok(()),
        }
    }

    /// True when there is such a directory, with or without a readable state.json.
    pub fn exists(&self) -> bool {
        self.0.is_dir()
    }
}

/// Ids of all containers below `root`, sorted.
pub fn ids(root: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(root) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| Error::io(format!("read {:?}", root.display().to_string()), &e))?,
    };
    let mut ids: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|id| check_id(id).is_ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// What /proc/PID/stat tells of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcStat {
    /// Z or X: it has exited.
    pub dead: bool,
    /// Start time in clock ticks after boot.
    pub start: u64,
}

/// Reads `/proc/<pid>/stat`; None when there is no such process.
pub fn proc_stat(pid: i32) -> Option<ProcStat> {
    // A process may call itself anything, also what is no UTF-8.
    parse_stat(&String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/stat")).ok()?))
}

fn parse_stat(text: &str) -> Option<ProcStat> {
    // The name in parentheses may hold anything, also parentheses.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X" | "x");
    Some(ProcStat { dead, start: fields.nth(18)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names_of_few_characters() {
        for good in ["a", "A-b_c+d.e", "..a", &"x".repeat(255)] {
            check_id(good).unwrap();
        }
        for bad in [".", "..", "a/b", "../x", "ä", "a b", &"x".repeat(256)] {
            let err = check_id(bad).unwrap_err();
            assert!(err.to_string().starts_with(INVALID_ID), "{err}");
        }
        assert_eq!(check_id("").unwrap_err().to_string(), "container id cannot be empty");
    }

    #[test]
    fn a_taken_id_is_refused_and_a_removed_one_is_free() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("deep/root");
        let dir = Dir::reserve(&root, "a", false).unwrap();
        assert_eq!(Dir::reserve(&root, "a", false).unwrap_err().kind(), Kind::AlreadyExists);
        assert_eq!(dir.load().unwrap_err().to_string(), CONTAINER_DOES_NOT_EXIST);
        assert_eq!(ids(&root).unwrap(), ["a"]);
        dir.remove().unwrap();
        dir.remove().unwrap();
        Dir::reserve(&root, "a", false).unwrap();
    }

    #[test]
    fn stat_is_read_past_any_name() {
        let text = "42 (a) b (c) Z 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 9876543 0 0";
        assert_eq!(parse_stat(text), Some(ProcStat { dead: true, start: 9_876_543 }));
        assert_eq!(parse_stat("x"), None);
    }

    #[test]
    fn nobody_waits_at_a_gate_without_a_reader() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::reserve(root.path(), "a", false).unwrap();
        assert!(dir.open_gate().unwrap().is_none());
        let (go, answer) = dir.make_gate().unwrap();
        assert!(dir.has_gate());
        assert!(dir.open_gate().unwrap().is_some());
        drop((go, answer));
        assert!(dir.open_gate().unwrap().is_none());
    }

    #[test]
    fn the_mark_of_a_gate_goes_with_the_start() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::reserve(root.path(), "a", true).unwrap();
        assert!(dir.has_gate());
        assert!(dir.open_gate().unwrap().is_none());
        dir.remove_gate();
        assert!(!dir.has_gate());
        assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o7777, MODE);
    }
}
