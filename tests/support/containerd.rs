//! A private containerd: its own root, state and socket in a temporary directory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{Done, Network, eventually, has_controllers, image, run, unique};

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The system's: Debian 12 has 1.6.
    V1,
    /// A 2.x, unpacked by contrib/install-deps.
    V2,
}

/// How the pods of a CRI are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods {
    /// By a container of the pause image.
    Image,
    /// The same, with what the shim has in place of that image's program.
    BuiltIn,
    /// By the shim itself, without a container; from containerd 2.0 on.
    Shim,
    /// The same, with standard streams that are no FIFOs.
    Streaming,
}

/// What makes the cgroups of pods and containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The runtime by itself, as containerd has it by default.
    Cgroupfs,
    /// systemd, as most nodes have it.
    Systemd,
}

/// A running containerd with a busybox image. Dropped, it is ended with everything that it runs.
#[derive(Debug)]
pub struct Containerd {
    dir: tempfile::TempDir,
    version: Version,
    bin: PathBuf,
    shim_dir: PathBuf,
    daemon: Option<Child>,
    runtime: String,
    namespace: String,
    parent: String,
    driver: Driver,
    network: Option<Network>,
    /// What the daemon is run by, and its configuration, when that is not its own.
    elsewhere: Option<(Vec<String>, PathBuf)>,
}

fn binaries(version: Version) -> PathBuf {
    match version {
        Version::V1 => PathBuf::from("/usr/bin"),
        Version::V2 => {
            let home = std::env::var("HOME").unwrap_or_else(|_| "/root".into());
            let deps = std::env::var("SKIFF_DEPS").unwrap_or_else(|_| format!("{home}/.cache/skiff"));
            PathBuf::from(deps).join("containerd-2/usr/bin")
        }
    }
}

/// For pods on a bridge.
const CNI: &str = r#"{"cniVersion": "0.4.0", "name": "pods", "plugins": [
    {"type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "dataDir": "DIR/cni-data", "routes": [{"dst": "0.0.0.0/0"}],
            "ranges": [[{"subnet": "10.88.0.0/16"}]]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
]}"#;

/// Where Debian keeps the CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";

impl Containerd {
    /// Starts one. `shim` is the skiff shim; SHIM_UNDER_TEST names another runtime instead.
    pub fn start(version: Version, shim: &Path) -> Containerd {
        let namespace = unique("ns");
        let mut containerd = Containerd::new(version, shim, namespace.clone(), namespace);
        let config = format!("disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n{}", containerd.common_config());
        containerd.begin(&config);
        containerd
    }

    /// Starts one with the CRI plugin, in a network of its own. It has the runtimes `test`; `path`, as containerd up to 2.2
    /// asks only runtimes of the type `io.containerd.runc.v2` what they can, and this is one whose path is that of skiff;
    /// `runc`, the Go shim; and `built-in`, with options of skiff's own.
    pub fn start_cri(version: Version, shim: &Path, pods: Pods, driver: Driver) -> Containerd {
        let mut containerd = Containerd::new(version, shim, "k8s.io".into(), unique("cri"));
        containerd.driver = driver;
        containerd.network = Some(Network::new());
        let at = containerd.dir.path().display().to_string();
        std::fs::create_dir(containerd.dir.path().join("cni")).expect("make a directory");
        std::fs::write(containerd.dir.path().join("cni/pods.conflist"), CNI.replace("DIR", &at))
            .expect("configure CNI");
        std::fs::write(containerd.dir.path().join("skiff.toml"), "BuiltinPause = true\n").expect("write options");
        let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
        let sandboxer = match pods {
            Pods::Image | Pods::BuiltIn => "\"podsandbox\"",
            Pods::Shim => "\"shim\"",
            Pods::Streaming => "\"shim\"\nio_type = \"streaming\"",
        };
        let annotations = "pod_annotations = [\"io.containerd.skiff.*\"]\n";
        let config = format!(
            "{common}\
             [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n\
             [{cri}]\nsandbox_image = \"{pause}\"\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
             netns_mounts_under_state_dir = true\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
             [{cri}.containerd]\ndefault_runtime_name = \"test\"\n\
             [{cri}.containerd.runtimes.test]\nruntime_type = \"{runtime}\"\nsandboxer = {sandboxer}\n{annotations}\
             {options}\
             [{cri}.containerd.runtimes.path]\nruntime_type = \"io.containerd.runc.v2\"\n{path}{annotations}\
             [{cri}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
             [{cri}.containerd.runtimes.built-in]\nruntime_type = \"{runtime}\"\n\
             [{cri}.containerd.runtimes.built-in.options]\nConfigPath = \"{at}/skiff.toml\"\n\
             [{cri}.cni]\nbin_dir = \"{CNI_PLUGINS}\"\nconf_dir = \"{at}/cni\"\n",
            common = containerd.common_config(),
            pause = image::PAUSE,
            runtime = containerd.runtime,
            // containerd 2.0 to 2.3.0 starts no container with options where the shim holds the pod: the shim sees by
            // the path of the cgroup what is meant.
            options = if driver == Driver::Systemd && pods == Pods::Image {
                ["test", "path"]
                    .map(|name| format!("[{cri}.containerd.runtimes.{name}.options]\nSystemdCgroup = true\n"))
                    .concat()
            } else {
                String::new()
            },
            path =
                if containerd.is_skiff() { format!("runtime_path = \"{}\"\n", shim.display()) } else { String::new() },
        );
        containerd.begin(&config);
        containerd
    }

