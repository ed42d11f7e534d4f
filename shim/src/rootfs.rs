//! Root file systems that containerd describes as mounts: mounted on the bundle's `rootfs`, and unmounted again.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use skiff::launch::chore::{self, Chore};
use skiff::launch::idmap;
use skiff::{Error, Kind, Result, limits};

use crate::process::settle;

/// What one of containerd's mounts asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Flags {
    flags: MsFlagsBits,
    propagation: Vec<u64>,
    data: Vec<String>,
    /// Lines of uid_map and gid_map: ids below are mapped.
    maps: (String, String),
}

type MsFlagsBits = u64;

/// Option words of containerd's mount package (core/mount/mount_linux.go).
fn parse(options: &[String]) -> Result<Flags> {
    let mut out = Flags::default();
    for option in options {
        let (set, clear) = match option.as_str() {
            "ro" => (libc::MS_RDONLY, 0),
            "rw" => (0, libc::MS_RDONLY),
            "nosuid" => (libc::MS_NOSUID, 0),
            "suid" => (0, libc::MS_NOSUID),
            "nodev" => (libc::MS_NODEV, 0),
            "dev" => (0, libc::MS_NODEV),
            "noexec" => (libc::MS_NOEXEC, 0),
            "exec" => (0, libc::MS_NOEXEC),
            "sync" => (libc::MS_SYNCHRONOUS, 0),
            "async" => (0, libc::MS_SYNCHRONOUS),
            "dirsync" => (libc::MS_DIRSYNC, 0),
            "remount" => (libc::MS_REMOUNT, 0),
            "mand" => (libc::MS_MANDLOCK, 0),
            "nomand" => (0, libc::MS_MANDLOCK),
            "atime" => (0, libc::MS_NOATIME),
            "noatime" => (libc::MS_NOATIME, 0),
            "diratime" => (0, libc::MS_NODIRATIME),
            "nodiratime" => (libc::MS_NODIRATIME, 0),
            "relatime" => (libc::MS_RELATIME, 0),
            "norelatime" => (0, libc::MS_RELATIME),
            "strictatime" => (libc::MS_STRICTATIME, 0),
            "nostrictatime" => (0, libc::MS_STRICTATIME),
            "bind" => (libc::MS_BIND, 0),
            "rbind" => (libc::MS_BIND | libc::MS_REC, 0),
            "defaults" => (0, 0),
            "loop" => return Err(Error::new(Kind::Unsupported, "rootfs: mount option \"loop\": not supported yet")),
            word => {
                if let Some(map) = word.strip_prefix("uidmap=") {
                    out.maps.0 = id_map(word, map)?;
                    continue;
                }
                if let Some(map) = word.strip_prefix("gidmap=") {
                    out.maps.1 = id_map(word, map)?;
                    continue;
                }
                match skiff::plan::mount_options::propagation(word) {
                    Some((flag, recursive)) => out.propagation.push(flag | if recursive { libc::MS_REC } else { 0 }),
                    None => out.data.push(word.to_string()),
                }
                (0, 0)
            }
        };
        out.flags = out.flags & !clear | set;
    }
    Ok(out)
}

/// `inside:outside:count[,...]` as lines of an id map.
fn id_map(option: &str, map: &str) -> Result<String> {
    let mut out = String::new();
    for entry in map.split(',') {
        let numbers: Vec<&str> = entry.split(':').collect();
        if numbers.len() != 3 || numbers.iter().any(|n| n.parse::<u32>().is_err()) {
            return Err(Error::invalid(format!("rootfs: mount option {option:?}"), "not inside:outside:count"));
        }
        out += &format!("{}\n", numbers.join(" "));
    }
    Ok(out)
}

/// Mounts in order on `bundle/rootfs`. After an error the caller takes down what is mounted already, and not before the end
/// of `mounting`.
///
/// A child does it where it might wait for a server or a program (FUSE, network file systems, types that mount what is
/// not a directory). Directories on block devices that the kernel has in memory already are mounted here: that takes a
/// tenth of the time that a child takes.
pub async fn set_up(bundle: &Path, mounts: &[Mount], mounting: &mut Option<Chore>) -> Result<()> {
    if mounts.iter().all(is_quick) {
        return mount_all(bundle, mounts);
    }
    let what = format!("mount {:?}", bundle.join("rootfs").display().to_string());
    let chore = mounting.insert(chore::start(what, limits::MOUNT, || mount_all(bundle, mounts))?);
    settle(chore).await
}

fn is_quick(one: &Mount) -> bool {
    let at_hand = |path: &str| skiff::sys::mount::cstring(path).is_ok_and(|path| skiff::sys::path::is_at_hand(&path));
    match one.type_.as_str() {
        "overlay" => one.options.iter().all(|option| match option.split_once('=') {
            Some(("lowerdir", layers)) => layers.split(':').all(at_hand),
            Some(("upperdir" | "workdir", dir)) => at_hand(dir),
            _ => true,
        }),
        _ => one.options.iter().any(|option| option == "bind" || option == "rbind") && at_hand(&one.source),
    }
}

