//! `delete`: cleans up what is left of a container when its shim is gone. containerd also runs it after every ordinary
//! removal, so finding nothing is the usual case. It knows only what is in files.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use skiff::container::Container;
use skiff::{Error, Kind, Result};

use crate::args::Args;
use crate::events::timestamp;
use crate::{group, rootfs, task};

/// The file of a bundle that names the base of its state directories, when that is not the default.
const ROOT_FILE: &str = "skiff-root";

/// Remembers `root` for a later `delete`.
pub fn remember_root(bundle: &Path, root: &Path) -> Result<()> {
    let path = bundle.join(ROOT_FILE);
    std::fs::write(&path, root.as_os_str().as_encoded_bytes())
        .map_err(|e| Error::io(format!("write {:?}", path.display().to_string()), &e))
}

/// A shim that was killed leaves its socket behind. One that still serves others has it in use. True when the shim of
/// `bundle` has been killed.
fn remove_dead_socket(bundle: &Path) -> bool {
    let Ok(address) = std::fs::read_to_string(bundle.join("address")) else { return false };
    let Some(socket) = address.strip_prefix("unix://").map(Path::new) else { return false };
    let refused = UnixStream::connect(socket).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
    if refused {
        let _ = std::fs::remove_file(socket);
    }
    refused
}

/// The other containers of a dead shim: for members of a pod that were never started by themselves containerd asks
/// nobody to clean up.
fn remove_members(root: &Path, group: &str, leader: &str) {
    for container in Container::list(root).unwrap_or_default() {
        let annotations = container.annotations();
        let name = group::by_annotations(|name| annotations.get(name).map(String::as_str));
        if name != Some(group) || container.id() == leader {
            continue;
        }
        let bundle = container.bundle().to_path_buf();
        let removed = container.kill(libc::SIGKILL, true).and_then(|()| container.delete(true));
        if let Err(err) = removed.and_then(|()| rootfs::unmount_all(&bundle)) {
            eprintln!("clean up after {:?}: {err}", bundle.display().to_string());
        }
    }
}

/// Cleans up. The answer is the DeleteResponse that containerd reads from stdout.
pub fn run(args: &Args) -> Result<Vec<u8>> {
    let cwd = std::env::current_dir().map_err(|e| Error::io("find the bundle", &e))?;
    let bundle = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => cwd.parent().unwrap_or(&cwd).join(&args.id),
    };
    let root =
        std::fs::read_to_string(bundle.join(ROOT_FILE)).map_or_else(|_| task::DEFAULT_ROOT.into(), PathBuf::from);
    let root = root.join(&args.namespace);
    let pid = match Container::load(&root, &args.id) {
        Ok(container) => {
            let pid = container.pid();
            container.kill(libc::SIGKILL, true)?;
            container.delete(true)?;
            pid
        }
        Err(err) if err.kind() == Kind::NotFound => {
            Container::remove_leftover(&root, &args.id)?;
            0
        }
        Err(err) => return Err(err),
    };
    rootfs::unmount_all(&bundle)?;
    crate::sandbox::remove_files(&bundle);
    if remove_dead_socket(&bundle) {
        let group = group::of(&bundle, &args.id).unwrap_or_else(|_| args.id.clone());
        remove_members(&root, &group, &args.id);
    }
    let response = DeleteResponse {
        pid: pid.unsigned_abs(),
        exit_status: 137,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    response.write_to_bytes().map_err(|e| Error::invalid("DeleteResponse", e))
}
