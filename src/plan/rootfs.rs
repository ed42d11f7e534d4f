//! `root`, `mounts`, `linux.devices`, masked and read-only paths.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType as Kind, Mount, Spec};

use super::mount_options::{self, Options};
use super::namespaces::{self, Namespaces};
use super::{Request, checks, cstring, inside};
use crate::host::{Cgroups, Hierarchy};
use crate::sys::mount::attr;
use crate::{Error, Result};

/// The root file system and everything that is mounted or made in it.
#[derive(Clone, Debug)]
pub struct Rootfs {
    /// Absolute path on the host.
    pub path: CString,
    /// The container has a mount namespace that is not the caller's.
    pub mount_namespace: bool,
    /// The root mount becomes read-only at the end.
    pub readonly: bool,
    /// MS_MOVE and chroot instead of pivot_root.
    pub no_pivot: bool,
    /// Propagation of `/` before anything is mounted.
    pub host_propagation: (u64, bool),
    /// Propagation of the container's `/` at the end.
    pub propagation: Option<(u64, bool)>,
    /// Mounts in order.
    pub mounts: Vec<MountPlan>,
    /// Devices to make; empty when `/dev` is a bind mount.
    pub devices: Vec<Device>,
    /// Symlinks in `/dev`: name and target.
    pub symlinks: Vec<(CString, CString)>,
    /// A pty slave is bound onto `/dev/console`.
    pub console: bool,
    /// Paths that become read-only, below the root.
    pub readonly_paths: Vec<CString>,
    /// Paths that are hidden, below the root.
    pub masked_paths: Vec<CString>,
    /// The SELinux context of the file systems that are made for the container.
    pub mount_label: Option<CString>,
}

/// One mount.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// Where, below the root.
    pub destination: CString,
    /// What.
    pub kind: MountKind,
    /// Attributes and propagation.
    pub options: Options,
    /// It becomes read-only only when everything in it has been made.
    pub late_readonly: bool,
    /// Its ids are mapped.
    pub idmap: Option<IdMap>,
}

/// How the ids of a mount are mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// And those of everything below it.
    pub recursive: bool,
    /// Lines of uid_map and gid_map; None: the user namespace that the container joins.
    pub maps: Option<(String, String)>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    /// A copy of another mount.
    Bind {
        /// Absolute path on the host.
        source: CString,
        /// Where below the root it is, when it is there: what earlier mounts have put there is bound then.
        within: Option<CString>,
        /// With everything below it.
        recursive: bool,
    },
    /// A new file system.
    New {
        /// Its type.
        fstype: CString,
        /// Options for fsconfig(2): key, and value unless it is a flag.
        options: Vec<(CString, Option<CString>)>,
        /// A tmpfs without `mode=`: it takes the mode of the directory that it covers.
        mode_of_target: bool,
    },
    /// The cgroup v2 tree. The runtime's own cgroup stands in where it cannot be mounted, and the container has none.
    CgroupV2(CString),
    /// A tmpfs with the v1 hierarchies in it.
    CgroupV1(Vec<V1Mount>),
}

/// One v1 hierarchy in a `cgroup` mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct V1Mount {
    /// Directory name, as on the host.
    pub name: CString,
    /// One of its controllers: how its directory is found among the container's cgroups.
    pub controller: String,
    /// The runtime's own cgroup in it: bound when the container has no cgroup namespace and no cgroup of its own.
    pub own: CString,
    /// Options of a new mount of it.
    pub options: Vec<(CString, Option<CString>)>,
    /// Names of single controllers that link to a combined directory.
    pub links: Vec<CString>,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Where, below the root.
    pub path: CString,
    /// Where the host has it: bound when it cannot be made.
    pub host: CString,
    /// S_IFCHR, S_IFBLK or S_IFIFO.
    pub format: u32,
    /// Device number.
    pub rdev: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What may be mounted inside /proc: files that LXCFS and others replace.
