//! The leak check that ends every black-box test: what a test has used is back to what it was.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// What there was when a test began, of what carries the test's mark (an id or a directory).
#[derive(Debug)]
pub struct LeakCheck {
    marks: Vec<String>,
}

impl LeakCheck {
    /// For everything whose name has one of these in it.
    pub fn new(marks: &[&str]) -> LeakCheck {
        let check = LeakCheck { marks: marks.iter().map(ToString::to_string).collect() };
        assert!(marks.iter().all(|mark| mark.len() > 4), "a mark must be telling");
        check
    }

    /// Mounts, cgroups, processes, state directories and sockets with a mark in their name.
    fn found(&self) -> BTreeSet<String> {
        let mut out = BTreeSet::new();
        let marked = |text: &str| self.marks.iter().any(|mark| text.contains(mark.as_str()));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        out.extend(mounts.lines().filter(|line| marked(line)).map(|line| format!("mount {line}")));
        directories(Path::new("/sys/fs/cgroup"), 6, &mut |path| {
            if marked(path) {
                out.insert(format!("cgroup {path}"));
            }
        });
        for root in ["/run/skiff", "/run/runc", "/run/containerd/runc", "/run/containerd/s"] {
            directories(Path::new(root), 3, &mut |path| {
                if marked(path) {
                    out.insert(format!("state {path}"));
                }
            });
        }
        for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            if pid == std::process::id() {
                continue;
            }
            let read = |file: &str| {
                let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            if marked(&read("cmdline")) || marked(&read("cgroup")) {
                out.insert(format!("process {pid} {}", read("cmdline")));
            }
        }
        out
    }

    /// Nothing is left.
    ///
    /// # Panics
    /// When something still is after ten seconds.
    #[track_caller]
    pub fn end(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let found = self.found();
            if found.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {found:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn directories(dir: &Path, depth: u32, each: &mut impl FnMut(&str)) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        each(&path.to_string_lossy());
        if depth > 0 {
            directories(&path, depth - 1, each);
        }
    }
}
