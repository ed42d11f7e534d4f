//! Pods through CRI, as the kubelet runs them: with a pause image, with the pause that is built into the shim, and with none.

use skiff_cri_client::{Client, cri};
use skiff_test_support::{Containerd, Driver, IMAGE, Pods, Version, eventually, unique};

use crate::shim::{own, rollup};
use crate::{Bench, Contender, milliseconds};

/// One call of the runtime service.
macro_rules! call {
    ($node:expr, $method:ident, $request:expr) => {
        $node
            .client
            .call($request, async |mut service, request| service.$method(request).await)
            .unwrap_or_else(|e| panic!("{}: {e}", stringify!($method)))
    };
}

struct Node {
    containerd: Containerd,
    client: Client,
}

impl Node {
    fn new(version: Version, pods: Pods, shim: &std::path::Path) -> Node {
        let containerd = Containerd::start_cri(version, shim, pods, Driver::Cgroupfs);
        let client = Client::new(&containerd.socket());
        eventually("the images are known", || client.images().is_ok_and(|tags| tags.len() == 2));
        Node { containerd, client }
    }

    /// Runs a pod with a container in it by the runtime that `handler` names; its id.
    fn run(&self, handler: &str) -> String {
        let name = unique("pod");
        let logs = self.containerd.dir().join("logs").join(&name).display().to_string();
        let config = skiff_cri_client::pod(&name, logs, self.containerd.pod_parent());
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let id = call!(self, run_pod_sandbox, request).pod_sandbox_id;
        let container = skiff_cri_client::container("c", IMAGE, &["sleep", "1000"]);
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: id.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        };
        let container_id = call!(self, create_container, request).container_id;
        call!(self, start_container, cri::ContainerRequest { container_id });
        id
    }

    fn end(&self, pod: String) {
        let request = || cri::PodRequest { pod_sandbox_id: pod.clone() };
        call!(self, stop_pod_sandbox, request());
        call!(self, remove_pod_sandbox, request());
    }

    /// The processes that a pod that was not there `before` has beside that of its container: its shim and its pause process.
    fn overhead(&self, before: &[i32]) -> Vec<i32> {
        let shims = self.containerd.shims().into_iter().filter(|pid| !before.contains(pid));
        let mut pids: Vec<i32> = shims.collect();
        for shim in pids.clone() {
            let path = format!("/proc/{shim}/task/{shim}/children");
            let children = std::fs::read_to_string(path).unwrap_or_default();
            let children = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
            let name = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            pids.extend(children.filter(|pid| name(*pid).trim() != "sleep"));
        }
        pids
    }
}

/// Start of a pod with a container, and what it holds beside that container.
pub fn run(bench: &mut Bench) {
    let shim = own().expect("the shim is built (SHIM names it)");
    let with_pause = Node::new(Version::V2, Pods::Image, &shim);
    let without = Node::new(Version::V2, Pods::Shim, &shim);
    let contenders = [
        ("skiff", &with_pause, "test"),
        ("Go shim", &with_pause, "runc"),
        ("built in", &with_pause, "built-in"),
        ("no pause", &without, "test"),
    ];
    let starts = contenders.map(|(name, node, handler)| {
        let start: Box<dyn FnMut() -> f64> = Box::new(move || {
            let mut pod = None;
            let time = milliseconds(|| pod = Some(node.run(handler)));
            pod.into_iter().for_each(|pod| node.end(pod));
            time
        });
        (name, start)
    });
    bench.compare_rounds("pods through CRI: start of one with a container", "ms", bench.rounds.min(15), starts.into());
    let held = contenders.map(|(_, node, handler)| {
        let before = node.containerd.shims();
        let pod = node.run(handler);
        std::thread::sleep(std::time::Duration::from_secs(1));
        let pids = node.overhead(&before);
        let memory = pids.iter().map(|pid| rollup(*pid, "Private_Dirty:")).sum::<f64>();
        node.end(pod);
        (pids.len() as f64, memory)
    });
    let each = |pick: fn(&(f64, f64)) -> f64| -> Vec<Contender<'_>> {
        let names = contenders.map(|(name, ..)| name);
        let figures = held.iter().map(pick).collect::<Vec<_>>();
        let one = |(name, figure)| (name, Box::new(move || figure) as Box<dyn FnMut() -> f64>);
        names.into_iter().zip(figures).map(one).collect()
    };
    bench.compare_rounds("pods: processes beside the containers'", "", 1, each(|held| held.0));
    bench.compare_rounds("pods: private dirty memory of these", "KiB", 1, each(|held| held.1));
}
