//! `linux.cgroupsPath` as a unit of systemd, and limits as its properties (systemd.resource-control(5)). Does not live
//! here: asking systemd (cgroup::systemd).

use std::path::PathBuf;

use oci_spec::runtime::Spec;

use super::cgroup::{Rule, Write};
use crate::{Error, Result};

/// A value of a unit's property.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Value {
    Text(String),
    Flag(bool),
    I32(i32),
    U32(u32),
    U64(u64),
    Bytes(Vec<u8>),
    Numbers(Vec<u32>),
    Texts(Vec<String>),
    Pairs(Vec<(String, String)>),
}

/// The unit that holds a container: a scope, or a slice if its name says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Name of the unit.
    pub unit: String,
    /// The slice that it belongs to.
    pub slice: String,
    /// The cgroup of that slice below systemd's own: `a.slice/a-b.slice`.
    pub slice_path: PathBuf,
    /// All properties but its processes and devices.
    pub properties: Vec<(String, Value)>,
    /// Of the user's systemd.
    pub user: bool,
}

const FIELD: &str = "linux.cgroupsPath";

/// True when `linux.cgroupsPath` can only mean a unit: `slice:prefix:name`. containerd's CRI writes it so wherever the
/// kubelet has the systemd driver, but 1.6 tells the options of a runtime to runc's shim alone.
pub fn is_meant(spec: &Spec) -> bool {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    let parts: Vec<&str> =
        path.and_then(|path| path.to_str()).map(|path| path.split(':').collect()).unwrap_or_default();
    matches!(parts[..], [slice, _, name] if slice.ends_with(".slice") && !slice.contains('/') && !name.contains('/'))
}

/// Plans the unit of container `id`.
pub fn plan(id: &str, spec: &Spec, writes: &[Write], v2: bool, rootless: bool) -> Result<Scope> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone()).unwrap_or_default();
    let path = path.to_str().ok_or_else(|| Error::invalid(FIELD, "not UTF-8"))?;
    let default = if rootless { "user.slice" } else { "system.slice" };
    let (slice, unit) = match path.split(':').collect::<Vec<_>>()[..] {
        [""] => ("", format!("runc-{id}.scope")),
        [slice, _, name] if name.ends_with(".slice") => (slice, name.to_string()),
        [slice, "", name] => (slice, format!("{name}.scope")),
        [slice, prefix, name] => (slice, format!("{prefix}-{name}.scope")),
        _ => {
            let text = format!(
                "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {path:?} instead"
            );
            return Err(Error::invalid(FIELD, text));
        }
    };
    let good = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    if unit.len() > 255 || unit.starts_with('.') || unit.contains(':') || !unit.chars().all(good) {
        return Err(Error::invalid(FIELD, format!("{unit:?} is not the name of a unit")));
    }
    let slice = if slice.is_empty() { default } else { slice };
    let slice_path = expand(slice)?;
    let is_slice = unit.ends_with(".slice");
    let flag = |name: &str, on| (name.to_string(), Value::Flag(on));
    let mut properties = vec![("Description".to_string(), Value::Text(format!("skiff container {id}")))];
    if is_slice {
        properties.push(("Wants".into(), Value::Texts(vec![slice.into()])));
    } else {
        properties.push(("Slice".into(), Value::Text(slice.into())));
        properties.push(flag("Delegate", true));
    }
    let io = if v2 { "IOAccounting" } else { "BlockIOAccounting" };
    properties.extend(["MemoryAccounting", "CPUAccounting", io, "TasksAccounting"].map(|name| flag(name, true)));
    properties.push(flag("DefaultDependencies", false));
    properties.extend(limits(writes)?);
    for (key, value) in spec.annotations().iter().flatten() {
        if let Some(name) = key.strip_prefix("org.systemd.property.") {
            let property =
                annotation(name, value).map_err(|text| Error::invalid(format!("annotations.{key}"), text))?;
            properties.push(property);
        }
    }
    Ok(Scope { slice: slice.into(), unit, slice_path, properties, user: rootless })
}

/// A slice's cgroup: each dash is a slice above it (systemd.slice(5)).
pub fn expand(slice: &str) -> Result<PathBuf> {
    let bad = || Error::invalid(FIELD, format!("invalid slice name: {slice}"));
    let name = slice.strip_suffix(".slice").filter(|name| !name.contains('/')).ok_or_else(bad)?;
    let mut out = PathBuf::new();
    if name == "-" {
        return Ok(out);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(bad());
        }
        out.push(format!("{prefix}{part}.slice"));
        prefix += part;
        prefix.push('-');
    }
    Ok(out)
}

