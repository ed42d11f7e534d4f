//! Mounts, devices, masks and the root itself, all by descriptors below the root's own.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, fstat};

use super::report::{At, Failure, Record, Report, Step};
use crate::plan::rootfs::{Device, MountKind, MountPlan, Rootfs, V1Mount};
use crate::sys::mount::{self, FsContext, MountAttr, attr};
use crate::sys::path;

const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// The root mount with everything in it, before it becomes `/`.
#[derive(Debug)]
pub struct Prepared {
    /// The root mount.
    pub root: OwnedFd,
    /// Mounts that become read-only at the end, by their place in the plan.
    late: Vec<(usize, OwnedFd)>,
    /// The host's `/dev/null`, from before the root was changed.
    null: Cover,
}

/// A mount that hides paths. The first one is hidden by the mount itself, the others by copies of it: kernels before
/// 6.15 copy attached mounts only.
#[derive(Debug)]
struct Cover {
    mount: OwnedFd,
    attached: bool,
}

impl Cover {
    fn new(mount: OwnedFd) -> Cover {
        Cover { mount, attached: false }
    }

    fn hide(&mut self, target: &OwnedFd) -> nix::Result<()> {
        if std::mem::replace(&mut self.attached, true) {
            let copy = mount::clone_tree(self.mount.as_fd(), c"", false)?;
            return mount::attach(copy.as_fd(), target.as_fd());
        }
        mount::attach(self.mount.as_fd(), target.as_fd())
    }
}

/// What the mounts need to know beside the plan.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// Sources of bind mounts that the parent has opened, by place in the plan; the others are opened here.
    pub sources: &'a [Option<OwnedFd>],
    /// The way to the parent.
    pub report: &'a Report,
    /// The container's cgroup directories: controller to path, "" on v2.
    pub cgroups: &'a BTreeMap<String, PathBuf>,
    /// The container has a cgroup namespace of its own.
    pub cgroup_namespace: bool,
    /// Device nodes cannot be made: they are bound from the host.
    pub bind_devices: bool,
}

/// Makes the root mount and everything in it.
pub fn prepare(plan: &Rootfs, around: &Surroundings<'_>) -> Result<Prepared, Failure> {
    let null = host_null().map(Cover::new).at(Step::MaskedPath)?;
    let mut root = if plan.mount_namespace {
        set_propagation(c"/", plan.host_propagation).at(Step::HostPropagation)?;
        bind_root(plan)?
    } else {
        open_root(&plan.path).at(Step::Rootfs)?
    };
    let mut late = Vec::new();
    for (at, mount) in plan.mounts.iter().enumerate() {
        let fd = one_mount(&root, mount, at, around)?;
        if mount.destination.to_bytes() == b"." {
            if mount.options.propagation.is_empty() {
                // pivot_root(2) refuses a root that is shared, as a copy of a shared mount is.
                let private = MountAttr { propagation: libc::MS_PRIVATE, ..MountAttr::default() };
                mount::setattr(fd.as_fd(), false, &private).at_item(Step::MountAttributes, at)?;
            }
            root = fd.try_clone().map_err(|_| Errno::EMFILE).at_item(Step::Mount, at)?;
        }
        if mount.late_readonly {
            late.push((at, fd));
        }
    }
    let mut dir = None;
    for (at, device) in plan.devices.iter().enumerate() {
        make_device(&root, &mut dir, device, around.bind_devices).at_item(Step::Device, at)?;
    }
    symlinks(&root, &plan.symlinks)?;
    Ok(Prepared { root, late, null })
}

fn set_propagation(path: &CStr, (flag, recursive): (u64, bool)) -> nix::Result<()> {
    let none: Option<&CStr> = None;
    let rec = if recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    nix::mount::mount(none, path, none, MsFlags::from_bits_retain(flag) | rec, none)
}

