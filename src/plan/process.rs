//! `process`: arguments, environment, user, limits, scheduling. The same for an init and an exec process.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, MemoryPolicyFlagType,
    MemoryPolicyModeType, PosixRlimitType, Process as Spec, Scheduler,
};
use serde::{Deserialize, Serialize};

use super::capabilities::{self, CapPlan};
use super::cstring;
use crate::sys::process::{CStrings, SchedAttr};
use crate::sys::tty::Size;
use crate::{Error, Result};

/// A process to be.
#[derive(Clone, Debug)]
pub struct Process {
    /// Arguments; the first one is looked up.
    pub argv: CStrings,
    /// Environment, without HOME when the container's passwd is to tell.
    pub env: CStrings,
    /// HOME comes from the container's `/etc/passwd`.
    pub find_home: bool,
    /// Directories of PATH; None when there is no PATH.
    pub path: Option<Vec<CString>>,
    /// Working directory.
    pub cwd: CString,
    /// User, in the container's ids.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// umask.
    pub umask: u32,
    /// Capability sets; None leaves them to the kernel's rules.
    pub capabilities: Option<CapPlan>,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// Limits: RLIMIT_*, soft, hard.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// oom_score_adj; None leaves the inherited one.
    pub oom_score_adj: Option<i32>,
    /// Scheduling policy.
    pub scheduler: Option<SchedAttr>,
    /// I/O class and priority.
    pub io_priority: Option<(u32, u32)>,
    /// AppArmor profile.
    pub apparmor: Option<CString>,
    /// SELinux label.
    pub selinux: Option<CString>,
    /// It has a pty.
    pub terminal: bool,
    /// The size of the pty.
    pub console_size: Option<Size>,
    /// Processors of an exec process before and after it enters the container's cgroup.
    pub affinity: Affinity,
    /// The execution domain, from `linux.personality`.
    pub personality: Option<u64>,
    /// The NUMA policy, from `linux.memoryPolicy`.
    pub memory_policy: Option<MemoryPolicy>,
    /// It runs no program, but waits as a pod's pause process, which has this after its name.
    pub pause: Option<String>,
}

/// `process.execCPUAffinity`: masks of processors, bit n for processor n.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Before the process enters the cgroup.
    pub initial: Option<Vec<u64>>,
    /// Afterwards; None lets it run wherever its cpuset allows.
    pub last: Option<Vec<u64>>,
}

/// The arguments of set_mempolicy(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// MPOL_* and its flags.
    pub mode: u32,
    /// Bit n for node n.
    pub nodes: Vec<u64>,
}

/// Plans a process; `field` is where it stands in its document.
pub fn plan(field: &str, spec: &Spec, terminal: bool) -> Result<Process> {
    let args = spec.args().as_deref().unwrap_or_default();
    if args.is_empty() {
        return Err(Error::invalid(format!("{field}.args"), "must not be empty"));
    }
    if args[0].is_empty() {
        return Err(Error::invalid(format!("{field}.args[0]"), "must not be empty"));
    }
    let cwd = spec.cwd().as_os_str().as_bytes();
    if cwd.is_empty() {
        return Err(Error::invalid(format!("{field}.cwd"), "Cwd property must not be empty"));
    }
    if cwd[0] != b'/' {
        return Err(Error::invalid(format!("{field}.cwd"), "Cwd must be an absolute path"));
    }
    let (env, find_home, path) = environment(field, spec.env().as_deref().unwrap_or_default())?;
    let argv = args.iter().enumerate().map(|(at, arg)| cstring(format!("{field}.args[{at}]"), arg.as_str()));
    let label = |name: &str, value: &Option<String>| -> Result<Option<CString>> {
        value.as_deref().filter(|v| !v.is_empty()).map(|v| cstring(format!("{field}.{name}"), v)).transpose()
    };
    let user = spec.user();
    for (name, id) in [("uid", user.uid()), ("gid", user.gid())] {
        if id == u32::MAX {
            return Err(Error::invalid(format!("{field}.user.{name}"), "4294967295 is not an id"));
        }
    }
    Ok(Process {
        argv: CStrings::new(argv.collect::<Result<_>>()?),
        env,
        find_home,
        path,
        cwd: cstring(format!("{field}.cwd"), cwd)?,
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask().unwrap_or(0o022) & 0o777,
        capabilities: spec.capabilities().as_ref().map(capabilities::plan),
        no_new_privs: spec.no_new_privileges().unwrap_or(false),
        rlimits: rlimits(field, spec)?,
        oom_score_adj: oom_score_adj(field, spec.oom_score_adj())?,
        scheduler: spec.scheduler().as_ref().map(|s| scheduler(field, s)).transpose()?,
        io_priority: io_priority(field, spec)?,
        apparmor: label("apparmorProfile", spec.apparmor_profile())?,
        selinux: label("selinuxLabel", spec.selinux_label())?,
        terminal,
        console_size: if terminal { console_size(spec) } else { None },
        affinity: affinity(field, spec)?,
        personality: None,
        memory_policy: None,
        pause: None,
    })
}

