//! A node with pods and containers: what a kubelet asks for, in few words.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;

use skiff_cri_client::cri::{self, ContainerConfig, ContainerState, ContainerStatus, NamespaceMode, PodSandboxConfig};
use skiff_cri_client::{Client, Status};
use skiff_test_support::{Containerd, Done, IMAGE, LeakCheck, Pods, eventually, unique};

/// One call of the runtime service: its name, and the request.
macro_rules! call {
    ($node:expr, $method:ident, $request:expr) => {
        $node.client.call($request, async |mut service, request| service.$method(request).await)
    };
}
pub(crate) use call;

/// A containerd with its CRI.
pub struct Node {
    pub containerd: Containerd,
    pub client: Client,
    pub pods: Pods,
    /// Every pod and container that there was: what the leak check looks for.
    ids: Mutex<Vec<String>>,
    configs: Mutex<HashMap<String, PodSandboxConfig>>,
}

/// A pod that runs. A test ends it.
pub struct Pod<'a> {
    pub node: &'a Node,
    pub id: String,
    pub config: PodSandboxConfig,
}

/// A container in a pod. It goes with its pod.
pub struct Container<'a> {
    pub node: &'a Node,
    pub id: String,
    pub log: PathBuf,
}

/// What runs `sh -c script`.
pub fn sh(script: &str) -> ContainerConfig {
    program(&["sh", "-c", script])
}

/// What runs a program of busybox.
pub fn program(args: &[&str]) -> ContainerConfig {
    skiff_cri_client::container(&unique("c"), IMAGE, args)
}

/// What waits to be killed. As PID 1 it has no handler: only SIGKILL ends it.
pub fn idle() -> ContainerConfig {
    program(&["sleep", "1000"])
}

/// The security context of a container.
pub fn security(config: &mut ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// The resources of a container.
pub fn resources(config: &mut ContainerConfig) -> &mut cri::LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// The security context of a pod.
pub fn pod_security(config: &mut PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

impl Node {
    /// Of a containerd that has just started.
    pub fn new(containerd: Containerd, pods: Pods) -> Node {
        let client = Client::new(&containerd.socket());
        let node = Node { containerd, client, pods, ids: Mutex::default(), configs: Mutex::default() };
        eventually("the node is ready", || node.is_ready());
        eventually("the images are known", || node.client.images().is_ok_and(|tags| tags.len() == 2));
        node
    }

    /// The runtime and the network are.
    pub fn is_ready(&self) -> bool {
        let status = call!(self, status, cri::StatusRequest { verbose: false });
        let conditions = status.ok().and_then(|answer| answer.status).map(|status| status.conditions);
        conditions.is_some_and(|all| all.iter().all(|condition| condition.status))
    }

    /// containerd is killed; what it runs goes on. `meanwhile` something happens, and it comes back.
    pub fn without_containerd(&mut self, meanwhile: impl FnOnce()) {
        self.containerd.down();
        meanwhile();
        self.containerd.up();
        eventually("the node is ready again", || self.is_ready());
    }

    /// What a pod is asked for with.
    pub fn pod_config(&self) -> PodSandboxConfig {
        let name = unique("pod");
        let logs = self.containerd.dir().join("logs").join(&name).display().to_string();
        let mut config = skiff_cri_client::pod(&name, logs, self.containerd.pod_parent());
        if self.pods == Pods::BuiltIn {
            config.annotations.insert("io.containerd.skiff.builtin-pause".into(), "true".into());
        }
        let pid = NamespaceMode::Container.into();
        pod_security(&mut config).namespace_options =
            Some(cri::NamespaceOption { pid, ..cri::NamespaceOption::default() });
        config
    }

    /// Runs a pod as the kubelet would by default.
    #[track_caller]
    pub fn pod(&self) -> Pod<'_> {
        self.pod_with(|_| ())
    }

    /// Runs a pod of which something is different.
    #[track_caller]
    pub fn pod_with(&self, change: impl FnOnce(&mut PodSandboxConfig)) -> Pod<'_> {
        let mut config = self.pod_config();
        change(&mut config);
        self.run(config).unwrap_or_else(|e| panic!("run a pod: {e}"))
    }

    /// Runs a pod.
    pub fn run(&self, config: PodSandboxConfig) -> Result<Pod<'_>, Status> {
        self.run_with_handler(config, "")
    }

    /// Runs a pod with one of the configured runtimes.
    pub fn run_with_handler(&self, config: PodSandboxConfig, handler: &str) -> Result<Pod<'_>, Status> {
        std::fs::create_dir_all(&config.log_directory).expect("a directory for logs");
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let id = call!(self, run_pod_sandbox, request)?.pod_sandbox_id;
        self.ids.lock().expect("ids").push(id.clone());
        self.configs.lock().expect("configs").insert(id.clone(), config.clone());
        Ok(Pod { node: self, id, config })
    }

    /// A pod that was run before.
    #[track_caller]
    pub fn known_pod(&self, id: &str) -> Pod<'_> {
        let config = self.configs.lock().expect("configs").get(id).expect("a pod of this test").clone();
        Pod { node: self, id: id.into(), config }
    }

    /// Nothing is left of all the pods.
    #[track_caller]
    pub fn end(self) {
        let pods = call!(self, list_pod_sandbox, cri::Empty {}).expect("the pods").items;
        assert_eq!(pods, [], "no pod is left");
        let containers = call!(self, list_containers, cri::Empty {}).expect("the containers").containers;
        assert_eq!(containers, [], "no container is left");
        let state = format!("{}/state/io.containerd", self.containerd.dir().display());
        let cgroups = format!("/{}/", self.containerd.pod_parent().trim_start_matches('/'));
        let ids = self.ids.lock().expect("ids");
        let marks: Vec<&str> = ids.iter().map(String::as_str).chain([state.as_str(), &cgroups]).collect();
        LeakCheck::new(&marks).end();
        eventually("the shims are gone", || self.containerd.shims().is_empty());
    }
}

