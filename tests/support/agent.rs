//! A seccomp agent: answers the calls that a container asks about.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;

use crate::console::receive_console_of;

#[repr(C)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    pointer: u64,
    args: [u64; 6],
}

#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;

/// Listens at `socket`, and fails the first call that it is asked about with `errno`. Returns the message that came with
/// the descriptor.
///
/// # Panics
/// In its thread, when anything goes wrong.
pub fn seccomp_agent(socket: &Path, errno: i32) -> JoinHandle<String> {
    let listener = UnixListener::bind(socket).expect("bind the agent's socket");
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accept");
        let (text, fd) = receive_console_of(&stream);
        // SAFETY: the structs are plain data; the kernel wants the notification zeroed.
        let mut notification: Notification = unsafe { std::mem::zeroed() };
        // SAFETY: RECEIVE writes a notification.
        let got = unsafe { libc::ioctl(fd.as_raw_fd(), RECEIVE, &raw mut notification) };
        assert_eq!(got, 0, "receive: {}", std::io::Error::last_os_error());
        let answer = Answer { id: notification.id, value: 0, error: -errno, flags: 0 };
        // SAFETY: SEND reads an answer.
        let sent = unsafe { libc::ioctl(fd.as_raw_fd(), SEND, &raw const answer) };
        assert_eq!(sent, 0, "answer: {}", std::io::Error::last_os_error());
        text
    })
}