fn host_null() -> nix::Result<OwnedFd> {
    let null = nix::fcntl::open(c"/dev/null", OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    if path::kind(null.as_fd())? != (SFlag::S_IFCHR, libc::makedev(1, 3)) {
        return Err(Errno::ENODEV);
    }
    mount::clone_tree(null.as_fd(), c"", false)
}

/// Lays a copy of the rootfs over itself: pivot_root(2) wants a mount, and this one is ours alone.
fn bind_root(plan: &Rootfs) -> Result<OwnedFd, Failure> {
    let open = || -> nix::Result<OwnedFd> {
        let dir = open_root(&plan.path)?;
        let (flag, recursive) = plan.host_propagation;
        if flag == libc::MS_SHARED || !recursive {
            // pivot_root(2) refuses a root that is shared, as a copy of a shared mount is, and one on a shared mount.
            make_parent_private(&plan.path)?;
        }
        let copy = mount::clone_tree(dir.as_fd(), c"", true)?;
        mount::attach(copy.as_fd(), dir.as_fd())?;
        Ok(copy)
    };
    open().at(Step::Rootfs)
}

fn open_root(path: &CStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty())
}

fn make_parent_private(rootfs: &CStr) -> nix::Result<()> {
    let mut bytes = rootfs.to_bytes();
    loop {
        let path = CString::new(if bytes.is_empty() { b"/" } else { bytes }).map_err(|_| Errno::EINVAL)?;
        match set_propagation(&path, (libc::MS_PRIVATE, false)) {
            // Not a mount point: the mount is further up.
            Err(Errno::EINVAL) if !bytes.is_empty() => {
                bytes = &bytes[..bytes.iter().rposition(|b| *b == b'/').unwrap_or(0)];
            }
            other => return other,
        }
    }
}

fn one_mount(root: &OwnedFd, plan: &MountPlan, at: usize, around: &Surroundings<'_>) -> Result<OwnedFd, Failure> {
    let fd = match &plan.kind {
        MountKind::Bind { source, within, recursive } => {
            let fd = match (around.sources.get(at).and_then(Option::as_ref), within) {
                (Some(fd), _) => fd.try_clone().map_err(|_| Errno::EMFILE),
                // What the mounts before this one have put there.
                (None, Some(within)) => path::open_in_root(root.as_fd(), within, OFlag::O_PATH)
                    .and_then(|from| mount::clone_tree(from.as_fd(), c"", *recursive)),
                (None, None) => open_source(source, *recursive),
            };
            let fd = fd.at_item(Step::MountSource, at)?;
            if within.is_some() && plan.idmap.is_some() {
                around.report.send_fd(&Record::NeedIdmap(at as u32), fd.as_fd()).at(Step::Parent)?;
                around.report.wait().at(Step::Parent)?;
            }
            let is_dir = path::kind(fd.as_fd()).at_item(Step::MountSource, at)?.0 == SFlag::S_IFDIR;
            let target = target(root, plan, is_dir, at)?;
            bind_attributes(&fd, plan, around.bind_devices).at_item(Step::MountAttributes, at)?;
            mount::attach(fd.as_fd(), target.as_fd())
                .map_err(|errno| match path::kind(target.as_fd()) {
                    // Which the kernel says for a directory alone (do_move_mount).
                    Ok((kind, _)) if errno == Errno::EINVAL && (kind == SFlag::S_IFDIR) != is_dir => Errno::ENOTDIR,
                    _ => errno,
                })
                .at_item(Step::Mount, at)?;
            fd
        }
        MountKind::New { fstype, options, mode_of_target } => {
            let there =
                || path::open_in_root(root.as_fd(), &plan.destination, OFlag::O_PATH | OFlag::O_DIRECTORY).is_ok();
            let keeps_mode = *mode_of_target && there();
            let target = target(root, plan, true, at)?;
            let mut extra = None;
            // What is made for it here has no mode to keep.
            if keeps_mode {
                let mode = fstat(&target).at_item(Step::MountTarget, at)?.st_mode & 0o7777;
                extra = CString::new(format!("{mode:o}")).ok();
            }
            let fd = new_filesystem(fstype, options, extra.as_deref(), attrs(plan), at)?;
            if plan.options.tmpcopyup {
                super::copy::tree(target.as_fd(), fd.as_fd()).at_item(Step::CopyUp, at)?;
            }
            attributes_below(&fd, plan).at_item(Step::MountAttributes, at)?;
            mount::attach(fd.as_fd(), target.as_fd()).at_item(Step::Mount, at)?;
            fd
        }
        MountKind::CgroupV2(own) => cgroup_v2(root, plan, own, at, around)?,
        MountKind::CgroupV1(hierarchies) => cgroup_v1(root, plan, hierarchies, at, around)?,
    };
    for (flag, recursive) in &plan.options.propagation {
        let change = MountAttr { propagation: *flag, ..MountAttr::default() };
        mount::setattr(fd.as_fd(), *recursive, &change).at_item(Step::MountAttributes, at)?;
    }
    Ok(fd)
}

