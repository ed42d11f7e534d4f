//! Compiles the interface, without protoc.

fn main() {
    println!("cargo::rerun-if-changed=cri.proto");
    let files = protox::compile(["cri.proto"], ["."]).expect("cri.proto is right");
    tonic_prost_build::configure().build_server(false).compile_fds(files).expect("write the client");
}
