//! Id maps for an ordinary user: the one map that the kernel grants to everybody, or newuidmap(1) and newgidmap(1).

use std::process::Command;

use super::write_proc;
use crate::{Error, Kind, Result};

/// Writes the maps of process `pid`.
pub fn write(pid: i32, uid_map: &str, gid_map: &str) -> Result<()> {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    if is_own(uid_map, uid) {
        write_proc(pid, "uid_map", uid_map).map_err(|err| err.context("linux.uidMappings"))?;
    } else {
        helper("newuidmap", pid, uid_map).map_err(|err| err.context("linux.uidMappings"))?;
    }
    if is_own(gid_map, gid) {
        // The kernel's condition for a map of one's own group (user_namespaces(7)).
        write_proc(pid, "setgroups", "deny")?;
        return write_proc(pid, "gid_map", gid_map).map_err(|err| err.context("linux.gidMappings"));
    }
    helper("newgidmap", pid, gid_map).map_err(|err| err.context("linux.gidMappings"))
}

/// True when the map is of the caller's own id alone.
fn is_own(map: &str, id: u32) -> bool {
    let mut fields = map.split_ascii_whitespace().skip(1);
    fields.next() == Some(&id.to_string()) && fields.next() == Some("1") && fields.next().is_none()
}

fn helper(program: &str, pid: i32, map: &str) -> Result<()> {
    let output = Command::new(program).arg(pid.to_string()).args(map.split_ascii_whitespace()).output();
    let output = output.map_err(|e| Error::io(format!("run {program}"), &e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(Kind::Invalid, format!("{program}: {}", said.trim())))
}

#[cfg(test)]
mod tests {
    use super::is_own;

    #[test]
    fn one_line_of_the_own_id_is_the_own_map() {
        assert!(is_own("0 1000 1\n", 1000));
        for other in ["0 1000 2\n", "0 1001 1\n", "0 1000 1\n1 100000 65536\n", ""] {
            assert!(!is_own(other, 1000), "{other:?}");
        }
    }
}
