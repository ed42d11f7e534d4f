//! `exec`.

use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::{LinuxCapabilities, Process};
use skiff::container::{Container, Exec as Request, Stdio};
use skiff::launch::block_on;
use skiff::{Error, Kind, Result};

use super::{Globals, listen_fds, tty, write_pid_file};

/// `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the pseudoterminal
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the exec process
    #[arg(long)]
    pidfd_socket: Option<PathBuf>,
    /// current working directory in the container
    #[arg(long)]
    cwd: Option<PathBuf>,
    /// set environment variables
    #[arg(short, long, allow_hyphen_values = true)]
    env: Vec<String>,
    /// allocate a pseudo-TTY
    #[arg(short, long)]
    tty: bool,
    /// UID (format: uid[:gid])
    #[arg(short, long, allow_hyphen_values = true)]
    user: Option<String>,
    /// additional gids
    #[arg(short = 'g', long)]
    additional_gids: Vec<u32>,
    /// path to the process.json
    #[arg(short, long)]
    process: Option<PathBuf>,
    /// detach from the container's process
    #[arg(short, long)]
    detach: bool,
    /// specify the file to write the process id to
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// set the asm process label for the process commonly used with selinux
    #[arg(long)]
    process_label: Option<String>,
    /// set the apparmor profile for the process
    #[arg(long)]
    apparmor: Option<String>,
    /// set the no new privileges value for the process
    #[arg(long)]
    no_new_privs: bool,
    /// add a capability to the bounding set for the process
    #[arg(short, long)]
    cap: Vec<String>,
    /// pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, default_value_t = 0)]
    preserve_fds: u32,
    /// run the process in an (existing) sub-cgroup(s). Format is [<controller>:]<cgroup>
    #[arg(long)]
    cgroup: Vec<String>,
    /// allow exec in a paused container
    #[arg(long)]
    ignore_paused: bool,
    #[arg(value_name = "container-id")]
    id: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let container = globals.container(&self.id)?;
        let process = self.document(&container)?;
        let terminal = process.terminal().unwrap_or(false);
        tty::check(terminal, self.console_socket.is_some(), self.detach)?;
        let request = Request {
            process,
            stdio: if terminal { Stdio::Terminal } else { Stdio::Inherit },
            preserve_fds: self.preserve_fds + listen_fds(),
            cgroups: self.cgroup.clone(),
            ignore_paused: self.ignore_paused,
            tree: None,
            limit: None,
        };
        let signals = if self.detach {
            None
        } else {
            let _ = skiff::sys::process::set_child_subreaper(true);
            Some(tty::Signals::block()?)
        };
        let console = self.console_socket.as_deref().map(tty::Console::connect).transpose()?;
        let execed = block_on(container.exec(request)?)?;
        let process = execed.process;
        let undo = |err| {
            let _ = process.kill(libc::SIGKILL);
            let _ = process.wait();
            err
        };
        if let Some(path) = &self.pid_file {
            write_pid_file(path, process.pid).map_err(undo)?;
        }
        if let (Some(master), Some(console)) = (&execed.console, console) {
            console.send(master).map_err(undo)?;
        }
        if let Some(socket) = &self.pidfd_socket {
            tty::send_fd(&process.pidfd, "setns", "pidfd", socket).map_err(undo)?;
        }
        match signals {
            Some(signals) => {
                let session = tty::Session::begin(execed.console).map_err(undo)?;
                session.attend(&process, &signals).map(|exit| exit.status as i32).map_err(undo)
            }
            None => Ok(0),
        }
    }

    /// The process document: a file, or the container's own with the flags over it.
    fn document(&self, container: &Container) -> Result<Process> {
        if let Some(path) = &self.process {
            return skiff::bundle::parse_process(&skiff::bundle::read(path)?);
        }
        if self.command.is_empty() {
            return Err(Error::new(Kind::Invalid, "exec args cannot be empty"));
        }
        let spec = skiff::bundle::load(container.bundle(), container.config())?;
        let mut process = spec.process().clone().ok_or_else(|| Error::invalid("process", "must not be empty"))?;
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(self.tty));
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        if let Some(label) = &self.process_label {
            process.set_selinux_label(Some(label.clone()));
        }
        if let Some(profile) = &self.apparmor {
            process.set_apparmor_profile(Some(profile.clone()));
        }
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(self.env.iter().cloned());
        let count = listen_fds();
        if count > 0 {
            env.push(format!("LISTEN_FDS={count}"));
            env.push("LISTEN_PID=1".into());
        }
        process.set_env(Some(env));
        let mut user = process.user().clone();
        if let Some(text) = &self.user {
            let (uid, gid) = parse_user(text)?;
            user.set_uid(uid);
            if let Some(gid) = gid {
                user.set_gid(gid);
            }
        }
        if !self.additional_gids.is_empty() {
            user.set_additional_gids(Some(self.additional_gids.clone()));
        }
        process.set_user(user);
        if !self.cap.is_empty() {
            let caps = add_capabilities(process.capabilities().clone(), &self.cap);
            process.set_capabilities(Some(caps));
        }
        Ok(process)
    }
}

/// `uid[:gid]`, numbers alone: whatever is not fully read might be another user than was meant.
fn parse_user(text: &str) -> Result<(u32, Option<u32>)> {
    let number = |what: &str, text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let id = text.parse::<u32>().ok().filter(|id| digits && *id != u32::MAX);
        id.ok_or_else(|| Error::invalid("--user", format!("{text:?} is not a {what}")))
    };
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number("uid", uid)?, Some(number("gid", gid)?))),
        None => Ok((number("uid", text)?, None)),
    }
}

/// `--cap` adds to the sets that take effect, never to the inheritable one; to the ambient one only what is inheritable.
/// Unknown ones are passed over, as in the spec.
fn add_capabilities(caps: Option<LinuxCapabilities>, names: &[String]) -> LinuxCapabilities {
    let mut caps = caps.unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
        none
    });
    for name in names {
        let Ok(cap) = serde_json::from_value(name.as_str().into()) else {
            log::warn!("--cap: unknown capability {name:?} is ignored");
            continue;
        };
        let with = |set: &Option<oci_spec::runtime::Capabilities>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(cap);
            Some(set)
        };
        let (bounding, effective, permitted) = (with(caps.bounding()), with(caps.effective()), with(caps.permitted()));
        let inheritable = caps.inheritable().as_ref().is_some_and(|set| set.contains(&cap));
        let ambient = if inheritable { with(caps.ambient()) } else { caps.ambient().clone() };
        caps.set_bounding(bounding).set_effective(effective).set_permitted(permitted).set_ambient(ambient);
    }
    caps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_to_the_last_character() {
        assert_eq!(parse_user("1").unwrap(), (1, None));
        assert_eq!(parse_user("1000:5").unwrap(), (1000, Some(5)));
        for bad in ["", "1:", ":1", "1x", "-1", "+1", "4294967295", "4294967296", "root", "1:2:3", " 1"] {
            let err = parse_user(bad).unwrap_err().to_string();
            assert!(err.starts_with("--user: "), "{bad}: {err}");
        }
    }

    #[test]
    fn added_capabilities_are_never_inheritable() {
        let caps = add_capabilities(None, &["CAP_NET_RAW".into(), "CAP_MOON".into()]);
        assert_eq!(caps.bounding().as_ref().unwrap().len(), 1);
        assert!(caps.inheritable().is_none() && caps.ambient().is_none());
    }
}
