//! What a process does to itself on its way to execve(2): descriptors, signals, credentials, limits, keyring, seccomp.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::errno::Errno;

/// Capability bit sets, bit n for capability number n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapSets {
    /// Effective set.
    pub effective: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Inheritable set.
    pub inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

/// capset(2) of the calling thread.
pub fn capset(sets: CapSets) -> nix::Result<()> {
    // _LINUX_CAPABILITY_VERSION_3: two words per set, low word first.
    let header = CapHeader { version: 0x2008_0522, pid: 0 };
    let word = |shift: u32| [sets.effective, sets.permitted, sets.inheritable].map(|set| (set >> shift) as u32);
    let data = [word(0), word(32)];
    // SAFETY: header and data have the layout of cap_user_header_t and two cap_user_data_t.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

fn prctl(option: libc::c_int, args: [libc::c_ulong; 4]) -> nix::Result<i32> {
    // SAFETY: only options whose arguments are plain numbers are passed by the callers below.
    Errno::result(unsafe { libc::prctl(option, args[0], args[1], args[2], args[3]) })
}

/// PR_CAPBSET_DROP.
pub fn drop_bounding(cap: u8) -> nix::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, [cap.into(), 0, 0, 0]).map(drop)
}

/// PR_CAPBSET_READ: whether `cap` is in the bounding set; EINVAL past the last capability of the kernel.
pub fn in_bounding(cap: u8) -> nix::Result<bool> {
    prctl(libc::PR_CAPBSET_READ, [cap.into(), 0, 0, 0]).map(|v| v == 1)
}

/// PR_CAP_AMBIENT_RAISE.
pub fn raise_ambient(cap: u8) -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, [libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, cap.into(), 0, 0]).map(drop)
}

/// PR_CAP_AMBIENT_CLEAR_ALL.
pub fn clear_ambient() -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, [libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0, 0, 0]).map(drop)
}

/// PR_SET_KEEPCAPS.
pub fn keep_caps(on: bool) -> nix::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, [on.into(), 0, 0, 0]).map(drop)
}

/// PR_SET_DUMPABLE: off, nobody but a host root can look into this process or trace it.
pub fn set_dumpable(on: bool) -> nix::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, [on.into(), 0, 0, 0]).map(drop)
}

/// PR_SET_NO_NEW_PRIVS.
pub fn set_no_new_privs() -> nix::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0]).map(drop)
}

/// PR_SET_PDEATHSIG: the signal that this process gets when its parent ends.
pub fn set_parent_death_signal(signal: i32) -> nix::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, [signal as libc::c_ulong, 0, 0, 0]).map(drop)
}

/// PR_SET_CHILD_SUBREAPER.
pub fn set_child_subreaper(on: bool) -> nix::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, [on.into(), 0, 0, 0]).map(drop)
}

/// Gives memory that is free back to the kernel: malloc_trim(3), and the stack below what is in use now. For the main
/// thread.
#[inline(never)]
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; the C library's own heap is consistent between calls.
    unsafe {
        libc::malloc_trim(0)
    };
    // This small frame, and that of the call, lie in the margin; the deepest that this program has are well above the end.
    const MARGIN: usize = 1 << 10;
    const DEPTH: usize = 1 << 20;
    const PAGE: usize = 4 << 10;
    let here = 0u8;
    let end = (&raw const here as usize - MARGIN) & !(PAGE - 1);
    // SAFETY: below the stack pointer nothing is in use (System V ABI; the red zone is in the margin). What is not mapped
    // is skipped with an error.
    unsafe { libc::madvise((end - DEPTH) as *mut libc::c_void, DEPTH, libc::MADV_DONTNEED) };
}

/// PR_SET_THP_DISABLE.
pub fn set_thp_disable(on: bool) -> nix::Result<()> {
    prctl(libc::PR_SET_THP_DISABLE, [on.into(), 0, 0, 0]).map(drop)
}

/// PR_SCHED_CORE_CREATE for this process group: its members share cores with nobody else.
pub fn core_scheduling() -> nix::Result<()> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const CREATE: libc::c_ulong = 1;
    const PROCESS_GROUP: libc::c_ulong = 2;
    prctl(PR_SCHED_CORE, [CREATE, 0, PROCESS_GROUP, 0]).map(drop)
}

/// setgroups(2), of the calling thread alone as there is no other.
pub fn setgroups(groups: &[u32]) -> nix::Result<()> {
    // SAFETY: pointer and length describe `groups`.
    Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

/// setresuid(2) with the same id three times.
pub fn setuid(uid: u32) -> nix::Result<()> {
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// setresgid(2) with the same id three times.
pub fn setgid(gid: u32) -> nix::Result<()> {
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) }).map(drop)
}

