//! Facts about this machine, read once. Does not live here: decisions made from them (plan).

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::{Error, Result};

/// Where cgroups are mounted, and of which kind.
#[derive(Clone, Debug, Default)]
pub struct Cgroups {
    /// v1 hierarchies: controller names (or `name=systemd`), mountpoint, and this process's own path in it.
    pub v1: Vec<Hierarchy>,
    /// The v2 mount: `/sys/fs/cgroup` where pure, elsewhere on hybrid hosts.
    pub v2: Option<Hierarchy>,
}

/// One mounted cgroup hierarchy.
#[derive(Clone, Debug, Default)]
pub struct Hierarchy {
    /// Controllers; empty on v2.
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The path of this process's cgroup in it, from `/proc/self/cgroup`.
    pub own: PathBuf,
}

impl Hierarchy {
    /// The directory of this process's cgroup.
    pub fn own_directory(&self) -> PathBuf {
        self.mountpoint.join(self.own.strip_prefix("/").unwrap_or(&self.own))
    }
}

/// Options of a v1 superblock that are no controllers.
const NO_CONTROLLERS: [&str; 7] = ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "favordynmods"];

impl Cgroups {
    /// Reads `/proc/self/cgroup` and looks at the usual places; `/proc/self/mountinfo`, which is as long as the host has
    /// mounts, only where a hierarchy is elsewhere.
    pub fn read() -> Result<Cgroups> {
        let read = |path: &str| read_proc(path).map_err(|e| Error::io(format!("read {path:?}"), &e));
        let own = read("/proc/self/cgroup")?;
        match usual(&own, &kinds_of_places()) {
            Some(cgroups) => Ok(cgroups),
            None => Ok(parse(&read("/proc/self/mountinfo")?, &own)),
        }
    }

    /// True when only v2 is mounted.
    pub fn pure_v2(&self) -> bool {
        self.v1.is_empty() && self.v2.is_some()
    }
}

/// Reads a file of /proc, whose size is not known beforehand, in few reads. A name in it may be no UTF-8.
fn read_proc(path: &str) -> std::io::Result<String> {
    let mut bytes = Vec::with_capacity(16 << 10);
    std::fs::File::open(path)?.read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|err| String::from_utf8_lossy(err.as_bytes()).into_owned()))
}

/// Where systemd and others mount cgroups (cgroups(7)).
const TOP: &CStr = c"/sys/fs/cgroup";

/// What a directory is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filesystem {
    Tmpfs,
    CgroupV1,
    CgroupV2,
    Other,
}

/// Tells what the places are on that have these names below [`TOP`].
fn kinds_of_places() -> impl Fn(&str) -> Filesystem {
    let top = crate::sys::path::open_dir(TOP);
    move |name| {
        let Ok(top) = &top else { return Filesystem::Other };
        // One name to look up from there on, not four.
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let magic =
            nix::fcntl::openat(top, name, flags, Mode::empty()).and_then(|dir| crate::sys::path::magic(dir.as_fd()));
        match magic {
            Ok(libc::TMPFS_MAGIC) => Filesystem::Tmpfs,
            Ok(libc::CGROUP_SUPER_MAGIC) => Filesystem::CgroupV1,
            Ok(libc::CGROUP2_SUPER_MAGIC) => Filesystem::CgroupV2,
            _ => Filesystem::Other,
        }
    }
}

/// The hierarchies of `/proc/self/cgroup`, each at its usual place below [`TOP`]. None when one of them is not there. Below a tmpfs, or a cgroup2 for v1, a directory of their file system can only be their mount.
fn usual(cgroup: &str, kind: &dyn Fn(&str) -> Filesystem) -> Option<Cgroups> {
    let below = kind(".");
    let mut out = Cgroups::default();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, own) = (fields.next()?, fields.next()?, fields.next()?);
        let (name, wanted) = match (controllers, below) {
            ("", Filesystem::CgroupV2) => ("", Filesystem::CgroupV2),
            ("", Filesystem::Tmpfs) => ("unified", Filesystem::CgroupV2),
            (_, Filesystem::CgroupV2 | Filesystem::Tmpfs) => {
                (controllers.strip_prefix("name=").unwrap_or(controllers), Filesystem::CgroupV1)
            }
            _ => return None,
        };
        if !name.is_empty() && kind(name) != wanted {
            return None;
        }
        let top = OsStr::from_bytes(TOP.to_bytes());
        let mountpoint = if name.is_empty() { PathBuf::from(top) } else { Path::new(top).join(name) };
        let own = PathBuf::from(own);
        if controllers.is_empty() {
            out.v2 = Some(Hierarchy { controllers: Vec::new(), mountpoint, own });
        } else {
            let controllers = controllers.split(',').map(str::to_string).collect();
            out.v1.push(Hierarchy { controllers, mountpoint, own });
        }
    }
    // The order of their making, which is that of the table of mounts.
    out.v1.reverse();
    Some(out)
}

