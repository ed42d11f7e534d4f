//! A container's unit of systemd: started, changed and stopped, one call each (org.freedesktop.systemd1(5)). Every
//! function here waits for another process: the shim runs them in a chore.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::dbus::{Call, Connection, Message, Writer};
use crate::plan::cgroup::Rule;
use crate::plan::scope::{self, Scope, Value};
use crate::{Error, Kind, Result};

/// How long systemd may take for one call.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take for the end of a unit: the container goes without its answer, too.
const PATIENCE_AT_END: Duration = Duration::from_secs(5);
/// How long a unit without living processes may take to stop.
const SETTLED: Duration = Duration::from_secs(2);
const NAME: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// A unit, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// Of the user's systemd.
    pub user: bool,
}

#[derive(Debug)]
struct Systemd {
    connection: Connection,
}

impl Systemd {
    /// systemd's own socket, which needs no bus, or else the bus.
    fn connect(user: bool, deadline: Instant) -> Result<Systemd> {
        let (own, bus) = sockets(user)?;
        let own = own.map(|own| Connection::open(&own, deadline));
        match own {
            Some(Ok(connection)) => Ok(Systemd { connection }),
            Some(Err(err)) if err.kind() == Kind::Timeout => Err(err),
            other => {
                let connection = Connection::open(&bus, deadline).map_err(|err| match other {
                    Some(Err(first)) => first,
                    _ => err,
                })?;
                let mut out = Systemd { connection };
                out.introduce()?;
                Ok(out)
            }
        }
    }

    /// What a bus wants to know first.
    fn introduce(&mut self) -> Result<()> {
        let bus = |method| ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", method];
        let mut rule = Writer::default();
        rule.string(&format!("type='signal',interface='{MANAGER}',member='JobRemoved'"));
        for call in [
            Call { to: bus("Hello"), signature: "", body: Writer::default() },
            Call { to: bus("AddMatch"), signature: "s", body: rule },
            Call { to: [NAME, OBJECT, MANAGER, "Subscribe"], signature: "", body: Writer::default() },
        ] {
            let what = call.to[3].to_string();
            self.connection.call(call)?.map_err(|(name, text)| refused(&what, &name, &text))?;
        }
        Ok(())
    }

    fn call(&mut self, method: &str, signature: &str, body: Writer) -> Result<Answer> {
        self.connection.call(Call { to: [NAME, OBJECT, MANAGER, method], signature, body })
    }

    /// Waits for the end of the job that an answer names.
    fn job(&mut self, what: &str, answer: &Message) -> Result<()> {
        let job = answer.strings()?.into_iter().next().unwrap_or_default();
        loop {
            let signal = self.connection.signal()?;
            if !signal.is_signal("JobRemoved") {
                continue;
            }
            if let [removed, _, result] = &signal.strings()?[..]
                && *removed == job
            {
                return match result.as_str() {
                    "done" => Ok(()),
                    _ => Err(Error::new(Kind::System, format!("{what}: the job of systemd ended with {result:?}"))),
                };
            }
        }
    }
}

type Answer = std::result::Result<Message, (String, String)>;

fn refused(what: &str, name: &str, text: &str) -> Error {
    Error::new(Kind::System, format!("{what}: {text} ({name})"))
}

