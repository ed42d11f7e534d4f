//! Groups of the resctrl file system: cache and memory bandwidth for a container, and monitoring (Linux,
//! Documentation/filesystems/resctrl.rst). Does not live here: what to write (plan::rdt).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::plan::rdt::Rdt;
use crate::{Error, Kind, Result};

const FIELD: &str = "linux.intelRdt";

/// A container's group. Its directories are removed when they are the container's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Directory of the group, which may be the root's.
    path: PathBuf,
    /// Made for this container.
    made: bool,
    /// Directory of the monitoring group below it.
    monitor: Option<PathBuf>,
    /// That was there before the container.
    #[serde(default)]
    foreign_monitor: bool,
}

/// Where the file system is mounted.
pub fn root() -> Option<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").ok()?;
    root_in(&mountinfo)
}

fn root_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let at = mount.split(' ').nth(4).filter(|_| filesystem.starts_with("resctrl "))?;
        Some(crate::host::unescape(at).into())
    })
}

impl Group {
    /// Makes what the plan has for container `id`, or finds it. On an error nothing that it made stays.
    pub fn make(plan: &Rdt, id: &str) -> Result<Group> {
        let root = root().ok_or_else(|| {
            let cause = "the resctrl file system is not mounted (mount -t resctrl resctrl /sys/fs/resctrl, on a \
                         processor and a kernel that have it)";
            Error::invalid(FIELD, cause).with_kind(Kind::Unsupported)
        })?;
        Group::make_below(&root, plan, id)
    }

    fn make_below(root: &Path, plan: &Rdt, id: &str) -> Result<Group> {
        let path = match plan.named.as_deref() {
            Some("/") => root.to_path_buf(),
            Some(name) => root.join(name),
            None => root.join(id),
        };
        if plan.named.is_some() && plan.schemata.is_empty() && !path.is_dir() {
            let cause = format!("group {path:?} does not exist, and without a schema it is not made");
            return Err(Error::invalid(format!("{FIELD}.closID"), cause));
        }
        let made = make(root, "group", &path)?;
        let group = Group { path, made, monitor: None, foreign_monitor: false };
        // Others may be in one that was there, whatever its name.
        let set = if made { group.set(&plan.schemata) } else { group.compare(&plan.schemata) };
        let done = set.and_then(|()| if plan.monitored { group.clone().monitor(root, id) } else { Ok(group.clone()) });
        done.inspect_err(|_| {
            let _ = group.remove();
        })
    }

    fn monitor(mut self, root: &Path, id: &str) -> Result<Group> {
        let path = self.path.join("mon_groups").join(id);
        self.foreign_monitor = !make(root, "monitoring group", &path)?;
        self.monitor = Some(path);
        Ok(self)
    }

    /// Directory of the group.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Directory of the monitoring group.
    pub fn monitor_path(&self) -> Option<&Path> {
        self.monitor.as_deref()
    }

    /// Files by which a task enters: it writes `0`, or somebody its id. In their order.
    pub fn doors(&self) -> Vec<PathBuf> {
        [Some(&self.path), self.monitor.as_ref()].into_iter().flatten().map(|dir| dir.join("tasks")).collect()
    }

