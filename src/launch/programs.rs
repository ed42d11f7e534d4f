//! Compiled seccomp programs, kept by content: libseccomp takes milliseconds for what is the same profile again and again.
//! They lie below the state root, where only the runtime's own user writes, and what is not exactly as this left it is
//! passed over. Does not live here: compiling (seccomp).

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use sha2::{Digest, Sha256};

use super::seccomp::{self, Filter};
use crate::Result;
use crate::plan::seccomp::Profile;

/// No container can have this id.
const NAME: &str = "@seccomp";
/// Changes with what [`seccomp::compile`] makes of a profile.
const FORMAT: &str = "1";
/// Profiles of a node are few; with more than this, all go.
const MAX_PROGRAMS: usize = 64;
/// BPF_MAXINSNS of linux/bpf_common.h.
const MAX_INSTRUCTIONS: usize = 4096;
const INSTRUCTION: usize = 8;
const DIGEST: usize = 32;

/// The filter of a profile: from below `root` if it is there, else compiled and left there.
pub fn filter(profile: &Profile, root: &Path) -> Result<Filter> {
    let Some(key) = key(profile) else { return seccomp::compile(profile) };
    let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let dir = match directory(root) {
        Ok(dir) => dir,
        Err(errno) => {
            log::debug!("seccomp programs below {root:?}: {errno}");
            return seccomp::compile(profile);
        }
    };
    if let Some(bytes) = read(&dir, &name, &key) {
        return Ok(Filter::new(&bytes, profile));
    }
    let filter = seccomp::compile(profile)?;
    if let Err(err) = write(&dir, root, &name, &key, &filter.bytes()) {
        log::debug!("keep seccomp program {name:?}: {err}");
    }
    Ok(filter)
}

/// Everything that a program depends on.
fn key(profile: &Profile) -> Option<[u8; DIGEST]> {
    let version = libseccomp::ScmpVersion::current().ok()?;
    let rules = serde_json::to_vec(&(
        (FORMAT, std::env::consts::ARCH, version.major, version.minor, version.micro, libseccomp::get_api()),
        (&profile.default_action, &profile.default_errno, &profile.architectures, profile.flags, &profile.syscalls),
    ));
    Some(Sha256::digest(rules.ok()?).into())
}

fn check(key: &[u8], program: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(key).chain_update(program).finalize().into()
}

/// The directory, if it is this user's alone.
fn directory(root: &Path) -> nix::Result<OwnedFd> {
    let path = root.join(NAME);
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = match open(&path, flags, Mode::empty()) {
        Err(Errno::ENOENT) => {
            let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
            made.map_err(|err| Errno::from_raw(err.raw_os_error().unwrap_or(libc::EIO)))?;
            open(&path, flags, Mode::empty())?
        }
        other => other?,
    };
    let stat = fstat(&dir)?;
    if stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o7777 == 0o700 { Ok(dir) } else { Err(Errno::EPERM) }
}

/// The program of a file that is this user's own, of one name, whole and not too long.
fn read(dir: &OwnedFd, name: &str, key: &[u8]) -> Option<Vec<u8>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(dir, name, flags, Mode::empty()).ok()?;
    let stat = fstat(&file).ok()?;
    let own =
        stat.st_mode == (SFlag::S_IFREG.bits() | 0o600) && stat.st_uid == geteuid().as_raw() && stat.st_nlink == 1;
    let len = usize::try_from(stat.st_size).ok()?.checked_sub(DIGEST)?;
    if !own || len == 0 || len % INSTRUCTION != 0 || len > MAX_INSTRUCTIONS * INSTRUCTION {
        return None;
    }
    let mut bytes = Vec::with_capacity(len + DIGEST + 1);
    std::fs::File::from(file).take((len + DIGEST + 1) as u64).read_to_end(&mut bytes).ok()?;
    if bytes.len() != len + DIGEST {
        return None;
    }
    let digest = bytes.split_off(len);
    (digest == check(key, &bytes)).then_some(bytes)
}

