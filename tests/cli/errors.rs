//! Bad input: one clear error, and nothing left behind.

use serde_json::json;

use super::{Case, is_skiff};

/// Creates with a changed spec, which must fail; skiff's error must contain `want`.
#[track_caller]
fn refused(want: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let case = Case::new(&["true"]).with(change);
    let done = case.detached(&["create", &case.id]).failed();
    if is_skiff() {
        assert!(done.err.contains(want), "{want} in {}", done.err);
        assert_eq!(done.err.trim_end().lines().count(), 1, "one line: {}", done.err);
    }
    case.end();
}

#[test]
fn a_missing_program_fails_the_create() {
    refused("exec: \\\"nope\\\": executable file not found in $PATH", |spec| spec["process"]["args"] = json!(["nope"]));
    refused("exec: \\\"/nope\\\": no such file or directory", |spec| spec["process"]["args"] = json!(["/nope"]));
}

#[test]
fn wrong_types_and_missing_fields_are_named() {
    refused("process.args", |spec| spec["process"]["args"] = json!("sh"));
    refused("process.args", |spec| spec["process"]["args"] = json!([]));
    refused("process.cwd", |spec| spec["process"]["cwd"] = json!("relative"));
    refused("process", |spec| {
        spec.as_object_mut().unwrap().remove("process");
    });
    refused("root", |spec| {
        spec.as_object_mut().unwrap().remove("root");
    });
    refused("linux.namespaces[5].type", |spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "moon"}));
    });
    refused("linux.sysctl.kernel.core_pattern", |spec| {
        spec["linux"]["sysctl"] = json!({"kernel.core_pattern": "x"});
    });
    refused("mounts[7].source", |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/a", "type": "bind", "source": "/no/such/dir", "options": ["bind"]}));
    });
    refused("root.path", |spec| spec["root"]["path"] = json!("no-such-rootfs"));
}

#[test]
fn a_file_system_that_refuses_an_option_says_which() {
    refused("mounts[7]: mount tmpfs at \\\"/tmp\\\": option \\\"moon=1\\\"", |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "x", "options": ["moon=1"]}));
    });
}

#[test]
fn broken_json_is_said_to_be() {
    let case = Case::new(&["true"]);
    std::fs::write(case.bundle.path().join("config.json"), "{\"ociVersion\": ").unwrap();
    let done = case.detached(&["create", &case.id]).failed();
    assert!(!is_skiff() || done.err.contains("config.json: ociVersion: EOF while parsing"), "{}", done.err);
    std::fs::remove_file(case.bundle.path().join("config.json")).unwrap();
    let done = case.detached(&["create", &case.id]).failed();
    assert!(done.err.contains("config.json"), "{}", done.err);
    case.end();
}

#[test]
fn a_bundle_that_is_not_there_is_named() {
    let case = Case::new(&["true"]);
    let done = case.detached(&["create", "--bundle", "/no/such/bundle", &case.id]).failed();
    assert!(done.err.contains("/no/such/bundle"), "{}", done.err);
    case.end();
}

#[test]
fn unknown_ids_do_not_exist() {
    let case = Case::new(&["true"]);
    for command in ["state", "start", "kill", "delete", "ps", "pause", "resume"] {
        let done = case.cmd(&[command, &case.id]).failed();
        assert!(done.err.contains("container does not exist"), "{command}: {}", done.err);
    }
    for id in ["../x", "a/b", ".."] {
        case.detached(&["create", id]).failed();
        case.cmd(&["delete", id]).failed();
    }
    case.end();
}

#[test]
fn the_json_log_has_the_error() {
    let case = Case::new(&["nope"]);
    let log = case.bundle.path().join("log.json");
    let flags = ["--log", log.to_str().unwrap(), "--log-format", "json", "create", &case.id];
    case.detached(&flags).failed();
    let text = std::fs::read_to_string(&log).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(last["msg"].as_str().unwrap().contains("executable file not found in $PATH"), "{last}");
    case.end();
}

#[test]
fn signals_that_do_not_exist_are_refused() {
    let case = Case::new(&["sleep", "100"]);
    case.detached(&["run", "-d", &case.id]).ok();
    let done = case.cmd(&["kill", &case.id, "MOON"]).failed();
    assert!(done.err.contains("unknown signal"), "{}", done.err);
    case.cmd(&["delete", "--force", &case.id]).ok();
    case.end();
}

#[test]
fn a_failed_execve_is_told_on_the_containers_stderr_too() {
    let case = Case::new(&["/run.sh"]);
    let script = case.bundle.rootfs().join("run.sh");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let done = case.run().failed();
    assert_eq!(done.err.lines().next(), Some("exec /run.sh: no such file or directory"), "{done:?}");
    case.end();
}

#[test]
fn debug_lines_tell_the_steps() {
    if !is_skiff() {
        return;
    }
    let case = Case::new(&["true"]);
    let err = case.cmd(&["--debug", "run", &case.id]).ok().err;
    assert!(err.contains("level=debug") && err.contains("init: closing the pipe"), "{err}");
    let done = case.cmd(&["nonsense", "-h"]).failed();
    assert!(done.err.contains("No help topic for 'nonsense'"), "{done:?}");
    case.end();
}
