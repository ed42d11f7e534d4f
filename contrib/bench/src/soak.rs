//! What a shim holds after many cycles: descriptors, children, memory, names below /run.

use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::ttrpc::{Result, Server, TtrpcContext};
use containerd_shim_protos::{Events, create_events};
use skiff_test_support::Bundle;

use crate::Bench;
use crate::daemon::Daemon;
use crate::shim::{rollup, shims};

/// Takes events, as containerd does: what cannot be sent is kept.
struct Sink;

impl Events for Sink {
    fn forward(&self, _: &TtrpcContext, _: ForwardRequest) -> Result<Empty> {
        Ok(Empty::new())
    }
}

fn names(dir: &Path, mark: &str) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let below = |path: &Path| if path.is_dir() && !path.is_symlink() { names(path, mark) } else { 0 };
    entries.map(|e| usize::from(e.path().display().to_string().contains(mark)) + below(&e.path())).sum()
}

fn row(what: &str, daemon: &Daemon, pid: i32) {
    // Memory goes back to the kernel a moment after the last call.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("procfs").count();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    println!(
        "  {what:<24} {descriptors:>11} {:>8} {:>9} {:>17} {:>10}",
        children.split_whitespace().count(),
        names(Path::new("/run/containerd"), &daemon.id),
        rollup(pid, "Private_Dirty:"),
        rollup(pid, "Pss:"),
    );
}

/// A thousand containers and ten thousand exec processes in one shim; a tenth of that with `--quick`.
pub fn run(bench: &mut Bench) {
    let scale = if bench.rounds < 31 { 10 } else { 1 };
    for (name, path) in shims() {
        let bundle = Bundle::new(&["true"]);
        bundle.write();
        let events = format!("unix://{}/none.sock.ttrpc", bundle.path().display());
        let server = Server::new().bind(&events).expect("bind a socket for events");
        let mut server = server.register_service(create_events(Arc::new(Sink)));
        server.start().expect("listen for events");
        let mut daemon = Daemon::start(&path, bundle);
        let pid = daemon.pid();
        println!("\nsoak: {name}");
        println!(
            "  {:<24} {:>11} {:>8} {:>9} {:>17} {:>10}",
            "after", "descriptors", "children", "below /run", "private dirty KiB", "PSS KiB"
        );
        row("its start", &daemon, pid);
        let mut done = 0;
        for upto in [10, 100 / scale, 500 / scale, 1000 / scale] {
            for _ in done..upto {
                daemon.create("");
                daemon.begin("");
                daemon.wait("");
                daemon.delete("");
            }
            done = done.max(upto);
            row(&format!("{done} containers"), &daemon, pid);
        }
        daemon.bundle.spec["process"]["args"] = serde_json::json!(["sleep", "100000"]);
        daemon.bundle.write();
        daemon.create("");
        daemon.begin("");
        row("the start of a container", &daemon, pid);
        done = 0;
        for upto in [100, 1000 / scale, 5000 / scale, 10_000 / scale] {
            for at in done..upto {
                daemon.exec(&format!("e{at}"));
            }
            done = done.max(upto);
            row(&format!("{done} execs"), &daemon, pid);
        }
        daemon.end();
        server.shutdown();
    }
}
