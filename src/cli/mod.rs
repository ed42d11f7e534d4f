//! runc's commands: arguments and printing only. Does not live here: what they do (the library).

mod create;
mod criu;
mod events;
mod exec;
mod help;
mod kill;
mod list;
mod logging;
mod notify;
mod plan;
mod run;
mod spec;
mod tty;
mod update;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, FromArgMatches, Subcommand};
use skiff::container::Container;
use skiff::launch::block_on;
use skiff::{Error, Kind, Result};

/// Exit code of `exec` when the process could not be run.
const EXEC_FAILED: i32 = 255;

/// The flags before the command.
#[derive(Debug, Args)]
struct Flags {
    #[arg(long)]
    debug: bool,
    #[arg(long)]
    log: Option<PathBuf>,
    #[arg(long, default_value = "text")]
    log_format: String,
    #[arg(long)]
    root: Option<PathBuf>,
    #[arg(long, hide = true)]
    criu: Option<String>,
    #[arg(long)]
    systemd_cgroup: bool,
    /// crun's way to say it.
    #[arg(long, hide = true, value_parser = ["cgroupfs", "systemd"])]
    cgroup_manager: Option<String>,
    #[arg(long)]
    rootless: Option<String>,
    #[arg(short, long)]
    help: bool,
    #[arg(short, long)]
    version: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// create a container
    Create(create::Create),
    /// executes the user defined process in a created container
    Start(Id),
    /// create and run a container
    Run(run::Run),
    /// execute new process inside the container
    Exec(Box<exec::Exec>),
    /// kill sends the specified signal (default: SIGTERM) to the container's init process
    Kill(kill::Kill),
    /// delete any resources held by the container often used with detached container
    Delete(kill::Delete),
    /// output the state of a container
    State(Id),
    /// lists containers started by skiff with the given root
    List(list::List),
    /// ps displays the processes running inside a container
    Ps(list::Ps),
    /// pause suspends all processes inside the container
    Pause(Id),
    /// resumes all processes that have been previously paused
    Resume(Id),
    /// update container resource constraints
    Update(Box<update::Update>),
    /// checkpoint a running container
    Checkpoint(Box<criu::Checkpoint>),
    /// restore a container from a previous checkpoint
    Restore(Box<criu::Restore>),
    /// display container events such as OOM notifications, cpu, memory, and IO usage statistics
    Events(events::Events),
    /// show step by step what a create of a bundle would do, without doing it
    Plan(plan::Plan),
    /// create a new specification file
    Spec(spec::Spec),
    /// show the enabled features
    Features,
    /// Shows a list of commands or help for one command
    #[command(alias = "h")]
    Help { topic: Option<String> },
}

#[derive(Debug, Args)]
struct Id {
    /// name of the container
    #[arg(value_name = "container-id")]
    id: String,
}

/// What all commands share.
#[derive(Debug)]
struct Globals {
    program: String,
    root: PathBuf,
    /// `--root` was given.
    explicit_root: bool,
    systemd_cgroup: bool,
    rootless: bool,
}

impl Globals {
    fn container(&self, id: &str) -> Result<Container> {
        Container::load(&self.root, id)
    }
}

/// The command line without its commands.
fn line() -> clap::Command {
    let line = clap::Command::new("skiff").disable_help_flag(true).disable_version_flag(true);
    Flags::augment_args(line.disable_help_subcommand(true))
}

/// The whole command line.
fn whole_line() -> clap::Command {
    Command::augment_subcommands(line())
}

/// The command line with only the command that is named first, where that is one that is run often: to describe all
/// flags of all commands takes longer than many a command.
fn short_line(words: &[OsString]) -> Option<clap::Command> {
    let named = |name| clap::Command::new(name);
    let command = words.iter().skip(1).find_map(|word| {
        Some(match word.to_str()? {
            "create" => create::Create::augment_args(named("create")),
            "start" => Id::augment_args(named("start")),
            "run" => run::Run::augment_args(named("run")),
            "exec" => exec::Exec::augment_args(named("exec")),
            "kill" => kill::Kill::augment_args(named("kill")),
            "delete" => kill::Delete::augment_args(named("delete")),
            "state" => Id::augment_args(named("state")),
            _ => return None,
        })
    })?;
    Some(line().subcommand(command))
}

fn parse() -> std::result::Result<(Flags, Option<Command>), clap::Error> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let short = short_line(&words).and_then(|line| line.try_get_matches_from(&words).ok());
    let matches = match short {
        Some(matches) => matches,
        None => whole_line().try_get_matches_from(&words)?,
    };
    let command = matches.subcommand().is_some().then(|| Command::from_arg_matches(&matches)).transpose()?;
    Ok((Flags::from_arg_matches(&matches)?, command))
}

/// Runs the command line; the exit code.
pub fn run() -> i32 {
    let program = program();
    let (cli, command) = match parse() {
        Ok(parsed) => parsed,
        Err(err) => return help::usage_error(&program, &err),
    };
    if cli.version {
        print!("{}", help::version(&program));
        return 0;
    }
    let Some(command) = command.filter(|_| !cli.help) else {
        print!("{}", help::main(&program));
        return 0;
    };
    let logs = match logging::open(cli.log.as_deref(), &cli.log_format, cli.debug) {
        Ok(logs) => logs,
        Err(err) => {
            eprintln!("{err}");
            return 1;
        }
    };
    let failed = if matches!(command, Command::Exec(_)) { EXEC_FAILED } else { 1 };
    let systemd_cgroup = cli.systemd_cgroup || cli.cgroup_manager.is_some_and(|manager| manager == "systemd");
    let done = globals(&program, cli.root, systemd_cgroup, cli.rootless.as_deref())
        .and_then(|globals| dispatch(&globals, command));
    match done {
        Ok(code) => code,
        Err(err) => {
            logs.error(&err);
            failed
        }
    }
}