    /// Writes lines to the schemata; the others stay as they are.
    pub fn set(&self, lines: &[String]) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let path = self.path.join("schemata");
        let text = lines.join("\n") + "\n";
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|e| failed(self.path.parent().unwrap_or(&self.path), format!("write {lines:?} to {path:?}"), &e))
    }

    /// A group that was there must be what the spec asks for: others may be in it.
    fn compare(&self, lines: &[String]) -> Result<()> {
        let path = self.path.join("schemata");
        let read = || fs::read_to_string(&path).map_err(|e| Error::io(format!("{FIELD}: read {path:?}"), &e));
        if lines.is_empty() {
            return Ok(());
        }
        let text = read()?;
        match lines.iter().find(|line| !matches(&text, line)) {
            Some(line) => {
                let cause = format!("group {:?} exists, and its schemata do not match {line:?}", self.path);
                Err(Error::invalid(FIELD, cause))
            }
            None => Ok(()),
        }
    }

    /// Removes what was made for the container; Ok when it is gone already.
    pub fn remove(&self) -> Result<()> {
        let monitor = self.monitor.as_ref().filter(|_| !self.foreign_monitor);
        let own = self.made.then_some(&self.path);
        for dir in [monitor, own].into_iter().flatten() {
            match fs::remove_dir(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("{FIELD}: remove group {dir:?}"), &e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Makes a directory; false when it is there already.
fn make(root: &Path, what: &str, path: &Path) -> Result<bool> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        Err(e) => Err(failed(root, format!("make {what} {path:?}"), &e)),
    }
}

/// True when `schemata` has every value of `line`, which reads `RESOURCE:DOMAIN=VALUE;DOMAIN=VALUE`.
fn matches(schemata: &str, line: &str) -> bool {
    let values = |list: &str| -> Vec<(String, String)> {
        let pairs = list.split(';').filter_map(|pair| pair.split_once('='));
        // The kernel pads its masks and numbers.
        let plain = |value: &str| value.trim().trim_start_matches("0x").trim_start_matches('0').to_ascii_lowercase();
        pairs.map(|(domain, value)| (domain.trim().to_string(), plain(value))).collect()
    };
    let Some((resource, wanted)) = line.split_once(':') else { return false };
    let there = schemata.lines().filter_map(|line| line.split_once(':'));
    let there: Vec<_> =
        there.filter(|(name, _)| name.trim() == resource.trim()).flat_map(|(_, list)| values(list)).collect();
    values(wanted).iter().all(|value| there.contains(value))
}

/// The kernel tells more than an errno of what it refuses.
fn failed(root: &Path, what: String, err: &std::io::Error) -> Error {
    let said = fs::read_to_string(root.join("info/last_cmd_status")).unwrap_or_default();
    let said = said.trim();
    let what = if said.is_empty() || said == "ok" { what } else { format!("{what}: {said}") };
    Error::io(format!("{FIELD}: {what}"), err)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with what the kernel puts into every group.
    fn group(at: &Path, schemata: &str) {
        fs::create_dir_all(at.join("mon_groups")).unwrap();
        fs::write(at.join("schemata"), schemata).unwrap();
    }

    fn named(name: &str, schemata: &[&str]) -> Rdt {
        Rdt { named: Some(name.into()), schemata: schemata.iter().map(ToString::to_string).collect(), monitored: false }
    }

    #[test]
    fn the_mount_is_found_in_mountinfo() {
        let text = "1 0 0:1 / / rw - ext4 /dev/x rw\n2 1 0:9 / /sys/fs/re\\040s rw - resctrl resctrl rw\n";
        assert_eq!(root_in(text), Some("/sys/fs/re s".into()));
        assert_eq!(root_in("1 0 0:1 / / rw - ext4 /dev/x rw\n"), None);
    }

    #[test]
    fn a_group_by_the_id_goes_with_the_container() {
        let root = tempfile::tempdir().unwrap();
        let made = Group::make_below(root.path(), &Rdt::default(), "id").unwrap();
        assert_eq!(made.doors(), [root.path().join("id/tasks")]);
        assert!(root.path().join("id").is_dir());
        made.remove().unwrap();
        assert!(!root.path().join("id").exists());
        made.remove().unwrap();
    }

    #[test]
    fn a_named_group_that_was_there_stays_and_must_match() {
        let root = tempfile::tempdir().unwrap();
        let gold = root.path().join("gold");
        group(&gold, "    L3:0=00ff;1=0fff\n    MB:0= 100;1=  50\n");
        for lines in [&[][..], &["L3:0=ff"], &["L3:1=FFF;0=0xff", "MB:1=50"]] {
            let found = Group::make_below(root.path(), &named("gold", lines), "id").unwrap();
            found.remove().unwrap();
            assert!(gold.is_dir(), "not ours to remove");
        }
        for lines in [&["L3:0=f"][..], &["L3:2=ff"], &["L2:0=ff"], &["MB:0=10"]] {
            let err = Group::make_below(root.path(), &named("gold", lines), "id").unwrap_err().to_string();
            assert!(err.starts_with("linux.intelRdt: group ") && err.contains("do not match"), "{err}");
        }
        let err = Group::make_below(root.path(), &named("silver", &[]), "id").unwrap_err().to_string();
        assert!(err.starts_with("linux.intelRdt.closID: group ") && err.contains("does not exist"), "{err}");
        assert!(!root.path().join("silver").exists());
    }

    #[test]
    fn what_was_there_by_the_containers_id_is_neither_changed_nor_removed() {
        let root = tempfile::tempdir().unwrap();
        let before = root.path().join("id");
        group(&before, "L3:0=ff\n");
        fs::create_dir(before.join("mon_groups/id")).unwrap();
        let plan = |line: &str| Rdt { schemata: vec![line.into()], monitored: true, ..Rdt::default() };
        let err = Group::make_below(root.path(), &plan("L3:0=f"), "id").unwrap_err().to_string();
        assert!(err.contains("exists, and its schemata do not match"), "{err}");
        let found = Group::make_below(root.path(), &plan("L3:0=ff"), "id").unwrap();
        assert_eq!(found.monitor_path(), Some(&*before.join("mon_groups/id")));
        found.remove().unwrap();
        assert_eq!(fs::read_to_string(before.join("schemata")).unwrap(), "L3:0=ff\n");
        assert!(before.join("mon_groups/id").is_dir(), "neither is ours");
    }

    #[test]
    fn a_failed_create_leaves_what_was_there_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let plan = Rdt { monitored: true, ..Rdt::default() };
        // Here nothing puts mon_groups into a new directory: the monitoring group cannot be made.
        let err = Group::make_below(root.path(), &plan, "id").unwrap_err().to_string();
        assert!(err.starts_with("linux.intelRdt: make monitoring group "), "{err}");
        assert!(!root.path().join("id").exists());
        fs::create_dir(root.path().join("id")).unwrap();
        Group::make_below(root.path(), &plan, "id").unwrap_err();
        assert!(root.path().join("id").is_dir());
    }

    #[test]
    fn a_schema_that_cannot_be_written_leaves_no_group() {
        let root = tempfile::tempdir().unwrap();
        // Here nothing puts a schemata file into a new directory.
        let err = Group::make_below(root.path(), &named("gold", &["L3:0=f"]), "id").unwrap_err();
        assert!(err.to_string().starts_with("linux.intelRdt: write [\"L3:0=f\"] to "), "{err}");
        assert!(!root.path().join("gold").exists());
    }

    #[test]
    fn lines_are_written_together_and_the_kernel_tells_why_not() {
        let root = tempfile::tempdir().unwrap();
        group(root.path(), "");
        let whole = Group { path: root.path().into(), made: false, monitor: None, foreign_monitor: false };
        whole.set(&["L3:0=f".into(), "MB:0=10".into()]).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("schemata")).unwrap(), "L3:0=f\nMB:0=10\n");
        fs::create_dir(root.path().join("info")).unwrap();
        fs::write(root.path().join("info/last_cmd_status"), "mask f00 has no shareable bits\n").unwrap();
        let err = failed(root.path(), "write".into(), &std::io::Error::from_raw_os_error(libc::EINVAL));
        assert_eq!(err.to_string(), "linux.intelRdt: write: mask f00 has no shareable bits: invalid argument (EINVAL)");
    }

    #[test]
    fn monitoring_is_the_containers_own_in_a_group_of_others() {
        let root = tempfile::tempdir().unwrap();
        group(root.path(), "");
        let plan = Rdt { named: Some("/".into()), monitored: true, ..Rdt::default() };
        let found = Group::make_below(root.path(), &plan, "id").unwrap();
        let monitor = root.path().join("mon_groups/id");
        assert_eq!(found.doors(), [root.path().join("tasks"), monitor.join("tasks")]);
        assert!(monitor.is_dir());
        found.remove().unwrap();
        assert!(!monitor.exists() && root.path().exists());
    }
}
