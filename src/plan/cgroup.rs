//! `linux.resources` and `linux.cgroupsPath` as directories, file writes and device rules. Does not live here: making them (cgroup).

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, LinuxResources, LinuxThrottleDevice, Spec,
};

use super::namespaces::Namespaces;
use super::rootfs::{MountKind, Rootfs};
use crate::host::{Cgroups, Hierarchy};
use crate::sys::mount::attr;
use crate::{Error, Result};

/// What the container's cgroup will be.
#[derive(Clone, Debug, Default)]
pub struct CgroupPlan {
    /// One directory per hierarchy; one in all on v2.
    pub dirs: Vec<Dir>,
    /// Limits, in order.
    pub writes: Vec<Write>,
    /// Device rules in order, later ones win; nothing is allowed by default. None leaves devices alone.
    pub devices: Option<Vec<Rule>>,
    /// Refuse a memory limit below the usage (v2): limit, and memory plus swap.
    pub check_memory: Option<i64>,
    /// Hierarchies that the caller has no right to are left out, unless it is `named`.
    pub rootless: bool,
    /// The spec names it.
    pub named: bool,
    /// User of the host who may make cgroups below it.
    pub owner: Option<u32>,
    /// The unit of systemd that is to hold it.
    pub scope: Option<super::scope::Scope>,
    /// The same for memory and swap together.
    pub check_swap: Option<i64>,
}

/// A cgroup directory to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dir {
    /// Its controllers; `""` on v2.
    pub controllers: Vec<String>,
    /// Where its hierarchy is mounted.
    pub mountpoint: PathBuf,
    /// Its path below.
    pub path: PathBuf,
}

impl Dir {
    /// True when it is of v2.
    pub fn is_v2(&self) -> bool {
        self.controllers == [""]
    }

    /// Its absolute path.
    pub fn absolute(&self) -> PathBuf {
        let mut out = self.mountpoint.clone();
        out.extend(self.path.components());
        out
    }
}

impl CgroupPlan {
    /// Controller to absolute path of its directory; the key is "" on v2.
    pub fn paths(&self) -> BTreeMap<String, PathBuf> {
        let of = |dir: &Dir| dir.controllers.iter().map(|name| (name.clone(), dir.absolute())).collect::<Vec<_>>();
        self.dirs.iter().flat_map(of).collect()
    }
}

/// One write to a cgroup file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Controller of the hierarchy; `""` on v2.
    pub controller: String,
    /// File in the cgroup's directory.
    pub file: String,
    /// What to write.
    pub value: String,
    /// The JSON field that asks for it.
    pub field: String,
    /// A missing file is no error.
    pub optional: bool,
    /// File and value of the same meaning, for another scheduler: one of the two files must be there.
    pub other: Option<(String, String)>,
    /// The kernel may want the next write before this one (EINVAL, EBUSY): swap them then.
    pub swaps_with_next: bool,
}

/// A device rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Allow or deny.
    pub allow: bool,
    /// `b`, `c` or `a` for both.
    pub kind: char,
    /// Major number; None for all.
    pub major: Option<u32>,
    /// Minor number; None for all.
    pub minor: Option<u32>,
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Make nodes.
    pub mknod: bool,
}

/// Plans the cgroup of container `id`. Errors name the JSON field.
pub fn plan(id: &str, spec: &Spec, host: &Cgroups, systemd: bool, rootless: bool) -> Result<CgroupPlan> {
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|l| l.resources().clone()).unwrap_or_default();
    let mut out = plan_update(&resources, host)?;
    let scope = systemd.then(|| super::scope::plan(id, spec, &out.writes, host.pure_v2(), rootless)).transpose()?;
    let named = linux.and_then(|l| l.cgroups_path().as_deref()).filter(|p| !p.as_os_str().is_empty());
    out.named = named.is_some();
    let path = match (&scope, named) {
        (Some(scope), _) => Path::new("/").join(&scope.slice_path).join(&scope.unit),
        (None, Some(path)) => path.to_path_buf(),
        (None, None) => PathBuf::from(format!("/{id}")),
    };
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(Error::invalid("linux.cgroupsPath", "must not contain \"..\""));
    }
    let dirs = host
        .v1
        .iter()
        .map(|hierarchy| dir(hierarchy, hierarchy.controllers.clone(), &path, hierarchy.own.as_path()))
        .chain(host.v2.iter().map(|v2| {
            // Processes in the own cgroup would keep controllers from being enabled below it.
            dir(v2, vec![String::new()], &path, v2.own.parent().unwrap_or(Path::new("/")))
        }))
        .collect();
    out.dirs = dirs;
    out.scope = scope;
    let rules = resources.devices().iter().flatten().enumerate();
    let mut devices = rules.map(|(at, rule)| device(at, rule)).collect::<Result<Vec<Rule>>>()?;
    devices.extend(default_devices());
    out.devices = Some(devices);
    Ok(out)
}

