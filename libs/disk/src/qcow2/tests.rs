//! A corpus of images that are wrong in one place each, and what is said of them (compare QEMU's iotests 060 and 080).

use super::*;
use crate::{
    layer::{self, Format, Limits},
    Error, LayerMap, Result, State,
};

const CLUSTER: usize = 65536;

/// A sound v3 image: header, refcount table, refcount block, L1 at 3, L2 at 4, data at 5; 1 MiB of disk, its first
/// cluster data, its second zero.
fn sound() -> Vec<u8> {
    let mut image = vec![0_u8; 6 * CLUSTER];
    set32(&mut image, 0, MAGIC);
    set32(&mut image, 4, 3);
    set32(&mut image, 20, 16);
    set64(&mut image, 24, 1 << 20);
    set32(&mut image, 36, 1);
    set64(&mut image, 40, 3 * CLUSTER as u64);
    set64(&mut image, 48, CLUSTER as u64);
    set32(&mut image, 56, 1);
    set32(&mut image, 96, 4);
    set32(&mut image, 100, 104);
    set64(&mut image, CLUSTER, 2 * CLUSTER as u64);
    for i in 0..6 {
        image[2 * CLUSTER + 2 * i + 1] = 1;
    }
    set64(&mut image, 3 * CLUSTER, (4 * CLUSTER as u64) | COPIED);
    set64(&mut image, 4 * CLUSTER, (5 * CLUSTER as u64) | COPIED);
    set64(&mut image, 4 * CLUSTER + 8, ZERO);
    image[5 * CLUSTER..].fill(7);
    image
}