    fn new(version: Version, shim: &Path, namespace: String, parent: String) -> Containerd {
        Containerd {
            dir: tempfile::Builder::new().prefix("ctd-").tempdir().expect("a temporary directory"),
            version,
            bin: binaries(version),
            shim_dir: shim.parent().expect("a shim in a directory").to_path_buf(),
            daemon: None,
            runtime: std::env::var("SHIM_UNDER_TEST").unwrap_or_else(|_| "io.containerd.skiff.v2".into()),
            namespace,
            parent,
            driver: Driver::Cgroupfs,
            network: None,
            elsewhere: None,
        }
    }

    fn common_config(&self) -> String {
        let at = self.dir.path().display();
        format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             [grpc]\naddress = \"{at}/c.sock\"\n[ttrpc]\naddress = \"{at}/c.sock.ttrpc\"\n"
        )
    }

    fn begin(&mut self, config: &str) {
        std::fs::write(self.dir.path().join("config.toml"), config).expect("write the configuration");
        self.up();
        let archive = image::make(self.dir.path());
        self.ctr(&["images", "import", archive.to_str().expect("utf-8")]).ok();
    }

    /// Which it is.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What it says of its version.
    pub fn release(&self) -> String {
        run(Command::new(self.bin.join("containerd")).arg("--version"), "").ok().out
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("c.sock")
    }

    /// What a pod is to have as the parent of its cgroups: a path, or a slice.
    pub fn pod_parent(&self) -> String {
        match self.driver {
            Driver::Cgroupfs => format!("/{}", self.parent),
            Driver::Systemd => format!("{}.slice", self.parent),
        }
    }

    /// A name for the parents of cgroups that no other test uses.
    pub fn cgroup_parent(&self) -> &str {
        &self.parent
    }

    /// The network that it is in, if it is not the machine's.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// Its temporary directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// True when skiff is under test, not the reference.
    pub fn is_skiff(&self) -> bool {
        self.runtime.contains("skiff")
    }

    /// Starts the daemon.
    pub fn up(&mut self) {
        let path =
            format!("{}:{}:{}", self.shim_dir.display(), self.bin.display(), std::env::var("PATH").unwrap_or_default());
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        let program = self.bin.join("containerd");
        let mut command = match &self.elsewhere {
            None => Command::new(&program),
            Some((by, _)) => {
                let mut command = Command::new(&by[0]);
                command.args(&by[1..]).arg(&program);
                command
            }
        };
        let config = self.elsewhere.as_ref().map_or_else(|| self.dir.path().join("config.toml"), |(_, at)| at.clone());
        command.arg("-c").arg(config);
        command.env("PATH", path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = match &self.network {
            Some(network) => network.run(|| command.spawn()),
            None => command.spawn(),
        };
        self.daemon = Some(daemon.expect("contrib/install-deps --tests has been run"));
        eventually("containerd answers", || self.ctr(&["version"]).code == 0);
    }

    /// From the next start on the daemon is run by a command, with another configuration.
    pub fn run_by(&mut self, command: &[&str], config: &Path) {
        self.elsewhere = Some((command.iter().map(ToString::to_string).collect(), config.to_path_buf()));
    }

    /// And again as it was.
    pub fn run_here(&mut self) {
        self.elsewhere = None;
    }

    /// Its program.
    pub fn program(&self) -> PathBuf {
        self.bin.join("containerd")
    }

    /// Kills the daemon; what it runs goes on.
    pub fn down(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Runs ctr.
    pub fn ctr(&self, args: &[&str]) -> Done {
        self.ctr_with(args, "")
    }

    /// Runs ctr with `input` on stdin.
    pub fn ctr_with(&self, args: &[&str], input: &str) -> Done {
        run(self.command().args(args), input)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.bin.join("ctr"));
        command.env("CONTAINERD_ADDRESS", self.dir.path().join("c.sock")).env("CONTAINERD_NAMESPACE", &self.namespace);
        command
    }

    /// A ctr that goes on; its stdout can be read.
    pub fn ctr_background(&self, args: &[&str]) -> Child {
        let mut command = self.command();
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("ctr starts")
    }

    /// ctr on a terminal of its own.
    pub fn ctr_tty(&self, args: &[&str]) -> Done {
        let ctr = self.bin.join("ctr");
        let line: Vec<String> = std::iter::once(ctr.to_str().expect("utf-8"))
            .chain(args.iter().copied())
            .map(|a| format!("'{a}'"))
            .collect();
        let mut command = Command::new("script");
        command.args(["-qec", &line.join(" "), "/dev/null"]);
        command.env("CONTAINERD_ADDRESS", self.dir.path().join("c.sock")).env("CONTAINERD_NAMESPACE", &self.namespace);
        run(&mut command, "")
    }

    /// `ctr run` of the busybox image with these flags, as container `id`.
    pub fn run(&self, flags: &[&str], id: &str, args: &[&str]) -> Done {
        self.run_with(flags, id, args, "")
    }

    /// `ctr run` with another runtime than the one under test.
    pub fn run_as(&self, runtime: &str, flags: &[&str], id: &str, args: &[&str]) -> Done {
        self.ctr(&run_line(runtime, flags, id, args))
    }

    /// The same, with `input` on stdin.
    pub fn run_with(&self, flags: &[&str], id: &str, args: &[&str], input: &str) -> Done {
        let all = run_line(&self.runtime, flags, id, args);
        if flags.contains(&"-t") { self.ctr_tty(&all) } else { self.ctr_with(&all, input) }
    }

    /// The status column of `ctr tasks ls` for `id`, if it is listed.
    pub fn status(&self, id: &str) -> Option<String> {
        let list = self.ctr(&["tasks", "ls"]).ok().out;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id))?;
        line.split_whitespace().nth(2).map(str::to_string)
    }

    /// The init's pid.
    pub fn pid(&self, id: &str) -> i32 {
        let list = self.ctr(&["tasks", "ls"]).ok().out;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id)).expect("a listed task");
        line.split_whitespace().nth(1).and_then(|pid| pid.parse().ok()).expect("a pid")
    }

    /// Pids of the shims that serve this containerd.
    pub fn shims(&self) -> Vec<i32> {
        let needle = format!("{}/c.sock", self.dir.path().display());
        let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_shim = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains("containerd-shim-") && line.contains(&needle)
        };
        pids.filter(is_shim).collect()
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

