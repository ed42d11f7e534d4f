//! runc's command line over the skiff library.
#![cfg_attr(not(test), no_main)]

mod cli;

skiff::program!(cli::run);
