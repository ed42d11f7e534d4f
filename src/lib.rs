//! skiff: an OCI container runtime as a library.
//!
//! The modules in reading order: a [`bundle`] is read, a [`plan`] is built from it without any side effect, a
//! [`launch`] clones a child that applies the plan, and [`container`] holds the verbs that tie these together.

pub mod bundle;
pub mod cgroup;
mod child;
pub mod container;
pub mod criu;
pub mod error;
pub mod features;
pub mod hooks;
pub mod host;
pub mod launch;
pub mod limits;
pub mod plan;
pub mod rdt;
pub mod state;
pub mod sys;
pub mod trace;

pub use error::{Error, Kind, Result};
