//! `kill` and `delete`.

use std::str::FromStr;

use clap::Args;
use nix::sys::signal::Signal;
use skiff::container::{Container, does_not_exist};
use skiff::error::CONTAINER_NOT_RUNNING;
use skiff::{Error, Kind, Result};

use super::Globals;

/// `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// send the specified signal to all processes inside the container
    #[arg(short, long)]
    all: bool,
    #[arg(value_name = "container-id")]
    id: String,
    #[arg(default_value = "TERM", allow_hyphen_values = true)]
    signal: String,
}

impl Kill {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let signal = parse_signal(&self.signal)?;
        let container = globals.container(&self.id)?;
        match container.kill(signal, self.all) {
            Err(err) if err.kind() == Kind::NotFound && !self.all => {
                Err(Error::new(Kind::NotFound, CONTAINER_NOT_RUNNING))
            }
            Err(err) if err.kind() == Kind::NotFound => Ok(0),
            other => other.map(|()| 0),
        }
    }
}

/// A number, or a name with or without SIG in any case.
fn parse_signal(text: &str) -> Result<i32> {
    let unknown = || Error::new(Kind::Invalid, format!("unknown signal {text:?}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let name = match name.as_str() {
        "SIGCLD" => "SIGCHLD",
        "SIGPOLL" => "SIGIO",
        name => name,
    };
    let realtime = |base: i32, rest: &str, sign: i32| match rest {
        "" => Some(base),
        rest => rest[1..].parse::<i32>().ok().map(|n| base + sign * n).filter(|n| (34..=64).contains(n)),
    };
    if let Some(rest) = name.strip_prefix("SIGRTMIN") {
        return realtime(34, rest, 1).filter(|_| rest.is_empty() || rest.starts_with('+')).ok_or_else(unknown);
    }
    if let Some(rest) = name.strip_prefix("SIGRTMAX") {
        return realtime(64, rest, -1).filter(|_| rest.is_empty() || rest.starts_with('-')).ok_or_else(unknown);
    }
    Signal::from_str(name).map(|signal| signal as i32).map_err(|_| unknown())
}

/// `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// forcibly deletes the container if it is still running (uses SIGKILL)
    #[arg(short, long)]
    force: bool,
    #[arg(value_name = "container-id")]
    id: String,
}

impl Delete {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        match globals.container(&self.id) {
            Ok(container) => container.delete(self.force).map(|()| 0),
            Err(err) if err.kind() == Kind::NotFound => {
                Container::remove_leftover(&globals.root, &self.id)?;
                if self.force { Ok(0) } else { Err(does_not_exist()) }
            }
            Err(err) => Err(err),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_numbers_or_names() {
        for (text, want) in [
            ("9", 9),
            ("KILL", 9),
            ("sigterm", 15),
            ("Hup", 1),
            ("SIGRTMIN+3", 37),
            ("rtmax", 64),
            ("RTMAX-1", 63),
            ("0", 0),
        ] {
            assert_eq!(parse_signal(text).unwrap(), want, "{text}");
        }
        for bad in ["", "65", "-1", "KILLER", "SIGRTMIN+40", "RTMIN3", "SIG"] {
            assert_eq!(parse_signal(bad).unwrap_err().to_string(), format!("unknown signal {bad:?}"));
        }
    }
}