fn run_line<'a>(runtime: &'a str, flags: &[&'a str], id: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    // ctr asks for shares unless it is told not to.
    let shares: &[&str] = if has_controllers(&["cpu"]) { &[] } else { &["--cpu-shares", "0"] };
    [&["run", "--runtime", runtime], shares, flags, &[image::NAME, id], args].concat()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("containerd's last words:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
            if self.daemon.is_some() {
                for task in self.ctr(&["tasks", "ls", "-q"]).out.split_whitespace() {
                    self.ctr(&["tasks", "rm", "-f", task]);
                }
            }
        }
        self.down();
        for pid in self.shims() {
            // SAFETY: plain numbers.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let prefix = self.dir.path().to_str().expect("utf-8");
        for mount in mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|m| m.starts_with(prefix)) {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
        // Runtimes leave the parents of a container's cgroup and state directory.
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        for root in hierarchies.map(|entry| entry.path()).chain(["/sys/fs/cgroup"].map(PathBuf::from)) {
            remove_cgroup(&root.join(&self.parent));
        }
        let _ = std::fs::remove_dir(Path::new("/run/containerd/runc").join(&self.parent));
    }
}

/// With what is below it, and what is still in it.
fn remove_cgroup(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let members = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|pid| pid.parse().ok()).filter(|pid| *pid > 0) {
        // SAFETY: plain numbers.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    for _ in 0..100 {
        if !dir.exists() || std::fs::remove_dir(dir).is_ok() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