const PROC_ALLOWED: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Plans the root file system.
pub fn plan(request: &Request<'_>, spec: &Spec, namespaces: &Namespaces, host: &Cgroups) -> Result<Rootfs> {
    let root = spec.root().as_ref().ok_or_else(|| Error::invalid("root", "must not be empty"))?;
    if root.path().as_os_str().is_empty() {
        return Err(Error::invalid("root.path", "must not be empty"));
    }
    let linux = spec.linux().as_ref();
    let path = super::clean(&request.bundle.join(root.path()));
    let mount_label = linux.and_then(|l| l.mount_label().as_deref()).filter(|label| !label.is_empty());
    let mount_label = mount_label.map(|label| cstring("linux.mountLabel", label)).transpose()?;
    let mut mounts = Vec::new();
    for (at, mount) in spec.mounts().iter().flatten().enumerate() {
        let (field, places) = (format!("mounts[{at}]"), (request.bundle, path.as_path()));
        mounts.push(plan_mount(&field, mount, places, namespaces, host, mount_label.as_ref())?);
    }
    let propagation = linux.and_then(|l| l.rootfs_propagation().as_deref()).filter(|word| !word.is_empty());
    let propagation = propagation
        .map(|word| {
            mount_options::propagation(word)
                .ok_or_else(|| Error::invalid("linux.rootfsPropagation", format!("{word:?} is not a propagation")))
        })
        .transpose()?;
    let dev_is_bound =
        mounts.iter().any(|m| m.destination.as_bytes() == b"dev" && matches!(m.kind, MountKind::Bind { .. }));
    let paths = |field: &str, list: Option<&Vec<String>>| -> Result<Vec<CString>> {
        let mut out: Vec<CString> = Vec::new();
        for (at, path) in list.into_iter().flatten().enumerate() {
            let field = format!("{field}[{at}]");
            if !path.starts_with('/') {
                return Err(Error::invalid(field, "must be an absolute path"));
            }
            let path = inside(field, Path::new(path))?;
            if !out.contains(&path) {
                out.push(path);
            }
        }
        Ok(out)
    };
    Ok(Rootfs {
        path: cstring("root.path", request.bundle.join(root.path()).as_os_str().as_bytes())?,
        mount_namespace: namespaces.has(Kind::Mount),
        readonly: root.readonly().unwrap_or(false),
        no_pivot: request.no_pivot,
        host_propagation: match propagation {
            // What is unbindable could not become the root.
            Some((libc::MS_UNBINDABLE, recursive)) => (libc::MS_PRIVATE, recursive),
            other => other.unwrap_or((libc::MS_SLAVE, true)),
        },
        propagation,
        mounts,
        devices: if dev_is_bound { Vec::new() } else { devices(spec)? },
        symlinks: if dev_is_bound { Vec::new() } else { symlinks() },
        console: request.terminal,
        readonly_paths: paths("linux.readonlyPaths", linux.and_then(|l| l.readonly_paths().as_ref()))?,
        masked_paths: paths("linux.maskedPaths", linux.and_then(|l| l.masked_paths().as_ref()))?,
        mount_label,
    })
}

