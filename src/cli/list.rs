//! `state`, `list` and `ps`.

use std::collections::BTreeMap;
use std::process::Command;

use clap::Args;
use serde::Serialize;
use skiff::container::{Container, OCI_VERSION, Status};
use skiff::{Error, Kind, Result};

use super::Globals;

/// A container as runc prints it, in runc's order.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(rename = "ociVersion")]
    oci_version: &'static str,
    id: String,
    pid: i32,
    status: String,
    bundle: String,
    rootfs: String,
    created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

fn row(container: &Container, owner: String) -> Result<Row> {
    let status = container.status()?;
    Ok(Row {
        oci_version: OCI_VERSION,
        id: container.id().to_string(),
        pid: if status == Status::Stopped { 0 } else { container.pid() },
        status: status.to_string(),
        bundle: container.bundle().display().to_string(),
        rootfs: container.rootfs().display().to_string(),
        created: container.created().to_string(),
        annotations: container.annotations().clone(),
        owner,
    })
}

/// `state`.
pub fn state(globals: &Globals, id: &str) -> Result<i32> {
    let row = row(&globals.container(id)?, String::new())?;
    print!("{}", serde_json::to_string_pretty(&row).map_err(|e| Error::invalid("state", e))?);
    Ok(0)
}

/// `list`.
#[derive(Debug, Args)]
pub struct List {
    /// select one of: table or json
    #[arg(short, long, default_value = "table")]
    format: String,
    /// display only container IDs
    #[arg(short, long)]
    quiet: bool,
}

impl List {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        if globals.explicit_root && !globals.root.exists() {
            let text = format!("open {:?}: no such file or directory", globals.root.display().to_string());
            return Err(Error::new(Kind::NotFound, text));
        }
        let containers = Container::list(&globals.root)?;
        if self.quiet {
            for container in &containers {
                println!("{}", container.id());
            }
            return Ok(0);
        }
        let rows = containers.iter().map(|c| row(c, owner(c.owner()))).collect::<Result<Vec<_>>>()?;
        match self.format.as_str() {
            "json" if rows.is_empty() => println!("null"),
            "json" => println!("{}", serde_json::to_string(&rows).map_err(|e| Error::invalid("list", e))?),
            "table" => table(&rows),
            _ => return Err(Error::new(Kind::Invalid, "invalid format option")),
        }
        Ok(0)
    }
}

/// Columns at least 12 wide, three blanks between them.
fn table(rows: &[Row]) {
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from);
    let rows = rows.iter().map(|row| {
        [&row.id, &row.pid.to_string(), &row.status, &row.bundle, &row.created, &row.owner].map(String::clone)
    });
    let lines: Vec<[String; 6]> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].len() + 3).max().unwrap_or(0).max(12);
    for line in &lines {
        let cells = line.iter().enumerate().map(|(at, cell)| match at {
            5 => cell.clone(),
            at => format!("{cell:<width$}", width = width(at)),
        });
        println!("{}", cells.collect::<String>());
    }
}

/// The name of a user, by the host's passwd; `#uid` without one.
fn owner(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid.to_string()).then(|| name.to_string())
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}

/// `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// select one of: table or json
    #[arg(short, long, default_value = "table")]
    format: String,
    #[arg(value_name = "container-id")]
    id: String,
    /// options for the host's ps
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

impl Ps {
    pub fn run(self, globals: &Globals) -> Result<i32> {
        let pids = globals.container(&self.id)?.pids()?;
        match self.format.as_str() {
            "json" => println!("{}", serde_json::json!(pids)),
            "table" => {
                let options = if self.options.is_empty() { vec!["-ef".to_string()] } else { self.options };
                let output = Command::new("ps").args(&options).output().map_err(|e| Error::io("run ps", &e))?;
                let text = String::from_utf8_lossy(&output.stdout);
                if !output.status.success() {
                    let said = String::from_utf8_lossy(&output.stderr);
                    return Err(Error::new(Kind::Invalid, format!("ps: {}", said.trim())));
                }
                for line in filter(&text, &pids)? {
                    println!("{line}");
                }
            }
            _ => return Err(Error::new(Kind::Invalid, "invalid format option")),
        }
        Ok(0)
    }
}

/// The header, and the lines whose PID is one of `pids`.
fn filter<'a>(text: &'a str, pids: &[i32]) -> Result<Vec<&'a str>> {
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split_whitespace().position(|name| name == "PID");
    let column = column.ok_or_else(|| Error::new(Kind::Invalid, "couldn't find PID field in ps output"))?;
    let ours = lines.filter(|line| {
        let pid = line.split_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        pid.is_some_and(|pid: i32| pids.contains(&pid))
    });
    Ok(std::iter::once(header).chain(ours).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ps_keeps_the_header_and_our_processes() {
        let text = "UID PID CMD\nroot 1 init\nroot 42 sleep 1\nroot 421 x";
        assert_eq!(filter(text, &[42]).unwrap(), ["UID PID CMD", "root 42 sleep 1"]);
        assert!(filter("USER CMD\n", &[1]).is_err());
    }
}
