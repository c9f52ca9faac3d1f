//! Generates the message types and service traits of containerd's API from the files in `proto/`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let servers = ["proto/snapshots.proto", "proto/diff.proto"];
    let clients = ["proto/content.proto", "proto/containers.proto", "proto/images.proto", "proto/leases.proto"];
    for file in servers.iter().chain(&clients).chain(&["proto/types.proto"]) {
        println!("cargo:rerun-if-changed={file}");
    }
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".containerd.services.content.v1")
        .compile_protos(&[&servers[..], &clients[..]].concat(), &["proto"])?;
    Ok(())
}
