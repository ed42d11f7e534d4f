//! Moves network devices of the host into the container's network namespace, with their addresses.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::own_namespace;
use crate::plan::net_devices::NetDevice;
use crate::sys::clone::setns;
use crate::sys::netlink::Netlink;
use crate::{Error, Result};

/// Moves `devices` to the network namespace `to`. They are not moved back at the end: the kernel destroys virtual ones
/// with the namespace, and gives physical ones back to the host.
pub fn move_all(devices: &[NetDevice], to: BorrowedFd<'_>) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let fail = |what: &str, errno: Errno| Error::sys(format!("linux.netDevices: {what}"), errno);
    let here = Netlink::open().map_err(|errno| fail("open a netlink socket", errno))?;
    let there = socket_in(to).map_err(|errno| fail("open a netlink socket in the container", errno))?;
    for device in devices {
        let field = format!("{:?}", device.host);
        let index = here.index(&device.host).map_err(|errno| fail(&format!("find {field}"), errno))?;
        let addresses =
            here.addresses(index).map_err(|errno| fail(&format!("read the addresses of {field}"), errno))?;
        here.move_to(index, to, &device.name)
            .map_err(|errno| fail(&format!("move {field} to the container as {:?}", device.name), errno))?;
        let index = there.index(&device.name).map_err(|errno| fail(&format!("find {:?}", device.name), errno))?;
        for address in &addresses {
            there.add(index, address).map_err(|errno| fail(&format!("give {:?} its address", device.name), errno))?;
        }
        there.up(index).map_err(|errno| fail(&format!("bring {:?} up", device.name), errno))?;
    }
    Ok(())
}

/// A netlink socket belongs to the namespace that it was made in, wherever its owner goes afterwards.
fn socket_in(namespace: BorrowedFd<'_>) -> nix::Result<Netlink> {
    const NET: u64 = libc::CLONE_NEWNET as u64;
    let own: OwnedFd = own_namespace(c"/proc/self/ns/net")?;
    setns(namespace, NET)?;
    let socket = Netlink::open();
    setns(own.as_fd(), NET)?;
    socket
}