impl Command {
    /// Makes a container, or has something of ours enter one.
    fn enters(&self) -> bool {
        matches!(self, Command::Create(_) | Command::Run(_) | Command::Exec(_) | Command::Restore(_))
    }
}

fn program() -> String {
    let name = std::env::args_os().next().map(PathBuf::from);
    let name = name.as_deref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "skiff".into())
}

fn globals(program: &str, root: Option<PathBuf>, systemd_cgroup: bool, rootless: Option<&str>) -> Result<Globals> {
    let rootless = match rootless {
        None | Some("auto" | "") => skiff::host::rootless(),
        Some("true") => true,
        Some("false") => false,
        Some(other) => return Err(Error::invalid("--rootless", format!("{other:?} is none of true, false, auto"))),
    };
    let explicit_root = root.is_some();
    let root = match root {
        Some(root) if root.as_os_str().is_empty() || root == std::path::Path::new("/") => {
            return Err(Error::new(Kind::Invalid, "Option --root argument should not be set to /"));
        }
        Some(root) => std::path::absolute(&root).map_err(|e| Error::io("find the state root", &e))?,
        None => default_root(program),
    };
    Ok(Globals { program: program.to_string(), root, explicit_root, systemd_cgroup, rootless })
}

/// Called as `runc`, skiff shares runc's state directory.
fn default_root(program: &str) -> PathBuf {
    let name = if program == "runc" { "runc" } else { "skiff" };
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !nix::unistd::geteuid().is_root() && !dir.is_empty() => PathBuf::from(dir).join(name),
        _ => PathBuf::from("/run").join(name),
    }
}

fn dispatch(globals: &Globals, command: Command) -> Result<i32> {
    if command.enters() {
        protect_program();
    }
    match command {
        Command::Create(create) => create.run(globals),
        Command::Start(Id { id }) => start(globals, &id),
        Command::Run(run) => run.run(globals),
        Command::Exec(exec) => exec.run(globals),
        Command::Kill(kill) => kill.run(globals),
        Command::Delete(delete) => delete.run(globals),
        Command::State(Id { id }) => list::state(globals, &id),
        Command::List(list) => list.run(globals),
        Command::Ps(ps) => ps.run(globals),
        Command::Pause(Id { id }) => globals.container(&id)?.pause().map(|()| 0),
        Command::Resume(Id { id }) => globals.container(&id)?.resume().map(|()| 0),
        Command::Update(update) => update.run(globals),
        Command::Checkpoint(checkpoint) => checkpoint.run(globals),
        Command::Restore(restore) => restore.run(globals),
        Command::Events(events) => events.run(globals),
        Command::Plan(plan) => plan.run(globals),
        Command::Spec(spec) => spec.run(),
        Command::Features => {
            println!("{:#}", skiff::features::document());
            Ok(0)
        }
        Command::Help { topic } => help::topic(&globals.program, topic.as_deref()),
    }
}

fn start(globals: &Globals, id: &str) -> Result<i32> {
    let mut container = globals.container(id)?;
    let relay = notify::Relay::bind(&container)?;
    let init = relay.is_some().then(|| container.watch()).transpose()?;
    let pid = container.pid();
    let mut starting = container.start()?;
    if let Err(err) = block_on(&mut starting) {
        // A hook has failed, which ends the container (runtime spec, runtime.md, "Lifecycle").
        if (starting.has_run() || err.step() == Some("startContainer"))
            && let Err(undo) = container.delete(true)
        {
            log::warn!("undo start: {undo}");
        }
        return Err(err);
    }
    match (relay, init) {
        (Some(relay), Some(init)) => relay.run(&init, pid).map(|()| 0),
        _ => Ok(0),
    }
}

/// Before anything of ours enters a container, this program must run from where it cannot be written to.
fn protect_program() {
    let root = nix::unistd::geteuid().is_root();
    let done = if root { skiff::sys::exe::run_read_only() } else { skiff::sys::exe::run_sealed() };
    if let Err(errno) = done {
        log::debug!("run from where nobody can write: {}", skiff::error::errno_text(errno));
    }
}

/// Writes a pid file: all of it or nothing, no newline.
fn write_pid_file(path: &std::path::Path, pid: i32) -> Result<()> {
    let fail = |e| Error::io(format!("write pid file {:?}", path.display().to_string()), &e);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}"));
    let write = || -> std::io::Result<()> {
        let _ = std::fs::remove_file(&temporary);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        std::io::Write::write_all(&mut file, pid.to_string().as_bytes())?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(fail)
}

/// Descriptors that socket activation passes on to this process (sd_listen_fds(3)).
fn listen_fds() -> u32 {
    let number = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    if number("LISTEN_PID") == Some(std::process::id()) { number("LISTEN_FDS").unwrap_or(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_enters_containers_is_protected_whatever_the_processor() {
        for (line, want) in [
            ("skiff create c", true),
            ("skiff run c", true),
            ("skiff exec c true", true),
            ("skiff restore c", true),
            ("skiff start c", false),
            ("skiff checkpoint c", false),
            ("skiff delete c", false),
        ] {
            let matches = whole_line().try_get_matches_from(line.split(' ')).unwrap();
            assert_eq!(Command::from_arg_matches(&matches).unwrap().enters(), want, "{line}");
        }
    }
}
