use std::io::Write;

use super::*;
use crate::digest::VerifyingReader;

fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn manifest() -> Vec<u8> {
    Manifest::new("a", "1").to_bytes().unwrap()
}

fn encoding(compression: Compression, annotated: Option<DiskFormat>) -> Encoding {
    Encoding { compression, annotated }
}

const PLAIN: Encoding = Encoding { compression: Compression::None, annotated: None };

/// A summary, and the disk as its visitor saw it.
type Seen = (LayerSummary, Option<(DiskFormat, Vec<u8>)>);

fn read_all(bytes: &[u8], encoding: Encoding) -> Result<Seen, LayerError> {
    let mut disk = None;
    let summary = read(bytes, encoding, &Limits::default(), &mut |file| {
        let mut content = Vec::new();
        file.reader.read_to_end(&mut content)?;
        disk = Some((file.format, content));
        Ok(())
    })?;
    Ok((summary, disk))
}

#[test]
fn disk_and_descriptor_are_found_by_their_names() {
    let bytes = tar_of(&[("ovm/disk.qcow2", b"disk"), ("ovm/manifest.json", &manifest())]);

    let (summary, disk) = read_all(&bytes, PLAIN).unwrap();

    assert_eq!(disk, Some((DiskFormat::Qcow2, b"disk".to_vec())));
    assert_eq!(summary.diff_id, Digest::of(&bytes));
    assert_eq!(summary.size, bytes.len() as u64);
    assert_eq!(summary.descriptor, Some(manifest()));
    let disk = summary.disk.unwrap();
    assert_eq!((disk.size, disk.bare, disk.digest), (4, false, None));
}

#[test]
fn disk_below_its_own_descriptor_has_a_digest() {
    let bytes = tar_of(&[("./ovm/manifest.json", &manifest()), ("./ovm/disk.raw", b"disk")]);

    let (summary, _) = read_all(&bytes, PLAIN).unwrap();

    assert_eq!(summary.disk.unwrap().digest, Some(Digest::of(b"disk")));
}

#[test]
fn compressed_layers_have_the_diff_id_of_their_content() {
    let bytes = tar_of(&[("ovm/disk.raw", &[5; 100_000])]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&bytes).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(bytes.as_slice(), 1).unwrap();

    for (blob, compression) in [(gzip, Compression::Gzip), (zstd, Compression::Zstd)] {
        let reader = VerifyingReader::new(blob.as_slice(), Digest::of(&blob), blob.len() as u64);
        let summary = read(reader, encoding(compression, None), &Limits::default(), &mut |_| Ok(())).unwrap();
        assert_eq!(summary.diff_id, Digest::of(&bytes));
    }
}

#[test]
fn bare_disk_takes_its_format_from_the_annotation() {
    let disk = vec![7; 4096];
    let (summary, found) = read_all(&disk, encoding(Compression::None, Some(DiskFormat::Raw))).unwrap();
    assert_eq!(found, Some((DiskFormat::Raw, disk.clone())));
    assert_eq!(summary.diff_id, Digest::of(&disk));
    assert!(summary.disk.unwrap().bare);
}

/// Snapshots are shared by content: what an image says of another image's blob must not change what the blob is.
#[test]
fn an_annotation_never_makes_an_archive_a_disk() {
    let ordinary = tar_of(&[("bin/busybox", b"elf"), ("etc/passwd", b"root")]);
    let gzip = {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&ordinary).unwrap();
        gzip.finish().unwrap()
    };
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        for (blob, compression) in [(&ordinary, Compression::None), (&gzip, Compression::Gzip)] {
            let error = read_all(blob, encoding(compression, Some(format))).unwrap_err();
            assert!(matches!(error, LayerError::Archived { .. }), "{error:?}");
            let error = error.to_string();
            let says = format!("ovms.format says that the layer is a {} disk", format.name());
            assert!(error.contains(&says) && error.contains("\"bin/busybox\""), "{error}");
            assert!(error.contains("must not have the annotation") && error.contains("tar-wrapped"), "{error}");
        }
        let empty = read_all(&[0; 1024], encoding(Compression::None, Some(format)));
        assert!(matches!(empty, Err(LayerError::Archived { found, .. }) if found == "an empty tar archive"));
    }
}

#[test]
fn bare_disk_that_begins_with_zeros_is_a_disk() {
    let raw = encoding(Compression::None, Some(DiskFormat::Raw));
    let mut boot_sector_less = vec![0; 2048];
    boot_sector_less[1080] = 0x53;
    assert_eq!(read_all(&boot_sector_less, raw).unwrap().1.unwrap().1, boot_sector_less);
    let blank = vec![0; (1 << 20) + 512];
    assert_eq!(read_all(&blank, raw).unwrap().1.unwrap().1, blank);
}

#[test]
fn bare_raw_disk_with_a_qcow2_header_is_refused_and_stays_raw_in_a_tar() {
    let disk = b"QFI\xfb\0\0\0\x03";
    let error = read_all(disk, encoding(Compression::None, Some(DiskFormat::Raw))).unwrap_err();
    assert!(matches!(error, LayerError::Qcow2), "{error}");
    let (_, found) = read_all(&tar_of(&[("ovm/disk.raw", disk)]), PLAIN).unwrap();
    assert_eq!(found, Some((DiskFormat::Raw, disk.to_vec())));
}

#[test]
fn unannotated_disk_is_refused_with_the_way_out() {
    let error = read_all(b"QFI\xfb\0\0\0\x03", PLAIN).unwrap_err().to_string();
    assert!(error.contains("ovms.format") && error.contains("skopeo copy --preserve-digests"), "{error}");
    assert!(matches!(read_all(&vec![0; 2 << 20], PLAIN), Err(LayerError::Unannotated)));
    assert!(matches!(read_all(&[0; 1024], PLAIN), Err(LayerError::Empty)));
}

