//! The client's end of a console socket.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// Receives the name of a pty and its master.
///
/// # Panics
/// When the message is not one descriptor with a name.
pub fn receive_console(listener: &UnixListener) -> (String, File) {
    let (stream, _) = listener.accept().expect("a connection");
    receive_console_of(&stream)
}

/// One message of text and its descriptor.
///
/// # Panics
/// When it is something else.
pub fn receive_console_of(stream: &UnixStream) -> (String, File) {
    let mut name = vec![0u8; 64 << 10];
    let mut control = [0u64; 8];
    let mut iov = libc::iovec { iov_base: name.as_mut_ptr().cast(), iov_len: name.len() };
    // SAFETY: msghdr is plain data; iov and control outlive the call, and their lengths are right.
    let (n, fd) = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let n = libc::recvmsg(stream.as_raw_fd(), &raw mut message, 0);
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(n > 0 && !header.is_null(), "one message with a descriptor");
        (n as usize, libc::CMSG_DATA(header).cast::<i32>().read_unaligned())
    };
    // SAFETY: the kernel has just given us this descriptor.
    (String::from_utf8_lossy(&name[..n]).into_owned(), unsafe { File::from_raw_fd(fd) })
}