fn affinity(field: &str, spec: &Spec) -> Result<Affinity> {
    let Some(affinity) = spec.exec_cpu_affinity() else { return Ok(Affinity::default()) };
    let mask = |name: &str, list: &Option<String>| {
        let list = list.as_deref().filter(|list| !list.trim().is_empty());
        list.map(|list| bits(&format!("{field}.execCPUAffinity.{name}"), list)).transpose()
    };
    Ok(Affinity { initial: mask("initial", affinity.initial())?, last: mask("final", affinity.cpu_affinity_final())? })
}

/// A list of numbers like `0-3,7` as bits; at most 8192 of them, which is more than Linux has of processors or nodes.
fn bits(field: &str, list: &str) -> Result<Vec<u64>> {
    let bad = || Error::invalid(field, format!("{list:?} is not a list of numbers like 0-3,7"));
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|n| *n < 8192).ok_or_else(bad);
    let mut out = Vec::new();
    for range in list.split(',') {
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(range)?, number(range)?),
        };
        if first > last {
            return Err(bad());
        }
        out.resize(out.len().max(last / 64 + 1), 0u64);
        (first..=last).for_each(|n| out[n / 64] |= 1 << (n % 64));
    }
    Ok(out)
}

/// `linux.personality` as personality(2) takes it. Its flags have no meaning in the spec yet.
pub fn personality(linux: &Linux) -> Result<Option<u64>> {
    let Some(personality) = linux.personality() else { return Ok(None) };
    if let Some(flag) = personality.flags().iter().flatten().next() {
        return Err(Error::invalid("linux.personality.flags", format!("{flag:?} is not a flag")));
    }
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

/// `linux.memoryPolicy`; which nodes go with which mode is the kernel's to say.
pub fn memory_policy(linux: &Linux) -> Result<Option<MemoryPolicy>> {
    use MemoryPolicyModeType as M;
    const FIELD: &str = "linux.memoryPolicy";
    let Some(policy) = linux.memory_policy() else { return Ok(None) };
    let mode = match policy.mode() {
        M::MpolDefault => 0,
        M::MpolPreferred => 1,
        M::MpolBind => 2,
        M::MpolInterleave => 3,
        M::MpolLocal => 4,
        M::MpolPreferredMany => 5,
        M::MpolWeightedInterleave => 6,
    };
    let flags = policy.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
            MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
            MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
        }
    });
    let nodes = policy.nodes().as_deref().filter(|nodes| !nodes.trim().is_empty());
    let nodes = nodes.map(|nodes| bits(&format!("{FIELD}.nodes"), nodes)).transpose()?.unwrap_or_default();
    if nodes.len() > 16 {
        return Err(Error::invalid(format!("{FIELD}.nodes"), "a node above 1023"));
    }
    Ok(Some(MemoryPolicy { mode: mode | flags, nodes }))
}

type Environment = (CStrings, bool, Option<Vec<CString>>);

/// The last of several values of a name wins, in the place of the first.
fn environment(field: &str, env: &[String]) -> Result<Environment> {
    let mut vars: Vec<&str> = Vec::with_capacity(env.len() + 1);
    let mut places = std::collections::HashMap::with_capacity(env.len());
    for (at, var) in env.iter().enumerate() {
        let field = format_args!("{field}.env[{at}]");
        let (name, _) = match var.split_once('=') {
            Some((name, value)) if !name.is_empty() => (name, value),
            _ => return Err(Error::invalid(field, format!("{var:?} is not of the form NAME=value"))),
        };
        match places.entry(name) {
            std::collections::hash_map::Entry::Occupied(place) => {
                let place: &usize = place.get();
                vars[*place] = var;
            }
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(vars.len());
                vars.push(var);
            }
        }
    }
    let value = |name: &str| places.get(name).map(|at| &vars[*at][name.len() + 1..]);
    let find_home = value("HOME").is_none_or(str::is_empty);
    let path = match value("PATH") {
        Some(path) => Some(
            path.split(':')
                .filter(|dir| dir.starts_with('/'))
                .map(|dir| cstring(format!("{field}.env"), dir))
                .collect::<Result<_>>()?,
        ),
        None => None,
    };
    let out = vars
        .iter()
        .filter(|var| !(find_home && var.starts_with("HOME=")))
        .map(|var| cstring(format!("{field}.env"), *var))
        .collect::<Result<_>>()?;
    Ok((CStrings::new(out), find_home, path))
}