/// prlimit64(2): sets `resource` (RLIMIT_*) of `pid`, 0 for this process.
pub fn prlimit(pid: i32, resource: u32, soft: u64, hard: u64) -> nix::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    let ret =
        // SAFETY: `limit` outlives the call; the old limit is not asked for.
        unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, &raw const limit, std::ptr::null_mut::<libc::rlimit64>()) };
    Errno::result(ret).map(drop)
}

/// dup2 of `from` onto the number `to`, without CLOEXEC. `to` must not be a descriptor that a value of this process owns, or
/// that it uses before it execs.
pub fn place_fd(from: BorrowedFd<'_>, to: RawFd) -> nix::Result<()> {
    if from.as_raw_fd() == to {
        return set_cloexec(to, false);
    }
    // SAFETY: takes no pointer; by the caller's contract nobody uses what `to` was.
    Errno::result(unsafe { libc::dup2(from.as_raw_fd(), to) }).map(drop)
}

/// Standard stream 0, 1 or 2, which this process has from its birth on to its end.
///
/// # Panics
/// With another number.
pub fn standard_stream(number: RawFd) -> BorrowedFd<'static> {
    assert!((0..3).contains(&number), "not a standard stream");
    // SAFETY: nothing in this crate closes 0, 1 or 2; a closed one yields EBADF, not another file of ours.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Sets or clears FD_CLOEXEC of the descriptor with number `fd`.
pub fn set_cloexec(fd: RawFd, on: bool) -> nix::Result<()> {
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, if on { libc::FD_CLOEXEC } else { 0 }) }).map(drop)
}

/// True when the number `fd` is an open descriptor that this process was started with: what it opens itself is closed on exec.
pub fn is_inherited(fd: RawFd) -> bool {
    // SAFETY: takes no pointer.
    unsafe { libc::fcntl(fd, libc::F_GETFD) == 0 }
}

/// Takes ownership of a descriptor that this process was started with.
///
/// # Safety contract
/// The number must be one that the caller's start-up protocol names and be taken once.
pub fn take_fd(fd: RawFd) -> nix::Result<OwnedFd> {
    set_cloexec(fd, true)?;
    // SAFETY: fcntl has just shown that it is open; by the start-up protocol nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes a zero byte to the descriptor of the caller's with this number, and closes it.
pub fn write_byte_and_close(fd: RawFd) {
    // SAFETY: the byte outlives the call; the caller was given the number for this alone.
    unsafe {
        libc::write(fd, [0u8].as_ptr().cast(), 1);
        libc::close(fd);
    }
}

/// close_range(2) with CLOSE_RANGE_CLOEXEC: everything from `first` on goes away at execve.
pub fn cloexec_from(first: u32) -> nix::Result<()> {
    // SAFETY: takes no pointer; no descriptor is closed before execve.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Closes every descriptor from 3 on but those in `keep`, which it sorts. For a child that goes on by itself: nothing of
/// this process that owns one that is closed may be used afterwards.
pub fn close_others(keep: &mut [RawFd]) -> nix::Result<()> {
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.iter().map(|fd| *fd as u32) {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: takes no pointer; by the caller's contract nobody uses what is closed.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// waitid(2) with P_PIDFD: the exit code, or 128 and the number of the signal, real-time ones too; None when `flags` have
/// WNOHANG and it has not ended.
pub fn wait_exit(pidfd: BorrowedFd<'_>, flags: libc::c_int) -> nix::Result<Option<u32>> {
    // SAFETY: all zeroes is a valid siginfo.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` outlives the call.
    let done =
        unsafe { libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, &raw mut info, libc::WEXITED | flags) };
    Errno::result(done)?;
    // SAFETY: waitid has filled in the fields of SIGCHLD, or left the pid zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let status = status.unsigned_abs();
    Ok((pid != 0).then_some(if info.si_code == libc::CLD_EXITED { status } else { 128 + status }))
}

/// Whether a child of this process has ended and waits to be reaped.
pub fn has_zombies() -> bool {
    // SAFETY: all zeroes is a valid siginfo.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` outlives the call.
    let done = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) };
    // SAFETY: likewise.
    done == 0 && unsafe { info.si_pid() } != 0
}

/// Ends this process at any of these signals, with 128 and its number, until the next execve.
pub fn exit_on(signals: &[i32]) {
    extern "C" fn exit(signal: i32) {
        exit_now(128 + signal);
    }
    // SAFETY: the kernel's sigaction struct is plain data.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = exit as extern "C" fn(i32) as usize;
    for signal in signals {
        // SAFETY: `action` outlives the call; the handler calls nothing but _exit(2).
        unsafe { libc::sigaction(*signal, &raw const action, std::ptr::null_mut()) };
    }
}

/// Gives every signal its default action and an empty mask: Rust ignores SIGPIPE, and a mask survives execve.
pub fn reset_signals() {
    // SAFETY: the kernel's sigaction struct is plain data; all zeroes is SIG_DFL with an empty mask and no flags.
    let action: libc::sigaction = unsafe { std::mem::zeroed() };
    // Only what is ignored survives an execve (signal(7)): handlers need no reset.
    let ignored = ignored_signals();
    for signal in (1..=64).filter(|signal| ignored & (1 << (signal - 1)) != 0) {
        // SAFETY: `action` outlives the call; numbers that cannot be set are refused without effect.
        unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    }
    unblock_signals();
}

/// The permitted capabilities of this process, bit n for number n.
pub fn permitted() -> nix::Result<u64> {
    let set = caps::read(None, caps::CapSet::Permitted).map_err(|_| Errno::EPERM)?;
    Ok(set.iter().fold(0, |bits, cap| bits | 1 << cap.index()))
}

/// Zeroes the strings of the environment that this process was started with, which others may read in /proc. For a child that
/// is about to execve with another one.
pub fn forget_environment() {
    // SAFETY: one thread, which reads no variable any more; the array ends with NULL and its strings with NUL, in memory that
    // the kernel has mapped writable for this program.
    unsafe {
        let mut at = environ;
        while !at.is_null() && !(*at).is_null() {
            let string = *at;
            std::ptr::write_bytes(string, 0, libc::strlen(string));
            at = at.add(1);
        }
    }
}

unsafe extern "C" {
    static environ: *const *mut libc::c_char;
}

/// An empty signal mask.
pub fn unblock_signals() {
    let none: u64 = 0;
    // SAFETY: the kernel's sigset_t has 8 bytes.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, std::ptr::null_mut::<u64>(), 8)
    };
}

