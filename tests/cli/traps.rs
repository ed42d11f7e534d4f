//! A hostile rootfs changes nothing outside of it.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::{Case, is_skiff};

/// A directory of the host that a trap points to; nothing in it may change.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Host {
        let dir = tempfile::Builder::new().prefix("skiff-host-").tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "untouched").unwrap();
        Host(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    #[track_caller]
    fn untouched(&self) {
        let names: Vec<_> = std::fs::read_dir(self.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["precious"], "something was made on the host");
        assert_eq!(std::fs::read_to_string(self.path().join("precious")).unwrap(), "untouched");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.path().to_str().unwrap()), "something was mounted on the host");
    }
}

/// Replaces a directory of the rootfs with a symlink to the host's.
fn replace(case: &Case, name: &str, target: &Path) {
    let path = case.bundle.rootfs().join(name);
    std::fs::remove_dir_all(&path).unwrap();
    symlink(target, path).unwrap();
}

#[test]
fn proc_and_sys_must_not_be_symlinks() {
    for name in ["proc", "sys"] {
        let host = Host::new();
        let case = Case::new(&["true"]);
        replace(&case, name, host.path());
        let done = case.run().failed();
        if is_skiff() {
            assert!(done.err.contains("must be mounted on ordinary directory"), "{}", done.err);
        }
        host.untouched();
        case.end();
    }
}

#[test]
fn a_dev_symlink_stays_inside() {
    // Neither the mounts on /dev nor, without any, the device nodes and links may land on the host. runc before 1.5
    // makes them there, so it is not asked.
    if !is_skiff() {
        return;
    }
    for with_mounts in [true, false] {
        let host = Host::new();
        let case = Case::new(&["true"]).with(|spec| {
            spec["root"]["readonly"] = json!(false);
            if !with_mounts {
                let mounts = spec["mounts"].as_array_mut().unwrap();
                mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
            }
        });
        replace(&case, "dev", host.path());
        case.run();
        host.untouched();
        case.end();
    }
}

#[test]
fn mount_destinations_through_symlinks_stay_inside() {
    let host = Host::new();
    let case = Case::sh("ls /link/sub").with(|spec| {
        spec["root"]["readonly"] = json!(false);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/link/sub", "type": "tmpfs", "source": "tmpfs"}));
    });
    symlink(host.path(), case.bundle.rootfs().join("link")).unwrap();
    case.run();
    host.untouched();
    case.end();
}

#[test]
fn a_working_directory_on_a_descriptor_is_refused() {
    for fd in 3..20 {
        let case = Case::new(&["true"]).with(|spec| spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}")));
        case.run().failed();
        case.end();
    }
}

#[test]
fn a_fifo_for_passwd_does_not_stop_the_create() {
    if !is_skiff() {
        return;
    }
    let case = Case::sh("echo $HOME");
    let passwd = case.bundle.rootfs().join("etc/passwd");
    std::fs::remove_file(&passwd).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&passwd).status().unwrap().success());
    assert_eq!(case.run().ok().out, "/\n");
    case.end();
}

#[test]
fn our_own_program_cannot_be_written_to() {
    // The entry point runs whatever /proc/self/exe is at that moment, and then tries to open it for writing.
    let case = Case::new(&["/proc/self/exe", "--version"]);
    let before = std::fs::read(&case.runtime).ok();
    case.run();
    if let Some(before) = before {
        assert!(std::fs::read(&case.runtime).unwrap() == before);
    }
    case.end();
}

/// Without a mount on /dev, what the image has there is used; it must be what it seems.
fn without_dev_mounts(spec: &mut serde_json::Value) {
    spec["root"]["readonly"] = json!(false);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
}

#[test]
fn an_images_dev_null_does_not_stand_behind_masked_paths() {
    if !is_skiff() {
        return;
    }
    for trap in ["symlink", "file", "directory"] {
        let host = Host::new();
        let case = Case::sh("cat /proc/keys /etc/secret | wc -c").with(|spec| {
            without_dev_mounts(spec);
            spec["linux"]["maskedPaths"] = json!(["/proc/keys", "/etc/secret"]);
        });
        let dev = case.bundle.rootfs().join("dev");
        std::fs::write(case.bundle.rootfs().join("etc/secret"), "secret").unwrap();
        match trap {
            "symlink" => symlink(host.path().join("precious"), dev.join("null")).unwrap(),
            "file" => std::fs::write(dev.join("null"), "not null").unwrap(),
            _ => std::fs::create_dir(dev.join("null")).unwrap(),
        }
        let done = case.run();
        // A default device that is something else is an error; if not, the masks are the host's null all the same.
        assert!(done.code != 0 || done.out == "0\n", "{trap}: {done:?}");
        host.untouched();
        case.end();
    }
}

