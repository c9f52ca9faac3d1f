//! Whole blobs: written, damaged, forged, read and unpacked. Tests of one module lie in it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use crate::head::{Extent, HeadDocument, SectionEntry};
use crate::index::{Entry, Kind};
use crate::prefix::{digest, PREFIX};
use crate::state_file::write_tail;
use crate::*;

const LIMITS: Limits = Limits { memory: 1 << 30 };

fn temp() -> File {
    tempfile::tempfile().unwrap()
}

fn file_of(bytes: &[u8]) -> File {
    let file = temp();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn print() -> Fingerprint {
    let cpuid = vec![CpuidEntry { function: 1, index: 0, flags: 0, eax: 1, ebx: 2, ecx: 3, edx: 4 }];
    let disks = vec![DiskPrint { size: 1 << 30, read_only: false }];
    Fingerprint { vmm: "0.1.0".into(), cpuid, tsc_khz: 2_000_000, disks, taken: 7, ..Fingerprint::default() }
}

fn sections() -> Vec<Section> {
    ["vcpu/0", "serial"]
        .map(|kind| Section { kind: kind.into(), version: 1, payload: kind.repeat(20).into_bytes() })
        .into()
}

/// Memory with zero, compressible, incompressible and partly zero chunks.
fn memory(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut data = vec![0; bytes];
    for (i, page) in data.chunks_mut(4096).enumerate() {
        match (i / 16 + i) % 5 {
            _ if (i / 16) % 4 == 3 => {}
            0 => {}
            1 => page.fill((i as u8).max(1)),
            _ => page.iter_mut().for_each(|b| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *b = (state >> 40) as u8 & if (i / 16) % 3 == 0 { 0xff } else { 0x3 };
            }),
        }
    }
    data
}

fn name(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

fn write(data: &[u8], parent: Option<(&str, &[u8])>) -> (File, Summary) {
    let file = temp();
    let parent_name = parent.map(|p| p.0.to_owned());
    let writer = SnapshotWriter::create(file.try_clone().unwrap(), data.len() as u64, parent_name).unwrap();
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

struct Out {
    memory: Vec<u8>,
    blocks: u64,
    head: Head,
    sections: Vec<Section>,
}

fn unpack_files(blobs: &[(&File, &str)], threads: usize, limits: Limits) -> Result<Out> {
    let (out, state) = (temp(), temp());
    let names: Vec<String> = blobs.iter().map(|b| b.1.to_owned()).collect();
    let opened = blobs.iter().map(|b| Blob::open(b.0.try_clone().unwrap())).collect::<Result<Vec<_>>>()?;
    // As `unpack` does it, without waiting for the disk.
    let job = Unpack::plan(opened, &names, out.try_clone().unwrap(), limits)?;
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(|| job.work()))));
    job.finish(&state)?;
    let (head, sections) = StateFile::read(&state)?;
    Ok(Out { memory: bytes_of(&out), blocks: out.metadata().unwrap().blocks(), head, sections })
}

fn unpack_one(blob: &File) -> Result<Out> {
    unpack_files(&[(blob, &name(1))], 2, LIMITS)
}

/// The error of a blob that must be refused.
fn refusal(blob: &File) -> String {
    match unpack_one(blob) {
        Ok(_) => panic!("it was unpacked"),
        Err(err) => err.to_string(),
    }
}

/// A blob of which every checksum holds, with the given index and chunks' area.
fn forge(memory: u64, entries: &[Entry], area: &[u8], edit: impl FnOnce(&mut HeadDocument)) -> File {
    let file = temp();
    let mut index = Vec::new();
    entries.iter().for_each(|entry| entry.encode(&mut index));
    let at = PREFIX + area.len() as u64;
    file.write_all_at(area, PREFIX).unwrap();
    file.write_all_at(&index, at).unwrap();
    let length = index.len() as u64;
    let mut document = HeadDocument {
        vcpus: 1,
        memory,
        parent: None,
        fingerprint: print(),
        index: Some(Extent { offset: at, length, checksum: digest(&index) }),
        sections: Vec::new(),
    };
    edit(&mut document);
    write_tail(&file, &document.head(Arch::HOST), &mut document, at + length, &sections()).unwrap();
    file
}

