//! Containers in units of systemd. These need systemd as PID 1 and cgroup v2: they are ignored unless asked for.

use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::ttrpc::context::with_timeout;
use serde_json::json;
use skiff_test_support::unique;

use super::*;
use crate::daemon::{Form, Task};

fn property(unit: &str, name: &str) -> String {
    let output = Command::new("systemctl").args(["show", "--value", "-p", name, unit]).output().expect("systemctl");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

/// With limits, in the unit `shim-ID.scope`.
fn limited(args: &[&str], id: &str) -> Bundle {
    let mut bundle = Bundle::new(args);
    bundle.spec["linux"]["cgroupsPath"] = json!(format!("skifftest-shim.slice:shim:{id}"));
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20, "swap": 64 << 20});
    bundle.spec["linux"]["resources"]["pids"] = json!({"limit": 20});
    bundle
}

impl Daemon {
    fn systemd(args: &[&str]) -> Daemon {
        let id = unique("rawtest");
        Daemon::launch_as(limited(args, &id), id, &Form::Options(None), false, &[])
    }

    fn unit(&self) -> String {
        format!("shim-{}.scope", self.id)
    }

    fn create_in_unit(&self) -> ttrpc::Result<u32> {
        create_in_unit(&self.client, &self.id, self.bundle.path())
    }

    fn group(&self) -> PathBuf {
        PathBuf::from(format!("/sys/fs/cgroup/skifftest.slice/skifftest-shim.slice/{}", self.unit()))
    }

    fn stats(&self) -> Metrics {
        let answer = self.client.stats(context(), &StatsRequest { id: self.id.clone(), ..Default::default() });
        let stats = answer.expect("stats").stats;
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        Metrics::parse_from_bytes(&stats.value).expect("metrics")
    }

    fn files(&self) -> Vec<String> {
        let connected = self.client.connect(context(), &ConnectRequest { id: self.id.clone(), ..Default::default() });
        let shim = connected.expect("it answers").shim_pid;
        let fds = std::fs::read_dir(format!("/proc/{shim}/fd")).expect("a shim").flatten();
        fds.filter_map(|fd| Some(std::fs::read_link(fd.path()).ok()?.display().to_string())).collect()
    }

    fn finish(self) {
        self.kill("", 9, false).expect("killed");
        assert_eq!(self.wait("").expect("an exit"), 137);
        self.delete("").expect("deleted");
        assert_eq!(property(&self.unit(), "LoadState"), "not-found");
        self.end();
    }
}