#[test]
fn a_console_that_is_a_symlink_changes_nothing_on_the_host() {
    if !is_skiff() {
        return;
    }
    for (name, inside) in [("console", "dev/console"), ("pts", "dev/pts")] {
        let host = Host::new();
        let case = Case::new(&["true"]).with(|spec| {
            without_dev_mounts(spec);
            spec["process"]["terminal"] = json!(true);
            let devpts = json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "mode=0620"]});
            spec["mounts"].as_array_mut().unwrap().push(devpts);
        });
        symlink(host.path(), case.bundle.rootfs().join(inside)).unwrap();
        let socket = case.bundle.path().join("console.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let done = case.detached(&["run", "-d", "--console-socket", socket.to_str().unwrap(), &case.id]);
        case.cmd(&["delete", "--force", &case.id]);
        assert!(name == "pts" || done.code != 0, "{done:?}");
        host.untouched();
        case.end();
    }
}

#[test]
fn a_destination_that_is_swapped_stays_inside() {
    let host = Host::new();
    let case = Case::new(&["true"]).with(|spec| {
        spec["root"]["readonly"] = json!(false);
        let mount = json!({"destination": "/swap/sub", "type": "tmpfs", "source": "tmpfs"});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    let rootfs = case.bundle.rootfs();
    std::fs::create_dir_all(rootfs.join("swap")).unwrap();
    symlink(host.path(), rootfs.join("other")).unwrap();
    while_swapped(&rootfs, || {
        case.run();
        host.untouched();
    });
    case.end();
}

/// Forty times, while `swap` and `other` of the rootfs change places all the time.
fn while_swapped(rootfs: &Path, mut attempt: impl FnMut()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                skiff_test_support::exchange(&rootfs.join("swap"), &rootfs.join("other"));
            }
        });
        (0..40).for_each(|_| attempt());
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn exec_adds_no_inheritable_capability() {
    let case = Case::new(&["sleep", "100"]).with(|spec| {
        spec["process"]["capabilities"] =
            json!({"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]});
    });
    case.detached(&["run", "-d", &case.id]).ok();
    let out =
        case.cmd(&["exec", "--cap", "CAP_KILL", &case.id, "grep", "-E", "CapInh|CapAmb", "/proc/self/status"]).ok().out;
    assert_eq!(out, "CapInh:\t0000000000000000\nCapAmb:\t0000000000000000\n");
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn labels_without_their_module_are_refused() {
    // Never passed over in silence: the process would run without its confinement.
    if std::path::Path::new("/sys/kernel/security/apparmor").exists() {
        return;
    }
    let case = Case::new(&["true"]).with(|spec| spec["process"]["apparmorProfile"] = json!("some-profile"));
    let err = case.run().failed().err;
    assert!(err.contains("apparmor"), "{err}");
    case.end();
}

#[test]
fn a_created_container_holds_nothing_of_the_hosts_open() {
    let case = Case::new(&["true"]);
    let mut create = case.command(&["create", "--pid-file", "pid", &case.id]);
    let secret = std::fs::File::open(case.bundle.path().join("config.json")).unwrap();
    // What a careless caller leaves open goes no further either.
    nix::fcntl::fcntl(&secret, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let null = std::process::Stdio::null;
    assert!(create.stdin(null()).stdout(null()).stderr(null()).status().unwrap().success());
    let pid = std::fs::read_to_string(case.bundle.path().join("pid")).unwrap();
    let mut beyond = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap().display().to_string();
        let known =
            ["anon_inode:", "socket:", "pipe:", "/memfd:runc_cloned"].iter().any(|kind| target.starts_with(kind));
        if !known && target != "/dev/null" && target != "/" && !target.ends_with("/exec.fifo") {
            beyond.push(target);
        }
    }
    // runc before 1.4 leaves more open.
    assert!(!is_skiff() || beyond.is_empty(), "{beyond:?}");
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn without_pivot_the_hosts_proc_lends_no_bare_one() {
    let script = "unshare -mrpf mount -t proc none /mnt 2>/dev/null; test -e /mnt/sysrq-trigger && echo bare";
    let case = Case::sh(&format!("mkdir -p /mnt; {script}; true")).with(|spec| {
        for set in ["bounding", "permitted", "effective"] {
            spec["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SETFCAP"));
        }
    });
    if is_skiff() {
        let done = case.cmd(&["run", "--no-pivot", &case.id]).ok();
        assert_eq!(done.out, "", "{done:?}");
    }
    case.end();
}

#[test]
fn dangling_symlinks_of_an_image_are_followed_inside_it() {
    if !is_skiff() {
        return;
    }
    let host = Host::new();
    let case = Case::sh("cat /a/b/file /elsewhere; ls -d /d/e/f");
    let rootfs = case.bundle.rootfs();
    let below = |path: &str| host.path().join(path).display().to_string();
    symlink("/a/b", rootfs.join("jump")).unwrap();
    symlink("/elsewhere", rootfs.join("leaf")).unwrap();
    symlink("d/e", rootfs.join("dir")).unwrap();
    symlink(below("new"), rootfs.join("outside")).unwrap();
    std::fs::write(case.bundle.path().join("source"), "here ").unwrap();
    let bind = |to: &str| json!({"destination": to, "type": "bind", "source": "source", "options": ["bind"]});
    let case = case.with(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.extend([bind("/jump/file"), bind("/leaf"), bind("/outside/file")]);
        mounts.push(json!({"destination": "/dir/f", "type": "tmpfs", "source": "tmpfs"}));
    });
    assert_eq!(case.run().ok().out, "here here /d/e/f\n");
    assert!(rootfs.join(below("new/file").trim_start_matches('/')).exists(), "the target lies in the rootfs");
    host.untouched();
    case.end();
    let case = Case::new(&["true"]).with(|spec| spec["mounts"].as_array_mut().unwrap().push(bind("/loop1/x")));
    symlink("loop2", case.bundle.rootfs().join("loop1")).unwrap();
    symlink("loop1", case.bundle.rootfs().join("loop2")).unwrap();
    std::fs::write(case.bundle.path().join("source"), "").unwrap();
    let err = case.run().failed().err;
    assert!(err.contains("destination"), "{err}");
    case.end();
}

#[test]
fn an_exec_does_not_start_at_a_descriptor_either() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    for fd in 3..20 {
        let cwd = format!("/proc/self/fd/{fd}");
        let done = case.cmd(&["exec", "--cwd", &cwd, &case.id, "pwd"]);
        // runc 1.1 of Debian refuses them as well.
        assert_eq!(done.code, 255, "{fd}: {done:?}");
    }
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_process_of_the_container_cannot_write_to_what_enters_it() {
    // Whoever turns up in the container's /proc is tried, while execs come in one by one.
    let script = "while :; do for p in /proc/[0-9]*; do \
        case $(readlink $p/exe) in /bin/busybox|'') ;; *) (echo overwritten >$p/exe) 2>/dev/null && echo $p;; esac; \
        done; done";
    let case = Case::sh(script).with(|spec| {
        let caps = json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]);
        spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    let before = std::fs::read(&case.runtime).ok();
    case.detached(&["run", "-d", &case.id]).ok();
    for _ in 0..30 {
        case.cmd(&["exec", &case.id, "true"]).ok();
        case.cmd(&["exec", &case.id, "/proc/self/exe", "--version"]);
    }
    if let Some(before) = before {
        assert!(std::fs::read(&case.runtime).unwrap() == before, "the program was written to");
    }
    assert_eq!(std::fs::read_to_string(case.bundle.path().join("out")).unwrap(), "", "a write has gone through");
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_fake_proc_takes_no_sysctl_and_no_label() {
    if !is_skiff() {
        return;
    }
    // Without a mount on /proc the image's own directory stands there, with files that would swallow every write.
    for mounted in [false, true] {
        let case = Case::new(&["true"]);
        let fake = if mounted { case.bundle.path().join("fake") } else { case.bundle.rootfs().join("proc") };
        for file in ["sys/net/ipv4/ip_forward", "thread-self/attr/exec", "self/attr/exec", "self/oom_score_adj"] {
            let path = fake.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "untouched").unwrap();
        }
        let case = case.with(|spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["destination"] != "/proc");
            if mounted {
                mounts
                    .push(json!({"destination": "/elsewhere", "type": "bind", "source": "fake", "options": ["bind"]}));
            }
            spec["root"]["readonly"] = json!(false);
            spec["linux"]["maskedPaths"] = json!([]);
            spec["linux"]["readonlyPaths"] = json!([]);
            spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
            spec["process"]["oomScoreAdj"] = json!(100);
        });
        if mounted {
            symlink("elsewhere", case.bundle.rootfs().join("link")).unwrap();
        }
        case.run().ok();
        // The label is refused for want of the module, by the kernel's own procfs, and not by the image's files.
        let case = case.with(|spec| spec["process"]["selinuxLabel"] = json!("a:b:c:d"));
        if !Path::new("/sys/fs/selinux/enforce").exists() {
            case.run().failed();
        }
        for file in ["sys/net/ipv4/ip_forward", "thread-self/attr/exec", "self/attr/exec", "self/oom_score_adj"] {
            assert_eq!(std::fs::read_to_string(fake.join(file)).unwrap(), "untouched", "{file}");
        }
        case.end();
    }
}

