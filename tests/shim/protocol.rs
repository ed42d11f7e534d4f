//! The shim's own command line, as containerd calls it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use skiff_test_support::{eventually, unique};

fn shim() -> Command {
    Command::new(env!("CARGO_BIN_EXE_containerd-shim-skiff-v2"))
}

/// `start` in a bundle, as containerd runs it: stdout and stderr are one stream.
fn start(bundle: &Path, id: &str) -> (bool, String) {
    let script = "exec \"$0\" -namespace test -address \"$1\" -publish-binary /bin/true -id \"$2\" start 2>&1";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_containerd-shim-skiff-v2")])
        .arg(bundle.join("none.sock"))
        .arg(id)
        .current_dir(bundle)
        .env_remove("TTRPC_ADDRESS")
        .stdin(Stdio::null())
        .output()
        .expect("the shim starts");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

fn delete(bundle: &Path, id: &str) -> Vec<u8> {
    let output = shim()
        .args(["-namespace", "test", "-address", "/none", "-publish-binary", "/bin/true", "-id", id, "-bundle"])
        .arg(bundle)
        .arg("delete")
        .current_dir(bundle)
        .output()
        .expect("the shim runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Ends the daemons of a bundle.
fn stop(bundle: &Path) {
    let line = format!("{}/none.sock", bundle.display());
    eventually("the daemons end", || {
        let _ = Command::new("pkill").args(["-TERM", "-f", &line]).status();
        !Command::new("pgrep").args(["-f", &line]).stdout(Stdio::null()).status().expect("pgrep").success()
    });
}

#[test]
fn version_and_info_need_nothing() {
    let output = shim().arg("-v").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains(env!("CARGO_PKG_VERSION")));
    let output = shim().arg("-info").stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(text.contains("io.containerd.skiff.v2") && text.contains("\"rro\""), "{text}");
}

#[test]
fn start_answers_with_the_address_alone() {
    let bundle = tempfile::tempdir().unwrap();
    let id = unique("start");
    std::fs::write(bundle.path().join("config.json"), "{}").unwrap();
    let (ok, reply) = start(bundle.path(), &id);
    assert!(ok, "{reply}");
    let socket = Path::new(reply.strip_prefix("unix://").expect("an address and nothing else"));
    assert_eq!(std::fs::read_to_string(bundle.path().join("address")).unwrap(), reply);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(socket), 0o600);
    assert_eq!(mode(socket.parent().unwrap()), 0o700);
    std::os::unix::net::UnixStream::connect(socket).expect("it listens");
    let again = start(bundle.path(), &id);
    assert_eq!(again, (true, reply.clone()), "the daemon is found");
    stop(bundle.path());
    eventually("the socket is gone", || !socket.exists());
}

#[test]
fn start_says_what_is_wrong_with_its_input() {
    let bundle = tempfile::tempdir().unwrap();
    std::fs::write(bundle.path().join("config.json"), "{").unwrap();
    let (ok, reply) = start(bundle.path(), &unique("bad"));
    assert!(!ok && reply.contains("config.json: EOF while parsing"), "{reply}");
    assert!(!start(bundle.path(), "../x").0);
}

#[test]
fn delete_finds_nothing_and_says_137() {
    let bundle = tempfile::tempdir().unwrap();
    let reply = delete(bundle.path(), &unique("gone"));
    // Field 2, exit_status, varint 137; and field 3, a timestamp.
    assert!(reply.windows(3).any(|bytes| bytes == [0x10, 0x89, 0x01]), "{reply:?}");
    assert_eq!(delete(bundle.path(), &unique("gone"))[..3], reply[..3]);
}
