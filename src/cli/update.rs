//! `update`.

use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};
use skiff::{Error, Result};

use super::Globals;

/// `update`.
#[derive(Debug, Args)]
pub struct Update {
    /// path to the file containing the resources to update or '-' to read from the standard input
    #[arg(short, long)]
    resources: Option<PathBuf>,
    /// specifies per cgroup weight, range is from 10 to 1000
    #[arg(long)]
    blkio_weight: Option<u16>,
    /// CPU CFS period to be used for hardcapping (in usecs). 0 to use system default
    #[arg(long)]
    cpu_period: Option<u64>,
    /// CPU CFS hardcap limit (in usecs). Allowed cpu time in a given period
    #[arg(long, allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// CPU CFS hardcap burst limit (in usecs). Allowed accumulated cpu time additionally for burst a given period
    #[arg(long)]
    cpu_burst: Option<u64>,
    /// CPU shares (relative weight vs. other containers)
    #[arg(long)]
    cpu_share: Option<u64>,
    /// CPU realtime period to be used for hardcapping (in usecs). 0 to use system default
    #[arg(long)]
    cpu_rt_period: Option<u64>,
    /// CPU realtime hardcap limit (in usecs). Allowed cpu time in a given period
    #[arg(long, allow_hyphen_values = true)]
    cpu_rt_runtime: Option<i64>,
    /// set cgroup SCHED_IDLE or not, 0: default behavior, 1: SCHED_IDLE
    #[arg(long, allow_hyphen_values = true)]
    cpu_idle: Option<i64>,
    /// CPU(s) to use. To clear, use an empty string
    #[arg(long)]
    cpuset_cpus: Option<String>,
    /// Memory node(s) to use. To clear, use an empty string
    #[arg(long)]
    cpuset_mems: Option<String>,
    /// (obsoleted; do not use)
    #[arg(long)]
    kernel_memory: Option<String>,
    /// (obsoleted; do not use)
    #[arg(long)]
    kernel_memory_tcp: Option<String>,
    /// Memory limit (in bytes)
    #[arg(long, allow_hyphen_values = true)]
    memory: Option<String>,
    /// Memory reservation or soft_limit (in bytes)
    #[arg(long, allow_hyphen_values = true)]
    memory_reservation: Option<String>,
    /// Total memory usage (memory + swap); set '-1' to enable unlimited swap
    #[arg(long, allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Maximum number of pids allowed in the container
    #[arg(long, allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// The string of Intel RDT/CAT L3 cache schema
    #[arg(long)]
    l3_cache_schema: Option<String>,
    /// The string of Intel RDT/MBA memory bandwidth schema
    #[arg(long)]
    mem_bw_schema: Option<String>,
    #[arg(value_name = "container-id")]
    id: String,
}

impl Update {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let mut container = globals.container(&self.id)?;
        if self.l3_cache_schema.is_some() || self.mem_bw_schema.is_some() {
            container.update_rdt(self.l3_cache_schema.as_deref(), self.mem_bw_schema.as_deref())?;
        }
        if self.kernel_memory.is_some() || self.kernel_memory_tcp.is_some() {
            log::warn!("Kernel memory settings are ignored and will be removed");
        }
        container.update(&self.changes()?).map(|()| 0)
    }

    fn changes(&self) -> Result<LinuxResources> {
        let json = match &self.resources {
            Some(path) if path == std::path::Path::new("-") => read_stdin()?,
            Some(path) => skiff::bundle::read(path)?,
            None => self.flags()?.to_string().into_bytes(),
        };
        serde_json::from_slice(&json).map_err(|e| Error::invalid("resources", e))
    }

    fn flags(&self) -> Result<Value> {
        let mut out = json!({});
        let mut set = |controller: &str, key: &str, value: Option<Value>| {
            if let Some(value) = value {
                out[controller][key] = value;
            }
        };
        set("blockIO", "weight", self.blkio_weight.map(Value::from));
        set("cpu", "period", self.cpu_period.map(Value::from));
        set("cpu", "quota", self.cpu_quota.map(Value::from));
        set("cpu", "burst", self.cpu_burst.map(Value::from));
        set("cpu", "shares", self.cpu_share.map(Value::from));
        set("cpu", "realtimePeriod", self.cpu_rt_period.map(Value::from));
        set("cpu", "realtimeRuntime", self.cpu_rt_runtime.map(Value::from));
        set("cpu", "idle", self.cpu_idle.map(Value::from));
        set("cpu", "cpus", self.cpuset_cpus.clone().map(Value::from));
        set("cpu", "mems", self.cpuset_mems.clone().map(Value::from));
        set("pids", "limit", self.pids_limit.map(Value::from));
        for (flag, key, value) in [
            ("--memory", "limit", &self.memory),
            ("--memory-reservation", "reservation", &self.memory_reservation),
            ("--memory-swap", "swap", &self.memory_swap),
        ] {
            set("memory", key, value.as_deref().map(|text| bytes(flag, text)).transpose()?.map(Value::from));
        }
        Ok(out)
    }
}

fn read_stdin() -> Result<Vec<u8>> {
    use std::io::Read;
    let mut json = Vec::new();
    std::io::stdin().take(1 << 20).read_to_end(&mut json).map_err(|e| Error::io("read the resources", &e))?;
    Ok(json)
}

/// A number of bytes with an optional unit of 1024: `32M`, `1g`, `512kB`, `-1`.
fn bytes(flag: &str, text: &str) -> Result<i64> {
    let bad = || Error::invalid(format!("invalid value for {flag}"), format!("{text:?}"));
    if text == "-1" {
        return Ok(-1);
    }
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let lower = lower.strip_suffix('i').unwrap_or(lower).trim_end();
    let (number, shift) = match lower.char_indices().next_back() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => {
            let shift = "kmgtp".find(unit).ok_or_else(bad)?;
            (&lower[..at], 10 * (shift as u32 + 1))
        }
        _ => (lower, 0),
    };
    let number: f64 = number.trim_end().parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0).ok_or_else(bad)?;
    Ok((number * f64::from(2u32).powi(shift as i32)) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        for (text, want) in [
            ("0", 0),
            ("1024", 1024),
            ("32M", 32 << 20),
            ("1g", 1 << 30),
            ("1.5k", 1536),
            ("2KiB", 2048),
            ("-1", -1),
            ("7b", 7),
        ] {
            assert_eq!(bytes("--memory", text).unwrap(), want, "{text}");
        }
        for bad in ["", "x", "-2", "1x", "m"] {
            assert!(bytes("--memory", bad).is_err(), "{bad}");
        }
    }
}