/// A detached copy of `source` as this process sees it.
pub fn open_source(source: &CStr, recursive: bool) -> nix::Result<OwnedFd> {
    let here = nix::fcntl::open(c"/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    mount::clone_tree(here.as_fd(), source, recursive)
}

/// The attributes that a new mount gets at once.
fn attrs(plan: &MountPlan) -> u64 {
    if plan.late_readonly { plan.options.set & !attr::RDONLY } else { plan.options.set }
}

/// A bind mount without any attribute keeps those of its source; with one it has those that are named, and its access
/// times only when one of them is named, as with mount(8) and runc. In a user namespace (`locked`) what the source
/// forbids stays forbidden, and asking for the contrary is refused (mount_namespaces(7)).
fn bind_attributes(fd: &OwnedFd, plan: &MountPlan, locked: bool) -> nix::Result<()> {
    const LOCKED: u64 = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
    const OWN: u64 = LOCKED | attr::NOSYMFOLLOW;
    const ATIMES: u64 = attr::ATIME | attr::NODIRATIME;
    let o = &plan.options;
    if o.named {
        let mut set = o.set & OWN;
        let mut clear = OWN & !set;
        if o.atime {
            set |= o.set & ATIMES;
            clear |= attr::ATIME | ATIMES & !set;
        }
        if locked {
            let source = mount::attributes(fd.as_fd())?;
            let kept = source & LOCKED;
            if kept & o.clear != 0 || (o.atime && set & ATIMES != source & ATIMES) {
                return Err(Errno::EPERM);
            }
            clear &= !kept;
        }
        match mount::setattr(fd.as_fd(), false, &MountAttr { set, clear, ..MountAttr::default() }) {
            // A user namespace further out has locked them.
            Err(Errno::EPERM) if !locked => return bind_attributes(fd, plan, true),
            other => other?,
        }
    }
    attributes_below(fd, plan)
}

fn attributes(fd: &OwnedFd, plan: &MountPlan) -> nix::Result<()> {
    let o = &plan.options;
    if o.set | o.clear != 0 {
        mount::setattr(fd.as_fd(), false, &MountAttr { set: attrs(plan), clear: o.clear, ..MountAttr::default() })?;
    }
    attributes_below(fd, plan)
}

fn attributes_below(fd: &OwnedFd, plan: &MountPlan) -> nix::Result<()> {
    let o = &plan.options;
    if o.rec_set | o.rec_clear != 0 {
        mount::setattr(fd.as_fd(), true, &MountAttr { set: o.rec_set, clear: o.rec_clear, ..MountAttr::default() })?;
    }
    Ok(())
}

/// Opens the destination, and makes it when it is missing.
fn target(root: &OwnedFd, plan: &MountPlan, is_dir: bool, at: usize) -> Result<OwnedFd, Failure> {
    let destination = plan.destination.as_c_str();
    let pseudo = matches!(&plan.kind, MountKind::New { fstype, .. }
        if matches!(fstype.to_bytes(), b"proc" | b"sysfs"));
    if pseudo {
        // An image must not move /proc or /sys with a symlink: what is masked there later would stay open.
        match path::open_no_symlinks(root.as_fd(), destination, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(fd) => return Ok(fd),
            Err(Errno::ENOENT) => {}
            Err(errno @ (Errno::ELOOP | Errno::ENOTDIR)) => {
                return Err(Failure::new(Step::MountPlace, at, errno));
            }
            Err(errno) => return Err(Failure::new(Step::MountTarget, at, errno)),
        }
    }
    let fd = if is_dir {
        path::mkdir_all(root.as_fd(), destination, Mode::from_bits_truncate(0o755))
    } else {
        path::create_file(root.as_fd(), destination)
    }
    .at_item(Step::MountTarget, at)?;
    // The spec's path was checked by its words; symlinks of the image may still have led into /proc.
    let allowed = destination.to_bytes() == b"proc" || destination.to_bytes().starts_with(b"proc/");
    if !allowed && path::magic(fd.as_fd()).at_item(Step::MountTarget, at)? == PROC_SUPER_MAGIC {
        return Err(Failure::new(Step::MountPlace, at, Errno::ELOOP));
    }
    Ok(fd)
}

fn new_filesystem(
    fstype: &CStr,
    options: &[(CString, Option<CString>)],
    mode: Option<&CStr>,
    attrs: u64,
    at: usize,
) -> Result<OwnedFd, Failure> {
    let context = FsContext::open(fstype).at_item(Step::Mount, at)?;
    let mode = mode.map(|mode| (c"mode", Some(mode)));
    let options = options.iter().map(|(key, value)| (key.as_c_str(), value.as_deref())).chain(mode);
    for (key, value) in options {
        if let Err(errno) = context.set(key, value) {
            let said = context.message();
            let option = match value {
                Some(value) => format!("option {:?}", format!("{}={}", key.to_string_lossy(), value.to_string_lossy())),
                None => format!("option {:?}", key.to_string_lossy()),
            };
            let detail = said.map_or(option.clone(), |said| format!("{option}: {said}"));
            return Err(Failure::new(Step::Mount, at, errno).detail(detail));
        }
    }
    context
        .mount(attrs)
        .map_err(|(errno, context)| Failure::new(Step::Mount, at, errno).detail(context.message().unwrap_or_default()))
}

/// The container's cgroup directory of a hierarchy; for one that has none, the runtime's.
fn own_cgroup(around: &Surroundings<'_>, controller: &str, instead: &CStr) -> nix::Result<CString> {
    match around.cgroups.get(controller) {
        Some(own) => CString::new(own.as_os_str().as_encoded_bytes()).map_err(|_| Errno::EINVAL),
        None => Ok(instead.to_owned()),
    }
}

fn cgroup_v2(
    root: &OwnedFd,
    plan: &MountPlan,
    own: &CStr,
    at: usize,
    around: &Surroundings<'_>,
) -> Result<OwnedFd, Failure> {
    let target = target(root, plan, true, at)?;
    let new = if around.cgroup_namespace { mount::new_mount(c"cgroup2", &[], attrs(plan)) } else { Err(Errno::EPERM) };
    let fd = match new {
        // No cgroup namespace, or not the right to mount in it: the container's own directory stands in.
        Err(Errno::EPERM | Errno::EBUSY) => {
            let own = own_cgroup(around, "", own);
            let fd = own.and_then(|own| open_source(&own, true)).at_item(Step::MountSource, at)?;
            attributes(&fd, plan).at_item(Step::MountAttributes, at)?;
            fd
        }
        other => other.at_item(Step::Mount, at)?,
    };
    mount::attach(fd.as_fd(), target.as_fd()).at_item(Step::Mount, at)?;
    Ok(fd)
}

fn cgroup_v1(
    root: &OwnedFd,
    plan: &MountPlan,
    hierarchies: &[V1Mount],
    at: usize,
    around: &Surroundings<'_>,
) -> Result<OwnedFd, Failure> {
    let target = target(root, plan, true, at)?;
    let tmpfs = mount::new_mount(c"tmpfs", &[(c"mode", Some(c"755"))], attrs(plan)).at_item(Step::Mount, at)?;
    mount::attach(tmpfs.as_fd(), target.as_fd()).at_item(Step::Mount, at)?;
    for hierarchy in hierarchies {
        let dir = path::mkdir_all(tmpfs.as_fd(), &hierarchy.name, Mode::from_bits_truncate(0o755))
            .at_item(Step::MountTarget, at)?;
        let fd = if around.cgroup_namespace {
            let options: Vec<_> = hierarchy.options.iter().map(|(k, v)| (k.as_c_str(), v.as_deref())).collect();
            mount::new_mount(c"cgroup", &options, plan.options.set).at_item(Step::Mount, at)?
        } else {
            let own = own_cgroup(around, &hierarchy.controller, &hierarchy.own);
            let fd = own.and_then(|own| open_source(&own, true)).at_item(Step::MountSource, at)?;
            let set = MountAttr { set: plan.options.set, clear: plan.options.clear, ..MountAttr::default() };
            mount::setattr(fd.as_fd(), true, &set).at_item(Step::MountAttributes, at)?;
            fd
        };
        mount::attach(fd.as_fd(), dir.as_fd()).at_item(Step::Mount, at)?;
        for link in &hierarchy.links {
            nix::unistd::symlinkat(hierarchy.name.as_c_str(), tmpfs.as_fd(), link.as_c_str())
                .at_item(Step::MountTarget, at)?;
        }
    }
    Ok(tmpfs)
}

/// `last` is the directory of the device before this one, which is most often that of this one, too.
fn make_device(root: &OwnedFd, last: &mut Option<(CString, OwnedFd)>, device: &Device, bind: bool) -> nix::Result<()> {
    let (parent, leaf) = path::split(&device.path)?;
    let dir = match last.take().filter(|(path, _)| *path == parent) {
        Some((_, dir)) => dir,
        None => path::mkdir_all(root.as_fd(), &parent, Mode::from_bits_truncate(0o755))?,
    };
    let (_, dir) = last.insert((parent, dir));
    if bind {
        return bind_device(dir, &leaf, device);
    }
    let kind = SFlag::from_bits_truncate(device.format);
    match nix::sys::stat::mknodat(&*dir, leaf.as_c_str(), kind, Mode::from_bits_truncate(device.mode), device.rdev) {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            let fd = path::open_no_symlinks(dir.as_fd(), &leaf, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
            return if path::kind(fd.as_fd())? == (kind, device.rdev) { Ok(()) } else { Err(Errno::EEXIST) };
        }
        Err(Errno::EPERM) => return bind_device(dir, &leaf, device),
        Err(errno) => return Err(errno),
    }
    if device.uid != 0 || device.gid != 0 {
        let fd = path::open_no_symlinks(dir.as_fd(), &leaf, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        path::chown(fd.as_fd(), Some(device.uid), Some(device.gid))?;
    }
    Ok(())
}

fn bind_device(dir: &OwnedFd, leaf: &CStr, device: &Device) -> nix::Result<()> {
    let source = open_source(&device.host, false)?;
    if path::kind(source.as_fd())? != (SFlag::from_bits_truncate(device.format), device.rdev) {
        return Err(Errno::ENODEV);
    }
    let target = path::create_file(dir.as_fd(), leaf)?;
    mount::attach(source.as_fd(), target.as_fd())
}

fn symlinks(root: &OwnedFd, links: &[(CString, CString)]) -> Result<(), Failure> {
    if links.is_empty() {
        return Ok(());
    }
    let dev = path::mkdir_all(root.as_fd(), c"dev", Mode::from_bits_truncate(0o755)).at(Step::Symlink)?;
    for (at, (name, link)) in links.iter().enumerate() {
        if name.to_bytes() == b"core" && !std::path::Path::new("/proc/kcore").exists() {
            continue;
        }
        match nix::unistd::symlinkat(link.as_c_str(), &dev, name.as_c_str()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(Failure::new(Step::Symlink, at, errno)),
        }
    }
    Ok(())
}

/// Makes the prepared root `/` of this process.
pub fn enter(plan: &Rootfs, prepared: &Prepared) -> Result<(), Failure> {
    if !plan.mount_namespace {
        return nix::unistd::fchdir(&prepared.root)
            .and_then(|()| nix::unistd::chroot(c"."))
            .and_then(|()| nix::unistd::chdir(c"/"))
            .at(Step::Chroot);
    }
    if plan.no_pivot {
        hide_host_pseudo(&plan.path)?;
        let slash = path::open_dir(c"/").at(Step::PivotRoot)?;
        mount::attach(prepared.root.as_fd(), slash.as_fd())
            .and_then(|()| nix::unistd::fchdir(&prepared.root))
            .and_then(|()| nix::unistd::chroot(c"."))
            .and_then(|()| nix::unistd::chdir(c"/"))
            .at(Step::PivotRoot)?;
    } else {
        mount::pivot_root(prepared.root.as_fd()).at(Step::PivotRoot)?;
    }
    match plan.propagation {
        // Read-only paths are bound first.
        None | Some((libc::MS_UNBINDABLE, _)) => Ok(()),
        Some(change) => root_propagation(prepared, change),
    }
}

fn root_propagation(prepared: &Prepared, (flag, recursive): (u64, bool)) -> Result<(), Failure> {
    let change = MountAttr { propagation: flag, ..MountAttr::default() };
    mount::setattr(prepared.root.as_fd(), recursive, &change).at(Step::RootPropagation)
}

/// Without pivot_root(2) the host's mounts stay below: a procfs or sysfs there that nothing covers would let the container
/// mount its own without any mask (fs/namespace.c, mnt_already_visible).
fn hide_host_pseudo(rootfs: &CStr) -> Result<(), Failure> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(|_| Errno::ENOENT).at(Step::PivotRoot)?;
    let ours = rootfs.to_bytes();
    for line in table.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut fields = before.split(' ');
        let (Some("/"), Some(point)) = (fields.nth(3), fields.next()) else { continue };
        if !matches!(after.split(' ').next(), Some("proc" | "sysfs")) {
            continue;
        }
        let point = crate::host::unescape(point);
        let inside = point.as_bytes().strip_prefix(ours).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
        if inside {
            continue;
        }
        let point = CString::new(point).map_err(|_| Errno::EINVAL).at(Step::PivotRoot)?;
        hide_mount(&point).at(Step::PivotRoot)?;
    }
    Ok(())
}