/// Who runs the container's process, if the container is to manage cgroups of its own: on v2, in a new cgroup namespace,
/// with a writable mount of it (runtime spec, config-linux.md, "Cgroup ownership").
pub fn owner(spec: &Spec, namespaces: &Namespaces, rootfs: &Rootfs, host: &Cgroups) -> Option<u32> {
    let writable = rootfs.mounts.iter().any(|mount| {
        matches!(mount.kind, MountKind::CgroupV2(_))
            && mount.destination.as_bytes() == b"sys/fs/cgroup"
            && mount.options.set & attr::RDONLY == 0
    });
    if !(writable && host.pure_v2() && namespaces.makes(LinuxNamespaceType::Cgroup)) {
        return None;
    }
    let user = spec.process().as_ref()?.user().uid();
    if !namespaces.has(LinuxNamespaceType::User) {
        return Some(user);
    }
    let maps = spec.linux().as_ref()?.uid_mappings().as_deref().unwrap_or_default();
    maps.iter().find_map(|map| {
        let offset = user.checked_sub(map.container_id()).filter(|offset| *offset < map.size())?;
        map.host_id().checked_add(offset)
    })
}

fn dir(hierarchy: &Hierarchy, controllers: Vec<String>, path: &Path, base: &Path) -> Dir {
    let below = |path: &Path| path.strip_prefix("/").unwrap_or(path).to_path_buf();
    let path = if path.is_absolute() { below(path) } else { below(base).join(path) };
    Dir { controllers, mountpoint: hierarchy.mountpoint.clone(), path }
}

/// Plans an update of an existing cgroup. Devices are never part of it.
pub fn plan_update(resources: &LinuxResources, host: &Cgroups) -> Result<CgroupPlan> {
    let v2 = host.pure_v2();
    let mut w = Writes { v2, list: Vec::new() };
    let mut out = CgroupPlan::default();
    memory(&mut w, resources, &mut out)?;
    cpu(&mut w, resources)?;
    if let Some(pids) = resources.pids() {
        let limit = match pids.limit() {
            limit if limit < 0 => "max".to_string(),
            limit => limit.max(1).to_string(),
        };
        w.both("pids", "pids.max", limit, "linux.resources.pids.limit");
    }
    block_io(&mut w, resources)?;
    hugetlb(&mut w, resources)?;
    network(&mut w, resources);
    for (device, limit) in resources.rdma().iter().flatten() {
        let field = format!("linux.resources.rdma.{device}");
        if device.is_empty() || device.contains(|c: char| c.is_whitespace()) {
            return Err(Error::invalid(field, "not a device name"));
        }
        let mut value = device.clone();
        for (key, number) in [("hca_handle", limit.hca_handles()), ("hca_object", limit.hca_objects())] {
            if let Some(number) = number {
                value += &format!(" {key}={number}");
            }
        }
        w.both("rdma", "rdma.max", value, &field);
    }
    unified(&mut w, resources)?;
    out.writes = w.list;
    Ok(out)
}

struct Writes {
    v2: bool,
    list: Vec<Write>,
}

impl Writes {
    fn push(&mut self, controller: &str, file: &str, value: impl ToString, field: &str) -> &mut Write {
        let controller = if self.v2 { "" } else { controller };
        self.list.push(Write {
            controller: controller.into(),
            file: file.into(),
            value: value.to_string(),
            field: field.into(),
            optional: false,
            other: None,
            swaps_with_next: false,
        });
        self.list.last_mut().expect("just pushed")
    }

    fn both(&mut self, controller: &str, file: &str, value: impl ToString, field: &str) {
        self.push(controller, file, value, field);
    }
}

const NOT_ON_V2: &str = "cgroup v2 has no such limit";

fn passed_over(field: &str, set: bool, why: &str) {
    if set {
        log::warn!("{field} is passed over: {why}");
    }
}

