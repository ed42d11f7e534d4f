//! Tests of the shim under a real containerd.
