//! `events`: resource usage and OOM notifications as lines of JSON, in runc's layout.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Map, Value, json};
use skiff::cgroup::Stats;
use skiff::cgroup::stats::{BlkioEntry, Psi, Usage, V1, V2};
use skiff::container::{Container, Status};
use skiff::{Error, Kind, Result};

use super::Globals;

/// `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// set the stats collection interval
    #[arg(long, default_value = "5s")]
    interval: String,
    /// display the container's stats then exit
    #[arg(long)]
    stats: bool,
    #[arg(value_name = "container-id")]
    id: String,
}

impl Events {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let interval = duration(&self.interval)?;
        let container = globals.container(&self.id)?;
        if container.status()? == Status::Stopped {
            return Err(Error::new(Kind::FailedPrecondition, format!("container with id {} is not running", self.id)));
        }
        if self.stats {
            return print(&self.id, "stats", Some(data(&container.stats()?))).map(|()| 0);
        }
        self.watch(&container, interval).map(|()| 0)
    }

    fn watch(&self, container: &Container, interval: Duration) -> Result<()> {
        let init = container.watch()?;
        let oom = container.watch_oom()?;
        let mut kills = container.cgroup().oom_kills().unwrap_or(0);
        let mut next = Instant::now() + interval;
        loop {
            let mut fds = vec![PollFd::new(init.as_fd(), PollFlags::POLLIN)];
            if let Some(oom) = &oom {
                let events = if oom.by_priority() { PollFlags::POLLPRI } else { PollFlags::POLLIN };
                fds.push(PollFd::new(oom.fd(), events));
            }
            let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Error::sys("poll", errno)),
            }
            let ended = fds[0].any().unwrap_or(false);
            if let Some(oom) = &oom {
                oom.clear();
                let now = container.cgroup().oom_kills().unwrap_or(0);
                if now > kills {
                    kills = now;
                    print(&self.id, "oom", None)?;
                }
            }
            if ended {
                return Ok(());
            }
            if Instant::now() >= next {
                next += interval;
                print(&self.id, "stats", Some(data(&container.stats()?)))?;
            }
        }
    }
}

fn print(id: &str, kind: &str, data: Option<Value>) -> Result<()> {
    let mut line = json!({"type": kind, "id": id});
    if let Some(data) = data {
        line["data"] = data;
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|e| Error::io("write events", &e))
}

/// Go's durations, of one unit: `5s`, `100ms`, `1m`.
fn duration(text: &str) -> Result<Duration> {
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let unit = match &text[at..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(Error::invalid("--interval", format!("{text:?} is not a duration like 5s"))),
    };
    match text[..at].parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1e9 => Ok(Duration::from_secs_f64(number * unit)),
        _ => Err(Error::invalid("--interval", "duration interval must be greater than 0")),
    }
}

fn data(stats: &Stats) -> Value {
    match stats {
        Stats::V1(v1) => data_v1(v1),
        Stats::V2(v2) => data_v2(v2),
    }
}

fn usage(usage: &Usage) -> Value {
    json!({"limit": usage.limit, "usage": usage.usage, "max": usage.max, "failcnt": usage.failcnt})
}

fn pids(pids: &Usage) -> Value {
    let limit = if pids.limit == u64::MAX { 0 } else { pids.limit };
    json!({"current": pids.usage, "limit": limit})
}

fn raw(stat: &[(String, u64)]) -> Value {
    Value::Object(stat.iter().map(|(key, value)| (key.clone(), (*value).into())).collect())
}

fn find(stat: &[(String, u64)], name: &str) -> u64 {
    stat.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value)
}

fn hugetlb(sizes: &[(String, Usage)]) -> Value {
    let one = |u: &Usage| json!({"usage": u.usage, "max": u.max, "failcnt": u.failcnt});
    Value::Object(sizes.iter().map(|(size, u)| (size.clone(), one(u))).collect())
}

