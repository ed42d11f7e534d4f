//! What a child tells its parent: `(step, item, errno)` records on a socket. The parent, which has the plan, writes the sentence.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

macro_rules! steps {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// The steps of a birth. `item` of a failure counts within the plan's list that the step goes through.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Step { $($(#[doc = $doc])* $name,)* }

        impl Step {
            const ALL: &'static [Step] = &[$(Step::$name,)*];
        }
    };
}

steps! {
    /// Wait for the parent's word.
    Parent,
    /// Enter the cgroup by door `item`.
    Cgroup,
    /// Set oom_score_adj.
    OomScore,
    /// Join namespace `item`.
    Join,
    /// Make the remaining namespaces.
    Namespaces,
    /// Become root of the user namespace.
    NamespaceRoot,
    /// Make a time namespace with offsets.
    TimeOffsets,
    /// Bring `lo` up.
    Loopback,
    /// Set the host name.
    Hostname,
    /// Set the NIS domain name.
    Domainname,
    /// Join a new session keyring.
    Keyring,
    /// Change the propagation of the host's tree in the new mount namespace.
    HostPropagation,
    /// Open and bind the root file system.
    Rootfs,
    /// Open the source of mount `item`.
    MountSource,
    /// Open or make the destination of mount `item`.
    MountTarget,
    /// The destination of mount `item` is not where the spec puts it.
    MountPlace,
    /// Make or attach mount `item`.
    Mount,
    /// Set the attributes or the propagation of mount `item`.
    MountAttributes,
    /// Copy what tmpfs `item` covers into it.
    CopyUp,
    /// Make device `item`.
    Device,
    /// Make symlink `item` of `/dev`.
    Symlink,
    /// Make the terminal.
    Console,
    /// Run createContainer hook `item`.
    CreateContainerHook,
    /// Make the rootfs the root.
    PivotRoot,
    /// Make the rootfs the root without a mount namespace.
    Chroot,
    /// Set the propagation of the root.
    RootPropagation,
    /// Make the root read-only.
    ReadonlyRoot,
    /// Open a procfs of our own.
    Procfs,
    /// Write sysctl `item`.
    Sysctl,
    /// Make path `item` read-only.
    ReadonlyPath,
    /// Hide path `item`.
    MaskedPath,
    /// Make the working directory.
    MakeCwd,
    /// Set no_new_privs.
    NoNewPrivs,
    /// Set the scheduling policy.
    Scheduler,
    /// Set the I/O priority.
    IoPriority,
    /// Set the processors to run on.
    Affinity,
    /// Set the execution domain.
    Personality,
    /// Set the NUMA policy.
    MemoryPolicy,
    /// Set the AppArmor profile.
    AppArmor,
    /// Set the SELinux label.
    SeLinux,
    /// Install the seccomp filter.
    Seccomp,
    /// Drop capability `item` from the bounding set.
    Bounding,
    /// Set the capability sets.
    Capabilities,
    /// Set the supplementary groups.
    Groups,
    /// Set the group.
    Gid,
    /// Set the user.
    Uid,
    /// Give the standard streams to the user.
    StdioOwner,
    /// Put the standard streams into place.
    Stdio,
    /// Set limit `item`.
    Rlimit,
    /// Change into the working directory.
    Chdir,
    /// The working directory is outside of the root.
    CwdOutside,
    /// Find the program.
    Program,
    /// Wait at the gate.
    Gate,
    /// Run startContainer hook `item`.
    StartContainerHook,
    /// Mark the descriptors.
    Descriptors,
    /// execve.
    Execve,
}

impl Step {
    /// The part of a create that it belongs to.
    pub fn part(self) -> &'static str {
        use Step as S;
        match self {
            S::Parent | S::Gate => "gate",
            S::Cgroup => "cgroup",
            S::Join | S::Namespaces | S::NamespaceRoot | S::TimeOffsets => "namespaces",
            S::Loopback => "network",
            S::Hostname | S::Domainname | S::Keyring => "names",
            S::HostPropagation | S::Rootfs => "rootfs",
            S::MountSource | S::MountTarget | S::MountPlace | S::Mount | S::MountAttributes | S::CopyUp => "mounts",
            S::Device | S::Symlink | S::Console => "devices",
            S::CreateContainerHook => "createContainer",
            S::StartContainerHook => "startContainer",
            S::PivotRoot | S::Chroot | S::RootPropagation => "root",
            S::Sysctl => "sysctl",
            S::ReadonlyRoot | S::ReadonlyPath | S::MaskedPath => "seal",
            S::Seccomp => "seccomp",
            S::Bounding | S::Capabilities => "capabilities",
            S::Program | S::Descriptors | S::Execve => "execve",
            _ => "process",
        }
    }
}

/// A failed step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which step.
    pub step: Step,
    /// Which one of several.
    pub item: u32,
    /// Why; 0 when `detail` says it all.
    pub errno: i32,
    /// What the kernel or a hook said beyond the errno.
    pub detail: String,
}

impl Failure {
    /// A failure of `step` with `errno`.
    pub fn new(step: Step, item: usize, errno: Errno) -> Self {
        Self { step, item: item as u32, errno: errno as i32, detail: String::new() }
    }

    /// With what the kernel or a hook said.
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }
}

/// Names the step of a failed system call.
pub trait At<T> {
    /// Fails in `step`.
    fn at(self, step: Step) -> Result<T, Failure>;
    /// Fails in `step`, at `item` of its list.
    fn at_item(self, step: Step, item: usize) -> Result<T, Failure>;
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.at_item(step, 0)
    }

    fn at_item(self, step: Step, item: usize) -> Result<T, Failure> {
        self.map_err(|errno| Failure::new(step, item, errno))
    }
}

