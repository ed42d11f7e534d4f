//! The installer of contrib/kubernetes, on a node that is made of this one: its programs, and files of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use skiff_test_support::{Done, Pods, Version, eventually};

use crate::node::{Node, idle};

/// A root file system that lies in a mount namespace of its own, and processes that see it there.
struct Machine {
    root: PathBuf,
    holder: Child,
}

/// Makes the root at $1, with containerd as $2 and what lies in $3 at the same place, and says so.
const MAKE: &str = r#"
set -e
mount --bind "$1" "$1"
cd "$1"
mkdir -p usr etc/containerd proc sys dev run tmp opt var root "./$3"
cp /etc/hosts /etc/hostname /etc/resolv.conf etc
for link in bin sbin lib lib64; do [ ! -L "/$link" ] || cp -P "/$link" .; done
mount --rbind /usr usr && mount -t tmpfs none usr/local && mkdir usr/local/bin
for dir in proc sys dev run; do mount --rbind "/$dir" "$dir"; done
mount --rbind "$3" "./$3"
[ -x "./$2" ] || { mkdir -p "./${2%/*}" && mount --bind "${2%/*}" "./${2%/*}"; }
ln -s "$2" usr/local/bin/containerd
printf '#!/bin/sh\necho "$@" >>/restarts\n' >usr/local/bin/systemctl
chmod 755 usr/local/bin/systemctl
echo made
exec sleep 1000
"#;

impl Machine {
    fn new(node: &Node) -> Machine {
        use std::io::Read;
        let dir = node.containerd.dir();
        let root = dir.with_extension("machine");
        std::fs::create_dir(&root).expect("a root");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", MAKE, "make"]);
        command.arg(&root).arg(node.containerd.program()).arg(dir).stdout(Stdio::piped());
        let mut holder = command.spawn().expect("unshare runs");
        let mut said = [0; 5];
        holder.stdout.as_mut().expect("a pipe").read_exact(&mut said).expect("the root is made");
        Machine { root, holder }
    }

    fn enter(&self) -> Vec<String> {
        ["nsenter", "--mount", "--target", &self.holder.id().to_string()].map(String::from).to_vec()
    }

    fn command(&self, args: &[&str]) -> Command {
        let enter = self.enter();
        let mut command = Command::new(&enter[0]);
        command.args(&enter[1..]).args(args);
        command
    }

    /// Runs the installer as its DaemonSet does, with the programs that are under test.
    fn install(&self, action: &str) -> Done {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/kubernetes/install.sh");
        let programs = Path::new(env!("CARGO_BIN_EXE_containerd-shim-skiff-v2")).parent().expect("a directory");
        let source = self.root.with_extension("source");
        std::fs::create_dir_all(&source).expect("a directory");
        let shim = "containerd-shim-skiff-v2";
        std::fs::copy(programs.join(shim), source.join(shim)).expect("copy the shim");
        // Nothing here runs the other one, which may not have been built.
        std::fs::write(source.join("skiff"), "").expect("write a file");
        let mut command = self.command(&["busybox", "sh"]);
        let output = command.arg(script).arg(action).env("HOST", &self.root).env("SOURCE", &source).output();
        let _ = std::fs::remove_dir_all(source);
        output.expect("nsenter runs").into()
    }

    fn has(&self, path: &str) -> bool {
        let path = self.root.join(path);
        self.command(&["test", "-e", path.to_str().expect("utf-8")]).status().expect("nsenter runs").success()
    }

    fn config(&self) -> PathBuf {
        self.root.join("etc/containerd/config.toml")
    }

    fn restarts(&self) -> String {
        std::fs::read_to_string(self.root.join("restarts")).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its mounts end with its last process: only then what is mounted is not below the root.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// One after the other: the installer looks for pods by the path of their shim, which is the same on both.
#[test]
fn on_nodes() {
    on_a_node(Version::V1);
    on_a_node(Version::V2);
}

fn on_a_node(version: Version) {
    if std::env::var_os("SHIM_UNDER_TEST").is_some() {
        // It installs skiff.
        return;
    }
    crate::with_node(version, Pods::Image, |node| {
        let machine = Machine::new(node);
        let own = std::fs::read_to_string(node.containerd.dir().join("config.toml")).expect("a configuration");
        std::fs::write(machine.config(), &own).expect("write the configuration");
        let root = machine.root.display().to_string();
        let mut by = machine.enter();
        by.extend(["chroot".into(), root]);
        let by: Vec<&str> = by.iter().map(String::as_str).collect();
        node.containerd.run_by(&by, Path::new("/etc/containerd/config.toml"));
        node.without_containerd(|| ());
        let run = |node: &Node| node.run_with_handler(node.pod_config(), "skiff").map(|pod| pod.id);
        assert!(run(node).expect_err("it is not there").message().contains("skiff"));

        machine.install("install").ok();
        assert_eq!(machine.restarts(), "restart containerd\n");
        assert!(machine.has("usr/local/bin/skiff"));
        node.without_containerd(|| ());
        let id = run(node).unwrap_or_else(|e| panic!("run a pod: {e}"));
        let container = node.known_pod(&id).start(idle()).id.clone();
        let goes_on = |node: &Node| {
            let container = node.known_pod(&id).known_container(&container);
            assert_eq!(container.exec(&["echo", "here"]).ok().out, "here\n");
        };
        goes_on(node);
        // What was there is there still: the pause image, the network, the other runtimes.
        let other = node.pod();
        assert!(other.status().network.expect("a network").ip.starts_with("10.88.0."));
        other.end();
        machine.install("install").ok();
        assert_eq!(machine.restarts(), "restart containerd\n", "once is enough");

        let refused = machine.install("remove").failed();
        assert!(refused.err.contains("pods still run"), "{}", refused.err);
        node.without_containerd(|| ());
        goes_on(node);
        node.known_pod(&id).end();
        eventually("its shim is gone", || node.containerd.shims().is_empty());
        machine.install("remove").ok();
        assert!(!machine.has("usr/local/bin/containerd-shim-skiff-v2") && !machine.has("usr/local/bin/skiff"));
        assert_eq!(std::fs::read_to_string(machine.config()).expect("the configuration"), own);
        assert_eq!(machine.restarts().lines().count(), 2);
        node.without_containerd(|| ());
        assert!(run(node).is_err());
        machine.install("remove").ok();
        assert_eq!(machine.restarts().lines().count(), 2);

        // Where nothing is configured.
        std::fs::remove_file(machine.config()).expect("remove the configuration");
        machine.install("install").ok();
        let made = std::fs::read_to_string(machine.config()).expect("a configuration");
        assert!(made.contains(if version == Version::V1 { "version = 2" } else { "version = 3" }), "{made}");
        let check = machine
            .command(&["chroot", machine.root.to_str().expect("utf-8"), "containerd"])
            .args(["config", "dump"])
            .output();
        let dump = Done::from(check.expect("nsenter runs")).ok().out;
        assert!(dump.contains("io.containerd.skiff.v2"), "{dump}");
        machine.install("remove").ok();
        assert_eq!(std::fs::read_to_string(machine.config()).expect("a configuration"), "");
        // And where there is what it does not know.
        std::fs::write(machine.config(), "oom_score = 1\n").expect("write the configuration");
        assert!(machine.install("install").failed().err.contains("not of version 2 or 3"));
        node.containerd.down();
        drop(machine);
        node.containerd.run_here();
        node.without_containerd(|| ());
    });
}
