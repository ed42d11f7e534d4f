//! Runtime options: `containerd.runc.v1.Options`, and `runtimeoptions.v1.Options` as CRI sends it for other runtime types.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message, rt};
use containerd_shim_protos::shim::oci::{CheckpointOptions, Options as Runc};
use skiff::criu;
use skiff::{Error, Result};

/// What the options ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// MS_MOVE and chroot instead of pivot_root.
    pub no_pivot_root: bool,
    /// Keep the shim's session keyring.
    pub no_new_keyring: bool,
    /// cgroup to move the shim to.
    pub shim_cgroup: String,
    /// Owner of the stdio pipes.
    pub io_uid: u32,
    /// Group of the stdio pipes.
    pub io_gid: u32,
    /// Base of the state directories.
    pub root: Option<PathBuf>,
    /// The systemd cgroup driver.
    pub systemd_cgroup: bool,
    /// Where CRIU works and logs.
    pub criu_work_path: Option<PathBuf>,
    /// Pods are held by a process of the shim's, without the program of the pause image. A key of skiff's own.
    pub builtin_pause: bool,
}

/// Reads options. A type that is not known is not for us.
pub fn parse(any: Option<&Any>) -> Result<Options> {
    let Some(any) = any.filter(|any| !any.value.is_empty()) else { return Ok(Options::default()) };
    let bad = |cause: String| Error::invalid(format!("options {}", any.type_url), cause);
    match any.type_url.rsplit('/').next().unwrap_or("") {
        "containerd.runc.v1.Options" => {
            let runc = Runc::parse_from_bytes(&any.value).map_err(|e| bad(e.to_string()))?;
            Ok(Options {
                no_pivot_root: runc.no_pivot_root,
                no_new_keyring: runc.no_new_keyring,
                shim_cgroup: runc.shim_cgroup,
                io_uid: runc.io_uid,
                io_gid: runc.io_gid,
                root: Some(runc.root).filter(|root| !root.is_empty()).map(PathBuf::from),
                systemd_cgroup: runc.systemd_cgroup,
                criu_work_path: Some(runc.criu_work_path).filter(|path| !path.is_empty()).map(PathBuf::from),
                builtin_pause: false,
            })
        }
        "runtimeoptions.v1.Options" => {
            let (path, body) = generic(&any.value).map_err(|e| bad(e.to_string()))?;
            let text = match (body, path) {
                (Some(body), _) => String::from_utf8(body).map_err(|e| bad(format!("config_body: {e}")))?,
                (None, Some(path)) => std::fs::read_to_string(&path)
                    .map_err(|e| Error::io(format!("options: read config_path {path:?}"), &e))?,
                (None, None) => String::new(),
            };
            toml(&text).map_err(bad)
        }
        _ => Ok(Options::default()),
    }
}

/// Reads the options of a Checkpoint whose images go to `path`.
pub fn checkpoint(any: Option<&Any>, path: &str) -> Result<criu::Options> {
    let bytes = any.map(|any| any.value.as_slice()).unwrap_or_default();
    let asked = CheckpointOptions::parse_from_bytes(bytes).map_err(|e| Error::invalid("options", e))?;
    let mut empty_namespaces = 0;
    for name in &asked.empty_namespaces {
        empty_namespaces |= match name.as_str() {
            "network" => libc::CLONE_NEWNET as u64,
            other => return Err(Error::invalid("options.empty_namespaces", format!("{other:?} is not supported"))),
        };
    }
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let images = some(asked.image_path).unwrap_or_else(|| path.to_string());
    if images.is_empty() {
        return Err(Error::invalid("path", "must name the directory of the images"));
    }
    Ok(criu::Options {
        images: images.into(),
        work: some(asked.work_path).map(PathBuf::from),
        leave_running: !asked.exit,
        tcp_established: asked.open_tcp,
        external_unix_sockets: asked.external_unix_sockets,
        shell_job: asked.terminal,
        file_locks: asked.file_locks,
        cgroups_mode: some(asked.cgroups_mode),
        empty_namespaces,
        ..criu::Options::default()
    })
}

/// Fields 2, config_path, and 3, config_body.
fn generic(bytes: &[u8]) -> containerd_shim_protos::protobuf::Result<(Option<String>, Option<Vec<u8>>)> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let (mut path, mut body) = (None, None);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            18 => path = Some(input.read_string()?).filter(|path| !path.is_empty()),
            26 => body = Some(input.read_bytes()?).filter(|body| !body.is_empty()),
            tag => rt::skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok((path, body))
}

/// The options table as containerd writes it: `Key = value` lines. Keys that are not known are for others.
fn toml(text: &str) -> std::result::Result<Options, String> {
    let mut out = Options::default();
    for (at, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || line.starts_with(['#', '[']) {
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(|| format!("line {}: {line:?} has no value", at + 1))?;
        let (key, value) = (key.trim(), value.trim());
        let flag = || match value {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(format!("{key}: {value} is neither true nor false")),
        };
        let number = || value.parse::<u32>().map_err(|_| format!("{key}: {value} is not an id"));
        let string = || {
            let quoted = |quote: char| value.strip_prefix(quote).and_then(|v| v.strip_suffix(quote));
            quoted('"').or_else(|| quoted('\'')).map(str::to_string).ok_or(format!("{key}: {value} is not a string"))
        };
        match key {
            "NoPivotRoot" => out.no_pivot_root = flag()?,
            "NoNewKeyring" => out.no_new_keyring = flag()?,
            "SystemdCgroup" => out.systemd_cgroup = flag()?,
            "BuiltinPause" => out.builtin_pause = flag()?,
            "ShimCgroup" => out.shim_cgroup = string()?,
            "IoUid" => out.io_uid = number()?,
            "IoGid" => out.io_gid = number()?,
            "CriuWorkPath" => out.criu_work_path = Some(string()?).filter(|path| !path.is_empty()).map(PathBuf::from),
            "Root" => out.root = Some(string()?).filter(|root| !root.is_empty()).map(PathBuf::from),
            _ => {}
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any { type_url: type_url.into(), value, ..Any::default() }
    }

    #[test]
    fn runc_options_are_read() {
        let runc = Runc { no_pivot_root: true, root: "/r".into(), io_uid: 7, ..Runc::default() };
        let options = parse(Some(&any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap()))).unwrap();
        assert!(options.no_pivot_root);
        assert_eq!((options.root, options.io_uid), (Some("/r".into()), 7));
    }

    #[test]
    fn generic_options_carry_a_table() {
        let mut value = vec![26, 0];
        let body = "SystemdCgroup = true\nBuiltinPause = true\nBinaryName = \"x\"\n# c\nIoUid = 5\nRoot = '/a b'\n";
        value[1] = body.len() as u8;
        value.extend(body.bytes());
        let options = parse(Some(&any("runtimeoptions.v1.Options", value))).unwrap();
        assert_eq!((options.systemd_cgroup, options.io_uid, options.root), (true, 5, Some("/a b".into())));
        assert!(options.builtin_pause);
        assert!(toml("IoUid = x").unwrap_err().starts_with("IoUid: "));
    }

    #[test]
    fn absent_empty_and_foreign_options_are_defaults() {
        assert_eq!(parse(None).unwrap(), Options::default());
        assert_eq!(parse(Some(&any("containerd.runc.v1.Options", Vec::new()))).unwrap(), Options::default());
        assert_eq!(parse(Some(&any("x.Options", vec![0xff]))).unwrap(), Options::default());
        assert!(parse(Some(&any("containerd.runc.v1.Options", vec![0xff]))).is_err());
    }
}
