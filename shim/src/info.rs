//! `-info`: what containerd asks the runtime about itself (api/types/introspection.proto).

use std::io::Read;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use skiff::{Error, Result};

/// The RuntimeInfo. Options on stdin are given back.
pub fn reply() -> Result<Vec<u8>> {
    let mut stdin = Vec::new();
    std::io::stdin().take(10 << 20).read_to_end(&mut stdin).map_err(|e| Error::io("read the options", &e))?;
    let options = Some(stdin).filter(|bytes| !bytes.is_empty()).and_then(|bytes| Any::parse_from_bytes(&bytes).ok());
    let info = RuntimeInfo {
        name: "io.containerd.skiff.v2".into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..RuntimeVersion::default()
        }),
        options: options.into(),
        features: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".into(),
            value: skiff::features::document().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes().map_err(|e| Error::invalid("RuntimeInfo", e))
}
