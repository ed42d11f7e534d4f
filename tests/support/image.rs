//! An OCI image archive, made on the spot: busybox, and a pause image of the same layer.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::bundle::fill_rootfs;

/// The name that the image has once it is imported.
pub const NAME: &str = "localhost/busybox:test";

/// The name of the image that pods hold their namespaces with: it waits, and reaps what it inherits.
pub const PAUSE: &str = "localhost/pause:test";
const WAIT: &str = "sleep 2147483647 & while :; do wait; sleep 1; done";

fn tar(dir: &Path, archive: &Path) {
    let status = Command::new("tar").arg("-C").arg(dir).arg("-cf").arg(archive).arg(".").status();
    assert!(status.expect("tar runs").success());
}

fn digest(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("a digest").to_string()
}

/// Makes the archive in `dir`.
pub fn make(dir: &Path) -> PathBuf {
    let (rootfs, layout) = (dir.join("rootfs"), dir.join("layout"));
    let blobs = layout.join("blobs/sha256");
    fill_rootfs(&rootfs);
    std::fs::create_dir_all(&blobs).expect("make an image layout");
    let store = |name: &str, bytes: Option<String>| {
        let path = dir.join(name);
        if let Some(bytes) = bytes {
            std::fs::write(&path, bytes).expect("write a blob");
        }
        let size = std::fs::metadata(&path).expect("a blob").len();
        let digest = digest(&path);
        std::fs::rename(&path, blobs.join(&digest)).expect("store a blob");
        (format!("sha256:{digest}"), size)
    };
    tar(&rootfs, &dir.join("layer"));
    let (layer, layer_size) = store("layer", None);
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let image = |name: &str, command: serde_json::Value| {
        let config = json!({"architecture": architecture(), "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer]}});
        let (config, config_size) = store("config", Some(config.to_string()));
        let manifest = json!({"schemaVersion": 2, "mediaType": manifest_type,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": layer_size}]});
        let (manifest, manifest_size) = store("manifest", Some(manifest.to_string()));
        json!({"mediaType": manifest_type, "digest": manifest, "size": manifest_size,
            "annotations": {"io.containerd.image.name": name}})
    };
    let images = [image(NAME, json!(["sh"])), image(PAUSE, json!(["sh", "-c", WAIT]))];
    let index = json!({"schemaVersion": 2, "manifests": images});
    std::fs::write(layout.join("index.json"), index.to_string()).expect("write the index");
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write the layout");
    let archive = dir.join("image.tar");
    tar(&layout, &archive);
    archive
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
