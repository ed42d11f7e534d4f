//! runc's command line over the skiff library.

mod cli;

fn main() {
    std::process::exit(cli::run());
}
