//! The features document (runtime spec, features-linux.md): what this build supports, not what this host can do.

use serde_json::{Value, json};

use crate::plan::mount_options::KNOWN;
use crate::plan::namespaces::{KINDS, name};

/// The document.
pub fn document() -> Value {
    let mut namespaces: Vec<&str> = KINDS.iter().map(|kind| name(*kind)).collect();
    namespaces.sort_unstable();
    let capabilities: Vec<String> = (0..64).map_while(capability).collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": crate::container::OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": KNOWN.as_slice(),
        "linux": {
            "namespaces": namespaces,
            "capabilities": capabilities,
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": architectures(),
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": true, "schemata": true, "monitoring": true},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": true},
            "memoryPolicy": {
                "modes": [
                    "MPOL_BIND", "MPOL_DEFAULT", "MPOL_INTERLEAVE", "MPOL_LOCAL", "MPOL_PREFERRED",
                    "MPOL_PREFERRED_MANY", "MPOL_WEIGHTED_INTERLEAVE",
                ],
                "flags": ["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"],
            },
        },
        "annotations": annotations(),
        "potentiallyUnsafeConfigAnnotations": [
            "io.containerd.skiff.checkpoint", "io.containerd.skiff.exec-keeps-children", "org.criu.config",
            "org.systemd.property.",
        ],
    })
}

/// What the C library at hand knows.
fn architectures() -> Vec<&'static str> {
    let mut known = vec![
        "SCMP_ARCH_AARCH64",
        "SCMP_ARCH_ARM",
        "SCMP_ARCH_MIPS",
        "SCMP_ARCH_MIPS64",
        "SCMP_ARCH_MIPS64N32",
        "SCMP_ARCH_MIPSEL",
        "SCMP_ARCH_MIPSEL64",
        "SCMP_ARCH_MIPSEL64N32",
        "SCMP_ARCH_PPC",
        "SCMP_ARCH_PPC64",
        "SCMP_ARCH_PPC64LE",
        "SCMP_ARCH_RISCV64",
        "SCMP_ARCH_S390",
        "SCMP_ARCH_S390X",
        "SCMP_ARCH_X32",
        "SCMP_ARCH_X86",
        "SCMP_ARCH_X86_64",
    ];
    if libseccomp::check_version(libseccomp::ScmpVersion::from((2, 6, 0))).unwrap_or(false) {
        known.insert(2, "SCMP_ARCH_LOONGARCH64");
    }
    known
}

fn annotations() -> Value {
    let mut out = json!({"io.containerd.skiff.version": env!("CARGO_PKG_VERSION")});
    if let Ok(version) = libseccomp::ScmpVersion::current() {
        out["io.github.seccomp.libseccomp.version"] = version.to_string().into();
    }
    out
}

fn capability(number: u8) -> Option<String> {
    caps::all().into_iter().find(|cap| cap.index() == number).map(|cap| cap.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_says_what_callers_look_for() {
        let document = document();
        assert!(document["mountOptions"].as_array().unwrap().contains(&json!("rro")));
        assert_eq!(document["linux"]["namespaces"].as_array().unwrap().len(), 8);
        assert_eq!(document["linux"]["capabilities"][0], "CAP_CHOWN");
        assert_eq!(document["linux"]["mountExtensions"]["idmap"]["enabled"], true);
    }
}
