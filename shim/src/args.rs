//! The shim's command line in Go's flag syntax, as containerd writes it (pkg/shim/util.go): flags, then the action.

use std::path::PathBuf;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start or find the daemon of a container's group, print its address, become it.
    Start,
    /// Clean up after a container.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
}

/// The parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// `-namespace`.
    pub namespace: String,
    /// `-id`.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-bundle`.
    pub bundle: Option<PathBuf>,
    /// `-debug`.
    pub debug: bool,
}

impl Args {
    /// Parses everything after the program's name.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
        let mut args = Args {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        let (mut action, mut info, mut version) = (None, false, false);
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-').map(|flag| flag.strip_prefix('-').unwrap_or(flag)) else {
                action = Some(word);
                break;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (flag, None),
            };
            let on =
                || value.as_deref().is_none_or(|value| matches!(value, "true" | "1" | "t" | "T" | "TRUE" | "True"));
            match name {
                "debug" => args.debug = on(),
                "info" => info = on(),
                "v" | "version" => version = on(),
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" | "debug-socket" => {
                    let value = value.or_else(|| words.next()).ok_or(format!("flag needs an argument: -{name}"))?;
                    match name {
                        "namespace" => args.namespace = value,
                        "id" => args.id = value,
                        "address" => args.address = value,
                        "bundle" => args.bundle = Some(value.into()),
                        _ => {}
                    }
                }
                _ => return Err(format!("flag provided but not defined: -{name}")),
            }
        }
        args.action = match (version, info, action.as_deref()) {
            (true, ..) => Action::Version,
            (_, true, _) => Action::Info,
            (_, _, Some("start")) => Action::Start,
            (_, _, Some("delete")) => Action::Delete,
            (_, _, Some(other)) => return Err(format!("unknown action {other:?}: start and delete are known")),
            (_, _, None) => return Err("an action is missing: start and delete are known".into()),
        };
        if matches!(args.action, Action::Start | Action::Delete) {
            if args.namespace.is_empty() {
                return Err("shim namespace cannot be empty: -namespace".into());
            }
            if args.namespace.contains('/') || args.namespace.starts_with('.') {
                return Err(format!("-namespace: {:?} is not a namespace", args.namespace));
            }
            skiff::state::check_id(&args.id).map_err(|err| format!("-id: {err}"))?;
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split_whitespace().map(str::to_string))
    }

    #[test]
    fn containerds_command_lines_are_read() {
        let args =
            parse("-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id a -debug start")
                .unwrap();
        assert_eq!((args.action, args.namespace.as_str(), args.id.as_str()), (Action::Start, "k8s.io", "a"));
        assert!(args.debug);
        let args = parse("-namespace n -address a -publish-binary e -id i -bundle /b delete").unwrap();
        assert_eq!((args.action, args.bundle), (Action::Delete, Some("/b".into())));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("--id=x -namespace=n start").unwrap().id, "x");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, want) in [
            ("-id a start", "shim namespace cannot be empty"),
            ("-namespace n start", "-id: container id cannot be empty"),
            ("-namespace n -id ../x start", "-id: invalid container ID format"),
            ("-namespace ../n -id x start", "-namespace: \"../n\""),
            ("-namespace n -id a serve", "unknown action \"serve\""),
            ("-namespace n -id a", "an action is missing"),
            ("-x start", "flag provided but not defined: -x"),
            ("-id", "flag needs an argument: -id"),
        ] {
            let err = parse(line).unwrap_err();
            assert!(err.starts_with(want), "{line}: {err}");
        }
    }
}