fn max(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

fn memory(w: &mut Writes, resources: &LinuxResources, out: &mut CgroupPlan) -> Result<()> {
    const FIELD: &str = "linux.resources.memory";
    let Some(memory) = resources.memory() else { return Ok(()) };
    passed_over(
        &format!("{FIELD}.kernel"),
        memory.kernel().is_some_and(|kernel| kernel != 0),
        "no kernel has it any more",
    );
    if w.v2 {
        let only_v1 = [
            ("kernelTCP", memory.kernel_tcp().is_some_and(|tcp| tcp != 0)),
            ("disableOOMKiller", memory.disable_oom_killer() == Some(true)),
            ("swappiness", memory.swappiness().is_some_and(|swappiness| swappiness != u64::MAX)),
        ];
        only_v1.iter().for_each(|(name, set)| passed_over(&format!("{FIELD}.{name}"), *set, NOT_ON_V2));
    }
    // 0 is how callers say that a field is not set.
    let limit = memory.limit().filter(|limit| *limit != 0);
    let mut swap = memory.swap().filter(|swap| *swap != 0);
    if limit == Some(-1) && swap.is_none() {
        swap = Some(-1);
    }
    if let (Some(swap), Some(limit)) = (swap, limit)
        && swap > 0
        && limit > 0
        && swap < limit
    {
        return Err(Error::invalid(format!("{FIELD}.swap"), "memory+swap limit should be >= memory limit"));
    }
    if swap.is_some_and(|swap| swap > 0) && limit.is_none() && w.v2 {
        return Err(Error::invalid(format!("{FIELD}.swap"), "unable to set swap limit without memory limit"));
    }
    if w.v2 {
        if let Some(swap) = swap {
            let value = match (swap, limit) {
                (swap, Some(limit)) if swap > 0 && limit > 0 => (swap - limit).to_string(),
                (swap, _) => max(swap),
            };
            let optional = value == "max" || value == "0";
            w.push("", "memory.swap.max", value, &format!("{FIELD}.swap")).optional = optional;
        }
        if let Some(limit) = limit {
            w.push("", "memory.max", max(limit), &format!("{FIELD}.limit"));
            if memory.check_before_update() == Some(true) {
                out.check_memory = Some(limit);
                out.check_swap = swap.filter(|swap| *swap > 0);
            }
        }
        if let Some(reservation) = memory.reservation().filter(|r| *r != 0) {
            w.push("", "memory.low", max(reservation), &format!("{FIELD}.reservation"));
        }
        return Ok(());
    }
    if let Some(limit) = limit {
        // A new limit above the old memory+swap limit is refused until that one is raised.
        w.push("memory", "memory.limit_in_bytes", limit, &format!("{FIELD}.limit")).swaps_with_next = swap.is_some();
    }
    if let Some(swap) = swap {
        let optional = swap < 0;
        w.push("memory", "memory.memsw.limit_in_bytes", swap, &format!("{FIELD}.swap")).optional = optional;
    }
    if let Some(reservation) = memory.reservation().filter(|r| *r != 0) {
        w.push("memory", "memory.soft_limit_in_bytes", reservation, &format!("{FIELD}.reservation"));
    }
    if let Some(tcp) = memory.kernel_tcp().filter(|t| *t != 0) {
        w.push("memory", "memory.kmem.tcp.limit_in_bytes", tcp, &format!("{FIELD}.kernelTCP")).optional = true;
    }
    if memory.disable_oom_killer() == Some(true) {
        w.push("memory", "memory.oom_control", 1, &format!("{FIELD}.disableOOMKiller"));
    }
    match memory.swappiness() {
        None | Some(u64::MAX) => {}
        Some(swappiness) if swappiness <= 100 => {
            w.push("memory", "memory.swappiness", swappiness, &format!("{FIELD}.swappiness"));
        }
        Some(swappiness) => {
            let cause = format!("{swappiness} is not between 0 and 100");
            return Err(Error::invalid(format!("{FIELD}.swappiness"), cause));
        }
    }
    Ok(())
}

/// What cpu.shares can be (kernel/sched/sched.h, MIN_SHARES and MAX_SHARES).
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// cpu.weight for cpu.shares: 2..=262144 maps to 1..=10000 with 1024 at 100, on a log2 curve.
pub fn weight(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            10f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

fn cpu(w: &mut Writes, resources: &LinuxResources) -> Result<()> {
    const FIELD: &str = "linux.resources.cpu";
    let Some(cpu) = resources.cpu() else { return Ok(()) };
    let cpus = cpu.cpus().as_deref().filter(|list| !list.is_empty());
    let mems = cpu.mems().as_deref().filter(|list| !list.is_empty());
    for (name, list) in [("cpus", cpus), ("mems", mems)] {
        let Some(list) = list else { continue };
        if !list.chars().all(|c| c.is_ascii_digit() || ",-".contains(c)) {
            return Err(Error::invalid(format!("{FIELD}.{name}"), format!("{list:?} is not a list of numbers")));
        }
        w.both("cpuset", &format!("cpuset.{name}"), list, &format!("{FIELD}.{name}"));
    }
    if let Some(idle) = cpu.idle() {
        w.push("cpu", "cpu.idle", idle, &format!("{FIELD}.idle"));
    }
    if let Some(shares) = cpu.shares().filter(|s| *s != 0)
        && cpu.idle() != Some(1)
    {
        let field = format!("{FIELD}.shares");
        if w.v2 {
            w.push("", "cpu.weight", weight(shares), &field);
        } else if SHARES.contains(&shares) {
            w.push("cpu", "cpu.shares", shares, &field);
        } else {
            // The kernel would take the nearest one.
            let text = format!("{shares}: allowed is from {} to {}", SHARES.start(), SHARES.end());
            return Err(Error::invalid(field, text));
        }
    }
    let quota = cpu.quota().filter(|q| *q != 0);
    let period = cpu.period().filter(|p| *p != 0);
    let burst = cpu.burst();
    if w.v2 {
        if quota.is_some() || period.is_some() {
            let quota = quota.map_or("max".into(), |q| if q < 0 { "max".into() } else { q.to_string() });
            let value = format!("{quota} {}", period.unwrap_or(100_000));
            // A quota below the old burst is refused until that one is lowered.
            w.push("", "cpu.max", value, &format!("{FIELD}.quota")).swaps_with_next = burst.is_some();
        }
        if let Some(burst) = burst {
            w.push("", "cpu.max.burst", burst, &format!("{FIELD}.burst"));
        }
        return Ok(());
    }
    if let Some(period) = period {
        w.push("cpu", "cpu.cfs_period_us", period, &format!("{FIELD}.period")).swaps_with_next = quota.is_some();
    }
    if let Some(quota) = quota {
        w.push("cpu", "cpu.cfs_quota_us", quota, &format!("{FIELD}.quota"));
    }
    if let Some(burst) = burst {
        w.push("cpu", "cpu.cfs_burst_us", burst, &format!("{FIELD}.burst"));
    }
    let realtime =
        cpu.realtime_period().or(cpu.realtime_runtime().map(i64::unsigned_abs)).is_some_and(|time| time != 0);
    passed_over(&format!("{FIELD}.realtimeRuntime"), w.v2 && realtime, NOT_ON_V2);
    if let Some(period) = cpu.realtime_period().filter(|p| *p != 0) {
        let write = w.push("cpu", "cpu.rt_period_us", period, &format!("{FIELD}.realtimePeriod"));
        write.swaps_with_next = cpu.realtime_runtime().is_some_and(|runtime| runtime != 0);
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|r| *r != 0) {
        w.push("cpu", "cpu.rt_runtime_us", runtime, &format!("{FIELD}.realtimeRuntime"));
    }
    Ok(())
}

fn block_io(w: &mut Writes, resources: &LinuxResources) -> Result<()> {
    const FIELD: &str = "linux.resources.blockIO";
    let Some(io) = resources.block_io() else { return Ok(()) };
    let check = |name: &str, weight: u16| {
        if (10..=1000).contains(&weight) {
            Ok(u64::from(weight))
        } else {
            Err(Error::invalid(format!("{FIELD}.{name}"), format!("{weight} is not between 10 and 1000")))
        }
    };
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        let weight = check("weight", weight)?;
        let field = format!("{FIELD}.weight");
        if w.v2 {
            // BFQ has the spec's range; io.weight goes from 1 to 10000.
            let other = ("io.weight".into(), (1 + (weight - 10) * 9999 / 990).to_string());
            w.push("", "io.bfq.weight", weight, &field).other = Some(other);
        } else {
            w.push("blkio", "blkio.weight", weight, &field).other =
                Some(("blkio.bfq.weight".into(), weight.to_string()));
        }
    }
    passed_over(&format!("{FIELD}.leafWeight"), w.v2 && io.leaf_weight().is_some_and(|weight| weight != 0), NOT_ON_V2);
    if let Some(weight) = io.leaf_weight().filter(|weight| *weight != 0 && !w.v2) {
        let weight = check("leafWeight", weight)?;
        w.push("blkio", "blkio.leaf_weight", weight, &format!("{FIELD}.leafWeight"));
    }
    for (at, device) in io.weight_device().iter().flatten().enumerate() {
        let field = format!("{FIELD}.weightDevice[{at}]");
        let number = format!("{}:{}", device.major(), device.minor());
        if let Some(weight) = device.weight() {
            let weight = check(&format!("weightDevice[{at}].weight"), weight)?;
            let line = format!("{number} {weight}");
            if w.v2 {
                w.push("", "io.bfq.weight", line, &field);
            } else {
                let other = ("blkio.bfq.weight_device".into(), line.clone());
                w.push("blkio", "blkio.weight_device", line, &field).other = Some(other);
            }
        }
        if let Some(weight) = device.leaf_weight().filter(|_| !w.v2) {
            w.push("blkio", "blkio.leaf_weight_device", format!("{number} {weight}"), &field);
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>, &str, &str); 4] = [
        ("throttleReadBpsDevice", io.throttle_read_bps_device(), "read_bps_device", "rbps"),
        ("throttleWriteBpsDevice", io.throttle_write_bps_device(), "write_bps_device", "wbps"),
        ("throttleReadIOPSDevice", io.throttle_read_iops_device(), "read_iops_device", "riops"),
        ("throttleWriteIOPSDevice", io.throttle_write_iops_device(), "write_iops_device", "wiops"),
    ];
    for (name, list, v1, v2) in throttles {
        for (at, device) in list.iter().flatten().enumerate() {
            let field = format!("{FIELD}.{name}[{at}]");
            let number = format!("{}:{}", device.major(), device.minor());
            if w.v2 {
                let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
                w.push("", "io.max", format!("{number} {v2}={rate}"), &field);
            } else {
                w.push("blkio", &format!("blkio.throttle.{v1}"), format!("{number} {}", device.rate()), &field);
            }
        }
    }
    Ok(())
}

fn hugetlb(w: &mut Writes, resources: &LinuxResources) -> Result<()> {
    for (at, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        let field = format!("linux.resources.hugepageLimits[{at}]");
        let size = limit.page_size();
        // The name becomes part of a file name.
        let number = ["KB", "MB", "GB"].iter().find_map(|unit| size.strip_suffix(unit));
        if !number.is_some_and(|n| !n.is_empty() && n.len() < 8 && n.chars().all(|c| c.is_ascii_digit())) {
            return Err(Error::invalid(format!("{field}.pageSize"), format!("{size:?} is not a size like 2MB")));
        }
        let (value, suffix) = (limit.limit(), if w.v2 { "max" } else { "limit_in_bytes" });
        w.both("hugetlb", &format!("hugetlb.{size}.{suffix}"), value, &field);
        w.push("hugetlb", &format!("hugetlb.{size}.rsvd.{suffix}"), value, &field).optional = true;
    }
    Ok(())
}

fn network(w: &mut Writes, resources: &LinuxResources) {
    let Some(network) = resources.network() else { return };
    if w.v2 {
        let class = network.class_id().is_some_and(|class| class != 0);
        let priorities = network.priorities().as_ref().is_some_and(|all| !all.is_empty());
        return passed_over("linux.resources.network", class || priorities, NOT_ON_V2);
    }
    if let Some(class) = network.class_id().filter(|class| *class != 0) {
        w.push("net_cls", "net_cls.classid", class, "linux.resources.network.classID");
    }
    for (at, priority) in network.priorities().iter().flatten().enumerate() {
        let value = format!("{} {}", priority.name(), priority.priority());
        w.push("net_prio", "net_prio.ifpriomap", value, &format!("linux.resources.network.priorities[{at}]"));
    }
}

fn unified(w: &mut Writes, resources: &LinuxResources) -> Result<()> {
    let mut entries: Vec<_> = resources.unified().iter().flatten().collect();
    entries.sort();
    for (file, value) in entries {
        let field = format!("linux.resources.unified.{file}");
        if !w.v2 {
            return Err(Error::invalid(field, "invalid configuration: cannot use unified on cgroup v1"));
        }
        let name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !file.contains('.') || file.contains("..") || !file.chars().all(name) {
            return Err(Error::invalid(field, "not a file of a cgroup"));
        }
        for line in value.lines().filter(|line| !line.is_empty()) {
            w.push("", file, line, &field);
        }
    }
    Ok(())
}

fn device(at: usize, rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let field = format!("linux.resources.devices[{at}]");
    let access = match rule.access().as_deref() {
        // As a type "a" is all, and some callers write it here as well.
        Some(access) if access.is_empty() || access.contains('a') => "rwm",
        Some(access) => access,
        None => "rwm",
    };
    if let Some(c) = access.chars().find(|c| !"rwm".contains(*c)) {
        return Err(Error::invalid(format!("{field}.access"), format!("{c:?} is none of r, w, m")));
    }
    let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => 'a',
        LinuxDeviceType::B => 'b',
        LinuxDeviceType::C | LinuxDeviceType::U => 'c',
        LinuxDeviceType::P => return Err(Error::invalid(format!("{field}.type"), "must be one of a, b, c")),
    };
    let number = |name: &str, n: Option<i64>| match n {
        None | Some(-1) => Ok(None),
        Some(n) => match u32::try_from(n) {
            Ok(n) => Ok(Some(n)),
            Err(_) => Err(Error::invalid(format!("{field}.{name}"), format!("{n} is not a device number"))),
        },
    };
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number("major", rule.major())?,
        minor: number("minor", rule.minor())?,
        read: access.contains('r'),
        write: access.contains('w'),
        mknod: access.contains('m'),
    })
}