#[test]
fn a_blob_gives_back_memory_head_and_sections() {
    let data = memory(70 * CHUNK + 3 * 4096, 1);
    let (blob, summary) = write(&data, None);

    let out = unpack_files(&[(&blob, &name(1))], 3, LIMITS).unwrap();

    assert!(out.memory == data);
    assert_eq!((out.head.vcpus, out.head.memory, out.head.parent), (2, data.len() as u64, None));
    assert_eq!((out.head.fingerprint, out.sections), (print(), sections()));
    assert_eq!(summary.bytes, blob.metadata().unwrap().len());
    let zero_pages = data.chunks(4096).filter(|page| page.iter().all(|b| *b == 0)).count() as u64;
    assert!(zero_pages > 300 && out.blocks * 512 <= data.len() as u64 - zero_pages * 4096 + 65536, "no holes");
}

#[test]
fn a_diff_restores_from_its_chain() {
    let base = memory(40 * CHUNK, 1);
    let mut middle = base.clone();
    middle[4 * CHUNK..5 * CHUNK].fill(7);
    middle[8 * CHUNK..9 * CHUNK].fill(0);
    let mut newest = middle.clone();
    newest[39 * CHUNK..].fill(9);
    let (a, _) = write(&base, None);
    let (b, _) = write(&middle, Some((&name(1), &base)));
    let (c, summary) = write(&newest, Some((&name(2), &middle)));

    let out = unpack_files(&[(&c, &name(3)), (&b, &name(2)), (&a, &name(1))], 2, LIMITS).unwrap();

    assert!(out.memory == newest);
    assert_eq!((out.head.parent, summary.chunks, summary.content), (Some(name(2)), 1, CHUNK as u64));
}

#[test]
fn chains_that_do_not_fit_are_refused() {
    let base = memory(4 * CHUNK, 1);
    let (a, _) = write(&base, None);
    let (b, _) = write(&base, Some((&name(1), &base)));
    let (small, _) = write(&base[..CHUNK], None);
    let (n1, n2, n3) = (name(1), name(2), name(3));
    let many: Vec<_> = (0..=MAX_CHAIN).map(|_| (&b, n1.as_str())).collect();
    let cases: [(&[(&File, &str)], &str); 6] = [
        (&[], "there is no blob"),
        (&[(&b, &n2)], "the parent sha256:0101"),
        (&[(&b, &n2), (&a, &n3)], "is missing, sha256:0303"),
        (&[(&a, &n2), (&a, &n1)], "lies below one that is whole"),
        (&[(&b, &n2), (&small, &n1)], "262144 bytes of memory, another of 65536"),
        (&many, "at most 32"),
    ];
    for (blobs, want) in cases {
        let err = unpack_files(blobs, 1, LIMITS).err().unwrap().to_string();
        assert!(err.contains(want), "{want}: {err}");
    }
}

#[test]
fn memory_beyond_the_limit_returns_too_large_before_anything_is_written() {
    let (blob, _) = write(&memory(4 * CHUNK, 1), None);
    let err = unpack_files(&[(&blob, &name(1))], 1, Limits { memory: CHUNK as u64 }).err().unwrap();
    assert!(matches!(err, SnapshotError::TooLarge { what: "memory", bytes: 262_144, limit: 65_536 }), "{err}");
}

#[test]
fn every_flipped_byte_is_refused_or_changes_nothing() {
    let data = memory(6 * 4096, 5);
    let (blob, _) = write(&data, None);
    let good = bytes_of(&blob);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        // Some bytes of an lz4 block can say the same in another way.
        let harmless = |out: Out| out.memory == data && out.sections == sections() && out.head.fingerprint == print();
        let is_fine = unpack_one(&file_of(&bad)).map_or(true, harmless);
        assert!(is_fine, "byte {at} of {} was changed and nobody noticed", good.len());
    }
}

#[test]
fn every_truncation_and_every_longer_file_is_refused() {
    let (blob, _) = write(&memory(2 * CHUNK, 5), None);
    let good = bytes_of(&blob);
    let boundaries = (0..=PREFIX as usize).chain((PREFIX as usize..good.len()).step_by(97));
    for length in boundaries.chain(good.len() - 4096..good.len()) {
        assert!(unpack_one(&file_of(&good[..length])).is_err(), "{length} of {} bytes are enough", good.len());
    }
    let longer = [good.as_slice(), &[0]].concat();
    assert!(refusal(&file_of(&longer)).contains("its prefix says"));
}

