//! Resource usage out of cgroup files: what containerd's v1 and v2 Metrics carry. Missing files count as zero.

use super::dir::Directory;

/// Resource usage of a cgroup.
#[derive(Clone, Debug, PartialEq)]
pub enum Stats {
    /// Of v1 hierarchies.
    V1(Box<V1>),
    /// Of the v2 tree.
    V2(Box<V2>),
}

/// Pressure of one kind: averages in percent, total in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Over 10 seconds.
    pub avg10: f64,
    /// Over 60 seconds.
    pub avg60: f64,
    /// Over 300 seconds.
    pub avg300: f64,
    /// Microseconds in all.
    pub total: u64,
}

/// Pressure stall information of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Psi {
    /// Some tasks waited.
    pub some: Pressure,
    /// All tasks waited.
    pub full: Pressure,
}

/// Usage and limit; `u64::MAX` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Now.
    pub usage: u64,
    /// Limit.
    pub limit: u64,
    /// Most so far.
    pub max: u64,
    /// Times that the limit was hit.
    pub failcnt: u64,
}

/// One line of a block I/O file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlkioEntry {
    /// Major number of the device.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// `Read`, `Write`, `Sync`, `Async`, `Total`; empty where there is none.
    pub op: String,
    /// Value.
    pub value: u64,
}

/// A device of io.stat: major, minor, its keys and their values.
pub type Device = (u64, u64, Vec<(String, u64)>);

/// Usage of v2.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct V2 {
    /// Processes.
    pub pids: Usage,
    /// cpu.stat, as it is.
    pub cpu: Vec<(String, u64)>,
    /// cpu.pressure.
    pub cpu_psi: Option<Psi>,
    /// memory.stat, as it is.
    pub memory_stat: Vec<(String, u64)>,
    /// Memory, bytes.
    pub memory: Usage,
    /// Swap, bytes.
    pub swap: Usage,
    /// memory.pressure.
    pub memory_psi: Option<Psi>,
    /// memory.events.
    pub memory_events: Vec<(String, u64)>,
    /// io.stat: device, then its keys.
    pub io: Vec<Device>,
    /// io.pressure.
    pub io_psi: Option<Psi>,
    /// By page size.
    pub hugetlb: Vec<(String, Usage)>,
}

/// Usage of v1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct V1 {
    /// Processes.
    pub pids: Usage,
    /// CPU time, nanoseconds.
    pub cpu_total: u64,
    /// In the kernel, nanoseconds.
    pub cpu_kernel: u64,
    /// In user mode, nanoseconds.
    pub cpu_user: u64,
    /// By processor, nanoseconds.
    pub cpu_each: Vec<u64>,
    /// cpu.stat: nr_periods, nr_throttled, throttled_time.
    pub throttling: (u64, u64, u64),
    /// memory.stat, as it is.
    pub memory_stat: Vec<(String, u64)>,
    /// Memory, bytes.
    pub memory: Usage,
    /// Memory and swap.
    pub swap: Usage,
    /// Kernel memory.
    pub kernel: Usage,
    /// Kernel memory for TCP.
    pub kernel_tcp: Usage,
    /// memory.oom_control: oom_kill_disable, under_oom, oom_kill.
    pub oom_control: (u64, u64, u64),
    /// By the name of the file behind `blkio.`.
    pub blkio: Vec<(&'static str, Vec<BlkioEntry>)>,
    /// By page size.
    pub hugetlb: Vec<(String, Usage)>,
}

/// The v1 block I/O files that containerd's Metrics carry.
pub const BLKIO: [&str; 2] = ["throttle.io_service_bytes_recursive", "throttle.io_serviced_recursive"];

/// Reads everything; `controller` finds the directory of a controller.
pub fn read<'a>(controller: impl Fn(&str) -> Option<&'a Directory>, v2: bool) -> Stats {
    if v2 { Stats::V2(Box::new(read_v2(controller("")))) } else { Stats::V1(Box::new(read_v1(controller))) }
}

