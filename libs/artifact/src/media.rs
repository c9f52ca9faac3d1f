//! Media types and annotation names, and what a blob of each type is to us.
//!
//! The OVMS types come from the specification's table of blobs; the early drafts wrote them as
//! `application/vnd.hypr.ovms.…`, which [`canonical`] maps to today's names. Old names are read, never written.
//! A layer type is what containerd takes for one (`IsLayerType`): the OCI and the docker layer types, nothing else.

/// OVMS manifest (JSON); also the OCI manifest's `artifactType`.
pub const MANIFEST: &str = "application/vnd.ovms.manifest.v1+json";
/// Kernel: a bzImage or an x86-64 ELF file.
pub const KERNEL: &str = "application/vnd.ovms.kernel.v1";
/// Initial RAM disk, in any form the kernel reads.
pub const INITRD: &str = "application/vnd.ovms.initrd.v1";
/// RAM snapshot compressed by lz4.
pub const RAM_SNAPSHOT_LZ4: &str = "application/vnd.ovms.ramsnap.v1+lz4";
/// RAM snapshot compressed by zstd.
pub const RAM_SNAPSHOT_ZSTD: &str = "application/vnd.ovms.ramsnap.v1+zstd";
/// Bootstrap configuration (env, workdir, entrypoint, cmd, exposedPorts).
pub const BOOTSTRAP_CONFIG: &str = "application/vnd.ovms.bootstrap.config.v1+json";

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker's name for an index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's name for an image manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// OCI image configuration: the only config type (with docker's) that containerd unpacks.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Docker's name for an image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// The empty config `{}` of a pure artifact.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Uncompressed layer; the type of every disk layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Layer compressed by gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Layer compressed by zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Annotation of a disk layer: its disk format, `qcow2` or `raw`.
pub const ANNOTATION_FORMAT: &str = "ovms.format";
/// Annotation of an entry of `index.json`: the tag.
pub const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation of an entry of `index.json`: the full name under which containerd imports the image.
pub const ANNOTATION_IMAGE_NAME: &str = "io.containerd.image.name";

/// Folder inside a layer's tar that holds everything of ours.
pub const MEMBER_DIR: &str = "ovm";
/// Member of a layer's tar: the descriptor (an OVMS manifest).
pub const MEMBER_MANIFEST: &str = "ovm/manifest.json";
/// Member of a layer's tar: a qcow2 disk.
pub const MEMBER_QCOW2: &str = "ovm/disk.qcow2";
/// Member of a layer's tar: a raw disk.
pub const MEMBER_RAW: &str = "ovm/disk.raw";

/// First bytes of a qcow2 file (QEMU, docs/interop/qcow2.txt).
pub(crate) const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// How a blob's bytes are compressed, as its media type says (never its content).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not compressed.
    None,
    /// gzip, RFC 1952, any number of members.
    Gzip,
    /// zstd, RFC 8878, any number of frames.
    Zstd,
}

/// What a blob is, by its media type alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlobKind {
    /// The OVMS manifest.
    Manifest,
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// A RAM snapshot; its manifest names the compression.
    RamSnapshot,
    /// The bootstrap configuration.
    BootstrapConfig,
    /// A layer: containerd unpacks it, and it has a diff_id.
    Layer(Compression),
    /// Anything else: fetched and kept by containerd, without meaning to us.
    Other,
}

impl BlobKind {
    /// Classifies a media type, old aliases included.
    pub fn of(media_type: &str) -> Self {
        if let Some(compression) = layer_compression(media_type) {
            return Self::Layer(compression);
        }
        let name = canonical(media_type);
        match name.as_str() {
            MANIFEST => Self::Manifest,
            KERNEL => Self::Kernel,
            INITRD => Self::Initrd,
            RAM_SNAPSHOT_LZ4 | RAM_SNAPSHOT_ZSTD => Self::RamSnapshot,
            BOOTSTRAP_CONFIG => Self::BootstrapConfig,
            _ => Self::Other,
        }
    }
}

/// Today's name of a media type: parameters are cut, `vnd.hypr.ovms` becomes `vnd.ovms`.
pub fn canonical(media_type: &str) -> String {
    let bare = media_type.split(';').next().unwrap_or_default().trim();
    match bare.strip_prefix("application/vnd.hypr.ovms.") {
        Some(rest) => format!("application/vnd.ovms.{rest}"),
        None => bare.to_owned(),
    }
}

/// The compression of a layer type, `None` if containerd does not take this type for a layer.
pub fn layer_compression(media_type: &str) -> Option<Compression> {
    match media_type {
        OCI_LAYER
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Some(Compression::None),
        OCI_LAYER_GZIP
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Some(Compression::Gzip),
        OCI_LAYER_ZSTD
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Compression::Zstd),
        _ => None,
    }
}

/// The media type of an OCI layer that is compressed so.
pub fn layer_type(compression: Compression) -> &'static str {
    match compression {
        Compression::None => OCI_LAYER,
        Compression::Gzip => OCI_LAYER_GZIP,
        Compression::Zstd => OCI_LAYER_ZSTD,
    }
}

/// Whether a config of this type is an image configuration that containerd unpacks.
pub fn is_image_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// Whether this type is that of an index of manifests.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// Whether this type is that of an image manifest.
pub fn is_image_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_of_every_written_type_is_known() {
        assert_eq!(BlobKind::of(MANIFEST), BlobKind::Manifest);
        assert_eq!(BlobKind::of(KERNEL), BlobKind::Kernel);
        assert_eq!(BlobKind::of(INITRD), BlobKind::Initrd);
        assert_eq!(BlobKind::of(RAM_SNAPSHOT_LZ4), BlobKind::RamSnapshot);
        assert_eq!(BlobKind::of(BOOTSTRAP_CONFIG), BlobKind::BootstrapConfig);
        assert_eq!(BlobKind::of(OCI_LAYER), BlobKind::Layer(Compression::None));
        assert_eq!(BlobKind::of(OCI_LAYER_GZIP), BlobKind::Layer(Compression::Gzip));
        assert_eq!(BlobKind::of("text/plain"), BlobKind::Other);
    }

    #[test]
    fn kind_of_old_alias_is_that_of_the_new_name() {
        assert_eq!(BlobKind::of("application/vnd.hypr.ovms.manifest.v1+json"), BlobKind::Manifest);
        assert_eq!(BlobKind::of("application/vnd.hypr.ovms.kernel.v1"), BlobKind::Kernel);
        assert_eq!(BlobKind::of("application/vnd.hypr.ovms.ramsnap.v1+lz4"), BlobKind::RamSnapshot);
    }
}
