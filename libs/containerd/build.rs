//! Generates the clients of containerd's API from the files in `proto/`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let clients = ["proto/content.proto", "proto/containers.proto", "proto/images.proto", "proto/leases.proto"];
    for file in clients.iter().chain(&["proto/types.proto"]) {
        println!("cargo:rerun-if-changed={file}");
    }
    tonic_prost_build::configure()
        .build_transport(false)
        .build_server(false)
        .bytes(".containerd.services.content.v1")
        .compile_protos(&clients, &["proto"])?;
    Ok(())
}
