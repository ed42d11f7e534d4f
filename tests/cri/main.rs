//! Pods and containers through the CRI socket of a real containerd, 1.x and 2.x, as the kubelet runs them. The same tests pass
//! with SHIM_UNDER_TEST=io.containerd.runc.v2, but for those that say why not.

mod lifecycle;
mod mounts;
mod namespaces;
mod node;
mod resources;
mod restart;
mod sandbox;
mod security;
mod streams;
mod systemd;

use std::path::Path;

use skiff_test_support::{Containerd, Driver, Version};

use node::Node;

/// Runs a test against a containerd of its own, and looks for what it has left.
fn with_node(version: Version, test: impl FnOnce(&mut Node)) {
    let shim = Path::new(env!("CARGO_BIN_EXE_containerd-shim-skiff-v2"));
    let mut node = Node::new(Containerd::start_cri(version, shim));
    test(&mut node);
    node.end();
}

/// The same with pods that the shim itself holds.
fn with_sandbox_node(test: impl FnOnce(&mut Node)) {
    if std::env::var_os("SHIM_UNDER_TEST").is_some() {
        // The Go shim has pods with a pause container alone.
        return;
    }
    with_driver(Version::V2, "shim", Driver::Cgroupfs, test);
}

/// The same with all that can differ.
fn with_driver(version: Version, sandboxer: &str, driver: Driver, test: impl FnOnce(&mut Node)) {
    let shim = Path::new(env!("CARGO_BIN_EXE_containerd-shim-skiff-v2"));
    let mut node = Node::new(Containerd::start_cri_with(version, shim, sandboxer, driver));
    test(&mut node);
    node.end();
}

/// The tests of a module under both versions, and where pods have no pause container. Those after the semicolon are about it.
macro_rules! under_both {
    ($($name:ident),* $(,)? $(; with_a_pause_container: $($paused:ident),* $(,)?)?) => {
        mod v1 {
            $(#[test] fn $name() { crate::with_node(skiff_test_support::Version::V1, super::$name) })*
            $($(#[test] fn $paused() { crate::with_node(skiff_test_support::Version::V1, super::$paused) })*)?
        }
        mod v2 {
            $(#[test] fn $name() { crate::with_node(skiff_test_support::Version::V2, super::$name) })*
            $($(#[test] fn $paused() { crate::with_node(skiff_test_support::Version::V2, super::$paused) })*)?
        }
        mod sandbox {
            $(#[test] fn $name() { crate::with_sandbox_node(super::$name) })*
        }
    };
}
pub(crate) use under_both;