/// What every container may use: runc's list.
fn default_devices() -> impl Iterator<Item = Rule> {
    let rule = |kind, major, minor, read| Rule { allow: true, kind, major, minor, read, write: read, mknod: true };
    let nodes = [
        (Some(1), Some(3)),
        (Some(1), Some(8)),
        (Some(1), Some(7)),
        (Some(5), Some(0)),
        (Some(1), Some(5)),
        (Some(1), Some(9)),
        (Some(136), None),
        (Some(5), Some(2)),
        (Some(10), Some(200)),
    ];
    [rule('c', None, None, false), rule('b', None, None, false)]
        .into_iter()
        .chain(nodes.into_iter().map(move |(major, minor)| rule('c', major, minor, true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2() -> Cgroups {
        let v2 = Hierarchy { mountpoint: "/sys/fs/cgroup".into(), own: "/user/me".into(), ..Hierarchy::default() };
        Cgroups { v1: Vec::new(), v2: Some(v2) }
    }

    fn v1() -> Cgroups {
        let hierarchy = |name: &str| Hierarchy {
            controllers: vec![name.into()],
            mountpoint: format!("/sys/fs/cgroup/{name}").into(),
            own: "/me".into(),
        };
        Cgroups { v1: vec![hierarchy("memory"), hierarchy("cpu")], v2: None }
    }

    fn planned(linux: &str, host: &Cgroups) -> Result<CgroupPlan> {
        let spec = serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{linux}}}"#)).unwrap();
        plan("id", &spec, host, false, false)
    }

    fn writes(resources: &str, host: &Cgroups) -> Vec<String> {
        let plan = planned(&format!(r#"{{"resources":{resources}}}"#), host).unwrap();
        plan.writes.iter().map(|w| format!("{}={}", w.file, w.value)).collect()
    }

    #[test]
    fn paths_are_absolute_relative_or_the_id() {
        let path = |linux, host: &Cgroups| planned(linux, host).unwrap().dirs[0].path.clone();
        assert_eq!(path("{}", &v2()), Path::new("id"));
        assert_eq!(path(r#"{"cgroupsPath":"/a/b"}"#, &v1()), Path::new("a/b"));
        assert_eq!(path(r#"{"cgroupsPath":"a"}"#, &v1()), Path::new("me/a"));
        assert_eq!(path(r#"{"cgroupsPath":"a"}"#, &v2()), Path::new("user/a"));
        assert!(planned(r#"{"cgroupsPath":"/a/../b"}"#, &v1()).is_err());
    }

    #[test]
    fn a_cgroup_belongs_to_who_may_write_to_its_mount() {
        let owner = |user: u32, namespaces: &[&str], options: &[&str], host: &Cgroups| {
            let namespaces: Vec<_> =
                namespaces.iter().chain(&["mount"]).map(|kind| serde_json::json!({"type": kind})).collect();
            let map = serde_json::json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
            let mut spec = serde_json::json!({
                "ociVersion": "1.0.2",
                "process": {"args": ["x"], "cwd": "/", "user": {"uid": user, "gid": 0}},
                "root": {"path": "rootfs"},
                "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}],
                "linux": {"namespaces": namespaces},
            });
            if namespaces.len() == 3 {
                spec["linux"]["uidMappings"] = map.clone();
                spec["linux"]["gidMappings"] = map;
            }
            let request = crate::plan::Request {
                id: "id",
                bundle: Path::new("/b"),
                terminal: false,
                systemd_cgroup: false,
                no_pivot: false,
                no_new_keyring: true,
                rootless: false,
            };
            crate::plan::build(&request, &serde_json::from_value(spec).unwrap(), host).unwrap().cgroup.owner
        };
        assert_eq!(owner(7, &["cgroup"], &[], &v2()), Some(7));
        assert_eq!(owner(7, &["cgroup", "user"], &[], &v2()), Some(1007));
        assert_eq!(owner(10, &["cgroup", "user"], &[], &v2()), None, "not mapped");
        assert_eq!(owner(7, &["cgroup"], &["ro"], &v2()), None, "it cannot write");
        assert_eq!(owner(7, &[], &[], &v2()), None, "it sees the cgroups of others");
    }

    #[test]
    fn shares_become_weights() {
        let weights = [2, 10, 100, 512, 1024, 2048, 4096, 262_144].map(weight);
        assert_eq!(weights, [1, 4, 17, 59, 100, 174, 303, 10_000]);
    }

    #[test]
    fn limits_are_written_in_each_versions_files() {
        let resources = r#"{"memory":{"limit":100,"swap":150,"reservation":50},
            "cpu":{"shares":1024,"quota":5,"period":10},"pids":{"limit":0}}"#;
        assert_eq!(
            writes(resources, &v2()),
            ["memory.swap.max=50", "memory.max=100", "memory.low=50", "cpu.weight=100", "cpu.max=5 10", "pids.max=1"]
        );
        assert_eq!(
            writes(resources, &v1()),
            [
                "memory.limit_in_bytes=100",
                "memory.memsw.limit_in_bytes=150",
                "memory.soft_limit_in_bytes=50",
                "cpu.shares=1024",
                "cpu.cfs_period_us=10",
                "cpu.cfs_quota_us=5",
                "pids.max=1"
            ]
        );
    }

    #[test]
    fn unlimited_is_max_and_unset_is_nothing() {
        assert_eq!(writes(r#"{"memory":{"limit":-1}}"#, &v2()), ["memory.swap.max=max", "memory.max=max"]);
        assert!(writes(r#"{"memory":{"limit":0},"cpu":{"shares":0}}"#, &v2()).is_empty());
        assert_eq!(writes(r#"{"pids":{"limit":-1}}"#, &v1()), ["pids.max=max"]);
    }

    #[test]
    fn errors_name_the_field() {
        for (resources, host, want) in [
            (r#"{"memory":{"limit":10,"swap":5}}"#, v2(), "linux.resources.memory.swap: memory+swap"),
            (r#"{"memory":{"swap":5}}"#, v2(), "linux.resources.memory.swap: unable"),
            (r#"{"memory":{"swappiness":101}}"#, v1(), "linux.resources.memory.swappiness: 101"),
            (
                r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#,
                v2(),
                "linux.resources.hugepageLimits[0].pageSize",
            ),
            (r#"{"unified":{"a/b":"1"}}"#, v2(), "linux.resources.unified.a/b: not a file"),
            (r#"{"unified":{"..x":"1"}}"#, v2(), "linux.resources.unified...x: not a file"),
            (
                r#"{"unified":{"memory.max":"1"}}"#,
                v1(),
                "linux.resources.unified.memory.max: invalid configuration: cannot use unified",
            ),
            (r#"{"devices":[{"allow":true,"access":"x"}]}"#, v1(), "linux.resources.devices[0].access: 'x'"),
            (r#"{"cpu":{"cpus":"a"}}"#, v1(), "linux.resources.cpu.cpus: \"a\""),
        ] {
            let err = planned(&format!(r#"{{"resources":{resources}}}"#), &host).unwrap_err().to_string();
            assert!(err.starts_with(want), "{resources}: {err}");
        }
    }
}
