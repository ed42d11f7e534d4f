//! rtnetlink(7) for network devices: move one to another namespace, with its addresses.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_PERMANENT: u8 = 0x80;
const RT_SCOPE_UNIVERSE: u8 = 0;
const HEADER: usize = 16;

/// An address of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    family: u8,
    prefix: u8,
    attributes: Vec<(u16, Vec<u8>)>,
}

/// A netlink socket of the network namespace that it was made in.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// In this process's network namespace.
    pub fn open() -> nix::Result<Netlink> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        Ok(Netlink(fd))
    }

    /// The index of the device `name`; ENODEV when there is none.
    pub fn index(&self, name: &CStr) -> nix::Result<i32> {
        // RTM_GETLINK with the name answers with the link itself, whose index follows the header.
        let answer = self.ask(
            libc::RTM_GETLINK,
            0,
            &[link(0, 0, 0), attribute(IFLA_IFNAME, name.to_bytes_with_nul())].concat(),
        )?;
        let bytes = answer.get(HEADER + 4..HEADER + 8).ok_or(Errno::EPROTO)?;
        Ok(i32::from_ne_bytes(bytes.try_into().map_err(|_| Errno::EPROTO)?))
    }

    /// The permanent addresses of global scope of a device.
    pub fn addresses(&self, index: i32) -> nix::Result<Vec<Address>> {
        self.send(libc::RTM_GETADDR, libc::NLM_F_DUMP as u16, &[0; 8])?;
        let mut out = Vec::new();
        let mut buf = vec![0u8; 32 << 10];
        loop {
            let n = recv(self.0.as_raw_fd(), &mut buf, MsgFlags::empty())?;
            for (kind, body) in messages(&buf[..n]) {
                match kind {
                    NLMSG_DONE => return Ok(out),
                    NLMSG_ERROR => return Err(error(body).err().unwrap_or(Errno::EPROTO)),
                    libc::RTM_NEWADDR if body.len() >= 8 => {
                        let (family, prefix, flags, scope) = (body[0], body[1], body[2], body[3]);
                        let of = i32::from_ne_bytes([body[4], body[5], body[6], body[7]]);
                        if of != index || flags & IFA_F_PERMANENT == 0 || scope != RT_SCOPE_UNIVERSE {
                            continue;
                        }
                        let attributes = attributes(&body[8..]);
                        let kept =
                            attributes.filter(|(kind, _)| [IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST].contains(kind));
                        out.push(Address { family, prefix, attributes: kept.map(|(k, v)| (k, v.to_vec())).collect() });
                    }
                    _ => {}
                }
            }
        }
    }

    /// Moves a device to the network namespace `to`, where it is called `name`.
    pub fn move_to(&self, index: i32, to: BorrowedFd<'_>, name: &CStr) -> nix::Result<()> {
        let body = [
            link(index, 0, 0),
            attribute(IFLA_NET_NS_FD, &to.as_raw_fd().to_ne_bytes()),
            attribute(IFLA_IFNAME, name.to_bytes_with_nul()),
        ];
        self.ask(libc::RTM_NEWLINK, 0, &body.concat()).map(drop)
    }

    /// Gives a device an address.
    pub fn add(&self, index: i32, address: &Address) -> nix::Result<()> {
        let mut body = vec![address.family, address.prefix, IFA_F_PERMANENT, RT_SCOPE_UNIVERSE];
        body.extend(index.to_ne_bytes());
        for (kind, value) in &address.attributes {
            body.extend(attribute(*kind, value));
        }
        self.ask(libc::RTM_NEWADDR, (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16, &body).map(drop)
    }

    /// Brings a device up.
    pub fn up(&self, index: i32) -> nix::Result<()> {
        let up = libc::IFF_UP as u32;
        self.ask(libc::RTM_NEWLINK, 0, &link(index, up, up)).map(drop)
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> nix::Result<()> {
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        // Sequence number and port; there is one request at a time.
        message.extend([0; 8]);
        message.extend(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty()).map(drop)
    }

    /// Sends a request; its answer, or the acknowledgement.
    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> nix::Result<Vec<u8>> {
        let ack = if kind == libc::RTM_GETLINK { 0 } else { libc::NLM_F_ACK as u16 };
        self.send(kind, flags | ack, body)?;
        let mut buf = vec![0u8; 32 << 10];
        let n = recv(self.0.as_raw_fd(), &mut buf, MsgFlags::empty())?;
        buf.truncate(n);
        match messages(&buf).next() {
            Some((NLMSG_ERROR, body)) => error(body)?,
            Some(_) => {}
            None => return Err(Errno::EPROTO),
        }
        Ok(buf)
    }
}

fn error(body: &[u8]) -> nix::Result<()> {
    let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) }
}

/// struct ifinfomsg: family, padding, type, index, flags, change.
fn link(index: i32, flags: u32, change: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat()
}

fn align(n: usize) -> usize {
    n.next_multiple_of(4)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(align(out.len()), 0);
    out
}

/// Splits what begins with a length of its own into (kind, body); `size` is that of the length field.
fn split(bytes: &[u8], header: usize) -> Option<(&[u8], &[u8])> {
    let length = if header == HEADER {
        u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize
    } else {
        usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
    };
    if length < header || length > bytes.len() {
        return None;
    }
    Some((&bytes[..length], bytes.get(align(length)..).unwrap_or_default()))
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (message, rest) = split(bytes, HEADER)?;
        bytes = rest;
        Some((u16::from_ne_bytes([message[4], message[5]]), &message[HEADER..]))
    })
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (attribute, rest) = split(bytes, 4)?;
        bytes = rest;
        Some((u16::from_ne_bytes([attribute[2], attribute[3]]), &attribute[4..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_device_is_found_and_no_other() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.index(c"lo").unwrap(), 1);
        assert_eq!(netlink.index(c"no-such-device").unwrap_err(), Errno::ENODEV);
        // 127.0.0.1 has the scope of the host.
        assert_eq!(netlink.addresses(1).unwrap(), []);
    }

    #[test]
    fn truncated_messages_end_the_list() {
        let good = attribute(3, b"abc");
        assert_eq!(attributes(&good).collect::<Vec<_>>(), [(3, &b"abc"[..])]);
        assert_eq!(attributes(&good[..5]).count(), 0);
        assert_eq!(attributes(&[1, 0, 0, 0]).count(), 0);
        assert_eq!(messages(&[255; 20]).count(), 0);
    }
}
