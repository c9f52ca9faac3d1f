//! The services that containerd calls, generated from `proto/` by the build script. The messages that they share with the
//! services that we call are those of `ovms_containerd`.
#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code, documented in containerd's API")]

pub mod snapshots {
    tonic::include_proto!("containerd.services.snapshots.v1");
}
pub mod diff {
    tonic::include_proto!("containerd.services.diff.v1");
}
