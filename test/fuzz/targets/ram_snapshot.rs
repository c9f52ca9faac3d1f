//! A RAM blob as it comes from a registry, or with a base below it. The checksums would keep a fuzzer out, so the first byte
//! says what is done with the rest: taken as it is, or cut into index, chunks and head, around which right checksums are
//! put.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use ovms_state::{Blob, Limits, SnapshotWriter, StateFile, Unpack, WorkingSet, CHUNK};
use twox_hash::{XxHash3_128, XxHash3_64};

const MEMORY: u64 = 4 * CHUNK as u64;
const LIMITS: Limits = Limits { memory: 1 << 20 };
const PARENT: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    match choice % 4 {
        0 => unpack(vec![file(bytes)]),
        1 => unpack(vec![file(&sealed(bytes))]),
        2 => unpack(vec![file(&around(bytes)), base()]),
        _ => {
            let _ = WorkingSet::decode(bytes, MEMORY);
        }
    }
});

/// The whole blob with the checksums of head and prefix made right: what follows them is read.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut blob = bytes.to_vec();
    blob.resize(blob.len().max(64), 0);
    let offset = u32::from_le_bytes([blob[16], blob[17], blob[18], blob[19]]) as usize;
    let head = offset.clamp(64, blob.len());
    seal(&mut blob, head);
    blob
}

fn seal(blob: &mut [u8], head: usize) {
    let length = blob.len() as u64;
    let sum = XxHash3_128::oneshot(&blob[head..]).to_le_bytes();
    blob[..8].copy_from_slice(b"OVMSRAM\0");
    blob[8..12].copy_from_slice(&1_u32.to_le_bytes());
    blob[12..16].copy_from_slice(&62_u32.to_le_bytes());
    blob[16..24].copy_from_slice(&(head as u64).to_le_bytes());
    blob[24..32].copy_from_slice(&(length - head as u64).to_le_bytes());
    blob[32..40].copy_from_slice(&length.to_le_bytes());
    blob[40..56].copy_from_slice(&sum);
    let sum = XxHash3_64::oneshot(&blob[..56]).to_le_bytes();
    blob[56..64].copy_from_slice(&sum);
}

/// A head that holds, around an index and chunks that are anything.
fn around(bytes: &[u8]) -> Vec<u8> {
    let Some((count, rest)) = bytes.split_first() else { return Vec::new() };
    let index = rest.len().min(usize::from(count % 6) * 32) / 32 * 32;
    let (index, area) = rest.split_at(index);
    let mut blob = vec![0; 64];
    blob.extend(area);
    let at = blob.len();
    blob.extend(index);
    let head = blob.len();
    let sum = u128::from_be_bytes(XxHash3_128::oneshot(index).to_le_bytes());
    blob.extend(
        format!(
            r#"{{"vcpus":1,"memory":{MEMORY},"parent":"{PARENT}","fingerprint":{{"vmm":"0"}},"index":{{"offset":{at},"length":{},"checksum":"{sum:032x}"}},"sections":[]}}"#,
            index.len()
        )
        .bytes(),
    );
    seal(&mut blob, head);
    blob
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn base() -> File {
    let file = file(&[]);
    let writer = SnapshotWriter::create(file.try_clone().unwrap(), MEMORY, None).unwrap();
    writer.put(1, &[7; CHUNK]).unwrap();
    writer.finish(1, Default::default(), &[]).unwrap();
    file
}

fn unpack(files: Vec<File>) {
    let Ok(blobs) = files.into_iter().map(Blob::open).collect::<Result<Vec<_>, _>>() else { return };
    let names: Vec<_> = (0..blobs.len()).map(|_| PARENT.to_owned()).collect();
    let (memory, state) = (file(&[]), file(&[]));
    let size = blobs[0].head().memory;
    let Ok(job) = Unpack::plan(blobs, &names, memory.try_clone().unwrap(), LIMITS) else { return };
    job.work();
    assert_eq!(memory.metadata().unwrap().len(), size, "the memory has another size than its head says");
    if job.finish(&state).is_ok() {
        StateFile::read(&state).expect("what was unpacked cannot be read");
    }
}
