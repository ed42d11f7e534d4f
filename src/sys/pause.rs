//! A process that only waits and reaps, in next to no memory: one that was cloned from a program, does not become another
//! one by execve(2), and gives back all that it has from its parent.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::process::exit_now;

/// Ranges of addresses that are remembered; a program has about a dozen.
const RANGES: usize = 48;
const PAGE: usize = 4 << 10;

/// Where this program keeps its memory: its children have theirs in the same places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// What is private and writable, but for heap and stack; and the code, which has no changes to lose. First addresses
    /// and ends.
    ranges: Vec<(usize, usize)>,
    /// The heap, which may grow.
    heap: (usize, usize),
    /// The main thread's stack.
    stack: (usize, usize),
    /// The arguments that the program was started with.
    arguments: (usize, usize),
    /// The end of the environment, which follows them.
    environment_end: usize,
}

impl Layout {
    /// Reads it: `maps` and `stat` of proc(5).
    ///
    /// # Errors
    /// When procfs is not there.
    pub fn read() -> std::io::Result<Layout> {
        // The program's name, and the paths of its files, may be no UTF-8.
        let read = |path| std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned());
        Layout::parse(&read("/proc/self/maps")?, &read("/proc/self/stat")?)
            .ok_or_else(|| std::io::Error::other("/proc/self/stat is not as expected"))
    }

    fn parse(maps: &str, stat: &str) -> Option<Layout> {
        let mut out = Layout::default();
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (range, modes) = (fields.next()?, fields.next()?);
            let (from, to) = range.split_once('-')?;
            let range = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
            match (modes, fields.nth(3)) {
                (_, Some("[stack]")) => out.stack = range,
                // In a process that was forked it can be in two pieces.
                (_, Some("[heap]")) if out.heap.0 != 0 => out.heap.1 = range.1,
                (_, Some("[heap]")) => out.heap = range,
                ("rw-p", _) => out.ranges.push(range),
                ("r-xp", Some(file)) if file.starts_with('/') => out.ranges.push(range),
                _ => {}
            }
        }
        // Field 3 is the first one after the name, which may hold anything; 48 to 51 are arg_start to env_end.
        let mut numbers = stat.rsplit_once(')')?.1.split_whitespace().skip(45).map(|field| field.parse().ok());
        let mut next = || numbers.next().flatten();
        out.arguments = (next()?, next()?);
        let environment = (next()?, next()?);
        out.environment_end = if environment.0 == out.arguments.1 { environment.1 } else { out.arguments.1 };
        let (from, to) = out.arguments;
        (out.stack.0 < from && from + 2 < to && to <= out.environment_end && out.environment_end <= out.stack.1)
            .then_some(out)
    }
}

/// For a child of a one-threaded process: takes `name` (with `title` behind it in the process list), drops its memory,
/// closes `last`, and reaps until SIGTERM or SIGINT, at which it exits with 0. It never returns, and nothing of what the
/// program had in memory is there any more, its arguments and its environment among it. It needs no capability and these
/// system calls alone: madvise(2), prctl(2), close(2), wait4(2), rt_sigtimedwait(2), exit_group(2).
#[inline(never)]
pub fn rest(layout: &Layout, name: &std::ffi::CStr, title: &str, last: BorrowedFd<'_>) -> ! {
    let last = last.as_raw_fd();
    let signals: u64 = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT].iter().fold(0, |set, n| set | 1 << (n - 1));
    // SAFETY: the kernel's sigset_t has 8 bytes; all zeroes is the default action of a sigaction, which outlives its calls;
    // PR_SET_NAME reads a NUL-terminated string.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const signals, std::ptr::null_mut::<u64>(), 8);
        let default: libc::sigaction = std::mem::zeroed();
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGCHLD] {
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
    }
    let mut ranges = [(0, 0); RANGES];
    for (kept, range) in ranges.iter_mut().zip(&layout.ranges) {
        *kept = *range;
    }
    // SAFETY: sbrk(0) only asks.
    let heap_end = unsafe { libc::sbrk(0) } as usize;
    let heap = (layout.heap.0, if layout.heap.0 == 0 { 0 } else { heap_end });
    rename(layout.arguments, layout.environment_end, name.to_bytes(), title.as_bytes());
    let top = layout.arguments.0 & !(PAGE - 1);
    for (from, to) in ranges {
        forget(from, to);
    }
    forget(heap.0, heap.1);
    wait(top, signals, last)
}

