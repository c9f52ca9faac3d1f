//! Generates the message types and service traits that containerd calls from the files in `proto/`.

/// Messages that several services share.
const SHARED: &str = "../libs/containerd/proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let servers = ["proto/snapshots.proto", "proto/diff.proto"];
    for file in servers {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-changed={SHARED}/types.proto");
    tonic_prost_build::configure()
        .build_transport(false)
        .extern_path(".containerd.types", "::ovms_containerd::proto::types")
        .compile_protos(&servers, &["proto", SHARED])?;
    Ok(())
}