fn create_in_unit(client: &Task, id: &str, bundle: &Path) -> ttrpc::Result<u32> {
    let options = Options { systemd_cgroup: true, ..Options::default() };
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: options.write_to_bytes().expect("options"),
        ..Any::default()
    };
    let request = CreateTaskRequest {
        id: id.into(),
        bundle: bundle.display().to_string(),
        options: MessageField::some(options),
        ..CreateTaskRequest::default()
    };
    // Longer than the shim waits for systemd.
    client.create(with_timeout(60_000_000_000), &request).map(|response| response.pid)
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_life_in_a_unit() {
    let daemon = Daemon::systemd(&["sleep", "1000"]);
    let pid = daemon.create_in_unit().unwrap();
    assert_eq!(property(&daemon.unit(), "ActiveState"), "active");
    let read = |path: PathBuf| std::fs::read_to_string(path).expect("a file of a cgroup").trim().to_string();
    assert_eq!(read(daemon.group().join("cgroup.procs")), pid.to_string());
    daemon.begin("").unwrap();
    daemon.exec("one", &["sh", "-c", "exit 3"]).unwrap();
    daemon.begin("one").unwrap();
    assert_eq!(daemon.wait("one").unwrap(), 3);
    daemon.delete("one").unwrap();
    let resources = Any { value: br#"{"pids":{"limit":55}}"#.to_vec(), ..Any::default() };
    let request =
        UpdateTaskRequest { id: daemon.id.clone(), resources: MessageField::some(resources), ..Default::default() };
    daemon.client.update(context(), &request).unwrap();
    assert_eq!(read(daemon.group().join("pids.max")), "55");
    assert_eq!(property(&daemon.unit(), "TasksMax"), "55");
    // The process that has kept the unit until the init was in it counts until it has been reaped.
    skiff_test_support::eventually("the init is alone", || daemon.stats().pids.current == 1);
    let stats = daemon.stats();
    assert_eq!((stats.pids.current, stats.pids.limit, stats.memory.usage_limit), (1, 55, 64 << 20));
    assert!(stats.memory.usage > 0 && stats.memory.max_usage >= stats.memory.usage, "{stats:?}");
    assert!(stats.cpu.usage_usec > 0);
    for psi in [&stats.cpu.psi, &stats.memory.psi, &stats.io.psi] {
        assert!(psi.some.is_some() && psi.full.is_some(), "{stats:?}");
    }
    let request = PauseRequest { id: daemon.id.clone(), ..Default::default() };
    daemon.client.pause(context(), &request).unwrap();
    assert_eq!(daemon.status(""), Status::PAUSED);
    daemon.client.resume(context(), &ResumeRequest { id: daemon.id.clone(), ..Default::default() }).unwrap();
    daemon.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_child_that_is_killed_for_memory_is_counted_and_the_unit_goes_on() {
    let daemon = Daemon::systemd(&["sleep", "1000"]);
    daemon.create_in_unit().unwrap();
    daemon.begin("").unwrap();
    daemon.exec("hog", &["tail", "/dev/zero"]).unwrap();
    daemon.begin("hog").unwrap();
    assert_eq!(daemon.wait("hog").unwrap(), 137);
    daemon.delete("hog").unwrap();
    let events = daemon.stats().memory_events;
    assert!(events.oom_kill >= 1 && events.max >= 1, "{events:?}");
    assert_eq!(daemon.status(""), Status::RUNNING);
    assert_eq!(property(&daemon.unit(), "ActiveState"), "active");
    assert!(!daemon.files().iter().any(|file| file.contains("inotify")), "no instance of inotify: they are few");
    daemon.finish();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_failed_create_leaves_no_unit() {
    let daemon = Daemon::systemd(&["no-such-program"]);
    let error = daemon.create_in_unit().unwrap_err().to_string();
    assert!(error.contains("executable file not found"), "{error}");
    let unit = daemon.unit();
    eventually("the unit is gone", || property(&unit, "LoadState") == "not-found");
    daemon.end();
}

#[test]
#[ignore = "needs systemd as PID 1"]
fn a_systemd_that_does_not_answer_holds_up_its_own_container_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("bus");
    let _silent = UnixListener::bind(&socket).expect("a socket");
    let address = format!("unix:path={}", socket.display());
    let environment = [("DBUS_SYSTEM_BUS_ADDRESS", address.as_str())];
    let daemon = Daemon::launch_as(
        Bundle::new(&["sleep", "1000"]),
        unique("rawtest"),
        &Form::Options(None),
        false,
        &environment,
    );
    daemon.create().unwrap();
    let other = unique("rawtest");
    let bundle = limited(&["sleep", "1000"], &other);
    bundle.write();
    let waiting = {
        let (client, id, path) = (daemon.connect(), other, bundle.path().to_path_buf());
        std::thread::spawn(move || create_in_unit(&client, &id, &path))
    };
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    daemon.begin("").unwrap();
    daemon.exec("one", &["true"]).unwrap();
    daemon.begin("one").unwrap();
    assert_eq!(daemon.wait("one").unwrap(), 0);
    daemon.stats();
    daemon.kill("", 9, false).unwrap();
    assert_eq!(daemon.wait("").unwrap(), 137);
    daemon.delete("").unwrap();
    assert!(!waiting.is_finished(), "it still waits for systemd: {:?} on", began.elapsed());
    let error = waiting.join().expect("a thread").unwrap_err().to_string();
    assert!(error.contains("of systemd: wait for systemd: it does not answer"), "{error}");
    daemon.end();
}