/// Limits as properties; those that systemd has none for stay with the files.
pub fn limits(writes: &[Write]) -> Result<Vec<(String, Value)>> {
    let mut out: Vec<(String, Value)> = Vec::new();
    // What is written later counts: `unified` comes last.
    let mut set = |name: &str, value| {
        out.retain(|(other, _)| other != name);
        out.push((name.to_string(), value));
    };
    let mut period = 100_000;
    for write in writes {
        let last = write.value.split_ascii_whitespace().next_back().unwrap_or("");
        let number = match last {
            "max" | "-1" => Some(u64::MAX),
            text => text.parse::<u64>().ok(),
        };
        let name = match write.file.as_str() {
            "memory.max" => "MemoryMax",
            "memory.high" => "MemoryHigh",
            "memory.low" => "MemoryLow",
            "memory.min" => "MemoryMin",
            "memory.swap.max" => "MemorySwapMax",
            "memory.limit_in_bytes" => "MemoryLimit",
            "cpu.weight" => "CPUWeight",
            "cpu.shares" => "CPUShares",
            "io.weight" => "IOWeight",
            "blkio.weight" => "BlockIOWeight",
            "pids.max" => "TasksMax",
            "cpu.idle" => {
                match number {
                    Some(1) => set("CPUWeight", Value::U64(0)),
                    // The kernel takes the default weight then, and so must systemd when it writes the file again.
                    Some(0) if write.controller.is_empty() => set("CPUWeight", Value::U64(u64::MAX)),
                    _ => {}
                }
                continue;
            }
            "cpuset.cpus" | "cpuset.mems" => {
                let name = if write.file == "cpuset.cpus" { "AllowedCPUs" } else { "AllowedMemoryNodes" };
                set(name, Value::Bytes(mask(&write.value).ok_or_else(|| Error::invalid(&write.field, "not a list"))?));
                continue;
            }
            "cpu.cfs_period_us" => {
                period = number.unwrap_or(period);
                set("CPUQuotaPeriodUSec", Value::U64(period));
                continue;
            }
            "cpu.cfs_quota_us" => {
                set("CPUQuotaPerSecUSec", Value::U64(quota(number.unwrap_or(u64::MAX), period)));
                continue;
            }
            "cpu.max" => {
                let mut words = write.value.split_ascii_whitespace();
                let amount = words.next().and_then(|word| word.parse().ok()).unwrap_or(u64::MAX);
                let period = words.next().and_then(|word| word.parse().ok()).unwrap_or(period);
                set("CPUQuotaPeriodUSec", Value::U64(period));
                set("CPUQuotaPerSecUSec", Value::U64(quota(amount, period)));
                continue;
            }
            _ => continue,
        };
        if let Some(number) = number {
            set(name, Value::U64(number));
        }
    }
    Ok(out)
}

/// Microseconds a second; systemd counts in hundredths of a processor and would round down.
fn quota(quota: u64, period: u64) -> u64 {
    if quota == u64::MAX || period == 0 {
        return u64::MAX;
    }
    u64::try_from((u128::from(quota) * 1_000_000 / u128::from(period)).next_multiple_of(10_000)).unwrap_or(u64::MAX)
}

/// `0-2,4` as bits, the lowest byte first.
fn mask(list: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last > 8191 {
            return None;
        }
        for bit in first..=last {
            if out.len() <= bit / 8 {
                out.resize(bit / 8 + 1, 0);
            }
            out[bit / 8] |= 1 << (bit % 8);
        }
    }
    Some(out)
}

/// `org.systemd.property.NAME` with a value in GVariant's text format.
fn annotation(name: &str, text: &str) -> std::result::Result<(String, Value), String> {
    if name.len() < 4 || !name.chars().all(|c| c.is_ascii_alphabetic()) {
        return Err(format!("{name:?} is not the name of a property"));
    }
    let value = value(text.trim()).ok_or_else(|| format!("cannot read {text:?}"))?;
    // As in unit files: seconds there, microseconds here.
    if let Some(stem) = name.strip_suffix("Sec").filter(|stem| !stem.ends_with('U')) {
        let number = match value {
            Value::U64(number) => Some(number),
            Value::U32(number) => Some(number.into()),
            Value::I32(number) => number.try_into().ok(),
            _ => None,
        };
        let number = number.and_then(|n| n.checked_mul(1_000_000)).ok_or_else(|| format!("{text:?} is no time"))?;
        return Ok((format!("{stem}USec"), Value::U64(number)));
    }
    Ok((name.to_string(), value))
}