fn parse(mountinfo: &str, cgroup: &str) -> Cgroups {
    let own: HashMap<&str, &str> = cgroup
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            Some(controllers.split(',').map(move |controller| (controller, path)))
        })
        .flatten()
        .collect();
    let own = |controller: &str| PathBuf::from(own.get(controller).copied().unwrap_or("/"));
    let mut out = Cgroups::default();
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        let mut filesystem = filesystem.split(' ');
        let (fstype, options) = (filesystem.next().unwrap_or(""), filesystem.nth(1).unwrap_or(""));
        let Some(mountpoint) = mount.split(' ').nth(4) else { continue };
        let place = || PathBuf::from(unescape(mountpoint));
        match fstype {
            "cgroup2" if out.v2.is_none() || mountpoint == "/sys/fs/cgroup" => {
                out.v2 = Some(Hierarchy { controllers: Vec::new(), mountpoint: place(), own: own("") });
            }
            "cgroup" => {
                let controllers: Vec<String> = options
                    .split(',')
                    .filter(|o| !NO_CONTROLLERS.contains(o) && !o.starts_with("release_agent="))
                    .map(str::to_string)
                    .collect();
                let Some(first) = controllers.first() else { continue };
                if out.v1.iter().all(|hierarchy| !hierarchy.controllers.contains(first)) {
                    let own = own(first);
                    out.v1.push(Hierarchy { controllers, mountpoint: place(), own });
                }
            }
            _ => {}
        }
    }
    out
}

/// True for an ordinary user, and for a root that is one only in its user namespace, when this process first asked.
pub fn rootless() -> bool {
    static ROOTLESS: OnceLock<bool> = OnceLock::new();
    let whole = |text: &str| text.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    *ROOTLESS.get_or_init(|| {
        !nix::unistd::geteuid().is_root() || std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !whole(&map))
    })
}

/// Where something is mounted, in the order of the mounts' making.
pub fn mount_points() -> Vec<PathBuf> {
    let mountinfo = read_proc("/proc/self/mountinfo").unwrap_or_default();
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(|at| PathBuf::from(unescape(at))).collect()
}

/// mountinfo writes space, tab, newline and backslash in octal (proc_pid_mountinfo(5)).
pub(crate) fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_host_has_both() {
        let mountinfo = "\
25 20 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
26 25 0:23 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw,nsdelegate
27 25 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
28 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
29 20 0:25 / /mnt/again rw - cgroup cgroup rw,cpu,cpuacct";
        let host = parse(mountinfo, "3:cpu,cpuacct:/user\n1:name=systemd:/init.scope\n0::/init.scope\n");
        assert!(!host.pure_v2());
        assert_eq!(host.v2.unwrap().own, Path::new("/init.scope"));
        assert_eq!(host.v1.len(), 2);
        assert_eq!(host.v1[1].controllers, ["cpu", "cpuacct"]);
        assert_eq!(host.v1[1].mountpoint, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(host.v1[1].own, Path::new("/user"));
        assert_eq!(host.v1[0].controllers, ["name=systemd"]);
    }

    #[test]
    fn hierarchies_are_looked_for_where_they_usually_are() {
        let hybrid = |name: &str| match name {
            "." => Filesystem::Tmpfs,
            "unified" => Filesystem::CgroupV2,
            "cpu,cpuacct" | "systemd" => Filesystem::CgroupV1,
            _ => Filesystem::Other,
        };
        let host = usual("3:cpu,cpuacct:/user\n1:name=systemd:/init.scope\n0::/init.scope\n", &hybrid).unwrap();
        assert_eq!(host.v2.unwrap().mountpoint, Path::new("/sys/fs/cgroup/unified"));
        let [systemd, cpu] = &host.v1[..] else { panic!("{:?}", host.v1) };
        assert_eq!((systemd.controllers.len(), systemd.mountpoint.as_path()), (1, Path::new("/sys/fs/cgroup/systemd")));
        assert_eq!(cpu.controllers, ["cpu", "cpuacct"]);
        assert_eq!(cpu.own, Path::new("/user"));

        // Mounted elsewhere, or not at all: the table of mounts tells.
        assert!(usual("4:memory:/\n0::/\n", &hybrid).is_none());
        assert!(usual("0::/\n", &|_| Filesystem::Other).is_none());

        let pure = |name: &str| match name {
            "." | "memory" => Filesystem::CgroupV2,
            _ => Filesystem::Other,
        };
        assert!(usual("0::/a\n", &pure).unwrap().pure_v2());
        // A group of v2 that has the name of a controller of v1.
        assert!(usual("4:memory:/\n0::/\n", &pure).is_none());
    }

    #[test]
    fn a_v2_host_has_one() {
        let host = parse("25 20 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", "0::/\n");
        assert!(host.pure_v2());
    }
}