#[test]
fn ordinary_layers_are_told_apart_at_their_first_file() {
    let ordinary = tar_of(&[("bin/sh", b"x"), ("ovm/disk.raw", b"y")]);
    assert!(matches!(read_all(&ordinary, PLAIN), Err(LayerError::Ordinary(name)) if name == "bin/sh"));
    let mixed = tar_of(&[("ovm/disk.raw", b"y"), ("bin/sh", b"x")]);
    assert!(matches!(read_all(&mixed, PLAIN), Err(LayerError::Foreign(name)) if name == "bin/sh"));
}

#[test]
fn two_disks_are_refused() {
    let bytes = tar_of(&[("ovm/disk.raw", b"y"), ("ovm/disk.qcow2", b"x")]);
    assert!(matches!(read_all(&bytes, PLAIN), Err(LayerError::TwoDisks)));
    let twice = tar_of(&[("ovm/disk.raw", b"y"), ("ovm/disk.raw", b"x")]);
    assert!(matches!(read_all(&twice, PLAIN), Err(LayerError::Archive(ArchiveError::Duplicate(_)))));
}

#[test]
fn a_link_in_the_disks_place_is_refused() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "ovm/disk.raw", "/etc/shadow").unwrap();
    let bytes = builder.into_inner().unwrap();
    assert!(matches!(read_all(&bytes, PLAIN), Err(LayerError::Archive(ArchiveError::Kind(_, "symbolic link")))));
}

#[test]
fn annotation_and_member_must_agree() {
    let bytes = tar_of(&[("ovm/disk.raw", b"y")]);
    let error = read_all(&bytes, encoding(Compression::None, Some(DiskFormat::Qcow2))).unwrap_err();
    assert!(matches!(error, LayerError::FormatMismatch { annotation: "qcow2", member: "raw" }));
}

#[test]
fn descriptor_that_is_no_manifest_is_refused() {
    let bytes = tar_of(&[("ovm/manifest.json", b"{}")]);
    assert!(matches!(read_all(&bytes, PLAIN), Err(LayerError::Descriptor(_))));
}

#[test]
fn identify_unknown_type_or_format_returns_error() {
    assert!(matches!(Encoding::identify("text/plain", None), Err(LayerError::MediaType(_))));
    assert!(matches!(Encoding::identify(media::OCI_LAYER, Some("ovfms")), Err(LayerError::Format(_))));
    let gzip = Encoding::identify(media::OCI_LAYER_GZIP, Some("raw")).unwrap();
    assert_eq!(gzip, encoding(Compression::Gzip, Some(DiskFormat::Raw)));
}

#[test]
fn disk_beyond_the_limit_is_refused_before_it_is_read() {
    let limits = Limits { disk: 10, ..Limits::default() };
    let wrapped = tar_of(&[("ovm/disk.raw", &[1; 11])]);
    let mut called = false;
    let error = read(wrapped.as_slice(), PLAIN, &limits, &mut |_| {
        called = true;
        Ok(())
    });
    assert!(matches!(error, Err(LayerError::TooLarge { what: "disk", limit: 10 })) && !called);

    let bare = read(&[1; 11][..], encoding(Compression::None, Some(DiskFormat::Raw)), &limits, &mut |_| Ok(()));
    assert!(matches!(bare, Err(LayerError::TooLarge { what: "disk", limit: 10 })));
}

#[test]
fn a_decompression_bomb_is_stopped_at_its_ratio() {
    let bomb = zstd::encode_all(std::io::repeat(0).take(64 << 20), 1).unwrap();
    let mut bytes = 0u64;
    let error = read_capped(
        bomb.as_slice(),
        encoding(Compression::Zstd, Some(DiskFormat::Raw)),
        &Limits::default(),
        Caps::new(u64::MAX, 1000).judged_from(1 << 20),
        &mut |file| {
            bytes = std::io::copy(file.reader, &mut std::io::sink())?;
            Ok(())
        },
    );
    assert!(matches!(error, Err(LayerError::Ratio(1000))), "{error:?} after {bytes}");
}

#[test]
fn a_visitors_own_error_comes_back() {
    let bytes = tar_of(&[("ovm/disk.raw", b"y")]);
    let error = read(bytes.as_slice(), PLAIN, &Limits::default(), &mut |_| Err("no space".into())).unwrap_err();
    assert!(matches!(error, LayerError::Visitor(inner) if inner.to_string() == "no space"));

    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull).into();
    let error = read(bytes.as_slice(), PLAIN, &Limits::default(), &mut |_| Err(full())).unwrap_err();
    assert!(matches!(error, LayerError::Visitor(_)), "an error of the visitor's own output is its own: {error}");
}

#[test]
fn wrong_blob_digest_is_an_error_even_when_the_tar_is_fine() {
    let bytes = tar_of(&[("ovm/disk.raw", b"y")]);
    let reader = VerifyingReader::new(bytes.as_slice(), Digest::of(b"other"), bytes.len() as u64);
    let error = read(reader, PLAIN, &Limits::default(), &mut |_| Ok(())).unwrap_err();
    assert!(matches!(error, LayerError::Io(e) if e.to_string().contains("wrong digest")));
}

proptest::proptest! {
    #[test]
    fn any_bytes_under_any_type_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2048)) {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            for annotated in [None, Some(DiskFormat::Raw), Some(DiskFormat::Qcow2)] {
                let _ = read_all(&bytes, encoding(compression, annotated));
            }
        }
    }
}
