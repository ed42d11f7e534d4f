//! The little of D-Bus that talking to systemd takes: EXTERNAL authentication, method calls, replies and signals, each
//! with a deadline (D-Bus specification, "Message Protocol"). Written by hand, because the clients that there are bring
//! an asynchronous runtime or a C library into a shim that has one thread and a few hundred KiB.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::plan::scope::Value;
use crate::{Error, Kind, Result};

/// The longest message that is read, bytes; the specification allows 128 MiB.
const MAX_MESSAGE: usize = 1 << 20;
const METHOD_CALL: u8 = 1;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// A message that came in; only what is used of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Message {
    kind: u8,
    reply_to: u32,
    member: String,
    error: String,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    /// The strings and object paths that its body begins with.
    pub fn strings(&self) -> Result<Vec<String>> {
        let mut reader = Reader { data: &self.body, at: 0 };
        let mut out = Vec::new();
        for kind in self.signature.chars() {
            match kind {
                's' | 'o' => out.push(reader.string()?),
                'u' => drop(reader.number()?),
                _ => break,
            }
        }
        Ok(out)
    }

    /// True for this signal.
    pub fn is_signal(&self, member: &str) -> bool {
        self.kind == SIGNAL && self.member == member
    }
}

/// A method call.
#[derive(Debug)]
pub struct Call<'a> {
    /// Bus name, object path, interface, method.
    pub to: [&'a str; 4],
    /// Signature of the body.
    pub signature: &'a str,
    /// The body.
    pub body: Writer,
}

/// A connection whose every step ends by `deadline`.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    serial: u32,
    deadline: Instant,
    /// Signals that came while a reply was waited for.
    signals: Vec<Message>,
}

impl Connection {
    /// Connects to a socket and authenticates as the user that the kernel knows.
    pub fn open(path: &Path, deadline: Instant) -> Result<Connection> {
        let fail = |errno| Error::sys(format!("connect to systemd at {path:?}"), errno);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(fail)?;
        let address = UnixAddr::new(path).map_err(fail)?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).map_err(fail)?;
        Connection::authenticate(fd.into(), deadline)
    }

    /// All of it in one write, and the first message only after the answer: systemd reads the authentication in pieces of
    /// up to 256 bytes, and a message in the same piece as BEGIN lies there unseen until more comes.
    fn authenticate(stream: UnixStream, deadline: Instant) -> Result<Connection> {
        let mut out = Connection { stream, input: Vec::new(), serial: 0, deadline, signals: Vec::new() };
        // Without an identity the other side takes the socket's credentials, which are right in a user namespace too.
        out.send(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")?;
        for want in ["DATA", "OK "] {
            let line = out.line()?;
            if !line.starts_with(want) {
                return Err(Error::new(Kind::System, format!("authenticate to systemd: {line:?}")));
            }
        }
        Ok(out)
    }

    /// From now on every step ends by `deadline`.
    pub fn until(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    fn wait(&self, flags: PollFlags) -> Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now()).as_millis();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.stream.as_fd(), flags)], timeout) {
            Ok(0) => Err(Error::new(Kind::Timeout, "wait for systemd: it does not answer")),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Error::sys("wait for systemd", errno)),
        }
    }

    fn send(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            match self.stream.write(data) {
                Ok(n) => data = &data[n..],
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT)?,
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
                Err(err) => return Err(Error::io("send to systemd", &err)),
            }
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<()> {
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::new(Kind::System, "systemd has closed the connection")),
                Ok(n) => {
                    self.input.extend_from_slice(&chunk[..n]);
                    return Ok(());
                }
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLIN)?,
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
                Err(err) => return Err(Error::io("read from systemd", &err)),
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.input.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.input.drain(..end + 2).take(end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            if self.input.len() > 16 * 1024 {
                return Err(bad("a line of the authentication is too long"));
            }
            self.fill()?;
        }
    }

    fn message(&mut self) -> Result<Message> {
        loop {
            if let Some((message, len)) = parse(&self.input)? {
                self.input.drain(..len);
                return Ok(message);
            }
            self.fill()?;
        }
    }

    /// Calls a method; the error of the other side is `Err((name, text))` in the inner result.
    pub fn call(&mut self, call: Call<'_>) -> Result<std::result::Result<Message, (String, String)>> {
        self.serial += 1;
        let serial = self.serial;
        self.send(&marshal(serial, call))?;
        loop {
            let message = self.message()?;
            match message.kind {
                SIGNAL => self.signals.push(message),
                ERROR if message.reply_to == serial => {
                    let text = message.strings()?.into_iter().next().unwrap_or_default();
                    return Ok(Err((message.error, text)));
                }
                _ if message.reply_to == serial => return Ok(Ok(message)),
                _ => {}
            }
        }
    }

    /// The next signal.
    pub fn signal(&mut self) -> Result<Message> {
        if !self.signals.is_empty() {
            return Ok(self.signals.remove(0));
        }
        loop {
            let message = self.message()?;
            if message.kind == SIGNAL {
                return Ok(message);
            }
        }
    }
}

