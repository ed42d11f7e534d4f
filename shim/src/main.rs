//! `containerd-shim-skiff-v2`: a containerd shim v2 that is the runtime. Does not live here: making containers (the skiff library).
#![cfg_attr(not(test), no_main)]

mod args;
mod bootstrap;
mod cleanup;
mod container;
mod delete;
mod error;
mod events;
mod group;
mod info;
mod io;
mod logger;
mod logging;
mod metrics;
mod options;
mod pause;
mod pending;
mod process;
mod rootfs;
mod sandbox;
mod serve;
mod spans;
mod start;
mod streaming;
mod task;

use std::io::Write;

use args::{Action, Args};

skiff::program!(run);

/// Its exit status.
fn run() -> i32 {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(err) => return fail(&err),
    };
    match act(&args).and_then(|daemon| daemon.map_or(Ok(()), |daemon| daemon.run(&args))) {
        Ok(()) => 0,
        Err(err) => fail(&err.to_string()),
    }
}

/// Does what is asked for; what goes on after that is the daemon. Its frame is not to lie below a daemon's for all its life.
#[inline(never)]
fn act(args: &Args) -> skiff::Result<Option<start::Daemon>> {
    match args.action {
        Action::Version => {
            println!("containerd-shim-skiff-v2:\n  Version:  {}", env!("CARGO_PKG_VERSION"));
            Ok(None)
        }
        Action::Info => reply(info::reply).map(|()| None),
        Action::Start => start::run(args),
        Action::Delete => reply(|| delete::run(args)).map(|()| None),
    }
}

/// Writes what containerd reads back, and nothing else, to stdout.
fn reply(make: impl FnOnce() -> skiff::Result<Vec<u8>>) -> skiff::Result<()> {
    let bytes = make()?;
    std::io::stdout().write_all(&bytes).map_err(|e| skiff::Error::io("write the reply", &e))
}

fn fail(text: &str) -> i32 {
    eprintln!("containerd-shim-skiff-v2: {text}");
    1
}