/// The signals that this process ignored when it first asked, by SigIgn of /proc/self/status; all of them when that cannot be
/// read. Who has many children asks before the first one.
pub fn ignored_signals() -> u64 {
    static IGNORED: OnceLock<u64> = OnceLock::new();
    let mask = || -> Option<u64> {
        let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
        let file = nix::fcntl::open(c"/proc/self/status", flags, nix::sys::stat::Mode::empty()).ok()?;
        let mut buf = [0u8; 4096];
        let n = nix::unistd::read(&file, &mut buf).ok()?;
        let text = std::str::from_utf8(&buf[..n]).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    *IGNORED.get_or_init(|| mask().unwrap_or(u64::MAX))
}

/// A NULL-terminated vector of C strings, as execve(2) wants.
#[derive(Clone, Debug)]
pub struct CStrings(Vec<CString>);

impl CStrings {
    /// Of these strings.
    pub fn new(strings: Vec<CString>) -> Self {
        Self(strings)
    }

    /// The strings.
    pub fn as_slice(&self) -> &[CString] {
        &self.0
    }

    /// One more.
    pub fn push(&mut self, string: CString) {
        self.0.push(string);
    }

    pub(super) fn pointers(&self) -> Vec<*const libc::c_char> {
        self.0.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
    }
}

/// A program with its arguments and environment, laid out for execve(2): its call takes nothing else, not even memory,
/// which a seccomp filter may forbid to ask for.
#[derive(Debug)]
pub struct Execve {
    program: CString,
    env: CStrings,
    argv_pointers: Vec<*const libc::c_char>,
    env_pointers: Vec<*const libc::c_char>,
    /// What `argv_pointers` points into; a string's bytes stay where they are when it is moved.
    _argv: CStrings,
}

impl Execve {
    /// Of these.
    pub fn new(program: CString, argv: CStrings, env: CStrings) -> Self {
        Self { argv_pointers: argv.pointers(), env_pointers: env.pointers(), program, env, _argv: argv }
    }

    /// What is to be executed.
    pub fn program(&self) -> &CStr {
        &self.program
    }

    /// The environment.
    pub fn env(&self) -> &CStrings {
        &self.env
    }

    /// Returns only when it fails.
    pub fn run(&self) -> Errno {
        // SAFETY: both vectors are NULL-terminated and point to strings that `self` owns.
        unsafe { libc::execve(self.program.as_ptr(), self.argv_pointers.as_ptr(), self.env_pointers.as_ptr()) };
        Errno::last()
    }
}

/// _exit(2): no destructors, no atexit. For a child that shares its parent's buffers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// One instruction of a classic BPF program: struct sock_filter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// Jump when true.
    pub jt: u8,
    /// Jump when false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

#[repr(C)]
struct SockFprog {
    len: u16,
    filter: *const SockFilter,
}

/// seccomp(2) SECCOMP_SET_MODE_FILTER; with SECCOMP_FILTER_FLAG_NEW_LISTENER the notification fd comes back.
pub fn seccomp_filter(program: &[SockFilter], flags: u32) -> nix::Result<Option<OwnedFd>> {
    const NEW_LISTENER: u32 = 1 << 3;
    let prog = SockFprog { len: u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?, filter: program.as_ptr() };
    // SAFETY: `prog` describes `program`, which the kernel copies.
    let ret = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog) };
    if flags & NEW_LISTENER != 0 { super::owned(ret).map(Some) } else { Errno::result(ret).map(|_| None) }
}