/// The value of `key` in a file of `key value` lines; 0 when it is not there.
pub fn value(text: &str, key: &str) -> u64 {
    pairs(text).find(|(k, _)| *k == key).map_or(0, |(_, v)| v)
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

fn list(text: Option<String>) -> Vec<(String, u64)> {
    text.iter().flat_map(|text| pairs(text)).map(|(key, value)| (key.to_string(), value)).collect()
}

fn read_v2(dir: Option<&Directory>) -> V2 {
    let Some(dir) = dir else { return V2::default() };
    let usage = |current: &str, limit: &str, peak: &str| Usage {
        usage: dir.number(current).unwrap_or(0),
        limit: dir.number(limit).unwrap_or(0),
        max: dir.number(peak).unwrap_or(0),
        failcnt: 0,
    };
    V2 {
        pids: usage("pids.current", "pids.max", "pids.peak"),
        cpu: list(dir.read("cpu.stat")),
        cpu_psi: dir.read("cpu.pressure").map(|text| psi(&text)),
        memory_stat: list(dir.read("memory.stat")),
        memory: usage("memory.current", "memory.max", "memory.peak"),
        swap: usage("memory.swap.current", "memory.swap.max", "memory.swap.peak"),
        memory_psi: dir.read("memory.pressure").map(|text| psi(&text)),
        memory_events: list(dir.read("memory.events")),
        io: dir.read("io.stat").map_or_else(Vec::new, |text| io(&text)),
        io_psi: dir.read("io.pressure").map(|text| psi(&text)),
        hugetlb: page_sizes()
            .into_iter()
            .filter_map(|size| {
                let usage = dir.number(&format!("hugetlb.{size}.current"))?;
                let limit = dir.number(&format!("hugetlb.{size}.max")).unwrap_or(0);
                let events = dir.read(&format!("hugetlb.{size}.events")).unwrap_or_default();
                Some((size, Usage { usage, limit, max: 0, failcnt: value(&events, "max") }))
            })
            .collect(),
    }
}

fn read_v1<'a>(controller: impl Fn(&str) -> Option<&'a Directory>) -> V1 {
    let mut out = V1::default();
    if let Some(dir) = controller("pids") {
        out.pids.usage = dir.number("pids.current").unwrap_or(0);
        // Without a limit containerd's v1 Metrics say 0.
        out.pids.limit = dir.number("pids.max").filter(|max| *max != u64::MAX).unwrap_or(0);
    }
    if let Some(dir) = controller("cpuacct") {
        out.cpu_total = dir.number("cpuacct.usage").unwrap_or(0);
        out.cpu_user = dir.number("cpuacct.usage_user").unwrap_or(0);
        out.cpu_kernel = dir.number("cpuacct.usage_sys").unwrap_or(0);
        let each = dir.read("cpuacct.usage_percpu").unwrap_or_default();
        out.cpu_each = each.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    }
    if let Some(text) = controller("cpu").and_then(|dir| dir.read("cpu.stat")) {
        out.throttling = (value(&text, "nr_periods"), value(&text, "nr_throttled"), value(&text, "throttled_time"));
    }
    if let Some(dir) = controller("memory") {
        let usage = |module: &str| {
            let number = |name: &str| dir.number(&format!("memory.{module}{name}")).unwrap_or(0);
            Usage {
                usage: number("usage_in_bytes"),
                limit: number("limit_in_bytes"),
                max: number("max_usage_in_bytes"),
                failcnt: number("failcnt"),
            }
        };
        out.memory_stat = list(dir.read("memory.stat"));
        out.memory = usage("");
        out.swap = usage("memsw.");
        out.kernel = usage("kmem.");
        out.kernel_tcp = usage("kmem.tcp.");
        let oom = dir.read("memory.oom_control").unwrap_or_default();
        out.oom_control = (value(&oom, "oom_kill_disable"), value(&oom, "under_oom"), value(&oom, "oom_kill"));
    }
    if let Some(dir) = controller("blkio") {
        out.blkio = BLKIO
            .iter()
            .map(|name| (*name, dir.read(&format!("blkio.{name}")).map_or_else(Vec::new, |text| blkio(&text))))
            .collect();
    }
    if let Some(dir) = controller("hugetlb") {
        out.hugetlb = page_sizes()
            .into_iter()
            .map(|size| {
                let number = |name: &str| dir.number(&format!("hugetlb.{size}.{name}")).unwrap_or(0);
                let usage = Usage {
                    usage: number("usage_in_bytes"),
                    limit: number("limit_in_bytes"),
                    max: number("max_usage_in_bytes"),
                    failcnt: number("failcnt"),
                };
                (size, usage)
            })
            .collect();
    }
    out
}

/// Page sizes of this kernel, as the files of the hugetlb controller name them: `2MB`, `1GB`.
fn page_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let kilobytes = entries.flatten().filter_map(|entry| {
        entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()
    });
    kilobytes
        .map(|kb| match kb {
            kb if kb >= 1 << 20 => format!("{}GB", kb >> 20),
            kb if kb >= 1 << 10 => format!("{}MB", kb >> 10),
            kb => format!("{kb}KB"),
        })
        .collect()
}

fn psi(text: &str) -> Psi {
    let mut out = Psi::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let target = match words.next() {
            Some("some") => &mut out.some,
            Some("full") => &mut out.full,
            _ => continue,
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => target.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => target.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => target.avg300 = value.parse().unwrap_or(0.0),
                "total" => target.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
    out
}

fn device(number: &str) -> Option<(u64, u64)> {
    let (major, minor) = number.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn io(text: &str) -> Vec<Device> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = device(words.next()?)?;
            let keys = words.filter_map(|word| word.split_once('='));
            let keys = keys.filter_map(|(key, value)| Some((key.to_string(), value.parse().ok()?)));
            Some((major, minor, keys.collect()))
        })
        .collect()
}

fn blkio(text: &str) -> Vec<BlkioEntry> {
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (major, minor) = device(words.first()?)?;
            let (op, value) = match words[..] {
                [_, op, value] => (op, value),
                [_, value] => ("", value),
                _ => return None,
            };
            Some(BlkioEntry { major, minor, op: op.to_string(), value: value.parse().ok()? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_by_their_shape() {
        assert_eq!(value("low 0\noom 2\noom_kill 3\n", "oom_kill"), 3);
        assert_eq!(value("", "oom_kill"), 0);
        let psi =
            psi("some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5");
        assert_eq!((psi.some.avg10, psi.some.total, psi.full.total), (1.5, 77, 5));
        let io = io("8:0 rbytes=1 wbytes=2 rios=3\nbroken\n");
        assert_eq!(io, [(8, 0, vec![("rbytes".into(), 1), ("wbytes".into(), 2), ("rios".into(), 3)])]);
        let blkio = blkio("254:0 Read 7\n8:1 9\nTotal 16\n");
        assert_eq!(blkio[0], BlkioEntry { major: 254, minor: 0, op: "Read".into(), value: 7 });
        assert_eq!(blkio[1], BlkioEntry { major: 8, minor: 1, op: String::new(), value: 9 });
        assert_eq!(blkio.len(), 2);
    }
}