fn hide_mount(point: &CStr) -> nix::Result<()> {
    match set_propagation(point, (libc::MS_PRIVATE, true))
        .and_then(|()| nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH))
    {
        // Locked by a user namespace, or gone with one before: it is covered.
        Err(Errno::EINVAL | Errno::EPERM) => {
            let Ok(target) = path::open_dir(point) else { return Ok(()) };
            let empty = mount::new_mount(c"tmpfs", &[], attr::RDONLY)?;
            mount::attach(empty.as_fd(), target.as_fd())
        }
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// What can only be done when nothing is made in the root any more: read-only mounts, read-only and masked paths.
pub fn seal(plan: &Rootfs, prepared: &mut Prepared) -> Result<(), Failure> {
    let readonly = MountAttr { set: attr::RDONLY, ..MountAttr::default() };
    for (at, fd) in &prepared.late {
        mount::setattr(fd.as_fd(), false, &readonly).at_item(Step::MountAttributes, *at)?;
    }
    if plan.readonly && plan.mount_namespace {
        mount::setattr(prepared.root.as_fd(), false, &readonly).at(Step::ReadonlyRoot)?;
    }
    let root = prepared.root.as_fd();
    for (at, path) in plan.readonly_paths.iter().enumerate() {
        readonly_path(root, path, &readonly).at_item(Step::ReadonlyPath, at)?;
    }
    let mut empty = None;
    for (at, path) in plan.masked_paths.iter().enumerate() {
        mask(root, path, &mut prepared.null, &mut empty, plan.mount_label.as_deref()).at_item(Step::MaskedPath, at)?;
    }
    match plan.propagation.filter(|(flag, _)| plan.mount_namespace && *flag == libc::MS_UNBINDABLE) {
        Some(change) => root_propagation(prepared, change),
        None => Ok(()),
    }
}

fn lookup(root: BorrowedFd<'_>, path: &CStr) -> nix::Result<Option<OwnedFd>> {
    match path::open_in_root(root, path, OFlag::O_PATH) {
        Ok(fd) => Ok(Some(fd)),
        // There is nothing to protect; every other failure is one.
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn readonly_path(root: BorrowedFd<'_>, path: &CStr, readonly: &MountAttr) -> nix::Result<()> {
    let Some(target) = lookup(root, path)? else { return Ok(()) };
    let copy = mount::clone_tree(target.as_fd(), c"", true)?;
    mount::setattr(copy.as_fd(), false, readonly)?;
    mount::attach(copy.as_fd(), target.as_fd())
}

/// A file is hidden behind the host's /dev/null, a directory behind an empty read-only tmpfs that all share.
fn mask(
    root: BorrowedFd<'_>,
    path: &CStr,
    null: &mut Cover,
    empty: &mut Option<Cover>,
    label: Option<&CStr>,
) -> nix::Result<()> {
    let Some(target) = lookup(root, path)? else { return Ok(()) };
    if path::kind(target.as_fd())?.0 != SFlag::S_IFDIR {
        return null.hide(&target);
    }
    let cover = match empty {
        Some(cover) => cover,
        None => {
            let attrs = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
            let mut options = vec![(c"nr_blocks", Some(c"1")), (c"nr_inodes", Some(c"1"))];
            options.extend(label.map(|label| (c"context", Some(label))));
            empty.insert(Cover::new(mount::new_mount(c"tmpfs", &options, attrs)?))
        }
    };
    cover.hide(&target)
}
