//! Whether a manifest's disk layers are the disk layers that lie in the snapshots, each in its place.
//!
//! containerd has verified every layer against the image's config, but not what a descriptor says of them. A layer is known
//! by the digest of its tar (`diff_id`): recorded where we applied it ourselves, and tested by the name of its snapshot
//! (a chain id) where another differ did.

use ovms_artifact::digest::Digest;
use ovms_artifact::manifest::DiskFormat;

use super::ReadyLayer;
use crate::error::{Error, Result};

/// The manifest lists the layers that are there, in formats that they have; only a top that became a layer is in no
/// manifest.
pub fn check_disks(formats: &[DiskFormat], layers: &[ReadyLayer]) -> Result<()> {
    let disks: Vec<_> = layers.iter().filter_map(|layer| layer.info.disk?.format).collect();
    if formats.len() != disks.len() {
        let (listed, found) = (formats.len(), disks.len());
        return Err(Error::invalid(format!(
            "diskLayers: the manifest lists {listed} disk layers, the image has {found}"
        )));
    }
    for (index, (listed, found)) in formats.iter().zip(&disks).enumerate() {
        if listed != found {
            let (listed, found) = (listed.name(), found.name());
            return Err(Error::invalid(format!("diskLayers[{index}].format: is {listed}, but the layer is {found}")));
        }
    }
    Ok(())
}

/// No reference names another layer than the one in its place, as after an exchange of base and diff.
///
/// Only that can be proven: a reference that names no layer we know of is let through. It may be the digest of the disk's
/// own file, as in the descriptor of a commit, or that of a blob which we never saw: snapshots are shared by diff_ids
/// alone, so a layer that is here already is not applied again for an image that compresses it another way.
pub fn check_refs(refs: &[Option<Digest>], layers: &[ReadyLayer]) -> Result<()> {
    let disks = layers.iter().filter(|layer| layer.info.disk.is_some_and(|disk| disk.format.is_some()));
    for (index, (reference, here)) in refs.iter().zip(disks).enumerate() {
        let Some(reference) = reference else { continue };
        let named = |layer: &ReadyLayer| diff_id_of(reference, layer);
        let elsewhere = |diff_id: &Digest| here.is_diff_id(diff_id) == Some(false);
        if !layers.iter().filter_map(named).any(|diff_id| elsewhere(&diff_id)) {
            continue;
        }
        // Another differ has told nobody what it applied, but the manifest may list it in another place.
        let listed = || refs.iter().flatten().find(|other| here.is_diff_id(other) == Some(true)).copied();
        let found = here.info.diff_id.or_else(listed).map_or("another".into(), |diff_id| diff_id.to_string());
        return Err(Error::invalid(format!(
            "diskLayers[{index}].ref: is {reference}, another layer of the image: the disk layer in this place is {found}"
        )));
    }
    Ok(())
}

/// The diff_id of a layer, if a reference is known to name it, by that or by the blob that it came as.
fn diff_id_of(reference: &Digest, layer: &ReadyLayer) -> Option<Digest> {
    if layer.is_diff_id(reference) == Some(true) {
        return Some(*reference);
    }
    layer.info.diff_id.filter(|_| layer.info.blob.as_ref() == Some(reference))
}