/// All of it or nothing: who reads at the same time sees the old file or the new one.
fn write(dir: &OwnedFd, root: &Path, name: &str, key: &[u8], program: &[u8]) -> std::io::Result<()> {
    let entries: Vec<_> = std::fs::read_dir(root.join(NAME))?.flatten().map(|entry| entry.file_name()).collect();
    if entries.len() >= MAX_PROGRAMS {
        for entry in entries {
            let _ = unlinkat(dir, entry.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
    let temporary = format!(".{name}.{}", std::process::id());
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut file = std::fs::File::from(openat(dir, temporary.as_str(), flags, Mode::from_bits_truncate(0o600))?);
    let written = file
        .set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .and_then(|()| file.write_all(&[program, &check(key, program)].concat()))
        .and_then(|()| Ok(renameat(dir, temporary.as_str(), dir, name)?));
    if written.is_err() {
        let _ = unlinkat(dir, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    fn profile(errno: u32) -> Profile {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"seccomp":{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":{errno}}}]}}}}}}"#
        );
        crate::plan::seccomp::plan(&serde_json::from_str(&json).unwrap()).unwrap().unwrap()
    }

    fn files(root: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(root.join(NAME)).unwrap().flatten().map(|entry| entry.path()).collect();
        files.sort();
        files
    }

    /// What is kept of profile 13, and where.
    fn kept(root: &Path) -> (PathBuf, Vec<u8>) {
        filter(&profile(13), root).unwrap();
        let file = files(root).remove(0);
        let bytes = fs::read(&file).unwrap();
        (file, bytes)
    }

    fn found(root: &Path) -> bool {
        let profile = profile(13);
        let key = key(&profile).unwrap();
        let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        read(&directory(root).unwrap(), &name, &key).is_some()
    }

    #[test]
    fn a_profile_is_compiled_once() {
        let root = tempfile::tempdir().unwrap();
        let first = filter(&profile(13), root.path()).unwrap();
        assert_eq!(first, seccomp::compile(&profile(13)).unwrap());
        assert!(found(root.path()));
        assert_eq!(filter(&profile(13), root.path()).unwrap(), first);
        assert_ne!(filter(&profile(14), root.path()).unwrap(), first);
        assert_eq!(files(root.path()).len(), 2);
        assert_eq!(filter(&profile(13), Path::new("/no/such/root")).unwrap(), first);
    }

    #[test]
    fn what_is_not_as_it_was_left_is_compiled_again() {
        let root = tempfile::tempdir().unwrap();
        let (file, good) = kept(root.path());
        // An instruction that allows everything, before the digest of the rest.
        let open = [&[6, 0, 0, 0, 0, 0, 0xff, 0x7f][..], &good[8..]].concat();
        for bad in [&good[..good.len() - 1], &good[8..], &[], &open, &[0; 40], &vec![0; 8 * 4097 + DIGEST]] {
            fs::write(&file, bad).unwrap();
            assert!(!found(root.path()), "{} bytes", bad.len());
            kept(root.path());
            assert_eq!(fs::read(&file).unwrap(), good, "it is put right");
        }
        let away = root.path().join("away");
        let spoils: [&dyn Fn(); 4] = [
            &|| fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap(),
            &|| fs::hard_link(&file, &away).unwrap(),
            &|| {
                fs::rename(&file, &away).unwrap();
                std::os::unix::fs::symlink(&away, &file).unwrap();
            },
            &|| {
                if geteuid().is_root() {
                    std::os::unix::fs::chown(&file, Some(1000), None).unwrap();
                } else {
                    fs::remove_file(&file).unwrap();
                }
            },
        ];
        for (at, spoil) in spoils.into_iter().enumerate() {
            let _ = fs::remove_file(&away);
            spoil();
            assert!(!found(root.path()), "spoil {at}");
            kept(root.path());
            assert!(found(root.path()), "spoil {at}");
        }
    }

    #[test]
    fn a_directory_that_others_may_use_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        kept(root.path());
        fs::set_permissions(root.path().join(NAME), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(directory(root.path()).unwrap_err(), Errno::EPERM);
        filter(&profile(14), root.path()).unwrap();
        assert_eq!(files(root.path()).len(), 1);
    }

    #[test]
    fn their_number_is_bounded() {
        let root = tempfile::tempdir().unwrap();
        for errno in 1..=MAX_PROGRAMS as u32 + 3 {
            filter(&profile(errno), root.path()).unwrap();
        }
        assert_eq!(files(root.path()).len(), 3);
    }
}