fn plan_mount(
    field: &str,
    mount: &Mount,
    (bundle, rootfs): (&Path, &Path),
    namespaces: &Namespaces,
    host: &Cgroups,
    label: Option<&CString>,
) -> Result<MountPlan> {
    if mount.destination().as_os_str().is_empty() {
        return Err(Error::invalid(format!("{field}.destination"), "must not be empty"));
    }
    // Some callers say where the destination is on the host.
    let within = super::clean(mount.destination());
    let within = within.strip_prefix(rootfs).map_or(within.as_path(), |rest| rest).to_path_buf();
    let destination = inside(format!("{field}.destination"), &within)?;
    if destination.as_bytes() == b"." && !namespaces.has(Kind::Mount) {
        return Err(Error::invalid(
            format!("{field}.destination"),
            "is the root of a container without a mount namespace",
        ));
    }
    let options = mount_options::parse(mount.options().as_deref().unwrap_or_default());
    let source = mount.source().as_ref().map(|path| path.as_os_str().as_bytes()).unwrap_or_default();
    let fstype = mount.typ().as_deref().unwrap_or_default();
    let cleaned = super::clean(&within);
    let kind = if let Some(recursive) = options.bind.or((fstype == "bind").then_some(false)) {
        if source.is_empty() {
            return Err(Error::invalid(format!("{field}.source"), "must not be empty for a bind mount"));
        }
        if let Some(option) = options.data.first() {
            return Err(Error::invalid(
                format!("{field}.options"),
                format!("{option:?}: bind mounts cannot have any filesystem-specific options applied"),
            ));
        }
        let source = bundle.join(Path::new(std::ffi::OsStr::from_bytes(source)));
        let within = super::clean(&source).strip_prefix(rootfs).ok().map(Path::to_path_buf);
        let within = within.map(|path| inside(format!("{field}.source"), &path)).transpose()?;
        let source = cstring(format!("{field}.source"), source.as_os_str().as_bytes())?;
        MountKind::Bind { source, within: within.filter(|_| rootfs != Path::new("/")), recursive }
    } else if fstype == "cgroup" || fstype == "cgroup2" {
        if host.pure_v2() || fstype == "cgroup2" {
            let own = host.v2.as_ref().map_or_else(PathBuf::new, Hierarchy::own_directory);
            MountKind::CgroupV2(cstring(field, own.as_os_str().as_bytes())?)
        } else {
            MountKind::CgroupV1(v1_mounts(field, host)?)
        }
    } else {
        if fstype.is_empty() {
            return Err(Error::invalid(format!("{field}.type"), "must not be empty unless it is a bind mount"));
        }
        new_filesystem(field, fstype, source, &options, label)?
    };
    let is_proc_root = cleaned == Path::new("/proc");
    if cleaned.starts_with("/proc") && !is_proc_root && !PROC_ALLOWED.iter().any(|ok| cleaned == Path::new(ok)) {
        return Err(Error::invalid(
            format!("{field}.destination"),
            format!("{:?} cannot be mounted because it is inside /proc", cleaned.display().to_string()),
        ));
    }
    let idmap = id_map(field, mount, &options, namespaces)?;
    if idmap.is_some() && !matches!(kind, MountKind::Bind { .. }) {
        return Err(checks::unsupported(&format!("{field}: id-mapped mounts that are no bind mounts")));
    }
    if options.tmpcopyup && fstype != "tmpfs" {
        return Err(Error::invalid(format!("{field}.options"), "tmpcopyup is for tmpfs alone"));
    }
    let late_readonly = options.set & attr::RDONLY != 0
        && match &kind {
            MountKind::New { fstype, .. } => fstype.as_bytes() == b"tmpfs" || cleaned == Path::new("/dev"),
            MountKind::CgroupV1(_) => true,
            _ => false,
        };
    Ok(MountPlan { destination, kind, options, late_readonly, idmap })
}

/// Mappings of the mount's own, or those of the container with `idmap` alone.
fn id_map(field: &str, mount: &Mount, options: &Options, namespaces: &Namespaces) -> Result<Option<IdMap>> {
    let uid = mount.uid_mappings().as_deref().unwrap_or_default();
    let gid = mount.gid_mappings().as_deref().unwrap_or_default();
    if options.idmap.is_none() && uid.is_empty() && gid.is_empty() {
        return Ok(None);
    }
    let recursive = options.idmap.unwrap_or(false);
    let maps = if uid.is_empty() && gid.is_empty() {
        if namespaces.makes(Kind::User) {
            Some((namespaces.uid_map.clone(), namespaces.gid_map.clone()))
        } else if namespaces.joined(Kind::User).is_some() {
            None
        } else {
            return Err(Error::invalid(
                format!("{field}.options"),
                "idmap without mappings of its own needs a user namespace whose mappings it takes",
            ));
        }
    } else {
        for (name, missing) in [("uidMappings", uid.is_empty()), ("gidMappings", gid.is_empty())] {
            if missing {
                return Err(Error::invalid(format!("{field}.{name}"), "both uidMappings and gidMappings are needed"));
            }
        }
        Some((
            namespaces::map(&format!("{field}.uidMappings"), uid)?,
            namespaces::map(&format!("{field}.gidMappings"), gid)?,
        ))
    };
    Ok(Some(IdMap { recursive, maps }))
}

