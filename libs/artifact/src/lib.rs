//! What an OVMS image is made of, read from people and networks nobody vouches for.
//!
//! [`manifest`] and [`media`] are the specification's terms, [`digest`] checks bytes as they pass, [`decompress`] caps them, [`layer`] finds the
//! disk in a layer blob, [`layout`] reads and writes OCI image layouts, [`platform`] chooses among an index's images, [`image`] puts a manifest, its config and its
//! blobs together into one [`image::Resolved`] image, and [`build`] writes such images. Nothing here runs a machine,
//! parses a disk format or talks to a network, and nothing panics on input: the lints below see to it.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod archive;
pub mod build;
pub mod decompress;
pub mod digest;
pub mod image;
mod json;
pub mod layer;
pub mod layout;
pub mod manifest;
pub mod media;
pub mod platform;

pub use oci_spec::image as oci;
