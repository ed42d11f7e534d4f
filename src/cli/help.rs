//! Help and version texts, in the layout that runc's callers read.

use clap::Command;
use skiff::{Error, Kind, Result};

use super::whole_line;

/// `--version`: go-runc reads these lines by their first words.
pub fn version(program: &str) -> String {
    let spec = skiff::container::OCI_VERSION;
    let seccomp = libseccomp::ScmpVersion::current().map_or_else(|_| "unknown".to_string(), |v| v.to_string());
    format!(
        "{program} version {}\ncommit: {}\nspec: {spec}\nlibseccomp: {seccomp}\n",
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_VERSION")
    )
}

/// The main help.
pub fn main(program: &str) -> String {
    let mut out = format!(
        "NAME:\n   {program} - Open Container Initiative runtime\n\n\
         {program} makes and runs containers from OCI bundles: a directory with a config.json and a\n\
         root file system. It takes runc's commands and flags.\n\n\
         To run a container from the bundle in the current directory:\n\n    # {program} run <container-id>\n\n\
         USAGE:\n   {program} [global options] command [command options] [arguments...]\n\nVERSION:\n   {}\n\nCOMMANDS:\n",
        version(program).trim_end().trim_start_matches(&format!("{program} version "))
    );
    for command in whole_line().get_subcommands() {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let name = if command.get_name() == "help" { "help, h" } else { command.get_name() };
        out += &format!("   {name:<11} {about}\n");
    }
    out += "\nGLOBAL OPTIONS:\n";
    for (flag, about) in [
        ("--debug", "enable debug logging"),
        ("--log value", "set the log file to write logs to (default is '/dev/stderr')"),
        ("--log-format value", "set the log format ('text' (default), or 'json')"),
        ("--root value", "root directory for storage of container state (this should be located in tmpfs)"),
        ("--systemd-cgroup", "enable systemd cgroup support, expects cgroupsPath to be of form \"slice:prefix:name\""),
        ("--rootless value", "ignore cgroup permission errors ('true', 'false', or 'auto')"),
        ("--help, -h", "show help"),
        ("--version, -v", "print the version"),
    ] {
        out += &format!("   {flag:<19} {about}\n");
    }
    out
}

/// `help TOPIC`.
pub fn topic(program: &str, topic: Option<&str>) -> Result<i32> {
    let Some(topic) = topic else {
        print!("{}", main(program));
        return Ok(0);
    };
    match whole_line().find_subcommand(topic) {
        Some(command) => {
            print!("{}", one(program, command));
            Ok(0)
        }
        None => Err(Error::new(Kind::Invalid, format!("No help topic for '{topic}'"))),
    }
}

fn one(program: &str, command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let usage: String = command.get_positionals().map(|arg| format!(" <{}>", arg.get_id())).collect();
    let mut out = format!(
        "NAME:\n   {program} {name} - {about}\n\nUSAGE:\n   {program} {name} [command options]{usage}\n\nOPTIONS:\n",
        name = command.get_name()
    );
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long().filter(|long| *long != "help") else { continue };
        let value = if arg.get_action().takes_values() { " value" } else { "" };
        let short = arg.get_short().map(|short| format!(", -{short}{value}")).unwrap_or_default();
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let flag = format!("--{long}{value}{short}");
        out += &format!("   {flag:<32} {help}\n");
    }
    out
}

/// A command line that cannot be read; or `--help` of a command, which is one to clap.
pub fn usage_error(program: &str, err: &clap::Error) -> i32 {
    use clap::error::ErrorKind;
    let name = std::env::args().find(|word| whole_line().find_subcommand(word).is_some());
    let root = whole_line();
    let command = name.as_deref().and_then(|name| root.find_subcommand(name));
    let asked = std::env::args().any(|word| word == "--help" || word == "-h");
    if asked && err.kind() == ErrorKind::UnknownArgument {
        match command {
            Some(command) => print!("{}", one(program, command)),
            None => print!("{}", main(program)),
        }
        return 0;
    }
    if err.kind() == ErrorKind::InvalidSubcommand && asked {
        let topic = err.get(clap::error::ContextKind::InvalidSubcommand).map(ToString::to_string).unwrap_or_default();
        eprintln!("{program}: No help topic for '{topic}'");
        return 3;
    }
    let text = err.to_string();
    let cause = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    let cause = match (err.kind(), command) {
        (ErrorKind::MissingRequiredArgument | ErrorKind::UnknownArgument, Some(command))
            if cause.contains("required arguments") || !cause.contains("'-") =>
        {
            let wanted = command.get_positionals().count();
            format!("{:?} requires exactly {wanted} argument(s)", command.get_name())
        }
        _ => cause.to_string(),
    };
    eprintln!("{program}: {cause}");
    1
}