fn bad(what: &str) -> Error {
    Error::new(Kind::System, format!("systemd's message: {what}"))
}

fn marshal(serial: u32, call: Call<'_>) -> Vec<u8> {
    let body = call.body.data;
    let [destination, path, interface, member] = call.to;
    let mut fields = Writer::default();
    for (code, kind, value) in
        [(1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", destination), (8, "g", call.signature)]
    {
        if value.is_empty() {
            continue;
        }
        fields.align(8);
        fields.data.push(code);
        fields.signature(kind);
        if kind == "g" { fields.signature(value) } else { fields.string(value) }
    }
    let mut out = Writer { data: vec![b'l', METHOD_CALL, 0, 1] };
    out.number(body.len() as u32);
    out.number(serial);
    out.number(fields.data.len() as u32);
    // The fields begin at 16, which is aligned as their own beginning is.
    out.data.extend(fields.data);
    out.align(8);
    out.data.extend(body);
    out.data
}

/// The first message of `data` and its length; None when more of it is to come.
fn parse(data: &[u8]) -> Result<Option<(Message, usize)>> {
    if data.len() < 16 {
        return Ok(None);
    }
    if data[0] != b'l' || data[3] != 1 {
        return Err(bad("not little-endian version 1"));
    }
    let number = |at: usize| u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]) as usize;
    let (body, fields) = (number(4), number(12));
    if body > MAX_MESSAGE || fields > MAX_MESSAGE {
        return Err(bad("too long"));
    }
    let start = (16 + fields).next_multiple_of(8);
    let end = start + body;
    if data.len() < end {
        return Ok(None);
    }
    let mut out = Message { kind: data[1], body: data[start..end].to_vec(), ..Message::default() };
    let mut reader = Reader { data: &data[..16 + fields], at: 16 };
    while reader.at < reader.data.len() {
        reader.align(8)?;
        let code = reader.byte()?;
        let kind = reader.signature()?;
        match (code, kind.as_str()) {
            (5, "u") => out.reply_to = reader.number()?,
            (3, "s") => out.member = reader.string()?,
            (4, "s") => out.error = reader.string()?,
            (8, "g") => out.signature = reader.signature()?,
            (_, "s" | "o") => drop(reader.string()?),
            (_, "g") => drop(reader.signature()?),
            (_, "u") => drop(reader.number()?),
            _ => return Err(bad("a header field of an unknown type")),
        }
    }
    Ok(Some((out, end)))
}

#[derive(Debug)]
struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.data.len());
        let end = end.ok_or_else(|| bad("ends too early"))?;
        let out = &self.data[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn align(&mut self, to: usize) -> Result<()> {
        self.take(self.at.next_multiple_of(to) - self.at).map(drop)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u32> {
        self.align(4)?;
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self, len: usize) -> Result<String> {
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| bad("text is not UTF-8"))?;
        if self.byte()? != 0 {
            return Err(bad("text does not end with NUL"));
        }
        Ok(text.to_string())
    }

    fn string(&mut self) -> Result<String> {
        let len = self.number()? as usize;
        self.text(len)
    }

    fn signature(&mut self) -> Result<String> {
        let len = self.byte()?.into();
        self.text(len)
    }
}

/// Writes values as they stand in a message.
#[derive(Debug, Default)]
pub struct Writer {
    data: Vec<u8>,
}

impl Writer {
    fn align(&mut self, to: usize) {
        self.data.resize(self.data.len().next_multiple_of(to), 0);
    }

    /// `u`
    pub fn number(&mut self, number: u32) {
        self.align(4);
        self.data.extend(number.to_le_bytes());
    }

    /// `s` and `o`
    pub fn string(&mut self, text: &str) {
        self.number(text.len() as u32);
        self.data.extend(text.bytes());
        self.data.push(0);
    }

    /// `b`
    pub fn flag(&mut self, flag: bool) {
        self.number(flag.into());
    }

    fn signature(&mut self, text: &str) {
        self.data.push(text.len() as u8);
        self.data.extend(text.bytes());
        self.data.push(0);
    }

    /// An array whose elements `each` writes.
    pub fn array(&mut self, align: usize, each: impl FnOnce(&mut Writer)) {
        self.number(0);
        let length = self.data.len() - 4;
        self.align(align);
        let start = self.data.len();
        each(self);
        let len = (self.data.len() - start) as u32;
        self.data[length..length + 4].copy_from_slice(&len.to_le_bytes());
    }

    /// `a(sv)`
    pub fn properties(&mut self, properties: &[(String, Value)]) {
        self.array(8, |out| {
            for (name, value) in properties {
                out.align(8);
                out.string(name);
                out.variant(value);
            }
        });
    }