fn psi(psi: &Option<Psi>) -> Option<Value> {
    let one = |p: &skiff::cgroup::stats::Pressure| json!({"avg10": p.avg10, "avg60": p.avg60, "avg300": p.avg300, "total": p.total});
    psi.as_ref().map(|psi| json!({"some": one(&psi.some), "full": one(&psi.full)}))
}

fn data_v1(v1: &V1) -> Value {
    let entry = |e: &BlkioEntry| json!({"major": e.major, "minor": e.minor, "op": e.op, "value": e.value});
    let blkio: Map<String, Value> = v1
        .blkio
        .iter()
        .filter_map(|(name, entries)| {
            let key = match *name {
                "throttle.io_service_bytes_recursive" => "ioServiceBytesRecursive",
                "throttle.io_serviced_recursive" => "ioServicedRecursive",
                _ => return None,
            };
            Some((key.to_string(), entries.iter().map(entry).collect()))
        })
        .collect();
    json!({
        "cpu": {
            "usage": {"total": v1.cpu_total, "percpu": v1.cpu_each, "kernel": v1.cpu_kernel, "user": v1.cpu_user},
            "throttling": {
                "periods": v1.throttling.0, "throttledPeriods": v1.throttling.1, "throttledTime": v1.throttling.2,
            },
        },
        "cpuset": {},
        "memory": {
            "cache": find(&v1.memory_stat, "cache"),
            "usage": usage(&v1.memory),
            "swap": usage(&v1.swap),
            "kernel": usage(&v1.kernel),
            "kernelTCP": usage(&v1.kernel_tcp),
            "raw": raw(&v1.memory_stat),
        },
        "pids": pids(&v1.pids),
        "blkio": blkio,
        "hugetlb": hugetlb(&v1.hugetlb),
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn data_v2(v2: &V2) -> Value {
    let cpu = |name: &str| find(&v2.cpu, name);
    let blkio = |keys: [(&str, &str); 2]| -> Vec<Value> {
        let entry = |(major, minor, stat): &(u64, u64, Vec<(String, u64)>)| {
            keys.map(|(key, op)| json!({"major": major, "minor": minor, "op": op, "value": find(stat, key)}))
        };
        v2.io.iter().flat_map(entry).collect()
    };
    let mut out = json!({
        "cpu": {
            "usage": {
                "total": cpu("usage_usec") * 1000, "kernel": cpu("system_usec") * 1000, "user": cpu("user_usec") * 1000,
            },
            "throttling": {
                "periods": cpu("nr_periods"),
                "throttledPeriods": cpu("nr_throttled"),
                "throttledTime": cpu("throttled_usec") * 1000,
            },
        },
        "cpuset": {},
        "memory": {
            "cache": find(&v2.memory_stat, "file"),
            "usage": usage(&v2.memory),
            "swap": usage(&v2.swap),
            "kernel": usage(&Usage::default()),
            "kernelTCP": usage(&Usage::default()),
            "raw": raw(&v2.memory_stat),
        },
        "pids": pids(&v2.pids),
        "blkio": {
            "ioServiceBytesRecursive": blkio([("rbytes", "Read"), ("wbytes", "Write")]),
            "ioServicedRecursive": blkio([("rios", "Read"), ("wios", "Write")]),
        },
        "hugetlb": hugetlb(&v2.hugetlb),
        "intel_rdt": {},
        "network_interfaces": null,
    });
    for (controller, pressure) in [("cpu", &v2.cpu_psi), ("memory", &v2.memory_psi), ("blkio", &v2.io_psi)] {
        if let Some(pressure) = psi(pressure) {
            out[controller]["psi"] = pressure;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_durations() {
        assert_eq!(duration("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(duration("100ms").unwrap(), Duration::from_millis(100));
        for bad in ["", "5", "0s", "-1s", "5x"] {
            assert!(duration(bad).unwrap_err().to_string().starts_with("--interval: "), "{bad}");
        }
    }
}
