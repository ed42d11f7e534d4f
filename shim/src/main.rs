//! `containerd-shim-skiff-v2`: a containerd shim v2 that is the runtime.

fn main() {}
