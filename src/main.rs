//! runc's command line over the skiff library.

fn main() {}