fn new_filesystem(
    field: &str,
    fstype: &str,
    source: &[u8],
    options: &Options,
    label: Option<&CString>,
) -> Result<MountKind> {
    let field = format!("{field}.options");
    let mut list: Vec<(CString, Option<CString>)> = Vec::new();
    if !source.is_empty() {
        list.push((c"source".to_owned(), Some(cstring(&field, source)?)));
    }
    // Only a file system on a device knows read-only as more than a property of the mount.
    if options.set & attr::RDONLY != 0 && source.starts_with(b"/dev/") {
        list.push((c"ro".to_owned(), None));
    }
    for flag in &options.superblock {
        list.push((cstring(&field, *flag)?, None));
    }
    for option in &options.data {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(cstring(&field, value)?)),
            None => (option.as_str(), None),
        };
        list.push((cstring(&field, key)?, value));
    }
    // The first two take none, and older kernels none for the third.
    if let Some(label) = label.filter(|_| !matches!(fstype, "proc" | "sysfs" | "mqueue")) {
        list.push((c"context".to_owned(), Some(label.clone())));
    }
    let mode_of_target = fstype == "tmpfs" && !options.data.iter().any(|o| o.starts_with("mode="));
    Ok(MountKind::New { fstype: cstring(&field, fstype)?, options: list, mode_of_target })
}

fn v1_mounts(field: &str, host: &Cgroups) -> Result<Vec<V1Mount>> {
    let mut out = Vec::new();
    for hierarchy in &host.v1 {
        let Some(first) = hierarchy.controllers.first() else { continue };
        let name = hierarchy.mountpoint.file_name().map(OsStrExt::as_bytes).unwrap_or(first.as_bytes());
        let mut options = Vec::new();
        for controller in &hierarchy.controllers {
            match controller.strip_prefix("name=") {
                Some(name) => {
                    options.push((c"none".to_owned(), None));
                    options.push((c"name".to_owned(), Some(cstring(field, name)?)));
                }
                None => options.push((cstring(field, controller.as_str())?, None)),
            }
        }
        let links = if hierarchy.controllers.len() > 1 {
            hierarchy
                .controllers
                .iter()
                .filter(|c| c.as_bytes() != name)
                .map(|c| cstring(field, c.as_str()))
                .collect::<Result<_>>()?
        } else {
            Vec::new()
        };
        out.push(V1Mount {
            name: cstring(field, name)?,
            controller: first.clone(),
            own: cstring(field, hierarchy.own_directory().as_os_str().as_bytes())?,
            options,
            links,
        });
    }
    Ok(out)
}

/// runc's default devices: there unless the spec has others in their places.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("tty", 5, 0), ("random", 1, 8), ("urandom", 1, 9)];

