//! containerd's wire types and clients, generated from `proto/` by the build script.
#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code, documented in containerd's API")]

pub mod types {
    tonic::include_proto!("containerd.types");
}
/// The services.
pub mod services {
    pub mod content {
        pub mod v1 {
            tonic::include_proto!("containerd.services.content.v1");
        }
    }
    pub mod containers {
        pub mod v1 {
            tonic::include_proto!("containerd.services.containers.v1");
        }
    }
    pub mod images {
        pub mod v1 {
            tonic::include_proto!("containerd.services.images.v1");
        }
    }
    pub mod leases {
        pub mod v1 {
            tonic::include_proto!("containerd.services.leases.v1");
        }
    }
}
pub use services::{containers::v1 as containers, content::v1 as content, images::v1 as images, leases::v1 as leases};
