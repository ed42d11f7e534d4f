//! What a spec must satisfy as a whole, as a list of checks. Checks of one field live where it is planned.

use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use super::namespaces::Namespaces;
use crate::{Error, Result};

/// Checks that need nothing but the spec.
pub fn spec(spec: &Spec) -> Result<()> {
    version(spec.version())?;
    if spec.linux().is_none() {
        return Err(Error::invalid("linux", "must not be empty"));
    }
    if let Some(hooks) = spec.hooks() {
        let kinds = [
            ("prestart", hooks.prestart()),
            ("createRuntime", hooks.create_runtime()),
            ("createContainer", hooks.create_container()),
            ("startContainer", hooks.start_container()),
            ("poststart", hooks.poststart()),
            ("poststop", hooks.poststop()),
        ];
        for (kind, list) in kinds {
            for (at, hook) in list.iter().flatten().enumerate() {
                if !hook.path().is_absolute() {
                    return Err(Error::invalid(format!("hooks.{kind}[{at}].path"), "must be an absolute path"));
                }
                if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                    return Err(Error::invalid(format!("hooks.{kind}[{at}].timeout"), "must be greater than zero"));
                }
            }
        }
    }
    if spec.annotations().iter().flatten().any(|(key, _)| key.is_empty()) {
        return Err(Error::invalid("annotations", "a key is empty"));
    }
    Ok(())
}

/// Every 1.x of the runtime spec is readable by a reader of 1.x; anything else may mean something else.
fn version(version: &str) -> Result<()> {
    let mut parts = version.split(['-', '+']).next().unwrap_or("").split('.');
    let number = |part: Option<&str>| part.and_then(|p| p.parse::<u32>().ok());
    match (number(parts.next()), number(parts.next()), number(parts.next()), parts.next()) {
        (Some(1), Some(_), Some(_), None) => Ok(()),
        (Some(_), Some(_), Some(_), None) => {
            Err(Error::invalid("ociVersion", format!("{version:?} is not supported, 1.x is")))
        }
        _ if version.is_empty() => Err(Error::invalid("ociVersion", "must not be empty")),
        _ => Err(Error::invalid("ociVersion", format!("{version:?} is not a semantic version"))),
    }
}

/// Checks of fields against the namespaces that they change.
pub fn against_namespaces(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    let linux = spec.linux().as_ref();
    if !namespaces.has(Kind::Mount) {
        let lists =
            linux.map(|l| [("linux.maskedPaths", l.masked_paths()), ("linux.readonlyPaths", l.readonly_paths())]);
        for (field, list) in lists.into_iter().flatten() {
            if list.as_ref().is_some_and(|list| !list.is_empty()) {
                return Err(Error::invalid(field, "unable to restrict sys entries without a private MNT namespace"));
            }
        }
    }
    for (field, set) in [("hostname", spec.hostname().as_ref()), ("domainname", spec.domainname().as_ref())] {
        if set.is_some_and(|name| !name.is_empty()) && !namespaces.has(Kind::Uts) {
            return Err(Error::invalid(field, format!("unable to set {field} without a private UTS namespace")));
        }
    }
    Ok(())
}

/// A field that this version does not act on must not be passed over in silence.
pub fn unsupported(field: &str) -> Error {
    Error::invalid(field, "not supported yet").with_kind(crate::Kind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn any_1_x_version_is_accepted_and_nothing_else() {
        for good in ["1.0.0", "1.0.2-dev", "1.3.0", "1.2.1+dev", "1.99.0"] {
            version(good).unwrap();
        }
        for bad in ["", "1", "1.0", "0.9.0", "2.0.0", "x.y.z", "1.0.0.0"] {
            let err = version(bad).unwrap_err().to_string();
            assert!(err.starts_with("ociVersion: "), "{err}");
        }
    }
}