/// Joins a new session keyring called `name` and lets its owner search it; ENOSYS (no keyrings) is no error.
pub fn new_session_keyring(name: &CStr) -> nix::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    const SETPERM: libc::c_ulong = 5;
    const DESCRIBE: libc::c_ulong = 6;
    const UID_SEARCH: u32 = 0x0008_0000;
    // SAFETY: `name` is NUL-terminated and outlives the call.
    let ring = match Errno::result(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) }) {
        Err(Errno::ENOSYS) => return Ok(()),
        other => other?,
    };
    let mut text = [0u8; 256];
    // SAFETY: pointer and length describe `text`.
    let len = unsafe { libc::syscall(libc::SYS_keyctl, DESCRIBE, ring, text.as_mut_ptr(), text.len()) };
    let len = usize::try_from(Errno::result(len)?).unwrap_or(0).min(text.len());
    // "type;uid;gid;perm;description", the permissions in hex.
    let perm = std::str::from_utf8(&text[..len]).ok().and_then(|t| t.split(';').nth(3));
    let perm = perm.and_then(|p| u32::from_str_radix(p, 16).ok()).ok_or(Errno::EPROTO)?;
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::syscall(libc::SYS_keyctl, SETPERM, ring, perm | UID_SEARCH) }).map(drop)
}

/// Brings the interface `lo` of this network namespace up.
pub fn loopback_up() -> nix::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let sock = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut req: libc::ifreq = unsafe { std::mem::zeroed() };
    req.ifr_name[0] = b'l' as libc::c_char;
    req.ifr_name[1] = b'o' as libc::c_char;
    req.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `req` is a valid ifreq with the name and the flags set.
    Errno::result(unsafe { libc::ioctl(sock.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const req) }).map(drop)
}

/// setdomainname(2).
pub fn setdomainname(name: &[u8]) -> nix::Result<()> {
    // SAFETY: pointer and length describe `name`.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// ioprio_set(2) of this process: class 1 to 3, priority 0 to 7.
pub fn set_io_priority(class: u32, priority: u32) -> nix::Result<()> {
    // SAFETY: takes no pointer; IOPRIO_WHO_PROCESS is 1.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, (class << 13) | priority) }).map(drop)
}

/// struct sched_attr of linux/sched/types.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedAttr {
    /// Bytes of this struct.
    pub size: u32,
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value of OTHER and BATCH.
    pub nice: i32,
    /// Priority of FIFO and RR.
    pub priority: u32,
    /// DEADLINE, nanoseconds.
    pub runtime: u64,
    /// DEADLINE, nanoseconds.
    pub deadline: u64,
    /// DEADLINE, nanoseconds.
    pub period: u64,
}

/// sched_setattr(2) of this process.
pub fn set_scheduler(attr: &SchedAttr) -> nix::Result<()> {
    let attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..*attr };
    // SAFETY: `attr` has the layout of struct sched_attr and outlives the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) }).map(drop)
}

/// Lets process `pid` (0 for this one) run on these processors, as far as its cpuset allows: sched_setaffinity(2).
pub fn set_affinity(pid: i32, mask: &[u64]) -> nix::Result<()> {
    // SAFETY: pointer and length describe `mask`.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setaffinity, pid, size_of_val(mask), mask.as_ptr()) };
    Errno::result(ret).map(drop)
}

/// Every processor that Linux may have.
pub const ALL_PROCESSORS: [u64; 128] = [u64::MAX; 128];

/// personality(2).
pub fn set_personality(persona: u64) -> nix::Result<()> {
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::personality(persona as libc::c_ulong) }).map(drop)
}

/// set_mempolicy(2); bit n of `nodes` is node n.
pub fn set_mempolicy(mode: u32, nodes: &[u64]) -> nix::Result<()> {
    let mask = if nodes.is_empty() { std::ptr::null() } else { nodes.as_ptr() };
    // The kernel takes one bit less than maxnode.
    let maxnode = if nodes.is_empty() { 0 } else { nodes.len() * 64 + 1 };
    // SAFETY: the mask is null or has as many bits as maxnode says, less one.
    let ret = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, maxnode) };
    Errno::result(ret).map(drop)
}