#[test]
fn forged_indices_are_refused() {
    let chunk = vec![7_u8; CHUNK];
    let memory = 4 * CHUNK as u64;
    let raw = |chunk_number: u32, offset: u64| Entry {
        chunk: chunk_number,
        kind: Kind::Raw,
        length: CHUNK as u32,
        offset,
        digest: digest(&chunk),
    };
    let zero = Entry { chunk: 1, ..Entry::default() };
    let lz4 = Entry { kind: Kind::Lz4, length: 0, ..raw(0, PREFIX) };
    let bomb = Entry { kind: Kind::Lz4, length: 100, ..raw(0, PREFIX) };
    let cases: [(&[Entry], &str); 12] = [
        (&[raw(4, PREFIX)], "behind the end of the memory"),
        (&[raw(u32::MAX, PREFIX)], "behind the end of the memory"),
        (&[raw(1, PREFIX), raw(0, PREFIX)], "not in order"),
        (&[raw(1, PREFIX), raw(1, PREFIX)], "not in order"),
        (&[raw(0, PREFIX), raw(1, PREFIX + 1)], "lies over another"),
        (&[raw(0, PREFIX), raw(1, PREFIX)], "lies over another"),
        (&[raw(0, 0)], "outside of the file's chunks"),
        (&[raw(0, PREFIX + CHUNK as u64 + 1)], "outside of the file's chunks"),
        (&[raw(0, u64::MAX)], "outside of the file's chunks"),
        (&[Entry { offset: PREFIX, ..zero }], "all zero and yet stored"),
        (&[lz4], "not shorter than what it stands for"),
        (&[bomb], "no lz4 block of its length"),
    ];
    for (entries, want) in cases {
        let err = refusal(&forge(memory, entries, &chunk.repeat(2), |_| ()));
        assert!(err.contains(want), "{want}: {err}");
    }
    let wrong = Entry { digest: [0; 16], ..raw(0, PREFIX) };
    let err = refusal(&forge(memory, &[wrong], &chunk, |_| ()));
    assert_eq!(err, "the RAM snapshot is damaged: the checksum of chunk 0 of the memory does not hold");
    let fine = unpack_one(&forge(memory, &[raw(2, PREFIX), Entry { chunk: 3, ..zero }], &chunk, |_| ())).unwrap();
    assert!(fine.memory[2 * CHUNK..3 * CHUNK] == chunk && fine.memory[..2 * CHUNK].iter().all(|b| *b == 0));
}

#[test]
fn forged_heads_are_refused() {
    type Edit = fn(&mut HeadDocument);
    let cases: [(Edit, &str); 15] = [
        (|d| d.memory = 0, "not a multiple of 4096"),
        (|d| d.memory = 4097, "not a multiple of 4096"),
        (|d| d.memory = 1 << 45, "at most 17592186044416"),
        (|d| d.vcpus = 0, "not 1 to 1024"),
        (|d| d.vcpus = u32::MAX, "not 1 to 1024"),
        (|d| d.parent = Some("sha256:../../etc".into()), "no sha256 digest"),
        (|d| d.index.as_mut().unwrap().offset = 8, "begins within the prefix"),
        (|d| d.index.as_mut().unwrap().offset = u64::MAX, "is not where it must be"),
        (|d| d.index.as_mut().unwrap().length += 32, "is not where it must be"),
        (|d| d.index.as_mut().unwrap().length = 31, "does not fit its memory"),
        (|d| d.index.as_mut().unwrap().length = 1 << 50, "does not fit its memory"),
        (|d| d.index = None, "holds no memory"),
        (|d| d.fingerprint.capabilities = vec!["\u{1b}[2J".into()], "printable"),
        (|d| d.fingerprint.cpuid[0].index = 1, "CPUID 0x1.1 has an index that does not count"),
        (|d| d.fingerprint.disks = vec![DiskPrint { size: 1, read_only: true }; 1025], "1025 entries"),
    ];
    for (edit, want) in cases {
        let err = refusal(&forge(4 * CHUNK as u64, &[], &[], edit));
        assert!(err.contains(want), "{want}: {err}");
    }
}

#[test]
fn sections_that_are_too_much_together_are_neither_read_nor_written() {
    let section =
        |number: usize, bytes: usize| Section { kind: format!("vcpu/{number}"), version: 1, payload: vec![7; bytes] };
    let most = MAX_SECTIONS_BYTES / MAX_SECTION_BYTES;
    let mut sections: Vec<_> = (0..most).map(|number| section(number, MAX_SECTION_BYTES)).collect();
    let head = Head { arch: Arch::HOST, vcpus: 1, memory: 4096, parent: None, fingerprint: print() };
    let write = |sections: &[Section]| {
        let writer = SnapshotWriter::create(temp(), 4096, None).unwrap();
        writer.finish(1, print(), sections).and(StateFile::write(&temp(), &head, sections))
    };
    write(&sections).unwrap();
    let file = temp();
    StateFile::write(&file, &head, &sections).unwrap();
    assert!(StateFile::read(&file).unwrap().1 == sections);

    sections.push(section(most, 1));
    let want = "the saved state of the RAM snapshot has 8388609 bytes, at most 8388608 are allowed";
    assert_eq!(write(&sections).unwrap_err().to_string(), want);
    // The head alone says so: there are no such bytes.
    let forged = forge(4096, &[], &[], |document| {
        (0..MAX_SECTIONS as u64 - 2).for_each(|number| {
            document.sections.push(SectionEntry {
                kind: format!("part/{number}"),
                version: 1,
                offset: PREFIX + (number << 20),
                length: 1 << 20,
                checksum: [0; 16],
            });
        });
    });
    let want = "the saved state of the RAM snapshot has";
    for err in [Blob::open(forged.try_clone().unwrap()).err(), StateFile::head(&forged).err()] {
        assert!(err.unwrap().to_string().starts_with(want));
    }
    assert!(refusal(&forged).starts_with(want));
}

