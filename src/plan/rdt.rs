//! `linux.intelRdt`: a group of the kernel's resctrl file system, its schemata and its monitoring. Does not live here:
//! making it (rdt).

use oci_spec::runtime::Spec;

use crate::{Error, Result};

const FIELD: &str = "linux.intelRdt";
/// What the kernel itself has in the root of the file system.
const TAKEN: [&str; 5] = ["info", "mon_data", "mon_groups", ".", ".."];

/// A resource control group to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rdt {
    /// `closID`: a group that may be there already; `/` is the root group. None is one by the container's id.
    pub named: Option<String>,
    /// Lines for its `schemata`.
    pub schemata: Vec<String>,
    /// It gets a monitoring group by the container's id.
    pub monitored: bool,
}

/// Plans the group.
pub fn plan(spec: &Spec) -> Result<Option<Rdt>> {
    let Some(rdt) = spec.linux().as_ref().and_then(|linux| linux.intel_rdt().as_ref()) else { return Ok(None) };
    let named = rdt.clos_id().clone().filter(|id| !id.is_empty());
    if let Some(id) = named.as_deref().filter(|id| *id != "/")
        && (id.contains(['/', '\n', '\0']) || TAKEN.contains(&id))
    {
        return Err(Error::invalid(format!("{FIELD}.closID"), format!("invalid closID {id:?}: not a group's name")));
    }
    let mut schemata = lines(rdt.l3_cache_schema().as_deref(), rdt.mem_bw_schema().as_deref())?;
    for (at, line) in rdt.schemata().iter().flatten().enumerate() {
        if line.contains('\n') {
            return Err(Error::invalid(format!("{FIELD}.schemata[{at}]"), format!("{line:?} is more than a line")));
        }
        schemata.push(line.clone());
    }
    Ok(Some(Rdt { named, schemata, monitored: rdt.enable_monitoring() == &Some(true) }))
}

/// The lines of the two schemas: what the cache's has about memory bandwidth gives way to the other's (runtime spec,
/// config-linux.md, "IntelRdt").
pub fn lines(l3_cache: Option<&str>, mem_bw: Option<&str>) -> Result<Vec<String>> {
    let mem_bw = mem_bw.filter(|schema| !schema.is_empty());
    if let Some(schema) = mem_bw.filter(|schema| !schema.starts_with("MB:") || schema.contains('\n')) {
        let cause = format!("{schema:?} is not one line that begins with \"MB:\"");
        return Err(Error::invalid(format!("{FIELD}.memBwSchema"), cause));
    }
    let l3_cache = l3_cache.unwrap_or_default().lines().map(str::trim).filter(|line| !line.is_empty());
    let kept = l3_cache.filter(|line| mem_bw.is_none() || !line.starts_with("MB:"));
    Ok(kept.chain(mem_bw).map(str::to_string).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(rdt: &str) -> Result<Option<Rdt>> {
        plan(&serde_json::from_str(&format!(r#"{{"ociVersion":"1.3.0","linux":{{"intelRdt":{rdt}}}}}"#)).unwrap())
    }

    #[test]
    fn schemas_become_lines_in_their_order() {
        let rdt = planned(
            r#"{"closID":"gold","l3CacheSchema":"L3:0=f\nMB:0=10","memBwSchema":"MB:0=20","schemata":["L2:0=3"],
                "enableMonitoring":true}"#,
        )
        .unwrap()
        .unwrap();
        assert_eq!(rdt.schemata, ["L3:0=f", "MB:0=20", "L2:0=3"]);
        assert_eq!((rdt.named.as_deref(), rdt.monitored), (Some("gold"), true));
        let rdt = planned(r#"{"l3CacheSchema":"L3:0=f\nMB:0=10","enableMonitoring":false}"#).unwrap().unwrap();
        assert_eq!((rdt.schemata, rdt.named, rdt.monitored), (vec!["L3:0=f".into(), "MB:0=10".into()], None, false));
        assert_eq!(planned(r#"{"closID":"/"}"#).unwrap().unwrap().named.as_deref(), Some("/"));
        assert_eq!(planned(r#"{"closID":""}"#).unwrap().unwrap().named, None);
    }

    #[test]
    fn errors_name_the_field() {
        for (rdt, want) in [
            (r#"{"closID":"a/b"}"#, "linux.intelRdt.closID: invalid closID \"a/b\""),
            (r#"{"closID":".."}"#, "linux.intelRdt.closID: "),
            (r#"{"closID":"info"}"#, "linux.intelRdt.closID: "),
            (r#"{"memBwSchema":"L3:0=f"}"#, "linux.intelRdt.memBwSchema: "),
            (r#"{"memBwSchema":"MB:0=1\nL3:0=f"}"#, "linux.intelRdt.memBwSchema: "),
            (r#"{"schemata":["L3:0=f","L2:0=1\nMB:0=1"]}"#, "linux.intelRdt.schemata[1]: "),
        ] {
            let err = planned(rdt).unwrap_err().to_string();
            assert!(err.starts_with(want), "{rdt}: {err}");
        }
    }
}