#[test]
fn capabilities_of_the_caller_are_not_inherited() {
    let case = Case::new(&["grep", "-E", "CapInh|CapPrm|CapEff|CapAmb", "/proc/self/status"]);
    let mut caller = std::process::Command::new("setpriv");
    caller.args(["--inh-caps", "+net_raw,+sys_admin", "--ambient-caps", "+net_raw,+sys_admin"]);
    caller.arg(which(&case.runtime)).args(["run", &case.id]).current_dir(case.bundle.path());
    let out = skiff_test_support::run(&mut caller, "").ok().out;
    for line in out.lines() {
        let (name, bits) = line.split_once(":\t").unwrap();
        let bits = u64::from_str_radix(bits, 16).unwrap();
        let allowed = if name == "CapInh" || name == "CapAmb" { 0 } else { 1 << 5 | 1 << 10 | 1 << 29 };
        assert_eq!(bits & !allowed, 0, "{line}");
    }
    case.end();
}

/// A program by the path that setpriv(1) takes.
fn which(program: &Path) -> std::path::PathBuf {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| path.is_file());
    found.unwrap_or_else(|| program.to_path_buf())
}

#[test]
fn users_of_exec_are_numbers_to_the_last_character() {
    // runc 1.1 takes 4294967296 for root.
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    for user in
        ["root", "", "1x", "1:", ":1", "-1", "+1", "0x0", " 1", "1:2:3", "4294967295", "4294967296", "99999999999"]
    {
        let done = case.cmd(&["exec", "--user", user, &case.id, "id", "-u"]);
        assert!(done.code == 255 && done.err.contains("--user: "), "{user:?}: {done:?}");
    }
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_passwd_without_end_is_read_to_its_limit() {
    if !skiff_test_support::has_controllers(&["memory"]) {
        return;
    }
    if !is_skiff() {
        return;
    }
    // Of busybox's programs some read these files as a whole themselves.
    let case = Case::sh("echo $HOME; grep Groups: /proc/self/status").with(|spec| {
        spec["process"]["user"] = json!({"uid": 77, "gid": 77, "additionalGids": [5]});
    });
    for name in ["passwd", "group"] {
        // A hole of eight GiB.
        let file = std::fs::File::create(case.bundle.rootfs().join("etc").join(name)).unwrap();
        file.set_len(8 << 30).unwrap();
    }
    // The limit of memory is one that a file read as a whole would not fit in.
    let case = case.with(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20}));
    assert_eq!(case.run().ok().out, "/\nGroups:\t5 \n");
    case.end();
}