#[test]
fn an_index_longer_than_the_memory_has_chunks_is_refused() {
    let many: Vec<_> = (0..5).map(|chunk| Entry { chunk, ..Entry::default() }).collect();
    let err = refusal(&forge(4 * CHUNK as u64, &many, &[], |_| ()));
    assert!(err.contains("does not fit its memory"), "{err}");
}

#[test]
fn zstd_chunks_are_read() {
    let mut data = vec![0; 2 * CHUNK + 4096];
    data[CHUNK..].fill(5);
    data[CHUNK + 77] = 1;
    let (mut area, mut entries) = (Vec::new(), Vec::new());
    for (i, chunk) in data.chunks(CHUNK).enumerate().skip(1) {
        let packed = zstd::bulk::compress(chunk, 3).unwrap();
        let (length, offset) = (packed.len() as u32, PREFIX + area.len() as u64);
        entries.push(Entry { chunk: i as u32, kind: Kind::Zstd, length, offset, digest: digest(chunk) });
        area.extend(packed);
    }
    assert!(unpack_one(&forge(data.len() as u64, &entries, &area, |_| ())).unwrap().memory == data);
    entries[0].length -= 1;
    let err = refusal(&forge(data.len() as u64, &entries, &area, |_| ()));
    assert!(err.contains("no zstd frame"), "{err}");
    // A bomb: far more than the chunk it stands for.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
    let entry = Entry { chunk: 0, kind: Kind::Zstd, length: bomb.len() as u32, offset: PREFIX, digest: [0; 16] };
    let err = refusal(&forge(data.len() as u64, &[entry], &bomb, |_| ()));
    assert!(err.contains("no zstd frame of its length"), "{err}");
}

#[test]
fn a_state_file_is_no_memory() {
    let file = temp();
    let (blob, _) = write(&memory(CHUNK, 1), None);
    let head = Blob::open(blob).unwrap().head().clone();
    StateFile::write(&file, &head, &sections()).unwrap();
    assert_eq!(StateFile::head(&file).unwrap(), head);
    assert!(refusal(&file).contains("holds no memory"));
}

#[test]
fn put_by_many_threads_and_again_keeps_the_last_of_each() {
    let old = memory(64 * CHUNK, 1);
    let mut new = old.clone();
    new[..40 * CHUNK].copy_from_slice(&memory(40 * CHUNK, 9));
    new[41 * CHUNK..42 * CHUNK].fill(0);
    let file = temp();
    let writer = SnapshotWriter::create(file.try_clone().unwrap(), old.len() as u64, None).unwrap();
    for data in [&old, &new] {
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| loop {
                    let chunk = next.fetch_add(1, Ordering::Relaxed);
                    let Some(bytes) = data.chunks(CHUNK).nth(chunk as usize) else { return };
                    writer.put(chunk, bytes).unwrap();
                });
            }
        });
    }
    let summary = writer.finish(1, print(), &[]).unwrap();
    assert!(unpack_one(&file).unwrap().memory == new);
    // Without the dead space it is as large as one that was written once.
    let (once, _) = write(&new, None);
    let slack = once.metadata().unwrap().len().abs_diff(summary.bytes);
    assert!(slack < 4096, "{slack} bytes of dead space are left");
}

