//! `linux.seccomp`, checked. Does not live here: compiling it (launch::seccomp).

use std::path::PathBuf;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompFilterFlag as Flag, LinuxSyscall, Spec,
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// SECCOMP_FILTER_FLAG_LOG of linux/seccomp.h.
const LOG: u32 = 1 << 1;
/// SECCOMP_FILTER_FLAG_SPEC_ALLOW.
const SPEC_ALLOW: u32 = 1 << 2;
/// SECCOMP_FILTER_FLAG_NEW_LISTENER.
pub const NEW_LISTENER: u32 = 1 << 3;
/// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV.
const WAIT_KILLABLE_RECV: u32 = 1 << 5;

/// A profile whose every rule can be compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// For calls that no rule names.
    pub default_action: Action,
    /// Its errno.
    pub default_errno: Option<u32>,
    /// Architectures beside the native one.
    pub architectures: Vec<Arch>,
    /// Flags for seccomp(2).
    pub flags: u32,
    /// Rules.
    pub syscalls: Vec<LinuxSyscall>,
    /// Who is asked about calls with SCMP_ACT_NOTIFY.
    pub listener: Option<Listener>,
}

/// The agent that is asked about calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// The unix socket that it listens at.
    pub path: PathBuf,
    /// What it is told, as it is.
    pub metadata: String,
}

/// Checks the profile of a spec.
pub fn plan(spec: &Spec) -> Result<Option<Profile>> {
    let Some(seccomp) = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else { return Ok(None) };
    check("linux.seccomp", seccomp.default_action(), seccomp.default_errno_ret(), true)?;
    for (at, rule) in seccomp.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{at}]");
        if rule.names().is_empty() {
            return Err(Error::invalid(format!("{field}.names"), "must not be empty"));
        }
        check(&field, rule.action(), rule.errno_ret(), false)?;
        // The init writes to its parent when the filter is on already.
        if rule.action() == Action::ScmpActNotify && rule.names().iter().any(|name| name == "write") {
            return Err(Error::invalid(field, "SCMP_ACT_NOTIFY cannot be used for the write syscall"));
        }
        if let Some(arg) = rule.args().iter().flatten().find(|arg| arg.index() > 5) {
            return Err(Error::invalid(format!("{field}.args"), format!("index {} is not below 6", arg.index())));
        }
    }
    let notifies = seccomp.syscalls().iter().flatten().any(|rule| rule.action() == Action::ScmpActNotify);
    Ok(Some(Profile {
        listener: listener(seccomp, notifies)?,
        default_action: seccomp.default_action(),
        default_errno: seccomp.default_errno_ret(),
        architectures: seccomp.architectures().clone().unwrap_or_default(),
        flags: flags(seccomp, notifies),
        syscalls: seccomp.syscalls().clone().unwrap_or_default(),
    }))
}

fn check(field: &str, action: Action, errno: Option<u32>, default: bool) -> Result<()> {
    let name = if default { "defaultErrnoRet" } else { "errnoRet" };
    match errno {
        Some(_) if !matches!(action, Action::ScmpActErrno | Action::ScmpActTrace) => {
            return Err(Error::invalid(format!("{field}.{name}"), format!("does not go with action {action}")));
        }
        Some(errno) if errno > 4095 => {
            return Err(Error::invalid(format!("{field}.{name}"), format!("{errno} is not an errno")));
        }
        _ => {}
    }
    if action == Action::ScmpActNotify && default {
        return Err(Error::invalid(
            format!("{field}.defaultAction"),
            "SCMP_ACT_NOTIFY cannot be used as default action",
        ));
    }
    Ok(())
}

fn listener(seccomp: &LinuxSeccomp, notifies: bool) -> Result<Option<Listener>> {
    let path = seccomp.listener_path().clone().filter(|path| !path.as_os_str().is_empty());
    let metadata = seccomp.listener_metadata().clone().unwrap_or_default();
    let field = "linux.seccomp.listenerPath";
    match path {
        None if notifies => Err(Error::invalid(field, "must be set where SCMP_ACT_NOTIFY is used")),
        None if !metadata.is_empty() => Err(Error::invalid(field, "must be set when listenerMetadata is")),
        None => Ok(None),
        Some(path) => Ok(notifies.then_some(Listener { path, metadata })),
    }
}

/// Without `flags` runc asks for SPEC_ALLOW; with an empty list for none.
fn flags(seccomp: &LinuxSeccomp, notifies: bool) -> u32 {
    let listener = if notifies { NEW_LISTENER } else { 0 };
    listener
        | match seccomp.flags() {
            None => SPEC_ALLOW,
            Some(list) => list.iter().fold(0, |bits, flag| {
                bits | match flag {
                    Flag::SeccompFilterFlagLog => LOG,
                    // Nothing to synchronise: the process has one thread.
                    Flag::SeccompFilterFlagTsync => 0,
                    Flag::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
                    // The kernel takes it with a listener alone.
                    Flag::SeccompFilterFlagWaitKillableRecv if notifies => WAIT_KILLABLE_RECV,
                    Flag::SeccompFilterFlagWaitKillableRecv => 0,
                }
            }),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(seccomp: &str) -> Result<Option<Profile>> {
        plan(&serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{{"seccomp":{seccomp}}}}}"#)).unwrap())
    }

    #[test]
    fn flags_default_to_spec_allow() {
        let profile = planned(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap().unwrap();
        assert_eq!(profile.flags, SPEC_ALLOW);
        let profile = planned(r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":[]}"#).unwrap().unwrap();
        assert_eq!(profile.flags, 0);
    }

    #[test]
    fn errors_name_the_field() {
        for (seccomp, want) in [
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#, "linux.seccomp.defaultErrnoRet: does not"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["x"],"action":"SCMP_ACT_KILL","errnoRet":1}]}"#,
                "linux.seccomp.syscalls[0].errnoRet: does not",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[],"action":"SCMP_ACT_KILL"}]}"#,
                "linux.seccomp.syscalls[0].names: must",
            ),
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY cannot"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_NOTIFY"}]}"#,
                "linux.seccomp.listenerPath: must be set",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["write"],"action":"SCMP_ACT_NOTIFY"}]}"#,
                "linux.seccomp.syscalls[0]: SCMP_ACT_NOTIFY cannot",
            ),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerMetadata":"x"}"#, "linux.seccomp.listenerPath: must be set"),
        ] {
            let err = planned(seccomp).unwrap_err().to_string();
            assert!(err.starts_with(want), "{err}");
        }
    }
}
