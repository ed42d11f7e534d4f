//! A bundle whose rootfs is busybox.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

const APPLETS: [&str; 38] = [
    "sh", "cat", "echo", "env", "false", "grep", "head", "hostname", "id", "ip", "kill", "ls", "mkdir", "mknod",
    "mount", "nc", "od", "ps", "pwd", "readlink", "rm", "rmdir", "seq", "sleep", "stat", "stty", "tail", "test",
    "touch", "tr", "true", "tty", "umask", "umount", "uname", "wc", "yes", "sort",
];

/// A bundle in a temporary directory.
#[derive(Debug)]
pub struct Bundle {
    dir: tempfile::TempDir,
    /// Its config.json, written by [`Bundle::write`].
    pub spec: Value,
}

/// Fills `rootfs` with busybox and a passwd.
pub fn fill_rootfs(rootfs: &Path) {
    for dir in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        std::fs::create_dir_all(rootfs.join(dir)).expect("make a rootfs");
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("link an applet");
    }
    let users = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\nmember:x:1001:1001::/:/bin/sh\n";
    std::fs::write(rootfs.join("etc/passwd"), users).expect("write passwd");
    std::fs::write(rootfs.join("etc/group"), "root:x:0:\nmembers:x:50000:member\n").expect("write group");
}

/// A user namespace whose ids are 100000 and on.
pub fn add_user_namespace(spec: &mut Value) {
    spec["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
}

impl Bundle {
    /// With runc's default spec, without a terminal, running `args`.
    pub fn new(args: &[&str]) -> Bundle {
        let dir = tempfile::Builder::new().prefix("skiff-bundle-").tempdir().expect("a temporary directory");
        fill_rootfs(&dir.path().join("rootfs"));
        let mut bundle = Bundle { dir, spec: default_spec() };
        bundle.spec["process"]["args"] = json!(args);
        bundle
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Its root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// Writes config.json.
    pub fn write(&self) -> &Self {
        std::fs::write(self.path().join("config.json"), self.spec.to_string()).expect("write config.json");
        self
    }
}

fn default_spec() -> Value {
    let caps = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
