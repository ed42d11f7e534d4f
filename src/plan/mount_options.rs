//! Option strings of `mounts[].options` (runtime spec, config.md, "Mounts"): what is a mount attribute, a propagation, a bind, and what goes to the file system.

use crate::sys::mount::attr;

/// What a list of options asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// MOUNT_ATTR_* to set on the mount itself.
    pub set: u64,
    /// MOUNT_ATTR_* to clear on the mount itself.
    pub clear: u64,
    /// Any attribute of the mount itself is named: a bind mount then has those that are named and no others.
    pub named: bool,
    /// An access time setting is asked for: a bind mount keeps its own otherwise.
    pub atime: bool,
    /// MOUNT_ATTR_* to set on it and everything below it.
    pub rec_set: u64,
    /// MOUNT_ATTR_* to clear on it and everything below it.
    pub rec_clear: u64,
    /// Propagations in order, each with whether it is recursive.
    pub propagation: Vec<(u64, bool)>,
    /// A bind, and whether it is recursive.
    pub bind: Option<bool>,
    /// An idmapped mount, and whether it is recursive.
    pub idmap: Option<bool>,
    /// The content below is copied into the new tmpfs.
    pub tmpcopyup: bool,
    /// Flags of the superblock (`sync`, `dirsync`, ...), by their name in fsconfig(2).
    pub superblock: Vec<&'static str>,
    /// Everything else: for the file system.
    pub data: Vec<String>,
}

impl Options {
    /// True when the mount itself or anything below it gets or loses an attribute.
    pub fn changes_attributes(&self) -> bool {
        self.set | self.clear | self.rec_set | self.rec_clear != 0
    }
}

enum Meaning {
    Set(u64),
    Clear(u64),
    Atime(u64),
    NoAtime,
    Superblock(&'static str),
    NoSuperblock(&'static str),
    Nothing,
}

fn meaning(option: &str) -> Option<Meaning> {
    use Meaning::{Atime, Clear, NoAtime, NoSuperblock, Nothing, Set, Superblock};
    Some(match option {
        "ro" => Set(attr::RDONLY),
        "rw" => Clear(attr::RDONLY),
        "nosuid" => Set(attr::NOSUID),
        "suid" => Clear(attr::NOSUID),
        "nodev" => Set(attr::NODEV),
        "dev" => Clear(attr::NODEV),
        "noexec" => Set(attr::NOEXEC),
        "exec" => Clear(attr::NOEXEC),
        "nodiratime" => Set(attr::NODIRATIME),
        "diratime" => Clear(attr::NODIRATIME),
        "nosymfollow" => Set(attr::NOSYMFOLLOW),
        "symfollow" => Clear(attr::NOSYMFOLLOW),
        "noatime" => Atime(attr::NOATIME),
        "strictatime" => Atime(attr::STRICTATIME),
        "relatime" => Atime(attr::RELATIME),
        // What mount(8) makes of them is nothing, unless they are for a whole tree.
        "atime" | "norelatime" | "nostrictatime" => NoAtime,
        "sync" => Superblock("sync"),
        "dirsync" => Superblock("dirsync"),
        "mand" => Superblock("mand"),
        "lazytime" => Superblock("lazytime"),
        "async" => NoSuperblock("sync"),
        "nomand" => NoSuperblock("mand"),
        "nolazytime" => NoSuperblock("lazytime"),
        "loud" | "silent" | "iversion" | "noiversion" | "defaults" => Nothing,
        _ => return None,
    })
}

const MS_UNBINDABLE: u64 = libc::MS_UNBINDABLE;
const MS_PRIVATE: u64 = libc::MS_PRIVATE;
const MS_SLAVE: u64 = libc::MS_SLAVE;
const MS_SHARED: u64 = libc::MS_SHARED;

/// MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE and whether it is recursive, of a propagation word.
pub fn propagation(word: &str) -> Option<(u64, bool)> {
    let (recursive, plain) = match word {
        "rshared" | "rslave" | "rprivate" | "runbindable" => (true, &word[1..]),
        _ => (false, word),
    };
    let flag = match plain {
        "shared" => MS_SHARED,
        "slave" => MS_SLAVE,
        "private" => MS_PRIVATE,
        "unbindable" => MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag, recursive))
}

/// Reads a list of options. Later ones win over earlier ones.
pub fn parse<S: AsRef<str>>(options: &[S]) -> Options {
    let mut out = Options::default();
    for option in options.iter().map(AsRef::as_ref) {
        if option.is_empty() {
            continue;
        }
        match option {
            "bind" => out.bind = Some(out.bind.unwrap_or(false)),
            "rbind" => out.bind = Some(true),
            "idmap" => out.idmap = Some(false),
            "ridmap" => out.idmap = Some(true),
            "tmpcopyup" => out.tmpcopyup = true,
            "remount" => {}
            _ => {
                if let Some(what) = propagation(option) {
                    out.propagation.push(what);
                } else if let Some(what) = meaning(option) {
                    out.named |= !matches!(what, Meaning::Superblock(_) | Meaning::NoSuperblock(_) | Meaning::Nothing);
                    out.atime |= matches!(what, Meaning::Atime(_) | Meaning::Set(attr::NODIRATIME));
                    apply(what, &mut out.set, &mut out.clear, &mut out.superblock);
                } else if let Some(what) = option.strip_prefix('r').and_then(recursive) {
                    apply(what, &mut out.rec_set, &mut out.rec_clear, &mut Vec::new());
                } else {
                    out.data.push(option.to_string());
                }
            }
        }
    }
    out
}

/// The attributes that have an `r` form: `rro`, `rnosuid`, `ratime`, ...
fn recursive(word: &str) -> Option<Meaning> {
    match meaning(word)? {
        what @ (Meaning::Set(_) | Meaning::Clear(_) | Meaning::Atime(_)) => Some(what),
        Meaning::NoAtime => Some(Meaning::Atime(attr::RELATIME)),
        Meaning::Superblock(_) | Meaning::NoSuperblock(_) | Meaning::Nothing => None,
    }
}

fn apply(what: Meaning, set: &mut u64, clear: &mut u64, superblock: &mut Vec<&'static str>) {
    match what {
        Meaning::Set(bit) => {
            *set |= bit;
            *clear &= !bit;
        }
        Meaning::Clear(bit) => {
            *set &= !bit;
            *clear |= bit;
        }
        Meaning::Atime(value) => {
            // mount_setattr(2) wants the whole mask cleared for a new access time setting.
            *set = *set & !attr::ATIME | value;
            *clear |= attr::ATIME;
        }
        Meaning::Superblock(name) => superblock.push(name),
        Meaning::NoSuperblock(name) => superblock.retain(|other| *other != name),
        Meaning::NoAtime | Meaning::Nothing => {}
    }
}

/// Every option string that this module knows, as `features` and `-info` list them.
pub const KNOWN: [&str; 62] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted_into_their_kinds() {
        let got = parse(&["nosuid", "noexec", "rbind", "ro", "rprivate", "mode=755", "size=64k", "sync"]);
        assert_eq!(got.set, attr::NOSUID | attr::NOEXEC | attr::RDONLY);
        assert_eq!(got.bind, Some(true));
        assert_eq!(got.propagation, [(MS_PRIVATE, true)]);
        assert_eq!(got.data, ["mode=755", "size=64k"]);
        assert_eq!(got.superblock, ["sync"]);
    }

