//! What runs between clone and execve: it applies a plan and decides nothing. Does not live here: the parent's side (launch).

pub mod console;
pub mod copy;
pub mod exec;
pub mod identity;
pub mod init;
pub mod report;
pub mod rootfs;
