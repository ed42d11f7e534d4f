//! Pods and containers through the CRI socket of a real containerd, 1.x and 2.x, as the kubelet runs them. The same tests pass
//! with SHIM_UNDER_TEST=io.containerd.runc.v2, but for those that say why not.

mod install;
mod lifecycle;
mod mounts;
mod namespaces;
mod node;
mod pause;
mod resources;
mod restart;
mod sandbox;
mod security;
mod streams;
mod systemd;

use std::path::Path;

use skiff_test_support::{Containerd, Driver, Pods, Version};

use node::Node;

/// Runs a test against a containerd of its own, and looks for what it has left.
fn with_node(version: Version, pods: Pods, test: impl FnOnce(&mut Node)) {
    with_driver(version, pods, Driver::Cgroupfs, test);
}

/// The same with all that can differ.
fn with_driver(version: Version, pods: Pods, driver: Driver, test: impl FnOnce(&mut Node)) {
    if pods != Pods::Image && std::env::var_os("SHIM_UNDER_TEST").is_some() {
        // The Go shim's pods are held by the pause image alone.
        return;
    }
    let shim = Path::new(env!("CARGO_BIN_EXE_containerd-shim-skiff-v2"));
    let mut node = Node::new(Containerd::start_cri(version, shim, pods, driver), pods);
    test(&mut node);
    node.end();
}

/// The tests of a module under both versions, and where pods have no pause container. Those after the first semicolon are
/// about it; those after the second run also where it is built into the shim, and those after the third with streams that are
/// no FIFOs.
macro_rules! under_both {
    (
        $($name:ident),* $(,)?
        $(; with_a_pause_container: $($paused:ident),* $(,)?)?
        $(; built_in: $($built_in:ident),* $(,)?)?
        $(; streaming: $($streaming:ident),* $(,)?)?
    ) => {
        mod v1 {
            use skiff_test_support::{Pods::Image, Version::V1};
            $(#[test] fn $name() { crate::with_node(V1, Image, super::$name) })*
            $($(#[test] fn $paused() { crate::with_node(V1, Image, super::$paused) })*)?
        }
        mod v2 {
            use skiff_test_support::{Pods::Image, Version::V2};
            $(#[test] fn $name() { crate::with_node(V2, Image, super::$name) })*
            $($(#[test] fn $paused() { crate::with_node(V2, Image, super::$paused) })*)?
        }
        mod sandbox {
            use skiff_test_support::{Pods::Shim, Version::V2};
            $(#[test] fn $name() { crate::with_node(V2, Shim, super::$name) })*
        }
        $(mod streaming {
            use skiff_test_support::{Pods::Streaming, Version::V2};
            $(#[test] fn $streaming() { crate::with_node(V2, Streaming, super::$streaming) })*
        })?
        $(mod built_in_v1 {
            use skiff_test_support::{Pods::BuiltIn, Version::V1};
            $(#[test] fn $built_in() { crate::with_node(V1, BuiltIn, super::$built_in) })*
        }
        mod built_in_v2 {
            use skiff_test_support::{Pods::BuiltIn, Version::V2};
            $(#[test] fn $built_in() { crate::with_node(V2, BuiltIn, super::$built_in) })*
        })?
    };
}
pub(crate) use under_both;
