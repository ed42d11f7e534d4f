//! Limits that change: what a container has after an update, and what is to be written for it.

use oci_spec::runtime::LinuxResources;

use crate::{Error, Result};

/// The limits after an update, and what is to be written for it: quota and period of the processor are one setting.
pub(super) fn merge(old: &LinuxResources, changes: &LinuxResources) -> Result<(LinuxResources, LinuxResources)> {
    let json =
        |resources: &LinuxResources| serde_json::to_value(resources).map_err(|e| Error::invalid("linux.resources", e));
    let back = |value| serde_json::from_value(value).map_err(|e| Error::invalid("linux.resources", e));
    let (mut merged, mut writes) = (json(old)?, json(changes)?);
    overlay(&mut merged, &writes);
    if let Some(cpu) = writes.get_mut("cpu").and_then(|cpu| cpu.as_object_mut()) {
        let set = |cpu: &serde_json::Map<String, serde_json::Value>, key: &str| {
            cpu.get(key).and_then(serde_json::Value::as_i64).is_some_and(|n| n != 0)
        };
        for (one, other) in [("quota", "period"), ("period", "quota")] {
            if set(cpu, one)
                && !set(cpu, other)
                && let Some(value) = old_number(old, other)
            {
                cpu.insert(other.into(), value);
            }
        }
    }
    Ok((back(merged)?, back(writes)?))
}

fn old_number(old: &LinuxResources, key: &str) -> Option<serde_json::Value> {
    let cpu = old.cpu().as_ref()?;
    match key {
        "quota" => cpu.quota().map(Into::into),
        _ => cpu.period().map(Into::into),
    }
}

/// Puts the fields of `over` into `under`, objects field by field.
fn overlay(under: &mut serde_json::Value, over: &serde_json::Value) {
    match (under.as_object_mut(), over.as_object()) {
        (Some(fields), Some(changes)) => {
            for (key, value) in changes {
                overlay(fields.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        _ => *under = over.clone(),
    }
}
