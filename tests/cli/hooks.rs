//! Hooks: where they run, with what, and for how long. Their order and what a failure does: lifecycle.

use serde_json::{Value, json};

use super::{Case, is_skiff, refused};

const KINDS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

fn hook(script: &str) -> Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
}

#[test]
fn every_hook_runs_in_its_namespaces_with_its_state() {
    let case = Case::new(&["true"]);
    let log = case.bundle.path().join("log");
    let log = log.display();
    // The container's own is on a tmpfs of the bundle, seen from inside at /log.
    let script = |kind: &str, file: &str| {
        format!("echo {kind} $(readlink /proc/self/ns/mnt) $(readlink /proc/self/ns/pid) $(cat) >>{file}")
    };
    std::fs::write(case.bundle.path().join("log"), "").unwrap();
    let case = case.with(|spec| {
        add_log(spec, &log.to_string());
        for kind in KINDS {
            let file = if kind == "startContainer" { "/log".to_string() } else { log.to_string() };
            spec["hooks"][kind] = hook(&script(kind, &file));
        }
    });
    case.run().ok();
    let text = std::fs::read_to_string(case.bundle.path().join("log")).unwrap();
    let ns = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string();
    let mut kinds = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.splitn(4, ' ').collect();
        let [kind, mnt, pid, state] = fields[..] else { panic!("{line}") };
        kinds.push(kind);
        let outside = !matches!(kind, "createContainer" | "startContainer");
        assert_eq!((mnt == ns("mnt"), pid == ns("pid")), (outside, outside), "{line}");
        let state: Value = serde_json::from_str(state).unwrap_or_else(|e| panic!("{e}: {line}"));
        let want = match kind {
            "prestart" | "createRuntime" | "createContainer" => "creating",
            "startContainer" => "created",
            "poststart" => "running",
            _ => "stopped",
        };
        if is_skiff() {
            assert_eq!(state["status"], want, "{line}");
            assert_eq!(state["ociVersion"], "1.3.0");
        }
        assert_eq!((&state["id"], state["bundle"].as_str()), (&json!(case.id), case.bundle.path().to_str()));
        match kind {
            "createContainer" | "startContainer" => {}
            "poststop" => assert!(state["pid"].as_i64().unwrap_or(0) == 0, "{line}"),
            _ => assert!(state["pid"].as_i64().unwrap() > 1, "{line}"),
        }
    }
    // runc has had poststart in the create before 1.5.
    let order: Vec<&str> = kinds.iter().copied().filter(|kind| is_skiff() || *kind != "poststart").collect();
    let want: Vec<&str> = KINDS.into_iter().filter(|kind| is_skiff() || *kind != "poststart").collect();
    assert_eq!(order, want, "{text}");
    case.end();
}

