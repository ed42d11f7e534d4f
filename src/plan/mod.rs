//! `Spec + Request + Host -> Plan`, pure: no file, no environment, no clock, no system call. Does not live here: applying it (child, cgroup).

pub mod cgroup;