/// The layers that the image's manifest names as its disk are the ones that hold disks.
pub fn check_places(places: &[usize], layers: &[ReadyLayer]) -> Result<()> {
    let in_image = |layer: &ReadyLayer| layer.info.disk.is_some_and(|disk| disk.format.is_some());
    let found: Vec<usize> = layers.iter().enumerate().filter(|(_, l)| in_image(l)).map(|(at, _)| at).collect();
    if places == found {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "diskLayers: the manifest names layers {places:?} as disks, the image has disks in {found:?}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Layer, LayerDisk};

    fn layer(format: Option<DiskFormat>) -> ReadyLayer {
        let disk = format.map(|format| LayerDisk { format: Some(format), virtual_size: 512 });
        ReadyLayer { dir: "/none".into(), info: Layer { disk, ..Layer::default() }, chain: None }
    }

    /// A disk layer that we applied.
    fn applied(tar: &str, blob: &str) -> ReadyLayer {
        let mut layer = layer(Some(DiskFormat::Raw));
        layer.info.diff_id = Some(Digest::of(tar.as_bytes()));
        layer.info.blob = Some(Digest::of(blob.as_bytes()));
        layer
    }

    /// One that another differ applied to the snapshot with this chain id.
    fn walked(below: Option<Digest>, tar: &str) -> ReadyLayer {
        let own = Digest::of(tar.as_bytes()).chained_on(below.as_ref());
        ReadyLayer { chain: Some(crate::machine::ChainId { below, own }), ..layer(Some(DiskFormat::Raw)) }
    }

    fn refs(texts: &[&str]) -> Vec<Option<Digest>> {
        texts.iter().map(|text| Some(Digest::of(text.as_bytes()))).collect()
    }

    #[test]
    fn check_disks_names_what_does_not_fit() {
        let layers = [layer(Some(DiskFormat::Qcow2)), layer(None), layer(Some(DiskFormat::Raw))];
        assert!(check_disks(&[DiskFormat::Qcow2, DiskFormat::Raw], &layers).is_ok());
        let err = check_disks(&[DiskFormat::Qcow2], &layers).unwrap_err().chain();
        assert!(err.contains("lists 1 disk layers, the image has 2"), "{err}");
        let err = check_disks(&[DiskFormat::Qcow2, DiskFormat::Qcow2], &layers).unwrap_err().chain();
        assert!(err.contains("diskLayers[1].format: is qcow2, but the layer is raw"), "{err}");
    }

    #[test]
    fn check_refs_exchanged_layers_returns_both_digests() {
        let base = Digest::of(b"base").chained_on(None);
        let walked = [walked(None, "base"), walked(Some(base), "diff")];
        for layers in [[applied("base", "base.gz"), applied("diff", "diff.gz")], walked] {
            assert!(check_refs(&refs(&["base", "diff"]), &layers).is_ok());
            let err = check_refs(&refs(&["diff", "base"]), &layers).unwrap_err().chain();
            let (base, diff) = (Digest::of(b"base"), Digest::of(b"diff"));
            let expected = format!("diskLayers[0].ref: is {diff}, another layer of the image: the disk layer");
            assert!(err.starts_with(&expected) && err.ends_with(&base.to_string()), "{err}");
        }
    }

    #[test]
    fn check_refs_takes_a_blob_for_its_layer_only() {
        let layers = [applied("base", "base.gz"), applied("diff", "diff.gz")];
        assert!(check_refs(&refs(&["base.gz", "diff.gz"]), &layers).is_ok());
        let err = check_refs(&refs(&["base", "base.gz"]), &layers).unwrap_err().chain();
        assert!(err.starts_with("diskLayers[1].ref: is "), "{err}");
        // The descriptor's layer is none of the disk's.
        let mut layers = Vec::from(layers);
        layers.push(ReadyLayer { info: Layer { disk: None, ..applied("text", "text").info }, ..layer(None) });
        assert!(check_refs(&refs(&["base", "text"]), &layers).is_err());
    }

    #[test]
    fn check_refs_lets_through_what_cannot_be_known() {
        let layers = [applied("base", "base.gz"), applied("diff", "diff.gz")];
        // Another compression, a disk's own file, and no digest at all.
        assert!(check_refs(&refs(&["base.zst", "disk.qcow2"]), &layers).is_ok());
        assert!(check_refs(&[None, None], &layers).is_ok());
        // One layer twice, also by two blobs.
        let twice = [applied("base", "base.gz"), applied("base", "base.zst")];
        assert!(check_refs(&refs(&["base", "base"]), &twice).is_ok());
        assert!(check_refs(&refs(&["base.zst", "base.gz"]), &twice).is_ok());
        // What lies here may be the other layer once more.
        let unknown = [applied("base", "base.gz"), layer(Some(DiskFormat::Raw))];
        assert!(check_refs(&refs(&["base", "base"]), &unknown).is_ok());
    }

    #[test]
    fn check_places_wants_the_disks_where_the_image_says() {
        let layers = [layer(Some(DiskFormat::Qcow2)), layer(None), layer(Some(DiskFormat::Raw))];
        assert!(check_places(&[0, 2], &layers).is_ok());
        assert!(check_places(&[0, 1], &layers).is_err());
    }
}