/// Unmounts everything from `bundle/rootfs`, in a child: the last user of a file system waits for its end.
pub fn take_down(bundle: &Path) -> Result<Chore> {
    let what = format!("umount {:?}", bundle.join("rootfs").display().to_string());
    chore::start(what, limits::UNMOUNT, || unmount_all(bundle))
}

fn mount_all(bundle: &Path, mounts: &[Mount]) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    match std::fs::DirBuilder::new().mode(0o711).create(&rootfs) {
        Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io(format!("make {:?}", rootfs.display().to_string()), &err));
        }
        _ => {}
    }
    for (at, one) in mounts.iter().enumerate() {
        mount_one(&rootfs, one).map_err(|err| err.context(format!("rootfs[{at}]")))?;
    }
    Ok(())
}

fn mount_one(rootfs: &Path, one: &Mount) -> Result<()> {
    let target = if one.target.is_empty() { rootfs.to_path_buf() } else { inside(rootfs, &one.target)? };
    let parsed = parse(&one.options)?;
    let what = format!("mount {} {:?} at {:?}", one.type_, one.source, target.display().to_string());
    let flags = MsFlags::from_bits_retain(parsed.flags);
    let data = parsed.data.join(",");
    let none: Option<&str> = None;
    let fail = |errno| Error::sys(&what, errno);
    let is_bind = flags.contains(MsFlags::MS_BIND);
    let mapped = match (parsed.maps.0.as_str(), parsed.maps.1.as_str()) {
        ("", "") => None,
        (uids, gids) => Some(idmap::user_namespace(uids, gids).map_err(|err| err.context(&what))?),
    };
    let hint = |errno| {
        let err = Error::sys(format!("{what}: map ids"), errno);
        idmap::hint(errno).into_iter().fold(err, Error::with_hint)
    };
    if one.type_ == "overlay" && (mapped.is_some() || data.len() >= page_size()) {
        let layers = Layers::below(rootfs.with_file_name("layers"));
        overlay(&target, &parsed, flags, mapped.as_ref(), layers).map_err(if mapped.is_some() {
            &hint
        } else {
            &fail as &dyn Fn(Errno) -> Error
        })?;
    } else if let Some(namespace) = &mapped {
        bind_mapped(one, &target, flags, namespace).map_err(hint)?;
    } else {
        let first = if is_bind { flags & (MsFlags::MS_BIND | MsFlags::MS_REC) } else { flags };
        let data = if is_bind || data.is_empty() { none } else { Some(data.as_str()) };
        mount(Some(one.source.as_str()), &target, Some(one.type_.as_str()), first, data).map_err(fail)?;
        // The first call of a bind ignores every flag but these.
        if is_bind && flags != first {
            mount(none, &target, none, flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, none).map_err(fail)?;
        }
    }
    for propagation in parsed.propagation {
        mount(none, &target, none, MsFlags::from_bits_retain(propagation), none).map_err(fail)?;
    }
    Ok(())
}

fn page_size() -> usize {
    4096
}

/// mount(2) takes a page of options; fsconfig(2) takes layers one by one.
/// With ids mapped each lower layer is a mapped mount of its own, given by its descriptor (Linux 6.13) or by its name.
fn overlay(
    target: &Path,
    parsed: &Flags,
    flags: MsFlags,
    mapped: Option<&OwnedFd>,
    mut named: Layers,
) -> nix::Result<()> {
    use skiff::sys::mount::{FsContext, attach, cstring};
    let context = FsContext::open(c"overlay")?;
    // Detached, they are gone when their descriptors are.
    let mut copies = Vec::new();
    for option in &parsed.data {
        let (key, value) = option.split_once('=').map_or((option.as_str(), None), |(k, v)| (k, Some(v)));
        match (key, value) {
            ("lowerdir", Some(layers)) => {
                for layer in layers.split(':') {
                    match mapped {
                        Some(namespace) => {
                            let copy = mapped_copy(layer, namespace)?;
                            match context.set_fd(c"lowerdir+", copy.as_fd()) {
                                Err(Errno::EBADF | Errno::EINVAL) => {
                                    let path = cstring(named.add(&copy)?.into_os_string().into_vec())?;
                                    context.set(c"lowerdir+", Some(&path))?;
                                }
                                other => other?,
                            }
                            copies.push(copy);
                        }
                        None => context.set(c"lowerdir+", Some(&cstring(layer)?))?,
                    }
                }
            }
            (key, Some(value)) => context.set(&cstring(key)?, Some(&cstring(value)?))?,
            (key, None) => context.set(&cstring(key)?, None)?,
        }
    }
    let fd = context.mount(attributes(flags)).map_err(|(errno, _)| errno)?;
    attach(fd.as_fd(), open_path(target)?.as_fd())
}