#[test]
fn little_dead_space_stays() {
    let data = memory(64 * CHUNK, 1);
    let file = temp();
    let writer = SnapshotWriter::create(file.try_clone().unwrap(), data.len() as u64, None).unwrap();
    for (i, chunk) in data.chunks(CHUNK).enumerate() {
        writer.put(i as u64, chunk).unwrap();
    }
    writer.put(0, &data[..CHUNK]).unwrap();
    writer.finish(1, print(), &[]).unwrap();
    assert!(unpack_one(&file).unwrap().memory == data);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let create = |memory, parent: Option<&str>| SnapshotWriter::create(temp(), memory, parent.map(str::to_owned));
    assert!(create(0, None).is_err() && create(4095, None).is_err() && create(1 << 60, None).is_err());
    assert!(create(4096, Some("sha256:1")).is_err());
    assert!(SnapshotWriter::create(file_of(b"x"), 4096, None).is_err());
    let writer = create(CHUNK as u64 + 4096, None).unwrap();
    assert_eq!((writer.chunks(), writer.chunk_len(0), writer.chunk_len(1), writer.chunk_len(2)), (2, CHUNK, 4096, 0));
    assert!(writer.put(2, &[0; CHUNK]).is_err() && writer.put(u64::MAX, &[]).is_err());
    assert!(writer.put(1, &[0; CHUNK]).is_err() && writer.same_as_parent(0).is_err());
    assert_eq!(writer.put(1, &[0; 4096]).unwrap(), Stored::Zero);
    assert_eq!(writer.put(0, &[1; CHUNK]).unwrap(), Stored::Compressed);
    let twice = [sections(), sections()].concat();
    assert!(writer.finish(1, print(), &twice).unwrap_err().to_string().contains("two sections of kind vcpu/0"));
}

#[test]
fn a_blob_without_its_end_is_none() {
    let file = temp();
    let writer = SnapshotWriter::create(file.try_clone().unwrap(), CHUNK as u64, None).unwrap();
    writer.put(0, &[1; CHUNK]).unwrap();
    drop(writer);
    assert!(matches!(Blob::open(file), Err(SnapshotError::NotOne)));
}

#[test]
fn unpack_tells_how_far_it_is_and_stops_when_asked() {
    let data = memory(64 * CHUNK, 1);
    let (blob, _) = write(&data, None);
    let (out, state) = (temp(), temp());
    let mut last = (0, 0);
    let mut tell = |done, total| {
        last = (done, total);
        true
    };
    unpack(vec![Blob::open(blob.try_clone().unwrap()).unwrap()], &[name(1)], (&out, &state), 2, LIMITS, &mut tell)
        .unwrap();
    assert!(last == (data.len() as u64, data.len() as u64) && bytes_of(&out) == data);

    let job = Unpack::plan(vec![Blob::open(blob).unwrap()], &[name(1)], temp(), LIMITS).unwrap();
    job.cancel();
    job.work();
    assert_eq!(job.progress().0, 0);
    assert!(matches!(job.finish(&temp()), Err(SnapshotError::Cancelled)));
}

#[test]
fn another_epoch_or_file_is_named() {
    let (blob, _) = write(&memory(CHUNK, 1), None);
    let mut bytes = bytes_of(&blob);
    bytes[8] = 9;
    let sum = twox_hash::XxHash3_64::oneshot(&bytes[..56]).to_le_bytes();
    bytes[56..64].copy_from_slice(&sum);
    assert!(matches!(Blob::open(file_of(&bytes)), Err(SnapshotError::Epoch(9))));
    assert!(matches!(Blob::open(file_of(b"\x04\x22\x4d\x18 an lz4 frame")), Err(SnapshotError::NotOne)));
    assert!(matches!(Blob::open(file_of(b"")), Err(SnapshotError::NotOne)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any series of diffs, each on the one before, restores every one of its states.
    #[test]
    fn chains_of_any_writes_restore(
        pages in 1_usize..80,
        states in proptest::collection::vec(
            proptest::collection::vec((0_usize..80, any::<u8>(), any::<bool>()), 0..12), 1..5),
        threads in 1_usize..4,
    ) {
        let mut data = vec![0_u8; pages * 4096];
        let mut blobs: Vec<(File, String)> = Vec::new();
        for (i, writes) in states.iter().enumerate() {
            let before = data.clone();
            for (page, value, whole) in writes {
                let start = page % pages * 4096;
                let length = if *whole { 4096 } else { 3 };
                data[start..start + length].fill(*value);
            }
            let parent = blobs.first().map(|(_, name)| (name.as_str(), before.as_slice()));
            let (file, _) = write(&data, parent);
            blobs.insert(0, (file, name(i as u8)));
            let chain: Vec<_> = blobs.iter().map(|(file, name)| (file, name.as_str())).collect();
            let out = unpack_files(&chain, threads, LIMITS).unwrap();
            prop_assert!(out.memory == data);
        }
    }

    /// Bytes that are anything do no harm.
    #[test]
    fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(unpack_one(&file_of(&bytes)).is_err());
        prop_assert!(WorkingSet::decode(&bytes, 1 << 30).is_err());
    }
}
