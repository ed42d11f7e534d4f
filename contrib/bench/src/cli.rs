//! The command line: skiff, runc, crun and the floor.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use skiff_test_support::{Bundle, unique};

use crate::{Bench, Contender, milliseconds, program};

fn quietly(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

fn runtime(path: &Path, bundle: &Path, args: &[&str]) {
    quietly(Command::new(path).args(args).current_dir(bundle));
}

/// The runtimes that are here and can run a container; skiff comes first.
fn runtimes(bundle: &Path) -> Vec<(&'static str, PathBuf)> {
    let all = [
        ("skiff", "SKIFF", "target/release/skiff"),
        ("runc", "RUNC", "runc"),
        ("crun", "CRUN", "crun"),
        ("youki", "YOUKI", "youki"),
    ];
    let mut out = Vec::new();
    for (name, variable, default) in all {
        let default = std::fs::canonicalize(default).map_or_else(|_| default.to_string(), |p| p.display().to_string());
        let Some(path) = program(variable, &default) else { continue };
        let mut try_it = Command::new(&path);
        try_it.args(["run", &unique("try")]).current_dir(bundle).stdin(Stdio::null()).stdout(Stdio::null());
        match try_it.stderr(Stdio::null()).status() {
            Ok(status) if status.success() => out.push((name, path)),
            _ => println!("{name} cannot run a container here: left out"),
        }
    }
    assert_eq!(out.first().map(|(name, _)| *name), Some("skiff"), "skiff runs (SKIFF names it)");
    out
}

/// Directories of all v1 hierarchies, or of v2.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let cgroup = |line: &str| line.contains(" - cgroup ") || line.contains(" - cgroup2 ");
    let at = |line: &str| line.split(' ').nth(4).map(PathBuf::from);
    mounts.lines().filter(|line| cgroup(line)).filter_map(at).map(|dir| dir.join(name)).collect()
}

fn bundle(args: &[&str]) -> Bundle {
    let mut bundle = Bundle::new(args);
    // Not every runtime knows the v1 hierarchies of every host.
    bundle.spec["mounts"].as_array_mut().expect("mounts").retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    bundle.write();
    bundle
}

/// `run true`, create+start+delete, exec.
pub fn run(bench: &mut Bench) {
    let bundle = bundle(&["true"]);
    let dir = bundle.path();
    let runtimes = runtimes(dir);
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for (name, path) in &runtimes {
        contenders.push((name, Box::new(|| milliseconds(|| runtime(path, dir, &["run", &unique("bench")])))));
    }
    let floor = program("FLOOR", "target/floor").or_else(|| std::fs::canonicalize("target/floor").ok());
    if let Some(floor) = floor {
        let rootfs = bundle.rootfs();
        contenders.push((
            "floor",
            Box::new(move || {
                let groups = cgroups(&unique("floor"));
                milliseconds(|| quietly(Command::new(&floor).arg(&rootfs).args(&groups)))
            }),
        ));
    }
    bench.compare("run true", "ms", contenders);

    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for (name, path) in &runtimes {
        let cycle = || {
            let id = unique("bench");
            milliseconds(|| {
                for args in [&["create", &id][..], &["start", &id], &["delete", "--force", &id]] {
                    runtime(path, dir, args);
                }
            })
        };
        contenders.push((name, Box::new(cycle)));
    }
    bench.compare("create, start, delete", "ms", contenders);

    let sleeping = self::bundle(&["sleep", "1000"]);
    let ids: Vec<String> = runtimes.iter().map(|_| unique("bench")).collect();
    for ((_, path), id) in runtimes.iter().zip(&ids) {
        runtime(path, sleeping.path(), &["run", "-d", id]);
    }
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for ((name, path), id) in runtimes.iter().zip(&ids) {
        contenders.push((name, Box::new(move || milliseconds(|| runtime(path, dir, &["exec", id, "true"])))));
    }
    bench.compare("exec true", "ms", contenders);
    for ((_, path), id) in runtimes.iter().zip(&ids) {
        runtime(path, sleeping.path(), &["delete", "--force", id]);
    }
}

/// What the cost of `run true` depends on.
pub fn growth(bench: &mut Bench) {
    let plain = bundle(&["true"]);
    let runtimes = runtimes(plain.path());
    let mut profile = bundle(&["true"]);
    let names: Vec<String> = std::fs::read_to_string("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.strip_prefix("#define __NR_")?.split(' ').next().map(str::to_string))
        .take(300)
        .collect();
    profile.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}]});
    profile.write();
    let mut mounts = bundle(&["true"]);
    for at in 0..200 {
        let mount = json!({"destination": format!("/tmp/m{at}"), "type": "tmpfs", "source": "tmpfs"});
        mounts.spec["mounts"].as_array_mut().expect("mounts").push(mount);
    }
    mounts.spec["root"]["readonly"] = json!(false);
    mounts.write();
    let mut environment = bundle(&["true"]);
    let variables: Vec<String> = (0..10).map(|at| format!("V{at}={}", "x".repeat(100_000))).collect();
    environment.spec["process"]["env"].as_array_mut().expect("env").extend(variables.into_iter().map(Into::into));
    environment.write();
    for (what, bundle) in [
        ("run true with a seccomp profile of 300 calls", &profile),
        ("run true with 200 mounts in the spec", &mounts),
        ("run true with an environment of 1 MiB", &environment),
    ] {
        let mut contenders: Vec<Contender<'_>> = Vec::new();
        for (name, path) in &runtimes {
            let run = || milliseconds(|| runtime(path, bundle.path(), &["run", &unique("bench")]));
            contenders.push((name, Box::new(run)));
        }
        bench.compare_rounds(what, "ms", bench.rounds.min(9), contenders);
    }
    let skiff = &runtimes[0].1;
    let among = |count: usize| {
        let script = format!(
            "mkdir -p \"$3\" && mount -t tmpfs tmpfs \"$3\" && i=0; while [ $i -lt {count} ]; do mkdir \"$3/$i\"; \
             mount --bind \"$3\" \"$3/$i\" --make-private || exit 1; i=$((i+1)); done; cd \"$2\"; \
             for n in 1 2 3 4 5 6 7 8 9; do s=$(date +%s%N); \"$1\" run \"$4-$n\" || exit 1; e=$(date +%s%N); \
             echo $((e-s)); done"
        );
        let dir = tempfile::tempdir().expect("a temporary directory");
        let output = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script, "sh"])
            .args([skiff.as_path(), plain.path(), &dir.path().join("mounts")])
            .arg(unique("bench"))
            .output()
            .expect("unshare");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        let mut times: Vec<f64> = text.lines().filter_map(|line| line.parse::<f64>().ok()).map(|ns| ns / 1e6).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let contenders: Vec<Contender<'_>> = vec![
        ("at 1000", Box::new(|| among(1000))),
        ("at 20", Box::new(|| among(20))),
        ("at 250", Box::new(|| among(250))),
    ];
    bench.compare_rounds("skiff's run true by mounts of the host (medians of 9)", "ms", 3, contenders);
}
