//! The shim's log, as containerd reads it. The Go shim's stops the shim when nobody reads it, and tells other things:
//! these tests are skiff's own.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use containerd_shim_protos::api::WaitRequest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skiff_test_support::{Bundle, eventually};

use crate::daemon::{Daemon, Form, context, is_skiff};

/// Lines of text that logrus would write, as their levels and messages.
fn lines(text: &str) -> Vec<(String, String)> {
    let line = |line: &str| {
        let rest = line.strip_prefix("time=\"").and_then(|rest| rest.split_once("\" level="));
        let (time, rest) = rest.unwrap_or_else(|| panic!("{line:?} is no line of a log"));
        assert!(time.contains('T') && time.ends_with('Z'), "{line}");
        let (level, rest) = rest.split_once(" msg=\"").unwrap_or_else(|| panic!("{line:?} has no message"));
        let (message, rest) = rest.rsplit_once("\" runtime=").unwrap_or_else(|| panic!("{line:?} names no runtime"));
        assert_eq!(rest, "io.containerd.skiff.v2");
        (level.to_string(), message.to_string())
    };
    text.lines().map(line).collect()
}

/// What SIGUSR1 makes the shim log, up to where `last` is in it.
fn described(daemon: &Daemon, last: &str) -> Vec<(String, String)> {
    kill(Pid::from_raw(daemon.pid()), Signal::SIGUSR1).unwrap();
    let mut text = String::new();
    eventually(&format!("{last} is logged"), || {
        text += &daemon.logged();
        text.contains(last) && text.ends_with('\n')
    });
    lines(&text)
}

#[test]
fn a_signal_makes_it_tell_what_it_holds() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::start(&["sleep", "1000"]);
    let other = daemon.member(&["sleep", "1000"]);
    for container in [&*daemon, &other] {
        container.create().unwrap();
    }
    daemon.begin("").unwrap();
    daemon.exec("one", &["sleep", "1000"]).unwrap();
    daemon.begin("one").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let request = WaitRequest { id: daemon.id.clone(), exec_id: "one".into(), ..Default::default() };
            assert_eq!(daemon.connect().wait(context(), &request).unwrap().exit_status, 137);
        });
        let waits = format!(": Wait {}/one", daemon.id);
        let mut told = Vec::new();
        eventually("it tells what is pending", || {
            told = described(&daemon, &other.id);
            told.iter()
                .any(|(level, line)| level == "info" && line.starts_with("pending for") && line.ends_with(&waits))
        });
        for container in [&*daemon, &other] {
            assert!(told.iter().any(|(_, line)| line.contains(&format!("container {} pid", container.id))), "{told:?}");
        }
        daemon.kill("one", 9, false).unwrap();
    });
    // A client that has given its Wait up leaves none behind.
    let request = WaitRequest { id: daemon.id.clone(), ..Default::default() };
    daemon.socket().write_all(&crate::daemon::frame(1, "Wait", &request)).unwrap();
    eventually("nobody waits any more", || {
        !described(&daemon, &other.id).iter().any(|(_, line)| line.contains(&format!("Wait {}", daemon.id)))
    });
    other.kill("", 9, false).unwrap();
    other.wait("").unwrap();
    other.delete("").unwrap();
    daemon.finish();
    daemon.end();
}

fn life(daemon: &Daemon) {
    daemon.create().unwrap();
    daemon.begin("").unwrap();
    daemon.finish();
}

#[test]
fn requests_are_told_only_for_debugging() {
    if !is_skiff() {
        return;
    }
    for debug in [false, true] {
        let daemon = Daemon::launch(Bundle::new(&["sleep", "1000"]), &Form::Options(None), debug);
        life(&daemon);
        let told = lines(&daemon.logged());
        let create = format!("Create {}: answered after", daemon.id);
        assert_eq!(told.iter().any(|(level, line)| level == "debug" && line.starts_with(&create)), debug, "{told:?}");
        assert!(debug || told.is_empty(), "nothing is worth a word: {told:?}");
        daemon.end();
    }
}

/// A hook's failure after the end is nobody's error: only the log tells of it.
#[test]
fn what_a_child_finds_is_told() {
    if !is_skiff() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.spec["hooks"] = serde_json::json!({"poststop": [{"path": "/bin/false"}]});
    let daemon = Daemon::with(bundle);
    life(&daemon);
    let told = lines(&daemon.logged());
    assert!(told.iter().any(|(level, line)| level == "warning" && line.contains("poststop hook #0")), "{told:?}");
    daemon.end();
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    if !is_skiff() {
        return;
    }
    let daemon = Daemon::launch(Bundle::new(&["sleep", "1000"]), &Form::Options(None), true);
    let path = daemon.home().join("log");
    let mut full = std::fs::File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    // Until not one byte more fits.
    while full.write(&[b'x'; 4096]).is_ok() {}
    while full.write(b"x").is_ok() {}
    for _ in 0..3 {
        kill(Pid::from_raw(daemon.pid()), Signal::SIGUSR1).unwrap();
        life(&daemon);
    }
    let mut fill = Vec::new();
    let mut reader = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let _ = reader.read_to_end(&mut fill);
    assert!(fill.iter().all(|byte| *byte == b'x'), "a line that does not fit is lost as a whole");
    drop((full, reader));
    life(&daemon);
    assert!(!lines(&daemon.logged()).is_empty(), "it goes on when somebody reads again");
    // Nobody has it open any more but the shim.
    let daemon = daemon.without_log();
    for _ in 0..3 {
        kill(Pid::from_raw(daemon.pid()), Signal::SIGUSR1).unwrap();
        life(&daemon);
    }
    daemon.end();
}