fn devices(spec: &Spec) -> Result<Vec<Device>> {
    let mut out: Vec<Device> = Vec::new();
    for (at, device) in spec.linux().iter().filter_map(|l| l.devices().as_ref()).flatten().enumerate() {
        let field = format!("linux.devices[{at}]");
        if !device.path().is_absolute() {
            return Err(Error::invalid(format!("{field}.path"), "must be an absolute path"));
        }
        let path = inside(format!("{field}.path"), device.path())?;
        // The container's own devpts has the multiplexer; a node on the host's would open the host's terminals.
        if path.as_bytes() == b"dev/ptmx" {
            continue;
        }
        let format = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::P => libc::S_IFIFO,
            LinuxDeviceType::A => return Err(Error::invalid(format!("{field}.type"), "must be one of c, b, u, p")),
        };
        let number = |name: &str, value: i64, max: i64| {
            u32::try_from(value)
                .ok()
                .filter(|_| value <= max)
                .ok_or_else(|| Error::invalid(format!("{field}.{name}"), format!("{value} is not a device number")))
        };
        let rdev = if format == libc::S_IFIFO {
            0
        } else {
            libc::makedev(number("major", device.major(), 0xfff)?, number("minor", device.minor(), 0xf_ffff)?)
        };
        out.push(Device {
            path,
            host: cstring(&field, device.path().as_os_str().as_bytes())?,
            format,
            rdev,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    for (name, major, minor) in DEFAULT_DEVICES {
        let path = cstring("linux.devices", format!("dev/{name}"))?;
        if out.iter().any(|device| device.path == path) {
            continue;
        }
        out.push(Device {
            path,
            host: cstring("linux.devices", format!("/dev/{name}"))?,
            format: libc::S_IFCHR,
            rdev: libc::makedev(major, minor),
            mode: 0o666,
            uid: 0,
            gid: 0,
        });
    }
    Ok(out)
}

fn symlinks() -> Vec<(CString, CString)> {
    let links = [
        (c"ptmx", c"pts/ptmx"),
        (c"fd", c"/proc/self/fd"),
        (c"stdin", c"/proc/self/fd/0"),
        (c"stdout", c"/proc/self/fd/1"),
        (c"stderr", c"/proc/self/fd/2"),
        (c"core", c"/proc/kcore"),
    ];
    links.map(|(name, target)| (name.to_owned(), target.to_owned())).to_vec()
}

/// CLONE_NEWCGROUP is asked for: cgroup mounts are new mounts, not binds.
pub fn cgroup_namespace(namespaces: &Namespaces) -> bool {
    namespaces.has(Kind::Cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(extra: &str) -> Result<Rootfs> {
        let spec: Spec = serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"linux":{{}}{extra}}}"#
        ))
        .unwrap();
        let request = Request {
            id: "a",
            bundle: Path::new("/b"),
            terminal: false,
            systemd_cgroup: false,
            no_pivot: false,
            no_new_keyring: false,
            rootless: false,
        };
        let namespaces = Namespaces { new: Kind::Mount as u64, ..Namespaces::default() };
        plan(&request, &spec, &namespaces, &Cgroups::default())
    }

    #[test]
    fn a_relative_root_is_in_the_bundle() {
        let rootfs = planned("").unwrap();
        assert_eq!(rootfs.path.to_bytes(), b"/b/rootfs");
        assert_eq!(rootfs.host_propagation, (libc::MS_SLAVE, true));
        assert_eq!(rootfs.devices.len(), 6);
    }

    #[test]
    fn mounts_become_binds_and_new_file_systems() {
        let rootfs = planned(
            r#","mounts":[
                {"destination":"/data","source":"vol","options":["rbind","ro"]},
                {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","ro","mode=1777","size=64k"]},
                {"destination":"run","type":"tmpfs","source":"tmpfs"}]"#,
        )
        .unwrap();
        let [bind, shm, run] = &rootfs.mounts[..] else { panic!("three mounts") };
        assert_eq!(bind.kind, MountKind::Bind { source: c"/b/vol".to_owned(), within: None, recursive: true });
        assert!(!bind.late_readonly);
        assert!(shm.late_readonly);
        let MountKind::New { options, mode_of_target, .. } = &shm.kind else { panic!("a new file system") };
        assert!(!mode_of_target);
        assert_eq!(options[1], (c"mode".to_owned(), Some(c"1777".to_owned())));
        assert!(matches!(run.kind, MountKind::New { mode_of_target: true, .. }));
        assert_eq!(run.destination.to_bytes(), b"run");
    }

    #[test]
    fn errors_name_the_mount() {
        for (mounts, want) in [
            (r#"{"destination":"/proc/sys","type":"tmpfs"}"#, "mounts[0].destination: \"/proc/sys\" cannot be mounted"),
            (r#"{"destination":"/x/../proc/1","type":"tmpfs"}"#, "mounts[0].destination: \"/proc/1\" cannot"),
            (
                r#"{"destination":"/a","source":"/b","options":["bind","size=1"]}"#,
                "mounts[0].options: \"size=1\": bind",
            ),
            (r#"{"destination":"/a"}"#, "mounts[0].type: must not be empty"),
            (r#"{"destination":"/a","options":["bind"]}"#, "mounts[0].source: must not be empty"),
        ] {
            let err = planned(&format!(r#","mounts":[{mounts}]"#)).unwrap_err().to_string();
            assert!(err.starts_with(want), "{err}");
        }
        planned(r#","mounts":[{"destination":"/proc/meminfo","source":"/x","options":["bind"]}]"#).unwrap();
    }
}
