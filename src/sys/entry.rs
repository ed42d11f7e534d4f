//! What runs before the C library: a program that is about to make containers starts anew from a read-only mount of itself
//! (see [`super::exe`]). Done here, it costs a few system calls; a C library that has set itself up costs more than the
//! rest of a container's start together.

use std::arch::{asm, global_asm};
use std::mem::MaybeUninit;

use super::mount::attr;

// What the kernel enters (System V ABI, AMD64 supplement, 3.4.1): `rdx` and the stack are for the C library.
global_asm!(
    ".globl skiff_entry",
    ".type skiff_entry, @function",
    "skiff_entry:",
    "xor ebp, ebp",
    "mov r12, rdx",
    "mov r13, rsp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {early}",
    "mov rsp, r13",
    "mov rdx, r12",
    "jmp _start",
    ".size skiff_entry, . - skiff_entry",
    early = sym early,
);

/// The environment variable that keeps an idle shim small: what glibc keeps for the next allocation of the same size
/// keeps whole pages with it (manual of the GNU C library, "Tunables").
static TUNABLE: &[u8] = b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0\0";

/// struct statfs of asm-generic/statfs.h, in words, and the place of f_flags in it.
const STATFS_WORDS: usize = 15;
const STATFS_FLAGS: usize = 10;

/// Who joins containers, and so could be written to through `/proc/<pid>/exe`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A command that makes or enters containers.
    Command,
    /// `start` of the shim, which becomes the daemon.
    Daemon,
}

/// Goes on from a read-only mount when that is needed and possible; else returns. Nothing of the C library can be called
/// yet, and no loop here may look like one of its functions to the compiler.
extern "C" fn early(stack: *const usize) {
    // SAFETY: the kernel lays out the argument count, the arguments, NULL, the environment, NULL.
    unsafe {
        let (count, argv) = (*stack, stack.add(1).cast::<*const u8>());
        let environment = argv.add(count + 1);
        let Some(part) = part(argv, count) else { return };
        if call(libc::SYS_geteuid, [0; 5]) != 0 {
            return;
        }
        let exe = c"/proc/self/exe".as_ptr() as usize;
        let at_cwd = libc::AT_FDCWD as usize;
        let flags = (libc::O_PATH | libc::O_CLOEXEC) as usize;
        let own = call(libc::SYS_openat, [at_cwd, exe, flags, 0, 0]);
        if own < 0 {
            return;
        }
        let own = own as usize;
        let mut facts = MaybeUninit::<[u64; STATFS_WORDS]>::uninit();
        let known = call(libc::SYS_fstatfs, [own, facts.as_mut_ptr() as usize, 0, 0, 0]) == 0;
        if known && *facts.as_ptr().cast::<u64>().add(STATFS_FLAGS) & libc::ST_RDONLY == 0 {
            run_read_only(own, argv, environment, part);
        }
        call(libc::SYS_close, [own, 0, 0, 0, 0]);
    }
}

/// Returns only when it cannot be done.
unsafe fn run_read_only(own: usize, argv: *const *const u8, environment: *const *const u8, part: Part) {
    let empty = c"".as_ptr() as usize;
    let at_empty = libc::AT_EMPTY_PATH as usize;
    let flags = libc::OPEN_TREE_CLONE as usize | libc::OPEN_TREE_CLOEXEC as usize | at_empty;
    // SAFETY: the pointers are to strings, arrays and a structure that live as long as the calls.
    unsafe {
        let copy = call(libc::SYS_open_tree, [own, empty, flags, 0, 0]);
        if copy < 0 {
            return;
        }
        let copy = copy as usize;
        let readonly: [u64; 4] = [attr::RDONLY, 0, 0, 0];
        let size = size_of_val(&readonly);
        if call(libc::SYS_mount_setattr, [copy, empty, at_empty, readonly.as_ptr() as usize, size]) == 0 {
            let environment = if part == Part::Daemon { tuned(environment) } else { environment };
            call(libc::SYS_execveat, [copy, empty, argv as usize, environment as usize, at_empty]);
        }
        call(libc::SYS_close, [copy, 0, 0, 0, 0]);
    }
}

/// The environment with [`TUNABLE`], unless it has tunables of its own.
unsafe fn tuned(environment: *const *const u8) -> *const *const u8 {
    // SAFETY: an array of strings that ends with NULL; the mapping has room for two more.
    unsafe {
        let mut count = 0;
        while !(*environment.add(count)).is_null() {
            if starts_with(*environment.add(count), b"GLIBC_TUNABLES=") {
                return environment;
            }
            count += 1;
        }
        let size = (count + 2) * size_of::<usize>();
        let mapped = map(size);
        if mapped < 0 {
            return environment;
        }
        let copy = mapped as usize as *mut *const u8;
        for at in 0..count {
            copy.add(at).write_volatile(*environment.add(at));
        }
        copy.add(count).write_volatile(TUNABLE.as_ptr());
        copy
    }
}

/// Which part of skiff the arguments ask for; a word too many costs one execve(2).
unsafe fn part(argv: *const *const u8, count: usize) -> Option<Part> {
    let (mut start, mut namespace) = (false, false);
    for at in 1..count {
        // SAFETY: `argv` has `count` strings.
        let word = unsafe { *argv.add(at) };
        // SAFETY: likewise.
        let is = |name: &[u8]| unsafe { starts_with(word, name) };
        if is(b"create\0") || is(b"run\0") || is(b"exec\0") || is(b"restore\0") {
            return Some(Part::Command);
        }
        start |= is(b"start\0");
        namespace |= is(b"-namespace");
    }
    (start && namespace).then_some(Part::Daemon)
}

unsafe fn starts_with(string: *const u8, prefix: &[u8]) -> bool {
    // SAFETY: stops at the first difference, which the final NUL of a shorter string is.
    unsafe { (0..prefix.len()).all(|at| string.add(at).read_volatile() == *prefix.as_ptr().add(at)) }
}

/// mmap(2) of private memory; six arguments, unlike the rest.
unsafe fn map(size: usize) -> isize {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let ret;
    // SAFETY: new memory at a place of the kernel's choice.
    unsafe {
        asm!("syscall", inlateout("rax") libc::SYS_mmap as isize => ret, in("rdi") 0, in("rsi") size,
            in("rdx") protection as usize, in("r10") flags as usize, in("r8") -1isize, in("r9") 0,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}

/// A system call; a negative errno on failure.
unsafe fn call(number: libc::c_long, args: [usize; 5]) -> isize {
    let ret;
    // SAFETY: the caller answers for the arguments.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => ret, in("rdi") args[0], in("rsi") args[1],
            in("rdx") args[2], in("r10") args[3], in("r8") args[4],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}
