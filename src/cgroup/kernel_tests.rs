//! One cgroup against the real kernel; needs root.

use std::process::{Child, Command, Stdio};

use super::*;
use crate::host::Cgroups;

struct Sleep(Child);

impl Sleep {
    fn new() -> Sleep {
        Sleep(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn planned(name: &str, resources: &str) -> CgroupPlan {
    let json = format!(
        r#"{{"ociVersion":"1.0.2","linux":{{"cgroupsPath":"/skiff-test-{}-{name}","resources":{resources}}}}}"#,
        std::process::id()
    );
    let spec = serde_json::from_str(&json).unwrap();
    crate::plan::cgroup::plan("unused", &spec, &Cgroups::read().unwrap(), false, false).unwrap()
}

#[test]
fn a_cgroup_holds_limits_freezes_kills_and_goes() {
    let plan = planned("life", r#"{"memory":{"limit":67108864},"pids":{"limit":50}}"#);
    let cgroup = Cgroup::create(&plan).unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cgroup.set_devices(&plan).and_then(|()| cgroup.apply(&plan)).unwrap();
        let mut sleep = Sleep::new();
        cgroup.attach(sleep.pid()).unwrap();
        assert_eq!(cgroup.pids().unwrap(), [sleep.pid()]);
        let err = Cgroup::create(&plan).unwrap_err();
        assert!(err.to_string().starts_with("container's cgroup is not empty: 1 process(es)"), "{err}");

        match cgroup.stats().unwrap() {
            Stats::V1(stats) => {
                assert_eq!(stats.memory.limit, 67_108_864);
                assert_eq!((stats.pids.usage, stats.pids.limit), (1, 50));
            }
            Stats::V2(stats) => {
                assert_eq!(stats.memory.limit, 67_108_864);
                assert_eq!((stats.pids.usage, stats.pids.limit), (1, 50));
            }
        }
        assert_eq!(cgroup.oom_kills().unwrap(), 0);

        cgroup.freeze().unwrap();
        assert!(cgroup.frozen().unwrap());
        assert_eq!(Cgroup::open(&cgroup.paths()).unwrap().pids().unwrap(), [sleep.pid()]);
        cgroup.thaw().unwrap();
        assert!(!cgroup.frozen().unwrap());

        cgroup.freeze().unwrap();
        cgroup.kill(libc::SIGKILL).unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(sleep.0.wait().unwrap().signal(), Some(libc::SIGKILL), "frozen processes are killed too");
        cgroup.remove().unwrap();
        cgroup.remove().unwrap();
        assert!(cgroup.paths().values().all(|path| !path.exists()));
        assert!(cgroup.pids().unwrap().is_empty());
        assert_eq!(cgroup.stats().unwrap_err().kind(), Kind::NotFound);
    }));
    let _ = cgroup.kill(libc::SIGKILL);
    let _ = cgroup.remove();
    result.unwrap();
}

#[test]
fn a_limit_that_the_kernel_refuses_names_its_field() {
    let plan = planned("refused", r#"{"cpu":{"cpus":"4095"}}"#);
    let cgroup = Cgroup::create(&plan).unwrap();
    let err = cgroup.apply(&plan).unwrap_err();
    cgroup.remove().unwrap();
    assert!(err.to_string().starts_with("linux.resources.cpu.cpus: write \"4095\" to "), "{err}");
}

#[test]
fn denied_devices_cannot_be_opened() {
    let plan = planned("devices", r#"{"devices":[{"allow":false,"access":"rwm"}]}"#);
    let cgroup = Cgroup::create(&plan).unwrap();
    let applied = cgroup.apply(&plan);
    let script = "read go; head -c1 /dev/null && ! head -c1 /dev/kmsg 2>/dev/null";
    let mut shell = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let attached = cgroup.attach(shell.id() as i32);
    use std::io::Write;
    shell.stdin.take().unwrap().write_all(b"\n").unwrap();
    let status = shell.wait().unwrap();
    let _ = cgroup.kill(libc::SIGKILL);
    cgroup.remove().unwrap();
    applied.unwrap();
    attached.unwrap();
    assert!(status.success(), "/dev/null is allowed and /dev/kmsg is not");
}

#[test]
fn a_v2_device_program_is_loaded_attached_and_obeyed() {
    let Some(v2) = Cgroups::read().unwrap().v2 else { return };
    let dir = v2.mountpoint.join(format!("skiff-test-{}-bpf", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let cgroup = Cgroup::open(&BTreeMap::from([(String::new(), dir)])).unwrap();
    let mut plan = planned("unused", r#"{"devices":[{"allow":false,"access":"rwm"}]}"#);
    plan.dirs.clear();
    plan.writes.clear();
    let applied = cgroup.apply(&plan);
    let script = "read go; head -c1 /dev/null && ! head -c1 /dev/kmsg 2>/dev/null";
    let mut shell = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let attached = cgroup.attach(shell.id() as i32);
    use std::io::Write;
    shell.stdin.take().unwrap().write_all(b"\n").unwrap();
    let status = shell.wait().unwrap();
    cgroup.remove().unwrap();
    applied.unwrap();
    attached.unwrap();
    assert!(status.success(), "/dev/null is allowed and /dev/kmsg is not");
}