    #[test]
    fn the_last_of_a_pair_wins_and_clearing_is_kept() {
        let got = parse(&["ro", "rw", "nodev", "dev", "exec"]);
        assert_eq!((got.set, got.clear), (0, attr::RDONLY | attr::NODEV | attr::NOEXEC));
        assert_eq!(parse(&["rbind", "bind"]).bind, Some(true));
    }

    #[test]
    fn a_flag_of_the_superblock_is_taken_back() {
        assert!(parse(&["sync", "lazytime", "async", "nolazytime"]).superblock.is_empty());
        assert_eq!(parse(&["async", "sync"]).superblock, ["sync"]);
    }

    #[test]
    fn an_access_time_clears_the_mask() {
        let got = parse(&["noatime", "strictatime"]);
        assert_eq!((got.set, got.clear), (attr::STRICTATIME, attr::ATIME));
        let got = parse(&["rrelatime"]);
        assert_eq!((got.rec_set, got.rec_clear), (attr::RELATIME, attr::ATIME));
    }

    #[test]
    fn recursive_forms_do_not_swallow_other_words() {
        let got = parse(&["rro", "rnosuid", "rexec", "rsync", "rdefaults", "relatime"]);
        assert_eq!(got.rec_set, attr::RDONLY | attr::NOSUID);
        assert_eq!(got.rec_clear, attr::NOEXEC);
        assert_eq!(got.data, ["rsync", "rdefaults"]);
        assert_eq!((got.set, got.clear), (attr::RELATIME, attr::ATIME));
    }

    #[test]
    fn every_known_option_is_understood() {
        for option in KNOWN {
            assert!(parse(&[option]).data.is_empty(), "{option}");
        }
    }
}