fn add_log(spec: &mut Value, source: &str) {
    let mount = json!({"destination": "/log", "type": "bind", "source": source, "options": ["bind"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn a_hook_has_its_own_arguments_and_environment() {
    let case = Case::new(&["true"]);
    let out = case.bundle.path().join("out-of-hook");
    let script = format!("echo \"$0 $1\" >>{0}; busybox env | sort >>{0}", out.display());
    let case = case.with(|spec| {
        spec["hooks"]["createRuntime"] = json!([
            {"path": "/bin/busybox", "args": ["sh", "-c", script, "zero", "one"], "env": ["A=b", "PATH=/bin"]},
        ]);
    });
    case.run().ok();
    let text = std::fs::read_to_string(&out).unwrap();
    assert!(text.starts_with("zero one\nA=b\nPATH=/bin\n"), "{text}");
    case.end();
}

/// A hook that names no environment has that of who starts it: the runtime, or the container's process. One that runs the
/// host's programs on behalf of the container has none, as LD_PRELOAD of an image would be theirs (CVE-2025-23266).
#[test]
fn a_hook_without_an_environment_inherits_one() {
    let case = Case::new(&["true"]);
    let log = case.bundle.path().join("log");
    std::fs::write(&log, "").unwrap();
    let log = log.display().to_string();
    let case = case.with(|spec| {
        add_log(spec, &log);
        spec["process"]["env"].as_array_mut().unwrap().push(json!("OF_THE_CONTAINER=1"));
        for kind in KINDS {
            let file = if kind == "startContainer" { "/log" } else { &log };
            let hook = |what: &str| {
                let script =
                    format!("echo {kind} {what} \"$OF_THE_CALLER\" \"$OF_THE_CONTAINER\" \"${{HOME-}}\" >>{file}");
                json!({"path": "/bin/sh", "args": ["sh", "-c", script]})
            };
            let mut empty = hook("empty");
            empty["env"] = json!([]);
            spec["hooks"][kind] = json!([hook("absent"), empty]);
        }
    });
    let mut run = case.command(&["run", &case.id]);
    skiff_test_support::run(run.env("OF_THE_CALLER", "2").env("HOME", "/home/caller"), "").ok();
    let text = std::fs::read_to_string(&log).unwrap();
    for kind in KINDS {
        let of = |what: &str| {
            let start = format!("{kind} {what} ");
            text.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("{start}: {text}"))
        };
        let want = match kind {
            // runc before 1.3 gives it that of the image.
            "createContainer" if !is_skiff() => continue,
            "createContainer" => "  ",
            "startContainer" => " 1 /root",
            _ => "2  /home/caller",
        };
        assert_eq!((of("absent"), of("empty")), (want, "  "), "{kind}");
    }
    case.end();
}

#[test]
fn a_hook_past_its_time_is_killed() {
    for kind in ["createRuntime", "createContainer", "startContainer"] {
        let err = refused(|spec| {
            // busybox has a sleep in the container, too.
            spec["hooks"][kind] = json!([{"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}]);
        });
        assert!(err.contains("hook ran past specified timeout of 1.0s"), "{kind}: {err}");
        assert!(!is_skiff() || err.contains(&format!("error running {kind} hook #0: ")), "{kind}: {err}");
    }
}

#[test]
fn hooks_that_cannot_be_are_named() {
    if !is_skiff() {
        return;
    }
    for (hook, want) in [
        (json!({"path": "bin/true"}), "hooks.createRuntime[0].path: must be an absolute path"),
        (json!({"path": "/bin/true", "timeout": 0}), "hooks.createRuntime[0].timeout: must be greater than zero"),
        (json!({"path": "/bin/true", "args": "x"}), "hooks.createRuntime[0].args: invalid type"),
        (json!({"args": ["x"]}), "missing field `path`"),
        (
            json!({"path": "/no/such/hook"}),
            "error running createRuntime hook #0: start \\\"/no/such/hook\\\": no such file",
        ),
    ] {
        let err = refused(|spec| spec["hooks"]["createRuntime"] = json!([hook]));
        assert!(err.contains(want), "{hook}: {err}");
    }
}

#[test]
fn a_failed_poststart_stops_the_container_and_a_failed_poststop_does_not_matter() {
    let case = Case::new(&["sleep", "100"]).with(|spec| spec["hooks"]["poststart"] = hook("exit 3"));
    let done = case.detached(&["run", "-d", &case.id]).failed();
    assert!(done.err.contains("hook #0") && done.err.contains("exit status 3"), "{}", done.err);
    case.end();
    let case = Case::new(&["true"]).with(|spec| spec["hooks"]["poststop"] = hook("exit 3"));
    case.run().ok();
    case.end();
}

/// What has begun ends with its poststop hooks, also when it fails on its way (runtime spec, runtime.md, "Lifecycle").
#[test]
fn poststop_follows_what_has_failed() {
    for what in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "a mount"] {
        // runc leaves this one for a delete.
        if what == "startContainer" && !is_skiff() {
            continue;
        }
        let case = Case::new(&["sleep", "100"]);
        let log = case.bundle.path().join("log");
        let case = case.with(|spec| {
            spec["hooks"]["poststop"] = hook(&format!("cat >>{}", log.display()));
            match what {
                "a mount" => add_log(spec, "/no/such/file"),
                kind => spec["hooks"][kind] = hook("exit 3"),
            }
        });
        let created = case.detached(&["create", &case.id]);
        // runc has had poststart in the create before 1.5.
        if matches!(what, "startContainer" | "poststart") && is_skiff() {
            created.ok();
            case.cmd(&["start", &case.id]).failed();
        } else {
            created.failed();
        }
        case.cmd(&["state", &case.id]).failed();
        let text = std::fs::read_to_string(&log).unwrap_or_else(|err| panic!("{what}: {err}"));
        let state: Value = serde_json::from_str(&text).unwrap_or_else(|err| panic!("{what}: {err}: {text}"));
        assert_eq!((&state["id"], &state["status"]), (&json!(case.id), &json!("stopped")), "{what}");
        case.end();
    }
}
