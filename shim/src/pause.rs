//! Which container is a pod's pause container that the shim itself can be. Does not live here: what it does (the library).

use std::collections::HashMap;

use oci_spec::runtime::Spec;

/// Annotation of a pod: the shim holds it, without the program of the pause image; `false` against the option.
const BUILTIN: &str = "io.containerd.skiff.builtin-pause";
/// Annotation by which CRI names the pause container: `sandbox`.
const KIND: &str = "io.kubernetes.cri.container-type";

/// True when the container holds a pod, and its annotation, or else the option, wants it built in.
pub fn wanted(spec: &Spec, option: bool) -> bool {
    spec.annotations().as_ref().is_some_and(|all| of(all, option))
}

fn of(annotations: &HashMap<String, String>, option: bool) -> bool {
    let named = |name: &str| annotations.get(name).map(String::as_str);
    named(KIND) == Some("sandbox") && named(BUILTIN).map_or(option, |value| value == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_container_is_built_in_where_option_or_annotation_want_it() {
        let all = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let sandbox = (KIND, "sandbox");
        assert!(of(&all(&[sandbox]), true) && !of(&all(&[sandbox]), false));
        assert!(of(&all(&[sandbox, (BUILTIN, "true")]), false) && !of(&all(&[sandbox, (BUILTIN, "false")]), true));
        assert!(!of(&all(&[(KIND, "container"), (BUILTIN, "true")]), true), "a container runs its program");
        assert!(!of(&all(&[(BUILTIN, "true")]), true), "and so does what is not in a pod");
    }
}
