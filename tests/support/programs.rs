//! The device programs of a cgroup.

use std::os::fd::AsRawFd;
use std::path::Path;

#[repr(C)]
struct Query {
    target: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    _rest: [u32; 9],
}

const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Ids of the eBPF programs that a cgroup of version 2 asks about devices: bpf(2).
///
/// # Panics
/// When the kernel does not say.
pub fn device_programs(cgroup: &Path) -> Vec<u32> {
    let dir = std::fs::File::open(cgroup).expect("a cgroup");
    let mut ids = vec![0u32; 64];
    let mut query = Query {
        target: dir.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        _rest: [0; 9],
    };
    // SAFETY: `query` is a prefix of union bpf_attr, longer than what is asked for; `ids` has room for `count` numbers.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    assert_eq!(ret, 0, "query programs: {}", std::io::Error::last_os_error());
    ids.truncate(query.count as usize);
    ids
}