impl<'a> Pod<'a> {
    /// Makes a container. It has the namespaces of the pod's configuration, if it does not say otherwise.
    pub fn create(&self, mut config: ContainerConfig) -> Result<Container<'a>, Status> {
        let namespaces = pod_security(&mut self.config.clone()).namespace_options.clone();
        let wanted = &mut security(&mut config).namespace_options;
        *wanted = wanted.take().or(namespaces);
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = call!(self.node, create_container, request)?.container_id;
        self.node.ids.lock().expect("ids").push(id.clone());
        Ok(Container { node: self.node, id, log })
    }

    /// Makes a container and starts it.
    #[track_caller]
    pub fn start(&self, config: ContainerConfig) -> Container<'a> {
        let container = self.create(config).unwrap_or_else(|e| panic!("create a container: {e}"));
        container.start().unwrap_or_else(|e| panic!("start a container: {e}"));
        container
    }

    /// A container that was made before.
    #[track_caller]
    pub fn known_container(&self, id: &str) -> Container<'a> {
        let mut container = Container { node: self.node, id: id.into(), log: PathBuf::new() };
        container.log = container.status().log_path.into();
        container
    }

    /// What a container says until it ends.
    #[track_caller]
    pub fn output(&self, config: ContainerConfig) -> String {
        let container = self.start(config);
        container.ended();
        let output = container.output();
        container.remove();
        output
    }

    /// What a script says, in a container of its own.
    #[track_caller]
    pub fn says(&self, script: &str) -> String {
        self.output(sh(script))
    }

    /// Its status.
    #[track_caller]
    pub fn status(&self) -> cri::PodSandboxStatus {
        let answer = call!(self.node, pod_sandbox_status, self.request());
        answer.unwrap_or_else(|e| panic!("status of a pod: {e}")).status.expect("a status")
    }

    /// Stops it.
    #[track_caller]
    pub fn stop(&self) {
        call!(self.node, stop_pod_sandbox, self.request()).unwrap_or_else(|e| panic!("stop a pod: {e}"));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(self) {
        call!(self.node, remove_pod_sandbox, self.request()).unwrap_or_else(|e| panic!("remove a pod: {e}"));
    }

    /// Stops it and removes it, with all its containers.
    #[track_caller]
    pub fn end(self) {
        self.stop();
        self.remove();
    }

    /// A request about it.
    pub fn request(&self) -> cri::PodRequest {
        cri::PodRequest { pod_sandbox_id: self.id.clone() }
    }
}

impl Container<'_> {
    /// Starts it.
    pub fn start(&self) -> Result<(), Status> {
        call!(self.node, start_container, self.request()).map(drop)
    }

    /// Its status.
    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        let request = cri::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer = call!(self.node, container_status, request);
        answer.unwrap_or_else(|e| panic!("status of a container: {e}")).status.expect("a status")
    }

    /// The host's pid of its first process.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        let request = cri::ContainerStatusRequest { container_id: self.id.clone(), verbose: true };
        let answer = call!(self.node, container_status, request).unwrap_or_else(|e| panic!("status: {e}"));
        let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).expect("JSON");
        info["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a pid")
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ended(&self) -> ContainerStatus {
        eventually("the container ends", || self.status().state() == ContainerState::ContainerExited);
        self.status()
    }

    /// Runs a program in it, for at most `timeout` seconds; 0 is for ever.
    pub fn try_exec(&self, args: &[&str], timeout: i64) -> Result<Done, Status> {
        let cmd = args.iter().map(ToString::to_string).collect();
        let request = cri::ExecSyncRequest { container_id: self.id.clone(), cmd, timeout };
        let answer = call!(self.node, exec_sync, request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Done { code: answer.exit_code, out: text(&answer.stdout), err: text(&answer.stderr) })
    }

    /// The same; it can be started.
    #[track_caller]
    pub fn exec(&self, args: &[&str]) -> Done {
        self.try_exec(args, 30).unwrap_or_else(|e| panic!("{args:?}: {e}"))
    }

    /// What a script says in it.
    #[track_caller]
    pub fn says(&self, script: &str) -> String {
        self.exec(&["sh", "-c", script]).ok().out
    }

    /// Asks it to end, and makes it after `grace` seconds.
    #[track_caller]
    pub fn stop(&self, grace: i64) {
        let request = cri::StopContainerRequest { container_id: self.id.clone(), timeout: grace };
        call!(self.node, stop_container, request).unwrap_or_else(|e| panic!("stop a container: {e}"));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(self) {
        call!(self.node, remove_container, self.request()).unwrap_or_else(|e| panic!("remove a container: {e}"));
    }

    /// What it has said on stdout and stderr, out of its log.
    #[track_caller]
    pub fn output(&self) -> String {
        let mut out = String::new();
        for line in std::fs::read_to_string(&self.log).unwrap_or_default().lines() {
            let mut parts = line.splitn(4, ' ').skip(2);
            let (tag, text) = (parts.next().expect("a tag"), parts.next().expect("a text"));
            out.push_str(text);
            if tag == "F" {
                out.push('\n');
            }
        }
        out
    }

    /// A request about it.
    pub fn request(&self) -> cri::ContainerRequest {
        cri::ContainerRequest { container_id: self.id.clone() }
    }
}