/// Layers that have a name for as long as it takes to make an overlay of them.
struct Layers {
    dir: PathBuf,
    paths: Vec<PathBuf>,
}

impl Layers {
    /// None so far.
    fn below(dir: PathBuf) -> Layers {
        Layers { dir, paths: Vec::new() }
    }

    /// Mounts a detached layer.
    fn add(&mut self, layer: &OwnedFd) -> nix::Result<PathBuf> {
        let path = self.dir.join(self.paths.len().to_string());
        let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&path);
        made.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        self.paths.push(path.clone());
        skiff::sys::mount::attach(layer.as_fd(), open_path(&path)?.as_fd())?;
        Ok(path)
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = umount2(path, MntFlags::MNT_DETACH);
            let _ = std::fs::remove_dir(path);
        }
        if !self.paths.is_empty() {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}

fn open_path(path: &Path) -> nix::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
}

/// A detached copy of what is at `path`, with its ids mapped.
fn mapped_copy(path: &str, namespace: &OwnedFd) -> nix::Result<OwnedFd> {
    let copy = skiff::sys::mount::clone_tree(open_path(Path::new(path))?.as_fd(), c"", false)?;
    idmap::apply(&copy, namespace, false)?;
    Ok(copy)
}

fn bind_mapped(one: &Mount, target: &Path, flags: MsFlags, namespace: &OwnedFd) -> nix::Result<()> {
    use skiff::sys::mount::{MountAttr, attach, setattr};
    if !flags.contains(MsFlags::MS_BIND) {
        return Err(Errno::EOPNOTSUPP);
    }
    let copy = mapped_copy(&one.source, namespace)?;
    setattr(copy.as_fd(), false, &MountAttr { set: attributes(flags), ..MountAttr::default() })?;
    attach(copy.as_fd(), open_path(target)?.as_fd())
}

/// MOUNT_ATTR_* of mount(2)'s flags.
fn attributes(flags: MsFlags) -> u64 {
    use skiff::sys::mount::attr;
    let mut attrs = 0;
    for (flag, bit) in [
        (MsFlags::MS_RDONLY, attr::RDONLY),
        (MsFlags::MS_NOSUID, attr::NOSUID),
        (MsFlags::MS_NODEV, attr::NODEV),
        (MsFlags::MS_NOEXEC, attr::NOEXEC),
        (MsFlags::MS_NOATIME, attr::NOATIME),
    ] {
        if flags.contains(flag) {
            attrs |= bit;
        }
    }
    attrs
}

/// A mount's target below the rootfs, which may have symlinks of an image in it by now.
fn inside(rootfs: &Path, target: &str) -> Result<PathBuf> {
    use nix::fcntl::OFlag;
    let what = || format!("rootfs: open target {target:?}");
    let dir = |path: &Path| {
        nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
    };
    let root = dir(rootfs).map_err(|errno| Error::sys(what(), errno))?;
    let relative = std::ffi::CString::new(target.trim_start_matches('/'))
        .map_err(|_| Error::invalid("rootfs.target", "contains a NUL byte"))?;
    let fd = skiff::sys::path::open_in_root(root.as_fd(), &relative, OFlag::O_PATH)
        .map_err(|errno| Error::sys(what(), errno))?;
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    std::fs::read_link(&link).map_err(|e| Error::io(what(), &e))
}

/// Unmounts everything from `bundle/rootfs`. Detached, so that it does not wait for users of the mount.
pub fn unmount_all(bundle: &Path) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    for _ in 0..64 {
        match umount2(&rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(Error::sys(format!("unmount {:?}", rootfs.display().to_string()), errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> Result<Flags> {
        parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn words_become_flags_propagation_and_data() {
        let got = parsed(&["rbind", "ro", "rslave", "lowerdir=/a:/b", "nosuid", "suid"]).unwrap();
        assert_eq!(got.flags, libc::MS_BIND | libc::MS_REC | libc::MS_RDONLY);
        assert_eq!(got.propagation, [libc::MS_SLAVE | libc::MS_REC]);
        assert_eq!(got.data, ["lowerdir=/a:/b"]);
    }

    #[test]
    fn what_is_not_supported_is_said() {
        assert_eq!(parsed(&["loop"]).unwrap_err().kind(), Kind::Unsupported);
        let maps = parsed(&["uidmap=0:100000:65536,65536:1:1", "gidmap=0:7:1"]).unwrap().maps;
        assert_eq!(maps, ("0 100000 65536\n65536 1 1\n".to_string(), "0 7 1\n".to_string()));
        assert_eq!(parsed(&["uidmap=0:1"]).unwrap_err().kind(), Kind::Invalid);
    }
}
