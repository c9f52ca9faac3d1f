use super::*;
use crate::layout::Quiet;

struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn name(&self) -> String {
        "bytes".to_owned()
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn open(&self) -> io::Result<Box<dyn io::Read + '_>> {
        Ok(Box::new(self.0.as_slice()))
    }
}

/// Puts an image whose one layer is `layer`; returns its entry.
fn put_image(sink: &mut StoreSink, layer: &[u8], name: &str) -> oci::Descriptor {
    let mut put = |bytes: Vec<u8>| sink.put(&Bytes(bytes), &Quiet).unwrap();
    let (config, config_size) = put(b"{}".to_vec());
    let (layer, layer_size) = put(layer.to_vec());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
        "config": { "mediaType": media::OCI_CONFIG, "digest": config, "size": config_size },
        "layers": [{ "mediaType": media::OCI_LAYER, "digest": layer, "size": layer_size }],
    });
    let (digest, size) = put(manifest.to_string().into_bytes());
    let name = ImageName::parse(name).unwrap();
    serde_json::from_value(json!({
        "mediaType": media::OCI_MANIFEST, "digest": digest, "size": size,
        "annotations": { media::ANNOTATION_REF_NAME: name.tag, media::ANNOTATION_IMAGE_NAME: name.full },
    }))
    .unwrap()
}

fn add(store: &Store, layer: &[u8], name: &str) -> Digest {
    let mut sink = store.writer().unwrap();
    let entry = put_image(&mut sink, layer, name);
    let digest = digest_of(&entry, "").unwrap();
    Box::new(sink).finish(vec![entry]).unwrap();
    digest
}

fn blobs(store: &Store) -> usize {
    fs::read_dir(store.dir.join(BLOBS)).unwrap().count()
}

fn fresh() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("state/store")).unwrap();
    (dir, store)
}

#[test]
fn images_of_one_tag_live_beside_each_other_and_are_found_by_every_form_of_their_name() {
    let (_dir, store) = fresh();
    let a = add(&store, b"a", "debian:13");
    let b = add(&store, b"b", "localhost:5000/debian:13");

    let found = |text: &str| digest_of(&store.find(text).unwrap(), "").unwrap();
    assert_eq!([found("debian:13"), found("docker.io/library/debian:13")], [a, a]);
    assert_eq!([found("localhost:5000/debian:13"), found(&b.to_string()), found(&b.hex()[..8])], [b, b, b]);
    let unknown = store.find("debian").unwrap_err().to_string();
    assert!(unknown.contains("no image \"debian\"") && unknown.contains("ovm pull"), "{unknown}");
}

#[test]
fn a_name_that_is_given_again_leads_to_the_new_image() {
    let (_dir, store) = fresh();
    add(&store, b"a", "x:1");
    let b = add(&store, b"b", "x:1");

    assert_eq!(digest_of(&store.find("x:1").unwrap(), "").unwrap(), b);
    assert_eq!(store.layout().unwrap().entries().unwrap().len(), 1);
}

#[test]
fn remove_keeps_what_other_images_and_machines_need() {
    let (_dir, store) = fresh();
    let a = add(&store, b"a", "a:1");
    add(&store, b"a", "a:2");
    add(&store, b"b", "b:1");
    assert_eq!(blobs(&store), 5);

    let removed = store.remove("a:1", &[]).unwrap();
    assert_eq!(removed, Removed { names: vec!["docker.io/library/a:1".into()], images: vec![], freed: Some(0) });
    let removed = store.remove("a:2", &[a]).unwrap();
    assert_eq!((removed.images, removed.freed), (vec![a], Some(0)));
    assert!(store.image(&a).is_some());
    store.remove("b:1", &[]).unwrap();

    assert_eq!((blobs(&store), store.image(&a)), (0, None));
    assert!(matches!(store.remove("b:1", &[]), Err(LayoutError::UnknownName(_))));
}

#[test]
fn remove_while_blobs_are_added_leaves_them_to_the_next() {
    let (_dir, store) = fresh();
    add(&store, b"a", "a:1");
    let mut sink = store.writer().unwrap();
    let entry = put_image(&mut sink, b"b", "b:1");

    assert_eq!(store.remove("a:1", &[]).unwrap().freed, None);
    Box::new(sink).finish(vec![entry]).unwrap();

    assert!(store.collect(&[]).unwrap().unwrap() > 0);
    assert_eq!(blobs(&store), 3);
    assert!(store.find("b:1").is_ok());
}

#[test]
fn two_writers_lose_no_name() {
    let (_dir, store) = fresh();
    let (mut one, mut two) = (store.writer().unwrap(), store.writer().unwrap());
    let (a, b) = (put_image(&mut one, b"a", "a:1"), put_image(&mut two, b"b", "b:1"));

    Box::new(one).finish(vec![a]).unwrap();
    Box::new(two).finish(vec![b]).unwrap();

    assert!(store.find("a:1").is_ok() && store.find("b:1").is_ok());
}

#[test]
fn collect_with_an_unreadable_manifest_removes_nothing() {
    let (_dir, store) = fresh();
    let a = add(&store, b"a", "a:1");
    fs::write(store.dir.join(BLOBS).join(a.hex()), b"damaged").unwrap();

    assert!(store.collect(&[]).is_err());
    assert_eq!(blobs(&store), 3);
}

#[test]
fn the_store_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, store) = fresh();
    assert_eq!(fs::metadata(&store.dir).unwrap().permissions().mode() & 0o777, 0o700);
}