/// A record from the child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The user namespace exists: its maps are to be written.
    NeedMaps,
    /// The real init was born to the same parent; its pidfd comes with this record. The sender exits.
    Born,
    /// The mounts are made: prestart and createRuntime hooks are to be run.
    Mounted,
    /// The pty master comes with this record.
    Console,
    /// The detached mount that comes with this record, of the mount with this place in the plan, is to get its id maps.
    NeedIdmap(u32),
    /// The seccomp filter is on; this descriptor of the child is its listener.
    Listener(i32),
    /// It waits at the gate.
    Ready,
    /// execve comes next: a closed socket after this record means that it succeeded.
    Execing,
    /// A step failed; the child exits.
    Failed(Failure),
}

/// The most descriptors that come with a word of the parent's: one for each hierarchy of cgroups.
const MAX_FDS: usize = 64;

/// The largest record, and so the longest detail, in bytes.
pub const MAX_RECORD: usize = 4096;

impl Record {
    /// The record as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, failure) = match self {
            Record::NeedMaps => (0, None),
            Record::Born => (1, None),
            Record::Mounted => (2, None),
            Record::Console => (3, None),
            Record::Ready => (4, None),
            Record::Execing => (5, None),
            Record::Failed(failure) => (6, Some(failure)),
            Record::Listener(_) => (7, None),
            Record::NeedIdmap(_) => (8, None),
        };
        let mut out = vec![kind];
        if let Record::Listener(number) = self {
            out.extend(number.to_le_bytes());
        }
        if let Record::NeedIdmap(at) = self {
            out.extend(at.to_le_bytes());
        }
        if let Some(f) = failure {
            out.push(f.step as u8);
            out.extend(f.item.to_le_bytes());
            out.extend(f.errno.to_le_bytes());
            out.extend(f.detail.bytes().take(MAX_RECORD - 10));
        }
        out
    }

    /// Reads a record; None when it is none.
    pub fn decode(bytes: &[u8]) -> Option<Record> {
        Some(match (bytes.first()?, bytes.len()) {
            (0, 1) => Record::NeedMaps,
            (1, 1) => Record::Born,
            (2, 1) => Record::Mounted,
            (3, 1) => Record::Console,
            (4, 1) => Record::Ready,
            (5, 1) => Record::Execing,
            (7, 5) => Record::Listener(i32::from_le_bytes(bytes[1..5].try_into().ok()?)),
            (8, 5) => Record::NeedIdmap(u32::from_le_bytes(bytes[1..5].try_into().ok()?)),
            (6, 10..) => Record::Failed(Failure {
                step: *Step::ALL.get(usize::from(bytes[1]))?,
                item: u32::from_le_bytes(bytes[2..6].try_into().ok()?),
                errno: i32::from_le_bytes(bytes[6..10].try_into().ok()?),
                detail: String::from_utf8_lossy(&bytes[10..]).into_owned(),
            }),
            _ => return None,
        })
    }
}

/// The child's end: records go out here, and the parent's word comes in.
#[derive(Debug)]
pub struct Report(OwnedFd);

impl AsRawFd for Report {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Report {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Report {
    /// On this socket or pipe.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a record. write(2), because a seccomp filter that is on already lets it through.
    pub fn send(&self, record: &Record) -> nix::Result<()> {
        nix::unistd::write(&self.0, &record.encode()).map(drop)
    }

    /// Sends a record with a descriptor.
    pub fn send_fd(&self, record: &Record, fd: BorrowedFd<'_>) -> nix::Result<()> {
        let bytes = record.encode();
        let fds: [RawFd; 1] = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], &control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }

    /// Waits for the parent's word, and for the descriptors that come with it.
    pub fn wait_for_fds(&self) -> nix::Result<Vec<OwnedFd>> {
        let mut byte = [0];
        let mut space = cmsg_space!([RawFd; MAX_FDS]);
        loop {
            let mut iov = [std::io::IoSliceMut::new(&mut byte)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            if message.bytes == 0 {
                return Err(Errno::ECONNRESET);
            }
            let mut out = Vec::new();
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    out.extend(fds.into_iter().filter_map(|fd| crate::sys::process::take_fd(fd).ok()));
                }
            }
            return Ok(out);
        }
    }

    /// Waits for the parent's word. A parent that is gone ends the birth.
    pub fn wait(&self) -> nix::Result<()> {
        wait(self.0.as_fd())
    }
}

/// Reads one byte; ECONNRESET at the end of the stream.
pub fn wait(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let mut byte = [0];
    loop {
        match nix::unistd::read(fd, &mut byte) {
            Err(Errno::EINTR) => {}
            Ok(0) => return Err(Errno::ECONNRESET),
            other => return other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_socket() {
        let failure = Failure::new(Step::Execve, 7, Errno::ENOEXEC).detail("why");
        for record in [Record::NeedMaps, Record::Born, Record::Mounted, Record::Console, Record::Ready, Record::Execing]
            .into_iter()
            .chain([Record::Failed(failure), Record::Listener(7), Record::NeedIdmap(300)])
        {
            assert_eq!(Record::decode(&record.encode()), Some(record));
        }
    }

    #[test]
    fn garbage_is_no_record() {
        for bytes in [&b""[..], &[9], &[0, 0], &[6, 0], &[6, 255, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(Record::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_long_detail_is_cut() {
        let failure = Failure::new(Step::Mount, 0, Errno::EINVAL).detail("x".repeat(3 * MAX_RECORD));
        assert_eq!(Record::Failed(failure).encode().len(), MAX_RECORD);
    }
}