fn value(text: &str) -> Option<Value> {
    let quoted = |text: &str| {
        let quote = text.chars().next().filter(|c| "'\"".contains(*c))?;
        let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
        (!inner.contains([quote, '\\'])).then(|| inner.to_string())
    };
    if let Some(inner) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        return inner.split(',').map(|item| quoted(item.trim())).collect::<Option<_>>().map(Value::Texts);
    }
    match text.split_once(' ') {
        Some(("uint64", number)) => return number.trim().parse().ok().map(Value::U64),
        Some(("uint32", number)) => return number.trim().parse().ok().map(Value::U32),
        Some(("int32", number)) => return number.trim().parse().ok().map(Value::I32),
        _ => {}
    }
    match text {
        "true" => Some(Value::Flag(true)),
        "false" => Some(Value::Flag(false)),
        _ => quoted(text).map(Value::Text).or_else(|| text.parse().ok().map(Value::I32)),
    }
}

/// The device policy as systemd's, which knows permissions only: it lets through at least what the rules do, and the
/// container's own policy decides. `drivers`: major numbers by kind, from `/proc/devices`.
pub fn devices(rules: &[Rule], driver: impl Fn(char, u32) -> Option<String>) -> Vec<(String, Value)> {
    let policy = |name: &str, list| {
        vec![("DevicePolicy".to_string(), Value::Text(name.into())), ("DeviceAllow".to_string(), Value::Pairs(list))]
    };
    let mut list: Vec<(String, String)> = Vec::new();
    for rule in rules {
        let all = rule.kind == 'a' && rule.major.is_none() && rule.minor.is_none();
        if all && rule.allow {
            return policy("auto", Vec::new());
        }
        if !rule.allow {
            if all && rule.read && rule.write && rule.mknod {
                list.clear();
            }
            continue;
        }
        let access = [(rule.read, 'r'), (rule.write, 'w'), (rule.mknod, 'm')];
        let access: String = access.iter().filter(|(on, _)| *on).map(|(_, c)| *c).collect();
        let kinds: &[char] = if rule.kind == 'a' { &['b', 'c'] } else { &[rule.kind] };
        for kind in kinds {
            let class = if *kind == 'b' { "block" } else { "char" };
            let name = match (rule.major, rule.minor) {
                (Some(major), Some(minor)) => format!("/dev/{class}/{major}:{minor}"),
                (Some(major), None) => match driver(*kind, major) {
                    Some(name) => format!("{class}-{name}"),
                    None => continue,
                },
                // It has no name for one minor number of all drivers.
                _ => format!("{class}-*"),
            };
            list.push((name, access.clone()));
        }
    }
    policy("strict", list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(path: &str) -> Result<Scope> {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"cgroupsPath": path},
            "annotations": {"org.systemd.property.TimeoutStopSec": "uint64 5", "org.systemd.property.After": "['a', 'b']"}});
        plan("id", &serde_json::from_value(spec).unwrap(), &[], true, false)
    }

    #[test]
    fn paths_become_units() {
        for (path, unit, slice) in [
            ("", "runc-id.scope", "system.slice"),
            (":p:n", "p-n.scope", "system.slice"),
            ("a-b-c.slice::n", "n.scope", "a.slice/a-b.slice/a-b-c.slice"),
            ("-.slice:p:n", "p-n.scope", ""),
            ("a.slice:p:n.slice", "n.slice", "a.slice"),
        ] {
            let scope = planned(path).unwrap();
            assert_eq!((scope.unit.as_str(), scope.slice_path.to_str().unwrap()), (unit, slice), "{path}");
        }
        for path in ["/a/b", "a:b", "a--b.slice:p:n", "a:p:n", "a.slice:p:n/x", "-a.slice:p:n", "a.slice:p:n:x"] {
            let err = planned(path).unwrap_err().to_string();
            assert!(err.starts_with("linux.cgroupsPath: "), "{path}: {err}");
        }
    }

    #[test]
    fn only_the_name_of_a_unit_means_systemd() {
        for (path, want) in [
            ("a-b.slice:cri-containerd:n", true),
            ("a.slice::n", true),
            ("/a.slice:p:n", false),
            ("a.slice/n", false),
            ("a:p:n", false),
            ("", false),
        ] {
            let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"cgroupsPath": path}});
            assert_eq!(is_meant(&serde_json::from_value(spec).unwrap()), want, "{path}");
        }
    }

    #[test]
    fn annotations_become_properties() {
        let properties = planned("").unwrap().properties;
        for want in [("TimeoutStopUSec", Value::U64(5_000_000)), ("After", Value::Texts(vec!["a".into(), "b".into()]))]
        {
            assert!(properties.iter().any(|(name, value)| (name.as_str(), value) == (want.0, &want.1)), "{want:?}");
        }
        assert!(annotation("After", "[1").is_err());
        assert!(annotation("x", "true").is_err());
    }

    #[test]
    fn quotas_round_up_and_lists_are_bits() {
        assert_eq!(quota(50_001, 100_000), 510_000);
        assert_eq!(quota(u64::MAX, 100_000), u64::MAX);
        assert_eq!(mask("0-2,9"), Some(vec![7, 2]));
        assert_eq!(mask("3-1"), None);
    }
}