/// systemd's own socket and the bus. Who names a bus for the system means that one alone.
fn sockets(user: bool) -> Result<(Option<PathBuf>, PathBuf)> {
    if !user {
        return Ok(match named("DBUS_SYSTEM_BUS_ADDRESS") {
            Some(bus) => (None, bus),
            None => (Some("/run/systemd/private".into()), "/run/dbus/system_bus_socket".into()),
        });
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match (runtime, named("DBUS_SESSION_BUS_ADDRESS")) {
        (Some(runtime), bus) => Ok((Some(runtime.join("systemd/private")), bus.unwrap_or_else(|| runtime.join("bus")))),
        (None, Some(bus)) => Ok((Some(bus.with_file_name("systemd/private")), bus)),
        (None, None) => {
            let text =
                "--systemd-cgroup: find the user's systemd: XDG_RUNTIME_DIR and DBUS_SESSION_BUS_ADDRESS are not set";
            Err(Error::new(Kind::FailedPrecondition, text))
        }
    }
}

/// The path in a bus's address: `unix:path=/run/x,guid=y`.
fn named(variable: &str) -> Option<PathBuf> {
    let address = std::env::var(variable).ok()?;
    let path = address.split([',', ';']).find_map(|part| part.trim_start_matches("unix:").strip_prefix("path="))?;
    Some(PathBuf::from(path))
}

/// Starts the unit of a container with process `pid` in it.
pub fn start(scope: &Scope, devices: Option<&[Rule]>, pid: u32) -> Result<()> {
    let what = format!("start unit {:?} of systemd", scope.unit);
    let mut properties = scope.properties.clone();
    if !scope.unit.ends_with(".slice") {
        properties.push(("PIDs".into(), Value::Numbers(vec![pid])));
    }
    // A user's systemd has no right to a device policy.
    if let Some(rules) = devices.filter(|_| !scope.user) {
        properties.extend(scope::devices(rules, driver));
    }
    let body = || {
        let mut body = Writer::default();
        body.string(&scope.unit);
        body.string("replace");
        body.properties(&properties);
        body.array(8, |_| ());
        body
    };
    let mut systemd = Systemd::connect(scope.user, Instant::now() + PATIENCE).map_err(|err| err.context(&what))?;
    let mut answer =
        systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body()).map_err(|err| err.context(&what))?;
    if matches!(&answer, Err((name, _)) if name == EXISTS) {
        // One that has failed stays until somebody says that it was seen.
        let mut name = Writer::default();
        name.string(&scope.unit);
        let reset = systemd.call("ResetFailedUnit", "s", name)?;
        reset.map_err(|(name, text)| refused(&what, &name, &text))?;
        answer = systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body())?;
    }
    let answer = answer.map_err(|(name, text)| {
        let err = refused(&what, &name, &text);
        if name == EXISTS { err.with_kind(Kind::AlreadyExists) } else { err }
    })?;
    systemd.job(&what, &answer).map_err(|err| err.context(&what))
}

impl Unit {
    /// Changes properties until the unit ends.
    pub fn set(&self, properties: &[(String, Value)]) -> Result<()> {
        if properties.is_empty() {
            return Ok(());
        }
        let what = format!("set properties of unit {:?} of systemd", self.name);
        let mut body = Writer::default();
        body.string(&self.name);
        body.flag(true);
        body.properties(properties);
        let mut systemd = Systemd::connect(self.user, Instant::now() + PATIENCE).map_err(|err| err.context(&what))?;
        let answer = systemd.call("SetUnitProperties", "sba(sv)", body).map_err(|err| err.context(&what))?;
        answer.map(drop).map_err(|(name, text)| refused(&what, &name, &text))
    }

    /// Moves a process into it, for those who may not do that themselves.
    pub fn attach(&self, pid: i32) -> Result<()> {
        let what = format!("move process {pid} into unit {:?} of systemd", self.name);
        let mut body = Writer::default();
        body.string(&self.name);
        body.string("");
        body.array(4, |out| out.number(pid.cast_unsigned()));
        let mut systemd = Systemd::connect(self.user, Instant::now() + PATIENCE).map_err(|err| err.context(&what))?;
        let answer = systemd.call("AttachProcessesToUnit", "ssau", body).map_err(|err| err.context(&what))?;
        answer.map(drop).map_err(|(name, text)| refused(&what, &name, &text))
    }

    /// Stops it, and forgets that it failed. Ok when it is gone already.
    pub fn stop(&self) -> Result<()> {
        let what = format!("stop unit {:?} of systemd", self.name);
        let deadline = Instant::now() + PATIENCE_AT_END;
        let mut systemd = Systemd::connect(self.user, deadline).map_err(|err| err.context(&what))?;
        let mut body = Writer::default();
        body.string(&self.name);
        body.string("replace");
        match systemd.call("StopUnit", "ss", body).map_err(|err| err.context(&what))? {
            Ok(answer) => {
                // Its processes are dead already; whether systemd has seen that is nothing to wait long for.
                systemd.connection.until(deadline.min(Instant::now() + SETTLED));
                match systemd.job(&what, &answer) {
                    Err(err) if err.kind() == Kind::Timeout => {}
                    other => other?,
                }
                systemd.connection.until(deadline);
            }
            Err((name, _)) if name == NO_SUCH_UNIT => return Ok(()),
            Err((name, text)) => return Err(refused(&what, &name, &text)),
        }
        let mut body = Writer::default();
        body.string(&self.name);
        match systemd.call("ResetFailedUnit", "s", body)? {
            Err((name, text)) if name != NO_SUCH_UNIT => Err(refused(&what, &name, &text)),
            _ => Ok(()),
        }
    }
}

/// Name of the driver of a major number: systemd's lists go by it.
fn driver(kind: char, major: u32) -> Option<String> {
    let text = std::fs::read_to_string("/proc/devices").ok()?;
    let (chars, blocks) = text.split_once("Block devices:")?;
    let part = if kind == 'b' { blocks } else { chars };
    part.lines().find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (number.parse() == Ok(major)).then(|| name.trim().to_string())
    })
}
