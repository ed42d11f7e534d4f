//! `process.capabilities` as bit sets.

use std::str::FromStr;

use oci_spec::runtime::{Capabilities, LinuxCapabilities};

/// The five sets, bit n for capability number n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapPlan {
    /// Kept in the bounding set.
    pub bounding: u64,
    /// Effective.
    pub effective: u64,
    /// Permitted.
    pub permitted: u64,
    /// Inheritable.
    pub inheritable: u64,
    /// Ambient.
    pub ambient: u64,
}

/// The sets of a spec. An absent set is empty, an absent object leaves all as they are (None).
pub fn plan(capabilities: &LinuxCapabilities) -> CapPlan {
    let plan = CapPlan {
        bounding: bits(capabilities.bounding()),
        effective: bits(capabilities.effective()),
        permitted: bits(capabilities.permitted()),
        inheritable: bits(capabilities.inheritable()),
        ambient: bits(capabilities.ambient()),
    };
    let beyond = plan.ambient & !(plan.permitted & plan.inheritable);
    warn("raise ambient", beyond, "it is not both permitted and inheritable");
    warn("grant", plan.effective & !plan.permitted, "is effective, but not permitted");
    plan
}

impl CapPlan {
    /// Tells of what a runtime that has `held` alone cannot give (runtime spec, config.md, "capabilities").
    pub fn warn_of_missing(&self, held: u64) {
        warn("grant", (self.permitted | self.inheritable) & !held, "the runtime does not have it itself");
    }
}

fn warn(what: &str, caps: u64, why: &str) {
    for cap in (0..64).filter(|cap| caps & (1 << cap) != 0) {
        log::warn!("can't {what} capability {}: {why}", name(cap));
    }
}

fn bits(set: &Option<Capabilities>) -> u64 {
    let names = set.iter().flatten().map(ToString::to_string);
    names.filter_map(|name| number(&name)).fold(0, |bits, cap| bits | 1 << cap)
}

/// The number of a capability, by its name with or without `CAP_`.
pub fn number(name: &str) -> Option<u8> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    caps::Capability::from_str(&full).ok().map(|cap| cap.index())
}

/// The name of a capability, `CAP_` included.
pub fn name(number: u8) -> String {
    let known = caps::all().into_iter().find(|cap| cap.index() == number);
    known.map_or_else(|| format!("CAP_{number}"), |cap| cap.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_become_bits() {
        let caps: LinuxCapabilities =
            serde_json::from_str(r#"{"bounding":["CAP_CHOWN","CAP_SYS_ADMIN"],"ambient":["CAP_CHECKPOINT_RESTORE"]}"#)
                .unwrap();
        let plan = plan(&caps);
        assert_eq!(plan.bounding, 1 | 1 << 21);
        assert_eq!(plan.ambient, 1 << 40);
        assert_eq!(plan.effective, 0);
    }

    #[test]
    fn every_capability_of_the_spec_has_a_number() {
        for name in ["CAP_AUDIT_READ", "CAP_BPF", "CAP_PERFMON", "CAP_WAKE_ALARM", "CAP_SYSLOG", "CAP_MAC_OVERRIDE"] {
            let cap: oci_spec::runtime::Capability = serde_json::from_str(&format!("{name:?}")).unwrap();
            assert!(number(&cap.to_string()).is_some(), "{name} is {cap}");
        }
    }
}