/// Overwrites arguments and environment. A last byte of the arguments that is not zero tells the kernel that they were
/// (proc(5), cmdline; setproctitle(3)).
fn rename(arguments: (usize, usize), end: usize, name: &[u8], title: &[u8]) {
    let room = arguments.1 - arguments.0 - 2;
    let text = name.iter().chain(b" ").chain(title).take(room);
    // SAFETY: the kernel has put arguments and environment there, on the main thread's stack; Rust's own copies of their
    // addresses are not used any more, as this process runs nothing but what follows.
    unsafe {
        std::ptr::write_bytes(arguments.0 as *mut u8, 0, end - arguments.0);
        for (at, byte) in text.enumerate() {
            *((arguments.0 + at) as *mut u8) = *byte;
        }
        *((arguments.1 - 1) as *mut u8) = 1;
    }
}

/// MADV_DONTNEED: of what is nobody's, the content is gone; of a file's, what has been changed. It must not be used any more
/// by the caller's contract. What is not mapped is passed over.
fn forget(from: usize, to: usize) {
    if from < to {
        // SAFETY: by the caller's contract.
        unsafe { libc::syscall(libc::SYS_madvise, from, to - from, libc::MADV_DONTNEED) };
    }
}

/// Everything that it needs is in its own frame, which is small: around that, the stack goes.
#[inline(never)]
fn wait(top: usize, signals: u64, last: i32) -> ! {
    const DEPTH: usize = 1 << 20;
    // Its frame and those of what it calls, with room to spare.
    const FRAMES: usize = 2 << 10;
    let here = &raw const signals as usize;
    let (below, above) = ((here - FRAMES) & !(PAGE - 1), ((here + FRAMES) & !(PAGE - 1)) + PAGE);
    forget(below - DEPTH, below);
    forget(above, top);
    // SAFETY: takes no pointer; the descriptor is this process's own, and it has no further use for it.
    unsafe { libc::syscall(libc::SYS_close, last) };
    loop {
        // SAFETY: a null status is not written to.
        while unsafe {
            libc::syscall(libc::SYS_wait4, -1, std::ptr::null::<u8>(), libc::WNOHANG, std::ptr::null::<u8>())
        } > 0
        {}
        // SAFETY: the set outlives the call and has the 8 bytes of the kernel's; nulls are not written to.
        let signal = unsafe {
            libc::syscall(
                libc::SYS_rt_sigtimedwait,
                &raw const signals,
                std::ptr::null::<u8>(),
                std::ptr::null::<u8>(),
                8,
            )
        };
        if signal == libc::SIGTERM as libc::c_long || signal == libc::SIGINT as libc::c_long {
            exit_now(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_what_the_kernel_says() {
        let layout = Layout::read().unwrap();
        let own = [String::from("on the heap")];
        let at = own[0].as_ptr() as usize;
        let mut all = layout.ranges.iter().chain([&layout.heap]);
        assert!(all.any(|(from, to)| (*from..*to).contains(&at)), "{layout:x?}");
        let line = std::fs::read("/proc/self/cmdline").unwrap();
        assert_eq!(layout.arguments.1 - layout.arguments.0, line.len());
    }

    #[test]
    fn what_is_not_as_expected_is_no_layout() {
        let maps = "1000-2000 rw-p 00000000 00:00 0\n3000-4000 r--p 00000000 00:00 0\n\
                    2000-2800 rw-p 00000000 00:00 0 [heap]\n2800-3000 rw-p 00000000 00:00 0 [heap]\n4000-5000 r-xp 00000000 00:00 7 /x\n5000-6000 r-xp 00000000 00:00 0 [vdso]\n7000-9000 rw-p 00000000 00:00 0   [stack]\n";
        let stat = |numbers: &str| format!("1 (a b) c) S {} {numbers} 0\n", "0 ".repeat(44));
        let layout = Layout::parse(maps, &stat("32768 32800 32800 33000")).unwrap();
        assert_eq!((layout.heap, layout.stack), ((0x2000, 0x3000), (0x7000, 0x9000)));
        assert_eq!(layout.ranges, [(0x1000, 0x2000), (0x4000, 0x5000)]);
        assert_eq!((layout.arguments, layout.environment_end), ((32768, 32800), 33000));
        assert_eq!(Layout::parse(maps, &stat("0 0 0 0")), None);
        assert_eq!(Layout::parse("", &stat("32768 32800 32800 33000")), None);
        assert_eq!(Layout::parse(maps, "1 (x) S"), None);
    }
}