fn set32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn set64(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// A header extension behind the header, with an end behind it.
fn extend(image: &mut [u8], kind: u32, body: &[u8]) {
    set32(image, 104, kind);
    set32(image, 108, body.len() as u32);
    image[112..112 + body.len()].copy_from_slice(body);
}

fn convert_with(image: &[u8], limits: &Limits) -> Result<LayerMap> {
    let data = tempfile::tempfile().unwrap();
    layer::convert(&image, Format::Qcow2, &data, limits, &mut |_, _| {})
}

fn convert(image: &[u8]) -> Result<LayerMap> {
    convert_with(image, &Limits::default())
}

/// Changes the sound image and returns what is said of it.
fn why(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut image = sound();
    change(&mut image);
    convert(&image).expect_err("the image was accepted").to_string()
}

#[test]
fn sound_image_is_read() {
    let map = convert(&sound()).unwrap();
    let states: Vec<_> = map.extents().map(|e| (e.start, e.len, e.state)).collect();
    let c = CLUSTER as u64;
    assert_eq!(states, [(0, c, State::Data), (c, c, State::Zero), (2 * c, 14 * c, State::Absent)]);
}

#[test]
fn wrong_header_fields_are_named() {
    type Change = fn(&mut Vec<u8>);
    let cases: &[(Change, &str)] = &[
        (|i| i.truncate(3), "no qcow2 image"),
        (|i| i.clear(), "no qcow2 image"),
        (|i| i.truncate(80), "a header of"),
        (|i| set32(i, 0, 0x5146_4900), "no qcow2 image"),
        (|i| set32(i, 4, 1), "format version 1"),
        (|i| set32(i, 4, 4), "format version 4"),
        (|i| set32(i, 20, 8), "2^8"),
        (|i| set32(i, 20, 22), "2^22"),
        (|i| set32(i, 20, u32::MAX), "cluster size"),
        (|i| set32(i, 100, 72), "a header of 72 bytes"),
        (|i| set32(i, 100, 0x7fff_fff8), "a header of"),
        (|i| set32(i, 96, 7), "refcount width"),
        (|i| set32(i, 32, 1), "encryption"),
        (|i| set32(i, 32, 2), "encryption"),
        (|i| set64(i, 24, u64::MAX), "virtual size"),
        (|i| set64(i, 24, (64 << 40) + 512), "virtual size"),
        (|i| set64(i, 24, 8 << 40), "too small"),
        (|i| set32(i, 36, 0), "too small"),
        (|i| set32(i, 36, 0x0040_0001), "L1 table size"),
        (|i| set32(i, 36, u32::MAX), "L1 table size"),
        (|i| set64(i, 40, 3 * CLUSTER as u64 + 512), "L1 table"),
        (|i| set64(i, 40, u64::MAX - 0xffff), "L1 table"),
        (|i| set64(i, 40, 0), "overlap"),
        (|i| set64(i, 40, CLUSTER as u64), "overlap"),
        (|i| set64(i, 40, 6 * CLUSTER as u64), "L1 table"),
        (|i| set64(i, 48, 0), "overlap"),
        (|i| set64(i, 48, 512), "refcount table"),
        (|i| set64(i, 48, u64::MAX - 0xffff), "refcount table"),
        (|i| set32(i, 56, u32::MAX), "refcount table size"),
        (|i| set64(i, 72, 1 << 1), "marked as corrupt"),
        (|i| set64(i, 72, 1 << 2), "external data file \"\""),
        (|i| set64(i, 72, 1 << 3), "compression type 0"),
        (|i| set64(i, 72, 1 << 5), "unknown incompatible feature bit 5"),
        (|i| set64(i, 72, 1 << 63), "unknown incompatible feature bit 63"),
    ];
    for (n, (change, want)) in cases.iter().enumerate() {
        let why = why(change);
        assert!(why.contains(want), "case {n}: {why:?} does not contain {want:?}");
    }
}

#[test]
fn harmless_header_fields_are_accepted() {
    type Change = fn(&mut Vec<u8>);
    let cases: &[Change] = &[
        |i| set64(i, 72, 1),                       // dirty: only refcounts are stale
        |i| set64(i, 80, u64::MAX),                // compatible features
        |i| set64(i, 88, u64::MAX),                // autoclear features
        |i| set32(i, 60, 3),                       // internal snapshots are passed over
        |i| extend(i, 0xe279_2aca, b"qcow2"),      // format of a backing file that there is not
        |i| extend(i, 0x1234_5678, &[0xff; 1000]), // unknown
        |i| extend(i, 0x4441_5441, b""),           // no data file
        |i| {
            // A backing file name that is empty.
            set64(i, 8, 512);
            set32(i, 16, 0);
        },
    ];
    for (n, change) in cases.iter().enumerate() {
        let mut image = sound();
        change(&mut image);
        assert!(convert(&image).is_ok(), "case {n}: {:?}", convert(&image));
    }
}

#[test]
fn names_of_other_files_are_refused_and_shown() {
    let backed = why(|i| {
        set64(i, 8, 512);
        set32(i, 16, 11);
        i[512..523].copy_from_slice(b"/etc/shadow");
    });
    assert!(backed.contains("backing file \"/etc/shadow\""), "{backed}");
    let data = why(|i| extend(i, 0x4441_5441, b"/dev/sda"));
    assert!(data.contains("external data file \"/dev/sda\""), "{data}");
    assert!(why(|i| extend(i, 0x0537_be77, &[0; 16])).contains("encryption"));
    let far = why(|i| {
        set64(i, 8, CLUSTER as u64 + 1);
        set32(i, 16, 10);
    });
    assert!(far.contains("outside of the header cluster"), "{far}");
    let long = why(|i| {
        set64(i, 8, 512);
        set32(i, 16, 1024);
    });
    assert!(long.contains("1024 bytes"), "{long}");
}

#[test]
fn unknown_feature_is_named_from_the_images_own_table() {
    let why = why(|i| {
        let mut name = [0_u8; 48];
        name[1] = 40;
        name[2..11].copy_from_slice(b"teleport\n");
        extend(i, 0x6803_f857, &name);
        set64(i, 72, 1 << 40);
    });
    assert!(why.contains("\"teleport\\n\" (bit 40)"), "{why}");
}

#[test]
fn header_extension_past_its_area_is_refused() {
    for length in [0x10000, u32::MAX, u32::MAX - 7] {
        let why = why(|i| {
            set32(i, 104, 0x1234);
            set32(i, 108, length);
        });
        assert!(why.contains("header extension 0x1234 is too large"), "{why}");
    }
}

#[test]
fn wrong_tables_and_clusters_are_refused() {
    type Change = fn(&mut Vec<u8>);
    let (l1, l2) = (3 * CLUSTER, 4 * CLUSTER);
    assert_eq!((l1, l2), (196_608, 262_144));
    let cases: &[(Change, &str)] = &[
        (|i| set64(i, 196_608, 4 * CLUSTER as u64 + 512), "L2 table at 262656"),
        (|i| set64(i, 196_608, 6 * CLUSTER as u64), "L2 table at 393216"),
        (|i| set64(i, 196_608, 0x00ff_ffff_ffff_0000), "L2 table"),
        (|i| set64(i, 196_608, 3 * CLUSTER as u64), "over another table"),
        (|i| set64(i, 196_608, CLUSTER as u64), "over another table"),
        (|i| set64(i, 262_144, 5 * CLUSTER as u64 + 512), "askew"),
        (|i| set64(i, 262_144, 6 * CLUSTER as u64), "outside of the file"),
        (|i| set64(i, 262_144, 4 * CLUSTER as u64), "where a table lies"),
        (|i| set64(i, 262_144, 3 * CLUSTER as u64), "where a table lies"),
        (|i| set64(i, 262_144, CLUSTER as u64), "where a table lies"),
        (|i| set64(i, 262_144, COMPRESSED | 0x3fff_ffff_ffff_ffff), "outside of the file"),
        (|i| set64(i, 262_144, COMPRESSED | (5 * CLUSTER as u64)), "cannot be decompressed"),
    ];
    for (n, (change, want)) in cases.iter().enumerate() {
        let why = why(change);
        assert!(why.contains(want), "case {n}: {why:?} does not contain {want:?}");
    }
}

#[test]
fn l2_table_used_twice_is_refused() {
    let why = why(|i| {
        set64(i, 24, 600 << 20);
        set32(i, 36, 2);
        set64(i, 3 * CLUSTER + 8, 4 * CLUSTER as u64);
    });
    assert!(why.contains("L2 table at 262144 is used twice"), "{why}");
}

#[test]
fn version_2_with_a_zero_flag_is_refused() {
    let why = why(|i| set32(i, 4, 2));
    assert!(why.contains("version 2"), "{why}");
}

#[test]
fn subcluster_bitmap_that_contradicts_itself_is_refused() {
    let with = |host: u64, bitmap: u64| {
        why(move |i| {
            set64(i, 72, 1 << 4);
            set64(i, 4 * CLUSTER, host);
            set64(i, 4 * CLUSTER + 8, bitmap);
        })
    };
    assert!(with(5 * CLUSTER as u64, (1 << 32) | 1).contains("impossible bitmap"));
    assert!(with(0, 2).contains("impossible bitmap"));
    let small = why(|i| {
        set64(i, 72, 1 << 4);
        set32(i, 20, 13);
    });
    assert!(small.contains("16 KiB"), "{small}");
}

#[test]
fn data_beyond_the_limits_is_refused() {
    // Every guest cluster on the same host cluster: 1 MiB out of 64 KiB.
    let mut image = sound();
    for i in 0..16 {
        set64(&mut image, 4 * CLUSTER + 8 * i, 5 * CLUSTER as u64);
    }
    let limits = Limits { max_data_bytes: 1 << 20, ..Limits::default() };
    assert_eq!(convert_with(&image, &limits).unwrap().bytes_of(State::Data), 1 << 20);
    let limits = Limits { max_data_bytes: (1 << 20) - 1, ..Limits::default() };
    assert!(matches!(convert_with(&image, &limits), Err(Error::Limit { what: "data", .. })));
}

#[test]
fn truncated_anywhere_never_panics() {
    let image = sound();
    for end in (0..300).chain((300..image.len()).step_by(1021)) {
        let _ = convert(&image[..end]);
    }
}

#[test]
fn flipped_bits_anywhere_never_panic() {
    let tables = (0..200).chain(3 * CLUSTER..3 * CLUSTER + 16).chain(4 * CLUSTER..4 * CLUSTER + 160);
    let mut image = sound();
    for byte in tables {
        for bit in 0..8 {
            image[byte] ^= 1 << bit;
            let _ = convert(&image);
            image[byte] ^= 1 << bit;
        }
    }
}