fn rlimits(field: &str, spec: &Spec) -> Result<Vec<(u32, u64, u64)>> {
    let mut out: Vec<(u32, u64, u64)> = Vec::new();
    for (at, limit) in spec.rlimits().iter().flatten().enumerate() {
        let resource = resource(limit.typ());
        if out.iter().any(|(other, ..)| *other == resource) {
            return Err(Error::invalid(format!("{field}.rlimits[{at}].type"), format!("duplicated {}", limit.typ())));
        }
        out.push((resource, limit.soft(), limit.hard()));
    }
    Ok(out)
}

fn resource(typ: PosixRlimitType) -> u32 {
    use PosixRlimitType as T;
    match typ {
        T::RlimitCpu => libc::RLIMIT_CPU,
        T::RlimitFsize => libc::RLIMIT_FSIZE,
        T::RlimitData => libc::RLIMIT_DATA,
        T::RlimitStack => libc::RLIMIT_STACK,
        T::RlimitCore => libc::RLIMIT_CORE,
        T::RlimitRss => libc::RLIMIT_RSS,
        T::RlimitNproc => libc::RLIMIT_NPROC,
        T::RlimitNofile => libc::RLIMIT_NOFILE,
        T::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        T::RlimitAs => libc::RLIMIT_AS,
        T::RlimitLocks => libc::RLIMIT_LOCKS,
        T::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        T::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        T::RlimitNice => libc::RLIMIT_NICE,
        T::RlimitRtprio => libc::RLIMIT_RTPRIO,
        T::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// The spec's name of a limit.
pub fn limit_name(number: u32) -> String {
    use PosixRlimitType as T;
    let all = [
        T::RlimitCpu,
        T::RlimitFsize,
        T::RlimitData,
        T::RlimitStack,
        T::RlimitCore,
        T::RlimitRss,
        T::RlimitNproc,
        T::RlimitNofile,
        T::RlimitMemlock,
        T::RlimitAs,
        T::RlimitLocks,
        T::RlimitSigpending,
        T::RlimitMsgqueue,
        T::RlimitNice,
        T::RlimitRtprio,
        T::RlimitRttime,
    ];
    let found = all.into_iter().find(|typ| resource(*typ) == number);
    found.map_or_else(|| number.to_string(), |typ| typ.to_string())
}

fn oom_score_adj(field: &str, score: Option<i32>) -> Result<Option<i32>> {
    match score {
        Some(score) if !(-1000..=1000).contains(&score) => {
            Err(Error::invalid(format!("{field}.oomScoreAdj"), format!("{score} is not between -1000 and 1000")))
        }
        score => Ok(score),
    }
}

fn scheduler(field: &str, s: &Scheduler) -> Result<SchedAttr> {
    use LinuxSchedulerPolicy as P;
    let field = format!("{field}.scheduler");
    let policy = *s.policy();
    let number = match policy {
        P::SchedOther => 0,
        P::SchedFifo => 1,
        P::SchedRr => 2,
        P::SchedBatch => 3,
        P::SchedIso => 4,
        P::SchedIdle => 5,
        P::SchedDeadline => 6,
    };
    // The others have none: it is passed over, as runc does.
    let has_nice = matches!(policy, P::SchedOther | P::SchedBatch);
    let nice = s.nice().filter(|_| has_nice).unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(Error::invalid(format!("{field}.nice"), format!("{nice} is not between -20 and 19")));
    }
    let priority = s.priority().unwrap_or(0);
    if priority != 0 && !matches!(policy, P::SchedFifo | P::SchedRr) {
        let cause = "scheduler.priority can only be specified for SchedFIFO or SchedRR policy";
        return Err(Error::invalid(format!("{field}.priority"), cause));
    }
    let times = [s.runtime().unwrap_or(0), s.deadline().unwrap_or(0), s.period().unwrap_or(0)];
    if times != [0; 3] && policy != P::SchedDeadline {
        let cause = "scheduler runtime/deadline/period can only be specified for SchedDeadline policy";
        return Err(Error::invalid(format!("{field}.runtime"), cause));
    }
    let flags = s.flags().iter().flatten().fold(0, |bits, flag| {
        use LinuxSchedulerFlag as F;
        bits | match flag {
            F::SchedResetOnFork => 0x01,
            F::SchedFlagReclaim => 0x02,
            F::SchedFlagDLOverrun => 0x04,
            F::SchedFlagKeepPolicy => 0x08,
            F::SchedFlagKeepParams => 0x10,
            F::SchedFlagUtilClampMin => 0x20,
            F::SchedFlagUtilClampMax => 0x40,
        }
    });
    Ok(SchedAttr {
        size: 0,
        policy: number,
        flags,
        nice,
        priority: u32::try_from(priority)
            .map_err(|_| Error::invalid(format!("{field}.priority"), format!("{priority} is negative")))?,
        runtime: times[0],
        deadline: times[1],
        period: times[2],
    })
}

fn io_priority(field: &str, spec: &Spec) -> Result<Option<(u32, u32)>> {
    let Some(io) = spec.io_priority() else { return Ok(None) };
    let class = match io.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let priority = u32::try_from(io.priority()).ok().filter(|p| *p < 8).ok_or_else(|| {
        Error::invalid(format!("{field}.ioPriority.priority"), format!("{} is not between 0 and 7", io.priority()))
    })?;
    Ok(Some((class, priority)))
}

fn console_size(spec: &Spec) -> Option<Size> {
    let size = spec.console_size()?;
    let cut = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
    Some(Size { width: cut(size.width()), height: cut(size.height()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(process: &str) -> Result<Process> {
        plan("process", &serde_json::from_str(process).unwrap(), false)
    }

    #[test]
    fn the_last_value_of_a_variable_wins_in_the_first_place() {
        let process = planned(
            r#"{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0},"env":["A=1","PATH=/bin:x::/usr/bin","A=2","HOME="]}"#,
        )
        .unwrap();
        let env: Vec<_> = process.env.as_slice().iter().map(|v| v.to_str().unwrap()).collect();
        assert_eq!(env, ["A=2", "PATH=/bin:x::/usr/bin"]);
        assert!(process.find_home);
        assert_eq!(process.path.unwrap(), [c"/bin".to_owned(), c"/usr/bin".to_owned()]);
        assert_eq!(process.umask, 0o022);
    }

    #[test]
    fn lists_of_numbers_become_bits() {
        assert_eq!(bits("f", "0-3,7").unwrap(), [0x8f]);
        assert_eq!(bits("f", "64, 1").unwrap(), [2, 1]);
        for bad in ["", "x", "1-", "-1", "2-1", "9999", "1,,2"] {
            assert!(bits("f", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let base = r#""user":{"uid":0,"gid":0}"#;
        for (process, want) in [
            (format!(r#"{{"cwd":"/",{base}}}"#), "process.args: must not be empty"),
            (format!(r#"{{"args":["a"],"cwd":"",{base}}}"#), "process.cwd: Cwd property must not be empty"),
            (format!(r#"{{"args":["a"],"cwd":"x",{base}}}"#), "process.cwd: Cwd must be an absolute path"),
            (format!(r#"{{"args":["a"],"cwd":"/",{base},"env":["X"]}}"#), "process.env[0]: \"X\" is not"),
            (format!(r#"{{"args":["a\u0000"],"cwd":"/",{base}}}"#), "process.args[0]: contains a NUL"),
            (
                format!(
                    r#"{{"args":["a"],"cwd":"/",{base},"rlimits":[{{"type":"RLIMIT_CORE","soft":1,"hard":1}},{{"type":"RLIMIT_CORE","soft":1,"hard":1}}]}}"#
                ),
                "process.rlimits[1].type: duplicated RLIMIT_CORE",
            ),
            (format!(r#"{{"args":["a"],"cwd":"/",{base},"oomScoreAdj":1001}}"#), "process.oomScoreAdj: 1001"),
            (
                format!(r#"{{"args":["a"],"cwd":"/",{base},"execCPUAffinity":{{"final":"3-1"}}}}"#),
                "process.execCPUAffinity.final: \"3-1\"",
            ),
        ] {
            let err = planned(&process).unwrap_err().to_string();
            assert!(err.starts_with(want), "{process}: {err}");
        }
    }
}
