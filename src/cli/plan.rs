//! `plan`: what a create of a bundle would do, in words. Needs no privilege and does none of it.

use std::path::PathBuf;

use clap::Args;
use skiff::launch::seccomp;
use skiff::{Error, Kind, Result, plan};

use super::Globals;

/// `plan`.
#[derive(Debug, Args)]
pub struct Plan {
    /// select one of: text or json
    #[arg(short, long, default_value = "text")]
    format: String,
    /// do not use pivot root to jail process inside rootfs
    #[arg(long)]
    no_pivot: bool,
    /// do not create a new session keyring for the container
    #[arg(long)]
    no_new_keyring: bool,
    #[arg(default_value = ".")]
    bundle: PathBuf,
}

impl Plan {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let spec = skiff::bundle::load(&self.bundle, None)?;
        let name = self.bundle.display().to_string();
        let bundle = std::fs::canonicalize(&self.bundle).map_err(|e| Error::io(format!("open bundle {name:?}"), &e))?;
        let request = plan::Request {
            id: "ID",
            bundle: &bundle,
            terminal: spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false),
            systemd_cgroup: globals.systemd_cgroup,
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            rootless: globals.rootless,
        };
        let plan = plan::build(&request, &spec, &skiff::host::Cgroups::read()?)?;
        let filter = plan.seccomp.as_ref().map(seccomp::compile).transpose()?;
        let lines = plan::explain::lines(&plan, filter.map_or(0, |filter| filter.program().len()));
        match self.format.as_str() {
            "json" => {
                println!("{}", serde_json::to_string_pretty(&lines).map_err(|e| Error::invalid("plan", e))?);
            }
            "text" => {
                for (at, line) in lines.iter().enumerate() {
                    println!("{:>3}. {:<13} {}", at + 1, line.step, line.does);
                }
            }
            _ => return Err(Error::new(Kind::Invalid, "invalid format option")),
        }
        Ok(0)
    }
}
