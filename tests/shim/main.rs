//! Tests of the shim under a real containerd, 1.x and 2.x. The same tests pass with SHIM_UNDER_TEST=io.containerd.runc.v2,
//! but for those that say why not.

mod blocked;
mod bootstrap;
mod calls;
mod crash;
mod daemon;
mod deadlines;
mod endurance;
mod log;
mod protocol;
mod raw;
mod restart;
mod spans;
mod streams;
mod tasks;
mod wedge;

use std::path::Path;

use skiff_test_support::{Containerd, LeakCheck, Version};

/// Runs a test against a containerd of its own, and looks for what it has left.
fn with_containerd(version: Version, test: impl FnOnce(&mut Containerd)) {
    let mut containerd = Containerd::start(version, Path::new(env!("CARGO_BIN_EXE_containerd-shim-skiff-v2")));
    let mark = format!("{}/state/io.containerd.runtime.v2.task", containerd.dir().display());
    test(&mut containerd);
    LeakCheck::new(&[&mark]).end();
    skiff_test_support::eventually("the shims are gone", || containerd.shims().is_empty());
    assert_eq!(containerd.ctr(&["containers", "ls", "-q"]).ok().out, "");
}

/// The tests of a module under both versions.
macro_rules! under_both {
    ($($name:ident),* $(,)?) => {
        mod v1 {
            $(#[test] fn $name() { crate::with_containerd(skiff_test_support::Version::V1, super::$name) })*
        }
        mod v2 {
            $(#[test] fn $name() { crate::with_containerd(skiff_test_support::Version::V2, super::$name) })*
        }
    };
}
pub(crate) use under_both;