#[test]
fn a_masked_path_that_is_swapped_hides_nothing_of_the_host() {
    let host = Host::new();
    let outside = host.path().display().to_string();
    let case = Case::new(&["true"]).with(|spec| {
        spec["root"]["readonly"] = json!(false);
        spec["linux"]["maskedPaths"] = json!(["/swap/secret", "/swap"]);
        spec["linux"]["readonlyPaths"] = json!(["/swap/open"]);
    });
    let rootfs = case.bundle.rootfs();
    for name in ["secret", "open"] {
        std::fs::create_dir_all(rootfs.join("swap").join(name)).unwrap();
    }
    symlink(&outside, rootfs.join("other")).unwrap();
    while_swapped(&rootfs, || {
        case.run();
        host.untouched();
    });
    case.end();
}

#[test]
fn a_pty_that_the_image_has_is_not_the_console() {
    if !is_skiff() {
        return;
    }
    // The image's /dev/pts/0 leads to a file of the host, and its ptmx is another device.
    for devpts in [true, false] {
        let host = Host::new();
        let case = Case::sh("echo to-the-console").with(|spec| {
            without_dev_mounts(spec);
            spec["process"]["terminal"] = json!(true);
            if devpts {
                let devpts = json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                    "options": ["newinstance", "ptmxmode=0666", "mode=0620"]});
                spec["mounts"].as_array_mut().unwrap().push(devpts);
            }
        });
        let pts = case.bundle.rootfs().join("dev/pts");
        std::fs::create_dir_all(&pts).unwrap();
        symlink(host.path().join("precious"), pts.join("0")).unwrap();
        std::fs::write(pts.join("ptmx"), "").unwrap();
        let socket = case.bundle.path().join("console.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let done = case.detached(&["run", "-d", "--console-socket", socket.to_str().unwrap(), &case.id]);
        assert_eq!(done.code == 0, devpts, "a terminal comes from a devpts alone: {done:?}");
        case.cmd(&["delete", "--force", &case.id]);
        host.untouched();
        case.end();
    }
}
