//! The program starts at `skiff_entry` (src/sys/entry.rs), where that is written for the processor.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        println!("cargo:rustc-link-arg-bins=-Wl,-u,skiff_entry,-e,skiff_entry");
    }
}