    fn variant(&mut self, value: &Value) {
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.string(text);
            }
            Value::Flag(flag) => {
                self.signature("b");
                self.flag(*flag);
            }
            Value::I32(number) => {
                self.signature("i");
                self.number(number.cast_unsigned());
            }
            Value::U32(number) => {
                self.signature("u");
                self.number(*number);
            }
            Value::U64(number) => {
                self.signature("t");
                self.align(8);
                self.data.extend(number.to_le_bytes());
            }
            Value::Bytes(bytes) => {
                self.signature("ay");
                self.array(1, |out| out.data.extend(bytes));
            }
            Value::Numbers(numbers) => {
                self.signature("au");
                self.array(4, |out| numbers.iter().for_each(|number| out.number(*number)));
            }
            Value::Texts(texts) => {
                self.signature("as");
                self.array(4, |out| texts.iter().for_each(|text| out.string(text)));
            }
            Value::Pairs(pairs) => {
                self.signature("a(ss)");
                self.array(8, |out| {
                    for (one, other) in pairs {
                        out.align(8);
                        out.string(one);
                        out.string(other);
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{MsgFlags, recv};

    use super::*;

    fn call() -> Vec<u8> {
        let mut body = Writer::default();
        body.string("a.scope");
        body.properties(&[("PIDs".into(), Value::Numbers(vec![7])), ("Delegate".into(), Value::Flag(true))]);
        marshal(3, Call { to: ["d", "/p", "i.f", "M"], signature: "sa(sv)", body })
    }

    #[test]
    fn a_call_is_read_back() {
        let data = call();
        let (message, len) = parse(&data).unwrap().unwrap();
        assert_eq!(len, data.len());
        assert_eq!((message.kind, message.member.as_str(), message.signature.as_str()), (1, "M", "sa(sv)"));
        assert_eq!(message.strings().unwrap(), ["a.scope"]);
        assert_eq!(message.body[12..16], 44u32.to_le_bytes(), "the array's length is without its padding");
    }

    #[test]
    fn every_part_of_a_message_waits_for_the_rest() {
        let data = call();
        for len in 0..data.len() {
            assert_eq!(parse(&data[..len]).unwrap(), None, "{len} bytes");
        }
    }

    #[test]
    fn who_does_not_answer_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let err = Connection::open(&path, Instant::now() + std::time::Duration::from_millis(20)).unwrap_err();
        assert_eq!((err.kind(), err.to_string().as_str()), (Kind::Timeout, "wait for systemd: it does not answer"));
    }

    /// Reads in pieces, and looks at what lies behind BEGIN in its piece only when more has come, as systemd does; answers
    /// one call.
    fn serve(mut peer: UnixStream) {
        use std::os::fd::AsRawFd;
        let mut piece = [0; 256];
        let (mut line, mut answered) = (Vec::new(), false);
        let mut message = loop {
            match peer.read(&mut piece).unwrap() {
                0 => return,
                n => line.extend_from_slice(&piece[..n]),
            }
            if !answered {
                peer.write_all(b"DATA\r\nOK 0123\r\n").unwrap();
                answered = true;
            }
            if let Some(at) = line.windows(7).position(|end| end == b"BEGIN\r\n") {
                break line.split_off(at + 7);
            }
            // It is slow: BEGIN and a message that does not wait for it are there together.
            while recv(peer.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_PEEK).unwrap() < 64 {
                std::thread::yield_now();
            }
        };
        loop {
            match peer.read(&mut piece).unwrap() {
                0 => return,
                n => message.extend_from_slice(&piece[..n]),
            }
            if parse(&message).unwrap().is_some() {
                break;
            }
        }
        // A reply (2) to call 1.
        peer.write_all(&[b'l', 2, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 5, 1, b'u', 0, 1, 0, 0, 0]).unwrap();
    }

    #[test]
    fn no_message_lies_unseen_behind_the_authentication() {
        let (own, peer) = UnixStream::pair().unwrap();
        own.set_nonblocking(true).unwrap();
        let server = std::thread::spawn(move || serve(peer));
        let mut connection =
            Connection::authenticate(own, Instant::now() + std::time::Duration::from_secs(10)).unwrap();
        let mut body = Writer::default();
        body.string("a.scope");
        connection.call(Call { to: ["d", "/p", "i.f", "M"], signature: "s", body }).unwrap().unwrap();
        drop(connection);
        server.join().unwrap();
    }

    #[test]
    fn lengths_that_lie_are_errors() {
        let mut long = call();
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(parse(&long).is_err(), "the body");
        let mut path = call();
        path[20..24].copy_from_slice(&1000u32.to_le_bytes());
        assert!(parse(&path).is_err(), "a field beyond the fields");
        let mut kind = call();
        kind[18] = b'x';
        assert!(parse(&kind).is_err(), "a field of an unknown type");
        let mut big_endian = call();
        big_endian[0] = b'B';
        assert!(parse(&big_endian).is_err());
        let message = Message { signature: "s".into(), body: vec![9, 0, 0, 0, b'a', 0], ..Message::default() };
        assert!(message.strings().is_err(), "a string beyond the body");
    }
}
