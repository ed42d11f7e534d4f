//! The shims without containerd: lives, exec cycles, memory, output.

use std::path::{Path, PathBuf};
use std::process::Command;

use skiff_test_support::{Bundle, unique};

use crate::daemon::{Daemon, LOG};
use crate::{Bench, Contender, milliseconds, program};

/// skiff's own.
pub fn own() -> Option<PathBuf> {
    let default = "target/release/containerd-shim-skiff-v2";
    let default = std::fs::canonicalize(default).map_or_else(|_| default.to_string(), |p| p.display().to_string());
    program("SHIM", &default)
}

/// Those that are measured, by name.
pub fn shims() -> Vec<(&'static str, PathBuf)> {
    let all = [("skiff", own()), ("Go shim", program("GO_SHIM", "containerd-shim-runc-v2"))];
    all.into_iter().filter_map(|(name, path)| path.map(|path| (name, path))).collect()
}

fn bundle(args: &[&str]) -> Bundle {
    let bundle = Bundle::new(args);
    bundle.write();
    mkfifo(&bundle.path().join(LOG));
    bundle
}

fn mkfifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo").success());
}

/// launch, Create, Start, Wait, Delete, Shutdown; and exec cycles.
pub fn lives(bench: &mut Bench) {
    let shims = shims();
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for (name, path) in &shims {
        let life = || {
            let bundle = bundle(&["true"]);
            let mut daemon = None;
            let time = milliseconds(|| {
                let one = daemon.insert(Daemon::start(path, bundle));
                one.create("");
                one.begin("");
                one.wait("");
                one.delete("");
                one.shutdown();
            });
            daemon.iter().for_each(Daemon::gone);
            time
        };
        contenders.push((name, Box::new(life)));
    }
    bench.compare("shim: launch to shutdown", "ms", contenders);

    let daemons: Vec<Daemon> = shims.iter().map(|(_, path)| running(path)).collect();
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for ((name, _), daemon) in shims.iter().zip(&daemons) {
        contenders.push((name, Box::new(move || milliseconds(|| daemon.exec(&unique("e"))))));
    }
    bench.compare("shim: exec cycle", "ms", contenders);
    daemons.into_iter().for_each(Daemon::end);
}

fn running(shim: &Path) -> Daemon {
    let daemon = Daemon::start(shim, bundle(&["sleep", "1000"]));
    daemon.create("");
    daemon.begin("");
    daemon
}

/// KiB of a process by the name of a line of smaps_rollup.
pub fn rollup(pid: i32, name: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

/// Memory of idle shims.
pub fn memory(bench: &mut Bench) {
    let shims = shims();
    for count in [1, 50] {
        let mut figures = Vec::new();
        for (_, path) in &shims {
            let daemons: Vec<Daemon> = (0..count).map(|_| running(path)).collect();
            std::thread::sleep(std::time::Duration::from_millis(500));
            let pids: Vec<i32> = daemons.iter().map(Daemon::pid).collect();
            let each = |name: &str| pids.iter().map(|pid| rollup(*pid, name)).sum::<f64>() / f64::from(count);
            let threads = std::fs::read_dir(format!("/proc/{}/task", pids[0])).map_or(0, Iterator::count);
            // The pages of a program's file count as dirty until the file is written back: only what is its own counts.
            figures.push((each("Pss:"), each("Anonymous:"), threads as f64));
            daemons.into_iter().for_each(Daemon::end);
        }
        let all = |what: &str, unit: &str, pick: fn(&(f64, f64, f64)) -> f64, bench: &mut Bench| {
            let contenders = shims.iter().zip(&figures);
            let contenders: Vec<Contender<'_>> = contenders
                .map(|((name, _), f)| (*name, Box::new(move || pick(f)) as Box<dyn FnMut() -> f64>))
                .collect();
            bench.compare_rounds(what, unit, 1, contenders);
        };
        all(&format!("memory: PSS of each of {count} idle shims"), "KiB", |f| f.0, bench);
        all(&format!("memory: anonymous of each of {count} idle shims"), "KiB", |f| f.1, bench);
        if count == 1 {
            all("threads of an idle shim", "", |f| f.2, bench);
        }
    }
}

/// Processor seconds of a process so far, in milliseconds.
fn cpu(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let ticks = |at: usize| rest.split_whitespace().nth(at).and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) * 10.0
}

/// What a gigabyte of output costs.
pub fn output(bench: &mut Bench) {
    const MEGABYTES: u64 = 1024;
    let shims = shims();
    let mut speeds: Vec<Vec<f64>> = vec![Vec::new(); shims.len()];
    let mut costs = speeds.clone();
    for _ in 0..3 {
        for (at, (_, path)) in shims.iter().enumerate() {
            let count = MEGABYTES.to_string();
            let bundle = bundle(&["sh", "-c", &format!("head -c {count}m /dev/zero")]);
            let fifo = bundle.path().join("out");
            mkfifo(&fifo);
            let daemon = Daemon::start(path, bundle);
            let reader = {
                let fifo = fifo.clone();
                std::thread::spawn(move || {
                    let mut file = std::fs::File::open(fifo).expect("a FIFO");
                    std::io::copy(&mut file, &mut std::io::sink()).expect("read")
                })
            };
            daemon.create(fifo.to_str().expect("utf-8"));
            let (pid, before) = (daemon.pid(), cpu(daemon.pid()));
            let time = milliseconds(|| {
                daemon.begin("");
                daemon.wait("");
            });
            costs[at].push(cpu(pid) - before);
            daemon.delete("");
            assert_eq!(reader.join().expect("a reader"), MEGABYTES << 20, "not a byte is lost");
            speeds[at].push(1e3 * MEGABYTES as f64 / time);
            daemon.shutdown();
            daemon.gone();
        }
    }
    for (what, unit, figures) in
        [("output: speed", "MiB/s", speeds), ("output: processor time of the shim for a GiB", "ms", costs)]
    {
        let contenders = shims.iter().zip(figures).map(|((name, _), list)| {
            let mut list = list.into_iter();
            (*name, Box::new(move || list.next().unwrap_or(0.0)) as Box<dyn FnMut() -> f64>)
        });
        bench.compare_rounds(what, unit, 3, contenders.collect());
    }
}
