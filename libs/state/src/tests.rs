//! Blobs written, read and unpacked.

use std::fs::File;
use std::io::Read;

use crate::*;

fn temp() -> File {
    tempfile::tempfile().unwrap()
}

fn print() -> Fingerprint {
    Fingerprint { vmm: "0.1.0".into(), tsc_khz: 2_000_000, ..Fingerprint::default() }
}

fn sections() -> Vec<Section> {
    ["vcpu/0", "serial"]
        .map(|kind| Section { kind: kind.into(), version: 1, payload: kind.repeat(100).into_bytes() })
        .into()
}

/// Memory with zero, compressible, incompressible and partly zero chunks.
fn memory(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut data = vec![0; bytes];
    for (i, page) in data.chunks_mut(4096).enumerate() {
        match (i / 16 + i) % 5 {
            0 => {}
            1 => page.fill((i as u8).max(1)),
            _ => page.iter_mut().for_each(|b| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *b = (state >> 40) as u8 & if i % 3 == 0 { 0xff } else { 0x3 };
            }),
        }
    }
    data
}

fn write(data: &[u8], parent: Option<(&str, &[u8])>) -> (File, Summary) {
    let file = temp();
    let writer =
        SnapshotWriter::create(file.try_clone().unwrap(), data.len() as u64, parent.map(|p| p.0.to_owned())).unwrap();
    for (i, chunk) in data.chunks(CHUNK).enumerate() {
        if parent.is_some_and(|(_, old)| old.chunks(CHUNK).nth(i) == Some(chunk)) {
            writer.same_as_parent(i as u64).unwrap();
        } else {
            writer.put(i as u64, chunk).unwrap();
        }
    }
    let summary = writer.finish(2, print(), &sections()).unwrap();
    (file, summary)
}

fn unpack_all(blobs: &[(&File, &str)], threads: usize) -> Result<(Vec<u8>, Head, Vec<Section>)> {
    let (out, state) = (temp(), temp());
    let names: Vec<String> = blobs.iter().map(|b| b.1.to_owned()).collect();
    let opened = blobs.iter().map(|b| Blob::open(b.0.try_clone().unwrap())).collect::<Result<Vec<_>>>()?;
    let limits = Limits { memory: 1 << 30 };
    unpack(opened, &names, (&out, &state), threads, limits, &mut |_, _| true)?;
    let mut bytes = Vec::new();
    let mut reader = &out;
    reader.read_to_end(&mut bytes).unwrap();
    let (head, sections) = StateFile::read(&state)?;
    Ok((bytes, head, sections))
}

fn name(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

#[test]
fn a_blob_gives_back_memory_head_and_sections() {
    let data = memory(5 * CHUNK + 3 * 4096, 1);
    let (blob, summary) = write(&data, None);

    let (bytes, head, found) = unpack_all(&[(&blob, &name(1))], 3).unwrap();

    assert!(bytes == data);
    assert_eq!((head.vcpus, head.memory, head.parent), (2, data.len() as u64, None));
    assert_eq!((head.fingerprint, found), (print(), sections()));
    assert_eq!(summary.bytes, blob.metadata().unwrap().len());
}

#[test]
fn a_diff_restores_from_its_chain() {
    let base = memory(40 * CHUNK, 1);
    let mut middle = base.clone();
    middle[3 * CHUNK..4 * CHUNK].fill(7);
    middle[8 * CHUNK..9 * CHUNK].fill(0);
    let mut newest = middle.clone();
    newest[39 * CHUNK..].fill(9);
    let (a, _) = write(&base, None);
    let (b, _) = write(&middle, Some((&name(1), &base)));
    let (c, summary) = write(&newest, Some((&name(2), &middle)));
    assert_eq!(summary.chunks, 1);

    let (bytes, head, _) = unpack_all(&[(&c, &name(3)), (&b, &name(2)), (&a, &name(1))], 2).unwrap();

    assert!(bytes == newest);
    assert_eq!(head.parent, Some(name(2)));
}
